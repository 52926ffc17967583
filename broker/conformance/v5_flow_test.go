package conformance

import (
	"fmt"
	"slices"
	"testing"

	"penstock/broker"
)

// TestRedelivery5 breaks connections in the middle of each exchange, towards
// the client.
func TestRedelivery5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.1-1", "MQTT-3.3.1-3", "MQTT-4.3.2-2", "MQTT-4.3.2-3", "MQTT-4.3.3-2", "MQTT-4.3.3-3", "MQTT-4.3.3-4", "MQTT-4.3.3-5", "MQTT-4.3.3-6",
		"MQTT-4.4.0-1", "MQTT-4.4.0-2", "MQTT-2.2.1-4", "MQTT-2.2.1-5")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	f := connectFields{version: 5, id: "redelivery", props: [][]byte{propU32(17, 600)}}
	c, _ := s.connect(t, f)
	c.subscribe(2, "t")
	again := func() {
		t.Helper()
		c.drop()
		var a connack
		if c, a = s.connect(t, f); !a.present {
			t.Fatal("session was lost")
		}
	}
	for qos := byte(1); qos <= 2; qos++ {
		pub.publish(message{topic: "t", payload: "x", qos: qos})
		first := c.receive()
		if first.dup || first.qos != qos {
			t.Fatalf("got %+v, want QoS %d without DUP", first, qos)
		}
		c.ping()
		if len(c.stash) > 0 {
			t.Fatalf("got %v on the same connection", c.stash) // [MQTT-4.4.0-1]: at no other time
		}
		for range 2 {
			again()
			if m := c.receive(); m.id != first.id || !m.dup || m.payload != "x" || m.qos != qos {
				t.Fatalf("got %+v, want %+v again with DUP", m, first)
			}
		}
		if qos == 1 {
			c.send(ackFrame(kindPuback, first.id))
		} else {
			for range 2 {
				c.send(ackFrame(kindPubrec, first.id)) // a second one changes nothing
				if got := c.ack(kindPubrel, first.id); got != 0 {
					t.Fatalf("PUBREL: got reason %#x", got)
				}
			}
			for range 2 {
				again()
				if got := c.ack(kindPubrel, first.id); got != 0 { // not the PUBLISH
					t.Fatalf("PUBREL: got reason %#x", got)
				}
			}
			c.send(ackFrame(kindPubcomp, first.id))
		}
		c.ping()
		again()
		c.ping()
		if len(c.stash) > 0 {
			t.Fatalf("got %v, which was completed", c.stash)
		}
	}
	// A reason code of 0x80 or above completes a message too.
	for _, reason := range []byte{0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99} {
		for qos := byte(1); qos <= 2; qos++ {
			pub.publish(message{topic: "t", payload: "refused", qos: qos})
			m := c.receive()
			c.send(frame([]byte{0, kindPuback << 4, kindPubrec << 4}[qos], u16(m.id), []byte{reason}))
			c.ping() // and no PUBREL
		}
	}
	again()
	c.ping()
	if len(c.stash) > 0 {
		t.Fatalf("got %v, which was refused", c.stash)
	}
	// In the original order, those that were sent and those that were not.
	for i := range 30 {
		pub.publish(message{topic: "t", payload: fmt.Sprint(i), qos: byte(1 + i%2)})
	}
	for i := range 10 {
		if m := c.receive(); m.payload != fmt.Sprint(i) {
			t.Fatalf("got %+v, want %d", m, i)
		}
	}
	again()
	ids := map[int]bool{}
	for i := range 30 {
		m := c.receive()
		if m.payload != fmt.Sprint(i) || i < 10 && !m.dup || ids[m.id] {
			t.Fatalf("got %+v, want %d in its turn", m, i)
		}
		ids[m.id] = true
	}
}

// TestReceive5 breaks connections in the middle of each exchange, from the
// client.
func TestReceive5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.3.2-4", "MQTT-4.3.2-5", "MQTT-4.3.3-8", "MQTT-4.3.3-10", "MQTT-4.3.3-11", "MQTT-4.3.3-12", "MQTT-2.2.1-5", "MQTT-4.5.0-1")
	s := start(t)
	sub, _ := s.connect(t, connectFields{version: 5, clean: true})
	sub.subscribe(2, "t")
	f := connectFields{version: 5, id: "sender", props: [][]byte{propU32(17, 600)}}
	c, _ := s.connect(t, f)
	publish := func(payload string, id int, dup bool) {
		t.Helper()
		c.send(c.publishFrame(message{topic: "t", payload: payload, qos: 2, id: id, dup: dup}))
		if got := c.ack(kindPubrec, id); got != 0 {
			t.Fatalf("PUBREC: got reason %#x", got)
		}
	}
	release := func(id int, want byte) {
		t.Helper()
		c.send(pubrelFrame(id))
		if got := c.ack(kindPubcomp, id); got != want {
			t.Fatalf("PUBCOMP: got reason %#x, want %#x", got, want)
		}
	}
	for _, id := range []int{1, 65535} {
		publish("one", id, false)
		publish("one", id, true)
		publish("one", id, false) // DUP or not: the identifier counts
		c.drop()
		c, _ = s.connect(t, f)
		publish("one", id, true)
		release(id, 0)
		release(id, 0x92) // again: there is nothing to release
		c.drop()
		c, _ = s.connect(t, f)
		publish("two", id, false) // the identifier is free
		release(id, 0)
		sub.takePayloads("one", "two")
	}
	// Several at once, released in another order.
	for id := 10; id < 20; id++ {
		publish(fmt.Sprint(id), id, false)
	}
	for id := 19; id >= 10; id-- {
		release(id, 0)
	}
	for id := 10; id < 20; id++ {
		sub.takePayloads(fmt.Sprint(id))
	}
	// An identifier that the broker uses towards the client is another one.
	c.subscribe(2, "own")
	for range 3 {
		c.send(c.publishFrame(message{topic: "own", payload: "own", qos: 2, id: 1}))
		c.ack(kindPubrec, 1)
		m := c.receive()
		c.send(ackFrame(kindPubrec, m.id))
		c.ack(kindPubrel, m.id)
		c.send(pubrelFrame(1))
		c.ack(kindPubcomp, 1)
		c.send(ackFrame(kindPubcomp, m.id))
	}
	// Nor has a SUBSCRIBE with the same identifier anything to do with it.
	publish("three", 77, false)
	c.send(c.subscribeFrame(77, 0, []string{"x"}))
	c.suback(77, 1)
	release(77, 0)
	sub.takePayloads("three")
	// With Clean Start the identifiers are forgotten.
	publish("four", 5, false)
	c.drop()
	f.clean = true
	c, _ = s.connect(t, f)
	publish("five", 5, true)
	release(5, 0)
	sub.takePayloads("four", "five")
}

// TestIdentifierInUse5 uses an identifier that is open at QoS 2 for other
// packets, which a client must not do [MQTT-2.2.1-3]: none is taken for another.
func TestIdentifierInUse5(t *testing.T) {
	t.Parallel()
	s := start(t)
	sub, _ := s.connect(t, connectFields{version: 5, clean: true})
	sub.subscribe(2, "t")
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	c.send(c.publishFrame(message{topic: "t", payload: "first", qos: 2, id: 7}))
	c.ack(kindPubrec, 7)
	c.send(c.publishFrame(message{topic: "t", payload: "other", qos: 1, id: 7}))
	c.ack(kindPuback, 7)
	c.send(c.subscribeFrame(7, 1, []string{"f"}))
	c.suback(7, 1)
	c.send(c.publishFrame(message{topic: "t", payload: "first", qos: 2, id: 7, dup: true}))
	c.ack(kindPubrec, 7)
	c.send(pubrelFrame(7))
	c.ack(kindPubcomp, 7)
	c.publish(message{topic: "t", payload: "last", qos: 2, id: 7})
	sub.takePayloads("first", "other", "last")
}

// TestWrongAcknowledgement5 acknowledges what there is not, or otherwise than
// its QoS asks: nothing is lost, and others do not notice.
func TestWrongAcknowledgement5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.3.2-3", "MQTT-4.3.3-3", "MQTT-4.3.3-5")
	s := start(t)
	well := s.witness(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	for qos := byte(1); qos <= 2; qos++ {
		for _, kind := range []byte{kindPuback, kindPubrec, kindPubcomp} {
			if kind == kindPuback && qos == 1 || kind == kindPubrec && qos == 2 {
				continue
			}
			f := connectFields{version: 5, id: fmt.Sprint(qos, kind), props: [][]byte{propU32(17, 600)}}
			c, _ := s.connect(t, f)
			c.subscribe(2, "t")
			pub.publish(message{topic: "t", payload: "x", qos: qos})
			m := c.receive()
			c.trySend(ackFrame(kind, m.id))
			c.drop()
			c, _ = s.connect(t, f)
			if again := c.receive(); again.id != m.id || again.payload != "x" {
				t.Errorf("QoS %d answered with packet %d: got %+v, want it again", qos, kind, again)
			}
			c.drop()
			c, _ = s.connect(t, connectFields{version: 5, id: f.id, clean: true})
			c.disconnect()
		}
	}
	well()
}

// TestReceiveMaximum5 checks flow control towards the client.
func TestReceiveMaximum5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.4-9", "MQTT-3.3.4-10", "MQTT-4.9.0-1", "MQTT-4.9.0-2", "MQTT-4.9.0-3")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	for _, most := range []int{1, 2, 7} {
		f := connectFields{version: 5, id: fmt.Sprint("window", most), props: [][]byte{propU32(17, 600), propU16(33, most)}}
		c, _ := s.connect(t, f)
		c.subscribe(2, "t", "zero")
		n := 3*most + 2
		for i := range n {
			pub.publish(message{topic: "t", payload: fmt.Sprint(i), qos: byte(1 + i%2)})
		}
		for connection := range 2 {
			var held []message
			for range most {
				held = append(held, c.receive())
			}
			// The quota is used up: nothing but other packets comes.
			pub.publish(message{topic: "zero", payload: "0"})
			if m := c.receive(); m.qos != 0 {
				t.Fatalf("Receive Maximum %d: got %+v beyond it", most, m)
			}
			c.ping()
			c.subscribe(0, "x")
			c.publish(message{topic: "x", qos: 2})
			c.receive()
			if len(c.stash) > 0 {
				t.Fatalf("Receive Maximum %d: got %v beyond it", most, c.stash)
			}
			if held[0].payload != "0" {
				t.Fatalf("got %q first", held[0].payload)
			}
			if connection == 0 {
				c.drop()
				c, _ = s.connect(t, f)
				continue
			}
			// Each completion makes room for one; a PUBREC alone for none.
			next := most
			for len(held) > 0 {
				m := held[0]
				held = held[1:]
				if m.qos == 2 {
					c.send(ackFrame(kindPubrec, m.id))
					c.ack(kindPubrel, m.id)
					c.ping()
					if len(c.stash) > 0 {
						t.Fatalf("Receive Maximum %d: a PUBREC let %v come", most, c.stash)
					}
					c.send(ackFrame(kindPubcomp, m.id))
				} else {
					c.send(ackFrame(kindPuback, m.id))
				}
				if next < n {
					m := c.receive()
					if m.payload != fmt.Sprint(next) {
						t.Fatalf("got %q, want %d", m.payload, next)
					}
					held = append(held, m)
					next++
				}
				c.ping()
				if len(c.stash) > 0 {
					t.Fatalf("Receive Maximum %d: got %v beyond it", most, c.stash)
				}
			}
			// A PUBREC that refuses makes room too.
			for range most + 1 {
				pub.publish(message{topic: "t", payload: "r", qos: 2})
			}
			for range most + 1 {
				c.send(frame(kindPubrec<<4, u16(c.receive().id), []byte{0x80}))
			}
			c.ping()
		}
	}
}

// TestReceiveMaximumShrinks5 reconnects with a smaller Receive Maximum than
// there are messages in flight.
func TestReceiveMaximumShrinks5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.4-9", "MQTT-4.9.0-1", "MQTT-4.4.0-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	f := func(most int) connectFields {
		return connectFields{version: 5, id: "shrinks", props: [][]byte{propU32(17, 600), propU16(33, most)}}
	}
	c, _ := s.connect(t, f(10))
	c.subscribe(1, "t")
	for i := range 12 {
		pub.publish(message{topic: "t", payload: fmt.Sprint(i), qos: 1})
	}
	for range 10 {
		c.receive()
	}
	c.drop()
	c, _ = s.connect(t, f(2))
	for i := range 12 {
		c.ping() // all that comes without an acknowledgement is here
		if n := len(c.stash); n != min(2, 12-i) {
			t.Fatalf("message %d: got %d unacknowledged messages, want 2", i, n)
		}
		m := c.receive()
		if m.payload != fmt.Sprint(i) || m.dup != (i < 10) {
			t.Fatalf("got %+v, want %d", m, i)
		}
		c.send(ackFrame(kindPuback, m.id))
	}
}

// TestBrokersReceiveMaximum5 checks flow control from the client.
func TestBrokersReceiveMaximum5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.4-7", "MQTT-4.9.0-3")
	const most = 5
	s := start(t, func(c *broker.Config) { c.ReceiveMaximum = most })
	f := connectFields{version: 5, id: "quota", props: [][]byte{propU32(17, 600)}}
	c, a := s.connect(t, f)
	if p, _ := find(t, a.props, 33); p.num != most {
		t.Fatalf("Receive Maximum: got %d, want %d", p.num, most)
	}
	for round := range 3 {
		for id := 1; id <= most; id++ {
			c.send(c.publishFrame(message{topic: "t", qos: 2, id: id}))
			c.ack(kindPubrec, id)
		}
		c.send(c.publishFrame(message{topic: "t", qos: 0})) // does not count
		c.ping()
		if round == 0 { // a new connection begins anew, and may send all of them again
			c.drop()
			c, _ = s.connect(t, f)
			for id := 1; id <= most; id++ {
				c.send(c.publishFrame(message{topic: "t", qos: 2, id: id, dup: true}))
				c.ack(kindPubrec, id)
			}
		}
		if round < 2 {
			for id := 1; id <= most; id++ {
				c.send(pubrelFrame(id))
				c.ack(kindPubcomp, id)
			}
		}
	}
	c.send(c.publishFrame(message{topic: "t", qos: 2, id: most + 1}))
	c.expectDisconnect(0x93)

	// QoS 1 that is acknowledged as it comes is never too much.
	c, _ = s.connect(t, connectFields{version: 5, clean: true})
	for range 20 * most {
		c.publish(message{topic: "t", qos: 1})
	}
}

// TestOrder5 wants the messages of each topic and QoS in the order in which
// they were sent.
func TestOrder5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.6.0-5", "MQTT-4.6.0-6", "MQTT-4.6.0-1", "MQTT-4.6.0-2", "MQTT-4.6.0-3", "MQTT-4.6.0-4", "MQTT-4.5.0-1")
	s := start(t)
	f := connectFields{version: 5, id: "order", props: [][]byte{propU32(17, 600), propU16(33, 20)}}
	sub, _ := s.connect(t, f)
	sub.subscribe(2, "o/+")
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	const n = 300
	var frames [][]byte
	var acks, recs []int
	for i := range n {
		m := message{topic: fmt.Sprint("o/", i%4), payload: fmt.Sprint(i), qos: byte(i % 3), id: i + 1}
		frames = append(frames, pub.publishFrame(m))
		switch m.qos {
		case 1:
			acks = append(acks, m.id)
		case 2:
			recs = append(recs, m.id)
		}
	}
	pub.send(frames...)
	released, open := 0, len(recs)
	for len(acks)+len(recs) > 0 || released < open { // answered in the order in which they were sent
		p := pub.read()
		switch {
		case p.kind() == kindPuback && len(acks) > 0 && p.packetID() == acks[0]:
			acks = acks[1:]
		case p.kind() == kindPubrec && len(recs) > 0 && p.packetID() == recs[0]:
			recs = recs[1:]
			pub.send(pubrelFrame(p.packetID()))
		case p.kind() == kindPubcomp:
			released++
		default:
			t.Fatalf("got %v, want acknowledgements in order", p)
		}
	}
	last := map[string]int{}
	seen := 0
	for seen < n {
		m := sub.take()
		var i int
		fmt.Sscan(m.payload, &i)
		key := fmt.Sprint(m.topic, " ", m.qos)
		if before, ok := last[key]; ok && i <= before {
			t.Fatalf("%s: got %d after %d", key, i, before)
		}
		last[key] = i
		if seen++; seen == 100 {
			// What was sent and not acknowledged comes again, in its order; a
			// QoS 0 message may be lost with the connection.
			sub.ping()
			break
		}
	}
	sub.drop()
	sub, _ = s.connect(t, f)
	var got []int
	pub.publish(message{topic: "o/end", payload: "end", qos: 1})
	for m := sub.take(); m.payload != "end"; m = sub.take() {
		var i int
		fmt.Sscan(m.payload, &i)
		if m.qos > 0 {
			got = append(got, i)
		}
	}
	if !slices.IsSorted(got) || len(got) == 0 || got[len(got)-1] != n-1 {
		t.Errorf("after a reconnect: got %v, want the rest in order", got)
	}
}
