package storage

import (
	"encoding/binary"
	"io"
	"maps"
	"math"
	"slices"
)

// What stands in SQLite's files, by https://www.sqlite.org/fileformat2.html.
const (
	sqliteMagic   = "SQLite format 3\x00"
	minPage       = 512
	maxPage       = 65536
	usualPage     = 4096
	logHeader     = 32
	frameHeader   = 24
	treeDepth     = 24      // of a b-tree with as many pages as a file can have, and more
	missingPages  = 1 << 24 // how many pages may be neither in the file nor in the log; it bounds memory
	recordColumns = 32      // none of our tables has as many

	indexInterior = 0x02
	tableInterior = 0x05
	indexLeaf     = 0x0a
	tableLeaf     = 0x0d
)

// pageFile reads the pages of a database file as they were after the last
// transaction that its WAL has whole. Nothing in either file is trusted: every
// number in them is checked against the size of the files before it is used, so
// that what is read and allocated is bounded by what is there.
//
// It knows no reserved bytes at the end of pages; our databases have none.
type pageFile struct {
	main   io.ReaderAt
	length int64 // of main, bytes
	wal    io.ReaderAt
	frames map[uint32]int64 // where the newest version of a page stands in the WAL
	size   int              // of a page, bytes
	count  uint32           // pages
	header [100]byte        // of the database; zero if there is none
	found  bool             // header is one of a database
	// brokenLog: there are whole transactions in the WAL behind a damaged one.
	brokenLog bool
}

// openPages returns the pages of the database main with the log wal, of the
// sizes given. Either may be empty.
func openPages(main io.ReaderAt, mainSize int64, wal io.ReaderAt, walSize int64) *pageFile {
	p := &pageFile{main: main, length: mainSize, wal: wal, frames: make(map[uint32]int64)}
	_, _ = main.ReadAt(p.header[:], 0) // what is not there is zero
	p.found = string(p.header[:16]) == sqliteMagic
	p.size = pageSize(uint32(binary.BigEndian.Uint16(p.header[16:])))
	logged := p.readLog(walSize)
	if logged == 0 && (!p.found || p.size == 0) {
		p.size = guessPageSize(main, mainSize)
	}
	p.count = uint32(min((mainSize+int64(p.size)-1)/int64(p.size), math.MaxUint32/2))
	switch {
	case logged > 0:
		p.count = min(logged, p.count+uint32(len(p.frames))+missingPages)
	case p.found:
		// What is behind the end that the header names is left over from before
		// the file became shorter. The two counters say that the size is kept.
		n := binary.BigEndian.Uint32(p.header[28:])
		if n > 0 && n < p.count && string(p.header[24:28]) == string(p.header[92:96]) {
			p.count = n
		}
	}
	if _, ok := p.frames[1]; ok { // it has a newer header
		buf := make([]byte, p.size)
		if p.read(1, buf) {
			copy(p.header[:], buf)
			p.found = string(p.header[:16]) == sqliteMagic
		}
	}
	return p
}

// pageSize returns the page size that a header's field means, 0 if it is none.
func pageSize(field uint32) int {
	if field == 1 {
		return maxPage
	}
	if field < minPage || field > maxPage || field&(field-1) != 0 {
		return 0
	}
	return int(field)
}

// readLog finds the frames of the WAL that are of its last run and whole, up to
// the last one that ends a transaction. Behind a damaged frame it goes on where
// the log is whole again, if it can be told from a transaction that a power cut
// has interrupted: SQLite would drop all that was committed since. It returns the size of the database
// after that, in pages, and 0 if there is nothing to be taken from the WAL; then
// the page size stays as it was.
func (p *pageFile) readLog(size int64) (pages uint32) {
	var head [logHeader]byte
	if size < logHeader {
		return 0
	}
	if n, _ := p.wal.ReadAt(head[:], 0); n < logHeader {
		return 0
	}
	magic := binary.BigEndian.Uint32(head[:])
	if magic&^1 != 0x377f0682 {
		return 0
	}
	page := pageSize(binary.BigEndian.Uint32(head[8:]))
	if binary.BigEndian.Uint32(head[8:]) == 1 { // the WAL has it in full
		page = 0
	}
	sum := logSum{big: magic&1 == 1}
	sum.add(head[:24])
	if page == 0 || !sum.is(head[24:]) {
		return 0
	}
	l := logReader{wal: p.wal, size: size, salts: head[16:24], frame: make([]byte, frameHeader+page)}
	open := make(map[uint32]int64) // of the transaction that is being read
	broken := false                // a frame of it is damaged
	var doubt map[uint32]int64     // a transaction with a damaged frame that has ended
	var doubted uint32
	keep := func(frames map[uint32]int64, after uint32) {
		maps.Copy(p.frames, frames)
		pages, p.size = after, page
	}
	for at := int64(logHeader); l.read(at); at += int64(len(l.frame)) {
		next := sum
		whole := l.whole(&next)
		if !whole {
			resume, seed := l.resume(at, next)
			if resume == 0 {
				break
			}
			for ; at < resume; at += int64(len(l.frame)) {
				broken = true
				if !l.read(at) || !l.mine() {
					continue
				}
				open[l.page()] = at + frameHeader
				if after := l.after(); after > 0 {
					doubt, doubted, broken = joined(doubt, open), after, false
					clear(open)
				}
			}
			l.read(at)
			next = seed
			l.whole(&next)
		}
		if sum = next; doubt != nil {
			// The next transaction began: so the disk had said that it has the last
			// one, and what is wrong with that came later.
			keep(doubt, doubted)
			doubt, p.brokenLog = nil, true
		}
		open[l.page()] = at + frameHeader
		if after := l.after(); after > 0 {
			if broken {
				doubt, doubted, broken = joined(nil, open), after, false
			} else {
				keep(open, after)
			}
			clear(open)
		}
	}
	return pages
}

// joined returns a with the entries of b; a may be nil, b stays as it is.
func joined(a, b map[uint32]int64) map[uint32]int64 {
	if a == nil {
		return maps.Clone(b)
	}
	maps.Copy(a, b)
	return a
}

// logReader reads frames of a WAL.
type logReader struct {
	wal   io.ReaderAt
	size  int64 // of the file
	salts []byte
	frame []byte // the one that was read
}

// read reads the frame at an offset. It returns false if the file ends before.
func (l *logReader) read(at int64) bool {
	if at+int64(len(l.frame)) > l.size {
		return false
	}
	n, _ := l.wal.ReadAt(l.frame, at)
	return n == len(l.frame)
}

func (l *logReader) page() uint32 { return binary.BigEndian.Uint32(l.frame) }

// after is the size of the database, in pages, after a transaction that the frame
// ends; 0 if it ends none.
func (l *logReader) after() uint32 { return binary.BigEndian.Uint32(l.frame[4:]) }

// mine reports whether the frame is of this run of the log.
func (l *logReader) mine() bool {
	return string(l.frame[8:16]) == string(l.salts) && l.page() != 0
}

// whole reports whether the frame is of this run and follows on what sum has
// added, and adds it.
func (l *logReader) whole(sum *logSum) bool {
	sum.add(l.frame[:8])
	sum.add(l.frame[frameHeader:])
	return l.mine() && sum.is(l.frame[16:])
}

// resume looks behind a damaged frame for one from which on the log is whole
// again: it follows on the checksum that the frame before it has, or on the one
// that the damaged frame should have had. It returns where that stands, 0 if it is
// nowhere, and the checksum before it.
func (l *logReader) resume(at int64, computed logSum) (int64, logSum) {
	seeds := []logSum{computed}
	for ; l.read(at); at += int64(len(l.frame)) {
		if l.mine() {
			seeds = append(seeds, logSum{computed.big, binary.BigEndian.Uint32(l.frame[16:]), binary.BigEndian.Uint32(l.frame[20:])})
		}
		if len(seeds) > 0 && l.read(at+int64(len(l.frame))) {
			for _, seed := range seeds {
				if next := seed; l.whole(&next) {
					return at + int64(len(l.frame)), seed
				}
			}
		}
		seeds = seeds[:0]
	}
	return 0, computed
}

// logSum is the checksum of a WAL, which goes on from frame to frame.
type logSum struct {
	big    bool // byte order of what is added
	s0, s1 uint32
}

func (s *logSum) add(b []byte) {
	s0, s1 := s.s0, s.s1
	if s.big { // two loops: a log is read whole at each start that finds one
		for ; len(b) >= 8; b = b[8:] {
			s0 += binary.BigEndian.Uint32(b) + s1
			s1 += binary.BigEndian.Uint32(b[4:]) + s0
		}
	} else {
		for ; len(b) >= 8; b = b[8:] {
			s0 += binary.LittleEndian.Uint32(b) + s1
			s1 += binary.LittleEndian.Uint32(b[4:]) + s0
		}
	}
	s.s0, s.s1 = s0, s1
}

func (s *logSum) is(b []byte) bool {
	return binary.BigEndian.Uint32(b) == s.s0 && binary.BigEndian.Uint32(b[4:]) == s.s1
}

// guessPageSize returns the page size by which most of the file looks like
// pages of b-trees: a page is filled from its end, so one that is taken for twice
// as long has nothing there.
func guessPageSize(main io.ReaderAt, size int64) int {
	const samples = 2048
	best, most := usualPage, int64(0)
	for page := minPage; page <= maxPage; page *= 2 {
		buf := make([]byte, page)
		pages := size / int64(page)
		step := max(pages/samples, 1)
		score := int64(0)
		for no := int64(0); no < pages; no += step {
			if n, _ := main.ReadAt(buf, no*int64(page)); n < page {
				break
			}
			n := node{page: buf}
			if no == 0 {
				n.start = 100
			}
			if !n.parse() || n.cells == 0 {
				continue
			}
			for i := range n.cells {
				c, ok := n.cell(i)
				if ok && c.end == page {
					score += int64(page) * step
					break
				}
			}
		}
		if score > most {
			best, most = page, score
		}
	}
	return best
}

// read fills buf, of a page's size, with a page, and reports whether it is there.
// Where the file ends within it the rest is zero.
func (p *pageFile) read(no uint32, buf []byte) bool {
	if no == 0 || no > p.count {
		return false
	}
	if at, ok := p.frames[no]; ok {
		n, _ := p.wal.ReadAt(buf, at)
		return n == len(buf)
	}
	at := int64(no-1) * int64(p.size)
	if at >= p.length {
		return false
	}
	n, _ := p.main.ReadAt(buf, at)
	clear(buf[n:])
	return n > 0
}

// bytes is how much the pages that are there hold at most.
func (p *pageFile) bytes() int64 { return p.length + int64(len(p.frames))*int64(p.size) }

// node is a page of a b-tree.
type node struct {
	page  []byte
	start int // of its header: 100 on the first page of the file
	kind  byte
	cells int
	right uint32 // of an interior page: the child behind all cells
	list  int    // where the cells' offsets begin
}

// parse reads the header. It returns false if the page is of no b-tree.
func (n *node) parse() bool {
	h := n.page[n.start:]
	n.kind = h[0]
	n.list = n.start + 8
	switch n.kind {
	case indexInterior, tableInterior:
		n.right = binary.BigEndian.Uint32(h[8:])
		n.list += 4
	case indexLeaf, tableLeaf:
	default:
		return false
	}
	n.cells = min(int(binary.BigEndian.Uint16(h[3:])), (len(n.page)-n.list)/2)
	return true
}

func (n *node) interior() bool { return n.kind == indexInterior || n.kind == tableInterior }
func (n *node) table() bool    { return n.kind == tableInterior || n.kind == tableLeaf }

// cell is an entry of a b-tree page.
type cell struct {
	child    uint32 // on interior pages
	rowid    int64  // in tables
	size     int64  // of the record, with what is on overflow pages
	local    []byte // what is on the page itself; it is the page's memory
	overflow uint32 // first page with the rest; 0: none
	end      int    // where the cell ends on the page
}

// cell reads entry i. It returns false if that cannot be one.
func (n *node) cell(i int) (c cell, ok bool) {
	at := int(binary.BigEndian.Uint16(n.page[n.list+2*i:]))
	if at < n.list || at >= len(n.page) {
		return c, false
	}
	b := n.page[at:]
	if n.interior() {
		if len(b) < 4 {
			return c, false
		}
		c.child, b = binary.BigEndian.Uint32(b), b[4:]
	}
	if n.kind == tableInterior {
		_, k := sqliteVarint(b)
		c.end = len(n.page) - len(b) + k
		return c, true // its key says only where to look
	}
	size, k := sqliteVarint(b)
	if k == 0 || size > math.MaxInt32 {
		return c, false
	}
	c.size, b = int64(size), b[k:]
	most := int64(len(n.page)-12)*64/255 - 23
	if n.kind == tableLeaf {
		rowid, k := sqliteVarint(b)
		if k == 0 {
			return c, false
		}
		c.rowid, b = int64(rowid), b[k:]
		most = int64(len(n.page) - 35)
	}
	local := c.size
	if local > most {
		least := int64(len(n.page)-12)*32/255 - 23
		local = least + (c.size-least)%int64(len(n.page)-4)
		if local > most {
			local = least
		}
		if int64(len(b)) < local+4 {
			return c, false
		}
		c.overflow = binary.BigEndian.Uint32(b[local:])
		c.end = len(n.page) - len(b) + int(local) + 4
	} else {
		if int64(len(b)) < local {
			return c, false
		}
		c.end = len(n.page) - len(b) + int(local)
	}
	c.local = b[:local]
	return c, true
}

// sqliteVarint reads SQLite's variable-length integer: big-endian, at most nine bytes. It
// returns how long it is, 0 if b is too short.
func sqliteVarint(b []byte) (v uint64, n int) {
	for i := range min(len(b), 9) {
		if i == 8 {
			return v<<8 | uint64(b[8]), 9
		}
		v = v<<7 | uint64(b[i]&0x7f)
		if b[i] < 0x80 {
			return v, i + 1
		}
	}
	return 0, 0
}

// bitset is a set of page numbers.
type bitset []uint64

func newBitset(n uint32) bitset { return make(bitset, uint64(n)/64+1) }

func (b bitset) has(n uint32) bool { return b[n/64]&(1<<(n%64)) != 0 }
func (b bitset) add(n uint32)      { b[n/64] |= 1 << (n % 64) }

// walker walks the b-trees of a file. A page belongs to one of them at most, so
// none is walked twice, whatever points at it.
type walker struct {
	*pageFile
	seen bitset // pages of b-trees that were walked, and free ones
	free bool   // the list of free pages could be read; they are in seen
}

func newWalker(p *pageFile) *walker {
	w := &walker{pageFile: p, seen: newBitset(p.count)}
	w.free = w.readFree()
	return w
}

// readFree notes the pages that are free: what is on them was deleted. It
// returns false if the list of them is damaged; then none is noted.
func (w *walker) readFree() bool {
	if !w.found {
		return false
	}
	trunk, total := binary.BigEndian.Uint32(w.header[32:]), binary.BigEndian.Uint32(w.header[36:])
	if total > w.count {
		return false
	}
	free := newBitset(w.count)
	n := uint32(0)
	add := func(no uint32) bool {
		if no == 0 || no > w.count || free.has(no) {
			return false
		}
		free.add(no)
		n++
		return true
	}
	buf := make([]byte, w.size)
	for trunk != 0 {
		if n > total || !add(trunk) || !w.read(trunk, buf) {
			return false
		}
		leaves := binary.BigEndian.Uint32(buf[4:])
		if leaves > uint32(w.size/4-2) {
			return false
		}
		for i := range int(leaves) {
			if !add(binary.BigEndian.Uint32(buf[8+4*i:])) {
				return false
			}
		}
		trunk = binary.BigEndian.Uint32(buf)
	}
	if n != total {
		return false
	}
	w.seen = free
	return true
}

// walked is what a walk has met.
type walked struct {
	pages int // that are not there or not what was expected
	cells int // that cannot be read
}

func (d walked) damaged() bool { return d.pages > 0 || d.cells > 0 }

// tree visits the entries of a b-tree in the order of their keys, until visit
// returns false. What is damaged is left out and counted. The cell's memory is
// the walker's until visit returns.
func (w *walker) tree(root uint32, table bool, visit func(cell) bool) (d walked) {
	w.node(root, table, 0, &d, visit)
	return d
}

func (w *walker) node(no uint32, table bool, depth int, d *walked, visit func(cell) bool) (more bool) {
	if no == 0 || no > w.count || w.seen.has(no) || depth > treeDepth {
		d.pages++
		return true
	}
	n := node{page: make([]byte, w.size)}
	if no == 1 {
		n.start = 100
	}
	if !w.read(no, n.page) || !n.parse() || n.table() != table {
		d.pages++
		return true
	}
	w.seen.add(no)
	for i := range n.cells {
		c, ok := n.cell(i)
		if c.child != 0 || n.interior() && ok {
			if !w.node(c.child, table, depth+1, d, visit) {
				return false
			}
		}
		if !ok {
			d.cells++
			continue
		}
		if n.kind != tableInterior && !visit(c) {
			return false
		}
	}
	if n.interior() {
		return w.node(n.right, table, depth+1, d, visit)
	}
	return true
}

// orphans visits the pages that no walk has met and that look like ones with
// rows, in the order in which they stand in the file, until visit returns false.
// A page of an overflow chain is none: it begins with the number of the next
// one, of which the first byte is zero in every file below 128 GB.
func (w *walker) orphans(visit func(no uint32, n *node) bool) {
	buf := make([]byte, w.size)
	look := func(no uint32) bool {
		if no > w.count || w.seen.has(no) || !w.read(no, buf) {
			return true
		}
		n := node{page: buf}
		if no == 1 {
			n.start = 100
		}
		return !n.parse() || n.kind == tableInterior || visit(no, &n)
	}
	inFile := uint32(min((w.length+int64(w.size)-1)/int64(w.size), int64(w.count)))
	for no := uint32(1); no <= inFile; no++ {
		if !look(no) {
			return
		}
	}
	for _, no := range slices.Sorted(maps.Keys(w.frames)) {
		if no > inFile && !look(no) {
			return
		}
	}
}

// record returns the record of a cell, in memory of its own. Where its overflow
// pages end too soon, it is what there is of it, and whole is false.
func (w *walker) record(c cell) (rec []byte, whole bool) {
	rec = append([]byte(nil), c.local...)
	if c.size > w.bytes() {
		return rec, false
	}
	rest := int(c.size) - len(rec)
	if rest == 0 {
		return rec, true
	}
	buf := make([]byte, w.size)
	pages, next, mark := 0, 1, uint32(0)
	for no := c.overflow; rest > 0; no = binary.BigEndian.Uint32(buf) {
		// A chain that leads back into itself meets the page that was marked
		// last: the marks are ever farther apart.
		if no == mark || !w.read(no, buf) {
			return rec, false
		}
		if pages++; pages == next {
			mark, next = no, 2*next
		}
		n := min(rest, w.size-4)
		rec = append(rec, buf[4:4+n]...)
		rest -= n
	}
	return rec, true
}

// decodeRecord returns the values of a record: nil, int64, float64, string or
// []byte, which shares its memory. What a value lacks at the end of the record is
// left out of it if it is a text or a blob, and is nil otherwise. It returns nil if it is no
// record.
func decodeRecord(rec []byte) []any {
	size, k := sqliteVarint(rec)
	if k == 0 || size < uint64(k) || size > uint64(len(rec)) {
		return nil
	}
	types, body := rec[k:size], rec[size:]
	var values []any
	for len(types) > 0 && len(values) < recordColumns {
		t, k := sqliteVarint(types)
		if k == 0 {
			return nil
		}
		types = types[k:]
		var v any
		switch {
		case t == 8, t == 9:
			v = int64(t - 8)
		case t >= 12:
			n := int(min((t-12)/2, uint64(len(body))))
			if t%2 == 0 {
				v = body[:n:n]
			} else {
				v = string(body[:n])
			}
			body = body[n:]
		case t >= 1 && t <= 7:
			n := [8]int{0, 1, 2, 3, 4, 6, 8, 8}[t]
			if n > len(body) {
				body = nil
				break
			}
			i := int64(int8(body[0]))
			for _, b := range body[1:n] {
				i = i<<8 | int64(b)
			}
			if body = body[n:]; t == 7 {
				v = math.Float64frombits(uint64(i))
			} else {
				v = i
			}
		case t != 0:
			return nil // not in use
		}
		values = append(values, v)
	}
	return values
}
