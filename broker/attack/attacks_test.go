//go:build attack

package attack

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// attacks are all of them. A new one is a row here. Rates bound those attacks
// that are not about speed: the attacker must not win by taking the core that
// the broker would have on a machine of its own.
var attacks = []attack{
	{
		name:  "10,000 connections that say nothing",
		moved: `penstock_limited_total{limit="evicted"}`,
		last:  10 * time.Second,
		bound: 10_000 * 10 << 10, why: "10 kB for each connection: a goroutine and its state",
		stays:    8 * mib, // what Go keeps of 20,000 goroutines and 10,000 descriptors that ended
		connects: true,
		run: func(ctx context.Context, a *arena) {
			many(10, func(n int) {
				pace(ctx, 125, func(i int) {
					if i >= 1000 {
						return
					}
					if c, err := a.b.dial(1+n*25+i%25, a.b.mqtt); err == nil {
						a.keep(c)
						a.done.Add(1)
					}
				})
			})
		},
	},
	{
		name:  "headers that announce 256 MB",
		moved: `penstock_limited_total{limit="packet-size"}`,
		bound: 1000 * 20 << 10, why: "nothing is allocated for what was only announced: 20 kB for each of 1,000 connections",
		config:   `max_packet = "255MiB"`,
		connects: true,
		run: func(ctx context.Context, a *arena) {
			pace(ctx, 400, func(i int) {
				if i%2 == 0 { // not signed in
					if c, err := a.b.dial(1+i%250, a.b.mqtt); err == nil {
						_, _ = c.Write([]byte{connect << 4, 0xFF, 0xFF, 0xFF, 0x7F}) // refused at once
						a.keep(c)
						a.done.Add(1)
					}
					return
				}
				if i >= 2000 {
					return
				}
				if c := a.attacker(i%250, hello{id: fmt.Sprint("h", i), clean: true}); c != nil {
					_, _ = c.Write([]byte{publish << 4, 0xFB, 0xFF, 0xFF, 0x7F})
					a.done.Add(1)
				}
			})
		},
	},
	{
		name:  "truncated packets of every type",
		bound: 32 * mib, why: "nothing of a connection stays",
		connects: true,
		run: func(ctx context.Context, a *arena) {
			pace(ctx, 400, func(i int) {
				version := byte(3 + i%3)
				c, err := a.b.connect(1+i%250, hello{id: fmt.Sprint("t", i%100), version: version, clean: true})
				if err != nil {
					return // a takeover was quicker
				}
				all := everyPacket(c)
				p := all[i/3%len(all)]
				_, _ = c.Write(p[:1+rand.IntN(len(p))])
				c.Close()
				a.done.Add(1)
			})
		},
	},
	{
		name:  "topics of 65,535 slashes",
		moved: `penstock_limited_total{limit="topic"}`,
		bound: 32 * mib, why: "they are longer than allowed: nothing of them stays",
		connects: true,
		run: func(ctx context.Context, a *arena) {
			slashes := strings.Repeat("/", 65535)
			pace(ctx, 100, func(i int) {
				c, err := a.b.connect(1+i%250, hello{id: fmt.Sprint("slashes", i), clean: true})
				if err != nil {
					return
				}
				if i&1 == 0 {
					_, _ = c.Write(c.publishPacket(slashes, 0, 1, 0, []byte("x")))
				} else {
					_, _ = c.Write(c.subscribePacket(0, slashes, slashes+"+"))
				}
				_, _ = io.Copy(io.Discard, io.LimitReader(c.r, 6)) // cut off, or a SUBACK
				c.Close()
				a.done.Add(1)
			})
		},
	},
	{
		name:   "topics of 65,534 slashes, where they are allowed",
		config: "max_topic_bytes = 65535\nmax_topic_levels = 65535\nmax_retained = \"16MiB\"",
		bound:  64 * mib, stays: 16 * mib, why: "max_retained, and what SQLite writes meanwhile",
		moved: `penstock_limited_total{limit="retained"}`,
		run: func(ctx context.Context, a *arena) {
			slashes := strings.Repeat("/", 65534)
			c := a.attacker(0, hello{id: "slashes", clean: true})
			c.drain()
			pace(ctx, 5, func(i int) {
				if _, err := c.Write(c.publishPacket(fmt.Sprint(i, slashes[:65500]), 0, 1, 0, []byte("x"))); err == nil {
					a.done.Add(1)
				}
				_, _ = c.Write(c.subscribePacket(0, fmt.Sprint(i, slashes[:65500])))
			})
		},
	},
	{
		name:  "a million distinct topics, QoS 0",
		bound: 32 * mib, why: "1,024 topics are remembered for a connection",
		last: 8 * time.Second,
		run:  distinctTopics(0, 0, 130_000),
	},
	{
		name:  "distinct topics, QoS 1",
		bound: 32 * mib, why: "1,024 topics are remembered for a connection",
		run: distinctTopics(1, 0, 50_000),
	},
	{
		name:   "retained bomb",
		config: `max_retained = "16MiB"`,
		bound:  96 * mib, stays: 16 * mib, why: "max_retained, and what waits for the disk",
		moved: `penstock_limited_total{limit="retained"}`,
		run:   distinctTopics(1, 1, 20_000),
	},
	{
		name:   "retained bomb of 100 kB payloads",
		config: `max_retained = "16MiB"`,
		bound:  96 * mib, stays: 16 * mib, why: "max_retained, and what waits for the disk",
		moved: `penstock_limited_total{limit="retained"}`,
		run: func(ctx context.Context, a *arena) {
			c := a.attacker(0, hello{id: "retained", clean: true})
			c.drain()
			payload := make([]byte, 100<<10)
			pace(ctx, 200, func(i int) {
				_, _ = c.Write(c.publishPacket(fmt.Sprint("bomb/", i), 0, 1, 0, payload))
				a.done.Add(1)
			})
		},
	},
	{
		name:  "all retained messages asked for again and again",
		bound: 128 * mib, why: "what waits for a client holds messages that the retained store has anyway",
		prepare: func(a *arena) {
			c := a.attacker(0, hello{id: "keeper", clean: true})
			for i := range 20_000 {
				_, _ = c.Write(c.publishPacket(fmt.Sprintf("r/%d/%d", i%100, i), 0, 1, 0, []byte("retained")))
			}
			_, _ = c.Write([]byte{pingreq << 4, 0})
			_, _, _ = c.read()
		},
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("again", n), clean: true})
				c.drain()
				pace(ctx, 2, func(int) {
					_, _ = c.Write(c.subscribePacket(0, "r/#"))
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "subscription bomb",
		bound: 160 * mib, why: "600 B for each of 200,000 subscriptions (max_subscriptions_total), and garbage",
		moved: `penstock_limited_total{limit="subscriptions"}`,
		run: func(ctx context.Context, a *arena) {
			many(40, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("sub", n), clean: true})
				pace(ctx, 20, func(i int) {
					if i >= 100 {
						return
					}
					var filters []string
					for j := range 100 {
						filters = append(filters, fmt.Sprintf("bomb/%d/%d/+/x", n, i*100+j))
					}
					if c.subscribe(0, filters...) == nil {
						a.done.Add(100)
					}
				})
			})
		},
	},
	{
		name:  "SUBSCRIBE and UNSUBSCRIBE of 10,000 deep filters",
		bound: 160 * mib, why: "40 levels of 100 B for each of 2 times 10,000 filters, twice while they are exchanged",
		run: func(ctx context.Context, a *arena) {
			many(2, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("deep", n), clean: true})
				c.drain()
				var filters []string
				for i := range 10_000 {
					filters = append(filters, fmt.Sprintf("d/%d%s", i, strings.Repeat("/+", 38)))
				}
				sub, unsub := c.subscribePacket(0, filters...), c.unsubscribePacket(filters...)
				pace(ctx, 2, func(i int) {
					_, _ = c.Write(sub)
					_, _ = c.Write(unsub)
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "subscribe and unsubscribe in a loop",
		bound: 32 * mib, why: "nothing stays",
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("loop", n), clean: true})
				c.drain()
				pace(ctx, 1500, func(i int) {
					_, _ = c.Write(append(c.subscribePacket(0, "good/+"), c.unsubscribePacket("good/+")...))
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "10,000 share groups on the topic of others",
		bound: 32 * mib, why: "10,000 subscriptions",
		run: func(ctx context.Context, a *arena) {
			c := a.attacker(0, hello{id: "groups", clean: true})
			for i := range 100 {
				var filters []string
				for j := range 100 {
					filters = append(filters, fmt.Sprintf("$share/g%d/good/+", i*100+j))
				}
				if c.subscribe(0, filters...) != nil {
					return
				}
				a.done.Add(100)
			}
			c.drain()
			<-ctx.Done()
		},
	},
	{
		name:  "10,000 filters of + against long topics",
		bound: 160 * mib, why: "10,000 filters of 128 levels, and their trie",
		config: `max_packet = "4MiB"`,
		run: func(ctx context.Context, a *arena) {
			c := a.attacker(0, hello{id: "plus", clean: true})
			r := rand.New(rand.NewPCG(1, 2))
			levels := make([]string, 128)
			for range 100 {
				var filters []string
				for range 100 {
					for j := range levels {
						levels[j] = []string{"a", "+"}[r.IntN(2)]
					}
					filters = append(filters, strings.Join(levels, "/"))
				}
				if c.subscribe(0, filters...) != nil {
					return
				}
			}
			c.drain()
			// A message that matches all 10,000, and comes to one delivery.
			topic := strings.Repeat("a/", 127) + "a"
			p := a.attacker(1, hello{id: "plus-pub", clean: true})
			p.drain()
			pace(ctx, 20, func(i int) {
				// A new generation: nothing is remembered.
				_, _ = p.Write(append(p.subscribePacket(0, fmt.Sprint("x", i&1)), p.publishPacket(topic, 0, 0, 0, nil)...))
				a.done.Add(1)
			})
		},
	},
	{
		name:  "readers that never read, QoS 0",
		bound: 50 * 3 * mib, why: "1 MiB of output for each of 50 readers, and as much in the buffer's growth",
		moved: `penstock_dropped_messages_total{cause="qos0-slow-reader"}`,
		run:   neverRead(0, 50),
	},
	{
		name:  "readers that never read, QoS 1",
		bound: 256 * mib, why: "64 MiB wait for each of 4 readers",
		run: neverRead(1, 4),
	},
	{
		name:  "a publisher that never stops",
		bound: 32 * mib, why: "what a connection reads ahead, and writes ahead",
		run: func(ctx context.Context, a *arena) {
			s := a.attacker(0, hello{id: "flood-sub", clean: true})
			if s.subscribe(0, "flood") != nil {
				return
			}
			s.drain()
			c := a.attacker(1, hello{id: "flood", clean: true})
			c.drain()
			one := c.publishPacket("flood", 0, 0, 0, make([]byte, 100))
			piece := []byte(strings.Repeat(string(one), 200))
			for ctx.Err() == nil {
				_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // fails on Write
				if _, err := c.Write(piece); err != nil {
					return
				}
				a.done.Add(200)
			}
		},
	},
	{
		name:  "file descriptors exhausted",
		files: 200, refuses: true,
		bound: 32 * mib, why: "200 connections",
		run: func(ctx context.Context, a *arena) {
			stored := a.attacker(0, hello{id: "stored", clean: true})
			pace(ctx, 200, func(i int) {
				switch {
				case i < 400:
					if c, err := a.b.dial(1+i%250, a.b.mqtt); err == nil {
						a.keep(c)
						_, _ = c.Write(connectPacket(hello{id: fmt.Sprint("fd", i), clean: true}))
						a.done.Add(1)
					}
				case i%100 == 0:
					storageGoesOn(a, stored)
				}
			})
		},
		after: func(a *arena) {
			eventually(a.t, "a new connection after the attack", func() bool {
				c, err := a.b.connect(0, hello{id: "later", clean: true})
				if err == nil {
					storageGoesOn(a, c)
					c.Close()
				}
				return err == nil
			})
		},
	},
	{
		name:  "slow-loris on HTTP",
		bound: 32 * mib, why: "128 connections of an address of this machine at a time",
		run: func(ctx context.Context, a *arena) {
			var scraper sync.WaitGroup
			defer scraper.Wait()
			scraper.Go(func() {
				pace(ctx, 2, func(int) {
					began := time.Now()
					if a.b.metric("penstock_ready") != 1 || time.Since(began) > 2*time.Second {
						a.t.Errorf("/metrics took %v for an address that does not attack", time.Since(began))
					}
				})
			})
			many(500, func(n int) {
				for ctx.Err() == nil {
					c, err := a.b.dial(1, a.b.http)
					if err != nil {
						return
					}
					a.keep(c)
					for _, b := range []byte("GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("y", 100)) {
						if _, err := c.Write([]byte{b}); err != nil {
							break
						}
						a.done.Add(1)
						select {
						case <-ctx.Done():
							return
						case <-time.After(500 * time.Millisecond):
						}
					}
				}
			})
		},
	},
	{
		name:  "bad passwords",
		bound: 32 * mib, why: "nothing stays",
		connects: true,
		prepare: func(a *arena) {
			a.b.addDevice("device")
			a.b.addDevice("good")
			a.b.login = "good"
		},
		run: func(ctx context.Context, a *arena) {
			many(200, func(n int) {
				pace(ctx, 10, func(i int) {
					if c, err := a.b.connect(1+n, hello{id: fmt.Sprint("p", n), clean: true, user: "device", password: fmt.Sprint(i)}); err == nil {
						c.Close()
						a.t.Error("a wrong password was accepted")
					}
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "bad passwords over HTTP",
		bound: 64 * mib, why: "a hash at a time, of 19 MiB, and 256 connections",
		run: func(ctx context.Context, a *arena) {
			body := `{"username":"admin","password":"wrong"}`
			request := fmt.Sprintf("POST /bwiot/api/v1/login HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			many(10, func(n int) {
				pace(ctx, 20, func(i int) {
					c, err := a.b.dial(1+(n*20+i)%250, a.b.http)
					if err != nil {
						return
					}
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(patience)) // fails on Write
					_, _ = io.WriteString(c, request)
					_, _ = io.Copy(io.Discard, c)
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "acknowledgements of nothing",
		bound: 32 * mib, why: "nothing stays",
		run: func(ctx context.Context, a *arena) {
			many(3, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("ack", n), version: 5})
				c.drain()
				pace(ctx, 1000, func(i int) {
					id := u16(uint16(1 + i%65535))
					var p []byte
					for _, first := range []byte{puback << 4, pubrec << 4, pubrel<<4 | 2, pubcomp << 4} {
						p = append(p, packet(first, id)...)
					}
					_, _ = c.Write(p)
					a.done.Add(4)
				})
			})
		},
	},
	{
		name:  "PINGREQ without reading the answers",
		bound: 32 * mib, why: "2 MiB of answers wait for each of 4",
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("ping", n), clean: true})
				p := []byte(strings.Repeat("\xC0\x00", 500))
				pace(ctx, 500, func(i int) {
					_ = c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)) // fails on Write
					n, _ := c.Write(p)
					a.done.Add(int64(n / 2))
				})
			})
		},
	},
	{
		name:  "session bomb",
		bound: 64 * mib, why: "2 kB for each of 10,000 sessions, and the store's cache",
		run: func(ctx context.Context, a *arena) {
			many(20, func(n int) {
				pace(ctx, 100, func(i int) {
					c, err := a.b.connect(1+n, hello{id: fmt.Sprint("bomb-", n, "-", i)})
					if err != nil {
						return
					}
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "will bomb",
		bound: 64 * mib, why: "wills of 60 kB of 100 clients, each for the moment of its connection",
		run: func(ctx context.Context, a *arena) {
			watcher := a.attacker(0, hello{id: "watcher", clean: true})
			if watcher.subscribe(0, "will/#") != nil {
				return
			}
			watcher.drain()
			will := append(str("will/bomb"), str(strings.Repeat("w", 60_000))...)
			many(20, func(n int) {
				pace(ctx, 10, func(i int) {
					c, err := a.b.connect(1+n, hello{id: fmt.Sprint("will", n, "-", i%5), clean: true, will: will})
					if err != nil {
						return
					}
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:   "sessions that leave a will of 60 kB",
		config: `max_retained = "16MiB"`,
		bound:  64 * mib, stays: 16 * mib, why: "wills count against max_retained",
		moved: `penstock_limited_total{limit="retained"}`,
		run: func(ctx context.Context, a *arena) {
			will := append(properties([]byte{24, 0, 1, 0, 0}), append(str("will/late"), str(strings.Repeat("w", 60_000))...)...)
			many(20, func(n int) {
				pace(ctx, 10, func(i int) {
					c, err := a.b.connect(1+n, hello{id: fmt.Sprint("late-", n, "-", i), version: 5, clean: true, props: []byte{17, 0, 1, 0, 0}, will: will})
					if err != nil {
						return
					}
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "Receive Maximum 1 and no acknowledgement",
		bound: 96 * mib, why: "64 MiB wait for the client at most, then the oldest go",
		run: func(ctx context.Context, a *arena) {
			s := a.attacker(0, hello{id: "one", version: 5, clean: true, props: []byte{33, 0, 1}})
			if s.subscribe(1, "one") != nil {
				return
			}
			s.drain()
			p := a.attacker(1, hello{id: "one-pub", clean: true})
			p.drain()
			payload := make([]byte, 10_000)
			pace(ctx, 2000, func(i int) {
				_, _ = p.Write(p.publishPacket("one", 1, 0, uint16(1+i%60000), payload))
				a.done.Add(1)
			})
		},
	},
	{
		name:  "user property bomb",
		bound: 64 * mib, why: "a message of 1 MiB at a time, read and written",
		run: func(ctx context.Context, a *arena) {
			s := a.attacker(0, hello{id: "props-sub", version: 5, clean: true})
			if s.subscribe(0, "props") != nil {
				return
			}
			s.drain()
			c := a.attacker(1, hello{id: "props", version: 5, clean: true})
			c.drain()
			props := properties([]byte(strings.Repeat("\x26\x00\x01k\x00\x01v", 140_000)))
			p := packet(publish<<4, str("props"), props)
			pace(ctx, 10, func(int) {
				_, _ = c.Write(p)
				a.done.Add(1)
			})
		},
	},
	{
		name:  "topic alias abuse",
		bound: 32 * mib, why: "16 aliases of a connection",
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				pace(ctx, 100, func(i int) {
					c, err := a.b.connect(1+n, hello{id: fmt.Sprint("alias", n), version: 5, clean: true})
					if err != nil {
						return
					}
					var p []byte
					for alias := range uint16(20) { // 0 is malformed, and 17 too many
						p = append(p, packet(publish<<4, str(strings.Repeat("x", 4000)+fmt.Sprint(i, alias)), properties(append([]byte{35}, u16(1+alias)...)))...)
					}
					_, _ = c.Write(p)
					_, _ = io.Copy(io.Discard, c.r) // until it is cut off
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "takeover storm",
		bound: 32 * mib, why: "nothing stays",
		connects: true,
		run: func(ctx context.Context, a *arena) {
			many(50, func(n int) {
				pace(ctx, 10, func(i int) {
					a.done.Add(1)
					if c, err := a.b.connect(1+n, hello{id: "the-same", version: byte(4 + i%2)}); err == nil {
						a.keep(c)
					} // else taken over before its CONNACK
				})
			})
		},
	},
	{
		name:  "QoS 2 identifiers never released",
		bound: 64 * mib, why: "20 clients with 65,535 identifiers at most, of which 1,000 are acknowledged ahead",
		run: func(ctx context.Context, a *arena) {
			many(20, func(n int) {
				c := a.attacker(n, hello{id: fmt.Sprint("two", n)})
				c.drain()
				pace(ctx, 250, func(i int) {
					_, _ = c.Write(c.publishPacket("two", 2, 0, uint16(1+i%65535), []byte("x")))
					a.done.Add(1)
				})
			})
		},
	},
	{
		name:  "clients that come and go",
		bound: 32 * mib, why: "nothing stays",
		connects: true,
		run: func(ctx context.Context, a *arena) {
			many(4, func(n int) {
				pace(ctx, 200, func(i int) {
					c, err := a.b.connect(1+n, hello{id: fmt.Sprint("churn", n, i), clean: true})
					if err != nil {
						return
					}
					_ = c.subscribe(0, "churn/+")
					c.Close()
					a.done.Add(1)
				})
			})
		},
	},
}

// everyPacket returns a packet of each type that there is for c's version.
func everyPacket(c *client) [][]byte {
	id := u16(7)
	all := [][]byte{
		connectPacket(hello{id: "again", version: c.version, clean: true}),
		packet(connack<<4, []byte{0, 0}),
		c.publishPacket("t/0", 0, 0, 0, []byte("payload")),
		c.publishPacket("t/1", 1, 0, 7, []byte("payload")),
		c.publishPacket("t/2", 2, 1, 7, []byte("payload")),
		packet(puback<<4, id), packet(pubrec<<4, id), packet(pubrel<<4|2, id), packet(pubcomp<<4, id),
		c.subscribePacket(2, "t/+", "#"),
		packet(suback<<4, id, []byte{0}),
		c.unsubscribePacket("t/+", "#"),
		packet(11<<4, id),
		{pingreq << 4, 0},
		{13 << 4, 0},
		{disconnect << 4, 0},
		packet(auth<<4, []byte{0x18, 0}),
	}
	return all
}

// distinctTopics publishes to topics none of which was there before.
func distinctTopics(qos, flags byte, perSecond int) func(ctx context.Context, a *arena) {
	return func(ctx context.Context, a *arena) {
		c := a.attacker(0, hello{id: "topics", clean: true})
		c.drain()
		var p []byte
		pace(ctx, perSecond/100, func(i int) {
			p = p[:0]
			for j := range 100 {
				n := i*100 + j
				p = append(p, c.publishPacket(fmt.Sprintf("bomb/%d/%d", n%1000, n), qos, flags, uint16(1+n%60000), []byte("x"))...)
			}
			_ = c.SetWriteDeadline(time.Now().Add(patience)) // fails on Write
			if _, err := c.Write(p); err == nil {
				a.done.Add(100)
			}
		})
	}
}

// neverRead has readers subscribe to a stream of 20 MB a second and read none
// of it.
func neverRead(qos byte, readers int) func(ctx context.Context, a *arena) {
	return func(ctx context.Context, a *arena) {
		for n := range readers {
			c := a.attacker(n, hello{id: fmt.Sprint("deaf", n), clean: true})
			_ = c.Conn.(*net.TCPConn).SetReadBuffer(4096) // a detail
			if c.subscribe(qos, "stream") != nil {
				return
			}
		}
		p := a.attacker(readers, hello{id: "stream", clean: true})
		p.drain()
		payload := make([]byte, 10_000)
		var id atomic.Uint32
		pace(ctx, 2000, func(int) {
			_ = p.SetWriteDeadline(time.Now().Add(patience)) // fails on Write
			if _, err := p.Write(p.publishPacket("stream", qos, 0, uint16(1+id.Add(1)%60000), payload)); err == nil {
				a.done.Add(1)
			}
		})
	}
}

// storageGoesOn checks that a message is stored: its PUBACK leaves, for it is
// retained, only after a commit.
func storageGoesOn(a *arena, c *client) {
	if _, err := c.Write(c.publishPacket("stored", 1, 1, 1, []byte(time.Now().String()))); err != nil {
		a.t.Error(err)
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(patience)) // fails on Read
	if _, err := c.await(puback); err != nil {
		a.t.Errorf("nothing is stored: %v", err)
	}
}
