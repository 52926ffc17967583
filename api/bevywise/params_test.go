package bevywise

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func FuzzReadParams(f *testing.F) {
	f.Add("application/json", "a=1", `{"a":"b","c":1,"d":null,"e":{"f":[true]}}`)
	f.Add("application/x-www-form-urlencoded", "", `a=b&c=%zz`)
	f.Add("multipart/form-data; boundary=x", "a=%", "--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb\r\n--x--")
	f.Add("", ";", "{")
	f.Fuzz(func(t *testing.T, kind, query, body string) {
		r := httptest.NewRequest("POST", "/", strings.NewReader(body))
		r.URL.RawQuery = query
		r.Header.Set("Content-Type", kind)
		p, err := readParams(r)
		if err == nil && p == nil {
			t.Error("neither parameters nor an error")
		}
		if _, err := readMessage(p); p == nil && err == nil {
			t.Error("a message without a topic")
		}
	})
}

func TestFlagAndNumber(t *testing.T) {
	for _, tt := range []struct {
		value  string
		flag   bool
		flagOK bool
		number int // of at most 2
		numOK  bool
	}{
		{"", false, true, 0, true},
		{"0", false, true, 0, true},
		{"1", true, true, 1, true},
		{"2", false, false, 2, true},
		{"3", false, false, 0, false},
		{"-1", false, false, 0, false},
		{"1.0", false, false, 0, false},
		{"true", true, true, 0, false},
		{"false", false, true, 0, false},
		{"x", false, false, 0, false},
	} {
		p := params{"v": tt.value}
		if got, err := p.flag("v"); got != tt.flag || (err == nil) != tt.flagOK {
			t.Errorf("flag %q: got %v, %v", tt.value, got, err)
		}
		if got, err := p.number("v", 2); got != tt.number || (err == nil) != tt.numOK {
			t.Errorf("number %q: got %v, %v", tt.value, got, err)
		}
	}
}
