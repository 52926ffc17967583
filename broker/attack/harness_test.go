//go:build attack

// Package attack attacks the real program and watches a good client meanwhile:
// make attack. Attackers and good client live in the test, so that the memory
// of the process penstock is the broker's own.
package attack

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	// patience bounds every wait for something that should come soon.
	patience = 20 * time.Second

	// attempts is how often an attack is measured at most, and spoilt how often
	// besides. The machine is shared, so a measurement may be spoilt by a
	// neighbour; a broker that is really slow under the attack fails all of them.
	// Spoilt is one during which a broker that is not attacked was slow too.
	attempts = 3
	spoilt   = 3

	// most is what a good client may wait: 99 of 100 publications arrive, and 99
	// of 100 CONNECTs are accepted, within it.
	most = 50 * time.Millisecond

	// returned is how much more than before the attack the broker may have
	// resident once it is over.
	returned = 16 << 20

	// returnWithin bounds the wait for that.
	returnWithin = time.Minute

	mib = 1 << 20
)

// program is the binary under attack.
var program string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "penstock-attack")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	program = filepath.Join(dir, "penstock")
	if out, err := exec.Command("go", "build", "-o", program, "penstock").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build: %w\n%s", err, out)
	}
	return m.Run(), nil
}

// attack is one way to hurt the broker.
type attack struct {
	name   string
	config string        // of the section [broker], beside what serve writes
	files  int           // open files that the broker may have; 0: as many as this test
	last   time.Duration // how long it lasts; 0: 3 s
	// bound is how much the broker may grow meanwhile, and why the reason.
	bound int
	why   string
	// stays is how much of it may stay: what the broker was told to keep.
	stays int
	// connects says that fresh CONNECTs have to be as quick as publications.
	// Otherwise they are counted, and have to be accepted only.
	connects bool
	// through is the listener of fresh CONNECTs; empty: the plain one.
	through string
	// refuses says that a fresh CONNECT may be refused meanwhile.
	refuses bool
	// prepare readies the arena before the broker is measured; nil: nothing.
	prepare func(a *arena)
	// run attacks until ctx ends.
	run func(ctx context.Context, a *arena)
	// moved is a counter of /metrics that has to have grown; empty: none.
	moved string
	// after checks what has to be true once the attack is over; nil: nothing.
	after func(a *arena)
}

// arena is where one attack takes place.
type arena struct {
	t    *testing.T
	b    *broker
	done atomic.Int64 // what the attack did, in its own unit

	mu   sync.Mutex
	open []net.Conn // to be closed when the attack is over
}

// result is what was measured of one attack.
type result struct {
	name             string
	attempt          int
	before, during   figures
	control          figures // of a broker that is not attacked, meanwhile
	base, peak, then int     // resident bytes
	bound            int
	done             int64
	returnedIn       time.Duration
	logged           int64 // bytes
}

// TestAttack runs every attack of the table, each against a broker of its own.
func TestAttack(t *testing.T) {
	var results []result
	control := serve(t, "", 0)
	for _, a := range slices.Concat(attacks, listenerAttacks) {
		t.Run(a.name, func(t *testing.T) {
			bad := 0
			for attempt := 1; ; attempt++ {
				r := measure(t, a, control)
				r.attempt = attempt
				late := r.during.trips.p99() >= most || a.connects && r.during.connects.p99() >= most
				if late && r.control.trips.p99() >= most/2 {
					bad = min(bad+1, spoilt)
				}
				if late && attempt < attempts+bad && !t.Failed() {
					t.Logf("%s; measured again, for the machine is shared", r)
					continue
				}
				results = append(results, r)
				t.Log(r)
				if late {
					t.Errorf("99 of 100 publications within %v, CONNECTs within %v, in the last of %d measurements; want less than %v",
						r.during.trips.p99(), r.during.connects.p99(), attempt, most)
				}
				if r.peak > r.base+a.bound {
					t.Errorf("grew by %d MiB during the attack, want at most %d MiB: %s", (r.peak-r.base)/mib, a.bound/mib, a.why)
				}
				if r.then > r.base+returned+a.stays {
					t.Errorf("still %d MiB more than before %v after the attack, want at most %d MiB", (r.then-r.base)/mib, returnWithin, (returned+a.stays)/mib)
				}
				return
			}
		})
	}
	var b strings.Builder
	b.WriteString("| attack | done | p99 before | p99 during | worst | p99 elsewhere | CONNECT p99 | RSS before | peak | allowed | after | logged |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range results {
		b.WriteString(r.String() + "\n")
	}
	t.Log("\n" + b.String())
}

// String returns the result as a row of a table.
func (r result) String() string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
	m := func(n int) string { return fmt.Sprintf("%.1f MiB", float64(n)/mib) }
	name := r.name
	if r.attempt > 1 {
		name += fmt.Sprintf(" (measurement %d)", r.attempt)
	}
	return fmt.Sprintf("| %s | %d | %s | %s | %s | %s | %s | %s | %s | %s | %s, %.0f s | %.1f kB |", name, r.done,
		ms(r.before.trips.p99()), ms(r.during.trips.p99()), ms(r.during.trips.worst()), ms(r.control.trips.p99()), ms(r.during.connects.p99()),
		m(r.base), m(r.peak), m(r.base+r.bound), m(r.then), r.returnedIn.Seconds(), float64(r.logged)/1000)
}

// measure runs an attack once.
func measure(t *testing.T, a attack, control *broker) result {
	b := serve(t, a.config, a.files)
	defer b.stop()
	ar := &arena{t: t, b: b}
	defer ar.closeAll()
	if a.prepare != nil {
		a.prepare(ar)
	}
	other := newGood(t, control)
	defer other.close()
	g := newGood(t, b)
	g.through = cmp.Or(a.through, "tcp")
	defer g.close()
	r := result{name: a.name, bound: a.bound}
	for range 10 { // a neighbour may be at it
		if r.before = g.watch(500*time.Millisecond, true); r.before.trips.p99() < most/4 {
			break
		}
	}
	b.clearPeak()
	r.base = b.memory("VmRSS")
	had := b.metric(a.moved)
	r.logged = -b.logSize()

	last := a.last
	if last == 0 {
		last = 3 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), last)
	defer cancel()
	over := make(chan struct{})
	go func() { defer close(over); a.run(ctx, ar) }()
	watched := make(chan figures, 1)
	go func() { watched <- other.watch(last, false) }()
	r.during = g.watch(last, true)
	r.control = <-watched
	cancel()
	<-over
	r.done = ar.done.Load()
	r.logged += b.logSize()
	r.peak = b.memory("VmHWM")
	if r.done == 0 {
		t.Error("the attack did nothing")
	}
	if n := r.during.refused; n > 0 && !a.refuses {
		t.Errorf("%d of %d fresh CONNECTs were not accepted during the attack: %v", n, n+len(r.during.connects), r.during.refusal)
	}
	if a.moved != "" && b.metric(a.moved) <= had {
		t.Errorf("%s did not move", a.moved)
	}
	ar.closeAll()
	if a.after != nil {
		a.after(ar)
	}
	ended := time.Now()
	for {
		if r.then = b.memory("VmRSS"); r.then <= r.base+returned+a.stays || time.Since(ended) > returnWithin {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.returnedIn = time.Since(ended)
	if f := g.watch(500*time.Millisecond, true); f.refused > 0 {
		t.Errorf("%d fresh CONNECTs were not accepted after the attack: %v", f.refused, f.refusal)
	}
	return r
}

// latencies are how long something took.
type latencies []time.Duration

// p99 returns what 99 of 100 took at most.
func (l latencies) p99() time.Duration {
	if len(l) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(l))
	return sorted[(len(sorted)*99+99)/100-1]
}

func (l latencies) worst() time.Duration { return slices.Max(append(l, 0)) }

// figures are what a good client saw.
type figures struct {
	trips    latencies // from PUBLISH of QoS 1 to its delivery
	connects latencies // from dialling to CONNACK
	refused  int       // fresh CONNECTs that were not accepted
	refusal  error     // why the last of them was not
}

// good is a publisher and a subscriber that behave.
type good struct {
	t        *testing.T
	b        *broker
	through  string // the listener of fresh CONNECTs
	pub, sub *client
	arrived  chan time.Duration
	failed   chan error
	acked    atomic.Int64
}

func newGood(t *testing.T, b *broker) *good {
	g := &good{t: t, b: b, arrived: make(chan time.Duration, 10000), failed: make(chan error, 2)}
	var err error
	if g.pub, err = b.connect(0, hello{id: "good-pub", clean: true}); err != nil {
		t.Fatal(err)
	}
	if g.sub, err = b.connect(0, hello{id: "good-sub", clean: true}); err != nil {
		t.Fatal(err)
	}
	if err := g.sub.subscribe(1, "good/#"); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			if _, _, err := g.pub.read(); err != nil {
				g.failed <- fmt.Errorf("publisher: %w", err)
				return
			}
			g.acked.Add(1)
		}
	}()
	go func() {
		for {
			first, body, err := g.sub.read()
			if err != nil {
				g.failed <- fmt.Errorf("subscriber: %w", err)
				return
			}
			if first>>4 != publish {
				continue
			}
			n := 2 + int(binary.BigEndian.Uint16(body))
			sent := time.Unix(0, int64(binary.BigEndian.Uint64(body[n+2:])))
			g.arrived <- time.Since(sent)
			if _, err := g.sub.Write(packet(puback<<4, body[n:n+2])); err != nil {
				g.failed <- fmt.Errorf("subscriber: %w", err)
				return
			}
		}
	}()
	return g
}

func (g *good) close() { g.pub.Close(); g.sub.Close() }

// watch publishes 50 messages and, if connects, dials 10 times a second for as
// long as told, and waits until all has arrived. Messages leave on time also
// when earlier ones are late.
func (g *good) watch(d time.Duration, connects bool) (f figures) {
	start := time.Now()
	fresh := make(chan struct{})
	defer func() { <-fresh }()
	go func() {
		defer close(fresh)
		for i := 0; connects && time.Since(start) < d; i++ {
			time.Sleep(time.Until(start.Add(time.Duration(i) * 100 * time.Millisecond)))
			began := time.Now()
			c, err := g.b.connectTo(g.through, 0, hello{id: fmt.Sprint("good-", i), clean: true})
			if err != nil {
				f.refused++
				f.refusal = err
				continue
			}
			f.connects = append(f.connects, time.Since(began))
			_, _ = c.Write([]byte{disconnect << 4, 0}) // gone in any case
			c.Close()
		}
	}()
	n := 0
	for ; time.Since(start) < d; n++ {
		time.Sleep(time.Until(start.Add(time.Duration(n) * 20 * time.Millisecond)))
		id := uint16(1 + n%60000)
		payload := binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
		if _, err := g.pub.Write(packet(publish<<4|2, str("good/round"), u16(id), payload)); err != nil {
			g.t.Errorf("good publisher was cut off: %v\n%s", err, g.b.said())
			return f
		}
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	for range n {
		select {
		case took := <-g.arrived:
			f.trips = append(f.trips, took)
		case err := <-g.failed:
			g.t.Errorf("good client was cut off: %v\n%s", err, g.b.said())
			return f
		case <-late.C:
			g.t.Errorf("%d of %d messages of the good client arrived within %v", len(f.trips), n, patience)
			return f
		}
	}
	return f
}

// broker is the program under attack.
type broker struct {
	t          *testing.T
	cmd        *exec.Cmd
	dir        string
	mqtt, http string
	login      string            // user name and password of clients; empty: none
	listeners  map[string]string // by name
	exited     chan struct{}
}

var ready = regexp.MustCompile(`(?m)^.*penstock ready.*$`)

// serve starts the program on free ports. config is added to [broker]; files
// bounds its open files, 0 leaves them.
func serve(t *testing.T, config string, files int) *broker {
	t.Helper()
	b := &broker{t: t, dir: t.TempDir(), exited: make(chan struct{}), listeners: make(map[string]string)}
	file := filepath.Join(b.dir, "penstock.toml")
	text := fmt.Sprintf(`[log]
format = "logfmt"
[storage]
dir = %q
[hw]
backend = "off"
[api]
http = "127.0.0.1:0"
[broker]
%s
`, filepath.Join(b.dir, "data"), config)
	// Tables, as further listeners, come after the keys of [broker].
	if !strings.Contains(config, "[[broker.listener]]") {
		text += "[[broker.listener]]\nname = \"tcp\"\naddress = \"127.0.0.1:0\"\n"
	}
	if strings.Contains(config, "CERT") {
		cert, key := writeCertificate(t, b.dir)
		text = strings.NewReplacer("CERT", cert, "KEY", key).Replace(text)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b.cmd = exec.Command(program, "serve", "--config", file)
	if files > 0 {
		b.cmd = exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, files), program, "serve", "--config", file)
	}
	log, err := os.Create(filepath.Join(b.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	b.cmd.Stdout, b.cmd.Stderr = log, log
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // or an interrupted test leaves it
	b.cmd.Env = append(os.Environ(), "JOURNAL_STREAM=", "NOTIFY_SOCKET=")
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = b.cmd.Wait(); close(b.exited) }()
	t.Cleanup(b.stop)
	var line string
	eventually(t, "penstock ready", func() bool {
		line = ready.FindString(b.said())
		select {
		case <-b.exited:
			t.Fatalf("penstock has ended: %s", b.said())
		default:
		}
		return line != ""
	})
	for _, m := range regexp.MustCompile(`mqtt\.(\S+?)=(\S+)`).FindAllStringSubmatch(line, -1) {
		address := m[2][strings.Index(m[2], "://")+1:] // mqtts://host:port, ws://host:port/mqtt
		b.listeners[m[1]], _, _ = strings.Cut(strings.TrimPrefix(address, "//"), "/")
	}
	b.mqtt = b.listeners["tcp"]
	if m := regexp.MustCompile(` http=(\S+)`).FindStringSubmatch(line); m != nil {
		b.http = m[1]
	}
	if b.mqtt == "" || b.http == "" {
		t.Fatalf("no addresses in %q", line)
	}
	return b
}

// addDevice makes a login with a password that is its name.
func (b *broker) addDevice(name string) {
	b.t.Helper()
	cmd := exec.Command(program, "passwd", "--config", filepath.Join(b.dir, "penstock.toml"), "--device", name)
	cmd.Stdin = strings.NewReader(name + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("passwd: %v\n%s", err, out)
	}
}

// stop ends the program, and fails the test unless it ends well.
func (b *broker) stop() {
	select {
	case <-b.exited:
		if !b.cmd.ProcessState.Success() {
			b.t.Errorf("penstock ended with %v: %s", b.cmd.ProcessState, b.said())
		}
		return
	default:
	}
	_ = b.cmd.Process.Signal(os.Interrupt) // it may have ended meanwhile
	select {
	case <-b.exited:
		if !b.cmd.ProcessState.Success() {
			b.t.Errorf("penstock ended with %v: %s", b.cmd.ProcessState, b.said())
		}
	case <-time.After(patience):
		b.t.Errorf("penstock did not stop within %v", patience)
		_ = b.cmd.Process.Kill()
		<-b.exited
	}
	if strings.Contains(b.said(), "ended by a defect") {
		b.t.Errorf("a connection panicked: %s", b.said())
	}
}

func (b *broker) logSize() int64 {
	info, err := os.Stat(filepath.Join(b.dir, "log"))
	if err != nil {
		b.t.Fatal(err)
	}
	return info.Size()
}

// said returns the last of what the program logged.
func (b *broker) said() string {
	log, err := os.ReadFile(filepath.Join(b.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(log[max(0, len(log)-8000):])
}

// memory returns a size of the process in bytes: VmRSS is resident now, VmHWM
// the most since clearPeak.
func (b *broker) memory(field string) int {
	b.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.cmd.Process.Pid))
	if err != nil {
		b.t.Fatal(err)
	}
	m := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		b.t.Fatalf("no %s: penstock has ended: %s", field, b.said())
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		b.t.Fatal(err)
	}
	return kb << 10
}

// clearPeak forgets the most that was resident (proc(5), clear_refs).
func (b *broker) clearPeak() {
	b.t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", b.cmd.Process.Pid), []byte("5"), 0); err != nil {
		b.t.Fatal(err)
	}
}

// metric returns the sum of the series of /metrics whose name, with its labels,
// begins so.
func (b *broker) metric(name string) float64 {
	b.t.Helper()
	if name == "" {
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+b.http+"/metrics", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	req.Close = true // it has to get a connection each time
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	sum, found := 0.0, false
	for line := range strings.Lines(string(page)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			fields := strings.Fields(rest)
			if v, err := strconv.ParseFloat(fields[len(fields)-1], 64); err == nil {
				sum += v
				found = true
			}
		}
	}
	if !found {
		b.t.Fatalf("/metrics has no %s", name)
	}
	return sum
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: it did not come to pass", what)
}

// keep has c closed when the attack is over.
func (a *arena) keep(c net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open = append(a.open, c)
}

func (a *arena) closeAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.open {
		c.Close()
	}
	a.open = nil
}

// attacker returns a connected client of the attack, closed when it is over.
func (a *arena) attacker(n int, h hello) *client {
	c, err := a.b.connect(1+n, h)
	if err != nil {
		a.t.Errorf("attacker %d could not connect: %v", n, err)
		return nil
	}
	a.keep(c)
	return c
}

// pace calls do perSecond times a second until ctx ends, with the count so far.
func pace(ctx context.Context, perSecond int, do func(i int)) {
	start := time.Now()
	for i := 0; ctx.Err() == nil; {
		due := int(time.Since(start).Seconds() * float64(perSecond))
		for ; i < due && ctx.Err() == nil; i++ {
			do(i)
		}
		time.Sleep(time.Millisecond)
	}
}

// many runs n copies of do and waits for all of them.
func many(n int, do func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { do(i) })
	}
	wg.Wait()
}

// Packet types (2.1.2).
const (
	connect     = 1
	connack     = 2
	publish     = 3
	puback      = 4
	pubrec      = 5
	pubrel      = 6
	pubcomp     = 7
	subscribe   = 8
	suback      = 9
	unsubscribe = 10
	pingreq     = 12
	disconnect  = 14
	auth        = 15
)

// client speaks MQTT on the wire.
type client struct {
	net.Conn
	r       *bufio.Reader
	version byte
}

// hello is what a CONNECT says.
type hello struct {
	id             string
	version        byte // 0: 4
	clean          bool
	user, password string
	props          []byte // MQTT 5
	will           []byte // properties, topic and payload, as on the wire
	willQoS        byte
	willRetain     bool
}

// dial opens a connection from the attackers' address from, or from the good
// client's if that is 0: limits per address must not hit the good client.
func (b *broker) dial(from int, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, byte(from>>8), byte(from)+1)}}
	return d.Dial("tcp", address)
}

// connect opens a connection and waits for the CONNACK.
func (b *broker) connect(from int, h hello) (*client, error) { return b.connectTo("tcp", from, h) }

func (b *broker) connectTo(listener string, from int, h hello) (*client, error) {
	raw, err := b.dial(from, b.listeners[listener])
	if err != nil {
		return nil, err
	}
	sock, err := secure(raw, listener)
	if err != nil {
		raw.Close()
		return nil, err
	}
	if h.user == "" {
		h.user, h.password = b.login, b.login
	}
	return handshake(sock, h)
}

// handshake sends a CONNECT and waits for the CONNACK.
func handshake(sock net.Conn, h hello) (*client, error) {
	c := &client{Conn: sock, r: bufio.NewReaderSize(sock, 512), version: max(h.version, 4)}
	if h.version == 3 {
		c.version = 3
	}
	fail := func(err error) (*client, error) {
		sock.Close()
		return nil, err
	}
	if err := sock.SetDeadline(time.Now().Add(patience)); err != nil {
		return fail(err)
	}
	if _, err := sock.Write(connectPacket(h)); err != nil {
		return fail(err)
	}
	first, body, err := c.read()
	if err != nil {
		return fail(fmt.Errorf("no CONNACK: %w", err))
	}
	if first>>4 != connack || body[1] != 0 {
		return fail(fmt.Errorf("CONNACK % x % x", first, body))
	}
	if err := sock.SetDeadline(time.Time{}); err != nil {
		return fail(err)
	}
	return c, nil
}

func connectPacket(h hello) []byte {
	version, name := max(h.version, 4), "MQTT"
	if h.version == 3 {
		version, name = 3, "MQIsdp"
	}
	flags := byte(0)
	if h.clean {
		flags |= 2
	}
	if h.will != nil {
		flags |= 4 | h.willQoS<<3
		if h.willRetain {
			flags |= 32
		}
	}
	var login, props []byte
	if h.user != "" {
		flags |= 0xC0
		login = append(str(h.user), str(h.password)...)
	}
	if version == 5 {
		props = properties(h.props)
	}
	return packet(connect<<4, str(name), []byte{version, flags, 0, 0}, props, str(h.id), h.will, login)
}

// read returns the next packet.
func (c *client) read() (first byte, body []byte, err error) {
	if first, err = c.r.ReadByte(); err != nil {
		return 0, nil, err
	}
	n, err := binary.ReadUvarint(c.r)
	if err != nil {
		return 0, nil, err
	}
	body = make([]byte, n)
	_, err = io.ReadFull(c.r, body)
	return first, body, err
}

// await reads until a packet of a kind comes.
func (c *client) await(kind byte) ([]byte, error) {
	for {
		first, body, err := c.read()
		if err != nil || first>>4 == kind {
			return body, err
		}
	}
}

// subscribe subscribes to filters and waits for the SUBACK.
func (c *client) subscribe(qos byte, filters ...string) error {
	if _, err := c.Write(c.subscribePacket(qos, filters...)); err != nil {
		return err
	}
	_, err := c.await(suback)
	return err
}

func (c *client) subscribePacket(qos byte, filters ...string) []byte {
	parts := [][]byte{u16(1), c.none()}
	for _, f := range filters {
		parts = append(parts, str(f), []byte{qos})
	}
	return packet(subscribe<<4|2, parts...)
}

func (c *client) unsubscribePacket(filters ...string) []byte {
	parts := [][]byte{u16(1), c.none()}
	for _, f := range filters {
		parts = append(parts, str(f))
	}
	return packet(unsubscribe<<4|2, parts...)
}

// publishPacket returns a PUBLISH; flags are DUP and RETAIN.
func (c *client) publishPacket(topic string, qos, flags byte, id uint16, payload []byte) []byte {
	parts := [][]byte{str(topic)}
	if qos > 0 {
		parts = append(parts, u16(id))
	}
	return packet(publish<<4|qos<<1|flags, append(parts, c.none(), payload)...)
}

// none is empty properties, where the version has them.
func (c *client) none() []byte {
	if c.version == 5 {
		return []byte{0}
	}
	return nil
}

// drain reads and forgets what the broker sends.
func (c *client) drain() {
	go func() { _, _ = io.Copy(io.Discard, c.r) }()
}

func packet(first byte, parts ...[]byte) []byte {
	body := bytes.Join(parts, nil)
	return append(binary.AppendUvarint([]byte{first}, uint64(len(body))), body...)
}

func properties(p []byte) []byte { return append(binary.AppendUvarint(nil, uint64(len(p))), p...) }

func str(s string) []byte { return append(u16(uint16(len(s))), s...) }

func u16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
