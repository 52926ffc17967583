package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"penstock": main,
		"hang":     hang,
		"unheard":  unheard,
	})
}

// hang is a program with penstock's signals that does not come to an end.
func hang() {
	ctx, done := withSignals(slog.New(slog.NewTextHandler(os.Stderr, nil)), false)
	defer done()
	fmt.Println("hanging")
	<-ctx.Done()
	select {}
}

// unheard is a program with penstock's signals whose log nobody reads any more.
func unheard() {
	_, done := withSignals(slog.New(slog.DiscardHandler), false)
	defer done()
	r, w, err := os.Pipe()
	if err == nil {
		err = errors.Join(unix.Dup3(int(w.Fd()), 2, 0), w.Close(), r.Close())
	}
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = fmt.Fprintln(os.Stderr, "a line of the log")
	fmt.Println("still there after:", err)
}

// TestScript runs testdata/script: the whole program as its users see it. To
// what testscript knows, the scripts add:
//
//	serve FLAG…       starts "penstock serve FLAG…" and waits until it is ready;
//	                  then $MQTT and $HTTP are its ports, $PASSWORD is the
//	                  admin's if it was shown. Output: program.out, program.err
//	start TEXT PROGRAM ARG…  starts any program and waits for TEXT in its output
//	signal NAME       sends TERM, INT, HUP or KILL to what was started
//	ends CODE         waits until it has ended, with that exit code or "killed"
//	await FILE REGEXP waits until a file has a match
//
// Each wait fails after patience. What was started ends with the script.
func TestScript(t *testing.T) {
	for _, tool := range []string{"mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is not installed: apt-get install mosquitto-clients", tool)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Deadline:            time.Now().Add(5 * time.Minute), // or a client that waits for ever takes all of go test's time
		Setup: func(env *testscript.Env) error {
			env.Values[programKey{}] = new(program)
			// mosquitto's clients read a configuration of their user's.
			env.Setenv("XDG_CONFIG_HOME", env.WorkDir)
			env.Setenv("EXAMPLE", absolute(t, exampleFile))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"serve":  scriptServe,
			"start":  scriptStart,
			"signal": scriptSignal,
			"ends":   scriptEnds,
			"await":  scriptAwait,
		},
	})
}

// patience is how long a script waits for something that should come soon.
const patience = 20 * time.Second

type programKey struct{}

// program is what a script has started, one at a time.
type program struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

func absolute(t *testing.T, name string) string {
	t.Helper()
	abs, err := filepath.Abs(name)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

func running(ts *testscript.TestScript) *program {
	p := ts.Value(programKey{}).(*program)
	if p.cmd == nil {
		ts.Fatalf("nothing was started")
	}
	return p
}

func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	scriptStart(ts, neg, append([]string{`(?m)^  try |"?penstock ready"?`, "penstock", "serve"}, args...))
	out := ts.ReadFile("program.out") + ts.ReadFile("program.err")
	for name, line := range map[string]*regexp.Regexp{
		"MQTT":     regexp.MustCompile(`(?:  mqtt  \S+ +| mqtt\.\S+=)\S+:(\d+)\b`),
		"HTTP":     regexp.MustCompile(`(?:  http +| http=)\S+:(\d+)\b`),
		"PASSWORD": regexp.MustCompile(`password[ =]"?([a-z2-7]{4}(?:-[a-z2-7]{4}){3})\b`),
	} {
		if m := line.FindStringSubmatch(out); m != nil {
			ts.Setenv(name, m[1])
		}
	}
}

func scriptStart(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: start TEXT PROGRAM ARG…")
	}
	p := ts.Value(programKey{}).(*program)
	if p.cmd != nil {
		select {
		case <-p.exited:
		default:
			ts.Fatalf("what was started before is still running")
		}
	}
	want, err := regexp.Compile(args[0])
	ts.Check(err)
	path, err := exec.LookPath(args[1]) // testscript has put the test's programs into PATH
	ts.Check(err)
	p.cmd = exec.Command(path, args[2:]...)
	p.exited = make(chan struct{})
	p.cmd.Dir = ts.MkAbs(".")
	for _, v := range append(os.Environ(), "JOURNAL_STREAM=", "PENSTOCK_ADMIN_PASSWORD=") {
		name, _, _ := strings.Cut(v, "=")
		p.cmd.Env = append(p.cmd.Env, name+"="+ts.Getenv(name))
	}
	outName, errName := ts.MkAbs("program.out"), ts.MkAbs("program.err")
	stdout, err := os.Create(outName)
	ts.Check(err)
	defer stdout.Close()
	stderr, err := os.Create(errName)
	ts.Check(err)
	defer stderr.Close()
	p.cmd.Stdout, p.cmd.Stderr = stdout, stderr
	ts.Check(p.cmd.Start())
	cmd, exited := p.cmd, p.exited
	go func() {
		_ = cmd.Wait() // scriptEnds looks at ProcessState
		close(exited)
	}()
	ts.Defer(func() {
		_ = cmd.Process.Kill() // fails if it has ended
		<-exited
	})
	poll(ts, "ready: "+want.String(), func() bool {
		both := readIf(outName) + readIf(errName)
		select {
		case <-exited:
			ts.Fatalf("%s has ended (%s) and said\n%s", strings.Join(args[1:], " "), cmd.ProcessState, both)
		default:
		}
		return want.MatchString(both)
	})
}

func scriptSignal(ts *testscript.TestScript, neg bool, args []string) {
	signals := map[string]os.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL}
	if neg || len(args) != 1 || signals[args[0]] == nil {
		ts.Fatalf("usage: signal TERM|INT|HUP|KILL")
	}
	ts.Check(running(ts).cmd.Process.Signal(signals[args[0]]))
}

func scriptEnds(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: ends CODE|killed")
	}
	p := running(ts)
	select {
	case <-p.exited:
	case <-time.After(patience):
		ts.Fatalf("still running after %s; it said\n%s", patience, readIf(ts.MkAbs("program.err")))
	}
	got := fmt.Sprint(p.cmd.ProcessState.ExitCode())
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		got = "killed"
	}
	if got != args[0] {
		ts.Fatalf("ended with %s, want %s; it said\n%s", got, args[0], readIf(ts.MkAbs("program.err")))
	}
}

func scriptAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await FILE REGEXP")
	}
	want, err := regexp.Compile(args[1])
	ts.Check(err)
	poll(ts, args[1]+" in "+args[0], func() bool { return want.MatchString(readIf(ts.MkAbs(args[0]))) })
}

// poll waits until done returns true.
func poll(ts *testscript.TestScript, what string, done func() bool) {
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		if time.Now().After(deadline) {
			ts.Fatalf("no %s within %s\n%s%s", what, patience, readIf(ts.MkAbs("program.out")), readIf(ts.MkAbs("program.err")))
		}
		<-tick.C
	}
}

// readIf returns what is in a file, nothing if it is not there yet.
func readIf(name string) string {
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(b)
}
