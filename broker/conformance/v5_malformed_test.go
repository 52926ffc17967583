package conformance

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"penstock/broker"
)

// place is where a property may stand: a packet, or the will in a CONNECT.
type place int

const (
	inConnect place = iota
	inWill
	inPublish
	inPuback
	inPubrec
	inPubrel
	inPubcomp
	inSubscribe
	inUnsubscribe
	inDisconnect
	inAuth
	places
)

func (p place) String() string {
	return [...]string{"CONNECT", "will", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP", "SUBSCRIBE", "UNSUBSCRIBE", "DISCONNECT", "AUTH"}[p]
}

// properties is every property that MQTT 5 has (2.2.2.2): a value that is
// right for it, values that are not, and where a client may send it.
var properties = []struct {
	name   string
	id     byte
	valid  []byte
	wrong  [][]byte // out of range: protocol errors
	text   bool     // the value is a UTF-8 string
	places []place
}{
	{"Payload Format Indicator", 1, propByte(1, 1), [][]byte{propByte(1, 2), propByte(1, 255)}, false, []place{inWill, inPublish}},
	{"Message Expiry Interval", 2, propU32(2, 100), nil, false, []place{inWill, inPublish}},
	{"Content Type", 3, propStr(3, "x"), nil, true, []place{inWill, inPublish}},
	{"Response Topic", 8, propStr(8, "x"), [][]byte{propStr(8, "a/+"), propStr(8, "#"), propStr(8, "")}, true, []place{inWill, inPublish}},
	{"Correlation Data", 9, propStr(9, "x\x00\xFF"), nil, false, []place{inWill, inPublish}},
	{"Subscription Identifier", 11, propVar(11, 1), [][]byte{propVar(11, 0)}, false, []place{inSubscribe}},
	{"Session Expiry Interval", 17, propU32(17, 100), nil, false, []place{inConnect, inDisconnect}},
	{"Assigned Client Identifier", 18, propStr(18, "x"), nil, true, nil},
	{"Server Keep Alive", 19, propU16(19, 100), nil, false, nil},
	{"Authentication Method", 21, propStr(21, "x"), nil, true, []place{inConnect, inAuth}},
	{"Authentication Data", 22, propStr(22, "x"), nil, false, []place{inConnect, inAuth}},
	{"Request Problem Information", 23, propByte(23, 1), [][]byte{propByte(23, 2)}, false, []place{inConnect}},
	{"Will Delay Interval", 24, propU32(24, 100), nil, false, []place{inWill}},
	{"Request Response Information", 25, propByte(25, 1), [][]byte{propByte(25, 2)}, false, []place{inConnect}},
	{"Response Information", 26, propStr(26, "x"), nil, true, nil},
	{"Server Reference", 28, propStr(28, "x"), nil, true, []place{inDisconnect}},
	{"Reason String", 31, propStr(31, "x"), nil, true, []place{inPuback, inPubrec, inPubrel, inPubcomp, inDisconnect, inAuth}},
	{"Receive Maximum", 33, propU16(33, 100), [][]byte{propU16(33, 0)}, false, []place{inConnect}},
	{"Topic Alias Maximum", 34, propU16(34, 10), nil, false, []place{inConnect}},
	{"Topic Alias", 35, propU16(35, 1), nil, false, []place{inPublish}},
	{"Maximum QoS", 36, propByte(36, 1), nil, false, nil},
	{"Retain Available", 37, propByte(37, 1), nil, false, nil},
	{"User Property", 38, propUser("name", "value"), nil, true,
		[]place{inConnect, inWill, inPublish, inPuback, inPubrec, inPubrel, inPubcomp, inSubscribe, inUnsubscribe, inDisconnect, inAuth}},
	{"Maximum Packet Size", 39, propU32(39, 1000), [][]byte{propU32(39, 0)}, false, []place{inConnect}},
	{"Wildcard Subscription Available", 40, propByte(40, 1), nil, false, nil},
	{"Subscription Identifier Available", 41, propByte(41, 1), nil, false, nil},
	{"Shared Subscription Available", 42, propByte(42, 1), nil, false, nil},
	{"identifier that does not exist", 4, []byte{4, 0}, nil, false, nil},
	{"identifier 0", 0, []byte{0, 0}, nil, false, nil},
	{"identifier of two bytes", 0x81, []byte{0x81, 0x01, 0}, nil, false, nil},
}

// edges are the first and last values that a property may have, where they are
// not the one above.
var edges = map[byte][][]byte{
	1:  {propByte(1, 0)},
	2:  {propU32(2, 0), propU32(2, 1), propU32(2, uint32(math.MaxUint32))},
	3:  {propStr(3, ""), propStr(3, strings.Repeat("x", 65535))},
	8:  {propStr(8, "/")},
	9:  {propStr(9, ""), propStr(9, strings.Repeat("\x00", 65535))},
	11: {propVar(11, 127), propVar(11, 128), propVar(11, 1<<28-1)},
	17: {propU32(17, 0), propU32(17, 1), propU32(17, uint32(math.MaxUint32))},
	23: {propByte(23, 0)},
	24: {propU32(24, 0), propU32(24, uint32(math.MaxUint32))},
	25: {propByte(25, 0)},
	28: {propStr(28, "")},
	31: {propStr(31, ""), propStr(31, strings.Repeat("x", 65535))},
	33: {propU16(33, 1), propU16(33, 65535)},
	34: {propU16(34, 0), propU16(34, 1), propU16(34, 65535)},
	35: {propU16(35, 16)}, // the most that we announce
	38: {propUser("", ""), propUser(strings.Repeat("n", 65535), strings.Repeat("v", 65535))},
	39: {propU32(39, math.MaxInt32), propU32(39, uint32(1<<31)), propU32(39, uint32(math.MaxUint32))},
}

// badText is what no UTF-8 string may hold.
var badText = []struct{ name, text string }{
	{"U+0000", "a\x00b"},
	{"surrogate", "a\xED\xA0\x80"},
	{"overlong", "a\xC0\x80"},
	{"continuation byte alone", "\x80"},
	{"cut short", "a\xE2\x82"},
	{"above U+10FFFF", "\xF4\x90\x80\x80"},
}

// with returns a packet that has properties in a place, and is right in all
// else. raw is the property length and the properties as they shall be.
func (p place) with(raw []byte) []byte {
	connect := func(flags byte, tail ...[]byte) []byte {
		return frame(kindConnect<<4, append([][]byte{str("MQTT"), {5, flags}, u16(0)}, tail...)...)
	}
	switch p {
	case inConnect:
		return connect(2, raw, str(""))
	case inWill:
		return connect(2|4, props(), str(""), raw, str("will"), str("payload"))
	case inPublish:
		return frame(kindPublish<<4|2, str("topic"), u16(7), raw, []byte("payload"))
	case inPuback, inPubrec, inPubcomp:
		return frame([...]byte{inPuback: 0x40, inPubrec: 0x50, inPubcomp: 0x70}[p], u16(7), []byte{0}, raw)
	case inPubrel:
		return frame(kindPubrel<<4|2, u16(7), []byte{0}, raw)
	case inSubscribe:
		return frame(kindSubscribe<<4|2, u16(7), raw, str("filter"), []byte{1})
	case inUnsubscribe:
		return frame(kindUnsubscribe<<4|2, u16(7), raw, str("filter"))
	case inDisconnect:
		return frame(kindDisconnect<<4, []byte{4}, raw)
	}
	return frame(kindAuth<<4, []byte{0x19}, raw)
}

// refused sends a packet, a CONNECT or one of a client that is connected, and
// wants it answered with the reason code, in a CONNACK or a DISCONNECT, and
// the connection closed.
func (s *server) refused(t *testing.T, sent []byte, reasons ...byte) {
	t.Helper()
	if sent[0]>>4 == kindConnect {
		c := s.dial(t, 5)
		c.trySend(sent)
		a := c.connack()
		if !slices.Contains(reasons, a.reason) || a.present {
			t.Fatalf("CONNACK: got reason %#x, session present %v; want one of % x", a.reason, a.present, reasons)
		}
		c.expectClosed()
		return
	}
	f := connectFields{version: 5, clean: true}
	if sent[0]>>4 == kindDisconnect { // it may change an expiry that there is
		f.props = [][]byte{propU32(17, 60)}
	}
	c, _ := s.connect(t, f)
	c.trySend(sent, []byte{kindPingreq << 4, 0}) // what is not refused is seen at once by the answer to this
	var got []packet
	for {
		p, err := c.tryRead()
		if err == nil {
			got = append(got, p)
		}
		if err != nil || p.kind() == kindPingresp {
			break
		}
	}
	if n := len(got); n != 1 || got[0].first != kindDisconnect<<4 || len(got[0].body) == 0 || !slices.Contains(reasons, got[0].body[0]) {
		t.Fatalf("got %v, want DISCONNECT with one of % x and the end", got, reasons)
	}
}

// witness returns a function that makes sure that the broker goes on serving
// others.
func (s *server) witness(t *testing.T) func() {
	c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "witness"})
	c.subscribe(1, "witness/#")
	n := 0
	return func() {
		t.Helper()
		n++
		c.publish(message{topic: "witness/x", payload: fmt.Sprint(n), qos: 1})
		c.takePayloads(fmt.Sprint(n))
	}
}

// TestProperties5 sends every property in every packet that a client may send.
func TestProperties5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-1.5.4-1", "MQTT-1.5.4-2", "MQTT-1.5.7-1", "MQTT-3.1.4-1", "MQTT-3.3.2-8", "MQTT-3.3.2-13", "MQTT-3.3.2-14",
		"MQTT-3.3.2-19", "MQTT-3.3.4-6", "MQTT-4.13.1-1", "MQTT-4.13.2-1", "MQTT-3.2.2-6", "MQTT-3.2.2-7")
	s := start(t, func(c *broker.Config) { c.MaxConnect = 1 << 20 }) // the longest properties do not fit into less
	well := s.witness(t)
	for p := range places {
		for _, prop := range properties {
			may := slices.Contains(prop.places, p)
			name := p.String() + "/" + prop.name
			if !may {
				t.Run(name+"/not allowed here", func(t *testing.T) {
					reason := byte(0x81) // 2.2.2.2
					switch {
					case p == inPublish && prop.id == 11:
						reason = 0x82 // a server may send it
					case p == inAuth:
						s.refused(t, p.with(props(prop.valid)), 0x81, 0x82) // AUTH itself is an error here
						return
					}
					s.refused(t, p.with(props(prop.valid)), reason)
				})
				continue
			}
			t.Run(name+"/valid", func(t *testing.T) { propertyIsTaken(t, s, p, prop.id, p.with(props(prop.valid))) })
			if p == inAuth {
				continue // is refused whatever is in it
			}
			for i, edge := range edges[prop.id] {
				t.Run(fmt.Sprintf("%s/edge %d", name, i+1), func(t *testing.T) { propertyIsTaken(t, s, p, prop.id, p.with(props(edge))) })
			}
			t.Run(name+"/twice", func(t *testing.T) {
				packet := p.with(props(prop.valid, prop.valid))
				if prop.id == 38 {
					propertyIsTaken(t, s, p, prop.id, packet)
				} else {
					s.refused(t, packet, 0x82)
				}
			})
			for i, wrong := range prop.wrong {
				t.Run(fmt.Sprintf("%s/out of range %d", name, i+1), func(t *testing.T) { s.refused(t, p.with(props(wrong)), 0x82) })
			}
			if p == inPublish && prop.id == 35 {
				t.Run(name+"/0", func(t *testing.T) { s.refused(t, p.with(props(propU16(35, 0))), 0x94) })
				t.Run(name+"/above the maximum", func(t *testing.T) { s.refused(t, p.with(props(propU16(35, 65535))), 0x94) })
			}
			for cut := 1; cut < len(prop.valid); cut++ {
				t.Run(fmt.Sprintf("%s/cut to %d", name, cut), func(t *testing.T) { s.refused(t, p.with(props(prop.valid[:cut])), 0x81) })
			}
			if prop.text {
				for _, bad := range badText {
					values := [][]byte{propStr(prop.id, bad.text)}
					if prop.id == 38 {
						values = [][]byte{propUser(bad.text, "x"), propUser("x", bad.text)}
					}
					for i, v := range values {
						t.Run(fmt.Sprintf("%s/%s %d", name, bad.name, i), func(t *testing.T) { s.refused(t, p.with(props(v)), 0x81) })
					}
				}
			}
		}
		if p == inAuth {
			continue
		}
		for _, tt := range []struct {
			name string
			raw  []byte
		}{
			{"longer than the packet", append(varint(1000), propUser("a", "b")...)},
			{"one short", append(varint(6), propUser("a", "b")...)},
			{"of five bytes", []byte{0x80, 0x80, 0x80, 0x80, 0x01}},
			{"not minimal", []byte{0x80, 0x00}}, // [MQTT-1.5.5-1]
		} {
			t.Run(p.String()+"/property length/"+tt.name, func(t *testing.T) { s.refused(t, p.with(tt.raw), 0x81) })
		}
		well()
	}
}

// propertyIsTaken wants a packet to be accepted, with whatever answer it has.
func propertyIsTaken(t *testing.T, s *server, p place, id byte, packet []byte) {
	t.Helper()
	switch {
	case p == inConnect && id == 21:
		s.refused(t, packet, 0x8C) // there is no enhanced authentication
		return
	case p == inConnect && id == 22:
		s.refused(t, packet, 0x82) // data without a method
		return
	case p == inAuth:
		s.refused(t, packet, 0x81, 0x82)
		return
	case p == inConnect || p == inWill:
		c := s.dial(t, 5)
		c.send(packet)
		if a := c.connack(); a.reason != 0 {
			t.Fatalf("CONNACK: got reason %#x, want success", a.reason)
		}
		c.ping()
		return
	}
	f := connectFields{version: 5, clean: true}
	if p == inDisconnect { // it may change an expiry that there is
		f.props = [][]byte{propU32(17, 60)}
	}
	c, _ := s.connect(t, f)
	c.send(packet)
	switch p {
	case inPublish:
		c.ack(kindPuback, 7)
	case inPubrec:
		if got := c.ack(kindPubrel, 7); got != 0x92 {
			t.Fatalf("PUBREL: got reason %#x, want 0x92", got)
		}
	case inPubrel:
		if got := c.ack(kindPubcomp, 7); got != 0x92 {
			t.Fatalf("PUBCOMP: got reason %#x, want 0x92", got)
		}
	case inSubscribe:
		c.suback(7, 1)
	case inUnsubscribe:
		c.expect(kindUnsuback)
	case inDisconnect:
		c.expectClosed()
		return
	}
	c.ping()
}

// TestTruncated5 cuts every packet at every byte.
func TestTruncated5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-9", "MQTT-3.1.2-17", "MQTT-3.1.2-19", "MQTT-3.1.3-1", "MQTT-3.1.3-3", "MQTT-3.3.2-1", "MQTT-2.2.2-1", "MQTT-4.13.1-1")
	s := start(t)
	well := s.witness(t)
	long := props(propUser("name", "value"))
	tests := []struct {
		name   string
		packet []byte
		from   int   // bytes that must be there to make it MQTT 5
		whole  []int // lengths of the body at which it is a packet too
	}{
		{"CONNECT", connectFields{version: 5, clean: true, id: "truncated", props: [][]byte{propU32(17, 1), propUser("a", "b")},
			will: &willFields{topic: "w", payload: "p", qos: 1, props: [][]byte{propU32(24, 1)}}, user: "u", password: "p"}.frame(), 7, nil},
		{"PUBLISH", frame(kindPublish<<4|2, str("topic"), u16(7), long), 0, nil},
		{"PUBLISH QoS 0", frame(kindPublish<<4, str("topic"), long), 0, nil},
		{"PUBACK", frame(kindPuback<<4, u16(7), []byte{0}, long), 0, []int{2, 3}},
		{"PUBREC", frame(kindPubrec<<4, u16(7), []byte{0}, long), 0, []int{2, 3}},
		{"PUBREL", frame(kindPubrel<<4|2, u16(7), []byte{0}, long), 0, []int{2, 3}},
		{"PUBCOMP", frame(kindPubcomp<<4, u16(7), []byte{0}, long), 0, []int{2, 3}},
		{"SUBSCRIBE", frame(kindSubscribe<<4|2, u16(7), long, str("a"), []byte{1}, str("b/c"), []byte{2}), 0, []int{2 + len(long) + 4}},
		{"UNSUBSCRIBE", frame(kindUnsubscribe<<4|2, u16(7), long, str("a"), str("b/c")), 0, []int{2 + len(long) + 3}},
		{"DISCONNECT", frame(kindDisconnect<<4, []byte{0}, long), 0, []int{0, 1}},
		{"AUTH", frame(kindAuth<<4, []byte{0x18}, props(propStr(21, "x"))), 0, nil},
	}
	for _, tt := range tests {
		body := tt.packet[2:]
		for n := tt.from; n < len(body); n++ {
			if slices.Contains(tt.whole, n) {
				continue
			}
			t.Run(fmt.Sprintf("%s/body of %d bytes", tt.name, n), func(t *testing.T) {
				want := []byte{0x81}
				if tt.packet[0]>>4 == kindAuth {
					want = []byte{0x81, 0x82} // it is an error also when it is whole
				}
				if kind := tt.packet[0] >> 4; (kind == kindSubscribe || kind == kindUnsubscribe) && n == 2+len(long) {
					want = []byte{0x82} // whole, but without a filter
				}
				s.refused(t, frame(tt.packet[0], body[:n]), want...)
			})
		}
		for n := range tt.packet { // the connection ends in the middle of the packet
			c := s.dial(t, 5)
			if tt.packet[0]>>4 != kindConnect {
				c.send(connectFields{version: 5, clean: true}.frame())
				c.connack()
			}
			c.trySend(tt.packet[:n])
			c.drop()
		}
		t.Run(tt.name+"/bytes behind", func(t *testing.T) {
			if kind := tt.packet[0] >> 4; kind != kindPublish && kind != kindAuth { // they would be its payload; it is an error in any case
				s.refused(t, frame(tt.packet[0], body, []byte{0}), 0x81)
			}
		})
		well()
	}
}

// TestFixedHeader5 sends first bytes and remaining lengths that do not exist.
func TestFixedHeader5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-2.1.3-1", "MQTT-3.6.1-1", "MQTT-3.8.1-1", "MQTT-3.10.1-1", "MQTT-3.14.1-1", "MQTT-3.15.1-1", "MQTT-1.5.5-1",
		"MQTT-3.3.1-2", "MQTT-3.3.1-4", "MQTT-4.13.1-1", "MQTT-3.2.2-15")
	s := start(t)
	well := s.witness(t)
	for p := range places {
		if p == inWill || p == inPublish {
			continue
		}
		right := p.with(props())
		for flags := range byte(16) {
			if flags == right[0]&0x0F {
				continue
			}
			t.Run(fmt.Sprintf("%v/flags %x", p, flags), func(t *testing.T) {
				s.refused(t, append([]byte{right[0]&0xF0 | flags}, right[1:]...), 0x81)
			})
		}
	}
	for flags := byte(1); flags < 16; flags++ {
		t.Run(fmt.Sprintf("PINGREQ/flags %x", flags), func(t *testing.T) { s.refused(t, []byte{kindPingreq<<4 | flags, 0}, 0x81) })
	}
	well()
	topic := join(str("t"), u16(7), props())
	for _, tt := range []struct {
		name   string
		packet []byte
		want   []byte
	}{
		{"PUBLISH/QoS 3", frame(0x36, topic), []byte{0x81}},
		{"PUBLISH/QoS 3 and DUP", frame(0x3E, topic), []byte{0x81}},
		{"PUBLISH/QoS 3 and RETAIN", frame(0x37, topic), []byte{0x81}},
		{"PUBLISH/QoS 0 and DUP", frame(0x38, str("t"), props()), []byte{0x81}},
		{"PINGREQ/with a body", frame(kindPingreq<<4, []byte{0}), []byte{0x81}},
		{"type 0", []byte{0, 0}, []byte{0x81, 0x82}},
		{"CONNACK", frame(kindConnack<<4, []byte{0, 0, 0}), []byte{0x82}},
		{"SUBACK", frame(kindSuback<<4, u16(1), props(), []byte{0}), []byte{0x82}},
		{"UNSUBACK", frame(kindUnsuback<<4, u16(1), props(), []byte{0}), []byte{0x82}},
		{"PINGRESP", frame(kindPingresp << 4), []byte{0x82}},
		{"remaining length of five bytes", []byte{kindPublish << 4, 0x80, 0x80, 0x80, 0x80, 0x01}, []byte{0x81}},
		{"remaining length of five bytes, all set", []byte{kindPublish << 4, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}, []byte{0x81}},
		{"remaining length not minimal", []byte{kindPingreq << 4, 0x80, 0x00}, []byte{0x81}},
		{"remaining length not minimal, of four bytes", []byte{kindPingreq << 4, 0x80, 0x80, 0x80, 0x00}, []byte{0x81}},
		{"largest remaining length", []byte{kindPublish << 4, 0xFF, 0xFF, 0xFF, 0x7F}, []byte{0x95}},
		{"one byte too large", append([]byte{kindPublish << 4}, varint(1<<20-3)...), []byte{0x95}},
	} {
		t.Run(tt.name, func(t *testing.T) { s.refused(t, tt.packet, tt.want...) })
	}
	well()
	t.Run("as large as allowed", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, clean: true})
		c.subscribe(0, "large")
		payload := strings.Repeat("x", 1<<20-4-2-5-1)
		f := c.publishFrame(message{topic: "large", payload: payload})
		if len(f) != 1<<20 {
			t.Fatalf("the packet has %d bytes, want %d", len(f), 1<<20)
		}
		c.send(f)
		if m := c.take(); m.payload != payload {
			t.Errorf("got %d bytes of payload, want %d", len(m.payload), len(payload))
		}
	})
	t.Run("CONNECT too large", func(t *testing.T) {
		c := s.dial(t, 5)
		c.trySend([]byte{kindConnect << 4, 0xFF, 0xFF, 0xFF, 0x7F}, str("MQTT"), []byte{5, 2}, u16(0))
		if got := c.end(); len(got) != 1 || got[0].first != kindConnack<<4 || got[0].body[1] != 0x95 {
			t.Errorf("got %v, want CONNACK 0x95 and the connection closed", got)
		}
	})
	well()
}

// TestFields5 sends packets that are whole, with one field that is wrong.
func TestFields5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-2.2.1-3", "MQTT-3.3.2-1", "MQTT-3.3.2-2", "MQTT-3.8.3-1", "MQTT-3.8.3-2", "MQTT-3.8.3-4", "MQTT-3.8.3-5", "MQTT-3.10.3-1", "MQTT-3.10.3-2",
		"MQTT-4.7.0-1", "MQTT-4.7.3-1", "MQTT-4.7.3-2", "MQTT-3.14.2-1", "MQTT-3.4.2-1", "MQTT-3.5.2-1", "MQTT-3.6.2-1", "MQTT-3.7.2-1", "MQTT-4.12.0-7", "MQTT-4.13.1-1")
	s := start(t)
	well := s.witness(t)
	publish := func(topic string, p ...[]byte) []byte { return frame(0x32, str(topic), u16(7), props(p...)) }
	subscribe := func(filter string, options byte) []byte {
		return frame(0x82, u16(7), props(), str(filter), []byte{options})
	}
	type test struct {
		name   string
		packet []byte
		want   []byte
	}
	tests := []test{
		{"PUBLISH/identifier 0", frame(0x32, str("t"), u16(0), props()), []byte{0x82}},
		{"PUBLISH/neither topic nor alias", publish(""), []byte{0x82}},
		{"PUBLISH/alias that is not known", publish("", propU16(35, 3)), []byte{0x82}},
		{"PUBLISH/topic with #", publish("a/#"), []byte{0x90}},
		{"PUBLISH/topic with +", publish("a/+/b"), []byte{0x90}},
		{"PUBLISH/topic with + in a level", publish("a+"), []byte{0x90}},
		{"SUBSCRIBE/identifier 0", frame(0x82, u16(0), props(), str("f"), []byte{0}), []byte{0x82}},
		{"SUBSCRIBE/no filter", frame(0x82, u16(7), props()), []byte{0x82}},
		{"SUBSCRIBE/No Local of a shared subscription", subscribe("$share/g/f", 4), []byte{0x82}},
		{"SUBSCRIBE/subscription identifier of five bytes", frame(0x82, u16(7), props([]byte{11, 0x80, 0x80, 0x80, 0x80, 1}), str("f"), []byte{0}), []byte{0x81}},
		{"SUBSCRIBE/subscription identifier not minimal", frame(0x82, u16(7), props([]byte{11, 0x81, 0}), str("f"), []byte{0}), []byte{0x81}},
		{"UNSUBSCRIBE/identifier 0", frame(0xA2, u16(0), props(), str("f")), []byte{0x82}},
		{"UNSUBSCRIBE/no filter", frame(0xA2, u16(7), props()), []byte{0x82}},
		{"PUBACK/identifier 0", frame(0x40, u16(0)), []byte{0x82}},
		{"PUBREC/identifier 0", frame(0x50, u16(0)), []byte{0x82}},
		{"PUBREL/identifier 0", frame(0x62, u16(0)), []byte{0x82}},
		{"PUBCOMP/identifier 0", frame(0x70, u16(0)), []byte{0x82}},
		{"AUTH/without a method in CONNECT", frame(0xF0), []byte{0x82}},
		{"AUTH/continue", frame(0xF0, []byte{0x18}, props(propStr(21, "x"))), []byte{0x82}},
	}
	for _, bad := range badText {
		tests = append(tests,
			test{"PUBLISH/topic with " + bad.name, publish(bad.text), []byte{0x81}},
			test{"SUBSCRIBE/filter with " + bad.name, subscribe(bad.text, 0), []byte{0x81}},
			test{"UNSUBSCRIBE/filter with " + bad.name, frame(0xA2, u16(7), props(), str(bad.text)), []byte{0x81}})
	}
	// All that subscription options can be (3.8.3.1).
	for options := range 256 {
		name := fmt.Sprintf("SUBSCRIBE/options %#x", options)
		switch {
		case options&0xC0 != 0:
			tests = append(tests, test{name, subscribe("f", byte(options)), []byte{0x81}})
		case options&3 == 3 || options&0x30 == 0x30:
			tests = append(tests, test{name, subscribe("f", byte(options)), []byte{0x82}})
		default:
			t.Run(name, func(t *testing.T) {
				c, _ := s.connect(t, connectFields{version: 5, clean: true})
				if codes := c.subscribe(byte(options), "f"); codes[0] != byte(options)&3 {
					t.Errorf("got reason code %#x, want %#x", codes[0], options&3)
				}
			})
		}
	}
	// Reason codes that a packet cannot have (2.4).
	for kind, list := range map[byte][]byte{
		kindPuback:     {0x01, 0x11, 0x81, 0x92, 0xFF},
		kindPubrec:     {0x01, 0x11, 0x81, 0x92, 0xFF},
		kindPubrel:     {0x01, 0x10, 0x80, 0x91, 0xFF},
		kindPubcomp:    {0x01, 0x10, 0x80, 0x91, 0xFF},
		kindDisconnect: {0x01, 0x18, 0x84, 0x87, 0x8E, 0x92, 0xFF},
	} {
		for _, reason := range list {
			packet := frame(kind<<4, u16(7), []byte{reason})
			switch kind {
			case kindPubrel:
				packet[0] |= 2
			case kindDisconnect:
				packet = frame(kind<<4, []byte{reason})
			}
			tests = append(tests, test{fmt.Sprintf("kind %d/reason code %#x", kind, reason), packet, []byte{0x82}})
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { s.refused(t, tt.packet, tt.want...) })
	}
	well()
	// And those that it can have.
	for kind, list := range map[byte][]byte{
		kindPuback:     {0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99},
		kindPubrec:     {0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99},
		kindPubrel:     {0x00, 0x92},
		kindPubcomp:    {0x00, 0x92},
		kindDisconnect: {0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99},
	} {
		for _, reason := range list {
			t.Run(fmt.Sprintf("kind %d/reason code %#x is taken", kind, reason), func(t *testing.T) {
				c, _ := s.connect(t, connectFields{version: 5, clean: true})
				switch kind {
				case kindDisconnect:
					c.send(frame(kind<<4, []byte{reason}))
					c.expectClosed()
					return
				case kindPubrel:
					c.send(frame(kind<<4|2, u16(7), []byte{reason}))
					c.ack(kindPubcomp, 7)
				default:
					c.send(frame(kind<<4, u16(7), []byte{reason}))
					if kind == kindPubrec && reason < 0x80 {
						c.ack(kindPubrel, 7)
					}
				}
				c.ping()
			})
		}
	}
	well()
}

// TestFirstPacket5 sends something else than a CONNECT first, and a CONNECT
// twice.
func TestFirstPacket5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.0-1", "MQTT-3.1.0-2", "MQTT-3.14.0-1", "MQTT-3.2.0-1", "MQTT-3.2.0-2")
	s := start(t)
	well := s.witness(t)
	for kind := range byte(16) {
		if kind == kindConnect {
			continue
		}
		t.Run(fmt.Sprintf("kind %d first", kind), func(t *testing.T) {
			for _, packet := range [][]byte{{kind << 4, 0}, {kind<<4 | 2, 2, 0, 1}} {
				c := s.dial(t, 5)
				c.trySend(packet)
				c.expectClosed()
			}
		})
	}
	t.Run("second CONNECT", func(t *testing.T) {
		for _, clean := range []bool{false, true} {
			f := connectFields{version: 5, clean: clean, id: "twice"}
			c, _ := s.connect(t, f)
			c.send(f.frame())
			if got := c.end(); len(got) != 1 || got[0].first != kindDisconnect<<4 || got[0].body[0] != 0x82 {
				t.Errorf("got %v, want only DISCONNECT 0x82", got)
			}
		}
	})
	well()
}
