package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"penstock/broker"
	"penstock/hw"
)

// wearEvery is how often the flash is asked for its age, which changes in months.
const wearEvery = time.Hour

// wear remembers what the flash has said about its age.
type wear struct {
	sysRoot string // "": /sys

	mu     sync.Mutex
	said   hw.Wear
	warned time.Time
}

// get returns what the flash said last.
func (w *wear) get() hw.Wear {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said
}

// ask asks the flash that holds dir, and logs what has changed, and once a day
// what needs attention.
func (w *wear) ask(dir string, log *slog.Logger) {
	now := hw.FlashWear(w.sysRoot, dir)
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := now != w.said
	w.said = now
	switch {
	case now.Warning != "":
		if changed || time.Since(w.warned) >= 24*time.Hour {
			w.warned = time.Now()
			log.Warn("flash is near its end", "device", now.Device, "life", now.Life, "spare", now.Spare)
		}
	case changed && now.Skipped != "":
		log.Info("flash does not say its age", "device", now.Device, "why", now.Skipped)
	case changed:
		log.Info("flash says its age", "device", now.Device, "life", now.Life, "spare", now.Spare)
	}
}

// startWear asks the flash for its age now and then.
func (a *App) startWear() {
	a.wear.ask(a.cfg.Storage.Dir, a.log)
	a.parts.add("wear", func(ctx context.Context) error {
		tick := time.NewTicker(wearEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				a.wear.ask(a.cfg.Storage.Dir, a.log)
			}
		}
	}, nil)
}

// note adds to the broker's health that the flash needs attention.
func (w *wear) note(h broker.Health) broker.Health {
	if warning := w.get().Warning; warning != "" {
		h.Degraded = true
		h.Reasons = append(h.Reasons, warning)
	}
	return h
}
