package broker

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"penstock/storage"
)

const (
	smallRead  = 1 << 10  // read buffer of a quiet connection
	bigRead    = 64 << 10 // read buffer of a busy one
	quietReads = 16       // reads that small make a connection quiet again
	highWater  = 64 << 10 // output that a queue is pumped into
	qos0Water  = 1 << 20  // output above which QoS 0 is dropped
	ackWater   = 2 << 20  // output above which a client is not read: it does not take its acknowledgements
	lingerFor  = 2 * time.Second
	maxAliases = 16   // Topic Alias Maximum that we announce
	maxTopics  = 1024 // topics whose routes a connection remembers
)

var errClosed = errors.New("connection is closed")

// past is a deadline that ends a Read at once.
var past = time.Unix(1, 0)

var bigBufs = sync.Pool{New: func() any { b := make([]byte, bigRead); return &b }}

// conn is a client's connection, and the seam to mochi. mochi reads from it as
// from a socket and sees only CONNECT, PINGREQ and DISCONNECT, each whole and
// never a byte beyond; everything else is handled in place by the data plane.
// What mochi and the data plane write gathers in one output buffer.
//
// Read is called by one goroutine; the fields of the input side belong to it.
type conn struct {
	b       *Broker
	sock    net.Conn
	ln      *listener
	slot    *slot
	refusal byte // not 0: the CONNECT is refused with this reason, there are too many connections
	since   time.Time
	gone    chan struct{} // closed when no further packet will be handled

	// Input side.
	in        []byte
	big       *[]byte // what in is made of while it comes from bigBufs
	r, w      int     // in[r:w] is unread
	quiet     int     // small reads in a row
	control   int     // bytes of the current control packet that mochi has yet to read
	deadline  time.Time
	batch     batch
	scratch   []byte
	msg       storage.Message
	topics    map[string]*topicState
	aliases   [maxAliases + 1]*topicState
	gotHello  bool // CONNECT was handed to mochi
	up        bool // CONNACK with success was written; changed with outMu held, for kick reads it
	heard     bool // a packet came since the read deadline was looked at
	goodbye   bool // DISCONNECT was read
	leaving   leaving
	noExpiry  bool          // the Session Expiry Interval of CONNECT was 0
	keepAlive time.Duration // one and a half times what the client asked for; 0: none
	hello     hello
	msgsIn    [3]uint64 // by QoS, not yet added to the plane's counters
	bytesIn   [3]uint64
	acks      ackQueue
	resume    chan struct{} // capacity 1: what the reader waits for may have come
	holding   atomic.Bool   // the reader is to be woken when the client is no longer over
	parked    []byte        // whole packets that wait until the client is no longer over
	parkedAt  int           // where the first of them starts

	version    byte // set before the session, constant after
	sess       *session
	present    bool
	who        principal
	cleanStart bool

	closed  atomic.Bool
	closing chan struct{} // closed by Close

	outMu     sync.Mutex
	out       []byte
	spare     []byte
	inWrite   int           // bytes that the writer has taken
	writing   bool          // a writer runs
	marked    bool          // a batch will flush
	starved   bool          // somebody asked for room and there was none
	crowded   bool          // the reader waits for the writer
	stopped   bool          // nothing more is accepted
	busy      bool          // wrote since the last trim
	sent      chan struct{} // closed by the writer that ends; nil while nobody waits
	maxPacket int           // client's Maximum Packet Size, 0: none
	msgsOut   [3]uint64
	bytesOut  [3]uint64
}

// topicState is what a connection remembers of a topic it publishes to.
type topicState struct {
	topic   string
	routes  *routes
	allowed bool
}

func newConn(b *Broker, s *slot, sock net.Conn) *conn {
	c := &conn{
		b: b, sock: sock, ln: s.ln, slot: s, since: s.since,
		gone: make(chan struct{}), closing: make(chan struct{}), resume: make(chan struct{}, 1),
	}
	c.deadline = c.since.Add(c.ln.limits.connectTimeout)
	_ = sock.SetReadDeadline(c.deadline) // a socket that cannot have one fails on Read
	return c
}

// Read implements net.Conn for mochi. It handles data packets until a control
// packet is complete, and returns bytes of that one only.
func (c *conn) Read(p []byte) (int, error) {
	for c.control == 0 {
		if err := c.next(); err != nil {
			c.batch.flush()
			return 0, err
		}
	}
	n := copy(p, c.in[c.r:c.r+c.control])
	c.r += n
	c.control -= n
	return n, nil
}

// next handles one packet, or sets control when it is mochi's.
func (c *conn) next() error {
	if c.closed.Load() {
		return errClosed
	}
	if c.goodbye {
		return io.EOF // nothing counts behind a DISCONNECT [MQTT-3.14.4-1]
	}
	if c.parking() && !c.over() {
		return c.unpark()
	}
	size, header, err := frameSize(c.in[c.r:c.w])
	if err == errNeedMore {
		return c.fill(2)
	}
	if err != nil {
		return c.fail(err)
	}
	limit := c.ln.limits.maxPacket
	if !c.up {
		limit = int(c.b.cfg.MaxConnect)
	}
	if size > limit {
		return c.fail(&wireError{reasonTooLarge, "packet is larger than allowed"})
	}
	if c.w-c.r < size {
		return c.fill(size)
	}
	first := c.in[c.r]
	kind := first >> 4
	if kind == typeConnect {
		switch {
		case c.gotHello:
			return c.fail(protocolError("second CONNECT")) // [MQTT-3.1.0-2]
		case first&0x0F != 0:
			return c.fail(malformed("reserved flags of a CONNECT"))
		}
		c.hello.err = checkConnect(c.in[c.r+header : c.r+size])
		c.gotHello, c.heard, c.control = true, true, size
		return nil
	}
	if !c.up {
		return c.fail(protocolError("first packet is not a CONNECT")) // [MQTT-3.1.0-1]
	}
	c.heard = true
	body := c.in[c.r+header : c.r+size]
	switch kind {
	case typePingreq:
		if first&0x0F != 0 || len(body) != 0 {
			return c.fail(malformed("PINGREQ with flags or a body"))
		}
		c.batch.flush()
		c.control = size
		return nil
	case typeDisconnect:
		if first&0x0F != 0 {
			return c.fail(malformed("reserved flags of a DISCONNECT")) // [MQTT-3.14.1-1]
		}
		if err := c.disconnect(body); err != nil {
			return c.fail(err)
		}
		if c.parking() {
			return c.holdBack() // what came before it comes first
		}
		c.goodbye = true
		c.batch.flush()
		c.control = size
		return nil
	case typePubrec, typePubrel:
		if c.acks.pending() > max(4*c.b.cfg.ReceiveMaximum, 4096) {
			return c.holdBack() // what they are answered must not pile up either
		}
	case typePublish, typeSubscribe, typeUnsubscribe:
		if c.parking() || c.over() {
			return c.park(size)
		}
	}
	if err := c.data(first, body, size); err != nil {
		return c.fail(err)
	}
	c.r += size
	return nil
}

// data handles one packet of the data plane.
func (c *conn) data(first byte, body []byte, size int) error {
	p := c.b.plane
	switch first >> 4 {
	case typePublish:
		return c.publish(first, body, size)
	case typePuback, typePubrec, typePubrel, typePubcomp:
		id, reason, err := parseAck(first, body, c.version)
		if err != nil {
			return err
		}
		switch first >> 4 {
		case typePuback:
			c.sess.puback(id, &c.batch)
		case typePubrec:
			c.sess.pubrec(id, reason, &c.batch)
		case typePubrel:
			c.sess.pubrel(id, &c.acks, &c.batch)
		case typePubcomp:
			c.sess.pubcomp(id, &c.batch)
		}
		return nil
	case typeSubscribe:
		id, identifier, filters, err := parseSubscribe(first, body, c.version)
		if err != nil {
			return err
		}
		p.subscribe(c.sess, &c.acks, id, identifier, filters, &c.batch)
		return nil
	case typeUnsubscribe:
		id, filters, err := parseUnsubscribe(first, body, c.version)
		if err != nil {
			return err
		}
		p.unsubscribe(c.sess, &c.acks, id, filters, &c.batch)
		return nil
	case typeAuth:
		return protocolError("AUTH without an authentication method in the CONNECT") // 4.12
	}
	return protocolError("packet that a client cannot send")
}

// publish handles a PUBLISH.
func (c *conn) publish(first byte, body []byte, size int) error {
	p := c.b.plane
	f, err := parsePublish(first, body, c.version, &c.scratch)
	if err != nil {
		return err
	}
	var st *topicState
	switch {
	case f.alias > maxAliases:
		return &wireError{reasonAliasInvalid, "topic alias above the maximum that was announced"} // [MQTT-3.2.2-18]
	case len(f.topic) > 0:
		if st, err = c.topicState(f.topic); err != nil {
			return err
		}
		c.aliases[f.alias] = st
	case f.alias == 0 || c.aliases[f.alias] == nil:
		return protocolError("PUBLISH with neither a topic nor a known alias") // [MQTT-3.3.2-8]
	default:
		st = c.aliases[f.alias]
	}
	if st.routes.gen != p.gen.Load() {
		st.routes = p.routesFor(st.topic)
		st.allowed = p.acl.Load().allows(c.who, actionPublish, st.topic)
	}
	c.msgsIn[f.qos]++
	c.bytesIn[f.qos] += uint64(size)
	if f.qos > 0 && c.version == 5 && c.acks.unacknowledged() >= c.b.cfg.ReceiveMaximum {
		return &wireError{reasonReceiveMaximum, "more unacknowledged PUBLISH packets than the Receive Maximum allows"} // [MQTT-3.3.4-9]
	}
	if !st.allowed {
		p.drop(dropACL)
		reason := byte(0)
		if c.version == 5 {
			reason = reasonNotAuthorized
		}
		switch f.qos {
		case 1:
			c.acks.send(typePuback, f.packetID, reason, &c.batch)
		case 2:
			c.acks.send(typePubrec, f.packetID, reason, &c.batch)
		}
		return nil
	}
	m := &c.msg
	*m = storage.Message{Topic: st.topic, Payload: f.payload, Properties: f.properties, QoS: f.qos, Retain: f.retain}
	if f.hasExpiry {
		m.Expires = p.now() + int64(f.expiry)*1000
	}
	if f.qos == 0 {
		var r receipt
		p.route(c.sess, st.routes, m, &c.batch, &r)
		if r.pub != nil {
			p.journal.Publish(r.pub)
		}
		return nil
	}
	p.accept(c.sess, &c.acks, st.routes, m, f.packetID, &c.batch)
	return nil
}

// topicState returns what is known of a topic name, and checks it when it is
// new.
func (c *conn) topicState(name []byte) (*topicState, error) {
	if st := c.topics[string(name)]; st != nil {
		return st, nil
	}
	topic := string(name)
	if !validTopic(topic, c.b.cfg.MaxTopicBytes, c.b.cfg.MaxTopicLevels) {
		return nil, &wireError{reasonTopicInvalid, "topic name has a wildcard, or is too long"} // [MQTT-3.3.2-2]
	}
	p := c.b.plane
	st := &topicState{topic: topic, routes: p.routesFor(topic), allowed: p.acl.Load().allows(c.who, actionPublish, topic)}
	if c.topics == nil {
		c.topics = make(map[string]*topicState)
	}
	if len(c.topics) >= maxTopics {
		for old := range c.topics { // any one: the map's order is random
			delete(c.topics, old)
			break
		}
	}
	c.topics[topic] = st
	return st, nil
}

// disconnect reads a DISCONNECT on its way to mochi, which does not know all
// of it.
func (c *conn) disconnect(body []byte) error {
	d, err := parseDisconnect(body, c.version)
	if err != nil {
		return err
	}
	c.leaving = leaving{clean: d.reason == reasonSuccess, // [MQTT-3.14.4-3]
		hasExpiry: d.hasExpiry, expiry: d.expiry}
	if d.hasExpiry {
		c.leaving.expiry = c.b.capExpiry(d.expiry)
		if c.noExpiry && d.expiry != 0 { // 3.14.2.2.2
			c.leaving = leaving{}
			return protocolError("DISCONNECT raises a session expiry interval of 0")
		}
	}
	return nil
}

// fill reads more from the socket, until at least one more byte of a packet
// of the given size is there. It is where a connection waits; before it does
// so, everything that gathered is sent.
func (c *conn) fill(size int) error {
	c.settle()
	if err := c.awaitOutput(); err != nil {
		return err
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
		if c.quiet >= quietReads && len(c.in) > smallRead {
			c.giveBack()
		}
	} else if c.r > 0 && (c.r+size > len(c.in) || c.w == len(c.in)) {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	if c.w == len(c.in) {
		c.grow(size)
	}
	if c.up && c.heard {
		c.heard = false
		c.touch()
	}
	waking := c.parking()
	if waking {
		c.holding.Store(true)
		if !c.over() {
			c.holding.Store(false)
			c.rearm()
			return nil
		}
	}
	n, err := c.sock.Read(c.in[c.w:])
	c.w += n
	if waking {
		c.holding.Store(false)
		c.rearm() // the deadline may have been moved to wake us
		if n == 0 && !c.over() && !c.closed.Load() {
			return nil
		}
	}
	if n > 0 {
		switch {
		case c.w == len(c.in):
			c.quiet = 0
			if len(c.in) < bigRead {
				c.grow(bigRead)
			}
		case n < smallRead:
			c.quiet++
		default:
			c.quiet = 0
		}
		return nil
	}
	if c.closed.Load() {
		return errClosed
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		if !c.up {
			c.b.plane.limit(limitConnectTimeout)
			return c.fail(&wireError{reasonUnspecified, "no CONNECT in time"})
		}
		if c.keepAlive == 0 || time.Now().Before(c.deadline) {
			c.rearm() // somebody woke us, too late to be of use
			return nil
		}
		return c.fail(&wireError{reasonKeepAlive, "keep alive timed out"}) // [MQTT-3.1.2-22]
	}
	return err
}

// settle sends what has gathered and adds up what was counted.
func (c *conn) settle() {
	c.batch.flush()
	p := c.b.plane
	for q := range c.msgsIn {
		if c.msgsIn[q] > 0 {
			p.messagesIn[q].Add(c.msgsIn[q])
			p.bytesIn[q].Add(c.bytesIn[q])
			c.msgsIn[q], c.bytesIn[q] = 0, 0
		}
	}
}

// over reports whether more acknowledgements are due to the client than its
// Receive Maximum. MQTT 5 clients know the bound and do not get there.
func (c *conn) over() bool { return c.acks.pending() > c.b.cfg.ReceiveMaximum }

// parkLimit is how many bytes are read ahead of a client that is over.
const parkLimit = 256 << 10

// parking reports whether packets are parked.
func (c *conn) parking() bool { return c.parkedAt < len(c.parked) }

// park sets the packet at the read position aside, so that the PINGREQ and the
// acknowledgements behind it are found: a disk that stalls must not cost a
// client its connection. At the limit it waits.
func (c *conn) park(size int) error {
	if c.parking() && len(c.parked)-c.parkedAt+size > parkLimit {
		return c.holdBack()
	}
	if c.parkedAt > len(c.parked)/2 {
		n := copy(c.parked, c.parked[c.parkedAt:])
		c.parked, c.parkedAt = c.parked[:n], 0
	}
	c.parked = append(c.parked, c.in[c.r:c.r+size]...)
	c.r += size
	return nil
}

// unpark handles the packet that was parked first.
func (c *conn) unpark() error {
	frame := c.parked[c.parkedAt:]
	size, header, err := frameSize(frame)
	if err != nil {
		return c.fail(err)
	}
	if err := c.data(frame[0], frame[header:size], size); err != nil {
		return c.fail(err)
	}
	if c.parkedAt += size; !c.parking() {
		c.parked, c.parkedAt = nil, 0
	}
	return nil
}

// holdBack waits, reading nothing, until the client is no longer over.
func (c *conn) holdBack() error {
	c.settle()
	for c.over() {
		select {
		case <-c.resume:
		case <-c.closing:
			return errClosed
		}
	}
	c.rearm() // the keep alive rests while we do not read
	return nil
}

// awaitOutput waits, reading nothing, while the client takes so little that
// what it is answered piles up. The writer's timeout bounds the wait.
func (c *conn) awaitOutput() error {
	for {
		c.outMu.Lock()
		c.crowded = len(c.out)+c.inWrite > ackWater && !c.stopped
		crowded := c.crowded
		c.outMu.Unlock()
		if !crowded {
			return nil
		}
		select {
		case <-c.resume:
		case <-c.closing:
			return errClosed
		}
		c.rearm()
	}
}

// touch pushes the read deadline out: the client has been heard.
func (c *conn) touch() {
	if c.keepAlive == 0 {
		if !c.deadline.IsZero() {
			c.setDeadline(time.Time{})
		}
		return
	}
	now := time.Now()
	// A little late is allowed, early is not: so the timer of a busy connection
	// is moved rarely. The first deadline is that of the CONNECT, which may be
	// far too late.
	if left := c.deadline.Sub(now); left < c.keepAlive || left > c.keepAlive+c.keepAlive/8 {
		c.setDeadline(now.Add(c.keepAlive + c.keepAlive/8))
	}
}

// rearm has the next read set its deadline anew, whatever it is now, and the
// keep alive start again.
func (c *conn) rearm() { c.deadline, c.heard = past, true }

// setDeadline moves the read deadline. A Close that comes at the same moment
// must still wake the reader.
func (c *conn) setDeadline(t time.Time) {
	c.deadline = t
	_ = c.sock.SetReadDeadline(t) // a socket that cannot have one fails on Read
	if c.closed.Load() {
		_ = c.sock.SetReadDeadline(past)
	}
}

// grow makes the input buffer larger: the common sizes from a pool, a packet
// beyond them by doubling as its bytes really come.
func (c *conn) grow(size int) {
	old := c.in
	switch {
	case len(old) == 0 && size <= smallRead:
		c.in = make([]byte, smallRead)
	case len(old) < bigRead:
		c.big = bigBufs.Get().(*[]byte)
		c.in = *c.big
		c.w = copy(c.in, old[c.r:c.w])
		c.r = 0
	default:
		c.in = make([]byte, min(2*len(old), max(size, 2*bigRead)))
		c.w = copy(c.in, old[c.r:c.w])
		c.r = 0
		if c.big != nil {
			bigBufs.Put(c.big)
			c.big = nil
		}
	}
}

// giveBack returns a large input buffer. Nothing in it is unread.
func (c *conn) giveBack() {
	if c.big != nil {
		bigBufs.Put(c.big)
		c.big = nil
	}
	c.in, c.quiet = nil, 0
}

// fail ends the connection because of what the client did. It returns err.
func (c *conn) fail(err error) error {
	reason := byte(reasonUnspecified)
	var w *wireError
	if errors.As(err, &w) {
		reason = w.reason
	}
	c.b.log.Info("client disconnected for an error", "client", c.who.clientID, "address", c.sock.RemoteAddr().String(), "err", err)
	c.kick(reason)
	return err
}

// kick sends a DISCONNECT with the reason, where the client's version has one,
// and closes.
func (c *conn) kick(reason byte) {
	c.outMu.Lock()
	if c.up && c.version == 5 && !c.stopped {
		c.out = appendDisconnect(c.out, reason)
	}
	c.outMu.Unlock()
	_ = c.Close()
}

// takeOver implements owner.
func (c *conn) takeOver(reason byte) <-chan struct{} {
	c.kick(reason)
	return c.gone
}

// farewell implements owner.
func (c *conn) farewell() leaving { return c.leaving }

// room implements link.
func (c *conn) room() bool { return c.below(highWater) }

// roomQoS0 implements link.
func (c *conn) roomQoS0() bool { return c.below(qos0Water) }

func (c *conn) below(mark int) bool {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if len(c.out)+c.inWrite < mark || c.stopped {
		return true
	}
	c.starved = true
	return false
}

// sendPublish implements link.
func (c *conn) sendPublish(m *storage.Message, qos byte, dup, retain bool, packetID uint16, ids []uint32, b *batch) bool {
	var expiry uint32
	if m.Expires != 0 {
		expiry = uint32(max(1, (m.Expires-c.b.plane.now()+999)/1000))
	}
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.stopped {
		return true
	}
	before := len(c.out)
	if c.maxPacket > 0 {
		body, _ := publishSize(m, c.version, qos, expiry != 0, ids)
		if 1+varintSize(body)+body > c.maxPacket {
			return false
		}
	}
	c.out = appendPublish(c.out, m, c.version, qos, dup, retain, packetID, expiry, ids)
	c.msgsOut[qos]++
	c.bytesOut[qos] += uint64(len(c.out) - before)
	c.mark(b)
	return true
}

// sendAck implements link.
func (c *conn) sendAck(kind byte, packetID uint16, reason byte, codes []byte, b *batch) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.stopped {
		return
	}
	if kind == typeSuback || kind == typeUnsuback {
		c.out = appendSuback(c.out, kind, c.version, packetID, codes)
	} else {
		c.out = appendAck(c.out, kind, c.version, packetID, reason)
	}
	c.mark(b)
}

// mark has the connection flushed at the end of the batch. outMu is held.
func (c *conn) mark(b *batch) {
	if !c.marked {
		c.marked = true
		b.add(c)
	}
}

// flush starts the writer if there is something to write and none runs.
func (c *conn) flush() {
	c.outMu.Lock()
	c.marked = false
	if c.writing || len(c.out) == 0 {
		c.outMu.Unlock()
		return
	}
	c.writing = true
	c.outMu.Unlock()
	go c.write()
}

// Write implements net.Conn for mochi, which writes whole packets.
func (c *conn) Write(p []byte) (int, error) {
	if c.version < 5 && len(p) > 0 && p[0]>>4 == typeDisconnect {
		return len(p), nil // a server of MQTT 3.x sends none
	}
	c.outMu.Lock()
	if c.stopped {
		c.outMu.Unlock()
		return 0, errClosed
	}
	c.out = append(c.out, p...)
	c.outMu.Unlock()
	c.flush()
	return len(p), nil
}

// write sends what is in the output buffer until there is nothing more, and
// ends. It is the only one that writes to the socket.
func (c *conn) write() {
	var b batch
	for {
		c.outMu.Lock()
		c.inWrite = 0
		if c.crowded {
			c.crowded = false
			c.wake()
		}
		if c.starved && !c.stopped && len(c.out) < highWater {
			c.starved = false
			c.outMu.Unlock()
			c.sess.drained(&b)
			b.flush()
			c.outMu.Lock()
		}
		if len(c.out) == 0 {
			c.writing = false
			c.addUp()
			c.tellSent()
			c.outMu.Unlock()
			return
		}
		buf := c.out
		c.out, c.spare = c.spare[:0], nil
		c.inWrite, c.busy = len(buf), true
		c.addUp()
		c.outMu.Unlock()
		if err := c.writeOut(buf); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load() {
				c.b.log.Info("client disconnected, it took nothing for too long", "client", c.who.clientID, "address", c.sock.RemoteAddr().String(), "err", err)
			}
			c.outMu.Lock()
			c.stopped, c.writing, c.inWrite = true, false, 0
			c.out, c.spare = nil, nil
			c.tellSent()
			c.outMu.Unlock()
			_ = c.Close()
			return
		}
		c.outMu.Lock()
		c.spare = buf[:0]
		c.outMu.Unlock()
	}
}

// writePiece is how much is written under one deadline: a client that takes
// its packets slowly, but takes them, is not to be cut off.
const writePiece = 64 << 10

// writeOut writes buf to the socket.
func (c *conn) writeOut(buf []byte) error {
	for len(buf) > 0 {
		piece := buf[:min(len(buf), writePiece)]
		c.outMu.Lock()
		if !c.stopped { // Close has set a deadline of its own
			_ = c.sock.SetWriteDeadline(time.Now().Add(c.b.cfg.WriteTimeout.D())) // fails on Write too
		}
		c.outMu.Unlock()
		n, err := c.sock.Write(piece)
		if err != nil && !(n > 0 && errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load()) {
			return err
		}
		buf = buf[n:]
	}
	return nil
}

// wake makes a reader that waits look again.
func (c *conn) wake() {
	select {
	case c.resume <- struct{}{}:
	default:
	}
}

// tellSent wakes who waits for the writer. outMu is held.
func (c *conn) tellSent() {
	if c.sent != nil {
		close(c.sent)
		c.sent = nil
	}
}

// trim gives the output buffers of a connection back that wrote nothing since
// the last call.
func (c *conn) trim() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if !c.busy && !c.writing && len(c.out) == 0 {
		c.out, c.spare = nil, nil
	}
	c.busy = false
}

// addUp adds what was counted to the plane's counters. outMu is held.
func (c *conn) addUp() {
	p := c.b.plane
	for q := range c.msgsOut {
		if c.msgsOut[q] > 0 {
			p.messagesOut[q].Add(c.msgsOut[q])
			p.bytesOut[q].Add(c.bytesOut[q])
			c.msgsOut[q], c.bytesOut[q] = 0, 0
		}
	}
}

// Close ends the connection: no further packet is handled, what is already
// written is still sent, for a bounded time. It may be called more than once
// and by any goroutine that holds no session's lock.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	close(c.closing)
	c.outMu.Lock()
	c.stopped = true
	var sent chan struct{}
	if len(c.out) > 0 || c.writing {
		sent = make(chan struct{})
		c.sent = sent
	}
	_ = c.sock.SetWriteDeadline(time.Now().Add(lingerFor)) // closing in any case
	c.outMu.Unlock()
	_ = c.sock.SetReadDeadline(past) // wakes the reader
	if sent == nil {
		return c.sock.Close()
	}
	c.flush()
	c.b.serving.Go(func() { c.linger(sent) }) // so that a stop waits for it
	return nil
}

// linger lets the last packets arrive: it waits until they are written, says
// that nothing more comes, and reads what the client still sends, for a reset
// would take the DISCONNECT away from it. Both waits are bounded by deadlines.
func (c *conn) linger(sent <-chan struct{}) {
	<-sent
	<-c.gone // the reader is away, so the socket is ours
	if half, ok := c.sock.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_ = c.sock.SetReadDeadline(time.Now().Add(lingerFor))
		buf := make([]byte, 512)
		for {
			if _, err := c.sock.Read(buf); err != nil {
				break
			}
		}
	}
	_ = c.sock.Close()
}

// LocalAddr implements net.Conn.
func (c *conn) LocalAddr() net.Addr { return c.sock.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.sock.RemoteAddr() }

// SetDeadline implements net.Conn and does nothing: mochi's deadline would
// cover writes too and overflows above 43,690 s; ours is computed from CONNECT.
func (c *conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn and does nothing, like SetDeadline.
func (c *conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn and does nothing, like SetDeadline.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
