package storage

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
)

// sqliteStore is the Journal's Store on penstock.db, through a connection of
// its own with the statements prepared. It is used by one goroutine at a time.
type sqliteStore struct {
	db    *DB
	torn  func(what string, keys ...any) // told of records that cannot be read, as slog's Error is
	pool  *sql.DB
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
	lock  *os.File

	flash       flashTx
	checkpoints *checkpoints // nil in some tests
}

// NewJournal returns the Journal of the database. It takes the lock of the
// data directory, which its Close gives back, and returns ErrInUse when another
// process has it. Close leaves db open.
func (db *DB) NewJournal(log *slog.Logger) (*Journal, error) {
	lock, err := lockDir(filepath.Dir(db.path))
	if err != nil {
		return nil, err
	}
	db.space.look()
	s := &sqliteStore{db: db, torn: log.Error, lock: lock}
	s.watch()
	j := NewJournal(s, db.cfg, log)
	j.flash = db.flash
	return j, nil
}

// watch has what is written counted, and the log moved.
func (s *sqliteStore) watch() {
	if err := s.db.flash.start(context.Background(), s.db); err != nil {
		s.torn("what is written to the flash is not counted", "err", err)
	}
	s.checkpoints = newCheckpoints(s.db, s.db.log)
	s.checkpoints.start()
}

// The statements of the Journal. They are prepared once per connection, which
// halves their cost. What a session adds after its end is not written: its id
// may be given to another one after a restart.
const (
	putSession         = `INSERT INTO session (id, client_id, expiry_s, protocol, created_ms, ceiling, progress, left_at) VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET expiry_s=excluded.expiry_s, protocol=excluded.protocol, left_at=excluded.left_at ON CONFLICT (client_id) DO UPDATE SET id=excluded.id, expiry_s=excluded.expiry_s, protocol=excluded.protocol, left_at=excluded.left_at, created_ms=excluded.created_ms, ceiling=excluded.ceiling, progress=excluded.progress`
	deleteSession      = `DELETE FROM session WHERE id=?`
	deleteSessionSubs  = `DELETE FROM subscription WHERE session_id=?`
	deleteSessionIn    = `DELETE FROM inbound WHERE session_id=?`
	putSubscription    = `INSERT INTO subscription (session_id, filter, options, identifier) SELECT ?1,?2,?3,?4 WHERE EXISTS (SELECT 1 FROM session WHERE id=?1) ON CONFLICT DO UPDATE SET options=excluded.options, identifier=excluded.identifier`
	deleteSubscription = `DELETE FROM subscription WHERE session_id=? AND filter=?`
	putProgress        = `UPDATE session SET progress=? WHERE id=?`
	putCeiling         = `UPDATE session SET ceiling=max(ceiling,?) WHERE id=?`
	putInbound         = `INSERT INTO inbound (session_id, packet_id) SELECT ?1,?2 WHERE EXISTS (SELECT 1 FROM session WHERE id=?1) ON CONFLICT DO NOTHING`
	deleteInbound      = `DELETE FROM inbound WHERE session_id=? AND packet_id=?`
	putSegment         = `INSERT INTO segment (id, head, body) VALUES (?,?,?) ON CONFLICT DO UPDATE SET head=excluded.head, body=excluded.body`
	getSegment         = `SELECT head, body FROM segment WHERE id=?`
	deleteSegment      = `DELETE FROM segment WHERE id=?`
	putRetained        = `INSERT INTO retained (topic, message) VALUES (?,?) ON CONFLICT DO UPDATE SET message=excluded.message`
	deleteRetained     = `DELETE FROM retained WHERE topic=?`
	putWill            = `INSERT INTO will (client_id, delay_s, message, due_at) VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET delay_s=excluded.delay_s, message=excluded.message, due_at=excluded.due_at`
	deleteWill         = `DELETE FROM will WHERE client_id=?`
)

// connect opens the store's connection if it has none.
func (s *sqliteStore) connect() error {
	if s.conn != nil {
		return nil
	}
	pool, err := s.db.openPool(1)
	if err != nil {
		return fmt.Errorf("open journal connection: %w", err)
	}
	conn, err := pool.Conn(context.Background())
	if err != nil {
		_ = pool.Close() // the error that counts is the one above
		return s.suspect(fmt.Errorf("open journal connection: %w", err))
	}
	s.pool, s.conn, s.stmts = pool, conn, make(map[string]*sql.Stmt)
	if s.checkpoints != nil && !s.db.flash.follows() {
		// Nobody would know when to move the log: SQLite does it in COMMIT.
		_, err = conn.ExecContext(context.Background(), "PRAGMA wal_autocheckpoint=1000")
	}
	return err
}

// Close closes the store's connection and gives the directory's lock back.
func (s *sqliteStore) Close() error {
	err := s.checkpoints.close()
	s.checkpoints = nil
	s.saveFlash()
	return errors.Join(err, s.disconnect(), s.lock.Close())
}

// disconnect closes the connection; the next transaction opens a new one.
func (s *sqliteStore) disconnect() error {
	if s.conn == nil {
		return nil
	}
	var errs []error
	for _, st := range s.stmts {
		errs = append(errs, st.Close())
	}
	errs = append(errs, s.conn.Close(), s.pool.Close())
	s.pool, s.conn, s.stmts = nil, nil, nil
	return errors.Join(errs...)
}

// statement returns the prepared statement of a query.
func (s *sqliteStore) statement(query string) (*sql.Stmt, error) {
	st := s.stmts[query]
	if st == nil {
		var err error
		if st, err = s.conn.PrepareContext(context.Background(), query); err != nil {
			return nil, s.suspect(fmt.Errorf("prepare %.24s: %w", query, err))
		}
		s.stmts[query] = st
	}
	return st, nil
}

func (s *sqliteStore) exec(query string, args ...any) error {
	st, err := s.statement(query)
	if err != nil {
		return err
	}
	s.flash.note(query, args)
	if _, err := st.Exec(args...); err != nil {
		return s.suspect(fmt.Errorf("%.24s: %w", query, err))
	}
	return nil
}

// suspect is DB.suspect, for a store that may have no DB.
func (s *sqliteStore) suspect(err error) error {
	if s.db == nil {
		return err
	}
	return s.db.suspect(err)
}

// Begin implements Store.
func (s *sqliteStore) Begin() (Tx, error) {
	if err := s.connect(); err != nil {
		return nil, err
	}
	s.checkpoints.between()
	tx := &sqliteTx{s}
	if err := s.exec("BEGIN IMMEDIATE"); err != nil {
		_ = tx.Rollback() // closes the connection; the error that counts is the one above
		return nil, err
	}
	s.begun()
	return tx, nil
}

type sqliteTx struct{ *sqliteStore }

// PutSession implements Tx. A row of the same client with another id is of a
// session that ended: a group that is tried again after a commit of unknown
// fate may find what comes later in it there already.
func (t *sqliteTx) PutSession(s Session) error {
	return t.exec(putSession, int64(s.ID), s.ClientID, int64(s.Expiry), int64(s.Protocol), s.Created, int64(s.Ceiling), appendProgress(nil, s.Progress), s.Left)
}

func (t *sqliteTx) DeleteSession(id SessionID) error {
	for _, q := range []string{deleteSession, deleteSessionSubs, deleteSessionIn} {
		if err := t.exec(q, int64(id)); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqliteTx) PutSubscription(s Subscription) error {
	return t.exec(putSubscription, int64(s.Session), s.Filter, int64(s.Options), int64(s.Identifier))
}

func (t *sqliteTx) DeleteSubscription(id SessionID, filter string) error {
	return t.exec(deleteSubscription, int64(id), filter)
}

func (t *sqliteTx) PutProgress(id SessionID, p Progress) error {
	return t.exec(putProgress, appendProgress(nil, p), int64(id))
}

func (t *sqliteTx) PutCeiling(id SessionID, ceiling uint64) error {
	return t.exec(putCeiling, int64(ceiling), int64(id))
}

func (t *sqliteTx) PutInbound(in Inbound) error {
	return t.exec(putInbound, int64(in.Session), int64(in.PacketID))
}

func (t *sqliteTx) DeleteInbound(in Inbound) error {
	return t.exec(deleteInbound, int64(in.Session), int64(in.PacketID))
}

func (t *sqliteTx) PutSegment(s StoredSegment) error {
	return t.exec(putSegment, s.ID, blob(s.Head), blob(s.Body))
}

func (t *sqliteTx) Segment(id int64) (*StoredSegment, error) {
	st, err := t.statement(getSegment)
	if err != nil {
		return nil, err
	}
	row, err := scanSegment(id, st.QueryRow(id))
	return row, t.suspect(err)
}

// Segment implements Store. It reads beside the transaction that runs.
func (s *sqliteStore) Segment(id int64) (*StoredSegment, error) {
	row, err := scanSegment(id, s.db.read.QueryRow(getSegment, id))
	return row, s.db.suspectSegment(id, err)
}

func scanSegment(id int64, row *sql.Row) (*StoredSegment, error) {
	seg := StoredSegment{ID: id}
	err := row.Scan(&seg.Head, &seg.Body)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read segment %d: %w", id, err)
	}
	seg.Size = len(seg.Head) + len(seg.Body)
	return &seg, nil
}

func (t *sqliteTx) DeleteSegment(id int64) error { return t.exec(deleteSegment, id) }

func (t *sqliteTx) PutRetained(m *Message) error {
	return t.exec(putRetained, m.Topic, appendMessage(nil, m))
}

func (t *sqliteTx) DeleteRetained(topic string) error { return t.exec(deleteRetained, topic) }

func (t *sqliteTx) PutWill(w Will) error {
	return t.exec(putWill, w.ClientID, int64(w.Delay), appendMessage(nil, w.Message), w.Due)
}

func (t *sqliteTx) DeleteWill(clientID string) error { return t.exec(deleteWill, clientID) }

func (t *sqliteTx) Commit() error {
	err := t.committing()
	if err == nil {
		err = t.exec("COMMIT")
	}
	if err != nil {
		_ = t.Rollback() // closes the connection; the error that counts is the one above
		t.checkpoints.commitFailed()
		return err
	}
	t.db.space.look()
	t.committed()
	return nil
}

// Rollback gives the connection up: after a failed transaction its state is
// not to be trusted, and closing it rolls back.
func (t *sqliteTx) Rollback() error {
	t.db.flash.ended(t.flash.weights)
	return t.disconnect()
}

// Load implements Store. A record that is torn costs itself, and not the start. A
// database that cannot be read is salvaged, which closes db and opens it anew:
// nobody else may be using it yet.
func (s *sqliteStore) Load() (*Image, error) {
	img, err := s.load()
	if err == nil || !isUnreadable(err) {
		return img, err
	}
	watched := s.checkpoints != nil
	_ = s.checkpoints.close() // of what is damaged nothing more is moved
	s.checkpoints = nil
	if err := errors.Join(s.disconnect(), s.db.mendOpen(context.Background(), err)); err != nil {
		return nil, err
	}
	if watched {
		s.watch()
	}
	return s.load()
}

// load is Load of a database that can be read.
func (s *sqliteStore) load() (*Image, error) {
	if err := s.connect(); err != nil {
		return nil, err
	}
	if err := s.addHeads(); err != nil {
		return nil, err
	}
	img, err := s.loadRows(math.MaxInt)
	if err != nil {
		return nil, err
	}
	err = s.each(`SELECT id, head, length(head)+length(body) FROM segment ORDER BY id`, func(r *sql.Rows) error {
		v := StoredSegment{}
		err := r.Scan(&v.ID, &v.Head, &v.Size)
		img.Segments = append(img.Segments, v)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load segments: %w", err)
	}
	return img, nil
}

// loadRows reads all but the segments, of a database of a schema.
func (s *sqliteStore) loadRows(schema int) (*Image, error) {
	img := &Image{}
	left, due := "left_at", "due_at"
	if schema < 5 { // a backup that an older version has made
		left, due = "0", "0"
	} else if err := s.loadClock(img); err != nil {
		return nil, err
	}
	var blob []byte
	var err error
	err = s.each(`SELECT id, client_id, expiry_s, protocol, created_ms, ceiling, progress, `+left+` FROM session ORDER BY id`, func(r *sql.Rows) error {
		var v Session
		if err := r.Scan(&v.ID, &v.ClientID, &v.Expiry, &v.Protocol, &v.Created, &v.Ceiling, &blob, &v.Left); err != nil {
			return err
		}
		if v.Progress, err = decodeProgress(blob); err != nil {
			s.torn("session's progress is damaged, all that is stored for it is sent again", "err", err, "client", v.ClientID)
		}
		img.Sessions = append(img.Sessions, v)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load sessions: %w", err)
	}
	err = s.each(`SELECT session_id, filter, options, identifier FROM subscription`, func(r *sql.Rows) error {
		var v Subscription
		err := r.Scan(&v.Session, &v.Filter, &v.Options, &v.Identifier)
		img.Subscriptions = append(img.Subscriptions, v)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load subscriptions: %w", err)
	}
	err = s.each(`SELECT session_id, packet_id FROM inbound`, func(r *sql.Rows) error {
		var v Inbound
		err := r.Scan(&v.Session, &v.PacketID)
		img.Inbound = append(img.Inbound, v)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load inbound identifiers: %w", err)
	}
	err = s.each(`SELECT client_id, delay_s, message, `+due+` FROM will`, func(r *sql.Rows) error {
		v := Will{}
		var body []byte
		if err := r.Scan(&v.ClientID, &v.Delay, &body, &v.Due); err != nil {
			return err
		}
		u := unpacker{buf: body}
		if v.Message = u.message(); u.err != nil {
			s.torn("will is damaged and left out", "err", u.err, "client", v.ClientID)
			return nil
		}
		img.Wills = append(img.Wills, v)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load wills: %w", err)
	}
	var raw sql.RawBytes
	err = s.each(`SELECT topic, message FROM retained`, func(r *sql.Rows) error {
		var topic string
		if err := r.Scan(&topic, &raw); err != nil {
			return err
		}
		u := unpacker{buf: append([]byte(nil), raw...)}
		m := u.message()
		if u.err != nil || m.Topic != topic {
			s.torn("retained message is damaged and left out", "err", cmp.Or(u.err, errTorn), "topic", topic)
			return nil
		}
		img.Retained = append(img.Retained, m)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load retained messages: %w", err)
	}
	return img, nil
}

// each calls visit for every row of a query.
func (s *sqliteStore) each(query string, visit func(*sql.Rows) error) error {
	rows, err := s.conn.QueryContext(context.Background(), query)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := visit(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
