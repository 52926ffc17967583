package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/broker"
	"penstock/storage"
)

// What a PUBLISH is answered, to the bit, and what its subscriber gets.
func TestV3PublishAnswers(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.4-1", "MQTT-2.3.1-5", "MQTT-2.3.1-6", "MQTT-3.3.1-2", "MQTT-4.3.1-1", "MQTT-4.3.2-1", "MQTT-4.3.2-2", "MQTT-4.3.3-1", "MQTT-4.3.3-2")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	c.subscribe(2, "a")
	p.send(p.publishFrame(message{topic: "a", payload: "0"}))
	c.expectFrame(frame(0x30, str("a"), []byte("0"))) // without an identifier, and without DUP
	p.ping()                                          // it was answered nothing

	p.send(p.publishFrame(message{topic: "a", qos: 1, id: 0x1234, payload: "1"}))
	p.expectFrame(frame(0x40, u16(0x1234)))
	m := c.receive()
	if m.qos != 1 || m.dup || m.id == 0 {
		t.Errorf("got %+v", m)
	}
	c.send(ackFrame(kindPuback, m.id))

	p.send(p.publishFrame(message{topic: "a", qos: 2, id: 0x4321, payload: "2"}))
	p.expectFrame(frame(0x50, u16(0x4321)))
	p.send(pubrelFrame(0x4321))
	p.expectFrame(frame(0x70, u16(0x4321)))
	m = c.receive()
	if m.qos != 2 || m.dup || m.id == 0 {
		t.Errorf("got %+v", m)
	}
	c.send(ackFrame(kindPubrec, m.id))
	c.expectFrame(frame(0x62, u16(m.id)))
	c.send(ackFrame(kindPubcomp, m.id))
	c.silent()
}

// Payloads of any size and bytes come through, with none at all too.
func TestV3Payloads(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.5.0-1", "MQTT-3.3.4-1")
	s := start(t)
	c := s.v3(t, "c")
	c.subscribe(2, "a")
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	for _, payload := range []string{"", "\x00", string(all), strings.Repeat("x", 122), strings.Repeat("x", 123), strings.Repeat("x", 16378), strings.Repeat("x", 16379), strings.Repeat("\xFF", 1<<20-64)} {
		for qos := range byte(3) {
			c.publish(message{topic: "a", qos: qos, payload: payload})
			if m := c.take(); m.payload != payload || m.qos != qos {
				t.Errorf("got %d bytes at QoS %d, want %d at %d", len(m.payload), m.qos, len(payload), qos)
			}
		}
	}
}

func TestV3DeliveredQoS(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.8.4-5", "MQTT-3.8.4-6", "MQTT-3.3.5-1", "MQTT-3.8.4-1", "MQTT-3.8.4-2", "MQTT-2.3.1-7")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	for granted := range byte(3) {
		topic := fmt.Sprint("t", granted)
		c.send(c.subscribeFrame(0x0A0B, granted, []string{topic}))
		c.expectFrame(frame(0x90, u16(0x0A0B), []byte{granted}))
		for qos := range byte(3) {
			p.publish(message{topic: topic, qos: qos, payload: "x"})
			if m := c.take(); m.qos != min(qos, granted) {
				t.Errorf("published at %d, granted %d: got QoS %d", qos, granted, m.qos)
			}
		}
	}
	// Of overlapping subscriptions the highest counts.
	c.subscribe(0, "o/#")
	c.subscribe(2, "o/a")
	c.subscribe(1, "o/+")
	for qos := range byte(3) {
		p.publish(message{topic: "o/a", qos: qos, payload: "x"})
		p.publish(message{topic: "o/b", qos: qos, payload: "y"})
		if m := c.take(); m.qos != qos || m.payload != "x" {
			t.Errorf("overlapping at QoS 2: got %+v, want QoS %d", m, qos)
		}
		if m := c.take(); m.qos != min(qos, 1) || m.payload != "y" {
			t.Errorf("overlapping at QoS 1: got %+v, want QoS %d", m, min(qos, 1))
		}
	}
	c.silent()
}

// DUP of what comes in says nothing about what goes out.
func TestV3DUPIsNotPassedOn(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.1-3")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	c.subscribe(2, "a")
	for qos := byte(1); qos < 3; qos++ {
		for _, dup := range []bool{false, true} {
			p.publish(message{topic: "a", qos: qos, dup: dup})
			if m := c.take(); m.dup || m.qos != qos {
				t.Errorf("QoS %d, DUP %v: got %+v", qos, dup, m)
			}
		}
	}
}

// An identifier of QoS 1 is free as soon as it is acknowledged, whatever DUP
// says.
func TestV3QoS1Again(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.3.2-2", "MQTT-2.3.1-2", "MQTT-2.3.1-3")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	c.subscribe(1, "a")
	for i, dup := range []bool{false, true, false, true} {
		p.publish(message{topic: "a", qos: 1, id: 5, dup: dup, payload: fmt.Sprint(i)})
		c.takePayloads(fmt.Sprint(i))
	}
	c.silent()
}

// The receiver's side of QoS 2: one message, however often it comes.
func TestV3QoS2In(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.3.3-2", "MQTT-2.3.1-6", "MQTT-2.3.1-3")
	s := start(t)
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	for _, clean := range []bool{true, false} {
		p, _ := s.connect(t, connectFields{version: 4, clean: clean, id: "p"})
		m := message{topic: "a", qos: 2, id: 7, payload: "once"}
		for range 3 { // with and without DUP, and with another payload: the identifier counts
			p.send(p.publishFrame(m))
			p.ack(kindPubrec, 7)
			m.dup = !m.dup
		}
		c.takePayloads("once")
		p.send(p.publishFrame(message{topic: "a", qos: 2, id: 8, payload: "another"}))
		p.ack(kindPubrec, 8)
		for range 3 {
			p.send(pubrelFrame(7))
			p.ack(kindPubcomp, 7)
		}
		p.send(pubrelFrame(999)) // one that never was: its PUBCOMP may have been lost
		p.ack(kindPubcomp, 999)
		// After PUBCOMP the identifier is a new message's.
		p.send(p.publishFrame(message{topic: "a", qos: 2, id: 7, payload: "new", dup: true}))
		p.ack(kindPubrec, 7)
		c.takePayloads("another", "new")
		p.send(pubrelFrame(7), pubrelFrame(8))
		p.ack(kindPubcomp, 7)
		p.ack(kindPubcomp, 8)
		c.silent()
		p.disconnect()
	}
}

// An open QoS 2 identifier belongs to the session: it outlives the connection,
// but not a clean session.
func TestV3QoS2InReconnect(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.3.3-2", "MQTT-4.4.0-1", "MQTT-3.1.2-6", "MQTT-4.1.0-1")
	s := start(t)
	c := s.v3(t, "c")
	c.subscribe(2, "a")
	p, _ := s.v3Session(t, "p")
	p.send(p.publishFrame(message{topic: "a", qos: 2, id: 7, payload: "once"}))
	p.ack(kindPubrec, 7)
	p.drop()
	p, _ = s.v3Session(t, "p")
	p.send(p.publishFrame(message{topic: "a", qos: 2, id: 7, payload: "once", dup: true}))
	p.ack(kindPubrec, 7)
	p.drop()
	p, _ = s.v3Session(t, "p")
	p.send(pubrelFrame(7))
	p.ack(kindPubcomp, 7)
	c.takePayloads("once")
	p.send(p.publishFrame(message{topic: "a", qos: 2, id: 9, payload: "left open"}))
	p.ack(kindPubrec, 9)
	c.takePayloads("left open")
	p.drop()
	p = s.v3(t, "p")
	p.send(p.publishFrame(message{topic: "a", qos: 2, id: 9, payload: "a new session"}))
	p.ack(kindPubrec, 9)
	c.takePayloads("a new session")
	c.silent()
}

// The sender's side of QoS 1 and 2: what is not acknowledged comes again on the
// next connection, with the same identifier, with DUP, in the same order; what
// is acknowledged does not; after PUBREC it is the PUBREL that comes again.
func TestV3Redelivery(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.4.0-1", "MQTT-3.3.1-1", "MQTT-2.3.1-4", "MQTT-4.3.2-1", "MQTT-4.3.3-1", "MQTT-4.6.0-1", "MQTT-4.5.0-2")
	s := start(t)
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	p := s.v3(t, "p")
	for i := range 8 {
		p.publish(message{topic: "a", qos: byte(1 + i%2), payload: fmt.Sprint(i)})
	}
	var sent []message
	for i := range 8 {
		m := c.receive()
		if m.dup || m.payload != fmt.Sprint(i) || m.id == 0 || slices.ContainsFunc(sent, func(o message) bool { return o.id == m.id }) {
			t.Fatalf("delivery %d: got %+v", i, m)
		}
		sent = append(sent, m)
	}
	again := func(want ...int) {
		t.Helper()
		for _, i := range want {
			if m := c.receive(); !m.dup || m.id != sent[i].id || m.payload != sent[i].payload || m.qos != sent[i].qos || m.topic != "a" {
				t.Fatalf("got %+v, want %+v again", m, sent[i])
			}
		}
	}
	c.drop()
	c, _ = s.v3Session(t, "c")
	again(0, 1, 2, 3, 4, 5, 6, 7)
	c.send(ackFrame(kindPuback, sent[0].id), ackFrame(kindPuback, sent[4].id), ackFrame(kindPubrec, sent[3].id), ackFrame(kindPubrec, sent[5].id))
	c.ack(kindPubrel, sent[3].id)
	c.ack(kindPubrel, sent[5].id)
	c.send(ackFrame(kindPubcomp, sent[5].id))
	c.ping()
	c.drop()
	// A PUBREL is sent again as it was, and the PUBLISH of it is not.
	for range 2 {
		c, _ = s.v3Session(t, "c")
		again(1, 2)
		c.ack(kindPubrel, sent[3].id)
		again(6, 7)
		c.drop()
	}
	c, _ = s.v3Session(t, "c")
	again(1, 2)
	c.ack(kindPubrel, sent[3].id)
	again(6, 7)
	c.send(ackFrame(kindPuback, sent[2].id), ackFrame(kindPuback, sent[6].id), ackFrame(kindPubcomp, sent[3].id), ackFrame(kindPubrec, sent[1].id), ackFrame(kindPubrec, sent[7].id))
	c.ack(kindPubrel, sent[1].id)
	c.ack(kindPubrel, sent[7].id)
	c.send(ackFrame(kindPubcomp, sent[1].id), ackFrame(kindPubcomp, sent[7].id))
	c.ping()
	c.drop()
	c, _ = s.v3Session(t, "c")
	c.silent()
}

// While the connection lasts nothing is sent twice, for MQTT 3.1.1 asks for it
// on reconnect only, and an acknowledgement that fits nothing changes nothing.
func TestV3StrayAcknowledgements(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.3.2-1", "MQTT-4.3.3-1", "MQTT-2.3.1-4")
	s := start(t)
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	c.send(ackFrame(kindPuback, 1), ackFrame(kindPubcomp, 1), ackFrame(kindPubrec, 77))
	c.ack(kindPubrel, 77) // its PUBREL may have been lost
	c.send(ackFrame(kindPubcomp, 77))
	p := s.v3(t, "p")
	p.publish(message{topic: "a", qos: 1, payload: "1"})
	p.publish(message{topic: "a", qos: 2, payload: "2"})
	one, two := c.receive(), c.receive()
	// A PUBACK for QoS 2 and a PUBCOMP before its PUBREC are not what was asked for.
	c.send(ackFrame(kindPuback, two.id), ackFrame(kindPubcomp, two.id), ackFrame(kindPubcomp, one.id))
	c.ping()
	c.drop()
	c, _ = s.v3Session(t, "c")
	if m := c.receive(); m.id != one.id || !m.dup {
		t.Errorf("got %+v, want %+v again", m, one)
	}
	if m := c.receive(); m.id != two.id || !m.dup {
		t.Errorf("got %+v, want %+v again", m, two)
	}
	for range 2 { // a PUBREC that comes twice is answered twice
		c.send(ackFrame(kindPubrec, two.id))
		c.ack(kindPubrel, two.id)
	}
	c.send(ackFrame(kindPubcomp, two.id), ackFrame(kindPubcomp, two.id), ackFrame(kindPuback, one.id), ackFrame(kindPuback, one.id))
	c.silent()
	c.drop()
	c, _ = s.v3Session(t, "c")
	c.silent()
}

// An identifier in flight belongs to one message, also when there are more
// messages than identifiers: the rest waits.
func TestV3UnusedIdentifiers(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-2.3.1-4", "MQTT-4.3.2-1", "MQTT-4.3.3-1")
	s := start(t)
	c := s.v3(t, "c")
	c.subscribe(1, "a")
	p := s.v3(t, "p")
	const others, more, batch = 65534, 66, 200
	go func() {
		for n := 0; n < 1+others+more; n += batch {
			var b []byte
			k := min(batch, 1+others+more-n)
			for i := range k {
				b = append(b, p.publishFrame(message{topic: "a", qos: 1, id: 1 + i})...)
			}
			p.trySend(b)
			for range k {
				if _, err := p.tryRead(); err != nil {
					return
				}
			}
		}
	}()
	stuck := c.receive()
	take := func(n int, taken map[int]bool) {
		t.Helper()
		for range n {
			m := c.receive()
			if m.id == 0 || taken[m.id] {
				t.Fatalf("got identifier %d, which is 0 or in use", m.id)
			}
			c.send(ackFrame(kindPuback, m.id))
		}
	}
	taken := map[int]bool{stuck.id: true}
	take(others, taken)
	c.ping()
	if len(c.stash) > 0 {
		t.Fatalf("got %d messages although every other identifier was used since", len(c.stash))
	}
	c.send(ackFrame(kindPuback, stuck.id))
	take(more, nil)
	c.silent()
}

func TestV3Order(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.6.0-5", "MQTT-4.6.0-6", "MQTT-4.6.0-1")
	s := start(t)
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "#")
	const n = 300
	publish := func(p *client, from int) {
		for i := from; i < from+n; i++ {
			p.send(p.publishFrame(message{topic: "a", qos: byte(i % 3), id: i%3 + 3*i, payload: fmt.Sprint(i)}))
		}
		for i := from; i < from+n; i++ {
			switch i % 3 {
			case 1:
				p.ack(kindPuback, i%3+3*i)
			case 2:
				p.ack(kindPubrec, i%3+3*i)
				p.send(pubrelFrame(i%3 + 3*i))
			}
		}
		for i := from; i < from+n; i++ {
			if i%3 == 2 {
				p.expect(kindPubcomp)
			}
		}
	}
	p := s.v3(t, "p")
	done := make(chan struct{})
	go func() { defer close(done); publish(p, 0) }()
	last := [3]int{-1, -1, -1}
	take := func() {
		t.Helper()
		m := c.take()
		var i int
		fmt.Sscan(m.payload, &i)
		if int(m.qos) != i%3 || i <= last[m.qos] {
			t.Fatalf("got %+v after number %d", m, last[m.qos])
		}
		if m.qos > 0 && last[m.qos] >= 0 && i != last[m.qos]+3 {
			t.Fatalf("got %+v, want number %d", m, last[m.qos]+3)
		}
		last[m.qos] = i
	}
	for range n {
		take()
	}
	<-done
	// The same across a pause of the subscriber.
	c.drop()
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 1 })
	publish(p, n)
	c, _ = s.v3Session(t, "c")
	for range n * 2 / 3 {
		take()
	}
	c.silent()
}

// The acknowledgements of what one client sent come in the order in which it
// was sent: what the standard asks of clients as receivers, the broker does.
func TestV3AcknowledgementOrder(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.6.0-2", "MQTT-4.6.0-3", "MQTT-4.6.0-4")
	s := start(t)
	away, _ := s.v3Session(t, "away")
	away.subscribe(2, "slow/#")
	away.disconnect()
	p, _ := s.v3Session(t, "p")
	const n = 60
	for i := 1; i <= n; i++ { // some wait for the disk, some for nothing
		topic := "quick"
		if i%3 == 0 {
			topic = "slow/a"
		}
		p.send(p.publishFrame(message{topic: topic, qos: byte(1 + i%2), id: i, retain: i%5 == 0, payload: "x"}))
	}
	kinds := map[byte]byte{1: kindPuback, 2: kindPubrec}
	for i := 1; i <= n; i++ {
		p.ack(kinds[byte(1+i%2)], i)
	}
	// PUBREL packets come in the order of the PUBREC packets.
	away, _ = s.v3Session(t, "away")
	var ids []int
	for range n / 3 {
		m := away.receive()
		if m.qos == 2 {
			ids = append(ids, m.id)
		} else {
			away.send(ackFrame(kindPuback, m.id))
		}
	}
	slices.Reverse(ids)
	for _, id := range ids {
		away.send(ackFrame(kindPubrec, id))
	}
	for _, id := range ids {
		away.ack(kindPubrel, id)
	}
}

func TestV3Retained(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.1-5", "MQTT-3.3.1-6", "MQTT-3.3.1-7", "MQTT-3.3.1-8", "MQTT-3.3.1-9", "MQTT-3.3.1-10", "MQTT-3.3.1-11", "MQTT-3.3.1-12")
	s := start(t)
	p, live := s.v3(t, "p"), s.v3(t, "live")
	live.subscribe(2, "r/#")
	n := 0
	// stored wants this to be what a new subscriber gets: nothing, if empty.
	stored := func(payload string, qos byte) {
		t.Helper()
		n++
		c := s.v3(t, fmt.Sprint("c", n))
		c.subscribe(2, "r/a")
		if payload != "" {
			if m := c.take(); m.payload != payload || m.qos != qos || !m.retain || m.dup || m.topic != "r/a" {
				t.Fatalf("got %+v, want %q retained at QoS %d", m, payload, qos)
			}
		}
		c.silent()
		c.disconnect()
	}
	send := func(payload string, qos byte, retain bool) {
		t.Helper()
		p.publish(message{topic: "r/a", qos: qos, retain: retain, payload: payload})
		if m := live.take(); m.payload != payload || m.qos != qos || m.retain {
			t.Fatalf("got %+v, want %q at QoS %d, not as retained", m, payload, qos)
		}
	}
	stored("", 0)
	for qos := range byte(3) {
		first, second := fmt.Sprint("first ", qos), fmt.Sprint("second ", qos)
		send(first, qos, true)
		stored(first, qos)
		stored(first, qos) // it stays
		send("passing", qos, false)
		send("", qos, false) // without RETAIN it removes nothing
		stored(first, qos)
		send(second, (qos+1)%3, true)
		stored(second, (qos+1)%3)
		send("", qos, true) // goes out as usual
		stored("", 0)
		send("", qos, true) // and where there is none
		stored("", 0)
	}
}

// A subscription gets the retained message of every topic it matches, at the
// lower of both QoS, once for each filter of the SUBSCRIBE.
func TestV3RetainedMany(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.1-6", "MQTT-3.8.4-3", "MQTT-3.8.4-4", "MQTT-3.8.4-6")
	s := start(t)
	p := s.v3(t, "p")
	for qos := range byte(3) {
		for i := range 4 {
			p.publish(message{topic: fmt.Sprintf("r/%d/%d", qos, i), qos: qos, retain: true, payload: "x"})
		}
	}
	c := s.v3(t, "c")
	want := func(granted byte, times int, prefix string) {
		t.Helper()
		got := map[string]int{}
		n := 0
		for qos := range byte(3) {
			if strings.HasPrefix(fmt.Sprint("r/", qos, "/"), prefix) {
				n += 4 * times
			}
		}
		for range n {
			m := c.take()
			if !m.retain || m.qos != min(m.topic[2]-'0', granted) || !strings.HasPrefix(m.topic, prefix) {
				t.Errorf("granted %d: got %+v", granted, m)
			}
			got[m.topic]++
		}
		for topic, k := range got {
			if k != times {
				t.Errorf("got %q %d times, want %d", topic, k, times)
			}
		}
		c.silent()
	}
	for _, granted := range []byte{0, 1, 2, 1} { // again, and the retained messages come again
		c.subscribe(granted, "r/#")
		want(granted, 1, "r/")
	}
	c.subscribe(2, "r/1/+", "r/1/#") // as two SUBSCRIBE packets
	want(2, 2, "r/1/")
}

// A retained message stays when its publisher goes, and over a restart; QoS 0
// ones too, when the broker was stopped in order.
func TestV3RetainedStays(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-7", "MQTT-3.3.1-5")
	dir := t.TempDir()
	s := startIn(t, dir, nil)
	p := s.v3(t, "p")
	for qos := range byte(3) {
		p.publish(message{topic: fmt.Sprint(qos), qos: qos, retain: true, payload: "kept"})
		p.publish(message{topic: fmt.Sprint("gone ", qos), qos: qos, retain: true, payload: "x"})
		p.publish(message{topic: fmt.Sprint("gone ", qos), qos: qos, retain: true})
	}
	p.ping()
	p.disconnect()
	s.stop()
	s = startIn(t, dir, nil)
	c := s.v3(t, "c")
	c.subscribe(2, "#")
	got := map[string]byte{}
	for range 3 {
		m := c.take()
		got[m.topic] = m.qos
	}
	if len(got) != 3 || got["0"] != 0 || got["1"] != 1 || got["2"] != 2 {
		t.Errorf("got %v", got)
	}
	c.silent()
}

// Subscribing again replaces the subscription, and nothing falls in between.
func TestV3SubscribeAgain(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.8.4-3")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	c.subscribe(2, "a")
	const n = 200
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range n {
			p.publish(message{topic: "a", qos: 1, payload: fmt.Sprint(i)})
		}
	}()
	next := 0
	for granted := byte(0); ; granted = (granted + 1) % 2 { // QoS 1 of both is enough not to lose any
		c.subscribe(1+granted, "a")
		for len(c.stash) > 0 {
			c.takePayloads(fmt.Sprint(next))
			next++
		}
		select {
		case <-done:
			for ; next < n; next++ {
				c.takePayloads(fmt.Sprint(next))
			}
			c.subscribe(0, "a")
			p.publish(message{topic: "a", qos: 2, payload: "x"})
			if m := c.take(); m.qos != 0 {
				t.Errorf("got %+v, want QoS 0 as the last subscription has it", m)
			}
			c.silent() // one copy
			return
		default:
		}
	}
}

func TestV3SubscribeMany(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.8.4-4", "MQTT-3.8.4-5", "MQTT-3.9.3-1", "MQTT-3.9.3-2", "MQTT-3.8.3-3")
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "subscribe", Filter: "no/#"}))
	c := s.v3(t, "c")
	c.send(frame(0x82, u16(0xFFFF),
		str("a"), []byte{2}, str("no/a"), []byte{2}, str("b"), []byte{0}, str("c"), []byte{1},
		str("no/b"), []byte{0}, str("a"), []byte{1}, str("d/#"), []byte{2}))
	if codes := c.suback(0xFFFF, 7); !bytes.Equal(codes, []byte{2, 0x80, 0, 1, 0x80, 1, 2}) {
		t.Errorf("got % x", codes)
	}
	for topic, qos := range map[string]byte{"a": 1, "b": 0, "c": 1, "d/x": 2} {
		c.publish(message{topic: topic, qos: 2})
		if m := c.take(); m.topic != topic || m.qos != qos {
			t.Errorf("topic %q: got %+v, want QoS %d", topic, m, qos)
		}
	}
	c.publish(message{topic: "no/a", qos: 1})
	c.silent()
	var filters []string
	for i := range 5000 {
		filters = append(filters, fmt.Sprint("many/", i))
	}
	id := c.id()
	c.send(c.subscribeFrame(id, 1, filters))
	if codes := c.suback(id, len(filters)); bytes.Count(codes, []byte{1}) != len(filters) {
		t.Errorf("got codes other than 1 for %d filters", len(filters))
	}
	c.publish(message{topic: "many/4999", qos: 1, payload: "last"})
	c.takePayloads("last")
}

func TestV3Unsubscribe(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.10.4-1", "MQTT-3.10.4-2", "MQTT-3.10.4-4", "MQTT-3.10.4-5", "MQTT-3.10.4-6", "MQTT-2.3.1-7", "MQTT-3.10.3-1")
	s := start(t)
	c, p := s.v3(t, "c"), s.v3(t, "p")
	c.subscribe(1, "a/#", "a/+", "b", "B", "c/")
	for _, filter := range []string{"a/b", "a", "+/+", "#", "a/+/", "never"} { // what they match does not matter
		c.send(frame(0xA2, u16(0x0102), str(filter)))
		c.expectFrame(frame(0xB0, u16(0x0102)))
	}
	got := func(topic string, want bool) {
		t.Helper()
		p.publish(message{topic: topic, qos: 1, payload: topic})
		if want {
			c.takePayloads(topic)
		}
		c.silent()
	}
	got("a/b", true)
	got("b", true)
	c.unsubscribe("a/#")
	got("a/b", true) // a/+ is there yet
	got("a/b/c", false)
	c.unsubscribe("a/+")
	got("a/b", false)
	c.unsubscribe("b", "nothing", "c/") // in one packet, with one answer
	got("b", false)
	got("c/", false)
	got("B", true)
	c.unsubscribe("B")
	c.unsubscribe("B")
	got("B", false)
}

// What the broker has begun to deliver when a subscription goes, it brings to
// its end, on the next connection too.
func TestV3UnsubscribeInFlight(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.10.4-3", "MQTT-3.10.4-2")
	s := start(t)
	c, _ := s.v3Session(t, "c")
	p := s.v3(t, "p")
	c.subscribe(2, "a")
	p.publish(message{topic: "a", qos: 1, payload: "1"})
	p.publish(message{topic: "a", qos: 2, payload: "2"})
	p.publish(message{topic: "a", qos: 2, payload: "3"})
	one, two, three := c.receive(), c.receive(), c.receive()
	c.send(ackFrame(kindPubrec, three.id))
	c.ack(kindPubrel, three.id)
	c.unsubscribe("a")
	p.publish(message{topic: "a", qos: 2, payload: "after"})
	c.send(ackFrame(kindPubcomp, three.id))
	c.ping()
	c.drop()
	c, _ = s.v3Session(t, "c")
	for _, want := range []message{one, two} {
		if m := c.take(); m.id != want.id || !m.dup || m.payload != want.payload {
			t.Errorf("got %+v, want %+v again", m, want)
		}
	}
	c.silent()
}

// Who may not publish is acknowledged all the same, for 3.1.1 has no other
// answer, and nobody gets it.
func TestV3NotAllowedToPublish(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.5-2")
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "publish", Filter: "no/#"}))
	c := s.v3(t, "c")
	c.subscribe(2, "#")
	for qos := range byte(3) {
		c.publish(message{topic: "no/a", qos: qos, payload: "x", retain: true})
	}
	c.silent()
	c.subscribe(2, "no/a")
	c.silent()
}

func TestV3Ping(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.12.4-1")
	s := start(t)
	c := s.v3(t, "c")
	for range 3 {
		c.send([]byte{0xC0, 0})
		c.expectFrame([]byte{0xD0, 0})
	}
	c.send([]byte{0xC0, 0, 0xC0, 0, 0xC0, 0})
	for range 3 {
		c.expectFrame([]byte{0xD0, 0})
	}
}

// One and a half times the keep alive, here one second: later than that the
// connection ends, as if the network had failed. Not earlier, and not for a
// client that sends something, or that asked for no keep alive.
func TestV3KeepAlive(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-24", "MQTT-3.1.2-23")
	s := start(t)
	w := s.v3(t, "watcher") // keep alive 0
	w.subscribe(1, "will")
	connect := func(id string, keepAlive int) *client {
		c, _ := s.connect(t, connectFields{version: 4, clean: true, id: id, keepAlive: keepAlive, will: &willFields{topic: "will", payload: id}})
		return c
	}
	longest := connect("longest", 65535)
	begin := time.Now()
	mute, deaf := connect("mute", 1), connect("deaf", 1)
	deaf.subscribe(0, "noise") // is sent something all the time, but says nothing
	ended := make(chan time.Duration, 2)
	for _, c := range []*client{mute, deaf} {
		go func() {
			for {
				if _, err := c.tryRead(); err != nil {
					ended <- time.Since(begin)
					return
				}
			}
		}()
	}
	pings, publishes := connect("pings", 1), connect("publishes", 1)
	last, late := time.Now(), false // late: this machine was so busy that we were not in time ourselves
	for n := 0; n < 2; {
		select {
		case d := <-ended:
			if n++; d < 1500*time.Millisecond {
				t.Errorf("a client with a keep alive of 1 s was disconnected after %v", d)
			}
		case <-time.After(100 * time.Millisecond):
			pings.trySend([]byte{0xC0, 0})
			publishes.trySend(publishes.publishFrame(message{topic: "noise", payload: "x"}))
			late = late || time.Since(last) > time.Second
			last = time.Now()
		}
	}
	got := []string{w.take().payload, w.take().payload}
	if slices.Sort(got); !late && (got[0] != "deaf" || got[1] != "mute") {
		t.Errorf("got the wills of %v, want those of deaf and mute", got)
	}
	longest.ping()
	if late = late || time.Since(last) > time.Second; !late {
		w.silent()
	}
}

// A client of MQTT 3.1.1 knows no Receive Maximum: however much it sends at
// once, each message is acknowledged, and a PINGREQ is not kept waiting.
func TestV3ManyAtOnce(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.4-1", "MQTT-4.3.2-2", "MQTT-4.3.3-2", "MQTT-4.6.0-6")
	s := start(t, func(c *broker.Config) { c.ReceiveMaximum = 5 })
	away, _ := s.v3Session(t, "away")
	away.subscribe(2, "a")
	away.disconnect()
	p, _ := s.v3Session(t, "p")
	const n = 600
	var b []byte
	for i := 1; i <= n; i++ {
		b = append(b, p.publishFrame(message{topic: "a", qos: byte(1 + i%2), id: i, payload: fmt.Sprint(i)})...)
	}
	p.send(b, []byte{0xC0, 0})
	acks, pong := 0, false
	for acks < n || !pong {
		switch got := p.read(); got.kind() {
		case kindPingresp:
			pong = true
		case kindPuback, kindPubrec:
			if acks++; got.packetID() != acks || got.kind() != kindPuback+byte(acks%2) {
				t.Fatalf("acknowledgement %d: got %v", acks, got)
			}
		default:
			t.Fatalf("got %v", got)
		}
	}
	for i := 1; i <= n; i += 2 {
		p.send(pubrelFrame(i))
	}
	for i := 1; i <= n; i += 2 {
		p.ack(kindPubcomp, i)
	}
	away, _ = s.v3Session(t, "away")
	last := [3]int{}
	for range n {
		m := away.take()
		var i int
		fmt.Sscan(m.payload, &i)
		if i%2+1 != int(m.qos) || i <= last[m.qos] {
			t.Fatalf("got %q at QoS %d after %d", m.payload, m.qos, last[m.qos])
		}
		last[m.qos] = i
	}
	away.silent()
}

// What is in flight to a client is bounded, the rest waits its turn, and none
// of it is lost.
func TestV3Window(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.5.0-1", "MQTT-4.5.0-2", "MQTT-4.6.0-6")
	s := start(t, func(c *broker.Config) { c.Window = 3 })
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	p := s.v3(t, "p")
	const n = 40
	for i := range n {
		p.publish(message{topic: "a", qos: byte(1 + i%2), payload: fmt.Sprint(i)})
	}
	for i := range n {
		c.ping()
		if i+3 < n && len(c.stash) != 3 && i == 0 {
			t.Fatalf("got %d messages at once, want 3", len(c.stash))
		}
		m := c.take()
		if m.payload != fmt.Sprint(i) {
			t.Fatalf("message %d: got %+v", i, m)
		}
	}
	c.silent()
}

// What was never sent has no DUP: a client that has left in order and seen the
// connection closed can have got nothing since.
func TestV3FirstTimeIsNoDUP(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.3.2-1", "MQTT-4.3.3-1", "MQTT-3.3.1-3")
	s := start(t)
	p := s.v3(t, "p")
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	for i := range 60 {
		c.disconnect() // and the end was seen
		p.publish(message{topic: "a", qos: byte(1 + i%2), payload: fmt.Sprint(i)})
		c, _ = s.v3Session(t, "c")
		if m := c.take(); m.dup || m.payload != fmt.Sprint(i) {
			t.Fatalf("message %d: got %+v, want no DUP", i, m)
		}
	}
}
