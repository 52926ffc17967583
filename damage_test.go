package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Pages of the database are overwritten under the running program, in the middle
// of a long queue. Nobody starts it again: it does so itself, salvages, says so
// everywhere, takes new messages, and delivers what was not hit, in order.
func TestDamageAtRunTime(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "") // of who runs the tests
	const published, size = 20000, 1000
	dir := t.TempDir()
	b := startDisk(t, "", dir, "")
	b.sleeper()
	p := b.publisher(4, 1000, size, 0)
	b.await("acknowledgements", func() bool { return p.acked.Load() >= published })
	close(p.stop)
	b.await("last acknowledgement", func() bool { return p.acked.Load() == p.sent.Load() })
	total := p.acked.Load()

	db := filepath.Join(dir, "penstock.db")
	f, err := os.OpenFile(db, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	const page, hit = 4096, 8 // pages in a row, so some are in the middle of a segment
	if info.Size() < published*size/2 {
		t.Fatalf("%d bytes are in the file: the most is still in its log", info.Size())
	}
	for _, part := range []int64{2, 3} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{0xee}, hit*page), info.Size()*part/5/page*page); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()

	// The sleeper takes what there is; then the connection ends, and there is a
	// new one, as every client makes it.
	got := b.take(b.mqtt)
	again := regexp.MustCompile(`(?s)starting again, to salvage the database.*  mqtt  tcp +(\S+:\d+).*  http +http://(\S+).*  try `)
	b.await("start", func() bool { return again.MatchString(readIf(b.out)) })
	m := again.FindStringSubmatch(readIf(b.out))
	b.mqtt, b.api = m[1], m[2]
	if h := b.health(); h.Status != 200 || !h.Ready || !h.Degraded || len(h.Reasons) != 1 || !strings.HasPrefix(h.Reasons[0], "salvage: ") {
		t.Errorf("readyz: got %+v, want ready, degraded and why", h)
	}
	if v := b.metric("penstock_salvaged"); v != "1" {
		t.Errorf("penstock_salvaged: got %s, want 1", v)
	}
	for _, line := range []string{"database is damaged, the next start salvages it", "database was damaged, what could be read of it was salvaged"} {
		if n := strings.Count(readIf(b.out), line); n != 1 {
			t.Errorf("the log has %q %d times, want once", line, n)
		}
	}
	if s := b.salvage(); s == nil || s.File == "" || s.Running {
		t.Errorf("status: got %+v, want a report that is complete", s)
	} else if _, err := os.Stat(filepath.Join(dir, s.File)); err != nil {
		t.Errorf("set aside: %v", err)
	}

	p = b.publisher(5, 100, size, 0)
	b.await("new acknowledgements", func() bool { return p.acked.Load() >= 100 })
	close(p.stop)
	b.await("last acknowledgement", func() bool { return p.acked.Load() == p.sent.Load() })
	fresh := p.acked.Load()

	rest := b.take(b.mqtt)
	if int64(len(rest)) < fresh {
		t.Fatalf("after it %d messages came, want more than the %d new ones", len(rest), fresh)
	}
	b.inOrder("new messages", rest[int64(len(rest))-fresh:], fresh)
	old := rest[:int64(len(rest))-fresh]
	if !slices.IsSorted(old) || !slices.IsSorted(got) {
		t.Error("messages came out of order")
	}
	seen := slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(got), old...))))
	// Each stretch hits some segments, of a group commit each.
	t.Logf("%d messages, %d came before the damage was met, %d after it, %d in all", total, len(got), len(old), len(seen))
	if len(got) == 0 || int64(len(seen)) < total*3/4 {
		t.Errorf("%d of %d messages came, %d before the damage was met", len(seen), total, len(got))
	}
	if err := os.Remove(filepath.Join(dir, "penstock.salvage")); err != nil {
		t.Fatal(err)
	}
	b.await("end of the alarm", func() bool { return !b.health().Degraded })
}

// take takes all that comes for the sleeper until the connection ends or nothing
// is queued, and returns the numbers.
func (b *diskBroker) take(addr string) (got []int64) {
	b.t.Helper()
	c := b.dial(addr, "sleeper", 4, false, 0)
	defer c.conn.Close()
	for {
		_ = c.conn.SetReadDeadline(time.Now().Add(time.Second)) // a failure shows at the read
		n, err := b.next(c)
		if err != nil {
			return got
		}
		got = append(got, n)
	}
}

// damageReport is what the status says of a salvage.
type damageReport struct {
	File    string
	Running bool
}

// salvage returns the report in the status, nil if there is none.
func (b *diskBroker) salvage() *damageReport {
	b.t.Helper()
	m := regexp.MustCompile(`password "?([a-z2-7]{4}(?:-[a-z2-7]{4}){3})`).FindStringSubmatch(readIf(b.out))
	if m == nil {
		b.t.Fatal("no password was shown")
	}
	login, err := json.Marshal(map[string]string{"username": "admin", "password": m[1]})
	if err != nil {
		b.t.Fatal(err)
	}
	var token struct {
		Token string `json:"access_token"`
	}
	b.ask(http.MethodPost, "/bwiot/api/v1/login", "", login, &token)
	var status struct{ Salvage *damageReport }
	b.ask(http.MethodGet, "/api/v1/status", token.Token, nil, &status)
	return status.Salvage
}

// ask makes a request and decodes the answer.
func (b *diskBroker) ask(method, path, token string, body []byte, into any) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+b.api+path, bytes.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(text, into)
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		b.t.Fatalf("%s %s: %s: %s (%v)", method, path, resp.Status, text, err)
	}
}
