package conformance

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

// TestTopicFilters5 matches filters with topics.
func TestTopicFilters5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.7.1-1", "MQTT-4.7.1-2", "MQTT-4.7.2-1", "MQTT-4.7.3-4", "MQTT-3.3.2-3", "MQTT-3.8.4-5", "MQTT-3.10.4-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	topics := []string{"a", "b", "a/b", "a/b/c", "a/", "/", "//", "/a", "A", "a/B", "a//b", "aa", "a b", "$x", "$x/a", "a/$x", "sport", "sport/x", "ü"}
	for _, tt := range []struct {
		filter string
		want   []string
	}{
		{"#", []string{"a", "b", "a/b", "a/b/c", "a/", "/", "//", "/a", "A", "a/B", "a//b", "aa", "a b", "a/$x", "sport", "sport/x", "ü"}},
		{"+", []string{"a", "b", "A", "aa", "a b", "sport", "ü"}},
		{"+/+", []string{"a/b", "a/", "/", "/a", "a/B", "a/$x", "sport/x"}},
		{"/+", []string{"/", "/a"}},
		{"+/", []string{"a/", "/"}},
		{"a/#", []string{"a", "a/b", "a/b/c", "a/", "a/B", "a//b", "a/$x"}},
		{"a/+", []string{"a/b", "a/", "a/B", "a/$x"}},
		{"a/+/#", []string{"a/b", "a/b/c", "a/", "a/B", "a//b", "a/$x"}},
		{"a/+/c", []string{"a/b/c"}},
		{"+/b/#", []string{"a/b", "a/b/c"}},
		{"/#", []string{"/", "//", "/a"}},
		{"//", []string{"//"}},
		{"a", []string{"a"}},
		{"a//b", []string{"a//b"}},
		{"a b", []string{"a b"}},
		{"sport/#", []string{"sport", "sport/x"}},
		{"ü", []string{"ü"}},
		{"U\u0308", nil}, // the same letter to the eye
		{"$x", nil},      // clients cannot publish there
	} {
		t.Run(tt.filter, func(t *testing.T) {
			c, _ := s.connect(t, connectFields{version: 5, clean: true})
			if codes := c.subscribe(0, tt.filter); codes[0] != 0 {
				t.Fatalf("got reason %#x", codes[0])
			}
			c.subscribe(0, "the/end/of/it")
			for _, topic := range topics {
				pub.publish(message{topic: topic, qos: 0})
			}
			pub.publish(message{topic: "the/end/of/it", qos: 0})
			var got []string
			for m := c.take(); m.topic != "the/end/of/it"; m = c.take() {
				got = append(got, m.topic)
			}
			if tt.filter == "#" || tt.filter == "+/+" {
				got = slices.DeleteFunc(got, func(s string) bool { return s == "the/end/of/it" })
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if codes := c.unsubscribe(tt.filter); codes[0] != 0 {
				t.Errorf("UNSUBACK: got reason %#x", codes[0])
			}
			c.disconnect()
		})
	}
	for _, filter := range []string{"a#", "#a", "a/#/", "a/#/b", "##", "a+", "+a", "a/+b", "++", "a/b#"} {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		if codes := c.subscribe(0, filter); codes[0] != 0x8F {
			t.Errorf("filter %q: got reason %#x, want 0x8F", filter, codes[0])
		}
		c.disconnect()
	}
}

// TestSubscribe5 checks how subscriptions of one client go together.
func TestSubscribe5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.4-2", "MQTT-3.3.4-3", "MQTT-3.3.4-4", "MQTT-3.3.4-5", "MQTT-3.8.3-3", "MQTT-3.8.4-1", "MQTT-3.8.4-3", "MQTT-3.8.4-5", "MQTT-3.8.4-6", "MQTT-3.9.3-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true, id: "pub"})
	// ids returns the Subscription Identifiers of a message.
	ids := func(m message) []int {
		var all []int
		for _, p := range m.props {
			if p.id == 11 {
				all = append(all, p.num)
			}
		}
		slices.Sort(all)
		return all
	}
	with := func(c *client, identifier int, options byte, filters ...string) {
		t.Helper()
		id := c.id()
		c.send(c.subscribeFrame(id, options, filters, propVar(11, identifier)))
		for i, code := range c.suback(id, len(filters)) {
			if code != options&3 {
				t.Errorf("%s: got reason %#x", filters[i], code)
			}
		}
	}
	t.Run("identifiers of each size", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		for _, identifier := range []int{1, 127, 128, 16383, 16384, 2097151, 2097152, 268435455} {
			with(c, identifier, 2, "size")
			for qos := range byte(3) {
				pub.publish(message{topic: "size", qos: qos})
				if got := ids(c.take()); !slices.Equal(got, []int{identifier}) {
					t.Errorf("got identifiers %v, want %d", got, identifier)
				}
			}
		}
		c.subscribe(1, "size") // replaces it, without one
		pub.publish(message{topic: "size"})
		if got := ids(c.take()); len(got) > 0 {
			t.Errorf("got identifiers %v, want none", got)
		}
	})
	t.Run("overlapping", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		with(c, 1, 0, "o/#")
		with(c, 2, 2, "o/x")
		with(c, 3, 1, "o/+")
		c.subscribe(0, "+/x") // has none
		with(c, 9, 2, "other")
		for qos := range byte(3) {
			// One copy with all identifiers, or one of each subscription.
			pub.publish(message{topic: "o/x", payload: "x", qos: qos})
			pub.publish(message{topic: "other"})
			var got []int
			highest, copies := byte(0), 0
			for m := c.take(); m.topic != "other"; m = c.take() {
				got, highest = append(got, ids(m)...), max(highest, m.qos)
				copies++
			}
			slices.Sort(got)
			if !slices.Equal(got, []int{1, 2, 3}) || highest != qos || copies != 1 && copies != 4 {
				t.Errorf("QoS %d: got %d copies with identifiers %v, the highest QoS %d", qos, copies, got, highest)
			}
		}
	})
	t.Run("retained", func(t *testing.T) {
		pub.publish(message{topic: "ret", payload: "x", qos: 1, retain: true})
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		with(c, 5, 1, "ret")
		if m := c.take(); !slices.Equal(ids(m), []int{5}) || !m.retain {
			t.Errorf("got %+v, want identifier 5", m)
		}
	})
	t.Run("no local", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "nl"})
		c.subscribe(1|4, "nl", "nl/both/+")
		c.subscribe(1, "nl/both/#", "end")
		for qos := range byte(3) {
			c.publish(message{topic: "nl", payload: "own", qos: qos})
			pub.publish(message{topic: "nl", payload: "other's", qos: qos})
			c.takePayloads("other's")
		}
		c.publish(message{topic: "nl/both/x", payload: "by the other filter", qos: 1})
		c.takePayloads("by the other filter")
		c.publish(message{topic: "end", payload: "end", qos: 1})
		c.takePayloads("end")
		pub.publish(message{topic: "nl", payload: "kept", qos: 1, retain: true})
		c.takePayloads("kept")
		c.publish(message{topic: "nl", payload: "", qos: 1, retain: true})
		c.ping()
		if len(c.stash) > 0 {
			t.Errorf("got %v, want nothing", c.stash)
		}
	})
	t.Run("many filters", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		parts, want := [][]byte{u16(1), props(propUser("a", "b"), propVar(11, 7))}, []byte{}
		for i := range 300 {
			parts, want = append(parts, str(fmt.Sprint("many/", i)), []byte{byte(i % 3)}), append(want, byte(i%3))
		}
		c.send(frame(kindSubscribe<<4|2, parts...))
		if got := c.suback(1, 300); !bytes.Equal(got, want) {
			t.Errorf("got reasons % x", got)
		}
		// The same filter twice in one SUBSCRIBE: as if there were two.
		c.send(frame(kindSubscribe<<4|2, u16(2), props(), str("same"), []byte{2}, str("same"), []byte{0}))
		if got := c.suback(2, 2); !bytes.Equal(got, []byte{2, 0}) {
			t.Errorf("got reasons % x, want 2 0", got)
		}
		pub.publish(message{topic: "same", qos: 2})
		if m := c.take(); m.qos != 0 {
			t.Errorf("got QoS %d, want that of the last", m.qos)
		}
	})
}

// TestReplace5 replaces a subscription again and again while messages come.
func TestReplace5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.8.4-3", "MQTT-3.8.4-4")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	pub.publish(message{topic: "ret", payload: "kept", qos: 1, retain: true})
	for range 3 {
		c.subscribe(1, "ret") // Retain Handling 0: each time
		c.takePayloads("kept")
	}
	c.subscribe(1|0x20, "t")
	const n = 300
	for i := range n {
		pub.send(pub.publishFrame(message{topic: "t", payload: fmt.Sprint(i), qos: 1, id: i + 1}))
		if i%3 == 0 {
			c.send(c.subscribeFrame(1000+i, byte(1|i%2<<3|0x20), []string{"t"}))
		}
	}
	for i := range n {
		for {
			p := c.read()
			if p.kind() == kindSuback {
				continue
			}
			m := c.parse(p)
			if m.payload != fmt.Sprint(i) {
				t.Fatalf("got %+v, want %d", m, i)
			}
			c.send(ackFrame(kindPuback, m.id))
			break
		}
	}
}

// TestQuota5 subscribes to more than is allowed.
func TestQuota5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.8.4-7", "MQTT-3.9.3-2")
	s := start(t, func(c *broker.Config) { c.MaxSubscriptions, c.MaxTopicBytes, c.MaxTopicLevels = 2, 20, 4 })
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	for _, tt := range []struct {
		filter string
		want   byte
	}{
		{"a", 1}, {"this/filter/is/far/too/long", 0x8F}, {"a/b/c/d/e", 0x8F}, {"b", 1}, {"c", 0x97}, {"b", 1}, {"$share/g/a", 0x97},
	} {
		if got := c.subscribe(1, tt.filter); got[0] != tt.want {
			t.Errorf("filter %q: got reason %#x, want %#x", tt.filter, got[0], tt.want)
		}
	}
	c.unsubscribe("a")
	if got := c.subscribe(1, "c"); got[0] != 1 {
		t.Errorf("got reason %#x after there was room", got[0])
	}
	c.send(c.publishFrame(message{topic: "this/topic/is/far/too/long", qos: 1, id: 1}))
	c.expectDisconnect(0x90)
}

// TestUnsubscribe5 ends subscriptions.
func TestUnsubscribe5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.10.4-1", "MQTT-3.10.4-2", "MQTT-3.10.4-3", "MQTT-3.10.4-4", "MQTT-3.10.4-5", "MQTT-3.10.4-6", "MQTT-3.11.3-1", "MQTT-3.11.3-2")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	c, _ := s.connect(t, connectFields{version: 5, id: "u", props: [][]byte{propU32(17, 600)}})
	c.subscribe(2, "a/+", "a/b", "end")
	pub.publish(message{topic: "a/x", payload: "begun 1", qos: 1})
	pub.publish(message{topic: "a/x", payload: "begun 2", qos: 2})
	one, two := c.receive(), c.receive()
	if got := c.unsubscribe("a/+", "A/b", "a/#", "+/b"); !bytes.Equal(got, []byte{0, 0x11, 0x11, 0x11}) {
		t.Errorf("got reasons % x, want 0 11 11 11", got)
	}
	pub.publish(message{topic: "a/x", payload: "no longer", qos: 1})
	pub.publish(message{topic: "a/b", payload: "by the other", qos: 1})
	pub.publish(message{topic: "end", payload: "end", qos: 1})
	c.send(ackFrame(kindPuback, one.id), ackFrame(kindPubrec, two.id)) // what was begun is completed
	c.ack(kindPubrel, two.id)
	c.send(ackFrame(kindPubcomp, two.id))
	c.takePayloads("by the other", "end")
	if got := c.unsubscribe("a/b"); !bytes.Equal(got, []byte{0}) {
		t.Errorf("got reasons % x, want 0", got)
	}
	if got := c.unsubscribe("a/b"); !bytes.Equal(got, []byte{0x11}) {
		t.Errorf("got reasons % x, want 11", got)
	}
	pub.publish(message{topic: "a/x", qos: 1})
	c.subscribe(2, "a/x")
	pub.publish(message{topic: "a/x", payload: "begun, not completed", qos: 2})
	m := c.receive()
	c.unsubscribe("a/x")
	c.drop()
	c, _ = s.connect(t, connectFields{version: 5, id: "u", props: [][]byte{propU32(17, 600)}})
	if again := c.take(); again.id != m.id || again.payload != m.payload || !again.dup {
		t.Errorf("got %+v, want %+v again", again, m)
	}
}

// TestShared5 checks shared subscriptions.
func TestShared5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.8.2-1", "MQTT-4.8.2-2", "MQTT-4.8.2-3", "MQTT-4.8.2-4", "MQTT-4.8.2-6", "MQTT-4.7.0-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	t.Run("each message to one", func(t *testing.T) {
		const filter = "$share/g/s/+"
		var members []*client
		counts := make([]int, 3)
		for range counts {
			c, _ := s.connect(t, connectFields{version: 5, clean: true})
			c.subscribe(1, filter, "done")
			members = append(members, c)
		}
		alone, _ := s.connect(t, connectFields{version: 5, clean: true})
		alone.subscribe(1, "s/+", "$share/other/s/+", "done") // twice, or once: not less
		const n = 60
		for i := range n {
			pub.publish(message{topic: "s/x", payload: fmt.Sprint(i), qos: byte(i % 2)})
		}
		pub.publish(message{topic: "done", payload: "done", qos: 1})
		seen := map[string]int{}
		for i, c := range members {
			for m := c.take(); m.topic != "done"; m = c.take() {
				seen[m.payload]++
				counts[i]++
			}
			if counts[i] == 0 {
				t.Errorf("member %d got nothing", i)
			}
		}
		if len(seen) != n {
			t.Errorf("the group got %d different messages, want %d", len(seen), n)
		}
		for payload, times := range seen {
			if times != 1 {
				t.Errorf("message %s came %d times", payload, times)
			}
		}
		got := 0
		for m := alone.take(); m.topic != "done"; m = alone.take() {
			got++
		}
		if got != n && got != 2*n {
			t.Errorf("the subscriber beside the group got %d messages", got)
		}
		for _, c := range members {
			if codes := c.unsubscribe(filter, "$share/h/s/+"); !bytes.Equal(codes, []byte{0, 0x11}) {
				t.Errorf("UNSUBACK: got % x", codes)
			}
		}
	})
	t.Run("each at its own QoS", func(t *testing.T) {
		var members []*client
		for qos := range byte(3) {
			c, _ := s.connect(t, connectFields{version: 5, clean: true})
			c.subscribe(qos, "$share/q/q", "done")
			members = append(members, c)
		}
		for range 30 {
			pub.publish(message{topic: "q", qos: 2})
		}
		pub.publish(message{topic: "done", qos: 0})
		for qos, c := range members {
			for m := c.take(); m.topic != "done"; m = c.take() {
				if m.qos != byte(qos) {
					t.Errorf("member with QoS %d got QoS %d", qos, m.qos)
				}
			}
		}
	})
	t.Run("options and identifiers", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.send(c.subscribeFrame(1, 1|8, []string{"$share/o/o"}, propVar(11, 42)))
		c.suback(1, 1)
		pub.publish(message{topic: "o", qos: 1, retain: true})
		m := c.take()
		if p, ok := find(t, m.props, 11); !ok || p.num != 42 || !m.retain {
			t.Errorf("got %+v, want identifier 42 and RETAIN", m)
		}
	})
	t.Run("refused by one is not for another", func(t *testing.T) {
		a, _ := s.connect(t, connectFields{version: 5, clean: true})
		b, _ := s.connect(t, connectFields{version: 5, clean: true})
		for _, c := range []*client{a, b} {
			c.subscribe(2, "$share/r/r", "done")
		}
		for i := range 4 {
			pub.publish(message{topic: "r", payload: fmt.Sprint(i), qos: byte(1 + i%2)})
		}
		pub.publish(message{topic: "done"})
		seen := 0
		for _, c := range []*client{a, b} {
			for m := c.receive(); m.topic != "done"; m = c.receive() {
				seen++
				c.send(frame([]byte{0, kindPuback << 4, kindPubrec << 4}[m.qos], u16(m.id), []byte{0x83}))
			}
			c.ping()
			c.disconnect()
		}
		if seen != 4 {
			t.Errorf("the group got %d messages, want 4", seen)
		}
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.subscribe(2, "$share/r/r")
		c.ping()
		if len(c.stash) > 0 {
			t.Errorf("got %v, which was refused before", c.stash)
		}
	})
	t.Run("QoS 2 that began is completed by the same client", func(t *testing.T) {
		f := connectFields{version: 5, id: "began", props: [][]byte{propU32(17, 600)}}
		a, _ := s.connect(t, f)
		a.subscribe(2, "$share/c/c")
		b, _ := s.connect(t, connectFields{version: 5, clean: true})
		pub.publish(message{topic: "c", payload: "one", qos: 2})
		m := a.receive()
		b.subscribe(2, "$share/c/c")
		a.drop()
		a, _ = s.connect(t, f)
		if again := a.take(); again.id != m.id || again.payload != "one" || !again.dup {
			t.Errorf("got %+v, want %+v again", again, m)
		}
		b.ping()
		if len(b.stash) > 0 {
			t.Errorf("another member got %v", b.stash)
		}
	})
}

// TestSharedSessionEnds5 ends the session of a member that has messages: what
// it did not finish goes to others, but for QoS 2 that began.
func TestSharedSessionEnds5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.8.2-5")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	f := connectFields{version: 5, id: "ends", props: [][]byte{propU32(17, 600), propU16(33, 2)}}
	a, _ := s.connect(t, f)
	a.subscribe(2, "$share/g/t")
	pub.publish(message{topic: "t", payload: "begun at QoS 2", qos: 2})
	pub.publish(message{topic: "t", payload: "begun at QoS 1", qos: 1})
	pub.publish(message{topic: "t", payload: "waits", qos: 1})
	a.receive()
	a.receive()
	b, _ := s.connect(t, connectFields{version: 5, clean: true})
	b.subscribe(2, "$share/g/t")
	f.clean = true
	_, _ = s.connect(t, f) // its session ends
	for _, want := range []string{"begun at QoS 1", "waits"} {
		if m := b.take(); m.payload != want || m.dup { // for this client it is the first time
			t.Fatalf("got %+v, want %q without DUP", m, want)
		}
	}
	pub.publish(message{topic: "t", payload: "end", qos: 1})
	b.takePayloads("end")
}

// TestRights5 publishes and subscribes where access rules forbid it.
func TestRights5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.4-2", "MQTT-3.3.4-1", "MQTT-4.8.2-6")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		return db.ReplaceACLRules(context.Background(), []storage.ACLRule{
			{Action: "publish", Filter: "w/#"}, {Action: "subscribe", Filter: "r/#"}, {Action: "receive", Filter: "d/#"},
		})
	})
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	if got := c.subscribe(2, "w/#", "r/x", "$share/g/r/x", "d/#", "#"); !bytes.Equal(got, []byte{2, 0x87, 0x87, 2, 2}) {
		t.Errorf("SUBACK: got % x, want 2 87 87 2 2", got)
	}
	for qos := range byte(3) {
		want := byte(0)
		if qos > 0 {
			want = 0x87
		}
		if got := c.publish(message{topic: "w/x", qos: qos}); got != want {
			t.Errorf("QoS %d: got reason %#x, want %#x", qos, got, want)
		}
		c.publish(message{topic: "d/x", payload: "may be sent, not received", qos: qos})
		c.publish(message{topic: "ok", payload: "ok", qos: qos})
		c.takePayloads("ok")
	}
	s.refused(t, connectFields{version: 5, clean: true, will: &willFields{topic: "w/x"}}.frame(), 0x87)
}
