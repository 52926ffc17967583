package storage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// pagesImage makes a database with pages of a size, with a little of everything, of
// which half is in the log.
func pagesImage(t testing.TB, size int) (f imageFiles, rows map[string][][]any) {
	t.Helper()
	path := filepath.Join(t.TempDir(), fileName)
	pool, err := openDSN(plainDSN(path, fmt.Sprintf("page_size(%d)", size)), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{"PRAGMA journal_mode=wal", "PRAGMA wal_autocheckpoint=0"} {
		if _, err := pool.Exec(query); err != nil {
			t.Fatal(err)
		}
	}
	if err := migrate(t.Context(), pool, steps, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(query, args...); err != nil {
			t.Fatal(err)
		}
	}
	message := func(n int) []byte {
		return appendMessage(nil, &Message{Topic: "t", QoS: 1, Payload: bytes.Repeat([]byte{'x'}, n)})
	}
	for i := range 20 {
		if i == 10 {
			exec("PRAGMA wal_checkpoint(TRUNCATE)")
		}
		var b segmentBuilder
		m := &Message{Topic: "t", QoS: 1, Payload: bytes.Repeat([]byte{'x'}, i*i*30)}
		b.message(m)
		b.claim(ClaimRecord{Session: SessionID(i + 1), Seq: 3, QoS: 1}, m.Size())
		exec(`INSERT INTO session VALUES (?,?,?,?,?,?,?,0)`, i+1, fmt.Sprint("client", i), int64(NeverExpires), 5, -7, int64(1)<<40, appendProgress(nil, Progress{Cursor: uint64(i)}))
		exec(`INSERT INTO segment VALUES (?,?,?)`, i+1, b.head(1), b.body)
		exec(`INSERT INTO retained VALUES (?,?)`, "t", message(i*200))
		exec(`DELETE FROM retained WHERE topic = 't'`)
		exec(`INSERT INTO retained VALUES (?,?)`, fmt.Sprint(strings.Repeat("long/", i*10), i), appendMessage(nil, &Message{Topic: fmt.Sprint(strings.Repeat("long/", i*10), i)}))
		exec(`INSERT INTO subscription VALUES (?,?,?,?)`, i+1, "f/"+strings.Repeat("y", i*40), 1, 300)
		exec(`INSERT INTO inbound VALUES (?,?)`, i+1, 65535-i)
		exec(`INSERT INTO operator VALUES (?,?,?,?)`, fmt.Sprint("o", i), "admin", "hash", 1)
		exec(`INSERT INTO acl_rule VALUES (?,?,?,?,?,?,?)`, i+1, "u", "", "", "any", strings.Repeat("z", i*size/6), 1)
	}
	exec(`UPDATE acl_rule SET username = 'new'`) // one transaction of many pages, the last one
	rows = rowsOf(t, pool)
	f = readImage(t, filepath.Dir(path))
	return f, rows
}

func sourceOf(main, wal []byte) *source {
	s := &source{roots: map[string]uint32{}}
	s.walker = newWalker(openPages(bytes.NewReader(main), int64(len(main)), bytes.NewReader(wal), int64(len(wal))))
	s.readSchema()
	return s
}

// everything returns all rows that a source gives.
func (s *source) everything() map[string][][]any {
	out := make(map[string][][]any)
	all := salvagedTables()
	for i := range all[:len(all)-1] {
		_, _, _, _ = s.rows(&all[i], func(row []any) error {
			out[all[i].name] = append(out[all[i].name], row)
			return nil
		})
	}
	s.segmentRows(0, func(row StoredSegment) bool {
		out[segmentTable] = append(out[segmentTable], []any{row.ID, row.Head, row.Body})
		return true
	})
	return out
}

// otherOrder returns a log with its checksums in the other byte order.
func otherOrder(wal []byte) []byte {
	b := bytes.Clone(wal)
	page := int(binary.BigEndian.Uint32(b[8:]))
	magic := binary.BigEndian.Uint32(b) ^ 1
	binary.BigEndian.PutUint32(b, magic)
	sum := logSum{big: magic&1 == 1}
	sum.add(b[:24])
	binary.BigEndian.PutUint32(b[24:], sum.s0)
	binary.BigEndian.PutUint32(b[28:], sum.s1)
	for at := logHeader; at+frameHeader+page <= len(b); at += frameHeader + page {
		sum.add(b[at : at+8])
		sum.add(b[at+frameHeader : at+frameHeader+page])
		binary.BigEndian.PutUint32(b[at+16:], sum.s0)
		binary.BigEndian.PutUint32(b[at+20:], sum.s1)
	}
	return b
}

// A healthy database gives what SQLite reads in it, whatever the size of its
// pages and the byte order of its log; without its header too, if the log or the
// pages tell their size.
func TestPages(t *testing.T) {
	for size := minPage; size <= maxPage; size *= 2 {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			f, want := pagesImage(t, size)
			headless := bytes.Clone(f.main)
			clear(headless[:100])
			for name, s := range map[string]*source{
				"as it is":            sourceOf(f.main, f.wal),
				"the other order":     sourceOf(f.main, otherOrder(f.wal)),
				"without a header":    sourceOf(headless, f.wal),
				"a log with old ends": sourceOf(f.main, append(bytes.Clone(f.wal), f.wal[logHeader:logHeader+2*(frameHeader+size)]...)),
			} {
				if s.size != size {
					t.Errorf("%s: got pages of %d bytes", name, s.size)
				}
				if got := s.everything(); !reflect.DeepEqual(got, want) {
					for table := range want {
						t.Errorf("%s: %s: got %d rows, want %d", name, table, len(got[table]), len(want[table]))
					}
				}
			}
			if got := guessPageSize(bytes.NewReader(headless), int64(len(headless))); got != size {
				t.Errorf("guessed %d", got)
			}
		})
	}
}

// A transaction that the log does not have whole is not taken.
func TestPagesOfCommittedFrames(t *testing.T) {
	f, want := pagesImage(t, 4096)
	frame := frameHeader + 4096
	last := 0 // where the last transaction begins
	for at := logHeader; at+frame <= len(f.wal); at += frame {
		if binary.BigEndian.Uint32(f.wal[at+4:]) > 0 && at+frame < len(f.wal) {
			last = at + frame
		}
	}
	for name, wal := range map[string][]byte{
		"cut off in its last page": f.wal[:len(f.wal)-1],
		"a bit in its first page":  func() []byte { b := bytes.Clone(f.wal); b[last+frameHeader+9] ^= 1; return b }(),
		"other salts":              func() []byte { b := bytes.Clone(f.wal); b[last+8] ^= 1; return b }(),
	} {
		got := sourceOf(f.main, wal).everything()
		for _, r := range got["acl_rule"] {
			if r[1] == "new" {
				t.Errorf("%s: rule %d is from the last transaction", name, r[0])
			}
		}
		if n := len(got["acl_rule"]); n != len(want["acl_rule"]) {
			t.Errorf("%s: got %d rules, want %d", name, n, len(want["acl_rule"]))
		}
		if n := len(got["operator"]); n != len(want["operator"]) {
			t.Errorf("%s: got %d operators, want %d", name, n, len(want["operator"]))
		}
	}
}

// A bit that is wrong in the middle of the log costs no transaction behind it:
// SQLite would drop them all. At its end it is what a power cut leaves.
func TestDamagedLog(t *testing.T) {
	f, want := pagesImage(t, 4096)
	frame := frameHeader + 4096
	var ends []int // where transactions end
	for at := logHeader; at+frame <= len(f.wal); at += frame {
		if binary.BigEndian.Uint32(f.wal[at+4:]) > 0 {
			ends = append(ends, at+frame)
		}
	}
	last, middle := ends[len(ends)-2], ends[len(ends)/2]
	for _, tt := range []struct {
		name  string
		at, n int // what is damaged
		found bool
	}{
		{"in a page", middle + frameHeader + 4000, 1, true},
		{"in a checksum", middle + 17, 1, true},
		{"in the salts", middle + 9, 1, true},
		{"a sector lost", middle + frameHeader + 1024, 512, true},
		{"a frame lost", middle, frame, true},
		{"three frames lost", middle, 3 * frame, true},
		{"in the last transaction", last + frameHeader + 9, 1, false},
		{"a frame of the last transaction lost", last, frame, false},
	} {
		wal := bytes.Clone(f.wal)
		for i := range wal[tt.at : tt.at+tt.n] {
			wal[tt.at+i] ^= 0x10
		}
		s := sourceOf(f.main, wal)
		if s.brokenLog != tt.found {
			t.Errorf("%s: damage found: %v, want %v", tt.name, s.brokenLog, tt.found)
		}
		got := s.everything()
		if n := 0; tt.found {
			for _, r := range got["acl_rule"] {
				if r[1] == "new" {
					n++
				}
			}
			if n < len(want["acl_rule"])/2 {
				t.Errorf("%s: %d of %d rules are of the last transaction", tt.name, n, len(want["acl_rule"]))
			}
		}
	}
}

// So it is where only one frame is left behind it, if the page itself is whole.
func TestDamagedLogNearItsEnd(t *testing.T) {
	f, _ := pagesImage(t, 4096)
	frame := frameHeader + 4096
	for at := logHeader; at+2*frame <= len(f.wal); at += frame {
		if binary.BigEndian.Uint32(f.wal[at+4:]) == 0 || binary.BigEndian.Uint32(f.wal[at+frame+4:]) == 0 {
			continue // not two transactions of which the second has one page
		}
		wal := bytes.Clone(f.wal[:at+2*frame])
		wal[at+17] ^= 1 // of the checksum
		if s := sourceOf(f.main, wal); !s.brokenLog {
			t.Errorf("the transaction at %d hides the last one", at)
		}
		return
	}
	t.Fatal("there is no transaction of one page")
}

// A tree whose pages lead back to their parents is walked once.
func TestTreesThatLeadBack(t *testing.T) {
	const size, cells = 512, 50
	page := make([]byte, size)
	page[0] = tableInterior
	binary.BigEndian.PutUint16(page[3:], cells)
	binary.BigEndian.PutUint32(page[8:], 2)
	for i := range cells {
		at := size - 5*(i+1)
		binary.BigEndian.PutUint16(page[12+2*i:], uint16(at))
		binary.BigEndian.PutUint32(page[at:], 2)
	}
	file := append(make([]byte, size), page...)
	w := newWalker(&pageFile{main: bytes.NewReader(file), length: int64(len(file)), wal: strings.NewReader(""), size: size, count: 2})
	if d := w.tree(2, true, func(cell) bool { return true }); d.pages != cells+1 {
		t.Errorf("got %+v, want %d pages that lead back", d, cells+1)
	}
}

// The length of an overflow chain is what there is of it, whatever a cell says.
func TestChainsThatLeadBack(t *testing.T) {
	f, _ := pagesImage(t, 4096)
	s := sourceOf(f.main, f.wal)
	page := make([]byte, 4096)
	for no := uint32(1); no <= s.count; no++ {
		if !s.read(no, page) {
			continue
		}
		c := cell{size: s.bytes(), overflow: no}
		if rec, whole := s.record(c); whole && len(rec) != int(c.size) || int64(len(rec)) > s.bytes() {
			t.Fatalf("page %d: got %d bytes, whole %v", no, len(rec), whole)
		}
	}
	loop := bytes.Repeat(append([]byte{0, 0, 0, 2}, make([]byte, 508)...), 8)
	loop[1027] = 2 // page 3 leads to page 2, which leads to itself
	w := newWalker(&pageFile{main: bytes.NewReader(loop), length: int64(len(loop)), wal: strings.NewReader(""), size: 512, count: 8})
	if rec, whole := w.record(cell{size: 4096, overflow: 3}); whole || len(rec) > 3*508 {
		t.Errorf("a chain that leads back: got %d bytes, whole %v", len(rec), whole)
	}
	for _, next := range []uint32{0, 99} {
		if rec, whole := w.record(cell{size: 4096, local: []byte("abc"), overflow: next}); whole || string(rec) != "abc" {
			t.Errorf("to page %d: got %q, whole %v", next, rec, whole)
		}
	}
}

func TestSQLiteVarint(t *testing.T) {
	for _, tt := range []struct {
		in   []byte
		want uint64
		n    int
	}{
		{nil, 0, 0}, {[]byte{0x7f}, 127, 1}, {[]byte{0x81, 0}, 128, 2}, {[]byte{0x81}, 0, 0},
		{bytes.Repeat([]byte{0xff}, 9), 1<<64 - 1, 9}, {bytes.Repeat([]byte{0xff}, 8), 0, 0},
	} {
		if v, n := sqliteVarint(tt.in); v != tt.want || n != tt.n {
			t.Errorf("%x: got %d of %d bytes, want %d of %d", tt.in, v, n, tt.want, tt.n)
		}
	}
}

func TestDecodeRecord(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   []byte
		want []any
	}{
		{"of every kind", []byte{10, 0, 1, 2, 3, 7, 8, 9, 16, 19, 0xff, 0x80, 0, 1, 0, 0, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 'a', 'b', 'c', 'd', 'e'},
			[]any{nil, int64(-1), int64(-32768), int64(65536), 1.0, int64(0), int64(1), []byte("ab"), "cde"}},
		{"a text cut short", []byte{2, 19, 'a'}, []any{"a"}},
		{"a number cut short", []byte{3, 6, 19, 1}, []any{nil, ""}},
		{"a type that there is not", []byte{2, 10, 1}, nil},
		{"a header longer than the record", []byte{9, 1, 1}, nil},
		{"a header of no length", []byte{0, 1}, nil},
		{"nothing", nil, nil},
	} {
		if got := decodeRecord(tt.in); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %#v, want %#v", tt.name, got, tt.want)
		}
	}
}

// FuzzPages has any bytes read as a database and its log: it ends, and what it
// gives is no more than what is there.
func FuzzPages(f *testing.F) {
	for _, size := range []int{512, 1024, 4096} {
		image, _ := pagesImage(f, size)
		f.Add(image.main, image.wal)
		f.Add(image.main, []byte{})
		f.Add([]byte{}, image.wal)
		headless := bytes.Clone(image.main)
		clear(headless[:100])
		f.Add(headless, []byte{})
		f.Add(image.main[:len(image.main)/2], image.wal)
		twisted := bytes.Clone(image.main)
		for at := 0; at+12 < len(twisted); at += size { // children that lead back
			binary.BigEndian.PutUint32(twisted[at+8:], uint32(at/size))
		}
		f.Add(twisted, []byte{})
	}
	f.Fuzz(func(t *testing.T, main, wal []byte) {
		s := sourceOf(main, wal)
		s.guessRoots(map[string]uint32{"session": 2, segmentTable: 3, "retained": 4})
		most := s.bytes()
		all := salvagedTables()
		read := func(row []any) error {
			for _, v := range row {
				if b, ok := v.([]byte); ok && int64(len(b)) > most {
					t.Fatalf("got a value of %d bytes out of %d", len(b), most)
				}
			}
			return nil
		}
		for i := range all[:len(all)-1] {
			_, _, _, _ = s.rows(&all[i], read)
		}
		s.segmentRows(len(main)%3, func(row StoredSegment) bool {
			b := builder{highest: map[SessionID]uint64{}}
			if n := b.mended(row).Size; int64(n) > 4*most+100 {
				t.Fatalf("%d bytes out of %d", n, most)
			}
			claimed(row.contents(), map[SessionID]Session{1: {ID: 1}})
			return row.ID%5 != 0
		})
		s.orphans(func(no uint32, n *node) bool {
			for i := range n.cells {
				if c, ok := n.cell(i); ok {
					rec, _ := s.record(c)
					decodeRecord(rec)
				}
			}
			return true
		})
	})
}
