package main

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// against runs f against a fake broker in this process.
func against(t *testing.T, broken faults, timeout time.Duration, f func(context.Context, target) ([]phase, error)) ([]phase, error) {
	t.Helper()
	b, err := newFake(broken)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return f(ctx, target{b.addr(), os.Getpid()})
}

// Each scenario's deliveries are known from its messages.
func TestScenarios(t *testing.T) {
	want := map[string]uint64{
		"qos0-pairs": 1000, "qos1-pairs": 1000, "qos2-pairs": 1000, "qos1-fan-out": 50_000, "qos1-fan-in": 1000,
		"qos1-persistent-pairs": 1000, "stalled-reader": 1000, "offline": 1000, "offline-100": 1000,
	}
	phases := map[string]int{"stalled-reader": 2, "offline": 3, "offline-100": 3}
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			got, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
				return s.run(ctx, tg, load{messages: 1000})
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range got {
				if p.count != want[s.name] || p.messages != 1000 || p.elapsed <= 0 {
					t.Errorf("phase %q: %d of %d messages in %v, want %d of 1000", p.name, p.count, p.messages, p.elapsed, want[s.name])
				}
			}
			if n := max(1, phases[s.name]); len(got) != n {
				t.Errorf("%d phases, want %d", len(got), n)
			}
		})
	}
}

func TestByTime(t *testing.T) {
	for _, qos := range []byte{0, 1} {
		phases, err := against(t, faults{}, 30*time.Second, func(ctx context.Context, tg target) ([]phase, error) {
			return pairs(qos, false).run(ctx, tg, load{time: 50 * time.Millisecond})
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
	const soon, late = time.Second, 30 * time.Second
	online := func(w workload) func(context.Context, target) ([]phase, error) {
		return func(ctx context.Context, tg target) ([]phase, error) { return w.run(ctx, tg, load{messages: 400}) }
	}
	offline := func(ctx context.Context, tg target) ([]phase, error) { return runOffline(ctx, tg, 400, 100) }
	tests := []struct {
		name    string
		timeout time.Duration
		broken  faults
		run     func(context.Context, target) ([]phase, error)
		want    string
	}{
		{"lost", late, faults{lose: 50}, online(pairs(1, false)), "message 51 of publisher"},
		{"lost at the end", soon, faults{lose: 99}, online(pairs(0, false)), "99 of 100 messages"},
		{"repeated", late, faults{repeat: 50}, online(pairs(2, false)), "message 50 of publisher"},
		{"repeated at the end", late, faults{repeat: 99}, online(pairs(0, false)), "message 99 of publisher"},
		{"out of order", late, faults{swap: 50}, online(pairs(1, false)), "message 51 of publisher"},
		{"lower QoS", late, faults{lowerQoS: 50}, online(pairs(2, false)), "QoS 1, want 2"},
		{"never acknowledged", soon, faults{silent: 50}, online(pairs(1, false)), "publisher 3: 1 of 100 messages not acknowledged"},
		{"wrong acknowledgement", late, faults{wrongAck: 50}, online(pairs(1, false)), "packet type 4 for identifier 1051, want 0"},
		{"lost while offline", late, faults{lose: 50}, offline, "message 51 of publisher 0, want 50"},
		{"lost session", late, faults{forgetSession: true}, offline, "lost the session"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
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

func TestWorkloads(t *testing.T) {
	if w := pairs(0, false); !w.feeds(2, 2) || w.feeds(2, 3) {
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
	w := pairs(0, false)
	w.lead = 10
	w.subscribers = 2 // of four publishers: everyone's
	p := newPublisher(0, "a", w)
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
