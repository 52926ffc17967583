package broker

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"penstock/storage"
)

// hello is what of a CONNECT mochi must not see, or sees wrongly.
type hello struct {
	connect    packets.ConnectParams
	expiry     uint32
	receiveMax uint16
	maxPacket  uint32
	err        error // what is wrong with the CONNECT that mochi does not see
}

var errRefused = errors.New("connection refused")

// hook is the one hook in mochi: it turns its control plane's events into
// calls of the data plane. mochi calls each of its methods in the goroutine
// that reads the connection.
type hook struct {
	mqtt.HookBase
	b *Broker
}

// ID implements mqtt.Hook.
func (h *hook) ID() string { return "penstock" }

// Provides implements mqtt.Hook.
func (h *hook) Provides(event byte) bool {
	switch event {
	case mqtt.OnPacketRead, mqtt.OnPacketEncode, mqtt.OnConnect, mqtt.OnConnectAuthenticate,
		mqtt.OnACLCheck, mqtt.OnSessionEstablish, mqtt.OnSessionEstablished:
		return true
	}
	return false
}

// OnPacketRead checks a CONNECT, keeps what is ours of it, and leaves mochi
// only what it judges rightly.
func (h *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	c, ok := cl.Net.Conn.(*conn)
	if !ok || pk.FixedHeader.Type != packets.Connect {
		return pk, nil
	}
	con := &pk.Connect
	c.version = pk.ProtocolVersion
	if c.refusal != 0 {
		c.refuse(c.refusal) // counted and logged when it was accepted
		return pk, packets.ErrRejectPacket
	}
	name := string(con.ProtocolName)
	refuse := func(reason byte, why string) (packets.Packet, error) {
		h.b.log.Info("connection refused", "client", con.ClientIdentifier, "address", c.sock.RemoteAddr().String(), "reason", fmt.Sprintf("0x%02X", reason), "err", why)
		c.refuse(reason)
		return pk, packets.ErrRejectPacket // of all errors the one that mochi does not ignore here
	}
	var wrong *wireError
	switch {
	case name != "MQTT" && name != "MQIsdp":
		return pk, packets.ErrRejectPacket // [MQTT-3.1.2-1]: not a client of ours; it gets no answer
	case name == "MQIsdp" && c.version != 3, name == "MQTT" && c.version != 4 && c.version != 5:
		return refuse(reasonUnsupportedVersion, "protocol version is not 3, 4 or 5") // [MQTT-3.1.2-2]
	case pk.ReservedBit != 0:
		return refuse(reasonMalformed, "reserved connect flag is set") // [MQTT-3.1.2-3]
	case !con.WillFlag && (con.WillQos != 0 || con.WillRetain), con.WillQos > 2:
		return refuse(reasonMalformed, "will flags contradict each other") // [MQTT-3.1.2-11] to [MQTT-3.1.2-15]
	case con.WillFlag && !validTopic(con.WillTopic, h.b.cfg.MaxTopicBytes, h.b.cfg.MaxTopicLevels):
		return refuse(reasonTopicInvalid, "will topic is not a topic name")
	case c.version < 5 && con.PasswordFlag && !con.UsernameFlag:
		return refuse(reasonMalformed, "password without a user name") // [MQTT-3.1.2-22] of 3.1.1
	case c.version < 5 && con.ClientIdentifier == "" && (!con.Clean || c.version == 3):
		return refuse(reasonClientIDInvalid, "no client identifier") // [MQTT-3.1.3-8] of 3.1.1
	case !validText([]byte(con.ClientIdentifier)):
		return refuse(reasonClientIDInvalid, "client identifier is not UTF-8, or has U+0000 in it")
	case pk.Properties.AuthenticationMethod != "":
		return refuse(reasonBadAuthMethod, "enhanced authentication is not supported")
	case errors.As(c.hello.err, &wrong):
		return refuse(wrong.reason, wrong.text)
	}
	c.hello = hello{
		connect: *con, expiry: pk.Properties.SessionExpiryInterval,
		receiveMax: pk.Properties.ReceiveMaximum, maxPacket: pk.Properties.MaximumPacketSize,
	}
	if c.version < 5 && !con.Clean {
		c.hello.expiry = storage.NeverExpires
	}
	if con.Keepalive > 0 {
		c.keepAlive = time.Duration(con.Keepalive) * time.Second * 3 / 2 // [MQTT-3.1.2-22]
	}
	// mochi refuses an empty will payload and an empty password, though both
	// are legal, and has wills, windows and aliases of its own.
	con.WillFlag, con.WillQos, con.WillRetain = false, 0, false
	con.WillTopic, con.WillPayload = "", nil
	con.Password, con.PasswordFlag = nil, false
	con.Keepalive = 0
	pk.Properties.ReceiveMaximum, pk.Properties.TopicAliasMaximum = 0, 0
	return pk, nil
}

// refuse answers a CONNECT with the reason code, or what MQTT 3.x has for it
// (3.2.2.3), and leaves the closing to mochi.
func (c *conn) refuse(reason byte) {
	// Mosquitto's bridges first say their version with the high bit set, and
	// fall back when they get the return code of that version.
	if c.version&0x7F >= 5 {
		_, _ = c.Write([]byte{typeConnack << 4, 3, 0, reason, 0}) // mochi closes in any case
	} else if code := connackV3(reason); code != 0 {
		_, _ = c.Write([]byte{typeConnack << 4, 2, 0, code})
	}
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
func (h *hook) OnConnect(cl *mqtt.Client, pk packets.Packet) error {
	c, ok := cl.Net.Conn.(*conn)
	if !ok {
		return errRefused
	}
	cl.Properties.Will = mqtt.Will{}
	con := &c.hello.connect
	c.who = principal{clientID: cl.ID, username: string(con.Username)}
	if ap, err := netip.ParseAddrPort(c.sock.RemoteAddr().String()); err == nil {
		c.who.address = ap.Addr().Unmap()
	} else if _, unix := c.sock.RemoteAddr().(*net.UnixAddr); unix {
		c.who.address = netip.IPv6Loopback()
	}
	reason := h.b.authenticate(c, c.who, con.UsernameFlag, con.Password)
	if reason == reasonSuccess && con.WillFlag && !h.b.plane.acl.Load().allows(c.who, actionPublish, con.WillTopic) {
		reason = reasonNotAuthorized // after a restart nobody could ask any more
	}
	if h.b.stopping.Load() {
		reason = reasonShuttingDown
	}
	con.Password = nil
	if reason != reasonSuccess {
		h.b.log.Info("connection refused", "client", cl.ID, "username", c.who.username, "address", c.sock.RemoteAddr().String(), "reason", fmt.Sprintf("0x%02X", reason))
		c.refuse(reason)
		return errRefused
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
func (h *hook) OnSessionEstablish(cl *mqtt.Client, pk packets.Packet) {
	c := cl.Net.Conn.(*conn)
	h.b.open(c, cl.ID)
}

// open gets c its session.
func (b *Broker) open(c *conn, clientID string) {
	con := &c.hello.connect
	window := b.cfg.Window
	if c.hello.receiveMax > 0 {
		window = min(window, int(c.hello.receiveMax))
	}
	o := opening{
		clientID: clientID, version: c.version, cleanStart: con.Clean, expiry: b.capExpiry(c.hello.expiry),
		window: window, who: c.who,
	}
	if con.WillFlag {
		o.will = newWill(con, c.who)
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
		b.log.Warn("session could not be stored in time, connection refused", "client", clientID)
		c.refuse(reasonUnavailable)
		_ = c.Close()
	}
}

// capExpiry bounds a Session Expiry Interval by the configuration.
func (b *Broker) capExpiry(expiry uint32) uint32 {
	return uint32(min(int64(expiry), int64(b.cfg.SessionExpiry.D()/time.Second)))
}

// newWill makes the will of a CONNECT.
func newWill(con *packets.ConnectParams, who principal) *will {
	p := &con.WillProperties
	m := &storage.Message{Topic: con.WillTopic, Payload: con.WillPayload, QoS: con.WillQos, Retain: con.WillRetain}
	if p.MessageExpiryInterval > 0 {
		m.Expires = int64(p.MessageExpiryInterval) * 1000
	}
	var props []byte
	text := func(id byte, s string) {
		props = append(props, id, byte(len(s)>>8), byte(len(s)))
		props = append(props, s...)
	}
	if p.PayloadFormatFlag {
		props = append(props, propPayloadFormat, p.PayloadFormat)
	}
	if p.ContentType != "" {
		text(propContentType, p.ContentType)
	}
	if p.ResponseTopic != "" {
		text(propResponseTopic, p.ResponseTopic)
	}
	if len(p.CorrelationData) > 0 {
		text(propCorrelationData, string(p.CorrelationData))
	}
	for _, u := range p.User {
		text(propUser, u.Key)
		props = append(props, byte(len(u.Val)>>8), byte(len(u.Val)))
		props = append(props, u.Val...)
	}
	m.Properties = props
	return &will{msg: m, delay: p.WillDelayInterval, who: &who}
}

// OnPacketEncode completes a CONNACK: session present and the limits, which
// mochi does not know, and the return codes of MQTT 3.x.
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	c, ok := cl.Net.Conn.(*conn)
	if !ok || pk.FixedHeader.Type != packets.Connack {
		return pk
	}
	if pk.ReasonCode != 0 {
		if c.version < 5 && pk.ReasonCode >= 0x80 {
			pk.ReasonCode = max(3, connackV3(pk.ReasonCode))
		}
		return pk
	}
	pk.SessionPresent = c.present && c.version >= 4
	p := &pk.Properties
	p.MaximumPacketSize = uint32(c.ln.limits.maxPacket)
	p.TopicAliasMaximum = maxAliases
	if c.sess != nil && c.version == 5 && c.hello.expiry > h.b.capExpiry(c.hello.expiry) {
		p.SessionExpiryInterval, p.SessionExpiryIntervalFlag = h.b.capExpiry(c.hello.expiry), true
	}
	return pk
}

// OnSessionEstablished starts deliveries: the CONNACK is written.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, pk packets.Packet) {
	c := cl.Net.Conn.(*conn)
	h.b.plane.connectionsTotal.Add(1)
	h.b.plane.connections.Add(1)
	c.outMu.Lock()
	c.maxPacket = int(c.hello.maxPacket)
	c.up = true
	c.outMu.Unlock()
	c.cleanStart, c.noExpiry = c.hello.connect.Clean, c.hello.expiry == 0
	c.hello = hello{}
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
