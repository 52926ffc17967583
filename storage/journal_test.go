package storage

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"runtime"
	"slices"
	"testing"
)

// testState is a State without sessions and retained messages.
type testState struct{ progress map[SessionID]Progress }

func (s testState) Progress(id SessionID) (Progress, bool) { p, ok := s.progress[id]; return p, ok }
func (s testState) ProgressStored(SessionID)               {}
func (s testState) Wants(*Segment, SessionID, uint64) bool { return true }
func (s testState) Merged(SessionID)                       {}
func (s testState) Now() int64                             { return 1 }
func (s testState) Retained(string) *Message               { return nil }
func (s testState) Flush()                                 {}

// testClaim is a Claim that tells what became of it.
type testClaim struct {
	ClaimRecord
	acked bool
	seg   *Segment
}

func (c *testClaim) Record() (ClaimRecord, bool) { return c.ClaimRecord, !c.acked }
func (c *testClaim) Stored(s *Segment) bool      { c.seg = s; return true }

// storedDelivery is a delivery as a segment has it.
type storedDelivery struct {
	ClaimRecord
	Message
}

// storedDeliveries reads all deliveries of all segments.
func storedDeliveries(t *testing.T, store Store) (all []storedDelivery) {
	t.Helper()
	img, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	for _, head := range img.Segments {
		row, err := store.Segment(head.ID)
		if err != nil || row == nil {
			t.Fatalf("segment %d: %v, error %v", head.ID, row, err)
		}
		c := row.contents()
		err = errors.Join(c.torn, head.Extents(func(e Extent) {
			n := 0
			c.Deliveries(e.Session, e.First, e.First+uint64(e.Count), func(r ClaimRecord, m *Message) bool {
				all = append(all, storedDelivery{r, *m})
				n++
				return true
			})
			if n != e.Count {
				t.Errorf("segment %d has %d of %+v", head.ID, n, e)
			}
		}))
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// openStore opens a database, and a Store on it.
func openStore(t *testing.T) (*DB, *sqliteStore) {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Dir = t.TempDir()
	db, err := Open(context.Background(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &sqliteStore{db: db, torn: slog.New(slog.DiscardHandler).Error, lock: lock}
	t.Cleanup(func() { s.Close() })
	return db, s
}

func newTestJournal(t *testing.T, store Store, state State) *Journal {
	t.Helper()
	j := NewJournal(store, DefaultConfig(), slog.New(slog.DiscardHandler))
	if _, _, err := j.Load(); err != nil {
		t.Fatal(err)
	}
	j.Attach(state)
	return j
}

// Everything that the Journal writes comes back from SQLite as it was.
func TestStoreRoundTrip(t *testing.T) {
	_, store := openStore(t)
	tx, err := store.Begin()
	if err != nil {
		t.Fatal(err)
	}
	m := &Message{Topic: "a/ü", Payload: []byte{}, Properties: []byte{1, 1}, Expires: 1 << 41, QoS: 2, Retain: true}
	want := &Image{
		Sessions: []Session{{ID: 7, ClientID: "c", Expiry: NeverExpires, Protocol: 5, Created: 3, Ceiling: 16384,
			Progress: Progress{Cursor: 1 << 40, Finished: []uint64{1<<40 + 2, 1<<40 + 9}, Released: []uint64{1<<40 + 3}}, Left: 1 << 45}},
		Subscriptions: []Subscription{{Session: 7, Filter: "$share/g/a/#", Options: 0x2E, Identifier: 268435455}},
		Inbound:       []Inbound{{Session: 7, PacketID: 65535}},
		Wills:         []Will{{ClientID: "c", Delay: 9, Due: 1<<45 + 1, Message: m}},
		Retained:      []*Message{m},
		Segments:      []StoredSegment{{ID: 4, Head: []byte{4, 5}, Body: []byte{1, 2, 3}}},
		Mark:          &Mark{Stamp: 2 << 44, Wall: 3, True: 4, OwedFrom: 5, Guessed: true, Boot: "b", Uptime: 6, Stopped: true},
		TimeOff:       []TimeOff{{Era: 1, MS: 8}, {Era: 2, MS: 9}},
	}
	s := want.Sessions[0]
	for _, err := range []error{
		tx.PutSession(Session{ID: 7, ClientID: "c", Created: 3, Ceiling: 5}), tx.PutSession(s), tx.PutProgress(7, s.Progress),
		tx.PutCeiling(7, 16384), tx.PutCeiling(7, 1), // a ceiling never goes down
		tx.PutSubscription(want.Subscriptions[0]), tx.PutSubscription(Subscription{Session: 7, Filter: "b"}), tx.DeleteSubscription(7, "b"),
		tx.PutInbound(want.Inbound[0]), tx.PutInbound(want.Inbound[0]), tx.PutInbound(Inbound{7, 1}), tx.DeleteInbound(Inbound{7, 1}),
		tx.PutSegment(want.Segments[0]), tx.PutSegment(StoredSegment{ID: 5, Body: []byte{}}), tx.DeleteSegment(5),
		tx.PutRetained(&Message{Topic: "a/ü"}), tx.PutRetained(m), tx.PutRetained(&Message{Topic: "b"}), tx.DeleteRetained("b"),
		tx.PutWill(Will{ClientID: "c", Due: 1, Message: m}), tx.PutWill(want.Wills[0]),
		tx.PutWill(Will{ClientID: "d", Message: m}), tx.DeleteWill("d"), tx.PutWillDue("d", 1),
		tx.PutLeft(7, 1), tx.PutSession(s), tx.PutLeft(9, 1),
		tx.PutMark(Mark{Stamp: 1}), tx.PutTimeOff(want.TimeOff[1]), tx.PutTimeOff(TimeOff{Era: 1, MS: 7}), tx.PutTimeOff(want.TimeOff[0]),
		tx.PutSession(Session{ID: 8, ClientID: "e"}), tx.PutSubscription(Subscription{Session: 8, Filter: "x"}),
		tx.PutInbound(Inbound{8, 2}), tx.DeleteSession(8), // takes all that is its own along
		tx.PutMark(*want.Mark), // last: what comes behind one that says stopped voids it
		tx.Commit(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	got, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	if row, err := store.Segment(4); err != nil || row == nil || !bytes.Equal(row.Body, want.Segments[0].Body) || row.Size != 5 {
		t.Errorf("segment %+v, error %v", row, err)
	}
	want.Segments[0].Body, want.Segments[0].Size = nil, 5
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestSegmentRoundTrip(t *testing.T) {
	_, store := openStore(t)
	j := newTestJournal(t, store, testState{})
	var want []storedDelivery
	for i := range 3000 { // more than one segment
		m := &Message{Topic: "t", Payload: fmt.Appendf(make([]byte, 200), "%d", i), QoS: 1}
		if i%7 == 0 {
			m.Properties, m.Expires = []byte{1, 1}, int64(i)
		}
		p := &Publication{Message: m}
		for s := range i % 3 {
			c := ClaimRecord{Session: SessionID(1000*s + 1), Seq: uint64(i), QoS: 1, Retain: i%2 == 0}
			if i%5 == 0 {
				c.Identifiers = []uint32{1, 268435455}
			}
			if i%11 == 0 {
				c.Share = "$share/g/t"
			}
			p.Claims = append(p.Claims, &testClaim{ClaimRecord: c})
			want = append(want, storedDelivery{c, *m})
		}
		j.Publish(p)
	}
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	if n := j.Stats().Segments; n < 2 {
		t.Errorf("%d segments, want them bounded in size", n)
	}
	got := storedDeliveries(t, store)
	for _, l := range [][]storedDelivery{got, want} {
		slices.SortFunc(l, func(a, b storedDelivery) int {
			return cmp.Or(cmp.Compare(a.Session, b.Session), cmp.Compare(a.Seq, b.Seq))
		})
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%d deliveries differ from the %d that were stored", len(got), len(want))
	}
}

// What many sessions get alike takes next to nothing for each of them.
func TestFanOutIsStoredOnce(t *testing.T) {
	_, store := openStore(t)
	j := newTestJournal(t, store, testState{})
	const messages, sessions = 100, 1000
	for i := range messages {
		p := &Publication{Message: &Message{Topic: "t", Payload: make([]byte, 100), QoS: 1}}
		for s := range sessions {
			p.Claims = append(p.Claims, &testClaim{ClaimRecord: ClaimRecord{Session: SessionID(s + 1), Seq: uint64(i + s), QoS: 1}})
		}
		j.Publish(p)
	}
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	if n := j.Stats().BytesWritten; n > messages*110+sessions*12 {
		t.Errorf("%d bytes were written", n)
	}
	if n := len(storedDeliveries(t, store)); n != messages*sessions {
		t.Errorf("%d deliveries, want %d", n, messages*sessions)
	}
}

// A group whose commit may or may not have happened is tried again until it
// succeeds, whatever of it is there already.
func TestGroupAfterCommitOfUnknownFate(t *testing.T) {
	_, sqlite := openStore(t)
	store := &faultyStore{Store: sqlite, lies: 1}
	state := testState{progress: map[SessionID]Progress{2: {Cursor: 5}}}
	j := newTestJournal(t, store, state)
	put := func(id SessionID) {
		j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: id, ClientID: "a"}) }, nil)
	}
	told := 0
	put(1)
	j.Change(func(tx Tx) error { return tx.DeleteSession(1) }, nil) // Clean Start of the same client, in the same group
	put(2)
	c := &testClaim{ClaimRecord: ClaimRecord{Session: 2, Seq: 1, QoS: 1}}
	j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{c}})
	j.Change(func(Tx) error { return nil }, WaiterFunc(func() { told++ }))
	if err := j.Commit(); err == nil || told != 0 {
		t.Fatalf("first try: error %v, %d told; want an error, and nobody told", err, told)
	}
	if s := j.Stats(); s.Failing == "" || s.Failures != 1 {
		t.Errorf("stats after the failure: %+v", s)
	}
	if _, any := j.Pending(); !any {
		t.Error("nothing is pending, though a group has failed")
	}
	c.acked = true // elided now, though its record is on disk
	if err := j.Commit(); err != nil || told != 1 {
		t.Fatalf("second try: error %v, %d told; want none, and 1", err, told)
	}
	if s := j.Stats(); s.Failing != "" {
		t.Errorf("still failing: %s", s.Failing)
	}
	img, err := sqlite.Load()
	if err != nil || len(img.Sessions) != 1 || img.Sessions[0].ID != 2 || img.Sessions[0].Progress.Cursor != 5 {
		t.Errorf("sessions %+v, error %v; want session 2 with its progress, which makes the elided record void", img.Sessions, err)
	}
}

// faultyStore is a Store whose commits fail, or succeed and say that they failed.
type faultyStore struct {
	Store
	lies, fails int
}

type faultyTx struct {
	Tx
	s *faultyStore
}

var errFault = errors.New("fault put in")

func (s *faultyStore) Begin() (Tx, error) {
	tx, err := s.Store.Begin()
	return &faultyTx{tx, s}, err
}

func (t *faultyTx) Commit() error {
	if t.s.fails > 0 {
		t.s.fails--
		return errors.Join(errFault, t.Rollback())
	}
	err := t.Tx.Commit()
	if err == nil && t.s.lies > 0 {
		t.s.lies--
		return errFault
	}
	return err
}

// What everybody has acknowledged does not pile up while commits fail.
func TestPendingIsPruned(t *testing.T) {
	_, sqlite := openStore(t)
	j := newTestJournal(t, &faultyStore{Store: sqlite, fails: 1 << 30}, testState{})
	var kept []*testClaim
	for i := range 10 * pruneMin.operations {
		c := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: uint64(i), QoS: 1}, acked: i%100 > 0}
		if !c.acked {
			kept = append(kept, c)
		}
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{c}})
	}
	if n, _ := j.Pending(); n < len(kept) || n > 2*pruneMin.operations {
		t.Errorf("%d operations are pending, want the %d that are needed and few more", n, len(kept))
	}
	j.store.(*faultyStore).fails = 0
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	last, n := -1, 0
	for _, d := range storedDeliveries(t, sqlite) {
		n++
		if seq := int(d.Seq); seq <= last {
			t.Errorf("delivery %d after %d", seq, last)
		} else {
			last = seq
		}
	}
	if n != len(kept) {
		t.Errorf("%d records stored, want %d", n, len(kept))
	}
}

// A segment goes when the last claim on it is released, and an elided group
// writes nothing.
func TestSegmentsGoAndElidedGroupsWriteNothing(t *testing.T) {
	_, store := openStore(t)
	j := newTestJournal(t, store, testState{})
	a := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: 1, QoS: 1}}
	b := &testClaim{ClaimRecord: ClaimRecord{Session: 2, Seq: 1, QoS: 1}}
	j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{a, b}})
	count := func() int {
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
		img, err := store.Load()
		if err != nil {
			t.Fatal(err)
		}
		return len(img.Segments)
	}
	if n := count(); n != 1 {
		t.Fatalf("%d segments, want 1", n)
	}
	a.seg.Release(1, 0)
	if n := count(); n != 1 {
		t.Errorf("%d segments while one claim is left, want 1", n)
	}
	b.seg.Release(1, 0)
	if n := count(); n != 0 {
		t.Errorf("%d segments when nobody needs them, want 0", n)
	}
	commits := j.Stats().Commits
	j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1}, Claims: []Claim{&testClaim{acked: true}}})
	if count(); j.Stats().Commits != commits || j.Stats().Elided != 1 {
		t.Errorf("%d transactions, %d elided; want none, 1", j.Stats().Commits-commits, j.Stats().Elided)
	}
}

// Damaged bytes are an error, never a panic or a huge allocation.
func FuzzSegment(f *testing.F) {
	m := &Message{Topic: "a/b", Payload: []byte("x"), Properties: []byte{1, 0}, Expires: 5, QoS: 1}
	var b segmentBuilder
	for i := range 3 {
		b.message(m)
		b.claim(ClaimRecord{Session: 1, Seq: uint64(2 + i), QoS: 1, Identifiers: []uint32{3}, Share: "g"}, m.Size())
		b.claim(ClaimRecord{Session: 2, Seq: 7, QoS: 2}, m.Size())
	}
	f.Add(slices.Clone(b.head(5)), b.body)
	f.Add([]byte{}, []byte{})
	f.Add([]byte{headFormat, 2, 1, 1, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 7, 0}, b.body) // a count of two thousand million
	f.Fuzz(func(t *testing.T, head, body []byte) {
		s := StoredSegment{Head: head, Body: body, Size: len(head) + len(body)}
		c := s.contents()
		n := 0
		_ = s.Extents(func(e Extent) {
			if e.Count > s.Size {
				t.Errorf("%d deliveries of %d bytes", e.Count, s.Size)
			}
			c.Deliveries(e.Session, e.First, e.First+uint64(e.Count), func(ClaimRecord, *Message) bool { n++; return n < 10000 })
		})
		var b segmentBuilder
		c.rewrite(&b, func(_ SessionID, seq uint64) bool { return seq%3 > 0 })
		if b.records > len(body) {
			t.Errorf("%d records of %d bytes", b.records, len(body))
		}
		_ = decodeOld(body, func(oldRecord) {})
		_, _ = decodeProgress(body)
	})
}

// While commits fail, payloads that need not be written do not pile up: neither
// those of retained messages, of which the last counts, nor large ones that
// everybody has acknowledged.
func TestPayloadsDoNotPileUp(t *testing.T) {
	_, sqlite := openStore(t)
	j := newTestJournal(t, &faultyStore{Store: sqlite, fails: 1 << 30}, testState{})
	for range 200 {
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1, Payload: make([]byte, 1<<20)}, Retain: true})
		j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1, Payload: make([]byte, 1<<20)}, Claims: []Claim{&testClaim{acked: true}}})
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 64<<20 {
		t.Errorf("%d MiB of the heap are in use", m.HeapAlloc>>20)
	}
	runtime.KeepAlive(j)
}

// pinState is a State for which some deliveries are done.
type pinState struct {
	testState
	done map[uint64]bool
}

func (s pinState) Wants(_ *Segment, _ SessionID, seq uint64) bool { return !s.done[seq] }

// A segment is written anew when little of it is needed, from a certain size on.
func TestCompaction(t *testing.T) {
	for name, tt := range map[string]struct {
		payload int
		smaller bool
	}{
		"large": {1000, true},
		"small": {10, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, store := openStore(t)
			j := newTestJournal(t, store, pinState{done: map[uint64]bool{}})
			j.compactFrom = 16 << 10
			claims := make([]*testClaim, 100)
			for i := range claims {
				claims[i] = &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: uint64(i), QoS: 1}}
				j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1, Payload: make([]byte, tt.payload)}, Claims: []Claim{claims[i]}})
			}
			sizes := func() (sizes []int, seqs []uint64) {
				t.Helper()
				if err := j.Commit(); err != nil {
					t.Fatal(err)
				}
				img, err := store.Load()
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range img.Segments {
					sizes = append(sizes, s.Size)
				}
				for _, d := range storedDeliveries(t, store) {
					seqs = append(seqs, d.Seq)
				}
				return sizes, seqs
			}
			before, _ := sizes()
			for i, c := range claims {
				if i != 7 && i != 70 {
					j.state.(pinState).done[uint64(i)] = true
					c.seg.Release(1, 1+tt.payload)
				}
			}
			after, seqs := sizes()
			if smaller := after[0] < before[0]/20; len(after) != 1 || smaller != tt.smaller {
				t.Errorf("segments of %v bytes became %v", before, after)
			}
			if tt.smaller && !slices.Equal(seqs, []uint64{7, 70}) {
				t.Errorf("left are %v, want 7 and 70", seqs)
			}
			claims[7].seg.Release(1, 1+tt.payload)
			claims[70].seg.Release(1, 1+tt.payload)
			if after, _ := sizes(); len(after) != 0 {
				t.Errorf("segments of %v bytes are left", after)
			}
		})
	}
}

// A torn record costs itself, and not the start.
func TestLoadSkipsTornRecords(t *testing.T) {
	db, store := openStore(t)
	tx, err := store.Begin()
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		tx.PutSession(Session{ID: 1, ClientID: "torn", Progress: Progress{Cursor: 7}}), tx.PutSession(Session{ID: 2, ClientID: "whole"}),
		tx.PutRetained(&Message{Topic: "torn", Payload: []byte("x")}), tx.PutRetained(&Message{Topic: "whole", Payload: []byte("x")}),
		tx.PutWill(Will{ClientID: "torn", Message: &Message{Topic: "t"}}), tx.PutWill(Will{ClientID: "whole", Message: &Message{Topic: "t"}}),
		tx.Commit())
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{
		"UPDATE session SET progress=x'ff' WHERE id=1", "UPDATE retained SET message=x'03ff' WHERE topic='torn'", "UPDATE will SET message=x'' WHERE client_id='torn'",
	} {
		if _, err := db.write.Exec(query); err != nil {
			t.Fatal(err)
		}
	}
	img, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Sessions) != 2 || img.Sessions[0].Progress.Cursor != 0 {
		t.Errorf("sessions: %+v, want both, the first from its beginning", img.Sessions)
	}
	if len(img.Retained) != 1 || img.Retained[0].Topic != "whole" || len(img.Wills) != 1 || img.Wills[0].ClientID != "whole" {
		t.Errorf("retained %v, wills %v, want only what is whole", img.Retained, img.Wills)
	}
}
