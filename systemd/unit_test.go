package systemd

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	unitFile   = "penstock.service"
	socketFile = "penstock.socket"
)

// threshold is the exposure, in tenths, that `systemd-analyze security` reports
// for the unit as it is. What remains is what a broker on a gateway is for:
// network, devices, /sys. It only ever goes down.
const threshold = "15"

// tool runs one of systemd's and returns what it wrote and how it ended.
func tool(t *testing.T, name string, args ...string) (output string, err error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: install the Debian package systemd", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

// rooted lays the unit out in a folder as it is installed, with what it starts.
func rooted(t *testing.T, unit, socket []byte) (root string) {
	t.Helper()
	root = t.TempDir()
	for path, f := range map[string]struct {
		content []byte
		mode    os.FileMode
	}{
		"etc/systemd/system/" + unitFile:   {unit, 0o644},
		"etc/systemd/system/" + socketFile: {socket, 0o644},
		"usr/bin/penstock":                 {[]byte("#!/bin/sh\n"), 0o755},
		"bin/kill":                         {[]byte("#!/bin/sh\n"), 0o755},
		// What the unit names, or systemd takes for granted.
		"etc/systemd/system/network.target":    {[]byte("[Unit]\n"), 0o644},
		"etc/systemd/system/sysinit.target":    {[]byte("[Unit]\n"), 0o644},
		"etc/systemd/system/basic.target":      {[]byte("[Unit]\n"), 0o644},
		"etc/systemd/system/sockets.target":    {[]byte("[Unit]\n"), 0o644},
		"etc/systemd/system/shutdown.target":   {[]byte("[Unit]\n"), 0o644},
		"etc/systemd/system/multi-user.target": {[]byte("[Unit]\n"), 0o644},
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, f.content, f.mode); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func verify(t *testing.T, unit []byte) (output string, err error) {
	t.Helper()
	return tool(t, "systemd-analyze", "verify", "--man=no", "--root="+rooted(t, unit, readFile(t, socketFile)), unitFile)
}

func verifySocket(t *testing.T, socket []byte) (output string, err error) {
	t.Helper()
	return tool(t, "systemd-analyze", "verify", "--man=no", "--root="+rooted(t, readUnit(t), socket), socketFile)
}

func TestSocketVerifies(t *testing.T) {
	socket := readFile(t, socketFile)
	if out, err := verifySocket(t, socket); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, c := range [][2]string{{"ListenStream=1883", "ListenStream=here"}, {"NoDelay=", "Delay="}} {
		if out, err := verifySocket(t, []byte(strings.ReplaceAll(string(socket), c[0], c[1]))); err == nil && out == "" {
			t.Errorf("systemd-analyze verify is content with %s", c[1])
		}
	}
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readUnit(t *testing.T) []byte {
	t.Helper()
	return readFile(t, unitFile)
}

// systemd-analyze warns of a key that it does not know and still ends with 0.
func TestUnitVerifies(t *testing.T) {
	if out, err := verify(t, readUnit(t)); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// The check itself sees what it is there for.
func TestVerifySeesFaults(t *testing.T) {
	unit := string(readUnit(t))
	for _, c := range [][2]string{
		{"PrivateTmp=yes", "PrivateTemp=yes"},
		{"WatchdogSec=90", "WatchdogSec=soon"},
		{"/usr/bin/penstock", "/usr/bin/no-such-program"},
	} {
		if out, err := verify(t, []byte(strings.ReplaceAll(unit, c[0], c[1]))); err == nil && out == "" {
			t.Errorf("systemd-analyze verify is content with %s", c[1])
		}
	}
}

func TestUnitIsHardened(t *testing.T) {
	out, err := tool(t, "systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold="+threshold, unitFile)
	if err != nil {
		t.Errorf("systemd-analyze security finds the unit exposed above %s tenths: %v\n%s", threshold, err, out)
	}
}

// values returns what the unit says in its section on key, in order.
func values(unit []byte, section, key string) (list []string) {
	var in string
	for line := range strings.Lines(string(unit)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = strings.Trim(line, "[]")
		}
		if k, v, ok := strings.Cut(line, "="); ok && in == section && k == key {
			list = append(list, v)
		}
	}
	return list
}

func TestUnitSaysWhatTheProgramReliesOn(t *testing.T) {
	unit := readUnit(t)
	for _, c := range []struct{ section, key, want string }{
		{"Unit", "StartLimitIntervalSec", "0"}, // or five failures are the end
		{"Service", "Type", "notify"},
		{"Service", "Restart", "always"},
		{"Service", "ExecStart", "/usr/bin/penstock serve --config /etc/penstock/penstock.toml"},
		{"Service", "ExecReload", "/bin/kill -HUP $MAINPID"},
		{"Service", "User", "penstock"},
		{"Service", "StateDirectory", "penstock"},
		{"Service", "ReadWritePaths", "-/sys/class/leds -/sys/devices/platform"},
		{"Service", "DeviceAllow", "/dev/watchdog rw, char-watchdog rw, char-gpiochip rw"},
		{"Service", "PrivateDevices", ""}, // would hide them
		{"Service", "ProcSubset", ""},     // would hide somaxconn
	} {
		if got := strings.Join(values(unit, c.section, c.key), ", "); got != c.want {
			t.Errorf("[%s] %s=%s, want %q", c.section, c.key, got, c.want)
		}
	}
}

// A flash that stalls for 30s is no reason to kill the broker.
func TestUnitWatchdog(t *testing.T) {
	got := values(readUnit(t), "Service", "WatchdogSec")
	if len(got) != 1 {
		t.Fatalf("WatchdogSec is there %d times, want once", len(got))
	}
	limit, err := time.ParseDuration(got[0] + "s") // a plain number is in seconds
	if err != nil || limit < 30*time.Second {
		t.Errorf("WatchdogSec=%s: want a number of seconds, at least 30 (%v)", got[0], err)
	}
}

func TestSysusers(t *testing.T) {
	file, err := filepath.Abs("penstock.sysusers")
	if err != nil {
		t.Fatal(err)
	}
	out, err := tool(t, "systemd-sysusers", "--dry-run", "--root="+t.TempDir(), file)
	if err != nil {
		t.Fatalf("systemd-sysusers: %v\n%s", err, out)
	}
	for _, want := range []string{
		"Creating group 'gpio'",
		"Creating group 'penstock'",
		"Creating user 'penstock' (Penstock MQTT broker)",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("systemd-sysusers does not say %q:\n%s", want, out)
		}
	}
}

// README.md installs every file of this folder that is to be installed.
func TestReadmeInstallsEveryFile(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("penstock.*")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, f := range files {
		if !strings.Contains(string(readme), "-m 644 systemd/"+f+" /etc/") {
			t.Errorf("README.md does not install %s", f)
		}
	}
}
