package api

import (
	"net"
	"net/netip"
	"sync"
)

// limitListener returns ln such that at most n of its connections are open at a
// time, and at most each of one address: each costs buffers and a goroutine, and
// a gateway has little of either. Beyond n they wait; beyond the share of an
// address they are closed, so that nobody takes the places of all others.
func limitListener(ln net.Listener, n, each int) net.Listener {
	return &limitedListener{
		Listener: ln, slots: make(chan struct{}, n), each: each, held: make(map[netip.Addr]int), closed: make(chan struct{}),
	}
}

type limitedListener struct {
	net.Listener
	slots  chan struct{}
	each   int
	once   sync.Once
	closed chan struct{}

	mu   sync.Mutex
	held map[netip.Addr]int
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			<-l.slots
			return nil, err
		}
		addr := address(c)
		if l.take(addr) {
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { l.give(addr) })}, nil
		}
		_ = c.Close() // nothing was promised to it
	}
}

// take counts a connection of an address, unless there are too many.
func (l *limitedListener) take(addr netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[addr] >= l.each {
		return false
	}
	l.held[addr]++
	return true
}

// give is the reverse of take, and gives the place back.
func (l *limitedListener) give(addr netip.Addr) {
	l.mu.Lock()
	if l.held[addr]--; l.held[addr] == 0 {
		delete(l.held, addr)
	}
	l.mu.Unlock()
	<-l.slots
}

// address returns the address of a client.
func address(c net.Conn) netip.Addr {
	tcp, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap()
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
