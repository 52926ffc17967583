//go:build interop

package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// way is how a client comes to the broker: a version of MQTT over a listener.
type way struct {
	version  int
	listener string
}

// ways has every version over TCP, and MQTT 5 over every other listener.
var ways = []way{{v31, "tcp"}, {v311, "tcp"}, {v5, "tcp"}, {v5, "tls"}, {v5, "ws"}, {v5, "wss"}}

// runWays runs a script each way, all at once: they spend their time waiting.
// schemes are those of the client's URLs, by listener; more are steps that only
// this client has.
func runWays(t *testing.T, command []string, schemes map[string]string, ways []way, more ...string) {
	t.Helper()
	t.Run("ways", func(t *testing.T) { // a group, for the command may go with the test
		for _, w := range ways {
			t.Run(versionNames[w.version]+"-"+w.listener, func(t *testing.T) {
				t.Parallel()
				script{
					command:  command,
					version:  w.version,
					listener: w.listener,
					scheme:   schemes[w.listener],
					steps:    stepsOf(w.version, more...),
				}.run(t)
			})
		}
	})
}

// TestPahoPython is Debian's python3-paho-mqtt.
func TestPahoPython(t *testing.T) {
	t.Parallel()
	// Not "python3": another one that comes first in PATH has other packages.
	const python = "/usr/bin/python3"
	if out, err := exec.Command(python, "-c", "import paho.mqtt.client").CombinedOutput(); err != nil {
		t.Fatalf("%s has no paho.mqtt (%v): apt-get install python3-paho-mqtt\n%s", python, err, out)
	}
	schemes := map[string]string{"tcp": "mqtt", "tls": "mqtts", "ws": "ws", "wss": "wss"}
	runWays(t, []string{python, "testdata/client.py"}, schemes, ways, "reconnect")
}

// TestPahoC is Debian's libpaho-mqtt, the synchronous API.
func TestPahoC(t *testing.T) {
	t.Parallel()
	gcc := need(t, "gcc", "apt-get install gcc libc6-dev")
	if _, err := os.Stat("/usr/include/MQTTClient.h"); err != nil {
		t.Fatalf("%v: apt-get install libpaho-mqtt-dev", err)
	}
	client := filepath.Join(t.TempDir(), "client")
	build := exec.Command(gcc, "-Wall", "-Wextra", "-Werror", "-O1", "-o", client, "testdata/client.c", "-lpaho-mqtt3cs", "-lpthread")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	schemes := map[string]string{"tcp": "tcp", "tls": "ssl", "ws": "ws", "wss": "wss"}
	runWays(t, []string{client}, schemes, ways)
}

// TestMQTTJS is MQTT.js, as package-lock.json has it. Browsers have nothing but
// WebSocket, so that is what it is tried over in every version.
func TestMQTTJS(t *testing.T) {
	t.Parallel()
	node := need(t, "node", "apt-get install nodejs npm")
	const dir = "testdata/mqttjs"
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "mqtt", "package.json")); err != nil {
		t.Fatalf("MQTT.js is not installed (%v): npm ci in broker/interop/%s", err, dir)
	}
	schemes := map[string]string{"tcp": "mqtt", "tls": "mqtts", "ws": "ws", "wss": "wss"}
	ways := []way{{v31, "ws"}, {v311, "ws"}, {v5, "ws"}, {v311, "wss"}, {v5, "wss"}, {v5, "tcp"}, {v5, "tls"}}
	runWays(t, []string{node, dir + "/client.js"}, schemes, ways, "reconnect")
}
