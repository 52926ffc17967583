package api

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"penstock/storage"
)

func TestFlashJSON(t *testing.T) {
	f := storage.FlashStats{
		Total: map[string]uint64{"queue": 1000, "other": 1}, Today: map[string]uint64{"queue": 50, "other": 0},
		WeekAverage: 70, WeekDays: 3, LogBytes: 80, Budget: 200, Stretch: 1.25,
	}
	w := &Wear{Device: "mmcblk0", Used: 90, Life: "80-90 % used", Spare: "normal", Warning: "replace it"}
	for _, tt := range []struct {
		name string
		j    flashJSON
		want string
	}{
		{"all", newFlashJSON(f, w), `{"bytes":1001,"bytes_today":50,"by_cause":{"other":1,"queue":1000},"by_cause_today":{"other":0,"queue":50},"week_average":70,"week_days":3,"log_bytes":80,"budget":200,"budget_used":0.25,"stretch":1.25,"wear":{"device":"mmcblk0","used_percent":90,"life":"80-90 % used","spare":"normal","skipped":"","warning":"replace it"}}`},
		{"nothing", newFlashJSON(storage.FlashStats{}, nil), `{"bytes":0,"bytes_today":0,"by_cause":null,"by_cause_today":null,"week_average":0,"week_days":0,"log_bytes":0,"budget":0,"budget_used":0,"stretch":0,"wear":null}`},
	} {
		got, err := json.Marshal(tt.j)
		if err != nil || string(got) != tt.want {
			t.Errorf("%s: got %s, %v, want %s", tt.name, got, err, tt.want)
		}
	}
}

// Of a flash that says nothing there is no number.
func TestWearMetrics(t *testing.T) {
	for _, tt := range []struct {
		name       string
		wear       *Wear
		want, none string
	}{
		{"near its end", &Wear{Device: "mmcblk0", Used: 90, Warning: "replace it"}, "penstock_flash_wear_percent{device=\"mmcblk0\"} 90\n", ""},
		{"its warning", &Wear{Device: "mmcblk0", Used: 90, Warning: "replace it"}, "penstock_flash_wear_warning 1\n", ""},
		{"says nothing", &Wear{Device: "mmcblk1", Skipped: "not offered"}, "penstock_flash_wear_warning 0\n", "penstock_flash_wear_percent{"},
		{"nobody asks", nil, "penstock_flash_wear_warning 0\n", "penstock_flash_wear_percent{"},
	} {
		var page bytes.Buffer
		writeMetrics(&page, snapshot{wear: tt.wear})
		if got := page.String(); !strings.Contains(got, tt.want) || tt.none != "" && strings.Contains(got, tt.none) {
			t.Errorf("%s: want %q and not %q in\n%s", tt.name, tt.want, tt.none, got)
		}
	}
}
