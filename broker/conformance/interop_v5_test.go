package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"penstock/broker"
	"penstock/storage"
)

// What interoperability suites for MQTT 5 check, each written from the
// standard.

// wants compares the properties of a message with these, whose order counts
// among the user properties only.
func (m message) wants(t testing.TB, want ...property) {
	t.Helper()
	if len(m.props) != len(want) {
		t.Errorf("%q: got properties %v, want %v", m.payload, m.props, want)
		return
	}
	var users, wantUsers []property
	for _, p := range m.props {
		if p.id == 38 {
			users = append(users, p)
		} else if !slices.Contains(want, p) {
			t.Errorf("%q: got property %v, want one of %v", m.payload, p, want)
		}
	}
	for _, p := range want {
		if p.id == 38 {
			wantUsers = append(wantUsers, p)
		}
	}
	if !slices.Equal(users, wantUsers) {
		t.Errorf("%q: got user properties %v, want %v", m.payload, users, wantUsers)
	}
}

// leave sends a DISCONNECT of MQTT 5 with a reason and properties, and waits
// for the end.
func (c *client) leave(reason byte, properties ...[]byte) {
	c.t.Helper()
	c.send(frame(0xE0, []byte{reason}, props(properties...)))
	c.end()
	c.c.Close()
}

func TestInterop5Basic(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	a.disconnect()
	a, _ = s.v5(t, "a")
	a.subscribe(2, "TopicA")
	for qos := range byte(3) {
		a.publish(message{topic: "TopicA", qos: qos, payload: fmt.Sprint("qos ", qos)})
	}
	a.takePayloads("qos 0", "qos 1", "qos 2")
	a.silent()
	a.send(connectFields{version: 5, clean: true, id: "a"}.frame())
	a.expectDisconnect(0x82)
	s.closedWithout(t, "protocol name", frame(0x10, str("hj"), []byte{5, 2}, u16(60), []byte{0}, str("a")))
}

func TestInterop5RetainedMessages(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	user := [][]byte{propUser("a", "2"), propUser("c", "3")}
	for qos := range byte(3) {
		a.publish(message{topic: interopTopics[1+qos], qos: qos, retain: true, payload: fmt.Sprint("qos ", qos), raw: user})
	}
	a.subscribe(2, "+/+")
	for range 3 {
		m := a.take()
		if !m.retain || m.payload != fmt.Sprint("qos ", m.qos) {
			t.Errorf("got %+v", m)
		}
		m.wants(t, property{id: 38, text: "a", value: "2"}, property{id: 38, text: "c", value: "3"})
	}
	a.silent()
	for qos := range byte(3) {
		a.publish(message{topic: interopTopics[1+qos], retain: true})
		a.take()
	}
	a.subscribe(2, "+/+")
	a.silent()
}

func TestInterop5Will(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v5(t, "b")
	b.subscribe(2, "Topic/C")
	a, _ := s.connect(t, connectFields{version: 5, clean: true, id: "a", keepAlive: 1,
		will: &willFields{topic: "Topic/C", payload: "will message", qos: 1, props: [][]byte{
			propU32(24, 0), propUser("a", "2"), propUser("c", "3"), propByte(1, 1), propStr(3, "text/plain"), propStr(8, "answers"), propStr(9, "\x00\x01"), propU32(2, 100)}}})
	a.expectDisconnect(0x8D) // its keep alive passes
	m := b.take()
	if m.payload != "will message" || m.qos != 1 {
		t.Errorf("got %+v", m)
	}
	left, ok := find(t, m.props, 2)
	if !ok || left.num < 50 || left.num > 100 {
		t.Errorf("got message expiry interval %v, want 100 s less what has passed", left)
	}
	m.wants(t, property{id: 38, text: "a", value: "2"}, property{id: 38, text: "c", value: "3"}, property{id: 1, num: 1},
		property{id: 3, text: "text/plain"}, property{id: 8, text: "answers"}, property{id: 9, text: "\x00\x01"}, left)
	b.silent()
}

func TestInterop5ZeroLengthClientID(t *testing.T) {
	t.Parallel()
	s := start(t)
	ids := map[string]bool{}
	for _, clean := range []bool{false, true, true} {
		c, a := s.connect(t, connectFields{version: 5, clean: clean})
		id, ok := find(t, a.props, 18)
		if !ok || id.text == "" || ids[id.text] {
			t.Errorf("got assigned client identifier %q", id.text)
		}
		ids[id.text] = true
		c.ping()
	}
	_, a := s.v5(t, "mine")
	if id, ok := find(t, a.props, 18); ok {
		t.Errorf("got assigned client identifier %q for a client that has one", id.text)
	}
}

// An assigned identifier is one to come back with.
func TestInterop5AssignedClientID(t *testing.T) {
	t.Parallel()
	s := start(t)
	c, a := s.v5(t, "", propU32(17, 100))
	id, _ := find(t, a.props, 18)
	c.subscribe(1, "a")
	c.disconnect()
	p, _ := s.v5(t, "p")
	p.publish(message{topic: "a", qos: 1, payload: "x"})
	c, a = s.connect(t, connectFields{version: 5, id: id.text, props: [][]byte{propU32(17, 100)}})
	if !a.present {
		t.Error("session present is not set")
	}
	c.takePayloads("x")
}

func TestInterop5OfflineQueueing(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a", propU32(17, 99999))
	a.subscribe(2, "+/+")
	a.disconnect()
	b, _ := s.v5(t, "b")
	for qos := range byte(3) {
		b.publish(message{topic: interopTopics[1+qos], qos: qos, payload: fmt.Sprint("qos ", qos)})
	}
	a, connack := s.connect(t, connectFields{version: 5, id: "a"})
	if !connack.present {
		t.Error("session present is not set")
	}
	a.takePayloads("qos 1", "qos 2")
	a.silent()
}

func TestInterop5OverlappingSubscriptions(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	a.subscribe(2, "TopicA/#")
	a.subscribe(1, "TopicA/+")
	a.publish(message{topic: "TopicA/C", qos: 2, payload: "x"})
	if m := a.take(); m.qos != 2 {
		t.Errorf("got %+v, want one copy at the highest QoS", m)
	}
	a.silent()
}

func TestInterop5RedeliveryOnReconnect(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v5(t, "b", propU32(17, 99999))
	b.subscribe(2, "TopicA/#")
	b.publish(message{topic: "TopicA/B", qos: 1, payload: "1"})
	b.publish(message{topic: "TopicA/C", qos: 2, payload: "2"})
	one, two := b.receive(), b.receive()
	b.disconnect()
	b, _ = s.connect(t, connectFields{version: 5, id: "b", props: [][]byte{propU32(17, 99999)}})
	for _, want := range []message{one, two} {
		if m := b.take(); m.id != want.id || !m.dup || m.payload != want.payload {
			t.Errorf("got %+v, want %+v again", m, want)
		}
	}
	b.silent()
}

func TestInterop5SubscribeFailure(t *testing.T) {
	t.Parallel()
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "subscribe", Filter: "test/nosubscribe"}))
	a, _ := s.v5(t, "a")
	if codes := a.subscribe(2, "TopicA", "test/nosubscribe"); !bytes.Equal(codes, []byte{2, 0x87}) {
		t.Errorf("got % x, want 02 87", codes)
	}
}

func TestInterop5DollarTopics(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v5(t, "b")
	b.subscribe(2, "+/+")
	p, _ := s.v5(t, "p")
	if reason := p.publish(message{topic: "$TopicA/B", qos: 1}); reason < 0x80 && reason != 0x10 {
		t.Errorf("got reason %#x, want a refusal or that nobody subscribed", reason)
	}
	b.silent()
}

func TestInterop5Unsubscribe(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	b, _ := s.v5(t, "b")
	b.subscribe(2, interopTopics[:3]...)
	if codes := b.unsubscribe(interopTopics[0], "never"); !bytes.Equal(codes, []byte{0, 0x11}) {
		t.Errorf("got % x, want 00 11", codes)
	}
	for _, topic := range interopTopics[:3] {
		a.publish(message{topic: topic, qos: 1, payload: topic})
	}
	b.takePayloads(interopTopics[1:3]...)
	b.silent()
}

func TestInterop5SessionExpiry(t *testing.T) {
	t.Parallel()
	s := start(t)
	connect := func(id string, clean bool, expiry int, present bool) *client {
		t.Helper()
		c, a := s.connect(t, connectFields{version: 5, clean: clean, id: id, props: [][]byte{propU32(17, expiry)}})
		if a.present != present {
			t.Errorf("%s: got session present %v, want %v", id, a.present, present)
		}
		return c
	}
	// gone wants the session to end by itself: nobody asks for it meanwhile.
	sessions := func() int64 { return s.b.Stats().Sessions }
	connect("at once", true, 0, false).disconnect()
	connect("at once", false, 0, false).disconnect()
	connect("stays", true, 100, false).disconnect()
	connect("stays", false, 100, true).disconnect()
	connect("starts anew", true, 100, false).disconnect()
	connect("starts anew", true, 100, false).disconnect()
	connect("raised", true, 1, false).leave(0, propU32(17, 100))
	connect("lowered", true, 100, false).leave(0, propU32(17, 0))
	connect("lowered", false, 100, false).leave(0)
	short := time.Now()
	connect("short", true, 1, false).disconnect()
	eventually(t, "the session of one second ends", func() bool { return sessions() == 4 })
	if d := time.Since(short); d < time.Second {
		t.Errorf("a session of 1 s ended after %v", d)
	}
	connect("short", false, 1, false)
	connect("raised", false, 1, true)
	connect("stays", false, 1, true)
	// What was 0 cannot be raised.
	c := connect("at once", true, 0, false)
	c.send(frame(0xE0, []byte{0}, props(propU32(17, 5))))
	c.expectDisconnect(0x82)
}

func TestInterop5UserProperties(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	a.subscribe(2, "TopicA")
	for qos := range byte(3) {
		a.publish(message{topic: "TopicA", qos: qos, payload: "x", raw: [][]byte{propUser("a", "2"), propUser("c", "3"), propUser("a", "1"), propUser("", "")}})
		m := a.take()
		m.wants(t, property{id: 38, text: "a", value: "2"}, property{id: 38, text: "c", value: "3"}, property{id: 38, text: "a", value: "1"}, property{id: 38})
	}
}

func TestInterop5PayloadFormat(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	a.subscribe(2, "TopicA")
	for qos := range byte(3) {
		a.publish(message{topic: "TopicA", qos: qos, payload: "x", raw: [][]byte{propByte(1, 1), propStr(3, "My name")}})
		a.take().wants(t, property{id: 1, num: 1}, property{id: 3, text: "My name"})
	}
}

func TestInterop5PublicationExpiry(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v5(t, "b", propU32(17, 99999))
	b.subscribe(2, "TopicA")
	b.disconnect()
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 0 }) // see TestV3FirstTimeIsNoDUP
	a, _ := s.v5(t, "a")
	begin := time.Now()
	for qos := byte(1); qos < 3; qos++ {
		a.publish(message{topic: "TopicA", qos: qos, payload: "expires", raw: [][]byte{propU32(2, 1)}})
		a.publish(message{topic: "TopicA", qos: qos, payload: "stays", raw: [][]byte{propU32(2, 600)}})
		a.publish(message{topic: "TopicA", qos: qos, payload: "for ever"})
	}
	a.publish(message{topic: "retained", qos: 1, retain: true, payload: "expires", raw: [][]byte{propU32(2, 1)}})
	eventually(t, "a second passes", func() bool { return time.Since(begin) > 1500*time.Millisecond })
	b, _ = s.connect(t, connectFields{version: 5, id: "b"})
	for range 2 {
		m := b.take()
		left, ok := find(t, m.props, 2)
		if m.payload != "stays" || !ok || left.num >= 600 || left.num < 500 {
			t.Errorf("got %+v, want the message that has time left, and how much", m)
		}
		b.take().wants(t)
	}
	b.silent()
	b.subscribe(1, "retained")
	b.silent()
}

func TestInterop5NoLocal(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	b, _ := s.v5(t, "b")
	a.subscribe(2|4, "TopicA")
	b.subscribe(2|4, "TopicA")
	a.publish(message{topic: "TopicA", qos: 1, payload: "noLocal test"})
	b.takePayloads("noLocal test")
	a.silent()
	b.silent()
}

func TestInterop5RetainAsPublished(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	b, _ := s.v5(t, "b")
	a.subscribe(2|8, "TopicA")
	b.subscribe(2, "TopicA")
	for _, retain := range []bool{false, true} {
		a.publish(message{topic: "TopicA", qos: 1, retain: retain, payload: "x"})
		if m := a.take(); m.retain != retain {
			t.Errorf("as published: got retain %v, want %v", m.retain, retain)
		}
		if m := b.take(); m.retain {
			t.Errorf("otherwise: got retain set")
		}
	}
}

func TestInterop5RetainHandling(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	for qos := range byte(3) {
		a.publish(message{topic: interopTopics[1+qos], qos: qos, retain: true, payload: "x"})
	}
	want := func(c *client, handling byte, n int) {
		t.Helper()
		c.subscribe(2|handling<<4, "+/+")
		for range n {
			if m := c.take(); !m.retain {
				t.Errorf("handling %d: got %+v", handling, m)
			}
		}
		c.silent()
	}
	want(a, 1, 3)
	want(a, 1, 0)
	want(a, 0, 3)
	want(a, 0, 3)
	want(a, 2, 0)
	b, _ := s.v5(t, "b")
	want(b, 2, 0)
	want(b, 2, 0)
	b.unsubscribe("+/+")
	want(b, 1, 3)
}

func TestInterop5SubscriptionIdentifiers(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	b, _ := s.v5(t, "b")
	subscribe := func(c *client, filter string, id int) {
		n := c.id()
		c.send(c.subscribeFrame(n, 2, []string{filter}, propVar(11, id)))
		c.suback(n, 1)
	}
	subscribe(a, "TopicA", 456789)
	subscribe(b, "TopicA", 2)
	subscribe(b, "TopicA/#", 3)
	b.subscribe(0, "+")
	b.publish(message{topic: "TopicA", qos: 1, payload: "x"})
	a.take().wants(t, property{id: 11, num: 456789})
	b.take().wants(t, property{id: 11, num: 2}, property{id: 11, num: 3})
	b.silent()
	subscribe(b, "TopicA", 268435455) // takes the place of the first
	b.publish(message{topic: "TopicA", qos: 1, payload: "y"})
	b.take().wants(t, property{id: 11, num: 268435455}, property{id: 11, num: 3})
}

func TestInterop5RequestResponse(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	b, _ := s.v5(t, "b")
	a.subscribe(2|4, "TopicA")
	b.subscribe(2|4, "TopicA")
	a.publish(message{topic: "TopicA", qos: 1, payload: "request", raw: [][]byte{propStr(8, "TopicA"), propStr(9, "334")}})
	m := b.take()
	m.wants(t, property{id: 8, text: "TopicA"}, property{id: 9, text: "334"})
	b.publish(message{topic: m.props[0].text, qos: 1, payload: "response", raw: [][]byte{propStr(9, "334")}})
	m = a.take()
	if m.payload != "response" {
		t.Errorf("got %+v", m)
	}
	m.wants(t, property{id: 9, text: "334"})
	a.silent()
	b.silent()
}

func TestInterop5ClientTopicAlias(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, connack := s.v5(t, "a", propU32(17, 99999))
	most, ok := find(t, connack.props, 34)
	if !ok || most.num == 0 {
		t.Fatal("no topic alias maximum is announced")
	}
	a.subscribe(2, "TopicA", "TopicA/B")
	alias := func(topic, payload string, n int) message {
		return message{topic: topic, payload: payload, qos: 1, raw: [][]byte{propU16(35, n)}}
	}
	a.publish(alias("TopicA", "1", 1))
	a.publish(alias("", "2", 1))
	a.publish(alias("TopicA/B", "3", most.num))
	a.publish(alias("", "4", most.num))
	a.publish(alias("", "5", 1))
	a.publish(alias("TopicA/B", "6", 1)) // means another topic from here on
	a.publish(alias("", "7", 1))
	for i, topic := range []string{"TopicA", "TopicA", "TopicA/B", "TopicA/B", "TopicA", "TopicA/B", "TopicA/B"} {
		m := a.take()
		if m.topic != topic || m.payload != strconv.Itoa(i+1) {
			t.Errorf("message %d: got %+v, want topic %q", i+1, m, topic)
		}
		m.wants(t) // the alias was between the client and the broker
	}
	a.disconnect()
	// An alias ends with its connection, subscriptions do not.
	back := func() *client {
		c, _ := s.connect(t, connectFields{version: 5, id: "a", props: [][]byte{propU32(17, 99999)}})
		return c
	}
	a = back()
	a.publish(message{topic: "TopicA", payload: "again", qos: 1})
	a.takePayloads("again")
	for what, v := range map[string]struct {
		m      message
		reason byte
	}{
		"unknown":           {alias("", "x", 1), 0x82},
		"0":                 {alias("TopicA", "x", 0), 0x94},
		"above the maximum": {alias("TopicA", "x", most.num+1), 0x94},
	} {
		t.Run(what, func(t *testing.T) {
			c := back()
			v.m.id = 1
			c.send(c.publishFrame(v.m))
			c.expectDisconnect(v.reason)
		})
	}
}

func TestInterop5ServerTopicAlias(t *testing.T) {
	t.Parallel()
	s := start(t)
	p, _ := s.v5(t, "p")
	for _, most := range []int{1, 0, -1} { // -1: not said, which is 0
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			var properties [][]byte
			if most >= 0 {
				properties = append(properties, propU16(34, most))
			}
			a, _ := s.v5(t, "a", properties...)
			a.subscribe(2, "TopicA", "TopicB")
			for qos := range byte(3) {
				p.publish(message{topic: "TopicA", qos: qos, payload: fmt.Sprint(qos)})
				p.publish(message{topic: "TopicB", qos: qos, payload: fmt.Sprint(qos)})
			}
			known := map[int]string{}
			used := 0
			for i := range 6 {
				m := a.take()
				alias, ok := find(t, m.props, 35)
				topic := m.topic
				if ok {
					if alias.num < 1 || alias.num > most {
						t.Fatalf("got alias %d, want at most %d", alias.num, most)
					}
					if topic == "" {
						topic = known[alias.num]
						used++
					}
					known[alias.num] = topic
				}
				if want := []string{"TopicA", "TopicB"}[i%2]; topic != want || m.payload != fmt.Sprint(i/2) {
					t.Errorf("message %d: got %+v, want topic %q", i, m, want)
				}
			}
			if most == 1 && used < 2 {
				t.Errorf("got %d messages with an alias in place of the topic, want those after the first of a topic", used)
			}
		})
	}
}

func TestInterop5MaximumPacketSize(t *testing.T) {
	t.Parallel()
	s := start(t, func(c *broker.Config) { c.MaxPacket = 2048 })
	a, connack := s.v5(t, "a", propU32(39, 64))
	most, ok := find(t, connack.props, 39)
	if !ok || most.num != 2048 {
		t.Errorf("got maximum packet size %v, want 2048", most)
	}
	a.subscribe(2, "TopicA")
	for qos := range byte(3) {
		a.publish(message{topic: "TopicA", qos: qos, payload: strings.Repeat(".", 32)})
		a.take()
		a.publish(message{topic: "TopicA", qos: qos, payload: strings.Repeat(".", 64)}) // more than it takes
		a.publish(message{topic: "TopicA", qos: qos, payload: "next"})
		a.takePayloads("next")
	}
	a.silent()
	a.trySend(a.publishFrame(message{topic: "TopicA", payload: strings.Repeat(".", 2048)}))
	a.expectDisconnect(0x95)
}

// The window of the client: no more than it asked for at a time.
func TestInterop5FlowControl1(t *testing.T) {
	t.Parallel()
	s := start(t)
	p, _ := s.v5(t, "p")
	for qos := byte(1); qos < 3; qos++ {
		c, _ := s.v5(t, "c", propU16(33, 2))
		c.subscribe(qos, "TopicA")
		for i := range 4 {
			p.publish(message{topic: "TopicA", qos: qos, payload: fmt.Sprint(i)})
		}
		one, two := c.receive(), c.receive()
		p.publish(message{topic: "TopicA", qos: 0, payload: "is not held up"})
		c.takePayloads("is not held up")
		c.ping()
		if len(c.stash) > 0 {
			t.Fatalf("QoS %d: got %v beyond the receive maximum", qos, c.stash)
		}
		finish := func(m message) {
			if qos == 1 {
				c.send(ackFrame(kindPuback, m.id))
				return
			}
			c.send(ackFrame(kindPubrec, m.id))
			c.ack(kindPubrel, m.id)
			c.ping()
			if len(c.stash) > 0 { // PUBREC makes no room, PUBCOMP does
				t.Fatalf("got %v beyond the receive maximum", c.stash)
			}
			c.send(ackFrame(kindPubcomp, m.id))
		}
		finish(two) // in whatever order
		three := c.receive()
		finish(one)
		four := c.receive()
		if three.payload != "2" || four.payload != "3" {
			t.Errorf("got %q and %q, want 2 and 3", three.payload, four.payload)
		}
		c.disconnect()
	}
}

// The window of the broker: who sends more than it announced is disconnected.
func TestInterop5FlowControl2(t *testing.T) {
	t.Parallel()
	s := start(t, func(c *broker.Config) { c.ReceiveMaximum = 10 })
	c, connack := s.v5(t, "c")
	if most, ok := find(t, connack.props, 33); !ok || most.num != 10 {
		t.Fatalf("got receive maximum %v, want 10", most)
	}
	for round := range 3 { // as many as it likes, one window after the other
		for i := 1; i <= 10; i++ {
			c.send(c.publishFrame(message{topic: "TopicA", qos: 2, id: i, payload: fmt.Sprint(round)}))
		}
		for i := 1; i <= 10; i++ {
			c.ack(kindPubrec, i)
		}
		for i := 1; i <= 10; i++ {
			c.send(pubrelFrame(i))
			c.ack(kindPubcomp, i)
		}
	}
	for i := 1; i <= 10; i++ {
		c.send(c.publishFrame(message{topic: "TopicA", qos: 2, id: i}))
		c.ack(kindPubrec, i)
	}
	c.publish(message{topic: "TopicA", payload: "QoS 0 does not count"})
	c.ping()
	c.send(c.publishFrame(message{topic: "TopicA", qos: 2, id: 11}))
	c.expectDisconnect(0x93)
}

// The window begins anew with each connection: what is open from the last one
// takes no room in it, be it sent again or not (4.9).
func TestInterop5FlowControlReconnect(t *testing.T) {
	t.Parallel()
	s := start(t, func(c *broker.Config) { c.ReceiveMaximum = 5 })
	c, _ := s.v5(t, "c", propU32(17, 100))
	back := func() {
		t.Helper()
		c.drop()
		c, _ = s.connect(t, connectFields{version: 5, id: "c", props: [][]byte{propU32(17, 100)}})
	}
	publish := func(id int, dup bool) { c.send(c.publishFrame(message{topic: "TopicA", qos: 2, id: id, dup: dup})) }
	for id := 1; id <= 5; id++ {
		publish(id, false)
		c.ack(kindPubrec, id)
	}
	back()
	for id := 1; id <= 5; id++ { // as if no PUBREC had come
		publish(id, true)
		c.ack(kindPubrec, id)
	}
	c.send(pubrelFrame(1))
	c.ack(kindPubcomp, 1)
	publish(1, false) // room for one more
	c.ack(kindPubrec, 1)
	back()
	for id := 11; id <= 15; id++ { // as if all had come, and PUBREL will follow
		publish(id, false)
		c.ack(kindPubrec, id)
	}
	for id := 1; id <= 5; id++ {
		c.send(pubrelFrame(id))
		c.ack(kindPubcomp, id)
	}
	for id := 11; id <= 15; id++ {
		c.send(pubrelFrame(id))
		c.ack(kindPubcomp, id)
	}
	c.ping()
}

func TestInterop5WillDelay(t *testing.T) {
	t.Parallel()
	s := start(t)
	w, _ := s.v5(t, "w")
	w.subscribe(2, "will/#")
	connect := func(id string, delay, expiry int) *client {
		c, _ := s.connect(t, connectFields{version: 5, clean: true, id: id, props: [][]byte{propU32(17, expiry)},
			will: &willFields{topic: "will/" + id, payload: id, props: [][]byte{propU32(24, delay)}}})
		return c
	}
	// Not before its delay, or the end of the session if that is sooner.
	begin := time.Now()
	connect("at once", 0, 100).drop()
	w.takePayloads("at once")
	connect("no session", 100, 0).drop()
	w.takePayloads("no session")
	if d := time.Since(begin); d > patience {
		t.Errorf("wills without delay took %v", d)
	}
	// Who comes back in time has not died.
	connect("back", 100, 100).drop()
	c, a := s.connect(t, connectFields{version: 5, id: "back", props: [][]byte{propU32(17, 100)}})
	if !a.present {
		t.Error("session present is not set")
	}
	c.disconnect()
	begin = time.Now()
	connect("delay", 1, 100).drop()
	connect("session", 100, 1).drop()
	got := []string{w.take().payload, w.take().payload}
	slices.Sort(got)
	if d := time.Since(begin); !slices.Equal(got, []string{"delay", "session"}) || d < time.Second {
		t.Errorf("got %v after %v, want both after a second", got, d)
	}
	w.silent()
	// A clean start ends the session that the will waited for.
	connect("anew", 100, 100).drop()
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 1 })
	s.v5(t, "anew")
	w.takePayloads("anew")
	w.silent()
}

func TestInterop5DisconnectWithWill(t *testing.T) {
	t.Parallel()
	s := start(t)
	w, _ := s.v5(t, "w")
	w.subscribe(2, "will")
	for reason, want := range map[byte]bool{0: false, 4: true, 0x80: true, 0x93: true} {
		c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "c", will: &willFields{topic: "will", payload: fmt.Sprint(reason)}})
		c.leave(reason)
		if want {
			w.takePayloads(fmt.Sprint(reason))
		}
		w.silent()
	}
}

func TestInterop5SharedSubscriptions(t *testing.T) {
	t.Parallel()
	s := start(t)
	p, _ := s.v5(t, "p")
	var group []*client
	for i := range 3 {
		c, _ := s.v5(t, fmt.Sprint("c", i))
		c.subscribe(2, "$share/sharename/x", "all")
		group = append(group, c)
	}
	other, _ := s.v5(t, "other")
	other.subscribe(2, "$share/othername/x")
	const n = 30
	for i := range n {
		p.publish(message{topic: "x", qos: 1, payload: fmt.Sprint(i)})
	}
	p.publish(message{topic: "all", qos: 1, payload: "end"})
	got := map[string]int{}
	for _, c := range group {
		count := 0
		for m := c.take(); m.topic != "all"; m = c.take() {
			got[m.payload]++
			count++
		}
		if count == 0 {
			t.Error("a member got nothing")
		}
	}
	for i := range n {
		if k := got[fmt.Sprint(i)]; k != 1 {
			t.Errorf("message %d came to the group %d times, want once", i, k)
		}
		other.takePayloads(fmt.Sprint(i)) // another group has its own
	}
	// Who leaves gets none any more, and the others get all.
	group[0].unsubscribe("$share/sharename/x")
	group[1].disconnect()
	for i := range n {
		p.publish(message{topic: "x", qos: 1, payload: fmt.Sprint("later ", i)})
		group[2].takePayloads(fmt.Sprint("later ", i))
	}
	group[0].silent()
	// Retained messages are not for them.
	p.publish(message{topic: "r", qos: 1, retain: true, payload: "x"})
	group[0].subscribe(1, "$share/sharename/r")
	group[0].silent()
}

// A server keep alive, where the broker has one, holds in place of the
// client's.
func TestInterop5KeepAlive(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v5(t, "b")
	b.subscribe(2, "will")
	a, connack := s.connect(t, connectFields{version: 5, clean: true, id: "a", keepAlive: 1, will: &willFields{topic: "will", payload: "keepalive expiry"}})
	if k, ok := find(t, connack.props, 19); ok {
		t.Errorf("got server keep alive %d, want the client's", k.num)
	}
	a.expectDisconnect(0x8D)
	b.takePayloads("keepalive expiry")
}

// What CONNACK announces is what holds: nothing that is available is said to
// be missing.
func TestInterop5Announced(t *testing.T) {
	t.Parallel()
	s := start(t)
	_, a := s.v5(t, "a")
	for _, id := range []byte{37, 40, 41, 42} { // retain, wildcards, identifiers, shared subscriptions
		if p, ok := find(t, a.props, id); ok && p.num != 1 {
			t.Errorf("property %d: got %d, want 1 or nothing", id, p.num)
		}
	}
	if p, ok := find(t, a.props, 36); ok {
		t.Errorf("maximum QoS: got %d, want nothing, for all are there", p.num)
	}
}

// Whoever has its CONNACK is told why it must go, however soon that is.
func TestInterop5Takeover(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v5(t, "a")
	for range 200 {
		b, _ := s.v5(t, "a")
		a.expectDisconnect(0x8E)
		a = b
	}
}
