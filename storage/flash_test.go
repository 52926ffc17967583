package storage

import (
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// openCounted opens a database with what NewJournal adds, but without the
// goroutine that moves the log: the test does its work with moveLog.
func openCounted(t testing.TB, change func(*Config)) (*DB, *sqliteStore) {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Dir = t.TempDir()
	if change != nil {
		change(&cfg)
	}
	return reopenCounted(t, cfg)
}

func reopenCounted(t testing.TB, cfg Config) (*DB, *sqliteStore) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	db, err := Open(t.Context(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.flash.start(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &sqliteStore{db: db, torn: log.Error, lock: lock, checkpoints: newCheckpoints(db, log)}
	t.Cleanup(func() { s.Close() })
	return db, s
}

// moveLog does what the goroutine of checkpoints does when it is woken.
func moveLog(c *checkpoints) {
	select {
	case <-c.wake:
		c.work()
	default:
	}
}

// blocksWritten returns the bytes that a recorded disk got, by the end of the
// file's name: blocks that are written again before a sync are written once.
func blocksWritten(ops []diskOp) map[string]uint64 {
	dirty, bytes := map[string]map[int64]bool{}, map[string]uint64{}
	for _, op := range ops {
		name := "db"
		if strings.HasSuffix(op.path, "-wal") {
			name = "wal"
		}
		switch op.kind {
		case 'w':
			if dirty[name] == nil {
				dirty[name] = map[int64]bool{}
			}
			for b := op.offset / blockBytes; b <= (op.offset+int64(len(op.data))-1)/blockBytes; b++ {
				dirty[name][b] = true
			}
		case 's':
			bytes[name] += uint64(len(dirty[name])) * blockBytes
			delete(dirty, name)
		}
	}
	return bytes
}

// traffic has the store write what a broker would, in groups.
func traffic(t testing.TB, s *sqliteStore, seed uint64, groups int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	for g := range int64(groups) {
		tx, err := s.Begin()
		if err != nil {
			t.Fatal(err)
		}
		id := SessionID(1 + rng.IntN(50))
		errs := []error{tx.PutSegment(StoredSegment{ID: 1 + g, Body: make([]byte, 1+rng.IntN(20000))})}
		if g > 5 && rng.IntN(3) > 0 {
			errs = append(errs, tx.DeleteSegment(g-5))
		}
		switch rng.IntN(6) {
		case 0:
			errs = append(errs, tx.PutSession(Session{ID: id, ClientID: string(rune('a' + id))}))
		case 1:
			errs = append(errs, tx.PutProgress(id, Progress{Cursor: uint64(g)}))
		case 2:
			errs = append(errs, tx.PutRetained(&Message{Topic: string(rune('a' + id)), Payload: make([]byte, 3000)}))
		case 3:
			errs = append(errs, tx.PutInbound(Inbound{id, uint16(g)}), tx.PutSubscription(Subscription{Session: id, Filter: "a"}))
		case 4:
			errs = append(errs, tx.PutWill(Will{ClientID: "c", Message: &Message{Topic: "w"}}), tx.PutMark(Mark{Stamp: g}))
		}
		for _, err := range append(errs, tx.Commit()) {
			if err != nil {
				t.Fatal(err)
			}
		}
		moveLog(s.checkpoints)
	}
}

// What is counted is what a recorder below SQLite sees, over many rounds of the
// log.
func TestFlashCountIsWhatIsWritten(t *testing.T) {
	installTape()
	db, s := openCounted(t, func(c *Config) { c.WALPages = 100 })
	traffic(t, s, 1, 1)
	before := db.Flash()
	recordDisk()
	traffic(t, s, 2, 600)
	// Somebody else writes too.
	if err := db.PutCredential(t.Context(), Credential{Username: "u", Hash: "h", Created: time.Now()}, true); err != nil {
		t.Fatal(err)
	}
	want := blocksWritten(stopRecording())
	after := db.Flash()
	var got flashBytes
	for c, name := range causeNames {
		got[c] = after.Total[name] - before.Total[name]
		if got[c] == 0 {
			t.Errorf("nothing was written for %s", name)
		}
	}
	near := func(what string, got, want uint64) {
		t.Helper()
		t.Logf("%s: counted %d, recorded %d", what, got, want)
		if want == 0 || max(got, want)-min(got, want) > want/1000 {
			t.Errorf("%s: counted %d bytes, recorded %d", what, got, want)
		}
	}
	near("checkpoints", got[causeCheckpoint], want["db"])
	near("log", got.sum()-got[causeCheckpoint], want["wal"])
}

// Every statement that the Journal writes with has a cause.
func TestEveryStatementHasACause(t *testing.T) {
	_, s := openCounted(t, nil)
	m := &Message{Topic: "t"}
	tx, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(tx)
	iface := reflect.TypeFor[Tx]()
	for i := range iface.NumMethod() {
		method := iface.Method(i)
		if method.Name == "Commit" || method.Name == "Rollback" || method.Name == "Segment" {
			continue
		}
		args := make([]reflect.Value, method.Type.NumIn())
		for k := range args {
			switch typ := method.Type.In(k); typ {
			case reflect.TypeFor[*Message]():
				args[k] = reflect.ValueOf(m)
			case reflect.TypeFor[Will]():
				args[k] = reflect.ValueOf(Will{Message: m})
			case reflect.TypeFor[StoredSegment]():
				args[k] = reflect.ValueOf(StoredSegment{Body: []byte{}})
			default:
				args[k] = reflect.Zero(typ)
			}
		}
		before := s.flash.weights
		v.MethodByName(method.Name).Call(args)
		switch {
		case s.flash.weights == before:
			t.Errorf("%s is counted for nothing: its statements belong in causeOf (flash.go)", method.Name)
		case s.flash.weights[causeOther] > 0:
			t.Fatalf("%s has no cause: its statements belong in causeOf (flash.go)", method.Name)
		}
	}
}

// The counts are there after a restart; after a kill those of the last minute
// are missing.
func TestFlashCountIsKept(t *testing.T) {
	db, s := openCounted(t, func(c *Config) { c.WALPages = 50 })
	cfg := db.cfg
	traffic(t, s, 1, 100)
	if rows, _ := db.flash.unsaved(false); rows != nil {
		t.Error("the counts are saved more often than once a minute")
	}
	db.flash.saved = db.flash.saved.Add(-flashSaveEvery)
	traffic(t, s, 2, 1) // a commit that the counts go along with
	if got := time.Since(db.flash.saved); got > flashSaveEvery {
		t.Errorf("the counts were saved %s ago, want just now", got)
	}
	saved := flashBytes{}
	for _, r := range db.flash.rows {
		saved = r.saved
	}
	if saved.sum() == 0 {
		t.Fatal("nothing was saved")
	}
	traffic(t, s, 3, 100)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := db.Flash()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db, _ = reopenCounted(t, cfg)
	after := db.Flash()
	for name, n := range before.Total {
		// The transaction that saved them came after.
		if got := after.Total[name]; got > n || n-got > 64<<10 {
			t.Errorf("%s: %d bytes after a restart, %d before", name, got, n)
		}
	}
	if after.Total["queue"] <= saved[causeQueue] {
		t.Error("what came after the last save is not there after a stop in order")
	}
	if !maps.Equal(after.Total, after.Today) {
		t.Errorf("today %v, in all %v: want the same on the first day", after.Today, after.Total)
	}
}

// What a stop writes is counted too, but for the little that is written when the
// counts are safe.
func TestFlashCountOfAStop(t *testing.T) {
	installTape()
	db, s := openCounted(t, nil)
	cfg := db.cfg
	traffic(t, s, 1, 1)
	before := db.Flash().Total
	recordDisk()
	traffic(t, s, 2, 300)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	written := blocksWritten(stopRecording())
	db, _ = reopenCounted(t, cfg)
	got := uint64(0)
	for name, n := range db.Flash().Total {
		got += n - before[name]
	}
	if want := written["db"] + written["wal"]; got > want || want-got > 40<<10 {
		t.Errorf("%d bytes are counted after a stop, %d were written", got, want)
	} else {
		t.Logf("%d bytes of %d are not counted", want-got, want)
	}
}

// Days of a clock that is plainly wrong are counted together, and apart from
// those of a clock that may be right; the average is over whole days.
func TestFlashDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // begins on 2000-01-01
		m := newFlashMeter("", 0, slog.New(slog.DiscardHandler))
		add := func(n uint64) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.add(flashBytes{causeQueue: n})
		}
		db := &DB{flash: m}
		today := func() uint64 { return db.Flash().Today["queue"] }
		add(5)
		time.Sleep(23 * time.Hour)
		add(6)
		if got := today(); got != 11 {
			t.Errorf("%d bytes in the first day of a wrong clock, want 11", got)
		}
		time.Sleep(2 * time.Hour)
		add(7)
		if got := today(); got != 7 {
			t.Errorf("%d bytes in the second day of a wrong clock, want 7", got)
		}
		if got := db.Flash(); got.WeekDays != 0 || got.WeekAverage != 0 {
			t.Errorf("an average of %d days with a wrong clock", got.WeekDays)
		}
		time.Sleep(time.Until(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)))
		add(100)
		if got := today(); got != 100 {
			t.Errorf("%d bytes on the first day of a right clock, want 100", got)
		}
		for range 3 {
			time.Sleep(24 * time.Hour)
			add(10)
		}
		time.Sleep(24 * time.Hour) // nothing yet
		if got := db.Flash(); got.WeekDays != 4 || got.WeekAverage != 130/4 {
			t.Errorf("an average of %d bytes over %d days, want 32 over 4", got.WeekAverage, got.WeekDays)
		}
		for range 2 * flashDays {
			time.Sleep(24 * time.Hour)
			add(1)
		}
		if len(m.rows) > flashDays+3 {
			t.Errorf("%d days are listed", len(m.rows))
		}
		if len(m.gone) == 0 || m.rows[m.gone[0]] != nil {
			t.Error("days that are no longer listed are not deleted")
		}
		if got, want := db.Flash().Total["queue"], uint64(18+130+2*flashDays); got != want {
			t.Errorf("%d bytes in all, want %d", got, want)
		}
		if got := m.rows[unknownDay].now[causeQueue]; got != 18 {
			t.Errorf("%d bytes with a wrong clock, want 18", got)
		}
	})
}

// Days that are no longer listed are deleted in the database too, and the sum
// is the same after a restart.
func TestFlashDaysAreDropped(t *testing.T) {
	db, s := openCounted(t, nil)
	cfg := db.cfg
	m := db.flash
	m.mu.Lock()
	for d := range int64(flashDays + 20) {
		m.row(firstDay + d).now[causeWill] = 10
	}
	m.day = earlierDays // the next look turns to the day that it is
	m.mu.Unlock()
	traffic(t, s, 1, 3)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want := db.Flash().Total["will"]
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db, _ = reopenCounted(t, cfg)
	if got := db.Flash().Total["will"]; got != want {
		t.Errorf("%d bytes after a restart, %d before", got, want)
	}
	var days int
	if err := db.read.QueryRowContext(t.Context(), "SELECT count(DISTINCT day) FROM flash WHERE day > 0").Scan(&days); err != nil {
		t.Fatal(err)
	}
	if days > flashDays+2 {
		t.Errorf("%d days are in the database", days)
	}
}

// Where the counts cannot be read, or not be written, nothing else fails: what is
// acknowledged is, and the log is moved.
func TestFlashCountUnreadable(t *testing.T) {
	for _, when := range []string{"before the start", "after the start", "no index"} {
		t.Run(when, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.Dir, cfg.WALPages = t.TempDir(), 50
			log := slog.New(slog.DiscardHandler)
			db, err := Open(t.Context(), cfg, log)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			drop := func() {
				if _, err := db.write.ExecContext(t.Context(), "DROP TABLE flash"); err != nil {
					t.Fatal(err)
				}
			}
			switch when {
			case "before the start":
				drop()
			case "no index":
				db.flash.path = "/nowhere"
			}
			j, err := db.NewJournal(log)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := j.Load(); err != nil {
				t.Fatal(err)
			}
			j.Attach(testState{})
			if when == "after the start" {
				drop()
			}
			db.flash.saved = db.flash.saved.Add(-flashSaveEvery)
			failures, commits := 0, 300
			if when == "no index" {
				commits = 1500
			}
			for i := range int64(commits) {
				j.Change(func(tx Tx) error { return tx.PutSegment(StoredSegment{ID: 1 + i, Body: make([]byte, 4096)}) }, nil)
				for j.Commit() != nil {
					if failures++; failures > 1 {
						t.Fatal("commits fail because of the counts")
					}
				}
			}
			if want := when == "after the start"; want != (failures == 1) {
				t.Errorf("%d commits failed", failures)
			}
			if size := logSize(t, db); size > 4*1000*(blockBytes+frameHeaderBytes) {
				t.Errorf("the log has %d bytes: it is not moved", size)
			}
			if err := j.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
