package broker

import (
	"math"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"

	"penstock/storage"
)

// The topics below $SYS/broker, by which the broker tells its clients about
// itself. Names and formats are those of Mosquitto 2.0.11, for dashboards know
// them; docs/operations.md says what each of them counts here. They are
// retained messages of QoS 0 that no disk ever sees: at any other QoS one
// persistent subscription to $SYS/# would have the flash written every few
// seconds for as long as its client is away.

// sysRoot is what the broker's own topics begin with.
const sysRoot = "$SYS/"

// inMemory reports whether the retained message of a topic is never stored: the
// broker's own are not, what a bridge says of itself is.
func inMemory(topic string) bool { return strings.HasPrefix(topic, sysRoot) && !bridgeState(topic) }

// sysSlack is by how much an update may come early: it is driven by a ticker
// of a second, which is not exact.
const sysSlack = 500 * time.Millisecond

// sysTopics is what has to be remembered from one update to the next.
type sysTopics struct {
	mu          sync.Mutex
	at          time.Time // of the last update; zero before the first
	maxSessions int64
	counts      [len(sysLoads)]uint64
	loads       [len(sysLoads)][len(sysSpans)]float64
}

// sysState is what one update is made of.
type sysState struct {
	Stats
	Health
	version       string
	uptime        time.Duration
	maxSessions   int64
	ownRetained   int64 // retained messages below $SYS
	retainedBytes int64 // of all retained messages
}

// sysValues are the topics, below $SYS/broker/, and their values. A new one is
// a line here and one in docs/operations.md.
var sysValues = []struct {
	topic string
	value func(*sysState) string
}{
	{"version", func(s *sysState) string { return "penstock version " + s.version }},
	{"uptime", func(s *sysState) string { return strconv.FormatInt(int64(s.uptime.Seconds()), 10) + " seconds" }},
	{"penstock/health", (*sysState).health},

	{"clients/total", count((*sysState).sessions)},
	{"clients/maximum", count(func(s *sysState) int64 { return s.maxSessions })},
	{"clients/connected", count((*sysState).connected)},
	{"clients/active", count((*sysState).connected)}, // its old name
	{"clients/disconnected", count((*sysState).disconnected)},
	{"clients/inactive", count((*sysState).disconnected)}, // its old name
	{"clients/expired", counter(func(s *sysState) uint64 { return s.SessionsExpired })},

	{"subscriptions/count", count(func(s *sysState) int64 { return s.Subscriptions - s.SharedSubscriptions })},
	{"shared_subscriptions/count", count(func(s *sysState) int64 { return s.SharedSubscriptions })},
	{"retained messages/count", count((*sysState).retained)},
	{"messages/stored", count((*sysState).stored)}, // old name of the next
	{"store/messages/count", count((*sysState).stored)},
	{"store/messages/bytes", count(func(s *sysState) int64 { return s.retainedBytes + s.QueueBytes })},

	{"messages/received", counter(func(s *sysState) uint64 { return s.PacketsIn })},
	{"messages/sent", counter(func(s *sysState) uint64 { return s.PacketsOut })},
	{"publish/messages/received", counter(func(s *sysState) uint64 { return s.publishIn() })},
	{"publish/messages/sent", counter(func(s *sysState) uint64 { return s.publishOut() })},
	{"publish/messages/dropped", counter(func(s *sysState) uint64 { return s.overflowed() })},
	{"publish/bytes/received", counter(func(s *sysState) uint64 { return s.PayloadIn })},
	{"publish/bytes/sent", counter(func(s *sysState) uint64 { return s.PayloadOut })},
	{"bytes/received", counter(func(s *sysState) uint64 { return s.NetworkIn })},
	{"bytes/sent", counter(func(s *sysState) uint64 { return s.NetworkOut })},

	{"heap/current", func(*sysState) string { return heap("objects", "unused") }},
	{"heap/maximum", func(*sysState) string { return heap("objects", "unused", "free", "released") }},
}

// sysLoads are the counters whose growth in a minute is averaged, below
// $SYS/broker/load/.
var sysLoads = [...]struct {
	topic string
	count func(*sysState) uint64
}{
	{"messages/received", func(s *sysState) uint64 { return s.PacketsIn }},
	{"messages/sent", func(s *sysState) uint64 { return s.PacketsOut }},
	{"publish/received", (*sysState).publishIn},
	{"publish/sent", (*sysState).publishOut},
	{"publish/dropped", (*sysState).overflowed},
	{"bytes/received", func(s *sysState) uint64 { return s.NetworkIn }},
	{"bytes/sent", func(s *sysState) uint64 { return s.NetworkOut }},
	{"sockets", func(s *sysState) uint64 { return s.Sockets }},
	{"connections", func(s *sysState) uint64 { return s.Connects }},
}

// sysSpans are the times that loads are averaged over.
var sysSpans = [...]struct {
	topic   string
	minutes float64
}{{"1min", 1}, {"5min", 5}, {"15min", 15}}

func count(value func(*sysState) int64) func(*sysState) string {
	return func(s *sysState) string { return strconv.FormatInt(value(s), 10) }
}

func counter(value func(*sysState) uint64) func(*sysState) string {
	return func(s *sysState) string { return strconv.FormatUint(value(s), 10) }
}

func (s *sysState) sessions() int64 { return s.Sessions }

func (s *sysState) connected() int64 { return s.Connections }

// disconnected is a difference of numbers that are not read at one moment.
func (s *sysState) disconnected() int64 { return max(0, s.Sessions-s.Connections) }

func (s *sysState) retained() int64 { return s.Retained + s.ownRetained }

func (s *sysState) stored() int64 { return s.retained() + s.QueueMessages }

func (s *sysState) publishIn() uint64 {
	return s.MessagesIn[0] + s.MessagesIn[1] + s.MessagesIn[2]
}

func (s *sysState) publishOut() uint64 {
	return s.MessagesOut[0] + s.MessagesOut[1] + s.MessagesOut[2]
}

// overflowed counts what did not fit into a queue or an output buffer.
func (s *sysState) overflowed() uint64 {
	return s.Dropped[dropCauses[dropQoS0]] + s.Dropped[dropCauses[dropQueueFull]]
}

func (s *sysState) health() string {
	if len(s.Reasons) == 0 {
		return "ok"
	}
	return strings.Join(s.Reasons, "; ")
}

// heap returns the size of these classes of the Go heap together, in bytes.
func heap(classes ...string) string {
	sum := uint64(0)
	for _, class := range classes {
		sample := []metrics.Sample{{Name: "/memory/classes/heap/" + class + ":bytes"}}
		metrics.Read(sample)
		sum += sample[0].Value.Uint64()
	}
	return strconv.FormatUint(sum, 10)
}

// announce publishes the topics below $SYS whose values have changed, when
// that is due.
func (b *Broker) announce(now time.Time) {
	every := b.cfg.SysInterval.D()
	if every == 0 {
		return
	}
	s := &b.sys
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.at.IsZero() && now.Sub(s.at) < every-sysSlack {
		return
	}
	state := b.sysState(now)
	s.maxSessions = max(s.maxSessions, state.Sessions)
	state.maxSessions = s.maxSessions
	var batch batch
	for _, v := range sysValues {
		b.plane.announce("broker/"+v.topic, v.value(state), &batch)
	}
	s.average(state, now)
	for i, l := range sysLoads {
		for j, span := range sysSpans {
			b.plane.announce("broker/load/"+l.topic+"/"+span.topic, strconv.FormatFloat(s.loads[i][j], 'f', 2, 64), &batch)
		}
	}
	s.at = now
	batch.flush()
}

// average takes what was counted since the last update into the averages,
// each of which forgets a factor of e in its span. They begin at 0.
func (s *sysTopics) average(state *sysState, now time.Time) {
	minutes := now.Sub(s.at).Minutes()
	for i, l := range sysLoads {
		n := l.count(state)
		if !s.at.IsZero() {
			rate := float64(n-s.counts[i]) / minutes
			for j, span := range sysSpans {
				s.loads[i][j] = rate + math.Exp(-minutes/span.minutes)*(s.loads[i][j]-rate)
			}
		}
		s.counts[i] = n
	}
}

func (b *Broker) sysState(now time.Time) *sysState {
	s := &sysState{Stats: b.Stats(), Health: b.Health(), version: b.cfg.Version, uptime: now.Sub(b.started)}
	p := b.plane
	p.mu.RLock()
	s.ownRetained = int64(p.retained.own)
	s.retainedBytes = p.retained.bytes + p.retained.ownBytes
	p.mu.RUnlock()
	return s
}

// announce makes payload the value of a topic below $SYS, and tells those who
// have subscribed to it, unless it is the value already.
func (p *plane) announce(topic, payload string, b *batch) {
	topic = sysRoot + topic
	if m := p.Retained(topic); m != nil && string(m.Payload) == payload {
		return
	}
	p.publish(nil, &storage.Message{Topic: topic, Payload: []byte(payload), Retain: true}, b, nil)
}
