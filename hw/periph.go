package hw

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"periph.io/x/conn/v3/gpio"
	"periph.io/x/host/v3"
	"periph.io/x/host/v3/sysfs"
)

var _ led = (*periphLED)(nil)

// periphPin is what is used of periph's LED. Never its Read or Function: on a
// GPIO line of periph those turn an output into an input.
type periphPin interface {
	Out(gpio.Level) error
}

// periphLED drives an LED through periph.io. periph knows nothing of triggers:
// the one that was active is cleared, and not restored.
type periphLED struct {
	pin   periphPin
	taken bool
}

func periphNames() ([]string, error) {
	if len(sysfs.LEDs) == 0 {
		return nil, errors.New("periph.io has found no LED")
	}
	var names []string
	for _, l := range sysfs.LEDs {
		names = append(names, l.Name())
	}
	return names, nil
}

func openPeriph(name string) (led, error) {
	pin, err := sysfs.LEDByName(name)
	if err != nil {
		return nil, err
	}
	// Where brightness cannot be written, periph opens it for reading only and
	// says nothing until Out fails with a bad file descriptor.
	if _, err := openSysfs("/sys", name); err != nil {
		return nil, err
	}
	return &periphLED{pin: pin}, nil
}

// Out writes a 0 before anything else, which makes the kernel drop the LED's
// trigger; a 1 alone leaves it in place.
func (l *periphLED) Out(on bool) error {
	if !l.taken {
		if err := l.pin.Out(gpio.Low); err != nil {
			return err
		}
		l.taken = true
		if !on {
			return nil
		}
	}
	return l.pin.Out(gpio.Level(on))
}

// Release darkens the LED.
func (l *periphLED) Release() error { return l.pin.Out(gpio.Low) }

// InitHost lets periph.io look for its hardware, which the backend "periph"
// needs before Open; the other backends do without. Call it in main before
// anything opens a file or starts a goroutine: where a GPIO chip has two device
// nodes (Raspberry Pi OS), periph v3.8.5 closes its file twice and file
// descriptor 0 once, and what it opens next becomes descriptor 0. InitHost puts
// the old descriptor 0 back. Drivers that find nothing are no error.
func InitHost() error {
	return keepStdin(func() error {
		if _, err := host.Init(); err != nil {
			return fmt.Errorf("looking for hardware with periph.io: %w", err)
		}
		return nil
	})
}

// keepStdin runs f and repairs file descriptor 0 if f closed or replaced it.
// What f opened in its place is closed: for periph that is the file for
// exporting GPIO lines through sysfs, which nothing here uses.
func keepStdin(f func() error) error {
	held, err := syscall.Dup(0)
	if err != nil {
		return fmt.Errorf("holding file descriptor 0: %w", os.NewSyscallError("dup", err))
	}
	defer syscall.Close(held)
	syscall.CloseOnExec(held)
	err = f()
	same, statErr := sameFile(0, held)
	if statErr == nil && same {
		return err
	}
	if dupErr := syscall.Dup3(held, 0, 0); dupErr != nil {
		return errors.Join(err, fmt.Errorf("putting file descriptor 0 back: %w", os.NewSyscallError("dup3", dupErr)))
	}
	return err
}

func sameFile(a, b int) (bool, error) {
	var sa, sb syscall.Stat_t
	if err := syscall.Fstat(a, &sa); err != nil {
		return false, err
	}
	if err := syscall.Fstat(b, &sb); err != nil {
		return false, err
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino, nil
}
