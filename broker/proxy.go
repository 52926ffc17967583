package broker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
)

// The PROXY protocol: what a load balancer or TLS terminator writes ahead of a
// connection to say whose it is. Version 1 is a line of text, version 2 is
// binary.

const (
	maxProxyV1 = 107     // the longest line, with its CRLF
	maxProxyV2 = 4 << 10 // addresses and extensions; real ones have some hundred bytes
)

var proxyV2 = []byte("\r\n\r\n\x00\r\nQUIT\n")

// proxied is a connection that came through a proxy.
type proxied struct {
	net.Conn
	remote net.Addr
}

// RemoteAddr returns the address of the client, not of the proxy.
func (p *proxied) RemoteAddr() net.Addr { return p.remote }

// CloseWrite ends the direction to the client.
func (p *proxied) CloseWrite() error {
	if h, ok := p.Conn.(half); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// SyscallConn gives the socket itself, for nothing of it is read ahead.
func (p *proxied) SyscallConn() (syscall.RawConn, error) {
	if s, ok := p.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// unknownAddr is the address of a client whom the proxy does not know. It is
// not the proxy's own, which may be one that is trusted.
type unknownAddr struct{}

func (unknownAddr) Network() string { return "proxy" }
func (unknownAddr) String() string  { return "unknown" }

// readProxy reads the PROXY header of a connection. It returns the connection
// with the address of the client, and that address for counting; the zero one
// if it has none.
func (l *listener) readProxy(raw net.Conn) (net.Conn, netip.Addr, error) {
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		from, known := tcp.AddrPort().Addr().Unmap(), false
		for _, network := range l.proxyFrom {
			known = known || network.Contains(from.WithZone(""))
		}
		if !known {
			return nil, netip.Addr{}, errors.New("PROXY: the peer is not in proxy_from")
		}
	}
	client, own, err := parseProxy(raw)
	switch {
	case err != nil:
		return nil, netip.Addr{}, fmt.Errorf("PROXY: %w", err)
	case own:
		return raw, netip.Addr{}, nil
	case !client.IsValid(), client.Addr().IsLoopback() && !local(raw): // the proxy's loopback is not ours
		return &proxied{raw, unknownAddr{}}, netip.Addr{}, nil
	}
	return &proxied{raw, net.TCPAddrFromAddrPort(client)}, client.Addr(), nil
}

var errProxyHeader = errors.New("malformed header")

// parseProxy reads a PROXY header of either version, and nothing behind it. own
// says that the connection is the proxy's own, as for a health check; else the
// client is invalid if the proxy does not know it.
func parseProxy(r io.Reader) (client netip.AddrPort, own bool, err error) {
	// Both versions are longer than the signature of the second.
	head := make([]byte, len(proxyV2), maxProxyV1)
	if _, err := io.ReadFull(r, head); err != nil {
		return client, false, err
	}
	if bytes.Equal(head, proxyV2) {
		return parseProxyV2(r)
	}
	if !bytes.HasPrefix(head, []byte("PROXY ")) {
		return client, false, errProxyHeader
	}
	for !bytes.HasSuffix(head, []byte("\r\n")) {
		if len(head) == maxProxyV1 {
			return client, false, errProxyHeader
		}
		head = head[:len(head)+1] // a byte at a time: what follows is not ours
		if _, err := io.ReadFull(r, head[len(head)-1:]); err != nil {
			return client, false, err
		}
	}
	client, err = parseProxyV1(string(head[:len(head)-2]))
	return client, false, err
}

func parseProxyV1(line string) (netip.AddrPort, error) {
	f := strings.Split(line, " ")
	if len(f) >= 2 && f[1] == "UNKNOWN" {
		return netip.AddrPort{}, nil
	}
	if len(f) != 6 || f[1] != "TCP4" && f[1] != "TCP6" {
		return netip.AddrPort{}, errProxyHeader
	}
	var ends [2]netip.AddrPort // source, destination
	for i := range ends {
		addr, err := netip.ParseAddr(f[2+i])
		if err != nil || addr.Zone() != "" || addr.Is4() != (f[1] == "TCP4") {
			return netip.AddrPort{}, errProxyHeader
		}
		port, err := strconv.ParseUint(f[4+i], 10, 16)
		if err != nil || strconv.FormatUint(port, 10) != f[4+i] {
			return netip.AddrPort{}, errProxyHeader
		}
		ends[i] = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	return ends[0], nil
}

func parseProxyV2(r io.Reader) (client netip.AddrPort, own bool, err error) {
	var head [4]byte // version and command, family and protocol, length
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return client, false, err
	}
	n := int(binary.BigEndian.Uint16(head[2:]))
	if head[0]>>4 != 2 || head[0]&0x0F > 1 || n > maxProxyV2 {
		return client, false, errProxyHeader
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return client, false, err
	}
	if head[0]&0x0F == 0 { // LOCAL
		return client, true, nil
	}
	size := 0 // of an address
	switch head[1] {
	case 0x00: // unspecified
		return client, false, nil
	case 0x11: // TCP over IPv4
		size = 4
	case 0x21: // TCP over IPv6
		size = 16
	case 0x31: // a unix socket of the proxy's machine: no address that means something here
		if n < 2*108 {
			return client, false, errProxyHeader
		}
		return client, false, nil
	default: // datagrams, and what does not exist
		return client, false, errProxyHeader
	}
	if n < 2*size+4 {
		return client, false, errProxyHeader
	}
	addr, _ := netip.AddrFromSlice(body[:size])
	return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(body[2*size:])), false, nil
}

// local reports whether a connection comes from this machine.
func local(c net.Conn) bool {
	switch a := c.RemoteAddr().(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return false
}
