package broker

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"penstock/storage"
)

const (
	highWater  = 64 << 10 // output that a queue is pumped into
	lingerFor  = 2 * time.Second
	maxAliases = 16       // Topic Alias Maximum that we announce, and the most that we use of a client's
	maxTopics  = 1024     // topics whose routes a connection remembers
	maxRoutes  = 16 << 10 // and routes of these
)

var errClosed = errors.New("connection is closed")

// past is a deadline that ends a Read at once.
var past = time.Unix(1, 0)

// conn is a client's connection. mochi has it until the CONNACK is written
// (handshake); from then on every packet is handled in place by the data
// plane. What is written gathers in one output buffer.
//
// The fields of the input side belong to the goroutine that reads: mochi's
// first, run's after it.
type conn struct {
	b       *Broker
	sock    net.Conn
	ln      *listener
	slot    *slot
	refusal byte          // not 0: the CONNECT is refused with this reason, there are too many connections
	gone    chan struct{} // closed when no further packet will be handled

	// Input side.
	in        []byte
	inOf      *buffer            // what in is made of, where it is that
	small     *[smallBuffer]byte // what in is while a socket that is not raw waits
	raw       syscall.RawConn    // the socket, if it can wait without a buffer; else nil
	readable  func(fd uintptr) bool
	writable  func(fd uintptr) // with now, of whoever has set writing
	now       []byte
	need      int // size of the packet that is waited for
	readN     int // what readable read
	readErr   error
	r, w      int // in[r:w] is unread
	deadline  time.Time
	batch     batch
	scratch   []byte
	msg       storage.Message
	topics    map[string]*topicState
	routes    int                          // of topics
	aliases   *[maxAliases + 1]*topicState // nil until the client uses one
	gotHello  bool                         // CONNECT was read
	up        bool                         // CONNACK with success was written; changed with outMu held, for kick reads it
	heard     bool                         // a packet came since the read deadline was looked at
	goodbye   bool                         // DISCONNECT was read
	leaving   leaving
	noExpiry  bool          // the Session Expiry Interval of CONNECT was 0
	keepAlive time.Duration // one and a half times what the client asked for; 0: none
	hello     *connectFrame // until the CONNACK
	assigned  bool          // the client identifier is of our making
	imposed   bool          // so is the keep alive
	queued    bool          // the login had to wait for those of others
	msgsIn    [3]uint64     // by QoS, not yet added to the plane's counters
	bytesIn   [3]uint64
	packetsIn uint64 // these three too
	networkIn uint64
	payloadIn uint64
	acks      ackQueue
	resume    chan struct{} // capacity 1: what the reader waits for may have come
	holding   atomic.Bool   // the reader is to be woken when the client is no longer over
	parked    []byte        // whole packets that wait until the client is no longer over
	parkedAt  int           // where the first of them starts

	version    byte // set before the session, constant after
	noProblems bool // the client wants no reason strings; likewise
	sess       *session
	present    bool
	who        principal
	cleanStart bool

	closed  atomic.Bool
	closing chan struct{} // closed by Close
	broken  atomic.Bool   // the client has closed; there is no use in waiting for it

	outMu     sync.Mutex
	out       []byte
	outOf     *buffer       // what out is made of
	inWrite   int           // bytes that the writer has taken
	writing   bool          // a writer runs
	marked    bool          // a batch will flush
	starved   bool          // somebody asked for room and there was none
	crowded   bool          // the reader waits for the writer
	stopped   bool          // nothing more is accepted
	parting   bool          // what was written last says why the connection ends
	sent      chan struct{} // closed by the writer that ends; nil while nobody waits
	maxPacket int           // client's Maximum Packet Size, 0: none
	aliasMax  int           // Topic Aliases that may be used to the client
	outAlias  map[string]uint16
	msgsOut   [3]uint64
	bytesOut  [3]uint64

	otherOut   uint64 // packets but PUBLISH
	payloadOut uint64
}

// topicState is what a connection remembers of a topic it publishes to.
type topicState struct {
	topic   string
	routes  *routes
	allowed bool
}

// size is how many routes a topic counts for.
func (t *topicState) size() int { return 1 + len(t.routes.direct) + len(t.routes.shared) }

func newConn(b *Broker, s *slot, sock net.Conn) *conn {
	c := &conn{
		b: b, sock: sock, ln: s.ln, slot: s,
		gone: make(chan struct{}), closing: make(chan struct{}), resume: make(chan struct{}, 1),
	}
	c.deadline = s.since.Add(c.ln.limits.connectTimeout)
	_ = sock.SetReadDeadline(c.deadline) // a socket that cannot have one fails on Read
	if s, ok := sock.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			c.raw, c.readable, c.writable = raw, c.readNow, c.writeNow
		}
	}
	return c
}

// run handles the client's packets until the connection ends.
func (c *conn) run() {
	for c.next() == nil {
	}
	if c.b.stopping.Load() && !c.goodbye {
		c.lastWords()
	}
	c.batch.flush()
}

// lastWords handles the acknowledgements and the DISCONNECT that the client
// sent before it could know of the stop: what it has acknowledged shall not
// come twice, and its will shall not come at all.
func (c *conn) lastWords() {
	for range 16 { // 1 MiB; who sends more does not listen
		for {
			size, header, err := frameSize(c.in[c.r:c.w])
			if err != nil || c.w-c.r < size {
				break
			}
			first, body := c.in[c.r], c.in[c.r+header:c.r+size]
			c.r += size
			switch first >> 4 {
			case typePuback, typePubrec, typePubcomp:
				_ = c.data(first, body, size) // it is on its way out
			case typeDisconnect:
				_ = c.disconnect(body)
				return
			}
		}
		if c.raw == nil {
			return
		}
		c.readN = 0
		if err := c.raw.Control(func(fd uintptr) { c.readNow(fd) }); err != nil || c.readN == 0 {
			return
		}
	}
}

// next handles one packet, or makes greeting of it when it is the CONNECT.
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
	if !c.up && c.w > c.r && (c.in[c.r]>>4 != typeConnect || c.gotHello) {
		return c.fail(protocolError("first packet is not a CONNECT")) // [MQTT-3.1.0-1]
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
	switch {
	case size > limit && !c.up:
		return c.oversized(c.in[c.r+header : c.w])
	case size > limit:
		return c.fail(&wireError{reasonTooLarge, "packet is larger than allowed"})
	}
	if c.version == 5 && header > 2 && c.in[c.r+header-1] == 0 {
		return c.fail(malformed("remaining length is longer than it must be")) // [MQTT-1.5.5-1]
	}
	if c.w-c.r < size {
		return c.fill(size)
	}
	first := c.in[c.r]
	kind := first >> 4
	if !c.up {
		c.gotHello, c.heard = true, true
		c.packetsIn++
		c.b.plane.connects.Add(1)
		if err := c.greet(first, c.in[c.r+header:c.r+size]); err != nil {
			return err
		}
		c.r += size
		return nil
	}
	c.heard = true
	body := c.in[c.r+header : c.r+size]
	switch kind {
	case typePingreq:
		if c.version > 3 && first&0x0F != 0 || len(body) != 0 {
			return c.fail(malformed("PINGREQ with flags or a body"))
		}
		c.packetsIn++
		c.pong()
		c.r += size
		return nil
	case typeDisconnect:
		if c.version > 3 && first&0x0F != 0 {
			return c.fail(malformed("reserved flags of a DISCONNECT")) // [MQTT-3.14.1-1]
		}
		if err := c.disconnect(body); err != nil {
			return c.fail(err)
		}
		if c.parking() {
			return c.holdBack() // what came before it comes first
		}
		c.goodbye = true
		c.packetsIn++
		c.r += size
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

// pong answers a PINGREQ [MQTT-3.12.4-1].
func (c *conn) pong() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if !c.stopped {
		c.reserve(2)
		c.out = append(c.out, typePingresp<<4, 0)
		c.otherOut++
		c.mark(&c.batch)
	}
}

// data handles one packet of the data plane.
func (c *conn) data(first byte, body []byte, size int) error {
	p := c.b.plane
	c.packetsIn++
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
	case typeConnect:
		return protocolError("second CONNECT") // [MQTT-3.1.0-2]
	case typeAuth:
		if first&0x0F != 0 {
			return malformed("reserved flags of an AUTH") // [MQTT-3.15.1-1]
		}
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
		if f.alias > 0 {
			if c.aliases == nil {
				c.aliases = new([maxAliases + 1]*topicState)
			}
			c.aliases[f.alias] = st
		}
	case f.alias == 0 || c.aliases == nil || c.aliases[f.alias] == nil:
		return protocolError("PUBLISH with neither a topic nor a known alias") // [MQTT-3.3.2-8]
	default:
		st = c.aliases[f.alias]
	}
	if st.routes.gen != p.gen.Load() {
		before := st.size()
		st.routes = p.routesFor(st.topic)
		if c.topics[st.topic] == st { // else only an alias has it
			c.routes += st.size() - before
		}
		st.allowed = p.acl.Load().allows(c.who, actionPublish, st.topic)
	}
	c.msgsIn[f.qos]++
	c.bytesIn[f.qos] += uint64(size)
	c.payloadIn += uint64(len(f.payload))
	if f.qos > 0 && c.version == 5 && c.acks.unacknowledged() >= c.b.cfg.ReceiveMaximum {
		return &wireError{reasonReceiveMaximum, "more unacknowledged PUBLISH packets than the Receive Maximum allows"} // [MQTT-3.3.4-9]
	}
	m := &c.msg
	*m = storage.Message{Topic: st.topic, Payload: f.payload, Properties: f.properties, QoS: f.qos, Retain: f.retain}
	if f.hasExpiry {
		m.Expires = p.now() + int64(f.expiry)*1000
	}
	full := p.fullFor(m)
	if (full || !st.allowed) && f.qos == 2 && c.sess.received(f.packetID, &c.acks, &c.batch) {
		// What was taken over once is not refused when it is sent again: the client
		// would use the identifier for another message, which we took for this one.
		return nil
	}
	if !st.allowed {
		p.drop(dropACL)
		reason := byte(0)
		if c.version == 5 {
			reason = reasonNotAuthorized
		}
		if f.qos > 0 {
			c.acks.send(typePuback+f.qos-1, f.packetID, reason, &c.batch)
		}
		return nil
	}
	if full {
		p.limit(limitRetained)
		switch {
		case f.qos == 0: // delivered, but not retained
			m.Retain = false
		case c.version < 5: // which has no way to say no
			return &wireError{reasonQuota, "too many retained messages"}
		default:
			c.acks.send(typePuback+f.qos-1, f.packetID, reasonQuota, &c.batch)
			return nil
		}
	}
	if f.qos == 0 {
		if limit := p.refuses(st.routes, m); limit != noLimit {
			p.limit(limit)
			m.Retain = false // delivered, but not retained
		}
		var r receipt
		p.route(c.sess, st.routes, m, &c.batch, &r)
		if r.pub != nil {
			p.journal.Publish(r.pub)
		}
		return nil
	}
	return p.accept(c.sess, &c.acks, st.routes, m, f.packetID, &c.batch)
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
	for name, old := range c.topics { // any: the map's order is random
		if len(c.topics) < maxTopics && c.routes < maxRoutes {
			break
		}
		c.routes -= old.size()
		delete(c.topics, name)
	}
	c.topics[topic] = st
	c.routes += st.size()
	return st, nil
}

// disconnect reads a DISCONNECT.
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
	if c.networkIn > 0 || c.packetsIn > 0 {
		p.packetsIn.Add(c.packetsIn)
		p.networkIn.Add(c.networkIn)
		p.payloadIn.Add(c.payloadIn)
		c.packetsIn, c.networkIn, c.payloadIn = 0, 0, 0
	}
}

// over reports whether more acknowledgements are due to the client than its
// Receive Maximum, or if the messages that they are for take too much memory. MQTT
// 5 clients know the first bound and do not get there.
func (c *conn) over() bool {
	held := c.acks.held.Load()
	return c.acks.pending() > c.b.cfg.ReceiveMaximum || held > heldLimit || held > parkLimit && c.b.plane.held.Load() > allHeldLimit
}

// heldLimit is how much of one client may wait for the disk, bytes, and
// allHeldLimit how much of all before none may have more than parkLimit.
const (
	heldLimit    = 4 << 20
	allHeldLimit = 32 << 20
)

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
		if c.broken.Load() {
			return errClosed
		}
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
// what it is answered piles up to twice what QoS 0 may take. The writer's timeout bounds the wait.
func (c *conn) awaitOutput() error {
	for {
		c.outMu.Lock()
		c.crowded = len(c.out)+c.inWrite > 2*int(c.b.cfg.MaxOutput) && !c.stopped
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

// fail ends the connection because of what the client did. It returns err.
func (c *conn) fail(err error) error {
	reason, text := byte(reasonUnspecified), ""
	var w *wireError
	if errors.As(err, &w) {
		reason, text = w.reason, w.text
	}
	if limit, ok := limitOf[reason]; ok {
		c.b.plane.limit(limit)
	}
	c.b.notice("client disconnected for an error", "client", c.who.clientID, "address", c.sock.RemoteAddr().String(), "err", err)
	c.kick(reason, text)
	return err
}

// kick sends a DISCONNECT with the reason, where the client's version has one,
// and closes.
func (c *conn) kick(reason byte, text string) {
	c.outMu.Lock()
	if c.up && c.version == 5 && !c.stopped && !c.parting {
		c.reserve(maxAckHeader + len(text))
		before := len(c.out)
		c.out = appendDisconnect(c.out, reason, text)
		if c.tooLarge(before) { // [MQTT-3.14.2-3]
			c.out = appendDisconnect(c.out[:before], reason, "")
		}
		if c.tooLarge(before) { // [MQTT-3.1.2-24]
			c.out = c.out[:before]
		} else {
			c.otherOut++
			c.parting = true
		}
	}
	c.outMu.Unlock()
	_ = c.Close()
}

// takeOver implements owner.
func (c *conn) takeOver(reason byte) <-chan struct{} {
	c.kick(reason, reasonTexts[reason])
	return c.gone
}

// farewell implements owner.
func (c *conn) farewell() leaving { return c.leaving }

// wake makes a reader that waits look again.
func (c *conn) wake() {
	select {
	case c.resume <- struct{}{}:
	default:
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
	parting := c.parting
	_ = c.sock.SetWriteDeadline(time.Now().Add(lingerFor)) // closing in any case
	c.outMu.Unlock()
	_ = c.sock.SetReadDeadline(past) // wakes the reader
	switch {
	case sent != nil || parting:
		c.flush()
		c.b.serving.Go(func() { c.linger(sent) }) // so that a stop waits for it
	case c.b.stopping.Load():
		c.b.serving.Go(func() {
			<-c.gone // not before the last words are read
			c.shut()
		})
	default:
		c.shut()
	}
	return nil
}

// shut closes the socket, and gives the connection's place back.
func (c *conn) shut() {
	_ = c.sock.Close()
	c.b.mu.Lock()
	c.b.release(c.slot)
	c.b.mu.Unlock()
}

// linger lets the last packets arrive: it waits until they are written, says
// that nothing more comes, and reads what the client still sends, for a reset
// would take the DISCONNECT away from it. Both waits are bounded by deadlines.
func (c *conn) linger(sent <-chan struct{}) {
	if sent != nil { // else it is written
		<-sent
	}
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
	c.shut()
}
