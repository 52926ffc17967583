package broker

import (
	"fmt"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// mosquittoTopics are the topics below $SYS/broker/ of Mosquitto 2.0.11 as
// Debian has it, recorded with mosquitto_sub.
var mosquittoTopics = []string{
	"bytes/received",
	"bytes/sent",
	"clients/active",
	"clients/connected",
	"clients/disconnected",
	"clients/expired",
	"clients/inactive",
	"clients/maximum",
	"clients/total",
	"heap/current",
	"heap/maximum",
	"load/bytes/received/15min",
	"load/bytes/received/1min",
	"load/bytes/received/5min",
	"load/bytes/sent/15min",
	"load/bytes/sent/1min",
	"load/bytes/sent/5min",
	"load/connections/15min",
	"load/connections/1min",
	"load/connections/5min",
	"load/messages/received/15min",
	"load/messages/received/1min",
	"load/messages/received/5min",
	"load/messages/sent/15min",
	"load/messages/sent/1min",
	"load/messages/sent/5min",
	"load/publish/dropped/15min",
	"load/publish/dropped/1min",
	"load/publish/dropped/5min",
	"load/publish/received/15min",
	"load/publish/received/1min",
	"load/publish/received/5min",
	"load/publish/sent/15min",
	"load/publish/sent/1min",
	"load/publish/sent/5min",
	"load/sockets/15min",
	"load/sockets/1min",
	"load/sockets/5min",
	"messages/received",
	"messages/sent",
	"messages/stored",
	"publish/bytes/received",
	"publish/bytes/sent",
	"publish/messages/dropped",
	"publish/messages/received",
	"publish/messages/sent",
	"retained messages/count",
	"shared_subscriptions/count",
	"store/messages/bytes",
	"store/messages/count",
	"subscriptions/count",
	"uptime",
	"version",
}

// sys returns the retained messages below $SYS/broker/.
func (p *plane) sys() map[string]string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	all := make(map[string]string)
	p.retained.match("$SYS/#", func(topic string, m *storage.Message) bool {
		all[strings.TrimPrefix(topic, "$SYS/broker/")] = string(m.Payload)
		return true
	})
	return all
}

func TestSysNamesAndFormats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.Version = "v1.2" })
		p.b.announce(time.Now())
		got := p.b.plane.sys()
		want := append(slices.Clone(mosquittoTopics), "penstock/health")
		slices.Sort(want)
		if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
			t.Errorf("got\n%q\nwant\n%q", names, want)
		}
		number, average := regexp.MustCompile(`^\d+$`), regexp.MustCompile(`^\d+\.\d\d$`)
		for name, value := range got {
			switch {
			case name == "version" && value == "penstock version v1.2":
			case name == "uptime" && value == "0 seconds":
			case name == "penstock/health" && value == "ok":
			case strings.HasPrefix(name, "load/") && average.MatchString(value):
			case strings.Contains(name, "/") && !strings.HasPrefix(name, "load/") && number.MatchString(value):
			default:
				t.Errorf("%s is %q", name, value)
			}
		}
		if current, maximum := got["heap/current"], got["heap/maximum"]; current == "0" || len(maximum) < len(current) {
			t.Errorf("the heap is %s bytes, at most %s", current, maximum)
		}
		time.Sleep(123 * time.Second)
		p.b.announce(time.Now())
		if got := p.b.plane.sys()["uptime"]; got != "123 seconds" {
			t.Errorf("uptime: got %q, want 123 seconds", got)
		}
	})
}

// Each topic is explained to those who look at it.
func TestSysDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "\n## $SYS topics\n")
	section, _, _ = strings.Cut(section, "\n## ")
	check := func(name string) {
		t.Helper()
		if !strings.Contains(section, "`"+name+"`") {
			t.Errorf("`%s` is not below \"## $SYS topics\" in docs/operations.md: add it to one of the tables", name)
		}
	}
	for _, v := range sysValues {
		check(v.topic)
	}
	for _, l := range sysLoads {
		check(l.topic)
	}
	for _, s := range sysSpans {
		check("load/NAME/" + s.topic)
	}
}

// counted counts what a client's socket carries.
type counted struct {
	net.Conn
	in, out *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(int64(n))
	return n, err
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(int64(n))
	return n, err
}

func TestSysValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		begin := time.Now()
		p.b.announce(begin)
		var in, out atomic.Int64
		connect := func(o connectOptions) *client {
			t.Helper()
			c := p.dial()
			c.version = o.version
			c.c = counted{c.c, &in, &out}
			c.send(connectPacket(o))
			c.expect(typeConnack)
			return c
		}
		away := connect(connectOptions{id: "away", version: 5, expiry: 3600})    // 1 in, 1 out
		away.subscribe(1, "a/+", "b", "$share/g/c/#", "$share/g/d", "$SYS/none") // 1, 1
		away.disconnect()                                                        // 1, 0
		synctest.Wait()
		short := connect(connectOptions{id: "short", version: 5, expiry: 20}) // 1, 1
		short.subscribe(0, "$share/g/d")                                      // 1, 1
		short.disconnect()                                                    // 1, 0
		synctest.Wait()
		pub := connect(connectOptions{id: "pub", version: 4, clean: true}) // 1, 1
		pub.subscribe(2, "echo/#")                                         // 1, 1
		pub.publish("a/x", "12345", 1, true)                               // 1, 1
		pub.publish("echo/2", "1234567", 2, false)                         // 2, 2; delivered: 1 out, 1 in, 1 out, 1 in
		pub.take()
		pub.publish("echo/0", "12", 0, false) // 1; delivered: 1 out
		pub.take()
		pub.ping() // 1, 1
		refused := p.dial()
		refused.c = counted{refused.c, &in, &out}
		refused.send(connectPacket(connectOptions{id: "x", version: 4, will: &storage.Message{Topic: "$SYS/x"}})) // 1, 1
		refused.expect(typeConnack)
		refused.c.Close()
		old := connect(connectOptions{id: "twice", version: 5})   // 1, 1
		twice := connect(connectOptions{id: "twice", version: 5}) // 1, 1
		if reason := old.expectEnd(); reason != reasonTakenOver { // 0, 1
			t.Errorf("got a DISCONNECT with %#x, want one for the takeover", reason)
		}
		twice.disconnect() // 1, 0
		p.dial().c.Close() // a socket without a CONNECT
		synctest.Wait()

		time.Sleep(time.Until(begin.Add(10 * time.Second)))
		p.b.sweep(time.Now())
		got := p.b.plane.sys()
		all := strconv.Itoa(len(got) + 1)
		for topic, want := range map[string]string{
			"clients/total": "3", "clients/maximum": "3",
			"clients/connected": "1", "clients/active": "1",
			"clients/disconnected": "2", "clients/inactive": "2", "clients/expired": "0",
			"subscriptions/count": "4", "shared_subscriptions/count": "3",
			"retained messages/count": all, "messages/stored": strconv.Itoa(len(got) + 2), "store/messages/count": strconv.Itoa(len(got) + 2),
			"messages/received": "19", "messages/sent": "17",
			"publish/messages/received": "3", "publish/messages/sent": "2", "publish/messages/dropped": "0",
			"publish/bytes/received": "14", "publish/bytes/sent": "9",
			"bytes/received": fmt.Sprint(out.Load()), "bytes/sent": fmt.Sprint(in.Load()),
			"uptime": "10 seconds",
			// n in 10 s: 6n (1 - exp(-1/6))
			"load/sockets/1min": "6.45", "load/connections/1min": "5.53",
			"load/messages/received/1min": "17.50", "load/messages/sent/1min": "15.66",
			"load/publish/received/1min": "2.76", "load/publish/sent/1min": "1.84", "load/publish/dropped/1min": "0.00",
		} {
			if got[topic] != want {
				t.Errorf("%s: got %q, want %q", topic, got[topic], want)
			}
		}
		st := p.b.Stats()
		if want := int64(len("a/x") + len("12345")); st.Retained != 1 || st.RetainedBytes != want || st.Subscriptions != 7 {
			t.Errorf("Stats has %d retained messages of %d bytes, %d subscriptions, want 1 of %d, 7", st.Retained, st.RetainedBytes, st.Subscriptions, want)
		}
		size, err := strconv.ParseInt(got["store/messages/bytes"], 10, 64)
		if least := st.RetainedBytes + st.QueueBytes; err != nil || size <= least || size > least+int64(100*len(got)) {
			t.Errorf("store/messages/bytes: got %q, want some more than %d", got["store/messages/bytes"], least)
		}

		time.Sleep(20 * time.Second)
		p.b.sweep(time.Now())
		got = p.b.plane.sys()
		for topic, want := range map[string]string{"clients/total": "2", "clients/maximum": "3", "clients/expired": "1", "shared_subscriptions/count": "2"} {
			if got[topic] != want {
				t.Errorf("after a session expired, %s: got %q, want %q", topic, got[topic], want)
			}
		}
		pub.publish("a/x", "", 1, true)
		p.b.plane.drop(dropQoS0)
		p.b.plane.drop(dropQueueFull)
		p.b.plane.drop(dropACL) // not for want of room
		time.Sleep(10 * time.Second)
		p.b.sweep(time.Now())
		got = p.b.plane.sys()
		if got["publish/messages/dropped"] != "2" || got["load/publish/dropped/1min"] != "1.84" {
			t.Errorf("dropped: got %s and %s a minute, want 2 and 1.84", got["publish/messages/dropped"], got["load/publish/dropped/1min"])
		}
		if st := p.b.Stats(); st.Retained != 0 || st.RetainedBytes != 0 {
			t.Errorf("a retained message was deleted: Stats has %d of %d bytes, want none", st.Retained, st.RetainedBytes)
		}
	})
}

// The averages against a series computed by hand: 6 in the first 10 s, none in
// the next, 10 and then none in 20 s each.
func TestSysLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		p.b.announce(time.Now())
		for i, step := range []struct {
			sockets uint64
			in      time.Duration
			want    [3]string
		}{
			{6, 10 * time.Second, [3]string{"5.53", "1.18", "0.40"}},
			{0, 10 * time.Second, [3]string{"4.68", "1.14", "0.39"}},
			{10, 20 * time.Second, [3]string{"11.86", "3.00", "1.04"}},
			{0, 20 * time.Second, [3]string{"8.50", "2.81", "1.02"}},
		} {
			p.b.plane.sockets.Add(step.sockets)
			time.Sleep(step.in)
			p.b.announce(time.Now())
			all := p.b.plane.sys()
			if got := [3]string{all["load/sockets/1min"], all["load/sockets/5min"], all["load/sockets/15min"]}; got != step.want {
				t.Errorf("step %d: got %v, want %v", i, got, step.want)
			}
		}
	})
}

// Whoever subscribes gets all values, then those that change, all at QoS 0. A
// filter without "$SYS" gets none [MQTT-4.7.2-1].
func TestSysSubscriber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		p.b.announce(time.Now())
		everything := p.connect(connectOptions{id: "everything", version: 5, clean: true})
		everything.subscribe(2, "#", "+/broker/version")
		sub := p.connect(connectOptions{id: "sub", version: 5, clean: true})
		published := p.connect(connectOptions{id: "published", version: 5, clean: true})
		published.subscribe(8|2, "$SYS/broker/uptime") // Retain As Published
		shared := p.connect(connectOptions{id: "shared", version: 5, clean: true})
		shared.subscribe(2, "$share/g/$SYS/broker/uptime")
		equal(t, "shared subscriptions get no retained message", shared.got(), nil)

		sub.subscribe(2, "$SYS/#")
		sub.ping()
		got := map[string]string{}
		for len(sub.stash) > 0 {
			d := sub.take()
			if d.qos != 0 || !d.retain {
				t.Errorf("%s: got QoS %d, retain %v, want 0, true", d.topic, d.qos, d.retain)
			}
			got[strings.TrimPrefix(d.topic, "$SYS/broker/")] = d.payload
		}
		if want := p.b.plane.sys(); !maps.Equal(got, want) {
			t.Errorf("got\n%v\nwant\n%v", got, want)
		}

		for range 10 {
			time.Sleep(time.Second)
			p.b.sweep(time.Now())
		}
		synctest.Wait()
		sub.ping()
		changed := map[string]string{}
		for len(sub.stash) > 0 {
			d := sub.take()
			name := strings.TrimPrefix(d.topic, "$SYS/broker/")
			if changed[name] != "" || d.payload == got[name] || d.retain || d.qos != 0 {
				t.Errorf("%s: got %q, QoS %d, retain %v after %q, want only what has changed, once", d.topic, d.payload, d.qos, d.retain, got[name])
			}
			changed[name] = d.payload
		}
		for topic, want := range map[string]string{"uptime": "10 seconds", "clients/connected": "4", "version": "", "load/publish/dropped/1min": "", "penstock/health": ""} {
			if changed[topic] != want {
				t.Errorf("%s: got %q, want %q", topic, changed[topic], want)
			}
		}
		equal(t, "Retain As Published", published.got(), []string{"$SYS/broker/uptime=0 seconds(r)", "$SYS/broker/uptime=10 seconds(r)"})
		equal(t, "shared", shared.got(), []string{"$SYS/broker/uptime=10 seconds"})
		equal(t, "#", everything.got(), nil)
	})
}

func TestSysRights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		p.b.plane.acl.Store(newACL([]storage.ACLRule{
			{Action: "receive", Filter: "$SYS/broker/version"},
			{Action: "subscribe", Filter: "$SYS/broker/heap/#"},
		}))
		p.b.announce(time.Now())
		sub := p.connect(connectOptions{id: "sub", version: 5, clean: true})
		if codes := sub.subscribe(0, "$SYS/broker/+", "$SYS/broker/heap/current"); codes[0] != 0 || codes[1] != reasonNotAuthorized {
			t.Errorf("SUBACK: got % x, want 00 87", codes)
		}
		equal(t, "retained", sub.got(), []string{"$SYS/broker/uptime=0 seconds(r)"})
		p.b.cfg.Version = "another"
		time.Sleep(10 * time.Second)
		p.b.announce(time.Now())
		equal(t, "live", sub.got(), []string{"$SYS/broker/uptime=10 seconds"})
		if got := p.b.plane.sys()["version"]; got != "penstock version another" {
			t.Errorf("version: got %q", got)
		}
	})
}

// Nothing below $SYS touches the store: not what is retained, nor what goes to
// a persistent session of QoS 2 or past it while its client is away.
func TestSysIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		p.b.announce(time.Now())
		sub := p.connect(connectOptions{id: "sub", version: 5, expiry: 7200})
		for pass, what := range []string{"connected", "away"} {
			if pass == 0 {
				sub.subscribe(2, "$SYS/#")
			} else {
				sub.disconnect()
			}
			time.Sleep(time.Minute) // what was due is written
			before, got := p.b.Stats(), 0
			for range 1800 {
				time.Sleep(time.Second)
				p.b.sweep(time.Now())
				if pass == 0 {
					sub.ping()
					got += len(sub.stash)
					sub.stash = nil
				}
			}
			if pass == 0 && got < 180 {
				t.Errorf("got %d messages, want one every 10 s at least", got)
			}
			after := p.b.Stats()
			// One commit is a mark of the clock, for what was written before.
			if before.Journal.BytesWritten != after.Journal.BytesWritten || after.Journal.Commits > before.Journal.Commits+1 {
				t.Errorf("%s: %d bytes were written in %d commits, want none", what, after.Journal.BytesWritten-before.Journal.BytesWritten, after.Journal.Commits-before.Journal.Commits)
			}
			if after.QueueMessages != 0 {
				t.Errorf("%s: %d messages wait, want none", what, after.QueueMessages)
			}
		}
	})
}

// With the real clock, database and restart.
func TestSysOverRestart(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, func(c *Config, sc *storage.Config) {
		c.SysInterval = units.Duration(time.Second)
		sc.RetainFlush = units.Duration(time.Millisecond)
	})
	sub, _ := s.connect(connectOptions{id: "sub", version: 5, expiry: 3600})
	sub.subscribe(2, "$SYS/broker/uptime", "a")
	for _, want := range []string{"0 seconds", "1 seconds", "2 seconds"} {
		if d := sub.take(); d.payload != want && d.payload != "3 seconds" { // a second may be passed over
			t.Errorf("got %q, want %q", d.payload, want)
		}
	}
	sub.publish("a", "stored", 0, true)
	sub.ping()
	sub.disconnect()
	s.stop()

	s = start(t, dir)
	if got := s.b.plane.sys(); len(got) != 0 {
		t.Errorf("with sys_interval 0s, after a restart: got %v, want none", got)
	}
	if st := s.b.Stats(); st.Retained != 1 || st.QueueMessages != 0 {
		t.Errorf("%d retained messages, %d waiting, want 1, 0", st.Retained, st.QueueMessages)
	}
}

func TestSysOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.SysInterval = 0 })
		for range 3 {
			p.b.sweep(time.Now())
			time.Sleep(time.Hour)
		}
		if got := p.b.plane.sys(); len(got) != 0 {
			t.Errorf("got %v, want none", got)
		}
	})
	cfg := DefaultConfig()
	for _, tt := range []struct {
		value time.Duration
		ok    bool
	}{{0, true}, {time.Second, true}, {time.Hour, true}, {999 * time.Millisecond, false}, {time.Hour + 1, false}} {
		cfg.SysInterval = units.Duration(tt.value)
		if err := cfg.Validate(); (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), "broker.sys_interval") {
			t.Errorf("%v: got %v", tt.value, err)
		}
	}
}

func TestSysHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		p.b.announce(time.Now())
		sub := p.connect(connectOptions{id: "sub", version: 5, clean: true})
		sub.subscribe(0, "$SYS/broker/penstock/health")
		release := p.holdCommits()
		p.b.journal.Change(func(storage.Tx) error { return nil }, nil)
		time.Sleep(50 * time.Second) // twice is less than the write timeout, for nobody reads yet
		p.b.sweep(time.Now())
		release()
		time.Sleep(50 * time.Second)
		p.b.sweep(time.Now())
		got := sub.got()
		if len(got) != 3 || got[0] != "$SYS/broker/penstock/health=ok(r)" || !strings.Contains(got[1], "a commit has been running for") || got[2] != "$SYS/broker/penstock/health=ok" {
			t.Errorf("got %q, want ok, that a commit takes long, ok", got)
		}
	})
}

// Real sockets are read another way than pipes.
func TestNetworkCounters(t *testing.T) {
	s := start(t, t.TempDir())
	for _, version := range []byte{3, 4, 5} {
		before := s.b.Stats()
		var in, out atomic.Int64
		c := s.dial()
		c.version = version
		c.c = counted{c.c, &in, &out}
		c.send(connectPacket(connectOptions{id: "c", version: version, clean: true}))
		c.expect(typeConnack)
		c.subscribe(1, "a")
		c.publish("a", strings.Repeat("x", 100000), 1, false)
		c.take()
		c.ping()
		c.disconnect()
		eventually(t, "the client has left", func() bool { return s.b.Stats().Sessions == 0 })
		st := s.b.Stats()
		got := []uint64{st.NetworkIn - before.NetworkIn, st.NetworkOut - before.NetworkOut, st.PayloadIn - before.PayloadIn, st.PayloadOut - before.PayloadOut,
			st.PacketsIn - before.PacketsIn, st.PacketsOut - before.PacketsOut, st.Sockets - before.Sockets, st.Connects - before.Connects}
		want := []uint64{uint64(out.Load()), uint64(in.Load()), 100000, 100000, 6, 5, 1, 1}
		if !slices.Equal(got, want) {
			t.Errorf("v%d: got %d, want %d", version, got, want)
		}
	}
}
