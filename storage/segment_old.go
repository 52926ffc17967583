package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Up to schema 2 a segment had no head: each record was a message and the claims
// on it. A start gives such segments their heads, see sqliteStore.addHeads.

// oldRecord is one message of such a segment with the sessions it is for.
type oldRecord struct {
	message *Message
	claims  []ClaimRecord
}

func (u *unpacker) claim() ClaimRecord {
	flags := u.byte()
	c := ClaimRecord{QoS: flags & packedQoS, Retain: flags&packedRetain != 0}
	c.Session = SessionID(u.uvarint())
	c.Seq = u.uvarint()
	if flags&packedShared != 0 {
		c.Share = string(u.bytes())
	}
	for range u.count() {
		c.Identifiers = append(c.Identifiers, uint32(u.uvarint()))
	}
	return c
}

// decodeOld calls visit for every record, in the order in which they were
// stored. Messages share the body's memory. It returns an error when the body is
// torn; records before the tear were visited.
func decodeOld(body []byte, visit func(oldRecord)) error {
	u := unpacker{buf: body}
	for len(u.buf) > 0 {
		r := oldRecord{message: u.message()}
		n := u.count()
		r.claims = make([]ClaimRecord, 0, n)
		for range n {
			r.claims = append(r.claims, u.claim())
		}
		if u.err != nil {
			return fmt.Errorf("decode segment: %w", u.err)
		}
		visit(r)
	}
	return nil
}

const (
	oldSegments   = `SELECT id FROM segment_old ORDER BY id`
	getOldSegment = `SELECT x'', body FROM segment_old WHERE id=?`
)

// hasOldSegments reports whether there may be segments that an older version has
// left.
func (s *sqliteStore) hasOldSegments() (has bool, err error) {
	err = s.each(`SELECT 1 FROM sqlite_schema WHERE name='segment_old'`, func(*sql.Rows) error {
		has = true
		return nil
	})
	return has, err
}

// addHeads gives heads to the segments that an older version has left, and
// moves them to where they are looked for. A cut in the middle leaves the rest
// to the next start.
func (s *sqliteStore) addHeads() error {
	has, err := s.hasOldSegments()
	if err != nil || !has {
		return err
	}
	var ids []int64
	err = s.each(oldSegments, func(r *sql.Rows) error {
		var id int64
		err := r.Scan(&id)
		ids = append(ids, id)
		return err
	})
	if err != nil {
		return fmt.Errorf("find segments without a head: %w", err)
	}
	for {
		n := min(len(ids), compactBatch)
		tx, err := s.Begin()
		if err != nil {
			return err
		}
		for _, id := range ids[:n] {
			if err == nil {
				err = s.addHead(tx, id)
			}
		}
		if ids = ids[n:]; len(ids) == 0 && err == nil {
			err = s.exec(`DROP TABLE segment_old`)
		}
		if err != nil {
			_ = tx.Rollback() // the error that counts is the one above
			return fmt.Errorf("give segments their heads: %w", err)
		}
		if err := tx.Commit(); err != nil || len(ids) == 0 {
			return err
		}
	}
}

func (s *sqliteStore) addHead(tx Tx, id int64) error {
	row, err := scanSegment(id, s.conn.QueryRowContext(context.Background(), getOldSegment, id))
	if err != nil || row == nil {
		return err
	}
	c, err := row.withHead()
	if err != nil {
		s.torn("segment is damaged, what could be read of it is kept", "err", err, "segment", id)
	}
	return errors.Join(tx.PutSegment(c), s.exec(`DELETE FROM segment_old WHERE id=?`, id))
}

// withHead returns the segment with a head, made of a body of old.
func (s StoredSegment) withHead() (StoredSegment, error) {
	var b segmentBuilder
	err := decodeOld(s.Body, func(r oldRecord) {
		if !validTopic(r.message.Topic) || len(r.claims) == 0 {
			return // zeros, where something else was
		}
		b.message(r.message)
		for _, c := range r.claims {
			b.claim(c, r.message.Size())
		}
	})
	s.Head, s.Body = b.head(0), b.body
	s.Size = len(s.Head) + len(s.Body)
	return s, err
}

// validTopic reports whether a topic name can be one of ours.
func validTopic(topic string) bool {
	return topic != "" && utf8.ValidString(topic) && !strings.ContainsAny(topic, "+#\x00")
}
