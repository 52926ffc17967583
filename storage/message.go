package storage

import (
	"encoding/binary"
	"errors"
)

// Message is an application message as the broker keeps it. It is shared
// between queues, the retained store and the journal, and never changed after
// it was published.
type Message struct {
	Topic      string
	Payload    []byte
	Properties []byte // MQTT 5 PUBLISH properties to pass on, encoded; without expiry, alias and subscription identifiers
	Expires    int64  // a stamp of the broker's time; 0 = never [MQTT-3.3.2-5]
	QoS        byte   // as the publisher sent it
	Retain     bool   // RETAIN flag as the publisher sent it
}

// Size is what the message counts for in bounds and statistics, in bytes.
func (m *Message) Size() int { return len(m.Topic) + len(m.Payload) + len(m.Properties) }

const (
	packedQoS        = 0x03
	packedRetain     = 0x04
	packedProperties = 0x08
	packedExpires    = 0x10
	packedShared     = 0x20
)

var errTorn = errors.New("packed record is cut short or not one of ours")

// appendMessage packs m behind buf:
// flags, topic, [properties], [expires], payload; lengths as uvarint.
func appendMessage(buf []byte, m *Message) []byte {
	flags := m.QoS & packedQoS
	if m.Retain {
		flags |= packedRetain
	}
	if len(m.Properties) > 0 {
		flags |= packedProperties
	}
	if m.Expires != 0 {
		flags |= packedExpires
	}
	buf = append(buf, flags)
	buf = binary.AppendUvarint(buf, uint64(len(m.Topic)))
	buf = append(buf, m.Topic...)
	if flags&packedProperties != 0 {
		buf = binary.AppendUvarint(buf, uint64(len(m.Properties)))
		buf = append(buf, m.Properties...)
	}
	if flags&packedExpires != 0 {
		buf = binary.AppendVarint(buf, m.Expires)
	}
	buf = binary.AppendUvarint(buf, uint64(len(m.Payload)))
	return append(buf, m.Payload...)
}

// unpacker reads packed records. After the first error every read returns
// zero values and err stays set.
type unpacker struct {
	buf []byte
	err error
}

func (u *unpacker) uvarint() uint64 {
	v, n := binary.Uvarint(u.buf)
	if n <= 0 {
		u.fail()
		return 0
	}
	u.buf = u.buf[n:]
	return v
}

func (u *unpacker) varint() int64 {
	v, n := binary.Varint(u.buf)
	if n <= 0 {
		u.fail()
		return 0
	}
	u.buf = u.buf[n:]
	return v
}

func (u *unpacker) byte() byte {
	if len(u.buf) == 0 {
		u.fail()
		return 0
	}
	b := u.buf[0]
	u.buf = u.buf[1:]
	return b
}

// bytes returns the next length-prefixed bytes, sharing the buffer.
func (u *unpacker) bytes() []byte {
	n := u.uvarint()
	if n > uint64(len(u.buf)) {
		u.fail()
		return nil
	}
	b := u.buf[:n:n]
	u.buf = u.buf[n:]
	return b
}

// count reads a number of items of which each takes at least one byte, so
// that a damaged number cannot make us allocate.
func (u *unpacker) count() int {
	n := u.uvarint()
	if n > uint64(len(u.buf)) {
		u.fail()
		return 0
	}
	return int(n)
}

// peekCount returns what count would.
func (u *unpacker) peekCount() int {
	v := *u
	return v.count()
}

func (u *unpacker) fail() {
	u.err = errTorn
	u.buf = nil
}

// message unpacks what appendMessage packed. Payload and properties share the
// buffer.
func (u *unpacker) message() *Message {
	m := &Message{}
	flags := u.byte()
	if flags&packedQoS == 3 {
		u.fail()
	}
	m.QoS = flags & packedQoS
	m.Retain = flags&packedRetain != 0
	m.Topic = string(u.bytes())
	if flags&packedProperties != 0 {
		m.Properties = u.bytes()
	}
	if flags&packedExpires != 0 {
		m.Expires = u.varint()
	}
	m.Payload = u.bytes()
	return m
}
