package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func TestLogLines(t *testing.T) {
	write := func(log *slog.Logger) {
		log.Debug("not shown")
		log.Info("client connected", "client", "a b", "level", slog.LevelWarn)
		log.Warn("no attributes")
		log.With("bridge", "up").WithGroup("tls").Error("two\nlines", "err", "x\ny", "level", 3)
	}
	tests := []struct {
		format string
		want   string
	}{
		{"journal", `<6>client connected client="a b" level=WARN
<4>no attributes
<3>"two\nlines" bridge=up tls.err="x\ny" tls.level=3
`},
		{"text", `CLOCK INFO  client connected client="a b" level=WARN
CLOCK WARN  no attributes
CLOCK ERROR "two\nlines" bridge=up tls.err="x\ny" tls.level=3
`},
		{"logfmt", `time=CLOCK level=INFO msg="client connected" client="a b" level=WARN
time=CLOCK level=WARN msg="no attributes"
time=CLOCK level=ERROR msg="two\nlines" bridge=up tls.err="x\ny" tls.level=3
`},
	}
	clock := regexp.MustCompile(`(?m)^(time=)?(\d{4}-\d\d-\d\dT)?\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d)?`)
	for _, tt := range tests {
		t.Run(tt.format, func(t *testing.T) {
			var out bytes.Buffer
			log, _ := newLogger(LogConfig{Level: "info", Format: tt.format}, &out)
			write(log)
			got := clock.ReplaceAllString(out.String(), "${1}CLOCK")
			if got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

func TestLogLevelChangesWhileRunning(t *testing.T) {
	for _, format := range []string{"text", "journal", "logfmt"} {
		var out bytes.Buffer
		log, level := newLogger(LogConfig{Level: "warn", Format: format}, &out)
		log = log.With("part", "broker") // derived before the change
		log.Info("first")
		level.Set(slog.LevelDebug)
		log.Debug("second")
		if got := out.String(); strings.Contains(got, "first") || !strings.Contains(got, "second") {
			t.Errorf("%s: got %q, want the second line alone", format, got)
		}
	}
}

func TestLogLinesAreWhole(t *testing.T) {
	var out bytes.Buffer
	log, _ := newLogger(LogConfig{Level: "info", Format: "journal"}, &out)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			log := log.With("writer", i)
			for n := range 100 {
				log.Info("line", "n", n)
			}
		})
	}
	wg.Wait()
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if got, want := len(lines), 800; got != want {
		t.Errorf("got %d lines, want %d", got, want)
	}
	whole := regexp.MustCompile(`^<6>line writer=\d n=\d+$`)
	for _, l := range lines {
		if !whole.MatchString(l) {
			t.Fatalf("broken line %q", l)
		}
	}
}

// TestErrorsInTheJournal: what ends the program has the priority of an error
// there, on every line.
func TestErrorsInTheJournal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	printError(f, errors.Join(errors.New("one"), errors.New("two")))
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if want := "<3>penstock: one\n<3>penstock: two\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDetectFormat(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	own := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	tests := []struct {
		name    string
		w       io.Writer
		journal string
		want    string
	}{
		{"the journal's stream", f, own, formatJournal},
		{"a file, variable inherited", f, own + "0", formatLogfmt},
		{"a file, no systemd", f, "", formatLogfmt},
		{"no file", new(bytes.Buffer), own, formatLogfmt},
	}
	for _, tt := range tests {
		if got := detectFormat(tt.w, tt.journal); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
