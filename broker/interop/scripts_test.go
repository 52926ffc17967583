//go:build interop

package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestPahoPython is Debian's python3-paho-mqtt.
func TestPahoPython(t *testing.T) {
	// Not "python3": another one that comes first in PATH has other packages.
	const python = "/usr/bin/python3"
	if out, err := exec.Command(python, "-c", "import paho.mqtt.client").CombinedOutput(); err != nil {
		t.Fatalf("%s has no paho.mqtt (%v): apt-get install python3-paho-mqtt\n%s", python, err, out)
	}
	for _, version := range []int{v31, v311, v5} {
		t.Run(versionNames[version], func(t *testing.T) {
			t.Parallel()
			script{
				command: []string{python, "-u", "testdata/client.py"},
				version: version,
				url:     tcp("mqtt"),
				ca:      "-",
				steps:   stepsOf(version, "reconnect"),
			}.run(t)
		})
	}
}

// TestPahoC is Debian's libpaho-mqtt, the synchronous API.
func TestPahoC(t *testing.T) {
	gcc := need(t, "gcc", "apt-get install gcc libc6-dev")
	if _, err := os.Stat("/usr/include/MQTTClient.h"); err != nil {
		t.Fatalf("%v: apt-get install libpaho-mqtt-dev", err)
	}
	client := filepath.Join(t.TempDir(), "client")
	build := exec.Command(gcc, "-Wall", "-Wextra", "-Werror", "-O1", "-o", client, "testdata/client.c", "-lpaho-mqtt3cs", "-lpthread")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	// The versions are a group, for the compiled client goes with this test.
	t.Run("version", func(t *testing.T) {
		for _, version := range []int{v31, v311, v5} {
			t.Run(versionNames[version], func(t *testing.T) {
				t.Parallel()
				script{
					command: []string{client},
					version: version,
					url:     tcp("tcp"),
					ca:      "-",
					steps:   stepsOf(version),
				}.run(t)
			})
		}
	})
}

// TestMQTTJS is MQTT.js, as package-lock.json has it.
func TestMQTTJS(t *testing.T) {
	node := need(t, "node", "apt-get install nodejs npm")
	const dir = "testdata/mqttjs"
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "mqtt", "package.json")); err != nil {
		t.Fatalf("MQTT.js is not installed (%v): npm ci in broker/interop/%s", err, dir)
	}
	for _, version := range []int{v31, v311, v5} {
		t.Run(versionNames[version], func(t *testing.T) {
			t.Parallel()
			script{
				command: []string{node, dir + "/client.js"},
				version: version,
				url:     tcp("mqtt"),
				ca:      "-",
				steps:   stepsOf(version, "reconnect"),
			}.run(t)
		})
	}
}
