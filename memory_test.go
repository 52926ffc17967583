package main

import (
	"context"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

func TestGiveBackMemory(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name        string
		bytes       []uint64 // at each look; the last one stays
		collections []uint64
		live        uint64 // what free leaves
		want        int    // calls of free in five looks
	}{
		{"nothing happens", []uint64{20 * mib}, []uint64{1}, 20 * mib, 0},
		{"little is held", []uint64{20 * mib, 27 * mib}, []uint64{1}, 20 * mib, 0},
		{"a peak, then quiet", []uint64{20 * mib, 200 * mib}, []uint64{1, 1}, 20 * mib, 1},
		{"busy, then quiet", []uint64{20 * mib, 200 * mib, 200 * mib, 200 * mib}, []uint64{1, 2, 3, 3}, 30 * mib, 1},
		{"always busy", []uint64{20 * mib, 200 * mib}, []uint64{1, 2, 3, 4, 5, 6, 7}, 20 * mib, 0},
		{"what is held is needed", []uint64{20 * mib, 200 * mib}, []uint64{1}, 200 * mib, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				looks, freed := 0, 0
				at := func(l []uint64) uint64 { return l[min(looks, len(l)-1)] }
				held := func() (uint64, uint64) {
					bytes, collections := at(tt.bytes), at(tt.collections)
					looks++
					if freed > 0 {
						bytes = tt.live
					}
					return bytes, collections
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*memoryEvery+time.Second)
				defer cancel()
				if err := giveBackMemory(ctx, held, func() { freed++ }); err != nil {
					t.Error(err)
				}
				if freed != tt.want {
					t.Errorf("freed %d times, want %d", freed, tt.want)
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
