package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// scarce is a disk that is nearly full when it is told so.
type scarce struct{ low atomic.Bool }

func (s *scarce) Low() bool                 { return s.low.Load() }
func (s *scarce) Stats() storage.SpaceStats { return storage.SpaceStats{Low: s.Low()} }

// What would have to stay on a disk that is nearly full is refused, before
// anybody gets it; what keeps moving goes on.
func TestNearlyFullDiskRefuses(t *testing.T) {
	for _, qos := range []byte{1, 2} {
		r := newRig(t, func(c *Config) { c.Window = 4 })
		disk := &scarce{}
		r.p.space = disk
		pub, online, away := r.connect("pub", 10), r.connect("online", 4), r.connect("away", 10)
		pub.s.version = 5
		online.subscribe(2, "both", "live")
		away.subscribe(2, "both", "away")
		r.p.leave(away.s, away, leaving{}, &r.b)
		r.commit()
		id := uint16(0)
		try := func(topic string, retain bool) error {
			id++
			return r.p.accept(pub.s, &pub.acks, r.p.routesFor(topic), &storage.Message{Topic: topic, Payload: []byte("x"), QoS: qos, Retain: retain}, id, &r.b)
		}
		disk.low.Store(true)
		for _, topic := range []string{"both", "away"} {
			if err := try(topic, false); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%d:%d", typePuback+qos-1, id); !slices.Contains(pub.answers, want) {
				t.Errorf("QoS %d to %s: answers %v, want it refused at once with %s", qos, topic, pub.answers, want)
			}
			if pub.s.inbound[id] != nil {
				t.Errorf("QoS 2 to %s: the identifier of what was refused is taken", topic)
			}
		}
		if len(online.deliveries) != 0 || away.s.live != 0 {
			t.Errorf("QoS %d: refused, and delivered all the same: %v, %d", qos, online.deliveries, away.s.live)
		}
		if _ = try("state", true); r.p.Retained("state") != nil {
			t.Errorf("QoS %d: a new retained message was taken", qos)
		}
		// To a client that acknowledges, for as long as it does.
		for range 20 {
			_ = try("live", false)
			r.commit()
			e := online.s.queue.at(0)
			online.s.puback(online.s.packetID(e.seq), &r.b)
			online.s.pubrec(online.s.packetID(e.seq), 0, &r.b)
			r.commit()
			online.s.pubcomp(online.s.packetID(e.seq), &r.b)
		}
		if len(online.deliveries) != 20 {
			t.Errorf("QoS %d: %d of 20 deliveries to a client that acknowledges", qos, len(online.deliveries))
		}
		for range 20 {
			_ = try("live", false)
			r.commit()
		}
		if online.s.live != 5 {
			t.Errorf("QoS %d: %d wait for a client that does not acknowledge, want its window of 4 and the one by which that shows", qos, online.s.live)
		}
		if got := r.p.limited[limitDisk].Load(); got != 2+1+15 {
			t.Errorf("QoS %d: %d counted, want 18", qos, got)
		}
		// What was taken over before is not refused when it comes again.
		disk.low.Store(false)
		if _ = try("away", false); qos == 2 {
			disk.low.Store(true)
			pub.answers = nil
			id--
			_ = try("away", false)
			r.commit()
			if n := len(pub.answers); n != 2 || away.s.live != 1 || r.p.limited[limitDisk].Load() != 18 {
				t.Errorf("a QoS 2 message and its repetition: answers %v, %d queued", pub.answers, away.s.live)
			}
		}
	}
}

// A share group takes messages as long as one of its members keeps up.
func TestNearlyFullDiskAndShares(t *testing.T) {
	r := newRig(t)
	disk := &scarce{}
	r.p.space = disk
	disk.low.Store(true)
	a, b := r.connect("a", 10), r.connect("b", 10)
	a.subscribe(1, "$share/g/t")
	b.subscribe(1, "$share/g/t")
	r.commit()
	refused := func() bool {
		return r.p.refuses(r.p.routesFor("t"), &storage.Message{Topic: "t", QoS: 1}) == limitDisk
	}
	r.p.leave(a.s, a, leaving{}, &r.b)
	if refused() {
		t.Error("refused, though a member is connected")
	}
	r.p.leave(b.s, b, leaving{}, &r.b)
	if !refused() {
		t.Error("taken, though both members are away")
	}
}

// On the wire: reason codes for MQTT 5, the end of the connection for 3.1.1,
// and no new persistent sessions; and all is well again when there is room.
func TestNearlyFullDiskOnTheWire(t *testing.T) {
	s := start(t, t.TempDir())
	disk := &scarce{}
	s.b.plane.space = disk
	away, _ := s.connect(connectOptions{id: "away", version: 5, expiry: 100})
	away.subscribe(1, "t")
	away.disconnect()
	eventually(t, "the subscriber is away", func() bool { return s.b.Stats().Connections == 0 })
	pub5, _ := s.connect(connectOptions{id: "pub5", version: 5, clean: true})
	pub3, _ := s.connect(connectOptions{id: "pub3", clean: true})
	pub5.publish("t", "m0", 1, false)

	disk.low.Store(true)
	for qos := byte(1); qos <= 2; qos++ {
		pub5.send(pub5.publishPacket("t", "no", qos, 0, 77))
		if _, body := pub5.expect(typePuback + qos - 1); body[2] != reasonQuota {
			t.Errorf("QoS %d: acknowledged with % x, want reason 0x97", qos, body)
		}
	}
	pub5.send(pub5.publishPacket("state", "new", 0, 1, 0)) // not retained, and nothing ends
	pub5.ping()
	if s.b.plane.Retained("state") != nil {
		t.Error("a new retained message of QoS 0 was kept")
	}
	pub3.send(pub3.publishPacket("t", "no", 1, 0, 1))
	pub3.expectEnd()
	c := s.dial()
	c.version = 5
	c.send(connectPacket(connectOptions{id: "new", version: 5, expiry: 100}))
	if first, body := c.read(); first != typeConnack<<4 || body[1] != reasonQuota {
		t.Errorf("a new persistent session: CONNACK % x, want reason 0x97", body)
	}
	if err := s.b.Publish(context.Background(), Message{Topic: "t", Payload: []byte("no"), QoS: 1}); !errors.Is(err, ErrDiskFull) {
		t.Errorf("Publish: got %v, want ErrDiskFull", err)
	}
	if h := s.b.Health(); !h.Ready || !h.Degraded || len(h.Reasons) != 1 {
		t.Errorf("health %+v, want ready, and degraded for one reason", h)
	}
	if got := s.b.Stats().Limited["disk"]; got != 6 {
		t.Errorf("%d counted, want 6", got)
	}
	away, present := s.connect(connectOptions{id: "away", version: 5, expiry: 100}) // it may always come and take
	if !present {
		t.Error("the session is gone")
	}
	away.takeAll("m%d", 0, 1)
	away.disconnect()
	eventually(t, "the subscriber is away", func() bool { return s.b.Stats().Connections == 1 })

	disk.low.Store(false)
	pub5.publish("t", "m1", 1, false)
	away, _ = s.connect(connectOptions{id: "away", version: 5, expiry: 100})
	away.takeAll("m%d", 1, 1) // and nothing more was kept
	away.ping()
	if len(away.stash) != 0 {
		t.Error("a message that was refused was delivered")
	}
}

// sleeper is a client with a persistent session that is away, and a publisher.
func sleeper(t *testing.T, change ...func(*Config)) (r *rig, pub, away *party) {
	r = newRig(t, change...)
	r.p.memory = memory{online: 8, away: 4, chunk: 4, bytes: 1 << 20, budget: 1 << 20}
	pub, away = r.connect("pub", 10), r.connect("away", 10)
	pub.s.version = 5
	away.subscribe(1, "t")
	r.commit()
	r.p.leave(away.s, away, leaving{}, &r.b)
	return r, pub, away
}

// publishMany publishes messages m0, m1, …, commits now and then, and returns how
// many were refused.
func publishMany(r *rig, pub *party, from, n int) int {
	before := r.p.limited[limitQueues].Load()
	for i := from; i < from+n; i++ {
		pub.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, uint16(1+i%1000))
		if i%7 == 6 {
			r.commit()
		}
	}
	r.commit()
	return int(r.p.limited[limitQueues].Load() - before)
}

// names returns the payloads that a client got.
func (l *party) names() (names []string) {
	for _, d := range l.deliveries {
		name, _, _ := strings.Cut(d, " ")
		names = append(names, name)
	}
	return names
}

// At the bound of a queue its owner's policy decides, also where the queue is on
// the disk, and there is an alarm that says so.
func TestOverflowPolicies(t *testing.T) {
	for policy, want := range map[string]struct {
		first, refused int
		dropped        uint64
	}{
		overflowDropOldest: {50, 0, 50},
		overflowDropNewest: {0, 0, 50},
		overflowReject:     {0, 50, 0},
	} {
		t.Run(policy, func(t *testing.T) {
			r, pub, away := sleeper(t, func(c *Config) { c.QueueOverflow, c.MaxQueueMessages = policy, 100 })
			levels := func(when string, want [3]int64) {
				t.Helper()
				for i := range want {
					if got := r.p.alarms[i].Load(); got != want[i] {
						t.Errorf("%s: %d queues have reached %d%%, want %d", when, got, alarmLevels[i], want[i])
					}
				}
			}
			levels("empty", [3]int64{})
			publishMany(r, pub, 0, 50)
			levels("half full", [3]int64{1})
			publishMany(r, pub, 50, 40)
			levels("at 90%", [3]int64{1, 1})
			refused := publishMany(r, pub, 90, 60)
			levels("full", [3]int64{1, 1, 1})
			if refused != want.refused || r.p.dropped[dropQueueFull].Load() != want.dropped || away.s.dropped["queue-full"] != want.dropped {
				t.Errorf("%d refused, %d dropped, %d of them counted for the client; want %d, %d, %d", refused, r.p.dropped[dropQueueFull].Load(),
					away.s.dropped["queue-full"], want.refused, want.dropped, want.dropped)
			}
			if away.s.spill.count < 50 {
				t.Errorf("%d messages are on the disk only, too few for this test", away.s.spill.count)
			}
			back := r.connect("away", 200)
			for range 100 {
				r.load()
			}
			var names []string
			for i := range 100 {
				names = append(names, fmt.Sprintf("m%d", want.first+i))
			}
			equal(t, "got", back.names(), names)
			for back.s.live > 0 {
				back.s.puback(back.s.packetID(back.s.queue.at(0).seq), &r.b)
				r.load()
			}
			r.p.sweep(time.Now(), &r.b)
			levels("empty again", [3]int64{})
		})
	}
}

// A message that a policy refuses is refused for all: nobody has got it.
func TestRejectIsAllOrNothing(t *testing.T) {
	r, pub, _ := sleeper(t, func(c *Config) { c.QueueOverflow, c.MaxQueueMessages = overflowReject, 3 })
	online := r.connect("online", 10)
	online.subscribe(1, "t")
	r.commit()
	if refused := publishMany(r, pub, 0, 10); refused != 7 || len(online.deliveries) != 3 {
		t.Errorf("%d of 10 refused, %d delivered to who is connected; want 7, and 3", refused, len(online.deliveries))
	}
	pub.s.version = 4
	if err := r.p.accept(pub.s, &pub.acks, r.p.routesFor("t"), &storage.Message{Topic: "t", QoS: 1}, 1, &r.b); err == nil {
		t.Error("a 3.1.1 client is not disconnected")
	}
	if got := r.p.limited[limitQueues].Load(); got != 8 {
		t.Errorf("%d counted as refused, want 8", got)
	}
}

// What has waited for too long goes, from the disk as well as from memory.
func TestQueueAge(t *testing.T) {
	for _, n := range []int{3, 50} {
		r, pub, away := sleeper(t, func(c *Config) { c.MaxQueueAge = units.Duration(time.Hour) })
		away.s.expiry = storage.NeverExpires
		now := r.p.clock.now()
		r.p.now = func() int64 { return now }
		publishMany(r, pub, 0, n)
		now += 50 * 60e3
		publishMany(r, pub, n, n)
		r.p.sweep(time.Now().Add(61*time.Minute), &r.b)
		r.commit()
		back := r.connect("away", 200)
		for range 100 {
			r.load()
		}
		var names []string
		for i := range n {
			names = append(names, fmt.Sprintf("m%d", n+i))
		}
		equal(t, fmt.Sprintf("of %d", 2*n), back.names(), names)
		if got := away.s.dropped["queue-age"]; got != uint64(n) {
			t.Errorf("%d counted as too old, want %d", got, n)
		}
	}
}

// All queues together have a bound; above it the longest gives way.
func TestStoreBound(t *testing.T) {
	r, pub, away := sleeper(t, func(c *Config) { c.MaxStore = 4000 })
	short := r.connect("short", 10)
	short.subscribe(1, "u")
	r.commit()
	r.p.leave(short.s, short, leaving{}, &r.b)
	pub.publish(storage.Message{Topic: "u", Payload: []byte("u"), QoS: 1}, 1)
	publishMany(r, pub, 0, 1000)
	before := r.p.journal.Stored()
	r.p.sweep(time.Now(), &r.b)
	if !r.p.storeFull.Load() || r.p.storeAlarm.Load() != 3 {
		t.Errorf("full %v, alarm %d; want an alarm", r.p.storeFull.Load(), r.p.storeAlarm.Load())
	}
	if lost := away.s.dropped["store-full"]; int64(away.s.bytes) < 1000 || int(lost)+away.s.live != 1000 || short.s.live != 1 {
		t.Errorf("%d of 1000 dropped, %d left, %d of the short queue; want what is too much, and 1", lost, away.s.live, short.s.live)
	}
	for range 10 {
		r.commit()
		r.p.sweep(time.Now(), &r.b)
	}
	if got := r.p.journal.Stored(); got > 4000 || r.p.storeFull.Load() || away.s.live == 0 {
		t.Errorf("%d bytes of %d are stored in the end, %d messages; want less than 4000, and some", got, before, away.s.live)
	}
	img, err := r.store.Load()
	if err != nil || len(img.Segments) != int(r.p.journal.Stats().Segments) {
		t.Errorf("%d segments are stored, %d are counted, error %v", len(img.Segments), r.p.journal.Stats().Segments, err)
	}
}

// A session that ends with its connection has its queue in memory only, and a
// bound of its own for that.
func TestQueueInMemoryIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMemory = 64 << 10 })
	pub := r.connect("pub", 10)
	slow := &party{r: r}
	slow.s = r.p.open(slow, opening{clientID: "slow", version: 4, window: 10}, &r.b).s
	slow.acks.link = slow
	slow.s.attach(slow, &slow.acks, &r.b)
	slow.subscribe(1, "t")
	publishMany(r, pub, 0, 1000)
	if s := slow.s; s.takes() > 64<<10 || s.live < 200 || s.dropped["queue-full"] == 0 {
		t.Errorf("%d messages of %d bytes wait, %d were dropped; want no more than 64 KiB with what they take beside", s.live, s.bytes, s.dropped["queue-full"])
	}
}
