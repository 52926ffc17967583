package apitest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"penstock/api"
	"penstock/broker"
	"penstock/storage"
)

// Broker stands for the broker: it says what it was told to say.
type Broker struct {
	mu        sync.Mutex
	clients   []broker.ClientInfo
	health    broker.Health
	stats     broker.Stats
	published []broker.Message

	// OnPublish, if set before the server starts, decides what Publish
	// returns.
	OnPublish func(context.Context, broker.Message) error
}

// NewBroker returns a healthy broker with a few numbers to show.
func NewBroker() *Broker {
	return &Broker{
		health: broker.Health{Ready: true},
		stats: broker.Stats{
			Started: time.Now(), Connections: 2, ConnectionsTotal: 7, Sessions: 3, Subscriptions: 5, Retained: 4,
			MessagesIn: [3]uint64{10, 11, 12}, MessagesOut: [3]uint64{20, 21, 22},
			BytesIn: [3]uint64{1000, 1100, 1200}, BytesOut: [3]uint64{2000, 2100, 2200},
			Dropped: map[string]uint64{"qos0-slow-reader": 6}, QueueMessages: 8, QueueBytes: 800,
			Journal: storage.JournalStats{
				Commits: 4, Failures: 1, Records: 9, Elided: 13, BytesWritten: 900,
				CommitSeconds: storage.Histogram{Bounds: []float64{0.01, 0.1}, Counts: []uint64{3, 1, 0}, Sum: 0.05},
				GroupSize:     storage.Histogram{Bounds: []float64{1, 10}, Counts: []uint64{2, 2, 0}, Sum: 12},
			},
		},
	}
}

// Set changes what b says, under its lock.
func (b *Broker) Set(change func(clients *[]broker.ClientInfo, health *broker.Health, stats *broker.Stats)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.clients, &b.health, &b.stats)
}

// Published returns the messages that Publish accepted.
func (b *Broker) Published() []broker.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]broker.Message(nil), b.published...)
}

// Publish is broker.Broker's.
func (b *Broker) Publish(ctx context.Context, m broker.Message) error {
	if b.OnPublish != nil {
		if err := b.OnPublish(ctx, m); err != nil {
			return err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.published = append(b.published, m)
	return nil
}

// Clients is broker.Broker's.
func (b *Broker) Clients() []broker.ClientInfo {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.clients
}

// Listeners is broker.Broker's.
func (b *Broker) Listeners() []broker.ListenerInfo {
	return []broker.ListenerInfo{{Name: "tcp", Protocol: "mqtt", Connections: 2, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1883}}}
}

// Stats is broker.Broker's.
func (b *Broker) Stats() broker.Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats
}

// Health is broker.Broker's.
func (b *Broker) Health() broker.Health {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.health
}

// run runs srv until the test ends or the function returned is called, which
// returns what Run did.
func run(t testing.TB, srv *api.Server) func() error {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return stop
}
