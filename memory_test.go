package main

import (
	"context"
	"math"
	"runtime/debug"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestGiveBackMemory(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name        string
		bytes       []uint64 // at each look, from the start on; the last one stays
		collections []uint64
		needed      []uint64 // what free leaves, at each look
		want        []int    // the looks at which free is called, in three minutes
	}{
		{"nothing happens", []uint64{20}, []uint64{1}, []uint64{20}, nil},
		{"little is held", []uint64{20, 27}, []uint64{1}, []uint64{20}, nil},
		{"a peak, then quiet", []uint64{20, 200}, []uint64{1}, []uint64{20}, []int{1}},
		{"busy, then quiet", []uint64{20, 200}, []uint64{1, 2, 3, 3}, []uint64{24}, []int{3}},
		{"always busy", []uint64{20, 200}, nil, []uint64{20}, nil},
		{"needed for long", []uint64{20, 200}, []uint64{1}, []uint64{200}, []int{1, 3, 7, 15, 27}},
		{"needed for a while", []uint64{20, 200}, []uint64{1}, []uint64{200, 200, 200, 20}, []int{1, 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				at := func(l []uint64, i int) uint64 { return l[min(i, len(l)-1)] }
				began := time.Now()
				look := func() int { return int(time.Since(began) / memoryEvery) }
				var freed []int
				held := func() (uint64, uint64) {
					bytes, collections := at(tt.bytes, look()), uint64(look())
					if tt.collections != nil {
						collections = at(tt.collections, look())
					}
					if len(freed) > 0 {
						bytes = at(tt.needed, freed[len(freed)-1])
					}
					return bytes * mib, collections
				}
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute-time.Second)
				defer cancel()
				if err := giveBackMemory(ctx, held, func() { freed = append(freed, look()) }); err != nil {
					t.Error(err)
				}
				if !slices.Equal(freed, tt.want) {
					t.Errorf("freed at %d, want %d", freed, tt.want)
				}
			})
		})
	}
}

// What giveBackMemory reads has to show a heap that comes and goes.
func TestHeldMemory(t *testing.T) {
	debug.FreeOSMemory()
	before, cycles := heldMemory()
	ballast := make([]byte, 64<<20)
	for i := range ballast {
		ballast[i] = 1
	}
	during, _ := heldMemory()
	ballast = nil
	debug.FreeOSMemory()
	after, more := heldMemory()
	if during < before+60<<20 || after > during-60<<20 || more <= cycles {
		t.Errorf("held %d, with 64 MiB more %d, then %d bytes; collections %d, then %d", before, during, after, cycles, more)
	}
}

// The machine's memory bounds the heap, and who sets GOGC and GOMEMLIMIT is
// heard.
func TestSetMemory(t *testing.T) {
	percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(math.MaxInt64)
	defer debug.SetGCPercent(percent)
	defer debug.SetMemoryLimit(limit)
	t.Setenv("GOGC", "100")
	t.Setenv("GOMEMLIMIT", "off")
	setMemory()
	if p, l := debug.SetGCPercent(100), debug.SetMemoryLimit(-1); p != 100 || l != math.MaxInt64 {
		t.Errorf("with the environment set: %d %%, %d bytes, want it left alone", p, l)
	}
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	setMemory()
	if p, l := debug.SetGCPercent(100), debug.SetMemoryLimit(-1); p != garbagePercent || l < 64<<20 || l > 1<<45 {
		t.Errorf("got %d %%, %d bytes", p, l)
	}
}
