package storage

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// buildingName is a database that a salvage is filling; of one that was cut
	// short it is thrown away.
	buildingName = fileName + ".building"
	// nextName, with the name that the database in use shall have behind it, is
	// one that is complete and shall take its place. See replace.
	nextName = fileName + ".next-"
	// corruptName and a time begin the name of a database that was set aside.
	corruptName = "corrupt-"
	// beforeName likewise, of one that a restore has replaced.
	beforeName = "before-"
	// stateName has the report of the last salvage and what it still has to
	// read. While it is there the alarm is on.
	stateName = "penstock.salvage"

	timeInName = "20060102T150405Z"

	// keptAside is how many damaged databases are kept.
	keptAside = 2
	// ceilingSkip is added to a salvaged session's sequence numbers: its row may
	// be older than what its client has received since. It is two of the blocks
	// in which the broker reserves them, as much as a restart skips at worst.
	ceilingSkip = 2 * 16384
	// salvageChunk is how many bytes are written before the disk is asked to
	// have them, so that the time measured is the disk's.
	salvageChunk = 4 << 20
)

// SalvageReport says what a salvage has saved.
type SalvageReport struct {
	Time    time.Time      `json:"time"`    // by the gateway's clock
	Why     string         `json:"why"`     // how the damage was noticed
	File    string         `json:"file"`    // name of the damaged database in the data directory; empty if it was not kept
	Seconds float64        `json:"seconds"` // until service could begin
	Pages   int            `json:"pages"`   // pages of the file that could not be read
	Tables  []SalvagedRows `json:"tables"`
	// Running: queues are still being read from the damaged database.
	Running bool `json:"running"`
	// Given counts messages that were put into queues after service had begun.
	Given int `json:"given"`
	// LostMessages counts deliveries of queues whose message is known to be lost,
	// in segments of which the rest was kept.
	LostMessages int `json:"lost_messages"`
	// Unclaimed counts deliveries of sessions that are not there. Where the
	// sessions could be read in full these had ended before.
	Unclaimed int `json:"unclaimed"`
}

// Summary says in a line what happened and how much is lost.
func (r *SalvageReport) Summary() string {
	lost, unknown := 0, false
	for _, t := range r.Tables {
		lost += t.Lost
		unknown = unknown || t.Unknown
	}
	s := fmt.Sprintf("salvage: the database was damaged and was salvaged at %s, %d rows and %d messages of queues are known to be lost", r.Time.Format(time.RFC3339), lost, r.LostMessages)
	if unknown {
		s += " and perhaps others"
	}
	if r.Running {
		s += "; queues are still being read"
	}
	return s
}

// SalvagedRows says what became of a table.
type SalvagedRows struct {
	Table string `json:"table"`
	Kept  int    `json:"kept"` // rows
	Lost  int    `json:"lost"` // rows that were there and could not be read
	// Unknown: parts of the table are missing, with any number of rows.
	Unknown bool `json:"unknown"`
}

// salvageState is the file stateName.
type salvageState struct {
	Report  SalvageReport   `json:"report"`
	Sources []salvageSource `json:"sources"` // databases whose segments were not all read yet
}

// salvageSource is a damaged database of which segments are still to be read.
type salvageSource struct {
	File string `json:"file"`
	Next int    `json:"next"` // how many of its segments are done, in the order of a walk
}

// mend makes sure that there is a database at db.path that can be read, or none.
// It finishes what a power cut has interrupted, and salvages what is damaged. It
// returns ErrTooNew for a database that only a newer binary can read, and
// ErrInUse with ErrDamaged for one that is damaged while another process serves.
func (db *DB) mend(ctx context.Context, steps []migration) error {
	dir := filepath.Dir(db.path)
	var lock *os.File
	defer func() {
		if lock != nil {
			lock.Close()
		}
	}()
	why := cmp.Or(db.cfg.Damaged, readMark(dir))
	next := siblings(dir, nextName)
	if why != "" || len(next) > 0 {
		var err error
		if lock, err = lockDir(dir); errors.Is(err, ErrInUse) {
			return nil // it is that one's business
		} else if err != nil {
			return err
		}
		if len(next) > 0 {
			if _, err := replace(dir); err != nil {
				return err
			}
			why = ""
		}
	}
	if why == "" && brokenLog(db.path) {
		if lock == nil {
			var err error
			if lock, err = lockDir(dir); errors.Is(err, ErrInUse) {
				return nil // it was read while that one wrote
			} else if err != nil {
				return err
			}
		}
		if brokenLog(db.path) {
			why = brokenLogWhy
		}
	}
	if why == "" {
		var err error
		if why, err = db.probe(ctx, steps); err != nil || why == "" {
			return err
		}
	}
	if lock == nil {
		var err error
		if lock, err = lockDir(dir); errors.Is(err, ErrInUse) {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, why, err)
		} else if err != nil {
			return err
		}
	}
	return db.salvage(ctx, steps, why)
}

const brokenLogWhy = "transactions in the log are damaged"

// brokenLog reports whether SQLite would drop committed transactions from the end
// of the log of the database at path, because of damage before them.
func brokenLog(path string) bool {
	if fileSize(path+"-wal") <= logHeader {
		return false
	}
	f, err := os.Open(path + "-wal")
	if err != nil {
		return false
	}
	defer f.Close()
	return openPages(strings.NewReader(""), 0, f, fileSize(path+"-wal")).brokenLog
}

// mendOpen salvages the database, whose lock the caller has, because of an error
// that reading it has met, and opens it again.
func (db *DB) mendOpen(ctx context.Context, why error) error {
	steps, err := embeddedMigrations()
	if err != nil {
		return err
	}
	_ = db.Close() // it is to be thrown away
	db.write, db.read = nil, nil
	if err := db.salvage(ctx, steps, why.Error()); err != nil {
		return err
	}
	db.damage.mu.Lock()
	db.damage.why = ""
	db.damage.mu.Unlock()
	return db.open(ctx, steps)
}

// mendUnlocked is mendOpen for a caller who has not the lock.
func (db *DB) mendUnlocked(ctx context.Context, why error) error {
	lock, err := lockDir(filepath.Dir(db.path))
	if errors.Is(err, ErrInUse) {
		return fmt.Errorf("%w: %w: %w", ErrDamaged, why, err)
	} else if err != nil {
		return err
	}
	return errors.Join(db.mendOpen(ctx, why), lock.Close())
}

// siblings returns the names of databases in dir that begin with prefix, sorted.
// Of some there may be a log alone.
func siblings(dir, prefix string) []string {
	entries, _ := os.ReadDir(dir) // what cannot be read is not there
	var names []string
	for _, e := range entries {
		name := strings.TrimSuffix(strings.TrimSuffix(e.Name(), "-wal"), "-shm")
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// asideName returns the name, behind that of the database, of one that is set
// aside now: no file of it exists.
func asideName(dir, prefix string) string {
	at := prefix + time.Now().UTC().Format(timeInName)
	name := at
	for n := 2; ; n++ {
		path := filepath.Join(dir, fileName+"."+name)
		if !exists(path) && !exists(path+"-wal") {
			return name
		}
		name = fmt.Sprintf("%s-%d", at, n)
	}
}

// install makes the file part, which is durable, the database of dir, and sets
// the one that is there aside under the name that asideName gave. It returns
// the path of that one, empty if there was none. After a power cut at any
// moment the next start finds the old database untouched, or finishes.
func install(dir, part, aside string) (path string, err error) {
	name := filepath.Join(dir, nextName+aside)
	if err := os.Rename(part, name); err != nil {
		return "", err
	}
	if err := syncDir(dir); err != nil {
		return "", err
	}
	return replace(dir)
}

// replace puts a database that is complete (nextName) in the place of the one
// that is there, whose name it has in its own. It may be cut short and repeated:
// the log of the old database must not be met by the new one, so all of the
// old one goes first. The caller has the directory's lock, and the database is
// not open.
func replace(dir string) (aside string, err error) {
	names := siblings(dir, nextName)
	for _, old := range names[:len(names)-1] {
		_ = os.Remove(filepath.Join(dir, old)) // overtaken by the last one
	}
	next := names[len(names)-1]
	path := filepath.Join(dir, fileName)
	suffix := strings.TrimPrefix(next, nextName)
	to := path + "." + suffix
	if strings.HasPrefix(suffix, beforeName) { // what was salvaged is of no interest any more
		if err := removeAll(filepath.Join(dir, stateName)); err != nil {
			return "", err
		}
	}
	if err := removeAll(filepath.Join(dir, DamagedName), path+"-shm"); err != nil {
		return "", err
	}
	for _, part := range []string{"-wal", ""} {
		switch err := os.Rename(path+part, to+part); {
		case err == nil, exists(to + part):
			aside = to
		case !errors.Is(err, fs.ErrNotExist):
			return aside, fmt.Errorf("set the old database aside: %w", err)
		}
	}
	if err := syncDir(dir); err != nil {
		return aside, err
	}
	if err := os.Rename(filepath.Join(dir, next), path); err != nil {
		return aside, fmt.Errorf("put the new database in its place: %w", err)
	}
	return aside, syncDir(dir)
}

// removeAll removes files that may not be there.
func removeAll(paths ...string) error {
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// salvage reads what is left of the database at db.path into a new one and puts
// that in its place. The caller has the directory's lock, and the database is
// not open.
func (db *DB) salvage(ctx context.Context, steps []migration, why string) error {
	began := time.Now()
	dir := filepath.Dir(db.path)
	if err := awaitReadable(ctx, db.path); err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	src, err := openSource(db.path)
	if err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	defer src.Close()
	state := readState(dir)
	part := filepath.Join(dir, buildingName)
	var b *builder
	for _, try := range []struct {
		budget time.Duration
		tidy   bool // delete what was set aside before
	}{{db.cfg.SalvageTime, false}, {db.cfg.SalvageTime, true}, {0, true}} {
		if try.tidy {
			state.Sources = nil
			if err := trimAside(dir, 0); err != nil {
				return fmt.Errorf("salvage: %w", err)
			}
		}
		b, err = build(ctx, src, steps, part, began, try.budget)
		if !isFull(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	name := asideName(dir, corruptName)
	state.Report = b.report
	state.Report.Time, state.Report.Why = began.UTC().Truncate(time.Second), why
	state.Report.Seconds = time.Since(began).Seconds()
	if src.exists {
		state.Report.File = fileName + "." + name
	}
	state.Sources = slices.DeleteFunc(state.Sources, func(s salvageSource) bool {
		path := filepath.Join(dir, s.File)
		return !exists(path) && !exists(path+"-wal")
	})
	if b.more {
		state.Sources = append(state.Sources, salvageSource{File: state.Report.File, Next: b.segments})
	}
	state.Report.Running = len(state.Sources) > 0
	if err := writeState(dir, state); err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	src.Close()
	if _, err := install(dir, part, name); err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	if err := trimAside(dir, keptAside); err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	if !state.Report.Running {
		db.keepIfRoom()
		state = readState(dir)
	}
	logSalvage(db.log, state.Report)
	return nil
}

func logSalvage(log *slog.Logger, r SalvageReport) {
	var kept, lost []any
	for _, t := range r.Tables {
		kept = append(kept, slog.Int(t.Table, t.Kept))
		if t.Lost > 0 || t.Unknown {
			lost = append(lost, slog.String(t.Table, fmt.Sprintf("%d and perhaps more", t.Lost)))
		}
	}
	log.Error("database was damaged, what could be read of it was salvaged", "err", r.Why, "file", r.File, "took", time.Duration(r.Seconds*float64(time.Second)).Round(time.Millisecond),
		"pages_lost", r.Pages, slog.Group("kept", kept...), slog.Group("lost", lost...), "queues_still_read", r.Running)
}

// trimAside keeps the newest n damaged databases.
func trimAside(dir string, n int) error {
	names := siblings(dir, fileName+"."+corruptName)
	for _, name := range names[:max(len(names)-n, 0)] {
		path := filepath.Join(dir, name)
		if err := removeAll(path, path+"-wal", path+"-shm"); err != nil {
			return err
		}
	}
	return nil
}

// keepIfRoom deletes the damaged databases where the disk has not as much room
// again as they take: then room is needed more than they.
func (db *DB) keepIfRoom() {
	dir := filepath.Dir(db.path)
	size := int64(0)
	for _, name := range siblings(dir, fileName+"."+corruptName) {
		for _, part := range []string{"", "-wal"} {
			if info, err := os.Stat(filepath.Join(dir, name+part)); err == nil {
				size += info.Size()
			}
		}
	}
	var room syscall.Statfs_t
	if err := syscall.Statfs(dir, &room); err != nil || size == 0 {
		return
	}
	if int64(room.Bavail)*int64(room.Bsize) >= size {
		return
	}
	if err := trimAside(dir, 0); err != nil {
		db.log.Warn("damaged database not deleted", "err", err)
		return
	}
	db.log.Warn("damaged database deleted, the disk has no room for it", "bytes", size)
	state := readState(dir)
	if state.Report.Why == "" {
		return
	}
	state.Report.File = ""
	if err := writeState(dir, state); err != nil {
		db.log.Warn("salvage report not written", "err", err)
	}
}

// readState returns what the file says, and a zero value if there is none or it
// cannot be read.
func readState(dir string) (s salvageState) {
	b, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil || json.Unmarshal(b, &s) != nil {
		return salvageState{}
	}
	return s
}

// writeState replaces the file atomically.
func writeState(dir string, s salvageState) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, stateName)
	f, err := os.OpenFile(path+".part", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(append(b, '\n')); err == nil {
		err = give(f, dir)
	}
	if err == nil {
		err = place(f, path+".part", path)
	}
	return errors.Join(err, f.Close())
}

// source is a damaged database that is read.
type source struct {
	*walker
	files  []*os.File
	exists bool // there is a file of it, be it only the log
	// roots of tables by the schema, as far as that can be read.
	roots map[string]uint32
}

// openSource opens the database at path and its log, of which either may be
// missing.
func openSource(path string) (*source, error) {
	s := &source{roots: make(map[string]uint32)}
	var sizes [2]int64
	var readers [2]io.ReaderAt
	for i, name := range []string{path, path + "-wal"} {
		readers[i] = strings.NewReader("")
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.files = append(s.files, f)
		info, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.exists = true
		readers[i], sizes[i] = f, info.Size()
	}
	s.walker = newWalker(openPages(readers[0], sizes[0], readers[1], sizes[1]))
	s.readSchema()
	return s, nil
}

// readSchema notes where the tables are.
func (s *source) readSchema() {
	s.tree(1, true, func(c cell) bool {
		rec, _ := s.record(c)
		v := decodeRecord(rec)
		if len(v) < 4 || v[0] != "table" {
			return true
		}
		name, ok1 := v[1].(string)
		root, ok2 := v[3].(int64)
		if ok1 && ok2 && root > 1 && root <= int64(s.count) {
			s.roots[name] = uint32(root)
		}
		return true
	})
}

// Close closes the files. It may be called twice.
func (s *source) Close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	s.files = nil
	return errors.Join(errs...)
}

// guessRoots fills in roots that the schema does not name. usual are those of a
// new database: all databases were new once, and tables do not move, but for a
// restored one. A root is taken if a row of the table is found there, and an
// empty page if others are where they were and none is not.
func (s *source) guessRoots(usual map[string]uint32) {
	var empty []string
	right, wrong := 0, 0
	for _, t := range salvagedTables() {
		if _, ok := s.roots[t.name]; ok {
			continue
		}
		switch s.look(usual[t.name], &t) {
		case lookRight:
			s.roots[t.name] = usual[t.name]
			right++
		case lookEmpty:
			empty = append(empty, t.name)
		case lookWrong:
			wrong++
		}
	}
	if right < 2 || wrong > 0 {
		return
	}
	for _, name := range empty {
		s.roots[name] = usual[name]
	}
}

// What a page looks like that may be a table's root.
const (
	lookDamaged = iota // nobody knows
	lookRight          // there is a row of the table
	lookEmpty          // it may be, without rows
	lookWrong          // it is of something else
)

// look looks at the first row below a page.
func (s *source) look(root uint32, t *salvagedTable) int {
	n := node{page: make([]byte, s.size)}
	for range treeDepth {
		if root <= 1 || root > s.count || !s.read(root, n.page) || !n.parse() {
			return lookDamaged
		}
		if n.table() != t.rowid || s.seen.has(root) {
			return lookWrong
		}
		if n.cells == 0 {
			return lookEmpty
		}
		c, ok := n.cell(0)
		switch {
		case !ok:
			return lookDamaged
		case n.kind == tableInterior:
			root = c.child
			continue
		}
		rec, _ := s.record(c)
		if _, ok := t.row(c, decodeRecord(rec), true); !ok {
			return lookWrong
		}
		return lookRight
	}
	return lookDamaged
}

// rows visits the rows of a table that its b-tree has. It reports how many could
// not be read, and whether others may be missing.
func (s *source) rows(t *salvagedTable, visit func([]any) error) (lost int, unknown bool, pages int, err error) {
	root, ok := s.roots[t.name]
	if !ok {
		return 0, true, 0, nil
	}
	d := s.tree(root, t.rowid, func(c cell) bool {
		rec, whole := s.record(c)
		row, ok := t.row(c, decodeRecord(rec), false)
		if !ok || !whole {
			lost++
		}
		if ok {
			err = visit(row)
		}
		return err == nil
	})
	return lost + d.cells, d.pages > 0, d.pages, err
}

// orphanRows visits the rows of a small table that stand on pages which no b-tree
// reaches.
func (s *source) orphanRows(t *salvagedTable, visit func([]any) error) {
	s.orphans(func(no uint32, n *node) bool {
		if t.rowid != n.table() {
			return true
		}
		for i := range n.cells {
			c, ok := n.cell(i)
			if !ok || !t.width(len(decodeRecord(c.local))) {
				continue
			}
			rec, _ := s.record(c)
			if row, ok := t.row(c, decodeRecord(rec), true); ok && visit(row) != nil {
				return false
			}
		}
		return true
	})
}

// segmentRows visits the segments from the one behind the first skip on, until visit
// returns false. The order is the same each time. Rows that lack their end are
// given as far as they go.
func (s *source) segmentRows(skip int, visit func(StoredSegment) bool) (lost int, unknown bool, pages int) {
	root, known := s.roots[segmentTable]
	at, stopped := 0, false
	var ids []int64
	var d walked
	roots := []uint32{root}
	if old, ok := s.roots[oldSegmentTable]; ok {
		roots = append(roots, old) // a migration was not over
	}
	for _, root := range roots {
		if !known || stopped {
			break
		}
		w := s.tree(root, true, func(c cell) bool {
			ids = append(ids, c.rowid)
			if at++; at <= skip {
				return true
			}
			rec, whole := s.record(c)
			row, ok := segmentRow(c, decodeRecord(rec))
			if !ok || !whole {
				lost++
			}
			if ok {
				stopped = !visit(row)
			}
			return !stopped
		})
		d.cells += w.cells
		d.pages += w.pages
	}
	if stopped || known && !d.damaged() {
		return lost + d.cells, d.pages > 0, d.pages
	}
	slices.Sort(ids)
	s.orphans(func(no uint32, n *node) bool {
		if n.kind != tableLeaf {
			return true
		}
		for i := range n.cells {
			c, ok := n.cell(i)
			if !ok {
				continue
			}
			if _, twice := slices.BinarySearch(ids, c.rowid); twice {
				continue
			}
			rec, _ := s.record(c)
			row, ok := segmentRow(c, decodeRecord(rec))
			if !ok || len(row.contents().pieces) == 0 {
				continue
			}
			if at++; at <= skip {
				continue
			}
			if stopped = !visit(row); stopped {
				return false
			}
		}
		return true
	})
	return lost + d.cells, d.pages > 0 || !known, d.pages
}

// oldSegmentTable is where a migration has put segments without a head, until a
// start has given them one.
const oldSegmentTable = "segment_old"

// segmentRow returns the values of a record as a segment, one without a head with
// the head that it shall have, and false if it is none.
func segmentRow(c cell, values []any) (s StoredSegment, ok bool) {
	if len(values) < 2 || len(values) > 3 || values[0] != nil {
		return s, false
	}
	s.ID = c.rowid
	if s.Body, ok = values[len(values)-1].([]byte); !ok {
		return s, false
	}
	if len(values) == 2 {
		s, _ = s.withHead() // what is behind a tear is lost
		return s, true
	}
	s.Head, ok = values[1].([]byte)
	s.Size = len(s.Head) + len(s.Body)
	return s, ok
}

// builder fills a new database from a damaged one.
type builder struct {
	ctx      context.Context
	src      *source
	pool     *sql.DB
	tx       *sql.Tx
	file     *os.File // the same as pool, to have it synced
	report   SalvageReport
	highest  map[SessionID]uint64 // sequence numbers that segments name
	sessions map[SessionID]bool
	unsynced int
	segments int  // read, in the order of a walk
	more     bool // there are more
}

// build makes a new database of the current schema at path and fills it with what
// can be read of src: all small tables, and as many segments as can be read until
// budget has passed since began. The file is durable when it returns.
func build(ctx context.Context, src *source, steps []migration, path string, began time.Time, budget time.Duration) (_ *builder, err error) {
	if err := removeAll(path, path+"-journal", path+"-wal", path+"-shm"); err != nil {
		return nil, err
	}
	// A walk that was cut short by a full disk has marked pages.
	src.walker = newWalker(src.pageFile)
	b := &builder{ctx: ctx, src: src, highest: make(map[SessionID]uint64), sessions: make(map[SessionID]bool)}
	if b.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	defer func() {
		if b.tx != nil {
			_ = b.tx.Rollback() // the error that counts is the one returned
		}
		if b.pool != nil {
			err = errors.Join(err, b.pool.Close())
		}
		err = errors.Join(err, b.file.Close())
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	if err := give(b.file, filepath.Dir(path)); err != nil {
		return nil, err
	}
	// Nobody reads it before it is complete, so it needs no journal.
	if b.pool, err = openDSN(plainDSN(path, "journal_mode(memory)", "synchronous(off)"), 1); err != nil {
		return nil, err
	}
	if err := migrate(ctx, b.pool, steps, slog.New(slog.DiscardHandler)); err != nil {
		return nil, err
	}
	usual, err := tableRoots(ctx, b.pool)
	if err != nil {
		return nil, err
	}
	src.guessRoots(usual)
	if err := b.smallTables(began.Add(max(budget, time.Second))); err != nil {
		return nil, err
	}
	if err := b.readSegments(began, budget); err != nil {
		return nil, err
	}
	if err := b.raiseCeilings(); err != nil {
		return nil, err
	}
	if err := b.sync(); err != nil {
		return nil, err
	}
	return b, nil
}

// tableRoots returns the first page of each table.
func tableRoots(ctx context.Context, pool *sql.DB) (map[string]uint32, error) {
	rows, err := pool.QueryContext(ctx, `SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	roots := make(map[string]uint32)
	for rows.Next() {
		var name string
		var root uint32
		if err := rows.Scan(&name, &root); err != nil {
			return nil, err
		}
		roots[name] = root
	}
	return roots, rows.Err()
}

// begin opens a transaction if none is open.
func (b *builder) begin() error {
	if b.tx != nil {
		return nil
	}
	var err error
	b.tx, err = b.pool.BeginTx(b.ctx, nil)
	return err
}

// sync commits what was written and has the disk keep it.
func (b *builder) sync() error {
	if b.tx != nil {
		tx := b.tx
		b.tx = nil
		if err := tx.Commit(); err != nil {
			return err
		}
	}
	b.unsynced = 0
	return b.file.Sync()
}

// put inserts a row, unless there is one with its key. It reports whether it did.
// A row that the table does not take is not inserted either.
func (b *builder) put(query string, row []any) (bool, error) {
	if err := b.begin(); err != nil {
		return false, err
	}
	res, err := b.tx.ExecContext(b.ctx, query, row...)
	if isConstraint(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n > 0, err
}

// insert returns the statement that inserts a row of the table.
func (t *salvagedTable) insert() string {
	names := make([]string, len(t.columns))
	for i, c := range t.columns {
		names[i] = c.name
	}
	return "INSERT OR IGNORE INTO " + t.name + " (" + strings.Join(names, ", ") + ") VALUES (?" + strings.Repeat(", ?", len(names)-1) + ")"
}

// smallTables saves all tables but the segments. Where part of a table is missing,
// pages that no b-tree reaches are looked through for its rows, until the deadline.
func (b *builder) smallTables(deadline time.Time) error {
	all := salvagedTables()
	tables := all[:len(all)-1]
	report := make([]SalvagedRows, len(tables))
	lacking := false
	for i := range tables {
		t, r := &tables[i], &report[i]
		query := t.insert()
		lost, unknown, pages, err := b.src.rows(t, func(row []any) error {
			ok, err := b.put(query, row)
			if ok {
				r.Kept++
			}
			return err
		})
		if err != nil {
			return err
		}
		r.Table, r.Lost, r.Unknown = t.name, lost, unknown
		b.report.Pages += pages
		lacking = lacking || unknown || lost > 0
	}
	if lacking {
		if err := b.adoptOrphans(tables, report, deadline); err != nil {
			return err
		}
	}
	// What belongs to a row that is lost would belong to whoever has its key
	// next: another session, another person.
	for i, query := range map[int]string{
		indexOf(tables, "token"):        `DELETE FROM token WHERE operator NOT IN (SELECT name FROM operator)`,
		indexOf(tables, "subscription"): `DELETE FROM subscription WHERE session_id NOT IN (SELECT id FROM session)`,
		indexOf(tables, "inbound"):      `DELETE FROM inbound WHERE session_id NOT IN (SELECT id FROM session)`,
		indexOf(tables, "time_off"):     `DELETE FROM time_off WHERE NOT EXISTS (SELECT 1 FROM clock)`, // stamps begin anew
	} {
		if err := b.begin(); err != nil {
			return err
		}
		res, err := b.tx.ExecContext(b.ctx, query)
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		if err != nil {
			return err
		}
		report[i].Kept -= int(n)
		report[i].Lost += int(n)
	}
	b.report.Tables = report
	if err := b.begin(); err != nil {
		return err
	}
	rows, err := b.tx.QueryContext(b.ctx, `SELECT id FROM session`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id SessionID
		if err := rows.Scan(&id); err != nil {
			return err
		}
		b.sessions[id] = true
	}
	return rows.Err()
}

func indexOf(tables []salvagedTable, name string) int {
	return slices.IndexFunc(tables, func(t salvagedTable) bool { return t.name == name })
}

// adoptOrphans saves rows of tables of which something is missing from pages that
// no b-tree reaches.
func (b *builder) adoptOrphans(tables []salvagedTable, report []SalvagedRows, deadline time.Time) error {
	var failed error
	b.src.orphans(func(no uint32, n *node) bool {
		if no%256 == 0 && time.Now().After(deadline) {
			return false
		}
		for i := range n.cells {
			c, ok := n.cell(i)
			if !ok {
				continue
			}
			width := len(decodeRecord(c.local)) // segments are large, and not looked for here
			for k := range tables {
				t := &tables[k]
				if t.rowid != n.table() || !t.width(width) || !report[k].Unknown && report[k].Lost == 0 {
					continue
				}
				rec, _ := b.src.record(c)
				row, ok := t.row(c, decodeRecord(rec), true)
				if !ok {
					continue
				}
				added, err := b.put(t.insert(), row)
				if err != nil {
					failed = err
					return false
				}
				if added {
					report[k].Kept++
				}
				break
			}
		}
		return true
	})
	return failed
}

// readSegments saves segments until the budget has passed.
func (b *builder) readSegments(began time.Time, budget time.Duration) error {
	tables := salvagedTables()
	query := tables[len(tables)-1].insert()
	var failed error
	r := SalvagedRows{Table: segmentTable}
	lost, unknown, pages := b.src.segmentRows(0, func(row StoredSegment) bool {
		if time.Since(began) >= budget {
			b.more = true
			return false
		}
		b.segments++
		if row = b.mended(row); len(row.Body) == 0 {
			return true
		}
		ok, err := b.put(query, []any{row.ID, row.Head, row.Body})
		if ok {
			r.Kept++
		}
		if b.unsynced += row.Size; err == nil && b.unsynced >= salvageChunk {
			err = b.sync()
		}
		failed = err
		return err == nil
	})
	r.Lost, r.Unknown = lost, unknown
	b.report.Pages += pages
	b.report.Tables = append(b.report.Tables, r)
	return failed
}

// mended returns a segment with the records that can be read, and notes what it
// says of sequence numbers.
func (b *builder) mended(row StoredSegment) StoredSegment {
	c := row.contents()
	if c.torn != nil {
		var whole segmentBuilder
		for _, p := range c.pieces {
			b.report.LostMessages += p.count
		}
		c.rewrite(&whole, func(SessionID, uint64) bool { return true })
		row.Head, row.Body = whole.head(c.created), whole.body
		row.Size = len(row.Head) + len(row.Body)
		c = row.contents()
		for _, p := range c.pieces {
			b.report.LostMessages -= p.count
		}
	}
	for _, p := range c.pieces {
		b.highest[p.session] = max(b.highest[p.session], p.first+uint64(p.count)-1)
		if !b.sessions[p.session] {
			b.report.Unclaimed += p.count
		}
	}
	return row
}

// raiseCeilings has sessions go on well above every sequence number that they may
// have used: their rows may be older than the rest.
func (b *builder) raiseCeilings() error {
	if err := b.begin(); err != nil {
		return err
	}
	const most = 1 << 62 // above it there is only damage
	for id := range b.sessions {
		above := uint64(0)
		if seq, ok := b.highest[id]; ok && seq < most {
			above = seq + 1
		}
		if _, err := b.tx.ExecContext(b.ctx, `UPDATE session SET ceiling = max(min(ceiling, ?1), ?2) + ?3 WHERE id = ?4`,
			int64(most), int64(above), ceilingSkip, int64(id)); err != nil {
			return err
		}
	}
	return nil
}

// salvaged is what a DB knows of the last salvage.
type salvaged struct {
	mu    sync.Mutex
	state salvageState
}

// Salvage returns the report of the last salvage, nil if there was none or if
// the operator has acknowledged it by deleting the file penstock.salvage.
func (db *DB) Salvage() *SalvageReport {
	db.salvaged.mu.Lock()
	defer db.salvaged.mu.Unlock()
	if db.salvaged.state.Report.Why == "" {
		return nil
	}
	if !db.salvaged.state.Report.Running && !exists(filepath.Join(filepath.Dir(db.path), stateName)) {
		db.salvaged.state = salvageState{}
		return nil
	}
	r := db.salvaged.state.Report
	r.Tables = slices.Clone(r.Tables)
	return &r
}

// SalvagedRecord is a message that was found in a database that was set aside,
// with the sessions that have not finished it.
type SalvagedRecord struct {
	Message *Message
	Claims  []SalvagedClaim
}

// SalvagedClaim is a claim on such a message. Its sequence number has no meaning
// any more; the session is one of the present database if its client is the same.
type SalvagedClaim struct {
	ClientID string
	ClaimRecord
}

// Remaining reads the segments for which a salvage had no time before service
// began, one after the other, and has give put them into the queues of today.
// give gets the records of one segment, which may be none that are still wanted,
// and returns when they are durable, or an error to end it here; it is called
// from the goroutine of the caller. The next start goes on behind the last
// segments of which that was noted, so some are given twice after a power cut.
// Remaining returns nil when all is read, at once if nothing is to be read, and
// otherwise the error of ctx, of give or of the disk.
func (db *DB) Remaining(ctx context.Context, give func([]SalvagedRecord) error) error {
	for {
		db.salvaged.mu.Lock()
		sources := db.salvaged.state.Sources
		db.salvaged.mu.Unlock()
		if len(sources) == 0 {
			return nil
		}
		if err := db.remaining(ctx, sources[0], give); err != nil {
			return fmt.Errorf("read on in %s: %w", sources[0].File, err)
		}
		err := db.noteSalvage(func(s *salvageState) {
			s.Sources = s.Sources[1:]
			s.Report.Running = len(s.Sources) > 0
		})
		if err != nil {
			return err
		}
		if len(sources) > 1 {
			continue
		}
		db.keepIfRoom()
		db.salvaged.mu.Lock()
		db.salvaged.state = readState(filepath.Dir(db.path))
		db.salvaged.mu.Unlock()
		return nil
	}
}

// remaining is Remaining for one database.
func (db *DB) remaining(ctx context.Context, from salvageSource, give func([]SalvagedRecord) error) error {
	src, err := openSource(filepath.Join(filepath.Dir(db.path), from.File))
	if err != nil {
		return err
	}
	defer src.Close()
	usual, err := tableRoots(ctx, db.read)
	if err != nil {
		return err
	}
	src.guessRoots(usual)
	// The sessions as they were: those of today have come further, under other
	// sequence numbers. The other tables are walked so that their pages are known.
	sessions := make(map[SessionID]Session)
	noteSession := func(row []any) error {
		progress, err := decodeProgress(row[6].([]byte))
		if err != nil {
			progress = Progress{} // all of it is given, as Load does
		}
		id := SessionID(row[0].(int64))
		if _, twice := sessions[id]; !twice {
			sessions[id] = Session{ID: id, ClientID: row[1].(string), Progress: progress}
		}
		return nil
	}
	lacking := false
	all := salvagedTables()
	for i := range all[:len(all)-1] {
		visit := func([]any) error { return nil }
		if all[i].name == "session" {
			visit = noteSession
		}
		lost, unknown, _, err := src.rows(&all[i], visit)
		if err != nil {
			return err
		}
		lacking = lacking || all[i].name == "session" && (unknown || lost > 0)
	}
	if lacking {
		src.orphanRows(&all[indexOf(all, "session")], noteSession)
	}
	next, noted := from.Next, time.Now()
	var given, unclaimed int
	note := func() error {
		err := db.noteSalvage(func(s *salvageState) {
			s.Sources[0].Next = next
			s.Report.Given += given
			s.Report.Unclaimed += unclaimed
		})
		given, unclaimed, noted = 0, 0, time.Now()
		return err
	}
	src.segmentRows(from.Next, func(row StoredSegment) bool {
		if err = ctx.Err(); err != nil {
			return false
		}
		recs, lost := claimed(row.contents(), sessions)
		if err = give(recs); err != nil {
			return false
		}
		next++
		given, unclaimed = given+len(recs), unclaimed+lost
		if time.Since(noted) >= time.Second {
			err = note()
		}
		return err == nil
	})
	return errors.Join(err, note())
}

// claimed returns the records of a segment with the claims that the sessions have
// not finished, and how many claims are of sessions that are not there.
func claimed(c *Contents, sessions map[SessionID]Session) (recs []SalvagedRecord, unclaimed int) {
	claims := make(map[int][]SalvagedClaim)
	for _, p := range c.pieces {
		s, ok := sessions[p.session]
		if !ok {
			unclaimed += p.count
			continue
		}
		for k := range p.count {
			seq := p.first + uint64(k)
			_, done := slices.BinarySearch(s.Progress.Finished, seq)
			_, had := slices.BinarySearch(s.Progress.Released, seq)
			if seq < s.Progress.Cursor || done || had || p.record+k >= len(c.records) {
				continue
			}
			claims[p.record+k] = append(claims[p.record+k], SalvagedClaim{ClientID: s.ClientID, ClaimRecord: ClaimRecord{
				Session: p.session, Seq: seq, QoS: p.qos, Retain: p.retain, Share: p.share, Identifiers: p.ids,
			}})
		}
	}
	for i, packed := range c.records {
		u := unpacker{buf: packed}
		if m := u.message(); u.err == nil && len(claims[i]) > 0 {
			recs = append(recs, SalvagedRecord{Message: m, Claims: claims[i]})
		}
	}
	return recs, unclaimed
}

// noteSalvage changes what is known of the salvage, and makes it durable.
func (db *DB) noteSalvage(change func(*salvageState)) error {
	db.salvaged.mu.Lock()
	defer db.salvaged.mu.Unlock()
	s := db.salvaged.state
	s.Sources = slices.Clone(s.Sources)
	change(&s)
	if err := writeState(filepath.Dir(db.path), s); err != nil {
		return fmt.Errorf("note how far the salvage is: %w", err)
	}
	db.salvaged.state = s
	return nil
}
