package hw

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// recorded copies testdata/sys, three LEDs of an arm64 machine with gpio-leds
// in its device tree in the layout of Linux 6.1, to a place where a test may
// write.
func recorded(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	if err := os.CopyFS(root, os.DirFS("testdata/sys")); err != nil {
		t.Fatal(err)
	}
	return root
}

func content(t *testing.T, root, led, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "class/leds", led, file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func TestSysfsTakesTheTriggerOverAndRestoresIt(t *testing.T) {
	root := recorded(t)
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Backend: "sysfs", LEDs: map[string]string{"status": "status:green", "uplink": "heart:blue", "fault": "error:red"}}
		b, err := Open(cfg, Options{SysRoot: root}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		if got := content(t, root, "status:green", "trigger"); !strings.Contains(got, "[heartbeat]") {
			t.Errorf("Open changed the trigger to %q", got)
		}
		expect := func(led, file, want string) {
			t.Helper()
			if got := content(t, root, led, file); got != want {
				t.Errorf("%s of %s = %q, want %q", file, led, got, want)
			}
		}
		idle := content(t, root, "error:red", "trigger")
		play(t, b, func() {
			expect("status:green", "trigger", "none")
			expect("status:green", "brightness", "255")
			expect("heart:blue", "trigger", "none")
			expect("heart:blue", "brightness", "0")
			expect("error:red", "trigger", idle) // has none: not written
			expect("error:red", "brightness", "0")
			b.Set(UplinkUp, true)
			b.Set(StorageFault, true)
			synctest.Wait()
			expect("heart:blue", "brightness", "1") // its max_brightness
			expect("error:red", "brightness", "255")
			time.Sleep(130 * ms)
			expect("error:red", "brightness", "0")
			expect("status:green", "brightness", "0")
		})
		expect("status:green", "trigger", "heartbeat")
		expect("heart:blue", "trigger", "mmc0")
		expect("heart:blue", "brightness", "0")
		expect("error:red", "trigger", idle)
		expect("error:red", "brightness", "0")
	})
}

// With its trigger on, the kernel would overwrite the brightness.
func TestSysfsLeavesBrightnessAloneWithoutTheTrigger(t *testing.T) {
	root := recorded(t)
	l, err := openSysfs(root, "status:green")
	if err != nil {
		t.Fatal(err)
	}
	trigger := l.file("trigger")
	if err := os.Remove(trigger); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(trigger, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.Out(true); err == nil || !strings.Contains(err.Error(), "trigger") {
		t.Errorf("Out without a readable trigger: %v, want an error that names the trigger", err)
	}
	if got := content(t, root, "status:green", "brightness"); got != "0" {
		t.Errorf("brightness = %q, want it untouched (0)", got)
	}
}

func TestSysfsWithoutTriggers(t *testing.T) {
	root := recorded(t)
	l, err := openSysfs(root, "heart:blue")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"trigger", "max_brightness"} {
		if err := os.Remove(l.file(file)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Out(false); err != nil {
		t.Errorf("Out: %v", err)
	}
	if err := l.Release(); err != nil {
		t.Errorf("Release: %v", err)
	}
	if _, err := os.Stat(l.file("trigger")); !os.IsNotExist(err) {
		t.Errorf("a trigger file was created: %v", err)
	}
}

func TestSysfsLEDThatWentAway(t *testing.T) {
	root := recorded(t)
	l, err := openSysfs(root, "error:red")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(l.file("brightness")); err != nil {
		t.Fatal(err)
	}
	if err := l.Out(true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Out = %v, want %v", err, fs.ErrNotExist)
	}
	if _, err := os.Stat(l.file("brightness")); !os.IsNotExist(err) {
		t.Errorf("a file brightness was created: %v", err)
	}
}

func TestOpenSkipsWithItsReason(t *testing.T) {
	root := recorded(t)
	// An LED whose brightness cannot be written, for root neither.
	readOnly := filepath.Join(root, "class/leds/error:red/brightness")
	if err := os.Remove(readOnly); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(readOnly, 0o755); err != nil {
		t.Fatal(err)
	}
	bare := t.TempDir()
	strange := t.TempDir()
	if err := os.MkdirAll(filepath.Join(strange, "class/leds/input3::capslock"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, root string
		cfg        Config
		roles      []string
		log        []string // each a line, by what is in it
	}{
		{"auto finds usual names", root, Config{Backend: "auto"}, []string{"status"}, []string{
			"level=INFO msg=\"led found\" role=status led=status:green",
			"level=INFO msg=\"led skipped\" role=fault led=error:red because=\"open |is a directory",
		}},
		{"auto without LEDs", bare, Config{Backend: "auto"}, nil, []string{
			"level=INFO msg=\"leds skipped\" backend=auto because=\"open |class/leds: no such file or directory",
		}},
		{"auto with strange LEDs only", strange, Config{Backend: "auto"}, nil, []string{
			"level=INFO msg=\"leds skipped\" backend=auto because=\"none has a usual name|hw.leds|input3::capslock",
		}},
		{"sysfs without LEDs", bare, Config{Backend: "sysfs"}, nil, []string{
			"level=WARN msg=\"leds skipped\" backend=sysfs because=",
		}},
		{"configured and missing", root, Config{Backend: "sysfs", LEDs: map[string]string{"status": "ACT", "uplink": "heart:blue"}}, []string{"uplink"}, []string{
			"level=WARN msg=\"led skipped\" role=status led=ACT because=\"open |no such file or directory",
			"level=INFO msg=\"led found\" role=uplink led=heart:blue",
		}},
		{"periph without LEDs", root, Config{Backend: "periph"}, nil, []string{
			"level=WARN msg=\"leds skipped\" backend=periph because=\"periph.io has found no LED\"",
		}},
		{"periph, configured", root, Config{Backend: "periph", LEDs: map[string]string{"status": "no-such-led"}}, nil, []string{
			"level=WARN msg=\"led skipped\" role=status led=no-such-led because=\"sysfs-led: invalid LED name\"",
		}},
		{"off", root, Config{Backend: "off"}, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			b, err := Open(c.cfg, Options{SysRoot: c.root}, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatalf("Open: %v, want missing hardware to be no error", err)
			}
			if got := slices.Sorted(maps.Keys(b.LEDs())); !slices.Equal(got, c.roles) {
				t.Errorf("LEDs for %v, want %v", got, c.roles)
			}
			lines := strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")
			if log.Len() == 0 {
				lines = nil
			}
			if len(lines) != len(c.log) {
				t.Fatalf("%d lines in the log, want %d:\n%s", len(lines), len(c.log), log.String())
			}
			for i, want := range c.log {
				for part := range strings.SplitSeq(want, "|") {
					if !strings.Contains(lines[i], part) {
						t.Errorf("log line %q lacks %q", lines[i], part)
					}
				}
			}
		})
	}
}

func TestKnown(t *testing.T) {
	for _, c := range []struct {
		present []string
		want    map[string]string
	}{
		{nil, map[string]string{}},
		{[]string{"PWR", "ACT", "mmc0::"}, map[string]string{"status": "ACT"}},
		{[]string{"led1", "led0"}, map[string]string{"status": "led0"}},
		{[]string{"red:status", "green:status", "blue:wan", "green:lan"}, map[string]string{"status": "green:status", "uplink": "blue:wan"}},
		{[]string{"heart:blue", "error:red", "status:green"}, map[string]string{"status": "status:green", "fault": "error:red"}},
		{[]string{"gw:yellow:activity", "gw:red:fault", "gw:green:status", "gw:red:alarm"},
			map[string]string{"status": "gw:green:status", "fault": "gw:red:fault", "activity": "gw:yellow:activity"}},
		{[]string{"input3::capslock", "input3::numlock"}, map[string]string{}},
		{[]string{"error:status"}, map[string]string{"status": "error:status"}}, // fits fault too
	} {
		if got := known(c.present); !maps.Equal(got, c.want) {
			t.Errorf("known(%q) = %v, want %v", c.present, got, c.want)
		}
	}
}

func TestRecordedTreeIsAsLinuxLaysItOut(t *testing.T) {
	entries, err := os.ReadDir("testdata/sys/class/leds")
	if err != nil || len(entries) == 0 {
		t.Fatalf("no recorded LEDs: %v", err)
	}
	for _, e := range entries {
		if e.Type() != fs.ModeSymlink {
			t.Errorf("%s is %v, want a symbolic link into devices: the checkout lost it (git config core.symlinks)", e.Name(), e.Type())
		}
	}
}
