package broker

import (
	"strings"
	"sync"
	"time"

	"penstock/storage"
)

// subscription is one filter of one session, or one share group's place in the
// index. It is immutable; a change of options replaces it.
type subscription struct {
	session    *session
	group      *shareGroup // the group it belongs to, for a group's place in the index: the group itself
	filter     string      // as the client wrote it
	topic      string      // without $share/group/
	options    byte        // MQTT 5, 3.8.3.1
	identifier uint32
}

func (s *subscription) noLocal() bool { return s.options&4 != 0 }

// addSubscription puts a subscription into the index, in place of one with the
// same filter [MQTT-3.8.4-3], and returns that. p.mu is held.
func (p *plane) addSubscription(s *session, filter string, options byte, identifier uint32) (old *subscription) {
	old = s.subs[filter]
	if old != nil && old.group != nil {
		// In its place in the group: a publisher may be about to look for it
		// there [MQTT-3.8.4-4].
		sub := &subscription{session: s, group: old.group, filter: filter, topic: old.topic, options: options, identifier: identifier}
		s.subs[filter] = sub
		old.group.replace(old, sub)
		return old
	}
	if old != nil {
		p.removeSubscription(old)
	}
	weight := filterWeight(filter)
	s.weight += weight
	p.weight += weight
	sub := &subscription{session: s, filter: filter, topic: filter, options: options, identifier: identifier}
	if s.subs == nil {
		s.subs = make(map[string]*subscription)
	}
	s.subs[filter] = sub
	name, rest, shared, _ := splitShare(filter)
	if !shared {
		p.subs.add(filter, sub)
		return old
	}
	sub.topic = rest
	key := name + "/" + rest
	g := p.groups[key]
	if g == nil {
		g = &shareGroup{key: key}
		g.sub = &subscription{group: g, topic: rest}
		p.groups[key] = g
		p.subs.add(rest, g.sub)
	}
	sub.group = g
	g.mu.Lock()
	g.members = append(g.members, sub)
	g.mu.Unlock()
	return old
}

// removeSubscription takes a subscription out of the index. p.mu is held; the
// caller removes it from the session's map.
func (p *plane) removeSubscription(sub *subscription) {
	weight := filterWeight(sub.filter)
	sub.session.weight -= weight
	p.weight -= weight
	g := sub.group
	if g == nil {
		p.subs.remove(sub.topic, sub)
		return
	}
	if g.remove(sub) {
		delete(p.groups, g.key)
		p.subs.remove(g.sub.topic, g.sub)
	}
}

// subscribe handles a SUBSCRIBE. The SUBACK of a persistent session leaves
// when the subscriptions are durable. Retained messages are queued together
// with the subscription, so that no newer one can come before them.
func (p *plane) subscribe(s *session, acks *ackQueue, id uint16, identifier uint32, filters []filterRequest, b *batch) {
	a := addition{s: s, acks: acks, identifier: identifier, filters: filters, sent: make(map[string]bool), rowOf: make(map[string]int)}
	for len(a.codes) < len(filters) {
		if !p.addSome(&a, b) {
			break // the client has gone, and nobody awaits the rest
		}
	}
	for _, pub := range a.pubs {
		p.journal.Publish(pub)
	}
	t := acks.issue(typeSuback, id, 0)
	t.codes = a.codes
	if s.id != 0 && len(a.rows) > 0 {
		var done storage.Waiter
		if !fault(faultSubackEarly) {
			t.owe()
			done = ticketDone{t, p}
		}
		p.journal.Change(func(tx storage.Tx) error {
			for _, r := range a.rows {
				if err := tx.PutSubscription(r); err != nil {
					return err
				}
			}
			return nil
		}, done)
	}
	t.release(b)
	s.drained(b)
}

// addition is a SUBSCRIBE in the making.
type addition struct {
	s          *session
	acks       *ackQueue // of the connection that it came by
	identifier uint32
	filters    []filterRequest

	codes []byte                 // reason codes of those that are done
	rows  []storage.Subscription // what must be stored, each filter once
	rowOf map[string]int         // where in rows a filter is
	sent  map[string]bool        // filters whose retained messages are queued: once is enough
	pubs  []*storage.Publication // of retained messages
}

// turn is how long a SUBSCRIBE may keep others from the index. One of ten
// thousand filters, each of which looks at every retained message, takes
// minutes.
const turn = 2 * time.Millisecond

// addSome enters some more filters of a SUBSCRIBE, as many as a turn has time
// for but at least one. It returns false if the connection has lost its session.
func (p *plane) addSome(a *addition, b *batch) bool {
	s := a.s
	p.mu.Lock()
	unlock := sync.OnceFunc(p.mu.Unlock)
	defer unlock() // also when it panics: the others shall go on
	s.mu.Lock()
	ours := s.acks == a.acks
	most := p.cfg.MaxQueueMessages - s.live + maxMisses // what is beyond does not fit into the queue
	s.mu.Unlock()
	if !ours {
		return false
	}
	var found []retainedMatch
	acl, now := p.acl.Load(), p.now()
	for began := time.Now(); len(a.codes) < len(a.filters) && time.Since(began) < turn; {
		f := a.filters[len(a.codes)]
		reason := p.maySubscribe(s, f)
		if reason >= 0x80 {
			switch s.version {
			case 3:
				reason = f.options & 3 // MQTT 3.1 has no failure (3.9)
			case 4:
				reason = 0x80 // the only one that 3.1.1 has (3.9.3)
			}
			a.codes = append(a.codes, reason)
			continue
		}
		a.codes = append(a.codes, reason)
		old := p.addSubscription(s, f.filter, f.options, a.identifier)
		row := storage.Subscription{Session: s.id, Filter: f.filter, Options: f.options, Identifier: a.identifier}
		if i, twice := a.rowOf[f.filter]; twice {
			a.rows[i] = row
		} else {
			a.rowOf[f.filter] = len(a.rows)
			a.rows = append(a.rows, row)
		}
		handling := f.options >> 4 & 3
		sub := s.subs[f.filter]
		if sub.group == nil && !a.sent[f.filter] && len(found) < most && (handling == 0 || handling == 1 && old == nil) { // [MQTT-3.3.1-9] to [MQTT-3.3.1-11]
			a.sent[f.filter] = true
			p.retained.match(sub.topic, func(topic string, m *storage.Message) bool {
				if p.expired(m, now) || acl.receive && !acl.allows(s.who, actionReceive, topic) {
					return true
				}
				found = append(found, retainedMatch{m, sub})
				return len(found) < most
			})
		}
	}
	p.gen.Add(1)
	// From here on others can subscribe and publish. This session gets nothing
	// live before the retained messages are queued.
	s.mu.Lock()
	defer s.mu.Unlock()
	unlock()
	a.pubs = append(a.pubs, p.queueRetained(s, found, b)...)
	return true
}

// filterWeight is how many subscriptions a filter counts for: one for every 512
// bytes that it takes in memory, levels included, which one with wildcards may
// have visited for any message. A share group is looked at for each message.
func filterWeight(filter string) int {
	weight := 1 + (len(filter)+levelCost*strings.Count(filter, "/"))/512
	if strings.HasPrefix(filter, "$share/") {
		weight += 3
	}
	return weight
}

// maySubscribe checks one filter of a SUBSCRIBE and returns its reason code.
func (p *plane) maySubscribe(s *session, f filterRequest) byte {
	_, topic, _, ok := splitShare(f.filter)
	if !ok || !validFilter(topic, p.cfg.MaxTopicBytes, p.cfg.MaxTopicLevels) {
		if ok {
			p.limit(limitTopic)
		}
		return reasonFilterInvalid
	}
	weight := filterWeight(f.filter)
	if s.subs[f.filter] == nil && (s.weight+weight > p.cfg.MaxSubscriptions || p.weight+weight > p.cfg.MaxAllSubs) {
		p.limit(limitSubscriptions)
		return reasonQuota
	}
	if !p.acl.Load().allows(s.who, actionSubscribe, topic) {
		return reasonNotAuthorized
	}
	return f.options & 3
}

// unsubscribe handles an UNSUBSCRIBE.
func (p *plane) unsubscribe(s *session, acks *ackQueue, id uint16, filters []string, b *batch) {
	codes, gone := p.removeSubscriptions(s, filters)
	t := acks.issue(typeUnsuback, id, 0)
	t.codes = codes
	if s.id != 0 && len(gone) > 0 {
		t.owe()
		p.journal.Change(func(tx storage.Tx) error {
			for _, f := range gone {
				if err := tx.DeleteSubscription(s.id, f); err != nil {
					return err
				}
			}
			return nil
		}, ticketDone{t, p})
	}
	t.release(b)
}

// removeSubscriptions takes the filters of an UNSUBSCRIBE out. It returns a
// reason code for each, and which of them there were.
func (p *plane) removeSubscriptions(s *session, filters []string) (codes []byte, gone []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.gen.Add(1)
	codes = make([]byte, len(filters))
	for i, f := range filters {
		sub := s.subs[f]
		if sub == nil {
			codes[i] = reasonNoSubscription
			continue
		}
		p.removeSubscription(sub)
		delete(s.subs, f)
		gone = append(gone, f)
	}
	return codes, gone
}
