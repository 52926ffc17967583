package hw

import (
	"path"
	"slices"
)

// usual lists for each role the names (path.Match patterns) that kernels give
// to such an LED, the best first. Names are "device:colour:function" with parts
// left out at will; ACT and led0 are the green one of a Raspberry Pi. A board
// with other names says so in hw.leds.
var usual = [numRoles][]string{
	Status:   {"status", "*:status", "status:*", "ACT", "led0"},
	Uplink:   {"uplink", "*:uplink", "*:wan", "*:wwan", "wan"},
	Fault:    {"fault", "*:fault", "*:alarm", "error", "*:error", "error:*"},
	Activity: {"activity", "*:activity", "activity:*"},
}

// known picks from the LEDs that are present those with a usual name: role to
// name, no LED twice.
func known(present []string) map[string]string {
	present = slices.Sorted(slices.Values(present))
	leds := make(map[string]string)
	for r, globs := range usual {
		for _, glob := range globs {
			i := slices.IndexFunc(present, func(name string) bool {
				ok, _ := path.Match(glob, name)
				return ok
			})
			if i >= 0 {
				leds[Role(r).String()] = present[i]
				present = slices.Delete(present, i, i+1)
				break
			}
		}
	}
	return leds
}
