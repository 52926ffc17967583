package main

import (
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

func TestMarkdown(t *testing.T) {
	r := report{
		command: "go run ./bench", date: time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC), rounds: 3, load: load{time: 3 * time.Second},
		machine: machine{Cores: 4, CPU: "Cortex", Kernel: "6.1", Go: "go1", FileSystem: "ext4"},
		brokers: []*broker{{name: "Penstock", version: "v1"}, {name: "Mosquitto", version: "2.0.11"}},
		results: []result{{
			scenario: scenario{title: "Pairs", text: "What happens."},
			samples: [][]sample{
				{round("", 9*time.Millisecond, 5000), round("", 2*time.Millisecond, 0), round("", 1*time.Millisecond, 1000)},
				{round("", 20*time.Millisecond, 3000)},
			},
			failures: []string{"round 2: lost\none"},
		}, {
			scenario: scenario{title: "Queue", text: "In phases."},
			samples:  [][]sample{{round("drain", 2*time.Millisecond, 0)}, nil},
		}, {
			scenario: scenario{title: "Nothing", text: "All failed."},
			samples:  [][]sample{nil, nil},
			failures: []string{"round 1: refused"},
		}},
		starts: []startup{{
			broker: "Penstock", idle: 20 << 20,
			empty: []time.Duration{40 * time.Millisecond, 60 * time.Millisecond}, existing: []time.Duration{30 * time.Millisecond},
		}},
		files: []file{{"dist/penstock-linux-arm64", 3 << 19}},
	}
	got := r.markdown()
	for _, want := range []string{
		"Made by `go run ./bench` on 2031-02-03;",
		"| Processor | Cortex, 4 cores |\n| Kernel | 6.1 |\n| Go | go1 |\n| Data directories on | ext4 |\n| Penstock | v1 |\n| Mosquitto | 2.0.11 |\n",
		"medians of 3.\nA round publishes for 3s,",
		"## Pairs\n\nWhat happens.\n\n**Failed:** round 2: lost / one\n\n",
		"| median | Penstock | Mosquitto | Mosquitto / Penstock |\n|---|---:|---:|---:|\n" +
			"| CPU seconds per million deliveries | 1.000 | 10.000 | 10.00 |\n" +
			"| deliveries per second | 1000 | 1000 | 1.00 |\n" +
			"| bytes written to disk per message | 1.0 | 3.0 | 3.00 |\n" +
			"| peak RSS, MiB | 3.0 | 3.0 | 1.00 |\n",
		"| Penstock | 3 |  | 2000 | 2.00 | 0.00 | 0.500 | 1000 | 7 | 1.00 | 3.0 | 2 |\n" +
			"| Mosquitto | 1 |  | 2000 | 2.00 | 0.02 | 10.000 | 3000 | 7 | 1.00 | 3.0 | 2 |\n",
		"| drain: CPU seconds per million deliveries | 1.000 | – | – |\n",
		"| drain: bytes written to disk per message | 0.0 | – | – |\n",
		"## Nothing\n\nAll failed.\n\n**Failed:** round 1: refused\n\n## Start",
		"| Penstock | 50.0 | 30.0 | 20.0 |\n",
		"| dist/penstock-linux-arm64 | 1.5 |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	if t.Failed() {
		t.Log(got)
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
