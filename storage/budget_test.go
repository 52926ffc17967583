package storage

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestStretch(t *testing.T) {
	const budget = 2400
	for _, tt := range []struct {
		used  uint64
		ofDay float64
		want  float64
	}{
		{0, 0, 1},
		{100, 0, 1}, // the share of the first hour
		{200, 0, 2},
		{200, 1.0 / 12, 1},
		{1200, 0.5, 1},
		{1800, 0.5, 1.5},
		{2400, 0.999999, 1},
		{100000, 0.5, maxStretch},
	} {
		if got := stretch(tt.used, budget, tt.ofDay); got < tt.want-1e-5 || got > tt.want+1e-5 {
			t.Errorf("%d of %d bytes after %.2f of the day: got %f, want %f", tt.used, budget, tt.ofDay, got, tt.want)
		}
	}
}

// The budget puts off what can wait, by as much as it asks for, and nothing that
// anybody waits for. It is said once a day that it is used up.
func TestBudgetPutsOffWhatCanWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)))
		var text bytes.Buffer
		m := newFlashMeter("", 1<<20, slog.New(slog.NewTextHandler(&text, nil)))
		write := func(n uint64) {
			m.mu.Lock()
			m.add(flashBytes{causeQueue: n})
			m.mu.Unlock()
		}
		due := func(mark func(*Journal)) time.Duration {
			j := NewJournal(nil, DefaultConfig(), slog.New(slog.DiscardHandler))
			j.flash = m
			mark(j)
			return j.wait()
		}
		check := func(what string, factor time.Duration) {
			t.Helper()
			cfg := DefaultConfig()
			for _, tt := range []struct {
				name string
				mark func(*Journal)
				want time.Duration
			}{
				{"a cursor", func(j *Journal) { j.MarkProgress(1, nil) }, factor * lazyDelay},
				{"a deleted segment", func(j *Journal) { j.drop(&Segment{id: 1}) }, factor * lazyDelay},
				{"a retained message of QoS 0", func(j *Journal) { j.MarkRetained("t") }, factor * cfg.RetainFlush.D()},
				{"progress that somebody waits for", func(j *Journal) { j.MarkProgress(1, WaiterFunc(func() {})) }, cfg.CommitDelay.D()},
				{"a change", func(j *Journal) { j.Change(func(Tx) error { return nil }, nil) }, cfg.CommitDelay.D()},
				{"a publication", func(j *Journal) { j.Publish(&Publication{}) }, cfg.CommitDelay.D()},
				{"a retained message that is waited for", func(j *Journal) { j.MarkRetained("t"); j.HurryRetained("t") }, cfg.CommitDelay.D()},
			} {
				if got := due(tt.mark); got != tt.want {
					t.Errorf("%s: %s is written after %s, want %s", what, tt.name, got, tt.want)
				}
			}
		}
		j := &Journal{flash: m}
		write(512 << 10)
		check("at noon, half of it is used", 1)
		write(1 << 20)
		check("three times as much", 3)
		write(1 << 30)
		check("far more", maxStretch)
		if got := strings.Count(text.String(), "flash budget of the day is used up"); got != 1 {
			t.Errorf("it was said %d times, want once:\n%s", got, &text)
		}
		if got := j.FlashWarning(); !strings.HasPrefix(got, "flash: ") {
			t.Errorf("the warning is %q", got)
		}
		time.Sleep(24 * time.Hour)
		if got := j.FlashWarning(); got != "" {
			t.Errorf("a day later the warning is %q", got)
		}
		write(1)
		check("a day later", 1)
		write(2 << 20)
		if got := strings.Count(text.String(), "flash budget of the day is used up"); got != 2 {
			t.Errorf("it was said %d times in two days, want twice", got)
		}
	})
}
