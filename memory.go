package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"syscall"
	"time"
)

const (
	memoryEvery  = 5 * time.Second // how often memory is looked at
	memorySeldom = time.Minute     // how often it is collected while it is all needed
	memorySlack  = 8 << 20         // bytes that are not worth a collection
)

// How much garbage may be there before it is collected, in percent of what is
// needed. The heap is small as long as all is well, and at Go's 100 the
// collector takes a fifth of the CPU of busy QoS 1 traffic.
const garbagePercent = 200

// memoryShare is the part of the machine's memory above which garbage is
// collected earlier, whatever that costs.
const memoryShare = 2 // a half

// setMemory tells the collector so, unless the environment does it (GOGC,
// GOMEMLIMIT).
func setMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
	var info syscall.Sysinfo_t
	if os.Getenv("GOMEMLIMIT") == "" && syscall.Sysinfo(&info) == nil {
		debug.SetMemoryLimit(int64(info.Totalram) * int64(info.Unit) / memoryShare)
	}
}

// startMemory gives memory back to the system after a peak. Left alone, Go
// collects the heap of a quiet program every two minutes, and then keeps what it
// freed for minutes more: on a gateway that is memory which others lack.
func (a *App) startMemory() {
	setMemory()
	a.parts.add("memory", func(ctx context.Context) error {
		return giveBackMemory(ctx, heldMemory, debug.FreeOSMemory)
	}, nil)
}

// giveBackMemory calls free while the program holds more than it once did with,
// and is quiet: no collection came by itself since the last look. One that is
// busy collects, and is not to be made to fault its pages in again. What cannot
// be freed now may be garbage later, so it tries again, less and less often.
func giveBackMemory(ctx context.Context, held func() (bytes, collections uint64), free func()) error {
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	least, seen := held()
	wait, waited := memoryEvery, time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		waited += memoryEvery
		bytes, collections := held()
		switch {
		case collections != seen:
		case bytes > least+memorySlack && waited >= wait:
			free()
			bytes, collections = held()
			wait, waited = min(2*wait, memorySeldom), 0
			if bytes <= least+memorySlack {
				wait = memoryEvery
			}
		}
		least, seen = min(least, bytes), collections
	}
}

// heldMemory returns how many bytes the Go runtime holds of the system, and how
// many collections there were.
func heldMemory() (bytes, collections uint64) {
	samples := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(samples)
	return samples[0].Value.Uint64() - samples[1].Value.Uint64(), samples[2].Value.Uint64()
}
