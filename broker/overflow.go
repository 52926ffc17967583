package broker

import "penstock/storage"

// Whether a message is taken over at all is decided here, before it is given to
// anybody: who publishes it is told no, and nobody has got it.

// behindBytes is how much may wait for a client that is connected before it
// counts as behind, bytes, where the messages are so large that its window is
// more.
const behindBytes = 256 << 10

// diskSpace is the watch over the room on the disk.
type diskSpace interface {
	Low() bool // nothing new is to be stored; costs nothing
	Stats() storage.SpaceStats
}

// refuses reports whether a message must not be taken over, and the reason code
// for that; one of QoS 0 is refused as a retained message only. While the disk is nearly full it is what would have
// to stay there: for a session that is away or behind, or as a retained message.
// What goes between clients that keep up is not stored for longer than they take
// to acknowledge it, and goes on.
func (p *plane) refuses(rt *routes, m *storage.Message) (reason byte, refused bool) {
	if !p.space.Low() {
		return reasonSuccess, false
	}
	if p.takesRoom(m) {
		return reasonQuota, true
	}
	if m.QoS == 0 {
		return reasonSuccess, false
	}
	for i := range rt.direct {
		if d := &rt.direct[i]; d.qos > 0 && d.s.hoards() {
			return reasonQuota, true
		}
	}
	for _, g := range rt.shared {
		if g.hoards() {
			return reasonQuota, true
		}
	}
	return reasonSuccess, false
}

// refuse answers a PUBLISH of QoS 1 or 2 that refuses has refused: an MQTT 5
// client with the reason. One of MQTT 3.x, which cannot be told, is to be
// disconnected instead, by the error returned, so that it does not take an
// acknowledgement for a promise. A QoS 2 identifier is not taken.
func (p *plane) refuse(from *session, acks *ackQueue, m *storage.Message, id uint16, reason byte, b *batch) error {
	if m.QoS == 2 && from.received(id, acks, b) {
		return nil // taken over before: the client would use the identifier for another message
	}
	p.limit(limitDisk)
	if from.version < 5 {
		return &wireError{reason, "message could not be stored"}
	}
	acks.send(typePuback+m.QoS-1, id, reason, b)
	return nil
}

// takesRoom reports whether a message, as the retained one of its topic, takes
// more room than what is there.
func (p *plane) takesRoom(m *storage.Message) bool {
	if !m.Retain || len(m.Payload) == 0 || inMemory(m.Topic) {
		return false
	}
	old := p.Retained(m.Topic)
	return old == nil || m.Size() > old.Size()
}

// hoards reports whether a message of QoS 1 or 2 for the session would have to
// stay in the store: its client is away, or has left its oldest message
// unacknowledged until that was stored, with more waiting than it may have in
// flight.
func (s *session) hoards() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.id == 0 || s.ended:
		return false
	case s.link == nil:
		return true
	}
	return s.queue.len() > 0 && s.queue.at(0).durable && (s.live > s.window || s.bytes > behindBytes)
}

// hoards reports whether a message for the group would have to stay in the
// store: there is nobody but sessions that do.
func (g *shareGroup) hoards() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := len(g.members) > 0
	for _, sub := range g.members {
		all = all && sub.options&3 > 0 && sub.session.hoards()
	}
	return all
}

// noRoomFor reports whether a client's persistent session would be a new one
// while the disk is nearly full.
func (p *plane) noRoomFor(clientID string) bool {
	if !p.space.Low() {
		return false
	}
	s := p.session(clientID)
	return s == nil || s.id == 0
}
