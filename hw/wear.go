package hw

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Wear is what an eMMC says about its own age. An SD card says nothing.
type Wear struct {
	// Device is the name of the block device, as "mmcblk0"; empty if the
	// directory is on none.
	Device string
	// Skipped is why there is nothing to say: what follows is not known then.
	Skipped string
	// Used is how much of its life the device says is over, percent, in steps of
	// 10: the upper end of what it says, so 10 for a new one and 110 for one
	// beyond its end. Of the two kinds of cells that a device may have, it is the
	// one that is worse off.
	Used int
	// Life and Spare are the same in words, and what the device says of the
	// blocks that it has in reserve.
	Life, Spare string
	// Warning is what needs attention, for people; empty if nothing does.
	Warning string
}

// wearWarning is from what share of its life on a device is reported, percent:
// the lower end of the step.
const wearWarning = 80

// spareWords are the values of PRE_EOL_INFO (JESD84-B50).
var spareWords = []string{"not defined", "normal", "warning: 80 % of the reserve is used", "urgent: 90 % of the reserve is used"}

const spareUrgent = 3

// FlashWear returns what the device says that holds the directory dir. sysRoot is
// where sysfs is mounted; "" means /sys. It reads a few small files, and never
// fails: what cannot be known is in Skipped.
func FlashWear(sysRoot, dir string) Wear {
	if sysRoot == "" {
		sysRoot = "/sys"
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return Wear{Skipped: fmt.Sprintf("%s cannot be looked at: %v", dir, err)}
	}
	dev := uint64(st.Dev)
	return wearOf(sysRoot, unix.Major(dev), unix.Minor(dev))
}

// wearOf is FlashWear of a device number.
func wearOf(sysRoot string, major, minor uint32) Wear {
	block, err := filepath.EvalSymlinks(filepath.Join(sysRoot, "dev/block", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return Wear{Skipped: "the directory is on no block device"}
	}
	disk, err := wholeDisk(block)
	if err != nil {
		return Wear{Device: filepath.Base(block), Skipped: err.Error()}
	}
	w := Wear{Device: filepath.Base(disk)}
	life, err := sysValues(filepath.Join(disk, "device/life_time"))
	if errors.Is(err, fs.ErrNotExist) {
		w.Skipped = "not offered by this device"
		if kind, err := os.ReadFile(filepath.Join(disk, "device/type")); err == nil {
			w.Skipped += ", type " + strings.TrimSpace(string(kind))
		}
		return w
	}
	if err != nil {
		w.Skipped = fmt.Sprintf("life_time cannot be read: %v", err)
		return w
	}
	worst := 0
	for _, v := range life {
		worst = max(worst, v)
	}
	switch {
	case worst == 0:
		w.Skipped = "the device leaves its life time undefined"
		return w
	case worst <= 10:
		w.Used, w.Life = worst*10, fmt.Sprintf("%d-%d %% used", worst*10-10, worst*10)
	case worst == 11:
		w.Used, w.Life = 110, "more than 100 % used"
	default:
		w.Skipped = fmt.Sprintf("life_time is %#x, which means nothing", worst)
		return w
	}
	urgent := false
	if spare, err := sysValues(filepath.Join(disk, "device/pre_eol_info")); err == nil && len(spare) == 1 && spare[0] < len(spareWords) {
		w.Spare, urgent = spareWords[spare[0]], spare[0] == spareUrgent
	}
	if urgent || w.Used-10 >= wearWarning {
		w.Warning = fmt.Sprintf("flash: %s is near its end (%s", w.Device, w.Life)
		if w.Spare != "" {
			w.Warning += "; spare blocks: " + w.Spare
		}
		w.Warning += "): replace it"
	}
	return w
}

// wholeDisk returns the folder of the disk that a block device is, is a part of,
// or is laid over, as an encrypted one is.
func wholeDisk(block string) (string, error) {
	for range 8 { // of more layers nobody has heard
		if _, err := os.Stat(filepath.Join(block, "partition")); err == nil {
			block = filepath.Dir(block)
		}
		under, err := os.ReadDir(filepath.Join(block, "slaves"))
		if err != nil || len(under) == 0 {
			return block, nil
		}
		if len(under) > 1 {
			return "", errors.New("the device is made of several others")
		}
		if block, err = filepath.EvalSymlinks(filepath.Join(block, "slaves", under[0].Name())); err != nil {
			return "", fmt.Errorf("the device below cannot be found: %w", err)
		}
	}
	return "", errors.New("the device has too many layers")
}

// sysValues reads numbers of a file of sysfs, as "0x02 0x01".
func sysValues(name string) ([]int, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var values []int
	for _, word := range strings.Fields(string(text)) {
		v, err := strconv.ParseUint(word, 0, 8)
		if err != nil {
			return nil, err
		}
		values = append(values, int(v))
	}
	if len(values) == 0 {
		return nil, errors.New("is empty")
	}
	return values, nil
}
