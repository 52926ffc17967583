package storage

import (
	"fmt"
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
// turn, once, in each way that a disk fails. The group is tried again, and at
// the end everything is there, everybody was told, and nobody before it was.
func TestFaultAtEachOperation(t *testing.T) {
	const groups, each = 5, 3
	work := func(t *testing.T, failAt int, with int32) (operations, failures int) {
		installTape()
		db, store := openCounted(t, func(c *Config) { c.WALPages = 4 })
		j := newTestJournal(t, store, testState{})
		j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: 1, ClientID: "c"}) }, nil)
		failDisk(failAt, with)
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
				if failures++; try > 2 {
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
		operations = len(stopRecording())
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
	operations, _ := work(t, 0, 0)
	if operations < 20 {
		t.Fatalf("%d operations were noted", operations)
	}
	step, failed := 1, 0
	if testing.Short() {
		step = 10
	}
	for name, code := range map[string]int32{
		"EIO on write": sqlite3.SQLITE_IOERR_WRITE, "EIO on fsync": sqlite3.SQLITE_IOERR_FSYNC, "disk full": sqlite3.SQLITE_FULL,
	} {
		for n := 1; n <= operations; n += step {
			t.Run(fmt.Sprintf("%s/operation %d", name, n), func(t *testing.T) {
				_, failures := work(t, n, code)
				failed += failures
			})
		}
	}
	if failed < operations/step { // those of a checkpoint cost nobody anything
		t.Errorf("%d commits failed for three times %d faults", failed, operations/step)
	}
	t.Logf("%d operations, %d commits that failed", operations, failed)
}
