package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/broker"
	"penstock/internal/units"
)

// The flags of each packet that a client sends, as 2.2.2 has them.
func TestV3ReservedFlags(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-2.2.2-1", "MQTT-2.2.2-2", "MQTT-3.6.1-1", "MQTT-3.8.1-1", "MQTT-3.10.1-1", "MQTT-3.14.1-1")
	s := start(t)
	for _, v := range []struct {
		what string
		b    []byte
	}{
		{"PUBACK", ackFrame(kindPuback, 1)},
		{"PUBREC", ackFrame(kindPubrec, 1)},
		{"PUBREL", pubrelFrame(1)},
		{"PUBCOMP", ackFrame(kindPubcomp, 1)},
		{"SUBSCRIBE", frame(0x82, u16(1), str("a"), []byte{0})},
		{"UNSUBSCRIBE", frame(0xA2, u16(1), str("a"))},
		{"PINGREQ", []byte{0xC0, 0}},
		{"DISCONNECT", []byte{0xE0, 0}},
	} {
		for flags := range byte(16) {
			if first := v.b[0]&0xF0 | flags; first != v.b[0] {
				s.refused3(t, v.what, []byte{first}, v.b[1:])
			}
		}
	}
}

// What a client cannot send, in whatever form.
func TestV3PacketsOfServers(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.8.0-1")
	s := start(t)
	for what, b := range map[string][]byte{
		"type 0":          {0x00, 0},
		"type 15":         {0xF0, 0},
		"type 15, longer": {0xF0, 2, 0, 0},
		"CONNACK":         {0x20, 2, 0, 0},
		"SUBACK":          frame(0x90, u16(1), []byte{0}),
		"UNSUBACK":        frame(0xB0, u16(1)),
		"PINGRESP":        {0xD0, 0},
	} {
		s.refused3(t, what, b)
	}
}

func TestV3PacketTooLong(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.8.0-1", "MQTT-4.8.0-2")
	s := start(t, func(c *broker.Config) { c.MaxPacket, c.MaxConnect = 4096, 1024 })
	other := s.v3(t, "other")
	s.refused3(t, "remaining length of five bytes", []byte{0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1})
	s.refused3(t, "remaining length of five bytes", []byte{0x30, 0x80, 0x80, 0x80, 0x80, 0})
	// There is no room for these, which is known before they have come.
	s.refused3(t, "256 MiB", []byte{0x30, 0xFF, 0xFF, 0xFF, 0x7F})
	s.refused3(t, "one byte too many", varintFrame(0x30, 4096-2))
	s.closedWithout(t, "256 MiB CONNECT", []byte{0x10, 0xFF, 0xFF, 0xFF, 0x7F})
	s.closedWithout(t, "CONNECT of one byte too many", varintFrame(0x10, 1024-2))
	other.ping() // it is nobody else's fault
	other.subscribe(0, "a")
	big := message{topic: "a", payload: strings.Repeat("x", 4096-3-3)}
	if n := len(other.publishFrame(big)); n != 4096 {
		t.Fatalf("got a packet of %d bytes, want 4096", n)
	}
	other.publish(big)
	other.takePayloads(big.payload)
}

// varintFrame is the fixed header of a packet with a remaining length.
func varintFrame(first byte, length int) []byte { return append([]byte{first}, varint(length)...) }

// A packet that ends before its last field is malformed, and so is one that
// goes on behind it.
func TestV3Truncated(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.8.0-1", "MQTT-3.3.2-1", "MQTT-2.3.1-1")
	s := start(t)
	for _, v := range []struct {
		what  string
		first byte
		body  []byte
		legal []int // lengths below the whole that are legal all the same
		open  bool  // what is behind it is payload
	}{
		{"PUBLISH 0", 0x30, str("a/b"), nil, true},
		{"PUBLISH 1", 0x32, join(str("a/b"), u16(7)), nil, true},
		{"PUBLISH 2", 0x34, join(str("a/b"), u16(7)), nil, true},
		{"PUBACK", 0x40, u16(7), nil, false},
		{"PUBREC", 0x50, u16(7), nil, false},
		{"PUBREL", 0x62, u16(7), nil, false},
		{"PUBCOMP", 0x70, u16(7), nil, false},
		{"SUBSCRIBE", 0x82, join(u16(7), str("a/b"), []byte{1}, str("c"), []byte{2}), []int{8}, false},
		{"UNSUBSCRIBE", 0xA2, join(u16(7), str("a/b"), str("c")), []int{7}, false},
		{"PINGREQ", 0xC0, nil, nil, false},
		{"DISCONNECT", 0xE0, nil, nil, false},
	} {
		for n := range v.body {
			if !slices.Contains(v.legal, n) {
				s.refused3(t, fmt.Sprintf("%s cut to %d bytes", v.what, n), frame(v.first, v.body[:n]))
			}
		}
		if !v.open {
			s.refused3(t, v.what+" and a byte", frame(v.first, v.body, []byte{0}))
		}
	}
}

// A packet that has come in part is not acted upon.
func TestV3HalfPackets(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.8.0-1")
	s := start(t)
	w := s.v3(t, "watcher")
	w.subscribe(0, "#")
	b := frame(0x30, str("a"), []byte("payload"))
	for n := 1; n < len(b); n++ {
		c := s.v3(t, "c")
		c.send(b[:n])
		if err := c.c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.expectClosed()
	}
	w.silent()
}

// Packets come in whatever pieces the network makes of them.
func TestV3AnyPieces(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-7.1.1-1")
	s := start(t)
	for _, size := range []int{1, 2, 3, 7, 1 << 20} {
		c := s.dial(t, 4)
		all := join(connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: "w", payload: "x"}}.frame(),
			c.subscribeFrame(1, 2, []string{"a/#", "b"}),
			c.publishFrame(message{topic: "a/1", payload: "0"}),
			c.publishFrame(message{topic: "a/2", qos: 1, id: 2, payload: strings.Repeat("1", 200)}),
			c.publishFrame(message{topic: "b", qos: 2, id: 3, payload: "2"}), pubrelFrame(3),
			[]byte{0xC0, 0},
			frame(0xA2, u16(4), str("b")),
			[]byte{0xE0, 0})
		for b := range slices.Chunk(all, size) {
			c.send(b)
		}
		if a := c.connack(); a.reason != 0 {
			t.Fatalf("pieces of %d: got return code %d", size, a.reason)
		}
		var got [16]int
		for _, p := range c.end() {
			got[p.kind()]++
		}
		want := [16]int{kindSuback: 1, kindPublish: 3, kindPuback: 1, kindPubrec: 1, kindPubcomp: 1, kindPingresp: 1, kindUnsuback: 1}
		if got != want {
			t.Errorf("pieces of %d: got packets by type %v, want %v", size, got, want)
		}
	}
}

func TestV3PacketIDZero(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-2.3.1-1")
	s := start(t)
	for what, b := range map[string][]byte{
		"PUBLISH 1":   frame(0x32, str("a"), u16(0)),
		"PUBLISH 2":   frame(0x34, str("a"), u16(0)),
		"SUBSCRIBE":   frame(0x82, u16(0), str("a"), []byte{0}),
		"UNSUBSCRIBE": frame(0xA2, u16(0), str("a")),
	} {
		s.refused3(t, what, b)
	}
	// 0 alone is reserved.
	c := s.v3(t, "c")
	for _, id := range []int{1, 255, 256, 32768, 65535} {
		c.publish(message{topic: "a", qos: 1, id: id})
		c.publish(message{topic: "a", qos: 2, id: id})
		c.send(c.subscribeFrame(id, 0, []string{"b"}))
		c.suback(id, 1)
	}
}

func TestV3PublishFlags(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.1-4", "MQTT-3.3.1-2")
	s := start(t)
	w := s.v3(t, "watcher")
	w.subscribe(2, "a")
	for first := byte(0x30); first < 0x40; first++ {
		b := frame(first, str("a"), u16(1), []byte("x"))
		qos, dup := first>>1&3, first&8 != 0
		if qos == 3 || qos == 0 && dup {
			s.refused3(t, fmt.Sprintf("PUBLISH %#x", first), b)
			continue
		}
		c := s.v3(t, fmt.Sprint("c", first))
		c.send(b)
		switch qos {
		case 1:
			c.ack(kindPuback, 1)
		case 2:
			c.ack(kindPubrec, 1)
		}
		c.ping()
		if m := w.take(); m.qos != qos || m.dup || m.retain {
			t.Errorf("PUBLISH %#x: got %+v", first, m)
		}
	}
	w.silent()
}

func TestV3TopicNames(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.3.2-1", "MQTT-3.3.2-2", "MQTT-4.7.1-1", "MQTT-4.7.3-1", "MQTT-4.7.3-2", "MQTT-1.5.3-1", "MQTT-1.5.3-2")
	s := start(t)
	w := s.v3(t, "watcher")
	w.subscribe(2, "#")
	bad := map[string]string{"empty": "", "#": "#", "+": "+", "a/#": "a/#", "a/+/b": "a/+/b", "a#": "a#", "+a": "+a"}
	for what, topic := range illFormed {
		bad[what] = topic
	}
	for what, topic := range bad {
		for qos := range byte(3) {
			c := client{t: t}
			s.refused3(t, fmt.Sprintf("topic %s, QoS %d", what, qos), c.publishFrame(message{topic: topic, qos: qos, id: 1, payload: "x"}))
		}
	}
	w.silent()
}

func TestV3FilterText(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.8.3-1", "MQTT-3.10.3-1", "MQTT-4.7.3-2", "MQTT-1.5.3-1", "MQTT-1.5.3-2")
	s := start(t)
	for what, filter := range illFormed {
		s.refused3(t, "SUBSCRIBE "+what, frame(0x82, u16(1), str(filter), []byte{0}))
		s.refused3(t, "SUBSCRIBE, second "+what, frame(0x82, u16(1), str("a"), []byte{0}, str(filter), []byte{0}))
		s.refused3(t, "UNSUBSCRIBE "+what, frame(0xA2, u16(1), str(filter)))
	}
}

// A filter that no filter can be is a violation, not a refusal.
func TestV3FilterForm(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.7.1-2", "MQTT-4.7.1-3", "MQTT-4.7.3-1", "MQTT-4.8.0-1")
	s := start(t)
	for _, filter := range []string{"", "a#", "#a", "a/#/b", "#/a", "##", "a/b#", "+#", "#+", "a+", "+a", "a/b+", "a/+b/c", "++", "a/++", "/a+/"} {
		s.refused3(t, fmt.Sprintf("SUBSCRIBE %q", filter), frame(0x82, u16(1), str(filter), []byte{0}))
		s.refused3(t, fmt.Sprintf("SUBSCRIBE %q, second", filter), frame(0x82, u16(1), str("a"), []byte{0}, str(filter), []byte{0}))
		s.refused3(t, fmt.Sprintf("UNSUBSCRIBE %q", filter), frame(0xA2, u16(1), str(filter)))
	}
	c := s.v3(t, "c")
	for _, filter := range []string{"#", "+", "/", "//", "a/#", "/#", "+/#", "+/+", "/+", "+/", "a/+/b", "a/+/+/#", "//#", " ", "a b/ "} {
		if codes := c.subscribe(1, filter); codes[0] != 1 {
			t.Errorf("SUBSCRIBE %q: got %#x, want 1", filter, codes[0])
		}
	}
}

func TestV3SubscribeOptions(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.8.3-4", "MQTT-3.8.3-3", "MQTT-3.10.3-2")
	s := start(t)
	for options := 3; options < 256; options++ {
		s.refused3(t, fmt.Sprintf("requested QoS %#x", options), frame(0x82, u16(1), str("a"), []byte{byte(options)}))
	}
	s.refused3(t, "requested QoS 3, second", frame(0x82, u16(1), str("a"), []byte{0}, str("b"), []byte{3}))
	s.refused3(t, "SUBSCRIBE of nothing", frame(0x82, u16(1)))
	s.refused3(t, "UNSUBSCRIBE of nothing", frame(0xA2, u16(1)))
}

func TestV3LongStrings(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.7.3-3", "MQTT-4.7.3-4", "MQTT-1.5.3-3")
	s := start(t, func(c *broker.Config) { c.MaxConnect, c.MaxTopicBytes = 1<<20, 65535 })
	long := strings.Repeat("t", 65535)
	w := s.v3(t, "watcher")
	if codes := w.subscribe(1, long); codes[0] != 1 {
		t.Fatalf("filter of 65,535 bytes: got %#x", codes[0])
	}
	c := s.dial(t, 4)
	c.send(connectRaw(6, str(long), str(long), str(strings.Repeat("\x00", 65535))))
	if a := c.connack(); a.reason != 0 {
		t.Fatalf("longest CONNECT without a login: got return code %d", a.reason)
	}
	c.publish(message{topic: long, qos: 1, payload: "live"})
	if m := w.take(); m.topic != long || m.payload != "live" {
		t.Errorf("got %d bytes of topic, payload %q", len(m.topic), m.payload)
	}
	c.drop()
	if m := w.take(); m.topic != long || len(m.payload) != 65535 || strings.Trim(m.payload, "\x00") != "" {
		t.Errorf("will: got %d bytes of topic, %d of payload", len(m.topic), len(m.payload))
	}
	w.unsubscribe(long)
	w.silent()
	s.returns(t, 4, connectRaw(0xC2, str("c"), str(long), str(long)))
}

// Whatever the bytes are, they are the topic: nothing is trimmed, folded,
// composed or replaced.
func TestV3NoNormalization(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.7.3-4", "MQTT-1.5.3-3", "MQTT-3.3.2-3")
	s := start(t)
	c := s.v3(t, "c")
	topics := []string{"a", "A", " a", "a ", "/a", "a/", "//a", "a//", "a/./b", "a/../b", "a/b", "a//b", "é", "e\u0301", "\uFEFFa", "a\uFEFF",
		"\uFFFD", "\uFFFE", "ſ", "s", "%61", "a\tb", "a\x7Fb", "\U0010FFFF", "ﬀ", "ff", "$", "\u202Ea", "\\", "a\\b"}
	for i, topic := range topics {
		if codes := c.subscribe(byte(i%3), topic); codes[0] != byte(i%3) {
			t.Errorf("%q: got %#x", topic, codes[0])
		}
	}
	for i, topic := range topics {
		if topic[0] == '$' {
			continue // the broker's own
		}
		c.publish(message{topic: topic, payload: topic, qos: 2})
		if m := c.take(); m.topic != topic || m.payload != topic || m.qos != byte(i%3) {
			t.Errorf("%q: got %+v", topic, m)
		}
	}
	c.silent()
}

// The examples of 4.7, and the corners between them.
func TestV3Matching(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.7.1-2", "MQTT-4.7.1-3", "MQTT-4.7.2-1", "MQTT-3.3.2-3", "MQTT-3.8.3-2", "MQTT-4.5.0-1")
	s := start(t)
	type pair struct {
		filter string
		match  []string
		other  []string
	}
	table := []pair{
		{"sport/tennis/player1/#", []string{"sport/tennis/player1", "sport/tennis/player1/ranking", "sport/tennis/player1/score/wimbledon"}, []string{"sport/tennis/player", "sport/tennis/player12", "sport/tennis"}},
		{"sport/#", []string{"sport", "sport/", "sport/a/b"}, []string{"sports", "/sport"}},
		{"#", []string{"a", "/", "a/b/c", "//"}, nil},
		{"sport/tennis/+", []string{"sport/tennis/player1", "sport/tennis/"}, []string{"sport/tennis/player1/ranking", "sport/tennis"}},
		{"sport/+", []string{"sport/", "sport/a"}, []string{"sport", "sport/a/b"}},
		{"+", []string{"a", "finance"}, []string{"/finance", "a/", "a/b"}},
		{"+/tennis/#", []string{"a/tennis", "/tennis", "a/tennis/b/c"}, []string{"tennis", "a/b/tennis"}},
		{"sport/+/player1", []string{"sport/tennis/player1", "sport//player1"}, []string{"sport/player1", "sport/a/b/player1"}},
		{"+/+", []string{"/finance", "a/b", "/", "a/"}, []string{"a", "a/b/c", "//"}},
		{"/+", []string{"/finance", "/"}, []string{"finance", "//", "a/b"}},
		{"/#", []string{"/", "/a", "/a/b", "//"}, []string{"a", "a/"}},
		{"+/#", []string{"a", "/", "a/b/c", "/a"}, nil},
		{"a/+/#", []string{"a/b", "a/", "a/b/c", "a//"}, []string{"a", "b/a"}},
		{"a", []string{"a"}, []string{"A", "a/", "/a", "ab"}},
		{"a/b", []string{"a/b"}, []string{"a//b", "a/b/", "a", "a/bc"}},
		{"a//b", []string{"a//b"}, []string{"a/b", "a/x/b"}},
		{"a/+/b", []string{"a//b", "a/x/b"}, []string{"a/b", "a/x/y/b"}},
	}
	p := s.v3(t, "publisher")
	for i, v := range table {
		c := s.v3(t, fmt.Sprint("c", i))
		if codes := c.subscribe(1, v.filter); codes[0] != 1 {
			t.Errorf("%q: got %#x", v.filter, codes[0])
		}
		for _, topic := range v.other {
			p.publish(message{topic: topic, qos: 1, payload: "no"})
		}
		for _, topic := range v.match {
			p.publish(message{topic: topic, qos: 1, payload: "yes"})
			if m := c.take(); m.topic != topic || m.payload != "yes" {
				t.Errorf("filter %q: got %+v, want topic %q", v.filter, m, topic)
			}
		}
		c.disconnect()
		// The same of retained messages, which are found the other way round.
		for _, topic := range slices.Concat(v.match, v.other) {
			p.publish(message{topic: topic, qos: 1, payload: "kept", retain: true})
		}
		c = s.v3(t, fmt.Sprint("c", i))
		c.subscribe(1, v.filter)
		got := map[string]int{}
		for range v.match {
			got[c.take().topic]++
		}
		for _, topic := range v.match {
			if got[topic] != 1 {
				t.Errorf("filter %q: got the retained message of %q %d times, want once", v.filter, topic, got[topic])
			}
		}
		c.unsubscribe(v.filter)
		c.silent()
		c.disconnect()
		for _, topic := range slices.Concat(v.match, v.other) {
			p.publish(message{topic: topic, qos: 1, retain: true})
		}
	}
}

// What begins with $ is matched only by what begins with it too. Topics there
// are the broker's own, and so a client's message goes nowhere.
func TestV3DollarTopics(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-4.7.2-1", "MQTT-3.3.5-2")
	s := start(t, func(c *broker.Config) { c.SysInterval = units.Duration(time.Second) })
	wild := []string{"#", "+/#", "+/broker/#", "+/broker/uptime", "+/broker/+", "+/+", "+", "/#", "+/+/+", "+/broker/clients/#"}
	c := s.v3(t, "c")
	p := s.v3(t, "publisher")
	c.subscribe(2, wild...)
	for _, topic := range []string{"$SYS", "$SYS/monitor/Clients", "$SYS/a", "$a/b", "$", "$/a"} {
		for qos := range byte(3) {
			p.publish(message{topic: topic, qos: qos, payload: "x", retain: true})
		}
	}
	w := s.v3(t, "watcher")
	if codes := w.subscribe(0, "$SYS/#", "$SYS/monitor/+", "$a/b"); !bytes.Equal(codes, []byte{0, 0, 0}) {
		t.Errorf("filters that begin with $: got % x", codes)
	}
	for m := w.take(); m.retain; m = w.take() { // until the broker publishes while all are there
		if !strings.HasPrefix(m.topic, "$SYS/broker/") {
			t.Errorf("got %+v, which no client can have published", m)
		}
	}
	c.silent()
	// In other places $ is a letter like the others.
	for _, topic := range []string{"a$", "a/$SYS", "/$SYS"} {
		p.publish(message{topic: topic, qos: 1, payload: topic})
		c.takePayloads(topic)
	}
	late := s.v3(t, "late") // retained messages are found the other way round
	late.subscribe(2, wild...)
	late.silent()
}
