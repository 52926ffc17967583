// Package hw shows the state of the gateway on its LEDs.
//
// What the LEDs say is the table in state.go, what a pattern looks like is the
// table in pattern.go; a Board plays both on LEDs of the kernel (sysfs.go), on
// LEDs through periph.io (periph.go) or on simulated ones (sim.go). Hardware
// that is missing is skipped with its reason in the log and never an error.
package hw

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
)

// Config is the section [hw] of the configuration file.
type Config struct {
	// Backend is "auto" (the LEDs in /sys/class/leds, if any fits), "sysfs"
	// (the same, and a missing LED is a warning), "periph" (through periph.io),
	// "sim" (simulated LEDs) or "off".
	Backend string `toml:"backend"`
	// LEDs gives for a role (status, uplink, fault, activity) the name of its
	// LED as in /sys/class/leds. If empty, LEDs with a usual name are taken.
	LEDs map[string]string `toml:"leds"`
}

// Options is what the program, not the configuration file, gives to Open.
type Options struct {
	// SysRoot is where sysfs is mounted; "" means /sys. The backend periph
	// knows no other place than /sys.
	SysRoot string
	// Terminal, if not nil, gets the simulated LEDs as one line: on a TTY the
	// line is rewritten when the state changes, elsewhere each change is a line
	// of its own. Only the goroutine of Board.Run writes to it.
	Terminal io.Writer
}

var backends = []string{"auto", "sysfs", "periph", "sim", "off"}

// DefaultConfig returns what holds where the configuration file says nothing.
func DefaultConfig() Config {
	return Config{Backend: "auto", LEDs: map[string]string{}}
}

// Validate checks c on its own, without looking at the hardware. Its errors
// name the key.
func (c Config) Validate() error {
	if !slices.Contains(backends, c.Backend) {
		return fmt.Errorf("hw.backend: %q is none of %s", c.Backend, strings.Join(backends, ", "))
	}
	user := make(map[string]string)
	for _, role := range slices.Sorted(maps.Keys(c.LEDs)) {
		name := c.LEDs[role]
		if !slices.Contains(roleNames[:], role) {
			return fmt.Errorf("hw.leds.%s: no such role, there are %s", role, strings.Join(roleNames[:], ", "))
		}
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return fmt.Errorf("hw.leds.%s: %q is no name of a folder in /sys/class/leds", role, name)
		}
		if other, taken := user[name]; taken {
			return fmt.Errorf("hw.leds.%s: %q is the LED of hw.leds.%s already", role, name, other)
		}
		user[name] = role
	}
	return nil
}

// Open finds the LEDs that cfg names and returns the Board to play on them. It
// changes nothing yet: Run takes the LEDs over. The error is that of
// cfg.Validate; an LED that is missing or cannot be written is logged and left
// out, down to a Board without any.
func Open(cfg Config, opt Options, log *slog.Logger) (*Board, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if opt.SysRoot == "" {
		opt.SysRoot = "/sys"
	}
	b := newBoard(log)
	level := slog.LevelWarn // a backend asked for by name should be there
	var names func() ([]string, error)
	var open func(name string) (led, error)
	switch cfg.Backend {
	case "off":
		return b, nil
	case "sim":
		b.panel = newPanel(opt.Terminal)
		for r := range numRoles {
			b.add(r, new(Sim))
		}
		return b, nil
	case "periph":
		names, open = periphNames, openPeriph
	case "auto":
		level = slog.LevelInfo
		fallthrough
	case "sysfs":
		names = func() ([]string, error) { return sysfsNames(opt.SysRoot) }
		open = func(name string) (led, error) { return openSysfs(opt.SysRoot, name) }
	}
	leds := cfg.LEDs
	if len(leds) == 0 {
		present, err := names()
		if err != nil {
			log.Log(context.Background(), level, "leds skipped", "backend", cfg.Backend, "because", err)
			return b, nil
		}
		if leds = known(present); len(leds) == 0 {
			log.Log(context.Background(), level, "leds skipped", "backend", cfg.Backend,
				"because", "none has a usual name, name them in hw.leds", "present", present)
			return b, nil
		}
	}
	for r := range numRoles {
		name, ok := leds[r.String()]
		if !ok {
			continue
		}
		l, err := open(name)
		if err != nil {
			log.Log(context.Background(), level, "led skipped", "role", r, "led", name, "because", err)
			continue
		}
		log.Info("led found", "role", r, "led", name)
		b.add(r, l)
	}
	return b, nil
}
