package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// manager listens as systemd does and points NOTIFY_SOCKET to itself.
func manager(t *testing.T, socket string) (read func() string) {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", socket)
	return func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

func TestNotify(t *testing.T) {
	for name, socket := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": fmt.Sprintf("@penstock-test-%d", os.Getpid()),
	} {
		t.Run(name, func(t *testing.T) {
			read := manager(t, socket)
			for _, c := range []struct {
				send func() error
				want string
			}{
				{Ready, "READY=1"},
				{Stopping, "STOPPING=1"},
				{func() error { return Status("2 clients,\n3 sessions") }, "STATUS=2 clients, 3 sessions"},
				{func() error { return Notify("READY=1\nSTATUS=up") }, "READY=1\nSTATUS=up"},
			} {
				if err := c.send(); err != nil {
					t.Errorf("sending %q: %v", c.want, err)
					continue
				}
				if got := read(); got != c.want {
					t.Errorf("systemd got %q, want %q", got, c.want)
				}
			}
		})
	}
}

func TestNotifyWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready(); err != nil {
		t.Errorf("Ready() = %v, want nil", err)
	}
	for socket, want := range map[string]string{
		filepath.Join(t.TempDir(), "gone"): "no such file",
		"vsock:2:1234":                     "neither a path nor an abstract socket",
	} {
		t.Setenv("NOTIFY_SOCKET", socket)
		err := Ready()
		if err == nil || !strings.HasPrefix(err.Error(), "notifying systemd: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("Ready() to %q = %v, want %q", socket, err, want)
		}
	}
}

func TestWatchdogInterval(t *testing.T) {
	self := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"90000000", self, 90 * time.Second},
		{"1500000", "", 1500 * time.Millisecond},
		{"90000000", "1", 0},
		{"90000000", "x", 0},
		{"", self, 0},
		{"0", self, 0},
		{"-1", self, 0},
		{"soon", self, 0},
		{"9223372036854775", self, 9223372036854775 * time.Microsecond},
		{"9223372036854776", self, 0},     // more than a Duration holds
		{"18446744073709551615", self, 0}, // WatchdogSec=infinity
	} {
		t.Setenv("WATCHDOG_USEC", c.usec)
		t.Setenv("WATCHDOG_PID", c.pid)
		got, ok := WatchdogInterval()
		if got != c.want || ok != (c.want > 0) {
			t.Errorf("WATCHDOG_USEC=%s WATCHDOG_PID=%s: %v, %v, want %v", c.usec, c.pid, got, ok, c.want)
		}
	}
}

func TestRunWatchdog(t *testing.T) {
	read := manager(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("WATCHDOG_USEC", "3000") // a sign of life every millisecond
	t.Setenv("WATCHDOG_PID", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- RunWatchdog(ctx, func() error { return nil }) }()
	for range 3 {
		if got := read(); got != "WATCHDOG=1" {
			t.Errorf("systemd got %q, want WATCHDOG=1", got)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("RunWatchdog = %v, want nil", err)
	}
}

func TestRunWatchdogWithoutSystemd(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		err := RunWatchdog(ctx, func() error { t.Error("healthy was asked for nobody"); return nil })
		if got := time.Since(start); err != nil || got != time.Hour {
			t.Errorf("RunWatchdog returned %v after %v, want nil when its context ended", err, got)
		}
	})
}

func TestWatchdogIsFedWhileHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 95*time.Second)
		defer cancel()
		healthy := func() error { // stuck from 25s on, well again from 65s on
			if since := time.Since(start); since > 25*time.Second && since < 65*time.Second {
				return errors.New("journal:\nstuck")
			}
			return nil
		}
		var got []string
		err := feed(ctx, 30*time.Second, healthy, func(state string) error {
			got = append(got, fmt.Sprintf("%v %s", time.Since(start), state))
			return nil
		})
		if err != nil {
			t.Errorf("feed = %v, want nil", err)
		}
		want := []string{
			"0s WATCHDOG=1",
			"10s WATCHDOG=1",
			"20s WATCHDOG=1",
			"30s STATUS=unhealthy, the watchdog waits: journal: stuck",
			"1m10s WATCHDOG=1\nSTATUS=healthy again",
			"1m20s WATCHDOG=1",
			"1m30s WATCHDOG=1",
		}
		if !slices.Equal(got, want) {
			t.Errorf("systemd got\n%q, want\n%q", got, want)
		}
	})
}

func TestWatchdogSurvivesALostDatagram(t *testing.T) {
	lost := errors.New("no buffer space")
	for _, c := range []struct {
		name string
		lose func(n int) bool // of the nth datagram, from 1
		sent int
		want error
	}{
		{"two in a row, then one", func(n int) bool { return n != 3 && n < 5 }, 10, nil},
		{"a whole interval", func(n int) bool { return n > 1 }, 4, lost},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 95*time.Second)
			defer cancel()
			n := 0
			err := feed(ctx, 30*time.Second, func() error { return nil }, func(string) error {
				n++
				if c.lose(n) {
					return lost
				}
				return nil
			})
			if !errors.Is(err, c.want) || n != c.sent {
				t.Errorf("%s: %d sent, then %v, want %d, %v", c.name, n, err, c.sent, c.want)
			}
		})
	}
}
