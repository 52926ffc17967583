package main

import (
	"io"
	"net"
	"regexp"
	"sync/atomic"
	"testing"
	"time"

	"penstock/broker"
)

// The whole program on a gateway without a clock chip: what is asked of it for a
// minute lasts a minute, with the power off too, and not less because the clock
// begins in 1970 or jumps.
func TestTimeOfTheWholeProgram(t *testing.T) {
	const begin = 1794700800000 // November 2026
	var now atomic.Pointer[broker.MachineTime]
	cfg := testConfig(t)
	cfg.Broker.MachineTime = func() broker.MachineTime { return *now.Load() }
	// visit runs the program with what its clocks say. It returns whether a
	// client with a session of 60 s finds it.
	visit := func(m broker.MachineTime) (present bool) {
		t.Helper()
		now.Store(&m)
		out, stop := startApp(t, cfg, Options{})
		c, err := net.Dial("tcp", regexp.MustCompile(`tcp   (\S+)`).FindStringSubmatch(out)[1])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("\x10\x13\x00\x04MQTT\x05\x00\x00\x00\x05\x11\x00\x00\x00\x3c\x00\x01a")); err != nil {
			t.Fatal(err)
		}
		connack := make([]byte, 4)
		if _, err := io.ReadFull(c, connack); err != nil || connack[0] != 0x20 || connack[3] != 0 {
			t.Fatalf("got % x, %v, want a CONNACK", connack, err)
		}
		c.Close()
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		return connack[2] == 1
	}
	for i, step := range []struct {
		name string
		now  broker.MachineTime
		want bool
	}{
		{"the first start", broker.MachineTime{Wall: begin, Synced: true, Boot: "a"}, false},
		{"off for 30 s", broker.MachineTime{Wall: begin + 30e3, Synced: true, Boot: "b"}, true},
		{"off for 2 minutes", broker.MachineTime{Wall: begin + 150e3, Synced: true, Boot: "c"}, false},
		{"restarted, and the clock jumps a day", broker.MachineTime{Wall: begin + 24*3600e3, Synced: true, Boot: "c", Uptime: 10e3}, true},
		{"restarted after 2 minutes", broker.MachineTime{Wall: begin + 24*3600e3, Synced: true, Boot: "c", Uptime: 130e3}, false},
		{"switched off, and then it is 1970", broker.MachineTime{Wall: 10e3, Boot: "d"}, true},
		{"2082", broker.MachineTime{Wall: begin + 56*365*24*3600e3, Synced: true, Boot: "e"}, true},
	} {
		if got := visit(step.now); got != step.want {
			t.Errorf("%d, %s: the session is there %v, want %v", i, step.name, got, step.want)
		}
	}
}
