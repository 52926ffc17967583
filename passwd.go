package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"penstock/api"
	"penstock/broker"
	"penstock/storage"
)

// shortestPassword is for people, in characters; the API can be tried from the
// whole LAN.
const shortestPassword = 8

type passwdCommand struct {
	configFlags
	Device   bool   `help:"Set what a device says when it connects over MQTT, not the password of an operator."`
	Generate bool   `help:"Make a password and print it, instead of reading one."`
	Name     string `arg:"" optional:"" help:"Whose password; without it, of the operator \"admin\"."`
}

// Run sets the password in the database. The broker may be running: both wait
// for each other's transactions.
func (c passwdCommand) Run(std streams) error {
	cfg, err := c.effective(addressFlags{})
	if err != nil {
		return usageError{err}
	}
	if c.Name == "" {
		if c.Device {
			return usageError{errors.New("passwd --device needs the user name of the device")}
		}
		c.Name = adminName
	}
	var password string
	if c.Generate {
		password = newPassword()
	} else if password, err = readPassword(std, c.Name); err != nil {
		return err
	}
	switch {
	case password == "":
		return usageError{errors.New("an empty password is none")}
	case !c.Device && len([]rune(password)) < shortestPassword:
		return usageError{fmt.Errorf("a password of an operator has at least %d characters", shortestPassword)}
	}
	cfg.Log.Level = "warn"
	log, _ := newLogger(cfg.Log, std.err)
	ctx := context.Background()
	_, statErr := os.Stat(filepath.Join(cfg.Storage.Dir, "penstock.db"))
	db, err := storage.Open(ctx, cfg.Storage, log)
	if err != nil && (errors.Is(err, fs.ErrPermission) || notWritable(cfg.Storage.Dir)) {
		return fmt.Errorf("permission denied: run it as the owner of %s: %w", cfg.Storage.Dir, err)
	}
	if err != nil {
		return err
	}
	if errors.Is(statErr, fs.ErrNotExist) { // perhaps a slip in --data
		fmt.Fprintf(std.err, "new database made in %s\n", cfg.Storage.Dir)
	}
	who := "operator"
	if c.Device {
		who, err = "device", putCredential(ctx, db, c.Name, password)
	} else {
		err = putOperator(ctx, db, c.Name, password)
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if c.Generate {
		_, err = fmt.Fprintf(std.out, "%s %q, password %q\n", who, c.Name, password)
	} else {
		_, err = fmt.Fprintf(std.out, "%s %q has a new password\n", who, c.Name)
	}
	return err
}

// putOperator gives the operator a password and ends what was signed in with
// the old one. An operator that is new is an administrator.
func putOperator(ctx context.Context, db *storage.DB, name, password string) error {
	hash, err := api.HashPassword(password)
	if err != nil {
		return fmt.Errorf("hash the password: %w", err)
	}
	o, err := db.Operator(ctx, name)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		o = storage.Operator{Name: name, Role: "admin", Created: time.Now()}
	case err != nil:
		return err
	default: // its tokens end with it
		if err := db.DeleteOperator(ctx, name); err != nil {
			return err
		}
	}
	o.Hash = hash
	return db.PutOperator(ctx, o)
}

// putCredential gives the device a password, and makes the device if need be.
func putCredential(ctx context.Context, db *storage.DB, name, password string) error {
	hash, err := broker.HashPassword(password)
	if err != nil {
		return fmt.Errorf("hash the password: %w", err)
	}
	c := storage.Credential{Username: name, Hash: hash, Created: time.Now()}
	err = db.PutCredential(ctx, c, true)
	if errors.Is(err, storage.ErrConflict) {
		err = db.PutCredential(ctx, c, false)
	}
	return err
}

// readPassword asks twice on a terminal, without showing what is typed, and
// takes the first line of anything else.
func readPassword(std streams, name string) (string, error) {
	in := bufio.NewReader(std.in)
	f, ok := std.in.(*os.File)
	if !ok || !isTerminal(f) {
		return readLine(in)
	}
	restore, err := hideTyping(int(f.Fd()))
	if err != nil {
		return "", fmt.Errorf("hide what is typed: %w", err)
	}
	defer restore()
	ask := func(prompt string) (string, error) {
		fmt.Fprint(std.err, prompt)
		defer fmt.Fprintln(std.err)
		return readLine(in)
	}
	password, err := ask(fmt.Sprintf("New password of %q: ", name))
	if err != nil {
		return "", err
	}
	again, err := ask("The same again: ")
	if err != nil {
		return "", err
	}
	if password != again {
		return "", usageError{errors.New("the two are not the same; nothing was changed")}
	}
	return password, nil
}

func readLine(in *bufio.Reader) (string, error) {
	line, err := in.ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// hideTyping turns the echo of the terminal off, until restore is called or a
// signal ends the process: a shell without echo is what would remain.
func hideTyping(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	hidden := *old
	hidden.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
		return nil, err
	}
	show := func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) } // nothing is left to do about an error
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	forget := make(chan struct{})
	go func() {
		select {
		case <-signals:
			show()
			os.Exit(exitFailed)
		case <-forget:
		}
	}()
	return func() {
		signal.Stop(signals)
		close(forget)
		show()
	}, nil
}
