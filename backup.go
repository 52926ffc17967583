package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"penstock/storage"
)

type backupCommand struct {
	configFlags
	File string `arg:"" help:"Where to write it; must not be there yet."`
}

// Run copies the database, also beside a broker that runs.
func (c backupCommand) Run(std streams) error {
	dir, err := c.dataDir()
	if err != nil {
		return err
	}
	if err := storage.Backup(context.Background(), dir, c.File); err != nil {
		return salvageHint(hintFor(err, dir), dir)
	}
	info, err := os.Stat(c.File)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(std.out, "backup of %s in %s, %d bytes\n", dir, c.File, info.Size())
	return err
}

type restoreCommand struct {
	configFlags
	File string `arg:"" help:"A file that backup has written."`
}

// Run puts a backup in the place of the database. The broker must not run.
func (c restoreCommand) Run(std streams) error {
	dir, err := c.dataDir()
	if err != nil {
		return err
	}
	kept, err := storage.Restore(context.Background(), dir, c.File)
	if kept != "" {
		fmt.Fprintf(std.out, "what was there is kept in %s\n", kept)
	}
	if err != nil {
		return hintFor(err, dir)
	}
	_, err = fmt.Fprintf(std.out, "%s restored from %s\n", dir, c.File)
	return err
}

type verifyCommand struct {
	configFlags
	File string `arg:"" optional:"" help:"A database or a backup of one; without it, that of the data directory."`
}

// Run reads all of a database and says what is in it.
func (c verifyCommand) Run(std streams) error {
	file := c.File
	if file == "" {
		dir, err := c.dataDir()
		if err != nil {
			return err
		}
		file = filepath.Join(dir, "penstock.db")
	}
	r, err := storage.Verify(context.Background(), file)
	for _, line := range r.Damage {
		fmt.Fprintln(std.out, "damaged: "+line)
	}
	if err != nil && r.Schema == 0 {
		if err = hintFor(err, filepath.Dir(file)); c.File == "" {
			err = salvageHint(err, filepath.Dir(file))
		}
		return err
	}
	fmt.Fprintf(std.out, `schema       %d
sessions     %d
messages     %d, %d bytes
retained     %d
wills        %d
devices      %d
operators    %d
`, r.Schema, r.Sessions, r.Messages, r.Bytes, r.Retained, r.Wills, r.Credentials, r.Operators)
	if err == nil {
		_, err = fmt.Fprintln(std.out, "no damage was found")
	}
	if c.File == "" {
		return salvageHint(err, filepath.Dir(file))
	}
	return err
}

// salvageHint adds to an error of damage to the database in dir what to do: a start
// does not read all of it, and may not meet it.
func salvageHint(err error, dir string) error {
	if !errors.Is(err, storage.ErrDamaged) || errors.Is(err, storage.ErrInUse) {
		return err
	}
	return fmt.Errorf("%w; to have what can be read salvaged, make the file %s and restart penstock", err, filepath.Join(dir, storage.DamagedName))
}

// hintFor is dataHint for errors that are about the data directory; one about
// another file says itself which.
func hintFor(err error, dir string) error {
	var at *fs.PathError
	if errors.As(err, &at) && filepath.Dir(at.Path) != dir {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: this user has no right to it", err)
		}
		return err
	}
	return dataHint(err, dir)
}

// dataDir returns the data directory that the flags and the configuration name.
func (f configFlags) dataDir() (string, error) {
	cfg, err := f.effective(addressFlags{})
	if err != nil {
		return "", usageError{err}
	}
	return cfg.Storage.Dir, nil
}
