package broker

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"penstock/storage"
)

// The broker's time. A gateway has no clock chip: its wall clock may start in
// 1970 and jump, and what waits for a client must not expire because of that. So
// whatever expires is measured in stamps: milliseconds that go forward at the
// rate of the monotonic clock, whatever the wall clock does, and go on after a
// restart where they were. The time that the machine was off for comes on top,
// once, when a clock can tell how long that was.
//
// That may be when stamps have been given since the start, which are not to
// grow older by it. So a stamp also has an era, in the bits above its
// milliseconds. A boot of the machine begins a new era, unless the time off is
// known at its start. Time off that is counted later is kept with the era before
// which it was: the time now never jumps, earlier stamps become older.

// eraShift is where the era begins in a stamp. The bits below are good for 500
// years of milliseconds, from 1970 in a database that began on a good clock.
const eraShift = 44

func millisOf(stamp int64) int64 { return stamp & (1<<eraShift - 1) }
func eraOf(stamp int64) int64    { return stamp >> eraShift }

const (
	// firstRelease is a time at which this program did not exist, 2026-01-01 in
	// Unix milliseconds: a clock that says less is wrong.
	firstRelease = 1767225600000
	// lastSane is a hundred years later.
	lastSane = firstRelease + 100*365*24*3600e3
	// maxTimeOff is the longest time off that is believed, a year: behind more
	// is a clock that was wrong.
	maxTimeOff = 365 * 24 * 3600e3
	// syncGrace is how long after a boot a time service may take, 10 minutes,
	// before a clock that nobody vouches for is asked for the time off.
	syncGrace = 600e3
	// clockStep is by how much the wall clock and the broker's time must part,
	// 2 s, for the clock to have been set. Less is the correction of a drift.
	clockStep = 2000
)

// sane reports whether a wall clock may be right.
func sane(wall int64) bool { return wall >= firstRelease && wall < lastSane }

// clock is the broker's time. Its methods are safe for concurrent use, but for
// start.
type clock struct {
	read  func() MachineTime
	began time.Time // the start of this run
	zero  int64     // its stamp
	off   atomic.Pointer[timesOff]

	mu     sync.Mutex // also held while off is changed
	rel    relation
	stored *timesOff // what is durable of off
}

// newClock returns a clock as of a new installation.
func newClock(read func() MachineTime) *clock {
	c := &clock{read: read}
	c.start(nil, nil)
	return c
}

// start sets the clock going from what was durable. It reports whether stamps of
// a new era are given from now on; then a mark must be durable before the first
// of them is.
func (c *clock) start(mark *storage.Mark, off []storage.TimeOff) (newEra bool) {
	m := c.read()
	c.began = time.Now()
	c.zero, c.rel = resume(mark, m)
	c.stored = sumTimesOff(off)
	c.off.Store(c.stored)
	return mark != nil && eraOf(c.zero) != eraOf(mark.Stamp)
}

// now returns the stamp of this moment.
func (c *clock) now() int64 { return c.at(time.Now()) }

// at returns the stamp of a moment of this run, which has a monotonic reading.
func (c *clock) at(t time.Time) int64 { return c.zero + t.Sub(c.began).Milliseconds() }

// age returns how long ago, at the stamp now, that of another one was, in
// milliseconds; below 0 it is still to come. now is not of an earlier era.
func (c *clock) age(stamp, now int64) int64 {
	d := millisOf(now) - millisOf(stamp)
	if from := eraOf(stamp); from != eraOf(now) {
		d += c.off.Load().after(from)
	}
	return d
}

// tick compares the clocks, and counts time off as soon as one can tell it. It
// returns how much it has counted, in milliseconds, and whether a mark is to be
// made soon: time off was counted, or the wall clock was set. It is called about
// once a second.
func (c *clock) tick() (counted int64, moved bool) {
	m, now := c.read(), c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	before, counted, moved := c.rel.observe(now, max(m.Uptime, now-c.zero), m)
	if counted != 0 {
		c.off.Store(c.off.Load().add(before, counted))
	}
	return counted, moved
}

// mark returns what a start can go on from, and the time off that is to be
// durable together with it: one without the other would count it twice, or not
// at all. When both are, stored is called.
func (c *clock) mark(stopped bool) (_ storage.Mark, late []storage.TimeOff, stored func()) {
	m, now := c.read(), c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	k := storage.Mark{Stamp: now, OwedFrom: c.rel.owedFrom, Guessed: c.rel.guessed, Boot: m.Boot, Uptime: m.Uptime, Stopped: stopped}
	if c.rel.wall.known {
		k.Wall = millisOf(now) + c.rel.wall.ahead
	}
	if c.rel.true.known {
		k.True = millisOf(now) + c.rel.true.ahead
	}
	off := c.off.Load()
	for _, o := range off.each {
		if c.stored.of(o.Era) != o.MS {
			late = append(late, o)
		}
	}
	return k, late, func() {
		c.mu.Lock()
		c.stored = off
		c.mu.Unlock()
	}
}

// line is how far a clock is ahead of the broker's time.
type line struct {
	known bool
	ahead int64 // milliseconds
}

// relation is how the wall clock and the broker's time belong together. It is
// about this boot of the machine, and about what may have to be counted of the
// time before.
type relation struct {
	// wall is what the wall clock says, and true what it would say since the
	// kernel last vouched for it. As long as time off is to be counted by one of
	// them, that one is as it was before, so that what is too much is the time
	// off.
	wall, true line
	owedFrom   int64 // era before which there may be time off not counted yet; 0: there is none
	guessed    bool  // no more is counted by a clock that nobody vouches for, until the next boot
}

// resume returns the stamp of a start and the relation to begin with. mark is
// what was durable last; nil in a new database, and in one that had no marks
// yet, whose stamps are Unix milliseconds.
func resume(mark *storage.Mark, m MachineTime) (int64, relation) {
	if mark == nil {
		if !sane(m.Wall) {
			return firstRelease, relation{guessed: true}
		}
		r := relation{guessed: true, wall: line{known: true}}
		if m.Synced {
			r.true = r.wall
		}
		return m.Wall, r
	}
	ms := millisOf(mark.Stamp)
	r := relation{wall: line{mark.Wall != 0, mark.Wall - ms}, true: line{mark.True != 0, mark.True - ms}, owedFrom: mark.OwedFrom, guessed: mark.Guessed}
	if m.Boot != "" && m.Boot == mark.Boot && m.Uptime >= mark.Uptime {
		// The machine was on: its uptime says how long the broker was not,
		// whatever the wall clock says.
		return mark.Stamp + m.Uptime - mark.Uptime, r
	}
	r.guessed = false
	stamp := mark.Stamp
	if next := eraOf(stamp) + 1; r.owedFrom == 0 {
		r.owedFrom = next
		if _, off, _ := r.observe(stamp, 0, m); r.owedFrom == 0 {
			return stamp + off, r // known at once
		}
	}
	if next := eraOf(stamp) + 1; next<<eraShift > 0 { // or they are used up, and nothing that comes late is counted
		stamp = next<<eraShift | ms
	}
	return stamp, r
}

// observe compares the clocks at the stamp now, uptime milliseconds after the
// boot. It returns time off that is to be counted, in milliseconds, with the era
// before which it was, and whether the wall clock was set.
//
// A clock that the kernel vouches for decides, as long as one has also been
// vouched for before the machine went off; otherwise the clock may have been set
// in between. Where there is none until syncGrace has passed, the clock that is
// there is believed for this boot, for it may be that of a gateway that has a
// clock chip and no time service; what it missed, as one that stood still while
// the machine was off, is counted when one comes that is vouched for.
func (r *relation) observe(now, uptime int64, m MachineTime) (before, off int64, moved bool) {
	if !sane(m.Wall) {
		if moved = r.guessed && r.wall.known; moved {
			r.wall = line{}
		}
		return 0, 0, moved
	}
	seen := line{true, m.Wall - millisOf(now)}
	switch {
	case m.Synced:
		if r.owedFrom != 0 {
			before, off = r.owedFrom, timeOff(r.true, seen)
		}
		moved = !r.guessed || r.owedFrom != 0 || !r.true.known || r.wall.parted(seen)
		if eraOf(now) < r.owedFrom { // before the first stamp of a new era: the time itself goes on
			seen.ahead -= off
		}
		*r = relation{wall: seen, true: seen, guessed: true}
	case r.guessed:
		if moved = r.wall.parted(seen); moved {
			r.wall = seen
		}
	case uptime >= syncGrace:
		before, off = eraOf(now), timeOff(r.wall, seen)
		r.true.ahead += off
		r.wall, r.guessed, moved = seen, true, true
		if !r.true.known {
			r.owedFrom = 0
		}
	}
	return before, off, moved
}

// parted reports whether the clock was set since l was taken.
func (l line) parted(seen line) bool {
	d := seen.ahead - l.ahead
	return !l.known || d >= clockStep || d <= -clockStep
}

// timeOff returns for how long the machine was off, by what a clock is ahead now
// of what it was before.
func timeOff(before, seen line) int64 {
	off := seen.ahead - before.ahead
	if !before.known || off < 0 || off > maxTimeOff {
		return 0
	}
	return off
}

// timesOff is time off that was counted late, ascending by era. It is immutable.
type timesOff struct {
	each []storage.TimeOff
	sums []int64 // of each and what comes behind it
}

func sumTimesOff(each []storage.TimeOff) *timesOff {
	t := &timesOff{each: each, sums: make([]int64, len(each))}
	sum := int64(0)
	for i := len(each) - 1; i >= 0; i-- {
		sum += each[i].MS
		t.sums[i] = sum
	}
	return t
}

// find returns the index of the first one of an era or later.
func (t *timesOff) find(era int64) int {
	i, _ := slices.BinarySearchFunc(t.each, era, func(o storage.TimeOff, era int64) int { return cmp.Compare(o.Era, era) })
	return i
}

// after returns the sum of those of later eras, in milliseconds: how much longer
// ago the stamps of an era are.
func (t *timesOff) after(era int64) int64 {
	if i := t.find(era + 1); i < len(t.sums) {
		return t.sums[i]
	}
	return 0
}

// of returns that of an era, in milliseconds.
func (t *timesOff) of(era int64) int64 {
	if i := t.find(era); i < len(t.each) && t.each[i].Era == era {
		return t.each[i].MS
	}
	return 0
}

// add returns t with more in one era.
func (t *timesOff) add(era, ms int64) *timesOff {
	each := slices.Clone(t.each)
	i := t.find(era)
	if i == len(each) || each[i].Era != era {
		each = slices.Insert(each, i, storage.TimeOff{Era: era})
	}
	each[i].MS += ms
	return sumTimesOff(each)
}
