package broker

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/storage"
)

// taker is a client of a rig that acknowledges what it gets, when it is told to.
type taker struct {
	party
	got   []string // payloads
	todo  []func()
	twice map[uint16]bool // QoS 2 identifiers that are open
}

func (l *taker) takeOver(byte) <-chan struct{} { return l.party.takeOver(0) }

func (l *taker) sendPublish(m *storage.Message, qos byte, dup, retain bool, id uint16, _ []uint32, _ *batch) outcome {
	switch {
	case qos == 0:
		l.got = append(l.got, string(m.Payload))
	case qos == 1:
		l.got = append(l.got, string(m.Payload))
		l.todo = append(l.todo, func() { l.s.puback(id, &l.r.b) })
	default:
		if !l.twice[id] {
			l.got = append(l.got, string(m.Payload))
		}
		l.twice[id] = true
		l.todo = append(l.todo, func() { l.s.pubrec(id, 0, &l.r.b) })
	}
	return outSent
}

func (l *taker) sendAck(kind byte, id uint16, _ byte, _ []byte, _ *batch) {
	if kind == typePubrel {
		delete(l.twice, id)
		l.todo = append(l.todo, func() { l.s.pubcomp(id, &l.r.b) })
	}
}

// take connects a client that has a session.
func (r *rig) take(id string, window int) *taker {
	r.t.Helper()
	l := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
	l.s = r.p.open(l, opening{clientID: id, version: 4, expiry: 1000, window: window}, &r.b).s
	r.commit()
	l.acks.link = l
	l.s.attach(l, &l.acks, &r.b)
	return l
}

// step acknowledges what there is to acknowledge, and reports whether there was
// anything.
func (l *taker) step() bool {
	todo := l.todo
	l.todo = nil
	for _, f := range todo {
		f()
	}
	return len(todo) > 0
}

// drain takes all that there is.
func (l *taker) drain() {
	for idle := 0; idle < 3; idle++ {
		l.r.commit()
		if l.step() {
			idle = 0
		}
	}
}

// away makes a session whose client is not here.
func (r *rig) away(id, filter string, qos byte) *session {
	r.t.Helper()
	c := r.connect(id, 10)
	c.subscribe(qos, filter)
	r.commit()
	r.p.leave(c.s, c, leaving{}, &r.b)
	return c.s
}

// fill publishes messages m<from> to m<to-1>, and commits after each so many.
func (l *party) fill(from, to, each int, m storage.Message) {
	l.r.t.Helper()
	for i := from; i < to; i++ {
		m := m
		m.Payload = append(fmt.Appendf(nil, "m%d", i), m.Payload...)
		if m.QoS == 3 { // mixed
			m.QoS = byte(1 + i%2)
		}
		l.publish(m, uint16(1+i%60000))
		if m.QoS == 2 {
			l.s.pubrel(uint16(1+i%60000), &l.acks, &l.r.b)
		}
		if (i+1)%each == 0 {
			l.r.commit()
		}
		l.answers = nil
	}
	l.r.commit()
}

func (l *taker) wants(from, to int) {
	l.r.t.Helper()
	if len(l.got) != to-from {
		l.r.t.Errorf("got %d messages, want %d", len(l.got), to-from)
	}
	for i, p := range l.got {
		if got, want := strings.TrimRight(p, "x"), fmt.Sprintf("m%d", from+i); got != want {
			l.r.t.Fatalf("message %d is %s, want %s", i, got, want)
		}
	}
}

// empty checks that nothing is left of any queue, also in the store.
func (r *rig) empty() {
	r.t.Helper()
	for range 3 {
		r.commit()
	}
	p := r.p
	if p.queueMessages.Load() != 0 || p.queueBytes.Load() != 0 || p.spilledMessages.Load() != 0 || p.spilledBytes.Load() != 0 {
		r.t.Errorf("%d messages of %d bytes are counted, %d and %d on the disk only", p.queueMessages.Load(), p.queueBytes.Load(), p.spilledMessages.Load(), p.spilledBytes.Load())
	}
	if n := r.p.dropped[dropDamaged].Load(); n != 0 {
		r.t.Errorf("%d messages were missing on the disk", n)
	}
	if img, err := r.store.Load(); err != nil || len(img.Segments) != 0 {
		r.t.Errorf("%d segments are left, error %v", len(img.Segments), err)
	}
}

// A long queue has a window in memory, while it grows and while it is drained,
// and comes in order and once, also after a restart.
func TestLongQueueKeepsAWindow(t *testing.T) {
	const messages = 20000
	r := newRig(t)
	pub := r.connect("pub", 10)
	s := r.away("away", "t", 2)
	pub.fill(0, messages, 100, storage.Message{Topic: "t", QoS: 3})
	if s.queue.len() > 2*r.p.memory.away || len(s.spill.runs)-s.spill.head > messages/1000 || s.live != messages {
		t.Errorf("%d deliveries and %d runs in memory, %d in all", s.queue.len(), len(s.spill.runs)-s.spill.head, s.live)
	}
	r.boot()
	s = r.p.session("away")
	if s.queue.len() != 0 || s.live != messages || int(r.p.queueMessages.Load()) != messages {
		t.Errorf("after a restart: %d deliveries in memory, %d and %d counted", s.queue.len(), s.live, r.p.queueMessages.Load())
	}
	c := r.take("away", 20)
	most := 0
	for i := 0; len(c.got) < messages && i < messages; i++ {
		most = max(most, s.queue.len())
		c.step()
		r.commit()
	}
	if most > 2*r.p.memory.chunk {
		t.Errorf("%d deliveries were in memory at once", most)
	}
	c.drain()
	c.wants(0, messages)
	r.empty()
}

// Messages that come one by one make a segment each; they are merged, so that
// neither rows nor runs grow with them.
func TestSmallSegmentsAreMerged(t *testing.T) {
	messages := 10000
	if testing.Short() {
		messages = 2000
	}
	r := newRig(t)
	pub := r.connect("pub", 10)
	s := r.away("away", "t", 1)
	pub.fill(0, messages, 1, storage.Message{Topic: "t", QoS: 1})
	img, err := r.store.Load()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(s.spill.runs) - s.spill.head; len(img.Segments) > 2*64+messages/48 || n > len(img.Segments) {
		t.Errorf("%d segments and %d runs", len(img.Segments), n)
	}
	t.Logf("%d segments and %d runs", len(img.Segments), len(s.spill.runs)-s.spill.head)
	r.boot()
	c := r.take("away", 100)
	c.drain()
	c.wants(0, messages)
	r.empty()
}

// Of a queue that overflows the oldest goes, also while it is being read.
func TestDropOldestOfTheDisk(t *testing.T) {
	const bound = 1000
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = bound })
	pub := r.connect("pub", 10)
	s := r.away("away", "t", 1)
	pub.fill(0, bound+500, 50, storage.Message{Topic: "t", QoS: 1})
	if s.live != bound || r.p.dropped[dropQueueFull].Load() != 500 {
		t.Errorf("%d messages are left, %d dropped", s.live, r.p.dropped[dropQueueFull].Load())
	}
	c := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
	c.s = r.p.open(c, opening{clientID: "away", version: 4, expiry: 1000, window: 10}, &r.b).s
	c.acks.link = c
	s.attach(c, &c.acks, &r.b)
	part, err := r.p.readPart(r.p.loads.pop())
	if err != nil || part == nil {
		t.Fatalf("read %v, error %v", part, err)
	}
	for i := bound + 500; i < bound+530; i++ { // drops what was just read
		pub.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, uint16(1+i))
	}
	part.put(&r.b)
	c.drain()
	c.wants(530, bound+530)
	r.empty()
}

// What is left to the disk while a part of the queue is being read is not taken
// for missing when that has been read.
func TestUnloadWhileReading(t *testing.T) {
	r := newRig(t)
	r.p.memory = memory{online: 4, away: 0, chunk: 2, bytes: 1 << 20, budget: 1 << 20}
	pub, c := r.connect("pub", 10), r.take("c", 1)
	c.subscribe(1, "t")
	pub.fill(0, 10, 10, storage.Message{Topic: "t", QoS: 1})
	for r.p.loads.list == nil && c.step() {
	}
	part, err := r.p.readPart(r.p.loads.pop())
	if err != nil || part == nil {
		t.Fatalf("read %v, error %v", part, err)
	}
	r.p.leave(c.s, c, leaving{}, &r.b)
	if c.s.spill.first() >= part.first {
		t.Fatalf("nothing was left to the disk ahead of what is read: this tests nothing")
	}
	part.put(&r.b)
	if n := c.s.queue.len() - c.s.next; n != 0 {
		t.Errorf("%d deliveries are in memory, of a client that has left", n)
	}
	again := r.take("c", 1)
	again.got = append(c.got[:len(c.got)-1:len(c.got)-1], again.got...) // the last one was not acknowledged
	again.drain()
	again.wants(0, 10)
	r.empty()
}

// What was read for a client that has left meanwhile is given back.
func TestReadForNobodyIsGivenBack(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	s := r.away("away", "t", 1)
	pub.fill(0, 500, 500, storage.Message{Topic: "t", QoS: 1})
	c := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
	c.s = r.p.open(c, opening{clientID: "away", version: 4, expiry: 1000, window: 10}, &r.b).s
	c.acks.link = c
	s.attach(c, &c.acks, &r.b)
	part, err := r.p.readPart(r.p.loads.pop())
	if err != nil || part == nil {
		t.Fatalf("read %v, error %v", part, err)
	}
	r.p.leave(s, c, leaving{}, &r.b)
	part.put(&r.b)
	if n := s.queue.len(); n > r.p.memory.away {
		t.Errorf("%d deliveries are in memory", n)
	}
	c = r.take("away", 10)
	c.drain()
	c.wants(0, 500)
	r.empty()
}

// Large messages are read as few at a time as there is memory for.
func TestLargeMessagesAreReadOneByOne(t *testing.T) {
	const size = 1 << 20
	r := newRig(t)
	pub := r.connect("pub", 10)
	s := r.away("away", "t", 1)
	pub.fill(0, 30, 1, storage.Message{Topic: "t", QoS: 1, Payload: bytes.Repeat([]byte("x"), size)})
	if n := s.inMemory(); n > int64(r.p.memory.bytes) {
		t.Errorf("%d bytes are in memory, of a client that is away", n)
	}
	c := r.take("away", 1)
	most := int64(0)
	for i := 0; len(c.got) < 30 && i < 1000; i++ {
		most = max(most, s.inMemory())
		c.step()
		r.commit()
	}
	if most > 3*size {
		t.Errorf("%d bytes were in memory at once", most)
	}
	c.drain()
	c.wants(0, 30)
	r.empty()
}

// What a thousand sessions get alike is stored once, and does not fill the
// memory when all of them come back at once.
func TestFanOutIsDrainedInBounds(t *testing.T) {
	const sessions, messages, payload = 1000, 150, 100
	r := newRig(t)
	r.p.memory.budget = 2 << 20
	pub := r.connect("pub", 10)
	for i := range sessions {
		r.away(fmt.Sprintf("away%d", i), "t", 1)
	}
	pub.fill(0, messages, 50, storage.Message{Topic: "t", QoS: 1, Payload: bytes.Repeat([]byte("x"), payload)})
	img, err := r.store.Load()
	if err != nil {
		t.Fatal(err)
	}
	stored := 0
	for _, s := range img.Segments {
		stored += s.Size
	}
	if most := messages*(payload+40) + sessions*16*len(img.Segments); stored > most {
		t.Errorf("%d bytes are stored, want at most %d", stored, most)
	}
	inMemory := func() int64 {
		return r.p.queueBytes.Load() - r.p.spilledBytes.Load() + entryCost*(r.p.queueMessages.Load()-r.p.spilledMessages.Load())
	}
	if n := inMemory(); n > r.p.memory.budget {
		t.Errorf("%d bytes are in memory while all are away", n)
	}
	var all []*taker
	most := int64(0)
	for i := range sessions {
		l := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
		l.s = r.p.open(l, opening{clientID: fmt.Sprintf("away%d", i), version: 4, expiry: 1000, window: 10}, &r.b).s
		all = append(all, l)
	}
	r.commit()
	for _, l := range all {
		l.acks.link = l
		l.s.attach(l, &l.acks, &r.b)
	}
	for busy := true; busy; {
		r.commit()
		most = max(most, inMemory())
		busy = false
		for _, l := range all {
			if l.step() {
				busy = true
			}
		}
	}
	// Each session has what is in flight, and what was read last.
	if bound := r.p.memory.budget + sessions*(10+int64(r.p.memory.chunk/32+r.p.memory.chunk/16+2))*(payload+entryCost+8); most > bound {
		t.Errorf("%d bytes were in memory at once, want at most %d", most, bound)
	}
	t.Logf("%d bytes stored in %d segments, at most %d in memory", stored, len(img.Segments), most)
	for _, l := range all {
		l.wants(0, messages)
	}
	r.empty()
}

// What has expired on the disk is not sent.
func TestExpiredOnTheDisk(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	r.away("away", "t", 1)
	pub.fill(0, 600, 300, storage.Message{Topic: "t", QoS: 1, Expires: r.p.now() + 10e3})
	pub.fill(600, 900, 300, storage.Message{Topic: "t", QoS: 1})
	later := r.p.now() + 20e3
	r.p.now = func() int64 { return later }
	c := r.take("away", 10)
	c.drain()
	c.wants(600, 900)
	if n := r.p.dropped[dropExpired].Load(); n != 600 {
		t.Errorf("%d are counted as expired, want 600", n)
	}
	r.empty()
}

// A session that ends leaves nothing on the disk, also one that is being read.
func TestEndOfSessionOnTheDisk(t *testing.T) {
	for _, how := range []string{"clean start", "expiry"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t)
			pub := r.connect("pub", 10)
			s := r.away("away", "t", 2)
			pub.fill(0, 1000, 10, storage.Message{Topic: "t", QoS: 3})
			var part *part
			switch how {
			case "clean start":
				c := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
				r.p.open(c, opening{clientID: "away", version: 4, expiry: 1000, window: 10}, &r.b)
				c.s, c.acks.link = s, c
				s.attach(c, &c.acks, &r.b)
				var err error
				if part, err = r.p.readPart(r.p.loads.pop()); err != nil || part == nil {
					t.Fatalf("read %v, error %v", part, err)
				}
				l := &taker{party: party{r: r}, twice: make(map[uint16]bool)}
				r.p.open(l, opening{clientID: "away", version: 4, expiry: 1000, window: 10, cleanStart: true}, &r.b)
				part.put(&r.b)
			default:
				unlock := r.p.lockID("away")
				r.p.end(s, &r.b)
				unlock()
			}
			r.empty()
			r.boot()
			r.empty()
		})
	}
}

// When a member of a share group ends, another one gets what only the disk has
// of its queue, in order, and memory is bounded meanwhile.
func TestShareGroupTakesOverTheDisk(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut %v", cut), func(t *testing.T) {
			const messages = 3000
			r := newRig(t)
			pub := r.connect("pub", 10)
			gone := r.away("gone", "$share/g/t", 1)
			pub.fill(0, messages, 100, storage.Message{Topic: "t", QoS: 1})
			r.away("stays", "$share/g/t", 1)
			if cut {
				r.boot()
				gone = r.p.session("gone")
			}
			r.p.memory.budget = 100 << 10
			most := int64(0)
			r.p.pause = func(d time.Duration) {
				most = max(most, r.p.queueMessages.Load()-r.p.spilledMessages.Load())
				_ = r.p.journal.Commit()
			}
			unlock := r.p.lockID("gone")
			r.p.end(gone, &r.b)
			unlock()
			if most = max(most, r.p.queueMessages.Load()-r.p.spilledMessages.Load()); most > messages/2 {
				t.Errorf("%d deliveries were in memory at once", most)
			}
			r.commit()
			r.boot()
			if r.p.session("gone") != nil {
				t.Error("the session is still there")
			}
			c := r.take("stays", 50)
			c.drain()
			c.wants(0, messages)
			r.empty()
		})
	}
}

// While commits fail, deletions go ahead of what waits; but not the deletion of
// what is on its way to another member of a share group.
func TestAdoptedIsNotDeletedAhead(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	gone := r.away("gone", "$share/g/t", 1)
	pub.fill(0, 5, 5, storage.Message{Topic: "t", QoS: 1})
	r.away("stays", "$share/g/t", 1)
	r.store.BeforeCommit = func() bool { return true }
	r.p.journal.MarkProgress(pub.s.id, nil)
	if r.p.journal.Commit() == nil {
		t.Fatal("no error")
	}
	unlock := r.p.lockID("gone")
	r.p.end(gone, &r.b) // behind the group that has failed
	unlock()
	r.store.BeforeCommit = nil
	if err := r.p.journal.Commit(); err != nil {
		t.Fatal(err)
	}
	r.boot() // before the next one
	n := 0
	for _, id := range []string{"gone", "stays"} {
		if s := r.p.session(id); s != nil {
			n += s.waiting()
		}
	}
	if n != 5 {
		t.Errorf("%d deliveries after a cut, want 5", n)
	}
}

// The row of a client's new session takes the place of the last one's; not before
// others have what that had.
func TestNewSessionWaitsForAdoption(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	r.away("gone", "$share/g/t", 1)
	pub.fill(0, 100, 100, storage.Message{Topic: "t", QoS: 1})
	r.away("stays", "$share/g/t", 1)
	adopt := make(chan func(), 1)
	r.p.background = func(f func()) { adopt <- f }
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		var b batch
		r.p.open(&party{r: r}, opening{clientID: "gone", version: 4, expiry: 1000, window: 10, cleanStart: true}, &b)
	}()
	f := <-adopt
	eventually(t, "the CONNECT waits, or is through", func() bool {
		select {
		case <-opened:
			return true
		default:
		}
		buf := make([]byte, 1<<16)
		return strings.Contains(string(buf[:runtime.Stack(buf, true)]), "(*plane).adopted")
	})
	r.commit()
	img, err := r.store.Load() // as a cut at this moment leaves it
	if err != nil || !slices.ContainsFunc(img.Sessions, func(s storage.Session) bool { return s.ClientID == "gone" && s.ID == 2 }) {
		t.Errorf("sessions %+v, error %v; want the one that has ended among them", img.Sessions, err)
	}
	f()
	<-opened
	r.commit()
	r.boot()
	c := r.take("stays", 10)
	c.drain()
	c.wants(0, 100)
}

// A client that is slower than what comes gets what is left, for as long as the
// flood goes on: what is dropped meanwhile does not hold it up.
func TestFloodDoesNotStarve(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 8 })
	r.p.ids, r.p.block = 64, 16
	pub, c := r.connect("pub", 10), r.take("c", 2)
	c.subscribe(1, "t")
	r.commit()
	n := 0
	flood := func() bool {
		for range 3 {
			pub.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", n), QoS: 1}, uint16(1+n))
			n++
		}
		return false
	}
	r.store.AfterCommit = flood
	for range 100 {
		flood()
		r.commit()
		c.step()
	}
	if len(c.got) < 100 {
		t.Errorf("got %d messages while %d came", len(c.got), n)
	}
}

// A subscription that comes while queues are read is no race.
func TestReadBesideSubscribe(t *testing.T) {
	r := newRig(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			r.p.shareKey("g\x00t")
		}
	}()
	c := r.connect("c", 10)
	for i := range 100 {
		c.subscribe(1, fmt.Sprintf("$share/g%d/t", i))
	}
	<-done
}
