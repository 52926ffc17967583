package broker

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/internal/units"
	"penstock/storage"
	"penstock/storage/storagetest"
)

// rig is a data plane over a store in memory, driven by hand.
type rig struct {
	t     *testing.T
	cfg   Config
	store *storagetest.Memory
	p     *plane
	b     batch
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	r := &rig{t: t, cfg: DefaultConfig(), store: &storagetest.Memory{}}
	for _, f := range change {
		f(&r.cfg)
	}
	r.boot()
	return r
}

// boot starts a broker on what the store remembers, as after a power cut.
func (r *rig) boot() {
	r.t.Helper()
	log := slog.New(slog.DiscardHandler)
	r.p = newPlane(&r.cfg, storage.NewJournal(r.store, storage.Config{}, log), log)
	r.p.background = func(f func()) { f() }
	r.p.pause = func(time.Duration) { _ = r.p.journal.Commit() } // whoever waits for one looks again
	if err := r.p.restore(); err != nil {
		r.t.Fatal(err)
	}
}

// load reads what sessions ask for from the store.
func (r *rig) load() {
	r.t.Helper()
	for s := r.p.loads.pop(); s != nil; s = r.p.loads.pop() {
		if err := r.p.loadSome(s, &r.b); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) commit() {
	r.t.Helper()
	if err := r.p.journal.Commit(); err != nil {
		r.t.Fatal(err)
	}
	r.load()
}

// party is a client of a rig: it notes what it is sent.
type party struct {
	r          *rig
	s          *session
	acks       ackQueue
	deliveries []string
	answers    []string
	full       bool
}

func (l *party) room() bool        { return !l.full }
func (l *party) roomQoS0() bool    { return true }
func (l *party) flush()            {}
func (l *party) farewell() leaving { return leaving{} }

func (l *party) takeOver(byte) <-chan struct{} {
	done := make(chan struct{})
	close(done)
	return done
}

func (l *party) sendPublish(m *storage.Message, qos byte, dup, retain bool, id uint16, _ []uint32, _ *batch) outcome {
	l.deliveries = append(l.deliveries, fmt.Sprintf("%.20s id%d qos%d dup %v", m.Payload, id, qos, dup))
	return outSent
}

func (l *party) sendAck(kind byte, id uint16, _ byte, _ []byte, _ *batch) {
	l.answers = append(l.answers, fmt.Sprintf("%d:%d", kind, id))
}

// connect connects a client with a session of 1,000 s.
func (r *rig) connect(id string, window int) *party {
	r.t.Helper()
	l := &party{r: r}
	l.s = r.p.open(l, opening{clientID: id, version: 4, expiry: 1000, window: window}, &r.b).s
	r.commit()
	l.acks.link = l
	l.s.attach(l, &l.acks, &r.b)
	r.load()
	return l
}

func (l *party) subscribe(qos byte, filters ...string) {
	var f []filterRequest
	for _, filter := range filters {
		f = append(f, filterRequest{filter: filter, options: qos})
	}
	l.r.p.subscribe(l.s, &l.acks, 1, 0, f, &l.r.b)
}

func (l *party) publish(m storage.Message, id uint16) {
	if m.QoS == 0 {
		var rc receipt
		l.r.p.route(l.s, l.r.p.routesFor(m.Topic), &m, &l.r.b, &rc)
		return
	}
	l.r.p.accept(l.s, &l.acks, l.r.p.routesFor(m.Topic), &m, id, &l.r.b)
}

// The deletion of a retained message that is on its way to the disk is not
// acknowledged to anybody before it is there.
func TestRetainedDeletionIsDurable(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	c.publish(storage.Message{Topic: "r", Payload: []byte("x"), QoS: 1, Retain: true}, 1)
	r.commit()
	c.publish(storage.Message{Topic: "r", QoS: 1, Retain: true}, 2)
	again := r.connect2(c, "c")
	again.publish(storage.Message{Topic: "r", QoS: 1, Retain: true}, 2)
	acked := slices.Contains(again.answers, "4:2")
	r.boot()
	if acked && r.p.Retained("r") != nil {
		t.Error("the deletion was acknowledged, and the message is back after a cut")
	}
}

// connect2 is connect after the last connection broke, without a commit.
func (r *rig) connect2(last *party, id string) *party {
	r.p.leave(last.s, last, leaving{}, &r.b)
	l := &party{r: r}
	l.s = r.p.open(l, opening{clientID: id, version: 4, expiry: 1000, window: 10}, &r.b).s
	l.acks.link = l
	l.s.attach(l, &l.acks, &r.b)
	return l
}

// A QoS 2 delivery whose PUBREL was sent is not published again, though more
// cuts come and it lies behind deliveries that the last window did not reach.
func TestReleasedStaysReleased(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Window = 3 })
	c := r.connect("c", 3)
	c.subscribe(2, "t")
	r.commit()
	send := func(payload string, qos byte) {
		c.publish(storage.Message{Topic: "t", Payload: []byte(payload), QoS: qos}, uint16(100+len(c.deliveries)))
		r.commit()
	}
	send("m0", 1) // never acknowledged
	for i := range uint64(3) {
		send(fmt.Sprintf("m%d", 1+i), 1)
		c.s.puback(c.s.packetID(1+i), &r.b)
	}
	send("m4", 1)
	send("m5", 2)
	c.s.pubrec(c.s.packetID(5), 0, &r.b)
	r.commit()

	r.boot()
	c = r.connect("c", 1)
	r.p.journal.MarkProgress(c.s.id, nil)
	r.commit()

	r.boot()
	c = r.connect("c", 3)
	for _, d := range c.deliveries {
		if strings.HasPrefix(d, "m5") {
			t.Errorf("published again: %s", d)
		}
		if !strings.HasSuffix(d, "dup true") {
			t.Errorf("sent before, and now without DUP: %s", d)
		}
	}
	if !slices.Contains(c.answers, fmt.Sprintf("%d:%d", typePubrel, c.s.packetID(5))) {
		t.Errorf("no PUBREL for m5 among %v", c.answers)
	}
}

// A session whose client is about to take or leave it is not ended, and a sweep does
// not wait for that.
func TestSweepLeavesBusySessions(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	r.p.leave(c.s, c, leaving{}, &r.b)
	c.s.away.since = r.p.now() - 1001e3
	unlock := r.p.lockID("c")
	r.p.sweep(time.Now(), &r.b)
	if r.p.session("c") == nil {
		t.Error("the session was ended although its client was at it")
	}
	unlock()
	if r.p.sweep(time.Now(), &r.b); r.p.session("c") != nil {
		t.Error("the session has not expired")
	}
}

// A sweep does not wait for a busy session, with the lock that every CONNECT
// needs.
func TestSweepWaitsForNobody(t *testing.T) {
	r := newRig(t)
	s := r.connect("busy", 10).s
	s.mu.Lock()
	defer s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		var b batch
		r.p.sweep(time.Now(), &b)
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the sweep waits")
	}
}

// Deliveries that are finished behind a stuck one do not hold their payload.
func TestFinishedHoldsNoPayload(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	c.subscribe(1, "t")
	r.commit()
	for i := range uint64(100) {
		c.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 1}, uint16(1+i))
		if i > 0 {
			c.s.puback(c.s.packetID(i), &r.b)
		}
	}
	for i := 1; i < c.s.queue.len(); i++ {
		if e := c.s.queue.at(i); e.state != finished || e.msg != nil {
			t.Fatalf("delivery %d: state %d, message %v; want it finished and without", i, e.state, e.msg)
		}
	}
}

// One SUBSCRIBE with a filter many times queues the retained messages once,
// and they never take the place of what was acknowledged.
func TestSubscribeBomb(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 150 })
	for i := range 100 {
		r.p.publish(nil, &storage.Message{Topic: fmt.Sprintf("r/%d", i), Payload: []byte("r"), Retain: true, QoS: 1}, &r.b, nil)
	}
	c := r.connect("c", 1)
	c.subscribe(1, slices.Repeat([]string{"r/#"}, 50)...)
	if c.s.live != 100 {
		t.Errorf("%d messages queued, want each of 100 once", c.s.live)
	}
	c.subscribe(1, "r/#", "r/+", "+/#")
	if c.s.live != 150 || r.p.dropped[dropQueueFull].Load() == 0 {
		t.Errorf("%d messages queued and %d dropped, want the bound of 150 and the rest counted", c.s.live, r.p.dropped[dropQueueFull].Load())
	}
	if seq := c.s.queue.at(0).seq; seq != 0 {
		t.Errorf("delivery %d is the first in the queue, want the first one queued", seq)
	}
}

// QoS 0 does not take the place of QoS 1.
func TestQoS0DisplacesNothing(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 5 })
	r.p.publish(nil, &storage.Message{Topic: "t/r", Payload: []byte("r"), Retain: true}, &r.b, nil)
	c := r.connect("c", 1)
	c.full = true
	c.subscribe(1, "t/#")
	for i := range uint16(4) {
		c.publish(storage.Message{Topic: "t/1", Payload: []byte("x"), QoS: 1}, 1+i)
	}
	for range 4 {
		c.publish(storage.Message{Topic: "t/0", Payload: []byte("x")}, 0)
	}
	n := 0
	for i := range c.s.queue.len() {
		if e := c.s.queue.at(i); e.qos == 1 && e.state != finished {
			n++
		}
	}
	if n != 4 || r.p.dropped[dropQoS0].Load() == 0 {
		t.Errorf("%d of 4 QoS 1 messages are left, %d of QoS 0 counted as dropped", n, r.p.dropped[dropQoS0].Load())
	}
}

// At the bound the oldest goes, also where one is in flight, and nothing is
// left of it in memory.
func TestDropOldest(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 10 })
	c := r.connect("c", 2)
	c.subscribe(1, "t")
	r.commit()
	for i := range uint16(1000) {
		c.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, 1+i)
	}
	if got := r.p.dropped[dropQueueFull].Load(); got != 990 || c.s.live != 10 || c.s.queue.len() != 10 {
		t.Errorf("%d dropped, %d live, %d in the queue; want 990, 10, 10", got, c.s.live, c.s.queue.len())
	}
	for i, want := range []string{"m0", "m1", "m992"} {
		if got := string(c.s.queue.at(i).msg.Payload); got != want {
			t.Errorf("place %d: got %s, want %s", i, got, want)
		}
	}
}

// A client that takes nothing is not read when its acknowledgements pile up,
// and gets them all when it reads again.
func TestUnreadAcknowledgementsAreBounded(t *testing.T) {
	s := start(t, t.TempDir())
	c, _ := s.connect(connectOptions{id: "c", clean: true})
	k := s.b.connections()[0]
	for _, err := range []error{c.c.(*net.TCPConn).SetReadBuffer(64 << 10), k.sock.(*net.TCPConn).SetWriteBuffer(64 << 10)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	const n = 700_000 // of four bytes each
	one := c.publishPacket("a", "x", 1, 0, 1)
	part := slices.Repeat(one, 10000)
	wrote := make(chan error, 1)
	go func() {
		for range n / 10000 {
			if _, err := c.c.Write(part); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- nil
	}()
	eventually(t, "the client is not read any more", func() bool {
		k.outMu.Lock()
		defer k.outMu.Unlock()
		if size := len(k.out) + k.inWrite; size > 4*int(s.b.cfg.MaxOutput) {
			t.Fatalf("%d bytes of output pile up", size)
		}
		return k.crowded
	})
	if got, err := io.CopyN(io.Discard, c.c, 4*n); err != nil {
		t.Fatalf("after %d bytes of acknowledgements: %v", got, err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
}

// Only a DISCONNECT with reason 0 discards the will [MQTT-3.14.4-3].
func TestDisconnectWithErrorPublishesWill(t *testing.T) {
	s := start(t, t.TempDir())
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(1, "will/#")
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true, will: &storage.Message{Topic: "will/c", Payload: []byte("gone"), QoS: 1}})
	c.send([]byte{typeDisconnect << 4, 1, 0x80})
	if d := sub.take(); d.payload != "gone" {
		t.Errorf("got %q, want the will", d.payload)
	}
}

// A stop keeps the wills of clients that did not say goodbye; the next start
// publishes them unless they are back.
func TestStopKeepsWills(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	w := func(name string) *storage.Message {
		return &storage.Message{Topic: "will/" + name, Payload: []byte(name), QoS: 1}
	}
	sub, _ := s.connect(connectOptions{id: "sub"})
	sub.subscribe(1, "will/#")
	s.connect(connectOptions{id: "back", clean: true, will: w("back")})
	s.connect(connectOptions{id: "away", clean: true, will: w("away")})
	s.stop()
	s = start(t, dir, func(c *Config, _ *storage.Config) { c.WillGrace = units.Duration(3 * time.Second) })
	s.connect(connectOptions{id: "back", clean: true, will: w("back")})
	sub, _ = s.connect(connectOptions{id: "sub"})
	if d := sub.take(); d.payload != "away" {
		t.Errorf("got the will of %q, want that of away alone", d.payload)
	}
	sub.ping()
	if len(sub.stash) > 0 {
		t.Errorf("one more delivery: % x", sub.stash[0])
	}
}

// What is expired or of QoS 0 does not pile up behind a stuck delivery.
func TestNothingPilesUpBehindStuck(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 150 })
	for i := range 100 {
		r.p.publish(nil, &storage.Message{Topic: fmt.Sprintf("r/%d", i), Payload: []byte("r"), Retain: true}, &r.b, nil)
	}
	c := r.connect("c", 1)
	c.subscribe(1, "t")
	now := int64(1000)
	r.p.now = func() int64 { return now }
	c.publish(storage.Message{Topic: "t", Payload: []byte("stuck"), QoS: 1}, 1)
	for i := range 5000 {
		c.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 1, Expires: now + 1}, uint16(2+i))
		now += 10
		if i%100 == 0 {
			r.commit()
			c.subscribe(0, "r/#")
		}
	}
	c.s.puback(c.s.packetID(c.s.queue.at(0).seq), &r.b)
	p, _ := c.s.progress()
	if n := c.s.queue.len(); n > 160 || len(p.Finished) > 160 {
		t.Errorf("%d in the queue, %d finished numbers to store, want few more than the bound of 150", n, len(p.Finished))
	}
}

// After a failed commit the broker is ready again when nobody waits any more.
func TestReadyAfterElision(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	c.subscribe(1, "t")
	r.commit()
	b := &Broker{cfg: r.cfg, plane: r.p, journal: r.p.journal}
	c.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 1}, 1)
	r.store.Fails = func() bool { return true }
	if err := r.p.journal.Commit(); err == nil {
		t.Fatal("the commit did not fail")
	}
	if h := b.Health(); h.Ready || !h.Degraded {
		t.Errorf("while commits fail: %+v", h)
	}
	r.store.Fails = nil
	c.s.puback(c.s.packetID(0), &r.b)
	r.commit()
	if h := b.Health(); !h.Ready {
		t.Errorf("when nothing is owed: %+v", h)
	}
}

// One retained message that does not fit does not hide those that do.
func TestLargeRetainedHidesNothing(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueBytes = 1 << 10 })
	for i := range 20 {
		r.p.publish(nil, &storage.Message{Topic: fmt.Sprintf("r/%d", i), Payload: []byte("r"), Retain: true}, &r.b, nil)
	}
	r.p.publish(nil, &storage.Message{Topic: "r/big", Payload: make([]byte, 1015), Retain: true}, &r.b, nil)
	for i := range 20 {
		before := r.p.dropped[dropQueueFull].Load()
		c := r.connect(fmt.Sprint("c", i), 10)
		c.subscribe(0, "r/#")
		if n := len(c.deliveries) + int(r.p.dropped[dropQueueFull].Load()-before); n != 21 || len(c.deliveries) < 20 {
			t.Errorf("%d of 21 delivered, %d delivered or counted", len(c.deliveries), n)
		}
	}
}

// A packet identifier is not used again before the store knows that its last
// delivery is finished: after a cut that delivery would come back with it.
func TestIdentifierWaitsForTheStore(t *testing.T) {
	r := newRig(t)
	r.p.ids, r.p.block = 16, 1000
	c := r.connect("c", 10)
	c.subscribe(2, "t")
	r.commit()
	c.publish(storage.Message{Topic: "t", Payload: []byte("first"), QoS: 2}, 1)
	r.commit()
	c.s.pubrec(1, 0, &r.b)
	r.commit()
	c.s.pubcomp(1, &r.b) // finished, and only memory knows
	for i := range uint64(20) {
		c.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, uint16(2+i))
		c.s.puback(c.s.packetID(1+i), &r.b)
	}
	if got := len(c.deliveries); got != 1+15 {
		t.Errorf("%d deliveries while identifier 1 is taken in the store, want the first and 15", got)
	}
	r.commit()
	for i := range uint64(20) {
		c.s.puback(c.s.packetID(1+i), &r.b)
	}
	if got := len(c.deliveries); got != 1+20 {
		t.Errorf("%d deliveries in the end, want 21: %v", got, c.deliveries)
	}
	if last := c.deliveries[16]; last != "m15 id1 qos1 dup false" {
		t.Errorf("the first delivery with identifier 1 again is %q", last)
	}
}

// When the session of a share group's member ends, the others get what it had
// not finished, also over a power cut; but nothing of QoS 2 that it was sent
// once.
func TestSharedRedistribution(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut %v", cut), func(t *testing.T) {
			r := newRig(t, func(c *Config) { c.Window = 2 })
			pub := r.connect("pub", 10)
			a, b := r.connect("a", 2), r.connect("b", 10)
			a.subscribe(2, "$share/g/t/#")
			b.subscribe(2, "$share/g/t/#")
			a.subscribe(1, "own")
			r.commit()
			r.p.leave(b.s, b, leaving{}, &r.b)
			for i := range 4 {
				pub.publish(storage.Message{Topic: "t/1", Payload: fmt.Appendf(nil, "one%d", i), QoS: 1}, uint16(1+i))
			}
			pub.publish(storage.Message{Topic: "own", Payload: []byte("own"), QoS: 1}, 9)
			r.commit()
			equal(t, "a, in flight", a.deliveries, []string{"one0 id1 qos1 dup false", "one1 id2 qos1 dup false"})
			a.s.puback(1, &r.b)
			a.s.puback(2, &r.b)
			a.s.puback(3, &r.b)
			a.deliveries = nil
			pub.publish(storage.Message{Topic: "t/2", Payload: []byte("two0"), QoS: 2}, 20)
			a.s.puback(4, &r.b) // own is in flight now, and then two0
			r.commit()
			pub.publish(storage.Message{Topic: "t/2", Payload: []byte("two1"), QoS: 2}, 21)
			r.commit()
			equal(t, "a, then", a.deliveries, []string{"two0 id6 qos2 dup false"})
			if cut {
				r.boot()
				pub = r.connect("pub", 10)
			}
			// a has own and two0 in flight, and two1 behind them.
			pub.publish(storage.Message{Topic: "t/1", Payload: []byte("late"), QoS: 1}, 30)
			r.commit()
			before := r.p.counters.dropped[dropSessionEnded].Load()
			gone := r.p.open(&party{r: r}, opening{clientID: "a", version: 4, cleanStart: true, window: 2}, &r.b).s
			if gone == nil {
				t.Fatal("no session")
			}
			if n := r.p.counters.dropped[dropSessionEnded].Load() - before; n != 2 {
				t.Errorf("%d deliveries dropped, want own and two0", n)
			}
			r.commit()
			r.boot()
			b = r.connect("b", 10)
			r.commit()
			got := slices.Clone(b.deliveries)
			slices.Sort(got)
			for i := range got {
				got[i], _, _ = strings.Cut(got[i], " ")
			}
			equal(t, "b has", got, []string{"late", "two1"})
		})
	}
}

// A publisher's acknowledgement waits for the member that takes a message
// over from a session that has ended before it was safe.
func TestAdoptedIsSafeBeforeAck(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	a, b := r.connect("a", 10), r.connect("b", 10)
	a.subscribe(1, "$share/g/t")
	b.subscribe(1, "$share/g/t")
	r.commit()
	r.p.leave(b.s, b, leaving{}, &r.b)
	r.p.leave(a.s, a, leaving{}, &r.b)
	pub.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 1}, 7)
	had := a.s
	if had.waiting() == 0 {
		had = b.s
	}
	r.p.end(had, &r.b)
	if slices.Contains(pub.answers, "4:7") {
		t.Fatal("acknowledged before anybody had it safely")
	}
	r.commit()
	if !slices.Contains(pub.answers, "4:7") {
		t.Error("not acknowledged though it is safe")
	}
	r.boot()
	n := 0
	for _, s := range r.p.sessions {
		n += s.waiting()
	}
	if n != 1 {
		t.Errorf("%d deliveries after a cut, want 1", n)
	}
}
