package storage

import (
	"errors"
	"testing"
)

// A binary that knows nothing of marks, and writes anything after a stop in
// order, voids what that stop has said.
func TestOlderBinaryVoidsTheMark(t *testing.T) {
	mark := Mark{Stamp: 1000, Wall: 2000, True: 2000, Boot: "b", Uptime: 3, Stopped: true}
	older := map[string]string{
		"session, new":  `INSERT INTO session (id, client_id, expiry_s, protocol, created_ms, ceiling, progress) VALUES (2, 'd', 1, 4, 1, 1, x'00')`,
		"session":       `UPDATE session SET ceiling = max(ceiling, 5)`,
		"segment":       `INSERT INTO segment (id, head, body) VALUES (1, x'', x'00')`,
		"will":          `INSERT INTO will (client_id, delay_s, message) VALUES ('c', 1, x'00')`,
		"retained, new": `INSERT INTO retained (topic, message) VALUES ('t', x'00')`,
		"retained":      `INSERT INTO retained (topic, message) VALUES ('r', x'00') ON CONFLICT DO UPDATE SET message = excluded.message`,
	}
	for what, statement := range older {
		for _, stopped := range []bool{true, false} {
			db, store := openStore(t)
			tx, err := store.Begin()
			if err != nil {
				t.Fatal(err)
			}
			mark.Stopped = stopped
			for _, err := range []error{
				tx.PutSession(Session{ID: 1, ClientID: "c"}), tx.PutRetained(&Message{Topic: "r"}),
				tx.PutLeft(1, 500), tx.PutMark(mark), tx.Commit(),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			if _, err := db.write.ExecContext(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
			want := mark
			if stopped {
				want = Mark{Stamp: 1000, Uptime: 3}
			}
			img := &Image{}
			if err := store.loadClock(img); err != nil || *img.Mark != want {
				t.Errorf("%s after a mark that says stopped %v: got %+v, %v, want %+v", what, stopped, *img.Mark, err, want)
			}
		}
	}
}

// What is stored of who is away can be changed by itself, and is taken back by
// the row that a client which comes back writes.
func TestAwayIsStoredAndTakenBack(t *testing.T) {
	_, store := openStore(t)
	session, will := Session{ID: 1, ClientID: "c"}, Will{ClientID: "c", Message: &Message{Topic: "t"}}
	for i, step := range []struct {
		do   func(Tx) []error
		want int64
	}{
		{func(tx Tx) []error { return []error{tx.PutSession(session), tx.PutWill(will)} }, 0},
		{func(tx Tx) []error { return []error{tx.PutLeft(1, 7), tx.PutWillDue("c", 7)} }, 7},
		{func(tx Tx) []error { return []error{tx.PutSession(session), tx.PutWill(will)} }, 0},
	} {
		tx, err := store.Begin()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(append(step.do(tx), tx.Commit())...); err != nil {
			t.Fatal(err)
		}
		img, err := store.Load()
		if err != nil {
			t.Fatal(err)
		}
		if s, w := img.Sessions[0].Left, img.Wills[0].Due; s != step.want || w != step.want {
			t.Errorf("step %d: the session left at %d, the will is due at %d, want %d", i, s, w, step.want)
		}
	}
}
