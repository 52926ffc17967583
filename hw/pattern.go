package hw

import (
	"fmt"
	"time"
)

// A Pattern is what one LED plays for as long as a state lasts. Its zero value
// is none, so that a cell forgotten in the table is found by the tests.
type Pattern int

// The patterns. Under is no light of its own: it lets the next milder state
// that is on decide, so an alarm on one LED does not make another one lie.
const (
	Under Pattern = iota + 1
	Off
	On
	SlowBlink
	FastBlink
	Heartbeat
	DoubleFlash
	Flicker
	numPatterns
)

const ms = time.Millisecond

// patterns holds for each pattern its name and its steps: lit for the first,
// dark for the second, and so on in a circle. No steps: dark and without an
// edge; one step: lit and without an edge.
var patterns = [numPatterns]struct {
	name  string
	steps []time.Duration
}{
	Under:       {name: "under"},
	Off:         {name: "off"},
	On:          {name: "on", steps: []time.Duration{time.Second}},
	SlowBlink:   {name: "slow blink", steps: []time.Duration{1000 * ms, 1000 * ms}},
	FastBlink:   {name: "fast blink", steps: []time.Duration{125 * ms, 125 * ms}},
	Heartbeat:   {name: "heartbeat", steps: []time.Duration{80 * ms, 160 * ms, 80 * ms, 1680 * ms}},
	DoubleFlash: {name: "double flash", steps: []time.Duration{200 * ms, 200 * ms, 200 * ms, 900 * ms}},
	Flicker:     {name: "flicker", steps: []time.Duration{40 * ms, 60 * ms, 70 * ms, 50 * ms, 30 * ms, 90 * ms}},
}

// At says whether the LED is lit t after the pattern began (t >= 0), and how
// long it stays so; left is 0 for a pattern without edges.
func (p Pattern) At(t time.Duration) (on bool, left time.Duration) {
	if p < 0 || p >= numPatterns {
		return false, 0
	}
	steps := patterns[p].steps
	if len(steps) < 2 {
		return len(steps) == 1, 0
	}
	var period time.Duration
	for _, s := range steps {
		period += s
	}
	t %= period
	i := 0
	for t >= steps[i] {
		t -= steps[i]
		i++
	}
	return i%2 == 0, steps[i] - t
}

// String is the name of the pattern as the status page shows it.
func (p Pattern) String() string {
	if p <= 0 || p >= numPatterns || patterns[p].name == "" {
		return fmt.Sprintf("pattern(%d)", int(p))
	}
	return patterns[p].name
}
