package storage

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// A file that lost a part of its last page is not taken for whole, whichever table
// has that page.
func TestPartOfPageLost(t *testing.T) {
	f := makeImage(t, rand.New(rand.NewPCG(14, 14)), false)
	dir := t.TempDir()
	imageFiles{main: f.main[:len(f.main)-100]}.write(t, dir)
	if db, _, _ := reopen(t, dir); db.Salvage() == nil {
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
