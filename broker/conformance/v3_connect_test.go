package conformance

import (
	"fmt"
	"strings"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

func TestV3FirstPacket(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.0-1")
	s := start(t)
	for what, b := range map[string][]byte{
		"CONNACK":     {0x20, 2, 0, 0},
		"PUBLISH":     frame(0x30, str("a"), []byte("x")),
		"PUBLISH 1":   frame(0x32, str("a"), u16(1), []byte("x")),
		"PUBACK":      ackFrame(kindPuback, 1),
		"PUBREC":      ackFrame(kindPubrec, 1),
		"PUBREL":      pubrelFrame(1),
		"PUBCOMP":     ackFrame(kindPubcomp, 1),
		"SUBSCRIBE":   frame(0x82, u16(1), str("a"), []byte{0}),
		"SUBACK":      frame(0x90, u16(1), []byte{0}),
		"UNSUBSCRIBE": frame(0xA2, u16(1), str("a")),
		"UNSUBACK":    frame(0xB0, u16(1)),
		"PINGREQ":     {0xC0, 0},
		"PINGRESP":    {0xD0, 0},
		"DISCONNECT":  {0xE0, 0},
		"type 0":      {0x00, 0},
		"type 15":     {0xF0, 0},
		"HTTP":        []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
		"TLS":         {0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0},
	} {
		s.closedWithout(t, what, b)
	}
}

func TestV3ConnackIsFirst(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.2.0-1", "MQTT-3.1.4-4")
	s := start(t)
	// Everything is there for a packet that overtakes: a session with a queue,
	// and a PINGREQ and a SUBSCRIBE behind the CONNECT in the same segment.
	c, _ := s.v3Session(t, "c")
	c.subscribe(1, "a")
	c.drop()
	p := s.v3(t, "p")
	for i := range 20 {
		p.publish(message{topic: "a", qos: 1, payload: fmt.Sprint(i)})
	}
	c = s.dial(t, 4)
	c.send(connectFields{version: 4, id: "c"}.frame(), []byte{0xC0, 0}, c.subscribeFrame(9, 1, []string{"b"}))
	if a := c.connack(); a.reason != 0 || !a.present {
		t.Fatalf("got %+v, want success and session present", a)
	}
	c.expect(kindPingresp)
	c.suback(9, 1)
	for i := range 20 {
		c.takePayloads(fmt.Sprint(i))
	}
}

func TestV3SecondConnect(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.0-2", "MQTT-4.8.0-1")
	s := start(t)
	w := s.v3(t, "watcher")
	w.subscribe(1, "will")
	for _, id := range []string{"c", "other"} {
		c, _ := s.connect(t, connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: "will", payload: id, qos: 1}})
		c.send(connectFields{version: 4, clean: true, id: id}.frame())
		c.expectClosed()
		w.takePayloads(id) // a protocol violation is no DISCONNECT
	}
}

func TestV3ProtocolName(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-1")
	s := start(t)
	for _, name := range []string{"", "M", "MQT", "mqtt", "MQTTT", "MQTT\x00", "MQisdp", "MQIsdpp", "HTTP", "\xEF\xBB\xBFMQTT", strings.Repeat("M", 65535)} {
		for _, level := range []byte{3, 4, 5} {
			s.closedWithout(t, fmt.Sprintf("name %.10q level %d", name, level),
				frame(kindConnect<<4, str(name), []byte{level, 2}, u16(0), str("c")))
		}
	}
}

func TestV3ProtocolLevel(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-2", "MQTT-3.2.2-4", "MQTT-3.2.2-5")
	s := start(t)
	for _, v := range []struct {
		name   string
		levels []byte
	}{
		{"MQTT", []byte{0, 1, 2, 3, 0x80, 0x83, 0x84}},
		{"MQIsdp", []byte{0, 1, 2, 4, 5, 6, 0x83, 0xFF}},
	} {
		for _, level := range v.levels {
			t.Run(fmt.Sprintf("%s %d", v.name, level), func(t *testing.T) {
				s.returns(t, 1, frame(kindConnect<<4, str(v.name), []byte{level, 2}, u16(0), str("c")))
			})
		}
	}
	// Of what comes after MQTT 5 nobody knows how it reads a CONNACK: it gets
	// that of the newest version that there is (MQTT 5, 3.1.2.2).
	for _, level := range []byte{6, 7, 0x7F, 0xFF} {
		c := s.dial(t, 5)
		c.send(frame(kindConnect<<4, str("MQTT"), []byte{level, 2}, u16(0), []byte{0}, str("c")))
		if a := c.connack(); a.reason != 0x84 || a.present {
			t.Errorf("level %d: got %+v, want reason 0x84", level, a)
		}
		c.expectClosed()
	}
}

// A bridge of Mosquitto asks with the high bit of the level set, and comes
// again without it when it is told that the level is not known.
func TestV3MosquittoBridge(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-7.0.0-2")
	s := start(t)
	for level, name := range map[byte]string{0x84: "MQTT", 0x83: "MQIsdp"} {
		s.returns(t, 1, frame(kindConnect<<4, str(name), []byte{level, 2}, u16(60), str("bridge")))
		c, _ := s.connect(t, connectFields{version: level & 0x7F, clean: true, id: "bridge", keepAlive: 60})
		c.subscribe(0, "a")
		c.publish(message{topic: "a", payload: name})
		c.takePayloads(name)
	}
}

func TestV3ConnectFlags(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-3", "MQTT-3.1.2-11", "MQTT-3.1.2-13", "MQTT-3.1.2-14", "MQTT-3.1.2-15", "MQTT-3.1.2-22", "MQTT-3.1.4-1")
	s := start(t)
	for flags := range 256 {
		var payload [][]byte
		payload = append(payload, str("c"))
		if flags&4 != 0 {
			payload = append(payload, str("will"), str("payload"))
		}
		if flags&0x80 != 0 {
			payload = append(payload, str("user"))
		}
		if flags&0x40 != 0 {
			payload = append(payload, str("password"))
		}
		b := connectRaw(byte(flags), payload...)
		will, willQoS, willRetain := flags&4 != 0, flags>>3&3, flags&0x20 != 0
		switch {
		case flags&1 != 0, willQoS == 3, !will && (willQoS != 0 || willRetain), flags&0xC0 == 0x40:
			s.closedWithout(t, fmt.Sprintf("connect flags %08b", flags), b)
		case flags&0x80 != 0:
			s.returns(t, 4, b) // there is no such user, and so the flags were understood
		default:
			c := s.dial(t, 4)
			c.send(b)
			if a := c.connack(); a.reason != 0 {
				t.Errorf("connect flags %08b: got return code %d, want 0", flags, a.reason)
			}
			c.disconnect()
		}
	}
}

func TestV3ConnectFixedHeader(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-2.2.2-1", "MQTT-2.2.2-2")
	s := start(t)
	b := connectFields{version: 4, clean: true, id: "c"}.frame()
	for flags := byte(1); flags < 16; flags++ {
		s.closedWithout(t, fmt.Sprintf("fixed header %#x", b[0]|flags), []byte{b[0] | flags}, b[1:])
	}
}

// The fields of a CONNECT must be there when their flag is set, in order, and
// nothing else.
func TestV3ConnectPayload(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-9", "MQTT-3.1.2-18", "MQTT-3.1.2-19", "MQTT-3.1.2-20", "MQTT-3.1.2-21", "MQTT-3.1.3-1", "MQTT-3.1.3-3", "MQTT-3.1.4-1")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error { device(t, db, "user", "password"); return nil })
	full := connectFields{version: 4, clean: true, id: "c", user: "user", password: "password",
		will: &willFields{topic: "will", payload: "payload", qos: 1}}.frame()
	body := full[2:]
	for n := range body {
		s.closedWithout(t, fmt.Sprintf("CONNECT cut to %d bytes", n), frame(kindConnect<<4, body[:n]))
	}
	for _, more := range []string{"\x00", "\x00\x00", "\x00\x01x"} {
		s.closedWithout(t, "bytes behind the password", frame(kindConnect<<4, body, []byte(more)))
	}
	for _, v := range []struct {
		what  string
		flags byte
		p     [][]byte
	}{
		{"will without its flag", 2, [][]byte{str("c"), str("will"), str("payload")}},
		{"will message missing", 6, [][]byte{str("c"), str("will")}},
		{"user name without its flag", 2, [][]byte{str("c"), str("user")}},
		{"user name missing", 0x82, [][]byte{str("c")}},
		{"password without its flag", 0x82, [][]byte{str("c"), str("user"), str("password")}},
		{"password missing", 0xC2, [][]byte{str("c"), str("user")}},
		{"no client identifier", 2, nil},
	} {
		s.closedWithout(t, v.what, connectRaw(v.flags, v.p...))
	}
	// In the order of the standard it is accepted, and every field is where it
	// belongs: the login is right, and the will goes to its topic.
	w := s.v3(t, "watcher")
	w.subscribe(1, "will")
	c := s.dial(t, 4)
	c.send(full)
	if a := c.connack(); a.reason != 0 {
		t.Fatalf("got return code %d, want 0", a.reason)
	}
	c.drop()
	if m := w.take(); m.topic != "will" || m.payload != "payload" {
		t.Errorf("got %+v, want the will", m)
	}
}

// A CONNECT whose end does not come is not acted upon.
func TestV3ConnectHalf(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.4-1")
	s := start(t)
	full := connectFields{version: 4, clean: true, id: "c"}.frame()
	for n := range full {
		c := s.dial(t, 4)
		c.send(full[:n])
		if err := c.c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.expectClosed()
	}
	if n := s.b.Stats().ConnectionsTotal; n != 0 {
		t.Errorf("got %d clients, want none", n)
	}
}

var illFormed = map[string]string{
	"U+0000":            "a\x00b",
	"lone continuation": "a\x80b",
	"cut short":         "a\xC3",
	"overlong":          "a\xC0\xAFb",
	"overlong NUL":      "a\xC0\x80b",
	"surrogate U+D800":  "a\xED\xA0\x80b",
	"surrogate U+DFFF":  "a\xED\xBF\xBFb",
	"above U+10FFFF":    "a\xF4\x90\x80\x80b",
	"0xFE":              "a\xFEb",
	"0xFF":              "a\xFFb",
}

func TestV3ConnectText(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-1.5.3-1", "MQTT-1.5.3-2", "MQTT-3.1.3-4", "MQTT-3.1.3-10", "MQTT-3.1.3-11", "MQTT-3.2.2-6")
	s := start(t)
	for what, text := range illFormed {
		s.closedWithout(t, "client identifier: "+what, connectRaw(2, str(text)))
		s.closedWithout(t, "will topic: "+what, connectRaw(6, str("c"), str(text), str("p")))
		s.closedWithout(t, "user name: "+what, connectRaw(0x82, str("c"), str(text)))
	}
	// The will message and the password are bytes.
	c := s.dial(t, 4)
	c.send(connectRaw(6, str("c"), str("will"), str("a\x00\xFF")))
	if a := c.connack(); a.reason != 0 {
		t.Errorf("will message of bytes: got return code %d, want 0", a.reason)
	}
	s.returns(t, 4, connectRaw(0xC2, str("d"), str("user"), str("a\x00\xFF")))
}

// No return code fits a will topic that is not a topic name.
func TestV3WillTopic(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.2.2-6", "MQTT-4.7.1-1", "MQTT-4.7.3-1")
	s := start(t)
	for _, topic := range []string{"", "#", "+", "a/#", "a/+/b", "a+", "#a"} {
		s.closedWithout(t, fmt.Sprintf("will topic %q", topic), connectRaw(6, str("c"), str(topic), str("p")))
	}
}

func TestV3ClientIDs(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.3-2", "MQTT-3.1.3-5", "MQTT-1.5.3-3")
	s := start(t, func(c *broker.Config) { c.MaxConnect = 1 << 20 })
	const letters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	var ids []string
	for n := 1; n <= 23; n++ {
		ids = append(ids, letters[:n])
	}
	for i := range letters {
		ids = append(ids, letters[i:i+1]+".") // the dot keeps them apart from those above
	}
	ids = append(ids, letters[23:46], letters[39:],
		letters[:24], strings.Repeat("x", 256), strings.Repeat("y", 65535), // more than a server must allow
		"a/b", "+", "#", "$SYS", " ", "inline", "täglich", "\xEF\xBB\xBFbom", "bom", "e\u0301", "é", "\U0001F600")
	// Each is a client of its own: none takes another's place.
	all := make([]*client, len(ids))
	for i, id := range ids {
		c, present := s.v3Session(t, id)
		if present {
			t.Errorf("%.30q: session present", id)
		}
		c.subscribe(1, fmt.Sprint("session/", i))
		all[i] = c
	}
	for _, c := range all {
		c.ping()
		c.disconnect()
	}
	p := s.v3(t, "publisher")
	for i := range ids {
		p.publish(message{topic: fmt.Sprint("session/", i), qos: 1, payload: fmt.Sprint(i)})
	}
	for i, id := range ids {
		c, present := s.v3Session(t, id)
		if !present {
			t.Errorf("%.30q: session not present", id)
		}
		c.takePayloads(fmt.Sprint(i))
	}
}

func TestV3EmptyClientID(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.3-6", "MQTT-3.1.3-7", "MQTT-3.1.3-8", "MQTT-3.1.3-9")
	s := start(t)
	for range 3 {
		s.returns(t, 2, connectFields{version: 4}.frame())
	}
	var all []*client
	for range 5 {
		c := s.v3(t, "")
		c.subscribe(1, "a")
		all = append(all, c)
	}
	all[0].publish(message{topic: "a", qos: 1, payload: "to each"})
	for _, c := range all {
		c.takePayloads("to each")
	}
	ids := map[string]bool{}
	for _, c := range s.b.Clients() {
		if c.ID == "" || ids[c.ID] {
			t.Errorf("client identifier %q is empty or there twice", c.ID)
		}
		ids[c.ID] = true
	}
	if len(ids) != len(all) {
		t.Errorf("got %d clients, want %d", len(ids), len(all))
	}
}

func TestV3ReturnCodes(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.2.2-4", "MQTT-3.2.2-5", "MQTT-3.1.4-5")
	s := startIn(t, t.TempDir(), func(db *storage.DB) error {
		device(t, db, "pump", "secret")
		device(t, db, "empty", "")
		credential(t, db, "torn", "this is no hash")
		return nil
	}, func(c *broker.Config) { c.Anonymous = "none" })
	login := func(user, password string) connectFields {
		return connectFields{version: 4, clean: true, id: "c", user: user, password: password}
	}
	w, _ := s.connect(t, connectFields{version: 4, clean: true, id: "watcher", user: "pump", password: "secret"})
	w.subscribe(2, "#")
	for _, v := range []struct {
		what string
		code byte
		b    []byte
	}{
		{"identifier rejected", 2, connectFields{version: 4, user: "pump", password: "secret"}.frame()},
		{"the server cannot tell", 3, login("torn", "secret").frame()},
		{"no such user", 4, login("nobody", "secret").frame()},
		{"wrong password", 4, login("pump", "Secret").frame()},
		{"empty password", 4, login("pump", "").frame()},
		{"user name without a password", 4, connectRaw(0x82, str("c"), str("pump"))},
		{"empty user name", 4, connectRaw(0xC2, str("c"), str(""), str("secret"))},
		{"not authorized", 5, connectFields{version: 4, clean: true, id: "c"}.frame()},
	} {
		t.Run(v.what, func(t *testing.T) {
			s.returns(t, v.code, v.b)
			// Nothing counts of what comes with a CONNECT that is refused.
			c := s.dial(t, 4)
			c.trySend(v.b, c.publishFrame(message{topic: "a", qos: 1, id: 1, retain: true, payload: v.what}), []byte{0xC0, 0})
			if got := c.end(); len(got) > 1 {
				t.Errorf("got %v, want a CONNACK and nothing behind it", got)
			}
		})
	}
	c, _ := s.connect(t, login("pump", "secret"))
	c.publish(message{topic: "a", qos: 1, payload: "the only one"})
	w.takePayloads("the only one")
	w.silent()
	s.connect(t, connectFields{version: 4, clean: true, id: "c", user: "empty"})
}

// A will whose client may not publish it cannot be accepted.
func TestV3WillNotAllowed(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.2.2-4")
	s := startIn(t, t.TempDir(), rules(t, storage.ACLRule{Action: "publish", Filter: "secret/#"}))
	s.returns(t, 5, connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: "secret/a", payload: "p"}}.frame())
}

func TestV3Will(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-8", "MQTT-3.1.2-10", "MQTT-3.1.2-12", "MQTT-3.1.2-16", "MQTT-3.1.2-17", "MQTT-3.14.4-3", "MQTT-3.14.4-1", "MQTT-3.14.4-2")
	s := start(t)
	ends := map[string]struct {
		end  func(c *client)
		want bool
	}{
		"DISCONNECT": {func(c *client) { c.disconnect() }, false},
		"DISCONNECT, with more behind it": {func(c *client) {
			c.trySend([]byte{0xE0, 0}, c.publishFrame(message{topic: "will/after", payload: "too late", retain: true}))
			c.expectClosed() // the broker does not wait for the client to close
		}, false},
		"network failure":      {func(c *client) { c.drop() }, true},
		"reset":                {func(c *client) { c.c.(interface{ SetLinger(int) error }).SetLinger(0); c.drop() }, true},
		"violation":            {func(c *client) { c.send([]byte{0xF0, 0}); c.expectClosed() }, true},
		"malformed DISCONNECT": {func(c *client) { c.send([]byte{0xE1, 0}); c.expectClosed() }, true},
		"takeover":             {func(c *client) { s.v3(t, "c").disconnect(); c.expectClosed() }, true},
	}
	for how, e := range ends {
		for qos := range byte(3) {
			for _, retain := range []bool{false, true} {
				t.Run(fmt.Sprint(how, " ", qos, " ", retain), func(t *testing.T) {
					w := s.v3(t, "watcher")
					w.subscribe(2, "will/#")
					topic := "will/" + how
					c, _ := s.connect(t, connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: topic, payload: "gone", qos: qos, retain: retain}})
					e.end(c)
					if !e.want {
						eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 1 })
						w.silent()
						return
					}
					if m := w.take(); m.topic != topic || m.payload != "gone" || m.qos != qos || m.retain || m.dup {
						t.Fatalf("got %+v, want the will", m)
					}
					w.silent() // once
					w.disconnect()
					late := s.v3(t, "late")
					late.subscribe(2, topic)
					if retain {
						if m := late.take(); m.payload != "gone" || m.qos != qos || !m.retain {
							t.Fatalf("got %+v, want the will retained", m)
						}
						late.publish(message{topic: topic, retain: true})
						late.take()
					}
					late.silent()
				})
			}
		}
	}
}

// A will with nothing in it is a message, and clears a retained one.
func TestV3WillEmpty(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-8", "MQTT-3.3.1-11")
	s := start(t)
	w := s.v3(t, "watcher")
	w.publish(message{topic: "will", payload: "old", retain: true, qos: 1})
	w.subscribe(1, "will")
	w.takePayloads("old")
	c, _ := s.connect(t, connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: "will", retain: true}})
	c.drop()
	w.takePayloads("")
	w.subscribe(1, "will")
	w.silent()
}

// Without a will, nothing is published, and the will of an earlier connection
// is not there any more.
func TestV3NoWill(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-10", "MQTT-3.1.2-12")
	s := start(t)
	w := s.v3(t, "watcher")
	w.subscribe(1, "will")
	c, _ := s.connect(t, connectFields{version: 4, id: "c", will: &willFields{topic: "will", payload: "1"}})
	c.drop()
	w.takePayloads("1")
	c, _ = s.connect(t, connectFields{version: 4, id: "c"})
	c.drop()
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 1 })
	w.silent()
}

func TestV3CleanSession(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-4", "MQTT-3.1.2-5", "MQTT-3.1.2-6", "MQTT-3.1.2-7", "MQTT-3.2.2-1", "MQTT-3.2.2-2", "MQTT-3.2.2-3", "MQTT-3.1.4-3", "MQTT-4.1.0-1", "MQTT-4.1.0-2", "MQTT-4.5.0-1")
	s := start(t)
	p := s.v3(t, "publisher")
	p.publish(message{topic: "kept", payload: "retained", qos: 1, retain: true})
	send := func(payload string) {
		for qos := range byte(3) {
			p.publish(message{topic: "a/b", qos: qos, payload: fmt.Sprint(payload, qos)})
		}
	}
	connect := func(clean, present bool) *client {
		t.Helper()
		c, a := s.connect(t, connectFields{version: 4, clean: clean, id: "c"})
		if a.present != present {
			t.Fatalf("clean %v: got session present %v, want %v", clean, a.present, present)
		}
		return c
	}
	c := connect(false, false)
	c.subscribe(2, "a/+")
	c.disconnect()
	send("first ")
	c = connect(false, true)
	c.takePayloads("first 1", "first 2") // QoS 0 is not kept
	c.silent()
	c.drop() // what it had is kept too when the network fails
	eventually(t, "the client is gone", func() bool { return len(s.b.Clients()) == 1 })
	send("second ")
	c = connect(false, true)
	c.takePayloads("second 1", "second 2")
	c.unsubscribe("a/+")
	c.subscribe(1, "a/b")
	c.disconnect()
	send("third ")

	// A clean session throws everything away, and leaves nothing.
	c = connect(true, false)
	send("unheard ")
	c.silent()
	c.subscribe(2, "a/b")
	c.disconnect()
	send("unheard too ")
	c = connect(false, false)
	send("unheard as well ")
	c.silent()
	// Retained messages are no part of a session.
	c.subscribe(1, "kept")
	c.takePayloads("retained")
	c.disconnect()
	connect(false, true).disconnect()
	connect(true, false).disconnect()
	connect(true, false).disconnect()
}

// The session survives the server too, and everything in it.
func TestV3SessionSurvivesRestart(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.2-4", "MQTT-3.1.2-5", "MQTT-4.1.0-1", "MQTT-4.3.3-2", "MQTT-4.4.0-1")
	dir := t.TempDir()
	s := startIn(t, dir, nil)
	c, _ := s.v3Session(t, "c")
	c.subscribe(2, "a")
	c.send(c.publishFrame(message{topic: "a", qos: 2, id: 7, payload: "once"}))
	c.ack(kindPubrec, 7)
	first := c.receive()
	c.drop()
	s.stop()
	s = startIn(t, dir, nil)
	c, present := s.v3Session(t, "c")
	if !present {
		t.Fatal("session is not present")
	}
	again := c.receive()
	if again.id != first.id || !again.dup || again.payload != "once" {
		t.Fatalf("got %+v, want %+v again", again, first)
	}
	c.send(ackFrame(kindPubrec, again.id))
	c.ack(kindPubrel, again.id)
	c.send(ackFrame(kindPubcomp, again.id))
	c.send(c.publishFrame(message{topic: "a", qos: 2, id: 7, payload: "once", dup: true}))
	c.ack(kindPubrec, 7)
	c.send(pubrelFrame(7))
	c.ack(kindPubcomp, 7)
	c.silent()
}

func TestV3Takeover(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.4-2", "MQTT-3.1.3-2", "MQTT-4.1.0-2")
	s := start(t)
	p := s.v3(t, "publisher")
	old, _ := s.v3Session(t, "c")
	old.subscribe(1, "a")
	p.publish(message{topic: "a", qos: 1, payload: "not acknowledged"})
	first := old.receive()
	c, present := s.v3Session(t, "c")
	if !present {
		t.Error("session is not present")
	}
	old.expectClosed()
	if m := c.take(); m.id != first.id || !m.dup || m.payload != first.payload {
		t.Errorf("got %+v, want %+v again", m, first)
	}
	other := s.v3(t, "C") // another client: case counts
	other.ping()
	c.ping()
	s.v3(t, "c")
	c.expectClosed()
	other.ping()
}

// Who may not connect takes nobody's place.
func TestV3TakeoverNeedsLogin(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-3.1.4-2", "MQTT-3.1.4-5")
	s := start(t)
	c := s.v3(t, "c")
	s.returns(t, 4, connectFields{version: 4, clean: true, id: "c", user: "nobody", password: "x"}.frame())
	c.ping()
}
