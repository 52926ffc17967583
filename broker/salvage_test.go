package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"penstock/storage"
)

// blank overwrites the header of the database in dir.
func blank(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "penstock.db"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(make([]byte, 100), 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A queue that a start has no time to read from a damaged database comes
// afterwards, in order, also when that is interrupted by a stop, and a client
// that takes all of it has nothing left at the next start. Meanwhile the broker
// says that something needs attention.
func TestQueueOfDamagedDatabase(t *testing.T) {
	const n, each = 3000, 100
	dir := t.TempDir()
	s := start(t, dir)
	for _, id := range []string{"sub", "lost"} {
		c, _ := s.connect(connectOptions{id: id})
		c.subscribe(1, "q")
		c.disconnect()
	}
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	pad := strings.Repeat("x", 2000)
	for i := 0; i < n; i += each {
		var out []byte
		for k := range each {
			out = append(out, pub.publishPacket("q", fmt.Sprintf("%s%d", pad, i+k), 1, 0, uint16(1+k))...)
		}
		pub.send(out)
		for range each {
			pub.expect(typePuback)
		}
	}
	s.stop()
	blank(t, dir)

	noTime := func(_ *Config, c *storage.Config) { c.SalvageTime = 0 }
	s = start(t, dir, noTime)
	eventually(t, "reading the queue begins", func() bool { return s.b.Stats().QueueMessages > 0 })
	if h := s.b.Health(); !h.Ready || !h.Degraded || len(h.Reasons) != 1 || !strings.HasPrefix(h.Reasons[0], "salvage: ") {
		t.Errorf("got %+v, want ready, degraded and why", h)
	}
	c, present := s.connect(connectOptions{id: "lost", clean: true}) // a session that ends meanwhile
	if present {
		t.Error("a clean session is present")
	}
	c.disconnect()
	s.stop()

	s = start(t, dir)
	sub, present := s.connect(connectOptions{id: "sub"})
	if !present {
		t.Fatal("the session is gone")
	}
	// Each message comes, and none for the first time before those that were
	// published before it.
	for next := 0; next < n; {
		var got int
		d := sub.take()
		if _, err := fmt.Sscanf(strings.TrimPrefix(d.payload, pad), "%d", &got); err != nil {
			t.Fatal(err)
		}
		if got > next {
			t.Fatalf("message %d comes before message %d", got, next)
		}
		if got == next {
			next++
		}
	}
	eventually(t, "all is read", func() bool { r := s.b.Stats().Salvage; return r != nil && !r.Running })
	drained := make(chan struct{}) // of those that a stop has had read twice
	go func() {
		defer close(drained)
		for {
			first, body, err := sub.tryRead()
			if err != nil {
				return
			}
			if first>>4 == typePublish {
				_, _ = sub.c.Write(packet(typePuback<<4, u16(parseDelivery(first, body, 4).id))) // an error ends the next read
			}
		}
	}()
	eventually(t, "all is taken", func() bool { return s.b.Stats().QueueMessages == 0 })
	sub.c.Close()
	<-drained
	s.stop()

	s = start(t, dir)
	if q := s.b.Stats().QueueMessages; q != 0 {
		t.Errorf("%d messages are queued once more", q)
	}
	if err := os.Remove(filepath.Join(dir, "penstock.salvage")); err != nil {
		t.Fatal(err)
	}
	if h := s.b.Health(); h.Degraded {
		t.Errorf("acknowledged: got %+v", h)
	}
}

// What is given to a session that is connected goes to it at once, behind what it
// has, and is durable when giveAgain returns; what is for sessions that ended, or
// whose number another one has, goes to nobody.
func TestGiveAgain(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 100)
	c.publish(storage.Message{Topic: "other", QoS: 1}, 1)
	claim := func(client string, id storage.SessionID, qos byte) storage.SalvagedClaim {
		return storage.SalvagedClaim{ClientID: client, ClaimRecord: storage.ClaimRecord{Session: id, Seq: 1 << 40, QoS: qos}}
	}
	recs := []storage.SalvagedRecord{
		{Message: &storage.Message{Topic: "t", Payload: []byte("one"), QoS: 1}, Claims: []storage.SalvagedClaim{claim("c", c.s.id, 1)}},
		{Message: &storage.Message{Topic: "t", Payload: []byte("two"), QoS: 2}, Claims: []storage.SalvagedClaim{claim("c", c.s.id, 2), claim("gone", 99, 1)}},
		{Message: &storage.Message{Topic: "t", Payload: []byte("another's")}, Claims: []storage.SalvagedClaim{claim("before", c.s.id, 1)}},
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	given := make(chan error, 1)
	go func() { given <- r.p.giveAgain(ctx, recs) }()
	for done := false; !done; {
		select {
		case err := <-given:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		case <-time.After(time.Millisecond):
			r.commit()
		}
	}
	want := []string{"one id1 qos1 dup false", "two id2 qos2 dup false"}
	if fmt.Sprint(c.deliveries) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", c.deliveries, want)
	}
	if n := r.p.dropped[dropSessionEnded].Load(); n != 2 {
		t.Errorf("%d dropped, want 2", n)
	}
	r.boot()
	if n := r.p.queueMessages.Load(); n != 2 {
		t.Errorf("after a cut %d are queued, want 2", n)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if err := r.p.giveAgain(ctx, []storage.SalvagedRecord{{Message: recs[0].Message, Claims: []storage.SalvagedClaim{claim("c", c.s.id, 1)}}}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was told to end", err)
	}
}

// A broker whose database is found damaged ends by itself, and says why.
func TestBrokerEndsWithDamage(t *testing.T) {
	cfg, scfg := DefaultConfig(), storage.DefaultConfig()
	cfg.Listeners[0].Address, scfg.Dir = "127.0.0.1:0", t.TempDir()
	log := slog.New(slog.DiscardHandler)
	db, err := storage.Open(t.Context(), scfg, log)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	b, err := New(cfg, db, log)
	if err != nil {
		t.Fatal(err)
	}
	b.plane.journal.Change(func(tx storage.Tx) error {
		return fmt.Errorf("%w: by a test", storage.ErrDamaged)
	}, nil)
	ended := make(chan error, 1)
	go func() { ended <- b.Run(t.Context()) }()
	select {
	case err := <-ended:
		if !errors.Is(err, storage.ErrDamaged) {
			t.Errorf("got %v, want ErrDamaged", err)
		}
	case <-time.After(patience):
		t.Error("goes on")
	}
}

// What came by a share group is given again while somebody changes subscriptions:
// the two wait for the same lock.
func TestGiveAgainBesideSubscribers(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for range 20000 {
			r.p.mu.Lock()
			r.p.gen.Add(1)
			r.p.mu.Unlock()
		}
	}()
	var b batch
	for n := 0; ; n++ {
		rc := receipt{acks: &ackQueue{}}
		rc.ticket()
		r.p.giveClaim(&storage.Message{Topic: "t", QoS: 1}, storage.SalvagedClaim{
			ClientID: "c", ClaimRecord: storage.ClaimRecord{Session: c.s.id, Seq: uint64(n), QoS: 1, Share: "$share/g/t"},
		}, &rc, &b)
		select {
		case <-over:
			return
		default:
		}
	}
}
