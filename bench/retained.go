package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

const (
	retainedMessages    = 10_000
	retainedSubscribers = 20
)

// runRetained publishes retained messages, each to a topic of its own, and then
// lets subscribers ask for all of them at the same time. Each must get each
// message once, with its topic, its payload and the RETAIN flag.
func runRetained(ctx context.Context, t target, l load) ([]phase, error) {
	count := retainedMessages
	if l.messages > 0 {
		count = int(l.messages)
	}
	w := manyTopics(count)
	w.qos, w.window, w.lead = 1, 1000, never/2
	g := newCrew(ctx)
	defer g.wg.Wait()
	pub := newPublisher(0, w)
	subscribers := make([]*subscriber, retainedSubscribers)
	defer closeAll([]*publisher{pub}, subscribers)
	defer g.cancel(nil)
	for i := range pub.templates {
		pub.templates[i].data[0] |= 1 // RETAIN
	}
	pub.limit = uint64(count)
	var err error
	if pub.c, err = join(g.ctx, t.addr, v311, readBytes, "bench-publisher-0", true); err != nil {
		return nil, err
	}
	end, err := measure(t, "publish")
	if err != nil {
		return nil, err
	}
	if err := pub.run(g.ctx); err != nil {
		return nil, fmt.Errorf("publisher: %w", err)
	}
	published, err := end(uint64(count), uint64(count))
	if err != nil {
		return nil, err
	}
	published.unit = "messages"

	for i := range subscribers {
		subscribers[i] = &subscriber{}
		if subscribers[i].c, err = join(g.ctx, t.addr, v311, readBytes, fmt.Sprintf("bench-subscriber-%d", i), true); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(g.ctx, func() { closeAll([]*publisher{pub}, subscribers) })
	defer stop()
	if end, err = measure(t, "deliver"); err != nil {
		return nil, err
	}
	for i, s := range subscribers {
		g.run("subscriber", i, func() error { return takeRetained(s.c, pub.templates) })
	}
	g.wg.Wait()
	if err := g.err(); err != nil {
		return nil, err
	}
	n := uint64(count * retainedSubscribers)
	delivered, err := end(n, n)
	return []phase{published, delivered}, err
}

// takeRetained subscribes to everything and takes what was published, in
// whatever order; then it pings, to see that nothing more comes.
func takeRetained(c *client, want []template) error {
	c.out = appendSubscribe(c.out, v311, 1, []string{"#"}, 1)
	seen := make([]bool, len(want))
	granted := false
	for left := len(want); ; {
		if err := c.flush(); err != nil {
			return err
		}
		if err := c.fill(); err != nil {
			return fmt.Errorf("%d of %d retained messages lacking: %w", left, len(want), err)
		}
		for {
			f, ok, err := c.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			switch f.kind() {
			case suback:
				if granted = bytes.Equal(f.body, []byte{0, 1, 1}); !granted {
					return fmt.Errorf("SUBACK % x, want QoS 1 granted", f.body)
				}
			case publish:
				m, err := f.message(v311)
				if err != nil {
					return err
				}
				if m.seq >= uint64(len(want)) || seen[m.seq] {
					return fmt.Errorf("retained message %d: repeated or never published", m.seq)
				}
				t := &want[m.seq]
				at := t.idAt - len(m.topic)
				if m.qos != 1 || !m.retain || !bytes.Equal(m.topic, t.data[at:t.idAt]) || !bytes.Equal(m.payload[stampBytes:], t.data[t.seqAt+8:]) {
					return fmt.Errorf("retained message %d: topic %q, QoS %d, RETAIN %t: not as published", m.seq, m.topic, m.qos, m.retain)
				}
				seen[m.seq] = true
				left--
				c.out = appendAck(c.out, puback, m.packetID)
				if left == 0 {
					c.out = append(c.out, pingreqPacket...)
				}
			case pingresp:
				if left > 0 || !granted {
					return errors.New("no SUBACK")
				}
				return nil
			default:
				return fmt.Errorf("packet type %d was not expected", f.kind())
			}
		}
	}
}
