package storage

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkLogLength measures how many bytes go to the flash for a message of
// 100 bytes, by the length of the log from which on it is moved. It is what
// walPages was chosen by.
func BenchmarkLogLength(b *testing.B) {
	const groups = 20000
	for _, load := range []struct {
		name     string
		messages int // a group
		delay    int // groups until a segment is deleted; 0: never
	}{
		{"drained after a second, 10 a group", 10, 50},
		{"drained after a second, 100 a group", 100, 50},
		{"drained after a minute, 10 a group", 10, 3000},
		{"kept, 10 a group", 10, 0},
	} {
		for _, pages := range []int{250, 500, 1000, 2000, 4000} {
			b.Run(fmt.Sprintf("%s/%d", load.name, pages), func(b *testing.B) {
				for range b.N {
					db, s := openCounted(b, func(c *Config) { c.WALPages = pages })
					must := func(err error) {
						if err != nil {
							b.Fatal(err)
						}
					}
					if err := s.connect(); err != nil {
						b.Fatal(err)
					}
					// What is written is counted, and not whether it is synced.
					_, err := s.conn.ExecContext(b.Context(), "PRAGMA synchronous=NORMAL")
					must(err)
					for g := range groups {
						tx, err := s.Begin()
						must(err)
						if g == 0 {
							for i := range 100 {
								must(tx.PutSession(Session{ID: SessionID(1 + i), ClientID: fmt.Sprint("client-", i)}))
							}
						}
						must(tx.PutSegment(StoredSegment{ID: int64(1 + g), Body: make([]byte, load.messages*130)}))
						if load.delay > 0 && g%50 == 0 { // once a second
							for i := max(g-load.delay-50, 0); i < g-load.delay; i++ {
								must(tx.DeleteSegment(int64(1 + i)))
							}
							must(tx.PutProgress(SessionID(1+g%100), Progress{Cursor: uint64(g)}))
						}
						must(tx.Commit())
						moveLog(s.checkpoints)
					}
					f := db.Flash()
					n := float64(groups * load.messages)
					b.ReportMetric(float64(f.Total["checkpoint"])/n, "moved-B/msg")
					total := 0.0
					for _, v := range f.Total {
						total += float64(v)
					}
					b.ReportMetric(total/n, "B/msg")
				}
			})
		}
	}
}

// BenchmarkCommitWhileLogMoves measures how long commits take on a flash whose
// fsync takes 20 ms, and one millisecond more for each page here and there: with
// the checkpoints that SQLite does in COMMIT, and with ours.
func BenchmarkCommitWhileLogMoves(b *testing.B) {
	for _, fsync := range []time.Duration{0, 20 * time.Millisecond} {
		for _, mode := range []string{"in commit", "apart"} {
			b.Run(fmt.Sprintf("%s/fsync %s", mode, fsync), func(b *testing.B) {
				var mu sync.Mutex
				dirty := map[string]int{} // pages written since the last sync, by file
				disk := func(kind byte, path string) {
					mu.Lock()
					if kind == 'w' {
						dirty[path]++
						mu.Unlock()
						return
					}
					n := dirty[path]
					dirty[path] = 0
					mu.Unlock()
					if strings.HasSuffix(path, "-wal") {
						n = 0 // one behind the other
					}
					if fsync > 0 {
						time.Sleep(fsync + time.Duration(n)*time.Millisecond)
					}
				}
				hold(disk)
				defer hold(nil)
				_, s := openCounted(b, nil)
				s.checkpoints.sync = func() error {
					disk('s', s.db.path)
					return s.db.flash.syncDatabase()
				}
				if err := s.connect(); err != nil {
					b.Fatal(err)
				}
				if mode == "apart" {
					s.checkpoints.start()
				} else {
					s.checkpoints = nil
					if _, err := s.conn.ExecContext(b.Context(), "PRAGMA wal_autocheckpoint=1000"); err != nil {
						b.Fatal(err)
					}
				}
				var took []time.Duration
				for g := range int64(1500) {
					start := time.Now()
					tx, err := s.Begin()
					if err != nil {
						b.Fatal(err)
					}
					if err := tx.PutSegment(StoredSegment{ID: 1 + g, Body: make([]byte, 13000)}); err != nil {
						b.Fatal(err)
					}
					if g >= 400 {
						if err := tx.DeleteSegment(g - 399); err != nil {
							b.Fatal(err)
						}
					}
					if err := tx.Commit(); err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(start))
				}
				slices.Sort(took)
				ms := func(q float64) float64 { return took[int(q*float64(len(took)-1))].Seconds() * 1000 }
				b.ReportMetric(ms(0.5), "p50-ms")
				b.ReportMetric(ms(0.99), "p99-ms")
				b.ReportMetric(ms(0.999), "p99.9-ms")
				b.ReportMetric(ms(1), "max-ms")
			})
		}
	}
}
