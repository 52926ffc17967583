package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"penstock/internal/units"
)

// cause is why something is written to the flash.
type cause int

const (
	causeQueue cause = iota
	causeRetained
	causeSession
	causeProgress
	causeSubscription
	causeInbound
	causeWill
	causeClock
	causeCheckpoint
	causeOther       // users, tokens and rules, these counts themselves, what another process writes
	causes           // how many there are
	causeNone  cause = -1
)

// causeNames are in the database, in the API and in metrics.
var causeNames = [causes]string{
	causeQueue:        "queue",
	causeRetained:     "retained",
	causeSession:      "session",
	causeProgress:     "progress",
	causeSubscription: "subscription",
	causeInbound:      "inbound",
	causeWill:         "will",
	causeClock:        "clock",
	causeCheckpoint:   "checkpoint",
	causeOther:        "other",
}

// causeOf says for each statement of the Journal what it writes for. One that is
// not here counts as other.
var causeOf = map[string]cause{
	"BEGIN IMMEDIATE": causeNone,
	"COMMIT":          causeNone,

	putSession:         causeSession,
	deleteSession:      causeSession,
	putCeiling:         causeSession,
	putProgress:        causeProgress,
	putSubscription:    causeSubscription,
	deleteSubscription: causeSubscription,
	deleteSessionSubs:  causeSubscription,
	putInbound:         causeInbound,
	deleteInbound:      causeInbound,
	deleteSessionIn:    causeInbound,
	putSegment:         causeQueue,
	deleteSegment:      causeQueue,
	putRetained:        causeRetained,
	deleteRetained:     causeRetained,
	putWill:            causeWill,
	deleteWill:         causeWill,
	putLeft:            causeSession,
	putWillDue:         causeWill,
	putMark:            causeClock,
	putTimeOff:         causeClock,
	putFlash:           causeOther,
	deleteFlashDay:     causeOther,
}

const (
	putFlash       = `INSERT INTO flash (day, cause, bytes) VALUES (?,?,?) ON CONFLICT DO UPDATE SET bytes=excluded.bytes`
	deleteFlashDay = `DELETE FROM flash WHERE day=?`
)

const (
	// blockBytes is what a file system writes at least, whatever has changed of it.
	blockBytes = 4096
	// flashSaveEvery is how old the counts in the database may be while there
	// are commits.
	flashSaveEvery = time.Minute
	// flashDays is how many days are listed.
	flashDays = 366
	// unknownDay and earlierDays stand in the place of a day.
	unknownDay, earlierDays = 0, -1
	// firstDay is a day on which this was not written yet: a clock that is
	// behind it is wrong.
	firstDay = 20089 // 2025-01-01
)

// flashBytes counts bytes by cause.
type flashBytes [causes]uint64

func (b flashBytes) sum() (n uint64) {
	for _, v := range b {
		n += v
	}
	return n
}

func (b flashBytes) byName() map[string]uint64 {
	m := make(map[string]uint64, causes)
	for c, name := range causeNames {
		m[name] = b[c]
	}
	return m
}

// split shares n bytes out by weight; all of it goes to causeOther if there is none.
func split(n uint64, weights flashBytes) (shares flashBytes) {
	sum := weights.sum()
	if sum == 0 {
		shares[causeOther] = n
		return shares
	}
	most, left := causeQueue, n
	for c, w := range weights {
		shares[c] = uint64(float64(n) * (float64(w) / float64(sum)))
		left -= min(shares[c], left)
		if w > weights[most] {
			most = cause(c)
		}
	}
	shares[most] += left // of rounding
	return shares
}

// flashRow is the count of a day.
type flashRow struct{ now, saved flashBytes }

// FlashStats says what was written to the flash, in bytes, by cause: queue,
// retained, session, progress, subscription, inbound, will, checkpoint and other.
type FlashStats struct {
	Total map[string]uint64 // since the database was made
	Today map[string]uint64 // since midnight UTC; while the clock is plainly wrong since the start, or for a day
	// WeekAverage is bytes a day, over those of the last 7 whole days that lie
	// after the first count; WeekDays is how many that are.
	WeekAverage uint64
	WeekDays    int64
	LogBytes    int64   // size of penstock.db-wal
	Budget      uint64  // bytes a day; 0: there is none
	Stretch     float64 // by how much writes that can wait are put off; 1: not at all
	OverBudget  bool    // more was written today than the budget has
}

// flashMeter counts what is written to the flash by cause and day. It learns it
// from the log's index, which says how many pages SQLite has written: the bytes
// handed to it say little about that. All its methods may be called by any
// goroutine.
type flashMeter struct {
	log    *slog.Logger
	path   string // of the database
	budget uint64 // bytes a day; 0: there is none

	stretch atomic.Int64 // by how much writes that can wait are put off, in thousandths

	mu    sync.Mutex
	index *walIndex // nil before start
	seen  walHeader // what has been counted of the log
	open  bool      // the Journal has a transaction open
	rows  map[int64]*flashRow
	gone  []int64 // days to be deleted
	saved time.Time
	day   int64     // the running one
	began time.Time // the running day, as far as we have seen it, if it is unknownDay
	base  flashBytes
	over  bool // its budget is used up, which was said
	// unsavable means that the database does not take the counts.
	unsavable bool
}

func newFlashMeter(path string, budget units.Bytes, log *slog.Logger) *flashMeter {
	m := &flashMeter{log: log, path: path, budget: uint64(budget), rows: make(map[int64]*flashRow), day: earlierDays}
	m.stretch.Store(1000)
	return m
}

// start begins to count. The database must be open. Before it all methods may be
// called, and nothing is counted; after an error the log's index may be read all
// the same, but the counts are not saved.
func (m *flashMeter) start(ctx context.Context, db *DB) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved = time.Now()
	m.unsavable = true
	if m.index == nil {
		var err error
		if m.index, err = openWALIndex(m.path); err != nil {
			return fmt.Errorf("open index of the write-ahead log: %w", err)
		}
	}
	m.seen, _ = m.index.header()
	if err := m.load(ctx, db); err != nil {
		return wrap(err, "read flash counts")
	}
	m.unsavable = false
	m.turn(m.saved)
	return nil
}

// load reads the counts. m.mu is held.
func (m *flashMeter) load(ctx context.Context, db *DB) error {
	rows, err := db.read.QueryContext(ctx, `SELECT day, cause, bytes FROM flash`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var day, bytes int64
		var name string
		if err := rows.Scan(&day, &name, &bytes); err != nil {
			return err
		}
		if c := slices.Index(causeNames[:], name); c >= 0 {
			r := m.row(day)
			r.now[c], r.saved[c] = uint64(max(bytes, 0)), uint64(max(bytes, 0))
		}
	}
	return rows.Err()
}

// follows reports whether the log's index can be read.
func (m *flashMeter) follows() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index != nil
}

// Close is called after the last connection was closed: see walIndex.
func (m *flashMeter) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.index.Close()
	m.index = nil
	return err
}

// row returns the count of a day. m.mu is held.
func (m *flashMeter) row(day int64) *flashRow {
	r := m.rows[day]
	if r == nil {
		r = &flashRow{}
		m.rows[day] = r
	}
	return r
}

// turn makes the day of now the running one. m.mu is held.
func (m *flashMeter) turn(now time.Time) {
	day := int64(unknownDay)
	if d := now.Unix() / 86400; d >= firstDay {
		day = d
	}
	if day == m.day && (day != unknownDay || now.Sub(m.began) < 24*time.Hour) {
		return
	}
	m.day, m.began, m.over = day, now, false
	m.base = flashBytes{}
	if day == unknownDay {
		m.base = m.row(day).now
	}
	// Days that are no longer listed are kept as a sum.
	for len(m.rows) > flashDays+2 {
		oldest := day
		for d := range m.rows {
			if d > unknownDay && d < oldest {
				oldest = d
			}
		}
		if oldest == day {
			break
		}
		for c, n := range m.rows[oldest].now {
			m.row(earlierDays).now[c] += n
		}
		delete(m.rows, oldest)
		m.gone = append(m.gone, oldest)
	}
}

// today returns what was written in the running day. m.mu is held.
func (m *flashMeter) today() flashBytes {
	b := m.row(m.day).now
	for c := range b {
		b[c] -= m.base[c]
	}
	return b
}

// add counts what was written now. m.mu is held.
func (m *flashMeter) add(bytes flashBytes) {
	now := time.Now()
	m.turn(now)
	r := m.row(m.day)
	for c, n := range bytes {
		r.now[c] += n
	}
	if m.budget == 0 {
		return
	}
	used := m.today().sum()
	m.stretch.Store(int64(1000 * stretch(used, m.budget, m.ofDay(now))))
	if used > m.budget && !m.over {
		m.over = true
		m.log.Warn("flash budget of the day is used up, writes that can wait are put off", "budget_bytes", m.budget, "written_bytes", used)
	}
}

// logged counts what has come into the log since the last call, and returns the
// log's header. weights says what for. m.mu is held.
func (m *flashMeter) logged(weights flashBytes) walHeader {
	h, ok := m.index.header()
	if !ok {
		return m.seen
	}
	again, from := h.salt != m.seen.salt, int64(0)
	if !again {
		from = m.seen.end(m.seen.frames)
	}
	if h.frames == 0 || !again && h.frames <= m.seen.frames {
		return h
	}
	m.seen = h
	blocks := (h.end(h.frames)+blockBytes-1)/blockBytes - from/blockBytes
	if again {
		blocks++ // the log's header is synced before anything is behind it
	}
	m.add(split(uint64(blocks*blockBytes), weights))
	return h
}

// others counts what has come into the log by anybody but the Journal. m.mu is
// held.
func (m *flashMeter) others() {
	if !m.open {
		m.logged(flashBytes{})
	}
}

// begun is called when the Journal has begun a transaction: what was written
// before was somebody else's, and until its end all is the Journal's.
func (m *flashMeter) begun() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open = false
	m.others()
	m.open = true
}

// ended is called when the transaction is durable, or given up; weights says what
// it was for. It returns the header of the log.
func (m *flashMeter) ended(weights flashBytes) walHeader {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open = false
	return m.logged(weights)
}

// header returns the header of the log; ok is false if it cannot be read.
func (m *flashMeter) header() (h walHeader, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index.header()
}

// databaseFile returns the database as it is open for this; nil if it is not.
func (m *flashMeter) databaseFile() *os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.index == nil {
		return nil
	}
	return m.index.database
}

// syncDatabase has the kernel write what it has of the database file.
func (m *flashMeter) syncDatabase() error {
	m.mu.Lock()
	index := m.index
	m.mu.Unlock()
	return index.sync()
}

// moveAgain has the next checkpoint move all of the log: see walIndex.
func (m *flashMeter) moveAgain() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index.moveAgain()
}

// checkpoint does a checkpoint and counts the pages that it moves: each once, in
// however many frames of the log it is.
func (m *flashMeter) checkpoint(do func() error) error {
	m.mu.Lock()
	m.others()
	before, _ := m.index.header()
	pages := m.index.pages(before.backfilled, before.frames)
	m.mu.Unlock()

	err := do()

	m.mu.Lock()
	defer m.mu.Unlock()
	after, ok := m.index.header()
	if !ok {
		return err
	}
	if after.salt == before.salt {
		if after.backfilled <= before.backfilled {
			return err
		}
		pages = m.index.pages(before.backfilled, after.backfilled)
	} // else the log has begun anew: all of it was moved
	distinct := make(map[uint32]struct{}, len(pages))
	for _, n := range pages {
		distinct[n] = struct{}{}
	}
	var bytes flashBytes
	bytes[causeCheckpoint] = uint64(len(distinct)) * uint64(max(before.pageSize, blockBytes))
	m.add(bytes)
	return err
}

// unsaved returns what the database does not know yet, by day, and the days to
// be deleted there. Where force is not set, it is nothing until the last save is
// a minute ago.
func (m *flashMeter) unsaved(force bool) (rows map[int64]flashBytes, gone []int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.index == nil || m.unsavable || !force && time.Since(m.saved) < flashSaveEvery {
		return nil, nil
	}
	for day, r := range m.rows {
		if r.now != r.saved {
			if rows == nil {
				rows = make(map[int64]flashBytes)
			}
			rows[day] = r.now
		}
	}
	return rows, m.gone
}

// save writes what unsaved returns with exec, in values and not in differences:
// a transaction of unknown fate is written again. The caller calls stored when
// it is durable.
func (m *flashMeter) save(rows map[int64]flashBytes, gone []int64, exec func(query string, args ...any) error) error {
	for day, bytes := range rows {
		for c, n := range bytes {
			if n == 0 {
				continue
			}
			if err := exec(putFlash, day, causeNames[c], int64(n)); err != nil {
				return err
			}
		}
	}
	for _, day := range gone {
		if err := exec(deleteFlashDay, day); err != nil {
			return err
		}
	}
	return nil
}

// stored notes what is durable.
func (m *flashMeter) stored(rows map[int64]flashBytes, gone []int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved = time.Now()
	for day, bytes := range rows {
		if r := m.rows[day]; r != nil {
			r.saved = bytes
		}
	}
	m.gone = m.gone[len(gone):]
}

// notSaved notes that the counts could not be written. No acknowledgement must
// wait for them: the transaction is tried again without, and with them not before
// a minute; or not at all, if it was not for want of room or for the disk.
func (m *flashMeter) notSaved(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved = time.Now()
	var se *sqlite.Error
	if errors.As(err, &se) {
		switch se.Code() & 0xFF {
		case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL:
			return
		}
	}
	m.unsavable = true
	m.log.Error("what is written to the flash is not counted", "err", err)
}

// Flash returns what was written to the flash. Before the database has a Journal
// nothing is counted.
func (db *DB) Flash() FlashStats {
	m := db.flash
	m.mu.Lock()
	defer m.mu.Unlock()
	m.others()
	m.turn(time.Now())
	s := FlashStats{Today: m.today().byName(), Budget: m.budget, Stretch: float64(m.stretch.Load()) / 1000, OverBudget: m.over}
	if info, err := os.Stat(m.path + "-wal"); err == nil && m.index != nil {
		s.LogBytes = info.Size()
	}
	var total flashBytes
	first := m.day
	var week uint64
	for day, r := range m.rows {
		for c, n := range r.now {
			total[c] += n
		}
		if day > unknownDay {
			first = min(first, day)
			if day < m.day && day >= m.day-7 {
				week += r.now.sum()
			}
		}
	}
	s.Total = total.byName()
	if s.WeekDays = min(m.day-first, 7); s.WeekDays > 0 {
		s.WeekAverage = week / uint64(s.WeekDays)
	}
	return s
}

// flashTx is what the transaction that is open writes, and for what.
type flashTx struct {
	weights flashBytes
	rows    map[int64]flashBytes // counts that are saved along with it
	gone    []int64
	force   bool // they are, however new those in the database
}

// note notes a statement. A cause writes at least the page that its row is in,
// and so counts with that and with what it hands over.
func (t *flashTx) note(query string, args []any) {
	c, ok := causeOf[query]
	if !ok {
		c = causeOther
	}
	if c == causeNone {
		return
	}
	if t.weights[c] == 0 {
		t.weights[c] = blockBytes
	}
	for _, a := range args {
		switch a := a.(type) {
		case []byte:
			t.weights[c] += uint64(len(a))
		case string:
			t.weights[c] += uint64(len(a))
		default:
			t.weights[c] += 4
		}
	}
}

// begun is called when a transaction has begun: what was written before was
// somebody else's.
func (s *sqliteStore) begun() {
	s.flash = flashTx{}
	s.db.flash.begun()
}

// committing is called before a transaction is committed. The counts are saved
// along with it now and then.
func (s *sqliteStore) committing() error {
	t := &s.flash
	t.rows, t.gone = s.db.flash.unsaved(t.force)
	err := s.db.flash.save(t.rows, t.gone, s.exec)
	if err != nil {
		s.db.flash.notSaved(err)
	}
	return err
}

// committed is called when a transaction is durable.
func (s *sqliteStore) committed() {
	h := s.db.flash.ended(s.flash.weights)
	if len(s.flash.rows)+len(s.flash.gone) > 0 {
		s.db.flash.stored(s.flash.rows, s.flash.gone)
	}
	s.checkpoints.committed(h)
}

// saveFlash saves the counts in a transaction of their own, before the end. They
// miss what it writes itself, and what SQLite moves when it is closed after it.
// If it fails, the counts of the last minute are lost, and nothing else.
func (s *sqliteStore) saveFlash() {
	if rows, gone := s.db.flash.unsaved(true); len(rows)+len(gone) == 0 {
		return
	}
	tx, err := s.Begin()
	if err != nil {
		return
	}
	s.flash.force = true
	_ = tx.Commit() // closes the connection if it fails
}
