package broker

import (
	"bytes"
	"strings"
	"sync/atomic"
	"time"

	"penstock/storage"
)

// retainedTree is the retained messages by topic. It counts the broker's own,
// and the size of them all.
type retainedTree struct {
	topicTree[*storage.Message]
	bytes    int64 // topics, payloads and properties, but for the next
	own      int   // messages below $SYS
	ownBytes int64
	cost     atomic.Int64 // what max_retained bounds; changed with the plane's lock held
}

// levelCost is what the index takes for a level of a retained topic that no
// other topic has, bytes.
const levelCost = 100

// retainedCost is what a retained message takes in memory, bytes.
func retainedCost(topic string, size int) int64 {
	return int64(size + levelCost*(1+strings.Count(topic, "/")))
}

// put replaces the message of a topic.
func (t *retainedTree) put(topic string, m *storage.Message) (old *storage.Message, replaced bool) {
	old, replaced = t.topicTree.put(topic, m)
	t.add(topic, m, 1)
	if replaced {
		t.add(topic, old, -1)
	}
	return old, replaced
}

func (t *retainedTree) delete(topic string) (old *storage.Message, ok bool) {
	if old, ok = t.topicTree.delete(topic); ok {
		t.add(topic, old, -1)
	}
	return old, ok
}

func (t *retainedTree) add(topic string, m *storage.Message, sign int) {
	size := int64(sign * m.Size())
	if inMemory(topic) {
		t.own += sign
		t.ownBytes += size
	} else {
		t.bytes += size
		t.cost.Add(int64(sign) * retainedCost(topic, m.Size()))
	}
}

// retain makes m the retained message of its topic, or removes it when the
// payload is empty [MQTT-3.3.1-6], and returns the routes as they are at that
// moment, which may be rt: a subscription made before it sees the message live,
// one made after it sees it retained, none sees both or neither.
func (p *plane) retain(m *storage.Message, rt *routes, r *receipt) *routes {
	p.mu.Lock()
	defer p.mu.Unlock()
	changed := true
	if len(m.Payload) == 0 {
		// Of QoS 1 and 2 also where there is none: its deletion may be on its
		// way to the disk, and must be there before this is acknowledged.
		_, had := p.retained.delete(m.Topic)
		changed = had || m.QoS > 0
	} else {
		old, replaced := p.retained.put(m.Topic, m)
		changed = !replaced || m.QoS > 0 || old.QoS != m.QoS || old.Expires != m.Expires || !bytes.Equal(old.Payload, m.Payload) || !bytes.Equal(old.Properties, m.Properties)
	}
	switch {
	case !changed, inMemory(m.Topic):
	case m.QoS == 0:
		p.journal.MarkRetained(m.Topic)
	default:
		pub := r.publication(m)
		pub.Retain = true
		if t := r.ticket(); t != nil && pub.Done == nil {
			t.owe()
			pub.Done = ticketDone{t, p}
		}
	}
	if rt.gen == p.gen.Load() {
		return rt
	}
	return p.routesLocked(m.Topic)
}

// fullFor reports whether the retained store has no room for a message. One
// that takes the place of another that is no smaller is always taken.
func (p *plane) fullFor(m *storage.Message) bool {
	if !m.Retain || len(m.Payload) == 0 {
		return false
	}
	room := int64(p.cfg.MaxRetained) - p.retained.cost.Load()
	if retainedCost(m.Topic, m.Size()) <= room {
		return false
	}
	old := p.Retained(m.Topic)
	return old == nil || int64(m.Size()-old.Size()) > max(0, room)
}

// purgeEvery is how often retained messages that have expired are removed while
// there is little room for others. Before that they stay: nobody is harmed by
// them, and to look at all of them takes time.
const purgeEvery = time.Minute

// purgeRetained removes retained messages that have expired. They are delivered
// to nobody [MQTT-3.3.2-5], but take room.
func (p *plane) purgeRetained() {
	now := p.now()
	var gone []string
	p.mu.RLock()
	p.retained.match("#", func(topic string, m *storage.Message) bool {
		if p.expired(m, now) {
			gone = append(gone, topic)
		}
		return true
	})
	p.mu.RUnlock()
	for _, topic := range gone {
		p.mu.Lock()
		m, _ := p.retained.get(topic)
		expired := m != nil && p.expired(m, now)
		if expired {
			p.retained.delete(topic)
		}
		p.mu.Unlock()
		if expired {
			p.journal.MarkRetained(topic)
		}
	}
}

// retainedMatch is a retained message and the new subscription that matches.
type retainedMatch struct {
	m   *storage.Message
	sub *subscription
}

// queueRetained queues the retained messages that new subscriptions match. It
// returns what must be stored of them. s.mu is held.
func (p *plane) queueRetained(s *session, found []retainedMatch, b *batch) (pubs []*storage.Publication) {
	misses := 0
	for _, f := range found {
		m, sub := f.m, f.sub
		if s.full(m.Size()) {
			s.pump(b) // the client may be there to take some
		}
		if s.full(m.Size()) { // they do not displace what was acknowledged
			s.raise(len(alarmLevels))
			s.drop(dropQueueFull, 1)
			misses++
			if misses >= maxMisses || s.live >= p.cfg.MaxQueueMessages {
				break
			}
			continue
		}
		var ids []uint32
		if sub.identifier != 0 {
			ids = []uint32{sub.identifier}
		}
		qos := min(m.QoS, sub.options&3)
		e := s.enqueue(m, qos, true, ids, b)
		if s.id != 0 && qos > 0 {
			pubs = append(pubs, &storage.Publication{Message: m, Claims: []storage.Claim{e}})
		}
	}
	return pubs
}

// maxMisses is how many retained messages may not fit into the queue before
// the rest is left alone: one large one must not hide the small ones, and a
// full queue must not be looked at for each of a hundred thousand.
const maxMisses = 1000
