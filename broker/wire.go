package broker

import (
	"encoding/binary"
	"errors"
	"unicode/utf8"

	"penstock/storage"
)

// Packet types (MQTT 5, 2.1.2).
const (
	typeConnect     = 1
	typeConnack     = 2
	typePublish     = 3
	typePuback      = 4
	typePubrec      = 5
	typePubrel      = 6
	typePubcomp     = 7
	typeSubscribe   = 8
	typeSuback      = 9
	typeUnsubscribe = 10
	typeUnsuback    = 11
	typePingreq     = 12
	typePingresp    = 13
	typeDisconnect  = 14
	typeAuth        = 15
)

// Reason codes (MQTT 5, 2.4) that the data plane itself uses.
const (
	reasonSuccess            = 0x00
	reasonNoSubscription     = 0x11
	reasonUnspecified        = 0x80
	reasonMalformed          = 0x81
	reasonProtocolError      = 0x82
	reasonUnsupportedVersion = 0x84
	reasonClientIDInvalid    = 0x85
	reasonBadCredentials     = 0x86
	reasonNotAuthorized      = 0x87
	reasonUnavailable        = 0x88
	reasonBusy               = 0x89
	reasonShuttingDown       = 0x8B
	reasonBadAuthMethod      = 0x8C
	reasonKeepAlive          = 0x8D
	reasonTakenOver          = 0x8E
	reasonFilterInvalid      = 0x8F
	reasonTopicInvalid       = 0x90
	reasonIDNotFound         = 0x92
	reasonReceiveMaximum     = 0x93
	reasonAliasInvalid       = 0x94
	reasonTooLarge           = 0x95
	reasonQuota              = 0x97
	reasonAdministrative     = 0x98
)

// Property identifiers (MQTT 5, 2.2.2.2) that we read or write.
const (
	propPayloadFormat     = 1
	propMessageExpiry     = 2
	propContentType       = 3
	propResponseTopic     = 8
	propCorrelationData   = 9
	propSubscriptionID    = 11
	propSessionExpiry     = 17
	propAuthMethod        = 21
	propAuthData          = 22
	propRequestProblem    = 23
	propWillDelay         = 24
	propRequestResponse   = 25
	propServerReference   = 28
	propReasonString      = 31
	propReceiveMaximum    = 33
	propTopicAliasMaximum = 34
	propTopicAlias        = 35
	propUser              = 38
	propMaximumPacket     = 39
	maxVarint             = 268435455 // 2.2.3: largest variable byte integer
)

// wireError is a reason to end a connection: a reason code of MQTT 5 and what
// was wrong, in words.
type wireError struct {
	reason byte
	text   string
}

func (e *wireError) Error() string { return e.text }

func malformed(text string) error     { return &wireError{reasonMalformed, text} }
func protocolError(text string) error { return &wireError{reasonProtocolError, text} }

var errNeedMore = errors.New("frame is not complete")

// frameSize returns the whole size of the frame that starts at buf, and how
// many bytes its fixed header has. It returns errNeedMore while the header is
// not complete.
func frameSize(buf []byte) (size, header int, err error) {
	length := 0
	for i := 1; ; i++ {
		if i > 4 {
			return 0, 0, malformed("remaining length is longer than four bytes") // [MQTT-1.5.5-1]
		}
		if i >= len(buf) {
			return 0, 0, errNeedMore
		}
		b := buf[i]
		length |= int(b&0x7F) << (7 * (i - 1))
		if b < 0x80 {
			return i + 1 + length, i + 1, nil
		}
	}
}

// appendVarint appends v as a variable byte integer (1.5.5). v is at most
// maxVarint.
func appendVarint(dst []byte, v int) []byte {
	for v >= 0x80 {
		dst = append(dst, byte(v)|0x80)
		v >>= 7
	}
	return append(dst, byte(v))
}

func varintSize(v int) int {
	switch {
	case v < 1<<7:
		return 1
	case v < 1<<14:
		return 2
	case v < 1<<21:
		return 3
	}
	return 4
}

// reader takes fields from the body of a packet. After the first field that
// is cut short or malformed every read returns zero values and err is set.
type reader struct {
	buf []byte
	err error
}

func (r *reader) fail(text string) {
	if r.err == nil {
		r.err = malformed(text)
	}
	r.buf = nil
}

func (r *reader) byte() byte {
	if len(r.buf) < 1 {
		r.fail("packet is cut short")
		return 0
	}
	b := r.buf[0]
	r.buf = r.buf[1:]
	return b
}

func (r *reader) uint16() uint16 {
	if len(r.buf) < 2 {
		r.fail("packet is cut short")
		return 0
	}
	v := binary.BigEndian.Uint16(r.buf)
	r.buf = r.buf[2:]
	return v
}

func (r *reader) uint32() uint32 {
	if len(r.buf) < 4 {
		r.fail("packet is cut short")
		return 0
	}
	v := binary.BigEndian.Uint32(r.buf)
	r.buf = r.buf[4:]
	return v
}

func (r *reader) varint() int {
	v := 0
	for i := range 4 {
		b := r.byte()
		v |= int(b&0x7F) << (7 * i)
		if b < 0x80 {
			return v
		}
	}
	r.fail("variable byte integer is longer than four bytes")
	return 0
}

// take returns the next n bytes, sharing the buffer.
func (r *reader) take(n int) []byte {
	if n > len(r.buf) {
		r.fail("packet is cut short")
		return nil
	}
	b := r.buf[:n:n]
	r.buf = r.buf[n:]
	return b
}

// binary returns the next length-prefixed bytes (1.5.6).
func (r *reader) binary() []byte { return r.take(int(r.uint16())) }

// text returns the next UTF-8 string (1.5.4), checked.
func (r *reader) text() []byte {
	b := r.binary()
	if !validText(b) {
		r.fail("string is not UTF-8, or has U+0000 in it") // [MQTT-1.5.4-1] [MQTT-1.5.4-2]
		return nil
	}
	return b
}

// validText reports whether b is UTF-8 without U+0000.
func validText(b []byte) bool {
	ascii := true
	for _, c := range b {
		if c == 0 {
			return false
		}
		if c >= utf8.RuneSelf {
			ascii = false
		}
	}
	return ascii || utf8.Valid(b)
}

// publishFrame is a received PUBLISH. Its slices share the read buffer.
type publishFrame struct {
	topic      []byte
	payload    []byte
	properties []byte // to pass on: as received, without expiry and alias
	expiry     uint32 // Message Expiry Interval, seconds
	alias      uint16 // 0: none
	packetID   uint16
	qos        byte
	dup        bool
	retain     bool
	hasExpiry  bool
}

// parsePublish reads a PUBLISH (3.3) whose fixed header starts with first and
// whose body is body. scratch is used for properties that cannot be passed on
// in one piece.
func parsePublish(first byte, body []byte, version byte, scratch *[]byte) (publishFrame, error) {
	f := publishFrame{qos: first >> 1 & 3, dup: first&8 != 0, retain: first&1 != 0}
	if f.qos == 3 {
		return f, malformed("QoS 3 in a PUBLISH") // [MQTT-3.3.1-4]
	}
	if f.qos == 0 && f.dup {
		return f, malformed("DUP set at QoS 0") // [MQTT-3.3.1-2]
	}
	r := reader{buf: body}
	f.topic = r.text()
	if f.qos > 0 {
		if f.packetID = r.uint16(); f.packetID == 0 && r.err == nil {
			return f, protocolError("packet identifier 0 in a PUBLISH") // [MQTT-2.2.1-3]
		}
	}
	if version == 5 {
		parsePublishProperties(&r, &f, scratch)
	}
	f.payload = r.buf
	return f, r.err
}

// parsePublishProperties reads the properties of a PUBLISH (3.3.2.3), or of a
// will (3.1.3.2) up to its delay.
func parsePublishProperties(r *reader, f *publishFrame, scratch *[]byte) {
	n := r.varint()
	if n == 0 || r.err != nil {
		return
	}
	raw := r.take(n)
	p := reader{buf: raw}
	var seen uint64
	pass := (*scratch)[:0]
	for len(p.buf) > 0 && p.err == nil {
		start := len(raw) - len(p.buf)
		id := p.byte()
		if id != propUser {
			if id < 64 && seen&(1<<id) != 0 {
				r.fail("property sent twice") // 2.2.2.2: a protocol error
				r.err.(*wireError).reason = reasonProtocolError
				return
			}
			seen |= 1 << (id & 63)
		}
		keep := true
		switch id {
		case propPayloadFormat:
			if p.byte() > 1 {
				r.err = protocolError("payload format indicator is neither 0 nor 1")
				return
			}
		case propMessageExpiry:
			f.expiry, f.hasExpiry, keep = p.uint32(), true, false
		case propTopicAlias:
			f.alias, keep = p.uint16(), false
			if f.alias == 0 && p.err == nil {
				r.err = &wireError{reasonAliasInvalid, "topic alias 0"} // [MQTT-3.3.2-8]
				return
			}
		case propContentType:
			p.text()
		case propResponseTopic:
			t := p.text()
			if p.err == nil && !validTopic(string(t), 0, 0) {
				r.err = protocolError("response topic is not a topic name") // [MQTT-3.3.2-14]
				return
			}
		case propCorrelationData:
			p.binary()
		case propUser:
			p.text()
			p.text()
		case propSubscriptionID:
			r.err = protocolError("subscription identifier sent by a client") // [MQTT-3.3.4-6]
			return
		default:
			r.fail("property that a PUBLISH cannot have")
			return
		}
		if keep && p.err == nil {
			pass = append(pass, raw[start:len(raw)-len(p.buf)]...)
		}
	}
	if p.err != nil {
		r.err = p.err
		return
	}
	*scratch = pass
	f.properties = pass
}

// publishSize returns the size of the body (remaining length) of a PUBLISH to
// a client of the given version, and of its properties alone.
func publishSize(m *storage.Message, version, qos byte, expiry bool, ids []uint32) (body, props int) {
	body = 2 + len(m.Topic) + len(m.Payload)
	if qos > 0 {
		body += 2
	}
	if version < 5 {
		return body, 0
	}
	props = len(m.Properties)
	if expiry {
		props += 5
	}
	for _, id := range ids {
		props += 1 + varintSize(int(id))
	}
	return body + varintSize(props) + props, props
}

// appendPublish appends a PUBLISH. expiry is the remaining Message Expiry
// Interval in seconds, 0 for none [MQTT-3.3.2-6].
func appendPublish(dst []byte, m *storage.Message, version, qos byte, dup, retain bool, packetID uint16, expiry uint32, ids []uint32) []byte {
	body, props := publishSize(m, version, qos, expiry != 0, ids)
	first := byte(typePublish<<4) | qos<<1
	if dup {
		first |= 8
	}
	if retain {
		first |= 1
	}
	dst = append(dst, first)
	dst = appendVarint(dst, body)
	dst = append(dst, byte(len(m.Topic)>>8), byte(len(m.Topic)))
	dst = append(dst, m.Topic...)
	if qos > 0 {
		dst = append(dst, byte(packetID>>8), byte(packetID))
	}
	if version == 5 {
		dst = appendVarint(dst, props)
		if expiry != 0 {
			dst = append(dst, propMessageExpiry)
			dst = binary.BigEndian.AppendUint32(dst, expiry)
		}
		dst = append(dst, m.Properties...)
		for _, id := range ids {
			dst = append(dst, propSubscriptionID)
			dst = appendVarint(dst, int(id))
		}
	}
	return append(dst, m.Payload...)
}

// appendAck appends a PUBACK, PUBREC, PUBREL or PUBCOMP (3.4 to 3.7). Reason 0
// is left out, as 3.4.2.1 allows; MQTT 3.x has no reason.
func appendAck(dst []byte, kind, version byte, packetID uint16, reason byte) []byte {
	first := kind << 4
	if kind == typePubrel {
		first |= 2 // [MQTT-3.6.1-1]
	}
	if version == 5 && reason != 0 {
		return append(dst, first, 3, byte(packetID>>8), byte(packetID), reason)
	}
	return append(dst, first, 2, byte(packetID>>8), byte(packetID))
}

// parseAck reads a PUBACK, PUBREC, PUBREL or PUBCOMP.
func parseAck(first byte, body []byte, version byte) (packetID uint16, reason byte, err error) {
	want := byte(0)
	if first>>4 == typePubrel {
		want = 2
	}
	if first&0x0F != want {
		return 0, 0, malformed("reserved flags of an acknowledgement") // [MQTT-2.1.3-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 && len(r.buf) > 0 {
		reason = r.byte()
		if len(r.buf) > 0 {
			skipReasonProperties(&r)
		}
	}
	if r.err == nil && len(r.buf) > 0 {
		r.fail("bytes behind an acknowledgement")
	}
	if r.err == nil && packetID == 0 {
		return 0, 0, protocolError("packet identifier 0 in an acknowledgement")
	}
	return packetID, reason, r.err
}

// skipReasonProperties checks properties of which only a reason string and
// user properties are allowed.
func skipReasonProperties(r *reader) {
	p := reader{buf: r.take(r.varint())}
	for len(p.buf) > 0 && p.err == nil {
		switch p.byte() {
		case propReasonString:
			p.text()
		case propUser:
			p.text()
			p.text()
		default:
			p.fail("property that this packet cannot have")
		}
	}
	if p.err != nil {
		r.err = p.err
	}
}

// filterRequest is one topic filter of a SUBSCRIBE.
type filterRequest struct {
	filter  string
	options byte // as in MQTT 5, 3.8.3.1
}

// parseSubscribe reads a SUBSCRIBE (3.8).
func parseSubscribe(first byte, body []byte, version byte) (packetID uint16, identifier uint32, filters []filterRequest, err error) {
	if first&0x0F != 2 {
		return 0, 0, nil, malformed("reserved flags of a SUBSCRIBE") // [MQTT-3.8.1-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 {
		p := reader{buf: r.take(r.varint())}
		seen := false
		for len(p.buf) > 0 && p.err == nil {
			switch p.byte() {
			case propSubscriptionID:
				identifier = uint32(p.varint())
				if p.err == nil && (identifier == 0 || seen) {
					return 0, 0, nil, protocolError("subscription identifier is 0, or sent twice") // 3.8.2.1.2
				}
				seen = true
			case propUser:
				p.text()
				p.text()
			default:
				p.fail("property that a SUBSCRIBE cannot have")
			}
		}
		if p.err != nil {
			return 0, 0, nil, p.err
		}
	}
	for len(r.buf) > 0 && r.err == nil {
		f := filterRequest{filter: string(r.text()), options: r.byte()}
		if r.err != nil {
			break
		}
		if f.options&3 == 3 || version < 5 && f.options&^3 != 0 || f.options&0xC0 != 0 || f.options>>4&3 == 3 {
			return 0, 0, nil, malformed("subscription options out of range") // [MQTT-3.8.3-5]
		}
		filters = append(filters, f)
	}
	if r.err == nil && packetID == 0 {
		return 0, 0, nil, protocolError("packet identifier 0 in a SUBSCRIBE")
	}
	if r.err == nil && len(filters) == 0 {
		return 0, 0, nil, protocolError("SUBSCRIBE without a topic filter") // [MQTT-3.8.3-2]
	}
	return packetID, identifier, filters, r.err
}

// parseUnsubscribe reads an UNSUBSCRIBE (3.10).
func parseUnsubscribe(first byte, body []byte, version byte) (packetID uint16, filters []string, err error) {
	if first&0x0F != 2 {
		return 0, nil, malformed("reserved flags of an UNSUBSCRIBE") // [MQTT-3.10.1-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 {
		p := reader{buf: r.take(r.varint())}
		for len(p.buf) > 0 && p.err == nil {
			if p.byte() != propUser {
				p.fail("property that an UNSUBSCRIBE cannot have")
				break
			}
			p.text()
			p.text()
		}
		if p.err != nil {
			return 0, nil, p.err
		}
	}
	for len(r.buf) > 0 && r.err == nil {
		filters = append(filters, string(r.text()))
	}
	if r.err == nil && packetID == 0 {
		return 0, nil, protocolError("packet identifier 0 in an UNSUBSCRIBE")
	}
	if r.err == nil && len(filters) == 0 {
		return 0, nil, protocolError("UNSUBSCRIBE without a topic filter") // [MQTT-3.10.3-2]
	}
	return packetID, filters, r.err
}

// appendSuback appends a SUBACK or UNSUBACK with a reason code for each
// filter. An UNSUBACK of MQTT 3.x has none.
func appendSuback(dst []byte, kind, version byte, packetID uint16, reasons []byte) []byte {
	n := 2
	if version == 5 {
		n++
	}
	if version == 5 || kind == typeSuback {
		n += len(reasons)
	}
	dst = append(dst, kind<<4)
	dst = appendVarint(dst, n)
	dst = append(dst, byte(packetID>>8), byte(packetID))
	if version == 5 {
		dst = append(dst, 0)
	}
	if version == 5 || kind == typeSuback {
		dst = append(dst, reasons...)
	}
	return dst
}

// disconnectFrame is a received DISCONNECT (3.14).
type disconnectFrame struct {
	reason    byte
	expiry    uint32
	hasExpiry bool
}

func parseDisconnect(body []byte, version byte) (disconnectFrame, error) {
	var d disconnectFrame
	if len(body) == 0 {
		return d, nil
	}
	if version < 5 {
		return d, malformed("DISCONNECT with a body")
	}
	r := reader{buf: body}
	d.reason = r.byte()
	if len(r.buf) > 0 {
		p := reader{buf: r.take(r.varint())}
		for len(p.buf) > 0 && p.err == nil {
			switch p.byte() {
			case propSessionExpiry:
				if d.hasExpiry {
					return d, protocolError("session expiry interval sent twice")
				}
				d.expiry, d.hasExpiry = p.uint32(), true
			case propReasonString, propServerReference:
				p.text()
			case propUser:
				p.text()
				p.text()
			default:
				p.fail("property that a DISCONNECT cannot have")
			}
		}
		if p.err != nil {
			return d, p.err
		}
	}
	if r.err == nil && len(r.buf) > 0 {
		r.fail("bytes behind a DISCONNECT")
	}
	return d, r.err
}

// checkConnect finds what is wrong with the properties of a CONNECT that mochi
// lets pass: a property sent twice, and values out of range. Whatever else is
// malformed is left to mochi.
func checkConnect(body []byte) error {
	r := reader{buf: body}
	r.binary()
	version, flags := r.byte(), r.byte()
	r.uint16()
	if r.err != nil || version != 5 {
		return nil
	}
	if err := checkProperties(&r); err != nil {
		return err
	}
	r.binary()
	if flags&4 != 0 {
		return checkProperties(&r)
	}
	return nil
}

// checkProperties reads the properties of a CONNECT or of its will.
func checkProperties(r *reader) error {
	p := reader{buf: r.take(r.varint())}
	var seen uint64
	for len(p.buf) > 0 {
		id := p.byte()
		if id != propUser && id < 64 {
			if seen&(1<<id) != 0 {
				return protocolError("property sent twice")
			}
			seen |= 1 << id
		}
		ok := true
		switch id {
		case propPayloadFormat, propRequestProblem, propRequestResponse:
			ok = p.byte() <= 1
		case propSessionExpiry, propMessageExpiry, propWillDelay:
			p.uint32()
		case propMaximumPacket:
			ok = p.uint32() > 0
		case propReceiveMaximum:
			ok = p.uint16() > 0
		case propTopicAliasMaximum:
			p.uint16()
		case propResponseTopic:
			ok = validTopic(string(p.text()), 0, 0)
		case propContentType, propAuthMethod, propCorrelationData, propAuthData:
			p.binary()
		case propUser:
			p.binary()
			p.binary()
		default:
			return nil
		}
		if p.err != nil {
			return nil
		}
		if !ok {
			return protocolError("property out of range")
		}
	}
	return nil
}

// appendDisconnect appends a DISCONNECT of the server (MQTT 5 only).
func appendDisconnect(dst []byte, reason byte) []byte {
	return append(dst, typeDisconnect<<4, 1, reason)
}
