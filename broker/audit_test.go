package broker

import (
	"bytes"
	"fmt"
	"go/parser"
	"go/token"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// The tests of this file show Penstock free of what is wrong in mochi-mqtt
// v2.7.9 as it comes. The numbers are those of an audit of it; defects that
// have no test here are covered elsewhere, which is said at their number.

// 3.1 Subscribers with a Receive Maximum deadlock under load, and everybody
// who publishes to them. 3.20: each packet costs a walk over all in flight.
func TestLoadWithReceiveMaximum(t *testing.T) {
	const publishers, subscribers, n = 3, 3, 5000
	s := start(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range subscribers {
		sub, _ := s.connect(connectOptions{id: fmt.Sprint("sub", i), version: 5, clean: true, receiveMax: uint16(1 + 10*i)})
		sub.subscribe(1, "a/#")
		wg.Go(func() {
			next := map[string]int{}
			for range publishers * n {
				d := sub.take()
				if want := fmt.Sprintf("m%d", next[d.topic]); d.payload != want {
					t.Errorf("%s: got %q, want %q", d.topic, d.payload, want)
					return
				}
				next[d.topic]++
			}
		})
	}
	for i := range publishers {
		pub, _ := s.connect(connectOptions{id: fmt.Sprint("pub", i), clean: true})
		wg.Go(func() { pub.flood(fixed(fmt.Sprint("a/", i)), "m%d", n, 0) })
	}
	wg.Wait()
}

// 3.2 Receive Maximum loses what is held, leaks its quota and mixes the order:
// also TestReceiveMaximumOne.
func TestReceiveMaximumTwo(t *testing.T) {
	for qos := byte(1); qos < 3; qos++ {
		s := start(t, t.TempDir())
		o := connectOptions{id: "sub", version: 5, expiry: 60, receiveMax: 2}
		sub, _ := s.connect(o)
		sub.subscribe(qos, "a")
		pub, _ := s.connect(connectOptions{id: "pub", clean: true})
		for i := range 20 {
			pub.publish("a", fmt.Sprintf("m%d", i), qos, false)
		}
		sub.c.Close() // 18 of them were never sent
		sub, _ = s.connect(o)
		sub.takeAll("m%d", 0, 20)
	}
}

// 3.3 A stalled subscriber blocks its publishers and its own takeover: see
// TestStalledReader, TestStalledReaderIsTakenOver.

// 3.4 One map of packet identifiers for both directions: what a client sends
// under an identifier deletes what it has not acknowledged under the same one.
func TestPacketIdentifiersOfTwoDirections(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for qos := byte(1); qos < 3; qos++ {
			s := start(t, t.TempDir())
			o := connectOptions{id: "c", version: version, expiry: 60}
			c, _ := s.connect(o)
			c.raw = true
			c.subscribe(qos, "in")
			pub, _ := s.connect(connectOptions{id: "pub", clean: true})
			pub.publish("in", "kept", qos, false)
			first, body := c.expect(typePublish)
			id := parseDelivery(first, body, version).id
			c.send(c.publishPacket("out", "x", 1, 0, id))
			c.expectAck(typePuback, id)
			c.send(c.publishPacket("out", "x", 2, 0, id))
			c.expectAck(typePubrec, id)
			c.send(packet(typeSubscribe<<4|2, u16(id), c.noProps(), str("other"), []byte{1}))
			if _, body := c.expect(typeSuback); body[len(body)-1] != 1 {
				t.Errorf("v%d: SUBSCRIBE with identifier %d: got % x, want QoS 1", version, id, body)
			}
			c.send(packet(typePubrel<<4|2, u16(id)))
			c.expectAck(typePubcomp, id)
			c.c.Close()
			c, _ = s.connect(o)
			if d := c.take(); d.payload != "kept" || d.id != id || !d.dup {
				t.Errorf("v%d, qos %d: got %q, identifier %d, DUP %v; want \"kept\", %d, true", version, qos, d.payload, d.id, d.dup, id)
			}
		}
	}
}

// 3.5 Redelivery in random order: see TestManyQueuedForOffline, TestRedelivery
// and, over a restart, here.
func TestQueueOrderOverRestart(t *testing.T) {
	const n = 3000
	dir := t.TempDir()
	s := start(t, dir)
	o := connectOptions{id: "sub", version: 5, expiry: 3600}
	sub, _ := s.connect(o)
	sub.subscribe(2, "#")
	sub.disconnect()
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(func(i int) string { return fmt.Sprint("t", i%7) }, "m%d", n, 0)
	s.stop()
	s = start(t, dir)
	sub, _ = s.connect(o)
	sub.takeAll("m%d", 0, n)
}

// 3.6 Resume sends everything at once, with DUP on what was never sent.
func TestResumeKeepsToReceiveMaximum(t *testing.T) {
	s := start(t, t.TempDir())
	o := connectOptions{id: "sub", version: 5, expiry: 60, receiveMax: 5}
	sub, _ := s.connect(o)
	sub.subscribe(1, "a")
	sub.disconnect()
	eventually(t, "the client is away", func() bool { return !s.b.plane.connected("sub") })
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(fixed("a"), "m%d", 200, 0)
	sub, _ = s.connect(o)
	eventually(t, "the first deliveries", func() bool { sub.ping(); return len(sub.stash) > 0 }) // they are read from the disk
	sub.ping()
	sub.ping()
	if got := len(sub.stash); got != 5 {
		t.Errorf("%d deliveries at once, want the Receive Maximum of 5", got)
	}
	for i := range 200 {
		if d := sub.take(); d.payload != fmt.Sprintf("m%d", i) || d.dup {
			t.Fatalf("got %q, DUP %v, want \"m%d\" without", d.payload, d.dup, i)
		}
	}
}

// 3.7 A message above the client's Maximum Packet Size disconnects it at every
// reconnect: see TestMaximumPacketSize.

// 3.8 A SUBSCRIBE cut short crashes the process: see TestTruncatedPackets.
func TestSubscribeWithoutOptions(t *testing.T) {
	s := start(t, t.TempDir())
	for version, want := range map[byte]byte{3: 0, 4: 0, 5: reasonMalformed} {
		c, _ := s.connect(connectOptions{id: "c", version: version, clean: true})
		c.send(packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a")))
		if got := c.expectEnd(); got != want {
			t.Errorf("v%d: got reason %#x, want %#x", version, got, want)
		}
	}
	s.alive()
}

// 3.9 The accept loop ends with the first error: see TestAcceptGoesOn.

// 3.10 No deadline before CONNECT (see TestConnectDeadline), memory for a
// packet that was only announced (see TestOversizedPackets), and the bound on
// connections is looked at after CONNECT only.
func TestConnectionsAreBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxConnections = 2 })
	c, _ := s.connect(connectOptions{id: "c", clean: true})
	other, _ := s.connect(connectOptions{id: "other", clean: true})
	one := s.dial()
	one.send(connectPacket(connectOptions{id: "one", version: 4, clean: true}))
	if first, body := one.read(); first != typeConnack<<4 || body[1] != 3 {
		t.Errorf("a connection above the bound got %x % x, want a CONNACK with code 3", first, body)
	}
	one.expectEnd()
	c.ping()
	other.disconnect()
	eventually(t, "there is room again", func() bool { return len(s.b.connections()) == 1 })
	c2, _ := s.connect(connectOptions{id: "c2", clean: true})
	c2.ping()
}

// 3.10 What a client announces costs nothing until it sends it.
func TestAnnouncedPacketCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.MaxPacket = 256 << 20 })
		c := p.connect(connectOptions{id: "c", version: 4, clean: true})
		c.send([]byte{typePublish << 4, 0xF0, 0xFF, 0xFF, 0x7F, 0, 1, 'a'}) // some bytes of 256 MB
		synctest.Wait()
		if got := len(p.b.connections()[0].in); got > bigBuffer {
			t.Errorf("the read buffer has %d bytes, want at most %d", got, bigBuffer)
		}
	})
}

// 3.11 Subscriptions of expired sessions stay, and a new session with the same
// client identifier gets their messages.
func TestExpiredSessionLeavesNothing(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", version: 5, expiry: 10})
	c.subscribe(1, "a", "$share/g/a")
	c.disconnect()
	eventually(t, "the client is away", func() bool { return !s.b.plane.connected("c") })
	s.b.sweep(time.Now().Add(11 * time.Second))
	if st := s.b.Stats(); st.Sessions != 0 || st.Subscriptions != 0 {
		t.Errorf("%d sessions, %d subscriptions left, want none", st.Sessions, st.Subscriptions)
	}
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	c, present := s.connect(connectOptions{id: "c", version: 5, expiry: 10})
	pub.publish("a", "x", 1, false)
	if got := c.got(); present || len(got) != 0 {
		t.Errorf("got session present %v and messages %v, want neither", present, got)
	}
	s2 := s.crash() // nor is it there again after a restart
	c, present = s2.connect(connectOptions{id: "c", version: 5, expiry: 10})
	pub, _ = s2.connect(connectOptions{id: "pub", clean: true})
	pub.publish("a", "x", 1, false)
	if got := c.got(); len(got) != 0 {
		t.Errorf("after a restart: got session present %v and messages %v, want no message", present, got)
	}
}

// 3.12 The end of an old connection takes the new one out of the registry: it
// is connected, subscribed and deaf. 3.13: a PUBLISH ahead of the CONNACK.
func TestReconnectRaces(t *testing.T) {
	const rounds = 100
	s := start(t, t.TempDir())
	o := connectOptions{id: "c", version: 4}
	c, _ := s.connect(o)
	c.subscribe(0, "a")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			pub.send(pub.publishPacket("a", "x", 0, 0, 0))
		}
	})
	defer wg.Wait()
	defer stop.Store(true)
	for i := range rounds {
		var closing sync.WaitGroup
		closing.Go(func() { c.c.Close() })
		fresh := s.dial()
		fresh.send(connectPacket(o))
		if first, body := fresh.read(); first != typeConnack<<4 || body[1] != 0 {
			t.Fatalf("round %d: got % x % x first, want a CONNACK", i, first, body)
		}
		closing.Wait()
		c = fresh
		if first, _ := c.read(); first != typePublish<<4 {
			t.Fatalf("round %d: got %#x, want a message", i, first)
		}
		up := slices.ContainsFunc(s.b.Clients(), func(info ClientInfo) bool {
			return info.ID == "c" && info.Address == c.c.LocalAddr().String()
		})
		if !up {
			t.Fatalf("round %d: the client that is up is not among the clients", i)
		}
	}
}

// 3.14 A topic alias is stored in place of the topic.
func TestNoAliasInTheQueue(t *testing.T) {
	s := start(t, t.TempDir())
	hello := func(clean byte) []byte {
		return packet(typeConnect<<4, str("MQTT"), []byte{5, clean, 0, 0}, props5([]byte{propTopicAliasMaximum, 0, 10, propSessionExpiry, 0, 0, 1, 0}), str("c"))
	}
	c := s.dial()
	c.version = 5
	c.send(hello(2))
	c.expect(typeConnack)
	c.subscribe(1, "a/#")
	pub, _ := s.connect(connectOptions{id: "pub", version: 5, clean: true})
	alias := func(topic string, n byte, payload string) {
		pub.send(packet(typePublish<<4|2, str(topic), u16(1), props5([]byte{propTopicAlias, 0, n}), []byte(payload)))
		pub.expectAck(typePuback, 1)
	}
	alias("a/1", 1, "1")
	c.disconnect()
	eventually(t, "the client is away", func() bool { return !s.b.plane.connected("c") })
	alias("", 1, "2")
	alias("a/2", 1, "3")
	alias("", 1, "4")
	s = s.crash()
	c = s.dial()
	c.version = 5
	c.send(hello(0))
	c.expect(typeConnack)
	for _, want := range []string{"a/1=1", "a/1=2", "a/2=3", "a/2=4"} {
		d := c.take()
		if got := d.topic + "=" + d.payload; got != want || len(d.props) != 0 {
			t.Errorf("got %s with properties % x, want %s with none", got, d.props, want)
		}
	}
}

// 3.15 A QoS 2 PUBLISH that comes again is answered with an error: see
// TestQoS2Duplicates.

// 3.16 Matching: wildcards that match too little or too much, live and
// retained.
func TestMatchingOnTheWire(t *testing.T) {
	for _, tc := range []struct {
		filter, topic string
		want          bool
	}{
		{"+/#", "foo", true}, {"a/+/#", "a/b", true}, {"foo/#", "foo", true}, {"#", "a", true}, {"+", "a", true},
		{"+", "/", false}, {"+/+", "/", true}, {"/+", "/a", true}, {"a/#", "ab", false}, {"a/+", "a", false}, {"a/+", "a/", true},
	} {
		s := start(t, t.TempDir())
		c, _ := s.connect(connectOptions{id: "c", clean: true})
		c.publish(tc.topic, "retained", 1, true)
		c.subscribe(1, tc.filter)
		c.publish(tc.topic, "live", 1, false)
		want := []string{}
		if tc.want {
			want = []string{tc.topic + "=retained(r)", tc.topic + "=live"}
		}
		equal(t, fmt.Sprintf("%q, %q", tc.filter, tc.topic), c.got(), want)
		s.stop()
	}
	// Wildcards at the front match no topic of the broker's own [MQTT-4.7.2-1].
	s := start(t, t.TempDir())
	p := s.b.plane
	p.mu.Lock()
	p.retained.put("$topics/x", &storage.Message{Topic: "$topics/x", Payload: []byte("1")})
	p.mu.Unlock()
	c, _ := s.connect(connectOptions{id: "c", clean: true})
	c.subscribe(1, "#", "+/x", "+/#")
	equal(t, "wildcards at the front", c.got(), nil)
	c.subscribe(1, "$topics/+")
	equal(t, "the name itself", c.got(), []string{"$topics/x=1(r)"})
}

// 3.17 Filters and values that are accepted though they are invalid. Values:
// the tables in wire_test.go and TestConnectRefusals.
func TestInvalidFilters(t *testing.T) {
	s := start(t, t.TempDir())
	c5, _ := s.connect(connectOptions{id: "c5", version: 5, clean: true})
	for _, f := range []string{"", "a#", "a+/b", "a/#/b", "#/a", "+a", "$share//x", "$share/g/", "$share/g", "$share/+/x", "$share/g#/x", "$share/g/a#"} {
		c4, _ := s.connect(connectOptions{id: "c4", clean: true})
		c4.send(packet(typeSubscribe<<4|2, u16(1), str(f), []byte{1}))
		if first, body, err := c4.tryRead(); err == nil { // 3.1.1 has no code for it
			t.Errorf("v4, %q: got % x % x, want the end of the connection", f, first, body)
		}
		c4.c.Close()
		if got := c5.subscribe(1, f); got[0] != reasonFilterInvalid {
			t.Errorf("v5, %q: got %#x, want %#x", f, got[0], reasonFilterInvalid)
		}
	}
	if got := c5.subscribe(1, "ok", "no#", "also/#"); !bytes.Equal(got, []byte{1, reasonFilterInvalid, 1}) {
		t.Errorf("three filters: got % x, want the second refused", got)
	}
	for _, alias := range []uint16{1, 17, 0} {
		c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
		c.send(packet(typePublish<<4, str(""), props5([]byte{propTopicAlias}, u16(alias))))
		want := byte(reasonProtocolError) // unknown
		if alias != 1 {
			want = reasonAliasInvalid
		}
		if got := c.expectEnd(); got != want {
			t.Errorf("alias %d: got reason %#x, want %#x", alias, got, want)
		}
	}
	for _, topic := range []string{"a/+", "#", "a/#/b"} {
		c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
		c.send(c.publishPacket(topic, "x", 1, 0, 1))
		if got := c.expectEnd(); got != reasonTopicInvalid {
			t.Errorf("PUBLISH to %q: got reason %#x, want %#x", topic, got, reasonTopicInvalid)
		}
	}
}

// 3.18 A filter or topic of 65 kB of slashes takes seconds.
func TestDeepTopicsAreRefused(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
	for _, f := range []string{strings.Repeat("/", 65535), strings.Repeat("+/", 200), strings.Repeat("x", 5000)} {
		if got := c.subscribe(1, f); got[0] != reasonFilterInvalid {
			t.Errorf("filter of %d bytes: got %#x, want %#x", len(f), got[0], reasonFilterInvalid)
		}
	}
	if got := c.subscribe(1, strings.Repeat("/", 127)); got[0] != 1 {
		t.Errorf("filter of 128 levels: got %#x, want QoS 1", got[0])
	}
	c.send(c.publishPacket(strings.Repeat("/", 65535), "x", 1, 0, 1))
	if got := c.expectEnd(); got != reasonTopicInvalid {
		t.Errorf("topic of 65,535 levels: got reason %#x, want %#x", got, reasonTopicInvalid)
	}
}

// 3.19 Once a second mochi copies all clients, all that is in flight and all
// retained messages. Here it has none of them: its loop does not run, and its
// stores stay empty. 3.30, a race in its retained store, cannot occur either.
func TestMochiHoldsNothing(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", version: 5, expiry: 60})
	c.subscribe(2, "#")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.publish("a", "1", 2, true)
	c.take()
	if n := s.b.mochi.Clients.Len(); n != 0 { // it has a client for the handshake only
		t.Errorf("mochi has %d clients of 2 that are connected, want none", n)
	}
	if n := s.b.mochi.Topics.Retained.Len(); n != 0 {
		t.Errorf("mochi has %d retained messages, want none", n)
	}
	c.disconnect()
	if n := atomic.LoadInt64(&s.b.mochi.Info.Started); time.Now().Unix()-n < 0 || atomic.LoadInt64(&s.b.mochi.Info.Time) != 0 {
		t.Error("mochi's loop runs")
	}
	if opts := mochiOptions(&s.b.cfg); opts.Capabilities.MaximumClientWritesPending != 0 {
		t.Errorf("MaximumClientWritesPending is %d: each connection pays for a channel of that size", opts.Capabilities.MaximumClientWritesPending)
	}
}

// 3.21 Wills: rights are not asked, wildcards and $SYS are allowed, properties
// are lost, delayed ones are lost with a restart, and they are not published
// when their session ends first. See also TestDelayedWill, TestWillAfterCrash,
// TestEmptyWillAndPassword, TestDisconnectAndWill.
func TestWillRights(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	s.b.plane.acl.Store(newACL([]storage.ACLRule{{Action: "publish", Filter: "secret/#"}}))
	watch, _ := s.connect(connectOptions{id: "watch", clean: true})
	watch.subscribe(1, "#", "$SYS/#", "secret/#")
	for _, topic := range []string{"secret/x", "$SYS/broker/uptime"} {
		for _, version := range []byte{4, 5} {
			c := s.dial()
			c.version = version
			c.send(connectPacket(connectOptions{id: "c", version: version, expiry: 3600, will: &storage.Message{Topic: topic, Payload: []byte("forged"), QoS: 1, Retain: true}}))
			want := byte(5)
			if version == 5 {
				want = reasonNotAuthorized
			}
			if first, body := c.read(); first != typeConnack<<4 || body[1] != want {
				t.Errorf("v%d, will on %q: got % x % x, want a refusal with %#x", version, topic, first, body, want)
			}
			c.c.Close()
		}
	}
	c, _ := s.connect(connectOptions{id: "d", version: 5, expiry: 3600, will: &storage.Message{Topic: "open", Payload: []byte("gone"), QoS: 1}})
	c.c.Close()
	if d := watch.take(); d.topic != "open" {
		t.Errorf("got %q, want the will that is allowed", d.topic)
	}
	// Rights that were taken away meanwhile count too.
	c, _ = s.connect(connectOptions{id: "d", version: 5, expiry: 3600, will: &storage.Message{Topic: "later/x", Payload: []byte("gone"), QoS: 1}})
	s.b.plane.acl.Store(newACL([]storage.ACLRule{{Action: "publish", Filter: "later/#"}}))
	c.c.Close()
	eventually(t, "the session is down", func() bool { return !s.b.plane.connected("d") })
	equal(t, "a right that was taken away", watch.got(), nil)
	// After a crash nobody asks again.
	s = s.crash()
	watch, _ = s.connect(connectOptions{id: "watch", clean: true})
	watch.subscribe(1, "#", "$SYS/#", "secret/#")
	s.b.sweep(time.Now().Add(24 * time.Hour))
	for _, g := range watch.got() {
		if strings.Contains(g, "forged") {
			t.Errorf("after a crash: got %s", g)
		}
	}
}

// 3.21 continued.
func TestWillProperties(t *testing.T) {
	for _, crash := range []bool{false, true} {
		s := start(t, t.TempDir())
		user := func(k, v string) []byte { return bytes.Join([][]byte{{propUser}, str(k), str(v)}, nil) }
		pass := bytes.Join([][]byte{{propPayloadFormat, 1, propContentType}, str("text"), {propResponseTopic}, str("re"), {propCorrelationData}, str("\xff\x00"), user("k", "1"), user("k", "2")}, nil)
		will := props5([]byte{propWillDelay}, u32(60), []byte{propMessageExpiry}, u32(1000), pass)
		c := s.dial()
		c.version = 5
		c.send(packet(typeConnect<<4, str("MQTT"), []byte{5, 2 | 4 | 1<<3 | 32, 0, 0}, props5([]byte{propSessionExpiry}, u32(3600)), str("c"), will, str("will"), str("gone")))
		c.expect(typeConnack)
		if crash {
			s = s.crash()
		} else {
			c.c.Close()
			eventually(t, "the session is down", func() bool { return !s.b.plane.connected("c") })
		}
		sub, _ := s.connect(connectOptions{id: "sub", version: 5, clean: true})
		sub.subscribe(1, "will")
		s.b.sweep(time.Now().Add(30 * time.Second))
		equal(t, "before the delay", sub.got(), nil)
		s.b.sweep(time.Now().Add(time.Hour))
		d := sub.take()
		want := append(append([]byte{propMessageExpiry}, u32(1000)...), pass...)
		if d.payload != "gone" || !bytes.Equal(d.props, want) {
			t.Errorf("crash %v: got %q with properties % x, want % x", crash, d.payload, d.props, want)
		}
		late, _ := s.connect(connectOptions{id: "late", version: 5, clean: true})
		late.subscribe(1, "will")
		equal(t, "retained", late.got(), []string{"will=gone(r)"})
	}
}

// 3.22 Messages lose their expiry, get one that nobody set, and retained ones
// go after 24 h: see TestMessageExpiry.
func TestRetainedStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		pub := p.connect(connectOptions{id: "pub", version: 5, clean: true})
		pub.publish("a", "0", 0, true)
		pub.publish("b", "1", 1, true)
		time.Sleep(400 * 24 * time.Hour)
		p.b.sweep(time.Now())
		sub := p.connect(connectOptions{id: "sub", version: 5, clean: true})
		sub.subscribe(1, "+")
		if got := sub.got(); len(got) != 2 {
			t.Errorf("after 400 days: got %v, want both", got)
		}
	})
}

// 3.23 A keep alive above 43,690 s: see TestLongKeepAlive,
// TestKeepAliveIsEnforced.

// 3.24 Many QoS 2 identifiers in flight disconnect a 3.1.1 client.
func TestManyQoS2InFlight(t *testing.T) {
	for _, version := range []byte{4, 5} {
		s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.ReceiveMaximum = 5000 })
		sub, _ := s.connect(connectOptions{id: "sub", clean: true})
		sub.subscribe(2, "a")
		pub, _ := s.connect(connectOptions{id: "pub", version: version, expiry: 60})
		pub.raw = true
		const n = 5000
		for i := 0; i < n; i += 100 {
			var buf []byte
			for j := range 100 {
				buf = append(buf, pub.publishPacket("a", fmt.Sprintf("m%d", i+j), 2, 0, uint16(1+i+j))...)
			}
			pub.send(buf)
			for j := range 100 {
				pub.expectAck(typePubrec, uint16(1+i+j))
			}
		}
		pub.send(pub.publishPacket("a", fmt.Sprintf("m%d", n), 0, 0, 0))
		pub.ping()
		got := [3]int{} // by QoS: each has its own order
		for range n + 1 {
			d := sub.take()
			if want := fmt.Sprintf("m%d", got[2]); d.qos == 2 && d.payload != want {
				t.Fatalf("got %q, want %q", d.payload, want)
			}
			got[d.qos]++
		}
		if got != [3]int{1, 0, n} {
			t.Errorf("v%d: got %v messages by QoS, want 1, 0, %d", version, got, n)
		}
	}
}

// 3.25 A PUBLISH to $SYS is never acknowledged.
func TestPublishToSysIsAcknowledged(t *testing.T) {
	s := start(t, t.TempDir())
	watch, _ := s.connect(connectOptions{id: "watch", clean: true})
	watch.subscribe(2, "$SYS/#")
	for _, version := range []byte{3, 4, 5} {
		c, _ := s.connect(connectOptions{id: "c", version: version, clean: true})
		for qos := byte(1); qos < 3; qos++ {
			c.send(c.publishPacket("$SYS/broker/x", "forged", qos, 1, uint16(qos)))
			kind := byte(typePuback)
			if qos == 2 {
				kind = typePubrec
			}
			_, body := c.expect(kind)
			want := []byte{0, qos}
			if version == 5 {
				want = append(want, reasonNotAuthorized)
			}
			if !bytes.HasPrefix(body, want) { // a reason string follows
				t.Errorf("v%d, qos %d: got % x, want % x", version, qos, body, want)
			}
		}
		c.send(c.publishPacket("$SYS/broker/x", "forged", 0, 1, 0))
		c.ping()
	}
	equal(t, "nobody gets it", watch.got(), nil)
	if st := s.b.Stats(); st.Retained != 0 || st.Dropped["not-authorized"] != 9 {
		t.Errorf("%d retained, %d dropped, want 0, 9", st.Retained, st.Dropped["not-authorized"])
	}
}

// 3.26 CONNACK does not say what the limits are, and they are not kept.
func TestConnackSaysLimits(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.SessionExpiry = units.Duration(1000 * time.Second) })
	hello := func(id string, expiry uint32) map[byte]string {
		t.Helper()
		c := s.dial()
		c.send(connectPacket(connectOptions{id: id, version: 5, clean: true, expiry: expiry}))
		_, body := c.read()
		r := reader{buf: body[2:]}
		p := reader{buf: r.take(r.varint())}
		got := map[byte]string{}
		for len(p.buf) > 0 {
			switch id := p.byte(); id {
			case propSessionExpiry, propMaximumPacket:
				got[id] = fmt.Sprint(p.uint32())
			case propReceiveMaximum, propTopicAliasMaximum, 19:
				got[id] = fmt.Sprint(p.uint16())
			case 18:
				got[id] = "assigned"
				if len(p.text()) == 0 {
					t.Error("the assigned client identifier is empty")
				}
			case 36, 37, 40, 41, 42: // Maximum QoS, and what is available
				got[id] = fmt.Sprint(p.byte())
			default:
				t.Fatalf("property %d in a CONNACK: % x", id, body)
			}
		}
		if r.err != nil || p.err != nil {
			t.Fatalf("CONNACK is malformed: % x", body)
		}
		return got
	}
	want := map[byte]string{propMaximumPacket: "1048576", propReceiveMaximum: "1000", propTopicAliasMaximum: "16"}
	for _, tc := range []struct {
		id     string
		expiry uint32
		prop   byte
		value  string
	}{{"c", 0, 0, ""}, {"c", 1000, 0, ""}, {"c", 1001, propSessionExpiry, "1000"}, {"", 0, 18, "assigned"}} {
		got := hello(tc.id, tc.expiry)
		for id, v := range want {
			if got[id] != v {
				t.Errorf("property %d: got %q, want %q", id, got[id], v)
			}
		}
		for id, v := range got { // what else is there must be what it is by default, or what was asked for
			if want[id] == "" && !(id == tc.prop && v == tc.value) && !(id >= 37 && v == "1") {
				t.Errorf("client %q, expiry %d: property %d is %s", tc.id, tc.expiry, id, v)
			}
		}
		if tc.prop != 0 && got[tc.prop] != tc.value {
			t.Errorf("client %q, expiry %d: property %d is %q, want %q", tc.id, tc.expiry, tc.prop, got[tc.prop], tc.value)
		}
	}
}

// 3.26 The Receive Maximum that was announced is kept to.
func TestReceiveMaximumIsEnforced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = 5 })
		sub := p.connect(connectOptions{id: "sub", version: 4})
		sub.subscribe(1, "a")
		sub.disconnect()
		synctest.Wait()
		defer p.holdCommits()()
		pub := p.connect(connectOptions{id: "pub", version: 5, clean: true})
		for i := range uint16(5) {
			pub.send(pub.publishPacket("a", "x", 1, 0, 1+i))
		}
		pub.ping()
		pub.send(pub.publishPacket("a", "x", 1, 0, 6))
		if got := pub.expectEnd(); got != reasonReceiveMaximum {
			t.Errorf("got reason %#x, want %#x", got, reasonReceiveMaximum)
		}
	})
}

// 3.27 MQTT 5 clients are not told why they are disconnected, those of 3.x get
// packets and codes of MQTT 5. See also TestConnectRefusals, TestTakeoverReason.
func TestReasonsByVersion(t *testing.T) {
	s := start(t, t.TempDir())
	for _, tc := range []struct {
		name string
		in   []byte
		want byte
	}{
		{"packet type 0", []byte{0, 0}, reasonProtocolError},
		{"CONNACK", []byte{typeConnack << 4, 2, 0, 0}, reasonProtocolError},
		{"PINGRESP", []byte{typePingresp << 4, 0}, reasonProtocolError},
		{"AUTH", []byte{typeAuth << 4, 0}, reasonProtocolError},
		{"PINGREQ with flags", []byte{typePingreq<<4 | 1, 0}, reasonMalformed},
		{"PINGREQ with a body", []byte{typePingreq << 4, 1, 0}, reasonMalformed},
		{"QoS 3", []byte{typePublish<<4 | 6, 0}, reasonMalformed},
		{"PUBREL flags", []byte{typePubrel << 4, 2, 0, 1}, reasonMalformed},
		{"SUBSCRIBE flags", []byte{typeSubscribe << 4, 2, 0, 1}, reasonMalformed},
		{"DISCONNECT flags", []byte{typeDisconnect<<4 | 1, 0}, reasonMalformed},
	} {
		for _, version := range []byte{3, 4, 5} {
			if version == 3 && strings.HasSuffix(tc.name, "flags") {
				continue // MQTT 3.1 does not use them
			}
			c, _ := s.connect(connectOptions{id: "c", version: version, clean: true})
			c.send(tc.in)
			first, body, err := c.tryRead()
			switch {
			case version < 5 && err == nil:
				t.Errorf("v%d, %s: got % x % x, want the end of the connection alone", version, tc.name, first, body)
			case version == 5 && (err != nil || first != typeDisconnect<<4 || body[0] != tc.want):
				t.Errorf("v%d, %s: got % x % x, %v, want a DISCONNECT with %#x", version, tc.name, first, body, err, tc.want)
			}
			c.c.Close()
		}
	}
}

// 3.28 Shared subscriptions pick members at random, also such as are away, and
// two groups and a plain subscription give one copy: see
// TestSharedSubscriptions, and here all of one session.
func TestSharedAndPlainOfOneSession(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
	c.subscribe(1, "$share/g/a", "$share/h/a", "a")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.publish("a", "x", 1, false)
	equal(t, "two groups and a plain subscription", c.got(), []string{"a=x", "a=x", "a=x"})
}

// 3.29 The client identifier "inline" is mochi's own.
func TestClientCalledInline(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "inline", clean: true})
	c.subscribe(1, "a")
	c.publish("a", "x", 1, false)
	c.takeAll("x%.0d", 0, 1)
	c2, _ := s.connect(connectOptions{id: "inline", clean: true})
	c.expectEnd()
	c2.ping()
}

// 3.30 Retained messages come and go while others subscribe: for the race
// detector.
func TestRetainedWhileSubscribing(t *testing.T) {
	s := start(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 3 {
		pub, _ := s.connect(connectOptions{id: fmt.Sprint("pub", i), clean: true})
		sub, _ := s.connect(connectOptions{id: fmt.Sprint("sub", i), clean: true})
		wg.Go(func() {
			for j := range 300 {
				pub.publish(fmt.Sprint("r/", j%10), strings.Repeat("x", j%2), 1, true)
			}
		})
		wg.Go(func() {
			for range 100 {
				sub.subscribe(1, "r/#")
				sub.got()
			}
		})
	}
	wg.Wait()
	eventually(t, "the store has what the plane has", func() bool { n, any := s.b.journal.Pending(); return n == 0 && !any })
	before := s.b.Stats().Retained
	if got := s.crash().b.Stats().Retained; got != before {
		t.Errorf("%d retained messages after a crash, want %d", got, before)
	}
}

// 3.31 A stop hangs behind a client that takes nothing, and leaves connections
// open that were just accepted.
func TestStopWithStalledClients(t *testing.T) {
	s := start(t, t.TempDir())
	big := strings.Repeat("x", 50000)
	for i := range 3 {
		c, _ := s.connect(connectOptions{id: fmt.Sprint("sub", i), version: 5, clean: true, receiveMax: 65535})
		c.subscribe(byte(i%2), "a")
	}
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pub.flood(fixed("a"), big+"%d", 300, 0)
	var idle []*client
	for range 5 {
		idle = append(idle, s.dial())
	}
	begin := time.Now()
	s.stop()
	if d := time.Since(begin); d > stopTimeout {
		t.Errorf("the stop took %v", d)
	}
	for _, c := range idle {
		c.expectEnd()
	}
	if _, err := net.Dial("tcp", s.addr); err == nil {
		t.Error("the listener is still open")
	}
}

// mochi's configuration package pulls four databases in.
func TestImportsOfMochi(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			path := strings.Trim(i.Path.Value, `"`)
			rest, ok := strings.CutPrefix(path, "github.com/mochi-mqtt/server/v2")
			if ok && rest != "" && rest != "/packets" {
				t.Errorf("%s imports %s: of mochi only the server and its packets are used", file, path)
			}
		}
	}
}

// Of the topics below "$", clients publish only what a bridge says of itself.
func TestBridgeState(t *testing.T) {
	rights := newACL(nil)
	for topic, want := range map[string]bool{
		"$SYS/broker/connection/plant/state":      true,
		"$SYS/broker/connection/host.plant/state": true,
		"$SYS/broker/connection//state":           false,
		"$SYS/broker/connection/state":            false,
		"$SYS/broker/connection/a/b/state":        false,
		"$SYS/broker/connection/plant/state/x":    false,
		"$SYS/broker/connection/plant":            false,
		"$SYS/broker/version":                     false,
		"$SYS":                                    false,
		"$other/connection/plant/state":           false,
		"plant/state":                             true,
	} {
		if got := rights.allows(principal{}, actionPublish, topic); got != want {
			t.Errorf("%s: got %v, want %v", topic, got, want)
		}
	}
	denied := newACL([]storage.ACLRule{{Action: "publish", Filter: "$SYS/#"}})
	if denied.allows(principal{}, actionPublish, "$SYS/broker/connection/plant/state") {
		t.Error("a rule that denies it is passed over")
	}
}

// A level that does not exist is named, for the log.
func TestConnectNamesTheLevel(t *testing.T) {
	for want, body := range map[string][]byte{
		"protocol name MQTT with level 132, which is neither 4 nor 5": append(str("MQTT"), 132, 2, 0, 0, 0, 0),
		"protocol name MQIsdp with level 4, which is not 3":           append(str("MQIsdp"), 4, 2, 0, 0, 0, 0),
	} {
		if _, err := parseConnect(body); reasonOf(err) != reasonUnsupportedVersion || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
