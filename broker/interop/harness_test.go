//go:build interop

package interop

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every single wait; the scripts in testdata have the same.
const patience = 20 * time.Second

// scriptPatience bounds a whole script, so that one that hangs says where.
const scriptPatience = 3 * time.Minute

// The login of every client. Nobody connects without one.
const (
	username = "meter"
	password = "correct horse"
)

// Versions of the protocol, by the number in CONNECT.
const (
	v31  = 3
	v311 = 4
	v5   = 5
)

var versionNames = map[int]string{v31: "MQTT3.1", v311: "MQTT3.1.1", v5: "MQTT5"}

// steps is what each client shows, in this order; stepsV5 comes after it for
// MQTT 5. A client that does not report one of them has failed.
var (
	steps = []string{
		"connect",       // and DISCONNECT
		"refused-login", // a wrong password, with the code for it
		"qos0",          // one message, its payload and its QoS
		"qos1",          //
		"qos2",          //
		"order-qos0",    // 200 messages arrive in the order they were sent
		"order-qos1",    //
		"order-qos2",    //
		"retained",      // live subscriber, late subscriber, cleared
		"will",          // of a process that is killed, not of one that says DISCONNECT
		"session",       // what was queued while away comes in order
		"restart",       // the same, and a retained message, over kill -9 of the broker
		"unsubscribe",   //
		"wildcard",      // + and #
		"granted-qos",   // each filter of one SUBSCRIBE has its own answer
		"large-payload", // 300,000 bytes at QoS 1, unchanged
	}
	stepsV5 = []string{
		"user-properties",     // pairs, repeated names, in order
		"message-expiry",      // gone when expired, else with what is left of it
		"topic-alias",         // from the client
		"shared-subscription", // each message to one member
		"request-response",    // response topic, correlation data
		"reason-codes",        // UNSUBACK 0x11, PUBACK 0x87, DISCONNECT 0x8E
	}
)

// stepsOf returns the steps of a version, and then those that only this client
// has.
func stepsOf(version int, more ...string) []string {
	list := slices.Clone(steps)
	if version == v5 {
		list = append(list, stepsV5...)
	}
	return append(list, more...)
}

// program is the path of the penstock that TestMain has built.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "penstock-interop")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "penstock")
		build := exec.Command("go", "build", "-o", program, ".")
		build.Dir = filepath.Join("..", "..")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build penstock: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// need fails the test if a program is not there.
func need(t *testing.T, name, install string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: %s", name, install)
	}
	return path
}

// listeners are what each server has, by name.
const listeners = `
[[broker.listener]]
name = "tcp"
address = "127.0.0.1:0"
[[broker.listener]]
name = "tls"
address = "127.0.0.1:0"
tls_cert = "%[1]s/cert.pem"
tls_key = "%[1]s/key.pem"
[[broker.listener]]
name = "ws"
address = "127.0.0.1:0"
protocol = "websocket"
[[broker.listener]]
name = "wss"
address = "127.0.0.1:0"
protocol = "websocket"
tls_cert = "%[1]s/cert.pem"
tls_key = "%[1]s/key.pem"
`

// server is a penstock of its own: a process, with its database in a temporary
// directory.
type server struct {
	dir   string
	addrs map[string]string // by the listener's name
	cmd   *exec.Cmd
	out   *watched
	done  chan struct{} // closed when the process has ended
}

// startServer starts a server that ends with the test.
func startServer(t *testing.T) *server {
	t.Helper()
	s := &server{dir: t.TempDir()}
	writeCertificates(t, s.dir)
	config := fmt.Sprintf(`
[log]
format = "logfmt"
[storage]
dir = "%[1]s/data"
[broker]
anonymous = "none"
[api]
http = "off"
[hw]
backend = "off"
`+listeners, s.dir)
	if err := os.WriteFile(s.config(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	passwd := exec.Command(program, "passwd", "--config", s.config(), "--device", username)
	passwd.Stdin = strings.NewReader(password + "\n")
	if out, err := passwd.CombinedOutput(); err != nil {
		t.Fatalf("penstock passwd: %v\n%s", err, out)
	}
	if err := s.serve(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("penstock said\n%s", s.out)
		}
	})
	return s
}

func (s *server) config() string { return filepath.Join(s.dir, "penstock.toml") }

// caFile is the certificate that those of the listeners tls and wss follow from.
func (s *server) caFile() string { return filepath.Join(s.dir, "ca.pem") }

// url returns the URL of a listener.
func (s *server) url(scheme, listener string) string {
	u := scheme + "://" + s.addrs[listener]
	if listener == "ws" || listener == "wss" {
		u += "/mqtt"
	}
	return u
}

var (
	readyLine    = regexp.MustCompile(`msg="penstock ready".*\n`)
	listenerPart = regexp.MustCompile(` mqtt\.(\S+)=(?:[a-z]+://)?([^\s/]+)`) // name, host:port
)

// serve starts the process and waits until it is ready. Its ports are new ones
// each time, for the old ones may have been taken meanwhile.
func (s *server) serve() error {
	s.out = newWatched()
	s.cmd = exec.Command(program, "serve", "--config", s.config())
	s.cmd.Env = append(os.Environ(), "JOURNAL_STREAM=", "NOTIFY_SOCKET=")
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	cmd, done := s.cmd, s.done
	go func() {
		_ = cmd.Wait() // killed, or it has said why
		close(done)
	}()
	line, err := s.out.await(readyLine, s.done)
	if err != nil {
		s.kill()
		return fmt.Errorf("start penstock: %w", err)
	}
	s.addrs = make(map[string]string)
	for _, m := range listenerPart.FindAllStringSubmatch(line, -1) {
		s.addrs[m[1]] = m[2]
	}
	return nil
}

// kill ends the process as a power cut does: SIGKILL.
func (s *server) kill() {
	_ = s.cmd.Process.Kill() // fails if it has ended
	<-s.done
}

// restart kills the process and starts another on the same data.
func (s *server) restart() error {
	s.kill()
	return s.serve()
}

// watched gathers what a process writes, and wakes who waits for a part of it.
type watched struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{} // closed at the next write
}

func newWatched() *watched { return &watched{changed: make(chan struct{})} }

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	close(w.changed)
	w.changed = make(chan struct{})
	return len(p), nil
}

func (w *watched) String() string {
	text, _ := w.state()
	return text
}

func (w *watched) state() (string, chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String(), w.changed
}

// await returns the first match of want. It gives up when the writer has ended
// and after patience.
func (w *watched) await(want *regexp.Regexp, ended <-chan struct{}) (string, error) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for last := false; ; {
		text, changed := w.state()
		if m := want.FindString(text); m != "" {
			return m, nil
		}
		if last {
			return "", fmt.Errorf("it has ended without %q; it said\n%s", want, text)
		}
		select {
		case <-changed:
		case <-ended:
			last = true
		case <-late.C:
			return "", fmt.Errorf("no %q within %s; it said\n%s", want, patience, text)
		}
	}
}

// script is a client in another language. It is called with
//
//	URL VERSION USERNAME PASSWORD CAFILE
//
// where VERSION is 3, 4 or 5, and CAFILE "-" without TLS. To standard output it
// writes a line for each step:
//
//	ok NAME
//	not ok NAME: WHY
//
// The line "restart" asks for kill -9 of the broker; what it can then read from
// standard input is the URL of the broker that was started instead.
type script struct {
	command  []string
	version  int
	listener string
	scheme   string // of the URL, for this listener
	steps    []string
}

// run runs the script against a server of its own and makes subtests of what
// it reports.
func (sc script) run(t *testing.T) {
	t.Helper()
	s := startServer(t)
	ctx, cancel := context.WithTimeout(context.Background(), scriptPatience)
	defer cancel()
	ca := "-"
	if sc.listener == "tls" || sc.listener == "wss" {
		ca = s.caFile()
	}
	args := append(slices.Clone(sc.command[1:]), s.url(sc.scheme, sc.listener), fmt.Sprint(sc.version), username, password, ca)
	cmd := exec.CommandContext(ctx, sc.command[0], args...)
	// Its children too: a client that waits to be killed must not stay.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = patience
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr := newWatched()
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	report, readErr := readReport(stdout, func() error {
		if err := s.restart(); err != nil {
			return err
		}
		_, err := io.WriteString(stdin, s.url(sc.scheme, sc.listener)+"\n")
		return err
	})
	if readErr != nil {
		cancel()
	}
	if err := errors.Join(readErr, cmd.Wait(), ctx.Err()); err != nil {
		t.Errorf("%s: %v\n%s", strings.Join(sc.command, " "), err, stderr)
	}
	judge(t, sc.steps, report)
	if t.Failed() {
		t.Logf("the client wrote to standard error\n%s", stderr)
	}
}

// result is what a client says of a step.
type result struct {
	step string
	why  string // empty if it is ok
}

var reportLine = regexp.MustCompile(`^(ok|not ok) ([a-z0-9-]+)(?:: (.*))?$`)

// readReport reads a script's standard output to its end.
func readReport(r io.Reader, restart func() error) ([]result, error) {
	var report []result
	in := bufio.NewScanner(r)
	for in.Scan() {
		line := in.Text()
		if line == "restart" {
			if err := restart(); err != nil {
				return report, fmt.Errorf("restart the broker: %w", err)
			}
			continue
		}
		m := reportLine.FindStringSubmatch(line)
		if m == nil {
			return report, fmt.Errorf("the client wrote %q, which is no line of a report", line)
		}
		one := result{step: m[2]}
		if m[1] == "not ok" {
			one.why = m[3]
			if one.why == "" {
				one.why = "for a reason it does not give"
			}
		}
		report = append(report, one)
	}
	return report, in.Err()
}

// judge makes a subtest of each step that is wanted.
func judge(t *testing.T, want []string, report []result) {
	t.Helper()
	for _, step := range want {
		t.Run(step, func(t *testing.T) {
			for _, line := range judgeStep(step, report) {
				t.Error(line)
			}
		})
	}
	for _, r := range report {
		if !slices.Contains(want, r.step) {
			t.Errorf("the client reports a step %q that is not in the list", r.step)
		}
	}
}

// judgeStep returns what is wrong with a step, a line each.
func judgeStep(step string, report []result) []string {
	var wrong []string
	seen := 0
	for _, r := range report {
		if r.step != step {
			continue
		}
		seen++
		if r.why != "" {
			wrong = append(wrong, r.why)
		}
	}
	if seen != 1 {
		wrong = append(wrong, fmt.Sprintf("the client reports this step %d times, want once", seen))
	}
	return wrong
}

// TestReport: a step that fails, is missing or comes twice is found.
func TestReport(t *testing.T) {
	restarts := 0
	report, err := readReport(strings.NewReader("ok a\nrestart\nnot ok b: no PUBACK: late\nok twice\nok twice\nnot ok c\n"),
		func() error { restarts++; return nil })
	if err != nil || restarts != 1 {
		t.Fatalf("read: %v, %d restarts", err, restarts)
	}
	for _, tt := range []struct {
		step string
		want []string
	}{
		{"a", nil},
		{"b", []string{"no PUBACK: late"}},
		{"c", []string{"for a reason it does not give"}},
		{"twice", []string{"the client reports this step 2 times, want once"}},
		{"missing", []string{"the client reports this step 0 times, want once"}},
	} {
		if got := judgeStep(tt.step, report); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.step, got, tt.want)
		}
	}
	if _, err := readReport(strings.NewReader("Traceback\n"), nil); err == nil {
		t.Error("a line that is no report was taken")
	}
}

// writeCertificates writes ca.pem, and cert.pem and key.pem that follow from
// it, for 127.0.0.1.
func writeCertificates(t *testing.T, dir string) {
	t.Helper()
	caKey, key := newKey(t), newKey(t)
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "Penstock test CA"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		Subject:      pkix.Name{CommonName: "127.0.0.1"},
		NotBefore:    ca.NotBefore,
		NotAfter:     ca.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"ca.pem":   {Type: "CERTIFICATE", Bytes: caDER},
		"cert.pem": {Type: "CERTIFICATE", Bytes: leafDER},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// What the step wildcard publishes, and what of it "plus/+/t" and "hash/#"
// match. The last one matches, so that nothing can be on its way after it.
var (
	wildcardTopics  = []string{"plus/a/t", "plus/a", "plus/a/b/t", "plus//t", "hash", "hash/a", "hash/a/b", "hashes", "plus/end/t"}
	wildcardMatches = []string{"plus/a/t", "plus//t", "hash", "hash/a", "hash/a/b", "plus/end/t"}
)

// largePayload is what the step large-payload sends.
func largePayload() []byte {
	payload := make([]byte, 300_000)
	for i := range payload {
		payload[i] = byte(i * 7 % 251)
	}
	return payload
}
