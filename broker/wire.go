package broker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
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
	reasonWithWill           = 0x04
	reasonNoSubscribers      = 0x10
	reasonNoSubscription     = 0x11
	reasonUnspecified        = 0x80
	reasonMalformed          = 0x81
	reasonProtocolError      = 0x82
	reasonImplementation     = 0x83
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
	reasonIDInUse            = 0x91
	reasonIDNotFound         = 0x92
	reasonReceiveMaximum     = 0x93
	reasonAliasInvalid       = 0x94
	reasonTooLarge           = 0x95
	reasonRate               = 0x96
	reasonQuota              = 0x97
	reasonAdministrative     = 0x98
	reasonPayloadFormat      = 0x99
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
	propAssignedID        = 18
	propServerKeepAlive   = 19
	propAuthMethod        = 21
	propAuthData          = 22
	propRequestProblem    = 23
	propWillDelay         = 24
	propRequestResponse   = 25
	propResponseInfo      = 26
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
			if b == 0 && i > 0 {
				r.fail("variable byte integer is longer than it must be") // [MQTT-1.5.5-1]
			}
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

// How the value of a property is encoded (2.2.2.2).
const (
	propByte = iota + 1
	propUint16
	propUint32
	propVarint
	propText
	propBinary
	propPair
)

// propTypes has the encoding of every property that a client may send.
var propTypes = [64]byte{
	propPayloadFormat: propByte, propMessageExpiry: propUint32, propContentType: propText, propResponseTopic: propText,
	propCorrelationData: propBinary, propSubscriptionID: propVarint, propSessionExpiry: propUint32, propAuthMethod: propText,
	propAuthData: propBinary, propRequestProblem: propByte, propWillDelay: propUint32, propRequestResponse: propByte,
	propServerReference: propText, propReasonString: propText, propReceiveMaximum: propUint16, propTopicAliasMaximum: propUint16,
	propUser: propPair, propMaximumPacket: propUint32,
}

// The properties that a packet of a client may have, a bit for each.
const (
	userProps       = 1 << propUser
	ackProps        = 1<<propReasonString | userProps
	subscribeProps  = 1<<propSubscriptionID | userProps
	disconnectProps = 1<<propSessionExpiry | 1<<propServerReference | ackProps
	willProps       = 1<<propWillDelay | 1<<propPayloadFormat | 1<<propMessageExpiry | 1<<propContentType | 1<<propResponseTopic |
		1<<propCorrelationData | userProps
	connectProps = 1<<propSessionExpiry | 1<<propReceiveMaximum | 1<<propMaximumPacket | 1<<propTopicAliasMaximum |
		1<<propRequestResponse | 1<<propRequestProblem | 1<<propAuthMethod | 1<<propAuthData | userProps
)

// property is one property as received.
type property struct {
	id   byte
	num  uint32 // value of a number
	text []byte // value of a string or of binary data
	all  []byte // the whole property, to pass on
}

// properties reads the length and then the properties of a packet that may
// have those of the bits given. They share the buffer.
func (r *reader) properties(allowed uint64) iter.Seq[property] {
	return func(yield func(property) bool) {
		p := reader{buf: r.take(r.varint())}
		var seen uint64
		for len(p.buf) > 0 && p.err == nil {
			rest := p.buf
			v := property{id: p.byte()}
			bit := uint64(1) << (v.id & 63)
			if v.id > 63 || allowed&bit == 0 {
				p.fail("property that this packet cannot have")
				break
			}
			if seen&bit != 0 && v.id != propUser { // 2.2.2.2: a protocol error
				p.err = protocolError("property sent twice")
				break
			}
			seen |= bit
			switch propTypes[v.id] {
			case propByte:
				v.num = uint32(p.byte())
			case propUint16:
				v.num = uint32(p.uint16())
			case propUint32:
				v.num = p.uint32()
			case propVarint:
				v.num = uint32(p.varint())
			case propText:
				v.text = p.text()
			case propBinary:
				v.text = p.binary()
			case propPair:
				p.text()
				p.text()
			}
			if p.err != nil {
				break
			}
			v.all = rest[:len(rest)-len(p.buf)]
			if !yield(v) {
				return
			}
		}
		if p.err != nil {
			r.err, r.buf = p.err, nil
		}
	}
}

// connectFrame is a received CONNECT. It shares nothing with the read buffer.
type connectFrame struct {
	version     byte
	cleanStart  bool
	keepAlive   uint16 // seconds; 0: none
	clientID    string
	username    string
	password    []byte
	hasUsername bool
	will        *storage.Message // nil: none. Expires is as will.msg has it
	willDelay   uint32           // seconds

	// Of MQTT 5; what follows from the version for older ones.
	expiry       uint32 // Session Expiry Interval, seconds
	receiveMax   uint16
	maxPacket    uint32 // 0: no bound
	aliasMax     uint16
	wantResponse bool // Request Response Information
	noProblems   bool // Request Problem Information is 0

	greeting []byte // of the CONNECT for mochi, what it has yet to read
}

// tooLarge reports whether a packet is larger than the client takes.
func (f *connectFrame) tooLarge(packet []byte) bool {
	return f.maxPacket > 0 && uint64(len(packet)) > uint64(f.maxPacket)
}

// errNotMQTT is what a CONNECT is that gets no answer.
var errNotMQTT = errors.New("protocol is not MQTT")

// parseConnect reads the body of a CONNECT (3.1). The frame's version is right
// also with an error, for the answer; it has the high bit set where a bridge
// of Mosquitto introduces itself.
func parseConnect(body []byte) (*connectFrame, error) {
	f := &connectFrame{receiveMax: 65535}
	r := reader{buf: body}
	name := string(r.binary())
	f.version = r.byte()
	if name != "MQTT" && name != "MQIsdp" {
		return f, errNotMQTT // [MQTT-3.1.2-1]
	}
	if r.err == nil && name == "MQIsdp" && f.version != 3 {
		level := f.version
		f.version = 3 // it gets the answer of 3.1: the name says that it is not MQTT 5
		return f, &wireError{reasonUnsupportedVersion, fmt.Sprintf("protocol name MQIsdp with level %d, which is not 3", level)}
	}
	if r.err == nil && name == "MQTT" && f.version != 4 && f.version != 5 {
		return f, &wireError{reasonUnsupportedVersion, fmt.Sprintf("protocol name MQTT with level %d, which is neither 4 nor 5", f.version)} // [MQTT-3.1.2-2]
	}
	flags := r.byte()
	f.keepAlive = r.uint16()
	f.cleanStart = flags&2 != 0
	hasWill, hasPassword := flags&4 != 0, flags&0x40 != 0
	f.hasUsername = flags&0x80 != 0
	switch {
	case flags&1 != 0 && f.version > 3:
		return f, malformed("reserved connect flag is set") // [MQTT-3.1.2-3]
	case !hasWill && flags&0x38 != 0, flags&0x18 == 0x18:
		return f, malformed("will flags contradict each other") // [MQTT-3.1.2-11] to [MQTT-3.1.2-15]
	case f.version < 5 && hasPassword && !f.hasUsername:
		return f, malformed("password without a user name") // [MQTT-3.1.2-22] of 3.1.1
	}
	method, data := false, false
	if f.version == 5 {
		for p := range r.properties(connectProps) {
			switch p.id {
			case propSessionExpiry:
				f.expiry = p.num
			case propReceiveMaximum:
				f.receiveMax = uint16(p.num)
				if p.num == 0 {
					return f, protocolError("receive maximum 0") // 3.1.2.11.3
				}
			case propMaximumPacket:
				f.maxPacket = p.num
				if p.num == 0 {
					return f, protocolError("maximum packet size 0") // 3.1.2.11.4
				}
			case propTopicAliasMaximum:
				f.aliasMax = uint16(p.num)
			case propRequestResponse, propRequestProblem:
				if p.num > 1 {
					return f, protocolError("request for information is neither 0 nor 1") // 3.1.2.11.6
				}
				f.wantResponse = f.wantResponse || p.id == propRequestResponse && p.num == 1
				f.noProblems = f.noProblems || p.id == propRequestProblem && p.num == 0
			case propAuthMethod:
				method = true
			case propAuthData:
				data = true
			}
		}
	} else if !f.cleanStart {
		f.expiry = storage.NeverExpires
	}
	f.clientID = string(r.text()) // [MQTT-3.1.3-4]
	if hasWill {
		f.will = &storage.Message{QoS: flags >> 3 & 3, Retain: flags&0x20 != 0}
		if f.version == 5 {
			if err := f.parseWillProperties(&r); err != nil {
				return f, err
			}
		}
		f.will.Topic = string(r.text())
		f.will.Payload = append([]byte{}, r.binary()...)
	}
	// MQTT 3.1 allows that a flag is set and its field is not there (3.1.3).
	if f.hasUsername = f.hasUsername && (f.version > 3 || len(r.buf) > 0); f.hasUsername {
		f.username = string(r.text())
	}
	if hasPassword && (f.version > 3 || len(r.buf) > 0) {
		f.password = append([]byte{}, r.binary()...)
	}
	switch {
	case r.err != nil:
		return f, r.err
	case len(r.buf) > 0:
		return f, malformed("bytes behind a CONNECT")
	case method:
		return f, &wireError{reasonBadAuthMethod, "enhanced authentication is not supported"}
	case data:
		return f, protocolError("authentication data without a method") // 3.1.2.11.10
	case f.clientID == "" && (f.version == 3 || f.version == 4 && !f.cleanStart):
		return f, &wireError{reasonClientIDInvalid, "no client identifier"} // [MQTT-3.1.3-8] of 3.1.1
	}
	return f, nil
}

// parseWillProperties reads the properties of a will (3.1.3.2).
func (f *connectFrame) parseWillProperties(r *reader) error {
	for p := range r.properties(willProps) {
		switch p.id {
		case propWillDelay:
			f.willDelay = p.num
			continue
		case propMessageExpiry:
			f.will.Expires = int64(p.num)*1000 + 1
			continue
		case propPayloadFormat:
			if p.num > 1 {
				return protocolError("payload format indicator is neither 0 nor 1")
			}
		case propResponseTopic:
			if !validTopic(string(p.text), 0, 0) {
				return protocolError("response topic is not a topic name") // [MQTT-3.3.2-14]
			}
		}
		f.will.Properties = append(f.will.Properties, p.all...)
	}
	return nil
}

// appendProperty appends a property that is a string.
func appendProperty(dst []byte, id byte, text string) []byte {
	text = text[:min(len(text), 65535)]
	dst = append(dst, id, byte(len(text)>>8), byte(len(text)))
	return append(dst, text...)
}

// appendConnack appends a CONNACK (3.2). props are those of MQTT 5.
func appendConnack(dst []byte, version byte, present bool, reason byte, props []byte) []byte {
	flags := byte(0)
	if present && version > 3 {
		flags = 1
	}
	if version < 5 {
		return append(dst, typeConnack<<4, 2, flags, reason)
	}
	dst = append(dst, typeConnack<<4)
	dst = appendVarint(dst, 2+varintSize(len(props))+len(props))
	dst = append(dst, flags, reason)
	dst = appendVarint(dst, len(props))
	return append(dst, props...)
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

// parsePublishProperties reads the properties of a PUBLISH (3.3.2.3). It does by
// hand what reader.properties does, for it is in the path of every message.
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

// appendPublish appends a PUBLISH. expiry is the remaining Message Expiry
// Interval in seconds, 0 for none [MQTT-3.3.2-6]. With an alias that is known
// to the client the topic is left out; alias 0 is none.
func appendPublish(dst []byte, m *storage.Message, version, qos byte, dup, retain bool, packetID uint16, expiry uint32, alias uint16, known bool, ids []uint32) []byte {
	topic := m.Topic
	if known {
		topic = ""
	}
	body, props := 2+len(topic)+len(m.Payload), 0
	if qos > 0 {
		body += 2
	}
	if version == 5 {
		props = len(m.Properties)
		if expiry != 0 {
			props += 5
		}
		if alias != 0 {
			props += 3
		}
		for _, id := range ids {
			props += 1 + varintSize(int(id))
		}
		body += varintSize(props) + props
	}
	first := byte(typePublish<<4) | qos<<1
	if dup {
		first |= 8
	}
	if retain {
		first |= 1
	}
	dst = append(dst, first)
	dst = appendVarint(dst, body)
	dst = append(dst, byte(len(topic)>>8), byte(len(topic)))
	dst = append(dst, topic...)
	if qos > 0 {
		dst = append(dst, byte(packetID>>8), byte(packetID))
	}
	if version == 5 {
		dst = appendVarint(dst, props)
		if expiry != 0 {
			dst = append(dst, propMessageExpiry)
			dst = binary.BigEndian.AppendUint32(dst, expiry)
		}
		if alias != 0 {
			dst = append(dst, propTopicAlias, byte(alias>>8), byte(alias))
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
// is left out, as 3.4.2.1 allows; MQTT 3.x has no reason. text, where not
// empty, is the reason string.
func appendAck(dst []byte, kind, version byte, packetID uint16, reason byte, text string) []byte {
	first := kind << 4
	if kind == typePubrel {
		first |= 2 // [MQTT-3.6.1-1]
	}
	switch {
	case version < 5 || reason == 0:
		return append(dst, first, 2, byte(packetID>>8), byte(packetID))
	case text == "":
		return append(dst, first, 3, byte(packetID>>8), byte(packetID), reason)
	}
	props := 3 + len(text)
	dst = append(dst, first)
	dst = appendVarint(dst, 3+varintSize(props)+props)
	dst = append(dst, byte(packetID>>8), byte(packetID), reason)
	dst = appendVarint(dst, props)
	return appendProperty(dst, propReasonString, text)
}

// parseAck reads a PUBACK, PUBREC, PUBREL or PUBCOMP.
func parseAck(first byte, body []byte, version byte) (packetID uint16, reason byte, err error) {
	kind, want := first>>4, byte(0)
	if kind == typePubrel {
		want = 2
	}
	if version > 3 && first&0x0F != want { // MQTT 3.1 does not use them
		return 0, 0, malformed("reserved flags of an acknowledgement") // [MQTT-2.1.3-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 && len(r.buf) > 0 {
		reason = r.byte()
		if len(r.buf) > 0 {
			for range r.properties(ackProps) { // nobody wants to know
			}
		}
	}
	if r.err == nil && len(r.buf) > 0 {
		r.fail("bytes behind an acknowledgement")
	}
	switch {
	case r.err != nil:
	case packetID == 0:
		r.err = protocolError("packet identifier 0 in an acknowledgement")
	case kind <= typePubrec && !slices.Contains(ackReasons, reason),
		kind >= typePubrel && reason != 0 && reason != reasonIDNotFound:
		r.err = protocolError("reason code that this acknowledgement cannot have") // [MQTT-3.4.2-1] and its like
	}
	return packetID, reason, r.err
}

// ackReasons are the reason codes of a PUBACK or PUBREC (3.4.2.1, 3.5.2.1).
var ackReasons = []byte{0, reasonNoSubscribers, reasonUnspecified, reasonImplementation, reasonNotAuthorized, reasonTopicInvalid, reasonIDInUse, reasonQuota, reasonPayloadFormat}

// filterRequest is one topic filter of a SUBSCRIBE.
type filterRequest struct {
	filter  string
	options byte // as in MQTT 5, 3.8.3.1
}

// parseSubscribe reads a SUBSCRIBE (3.8).
func parseSubscribe(first byte, body []byte, version byte) (packetID uint16, identifier uint32, filters []filterRequest, err error) {
	if version > 3 && first&0x0F != 2 { // MQTT 3.1 has DUP here
		return 0, 0, nil, malformed("reserved flags of a SUBSCRIBE") // [MQTT-3.8.1-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 {
		for p := range r.properties(subscribeProps) {
			if p.id != propSubscriptionID {
				continue
			}
			if identifier = p.num; identifier == 0 {
				return 0, 0, nil, protocolError("subscription identifier 0") // 3.8.2.1.2
			}
		}
	}
	for len(r.buf) > 0 && r.err == nil {
		f := filterRequest{filter: string(r.text()), options: r.byte()}
		if r.err != nil {
			break
		}
		switch {
		case version < 5 && !wellFormed(f.filter): // [MQTT-4.7.1-2] [MQTT-4.7.1-3]; MQTT 5 has a code for it
			return 0, 0, nil, malformed("malformed topic filter")
		case version < 5 && (f.options&^3 != 0 || f.options == 3), f.options&0xC0 != 0:
			return 0, 0, nil, malformed("reserved subscription options are set") // [MQTT-3.8.3-5]
		case f.options&3 == 3, f.options>>4&3 == 3:
			return 0, 0, nil, protocolError("subscription options out of range") // 3.8.3.1
		case f.options&4 != 0 && strings.HasPrefix(f.filter, "$share/"):
			return 0, 0, nil, protocolError("No Local on a shared subscription") // [MQTT-3.8.3-4]
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

// wellFormed reports whether a filter, shared or not, is one at all.
func wellFormed(filter string) bool {
	_, topic, _, ok := splitShare(filter)
	return ok && validFilter(topic, 0, 0)
}

// parseUnsubscribe reads an UNSUBSCRIBE (3.10).
func parseUnsubscribe(first byte, body []byte, version byte) (packetID uint16, filters []string, err error) {
	if version > 3 && first&0x0F != 2 { // MQTT 3.1 has DUP here
		return 0, nil, malformed("reserved flags of an UNSUBSCRIBE") // [MQTT-3.10.1-1]
	}
	r := reader{buf: body}
	packetID = r.uint16()
	if version == 5 {
		for range r.properties(userProps) {
		}
	}
	for len(r.buf) > 0 && r.err == nil {
		filter := string(r.text())
		if r.err == nil && version < 5 && !wellFormed(filter) {
			return 0, nil, malformed("malformed topic filter") // [MQTT-4.7.1-2] [MQTT-4.7.1-3]; MQTT 5 has a code for it
		}
		filters = append(filters, filter)
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
// filter. An UNSUBACK of MQTT 3.x has none. text, where not empty, is the
// reason string of MQTT 5.
func appendSuback(dst []byte, kind, version byte, packetID uint16, reasons []byte, text string) []byte {
	n, props := 2, 0
	if text != "" && version == 5 {
		props = 3 + len(text)
	}
	if version == 5 {
		n += varintSize(props) + props
	}
	if version == 5 || kind == typeSuback {
		n += len(reasons)
	}
	dst = append(dst, kind<<4)
	dst = appendVarint(dst, n)
	dst = append(dst, byte(packetID>>8), byte(packetID))
	if version == 5 {
		dst = appendVarint(dst, props)
	}
	if props > 0 {
		dst = appendProperty(dst, propReasonString, text)
	}
	if version == 5 || kind == typeSuback {
		dst = append(dst, reasons...)
	}
	return dst
}

// reasonTexts are the reason strings of what is refused. Where more is known,
// that is said instead.
var reasonTexts = map[byte]string{
	reasonNotAuthorized:  "an access rule denies it",
	reasonShuttingDown:   "the broker is being stopped",
	reasonTakenOver:      "another connection uses this client identifier",
	reasonFilterInvalid:  "topic filter is malformed, too long, or has too many levels",
	reasonIDNotFound:     "no message with this packet identifier is under way",
	reasonQuota:          "the bound that the broker was given for this is reached",
	reasonAdministrative: "an administrator has closed the connection",
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
		for p := range r.properties(disconnectProps) {
			if p.id == propSessionExpiry {
				d.expiry, d.hasExpiry = p.num, true
			}
		}
	}
	if r.err == nil && len(r.buf) > 0 {
		r.fail("bytes behind a DISCONNECT")
	}
	if r.err == nil && !slices.Contains(disconnectReasons, d.reason) {
		r.err = protocolError("reason code that a client's DISCONNECT cannot have") // [MQTT-3.14.2-1]
	}
	return d, r.err
}

// disconnectReasons are the reason codes of a client's DISCONNECT (3.14.2.1).
var disconnectReasons = []byte{
	0, reasonWithWill, reasonUnspecified, reasonMalformed, reasonProtocolError, reasonImplementation, reasonTopicInvalid,
	reasonReceiveMaximum, reasonAliasInvalid, reasonTooLarge, reasonRate, reasonQuota, reasonAdministrative, reasonPayloadFormat,
}

// appendDisconnect appends a DISCONNECT of the server, of which MQTT 3.x has
// none. text, where not empty, is the reason string.
func appendDisconnect(dst []byte, reason byte, text string) []byte {
	if text == "" {
		return append(dst, typeDisconnect<<4, 1, reason)
	}
	props := 3 + len(text)
	dst = append(dst, typeDisconnect<<4)
	dst = appendVarint(dst, 1+varintSize(props)+props)
	dst = append(dst, reason)
	dst = appendVarint(dst, props)
	return appendProperty(dst, propReasonString, text)
}
