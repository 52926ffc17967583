package broker

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"syscall"
	"time"
)

// handshake is a connection as mochi sees it: it reads one CONNECT and then the
// end of the file. Once it has written the CONNACK, mochi has nothing
// to do with the connection: keeping its two goroutines and its buffers would
// cost an idle client 20 kB.
type handshake conn

// Read implements net.Conn.
func (h *handshake) Read(p []byte) (int, error) {
	if h.hello == nil || len(h.hello.greeting) == 0 {
		return 0, io.EOF
	}
	n := copy(p, h.hello.greeting)
	h.hello.greeting = h.hello.greeting[n:]
	return n, nil
}

// Write implements net.Conn. mochi writes whole packets, and only a CONNACK,
// in place of which ours goes out: it does not know what is to be said. From
// that moment on the connection is up, and a takeover says so to the client.
func (h *handshake) Write(p []byte) (int, error) {
	c := (*conn)(h)
	if len(p) == 0 || p[0]>>4 != typeConnack || c.sess == nil {
		return len(p), nil
	}
	packet := c.connack()
	if c.hello.tooLarge(packet) {
		c.b.notice("client takes no packet as large as its CONNACK", "client", c.who.clientID, "bytes", len(packet))
		_ = c.Close() // [MQTT-3.1.2-24]
		return 0, errClosed
	}
	c.outMu.Lock()
	if c.stopped {
		c.outMu.Unlock()
		return 0, errClosed
	}
	c.maxPacket, c.aliasMax = int(min(c.hello.maxPacket, math.MaxInt32)), min(int(c.hello.aliasMax), maxAliases)
	c.up = true
	c.put(packet)
	c.outMu.Unlock()
	c.b.plane.connectionsTotal.Add(1)
	c.b.plane.connections.Add(1)
	c.b.plane.said(c.sess, c.hello.will != nil)
	c.leaving = leaving{}
	c.flush()
	return len(p), nil
}

// Close implements net.Conn. It closes a connection that mochi has refused.
func (h *handshake) Close() error {
	if c := (*conn)(h); !c.up {
		return c.Close()
	}
	return nil
}

// LocalAddr implements net.Conn.
func (h *handshake) LocalAddr() net.Addr { return h.sock.LocalAddr() }

// RemoteAddr implements net.Conn.
func (h *handshake) RemoteAddr() net.Addr { return h.sock.RemoteAddr() }

// SetDeadline implements net.Conn and does nothing: mochi's deadline would
// cover writes too and overflows above 43,690 s; ours is computed from CONNECT.
func (h *handshake) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn and does nothing, like SetDeadline.
func (h *handshake) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn and does nothing, like SetDeadline.
func (h *handshake) SetWriteDeadline(time.Time) error { return nil }

// greet handles the CONNECT, of which first is the first byte. mochi is given
// one that says no more than it has
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
		c.b.plane.limit(limitTopic)
		return c.refuse(reasonTopicInvalid, "will topic is not a topic name, is too long, or has too many levels", h.clientID)
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

// oversized refuses a CONNECT that is larger than it may be, of which body is
// the beginning, in the words of the version that it speaks. If that has not
// come yet, it is not waited for.
func (c *conn) oversized(body []byte) error {
	h, err := parseConnect(body)
	c.hello, c.version = h, h.version
	c.b.plane.limit(limitPacketSize)
	if err == errNotMQTT {
		c.b.notice("connection refused", "address", c.sock.RemoteAddr().String(), "err", "first packet is larger than max_connect")
		_ = c.Close() // it gets no answer
		return err
	}
	return c.refuse(reasonTooLarge, "CONNECT is larger than max_connect", "")
}

// refuse answers a CONNECT with the reason, or what MQTT 3.x has for it
// (3.2.2.3), and closes. It returns errRefused.
func (c *conn) refuse(reason byte, text, clientID string) error {
	c.b.notice("connection refused", "client", clientID, "username", c.hello.username, "address", c.sock.RemoteAddr().String(), "reason", fmt.Sprintf("0x%02X", reason), "err", text)
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

// hungUp reports whether the client has closed the connection, as far as that
// can be seen without reading.
func (c *conn) hungUp() bool {
	sock, ok := c.slot.raw.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		// The first byte of struct tcp_info is the state. A unix socket has none.
		info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		gone = err == nil && info&0xFF != tcpEstablished
	})
	return gone || err != nil
}

// tcpEstablished is the state of a connection that neither side has closed
// (net/tcp_states.h of Linux).
const tcpEstablished = 1
