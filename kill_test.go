package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The kill tests run the real program and end it without warning, again and
// again, while clients work. They know every message that was acknowledged.
//
// PENSTOCK_SOAK=1 makes them long; PENSTOCK_KILL_ROUNDS sets the rounds,
// PENSTOCK_KILL_SEED the seed; PENSTOCK_KILL_RACE=1 builds the program with the
// race detector; PENSTOCK_KILL_DIR names a directory that keeps the data and
// the program's log.

// killPatience bounds every single wait.
const killPatience = 20 * time.Second

// TestKill kills the broker with SIGKILL.
func TestKill(t *testing.T) {
	testKill(t, killPlan{rounds: killRounds(t, 20)})
}

// TestKillAndStop ends the broker now with SIGKILL and now with SIGTERM.
func TestKillAndStop(t *testing.T) {
	testKill(t, killPlan{rounds: killRounds(t, 8), stops: true})
}

// TestKillLongQueue kills it while queues that only the disk has grow, and are
// drained.
func TestKillLongQueue(t *testing.T) {
	testKill(t, killPlan{rounds: killRounds(t, 10), long: 20000})
}

func testKill(t *testing.T, plan killPlan) {
	plan.program = killBuild(t, os.Getenv("PENSTOCK_KILL_RACE") == "1")
	r := newKillRun(t, plan)
	r.work()
	t.Log(r.report())
	for _, v := range r.violations {
		t.Error(v)
	}
	if t.Failed() {
		t.Logf("seed %d; the program's log ends with:\n%s", r.plan.seed, r.tail())
	}
}

// TestKillFindsFault builds the broker with defects that can be switched on,
// and wants the kill test to find each that a kill can show.
func TestKillFindsFault(t *testing.T) {
	program := killBuild(t, false, "-tags", "faults")
	for _, f := range []struct {
		name   string
		number int
		rounds int
		slow   bool // takes luck and so many rounds: tried only with PENSTOCK_SOAK=1
	}{
		{"acknowledgement before commit", 1, 10, false},
		{"PUBCOMP before release", 2, 10, false},
		{"sequence reuse", 3, 60, true},
		{"SUBACK before commit", 5, 13, true},
		{"PUBREL before PUBREC is durable", 6, 10, false},
		{"QoS 2 delivery before it is durable", 7, 10, false},
		{"QoS 2 identifier apart from its message", 8, 10, false},
	} {
		if f.slow && os.Getenv("PENSTOCK_SOAK") != "1" {
			continue
		}
		t.Run(strings.ReplaceAll(f.name, " ", "-"), func(t *testing.T) {
			r := newKillRun(t, killPlan{program: program, rounds: f.rounds, fault: f.number})
			r.work()
			t.Log(r.report())
			if len(r.violations) == 0 {
				t.Fatalf("got no violation in %d rounds with defect %d switched on (seed %d)", f.rounds, f.number, r.plan.seed)
			}
			t.Logf("found: %s", strings.Join(r.violations[:min(2, len(r.violations))], "; "))
		})
	}
}

// killRounds returns how many rounds to go.
func killRounds(t *testing.T, usual int) int {
	if v := os.Getenv("PENSTOCK_KILL_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			t.Fatalf("PENSTOCK_KILL_ROUNDS: %q is not a number of rounds", v)
		}
		return n
	}
	if os.Getenv("PENSTOCK_SOAK") == "1" {
		return 5 * usual
	}
	return usual
}

// killBuild builds the program and returns its path.
func killBuild(t *testing.T, race bool, flags ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	path := filepath.Join(t.TempDir(), "penstock")
	args := append([]string{"build", "-o", path}, flags...)
	cgo := "CGO_ENABLED=0"
	if race {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.CommandContext(ctx, "go", append(args, ".")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, out)
	}
	return path
}

// killPlan is what a run does.
type killPlan struct {
	program string
	rounds  int
	stops   bool // some rounds end with SIGTERM
	long    int  // messages of a long queue, for clients that sleep until it is that long; 0: none
	fault   int  // defect to switch on; 0: none
	seed    uint64
}

// killRun is a broker that is killed over and over, and its clients.
type killRun struct {
	t    *testing.T
	plan killPlan
	rng  *rand.Rand
	dir  string
	log  *os.File

	publishers  []*killPublisher
	subscribers []*killSubscriber // all persistent
	streams     []*killStream
	byName      map[string]*killStream // by publisher, topic and QoS

	long    *killLongQueue // nil: there is none
	damaged bool           // so its log may say

	process  *killProcess
	kills    int
	early    int // of them: before it served
	stops    int
	recovery []time.Duration // exec to first CONNACK

	acked atomic.Int64 // messages that the broker has taken over
	taken atomic.Int64 // deliveries

	mu         sync.Mutex
	addr       string
	execAt     time.Time // zero once a client is connected
	round      int
	violations []string
	broke      chan struct{} // closed with the first violation
	cancel     context.CancelFunc
	up         chan time.Duration // the recovery, once a client is connected
}

func newKillRun(t *testing.T, plan killPlan) *killRun {
	t.Helper()
	if plan.seed = rand.Uint64(); os.Getenv("PENSTOCK_KILL_SEED") != "" {
		n, err := strconv.ParseUint(os.Getenv("PENSTOCK_KILL_SEED"), 10, 64)
		if err != nil {
			t.Fatalf("PENSTOCK_KILL_SEED: %v", err)
		}
		plan.seed = n
	}
	dir := t.TempDir()
	if keep := os.Getenv("PENSTOCK_KILL_DIR"); keep != "" {
		var err error
		if dir, err = os.MkdirTemp(keep, "kill-"); err != nil {
			t.Fatal(err)
		}
		t.Logf("data and log are in %s", dir)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	r := &killRun{
		t: t, plan: plan, rng: rand.New(rand.NewPCG(plan.seed, 1)), dir: dir, log: log,
		byName: make(map[string]*killStream), addr: "127.0.0.1:0",
		broke: make(chan struct{}), up: make(chan time.Duration, 1),
	}
	type to struct {
		topic  string
		qos    byte
		retain bool
	}
	for _, p := range []struct {
		id      string
		version byte
		clean   bool
		window  int
		pause   time.Duration
		to      []to
	}{
		{"p1", 4, false, 24, 0, []to{{"a/1", 1, false}, {"a/1", 2, false}, {"a/2", 2, false}}},
		{"p2", 5, false, 24, 0, []to{{"a/1", 1, false}, {"b/1", 1, false}, {"b/1", 2, false}}},
		{"p3", 5, false, 16, 0, []to{{"b/1", 2, false}, {"b/2", 2, false}}},
		{"p4", 4, true, 16, 0, []to{{"a/2", 1, false}, {"b/2", 1, false}}},
		{"p5", 5, false, 8, 5 * time.Millisecond, []to{{"r/1", 1, true}, {"r/2", 1, true}, {"s/1", 1, false}, {"s/1", 2, false}}},
		{"p6", 4, false, 4, 10 * time.Millisecond, []to{{"r/3", 1, true}, {"s/2", 2, false}, {"s/2", 1, false}}},
		// Two slow ones to a subscriber of their own: nothing of QoS 1 is stored
		// while that is there, and little is in flight when the broker dies.
		{"p7", 5, false, 1, 2 * time.Millisecond, []to{{"d/1", 1, false}}},
		{"p8", 4, false, 2, 10 * time.Millisecond, []to{{"d/2", 2, false}}},
	} {
		pub := &killPublisher{
			killClient: killClient{run: r, id: p.id, version: p.version, clean: p.clean},
			window:     p.window, pause: p.pause, left: -1, used: make(map[uint16]bool), room: make(chan struct{}, 1),
		}
		for _, to := range p.to {
			r.stream(pub, to.topic, to.qos, to.retain)
		}
		r.publishers = append(r.publishers, pub)
	}
	if plan.long > 0 {
		r.long = newKillLongQueue(r, plan.long)
	}
	return r
}

// stream adds a stream to a publisher.
func (r *killRun) stream(from *killPublisher, topic string, qos byte, retain bool) *killStream {
	st := &killStream{from: from, topic: topic, qos: qos, retain: retain}
	from.streams = append(from.streams, st)
	r.streams = append(r.streams, st)
	r.byName[from.id+" "+topic+" "+strconv.Itoa(int(qos))] = st
	return st
}

// subscriber adds a persistent subscriber and has it subscribe.
func (r *killRun) subscriber(ctx context.Context, id string, version, qos byte, receiveMax uint16, filters ...string) (*killSubscriber, error) {
	s := &killSubscriber{
		killClient: killClient{run: r, id: id, version: version, receiveMax: receiveMax},
		qos:        qos, filters: filters, seen: make(map[*killStream]*killSeen), inbound: make(map[uint16]string),
	}
	r.subscribers = append(r.subscribers, s)
	return s, s.subscribe(ctx)
}

// parse returns the stream and the number that a payload names.
func (r *killRun) parse(topic, payload string) (*killStream, uint64) {
	f := strings.SplitN(payload, " ", 4)
	if len(f) != 4 {
		return nil, 0
	}
	seq, err := strconv.ParseUint(f[2], 10, 64)
	if err != nil {
		return nil, 0
	}
	return r.byName[f[0]+" "+topic+" "+f[1]], seq
}

func (r *killRun) address() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.addr
}

// connected is told of every CONNACK; the first after a start ends the
// recovery.
func (r *killRun) connected() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.execAt.IsZero() {
		r.up <- time.Since(r.execAt)
		r.execAt = time.Time{}
	}
}

// violated records a broken promise and returns it as an error.
func (r *killRun) violated(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.violations) == 0 {
		close(r.broke)
		time.AfterFunc(500*time.Millisecond, r.cancel) // what comes until then may explain it
	}
	if len(r.violations) < 20 {
		r.violations = append(r.violations, fmt.Sprintf("round %d: %v", r.round, err))
	}
	return err
}

func (r *killRun) broken() bool {
	select {
	case <-r.broke:
		return true
	default:
		return false
	}
}

// work does all rounds and checks what is left at the end. It ends early when
// a promise was broken.
func (r *killRun) work() {
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute+time.Duration(r.plan.rounds)*5*time.Second)
	defer cancel()
	r.cancel = cancel
	defer func() { // whatever happens
		if r.process != nil {
			_ = r.process.end(syscall.SIGKILL) // it may have ended
		}
	}()
	r.restart(ctx)
	if r.broken() {
		return
	}
	var sleepers []*killSubscriber
	for _, s := range []struct {
		id           string
		version, qos byte
		receiveMax   uint16
		sleeper      bool
		filters      []string
	}{
		{"s1", 4, 2, 0, false, []string{"a/#", "b/#"}},
		{"s2", 5, 2, 40, false, []string{"a/1", "b/1", "s/1", "r/2"}},
		{"s3", 4, 1, 0, false, []string{"a/#", "b/#", "s/#"}},
		{"s4", 5, 1, 0, true, []string{"a/+"}},
		{"s5", 4, 2, 0, true, []string{"b/#", "a/1", "r/#"}},
		{"s6", 5, 2, 20, true, []string{"s/#", "a/2"}},
		{"s7", 5, 2, 0, true, []string{"d/#"}},
	} {
		sub, err := r.subscriber(ctx, s.id, s.version, s.qos, s.receiveMax, s.filters...)
		if err != nil {
			r.violated("subscriber %s: %v", s.id, err)
			return
		}
		if s.sleeper {
			sleepers = append(sleepers, sub)
		}
		sub.start(ctx)
	}
	if r.long != nil && !r.long.subscribe(ctx) {
		return
	}
	var work sync.WaitGroup
	pubCtx, stopPublishers := context.WithCancel(ctx)
	defer func() {
		stopPublishers()
		work.Wait()
		for _, s := range r.subscribers {
			s.stop()
		}
	}()
	for _, p := range r.publishers {
		work.Go(func() { p.work(pubCtx) })
	}
	for i := range r.plan.rounds {
		r.mu.Lock()
		r.round = i + 1
		r.mu.Unlock()
		r.oneRound(ctx, sleepers)
		if r.broken() {
			return
		}
	}
	r.finish(ctx, &work)
}

// oneRound lets the clients work for a moment, and restarts the broker.
func (r *killRun) oneRound(ctx context.Context, sleepers []*killSubscriber) {
	whileDown := r.rng.IntN(2) == 0
	if !whileDown {
		r.turn(ctx, sleepers)
	}
	if r.long != nil {
		r.long.turn(ctx)
	}
	before := r.acked.Load()
	r.await(ctx, "acknowledgement after the start", func() bool { return r.acked.Load() > before })
	kill := time.NewTimer(50*time.Millisecond + time.Duration(r.rng.Int64N(int64(750*time.Millisecond))))
	defer kill.Stop()
	roundCtx, endRound := context.WithCancel(ctx)
	defer endRound()
	var side sync.WaitGroup
	side.Go(func() { r.checkRetained(roundCtx) })
	if r.round%4 == 1 {
		// A session that is made in the middle of the load, and the broker dies
		// as soon as it has sent the SUBACK: what follows must be kept for it.
		side.Go(func() {
			_, _ = r.subscriber(ctx, fmt.Sprintf("late%d", r.round), 4+byte(r.round/4%2), 2, 0, "s/#") // fails only with the run
			kill.Reset(time.Duration(r.round%3) * 5 * time.Millisecond)
		})
	}
	select {
	case <-kill.C:
	case <-ctx.Done():
	case <-r.broke:
	case <-r.process.done:
	}
	if r.plan.stops && r.rng.IntN(2) == 0 {
		r.stops++
		r.end(syscall.SIGTERM)
	} else {
		r.kills++
		r.end(syscall.SIGKILL)
	}
	endRound()
	if whileDown {
		r.turn(ctx, sleepers)
	}
	for r.rng.IntN(2) == 0 && !r.broken() { // and once more, in the middle of the recovery
		r.killStart(ctx)
	}
	r.restart(ctx)
	side.Wait()
}

// killStart starts the broker, and kills it at a random moment of the first 200
// ms, sooner rather than later, or as soon as it serves.
func (r *killRun) killStart(ctx context.Context) {
	u := r.rng.Float64()
	at := time.NewTimer(time.Duration(u * u * u * float64(200*time.Millisecond)))
	defer at.Stop()
	if !r.launch(ctx) {
		return
	}
	select {
	case <-at.C:
		r.early++
	case <-r.up:
	case <-r.process.done: // by itself, for want of its port
	}
	r.kills++
	_ = r.process.end(syscall.SIGKILL) // it may have ended
}

// turn sends some sleepers offline, and brings some back.
func (r *killRun) turn(ctx context.Context, sleepers []*killSubscriber) {
	for _, s := range sleepers {
		switch online := s.cancel != nil; {
		case online && r.rng.IntN(2) == 0:
			s.stop()
		case !online && r.rng.IntN(3) == 0:
			s.start(ctx)
		}
	}
}

// finish lets the publishers end their work and everything arrive, and checks
// what there is then.
func (r *killRun) finish(ctx context.Context, work *sync.WaitGroup) {
	for _, s := range r.subscribers {
		if s.cancel == nil {
			s.start(ctx)
		}
	}
	for _, p := range r.publishers {
		p.stop()
	}
	published := make(chan struct{})
	go func() { work.Wait(); close(published) }()
	r.await(ctx, "publishers' last acknowledgement", func() bool {
		select {
		case <-published:
			return true
		default:
			return false
		}
	})
	if r.broken() {
		return
	}
	r.await(ctx, "last delivery", func() bool {
		for _, s := range r.subscribers {
			if s.behind() != "" {
				return false
			}
		}
		return true
	})
	for _, s := range r.subscribers {
		if b := s.behind(); b != "" {
			r.violated("subscriber %s: %s", s.id, b)
		}
		if n := s.missing(); n > 0 {
			r.violated("subscriber %s: %d messages never came", s.id, n)
		}
	}
	r.checkRetained(ctx)
	r.end(syscall.SIGTERM)
}

// checkRetained reads every retained message. It must not be older than what
// was acknowledged before it was asked for. When the connection ends, it ends.
func (r *killRun) checkRetained(ctx context.Context) {
	k := &killClient{run: r, id: "reader", version: 5, clean: true}
	c, err := k.connect(ctx)
	if err != nil {
		return
	}
	defer c.conn.Close()
	for i, st := range r.streams {
		acked := st.acked.Load()
		if !st.retain || acked == 0 {
			continue
		}
		c.put(mqttSubscribe<<4|2, []byte{0, byte(i + 1)}, c.properties(nil), mqttString(st.topic), []byte{1})
		if c.w.Flush() != nil {
			return
		}
		_ = c.conn.SetReadDeadline(time.Now().Add(killPatience)) // a failure shows at the read
		for {
			first, body, err := c.read()
			var timeout interface{ Timeout() bool }
			if errors.As(err, &timeout) && timeout.Timeout() {
				r.violated("retained message of %s is not there, %d was acknowledged", st.topic, acked)
			}
			if err != nil {
				return
			}
			if first>>4 != mqttPublish {
				continue
			}
			topic, qos, id, payload, ok := killParse(5, first, body)
			if !ok {
				r.violated("reader: got PUBLISH %x % x", first, body)
				return
			}
			if qos > 0 {
				c.putAck(mqttPuback, id) // leaves with the next flush
				_ = c.w.Flush()          // a failure shows at the read
			}
			if topic != st.topic || first&1 == 0 {
				continue // live
			}
			if from, seq := r.parse(topic, payload); from != st || seq < acked {
				r.violated("retained message of %s: got %.60q, want number %d or later", topic, payload, acked)
			}
			break
		}
	}
}

// await polls until ok returns true. It gives up when nothing at all has moved
// for killPatience.
func (r *killRun) await(ctx context.Context, what string, ok func() bool) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(killPatience)
	defer late.Stop()
	for last := int64(0); !ok(); {
		if now := r.acked.Load() + r.taken.Load(); now != last {
			last = now
			late.Reset(killPatience)
		}
		select {
		case <-tick.C:
		case <-r.broke:
			return
		case <-ctx.Done():
			r.violated("%s: the run took too long", what)
			return
		case <-late.C:
			r.violated("%s: it did not come in %v", what, killPatience)
			return
		}
	}
}

// restart starts the broker on the same data and waits for the first CONNACK.
func (r *killRun) restart(ctx context.Context) {
	if r.broken() {
		return
	}
	probe, stopProbe := context.WithCancel(ctx)
	defer stopProbe()
	go func() { // at first no client is there
		if c, err := (&killClient{run: r, id: "probe", version: 4, clean: true}).connect(probe); err == nil {
			c.conn.Close()
		}
	}()
	late := time.NewTimer(killPatience)
	defer late.Stop()
	for range 5 {
		if !r.launch(ctx) {
			return
		}
		select {
		case d := <-r.up:
			r.recovery = append(r.recovery, d)
			return
		case <-r.process.done:
			if strings.Contains(r.tail(), "address already in use") {
				// Somebody took the port while the broker was down.
				r.mu.Lock()
				r.addr = "127.0.0.1:0"
				r.mu.Unlock()
				continue
			}
			r.violated("broker did not start: %v", r.process.err)
		case <-late.C:
			r.violated("broker gave no CONNACK in %v", killPatience)
		case <-ctx.Done():
			r.violated("start: the run took too long")
		case <-r.broke:
		}
		return
	}
	r.violated("broker found no free port")
}

// killProcess is one life of the broker.
type killProcess struct {
	cmd  *exec.Cmd
	read chan struct{} // closed when all of its log is read
	done chan struct{} // closed when it has ended
	err  error         // set before done is closed
}

// launch starts the broker, where possible on the port it had before, for
// clients are at it already.
func (r *killRun) launch(ctx context.Context) bool {
	cmd := exec.CommandContext(ctx, r.plan.program, "serve", "--data", filepath.Join(r.dir, "data"), "--mqtt", r.address(), "--http", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "PENSTOCK_FAULT="+strconv.Itoa(r.plan.fault))
	out, in, err := os.Pipe()
	if err != nil {
		r.violated("start: %v", err)
		return false
	}
	cmd.Stderr = in // the program's log
	fmt.Fprintf(r.log, "--- round %d\n", r.round)
	r.mu.Lock()
	select {
	case <-r.up:
	default:
	}
	r.execAt = time.Now()
	r.mu.Unlock()
	err = cmd.Start()
	in.Close()
	if err != nil {
		out.Close()
		r.violated("start: %v", err)
		return false
	}
	p := &killProcess{cmd: cmd, done: make(chan struct{}), read: make(chan struct{})}
	r.process = p
	go func() {
		defer out.Close()
		defer close(p.read)
		lines := bufio.NewScanner(out)
		for lines.Scan() { // to the end, or the broker would wait for us
			fmt.Fprintln(r.log, lines.Text())
			if strings.Contains(lines.Text(), "DATA RACE") || strings.Contains(lines.Text(), "level=ERROR") && !(r.damaged && strings.Contains(lines.Text(), "was salvaged")) {
				r.violated("broker's log: %s", lines.Text())
			}
			if _, addr, ok := strings.Cut(lines.Text(), " mqtt.tcp="); ok {
				addr, _, _ = strings.Cut(addr, " ")
				r.mu.Lock()
				r.addr = addr
				r.mu.Unlock()
			}
		}
	}()
	go func() {
		p.err = cmd.Wait()
		<-p.read
		close(p.done)
	}()
	return true
}

// end ends the broker, which has to be alive, by a signal.
func (r *killRun) end(sig syscall.Signal) {
	if err := r.process.end(sig); err != nil {
		r.violated("%v: %v", sig, err)
	}
}

// end sends the signal and waits for the end. With SIGTERM it has to be a
// success, and in time.
func (p *killProcess) end(sig syscall.Signal) error {
	select {
	case <-p.done:
		return fmt.Errorf("broker has ended by itself: %v", p.err)
	default:
	}
	if err := p.cmd.Process.Signal(sig); err != nil {
		return err
	}
	late := time.NewTimer(killPatience)
	defer late.Stop()
	select {
	case <-p.done:
		if sig == syscall.SIGTERM && p.err != nil {
			return fmt.Errorf("broker ended with %v, want success", p.err)
		}
		return nil
	case <-late.C:
		_ = p.cmd.Process.Kill() // the wait below tells
		<-p.done
		return fmt.Errorf("broker did not end in %v", killPatience)
	}
}

// tail returns the end of the program's log, from its last start on.
func (r *killRun) tail() string {
	b, err := os.ReadFile(r.log.Name())
	if err != nil {
		return err.Error()
	}
	b = b[max(0, bytes.LastIndex(b, []byte("--- round"))):]
	return string(b[max(0, len(b)-8000):])
}

// report returns the figures of a run.
func (r *killRun) report() string {
	var sent uint64
	for _, st := range r.streams {
		sent += st.sent.Load()
	}
	var deliveries, duplicates int
	for _, s := range r.subscribers {
		s.mu.Lock()
		deliveries += s.deliveries
		duplicates += s.duplicates
		s.mu.Unlock()
	}
	d := slices.Clone(r.recovery)
	slices.SortFunc(d, cmp.Compare[time.Duration])
	if len(d) == 0 {
		d = []time.Duration{0}
	}
	more := ""
	if r.long != nil {
		more = "; " + r.long.report()
	}
	return fmt.Sprintf("seed %d: %d rounds, %d kills, %d of them before it served, %d stops; %d messages sent, %d acknowledged; %d sessions, %d deliveries, %d of them duplicates at QoS 1; exec to first CONNACK median %v, max %v%s",
		r.plan.seed, r.round, r.kills, r.early, r.stops, sent, r.acked.Load(), len(r.subscribers), deliveries, duplicates,
		d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond), more)
}
