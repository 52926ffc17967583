package broker

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

var errRefused = errors.New("connection refused")

// hook is the one hook in mochi: it turns its control plane's events into
// calls of the data plane. mochi calls each of its methods in the goroutine
// that has read the CONNECT.
type hook struct {
	mqtt.HookBase
	b *Broker
}

// ID implements mqtt.Hook.
func (h *hook) ID() string { return "penstock" }

// Provides implements mqtt.Hook.
func (h *hook) Provides(event byte) bool {
	switch event {
	case mqtt.OnConnect, mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnSessionEstablish, mqtt.OnSessionEstablished:
		return true
	}
	return false
}

// OnConnect authenticates. It is done here, for here the refusal can say why.
func (h *hook) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	in, ok := cl.Net.Conn.(*handshake)
	if !ok {
		return errRefused
	}
	c := (*conn)(in)
	hello := c.hello
	c.who = principal{clientID: hello.clientID, username: hello.username}
	if ap, err := netip.ParseAddrPort(c.sock.RemoteAddr().String()); err == nil {
		c.who.address = ap.Addr().Unmap()
	} else if _, unix := c.sock.RemoteAddr().(*net.UnixAddr); unix {
		c.who.address = netip.IPv6Loopback()
	}
	reason, text := h.b.authenticate(c, hello.hasUsername, hello.password)
	// Who waited in vain may be connected anew by now. Who did not wait may well
	// have closed: it need not await its CONNACK (3.1.4) to say all it has to say.
	if c.queued && c.hungUp() {
		return errClosed
	}
	hello.password = nil
	switch {
	case reason != reasonSuccess:
	case hello.will != nil && !h.b.plane.acl.Load().allows(c.who, actionPublish, hello.will.Topic):
		reason, text = reasonNotAuthorized, "an access rule denies the will topic" // after a restart nobody could ask any more
	case hello.will != nil && !h.b.plane.willRoom(hello.clientID, hello.will):
		h.b.plane.limit(limitRetained)
		reason, text = reasonQuota, "there are as many wills as may be"
	case hello.expiry > 0 && !h.b.plane.mayOpen(hello.clientID):
		h.b.plane.limit(limitSessions)
		reason, text = reasonQuota, "there are as many persistent sessions as may be"
	case hello.expiry > 0 && h.b.plane.noRoomFor(hello.clientID):
		h.b.plane.limit(limitDisk)
		reason, text = reasonQuota, "the disk is nearly full, and a new persistent session could not be stored"
	case h.b.stopping.Load():
		reason, text = reasonShuttingDown, reasonTexts[reasonShuttingDown]
	}
	if reason != reasonSuccess {
		return c.refuse(reason, text, hello.clientID)
	}
	h.b.accepted(c.slot)
	return nil
}

// OnConnectAuthenticate implements mqtt.Hook: OnConnect has decided.
func (h *hook) OnConnectAuthenticate(*mqtt.Client, packets.Packet) bool { return true }

// OnACLCheck implements mqtt.Hook. Nothing that mochi routes exists, so
// nothing is allowed there.
func (h *hook) OnACLCheck(*mqtt.Client, string, bool) bool { return false }

// OnSessionEstablish takes the client's session, from another connection if
// need be, and waits until what CONNACK is about to say is durable.
func (h *hook) OnSessionEstablish(cl *mqtt.Client, _ packets.Packet) {
	h.b.open((*conn)(cl.Net.Conn.(*handshake)))
}

// open gets c its session.
func (b *Broker) open(c *conn) {
	h := c.hello
	o := opening{
		clientID: h.clientID, version: c.version, cleanStart: h.cleanStart, expiry: b.capExpiry(h.expiry),
		window: min(b.cfg.Window, int(h.receiveMax)), who: c.who,
	}
	if h.will != nil {
		who := c.who
		o.will = &will{msg: h.will, delay: h.willDelay, who: &who}
	}
	got := b.plane.open(c, o, &c.batch)
	c.sess, c.present = got.s, got.present
	c.leaving.before = got.before
	c.batch.flush()
	if got.durable == nil {
		return
	}
	timer := time.NewTimer(c.ln.limits.connectTimeout)
	defer timer.Stop()
	select {
	case <-got.durable:
	case <-c.closing:
	case <-timer.C:
		_ = c.refuse(reasonUnavailable, "session could not be stored in time", h.clientID)
	}
}

// capExpiry bounds a Session Expiry Interval by the configuration.
func (b *Broker) capExpiry(expiry uint32) uint32 {
	return uint32(min(int64(expiry), int64(b.cfg.SessionExpiry.D()/time.Second)))
}

// OnSessionEstablished starts deliveries: the CONNACK is written.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	c := (*conn)(cl.Net.Conn.(*handshake))
	c.cleanStart, c.noExpiry = c.hello.cleanStart, c.hello.expiry == 0
	c.hello = nil
	c.acks.mu.Lock()
	c.acks.link = c
	c.acks.changed = c.acknowledged
	c.acks.all = &c.b.plane.held
	c.acks.mu.Unlock()
	c.sess.attach(c, &c.acks, &c.batch)
	c.batch.flush()
}

// acknowledged wakes a reader that was held back. The acknowledgement queue
// calls it, with its lock held, when acknowledgements have left.
func (c *conn) acknowledged(pending int) {
	if pending > c.b.cfg.ReceiveMaximum {
		return
	}
	if c.holding.Load() {
		_ = c.sock.SetReadDeadline(past) // a socket that cannot have one fails on Read
	}
	c.wake()
}

// mochiOptions returns mochi's options: everything that is the data plane's is
// as small or as large as it can be.
func mochiOptions(cfg *Config) *mqtt.Options {
	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumClients = math.MaxInt64
	caps.MaximumClientWritesPending = 0
	caps.MaximumMessageExpiryInterval = 0
	caps.MaximumSessionExpiryInterval = math.MaxUint32
	caps.MaximumPacketSize = 0
	caps.MaximumInflight = 1
	caps.TopicAliasMaximum = 0
	caps.ReceiveMaximum = uint16(cfg.ReceiveMaximum)
	caps.MinimumProtocolVersion = 3
	return &mqtt.Options{Capabilities: caps, SysTopicResendInterval: math.MaxInt32}
}
