package storage

import (
	"encoding/binary"
	"errors"
	"os"
)

// walHeader says how far the write-ahead log has come. SQLite keeps it in
// penstock.db-shm, in the format that its document walformat.html describes, in
// the byte order of the machine.
type walHeader struct {
	salt       [8]byte // differs for each round of the log
	pageSize   int64   // bytes
	frames     uint32  // pages in the log, of commits that are done
	backfilled uint32  // how many of them are in the database
}

const (
	walHeaderBytes   = 32 // at the beginning of the log
	frameHeaderBytes = 24 // before each page in it
	indexHeaderBytes = 48 // of the index: there are two copies
	indexInfoBytes   = 136
	indexBackfillAt  = 96       // how many frames are in the database
	indexBlockBytes  = 32 << 10 // of page numbers, and of a hash table that we don't need
	indexBlockFrames = 4096
	firstBlockFrames = indexBlockFrames - indexInfoBytes/4
)

// rest is how many pages of the log are not in the database yet.
func (h walHeader) rest() uint32 {
	return h.frames - min(h.backfilled, h.frames)
}

// end returns where in the log the frames up to n end, bytes.
func (h walHeader) end(n uint32) int64 {
	return walHeaderBytes + int64(n)*(h.pageSize+frameHeaderBytes)
}

// walIndex reads the index of the log while SQLite uses it. Closing any file
// descriptor of a file takes all locks that the process has on it (POSIX), and
// SQLite's are on these files: so they are opened once, and closed when the
// database is. The index is not locked for reading either: who reads must expect
// nonsense.
type walIndex struct{ file, database *os.File }

// openWALIndex opens the index of the database at path, which must be open in
// this process.
func openWALIndex(path string) (*walIndex, error) {
	f, err := os.OpenFile(path+"-shm", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	db, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &walIndex{f, db}, nil
}

// Close must not be called before the last connection to the database is closed.
func (w *walIndex) Close() error {
	if w == nil {
		return nil
	}
	return errors.Join(w.file.Close(), w.database.Close())
}

// sync has the kernel write what it has of the database file.
func (w *walIndex) sync() error {
	if w == nil {
		return nil
	}
	return w.database.Sync()
}

// moveAgain has the next checkpoint move all of the log. A checkpoint that does
// not reach the end of the log notes what it has moved without a sync; and the
// kernel, after a sync that failed, takes for written what it could not write, so
// that the next sync succeeds. Then the log would begin anew over pages that are
// nowhere else. A start after a crash does the same. Nobody else makes
// checkpoints, or the number could be another one by now.
func (w *walIndex) moveAgain() error {
	if w == nil {
		return nil
	}
	_, err := w.file.WriteAt(make([]byte, 4), indexBackfillAt)
	return err
}

// header returns the header; ok is false if there is none to read just now.
func (w *walIndex) header() (h walHeader, ok bool) {
	if w == nil {
		return h, false
	}
	var b [indexInfoBytes]byte
	for range 10 { // a commit writes one copy after the other
		if n, err := w.file.ReadAt(b[:], 0); err != nil || n < len(b) {
			return h, false
		}
		if one, two := [48]byte(b[:]), [48]byte(b[indexHeaderBytes:]); one != two {
			continue
		}
		h.pageSize = int64(binary.NativeEndian.Uint16(b[14:]))
		if h.pageSize == 1 {
			h.pageSize = 64 << 10
		}
		h.frames = binary.NativeEndian.Uint32(b[16:])
		h.salt = [8]byte(b[32:])
		h.backfilled = binary.NativeEndian.Uint32(b[indexBackfillAt:])
		return h, b[12] != 0 && h.pageSize >= 512 // it is initialised
	}
	return h, false
}

// pages returns the page numbers of the frames from, which is counted from 0,
// up to and without to. What cannot be read is left out.
func (w *walIndex) pages(from, to uint32) []uint32 {
	if w == nil || from >= to {
		return nil
	}
	numbers := make([]uint32, 0, min(to-from, 1<<16))
	for from < to {
		at, left := int64(indexInfoBytes)+int64(from)*4, firstBlockFrames-min(from, firstBlockFrames)
		if left == 0 {
			block, i := (from-firstBlockFrames)/indexBlockFrames, (from-firstBlockFrames)%indexBlockFrames
			at, left = int64(block+1)*indexBlockBytes+int64(i)*4, indexBlockFrames-i
		}
		n := min(left, to-from)
		b := make([]byte, 4*n)
		if _, err := w.file.ReadAt(b, at); err != nil {
			break
		}
		for i := range n {
			numbers = append(numbers, binary.NativeEndian.Uint32(b[4*i:]))
		}
		from += n
	}
	return numbers
}
