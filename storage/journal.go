package storage

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Store is what the Journal writes to and restores from: SQLite in the
// product, memory in the model checker.
type Store interface {
	// Begin opens a transaction. After a failed transaction the store starts
	// the next one on a fresh connection.
	Begin() (Tx, error)
	// Load reads everything durable.
	Load() (*Image, error)
	Close() error
}

// Tx is one transaction of the Journal. Each method may fail; the caller then
// rolls back. Commit returns nil only when all of it is durable.
type Tx interface {
	PutSession(Session) error
	DeleteSession(SessionID) error      // with its subscriptions and inbound identifiers
	PutSubscription(Subscription) error // nothing if the session is gone
	DeleteSubscription(id SessionID, filter string) error
	PutProgress(SessionID, Progress) error
	PutCeiling(SessionID, uint64) error
	PutInbound(Inbound) error // nothing if the session is gone
	DeleteInbound(Inbound) error
	PutSegment(StoredSegment) error            // in the place of one with the same id
	Segment(id int64) (body []byte, err error) // nil if there is none
	DeleteSegment(id int64) error
	PutRetained(*Message) error
	DeleteRetained(topic string) error
	PutWill(Will) error
	DeleteWill(clientID string) error
	Commit() error
	Rollback() error
}

// State is what the Journal reads at commit time: values that are written by
// state (the newest counts), not by event.
type State interface {
	// Progress returns how far a session has come; ok is false when the
	// session is gone.
	Progress(SessionID) (p Progress, ok bool)
	// ProgressStored tells that what Progress returned last is durable.
	ProgressStored(SessionID)
	// Wants reports whether a session may still need its record of a delivery
	// that is stored.
	Wants(id SessionID, seq uint64) bool
	// Retained returns the retained message of a topic, nil if there is none.
	Retained(topic string) *Message
	// Flush is called when all who waited for a group have been told.
	Flush()
}

// Claim is one persistent session's claim on a message.
type Claim interface {
	// Record returns what must be kept of the claim. It returns false when the
	// subscriber has acknowledged meanwhile and nothing must be kept: the
	// write is elided.
	Record() (ClaimRecord, bool)
	// Stored tells that the claim is durable in a segment. It returns false if
	// the record is not needed any more; else the receiver calls the segment's
	// Release once when that is so.
	Stored(*Segment) (needed bool)
}

// Waiter is told when its operation is durable. The Journal calls it while it
// commits: it may take any lock of the caller's and add operations, but must
// not call Commit or Flush.
type Waiter interface{ Committed() }

// WaiterFunc is a function as a Waiter.
type WaiterFunc func()

// Committed implements Waiter.
func (f WaiterFunc) Committed() { f() }

// Publication is everything that one received PUBLISH makes durable. It is
// committed whole or not at all: a QoS 2 identifier without its message would
// lose the message, the message without the identifier would double it.
type Publication struct {
	Message *Message // the Journal keeps no more than the topic where there are no claims
	Claims  []Claim
	Retain  bool    // the topic's retained message changed and must be durable
	Inbound Inbound // QoS 2 identifier; zero Session: none
	Done    Waiter  // told when Retain and Inbound are durable; nil where neither is set
}

// Segment is a durable group of records. A segment that nobody needs any
// more is deleted with one of the next commits; one of which little is needed,
// because a session that is away pins it, is written anew without the rest.
type Segment struct {
	id      int64
	journal *Journal
	live    atomic.Int64 // claims
	bytes   atomic.Int64 // size of their messages: one with three claims counts three times
	below   atomic.Int64 // how few bytes are worth writing it anew
}

// Release gives up one claim on the segment, which is for a message of the given
// size.
func (s *Segment) Release(size int) {
	bytes := s.bytes.Add(-int64(size))
	switch {
	case s.live.Add(-1) == 0:
		s.journal.drop(s.id)
	case bytes < s.below.Load():
		s.journal.shrink(s)
	}
}

// watch sets from when on the segment, whose row has the given size, is worth
// writing anew: when a quarter of it is left, and of what is needed now. So all
// the writing anew of a segment comes to less than half of its first size.
func (s *Segment) watch(stored int) {
	switch from := s.journal.compactFrom; {
	case from < 0:
		s.below.Store(math.MaxInt64)
	case stored < from:
		s.below.Store(0)
	default:
		s.below.Store(min(int64(stored), s.bytes.Load()) / 4)
	}
}

// Histogram counts observations in buckets. Counts has one element more than
// Bounds, for what lies above the last bound; it is not cumulative.
type Histogram struct {
	Bounds []float64
	Counts []uint64
	Sum    float64
}

func (h *Histogram) observe(v float64) {
	i := 0
	for i < len(h.Bounds) && v > h.Bounds[i] {
		i++
	}
	h.Counts[i]++
	h.Sum += v
}

func (h Histogram) clone() Histogram {
	h.Counts = append([]uint64(nil), h.Counts...)
	return h
}

// JournalStats is a snapshot of the Journal's counters since the start.
type JournalStats struct {
	Commits       uint64        // transactions that became durable
	Failures      uint64        // transactions that failed and were tried again
	Records       uint64        // messages written
	Elided        uint64        // claims that were acknowledged before they had to be written
	BytesWritten  uint64        // bytes of rows handed to the store, before its own overhead
	CommitSeconds Histogram     // duration of a transaction
	GroupSize     Histogram     // operations per transaction
	Writing       time.Duration // how long the transaction that runs has taken; 0 when none runs
	Failing       string        // why the last transaction failed; empty when it did not
}

// lazyDelay is how long cursors and segment deletions may wait for a commit
// that happens anyway. Losing them costs a redelivery at QoS 1, nothing else.
const lazyDelay = time.Second

// compactBatch is how many segments one group writes anew: a few megabytes have
// to be read for it.
const compactBatch = 16

// segmentBytes bounds a segment's body, so that what one slow session pins and
// what a restart has to unpack at once stay small.
const segmentBytes = 256 << 10

// operation is one entry of the journal's queue: a publication or a change.
type operation struct {
	pub    *Publication
	change func(Tx) error
	done   Waiter
}

// Journal gathers operations and commits them in groups: one transaction, one
// fsync. While one commit runs the next group gathers. Operations are
// committed in the order in which they were added; those of one publication
// together. All methods are safe for concurrent use, and none but Flush and
// Run waits for the store.
type Journal struct {
	store       Store
	log         *slog.Logger
	state       State
	commitDelay time.Duration
	retainFlush time.Duration
	compactFrom int // bytes

	commitMu sync.Mutex // held while a group is written; guards group, nextSeg, body
	group    group      // the group that is being written; kept and tried again when that fails
	nextSeg  int64
	body     []byte

	pruneMu sync.Mutex // held while pending is pruned or taken; before mu and sessions' locks
	pruneAt backlog    // what of pending is worth pruning

	mu       sync.Mutex
	pending  []operation
	size     int                    // of the messages in pending, bytes
	progress map[SessionID]struct{} // cursors that moved
	urgent   []Waiter               // told when the progress marked so far is durable
	lazy     map[string]time.Time   // topics with a QoS 0 retained message to write, and when
	drops    []int64                // segments nobody needs
	pinned   []*Segment             // segments to be written anew
	due      time.Time              // when the next commit must start; zero: nothing to do
	stats    JournalStats
	writing  time.Time // when the transaction that runs was begun

	wake chan struct{} // capacity 1: due moved forward
}

// group is what one transaction writes.
type group struct {
	ops      []operation
	progress map[SessionID]struct{}
	urgent   []Waiter
	retained map[string]struct{}
	drops    []int64
	pinned   []*Segment
	shrunk   []int // sizes of their rows now, in the same order; 0: there is none
	stored   []stored
	size     int
}

type stored struct {
	claim   Claim
	seg     *Segment
	session SessionID
	size    int // of the message
}

// NewJournal returns a Journal over store. Load must be called before the
// first operation, Attach before the first commit.
func NewJournal(store Store, cfg Config, log *slog.Logger) *Journal {
	return &Journal{
		store:       store,
		log:         log,
		commitDelay: cfg.CommitDelay.D(),
		retainFlush: cfg.RetainFlush.D(),
		compactFrom: cfg.CompactFrom,
		progress:    make(map[SessionID]struct{}),
		lazy:        make(map[string]time.Time),
		wake:        make(chan struct{}, 1),
		stats: JournalStats{
			CommitSeconds: Histogram{Bounds: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 5}, Counts: make([]uint64, 13)},
			GroupSize:     Histogram{Bounds: []float64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000}, Counts: make([]uint64, 12)},
		},
	}
}

// Attach sets where the Journal reads state from at commit time.
func (j *Journal) Attach(s State) { j.state = s }

// Load reads everything durable and returns it, with a Segment for each
// stored one in the same order. The caller calls Keep for each of them.
func (j *Journal) Load() (*Image, []*Segment, error) {
	img, err := j.store.Load()
	if err != nil {
		return nil, nil, err
	}
	segs := make([]*Segment, len(img.Segments))
	for i, s := range img.Segments {
		segs[i] = &Segment{id: s.ID, journal: j}
		segs[i].below.Store(int64(len(s.Body))) // for Keep
		j.nextSeg = max(j.nextSeg, s.ID)
	}
	return img, segs, nil
}

// Close gives the store's connection up. Run must have returned.
func (j *Journal) Close() error { return j.store.Close() }

// Keep sets how many claims on a restored segment are still needed, and the size
// of their messages in all.
func (s *Segment) Keep(claims, size int) {
	if claims == 0 {
		s.journal.drop(s.id)
		return
	}
	stored := int(s.below.Load())
	s.live.Store(int64(claims))
	s.bytes.Store(int64(stored))
	s.watch(stored)
	if s.bytes.Store(int64(size)); int64(size) < s.below.Load() {
		s.journal.shrink(s)
	}
}

// Publish adds what one PUBLISH makes durable. The caller holds no lock that a
// Claim takes.
func (j *Journal) Publish(p *Publication) {
	if len(p.Claims) == 0 && p.Message != nil {
		p.Message = &Message{Topic: p.Message.Topic} // while commits fail, the payloads would pile up
	}
	j.mu.Lock()
	j.pending = append(j.pending, operation{pub: p})
	j.size += p.size()
	j.schedule(j.commitDelay)
	many := j.backlog().reaches(pruneMin)
	j.mu.Unlock()
	if many {
		j.prune()
	}
}

// size returns the bytes of the message that the publication keeps in memory.
func (p *Publication) size() int {
	if p == nil || p.Message == nil {
		return 0
	}
	return p.Message.Size()
}

// backlog measures pending operations.
type backlog struct{ operations, bytes int }

// pruneMin is how much is worth a look whether it is still needed.
var pruneMin = backlog{4096, 16 << 20}

func (a backlog) reaches(b backlog) bool { return a.operations >= b.operations || a.bytes >= b.bytes }

// backlog returns what is pending. j.mu is held.
func (j *Journal) backlog() backlog { return backlog{len(j.pending), j.size} }

// prune forgets publications that nobody needs any more. While commits fail,
// subscribers that are online go on acknowledging, and their publishers go on
// publishing: what they have done must not pile up.
func (j *Journal) prune() {
	if !j.pruneMu.TryLock() {
		return // somebody is at it
	}
	defer j.pruneMu.Unlock()
	j.mu.Lock()
	if !j.backlog().reaches(backlog{max(j.pruneAt.operations, pruneMin.operations), max(j.pruneAt.bytes, pruneMin.bytes)}) {
		j.mu.Unlock()
		return
	}
	ops := j.pending
	j.pending, j.size = nil, 0
	j.mu.Unlock()

	elided, size := 0, 0
	kept := ops[:0]
	for _, op := range ops {
		if n, needed := op.needed(); needed {
			kept = append(kept, op)
			size += op.pub.size()
		} else {
			elided += n
		}
	}
	clear(ops[len(kept):])
	j.mu.Lock()
	j.pending, j.size = append(kept, j.pending...), j.size+size
	j.pruneAt = backlog{2 * len(j.pending), 2 * j.size}
	j.stats.Elided += uint64(elided)
	j.mu.Unlock()
}

// needed reports whether anything of the operation must be written; if not,
// how many claims are elided with it.
func (op operation) needed() (claims int, needed bool) {
	p := op.pub
	if p == nil || p.Retain || p.Inbound.Session != 0 {
		return 0, true
	}
	for _, c := range p.Claims {
		if _, needed := c.Record(); needed {
			return 0, true
		}
	}
	return len(p.Claims), false
}

// Change adds a change of rows; done (which may be nil) is told when it is
// durable. change may be called more than once, when a transaction fails.
func (j *Journal) Change(change func(Tx) error, done Waiter) {
	j.mu.Lock()
	j.pending = append(j.pending, operation{change: change, done: done})
	j.schedule(j.commitDelay)
	j.mu.Unlock()
}

// MarkProgress has the session's progress written with the next commit, lazily
// if done is nil.
func (j *Journal) MarkProgress(id SessionID, done Waiter) {
	j.mu.Lock()
	j.progress[id] = struct{}{}
	if done != nil {
		j.urgent = append(j.urgent, done)
		j.schedule(j.commitDelay)
	} else {
		j.schedule(lazyDelay)
	}
	j.mu.Unlock()
}

// MarkRetained has the retained message of a topic written within the retain
// flush interval. Later changes of the same topic cost nothing.
func (j *Journal) MarkRetained(topic string) {
	j.mu.Lock()
	if _, ok := j.lazy[topic]; !ok {
		j.lazy[topic] = time.Now().Add(j.retainFlush)
		j.schedule(j.retainFlush)
	}
	j.mu.Unlock()
}

// HurryRetained has the retained message of a topic, if it has to be written at
// all, written no later than the changes that are added after the call.
func (j *Journal) HurryRetained(topic string) {
	j.mu.Lock()
	if _, ok := j.lazy[topic]; ok {
		j.lazy[topic] = time.Now()
		j.schedule(j.commitDelay)
	}
	j.mu.Unlock()
}

func (j *Journal) drop(segment int64) {
	j.mu.Lock()
	j.drops = append(j.drops, segment)
	j.schedule(lazyDelay)
	j.mu.Unlock()
}

// shrink has a segment written anew with one of the next commits.
func (j *Journal) shrink(s *Segment) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if s.below.Swap(0) == 0 {
		return // it is among them already
	}
	j.pinned = append(j.pinned, s)
	j.schedule(lazyDelay)
}

// schedule makes the next commit start within d. j.mu is held.
func (j *Journal) schedule(d time.Duration) {
	due := time.Now().Add(d)
	if !j.due.IsZero() && !due.Before(j.due) {
		return
	}
	j.due = due
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// Pending returns how many operations wait for a commit, and whether there is
// anything at all to write, be it a group that failed. It waits for a commit
// that runs.
func (j *Journal) Pending() (operations int, any bool) {
	j.commitMu.Lock()
	defer j.commitMu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.pending) + len(j.group.ops), !j.due.IsZero() || !j.group.empty()
}

// Stats returns a snapshot of the counters.
func (j *Journal) Stats() JournalStats {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := j.stats
	if !j.writing.IsZero() {
		s.Writing = time.Since(j.writing)
	}
	s.CommitSeconds = s.CommitSeconds.clone()
	s.GroupSize = s.GroupSize.clone()
	return s
}

// Run commits groups as they become due, until ctx ends. A commit that fails
// is tried again, the same group, until it succeeds: acknowledgements wait
// meanwhile. It does not write what is pending when ctx ends; Flush does. It
// returns nil then, and an error that wraps ErrDamaged when the database is so
// damaged that nothing can be committed: the next start salvages it.
func (j *Journal) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var retry time.Duration
	for {
		wait := time.Hour
		j.mu.Lock()
		if !j.due.IsZero() {
			wait = time.Until(j.due)
		}
		j.mu.Unlock()
		if retry > 0 {
			wait = retry
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-j.wake:
			if retry == 0 {
				continue
			}
			select { // a failing store is not asked more often because of new work
			case <-ctx.Done():
				return nil
			case <-timer.C:
			}
		case <-timer.C:
		}
		if err := j.Commit(); err != nil {
			if errors.Is(err, ErrDamaged) {
				return err
			}
			retry = min(max(2*retry, 50*time.Millisecond), time.Second)
			continue
		}
		retry = 0
	}
}

// Flush commits everything that is pending, also what could wait, trying again
// until ctx ends.
func (j *Journal) Flush(ctx context.Context) error {
	for {
		j.mu.Lock()
		for topic := range j.lazy {
			j.lazy[topic] = time.Time{}
		}
		j.pinned = nil // the next start finds them again
		idle := len(j.lazy) == 0
		j.mu.Unlock()
		if _, any := j.Pending(); idle && !any {
			return nil
		}
		if err := j.Commit(); err != nil {
			select {
			case <-ctx.Done():
				return errors.Join(ctx.Err(), err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

func (g *group) empty() bool {
	return len(g.ops) == 0 && len(g.progress) == 0 && len(g.urgent) == 0 && len(g.drops) == 0 && len(g.retained) == 0 && len(g.pinned) == 0
}

// Commit writes what is pending as one group now, due or not, and tells those
// who wait. After an error the group is kept, and the next Commit tries it
// again, alone. Where everything in the group is elided, nothing is written.
func (j *Journal) Commit() error {
	j.commitMu.Lock()
	defer j.commitMu.Unlock()
	if j.group.empty() {
		j.take()
	}
	start := time.Now()
	j.mu.Lock()
	j.writing = start
	j.mu.Unlock()
	wrote, err := j.write()
	j.mu.Lock()
	j.writing = time.Time{}
	if err != nil {
		if j.stats.Failing == "" {
			j.log.Error("journal commit failed, acknowledgements wait", "err", err, "operations", len(j.group.ops))
		}
		j.stats.Failing = err.Error()
		j.stats.Failures++
		j.mu.Unlock()
		return err
	}
	if j.stats.Failing != "" { // written, or nothing is left that anybody waits for
		j.log.Info("journal commits again")
		j.stats.Failing = ""
	}
	if wrote {
		j.stats.Commits++
		j.stats.CommitSeconds.observe(time.Since(start).Seconds())
		j.stats.GroupSize.observe(float64(j.group.size))
	}
	j.mu.Unlock()
	j.tell()
	return nil
}

// take moves what is pending into the group. j.commitMu is held.
func (j *Journal) take() {
	g := &j.group
	j.pruneMu.Lock()
	defer j.pruneMu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if cap(g.ops) > 16*pruneMin.operations {
		g.ops = nil // of a burst
	}
	g.ops, j.pending, j.size = j.pending, g.ops[:0], 0
	j.pruneAt = backlog{}
	g.urgent, j.urgent = j.urgent, g.urgent[:0]
	g.drops, j.drops = j.drops, g.drops[:0]
	g.progress, j.progress = j.progress, make(map[SessionID]struct{})
	g.retained = nil
	now := time.Now()
	var next time.Time
	n := min(len(j.pinned), compactBatch)
	g.pinned = append(g.pinned[:0], j.pinned[:n]...)
	if j.pinned = j.pinned[n:]; len(j.pinned) > 0 {
		next = now.Add(lazyDelay)
	} else {
		j.pinned = nil
	}
	for topic, at := range j.lazy {
		if at.After(now) {
			if next.IsZero() || at.Before(next) {
				next = at
			}
			continue
		}
		g.retain(topic)
		delete(j.lazy, topic)
	}
	j.due = next
}

func (g *group) retain(topic string) {
	if g.retained == nil {
		g.retained = make(map[string]struct{})
	}
	g.retained[topic] = struct{}{}
}

// write writes the group in one transaction. It begins one only when there is
// something to write. j.commitMu is held.
func (j *Journal) write() (wrote bool, err error) {
	g := &j.group
	g.stored = g.stored[:0]
	var tx Tx
	begin := func() error {
		if tx != nil {
			return nil
		}
		tx, err = j.store.Begin()
		return err
	}
	fail := func(err error) (bool, error) {
		if tx != nil {
			_ = tx.Rollback() // the store starts afresh in any case
		}
		return false, err
	}

	var records, elided, size, sealed int
	var seg *Segment
	body := j.body[:0]
	seal := func() error {
		if seg == nil {
			return nil
		}
		seg.live.Store(int64(len(g.stored) - sealed))
		bytes := 0
		for _, s := range g.stored[sealed:] {
			bytes += s.size
		}
		seg.bytes.Store(int64(bytes))
		seg.watch(len(body))
		sealed = len(g.stored)
		size += len(body)
		if err := tx.PutSegment(StoredSegment{ID: seg.id, Body: body}); err != nil {
			return err
		}
		seg, body = nil, body[:0]
		return nil
	}

	g.size = len(g.urgent)
	for _, op := range g.ops {
		if op.change != nil {
			if err := begin(); err != nil {
				return fail(err)
			}
			if err := op.change(tx); err != nil {
				return fail(err)
			}
			g.size++
			continue
		}
		p := op.pub
		mark, claims := len(body), 0
		for _, c := range p.Claims {
			rec, needed := c.Record()
			if !needed {
				elided++
				continue
			}
			if claims == 0 {
				if err := begin(); err != nil {
					return fail(err)
				}
				if seg == nil {
					j.nextSeg++
					seg = &Segment{id: j.nextSeg, journal: j}
				}
				body = appendMessage(body, p.Message)
				body = append(body, 0, 0, 0) // room for the number of claims, always three bytes
				mark = len(body)
			}
			claims++
			body = appendClaim(body, rec)
			g.stored = append(g.stored, stored{c, seg, rec.Session, p.Message.Size()})
		}
		if claims > 0 {
			putCount(body[mark-3:], claims)
			records++
			g.size++
			if len(body) >= segmentBytes {
				if err := seal(); err != nil {
					return fail(err)
				}
			}
		}
		if p.Inbound.Session != 0 {
			if err := begin(); err != nil {
				return fail(err)
			}
			if err := tx.PutInbound(p.Inbound); err != nil {
				return fail(err)
			}
			g.size++
		}
		if p.Retain {
			g.retain(p.Message.Topic)
			g.size++
		}
	}
	if err := seal(); err != nil {
		return fail(err)
	}
	j.body = body[:0]

	for topic := range g.retained {
		if err := begin(); err != nil {
			return fail(err)
		}
		if m := j.state.Retained(topic); m != nil {
			size += m.Size()
			err = tx.PutRetained(m)
		} else {
			err = tx.DeleteRetained(topic)
		}
		if err != nil {
			return fail(err)
		}
	}
	for id := range g.progress {
		p, ok := j.state.Progress(id)
		if !ok {
			continue
		}
		if err := begin(); err != nil {
			return fail(err)
		}
		if err := tx.PutProgress(id, p); err != nil {
			return fail(err)
		}
	}
	for _, id := range g.drops {
		if err := begin(); err != nil {
			return fail(err)
		}
		if err := tx.DeleteSegment(id); err != nil {
			return fail(err)
		}
	}
	g.shrunk = g.shrunk[:0]
	for _, s := range g.pinned {
		if err := begin(); err != nil {
			return fail(err)
		}
		before, after, err := j.compact(tx, s.id)
		if err != nil {
			return fail(err)
		}
		if after < before {
			size += after
		}
		g.shrunk = append(g.shrunk, after)
	}
	if tx != nil {
		// The fate of a commit that fails is unknown: the next try takes new
		// segment ids, and a restart that finds a claim twice keeps the first.
		// What is acknowledged until then is elided, so its progress must be
		// written for the records that may be there.
		if err := tx.Commit(); err != nil {
			for _, s := range g.stored {
				g.progress[s.session] = struct{}{}
			}
			return false, err
		}
	}

	j.mu.Lock()
	j.stats.Records += uint64(records)
	j.stats.Elided += uint64(elided)
	j.stats.BytesWritten += uint64(size)
	j.mu.Unlock()
	return tx != nil, nil
}

// compact writes a segment anew, without what nobody needs any more. It returns
// the sizes of its row; both are 0 if there is none.
func (j *Journal) compact(tx Tx, id int64) (before, after int, err error) {
	old, err := tx.Segment(id)
	if err != nil || old == nil {
		return 0, 0, err
	}
	body := j.body[:0]
	err = DecodeSegment(old, func(r Record) {
		claims := r.Claims[:0]
		for _, c := range r.Claims {
			if j.state.Wants(c.Session, c.Seq) {
				claims = append(claims, c)
			}
		}
		if len(claims) == 0 {
			return
		}
		body = appendMessage(body, r.Message)
		body = append(body, 0, 0, 0)
		putCount(body[len(body)-3:], len(claims))
		for _, c := range claims {
			body = appendClaim(body, c)
		}
	})
	j.body = body[:0]
	if err != nil || len(body) == 0 || len(body) >= len(old) {
		return len(old), len(old), nil // torn, and so left alone; about to be deleted; or not worth it
	}
	return len(old), len(body), tx.PutSegment(StoredSegment{ID: id, Body: body})
}

// putCount writes n as a uvarint of exactly three bytes.
func putCount(b []byte, n int) {
	b[0] = byte(n) | 0x80
	b[1] = byte(n>>7) | 0x80
	b[2] = byte(n>>14) & 0x7F
}

// tell calls everybody who waited for the group, in the order of the
// operations, and empties it. j.commitMu is held.
func (j *Journal) tell() {
	g := &j.group
	for _, s := range g.stored {
		if !s.claim.Stored(s.seg) {
			s.seg.Release(s.size)
		}
	}
	for i, s := range g.pinned {
		if g.shrunk[i] > 0 {
			s.watch(g.shrunk[i])
		}
	}
	for _, op := range g.ops {
		switch {
		case op.pub != nil && op.pub.Done != nil:
			op.pub.Done.Committed()
		case op.done != nil:
			op.done.Committed()
		}
	}
	for id := range g.progress {
		j.state.ProgressStored(id)
	}
	for _, w := range g.urgent {
		w.Committed()
	}
	j.state.Flush()
	clear(g.ops)
	clear(g.urgent)
	clear(g.stored)
	clear(g.pinned)
	g.pinned, g.shrunk = g.pinned[:0], g.shrunk[:0]
	g.ops, g.urgent, g.stored = g.ops[:0], g.urgent[:0], g.stored[:0]
	g.drops = g.drops[:0]
	g.progress, g.retained = nil, nil
}
