package storage

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// A file that lost a part of its last page is not taken for whole, also where
// that is a page which no start reads: one in the middle of a segment.
func TestPartOfPageLost(t *testing.T) {
	dir := t.TempDir()
	db, j, _ := reopen(t, dir)
	j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: 1, ClientID: "a"}) }, nil)
	for seq, size := range []int{10, 200_000, 10} { // a start looks at the first and the last
		j.Publish(&Publication{Message: &Message{Topic: "t", Payload: make([]byte, size), QoS: 1}, Claims: []Claim{
			&testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: uint64(seq), QoS: 1}},
		}})
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(j.Close(), db.Close()); err != nil {
		t.Fatal(err)
	}
	f := readImage(t, dir)
	if len(f.wal) > 0 {
		t.Fatal("something is in the log")
	}
	dir = t.TempDir()
	imageFiles{main: f.main[:len(f.main)-100]}.write(t, dir)
	if db, _, _ = reopen(t, dir); db.Salvage() == nil {
		t.Error("it was not noticed")
	}
}

// A version of the schema that is damaged keeps no start from serving, and has no
// migration run a second time: all is there, whatever it says.
func TestDamagedVersion(t *testing.T) {
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	f := makeImage(t, rand.New(rand.NewPCG(13, 13)), false)
	dir := t.TempDir()
	f.write(t, dir)
	_, _, want := reopen(t, dir)
	for version := range len(steps) {
		main := append([]byte(nil), f.main...)
		binary.BigEndian.PutUint32(main[60:], uint32(version))
		dir := t.TempDir()
		imageFiles{main: main}.write(t, dir)
		db, _, got := reopen(t, dir)
		if db.Salvage() == nil {
			t.Errorf("version %d: it was not noticed", version)
		}
		if lacking := missing(got, want, f); len(lacking) > 0 {
			t.Errorf("version %d: %d rows are lost, the first is %s", version, len(lacking), lacking[0])
		}
	}
}
