package broker

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"penstock/storage"
)

// What comes after a restart was not sent before it: it has no DUP, and goes to
// others of a share group when its session ends.
func TestAfterRestartNothingIsTried(t *testing.T) {
	r, _, _ := sleeper(t)
	member, other := r.connect("member", 10), r.connect("other", 10)
	member.subscribe(2, "$share/g/s")
	r.commit()
	r.p.leave(member.s, member, leaving{}, &r.b)
	r.p.leave(other.s, other, leaving{}, &r.b)
	r.boot()
	r.p.memory = memory{online: 8, away: 4, chunk: 4, bytes: 1 << 20, budget: 1 << 20}
	pub := r.connect("pub", 10)
	publishMany(r, pub, 0, 100)
	for i := range 100 {
		pub.publish(storage.Message{Topic: "s", Payload: fmt.Appendf(nil, "s%d", i), QoS: 2}, uint16(2000+i))
	}
	r.commit()
	back := r.connect("away", 200)
	for range 100 {
		r.load()
	}
	if dup := slices.IndexFunc(back.deliveries, func(d string) bool { return strings.HasSuffix(d, "dup true") }); dup >= 0 || len(back.deliveries) != 100 {
		t.Errorf("%d deliveries, want 100; the first with DUP: %d", len(back.deliveries), dup)
	}
	other = r.connect("other", 200)
	other.subscribe(2, "$share/g/s")
	r.commit()
	r.p.open(&party{r: r}, opening{clientID: "member", version: 4, cleanStart: true, window: 2}, &r.b)
	for range 100 {
		r.commit()
	}
	if n := len(other.deliveries); n != 100 {
		t.Errorf("%d of 100 messages of QoS 2 went to the other member", n)
	}
}

// A member of a share group that has no room is passed over as long as another
// has some, whatever the policy.
func TestShareGroupsPassOverFullMembers(t *testing.T) {
	for _, policy := range []string{overflowDropOldest, overflowDropNewest, overflowReject} {
		r := newRig(t, func(c *Config) { c.QueueOverflow, c.MaxQueueMessages = policy, 5 })
		pub, a, b := r.connect("pub", 10), r.connect("a", 1), r.connect("b", 1)
		a.subscribe(1, "$share/g/t")
		r.commit()
		publishMany(r, pub, 0, 5) // all to a
		b.subscribe(1, "$share/g/t")
		r.commit()
		pub.s.version = 5
		if refused := publishMany(r, pub, 5, 5); refused != 0 || b.s.live != 5 || a.s.live != 5 || len(a.s.dropped)+len(b.s.dropped) > 0 {
			t.Errorf("%s: %d refused, %d and %d queued, dropped %v, %v; want 5 for each", policy, refused, a.s.live, b.s.live, a.s.dropped, b.s.dropped)
		}
	}
}

// What a share group's member leaves behind is not new: others get it although the
// policy is to drop what is new.
func TestAdoptedIsNotNew(t *testing.T) {
	r := newRig(t, func(c *Config) { c.QueueOverflow, c.MaxStore = overflowDropNewest, 1000 })
	pub, a, b := r.connect("pub", 10), r.connect("a", 10), r.connect("b", 10)
	a.subscribe(1, "$share/g/t")
	r.commit()
	r.p.leave(a.s, a, leaving{}, &r.b)
	publishMany(r, pub, 0, 100)
	r.p.sweep(time.Now(), &r.b)
	if !r.p.storeFull.Load() {
		t.Fatal("the store is not full")
	}
	b.subscribe(1, "$share/g/t")
	r.commit()
	r.p.leave(b.s, b, leaving{}, &r.b)
	r.p.open(&party{r: r}, opening{clientID: "a", version: 4, cleanStart: true, window: 2}, &r.b)
	r.commit()
	if b.s.live != 100 {
		t.Errorf("%d of 100 messages are left", b.s.live)
	}
	for range 3 { // the store is no reason for alarms of single queues
		publishMany(r, pub, 0, 3)
		r.p.sweep(time.Now(), &r.b)
		if n := r.p.alarms[2].Load(); n != 0 || b.s.dropped["queue-full"] != 0 {
			t.Errorf("%d queues have an alarm, dropped %v", n, b.s.dropped)
		}
	}
}
