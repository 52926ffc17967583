package hw

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	"github.com/mattn/go-isatty"
)

var _ led = (*Sim)(nil)

// Sim is a simulated LED. The zero value is dark and ready. Safe for concurrent
// use.
type Sim struct{ on atomic.Bool }

// Out lights the LED or darkens it; it never fails.
func (s *Sim) Out(on bool) error {
	s.on.Store(on)
	return nil
}

// Release darkens the LED; it never fails.
func (s *Sim) Release() error { return s.Out(false) }

// On says whether the LED is lit.
func (s *Sim) On() bool { return s.on.Load() }

// panel shows simulated LEDs as one line. It names what they play and does not
// blink: a terminal that other output goes to must not be flooded. A nil panel
// shows nothing.
type panel struct {
	w    io.Writer
	tty  bool
	last string
}

// newPanel returns nil without a writer.
func newPanel(w io.Writer) *panel {
	if w == nil {
		return nil
	}
	f, ok := w.(*os.File)
	return &panel{w: w, tty: ok && isatty.IsTerminal(f.Fd())}
}

// show writes the line if it differs from the last. Traffic comes and goes all
// the time, so it is not shown.
func (p *panel) show(on states) {
	if p == nil {
		return
	}
	on &^= 1 << Traffic
	var line strings.Builder
	fmt.Fprintf(&line, "LEDs [%s]", on.worst())
	for r := range numRoles {
		play := on.pattern(r)
		sign := "◐"
		if lit, left := play.At(0); left == 0 {
			sign = "○"
			if lit {
				sign = "●"
			}
		}
		fmt.Fprintf(&line, "  %s %s %s", sign, r, play)
	}
	if line.String() == p.last {
		return
	}
	p.last = line.String()
	if p.tty {
		// The carriage return at the end lets the next line of the log
		// overwrite this one instead of continuing it.
		fmt.Fprintf(p.w, "\r\x1b[K%s\r", p.last)
	} else {
		fmt.Fprintln(p.w, p.last)
	}
}

// close leaves the last line standing on a TTY.
func (p *panel) close() {
	if p != nil && p.tty {
		fmt.Fprintln(p.w)
	}
}
