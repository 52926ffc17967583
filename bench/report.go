package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A report is everything that one run of the program found.
type report struct {
	command string
	date    time.Time
	machine machine
	brokers []*broker
	rounds  int
	load    load
	results []result
	starts  []startup
	files   []file
}

// A result is all rounds of one scenario.
type result struct {
	scenario scenario
	samples  [][]sample // by broker, in the report's order
	failures []string   // rounds that came to nothing
}

// A startup is what a broker takes without any load.
type startup struct {
	broker          string
	empty, existing []time.Duration // from exec to the first CONNACK
	idle            uint64          // resident memory after idleTime, bytes
}

// A file is a program and its size in bytes.
type file struct {
	name string
	size int64
}

// A figure is one line of a scenario's table.
type figure struct {
	name   string
	format string
	of     func(sample) (value float64, ok bool)
}

// figures returns what is shown of the samples of a scenario: by phase, and
// once for the process.
func figures(phases []phase) []figure {
	var list []figure
	for i, ph := range phases {
		of := func(f func(phase) float64) func(sample) (float64, bool) {
			return func(s sample) (float64, bool) {
				if i >= len(s.phases) {
					return 0, false
				}
				v := f(s.phases[i])
				return v, !math.IsNaN(v) && !math.IsInf(v, 0)
			}
		}
		prefix := ""
		if ph.name != "" {
			prefix = ph.name + ": "
		}
		list = append(list,
			figure{prefix + "CPU seconds per million " + ph.unit, "%.3f", of(func(p phase) float64 { return p.cpu.Seconds() / float64(p.count) * 1e6 })},
			figure{prefix + ph.unit + " per second", "%.0f", of(func(p phase) float64 { return float64(p.count) / p.elapsed.Seconds() })},
			figure{prefix + "bytes written to disk per message", "%.1f", of(func(p phase) float64 { return float64(p.written) / float64(p.messages) })},
		)
	}
	return append(list, figure{"peak RSS, MiB", "%.1f", func(s sample) (float64, bool) { return mebibytes(s.peak), s.peak > 0 }})
}

func mebibytes(n uint64) float64 { return float64(n) / (1 << 20) }

// median returns the middle of the values, or the mean of the two in the
// middle; false without any.
func median[T cmp.Ordered](values []T, mean func(a, b T) T) (T, bool) {
	var none T
	if len(values) == 0 {
		return none, false
	}
	v := slices.Sorted(slices.Values(values))
	if n := len(v); n%2 == 0 {
		return mean(v[n/2-1], v[n/2]), true
	}
	return v[len(v)/2], true
}

func meanOf[T float64 | time.Duration](a, b T) T { return (a + b) / 2 }

// medianOf returns the median of a figure over the rounds in which it was found.
func medianOf(f figure, samples []sample) (float64, bool) {
	var values []float64
	for _, s := range samples {
		if v, ok := f.of(s); ok {
			values = append(values, v)
		}
	}
	return median(values, meanOf)
}

// markdown renders the report.
func (r report) markdown() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }

	p("# Benchmarks\n")
	p("Made by `%s` on %s; nothing here is edited by hand.\n", r.command, r.date.UTC().Format("2006-01-02"))
	p("| | |\n|---|---|")
	p("| Processor | %s, %d cores |", r.machine.CPU, r.machine.Cores)
	p("| Kernel | %s |", r.machine.Kernel)
	p("| Go | %s |", r.machine.Go)
	p("| Data directories on | %s |", r.machine.FileSystem)
	for _, br := range r.brokers {
		p("| %s | %s |", br.name, br.version)
	}
	p("")
	r.method(p)
	for _, res := range r.results {
		r.scenario(p, res)
	}
	r.startups(p)
	if len(r.files) > 0 {
		p("## Size of the programs\n")
		p("| file | MiB |\n|---|---|")
		for _, f := range r.files {
			p("| %s | %.1f |", f.name, float64(f.size)/(1<<20))
		}
		p("")
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func (r report) method(p func(string, ...any)) {
	p("## How it is measured\n")
	p("Each round starts a broker in a new process with an empty data directory, over loopback, with MQTT 3.1.1 and")
	p("payloads of %d bytes. The rounds of the brokers alternate; the tables show medians of %d.", payloadBytes, r.rounds)
	if r.load.messages > 0 {
		p("A round is %d messages.", r.load.messages)
	} else {
		p("A round publishes for %s, or as many messages as its scenario says.", r.load.time)
	}
	p("")
	p("- Publishers send as fast as the broker takes it, but are never more than a few thousand messages ahead of the")
	p("  slowest subscriber, so that no broker has a reason to drop anything. Every message carries a sequence number:")
	p("  a round in which one is missing, repeated or out of order counts as failed.")
	p("- CPU is user and system time of the broker alone, from the first message until the broker has answered a ping")
	p("  that each subscriber sends after its last acknowledgement, so that it has handled them all. The generator shares")
	p("  the cores with the broker, so rates depend on both, and on what else the machine does; CPU per delivery is the")
	p("  steadier figure.")
	p("- Bytes written to disk are what the kernel accounts to the broker (`write_bytes` in /proc/PID/io), up to")
	p("  %s after the end, as is CPU. `wchar` is what it passed to write(2), sockets included.", settle)
	p("- Penstock has %d access rules in force, its journal on, and its metrics read once a second if it prints where", len(accessRules))
	p("  they are. Mosquitto has no access rules, no queue limit, 1,000 messages in flight at most, and persistence only")
	p("  where the scenario says so.")
	p("")
}

func (r report) scenario(p func(string, ...any), res result) {
	p("## %s\n", res.scenario.title)
	p("%s\n", res.scenario.text)
	for _, f := range res.failures {
		p("**Failed:** %s\n", strings.ReplaceAll(f, "\n", " / "))
	}
	var shape []phase
	for _, samples := range res.samples {
		for _, s := range samples {
			if len(s.phases) > len(shape) {
				shape = s.phases
			}
		}
	}
	if shape == nil {
		return
	}

	compared := len(r.brokers) == 2
	head, rule := "| median |", "|---|"
	for _, br := range r.brokers {
		head += " " + br.name + " |"
		rule += "---:|"
	}
	if compared {
		head += fmt.Sprintf(" %s / %s |", r.brokers[1].name, r.brokers[0].name)
		rule += "---:|"
	}
	p("%s\n%s", head, rule)
	for _, f := range figures(shape) {
		line := "| " + f.name + " |"
		var values []float64
		for _, samples := range res.samples {
			v, ok := medianOf(f, samples)
			if !ok {
				line += " – |"
				continue
			}
			values = append(values, v)
			line += " " + fmt.Sprintf(f.format, v) + " |"
		}
		if compared {
			line += " " + ratio(values) + " |"
		}
		p("%s", line)
	}

	p("\n<details><summary>all rounds</summary>\n")
	p("| broker | round | phase | count | seconds | CPU s | CPU s per million | write_bytes | wchar | generator CPU s | peak RSS, MiB | metrics read |")
	p("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
	for i, samples := range res.samples {
		for n, s := range samples {
			for _, ph := range s.phases {
				p("| %s | %d | %s | %d | %.2f | %.2f | %.3f | %d | %d | %.2f | %.1f | %d |", r.brokers[i].name, n+1, ph.name, ph.count,
					ph.elapsed.Seconds(), ph.cpu.Seconds(), ph.cpu.Seconds()/float64(ph.count)*1e6,
					ph.written, ph.wchar, ph.generator.Seconds(), mebibytes(s.peak), s.scrapes)
			}
		}
	}
	p("\n</details>\n")
}

// ratio is the second broker's figure in terms of the first's.
func ratio(values []float64) string {
	if len(values) != 2 || values[0] == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", values[1]/values[0])
}

func (r report) startups(p func(string, ...any)) {
	if len(r.starts) == 0 {
		return
	}
	p("## Start and idle memory\n")
	p("From exec to the first CONNACK, median of %d, in milliseconds; resident memory %s after the start, in MiB.\n",
		startRounds, idleTime)
	p("| broker | empty data directory | existing data directory | idle RSS |\n|---|---:|---:|---:|")
	for _, s := range r.starts {
		p("| %s | %s | %s | %.1f |", s.broker, milliseconds(s.empty), milliseconds(s.existing), mebibytes(s.idle))
	}
	p("")
}

func milliseconds(d []time.Duration) string {
	m, ok := median(d, meanOf)
	if !ok {
		return "–"
	}
	return fmt.Sprintf("%.1f", float64(m)/float64(time.Millisecond))
}
