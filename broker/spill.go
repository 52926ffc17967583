package broker

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"penstock/storage"
)

// Of a long queue only a part is in memory: what is in flight, some of what
// comes next, and what is not durable yet. Between them is what only the disk
// has, as runs of sequence numbers. A run costs as much memory as one message.

// run is a stretch of a session's queue that only the disk has: deliveries with
// consecutive sequence numbers, in one segment, none of which was ever sent.
type run struct {
	seg   *storage.Segment // holds count claims of it
	first uint64           // sequence number
	count int
	bytes int64 // of the messages; after a restart about so
	share bool  // some of it came by a share group
}

func (r *run) end() uint64 { return r.first + uint64(r.count) }

// spill is the runs of a session, by sequence number, none of which overlap. All
// is guarded by the session's lock.
type spill struct {
	runs  []run // those before head are used up
	head  int
	count int // deliveries
	bytes int64
}

// first returns the sequence number of the first delivery that only the disk
// has; never if it has none.
func (sp *spill) first() uint64 {
	if sp.count == 0 {
		return never
	}
	return sp.runs[sp.head].first
}

// search returns the index of the first run that ends behind seq.
func (sp *spill) search(seq uint64) int {
	lo, hi := sp.head, len(sp.runs)
	for lo < hi {
		mid := (lo + hi) / 2
		if sp.runs[mid].end() <= seq {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

// has reports whether a run in the segment has the delivery.
func (sp *spill) has(seg *storage.Segment, seq uint64) bool {
	i := sp.search(seq)
	return i < len(sp.runs) && sp.runs[i].first <= seq && sp.runs[i].seg.Current() == seg
}

// add adds a run.
func (sp *spill) add(r run) {
	sp.count += r.count
	sp.bytes += r.bytes
	i := len(sp.runs)
	if i > sp.head && sp.runs[i-1].end() > r.first {
		i = sp.search(r.first)
	}
	if i > sp.head && sp.runs[i-1].join(r) {
		if i < len(sp.runs) && sp.runs[i-1].join(sp.runs[i]) {
			sp.runs = slices.Delete(sp.runs, i, i+1)
		}
		return
	}
	if i == sp.head && sp.head > 0 {
		sp.head--
		sp.runs[sp.head] = r
		return
	}
	sp.runs = slices.Insert(sp.runs, i, r)
}

// join adds o to the run, if it goes on there, and reports whether it does.
func (r *run) join(o run) bool {
	if r.end() != o.first || r.seg != o.seg {
		return false
	}
	r.count += o.count
	r.bytes += o.bytes
	r.share = r.share || o.share
	return true
}

// take takes n deliveries of the given size off the first run. It returns what
// the run counted too much for, once it is used up.
func (sp *spill) take(n int, size int64) (left int64) {
	r := &sp.runs[sp.head]
	size = min(size, r.bytes)
	r.first += uint64(n)
	r.count -= n
	r.bytes -= size
	sp.count -= n
	sp.bytes -= size
	if r.count > 0 {
		return 0
	}
	left = r.bytes
	sp.bytes -= left
	*r = run{}
	sp.head++
	if sp.head == len(sp.runs) {
		sp.runs, sp.head = nil, 0
	} else if sp.head > 64 && sp.head*2 > len(sp.runs) {
		sp.runs = slices.Delete(sp.runs, 0, sp.head)
		sp.head = 0
	}
	return left
}

// memory is how much of the queues is kept in memory.
type memory struct {
	online int // deliveries of a session whose client is connected, from which on some are left to the disk
	away   int // of one whose client is not
	chunk  int // deliveries that are read at once
	bytes  int // of their messages, in each of these cases
	budget int64
}

var defaultMemory = memory{online: 1024, away: 64, chunk: 256, bytes: 256 << 10, budget: 16 << 20}

// entryCost is what a delivery takes in memory besides its message, bytes.
const entryCost = 256

// crowded reports whether all queues together take more memory than they should.
func (p *plane) crowded() bool {
	return p.queueBytes.Load()-p.spilledBytes.Load()+entryCost*(p.queueMessages.Load()-p.spilledMessages.Load()) > p.memory.budget
}

// holdsTooMuch reports whether the session has more in memory than it should. s.mu
// is held.
func (s *session) holdsTooMuch() bool {
	n, m := s.queue.len()-s.next, &s.plane.memory
	switch {
	case s.spill.count > 0 && s.queue.len() > 0 && s.queue.at(s.queue.len()-1).seq > s.spill.first():
		return true // what was added comes behind what is on the disk already
	case s.plane.crowded():
		return n > 0
	case s.link == nil:
		return n > m.away || s.inMemory() > int64(m.bytes)
	}
	return n > m.online || s.inMemory() > int64(4*m.bytes)
}

// inMemory returns the size of the messages that the session has in memory. s.mu
// is held.
func (s *session) inMemory() int64 { return s.bytes - s.spill.bytes }

// unload leaves to the disk what of the queue need not be in memory. s.mu is
// held.
func (s *session) unload() {
	if s.id == 0 || !s.holdsTooMuch() {
		return
	}
	m := &s.plane.memory
	keep, bytes := 0, 0
	if s.link != nil {
		keep, bytes = m.online/2, 2*m.bytes
		if s.plane.crowded() {
			keep, bytes = m.chunk/16, m.bytes/16
		}
	}
	limit := s.spill.first()
	var n int
	var size int64
	s.queue.filter(s.next, func(e *entry) bool {
		if e.seg == nil || e.state != queued || e.tried {
			return true
		}
		if keep > 0 && bytes > 0 && e.seq < limit {
			keep--
			bytes -= e.size
			return true
		}
		s.spill.add(run{seg: e.seg.Current(), first: e.seq, count: 1, bytes: int64(e.size), share: e.share != ""})
		n++
		size += int64(e.size)
		return false
	})
	s.plane.spilledMessages.Add(int64(n))
	s.plane.spilledBytes.Add(size)
}

// filter takes out the entries from index i on that keep returns false for.
func (r *ring) filter(i int, keep func(*entry) bool) {
	to := i
	for ; i < r.n; i++ {
		if e := r.at(i); keep(e) {
			r.buf[(r.head+to)&(len(r.buf)-1)] = e
			to++
		}
	}
	for i = to; i < r.n; i++ {
		r.buf[(r.head+i)&(len(r.buf)-1)] = nil
	}
	r.n = to
	if len(r.buf) > 1024 && r.n < len(r.buf)/8 {
		kept := *r
		*r = ring{}
		for i := range kept.n {
			r.push(kept.at(i))
		}
	}
}

// merge adds entries, which ascend, where they belong.
func (r *ring) merge(add []*entry) {
	if len(add) == 0 {
		return
	}
	var behind []*entry
	for i := r.search(add[0].seq); i < r.n; i++ {
		behind = append(behind, r.at(i))
	}
	r.n -= len(behind)
	for len(add) > 0 || len(behind) > 0 {
		if len(behind) == 0 || len(add) > 0 && add[0].seq < behind[0].seq {
			r.push(add[0])
			add = add[1:]
		} else {
			r.push(behind[0])
			behind = behind[1:]
		}
	}
}

// lowest returns the sequence number of the first delivery of the queue, of the
// next one to come if there is none. s.mu is held.
func (s *session) lowest() uint64 {
	seq := min(s.nextSeq, s.spill.first())
	if s.queue.len() > 0 {
		seq = min(seq, s.queue.at(0).seq)
	}
	return seq
}

// dropSpilled gives up deliveries that only the disk has, from the first on, as
// many of one run as make room for need bytes. s.mu is held.
func (s *session) dropSpilled(need int) {
	r := &s.spill.runs[s.spill.head]
	each := max(r.bytes/int64(r.count), 1)
	over := s.bytes + int64(need) - s.bound()
	n := max(s.live-s.plane.cfg.MaxQueueMessages+1, int(min((over+each-1)/each, int64(r.count))), 1)
	s.giveUp(min(n, r.count))
}

// giveUp ends n deliveries of the first run, unread. The caller counts them as
// dropped. s.mu is held.
func (s *session) giveUp(n int) {
	r := s.spill.runs[s.spill.head]
	size := r.bytes / int64(r.count) * int64(n)
	s.stale.dropped, s.stale.upTo = min(s.stale.dropped, r.first), max(s.stale.upTo, r.first+uint64(n)-1)
	s.stale.finished = min(s.stale.finished, r.first)
	s.took(n, size)
	s.triedLeft -= n
	s.live -= n
	s.bytes -= size
	s.plane.queueMessages.Add(-int64(n))
	s.plane.queueBytes.Add(-size)
	r.seg.Release(n, int(size))
	s.plane.journal.MarkProgress(s.id, nil)
	s.advance()
}

// took takes n deliveries of the given size off the first run. s.mu is held.
func (s *session) took(n int, size int64) {
	before := s.spill.bytes
	left := s.spill.take(n, size)
	s.plane.spilledMessages.Add(-int64(n))
	s.plane.spilledBytes.Add(s.spill.bytes - before)
	s.bytes -= left
	s.plane.queueBytes.Add(-left)
}

// more asks for what comes next in the queue to be read, if only the disk has
// it and there is not enough in memory. s.mu is held.
func (s *session) more() {
	if s.spill.count == 0 || s.loading || s.link == nil {
		return
	}
	m := &s.plane.memory
	enough := m.chunk / 2
	if s.plane.crowded() {
		enough = m.chunk / 32
	}
	// However large they are, the next one is always there to be sent.
	ahead := s.queue.search(s.spill.first()) - s.next
	if ahead > enough || ahead > 0 && s.inMemory() > int64(2*m.bytes) {
		return
	}
	s.loading = true
	s.plane.loads.push(s)
}

// loads are the sessions that something is to be read for.
type loads struct {
	mu   sync.Mutex
	list []*session
	wake chan struct{} // capacity 1
}

func (l *loads) push(s *session) {
	l.mu.Lock()
	l.list = append(l.list, s)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *loads) pop() *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) == 0 {
		return nil
	}
	s := l.list[0]
	l.list[0] = nil
	if l.list = l.list[1:]; len(l.list) == 0 {
		l.list = nil
	}
	return s
}

// adoptWait is how often it is looked whether what others have got is on the
// disk.
const adoptWait = 10 * time.Millisecond

// readRetry is how long after a failed read the disk is asked again.
const readRetry = 250 * time.Millisecond

// load reads what sessions ask for, until ctx ends or the database is damaged where
// it reads.
func (p *plane) load(ctx context.Context) {
	var b batch
	for {
		s := p.loads.pop()
		if s == nil {
			select {
			case <-ctx.Done():
				return
			case <-p.loads.wake:
			}
			continue
		}
		err := p.loadSome(s, &b)
		b.flush()
		if p.readFails(s.clientID, err) {
			return
		}
		if err != nil {
			p.loads.push(s)
			select {
			case <-ctx.Done():
				return
			case <-time.After(readRetry):
			}
		}
	}
}

// readFails notes whether the queue of a client can be read. It reports whether the
// database is damaged, of which Run is told.
func (p *plane) readFails(clientID string, err error) (damaged bool) {
	p.failMu.Lock()
	defer p.failMu.Unlock()
	before := len(p.failing)
	if err == nil {
		if delete(p.failing, clientID); before > 0 && len(p.failing) == 0 {
			p.readError.Store(nil)
			p.log.Info("queues can be read again")
		}
		return false
	}
	why := err.Error()
	p.readError.Store(&why)
	if p.failing[clientID] = struct{}{}; before == 0 {
		p.log.Error("queues cannot be read, deliveries wait", "err", err, "client", clientID)
	}
	if damaged = errors.Is(err, storage.ErrDamaged); damaged {
		select {
		case p.broken <- err:
		default: // it knows already
		}
	}
	return damaged
}

// loadSome reads the next deliveries of a session. After an error it is to be
// called again for it.
func (p *plane) loadSome(s *session, b *batch) error {
	part, err := p.readPart(s)
	if err == nil && part != nil {
		part.put(b)
	}
	return err
}

// part is deliveries of a session that were read from a segment: what it has of
// the sequence numbers from first up to, but without, upTo.
type part struct {
	s           *session
	seg         *storage.Segment
	first, upTo uint64
	got         []*entry
}

// readPart reads the next deliveries of a session, nil if it needs none. No lock
// of the session is held meanwhile, so all may have changed when the part is
// put.
func (p *plane) readPart(s *session) (*part, error) {
	s.mu.Lock()
	if s.ended || s.link == nil || s.spill.count == 0 {
		s.loading = false
		s.mu.Unlock()
		return nil, nil
	}
	r := s.spill.runs[s.spill.head]
	s.mu.Unlock()

	c, err := p.contents(r.seg)
	if err != nil {
		return nil, err
	}
	chunk, bytes := p.memory.chunk, p.memory.bytes
	if p.crowded() {
		chunk, bytes = chunk/16+1, bytes/16
	}
	var got []*entry
	upTo := r.end()
	c.Deliveries(s.id, r.first, r.end(), func(d storage.ClaimRecord, m *storage.Message) bool {
		m = clone(m)
		bytes -= m.Size()
		got = append(got, &entry{
			s: s, msg: m, size: m.Size(), seg: r.seg, seq: d.Seq, ids: d.Identifiers, qos: d.QoS, retain: d.Retain,
			share: p.shareKey(d.Share), durable: true,
		})
		if len(got) >= chunk || bytes <= 0 {
			upTo = d.Seq + 1
			return false
		}
		return true
	})

	return &part{s, r.seg, r.first, upTo, got}, nil
}

// put gives the session what was read for it.
func (l *part) put(b *batch) {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loading = false
	if !s.ended && s.spill.count > 0 {
		s.loaded(l)
	}
	s.pump(b)
	if s.link == nil { // its client has left meanwhile
		s.unload()
	}
}

// loaded puts deliveries that were read from a segment into the queue, and gives
// up what was to be there and is not. The first run may be another one
// meanwhile, or begin earlier, with what was left to the disk since: then all is
// read anew. s.mu is held.
func (s *session) loaded(l *part) {
	r := s.spill.runs[s.spill.head]
	if r.seg.Current() != l.seg.Current() || r.first < l.first && !fault(faultLoadBlind) {
		return
	}
	upTo := min(l.upTo, r.end())
	if upTo <= r.first {
		return
	}
	got := slices.DeleteFunc(l.got, func(e *entry) bool { return e.seq < r.first || e.seq >= upTo })
	if lost := int(upTo-r.first) - len(got); lost > 0 {
		s.drop(dropDamaged, lost)
		s.plane.log.Error("messages of a queue are missing on the disk", "client", s.clientID, "messages", lost)
		s.live -= lost
		s.plane.queueMessages.Add(-int64(lost))
		r.seg.Release(lost, 0)
	}
	var size int64
	for _, e := range got {
		size += int64(e.size)
		e.tried = s.tried(e.seq)
		e.perhaps = e.tried && e.seq >= s.triedBelow
	}
	if over := size - min(size, r.bytes); over > 0 { // the run counted too little for them
		s.bytes += over
		s.plane.queueBytes.Add(over)
		s.spill.runs[s.spill.head].bytes += over
		s.spill.bytes += over
		s.plane.spilledBytes.Add(over)
	}
	s.took(int(upTo-r.first), size)
	s.queue.merge(got)
}

// tried reports whether the next delivery that is read may have been sent before
// the last restart. s.mu is held.
func (s *session) tried(seq uint64) bool {
	if seq >= s.restartSeq {
		return false
	}
	s.triedLeft--
	return seq < s.triedBelow || s.triedLeft >= 0
}

// contents reads a segment, or has it from a moment ago: sessions that were away
// together come back together. One that is lost is empty.
func (p *plane) contents(seg *storage.Segment) (*storage.Contents, error) {
	seg = seg.Current()
	p.readMu.Lock()
	defer p.readMu.Unlock()
	for _, r := range p.read {
		if r.seg == seg {
			return r.contents, nil
		}
	}
	c, err := p.journal.Read(seg)
	if errors.Is(err, storage.ErrNotFound) {
		c, err = &storage.Contents{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := c.Torn(); err != nil {
		p.log.Error("segment is damaged, what could be read of it is kept", "err", err)
	}
	if c.Size() <= readCache/2 {
		p.read = append(p.read, readSegment{seg, c})
		size := 0
		for i := len(p.read) - 1; i >= 0; i-- {
			if size += p.read[i].contents.Size(); size > readCache {
				p.read = slices.Delete(p.read, 0, i+1)
				break
			}
		}
	}
	return c, nil
}

// readCache is the size of the segments read last that are kept, bytes.
const readCache = 2 << 20

type readSegment struct {
	seg      *storage.Segment
	contents *storage.Contents
}

// Merged implements storage.State.
func (p *plane) Merged(id storage.SessionID) {
	p.sessMu.Lock()
	s := p.byID[id]
	p.sessMu.Unlock()
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sp := &s.spill
	to := sp.head
	for i := sp.head; i < len(sp.runs); i++ {
		r := sp.runs[i]
		r.seg = r.seg.Current()
		if to > sp.head && sp.runs[to-1].join(r) {
			continue
		}
		sp.runs[to] = r
		to++
	}
	clear(sp.runs[to:])
	sp.runs = sp.runs[:to]
}

// restoreExtent gives a session what a segment has of it, as far as its client
// has not finished it and no earlier segment has it too. It returns how much
// that is.
func (s *session) restoreExtent(seg *storage.Segment, e storage.Extent, done storage.Progress) (claims, size int) {
	each := e.Bytes / max(e.Count, 1)
	end := e.First + uint64(e.Count)
	for seq := max(e.First, done.Cursor); seq < end; {
		stop := end
		if i, found := slices.BinarySearch(done.Finished, seq); found {
			seq++
			continue
		} else if i < len(done.Finished) {
			stop = min(stop, done.Finished[i])
		}
		if i, found := slices.BinarySearch(done.Released, seq); found {
			if at := s.queue.search(seq); at == s.queue.len() || s.queue.at(at).seq != seq {
				s.queue.merge([]*entry{{s: s, seg: seg, seq: seq, size: each, qos: 2, state: released, share: e.Share, durable: true, tried: true}})
				claims++
				size += each
			}
			seq++
			continue
		} else if i < len(done.Released) {
			stop = min(stop, done.Released[i])
		}
		if i := s.spill.search(seq); i < len(s.spill.runs) {
			if r := &s.spill.runs[i]; r.first <= seq {
				seq = r.end()
				continue
			} else {
				stop = min(stop, r.first)
			}
		}
		n := int(stop - seq)
		s.spill.add(run{seg: seg, first: seq, count: n, bytes: int64(n * each), share: e.Share != ""})
		claims += n
		size += n * each
		seq = stop
	}
	return claims, size
}

// adoption is the work of giving what a session has left on the disk to others.
type adoption struct {
	over chan struct{} // closed when it ends
	done bool          // all of it is in the journal, and the session's deletion behind it; set before over is closed
}

// adoptLater gives what a session that has ended leaves to others, in the
// background, and then deletes its row.
func (p *plane) adoptLater(s *session, orphans []orphan) {
	settled := p.settles(s.clientID)
	a := &adoption{over: make(chan struct{})}
	p.sessMu.Lock()
	p.adoptions[s.clientID] = a
	p.sessMu.Unlock()
	p.background(func() {
		defer close(a.over)
		var b batch
		defer b.flush()
		for _, o := range orphans {
			if o.run.count == 0 {
				p.adopt(o, &b)
			} else if !p.adoptRun(s.id, o, &b) {
				return // the session is still there after the restart
			}
		}
		p.forget(s, settled)
		a.done = true
		p.sessMu.Lock()
		delete(p.adoptions, s.clientID)
		p.sessMu.Unlock()
	})
}

// adopted waits until what a client's last session has left is in the journal:
// a new row of the client takes the place of the old one, and a cut would find
// nobody who has it. It returns false if the broker stops before; then there must
// be no new row.
func (p *plane) adopted(clientID string) bool {
	p.sessMu.Lock()
	a := p.adoptions[clientID]
	p.sessMu.Unlock()
	for a != nil {
		select {
		case <-a.over:
			return a.done
		case <-time.After(10 * adoptWait):
			if p.stopping.Load() {
				return false
			}
		}
	}
	return true
}

// adoptRun gives what another session of a share group shall have of a run, now
// that its own has ended, to that session; the rest is given up. It returns
// false if the broker stops before that is done: the next start finds the
// session as it was. It may wait for commits.
func (p *plane) adoptRun(id storage.SessionID, o orphan, b *batch) bool {
	if p.stopping.Load() {
		return false
	}
	r := o.run
	c, err := p.contents(r.seg)
	for err != nil {
		if p.readFails(o.client, err) || p.stopping.Load() {
			return false
		}
		p.pause(readRetry)
		c, err = p.contents(r.seg)
	}
	p.readFails(o.client, nil)
	left, size := r.count, r.bytes
	var unsafe atomic.Int64 // deliveries that are in memory only
	c.Deliveries(id, r.first, r.end(), func(d storage.ClaimRecord, m *storage.Message) bool {
		if d.Share == "" || d.QoS == 2 && d.Seq < o.tried {
			p.drop(dropSessionEnded)
			return true
		}
		left--
		size -= int64(m.Size())
		unsafe.Add(1)
		p.adopt(orphan{msg: clone(m), share: p.shareKey(d.Share), seg: r.seg, safe: func() { unsafe.Add(-1) }}, b)
		b.flush() // there may be many
		return true
	})
	r.seg.Release(left, int(max(size, 0)))
	for p.crowded() && unsafe.Load() > 0 { // the next run waits until the disk has this one
		if p.stopping.Load() {
			return false
		}
		p.pause(adoptWait)
	}
	return true
}
