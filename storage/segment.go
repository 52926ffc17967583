package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"sync"
)

// A segment is a row of the queue store: a body of packed messages, each once
// however many sessions it is for, and a head that says which of them are whose.
// A start reads heads only, so it costs the same whether a session missed a
// hundred messages or a million.

// StoredSegment is a segment's row.
type StoredSegment struct {
	ID   int64
	Head []byte
	Body []byte // nil in an Image
	Size int    // of head and body, bytes; set by whoever reads the row
}

// piece is a run of one session's deliveries in a segment that are alike:
// consecutive sequence numbers, of consecutive records.
type piece struct {
	session SessionID
	first   uint64 // sequence number
	record  int    // index of its message
	count   int
	bytes   int // size of the messages
	qos     byte
	retain  bool
	share   string
	ids     []uint32
}

// alike reports whether the pieces differ in nothing but what they cover.
func (p *piece) alike(o *piece) bool {
	return p.session == o.session && p.qos == o.qos && p.retain == o.retain && p.share == o.share && slices.Equal(p.ids, o.ids)
}

// follows reports whether o goes on where p ends.
func (p *piece) follows(o *piece) bool {
	return p.first+uint64(p.count) == o.first && p.record+p.count == o.record && p.alike(o)
}

// headFormat is the first byte of a head.
const headFormat = 1

// segmentBuilder packs a segment. It belongs to one goroutine, and its memory is
// used again after reset.
type segmentBuilder struct {
	body    []byte
	records int
	pieces  []piece
	last    map[SessionID]int // index of the session's last piece
	packed  []byte            // the head
}

func (b *segmentBuilder) reset() {
	b.body, b.records = b.body[:0], 0
	clear(b.pieces)
	b.pieces = b.pieces[:0]
	clear(b.last)
}

func (b *segmentBuilder) empty() bool { return b.records == 0 }

// message adds a record. Those who get it are added next, by claim.
func (b *segmentBuilder) message(m *Message) {
	b.packed = appendMessage(b.packed[:0], m)
	b.record(b.packed)
}

// castagnoli is the polynomial that processors compute.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record adds a packed message: the length of what is checked, its number, the
// message, and a checksum. So damage costs the records that it hits: those
// behind it are found again, and are known not to be others.
func (b *segmentBuilder) record(packed []byte) {
	var number [binary.MaxVarintLen32]byte
	n := binary.PutUvarint(number[:], uint64(b.records))
	b.body = binary.AppendUvarint(b.body, uint64(n+len(packed)))
	at := len(b.body)
	b.body = append(b.body, number[:n]...)
	b.body = append(b.body, packed...)
	b.body = binary.LittleEndian.AppendUint32(b.body, crc32.Checksum(b.body[at:], castagnoli))
	b.records++
}

// unframe reads the record at the beginning of b. It returns its number, the
// packed message, and how many bytes it takes; 0 if there is none.
func unframe(b []byte) (number int, packed []byte, size int) {
	length, n := binary.Uvarint(b)
	if n <= 0 || length < 3 || length > math.MaxInt32 || uint64(len(b)) < uint64(n)+length+4 {
		return 0, nil, 0
	}
	checked := b[n : n+int(length)]
	num, k := binary.Uvarint(checked)
	if k <= 0 || num > math.MaxInt32 || binary.LittleEndian.Uint32(b[n+int(length):]) != crc32.Checksum(checked, castagnoli) {
		return 0, nil, 0
	}
	return int(num), checked[k:], n + int(length) + 4
}

// claim adds a session's claim on the last record, whose message has a size.
func (b *segmentBuilder) claim(c ClaimRecord, size int) {
	b.add(piece{
		session: c.Session, first: c.Seq, record: b.records - 1, count: 1, bytes: size,
		qos: c.QoS, retain: c.Retain, share: c.Share, ids: c.Identifiers,
	})
}

// add adds a piece, to the session's last one if it goes on there.
func (b *segmentBuilder) add(p piece) {
	i := len(b.pieces) - 1
	if i < 0 || b.pieces[i].session != p.session {
		j, ok := b.last[p.session]
		if i = j; !ok {
			i = -1
		}
	}
	if i >= 0 && b.pieces[i].follows(&p) {
		b.pieces[i].count += p.count
		b.pieces[i].bytes += p.bytes
		return
	}
	if b.last == nil {
		b.last = make(map[SessionID]int)
	}
	b.last[p.session] = len(b.pieces)
	b.pieces = append(b.pieces, p)
}

// Flags of a piece, beside packedQoS, packedRetain and packedShared.
const packedIdentifiers = 0x40

// head packs the head: format, when the segment was made, the pieces by session and
// sequence number, and a checksum. The result is valid until the next call.
func (b *segmentBuilder) head(created int64) []byte {
	slices.SortStableFunc(b.pieces, func(x, y piece) int {
		switch {
		case x.session != y.session:
			return int(min(max(x.session-y.session, -1), 1))
		case x.first < y.first:
			return -1
		case x.first > y.first:
			return 1
		}
		return 0
	})
	buf := append(b.packed[:0], headFormat)
	buf = binary.AppendVarint(buf, created)
	var before piece
	for i := range b.pieces {
		p := &b.pieces[i]
		flags := p.qos & packedQoS
		if p.retain {
			flags |= packedRetain
		}
		if p.share != "" {
			flags |= packedShared
		}
		if len(p.ids) > 0 {
			flags |= packedIdentifiers
		}
		if p.session != before.session {
			before = piece{session: before.session, record: before.record, count: before.count}
		}
		buf = append(buf, flags)
		buf = binary.AppendUvarint(buf, uint64(p.session-before.session))
		buf = binary.AppendUvarint(buf, p.first-before.first)
		buf = binary.AppendVarint(buf, int64(p.record-before.record))
		buf = binary.AppendUvarint(buf, uint64(p.count))
		buf = binary.AppendUvarint(buf, uint64(p.bytes))
		if p.share != "" {
			buf = binary.AppendUvarint(buf, uint64(len(p.share)))
			buf = append(buf, p.share...)
		}
		if len(p.ids) > 0 {
			buf = binary.AppendUvarint(buf, uint64(len(p.ids)))
			for _, id := range p.ids {
				buf = binary.AppendUvarint(buf, uint64(id))
			}
		}
		before = *p
	}
	buf = binary.LittleEndian.AppendUint32(buf, crc32.Checksum(buf, castagnoli))
	b.packed = buf
	return buf
}

// eachPiece unpacks a head. It returns an error when that is torn; then nothing
// was visited, for messages might be taken for another session's.
func eachPiece(head []byte, visit func(piece)) (created int64, err error) {
	n := len(head) - 4
	if n < 0 || binary.LittleEndian.Uint32(head[n:]) != crc32.Checksum(head[:n], castagnoli) {
		return 0, fmt.Errorf("decode segment's head: %w", errTorn)
	}
	u := unpacker{buf: head[:n]}
	if u.byte() != headFormat {
		u.fail()
	}
	created = u.varint()
	var p piece
	for len(u.buf) > 0 {
		flags := u.byte()
		if d := u.uvarint(); d != 0 {
			p.session, p.first = p.session+SessionID(d), 0
		}
		p.first += u.uvarint()
		p.record += int(u.varint())
		count, bytes := u.uvarint(), u.uvarint()
		if count > math.MaxInt32 || bytes > math.MaxInt || p.record < 0 || p.session < 0 || p.first+count < p.first {
			u.fail()
		}
		p.count, p.bytes = int(count), int(bytes)
		p.qos, p.retain, p.share, p.ids = flags&packedQoS, flags&packedRetain != 0, "", nil
		if flags&packedShared != 0 {
			p.share = string(u.bytes())
		}
		if flags&packedIdentifiers != 0 {
			p.ids = make([]uint32, 0, min(u.peekCount(), 16))
			for range u.count() {
				p.ids = append(p.ids, uint32(u.uvarint()))
			}
		}
		if u.err != nil {
			return created, fmt.Errorf("decode segment's head: %w", u.err)
		}
		visit(p)
	}
	if u.err != nil {
		return created, fmt.Errorf("decode segment's head: %w", u.err)
	}
	return created, nil
}

// Extent is what a segment has of one session: Count deliveries whose sequence
// numbers are consecutive.
type Extent struct {
	Session SessionID
	First   uint64
	Count   int
	Bytes   int    // size of the messages
	Share   string // of its deliveries, where they came by a share group
}

// Extents calls visit for everything that the segment's head has, by session and
// sequence number. It needs no body. It returns an error when the head is torn.
func (s StoredSegment) Extents(visit func(Extent)) error {
	_, err := eachPiece(s.Head, func(p piece) {
		if p.record+p.count > s.Size { // every message takes some bytes
			return
		}
		visit(Extent{Session: p.session, First: p.first, Count: p.count, Bytes: p.bytes, Share: p.share})
	})
	return err
}

// Contents is a segment that was read and unpacked so far that deliveries can be
// found in it. It is immutable.
type Contents struct {
	created int64
	pieces  []piece // by session and sequence number
	body    []byte
	records [][]byte // packed messages, in body; nil where one cannot be read
	torn    error
}

// contents unpacks a segment's row. What is damaged of it is left out.
func (s StoredSegment) contents() *Contents {
	c := &Contents{body: s.Body}
	c.created, c.torn = eachPiece(s.Head, func(p piece) { c.pieces = append(c.pieces, p) })
	const enough = 16 << 20 // a damaged body is looked through so long, bytes
	looked, lost := 0, false
	for b := s.Body; len(b) > 0; {
		number, packed, size := unframe(b)
		if size == 0 || number < len(c.records) || number > len(s.Body) {
			lost = true
			if length, n := binary.Uvarint(b); n > 0 && length < uint64(len(b)) {
				looked += int(length)
			}
			if looked++; looked > enough {
				break
			}
			b = b[1:]
			continue
		}
		for len(c.records) < number {
			c.records = append(c.records, nil)
		}
		c.records = append(c.records, packed)
		b = b[size:]
	}
	if lost {
		c.torn = errors.Join(c.torn, fmt.Errorf("decode segment: %w", errTorn))
	}
	return c
}

// Size is about what the contents take in memory, in bytes.
func (c *Contents) Size() int { return len(c.body) + 24*len(c.records) + 128*len(c.pieces) }

// Torn returns an error if part of the segment could not be read.
func (c *Contents) Torn() error { return c.torn }

// Deliveries calls visit for the session's deliveries whose sequence numbers are
// first to end-1, in their order, until it returns false. The message shares
// the segment's memory.
func (c *Contents) Deliveries(session SessionID, first, end uint64, visit func(ClaimRecord, *Message) bool) {
	i, _ := slices.BinarySearchFunc(c.pieces, session, func(p piece, id SessionID) int {
		return int(min(max(p.session-id, -1), 1))
	})
	for ; i < len(c.pieces) && c.pieces[i].session == session && c.pieces[i].first < end; i++ {
		p := &c.pieces[i]
		for k := int(min(max(first, p.first)-p.first, uint64(p.count))); k < p.count; k++ {
			seq := p.first + uint64(k)
			if seq >= end || p.record+k >= len(c.records) {
				break
			}
			u := unpacker{buf: c.records[p.record+k]}
			if m := u.message(); u.err == nil && !visit(ClaimRecord{Session: session, Seq: seq, QoS: p.qos, Retain: p.retain, Share: p.share, Identifiers: p.ids}, m) {
				return
			}
		}
	}
}

// rewrite adds what is wanted of a segment to b. It returns the sessions that it
// is for, with doubles.
func (c *Contents) rewrite(b *segmentBuilder, wants func(SessionID, uint64) bool) (sessions []SessionID) {
	var kept []piece
	used := make([]bool, len(c.records))
	for _, p := range c.pieces {
		run := p
		run.count = 0
		share := p.bytes / max(p.count, 1)
		flush := func() {
			if run.count > 0 {
				run.bytes = share * run.count
				kept = append(kept, run)
			}
			run.count = 0
		}
		for k := range p.count {
			if p.record+k >= len(used) {
				break // torn
			}
			if c.records[p.record+k] == nil || !wants(p.session, p.first+uint64(k)) {
				flush()
				continue
			}
			if run.count == 0 {
				run.first, run.record = p.first+uint64(k), p.record+k
			}
			run.count++
			used[p.record+k] = true
		}
		flush()
	}
	index := make([]int, len(used))
	for i, u := range used {
		if u {
			index[i] = b.records
			b.record(c.records[i])
		}
	}
	for _, p := range kept {
		p.record = index[p.record]
		b.add(p)
		sessions = append(sessions, p.session)
	}
	return sessions
}

// Segment is a stored segment, as those who need it hold it. One that nobody
// needs any more is deleted with one of the next commits; one of which little is
// needed, because a session that is away pins it, is written anew without the
// rest; and small ones are merged. All methods are safe for concurrent use.
type Segment struct {
	journal *Journal

	mu      sync.Mutex
	into    *Segment // what it was merged into; nil: it is there
	id      int64
	created int64 // by the broker's clock, milliseconds
	live    int   // claims
	bytes   int64 // size of their messages: one with three claims counts three times
	stored  int   // size of its row
	below   int64 // how few bytes are worth writing it anew
	listed  bool  // among those that may be merged
}

// lock returns what the segment is now, locked.
func (s *Segment) lock() *Segment {
	for {
		s.mu.Lock()
		into := s.into
		if into == nil {
			return s
		}
		s.mu.Unlock()
		s = into
	}
}

// Current returns what the segment is now: itself, or what it was merged into.
func (s *Segment) Current() *Segment {
	s = s.lock()
	defer s.mu.Unlock()
	return s
}

// Created returns when the segment, or the newest that was merged into it, was
// made, by the broker's clock in milliseconds.
func (s *Segment) Created() int64 {
	s = s.lock()
	defer s.mu.Unlock()
	return s.created
}

// Release gives up claims on the segment, for messages of a size in all, bytes.
// The deletion of a segment may become durable ahead of all that the journal has
// not committed yet: who gives a claim up for another one releases it when that
// is durable.
func (s *Segment) Release(claims, size int) {
	s = s.lock()
	before := s.live
	s.live -= claims
	s.bytes = max(s.bytes-int64(size), 0)
	gone, shrink := s.live <= 0 && before > 0, s.live > 0 && s.bytes < s.below
	if shrink {
		s.below = 0 // once
	}
	s.mu.Unlock()
	switch {
	case gone:
		s.journal.drop(s)
	case shrink:
		s.journal.shrink(s)
	}
}

// watch sets from when on the segment is worth writing anew: when a quarter of
// its row is left, and of what is needed now. So all the writing anew of a
// segment comes to less than half of its first size. s.mu is held.
func (s *Segment) watch() {
	switch from := s.journal.compactFrom; {
	case from < 0:
		s.below = math.MaxInt64
	case s.stored < from:
		s.below = 0
	default:
		s.below = min(int64(s.stored), s.bytes) / 4
	}
}

// Keep sets how many claims on a restored segment are still needed, and the size
// of their messages in all.
func (s *Segment) Keep(claims int, size int64) {
	s.mu.Lock()
	s.live, s.bytes = claims, int64(s.stored)
	s.watch()
	s.bytes = size
	shrink := claims > 0 && size < s.below
	if shrink {
		s.below = 0
	}
	s.mu.Unlock()
	switch {
	case claims == 0:
		s.journal.drop(s)
	case shrink:
		s.journal.shrink(s)
	}
}
