package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"penstock/storage"
)

// openTerminal returns both ends of a new pseudo-terminal.
func openTerminal(t *testing.T) (keyboard, terminal *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keyboard.Close() })
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return keyboard, terminal
}

// TestPasswordIsNotShown: while it is typed the terminal does not echo, and
// afterwards it does again.
func TestPasswordIsNotShown(t *testing.T) {
	keyboard, terminal := openTerminal(t)
	echoes := func() bool {
		state, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return state.Lflag&unix.ECHO != 0
	}
	if !echoes() {
		t.Fatal("a new terminal does not echo")
	}
	var prompts watcher
	prompts.seen = func(text string) {
		if strings.HasSuffix(text, ": ") {
			if echoes() {
				t.Errorf("the terminal echoes at %q", text)
			}
			if _, err := keyboard.WriteString("correct horse\n"); err != nil {
				t.Error(err)
			}
		}
	}
	got, err := readPassword(streams{terminal, new(bytes.Buffer), &prompts}, "admin")
	if err != nil || got != "correct horse" {
		t.Errorf("got %q, %v", got, err)
	}
	if !echoes() {
		t.Error("the terminal does not echo afterwards")
	}
}

// watcher is a writer that shows what is written to seen.
type watcher struct{ seen func(text string) }

func (w *watcher) Write(b []byte) (int, error) {
	w.seen(string(b))
	return len(b), nil
}

// TestNewPasswordEndsTokens: who knew the old password may have signed in.
func TestNewPasswordEndsTokens(t *testing.T) {
	cfg := storage.DefaultConfig()
	cfg.Dir = t.TempDir()
	db, err := storage.Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.PutOperator(t.Context(), storage.Operator{Name: "anna", Role: "viewer", Hash: "old"}); err != nil {
		t.Fatal(err)
	}
	hash := bytes.Repeat([]byte{7}, 32)
	if err := db.PutToken(t.Context(), storage.Token{Hash: hash, Operator: "anna"}); err != nil {
		t.Fatal(err)
	}
	if err := putOperator(t.Context(), db, "anna", "correct horse"); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Token(t.Context(), hash); err == nil {
		t.Error("the token of before is still good")
	}
	o, err := db.Operator(t.Context(), "anna")
	if err != nil {
		t.Fatal(err)
	}
	if o.Role != "viewer" || o.Hash == "old" {
		t.Errorf("got role %q and hash %q, want the role kept and the hash changed", o.Role, o.Hash)
	}
}

func TestNewPasswords(t *testing.T) {
	seen := make(map[string]bool)
	for range 100 {
		p := newPassword()
		if len(p) != 19 || strings.Count(p, "-") != 3 || seen[p] {
			t.Fatalf("got %q", p)
		}
		seen[p] = true
	}
}
