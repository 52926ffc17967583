package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"penstock/api"
	"penstock/broker"
	"penstock/hw"
	"penstock/storage"
	"penstock/systemd"
)

// stopWithin is how long stopping may take before the process gives up on it.
// What was acknowledged is in the database by then. A card that stalls may need
// half a minute; systemd waits a minute (TimeoutStopSec in penstock.service).
const stopWithin = 30 * time.Second

// Options is what the command line and the environment, not the configuration
// file, give to an App.
type Options struct {
	Version string
	// Dev shows on Stdout, for a person, what otherwise goes to the log.
	Dev bool
	// AdminPassword, if not empty, becomes the password of the operator
	// "admin": in Dev always, else if there is no operator yet.
	AdminPassword string
	// Began is when the process began, for the time that starting took.
	Began  time.Time
	Stdout io.Writer
}

// App is the whole program, wired from a Config.
type App struct {
	cfg   Config
	opt   Options
	log   *slog.Logger
	level *slog.LevelVar
	parts parts

	serving *part // the broker
	wear    wear

	board  *hw.Board
	db     *storage.DB
	broker *broker.Broker
	api    *api.Server
}

// NewApp returns an App that Run starts. cfg must be valid; level is what the
// API changes.
func NewApp(cfg Config, opt Options, log *slog.Logger, level *slog.LevelVar) *App {
	return &App{cfg: cfg, opt: opt, log: log, level: level}
}

// Run starts the parts one after the other, serves until ctx ends, and stops
// them in reverse. It returns nil if all went well, and the first error if a
// part could not start, ended by itself, or did not stop in time. It must be
// called once.
func (a *App) Run(ctx context.Context) error {
	err := a.start(ctx)
	if err == nil {
		err = a.parts.wait(ctx)
	} else if ctx.Err() != nil {
		err = nil // told to stop while starting
	}
	return errors.Join(err, a.parts.stop(stopWithin))
}

// start brings the parts up. The board comes first and goes last, so that the
// LEDs tell the truth while a damaged database is being opened and while the
// last commit is written.
func (a *App) start(ctx context.Context) error {
	if err := a.startBoard(); err != nil {
		return err
	}
	if err := a.startStorage(ctx); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.startBroker(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.startAPI(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// A password that is made is also shown: nothing fails from here on,
	// whatever the signals say.
	admin := a.ensureAdmin(context.WithoutCancel(ctx))
	a.startHealth()
	a.startWear()
	a.startMemory()
	a.startSystemd()
	a.announce(admin)
	return nil
}

func (a *App) startBoard() error {
	opt := hw.Options{}
	if a.opt.Dev {
		// Hidden from it that this may be a terminal: a line that is
		// rewritten does not go together with a log.
		opt.Terminal = struct{ io.Writer }{a.opt.Stdout}
	}
	board, err := hw.Open(a.cfg.HW, opt, a.log)
	if err != nil {
		return err
	}
	a.board = board
	a.parts.add("hardware", board.Run, nil)
	return nil
}

func (a *App) startStorage(ctx context.Context) error {
	db, err := storage.Open(ctx, a.cfg.Storage, a.log)
	if err != nil {
		if ctx.Err() == nil {
			a.board.Set(hw.StorageFault, true)
		}
		return dataHint(err, a.cfg.Storage.Dir)
	}
	a.db = db
	a.parts.add("storage", nil, db.Close)
	return nil
}

func (a *App) startBroker() error {
	sockets, err := systemd.Sockets()
	if err != nil {
		a.log.Error("sockets that systemd passed are not all of use", "err", err)
	}
	var passed []broker.Socket
	for _, s := range sockets {
		passed = append(passed, broker.Socket(s))
	}
	cfg := a.cfg.Broker
	cfg.Version = a.opt.Version
	b, err := broker.New(cfg, a.db, a.log, passed...)
	if err != nil {
		choose := "broker.listener.address or --mqtt"
		var at *broker.ListenerError
		switch {
		case !errors.As(err, &at):
			return dataHint(err, a.cfg.Storage.Dir) // its lock
		case at.Index > 0 && a.opt.Dev:
			choose = "--mqtt, with which this one takes a free port"
		case at.Index > 0:
			choose = fmt.Sprintf("broker.listener.address of %q", at.Name)
		}
		return addressHint(err, choose)
	}
	a.broker = b
	a.parts.add("storage check", a.db.Watch, nil) // not before the broker has loaded it, which may salvage
	a.serving = a.parts.add("broker", b.Run, nil)
	return nil
}

func (a *App) startAPI() error {
	server, err := api.Listen(a.cfg.API, api.Deps{
		Broker:   a.broker,
		DB:       a.db,
		Log:      a.log,
		Version:  a.opt.Version,
		Panel:    func() (string, map[string]string) { return a.board.State().String(), a.board.LEDs() },
		Wear:     func() api.Wear { return api.Wear(a.wear.get()) },
		LogLevel: a.level,
	})
	if err != nil {
		return addressHint(err, "api.http or --http")
	}
	a.api = server
	// A request that does not end must not keep the broker from telling its
	// clients that it stops.
	a.parts.add("api", server.Run, nil).with = a.serving
	return nil
}

// dataHint adds to an error of the data directory by what to choose another, if
// this one cannot be written.
func dataHint(err error, dir string) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) || notWritable(dir) {
		return fmt.Errorf("%w; the data directory must belong to this user, or choose another with storage.dir or --data", err)
	}
	return err
}

// notWritable reports whether this process may not write in the data directory,
// or not in its database.
func notWritable(dir string) bool {
	for _, path := range []string{dir, filepath.Join(dir, "penstock.db")} {
		if err := unix.Access(path, unix.R_OK|unix.W_OK); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}

// addressHint adds to an error of binding a listener what to do about it; with
// is what chooses another address. Other errors, as that of a file without
// permission, stay as they are.
func addressHint(err error, with string) error {
	if !errors.As(err, new(*net.OpError)) {
		return err
	}
	choose := "choose another with " + with
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w: another program has this address; stop it, or %s", err, choose)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w: this machine does not have this address; %s", err, choose)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: this user may not have this address (below 1024 it takes CAP_NET_BIND_SERVICE); %s", err, choose)
	}
	return err
}

// startHealth shows once a second on the LEDs, and to systemd, how the broker
// is.
func (a *App) startHealth() {
	a.board.Set(hw.Running, true)
	a.parts.add("health", func(ctx context.Context) error {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		last, moved := "", uint64(0)
		for {
			packets := a.broker.Stats().Packets()
			a.board.Set(hw.Traffic, packets != moved)
			moved = packets
			h := a.wear.note(a.broker.Health())
			storageFault, degraded := severity(h)
			a.board.Set(hw.StorageFault, storageFault)
			a.board.Set(hw.Degraded, degraded)
			status := "serving"
			if len(h.Reasons) > 0 {
				status = strings.Join(h.Reasons, "; ")
			}
			if status != last {
				last = status
				if err := systemd.Status(status); err != nil {
					a.log.Debug("systemd not told the status", "err", err)
				}
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	}, nil)
}

// severity says which LED states a health stands for. Reasons that begin with
// "storage" are about the disk.
func severity(h broker.Health) (storageFault, degraded bool) {
	for _, r := range h.Reasons {
		if strings.HasPrefix(r, "storage") {
			storageFault = true
		}
	}
	return storageFault, h.Degraded
}

// startSystemd says READY, feeds the watchdog while the broker answers, and
// says STOPPING first of all when it is over.
func (a *App) startSystemd() {
	if err := systemd.Ready(); err != nil {
		a.log.Warn("systemd not told that penstock is ready", "err", err)
	}
	a.parts.add("systemd", func(ctx context.Context) error {
		// A broker that hangs does not return from Health, and is killed
		// and restarted. One that is degraded is not: a full disk is not
		// mended by a restart.
		return systemd.RunWatchdog(ctx, func() error {
			a.broker.Health()
			a.broker.Stats() // takes the locks that a hanging broker holds
			return nil
		})
	}, systemd.Stopping)
}

// adminName is the operator that a new installation has.
const adminName = "admin"

// adminState says how the password of the operator "admin" came to be.
type adminState struct {
	password string // shown this once; empty if it was there before
	fromEnv  bool
	err      error
}

// ensureAdmin makes sure that somebody can sign in. Failing at it does not
// keep the broker from serving: the next start tries again. Where damage to the
// database has taken all operators, a password of the environment does not count:
// it is the one of the first start, which was changed since, perhaps because too
// many knew it.
func (a *App) ensureAdmin(ctx context.Context) adminState {
	state, err := func() (adminState, error) {
		operators, err := a.db.Operators(ctx)
		if err != nil {
			return adminState{}, err
		}
		i := slices.IndexFunc(operators, func(o storage.Operator) bool { return o.Name == adminName })
		lost := len(operators) == 0 && a.db.Salvage() != nil
		switch env := a.opt.AdminPassword; {
		case env != "" && (a.opt.Dev || len(operators) == 0 && !lost):
			if i >= 0 {
				if same, err := api.VerifyPassword(operators[i].Hash, env); err == nil && same {
					return adminState{fromEnv: true}, nil
				}
			}
			return adminState{fromEnv: true}, putOperator(ctx, a.db, adminName, env)
		case len(operators) == 0:
			password := newPassword()
			return adminState{password: password}, putOperator(ctx, a.db, adminName, password)
		}
		return adminState{}, nil
	}()
	if err != nil {
		a.log.Error("no password for the operator admin", "err", err)
		return adminState{err: err}
	}
	return state
}

// newPassword returns a password of 80 random bits, in groups that can be read
// aloud and typed from a screen.
func newPassword() string {
	t := strings.ToLower(rand.Text()) // base32: there is no 0 and no 1 to take for an o or l
	return t[:4] + "-" + t[4:8] + "-" + t[8:12] + "-" + t[12:16]
}

// announce says where everything is: on a trial to a person, else to the log.
func (a *App) announce(admin adminState) {
	took := time.Since(a.opt.Began)
	if !a.opt.Dev {
		if admin.password != "" {
			a.log.Warn("operator made, its password is shown this once", "operator", adminName, "password", admin.password)
		}
		var mqtt []any
		for _, l := range a.broker.Listeners() {
			mqtt = append(mqtt, slog.String(l.Name, address(l)))
		}
		http := "off"
		if addr := a.api.Addr(); addr != nil {
			http = addr.String()
		}
		a.log.Info("penstock ready", "version", a.opt.Version, "took", took.Round(time.Millisecond),
			slog.Group("mqtt", mqtt...), "http", http, "data", a.cfg.Storage.Dir)
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "penstock %s ready in %d ms\n", a.opt.Version, took.Milliseconds())
	line := func(format string, args ...any) { fmt.Fprintf(&b, "  "+format+"\n", args...) }
	for _, l := range a.broker.Listeners() {
		line("mqtt  %-5s %s", l.Name, address(l))
	}
	if addr := a.api.Addr(); addr != nil {
		line("http        http://%s", addr)
	} else {
		line("http        off")
	}
	line("data        %s", a.cfg.Storage.Dir)
	switch {
	case admin.err != nil:
		line("admin       none: %v", admin.err)
	case admin.fromEnv:
		line("admin       user %q, password from PENSTOCK_ADMIN_PASSWORD", adminName)
	case admin.password != "":
		line("admin       user %q, password %q (shown this once)", adminName, admin.password)
	default:
		line("admin       password set earlier, reset with: penstock passwd --data %s", a.cfg.Storage.Dir)
	}
	listeners := a.broker.Listeners()
	if i := slices.IndexFunc(listeners, func(l broker.ListenerInfo) bool { return l.Protocol == "mqtt" }); i >= 0 {
		line("try         mosquitto_sub %s-t '#' -v", clientFlags(listeners[i].Addr))
	}
	if _, err := io.WriteString(a.opt.Stdout, b.String()); err != nil {
		a.log.Warn("addresses not shown", "err", err)
	}
}

// address returns what a person reaches a listener by: of plain MQTT over TCP
// the address alone.
func address(l broker.ListenerInfo) string {
	addr := l.Addr.String()
	if l.Addr.Network() == "unix" {
		addr = "unix:" + addr
	}
	switch l.Protocol {
	case "mqtts":
		return "mqtts://" + addr
	case "ws", "wss":
		return l.Protocol + "://" + addr + "/mqtt"
	}
	return addr
}

// clientFlags returns the flags by which mosquitto's clients on this machine
// reach addr.
func clientFlags(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return ""
	}
	flags := fmt.Sprintf("-p %d ", tcp.Port)
	if !tcp.IP.IsUnspecified() && !tcp.IP.IsLoopback() {
		flags = fmt.Sprintf("-h %s %s", tcp.IP, flags)
	}
	return flags
}

// parts are what runs, in the order in which it was started.
type parts struct {
	running []*part
	ended   chan error // the first part that ended by itself
}

type part struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{} // closed when run has returned
	err    error         // what run returned; to be read after done
	finish func() error  // may be nil
	with   *part         // is told to end together with this one; may be nil
}

// add starts a part: run serves until its context ends (nil: there is nothing
// to serve), finish is called after it (nil: there is nothing to finish).
func (p *parts) add(name string, run func(context.Context) error, finish func() error) *part {
	if p.ended == nil {
		p.ended = make(chan error, 1)
	}
	// Not a child of the caller's context: each part ends when it is its turn.
	ctx, cancel := context.WithCancel(context.Background())
	one := &part{name: name, cancel: cancel, done: make(chan struct{}), finish: finish}
	p.running = append(p.running, one)
	if run == nil {
		close(one.done)
		return one
	}
	go func() {
		defer close(one.done)
		err := run(ctx)
		if ctx.Err() != nil {
			one.err = err
			return
		}
		if err == nil {
			err = errors.New("it ended by itself")
		}
		select {
		case p.ended <- fmt.Errorf("%s: %w", name, err):
		default:
		}
	}()
	return one
}

// wait blocks until ctx ends, and returns nil, or until a part has ended by
// itself, and returns why.
func (p *parts) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-p.ended:
		return err
	}
}

// stop ends the parts, the last first, each after those that depend on it. It
// returns their errors; when within is over it returns at once, and names the
// part that it waited for.
func (p *parts) stop(within time.Duration) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	var errs []error
	for _, one := range slices.Backward(p.running) {
		one.cancel()
		if one.with != nil {
			one.with.cancel()
		}
		stopped := make(chan error, 1)
		go func() {
			<-one.done
			err := one.err
			if one.finish != nil {
				err = errors.Join(err, one.finish())
			}
			stopped <- err
		}()
		select {
		case err := <-stopped:
			if err != nil {
				errs = append(errs, fmt.Errorf("stop %s: %w", one.name, err))
			}
		case <-deadline.C:
			return errors.Join(append(errs, fmt.Errorf("stop %s: not done within %s", one.name, within))...)
		}
	}
	return errors.Join(errs...)
}
