package broker

import (
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MachineTime is what the clocks of the machine say at one moment.
type MachineTime struct {
	Wall   int64  // Unix milliseconds
	Synced bool   // a time service has set the wall clock, says the kernel or the service
	Boot   string // names the boot; empty: it is not known
	Uptime int64  // milliseconds since the boot, suspended time too
}

// timesyncd is the file that systemd-timesyncd makes when it has set the clock in
// this boot.
const timesyncd = "/run/systemd/timesync/synchronized"

// machineTime reads the clocks of this machine. What a container or a sandbox
// hides is as if the machine did not have it.
func machineTime() func() MachineTime {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it no two starts are of one boot
	boot := strings.TrimSpace(string(id))
	return func() MachineTime {
		m := MachineTime{Wall: time.Now().UnixMilli(), Boot: boot}
		var up unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err == nil {
			m.Uptime = up.Nano() / int64(time.Millisecond)
		} else {
			m.Boot = ""
		}
		var t syscall.Timex // no modes: it is only read, which needs no right
		if _, err := syscall.Adjtimex(&t); err == nil {
			m.Synced = t.Status&unix.STA_UNSYNC == 0
		} else if _, err := os.Stat(timesyncd); err == nil {
			m.Synced = true // the sandbox of penstock.service forbids the call, by which a clock can be set too
		}
		return m
	}
}
