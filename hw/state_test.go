package hw

import (
	"testing"
)

// missing returns the cells of the table without a pattern.
func missing(table *[numStates][numRoles]Pattern) (cells [][2]string) {
	for s := range numStates {
		for r := range numRoles {
			if p := table[s][r]; p < Under || p >= numPatterns {
				cells = append(cells, [2]string{s.String(), r.String()})
			}
		}
	}
	return cells
}

func TestTableIsComplete(t *testing.T) {
	for s := range numStates {
		if stateNames[s] == "" {
			t.Errorf("state %d has no name: add it to stateNames in state.go", int(s))
		}
	}
	for r := range numRoles {
		if roleNames[r] == "" {
			t.Errorf("role %d has no name: add it to roleNames in state.go", int(r))
		}
		if len(usual[r]) == 0 {
			t.Errorf("role %q has no usual LED names: add them to usual in known.go", r)
		}
	}
	for _, cell := range missing(&table) {
		t.Errorf("table in state.go: state %q has no pattern for role %q: add it (Under where a milder state shall decide)", cell[0], cell[1])
	}
	for r := range numRoles {
		for _, s := range []State{Starting, Stopped} {
			if table[s][r] == Under {
				t.Errorf("table in state.go: state %q has Under for role %q: it must decide itself", s, r)
			}
		}
	}
}

func TestTableNamesTheMissingCell(t *testing.T) {
	holed := table
	holed[Degraded][Fault] = 0
	got := missing(&holed)
	if len(got) != 1 || got[0] != [2]string{"degraded", "fault"} {
		t.Errorf("missing cells = %v, want [[degraded fault]]", got)
	}
}

// A gateway with one LED tells the states apart by it.
func TestStatusLEDTellsStatesApart(t *testing.T) {
	seen := make(map[Pattern]State)
	for s := range numStates {
		p := table[s][Status]
		if p == Under {
			continue
		}
		if other, taken := seen[p]; taken {
			t.Errorf("states %q and %q both play %v on the status LED: give one another pattern in state.go", other, s, p)
		}
		seen[p] = s
	}
}

func TestWorstStateWins(t *testing.T) {
	set := func(list ...State) (on states) {
		for _, s := range list {
			on |= 1 << s
		}
		return on
	}
	for _, c := range []struct {
		on       states
		worst    State
		patterns [numRoles]Pattern // status, uplink, fault, activity
	}{
		{set(), Starting, [numRoles]Pattern{On, Off, Off, Off}},
		{set(Running), Running, [numRoles]Pattern{Heartbeat, Off, Off, Off}},
		{set(Running, Traffic), Running, [numRoles]Pattern{Heartbeat, Off, Off, Flicker}},
		{set(Running, UplinkUp), Running, [numRoles]Pattern{Heartbeat, On, Off, Off}},
		{set(Running, UplinkDown), UplinkDown, [numRoles]Pattern{SlowBlink, SlowBlink, Off, Off}},
		// One bridge up, one down.
		{set(Running, UplinkUp, UplinkDown), UplinkDown, [numRoles]Pattern{SlowBlink, SlowBlink, Off, Off}},
		// A worse state does not hide that the uplink is down.
		{set(Running, UplinkDown, Degraded), Degraded, [numRoles]Pattern{DoubleFlash, SlowBlink, SlowBlink, Off}},
		{set(Running, UplinkUp, Degraded, StorageFault, Traffic), StorageFault, [numRoles]Pattern{FastBlink, On, FastBlink, Flicker}},
		{set(StorageFault), StorageFault, [numRoles]Pattern{FastBlink, Off, FastBlink, Off}},
		{set(Running, UplinkUp, StorageFault, Traffic, Stopped), Stopped, [numRoles]Pattern{Off, Off, Off, Off}},
	} {
		if got := c.on.worst(); got != c.worst {
			t.Errorf("%b: worst = %v, want %v", c.on, got, c.worst)
		}
		for r := range numRoles {
			if got := c.on.pattern(r); got != c.patterns[r] {
				t.Errorf("%v: %v plays %v, want %v", c.worst, r, got, c.patterns[r])
			}
		}
	}
}
