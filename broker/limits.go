package broker

import (
	"container/list"
	"math"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// The limits at which a connection or a packet is refused, for limitNames.
const (
	limitConnections = iota
	limitPerAddress
	limitConnectTimeout
	limitTLSHandshake
	limitWebSocketHandshake
	limitOrigin
	limitProxyHeader
	limitEvicted
	limitPacketSize
	limitTopic
	limitSubscriptions
	limitReceiveMaximum
	limitOutput
	limitSessions
	limitRetained
	limitLogins
	limitDisk
	limitQueues
	limitKinds
	noLimit = -1
)

// limitNames are the limits as Stats, metrics and the log show them.
var limitNames = [limitKinds]string{
	limitConnections:        "connections",
	limitPerAddress:         "connections-per-address",
	limitConnectTimeout:     "connect-timeout",
	limitTLSHandshake:       "tls-handshake",
	limitWebSocketHandshake: "websocket-handshake",
	limitOrigin:             "origin",
	limitProxyHeader:        "proxy-header",
	limitEvicted:            "evicted",
	limitPacketSize:         "packet-size",
	limitTopic:              "topic",
	limitSubscriptions:      "subscriptions",
	limitReceiveMaximum:     "receive-maximum",
	limitOutput:             "output",
	limitSessions:           "sessions",
	limitRetained:           "retained",
	limitLogins:             "logins",
	limitDisk:               "disk",
	limitQueues:             "queues",
}

// limitOf is the limit that a connection ended for, by the reason code.
var limitOf = map[byte]int{
	reasonTooLarge: limitPacketSize, reasonTopicInvalid: limitTopic, reasonReceiveMaximum: limitReceiveMaximum,
}

// limit counts what was refused because of a limit.
func (c *counters) limit(cause int) { c.limited[cause].Add(1) }

const (
	// maxRefused is how many connections beyond a limit are told so at a time.
	// Each may take the CONNECT deadline for it.
	maxRefused = 64
	// spareFiles are the file descriptors that are not for connections:
	// listeners, the database, the API, and connections that are being refused.
	spareFiles = 128
	// evictAfter is how old a connection without a CONNECT must be to be closed
	// in favour of a new one.
	evictAfter = time.Second
)

// fileLimit returns how many connections the process has descriptors for.
func fileLimit() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return max(int(r.Cur)-spareFiles, 1)
}

// slot is the place that a connection takes, from accept to its end. The
// broker's mu protects it.
type slot struct {
	ln      *listener
	raw     net.Conn  // the socket itself, below PROXY, TLS and WebSocket
	conn    *conn     // nil until it is ready
	since   time.Time // when it was accepted
	ready   bool      // the handshakes are over, and there is a conn
	holds   bool      // it counts as a connection of its listener and in all
	refusal byte      // not 0: its CONNECT is refused with this reason code; it counts in refused only
	address addressKey
	waiting *list.Element // of ln.waiting, until its CONNECT is accepted
}

// addressKey is what connections per address are counted by: over all
// listeners, or over one that has a limit of its own.
type addressKey struct {
	addr netip.Addr // the zero one: not counted
	ln   *listener
}

// slots is the count of connections. The broker's mu protects it.
type slots struct {
	max     int // connections in all
	held    int
	refused int
	address map[addressKey]int
}

// admit gives a new connection its place. It returns nil if there is none, not
// even to say so; the socket is the caller's to close then.
func (b *Broker) admit(ln *listener, raw net.Conn) *slot {
	s := &slot{ln: ln, raw: raw, since: time.Now()}
	b.mu.Lock()
	cause, ok := b.place(s)
	b.mu.Unlock()
	b.reportFull(s, cause, s.raw.RemoteAddr().String())
	if !ok {
		return nil
	}
	return s
}

// place does admit's work, and returns the limit that was reached or noLimit.
// mu is held.
func (b *Broker) place(s *slot) (cause int, ok bool) {
	ln := s.ln
	cause = noLimit
	reason := byte(reasonQuota)
	switch {
	case b.stopping.Load():
		return noLimit, false
	case !ln.proxy && !b.takeAddress(s, peer(s.raw.RemoteAddr())):
		cause = limitPerAddress
	case ln.held >= ln.limits.maxConnections && !b.evict(ln, evictAfter):
		cause = limitConnections
	case b.slots.held >= b.slots.max && !b.evict(nil, evictAfter):
		cause, reason = limitConnections, reasonBusy
	}
	if cause != noLimit {
		b.giveAddress(s)
		if !b.turnAway(s, cause, reason) {
			return cause, false
		}
	} else {
		s.holds = true
		b.slots.held++
		ln.held++
		s.waiting = ln.waiting.PushBack(s)
	}
	ln.slots[s] = struct{}{}
	return cause, true
}

// proxied counts a connection by the address that its PROXY header has. It
// returns false if it is one too many and cannot be told.
func (b *Broker) proxied(s *slot, addr netip.Addr) bool {
	b.mu.Lock()
	if s.refusal != 0 || !s.holds || b.takeAddress(s, addr) {
		b.mu.Unlock()
		return true
	}
	b.letGo(s)
	ok := b.turnAway(s, limitPerAddress, reasonQuota)
	b.mu.Unlock()
	b.reportFull(s, limitPerAddress, addr.String())
	return ok
}

// turnAway has a connection refused when its CONNECT is there. It returns false
// if too many wait for that already. mu is held.
func (b *Broker) turnAway(s *slot, cause int, reason byte) bool {
	b.plane.limit(cause)
	if b.slots.refused >= maxRefused {
		return false
	}
	b.slots.refused++
	s.refusal = reason
	return true
}

// reportFull logs that a limit was reached, by the client at address.
func (b *Broker) reportFull(s *slot, cause int, address string) {
	if cause != noLimit {
		s.ln.report(cause, "connections are refused, there are too many", "address", address)
	}
}

// takeAddress counts a connection of addr. It returns false if there are as
// many as may be. mu is held.
func (b *Broker) takeAddress(s *slot, addr netip.Addr) bool {
	most := s.ln.limits.perAddress
	if most == 0 || !addr.IsValid() {
		return true
	}
	key := addressKey{addr: addr}
	if s.ln.limits.ownPerAddress {
		key.ln = s.ln
	}
	if b.slots.address[key] >= most {
		return false
	}
	if b.slots.address == nil {
		b.slots.address = make(map[addressKey]int)
	}
	b.slots.address[key]++
	s.address = key
	return true
}

// giveAddress is the reverse of takeAddress. mu is held.
func (b *Broker) giveAddress(s *slot) {
	if !s.address.addr.IsValid() {
		return
	}
	if b.slots.address[s.address]--; b.slots.address[s.address] == 0 {
		delete(b.slots.address, s.address)
	}
	s.address = addressKey{}
}

// peer returns the address that connections are counted by. Programs on this
// machine, and what comes through a tunnel that ends here, have none.
func peer(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok || tcp.IP.IsLoopback() {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap()
}

// evict closes the connection that has waited longest to have its CONNECT
// accepted, of one listener or (nil) of all, if it has waited for so long. A
// flood of silent connections thus does not lock anybody out. mu is held.
func (b *Broker) evict(of *listener, age time.Duration) bool {
	var oldest *slot
	for _, ln := range b.listeners {
		if of != nil && ln != of {
			continue
		}
		if e := ln.waiting.Front(); e != nil {
			if s := e.Value.(*slot); oldest == nil || s.since.Before(oldest.since) {
				oldest = s
			}
		}
	}
	if oldest == nil || time.Since(oldest.since) < age {
		return false
	}
	b.plane.limit(limitEvicted)
	b.letGo(oldest)
	_ = oldest.raw.Close() // whoever reads from it gives up
	if c := oldest.conn; c != nil {
		b.serving.Go(func() { _ = c.Close() }) // who waits for something else too; not with mu held
	}
	return true
}

// accepted says that the connection's CONNECT was accepted: it is no longer one
// that gives way to a new one.
func (b *Broker) accepted(s *slot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.waiting != nil {
		s.ln.waiting.Remove(s.waiting)
		s.waiting = nil
	}
}

// release gives the connection's place back, at its end. mu is held.
func (b *Broker) release(s *slot) {
	b.letGo(s)
	if s.refusal != 0 {
		s.refusal = 0
		b.slots.refused--
	}
	delete(s.ln.slots, s)
}

// letGo has the connection no longer counted. It may be called twice. mu is
// held.
func (b *Broker) letGo(s *slot) {
	if !s.holds {
		return
	}
	s.holds = false
	b.slots.held--
	s.ln.held--
	b.giveAddress(s)
	if s.waiting != nil {
		s.ln.waiting.Remove(s.waiting)
		s.waiting = nil
	}
}
