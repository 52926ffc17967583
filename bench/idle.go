package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

const (
	idleTimeout = 3 * time.Minute
	idleWorkers = 8
	idleWave    = 25      // clients of a worker that are busy at the same time
	idleBurst   = 64      // messages that each client sends to itself when it is busy,
	idlePayload = 1 << 10 // of so many bytes each

	idleName      = "idle" // names of its phases
	idleAgainName = "idle again after a burst"
)

// idle is many clients that are connected and do nothing.
type idle struct {
	clients int
	tls     bool
}

// Names of the values of its phases.
const (
	bytesPerClient = "bytes per client"
	totalMemory    = "resident bytes"
)

// run measures how much more memory the broker has resident with the clients
// than without: when they have connected and subscribed, and again when each
// has been busy once.
func (i idle) run(ctx context.Context, t target, l load) ([]phase, error) {
	if l.clients > 0 {
		i.clients = l.clients
	}
	if err := sleep(ctx, l.settle); err != nil {
		return nil, err
	}
	before, err := memoryOf(t.pid, "VmRSS")
	if err != nil {
		return nil, err
	}
	after := func(name string) (phase, error) {
		if err := sleep(ctx, l.settle); err != nil {
			return phase{}, err
		}
		now, err := memoryOf(t.pid, "VmRSS")
		return phase{name: name, values: map[string]float64{
			bytesPerClient: (float64(now) - float64(before)) / float64(i.clients),
			totalMemory:    float64(now),
		}}, err
	}

	all := make([]*client, i.clients)
	defer func() {
		for _, c := range all {
			if c != nil {
				c.disconnect()
			}
		}
	}()
	err = i.workers(ctx, func(ctx context.Context, from, to int) error {
		in := make([]byte, smallBytes)
		for n := from; n < to; n++ {
			c, err := i.join(ctx, t, n, in)
			if err != nil {
				return err
			}
			all[n] = c
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	quiet, err := after(idleName)
	if err != nil {
		return nil, err
	}
	err = i.workers(ctx, func(ctx context.Context, from, to int) error {
		in := make([]byte, smallBytes)
		for n := from; n < to; n += idleWave {
			wave := all[n:min(n+idleWave, to)]
			for k, c := range wave {
				if err := c.burst(n + k); err != nil {
					return fmt.Errorf("client %d: %w", n+k, err)
				}
			}
			for k, c := range wave {
				if err := c.own(n+k, in); err != nil {
					return fmt.Errorf("client %d: %w", n+k, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	again, err := after(idleAgainName)
	return []phase{quiet, again}, err
}

// workers shares the clients among some goroutines.
func (i idle) workers(ctx context.Context, f func(ctx context.Context, from, to int) error) error {
	g := newCrew(ctx)
	defer g.cancel(nil)
	for w := range idleWorkers {
		g.run("worker", w, func() error {
			return f(g.ctx, i.clients*w/idleWorkers, i.clients*(w+1)/idleWorkers)
		})
	}
	g.wg.Wait()
	return g.err()
}

func idleTopic(n int) string { return fmt.Sprintf("plant/line%d/state", n) }

// join connects a client and subscribes it to a topic of its own. It borrows in.
func (i idle) join(ctx context.Context, t target, n int, in []byte) (*client, error) {
	addr := t.addr
	if i.tls {
		addr = t.tlsAddr
	}
	c, err := dial(ctx, addr, v311, 0)
	if err != nil {
		return nil, err
	}
	c.in = in
	defer func() { c.in, c.out = nil, nil }()
	if i.tls {
		c.conn = tls.Client(c.conn, clientTLS())
	}
	if _, err = c.connect(fmt.Sprintf("bench-idle-%d", n), true); err == nil {
		err = c.subscribe(0, idleTopic(n))
	}
	if err == nil && c.w > c.r {
		err = errors.New("more came than was asked for")
	}
	c.r, c.w = 0, 0
	if err != nil {
		_ = c.conn.Close()
		return nil, err
	}
	return c, nil
}

// burst sends messages to the topic that the client is itself subscribed to.
func (c *client) burst(n int) error {
	t := newTemplate(v311, idleTopic(n), 0, idlePayload, uint32(n))
	for seq := range idleBurst {
		c.out = t.append(c.out, 0, uint64(seq))
	}
	defer func() { c.out = nil }()
	return c.flush()
}

// own takes back what burst has sent. It borrows in.
func (c *client) own(n int, in []byte) error {
	c.in, c.r, c.w = in, 0, 0
	defer func() { c.in, c.r, c.w = nil, 0, 0 }()
	for seq := range idleBurst {
		f, err := c.await(publish)
		if err != nil {
			return err
		}
		m, err := f.message(v311)
		if err != nil {
			return err
		}
		if m.publisher != uint32(n) || m.seq != uint64(seq) || len(m.payload) != idlePayload {
			return fmt.Errorf("message %d of client %d with %d bytes, want %d of %d with %d",
				m.seq, m.publisher, len(m.payload), seq, n, idlePayload)
		}
	}
	return nil
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
