package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	profileTop = 8 // functions shown of each scenario
	// profileRate is in samples a second and thread: enough for a second of
	// load, and prime, so that it does not fall in step with timers.
	profileRate = 997
)

// A profile says in what a scenario spent the broker's CPU time.
type profile struct {
	scenario scenario
	samples  int
	kinds    map[string]float64 // percent, by kind of work
	top      []function         // those with the largest share of their own
}

// A function is one line of a profile: percent of the samples that were in it,
// and in it or what it called.
type function struct {
	name        string
	kernel      bool
	self, total float64
}

// profileOne runs a scenario once, with perf watching the broker's process
// from the first CONNACK to the end. What perf recorded stays in dir.
func profileOne(ctx context.Context, b *broker, s scenario, l load, dir string) (profile, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return profile{}, err
	}
	file := filepath.Join(dir, s.name+".perf")
	watched := *b
	watched.watch = func(pid int) (func() error, error) { return record(ctx, file, pid) }
	if _, err := runRound(ctx, &watched, s, l, roundTimeout); err != nil {
		return profile{}, err
	}
	out, err := exec.CommandContext(ctx, "perf", "report", "--stdio", "--children", "-g", "none",
		"-F", "overhead_children,overhead,sample,sym", "--percent-limit", "0", "-i", file).Output()
	if err != nil {
		return profile{}, fmt.Errorf("perf report: %w", err)
	}
	p, err := parsePerf(string(out))
	p.scenario = s
	return p, err
}

// record starts perf and returns when it has opened its file; the function it
// returns lets it finish.
func record(ctx context.Context, file string, pid int) (func() error, error) {
	_ = os.Remove(file) // most often there is none
	cmd := exec.CommandContext(ctx, "perf", "record", "-q", "-e", "cpu-clock", "-F", strconv.Itoa(profileRate), "-g",
		"-o", file, "-p", strconv.Itoa(pid))
	cmd.WaitDelay = time.Second
	out := newOutput()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("perf: %w: apt-get install linux-perf, or leave -profile out", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for range 1000 {
		if info, err := os.Stat(file); err == nil && info.Size() > 0 {
			break
		}
		select {
		case err := <-exited:
			return nil, fmt.Errorf("perf ended: %v: %s", err, out.tail())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return func() error {
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			return fmt.Errorf("stop perf: %w", err)
		}
		err := <-exited // by the signal, which perf passes on to itself
		if info, statErr := os.Stat(file); statErr != nil || info.Size() == 0 {
			return fmt.Errorf("perf: no samples: %w: %s", cmp.Or(statErr, err), out.tail())
		}
		return nil
	}, nil
}

// parsePerf reads what perf report prints: lines of cumulative percent,
// percent, samples, [k] or [.], and the function's name.
func parsePerf(text string) (profile, error) {
	p := profile{kinds: map[string]float64{}}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 5 || strings.HasPrefix(f[0], "#") || !strings.HasSuffix(f[0], "%") {
			continue
		}
		total, err1 := strconv.ParseFloat(strings.TrimSuffix(f[0], "%"), 64)
		self, err2 := strconv.ParseFloat(strings.TrimSuffix(f[1], "%"), 64)
		samples, err3 := strconv.Atoi(f[2])
		if err := cmp.Or(err1, err2, err3); err != nil {
			return p, fmt.Errorf("perf report: cannot read %q: %w", line, err)
		}
		fn := function{name: strings.Join(f[4:], " "), kernel: f[3] == "[k]", self: self, total: total}
		p.samples += samples
		if self > 0 {
			p.kinds[fn.kind()] += self
			p.top = append(p.top, fn)
		}
	}
	if p.samples == 0 {
		return p, fmt.Errorf("perf report: no samples in %q", text)
	}
	slices.SortStableFunc(p.top, func(a, b function) int { return cmp.Compare(b.self, a.self) })
	p.top = p.top[:min(profileTop, len(p.top))]
	return p, nil
}

// Kinds of work, in the order of the report. A function is of the first kind
// of which a name is in its own. A deferwrap is what a defer runs: in the
// broker's hot path that is the unlocking of a mutex.
var kinds = []struct {
	name  string
	names []string
}{
	{"copying", []string{"runtime.memmove", "runtime.memclr", "runtime.typedmemmove", "runtime.duffcopy", "runtime.duffzero"}},
	{"locks", []string{".deferwrap", "runtime.lock2", "runtime.unlock2", "runtime.procyield", "runtime.futex", "runtime.sema", "sync.", "sync/atomic.", "internal/sync.", "runtime.notewakeup", "runtime.notesleep"}},
	{"allocation and garbage", []string{"runtime.malloc", "runtime.newobject", "runtime.growslice", "runtime.makeslice", "runtime.gc", "runtime.scan", "runtime.grey", "runtime.mark", "runtime.sweep", "runtime.bgs", "runtime.(*mcache)", "runtime.(*mcentral)", "runtime.(*mheap)", "runtime.(*mspan)", "runtime.(*gc", "runtime.(*sweep", "runtime.nextFree", "runtime.heapBits", "runtime.findObject", "runtime.wb", "runtime.(*pageAlloc)", "runtime.(*scavenge", "runtime.spanOf", "runtime.typePointers", "runtime.writeHeap", "runtime.bulkBarrier", "runtime.tryDeferToSpanScan", "runtime.(*spanInlineMarkBits)"}},
	{"SQLite", []string{"modernc.org/", "database/sql"}},
	{"storage", []string{"penstock/storage"}},
	{"mochi", []string{"mochi-mqtt"}},
	{"broker", []string{"penstock/broker"}},
	{"Go runtime", []string{"runtime.", "runtime/", "internal/runtime"}},
	{"network library", []string{"internal/poll", "net.", "syscall.", "internal/syscall", "crypto/"}},
}

const (
	kernelKind = "system calls"
	otherKind  = "other"
)

func (f function) kind() string {
	if f.kernel {
		return kernelKind
	}
	for _, k := range kinds {
		if slices.ContainsFunc(k.names, func(name string) bool { return strings.Contains(f.name, name) }) {
			return k.name
		}
	}
	return otherKind
}

// kindNames are the columns of the report.
func kindNames() []string {
	list := []string{kernelKind}
	for _, k := range kinds {
		list = append(list, k.name)
	}
	return append(list, otherKind)
}

// String is the profile as a line of progress.
func (p profile) String() string {
	var list []string
	for _, k := range kindNames() {
		if v := p.kinds[k]; v >= 1 {
			list = append(list, fmt.Sprintf("%s %.0f", k, v))
		}
	}
	return fmt.Sprintf("%d samples, percent: %s", p.samples, strings.Join(list, ", "))
}

// A claim is what a person has found out about a group's profiles. It is shown
// as long as the kinds of work that it names are still the largest ones.
type claim struct {
	kinds []string
	text  string
}

// hold returns the claim if it still holds, else what the profiles themselves
// say; false when there are none of the group.
func (c claim) hold(group string, profiles []profile) (string, bool) {
	sum, n := map[string]float64{}, 0.0
	for _, p := range profiles {
		if p.scenario.group == group {
			n++
			for k, v := range p.kinds {
				sum[k] += v
			}
		}
	}
	if n == 0 {
		return "", false
	}
	order := kindNames()
	slices.SortStableFunc(order, func(a, b string) int { return cmp.Compare(sum[b], sum[a]) })
	shares := make([]string, 3)
	for i := range shares {
		shares[i] = fmt.Sprintf("%s %.0f%%", order[i], sum[order[i]]/n)
	}
	text := strings.Join(shares, ", ") + "."
	first := slices.Sorted(slices.Values(order[:min(len(c.kinds), len(order))]))
	if c.text != "" && slices.Equal(first, slices.Sorted(slices.Values(c.kinds))) {
		text += " " + c.text
	}
	return text, true
}
