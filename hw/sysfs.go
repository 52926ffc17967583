package hw

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

var _ led = (*sysfsLED)(nil)

// sysfsLED is an LED of the kernel's LED class, a folder with the files
// brightness, max_brightness and trigger. Its files are opened anew for each
// access, so a driver that is bound again costs one failed write.
type sysfsLED struct {
	dir     string
	full    string // what to write to brightness to light it
	taken   bool
	trigger string // what drove it before, "" if nothing did
}

// sysfsNames lists the LEDs there are.
func sysfsNames(root string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(root, "class/leds"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// openSysfs returns the LED of that name if it can be driven. It changes
// nothing.
func openSysfs(root, name string) (*sysfsLED, error) {
	l := &sysfsLED{dir: filepath.Join(root, "class/leds", name), full: "255"}
	f, err := os.OpenFile(l.file("brightness"), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	f.Close()
	if text, err := os.ReadFile(l.file("max_brightness")); err == nil {
		l.full = strings.TrimSpace(string(text))
	}
	return l, nil
}

func (l *sysfsLED) file(name string) string { return filepath.Join(l.dir, name) }

// write must not create the file: in sysfs it can't, and in a tree of a test
// that would hide a wrong path.
func (l *sysfsLED) write(name, value string) error {
	f, err := os.OpenFile(l.file(name), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// Out lights or darkens the LED. The first one puts the kernel's trigger off:
// brightness alone would be overwritten by it at once.
func (l *sysfsLED) Out(on bool) error {
	if !l.taken {
		trigger, err := l.active()
		if err != nil {
			return fmt.Errorf("reading the trigger: %w", err)
		}
		if trigger != "" {
			if err := l.write("trigger", "none"); err != nil {
				return fmt.Errorf("putting the trigger off: %w", err)
			}
		}
		l.taken, l.trigger = true, trigger
	}
	value := "0"
	if on {
		value = l.full
	}
	return l.write("brightness", value)
}

// Release restores the trigger that drove the LED before; without one the LED
// stays as the last Out left it.
func (l *sysfsLED) Release() error {
	if l.trigger == "" {
		return nil
	}
	if err := l.write("trigger", l.trigger); err != nil {
		return fmt.Errorf("restoring the trigger: %w", err)
	}
	l.taken, l.trigger = false, ""
	return nil
}

// active returns the trigger in brackets, "" for none or a kernel without
// triggers.
func (l *sysfsLED) active() (string, error) {
	text, err := os.ReadFile(l.file("trigger"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(text), "[")
	name, _, _ := strings.Cut(rest, "]")
	if name == "none" {
		return "", nil
	}
	return name, nil
}
