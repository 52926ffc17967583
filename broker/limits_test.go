package broker

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// A connection above a bound is told so when it says CONNECT: the bound in all
// is 0x89, that of the listener 0x97, and 3.x has return code 3 for both.
func TestConnectionLimits(t *testing.T) {
	for _, tt := range []struct {
		name   string
		cfg    ListenerConfig
		total  int
		reason byte
	}{
		{"in all", ListenerConfig{}, 2, reasonBusy},
		{"of the listener", ListenerConfig{MaxConnections: 2}, 100, reasonQuota},
	} {
		s := start(t, t.TempDir(), func(c *Config, sc *storage.Config) {
			withListeners(tt.cfg)(c, sc)
			c.MaxConnections = tt.total
		})
		var in []*client
		for i := range 2 {
			c, _ := s.connect(connectOptions{id: fmt.Sprint(i), version: 4, clean: true})
			in = append(in, c)
		}
		for version, want := range map[byte]byte{3: 3, 4: 3, 5: tt.reason} {
			c := s.dial()
			if code := c.hello(connectOptions{id: "more", version: version, clean: true}); code != want {
				t.Errorf("%s, version %d: code %#x, want %#x", tt.name, version, code, want)
			}
			c.expectEnd()
		}
		if got := s.limited("connections"); got != 3 {
			t.Errorf("%s: %d counted, want 3", tt.name, got)
		}
		for _, c := range in {
			c.ping()
		}
		in[0].disconnect()
		eventually(t, "there is room again", func() bool {
			return s.dial().hello(connectOptions{id: "again", version: 4, clean: true}) == 0
		})
		eventually(t, "who was refused is forgotten", func() bool {
			s.b.mu.Lock()
			defer s.b.mu.Unlock()
			return s.b.slots.refused == 0 && s.b.slots.held == 2 && len(s.b.listeners[0].slots) == 2
		})
	}
}

// Only so many wait at a time to be told; more are closed at once.
func TestRefusalsAreBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) {
		c.MaxConnections = 1
		c.ConnectTimeout = units.Duration(10 * time.Minute)
	})
	c, _ := s.connect(connectOptions{id: "c", clean: true})
	for range maxRefused {
		s.dial()
	}
	eventually(t, "all wait", func() bool { return s.limited("connections") == maxRefused })
	one := s.dial()
	if _, _, err := one.tryRead(); err == nil || isTimeout(err) {
		t.Errorf("one more: %v, want it closed", err)
	}
	c.ping()
}

// Connections that say nothing give way to those that come later, in all and of
// a listener; clients that are connected never do.
func TestSilentFloodLocksNobodyOut(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"in all":          func(c *Config) { c.MaxConnections = 5 },
		"of the listener": func(c *Config) { c.Listeners[0].MaxConnections = 5 },
	} {
		s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) {
			c.ConnectTimeout = units.Duration(10 * time.Minute)
			change(c)
		})
		before, _ := s.connect(connectOptions{id: "before", clean: true})
		for range 4 {
			s.dial()
		}
		// The flood goes on while the clients come.
		stop := make(chan struct{})
		flood := make(chan struct{})
		go func() {
			defer close(flood)
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					if c, err := net.Dial("tcp", s.addr); err == nil {
						defer c.Close()
					}
				}
			}
		}()
		for i := range 3 {
			eventually(t, name+": a client is let in", func() bool {
				c := s.dial()
				c.send(connectPacket(connectOptions{id: fmt.Sprint(i), version: 4, clean: true}))
				_, body, err := c.tryRead()
				if err != nil || body[1] != 0 {
					c.c.Close()
					return false
				}
				return true
			})
		}
		before.ping()
		close(stop)
		<-flood
		if s.limited("evicted") == 0 {
			t.Errorf("%s: none was counted as evicted", name)
		}
		if n := s.b.Stats().Connections; n != 4 {
			t.Errorf("%s: %d clients, want 4", name, n)
		}
	}
}

// The bound in all is what the process has descriptors for.
func TestFileLimit(t *testing.T) {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		t.Fatal(err)
	}
	want := int(min(r.Cur, 1000000)) - spareFiles
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxConnections = 1000000 })
	if got := s.b.slots.max; got != want && r.Cur < 1000000 {
		t.Errorf("%d connections with %d files, want %d", got, r.Cur, want)
	}
}

// Every limit answers with its reason code, where the version has one, and is
// counted; what is below it goes on.
func TestLimitsAnswerAndCount(t *testing.T) {
	retained := func(c *client, topic string, version byte) string {
		c.send(c.publishPacket(topic, strings.Repeat("x", 600), 1, 1, 7))
		first, body, err := c.tryRead()
		switch {
		case err != nil:
			return "closed"
		case version == 5 && len(body) > 2:
			return fmt.Sprintf("%#x %#x", first>>4, body[2])
		}
		return fmt.Sprintf("%#x", first>>4)
	}
	for _, tc := range []struct {
		limit string
		set   func(*Config)
		do    func(s *server, c *client) string
		want  [2]string // of 3.1.1, of 5
	}{
		{"packet-size", func(c *Config) { c.MaxPacket = 2048 }, func(s *server, c *client) string {
			c.send(c.publishPacket("a", strings.Repeat("x", 3000), 0, 0, 0))
			return fmt.Sprintf("%#x", c.expectEnd())
		}, [2]string{"0x0", "0x95"}},
		{"packet-size", func(c *Config) { c.MaxConnect = 1024 }, func(s *server, c *client) string {
			other := s.dial()
			other.send(connectPacket(connectOptions{version: c.version, id: strings.Repeat("x", 2000), clean: true}))
			first, body, err := other.tryRead()
			if err != nil {
				return "closed"
			}
			return fmt.Sprintf("%#x %#x", first>>4, body[1])
		}, [2]string{"closed", "0x2 0x95"}},
		{"topic", func(c *Config) { c.MaxTopicLevels = 4 }, func(s *server, c *client) string {
			other := s.dial()
			other.send(connectPacket(connectOptions{version: c.version, clean: true, id: "w", will: &storage.Message{Topic: "a/b/c/d/e"}}))
			first, body, err := other.tryRead()
			if err != nil {
				return "closed"
			}
			return fmt.Sprintf("%#x %#x", first>>4, body[1])
		}, [2]string{"closed", "0x2 0x90"}},
		{"topic", func(c *Config) { c.MaxTopicLevels = 4 }, func(s *server, c *client) string {
			c.send(c.publishPacket("a/b/c/d/e", "x", 0, 0, 0))
			return fmt.Sprintf("%#x", c.expectEnd())
		}, [2]string{"0x0", "0x90"}},
		{"topic", func(c *Config) { c.MaxTopicBytes = 16 }, func(s *server, c *client) string {
			return fmt.Sprintf("%#x", c.subscribe(1, "a/bbbbbbbbbbbbbbbbbbbb")[0])
		}, [2]string{"0x80", "0x8f"}},
		{"subscriptions", func(c *Config) { c.MaxSubscriptions = 2 }, func(s *server, c *client) string {
			return fmt.Sprintf("%#x", c.subscribe(1, "a", "b", "c"))
		}, [2]string{"0x010180", "0x010197"}},
		{"subscriptions", func(c *Config) { c.MaxSubscriptions = 3 }, func(s *server, c *client) string {
			return fmt.Sprintf("%#x", c.subscribe(1, "a", "b", strings.Repeat("+/", 8)+"#")) // it counts for two
		}, [2]string{"0x010180", "0x010197"}},
		{"subscriptions", func(c *Config) { c.MaxAllSubs = 2 }, func(s *server, c *client) string {
			other, _ := s.connect(connectOptions{id: "other", clean: true})
			other.subscribe(1, "a")
			return fmt.Sprintf("%#x", c.subscribe(1, "a", "b"))
		}, [2]string{"0x0180", "0x0197"}},
		{"receive-maximum", func(c *Config) { c.ReceiveMaximum = 2 }, func(s *server, c *client) string {
			for i := range uint16(3) {
				c.send(c.publishPacket("a", "x", 2, 0, 1+i))
			}
			for {
				first, body, err := c.tryRead()
				if err != nil {
					return "closed"
				}
				if first>>4 == typeDisconnect {
					return fmt.Sprintf("%#x", body[0])
				}
				if first>>4 == typePubrec && body[1] == 3 { // 3.1.1 has no Receive Maximum
					return "taken"
				}
			}
		}, [2]string{"taken", "0x93"}},
		{"sessions", func(c *Config) { c.MaxSessions = 1 }, func(s *server, c *client) string {
			s.connect(connectOptions{id: "has one", version: c.version, expiry: 60})
			s.connect(connectOptions{id: "clean", version: c.version, clean: true})
			s.connect(connectOptions{id: "has one", version: c.version, expiry: 60})
			other := s.dial()
			other.send(connectPacket(connectOptions{id: "other", version: c.version, expiry: 60}))
			_, body := other.expect(typeConnack)
			return fmt.Sprintf("%#x", body[1])
		}, [2]string{"0x3", "0x97"}},
		{"retained", func(c *Config) { c.MaxRetained = 2000 }, func(s *server, c *client) string {
			first, again := retained(c, "r/1", c.version), retained(c, "r/1", c.version)
			retained(c, "r/2", c.version)
			return first + ", " + again + ", " + retained(c, "r/3", c.version)
		}, [2]string{"0x4, 0x4, closed", "0x4, 0x4, 0x4 0x97"}},
		{"retained", func(c *Config) { c.MaxRetained = 1024 }, func(s *server, c *client) string {
			other := s.dial()
			other.send(connectPacket(connectOptions{id: "other", version: c.version, clean: true, will: &storage.Message{Topic: "w", Payload: make([]byte, 1100)}}))
			_, body := other.expect(typeConnack)
			return fmt.Sprintf("%#x", body[1])
		}, [2]string{"0x3", "0x97"}},
	} {
		for i, version := range []byte{4, 5} {
			t.Run(fmt.Sprintf("%s v%d", tc.limit, version), func(t *testing.T) {
				s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { tc.set(c) })
				c, _ := s.connect(connectOptions{id: "c", version: version, clean: true})
				c.raw = true
				if got := tc.do(s, c); got != tc.want[i] {
					t.Errorf("got %s, want %s", got, tc.want[i])
				}
				want := uint64(1)
				if tc.want[i] == "taken" {
					want = 0
				}
				if got := s.b.Stats().Limited[tc.limit]; got != want {
					t.Errorf("counted %d times, want %d: %v", got, want, s.b.Stats().Limited)
				}
			})
		}
	}
}

// Behind a proxy the log says which client is one too many, and how many like
// it were left out.
func TestReportFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		var log syncBuffer
		p.b.log = slog.New(slog.NewTextHandler(&log, nil))
		l := newListener(p.b, ListenerConfig{Name: "behind", ProxyProtocol: true, MaxConnectionsPerAddress: 1})
		l.proxy = true
		arrive := func() {
			client, server := net.Pipe()
			defer client.Close()
			s := p.b.admit(l, server)
			if s == nil || !p.b.proxied(s, netip.MustParseAddr("198.51.100.7")) {
				t.Fatal("closed without a word")
			}
		}
		for range 4 { // the first one is let in
			arrive()
		}
		if got := log.String(); strings.Count(got, "address=198.51.100.7") != 1 || strings.Contains(got, "not_logged") {
			t.Errorf("at first:\n%s", got)
		}
		time.Sleep(time.Minute)
		arrive()
		if got := log.String(); strings.Count(got, "address=198.51.100.7 not_logged=2") != 1 {
			t.Errorf("a minute later:\n%s", got)
		}
	})
}
