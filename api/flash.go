package api

import "penstock/storage"

// Wear is what the flash that holds the data directory says about its own age.
type Wear struct {
	Device      string // as the kernel calls it; empty if it has none
	Skipped     string // why nothing is known; the rest but Warning is empty then
	Used        int    // of its life, percent
	Life, Spare string // the same in words, and what it says of its blocks in reserve
	Warning     string // what needs attention; empty if nothing does
}

type flashJSON struct {
	Bytes        uint64            `json:"bytes"` // since the database was made
	BytesToday   uint64            `json:"bytes_today"`
	ByCause      map[string]uint64 `json:"by_cause"`
	ByCauseToday map[string]uint64 `json:"by_cause_today"`
	WeekAverage  uint64            `json:"week_average"` // bytes a day
	WeekDays     int64             `json:"week_days"`    // whole days that it is the average of
	LogBytes     int64             `json:"log_bytes"`
	Budget       uint64            `json:"budget"`      // bytes a day; 0: none
	BudgetUsed   float64           `json:"budget_used"` // share of it; 0 without one
	Stretch      float64           `json:"stretch"`
	Wear         *wearJSON         `json:"wear"` // null if nobody asks the flash
}

type wearJSON struct {
	Device  string `json:"device"`
	Used    int    `json:"used_percent"`
	Life    string `json:"life"`
	Spare   string `json:"spare"`
	Skipped string `json:"skipped"`
	Warning string `json:"warning"`
}

// wear returns what the flash says of itself, nil if nobody asks it.
func (s *Server) wear() *Wear {
	if s.deps.Wear == nil {
		return nil
	}
	w := s.deps.Wear()
	return &w
}

func newFlashJSON(f storage.FlashStats, w *Wear) flashJSON {
	j := flashJSON{
		Bytes: sum(f.Total), BytesToday: sum(f.Today), ByCause: f.Total, ByCauseToday: f.Today,
		WeekAverage: f.WeekAverage, WeekDays: f.WeekDays, LogBytes: f.LogBytes, Budget: f.Budget, Stretch: f.Stretch,
	}
	if f.Budget > 0 {
		j.BudgetUsed = float64(j.BytesToday) / float64(f.Budget)
	}
	if w != nil {
		j.Wear = &wearJSON{w.Device, w.Used, w.Life, w.Spare, w.Skipped, w.Warning}
	}
	return j
}

func sum(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}
