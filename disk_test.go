package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The disk tests run the real program on disks that are full, fail or hang, and
// have it go on without a restart. Full disks are a tmpfs in a user namespace;
// faults are injected into the program's system calls by strace, which comes
// and goes. Both need a kernel that lets this user do so.

// diskQueue is the topic for the client that is away.
const diskQueue = "plant/queue"

// diskBroker is a running program with its data on a disk that a test can spoil.
type diskBroker struct {
	t         *testing.T
	cmd       *exec.Cmd
	done      chan struct{}
	data      string // as the program sees it
	out       string // file with all that it writes
	mqtt, api string // addresses
}

// startDisk starts the program. tmpfs, where not empty, is the size of the file
// system that it gets for its data; more is added to the section [storage].
func startDisk(t *testing.T, tmpfs, data, more string) *diskBroker {
	t.Helper()
	dir := t.TempDir()
	b := &diskBroker{t: t, data: data, out: filepath.Join(dir, "out"), done: make(chan struct{})}
	config := filepath.Join(dir, "penstock.toml")
	text := "[storage]\n" + more + "\n[broker]\nsys_interval = \"1s\"\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{killBuild(t, false), "serve", "--dev", "--config", config, "--data", data, "--mqtt", "127.0.0.1:0", "--http", "127.0.0.1:0"}
	if tmpfs != "" {
		// The shell and the program take each other's place, so the process is
		// the namespace's first and last.
		script := `mount -t tmpfs -o size=` + tmpfs + ` penstock "$1" || exit 77; shift; exec "$@"`
		args = append([]string{"unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", data}, args...)
	}
	b.cmd = exec.Command(args[0], args[1:]...)
	out, err := os.Create(b.out)
	if err != nil {
		t.Fatal(err)
	}
	b.cmd.Stdout, b.cmd.Stderr = out, out
	err = b.cmd.Start()
	out.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = b.cmd.Wait() // how it ended is in its output
		close(b.done)
	}()
	t.Cleanup(func() {
		_ = b.cmd.Process.Kill() // fails if it has ended
		<-b.done
		if t.Failed() {
			t.Logf("the program said:\n%s", readIf(b.out))
		}
	})
	find := func(pattern string) string {
		re := regexp.MustCompile(pattern)
		b.await("the program's start", func() bool { return re.MatchString(readIf(b.out)) })
		return re.FindStringSubmatch(readIf(b.out))[1]
	}
	b.mqtt, b.api = find(`  mqtt  tcp +(\S+:\d+)`), find(`  http +http://(\S+)`)
	find(`(  try )`) // the last line
	return b
}

// needs skips the test if a command does not succeed: the machine cannot do it.
func needs(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Skipf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
}

// await polls until ok returns true.
func (b *diskBroker) await(what string, ok func() bool) {
	b.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(killPatience)
	for !ok() {
		select {
		case <-b.done:
			if strings.Contains(b.cmd.ProcessState.String(), "77") {
				b.t.Skip("no tmpfs in a user namespace here")
			}
			b.t.Fatalf("%s: the program has ended: %v\n%s", what, b.cmd.ProcessState, readIf(b.out))
		case <-tick.C:
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("no %s within %s; readyz: %+v", what, killPatience, b.health())
		}
	}
}

// inside returns a path as this process sees it.
func (b *diskBroker) inside(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", b.cmd.Process.Pid, path)
}

// resize changes the size of the program's tmpfs.
func (b *diskBroker) resize(size string) {
	b.t.Helper()
	out, err := exec.Command("nsenter", "--target", strconv.Itoa(b.cmd.Process.Pid), "--user", "--mount", "--preserve-credentials",
		"mount", "-o", "remount,size="+size, b.data).CombinedOutput()
	if err != nil {
		b.t.Fatalf("remount: %v: %s", err, out)
	}
}

// free returns how many bytes are free on the program's disk.
func (b *diskBroker) free() int64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(b.inside(b.data), &st); err != nil {
		b.t.Fatal(err)
	}
	return int64(st.Bavail) * int64(st.Bsize)
}

// spoil has system calls of the program go wrong as strace's -e inject says,
// until the returned function is called.
func (b *diskBroker) spoil(inject ...string) (mend func()) {
	b.t.Helper()
	args := []string{"-f", "-p", strconv.Itoa(b.cmd.Process.Pid), "-o", "/dev/null"}
	for _, in := range inject {
		args = append(args, "-e", "inject="+in)
	}
	cmd := exec.Command("strace", args...)
	said, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	line, _ := bufio.NewReader(said).ReadString('\n')
	if !strings.Contains(line, "attached") {
		_ = cmd.Wait() // it has said why
		b.t.Skipf("strace cannot attach here: %s", line)
	}
	var once sync.Once
	mend = func() {
		once.Do(func() {
			_ = cmd.Process.Signal(os.Interrupt) // it detaches
			_ = cmd.Wait()                       // its status is the signal
		})
	}
	b.t.Cleanup(mend)
	return mend
}

type diskHealth struct {
	Status          int
	Ready, Degraded bool
	Reasons         []string
}

func (b *diskBroker) health() (h diskHealth) {
	resp, err := http.Get("http://" + b.api + "/readyz")
	if err != nil {
		return h
	}
	defer resp.Body.Close()
	h.Status = resp.StatusCode
	_ = json.NewDecoder(resp.Body).Decode(&h) // what is missing shows
	return h
}

// metric returns the value of a metric without labels.
func (b *diskBroker) metric(name string) string {
	b.t.Helper()
	resp, err := http.Get("http://" + b.api + "/metrics")
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindSubmatch(page)
	if m == nil {
		b.t.Fatalf("there is no metric %s", name)
	}
	return string(m[1])
}

// dial connects a client. A will to have a persistent session is clean == false.
func (b *diskBroker) dial(addr, id string, version byte, clean bool, keepAlive uint16) *killWire {
	b.t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	c := &killWire{conn: conn, r: bufio.NewReader(conn), w: bufio.NewWriterSize(conn, 1<<16), version: version}
	flags := byte(0)
	var props []byte
	if clean {
		flags = 2
	} else if version == 5 {
		props = []byte{17, 0, 1, 0x51, 0x80}
	}
	c.put(1<<4, mqttString("MQTT"), []byte{version, flags}, binary.BigEndian.AppendUint16(nil, keepAlive), c.properties(props), mqttString(id))
	first, body, err := byte(0), []byte(nil), c.w.Flush()
	if err == nil {
		first, body, err = c.read()
	}
	if err != nil || first != mqttConnack<<4 || body[1] != 0 {
		b.t.Fatalf("client %s: got %x % x, %v, want a CONNACK", id, first, body, err)
	}
	return c
}

// subscribe subscribes and waits for the SUBACK.
func (b *diskBroker) subscribe(c *killWire, qos byte, filter string) {
	b.t.Helper()
	c.put(mqttSubscribe<<4|2, []byte{0, 1}, c.properties(nil), mqttString(filter), []byte{qos})
	if err := c.w.Flush(); err != nil {
		b.t.Fatal(err)
	}
	if first, body, err := c.read(); err != nil || first != mqttSuback<<4 {
		b.t.Fatalf("subscribe: got %x % x, %v", first, body, err)
	}
}

// sleeper makes a persistent session that is subscribed to the queue and away.
func (b *diskBroker) sleeper() {
	c := b.dial(b.mqtt, "sleeper", 4, false, 0)
	b.subscribe(c, 1, diskQueue)
	c.put(mqttDisconnect << 4)
	_ = c.w.Flush() // the close below does as well
	c.conn.Close()
}

// next takes the next message that comes on a connection, acknowledges it, and
// returns its number.
func (b *diskBroker) next(c *killWire) (int64, error) {
	b.t.Helper()
	for {
		first, body, err := c.read()
		if err != nil {
			return 0, err
		}
		if first>>4 != mqttPublish {
			continue
		}
		_, _, id, payload, ok := killParse(4, first, body)
		n, err := strconv.ParseInt(strings.TrimRight(payload, "."), 10, 64)
		if !ok || err != nil {
			b.t.Fatalf("delivery %x % .40x, %v", first, body, err)
		}
		c.putAck(mqttPuback, id)
		if c.r.Buffered() == 0 {
			_ = c.w.Flush() // a failure shows at the read
		}
		return n, nil
	}
}

// drain takes all that waits for the sleeper at addr, and returns the numbers.
func (b *diskBroker) drain(addr string, want int64) (got []int64) {
	b.t.Helper()
	c := b.dial(addr, "sleeper", 4, false, 0)
	defer c.conn.Close()
	_ = c.conn.SetReadDeadline(time.Now().Add(killPatience)) // a failure shows at the read
	for int64(len(got)) < want {
		n, err := b.next(c)
		if err != nil {
			b.t.Fatalf("after %d of %d messages: %v", len(got), want, err)
		}
		got = append(got, n)
	}
	_ = c.w.Flush()
	// What it has acknowledged shall not come again: the broker has read it when
	// it answers.
	c.put(12 << 4)
	_ = c.w.Flush()
	for {
		first, _, err := c.read()
		if err != nil {
			b.t.Fatal(err)
		}
		if first>>4 == 13 {
			return got
		}
	}
}

// inOrder checks that got begins with the numbers from 1 to n.
func (b *diskBroker) inOrder(what string, got []int64, n int64) {
	b.t.Helper()
	for i := range n {
		if i >= int64(len(got)) || got[i] != i+1 {
			b.t.Fatalf("%s: message %d of %d is missing or not in its place: got %d messages, around it %v", what, i+1, n, len(got), got[max(0, int(i)-3):min(len(got), int(i)+3)])
		}
	}
}

// diskPublisher sends numbered messages to the queue with a window, until told
// to stop. Its PUBACKs must come in order.
type diskPublisher struct {
	sent, acked, refused atomic.Int64
	stop                 chan struct{}
	ended                chan error // gets one value
}

func (b *diskBroker) publisher(version byte, window int64, size int, keepAlive uint16) *diskPublisher {
	c := b.dial(b.mqtt, fmt.Sprintf("publisher%d", version), version, true, keepAlive)
	p := &diskPublisher{stop: make(chan struct{}), ended: make(chan error, 1)}
	var mu sync.Mutex // of c.w
	room := make(chan struct{}, 1)
	go func() {
		padding := strings.Repeat(".", size)
		defer func() {
			mu.Lock()
			_ = c.w.Flush() // a failure shows at the read
			mu.Unlock()
		}()
		for {
			for p.sent.Load()-p.acked.Load()-p.refused.Load() < window {
				select {
				case <-p.stop:
					return
				default:
				}
				n := p.sent.Load() + 1
				mu.Lock()
				c.put(mqttPublish<<4|2, mqttString(diskQueue), binary.BigEndian.AppendUint16(nil, uint16(1+n%60000)), c.properties(nil), strconv.AppendInt(nil, n, 10), []byte(padding))
				p.sent.Store(n)
				mu.Unlock()
			}
			mu.Lock()
			_ = c.w.Flush() // a failure shows at the read
			mu.Unlock()
			select {
			case <-p.stop:
				return
			case <-room:
			}
		}
	}()
	if keepAlive > 0 {
		b.pinger(c, &mu, keepAlive, p.stop)
	}
	go func() {
		p.ended <- func() error {
			for {
				first, body, err := c.read()
				switch {
				case err != nil:
					return err
				case first>>4 == 13:
					continue
				case first>>4 != mqttPuback || len(body) < 2:
					return fmt.Errorf("got packet %x % x, want a PUBACK", first, body)
				}
				n := p.acked.Load() + p.refused.Load() + 1
				if id := binary.BigEndian.Uint16(body); id != uint16(1+n%60000) {
					return fmt.Errorf("PUBACK of %d, want that of message %d", id, n)
				}
				switch {
				case len(body) > 2 && body[2] == 0x97:
					p.refused.Add(1)
				case len(body) > 2 && body[2] >= 0x80:
					return fmt.Errorf("PUBACK with reason %#x", body[2])
				default:
					p.acked.Add(1)
				}
				select {
				case room <- struct{}{}:
				default:
				}
			}
		}()
	}()
	return p
}

// pinger pings at half of the keep alive.
func (b *diskBroker) pinger(c *killWire, mu *sync.Mutex, keepAlive uint16, stop <-chan struct{}) {
	go func() {
		tick := time.NewTicker(time.Duration(keepAlive) * time.Second / 2)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				mu.Lock()
				c.put(12 << 4)
				_ = c.w.Flush() // a failure shows at the read
				mu.Unlock()
			}
		}
	}()
}

// alive fails the test if the publisher's connection has ended.
func (p *diskPublisher) alive(t *testing.T) {
	t.Helper()
	select {
	case err := <-p.ended:
		t.Fatalf("publisher: %v", err)
	default:
	}
}

// stillThere copies the data directory as a cut at this moment would leave it,
// starts a second program on the copy, and checks that it has all messages that
// were acknowledged.
func (b *diskBroker) stillThere(what string, p *diskPublisher) {
	b.t.Helper()
	if err := b.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		b.t.Fatal(err)
	}
	acked := p.acked.Load() // no PUBACK is on its way that was not sent before the copy
	copied := b.t.TempDir()
	err := os.CopyFS(copied, os.DirFS(b.inside(b.data)))
	err = errors.Join(err, b.cmd.Process.Signal(syscall.SIGCONT))
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(copied, "penstock.db-shm")); err != nil { // memory, which a cut takes
		b.t.Fatal(err)
	}
	again := startDisk(b.t, "", copied, "")
	b.inOrder(what+": on a copy of the disk", again.drain(again.mqtt, acked), acked)
}

// troubled waits until the broker says everywhere that the disk is in trouble.
func (b *diskBroker) troubled(reason string) {
	b.t.Helper()
	b.await("trouble in /readyz: "+reason, func() bool {
		h := b.health()
		return h.Status == http.StatusServiceUnavailable && h.Degraded && strings.Contains(strings.Join(h.Reasons, "\n"), reason)
	})
	b.await("LEDs that tell of it", func() bool { return strings.HasPrefix(b.lastLine("LEDs ["), "LEDs [storage fault]") })
	b.await("$SYS that tells of it", func() bool { return strings.Contains(b.sysHealth(), reason) })
}

// well waits until it says everywhere that all is well.
func (b *diskBroker) well() {
	b.t.Helper()
	b.await("recovery in /readyz", func() bool { h := b.health(); return h.Ready && !h.Degraded && h.Status == http.StatusOK })
	b.await("LEDs that tell of it", func() bool { return strings.HasPrefix(b.lastLine("LEDs ["), "LEDs [running]") })
	b.await("$SYS that tells of it", func() bool { return b.sysHealth() == "ok" })
	if v := b.metric("penstock_journal_failing"); v != "0" {
		b.t.Errorf("penstock_journal_failing %s when all is well", v)
	}
}

// lastLine returns the last line of the program's output with the prefix. The
// display of the LEDs ends its lines with a carriage return, or not at all.
func (b *diskBroker) lastLine(prefix string) string {
	out := readIf(b.out)
	if i := strings.LastIndex(out, prefix); i >= 0 {
		return out[i:]
	}
	return ""
}

// sysHealth returns the value of the topic $SYS/broker/penstock/health.
func (b *diskBroker) sysHealth() string {
	b.t.Helper()
	c := b.dial(b.mqtt, "watcher", 4, true, 0)
	defer c.conn.Close()
	b.subscribe(c, 0, "$SYS/broker/penstock/health")
	_ = c.conn.SetReadDeadline(time.Now().Add(killPatience)) // a failure shows at the read
	for {
		first, body, err := c.read()
		if err != nil {
			b.t.Fatalf("$SYS: %v", err)
		}
		if first>>4 == mqttPublish {
			n := int(binary.BigEndian.Uint16(body))
			return string(body[2+n:])
		}
	}
}

// recovered waits until the publisher goes on, stops it, and drains the queue.
func (b *diskBroker) recovered(p *diskPublisher) {
	b.t.Helper()
	b.well()
	before := p.acked.Load()
	b.await("acknowledgement after the trouble", func() bool { p.alive(b.t); return p.acked.Load() > before })
	close(p.stop)
	b.await("last acknowledgement", func() bool { p.alive(b.t); return p.acked.Load() == p.sent.Load() })
	n := p.acked.Load()
	b.inOrder("drained", b.drain(b.mqtt, n), n)
}

// A disk that is full, with nothing kept free on it, and then has room again.
func TestDiskFullAndBack(t *testing.T) {
	needs(t, "unshare", "--user", "--map-root-user", "--mount", "true")
	b := startDisk(t, "6m", t.TempDir(), `reserve = "0"`)
	b.sleeper()
	p := b.publisher(4, 100, 1000, 0)
	b.troubled("disk is full")
	if v := b.metric("penstock_journal_failing"); v != "1" {
		t.Errorf("penstock_journal_failing %s on a full disk", v)
	}
	b.stillThere("full disk", p)
	p.alive(t)
	b.resize("60m")
	b.recovered(p)
}

// The disk is never full while there is a reserve: what would have to stay is
// refused, drains, and is taken again, time after time.
func TestDiskReserve(t *testing.T) {
	needs(t, "unshare", "--user", "--map-root-user", "--mount", "true")
	b := startDisk(t, "24m", t.TempDir(), "")
	b.sleeper()
	for round := range 3 {
		p := b.publisher(5, 500, 1000, 0)
		least := b.free()
		b.await("refusal", func() bool {
			p.alive(t)
			least = min(least, b.free())
			return p.refused.Load() > 1000
		})
		close(p.stop)
		b.await("last answer", func() bool { p.alive(t); return p.acked.Load()+p.refused.Load() == p.sent.Load() })
		if least <= 0 || b.metric("penstock_journal_failures_total") != "0" {
			t.Errorf("round %d: %d bytes were free at the least, %s commits failed", round, least, b.metric("penstock_journal_failures_total"))
		}
		if h := b.health(); !h.Ready || !h.Degraded || !strings.Contains(strings.Join(h.Reasons, ""), "disk: nearly full") {
			t.Errorf("round %d: health %+v, want ready, degraded and why", round, h)
		}
		if v := b.metric("penstock_disk_low"); v != "1" {
			t.Errorf("round %d: penstock_disk_low %s", round, v)
		}
		b.await("LEDs that tell of it", func() bool { return strings.HasPrefix(b.lastLine("LEDs ["), "LEDs [degraded]") })
		// A publisher of MQTT 3.1.1 is disconnected, not told that all is well.
		old := b.publisher(4, 1, 1000, 0)
		b.await("end of the connection of MQTT 3.1.1", func() bool { return len(old.ended) == 1 })
		close(old.stop)
		if n := old.acked.Load(); n != 0 {
			t.Errorf("round %d: %d messages of MQTT 3.1.1 acknowledged", round, n)
		}
		// Refused ones leave gaps in the numbers, and nothing comes out of order.
		n := p.acked.Load()
		got := b.drain(b.mqtt, n)
		for i := 1; i < len(got); i++ {
			if got[i] <= got[i-1] {
				t.Fatalf("round %d: %d comes after %d", round, got[i], got[i-1])
			}
		}
		t.Logf("round %d: %d taken, %d refused, %d bytes free at the least", round, n, p.refused.Load(), least)
		b.well()
		if n < 1000 {
			t.Errorf("round %d: only %d messages were taken", round, n)
		}
	}
}

// Another program fills the disk: that is noticed without a commit, nothing more
// is taken for a client that is away, and what it has can be taken.
func TestDiskFilledByOthers(t *testing.T) {
	needs(t, "unshare", "--user", "--map-root-user", "--mount", "true")
	b := startDisk(t, "24m", t.TempDir(), "")
	b.sleeper()
	p := b.publisher(5, 100, 1000, 0)
	b.await("some messages", func() bool { p.alive(t); return p.acked.Load() > 5000 })
	close(p.stop)
	b.await("last answer", func() bool { p.alive(t); return p.acked.Load() == p.sent.Load() })
	other := filepath.Join(b.inside(b.data), "other")
	if err := os.WriteFile(other, make([]byte, b.free()-512<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	b.await("degraded health", func() bool { h := b.health(); return h.Ready && h.Degraded })
	taken := p.acked.Load()
	p = b.publisher(5, 100, 1000, 0)
	b.await("refusals", func() bool { p.alive(t); return p.refused.Load() > 1000 })
	close(p.stop)
	b.await("last answer", func() bool { p.alive(t); return p.acked.Load()+p.refused.Load() == p.sent.Load() })
	if n := p.acked.Load(); n != 0 {
		t.Errorf("%d messages were taken for a client that is away", n)
	}
	b.inOrder("drained", b.drain(b.mqtt, taken), taken)
	b.sysHealth() // a while later
	if v := b.metric("penstock_journal_failures_total"); v != "0" {
		t.Errorf("%s commits failed", v)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	b.well()
	p = b.publisher(5, 100, 1000, 0)
	b.await("acknowledgement", func() bool { p.alive(t); return p.acked.Load() > 1000 })
	close(p.stop)
}

// A disk that fails in one way or another, until it does not any more.
func TestDiskFails(t *testing.T) {
	needs(t, "strace", "-V")
	for _, tt := range []struct {
		name, reason string
		inject       []string
	}{
		{"EIO on write", "disk I/O error", []string{"pwrite64:error=EIO"}},
		{"EIO on fsync", "disk I/O error", []string{"fsync,fdatasync:error=EIO"}},
		{"full", "disk is full", []string{"pwrite64,ftruncate:error=ENOSPC"}},
		// As the kernel makes a file system after an error: files that are open
		// stay so, nothing can be written or opened for it.
		{"remounted read-only", "storage: commits fail", []string{"pwrite64,ftruncate,open,openat,unlink,unlinkat:error=EROFS"}},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			b := startDisk(t, "", t.TempDir(), "")
			b.sleeper()
			p := b.publisher(4, 100, 100, 0)
			b.await("acknowledgement", func() bool { return p.acked.Load() > 1000 })
			mend := b.spoil(tt.inject...)
			b.troubled(tt.reason)
			b.stillThere(tt.name, p)
			p.alive(t)
			mend()
			b.recovered(p)
		})
	}
}

// A disk that hangs for longer than the keep alive of clients: those that need
// it wait, and nothing else does.
func TestDiskHangs(t *testing.T) {
	needs(t, "strace", "-V")
	if testing.Short() {
		t.Skip("takes 15 seconds")
	}
	const keepAlive, stall = 5, 12 * time.Second
	b := startDisk(t, "", t.TempDir(), "")
	b.sleeper()
	live := b.dial(b.mqtt, "live", 4, false, keepAlive) // persistent, online, acknowledges
	b.subscribe(live, 1, "plant/live")
	// The one of MQTT 3.1.1 knows no bound.
	p4, p5 := b.publisher(4, 1<<40, 100, keepAlive), b.publisher(5, 1000, 100, keepAlive)
	b.await("acknowledgement", func() bool { return p4.acked.Load() > 1000 && p5.acked.Load() > 1000 })
	rss := func() int64 {
		n, err := strconv.ParseFloat(b.metric("process_resident_memory_bytes"), 64)
		if err != nil {
			t.Fatal(err)
		}
		return int64(n)
	}
	memory := rss()
	mend := b.spoil(fmt.Sprintf("fsync,fdatasync:delay_enter=%d:when=1", stall.Microseconds()))
	began := time.Now()
	b.await("silence", func() bool {
		before := p4.acked.Load() + p5.acked.Load()
		select {
		case <-time.After(300 * time.Millisecond):
		case <-b.done:
		}
		return before == p4.acked.Load()+p5.acked.Load()
	})
	// Traffic between clients that are there goes on, durable by the
	// subscriber's acknowledgement.
	talk := b.dial(b.mqtt, "talk", 4, true, keepAlive)
	rounds := 0
	var slowest time.Duration
	for id := uint16(1); time.Since(began) < stall-2*time.Second; id++ {
		start := time.Now()
		qos := byte(rounds % 2)
		if qos == 1 {
			talk.put(mqttPublish<<4|2, mqttString("plant/live"), binary.BigEndian.AppendUint16(nil, id), []byte("x"))
		} else {
			talk.put(mqttPublish<<4, mqttString("plant/live"), []byte("x"))
		}
		if err := talk.w.Flush(); err != nil {
			t.Fatal(err)
		}
		first, body, err := live.read()
		if err != nil || first>>4 != mqttPublish {
			t.Fatalf("subscriber, %v into the stall: got %x, %v", time.Since(began), first, err)
		}
		if qos == 1 {
			_, _, got, _, _ := killParse(4, first, body)
			live.putAck(mqttPuback, got)
			_ = live.w.Flush() // a failure shows at the read
			if first, body, err = talk.read(); err != nil || first>>4 != mqttPuback {
				t.Fatalf("publisher, %v into the stall: got %x % x, %v", time.Since(began), first, body, err)
			}
		}
		slowest = max(slowest, time.Since(start))
		if rounds++; rounds == 2000 {
			b.troubled("a commit has been running for")
		}
	}
	if rounds < 1000 || slowest > 2*time.Second {
		t.Errorf("%d exchanges during the stall, the slowest took %v", rounds, slowest)
	}
	p4.alive(t)
	p5.alive(t)
	if grown := rss() - memory; grown > 32<<20 {
		t.Errorf("memory has grown by %d bytes during the stall", grown)
	}
	t.Logf("%d exchanges during the stall, the slowest took %v; %d and %d messages waited for the disk, memory grew by %d bytes",
		rounds, slowest, p4.sent.Load()-p4.acked.Load(), p5.sent.Load()-p5.acked.Load(), rss()-memory)
	mend()
	for _, p := range []*diskPublisher{p4, p5} {
		before := p.acked.Load()
		b.await("acknowledgement after the stall", func() bool { p.alive(t); return p.acked.Load() > before })
		close(p.stop)
		b.await("last acknowledgement", func() bool { p.alive(t); return p.acked.Load() == p.sent.Load() })
	}
	b.well()
}
