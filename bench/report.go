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
	command  string
	date     time.Time
	machine  machine
	brokers  []*broker
	rounds   int
	load     load
	results  []result
	profiles []profile
	starts   []startup
	files    []file
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

// A printer writes a line.
type printer func(format string, args ...any)

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

// medianOf returns the median of a figure over a broker's rounds, NaN without any.
func (res result) medianOf(c column, broker int, phaseName string) float64 {
	var values []float64
	if broker < len(res.samples) {
		for _, s := range res.samples[broker] {
			for _, ph := range s.phases {
				if ph.name != phaseName {
					continue
				}
				if v, ok := c.value(s, ph); ok {
					values = append(values, v)
				}
			}
		}
	}
	if v, ok := median(values, meanOf); ok {
		return v
	}
	return math.NaN()
}

// phaseNames returns the phases of the scenario in their order.
func (res result) phaseNames() []string {
	var names []string
	for _, samples := range res.samples {
		for _, s := range samples {
			for _, ph := range s.phases {
				if !slices.Contains(names, ph.name) {
					names = append(names, ph.name)
				}
			}
		}
	}
	return names
}

// find returns the result of a scenario.
func (r report) find(name string) (result, bool) {
	i := slices.IndexFunc(r.results, func(res result) bool { return res.scenario.name == name })
	if i < 0 {
		return result{}, false
	}
	return r.results[i], true
}

// markdown renders the report. plots is the folder of the charts as the
// document sees it.
func (r report) markdown(plots string) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }

	p("# Benchmarks\n")
	p("Made by `%s` on %s; nothing here is edited by hand.\n", r.command, r.date.UTC().Format("2006-01-02"))
	r.glance(p, plots)
	p("| machine and programs | |\n|---|---|")
	p("| Processor | %s, %d cores |", r.machine.CPU, r.machine.Cores)
	p("| Kernel | %s |", r.machine.Kernel)
	p("| Go | %s |", r.machine.Go)
	p("| Data directories on | %s |", r.machine.FileSystem)
	for _, br := range r.brokers {
		p("| %s | %s |", br.name, br.version)
	}
	p("")
	r.method(p)
	for _, g := range groups() {
		r.group(p, g, plots)
	}
	r.startups(p)
	r.sizes(p)
	r.profiled(p)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// glance says of each bound whether it is met.
func (r report) glance(p printer, plots string) {
	p("## At a glance\n")
	p("| bound | wanted | found | met |\n|---|---|---|---|")
	for _, b := range bounds() {
		found, met := r.judge(b)
		p("| %s | %s | %s | %s |", b.what, b.wanted, found, met)
	}
	p("")
	if c := r.overview(); len(c.rows) > 0 {
		p("![%s](%s/overview.svg)\n", c.title, plots)
	}
}

// judge returns what was found of a bound, and whether it is met.
func (r report) judge(b bound) (found, met string) {
	ours, theirs := math.NaN(), math.NaN()
	res, ok := r.find(b.scenario)
	for i, br := range r.brokers {
		if !ok {
			break
		}
		switch v := res.medianOf(b.column, i, b.phase); br.name {
		case penstockName:
			ours = v
		case mosquittoName:
			theirs = v
		}
	}
	number := func(v float64) string {
		if math.IsNaN(v) {
			return "–"
		}
		return fmt.Sprintf(b.column.format, v)
	}
	switch {
	case math.IsNaN(ours), b.inRatio && math.IsNaN(theirs):
		return "not measured", "–"
	case b.inRatio:
		found = fmt.Sprintf("1/%.1f: %s against %s CPU s per million", theirs/ours, number(ours), number(theirs))
	default:
		found = fmt.Sprintf("%s; Mosquitto %s", number(ours), number(theirs))
	}
	if len(res.failures) > 0 {
		return found + fmt.Sprintf(", but %d rounds failed", len(res.failures)), "**no**"
	}
	if b.met(ours, theirs) {
		return found, "yes"
	}
	return found, "**no**"
}

// overview draws what a delivery costs in the scenarios that count deliveries
// and have no axis of their own.
func (r report) overview() rows {
	c := rows{title: "Broker CPU seconds per million deliveries (less is better)", x: "CPU s per million deliveries, logarithmic"}
	for _, br := range r.brokers {
		c.brokers = append(c.brokers, br.name)
	}
	for _, g := range []string{"pairs", "fan-out", "fan-in", "wildcards"} {
		for _, res := range r.results {
			if res.scenario.group != g {
				continue
			}
			line := row{label: g + ", " + res.scenario.title}
			if g == "wildcards" {
				line.label = strings.Replace(res.scenario.title, "each message to", "wildcards,", 1)
			}
			for i := range r.brokers {
				line.values = append(line.values, res.medianOf(cpuColumn, i, ""))
			}
			c.rows = append(c.rows, line)
		}
	}
	return c
}

// chart draws what one of a group's charts says, false when too little was measured.
func (r report) chart(g group, c chartOf) (chart, bool) {
	drawn := chart{title: c.title, x: c.x, y: c.y}
	for dash, l := range c.lines {
		for i, br := range r.brokers {
			s := series{label: strings.TrimSpace(br.name + " " + l.label), broker: i, dash: dash}
			for _, res := range r.results {
				if res.scenario.group != g.name || res.scenario.line != l.line {
					continue
				}
				if v := res.medianOf(l.column, i, ""); v > 0 {
					s.points = append(s.points, point{res.scenario.x, v})
				}
			}
			if len(s.points) > 1 {
				drawn.series = append(drawn.series, s)
			}
		}
	}
	return drawn, len(drawn.series) > 0
}

// charts returns all drawings by the name of their file.
func (r report) charts() map[string]string {
	all := map[string]string{}
	if c := r.overview(); len(c.rows) > 0 {
		all["overview.svg"] = c.svg()
	}
	for _, g := range groups() {
		for _, c := range g.charts {
			if drawn, ok := r.chart(g, c); ok {
				all[c.file+".svg"] = drawn.svg()
			}
		}
	}
	return all
}

func (r report) method(p printer) {
	p("## How it is measured\n")
	p("Each round starts a broker in a new process with an empty data directory, over loopback, with MQTT 3.1.1 and")
	p("payloads of %d bytes unless it says otherwise. The rounds of the brokers alternate; the tables show medians of %d.", payloadBytes, r.rounds)
	if r.load.messages > 0 {
		p("A round is %d messages.", r.load.messages)
	} else {
		p("A round publishes for %s, or as many messages as its scenario says.", r.load.time)
	}
	p("A ratio is Mosquitto's figure divided by Penstock's: of what is better when it is less, as CPU, memory and times, a higher")
	p("ratio is better for Penstock; of rates a lower one. All rounds are in benchmarks.csv, beside this document.")
	p("")
	p("- Publishers send as fast as the broker takes it, but are never more than a few thousand messages ahead of the")
	p("  slowest subscriber, so that no broker has a reason to drop anything. Every message carries a sequence number:")
	p("  a round in which one is missing, repeated or out of order counts as failed.")
	p("- CPU is user and system time of the broker alone, from the first message until the broker has answered a ping")
	p("  that each subscriber sends after its last acknowledgement, so that it has handled them all. The generator shares")
	p("  the cores with the broker, so rates depend on both, and on what else the machine does; CPU per delivery is the")
	p("  steadier figure. What the generator took of each round is in the CSV file.")
	p("- Bytes written to disk are what the kernel accounts to the broker (`write_bytes` in /proc/PID/io), up to")
	p("  %s after the end, as is CPU. `wchar` is what it passed to write(2), sockets included.", settle)
	p("- Memory of idle clients is read %s after the last of them has done something.", r.load.settle)
	p("- Penstock has %d access rules in force, its journal on, and its metrics read once a second.", len(accessRules))
	p("  Mosquitto has no access rules, no queue limit, no connection limit, 1,000 messages in flight at most,")
	p("  and persistence only where the scenario says so.")
	p("")
}

// group writes the table and the charts of one group.
func (r report) group(p printer, g group, plots string) {
	var results []result
	for _, res := range r.results {
		if res.scenario.group == g.name {
			results = append(results, res)
		}
	}
	if len(results) == 0 {
		return
	}
	p("## %s\n", g.title)
	p("%s\n", g.text)
	for _, res := range results {
		for _, f := range res.failures {
			p("**Failed:** %s: %s\n", res.scenario.title, strings.ReplaceAll(f, "\n", " / "))
		}
	}
	head, rule := "| |", "|---|"
	for _, c := range g.columns {
		for _, br := range r.brokers {
			head += fmt.Sprintf(" %s<br>%s |", c.name, br.name)
			rule += "---:|"
		}
		if c.ratio && len(r.brokers) == 2 {
			head += " ratio |"
			rule += "---:|"
		}
	}
	p("%s\n%s", head, rule)
	for _, res := range results {
		for _, name := range res.phaseNames() {
			title := res.scenario.title
			if name != "" {
				title += ": " + name
			}
			line := "| " + title + " |"
			for _, c := range g.columns {
				var values []float64
				for i := range r.brokers {
					v := res.medianOf(c, i, name)
					if math.IsNaN(v) {
						line += " – |"
						continue
					}
					values = append(values, v)
					line += " " + fmt.Sprintf(c.format, v) + " |"
				}
				if c.ratio && len(r.brokers) == 2 {
					line += " " + ratio(values) + " |"
				}
			}
			p("%s", line)
		}
	}
	p("")
	for _, c := range g.charts {
		if _, ok := r.chart(g, c); ok {
			p("![%s](%s/%s.svg)\n", c.title, plots, c.file)
		}
	}
}

// ratio is the second broker's figure in terms of the first's.
func ratio(values []float64) string {
	if len(values) != 2 || values[0] == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", values[1]/values[0])
}

func (r report) startups(p printer) {
	if len(r.starts) == 0 {
		return
	}
	p("## Start and memory without clients\n")
	p("From exec to the first CONNACK, median of %d, in milliseconds; resident memory %s after the start, in MiB.\n",
		startRounds, idleTime)
	p("| broker | empty data directory | existing data directory | RSS |\n|---|---:|---:|---:|")
	for _, s := range r.starts {
		p("| %s | %s | %s | %.1f |", s.broker, milliseconds(s.empty), milliseconds(s.existing), mebibytes(s.idle))
	}
	p("")
}

func (r report) sizes(p printer) {
	if len(r.files) == 0 {
		return
	}
	p("## Size of the programs\n")
	p("| file | MiB |\n|---|---:|")
	for _, f := range r.files {
		p("| %s | %.1f |", f.name, float64(f.size)/(1<<20))
	}
	p("")
}

// profiled says in what the broker spent its time.
func (r report) profiled(p printer) {
	if len(r.profiles) == 0 {
		return
	}
	p("## Where Penstock's CPU time goes\n")
	p("Each scenario once more, watched by `perf record`, from the first CONNACK to the end: percent of the samples, by")
	p("the function that was running. \"System calls\" is all that ran in the kernel for Penstock, most of it TCP.\n")
	for _, g := range groups() {
		if text, ok := g.claim.hold(g.name, r.profiles); ok {
			p("- %s: %s", g.title, text)
		}
	}
	p("")
	head, rule := "| scenario | samples |", "|---|---:|"
	for _, k := range kindNames() {
		head += " " + k + " |"
		rule += "---:|"
	}
	p("%s\n%s", head, rule)
	for _, pr := range r.profiles {
		line := fmt.Sprintf("| %s | %d |", pr.scenario.name, pr.samples)
		for _, k := range kindNames() {
			line += fmt.Sprintf(" %.0f |", pr.kinds[k])
		}
		p("%s", line)
	}
	p("\n<details><summary>the functions with the largest share</summary>\n")
	p("Percent in the function itself, and in parentheses with what it called. The samples are taken by a timer, which")
	p("waits where the kernel does not let itself be interrupted: finish_task_switch stands for changing to another thread,")
	p("_raw_spin_unlock_irqrestore for waking one.\n")
	p("| scenario | functions |\n|---|---|")
	for _, pr := range r.profiles {
		var list []string
		for _, f := range pr.top {
			list = append(list, fmt.Sprintf("`%s` %.1f (%.1f)", f.name, f.self, f.total))
		}
		p("| %s | %s |", pr.scenario.name, strings.Join(list, ", "))
	}
	p("\n</details>\n")
}

func milliseconds(d []time.Duration) string {
	m, ok := median(d, meanOf)
	if !ok {
		return "–"
	}
	return fmt.Sprintf("%.1f", float64(m)/float64(time.Millisecond))
}
