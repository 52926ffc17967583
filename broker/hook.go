package broker

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

var errRefused = errors.New("connection refused")

// greet handles the CONNECT, of which first is the first byte. mochi is given one that says no more than it has
// to know: it refuses some that are legal, lets some pass that are not, and
// sessions, wills, windows and aliases are ours.
func (c *conn) greet(first byte, body []byte) error {
	h, err := parseConnect(body)
	c.hello, c.version = h, h.version
	if err == nil && first&0x0F != 0 && h.version > 3 {
		err = malformed("reserved flags of a CONNECT") // [MQTT-2.1.3-1]
	}
	if c.refusal != 0 && err != errNotMQTT { // counted when it was accepted
		return c.refuse(c.refusal, "too many connections", h.clientID)
	}
	if err == errNotMQTT {
		_ = c.Close() // not a client of ours; it gets no answer
		return err
	}
	var wrong *wireError
	if errors.As(err, &wrong) {
		return c.refuse(wrong.reason, wrong.text, h.clientID)
	}
	if h.will != nil && !validTopic(h.will.Topic, c.b.cfg.MaxTopicBytes, c.b.cfg.MaxTopicLevels) {
		return c.refuse(reasonTopicInvalid, "will topic is not a topic name, is too long, or has too many levels", h.clientID)
	}
	if h.expiry > 0 && len(h.clientID) > c.b.cfg.MaxTopicBytes { // it is kept, and there may be many
		return c.refuse(reasonClientIDInvalid, "client identifier is too long for a persistent session", h.clientID[:64])
	}
	if h.clientID == "" { // [MQTT-3.1.3-6] [MQTT-3.1.3-7]
		h.clientID, c.assigned = "auto-"+rand.Text(), true
	}
	c.noProblems = h.noProblems
	c.keepAlive = time.Duration(h.keepAlive) * time.Second
	if most := c.b.cfg.MaxKeepAlive.D().Truncate(time.Second); h.version == 5 && most > 0 && (c.keepAlive == 0 || c.keepAlive > most) {
		c.keepAlive, c.imposed = most, true
	}
	c.keepAlive = c.keepAlive * 3 / 2 // [MQTT-3.1.2-22]
	g := []byte{0, 4, 'M', 'Q', 'T', 'T', 5, 2, 0, 0, 0, byte(len(h.clientID) >> 8), byte(len(h.clientID))}
	g = append(g, h.clientID...)
	h.greeting = append(appendVarint([]byte{typeConnect << 4}, len(g)), g...)
	return nil
}

// refuse answers a CONNECT with the reason, or what MQTT 3.x has for it
// (3.2.2.3), and closes. It returns errRefused.
func (c *conn) refuse(reason byte, text, clientID string) error {
	c.b.notice("connection refused", "client", clientID, "address", c.sock.RemoteAddr().String(), "reason", fmt.Sprintf("0x%02X", reason), "err", text)
	// Mosquitto's bridges first say their version with the high bit set, and
	// fall back when they get the return code of that version.
	if c.version&0x7F >= 5 {
		var props []byte
		if text != "" {
			props = appendProperty(nil, propReasonString, text)
		}
		packet := appendConnack(nil, 5, false, reason, props)
		if c.hello.tooLarge(packet) { // [MQTT-3.2.2-19]
			packet = appendConnack(nil, 5, false, reason, nil)
		}
		if !c.hello.tooLarge(packet) {
			c.say(packet)
		}
	} else if code := connackV3(reason); code != 0 {
		c.say(appendConnack(nil, 3, false, code, nil))
	}
	c.outMu.Lock()
	c.parting = true
	c.outMu.Unlock()
	_ = c.Close()
	return errRefused
}

// connack returns the CONNACK of a session.
func (c *conn) connack() []byte {
	if c.version < 5 {
		return appendConnack(nil, c.version, c.present, 0, nil)
	}
	h, cfg := c.hello, &c.b.cfg
	props := []byte{propReceiveMaximum, byte(cfg.ReceiveMaximum >> 8), byte(cfg.ReceiveMaximum)}
	props = binary.BigEndian.AppendUint32(append(props, propMaximumPacket), uint32(c.ln.limits.maxPacket))
	props = append(props, propTopicAliasMaximum, 0, maxAliases)
	if capped := c.b.capExpiry(h.expiry); capped < h.expiry { // 3.2.2.3.2
		props = binary.BigEndian.AppendUint32(append(props, propSessionExpiry), capped)
	}
	if c.assigned { // [MQTT-3.2.2-16]
		props = appendProperty(props, propAssignedID, h.clientID)
	}
	if c.imposed { // [MQTT-3.2.2-21]
		props = binary.BigEndian.AppendUint16(append(props, propServerKeepAlive), uint16(c.keepAlive*2/3/time.Second))
	}
	if cfg.ResponseInfo != "" && h.wantResponse { // [MQTT-3.1.2-28]
		if info, ok := expand(cfg.ResponseInfo, c.who); ok {
			props = appendProperty(props, propResponseInfo, info)
		}
	}
	return appendConnack(nil, 5, c.present, 0, props)
}

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

// connackV3 returns the CONNACK return code of MQTT 3.x for a reason code; 0
// where it has none, and the connection is just closed.
func connackV3(reason byte) byte {
	switch reason {
	case reasonUnsupportedVersion:
		return 1
	case reasonClientIDInvalid:
		return 2
	case reasonUnavailable, reasonBusy, reasonQuota, reasonShuttingDown:
		return 3
	case reasonBadCredentials:
		return 4
	case reasonNotAuthorized:
		return 5
	}
	return 0
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
	if c.hungUp() { // it may have waited long, and be connected anew by now
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
	var durable <-chan struct{}
	c.sess, c.present, durable = b.plane.open(c, o, &c.batch)
	c.batch.flush()
	if durable == nil {
		return
	}
	timer := time.NewTimer(c.ln.limits.connectTimeout)
	defer timer.Stop()
	select {
	case <-durable:
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
