package storage

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// imageFiles are the files of a database at one moment, as a power cut leaves them.
type imageFiles struct {
	main, wal []byte // nil: there is none
	mark      []byte // that it was found damaged, likewise
	// segments are as they ever were, rows what else there ever was.
	segments map[int64][]StoredSegment
	rows     map[string]bool
}

// write puts the files into dir.
func (f imageFiles) write(t testing.TB, dir string) {
	t.Helper()
	for name, b := range map[string][]byte{fileName: f.main, fileName + "-wal": f.wal, DamagedName: f.mark} {
		if b == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// readImage reads the files of the database in dir.
func readImage(t testing.TB, dir string) (f imageFiles) {
	t.Helper()
	for name, b := range map[string]*[]byte{fileName: &f.main, fileName + "-wal": &f.wal} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err == nil {
			*b = got
		}
	}
	return f
}

// makeImage makes a database by a real journal, with something of everything and
// with gaps where there was more. logged: a part of it is still in the log alone.
func makeImage(t testing.TB, rng *rand.Rand, logged bool) imageFiles {
	t.Helper()
	ctx := context.Background()
	cfg := DefaultConfig()
	cfg.Dir = t.TempDir()
	log := slog.New(slog.DiscardHandler)
	db, err := Open(ctx, cfg, log)
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
	check := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	segments, ever := make(map[int64][]StoredSegment), make(map[string]bool)
	note := func() {
		for table, rows := range rowsOf(t, db.read) {
			for _, r := range rows {
				ever[rowKey(table, r)] = true
			}
		}
		rows, err := db.read.Query(`SELECT id, head, body FROM segment`)
		check(err)
		defer rows.Close()
		for rows.Next() {
			var s StoredSegment
			check(rows.Scan(&s.ID, &s.Head, &s.Body))
			segments[s.ID] = append(segments[s.ID], s)
		}
		check(rows.Err())
	}
	text := func(most int) string { return strings.Repeat("x", rng.IntN(most)) }
	now := time.UnixMilli(1_700_000_000_000)
	seq := make(map[SessionID]uint64)
	const sessions = 100
	work := func(round int) {
		for i := range 20 {
			check(db.PutOperator(ctx, Operator{Name: fmt.Sprintf("op%d-%d", round, i), Role: "viewer", Hash: "h" + text(90), Created: now}),
				db.PutCredential(ctx, Credential{Username: fmt.Sprintf("dev%d-%d", round, i), Hash: "h" + text(90), Created: now}, true),
				db.PutToken(ctx, Token{Hash: bytes.Repeat([]byte{byte(i), byte(round)}, 16), Operator: fmt.Sprintf("op%d-%d", round, i), Expires: now, LastUsed: now}))
		}
		var rules []ACLRule
		for i := range 100 {
			rules = append(rules, ACLRule{Username: fmt.Sprint("u", i), Action: "any", Filter: "a/" + text(80), Allow: i%2 == 0})
		}
		check(db.ReplaceACLRules(ctx, rules))
		j.Change(func(tx Tx) error {
			var errs []error
			for i := range sessions {
				id := SessionID(round*sessions + i + 1)
				errs = append(errs, tx.PutSession(Session{ID: id, ClientID: fmt.Sprintf("client-%d", id), Expiry: NeverExpires, Protocol: 5, Created: 1, Ceiling: 16384, Progress: Progress{Cursor: uint64(i % 5)}}))
				for k := range rng.IntN(12) {
					errs = append(errs, tx.PutSubscription(Subscription{Session: id, Filter: fmt.Sprintf("f/%d/%s", k, text(60)), Options: 1}))
				}
				for k := range rng.IntN(8) {
					errs = append(errs, tx.PutInbound(Inbound{id, uint16(k + 1)}))
				}
				errs = append(errs, tx.PutWill(Will{ClientID: fmt.Sprintf("client-%d", id), Message: &Message{Topic: "w", Payload: []byte(text(200))}}))
			}
			for i := range 300 {
				errs = append(errs, tx.PutRetained(&Message{Topic: fmt.Sprintf("r/%d/%d", round, i), Payload: []byte(text(300)), QoS: 1}))
			}
			errs = append(errs, tx.PutRetained(&Message{Topic: fmt.Sprintf("large/%d", round), Payload: bytes.Repeat([]byte("large "), 5000)}))
			return errors.Join(errs...)
		}, nil)
		check(j.Commit())
		for range 12 {
			for range rng.IntN(40) + 1 {
				p := &Publication{Message: &Message{Topic: "t/" + text(20), Payload: bytes.Repeat([]byte{byte(rng.IntN(256))}, rng.IntN(1500)), QoS: 1}}
				for range 1 + rng.IntN(3) {
					id := SessionID(round*sessions + rng.IntN(sessions) + 1)
					p.Claims = append(p.Claims, &testClaim{ClaimRecord: ClaimRecord{Session: id, Seq: seq[id], QoS: 1}})
					seq[id]++
				}
				j.Publish(p)
			}
			check(j.Commit())
		}
		note()
		j.Change(func(tx Tx) error { // holes, and free pages
			var errs []error
			for i := range 150 {
				errs = append(errs, tx.DeleteRetained(fmt.Sprintf("r/%d/%d", round, i)))
			}
			for i := range 4 {
				errs = append(errs, tx.DeleteSegment(int64(round*12+3*i+1)), tx.DeleteSession(SessionID(round*sessions+7*i+1)))
			}
			return errors.Join(errs...)
		}, nil)
		check(j.Commit())
	}
	work(0)
	if logged {
		_, err := db.write.Exec("PRAGMA wal_checkpoint(TRUNCATE)")
		check(err)
	}
	work(1)
	if !logged {
		check(j.Close(), db.Close())
	}
	f := readImage(t, cfg.Dir)
	f.segments, f.rows = segments, ever
	if logged {
		if len(f.wal) == 0 {
			t.Fatal("nothing is in the log")
		}
		check(j.Close(), db.Close())
	}
	return f
}

// harm is a kind of damage.
type harm struct {
	name string
	do   func(rng *rand.Rand, f *imageFiles)
}

func flip(rng *rand.Rand, b []byte, n int) {
	for range n {
		if len(b) > 0 {
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
		}
	}
}

func zeroPages(rng *rand.Rand, b []byte, n int) {
	for range n {
		if pages := len(b) / usualPage; pages > 0 {
			clear(b[rng.IntN(pages)*usualPage:][:usualPage])
		}
	}
}

var harms = []harm{
	{"zeroed pages", func(rng *rand.Rand, f *imageFiles) { zeroPages(rng, f.main, 1+rng.IntN(8)) }},
	{"many zeroed pages", func(rng *rand.Rand, f *imageFiles) { zeroPages(rng, f.main, len(f.main)/usualPage/3) }},
	{"flipped bits", func(rng *rand.Rand, f *imageFiles) { flip(rng, f.main, 1+rng.IntN(200)) }},
	{"flipped bits at heads of pages", func(rng *rand.Rand, f *imageFiles) {
		for range 1 + rng.IntN(30) {
			at := rng.IntN(max(len(f.main)/usualPage, 1)) * usualPage
			flip(rng, f.main[at:min(at+40, len(f.main))], 1)
		}
	}},
	{"first page zeroed", func(rng *rand.Rand, f *imageFiles) { clear(f.main[:min(usualPage, len(f.main))]) }},
	{"header zeroed", func(rng *rand.Rand, f *imageFiles) { clear(f.main[:min(100, len(f.main))]) }},
	{"header damaged", func(rng *rand.Rand, f *imageFiles) { flip(rng, f.main[:min(100, len(f.main))], 4) }},
	{"truncated", func(rng *rand.Rand, f *imageFiles) { f.main = f.main[:rng.IntN(len(f.main))] }},
	{"truncated to pages", func(rng *rand.Rand, f *imageFiles) {
		f.main = f.main[:rng.IntN(len(f.main)/usualPage)*usualPage]
	}},
	{"all zero", func(rng *rand.Rand, f *imageFiles) { clear(f.main) }},
	{"another file", func(rng *rand.Rand, f *imageFiles) { f.main = bytes.Repeat([]byte("no database\n"), 1+rng.IntN(5000)) }},
	{"log missing", func(rng *rand.Rand, f *imageFiles) { f.wal = nil }},
	{"log damaged", func(rng *rand.Rand, f *imageFiles) { flip(rng, f.wal, 1+rng.IntN(5)) }},
	{"log truncated", func(rng *rand.Rand, f *imageFiles) {
		if len(f.wal) > 0 {
			f.wal = f.wal[:rng.IntN(len(f.wal))]
		}
	}},
	{"file missing", func(rng *rand.Rand, f *imageFiles) { f.main = nil }},
	{"file empty", func(rng *rand.Rand, f *imageFiles) { f.main = []byte{} }},
	{"a stretch of noise", func(rng *rand.Rand, f *imageFiles) {
		at := rng.IntN(len(f.main))
		for i := range f.main[at:min(at+rng.IntN(40000), len(f.main))] {
			f.main[at+i] = byte(rng.Uint32())
		}
	}},
	{"pages exchanged", func(rng *rand.Rand, f *imageFiles) {
		pages := len(f.main) / usualPage
		a, b := rng.IntN(pages)*usualPage, rng.IntN(pages)*usualPage
		for i := range usualPage {
			f.main[a+i], f.main[b+i] = f.main[b+i], f.main[a+i]
		}
	}},
	{"log and file damaged", func(rng *rand.Rand, f *imageFiles) { flip(rng, f.wal, 1); zeroPages(rng, f.main, 3) }},
}

// rowsOf returns what a database has in our tables, and which tables it has.
func rowsOf(t testing.TB, pool *sql.DB) map[string][][]any {
	t.Helper()
	out := make(map[string][][]any)
	for _, table := range salvagedTables() {
		names := make([]string, len(table.columns))
		for i, c := range table.columns {
			names[i] = c.name
		}
		rows, err := pool.Query("SELECT " + strings.Join(names, ", ") + " FROM " + table.name)
		if err != nil {
			continue // not recovered
		}
		for rows.Next() {
			values := make([]any, len(names))
			to := make([]any, len(names))
			for i := range values {
				to[i] = &values[i]
			}
			if err := rows.Scan(to...); err != nil {
				break
			}
			rowid, _ := values[0].(int64)
			if table.rowid {
				values[0] = nil
			}
			if row, ok := table.row(cell{rowid: rowid}, values, true); ok {
				out[table.name] = append(out[table.name], row)
			}
		}
		rows.Close()
	}
	return out
}

// usable takes out of rows what belongs to others that are not there, and what no
// salvage may promise.
func usable(rows map[string][][]any) {
	ids, names := make(map[any]bool), make(map[any]bool)
	for _, r := range rows["session"] {
		ids[r[0]] = true
	}
	for _, r := range rows["operator"] {
		names[r[0]] = true
	}
	rows["subscription"] = slices.DeleteFunc(rows["subscription"], func(r []any) bool { return !ids[r[0]] })
	rows["inbound"] = slices.DeleteFunc(rows["inbound"], func(r []any) bool { return !ids[r[0]] })
	rows["token"] = slices.DeleteFunc(rows["token"], func(r []any) bool { return !names[r[1]] })
}

// missing returns the rows of want that got has not, of those that ever were in
// the image: what the shell makes up of damaged pages is not wanted.
func missing(got, want map[string][][]any, base imageFiles) []string {
	var out []string
	for table, rows := range want {
		have := make(map[string]bool, len(got[table]))
		usurped := make(map[string]bool)
		segments := make(map[any]StoredSegment)
		for _, r := range got[table] {
			if table == segmentTable {
				segments[r[0]] = segmentOf(r)
				continue
			}
			have[rowKey(table, r)] = true
			usurped[primaryKey(table, r)] = !base.rows[rowKey(table, r)]
		}
		for _, r := range rows {
			if table != segmentTable {
				// Where a damaged row has taken the key of another, either may win.
				if key := rowKey(table, r); base.rows[key] && !have[key] && !usurped[primaryKey(table, r)] {
					out = append(out, fmt.Sprintf("%s %.100q", table, fmt.Sprint(r...)))
				}
				continue
			}
			// Of a body that is torn the shell makes up the rest of zeros.
			mine := segments[r[0]].deliveries()
			for d := range segmentOf(r).deliveries() {
				if !mine[d] && genuine(d, base.segments[r[0].(int64)]) {
					out = append(out, fmt.Sprintf("segment %v: %.60q", r[0], d))
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

func segmentOf(row []any) StoredSegment {
	return StoredSegment{ID: row[0].(int64), Head: row[1].([]byte), Body: row[2].([]byte), Size: 1 << 30}
}

// deliveries returns what of the segment can be read.
func (s StoredSegment) deliveries() map[string]bool {
	out := make(map[string]bool)
	c := s.contents()
	for _, p := range c.pieces {
		c.Deliveries(p.session, p.first, p.first+uint64(p.count), func(r ClaimRecord, m *Message) bool {
			out[fmt.Sprintf("%+v %+v", r, *m)] = true
			return true
		})
	}
	return out
}

func genuine(delivery string, versions []StoredSegment) bool {
	return slices.ContainsFunc(versions, func(s StoredSegment) bool { return s.deliveries()[delivery] })
}

func primaryKey(table string, r []any) string {
	if table == "subscription" || table == "inbound" {
		return fmt.Sprintf("%q", r[:2])
	}
	return fmt.Sprintf("%q", r[:1])
}

func rowKey(table string, r []any) string {
	r = slices.Clone(r)
	if table == "session" {
		r[5] = nil // the ceiling is raised
	}
	return table + fmt.Sprintf("%q", r)
}

// sqliteShell is the program of SQLite to compare with.
func sqliteShell() string { return cmp.Or(os.Getenv("PENSTOCK_SQLITE3"), "sqlite3") }

// recovered returns what the sqlite3 shell gets out of the files.
func recovered(t *testing.T, f imageFiles) map[string][][]any {
	t.Helper()
	dir := t.TempDir()
	f.write(t, dir)
	shell := exec.Command(sqliteShell(), filepath.Join(dir, fileName), ".recover")
	script, _ := shell.Output() // what it could do stands in it, whatever its exit code
	into := exec.Command(sqliteShell(), filepath.Join(dir, "recovered.db"))
	into.Stdin = bytes.NewReader(script)
	_ = into.Run() // rows that the schema refuses are errors to it
	pool, err := openDSN(plainDSN(filepath.Join(dir, "recovered.db")), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	return rowsOf(t, pool)
}

// noRest has a check go on at once.
func noRest(context.Context, time.Duration) error { return nil }

// TestSalvage damages databases in every way that there is. Each start succeeds,
// in time, and it, or the one after a check that found what a start does not read,
// has at least what the sqlite3 shell's .recover gets out of them.
func TestSalvage(t *testing.T) {
	count := 2 * len(harms)
	switch {
	case os.Getenv("PENSTOCK_SOAK") != "":
		count = 500
	case testing.Short():
		count = 6
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("PENSTOCK_SALVAGE_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	rng := rand.New(rand.NewPCG(seed, 5))
	var images []imageFiles
	for i := range 4 {
		images = append(images, makeImage(t, rng, i%2 == 0))
	}
	// Debian 12 has a shell whose .recover fails on every database: its library
	// is built without what that needs.
	compare := false
	if _, err := exec.LookPath(sqliteShell()); err == nil {
		compare = len(recovered(t, images[0])) > 0
	}
	t.Logf("seed %d, compared with the sqlite3 shell: %v", seed, compare)
	type figures struct {
		damages              int
		salvages, later      int // by the first start; by the one after the check in the background
		had, kept, recovered int // rows: undamaged, after the start, that the shell gets out
		longest              time.Duration
	}
	per := make([]figures, len(harms))
	whole := make([]int, len(images))
	latest := make([]imageFiles, len(images)) // what was in them in the end
	for i, image := range images {
		dir := t.TempDir()
		image.write(t, dir)
		db, j, rows := reopen(t, dir)
		whole[i] = total(rows)
		latest[i] = imageFiles{rows: make(map[string]bool), segments: make(map[int64][]StoredSegment)}
		for table, of := range rows {
			for _, r := range of {
				latest[i].rows[rowKey(table, r)] = true
				if table == segmentTable {
					latest[i].segments[r[0].(int64)] = []StoredSegment{segmentOf(r)}
				}
			}
		}
		j.Close()
		db.Close()
	}
	for i := range count {
		h := harms[i%len(harms)]
		which := rng.IntN(len(images))
		base, fig := images[which], &per[i%len(harms)]
		fig.damages++
		fig.had += whole[which]
		f := imageFiles{main: bytes.Clone(base.main), wal: bytes.Clone(base.wal)}
		h.do(rng, &f)
		name := fmt.Sprintf("damage %d, %s", i, h.name)
		dir := t.TempDir()
		f.write(t, dir)
		cfg := DefaultConfig()
		cfg.Dir = dir
		if raceDetector { // which makes seconds of it: nothing is left for later all the same
			cfg.SalvageTime = time.Hour
		}
		log := slog.New(slog.DiscardHandler)
		began := time.Now()
		db, err := Open(t.Context(), cfg, log)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		j, err := db.NewJournal(log)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, _, err = j.Load(); err != nil {
			t.Fatalf("%s: load: %v", name, err)
		}
		took := time.Since(began)
		fig.longest = max(fig.longest, took)
		if took > 5*time.Second && !raceDetector {
			t.Errorf("%s: took %s", name, took)
		}
		got := rowsOf(t, db.read)
		before := total(got)
		if usable(got); total(got) != before && db.Salvage() != nil {
			t.Errorf("%s: %d rows belong to others that are not there", name, before-total(got))
		}
		report := db.Salvage()
		if report == nil {
			// A start reads no bodies of segments. The check in the background does,
			// and so does whoever needs them: then the next start salvages.
			if err := db.check(t.Context(), noRest); isDamage(err) {
				fig.later++
				db.suspect(err)
				if err := errors.Join(j.Close(), db.Close()); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				db, j, got = reopen(t, dir)
				if report = db.Salvage(); report == nil {
					t.Errorf("%s: %v was not salvaged", name, err)
				}
			} else if err != nil {
				t.Errorf("%s: check: %v", name, err)
			}
		} else {
			fig.salvages++
		}
		if report != nil {
			var ok string
			if err := db.read.QueryRow("PRAGMA integrity_check").Scan(&ok); err != nil || ok != "ok" {
				t.Errorf("%s: what was made is damaged: %s, %v", name, ok, err)
			}
			if report.Running {
				t.Errorf("%s: is not read to its end", name)
			}
		}
		if err := errors.Join(j.Close(), db.Close()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		fig.kept += total(got)
		if !compare {
			continue
		}
		want := recovered(t, f)
		usable(want)
		fig.recovered += total(want)
		if report != nil && report.Why == brokenLogWhy {
			base = latest[which] // the shell stops at the damage, and so before later deletions
		}
		lacking := missing(got, want, base)
		if report != nil && report.Why == brokenLogWhy && len(lacking) <= 5 {
			lacking = nil // of pages with one of the bits flipped, of which the shell has older versions
		}
		if len(lacking) > 0 {
			t.Errorf("%s: %d rows are missing that .recover has, salvaged %v (%+v):\n%s", name, len(lacking), report != nil, report, strings.Join(lacking[:min(len(lacking), 8)], "\n"))
		}
	}
	var sum figures
	line := func(name string, f figures) {
		t.Logf("| %s | %d | %d | %d | %d | %d | %d | %d ms |", name, f.damages, f.salvages, f.later, f.had, f.kept, f.recovered, f.longest.Milliseconds())
	}
	for i, h := range harms {
		f := per[i]
		line(h.name, f)
		sum = figures{sum.damages + f.damages, sum.salvages + f.salvages, sum.later + f.later, sum.had + f.had, sum.kept + f.kept, sum.recovered + f.recovered, max(sum.longest, f.longest)}
	}
	line("all", sum)
}
