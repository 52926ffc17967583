// Package broker is Penstock's MQTT broker. mochi-mqtt does the handshake
// of a connection, up to its CONNACK; the data plane, which keeps the promise
// that an acknowledged message is never lost and never out of order, is its
// own. docs/delivery.md has its state machines on a page.
package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"penstock/storage"
)

// Errors of Publish.
var (
	ErrQuota        = errors.New("retained messages have no room (broker.max_retained)")
	ErrDiskFull     = errors.New("disk is nearly full (storage.reserve)")
	ErrQueueFull    = errors.New("queue of a subscriber, or of all, is full (broker.queue_overflow)")
	ErrInvalidTopic = errors.New("topic is not one that can be published to")
	ErrInvalidQoS   = errors.New("QoS is none of 0, 1, 2")
)

// stopTimeout bounds how long a stop takes. The last second of it is for what
// the disk was doing when the rest was over.
const stopTimeout = 5 * time.Second

// Broker is the MQTT broker. All its methods are safe for concurrent use.
type Broker struct {
	cfg     Config
	db      *storage.DB
	log     *slog.Logger
	mochi   *mqtt.Server
	journal *storage.Journal
	plane   *plane
	started time.Time
	hashing chan struct{}
	notices notices
	logins  logins
	sys     sysTopics

	listeners []*listener

	stopping atomic.Bool
	mu       sync.Mutex
	conns    map[*conn]struct{}
	slots    slots
	serving  sync.WaitGroup
}

// New restores what the store remembers and binds the listeners. Those whose
// address names a socket get it from passed; every one of these is the broker's
// from the call on, and closed if no listener wants it. Run must be called to
// serve.
func New(cfg Config, db *storage.DB, log *slog.Logger, passed ...Socket) (_ *Broker, err error) {
	defer func() {
		for _, s := range passed { // what is left of them
			if err == nil {
				log.Error("socket that systemd passed is closed: no listener has its name", "name", s.Name, "address", s.Listener.Addr().String())
			}
			_ = s.Listener.Close() // nobody wants it
		}
	}()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	b := &Broker{
		cfg: cfg, db: db, log: log, started: time.Now(),
		hashing: make(chan struct{}, 1),
		conns:   make(map[*conn]struct{}),
		slots:   slots{max: min(cfg.MaxConnections, fileLimit())},
	}
	if b.slots.max < cfg.MaxConnections {
		log.Warn("fewer connections than broker.max_connections: the process may not open more files (LimitNOFILE, ulimit -n)", "connections", b.slots.max, "max_connections", cfg.MaxConnections)
	}
	if b.journal, err = db.NewJournal(log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.closeListeners()
			_ = b.journal.Close() // the error that counts is the one returned
		}
	}()
	b.plane = newPlane(&b.cfg, b.journal, log)
	b.plane.space = db.Space()
	rules, err := db.ACLRules(context.Background())
	if err != nil {
		return nil, fmt.Errorf("load access rules: %w", err)
	}
	b.plane.acl.Store(newACL(rules))
	if err := b.plane.restore(); err != nil {
		return nil, err
	}
	b.plane.firstMark()
	opts := mochiOptions(&b.cfg)
	opts.Logger = slog.New(slog.DiscardHandler)
	opts.ClientNetReadBufferSize = 512 // it reads one packet
	b.mochi = mqtt.New(opts)
	if err := b.mochi.AddHook(&hook{b: b}, nil); err != nil {
		return nil, fmt.Errorf("set up control plane: %w", err)
	}
	for i, l := range cfg.Listeners {
		ln, err := openListener(b, l, &passed)
		if err != nil {
			return nil, &ListenerError{i, l.Name, err}
		}
		b.listeners = append(b.listeners, ln)
	}
	return b, nil
}

// Run serves until ctx ends. Then clients get a DISCONNECT that says so, what
// is pending is committed, and Run returns, within stopTimeout, be it with an
// error because the disk does not answer. It ends by itself, with an error that
// wraps storage.ErrDamaged, when the database is found so damaged that nothing
// can be committed: opening it again salvages it.
func (b *Broker) Run(ctx context.Context) error {
	journalCtx, stopJournal := context.WithCancel(context.Background())
	defer stopJournal()
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := b.journal.Run(journalCtx); err != nil {
			select {
			case b.plane.broken <- err:
			default: // it is known
			}
		}
	})
	parts.Go(func() { b.plane.load(journalCtx) })
	parts.Go(func() { b.db.Space().Watch(journalCtx) })
	salvageCtx, stopSalvage := context.WithCancel(ctx)
	defer stopSalvage()
	parts.Go(func() { b.goOnSalvaging(salvageCtx) })
	// Before the first client asks: what has expired while the machine was off
	// is not there for it.
	b.sweep(time.Now())
	for _, l := range b.listeners {
		b.serving.Go(func() { b.accept(l) })
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var broken error
	for ctx.Err() == nil && broken == nil {
		select {
		case <-ctx.Done():
		case broken = <-b.plane.broken:
		case now := <-tick.C:
			b.sweep(now)
		}
	}

	stopSalvage()
	b.stopping.Store(true)
	b.plane.stopping.Store(true)
	b.closeListeners()
	b.closeArrivals()
	for _, c := range b.connections() {
		c.kick(reasonShuttingDown, reasonTexts[reasonShuttingDown])
	}
	flushCtx, cancel := context.WithTimeout(context.Background(), stopTimeout-time.Second)
	defer cancel()
	gone := make(chan struct{})
	go func() { b.serving.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-flushCtx.Done():
		b.log.Warn("some connections did not end in time")
	}
	stopJournal()
	end := make(chan error, 1)
	go func() {
		parts.Wait()
		err := broken
		if err == nil {
			err = b.journal.Flush(flushCtx)
			if err == nil { // a group of its own: the mark says that nothing came after it
				b.plane.lastMark()
				err = b.journal.Flush(flushCtx)
			}
			if err != nil {
				err = fmt.Errorf("commit at stop: %w", err)
			}
		}
		end <- errors.Join(err, b.journal.Close())
	}()
	select {
	case err := <-end:
		return err
	case <-flushCtx.Done():
	}
	select { // what it was doing when the time was over
	case err := <-end:
		return err
	case <-time.After(time.Second):
		return errors.New("commit at stop: the disk does not answer; what was acknowledged is safe")
	}
}

// sweep does what is due once a second.
func (b *Broker) sweep(now time.Time) {
	var batch batch
	b.plane.keepTime()
	b.plane.sweep(now, &batch)
	batch.flush()
	b.announce(now)
}

func (b *Broker) closeListeners() {
	for _, l := range b.listeners {
		_ = l.ln.Close() // on the way out
	}
}

func (b *Broker) connections() []*conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]*conn, 0, len(b.conns))
	for c := range b.conns {
		all = append(all, c)
	}
	return all
}

// serve runs one connection up to its CONNACK, and then in a new goroutine to
// its end: the stack that the handshake took is not kept for an idle client.
func (b *Broker) serve(c *conn) {
	b.guard(c, func() {
		for c.hello == nil { // mochi costs 12 kB, which silence is not worth
			if c.next() != nil {
				return
			}
		}
		_ = b.mochi.EstablishConnection(c.ln.name, (*handshake)(c)) // why a connection ended is logged where it is decided
	})
	if c.sess != nil { // mochi's registry is for the handshake; what it has of this connection goes with it
		if cl, ok := b.mochi.Clients.Get(c.sess.clientID); ok && cl.Net.Conn == net.Conn((*handshake)(c)) {
			b.mochi.Clients.Delete(c.sess.clientID)
		}
	}
	if !c.up {
		_ = c.Close()
		b.part(c)
		return
	}
	b.serving.Go(func() {
		b.guard(c, c.run)
		_ = c.Close()
		b.part(c)
	})
}

// part takes leave of a connection. It is the one place where a session goes
// down: mochi's own event does not come after a panic or a failed CONNACK, and
// may come after the successor is up.
func (b *Broker) part(c *conn) {
	c.settle()
	c.release()
	c.leaving.unsaid = !c.up
	b.mu.Lock()
	delete(b.conns, c)
	b.mu.Unlock()
	close(c.gone)
	if c.sess == nil {
		return
	}
	if c.up {
		b.plane.connections.Add(-1)
	}
	defer b.plane.lockID(c.sess.clientID)()
	b.plane.leave(c.sess, c, c.leaving, &c.batch)
	c.batch.flush()
	b.log.Debug("client left", "client", c.sess.clientID)
}

// guard calls f, and returns also when that ends by a panic.
func (b *Broker) guard(c *conn, f func()) {
	defer b.recovered(c)
	f()
}

// recovered, when deferred, has a panic cost one connection and not the broker.
func (b *Broker) recovered(c *conn) {
	if r := recover(); r != nil {
		b.log.Error("connection ended by a defect", "client", c.who.clientID, "address", c.sock.RemoteAddr().String(), "err", fmt.Sprint(r), "stack", string(debug.Stack()))
		c.unwritable(errClosed)
	}
}

// Listeners returns the bound listeners in the order of the configuration.
func (b *Broker) Listeners() []ListenerInfo {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]ListenerInfo, len(b.listeners))
	for i, l := range b.listeners {
		out[i] = ListenerInfo{Name: l.name, Addr: l.ln.Addr(), Protocol: l.protocol, Connections: l.held}
	}
	return out
}

// Publish publishes a message. With QoS 1 or 2 it returns nil when what a
// PUBACK means is true: every persistent session that shall get it has it
// safely. It returns ErrInvalidTopic, ErrInvalidQoS, ErrQuota, ErrDiskFull, ErrQueueFull, or ctx's error
// when that ends first; the message may be delivered all the same then.
func (b *Broker) Publish(ctx context.Context, m Message) error {
	switch {
	case !validTopic(m.Topic, b.cfg.MaxTopicBytes, b.cfg.MaxTopicLevels) || m.Topic[0] == '$':
		return ErrInvalidTopic
	case m.QoS > 2:
		return ErrInvalidQoS
	}
	msg := &storage.Message{Topic: m.Topic, Payload: m.Payload, QoS: m.QoS, Retain: m.Retain}
	if b.plane.fullFor(msg) {
		b.plane.limit(limitRetained)
		return ErrQuota
	}
	switch limit := b.plane.refuses(b.plane.routesFor(m.Topic), msg); limit {
	case noLimit:
	case limitDisk:
		b.plane.limit(limit)
		return ErrDiskFull
	default:
		b.plane.limit(limit)
		return ErrQueueFull
	}
	var batch batch
	done := make(chan struct{})
	b.plane.publish(nil, msg, &batch, func() { close(done) })
	batch.flush()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Clients returns the connected clients, those that are connected longest
// first.
func (b *Broker) Clients() []ClientInfo {
	var out []ClientInfo
	for _, s := range b.plane.all() {
		b.plane.mu.RLock()
		subs := len(s.subs)
		b.plane.mu.RUnlock()
		s.mu.Lock()
		if c, ok := s.link.(*conn); ok {
			out = append(out, ClientInfo{
				ID: s.clientID, Username: c.who.username, Address: c.sock.RemoteAddr().String(), Listener: c.ln.name,
				Protocol: s.version, Connected: c.slot.since, CleanStart: c.cleanStart,
				Subscriptions: subs, QueuedMessages: s.live, Dropped: maps.Clone(s.dropped),
			})
		}
		s.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b ClientInfo) int {
		return cmp.Or(a.Connected.Compare(b.Connected), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func (p *plane) all() []*session {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	all := make([]*session, 0, len(p.sessions))
	for _, s := range p.sessions {
		all = append(all, s)
	}
	return all
}

// Stats returns a snapshot of the counters.
func (b *Broker) Stats() Stats {
	p := b.plane
	s := Stats{
		Started: b.started, Connections: p.connections.Load(), ConnectionsTotal: p.connectionsTotal.Load(),
		Sockets: p.sockets.Load(), Connects: p.connects.Load(), SessionsExpired: p.sessionsExpired.Load(),
		PayloadIn: p.payloadIn.Load(), PayloadOut: p.payloadOut.Load(),
		PacketsIn: p.packetsIn.Load(), PacketsOut: p.packetsOut.Load(),
		NetworkIn: p.networkIn.Load(), NetworkOut: p.networkOut.Load(),
		QueueMessages: p.queueMessages.Load(), QueueBytes: p.queueBytes.Load(),
		Dropped: make(map[string]uint64, dropKinds), Limited: make(map[string]uint64, limitKinds), Journal: b.journal.Stats(),
		Disk: p.space.Stats(), QueueAlarms: make(map[string]uint64, len(alarmLevels)), StoreBound: int64(p.cfg.MaxStore),
	}
	for q := range 3 {
		s.MessagesIn[q], s.MessagesOut[q] = p.messagesIn[q].Load(), p.messagesOut[q].Load()
		s.BytesIn[q], s.BytesOut[q] = p.bytesIn[q].Load(), p.bytesOut[q].Load()
	}
	for i, name := range dropCauses {
		s.Dropped[name] = p.dropped[i].Load()
	}
	for i, percent := range alarmLevels {
		s.QueueAlarms[strconv.Itoa(percent)] = uint64(max(p.alarms[i].Load(), 0))
	}
	for i, name := range limitNames {
		s.Limited[name] = p.limited[i].Load()
	}
	p.sessMu.Lock()
	s.Sessions = int64(len(p.sessions))
	p.sessMu.Unlock()
	p.mu.RLock()
	for _, g := range p.groups {
		g.mu.Lock()
		s.SharedSubscriptions += int64(len(g.members))
		g.mu.Unlock()
	}
	s.Subscriptions = int64(p.subs.len()-len(p.groups)) + s.SharedSubscriptions
	s.Retained, s.RetainedBytes = int64(p.retained.len()-p.retained.own), p.retained.bytes
	p.mu.RUnlock()
	s.Salvage = b.salvaged()
	return s
}

// Health says whether the broker keeps its promise right now.
func (b *Broker) Health() Health {
	h := Health{Ready: !b.stopping.Load()}
	j := b.journal.Stats()
	if j.Failing != "" {
		h.Ready, h.Degraded = false, true
		h.Reasons = append(h.Reasons, "storage: commits fail, acknowledgements wait: "+j.Failing)
	}
	if j.Writing > slowCommit {
		h.Ready, h.Degraded = false, true
		h.Reasons = append(h.Reasons, fmt.Sprintf("storage: a commit has been running for %d s, acknowledgements wait", int(j.Writing.Seconds())))
	}
	if why := b.plane.readError.Load(); why != nil {
		h.Ready, h.Degraded = false, true
		h.Reasons = append(h.Reasons, "storage: queues cannot be read, deliveries wait: "+*why)
	}
	if b.plane.space.Low() {
		h.Degraded = true
		h.Reasons = append(h.Reasons, "disk: nearly full, what would have to be stored is refused")
	}
	if n := b.plane.alarms[len(alarmLevels)-1].Load(); n > 0 {
		h.Degraded = true
		h.Reasons = append(h.Reasons, fmt.Sprintf("queues: those of %d clients are full (broker.queue_overflow is %s)", n, b.cfg.QueueOverflow))
	}
	if l := int(b.plane.storeAlarm.Load()); l > 1 {
		h.Degraded = true
		h.Reasons = append(h.Reasons, fmt.Sprintf("queues: all together have reached %d%% of broker.max_store (broker.queue_overflow is %s)", alarmLevels[l-1], b.cfg.QueueOverflow))
	}
	if w := b.journal.FlashWarning(); w != "" {
		h.Degraded = true
		h.Reasons = append(h.Reasons, w)
	}
	if why := b.damage(); len(why) > 0 {
		h.Degraded = true
		h.Reasons = append(h.Reasons, why...)
	}
	return h
}

// slowCommit is how long a commit may take before it is reported. An SD card
// that tidies up takes a second now and then.
const slowCommit = 5 * time.Second
