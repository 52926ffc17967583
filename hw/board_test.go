package hw

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// edges is an LED that records when it was switched, since the first time. It
// fails while err is set.
type edges struct {
	start time.Time
	seen  []edge
	err   atomic.Pointer[error]
	freed bool
}

type edge struct {
	at time.Duration
	on bool
}

func (e *edges) Out(on bool) error {
	if e.start.IsZero() {
		e.start = time.Now()
	}
	if err := e.err.Load(); err != nil {
		return *err
	}
	e.seen = append(e.seen, edge{time.Since(e.start), on})
	return nil
}

func (e *edges) Release() error {
	e.freed = true
	return nil
}

// play runs the board for as long as during takes, then stops it.
func play(t *testing.T, b *Board, during func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	during()
	cancel()
	wg.Wait()
}

func TestBoardPlaysPatterns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(quiet())
		var status, uplink, fault edges
		b.add(Status, &status)
		b.add(Uplink, &uplink)
		b.add(Fault, &fault)
		play(t, b, func() {
			time.Sleep(5 * time.Second) // steady on
			b.Set(Running, true)
			time.Sleep(2300 * ms) // ends lit, in the second beat
			b.Set(Degraded, true)
			time.Sleep(900 * ms)
			b.Set(Degraded, false)
			time.Sleep(50 * ms)
		})
		want := []edge{
			{0, true},
			{5080 * ms, false}, {5240 * ms, true}, {5320 * ms, false}, {7000 * ms, true},
			{7080 * ms, false}, {7240 * ms, true},
			{7500 * ms, false}, {7700 * ms, true}, {7900 * ms, false},
			{8200 * ms, true}, {8250 * ms, false},
		}
		if !slices.Equal(status.seen, want) {
			t.Errorf("status LED\n got %v\nwant %v", status.seen, want)
		}
		if want := []edge{{0, false}}; !slices.Equal(uplink.seen, want) {
			t.Errorf("uplink LED got %v, want %v", uplink.seen, want)
		}
		if want := []edge{{0, false}, {7300 * ms, true}, {8200 * ms, false}}; !slices.Equal(fault.seen, want) {
			t.Errorf("fault LED got %v, want %v", fault.seen, want)
		}
		if !status.freed || !uplink.freed || !fault.freed {
			t.Error("Run ended without giving every LED back")
		}
	})
}

func TestBoardSleepsWhileNothingBlinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(quiet())
		b.add(Uplink, new(edges))
		b.add(Fault, new(edges))
		play(t, b, func() {
			b.Set(Running, true)
			b.Set(UplinkUp, true)
			synctest.Wait()
			for range 1000 {
				b.Set(UplinkUp, true) // nothing new
				synctest.Wait()
			}
			time.Sleep(24 * time.Hour)
		})
		// Once to begin, and once for each of the two changes.
		if b.rounds > 3 {
			t.Errorf("Run woke up %d times in a day without an edge, want 3", b.rounds)
		}
	})
}

func TestBoardWakesForEdgesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(quiet())
		b.add(Uplink, new(edges))
		b.Set(UplinkDown, true)
		<-b.change
		play(t, b, func() { time.Sleep(time.Minute + 500*ms) })
		if want := 61; b.rounds != want { // slow blink: an edge each second
			t.Errorf("Run woke up %d times in a minute, want %d", b.rounds, want)
		}
	})
}

func TestBoardWithoutLEDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(quiet())
		play(t, b, func() {
			b.Set(StorageFault, true)
			time.Sleep(time.Hour)
			if got := b.State(); got != StorageFault {
				t.Errorf("State() = %v, want %v", got, StorageFault)
			}
		})
		if b.rounds > 2 {
			t.Errorf("Run woke up %d times in an hour for no LED, want 2", b.rounds)
		}
		if got := b.State(); got != Stopped {
			t.Errorf("State() after Run = %v, want %v", got, Stopped)
		}
	})
}

func TestBoardStateAndLEDs(t *testing.T) {
	b := newBoard(quiet())
	b.add(Status, new(Sim))
	b.add(Uplink, new(Sim))
	check := func(state State, status, uplink string) {
		t.Helper()
		if got := b.State(); got != state {
			t.Errorf("State() = %v, want %v", got, state)
		}
		if got, want := b.LEDs(), map[string]string{"status": status, "uplink": uplink}; !maps.Equal(got, want) {
			t.Errorf("LEDs() = %v, want %v", got, want)
		}
	}
	check(Starting, "on", "off")
	b.Set(Starting, false) // no effect
	b.Set(State(-1), true)
	b.Set(numStates, true)
	check(Starting, "on", "off")
	b.Set(Running, true)
	b.Set(UplinkDown, true)
	check(UplinkDown, "slow blink", "slow blink")
	b.Set(UplinkDown, false)
	check(Running, "heartbeat", "off")
}

// A light that should have changed while its LED failed is made up for.
func TestBoardMakesUpForAFailedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(quiet())
		gone := errors.New("no such device")
		l := new(edges)
		b.add(Uplink, l)
		play(t, b, func() {
			l.err.Store(&gone)
			b.Set(UplinkUp, true)
			synctest.Wait()
			l.err.Store(nil)
			b.Set(Running, true) // any wake-up
			synctest.Wait()
		})
		want := []edge{{0, false}, {0, true}, {0, false}}
		if !slices.Equal(l.seen, want) {
			t.Errorf("uplink LED got %v, want %v", l.seen, want)
		}
	})
}

// Set is called from the paths that must never wait.
func TestSetNeverBlocks(t *testing.T) {
	b := newBoard(quiet())
	var wg sync.WaitGroup
	for s := Traffic; s < Stopped; s++ {
		wg.Go(func() {
			for i := range 1000 {
				b.Set(s, i%2 == 0)
			}
		})
	}
	wg.Wait() // with nobody in Run
	if got := b.State(); got != Starting {
		t.Errorf("State() = %v, want %v", got, Starting)
	}
}

func TestBoardLogsFailingLEDOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		b := newBoard(slog.New(slog.NewTextHandler(&log, nil)))
		gone := errors.New("no such device")
		l := new(edges)
		l.err.Store(&gone)
		b.add(Fault, l)
		play(t, b, func() {
			b.Set(StorageFault, true)
			time.Sleep(10*time.Second + 10*ms)
			l.err.Store(nil)
			time.Sleep(10 * time.Second)
			l.err.Store(&gone)
			time.Sleep(10 * time.Second)
		})
		for text, want := range map[string]int{"led fails": 2, "led works again": 1, "role=fault": 3} {
			if got := strings.Count(log.String(), text); got != want {
				t.Errorf("%q is in the log %d times, want %d:\n%s", text, got, want, log.String())
			}
		}
		if len(l.seen) < 79 {
			t.Errorf("the LED had %d edges in the 10s it worked, want about 80", len(l.seen))
		}
	})
}
