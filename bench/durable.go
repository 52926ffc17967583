package main

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

const (
	millionMessages = 1_000_000
	pacedMessages   = 200_000
	pacedRate       = 20_000
	fileSize        = "data directory" // name of a value, in bytes
)

// addDurable adds the scenarios that are about what is written to the disk, and
// how long that takes.
func addDurable(add func(group, name, title string, run func(context.Context, target, load) ([]phase, error)) *scenario) {
	deep := func(name, title string, messages uint64, inflight int) {
		s := add("durable", name, title, offline(messages, inflight))
		s.persistent, s.deep, s.timeout = true, true, 10*time.Minute
	}
	small := persistentPairs()
	small.window = 64
	add("durable", "persistent-full", "QoS 1, 4 pairs, 64 in flight", small.run).persistent = true
	s := add("durable", "persistent-paced", "QoS 1, 4 pairs, 20,000 a second",
		latency{qos: 1, pairs: 4, rate: pacedRate, persistent: true, messages: pacedMessages}.run)
	s.persistent = true
	s = add("durable", "persistent-bursts", "QoS 1, 4 pairs, 20,000 a second, 64 at a time",
		latency{qos: 1, pairs: 4, rate: pacedRate, persistent: true, messages: pacedMessages, burst: 64}.run)
	s.persistent = true
	deep("offline-million", "a million offline, 1,000 in flight", millionMessages, offlineWindow)
	deep("offline-hundred", "100,000 offline, 100 in flight", millionMessages/10, window)
	deep("offline-ten", "10,000 offline, 10 in flight", millionMessages/100, 10)

	commit := func(prefix, where, delay string, fsync time.Duration, inflight int, online bool) {
		c := acknowledging{inflight: inflight, online: online, atLeast: fsync}
		title := fmt.Sprintf("%s, %s in flight", where, thousands(inflight))
		if online {
			title = where + ", online"
		}
		name := fmt.Sprintf("%s-%d", prefix, inflight)
		if online {
			name = prefix + "-online"
		}
		s := add("commit", name, title, c.run)
		s.persistent, s.commitDelay, s.fsync, s.deep = true, delay, fsync, true
	}
	for _, n := range []int{1, 100, 1000} {
		commit("commit", "as shipped", "", 0, n, false)
	}
	commit("commit", "as shipped", "", 0, 1, true)
	for _, n := range []int{1, 100, 1000} {
		commit("commit-now", "commit_delay 0", "0s", 0, n, false)
	}
	for _, fsync := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond} {
		for _, delay := range []string{"0s", "20ms"} {
			where := fmt.Sprintf("fsync %s longer, commit_delay %s", fsync, delay)
			for _, n := range []int{1, 100, 1000} {
				commit(fmt.Sprintf("slow-%s-%s", fsync, delay), where, delay, fsync, n, false)
			}
		}
		commit(fmt.Sprintf("slow-%s-20ms", fsync), fmt.Sprintf("fsync %s longer, commit_delay 20ms", fsync), "20ms", fsync, 1, true)
	}
}

// sizeOf returns the bytes of all files below a directory, 0 without one. What
// goes while it counts is left out.
func sizeOf(dir string) float64 {
	sum := int64(0)
	if dir == "" {
		return 0
	}
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil
		}
		if info, err := e.Info(); err == nil {
			sum += info.Size()
		}
		return nil
	})
	return float64(sum)
}

// ackClock takes the time from each PUBLISH to its PUBACK.
type ackClock struct {
	sent [maxIDs + 1]time.Time
	took []time.Duration
}

func (c *ackClock) start(id uint16) {
	if c != nil {
		c.sent[id] = time.Now()
	}
}

func (c *ackClock) stop(id uint16) {
	if c != nil {
		c.took = append(c.took, time.Since(c.sent[id]))
	}
}

// acknowledging is one publisher whose messages a persistent session shall get,
// and how long their acknowledgements take.
type acknowledging struct {
	inflight int
	online   bool // the session's client is connected, and acknowledges
	// atLeast is how long an acknowledgement takes that needs the disk, or the
	// program has not got the slow disk that it was told of.
	atLeast time.Duration
}

func (a acknowledging) run(ctx context.Context, t target, l load) ([]phase, error) {
	w := fanOut(v311, 1, 1)
	w.window, w.lead, w.persistent = a.inflight, never/2, true
	g := newCrew(ctx)
	defer g.wg.Wait()
	pub := newPublisher(0, w)
	pub.clock = &ackClock{}
	s := newSubscriber(w, 0, []*publisher{pub})
	defer closeAll([]*publisher{pub}, []*subscriber{s})
	defer g.cancel(nil)
	var err error
	if s.c, err = join(g.ctx, t.addr, v311, readBytes, "bench-subscriber-0", false); err != nil {
		return nil, err
	}
	if err := s.c.subscribe(w.qos, w.filters(0)...); err != nil {
		return nil, err
	}
	if !a.online {
		err := s.c.leave()
		s.c = nil
		if err != nil {
			return nil, err
		}
	}
	if pub.c, err = join(g.ctx, t.addr, v311, readBytes, "bench-publisher-0", true); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(g.ctx, func() { closeAll([]*publisher{pub}, []*subscriber{s}) })
	defer stop()
	if a.online {
		g.run("subscriber", 0, s.run)
	}
	if pub.limit = l.messages; pub.limit == 0 {
		pub.limit, pub.until = millionMessages, time.Now().Add(l.time)
	}
	end, err := measure(t, "")
	if err != nil {
		return nil, err
	}
	if err := pub.run(g.ctx); err != nil {
		return nil, fmt.Errorf("publisher: %w%s", err, unfinished([]*publisher{pub}))
	}
	if a.online {
		if err := s.finish(g.ctx, pub.sent); err != nil {
			return nil, fmt.Errorf("subscriber: %w", err)
		}
	}
	ph, err := end(pub.sent, pub.sent)
	ph.unit = "messages"
	took := pub.clock.took
	if fast := quantile(took, 0); !a.online && fast < a.atLeast {
		return nil, fmt.Errorf("acknowledged after %s, with a disk that takes %s: -slow wants a program that is built with -tags slowdisk", fast, a.atLeast)
	}
	ph.values = map[string]float64{latencyP50: micros(quantile(took, 0.50)), latencyP99: micros(quantile(took, 0.99))}
	return []phase{ph}, err
}
