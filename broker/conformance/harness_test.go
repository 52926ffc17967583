package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"penstock/broker"
	"penstock/internal/units"
	"penstock/storage"
)

// patience bounds every wait of a test. It is long, for the machines are
// shared; a test that works never waits for it.
const patience = 20 * time.Second

// Packet types (2.1.2).
const (
	kindConnect     = 1
	kindConnack     = 2
	kindPublish     = 3
	kindPuback      = 4
	kindPubrec      = 5
	kindPubrel      = 6
	kindPubcomp     = 7
	kindSubscribe   = 8
	kindSuback      = 9
	kindUnsubscribe = 10
	kindUnsuback    = 11
	kindPingreq     = 12
	kindPingresp    = 13
	kindDisconnect  = 14
	kindAuth        = 15
)

// covers3 and covers5 say which statements of MQTT 3.1.1 and of MQTT 5 the
// calling test covers. The arguments are string literals: the check of
// docs/conformance.md reads them in the source, and so they cannot be more
// than what a test says of itself.
func covers3(t testing.TB, statements ...string) { note(t, "MQTT 3.1.1", statements) }
func covers5(t testing.TB, statements ...string) { note(t, "MQTT 5", statements) }

func note(t testing.TB, standard string, statements []string) {
	t.Helper()
	t.Logf("%s: %s", standard, strings.Join(statements, " "))
}

// server is a broker under test, with its real sockets and its real database.
type server struct {
	b    *broker.Broker
	db   *storage.DB
	addr string
	dir  string
	stop func()
}

// start starts a broker with a database of its own. db prepares the database
// before the broker reads it; it may be nil.
func start(t testing.TB, change ...func(*broker.Config)) *server {
	t.Helper()
	return startIn(t, t.TempDir(), nil, change...)
}

func startIn(t testing.TB, dir string, prepare func(*storage.DB) error, change ...func(*broker.Config)) *server {
	t.Helper()
	cfg, scfg := broker.DefaultConfig(), storage.DefaultConfig()
	cfg.Listeners[0].Address = "127.0.0.1:0"
	scfg.Dir = dir
	scfg.CommitDelay = units.Duration(2 * time.Millisecond)
	for _, f := range change {
		f(&cfg)
	}
	log := slog.New(slog.DiscardHandler)
	db, err := storage.Open(context.Background(), scfg, log)
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		if err := prepare(db); err != nil {
			t.Fatal(err)
		}
	}
	b, err := broker.New(cfg, db, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	s := &server{b: b, db: db, addr: b.Listeners()[0].Addr.String(), dir: dir}
	stopped := false
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("broker stopped with %v", err)
		}
		if err := db.Close(); err != nil {
			t.Errorf("close database: %v", err)
		}
	}
	t.Cleanup(s.stop)
	return s
}

// Encoders of the data types (1.5).

func u16(v int) []byte { return binary.BigEndian.AppendUint16(nil, uint16(v)) }

func str(s string) []byte { return append(u16(len(s)), s...) }

func varint(v int) []byte {
	var b []byte
	for ; v >= 0x80; v >>= 7 {
		b = append(b, byte(v)|0x80)
	}
	return append(b, byte(v))
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// props is the property length and the properties (2.2.2).
func props(p ...[]byte) []byte {
	all := join(p...)
	return append(varint(len(all)), all...)
}

// Properties by the type of their value.

func propByte(id byte, v byte) []byte { return []byte{id, v} }
func propU16(id byte, v int) []byte   { return append([]byte{id}, u16(v)...) }
func propU32[T int | uint32](id byte, v T) []byte {
	return binary.BigEndian.AppendUint32([]byte{id}, uint32(v))
}
func propVar(id byte, v int) []byte      { return append([]byte{id}, varint(v)...) }
func propStr(id byte, v string) []byte   { return append([]byte{id}, str(v)...) }
func propUser(name, value string) []byte { return join([]byte{38}, str(name), str(value)) }
func frame(first byte, p ...[]byte) []byte {
	b := join(p...)
	return join([]byte{first}, varint(len(b)), b)
}
func pubrelFrame(id int) []byte         { return frame(kindPubrel<<4|2, u16(id)) }
func ackFrame(kind byte, id int) []byte { return frame(kind<<4, u16(id)) }

// connectFields is a CONNECT. The zero value with a version is legal, but for
// MQTT 3.x, which wants clean with an empty id.
type connectFields struct {
	version   byte
	clean     bool
	keepAlive int
	props     [][]byte // MQTT 5
	id        string
	will      *willFields
	user      string // sent, with the password, if not empty
	password  string
}

type willFields struct {
	topic   string
	payload string
	qos     byte
	retain  bool
	props   [][]byte // MQTT 5
}

func (f connectFields) frame() []byte {
	name, flags := "MQTT", byte(0)
	if f.version == 3 {
		name = "MQIsdp"
	}
	if f.clean {
		flags |= 2
	}
	var properties, tail []byte
	if f.version == 5 {
		properties = props(f.props...)
	}
	tail = str(f.id)
	if w := f.will; w != nil {
		flags |= 4 | w.qos<<3
		if w.retain {
			flags |= 32
		}
		if f.version == 5 {
			tail = append(tail, props(w.props...)...)
		}
		tail = join(tail, str(w.topic), str(w.payload))
	}
	if f.user != "" {
		flags |= 0xC0
		tail = join(tail, str(f.user), str(f.password))
	}
	return frame(kindConnect<<4, str(name), []byte{f.version, flags}, u16(f.keepAlive), properties, tail)
}

// packet is a control packet as it came.
type packet struct {
	first byte
	body  []byte
}

func (p packet) kind() byte     { return p.first >> 4 }
func (p packet) String() string { return fmt.Sprintf("%02x % x", p.first, p.body) }

// packetID is the identifier of a packet that starts with one.
func (p packet) packetID() int { return int(binary.BigEndian.Uint16(p.body)) }

// client speaks MQTT on the wire, so that a test can send and see every bit.
// It answers nothing by itself.
type client struct {
	t       testing.TB
	c       net.Conn
	r       *bufio.Reader
	version byte
	lastID  int
	stash   []packet // PUBLISH packets that came while something else was waited for
}

// dial opens a connection and sends nothing.
func (s *server) dial(t testing.TB, version byte) *client {
	t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &client{t: t, c: c, r: bufio.NewReader(c), version: version}
}

// connect connects, and wants to be accepted.
func (s *server) connect(t testing.TB, f connectFields) (*client, connack) {
	t.Helper()
	c := s.dial(t, f.version)
	c.send(f.frame())
	a := c.connack()
	if a.reason != 0 {
		t.Fatalf("CONNACK: got reason %#x, want success", a.reason)
	}
	return c, a
}

func (c *client) send(parts ...[]byte) {
	c.t.Helper()
	if _, err := c.c.Write(join(parts...)); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// trySend sends what the broker may refuse to take to its end.
func (c *client) trySend(parts ...[]byte) { _, _ = c.c.Write(join(parts...)) }

// tryRead reads the next packet.
func (c *client) tryRead() (packet, error) {
	c.c.SetReadDeadline(time.Now().Add(patience))
	first, err := c.r.ReadByte()
	if err != nil {
		return packet{}, err
	}
	n := 0
	for shift := 0; ; shift += 7 {
		b, err := c.r.ReadByte()
		if err != nil {
			return packet{}, err
		}
		if shift > 21 {
			return packet{}, errors.New("remaining length is longer than four bytes")
		}
		if n |= int(b&0x7F) << shift; b < 0x80 {
			break
		}
	}
	p := packet{first: first, body: make([]byte, n)}
	_, err = io.ReadFull(c.r, p.body)
	return p, err
}

func (c *client) read() packet {
	c.t.Helper()
	p, err := c.tryRead()
	if err != nil {
		c.t.Fatalf("read: %v", err)
	}
	return p
}

// expect wants the next packet to be of this kind; deliveries that come before
// it are kept for publish.
func (c *client) expect(kind byte) packet {
	c.t.Helper()
	if kind == kindPublish && len(c.stash) > 0 {
		p := c.stash[0]
		c.stash = c.stash[1:]
		return p
	}
	for {
		p := c.read()
		switch {
		case p.kind() == kind:
			return p
		case p.kind() == kindPublish:
			c.stash = append(c.stash, p)
		default:
			c.t.Fatalf("got packet %v, want kind %d", p, kind)
		}
	}
}

// expectFrame wants the next packet to be exactly this.
func (c *client) expectFrame(want []byte) {
	c.t.Helper()
	p := c.read()
	if got := frame(p.first, p.body); !bytes.Equal(got, want) {
		c.t.Fatalf("got % x, want % x", got, want)
	}
}

// end reads until the broker closes the connection, and returns what it sent
// before.
func (c *client) end() []packet {
	c.t.Helper()
	var all []packet
	for {
		p, err := c.tryRead()
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				c.t.Fatalf("the connection was not closed; got before: %v", all)
			}
			return all
		}
		all = append(all, p)
	}
}

// expectClosed wants the connection to be closed, and not one packet before.
func (c *client) expectClosed() {
	c.t.Helper()
	if got := c.end(); len(got) > 0 {
		c.t.Fatalf("got %v, want the connection closed without a packet", got)
	}
}

// expectDisconnect wants a DISCONNECT with this reason (MQTT 5) as the last
// packet, deliveries and acknowledgements before it aside, and the end of the
// connection.
func (c *client) expectDisconnect(reason byte) {
	c.t.Helper()
	got := c.end()
	if n := len(got); n == 0 || got[n-1].first != kindDisconnect<<4 || len(got[n-1].body) == 0 || got[n-1].body[0] != reason {
		c.t.Fatalf("got %v, want DISCONNECT with reason %#x and the end", got, reason)
	}
}

// ping makes sure that the connection is alive and that all sent before was
// handled.
func (c *client) ping() {
	c.t.Helper()
	c.send([]byte{kindPingreq << 4, 0})
	if p := c.expect(kindPingresp); p.first != kindPingresp<<4 || len(p.body) != 0 {
		c.t.Fatalf("PINGRESP: got %v", p)
	}
}

// disconnect leaves in order.
func (c *client) disconnect() {
	c.t.Helper()
	c.send([]byte{kindDisconnect << 4, 0})
	c.end()
	c.c.Close()
}

// drop closes the connection without a DISCONNECT.
func (c *client) drop() { c.c.Close() }

func (c *client) id() int {
	c.lastID++
	return c.lastID
}

// noProps is an empty list of properties, where the version has them.
func (c *client) noProps() []byte {
	if c.version == 5 {
		return []byte{0}
	}
	return nil
}

// property is one property, its value as the type of the property asks.
type property struct {
	id    byte
	num   int    // a number of any size
	text  string // a string, binary data, or the name of a user property
	value string // of a user property
}

// body takes fields from a packet.
type body struct {
	t testing.TB
	b []byte
}

func (b *body) take(n int) []byte {
	b.t.Helper()
	if n > len(b.b) {
		b.t.Fatalf("packet is cut short: want %d bytes of % x", n, b.b)
	}
	out := b.b[:n]
	b.b = b.b[n:]
	return out
}

func (b *body) byte() byte { b.t.Helper(); return b.take(1)[0] }
func (b *body) u16() int   { b.t.Helper(); return int(binary.BigEndian.Uint16(b.take(2))) }
func (b *body) u32() int   { b.t.Helper(); return int(binary.BigEndian.Uint32(b.take(4))) }
func (b *body) str() string {
	b.t.Helper()
	return string(b.take(b.u16()))
}

func (b *body) varint() int {
	b.t.Helper()
	v := 0
	for shift := 0; shift <= 21; shift += 7 {
		c := b.byte()
		if v |= int(c&0x7F) << shift; c < 0x80 {
			if shift > 0 && c == 0 {
				b.t.Fatal("variable byte integer is longer than it must be")
			}
			return v
		}
	}
	b.t.Fatal("variable byte integer is longer than four bytes")
	return 0
}

// props takes the properties.
func (b *body) props() []property {
	b.t.Helper()
	p := body{b.t, b.take(b.varint())}
	var all []property
	for len(p.b) > 0 {
		v := property{id: p.byte()}
		switch v.id {
		case 1, 23, 25, 36, 37, 40, 41, 42:
			v.num = int(p.byte())
		case 19, 33, 34, 35:
			v.num = p.u16()
		case 2, 17, 24, 39:
			v.num = p.u32()
		case 11:
			v.num = p.varint()
		case 3, 8, 9, 18, 21, 22, 26, 28, 31:
			v.text = p.str()
		case 38:
			v.text, v.value = p.str(), p.str()
		default:
			b.t.Fatalf("there is no property %d", v.id)
		}
		all = append(all, v)
	}
	return all
}

// find returns the property of this identifier, and fails where there are two.
func find(t testing.TB, all []property, id byte) (found property, ok bool) {
	t.Helper()
	for _, p := range all {
		if p.id == id {
			if ok {
				t.Fatalf("property %d came twice", id)
			}
			found, ok = p, true
		}
	}
	return found, ok
}

// connack is a CONNACK.
type connack struct {
	present bool // Session Present
	reason  byte
	props   []property // MQTT 5
}

// connack wants the next packet to be a well-formed CONNACK.
func (c *client) connack() connack {
	c.t.Helper()
	p := c.read()
	if p.first != kindConnack<<4 || len(p.body) < 2 || p.body[0] > 1 {
		c.t.Fatalf("got %v, want a CONNACK", p)
	}
	b := body{c.t, p.body[2:]}
	a := connack{present: p.body[0] == 1, reason: p.body[1]}
	if c.version == 5 {
		a.props = b.props()
	}
	if len(b.b) > 0 {
		c.t.Fatalf("CONNACK: bytes behind it: % x", b.b)
	}
	return a
}

// subscribeFrame is a SUBSCRIBE of filters with the same options, and MQTT 5
// properties.
func (c *client) subscribeFrame(id int, options byte, filters []string, properties ...[]byte) []byte {
	parts := [][]byte{u16(id)}
	if c.version == 5 {
		parts = append(parts, props(properties...))
	}
	for _, f := range filters {
		parts = append(parts, str(f), []byte{options})
	}
	return frame(kindSubscribe<<4|2, parts...)
}

// subscribe subscribes and returns the reason codes.
func (c *client) subscribe(options byte, filters ...string) []byte {
	c.t.Helper()
	id := c.id()
	c.send(c.subscribeFrame(id, options, filters))
	return c.suback(id, len(filters))
}

// suback wants a SUBACK and returns its n reason codes.
func (c *client) suback(id, n int) []byte {
	c.t.Helper()
	p := c.expect(kindSuback)
	b := body{c.t, p.body}
	if got := b.u16(); p.first != kindSuback<<4 || got != id {
		c.t.Fatalf("SUBACK: got %v, want identifier %d", p, id)
	}
	if c.version == 5 {
		b.props()
	}
	if len(b.b) != n {
		c.t.Fatalf("SUBACK: got %d reason codes, want %d", len(b.b), n)
	}
	return b.b
}

// unsubscribe unsubscribes and returns the reason codes (none in MQTT 3.x).
func (c *client) unsubscribe(filters ...string) []byte {
	c.t.Helper()
	id := c.id()
	parts := [][]byte{u16(id), c.noProps()}
	for _, f := range filters {
		parts = append(parts, str(f))
	}
	c.send(frame(kindUnsubscribe<<4|2, parts...))
	p := c.expect(kindUnsuback)
	b := body{c.t, p.body}
	if got := b.u16(); p.first != kindUnsuback<<4 || got != id {
		c.t.Fatalf("UNSUBACK: got %v, want identifier %d", p, id)
	}
	if c.version == 5 {
		b.props()
	}
	return b.b
}

// message is a PUBLISH.
type message struct {
	topic, payload string
	qos            byte
	retain, dup    bool
	id             int        // packet identifier, 0 with QoS 0
	props          []property // received, MQTT 5
	raw            [][]byte   // to send, MQTT 5
}

func (c *client) publishFrame(m message) []byte {
	first := byte(kindPublish<<4) | m.qos<<1
	if m.dup {
		first |= 8
	}
	if m.retain {
		first |= 1
	}
	parts := [][]byte{str(m.topic)}
	if m.qos > 0 {
		parts = append(parts, u16(m.id))
	}
	if c.version == 5 {
		parts = append(parts, props(m.raw...))
	}
	return frame(first, append(parts, []byte(m.payload))...)
}

// publish publishes, goes through the acknowledgements, and returns the reason
// code of the first. When it returns the broker has handled the message, also
// at QoS 0: what another client does next comes after it.
func (c *client) publish(m message) byte {
	c.t.Helper()
	if m.qos > 0 && m.id == 0 {
		m.id = c.id()
	}
	c.send(c.publishFrame(m))
	switch m.qos {
	case 0:
		c.ping()
	case 1:
		return c.ack(kindPuback, m.id)
	case 2:
		if reason := c.ack(kindPubrec, m.id); reason >= 0x80 {
			return reason
		} else {
			c.send(pubrelFrame(m.id))
			if got := c.ack(kindPubcomp, m.id); got != 0 {
				c.t.Fatalf("PUBCOMP: got reason %#x", got)
			}
			return reason
		}
	}
	return 0
}

// ack wants a PUBACK, PUBREC, PUBREL or PUBCOMP and returns its reason code.
func (c *client) ack(kind byte, id int) byte {
	c.t.Helper()
	p := c.expect(kind)
	flags := byte(0)
	if kind == kindPubrel {
		flags = 2
	}
	if p.first != kind<<4|flags || len(p.body) < 2 || p.packetID() != id {
		c.t.Fatalf("acknowledgement: got %v, want identifier %d", p, id)
	}
	if len(p.body) == 2 {
		return 0
	}
	if c.version != 5 {
		c.t.Fatalf("acknowledgement: got %v, want two bytes", p)
	}
	b := body{c.t, p.body[2:]}
	reason := b.byte()
	if len(b.b) > 0 {
		b.props()
	}
	if len(b.b) > 0 {
		c.t.Fatalf("acknowledgement: bytes behind it: %v", p)
	}
	return reason
}

// receive wants a PUBLISH and answers nothing.
func (c *client) receive() message {
	c.t.Helper()
	return c.parse(c.expect(kindPublish))
}

func (c *client) parse(p packet) message {
	c.t.Helper()
	m := message{qos: p.first >> 1 & 3, dup: p.first&8 != 0, retain: p.first&1 != 0}
	b := body{c.t, p.body}
	m.topic = b.str()
	if m.qos > 0 {
		m.id = b.u16()
	}
	if c.version == 5 {
		m.props = b.props()
	}
	m.payload = string(b.b)
	return m
}

// take wants a PUBLISH and goes through the acknowledgements.
func (c *client) take() message {
	c.t.Helper()
	m := c.receive()
	switch m.qos {
	case 1:
		c.send(ackFrame(kindPuback, m.id))
	case 2:
		c.send(ackFrame(kindPubrec, m.id))
		c.ack(kindPubrel, m.id)
		c.send(ackFrame(kindPubcomp, m.id))
	}
	return m
}

// takePayloads wants messages with these payloads, in this order.
func (c *client) takePayloads(want ...string) {
	c.t.Helper()
	for i, w := range want {
		if m := c.take(); m.payload != w {
			c.t.Fatalf("message %d: got %q, want %q", i, m.payload, w)
		}
	}
}

// eventually polls until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: it did not come to pass", what)
}
