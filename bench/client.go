package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

const (
	readBytes  = 128 << 10 // room for one read
	smallBytes = 16 << 10  // the same for each of many subscribers
	batchBytes = 64 << 10  // most that a publisher writes at once
	filterSize = 500       // most topic filters in one SUBSCRIBE
	never      = math.MaxUint64
)

// A client is one MQTT connection of the generator. One goroutine uses it;
// only Write and Close of conn are for others too.
type client struct {
	conn    net.Conn
	version byte
	in      []byte // in[r:w] has arrived and waits to be decoded
	r, w    int
	out     []byte // encoded and waiting to be written
}

// dial opens a connection that fails by itself at ctx's deadline, so that
// reads and writes need no deadline of their own. room is how many bytes it
// can read at once.
func dial(ctx context.Context, addr string, version byte, room int) (*client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if end, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(end); err != nil {
			_ = conn.Close()
			return nil, err
		}
	}
	return &client{conn: conn, version: version, in: make([]byte, room)}, nil
}

// flush writes what has gathered.
func (c *client) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.conn.Write(c.out)
	c.out = c.out[:0]
	return err
}

// fill reads once, as much as there is room for.
func (c *client) fill() error {
	if c.r > 0 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	if c.w == len(c.in) {
		return fmt.Errorf("a packet of more than %d bytes", len(c.in))
	}
	n, err := c.conn.Read(c.in[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	return err
}

// next takes the next whole packet that has arrived, false when there is none.
func (c *client) next() (frame, bool, error) {
	f, n, err := nextFrame(c.in[c.r:c.w])
	c.r += n
	return f, n > 0, err
}

// await flushes and returns the next packet, which must be of this kind.
func (c *client) await(kind byte) (frame, error) {
	if err := c.flush(); err != nil {
		return frame{}, err
	}
	for {
		f, ok, err := c.next()
		if err != nil {
			return f, err
		}
		if ok {
			if f.kind() != kind {
				return f, fmt.Errorf("packet type %d, want %d", f.kind(), kind)
			}
			return f, nil
		}
		if err := c.fill(); err != nil {
			return f, err
		}
	}
}

// connect performs the handshake; it reports whether the broker had a session.
func (c *client) connect(id string, clean bool) (present bool, err error) {
	c.out = appendConnect(c.out, c.version, id, clean)
	f, err := c.await(connack)
	if err != nil {
		return false, fmt.Errorf("connect %s: %w", id, err)
	}
	if len(f.body) < 2 || f.body[1] != 0 {
		return false, fmt.Errorf("connect %s: refused with CONNACK % x", id, f.body)
	}
	return f.body[0]&1 == 1, nil
}

// subscribe subscribes to the filters and insists on the QoS.
func (c *client) subscribe(qos byte, filters ...string) error {
	for some := range slices.Chunk(filters, filterSize) {
		c.out = appendSubscribe(c.out, c.version, 1, some, qos)
		f, err := c.await(suback)
		if err != nil {
			return fmt.Errorf("subscribe %s: %w", some[0], err)
		}
		codes := f.body[max(0, len(f.body)-len(some)):] // properties, if any, come before
		if len(f.body) < 2+len(some) || slices.ContainsFunc(codes, func(code byte) bool { return code != qos }) {
			return fmt.Errorf("subscribe %s: SUBACK % x, want QoS %d granted", some[0], f.body, qos)
		}
	}
	return nil
}

// disconnect says goodbye and closes; a failure has nothing left to spoil.
func (c *client) disconnect() {
	_, _ = c.conn.Write(disconnectPacket)
	_ = c.conn.Close()
}

// leave says goodbye and waits until the broker has closed: it knows then that
// the client is away.
func (c *client) leave() error {
	defer c.conn.Close()
	if _, err := c.conn.Write(disconnectPacket); err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	if _, err := io.Copy(io.Discard, c.conn); err != nil {
		return fmt.Errorf("the broker does not close after a DISCONNECT: %w", err)
	}
	return nil
}

// A publisher sends as fast as three bounds allow: a window of messages that
// the broker has not acknowledged (QoS 1 and 2), a lead over the slowest of its
// readers, and an end, by number or by time. It writes and reads in one
// goroutine: whatever acknowledgements one read brings are refilled by one write.
type publisher struct {
	c         *client
	templates []template // used in turn
	qos       byte
	window    int    // most messages in flight, QoS 1 and 2
	batch     int    // most bytes written at once
	lead      uint64 // most messages beyond what each reader has received
	limit     uint64 // messages to send in all
	until     time.Time
	readers   []reader
	clock     *ackClock // nil: nobody wants to know how long acknowledgements take

	sent     uint64
	floor    uint64 // what every reader had received when last looked
	inflight int
	state    [maxIDs + 1]byte // by packet identifier: the acknowledgement that it waits for

	// A publisher that waits for its readers says here how much each must
	// have received before it wants to be woken.
	wakeAt atomic.Uint64
	wake   chan struct{}
}

// A reader is what a publisher knows of one of its subscribers.
type reader struct {
	s    *subscriber
	slot int
}

func newPublisher(number int, w workload) *publisher {
	p := &publisher{
		qos: w.qos, window: w.window, batch: batchBytes, lead: w.lead, limit: never,
		wake: make(chan struct{}, 1),
	}
	if w.topics == 0 {
		p.templates = []template{newTemplate(w.version, numbered(w.topic, number), w.qos, w.payload, uint32(number))}
	}
	for i := range w.topics {
		p.templates = append(p.templates, newTemplate(w.version, numbered(w.topic, i), w.qos, w.payload, uint32(number)))
	}
	if w.window > window { // or it would never have as many in flight
		p.batch = max(p.batch, w.window*len(p.templates[0].data))
	}
	p.wakeAt.Store(never)
	return p
}

// run sends until the limit or the time is reached and everything is acknowledged.
func (p *publisher) run(ctx context.Context) error {
	for {
		p.fill()
		if err := p.c.flush(); err != nil {
			return err
		}
		var err error
		switch {
		case p.inflight > 0:
			err = p.acknowledgements()
		case p.sent >= p.limit:
			return nil
		default:
			err = p.awaitReaders(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// fill encodes as many messages as the bounds allow, at most a batch.
func (p *publisher) fill() {
	if p.sent >= p.limit {
		return
	}
	if !p.until.IsZero() && !time.Now().Before(p.until) {
		p.limit = p.sent
		return
	}
	room := min(p.limit-p.sent, uint64(p.batch/len(p.templates[0].data)+1))
	if p.qos > 0 {
		room = min(room, uint64(p.window-p.inflight))
	}
	if p.sent+room > p.floor+p.lead {
		p.floor = p.received()
		room = min(room, p.floor+p.lead-p.sent)
	}
	for range room {
		id := uint16(0)
		if p.qos > 0 {
			id = uint16(1 + p.sent%maxIDs)
			if p.state[id] != 0 {
				return // its last message is still under way
			}
			p.state[id] = puback
			if p.qos == 2 {
				p.state[id] = pubrec
			}
			p.inflight++
		}
		t := &p.templates[p.sent%uint64(len(p.templates))]
		p.c.out = t.append(p.c.out, id, p.sent)
		p.clock.start(id)
		p.sent++
	}
}

// received returns how many messages every reader has, all when there is none.
func (p *publisher) received() uint64 {
	n := p.sent
	for _, r := range p.readers {
		n = min(n, r.s.seen[r.slot].Load())
	}
	return n
}

// acknowledgements reads once and handles all that came.
func (p *publisher) acknowledgements() error {
	if err := p.c.fill(); err != nil {
		return err
	}
	for {
		f, ok, err := p.c.next()
		if err != nil || !ok {
			return err
		}
		id, err := f.packetID()
		if err != nil {
			return err
		}
		if p.state[id] != f.kind() {
			return fmt.Errorf("packet type %d for identifier %d, want %d", f.kind(), id, p.state[id])
		}
		if f.kind() == pubrec {
			p.state[id] = pubcomp
			p.c.out = appendAck(p.c.out, pubrel, id)
			continue
		}
		p.state[id] = 0
		p.inflight--
		p.clock.stop(id)
	}
}

// awaitReaders returns when the publisher may send on; when it had to wait,
// then with half of its lead free, so that writes stay large.
func (p *publisher) awaitReaders(ctx context.Context) error {
	if p.floor = p.received(); p.sent-p.floor < p.lead {
		return nil
	}
	want := p.sent - p.lead/2
	p.wakeAt.Store(want)
	defer p.wakeAt.Store(never)
	for {
		if p.floor = p.received(); p.floor >= want {
			return nil
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// A subscriber receives, acknowledges, and checks that each publisher's
// messages arrive once each and in order.
type subscriber struct {
	c       *client
	qos     byte
	sources []*publisher
	slots   []int // by publisher number: where it stands in sources, -1 when not subscribed to

	// A subscriber of one topic of many gets every step-th message, from first on.
	first, step uint64

	next []uint64        // by slot: the sequence number that must come next
	seen []atomic.Uint64 // the same for other goroutines, once a buffer

	completed atomic.Uint64 // messages with every acknowledgement done on this side
	goal      atomic.Uint64 // once completed is that far, it says so on reached
	reached   chan struct{}
	pong      chan struct{}
	ending    atomic.Bool // whoever closes the connection sets it first
}

func newSubscriber(w workload, number int, publishers []*publisher) *subscriber {
	s := &subscriber{
		qos: w.qos, slots: make([]int, len(publishers)), step: 1,
		reached: make(chan struct{}, 1), pong: make(chan struct{}, 1),
	}
	if w.narrow {
		s.first, s.step = uint64(number), uint64(w.topics)
	}
	for i, p := range publishers {
		s.slots[i] = -1
		if w.feeds(i, number) {
			s.slots[i] = len(s.sources)
			p.readers = append(p.readers, reader{s, len(s.sources)})
			s.sources = append(s.sources, p)
		}
	}
	s.next = make([]uint64, len(s.sources))
	s.seen = make([]atomic.Uint64, len(s.sources))
	for i := range s.next {
		s.next[i] = s.first
		s.seen[i].Store(s.first)
	}
	s.goal.Store(never)
	return s
}

// due returns how many of a publisher's messages the subscriber must get.
func (s *subscriber) due(sent uint64) uint64 {
	if sent <= s.first {
		return 0
	}
	return (sent-s.first-1)/s.step + 1
}

// run receives until the connection is closed.
func (s *subscriber) run() error {
	completed := uint64(0)
	for {
		for {
			f, ok, err := s.c.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			n, err := s.handle(f)
			if err != nil {
				return err
			}
			completed += n
		}
		if err := s.c.flush(); err != nil {
			return s.unlessEnding(err)
		}
		s.report(completed)
		if err := s.c.fill(); err != nil {
			return s.unlessEnding(err)
		}
	}
}

func (s *subscriber) unlessEnding(err error) error {
	if s.ending.Load() {
		return nil
	}
	return err
}

// handle handles one packet and returns how many messages it completes.
func (s *subscriber) handle(f frame) (uint64, error) {
	switch f.kind() {
	case publish:
		m, err := f.message(s.c.version)
		if err != nil {
			return 0, err
		}
		if m.qos != s.qos {
			return 0, fmt.Errorf("message with QoS %d, want %d", m.qos, s.qos)
		}
		if int(m.publisher) >= len(s.slots) || s.slots[m.publisher] < 0 {
			return 0, fmt.Errorf("message of publisher %d, which was not subscribed to", m.publisher)
		}
		slot := s.slots[m.publisher]
		if want := s.next[slot]; m.seq != want {
			return 0, fmt.Errorf("message %d of publisher %d, want %d: lost, repeated or out of order", m.seq, m.publisher, want)
		}
		s.next[slot] += s.step
		switch s.qos {
		case 1:
			s.c.out = appendAck(s.c.out, puback, m.packetID)
		case 2:
			s.c.out = appendAck(s.c.out, pubrec, m.packetID)
			return 0, nil
		}
		return 1, nil
	case pubrel:
		id, err := f.packetID()
		s.c.out = appendAck(s.c.out, pubcomp, id)
		return 1, err
	case pingresp:
		select {
		case s.pong <- struct{}{}:
		default:
		}
		return 0, nil
	}
	return 0, fmt.Errorf("packet type %d was not expected", f.kind())
}

// report tells publishers and whoever waits for the goal how far it has come.
func (s *subscriber) report(completed uint64) {
	for i, n := range s.next {
		if s.seen[i].Load() == n {
			continue
		}
		s.seen[i].Store(n)
		if p := s.sources[i]; n >= p.wakeAt.Load() {
			select {
			case p.wake <- struct{}{}:
			default:
			}
		}
	}
	s.completed.Store(completed)
	if completed >= s.goal.Load() {
		select {
		case s.reached <- struct{}{}:
		default:
		}
	}
}

// finish waits until the subscriber has completed n messages and the broker has
// answered a ping after that. Only then has the broker handled the last
// acknowledgement: Mosquitto, which reads one packet of each client in turn,
// can be 100,000 acknowledgements of a fan-in behind. And what it sent by
// mistake has then been seen by run.
func (s *subscriber) finish(ctx context.Context, n uint64) error {
	s.goal.Store(n)
	for s.completed.Load() < n {
		select {
		case <-s.reached:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d messages: %w", s.completed.Load(), n, context.Cause(ctx))
		}
	}
	if _, err := s.c.conn.Write(pingreqPacket); err != nil {
		return cmp.Or(context.Cause(ctx), err) // it was closed because of another's error, which counts
	}
	select {
	case <-s.pong:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("no answer to a ping: %w", context.Cause(ctx))
	}
}
