package broker

import (
	"cmp"
	"math"
	"slices"
	"sync"

	"penstock/storage"
)

// link is what the data plane needs of a connection. Its methods are called
// with the session's or the acknowledgement queue's lock held and never wait.
type link interface {
	// room reports whether the output buffer is below its high-water mark. If
	// it is not, the connection calls session.drained when it is again.
	room() bool
	// roomQoS0 reports whether a message that may be lost can be written.
	roomQoS0() bool
	// sendPublish sends a delivery.
	sendPublish(m *storage.Message, qos byte, dup, retain bool, packetID uint16, ids []uint32, b *batch) outcome
	// sendAck sends an acknowledgement, or a PUBREL.
	sendAck(kind byte, packetID uint16, reason byte, codes []byte, b *batch)
}

// outcome is what became of a delivery that was to be sent.
type outcome byte

const (
	outSent     outcome = iota
	outTooLarge         // the packet is larger than the client takes: to be dropped for it [MQTT-3.1.2-25]
	outGone             // the connection takes nothing any more: to be sent on the next one
)

// entryState is where a delivery stands. See docs/delivery.md.
type entryState byte

const (
	queued    entryState = iota // not sent on this connection
	sent                        // PUBLISH sent, no acknowledgement yet
	releasing                   // QoS 2: PUBREC received, not yet durable
	released                    // QoS 2: PUBREL sent, or to be sent again on the next connection
	finished                    // nothing more to do
)

// entry is one delivery of a message to one session. All fields are guarded by
// the session's lock. It implements storage.Claim and storage.Waiter.
type entry struct {
	s       *session
	msg     *storage.Message // nil once it is finished or released
	size    int              // of msg
	ticket  *ticket          // owed while neither durable nor acknowledged; nil after
	seg     *storage.Segment // holds it while durable and needed
	seq     uint64
	ids     []uint32 // subscription identifiers
	state   entryState
	qos     byte
	retain  bool
	share   string // key of the share group that it came by; empty: none
	durable bool
	tried   bool // was sent once, on this connection or an earlier one: the next PUBLISH has DUP
	perhaps bool // that is only likely, after a restart
}

// inbound is a QoS 2 packet identifier received from the client.
type inbound struct {
	counted  *ackQueue // the connection whose Receive Maximum it counts against; guarded by the session's lock
	leaving  bool      // PUBREL received, release not yet durable; guarded by the session's lock
	releases []*ticket // PUBCOMPs that wait for the release; guarded by the session's lock

	mu     sync.Mutex
	safe   bool      // what the PUBREC says is true
	joined []*ticket // PUBRECs of re-sent PUBLISH packets that wait for the same
}

// packetIDs is how many packet identifiers there are. A delivery's identifier
// is derived from its sequence number, so fewer than this many sequence
// numbers may lie between the oldest unfinished delivery and one in flight.
const packetIDs = 65535

// ceilingBlock is how many sequence numbers are reserved at once. It must be
// well below packetIDs, for a restart skips what is left of two blocks.
const ceilingBlock = 16384

// session is the state of one client identifier: its queue, its position in
// it, its subscriptions and the QoS 2 identifiers it has open. It outlives
// connections where the client asked for it.
type session struct {
	plane    *plane
	clientID string
	id       storage.SessionID // 0: ends with the connection, nothing of it is stored

	mu      sync.Mutex
	link    link      // where deliveries go; nil while offline
	acks    *ackQueue // of the current connection; nil while offline
	owner   owner     // the connection that has or is about to have the session
	version byte
	expiry  uint32 // Session Expiry Interval, seconds
	agreed  uint32 // the one that the client was told last, or asked for when it left
	ended   bool
	away    away // since when the client is away
	window  int  // deliveries in flight at most
	unacked int  // deliveries in flight on this connection

	queue    ring  // unfinished deliveries and those finished out of order, by sequence number, but for what is in spill
	spill    spill // deliveries that only the disk has
	next     int   // index in queue of the next one to send on this connection
	bytes    int64 // size of the unfinished messages in both
	live     int   // unfinished deliveries in both
	qos0     int   // QoS 0 deliveries in queue: retained ones, and what must stay behind them
	nextSeq  uint64
	ceiling  uint64            // sequence numbers below it may be used
	reserved uint64            // ceiling asked for, not yet durable
	alarm    int               // level of alarmLevels that the queue has reached
	lost     int               // deliveries dropped since the queue was full
	dropped  map[string]uint64 // deliveries not made, by cause; nil: none
	loading  bool              // something is being read from the disk
	spilling bool              // it is to be looked at whether memory can be given back; the journal's
	stale    stale

	// After a restart: what may have been sent before it.
	triedBelow uint64
	triedLeft  int
	restartSeq uint64 // what was before it is below

	inbound map[uint16]*inbound
	subs    map[string]*subscription // by filter; guarded by plane.mu
	weight  int                      // of subs (see filterWeight); likewise
	who     principal
}

// stale is what the store still takes for unfinished: a restart before the
// next progress is durable would bring it back, with its packet identifiers.
type stale struct {
	finished uint64 // lowest stored delivery finished since the last progress was taken
	writing  uint64 // lowest one of which that progress speaks; it is not durable yet
	dropped  uint64 // lowest stored delivery dropped ahead of the cursor
	upTo     uint64 // highest one dropped so
	cursor   uint64 // of the progress taken last
	asked    bool   // a delivery waits for the next progress
}

const never = math.MaxUint64

var noStale = stale{finished: never, writing: never, dropped: never}

// owner is the connection that a session belongs to, as a takeover needs it.
type owner interface {
	// takeOver closes the connection for the reason given and returns a
	// channel that is closed when it handles no further packet.
	takeOver(reason byte) <-chan struct{}
	// farewell says how the connection ended, once that channel is closed.
	farewell() leaving
}

func (s *session) packetID(seq uint64) uint16 { return uint16(1 + seq%s.plane.ids) }

// enqueue appends a delivery, where the queue is full and the policy says so in
// place of the oldest. By the other policies what has no room does not get here,
// but for what was promised before, and what came with others at the bound.
// s.mu is held.
func (s *session) enqueue(m *storage.Message, qos byte, retain bool, ids []uint32, b *batch) *entry {
	if s.full(m.Size()) && s.plane.cfg.QueueOverflow == overflowDropOldest {
		s.dropOldest(m.Size(), b)
	}
	e := &entry{s: s, msg: m, size: m.Size(), seq: s.nextSeq, qos: qos, retain: retain, ids: ids}
	s.nextSeq++
	s.queue.push(e)
	s.bytes += int64(m.Size())
	s.live++
	if qos == 0 {
		s.qos0++
	}
	s.plane.queueMessages.Add(1)
	s.plane.queueBytes.Add(int64(m.Size()))
	if s.id != 0 {
		s.reserve()
	}
	if 2*s.takes() >= s.bound() || 2*s.live >= s.plane.cfg.MaxQueueMessages { // else there is nothing to alarm of, and to divide for
		s.raise(min(s.fill(), len(alarmLevels)-1))
	}
	return e
}

// reserve asks for more sequence numbers before they run out. s.mu is held.
func (s *session) reserve() {
	if s.nextSeq+s.plane.block/2 < s.reserved {
		return
	}
	s.reserved = max(s.reserved, s.nextSeq) + s.plane.block
	id, ceiling := s.id, s.reserved
	s.plane.journal.Change(func(tx storage.Tx) error { return tx.PutCeiling(id, ceiling) }, storage.WaiterFunc(func() {
		s.mu.Lock()
		s.ceiling = max(s.ceiling, ceiling)
		s.pump(s.plane.told())
		s.mu.Unlock()
	}))
}

// dropOldest makes room for need bytes by giving up the oldest deliveries that
// are not in flight: the policy that one dead subscriber must not silence a
// plant. s.mu is held.
func (s *session) dropOldest(need int, b *batch) {
	s.raise(len(alarmLevels))
	for i := s.next; s.full(need); {
		if s.spill.count > 0 && (i >= s.queue.len() || s.spill.first() < s.queue.at(i).seq) {
			before := s.live
			s.dropSpilled(need)
			s.drop(dropQueueFull, before-s.live)
			continue
		}
		if i >= s.queue.len() {
			break
		}
		e := s.queue.at(i)
		if e.state != queued || e.tried {
			i++
			continue
		}
		s.drop(dropQueueFull, 1)
		s.discard(i, b)
	}
}

// discard takes the delivery at i out of the queue, which is at or behind
// next. It is not left as finished: behind a stuck one those would pile up.
// s.mu is held.
func (s *session) discard(i int, b *batch) {
	e := s.queue.at(i)
	if e.seg != nil {
		s.stale.dropped, s.stale.upTo = min(s.stale.dropped, e.seq), max(s.stale.upTo, e.seq)
	}
	s.queue.remove(i)
	s.finish(e, b)
}

// pump sends what may be sent: in order, within the window, below the ceiling,
// at QoS 2 only what is durable, and only while its packet identifier belongs
// to no other delivery, be it in the queue or in the store (see stale). s.mu
// is held.
func (s *session) pump(b *batch) {
	if s.link == nil {
		return
	}
	defer s.more()
	for s.next < s.queue.len() {
		e := s.queue.at(s.next)
		if e.seq > s.spill.first() && !fault(faultOvertake) {
			return // those before it are read first
		}
		switch e.state {
		case finished:
			s.next++
			continue
		case released:
			s.link.sendAck(typePubrel, s.packetID(e.seq), 0, nil, b)
			s.unacked++
			s.next++
			continue
		case releasing: // its PUBREL follows when the PUBREC is durable
			s.unacked++
			s.next++
			continue
		}
		if e.msg.Expires != 0 && e.mayExpire() && s.plane.expired(e.msg, s.plane.now()) {
			s.drop(dropExpired, 1)
			s.discard(s.next, b)
			continue
		}
		if e.qos > 0 {
			if s.unacked >= s.window {
				return
			}
			if s.id != 0 && e.seq >= s.ceiling {
				return
			}
			if s.id != 0 && e.qos == 2 && !e.durable && !fault(faultDeliverEarly) {
				return
			}
			if e.seq-s.lowest() >= s.plane.ids && !fault(faultPacketIDReuse) {
				return
			}
			if e.seq-min(e.seq, s.stale.finished, s.stale.writing, s.stale.dropped) >= s.plane.ids {
				if !s.stale.asked {
					s.stale.asked = true
					s.plane.journal.MarkProgress(s.id, storage.WaiterFunc(func() {})) // soon, not when it is convenient
				}
				return
			}
		}
		if !s.link.room() {
			return
		}
		switch s.link.sendPublish(e.msg, e.qos, e.tried && e.qos > 0, e.retain, s.packetID(e.seq), e.ids, b) {
		case outGone:
			return
		case outTooLarge:
			s.drop(dropTooLarge, 1)
			s.discard(s.next, b)
			continue
		}
		if e.qos == 0 {
			s.discard(s.next, b)
			continue
		}
		e.state, e.tried, e.perhaps = sent, true, false
		s.unacked++
		s.next++
	}
}

// finish ends a delivery. s.mu is held.
func (s *session) finish(e *entry, b *batch) {
	if e.state == finished {
		return
	}
	e.state = finished
	s.bytes -= int64(e.size)
	s.live--
	if e.qos == 0 {
		s.qos0--
	}
	s.plane.queueMessages.Add(-1)
	s.plane.queueBytes.Add(-int64(e.size))
	if t := e.ticket; t != nil {
		e.ticket = nil
		t.release(b)
	}
	if e.seg != nil {
		e.seg.Release(1, e.size)
		e.seg = nil
		s.stale.finished = min(s.stale.finished, e.seq)
		s.plane.journal.MarkProgress(s.id, nil)
	}
	e.msg = nil // it may stay behind a stuck one for long
	s.advance()
}

// advance moves the cursor past what is finished. s.mu is held.
func (s *session) advance() {
	for s.queue.len() > 0 && s.queue.at(0).state == finished && s.queue.at(0).seq < s.spill.first() {
		s.queue.popFront()
		if s.next > 0 {
			s.next--
		}
	}
}

// find returns the delivery in flight that has a packet identifier, nil if
// there is none. s.mu is held.
func (s *session) find(id uint16) *entry {
	if s.queue.len() == 0 || id == 0 {
		return nil
	}
	first := s.lowest()
	ids := s.plane.ids
	seq := first + (uint64(id)-1+ids-first%ids)%ids
	i := int(min(seq-min(seq, s.queue.at(0).seq), uint64(s.queue.len()-1)))
	if s.queue.at(i).seq != seq { // a restart leaves gaps, and so does what only the disk has
		i = s.queue.search(seq)
	}
	if i >= s.next || i >= s.queue.len() || s.queue.at(i).seq != seq {
		return nil
	}
	return s.queue.at(i)
}

// puback handles a PUBACK of the client.
func (s *session) puback(id uint16, b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.find(id); e != nil && e.qos == 1 && e.state == sent {
		s.unacked--
		s.finish(e, b)
		s.pump(b)
	}
}

// pubrec handles a PUBREC. Its PUBREL leaves when the state is durable, so
// that a restart does not send the message again [MQTT-4.3.3-3].
func (s *session) pubrec(id uint16, reason byte, b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.link == nil || s.acks == nil {
		return // a successor has the session
	}
	e := s.find(id)
	switch {
	case (e == nil || e.qos != 2 || e.state == finished) && reason >= 0x80: // [MQTT-4.3.3-4]: nothing to release
	case e == nil || e.qos != 2 || e.state == finished:
		s.acks.send(typePubrel, id, notFound(s.version), b)
	case e.state == sent && reason >= 0x80: // [MQTT-4.3.3-4]: the client refuses it
		s.unacked--
		s.finish(e, b)
		s.pump(b)
	case e.state == sent && s.id != 0 && !fault(faultPubrelEarly):
		e.state = releasing
		s.plane.journal.MarkProgress(s.id, e)
	case e.state == sent, e.state == released:
		e.state = released
		if s.id != 0 {
			s.plane.journal.MarkProgress(s.id, nil)
		}
		s.link.sendAck(typePubrel, id, 0, nil, b)
	}
}

// notFound is the reason code for an identifier that the session does not
// know. MQTT 3.x has none.
func notFound(version byte) byte {
	if version == 5 {
		return reasonIDNotFound
	}
	return 0
}

// Committed tells an entry that its PUBREC is durable.
func (e *entry) Committed() {
	s := e.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.state != releasing {
		return
	}
	e.state = released
	if s.link != nil && s.queue.search(e.seq) < s.next {
		s.link.sendAck(typePubrel, s.packetID(e.seq), 0, nil, s.plane.told())
	}
}

// pubcomp handles a PUBCOMP.
func (s *session) pubcomp(id uint16, b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.find(id); e != nil && e.state == released {
		s.unacked--
		s.finish(e, b)
		s.pump(b)
	}
}

// waiting returns how many deliveries wait for the client or are in flight.
func (s *session) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

// expired reports whether the Session Expiry Interval has passed since the
// client left, at the stamp now. s.mu is held.
func (s *session) expired(now int64) bool {
	return s.owner == nil && s.expiry != storage.NeverExpires && s.away.since != 0 && s.plane.clock.age(s.away.since, now) >= int64(s.expiry)*1000
}

// drained goes on sending after the connection's output buffer had no room.
func (s *session) drained(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pump(b)
}

// Record implements storage.Claim.
func (e *entry) Record() (storage.ClaimRecord, bool) {
	e.s.mu.Lock()
	defer e.s.mu.Unlock()
	if e.state == finished || e.s.ended {
		return storage.ClaimRecord{}, false
	}
	return storage.ClaimRecord{Session: e.s.id, Seq: e.seq, QoS: e.qos, Retain: e.retain, Share: e.share, Identifiers: e.ids}, true
}

// Stored implements storage.Claim.
func (e *entry) Stored(seg *storage.Segment) (needed bool) {
	s := e.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.state == finished {
		if !s.ended {
			s.stale.finished = min(s.stale.finished, e.seq)
			s.plane.journal.MarkProgress(s.id, nil)
		}
		return false
	}
	b := s.plane.told()
	e.durable, e.seg = true, seg
	if !s.spilling && s.holdsTooMuch() {
		s.spilling = true
		s.plane.spilling = append(s.plane.spilling, s)
	}
	if t := e.ticket; t != nil {
		e.ticket = nil
		t.release(b)
	}
	if e.qos == 2 {
		s.pump(b)
	}
	return true
}

// principal returns whose rights count for what the session receives.
func (s *session) principal() principal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.who
}

// progress returns how far the client has come, for the journal.
func (s *session) progress() (storage.Progress, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return storage.Progress{}, false
	}
	p := storage.Progress{Cursor: s.lowest()}
	s.stale.writing, s.stale.finished = min(s.stale.writing, s.stale.finished), never
	s.stale.cursor = p.Cursor
	for i := range s.queue.len() {
		e := s.queue.at(i)
		switch {
		case e.state == finished:
			p.Finished = append(p.Finished, e.seq)
		case e.state == releasing, e.state == released:
			p.Released = append(p.Released, e.seq)
		case i >= s.next && !e.tried: // behind what was ever sent, all is queued
			return p, true
		}
	}
	return p, true
}

// progressStored tells that what progress returned last is durable.
func (s *session) progressStored(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale.writing, s.stale.asked = never, false
	if s.stale.upTo < s.stale.cursor {
		s.stale.dropped, s.stale.upTo = never, 0
	} else { // while a flood goes on something is always dropped
		s.stale.dropped = max(s.stale.dropped, s.stale.cursor)
	}
	s.pump(b)
}

// received answers a QoS 2 PUBLISH whose identifier is in use, and reports
// whether that was so.
func (s *session) received(id uint16, acks *ackQueue, b *batch) bool {
	s.mu.Lock()
	in := s.inbound[id]
	if in != nil {
		in.count(acks)
	}
	s.mu.Unlock()
	if in == nil {
		return false
	}
	in.answer(id, acks, b)
	return true
}

// receive handles the identifier of a QoS 2 PUBLISH. It returns the state to
// be filled for a new one, nil for one that is there already: then the PUBREC
// joins the first one's. s.mu is taken.
func (s *session) receive(id uint16, acks *ackQueue, b *batch) *inbound {
	s.mu.Lock()
	in := s.inbound[id]
	if in == nil {
		in = &inbound{}
		if s.inbound == nil {
			s.inbound = make(map[uint16]*inbound)
		}
		s.inbound[id] = in
		in.count(acks)
		s.mu.Unlock()
		return in
	}
	in.count(acks)
	s.mu.Unlock()
	in.answer(id, acks, b)
	return nil
}

// answer sends the PUBREC again, or has it join the first one's.
func (in *inbound) answer(id uint16, acks *ackQueue, b *batch) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.safe {
		acks.send(typePubrec, id, 0, b)
		return
	}
	in.joined = append(in.joined, acks.issue(typePubrec, id, 0))
}

// count has the identifier count against a connection's Receive Maximum.
func (in *inbound) count(acks *ackQueue) {
	if in.counted != acks {
		in.counted = acks
		acks.open.Add(1)
	}
}

// free ends that: the PUBCOMP leaves.
func (in *inbound) free() {
	if in.counted != nil {
		in.counted.open.Add(-1)
	}
}

// secured tells that what the PUBREC says is true now.
func (in *inbound) secured(b *batch) {
	in.mu.Lock()
	in.safe = true
	joined := in.joined
	in.joined = nil
	in.mu.Unlock()
	for _, t := range joined {
		t.release(b)
	}
}

// pubrel handles a PUBREL: the identifier is free again when its release is
// durable, and only then the PUBCOMP leaves.
func (s *session) pubrel(id uint16, acks *ackQueue, b *batch) {
	s.mu.Lock()
	in := s.inbound[id]
	if in == nil {
		s.mu.Unlock()
		acks.send(typePubcomp, id, notFound(s.version), b)
		return
	}
	if s.id == 0 {
		delete(s.inbound, id)
		in.free()
		s.mu.Unlock()
		acks.send(typePubcomp, id, 0, b)
		return
	}
	if fault(faultPubcompEarly) {
		acks.send(typePubcomp, id, 0, b)
	}
	first := !in.leaving
	in.leaving = true
	if !fault(faultPubcompEarly) {
		in.releases = append(in.releases, acks.issue(typePubcomp, id, 0))
	}
	s.mu.Unlock()
	if !first {
		return
	}
	row := storage.Inbound{Session: s.id, PacketID: id}
	s.plane.journal.Change(func(tx storage.Tx) error { return tx.DeleteInbound(row) }, storage.WaiterFunc(func() {
		s.mu.Lock()
		delete(s.inbound, id)
		in.free()
		releases := in.releases
		in.releases = nil
		s.mu.Unlock()
		for _, t := range releases {
			t.release(s.plane.told())
		}
	}))
}

// attach starts deliveries on a connection: first what was in flight on the
// last one, in order, then the rest.
func (s *session) attach(l link, acks *ackQueue, b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.link, s.acks = l, acks
	s.next, s.unacked = 0, 0
	for i := range s.queue.len() {
		e := s.queue.at(i)
		if e.state == queued && !e.tried {
			break
		}
		if e.state == sent {
			e.state = queued
		}
	}
	s.pump(b)
}

// detach ends deliveries on a connection. It reports whether l was the
// session's.
func (s *session) detach(o owner) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner != o {
		return false
	}
	if s.acks != nil {
		s.acks.close()
	}
	s.owner, s.link, s.acks = nil, nil, nil
	s.away = away{since: s.plane.now()}
	s.unload()
	return true
}

// end finishes everything that the session still has, and returns what others
// shall have of it, in its order: not what is QoS 2 and was sent once
// [MQTT-4.8.2-5]. The caller has taken it out of the plane. s.mu is held.
func (s *session) end(b *batch) (orphans []orphan) {
	s.ended = true
	for s.spill.count > 0 {
		r := s.spill.runs[s.spill.head]
		s.live -= r.count
		s.bytes -= r.bytes
		s.plane.queueMessages.Add(-int64(r.count))
		s.plane.queueBytes.Add(-r.bytes)
		s.took(r.count, r.bytes)
		tried := min(max(s.triedBelow, r.first+uint64(max(s.triedLeft, 0))), s.restartSeq)
		s.triedLeft -= r.count
		if r.share {
			orphans = append(orphans, orphan{seq: r.first, client: s.clientID, run: r, tried: tried})
		} else {
			s.plane.dropMany(dropSessionEnded, r.count)
			r.seg.Release(r.count, int(r.bytes))
		}
	}
	for s.queue.len() > 0 { // finish takes the first one out
		e := s.queue.at(0)
		switch {
		case e.qos == 0 || e.state == finished:
		case e.share != "" && (e.qos == 1 || !e.tried):
			orphans = append(orphans, orphan{seq: e.seq, msg: e.msg, share: e.share, ticket: e.ticket, seg: e.seg})
			e.ticket, e.seg = nil, nil
		default:
			s.plane.drop(dropSessionEnded)
		}
		s.finish(e, b)
		if s.queue.len() > 0 && s.queue.at(0) == e {
			s.queue.popFront()
		}
	}
	s.queue, s.next = ring{}, 0
	s.inbound = nil
	s.lower()
	slices.SortStableFunc(orphans, func(a, b orphan) int { return cmp.Compare(a.seq, b.seq) })
	return orphans
}

// ring is a queue of entries, ascending by sequence number, that grows as
// needed and gives memory back when it is empty.
type ring struct {
	buf  []*entry
	head int
	n    int
}

func (r *ring) len() int        { return r.n }
func (r *ring) at(i int) *entry { return r.buf[(r.head+i)&(len(r.buf)-1)] }

func (r *ring) push(e *entry) {
	if r.n == len(r.buf) {
		buf := make([]*entry, max(8, 2*len(r.buf)))
		for i := range r.n {
			buf[i] = r.at(i)
		}
		r.buf, r.head = buf, 0
	}
	r.buf[(r.head+r.n)&(len(r.buf)-1)] = e
	r.n++
}

func (r *ring) popFront() {
	r.buf[r.head] = nil
	r.head = (r.head + 1) & (len(r.buf) - 1)
	r.n--
	if r.n == 0 && len(r.buf) > 1024 {
		r.buf, r.head = nil, 0
	}
}

// remove takes out the entry at i, at the cost of moving those before it.
func (r *ring) remove(i int) {
	for ; i > 0; i-- {
		r.buf[(r.head+i)&(len(r.buf)-1)] = r.at(i - 1)
	}
	r.popFront()
}

// search returns the index of the first entry whose sequence number is seq or
// above.
func (r *ring) search(seq uint64) int {
	lo, hi := 0, r.n
	for lo < hi {
		mid := (lo + hi) / 2
		if r.at(mid).seq < seq {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}
