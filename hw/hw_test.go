package hw

import (
	"strings"
	"testing"
)

func TestConfigValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
	for _, c := range []struct {
		cfg  Config
		want string // "" = valid
	}{
		{Config{Backend: "sysfs", LEDs: map[string]string{"status": "green:status", "fault": "PWR"}}, ""},
		{Config{}, `hw.backend: ""`},
		{Config{Backend: "gpio"}, `hw.backend: "gpio" is none of auto, sysfs, periph, sim, off`},
		{Config{Backend: "auto", LEDs: map[string]string{"power": "PWR"}}, "hw.leds.power: no such role, there are status, uplink, fault, activity"},
		{Config{Backend: "auto", LEDs: map[string]string{"status": ""}}, "hw.leds.status:"},
		{Config{Backend: "auto", LEDs: map[string]string{"status": ".."}}, "hw.leds.status:"},
		{Config{Backend: "auto", LEDs: map[string]string{"fault": "../../etc"}}, "hw.leds.fault:"},
		{Config{Backend: "auto", LEDs: map[string]string{"status": "ACT", "fault": "ACT"}}, `hw.leds.status: "ACT" is the LED of hw.leds.fault already`},
	} {
		err := c.cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.cfg, err, c.want)
		}
	}
	if _, err := Open(Config{Backend: "gpio"}, Options{}, quiet()); err == nil {
		t.Error("Open took a configuration that is not valid")
	}
}
