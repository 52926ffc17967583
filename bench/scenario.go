package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A scenario is something that each broker does in turn, each time in a new
// process with an empty data directory.
type scenario struct {
	name  string // for -scenario
	group string // name of the group of the report that it belongs to
	title string // its row in the table of the group
	line  string // its line in the plots of the group, after the broker's name
	x     float64
	// persistent is for brokers that must be told to keep sessions on disk.
	persistent bool
	tls        bool // needs a TLS listener
	// deep is for brokers that must be told to queue a million messages.
	deep bool
	// commitDelay, if not empty, is Penstock's storage.commit_delay, and fsync how
	// much longer than it does each fsync of its takes. What has one of them is
	// not for other brokers.
	commitDelay string
	fsync       time.Duration
	// timeout, if not 0, is for a round that takes longer than others.
	timeout time.Duration
	run     func(ctx context.Context, t target, l load) ([]phase, error)
}

// A target is a running broker: where it listens and which process it is.
type target struct {
	addr    string
	tlsAddr string // empty if it has no such listener
	pid     int
	dir     string // its data directory
}

// A load is how much a round does.
type load struct {
	time     time.Duration // publishing time of a round
	messages uint64        // messages of a round, which then ends by number; 0 is by time
	clients  int           // idle clients; 0 is as many as the scenario wants
	short    bool          // a tenth of the messages, of a scenario that counts them
	settle   time.Duration // how long memory is left to settle before it is read
}

// number returns how many messages a round has, of a scenario that wants so many.
func (l load) number(wanted uint64) uint64 {
	switch {
	case l.messages > 0:
		return l.messages
	case l.short:
		return wanted / 10
	}
	return wanted
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
	// values are what else was found, by name. A phase that counts nothing
	// has nothing but these.
	values map[string]float64
}

// String is the phase as a line of progress.
func (p phase) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-5s", p.name)
	if p.count > 0 {
		fmt.Fprintf(&b, " %8.0f/s  %7.3f CPU s/million  %6.1f bytes/message  generator %.2f of %.2f s",
			float64(p.count)/p.elapsed.Seconds(), p.cpu.Seconds()/float64(p.count)*1e6, float64(p.written)/float64(p.messages),
			p.generator.Seconds(), p.elapsed.Seconds())
	}
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		fmt.Fprintf(&b, "  %s %.0f", name, p.values[name])
	}
	return b.String()
}

// A sample is one round of one broker.
type sample struct {
	phases  []phase
	peak    uint64 // most resident memory since the start of the process, bytes
	scrapes int    // times that the metrics were read meanwhile
}

// A workload is messages between publishers and subscribers.
type workload struct {
	version     byte // v311 or v5
	qos         byte
	publishers  int
	subscribers int
	topic       string // with the publisher's number in the place of %d, or the topic's
	topics      int    // if not 0, each publisher uses so many topics in turn
	filters     func(subscriber int) []string
	narrow      bool   // each subscriber gets one topic: that of its number
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
	stalledMessages = 400_000   // 48 MB with their topics
	unread          = 256 << 10 // most bytes of payloads that a broker is to keep for a subscriber of QoS 0, roughly
	lineTopic       = "plant/line%d/state"
)

// each is a filter for each subscriber, with its number in the place of %d.
func each(filter string) func(int) []string {
	return func(subscriber int) []string { return []string{numbered(filter, subscriber)} }
}

func pairs(version, qos byte, payload int) workload {
	return workload{
		version: version, qos: qos, publishers: 4, subscribers: 4, topic: lineTopic, filters: each(lineTopic),
		payload: payload, window: window, lead: uint64(min(2000, max(4, unread/payload))),
	}
}

func persistentPairs() workload {
	w := pairs(v311, 1, payloadBytes)
	w.persistent = true
	return w
}

func fanIn(version, qos byte) workload {
	return workload{
		version: version, qos: qos, publishers: 20, subscribers: 1, topic: lineTopic, filters: each("plant/+/state"),
		payload: payloadBytes, window: 64, lead: 200,
	}
}

// fanOut has a lead that keeps what is under way to many subscribers together
// within what a broker delivers in a second or so.
func fanOut(version, qos byte, subscribers int) workload {
	return workload{
		version: version, qos: qos, publishers: 1, subscribers: subscribers, topic: lineTopic, filters: each("plant/line0/state"),
		payload: payloadBytes, window: window, lead: uint64(min(2000, 100_000/subscribers)),
	}
}

// manyTopics has one subscriber of all topics, by their names.
func manyTopics(topics int) workload {
	names := make([]string, topics)
	for i := range names {
		names[i] = numbered(lineTopic, i)
	}
	return workload{
		version: v311, publishers: 1, subscribers: 1, topic: lineTopic, topics: topics,
		filters: func(int) []string { return names }, payload: payloadBytes, lead: 2000,
	}
}

const wildcardSubscribers = 1000

// narrowFilters are such that each matches one topic, plant/line%d/cell/state.
var narrowFilters = []string{"plant/line%d/#", "plant/line%d/+/state", "+/line%d/cell/#", "+/line%d/+/+"}

// wideFilters all match plant/line0/cell/state; beside them each subscriber
// has a filter of its own that matches nothing here.
var wideFilters = []string{"plant/#", "plant/+/cell/state", "+/line0/#", "+/+/+/state", "#", "plant/line0/+/+", "+/+/cell/#", "plant/line0/cell/state/#"}

func wildcards(narrow bool) workload {
	w := workload{
		version: v311, publishers: 1, subscribers: wildcardSubscribers, topic: "plant/line%d/cell/state",
		payload: payloadBytes,
	}
	if narrow {
		w.topics, w.narrow, w.lead = wildcardSubscribers, true, 10_000
		w.filters = func(i int) []string { return []string{numbered(narrowFilters[i%len(narrowFilters)], i)} }
		return w
	}
	w.lead = 100
	w.filters = func(i int) []string {
		return []string{wideFilters[i%len(wideFilters)], numbered("office/+/desk%d/#", i)}
	}
	return w
}

// scenarios returns all of them in the order of the report.
func scenarios() []scenario {
	var list []scenario
	add := func(group, name, title string, run func(context.Context, target, load) ([]phase, error)) *scenario {
		list = append(list, scenario{name: name, group: group, title: title, run: run})
		return &list[len(list)-1]
	}
	for qos := range byte(3) {
		add("pairs", fmt.Sprintf("qos%d-pairs", qos), fmt.Sprintf("QoS %d", qos), pairs(v311, qos, payloadBytes).run)
	}
	for qos := range byte(3) {
		add("pairs", fmt.Sprintf("qos%d-pairs-v5", qos), fmt.Sprintf("QoS %d, MQTT 5", qos), pairs(v5, qos, payloadBytes).run)
	}
	for _, subscribers := range []int{50, 1000} {
		for qos := range byte(3) {
			add("fan-out", fmt.Sprintf("qos%d-fan-out-%d", qos, subscribers), fmt.Sprintf("QoS %d, 1 to %s", qos, thousands(subscribers)),
				fanOut(v311, qos, subscribers).run)
		}
	}
	for qos := range byte(3) {
		add("fan-out", fmt.Sprintf("qos%d-fan-out-50-v5", qos), fmt.Sprintf("QoS %d, 1 to 50, MQTT 5", qos), fanOut(v5, qos, 50).run)
	}
	for qos := range byte(3) {
		add("fan-in", fmt.Sprintf("qos%d-fan-in", qos), fmt.Sprintf("QoS %d, 20 to 1", qos), fanIn(v311, qos).run)
	}
	for qos := range byte(3) {
		add("fan-in", fmt.Sprintf("qos%d-fan-in-v5", qos), fmt.Sprintf("QoS %d, 20 to 1, MQTT 5", qos), fanIn(v5, qos).run)
	}
	for qos := range byte(2) {
		for _, payload := range []int{16, 100, 1 << 10, 16 << 10, 64 << 10} {
			s := add("payload", fmt.Sprintf("qos%d-payload-%d", qos, payload), fmt.Sprintf("QoS %d, %s", qos, sizeName(payload)),
				pairs(v311, qos, payload).run)
			s.line, s.x = fmt.Sprintf("QoS %d", qos), float64(payload)
		}
	}
	for _, topics := range []int{1, 10, 100, 1000, 5000} {
		s := add("topics", fmt.Sprintf("topics-%d", topics), thousands(topics), manyTopics(topics).run)
		s.x = float64(topics)
	}
	add("wildcards", "wildcards-narrow", "each message to 1 of 1,000", wildcards(true).run)
	add("wildcards", "wildcards-wide", "each message to all 1,000", wildcards(false).run)
	for qos := range byte(2) {
		for _, rate := range []int{500, 5000, 20_000} {
			s := add("latency", fmt.Sprintf("qos%d-latency-%d", qos, rate), fmt.Sprintf("QoS %d, %s a second", qos, thousands(rate)),
				latency{qos: qos, pairs: 10, rate: rate}.run)
			s.line, s.x = fmt.Sprintf("QoS %d", qos), float64(rate)
		}
	}
	add("connects", "connects", "connections", runConnects)
	s := add("idle", "idle", "10,000 clients", idle{clients: 10_000}.run)
	s.timeout = idleTimeout
	s = add("idle", "idle-tls", "1,000 clients with TLS", idle{clients: 1000, tls: true}.run)
	s.timeout, s.tls = idleTimeout, true
	add("retained", "retained", "10,000 messages, 20 subscribers", runRetained).timeout = idleTimeout
	add("durable", "qos1-persistent-pairs", "QoS 1, 4 pairs", persistentPairs().run).persistent = true
	add("durable", "offline", "offline, 1,000 in flight", offline(offlineMessages, offlineWindow)).persistent = true
	add("durable", "offline-100", "offline, 100 in flight", offline(offlineMessages/5, window)).persistent = true
	addDurable(add)
	add("stalled", "stalled-reader", "QoS 1, 1 pair", runStalled)
	return list
}

func offline(messages uint64, inflight int) func(context.Context, target, load) ([]phase, error) {
	return func(ctx context.Context, t target, l load) ([]phase, error) {
		return runOffline(ctx, t, l.number(messages), inflight)
	}
}

// thousands writes a number with commas.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// sizeName writes a number of bytes.
func sizeName(n int) string {
	if n >= 1<<10 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
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
	p, err := b.start(ctx, dir, setup{persistent: s.persistent, tls: s.tls, deep: s.deep, commitDelay: s.commitDelay, fsync: s.fsync})
	if err != nil {
		return sample{}, err
	}
	defer p.stop()

	ctx, cancel := context.WithTimeout(ctx, max(timeout, s.timeout))
	defer cancel()
	unwatch := func() error { return nil }
	if b.watch != nil {
		if unwatch, err = b.watch(p.pid()); err != nil {
			return sample{}, err
		}
	}
	scraping, stopScraping := context.WithCancel(ctx)
	scrapes := make(chan int, 1)
	go func() { scrapes <- p.scrape(scraping) }()

	phases, err := s.run(ctx, p.target(), l)
	stopScraping()
	r := sample{phases: phases, scrapes: <-scrapes}
	err = errors.Join(err, unwatch())
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

	mu    sync.Mutex
	first error
}

func newCrew(ctx context.Context) *crew {
	c := &crew{}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

func (c *crew) run(what string, number int, f func() error) {
	c.wg.Go(func() {
		if err := f(); err != nil {
			err = fmt.Errorf("%s %d: %w", what, number, err)
			c.mu.Lock()
			c.first = cmp.Or(c.first, err)
			c.mu.Unlock()
			c.cancel(err)
		}
	})
}

// err returns the first error of a goroutine, which knows more than ctx, or
// why ctx ended.
func (c *crew) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.first, context.Cause(c.ctx))
}

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
		publishers[i] = newPublisher(i, w)
	}
	subscribers := make([]*subscriber, w.subscribers)
	defer closeAll(publishers, subscribers)
	defer g.cancel(nil)
	room := readBytes
	if w.subscribers > 100 {
		room = smallBytes
	}
	var err error
	for i := range subscribers {
		s := newSubscriber(w, i, publishers)
		subscribers[i] = s
		if s.c, err = join(g.ctx, t.addr, w.version, room, fmt.Sprintf("bench-subscriber-%d", i), !w.persistent); err != nil {
			return nil, err
		}
		if err = s.c.subscribe(w.qos, w.filters(i)...); err != nil {
			return nil, err
		}
	}
	for i, pub := range publishers {
		if pub.c, err = join(g.ctx, t.addr, w.version, readBytes, fmt.Sprintf("bench-publisher-%d", i), true); err != nil {
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
			n += s.due(pub.sent)
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
	w := fanOut(v311, 1, 1)
	w.lead = 2000
	alone, err := w.run(ctx, t, l)
	if err != nil {
		return nil, err
	}
	stalled, err := join(ctx, t.addr, v311, smallBytes, "bench-stalled", true)
	if err != nil {
		return nil, err
	}
	defer stalled.conn.Close()
	if err := stalled.subscribe(w.qos, w.filters(0)...); err != nil {
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
	w := fanOut(v311, 1, 1)
	w.window, w.lead, w.persistent = inflight, never/2, true
	g := newCrew(ctx)
	defer g.wg.Wait()
	pub := newPublisher(0, w)
	s := newSubscriber(w, 0, []*publisher{pub})
	defer closeAll([]*publisher{pub}, []*subscriber{s})
	defer g.cancel(nil)

	const id = "bench-subscriber-0"
	c, err := join(g.ctx, t.addr, v311, readBytes, id, false)
	if err != nil {
		return nil, err
	}
	if err = c.subscribe(w.qos, w.filters(0)...); err != nil {
		c.disconnect()
		return nil, err
	}
	if err := c.leave(); err != nil {
		return nil, err
	}

	if pub.c, err = join(g.ctx, t.addr, v311, readBytes, "bench-publisher-0", true); err != nil {
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
	queue.values = map[string]float64{fileSize: sizeOf(t.dir)}

	end, err = measure(t, "drain")
	if err != nil {
		return nil, err
	}
	if s.c, err = dial(g.ctx, t.addr, v311, readBytes); err != nil {
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
	drain.values = map[string]float64{fileSize: sizeOf(t.dir)}
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
func join(ctx context.Context, addr string, version byte, room int, id string, clean bool) (*client, error) {
	c, err := dial(ctx, addr, version, room)
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
