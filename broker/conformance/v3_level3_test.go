package conformance

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

// MQTT 3.1 (MQIsdp, level 3) has no numbered statements. These tests hold what
// its text says where it is not what MQTT 3.1.1 says.

// connectLevel3 is a CONNECT of MQTT 3.1 whose flags and payload need not fit.
func connectLevel3(flags byte, payload ...[]byte) []byte {
	return frame(kindConnect<<4, str("MQIsdp"), []byte{3, flags}, u16(0), join(payload...))
}

func level3(t testing.TB, s *server, id string, clean bool) *client {
	t.Helper()
	c, a := s.connect(t, connectFields{version: 3, clean: clean, id: id})
	if a.present {
		t.Errorf("session present is set, which MQTT 3.1 does not know")
	}
	return c
}

func TestLevel3ReturnCodes(t *testing.T) {
	t.Parallel()
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		device(t, db, "pump", "secret")
		credential(t, db, "torn", "this is no hash")
		return nil
	}, func(c *broker.Config) { c.Anonymous = "none" })
	login := func(id, user, password string) []byte {
		return connectLevel3(0xC2, str(id), str(user), str(password))
	}
	s.returns(t, 2, login("", "pump", "secret")) // with or without a clean session
	s.returns(t, 2, connectLevel3(0xC0, str(""), str("pump"), str("secret")))
	s.returns(t, 3, login("c", "torn", "x"))
	s.returns(t, 4, login("c", "pump", "x"))
	s.returns(t, 5, connectLevel3(2, str("c")))
	c := s.dial(t, 3)
	c.send(login("c", "pump", "secret"))
	c.expectFrame([]byte{0x20, 2, 0, 0})
}

// The remaining length wins over the flags of user name and password: clients
// of the first MQTT 3 set them and send none.
func TestLevel3MissingLogin(t *testing.T) {
	t.Parallel()
	s := start(t)
	for what, b := range map[string][]byte{
		"no user name":              connectLevel3(0x82, str("c")),
		"no user name, no password": connectLevel3(0xC2, str("c")),
		"behind a will":             connectLevel3(0xC6, str("c"), str("will"), str("x")),
	} {
		t.Run(what, func(t *testing.T) {
			c := s.dial(t, 3)
			c.send(b)
			if a := c.connack(); a.reason != 0 {
				t.Errorf("got return code %d, want 0", a.reason)
			}
		})
	}
	s.returns(t, 4, connectLevel3(0xC2, str("c"), str("nobody"))) // there is a user name
}

// Client identifiers longer than the 23 characters of MQTT 3.1 are taken: many
// clients have them, and none is harmed.
func TestLevel3ClientIDs(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, id := range []string{"a", strings.Repeat("b", 23), strings.Repeat("c", 24), strings.Repeat("d", 1000)} {
		level3(t, s, id, true).ping()
	}
}

// The clean session flag as in MQTT 3.1.1, but session present is not known.
func TestLevel3Session(t *testing.T) {
	t.Parallel()
	s := start(t)
	c := level3(t, s, "c", false)
	c.subscribe(2, "a")
	c.disconnect()
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 0 })
	p := level3(t, s, "p", true)
	for qos := byte(1); qos < 3; qos++ {
		p.publish(message{topic: "a", qos: qos, payload: fmt.Sprint(qos)})
	}
	c = s.dial(t, 3)
	c.send(connectFields{version: 3, id: "c"}.frame())
	c.expectFrame([]byte{0x20, 2, 0, 0}) // the first byte is reserved
	one, two := c.receive(), c.receive()
	if one.payload != "1" || two.payload != "2" || one.dup || two.dup {
		t.Errorf("got %+v and %+v", one, two)
	}
	c.drop()
	c = level3(t, s, "c", false)
	if m := c.take(); m.id != one.id || !m.dup {
		t.Errorf("got %+v, want %+v again", m, one)
	}
	if m := c.take(); m.id != two.id || !m.dup {
		t.Errorf("got %+v, want %+v again", m, two)
	}
	c.drop()
	c = level3(t, s, "c", true)
	p.publish(message{topic: "a", qos: 1, payload: "x"})
	c.silent()
}

// DUP is set when a PUBREL, a SUBSCRIBE or an UNSUBSCRIBE is sent again, and
// the flags of other packets are not used, so they are not looked at.
func TestLevel3Flags(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, b := range [][]byte{connectLevel3(2, str("c")), connectLevel3(3, str("c"))} {
		for flags := range byte(16) {
			c := s.dial(t, 3)
			c.send([]byte{b[0] | flags}, b[1:])
			if a := c.connack(); a.reason != 0 {
				t.Errorf("CONNECT with %#x: got return code %d", b[0]|flags, a.reason)
			}
		}
	}
	c := level3(t, s, "c", true)
	for _, first := range []byte{0x82, 0x8A} {
		c.send(frame(first, u16(5), str("a"), []byte{2}))
		c.expectFrame(frame(0x90, u16(5), []byte{2}))
	}
	c.send(c.publishFrame(message{topic: "a", qos: 2, id: 6, payload: "once"}))
	c.ack(kindPubrec, 6)
	for _, first := range []byte{0x62, 0x6A} {
		c.send(frame(first, u16(6)))
		c.ack(kindPubcomp, 6)
	}
	m := c.receive()
	c.send(frame(0x58, u16(m.id)))
	c.ack(kindPubrel, m.id)
	c.send(frame(0x78, u16(m.id)))
	c.publish(message{topic: "a", qos: 1, payload: "one"})
	m = c.receive()
	c.send(frame(0x48, u16(m.id)))
	for _, first := range []byte{0xA2, 0xAA} {
		c.send(frame(first, u16(7), str("a")))
		c.expectFrame(frame(0xB0, u16(7)))
	}
	c.send([]byte{0xC8, 0})
	c.expectFrame([]byte{0xD0, 0})
	c.silent()
	c.send([]byte{0xE8, 0})
	c.expectClosed()
}

// A subscription that is not allowed is acknowledged like any other: MQTT 3.1
// has no code for a refusal.
func TestLevel3SubscribeRefused(t *testing.T) {
	t.Parallel()
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "subscribe", Filter: "no/#"}))
	c := level3(t, s, "c", true)
	if codes := c.subscribe(1, "a", "no/a", "b"); !bytes.Equal(codes, []byte{1, 1, 1}) {
		t.Errorf("got % x, want 01 01 01", codes)
	}
	c.publish(message{topic: "no/a", qos: 1, payload: "x"})
	c.silent()
}

// What is malformed in MQTT 3.1.1 is so in MQTT 3.1, where it says anything.
func TestLevel3Malformed(t *testing.T) {
	t.Parallel()
	s := start(t)
	for what, b := range map[string][]byte{
		"second CONNECT":          connectLevel3(2, str("refused")),
		"type 0":                  {0, 0},
		"type 15":                 {0xF0, 0},
		"CONNACK":                 {0x20, 2, 0, 0},
		"PUBLISH, QoS 3":          frame(0x36, str("a"), u16(1)),
		"PUBLISH, identifier 0":   frame(0x32, str("a"), u16(0)),
		"PUBLISH, wildcard":       frame(0x30, str("a/#")),
		"PUBLISH, no topic":       frame(0x30, str("")),
		"PUBLISH cut short":       frame(0x30, str("abc")[:3]),
		"PUBACK cut short":        frame(0x40, []byte{1}),
		"SUBSCRIBE, identifier 0": frame(0x82, u16(0), str("a"), []byte{0}),
		"SUBSCRIBE of nothing":    frame(0x82, u16(1)),
		"SUBSCRIBE, QoS 3":        frame(0x82, u16(1), str("a"), []byte{3}),
		"SUBSCRIBE cut short":     frame(0x82, u16(1), str("a")),
		"UNSUBSCRIBE of nothing":  frame(0xA2, u16(1)),
	} {
		s.refusedAs(t, 3, what, b)
	}
	full := connectFields{version: 3, clean: true, id: "c", user: "u", password: "p", will: &willFields{topic: "will", payload: "x", qos: 1}}.frame()[2:]
	whole := len(full) - len(str("u")) - len(str("p"))
	for n := range whole {
		s.closedWithout(t, fmt.Sprintf("CONNECT cut to %d bytes", n), frame(kindConnect<<4, full[:n]))
	}
	for what, b := range map[string][]byte{
		"will QoS 3":                        connectLevel3(0x1E, str("c"), str("will"), str("x")),
		"will topic with a wildcard":        connectLevel3(6, str("c"), str("will/+"), str("x")),
		"user name without end":             connectLevel3(0x82, str("c"), str("user")[:4]),
		"password without end":              connectLevel3(0xC2, str("c"), str("user"), str("password")[:4]),
		"client identifier that is no text": connectLevel3(2, str("a\xFF")),
	} {
		s.closedWithout(t, what, b)
	}
}

func TestLevel3Will(t *testing.T) {
	t.Parallel()
	s := start(t)
	w := level3(t, s, "watcher", true)
	w.subscribe(2, "will")
	for qos := range byte(3) {
		f := connectFields{version: 3, clean: true, id: "c", will: &willFields{topic: "will", payload: "gone", qos: qos}}
		c, _ := s.connect(t, f)
		c.disconnect()
		c, _ = s.connect(t, f)
		c.drop()
		if m := w.take(); m.payload != "gone" || m.qos != qos || m.retain {
			t.Errorf("got %+v, want the will at QoS %d", m, qos)
		}
	}
	w.silent()
}

// The three versions meet: each gets what the others publish, in its own form.
func TestLevel3MeetsOthers(t *testing.T) {
	t.Parallel()
	s := start(t)
	var all []*client
	for _, version := range []byte{3, 4, 5} {
		c, _ := s.connect(t, connectFields{version: version, clean: true, id: fmt.Sprint("c", version)})
		c.subscribe(2, "a")
		all = append(all, c)
	}
	for _, p := range all {
		for qos := range byte(3) {
			m := message{topic: "a", qos: qos, payload: fmt.Sprint(p.version, qos)}
			if p.version == 5 {
				m.raw = [][]byte{propUser("k", "v"), propStr(3, "text")}
			}
			p.publish(m)
			for _, c := range all {
				got := c.take()
				if got.payload != m.payload || got.qos != qos || got.topic != "a" {
					t.Errorf("version %d to %d: got %+v, want %+v", p.version, c.version, got, m)
				}
				if want := p.version == 5 && c.version == 5; want != (len(got.props) == 2) {
					t.Errorf("version %d to %d: got properties %v", p.version, c.version, got.props)
				}
			}
		}
	}
}
