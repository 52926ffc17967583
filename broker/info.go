package broker

import (
	"net"
	"time"

	"penstock/storage"
)

// Message is what a caller inside the process publishes.
type Message struct {
	Topic   string // topic name, no wildcards, not below "$"
	Payload []byte // owned by the broker from the call on
	QoS     byte   // 0, 1 or 2
	Retain  bool
}

// ClientInfo describes one connected client at one moment.
type ClientInfo struct {
	ID             string // client identifier, as sent or as assigned
	Username       string // empty for an anonymous client
	Address        string // remote address, host:port
	Listener       string // name of the listener it came through
	Protocol       byte   // 3 (MQTT 3.1), 4 (3.1.1) or 5
	Connected      time.Time
	CleanStart     bool // Clean Session (3.x) or Clean Start (5) of its CONNECT
	Subscriptions  int
	QueuedMessages int               // waiting for it or in flight to it
	Dropped        map[string]uint64 // deliveries to its session not made, by cause; nil: none
}

// ListenerInfo is one bound listener.
type ListenerInfo struct {
	Name        string
	Addr        net.Addr // the real address, also where ":0" was asked for
	Protocol    string   // "mqtt", "mqtts" (with TLS), "ws", "wss", or "unix" (MQTT over a unix socket)
	Connections int      // connections now, also those that have not said a CONNECT yet
}

// Health says whether the broker keeps its promise right now.
type Health struct {
	Ready    bool     // it accepts clients and can make durable what it acknowledges
	Degraded bool     // it serves, but something needs attention
	Reasons  []string // why, in words for a person; empty when all is well
}

// Stats is a snapshot of the broker's counters. Counters count since the
// start of the process and never go back; arrays are indexed by QoS.
type Stats struct {
	Started          time.Time
	Connections      int64 // connected clients now
	ConnectionsTotal uint64
	Sockets          uint64 // network connections accepted
	Connects         uint64 // CONNECT packets received; those that are not in ConnectionsTotal were refused
	Sessions         int64  // sessions now, connected or not
	SessionsExpired  uint64 // sessions that waited for their client in vain

	Subscriptions       int64 // of all sessions
	SharedSubscriptions int64 // how many of them are shared ones
	Retained            int64 // retained messages, without those below $SYS
	RetainedBytes       int64 // topic, payload and properties of those, bytes

	MessagesIn  [3]uint64 // PUBLISH packets received
	MessagesOut [3]uint64 // PUBLISH packets sent
	BytesIn     [3]uint64 // whole size of those packets, bytes
	BytesOut    [3]uint64
	PayloadIn   uint64 // their payloads alone, bytes
	PayloadOut  uint64

	PacketsIn  uint64 // MQTT packets of every kind
	PacketsOut uint64
	NetworkIn  uint64 // bytes read from clients' connections
	NetworkOut uint64

	Dropped map[string]uint64 // deliveries not made, by cause (see dropCauses)
	Limited map[string]uint64 // connections or packets refused because of a limit, by limit (see limitNames)

	QueueMessages int64             // waiting for subscribers or in flight to them
	QueueBytes    int64             // topic, payload and properties of those, bytes
	QueueAlarms   map[string]uint64 // sessions whose queue has reached a share of its bound, by percent
	StoreBound    int64             // what the segments of all queues may take on the disk (Journal.SegmentBytes), bytes

	Journal storage.JournalStats
	Disk    storage.SpaceStats
	Salvage *storage.SalvageReport // of the last damaged database; nil if there was none, or it was acknowledged
}

// Packets returns how many PUBLISH packets came and went, at any QoS.
func (s Stats) Packets() uint64 {
	n := uint64(0)
	for q := range 3 {
		n += s.MessagesIn[q] + s.MessagesOut[q]
	}
	return n
}
