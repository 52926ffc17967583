package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"penstock/api"
	"penstock/broker"
	"penstock/hw"
	"penstock/storage"
)

// recorder notes what parts do, in order.
type recorder struct{ lines []string }

func (r *recorder) note(format string, args ...any) {
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
}

// run serves until ctx ends, and takes a second to end.
func (r *recorder) run(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(time.Second) // virtual: the tests are synctest bubbles
		r.note("%s ran", name)
		return nil
	}
}

func (r *recorder) finish(name string) func() error {
	return func() error {
		r.note("%s finished", name)
		return nil
	}
}

func TestPartsStopInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rec recorder
		var p parts
		p.add("storage", nil, rec.finish("storage"))
		p.add("broker", rec.run("broker"), rec.finish("broker"))
		p.add("api", rec.run("api"), nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := p.wait(ctx); err != nil {
			t.Errorf("wait: got %v, want nil when the context ends", err)
		}
		synctest.Wait()
		if len(rec.lines) > 0 {
			t.Errorf("before stop: got %q, want nothing", rec.lines)
		}
		if err := p.stop(stopWithin); err != nil {
			t.Error(err)
		}
		want := []string{"api ran", "broker ran", "broker finished", "storage finished"}
		if !slices.Equal(rec.lines, want) {
			t.Errorf("got %q, want %q", rec.lines, want)
		}
	})
}

func TestPartThatEndsByItself(t *testing.T) {
	broken := errors.New("accept: too many open files")
	for name, tt := range map[string]struct {
		err  error
		want string
	}{
		"with an error": {broken, "broker: accept: too many open files"},
		"without one":   {nil, "broker: it ended by itself"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var rec recorder
				var p parts
				p.add("storage", nil, rec.finish("storage"))
				p.add("broker", func(context.Context) error {
					time.Sleep(time.Minute)
					return tt.err
				}, nil)
				p.add("api", rec.run("api"), nil)
				err := p.wait(t.Context())
				if err == nil || err.Error() != tt.want {
					t.Errorf("wait: got %v, want %q", err, tt.want)
				}
				if tt.err != nil && !errors.Is(err, tt.err) {
					t.Errorf("%v does not wrap its cause", err)
				}
				if err := p.stop(stopWithin); err != nil {
					t.Error(err)
				}
				if want := []string{"api ran", "storage finished"}; !slices.Equal(rec.lines, want) {
					t.Errorf("got %q, want %q", rec.lines, want)
				}
			})
		})
	}
}

func TestErrorWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p parts
		p.add("broker", func(ctx context.Context) error {
			<-ctx.Done()
			return errors.New("last commit: disk full")
		}, nil)
		err := p.stop(stopWithin)
		if want := "stop broker: last commit: disk full"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %q", err, want)
		}
	})
}

// TestToldToStopWhileStarting: that is no failure, systemd would say so.
func TestToldToStopWhileStarting(t *testing.T) {
	cfg := testConfig(t)
	log, level := newLogger(cfg.Log, t.Output())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := NewApp(cfg, Options{Stdout: io.Discard}, log, level).Run(ctx); err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func TestStopGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p parts
		release := make(chan struct{})
		defer close(release)
		p.add("storage", nil, func() error { <-release; return nil })
		p.add("api", nil, func() error { return errors.New("broken pipe") })
		began := time.Now()
		err := p.stop(stopWithin)
		want := "stop api: broken pipe\nstop storage: not done within 30s"
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %q", err, want)
		}
		if took := time.Since(began); took != stopWithin {
			t.Errorf("took %s, want %s", took, stopWithin)
		}
	})
}

func testConfig(t *testing.T) Config {
	t.Helper()
	cfg := DefaultConfig()
	cfg.setDev()
	cfg.Storage.Dir = t.TempDir()
	cfg.Broker.Listeners[0].Address = "127.0.0.1:0"
	cfg.Broker.Listeners[1].Address = "127.0.0.1:0"
	cfg.API.HTTP = "127.0.0.1:0"
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// startApp runs an App until the test ends, or until the stop that it returns
// is called, which gives what Run returned.
func startApp(t *testing.T, cfg Config, opt Options) (out string, stop func() error) {
	t.Helper()
	r, w := io.Pipe()
	opt.Dev, opt.Stdout, opt.Version, opt.Began = true, w, "v0-test", time.Now()
	log, level := newLogger(LogConfig{Level: "debug", Format: formatLogfmt}, t.Output())
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() {
		err := NewApp(cfg, opt, log, level).Run(ctx)
		w.CloseWithError(fmt.Errorf("the app ended: %w", err))
		result <- err
	}()
	stopped := false
	stop = func() error {
		stopped = true
		cancel()
		return <-result
	}
	t.Cleanup(func() {
		if !stopped {
			if err := stop(); err != nil {
				t.Error(err)
			}
		}
	})
	var buf bytes.Buffer
	chunk := make([]byte, 4096)
	for !strings.Contains(buf.String(), "  try ") {
		n, err := r.Read(chunk)
		if err != nil {
			t.Fatal(err)
		}
		buf.Write(chunk[:n])
	}
	go io.Copy(io.Discard, r)
	return buf.String(), stop
}

func TestAppStartsAnnouncesAndStops(t *testing.T) {
	cfg := testConfig(t)
	out, stop := startApp(t, cfg, Options{})
	want := regexp.MustCompile(`(?m)^penstock v0-test ready in \d+ ms
  mqtt  tcp   127\.0\.0\.1:(\d+)
  mqtt  web   ws://127\.0\.0\.1:\d+/mqtt
  http        http://(127\.0\.0\.1:\d+)
  data        ` + regexp.QuoteMeta(cfg.Storage.Dir) + `
  admin       user "admin", password "([a-z2-7]{4}-){3}[a-z2-7]{4}" \(shown this once\)
  try         mosquitto_sub -p (\d+) -t '#' -v
`)
	m := want.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("got\n%s\nwant a match of\n%s", out, want)
	}
	if m[1] != m[4] {
		t.Errorf("mosquitto_sub goes to port %s, MQTT is on %s", m[4], m[1])
	}
	for _, addr := range []string{"127.0.0.1:" + m[1], m[2]} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Errorf("announced, but not served: %v", err)
			continue
		}
		c.Close()
	}
	if err := stop(); err != nil {
		t.Errorf("Run returned %v, want nil", err)
	}
	if c, err := net.Dial("tcp", "127.0.0.1:"+m[1]); err == nil {
		c.Close()
		t.Error("MQTT is still served after Run has returned")
	}
	out, _ = startApp(t, cfg, Options{})
	if want := "admin       password set earlier, reset with: penstock passwd --data " + cfg.Storage.Dir + "\n"; !strings.Contains(out, want) {
		t.Errorf("second start: got\n%s\nwant %q in it", out, want)
	}
}

// TestPasswordOfFailedStart: a start that fails makes no password that nobody sees.
func TestPasswordOfFailedStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := testConfig(t)
	free := cfg.API.HTTP
	cfg.API.HTTP = taken.Addr().String()
	log, level := newLogger(cfg.Log, t.Output())
	if err := NewApp(cfg, Options{Dev: true, Stdout: io.Discard}, log, level).Run(t.Context()); err == nil {
		t.Fatal("it started on an address that is taken")
	}
	cfg.API.HTTP = free
	if out, _ := startApp(t, cfg, Options{}); !strings.Contains(out, "(shown this once)") {
		t.Errorf("the next start shows no password:\n%s", out)
	}
}

// TestStopIsPrompt: HTTP connections that hold the API up hold nobody else up.
func TestStopIsPrompt(t *testing.T) {
	for name, request := range map[string]string{
		"spare connection": "",
		"half a header":    "GET /healthz HTTP/1.1\r\nHost: x",
		"half a body":      "POST /bwiot/api/v1/login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nuser",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, stop := startApp(t, testConfig(t), Options{})
			m := regexp.MustCompile(`(?s)tcp   (\S+).*http        http://(\S+)`).FindStringSubmatch(out)
			web, err := net.Dial("tcp", m[2])
			if err != nil {
				t.Fatal(err)
			}
			defer web.Close()
			if _, err := io.WriteString(web, request); err != nil {
				t.Fatal(err)
			}
			client, err := net.Dial("tcp", m[1]) // does not close when it is told
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := client.Write([]byte("\x10\x0e\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x01a")); err != nil {
				t.Fatal(err)
			}
			client.SetReadDeadline(time.Now().Add(10 * time.Second))
			packets := bufio.NewReader(client)
			if first, err := packets.Peek(2); err != nil || first[0] != 0x20 {
				t.Fatalf("got % x, %v, want a CONNACK", first, err)
			} else if _, err := packets.Discard(2 + int(first[1])); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			stopped := make(chan error, 1)
			go func() { stopped <- stop() }()
			goodbye := make([]byte, 3)
			if _, err := io.ReadFull(packets, goodbye); err != nil || goodbye[0] != 0xE0 || goodbye[2] != 0x8B {
				t.Errorf("got % x, %v, want DISCONNECT with 0x8B", goodbye, err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("the client was told after %s", took)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("the stop took %s", took)
			}
		})
	}
}

func TestAppNamesTheAddressThatIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	addr := taken.Addr().String()
	for key, set := range map[string]func(*Config){
		"broker.listener.address or --mqtt": func(c *Config) { c.Broker.Listeners[0].Address = addr },
		`broker.listener.address of "web"`:  func(c *Config) { c.Broker.Listeners[1].Address = addr },
		"api.http or --http":                func(c *Config) { c.API.HTTP = addr },
	} {
		cfg := testConfig(t)
		set(&cfg)
		log, level := newLogger(cfg.Log, t.Output())
		err := NewApp(cfg, Options{Stdout: io.Discard}, log, level).Run(t.Context())
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s: got %v, want one that wraps EADDRINUSE", key, err)
			continue
		}
		for _, want := range []string{addr, key, "another program has this address"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q is not in %q", key, want, err)
			}
		}
	}
}

// onMessage is a log that calls f at a message.
type onMessage struct {
	slog.Handler
	message string
	f       func()
}

func (h onMessage) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == h.message {
		h.f()
	}
	return h.Handler.Handle(ctx, r)
}

// A signal during the start ends it without an error, and nothing says ready.
func TestAppToldToStopWhileStarting(t *testing.T) {
	cfg := testConfig(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var lines, out bytes.Buffer
	log := slog.New(onMessage{slog.NewTextHandler(&lines, nil), "database migrated", cancel})
	if err := NewApp(cfg, Options{Dev: true, Stdout: &out}, log, nil).Run(ctx); err != nil {
		t.Errorf("got %v, want nil", err)
	}
	if ctx.Err() == nil {
		t.Fatal("the start went by without the message")
	}
	if strings.Contains(lines.String(), "level=ERROR") || strings.Contains(out.String()+lines.String(), "ready") {
		t.Errorf("got\n%s%s", out.String(), lines.String())
	}
}

func TestAppNamesTheDataDirectory(t *testing.T) {
	cfg := testConfig(t)
	file := filepath.Join(cfg.Storage.Dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Storage.Dir = filepath.Join(file, "data")
	err := NewApp(cfg, Options{Stdout: io.Discard}, slog.New(slog.DiscardHandler), nil).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "storage.dir or --data") {
		t.Errorf("got %v, want the key and the flag", err)
	}
}

// verifies reports whether the operator could sign in with the password.
func verifies(t *testing.T, db *storage.DB, name, password string) bool {
	t.Helper()
	o, err := db.Operator(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	ok, err := api.VerifyPassword(o.Hash, password)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func TestEnsureAdmin(t *testing.T) {
	const env = "from the environment"
	tests := []struct {
		name     string
		existing string // name of an operator that is there, with password "earlier on"
		lost     bool   // the database was damaged, and no operator could be salvaged
		opt      Options
		fromEnv  bool
		made     bool
		verify   map[string]string // operator: password
	}{
		{name: "new installation", made: true},
		{name: "new installation with a password given", opt: Options{AdminPassword: env}, fromEnv: true, verify: map[string]string{"admin": env}},
		{name: "admin is there", existing: "admin", verify: map[string]string{"admin": "earlier on"}},
		{name: "admin is there: no environment changes it", existing: "admin", opt: Options{AdminPassword: env}, verify: map[string]string{"admin": "earlier on"}},
		{name: "admin is there, but this is a trial", existing: "admin", opt: Options{AdminPassword: env, Dev: true}, fromEnv: true, verify: map[string]string{"admin": env}},
		{name: "all operators were lost", lost: true, made: true},
		{name: "all operators were lost: no password of the first start", lost: true, opt: Options{AdminPassword: env}, made: true},
		{name: "someone else is there: admin was deleted on purpose", existing: "anna", verify: map[string]string{"anna": "earlier on"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig(t)
			log := slog.New(slog.DiscardHandler)
			if tt.lost {
				cfg.Storage.Damaged = "of a test"
			}
			db, err := storage.Open(t.Context(), cfg.Storage, log)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if tt.existing != "" {
				if err := putOperator(t.Context(), db, tt.existing, "earlier on"); err != nil {
					t.Fatal(err)
				}
			}
			a := NewApp(cfg, tt.opt, log, nil)
			a.db = db
			for range 2 { // the second is the next start
				got := a.ensureAdmin(t.Context())
				if got.err != nil || got.fromEnv && !tt.fromEnv || (got.password != "") != tt.made {
					t.Fatalf("got %+v", got)
				}
				if tt.made {
					tt.verify = map[string]string{"admin": got.password}
					tt.made = false
				}
				for name, password := range tt.verify {
					if !verifies(t, db, name, password) {
						t.Errorf("%s does not sign in with %q", name, password)
					}
				}
			}
			operators, err := db.Operators(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(operators) != 1 {
				t.Errorf("got operators %v, want one", operators)
			}
		})
	}
}

func TestSeverity(t *testing.T) {
	tests := []struct {
		h    broker.Health
		want hw.State
	}{
		{broker.Health{Ready: true}, hw.Running},
		{broker.Health{Ready: true, Degraded: true, Reasons: []string{"storage: disk full since 10:00"}}, hw.StorageFault},
		{broker.Health{Ready: true, Degraded: true, Reasons: []string{"queue of \"a\" at 80%"}}, hw.Degraded},
		{broker.Health{Ready: true, Degraded: true, Reasons: []string{"queue of \"a\" at 80%", "storage: I/O error"}}, hw.StorageFault},
	}
	for _, tt := range tests {
		board, err := hw.Open(hw.Config{Backend: "off"}, hw.Options{}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		board.Set(hw.Running, true)
		fault, degraded := severity(tt.h)
		board.Set(hw.StorageFault, fault)
		board.Set(hw.Degraded, degraded)
		if got := board.State(); got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.h.Reasons, got, tt.want)
		}
	}
}

func TestClientFlags(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:1883":  "-p 1883 ",
		"[::]:1884":       "-p 1884 ",
		"192.0.2.7:18830": "-h 192.0.2.7 -p 18830 ",
	} {
		tcp, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := clientFlags(tcp); got != want {
			t.Errorf("%s: got %q, want %q", addr, got, want)
		}
	}
}

// TestAddressHint: only what is wrong with an address is told how to choose
// another.
func TestAddressHint(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"taken", &net.OpError{Op: "listen", Err: syscall.EADDRINUSE}, "listen: address already in use: another program has this address; stop it, or choose another with KEY or FLAG"},
		{"a port for root", fmt.Errorf("tcp: %w", &net.OpError{Op: "listen", Err: syscall.EACCES}), "tcp: listen: permission denied: this user may not have this address (below 1024 it takes CAP_NET_BIND_SERVICE); choose another with KEY or FLAG"},
		{"a file", &os.PathError{Op: "open", Path: "penstock.lock", Err: syscall.EACCES}, "open penstock.lock: permission denied"},
	} {
		if got := addressHint(tt.err, "KEY or FLAG").Error(); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// Who is started again is who found the database damaged, and whom nobody else
// starts again.
func TestStartsAgain(t *testing.T) {
	damaged := fmt.Errorf("broker: %w", storage.ErrDamaged)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name   string
		ctx    context.Context
		err    error
		socket string
		want   bool
	}{
		{"damaged", t.Context(), damaged, "", true},
		{"stopped in order", t.Context(), nil, "", false},
		{"another error", t.Context(), errors.New("disk full"), "", false},
		{"told to stop meanwhile", over, damaged, "", false},
		{"by systemd, which starts it again", t.Context(), damaged, "/run/systemd/notify", false},
		{"another penstock has the directory", t.Context(), errors.Join(damaged, storage.ErrInUse), "", false},
	} {
		t.Setenv("NOTIFY_SOCKET", tt.socket)
		if got := startsAgain(tt.ctx, tt.err); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}
