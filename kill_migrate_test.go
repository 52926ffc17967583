package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"penstock/storage"
)

// TestKillMigration starts the program on databases of schema 2, and kills it at
// random moments until it serves. Everything that an older program has queued
// comes, in order, before what is published then; and so with some more kills.
func TestKillMigration(t *testing.T) {
	testKillMigration(t, killRounds(t, 15), false)
}

// TestKillSalvage does the same where the database is said to be damaged, so that
// it is salvaged instead of migrated.
func TestKillSalvage(t *testing.T) {
	testKillMigration(t, killRounds(t, 10), true)
}

func testKillMigration(t *testing.T, rounds int, salvage bool) {
	if _, err := exec.LookPath("sqlite3"); err != nil {
		t.Fatal("sqlite3 is not installed: apt-get install sqlite3")
	}
	program := killBuild(t, os.Getenv("PENSTOCK_KILL_RACE") == "1")
	for rounds > 0 {
		r := newKillRun(t, killPlan{program: program, rounds: rounds})
		m := newKillMigration(t, r)
		if salvage {
			if err := os.WriteFile(filepath.Join(r.dir, "data", storage.DamagedName), []byte("by a test\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			r.damaged = true
		}
		m.work()
		t.Log(m.report())
		for _, v := range r.violations {
			t.Error(v)
		}
		if t.Failed() {
			t.Fatalf("seed %d; the program's log ends with:\n%s", r.plan.seed, r.tail())
		}
		rounds -= r.kills
	}
}

// killMigration is a database of an older program, and those who wait for what
// is in it.
type killMigration struct {
	run     *killRun
	queued  int // deliveries
	before  int // kills that left all to be moved
	between int // kills that left some to be moved
	behind  int // and none
}

// newKillMigration makes the database in the run's data directory, and replaces
// the clients of the run.
func newKillMigration(t *testing.T, r *killRun) *killMigration {
	t.Helper()
	const segments, records = 3000, 10
	m := &killMigration{run: r}
	r.publishers, r.streams = nil, nil
	clear(r.byName)
	old := &killPublisher{killClient: killClient{run: r, id: "old", version: 4}}
	one, two := r.stream(old, "q/1", 1, false), r.stream(old, "q/2", 2, false)
	live := &killPublisher{
		killClient: killClient{run: r, id: "live", version: 5},
		window:     10, left: -1, used: make(map[uint16]bool), room: make(chan struct{}, 1),
	}
	r.stream(live, "q/3", 1, false)
	r.stream(live, "q/3", 2, false)
	r.publishers = append(r.publishers, live)

	type session struct {
		*killSubscriber
		id      int
		filter  string
		cursor  uint64 // what it has had of its queue
		nextSeq uint64
	}
	var sessions []*session
	for i, s := range []session{
		{killSubscriber: &killSubscriber{killClient: killClient{id: "all1", version: 4}, qos: 1}, filter: "q/#"},
		{killSubscriber: &killSubscriber{killClient: killClient{id: "all2", version: 5}, qos: 2}, filter: "q/#", cursor: 3},
		{killSubscriber: &killSubscriber{killClient: killClient{id: "some", version: 5, receiveMax: 100}, qos: 2}, filter: "q/2", cursor: segments * records / 4},
	} {
		s.run, s.known, s.id, s.filters = r, true, i+1, []string{s.filter}
		s.seen, s.inbound = make(map[*killStream]*killSeen), make(map[uint16]string)
		sessions = append(sessions, &s)
		r.subscribers = append(r.subscribers, s.killSubscriber)
		for _, st := range r.streams {
			if s.matches(st.topic) {
				s.seen[st] = &killSeen{missing: make(map[uint64]bool)}
			}
		}
	}

	var sql bytes.Buffer
	sql.WriteString("PRAGMA journal_mode = wal;\nBEGIN;\n")
	for _, name := range []string{"0001_identities.sql", "0002_delivery.sql"} {
		b, err := os.ReadFile(filepath.Join("storage", "migrations", name))
		if err != nil {
			t.Fatal(err)
		}
		sql.Write(b)
	}
	sql.WriteString("INSERT INTO meta VALUES ('oldest_reader', 2);\nPRAGMA user_version = 2;\n")
	for id := range segments {
		var body []byte
		for k := range records {
			st := one
			if k%2 == 1 {
				st = two
			}
			seq := st.sent.Add(1)
			body = append(body, st.qos)
			for _, part := range []string{st.topic, st.payload(seq)} {
				body = binary.AppendUvarint(body, uint64(len(part)))
				body = append(body, part...)
			}
			var claims []byte
			n := 0
			for _, s := range sessions {
				seen := s.seen[st]
				if seen == nil {
					continue
				}
				if s.nextSeq < s.cursor {
					seen.base = seq // it has had this one
				} else {
					m.queued++
				}
				claims = append(claims, min(st.qos, s.qos))
				claims = binary.AppendUvarint(claims, uint64(s.id))
				claims = binary.AppendUvarint(claims, s.nextSeq)
				claims = binary.AppendUvarint(claims, 0) // subscription identifiers
				s.nextSeq++
				n++
			}
			body = append(binary.AppendUvarint(body, uint64(n)), claims...)
		}
		fmt.Fprintf(&sql, "INSERT INTO segment VALUES (%d, x'%x');\n", id+1, body)
	}
	for _, s := range sessions {
		fmt.Fprintf(&sql, "INSERT INTO session VALUES (%d, '%s', 4294967295, %d, 0, %d, x'%x0000');\n",
			s.id, s.killClient.id, s.version, 16384*(1+s.nextSeq/16384), binary.AppendUvarint(nil, s.cursor))
		fmt.Fprintf(&sql, "INSERT INTO subscription VALUES (%d, '%s', %d, 0);\n", s.id, s.filter, s.qos)
	}
	sql.WriteString("COMMIT;\n")

	data := filepath.Join(r.dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	shell := exec.Command("sqlite3", "-bail", filepath.Join(data, "penstock.db"))
	shell.Stdin = &sql
	if out, err := shell.CombinedOutput(); err != nil {
		t.Fatalf("make the database: %v: %s", err, out)
	}
	return m
}

// work kills the program until it serves, and then some more.
func (m *killMigration) work() {
	r := m.run
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Minute)
	defer cancel()
	r.cancel = cancel
	defer func() {
		if r.process != nil {
			_ = r.process.end(syscall.SIGKILL) // it may have ended
		}
	}()
	for m.behind == 0 && r.kills < r.plan.rounds && !r.broken() {
		if !r.launch(ctx) {
			return
		}
		most := 100 * time.Millisecond
		if r.damaged {
			most = 300 * time.Millisecond // about what a salvage takes
		}
		at := time.NewTimer(time.Duration(r.rng.Int64N(int64(most))))
		select {
		case <-at.C:
			r.early++
		case <-r.process.done:
			r.violated("broker did not start: %v", r.process.err)
		}
		r.kills++
		_ = r.process.end(syscall.SIGKILL) // it may have ended
		m.look()
	}
	r.restart(ctx)

	var work sync.WaitGroup
	pubCtx, stopPublishers := context.WithCancel(ctx)
	defer func() {
		stopPublishers()
		work.Wait()
		for _, s := range r.subscribers {
			s.stop()
		}
	}()
	for _, p := range r.publishers {
		work.Go(func() { p.work(pubCtx) })
	}
	for range 5 { // a part of it drained in each
		if r.broken() {
			return
		}
		for _, s := range r.subscribers {
			if s.cancel == nil {
				s.start(ctx)
			}
		}
		before := r.taken.Load()
		r.await(ctx, "deliveries", func() bool { return r.taken.Load() >= min(before+1000, int64(m.queued)) })
		r.kills++
		r.end(syscall.SIGKILL)
		r.restart(ctx)
	}
	r.finish(ctx, &work)
}

// look notes how far a killed program has come, by a copy of what it left.
func (m *killMigration) look() {
	r := m.run
	copied, err := os.MkdirTemp(r.dir, "copy-")
	if err != nil {
		r.t.Fatal(err)
	}
	defer os.RemoveAll(copied)
	for _, name := range []string{"penstock.db", "penstock.db-wal"} {
		b, err := os.ReadFile(filepath.Join(r.dir, "data", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(copied, name), b, 0o600)
		}
		if os.IsNotExist(err) && name == "penstock.db" { // killed between the renames of a salvage
			m.before++
			return
		}
		if err != nil && !os.IsNotExist(err) {
			r.t.Fatal(err)
		}
	}
	out, err := exec.Command("sqlite3", filepath.Join(copied, "penstock.db"),
		"SELECT user_version, (SELECT count(*) FROM sqlite_schema WHERE name = 'segment_old'), (SELECT count(*) FROM segment) FROM pragma_user_version;").CombinedOutput()
	var version, old, moved int
	if err == nil {
		_, err = fmt.Sscanf(strings.ReplaceAll(string(out), "|", " "), "%d %d %d", &version, &old, &moved)
	}
	switch {
	case err != nil:
		r.t.Fatalf("look at the database: %v: %s", err, out)
	case version < 3 || old > 0 && moved == 0:
		m.before++
	case old > 0:
		m.between++
	default:
		m.behind++
	}
}

func (m *killMigration) report() string {
	return fmt.Sprintf("%d deliveries queued by schema 2; %d kills at the start left all of it to be moved, %d a part, %d nothing; %s", m.queued, m.before, m.between, m.behind, m.run.report())
}
