package broker

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// stopwatch is a publisher that notes how long its PUBACKs take.
type stopwatch struct {
	*party
	acked chan uint16
}

func (w *stopwatch) sendAck(kind byte, id uint16, _ byte, _ []byte, _ *batch) {
	if kind == typePuback {
		w.acked <- id
	}
}

// prompt is a subscriber that acknowledges after a time.
type prompt struct {
	*party
	after time.Duration
}

func (l *prompt) sendPublish(_ *storage.Message, _ byte, _, _ bool, id uint16, _ []uint32, _ *batch) outcome {
	time.AfterFunc(l.after, func() {
		var b batch
		l.s.puback(id, &b)
	})
	return outSent
}

// How long a PUBACK takes, and how many a second there are, on a disk that takes
// 20 ms for a commit. The time is virtual: what it counts is waiting.
func TestCommitLatency(t *testing.T) {
	var records uint64 // messages written in the last measurement
	const fsync, messages = 20 * time.Millisecond, 20_000
	measure := func(t *testing.T, commitDelay time.Duration, inflight int, reader time.Duration) (median time.Duration, rate float64) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			log := slog.New(slog.DiscardHandler)
			r.p = newPlane(&r.cfg, storage.NewJournal(r.store, storage.Config{CommitDelay: units.Duration(commitDelay)}, log), log)
			if err := r.p.restore(); err != nil {
				t.Fatal(err)
			}
			sub, pub := r.connect("sub", 256), r.connect("pub", 10)
			sub.subscribe(1, "t")
			r.commit()
			if reader == 0 {
				r.p.leave(sub.s, sub, leaving{}, &r.b)
			} else {
				sub.s.attach(&prompt{sub, reader}, &sub.acks, &r.b)
			}
			w := &stopwatch{pub, make(chan uint16, packetIDs)}
			pub.acks.link = w
			r.store.BeforeCommit = func() bool { time.Sleep(fsync); return false }
			ctx, cancel := context.WithCancel(t.Context())
			var run sync.WaitGroup
			run.Go(func() { _ = r.p.journal.Run(ctx) }) // returns nil only
			defer run.Wait()
			defer cancel()
			began, sent := time.Now(), make(map[uint16]time.Time)
			var took []time.Duration
			total := min(messages, 100*inflight)
			for n := 0; len(took) < total; {
				for ; n < total && len(sent) < inflight; n++ {
					id := uint16(1 + n%packetIDs)
					sent[id] = time.Now()
					pub.publish(storage.Message{Topic: "t", Payload: make([]byte, 100), QoS: 1}, id)
				}
				id := <-w.acked
				took = append(took, time.Since(sent[id]))
				delete(sent, id)
			}
			records = r.p.journal.Stats().Records
			rate = float64(total) / time.Since(began).Seconds()
			slices.Sort(took)
			median = took[len(took)/2]
		})
		return median, rate
	}
	alone, slow := measure(t, 0, 1, 0)
	if alone > fsync+time.Millisecond {
		t.Errorf("one in flight: a PUBACK takes %v, want one fsync of %v", alone, fsync)
	}
	if _, rate := measure(t, 0, 100, 0); rate < 20*slow {
		t.Errorf("100 in flight: %.0f messages a second, want 20 times the %.0f of one in flight", rate, slow)
	}
	for _, delay := range []time.Duration{0, fsync} {
		if _, rate := measure(t, delay, 1000, 0); rate < 15_000 {
			t.Errorf("1,000 in flight, commit_delay %v: %.0f messages a second, want 15,000", delay, rate)
		}
	}
	// Who is there and acknowledges has no need of the disk.
	const reader = 3 * time.Millisecond
	for _, inflight := range []int{1, 100} {
		if median, _ := measure(t, 20*time.Millisecond, inflight, reader); median > reader {
			t.Errorf("subscriber online, %d in flight: a PUBACK takes %v, want the %v of the subscriber's own", inflight, median, reader)
		}
		// Nor has a message that came a moment before a commit is due: it waits
		// for one of its own.
		if records > 0 {
			t.Errorf("%d in flight: %d messages were written for a client that acknowledges after %v", inflight, records, reader)
		}
	}
}

// attended is a client that is read, and pings unless it is busy writing, until
// its connection ends.
type attended struct {
	*client
	pubacks, pongs, deliveries atomic.Int64
	acks                       bool // acknowledges deliveries
	ended                      atomic.Bool
}

func (p *pipes) attend(o connectOptions, acks, pings bool, filters ...string) *attended {
	e := &attended{client: p.connect(o), acks: acks}
	for _, f := range filters {
		e.subscribe(1, f)
	}
	e.c.SetReadDeadline(time.Time{})
	go func() {
		defer e.ended.Store(true)
		for {
			first, body, err := e.next()
			switch {
			case err != nil:
				return
			case first>>4 == typePuback:
				e.pubacks.Add(1)
			case first>>4 == typePingresp:
				e.pongs.Add(1)
			case first>>4 == typePublish:
				e.deliveries.Add(1)
				if first&6 != 0 && e.acks {
					at := 2 + binary.BigEndian.Uint16(body)
					_, _ = e.c.Write(packet(typePuback<<4, body[at:at+2])) // a failure shows at the read
				}
			}
		}
	}()
	go func() {
		for pings && !e.ended.Load() {
			time.Sleep(time.Duration(o.keepAlive) * time.Second / 2)
			_, _ = e.c.Write([]byte{typePingreq << 4, 0}) // a failure shows at the read
		}
	}()
	return e
}

// next reads a packet, however long it takes.
func (e *attended) next() (first byte, body []byte, err error) {
	var head [2]byte // all packets here are short, but for what is published
	if _, err := io.ReadFull(e.c, head[:]); err != nil {
		return 0, nil, err
	}
	body = make([]byte, head[1])
	_, err = io.ReadFull(e.c, body)
	return head[0], body, err
}

// A disk that hangs for half a minute costs nobody the connection, though keep
// alives are of 10 s. What is between clients that are there goes on; what needs
// the disk waits, and its publishers with it.
func TestDiskHangsForLongerThanKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const stall, keepAlive, most = 30 * time.Second, 10, 50
		p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = most })
		away := p.connect(connectOptions{id: "away", version: 4})
		away.subscribe(1, "queue")
		away.disconnect()
		reader := p.attend(connectOptions{id: "reader", version: 4, keepAlive: keepAlive}, true, true, "live")
		silent := p.attend(connectOptions{id: "silent", version: 5, expiry: 100, keepAlive: keepAlive}, true, true, "live")
		talker := p.attend(connectOptions{id: "talker", version: 4, clean: true, keepAlive: keepAlive}, false, true)
		p5 := p.attend(connectOptions{id: "p5", version: 5, clean: true, keepAlive: keepAlive}, false, true)
		p4 := p.attend(connectOptions{id: "p4", version: 4, clean: true, keepAlive: keepAlive}, false, true)
		greedy := p.attend(connectOptions{id: "greedy", version: 4, clean: true, keepAlive: keepAlive}, false, false)
		synctest.Wait()
		release := p.holdCommits()
		for i := range uint16(most) {
			p5.send(p5.publishPacket("queue", "x", 1, 0, 1+i))
		}
		for i := range uint16(2 * most) { // more than it may, and no bytes to speak of
			p4.send(p4.publishPacket("queue", "x", 1, 0, 1+i))
		}
		var taken atomic.Int64 // bytes
		var enough atomic.Bool // or it goes on at the same moment for ever
		go func() {
			large := greedy.publishPacket("queue", strings.Repeat("x", 1000), 1, 0, 1)
			for id := uint16(1); !enough.Load(); id++ {
				binary.BigEndian.PutUint16(large[len(large)-1002:], max(id, 1))
				n, err := greedy.c.Write(large)
				if taken.Add(int64(n)); err != nil {
					return
				}
			}
		}()
		began := time.Now()
		for n := int64(1); time.Since(began) < stall; n++ {
			before := time.Now()
			talker.send(talker.publishPacket("live", "x", 0, 0, 0))
			talker.send(talker.publishPacket("live", "x", 1, 0, uint16(n)))
			synctest.Wait()
			if talker.pubacks.Load() != n || reader.deliveries.Load() != 2*n || silent.deliveries.Load() != 2*n || time.Since(before) > 0 {
				t.Fatalf("after %v: %d of %d acknowledged, %d and %d of %d deliveries", time.Since(began), talker.pubacks.Load(), n, reader.deliveries.Load(), silent.deliveries.Load(), 2*n)
			}
			time.Sleep(50 * time.Millisecond)
		}
		if h := p.b.Health(); h.Ready || !h.Degraded || len(h.Reasons) != 1 || !strings.Contains(h.Reasons[0], "a commit has been running for") {
			t.Errorf("health while the disk hangs: %+v", h)
		}
		for name, e := range map[string]*attended{"reader": reader, "silent": silent, "talker": talker, "p5": p5, "p4": p4, "greedy": greedy} {
			if e.ended.Load() {
				t.Errorf("%s was disconnected", name)
			}
			if n := e.pongs.Load(); n < 4 && name != "greedy" { // which is not read any more
				t.Errorf("%s got %d answers to its pings", name, n)
			}
		}
		for name, e := range map[string]*attended{"p5": p5, "p4": p4, "greedy": greedy} {
			if n := e.pubacks.Load(); n != 0 {
				t.Errorf("%s: %d messages were acknowledged without the disk", name, n)
			}
		}
		if n := taken.Load(); n > 512<<10 {
			t.Errorf("%d bytes were taken of a publisher that is past its bound", n)
		}
		if n := p.b.Stats().QueueMessages; n > 3*most+5 {
			t.Errorf("%d messages are queued, want what the publishers may have unacknowledged", n)
		}
		enough.Store(true)
		release()
		time.Sleep(time.Second)
		if p5.pubacks.Load() != most || p4.pubacks.Load() != 2*most || greedy.pubacks.Load() == 0 {
			t.Errorf("after the stall %d, %d and %d are acknowledged", p5.pubacks.Load(), p4.pubacks.Load(), greedy.pubacks.Load())
		}
		if h := p.b.Health(); !h.Ready {
			t.Errorf("health after the stall: %+v", h)
		}
		greedy.c.Close()
		for _, e := range []*attended{reader, silent, talker, p5, p4} {
			e.c.Close()
		}
		time.Sleep(keepAlive * time.Second) // their pingers end
	})
}
