package conformance

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"penstock/broker"
	"penstock/internal/units"
)

// TestWill5 lets clients go in each way, with each kind of will.
func TestWill5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-7", "MQTT-3.1.2-8", "MQTT-3.1.2-9", "MQTT-3.1.2-10", "MQTT-3.1.2-14", "MQTT-3.1.2-15", "MQTT-3.1.3-10", "MQTT-3.1.3-11", "MQTT-3.14.4-3")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(2|8, "w/#")
	raw := [][]byte{propByte(1, 1), propU32(2, 1000), propStr(3, "text/plain"), propStr(8, "reply"), propStr(9, "\x00corr"),
		propUser("z", "1"), propUser("a", "2"), propUser("z", "1"), propUser("", "")}
	want := []property{{id: 1, num: 1}, {id: 2, num: 1000}, {id: 3, text: "text/plain"}, {id: 8, text: "reply"}, {id: 9, text: "\x00corr"},
		{id: 38, text: "z", value: "1"}, {id: 38, text: "a", value: "2"}, {id: 38, text: "z", value: "1"}, {id: 38}}
	for qos := range byte(3) {
		for _, retain := range []bool{false, true} {
			for _, payload := range []string{"gone", "", "\x00\xFF"} {
				c, _ := s.connect(t, connectFields{version: 5, clean: true, will: &willFields{topic: "w/x", payload: payload, qos: qos, retain: retain, props: raw}})
				c.drop()
				m := watch.take()
				slices.SortStableFunc(m.props, func(a, b property) int { return int(a.id) - int(b.id) })
				if m.topic != "w/x" || m.payload != payload || m.qos != qos || m.retain != retain || m.dup || !slices.Equal(m.props, want) {
					t.Errorf("QoS %d, RETAIN %v: got %+v, want it as it was in the CONNECT", qos, retain, m)
				}
			}
			// It was retained, or not.
			fresh, _ := s.connect(t, connectFields{version: 5, clean: true})
			c, _ := s.connect(t, connectFields{version: 5, clean: true, will: &willFields{topic: "w/r", payload: fmt.Sprint(qos, retain), qos: qos, retain: retain}})
			c.drop()
			watch.take()
			fresh.subscribe(2, "w/r")
			fresh.ping()
			if retain {
				fresh.takePayloads(fmt.Sprint(qos, retain))
				watch.publish(message{topic: "w/r", retain: true, qos: 1})
				watch.take()
				fresh.take()
			} else if len(fresh.stash) > 0 {
				t.Errorf("QoS %d: the will was retained", qos)
			}
			fresh.disconnect()
		}
	}
	t.Run("empty and retained", func(t *testing.T) { // removes what is retained
		watch.publish(message{topic: "w/e", payload: "kept", qos: 1, retain: true})
		watch.takePayloads("kept")
		c, _ := s.connect(t, connectFields{version: 5, clean: true, will: &willFields{topic: "w/e", retain: true, qos: 1}})
		c.drop()
		watch.takePayloads("")
		fresh, _ := s.connect(t, connectFields{version: 5, clean: true})
		fresh.subscribe(1, "w/e")
		fresh.ping()
		if len(fresh.stash) > 0 {
			t.Errorf("got %v, which was removed", fresh.stash)
		}
	})
	for name, leave := range map[string]func(*client){
		"a connection that is dropped": func(c *client) { c.drop() },
		"a malformed packet":           func(c *client) { c.trySend([]byte{0x36, 0}) },
		"a protocol error":             func(c *client) { c.trySend(frame(0x20, []byte{0, 0, 0})) },
		"a packet that is too large":   func(c *client) { c.trySend([]byte{0x30, 0xFF, 0xFF, 0xFF, 0x7F}) },
		"DISCONNECT with 0x04":         func(c *client) { c.send(frame(0xE0, []byte{4})) },
		"DISCONNECT with 0x04 and properties": func(c *client) {
			c.send(frame(0xE0, []byte{4}, props(propStr(31, "why"), propUser("a", "b"))))
		},
		"another connection": func(c *client) { s.connect(t, connectFields{version: 5, clean: true, id: "will"}) },
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "will", will: &willFields{topic: "w/x", payload: name, qos: 1}})
			leave(c)
			watch.takePayloads(name)
		})
	}
	for name, leave := range map[string][]byte{
		"DISCONNECT":                       {0xE0, 0},
		"DISCONNECT with 0x00":             frame(0xE0, []byte{0}),
		"DISCONNECT with 0x00, properties": frame(0xE0, []byte{0}, props(propU32(17, 0), propUser("a", "b"))),
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "will", will: &willFields{topic: "w/x", payload: name, qos: 1}})
			c.send(leave)
			c.expectClosed()
			watch.publish(message{topic: "w/end", payload: "end", qos: 1})
			watch.takePayloads("end")
		})
	}
	t.Run("of an earlier connection", func(t *testing.T) { // is not that of a later one
		keep := [][]byte{propU32(17, 600)}
		c, _ := s.connect(t, connectFields{version: 5, id: "later", props: keep, will: &willFields{topic: "w/x", payload: "first"}})
		c.disconnect()
		c, _ = s.connect(t, connectFields{version: 5, id: "later", props: keep})
		c.drop()
		c, _ = s.connect(t, connectFields{version: 5, id: "later", props: keep, will: &willFields{topic: "w/x", payload: "second"}})
		c.drop()
		watch.takePayloads("second")
	})
}

// TestWillDelay5 delays wills.
func TestWillDelay5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-8", "MQTT-3.1.3-9")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(1, "w/#")
	// connect returns a client with a will of its own name.
	connect := func(id string, delay, expiry int, clean bool) *client {
		c, _ := s.connect(t, connectFields{version: 5, id: id, clean: clean, props: [][]byte{propU32(17, expiry)},
			will: &willFields{topic: "w/" + id, payload: id, qos: 1, props: [][]byte{propU32(24, delay)}}})
		return c
	}
	connect("comes back", 4, 600, true).drop()
	back, _ := s.connect(t, connectFields{version: 5, id: "comes back", props: [][]byte{propU32(17, 600)}})
	connect("comes and goes", 4, 600, true).drop()
	goes, _ := s.connect(t, connectFields{version: 5, id: "comes and goes", props: [][]byte{propU32(17, 600)}})
	goes.drop()                           // without a will of its own
	connect("clock", 5, 600, true).drop() // when its will comes, the other's would have been there
	began := time.Now()
	connect("delayed", 1, 600, true).drop()
	connect("ends with the session", 600, 1, true).drop()
	connect("no session", 600, 0, true).drop()
	connect("no delay", 0, 600, true).drop()
	cleaned := connect("is cleaned", 600, 600, true)
	cleaned.drop()
	cleaned = connect("is cleaned", 600, 600, true) // its session ended: the will is due
	expired := connect("session ends by DISCONNECT", 600, 600, true)
	expired.send(frame(0xE0, []byte{4}, props(propU32(17, 0))))
	expired.expectClosed()
	want := map[string]bool{"clock": true, "delayed": true, "ends with the session": true, "no session": true, "no delay": true, "is cleaned": true, "session ends by DISCONNECT": true}
	for len(want) > 0 {
		m := watch.take()
		if !want[m.payload] {
			t.Errorf("got the will %q, which is not due, or twice", m.payload)
		}
		delete(want, m.payload)
		if took := time.Since(began); (m.payload == "delayed" || m.payload == "ends with the session") && took < time.Second {
			t.Errorf("got the will %q after %v, want one second", m.payload, took)
		}
	}
	back.ping()
	cleaned.ping()
	back.disconnect()
	cleaned.disconnect()
	watch.publish(message{topic: "w/end", payload: "end", qos: 1})
	watch.takePayloads("end")
}

// TestWillTakeover5 connects a client that is connected: its will is published
// unless it has a delay and the session goes on (3.1.4).
func TestWillTakeover5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-8", "MQTT-3.1.3-9", "MQTT-3.1.4-3")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(1, "w/#")
	for _, delay := range []int{0, 600} {
		for _, clean := range []bool{false, true} {
			f := connectFields{version: 5, id: fmt.Sprint("taken", delay, clean), props: [][]byte{propU32(17, 600)},
				will: &willFields{topic: "w/x", payload: "will", qos: 1, props: [][]byte{propU32(24, delay)}}}
			old, _ := s.connect(t, f)
			f.clean, f.will = clean, nil
			next, _ := s.connect(t, f)
			old.expectDisconnect(0x8E)
			if delay == 0 || clean {
				watch.takePayloads("will")
			}
			next.disconnect()
			watch.publish(message{topic: "w/end", payload: "end", qos: 1})
			watch.takePayloads("end")
		}
	}
}

// TestWillSurvives5 stops the broker while clients with wills are connected.
func TestWillSurvives5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-7", "MQTT-3.1.3-9")
	dir := t.TempDir()
	grace := func(c *broker.Config) { c.WillGrace = units.Duration(0) }
	s := startIn(t, dir, nil, grace)
	watch, _ := s.connect(t, connectFields{version: 5, id: "watch", props: [][]byte{propU32(17, 600)}})
	watch.subscribe(1, "w/#")
	c, _ := s.connect(t, connectFields{version: 5, id: "delayed", props: [][]byte{propU32(17, 600)},
		will: &willFields{topic: "w/delayed", payload: "delayed", qos: 1, props: [][]byte{propU32(24, 1), propUser("a", "b")}}})
	c.drop()
	eventually(t, "client is gone", func() bool { return len(s.b.Clients()) == 1 })
	s.stop()
	s = startIn(t, dir, nil, grace)
	watch, _ = s.connect(t, connectFields{version: 5, id: "watch", props: [][]byte{propU32(17, 600)}})
	m := watch.take()
	if p, ok := find(t, m.props, 38); m.payload != "delayed" || !ok || p.value != "b" {
		t.Errorf("got %+v, want the will that was delayed", m)
	}
}

// TestWillNoLocal5 has a session that wants nothing of its own: its will is.
func TestWillNoLocal5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.8.3-3")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(1, "w")
	f := connectFields{version: 5, id: "c", props: [][]byte{propU32(17, 600)}, will: &willFields{topic: "w", payload: "gone", qos: 1}}
	c, _ := s.connect(t, f)
	c.subscribe(1|4, "w")
	c.drop()
	watch.takePayloads("gone")
	c, _ = s.connect(t, f)
	c.ping()
	if len(c.stash) > 0 {
		t.Errorf("got its own will: %v", c.stash)
	}
}
