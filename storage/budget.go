package storage

import "time"

// maxStretch bounds by how much a day's budget puts off writes that can wait.
const maxStretch = 8

// stretch returns by how much writes that can wait are put off: by as much as
// was written more than the day's share of the budget up to now. The first hour
// has the share of an hour: a start writes more than it will.
func stretch(used, budget uint64, ofDay float64) float64 {
	share := float64(budget) * max(ofDay, 1.0/24)
	return min(max(float64(used)/share, 1), maxStretch)
}

// ofDay returns how much of the running day is over, 0 to 1. m.mu is held.
func (m *flashMeter) ofDay(now time.Time) float64 {
	if m.day == unknownDay {
		return now.Sub(m.began).Hours() / 24
	}
	return float64(now.Unix()%86400) / 86400
}

// stretched returns a delay of a write that can wait, longer by what the budget
// asks for. Nothing that anybody waits for may be delayed by it.
func (j *Journal) stretched(d time.Duration) time.Duration {
	if j.flash == nil {
		return d
	}
	return d * time.Duration(j.flash.stretch.Load()) / 1000
}

// FlashWarning returns what needs attention about the flash, for people; it is
// empty if nothing does.
func (j *Journal) FlashWarning() string {
	m := j.flash
	if m == nil {
		return ""
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turn(time.Now())
	if !m.over {
		return ""
	}
	return "flash: more was written today than storage.daily_budget has"
}
