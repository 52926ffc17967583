// Package systemd tells the service manager how the service is: sd_notify and
// the service watchdog, and takes the sockets that it passes, without
// libsystemd. Beside it are the unit files and what they need (README.md). Outside systemd everything here does nothing.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// sendTimeout bounds how long a message may wait for room in the socket of a
// service manager that does not read.
const sendTimeout = 5 * time.Second

// Notify sends state, one or more lines "NAME=value" of sd_notify(3), to the
// service manager. Without NOTIFY_SOCKET in the environment it returns nil. It
// waits at most 5 seconds. Safe for concurrent use.
func Notify(state string) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	if socket[0] != '/' && socket[0] != '@' {
		return fmt.Errorf("notifying systemd: NOTIFY_SOCKET %q is neither a path nor an abstract socket", socket)
	}
	// Package net takes a leading @ for the abstract namespace, as systemd does.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notifying systemd: %w", err)
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("notifying systemd: %w", err)
	}
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notifying systemd: %w", err)
	}
	return nil
}

// Ready says that the service serves. Errors are those of Notify.
func Ready() error { return Notify("READY=1") }

// Stopping says that the service is about to end. Errors are those of Notify.
func Stopping() error { return Notify("STOPPING=1") }

// Status shows msg in `systemctl status`; line feeds become spaces. Errors are
// those of Notify.
func Status(msg string) error {
	return Notify("STATUS=" + strings.ReplaceAll(msg, "\n", " "))
}

// WatchdogInterval returns after how long without a sign of life systemd kills
// this process (WatchdogSec= of the unit); false if it does not watch it.
func WatchdogInterval() (time.Duration, bool) {
	usec, err := strconv.ParseUint(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec == 0 || usec > math.MaxInt64/1000 {
		return 0, false
	}
	// A child that inherited the environment is not the one that is watched.
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0, false
	}
	return time.Duration(usec) * time.Microsecond, true
}

// RunWatchdog gives systemd a sign of life every third of WatchdogInterval for
// as long as healthy returns nil; while it returns an error (or does not
// return) there is none, systemd kills the process and starts it anew, and the
// error is the unit's status until then. RunWatchdog returns nil when ctx ends,
// not before if there is no watchdog, and an error when nothing could be sent
// for a whole interval. healthy is called from the calling goroutine.
func RunWatchdog(ctx context.Context, healthy func() error) error {
	interval, ok := WatchdogInterval()
	if !ok {
		<-ctx.Done()
		return nil
	}
	return feed(ctx, interval, healthy, Notify)
}

// feed is RunWatchdog for any interval and way to notify.
func feed(ctx context.Context, interval time.Duration, healthy func() error, notify func(string) error) error {
	const tries = 3
	tick := time.NewTicker(max(interval/tries, time.Millisecond))
	defer tick.Stop()
	var failed []error // in a row
	var status string  // the last one sent on health
	for {
		state := "WATCHDOG=1"
		next := ""
		if err := healthy(); err != nil {
			next = "STATUS=unhealthy, the watchdog waits: " + strings.ReplaceAll(err.Error(), "\n", " ")
			state = next
		} else if status != "" {
			state += "\nSTATUS=healthy again"
		}
		if next == "" || next != status {
			if err := notify(state); err == nil {
				failed, status = nil, next
			} else if failed = append(failed, err); len(failed) == tries {
				return fmt.Errorf("feeding the watchdog: %w", errors.Join(failed...))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
