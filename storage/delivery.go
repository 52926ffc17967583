package storage

import (
	"encoding/binary"
	"fmt"
)

// SessionID names a persistent session in the store. 0 is no session.
type SessionID int64

// NeverExpires is the Session Expiry Interval of a session that never ends
// by itself (3.1.2.11.2).
const NeverExpires = 0xFFFFFFFF

// Session is the durable row of a persistent session.
type Session struct {
	ID       SessionID
	ClientID string
	Expiry   uint32 // Session Expiry Interval, seconds
	Protocol byte   // 3, 4 or 5
	Created  int64  // Unix milliseconds
	Ceiling  uint64 // sequence numbers below it may have been used
	Progress Progress
	Left     int64 // when the client left, a stamp; 0: it is connected, or left not long ago
}

// Progress says how far a session's client has come. Sequence numbers below
// Cursor are finished; Finished are those above it that are finished out of
// order; Released are QoS 2 deliveries whose PUBREC has come and whose PUBCOMP
// has not. Both lists ascend.
type Progress struct {
	Cursor   uint64
	Finished []uint64
	Released []uint64
}

// Subscription is one durable subscription.
type Subscription struct {
	Session    SessionID
	Filter     string // with $share/group/ where shared
	Options    byte   // subscription options, MQTT 5 3.8.3.1
	Identifier uint32 // 0 = none
}

// Inbound is a QoS 2 packet identifier that a client has sent and not yet
// released.
type Inbound struct {
	Session  SessionID
	PacketID uint16
}

// Will is the stored will of a client.
type Will struct {
	ClientID string
	Delay    uint32 // Will Delay Interval, seconds
	Due      int64  // when it is due, a stamp; 0: its client is connected, or left not long ago
	Message  *Message
}

// Image is everything durable, as a start finds it.
type Image struct {
	Sessions      []Session
	Subscriptions []Subscription
	Inbound       []Inbound
	Wills         []Will
	Retained      []*Message
	Segments      []StoredSegment // without their bodies, ascending by ID
	Mark          *Mark           // nil: there is none
	TimeOff       []TimeOff       // ascending by Era
}

// ClaimRecord is what a segment keeps of one session's claim on a message.
type ClaimRecord struct {
	Session     SessionID
	Seq         uint64
	QoS         byte   // of the delivery, 1 or 2
	Retain      bool   // RETAIN flag of the delivery
	Share       string // the share group that it came by, as the broker names it; empty: none
	Identifiers []uint32
}

func appendProgress(buf []byte, p Progress) []byte {
	buf = binary.AppendUvarint(buf, p.Cursor)
	for _, list := range [][]uint64{p.Finished, p.Released} {
		buf = binary.AppendUvarint(buf, uint64(len(list)))
		last := uint64(0)
		for _, seq := range list {
			buf = binary.AppendUvarint(buf, seq-last)
			last = seq
		}
	}
	return buf
}

func decodeProgress(b []byte) (Progress, error) {
	u := unpacker{buf: b}
	p := Progress{Cursor: u.uvarint()}
	for _, list := range []*[]uint64{&p.Finished, &p.Released} {
		last := uint64(0)
		for range u.count() {
			last += u.uvarint()
			*list = append(*list, last)
		}
	}
	if u.err != nil {
		return Progress{}, fmt.Errorf("decode progress: %w", u.err)
	}
	return p, nil
}
