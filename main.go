// Penstock is an MQTT broker appliance for ARM gateways: the broker, its API,
// the LEDs and all state in one static binary.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/pelletier/go-toml/v2"

	"penstock/hw"
	"penstock/storage"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// Exit codes of the program.
const (
	exitStopped = 0 // did what it was asked to, or was told to stop
	exitFailed  = 1
	exitUsage   = 2 // wrong arguments or a wrong configuration: trying again is no use
)

// usageError is an error that the same arguments would meet again.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// commands is the command line.
type commands struct {
	Serve   serveCommand   `cmd:"" help:"Run the broker, the API and the LEDs until SIGINT or SIGTERM."`
	Check   checkCommand   `cmd:"" help:"Check a configuration and print the effective one."`
	Passwd  passwdCommand  `cmd:"" help:"Set the password of an operator of the API, or of a device."`
	Backup  backupCommand  `cmd:"" help:"Copy the database, also while the broker runs."`
	Restore restoreCommand `cmd:"" help:"Put a backup in the place of the database."`
	Verify  verifyCommand  `cmd:"" help:"Check the database, or a backup, and say what is in it."`
	Version versionCommand `cmd:"" help:"Print the version."`
}

// streams are where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// run is the program. It returns its exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) (code int) {
	// kong leaves by Exit once it has printed a help text.
	type exit struct{ code int }
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(exit)
			if !ok {
				panic(r)
			}
			code = e.code
		}
	}()
	parser, err := kong.New(new(commands),
		kong.Name("penstock"),
		kong.Description("An MQTT broker that never loses a message it has acknowledged."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { panic(exit{code}) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
	if err != nil {
		panic(err) // the struct tags above are wrong
	}
	command, err := parser.Parse(args)
	if err != nil {
		err = usageError{fmt.Errorf("%w; see penstock --help", err)}
	} else {
		err = command.Run(streams{stdin, stdout, stderr})
	}
	if err == nil {
		return exitStopped
	}
	printError(stderr, err)
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailed
}

// printError writes err, a line for each of its lines. What is wrong in a file
// begins with the file's name, so that an editor finds the place.
func printError(w io.Writer, err error) {
	head := "penstock: "
	if errors.As(err, new(configErrors)) {
		head = ""
	}
	if detectFormat(w, os.Getenv("JOURNAL_STREAM")) == formatJournal {
		head = fmt.Sprintf("<%d>%s", priority(slog.LevelError), head)
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintln(w, head+strings.TrimSuffix(line, "\n"))
	}
}

// version is set by the linker: -X main.version=v1.2.3.
var version string

// versionName returns the version, or for a build without one its commit.
func versionName() string {
	if version != "" {
		return version
	}
	var commit, dirty string
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				commit = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = "-dirty"
			}
		}
	}
	if commit == "" {
		return "dev"
	}
	return "dev-" + commit + dirty
}

type versionCommand struct{}

func (versionCommand) Run(std streams) error {
	_, err := fmt.Fprintf(std.out, "penstock %s %s %s/%s\n", versionName(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

type checkCommand struct {
	configFlags
	addressFlags
}

func (c checkCommand) Run(std streams) error {
	cfg, err := c.effective(c.addressFlags)
	if err != nil {
		return usageError{err}
	}
	notes, err := cfg.Broker.CheckCertificates(time.Now())
	for _, note := range notes {
		fmt.Fprintln(std.err, "penstock: note: "+note)
	}
	if err != nil {
		return usageError{err}
	}
	cfg.Broker = cfg.Broker.Resolved()
	return printConfig(std.out, cfg)
}

// printConfig writes cfg as a file that decodeConfig reads.
func printConfig(w io.Writer, cfg Config) error {
	return toml.NewEncoder(w).Encode(cfg)
}

type serveCommand struct {
	configFlags
	addressFlags
}

func (c serveCommand) Run(std streams) error {
	began := time.Now()
	cfg, err := c.effective(c.addressFlags)
	if err != nil {
		return usageError{err}
	}
	// Before anything stays open or runs: periph closes a descriptor too many.
	var hostErr error
	if cfg.HW.Backend == "periph" {
		hostErr = hw.InitHost()
	}
	log, level := newLogger(cfg.Log, std.err)
	if hostErr != nil {
		log.Warn("hardware not all found", "err", hostErr)
	}
	ctx, done := withSignals(log, c.Dev)
	defer done()
	opt := Options{
		Version:       versionName(),
		Dev:           c.Dev,
		AdminPassword: os.Getenv("PENSTOCK_ADMIN_PASSWORD"),
		Began:         began,
		Stdout:        std.out,
	}
	for {
		err := NewApp(cfg, opt, log, level).Run(ctx)
		if !startsAgain(ctx, err) {
			return err
		}
		log.Error("starting again, to salvage the database", "err", err)
		cfg.Storage.Damaged = err.Error()
		opt.Began = time.Now()
	}
}

// startsAgain reports whether an App that ended with err is to be started again
// in this process: when it has found its database damaged, and nobody else would
// start it. systemd does, and passes its sockets anew.
func startsAgain(ctx context.Context, err error) bool {
	return errors.Is(err, storage.ErrDamaged) && !errors.Is(err, storage.ErrInUse) && ctx.Err() == nil && os.Getenv("NOTIFY_SOCKET") == ""
}

// withSignals returns a context that ends at the first SIGINT or SIGTERM; the
// second one ends the process at once. done forgets the signals.
func withSignals(log *slog.Logger, dev bool) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancel(context.Background())
	// A log or a terminal that goes away must not take the broker with it,
	// as SIGPIPE would.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	forget := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				switch {
				case s == syscall.SIGHUP && !dev:
					log.Warn("SIGHUP does nothing yet: restart to read the configuration again")
				case ctx.Err() != nil:
					log.Error("quitting at once", "signal", s.String())
					os.Exit(exitFailed)
				default: // in --dev also SIGHUP: the terminal was closed
					log.Info("stopping, once more quits at once", "signal", s.String())
					cancel()
				}
			case <-forget:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(forget)
		cancel()
	}
}
