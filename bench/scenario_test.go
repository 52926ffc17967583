package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// against runs f against a fake broker in this process, which has a TLS
// listener too.
func against(t *testing.T, broken faults, timeout time.Duration, f func(context.Context, target) ([]phase, error)) ([]phase, error) {
	t.Helper()
	b, err := newFake(broken)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	dir := t.TempDir()
	if err := writeCertificate(dir); err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	secure := fakeOn(l, broken)
	defer secure.close()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return f(ctx, target{addr: b.addr(), tlsAddr: secure.addr(), pid: os.Getpid()})
}

// Each scenario's deliveries are known from its messages.
func TestScenarios(t *testing.T) {
	const messages = 200
	many := []string{"1000", "wildcards-wide"} // with 1,000 subscribers a few messages do
	perMessage := map[string]uint64{
		"qos0-fan-out-50": 50, "qos1-fan-out-50": 50, "qos2-fan-out-50": 50,
		"qos0-fan-out-50-v5": 50, "qos1-fan-out-50-v5": 50, "qos2-fan-out-50-v5": 50,
		"qos0-fan-out-1000": 1000, "qos1-fan-out-1000": 1000, "qos2-fan-out-1000": 1000, "wildcards-wide": 1000,
	}
	phases := map[string]int{"stalled-reader": 2, "offline": 3, "offline-100": 3, "offline-million": 3, "offline-hundred": 3, "offline-ten": 3, "idle": 2, "idle-tls": 2, "retained": 2}
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			l := load{messages: messages, clients: 20}
			for _, name := range many {
				if strings.HasSuffix(s.name, name) && !strings.HasPrefix(s.name, "topics") {
					l.messages = 4
				}
			}
			got, err := against(t, faults{}, time.Minute, func(ctx context.Context, tg target) ([]phase, error) {
				return s.run(ctx, tg, l)
			})
			if s.fsync > 0 && err != nil && strings.Contains(err.Error(), "-tags slowdisk") {
				return // the fake has no disk at all
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := max(1, phases[s.name]); len(got) != n {
				t.Errorf("%d phases, want %d", len(got), n)
			}
			if s.group == "idle" || s.group == "retained" {
				return // they have tests of their own
			}
			want := l.messages * max(1, perMessage[s.name])
			for _, p := range got {
				if p.count != want || p.messages != l.messages || p.elapsed <= 0 {
					t.Errorf("phase %q: %d of %d messages in %v, want %d of %d", p.name, p.count, p.messages, p.elapsed, want, l.messages)
				}
			}
		})
	}
}

// Every scenario has a place in the report, and its name once.
func TestScenarioNames(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range scenarios() {
		if seen[s.name] {
			t.Errorf("two scenarios are called %s", s.name)
		}
		seen[s.name] = true
		if !slices.ContainsFunc(groups(), func(g group) bool { return g.name == s.group }) {
			t.Errorf("%s: there is no group %q", s.name, s.group)
		}
	}
	for _, b := range bounds() {
		if !seen[b.scenario] {
			t.Errorf("bound %q: there is no scenario %q", b.what, b.scenario)
		}
	}
}

func TestByTime(t *testing.T) {
	for _, qos := range []byte{0, 1} {
		phases, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
			return pairs(v311, qos, payloadBytes).run(ctx, tg, load{time: 50 * time.Millisecond})
		})
		if err != nil {
			t.Fatalf("QoS %d: %v", qos, err)
		}
		if p := phases[0]; p.count == 0 || p.count != p.messages || p.elapsed < 50*time.Millisecond {
			t.Errorf("QoS %d: %d deliveries of %d messages in %v", qos, p.count, p.messages, p.elapsed)
		}
	}
}

// A broker that errs must never end in a figure.
func TestFaultsAreNoticed(t *testing.T) {
	// Where something never comes, the round ends by its deadline.
	const soon, late = 5 * time.Second, 30 * time.Second
	online := func(w workload) func(context.Context, target) ([]phase, error) {
		return func(ctx context.Context, tg target) ([]phase, error) { return w.run(ctx, tg, load{messages: 400}) }
	}
	retained := func(ctx context.Context, tg target) ([]phase, error) {
		return runRetained(ctx, tg, load{messages: 80})
	}
	steady := func(qos byte) func(context.Context, target) ([]phase, error) {
		return func(ctx context.Context, tg target) ([]phase, error) {
			return latency{qos: qos, pairs: 4, rate: 4000}.run(ctx, tg, load{messages: 400})
		}
	}
	visits := func(ctx context.Context, tg target) ([]phase, error) { return runConnects(ctx, tg, load{messages: 20}) }
	busy := func(ctx context.Context, tg target) ([]phase, error) {
		return idle{clients: 20}.run(ctx, tg, load{})
	}
	offline := func(ctx context.Context, tg target) ([]phase, error) { return runOffline(ctx, tg, 400, 100) }
	tests := []struct {
		name    string
		timeout time.Duration
		broken  faults
		run     func(context.Context, target) ([]phase, error)
		want    string
	}{
		{"lost", late, faults{lose: 50}, online(pairs(v311, 1, payloadBytes)), "message 51 of publisher"},
		{"lost at the end", soon, faults{lose: 99}, online(pairs(v311, 0, payloadBytes)), "99 of 100 messages"},
		{"repeated", late, faults{repeat: 50}, online(pairs(v311, 2, payloadBytes)), "message 50 of publisher"},
		{"repeated at the end", late, faults{repeat: 99}, online(pairs(v311, 0, payloadBytes)), "message 99 of publisher"},
		{"out of order", late, faults{swap: 50}, online(pairs(v311, 1, payloadBytes)), "message 51 of publisher"},
		{"lower QoS", late, faults{lowerQoS: 50}, online(pairs(v311, 2, payloadBytes)), "QoS 1, want 2"},
		{"never acknowledged", soon, faults{silent: 50}, online(pairs(v311, 1, payloadBytes)), "publisher 3: 1 of 100 messages not acknowledged"},
		{"wrong acknowledgement", late, faults{wrongAck: 50}, online(pairs(v311, 1, payloadBytes)), "packet type 4 for identifier 1051, want 0"},
		{"lost while offline", late, faults{lose: 50}, offline, "message 51 of publisher 0, want 50"},
		{"lost, narrow", late, faults{lose: 50}, online(narrow(8)), "message 58 of publisher 0, want 50"},
		{"lost, MQTT 5", late, faults{lose: 50}, online(pairs(v5, 2, 200)), "message 51 of publisher"},
		{"retained message lost", soon, faults{lose: 50}, retained, "1 of 80 retained messages lacking"},
		{"retained message repeated", late, faults{repeat: 50}, retained, "retained message 50: repeated"},
		{"retained message spoilt", late, faults{spoil: 50}, retained, "retained message 50: topic \"plant/line50/state\", QoS 1, RETAIN true: not as"},
		{"retained message with lower QoS", late, faults{lowerQoS: 50}, retained, "QoS 0, RETAIN true: not as"},
		{"lost at a fixed rate", late, faults{lose: 50}, steady(0), "message 51 of publisher"},
		{"wrong acknowledgement at a fixed rate", late, faults{wrongAck: 50}, steady(1), "for identifier 1051, want PUBACK for 51"},
		{"refused visitor", late, faults{refuse: true}, visits, "want the CONNACK 20 02"},
		{"lost in a burst", late, faults{lose: 50}, busy, "message 51 of client"},
		{"lost session", late, faults{forgetSession: true}, offline, "lost the session"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			phases, err := against(t, tt.broken, tt.timeout, tt.run)
			if err == nil {
				t.Fatalf("got %+v, want an error", phases)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q, want %q in it", err, tt.want)
			}
		})
	}
}

// narrow is one publisher whose topics have one subscriber each.
func narrow(topics int) workload {
	w := wildcards(true)
	w.topics, w.subscribers = topics, topics
	return w
}

func TestWorkloads(t *testing.T) {
	if w := pairs(v311, 0, payloadBytes); !w.feeds(2, 2) || w.feeds(2, 3) {
		t.Error("a pair is not a pair")
	}
	if w := (workload{publishers: 20, subscribers: 1}); !w.feeds(19, 0) {
		t.Error("fan-in leaves a publisher out")
	}
	if got, want := numbered("plant/line%d/state", 3), "plant/line3/state"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := numbered("plant/+/state", 3), "plant/+/state"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A publisher goes no further ahead of its slowest reader than its lead.
func TestLead(t *testing.T) {
	w := pairs(v311, 0, payloadBytes)
	w.lead = 10
	w.subscribers = 2 // of four publishers: everyone's
	p := newPublisher(0, w)
	p.c = &client{}
	slow, fast := newSubscriber(w, 0, []*publisher{p}), newSubscriber(w, 1, []*publisher{p})
	p.fill()
	p.fill()
	if p.sent != 10 {
		t.Errorf("nothing received: sent %d, want 10", p.sent)
	}
	fast.seen[0].Store(10)
	slow.seen[0].Store(3)
	p.fill()
	if p.sent != 13 {
		t.Errorf("the slowest has 3: sent %d, want 13", p.sent)
	}
	p.limit = 15
	slow.seen[0].Store(10)
	p.fill()
	if p.sent != 15 {
		t.Errorf("with a limit of 15: sent %d", p.sent)
	}
}

// A subscriber of one topic of many must get each message of that topic.
func TestDue(t *testing.T) {
	s := newSubscriber(narrow(10), 3, []*publisher{newPublisher(0, narrow(10))})
	for sent, want := range map[uint64]uint64{0: 0, 3: 0, 4: 1, 13: 1, 14: 2, 100: 10} {
		if got := s.due(sent); got != want {
			t.Errorf("of %d messages: %d, want %d", sent, got, want)
		}
	}
}

// The narrow filters match one topic each, the wide ones all the same.
func TestFilters(t *testing.T) {
	w := wildcards(true)
	for i := range 8 {
		for topic := range 8 {
			if got := matches(w.filters(i)[0], numbered(w.topic, topic)); got != (topic == i) {
				t.Errorf("%s matches topic %d: %t", w.filters(i)[0], topic, got)
			}
		}
	}
	w = wildcards(false)
	for i := range 8 {
		f := w.filters(i)
		if topic := numbered(w.topic, 0); !matches(f[0], topic) || matches(f[1], topic) {
			t.Errorf("%s: want the first of %q to match, and not the second", topic, f)
		}
	}
}

func TestIdle(t *testing.T) {
	got, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
		return idle{clients: 30}.run(ctx, tg, load{})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range got {
		if _, ok := p.values[bytesPerClient]; !ok || p.values[totalMemory] < 1<<20 {
			t.Errorf("phase %q: values %v", p.name, p.values)
		}
	}
}

func TestLatency(t *testing.T) {
	l := latency{qos: 1, pairs: 4, rate: 1000}
	if got, want := l.due(2, 5), 22*time.Millisecond; got != want {
		t.Errorf("message 5 of pair 2 is due at %s, want %s", got, want)
	}
	got, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
		return l.run(ctx, tg, load{messages: 80})
	})
	if err != nil {
		t.Fatal(err)
	}
	v := got[0].values
	if v[latencyP50] <= 0 || v[latencyP50] > v[latencyP99] || v[latencyP99] > v[latencyMax] {
		t.Errorf("values %v, want quantiles in their order", v)
	}
	if got[0].elapsed < 79*time.Millisecond {
		t.Errorf("80 messages at 1,000 a second took %s", got[0].elapsed)
	}
}

// Acknowledgements are timed, one for each message.
func TestAcknowledging(t *testing.T) {
	for _, online := range []bool{false, true} {
		got, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
			return acknowledging{inflight: 1000, online: online}.run(ctx, tg, load{messages: 5000})
		})
		if err != nil {
			t.Fatal(err)
		}
		if v := got[0].values; v[latencyP50] <= 0 || v[latencyP50] > v[latencyP99] || got[0].count != 5000 {
			t.Errorf("online %v: %d messages, values %v", online, got[0].count, v)
		}
	}
}

// A program that only claims to have a slow disk is found out.
func TestSlowDiskIsSlow(t *testing.T) {
	_, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
		return acknowledging{inflight: 10, atLeast: time.Minute}.run(ctx, tg, load{messages: 100})
	})
	if err == nil || !strings.Contains(err.Error(), "-tags slowdisk") {
		t.Errorf("got %v, want to be told of the tag", err)
	}
}

// What is configured for Penstock alone is measured with Penstock alone, and a
// slow disk with a program for it.
func TestRuns(t *testing.T) {
	for _, s := range scenarios() {
		own := s.commitDelay != "" || s.fsync > 0
		for _, b := range []broker{{name: penstockName}, {name: penstockName, slow: "x"}, {name: mosquittoName}} {
			if got, want := b.runs(s), !own || b.name == penstockName && (s.fsync == 0 || b.slow != ""); got != want {
				t.Errorf("%s, %+v: runs is %v", s.name, b, got)
			}
		}
		if strings.HasPrefix(s.name, "slow") != (s.fsync > 0) {
			t.Errorf("%s: with fsync %v; those with a slow disk are called slow", s.name, s.fsync)
		}
	}
}

// A publisher has as many messages in flight as its window says.
func TestWindowIsFilled(t *testing.T) {
	w := fanOut(v311, 1, 1)
	w.window, w.lead = 1000, never/2
	p := newPublisher(0, w)
	p.c = &client{}
	if p.fill(); p.inflight != 1000 {
		t.Errorf("%d in flight after the first write, want 1000", p.inflight)
	}
}

func TestQuantile(t *testing.T) {
	var d []time.Duration
	for i := range 1000 {
		d = append(d, time.Duration(1000-i))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 500, 0.99: 990, 0.999: 999, 1: 1000} {
		if got := quantile(d, q); got != want {
			t.Errorf("quantile %v: got %d, want %d", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("of none: got %d", got)
	}
}

func TestRetained(t *testing.T) {
	got, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
		return runRetained(ctx, tg, load{messages: 300})
	})
	if err != nil || got[0].count != 300 || got[1].count != 300*retainedSubscribers {
		t.Errorf("got %+v, error %v", got, err)
	}
}

func TestVisitorNumbers(t *testing.T) {
	var b [8]byte
	for n, want := range map[uint32]string{0: "00000000", 0x1a2b3c4d: "1a2b3c4d", 15: "0000000f"} {
		binary.BigEndian.PutUint64(b[:], hexDigits(n))
		if string(b[:]) != want {
			t.Errorf("%x: got %s", n, b)
		}
	}
}

func TestNumbers(t *testing.T) {
	for n, want := range map[int]string{5: "5", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := thousands(n); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	for n, want := range map[int]string{100: "100 B", 16 << 10: "16 KiB"} {
		if got := sizeName(n); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
