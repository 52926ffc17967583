//go:build attack

package attack

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Listeners beside the plain one. serve puts the files of a certificate in
// place of CERT and KEY.
const (
	listenTCP = `
[[broker.listener]]
name = "tcp"
address = "127.0.0.1:0"
`
	listenTLS = listenTCP + `
[[broker.listener]]
name = "tls"
address = "127.0.0.1:0"
tls_cert = "CERT"
tls_key = "KEY"
`
	listenWS = listenTCP + `
[[broker.listener]]
name = "ws"
address = "127.0.0.1:0"
protocol = "websocket"
`
	listenProxy = listenTCP + `
[[broker.listener]]
name = "proxy"
address = "127.0.0.1:0"
proxy_protocol = true
proxy_from = ["127.0.0.0/8"]
`
)

// listenerAttacks are those on what comes before MQTT.
var listenerAttacks = []attack{
	{
		name:   "TLS handshakes that stall",
		config: "max_connections = 1000" + listenTLS,
		bound:  1000 * 32 << 10, why: "32 kB for each of 1,000 connections, TLS's record buffer among it",
		through: "tls",
		moved:   "penstock_limited_total",
		run: func(ctx context.Context, a *arena) {
			hello := clientHello(a.t)
			pace(ctx, 400, func(i int) {
				c, err := a.b.dial(1+i%250, a.b.listeners["tls"])
				if err != nil {
					return
				}
				a.keep(c)
				_, _ = c.Write(hello[:len(hello)*(i%4)/3]) // nothing, parts, all of it
				a.done.Add(1)
			})
		},
	},
	{
		name:   "TLS handshakes one after the other",
		config: listenTLS,
		bound:  32 * mib, why: "nothing stays",
		through: "tls",
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				pace(ctx, 10, func(int) {
					c, err := a.b.dial(1+n, a.b.listeners["tls"])
					if err != nil {
						return
					}
					_ = tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake()
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:   "slow-loris on WebSocket",
		config: "max_connections = 1000" + listenWS,
		bound:  1000 * 20 << 10, why: "20 kB for each of 1,000 connections",
		through: "ws",
		moved:   "penstock_limited_total",
		run: func(ctx context.Context, a *arena) {
			request := []byte("GET /mqtt HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nX: " + strings.Repeat("y", 5000))
			var open []net.Conn
			pace(ctx, 400, func(i int) {
				c, err := a.b.dial(1+i%250, a.b.listeners["ws"])
				if err != nil {
					return
				}
				a.keep(c)
				open = append(open, c)
				for _, c := range []net.Conn{c, open[i*7%len(open)]} {
					_, _ = c.Write(request[i%100 : i%100+1])
				}
				a.done.Add(1)
			})
		},
	},
	{
		name:   "WebSocket frames of all kinds",
		config: listenWS,
		bound:  64 * mib, why: "nothing is allocated for what was only announced, and a message of MQTT may span frames",
		through: "ws",
		run: func(ctx context.Context, a *arena) {
			frames := [][]byte{
				{0x82, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0}, // 2^63-1 bytes
				{0x82, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0}, // more
				{0x82, 0x02, 0xC0, 0x00},                                                              // not masked
				{0x81, 0x82, 0, 0, 0, 0, 0xC0, 0x00},                                                  // text
				{0xF2, 0x82, 0, 0, 0, 0, 0xC0, 0x00},                                                  // reserved bits
				{0x89, 0xFE, 0x01, 0x00, 0, 0, 0, 0},                                                  // a ping of 256 bytes
				{0x80, 0x82, 0, 0, 0, 0, 0xC0, 0x00},                                                  // a continuation of nothing
				[]byte(strings.Repeat("\x89\x80\x00\x00\x00\x00", 1000)),                              // pings
				[]byte("\x02\x80\x00\x00\x00\x00" + strings.Repeat("\x00\x80\x00\x00\x00\x00", 1000)), // empty fragments
			}
			pace(ctx, 300, func(i int) {
				c, err := a.b.dial(1+i%250, a.b.listeners["ws"])
				if err != nil {
					return
				}
				defer c.Close()
				w, err := upgrade(c)
				if err != nil {
					return
				}
				_, _ = w.Write(connectPacket(hello{id: fmt.Sprint("w", i), clean: true}))
				_, _ = c.Write(frames[i%len(frames)])
				a.done.Add(1)
			})
		},
	},
	{
		name:   "PROXY headers that never end",
		config: "max_connections = 1000" + listenProxy,
		bound:  1000 * 20 << 10, why: "20 kB for each of 1,000 connections",
		moved: "penstock_limited_total",
		run: func(ctx context.Context, a *arena) {
			headers := []string{"PROXY TCP4 ", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\xFF\xFF", "\r\n\r\n\x00\r\n", "", "PROXY " + strings.Repeat("x", 500)}
			pace(ctx, 400, func(i int) {
				c, err := a.b.dial(1+i%250, a.b.listeners["proxy"])
				if err != nil {
					return
				}
				a.keep(c)
				_, _ = c.Write([]byte(headers[i%len(headers)]))
				a.done.Add(1)
			})
		},
	},
}

// writeCertificate makes a certificate for 127.0.0.1, and returns its files.
func writeCertificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "penstock"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	bytes, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: bytes}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// clientHello returns what a TLS client says first.
func clientHello(t *testing.T) []byte {
	here, there := net.Pipe()
	defer there.Close()
	go func() { _ = tls.Client(here, &tls.Config{InsecureSkipVerify: true}).Handshake(); here.Close() }() // it fails
	_ = there.SetReadDeadline(time.Now().Add(patience))                                                   // fails on Read
	header := make([]byte, 5)
	if _, err := io.ReadFull(there, header); err != nil {
		t.Error(err)
		return header
	}
	rest := make([]byte, binary.BigEndian.Uint16(header[3:]))
	if _, err := io.ReadFull(there, rest); err != nil {
		t.Error(err)
	}
	return append(header, rest...)
}

// secure wraps c as a listener of this name wants it.
func secure(c net.Conn, listener string) (net.Conn, error) {
	switch listener {
	case "tls":
		return tls.Client(c, &tls.Config{InsecureSkipVerify: true}), nil
	case "ws":
		return upgrade(c)
	}
	return c, nil
}

// webSocket is a client's WebSocket that carries a stream of bytes.
type webSocket struct {
	net.Conn
	r    *bufio.Reader
	left uint64 // of the frame that is being read
}

// upgrade asks for a WebSocket.
func upgrade(c net.Conn) (*webSocket, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	request := "GET /mqtt HTTP/1.1\r\nHost: penstock\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
	if _, err := io.WriteString(c, request); err != nil {
		return nil, err
	}
	w := &webSocket{Conn: c, r: bufio.NewReader(c)}
	answer, err := http.ReadResponse(w.r, nil)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusSwitchingProtocols {
		return nil, errors.New(answer.Status)
	}
	return w, c.SetDeadline(time.Time{})
}

// Write sends p as one binary message, masked with zeros.
func (w *webSocket) Write(p []byte) (int, error) {
	frame := []byte{0x82, 0x80 | byte(min(len(p), 126))}
	switch {
	case len(p) >= 1<<16:
		frame = binary.BigEndian.AppendUint64([]byte{0x82, 0x80 | 127}, uint64(len(p)))
	case len(p) >= 126:
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(p)))
	}
	frame = append(frame, 0, 0, 0, 0)
	if _, err := w.Conn.Write(append(frame, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Read reads what the frames carry.
func (w *webSocket) Read(p []byte) (int, error) {
	for w.left == 0 {
		var head [2]byte
		if _, err := io.ReadFull(w.r, head[:]); err != nil {
			return 0, err
		}
		w.left = uint64(head[1] & 0x7F)
		size := map[uint64]int{126: 2, 127: 8}[w.left]
		if size > 0 {
			var long [8]byte
			if _, err := io.ReadFull(w.r, long[8-size:]); err != nil {
				return 0, err
			}
			w.left = binary.BigEndian.Uint64(long[:])
		}
		if head[0]&0x0F > 2 {
			return 0, fmt.Errorf("frame % x", head)
		}
	}
	n, err := w.r.Read(p[:min(uint64(len(p)), w.left)])
	w.left -= uint64(n)
	return n, err
}
