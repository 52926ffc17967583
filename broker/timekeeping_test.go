package broker

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/storage"
)

// gateway is a broker on a box, without sockets, that is switched off and on.
type gateway struct {
	*rig
	box
	here []*party
}

// atGateway runs a test in a bubble, on a box with a good clock.
func atGateway(t *testing.T, test func(*testing.T, *gateway)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{}
		g.box.boot()
		g.set(0, true)
		g.rig = newRig(t, func(c *Config) { c.MachineTime = g.read })
		g.up()
		test(t, g)
	})
}

// up is what Broker does at a start.
func (g *gateway) up() {
	g.p.firstMark()
	g.tick()
}

func (g *gateway) tick() {
	g.p.keepTime()
	g.p.sweep(time.Now(), &g.b)
	if _, any := g.p.journal.Pending(); any {
		g.commit()
	}
}

// run lets the broker run for d.
func (g *gateway) run(d time.Duration) {
	step := time.Second
	if d > 2*time.Hour {
		step = time.Minute
	}
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(step, time.Until(end)))
		g.tick()
	}
}

// cut switches the machine off for d. before, if set, is what happens to its
// clock meanwhile.
func (g *gateway) cut(d time.Duration, before func()) {
	g.here = nil
	time.Sleep(d)
	g.box.boot()
	if before != nil {
		before()
	}
	g.rig.boot()
	g.up()
}

// stop stops the broker in order, and then does as cut.
func (g *gateway) stop(d time.Duration, before func()) {
	g.p.stopping.Store(true)
	for _, c := range g.here {
		g.p.leave(c.s, c, leaving{}, &g.b)
	}
	g.p.lastMark()
	g.commit()
	g.cut(d, before)
}

// arrive connects a client.
func (g *gateway) arrive(id string, expiry uint32, will *will) *party {
	l := &party{r: g.rig}
	o := g.p.open(l, opening{clientID: id, version: 5, expiry: expiry, window: 10, will: will}, &g.b)
	if o.durable != nil {
		g.commit()
	}
	l.s = o.s
	g.p.said(l.s, will != nil)
	l.acks.link = l
	l.s.attach(l, &l.acks, &g.b)
	g.load()
	g.here = append(g.here, l)
	return l
}

// lose ends a client's connection.
func (g *gateway) lose(l *party) {
	g.p.leave(l.s, l, leaving{}, &g.b)
	g.here = slices.DeleteFunc(g.here, func(o *party) bool { return o == l })
}

func (g *gateway) wantSession(when string, want bool) {
	g.t.Helper()
	if got := g.p.session("c") != nil; got != want {
		g.t.Errorf("%s: the session is there %v, want %v", when, got, want)
	}
}

// A session lasts as long as its client asked for, also over restarts: the time
// off counts. Where it cannot be known when the client left, it lasts longer,
// and not shorter.
func TestSessionExpiryOverRestarts(t *testing.T) {
	const minute, month = 60, 30 * 24 * 3600
	tests := []struct {
		name   string
		expiry uint32
		do     func(*gateway, *party)
		lasts  time.Duration // still, about; 0: it is gone
	}{
		{"connected at a stop, off for long", minute, func(g *gateway, c *party) { g.stop(2*time.Minute, nil) }, 0},
		{"connected at a stop, off shortly", minute, func(g *gateway, c *party) { g.stop(30*time.Second, nil) }, 30 * time.Second},
		{"away at a stop, off for long", minute, func(g *gateway, c *party) {
			g.lose(c)
			g.run(50 * time.Second)
			g.stop(20*time.Second, nil)
		}, 0},
		{"away at a stop, off shortly", minute, func(g *gateway, c *party) {
			g.lose(c)
			g.run(50 * time.Second)
			g.stop(5*time.Second, nil)
		}, 5 * time.Second},
		{"connected at a cut: nobody knows when that was", month, func(g *gateway, c *party) {
			g.run(50 * time.Minute)
			g.cut(40*day, nil)
		}, 30 * day},
		{"connected since a stop, then a cut", month, func(g *gateway, c *party) {
			g.stop(time.Minute, nil)
			g.arrive("c", month, nil)
			g.cut(40*day, nil)
		}, 30 * day},
		{"away at a cut, off for long", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(21*day, nil)
		}, 0},
		{"away at a cut, off shortly", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(19*day, nil)
		}, day},
		{"back before a cut", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.arrive("c", month, nil)
			g.cut(25*day, nil)
		}, 30 * day},
		{"back at a stop", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.arrive("c", month, nil)
			g.stop(25*day, nil)
		}, 5 * day},
		{"a cut each day, and it does not come back", month, func(g *gateway, c *party) {
			for range 20 {
				g.cut(12*time.Hour, nil)
				g.run(12 * time.Hour)
			}
		}, 10*day + 12*time.Hour},
		{"left with another expiry", minute, func(g *gateway, c *party) {
			g.p.leave(c.s, c, leaving{hasExpiry: true, expiry: month}, &g.b)
			g.here = nil
			g.run(time.Minute)
			g.cut(20*day, nil)
		}, 10*day - time.Minute},
		{"the clock jumps 56 years while it is away", month, func(g *gateway, c *party) {
			g.lose(c)
			g.in1970()
			g.run(10 * day)
			g.set(0, true)
			g.run(time.Hour)
		}, 20*day - time.Hour},
		{"the clock goes back an hour and the machine is off", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.set(-time.Hour, true)
			g.run(time.Hour)
			g.cut(19*day, nil)
		}, day - time.Hour},
		{"the clock jumps 56 years while the machine is off", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(time.Hour, func() { g.set(56*365*day, true) })
		}, 20 * day},
		{"1970 after a cut", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(21*day, g.in1970)
			g.run(time.Hour)
		}, 20*day - time.Hour},
		{"1970 after a cut, then the right time: off for long", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(21*day, g.in1970)
			g.run(time.Hour)
			g.wantSession("as long as nobody knows", true)
			g.set(0, true)
			g.run(time.Second)
		}, 0},
		{"1970 after a cut, then the right time: off shortly", month, func(g *gateway, c *party) {
			g.lose(c)
			g.run(10 * day)
			g.cut(18*day, g.in1970)
			g.run(time.Hour)
			g.set(0, true)
			g.run(time.Second)
		}, 2*day - time.Hour},
		{"1970 after a cut, was here, then the right time", 2 * minute, func(g *gateway, c *party) {
			g.cut(40*day, g.in1970)
			g.lose(g.arrive("c", 2*minute, nil))
			g.run(time.Minute)
			g.set(0, true)
			g.run(time.Second)
		}, time.Minute},
		{"1970 after a stop, then the right time", month, func(g *gateway, c *party) {
			g.stop(31*day, g.in1970)
			g.run(time.Minute)
			g.set(0, true)
			g.run(time.Second)
		}, 0},
		{"the process alone", minute, func(g *gateway, c *party) {
			g.in1970()
			boots, booted := g.boots, g.booted
			g.stop(30*time.Second, func() { g.boots, g.booted = boots, booted })
		}, 30 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			atGateway(t, func(t *testing.T, g *gateway) {
				c := g.arrive("c", tt.expiry, nil)
				g.commit()
				g.run(time.Second)
				tt.do(g, c)
				if tt.lasts == 0 {
					g.wantSession("at last", false)
					return
				}
				slack := max(2*time.Second, tt.lasts/100)
				g.run(tt.lasts - slack)
				g.wantSession("shortly before", true)
				g.run(2 * slack)
				g.wantSession("shortly after", false)
			})
		})
	}
}

// Messages expire, for a session that is away and as retained ones, by the
// time that has passed, with the machine off too, and say how long they have
// left. Those of a run whose clock is set late do not grow older by that.
func TestMessageExpiryOverRestarts(t *testing.T) {
	const hour = 3600e3
	publish := func(g *gateway, name string, ms int64) {
		pub := g.arrive("pub", 0, nil)
		pub.publish(storage.Message{Topic: "t/" + name, Payload: []byte(name), QoS: 1, Retain: true, Expires: g.p.now() + ms + 10e3}, 1) // the seconds are for rounding
		g.commit()
		g.lose(pub)
	}
	// left returns what is queued for c, and what is retained, with the minutes
	// that each has left.
	left := func(g *gateway) (queued, retained []string) {
		name := func(m *storage.Message) string { return fmt.Sprintf("%s %d", m.Payload, g.p.remains(m)/60e3) }
		now := g.p.now()
		g.p.retained.match("#", func(_ string, m *storage.Message) bool {
			if !g.p.expired(m, now) {
				retained = append(retained, name(m))
			}
			return true
		})
		c := g.arrive("c", storage.NeverExpires, nil)
		for i := range c.s.next {
			queued = append(queued, name(c.s.queue.at(i).msg))
		}
		slices.Sort(retained)
		return queued, retained
	}
	tests := []struct {
		name string
		do   func(*gateway)
		want []string
	}{
		{"off for three hours", func(g *gateway) { g.cut(3*time.Hour, nil) }, []string{"long 420"}},
		{"stopped for one", func(g *gateway) { g.stop(time.Hour, nil) }, []string{"short 60", "long 540"}},
		{"forward 56 years", func(g *gateway) { g.set(56*365*day, true); g.run(time.Hour) }, []string{"short 60", "long 540"}},
		{"back an hour", func(g *gateway) { g.set(-time.Hour, true); g.run(3 * time.Hour) }, []string{"long 420"}},
		{"forward while off", func(g *gateway) { g.cut(time.Hour, func() { g.set(56*365*day, true) }) }, []string{"short 120", "long 600"}},
		{"1970 after a cut", func(g *gateway) { g.cut(3*time.Hour, g.in1970); g.run(time.Hour) }, []string{"short 60", "long 540"}},
		{"1970 after a cut, then the right time", func(g *gateway) {
			g.cut(3*time.Hour, g.in1970)
			publish(g, "new", hour)
			g.run(10 * time.Minute)
			g.set(0, true)
			g.run(time.Second)
		}, []string{"long 410", "new 50"}},
		{"the same, and once more off", func(g *gateway) {
			g.cut(3*time.Hour, g.in1970)
			publish(g, "new", hour)
			g.run(10 * time.Minute)
			g.set(0, true)
			g.run(time.Second)
			g.cut(20*time.Minute, nil)
		}, []string{"long 390", "new 30"}},
		{"1970, and once more off", func(g *gateway) {
			g.cut(3*time.Hour, g.in1970)
			publish(g, "new", hour)
			g.run(10 * time.Minute)
			g.cut(20*time.Minute, nil)
		}, []string{"short 110", "long 590", "new 50"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			atGateway(t, func(t *testing.T, g *gateway) {
				c := g.arrive("c", storage.NeverExpires, nil)
				c.subscribe(1, "t/#")
				g.commit()
				g.lose(c)
				publish(g, "short", 2*hour)
				publish(g, "long", 10*hour)
				publish(g, "over", -10e3)
				g.run(time.Second)
				tt.do(g)
				queued, retained := left(g)
				if fmt.Sprint(queued) != fmt.Sprint(tt.want) {
					t.Errorf("queued: %v, want %v", queued, tt.want)
				}
				slices.Sort(tt.want)
				if fmt.Sprint(retained) != fmt.Sprint(tt.want) {
					t.Errorf("retained: %v, want %v", retained, tt.want)
				}
			})
		})
	}
}

// What a client has got at QoS 2 is sent again after a restart, also when it has
// expired: the client would else take the next one with its identifier for it.
func TestExpiredAtQoS2IsFinished(t *testing.T) {
	atGateway(t, func(t *testing.T, g *gateway) {
		c := g.arrive("c", storage.NeverExpires, nil)
		c.subscribe(2, "t")
		g.commit()
		c.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 2, Expires: g.p.now() + 60e3}, 1)
		g.commit()
		if len(c.deliveries) != 1 {
			t.Fatalf("got %v, want one delivery", c.deliveries)
		}
		g.cut(time.Hour, nil)
		if again := g.arrive("c", storage.NeverExpires, nil).deliveries; len(again) != 1 || again[0] != "x id1 qos2 dup true" {
			t.Errorf("after the restart: got %v, want the same once more", again)
		}
	})
}

// Many sessions that have become worth storing at once do not make one commit
// long.
func TestManyAwayAreStoredInParts(t *testing.T) {
	atGateway(t, func(t *testing.T, g *gateway) {
		const n = awayMost + 1000
		for i := range n {
			g.p.open(&party{r: g.rig}, opening{clientID: fmt.Sprint(i), version: 5, expiry: 30 * 24 * 3600}, &g.b)
		}
		g.commit()
		stored := func() (n int) {
			img, err := g.store.Load()
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range img.Sessions {
				if s.Left != 0 {
					n++
				}
			}
			return n
		}
		g.cut(time.Hour, nil)
		g.run(11 * time.Minute)
		if got := stored(); got != awayMost {
			t.Errorf("after the first mark: %d of %d are stored, want %d", got, n, awayMost)
		}
		g.run(10 * time.Minute)
		if got := stored(); got != n {
			t.Errorf("after the second: %d of %d are stored", got, n)
		}
	})
}

// A delayed will waits for what is left of its delay, also over a restart, and
// always long enough for its client to come back.
func TestWillDelayOverRestarts(t *testing.T) {
	const grace = 30 * time.Second
	tests := []struct {
		name string
		do   func(*gateway, *party)
		wait time.Duration // until it is published; 0: not at all
	}{
		{"stopped meanwhile", func(g *gateway, c *party) { g.lose(c); g.run(20 * time.Minute); g.stop(30*time.Minute, nil) }, 10 * time.Minute},
		{"cut meanwhile", func(g *gateway, c *party) { g.lose(c); g.run(20 * time.Minute); g.cut(30*time.Minute, nil) }, 10 * time.Minute},
		{"due while off", func(g *gateway, c *party) { g.lose(c); g.run(20 * time.Minute); g.cut(2*time.Hour, nil) }, grace},
		{"cut at once", func(g *gateway, c *party) { g.lose(c); g.cut(2*time.Hour, nil) }, grace + time.Hour},
		{"connected", func(g *gateway, c *party) { g.cut(2*time.Hour, nil) }, grace + time.Hour},
		{"from 1970", func(g *gateway, c *party) { g.lose(c); g.run(20 * time.Minute); g.cut(2*time.Hour, g.in1970) }, 50 * time.Minute}, // the last mark was ten minutes old
		{"from 1970, then the right time", func(g *gateway, c *party) {
			g.lose(c)
			g.run(20 * time.Minute)
			g.cut(2*time.Hour, g.in1970)
			g.run(10 * time.Second)
			g.set(0, true)
		}, grace - 10*time.Second},
		{"jump", func(g *gateway, c *party) { g.lose(c); g.set(365*day, true); g.run(20 * time.Minute) }, 40 * time.Minute},
		{"back in time", func(g *gateway, c *party) {
			g.lose(c)
			g.run(20 * time.Minute)
			g.cut(2*time.Hour, nil)
			g.arrive("c", 86400, nil)
		}, 0},
		{"gone before it was stored", func(g *gateway, c *party) {
			g.lose(g.arrive("c", 86400, hourly()))
			g.commit()
			g.cut(20*time.Minute, nil)
		}, 40 * time.Minute},
		{"back, gone, cut", func(g *gateway, c *party) {
			g.lose(c)
			g.run(50 * time.Minute)
			c = g.arrive("c", 86400, hourly())
			g.commit()
			g.lose(c)
			g.cut(20*time.Minute, nil)
		}, grace + time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			atGateway(t, func(t *testing.T, g *gateway) {
				c := g.arrive("c", 86400, hourly())
				g.commit()
				g.run(time.Second)
				tt.do(g, c)
				began := time.Now()
				for g.p.Retained("will") == nil && time.Since(began) < 5*time.Hour {
					g.run(time.Second)
				}
				took := time.Since(began)
				if g.p.Retained("will") == nil {
					took = 0
				}
				if d := took - tt.wait; d < -2*time.Second || d > 2*time.Second {
					t.Errorf("published after %v, want %v", took, tt.wait)
				}
			})
		})
	}
}

func hourly() *will {
	return &will{msg: &storage.Message{Topic: "will", Payload: []byte("gone"), QoS: 1, Retain: true}, delay: 3600, who: &principal{}}
}

// Time costs the flash little: a fleet that comes and goes nothing of its own,
// an idle broker a commit an hour.
func TestTimeCostsFewCommits(t *testing.T) {
	atGateway(t, func(t *testing.T, g *gateway) {
		for i := range 100 {
			g.lose(g.arrive(fmt.Sprint("c", i), 30*24*3600, nil))
		}
		g.run(time.Hour)
		before := g.store.Commits
		g.run(24 * time.Hour)
		if n := g.store.Commits - before; n < 22 || n > 25 {
			t.Errorf("idle for a day: %d commits, want one an hour", n)
		}
		before = g.store.Commits
		for range 24 * 6 {
			for i := range 100 {
				g.lose(g.arrive(fmt.Sprint("c", i), 30*24*3600, nil))
			}
			g.run(10 * time.Minute)
		}
		if n := g.store.Commits - before; n > 26 {
			t.Errorf("100 clients that come every ten minutes: %d commits in a day, want one an hour", n)
		}
		before = g.store.Commits
		for i := range 24 * 60 {
			g.set(time.Duration(i)*time.Hour, true)
			g.run(10 * time.Second)
		}
		if n := g.store.Commits - before; n > 4*61 {
			t.Errorf("a clock that is set every ten seconds: %d commits in four hours, want one a minute", n)
		}
	})
}

// The wall clock was set, the power goes soon after: what the clock jumped is not
// taken for time off.
func TestMarkFollowsTheClock(t *testing.T) {
	atGateway(t, func(t *testing.T, g *gateway) {
		g.lose(g.arrive("c", 30*24*3600, nil))
		g.run(9 * day)
		g.set(60*day, true)
		g.run(2 * time.Second)
		g.cut(time.Hour, nil)
		g.wantSession("after the jump and a cut", true)
	})
}

// The whole broker, with its database and its sockets.
func TestTimeWithTheWholeBroker(t *testing.T) {
	var now atomic.Pointer[MachineTime]
	now.Store(&MachineTime{Wall: boxBegins, Synced: true, Boot: "1", Uptime: 1000})
	read := func() MachineTime { return *now.Load() }
	dir := t.TempDir()
	boot := func() *server {
		return start(t, dir, func(c *Config, _ *storage.Config) { c.MachineTime = read })
	}
	publish := func(s *server) {
		pub, _ := s.connect(connectOptions{id: "pub", version: 5, clean: true})
		pub.send(packet(typePublish<<4|2|1, str("a"), u16(1), props5([]byte{propMessageExpiry}, u32(100)), []byte("x")))
		pub.expectAck(typePuback, 1)
		pub.c.Close()
	}
	o := connectOptions{id: "c", version: 5, expiry: 60}
	// after restarts the broker with what the clocks say then, and returns what
	// the client finds.
	after := func(s *server, m MachineTime) (_ *server, present bool, got int) {
		s.stop()
		now.Store(&m)
		s = boot()
		c, present := s.connect(o)
		defer c.c.Close() // or the stop waits for it
		c.subscribe(1, "a")
		return s, present, len(c.got())
	}
	s := boot()
	c, _ := s.connect(o)
	publish(s)
	c.c.Close()
	s, present, got := after(s, MachineTime{Wall: boxBegins + 30e3, Synced: true, Boot: "2", Uptime: 1000})
	if !present || got != 1 {
		t.Errorf("off for 30 s: session present %v and %d messages, want it and one", present, got)
	}
	s, present, got = after(s, MachineTime{Wall: boxBegins + 30e3 + 365*24*3600e3, Synced: true, Boot: "2", Uptime: 41e3})
	if !present || got != 1 {
		t.Errorf("restarted for 40 s with a clock that jumps a year: session present %v and %d messages, want it and one", present, got)
	}
	s, present, got = after(s, MachineTime{Wall: 5000, Boot: "3", Uptime: 1000})
	if !present || got != 1 {
		t.Errorf("off, and now it is 1970: session present %v and %d messages, want it and one", present, got)
	}
	// The time is right again: that is 2 minutes later than when it was stopped.
	now.Store(&MachineTime{Wall: boxBegins + 30e3 + 365*24*3600e3 + 120e3, Synced: true, Boot: "3", Uptime: 1000})
	s.b.sweep(time.Now())
	late, _ := s.connect(connectOptions{id: "late", version: 5, clean: true})
	late.subscribe(1, "a")
	if n := len(late.got()); n != 0 {
		t.Errorf("off for two minutes, as is known now: %d messages, want none", n)
	}
	late.c.Close()
	if s.b.plane.session("c") == nil {
		t.Error("the session of a client that was here since is gone")
	}
	_, present, _ = after(s, MachineTime{Wall: boxBegins + 30e3 + 365*24*3600e3 + 240e3, Synced: true, Boot: "4", Uptime: 1000})
	if present {
		t.Error("off for two minutes: the session is present, want it gone")
	}
}
