package broker

import (
	"container/list"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"penstock/internal/units"
)

// ListenerConfig is one [[broker.listener]]. A limit that is zero, or empty, is
// that of [broker].
type ListenerConfig struct {
	Name          string   `toml:"name"`
	Address       string   `toml:"address"`        // host:port (an empty host is every address of the machine), unix:/path, or fd:NAME, a socket of systemd
	Protocol      string   `toml:"protocol"`       // "mqtt" (also if empty) or "websocket"
	TLSCert       string   `toml:"tls_cert"`       // file with the certificate and those that lead to a known one, PEM; empty: no TLS
	TLSKey        string   `toml:"tls_key"`        // file with its private key, PEM
	Mode          string   `toml:"mode"`           // permissions of a unix socket, octal; empty: 0660
	Origins       []string `toml:"origins"`        // of WebSocket: pages that may connect, as scheme://host[:port]; "*": all
	ProxyProtocol bool     `toml:"proxy_protocol"` // every connection begins with a PROXY header
	ProxyFrom     []string `toml:"proxy_from"`     // networks of the proxies

	MaxConnections           int            `toml:"max_connections"`
	MaxConnectionsPerAddress int            `toml:"max_connections_per_address"`
	MaxPacket                units.Bytes    `toml:"max_packet"`
	ConnectTimeout           units.Duration `toml:"connect_timeout"`
	Anonymous                string         `toml:"anonymous"`
}

// Protocols that a listener is configured for.
const (
	protocolMQTT      = "mqtt"
	protocolWebSocket = "websocket"
)

// Networks that ListenerConfig.Network returns.
const (
	NetworkTCP     = "tcp"     // the address is host:port
	NetworkUnix    = "unix"    // a path
	NetworkSystemd = "systemd" // the name of a socket that systemd passes
)

// Network splits Address into what it is an address of, and the address there.
func (l ListenerConfig) Network() (network, address string) {
	for _, prefix := range []struct{ text, network string }{{"unix:", NetworkUnix}, {"fd:", NetworkSystemd}, {"systemd:", NetworkSystemd}} {
		if rest, ok := strings.CutPrefix(l.Address, prefix.text); ok {
			return prefix.network, rest
		}
	}
	return NetworkTCP, l.Address
}

// maxUnixPath is what Linux has room for in the address of a unix socket.
const maxUnixPath = 107

// validate returns an error that names the key, below "broker." and prefix.
func (l ListenerConfig) validate(prefix string) error {
	fail := func(key, format string, args ...any) error {
		return fmt.Errorf("broker.%s.%s: %s", prefix, key, fmt.Sprintf(format, args...))
	}
	network, address := l.Network()
	switch network {
	case NetworkUnix:
		if !filepath.IsAbs(address) || len(address) > maxUnixPath {
			return fail("address", "%q is not unix: and an absolute path of at most %d bytes", l.Address, maxUnixPath)
		}
	case NetworkSystemd:
		if address == "" {
			return fail("address", "%q names no socket: write the FileDescriptorName of the socket unit behind the colon", l.Address)
		}
	default:
		if _, _, err := net.SplitHostPort(address); err != nil {
			return fail("address", `%q is no address: write ":1883", "host:1883", "unix:/path" or "fd:NAME"`, l.Address)
		}
	}
	switch l.Protocol {
	case "", protocolMQTT, protocolWebSocket:
	default:
		return fail("protocol", `%q is none of "mqtt", "websocket"`, l.Protocol)
	}
	switch {
	case l.TLSCert != "" && l.TLSKey == "":
		return fail("tls_key", "tls_cert is set, so this is needed too: the file with its private key")
	case l.TLSKey != "" && l.TLSCert == "":
		return fail("tls_cert", "tls_key is set, so this is needed too: the file with its certificate")
	case l.Mode != "" && network != NetworkUnix:
		return fail("mode", "only a unix socket has one")
	case len(l.Origins) > 0 && l.Protocol != protocolWebSocket:
		return fail("origins", `only a listener with protocol = "websocket" has them`)
	case len(l.ProxyFrom) > 0 && !l.ProxyProtocol:
		return fail("proxy_from", "it is of use with proxy_protocol = true only")
	case l.ProxyProtocol && len(l.ProxyFrom) == 0 && network != NetworkUnix:
		return fail("proxy_from", "proxy_protocol needs the networks of the proxies, or anybody could claim any address")
	}
	if _, err := l.mode(); err != nil {
		return fail("mode", "%v", err)
	}
	for i, origin := range l.Origins {
		u, err := url.Parse(origin)
		key := fmt.Sprintf("origins[%d]", i)
		switch {
		case origin == "*":
		case err == nil && u.Scheme != "" && u.Host != "" && u.Path == "/" && u.RawQuery == "":
			return fail(key, "%q: an origin is without a path: take the last / away", origin)
		case err != nil || u.Scheme == "" || u.Host == "" || u.Path != "" || u.RawQuery != "":
			return fail(key, `%q is neither scheme://host[:port], without a path, nor "*"`, origin)
		}
	}
	for i, from := range l.ProxyFrom {
		if _, err := parseNetwork(from); err != nil {
			return fail(fmt.Sprintf("proxy_from[%d]", i), "%v", err)
		}
	}
	switch l.Anonymous {
	case "", "none", "loopback", "all":
	default:
		return fail("anonymous", `%q is none of "none", "loopback", "all"`, l.Anonymous)
	}
	errs := []error{
		within(prefix+".max_connections", l.MaxConnections, 0, 1000000),
		within(prefix+".max_connections_per_address", l.MaxConnectionsPerAddress, 0, 1000000),
	}
	if l.MaxPacket != 0 {
		errs = append(errs, within(prefix+".max_packet", l.MaxPacket, 1<<10, 255<<20))
	}
	if l.ConnectTimeout != 0 {
		errs = append(errs, within(prefix+".connect_timeout", l.ConnectTimeout, 1e8, 600e9))
	}
	return errors.Join(errs...)
}

// mode returns the permissions of a unix socket.
func (l ListenerConfig) mode() (fs.FileMode, error) {
	if l.Mode == "" {
		return 0o660, nil
	}
	mode, err := strconv.ParseUint(l.Mode, 8, 32)
	if err != nil || mode > 0o777 {
		return 0, fmt.Errorf(`%q is not a mode from "0000" to "0777"`, l.Mode)
	}
	return fs.FileMode(mode), nil
}

// parseNetwork reads 10.0.0.0/8, or one address.
func parseNetwork(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is not a network, as 10.0.0.0/8, nor an address", s)
	}
	return p, nil
}

// ListenerError is why New could not open a listener.
type ListenerError struct {
	Index int // in Config.Listeners
	Name  string
	Err   error
}

func (e *ListenerError) Error() string { return fmt.Sprintf("broker.listener %q, %v", e.Name, e.Err) }
func (e *ListenerError) Unwrap() error { return e.Err }

// Socket is a listening socket that somebody else has opened, by the name that
// a listener's address says.
type Socket struct {
	Name     string
	Listener net.Listener
}

// limits are what a listener asks of its connections.
type limits struct {
	maxConnections int
	perAddress     int  // 0: none
	ownPerAddress  bool // perAddress counts the connections of this listener only
	maxPacket      int
	connectTimeout time.Duration
	anonymous      string
}

// limits returns those of a listener; c are those of the broker.
func (c *Config) limits(l ListenerConfig) limits {
	lim := limits{
		maxConnections: math.MaxInt, perAddress: c.MaxConnectionsPerAddress, maxPacket: int(c.MaxPacket),
		connectTimeout: c.ConnectTimeout.D(), anonymous: c.Anonymous,
	}
	if l.MaxConnections != 0 {
		lim.maxConnections = l.MaxConnections
	}
	if l.MaxConnectionsPerAddress != 0 {
		lim.perAddress, lim.ownPerAddress = l.MaxConnectionsPerAddress, true
	}
	if l.MaxPacket != 0 {
		lim.maxPacket = int(l.MaxPacket)
	}
	if l.ConnectTimeout != 0 {
		lim.connectTimeout = l.ConnectTimeout.D()
	}
	if l.Anonymous != "" {
		lim.anonymous = l.Anonymous
	}
	return lim
}

// listener is one bound listener.
type listener struct {
	b        *Broker
	name     string
	protocol string // of ListenerInfo
	ln       net.Listener
	limits   limits

	proxy     bool // a PROXY header comes first
	proxyFrom []netip.Prefix
	tls       *tls.Config // nil: none
	web       *webSocket  // nil: plain MQTT

	// The broker's mu protects these.
	held    int // connections that count
	slots   map[*slot]struct{}
	waiting list.List // of *slot: CONNECT not yet accepted, the oldest first

	logMu    sync.Mutex
	episodes [limitKinds + 1]episode // the last one is of accept
}

// episode is a kind of trouble that may come a thousand times in a row, and is
// logged once a minute.
type episode struct {
	logged time.Time
	more   int // not logged since
}

// newListener returns a listener that is not bound.
func newListener(b *Broker, cfg ListenerConfig) *listener {
	return &listener{b: b, name: cfg.Name, protocol: "mqtt", limits: b.cfg.limits(cfg), slots: make(map[*slot]struct{})}
}

// openListener binds a listener, or takes its socket out of those that were
// passed.
func openListener(b *Broker, cfg ListenerConfig, passed *[]Socket) (*listener, error) {
	l := newListener(b, cfg)
	if cfg.TLSCert != "" {
		cert, err := loadCertificate(cfg.TLSCert, cfg.TLSKey, func(err error) {
			b.log.Error("certificate could not be read again, the old one stays", "listener", cfg.Name, "err", err)
		})
		if err != nil {
			return nil, err
		}
		l.tls = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert.get}
		l.protocol = "mqtts"
	}
	if cfg.Protocol == protocolWebSocket {
		l.web = newWebSocket(l, cfg.Origins)
		l.protocol = "ws"
		if l.tls != nil {
			l.protocol = "wss"
		}
	}
	l.proxy = cfg.ProxyProtocol
	for _, from := range cfg.ProxyFrom {
		network, err := parseNetwork(from)
		if err != nil {
			return nil, err
		}
		l.proxyFrom = append(l.proxyFrom, network)
	}
	var err error
	switch network, address := cfg.Network(); network {
	case NetworkUnix:
		mode, _ := cfg.mode() // Validate has seen it
		l.ln, err = listenUnix(address, mode)
	case NetworkSystemd:
		l.ln, err = take(passed, address)
	default:
		l.ln, err = net.Listen("tcp", address)
	}
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", cfg.Address, err)
	}
	if l.ln.Addr().Network() == "unix" && l.protocol == "mqtt" {
		l.protocol = "unix"
	}
	return l, nil
}

// take takes the first socket of a name out of those that were passed and are
// not taken yet.
func take(passed *[]Socket, name string) (net.Listener, error) {
	names := "none"
	for i, s := range *passed {
		if s.Name == name {
			*passed = append((*passed)[:i:i], (*passed)[i+1:]...)
			return s.Listener, nil
		}
		if i == 0 {
			names = ""
		} else {
			names += ", "
		}
		names += strconv.Quote(s.Name)
	}
	return nil, fmt.Errorf("systemd passed no socket of the name %q, or fewer than there are listeners for it; there is still: %s; see FileDescriptorName in systemd.socket(5)", name, names)
}

// listenUnix binds a unix socket. A socket file that a dead process left is
// removed; one that somebody listens on, or any other file, is not. Closing the
// listener removes the file.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if dir := filepath.Dir(path); missing(dir) {
		return nil, fmt.Errorf("there is no directory %s: make it first (RuntimeDirectory=penstock in the unit makes /run/penstock)", dir)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, errors.New("there is a file of this name that is no socket: take another path, or the file away")
	}
	ln, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) && abandoned(path) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		ln, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

func missing(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// abandoned reports whether path is a socket that nobody listens on.
func abandoned(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close() // it was only to see whether there is somebody
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// accept takes connections until the listener is closed. An error that is not
// that, as when file descriptors run out, passes: it waits and goes on.
func (b *Broker) accept(l *listener) {
	pause := time.Duration(0)
	for {
		raw, err := l.ln.Accept()
		if err != nil {
			if b.stopping.Load() || errors.Is(err, net.ErrClosed) {
				return
			}
			if more, ok := l.episode(limitKinds); ok {
				b.log.Error("connection could not be accepted", notLogged(more, "listener", l.name, "err", err)...)
			}
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
				b.mu.Lock()
				b.evict(nil, 0) // so that there is a descriptor
				b.mu.Unlock()
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			time.Sleep(pause)
			continue
		}
		pause = 0
		b.plane.sockets.Add(1)
		s := b.admit(l, raw)
		if s == nil {
			_ = raw.Close() // nothing was promised to it
			continue
		}
		b.serving.Go(func() { b.welcome(s) })
	}
}

// welcome runs a connection from accept to its end. Its handshakes are done
// here, so that one that stalls holds up nobody.
func (b *Broker) welcome(s *slot) {
	sock, err := s.ln.handshake(s)
	if err == nil {
		c := newConn(b, s, sock)
		if b.enter(s, c) {
			b.serve(c)
			return
		}
	}
	_ = s.raw.Close() // nothing was promised to it
	b.mu.Lock()
	b.release(s)
	b.mu.Unlock()
}

// enter registers the connection, unless it was closed meanwhile.
func (b *Broker) enter(s *slot, c *conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stopping.Load() || !s.holds && s.refusal == 0 {
		return false
	}
	c.refusal = s.refusal
	s.ready, s.conn = true, c
	b.conns[c] = struct{}{}
	return true
}

// closeArrivals closes the connections that are in their handshakes.
func (b *Broker) closeArrivals() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.listeners {
		for s := range l.slots {
			if !s.ready {
				_ = s.raw.Close() // whoever reads from it gives up
			}
		}
	}
}

// handshakeError is why a connection ended before its first packet.
type handshakeError struct {
	cause int
	err   error
}

func (e *handshakeError) Error() string { return e.err.Error() }
func (e *handshakeError) Unwrap() error { return e.err }

// handshake does what comes before the first packet: PROXY, TLS, WebSocket. It
// is over by the CONNECT deadline. The connection returned has the client's
// address.
func (l *listener) handshake(s *slot) (net.Conn, error) {
	if !l.proxy && l.tls == nil && l.web == nil {
		return s.raw, nil
	}
	deadline := s.since.Add(l.limits.connectTimeout)
	_ = s.raw.SetDeadline(deadline) // a socket that cannot have one fails on Read
	sock, err := l.shake(s, deadline)
	if err == nil {
		return sock, nil
	}
	if errors.Is(err, net.ErrClosed) {
		return nil, err // we closed it
	}
	var he *handshakeError
	cause := limitConnectTimeout
	if !isTimeout(err) && errors.As(err, &he) {
		cause = he.cause
	}
	l.b.plane.limit(cause)
	l.report(cause, "connection ended before MQTT began", "address", s.raw.RemoteAddr().String(), "err", err)
	return nil, err
}

func (l *listener) shake(s *slot, deadline time.Time) (sock net.Conn, err error) {
	sock = s.raw
	if l.proxy {
		var addr netip.Addr
		if sock, addr, err = l.readProxy(s.raw); err != nil {
			return nil, &handshakeError{limitProxyHeader, err}
		}
		if !l.b.proxied(s, addr) {
			return nil, net.ErrClosed // counted there
		}
	}
	if l.tls == nil && l.web == nil {
		return sock, nil
	}
	w := &wire{Conn: sock, spare: l.b.cfg.WriteTimeout.D(), until: deadline}
	sock = w
	if l.tls != nil {
		t := tls.Server(w, l.tls)
		if err := t.Handshake(); err != nil {
			return nil, &handshakeError{limitTLSHandshake, err}
		}
		sock = &tlsConn{Conn: t, wire: w}
	}
	if l.web != nil {
		if sock, err = l.web.upgrade(sock, w); err != nil {
			var he *handshakeError
			if !errors.As(err, &he) {
				err = &handshakeError{limitWebSocketHandshake, err}
			}
			return nil, err
		}
	}
	return sock, nil
}

// report logs a connection that was refused because of a limit.
func (l *listener) report(cause int, msg string, args ...any) {
	if more, ok := l.episode(cause); ok {
		args = append([]any{"listener", l.name, "limit", limitNames[cause]}, args...)
		l.b.log.Warn(msg, notLogged(more, args...)...)
	}
}

// notLogged adds to a line of the log how many like it were left out before.
func notLogged(n int, args ...any) []any {
	if n == 0 {
		return args
	}
	return append(args, "not_logged", n)
}

// episode reports whether trouble of a kind is to be logged now, and how often
// it was not since the last time.
func (l *listener) episode(kind int) (more int, ok bool) {
	l.logMu.Lock()
	defer l.logMu.Unlock()
	e := &l.episodes[kind]
	if now := time.Now(); e.logged.IsZero() || now.Sub(e.logged) >= time.Minute {
		more, e.more, e.logged = e.more, 0, now
		return more, true
	}
	e.more++
	return 0, false
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// half is a connection of which one direction can be ended.
type half interface{ CloseWrite() error }
