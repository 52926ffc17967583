package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// reopen opens the database in dir as a start does, and returns what is in it.
func reopen(t *testing.T, dir string, change ...func(*Config)) (*DB, *Journal, map[string][][]any) {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Dir = dir
	cfg.SalvageTime = time.Hour // nothing is left for later
	for _, f := range change {
		f(&cfg)
	}
	log := slog.New(slog.DiscardHandler)
	db, err := Open(t.Context(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	j, err := db.NewJournal(log)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := j.Load(); err != nil {
		t.Fatal(err)
	}
	j.Attach(testState{})
	t.Cleanup(func() { j.Close(); db.Close() })
	return db, j, rowsOf(t, db.read)
}

// total is how many rows there are, of all tables.
func total(rows map[string][][]any) (n int) {
	for _, r := range rows {
		n += len(r)
	}
	return n
}

// damaged returns an image that was marked as damaged, and the rows that are in
// it.
func damaged(t *testing.T) (f imageFiles, rows map[string][][]any) {
	f = makeImage(t, rand.New(rand.NewPCG(7, 7)), true)
	dir := t.TempDir()
	f.write(t, dir)
	db, j, rows := reopen(t, dir)
	if db.Salvage() != nil {
		t.Fatal("a healthy database was salvaged")
	}
	j.Close()
	db.Close()
	f.mark = []byte("found by a test\n")
	return f, rows
}

// dirFiles are a directory's files.
func dirFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string][]byte)
	for _, e := range entries {
		if out[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// The power is cut after each step of a salvage. The next start finds all that
// the salvage would have had, and the damaged database is set aside once, with
// its log.
func TestSalvageIsCutShort(t *testing.T) {
	f, want := damaged(t)
	dir := t.TempDir()
	f.write(t, dir)
	db, j, got := reopen(t, dir)
	if lacking := missing(got, want, f); len(lacking) > 0 {
		t.Fatalf("a salvage lost %d rows, the first is %s", len(lacking), lacking[0])
	}
	j.Close()
	db.Close()
	after := dirFiles(t, dir)
	aside := siblings(dir, fileName+"."+corruptName)
	if len(aside) != 1 || !bytes.Equal(after[aside[0]+"-wal"], f.wal) {
		t.Fatalf("set aside: %q", aside)
	}
	next := nextName + strings.TrimPrefix(aside[0], fileName+".")
	for name, files := range map[string]map[string][]byte{
		"while the new database is filled": {fileName: f.main, fileName + "-wal": f.wal, buildingName: after[fileName][:5000], buildingName + "-journal": {1}},
		"before it is complete":            {fileName: f.main, fileName + "-wal": f.wal, buildingName: after[fileName], stateName: after[stateName]},
		"when it is complete":              {fileName: f.main, fileName + "-wal": f.wal, next: after[fileName], stateName: after[stateName]},
		"when the log is aside":            {fileName: f.main, aside[0] + "-wal": f.wal, next: after[fileName], stateName: after[stateName]},
		"when both are aside":              {aside[0]: f.main, aside[0] + "-wal": f.wal, next: after[fileName], stateName: after[stateName]},
		"when all is done":                 after,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if _, there := files[fileName]; there && name != "when all is done" {
				files[DamagedName] = f.mark
			}
			for file, b := range files {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			db, _, got := reopen(t, dir)
			if lacking := missing(got, want, f); len(lacking) > 0 {
				t.Errorf("%d rows are lost, the first is %s", len(lacking), lacking[0])
			}
			r := db.Salvage()
			if r == nil {
				t.Fatal("no report")
			}
			all := siblings(dir, fileName+"."+corruptName)
			left := dirFiles(t, dir)
			if len(all) != 1 || all[0] != r.File || !bytes.Equal(left[r.File], f.main) || !bytes.Equal(left[r.File+"-wal"], f.wal) {
				t.Errorf("set aside: %q, the report says %q", all, r.File)
			}
			for _, gone := range []string{next, DamagedName, buildingName + "-journal"} {
				if _, there := left[gone]; there {
					t.Errorf("%s is left", gone)
				}
			}
		})
	}
}

// A disk that is full once, or fails once, while the new database is written: the
// salvage is tried again with less, or the start fails, the damaged database is
// where it was, and the next start salvages it.
func TestSalvageOnDiskThatFails(t *testing.T) {
	f, want := damaged(t)
	step := 15
	if raceDetector {
		step *= 2
	}
	for name, code := range map[string]int32{"full": sqlite3.SQLITE_FULL, "EIO": sqlite3.SQLITE_IOERR_WRITE} {
		failed := 0
		for at := 1; at < 200; at += step {
			dir := t.TempDir()
			f.write(t, dir)
			cfg := DefaultConfig()
			cfg.Dir, cfg.SalvageTime = dir, time.Hour
			failDisk(at, code)
			db, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
			stopRecording()
			if err != nil {
				failed++
				if left := dirFiles(t, dir); !bytes.Equal(left[fileName], f.main) && exists(filepath.Join(dir, DamagedName)) {
					t.Errorf("%s at operation %d: the database was touched", name, at)
				}
			} else if err := db.Close(); err != nil {
				t.Error(err)
			}
			db, _, got := reopen(t, dir)
			if lacking := missing(got, want, f); db.Salvage() == nil || len(lacking) > 0 {
				t.Errorf("%s at operation %d (%v): %d rows are lost", name, at, err, len(lacking))
			}
		}
		t.Logf("%s: %d starts failed", name, failed)
	}
}

// The same for a restore, which never leaves the directory without a database.
func TestRestoreIsCutShort(t *testing.T) {
	db, store := openStore(t)
	fill(t, db, store)
	backup := filepath.Join(t.TempDir(), "backup")
	if err := Backup(t.Context(), filepath.Dir(db.path), backup); err != nil {
		t.Fatal(err)
	}
	copied, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	old := makeImage(t, rand.New(rand.NewPCG(8, 8)), true)
	const aside = fileName + ".before-20261124T113625Z"
	const next = nextName + "before-20261124T113625Z"
	for name, tt := range map[string]struct {
		files    map[string][]byte
		restored bool
	}{
		"while it is copied":      {map[string][]byte{fileName: old.main, fileName + "-wal": old.wal, fileName + ".part": copied[:9000]}, false},
		"when it is complete":     {map[string][]byte{fileName: old.main, fileName + "-wal": old.wal, next: copied}, true},
		"when the log is aside":   {map[string][]byte{fileName: old.main, aside + "-wal": old.wal, next: copied}, true},
		"when there is none":      {map[string][]byte{aside: old.main, aside + "-wal": old.wal, next: copied}, true},
		"when there was none":     {map[string][]byte{next: copied}, true},
		"and the next restore":    {map[string][]byte{fileName: old.main, aside + "-wal": old.wal, next: copied}, true},
		"of a salvaged database":  {map[string][]byte{fileName: old.main, fileName + "-wal": old.wal, next: copied, stateName: []byte(`{"report":{"why":"x"}}`)}, true},
		"and a mark from earlier": {map[string][]byte{fileName: old.main, fileName + "-wal": old.wal, next: copied, DamagedName: []byte("x")}, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, b := range tt.files {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if name == "and the next restore" {
				if _, err := Restore(t.Context(), dir, backup); err != nil {
					t.Fatal(err)
				}
			}
			db, j, rows := reopen(t, dir)
			if db.Salvage() != nil {
				t.Errorf("salvaged: %+v", db.Salvage())
			}
			restored := len(rows["session"]) == filled.Sessions
			if restored != tt.restored || total(rows) == 0 {
				t.Errorf("got %d rows, restored: %v, want %v", total(rows), restored, tt.restored)
			}
			j.Close()
			db.Close()
			left := dirFiles(t, dir)
			if tt.restored && name != "when there was none" && (!bytes.Equal(left[aside], old.main) || !bytes.Equal(left[aside+"-wal"], old.wal)) {
				t.Error("what was there is not kept together")
			}
			if _, there := left[next]; there {
				t.Error("is not finished")
			}
		})
	}
}

// What was deleted stays deleted, where the damage does not reach: also when the
// list of free pages is lost with the header.
func TestDeletedStaysDeleted(t *testing.T) {
	for name, harm := range map[string]func(*imageFiles){
		"header":     func(f *imageFiles) { clear(f.main[:100]) },
		"first page": func(f *imageFiles) { clear(f.main[:usualPage]) },
	} {
		t.Run(name, func(t *testing.T) {
			f := makeImage(t, rand.New(rand.NewPCG(9, 9)), false)
			dir := t.TempDir()
			f.write(t, dir)
			db, j, want := reopen(t, dir)
			j.Close()
			db.Close()
			f = imageFiles{main: dirFiles(t, dir)[fileName], segments: f.segments, rows: f.rows}
			harm(&f)
			dir = t.TempDir()
			f.write(t, dir)
			db, _, got := reopen(t, dir)
			if db.Salvage() == nil {
				t.Fatal("not salvaged")
			}
			for table := range want {
				if len(got[table]) != len(want[table]) {
					t.Errorf("%s: got %d rows, want %d", table, len(got[table]), len(want[table]))
				}
			}
		})
	}
}

// Nor does it come back where one page of a table is lost: what was deleted is on
// pages that the list of free pages names.
func TestDeletedStaysDeletedBesideDamage(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(13, 13)), false)
	dir := t.TempDir()
	f.write(t, dir)
	db, j, want := reopen(t, dir)
	j.Close()
	db.Close()
	salvages, step := 0, 3
	if raceDetector {
		step *= 2
	}
	if testing.Short() { // under an emulator
		step = 12
	}
	for at := 0; at < len(f.main); at += usualPage * step {
		main := bytes.Clone(f.main)
		clear(main[at:min(at+usualPage, len(main))])
		dir := t.TempDir()
		imageFiles{main: main}.write(t, dir)
		db, j, got := reopen(t, dir)
		if db.Salvage() != nil {
			salvages++
		}
		if back := missing(want, got, f); len(back) > 0 {
			t.Errorf("page %d lost: %d deleted rows are back, the first is %s", at/usualPage+1, len(back), back[0])
		}
		j.Close()
		db.Close()
	}
	if salvages < 30/step {
		t.Errorf("%d salvages", salvages)
	}
}

// What belonged to a session or an operator that is lost is lost with it: it
// would belong to whoever has the number or the name next.
func TestSalvageLeavesOutWhatIsNobodys(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(14, 14)), false)
	s := sourceOf(f.main, nil)
	all := salvagedTables()
	s.orphans(func(no uint32, n *node) bool { // all pages are ones
		for _, name := range []string{"session", "operator"} {
			table := &all[indexOf(all, name)]
			for i := range n.cells {
				c, _ := n.cell(i)
				rec, _ := s.record(c)
				if _, ok := table.row(c, decodeRecord(rec), true); ok && n.table() == table.rowid {
					clear(f.main[(int(no)-1)*usualPage:][:usualPage])
				}
			}
		}
		return true
	})
	dir := t.TempDir()
	f.write(t, dir)
	db, _, got := reopen(t, dir)
	if db.Salvage() == nil || len(got["retained"]) == 0 {
		t.Fatalf("salvaged %v", db.Salvage())
	}
	for _, table := range []string{"session", "operator", "subscription", "inbound", "token"} {
		if n := len(got[table]); n > 0 {
			t.Errorf("%d rows of %s are kept", n, table)
		}
	}
}

// On a young gateway all is in the log. Where the file is missing, or empty, SQLite
// would delete that.
func TestLogWithoutItsFile(t *testing.T) {
	db, store := openStore(t)
	fill(t, db, store)
	log := readImage(t, filepath.Dir(db.path)).wal
	for name, main := range map[string][]byte{"missing": nil, "empty": {}} {
		dir := t.TempDir()
		imageFiles{main: main, wal: log}.write(t, dir)
		db, _, _ := reopen(t, dir)
		if db.Salvage() == nil {
			t.Fatalf("%s: not salvaged", name)
		}
		verified(t, db.path, filled)
	}
}

// A log that is damaged in its middle is set aside with its file, and what was
// committed behind the damage is there.
func TestLogDamagedInItsMiddle(t *testing.T) {
	db, store := openStore(t)
	fill(t, db, store)
	f := readImage(t, filepath.Dir(db.path))
	for at := logHeader; at < len(f.wal)/2; at += frameHeader + usualPage {
		wal := bytes.Clone(f.wal)
		wal[at+frameHeader+usualPage/3] ^= 1
		dir := t.TempDir()
		imageFiles{main: f.main, wal: wal}.write(t, dir)
		db, _, _ := reopen(t, dir)
		r := db.Salvage()
		if r == nil || r.Why != brokenLogWhy {
			t.Fatalf("frame at %d: got report %+v", at, r)
		}
		if left := dirFiles(t, dir); !bytes.Equal(left[r.File+"-wal"], wal) {
			t.Errorf("frame at %d: the log is not kept", at)
		}
	}
}

// A number that cannot be is damage, and does not keep the broker from starting.
func TestOldestReaderThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	db, j, _ := reopen(t, dir)
	if _, err := db.write.Exec(`UPDATE meta SET value = 1 << 40 WHERE key = 'oldest_reader'`); err != nil {
		t.Fatal(err)
	}
	j.Close()
	db.Close()
	db, _, _ = reopen(t, dir)
	if db.Salvage() == nil {
		t.Error("not salvaged")
	}
}

// What there is no time for before service begins is read afterwards, from where
// the last start was, for those sessions that have not finished it.
func TestRemaining(t *testing.T) {
	f, rows := damaged(t)
	want := 0 // claims that are not finished
	sessions := map[SessionID]string{}
	cursor := map[SessionID]uint64{}
	for _, r := range rows["session"] {
		p, err := decodeProgress(r[6].([]byte))
		if err != nil {
			t.Fatal(err)
		}
		sessions[SessionID(r[0].(int64))], cursor[SessionID(r[0].(int64))] = r[1].(string), p.Cursor
	}
	for _, r := range rows[segmentTable] {
		for _, p := range segmentOf(r).contents().pieces {
			for k := range p.count {
				if sessions[p.session] != "" && p.first+uint64(k) >= cursor[p.session] {
					want++
				}
			}
		}
	}
	dir := t.TempDir()
	f.write(t, dir)
	db, j, got := reopen(t, dir, func(c *Config) { c.SalvageTime = 0 })
	if len(got[segmentTable]) > 0 || len(got["session"]) != len(rows["session"]) {
		t.Fatalf("got %d segments and %d sessions at the start", len(got[segmentTable]), len(got["session"]))
	}
	if r := db.Salvage(); r == nil || !r.Running {
		t.Fatalf("got report %+v, want that it goes on", r)
	}
	n, calls := 0, 0
	cut := errors.New("cut")
	count := func(recs []SalvagedRecord) error {
		if calls++; calls == 5 {
			return cut
		}
		for _, rec := range recs {
			for _, c := range rec.Claims {
				if sessions[c.Session] != c.ClientID {
					t.Errorf("claim of session %d is given to %q", c.Session, c.ClientID)
				}
				n++
			}
		}
		return nil
	}
	if err := db.Remaining(t.Context(), count); !errors.Is(err, cut) {
		t.Fatalf("got %v, want what give returned", err)
	}
	j.Close()
	db.Close()
	db, _, _ = reopen(t, dir)
	if err := db.Remaining(t.Context(), count); err != nil {
		t.Fatal(err)
	}
	if n != want || want == 0 {
		t.Errorf("%d claims were given, want %d", n, want)
	}
	r := db.Salvage()
	if r == nil || r.Running || r.Given == 0 {
		t.Errorf("got report %+v, want that it is over", r)
	}
	if err := db.Remaining(t.Context(), func([]SalvagedRecord) error { return cut }); err != nil {
		t.Errorf("once more: got %v, want nothing to do", err)
	}
	if err := os.Remove(filepath.Join(dir, stateName)); err != nil {
		t.Fatal(err)
	}
	if r := db.Salvage(); r != nil {
		t.Errorf("acknowledged: got %+v, want no report", r)
	}
}

// So it is for sessions that were found on orphaned pages.
func TestRemainingOfOrphanedSessions(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(15, 15)), false)
	root := sourceOf(f.main, nil).roots["session"]
	page := f.main[(root-1)*usualPage:][:usualPage]
	if page[0] != tableInterior {
		t.Fatal("the sessions have no page above their leaves")
	}
	given := func() (clients map[string]int) {
		dir := t.TempDir()
		f.write(t, dir)
		db, j, _ := reopen(t, dir, func(c *Config) { c.SalvageTime, c.Damaged = 0, "by a test" })
		clients = make(map[string]int)
		err := db.Remaining(t.Context(), func(recs []SalvagedRecord) error {
			for _, rec := range recs {
				for _, c := range rec.Claims {
					clients[c.ClientID]++
				}
			}
			return nil
		})
		if err := errors.Join(err, j.Close(), db.Close()); err != nil {
			t.Fatal(err)
		}
		return clients
	}
	want := given()
	clear(page)
	if got := given(); len(want) == 0 || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%d clients are given their messages, want %d", len(got), len(want))
	}
}

// A salvaged session goes on well above what its client may have seen, and at most
// two damaged databases are kept.
func TestSalvageAgain(t *testing.T) {
	f, rows := damaged(t)
	dir := t.TempDir()
	highest := map[int64]uint64{}
	for _, r := range rows[segmentTable] {
		for _, p := range segmentOf(r).contents().pieces {
			highest[int64(p.session)] = max(highest[int64(p.session)], p.first+uint64(p.count)-1)
		}
	}
	for range 4 {
		f.write(t, dir)
		db, j, got := reopen(t, dir)
		for _, r := range got["session"] {
			if ceiling := r[5].(int64); ceiling < 16384+ceilingSkip || uint64(ceiling) <= highest[r[0].(int64)]+ceilingSkip {
				t.Fatalf("session %d: got ceiling %d, the highest number stored is %d", r[0], ceiling, highest[r[0].(int64)])
			}
		}
		j.Close()
		db.Close()
	}
	if names := siblings(dir, fileName+"."+corruptName); len(names) != keptAside {
		t.Errorf("set aside: %q, want %d", names, keptAside)
	}
}

// A commit that meets damage ends the journal, and the next start salvages.
func TestDamageWhileRunning(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(10, 10)), false)
	dir := t.TempDir()
	f.write(t, dir)
	db, j, rows := reopen(t, dir)
	// Behind the journal's back, below SQLite.
	file, err := os.OpenFile(filepath.Join(dir, fileName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var root int64
	if err := db.read.QueryRow(`SELECT rootpage FROM sqlite_schema WHERE name = 'will'`).Scan(&root); err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteAt(bytes.Repeat([]byte{0xee}, usualPage), (root-1)*usualPage); err != nil {
		t.Fatal(err)
	}
	j.Change(func(tx Tx) error { return tx.PutWill(Will{ClientID: "new", Message: &Message{Topic: "w"}}) }, nil)
	if err := j.store.(*sqliteStore).disconnect(); err != nil { // its cache has the page
		t.Fatal(err)
	}
	if err := j.Run(t.Context()); !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v, want ErrDamaged", err)
	}
	if db.Damage() == "" || readMark(dir) == "" {
		t.Error("the damage is not noted")
	}
	j.Close()
	db.Close()
	file.Close()
	db, _, got := reopen(t, dir)
	r := db.Salvage()
	if r == nil || !strings.Contains(r.Why, "malformed") {
		t.Fatalf("got report %+v", r)
	}
	if len(got["session"]) != len(rows["session"]) || len(got[segmentTable]) != len(rows[segmentTable]) {
		t.Errorf("got %d sessions and %d segments, want %d and %d", len(got["session"]), len(got[segmentTable]), len(rows["session"]), len(rows[segmentTable]))
	}
	if readMark(dir) != "" {
		t.Error("the next start would salvage again")
	}
}

// The check in the background finds a page that no start reads, and nothing in a
// healthy database.
func TestCheck(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(11, 11)), false)
	dir := t.TempDir()
	f.write(t, dir)
	db, j, _ := reopen(t, dir)
	if err := db.check(t.Context(), noRest); err != nil {
		t.Errorf("healthy: %v", err)
	}
	var root int64
	if err := db.read.QueryRow(`SELECT rootpage FROM sqlite_schema WHERE name = 'token_expires'`).Scan(&root); err != nil {
		t.Fatal(err)
	}
	j.Close()
	db.Close()
	for name, harm := range map[string]func([]byte){
		"an index": func(b []byte) { clear(b[(root-1)*usualPage:][:usualPage]) },
		"a body": func(b []byte) {
			for _, versions := range f.segments {
				if at := bytes.Index(b, versions[0].Body[:50]); at >= 0 {
					b[at+1] = 0xff // the record's length
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			main := bytes.Clone(f.main)
			harm(main)
			dir := t.TempDir()
			imageFiles{main: main}.write(t, dir)
			db := mustOpen(t, dir)
			if db.Salvage() != nil {
				t.Skip("the start has found it")
			}
			err := db.check(t.Context(), noRest)
			if !isDamage(err) {
				t.Errorf("got %v, want that it is damaged", err)
			}
			db.suspect(err)
			if readMark(dir) == "" {
				t.Error("the next start would not salvage")
			}
		})
	}
}

// A damaged database that another process serves is left alone.
func TestDamagedInUse(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(12, 12)), false)
	clear(f.main[:usualPage])
	dir := t.TempDir()
	f.write(t, dir)
	lock, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	cfg := DefaultConfig()
	cfg.Dir = dir
	if _, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrInUse) || !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged and ErrInUse", err)
	}
	if left := dirFiles(t, dir); !bytes.Equal(left[fileName], f.main) {
		t.Error("the file was touched")
	}
}

// What is healthy, or new, or was cut short in its first start, is not salvaged.
func TestHealthyIsLeftAlone(t *testing.T) {
	for name, files := range map[string]map[string][]byte{
		"nothing":       {},
		"an empty file": {fileName: {}},
		"an empty log":  {fileName: {}, fileName + "-wal": {}},
		"an old mark":   {DamagedName: nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, b := range files {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			db, _, _ := reopen(t, dir)
			if r := db.Salvage(); (r != nil) != (name == "an old mark") {
				t.Errorf("got report %+v", r)
			}
			if names := siblings(dir, fileName+"."+corruptName); len(names) > 0 {
				t.Errorf("set aside: %q", names)
			}
		})
	}
}

func TestSummary(t *testing.T) {
	r := SalvageReport{Time: time.Unix(0, 0).UTC(), Running: true, Tables: []SalvagedRows{{Table: "a", Lost: 2}, {Table: "b", Lost: 1, Unknown: true}}}
	want := "salvage: the database was damaged and was salvaged at 1970-01-01T00:00:00Z, 3 rows and 0 messages of queues are known to be lost and perhaps others; queues are still being read"
	if got := fmt.Sprint(r.Summary()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A gigabyte of queues: how long a healthy start looks, and that a damaged one
// serves within five seconds.
func TestSalvageOfMuch(t *testing.T) {
	if os.Getenv("PENSTOCK_SOAK") == "" {
		t.Skip("takes a gigabyte of disk: set PENSTOCK_SOAK=1")
	}
	const size = 1 << 30
	dir := t.TempDir()
	db, j, _ := reopen(t, dir)
	j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: 1, ClientID: "sleeper", Expiry: NeverExpires}) }, nil)
	seq := uint64(0)
	payload := bytes.Repeat([]byte("payload "), 64)
	for written := 0; written < size; {
		for range 2000 {
			m := &Message{Topic: "t", Payload: payload, QoS: 1}
			j.Publish(&Publication{Message: m, Claims: []Claim{&testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: seq, QoS: 1}}}})
			seq++
			written += m.Size()
		}
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	j.Close()
	db.Close()
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	took := func(what string, f func() error) time.Duration {
		began := time.Now()
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		d := time.Since(began)
		t.Logf("%s: %s", what, d.Round(100*time.Microsecond))
		return d
	}
	took("look at the start", func() error { _, err := db.probe(t.Context(), steps); return err })
	db = mustOpen(t, dir)
	took("quick_check", func() error {
		var ok string
		return db.read.QueryRow(`PRAGMA quick_check`).Scan(&ok)
	})
	took("check, without its pauses", func() error {
		return db.check(t.Context(), func(context.Context, time.Duration) error { return nil })
	})
	db.Close()
	f, err := os.OpenFile(db.path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(make([]byte, usualPage), 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if d := took("start with a damaged one", func() error { db, _, _ = reopen(t, dir); return nil }); d > 5*time.Second {
		t.Error("that is more than 5 s")
	}
	var before int
	if err := db.read.QueryRow(`SELECT count(*) FROM segment`).Scan(&before); err != nil {
		t.Fatal(err)
	}
	n := uint64(0)
	took("reading the rest", func() error {
		return db.Remaining(t.Context(), func(recs []SalvagedRecord) error { n += uint64(len(recs)); return nil })
	})
	t.Logf("%d messages, %d segments salvaged before service, %d messages after it: %+v", seq, before, n, db.Salvage())
	if r := db.Salvage(); r == nil || r.Running || n == 0 {
		t.Errorf("got report %+v", r)
	}
}
