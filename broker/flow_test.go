package broker

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/storage"
)

// flood publishes n messages of QoS 1 without waiting for each
// acknowledgement, the way a fast publisher does.
func (c *client) flood(topic func(i int) string, format string, n int, retain byte) {
	c.t.Helper()
	const window = 500
	var buf bytes.Buffer
	sent, acked := 0, 0
	for acked < n {
		buf.Reset()
		for sent < n && sent-acked < window {
			buf.Write(c.publishPacket(topic(sent), fmt.Sprintf(format, sent), 1, retain, uint16(1+sent%60000)))
			sent++
		}
		if buf.Len() > 0 {
			c.send(buf.Bytes())
		}
		c.expectAck(typePuback, uint16(1+acked%60000))
		acked++
	}
}

func fixed(topic string) func(int) string { return func(int) string { return topic } }

// crash returns a broker on what the disk has at this moment: the old one is
// not stopped, and what it has not written is lost.
func (s *server) crash() *server {
	s.t.Helper()
	dir := s.t.TempDir()
	files, err := filepath.Glob(filepath.Join(s.dir, "penstock.db*"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(f)), b, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	return start(s.t, dir)
}

func TestManyQueuedForOffline(t *testing.T) {
	const n = 20000
	s := start(t, t.TempDir())
	o := connectOptions{id: "sub", version: 4}
	sub, _ := s.connect(o)
	sub.subscribe(1, "a")
	sub.disconnect()
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(fixed("a"), "m%d", n, 0)
	sub, present := s.connect(o)
	if !present {
		t.Error("no session present")
	}
	sub.takeAll("m%d", 0, n)
	pub.publish("a", "last", 1, false)
	sub.takeAll("last%.0d", 0, 1)
	eventually(t, "nothing waits any more", func() bool { st := s.b.Stats(); return st.QueueMessages == 0 && st.QueueBytes == 0 })
	for cause, n := range s.b.Stats().Dropped {
		if n != 0 {
			t.Errorf("%d dropped: %s", n, cause)
		}
	}
}

func TestManyRetained(t *testing.T) {
	const n = 20000
	dir := t.TempDir()
	s := start(t, dir)
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(func(i int) string { return fmt.Sprintf("r/%d", i) }, "m%d", n, 1)
	for range 2 {
		sub, _ := s.connect(connectOptions{id: "sub", clean: true})
		sub.subscribe(1, "r/#")
		got := make(map[string]bool, n)
		for range n {
			d := sub.take()
			if !d.retain || "r/"+d.payload[1:] != d.topic || got[d.topic] || d.qos != 1 {
				t.Fatalf("got %+v, want a retained message that has not come yet", d)
			}
			got[d.topic] = true
		}
		sub.ping()
		if len(sub.stash) != 0 {
			t.Error("more messages than were retained")
		}
		s.stop() // and the same after a restart
		s = start(t, dir)
	}
}

// A QoS 1 reader that does not read holds up no publisher, and gets all of it
// later, in order.
func TestStalledReader(t *testing.T) {
	const n = 1500
	big := string(bytes.Repeat([]byte("x"), 8000)) // 12 MB in all: far more than sockets hold
	for _, clean := range []bool{true, false} {
		s := start(t, t.TempDir())
		sub, _ := s.connect(connectOptions{id: "sub", version: 5, clean: clean, expiry: 60, receiveMax: 65535})
		sub.subscribe(1, "a")
		quick, _ := s.connect(connectOptions{id: "quick", clean: true})
		quick.subscribe(1, "a")
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		var wg sync.WaitGroup
		wg.Go(func() { quick.takeAll("m%d"+big, 0, n) })
		pub.flood(fixed("a"), "m%d"+big, n, 0) // returns while sub reads nothing
		wg.Wait()
		if got := s.b.Stats().QueueMessages; got < n/2 {
			t.Errorf("clean %v: %d messages wait for the reader, want most of %d", clean, got, n)
		}
		sub.takeAll("m%d"+big, 0, n)
		eventually(t, "nothing waits any more", func() bool { return s.b.Stats().QueueMessages == 0 })
	}
}

// A stalled reader can be taken over at once.
func TestStalledReaderIsTakenOver(t *testing.T) {
	const n = 300
	big := string(bytes.Repeat([]byte("x"), 40000))
	s := start(t, t.TempDir())
	o := connectOptions{id: "sub", version: 5, expiry: 60, receiveMax: 65535}
	old, _ := s.connect(o)
	old.subscribe(1, "a")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(fixed("a"), "m%d"+big, n, 0)
	begin := time.Now()
	sub, present := s.connect(o)
	if !present {
		t.Error("no session present")
	}
	if d := time.Since(begin); d > takeOverWait {
		t.Errorf("the takeover took %v, want less than the wait for a busy connection", d)
	}
	sub.takeAll("m%d"+big, 0, n)
}

// With Receive Maximum 1 there is never more than one unacknowledged delivery,
// and everything comes in order.
func TestReceiveMaximumOne(t *testing.T) {
	for qos := byte(1); qos < 3; qos++ {
		s := start(t, t.TempDir())
		o := connectOptions{id: "sub", version: 5, expiry: 60, receiveMax: 1}
		sub, _ := s.connect(o)
		sub.raw = true
		sub.subscribe(qos, "a")
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		const n = 200
		pub.flood(fixed("a"), "m%d", n, 0)
		for i := range n {
			if i == n/2 { // also on a new connection
				sub.ping() // what was acknowledged is
				sub.c.Close()
				sub, _ = s.connect(o)
				sub.raw = true
			}
			first, body := sub.expect(typePublish)
			d := parseDelivery(first, body, 5)
			if want := fmt.Sprintf("m%d", i); d.payload != want {
				t.Fatalf("qos %d: got %q, want %q", qos, d.payload, want)
			}
			sub.ping()
			if len(sub.stash) != 0 {
				t.Fatalf("qos %d: a second delivery came while %q was unacknowledged", qos, d.payload)
			}
			if d.qos == 1 {
				sub.send(packet(typePuback<<4, u16(d.id)))
				continue
			}
			sub.send(packet(typePubrec<<4, u16(d.id)))
			sub.expectAck(typePubrel, d.id)
			sub.ping()
			if len(sub.stash) != 0 {
				t.Fatalf("a second delivery came while %q was not completed", d.payload)
			}
			sub.send(packet(typePubcomp<<4, u16(d.id)))
		}
	}
}

// A message above the client's Maximum Packet Size is dropped for it alone and
// counted; the session lives on.
func TestMaximumPacketSize(t *testing.T) {
	for qos := range byte(3) {
		s := start(t, t.TempDir())
		o := connectOptions{id: "small", version: 5, expiry: 60, maxPacket: 100}
		small, _ := s.connect(o)
		small.subscribe(qos, "a")
		large, _ := s.connect(connectOptions{id: "large", version: 5, clean: true})
		large.subscribe(qos, "a")
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		fit := string(bytes.Repeat([]byte("x"), 100-2-3-1)) // header, topic, no properties
		if qos > 0 {
			fit = fit[2:] // packet identifier
		}
		for _, payload := range []string{"1", fit + "x", "2", fit, "3"} {
			pub.publish("a", payload, qos, false)
		}
		if qos > 0 { // and those that waited for it
			small.takeAll("1%.0d", 0, 1)
			small.takeAll("2%.0d", 0, 1)
			small.c.Close()
			eventually(t, "the client is away", func() bool { return !s.b.plane.connected("small") })
			pub.publish("a", fit+"xx", qos, false)
			small, _ = s.connect(o)
		} else {
			small.takeAll("1%.0d", 0, 1)
			small.takeAll("2%.0d", 0, 1)
		}
		small.takeAll(fit+"%.0d", 0, 1)
		small.takeAll("3%.0d", 0, 1)
		pub.publish("a", "4", qos, false)
		small.takeAll("4%.0d", 0, 1)
		for _, want := range []string{"1", fit + "x", "2", fit, "3"} {
			if d := large.take(); d.payload != want {
				t.Errorf("qos %d: the other client got %q, want %q", qos, d.payload, want)
			}
		}
		want := uint64(1)
		if qos > 0 {
			want = 2
		}
		if got := s.b.Stats().Dropped["packet-too-large"]; got != want {
			t.Errorf("qos %d: %d dropped as too large, want %d", qos, got, want)
		}
	}
}

// got returns what has come by the time the broker answers a ping, as
// "topic=payload" with "(r)" where RETAIN is set.
func (c *client) got() []string {
	c.t.Helper()
	c.ping()
	out := []string{}
	for len(c.stash) > 0 {
		d := c.take()
		s := d.topic + "=" + d.payload
		if d.retain {
			s += "(r)"
		}
		out = append(out, s)
	}
	return out
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestRetainOptions(t *testing.T) {
	s := start(t, t.TempDir())
	pub, _ := s.connect(connectOptions{id: "pub", version: 5, clean: true})
	pub.publish("a", "old", 1, true)
	pub.publish("gone", "x", 1, true)
	pub.publish("gone", "", 1, true) // an empty payload removes [MQTT-3.3.1-6]
	sub, _ := s.connect(connectOptions{id: "sub", version: 5, clean: true})

	sub.subscribe(1|0<<4, "#") // always
	equal(t, "handling 0, new", sub.got(), []string{"a=old(r)"})
	sub.subscribe(1|0<<4, "#")
	equal(t, "handling 0, again", sub.got(), []string{"a=old(r)"})
	sub.subscribe(1|1<<4, "#") // only a new subscription
	equal(t, "handling 1, again", sub.got(), nil)
	sub.subscribe(1|1<<4, "a")
	equal(t, "handling 1, new", sub.got(), []string{"a=old(r)"})
	sub.subscribe(1|2<<4, "+")
	equal(t, "handling 2, new", sub.got(), nil)

	// Retain As Published.
	live, _ := s.connect(connectOptions{id: "live", version: 5, clean: true})
	live.subscribe(1|2<<4, "b")
	live.subscribe(1|2<<4|8, "c")
	for _, topic := range []string{"b", "c"} {
		pub.publish(topic, "1", 1, true)
		pub.publish(topic, "2", 1, false)
	}
	equal(t, "retain as published", live.got(), []string{"b=1", "b=2", "c=1(r)", "c=2"})

	// Version 4 has none of it: always retained messages, never the flag live.
	old, _ := s.connect(connectOptions{id: "old", clean: true})
	old.subscribe(1, "c")
	old.subscribe(1, "c")
	pub.publish("c", "3", 1, true)
	equal(t, "version 4", old.got(), []string{"c=1(r)", "c=1(r)", "c=3"})
}

func TestNoLocal(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
	other, _ := s.connect(connectOptions{id: "other", version: 5, clean: true})
	for _, c := range []*client{c, other} {
		c.subscribe(1|4, "a")
		c.subscribe(1, "b")
	}
	for qos := range byte(3) {
		c.publish("a", "mine", qos, false)
		c.publish("b", "mine", qos, false)
		c.ping() // two publishers have no order between them
		other.publish("a", "theirs", qos, false)
		other.ping()
		equal(t, "no local", c.got(), []string{"b=mine", "a=theirs"})
		equal(t, "the other", other.got(), []string{"a=mine", "b=mine"})
	}
	c.subscribe(1, "+") // a subscription that overlaps and has no such option
	c.publish("a", "mine", 1, false)
	equal(t, "overlapping", c.got(), []string{"a=mine"})
	c.send(packet(typeSubscribe<<4|2, u16(c.id()), c.noProps(), str("$share/g/a"), []byte{1 | 4}))
	if got := c.expectEnd(); got != reasonProtocolError {
		t.Errorf("no local on a shared subscription: ended with %#x, want %#x", got, reasonProtocolError)
	}
}

// subscribeWith subscribes with a subscription identifier.
func (c *client) subscribeWith(identifier int, options byte, filter string) {
	c.t.Helper()
	c.send(packet(typeSubscribe<<4|2, u16(c.id()), props5([]byte{propSubscriptionID}, appendVarint(nil, identifier)), str(filter), []byte{options}))
	if _, body := c.expect(typeSuback); body[3] >= 0x80 {
		c.t.Fatalf("SUBSCRIBE %q: refused with %#x", filter, body[3])
	}
}

// identifiers returns the subscription identifiers of a delivery, sorted.
func (d *delivery) identifiers() []int {
	var out []int
	r := reader{buf: d.props}
	for len(r.buf) > 0 {
		switch r.byte() {
		case propSubscriptionID:
			out = append(out, r.varint())
		case propMessageExpiry:
			r.uint32()
		case propUser:
			r.text()
			r.text()
		default:
			r.text()
		}
	}
	for i := range out {
		for j := i; j > 0 && out[j] < out[j-1]; j-- {
			out[j], out[j-1] = out[j-1], out[j]
		}
	}
	return out
}

// Overlapping subscriptions give one copy, at the highest QoS of them and with
// all their identifiers; also to a session that was away, and after a restart.
func TestOverlappingSubscriptions(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	o := connectOptions{id: "sub", version: 5, expiry: 3600}
	sub, _ := s.connect(o)
	sub.subscribeWith(1, 0, "a/b")
	sub.subscribeWith(200, 2, "a/+")
	sub.subscribeWith(30000, 1, "#")
	sub.subscribe(1, "+/b")
	check := func(what string, retained bool) {
		t.Helper()
		d := sub.take()
		if d.payload != what || d.qos != 2 || fmt.Sprint(d.identifiers()) != "[1 200 30000]" || d.retain != retained {
			t.Errorf("%s: got %q, QoS %d, identifiers %v", what, d.payload, d.qos, d.identifiers())
		}
		sub.ping()
		if len(sub.stash) > 0 {
			t.Errorf("%s: came more than once", what)
		}
	}
	pub, _ := s.connect(connectOptions{id: "pub", version: 5, clean: true})
	pub.publish("a/b", "online", 2, false)
	check("online", false)
	sub.disconnect()
	eventually(t, "the client is away", func() bool { return !s.b.plane.connected("sub") })
	pub.publish("a/b", "away", 2, false)
	s.stop()
	s = start(t, dir)
	sub, _ = s.connect(o)
	check("away", false)
	pub, _ = s.connect(connectOptions{id: "pub", version: 5, clean: true})
	pub.publish("a/b", "restarted", 2, false)
	check("restarted", false)
	sub.subscribeWith(7, 1, "a/b") // replaced [MQTT-3.8.4-3]
	pub.publish("a/b", "x", 1, false)
	if d := sub.take(); fmt.Sprint(d.identifiers()) != "[7 200 30000]" {
		t.Errorf("after a new identifier: got %v", d.identifiers())
	}
	pub.publish("r", "x", 1, true)
	sub.take()
	sub.subscribeWith(8, 1, "r")
	if d := sub.take(); fmt.Sprint(d.identifiers()) != "[8]" || !d.retain {
		t.Errorf("retained message: got identifiers %v, retain %v, want [8], true", d.identifiers(), d.retain)
	}
}

// A shared subscription gives each message to one member: connected ones in
// turn, and where none is, to one that keeps it. Each group and each other
// subscription gets its own copy.
func TestSharedSubscriptions(t *testing.T) {
	s := start(t, t.TempDir())
	pub, _ := s.connect(connectOptions{id: "pub", version: 5, clean: true})
	pub.publish("a", "retained", 1, true)
	var members []*client
	for i := range 3 {
		c, _ := s.connect(connectOptions{id: fmt.Sprint("m", i), version: 5, expiry: 60})
		if got := c.subscribe(1, "$share/g/a"); got[0] != 1 {
			t.Fatalf("SUBSCRIBE: got %#x, want QoS 1", got[0])
		}
		members = append(members, c)
	}
	lone, _ := s.connect(connectOptions{id: "lone", version: 5, clean: true})
	lone.subscribe(1, "$share/h/a")
	plain, _ := s.connect(connectOptions{id: "plain", version: 5, clean: true})
	plain.subscribe(1|2<<4, "a")
	away, _ := s.connect(connectOptions{id: "away", version: 5, expiry: 60})
	away.subscribe(1, "$share/g/a")
	away.disconnect()
	eventually(t, "one member is away", func() bool { return !s.b.plane.connected("away") })
	const n = 30
	for i := range n {
		pub.publish("a", fmt.Sprint(i), 1, false)
	}
	seen := map[string]int{}
	for i, m := range members {
		got := m.got()
		if len(got) != n/3 {
			t.Errorf("member %d got %d messages, want %d", i, len(got), n/3)
		}
		for _, g := range got {
			seen[g]++
		}
	}
	for i := range n {
		if k := fmt.Sprintf("a=%d", i); seen[k] != 1 {
			t.Errorf("%q came %d times to the group, want once", k, seen[k])
		}
	}
	if got := len(lone.got()); got != n {
		t.Errorf("the other group got %d messages, want %d", got, n)
	}
	if got := len(plain.got()); got != n {
		t.Errorf("the plain subscriber got %d messages, want %d", got, n)
	}
	for _, m := range members {
		m.disconnect()
	}
	eventually(t, "all members are away", func() bool {
		return !s.b.plane.connected("m0") && !s.b.plane.connected("m1") && !s.b.plane.connected("m2")
	})
	for i := range n {
		pub.publish("a", fmt.Sprint("kept", i), 1, false)
	}
	total := 0
	for i := range 4 {
		id := fmt.Sprint("m", i)
		if i == 3 {
			id = "away"
		}
		c, _ := s.connect(connectOptions{id: id, version: 5, expiry: 60})
		total += len(c.got())
		c.disconnect()
	}
	if total != n {
		t.Errorf("%d messages were kept for a group that is away, want %d", total, n)
	}
	// An expiring member takes its subscription along.
	c, _ := s.connect(connectOptions{id: "lone", version: 5, clean: true})
	c.ping()
	s.b.plane.mu.RLock()
	got := s.b.plane.subs.len()
	s.b.plane.mu.RUnlock()
	if got != 2 {
		t.Errorf("%d entries in the index, want 2: the group g and the plain one", got)
	}
}

// QoS 2 identifiers survive the connection: a PUBLISH that is sent again is
// acknowledged again and delivered once.
func TestQoS2Duplicates(t *testing.T) {
	for _, version := range []byte{4, 5} {
		s := start(t, t.TempDir())
		sub, _ := s.connect(connectOptions{id: "sub", clean: true})
		sub.subscribe(2, "a")
		o := connectOptions{id: "pub", version: version, expiry: 3600}
		pub, _ := s.connect(o)
		again := func(what string, flags byte) {
			t.Helper()
			pub.send(pub.publishPacket("a", "one", 2, flags, 7))
			_, body := pub.expect(typePubrec)
			if len(body) != 2 {
				t.Errorf("v%d, %s: PUBREC is % x, want the identifier alone", version, what, body)
			}
		}
		again("first", 0)
		again("on the same connection", 8)
		pub.c.Close()
		pub, _ = s.connect(o)
		again("on the next connection", 8)
		sub.takeAll("one%.0d", 0, 1)
		s2 := s.crash()
		late, _ := s2.connect(connectOptions{id: "late", clean: true})
		late.subscribe(2, "a")
		pub, _ = s2.connect(o)
		again("after a crash", 8)
		late.ping()
		if len(late.stash) != 0 {
			t.Errorf("v%d: delivered again after a crash", version)
		}
		pub.send(packet(typePubrel<<4|2, u16(7)))
		pub.expectAck(typePubcomp, 7)
		pub.send(packet(typePubrel<<4|2, u16(7))) // it did not see the PUBCOMP
		pub.expectAck(typePubcomp, 7)
		again("a new message with the same identifier", 0)
		late.takeAll("one%.0d", 0, 1)
		late.ping()
		sub.ping()
		if len(late.stash) != 0 || len(sub.stash) != 0 {
			t.Errorf("v%d: delivered more than once", version)
		}
	}
}

// What was in flight comes again on the next connection: same identifiers,
// same order, DUP set; what was never sent has no DUP. So also after a crash.
func TestRedelivery(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for qos := byte(1); qos < 3; qos++ {
			t.Run(fmt.Sprintf("v%d qos%d", version, qos), func(t *testing.T) {
				s := start(t, t.TempDir())
				o := connectOptions{id: "sub", version: version, expiry: 3600, receiveMax: 10}
				window := 10
				if version < 5 {
					window = 256
				}
				n := window + 20
				sub, _ := s.connect(o)
				sub.raw = true
				sub.subscribe(qos, "a")
				pub, _ := s.connect(connectOptions{id: "pub", clean: true})
				for i := range n {
					pub.publish("a", fmt.Sprintf("m%d", i), qos, false)
				}
				ids := make([]uint16, n)
				check := func(what string, from, to int, dup bool) {
					t.Helper()
					for i := from; i < to; i++ {
						first, body := sub.expect(typePublish)
						d := parseDelivery(first, body, version)
						if ids[i] == 0 {
							ids[i] = d.id
						}
						if want := fmt.Sprintf("m%d", i); d.payload != want || d.id != ids[i] || d.dup != dup || d.qos != qos {
							t.Fatalf("%s: got %q, identifier %d, DUP %v, QoS %d; want %q, %d, %v, %d", what, d.payload, d.id, d.dup, d.qos, want, ids[i], dup, qos)
						}
					}
				}
				check("first", 0, window, false)
				reconnect := func() {
					sub.c.Close()
					sub, _ = s.connect(o)
					sub.raw = true
				}
				reconnect()
				check("second connection", 0, window, true)
				// Acknowledged out of order: the third and the first.
				for _, i := range []int{2, 0} {
					if qos == 1 {
						sub.send(packet(typePuback<<4, u16(ids[i])))
						continue
					}
					sub.send(packet(typePubrec<<4, u16(ids[i])))
					sub.expectAck(typePubrel, ids[i])
					sub.send(packet(typePubcomp<<4, u16(ids[i])))
				}
				check("the window moves on", window, window+2, false)
				reconnect()
				check("third connection", 1, 2, true)
				check("third connection", 3, window+2, true)
				sub.ping()
				if len(sub.stash) != 0 {
					t.Errorf("%d deliveries above the window", len(sub.stash))
				}
				s = s.crash()
				sub, _ = s.connect(o) // at QoS 2 it gets a PUBREL again where the end was not durable yet
				// What was acknowledged may come again at QoS 1, for cursors are lazy; but in order.
				first, body := sub.expect(typePublish)
				d := parseDelivery(first, body, version)
				sub.stash = append([][]byte{append([]byte{first}, body...)}, sub.stash...)
				switch {
				case d.payload == "m0" && qos == 1:
					check("after a crash", 0, window, true)
				default:
					check("after a crash", 1, 2, true)
					check("after a crash", 3, window, true)
				}
			})
		}
	}
}

func TestCleanStartDiscards(t *testing.T) {
	for _, version := range []byte{3, 4, 5} {
		dir := t.TempDir()
		s := start(t, dir)
		keep := connectOptions{id: "c", version: version, expiry: 3600}
		c, _ := s.connect(keep)
		c.subscribe(1, "a")
		c.disconnect()
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		eventually(t, "the client is away", func() bool { return !s.b.plane.connected("c") })
		pub.publish("a", "lost on purpose", 1, false)
		clean := keep
		clean.clean = true
		c, present := s.connect(clean)
		if present {
			t.Errorf("v%d: session present after a clean start", version)
		}
		pub.publish("a", "not subscribed", 1, false)
		if got := c.got(); len(got) != 0 {
			t.Errorf("v%d: got %v after a clean start, want nothing", version, got)
		}
		if got := s.b.Stats(); got.QueueMessages != 0 || got.Subscriptions != 0 || got.Dropped["session-ended"] != 1 {
			t.Errorf("v%d: %d messages, %d subscriptions left, %d dropped, want 0, 0, 1", version, got.QueueMessages, got.Subscriptions, got.Dropped["session-ended"])
		}
		c.disconnect()
		s.stop()
		s = start(t, dir)
		c, present = s.connect(keep)
		if want := version == 5; present != want { // a clean start of MQTT 5 may last, a clean session of 3.1.1 does not
			t.Errorf("v%d: session present %v after a restart, want %v", version, present, want)
		}
		if got := c.got(); len(got) != 0 {
			t.Errorf("v%d: got %v after a restart, want nothing", version, got)
		}
	}
}

// A session ends when its expiry interval has passed since the client went,
// and takes its subscriptions and its queue along.
func TestSessionExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		pub := p.connect(connectOptions{id: "pub", version: 5, clean: true})
		away := func(last []byte, wait time.Duration) (present bool, got []string) {
			t.Helper()
			c := p.connect(connectOptions{id: "c", version: 5, clean: true, expiry: 100})
			c.subscribe(1, "a")
			c.send(last)
			c.c.Close()
			synctest.Wait()
			pub.publish("a", "x", 1, false)
			time.Sleep(wait)
			p.b.sweep(time.Now())
			c = p.dial()
			c.version = 5
			c.send(connectPacket(connectOptions{id: "c", version: 5}))
			_, body := c.read()
			got = c.got()
			c.disconnect()
			synctest.Wait()
			return body[0] == 1, got
		}
		leave := func(expiry uint32) []byte {
			return packet(typeDisconnect<<4, []byte{0}, props5([]byte{propSessionExpiry}, u32(expiry)))
		}
		for _, tc := range []struct {
			what string
			last []byte
			wait time.Duration
			want bool
		}{
			{"before", []byte{typeDisconnect << 4, 0}, 99 * time.Second, true},
			{"after", []byte{typeDisconnect << 4, 0}, 101 * time.Second, false},
			{"shortened by DISCONNECT", leave(10), 11 * time.Second, false},
			{"lengthened by DISCONNECT", leave(1000), 999 * time.Second, true},
			{"ended by DISCONNECT", leave(0), 0, false},
			{"for ever", leave(storage.NeverExpires), 29 * 24 * time.Hour, true}, // but for the 30 days of the configuration
		} {
			present, got := away(tc.last, tc.wait)
			if present != tc.want || len(got) == 1 != tc.want {
				t.Errorf("%s: session present %v, messages %v, want %v", tc.what, present, got, tc.want)
			}
		}
		if st := p.b.Stats(); st.Subscriptions != 0 || st.Sessions != 1 || st.QueueMessages != 0 {
			t.Errorf("%d subscriptions, %d sessions, %d messages left, want 0, 1, 0", st.Subscriptions, st.Sessions, st.QueueMessages)
		}
	})
}

// Expired messages are not delivered, others say how long they have left; no
// message gets an expiry that nobody set.
func TestMessageExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		o := connectOptions{id: "sub", version: 5, expiry: 360000, receiveMax: 1}
		sub := p.connect(o)
		sub.subscribe(1, "#")
		pub := p.connect(connectOptions{id: "pub", version: 5, clean: true})
		publish := func(topic, payload string, expiry uint32, retain byte) {
			t.Helper()
			pub.send(packet(typePublish<<4|2|retain, str(topic), u16(1), props5([]byte{propMessageExpiry}, u32(expiry)), []byte(payload)))
			pub.expectAck(typePuback, 1)
		}
		left := func(d delivery) uint32 {
			r := reader{buf: d.props}
			if len(r.buf) == 0 || r.byte() != propMessageExpiry {
				return 0
			}
			return r.uint32()
		}
		// The first is sent, the others are held by the Receive Maximum of 1.
		pub.publish("a", "first", 1, false)
		publish("a", "short", 10, 0)
		publish("a", "long", 100, 0)
		pub.publish("a", "ever", 1, false)
		first, body := sub.expect(typePublish)
		time.Sleep(30 * time.Second)
		sub.send(packet(typePuback<<4, u16(parseDelivery(first, body, 5).id)))
		if d := sub.take(); d.payload != "long" || left(d) != 70 {
			t.Errorf("held: got %q with %d s left, want \"long\" with 70", d.payload, left(d))
		}
		if d := sub.take(); d.payload != "ever" || len(d.props) != 0 {
			t.Errorf("held: got %q with properties % x, want \"ever\" with none", d.payload, d.props)
		}
		if got := p.b.Stats().Dropped["expired"]; got != 1 {
			t.Errorf("%d dropped as expired, want 1", got)
		}
		// For a session that is away, and retained.
		sub.disconnect()
		synctest.Wait()
		publish("b", "short", 10, 1)
		publish("c", "long", 200000, 1)
		pub.publish("d", "ever", 1, true)
		time.Sleep(48 * time.Hour)
		sub = p.connect(o)
		for _, want := range []struct {
			payload string
			left    uint32
		}{{"long", 200000 - 48*3600}, {"ever", 0}} {
			if d := sub.take(); d.payload != want.payload || left(d) != want.left {
				t.Errorf("away: got %q with %d s left, want %q with %d", d.payload, left(d), want.payload, want.left)
			}
		}
		late := p.connect(connectOptions{id: "late", version: 5, clean: true})
		late.subscribe(1, "#")
		seen := map[string]uint32{}
		for range 2 {
			d := late.take()
			seen[d.payload] = left(d)
		}
		late.ping()
		if want := map[string]uint32{"long": 200000 - 48*3600, "ever": 0}; fmt.Sprint(seen) != fmt.Sprint(want) || len(late.stash) != 0 {
			t.Errorf("retained: got %v and %d more, want %v", seen, len(late.stash), want)
		}
	})
}

// Will Delay: published after it, or with the end of the session if that comes
// first, and not at all when the client is back before.
func TestDelayedWill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		sub := p.connect(connectOptions{id: "sub", version: 5, clean: true})
		sub.subscribe(1, "will")
		lost := func(expiry, delay uint32) {
			t.Helper()
			c := p.connect(connectOptions{id: "c", version: 5, expiry: expiry, will: &storage.Message{Topic: "will", Payload: []byte("gone"), QoS: 1}, willDelay: delay})
			c.c.Close()
			synctest.Wait()
		}
		after := func(what string, d time.Duration, want ...string) {
			t.Helper()
			time.Sleep(d)
			p.b.sweep(time.Now())
			synctest.Wait()
			equal(t, what, sub.got(), want)
		}
		lost(100, 10)
		after("before the delay", 9*time.Second)
		after("after the delay", 2*time.Second, "will=gone")
		after("once", 200*time.Second)
		lost(20, 60)
		after("before the session ends", 19*time.Second)
		after("the session ends first", 2*time.Second, "will=gone")
		lost(0, 60)
		after("a session that ends with the connection", 0, "will=gone")
		lost(100, 10)
		p.connect(connectOptions{id: "c", version: 5, expiry: 100}).disconnect()
		after("the client was back", 50*time.Second)
		lost(100, 10)
		p.connect(connectOptions{id: "c", version: 5, clean: true}).disconnect() // ends the session that it belongs to
		after("a clean start", 0, "will=gone")
		lost(100, 0)
		after("no delay", 0, "will=gone")
	})
}

// The wills of clients that were connected when the power went are published
// after a grace period, unless the client is back.
func TestWillAfterCrash(t *testing.T) {
	s := start(t, t.TempDir())
	for _, id := range []string{"dead", "back"} {
		s.connect(connectOptions{id: id, version: 5, expiry: 3600, will: &storage.Message{Topic: "will/" + id, Payload: []byte("gone"), QoS: 1, Retain: true}})
	}
	polite, _ := s.connect(connectOptions{id: "polite", version: 5, expiry: 3600, will: &storage.Message{Topic: "will/polite", Payload: []byte("gone"), QoS: 1}})
	polite.disconnect()
	eventually(t, "the polite one is gone", func() bool { return !s.b.plane.connected("polite") })
	c, _ := s.connect(connectOptions{id: "last", version: 5, expiry: 3600}) // durable, and so is all before it
	c.ping()
	s = s.crash()
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(1, "will/#")
	back, present := s.connect(connectOptions{id: "back", version: 5, expiry: 3600})
	if !present {
		t.Error("the session is lost")
	}
	s.b.sweep(time.Now())
	equal(t, "within the grace period", sub.got(), nil)
	s.b.sweep(time.Now().Add(time.Hour))
	equal(t, "after the grace period", sub.got(), []string{"will/dead=gone"})
	back.disconnect()
	s.b.sweep(time.Now().Add(2 * time.Hour))
	equal(t, "once", sub.got(), nil)
	late, _ := s.connect(connectOptions{id: "late", clean: true})
	late.subscribe(1, "will/#")
	equal(t, "retained", late.got(), []string{"will/dead=gone(r)"})
}

// Order holds for each publisher, topic and QoS, also with many publishers, a
// subscriber that comes and goes, and a crash at the end.
func TestOrderWithReconnects(t *testing.T) {
	const publishers, n = 4, 400
	s := start(t, t.TempDir())
	o := connectOptions{id: "sub", version: 4}
	sub, _ := s.connect(o)
	sub.subscribe(1, "a/#")
	var wg sync.WaitGroup
	var left atomic.Int32
	left.Store(publishers)
	for k := range publishers {
		pub, _ := s.connect(connectOptions{id: fmt.Sprint("pub", k), clean: true})
		wg.Go(func() {
			defer left.Add(-1)
			pub.flood(fixed(fmt.Sprint("a/", k)), "%d", n, 0)
		})
	}
	next := map[string]int{}
	total, crashed := 0, false
	take := func() {
		d := sub.take()
		var i int
		fmt.Sscan(d.payload, &i)
		switch {
		case i == next[d.topic]:
			next[d.topic]++
			total++
		case i < next[d.topic] && (d.dup || crashed): // again, for its PUBACK was lost, or the lazy cursor
		default:
			t.Fatalf("%s: got %d, want %d", d.topic, i, next[d.topic])
		}
	}
	for round := 0; left.Load() > 0; round++ {
		for range 50 {
			if total == publishers*n {
				break
			}
			take()
		}
		sub.c.Close()
		sub, _ = s.connect(o)
	}
	wg.Wait()
	s, crashed = s.crash(), true
	sub, _ = s.connect(o)
	for total < publishers*n {
		take()
	}
}

// After a restart the will of a client that is back is not published, also not
// where the client wants a new session.
func TestWillOfCleanSessionThatIsBack(t *testing.T) {
	s := start(t, t.TempDir())
	o := connectOptions{id: "c", version: 4, clean: true, will: &storage.Message{Topic: "will", Payload: []byte("gone"), QoS: 1}}
	s.connect(o)
	last, _ := s.connect(connectOptions{id: "last", version: 5, expiry: 3600}) // durable, and so is all before it
	last.ping()
	s = s.crash()
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(1, "will")
	c, _ := s.connect(o)
	c.ping()
	equal(t, "the client is back", sub.got(), nil)
}

// A restart with much to restore: everything is there, in order, and the log
// of the test says how long it took.
func TestRestartWithMuch(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 2000
	}
	dir := t.TempDir()
	s := start(t, dir)
	sub, _ := s.connect(connectOptions{id: "sub"})
	sub.subscribe(1, "q")
	sub.disconnect()
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pad := strings.Repeat("x", 100)
	send := func(retain byte, topic func(i int) string) {
		const window = 500
		for i := 0; i < n; i += window {
			var out []byte
			for k := range window {
				out = append(out, pub.publishPacket(topic(i+k), fmt.Sprintf("%s%d", pad, i+k), 1, retain, uint16(1+k))...)
			}
			pub.send(out)
			for range window {
				pub.expect(typePuback)
			}
		}
	}
	send(0, func(int) string { return "q" })
	send(1, func(i int) string { return fmt.Sprintf("r/%d", i) })
	s.stop()

	began := time.Now()
	s = start(t, dir)
	s.connect(connectOptions{id: "first", clean: true})
	t.Logf("%d queued and %d retained messages: first CONNACK after %v", n, n, time.Since(began))
	if got := s.b.Stats(); got.QueueMessages != int64(n) || got.Retained != int64(n) {
		t.Errorf("%d queued and %d retained, want %d of each", got.QueueMessages, got.Retained, n)
	}
	sub, present := s.connect(connectOptions{id: "sub"})
	if !present {
		t.Error("session is gone")
	}
	sub.takeAll(pad+"%d", 0, n)
}

// What a client has acknowledged before it was told of a stop does not come
// again, and its will does not come after a DISCONNECT, though the broker had
// not read them when it stopped.
func TestLastWordsBeforeStop(t *testing.T) {
	dir := t.TempDir()
	for round := range 4 {
		s := start(t, dir)
		var subs []*client
		for i := range 40 {
			c, _ := s.connect(connectOptions{id: fmt.Sprint(i), version: byte(4 + i%2), expiry: 3600, will: &storage.Message{Topic: "will", QoS: 1}})
			c.subscribe(1, "a")
			subs = append(subs, c)
		}
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		pub.publish("a", fmt.Sprint(round), 1, false)
		for _, c := range subs {
			d := c.take()
			if d.payload != fmt.Sprint(round) {
				t.Fatalf("round %d: client got %q again, which it had acknowledged", round, d.payload)
			}
			c.send([]byte{typeDisconnect << 4, 0}) // behind the PUBACK that take has sent
		}
		s.stop()
		for _, c := range subs {
			c.c.Close()
		}
		pub.c.Close()
		if n := len(s.b.plane.wills); n != 0 {
			t.Fatalf("round %d: %d wills are kept of clients that took leave", round, n)
		}
	}
}

// However a packet comes in pieces, and whatever its size, every byte of it
// arrives: the read buffer is changed for a larger one and for what is unread
// of it while the connection waits.
func TestPacketsInPieces(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxPacket = 2 << 20 })
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(1, "a")
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{1, 1000, 1024, 1030, 16384, 16400, 65000, 65536, 65600, 262144, 262200, 1 << 20} {
		for _, piece := range []int{997, 16384, 65536, 300000} {
			payload := make([]byte, size)
			for i := range payload {
				payload[i] = byte(rnd.Uint32())
			}
			pub := s.dial()
			pub.version = 4
			all := connectPacket(connectOptions{id: strings.Repeat("p", min(size, 60000)), version: 4, clean: true})
			all = append(all, pub.publishPacket("a", string(payload), 1, 0, 1)...)
			for len(all) > 0 {
				n := min(len(all), 1+rnd.IntN(piece))
				pub.send(all[:n])
				all = all[n:]
				runtime.Gosched()
			}
			pub.expect(typeConnack)
			pub.expectAck(typePuback, 1)
			if got := sub.take().payload; got != string(payload) {
				t.Fatalf("%d bytes in pieces of up to %d: they are not the same", size, piece)
			}
			pub.c.Close()
		}
	}
}
