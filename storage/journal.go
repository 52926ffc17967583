package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
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
	// Segment reads a segment that is durable, nil if there is none. It may be
	// called by any goroutine, also while a transaction runs.
	Segment(id int64) (*StoredSegment, error)
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
	PutSegment(StoredSegment) error           // in the place of one with the same id
	Segment(id int64) (*StoredSegment, error) // as the transaction leaves it; nil if there is none
	DeleteSegment(id int64) error
	PutRetained(*Message) error
	DeleteRetained(topic string) error
	PutWill(Will) error
	DeleteWill(clientID string) error
	ClockTx
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
	// Wants reports whether a session may still need a segment's record of a
	// delivery.
	Wants(s *Segment, id SessionID, seq uint64) bool
	// Merged tells that segments that a session has deliveries in are one now.
	Merged(SessionID)
	// Now returns the time by the broker's clock, in milliseconds.
	Now() int64
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
	Done    Waiter  // told when all of it is durable, as far as it was still needed; nil: nobody is
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
	Segments      int64         // that sessions need
	SegmentBytes  int64         // size of these
	CommitSeconds Histogram     // duration of a transaction
	GroupSize     Histogram     // operations per transaction
	Writing       time.Duration // how long the transaction that runs has taken; 0 when none runs
	Failing       string        // why the last transaction failed; empty when it did not
}

// lazyDelay is how long cursors and segment deletions may wait for a commit
// that happens anyway. Losing them costs a redelivery at QoS 1, nothing else.
const lazyDelay = time.Second

// segmentBytes bounds a segment's body, so that what one slow session pins and
// what a restart has to unpack at once stay small.
const segmentBytes = 256 << 10

// operation is one entry of the journal's queue: a publication or a change.
type operation struct {
	pub    *Publication
	at     time.Time // when it was added
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
	compactFrom int         // bytes
	mergeFrom   int         // segments; 0: as tiers has it
	flash       *flashMeter // nil over other stores than SQLite

	commitMu sync.Mutex // held while a group is written; guards group, nextSeg, build, rebuild
	group    group      // the group that is being written; kept and tried again when that fails
	nextSeg  int64
	build    segmentBuilder // of new segments
	rebuild  segmentBuilder // of those written anew

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
	small    [len(tiers)][]*Segment // segments that may be merged, in the order in which they were made
	due      time.Time              // when the next commit must start, but for publications; zero: nothing to do
	pubDue   time.Time              // when it must for the publications in pending, unless they are elided; zero: there are none
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
	merge    merge
	stored   []stored
	made     []*Segment // new ones
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
		mergeFrom:   cfg.MergeFrom,
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
		created, _ := eachPiece(s.Head, func(piece) {}) // whoever reads the extents sees the error
		segs[i] = &Segment{id: s.ID, journal: j, created: created, stored: s.Size}
		j.nextSeg = max(j.nextSeg, s.ID)
		j.added(segs[i], s.Size)
	}
	return img, segs, nil
}

// Read reads a segment that the caller needs, from the disk. It may wait for a
// commit that runs. An error other than one that wraps ErrNotFound may pass.
func (j *Journal) Read(s *Segment) (*Contents, error) {
	s = s.Current()
	row, err := j.store.Segment(s.id)
	if err == nil && row == nil {
		row, err = j.readMoved(s)
	}
	if err != nil {
		return nil, err
	}
	if row == nil {
		return nil, fmt.Errorf("segment %d: %w", s.id, ErrNotFound)
	}
	return row.contents(), nil
}

// readMoved reads the row of a segment that was merged between the look at what
// it is and the look for it. No commit runs meanwhile, or it could happen again.
// A merge that was tried, and failed, may be on the disk all the same.
func (j *Journal) readMoved(s *Segment) (*StoredSegment, error) {
	j.commitMu.Lock()
	defer j.commitMu.Unlock()
	s = s.Current()
	row, err := j.store.Segment(s.id)
	if err == nil && row == nil && slices.Contains(j.group.merge.from, s) {
		row, err = j.store.Segment(j.group.merge.id)
	}
	return row, err
}

// Close gives the store's connection up. Run must have returned.
func (j *Journal) Close() error { return j.store.Close() }

// Publish adds what one PUBLISH makes durable. The caller holds no lock that a
// Claim takes.
func (j *Journal) Publish(p *Publication) {
	if len(p.Claims) == 0 && p.Message != nil {
		p.Message = &Message{Topic: p.Message.Topic} // while commits fail, the payloads would pile up
	}
	j.mu.Lock()
	now := time.Now()
	j.pending = append(j.pending, operation{pub: p, at: now})
	j.size += p.size()
	if j.pubDue.IsZero() {
		j.pubDue = now.Add(j.commitDelay)
		j.poke()
	}
	many := j.backlog().reaches(pruneMin)
	j.mu.Unlock()
	if many {
		j.prune()
	}
}

// Change adds a change of rows; done (which may be nil) is told when it is
// durable. change may be called more than once, when a transaction fails.
func (j *Journal) Change(change func(Tx) error, done Waiter) {
	j.mu.Lock()
	j.pending = append(j.pending, operation{change: change, done: done, at: time.Now()})
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
		j.schedule(j.stretched(lazyDelay))
	}
	j.mu.Unlock()
}

// MarkRetained has the retained message of a topic written within the retain
// flush interval. Later changes of the same topic cost nothing.
func (j *Journal) MarkRetained(topic string) {
	j.mu.Lock()
	if _, ok := j.lazy[topic]; !ok {
		flush := j.stretched(j.retainFlush)
		j.lazy[topic] = time.Now().Add(flush)
		j.schedule(flush)
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

// schedule makes the next commit start within d. j.mu is held.
func (j *Journal) schedule(d time.Duration) {
	due := time.Now().Add(d)
	if !j.due.IsZero() && !due.Before(j.due) {
		return
	}
	j.due = due
	j.poke()
}

// poke has Run look anew when the next commit is due. j.mu is held.
func (j *Journal) poke() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// wait returns how long Run has to wait for the next commit; negative if it is
// due. j.mu is held.
func (j *Journal) wait() time.Duration {
	wait := time.Hour
	for _, due := range []time.Time{j.due, j.pubDue} {
		if !due.IsZero() {
			wait = min(wait, time.Until(due))
		}
	}
	return wait
}

// Pending returns how many operations wait for a commit, and whether there is
// anything at all to write, be it a group that failed. It waits for a commit
// that runs.
func (j *Journal) Pending() (operations int, any bool) {
	j.commitMu.Lock()
	defer j.commitMu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.pending) + len(j.group.ops), !j.due.IsZero() || !j.pubDue.IsZero() || !j.group.empty()
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

// Stored returns the size of the segments that sessions need, bytes.
func (j *Journal) Stored() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stats.SegmentBytes
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
		j.mu.Lock()
		wait := j.wait()
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
		commit := j.CommitChanges
		if retry == 0 {
			j.elide()
			j.mu.Lock()
			wait := j.wait()
			if !j.pubDue.IsZero() && time.Until(j.pubDue) <= 0 {
				commit = j.Commit
			}
			j.mu.Unlock()
			if wait > 0 {
				continue
			}
		}
		if err := commit(); err != nil {
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
		j.small = [len(tiers)][]*Segment{}
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
	return len(g.ops) == 0 && len(g.progress) == 0 && len(g.urgent) == 0 && len(g.drops) == 0 && len(g.retained) == 0 && len(g.pinned) == 0 && len(g.merge.from) == 0
}

// Commit writes what is pending as one group now, due or not, and tells those
// who wait. After an error the group is kept, and the next Commit tries it
// again, alone. Where everything in the group is elided, nothing is written.
func (j *Journal) Commit() error { return j.commit(true) }

// CommitChanges is Commit but for the publications that come behind all changes:
// their subscribers have the commit delay to acknowledge them.
func (j *Journal) CommitChanges() error { return j.commit(false) }

func (j *Journal) commit(all bool) error {
	j.commitMu.Lock()
	defer j.commitMu.Unlock()
	if j.group.empty() {
		j.take(all)
	} else {
		j.takeDrops()
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

// take moves what is pending into the group: all of it, or all but the
// publications behind the last change. j.commitMu is held.
func (j *Journal) take(all bool) {
	g := &j.group
	j.pruneMu.Lock()
	defer j.pruneMu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if cap(g.ops) > 16*pruneMin.operations {
		g.ops = nil // of a burst
	}
	n := len(j.pending)
	for !all && n > 0 && j.pending[n-1].change == nil {
		n--
	}
	rest := j.pending[n:]
	g.ops, j.pending, j.size = j.pending[:n], append(g.ops[:0], rest...), 0
	clear(rest)
	var pubDue time.Time
	for i, op := range j.pending {
		if i == 0 {
			pubDue = op.at.Add(j.commitDelay)
		}
		j.size += op.pub.size()
	}
	j.pruneAt = backlog{}
	g.urgent, j.urgent = j.urgent, g.urgent[:0]
	g.drops, j.drops = j.drops, g.drops[:0]
	g.progress, j.progress = j.progress, make(map[SessionID]struct{})
	g.retained = nil
	now := time.Now()
	var next time.Time
	k := min(len(j.pinned), compactBatch)
	g.pinned = append(g.pinned[:0], j.pinned[:k]...)
	if j.pinned = j.pinned[k:]; len(j.pinned) > 0 {
		next = now.Add(j.stretched(lazyDelay))
	} else {
		j.pinned = nil
	}
	if j.gather(&g.merge) {
		next = now.Add(j.stretched(lazyDelay))
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
	j.due, j.pubDue = next, pubDue
}

// takeDrops adds to a group that is tried again the deletions that have come
// meanwhile: on a full disk they make the room that it needs. So a deletion may
// overtake operations that wait; a segment is released when what the caller has
// in its place is durable. j.commitMu is held.
func (j *Journal) takeDrops() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.group.drops = append(j.group.drops, j.drops...)
	j.drops = j.drops[:0]
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
	g.stored, g.made = g.stored[:0], g.made[:0]
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
	build := &j.build
	build.reset() // of a try that failed
	seal := func() error {
		if seg == nil {
			return nil
		}
		seg.live, seg.created = len(g.stored)-sealed, j.state.Now()
		for _, s := range g.stored[sealed:] {
			seg.bytes += int64(s.size)
		}
		head := build.head(seg.created)
		seg.stored = len(head) + len(build.body)
		seg.watch()
		sealed = len(g.stored)
		size += seg.stored
		if err := tx.PutSegment(StoredSegment{ID: seg.id, Head: head, Body: build.body}); err != nil {
			return err
		}
		g.made = append(g.made, seg)
		seg = nil
		build.reset()
		return nil
	}

	for _, id := range g.drops { // first: they make room
		if err := begin(); err != nil {
			return fail(err)
		}
		if err := tx.DeleteSegment(id); err != nil {
			return fail(err)
		}
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
		claims := 0
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
				build.message(p.Message)
			}
			claims++
			build.claim(rec, p.Message.Size())
			g.stored = append(g.stored, stored{c, seg, rec.Session, p.Message.Size()})
		}
		if claims > 0 {
			records++
			g.size++
			if len(build.body) >= segmentBytes {
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
	if cap(build.body) > 4*segmentBytes {
		*build = segmentBuilder{} // of a large message
	}

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
	g.shrunk = g.shrunk[:0]
	for _, s := range g.pinned {
		if err := begin(); err != nil {
			return fail(err)
		}
		after, wrote, err := j.compact(tx, s)
		if err != nil {
			return fail(err)
		}
		size += wrote
		g.shrunk = append(g.shrunk, after)
	}
	if len(g.merge.from) > 0 {
		if err := begin(); err != nil {
			return fail(err)
		}
		if err := j.mergeSegments(tx, &g.merge); err != nil {
			return fail(err)
		}
		size += g.merge.size
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

// tell calls everybody who waited for the group, in the order of the
// operations, and empties it. j.commitMu is held.
func (j *Journal) tell() {
	g := &j.group
	for _, s := range g.made {
		j.added(s, s.stored)
	}
	for _, s := range g.stored {
		if !s.claim.Stored(s.seg) {
			s.seg.Release(1, s.size)
		}
	}
	for i, s := range g.pinned {
		if g.shrunk[i] > 0 {
			j.resized(s, g.shrunk[i])
		}
	}
	j.merged(&g.merge)
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
	clear(g.made)
	g.merge, g.made = merge{}, g.made[:0]
	g.pinned, g.shrunk = g.pinned[:0], g.shrunk[:0]
	g.ops, g.urgent, g.stored = g.ops[:0], g.urgent[:0], g.stored[:0]
	g.drops = g.drops[:0]
	g.progress, g.retained = nil, nil
}
