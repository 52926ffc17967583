package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// makeCertificate writes a certificate for 127.0.0.1 and its key into dir.
func makeCertificate(t testing.TB, dir, name string) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write(t, cert, certPEM)
	write(t, key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return cert, key, pool
}

func write(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// withListeners has a broker under test listen on these; a listener without an
// address gets a free port.
func withListeners(listeners ...ListenerConfig) func(*Config, *storage.Config) {
	return func(c *Config, _ *storage.Config) {
		c.Listeners = listeners
		for i := range c.Listeners {
			l := &c.Listeners[i]
			if l.Name == "" {
				l.Name = fmt.Sprintf("l%d", i)
			}
			if l.Address == "" {
				l.Address = "127.0.0.1:0"
			}
		}
	}
}

// on makes a client of a connection.
func (s *server) on(c net.Conn) *client {
	s.t.Cleanup(func() { c.Close() })
	return &client{t: s.t, c: c, version: 4}
}

// hello sends a CONNECT and returns the return code of the CONNACK.
func (c *client) hello(o connectOptions) (code byte) {
	c.t.Helper()
	c.version = o.version
	c.send(connectPacket(o))
	first, body := c.read()
	if first != typeConnack<<4 {
		c.t.Fatalf("got packet %x % x, want a CONNACK", first, body)
	}
	return body[1]
}

func (s *server) limited(name string) uint64 { return s.b.Stats().Limited[name] }

// kind is a listener and how a client gets to it.
type kind struct {
	protocol string
	cfg      ListenerConfig
	dial     func(addr net.Addr) (net.Conn, error)
}

func kinds(t testing.TB) []kind {
	dir := t.TempDir()
	cert, key, pool := makeCertificate(t, dir, "first")
	client := &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	plain := func(a net.Addr) (net.Conn, error) { return net.Dial(a.Network(), a.String()) }
	secure := func(a net.Addr) (net.Conn, error) { return tls.Dial(a.Network(), a.String(), client) }
	web := func(dial func(net.Addr) (net.Conn, error)) func(net.Addr) (net.Conn, error) {
		return func(a net.Addr) (net.Conn, error) { return dialWeb(a, dial, "", "mqtt") }
	}
	return []kind{
		{"mqtt", ListenerConfig{}, plain},
		{"mqtts", ListenerConfig{TLSCert: cert, TLSKey: key}, secure},
		{"ws", ListenerConfig{Protocol: "websocket"}, web(plain)},
		{"wss", ListenerConfig{Protocol: "websocket", TLSCert: cert, TLSKey: key}, web(secure)},
		{"unix", ListenerConfig{Address: "unix:" + filepath.Join(dir, "mqtt")}, plain},
		{"ws", ListenerConfig{Address: "unix:" + filepath.Join(dir, "web"), Protocol: "websocket"}, web(plain)},
	}
}

// Everything that works over TCP works over each kind of listener: small and
// large packets both ways, and the DISCONNECT of a stop.
func TestListenerKinds(t *testing.T) {
	all := kinds(t)
	var cfgs []ListenerConfig
	for _, k := range all {
		cfgs = append(cfgs, k.cfg)
	}
	s := start(t, t.TempDir(), withListeners(cfgs...))
	large := strings.Repeat("0123456789abcdef", 50_000) // several frames and TLS records
	var clients []*client
	for i, info := range s.b.Listeners() {
		k := all[i]
		if info.Protocol != k.protocol {
			t.Errorf("listener %d is %q, want %q", i, info.Protocol, k.protocol)
		}
		sock, err := k.dial(info.Addr)
		if err != nil {
			t.Fatalf("%s: %v", k.protocol, err)
		}
		c := s.on(sock)
		if code := c.hello(connectOptions{id: fmt.Sprint(i), version: 5, clean: true}); code != 0 {
			t.Fatalf("%s: refused with %#x", k.protocol, code)
		}
		c.subscribe(1, fmt.Sprintf("a/%d", i))
		for n := range 50 {
			c.publish(fmt.Sprintf("a/%d", i), fmt.Sprintf("m%d", n), 1, false)
		}
		c.takeAll("m%d", 0, 50)
		c.publish(fmt.Sprintf("a/%d", i), large, 1, false)
		if got := c.take(); got.payload != large {
			t.Errorf("%s: %d bytes came back of %d, or others", k.protocol, len(got.payload), len(large))
		}
		if got := s.b.Listeners()[i].Connections; got != 1 {
			t.Errorf("%s: %d connections, want 1", k.protocol, got)
		}
		clients = append(clients, c)
	}
	s.stop()
	for i, c := range clients {
		if reason := c.expectEnd(); reason != reasonShuttingDown {
			t.Errorf("%s: reason %#x at the end, want %#x", all[i].protocol, reason, reasonShuttingDown)
		}
	}
	for _, k := range all {
		if path, ok := strings.CutPrefix(k.cfg.Address, "unix:"); ok {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is still there after the stop: %v", path, err)
			}
		}
	}
}

// serverSide returns a connection as the broker has it, and its client.
func serverSide(t *testing.T, k kind) (server, client net.Conn) {
	t.Helper()
	b := &Broker{cfg: DefaultConfig(), plane: &plane{}, log: slog.New(slog.DiscardHandler)}
	k.cfg.Name = "x"
	if k.cfg.Address == "" {
		k.cfg.Address = "127.0.0.1:0"
	}
	l, err := openListener(b, k.cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.ln.Close()
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		raw, err := l.ln.Accept()
		if err != nil {
			done <- result{nil, err}
			return
		}
		c, err := l.handshake(&slot{ln: l, raw: raw, since: time.Now()})
		done <- result{c, err}
	}()
	client, err = k.dial(l.ln.Addr())
	if err != nil {
		t.Fatal(err)
	}
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { client.Close(); r.c.Close() })
	return r.c, client
}

// A past deadline wakes a Read that waits, and the connection goes on after it,
// also in the middle of a frame or of a TLS record: conn relies on it.
func TestReadGoesOnAfterDeadline(t *testing.T) {
	for i, k := range kinds(t) {
		server, client := serverSide(t, k)
		buf := make([]byte, 100)
		for round := range 3 {
			woken := make(chan error, 1)
			_ = server.SetReadDeadline(time.Time{})
			go func() {
				_, err := server.Read(buf)
				woken <- err
			}()
			_ = server.SetReadDeadline(past)
			if err := <-woken; !isTimeout(err) {
				t.Fatalf("%d %s: Read returned %v, want a timeout", i, k.protocol, err)
			}
			text := fmt.Sprintf("round %d", round)
			if _, err := io.WriteString(client, text); err != nil {
				t.Fatal(err)
			}
			_ = server.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadFull(server, buf[:len(text)]); err != nil || string(buf[:len(text)]) != text {
				t.Errorf("%d %s: after a deadline: %q, %v", i, k.protocol, buf[:len(text)], err)
			}
		}
	}
}

// A pong leaves although the deadline of the last write is long over; what we
// write ourselves does not.
func TestPongAfterWriteDeadline(t *testing.T) {
	for _, k := range kinds(t)[2:4] {
		server, client := serverSide(t, k)
		web := client.(*webClient)
		_ = server.SetWriteDeadline(past)
		if _, err := web.Conn.Write(append(frame(0x89, []byte("x")), frame(0x82, []byte("y"))...)); err != nil {
			t.Fatal(err)
		}
		_ = server.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
			t.Fatalf("%s: %v", k.protocol, err)
		}
		_ = server.SetWriteDeadline(time.Now().Add(patience))
		if _, err := server.Write([]byte("z")); err != nil {
			t.Fatalf("%s: %v", k.protocol, err)
		}
		_ = client.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(client, make([]byte, 1)); err != nil || !bytes.Equal(web.seen, []byte{opPong}) {
			t.Errorf("%s: control frames % x, %v", k.protocol, web.seen, err)
		}
		_ = server.SetWriteDeadline(past)
		if _, err := server.Write([]byte("z")); !isTimeout(err) {
			t.Errorf("%s: a write of ours after its deadline: %v", k.protocol, err)
		}
	}
}

// A client that stalls in the TLS handshake holds nobody up and is closed in
// time; one that speaks no TLS is closed and counted.
func TestTLSHandshakeThatStalls(t *testing.T) {
	cert, key, pool := makeCertificate(t, t.TempDir(), "first")
	s := start(t, t.TempDir(), withListeners(ListenerConfig{TLSCert: cert, TLSKey: key, ConnectTimeout: units.Duration(time.Second)}))
	var stalled []*client
	for range 10 {
		c := s.dial()
		c.send([]byte{22, 3, 1, 2, 0, 1}) // the beginning of a ClientHello
		stalled = append(stalled, c)
	}
	sock, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool})
	if err != nil {
		t.Fatalf("a client was held up: %v", err)
	}
	c := s.on(sock)
	c.hello(connectOptions{id: "c", version: 4, clean: true})
	for _, c := range stalled {
		c.expectEnd()
	}
	eventually(t, "they are counted", func() bool { return s.limited("connect-timeout") == 10 })
	odd := s.dial()
	odd.send([]byte("GET / HTTP/1.1\r\n\r\n"))
	odd.expectEnd()
	eventually(t, "it is counted", func() bool { return s.limited("tls-handshake") == 1 })
	c.ping()
	if _, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
}

// A client that comes back resumes its TLS session.
func TestTLSSessionTickets(t *testing.T) {
	cert, key, pool := makeCertificate(t, t.TempDir(), "first")
	s := start(t, t.TempDir(), withListeners(ListenerConfig{TLSCert: cert, TLSKey: key}))
	cfg := &tls.Config{RootCAs: pool, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	for round := range 2 {
		sock, err := tls.Dial("tcp", s.addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		c := s.on(sock)
		c.hello(connectOptions{id: "c", version: 4, clean: true}) // what is read brings the ticket
		if got := sock.ConnectionState().DidResume; got != (round == 1) {
			t.Errorf("connection %d: resumed %v", round, got)
		}
		c.disconnect()
	}
}

func TestCertificateErrors(t *testing.T) {
	dir := t.TempDir()
	cert, key, _ := makeCertificate(t, dir, "first")
	other := t.TempDir()
	_, otherKey, _ := makeCertificate(t, other, "other")
	for _, tt := range []struct{ cert, key, want string }{
		{filepath.Join(dir, "none"), key, "tls_cert: open "},
		{cert, filepath.Join(dir, "none"), "tls_key: open "},
		{cert, otherKey, "does not match"},
		{key, key, "tls_cert: "},
	} {
		_, err := openListener(&Broker{cfg: DefaultConfig()}, ListenerConfig{Name: "x", Address: "127.0.0.1:0", TLSCert: tt.cert, TLSKey: tt.key}, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q in it", err, tt.want)
		}
	}
}

// A renewed certificate is used without a restart; while the pair is broken the
// old one stays, and that is said once.
func TestCertificateRenewal(t *testing.T) {
	dir := t.TempDir()
	cert, key, _ := makeCertificate(t, dir, "first")
	var failed []error
	c, err := loadCertificate(cert, key, func(err error) { failed = append(failed, err) })
	if err != nil {
		t.Fatal(err)
	}
	name := func() string {
		t.Helper()
		pair, err := c.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.Subject.CommonName
	}
	later := func() { c.checked = c.checked.Add(-2 * checkEvery) }
	next := t.TempDir()
	newCert, newKey, _ := makeCertificate(t, next, "second")
	if err := os.Rename(newCert, cert); err != nil { // the key is not there yet
		t.Fatal(err)
	}
	if got := name(); got != "first" || len(failed) > 0 {
		t.Errorf("looked again within a second: %s, %v", got, failed)
	}
	for range 3 {
		later()
		if got := name(); got != "first" {
			t.Errorf("%s, though its key is not there", got)
		}
	}
	if len(failed) != 1 || !strings.Contains(failed[0].Error(), "tls_key") {
		t.Errorf("said %d times, want once: %v", len(failed), failed)
	}
	if err := os.Rename(newKey, key); err != nil {
		t.Fatal(err)
	}
	later()
	if got := name(); got != "second" {
		t.Errorf("%s, want second", got)
	}
}

// The new certificate is what a client sees.
func TestCertificateRenewalOnTheWire(t *testing.T) {
	dir := t.TempDir()
	cert, key, _ := makeCertificate(t, dir, "first")
	s := start(t, t.TempDir(), withListeners(ListenerConfig{TLSCert: cert, TLSKey: key}))
	_, _, pool := makeCertificate(t, dir, "second")
	eventually(t, "the new certificate is shown", func() bool {
		sock, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool})
		if err == nil {
			sock.Close()
		}
		return err == nil
	})
}

func TestUnixSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "mqtt")
	open := func() (*listener, error) {
		return openListener(&Broker{cfg: DefaultConfig()}, ListenerConfig{Name: "x", Address: "unix:" + path, Mode: "0606"}, nil)
	}
	old, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a living socket: got %v, want EADDRINUSE", err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false) // as a process that is killed
	old.Close()
	l, err := open()
	if err != nil {
		t.Fatalf("a socket that nobody listens on: %v", err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o606 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	l.ln.Close()
	write(t, path, []byte("a file"))
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "that is no socket") {
		t.Errorf("a file: got %v", err)
	}
	if _, err := listenUnix(filepath.Join(dir, "none", "mqtt"), 0o600); err == nil || !strings.Contains(err.Error(), "there is no directory "+filepath.Join(dir, "none")) {
		t.Errorf("no directory: got %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "a file" {
		t.Errorf("the file is changed: %q, %v", b, err)
	}
}

// A socket that was not passed is told with those that were.
func TestSocketNotPassed(t *testing.T) {
	for want, passed := range map[string][]Socket{`there is still: "a", "b";`: {{Name: "a"}, {Name: "b"}}, "there is still: none;": nil} {
		if _, err := take(&passed, "mqtt"); err == nil || !strings.Contains(err.Error(), `"mqtt"`) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

// Certificates that check cannot use are told by their key, with all that is
// wrong at once.
func TestCheckCertificates(t *testing.T) {
	dir := t.TempDir()
	cert, key, _ := makeCertificate(t, dir, "first")
	cfg := DefaultConfig()
	none := filepath.Join(dir, "none")
	cfg.Listeners = []ListenerConfig{{}, {TLSCert: cert, TLSKey: key}, {TLSCert: none, TLSKey: key}, {TLSCert: cert, TLSKey: none}}
	_, err := cfg.CheckCertificates(time.Now())
	want := "broker.listener[2].tls_cert: open " + none + ": no such file or directory\nbroker.listener[3].tls_key: open " + none + ": no such file or directory"
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	cfg.Listeners = cfg.Listeners[1:2]
	notes, err := cfg.CheckCertificates(time.Now().AddDate(500, 0, 0))
	if err != nil || len(notes) != 1 || !strings.Contains(notes[0], "broker.listener[0].tls_cert: ") || !strings.Contains(notes[0], " ended on ") {
		t.Errorf("one that has ended: got %q, %v", notes, err)
	}
}

// Sockets that are passed go to the listeners that name them, one each, and
// what is left is closed and said.
func TestPassedSockets(t *testing.T) {
	var log bytes.Buffer
	var passed []Socket
	for _, name := range []string{"a", "stray", "a"} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		passed = append(passed, Socket{name, ln})
	}
	scfg := storage.DefaultConfig()
	scfg.Dir = t.TempDir()
	db, err := storage.Open(context.Background(), scfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	cfg := DefaultConfig()
	cfg.Listeners = []ListenerConfig{{Name: "one", Address: "fd:a"}, {Name: "two", Address: "systemd:a"}}
	b, err := New(cfg, db, slog.New(slog.NewTextHandler(&log, nil)), passed...)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Socket{passed[0], passed[2]} {
		if got := b.Listeners()[i].Addr.String(); got != want.Listener.Addr().String() {
			t.Errorf("listener %d is on %s, want %s", i, got, want.Listener.Addr())
		}
	}
	if _, err := passed[1].Listener.Accept(); !errors.Is(err, net.ErrClosed) || !strings.Contains(log.String(), "name=stray") {
		t.Errorf("what nobody wants: %v, log\n%s", err, log.String())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := passed[0].Listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("open after the stop: %v", err)
	}
	cfg.Listeners = []ListenerConfig{{Name: "one", Address: "fd:b"}}
	if _, err := New(cfg, db, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), `"b"`) {
		t.Errorf("a socket that was not passed: %v", err)
	}
}

// A stop does not wait for connections that are in their handshakes.
func TestStopDuringHandshakes(t *testing.T) {
	cert, key, _ := makeCertificate(t, t.TempDir(), "first")
	long := units.Duration(10 * time.Minute)
	s := start(t, t.TempDir(), withListeners(
		ListenerConfig{TLSCert: cert, TLSKey: key, ConnectTimeout: long},
		ListenerConfig{Protocol: "websocket", ConnectTimeout: long},
		ListenerConfig{ProxyProtocol: true, ProxyFrom: []string{"127.0.0.1"}, ConnectTimeout: long},
	))
	for _, l := range s.b.Listeners() {
		c, err := net.Dial("tcp", l.Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, "they are there", func() bool {
		for _, l := range s.b.Listeners() {
			if l.Connections != 1 {
				return false
			}
		}
		return true
	})
	began := time.Now()
	s.stop()
	if took := time.Since(began); took >= stopTimeout {
		t.Errorf("the stop took %v", took)
	}
	for name, n := range s.b.Stats().Limited {
		if n != 0 {
			t.Errorf("%d counted as %s", n, name)
		}
	}
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// exhausted fails like a listener of a process without descriptors, until the
// oldest connection is closed.
type exhausted struct {
	net.Listener
	after int // connections
	n     int
	until chan struct{}
}

func (l *exhausted) Accept() (net.Conn, error) {
	if l.n == l.after {
		select {
		case <-l.until:
		default:
			return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		}
	}
	l.n++
	return l.Listener.Accept()
}

// Without a descriptor the accept loop goes on, says so once, and closes the
// connection that has waited longest for its CONNECT.
func TestAcceptWithoutDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		var log syncBuffer
		p.b.log = slog.New(slog.NewTextHandler(&log, nil))
		conns := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		defer conns.Close()
		ln := &exhausted{Listener: conns, after: 2, until: make(chan struct{})}
		l := newListener(p.b, ListenerConfig{Name: "full"})
		l.ln = ln
		p.b.mu.Lock()
		p.b.listeners = append(p.b.listeners, l)
		p.b.mu.Unlock()
		p.b.serving.Go(func() { p.b.accept(l) })
		first, theirs := net.Pipe()
		conns.conns <- theirs
		second, theirs := net.Pipe()
		conns.conns <- theirs
		began := time.Now()
		if _, err := first.Read(make([]byte, 1)); err == nil || time.Since(began) > time.Second {
			t.Errorf("the oldest connection was not closed at once: after %v, %v", time.Since(began), err)
		}
		close(ln.until)
		third, theirs := net.Pipe()
		conns.conns <- theirs
		synctest.Wait()
		c := &client{t: t, c: third}
		if code := c.hello(connectOptions{id: "c", version: 4, clean: true}); code != 0 {
			t.Errorf("refused with %d", code)
		}
		if n := strings.Count(log.String(), "could not be accepted"); n != 1 {
			t.Errorf("said %d times, want once:\n%s", n, log.String())
		}
		second.Close()
		third.Close()
		conns.Close()
	})
}

// What a listener says of limits holds for it alone.
func TestListenerLimitsOfItsOwn(t *testing.T) {
	s := start(t, t.TempDir(), withListeners(
		ListenerConfig{},
		ListenerConfig{MaxPacket: 1 << 10, Anonymous: "none", ConnectTimeout: units.Duration(100 * time.Millisecond)},
		ListenerConfig{MaxPacket: 1 << 10},
	))
	dial := func(i int) *client {
		c, err := net.Dial("tcp", s.b.Listeners()[i].Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		return s.on(c)
	}
	if code := dial(1).hello(connectOptions{id: "c", version: 5, clean: true}); code != reasonNotAuthorized {
		t.Errorf("without a user name: %#x, want %#x", code, reasonNotAuthorized)
	}
	dial(1).expectEnd()
	eventually(t, "it is counted", func() bool { return s.limited("connect-timeout") == 1 })
	for i, want := range map[int]byte{0: 0, 2: reasonTooLarge} {
		c := dial(i)
		c.version = 5
		c.send(connectPacket(connectOptions{id: fmt.Sprint(i), version: 5, clean: true}))
		_, body := c.read()
		if want != 0 && !bytes.Contains(body, []byte{39, 0, 0, 4, 0}) {
			t.Errorf("CONNACK % x announces no Maximum Packet Size of 1024", body)
		}
		c.send(c.publishPacket("a", strings.Repeat("x", 2000), 1, 0, 1))
		if want == 0 {
			c.expectAck(typePuback, 1)
		} else if got := c.expectEnd(); got != want {
			t.Errorf("2,000 bytes: %#x, want %#x", got, want)
		}
	}
}

func TestListenerValidation(t *testing.T) {
	for _, tt := range []struct {
		l    ListenerConfig
		want string // "" if it is right
	}{
		{ListenerConfig{Address: ":1883"}, ""},
		{ListenerConfig{Address: "1883"}, "address"},
		{ListenerConfig{Address: "unix:/run/x", Mode: "0660"}, ""},
		{ListenerConfig{Address: "unix:x"}, "address"},
		{ListenerConfig{Address: "unix:/" + strings.Repeat("x", 107)}, "address"},
		{ListenerConfig{Address: "fd:x"}, ""},
		{ListenerConfig{Address: "systemd:"}, "address"},
		{ListenerConfig{Address: ":1", Protocol: "coap"}, "protocol"},
		{ListenerConfig{Address: ":1", TLSCert: "x"}, "tls_key"},
		{ListenerConfig{Address: ":1", TLSKey: "x"}, "tls_cert"},
		{ListenerConfig{Address: ":1", Mode: "0660"}, "mode"},
		{ListenerConfig{Address: "unix:/x", Mode: "rw"}, "mode"},
		{ListenerConfig{Address: "unix:/x", Mode: "1777"}, "mode"},
		{ListenerConfig{Address: ":1", Origins: []string{"*"}}, "origins"},
		{ListenerConfig{Address: ":1", Protocol: "websocket", Origins: []string{"*", "https://a:1"}}, ""},
		{ListenerConfig{Address: ":1", Protocol: "websocket", Origins: []string{"*", "a.example"}}, "origins[1]"},
		{ListenerConfig{Address: ":1", ProxyProtocol: true}, "proxy_from"},
		{ListenerConfig{Address: "unix:/x", ProxyProtocol: true}, ""},
		{ListenerConfig{Address: ":1", ProxyFrom: []string{"10.0.0.0/8"}}, "proxy_from"},
		{ListenerConfig{Address: ":1", ProxyProtocol: true, ProxyFrom: []string{"10.0.0.0/8", "fd00::1", "x"}}, "proxy_from[2]"},
		{ListenerConfig{Address: ":1", MaxConnections: -1}, "max_connections"},
		{ListenerConfig{Address: ":1", MaxConnectionsPerAddress: -1}, "max_connections_per_address"},
		{ListenerConfig{Address: ":1", MaxPacket: 5}, "max_packet"},
		{ListenerConfig{Address: ":1", ConnectTimeout: 5}, "connect_timeout"},
		{ListenerConfig{Address: ":1", Anonymous: "some"}, "anonymous"},
	} {
		cfg := DefaultConfig()
		tt.l.Name = "x"
		cfg.Listeners = []ListenerConfig{tt.l}
		err := cfg.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), "broker.listener[0]."+tt.want+": ")) {
			t.Errorf("%+v: got %v, want %q", tt.l, err, tt.want)
		}
	}
}
