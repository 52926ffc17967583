package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of times in /proc: USER_HZ, 100 on every
// architecture that Go and Linux share.
const ticksPerSecond = 100

// usage is what a process has used since its start.
type usage struct {
	at      time.Time
	cpu     time.Duration // user and system time of all its threads
	written uint64        // bytes that it caused to be written to storage
	wchar   uint64        // bytes handed to write(2) and its like, sockets included
}

// usageOf reads /proc/PID/stat and /proc/PID/io.
func usageOf(pid int) (usage, error) {
	u := usage{at: time.Now()}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	if u.cpu, err = parseStat(stat); err != nil {
		return u, err
	}
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return u, err
	}
	if u.written, err = parseField(io, "write_bytes"); err != nil {
		return u, err
	}
	u.wchar, err = parseField(io, "wchar")
	return u, err
}

// memoryOf returns a field of /proc/PID/status such as VmHWM or VmRSS, in bytes.
func memoryOf(pid int, field string) (uint64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	kB, err := parseField(status, field)
	return kB << 10, err
}

// parseStat returns utime and stime together. The name of the command, in
// parentheses, may hold spaces and parentheses itself.
func parseStat(stat []byte) (time.Duration, error) {
	i := bytes.LastIndexByte(stat, ')')
	f := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(f) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat: cannot read %q", stat)
	}
	var ticks uint64
	for _, s := range f[11:13] {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/PID/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / ticksPerSecond), nil
}

// parseField returns the first number of the line "name: number …".
func parseField(text []byte, name string) (uint64, error) {
	for line := range strings.Lines(string(text)) {
		value, ok := strings.CutPrefix(line, name+":")
		if !ok {
			continue
		}
		if f := strings.Fields(value); len(f) > 0 {
			return strconv.ParseUint(f[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("no field %s in %q", name, text)
}

// machine describes where the figures come from.
type machine struct {
	Cores      int
	CPU        string
	Kernel     string
	Go         string
	FileSystem string // under the data directories
}

func describeMachine(dir string) machine {
	m := machine{Cores: runtime.NumCPU(), Go: runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH}
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	m.CPU = parseCPU(string(cpuinfo))
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	m.Kernel = strings.TrimSpace(string(kernel))
	mounts, _ := os.ReadFile("/proc/mounts")
	if abs, err := filepath.Abs(dir); err == nil {
		m.FileSystem = parseMounts(string(mounts), abs)
	}
	return m
}

// parseCPU returns the name of the processor: "model name" on x86, "Model"
// (the board) on most ARM kernels, which name no processor.
func parseCPU(cpuinfo string) string {
	for _, key := range []string{"model name", "Model", "Hardware"} {
		for line := range strings.Lines(cpuinfo) {
			name, value, _ := strings.Cut(line, ":")
			if strings.TrimSpace(name) == key {
				return strings.TrimSpace(value)
			}
		}
	}
	return "unknown"
}

// parseMounts returns the type of the file system that dir is on.
func parseMounts(mounts, dir string) string {
	kind, longest := "unknown", 0
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if len(f) < 3 || len(f[1]) < longest {
			continue
		}
		if dir == f[1] || strings.HasPrefix(dir, strings.TrimSuffix(f[1], "/")+"/") {
			kind, longest = f[2], len(f[1])
		}
	}
	return kind
}
