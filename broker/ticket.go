package broker

import (
	"sync"
	"sync/atomic"
)

// batch gathers the connections to which something was written, so that each
// is flushed once when a run of packets has been handled. It belongs to one
// goroutine.
type batch struct{ dirty []flusher }

type flusher interface{ flush() }

func (b *batch) add(f flusher) { b.dirty = append(b.dirty, f) }

// flush sends what has gathered.
func (b *batch) flush() {
	for i, f := range b.dirty {
		f.flush()
		b.dirty[i] = nil
	}
	b.dirty = b.dirty[:0]
}

// ticket is an acknowledgement that waits until what it says is true. It
// starts owing one thing to its maker, who adds what else must be safe and
// releases it when there is nothing more to add.
type ticket struct {
	queue  *ackQueue
	owed   atomic.Int32
	ready  bool // guarded by queue.mu
	kind   byte
	reason byte
	id     uint16
	held   int          // size of the message that is in memory for it; guarded by queue.mu
	codes  []byte       // reason codes of a SUBACK or UNSUBACK
	then   func(*batch) // called once when nothing is owed any more; may be nil
}

// owe adds one thing that must be safe before the ticket is honoured.
func (t *ticket) owe() { t.owed.Add(1) }

// release says that one thing owed is safe. It may be called by any goroutine
// holding any session's lock.
func (t *ticket) release(b *batch) {
	if t.owed.Add(-1) != 0 {
		return
	}
	if t.then != nil {
		t.then(b)
	}
	t.queue.honour(t, b)
}

// ackQueue sends the acknowledgements of one connection in the order of the
// packets that asked for them [MQTT-4.6.0-2]. Its lock is taken after a
// session's and before a connection's output lock.
type ackQueue struct {
	mu      sync.Mutex
	link    link // nil once the connection is gone
	waiting []*ticket
	head    int
	changed func(pending int) // told, with mu held, when some have left

	queued atomic.Int32  // tickets waiting
	unsaid atomic.Int32  // of these, PUBACKs
	open   atomic.Int32  // QoS 2 identifiers that this connection has in use
	held   atomic.Int64  // size of the messages that wait for their acknowledgement, bytes
	all    *atomic.Int64 // the same of all connections; nil: nobody counts
}

// hold counts the message that a ticket of the caller's is for.
func (q *ackQueue) hold(t *ticket, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.link != nil {
		t.held = size
		q.holds(size)
	}
}

// holds changes what is held by some bytes. q.mu is held.
func (q *ackQueue) holds(size int) {
	q.held.Add(int64(size))
	if q.all != nil {
		q.all.Add(int64(size))
	}
}

// issue appends a ticket that owes one thing to the caller.
func (q *ackQueue) issue(kind byte, id uint16, reason byte) *ticket {
	t := &ticket{queue: q, kind: kind, id: id, reason: reason}
	t.owed.Store(1)
	q.mu.Lock()
	if q.link != nil {
		q.push(t)
	}
	q.mu.Unlock()
	return t
}

// send acknowledges what needs no waiting, behind what waits already.
func (q *ackQueue) send(kind byte, id uint16, reason byte, b *batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.link == nil {
		return
	}
	if q.head == len(q.waiting) {
		q.link.sendAck(kind, id, reason, nil, b)
		return
	}
	q.push(&ticket{queue: q, kind: kind, id: id, reason: reason, ready: true})
}

func (q *ackQueue) push(t *ticket) {
	if q.head > 64 && q.head*2 > len(q.waiting) {
		n := copy(q.waiting, q.waiting[q.head:])
		clear(q.waiting[n:])
		q.waiting, q.head = q.waiting[:n], 0
	}
	q.waiting = append(q.waiting, t)
	q.queued.Add(1)
	if t.kind == typePuback {
		q.unsaid.Add(1)
	}
}

// honour marks t ready and sends every acknowledgement that now is at the
// head of the queue.
func (q *ackQueue) honour(t *ticket, b *batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	t.ready = true
	if q.link == nil {
		return
	}
	sent := false
	for q.head < len(q.waiting) && q.waiting[q.head].ready {
		t := q.waiting[q.head]
		q.waiting[q.head] = nil
		q.head++
		q.queued.Add(-1)
		if t.kind == typePuback {
			q.unsaid.Add(-1)
		}
		if t.held > 0 {
			q.holds(-t.held)
		}
		q.link.sendAck(t.kind, t.id, t.reason, t.codes, b)
		sent = true
	}
	if q.head == len(q.waiting) {
		q.waiting, q.head = q.waiting[:0], 0
	}
	if sent && q.changed != nil {
		q.changed(len(q.waiting) - q.head)
	}
}

// unacknowledged returns how many PUBLISH packets count against the Receive
// Maximum: those of QoS 1 up to their PUBACK, those of QoS 2 up to their
// PUBCOMP (4.9).
func (q *ackQueue) unacknowledged() int { return int(q.unsaid.Load() + q.open.Load()) }

// pending returns how many acknowledgements wait, of all kinds.
func (q *ackQueue) pending() int { return int(q.queued.Load()) }

// close forgets what waits: the connection is gone, and the client will ask
// again on the next one.
func (q *ackQueue) close() {
	q.mu.Lock()
	q.link, q.waiting, q.head = nil, nil, 0
	q.queued.Store(0)
	q.unsaid.Store(0)
	q.holds(-int(q.held.Load()))
	q.mu.Unlock()
}
