package broker

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// certificate is a pair of files that may be replaced while the broker runs.
type certificate struct {
	files  [2]string // certificate, key
	failed func(error)

	mu      sync.Mutex
	checked time.Time
	seen    [2]os.FileInfo // what was tried last; nil: not there
	pair    *tls.Certificate
}

// loadCertificate reads a certificate and its key. When the files are changed
// later and the new ones cannot be used, failed is called once.
func loadCertificate(cert, key string, failed func(error)) (*certificate, error) {
	c := &certificate{files: [2]string{cert, key}, failed: failed, checked: time.Now()}
	c.seen = c.stat()
	pair, err := c.load()
	c.pair = pair
	return c, err
}

func (c *certificate) stat() (info [2]os.FileInfo) {
	for i, name := range c.files {
		info[i], _ = os.Stat(name) // load says what is wrong with it
	}
	return info
}

func (c *certificate) load() (*tls.Certificate, error) {
	cert, err := os.ReadFile(c.files[0])
	if err != nil {
		return nil, fmt.Errorf("tls_cert: %w", err)
	}
	key, err := os.ReadFile(c.files[1])
	if err != nil {
		return nil, fmt.Errorf("tls_key: %w", err)
	}
	if encrypted(key) {
		return nil, fmt.Errorf("tls_key: %s has a passphrase, which nobody can type at a start: openssl pkey -in FILE -out NEW takes it away", c.files[1])
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("tls_cert: %s, with tls_key %s: %w", c.files[0], c.files[1], err)
	}
	return &pair, nil
}

// encrypted reports whether a file in PEM has a private key that wants a
// passphrase.
func encrypted(file []byte) bool {
	for block, rest := pem.Decode(file); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return true
		}
	}
	return false
}

// CheckCertificates reads the certificates of all listeners. It returns what
// New would fail at, each with its key, and notes of what is no such failure
// but worth a look.
func (c Config) CheckCertificates(now time.Time) (notes []string, err error) {
	var errs []error
	for i, l := range c.Listeners {
		if l.TLSCert == "" {
			continue
		}
		key := fmt.Sprintf("broker.listener[%d].", i)
		pair, err := (&certificate{files: [2]string{l.TLSCert, l.TLSKey}}).load()
		switch {
		case errors.Is(err, fs.ErrPermission):
			notes = append(notes, fmt.Sprintf("%s%v: not checked; the user of the service must be able to read it", key, err))
		case err != nil:
			errs = append(errs, fmt.Errorf("%s%w", key, err))
		case now.After(pair.Leaf.NotAfter):
			notes = append(notes, fmt.Sprintf("%stls_cert: %s ended on %s: clients refuse it", key, l.TLSCert, pair.Leaf.NotAfter.Format(time.DateOnly)))
		case len(pair.Leaf.DNSNames)+len(pair.Leaf.IPAddresses) == 0:
			notes = append(notes, fmt.Sprintf("%stls_cert: %s has no subjectAltName: many clients refuse it", key, l.TLSCert))
		}
	}
	return notes, errors.Join(errs...)
}

// checkEvery is how often, at most, a handshake looks whether the files changed.
const checkEvery = time.Second

// get implements tls.Config.GetCertificate. A renewed certificate is taken from
// the next handshake on; the old one stays as long as the new pair is broken,
// as it is while one of the two files is replaced and the other is not.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.checked) < checkEvery {
		return c.pair, nil
	}
	c.checked = time.Now()
	now := c.stat()
	if same(now[0], c.seen[0]) && same(now[1], c.seen[1]) {
		return c.pair, nil
	}
	c.seen = now
	pair, err := c.load()
	if err != nil {
		c.failed(err)
		return c.pair, nil
	}
	c.pair = pair
	return c.pair, nil
}

func same(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// wire is the socket below TLS and WebSocket. These write by themselves now and
// then, from within a Read: a key update, a pong. The deadline of our own last
// write is long over then, so such a write gets one of its own.
type wire struct {
	net.Conn
	spare time.Duration // what such a write gets
	ours  atomic.Bool   // the write that runs is ours

	mu    sync.Mutex
	until time.Time // deadline of our writes
}

// SetWriteDeadline implements net.Conn.
func (w *wire) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.until = t
	return w.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (w *wire) SetDeadline(t time.Time) error {
	return errors.Join(w.SetReadDeadline(t), w.SetWriteDeadline(t))
}

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	if !w.ours.Load() {
		w.grace()
	}
	return w.Conn.Write(p)
}

// grace sets the deadline of a write that is not ours.
func (w *wire) grace() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now := time.Now(); now.After(w.until) {
		_ = w.Conn.SetWriteDeadline(now.Add(w.spare)) // fails on Write too
	}
}

// CloseWrite ends the direction to the client.
func (w *wire) CloseWrite() error {
	if h, ok := w.Conn.(half); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// tlsConn is a TLS connection whose Write takes no more than fits under one
// deadline: after a write that timed out TLS cannot go on.
type tlsConn struct {
	*tls.Conn
	wire *wire
}

// tlsPiece is how much is written at a time.
const tlsPiece = 16 << 10

// Write writes the beginning of p. Unlike what io.Writer asks, it may return
// less than len(p) without an error: the caller sets a new deadline and goes on.
func (t *tlsConn) Write(p []byte) (int, error) {
	t.wire.ours.Store(true)
	defer t.wire.ours.Store(false)
	return t.Conn.Write(p[:min(len(p), tlsPiece)])
}

// CloseWrite says that nothing more comes, to TLS and to TCP.
func (t *tlsConn) CloseWrite() error {
	return errors.Join(t.Conn.CloseWrite(), t.wire.CloseWrite())
}
