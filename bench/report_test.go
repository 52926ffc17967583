package main

import (
	"encoding/csv"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	tests := []struct {
		values []float64
		want   float64
		ok     bool
	}{
		{nil, 0, false},
		{[]float64{3}, 3, true},
		{[]float64{9, 1, 2}, 2, true},
		{[]float64{4, 1, 2, 9}, 3, true},
	}
	for _, tt := range tests {
		if got, ok := median(tt.values, meanOf); got != tt.want || ok != tt.ok {
			t.Errorf("median of %v: got %v, %v, want %v, %v", tt.values, got, ok, tt.want, tt.ok)
		}
	}
}

// round makes a sample of one phase with 2,000 deliveries of 1,000 messages in
// 2 s, with a CPU time and bytes written.
func round(name string, cpu time.Duration, written uint64) sample {
	return sample{peak: 3 << 20, scrapes: 2, phases: []phase{{
		name: name, unit: "deliveries", count: 2000, messages: 1000, elapsed: 2 * time.Second,
		cpu: cpu, generator: time.Second, written: written, wchar: 7,
	}}}
}

// valuesOf makes a sample of one phase that has nothing but values.
func valuesOf(name string, values map[string]float64) sample {
	return sample{phases: []phase{{name: name, values: values}}}
}

const ms = time.Millisecond

// exampleReport has one of everything: a bound that is met, one that is not,
// one of which rounds failed, charts, phases and profiles.
func exampleReport() report {
	return report{
		command: "go run ./bench", date: time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC), rounds: 3,
		load:    load{time: 3 * time.Second, settle: 7 * time.Second},
		machine: machine{Cores: 4, CPU: "Cortex", Kernel: "6.1", Go: "go1", FileSystem: "ext4"},
		brokers: []*broker{{name: penstockName, version: "v1"}, {name: mosquittoName, version: "2.0.11"}},
		results: []result{{
			scenario: scenario{name: "qos0-pairs", group: "pairs", title: "QoS 0"},
			samples: [][]sample{
				{round("", 9*ms, 5000), round("", 2*ms, 0), round("", 1*ms, 1000)},
				{round("", 24*ms, 3000)},
			},
		}, {
			scenario: scenario{name: "qos1-pairs", group: "pairs", title: "QoS 1"},
			samples:  [][]sample{{round("", 2*ms, 0)}, {round("", 19*ms, 0)}},
		}, {
			scenario: scenario{name: "qos2-pairs", group: "pairs", title: "QoS 2"},
			samples:  [][]sample{{round("", 2*ms, 0)}, {round("", 20*ms, 0)}},
			failures: []string{"round 2: lost\none"},
		}, {
			scenario: scenario{name: "topics-1", group: "topics", title: "1", x: 1},
			samples:  [][]sample{{round("", 2*ms, 0)}, {round("", 20*ms, 0)}},
		}, {
			scenario: scenario{name: "topics-10", group: "topics", title: "10", x: 10},
			samples:  [][]sample{{round("", 3*ms, 0)}, {round("", 30*ms, 0)}},
		}, {
			scenario: scenario{name: "qos0-latency-500", group: "latency", title: "QoS 0, 500 a second"},
			samples: [][]sample{
				{valuesOf("", map[string]float64{latencyP50: 90, latencyP99: 200, latencyMax: 300})},
				{valuesOf("", map[string]float64{latencyP50: 90, latencyP99: 199, latencyMax: 400})},
			},
		}, {
			scenario: scenario{name: "idle", group: "idle", title: "10,000 clients"},
			samples:  [][]sample{{valuesOf(idleName, map[string]float64{bytesPerClient: 9999.6, totalMemory: 2 << 20})}, nil},
		}, {
			scenario: scenario{name: "offline", group: "durable", title: "offline"},
			samples:  [][]sample{{round("drain", 2*ms, 0)}, nil},
		}, {
			scenario: scenario{name: "retained", group: "retained", title: "storm"},
			samples:  [][]sample{nil, nil},
			failures: []string{"round 1: refused"},
		}},
		profiles: []profile{{
			scenario: scenario{name: "qos0-pairs", group: "pairs"}, samples: 900,
			kinds: map[string]float64{kernelKind: 61.4, "broker": 30.2, "copying": 8.4},
			top:   []function{{name: "tcp_sendmsg", kernel: true, self: 20, total: 40}},
		}},
		starts: []startup{{
			broker: penstockName, idle: 20 << 20,
			empty: []time.Duration{40 * ms, 60 * ms}, existing: []time.Duration{30 * ms},
		}},
		files: []file{{"dist/penstock-linux-arm64", 3 << 19}},
	}
}

func TestMarkdown(t *testing.T) {
	got := exampleReport().markdown("plots")
	for _, want := range []string{
		"Made by `go run ./bench` on 2031-02-03;",
		"| CPU per delivery, QoS 0, 4 pairs | at most a 12th of Mosquitto's | 1/12.0: 1.000 against 12.000 CPU s per million | yes |\n" +
			"| CPU per delivery, QoS 1, 4 pairs | at most a 10th of Mosquitto's | 1/9.5: 1.000 against 9.500 CPU s per million | **no** |\n" +
			"| CPU per delivery, QoS 1, fan-out to 50 | at most an 8th of Mosquitto's | not measured | – |\n" +
			"| CPU per delivery, QoS 2, 4 pairs | at most a 5th of Mosquitto's | 1/10.0: 1.000 against 10.000 CPU s per million, but 1 rounds failed | **no** |\n",
		"QoS 0, µs | no more than Mosquitto's | 200; Mosquitto 199 | **no** |\n",
		"| memory of an idle client, bytes | at most 10,000 | 10000; Mosquitto – | yes |\n",
		"| memory of an idle client that was busy, bytes | at most 10,000 | not measured | – |\n",
		"![Broker CPU seconds per million deliveries (less is better)](plots/overview.svg)",
		"| Processor | Cortex, 4 cores |\n| Kernel | 6.1 |\n| Go | go1 |\n| Data directories on | ext4 |\n| Penstock | v1 |\n| Mosquitto | 2.0.11 |\n",
		"medians of 3.\nA round publishes for 3s,",
		"read 7s after",
		"## Pairs\n\n4 publishers",
		"**Failed:** QoS 2: round 2: lost / one\n\n",
		"| | CPU s per million deliveries<br>Penstock | CPU s per million deliveries<br>Mosquitto | ratio | deliveries per second<br>Penstock |" +
			" deliveries per second<br>Mosquitto | ratio | peak RSS, MiB<br>Penstock | peak RSS, MiB<br>Mosquitto |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n" +
			"| QoS 0 | 1.000 | 12.000 | 12.00 | 1000 | 1000 | 1.00 | 3.0 | 3.0 |\n",
		"| 10 | 1.500 | 15.000 | 10.00 |",
		"![Broker CPU by number of topics, QoS 0](plots/topics.svg)",
		"| QoS 0, 500 a second | 90 | 90 | 1.00 | 200 | 199 | 0.99 | 300 | 400 | – | – | – | – | – |\n",
		"| 10,000 clients: idle | 10000 | – | – | 2.0 | – |\n",
		"| offline: drain | 1.000 | – | – | 1000 | – | – | 0.0 | – | – | – | 3.0 | – |\n",
		"**Failed:** storm: round 1: refused\n\n| |",
		"| Penstock | 50.0 | 30.0 | 20.0 |\n",
		"| dist/penstock-linux-arm64 | 1.5 |\n",
		"- Pairs: system calls 61%, broker 30%, copying 8%.",
		"| qos0-pairs | 900 | 61 | 8 |",
		"`tcp_sendmsg` 20.0 (40.0)",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	for _, unwanted := range []string{"plots/latency", "NaN", "Inf"} {
		if strings.Contains(got, unwanted) {
			t.Errorf("the report has %q", unwanted)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
}

// Every bound can be met and missed.
func TestBounds(t *testing.T) {
	tests := map[string]struct{ met, missed [2]float64 }{
		"qos0-pairs":       {[2]float64{1, 12}, [2]float64{1, 11.9}},
		"qos1-pairs":       {[2]float64{1, 10}, [2]float64{1, 9.9}},
		"qos1-fan-out-50":  {[2]float64{1, 8}, [2]float64{1, 7.9}},
		"qos2-pairs":       {[2]float64{1, 5}, [2]float64{1, 4.9}},
		"qos0-latency-500": {[2]float64{7, 7}, [2]float64{7.1, 7}},
		"qos1-latency-500": {[2]float64{7, 7}, [2]float64{7.1, 7}},
		"connects":         {[2]float64{7000, 6000}, [2]float64{7000, 7001}},
		"idle":             {[2]float64{10_000, 1}, [2]float64{10_001, 20_000}},
	}
	for _, b := range bounds() {
		tt, ok := tests[b.scenario]
		if !ok || !b.met(tt.met[0], tt.met[1]) || b.met(tt.missed[0], tt.missed[1]) {
			t.Errorf("%s: %v is met: %t, %v is met: %t", b.what, tt.met, b.met(tt.met[0], tt.met[1]), tt.missed, b.met(tt.missed[0], tt.missed[1]))
		}
	}
	if connects := bounds()[6]; !connects.met(8000, 9000) || connects.met(7999, math.NaN()) {
		t.Error("8,000 connections a second are enough, and 7,999 are not, if nothing is there to compare")
	}
}

func TestRatio(t *testing.T) {
	for want, values := range map[string][]float64{"2.50": {2, 5}, "–": {0, 5}} {
		if got := ratio(values); got != want {
			t.Errorf("%v: got %s, want %s", values, got, want)
		}
	}
	if got := ratio([]float64{1}); got != "–" {
		t.Errorf("of one value: got %s, want a dash", got)
	}
}

func TestCSV(t *testing.T) {
	lines, err := csv.NewReader(strings.NewReader(exampleReport().csv())).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if want := "bytes_per_client max p50 p99 resident_bytes"; strings.Join(lines[0][len(csvColumns):], " ") != want {
		t.Errorf("columns %q, want them to end with %q", lines[0], want)
	}
	for _, want := range []string{
		"qos0-pairs,Penstock,3,,2000,1000,2.000,0.001,1000,7,1.000,3145728,2,,,,,",
		"idle,Penstock,1,idle,0,0,0.000,0.000,0,0,0.000,0,0,9999.6,,,,2097152.0",
	} {
		if !slices.ContainsFunc(lines, func(l []string) bool { return strings.Join(l, ",") == want }) {
			t.Errorf("no line %q in %q", want, lines)
		}
	}
}

// The report, all rounds and the charts are written side by side.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	if err := exampleReport().write(filepath.Join(dir, "docs", "report.md"), io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"report.md", "report.csv", "plots/overview.svg", "plots/topics.svg"} {
		if info, err := os.Stat(filepath.Join(dir, "docs", name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "docs", "plots", "payload.svg")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a chart of nothing: stat says %v", err)
	}
	var shown strings.Builder
	if err := exampleReport().write("", &shown); err != nil || !strings.HasPrefix(shown.String(), "# Benchmarks") {
		t.Errorf("without a file: %q, error %v", shown.String(), err)
	}
}

// elements returns the names of an SVG file's elements, and all its text.
func elements(t *testing.T, svg string) (map[string]int, string) {
	t.Helper()
	count, text := map[string]int{}, ""
	d := xml.NewDecoder(strings.NewReader(svg))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return count, text
		}
		if err != nil {
			t.Fatalf("%v in %s", err, svg)
		}
		switch token := token.(type) {
		case xml.StartElement:
			count[token.Name.Local]++
			for _, a := range token.Attr {
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") {
					t.Errorf("attribute %s is %q", a.Name.Local, a.Value)
				}
			}
		case xml.CharData:
			text += string(token) + "\n"
		}
	}
}

func TestChart(t *testing.T) {
	c := chart{title: "A < B", x: "size", y: "cost", series: []series{
		{label: "one", broker: 0, points: []point{{1, 0.3}, {5000, 40}}},
		{label: "two", broker: 1, dash: 1, points: []point{{1, 2}, {10, 3}, {5000, 50}}},
	}}
	count, text := elements(t, c.svg())
	if count["polyline"] != 2 || count["circle"] != 3 || count["rect"] != 1+4 {
		t.Errorf("got %v, want a line for each series, and a mark for each point and each in the legend", count)
	}
	for _, want := range []string{"A < B\n", "size\n", "cost\n", "one\n", "5,000\n", "0.2\n", "50\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the chart lacks the text %q: %q", want, text)
		}
	}
	if _, text := elements(t, chart{title: "A"}.svg()); !strings.Contains(text, "nothing was measured") {
		t.Errorf("without points: %q", text)
	}
	elements(t, chart{series: []series{{points: []point{{3, 7}}}}}.svg()) // one point has no range
}

func TestRows(t *testing.T) {
	r := rows{title: "T", brokers: []string{"A", "B"}, rows: []row{{"first", []float64{0.25, 1234}}, {"second", []float64{math.NaN(), 3}}}}
	count, text := elements(t, r.svg())
	if count["circle"] != 2 || count["rect"] != 1+3 {
		t.Errorf("got %v, want a mark for each value and each in the legend", count)
	}
	for _, want := range []string{"first\n", "second\n", "0.25\n", "1,234\n", "3.0\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the chart lacks the text %q: %q", want, text)
		}
	}
	if _, text := elements(t, (rows{rows: []row{{"first", []float64{math.NaN()}}}}).svg()); !strings.Contains(text, "nothing was measured") {
		t.Errorf("without values: %q", text)
	}
}

func TestAxis(t *testing.T) {
	tests := []struct {
		values    []float64
		low, high float64
	}{
		{[]float64{0.17, 4.9}, 0.1, 5},
		{[]float64{3, 3}, 2, 5},
		{[]float64{10, 1000}, 10, 1000},
		{[]float64{7, 8}, 5, 10},
		{[]float64{1}, 1, 2},
	}
	for _, tt := range tests {
		a := newAxis(tt.values, 0, 100)
		if math.Abs(a.low/tt.low-1) > 1e-9 || math.Abs(a.high/tt.high-1) > 1e-9 {
			t.Errorf("%v: from %v to %v, want %v to %v", tt.values, a.low, a.high, tt.low, tt.high)
		}
		if got := a.at(a.low); got != 0 {
			t.Errorf("%v: the lowest is at %v", tt.values, got)
		}
	}
	all, labelled := newAxis([]float64{0.01, 1e6}, 0, 1).ticks()
	var got []string
	for _, v := range all {
		if labelled(v) {
			got = append(got, axisNumber(v))
		}
	}
	if want := "0.01 0.1 1 10 100 1,000 10,000 100,000 1,000,000"; strings.Join(got, " ") != want || len(all) != 25 {
		t.Errorf("%d marks, with labels %q, want %q", len(all), got, want)
	}
}

const perfReport = `
# To display the perf.data header info, please use --header/--header-only options.
#
# Samples: 817  of event 'cpu-clock:ppp'
#
# Children      Self       Samples  Symbol
# ........  ........  ............  ....................
#
    79.57%     0.00%             0  [k] entry_SYSCALL_64_after_hwframe
    52.00%    31.00%           310  [k] tcp_sendmsg
    23.66%    22.00%           220  [.] penstock/broker.(*conn).next
    12.00%    12.00%           120  [.] runtime.memmove
     7.00%     7.00%            70  [.] runtime.lock2
     3.00%     3.00%            30  [.] penstock/broker.(*conn).sendPublish.deferwrap1
     9.00%     9.00%            90  [.] runtime.mallocgc
     8.00%     8.00%            80  [.] github.com/mochi-mqtt/server/v2/packets.(*Packet).ConnectDecode
     4.00%     4.00%            40  [.] modernc.org/sqlite/lib.Xsqlite3_step
     2.00%     2.00%            20  [.] runtime.findRunnable
     1.50%     1.50%            15  [.] internal/poll.(*FD).Write
     0.50%     0.50%             5  [.] main.main
`

func TestParsePerf(t *testing.T) {
	p, err := parsePerf(perfReport)
	if err != nil {
		t.Fatal(err)
	}
	if p.samples != 1000 || len(p.top) != profileTop || p.top[0] != (function{"tcp_sendmsg", true, 31, 52}) {
		t.Errorf("%d samples, top %v", p.samples, p.top)
	}
	for kind, want := range map[string]float64{
		kernelKind: 31, "broker": 22, "copying": 12, "locks": 10, "allocation and garbage": 9, "mochi": 8, "SQLite": 4,
		"Go runtime": 2, "network library": 1.5, otherKind: 0.5, "storage": 0,
	} {
		if p.kinds[kind] != want {
			t.Errorf("%s: got %v, want %v", kind, p.kinds[kind], want)
		}
	}
	for _, bad := range []string{"", "   5.00%  many%  3  [.] main.main\n"} {
		if p, err := parsePerf(bad); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, p)
		}
	}
}

// A sentence about a profile is shown as long as it is true.
func TestClaim(t *testing.T) {
	profiles := exampleReport().profiles
	tests := []struct {
		claim claim
		want  string
	}{
		{claim{}, "system calls 61%, broker 30%, copying 8%."},
		{claim{[]string{kernelKind}, "TCP."}, "system calls 61%, broker 30%, copying 8%. TCP."},
		{claim{[]string{"broker", kernelKind}, "Both."}, "system calls 61%, broker 30%, copying 8%. Both."},
		{claim{[]string{"copying", kernelKind}, "Both."}, "system calls 61%, broker 30%, copying 8%."},
	}
	for _, tt := range tests {
		if got, ok := tt.claim.hold("pairs", profiles); !ok || got != tt.want {
			t.Errorf("%+v: got %q, %t, want %q", tt.claim, got, ok, tt.want)
		}
	}
	if got, ok := (claim{}).hold("fan-in", profiles); ok {
		t.Errorf("of a group without profiles: %q", got)
	}
	for _, g := range groups() {
		for _, k := range g.claim.kinds {
			if !slices.Contains(kindNames(), k) {
				t.Errorf("group %s: there is no kind of work called %q", g.name, k)
			}
		}
	}
}
