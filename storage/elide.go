package storage

import "time"

// What need not be written any more, because those whom it was for have
// acknowledged it, is forgotten before it is.

// backlog measures pending operations.
type backlog struct{ operations, bytes int }

// pruneMin is how much is worth a look whether it is still needed.
var pruneMin = backlog{4096, 16 << 20}

func (a backlog) reaches(b backlog) bool { return a.operations >= b.operations || a.bytes >= b.bytes }

// backlog returns what is pending. j.mu is held.
func (j *Journal) backlog() backlog { return backlog{len(j.pending), j.size} }

// size returns the bytes of the message that the publication keeps in memory.
func (p *Publication) size() int {
	if p == nil || p.Message == nil {
		return 0
	}
	return p.Message.Size()
}

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
	if p == nil || p.Retain || p.Inbound.Session != 0 || p.Done != nil {
		return 0, true
	}
	for _, c := range p.Claims {
		if _, needed := c.Record(); needed {
			return 0, true
		}
	}
	return len(p.Claims), false
}

// elide forgets the publications in what is pending that nobody needs any more, up
// to the first that is needed, and counts the commit delay from that one on. So a
// commit is not made for those that came a moment before it was due, and whose
// subscribers are about to acknowledge them.
func (j *Journal) elide() {
	j.pruneMu.Lock()
	defer j.pruneMu.Unlock()
	j.mu.Lock()
	ops := j.pending
	j.pending = nil
	j.mu.Unlock()
	kept, n, elided, size := ops[:0], 0, 0, 0
	var first time.Time
	for ; n < len(ops) && first.IsZero(); n++ {
		claims, needed := ops[n].needed()
		if needed {
			kept = append(kept, ops[n])
			if ops[n].pub != nil { // a change has a time of its own
				first = ops[n].at
			}
			continue
		}
		elided += claims
		size += ops[n].pub.size()
	}
	kept = append(kept, ops[n:]...)
	clear(ops[len(kept):])
	j.mu.Lock()
	defer j.mu.Unlock()
	if first.IsZero() && len(j.pending) > 0 {
		first = j.pending[0].at // about; the next time has it right
	}
	j.pending = append(kept, j.pending...)
	j.size -= size
	j.stats.Elided += uint64(elided)
	j.pubDue = time.Time{}
	if !first.IsZero() {
		j.pubDue = first.Add(j.commitDelay)
	}
}
