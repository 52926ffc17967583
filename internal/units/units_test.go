package units

import (
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	for _, tt := range []struct {
		text string
		want time.Duration
		back string // how it is written again
	}{
		{"20ms", 20 * time.Millisecond, "20ms"},
		{"0s", 0, "0s"},
		{"0", 0, "0s"},
		{"90s", 90 * time.Second, "1m30s"},
		{"300s", 5 * time.Minute, "5m"},
		{"36h", 36 * time.Hour, "36h"},
		{"30d", 30 * 24 * time.Hour, "30d"},
		{"24h", 24 * time.Hour, "1d"},
	} {
		var d Duration
		if err := d.UnmarshalText([]byte(tt.text)); err != nil || d.D() != tt.want || d.String() != tt.back {
			t.Errorf("%q: got %v as %q, error %v, want %v as %q", tt.text, d.D(), d, err, tt.want, tt.back)
		}
	}
	for _, text := range []string{"", "20", "-1s", "-1d", "1.5d", "d", "99999d", "1w", "20 ms"} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q: got %v, want an error", text, d)
		}
	}
}

func TestBytes(t *testing.T) {
	for _, tt := range []struct {
		text string
		want Bytes
		back string
	}{
		{"4096", 4096, "4KiB"},
		{"0", 0, "0"},
		{"5B", 5, "5"},
		{"64 KiB", 64 << 10, "64KiB"},
		{"1MiB", 1 << 20, "1MiB"},
		{"3GiB", 3 << 30, "3GiB"},
		{"1025", 1025, "1025"},
	} {
		var b Bytes
		if err := b.UnmarshalText([]byte(tt.text)); err != nil || b != tt.want || b.String() != tt.back {
			t.Errorf("%q: got %d as %q, error %v, want %d as %q", tt.text, int64(b), b, err, int64(tt.want), tt.back)
		}
	}
	for _, text := range []string{"", "-1", "1MB", "1.5MiB", "KiB", "9999999999GiB", "0x10"} {
		var b Bytes
		if err := b.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q: got %v, want an error", text, b)
		}
	}
}
