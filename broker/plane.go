package broker

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"penstock/storage"
)

// plane is the data plane: sessions, subscriptions, retained messages, wills
// and the journal that makes them last. It knows neither sockets nor mochi;
// connections reach it through their session and it reaches them as link.
//
// Locks are taken in this order: a client identifier's (lockID), readMu, the
// journal's for commits and for pruning, plane.mu, sessMu, a share group's, a
// session's, the journal's for its queue, a segment's, an inbound identifier's,
// an acknowledgement queue's, a connection's output. No session's lock is taken
// while another's is held. The clock's, and those of loads and failures, are held
// for a moment, with no other taken.
type plane struct {
	cfg     *Config
	log     *slog.Logger
	journal *storage.Journal
	clock   *clock
	now     func() int64 // the clock's
	ids     uint64       // packetIDs, less in the model checker
	block   uint64       // ceilingBlock, less in the model checker

	mu       sync.RWMutex // subscriptions and retained messages
	subs     subIndex[*subscription]
	retained retainedTree
	groups   map[string]*shareGroup
	weight   int           // of all subscriptions
	gen      atomic.Uint64 // changes whenever routes may change

	sessMu   sync.Mutex
	sessions map[string]*session
	byID     map[storage.SessionID]*session
	ending   map[storage.SessionID]struct{} // sessions that have ended, but not yet on disk
	lastID   storage.SessionID
	busyIDs  map[string]chan struct{} // client identifiers in the middle of a session change
	unsaid   map[string]chan struct{} // sessions made or ended whose rows are not durable; closed when they are
	wills    map[string]*will
	// willBytes is the size of all wills; changed with sessMu held.
	willBytes atomic.Int64

	purged time.Time // when expired retained messages were last removed; sweep's
	keep   timekeeping

	acl      atomic.Pointer[acl]
	stopping atomic.Bool
	space    diskSpace

	memory     memory
	loads      loads
	readMu     sync.Mutex             // held while a segment is read
	read       []readSegment          // segments that were read last
	readError  atomic.Pointer[string] // why queues cannot be read; nil: they can
	failMu     sync.Mutex
	failing    map[string]struct{}  // clients whose queues cannot be read
	broken     chan error           // gets an error that wraps storage.ErrDamaged; capacity 1
	storeFull  atomic.Bool          // all queues together take what they may, or more
	storeAlarm atomic.Int32         // level of alarmLevels that they have reached
	background func(func())         // runs what may have to wait for the disk
	adoptions  map[string]*adoption // of sessions that have ended, by client identifier; guarded by sessMu
	pause      func(time.Duration)

	journalBatch batch      // of the journal's goroutine
	spilling     []*session // sessions that may have too much in memory; likewise
	counters
}

// newPlane returns an empty data plane over journal.
func newPlane(cfg *Config, journal *storage.Journal, log *slog.Logger) *plane {
	read := cfg.MachineTime
	if read == nil {
		read = machineTime()
	}
	clock := newClock(read)
	p := &plane{
		cfg:       cfg,
		log:       log,
		journal:   journal,
		clock:     clock,
		now:       clock.now,
		space:     new(storage.Space), // which never is low
		ids:       packetIDs,
		block:     ceilingBlock,
		groups:    make(map[string]*shareGroup),
		sessions:  make(map[string]*session),
		byID:      make(map[storage.SessionID]*session),
		ending:    make(map[storage.SessionID]struct{}),
		busyIDs:   make(map[string]chan struct{}),
		unsaid:    make(map[string]chan struct{}),
		wills:     make(map[string]*will),
		adoptions: make(map[string]*adoption),
		memory:    defaultMemory,
		loads:     loads{wake: make(chan struct{}, 1)},
		failing:   make(map[string]struct{}),
		broken:    make(chan error, 1),
		pause:     time.Sleep,
	}
	p.background = func(f func()) { go f() }
	p.acl.Store(&acl{})
	journal.Attach(p)
	return p
}

// told returns the batch of the journal's goroutine, which Flush sends.
func (p *plane) told() *batch { return &p.journalBatch }

// Flush implements storage.State.
func (p *plane) Flush() {
	for i, s := range p.spilling {
		s.mu.Lock()
		s.spilling = false
		s.unload()
		s.mu.Unlock()
		p.spilling[i] = nil
	}
	p.spilling = p.spilling[:0]
	p.journalBatch.flush()
}

// Now implements storage.State.
func (p *plane) Now() int64 { return p.now() }

// Progress implements storage.State.
func (p *plane) Progress(id storage.SessionID) (storage.Progress, bool) {
	p.sessMu.Lock()
	s := p.byID[id]
	p.sessMu.Unlock()
	if s == nil {
		return storage.Progress{}, false
	}
	return s.progress()
}

// ProgressStored implements storage.State.
func (p *plane) ProgressStored(id storage.SessionID) {
	p.sessMu.Lock()
	s := p.byID[id]
	p.sessMu.Unlock()
	if s != nil {
		s.progressStored(p.told())
	}
}

// Wants implements storage.State.
func (p *plane) Wants(seg *storage.Segment, id storage.SessionID, seq uint64) bool {
	p.sessMu.Lock()
	s := p.byID[id]
	_, ending := p.ending[id]
	p.sessMu.Unlock()
	if s == nil {
		return ending && !fault(faultCompactEarly) // what it had may be on its way to others
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.queue.search(seq); i < s.queue.len() && s.queue.at(i).seq == seq {
		e := s.queue.at(i)
		return e.state != finished && e.seg != nil && e.seg.Current() == seg
	}
	return s.spill.has(seg, seq) && !fault(faultCompactSpilled)
}

// Retained implements storage.State.
func (p *plane) Retained(topic string) *storage.Message {
	p.mu.RLock()
	defer p.mu.RUnlock()
	m, _ := p.retained.get(topic)
	return m
}

// restore fills the plane with what the store remembers. It runs before
// anything else.
func (p *plane) restore() error {
	img, segs, err := p.journal.Load()
	if err != nil {
		return fmt.Errorf("restore state: %w", err)
	}
	gone := p.resumeTime(img)
	for _, row := range img.Sessions {
		s := &session{
			plane: p, clientID: row.ClientID, id: row.ID, version: row.Protocol, expiry: row.Expiry, agreed: row.Expiry, stale: noStale,
			nextSeq: row.Ceiling, ceiling: row.Ceiling, reserved: row.Ceiling, away: restoredAway(row, gone),
		}
		if fault(faultSeqReuse) {
			s.nextSeq = row.Progress.Cursor
		}
		p.sessions[row.ClientID], p.byID[row.ID] = s, s
		p.lastID = max(p.lastID, row.ID)
	}
	for _, row := range img.Subscriptions {
		if s := p.byID[row.Session]; s != nil {
			p.addSubscription(s, row.Filter, row.Options, row.Identifier)
		}
	}
	for _, row := range img.Inbound {
		if s := p.byID[row.Session]; s != nil {
			if s.inbound == nil {
				s.inbound = make(map[uint16]*inbound)
			}
			s.inbound[row.PacketID] = &inbound{safe: true}
		}
	}
	for _, m := range img.Retained {
		p.retained.put(m.Topic, m)
	}
	for _, w := range img.Wills {
		if p.sessions[w.ClientID] == nil {
			w.Delay = 0 // the session has ended, so its will waits no longer [MQTT-3.1.2-8]
		}
		p.willBytes.Add(int64(w.Message.Size()))
		p.wills[w.ClientID] = &will{msg: w.Message, delay: w.Delay, due: p.restoredDue(w), kept: w.Due}
	}
	progress := make(map[storage.SessionID]storage.Progress, len(img.Sessions))
	for _, row := range img.Sessions {
		progress[row.ID] = row.Progress
	}
	for i, row := range img.Segments {
		claims, size := 0, int64(0)
		err := row.Extents(func(e storage.Extent) {
			p.lastID = max(p.lastID, e.Session)
			if s := p.byID[e.Session]; s != nil {
				n, b := s.restoreExtent(segs[i], e, progress[e.Session])
				claims += n
				size += int64(b)
			}
		})
		if err != nil {
			p.log.Error("head of a segment is damaged, its messages are lost", "err", err, "segment", row.ID)
		}
		segs[i].Keep(claims, size)
	}
	for _, s := range p.sessions {
		s.restored(progress[s.id])
	}
	return nil
}

// restored completes a session that has got back what the store has of it.
func (s *session) restored(done storage.Progress) {
	p := s.plane
	// What is finished out of order stays known until the cursor passes
	// it: its record may be in a segment that others still need.
	var finishedOnes []*entry
	for _, seq := range done.Finished {
		finishedOnes = append(finishedOnes, &entry{s: s, seq: seq, state: finished})
	}
	s.queue.merge(finishedOnes)
	s.live, s.bytes = s.spill.count, s.spill.bytes
	p.spilledMessages.Add(int64(s.spill.count))
	p.spilledBytes.Add(s.spill.bytes)
	// What comes before a delivery that was finished or released was sent, and
	// so may be what lay within the last connection's window [MQTT-3.3.1-1].
	s.triedLeft = p.cfg.Window
	for i := range s.queue.len() {
		e := s.queue.at(i)
		s.triedBelow = e.seq + 1
		if e.state == released {
			s.live++
			s.bytes += int64(e.size)
			s.triedLeft--
		}
	}
	s.advance()
	p.queueMessages.Add(int64(s.live))
	p.queueBytes.Add(s.bytes)
	if n := len(s.spill.runs); n > 0 {
		s.nextSeq = max(s.nextSeq, s.spill.runs[n-1].end())
	}
	s.nextSeq = max(s.nextSeq, s.triedBelow)
	s.restartSeq = s.nextSeq
	if fault(faultSeqReuse) {
		s.reserved, s.ceiling = s.nextSeq+p.block, s.nextSeq+p.block
	}
	s.reserve()
	s.raise(min(s.fill(), len(alarmLevels)-1))
}

// opening is what a CONNECT asks of the data plane.
type opening struct {
	clientID   string
	version    byte
	cleanStart bool
	expiry     uint32 // Session Expiry Interval, seconds; 0: the session ends with the connection
	window     int    // deliveries in flight at most
	who        principal
	will       *will // nil: none
}

// lockID waits until no other connection is in the middle of taking or ending
// the session of a client identifier, and returns the unlock.
func (p *plane) lockID(id string) func() {
	for {
		unlock, busy := p.tryLockID(id)
		if unlock != nil {
			return unlock
		}
		<-busy
	}
}

// tryLockID is lockID for who cannot wait. It returns nil if another connection is
// at it, and a channel that is closed when that is over.
func (p *plane) tryLockID(id string) (unlock func(), busy <-chan struct{}) {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	if busy := p.busyIDs[id]; busy != nil {
		return nil, busy
	}
	done := make(chan struct{})
	p.busyIDs[id] = done
	return func() {
		p.sessMu.Lock()
		delete(p.busyIDs, id)
		p.sessMu.Unlock()
		close(done)
	}, nil
}

// takeOverWait bounds how long a successor waits for the connection that it
// takes a session from. That one's socket is closed by then; what is waited
// for is the end of the packet that it is handling.
const takeOverWait = 5 * time.Second

// opened is what a CONNECT got of the data plane.
type opened struct {
	s       *session
	present bool            // there was a session to go on with [MQTT-3.2.2-2]
	durable <-chan struct{} // closed when what CONNACK says is true; nil if it is already
	before  *will           // the will that there was; nil if there was none
}

// open gives o the session of a client, taking it from the connection that has
// it. When the CONNACK leaves, said must be called; if it never does, leave must
// be told of the will before.
func (p *plane) open(o owner, c opening, b *batch) opened {
	unlock := p.lockID(c.clientID)
	defer unlock()
	present := false
	s := p.session(c.clientID)
	if s != nil {
		s.mu.Lock()
		old := s.owner
		s.mu.Unlock()
		if old != nil {
			timer := time.NewTimer(takeOverWait)
			var how leaving
			select {
			case <-old.takeOver(reasonTakenOver):
				how = old.farewell()
			case <-timer.C:
				p.log.Warn("connection that was taken over is still busy", "client", c.clientID)
			}
			timer.Stop()
			p.leave(s, old, how, b)
			s = p.session(c.clientID)
		}
	}
	p.sessMu.Lock()
	w := p.wills[c.clientID]
	p.sessMu.Unlock()
	// From before a restart, or of a session that goes on, it is to be forgotten,
	// but not before the client knows that it is back.
	if w != nil && w.who != nil && (s == nil || c.cleanStart) { // the session that it belonged to has ended [MQTT-3.1.3-9]
		p.fireWill(c.clientID, w, b)
	}

	if s != nil && c.cleanStart {
		p.end(s, b)
		s = nil
	}
	switch {
	case s != nil:
		present = true
		s.mu.Lock()
		changed := s.expiry != c.expiry || s.version != c.version || s.away.kept != 0 // or a restart would take it for away
		s.expiry, s.version, s.away = c.expiry, c.version, away{}
		row := s.row()
		s.mu.Unlock()
		if changed && s.id != 0 {
			p.putSession(row, p.settles(c.clientID))
		}
	default:
		mayLast := p.adopted(c.clientID) // whose row is still that of the last session
		s = &session{plane: p, clientID: c.clientID, version: c.version, expiry: c.expiry, stale: noStale}
		p.sessMu.Lock()
		if c.expiry != 0 && mayLast {
			p.lastID++
			s.id = p.lastID
			s.ceiling, s.reserved = p.block, p.block
			p.byID[s.id] = s
		}
		p.sessions[c.clientID] = s
		p.sessMu.Unlock()
		if s.id != 0 {
			p.putSession(s.row(), p.settles(c.clientID))
		}
	}
	s.mu.Lock()
	s.owner, s.window, s.who = o, min(c.window, int(p.ids)), c.who
	s.mu.Unlock()
	if p.acl.Load().receive {
		p.gen.Add(1) // rights of the same session may differ now
	}
	p.sessMu.Lock()
	before := p.wills[c.clientID]
	p.sessMu.Unlock()
	if c.will != nil { // stored together with the session, where CONNACK waits for that
		p.arm(c.clientID, c.will)
	}
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	return opened{s, present, p.unsaid[c.clientID], before}
}

// said tells that the CONNACK of a session leaves. If the CONNECT has no will,
// an earlier one counts no more from now on.
func (p *plane) said(s *session, hasWill bool) {
	s.mu.Lock()
	s.agreed = s.expiry
	s.mu.Unlock()
	if hasWill {
		return
	}
	p.sessMu.Lock()
	old := p.wills[s.clientID]
	p.sessMu.Unlock()
	if old != nil {
		p.disarm(s.clientID, old)
	}
}

// settles returns a waiter for the row of a client's session that is being
// made or deleted. Whoever connects with the client identifier meanwhile waits
// for the same.
func (p *plane) settles(clientID string) storage.Waiter {
	done := make(chan struct{})
	p.sessMu.Lock()
	p.unsaid[clientID] = done
	p.sessMu.Unlock()
	return storage.WaiterFunc(func() {
		p.sessMu.Lock()
		if p.unsaid[clientID] == done {
			delete(p.unsaid, clientID)
		}
		p.sessMu.Unlock()
		close(done)
	})
}

// mayOpen reports whether there is a persistent session for a client, or room
// for one.
func (p *plane) mayOpen(clientID string) bool {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	s := p.sessions[clientID]
	return len(p.byID) < p.cfg.MaxSessions || s != nil && s.id != 0
}

func (p *plane) session(clientID string) *session {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	return p.sessions[clientID]
}

// row returns the session's row. s.mu is held, or s is not shared yet.
func (s *session) row() storage.Session {
	return storage.Session{ID: s.id, ClientID: s.clientID, Expiry: s.expiry, Protocol: s.version, Created: time.Now().UnixMilli(), Ceiling: s.ceiling, Left: s.away.since}
}

// putSession writes the row of a persistent session.
func (p *plane) putSession(row storage.Session, done storage.Waiter) {
	p.journal.Change(func(tx storage.Tx) error { return tx.PutSession(row) }, done)
}

// leaving says how a connection ended.
type leaving struct {
	unsaid    bool  // its CONNACK was never sent: all is as before the CONNECT, as far as that still exists
	before    *will // the will that there was before the CONNECT, where unsaid; nil if there was none
	clean     bool  // DISCONNECT without a will [MQTT-3.14.4-3]
	hasExpiry bool  // DISCONNECT changed the Session Expiry Interval
	expiry    uint32
}

// leave takes the session from o, whose connection is gone. It does nothing if
// o does not have it (any more).
func (p *plane) leave(s *session, o owner, l leaving, b *batch) {
	if !s.detach(o) {
		return
	}
	s.mu.Lock()
	expiry := s.expiry
	switch {
	case l.unsaid:
		expiry = s.agreed
	case l.hasExpiry:
		expiry = l.expiry
	}
	if s.agreed = expiry; expiry != s.expiry {
		s.expiry = expiry
		if s.id != 0 && expiry != 0 {
			s.away.kept = s.away.since
			p.putSession(s.row(), nil)
		}
	}
	s.mu.Unlock()

	p.sessMu.Lock()
	w := p.wills[s.clientID]
	p.sessMu.Unlock()
	switch {
	case w == nil:
	case l.unsaid && l.before != nil:
		p.arm(s.clientID, l.before)
	case l.unsaid, l.clean:
		p.disarm(s.clientID, w)
	case p.stopping.Load(): // stored: published after the restart, unless the client is back by then (3.1.2.5)
	case w.delay == 0 || expiry == 0:
		p.fireWill(s.clientID, w, b)
	default:
		p.sessMu.Lock()
		w.due = p.now() + int64(min(w.delay, expiry))*1000
		p.sessMu.Unlock()
	}
	if expiry == 0 {
		p.end(s, b)
	}
}

// end ends a session: its subscriptions, its queue and its row go.
func (p *plane) end(s *session, b *batch) {
	p.sessMu.Lock()
	if p.sessions[s.clientID] == s {
		delete(p.sessions, s.clientID)
	}
	delete(p.byID, s.id)
	if s.id != 0 {
		p.ending[s.id] = struct{}{}
	}
	p.sessMu.Unlock()
	p.mu.Lock()
	if len(s.subs) > 0 {
		for _, sub := range s.subs {
			p.removeSubscription(sub)
		}
		clear(s.subs)
		p.gen.Add(1)
	}
	p.mu.Unlock()
	s.mu.Lock()
	orphans := s.end(b)
	s.mu.Unlock()
	// What others get is ahead of the session's row, so that a cut loses none.
	if slices.ContainsFunc(orphans, func(o orphan) bool { return o.run.count > 0 }) {
		p.adoptLater(s, orphans)
		return
	}
	for _, o := range orphans {
		p.adopt(o, b)
	}
	if s.id != 0 {
		p.forget(s, p.settles(s.clientID))
	}
}

// forget deletes a session's row.
func (p *plane) forget(s *session, settled storage.Waiter) {
	id := s.id
	p.journal.Change(func(tx storage.Tx) error { return tx.DeleteSession(id) }, storage.WaiterFunc(func() {
		p.sessMu.Lock()
		delete(p.ending, id)
		p.sessMu.Unlock()
		settled.Committed()
	}))
}

// sweep ends sessions whose expiry interval has passed and sends wills that
// are due. It is called about once a second.
func (p *plane) sweep(now time.Time, b *batch) {
	if p.retained.cost.Load() > int64(p.cfg.MaxRetained)*9/10 && now.Sub(p.purged) >= purgeEvery {
		p.purged = now
		p.purgeRetained()
	}
	at := p.clock.at(now)
	p.sessMu.Lock()
	var expired []*session
	for _, s := range p.sessions {
		if !s.mu.TryLock() {
			continue // busy, so it has not been away for long; nobody else's CONNECT is to wait for it
		}
		if s.expired(at) {
			expired = append(expired, s)
		}
		if p.cfg.MaxQueueAge > 0 && s.live > 0 {
			s.tooOld(at, b)
		}
		if s.alarm > 0 {
			s.lower()
		}
		s.mu.Unlock()
	}
	due := make(map[string]*will)
	for id, w := range p.wills {
		if p.due(w, at) {
			due[id] = w
		}
	}
	p.sessMu.Unlock()
	p.watchStore()
	for id, w := range due {
		unlock, _ := p.tryLockID(id)
		if unlock == nil {
			continue // in a second: it may have to wait for the disk
		}
		if !p.connected(id) {
			p.fireWill(id, w, b)
		}
		unlock()
	}
	for _, s := range expired {
		unlock, _ := p.tryLockID(s.clientID)
		if unlock == nil {
			continue
		}
		s.mu.Lock()
		still := s.expired(at) && !s.ended // the client may have been here meanwhile
		s.mu.Unlock()
		if still {
			p.sessionsExpired.Add(1)
			if n := s.waiting(); n > 0 {
				p.log.Warn("session expired, what waited for it is dropped", "client", s.clientID, "messages", n)
			}
			p.sessMu.Lock()
			w := p.wills[s.clientID]
			p.sessMu.Unlock()
			if w != nil {
				p.fireWill(s.clientID, w, b) // [MQTT-3.1.2-8]: the session's end comes before the delay's
			}
			p.end(s, b)
		}
		unlock()
	}
}

func (p *plane) connected(clientID string) bool {
	s := p.session(clientID)
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owner != nil
}
