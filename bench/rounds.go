package main

import (
	"encoding/csv"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// csvColumns are the columns of the file of all rounds that every phase has.
var csvColumns = []string{
	"scenario", "broker", "round", "phase", "count", "messages", "seconds", "cpu_s", "write_bytes", "wchar",
	"generator_cpu_s", "peak_rss_bytes", "metrics_read",
}

// csv renders all rounds, one line for each phase of each. Values that only
// some phases have come last, each in a column that is named after it.
func (r report) csv() string {
	var names []string
	r.eachPhase(func(_ []string, p phase) {
		for name := range maps.Keys(p.values) {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	})
	slices.Sort(names)
	var b strings.Builder
	w := csv.NewWriter(&b) // a strings.Builder takes everything: no error can come
	head := slices.Clone(csvColumns)
	for _, name := range names {
		head = append(head, strings.NewReplacer(" ", "_", ",", "").Replace(name))
	}
	_ = w.Write(head)
	r.eachPhase(func(fixed []string, p phase) {
		for _, name := range names {
			cell := ""
			if v, ok := p.values[name]; ok {
				cell = strconv.FormatFloat(v, 'f', 1, 64)
			}
			fixed = append(fixed, cell)
		}
		_ = w.Write(fixed)
	})
	w.Flush()
	return b.String()
}

// eachPhase calls f with the common cells of each line.
func (r report) eachPhase(f func(fixed []string, p phase)) {
	seconds := func(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) }
	whole := func(n uint64) string { return strconv.FormatUint(n, 10) }
	for _, res := range r.results {
		for i, samples := range res.samples {
			for n, s := range samples {
				for _, p := range s.phases {
					f([]string{
						res.scenario.name, r.brokers[i].name, strconv.Itoa(n + 1), p.name, whole(p.count), whole(p.messages),
						seconds(p.elapsed.Seconds()), seconds(p.cpu.Seconds()), whole(p.written), whole(p.wchar),
						seconds(p.generator.Seconds()), whole(s.peak), strconv.Itoa(s.scrapes),
					}, p)
				}
			}
		}
	}
}
