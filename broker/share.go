package broker

import (
	"cmp"
	"slices"
	"sync"

	"penstock/storage"
)

// shareGroup is the members of one shared subscription (4.8.2).
type shareGroup struct {
	key string // group and filter
	sub *subscription

	mu      sync.Mutex
	members []*subscription
	turn    int
}

// replace puts a member in the place of another.
func (g *shareGroup) replace(old, sub *subscription) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.members, old); i >= 0 {
		g.members[i] = sub
	}
}

// remove takes a member out. It reports whether the group is empty now.
func (g *shareGroup) remove(sub *subscription) (empty bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.members, sub); i >= 0 {
		g.members = slices.Delete(g.members, i, i+1)
	}
	return len(g.members) == 0
}

// pick returns the member whose turn it is to get a message: connected ones in
// turn, and where none is connected, one whose session keeps the message. One that
// has no room for it has its turn only if nobody else has any.
func (g *shareGroup) pick(p *plane, m *storage.Message) *subscription {
	g.mu.Lock()
	defer g.mu.Unlock()
	piles := p.space.Low() || p.storeFull.Load() // then what would stay in the store has no room
	var choice [4]*subscription                  // connected, away, and the same without room
	for range g.members {
		g.turn = (g.turn + 1) % len(g.members)
		sub := g.members[g.turn]
		s := sub.session
		s.mu.Lock()
		online, lasts, who := s.link != nil, s.id != 0, s.who
		full := m.QoS > 0 && (s.full(m.Size()) || piles && s.piles())
		s.mu.Unlock()
		if acl := p.acl.Load(); acl.receive && !acl.allows(who, actionReceive, m.Topic) {
			continue
		}
		i := 0
		switch {
		case online && !full:
			return sub
		case online:
			i = 2
		case !lasts:
			continue
		case full:
			i = 3
		default:
			i = 1
		}
		if choice[i] == nil {
			choice[i] = sub
		}
	}
	return cmp.Or(choice[1], choice[2], choice[3])
}

// orphan is a delivery that came by a shared subscription to a session that
// has ended, and that another member of the group shall have.
type orphan struct {
	seq    uint64 // what it was there
	client string // whose it was, with run
	run    run    // the whole of it, where only the disk has it; then what follows but one is empty
	tried  uint64 // what of run is below it may have been sent before a restart
	msg    *storage.Message
	share  string           // key of the group
	ticket *ticket          // owed to the publisher while it is not safe; nil after
	seg    *storage.Segment // has it, until the new member's claim is durable or not needed any more; nil if none has
	safe   func()           // told of that; nil: nobody is
}

// deliverShared gives a message to one member of a share group. It reports
// whether there was one.
func (p *plane) deliverShared(g *shareGroup, m *storage.Message, kept bool, b *batch, r *receipt) (*storage.Message, bool, bool) {
	for {
		sub := g.pick(p, m)
		if sub == nil {
			return m, kept, false
		}
		d := route{s: sub.session, share: g.key}
		d.merge(sub)
		ok := false
		if m, kept, ok = p.deliver(&d, m, kept, b, r); ok {
			return m, kept, true
		}
		// Its session has ended meanwhile, and it is about to leave the group
		// or has left it.
		g.remove(sub)
	}
}

// adopt gives a message of a session that has ended to another member of its
// share group.
func (p *plane) adopt(o orphan, b *batch) {
	r := receipt{t: o.ticket, promised: true}
	if fault(faultOrphanEarly) && o.seg != nil {
		o.seg.Release(1, o.msg.Size())
		o.seg = nil
	}
	if fault(faultOrphanEarly) || fault(faultCompactEarly) {
		_ = p.journal.Commit() // what a commit does that comes just now
	}
	given := false
	p.mu.RLock()
	g := p.groups[o.share]
	p.mu.RUnlock()
	if g != nil {
		_, _, given = p.deliverShared(g, o.msg, true, b, &r)
	}
	if !given {
		p.drop(dropSessionEnded)
	}
	done := func() {
		if o.seg != nil {
			o.seg.Release(1, o.msg.Size())
		}
		if o.safe != nil {
			o.safe()
		}
	}
	if r.pub != nil {
		// A deletion may overtake what waits for a commit, see Journal.takeDrops.
		if r.pub.Done = storage.WaiterFunc(done); fault(faultDropOvertakes) {
			r.pub.Done = nil
			done()
		}
		p.journal.Publish(r.pub)
	} else {
		done()
	}
	if o.ticket != nil {
		o.ticket.release(b) // what it owed to the session that has ended
	}
}

// shareKey returns the key of a share group, the group's own where there is
// one: many deliveries have it. p.mu is taken.
func (p *plane) shareKey(key string) string {
	if key == "" {
		return ""
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	if g := p.groups[key]; g != nil {
		return g.key
	}
	return key
}
