package storage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// ErrInUse means that another process serves from the data directory.
var ErrInUse = errors.New("data directory is in use by another penstock")

// lockDir takes the lock of a data directory, which the process holds until
// the file is closed. Two journals on one database would each trust memory
// that the other makes false. The kernel releases it with the process, so that
// a kill leaves nothing behind.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "penstock.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20)) // only for the message
		_ = f.Close()                               // the error that counts is the one above
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s (process %s); stop it first", ErrInUse, dir, strings.TrimSpace(string(pid)))
		}
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0) // only for the message
	}
	return f, nil
}
