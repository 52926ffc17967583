package storage

import (
	"cmp"
	"slices"
)

// Segments that little is needed of are written anew without the rest, and small
// ones become one, along with commits that happen anyway.

// A tier is what makes segments worth merging: as many as count, each smaller than
// size, in bytes. Messages that come one by one make a segment each, and
// each takes memory, a row and a read of its own.
type tier struct{ size, count int }

var tiers = [...]tier{{4 << 10, 64}, {64 << 10, 1024}}

// compactBatch is how many segments one group writes anew: a few megabytes have
// to be read for it.
const compactBatch = 16

// merge is a number of segments that become one.
type merge struct {
	from     []*Segment // empty: nothing is merged
	id       int64      // of the result
	size     int        // of the result's row; 0: they were left as they are
	sessions map[SessionID]struct{}
	counted  int
}

// added counts a segment's row, and keeps it in mind for merging.
func (j *Journal) added(s *Segment, size int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stats.Segments++
	j.stats.SegmentBytes += int64(size)
	if j.list(s) && j.due.IsZero() {
		j.schedule(j.stretched(lazyDelay))
	}
}

// resized tells what size a segment's row has after it was written anew.
func (j *Journal) resized(s *Segment, size int) {
	s = s.lock()
	change := size - s.stored
	gone := s.live <= 0
	s.stored = size
	s.watch()
	s.mu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !gone { // else it is no longer counted
		j.stats.SegmentBytes += int64(change)
		j.list(s)
	}
}

// list keeps a small segment in mind for merging, and reports whether there are
// enough. j.mu is held.
func (j *Journal) list(s *Segment) (enough bool) {
	s.mu.Lock()
	size, listed := s.stored, s.listed
	s.listed = true
	s.mu.Unlock()
	if listed {
		return false
	}
	for i, t := range tiers {
		if size < t.size {
			j.small[i] = append(j.small[i], s)
			return len(j.small[i]) >= j.mergeCount(i)
		}
	}
	return false
}

// mergeCount is how many small segments are worth merging.
func (j *Journal) mergeCount(tier int) int { return cmp.Or(j.mergeFrom, tiers[tier].count) }

func (j *Journal) drop(s *Segment) {
	s.mu.Lock()
	id, size := s.id, s.stored
	s.mu.Unlock()
	j.mu.Lock()
	j.drops = append(j.drops, id)
	j.stats.Segments--
	j.stats.SegmentBytes -= int64(size)
	j.schedule(j.stretched(lazyDelay))
	j.mu.Unlock()
}

// shrink has a segment written anew with one of the next commits.
func (j *Journal) shrink(s *Segment) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pinned = append(j.pinned, s)
	j.schedule(j.stretched(lazyDelay))
}

// gather chooses small segments that are to become one with the group, and
// reports whether there are more. j.mu is held.
func (j *Journal) gather(m *merge) (more bool) {
	*m = merge{}
	for i := range j.small {
		count := j.mergeCount(i)
		if len(j.small[i]) < count {
			continue
		}
		j.small[i] = slices.DeleteFunc(j.small[i], func(s *Segment) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.live <= 0 || s.into != nil
		})
		if len(j.small[i]) < max(count*3/4, 2) || len(m.from) > 0 {
			more = more || len(j.small[i]) >= count
			continue
		}
		n, size := 0, 0
		for n < len(j.small[i]) && (n < 2 || size < segmentBytes) {
			s := j.small[i][n]
			s.mu.Lock()
			size += s.stored
			s.mu.Unlock()
			n++
		}
		m.from = slices.Clone(j.small[i][:n])
		m.sessions = make(map[SessionID]struct{})
		j.small[i] = append([]*Segment(nil), j.small[i][n:]...)
		j.nextSeg++
		m.id = j.nextSeg
		more = more || len(j.small[i]) >= count
	}
	return more
}

// compact writes a segment anew, without what nobody needs any more. It returns
// the size of its row, 0 if there is none, and how much of it was written.
func (j *Journal) compact(tx Tx, s *Segment) (after, wrote int, err error) {
	s = s.Current()
	old, err := tx.Segment(s.id)
	if err != nil || old == nil {
		return 0, 0, err
	}
	c := old.contents()
	if c.torn != nil {
		return old.Size, 0, nil // left alone
	}
	b := &j.rebuild
	b.reset()
	c.rewrite(b, func(id SessionID, seq uint64) bool { return j.state.Wants(s, id, seq) })
	head := b.head(c.created)
	size := len(head) + len(b.body)
	if b.empty() || size >= old.Size {
		return old.Size, 0, nil // about to be deleted; or not worth it
	}
	return size, size, tx.PutSegment(StoredSegment{ID: s.id, Head: head, Body: b.body})
}

// mergeSegments writes what is needed of several segments as one, and deletes
// them. Where an earlier try of the group has done so, unknown to it, there is
// nothing left to do.
func (j *Journal) mergeSegments(tx Tx, m *merge) error {
	done, err := tx.Segment(m.id)
	if err != nil {
		return err
	}
	if done != nil {
		m.size = done.Size
		return nil
	}
	b := &j.rebuild
	b.reset()
	m.size = 0
	clear(m.sessions)
	var created int64
	var merged []*Segment
	for _, s := range m.from {
		row, err := tx.Segment(s.id)
		if err != nil {
			return err
		}
		if row == nil {
			continue // nobody needs it any more
		}
		c := row.contents()
		if c.torn != nil {
			continue // left alone
		}
		for _, id := range c.rewrite(b, func(id SessionID, seq uint64) bool { return j.state.Wants(s, id, seq) }) {
			m.sessions[id] = struct{}{}
		}
		created = max(created, c.created)
		merged = append(merged, s)
	}
	if m.from = merged; b.empty() || len(merged) < 2 {
		m.from = nil
		return nil
	}
	head := b.head(created)
	m.size = len(head) + len(b.body)
	if err := tx.PutSegment(StoredSegment{ID: m.id, Head: head, Body: b.body}); err != nil {
		return err
	}
	for _, s := range m.from {
		if err := tx.DeleteSegment(s.id); err != nil {
			return err
		}
	}
	return nil
}

// merged tells that a merge is durable: whoever needs one of the segments has
// the new one from now on.
func (j *Journal) merged(m *merge) {
	if len(m.from) == 0 {
		return
	}
	to := &Segment{journal: j, id: m.id, stored: m.size}
	to.mu.Lock() // until all claims are counted, or the first to be released could be the last
	old := 0
	for _, s := range m.from {
		s.mu.Lock()
		to.live += max(s.live, 0)
		to.bytes += s.bytes
		to.created = max(to.created, s.created)
		if s.live > 0 {
			old += s.stored
			m.counted++
		}
		s.into = to
		s.mu.Unlock()
	}
	to.watch()
	live := to.live
	to.mu.Unlock()
	j.mu.Lock()
	j.stats.Segments -= int64(m.counted)
	j.stats.SegmentBytes -= int64(old)
	j.mu.Unlock()
	j.added(to, m.size)
	if live == 0 {
		j.drop(to)
	}
	for id := range m.sessions {
		j.state.Merged(id)
	}
}
