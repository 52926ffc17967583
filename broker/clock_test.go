package broker

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"penstock/storage"
)

// box is a machine of which a test sets the clocks. Time is that of the synctest
// bubble, and begins, as far as a right clock says, in November 2026.
type box struct {
	boots  int
	booted time.Time
	wrong  time.Duration // by which the wall clock is ahead
	synced bool
	blind  bool // nobody knows of boots, as in some containers
}

const boxBegins = 1794700800000 // 2026-11-15

func (m *box) boot() { m.boots, m.booted = m.boots+1, time.Now() }

// truth is what a right clock says, in Unix milliseconds.
func (m *box) truth() int64 {
	return boxBegins + time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Milliseconds()
}

func (m *box) read() MachineTime {
	r := MachineTime{Wall: m.truth() + m.wrong.Milliseconds(), Synced: m.synced}
	if !m.blind {
		r.Boot, r.Uptime = strconv.Itoa(m.boots), time.Since(m.booted).Milliseconds()
	}
	return r
}

// set sets the wall clock, by how much it is wrong.
func (m *box) set(wrong time.Duration, synced bool) { m.wrong, m.synced = wrong, synced }

// in1970 has the wall clock begin in 1970 now.
func (m *box) in1970() { m.set(-time.Duration(m.truth())*time.Millisecond, false) }

const day = 24 * time.Hour

// timeline is a clock that runs on a box, and what of it is durable.
type timeline struct {
	box
	t     *testing.T
	c     *clock
	saved *storage.Mark
	off   map[int64]int64

	on         time.Duration // for which the broker ran since old
	old, young int64         // stamps: of the first hour, and of the last start
	born       time.Duration // on, at young
}

// want compares the ages of both stamps with the time that the broker ran for,
// and for the older one the time off on top.
func (l *timeline) want(when string, off time.Duration) {
	l.t.Helper()
	now := l.c.now()
	if got, want := l.c.age(l.old, now), (l.on + off).Milliseconds(); got != want {
		l.t.Errorf("%s: a stamp of before is %v old, want %v", when, time.Duration(got)*time.Millisecond, l.on+off)
	}
	if got, want := l.c.age(l.young, now), (l.on - l.born).Milliseconds(); got != want {
		l.t.Errorf("%s: a stamp of this run is %v old, want %v", when, time.Duration(got)*time.Millisecond, l.on-l.born)
	}
}

func (l *timeline) save(stopped bool) {
	k, late, stored := l.c.mark(stopped)
	l.saved = &k
	for _, o := range late {
		l.off[o.Era] = o.MS
	}
	stored()
}

func (l *timeline) start() {
	var off []storage.TimeOff
	for era := range int64(100) {
		if ms, ok := l.off[era]; ok {
			off = append(off, storage.TimeOff{Era: era, MS: ms})
		}
	}
	l.c = newClock(l.read)
	if l.c.start(l.saved, off) {
		l.save(false)
	}
	l.young, l.born = l.c.now(), l.on
	l.run(0)
}

// run lets the broker run for d, and has it look at the clocks every second and
// at the end.
func (l *timeline) run(d time.Duration) {
	l.on += d
	for end := time.Now().Add(d); ; time.Sleep(min(time.Second, time.Until(end))) {
		if _, moved := l.c.tick(); moved {
			l.save(false)
		}
		if !time.Now().Before(end) {
			return
		}
	}
}

// restart stops the broker and starts it d later. before, if set, is what
// happens meanwhile; the machine boots if boot is set.
func (l *timeline) restart(d time.Duration, boot bool, before func()) {
	l.save(true)
	time.Sleep(d)
	if boot {
		l.boot()
	}
	if before != nil {
		before()
	}
	l.start()
}

// The time that the machine was off for is counted, once and at last; what the
// wall clock does while it is on is not; and what was given since the start does
// not grow older by it.
func TestTimeOff(t *testing.T) {
	const off = 2 * time.Hour
	// Each test goes on from a run of an hour. It returns what should have been
	// counted of the time off for a stamp of that hour.
	tests := []struct {
		name   string
		first  func(*timeline) // before the first hour; nil: a clock that is synchronised
		then   func(*timeline) time.Duration
		newEra int64 // how many eras were begun
	}{
		{"a good clock", nil, func(l *timeline) time.Duration {
			l.restart(off, true, nil)
			return off
		}, 0},
		{"from 1970, synchronised after a minute", nil, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			l.run(time.Minute)
			l.want("before the clock is set", 0)
			l.set(0, true)
			return off
		}, 1},
		{"stood still, synchronised after a minute", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(-off, false) })
			l.run(time.Minute)
			l.set(0, true)
			return off
		}, 1},
		{"stood still, synchronised after an hour", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(-off+time.Minute, false) })
			l.run(time.Hour)
			l.want("by the clock that stood still", time.Minute)
			l.set(0, true)
			return off
		}, 1},
		{"a chip and no time service", func(l *timeline) { l.set(0, false) }, func(l *timeline) time.Duration {
			l.restart(off, true, nil)
			l.run(syncGrace*time.Millisecond - 2*time.Second)
			l.want("while a time service may come", 0)
			return off
		}, 1},
		{"a chip that says 1970 until it is set by hand", func(l *timeline) { l.set(0, false) }, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			l.run(time.Hour)
			l.set(0, false)
			return off
		}, 1},
		{"a chip, and a time service once", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(0, false) })
			l.run(time.Hour)
			l.want("the first time", off)
			l.restart(off, true, nil)
			l.run(time.Hour)
			return 2 * off
		}, 2},
		{"stood still, no time service", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(-off, false) })
			return 0
		}, 1},
		{"1970 for ever", l1970, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			return 0
		}, 1},
		{"1970, then synchronised for the first time", l1970, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			l.set(0, true)
			return 0
		}, 1},
		{"1970 twice, then synchronised", nil, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			l.run(time.Minute)
			l.restart(off, true, l.in1970)
			l.run(time.Minute)
			l.set(0, true)
			return 2 * off
		}, 2},
		{"stood still twice, then synchronised", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(-off, false) })
			l.run(time.Hour)
			l.restart(off, true, func() { l.set(-2*off, false) })
			l.run(time.Hour)
			l.set(0, true)
			return 2 * off
		}, 2},
		{"forward 56 years", func(l *timeline) { l.set(-56*365*day, false) }, func(l *timeline) time.Duration {
			l.set(0, true)
			return 0
		}, 0},
		{"forward two months at the first start", func(l *timeline) { l.set(-60*day, false) }, func(l *timeline) time.Duration {
			l.set(0, true)
			return 0
		}, 0},
		{"forward two months after the first start", func(l *timeline) { l.set(-60*day, false) }, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(0, true) })
			return 0 // of these two months nobody knows how many the machine was off
		}, 0},
		{"back an hour", nil, func(l *timeline) time.Duration {
			l.set(-time.Hour, true)
			return 0
		}, 0},
		{"back an hour, then off", nil, func(l *timeline) time.Duration {
			l.set(-time.Hour, true)
			l.run(time.Minute)
			l.restart(off, true, nil)
			return off
		}, 0},
		{"forward a month, then off", nil, func(l *timeline) time.Duration {
			l.set(30*day, true)
			l.run(time.Minute)
			l.restart(off, true, nil)
			return off
		}, 0},
		{"set by hand a day ahead, off, synchronised", nil, func(l *timeline) time.Duration {
			l.set(day, false)
			l.run(time.Minute)
			l.restart(off, true, func() { l.set(0, true) })
			return off
		}, 0},
		{"two years ahead while off", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(730*day, true) })
			return 0
		}, 0},
		{"two years ahead by itself, then synchronised", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(730*day, false) })
			l.run(time.Hour)
			l.set(0, true)
			return off
		}, 1},
		{"earlier than before while off", nil, func(l *timeline) time.Duration {
			l.restart(off, true, func() { l.set(-day, true) })
			return 0
		}, 0},
		{"the process alone, with a clock that jumps a month", nil, func(l *timeline) time.Duration {
			l.restart(off, false, func() { l.set(30*day, true) })
			return off
		}, 0},
		{"the process alone, in 1970", l1970, func(l *timeline) time.Duration {
			l.restart(off, false, nil)
			return off
		}, 0},
		{"the process alone, before the clock is set", nil, func(l *timeline) time.Duration {
			l.restart(off, true, l.in1970)
			l.restart(time.Minute, false, nil)
			l.set(0, true)
			return off + time.Minute
		}, 1},
		{"a container that knows nothing", func(l *timeline) { l.blind = true; l.set(0, false) }, func(l *timeline) time.Duration {
			l.restart(off, true, nil)
			l.run(time.Hour)
			return off
		}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &timeline{t: t, off: map[int64]int64{}}
				l.boot()
				l.set(0, true)
				if tt.first != nil {
					tt.first(l)
				}
				l.start()
				l.run(time.Hour)
				l.old, l.on = l.c.now(), 0
				l.young, l.born = l.old, 0
				want := tt.then(l)
				l.run(time.Minute)
				l.want("at the end", want)
				l.run(time.Hour)
				l.want("an hour later", want)
				l.restart(0, false, nil)
				l.want("after another restart", want)
				if era := eraOf(l.c.now()) - eraOf(l.old); era != tt.newEra {
					t.Errorf("%d eras were begun, want %d", era, tt.newEra)
				}
			})
		})
	}
}

func l1970(l *timeline) { l.in1970() }

// What this machine says, read another way.
func TestMachineTime(t *testing.T) {
	before := time.Now()
	m := machineTime()()
	if d := m.Wall - before.UnixMilli(); d < 0 || d > 10_000 {
		t.Errorf("the wall clock is %d ms ahead", d)
	}
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	var seconds float64
	if _, err := fmt.Sscan(string(text), &seconds); err != nil {
		t.Fatal(err)
	}
	if d := int64(seconds*1000) - m.Uptime; len(m.Boot) != 36 || d < -100 || d > 10_000 {
		t.Errorf("boot %q, for %d ms; /proc/uptime says %s", m.Boot, m.Uptime, text)
	}
}
