package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	sqlite3 "modernc.org/sqlite/lib"
)

// toldClaim is a claim that notes how often it was told that it is durable.
type toldClaim struct {
	ClaimRecord
	told int
}

func (c *toldClaim) Record() (ClaimRecord, bool) { return c.ClaimRecord, true }
func (c *toldClaim) Stored(*Segment) bool        { c.told++; return true }

// TestFaultAtEachOperation has each operation of a fixed piece of work fail in
// turn, once, in each way that a disk fails, and the next files that are opened
// in some. The group is tried again, and at the end everything is there,
// everybody was told, and nobody before it was. After an fsync that failed, what
// it was for is not on the disk, and another fsync does not bring it there.
func TestFaultAtEachOperation(t *testing.T) {
	const groups, each = 5, 3
	var syncs = map[string]int{} // that failed, by file
	work := func(t *testing.T, failAt int, with int32, closed int) (operations, failures int) {
		installTape()
		db, store := openCounted(t, func(c *Config) { c.WALPages = 4 })
		j := newTestJournal(t, store, testState{})
		j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: 1, ClientID: "c"}) }, nil)
		disk := newDisk()
		for _, name := range []string{db.path, db.path + "-wal"} {
			disk.files[name] = fileOf(t, name)
		}
		failDisk(failAt, with)
		tape.closed = closed
		var claims []*toldClaim
		for range groups {
			for range each {
				c := &toldClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: uint64(len(claims)), QoS: 1}}
				claims = append(claims, c)
				j.Publish(&Publication{Message: &Message{Topic: "t", QoS: 1, Payload: make([]byte, 2000)}, Claims: []Claim{c}})
			}
			for try := 0; ; try++ {
				err := j.Commit()
				if err == nil {
					break
				}
				if failures++; try > 2+closed {
					t.Fatalf("does not recover: %v", err)
				}
				for _, c := range claims[len(claims)-each:] {
					if c.told > 0 {
						t.Fatalf("told that it is durable, after %v", err)
					}
				}
			}
			moveLog(store.checkpoints)
			for i, c := range claims {
				if c.told != 1 {
					t.Fatalf("delivery %d: told %d times, want once", i, c.told)
				}
			}
		}
		ops := stopRecording()
		operations = len(ops)
		for _, op := range ops {
			if disk.do(op); op.kind == 'l' {
				syncs[filepath.Base(op.path)]++
			}
		}
		// As a cut at this moment leaves it: with what was synced.
		cut := t.TempDir()
		for name, b := range disk.files {
			if err := os.WriteFile(filepath.Join(cut, filepath.Base(name)), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if r, err := Verify(t.Context(), filepath.Join(cut, fileName)); err != nil || r.Messages < groups*each {
			t.Fatalf("after a cut %d deliveries are stored, want %d: %v", r.Messages, groups*each, err)
		}
		// As the next start finds it, without this one's end.
		r, err := Verify(t.Context(), db.path)
		if err != nil {
			t.Fatal(err)
		}
		if r.Messages < groups*each { // a group of unknown fate may be there twice
			t.Fatalf("%d deliveries are stored, want %d", r.Messages, groups*each)
		}
		return operations, failures
	}
	operations, _ := work(t, 0, 0, 0)
	if operations < 20 {
		t.Fatalf("%d operations were noted", operations)
	}
	step, failed := 1, 0
	if testing.Short() {
		step = 10
	}
	for _, fault := range []struct {
		name   string
		code   int32
		closed int
	}{
		{"EIO on write", sqlite3.SQLITE_IOERR_WRITE, 0}, {"EIO on fsync", sqlite3.SQLITE_IOERR_FSYNC, 0}, {"disk full", sqlite3.SQLITE_FULL, 0},
		{"EIO, and not opened again", sqlite3.SQLITE_IOERR_FSYNC, 1}, {"EIO, and twice not opened again", sqlite3.SQLITE_IOERR_FSYNC, 2},
	} {
		for n := 1; n <= operations; n += step {
			t.Run(fmt.Sprintf("%s/operation %d", fault.name, n), func(t *testing.T) {
				_, failures := work(t, n, fault.code, fault.closed)
				failed += failures
			})
		}
	}
	if step == 1 && (syncs[fileName] == 0 || syncs[fileName+"-wal"] == 0) {
		t.Errorf("syncs that failed: %v, want those of commits and of checkpoints", syncs)
	}
	if failed < operations/step { // those of a checkpoint cost nobody anything
		t.Errorf("%d commits failed for five times %d faults", failed, operations/step)
	}
	t.Logf("%d operations, %d commits that failed, syncs that failed: %v", operations, failed, syncs)
}

func fileOf(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return b
}
