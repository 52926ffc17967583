package api

import (
	"net"
	"testing"
)

// from is a listener whose connections come from the addresses given.
type from struct {
	net.Listener
	addrs []string
}

type fromConn struct {
	net.Conn
	addr   net.Addr
	closed bool
}

func (c *fromConn) RemoteAddr() net.Addr { return c.addr }
func (c *fromConn) Close() error         { c.closed = true; return nil }

func (l *from) Accept() (net.Conn, error) {
	if len(l.addrs) == 0 {
		return nil, net.ErrClosed
	}
	addr := &net.TCPAddr{IP: net.ParseIP(l.addrs[0]), Port: 1}
	l.addrs = l.addrs[1:]
	return &fromConn{addr: addr}, nil
}

// One address does not take the places of all others.
func TestConnectionsPerAddress(t *testing.T) {
	ln := limitListener(&from{addrs: []string{
		"10.0.0.1", "10.0.0.1", "10.0.0.1", "::ffff:10.0.0.1", "10.0.0.2",
		"127.0.0.1", "127.0.0.1", "127.0.0.1",
	}}, 100, 2)
	var got []string
	var first net.Conn
	for {
		c, err := ln.Accept()
		if err != nil {
			break
		}
		if first == nil {
			first = c
		}
		got = append(got, c.RemoteAddr().(*net.TCPAddr).IP.String())
	}
	want := []string{"10.0.0.1", "10.0.0.1", "10.0.0.2", "127.0.0.1", "127.0.0.1"}
	if len(got) != len(want) {
		t.Fatalf("accepted from %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("accepted from %v, want %v", got, want)
		}
	}
	l := ln.(*limitedListener)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if n := l.held[address(first)]; n != 1 || len(l.slots) != len(want)-1 {
		t.Errorf("after a close %d of the address and %d in all are held, want 1 and %d", n, len(l.slots), len(want)-1)
	}
}
