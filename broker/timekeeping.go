package broker

import (
	"sync"
	"sync/atomic"
	"time"

	"penstock/storage"
)

// How the broker's time lasts. A mark says what the clocks said; with it goes
// what has to be durable of who has been away since when. None of it is worth a
// commit each time that a client comes or goes:
//
//   - A session of which nothing is stored counts as connected until the broker
//     stopped, or until the start where nobody knows when that was. So what is
//     lost has a session expire later, not sooner.
//   - When its client comes back, what is stored is taken back before the
//     CONNACK leaves: a restart would take it for away ever since.
const (
	// markEvery is how long a mark is good while something is written, and how
	// often what has come together is stored.
	markEvery = 10 * time.Minute
	// markIdle is how long it is while nothing is.
	markIdle = time.Hour
	// markSoon is how long there is at least between two marks that are made
	// because the wall clock was set: it may be set again and again.
	markSoon = time.Minute
	// awayPart is which part of its expiry interval a client is away before that
	// is stored: 1/8. So one that comes and goes costs the flash two rows in
	// that time.
	awayPart = 8
	// awayMost is how many sessions' rows one mark takes along: the commit makes
	// acknowledgements wait. A stop has all of them.
	awayMost = 5000
)

// timekeeping is when what was last stored. All but waits and commits is
// keepTime's.
type timekeeping struct {
	mu      sync.Mutex    // held by keepTime
	marked  time.Time     // when a mark was last asked for; zero: not in this run
	moved   bool          // the wall clock was set, or time off counted, and no mark says so
	hurried time.Time     // when a mark was last asked for because of that
	waits   atomic.Bool   // that mark is not durable yet
	commits atomic.Uint64 // how many there were when it was

	first bool // the store says something of the last run that stops being true
}

// away is since when a session's client is away. It is guarded by the session's
// lock.
type away struct {
	since    int64 // stamp; 0: it is here, or about to be
	kept     int64 // the stamp that is stored, or about to be; 0: none
	presumed bool  // it was here when the last run ended
}

// expired reports whether a message's expiry interval has passed at the stamp
// now.
func (p *plane) expired(m *storage.Message, now int64) bool {
	return m.Expires != 0 && p.clock.age(m.Expires, now) >= 0
}

// mayExpire reports whether a delivery is dropped when its message expires: not
// once it was sent. After a restart, one that may have been sent is: else a
// command would be given hours after its time. Only at QoS 2 the client, if it
// was sent, would take the next message with the identifier for the same. s.mu is
// held.
func (e *entry) mayExpire() bool { return !e.tried || e.perhaps && e.qos < 2 }

// remains returns how long a message that expires has left, in milliseconds.
func (p *plane) remains(m *storage.Message) int64 { return -p.clock.age(m.Expires, p.now()) }

// due reports whether a will is to be published at the stamp now. After a
// restart clients have a while to come back, also if the time off is known only
// later.
func (p *plane) due(w *will, now int64) bool {
	return w.due != 0 && p.clock.age(w.due, now) >= 0 &&
		(w.who != nil || p.clock.age(p.clock.zero, now) >= p.cfg.WillGrace.D().Milliseconds())
}

// resumeTime sets the clock going. It returns since when clients that were
// connected are away.
func (p *plane) resumeTime(img *storage.Image) (gone int64) {
	newEra := p.clock.start(img.Mark, img.TimeOff)
	stopped := img.Mark != nil && img.Mark.Stopped
	p.keep.first = newEra || stopped || img.Mark == nil
	if stopped {
		return img.Mark.Stamp
	}
	return p.clock.zero // the mark may be an hour old, and who was here then was here longer
}

// restoredAway is the away of a session that was restored.
func restoredAway(row storage.Session, gone int64) away {
	if row.Left == 0 {
		return away{since: gone, presumed: true}
	}
	return away{since: row.Left, kept: row.Left}
}

// restoredDue is when a will that was restored is due.
func (p *plane) restoredDue(w storage.Will) int64 {
	if w.Due != 0 && p.sessions[w.ClientID] != nil {
		return w.Due
	}
	return p.clock.zero + p.cfg.WillGrace.D().Milliseconds() + int64(w.Delay)*1000
}

// firstMark stores a mark where what is stored stops being true with this run. It
// waits for it: nobody may be told anything before. A disk that fails is not
// waited for; the journal goes on trying.
func (p *plane) firstMark() {
	if p.keep.first {
		p.mark(nil, nil, false)
		_ = p.journal.Commit() // it has said so in the log
	}
}

// lastMark adds to the journal what a stop in order stores.
func (p *plane) lastMark() {
	p.clock.tick() // the wall clock may have been set since the last one
	sessions, wills := p.unkept(true)
	p.mark(sessions, wills, true)
}

// keepTime does once a second what the clocks ask for.
func (p *plane) keepTime() {
	k := &p.keep
	k.mu.Lock()
	defer k.mu.Unlock()
	counted, moved := p.clock.tick()
	if counted != 0 {
		p.log.Info("time that the machine was off is counted", "off", (time.Duration(counted) * time.Millisecond).String())
	}
	k.moved = k.moved || moved
	if k.waits.Load() {
		return
	}
	var sessions []storage.SessionID
	var wills []string
	switch last := time.Since(k.marked); {
	case k.marked.IsZero():
		k.marked = time.Now() // the start's, or the last run's, is good for now
		k.commits.Store(p.journal.Stats().Commits)
		if !k.moved {
			return
		}
		k.hurried = time.Now()
	case k.moved && (counted != 0 || time.Since(k.hurried) >= markSoon):
		k.hurried = time.Now()
	case last < markEvery:
		return
	default:
		sessions, wills = p.unkept(false)
		if last < markIdle && len(sessions)+len(wills) == 0 && p.journal.Stats().Commits == k.commits.Load() {
			return
		}
	}
	if k.moved && counted == 0 {
		p.log.Info("wall clock was set or synchronised", "now", time.Now().UTC().Format(time.RFC3339))
	}
	k.marked, k.moved = time.Now(), false
	p.mark(sessions, wills, false)
}

// mark adds a mark to the journal, and since when these sessions' clients are
// away and these wills are due, all as it is when the commit runs.
func (p *plane) mark(sessions []storage.SessionID, wills []string, stopped bool) {
	p.keep.waits.Store(true)
	var stored func()
	p.journal.Change(func(tx storage.Tx) error {
		for _, id := range sessions {
			if err := p.putLeft(tx, id); err != nil {
				return err
			}
		}
		for _, id := range wills {
			if err := p.putWillDue(tx, id); err != nil {
				return err
			}
		}
		mark, late, done := p.clock.mark(stopped)
		stored = done
		for _, off := range late {
			if err := tx.PutTimeOff(off); err != nil {
				return err
			}
		}
		return tx.PutMark(mark)
	}, storage.WaiterFunc(func() {
		stored()
		p.keep.commits.Store(p.journal.Stats().Commits)
		p.keep.waits.Store(false)
	}))
}

func (p *plane) putLeft(tx storage.Tx, id storage.SessionID) error {
	p.sessMu.Lock()
	s := p.byID[id]
	p.sessMu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	since := s.away.since
	if since != 0 {
		s.away.kept = since // so that a client that comes back now takes it back
	}
	s.mu.Unlock()
	if since == 0 {
		return nil
	}
	return tx.PutLeft(id, since)
}

func (p *plane) putWillDue(tx storage.Tx, clientID string) error {
	w, due := p.willToKeep(clientID)
	if w == nil {
		return nil
	}
	return tx.PutWillDue(clientID, due)
}

// unkept returns the sessions and the clients' wills of which it should be stored
// since when they are away and when they are due.
func (p *plane) unkept(stopping bool) (sessions []storage.SessionID, wills []string) {
	now := p.now()
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	for id, s := range p.byID {
		if !s.mu.TryLock() {
			continue // busy, so it is not away
		}
		if (stopping || len(sessions) < awayMost) && s.worthKeeping(now, stopping) {
			sessions = append(sessions, id)
		}
		s.mu.Unlock()
	}
	for id, w := range p.wills {
		if w.due != w.kept {
			wills = append(wills, id)
		}
	}
	return sessions, wills
}

// worthKeeping reports whether it should be stored since when the session's
// client is away. s.mu is held.
func (s *session) worthKeeping(now int64, stopping bool) bool {
	a := &s.away
	if s.owner != nil || a.since == 0 || a.kept == a.since || s.expiry == storage.NeverExpires {
		return false
	}
	c, least := s.plane.clock, markEvery.Milliseconds()
	if a.presumed && c.age(c.zero, now) >= least {
		return true // it does not come back by itself, and at the next restart this one is forgotten
	}
	ms := c.age(a.since, now)
	return (stopping || ms >= least) && ms*awayPart >= int64(s.expiry)*1000
}
