package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"github.com/mattn/go-isatty"
)

// LogConfig is the section [log] of the configuration file.
type LogConfig struct {
	Level  string `toml:"level"`  // "debug", "info", "warn" or "error"; the API can change it while the broker runs
	Format string `toml:"format"` // "auto", "text", "journal" or "logfmt"
}

// DefaultLogConfig returns the section as it is without a file.
func DefaultLogConfig() LogConfig { return LogConfig{Level: "info", Format: formatAuto} }

// The forms of a log line.
const (
	formatAuto    = "auto"    // text on a terminal, journal under systemd, logfmt elsewhere
	formatText    = "text"    // 15:04:05.000 INFO  message key=value
	formatJournal = "journal" // <6>message key=value; journald has the time and reads the priority
	formatLogfmt  = "logfmt"  // time=… level=INFO msg=message key=value
)

var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

// Validate returns an error that names the key, or nil.
func (c LogConfig) Validate() error {
	if _, ok := logLevels[c.Level]; !ok {
		return fmt.Errorf("log.level: %q is no level: write debug, info, warn or error", c.Level)
	}
	switch c.Format {
	case formatAuto, formatText, formatJournal, formatLogfmt:
		return nil
	}
	return fmt.Errorf("log.format: %q is no format: write auto, text, journal or logfmt", c.Format)
}

// newLogger returns a logger that writes to w as cfg says, and the variable
// that changes its level while it is in use. cfg must be valid.
func newLogger(cfg LogConfig, w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := new(slog.LevelVar)
	level.Set(logLevels[cfg.Level])
	format := cfg.Format
	if format == formatAuto {
		format = detectFormat(w, os.Getenv("JOURNAL_STREAM"))
	}
	if format == formatLogfmt {
		return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})), level
	}
	return slog.New(newLineHandler(w, level, format == formatJournal)), level
}

// detectFormat chooses the form of the lines for w. journal is the value of
// JOURNAL_STREAM, "device:inode" of the stream that systemd handed over. It is
// compared with w, for every child of a service inherits the variable,
// also one whose output goes somewhere else.
func detectFormat(w io.Writer, journal string) string {
	f, ok := w.(*os.File)
	if !ok {
		return formatLogfmt
	}
	if isTerminal(f) {
		return formatText
	}
	var st syscall.Stat_t
	if syscall.Fstat(int(f.Fd()), &st) == nil && journal == fmt.Sprintf("%d:%d", st.Dev, st.Ino) {
		return formatJournal
	}
	return formatLogfmt
}

// isTerminal reports whether w is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// lineHandler writes a head and the message, and leaves the attributes to
// slog's own text handler.
type lineHandler struct {
	out     *lineOutput
	journal bool
	attrs   slog.Handler // writes to out.attrs
}

// lineOutput is shared by a handler and all that were derived from it.
type lineOutput struct {
	mu          sync.Mutex
	line, attrs bytes.Buffer
	w           io.Writer
}

func newLineHandler(w io.Writer, level slog.Leveler, journal bool) *lineHandler {
	out := &lineOutput{w: w}
	return &lineHandler{out: out, journal: journal, attrs: slog.NewTextHandler(&out.attrs, &slog.HandlerOptions{Level: level})}
}

// Enabled implements slog.Handler.
func (h *lineHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.attrs.Enabled(ctx, level)
}

// WithAttrs implements slog.Handler.
func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &lineHandler{out: h.out, journal: h.journal, attrs: h.attrs.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h *lineHandler) WithGroup(name string) slog.Handler {
	return &lineHandler{out: h.out, journal: h.journal, attrs: h.attrs.WithGroup(name)}
}

// Handle implements slog.Handler.
func (h *lineHandler) Handle(ctx context.Context, r slog.Record) error {
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	line, attrs := &h.out.line, &h.out.attrs
	line.Reset()
	attrs.Reset()
	if h.journal {
		fmt.Fprintf(line, "<%d>", priority(r.Level))
	} else {
		fmt.Fprintf(line, "%s %-5s ", r.Time.Format("15:04:05.000"), r.Level)
	}
	line.WriteString(oneLine(r.Message))
	// Without time and message slog's own handler writes this before the
	// attributes; a ReplaceAttr that drops it would drop an attribute
	// named "level" too.
	r.Time, r.Message = time.Time{}, ""
	if err := h.attrs.Handle(ctx, r); err != nil {
		return err
	}
	line.Write(bytes.TrimPrefix(attrs.Bytes(), []byte("level="+r.Level.String()+` msg=""`)))
	_, err := h.out.w.Write(line.Bytes())
	return err
}

// priority is syslog's number for a level, as journald reads it at the start
// of a line.
func priority(l slog.Level) int {
	switch {
	case l < slog.LevelInfo:
		return 7
	case l < slog.LevelWarn:
		return 6
	case l < slog.LevelError:
		return 4
	}
	return 3
}

// oneLine quotes a message that would break the line, or move the cursor of
// the terminal that shows it.
func oneLine(msg string) string {
	if strings.IndexFunc(msg, unicode.IsControl) < 0 {
		return msg
	}
	return strconv.Quote(msg)
}
