package broker

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// patience bounds every wait of a test. It is long, for the machines are
// shared; a test that works never waits for it.
const patience = 20 * time.Second

// server is a broker under test, with its real sockets and its real database.
type server struct {
	t    testing.TB
	b    *Broker
	db   *storage.DB
	stop func()
	addr string
	dir  string
}

// start starts a broker on the database in dir, which may be that of an
// earlier one.
func start(t testing.TB, dir string, change ...func(*Config, *storage.Config)) *server {
	t.Helper()
	cfg, scfg := DefaultConfig(), storage.DefaultConfig()
	cfg.Listeners[0].Address = "127.0.0.1:0"
	cfg.SysInterval = 0 // tests of $SYS set it; others count what comes
	scfg.Dir = dir
	scfg.CommitDelay = units.Duration(2 * time.Millisecond)
	for _, f := range change {
		f(&cfg, &scfg)
	}
	log := slog.New(slog.DiscardHandler)
	db, err := storage.Open(context.Background(), scfg, log)
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(cfg, db, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	s := &server{t: t, b: b, db: db, addr: b.Listeners()[0].Addr.String(), dir: dir}
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

// client speaks MQTT on the wire, so that a test can send and see every bit.
type client struct {
	t       testing.TB
	c       net.Conn
	version byte
	nextID  uint16
	raw     bool     // a PUBREL is not answered by itself
	stash   [][]byte // PUBLISH packets that came while something else was waited for
}

// connect is what a test asks of a CONNECT.
type connectOptions struct {
	id         string
	version    byte // 0: 4
	clean      bool
	keepAlive  uint16
	expiry     uint32 // MQTT 5
	receiveMax uint16
	maxPacket  uint32
	will       *storage.Message
	willDelay  uint32
	user       string
	password   string
}

func (s *server) dial() *client {
	s.t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return &client{t: s.t, c: c, version: 4}
}

// connect connects and returns the client and session present.
func (s *server) connect(o connectOptions) (*client, bool) {
	s.t.Helper()
	c := s.dial()
	if o.version == 0 {
		o.version = 4
	}
	c.version = o.version
	c.send(connectPacket(o))
	first, body := c.read()
	if first != typeConnack<<4 || body[1] != 0 {
		s.t.Fatalf("CONNACK of %q: got % x % x, want success", o.id, first, body)
	}
	return c, body[0] == 1
}

func str(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

func packet(first byte, parts ...[]byte) []byte {
	var body []byte
	for _, p := range parts {
		body = append(body, p...)
	}
	return append(appendVarint([]byte{first}, len(body)), body...)
}

func connectPacket(o connectOptions) []byte {
	name, flags := "MQTT", byte(0)
	if o.version == 3 {
		name = "MQIsdp"
	}
	if o.clean {
		flags |= 2
	}
	var will []byte
	if o.will != nil {
		flags |= 4 | o.will.QoS<<3
		if o.will.Retain {
			flags |= 32
		}
		if o.version == 5 {
			will = append([]byte{5, 24}, binary.BigEndian.AppendUint32(nil, o.willDelay)...)
		}
		will = append(will, str(o.will.Topic)...)
		will = append(will, str(string(o.will.Payload))...)
	}
	var login []byte
	if o.user != "" {
		flags |= 0xC0
		login = append(str(o.user), str(o.password)...)
	}
	var props []byte
	if o.version == 5 {
		var p []byte
		if o.expiry != 0 {
			p = binary.BigEndian.AppendUint32(append(p, propSessionExpiry), o.expiry)
		}
		if o.receiveMax != 0 {
			p = binary.BigEndian.AppendUint16(append(p, 33), o.receiveMax)
		}
		if o.maxPacket != 0 {
			p = binary.BigEndian.AppendUint32(append(p, 39), o.maxPacket)
		}
		props = append(appendVarint(nil, len(p)), p...)
	}
	return packet(typeConnect<<4, str(name), []byte{o.version, flags}, binary.BigEndian.AppendUint16(nil, o.keepAlive), props, str(o.id), will, login)
}

func (c *client) send(b []byte) {
	c.t.Helper()
	if _, err := c.c.Write(b); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// tryRead reads the next packet.
func (c *client) tryRead() (first byte, body []byte, err error) {
	c.c.SetReadDeadline(time.Now().Add(patience))
	var b [1]byte
	if _, err := io.ReadFull(c.c, b[:]); err != nil {
		return 0, nil, err
	}
	first = b[0]
	n, shift := 0, 0
	for {
		if _, err := io.ReadFull(c.c, b[:]); err != nil {
			return 0, nil, err
		}
		n |= int(b[0]&0x7F) << shift
		shift += 7
		if b[0] < 0x80 {
			break
		}
	}
	body = make([]byte, n)
	_, err = io.ReadFull(c.c, body)
	return first, body, err
}

func (c *client) read() (first byte, body []byte) {
	c.t.Helper()
	first, body, err := c.tryRead()
	if err != nil {
		c.t.Fatalf("read: %v", err)
	}
	return first, body
}

// expect reads until a packet of the kind wanted comes. Deliveries are kept for
// take meanwhile, and unless the client is raw a PUBREL is answered.
func (c *client) expect(kind byte) (first byte, body []byte) {
	c.t.Helper()
	if kind == typePublish && len(c.stash) > 0 {
		p := c.stash[0]
		c.stash = c.stash[1:]
		return p[0], p[1:]
	}
	for {
		first, body = c.read()
		switch {
		case first>>4 == kind:
			return first, body
		case first>>4 == typePublish:
			c.stash = append(c.stash, append([]byte{first}, body...))
		case first>>4 == typePubrel && !c.raw:
			c.send(packet(typePubcomp<<4, body[:2]))
		default:
			c.t.Fatalf("got packet %x % x, want kind %d", first, body, kind)
		}
	}
}

// expectEnd reads until the connection ends and returns the reason of the
// DISCONNECT, if there was one.
func (c *client) expectEnd() (reason byte) {
	c.t.Helper()
	for {
		first, body, err := c.tryRead()
		if err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				c.t.Fatal("connection was not ended")
			}
			return reason
		}
		if first>>4 == typeDisconnect && len(body) > 0 {
			reason = body[0]
		}
	}
}

func (c *client) id() uint16 {
	c.nextID++
	if c.nextID == 0 {
		c.nextID = 1
	}
	return c.nextID
}

func u16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func (c *client) noProps() []byte {
	if c.version == 5 {
		return []byte{0}
	}
	return nil
}

func (c *client) subscribe(options byte, filters ...string) []byte {
	c.t.Helper()
	parts := [][]byte{u16(c.id()), c.noProps()}
	for _, f := range filters {
		parts = append(parts, str(f), []byte{options})
	}
	c.send(packet(typeSubscribe<<4|2, parts...))
	_, body := c.expect(typeSuback)
	if c.version == 5 {
		return body[3+body[2]:] // behind the properties, which are short
	}
	return body[2:]
}

func (c *client) publishPacket(topic string, payload string, qos byte, flags byte, id uint16) []byte {
	parts := [][]byte{str(topic)}
	if qos > 0 {
		parts = append(parts, u16(id))
	}
	return packet(typePublish<<4|qos<<1|flags, append(parts, c.noProps(), []byte(payload))...)
}

// publish publishes and waits for the acknowledgements.
func (c *client) publish(topic, payload string, qos byte, retain bool) {
	c.t.Helper()
	flags := byte(0)
	if retain {
		flags = 1
	}
	id := c.id()
	c.send(c.publishPacket(topic, payload, qos, flags, id))
	switch qos {
	case 1:
		c.expectAck(typePuback, id)
	case 2:
		c.expectAck(typePubrec, id)
		c.send(packet(typePubrel<<4|2, u16(id)))
		c.expectAck(typePubcomp, id)
	}
}

func (c *client) expectAck(kind byte, id uint16) {
	c.t.Helper()
	_, body := c.expect(kind)
	if got := binary.BigEndian.Uint16(body); got != id {
		c.t.Fatalf("acknowledgement %d: got identifier %d, want %d", kind, got, id)
	}
}

// delivery is a received PUBLISH.
type delivery struct {
	topic, payload string
	id             uint16
	qos            byte
	dup, retain    bool
	props          []byte
}

func parseDelivery(first byte, body []byte, version byte) delivery {
	d := delivery{qos: first >> 1 & 3, dup: first&8 != 0, retain: first&1 != 0}
	n := int(binary.BigEndian.Uint16(body))
	d.topic = string(body[2 : 2+n])
	body = body[2+n:]
	if d.qos > 0 {
		d.id = binary.BigEndian.Uint16(body)
		body = body[2:]
	}
	if version == 5 {
		r := reader{buf: body}
		d.props = r.take(r.varint())
		body = r.buf
	}
	d.payload = string(body)
	return d
}

// take reads a PUBLISH and acknowledges it.
func (c *client) take() delivery {
	c.t.Helper()
	first, body := c.expect(typePublish)
	d := parseDelivery(first, body, c.version)
	switch d.qos {
	case 1:
		c.send(packet(typePuback<<4, u16(d.id)))
	case 2:
		c.send(packet(typePubrec<<4, u16(d.id)))
	}
	return d
}

// takeAll takes n messages and fails unless they are first, first+1, … with
// the payload format given.
func (c *client) takeAll(format string, first, n int) {
	c.t.Helper()
	for i := range n {
		want := fmt.Sprintf(format, first+i)
		if d := c.take(); d.payload != want {
			c.t.Fatalf("delivery %d: got %q, want %q", i, d.payload, want)
		}
	}
}

func (c *client) disconnect() {
	c.t.Helper()
	c.send([]byte{typeDisconnect << 4, 0})
	c.c.Close()
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
