package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/broker"
	"penstock/internal/units"
	"penstock/storage"
)

// TestConnectFlags5 sends CONNECT packets with each protocol name, version and
// combination of flags.
func TestConnectFlags5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-1", "MQTT-3.1.2-2", "MQTT-3.1.2-3", "MQTT-3.1.2-9", "MQTT-3.1.2-11", "MQTT-3.1.2-12", "MQTT-3.1.2-13",
		"MQTT-3.1.2-16", "MQTT-3.1.2-17", "MQTT-3.1.2-18", "MQTT-3.1.2-19", "MQTT-3.1.4-1", "MQTT-3.1.4-5", "MQTT-3.2.2-1", "MQTT-3.2.2-8")
	s := start(t, func(c *broker.Config) { c.Anonymous = "all" })
	well := s.witness(t)
	connect := func(name string, version, flags byte, tail ...[]byte) []byte {
		return frame(kindConnect<<4, append([][]byte{str(name), {version, flags}, u16(0), props(), str("")}, tail...)...)
	}
	for _, name := range []string{"", "M", "mqtt", "MQTTT", "MQT", "HTTP"} {
		t.Run("protocol name "+name, func(t *testing.T) { // [MQTT-3.1.2-1]: an answer is allowed
			c := s.dial(t, 5)
			c.trySend(connect(name, 5, 2))
			if got := c.end(); len(got) > 1 || len(got) == 1 && (got[0].first != kindConnack<<4 || got[0].body[1] != 0x84) {
				t.Errorf("got %v, want the connection closed, be it after CONNACK 0x84", got)
			}
		})
	}
	for _, version := range []byte{6, 7, 127, 255} {
		t.Run(fmt.Sprintf("protocol version %d", version), func(t *testing.T) { s.refused(t, connect("MQTT", version, 2), 0x84) })
	}
	for _, version := range []byte{0, 1, 2} { // their CONNACK is not ours to know
		t.Run(fmt.Sprintf("protocol version %d", version), func(t *testing.T) {
			c := s.dial(t, 5)
			c.trySend(connect("MQTT", version, 2))
			for _, p := range c.end() {
				if p.kind() != kindConnack || p.body[1] == 0 {
					t.Errorf("got %v, want a refusal", p)
				}
			}
		})
	}
	well()
	for flags := range 256 {
		flags := byte(flags)
		var tail [][]byte
		if flags&4 != 0 {
			tail = append(tail, props(), str("will/topic"), str("payload"))
		}
		if flags&0x80 != 0 {
			tail = append(tail, str("nobody"))
		}
		if flags&0x40 != 0 {
			tail = append(tail, str("secret"))
		}
		want := byte(0)
		switch {
		case flags&1 != 0, flags&4 == 0 && flags&0x38 != 0, flags&0x18 == 0x18:
			want = 0x81
		case flags&0x80 != 0:
			want = 0x86 // there is no such user
		}
		t.Run(fmt.Sprintf("flags %08b", flags), func(t *testing.T) {
			if want != 0 {
				s.refused(t, connect("MQTT", 5, flags, tail...), want)
				return
			}
			c := s.dial(t, 5)
			c.send(connect("MQTT", 5, flags, tail...))
			if a := c.connack(); a.reason != 0 {
				t.Fatalf("CONNACK: got reason %#x, want success", a.reason)
			}
			c.ping()
			c.disconnect()
		})
	}
	well()
	for _, tt := range []struct {
		name  string
		flags byte
		tail  [][]byte
	}{
		{"user name without its flag", 2, [][]byte{str("user")}},
		{"password without its flag", 2 | 0x80, [][]byte{str("user"), str("password")}},
		{"user name flag alone", 2 | 0x80, nil},
		{"password flag alone", 2 | 0x40, nil},
		{"both flags, one field", 2 | 0xC0, [][]byte{str("user")}},
		{"will flag alone", 2 | 4, nil},
		{"will without a payload", 2 | 4, [][]byte{props(), str("topic")}},
		{"will without properties", 2 | 4, [][]byte{str("topic"), str("payload")}},
		{"will without its flag", 2, [][]byte{props(), str("topic"), str("payload")}},
	} {
		t.Run(tt.name, func(t *testing.T) { s.refused(t, connect("MQTT", 5, tt.flags, tt.tail...), 0x81) })
	}
	well()
}

// TestConnectText5 sends strings in a CONNECT that are none.
func TestConnectText5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.3-4", "MQTT-3.1.3-11", "MQTT-3.1.3-12", "MQTT-1.5.4-1", "MQTT-1.5.4-2", "MQTT-4.7.3-1", "MQTT-4.7.0-1")
	s := start(t)
	well := s.witness(t)
	for _, bad := range badText {
		t.Run("client identifier/"+bad.name, func(t *testing.T) {
			s.refused(t, connectFields{version: 5, clean: true, id: bad.text}.frame(), 0x81)
		})
		t.Run("user name/"+bad.name, func(t *testing.T) {
			s.refused(t, connectFields{version: 5, clean: true, user: bad.text}.frame(), 0x81)
		})
		t.Run("will topic/"+bad.name, func(t *testing.T) {
			s.refused(t, connectFields{version: 5, clean: true, will: &willFields{topic: bad.text}}.frame(), 0x81)
		})
	}
	for _, topic := range []string{"", "#", "a/#", "+", "a/+/b"} {
		t.Run("will topic/"+topic, func(t *testing.T) {
			s.refused(t, connectFields{version: 5, clean: true, will: &willFields{topic: topic}}.frame(), 0x90)
		})
	}
	well()
}

// TestClientIdentifier5 checks which identifiers are taken, and that one is
// made where there is none.
func TestClientIdentifier5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.3-2", "MQTT-3.1.3-3", "MQTT-3.1.3-5", "MQTT-3.1.3-6", "MQTT-3.1.3-7", "MQTT-3.1.3-8", "MQTT-3.2.2-16", "MQTT-1.5.4-3")
	s := start(t)
	for _, id := range []string{"a", "0123456789abcdefghijklm", "nopqrstuvwxyzABCDEFGHIJ", "KLMNOPQRSTUVWXYZ",
		strings.Repeat("x", 200), "with space/#+$", "übung\U0001F980", "\uFEFFbom", "bom"} {
		t.Run("taken/"+id, func(t *testing.T) {
			c, a := s.connect(t, connectFields{version: 5, id: id, props: [][]byte{propU32(17, 60)}})
			if _, ok := find(t, a.props, 18); ok || a.present {
				t.Errorf("got session present %v, assigned %v; want a new session and no other identifier", a.present, ok)
			}
			c.disconnect()
			_, a = s.connect(t, connectFields{version: 5, id: id, props: [][]byte{propU32(17, 60)}})
			if !a.present {
				t.Error("the session was not found again")
			}
		})
	}
	t.Run("assigned", func(t *testing.T) {
		seen := map[string]bool{}
		for i := range 20 {
			c, a := s.connect(t, connectFields{version: 5, clean: i%2 == 0, props: [][]byte{propU32(17, 60)}})
			p, ok := find(t, a.props, 18)
			if !ok || p.text == "" || seen[p.text] || a.present {
				t.Fatalf("got assigned identifier %q (%v), session present %v; want a new one", p.text, ok, a.present)
			}
			seen[p.text] = true
			if i > 0 {
				continue
			}
			c.disconnect() // as if the client had sent it
			c, a = s.connect(t, connectFields{version: 5, id: p.text, props: [][]byte{propU32(17, 60)}})
			if !a.present {
				t.Error("the session of the assigned identifier was not found again")
			}
			c.ping()
		}
	})
	t.Run("65535 bytes", func(t *testing.T) { // it may be refused, but then in words
		c := s.dial(t, 5)
		c.send(connectFields{version: 5, clean: true, id: strings.Repeat("x", 65535)}.frame())
		if a := c.connack(); a.reason != 0 && a.reason != 0x85 {
			t.Errorf("CONNACK: got reason %#x, want success or 0x85", a.reason)
		}
	})
}

// TestSession5 checks Clean Start, Session Present and the Session Expiry
// Interval.
func TestSession5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-4", "MQTT-3.1.2-5", "MQTT-3.1.2-6", "MQTT-3.1.2-23", "MQTT-3.1.4-4", "MQTT-3.2.2-2", "MQTT-3.2.2-3", "MQTT-3.2.2-6",
		"MQTT-4.1.0-1", "MQTT-4.1.0-2", "MQTT-4.5.0-1")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true, id: "pub"})
	keep := [][]byte{propU32(17, 600)}
	c, a := s.connect(t, connectFields{version: 5, id: "sess", props: keep})
	if a.present {
		t.Error("a session was present that nobody made")
	}
	c.subscribe(1, "t")
	c.disconnect()
	pub.publish(message{topic: "t", payload: "while away", qos: 1})
	c, a = s.connect(t, connectFields{version: 5, id: "sess", props: keep})
	if !a.present {
		t.Error("session was not kept")
	}
	c.takePayloads("while away")
	pub.publish(message{topic: "t", payload: "still subscribed", qos: 1})
	c.takePayloads("still subscribed")
	c.disconnect()

	c, a = s.connect(t, connectFields{version: 5, id: "sess", clean: true, props: keep})
	if a.present {
		t.Error("Clean Start left the session")
	}
	pub.publish(message{topic: "t", payload: "lost", qos: 1})
	c.ping()
	if len(c.stash) > 0 {
		t.Error("Clean Start left a subscription")
	}
	c.disconnect()

	t.Run("expiry 0 ends with the connection", func(t *testing.T) {
		for _, p := range [][][]byte{nil, {propU32(17, 0)}} {
			c, _ := s.connect(t, connectFields{version: 5, id: "short", props: p})
			c.subscribe(1, "t")
			c.drop()
			eventually(t, "session ends", func() bool {
				c, a := s.connect(t, connectFields{version: 5, id: "short", props: p})
				c.disconnect()
				return !a.present
			})
		}
	})
	t.Run("expiry of the last CONNECT counts", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, id: "last", props: keep})
		c.disconnect()
		c, a := s.connect(t, connectFields{version: 5, id: "last"})
		if !a.present {
			t.Error("session was not kept")
		}
		c.disconnect()
		if _, a = s.connect(t, connectFields{version: 5, id: "last"}); a.present {
			t.Error("session was kept beyond an expiry of 0")
		}
	})
	t.Run("DISCONNECT changes it", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, id: "changes", props: keep})
		c.send(frame(kindDisconnect<<4, []byte{0}, props(propU32(17, 0))))
		c.expectClosed()
		if _, a := s.connect(t, connectFields{version: 5, id: "changes"}); a.present {
			t.Error("DISCONNECT with an expiry of 0 left the session")
		}
	})
	t.Run("DISCONNECT lengthens it", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, id: "longer", props: [][]byte{propU32(17, 1)}})
		c.send(frame(kindDisconnect<<4, []byte{0}, props(propU32(17, 600))))
		c.expectClosed()
		clock, _ := s.connect(t, connectFields{version: 5, id: "clock", props: [][]byte{propU32(17, 1)}})
		clock.disconnect()
		before := s.b.Stats().Sessions
		eventually(t, "another session expires", func() bool { return s.b.Stats().Sessions < before })
		if _, a := s.connect(t, connectFields{version: 5, id: "longer"}); !a.present {
			t.Error("session was not kept")
		}
	})
	t.Run("DISCONNECT cannot raise it from 0", func(t *testing.T) {
		c, _ := s.connect(t, connectFields{version: 5, id: "raise"})
		c.send(frame(kindDisconnect<<4, []byte{0}, props(propU32(17, 1))))
		c.expectDisconnect(0x82)
	})
	t.Run("never while connected, and 1 s after", func(t *testing.T) {
		short := [][]byte{propU32(17, 1)}
		stays, _ := s.connect(t, connectFields{version: 5, id: "stays", props: short})
		stays.subscribe(1, "t")
		goes, _ := s.connect(t, connectFields{version: 5, id: "goes", props: short})
		goes.disconnect()
		before := s.b.Stats().Sessions
		eventually(t, "session expires", func() bool { return s.b.Stats().Sessions < before })
		if _, a := s.connect(t, connectFields{version: 5, id: "goes", props: short}); a.present {
			t.Error("an expired session was present")
		}
		pub.publish(message{topic: "t", payload: "after", qos: 1})
		stays.takePayloads("after")
	})
	t.Run("4294967295 is for ever", func(t *testing.T) {
		c, a := s.connect(t, connectFields{version: 5, id: "ever", props: [][]byte{propU32(17, uint32(0xFFFFFFFF))}})
		p, ok := find(t, a.props, 17)
		if !ok || p.num != 30*24*3600 {
			t.Errorf("CONNACK: got session expiry interval %v %v, want the 30 days that the configuration allows", ok, p.num)
		}
		c.disconnect()
		if _, a := s.connect(t, connectFields{version: 5, id: "ever"}); !a.present {
			t.Error("session was not kept")
		}
	})
}

// TestConnack5 checks what a CONNACK says of the broker, and that it is true.
func TestConnack5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.4-5", "MQTT-3.2.0-1", "MQTT-3.2.2-1", "MQTT-3.2.2-9", "MQTT-3.2.2-10", "MQTT-3.2.2-12", "MQTT-3.2.2-13",
		"MQTT-3.2.2-22", "MQTT-4.12.0-6", "MQTT-3.1.2-28")
	s := start(t, func(c *broker.Config) { c.ReceiveMaximum, c.MaxPacket = 7, 5000 })
	_, a := s.connect(t, connectFields{version: 5, clean: true, id: "x", keepAlive: 60, props: [][]byte{propByte(25, 0)}})
	got := map[byte]int{}
	for _, p := range a.props {
		find(t, a.props, p.id)
		got[p.id] = p.num
	}
	if got[33] != 7 || got[39] != 5000 || got[34] < 1 {
		t.Errorf("got Receive Maximum %d, Maximum Packet Size %d, Topic Alias Maximum %d; want 7, 5000 and some", got[33], got[39], got[34])
	}
	for _, id := range []byte{36, 18, 21, 22, 26, 28, 31, 19, 17} {
		if v, ok := got[id]; ok {
			t.Errorf("property %d is there (%d), without a reason", id, v)
		}
	}
	for _, id := range []byte{37, 40, 41, 42} { // retained messages, wildcards, identifiers, shared: available
		if v, ok := got[id]; ok && v != 1 {
			t.Errorf("property %d: got %d, want 1, or nothing", id, v)
		}
	}
	c, _ := s.connect(t, connectFields{version: 5, clean: true, will: &willFields{topic: "w", qos: 2, retain: true}})
	for qos := range byte(3) {
		if codes := c.subscribe(qos, "q"); codes[0] != qos {
			t.Errorf("QoS %d: granted %#x", qos, codes[0])
		}
	}
	for alias := 1; alias <= got[34]; alias++ {
		c.send(c.publishFrame(message{topic: "q", payload: "alias", raw: [][]byte{propU16(35, alias)}}))
	}
	c.ping()
	c.send(c.publishFrame(message{topic: "q", raw: [][]byte{propU16(35, got[34]+1)}}))
	c.expectDisconnect(0x94)
}

// TestAuthentication5 checks who is let in.
func TestAuthentication5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.4-2", "MQTT-3.1.4-6", "MQTT-3.2.2-6", "MQTT-3.2.2-7", "MQTT-4.12.0-1", "MQTT-4.12.0-4", "MQTT-3.1.2-18", "MQTT-3.1.2-19")
	hash, err := broker.HashPassword("right")
	if err != nil {
		t.Fatal(err)
	}
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		return db.PutCredential(context.Background(), storage.Credential{Username: "user", Hash: hash, Created: time.Now()}, true)
	}, func(c *broker.Config) { c.Anonymous = "none" })
	for _, tt := range []struct {
		name string
		f    connectFields
		want byte
	}{
		{"right", connectFields{user: "user", password: "right"}, 0},
		{"wrong password", connectFields{user: "user", password: "wrong"}, 0x86},
		{"empty password", connectFields{user: "user"}, 0x86},
		{"unknown user", connectFields{user: "nobody", password: "right"}, 0x86},
		{"no user", connectFields{}, 0x87},
		{"enhanced authentication", connectFields{user: "user", password: "right", props: [][]byte{propStr(21, "SCRAM-SHA-256")}}, 0x8C},
		{"enhanced authentication with data", connectFields{props: [][]byte{propStr(21, "x"), propStr(22, "y")}}, 0x8C},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.f.version, tt.f.clean, tt.f.id = 5, true, "auth"
			c := s.dial(t, 5)
			// What comes behind a CONNECT that is refused is not processed.
			c.send(tt.f.frame(), c.publishFrame(message{topic: "ghost", payload: tt.name, retain: true, qos: 1, id: 1}))
			a := c.connack()
			if a.reason != tt.want || a.present {
				t.Fatalf("CONNACK: got reason %#x, session present %v; want %#x", a.reason, a.present, tt.want)
			}
			if tt.want != 0 {
				c.expectClosed()
			} else {
				c.ack(kindPuback, 1)
			}
		})
	}
	c, _ := s.connect(t, connectFields{version: 5, clean: true, user: "user", password: "right"})
	c.subscribe(1, "ghost")
	if m := c.take(); m.payload != "right" {
		t.Errorf("got the message of %q, which was refused", m.payload)
	}
}

// TestTakeover5 connects a client identifier that is connected.
func TestTakeover5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.4-3", "MQTT-3.14.4-1", "MQTT-3.14.4-2", "MQTT-4.13.2-1", "MQTT-3.14.2-2")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	keep := [][]byte{propU32(17, 600)}
	old, _ := s.connect(t, connectFields{version: 5, id: "twin", props: keep})
	old.subscribe(1, "t")
	for i := range 3 {
		next, a := s.connect(t, connectFields{version: 5, id: "twin", props: keep})
		if !a.present {
			t.Error("session was lost in a takeover")
		}
		got := old.end()
		if len(got) != 1 || got[0].first != kindDisconnect<<4 || got[0].body[0] != 0x8E {
			t.Fatalf("got %v, want DISCONNECT 0x8E", got)
		}
		if b := (body{t, got[0].body[1:]}); len(b.b) > 0 {
			if _, ok := find(t, b.props(), 17); ok {
				t.Error("the broker's DISCONNECT has a Session Expiry Interval")
			}
		}
		pub.publish(message{topic: "t", payload: fmt.Sprint(i), qos: 1})
		next.takePayloads(fmt.Sprint(i))
		next.ping() // the acknowledgement has arrived
		old = next
	}
}

// TestKeepAlive5 lets the Keep Alive pass.
func TestKeepAlive5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-22", "MQTT-3.12.4-1", "MQTT-3.1.2-8", "MQTT-3.14.4-1")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(0, "gone")
	c, _ := s.connect(t, connectFields{version: 5, clean: true, keepAlive: 1, will: &willFields{topic: "gone", payload: "kept not alive"}})
	began := time.Now()
	c.ping()
	c.expectDisconnect(0x8D)
	if took := time.Since(began); took < 1500*time.Millisecond {
		t.Errorf("closed after %v, want one and a half times the Keep Alive", took)
	}
	watch.takePayloads("kept not alive")
}

// TestDisconnect5 checks what a DISCONNECT of the broker is, and what it makes
// of a client's.
func TestDisconnect5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.14.4-1", "MQTT-3.14.4-2", "MQTT-3.14.4-3", "MQTT-3.14.2-1", "MQTT-3.1.2-10", "MQTT-3.14.2-2")
	s := start(t)
	watch, _ := s.connect(t, connectFields{version: 5, clean: true})
	watch.subscribe(0, "will/#", "after")
	for _, reason := range []byte{0x00, 0x04, 0x80, 0x81, 0x99} {
		will := &willFields{topic: "will/x", payload: fmt.Sprint(reason)}
		c, _ := s.connect(t, connectFields{version: 5, clean: true, will: will})
		// Nothing counts behind a DISCONNECT.
		c.send(frame(kindDisconnect<<4, []byte{reason}), c.publishFrame(message{topic: "after", payload: "behind"}))
		c.expectClosed()
		if reason != 0 {
			watch.takePayloads(fmt.Sprint(reason))
		}
	}
	watch.ping()
	if len(watch.stash) > 0 {
		t.Errorf("got %v, want nothing", watch.stash)
	}
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	s.stop()
	c.expectDisconnect(0x8B)
}

// TestAcknowledgementTooLarge5 asks for acknowledgements that do not fit into
// the Maximum Packet Size, also without their reason strings.
func TestAcknowledgementTooLarge5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-24")
	s := start(t)
	for _, kind := range []byte{kindSubscribe, kindUnsubscribe} {
		c, _ := s.connect(t, connectFields{version: 5, clean: true, id: "m", props: [][]byte{propU32(39, 60)}})
		parts := [][]byte{u16(1), props()}
		for i := range 100 {
			parts = append(parts, str(fmt.Sprint("f", i)))
			if kind == kindSubscribe {
				parts = append(parts, []byte{1})
			}
		}
		c.send(frame(kind<<4|2, parts...))
		got := c.end()
		if len(got) != 1 || got[0].first != kindDisconnect<<4 || got[0].body[0] != 0x95 || len(got[0].body) > 58 {
			t.Errorf("packet type %d: got %v, want DISCONNECT 0x95 that fits", kind, got)
		}
	}
}

// TestMaximumPacketSize5 connects with every small Maximum Packet Size, and
// wants no packet that is larger.
func TestMaximumPacketSize5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-24", "MQTT-3.1.2-25", "MQTT-3.2.2-19", "MQTT-3.2.2-20", "MQTT-3.14.2-3", "MQTT-3.14.2-4", "MQTT-3.4.2-2", "MQTT-3.4.2-3",
		"MQTT-3.5.2-2", "MQTT-3.5.2-3", "MQTT-3.6.2-2", "MQTT-3.6.2-3", "MQTT-3.7.2-2", "MQTT-3.7.2-3", "MQTT-3.9.2-1", "MQTT-3.9.2-2", "MQTT-3.11.2-1", "MQTT-3.11.2-2")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		return db.ReplaceACLRules(context.Background(), []storage.ACLRule{{Action: "any", Filter: "no/#"}})
	})
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	for size := 1; size < 120; size++ {
		c := s.dial(t, 5)
		c.trySend(connectFields{version: 5, clean: true, id: "m", props: [][]byte{propU32(39, size), propByte(25, 1)}}.frame(),
			c.subscribeFrame(1, 1, []string{"t", "no/x", "a/#/b"}),
			c.publishFrame(message{topic: "no/x", qos: 1, id: 2}), c.publishFrame(message{topic: "no/x", qos: 2, id: 3}),
			pubrelFrame(9), ackFrame(kindPubrec, 9), frame(kindUnsubscribe<<4|2, u16(4), props(), str("none")),
			c.publishFrame(message{topic: "nobody", qos: 1, id: 5}),
			[]byte{kindPingreq << 4, 0})
		var all []packet
		for {
			p, err := c.tryRead()
			if err != nil {
				break
			}
			if n := len(frame(p.first, p.body)); n > size {
				t.Fatalf("Maximum Packet Size %d: got %v, which has %d bytes", size, p, n)
			}
			if all = append(all, p); p.kind() == kindPingresp {
				break
			}
		}
		refused := s.dial(t, 5)
		refused.trySend(connectFields{version: 5, clean: true, props: [][]byte{propU32(39, size), propStr(21, "x")}}.frame())
		got := refused.end()
		if len(got) > 1 || len(got) == 1 && (got[0].body[1] != 0x8C || len(frame(got[0].first, got[0].body)) > size) || len(got) == 0 && size >= 5 {
			t.Fatalf("Maximum Packet Size %d: got %v, want CONNACK 0x8C, if it fits", size, got)
		}
		if size < 40 { // it need not do: CONNACK itself may not fit
			c.drop()
			continue
		}
		if last := len(all) - 1; last < 0 || all[last].kind() != kindPingresp {
			t.Fatalf("Maximum Packet Size %d: got %v, want answers", size, all)
		}
		empty := len(c.publishFrame(message{topic: "t", qos: 1, id: 1}))
		pub.publish(message{topic: "t", payload: strings.Repeat("x", size-empty+1), qos: 1})
		pub.publish(message{topic: "t", payload: strings.Repeat("y", size-empty), qos: 1})
		if m := c.take(); !strings.HasPrefix(m.payload, "y") {
			t.Fatalf("Maximum Packet Size %d: got a PUBLISH of one byte more", size)
		}
		c.send([]byte{0, 0})
		for _, p := range c.end() {
			if n := len(frame(p.first, p.body)); n > size {
				t.Fatalf("Maximum Packet Size %d: got %v, which has %d bytes", size, p, n)
			}
		}
	}
}

// TestTooLargeIsDone5 sends a client messages that it cannot take: they are
// taken for delivered, also those of a session that is not connected.
func TestTooLargeIsDone5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-25")
	s := start(t)
	pub, _ := s.connect(t, connectFields{version: 5, clean: true})
	f := connectFields{version: 5, id: "small", props: [][]byte{propU32(17, 600), propU32(39, 100), propU16(33, 2)}}
	c, _ := s.connect(t, f)
	c.subscribe(2, "t")
	for range 2 {
		for i := range 20 {
			pub.publish(message{topic: "t", payload: strings.Repeat("x", 200), qos: byte(i % 3)})
		}
		pub.publish(message{topic: "t", payload: "fits", qos: 1})
		c.takePayloads("fits")
		c.disconnect()
		for range 20 {
			pub.publish(message{topic: "t", payload: strings.Repeat("x", 200), qos: 2})
		}
		pub.publish(message{topic: "t", payload: "fits too", qos: 1})
		c, _ = s.connect(t, f)
		c.takePayloads("fits too")
	}
}

// TestRequestInformation5 checks Request Problem Information and Request
// Response Information.
func TestRequestInformation5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-28", "MQTT-3.1.2-29")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		return db.ReplaceACLRules(context.Background(), []storage.ACLRule{{Action: "any", Filter: "no/#"}})
	})
	for _, want := range []bool{false, true} {
		flag := byte(0)
		if want {
			flag = 1
		}
		c, a := s.connect(t, connectFields{version: 5, clean: true, id: "x", props: [][]byte{propByte(23, flag), propByte(25, flag)}})
		if _, ok := find(t, a.props, 26); ok && !want {
			t.Error("CONNACK has Response Information that nobody asked for")
		}
		id := 0
		for _, packet := range [][]byte{
			c.subscribeFrame(1, 1, []string{"no/x"}),
			c.publishFrame(message{topic: "no/x", qos: 1, id: 2}),
			c.publishFrame(message{topic: "no/x", qos: 2, id: 3}),
			pubrelFrame(4),
			ackFrame(kindPubrec, 5),
			frame(kindUnsubscribe<<4|2, u16(6), props(), str("none")),
		} {
			id++
			c.send(packet)
			p := c.read()
			b := body{t, p.body[2:]}
			reason := byte(0)
			if k := p.kind(); k != kindSuback && k != kindUnsuback {
				reason = b.byte()
			}
			var list []property
			if len(b.b) > 0 {
				list = b.props()
			}
			if len(b.b) > 0 {
				reason = b.byte()
			}
			if p.packetID() != id || reason == 0 {
				t.Errorf("got %v, want identifier %d and a reason", p, id)
			}
			_, text := find(t, list, 31)
			_, user := find(t, list, 38)
			if (text || user) && !want {
				t.Errorf("got %v, which has a Reason String or User Properties that were not wanted", p)
			}
			if !text && want && reason >= 0x80 {
				t.Errorf("got %v, want a Reason String", p)
			}
		}
	}
}

// TestSessionIsDurable5 restarts the broker.
func TestSessionIsDurable5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-23", "MQTT-3.1.2-7", "MQTT-4.5.0-1", "MQTT-3.3.1-5")
	dir := t.TempDir()
	grace := func(c *broker.Config) { c.WillGrace = units.Duration(time.Millisecond) }
	s := startIn(t, dir, nil, grace)
	keep := [][]byte{propU32(17, 600)}
	sub, _ := s.connect(t, connectFields{version: 5, id: "sub", props: keep})
	sub.send(sub.subscribeFrame(1, 1|8, []string{"t/#"}, propVar(11, 77)))
	sub.suback(1, 1)
	sub.disconnect()
	pub, _ := s.connect(t, connectFields{version: 5, id: "pub", props: keep})
	raw := [][]byte{propByte(1, 1), propStr(3, "text/plain"), propUser("a", "1"), propUser("a", "2")}
	pub.publish(message{topic: "t/x", payload: "first", qos: 1, retain: true, raw: raw})
	pub.publish(message{topic: "t/y", payload: "second", qos: 2})
	s.stop()
	s = startIn(t, dir, nil, grace)
	sub, a := s.connect(t, connectFields{version: 5, id: "sub", props: keep})
	if !a.present {
		t.Fatal("session did not survive a restart")
	}
	m := sub.take()
	want := []property{{id: 1, num: 1}, {id: 3, text: "text/plain"}, {id: 38, text: "a", value: "1"}, {id: 38, text: "a", value: "2"}, {id: 11, num: 77}}
	slices.SortStableFunc(m.props, func(a, b property) int { return slices.IndexFunc(want, same(a)) - slices.IndexFunc(want, same(b)) })
	if m.payload != "first" || !m.retain || !slices.Equal(m.props, want) {
		t.Errorf("got %+v, want the message as it was sent, properties %v", m, want)
	}
	sub.takePayloads("second")
	fresh, _ := s.connect(t, connectFields{version: 5, clean: true})
	fresh.subscribe(1, "t/+")
	fresh.takePayloads("first")
}

func same(p property) func(property) bool { return func(q property) bool { return p == q } }

// TestServerKeepAlive5 lets the broker set the Keep Alive.
func TestServerKeepAlive5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-21", "MQTT-3.2.2-21", "MQTT-3.2.2-22", "MQTT-3.1.2-22")
	s := start(t, func(c *broker.Config) { c.MaxKeepAlive = units.Duration(2 * time.Second) })
	for asked, told := range map[int]int{0: 2, 3: 2, 65535: 2, 2: 0, 1: 0} {
		_, a := s.connect(t, connectFields{version: 5, clean: true, keepAlive: asked})
		if p, ok := find(t, a.props, 19); ok != (told > 0) || p.num != told {
			t.Errorf("Keep Alive %d: got Server Keep Alive %d (%v), want %d", asked, p.num, ok, told)
		}
	}
	c, _ := s.connect(t, connectFields{version: 5, clean: true})
	began := time.Now()
	c.ping()
	c.expectDisconnect(0x8D)
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("closed after %v, want one and a half times the Server Keep Alive", took)
	}
}

// TestResponseInformation5 asks for Response Information and goes through a
// request and its response.
func TestResponseInformation5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.1.2-28", "MQTT-3.3.2-15", "MQTT-3.3.2-16")
	s := start(t, func(c *broker.Config) { c.ResponseInfo = "replies/%c" })
	for _, p := range [][][]byte{nil, {propByte(25, 0)}} {
		_, a := s.connect(t, connectFields{version: 5, clean: true, id: "nobody asked", props: p})
		if p, ok := find(t, a.props, 26); ok {
			t.Errorf("got Response Information %q that nobody asked for", p.text)
		}
	}
	asks, a := s.connect(t, connectFields{version: 5, clean: true, id: "asks", props: [][]byte{propByte(25, 1)}})
	info, ok := find(t, a.props, 26)
	if !ok || info.text != "replies/asks" {
		t.Fatalf("got Response Information %q (%v), want replies/asks", info.text, ok)
	}
	asks.subscribe(1, info.text+"/#")
	answers, _ := s.connect(t, connectFields{version: 5, clean: true})
	answers.subscribe(1, "request")
	asks.publish(message{topic: "request", payload: "what?", qos: 1, raw: [][]byte{propStr(8, info.text+"/1"), propStr(9, "\x00\x01")}})
	m := answers.take()
	to, _ := find(t, m.props, 8)
	which, _ := find(t, m.props, 9)
	answers.publish(message{topic: to.text, payload: "that", qos: 1, raw: [][]byte{propStr(9, which.text)}})
	m = asks.take()
	if which, _ = find(t, m.props, 9); m.topic != "replies/asks/1" || m.payload != "that" || which.text != "\x00\x01" {
		t.Errorf("got %+v, want the answer", m)
	}
}
