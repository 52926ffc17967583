// Package storagetest holds a Store in memory for tests that cut the power:
// what was committed survives, what was not is gone.
package storagetest

import (
	"errors"
	"maps"
	"slices"

	"penstock/storage"
)

// ErrCut is what a transaction returns at the moment the power goes.
var ErrCut = errors.New("power cut")

// Memory is a Store that lives in memory. Its zero value is empty. It is used
// by one goroutine at a time.
type Memory struct {
	// BeforeCommit and AfterCommit, where set, are asked around every commit;
	// true cuts the power there: Commit returns ErrCut without, or with, the
	// transaction being durable.
	BeforeCommit func() bool
	AfterCommit  func() bool
	// Fails, where set, is asked before every other step of a transaction;
	// true makes it fail.
	Fails func() bool

	Commits int
	rows    rows
}

type subKey struct {
	id     storage.SessionID
	filter string
}

type rows struct {
	sessions map[storage.SessionID]storage.Session
	subs     map[subKey]storage.Subscription
	inbound  map[storage.Inbound]struct{}
	segments map[int64]storage.StoredSegment
	retained map[string]*storage.Message
	wills    map[string]storage.Will
	mark     *storage.Mark // never changed
	off      map[int64]storage.TimeOff
}

func (r rows) clone() rows {
	return rows{
		maps.Clone(r.sessions), maps.Clone(r.subs), maps.Clone(r.inbound),
		maps.Clone(r.segments), maps.Clone(r.retained), maps.Clone(r.wills), r.mark, maps.Clone(r.off),
	}
}

var _ storage.Store = (*Memory)(nil)

// Begin implements storage.Store.
func (m *Memory) Begin() (storage.Tx, error) {
	if m.Fails != nil && m.Fails() {
		return nil, ErrCut
	}
	return &tx{m: m}, nil
}

// Close implements storage.Store.
func (m *Memory) Close() error { return nil }

// Load implements storage.Store.
func (m *Memory) Load() (*storage.Image, error) {
	img := &storage.Image{Mark: m.rows.mark}
	for _, era := range slices.Sorted(maps.Keys(m.rows.off)) {
		img.TimeOff = append(img.TimeOff, m.rows.off[era])
	}
	for _, id := range slices.Sorted(maps.Keys(m.rows.sessions)) {
		img.Sessions = append(img.Sessions, m.rows.sessions[id])
	}
	for _, s := range m.rows.subs {
		img.Subscriptions = append(img.Subscriptions, s)
	}
	slices.SortFunc(img.Subscriptions, func(a, b storage.Subscription) int {
		if a.Session != b.Session {
			return int(a.Session - b.Session)
		}
		if a.Filter < b.Filter {
			return -1
		}
		return 1
	})
	for in := range m.rows.inbound {
		img.Inbound = append(img.Inbound, in)
	}
	for _, id := range slices.Sorted(maps.Keys(m.rows.wills)) {
		img.Wills = append(img.Wills, m.rows.wills[id])
	}
	for _, t := range slices.Sorted(maps.Keys(m.rows.retained)) {
		img.Retained = append(img.Retained, m.rows.retained[t])
	}
	for _, id := range slices.Sorted(maps.Keys(m.rows.segments)) {
		row := m.rows.segments[id]
		row.Body = nil
		img.Segments = append(img.Segments, row)
	}
	return img, nil
}

// Segment implements storage.Store.
func (m *Memory) Segment(id int64) (*storage.StoredSegment, error) {
	if m.Fails != nil && m.Fails() {
		return nil, ErrCut
	}
	return m.rows.segment(id), nil
}

func (r *rows) segment(id int64) *storage.StoredSegment {
	row, ok := r.segments[id]
	if !ok {
		return nil
	}
	return &row // what it holds is never changed
}

// tx records its changes and applies them when it commits.
type tx struct {
	m       *Memory
	changes []func(*rows)
}

func (t *tx) add(f func(*rows)) error {
	if t.m.Fails != nil && t.m.Fails() {
		return ErrCut
	}
	t.changes = append(t.changes, f)
	return nil
}

func put[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = make(map[K]V)
	}
	(*m)[k] = v
}

func (t *tx) PutSession(s storage.Session) error {
	return t.add(func(r *rows) {
		if old, ok := r.sessions[s.ID]; ok {
			old.Expiry, old.Protocol, old.Left = s.Expiry, s.Protocol, s.Left
			s = old
		}
		// As in SQLite, a client has one row.
		maps.DeleteFunc(r.sessions, func(id storage.SessionID, o storage.Session) bool { return id != s.ID && o.ClientID == s.ClientID })
		put(&r.sessions, s.ID, s)
	})
}

func (t *tx) DeleteSession(id storage.SessionID) error {
	return t.add(func(r *rows) {
		delete(r.sessions, id)
		maps.DeleteFunc(r.subs, func(k subKey, _ storage.Subscription) bool { return k.id == id })
		maps.DeleteFunc(r.inbound, func(k storage.Inbound, _ struct{}) bool { return k.Session == id })
	})
}

func (t *tx) PutSubscription(s storage.Subscription) error {
	return t.add(func(r *rows) {
		if _, ok := r.sessions[s.Session]; ok {
			put(&r.subs, subKey{s.Session, s.Filter}, s)
		}
	})
}

func (t *tx) DeleteSubscription(id storage.SessionID, filter string) error {
	return t.add(func(r *rows) { delete(r.subs, subKey{id, filter}) })
}

func (t *tx) PutProgress(id storage.SessionID, p storage.Progress) error {
	p.Finished, p.Released = slices.Clone(p.Finished), slices.Clone(p.Released)
	return t.add(func(r *rows) {
		if s, ok := r.sessions[id]; ok {
			s.Progress = p
			r.sessions[id] = s
		}
	})
}

func (t *tx) PutCeiling(id storage.SessionID, ceiling uint64) error {
	return t.add(func(r *rows) {
		if s, ok := r.sessions[id]; ok {
			s.Ceiling = max(s.Ceiling, ceiling)
			r.sessions[id] = s
		}
	})
}

func (t *tx) PutInbound(in storage.Inbound) error {
	return t.add(func(r *rows) {
		if _, ok := r.sessions[in.Session]; ok {
			put(&r.inbound, in, struct{}{})
		}
	})
}

func (t *tx) DeleteInbound(in storage.Inbound) error {
	return t.add(func(r *rows) { delete(r.inbound, in) })
}

func (t *tx) PutSegment(s storage.StoredSegment) error {
	s.Head, s.Body, s.Size = slices.Clone(s.Head), slices.Clone(s.Body), len(s.Head)+len(s.Body)
	return t.add(func(r *rows) { put(&r.segments, s.ID, s) })
}

func (t *tx) Segment(id int64) (*storage.StoredSegment, error) {
	if t.m.Fails != nil && t.m.Fails() {
		return nil, ErrCut
	}
	now := t.m.rows.clone() // with what the transaction has changed
	for _, f := range t.changes {
		f(&now)
	}
	return now.segment(id), nil
}

func (t *tx) DeleteSegment(id int64) error {
	return t.add(func(r *rows) { delete(r.segments, id) })
}

func (t *tx) PutRetained(m *storage.Message) error {
	return t.add(func(r *rows) { put(&r.retained, m.Topic, m) })
}

func (t *tx) DeleteRetained(topic string) error {
	return t.add(func(r *rows) { delete(r.retained, topic) })
}

func (t *tx) PutWill(w storage.Will) error {
	return t.add(func(r *rows) { put(&r.wills, w.ClientID, w) })
}

func (t *tx) DeleteWill(clientID string) error {
	return t.add(func(r *rows) { delete(r.wills, clientID) })
}

func (t *tx) PutMark(m storage.Mark) error {
	return t.add(func(r *rows) { r.mark = &m })
}

func (t *tx) PutTimeOff(o storage.TimeOff) error {
	return t.add(func(r *rows) { put(&r.off, o.Era, o) })
}

func (t *tx) PutLeft(id storage.SessionID, stamp int64) error {
	return t.add(func(r *rows) {
		if s, ok := r.sessions[id]; ok {
			s.Left = stamp
			r.sessions[id] = s
		}
	})
}

func (t *tx) PutWillDue(clientID string, stamp int64) error {
	return t.add(func(r *rows) {
		if w, ok := r.wills[clientID]; ok {
			w.Due = stamp
			r.wills[clientID] = w
		}
	})
}

func (t *tx) Commit() error {
	if t.m.BeforeCommit != nil && t.m.BeforeCommit() {
		return ErrCut
	}
	for _, f := range t.changes {
		f(&t.m.rows)
	}
	t.m.Commits++
	if t.m.AfterCommit != nil && t.m.AfterCommit() {
		return ErrCut
	}
	return nil
}

func (t *tx) Rollback() error { return nil }
