package broker

import "penstock/storage"

// What happens where there is no room: the policy for a queue that is full, the
// alarms before that, and whether a message is taken over at all, which is decided
// before it is given to anybody: who publishes it is told no, and nobody has got
// it.

// The values of queue_overflow.
const (
	overflowDropOldest = "drop-oldest"
	overflowDropNewest = "drop-newest"
	overflowReject     = "reject"
)

// alarmLevels are the shares of a bound at which there is an alarm, percent. The
// last one is reached when something did not fit.
var alarmLevels = [...]int{50, 80, 100}

// levelOf returns how many of the levels are reached.
func levelOf(used, bound int64) int {
	n := 0
	for n < len(alarmLevels) && used >= bound/100*int64(alarmLevels[n])+bound%100*int64(alarmLevels[n])/100 {
		n++
	}
	return n
}

// fill returns the level of the session's queue: of its bytes or its messages,
// whichever is higher. s.mu is held.
func (s *session) fill() int { return s.fillAnd(0) }

// fillAnd is fill with some percent of the bounds added. s.mu is held.
func (s *session) fillAnd(percent int64) int {
	messages := int64(s.plane.cfg.MaxQueueMessages)
	return max(levelOf(s.takes()+s.bound()/100*percent, s.bound()), levelOf(int64(s.live)+messages/100*percent, messages))
}

// takes returns what of the session's bound in bytes its queue takes. A queue that
// is in memory only counts with what it takes there. s.mu is held.
func (s *session) takes() int64 {
	if s.id == 0 {
		return s.bytes + entryCost*int64(s.live)
	}
	return s.bytes
}

// bound returns the session's bound in bytes.
func (s *session) bound() int64 {
	if s.id == 0 {
		return int64(s.plane.cfg.MaxQueueMemory)
	}
	return s.plane.cfg.queueBytes()
}

// full reports whether a message of the given size is more than the queue may
// hold. One alone always fits. s.mu is held.
func (s *session) full(size int) bool {
	if s.id == 0 {
		size += entryCost
	}
	return s.live >= s.plane.cfg.MaxQueueMessages || s.live > 0 && s.takes()+int64(size) > s.bound()
}

// raise raises the session's alarm to a level, if it is below it. s.mu is held.
func (s *session) raise(level int) {
	if level <= s.alarm {
		return
	}
	p := s.plane
	for s.alarm < level {
		p.alarms[s.alarm].Add(1)
		s.alarm++
	}
	what := "queue is filling up"
	if level == len(alarmLevels) {
		what = "queue is full, messages are dropped"
		if p.cfg.QueueOverflow == overflowReject {
			what = "queue is full, messages are refused"
		}
		s.lost = 0
	}
	p.log.Warn(what, "client", s.clientID, "percent", alarmLevels[level-1], "queued", s.live, "queued_bytes", s.bytes,
		"max_queue_messages", p.cfg.MaxQueueMessages, "max_queue_bytes", s.bound(), "policy", p.cfg.QueueOverflow)
}

// lower lowers the alarm when the queue is a tenth of its bound below a level.
// s.mu is held.
func (s *session) lower() {
	level := 0
	if s.live > 0 {
		level = s.fillAnd(10)
	}
	if level >= s.alarm {
		return
	}
	if s.alarm == len(alarmLevels) && !s.ended {
		s.plane.log.Info("queue has room again", "client", s.clientID, "dropped", s.lost, "queued", s.live)
	}
	for s.alarm > level {
		s.alarm--
		s.plane.alarms[s.alarm].Add(-1)
	}
}

// drop counts deliveries to the session that are not made. s.mu is held.
func (s *session) drop(cause, n int) {
	s.plane.dropMany(cause, n)
	s.lost += n
	if s.dropped == nil {
		s.dropped = make(map[string]uint64)
	}
	s.dropped[dropCauses[cause]] += uint64(n)
}

// dropsNewest reports whether a new message for the session is dropped, and counts
// it then. s.mu is held.
func (s *session) dropsNewest(size int) bool {
	p := s.plane
	switch {
	case p.cfg.QueueOverflow != overflowDropNewest:
		return false
	case s.full(size):
		s.raise(len(alarmLevels))
		s.drop(dropQueueFull, 1)
	case p.storeFull.Load() && s.piles():
		s.drop(dropStoreFull, 1)
	default:
		return false
	}
	return true
}

// tooOld ends what has waited for longer than max_queue_age, at most a few
// thousand deliveries. now is by the broker's clock. s.mu is held.
func (s *session) tooOld(now int64, b *batch) {
	age := int64(s.plane.cfg.MaxQueueAge.D().Milliseconds())
	old := func(seg *storage.Segment) bool {
		created := seg.Created() // 0: by an older version, which did not note it
		return created != 0 && s.plane.clock.age(created, now) > age
	}
	for n := 0; n < 10000; {
		switch {
		case s.spill.count > 0 && (s.next >= s.queue.len() || s.spill.first() < s.queue.at(s.next).seq):
			r := s.spill.runs[s.spill.head]
			if !old(r.seg) {
				return
			}
			s.giveUp(r.count)
			s.drop(dropTooOld, r.count)
			n += r.count
		case s.next < s.queue.len():
			e := s.queue.at(s.next)
			if e.state != queued || e.tried || e.seg == nil || !old(e.seg) {
				return
			}
			s.drop(dropTooOld, 1)
			s.discard(s.next, b)
			n++
		default:
			return
		}
	}
}

// watchStore compares what all queues take on the disk with max_store. Above it
// the oldest of the longest queues go, or what comes is dropped or refused, as the
// policy says.
func (p *plane) watchStore() {
	used, bound := p.journal.Stored(), int64(p.cfg.MaxStore)
	level := levelOf(used, bound)
	switch before := int(p.storeAlarm.Load()); {
	case level > before:
		what := "store of all queues is filling up"
		if level == len(alarmLevels) {
			what = "store of all queues is full, messages are dropped or refused"
		}
		p.log.Warn(what, "percent", alarmLevels[level-1], "bytes", used, "max_store", bound, "policy", p.cfg.QueueOverflow)
		p.storeAlarm.Store(int32(level))
	case level < before && levelOf(used+bound/10, bound) < before:
		p.log.Info("store of all queues has room again", "bytes", used, "max_store", bound)
		p.storeAlarm.Store(int32(levelOf(used+bound/10, bound)))
	}
	p.storeFull.Store(level == len(alarmLevels))
	if level == len(alarmLevels) && p.cfg.QueueOverflow == overflowDropOldest {
		p.trimStore(bound - bound/50)
	}
}

// recordCost is about what a message takes in a segment besides, bytes.
const recordCost = 12

// trimStore gives up the oldest messages of the longest queues, as many bytes as
// they take too much on the disk. That may not be enough, where others need the
// same segments: then there is more to give up in a second.
func (p *plane) trimStore(most int64) {
	all := p.all()
	over := p.journal.Stored() - most
	length := func(s *session) int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ended {
			return 0
		}
		return s.spill.bytes
	}
	for over > 0 && p.journal.Stored() > most {
		var longest *session
		var bytes int64
		for _, s := range all {
			if n := length(s); n > bytes {
				longest, bytes = s, n
			}
		}
		if longest == nil {
			return
		}
		s := longest
		s.mu.Lock()
		// An eighth of it at a time: there may be many queues, and each look at
		// them takes a while.
		for left := s.spill.bytes - s.spill.bytes/8; !s.ended && s.spill.count > 0 && s.spill.bytes >= left && over > 0; {
			r := s.spill.runs[s.spill.head]
			each := r.bytes/int64(r.count) + recordCost
			n := int(min(over/each+1, int64(r.count)))
			s.giveUp(n)
			over -= each * int64(n)
			s.drop(dropStoreFull, n)
		}
		s.mu.Unlock()
	}
}

// behindBytes is how much may wait for a client that is connected before it
// counts as behind, bytes, where the messages are so large that its window is
// more.
const behindBytes = 256 << 10

// diskSpace is the watch over the room on the disk.
type diskSpace interface {
	Low() bool // nothing new is to be stored; costs nothing
	Stats() storage.SpaceStats
}

// refuses returns the limit for which a message must not be taken over, noLimit if
// there is none; one of QoS 0 is refused as a retained message only.
//
// While the disk is nearly full, or the store of all queues is and the policy is
// to reject, it is what would have to stay there: for a session that is away or
// behind, or as a retained message. What goes between clients that keep up is not
// stored for longer than they take to acknowledge it, and goes on. Where the
// policy is to reject, a message is refused too if the queue of one of those who
// shall get it is full.
func (p *plane) refuses(rt *routes, m *storage.Message) (limit int) {
	low, reject := p.space.Low(), p.cfg.QueueOverflow == overflowReject
	if !low && !reject {
		return noLimit
	}
	if low && p.takesRoom(m) {
		return limitDisk
	}
	if m.QoS == 0 {
		return noLimit
	}
	pile := noLimit
	switch {
	case low:
		pile = limitDisk
	case p.storeFull.Load():
		pile = limitQueues
	}
	for i := range rt.direct {
		if d := &rt.direct[i]; d.qos > 0 {
			if limit := d.s.refuses(m.Size(), pile, reject); limit != noLimit {
				d.s.refused(m.Size())
				return limit
			}
		}
	}
	for _, g := range rt.shared {
		if limit := g.refuses(m.Size(), pile, reject); limit != noLimit {
			return limit
		}
	}
	return noLimit
}

// refuses returns the limit for which the session takes no message of a size:
// pile, if that is one, where it would have to stay in the store.
func (s *session) refuses(size, pile int, reject bool) (limit int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case pile != noLimit && s.piles():
		return pile
	case reject && !s.ended && s.full(size):
		return limitQueues
	}
	return noLimit
}

// refused raises the alarm of a session for which a message of a size was refused,
// if that was for its own bound and not for that of the store.
func (s *session) refused(size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended && s.full(size) {
		s.raise(len(alarmLevels))
	}
}

// refuse answers a PUBLISH of QoS 1 or 2 that is refused for a limit: an MQTT 5
// client with the reason. One of MQTT 3.x, which cannot be told, is to be
// disconnected instead, by the error returned, so that it does not take an
// acknowledgement for a promise. A QoS 2 identifier is not taken.
func (p *plane) refuse(from *session, acks *ackQueue, m *storage.Message, id uint16, limit int, b *batch) error {
	if m.QoS == 2 && from.received(id, acks, b) {
		return nil // taken over before: the client would use the identifier for another message
	}
	p.limit(limit)
	if from.version < 5 {
		if limit == limitDisk {
			return &wireError{reasonQuota, "message could not be stored: the disk is nearly full"}
		}
		return &wireError{reasonQuota, "message could not be stored: a queue is full (broker.queue_overflow is reject)"}
	}
	acks.send(typePuback+m.QoS-1, id, reasonQuota, b)
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

// piles reports whether a message of QoS 1 or 2 for the session would have to
// stay in the store: its client is away, or has left its oldest message
// unacknowledged until that was stored, with more waiting than it may have in
// flight. s.mu is held.
func (s *session) piles() bool {
	switch {
	case s.id == 0 || s.ended:
		return false
	case s.link == nil:
		return true
	}
	stored := s.spill.count > 0 || s.queue.len() > 0 && s.queue.at(0).durable
	return stored && (s.live > s.window || s.bytes > behindBytes)
}

// refuses returns the limit for which the group takes no message of a size: there
// is nobody but sessions that take none.
func (g *shareGroup) refuses(size, pile int, reject bool) (limit int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	limit = noLimit
	for _, sub := range g.members {
		if sub.options&3 == 0 {
			return noLimit
		}
		if limit = sub.session.refuses(size, pile, reject); limit == noLimit {
			return noLimit
		}
	}
	for _, sub := range g.members {
		sub.session.refused(size)
	}
	return limit
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
