package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A scenario is something that each broker does in turn, each time in a new
// process with an empty data directory.
type scenario struct {
	name  string // for -scenario
	title string
	text  string // what happens, for the report
	// persistent is for brokers that must be told to keep sessions on disk.
	persistent bool
	run        func(ctx context.Context, t target, l load) ([]phase, error)
}

// A target is a running broker: where it listens and which process it is.
type target struct {
	addr string
	pid  int
}

// A load is how much a round does.
type load struct {
	time     time.Duration // publishing time of a round
	messages uint64        // messages of a round, which then ends by number; 0 is by time
}

// A phase is one measured interval of a round.
type phase struct {
	name     string // empty in scenarios of one phase
	unit     string // what count counts: "deliveries", or "messages" where none are delivered
	count    uint64
	messages uint64 // published, or waiting to be delivered: what bytes on disk are divided by
	elapsed  time.Duration
	cpu      time.Duration // of the broker
	// generator is what this program took meanwhile. It says how much of the
	// machine was left to the broker.
	generator time.Duration
	written   uint64
	wchar     uint64
}

// A sample is one round of one broker.
type sample struct {
	phases  []phase
	peak    uint64 // most resident memory since the start of the process, bytes
	scrapes int    // times that the metrics were read meanwhile
}

// A workload is messages between publishers and subscribers.
type workload struct {
	qos         byte
	publishers  int
	subscribers int
	topic       string // with the publisher's number in the place of %d
	filter      string // with the subscriber's number, if any
	payload     int    // bytes
	window      int    // messages in flight per publisher, QoS 1 and 2
	lead        uint64 // messages that a publisher may be ahead of each of its subscribers
	persistent  bool   // subscribers have persistent sessions
}

// feeds tells whether a subscriber gets a publisher's messages: each its own
// where they are pairs, else everyone's.
func (w workload) feeds(publisher, subscriber int) bool {
	return w.publishers != w.subscribers || publisher == subscriber
}

const (
	payloadBytes    = 100
	window          = 100
	offlineWindow   = 1000
	offlineMessages = 100_000
	stalledMessages = 400_000 // 48 MB with their topics
)

func pairs(qos byte, persistent bool) workload {
	return workload{
		qos: qos, publishers: 4, subscribers: 4, topic: "plant/line%d/state", filter: "plant/line%d/state",
		payload: payloadBytes, window: window, lead: 2000, persistent: persistent,
	}
}

// scenarios returns all of them in the order of the report.
func scenarios() []scenario {
	return []scenario{
		{
			name: "qos0-pairs", title: "QoS 0, 4 pairs",
			text: "4 publishers, each to a topic of its own with 1 subscriber.",
			run:  pairs(0, false).run,
		}, {
			name: "qos1-pairs", title: "QoS 1, 4 pairs",
			text: "4 publishers, each to a topic of its own with 1 subscriber; clean sessions, 100 messages in flight each.",
			run:  pairs(1, false).run,
		}, {
			name: "qos2-pairs", title: "QoS 2, 4 pairs",
			text: "4 publishers, each to a topic of its own with 1 subscriber; clean sessions, 100 messages in flight each.",
			run:  pairs(2, false).run,
		}, {
			name: "qos1-fan-out", title: "QoS 1, fan-out 1 to 50",
			text: "1 publisher with 100 messages in flight, 50 subscribers of its topic.",
			run: workload{
				qos: 1, publishers: 1, subscribers: 50, topic: "plant/line%d/state", filter: "plant/line0/state",
				payload: payloadBytes, window: window, lead: 2000,
			}.run,
		}, {
			name: "qos1-fan-in", title: "QoS 1, fan-in 20 to 1",
			text: "20 publishers, each to a topic of its own with 64 messages in flight, 1 subscriber of them all with a wildcard.",
			run: workload{
				qos: 1, publishers: 20, subscribers: 1, topic: "plant/line%d/state", filter: "plant/+/state",
				payload: payloadBytes, window: 64, lead: 200,
			}.run,
		}, {
			name: "qos1-persistent-pairs", title: "QoS 1, 4 pairs with persistent sessions",
			text: "As QoS 1 pairs, but the subscribers have persistent sessions. Penstock's acknowledgements are then " +
				"durable; Mosquitto's are not: with persistence on it writes its state every 30 minutes.",
			persistent: true,
			run:        pairs(1, true).run,
		}, {
			name: "stalled-reader", title: "QoS 1, 1 pair beside a reader that stops reading",
			text: "1 publisher with 100 messages in flight and 1 subscriber: first alone, then beside a second subscriber, with a clean " +
				"session, that never reads. The rate beside it is to be compared with the rate alone.",
			run: runStalled,
		}, {
			name: "offline", title: "QoS 1, queue for an offline session, then drain",
			text: "1 publisher with 1,000 messages in flight to 1 persistent session that is offline, which then comes back " +
				"and takes everything. Durable in Penstock, not in Mosquitto, which has persistence on and writes its state every 30 minutes.",
			persistent: true,
			run: func(ctx context.Context, t target, l load) ([]phase, error) {
				if l.messages == 0 {
					l.messages = offlineMessages
				}
				return runOffline(ctx, t, l.messages, offlineWindow)
			},
		}, {
			name: "offline-100", title: "QoS 1, queue with 100 in flight, then drain",
			text:       "As above with 100 messages in flight, which bounds the size of a group commit, and 20,000 messages.",
			persistent: true,
			run: func(ctx context.Context, t target, l load) ([]phase, error) {
				if l.messages == 0 {
					l.messages = offlineMessages / 5
				}
				return runOffline(ctx, t, l.messages, window)
			},
		},
	}
}

// runRound runs a scenario once on a broker.
func runRound(ctx context.Context, b *broker, s scenario, l load, timeout time.Duration) (sample, error) {
	dir, err := os.MkdirTemp("", "penstock-bench-")
	if err != nil {
		return sample{}, err
	}
	defer os.RemoveAll(dir)
	if b.seed != nil {
		if err := b.seed(ctx, dir); err != nil {
			return sample{}, err
		}
	}
	p, err := b.start(ctx, dir, s.persistent)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()

	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	scraping, stopScraping := context.WithCancel(ctx)
	scrapes := make(chan int, 1)
	go func() { scrapes <- p.scrape(scraping) }()

	phases, err := s.run(ctx, target{p.addr, p.pid()}, l)
	stopScraping()
	r := sample{phases: phases, scrapes: <-scrapes}
	if err != nil {
		if tail := p.output.tail(); tail != "" {
			err = fmt.Errorf("%w; the broker's last lines:\n%s", err, tail)
		}
		return r, fmt.Errorf("%s: %s: %w", b.name, s.name, err)
	}
	r.peak, err = memoryOf(p.pid(), "VmHWM")
	return r, err
}

// A crew runs the goroutines of a round; the first error ends them all.
type crew struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
}

func newCrew(ctx context.Context) *crew {
	c := &crew{}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

func (c *crew) run(what string, number int, f func() error) {
	c.wg.Go(func() {
		if err := f(); err != nil {
			c.cancel(fmt.Errorf("%s %d: %w", what, number, err))
		}
	})
}

// err returns the first error of a goroutine, or why ctx ended.
func (c *crew) err() error { return context.Cause(c.ctx) }

// settle is how long a broker's CPU and disk are still watched after the end of
// a phase: several times the longest that it may put off a commit.
const settle = 100 * time.Millisecond

// measure begins a phase; the function it returns ends it.
func measure(t target, name string) (func(count, messages uint64) (phase, error), error) {
	before, err := usageOf(t.pid)
	if err != nil {
		return nil, err
	}
	own, err := usageOf(os.Getpid())
	if err != nil {
		return nil, err
	}
	return func(count, messages uint64) (phase, error) {
		elapsed := time.Since(before.at)
		time.Sleep(settle)
		after, err := usageOf(t.pid)
		if err != nil {
			return phase{}, err
		}
		ownAfter, err := usageOf(os.Getpid())
		return phase{
			name: name, unit: "deliveries", count: count, messages: messages,
			elapsed: elapsed, cpu: after.cpu - before.cpu, generator: ownAfter.cpu - own.cpu,
			written: after.written - before.written, wchar: after.wchar - before.wchar,
		}, err
	}, nil
}

// run connects everyone, lets the publishers publish, and ends the measured
// interval when every subscriber has received everything and the broker has
// handled every acknowledgement.
func (w workload) run(ctx context.Context, t target, l load) ([]phase, error) {
	g := newCrew(ctx)
	defer g.wg.Wait()
	publishers := make([]*publisher, w.publishers)
	for i := range publishers {
		publishers[i] = newPublisher(i, numbered(w.topic, i), w)
	}
	subscribers := make([]*subscriber, w.subscribers)
	defer closeAll(publishers, subscribers)
	defer g.cancel(nil)
	var err error
	for i := range subscribers {
		s := newSubscriber(w, i, publishers)
		subscribers[i] = s
		if s.c, err = join(g.ctx, t.addr, fmt.Sprintf("bench-subscriber-%d", i), !w.persistent); err != nil {
			return nil, err
		}
		if err = s.c.subscribe(numbered(w.filter, i), w.qos); err != nil {
			return nil, err
		}
	}
	for i, pub := range publishers {
		if pub.c, err = join(g.ctx, t.addr, fmt.Sprintf("bench-publisher-%d", i), true); err != nil {
			return nil, err
		}
		if l.messages > 0 {
			pub.limit = l.messages / uint64(w.publishers)
		}
	}

	end, err := measure(t, "")
	if err != nil {
		return nil, err
	}
	for i, s := range subscribers {
		g.run("subscriber", i, s.run)
	}
	until := time.Now().Add(l.time)
	var publishing sync.WaitGroup
	for i, pub := range publishers {
		if l.messages == 0 {
			pub.until = until
		}
		publishing.Add(1)
		g.run("publisher", i, func() error {
			defer publishing.Done()
			return pub.run(g.ctx)
		})
	}
	// Connections fail at the deadline by themselves; on any other end of
	// the round they must be closed under their owners' feet.
	stop := context.AfterFunc(g.ctx, func() { closeAll(publishers, subscribers) })
	defer stop()
	publishing.Wait()
	if err := g.err(); err != nil {
		return nil, fmt.Errorf("%w%s", err, unfinished(publishers))
	}

	var messages, deliveries uint64
	for _, pub := range publishers {
		messages += pub.sent
	}
	for i, s := range subscribers {
		n := uint64(0)
		for _, pub := range s.sources {
			n += pub.sent
		}
		if err := s.finish(g.ctx, n); err != nil {
			return nil, fmt.Errorf("subscriber %d: %w", i, err)
		}
		deliveries += n
	}
	ph, err := end(deliveries, messages)
	if err != nil {
		return nil, err
	}
	if err := g.err(); err != nil {
		return nil, err
	}
	return []phase{ph}, nil
}

// unfinished says which publishers, which must have ended, wait for acknowledgements.
func unfinished(publishers []*publisher) string {
	var b strings.Builder
	for i, p := range publishers {
		if p.inflight > 0 {
			fmt.Fprintf(&b, "; publisher %d: %d of %d messages not acknowledged", i, p.inflight, p.sent)
		}
	}
	return b.String()
}

// runStalled runs one pair alone and then beside a subscriber of the same topic
// that never reads. What the broker queues for that one is within its bounds.
func runStalled(ctx context.Context, t target, l load) ([]phase, error) {
	if l.messages == 0 {
		l.messages = stalledMessages
	}
	w := workload{
		qos: 1, publishers: 1, subscribers: 1, topic: "plant/line%d/state", filter: "plant/line%d/state",
		payload: payloadBytes, window: window, lead: 2000,
	}
	alone, err := w.run(ctx, t, l)
	if err != nil {
		return nil, err
	}
	stalled, err := join(ctx, t.addr, "bench-stalled", true)
	if err != nil {
		return nil, err
	}
	defer stalled.conn.Close()
	if err := stalled.subscribe(numbered(w.filter, 0), w.qos); err != nil {
		return nil, err
	}
	beside, err := w.run(ctx, t, l)
	if err != nil {
		return nil, err
	}
	alone[0].name, beside[0].name = "alone", "beside it"
	return []phase{alone[0], beside[0]}, nil
}

// runOffline queues messages for one persistent session that is offline, and
// then lets it take them.
func runOffline(ctx context.Context, t target, messages uint64, inflight int) ([]phase, error) {
	w := workload{
		qos: 1, publishers: 1, subscribers: 1, topic: "plant/line%d/state", filter: "plant/line%d/state",
		payload: payloadBytes, window: inflight, lead: never / 2, persistent: true,
	}
	g := newCrew(ctx)
	defer g.wg.Wait()
	pub := newPublisher(0, numbered(w.topic, 0), w)
	s := newSubscriber(w, 0, []*publisher{pub})
	defer closeAll([]*publisher{pub}, []*subscriber{s})
	defer g.cancel(nil)

	const id = "bench-subscriber-0"
	c, err := join(g.ctx, t.addr, id, false)
	if err != nil {
		return nil, err
	}
	err = c.subscribe(numbered(w.filter, 0), w.qos)
	c.disconnect()
	if err != nil {
		return nil, err
	}

	if pub.c, err = join(g.ctx, t.addr, "bench-publisher-0", true); err != nil {
		return nil, err
	}
	pub.limit = messages
	end, err := measure(t, "queue")
	if err != nil {
		return nil, err
	}
	if err := pub.run(g.ctx); err != nil {
		return nil, fmt.Errorf("publisher: %w%s", err, unfinished([]*publisher{pub}))
	}
	queue, err := end(messages, messages)
	if err != nil {
		return nil, err
	}
	queue.unit = "messages"

	end, err = measure(t, "drain")
	if err != nil {
		return nil, err
	}
	if s.c, err = dial(g.ctx, t.addr); err != nil {
		return nil, err
	}
	present, err := s.c.connect(id, false)
	if err != nil {
		return nil, err
	}
	if !present {
		return nil, errors.New("the broker has lost the session")
	}
	g.run("subscriber", 0, s.run)
	stop := context.AfterFunc(g.ctx, func() { closeAll(nil, []*subscriber{s}) })
	defer stop()
	if err := s.finish(g.ctx, messages); err != nil {
		return nil, fmt.Errorf("subscriber: %w", err)
	}
	drain, err := end(messages, messages)
	if err != nil {
		return nil, err
	}
	return []phase{queue, drain, sum("both", queue, drain)}, g.err()
}

// sum is two phases as one, of which the second delivers.
func sum(name string, a, b phase) phase {
	return phase{
		name: name, unit: b.unit, count: b.count, messages: b.messages,
		elapsed: a.elapsed + b.elapsed, cpu: a.cpu + b.cpu, generator: a.generator + b.generator,
		written: a.written + b.written, wchar: a.wchar + b.wchar,
	}
}

// join connects a client.
func join(ctx context.Context, addr, id string, clean bool) (*client, error) {
	c, err := dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	if _, err := c.connect(id, clean); err != nil {
		_ = c.conn.Close()
		return nil, err
	}
	return c, nil
}

// numbered puts the number in the place of %d, if there is one.
func numbered(format string, number int) string {
	return strings.ReplaceAll(format, "%d", strconv.Itoa(number))
}

func closeAll(publishers []*publisher, subscribers []*subscriber) {
	for _, s := range subscribers {
		if s != nil && s.c != nil {
			s.ending.Store(true)
			s.c.disconnect()
		}
	}
	for _, p := range publishers {
		if p != nil && p.c != nil {
			p.c.disconnect()
		}
	}
}
