package hw

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// led is one light. The first Out takes it over from whoever drives it;
// Release gives it back. Both are called from the goroutine of Run only.
type led interface {
	Out(on bool) error
	Release() error
}

// A Board plays the states that are on, on the LEDs that Open found. Set,
// State and LEDs may be called from any goroutine, before, while and after Run
// runs.
type Board struct {
	log    *slog.Logger
	lamps  []*lamp
	panel  *panel // nil unless simulated LEDs are shown
	on     atomic.Uint32
	change chan struct{} // holds one token when on has changed
	rounds int           // how often Run woke up
}

// lamp is an LED and what it plays.
type lamp struct {
	role    Role
	led     led
	playing Pattern
	since   time.Time // when it began to play that
	lit     bool
	sure    bool // lit is what the LED shows
	failing bool
}

func newBoard(log *slog.Logger) *Board {
	return &Board{log: log, change: make(chan struct{}, 1)}
}

func (b *Board) add(r Role, l led) { b.lamps = append(b.lamps, &lamp{role: r, led: l}) }

// Set says that s holds from now on, or no longer. For each LED the worst state
// that is on and has something to say on it wins. Set never blocks. Starting
// always holds; setting it has no effect.
func (b *Board) Set(s State, on bool) {
	if s <= Starting || s >= numStates {
		return
	}
	bit := uint32(1) << s
	if on == (b.on.Load()&bit != 0) {
		return // the broker may repeat itself; Run need not wake up for it
	}
	if on {
		b.on.Or(bit)
	} else {
		b.on.And(^bit)
	}
	select {
	case b.change <- struct{}{}:
	default:
	}
}

// State returns the worst state that is on.
func (b *Board) State() State { return states(b.on.Load()).worst() }

// LEDs returns for each role that has an LED the name of the pattern that is
// due on it. The map is the caller's.
func (b *Board) LEDs() map[string]string {
	on := states(b.on.Load())
	leds := make(map[string]string, len(b.lamps))
	for _, l := range b.lamps {
		leds[l.role.String()] = on.pattern(l.role).String()
	}
	return leds
}

// Run takes the LEDs over and plays on them until ctx ends; then it plays
// Stopped and gives them back, triggers restored. It must be called once and
// returns nil: an LED that fails is logged, once until it works again, and
// tried again whenever Run wakes up. While nothing blinks Run sleeps.
func (b *Board) Run(ctx context.Context) error {
	edge := time.NewTimer(0)
	defer edge.Stop()
	for ctx.Err() == nil {
		b.rounds++
		left := b.play()
		var wake <-chan time.Time
		if left > 0 {
			edge.Reset(left)
			wake = edge.C
		}
		select {
		case <-ctx.Done():
		case <-b.change:
		case <-wake:
		}
	}
	b.Set(Stopped, true)
	b.play()
	b.panel.close()
	for _, l := range b.lamps {
		if err := l.led.Release(); err != nil {
			b.log.Warn("led not given back", "role", l.role, "err", err)
		}
	}
	return nil
}

// play brings every LED to what is due now and returns how long that holds; 0
// means until the next Set.
func (b *Board) play() (left time.Duration) {
	now := time.Now()
	on := states(b.on.Load())
	b.panel.show(on)
	for _, l := range b.lamps {
		if p := on.pattern(l.role); p != l.playing {
			l.playing, l.since = p, now
		}
		lit, rest := l.playing.At(now.Sub(l.since))
		if rest > 0 && (left == 0 || rest < left) {
			left = rest
		}
		if l.sure && lit == l.lit {
			continue
		}
		err := l.led.Out(lit)
		l.lit, l.sure = lit, err == nil
		switch {
		case err != nil && !l.failing:
			b.log.Warn("led fails", "role", l.role, "err", err)
		case err == nil && l.failing:
			b.log.Info("led works again", "role", l.role)
		}
		l.failing = err != nil
	}
	return left
}
