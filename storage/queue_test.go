package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"testing"

	sqlite3 "modernc.org/sqlite/lib"
)

// smallStore is a Store on a disk that has room for a number of segments.
type smallStore struct {
	Store
	room int
	rows map[int64]bool
}

type smallTx struct {
	Tx
	s    *smallStore
	rows map[int64]bool
}

var errFull = errors.New("disk full")

func (s *smallStore) Begin() (Tx, error) {
	tx, err := s.Store.Begin()
	rows := make(map[int64]bool)
	for id := range s.rows {
		rows[id] = true
	}
	return &smallTx{tx, s, rows}, err
}

func (t *smallTx) PutSegment(s StoredSegment) error {
	if t.rows[s.ID] = true; len(t.rows) > t.s.room {
		return errFull
	}
	return t.Tx.PutSegment(s)
}

func (t *smallTx) DeleteSegment(id int64) error {
	delete(t.rows, id)
	return t.Tx.DeleteSegment(id)
}

func (t *smallTx) Commit() error {
	err := t.Tx.Commit()
	if err == nil {
		t.s.rows = t.rows
	}
	return err
}

// On a disk that is full a group that has failed gets the room of what was
// deleted meanwhile: a client that comes back can take its queue, and with that
// everybody else is served again.
func TestFullStoreIsDrained(t *testing.T) {
	_, sqlite := openStore(t)
	store := &smallStore{Store: sqlite, room: 1}
	j := newTestJournal(t, store, testState{})
	publish := func(seq uint64) *testClaim {
		c := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: seq, QoS: 1}}
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{c}})
		return c
	}
	a := publish(1)
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	b := publish(2)
	for range 2 {
		if err := j.Commit(); !errors.Is(err, errFull) {
			t.Fatalf("got %v, want the disk to be full", err)
		}
	}
	a.seg.Release(1, 1)
	if err := j.Commit(); err != nil {
		t.Fatalf("still %v, though the first segment is not needed any more", err)
	}
	if b.seg == nil {
		t.Error("the second delivery was not told that it is durable")
	}
	if got := storedDeliveries(t, store); len(got) != 1 || got[0].Seq != 2 {
		t.Errorf("stored: %+v, want the second delivery", got)
	}
}

// prepareMerge stores a delivery in each of two segments, and has the next
// commit merge them.
func prepareMerge(t *testing.T, j *Journal) (claims []*testClaim) {
	t.Helper()
	j.mergeFrom = 2
	for seq := range uint64(2) {
		c := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: seq, QoS: 1}}
		claims = append(claims, c)
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{c}})
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	return claims
}

func deliveriesOf(c *Contents) (n int) {
	c.Deliveries(1, 0, 100, func(ClaimRecord, *Message) bool { n++; return true })
	return n
}

// A segment that is being merged can be read at any time, also when nobody knows
// whether the merge is on the disk.
func TestReadOfMergeOfUnknownFate(t *testing.T) {
	_, sqlite := openStore(t)
	store := &faultyStore{Store: sqlite}
	j := newTestJournal(t, store, testState{})
	claims := prepareMerge(t, j)
	store.lies = 1
	if err := j.Commit(); err == nil {
		t.Fatal("no error")
	}
	c, err := j.Read(claims[0].seg)
	if err != nil || deliveriesOf(c) != 2 {
		t.Fatalf("read %v, error %v; want the merged segment", c, err)
	}
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	if n := len(storedDeliveries(t, sqlite)); n != 2 {
		t.Errorf("%d deliveries are stored, want 2", n)
	}
}

// gatedStore tells when a segment was looked for and not found.
type gatedStore struct {
	Store
	missed chan int64
}

func (s *gatedStore) Segment(id int64) (*StoredSegment, error) {
	row, err := s.Store.Segment(id)
	if row == nil && err == nil {
		select {
		case s.missed <- id:
		default:
		}
	}
	return row, err
}

// tellingClaim calls a function when it is told that it is durable.
type tellingClaim struct {
	testClaim
	told func()
}

func (c *tellingClaim) Stored(s *Segment) bool { c.told(); return c.testClaim.Stored(s) }

// Between a merge's commit and the moment at which the segments know of it they
// are found all the same.
func TestReadWhileMerging(t *testing.T) {
	_, sqlite := openStore(t)
	store := &gatedStore{sqlite, make(chan int64, 1)}
	j := newTestJournal(t, store, testState{})
	claims := prepareMerge(t, j)
	read := make(chan error)
	told := func() { // the commit is durable, and the merge not yet told of
		go func() {
			c, err := j.Read(claims[1].seg)
			if err == nil && deliveriesOf(c) != 2 {
				err = fmt.Errorf("%d deliveries", deliveriesOf(c))
			}
			read <- err
		}()
		<-store.missed
	}
	late := &tellingClaim{testClaim{ClaimRecord: ClaimRecord{Session: 2, Seq: 1, QoS: 1}}, told}
	j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{late}})
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Errorf("while segments are merged: %v", err)
	}
}

// A segment that is dropped, shrunk and merged by the same group is gone for
// good, and the others are whole.
func TestDropShrinkMergeAtOnce(t *testing.T) {
	for _, lies := range []int{0, 1} {
		t.Run(fmt.Sprintf("%d of unknown fate", lies), func(t *testing.T) {
			_, sqlite := openStore(t)
			store := &faultyStore{Store: sqlite}
			j := newTestJournal(t, store, testState{})
			j.compactFrom = -1
			claims := prepareMerge(t, j)
			third := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: 2, QoS: 1}}
			fourth := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: 3, QoS: 1}}
			j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{third}})
			j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{fourth}})
			store.fails, store.lies = 1, lies // the merge of the first two is under way from here on
			if err := j.Commit(); err == nil {
				t.Fatal("no error")
			}
			claims[0].seg.Release(1, 1) // dropped
			for j.Commit() != nil {
			}
			third.seg.Release(1, 1) // shrunk, and merged with the result of the first merge
			for j.Commit() != nil {
			}
			got := storedDeliveries(t, sqlite)
			seqs := make(map[uint64]bool)
			for _, d := range got {
				seqs[d.Seq] = true
			}
			if !seqs[1] || !seqs[3] {
				t.Errorf("stored: %+v, want 1 and 3 among them", got)
			}
			for _, c := range []*testClaim{claims[1], fourth} {
				c.seg.Release(1, 1)
			}
			for _, any := j.Pending(); any; _, any = j.Pending() {
				_ = j.Commit()
			}
			if s := j.Stats(); s.Segments != 0 || s.SegmentBytes != 0 {
				t.Errorf("%d segments of %d bytes are counted, want none", s.Segments, s.SegmentBytes)
			}
			// What a commit of unknown fate has left is a restart's to find.
			if img, err := sqlite.Load(); err != nil || len(img.Segments) > lies {
				t.Errorf("%d segments are left, error %v", len(img.Segments), err)
			}
		})
	}
}

// oldClaim packs a claim as schema 2 had it.
func oldClaim(buf []byte, c ClaimRecord) []byte {
	flags := c.QoS
	if c.Retain {
		flags |= packedRetain
	}
	if c.Share != "" {
		flags |= packedShared
	}
	buf = append(buf, flags)
	buf = binary.AppendUvarint(buf, uint64(c.Session))
	buf = binary.AppendUvarint(buf, c.Seq)
	if c.Share != "" {
		buf = binary.AppendUvarint(buf, uint64(len(c.Share)))
		buf = append(buf, c.Share...)
	}
	buf = binary.AppendUvarint(buf, uint64(len(c.Identifiers)))
	for _, id := range c.Identifiers {
		buf = binary.AppendUvarint(buf, uint64(id))
	}
	return buf
}

// putOld stores segments as schema 2 had them, and returns what is in them.
func putOld(t *testing.T, db *DB, segments int) (want []storedDelivery) {
	t.Helper()
	for id := range segments {
		var body []byte
		for k := range 5 {
			m := &Message{Topic: "t/ü", Payload: fmt.Appendf(nil, "%d/%d", id, k), QoS: 2, Retain: k == 1}
			if k == 2 {
				m.Properties, m.Expires = []byte{1, 1}, 99
			}
			body = appendMessage(body, m)
			body = binary.AppendUvarint(body, 2)
			for s := range 2 {
				c := ClaimRecord{Session: SessionID(1 + s), Seq: uint64(5*id + k), QoS: byte(1 + k%2), Retain: k == 1}
				if k == 3 {
					c.Share, c.Identifiers = "$share/g/t/#", []uint32{1, 268435455}
				}
				body = oldClaim(body, c)
				want = append(want, storedDelivery{c, *m})
			}
		}
		if _, err := db.write.Exec(`INSERT INTO segment_old (id, body) VALUES (?,?)`, id+1, body); err != nil {
			t.Fatal(err)
		}
	}
	return want
}

// bySession counts each delivery, for the order in which they are found differs.
func bySession(all []storedDelivery) map[string]int {
	found := make(map[string]int)
	for _, d := range all {
		found[fmt.Sprintf("%+v", d)]++
	}
	return found
}

// Segments without a head, as schema 2 had them, get one.
func TestOldSegmentsGetHeads(t *testing.T) {
	db, store := openStore(t)
	want := putOld(t, db, 3*compactBatch+1)
	if got := storedDeliveries(t, store); !reflect.DeepEqual(bySession(got), bySession(want)) {
		t.Errorf("%d deliveries differ from the %d that were stored", len(got), len(want))
	}
	if has, err := store.hasOldSegments(); has || err != nil {
		t.Errorf("the old table is still there, error %v", err)
	}
}

// The conversion may be cut anywhere: what was done stays, and the next start
// goes on.
func TestConversionIsCutShort(t *testing.T) {
	failed := 0
	for n := 1; ; n++ {
		installTape()
		db, store := openStore(t)
		want := putOld(t, db, 2*compactBatch+1)
		if err := store.connect(); err != nil {
			t.Fatal(err)
		}
		failDisk(n, sqlite3.SQLITE_IOERR_WRITE)
		err := store.addHeads()
		if len(stopRecording()) < n {
			break
		}
		if err != nil {
			failed++
		}
		_ = store.disconnect()
		if got := storedDeliveries(t, store); !reflect.DeepEqual(bySession(got), bySession(want)) {
			t.Fatalf("operation %d: %d deliveries differ from the %d that were stored", n, len(got), len(want))
		}
		store.Close()
		db.Close()
	}
	if failed < 4 {
		t.Errorf("%d conversions were cut, want one in each transaction at least", failed)
	}
	t.Logf("%d conversions were cut", failed)
}

// What a damaged head had is nobody's: it is not guessed.
func TestDamagedHeadGivesNothing(t *testing.T) {
	db, store := openStore(t)
	j := newTestJournal(t, store, testState{})
	for seq := range uint64(3) {
		c := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: seq, QoS: 1}}
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{c}})
	}
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	row, err := store.Segment(1)
	if err != nil || row == nil {
		t.Fatalf("got %v, error %v", row, err)
	}
	for i := range row.Head {
		damaged := *row
		damaged.Head = append([]byte(nil), row.Head...)
		damaged.Head[i] ^= 0x10
		if err := damaged.Extents(func(e Extent) { t.Errorf("byte %d: %+v", i, e) }); err == nil {
			t.Errorf("byte %d: no error", i)
		}
	}
	// Of a damaged body, what is not hit is found, and what is hit is missing.
	for i := range row.Body {
		body := append([]byte(nil), row.Body...)
		body[i] ^= 0x10
		if _, err := db.write.Exec(`UPDATE segment SET body=? WHERE id=1`, body); err != nil {
			t.Fatal(err)
		}
		c, err := j.Read(&Segment{journal: j, id: 1})
		if err != nil || c.Torn() == nil || deliveriesOf(c) != 2 {
			t.Errorf("byte %d: %d deliveries of 3, error %v, torn %v; want 2", i, deliveriesOf(c), err, c.Torn())
		}
	}
}
