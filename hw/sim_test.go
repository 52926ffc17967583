package hw

import (
	"bytes"
	"maps"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSimShowsChangesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		b, err := Open(Config{Backend: "sim"}, Options{Terminal: &out}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		status := b.lamps[0].led.(*Sim)
		play(t, b, func() {
			if !status.On() {
				t.Error("the status LED is dark while starting, want lit")
			}
			b.Set(Running, true)
			time.Sleep(time.Hour) // a heartbeat, 3,600 beats
			for i := range 100 {
				b.Set(Traffic, i%2 == 0)
				synctest.Wait()
			}
			b.Set(UplinkDown, true)
			synctest.Wait()
		})
		want := `LEDs [starting]  ● status on  ○ uplink off  ○ fault off  ○ activity off
LEDs [running]  ◐ status heartbeat  ○ uplink off  ○ fault off  ○ activity off
LEDs [uplink down]  ◐ status slow blink  ◐ uplink slow blink  ○ fault off  ○ activity off
LEDs [stopped]  ○ status off  ○ uplink off  ○ fault off  ○ activity off
`
		if got := out.String(); got != want {
			t.Errorf("terminal\n got %q\nwant %q", got, want)
		}
		if status.On() {
			t.Error("the status LED is lit after Run, want dark")
		}
	})
}

func TestSimRewritesTheLineOnATTY(t *testing.T) {
	var out bytes.Buffer
	p := &panel{w: &out, tty: true}
	p.show(0)
	p.show(0)
	p.show(1 << Running)
	if n := strings.Count(out.String(), "\n"); n != 0 {
		t.Errorf("%d line feeds, want none: %q", n, out.String())
	}
	if n := strings.Count(out.String(), "\r\x1b[KLEDs ["); n != 2 {
		t.Errorf("%d rewrites for 2 states: %q", n, out.String())
	}
	p.close()
	if !strings.HasSuffix(out.String(), "\r\n") {
		t.Errorf("after close the last line does not stand: %q", out.String())
	}
}

func TestPanelKnowsATTY(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if newPanel(null).tty {
		t.Errorf("%s was taken for a TTY", os.DevNull)
	}
	if newPanel(nil) != nil {
		t.Error("a panel without a writer")
	}
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	if !newPanel(pty).tty {
		t.Error("a pseudo terminal was not taken for a TTY")
	}
}

func TestSimWithoutTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, err := Open(Config{Backend: "sim"}, Options{}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		play(t, b, func() { b.Set(Running, true) })
		want := map[string]string{"status": "off", "uplink": "off", "fault": "off", "activity": "off"}
		if got := b.LEDs(); !maps.Equal(got, want) {
			t.Errorf("LEDs() = %v, want %v", got, want)
		}
	})
}
