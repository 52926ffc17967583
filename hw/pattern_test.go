package hw

import (
	"testing"
	"time"
)

func TestPatternAt(t *testing.T) {
	for _, c := range []struct {
		p    Pattern
		t    time.Duration
		on   bool
		left time.Duration
	}{
		{Off, 0, false, 0},
		{Off, time.Hour, false, 0},
		{On, 0, true, 0},
		{On, time.Hour, true, 0},
		{SlowBlink, 0, true, time.Second},
		{SlowBlink, 999 * ms, true, 1 * ms},
		{SlowBlink, time.Second, false, time.Second},
		{SlowBlink, 2 * time.Second, true, time.Second},
		{FastBlink, 124 * ms, true, 1 * ms},
		{FastBlink, 125 * ms, false, 125 * ms},
		{FastBlink, 250 * ms, true, 125 * ms},
		{Heartbeat, 0, true, 80 * ms},
		{Heartbeat, 100 * ms, false, 140 * ms},
		{Heartbeat, 300 * ms, true, 20 * ms},
		{Heartbeat, 320 * ms, false, 1680 * ms},
		{Heartbeat, 1999 * ms, false, 1 * ms},
		{Heartbeat, 2000*ms*1_000_000 + 300*ms, true, 20 * ms},
		{DoubleFlash, 200 * ms, false, 200 * ms},
		{DoubleFlash, 400 * ms, true, 200 * ms},
		{DoubleFlash, 600 * ms, false, 900 * ms},
		{DoubleFlash, 1500 * ms, true, 200 * ms},
		{Flicker, 110 * ms, true, 60 * ms},
		{Flicker, 339 * ms, false, 1 * ms},
		{Flicker, 340 * ms, true, 40 * ms},
		{Under, 0, false, 0},
		{Pattern(0), time.Second, false, 0},
		{Pattern(-1), time.Second, false, 0},
		{numPatterns, time.Second, false, 0},
	} {
		on, left := c.p.At(c.t)
		if on != c.on || left != c.left {
			t.Errorf("%v.At(%v) = %v, %v, want %v, %v", c.p, c.t, on, left, c.on, c.left)
		}
	}
}

func TestPatternsAreComplete(t *testing.T) {
	names := make(map[string]Pattern)
	for p := Under; p < numPatterns; p++ {
		name, steps := patterns[p].name, patterns[p].steps
		if name == "" {
			t.Errorf("pattern %d has no name: add it to patterns in pattern.go", int(p))
		}
		if other, taken := names[name]; taken {
			t.Errorf("pattern %d is called %q as pattern %d is: rename it in pattern.go", int(p), name, int(other))
		}
		names[name] = p
		if p > On && (len(steps) == 0 || len(steps)%2 != 0) {
			t.Errorf("%v has %d steps: a pattern that blinks wants an even number, lit and dark in turn", p, len(steps))
		}
		for _, s := range steps {
			if s < 20*ms {
				t.Errorf("%v has a step of %v: below 20ms nobody sees it", p, s)
			}
		}
	}
}
