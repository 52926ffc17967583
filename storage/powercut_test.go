package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// lifetime is from when on a delivery must survive a power cut and until when,
// as numbers of disk operations.
type lifetime struct{ from, to int }

// cutState is the State of a session whose deliveries below the cursor are done.
type cutState struct {
	cursor   uint64
	retained map[string]*Message
}

func (s *cutState) Progress(SessionID) (Progress, bool) { return Progress{Cursor: s.cursor}, true }
func (s *cutState) ProgressStored(SessionID)            {}
func (s *cutState) Merged(SessionID)                    {}
func (s *cutState) Now() int64                          { return 1 }
func (s *cutState) Wants(_ *Segment, _ SessionID, seq uint64) bool {
	return seq >= s.cursor
}
func (s *cutState) Retained(topic string) *Message { return s.retained[topic] }
func (s *cutState) Flush()                         {}

// promises is what the journal has said is durable, and when.
type promises struct {
	deliveries []lifetime // by sequence number
	retained   []int      // numbers of disk operations at which "n", the retained message's payload, was durable
	inbound    []lifetime // by packet identifier, less one
}

// workload has the journal commit what a busy broker would, over a recorded
// disk, and returns what was done to the disk and what was promised.
func workload(t *testing.T, seed uint64, commits int, pragmas ...string) (ops []diskOp, p promises) {
	t.Helper()
	recordDisk()
	// Small logs, so that a run has many checkpoints.
	_, store := openCounted(t, func(c *Config) { c.WALPages = 16 })
	store.checkpoints.mu.Lock()
	if err := errors.Join(store.connect(), store.checkpoints.connect()); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []*sql.Conn{store.conn, store.checkpoints.conn} {
		for _, q := range pragmas {
			if _, err := conn.ExecContext(t.Context(), q); err != nil {
				t.Fatal(err)
			}
		}
	}
	store.checkpoints.mu.Unlock()
	rng := rand.New(rand.NewPCG(seed, 2))
	state := &cutState{retained: map[string]*Message{}}
	j := newTestJournal(t, store, state)
	j.compactFrom = 4 << 10
	j.mergeFrom = 8
	j.Change(func(tx Tx) error { return tx.PutSession(Session{ID: 1, ClientID: "c", Expiry: NeverExpires}) }, nil)
	during := false
	hold(func(kind byte, path string) {
		if during && kind == 'w' && strings.HasSuffix(path, fileName) {
			during = false
			j.MarkProgress(1, nil)
			if err := j.Commit(); err != nil {
				t.Error(err)
			}
		}
	})
	defer hold(nil)
	const never = 1 << 30
	var claims []*testClaim
	for range commits {
		firstDelivery, firstInbound, retained := len(p.deliveries), len(p.inbound), false
		for range 1 + rng.IntN(8) {
			m := &Message{Topic: "t", Payload: make([]byte, 1+rng.IntN(3000)), QoS: 1}
			c := &testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: uint64(len(p.deliveries)), QoS: 1}}
			claims = append(claims, c)
			p.deliveries = append(p.deliveries, lifetime{never, never})
			pub := &Publication{Message: m, Claims: []Claim{c}}
			if rng.IntN(4) == 0 {
				p.inbound = append(p.inbound, lifetime{never, never})
				pub.Inbound = Inbound{Session: 1, PacketID: uint16(len(p.inbound))}
			}
			if rng.IntN(6) == 0 {
				retained = true
				pub.Retain = true
				state.retained["t"] = &Message{Topic: "t", Payload: fmt.Append(nil, len(p.retained)), Retain: true}
			}
			j.Publish(pub)
		}
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
		now := recorded()
		// A checkpoint comes now, or is late, and then a commit does it; and a
		// commit comes while the log is moved.
		if rng.IntN(4) > 0 {
			during = rng.IntN(2) == 0
			moveLog(store.checkpoints)
			during = false
		}
		for i := firstDelivery; i < len(p.deliveries); i++ {
			p.deliveries[i].from = now
		}
		for i := firstInbound; i < len(p.inbound); i++ {
			p.inbound[i].from = now
		}
		if retained {
			p.retained = append(p.retained, now)
		}
		// The client acknowledges, mostly.
		for rng.IntN(8) > 0 && int(state.cursor) < len(claims) {
			c := claims[state.cursor]
			p.deliveries[state.cursor].to = now
			state.cursor++
			c.seg.Release(1, 1000)
		}
		j.MarkProgress(1, nil)
		if n := len(p.inbound); n > 0 && p.inbound[n-1].to == never && rng.IntN(2) == 0 {
			p.inbound[n-1].to = now
			row := Inbound{Session: 1, PacketID: uint16(n)}
			j.Change(func(tx Tx) error { return tx.DeleteInbound(row) }, nil)
		}
	}
	return stopRecording(), p
}

// survives starts on the files and returns what is missing of what was promised
// before the disk operation number cut.
func (p promises) survives(t *testing.T, files map[string][]byte, cut int) error {
	t.Helper()
	dir := t.TempDir()
	defer os.RemoveAll(dir) // there are many
	for path, b := range files {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := DefaultConfig()
	cfg.Dir = dir
	log := slog.New(slog.DiscardHandler)
	db, err := Open(context.Background(), cfg, log)
	if err != nil {
		return err
	}
	defer db.Close()
	s := &sqliteStore{db: db, torn: func(what string, keys ...any) { err = errors.Join(err, fmt.Errorf("%s %v", what, keys)) }}
	img, loadErr := s.Load()
	if err := errors.Join(err, loadErr, s.disconnect()); err != nil {
		return err
	}
	if r := db.Salvage(); r != nil {
		return fmt.Errorf("a power cut is taken for damage: %s", r.Why)
	}
	there := map[uint64]bool{}
	for _, head := range img.Segments {
		row, err := s.Segment(head.ID)
		if err != nil || row == nil {
			return fmt.Errorf("segment %d: %v, error %w", head.ID, row, err)
		}
		c := row.contents()
		if c.torn != nil {
			return c.torn
		}
		for _, p := range c.pieces {
			c.Deliveries(p.session, p.first, p.first+uint64(p.count), func(r ClaimRecord, _ *Message) bool {
				there[r.Seq] = true
				return true
			})
		}
	}
	inbound := map[uint16]bool{}
	for _, in := range img.Inbound {
		inbound[in.PacketID] = true
	}
	last, retained := -1, -1
	for _, m := range img.Retained {
		if _, err := fmt.Sscan(string(m.Payload), &retained); err != nil {
			return err
		}
	}
	for i, at := range p.retained {
		if at <= cut {
			last = i
		}
	}
	if retained < last {
		return fmt.Errorf("retained message %d is %d again", last, retained)
	}
	for seq, l := range p.deliveries {
		if l.from <= cut && cut < l.to && !there[uint64(seq)] {
			return fmt.Errorf("delivery %d is lost", seq)
		}
	}
	for i, l := range p.inbound {
		if l.from <= cut && cut < l.to && !inbound[uint16(1+i)] {
			return fmt.Errorf("QoS 2 identifier %d is lost", 1+i)
		}
	}
	return nil
}

// powerCuts cuts the power of a run at many moments, and returns how many cuts
// there were and the first that lost something.
func powerCuts(t *testing.T, seed uint64, commits, every int, pragmas ...string) (cuts int, lost error) {
	t.Helper()
	ops, p := workload(t, seed, commits, pragmas...)
	rng := rand.New(rand.NewPCG(seed, 3))
	d := newDisk()
	for i, op := range ops {
		d.do(op)
		if rng.IntN(every) > 0 {
			continue
		}
		cuts++
		if err := p.survives(t, d.cut(rng), i+1); err != nil {
			return cuts, fmt.Errorf("seed %d, power cut after disk operation %d of %d: %w", seed, i+1, len(ops), err)
		}
	}
	return cuts, nil
}

// TestPowerCuts takes the power away from SQLite, with what it had written and
// not synced: whatever the journal has said is durable, is.
func TestPowerCuts(t *testing.T) {
	runs, every := 2, 6
	switch {
	case os.Getenv("PENSTOCK_SOAK") != "":
		runs, every = 40, 1
	case testing.Short(): // under an emulator
		runs, every = 1, 40
	}
	total := 0
	for seed := range uint64(runs) {
		n, err := powerCuts(t, seed, 60, every)
		if total += n; err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d power cuts in %d runs", total, runs)
}

// Without the syncs that the promise rests on, the same cuts lose or damage something: so
// the test can fail.
func TestPowerCutsFindMissingSync(t *testing.T) {
	for seed := range uint64(5) {
		if n, err := powerCuts(t, seed, 60, 2, "PRAGMA synchronous=OFF"); err != nil {
			t.Logf("after %d cuts: %v", n, err)
			return
		}
	}
	t.Error("nothing was lost without a sync")
}
