package main

import "math"

// A group is scenarios that share a section of the report: one table with a
// line for each of them.
type group struct {
	name    string
	title   string
	text    string
	columns []column
	charts  []chartOf
	claim   claim
}

// A column is a figure that is shown of each broker.
type column struct {
	name   string
	format string
	ratio  bool // also the second broker's in terms of the first's
	of     func(s sample, p phase) float64
}

// value returns the figure of one phase of a round, false when it has none.
func (c column) value(s sample, p phase) (float64, bool) {
	v := c.of(s, p)
	return v, !math.IsNaN(v) && !math.IsInf(v, 0)
}

func cpuPerMillion(what string) column {
	return column{"CPU s per million " + what, "%.3f", true, func(_ sample, p phase) float64 { return p.cpu.Seconds() / float64(p.count) * 1e6 }}
}

func perSecond(what string) column {
	return column{what + " per second", "%.0f", true, func(_ sample, p phase) float64 { return float64(p.count) / p.elapsed.Seconds() }}
}

// valued shows one of the values that a phase has under a name.
func valued(value, name, format string, ratio bool) column {
	return column{name, format, ratio, func(_ sample, p phase) float64 {
		if v, ok := p.values[value]; ok {
			return v
		}
		return math.NaN()
	}}
}

var (
	cpuColumn  = cpuPerMillion("deliveries")
	rateColumn = perSecond("deliveries")
	peakColumn = column{"peak RSS, MiB", "%.1f", false, func(s sample, _ phase) float64 { return mebibytes(s.peak) }}
	diskColumn = column{"bytes to disk per message", "%.1f", false, func(_ sample, p phase) float64 { return float64(p.written) / float64(p.messages) }}
	timeColumn = column{"seconds", "%.2f", true, func(_ sample, p phase) float64 { return p.elapsed.Seconds() }}
	cpuTotal   = column{"CPU s", "%.2f", true, func(_ sample, p phase) float64 { return p.cpu.Seconds() }}

	filesColumn = column{"data directory, MiB", "%.1f", false, func(_ sample, p phase) float64 {
		if v, ok := p.values[fileSize]; ok {
			return v / (1 << 20)
		}
		return math.NaN()
	}}
	ackP50 = valued(latencyP50, "p50, µs", "%.0f", true)
	ackP99 = valued(latencyP99, "p99, µs", "%.0f", true)

	connectRate = perSecond("connections")
	connectCPU  = column{"CPU ms per 1,000 connections", "%.1f", true, func(_ sample, p phase) float64 {
		return p.cpu.Seconds() / float64(p.count) * 1e6
	}}
	clientBytes = valued(bytesPerClient, "bytes per client", "%.0f", true)
	p50Column   = valued(latencyP50, "p50, µs", "%.0f", true)
	p99Column   = valued(latencyP99, "p99, µs", "%.0f", true)
	maxColumn   = valued(latencyMax, "max, µs", "%.0f", false)
)

var workloadColumns = []column{cpuColumn, rateColumn, peakColumn}

const inWindow = "100 messages in flight each (QoS 1 and 2), payloads of 100 bytes"

// groups returns the sections of the report in their order.
func groups() []group {
	return []group{
		{
			name: "pairs", title: "Pairs", columns: workloadColumns,
			claim: claim{[]string{kernelKind, "broker"}, "Reading and writing sockets is the largest part; then parsing, routing and copying into the subscriber's output."},
			text:  "4 publishers, each to a topic of its own with 1 subscriber; clean sessions, " + inWindow + ".",
		}, {
			name: "fan-out", title: "Fan-out", columns: workloadColumns,
			claim: claim{[]string{kernelKind, "broker", "locks"}, "To 50 subscribers it is each connection's lock, whose release waits for the bytes just copied into its output; to 1,000, where each subscriber gets a few messages at a time, it is a write(2) for each."},
			text:  "1 publisher with 100 messages in flight (QoS 1 and 2), 50 or 1,000 subscribers of its topic.",
		}, {
			name: "fan-in", title: "Fan-in", columns: workloadColumns,
			claim: claim{[]string{kernelKind, "broker"}, "As with pairs: sockets first, then parsing and routing."},
			text: "20 publishers, each to a topic of its own with 64 messages in flight (QoS 1 and 2), 1 subscriber of them all with a wildcard. " +
				"Mosquitto reads one packet of each client in turn, so that the subscriber's acknowledgements wait behind what 20 publishers send.",
		}, {
			name: "payload", title: "Size of the payload", columns: workloadColumns,
			claim: claim{[]string{kernelKind}, "The kernel's part grows with the payload: it copies the bytes in and out."},
			text:  "4 pairs as above, with payloads from 16 bytes to 64 KiB.",
			charts: []chartOf{{
				file: "payload", title: "Broker CPU by payload, 4 pairs", x: "payload, bytes", y: "CPU s per million deliveries",
				lines: []lineOf{{"QoS 0", "QoS 0", cpuColumn}, {"QoS 1", "QoS 1", cpuColumn}},
			}, {
				file: "payload-rate", title: "Deliveries per second by payload, 4 pairs", x: "payload, bytes", y: "deliveries per second",
				lines: []lineOf{{"QoS 0", "QoS 0", rateColumn}, {"QoS 1", "QoS 1", rateColumn}},
			}},
		}, {
			name: "topics", title: "Number of topics", columns: workloadColumns,
			claim: claim{[]string{kernelKind, "broker"}, "Sockets first, then parsing and finding the route of each topic."},
			text:  "1 publisher that uses so many topics in turn, QoS 0, 1 subscriber that has subscribed to each by its name.",
			charts: []chartOf{{
				file: "topics", title: "Broker CPU by number of topics, QoS 0", x: "topics", y: "CPU s per million deliveries",
				lines: []lineOf{{"", "", cpuColumn}},
			}},
		}, {
			name: "wildcards", title: "Wildcards", columns: workloadColumns,
			claim: claim{[]string{kernelKind}, "A write(2) for each subscriber; how its filter is written matters little."},
			text: "1,000 subscribers with filters that have + and # in them, QoS 0, 1 publisher. Either each message matches one filter, over 1,000 " +
				"topics, or each matches a filter of every subscriber, beside 1,000 filters that match nothing.",
		}, {
			name: "latency", title: "Latency at a fixed rate",
			claim: claim{[]string{kernelKind}, "Messages come one by one, so threads go to sleep and are woken again for each, and each costs a read and a write of its own."},
			text: "10 pairs, clean sessions, payloads of 100 bytes. The messages are due at fixed times, one after the other, whether the broker keeps " +
				"up or not; a message's latency is from the time when it was due until its subscriber has read it. So what waits for a broker " +
				"that stalls counts with its waiting time. The first tenth of a round is not counted. \"Sent late\" is how much of it " +
				"came before the broker: how late the generator itself handed the message over.",
			columns: []column{p50Column, p99Column, maxColumn, valued(lateP99, "sent late (p99), µs", "%.0f", false), cpuColumn},
			charts: []chartOf{
				latencyChart("QoS 0"), latencyChart("QoS 1"),
			},
		}, {
			name: "connects", title: "Connect storm", columns: []column{connectRate, connectCPU, peakColumn},
			claim: claim{[]string{kernelKind, "Go runtime"}, "Sockets are opened and closed, goroutines started and ended."},
			text: "16 clients at a time: connect, CONNECT with a clean session, CONNACK, DISCONNECT, and again when the broker has closed the connection. " +
				"MQTT 3.1.1 over TCP, every client with an identifier of its own.",
		}, {
			name: "idle", title: "Memory of idle clients",
			text: "Resident memory of the broker with the clients minus without, divided by their number: when each has connected and subscribed to one " +
				"topic, and again when each has sent itself 64 messages of 1 KiB. What the kernel keeps for sockets is not in it.",
			columns: []column{clientBytes, {"RSS, MiB", "%.1f", false, func(_ sample, p phase) float64 { return p.values[totalMemory] / (1 << 20) }}},
		}, {
			name: "retained", title: "Retained messages", columns: []column{timeColumn, cpuTotal, perSecond("messages"), peakColumn},
			claim: claim{[]string{kernelKind, "broker"}, "The walk through the topics, and the queues that it fills."},
			text: "10,000 retained messages of QoS 1, each to a topic of its own; then 20 subscribers ask for # at the same time. Topic, payload and RETAIN " +
				"of each are checked. Durable in Penstock, in memory in Mosquitto.",
		}, {
			name: "durable", title: "Persistent sessions", columns: []column{cpuPerMillion("messages"), perSecond("messages"), diskColumn, filesColumn, peakColumn},
			claim: claim{[]string{kernelKind}, "Sockets, and the writes and syncs of the group commits."},
			text: "Pairs as above, but the subscribers have persistent sessions: at full speed, with 64 messages in flight, and at 20,000 messages a second. " +
				"And 1 publisher to 1 persistent session that is offline, which then comes back and takes everything; how many are in flight bounds the size of " +
				"a group commit. Order and completeness are checked. The size of the data directory is that at the end of the phase. " +
				"What Penstock acknowledges is durable. **Mosquitto's is not**: it has persistence on, with Debian's defaults, and so writes its state every " +
				"30 minutes and when it is stopped, which is why it writes nothing here. On a tmpfs, where nothing is written to a disk, " +
				"`wchar` in the CSV file is the figure to look at; it has what went to sockets too.",
		}, {
			name: "commit", title: "How long an acknowledgement takes", columns: []column{perSecond("messages"), ackP50, ackP99, diskColumn},
			claim: claim{[]string{kernelKind}, "Sockets, and the writes and syncs of the group commits."},
			text: "1 publisher of QoS 1 with so many messages in flight, to 1 persistent session that is offline, or online where it says so: how long from " +
				"sending a message until its PUBACK. With a slow disk each fsync takes so much longer than it does here (20 ms: an SD card); that is a build of " +
				"Penstock for this purpose. Mosquitto acknowledges what it has in memory, whatever the disk does.",
		}, {
			name: "stalled", title: "A reader that stops reading", columns: workloadColumns,
			claim: claim{[]string{kernelKind, "broker"}, "As with pairs."},
			text: "1 pair with QoS 1 and 100 messages in flight: first alone, then beside a second subscriber, with a clean session, that never reads. " +
				"The rate beside it is to be compared with the rate alone.",
		},
	}
}

func latencyChart(line string) chartOf {
	return chartOf{
		file: "latency-" + map[string]string{"QoS 0": "qos0", "QoS 1": "qos1"}[line], title: "Latency by rate, 10 pairs, " + line,
		x: "messages per second", y: "µs from due to received",
		lines: []lineOf{{line, "p50", p50Column}, {line, "p99", p99Column}, {line, "max", maxColumn}},
	}
}

// A bound is what Penstock wants to reach in one figure.
type bound struct {
	what     string
	wanted   string
	scenario string
	phase    string
	column   column
	// met judges Penstock's figure and the other broker's, which is NaN when
	// it was not measured.
	met func(ours, theirs float64) bool
	// inRatio shows the other's figure in terms of ours, else both are shown.
	inRatio bool
}

func ratioOf(n float64) func(float64, float64) bool {
	return func(ours, theirs float64) bool { return theirs/ours >= n }
}

// bounds are shown first in the report, met or not.
func bounds() []bound {
	cpu := func(what, wanted, scenario string, n float64) bound {
		return bound{"CPU per delivery, " + what, wanted, scenario, "", cpuColumn, ratioOf(n), true}
	}
	noWorse := func(ours, theirs float64) bool { return ours <= theirs }
	small := func(ours, _ float64) bool { return ours <= 10_000 }
	return []bound{
		cpu("QoS 0, 4 pairs", "at most a 12th of Mosquitto's", "qos0-pairs", 12),
		cpu("QoS 1, 4 pairs", "at most a 10th of Mosquitto's", "qos1-pairs", 10),
		cpu("QoS 1, fan-out to 50", "at most an 8th of Mosquitto's", "qos1-fan-out-50", 8),
		cpu("QoS 2, 4 pairs", "at most a 5th of Mosquitto's", "qos2-pairs", 5),
		{"p99 latency at 500 messages a second, QoS 0, µs", "no more than Mosquitto's", "qos0-latency-500", "", p99Column, noWorse, false},
		{"p99 latency at 500 messages a second, QoS 1, µs", "no more than Mosquitto's", "qos1-latency-500", "", p99Column, noWorse, false},
		{"connections per second", "at least 8,000, or Mosquitto's", "connects", "", connectRate,
			func(ours, theirs float64) bool { return ours >= 8000 || ours >= theirs }, false},
		{"memory of an idle client, bytes", "at most 10,000", "idle", idleName, clientBytes, small, false},
		{"memory of an idle client that was busy, bytes", "at most 10,000", "idle", idleAgainName, clientBytes, small, false},
	}
}
