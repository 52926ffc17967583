package main

import (
	"os"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	const rest = " S 1 4242 4242 0 -1 4194560 1200 0 3 0 1234 66 7 8 20 0 9 0 12345 1000000 2000"
	for _, name := range []string{"(penstock)", "(a) b (c)"} {
		got, err := parseStat([]byte("4242 " + name + rest + "\n"))
		if want := 13 * time.Second; err != nil || got != want {
			t.Errorf("%s: got %v, error %v, want %v", name, got, err, want)
		}
	}
	for _, bad := range []string{"", "4242", "4242 (x) S 1 2", "4242 (x) S 1 4242 4242 0 -1 4194560 1200 0 3 0 many 66 7"} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: got %v, want an error", bad, got)
		}
	}
}

func TestParseField(t *testing.T) {
	const text = "rchar: 1\nwchar: 22\nwrite_bytes: 4096\ncancelled_write_bytes: 5\nVmHWM:\t   8404 kB\nEmpty:\n"
	for name, want := range map[string]uint64{"wchar": 22, "write_bytes": 4096, "VmHWM": 8404} {
		if got, err := parseField([]byte(text), name); err != nil || got != want {
			t.Errorf("%s: got %d, error %v, want %d", name, got, err, want)
		}
	}
	for _, name := range []string{"VmRSS", "Empty", "write"} {
		if got, err := parseField([]byte(text), name); err == nil {
			t.Errorf("%s: got %d, want an error", name, got)
		}
	}
}

func TestParseCPU(t *testing.T) {
	tests := []struct{ cpuinfo, want string }{
		{"processor\t: 0\nmodel\t\t: 167\nmodel name\t: Intel(R) Xeon(R)\n", "Intel(R) Xeon(R)"},
		{"processor\t: 0\nCPU part\t: 0xd08\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n", "Raspberry Pi 4 Model B Rev 1.4"},
		{"processor : 0\n", "unknown"},
	}
	for _, tt := range tests {
		if got := parseCPU(tt.cpuinfo); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.cpuinfo, got, tt.want)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const mounts = "/dev/root / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/sda1 /tmp/deep xfs rw 0 0\nbroken\n"
	for dir, want := range map[string]string{
		"/": "ext4", "/tmp": "tmpfs", "/tmp/x": "tmpfs", "/tmp/deep/x": "xfs", "/tmpfile": "ext4",
	} {
		if got := parseMounts(mounts, dir); got != want {
			t.Errorf("%s: got %s, want %s", dir, got, want)
		}
	}
	if got := parseMounts("", "/tmp"); got != "unknown" {
		t.Errorf("without mounts: got %s, want unknown", got)
	}
}

// What the kernel says of this process must be readable, or no figure is.
func TestOwnProcess(t *testing.T) {
	before, err := usageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		after, err := usageOf(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after.cpu > before.cpu {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s of work: CPU time is still %v", after.cpu)
		}
	}
	for _, field := range []string{"VmHWM", "VmRSS"} {
		if got, err := memoryOf(os.Getpid(), field); err != nil || got < 1<<20 {
			t.Errorf("%s: got %d, error %v, want at least 1 MiB", field, got, err)
		}
	}
}
