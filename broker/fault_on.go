//go:build faults

package broker

import (
	"os"
	"strconv"
	"sync/atomic"
)

// activeFault is the defect that is switched on; PENSTOCK_FAULT sets it for a
// whole process.
var activeFault atomic.Int32

func fault(d defect) bool {
	if activeFault.Load() == 0 {
		if n, err := strconv.Atoi(os.Getenv("PENSTOCK_FAULT")); err == nil {
			activeFault.Store(int32(n))
		} else {
			activeFault.Store(-1)
		}
	}
	return activeFault.Load() == int32(d)
}
