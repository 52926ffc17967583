package api

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"

	"github.com/VictoriaMetrics/metrics"

	"penstock/broker"
	"penstock/storage"
)

// snapshot is what one page of metrics is made of.
type snapshot struct {
	version string
	uptime  int64
	broker.Stats
	broker.Health
	flash storage.FlashStats
	wear  *Wear // nil if nobody asks the flash
}

// family is one metric with all its series.
type family struct {
	name, kind, help string
	write            func(w io.Writer, name string, s snapshot)
}

// families are all metrics of Penstock, in the order of the page. Their values
// are read when the page is asked for and kept nowhere. A new metric is a line
// here.
var families = []family{
	{"penstock_build_info", "gauge", "1, with the version as a label.", func(w io.Writer, name string, s snapshot) {
		metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{version=%s}", name, quote(s.version)), 1)
	}},
	{"penstock_uptime_seconds", "gauge", "Time since the broker started.",
		gauge(func(s snapshot) int64 { return s.uptime })},
	{"penstock_ready", "gauge", "1 if the broker serves.",
		gauge(func(s snapshot) int64 { return oneIf(s.Ready) })},
	{"penstock_degraded", "gauge", "1 if something needs attention.",
		gauge(func(s snapshot) int64 { return oneIf(s.Degraded || s.wear != nil && s.wear.Warning != "") })},

	{"penstock_connections", "gauge", "Connected MQTT clients.",
		gauge(func(s snapshot) int64 { return s.Connections })},
	{"penstock_connections_total", "counter", "MQTT connections accepted.",
		counter(func(s snapshot) uint64 { return s.ConnectionsTotal })},
	{"penstock_sockets_total", "counter", "Network connections accepted.",
		counter(func(s snapshot) uint64 { return s.Sockets })},
	{"penstock_connects_total", "counter", "CONNECT packets received; those not in penstock_connections_total were refused.",
		counter(func(s snapshot) uint64 { return s.Connects })},
	{"penstock_sessions", "gauge", "Sessions, connected or not.",
		gauge(func(s snapshot) int64 { return s.Sessions })},
	{"penstock_sessions_expired_total", "counter", "Sessions that waited for their client in vain.",
		counter(func(s snapshot) uint64 { return s.SessionsExpired })},
	{"penstock_subscriptions", "gauge", "Subscriptions of all sessions.",
		gauge(func(s snapshot) int64 { return s.Subscriptions })},
	{"penstock_shared_subscriptions", "gauge", "How many of them are shared ones.",
		gauge(func(s snapshot) int64 { return s.SharedSubscriptions })},
	{"penstock_retained_messages", "gauge", "Topics with a retained message.",
		gauge(func(s snapshot) int64 { return s.Retained })},

	{"penstock_retained_bytes", "gauge", "Topic, payload and properties of those messages.",
		gauge(func(s snapshot) int64 { return s.RetainedBytes })},

	{"penstock_network_bytes_total", "counter", "Bytes read from and written to clients' connections.",
		inOut(func(s snapshot) (in, out uint64) { return s.NetworkIn, s.NetworkOut })},
	{"penstock_packets_total", "counter", "MQTT packets of every kind.",
		inOut(func(s snapshot) (in, out uint64) { return s.PacketsIn, s.PacketsOut })},
	{"penstock_messages_total", "counter", "PUBLISH packets.",
		byQoS(func(s snapshot) (in, out [3]uint64) { return s.MessagesIn, s.MessagesOut })},
	{"penstock_message_bytes_total", "counter", "Whole size of PUBLISH packets.",
		byQoS(func(s snapshot) (in, out [3]uint64) { return s.BytesIn, s.BytesOut })},
	{"penstock_payload_bytes_total", "counter", "Payloads of PUBLISH packets.",
		inOut(func(s snapshot) (in, out uint64) { return s.PayloadIn, s.PayloadOut })},
	{"penstock_dropped_messages_total", "counter", "Deliveries not made, by cause.", func(w io.Writer, name string, s snapshot) {
		for _, cause := range slices.Sorted(maps.Keys(s.Dropped)) {
			metrics.WriteCounterUint64(w, fmt.Sprintf("%s{cause=%s}", name, quote(cause)), s.Dropped[cause])
		}
	}},
	{"penstock_limited_total", "counter", "Connections and packets refused because of a limit, by limit.", func(w io.Writer, name string, s snapshot) {
		for _, limit := range slices.Sorted(maps.Keys(s.Limited)) {
			metrics.WriteCounterUint64(w, fmt.Sprintf("%s{limit=%s}", name, quote(limit)), s.Limited[limit])
		}
	}},
	{"penstock_queue_messages", "gauge", "Messages waiting for subscribers or in flight to them.",
		gauge(func(s snapshot) int64 { return s.QueueMessages })},
	{"penstock_queue_bytes", "gauge", "Topic, payload and properties of those messages.",
		gauge(func(s snapshot) int64 { return s.QueueBytes })},

	{"penstock_queue_alarms", "gauge", "Sessions whose queue has reached a share of its bound, by percent.", func(w io.Writer, name string, s snapshot) {
		for _, percent := range slices.Sorted(maps.Keys(s.QueueAlarms)) {
			metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{percent=%s}", name, quote(percent)), s.QueueAlarms[percent])
		}
	}},
	{"penstock_store_max_bytes", "gauge", "What the segments of all queues may take on the disk.",
		gauge(func(s snapshot) int64 { return s.StoreBound })},

	{"penstock_disk_free_bytes", "gauge", "Room that is left on the data directory's file system.",
		gauge(func(s snapshot) int64 { return s.Disk.Free })},
	{"penstock_disk_reserve_bytes", "gauge", "How much of it is kept free; 0 if the disk is not watched.",
		gauge(func(s snapshot) int64 { return s.Disk.Reserve })},
	{"penstock_disk_low", "gauge", "1 while what would have to be stored is refused for lack of room.",
		gauge(func(s snapshot) int64 { return oneIf(s.Disk.Low) })},

	{"penstock_journal_commits_total", "counter", "Transactions that became durable.",
		counter(func(s snapshot) uint64 { return s.Journal.Commits })},
	{"penstock_journal_failures_total", "counter", "Transactions that failed and were tried again.",
		counter(func(s snapshot) uint64 { return s.Journal.Failures })},
	{"penstock_journal_failing", "gauge", "1 while transactions fail and acknowledgements wait.",
		gauge(func(s snapshot) int64 { return oneIf(s.Journal.Failing != "") })},
	{"penstock_journal_writing_seconds", "gauge", "How long the transaction that runs has taken, 0 when none runs.",
		func(w io.Writer, name string, s snapshot) {
			metrics.WriteGaugeFloat64(w, name, s.Journal.Writing.Seconds())
		}},
	{"penstock_journal_records_total", "counter", "Messages written to the database.",
		counter(func(s snapshot) uint64 { return s.Journal.Records })},
	{"penstock_journal_elided_total", "counter", "Deliveries acknowledged before they had to be written.",
		counter(func(s snapshot) uint64 { return s.Journal.Elided })},
	{"penstock_journal_written_bytes_total", "counter", "Bytes of rows written, without the database's own overhead.",
		counter(func(s snapshot) uint64 { return s.Journal.BytesWritten })},
	{"penstock_journal_segments", "gauge", "Rows of the queue store that sessions need.",
		gauge(func(s snapshot) int64 { return s.Journal.Segments })},
	{"penstock_journal_segment_bytes", "gauge", "Size of these rows: each message once, however many sessions it waits for.",
		gauge(func(s snapshot) int64 { return s.Journal.SegmentBytes })},
	{"penstock_journal_commit_seconds", "histogram", "Duration of a transaction.",
		histogram(func(s snapshot) storage.Histogram { return s.Journal.CommitSeconds })},
	{"penstock_journal_group_size", "histogram", "Operations in a transaction.",
		histogram(func(s snapshot) storage.Histogram { return s.Journal.GroupSize })},

	{"penstock_flash_written_bytes_total", "counter", "Bytes written to the flash since the database was made, by cause.", func(w io.Writer, name string, s snapshot) {
		for _, cause := range slices.Sorted(maps.Keys(s.flash.Total)) {
			metrics.WriteCounterUint64(w, fmt.Sprintf("%s{cause=%s}", name, quote(cause)), s.flash.Total[cause])
		}
	}},
	{"penstock_flash_written_today_bytes", "gauge", "How many of them today (UTC), by cause.", func(w io.Writer, name string, s snapshot) {
		for _, cause := range slices.Sorted(maps.Keys(s.flash.Today)) {
			metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{cause=%s}", name, quote(cause)), s.flash.Today[cause])
		}
	}},
	{"penstock_flash_week_average_bytes", "gauge", "Bytes a day over the last seven whole days, or as many as there are.",
		gauge(func(s snapshot) int64 { return int64(s.flash.WeekAverage) })},
	{"penstock_flash_week_days", "gauge", "How many days that is the average of.",
		gauge(func(s snapshot) int64 { return s.flash.WeekDays })},
	{"penstock_flash_log_bytes", "gauge", "Size of the database's write-ahead log.",
		gauge(func(s snapshot) int64 { return s.flash.LogBytes })},
	{"penstock_flash_budget_bytes", "gauge", "Bytes that may be written a day, 0 without a budget.",
		gauge(func(s snapshot) int64 { return int64(s.flash.Budget) })},
	{"penstock_flash_budget_exceeded", "gauge", "1 if more was written today.",
		gauge(func(s snapshot) int64 { return oneIf(s.flash.OverBudget) })},
	{"penstock_flash_stretch", "gauge", "By how much the budget puts off writes that can wait; 1: not at all.",
		func(w io.Writer, name string, s snapshot) { metrics.WriteGaugeFloat64(w, name, s.flash.Stretch) }},
	{"penstock_flash_wear_percent", "gauge", "How much of its life is over, as the flash says itself, in steps of 10.", func(w io.Writer, name string, s snapshot) {
		if s.wear != nil && s.wear.Skipped == "" {
			metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{device=%s}", name, quote(s.wear.Device)), uint64(max(s.wear.Used, 0)))
		}
	}},
	{"penstock_flash_wear_warning", "gauge", "1 if the flash says that it is near its end.",
		gauge(func(s snapshot) int64 { return oneIf(s.wear != nil && s.wear.Warning != "") })},
	{"penstock_salvaged", "gauge", "1 if the database was damaged and was salvaged, until that is acknowledged.",
		gauge(func(s snapshot) int64 { return oneIf(s.Salvage != nil) })},
	{"penstock_salvage_running", "gauge", "1 while queues are still being read from the damaged database.",
		gauge(func(s snapshot) int64 { return oneIf(s.Salvage != nil && s.Salvage.Running) })},
	{"penstock_salvage_given_messages", "gauge", "Messages that were put into queues from the damaged database after service had begun.",
		gauge(func(s snapshot) int64 {
			if s.Salvage == nil {
				return 0
			}
			return int64(s.Salvage.Given)
		})},
	{"penstock_salvage_rows", "gauge", "Rows of the damaged database, by table, and whether they were kept or are known to be lost.", func(w io.Writer, name string, s snapshot) {
		if s.Salvage == nil {
			return
		}
		for _, t := range s.Salvage.Tables {
			metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{table=%s,fate=\"kept\"}", name, quote(t.Table)), uint64(t.Kept))
			metrics.WriteGaugeUint64(w, fmt.Sprintf("%s{table=%s,fate=\"lost\"}", name, quote(t.Table)), uint64(t.Lost))
		}
	}},
}

func (s *Server) getMetrics(w http.ResponseWriter, r *http.Request) error {
	st := s.deps.Broker.Stats()
	var page bytes.Buffer
	writeMetrics(&page, snapshot{s.deps.Version, uptime(st), st, s.deps.Broker.Health(), s.deps.DB.Flash(), s.wear()})
	metrics.WriteProcessMetrics(&page) // memory, CPU time and the Go runtime
	metrics.WriteFDMetrics(&page)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(page.Bytes())
	return nil
}

// writeMetrics writes the text format of Prometheus.
func writeMetrics(w io.Writer, s snapshot) {
	for _, f := range families {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", f.name, f.help, f.kind)
		f.write(w, f.name, s)
	}
}

func gauge(value func(snapshot) int64) func(io.Writer, string, snapshot) {
	return func(w io.Writer, name string, s snapshot) {
		metrics.WriteGaugeUint64(w, name, uint64(max(value(s), 0)))
	}
}

func counter(value func(snapshot) uint64) func(io.Writer, string, snapshot) {
	return func(w io.Writer, name string, s snapshot) { metrics.WriteCounterUint64(w, name, value(s)) }
}

func inOut(values func(snapshot) (in, out uint64)) func(io.Writer, string, snapshot) {
	return func(w io.Writer, name string, s snapshot) {
		in, out := values(s)
		metrics.WriteCounterUint64(w, name+`{direction="in"}`, in)
		metrics.WriteCounterUint64(w, name+`{direction="out"}`, out)
	}
}

func byQoS(values func(snapshot) (in, out [3]uint64)) func(io.Writer, string, snapshot) {
	return func(w io.Writer, name string, s snapshot) {
		in, out := values(s)
		for qos := range in {
			metrics.WriteCounterUint64(w, fmt.Sprintf(`%s{direction="in",qos="%d"}`, name, qos), in[qos])
		}
		for qos := range out {
			metrics.WriteCounterUint64(w, fmt.Sprintf(`%s{direction="out",qos="%d"}`, name, qos), out[qos])
		}
	}
}

// histogram writes the buckets that Prometheus knows, which count everything up
// to their bound. The library's own histograms have other buckets, and keep
// their counts themselves.
func histogram(value func(snapshot) storage.Histogram) func(io.Writer, string, snapshot) {
	return func(w io.Writer, name string, s snapshot) {
		h := value(s)
		var sum uint64
		for i, n := range h.Counts {
			sum += n
			bound := math.Inf(1)
			if i < len(h.Bounds) {
				bound = h.Bounds[i]
			}
			metrics.WriteCounterUint64(w, fmt.Sprintf(`%s_bucket{le="%s"}`, name, le(bound)), sum)
		}
		if len(h.Counts) == 0 { // nothing was ever observed
			metrics.WriteCounterUint64(w, name+`_bucket{le="+Inf"}`, 0)
		}
		metrics.WriteGaugeFloat64(w, name+"_sum", h.Sum)
		metrics.WriteCounterUint64(w, name+"_count", sum)
	}
}

func le(bound float64) string {
	if math.IsInf(bound, 1) {
		return "+Inf"
	}
	return strconv.FormatFloat(bound, 'g', -1, 64)
}

func oneIf(on bool) int64 {
	if on {
		return 1
	}
	return 0
}

// quote writes the value of a label. Prometheus escapes backslash, quote and
// newline, and nothing else.
func quote(v string) string {
	var b bytes.Buffer
	b.WriteByte('"')
	for _, r := range v {
		switch r {
		case '\\', '"':
			b.WriteByte('\\')
			b.WriteRune(r)
		case '\n':
			b.WriteString(`\n`)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
