package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"penstock/storage"
)

// beBroker is the variable that turns this test's program into a broker.
const beBroker = "BENCH_TEST_BROKER"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "perf" {
		os.Exit(bePerf(os.Args[1:]))
	}
	switch os.Getenv(beBroker) {
	case "serve":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		b, err := newFake(faults{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Printf("led: starting\r  mqtt  tcp   %s\n", b.addr())
		<-ctx.Done()
		b.close()
		os.Exit(0)
	case "die":
		fmt.Println("no disk today")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// bePerf is perf as far as profileOne wants it: it records until it is
// interrupted, and reports what perfReport says.
func bePerf(args []string) int {
	if args[0] == "report" {
		fmt.Print(perfReport)
		return 0
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT)
	if os.Getenv("BENCH_TEST_PERF") == "broken" {
		fmt.Println("no permission today")
		return 1
	}
	if err := os.WriteFile(args[slices.Index(args, "-o")+1], []byte(strings.Join(args, " ")), 0o600); err != nil {
		return 1
	}
	<-interrupted
	return 130
}

func TestProfileOne(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tools := t.TempDir()
	if err := os.Symlink(self, filepath.Join(tools, "perf")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", tools)
	pid := 0
	s := scenario{name: "one", run: func(ctx context.Context, tg target, l load) ([]phase, error) {
		pid = tg.pid
		return pairs(v311, 0, payloadBytes).run(ctx, tg, l)
	}}
	b, dir := fakeBroker(t, "serve"), filepath.Join(t.TempDir(), "profiles")
	p, err := profileOne(t.Context(), b, s, load{messages: 40}, dir)
	if err != nil || p.samples != 1000 || p.scenario.name != "one" {
		t.Errorf("got %+v, error %v", p, err)
	}
	called, err := os.ReadFile(filepath.Join(dir, "one.perf"))
	if err != nil || !strings.HasSuffix(string(called), fmt.Sprintf("-p %d", pid)) {
		t.Errorf("perf was called with %q, error %v, want the broker's process %d", called, err, pid)
	}

	t.Setenv("BENCH_TEST_PERF", "broken")
	if _, err := profileOne(t.Context(), b, s, load{messages: 40}, dir); err == nil || !strings.Contains(err.Error(), "no permission today") {
		t.Errorf("perf that fails: error %v, want what it said", err)
	}
	t.Setenv("PATH", dir)
	if _, err := profileOne(t.Context(), b, s, load{messages: 40}, dir); err == nil || !strings.Contains(err.Error(), "apt-get install linux-perf") {
		t.Errorf("no perf: error %v, want how to install it", err)
	}
}

func fakeBroker(t *testing.T, mode string) *broker {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &broker{
		name: "Fake", path: self, env: []string{beBroker + "=" + mode},
		configure: func(string, setup) ([]string, string, error) { return nil, "", nil },
	}
}

func TestRunRound(t *testing.T) {
	b := fakeBroker(t, "serve")
	seeded := ""
	b.seed = func(_ context.Context, dir string) error {
		seeded = dir
		return nil
	}
	var pid int
	s := scenario{name: "one", run: func(ctx context.Context, tg target, l load) ([]phase, error) {
		pid = tg.pid
		return pairs(v311, 1, payloadBytes).run(ctx, tg, l)
	}}
	got, err := runRound(t.Context(), b, s, load{messages: 400}, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(got.phases); n != 1 || got.phases[0].count != 400 || got.peak == 0 {
		t.Errorf("got %+v, want one phase of 400 deliveries, and a peak", got)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the broker's process %d: signal 0 says %v, want that it is gone", pid, err)
	}
	if _, err := os.Stat(seeded); seeded == "" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data directory %q: stat says %v, want it seeded and removed", seeded, err)
	}
}

func TestStartFails(t *testing.T) {
	_, err := fakeBroker(t, "die").start(t.Context(), t.TempDir(), setup{})
	if err == nil || !strings.Contains(err.Error(), "no disk today") {
		t.Errorf("error %v, want the broker's output in it", err)
	}
}

func TestMosquittoMissing(t *testing.T) {
	_, err := newMosquitto(t.Context(), "/nowhere/mosquitto")
	if err == nil || !strings.Contains(err.Error(), "apt-get install mosquitto") {
		t.Errorf("error %v, want how to install it", err)
	}
}

func TestMosquittoConfig(t *testing.T) {
	const listener = "listener 4711 127.0.0.1\nmax_connections -1\n"
	tests := []struct {
		setup      setup
		begin, end string
	}{
		{setup{}, listener + "allow_anonymous", "persistence false\n"},
		{setup{persistent: true}, listener + "allow_anonymous", "persistence true\npersistence_location /data/\n"},
		{setup{tls: true, tlsAddr: "127.0.0.1:4712"},
			listener + "listener 4712 127.0.0.1\nmax_connections -1\ncertfile /data/bench-cert.pem\nkeyfile /data/bench-key.pem\nallow", "persistence false\n"},
	}
	for _, tt := range tests {
		got := mosquittoConfig("127.0.0.1:4711", "/data", tt.setup)
		if !strings.HasPrefix(got, tt.begin) || !strings.HasSuffix(got, tt.end) {
			t.Errorf("%+v: got %q, want it to begin with %q and to end with %q", tt.setup, got, tt.begin, tt.end)
		}
	}
}

func TestPenstockConfig(t *testing.T) {
	plain := penstockConfig("127.0.0.1:4711", "/data", setup{httpAddr: "127.0.0.1:4713"})
	for _, want := range []string{"dir = \"/data\"\n", "http = \"127.0.0.1:4713\"\n", "max_connections = ", "\naddress = \"127.0.0.1:4711\"\n"} {
		if !strings.Contains(plain, want) {
			t.Errorf("%q lacks %q", plain, want)
		}
	}
	secure := penstockConfig("127.0.0.1:4711", "/data", setup{tls: true, tlsAddr: "127.0.0.1:4712"})
	for _, want := range []string{"\naddress = \"127.0.0.1:4712\"\n", "\"/data/bench-cert.pem\"", "\"/data/bench-key.pem\""} {
		if !strings.Contains(secure, want) || strings.Contains(plain, want) {
			t.Errorf("%q should have %q, and %q should not", secure, want, plain)
		}
	}
}

func TestPutRules(t *testing.T) {
	dir := t.TempDir()
	if err := putRules(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	cfg := storage.DefaultConfig()
	cfg.Dir = dir
	db, err := storage.Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	got, err := db.ACLRules(t.Context())
	if err != nil || len(got) != len(accessRules) {
		t.Errorf("%d rules, error %v, want %d", len(got), err, len(accessRules))
	}
}

func TestListenAddress(t *testing.T) {
	for line, want := range map[string]string{
		"  mqtt  tcp   127.0.0.1:40123":        "127.0.0.1:40123",
		"  http        http://127.0.0.1:40124": "",
		"  mqtt  tcp   somewhere":              "",
		"  try         mosquitto_sub -p 40123": "",
		"":                                     "",
	} {
		if got, ok := listenAddress(line); ok != (want != "") || ok && got != want {
			t.Errorf("in %q: got %q, %t, want %q", line, got, ok, want)
		}
	}
}

// A broker may print anything; only so much of it is kept.
func TestOutputIsBounded(t *testing.T) {
	o := newOutput()
	long := strings.Repeat("x", 3*lineBytes)
	for range 3 * keptLines {
		for _, part := range []string{long, "\r", "mqtt  tcp ", "127.0.0.1:1\n"} {
			if n, err := o.Write([]byte(part)); n != len(part) || err != nil {
				t.Fatalf("wrote %d, error %v, want %d", n, err, len(part))
			}
		}
	}
	if got, limit := len(o.tail()), keptLines*(lineBytes+1); got > limit {
		t.Errorf("kept %d bytes, want at most %d", got, limit)
	}
	if got := <-o.mqtt; got != "127.0.0.1:1" {
		t.Errorf("address %q, want 127.0.0.1:1", got)
	}
}

func TestParseOptions(t *testing.T) {
	var quiet strings.Builder
	o, err := parse([]string{"-scenario", "fan", "-rounds", "2", "-messages", "7", "-mosquitto", "none"}, &quiet)
	if err != nil || o.rounds != 2 || o.load.messages != 7 || !o.only.MatchString("qos1-fan-in") || o.load.settle != 10*time.Second {
		t.Errorf("got %+v, error %v", o, err)
	}
	if want := "go run ./bench -scenario fan -rounds 2 -messages 7 -mosquitto none"; o.command != want {
		t.Errorf("command %q, want %q", o.command, want)
	}
	if o, err := parse([]string{"-quick", "-profile", "there"}, &quiet); err != nil || o.rounds != 1 || o.load.time != time.Second || o.profiles != "there" {
		t.Errorf("-quick: got %+v, error %v", o, err)
	}
	for _, args := range [][]string{
		{"-rounds", "0"}, {"-time", "1h"}, {"-scenario", "("}, {"-scenario", "no-such"}, {"extra"},
		{"-penstock", "none", "-mosquitto", "none"}, {"-unknown"},
	} {
		if _, err := parse(args, &quiet); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
	if got := run([]string{"-rounds", "0"}, &quiet, &quiet); got != 2 {
		t.Errorf("exit status %d, want 2", got)
	}
	if got := run([]string{"-penstock", "/nowhere/penstock"}, &quiet, &quiet); got != 1 {
		t.Errorf("exit status without Penstock: %d, want 1", got)
	}
}

func TestReplaceFile(t *testing.T) {
	path := t.TempDir() + "/docs/benchmarks.md"
	for _, want := range []string{"one", "two"} {
		if err := replaceFile(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("got %q, error %v, want %q", got, err, want)
		}
	}
}
