package hw

import (
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"

	"periph.io/x/conn/v3/gpio"
)

type pin struct {
	levels []gpio.Level
	err    error
}

func (p *pin) Out(l gpio.Level) error {
	if p.err == nil {
		p.levels = append(p.levels, l)
	}
	return p.err
}

// A 1 alone would leave the LED's trigger in place.
func TestPeriphClearsTheTriggerFirst(t *testing.T) {
	p := &pin{err: errors.New("busy")}
	l := &periphLED{pin: p}
	if err := l.Out(true); !errors.Is(err, p.err) {
		t.Errorf("Out = %v, want %v", err, p.err)
	}
	p.err = nil
	for _, on := range []bool{true, false, true} {
		if err := l.Out(on); err != nil {
			t.Errorf("Out(%v) = %v", on, err)
		}
	}
	if err := l.Release(); err != nil {
		t.Errorf("Release = %v", err)
	}
	want := []gpio.Level{gpio.Low, gpio.High, gpio.Low, gpio.High, gpio.Low}
	if !slices.Equal(p.levels, want) {
		t.Errorf("levels %v, want %v", p.levels, want)
	}
}

func TestInitHost(t *testing.T) {
	for range 2 { // once more is harmless
		if err := InitHost(); err != nil {
			t.Fatalf("InitHost: %v, want a machine without hardware to be no error", err)
		}
	}
}

// What periph does to file descriptor 0, and worse.
func TestKeepStdin(t *testing.T) {
	// A file of our own as descriptor 0, so that it is told from any other.
	mine, err := os.CreateTemp(t.TempDir(), "stdin")
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	before, err := syscall.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(syscall.Dup3(before, 0, 0), syscall.Close(before)); err != nil {
			t.Errorf("giving the test its standard input back: %v", err)
		}
	}()
	if err := syscall.Dup3(int(mine.Fd()), 0, 0); err != nil {
		t.Fatal(err)
	}
	failed := errors.New("no hardware")
	for _, c := range []struct {
		name string
		f    func() error
		want error
	}{
		{"left alone", func() error { return nil }, nil},
		{"closed", func() error { return syscall.Close(0) }, nil},
		{"replaced", func() error {
			if err := syscall.Close(0); err != nil {
				return err
			}
			fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0)
			if fd != 0 {
				t.Errorf("the new file is descriptor %d, want 0", fd)
			}
			return err
		}, nil},
		{"failed", func() error { syscall.Close(0); return failed }, failed},
	} {
		if err := keepStdin(c.f); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		now, err := os.Stat("/proc/self/fd/0")
		if err != nil {
			t.Fatalf("%s: descriptor 0: %v", c.name, err)
		}
		if want, err := mine.Stat(); err != nil || !os.SameFile(now, want) {
			t.Fatalf("%s: descriptor 0 is another file now (%v)", c.name, err)
		}
	}
}
