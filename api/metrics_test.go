package api

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

func fixedSnapshot() snapshot {
	return snapshot{
		version: `v1.2.3 "odd" \ one`,
		uptime:  3600,
		Health:  broker.Health{Ready: true},
		flash: storage.FlashStats{
			Total: map[string]uint64{"queue": 1 << 40, "checkpoint": 201}, Today: map[string]uint64{"queue": 202, "checkpoint": 203},
			WeekAverage: 204, WeekDays: 7, LogBytes: 205, Budget: 206, Stretch: 1.5,
		},
		wear: &Wear{Device: "mmcblk0", Used: 20, Life: "10-20 % used", Spare: "normal"},
		Stats: broker.Stats{
			Connections: 101, ConnectionsTotal: 102, Sessions: 103, Subscriptions: 104, Retained: 105,
			Sockets: 106, Connects: 107, SessionsExpired: 108, SharedSubscriptions: 109, RetainedBytes: 1010,
			PacketsIn: 113, PacketsOut: 114, NetworkIn: 115, NetworkOut: 116, PayloadIn: 117, PayloadOut: 118,
			MessagesIn: [3]uint64{110, 111, 112}, MessagesOut: [3]uint64{120, 121, 122},
			BytesIn: [3]uint64{130, 131, 132}, BytesOut: [3]uint64{140, 141, 142},
			QueueAlarms: map[string]uint64{"50": 171, "80": 172, "100": 173}, StoreBound: 174,
			Dropped:       map[string]uint64{"queue-full": 151, "expired": 150},
			Limited:       map[string]uint64{"evicted": 155, "connections": 154},
			QueueMessages: 160, QueueBytes: 161,
			Disk: storage.SpaceStats{Free: 162, Reserve: 163},
			Journal: storage.JournalStats{
				Commits: 170, Failures: 171, Records: 172, Elided: 173, BytesWritten: 1 << 40,
				CommitSeconds: storage.Histogram{Bounds: []float64{0.0005, 0.01, 2.5}, Counts: []uint64{3, 2, 0, 1}, Sum: 3.75},
				GroupSize:     storage.Histogram{Bounds: []float64{1, 10}, Counts: []uint64{0, 0, 180}, Sum: 18000},
			},
			Salvage: &storage.SalvageReport{Why: "w", Running: true, Given: 180, Tables: []storage.SalvagedRows{{Table: "session", Kept: 181, Lost: 182}}},
		},
	}
}

func TestMetricsGolden(t *testing.T) {
	var got bytes.Buffer
	writeMetrics(&got, fixedSnapshot())
	golden := filepath.Join("testdata", "metrics.golden")
	if flag.Lookup("update").Value.String() == "true" {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("got\n%s\nwant\n%s\nif that is meant, run go test ./api -update", got.Bytes(), want)
	}
}

// Each number of broker.Stats, storage.JournalStats and storage.FlashStats changes the page. It
// fails for a new field that has no metric yet: add a line to families.
func TestMetricsShowEveryField(t *testing.T) {
	base := fixedSnapshot()
	var before bytes.Buffer
	writeMetrics(&before, base)
	var visit func(name string, v reflect.Value)
	visit = func(name string, v reflect.Value) {
		changed := func() {
			t.Helper()
			var after bytes.Buffer
			writeMetrics(&after, base)
			if bytes.Equal(before.Bytes(), after.Bytes()) {
				t.Errorf("%s is in no metric: add a line to families in metrics.go", name)
			}
		}
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				field := v.Type().Field(i).Name
				if field == "Started" { // is the uptime
					continue
				}
				visit(name+"."+field, v.Field(i))
			}
		case reflect.Array, reflect.Slice:
			for i := range v.Len() {
				visit(fmt.Sprintf("%s[%d]", name, i), v.Index(i))
			}
		case reflect.Map:
			v.SetMapIndex(reflect.ValueOf("new"), reflect.ValueOf(uint64(1)))
			changed()
			v.SetMapIndex(reflect.ValueOf("new"), reflect.Value{})
		case reflect.Pointer: // a report, of which there need not be one
			was := reflect.New(v.Type()).Elem()
			was.Set(v)
			v.SetZero()
			changed()
			v.Set(was)
		case reflect.String:
			v.SetString("x")
			changed()
			v.SetString("")
		case reflect.Bool:
			v.SetBool(!v.Bool())
			changed()
			v.SetBool(!v.Bool())
		case reflect.Int64:
			v.SetInt(v.Int() + 1)
			changed()
			v.SetInt(v.Int() - 1)
		case reflect.Uint64:
			v.SetUint(v.Uint() + 1)
			changed()
			v.SetUint(v.Uint() - 1)
		case reflect.Float64:
			v.SetFloat(v.Float() + 1)
			changed()
			v.SetFloat(v.Float() - 1)
		default:
			t.Errorf("%s is a %s, which this test does not know", name, v.Kind())
		}
	}
	visit("Stats", reflect.ValueOf(&base.Stats).Elem())
	visit("FlashStats", reflect.ValueOf(&base.flash).Elem())
}

// What Prometheus asks of a histogram: buckets count everything up to their
// bound, the last is +Inf and equals the count.
func TestHistogram(t *testing.T) {
	for _, tt := range []struct {
		name string
		h    storage.Histogram
		want string
	}{
		{"some", storage.Histogram{Bounds: []float64{0.5, 1}, Counts: []uint64{1, 2, 4}, Sum: 9.5},
			`x_bucket{le="0.5"} 1|x_bucket{le="1"} 3|x_bucket{le="+Inf"} 7|x_sum 9.5|x_count 7|`},
		{"never observed", storage.Histogram{}, `x_bucket{le="+Inf"} 0|x_sum 0|x_count 0|`},
	} {
		var got bytes.Buffer
		histogram(func(snapshot) storage.Histogram { return tt.h })(&got, "x", snapshot{})
		if s := strings.ReplaceAll(got.String(), "\n", "|"); s != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, s, tt.want)
		}
	}
}

func TestQuote(t *testing.T) {
	if got, want := quote("a\"b\\c\nd é"), `"a\"b\\c\nd é"`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
