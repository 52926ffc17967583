package broker

import (
	"slices"
	"sync/atomic"

	"penstock/storage"
)

// route is one session that a topic's messages go to. Overlapping
// subscriptions of a session are one route: it gets one copy, at their highest
// QoS and with all their identifiers (3.3.4).
type route struct {
	s     *session
	qos   byte   // highest QoS of the subscriptions
	keep  bool   // Retain As Published
	share string // key of the share group, where it is by one
	ids   []uint32
	local []*subscription // all of them, where any has No Local; else nil
}

// routes is what a topic's messages meet. It is immutable, and valid as long
// as the plane's generation is the same.
type routes struct {
	gen    uint64
	direct []route
	shared []*shareGroup
}

// reason returns the reason code of an acknowledgement: MQTT 5 has one for
// messages that nobody has subscribed to (3.4.2.1).
func (r *routes) reason(m *storage.Message, version byte) byte {
	if version == 5 && !m.Retain && len(r.direct) == 0 && len(r.shared) == 0 {
		return reasonNoSubscribers
	}
	return reasonSuccess
}

// routesFor returns the routes of a topic.
func (p *plane) routesFor(topic string) *routes {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.routesLocked(topic)
}

// routesLocked is routesFor with p.mu held.
func (p *plane) routesLocked(topic string) *routes {
	r := &routes{gen: p.gen.Load()}
	acl := p.acl.Load()
	at := make(map[*session]int)
	p.subs.match(topic, func(sub *subscription) {
		if sub.group != nil {
			r.shared = append(r.shared, sub.group)
			return
		}
		s := sub.session
		i, ok := at[s]
		if !ok {
			if acl.receive && !acl.allows(s.principal(), actionReceive, topic) {
				return
			}
			i = len(r.direct)
			at[s] = i
			r.direct = append(r.direct, route{s: s})
		}
		d := &r.direct[i]
		d.local = append(d.local, sub)
		d.merge(sub)
	})
	for i := range r.direct {
		if !slices.ContainsFunc(r.direct[i].local, (*subscription).noLocal) {
			r.direct[i].local = nil
		}
	}
	return r
}

func (d *route) merge(sub *subscription) {
	d.qos = max(d.qos, sub.options&3)
	d.keep = d.keep || sub.options&8 != 0
	if sub.identifier != 0 {
		d.ids = append(d.ids, sub.identifier)
	}
}

// withoutLocal returns the route as it is for the session's own messages.
func (d *route) withoutLocal() (route, bool) {
	out, any := route{s: d.s}, false
	for _, sub := range d.local {
		if !sub.noLocal() {
			out.merge(sub)
			any = true
		}
	}
	return out, any
}

// receipt is how one received PUBLISH is acknowledged: what must be safe is
// gathered in its ticket, what must be stored in its publication. The ticket
// is made when the first thing has to be waited for.
type receipt struct {
	acks *ackQueue // nil: nobody waits
	kind byte
	id   uint16
	t    *ticket
	pub  *storage.Publication

	promised bool // it was taken over before: whoever gets it now must not drop it for being new
}

func (r *receipt) ticket() *ticket {
	if r.t == nil && r.acks != nil {
		r.t = r.acks.issue(r.kind, r.id, 0)
	}
	return r.t
}

func (r *receipt) publication(m *storage.Message) *storage.Publication {
	if r.pub == nil {
		r.pub = &storage.Publication{Message: m}
	}
	return r.pub
}

// ticketDone tells a ticket that the journal has committed what it owed.
type ticketDone struct {
	t *ticket
	p *plane
}

func (d ticketDone) Committed() { d.t.release(d.p.told()) }

// accept takes a PUBLISH of QoS 1 or 2 over from a client. m is only borrowed.
// Its PUBACK or PUBREC leaves when every persistent session that shall get the
// message has it safely, and the retained store where it is concerned. An error
// is to end the connection: the message was not taken over.
func (p *plane) accept(from *session, acks *ackQueue, rt *routes, m *storage.Message, id uint16, b *batch) error {
	if limit := p.refuses(rt, m); limit != noLimit {
		return p.refuse(from, acks, m, id, limit, b)
	}
	r := receipt{acks: acks, kind: typePuback, id: id}
	if fault(faultAckEarly) {
		r.acks = &ackQueue{}
	}
	if m.QoS == 2 {
		r.kind = typePubrec
		in := from.receive(id, acks, b)
		if in == nil {
			return nil // the message was taken over before
		}
		t := r.ticket()
		t.reason = rt.reason(m, from.version)
		t.then = in.secured
		if from.id != 0 {
			m = clone(m)
			t.owe()
			pub := r.publication(m)
			pub.Inbound = storage.Inbound{Session: from.id, PacketID: id}
			if fault(faultSplitInbound) {
				row := pub.Inbound
				p.journal.Change(func(tx storage.Tx) error { return tx.PutInbound(row) }, ticketDone{t, p})
				_ = p.journal.Commit() // what a commit does that falls between the two
				r.pub = nil
			} else {
				pub.Done = ticketDone{t, p}
			}
		}
	}
	p.route(from, rt, m, b, &r)
	if r.pub != nil {
		p.journal.Publish(r.pub)
		if size := m.Size(); r.t != nil && size >= worthHolding {
			acks.hold(r.t, size)
		}
	}
	switch {
	case r.t == nil:
		acks.send(r.kind, id, rt.reason(m, from.version), b)
	case fault(faultAckEarly):
		r.t.release(b)
		acks.send(r.kind, id, 0, b)
	default:
		r.t.release(b)
	}
	return nil
}

// worthHolding is from which size on a message is counted that waits for its
// acknowledgement; smaller ones are bounded well enough by their number.
const worthHolding = 1 << 10

// publish routes a message that no client sent. m is owned by the plane from
// here on. done, where set, is called when the message is safe.
func (p *plane) publish(from *session, m *storage.Message, b *batch, done func()) {
	p.publishAs(receipt{}, from, m, b, done)
}

// publishAs is publish with a receipt begun.
func (p *plane) publishAs(r receipt, from *session, m *storage.Message, b *batch, done func()) {
	if done != nil {
		r.acks = &ackQueue{}
		t := r.ticket()
		t.then = func(*batch) { done() }
	}
	p.route(from, p.routesFor(m.Topic), m, b, &r)
	if r.pub != nil {
		p.journal.Publish(r.pub)
	}
	if r.t != nil {
		r.t.release(b)
	}
}

// clone returns a message of its own memory.
func clone(m *storage.Message) *storage.Message {
	c := *m
	// Two steps that the compiler makes one of, without clearing the memory
	// first: it is a good part of the cost of a large message.
	c.Payload = make([]byte, len(m.Payload))
	copy(c.Payload, m.Payload)
	if len(m.Properties) > 0 {
		c.Properties = make([]byte, len(m.Properties))
		copy(c.Properties, m.Properties)
	}
	return &c
}

// route gives a message to everybody who shall have it. m is borrowed, and
// cloned where it must be kept.
func (p *plane) route(from *session, rt *routes, m *storage.Message, b *batch, r *receipt) {
	kept := r.pub != nil // then m is a clone already
	if m.Retain {
		if !kept {
			m, kept = clone(m), true
		}
		rt = p.retain(m, rt, r)
	}
	for i := range rt.direct {
		d := &rt.direct[i]
		if d.local != nil && d.s == from {
			own, any := d.withoutLocal()
			if !any {
				continue
			}
			d = &own
		}
		m, kept, _ = p.deliver(d, m, kept, b, r)
	}
	for _, g := range rt.shared {
		m, kept, _ = p.deliverShared(g, m, kept, b, r)
	}
}

// deliver gives a message to one session. It returns the message to go on
// with, which is a clone once one was needed, and false if the session has
// ended.
func (p *plane) deliver(d *route, m *storage.Message, kept bool, b *batch, r *receipt) (*storage.Message, bool, bool) {
	s := d.s
	qos := min(d.qos, m.QoS)
	retain := d.keep && m.Retain
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return m, kept, false
	}
	if qos == 0 {
		switch {
		case s.link == nil: // QoS 0 is not kept for who is away
		case m.Expires != 0 && p.expired(m, p.now()):
			s.drop(dropExpired, 1)
		case s.qos0 > 0: // must not overtake what waits
			if s.qos0 >= maxQoS0Behind || s.full(m.Size()) {
				s.drop(dropQoS0, 1)
				break
			}
			if !kept {
				m, kept = clone(m), true
			}
			s.enqueue(m, 0, retain, d.ids, b)
		case !s.link.roomQoS0():
			s.drop(dropQoS0, 1)
		default:
			if s.link.sendPublish(m, 0, false, retain, 0, d.ids, b) == outTooLarge {
				s.drop(dropTooLarge, 1)
			}
		}
		return m, kept, true
	}
	if !r.promised && s.dropsNewest(m.Size()) {
		return m, kept, true
	}
	if !kept {
		m, kept = clone(m), true
	}
	e := s.enqueue(m, qos, retain, d.ids, b)
	e.share = d.share
	if s.id != 0 {
		if t := r.ticket(); t != nil {
			t.owe()
			e.ticket = t
		}
		pub := r.publication(m)
		pub.Claims = append(pub.Claims, e)
	}
	s.pump(b)
	return m, kept, true
}

// maxQoS0Behind bounds how many live QoS 0 messages wait behind retained ones
// that a slow client has not taken yet.
const maxQoS0Behind = 10000

// Causes of deliveries not made.
const (
	dropQoS0 = iota
	dropQueueFull
	dropTooLarge
	dropExpired
	dropSessionEnded
	dropACL
	dropDamaged
	dropTooOld
	dropStoreFull
	dropKinds
)

// dropCauses names the causes, for people and metrics.
var dropCauses = [dropKinds]string{"qos0-slow-reader", "queue-full", "packet-too-large", "expired", "session-ended", "not-authorized", "damaged", "queue-age", "store-full"}

// counters are the plane's statistics.
type counters struct {
	messagesIn, messagesOut   [3]atomic.Uint64
	bytesIn, bytesOut         [3]atomic.Uint64
	dropped                   [dropKinds]atomic.Uint64
	queueMessages, queueBytes atomic.Int64 // of these, the next are on the disk only
	spilledMessages           atomic.Int64
	spilledBytes              atomic.Int64
	held                      atomic.Int64                   // size of messages whose publishers wait for an acknowledgement
	alarms                    [len(alarmLevels)]atomic.Int64 // sessions whose queue has reached the level
	connections               atomic.Int64
	connectionsTotal          atomic.Uint64
	limited                   [limitKinds]atomic.Uint64
	sockets, connects         atomic.Uint64
	sessionsExpired           atomic.Uint64
	packetsIn, packetsOut     atomic.Uint64
	networkIn, networkOut     atomic.Uint64
	payloadIn, payloadOut     atomic.Uint64
}

func (c *counters) drop(cause int)            { c.dropMany(cause, 1) }
func (c *counters) dropMany(cause, count int) { c.dropped[cause].Add(uint64(count)) }
