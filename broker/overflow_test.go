package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

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
		_, refused := r.p.refuses(r.p.routesFor("t"), &storage.Message{Topic: "t", QoS: 1})
		return refused
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
