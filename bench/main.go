// Command bench measures Penstock beside Debian's Mosquitto: it starts both,
// loads them in turn over loopback with a generator of its own, checks that
// every message arrives once and in order, and writes what each took of CPU,
// memory and disk into a Markdown file.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	startRounds = 10
	idleTime    = 5 * time.Second
	// A round that takes longer has failed. The slowest good one, the offline
	// queue on a slow disk, stays well below.
	roundTimeout = time.Minute
	plotsFolder  = "plots" // of the charts, beside the report
	startName    = "start" // what -scenario calls start time and idle memory
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit status: 1 when a round failed or nothing could be
// measured, 2 when the arguments are wrong.
func run(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err != nil {
		return 2
	}
	raiseFileLimit()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := o.measure(ctx, stdout); err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

// raiseFileLimit lets this program, and the brokers that it starts, open as
// many files as the system allows: 10,000 clients are as many connections. What
// is missing then shows as a failed round.
func raiseFileLimit() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
}

// options are the command line.
type options struct {
	penstock, mosquitto string
	slow                string
	out                 string
	only                *regexp.Regexp
	rounds              int
	load                load
	profiles            string
	command             string
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{command: strings.Join(append([]string{"go run ./bench"}, args...), " ")}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.penstock, "penstock", "bin/penstock", "Penstock's `program`, or none")
	f.StringVar(&o.slow, "slow", "", "Penstock's `program` built with -tags slowdisk, for the scenarios whose names begin with slow")
	f.StringVar(&o.mosquitto, "mosquitto", "mosquitto", "Mosquitto's `program`, or none")
	f.StringVar(&o.out, "out", "", "`file` for the report; standard output if empty")
	only := f.String("scenario", "", "run what matches this `regexp` only: "+strings.Join(names(), ", "))
	f.IntVar(&o.rounds, "rounds", 5, "rounds per scenario and broker")
	f.Uint64Var(&o.load.messages, "messages", 0, "messages per round; 0 means by time")
	f.DurationVar(&o.load.time, "time", 3*time.Second, "publishing time of a round")
	f.DurationVar(&o.load.settle, "settle", 10*time.Second, "how long memory of idle clients settles before it is read")
	quick := f.Bool("quick", false, "one round of short times and few messages, to try something: as -rounds 1 -time 1s -settle 3s")
	f.StringVar(&o.profiles, "profile", "", "run each scenario once more with Penstock, and leave what perf records in this `folder`")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if *quick {
		o.rounds, o.load.time, o.load.settle, o.load.short = 1, time.Second, 3*time.Second, true
	}
	err := func() (err error) {
		if f.NArg() > 0 {
			return fmt.Errorf("unexpected argument %q", f.Arg(0))
		}
		if o.rounds < 1 || o.load.time <= 0 || o.load.time > roundTimeout/2 {
			return fmt.Errorf("-rounds must be at least 1, -time above 0s and at most %s", roundTimeout/2)
		}
		if o.penstock == "none" && o.mosquitto == "none" {
			return errors.New("no broker to measure")
		}
		if o.only, err = regexp.Compile(*only); err != nil {
			return err
		}
		for _, name := range names() {
			if o.only.MatchString(name) {
				return nil
			}
		}
		return fmt.Errorf("no scenario matches %q: there are %s", *only, strings.Join(names(), ", "))
	}()
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
	}
	return o, err
}

// names returns what -scenario can match.
func names() []string {
	var list []string
	for _, s := range scenarios() {
		list = append(list, s.name)
	}
	return append(list, startName)
}

// measure runs everything and writes the report, also when rounds failed.
func (o options) measure(ctx context.Context, progress io.Writer) error {
	r := report{
		command: o.command, date: time.Now(), machine: describeMachine(os.TempDir()),
		rounds: o.rounds, load: o.load,
	}
	if o.penstock != "none" {
		b, err := newPenstock(ctx, o.penstock)
		if err == nil && o.slow != "" {
			b.slow, err = filepath.Abs(o.slow)
		}
		if err != nil {
			return err
		}
		r.brokers = append(r.brokers, b)
	}
	if o.mosquitto != "none" {
		b, err := newMosquitto(ctx, o.mosquitto)
		if err != nil {
			return err
		}
		r.brokers = append(r.brokers, b)
	}

	failures := 0
	for _, s := range scenarios() {
		if !o.only.MatchString(s.name) || !slices.ContainsFunc(r.brokers, func(b *broker) bool { return b.runs(s) }) {
			continue
		}
		res := o.compare(ctx, s, r.brokers, progress)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		failures += len(res.failures)
		r.results = append(r.results, res)
		if o.profiles != "" && o.penstock != "none" && s.fsync == 0 {
			p, err := profileOne(ctx, r.brokers[0], s, o.load, o.profiles)
			if err != nil { // what was measured until now is not lost for it
				failures++
				fmt.Fprintf(progress, "%-22s profile   failed: %v\n", s.name, err)
				continue
			}
			fmt.Fprintf(progress, "%-22s profile   %v\n", s.name, p)
			r.profiles = append(r.profiles, p)
		}
	}
	if o.only.MatchString(startName) {
		for _, b := range r.brokers {
			s, err := measureStart(ctx, b)
			if err != nil {
				return err
			}
			fmt.Fprintf(progress, "%-22s %-9s %s ms empty, %s ms existing, %.1f MiB idle\n",
				startName, b.name, milliseconds(s.empty), milliseconds(s.existing), mebibytes(s.idle))
			r.starts = append(r.starts, s)
		}
		r.files = programs(o.penstock)
	}

	if err := r.write(o.out, progress); err != nil {
		return err
	}
	if failures > 0 {
		return fmt.Errorf("%d rounds or profiles failed", failures)
	}
	return nil
}

// write puts the report into a file, all rounds beside it and the charts below
// it; without a name it shows the report only.
func (r report) write(out string, progress io.Writer) error {
	if out == "" {
		_, err := io.WriteString(progress, r.markdown(plotsFolder))
		return err
	}
	rounds := strings.TrimSuffix(out, filepath.Ext(out)) + ".csv"
	err := errors.Join(replaceFile(out, []byte(r.markdown(plotsFolder))), replaceFile(rounds, []byte(r.csv())))
	for name, svg := range r.charts() {
		err = errors.Join(err, replaceFile(filepath.Join(filepath.Dir(out), plotsFolder, name), []byte(svg)))
	}
	return err
}

// compare runs one scenario, the brokers in turn.
func (o options) compare(ctx context.Context, s scenario, brokers []*broker, progress io.Writer) result {
	res := result{scenario: s, samples: make([][]sample, len(brokers))}
	for n := range o.rounds {
		for i, b := range brokers {
			if !b.runs(s) {
				continue
			}
			got, err := runRound(ctx, b, s, o.load, roundTimeout)
			if ctx.Err() != nil {
				return res // the caller looks at ctx too
			}
			if err != nil {
				fmt.Fprintf(progress, "%-22s %-9s failed: %v\n", s.name, b.name, err)
				res.failures = append(res.failures, fmt.Sprintf("round %d: %v", n+1, err))
				continue
			}
			for _, p := range got.phases {
				fmt.Fprintf(progress, "%-22s %-9s %s  %5.1f MiB\n", s.name, b.name, p, mebibytes(got.peak))
			}
			res.samples[i] = append(res.samples[i], got)
		}
	}
	return res
}

// measureStart starts a broker in an empty directory and again in the same,
// several times, and once more to see what it holds when idle.
func measureStart(ctx context.Context, b *broker) (startup, error) {
	s := startup{broker: b.name}
	once := func(f func(dir string) error) error {
		dir, err := os.MkdirTemp("", "penstock-bench-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		return f(dir)
	}
	for range startRounds {
		err := once(func(dir string) error {
			for _, to := range []*[]time.Duration{&s.empty, &s.existing} {
				p, err := b.start(ctx, dir, setup{persistent: true})
				if err != nil {
					return err
				}
				*to = append(*to, p.ready)
				p.stop()
			}
			return nil
		})
		if err != nil {
			return s, err
		}
	}
	err := once(func(dir string) error {
		p, err := b.start(ctx, dir, setup{persistent: true})
		if err != nil {
			return err
		}
		defer p.stop()
		select {
		case <-time.After(idleTime):
		case <-ctx.Done():
			return ctx.Err()
		}
		s.idle, err = memoryOf(p.pid(), "VmRSS")
		return err
	})
	return s, err
}

// programs returns the sizes of the binary that was measured and of those in dist.
func programs(penstock string) []file {
	paths, _ := filepath.Glob("dist/penstock-linux-*") // a constant pattern is never malformed
	var list []file
	for _, path := range append([]string{penstock}, paths...) {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			list = append(list, file{path, info.Size()})
		}
	}
	return list
}

// replaceFile writes beside path and renames, so that an interrupted run
// leaves the last report whole.
func replaceFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	next := path + ".new"
	if err := os.WriteFile(next, data, 0o644); err != nil {
		return err
	}
	return os.Rename(next, path)
}
