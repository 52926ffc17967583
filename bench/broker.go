package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"penstock/storage"
)

const (
	penstockName  = "Penstock"
	mosquittoName = "Mosquitto"

	startTimeout = 10 * time.Second
	stopTimeout  = 10 * time.Second
)

// A broker is a program that can be measured.
type broker struct {
	name    string
	path    string
	slow    string // the same program for a disk that syncs slowly; empty: there is none
	version string
	env     []string
	metrics bool // it has some to be read over HTTP
	// configure returns the arguments for a data directory, and the address,
	// which is empty when the broker chooses one and prints it.
	configure func(dir string, s setup) (args []string, addr string, err error)
	// seed, if not nil, puts into a new data directory what a broker in use
	// would have there.
	seed func(ctx context.Context, dir string) error
	// watch, if not nil, is called with the process before a round's load, and
	// what it returns after it.
	watch func(pid int) (stop func() error, err error)
}

// A setup is how a broker is configured for a scenario.
type setup struct {
	persistent bool // sessions on disk, for those that must be told
	deep       bool // a million messages may wait for a client

	commitDelay string        // of Penstock, empty: as shipped
	fsync       time.Duration // see scenario
	tls         bool          // a TLS listener beside the plain one, at tlsAddr
	tlsAddr     string        // set by start
	httpAddr    string        // where metrics are to be had; set by start, empty if there are none
}

// runs reports whether the broker can do a scenario at all.
func (b *broker) runs(s scenario) bool {
	return s.commitDelay == "" && s.fsync == 0 || b.name == penstockName && (s.fsync == 0 || b.slow != "")
}

// newPenstock returns Penstock with some access rules in force, so that their
// cost is in the figures.
func newPenstock(ctx context.Context, path string) (*broker, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(abs); err != nil {
		return nil, fmt.Errorf("%w: run make build first", err)
	}
	return &broker{
		name: penstockName, path: abs, version: versionOf(ctx, abs, "version"),
		env: []string{"PENSTOCK_ADMIN_PASSWORD=benchmark-only"}, metrics: true,
		seed: putRules,
		configure: func(dir string, s setup) ([]string, string, error) {
			addr, err := freeAddress()
			if err != nil {
				return nil, "", err
			}
			file := filepath.Join(dir, "penstock.toml")
			return []string{"serve", "--config", file}, addr, os.WriteFile(file, []byte(penstockConfig(addr, dir, s)), 0o600)
		},
	}, nil
}

// penstockConfig says where things are, and opens the one bound that 10,000
// idle clients, and a few that publish, would meet; all else is as shipped.
func penstockConfig(addr, dir string, s setup) string {
	var b strings.Builder
	fmt.Fprintf(&b, "[storage]\ndir = %q\n", dir)
	if s.commitDelay != "" {
		fmt.Fprintf(&b, "commit_delay = %q\n", s.commitDelay)
	}
	fmt.Fprintf(&b, "[api]\nhttp = %q\n", s.httpAddr)
	b.WriteString("[hw]\nbackend = \"off\"\n")
	b.WriteString("[broker]\nmax_connections = 15000\n")
	if s.deep {
		b.WriteString("max_queue_bytes = \"1GiB\"\n")
	}
	fmt.Fprintf(&b, "[[broker.listener]]\nname = \"tcp\"\naddress = %q\n", addr)
	if s.tls {
		fmt.Fprintf(&b, "[[broker.listener]]\nname = \"tls\"\naddress = %q\ntls_cert = %q\ntls_key = %q\n",
			s.tlsAddr, filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	}
	return b.String()
}

// accessRules is a plausible list for a gateway, that the generator's topics
// fall through to its end.
var accessRules = []storage.ACLRule{
	{Username: "scada", Action: "any", Filter: "#", Allow: true},
	{Action: "subscribe", Filter: "$SYS/#", Allow: true},
	{Action: "any", Filter: "devices/%c/#", Allow: true},
	{Action: "any", Filter: "users/%u/#", Allow: true},
	{Address: "10.0.0.0/8", Action: "publish", Filter: "plant/+/command/#"},
	{Address: "192.168.0.0/16", Action: "publish", Filter: "plant/+/command/#"},
	{Username: "guest", Action: "publish", Filter: "#"},
	{ClientID: "display", Action: "publish", Filter: "#"},
	{Action: "publish", Filter: "alarms/+/acknowledge"},
	{Action: "any", Filter: "#", Allow: true},
}

func putRules(ctx context.Context, dir string) error {
	cfg := storage.DefaultConfig()
	cfg.Dir = dir
	db, err := storage.Open(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return fmt.Errorf("put access rules: %w", err)
	}
	return errors.Join(db.ReplaceACLRules(ctx, accessRules), db.Close())
}

// newMosquitto returns Mosquitto as Debian ships it, with its bounds opened so
// that it drops nothing, and its log reduced to warnings.
func newMosquitto(ctx context.Context, path string) (*broker, error) {
	found, err := exec.LookPath(path)
	if err != nil && !strings.Contains(path, "/") {
		found, err = exec.LookPath("/usr/sbin/" + path) // not in the PATH of Debian's ordinary users
	}
	if err != nil {
		return nil, fmt.Errorf("%w: apt-get install mosquitto, or compare with nothing: -mosquitto none", err)
	}
	version, _, _ := strings.Cut(versionOf(ctx, found, "-h"), "\n")
	return &broker{
		name: mosquittoName, path: found, version: strings.TrimPrefix(version, "mosquitto version "),
		configure: func(dir string, s setup) ([]string, string, error) {
			addr, err := freeAddress()
			if err != nil {
				return nil, "", err
			}
			file := filepath.Join(dir, "mosquitto.conf")
			return []string{"-c", file}, addr, os.WriteFile(file, []byte(mosquittoConfig(addr, dir, s)), 0o600)
		},
	}, nil
}

func mosquittoConfig(addr, dir string, s setup) string {
	var b strings.Builder
	listener := func(addr string) {
		host, port, _ := net.SplitHostPort(addr)
		fmt.Fprintf(&b, "listener %s %s\nmax_connections -1\n", port, host)
	}
	listener(addr)
	if s.tls {
		listener(s.tlsAddr)
		fmt.Fprintf(&b, "certfile %s\nkeyfile %s\n", filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	}
	b.WriteString("allow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 1000\n")
	b.WriteString("log_dest stderr\nlog_type error\nlog_type warning\n")
	if os.Geteuid() == 0 {
		b.WriteString("user root\n") // or it becomes a user who may not write here
	}
	fmt.Fprintf(&b, "persistence %t\n", s.persistent)
	if s.persistent {
		fmt.Fprintf(&b, "persistence_location %s/\n", dir)
	}
	return b.String()
}

// freeAddress returns a loopback address that nobody listens on at the moment.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// versionOf returns what the program prints about itself, as well as it can.
func versionOf(ctx context.Context, path string, arg string) string {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	out, _ := exec.CommandContext(ctx, path, arg).Output()
	return strings.TrimSpace(string(out))
}

// A process is a running broker.
type process struct {
	cmd    *exec.Cmd
	addr   string
	setup  setup
	dir    string
	ready  time.Duration // from exec to the first CONNACK
	output *output
	exited chan struct{}
}

// start runs the broker in dir and returns when a client has got its CONNACK.
// The process dies with ctx; stop ends it in order.
func (b *broker) start(ctx context.Context, dir string, s setup) (*process, error) {
	if s.tls {
		var err error
		if s.tlsAddr, err = freeAddress(); err != nil {
			return nil, err
		}
		if err := writeCertificate(dir); err != nil {
			return nil, err
		}
	}
	if b.metrics {
		var err error
		if s.httpAddr, err = freeAddress(); err != nil {
			return nil, err
		}
	}
	args, addr, err := b.configure(dir, s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b.name, err)
	}
	path, env := b.path, b.env
	if s.fsync > 0 {
		path, env = b.slow, append(slices.Clone(env), "PENSTOCK_FSYNC="+s.fsync.String())
	}
	p := &process{
		setup: s, dir: dir,
		cmd: exec.CommandContext(ctx, path, args...), output: newOutput(), exited: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Dir = dir
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	p.cmd.WaitDelay = time.Second
	began := time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", b.name, err)
	}
	go func() {
		_ = p.cmd.Wait() // the exit status of a broker says nothing that its output does not
		close(p.exited)
	}()
	if err := p.awaitConnack(ctx, addr); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: start: %w; its output:\n%s", b.name, err, p.output.tail())
	}
	p.ready = time.Since(began)
	return p, nil
}

// awaitConnack tries to connect until it succeeds.
func (p *process) awaitConnack(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if addr == "" {
		select {
		case addr = <-p.output.mqtt:
		case <-p.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return errors.New("it printed no address")
		}
	}
	p.addr = addr
	for {
		err := func() error {
			c, err := dial(ctx, addr, v311, smallBytes)
			if err != nil {
				return err
			}
			defer c.disconnect()
			_, err = c.connect("bench-first", true)
			return err
		}()
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return err
		case <-time.After(time.Millisecond):
		}
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) target() target {
	return target{addr: p.addr, tlsAddr: p.setup.tlsAddr, pid: p.pid(), dir: p.dir}
}

// stop asks the process to end, and kills it if it does not.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // fails when it has ended already
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// scrape reads the broker's metrics once a second, as a monitoring system
// would at its most eager, until ctx ends. Brokers without metrics have none
// to read. It returns how often it succeeded.
func (p *process) scrape(ctx context.Context) int {
	if p.setup.httpAddr == "" {
		return 0
	}
	n := 0
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if getMetrics(ctx, p.setup.httpAddr) == nil {
			n++
		}
		select {
		case <-ctx.Done():
			return n
		case <-tick.C:
		}
	}
}

func getMetrics(ctx context.Context, addr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("metrics: %s", resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// An output takes what a broker prints: it looks for the address that it listens
// on, and keeps the last lines for an error message.
type output struct {
	mqtt chan string // one address

	mu    sync.Mutex
	line  []byte
	lines []string
}

const (
	keptLines = 20
	lineBytes = 4 << 10 // what is longer is cut
)

func newOutput() *output {
	return &output{mqtt: make(chan string, 1)}
}

// Write splits at carriage returns too, with which a terminal display
// overwrites its line.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range b {
		switch {
		case c == '\n' || c == '\r':
			o.endLine()
		case len(o.line) < lineBytes:
			o.line = append(o.line, c)
		}
	}
	return len(b), nil
}

func (o *output) endLine() {
	if len(o.line) == 0 {
		return
	}
	line := string(o.line)
	o.line = o.line[:0]
	o.lines = append(o.lines, line)
	if len(o.lines) > keptLines {
		o.lines = o.lines[1:]
	}
	if addr, ok := listenAddress(line); ok {
		select {
		case o.mqtt <- addr:
		default:
		}
	}
}

func (o *output) tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Join(o.lines, "\n")
}

// listenAddress finds the address in what Penstock's trial mode prints when it
// is ready: "mqtt  tcp   127.0.0.1:40123".
func listenAddress(line string) (string, bool) {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "mqtt" {
		return "", false
	}
	addr := fields[len(fields)-1]
	_, _, err := net.SplitHostPort(addr)
	return addr, err == nil
}
