package hw

import (
	"path/filepath"
	"strings"
	"testing"
)

// The tree testdata/wear/sys has the layout of Linux 6.1 on a machine with eMMC
// (bcm2711), with cards in different states; the values are those of JESD84-B50.
func TestWear(t *testing.T) {
	for _, tt := range []struct {
		name         string
		major, minor uint32
		want         Wear
	}{
		{"a partition of a new eMMC", 179, 2, Wear{Device: "mmcblk0", Used: 20, Life: "10-20 % used", Spare: "normal"}},
		{"the whole of it", 179, 0, Wear{Device: "mmcblk0", Used: 20, Life: "10-20 % used", Spare: "normal"}},
		{"encrypted", 253, 0, Wear{Device: "mmcblk0", Used: 20, Life: "10-20 % used", Spare: "normal"}},
		{"an SD card", 179, 34, Wear{Device: "mmcblk1", Skipped: "not offered by this device, type SD"}},
		{"80 % used", 179, 66, Wear{Device: "mmcblk2", Used: 90, Life: "80-90 % used", Spare: "normal",
			Warning: "flash: mmcblk2 is near its end (80-90 % used; spare blocks: normal): replace it"}},
		{"an old eMMC that says nothing", 179, 98, Wear{Device: "mmcblk3", Skipped: "the device leaves its life time undefined"}},
		{"the second kind of cells is worse", 179, 130, Wear{Device: "mmcblk4", Used: 110, Life: "more than 100 % used", Spare: "warning: 80 % of the reserve is used",
			Warning: "flash: mmcblk4 is near its end (more than 100 % used; spare blocks: warning: 80 % of the reserve is used): replace it"}},
		{"no reserve", 179, 162, Wear{Device: "mmcblk5", Used: 10, Life: "0-10 % used", Spare: "urgent: 90 % of the reserve is used",
			Warning: "flash: mmcblk5 is near its end (0-10 % used; spare blocks: urgent: 90 % of the reserve is used): replace it"}},
		{"nonsense", 179, 194, Wear{Device: "mmcblk6", Skipped: "life_time is 0xc, which means nothing"}},
		{"several devices", 253, 1, Wear{Device: "dm-1", Skipped: "the device is made of several others"}},
		{"a disk", 8, 0, Wear{Device: "sda", Skipped: "not offered by this device"}},
		{"a RAM disk", 0, 25, Wear{Skipped: "the directory is on no block device"}},
	} {
		if got := wearOf("testdata/wear/sys", tt.major, tt.minor); got != tt.want {
			t.Errorf("%s: got\n%+v, want\n%+v", tt.name, got, tt.want)
		}
	}
}

// Whatever this machine has, it is not an error.
func TestWearOfThisMachine(t *testing.T) {
	dir := t.TempDir()
	if w := FlashWear("", dir); w.Skipped == "" && w.Life == "" {
		t.Errorf("got neither a life nor a reason: %+v", w)
	}
	if w := FlashWear("", filepath.Join(dir, "none")); !strings.Contains(w.Skipped, "cannot be looked at") {
		t.Errorf("of no directory: %+v", w)
	}
}
