package api

import (
	"errors"
	"net/http/httptest"
	"testing"
)

// Who asks from elsewhere needs a token for /metrics, whatever the switch.
func TestMetricsFromElsewhere(t *testing.T) {
	s := &Server{cfg: DefaultConfig()}
	for _, tt := range []struct {
		address string
		want    error
	}{
		{"127.0.0.1:1000", nil},
		{"127.9.9.9:1000", nil},
		{"[::1]:1000", nil},
		{"[::ffff:127.0.0.1]:1000", nil},
		{"192.0.2.1:1000", errNoToken},
		{"[2001:db8::1]:1000", errNoToken},
		{"[fe80::1%eth0]:1000", errNoToken},
		{"", errNoToken},
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.RemoteAddr = tt.address
		if got := s.admit(r, scraper); !errors.Is(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.address, got, tt.want)
		}
		// Nor does a header make anybody local.
		r.Header.Set("X-Forwarded-For", "127.0.0.1")
		if got := s.admit(r, scraper); !errors.Is(got, tt.want) {
			t.Errorf("%s, forwarded: got %v, want %v", tt.address, got, tt.want)
		}
	}
	s.cfg.MetricsLoopback = false
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.RemoteAddr = "127.0.0.1:1000"
	if got := s.admit(r, scraper); !errors.Is(got, errNoToken) {
		t.Errorf("switched off: got %v, want %v", got, errNoToken)
	}
}
