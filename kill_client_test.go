package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// MQTT packet types, as the high half of a packet's first byte.
const (
	mqttConnack    = 2
	mqttPublish    = 3
	mqttPuback     = 4
	mqttPubrec     = 5
	mqttPubrel     = 6
	mqttPubcomp    = 7
	mqttSubscribe  = 8
	mqttSuback     = 9
	mqttDisconnect = 14

	mqttShuttingDown = 0x8B
)

// killWire is one connection of a client of the kill tests. It is small on
// purpose: what it sends and what it takes for granted can be seen.
type killWire struct {
	conn    net.Conn
	r       *bufio.Reader
	w       *bufio.Writer
	version byte
}

func mqttString(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

// put writes a packet to the buffer. An error shows at the next flush.
func (c *killWire) put(first byte, parts ...[]byte) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	_, _ = c.w.Write(binary.AppendUvarint([]byte{first}, uint64(n)))
	for _, p := range parts {
		_, _ = c.w.Write(p)
	}
}

func (c *killWire) putAck(kind byte, id uint16) {
	first := kind << 4
	if kind == mqttPubrel {
		first |= 2
	}
	c.put(first, binary.BigEndian.AppendUint16(nil, id))
}

// properties returns parts as the properties of an MQTT 5 packet, and nothing
// for MQTT 3.1.1.
func (c *killWire) properties(p []byte) []byte {
	if c.version < 5 {
		return nil
	}
	return append([]byte{byte(len(p))}, p...)
}

func (c *killWire) read() (first byte, body []byte, err error) {
	if first, err = c.r.ReadByte(); err != nil {
		return 0, nil, err
	}
	n, err := binary.ReadUvarint(c.r)
	if err != nil {
		return 0, nil, err
	}
	if n > 1<<20 {
		return 0, nil, fmt.Errorf("packet of %d bytes", n)
	}
	body = make([]byte, n)
	_, err = io.ReadFull(c.r, body)
	return first, body, err
}

// killClient is what publishers and subscribers have in common.
type killClient struct {
	run        *killRun
	id         string
	version    byte
	clean      bool
	receiveMax uint16 // MQTT 5; 0: none announced
	known      bool   // a CONNACK was received once, so the session must be there
	connects   atomic.Int64
}

// connect tries until it has a CONNACK or ctx ends.
func (k *killClient) connect(ctx context.Context) (*killWire, error) {
	retry := time.NewTicker(3 * time.Millisecond)
	defer retry.Stop()
	for {
		c, err := k.dial(ctx)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-retry.C:
		}
	}
}

func (k *killClient) dial(ctx context.Context) (*killWire, error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", k.run.address())
	if err != nil {
		return nil, err
	}
	if conn.LocalAddr().String() == conn.RemoteAddr().String() {
		conn.Close() // nobody listens, and the kernel has connected us with ourselves
		return nil, errors.New("connected to itself")
	}
	undo := context.AfterFunc(ctx, func() { conn.Close() })
	c := &killWire{conn: conn, r: bufio.NewReader(conn), w: bufio.NewWriterSize(conn, 1<<16), version: k.version}
	flags := byte(0)
	if k.clean {
		flags = 2
	}
	var props []byte
	if k.version == 5 {
		if !k.clean {
			props = append(props, 17, 0, 1, 0x51, 0x80) // Session Expiry Interval: a day
		}
		if k.receiveMax > 0 {
			props = binary.BigEndian.AppendUint16(append(props, 33), k.receiveMax)
		}
	}
	c.put(1<<4, mqttString("MQTT"), []byte{k.version, flags, 0, 0}, c.properties(props), mqttString(k.id))
	first, body, err := byte(0), []byte(nil), c.w.Flush()
	if err == nil {
		first, body, err = c.read()
	}
	switch {
	case err != nil:
	case first == mqttDisconnect<<4:
		err = errors.New("broker is going down")
	case first != mqttConnack<<4 || len(body) < 2:
		err = k.run.violated("client %s: got packet %x % x, want a CONNACK", k.id, first, body)
	case body[1] == mqttShuttingDown, body[1] == 3: // 3: MQTT 3.1.1's "server unavailable"
		err = errors.New("broker is going down")
	case body[1] != 0:
		err = k.run.violated("client %s: CONNACK refuses with %#x", k.id, body[1])
	case k.known && !k.clean && body[0] != 1:
		err = k.run.violated("client %s: session is gone", k.id)
	case k.clean && body[0] != 0:
		err = k.run.violated("client %s: session present after a clean start", k.id)
	}
	if err != nil {
		undo()
		conn.Close()
		return nil, err
	}
	k.known = true
	k.connects.Add(1)
	k.run.connected()
	return c, nil
}

// ended judges a DISCONNECT of the broker.
func (k *killClient) ended(body []byte) error {
	if k.version == 5 && len(body) > 0 && body[0] == mqttShuttingDown {
		return io.EOF
	}
	return k.run.violated("client %s: broker disconnects with % x", k.id, body)
}

// killStream is what one publisher sends to one topic at one QoS, numbered
// from 1. The order of a stream is what MQTT promises to keep.
type killStream struct {
	from   *killPublisher
	topic  string
	qos    byte
	retain bool
	sent   atomic.Uint64 // the last number sent
	acked  atomic.Uint64 // the last number that the broker has taken over
}

func (s *killStream) String() string { return fmt.Sprintf("%s %s QoS %d", s.from.id, s.topic, s.qos) }

const killPadding = "the quick brown fox jumps over the lazy dog, and again, and again, and again"

// payload is a function of the number, so that a damaged one shows.
func (s *killStream) payload(seq uint64) string {
	return fmt.Sprintf("%s %d %d %s", s.from.id, s.qos, seq, killPadding[:seq%uint64(len(killPadding))])
}

// killMessage is a PUBLISH whose exchange is not finished.
type killMessage struct {
	s     *killStream
	seq   uint64
	id    uint16
	taken bool // QoS 2: PUBREC received, so PUBREL it is that gets re-sent
}

// killPublisher publishes to its streams in turn, with a window of unfinished
// messages. It keeps the state of a client as the standard demands: after a
// reconnect everything unfinished is sent again, first, in order, with the
// same packet identifiers.
type killPublisher struct {
	killClient
	window  int
	streams []*killStream
	pause   time.Duration // between windows; 0: none

	mu       sync.Mutex
	left     int // messages to send yet; below 0: no end
	inflight []*killMessage
	used     map[uint16]bool
	stopping bool
	room     chan struct{} // capacity 1
}

// work publishes until stop was called and everything is acknowledged, or ctx
// ends.
func (p *killPublisher) work(ctx context.Context) {
	for ctx.Err() == nil {
		c, err := p.connect(ctx)
		if err != nil {
			return
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			p.read(c)
			c.conn.Close()
			p.wake()
		}()
		done := p.write(ctx, c, read)
		if done {
			c.put(mqttDisconnect << 4)
			_ = c.w.Flush() // nothing depends on it
		}
		c.conn.Close()
		<-read
		if done {
			return
		}
	}
}

func (p *killPublisher) wake() {
	select {
	case p.room <- struct{}{}:
	default:
	}
}

func (p *killPublisher) stop() {
	p.mu.Lock()
	p.stopping = true
	p.mu.Unlock()
	p.wake()
}

// write sends until the connection ends. It reports whether all work is done.
func (p *killPublisher) write(ctx context.Context, c *killWire, gone <-chan struct{}) bool {
	p.mu.Lock()
	for _, m := range p.inflight {
		if m.taken {
			c.putAck(mqttPubrel, m.id)
		} else {
			p.publish(c, m, !p.clean) // [MQTT-3.3.1-1]; a clean session knows of no earlier attempt
		}
	}
	p.mu.Unlock()
	for turn := 0; ; {
		p.mu.Lock()
		for !p.stopping && p.left != 0 && len(p.inflight) < p.window {
			p.left--
			s := p.streams[turn%len(p.streams)]
			turn++
			m := &killMessage{s: s, seq: s.sent.Add(1), id: p.freeID()}
			p.inflight = append(p.inflight, m)
			p.publish(c, m, false)
		}
		done := p.stopping && len(p.inflight) == 0
		err := c.w.Flush()
		p.mu.Unlock()
		if err != nil || done {
			return done
		}
		if p.pause > 0 {
			select {
			case <-ctx.Done():
			case <-gone:
			case <-time.After(p.pause):
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-gone:
			return false
		case <-p.room:
		}
	}
}

// publish writes one PUBLISH. p.mu is held.
func (p *killPublisher) publish(c *killWire, m *killMessage, dup bool) {
	first := byte(mqttPublish<<4) | m.s.qos<<1
	if dup {
		first |= 8
	}
	if m.s.retain {
		first |= 1
	}
	c.put(first, mqttString(m.s.topic), binary.BigEndian.AppendUint16(nil, m.id), c.properties(nil), []byte(m.s.payload(m.seq)))
}

// freeID returns the lowest free packet identifier, so that each is used again
// as soon as it may be. p.mu is held.
func (p *killPublisher) freeID() uint16 {
	for id := uint16(1); ; id++ {
		if !p.used[id] {
			p.used[id] = true
			return id
		}
	}
}

// read handles what the broker sends, until the connection ends.
func (p *killPublisher) read(c *killWire) {
	for {
		first, body, err := c.read()
		if err != nil {
			return
		}
		switch first >> 4 {
		case mqttPuback, mqttPubrec, mqttPubcomp:
			if len(body) < 2 {
				p.run.violated("publisher %s: got packet %x % x", p.id, first, body)
				return
			}
			err = p.acknowledged(c, first>>4, binary.BigEndian.Uint16(body), body[2:])
		case mqttDisconnect:
			err = p.ended(body)
		default:
			err = p.run.violated("publisher %s: got packet %x % x", p.id, first, body)
		}
		if err != nil {
			return
		}
		p.wake()
	}
}

// acknowledged handles an acknowledgement. Those of a kind have to come in the
// order of what they acknowledge.
func (p *killPublisher) acknowledged(c *killWire, kind byte, id uint16, more []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if kind != mqttPubcomp && len(more) > 0 && more[0] >= 0x80 {
		return p.run.violated("publisher %s: acknowledgement %d of %d refuses with %#x", p.id, kind, id, more[0])
	}
	for i, m := range p.inflight {
		if (m.s.qos == 1) != (kind == mqttPuback) || m.taken != (kind == mqttPubcomp) {
			continue
		}
		if m.id != id {
			return p.run.violated("publisher %s: got acknowledgement %d of identifier %d, want that of %d (%v, message %d) first", p.id, kind, id, m.id, m.s, m.seq)
		}
		if kind == mqttPubrec {
			m.taken = true
			m.s.acked.Store(m.seq)
			p.run.acked.Add(1)
			c.putAck(mqttPubrel, id)
			return nil // the writer flushes
		}
		if kind == mqttPuback {
			m.s.acked.Store(m.seq)
			p.run.acked.Add(1)
		}
		p.inflight = append(p.inflight[:i], p.inflight[i+1:]...)
		delete(p.used, id)
		return nil
	}
	return p.run.violated("publisher %s: got acknowledgement %d of identifier %d, which waits for none", p.id, kind, id)
}

// killSeen is what a subscriber has seen of one stream.
type killSeen struct {
	base     uint64          // numbers up to it need not come: they were sent before the SUBACK
	max      uint64          // the highest that came
	last     uint64          // the last that came on this connection; 0: none
	restarts int64           // how often numbers went back within a connection
	missing  map[uint64]bool // left out by what came so far
}

// killSubscriber is a persistent subscriber. Its state lives as long as the
// test, as if it were on a disk of its own.
type killSubscriber struct {
	killClient
	qos     byte
	filters []string

	mu         sync.Mutex // guards what follows
	seen       map[*killStream]*killSeen
	inbound    map[uint16]string // QoS 2 packet identifiers received and not released, with their payloads
	deliveries int
	duplicates int

	cancel context.CancelFunc // of the online time
	done   chan struct{}
}

// start brings the subscriber online, until stop.
func (s *killSubscriber) start(ctx context.Context) {
	ctx, s.cancel = context.WithCancel(ctx)
	s.done = make(chan struct{})
	go func() {
		defer close(s.done)
		for {
			c, err := s.connect(ctx)
			if err != nil {
				return
			}
			s.read(c)
			c.conn.Close()
		}
	}()
}

// stop takes the subscriber offline, without a DISCONNECT.
func (s *killSubscriber) stop() {
	if s.cancel != nil {
		s.cancel()
		<-s.done
		s.cancel = nil
	}
}

// subscribe connects once, subscribes and goes offline, where only streams
// that it has nothing of yet count from the SUBACK on. It tries again when the
// broker dies meanwhile.
func (s *killSubscriber) subscribe(ctx context.Context) error {
	for {
		c, err := s.connect(ctx)
		if err != nil {
			return err
		}
		parts := [][]byte{{0, 1}, c.properties(nil)}
		for _, f := range s.filters {
			parts = append(parts, mqttString(f), []byte{s.qos})
		}
		c.put(mqttSubscribe<<4|2, parts...)
		err = c.w.Flush()
		for err == nil {
			var first byte
			var body []byte
			if first, body, err = c.read(); err == nil && first == mqttSuback<<4 {
				codes := body[2:]
				if c.version == 5 {
					codes = codes[1:]
				}
				if want := strings.Repeat(string(rune(s.qos)), len(s.filters)); string(codes) != want {
					err = s.run.violated("subscriber %s: SUBACK % x, want each %d", s.id, codes, s.qos)
					break
				}
				s.mu.Lock()
				for _, st := range s.run.streams {
					if s.matches(st.topic) {
						base := st.sent.Load()
						s.seen[st] = &killSeen{base: base, missing: make(map[uint64]bool)}
					}
				}
				s.mu.Unlock()
				c.conn.Close() // deliveries that came meanwhile are not acknowledged
				return nil
			}
		}
		c.conn.Close()
		if s.run.broken() {
			return err
		}
	}
}

func (s *killSubscriber) matches(topic string) bool {
	for _, f := range s.filters {
		if killMatch(strings.Split(f, "/"), strings.Split(topic, "/")) {
			return true
		}
	}
	return false
}

func killMatch(filter, topic []string) bool {
	for i, f := range filter {
		switch {
		case f == "#":
			return true
		case i >= len(topic), f != "+" && f != topic[i]:
			return false
		}
	}
	return len(filter) == len(topic)
}

// read handles what the broker sends, until the connection ends.
func (s *killSubscriber) read(c *killWire) {
	s.mu.Lock()
	for _, seen := range s.seen {
		seen.last = 0
	}
	s.mu.Unlock()
	for {
		first, body, err := c.read()
		if err != nil {
			return
		}
		switch first >> 4 {
		case mqttPublish:
			err = s.publish(c, first, body)
		case mqttPubrel:
			id := binary.BigEndian.Uint16(body)
			s.mu.Lock()
			delete(s.inbound, id)
			s.mu.Unlock()
			c.putAck(mqttPubcomp, id)
		case mqttDisconnect:
			err = s.ended(body)
		default:
			err = s.run.violated("subscriber %s: got packet %x % x", s.id, first, body)
		}
		if err == nil && c.r.Buffered() == 0 {
			err = c.w.Flush()
		}
		if err != nil {
			return
		}
	}
}

// publish takes a delivery and acknowledges it.
func (s *killSubscriber) publish(c *killWire, first byte, body []byte) error {
	topic, qos, id, payload, ok := killParse(c.version, first, body)
	if !ok {
		return s.run.violated("subscriber %s: got PUBLISH %x % x", s.id, first, body)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch qos {
	case 1:
		s.take(topic, qos, payload)
		c.putAck(mqttPuback, id)
	case 2:
		if held, again := s.inbound[id]; !again {
			s.take(topic, qos, payload)
			s.inbound[id] = payload
		} else if held != payload {
			return s.run.violated("subscriber %s: identifier %d comes with %.40q, and it still belongs to %.40q", s.id, id, payload, held)
		}
		c.putAck(mqttPubrec, id)
	}
	return nil
}

// killParse takes a PUBLISH apart.
func killParse(version, first byte, body []byte) (topic string, qos byte, id uint16, payload string, ok bool) {
	qos = first >> 1 & 3
	if len(body) < 2 {
		return
	}
	n := int(binary.BigEndian.Uint16(body))
	rest := body[2:]
	if len(rest) < n+2 {
		return
	}
	topic, rest = string(rest[:n]), rest[n:]
	if qos > 0 {
		id, rest = binary.BigEndian.Uint16(rest), rest[2:]
	}
	if version == 5 {
		size, used := binary.Uvarint(rest)
		if used <= 0 || len(rest) < used+int(size) {
			return
		}
		rest = rest[used+int(size):]
	}
	return topic, qos, id, string(rest), true
}

// take checks a message against what the subscriber has seen. After a
// violation it goes on: what comes next says more about what went wrong. s.mu
// is held.
func (s *killSubscriber) take(topic string, qos byte, payload string) {
	st, seq := s.run.parse(topic, payload)
	seen := s.seen[st]
	if st == nil || seen == nil || payload != st.payload(seq) {
		s.run.violated("subscriber %s: got %s %.60q, which nobody sent to it", s.id, topic, payload)
		return
	}
	if want := min(s.qos, st.qos); qos != want {
		s.run.violated("subscriber %s: got %v message %d with QoS %d, want %d", s.id, st, seq, qos, want)
	}
	if now := st.sent.Load(); seq > now {
		s.run.violated("subscriber %s: got %v message %d of %d sent", s.id, st, seq, now)
	}
	s.deliveries++
	s.run.taken.Add(1)
	switch {
	case seq == seen.max+1, seen.max == 0 && seq <= seen.base+1:
		seen.max = seq
	case seq > seen.max:
		s.run.violated("subscriber %s: got %v message %d, want %d (acknowledged: %d)", s.id, st, seq, max(seen.max, seen.base)+1, st.acked.Load())
		for n := max(seen.max, seen.base) + 1; n < seq; n++ {
			seen.missing[n] = true
		}
		seen.max = seq
	case seen.missing[seq]:
		s.run.violated("subscriber %s: got %v message %d behind %d", s.id, st, seq, seen.max)
		delete(seen.missing, seq)
	case qos == 2:
		s.run.violated("subscriber %s: got %v message %d again", s.id, st, seq)
	default:
		s.duplicates++
		if seq <= seen.last {
			// Only the publisher's sending again makes numbers go back within
			// a connection.
			seen.restarts++
			if again := st.from.connects.Load() - 1; seen.restarts > again {
				s.run.violated("subscriber %s: got %v message %d behind %d: %d steps back, and the publisher reconnected %d times", s.id, st, seq, seen.last, seen.restarts, again)
			}
		}
	}
	seen.last = seq
}

// behind returns what of the streams has not come yet, "" when all has.
func (s *killSubscriber) behind() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for st, seen := range s.seen {
		if want := st.sent.Load(); want > seen.base && seen.max < want {
			out = append(out, fmt.Sprintf("%v: got up to %d, want %d", st, seen.max, want))
		}
	}
	if n := len(s.inbound); n > 0 {
		out = append(out, fmt.Sprintf("%d identifiers of QoS 2 are not released", n))
	}
	return strings.Join(out, "; ")
}

// missing counts the messages that were left out and never came.
func (s *killSubscriber) missing() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seen := range s.seen {
		n += len(seen.missing)
	}
	return n
}
