package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"penstock/storage"
)

// What interoperability suites for MQTT 3.1.1 check, each written from the
// standard: two clients as an application has them, topics as they come.

var interopTopics = []string{"TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA"}

func TestInterop3Basic(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.v3(t, "a").disconnect()
	a, connack := s.connect(t, connectFields{version: 4, clean: true, id: "a"})
	if connack.present {
		t.Error("session present is set")
	}
	a.subscribe(2, interopTopics[0])
	for qos := range byte(3) {
		a.publish(message{topic: interopTopics[0], qos: qos, payload: fmt.Sprint("qos ", qos)})
	}
	a.takePayloads("qos 0", "qos 1", "qos 2")
	a.silent()
	a.disconnect()
	a = s.v3(t, "a")
	a.send(connectFields{version: 4, clean: true, id: "a"}.frame())
	a.expectClosed()
	s.closedWithout(t, "protocol name", frame(0x10, str("hj"), []byte{4, 2}, u16(60), str("a")))
}

func TestInterop3RetainedMessages(t *testing.T) {
	t.Parallel()
	s := start(t)
	a := s.v3(t, "a")
	publish := func(payload func(qos byte) string) {
		for qos := range byte(3) {
			a.publish(message{topic: interopTopics[1+qos], qos: qos, retain: true, payload: payload(qos)})
		}
	}
	publish(func(qos byte) string { return fmt.Sprint("qos ", qos) })
	a.subscribe(2, "+/+")
	var got []string
	for range 3 {
		m := a.take()
		if !m.retain || m.payload != fmt.Sprint("qos ", m.qos) {
			t.Errorf("got %+v", m)
		}
		got = append(got, m.topic)
	}
	slices.Sort(got)
	if want := []string{"Topic/C", "TopicA/B", "TopicA/C"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	a.disconnect()
	a = s.v3(t, "a")
	publish(func(byte) string { return "" })
	a.subscribe(2, "+/+")
	a.silent()
}

func TestInterop3Will(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.connect(t, connectFields{version: 4, clean: true, id: "a", keepAlive: 2,
		will: &willFields{topic: interopTopics[2], payload: "client not disconnected"}})
	b, _ := s.v3Session(t, "b")
	b.subscribe(2, interopTopics[2])
	a.drop()
	b.takePayloads("client not disconnected")
	b.silent()
}

func TestInterop3ZeroLengthClientID(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.returns(t, 2, connectFields{version: 4}.frame())
	s.v3(t, "").disconnect()
}

func TestInterop3OfflineQueueing(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, _ := s.v3Session(t, "a")
	a.subscribe(2, "+/+")
	a.disconnect()
	b := s.v3(t, "b")
	for qos := range byte(3) {
		b.publish(message{topic: interopTopics[1+qos], qos: qos, payload: fmt.Sprint("qos ", qos)})
	}
	b.disconnect()
	a, present := s.v3Session(t, "a")
	if !present {
		t.Error("session present is not set")
	}
	a.takePayloads("qos 1", "qos 2")
	a.silent()
}

func TestInterop3OverlappingSubscriptions(t *testing.T) {
	t.Parallel()
	s := start(t)
	a := s.v3(t, "a")
	a.send(frame(0x82, u16(1), str("TopicA/#"), []byte{2}, str("TopicA/+"), []byte{1}))
	a.suback(1, 2)
	a.publish(message{topic: "TopicA/C", qos: 2, payload: "overlapping topic filters"})
	if m := a.take(); m.qos != 2 || m.payload != "overlapping topic filters" {
		t.Errorf("got %+v, want one copy at the highest QoS", m)
	}
	a.silent()
}

func TestInterop3KeepAlive(t *testing.T) {
	t.Parallel()
	s := start(t)
	b := s.v3(t, "b")
	b.subscribe(2, "/TopicA")
	a, _ := s.connect(t, connectFields{version: 4, clean: true, id: "a", keepAlive: 1,
		will: &willFields{topic: "/TopicA", payload: "keepalive expiry"}})
	a.expectClosed()
	b.takePayloads("keepalive expiry")
}

func TestInterop3RedeliveryOnReconnect(t *testing.T) {
	t.Parallel()
	s := start(t)
	b, _ := s.v3Session(t, "b")
	b.subscribe(2, "TopicA/#")
	b.publish(message{topic: "TopicA/B", qos: 1, payload: "1"})
	b.publish(message{topic: "TopicA/C", qos: 2, payload: "2"})
	one, two := b.receive(), b.receive() // and answers nothing
	b.disconnect()
	b, _ = s.v3Session(t, "b")
	for _, want := range []message{one, two} {
		if m := b.take(); m.id != want.id || !m.dup || m.payload != want.payload {
			t.Errorf("got %+v, want %+v again", m, want)
		}
	}
	b.silent()
}

func TestInterop3SubscribeFailure(t *testing.T) {
	t.Parallel()
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "subscribe", Filter: "test/nosubscribe"}))
	a := s.v3(t, "a")
	if codes := a.subscribe(2, "test/nosubscribe"); codes[0] != 0x80 {
		t.Errorf("got %#x, want 0x80", codes[0])
	}
	a.publish(message{topic: "test/nosubscribe", qos: 1})
	a.silent()
}

func TestInterop3DollarTopics(t *testing.T) {
	t.Parallel()
	s := start(t)
	b := s.v3(t, "b")
	b.subscribe(2, "+/+")
	b.publish(message{topic: "$TopicA/B", qos: 1})
	b.silent()
}

func TestInterop3Unsubscribe(t *testing.T) {
	t.Parallel()
	s := start(t)
	a, b := s.v3(t, "a"), s.v3(t, "b")
	for _, topic := range interopTopics[:3] {
		b.subscribe(2, topic)
	}
	b.unsubscribe(interopTopics[0])
	for _, topic := range interopTopics[:3] {
		a.publish(message{topic: topic, qos: 1, payload: topic})
	}
	b.takePayloads(interopTopics[1:3]...)
	b.silent()
}

// The same client over and over, each time with something left undone.
func TestInterop3FlipFlop(t *testing.T) {
	t.Parallel()
	s := start(t)
	p := s.v3(t, "p")
	want := 0
	for i := range 12 {
		c, present := s.v3Session(t, "c")
		if present != (i > 0) {
			t.Fatalf("round %d: got session present %v", i, present)
		}
		if i == 0 {
			c.subscribe(2, "a/#")
		}
		p.publish(message{topic: "a/b", qos: byte(1 + i%2), payload: fmt.Sprint(i)})
		if i%3 == 2 { // take what has gathered
			for ; want <= i; want++ {
				c.takePayloads(fmt.Sprint(want))
			}
			c.silent()
		}
		if i%2 == 0 {
			c.disconnect()
		} else {
			c.drop()
		}
	}
}

// Topics of any depth and length that fits.
func TestInterop3LongTopics(t *testing.T) {
	t.Parallel()
	s := start(t)
	c := s.v3(t, "c")
	for _, topic := range []string{strings.Repeat("/", 127), strings.Repeat("a/", 127) + "b", strings.Repeat("x", 4096)} {
		if codes := c.subscribe(0, topic); codes[0] != 0 {
			t.Errorf("topic of %d bytes: got %#x", len(topic), codes[0])
			continue
		}
		c.publish(message{topic: topic, payload: "x"})
		if m := c.take(); m.topic != topic {
			t.Errorf("topic of %d bytes: got another", len(topic))
		}
		c.unsubscribe(topic)
	}
	c.subscribe(1, "#")
	c.publish(message{topic: strings.Repeat("a/", 127) + "b", qos: 1, payload: "deep"})
	c.takePayloads("deep")
}
