package main

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// latency is messages at a fixed rate, which are due at times that nothing
// changes: when the broker, or the generator, falls behind, then the messages
// that wait for it count with the time that they waited.
type latency struct {
	qos   byte
	pairs int
	rate  int // messages a second, of all publishers together
	// persistent is for subscribers with persistent sessions.
	persistent bool
	// messages, if not 0, is how many there are, in place of the publishing time.
	messages uint64
	// burst, if not 0, is how many messages of a publisher are due at a time.
	burst uint64
}

// Names of its values, in microseconds.
const (
	latencyP50 = "p50"
	latencyP99 = "p99"
	latencyMax = "max"
	lateP99    = "sent late, p99"
)

// due returns when message n of a pair is to be sent, from the start. The
// pairs take turns.
func (l latency) due(pair int, n uint64) time.Duration {
	if l.burst > 0 {
		n -= n % l.burst
		return time.Duration(n*uint64(l.pairs)+uint64(pair)*l.burst) * (time.Second / time.Duration(l.rate))
	}
	return time.Duration(n*uint64(l.pairs)+uint64(pair)) * (time.Second / time.Duration(l.rate))
}

func (l latency) run(ctx context.Context, t target, ld load) ([]phase, error) {
	each := ld.number(l.messages) / uint64(l.pairs)
	if each == 0 {
		if l.rate < 1000 {
			ld.time *= 2 // for messages enough to have a 99th percentile
		}
		each = uint64(ld.time.Seconds() * float64(l.rate) / float64(l.pairs))
	}
	warm := each / 10 // what comes first is not counted: pages and caches are cold
	w := workload{
		version: v311, qos: l.qos, publishers: l.pairs, subscribers: l.pairs, topic: lineTopic, filters: nil,
		payload: payloadBytes, window: maxIDs,
	}
	g := newCrew(ctx)
	defer g.wg.Wait()
	publishers := make([]*publisher, l.pairs)
	subscribers := make([]*subscriber, l.pairs)
	defer closeAll(publishers, subscribers)
	defer g.cancel(nil)
	for i := range l.pairs {
		publishers[i] = newPublisher(i, w)
		subscribers[i] = &subscriber{}
		var err error
		if subscribers[i].c, err = join(g.ctx, t.addr, v311, smallBytes, fmt.Sprintf("bench-subscriber-%d", i), !l.persistent); err != nil {
			return nil, err
		}
		if err := subscribers[i].c.subscribe(l.qos, numbered(lineTopic, i)); err != nil {
			return nil, err
		}
		if publishers[i].c, err = join(g.ctx, t.addr, v311, smallBytes, fmt.Sprintf("bench-publisher-%d", i), true); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(g.ctx, func() { closeAll(publishers, subscribers) })
	defer stop()

	end, err := measure(t, "")
	if err != nil {
		return nil, err
	}
	took := make([][]time.Duration, l.pairs)
	start := time.Now().Add(10 * time.Millisecond)
	for i := range l.pairs {
		g.run("subscriber", i, func() (err error) {
			took[i], err = l.receive(subscribers[i].c, i, each, warm, start)
			return err
		})
		if l.qos > 0 {
			// Its packets are written by pace: here it only reads.
			g.run("publisher", i, func() error { return acknowledged(publishers[i].c, each) })
		}
	}
	var late []time.Duration
	g.run("pace", 0, func() (err error) {
		late, err = l.pace(g.ctx, publishers, each, warm, start)
		return err
	})
	g.wg.Wait()
	if err := g.err(); err != nil {
		return nil, err
	}
	ph, err := end(each*uint64(l.pairs), each*uint64(l.pairs))
	all := slices.Concat(took...)
	ph.values = map[string]float64{
		latencyP50: micros(quantile(all, 0.50)), latencyP99: micros(quantile(all, 0.99)), latencyMax: micros(quantile(all, 1)),
		lateP99: micros(quantile(late, 0.99)),
	}
	return []phase{ph}, err
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// quantile returns the smallest value that at least the share q of all do not
// exceed, 0 of none. It sorts them.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	n := int(q*float64(len(d))+0.999999) - 1
	return d[min(max(n, 0), len(d)-1)]
}

// pace sends each message when it is due, from a thread of its own that sleeps
// in the kernel: Go's timers would add up to a millisecond. It returns how much
// later than due each message was handed to the kernel.
func (l latency) pace(ctx context.Context, publishers []*publisher, each, warm uint64, start time.Time) ([]time.Duration, error) {
	runtime.LockOSThread() // never unlocked: the thread, with its timer slack, ends with this goroutine
	const setTimerSlack = 29
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setTimerSlack, 1, 0); errno != 0 {
		return nil, fmt.Errorf("prctl: %w", errno)
	}
	late := make([]time.Duration, 0, (each-warm)*uint64(l.pairs))
	wait := func(due time.Duration) error {
		for {
			left := due - time.Since(start)
			if left <= 0 {
				return nil
			}
			// A message that is due later than soon does not keep the others.
			if err := flushAll(publishers); err != nil {
				return err
			}
			ts := syscall.NsecToTimespec(int64(min(left, 100*time.Millisecond)))
			_ = syscall.Nanosleep(&ts, nil) // when it is interrupted, then it is called again
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	burst := max(l.burst, 1)
	for from := uint64(0); from < each; from += burst {
		for i, p := range publishers {
			for n := from; n < min(from+burst, each); n++ {
				due := l.due(i, n)
				if err := wait(due); err != nil {
					return nil, err
				}
				id := uint16(0)
				if l.qos > 0 {
					id = uint16(1 + n%maxIDs)
				}
				p.c.out = p.templates[0].append(p.c.out, id, n)
				if n >= warm {
					late = append(late, time.Since(start)-due)
				}
			}
		}
	}
	return late, flushAll(publishers)
}

func flushAll(publishers []*publisher) error {
	for _, p := range publishers {
		if err := p.c.flush(); err != nil {
			return err
		}
	}
	return nil
}

// receive takes all messages of one pair and returns how long after they were
// due they came, without the first ones.
func (l latency) receive(c *client, pair int, each, warm uint64, start time.Time) ([]time.Duration, error) {
	took := make([]time.Duration, 0, each-warm)
	for n := uint64(0); n < each; {
		if err := c.fill(); err != nil {
			return nil, fmt.Errorf("%d of %d messages: %w", n, each, err)
		}
		now := time.Since(start)
		for {
			f, ok, err := c.next()
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			if f.kind() != publish {
				return nil, fmt.Errorf("packet type %d was not expected", f.kind())
			}
			m, err := f.message(v311)
			if err != nil {
				return nil, err
			}
			if m.publisher != uint32(pair) || m.seq != n || m.qos != l.qos {
				return nil, fmt.Errorf("message %d of publisher %d with QoS %d, want %d of %d with %d: lost, repeated or out of order",
					m.seq, m.publisher, m.qos, n, pair, l.qos)
			}
			if l.qos == 1 {
				c.out = appendAck(c.out, puback, m.packetID)
			}
			if n >= warm {
				took = append(took, now-l.due(pair, n))
			}
			n++
		}
		if err := c.flush(); err != nil {
			return nil, err
		}
	}
	return took, nil
}

// acknowledged reads the PUBACKs of so many messages.
func acknowledged(c *client, messages uint64) error {
	for n := uint64(0); n < messages; {
		f, ok, err := c.next()
		if err != nil {
			return err
		}
		if !ok {
			if err := c.fill(); err != nil {
				return fmt.Errorf("%d of %d messages acknowledged: %w", n, messages, err)
			}
			continue
		}
		id, err := f.packetID()
		if err != nil {
			return err
		}
		if want := uint16(1 + n%maxIDs); f.kind() != puback || id != want {
			return fmt.Errorf("packet type %d for identifier %d, want PUBACK for %d", f.kind(), id, want)
		}
		n++
	}
	return nil
}
