package conformance

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

// TestQoS5 publishes and subscribes with each pair of QoS.
func TestQoS5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-2.2.1-2", "MQTT-2.2.1-4", "MQTT-2.2.1-5", "MQTT-2.2.1-6", "MQTT-3.3.1-2", "MQTT-3.3.1-3", "MQTT-3.3.2-3", "MQTT-3.3.4-1", "MQTT-3.8.4-1", "MQTT-3.8.4-2",
		"MQTT-3.8.4-7", "MQTT-3.8.4-8", "MQTT-4.3.1-1", "MQTT-4.3.2-1", "MQTT-4.3.2-2", "MQTT-4.3.2-4", "MQTT-4.3.3-1", "MQTT-4.3.3-2", "MQTT-4.3.3-4", "MQTT-4.3.3-8",
		"MQTT-4.3.3-11", "MQTT-4.2.0-1", "MQTT-3.4.2-1", "MQTT-3.5.2-1", "MQTT-3.6.2-1", "MQTT-3.7.2-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	for sq := range byte(3) {
		sub, _ := s.connect(t, connectFields{version: 5, clean: true})
		if codes := sub.subscribe(sq, "t/+"); codes[0] != sq {
			t.Fatalf("QoS %d: granted %#x", sq, codes[0])
		}
		for pq := range byte(3) {
			for _, dup := range []bool{false, true} { // of the publisher: its own affair
				if dup && pq == 0 {
					continue
				}
				if reason := pub.publish(message{topic: "t/x", payload: "payload", qos: pq, dup: dup}); reason != 0 {
					t.Errorf("QoS %d: acknowledged with %#x", pq, reason)
				}
				m := sub.take()
				if m.qos != min(sq, pq) || m.dup || m.retain || m.topic != "t/x" || m.payload != "payload" || (m.qos > 0) != (m.id > 0) || len(m.props) > 0 {
					t.Errorf("sent with QoS %d to a subscription of QoS %d: got %+v", pq, sq, m)
				}
			}
		}
		sub.disconnect()
	}
	for qos := byte(1); qos <= 2; qos++ {
		for _, id := range []int{1, 2, 255, 256, 65535} {
			pub.publish(message{topic: "t/x", qos: qos, id: id})
		}
	}
}

// TestPassedOn5 wants everything in a PUBLISH to arrive as it was sent.
func TestPassedOn5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-4", "MQTT-3.3.2-15", "MQTT-3.3.2-16", "MQTT-3.3.2-17", "MQTT-3.3.2-18", "MQTT-3.3.2-20", "MQTT-1.5.4-3", "MQTT-4.7.3-3", "MQTT-4.7.3-4")
	s := start(t, func(c *broker.Config) { c.MaxTopicBytes, c.MaxTopicLevels = 65535, 65535 })
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	c.subscribe(2, "#")
	var users [][]byte
	var wantUsers []property
	for i := range 300 {
		name, value := fmt.Sprint("n", i%7), strings.Repeat("v", i)
		users, wantUsers = append(users, propUser(name, value)), append(wantUsers, property{id: 38, text: name, value: value})
	}
	tests := []struct {
		name string
		raw  [][]byte
		want []property
	}{
		{"nothing", nil, nil},
		{"payload format 0", [][]byte{propByte(1, 0)}, []property{{id: 1}}},
		{"payload format 1", [][]byte{propByte(1, 1)}, []property{{id: 1, num: 1}}},
		{"content type", [][]byte{propStr(3, "application/json; ü")}, []property{{id: 3, text: "application/json; ü"}}},
		{"empty content type", [][]byte{propStr(3, "")}, []property{{id: 3}}},
		{"content type of 65535 bytes", [][]byte{propStr(3, strings.Repeat("c", 65535))}, []property{{id: 3, text: strings.Repeat("c", 65535)}}},
		{"response topic", [][]byte{propStr(8, "reply/\uFEFFto")}, []property{{id: 8, text: "reply/\uFEFFto"}}},
		{"correlation data", [][]byte{propStr(9, "\x00\xFF\x80")}, []property{{id: 9, text: "\x00\xFF\x80"}}},
		{"empty correlation data", [][]byte{propStr(9, "")}, []property{{id: 9}}},
		{"user properties, ordered and repeated", users, wantUsers},
		{"empty user property", [][]byte{propUser("", "")}, []property{{id: 38}}},
		{"all", [][]byte{propUser("a", "1"), propStr(9, "corr"), propStr(8, "r"), propUser("a", "1"), propStr(3, "ct"), propByte(1, 1), propUser("b", "0")},
			[]property{{id: 1, num: 1}, {id: 3, text: "ct"}, {id: 8, text: "r"}, {id: 9, text: "corr"}, {id: 38, text: "a", value: "1"}, {id: 38, text: "a", value: "1"}, {id: 38, text: "b", value: "0"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for qos := range byte(3) {
				for _, retain := range []bool{false, true} {
					c.publish(message{topic: "t", payload: "payload", qos: qos, raw: tt.raw, retain: retain})
					m := c.take()
					slices.SortStableFunc(m.props, func(a, b property) int { return int(a.id) - int(b.id) }) // the order of others is free
					if !slices.Equal(m.props, tt.want) || m.payload != "payload" {
						t.Errorf("QoS %d: got payload %q, properties %.300v, want %.300v", qos, m.payload, m.props, tt.want)
					}
				}
			}
		})
	}
	for _, payload := range []string{"", "\x00", "\xFF\xFE", strings.Repeat("large", 100000)} {
		c.publish(message{topic: "t", payload: payload, qos: 1})
		c.takePayloads(payload)
	}
	for _, topic := range []string{"/", "//", "a", "A", "a/", "/a", " ", "a b", "\uFEFF", "ü/\U0001F980", "\u0001", "\uFFFF", strings.Repeat("t", 65535), strings.Repeat("/", 65534)} {
		c.publish(message{topic: topic, qos: 1})
		if m := c.take(); m.topic != topic {
			t.Errorf("got topic %.30q, want %.30q", m.topic, topic)
		}
	}
}

// TestTopicAlias5 uses topic aliases towards the broker.
func TestTopicAlias5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-7", "MQTT-3.3.2-8", "MQTT-3.3.2-9", "MQTT-3.3.2-12", "MQTT-3.2.2-17")
	s := start(t)
	sub, _ := s.connect(t, connectFields{version: 5, clean: true})
	sub.subscribe(1, "#")
	f := connectFields{version: 5, id: "alias", props: [][]byte{propU32(17, 600)}}
	c, a := s.connect(t, f)
	most, _ := find(t, a.props, 34)
	if most.num == 0 {
		t.Fatal("no Topic Alias Maximum was announced")
	}
	send := func(topic string, alias int, want string) {
		t.Helper()
		for qos := range byte(3) {
			c.publish(message{topic: topic, qos: qos, raw: [][]byte{propU16(35, alias)}})
			m := sub.take()
			if _, ok := find(t, m.props, 35); ok || m.topic != want {
				t.Fatalf("alias %d: got topic %q (an alias: %v), want %q", alias, m.topic, ok, want)
			}
		}
	}
	for alias := 1; alias <= most.num; alias++ {
		send(fmt.Sprint("topic/", alias), alias, fmt.Sprint("topic/", alias))
	}
	for alias := most.num; alias >= 1; alias-- {
		send("", alias, fmt.Sprint("topic/", alias))
	}
	send("other", 1, "other") // a new meaning
	send("", 1, "other")
	c.publish(message{topic: "topic/1", qos: 1})
	sub.take()
	send("", 1, "other")
	// What is kept has its topic, not the alias it came with.
	keep := connectFields{version: 5, id: "away", props: f.props}
	away, _ := s.connect(t, keep)
	away.subscribe(1, "kept")
	away.disconnect()
	c.publish(message{topic: "kept", payload: "1", qos: 1, raw: [][]byte{propU16(35, 2)}})
	c.publish(message{payload: "2", qos: 1, retain: true, raw: [][]byte{propU16(35, 2)}})
	away, _ = s.connect(t, keep)
	for _, want := range []string{"1", "2"} {
		if m := away.take(); m.topic != "kept" || m.payload != want || len(m.props) > 0 {
			t.Errorf("got %+v, want %s on kept", m, want)
		}
	}
	away.subscribe(1, "ke+", "kept")
	if m := away.take(); m.topic != "kept" || !m.retain {
		t.Errorf("got %+v, want the retained message", m)
	}
	c.disconnect()
	c, _ = s.connect(t, f) // aliases end with the connection, though the session goes on
	c.send(c.publishFrame(message{qos: 1, id: 1, raw: [][]byte{propU16(35, 1)}}))
	c.expectDisconnect(0x82)

	c, _ = s.connect(t, f) // an alias given to a topic that is refused is not known
	c.send(c.publishFrame(message{topic: "a", qos: 0, raw: [][]byte{propU16(35, most.num+1)}}))
	c.expectDisconnect(0x94)
}

// TestTopicAliasOut5 announces a Topic Alias Maximum, and wants topics to come
// out right, whether or not the broker uses it.
func TestTopicAliasOut5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-26", "MQTT-3.1.2-27", "MQTT-3.3.2-7", "MQTT-3.3.2-8", "MQTT-3.3.2-11")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	for _, most := range []int{0, 1, 5, 65535} {
		f := connectFields{version: 5, id: fmt.Sprint(most), props: [][]byte{propU32(17, 600), propU16(34, most)}}
		if most == 0 {
			f.props = f.props[:1]
		}
		for connection := range 2 {
			c, _ := s.connect(t, f)
			c.subscribe(2, "t/#")
			known := map[int]string{}
			used := 0
			for i := range 36 {
				topic := fmt.Sprint("t/opic/", i%6)
				pub.publish(message{topic: topic, payload: topic, qos: byte(i % 3)})
				m := c.take()
				if a, ok := find(t, m.props, 35); ok {
					if a.num < 1 || a.num > most {
						t.Fatalf("got alias %d, want at most %d", a.num, most)
					}
					if m.topic != "" {
						known[a.num] = m.topic
					} else {
						used++
					}
					m.topic = known[a.num]
				}
				if m.topic != topic || m.payload != topic {
					t.Fatalf("maximum %d, connection %d: got topic %q, want %q", most, connection, m.topic, topic)
				}
			}
			if most > 0 && used == 0 {
				t.Errorf("maximum %d: no alias was used in 36 messages of 6 topics", most)
			}
			c.disconnect()
		}
	}
}

// TestTopicAliasOutCorners5 has messages that are not sent, or sent again,
// where an alias could go wrong.
func TestTopicAliasOutCorners5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-7", "MQTT-3.1.2-24", "MQTT-3.1.2-25", "MQTT-4.4.0-1")
	const size = 100
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	f := connectFields{version: 5, id: "corners", props: [][]byte{propU32(17, 600), propU16(34, 2), propU32(39, size)}}
	c, _ := s.connect(t, f)
	c.subscribe(2, "#")
	known := map[int]string{}
	// next returns the next message, unacknowledged, with its topic found out.
	next := func() message {
		t.Helper()
		p := c.expect(kindPublish)
		if n := len(frame(p.first, p.body)); n > size {
			t.Fatalf("got a PUBLISH of %d bytes, want at most %d", n, size)
		}
		m := c.parse(p)
		if a, ok := find(t, m.props, 35); ok {
			if m.topic != "" {
				known[a.num] = m.topic
			}
			m.topic = known[a.num]
		}
		return m
	}
	want := func(topic, payload string) message {
		t.Helper()
		m := next()
		if m.topic != topic || m.payload != payload {
			t.Fatalf("got %+v, want %q on %q", m, payload, topic)
		}
		return m
	}
	const topic = "a/topic/of/some/length"
	empty := len(pub.publishFrame(message{topic: topic, qos: 1, id: 1}))
	for range 3 {
		pub.publish(message{topic: topic, payload: strings.Repeat("x", size), qos: 1}) // too large, with an alias or without
		pub.publish(message{topic: topic, payload: "small", qos: 1})
		c.send(ackFrame(kindPuback, want(topic, "small").id))
		for _, other := range []string{"b", "c", "d"} { // more topics than aliases
			pub.publish(message{topic: other, payload: other, qos: 1})
			c.send(ackFrame(kindPuback, want(other, other).id))
		}
	}
	for i := range 5 { // it fits, and would not with an alias beside the topic
		full := strings.Repeat("y", size-empty)
		fresh := fmt.Sprint(topic[:len(topic)-1], i)
		pub.publish(message{topic: fresh, payload: full, qos: 1})
		c.send(ackFrame(kindPuback, want(fresh, full).id))
	}
	for range 3 { // sent again on a connection that knows no alias
		pub.publish(message{topic: topic, payload: "again", qos: 1})
		pub.publish(message{topic: topic, payload: "and again", qos: 2})
		want(topic, "again")
		want(topic, "and again")
		c.drop()
		c, _ = s.connect(t, f)
		clear(known)
		c.send(ackFrame(kindPuback, want(topic, "again").id))
		m := want(topic, "and again")
		c.send(ackFrame(kindPubrec, m.id))
		c.ack(kindPubrel, m.id)
		c.send(ackFrame(kindPubcomp, m.id))
	}
}

// TestMessageExpiryZero5 sends messages that expire at once: they may come at
// once, with an interval of 0, and not later.
func TestMessageExpiryZero5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-5", "MQTT-3.3.2-6")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	raw := [][]byte{propU32(2, 0)}
	c, _ := s.connect(t, connectFields{version: 5, id: "zero", props: [][]byte{propU32(17, 600)}})
	c.subscribe(2, "z/#", "end")
	check := func(what string) {
		t.Helper()
		pub.publish(message{topic: "end", qos: 1})
		for m := c.take(); m.topic != "end"; m = c.take() {
			if p, ok := find(t, m.props, 2); !ok || p.num != 0 {
				t.Errorf("%s: got it with an interval of %d (%v), want 0, or no message", what, p.num, ok)
			}
		}
	}
	for qos := range byte(3) {
		pub.publish(message{topic: "z/x", qos: qos, raw: raw})
	}
	check("connected")
	will, _ := s.connect(t, connectFields{version: 5, clean: true, will: &willFields{topic: "z/will", qos: 1, props: raw}})
	will.send(frame(kindDisconnect<<4, []byte{4}))
	will.expectClosed()
	check("will")
	pub.publish(message{topic: "z/retained", qos: 1, retain: true, raw: raw})
	check("retained")
	c.disconnect()
	pub.publish(message{topic: "z/away", qos: 1, raw: raw})
	fresh, _ := s.connect(t, connectFields{version: 5, clean: true})
	c, _ = s.connect(t, connectFields{version: 5, id: "zero", props: [][]byte{propU32(17, 600)}})
	pub.publish(message{topic: "end", qos: 1})
	if m := c.take(); m.topic != "end" {
		t.Errorf("got %+v, which had expired", m)
	}
	fresh.subscribe(1, "z/#")
	fresh.ping()
	if len(fresh.stash) > 0 {
		t.Errorf("got %v, which had expired", fresh.stash)
	}
}

// TestRetain5 checks the RETAIN flag, Retain Handling and Retain As Published.
func TestRetain5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.1-5", "MQTT-3.3.1-6", "MQTT-3.3.1-7", "MQTT-3.3.1-8", "MQTT-3.3.1-9", "MQTT-3.3.1-10", "MQTT-3.3.1-11", "MQTT-3.3.1-12", "MQTT-3.3.1-13",
		"MQTT-3.8.4-3")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	// got returns what a new client is sent of the topic t.
	got := func(options byte, filters ...string) []string {
		t.Helper()
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.subscribe(options, append(filters, "end")...)
		c.publish(message{topic: "end", payload: "end", qos: 1})
		var all []string
		for {
			m := c.take()
			if m.topic == "end" {
				c.disconnect()
				return all
			}
			if !m.retain || m.dup {
				t.Errorf("retained message came as %+v", m)
			}
			all = append(all, m.payload)
		}
	}
	check := func(what string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
	}
	for qos := range byte(3) {
		pub.publish(message{topic: "t", payload: "one", qos: qos, retain: true})
		check("retained", got(2, "t"), "one")
		pub.publish(message{topic: "t", payload: "not retained", qos: qos})
		check("message without RETAIN", got(2, "t"), "one")
		pub.publish(message{topic: "t", payload: "two", qos: qos, retain: true})
		check("replaced", got(2, "t"), "two")
		pub.publish(message{topic: "t", payload: "", qos: qos})
		check("empty message without RETAIN", got(2, "t"), "two")
		live, _ := s.connect(t, connectFields{version: 5, clean: true})
		live.subscribe(2|0x20, "t")
		pub.publish(message{topic: "t", payload: "", qos: qos, retain: true})
		if m := live.take(); m.payload != "" || m.retain {
			t.Errorf("removal: got %+v, want an empty message", m)
		}
		check("removed", got(2, "t"))
		pub.publish(message{topic: "t", payload: "", qos: qos, retain: true})
		check("removed twice", got(2, "t"))
		live.disconnect()
	}
	pub.publish(message{topic: "t", payload: "kept", qos: 2, retain: true})
	for options, n := range map[byte]int{0x00: 1, 0x10: 1, 0x20: 0} {
		if all := got(options, "t"); len(all) != n {
			t.Errorf("options %#x, new subscription: got %q, want %d messages", options, all, n)
		}
	}
	for options, n := range map[byte]int{0x00: 1, 0x10: 0, 0x20: 0} {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.subscribe(1|0x20, "t")
		c.subscribe(1|options, "t")
		c.publish(message{topic: "t", payload: "live", qos: 1})
		for range n {
			c.takePayloads("kept")
		}
		c.takePayloads("live")
		c.unsubscribe("t")
		c.subscribe(1|options, "t") // anew
		if options != 0x20 {
			c.takePayloads("kept")
		}
		c.ping()
		if len(c.stash) > 0 {
			t.Errorf("options %#x: got %v besides", options, c.stash)
		}
		c.disconnect()
	}
	t.Run("QoS", func(t *testing.T) {
		for pq := range byte(3) {
			pub.publish(message{topic: "q", payload: "x", qos: pq, retain: true})
			for sq := range byte(3) {
				c, _ := s.connect(t, connectFields{version: 5, clean: true})
				c.subscribe(sq, "q")
				if m := c.take(); m.qos != min(pq, sq) || !m.retain {
					t.Errorf("retained with QoS %d, subscribed with %d: got %+v", pq, sq, m)
				}
				c.disconnect()
			}
		}
	})
	t.Run("retain as published", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.subscribe(1, "as/0")
		c.subscribe(1|8, "as/1")
		for _, retain := range []bool{false, true} {
			for i := range 2 {
				pub.publish(message{topic: fmt.Sprint("as/", i), payload: "x", qos: 1, retain: retain})
				if m := c.take(); m.retain != (retain && i == 1) {
					t.Errorf("sent with RETAIN %v, retain as published %d: got RETAIN %v", retain, i, m.retain)
				}
			}
		}
		check("RETAIN for subscriptions made", got(0, "as/0"), "x")
		check("RETAIN for subscriptions made", got(8, "as/1"), "x")
	})
	t.Run("each filter", func(t *testing.T) {
		for i := range 5 {
			pub.publish(message{topic: fmt.Sprint("many/", i), payload: fmt.Sprint(i), qos: 1, retain: true})
		}
		all := got(1, "many/+")
		slices.Sort(all)
		check("wildcard", all, "0", "1", "2", "3", "4")
		pub.publish(message{topic: "$sys/x", payload: "x", retain: true, qos: 1})
		if all := got(1, "$share/g/many/+"); len(all) > 0 {
			t.Errorf("shared subscription: got retained messages %q", all) // 4.8.2: none are sent
		}
	})
}

// TestMessageExpiry5 lets messages expire.
func TestMessageExpiry5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-5", "MQTT-3.3.2-6", "MQTT-4.3.3-7", "MQTT-4.3.3-13")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	keep := [][]byte{propU32(17, 600), propU16(33, 1)}
	away, _ := s.connect(t, connectFields{version: 5, id: "away", props: keep})
	away.subscribe(2, "t")
	away.disconnect()
	stuck, _ := s.connect(t, connectFields{version: 5, id: "stuck", props: keep})
	stuck.subscribe(2, "t")
	expires := func(seconds int) [][]byte { return [][]byte{propU32(2, seconds)} }
	for qos := byte(1); qos <= 2; qos++ {
		pub.publish(message{topic: "t", payload: "expires", qos: qos, raw: expires(1)})
	}
	pub.publish(message{topic: "t", payload: "stays", qos: 1, raw: expires(1000)})
	pub.publish(message{topic: "t", payload: "for ever", qos: 1})
	pub.publish(message{topic: "retained/2", payload: "stays", qos: 1, retain: true, raw: expires(1000)})
	pub.publish(message{topic: "retained", payload: "expires", qos: 1, retain: true, raw: expires(1)})
	sent := stuck.receive() // its delivery has begun: it does not expire
	if p, ok := find(t, sent.props, 2); !ok || p.num != 1 || sent.payload != "expires" {
		t.Errorf("got %+v, want a Message Expiry Interval of 1", sent)
	}
	left := func(m message) int {
		t.Helper()
		p, ok := find(t, m.props, 2)
		if !ok {
			t.Fatalf("%q has no Message Expiry Interval", m.payload)
		}
		return p.num
	}
	eventually(t, "retained message expires", func() bool {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		defer c.drop()
		c.subscribe(1, "retained/#")
		m := c.take()
		if m.payload == "expires" {
			m = c.take()
		} else if n := left(m); n >= 1000 || n < 900 {
			t.Errorf("got a Message Expiry Interval of %d of a message that waited a second", n)
		} else {
			return true
		}
		return false
	})
	away, _ = s.connect(t, connectFields{version: 5, id: "away", props: keep})
	m := away.take()
	if n := left(m); m.payload != "stays" || n >= 1000 || n < 900 {
		t.Errorf("got %q with a Message Expiry Interval of %d, want stays with less than 1000", m.payload, n)
	}
	if m = away.take(); m.payload != "for ever" || len(m.props) > 0 {
		t.Errorf("got %+v, want a message without an expiry", m)
	}
	stuck.send(ackFrame(kindPuback, sent.id))
	stuck.takePayloads("stays", "for ever")

	// What was sent before it expired is completed, and sent again.
	stuck.subscribe(2, "again")
	pub.publish(message{topic: "again", payload: "begun", qos: 2, raw: expires(3)})
	first := stuck.receive()
	pub.send(pub.publishFrame(message{topic: "again", payload: "in", qos: 2, id: 999, raw: expires(3)}))
	pub.ack(kindPubrec, 999)
	pub.publish(message{topic: "clock", payload: "x", qos: 1, retain: true, raw: expires(3)})
	eventually(t, "as long as it may wait passes", func() bool {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		defer c.drop()
		c.subscribe(1, "clock")
		c.ping()
		return len(c.stash) == 0
	})
	pub.send(pubrelFrame(999)) // that exchange is completed as well
	if got := pub.ack(kindPubcomp, 999); got != 0 {
		t.Errorf("PUBCOMP: got reason %#x", got)
	}
	stuck.drop()
	stuck, _ = s.connect(t, connectFields{version: 5, id: "stuck", props: keep})
	if m := stuck.take(); m.id != first.id || !m.dup || m.payload != "begun" {
		t.Errorf("got %+v, want the message that was sent before it expired, again", m)
	}
}

// TestAcknowledgementReasons5 wants the exact reason code of each
// acknowledgement.
func TestAcknowledgementReasons5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.4.2-1", "MQTT-3.5.2-1", "MQTT-3.6.2-1", "MQTT-3.7.2-1", "MQTT-3.9.3-1", "MQTT-3.9.3-2", "MQTT-3.11.3-1", "MQTT-3.11.3-2",
		"MQTT-4.3.3-9", "MQTT-4.3.3-12", "MQTT-4.3.2-5", "MQTT-3.8.4-6", "MQTT-3.8.4-7", "MQTT-3.10.4-5")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		return db.ReplaceACLRules(context.Background(), []storage.ACLRule{{Action: "any", Filter: "no/#"}})
	})
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	sub, _ := s.connect(t, connectFields{version: 5, clean: true})
	sub.subscribe(2, "yes")
	for qos := byte(1); qos <= 2; qos++ {
		for topic, want := range map[string]byte{"yes": 0, "nobody": 0x10, "no/x": 0x87} {
			if got := c.publish(message{topic: topic, qos: qos, id: 9}); got != want { // always the same identifier
				t.Errorf("QoS %d, topic %s: got reason %#x, want %#x", qos, topic, got, want)
			}
		}
		sub.take()
	}
	// A PUBREC that refuses frees the identifier.
	c.send(c.publishFrame(message{topic: "no/x", qos: 2, id: 20}))
	if got := c.ack(kindPubrec, 20); got != 0x87 {
		t.Errorf("PUBREC: got reason %#x, want 0x87", got)
	}
	c.publish(message{topic: "yes", payload: "new", qos: 2, id: 20})
	sub.takePayloads("new")
	c.publish(message{topic: "yes", payload: "newer", qos: 1, id: 20, dup: true}) // DUP or not
	c.publish(message{topic: "yes", payload: "newest", qos: 1, id: 20, dup: true})
	sub.takePayloads("newer", "newest")

	c.send(pubrelFrame(30))
	if got := c.ack(kindPubcomp, 30); got != 0x92 {
		t.Errorf("PUBREL of no message: got reason %#x, want 0x92", got)
	}
	c.send(ackFrame(kindPubrec, 30))
	if got := c.ack(kindPubrel, 30); got != 0x92 {
		t.Errorf("PUBREC of no message: got reason %#x, want 0x92", got)
	}
	c.send(ackFrame(kindPuback, 30), ackFrame(kindPubcomp, 30))
	c.ping()

	c.send(frame(kindSubscribe<<4|2, u16(40), props(), str("a"), []byte{0}, str("no/x"), []byte{1}, str("b"), []byte{2}, str("a/#/b"), []byte{1},
		str("$share/g"), []byte{0}, str("$share//x"), []byte{0}, str("$share/+/x"), []byte{0}, str(""), []byte{0}, str("c+"), []byte{0}, str("d#"), []byte{0},
		str("$share/g/"), []byte{0}, str("$share/a#/x"), []byte{0}, str("$share/a/#/x"), []byte{0}, str("$share"), []byte{0}, str("$SHARE/g"), []byte{0}, str("e"), []byte{1}))
	want := []byte{0, 0x87, 2, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0x8F, 0, 0, 1}
	if got := c.suback(40, len(want)); !bytes.Equal(got, want) {
		t.Errorf("SUBACK: got % x, want % x", got, want)
	}
	if got, want := c.unsubscribe("b", "none", "a", "no/x", "e", "e"), []byte{0, 0x11, 0, 0x11, 0, 0x11}; !bytes.Equal(got, want) {
		t.Errorf("UNSUBACK: got % x, want % x", got, want)
	}
}
