package main

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Versions of the protocol, as CONNECT says them.
const (
	v311 = 4
	v5   = 5
)

// Control packet types, as they stand in the high four bits of a packet's first byte.
const (
	connack    = 2
	publish    = 3
	puback     = 4
	pubrec     = 5
	pubrel     = 6
	pubcomp    = 7
	suback     = 9
	pingresp   = 13
	maxIDs     = 65535
	stampBytes = 12 // publisher number and sequence number at the head of each payload
)

var (
	pingreqPacket    = []byte{0xC0, 0}
	disconnectPacket = []byte{0xE0, 0}
)

var errMalformed = errors.New("malformed packet")

// appendLength appends n in MQTT's variable length encoding.
func appendLength(b []byte, n int) []byte {
	for n > 127 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// appendConnect appends a CONNECT without will and credentials, with a
// keepalive of ten minutes: no round lasts that long, so that no pings mix with
// what is measured. A session of MQTT 5 that is not clean lives for a day.
func appendConnect(b []byte, version byte, id string, clean bool) []byte {
	flags := byte(0)
	if clean {
		flags = 2
	}
	var properties []byte
	if version == v5 {
		properties = []byte{0}
		if !clean {
			properties = []byte{5, 0x11, 0, 1, 0x51, 0x80} // Session Expiry Interval
		}
	}
	b = append(b, 0x10)
	b = appendLength(b, 10+len(properties)+2+len(id))
	b = appendString(b, "MQTT")
	b = append(b, version, flags)
	b = binary.BigEndian.AppendUint16(b, 600)
	b = append(b, properties...)
	return appendString(b, id)
}

// appendSubscribe appends a SUBSCRIBE with these topic filters.
func appendSubscribe(b []byte, version byte, packetID uint16, filters []string, qos byte) []byte {
	n := 2
	if version == v5 {
		n++
	}
	for _, f := range filters {
		n += 2 + len(f) + 1
	}
	b = append(b, 0x82)
	b = appendLength(b, n)
	b = binary.BigEndian.AppendUint16(b, packetID)
	if version == v5 {
		b = append(b, 0) // no properties
	}
	for _, f := range filters {
		b = appendString(b, f)
		b = append(b, qos)
	}
	return b
}

// appendAck appends a PUBACK, PUBREC, PUBREL or PUBCOMP; in MQTT 5 this is the
// short form of success.
func appendAck(b []byte, kind byte, packetID uint16) []byte {
	first := kind << 4
	if kind == pubrel {
		first |= 2
	}
	return append(b, first, 2, byte(packetID>>8), byte(packetID))
}

// A template is a PUBLISH encoded once, in which only the packet identifier
// and the sequence number change from one message to the next.
type template struct {
	data  []byte
	idAt  int // 0 at QoS 0, which has no packet identifier
	seqAt int
}

// newTemplate encodes a PUBLISH with a payload of size bytes, at least
// stampBytes: the number of its publisher, the sequence number, padding.
func newTemplate(version byte, topic string, qos byte, size int, publisher uint32) template {
	var t template
	n := 2 + len(topic) + size
	if qos > 0 {
		n += 2
	}
	if version == v5 {
		n++
	}
	b := appendLength([]byte{publish<<4 | qos<<1}, n)
	b = appendString(b, topic)
	if qos > 0 {
		t.idAt = len(b)
		b = append(b, 0, 0)
	}
	if version == v5 {
		b = append(b, 0) // no properties
	}
	b = binary.BigEndian.AppendUint32(b, publisher)
	t.seqAt = len(b)
	b = append(b, make([]byte, size-4)...)
	for i := t.seqAt + 8; i < len(b); i++ {
		b[i] = 'x'
	}
	t.data = b
	return t
}

// append appends message seq with its packet identifier.
func (t *template) append(b []byte, packetID uint16, seq uint64) []byte {
	at := len(b)
	b = append(b, t.data...)
	if t.idAt > 0 {
		binary.BigEndian.PutUint16(b[at+t.idAt:], packetID)
	}
	binary.BigEndian.PutUint64(b[at+t.seqAt:], seq)
	return b
}

// A frame is one control packet; its body belongs to the buffer it was read from.
type frame struct {
	first byte
	body  []byte
}

func (f frame) kind() byte { return f.first >> 4 }

// nextFrame decodes the packet at the head of b and returns its whole length,
// which is 0 when more bytes are needed.
func nextFrame(b []byte) (frame, int, error) {
	length, shift := 0, 0
	for i := 1; i < len(b); i++ {
		length |= int(b[i]&0x7F) << shift
		if b[i] < 0x80 {
			end := i + 1 + length
			if end > len(b) {
				return frame{}, 0, nil
			}
			return frame{first: b[0], body: b[i+1 : end]}, end, nil
		}
		if shift += 7; shift > 21 {
			return frame{}, 0, fmt.Errorf("%w: length of more than four bytes", errMalformed)
		}
	}
	return frame{}, 0, nil
}

// packetID returns the packet identifier of an acknowledgement. One of MQTT 5
// may have a reason code, which must then be of success: below 0x80.
func (f frame) packetID() (uint16, error) {
	if len(f.body) < 2 {
		return 0, fmt.Errorf("%w: type %d with %d bytes", errMalformed, f.kind(), len(f.body))
	}
	if len(f.body) > 2 && f.body[2] >= 0x80 {
		return 0, fmt.Errorf("packet type %d with reason code 0x%02X", f.kind(), f.body[2])
	}
	return binary.BigEndian.Uint16(f.body), nil
}

// A message is what the generator looks at in a PUBLISH. Topic and payload
// belong to the buffer that it was read from.
type message struct {
	qos       byte
	retain    bool
	packetID  uint16
	publisher uint32
	seq       uint64
	topic     []byte
	payload   []byte
}

// message decodes a PUBLISH that was made by a template.
func (f frame) message(version byte) (message, error) {
	m := message{qos: f.first >> 1 & 3, retain: f.first&1 == 1}
	b := f.body
	if len(b) < 2 {
		return m, fmt.Errorf("%w: PUBLISH without topic", errMalformed)
	}
	at := 2 + int(binary.BigEndian.Uint16(b))
	need := at + stampBytes
	if m.qos > 0 {
		need += 2
	}
	if version == v5 {
		need++
	}
	if len(b) < need {
		return m, fmt.Errorf("%w: PUBLISH of %d bytes, at least %d wanted", errMalformed, len(b), need)
	}
	m.topic = b[2:at]
	if m.qos > 0 {
		m.packetID = binary.BigEndian.Uint16(b[at:])
		at += 2
	}
	if version == v5 {
		if b[at] != 0 {
			return m, fmt.Errorf("%w: PUBLISH with %d bytes of properties, none was sent", errMalformed, b[at])
		}
		at++
	}
	m.payload = b[at:]
	m.publisher = binary.BigEndian.Uint32(m.payload)
	m.seq = binary.BigEndian.Uint64(m.payload[4:])
	return m, nil
}
