package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"penstock/broker"
)

// What the flash says is logged when it changes; that it is near its end, once a
// day.
func TestWearIsLogged(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(root, "devices/mmc0/block/mmcblk0/device")
	number := fmt.Sprintf("%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
	for _, d := range []string{device, filepath.Join(root, "dev/block")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../../devices/mmc0/block/mmcblk0", filepath.Join(root, "dev/block", number)); err != nil {
		t.Fatal(err)
	}
	life := func(value string) {
		if err := os.WriteFile(filepath.Join(device, "life_time"), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		w := wear{sysRoot: root}
		check := func(when, want string, times int) {
			t.Helper()
			w.ask(dir, slog.New(slog.NewTextHandler(&text, nil)))
			if got := strings.Count(text.String(), want); got != times {
				t.Errorf("%s: %q was logged %d times, want %d:\n%s", when, want, got, times, &text)
			}
		}
		check("without life_time", "flash does not say its age", 1)
		check("again", "flash does not say its age", 1)
		life("0x01 0x01\n")
		check("new", "flash says its age", 1)
		check("again", "flash says its age", 1)
		if h := w.note(broker.Health{Ready: true}); h.Degraded || len(h.Reasons) > 0 {
			t.Errorf("a new flash makes it %+v", h)
		}
		life("0x09 0x01\n")
		check("old", "flash is near its end", 1)
		if got := w.get(); got.Used != 90 || got.Warning == "" {
			t.Errorf("got %+v, want 90 %% and a warning", got)
		}
		if h := w.note(broker.Health{Ready: true}); !h.Ready || !h.Degraded || len(h.Reasons) != 1 {
			t.Errorf("an old flash makes it %+v", h)
		}
		time.Sleep(23 * time.Hour)
		check("on the same day", "flash is near its end", 1)
		time.Sleep(time.Hour)
		check("a day later", "flash is near its end", 2)
	})
}
