package main

import (
	"context"
	"fmt"
)

// killLongQueue is a queue so long that only the disk has most of it. It is for
// two clients that sleep until all of it is there, and drain it while the broker
// is killed; then it grows again.
type killLongQueue struct {
	run      *killRun
	size     int
	from     *killPublisher
	sleepers []*killSubscriber
	awake    bool
	drained  int // how often
	during   int // rounds that began with a part of it drained
	longest  uint64
}

func newKillLongQueue(r *killRun, size int) *killLongQueue {
	q := &killLongQueue{run: r, size: size}
	q.from = &killPublisher{
		killClient: killClient{run: r, id: "long", version: 4},
		window:     800, left: size, used: make(map[uint16]bool), room: make(chan struct{}, 1),
	}
	r.stream(q.from, "q/1", 1, false)
	r.stream(q.from, "q/1", 2, false)
	r.stream(q.from, "q/2", 2, false)
	r.publishers = append(r.publishers, q.from)
	return q
}

// subscribe makes the sessions, which others than the long publisher write to as
// well, behind and between what it has sent. It reports whether it could.
func (q *killLongQueue) subscribe(ctx context.Context) bool {
	for _, s := range []struct {
		id           string
		version, qos byte
		receiveMax   uint16
		filters      []string
	}{
		{"long1", 4, 1, 0, []string{"q/#"}},
		{"long2", 5, 2, 300, []string{"q/#", "b/2", "s/1"}},
	} {
		sub, err := q.run.subscriber(ctx, s.id, s.version, s.qos, s.receiveMax, s.filters...)
		if err != nil {
			q.run.violated("subscriber %s: %v", s.id, err)
			return false
		}
		q.sleepers = append(q.sleepers, sub)
	}
	return true
}

// turn wakes the sleepers when the queue is as long as it gets, and puts them to
// sleep when it is drained.
func (q *killLongQueue) turn(ctx context.Context) {
	q.from.mu.Lock()
	full := q.from.left == 0
	q.from.mu.Unlock()
	if !full {
		return
	}
	var waits uint64
	for _, s := range q.sleepers {
		waits = max(waits, s.waiting(q.from))
	}
	switch {
	case q.awake && waits > 0:
		q.during++
	case !q.awake:
		q.awake, q.longest = true, max(q.longest, waits)
		for _, s := range q.sleepers {
			s.start(ctx)
		}
	default:
		q.awake = false
		q.drained++
		for _, s := range q.sleepers {
			s.stop()
		}
		q.from.mu.Lock()
		q.from.left = q.size
		q.from.mu.Unlock()
		q.from.wake()
	}
}

func (q *killLongQueue) report() string {
	return fmt.Sprintf("queues of up to %d messages, drained %d times, over %d rounds", q.longest, q.drained, q.during)
}

// waiting returns how much of a publisher's has not come yet.
func (s *killSubscriber) waiting(from *killPublisher) (n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st, seen := range s.seen {
		if st.from == from {
			n += st.sent.Load() - max(seen.max, seen.base)
		}
	}
	return n
}
