package storage

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// diskOp is something that SQLite did to a file.
type diskOp struct {
	kind   byte // 'w' write, 't' truncate, 's' sync, 'd' delete, 'l' sync that failed
	path   string
	offset int64
	data   []byte
}

// tape is a layer below SQLite: a VFS that hands everything on to the usual one,
// and notes what is done to files while it is on. From the notes the disk is
// made as a power cut would have left it.
var tape struct {
	sync.Mutex
	on       bool
	ops      []diskOp
	failAt   int                                     // the operation that fails, from 1; 0: none
	failWith int32                                   // SQLite's result code for it
	closed   int                                     // how many files cannot be opened from that on
	failSync string                                  // syncs of files whose name ends so fail; empty: none
	before   func(kind byte, path string)            // called before an operation; it may block
	under    uintptr                                 // the VFS below
	paths    map[uintptr]string                      // of open files
	methods  map[uintptr]sqlite3.Tsqlite3_io_methods // of open files, those below
	wrappers map[uintptr]uintptr                     // the methods that replace others
}

// recordDisk begins to note what is done to all databases that are opened from
// here on.
func recordDisk() {
	installTape()
	tape.Lock()
	defer tape.Unlock()
	tape.on, tape.ops, tape.failAt, tape.closed = true, nil, 0, 0
}

// failDisk has the nth operation from here on fail with a result code of
// SQLite's, instead of being done.
func failDisk(n int, with int32) {
	recordDisk()
	tape.Lock()
	defer tape.Unlock()
	tape.failAt, tape.failWith = n, with
}

// hold has a function called before each operation, on whatever goroutine does
// it; nil: none.
func hold(before func(kind byte, path string)) {
	installTape()
	tape.Lock()
	defer tape.Unlock()
	tape.before = before
}

// wait calls what hold has set. tape is not locked.
func wait(kind byte, file uintptr) {
	tape.Lock()
	before, path := tape.before, tape.paths[file]
	tape.Unlock()
	if before != nil {
		before(kind, path)
	}
}

// note notes an operation, unless it fails: then the result code is not 0.
// tape is locked.
func note(op diskOp) (rc int32) {
	if !tape.on {
		return 0
	}
	tape.ops = append(tape.ops, op)
	if len(tape.ops) == tape.failAt {
		if op.kind == 's' {
			tape.ops[len(tape.ops)-1].kind = 'l'
		}
		return tape.failWith
	}
	return 0
}

// installTape puts the tape under all databases, for good.
var installTape = sync.OnceFunc(func() {
	tls := libc.NewTLS()
	tape.under = sqlite3.Xsqlite3_vfs_find(tls, 0)
	tape.paths, tape.methods, tape.wrappers = map[uintptr]string{}, map[uintptr]sqlite3.Tsqlite3_io_methods{}, map[uintptr]uintptr{}
	over := libc.Xcalloc(tls, 1, libc.Tsize_t(unsafe.Sizeof(sqlite3.Tsqlite3_vfs{})))
	name, err := libc.CString("tape")
	if err != nil || over == 0 {
		panic(fmt.Sprint("no memory: ", err))
	}
	v := (*sqlite3.Tsqlite3_vfs)(at(over))
	*v = *(*sqlite3.Tsqlite3_vfs)(at(tape.under))
	v.FpNext, v.FzName = 0, name
	v.FxOpen, v.FxDelete = code(tapeOpen), code(tapeDelete)
	if rc := sqlite3.Xsqlite3_vfs_register(tls, over, 1); rc != 0 {
		panic(fmt.Sprint("register: ", rc))
	}
})

// stopRecording returns what was noted; from here on nothing is.
func stopRecording() []diskOp {
	tape.Lock()
	defer tape.Unlock()
	tape.on = false
	return tape.ops
}

// recorded returns how much was noted so far.
func recorded() int {
	tape.Lock()
	defer tape.Unlock()
	return len(tape.ops)
}

// at and code turn C's pointers into Go's and back, as the translated SQLite
// does it.
func at(p uintptr) unsafe.Pointer { return unsafe.Add(nil, p) }

func code(f any) uintptr { return (*[2]uintptr)(unsafe.Pointer(&f))[1] }

type (
	openFunc     = func(tls *libc.TLS, vfs, name, file uintptr, flags int32, out uintptr) int32
	deleteFunc   = func(tls *libc.TLS, vfs, name uintptr, sync int32) int32
	writeFunc    = func(tls *libc.TLS, file, buf uintptr, n int32, offset int64) int32
	truncateFunc = func(tls *libc.TLS, file uintptr, size int64) int32
	syncFunc     = func(tls *libc.TLS, file uintptr, flags int32) int32
)

// function returns the Go function behind a pointer of the translated C.
func function[F any](p uintptr) F {
	box := &struct{ p uintptr }{p}
	return *(*F)(unsafe.Pointer(box))
}

func tapeOpen(tls *libc.TLS, _, name, file uintptr, flags int32, out uintptr) int32 {
	tape.Lock()
	defer tape.Unlock()
	if tape.on && tape.failAt > 0 && len(tape.ops) >= tape.failAt && tape.closed > 0 {
		tape.closed--
		(*sqlite3.Tsqlite3_file)(at(file)).FpMethods = 0
		return sqlite3.SQLITE_CANTOPEN
	}
	rc := function[openFunc]((*sqlite3.Tsqlite3_vfs)(at(tape.under)).FxOpen)(tls, tape.under, name, file, flags, out)
	f := (*sqlite3.Tsqlite3_file)(at(file))
	if rc != 0 || name == 0 || f.FpMethods == 0 {
		return rc
	}
	below := f.FpMethods
	tape.paths[file] = libc.GoString(name)
	tape.methods[file] = *(*sqlite3.Tsqlite3_io_methods)(at(below))
	if tape.wrappers[below] == 0 {
		over := libc.Xcalloc(tls, 1, libc.Tsize_t(unsafe.Sizeof(sqlite3.Tsqlite3_io_methods{})))
		m := (*sqlite3.Tsqlite3_io_methods)(at(over))
		*m = tape.methods[file]
		m.FiVersion = min(m.FiVersion, 2) // no memory mapping, which nobody could note
		m.FxWrite, m.FxTruncate, m.FxSync = code(tapeWrite), code(tapeTruncate), code(tapeSync)
		tape.wrappers[below] = over
	}
	f.FpMethods = tape.wrappers[below]
	return rc
}

func tapeDelete(tls *libc.TLS, _, name uintptr, sync int32) int32 {
	tape.Lock()
	defer tape.Unlock()
	if rc := note(diskOp{kind: 'd', path: libc.GoString(name)}); rc != 0 {
		return rc
	}
	return function[deleteFunc]((*sqlite3.Tsqlite3_vfs)(at(tape.under)).FxDelete)(tls, tape.under, name, sync)
}

func tapeWrite(tls *libc.TLS, file, buf uintptr, n int32, offset int64) int32 {
	wait('w', file)
	tape.Lock()
	defer tape.Unlock()
	if rc := note(diskOp{'w', tape.paths[file], offset, slices.Clone(libc.GoBytes(buf, int(n)))}); rc != 0 {
		return rc
	}
	return function[writeFunc](tape.methods[file].FxWrite)(tls, file, buf, n, offset)
}

func tapeTruncate(tls *libc.TLS, file uintptr, size int64) int32 {
	tape.Lock()
	defer tape.Unlock()
	if rc := note(diskOp{kind: 't', path: tape.paths[file], offset: size}); rc != 0 {
		return rc
	}
	return function[truncateFunc](tape.methods[file].FxTruncate)(tls, file, size)
}

func tapeSync(tls *libc.TLS, file uintptr, flags int32) int32 {
	wait('s', file)
	tape.Lock()
	rc, below := note(diskOp{kind: 's', path: tape.paths[file]}), tape.methods[file].FxSync
	if tape.failSync != "" && strings.HasSuffix(tape.paths[file], tape.failSync) {
		rc = sqlite3.SQLITE_IOERR_FSYNC
	}
	tape.Unlock() // a sync of one file must not hold up another
	if rc != 0 {
		return rc
	}
	return function[syncFunc](below)(tls, file, flags)
}

// disk is files as a disk has them: what was synced is there, of what came
// after nobody knows.
type disk struct {
	files   map[string][]byte
	pending map[string][]diskOp
}

func newDisk() *disk { return &disk{map[string][]byte{}, map[string][]diskOp{}} }

// do does one operation.
func (d *disk) do(op diskOp) {
	switch op.kind {
	case 's':
		for _, p := range d.pending[op.path] {
			d.files[op.path] = applied(d.files[op.path], p)
		}
		delete(d.pending, op.path)
	case 'l': // the kernel takes what it could not write for written, and forgets it
		delete(d.pending, op.path)
	case 'd':
		delete(d.files, op.path)
		delete(d.pending, op.path)
	default:
		d.pending[op.path] = append(d.pending[op.path], op)
	}
}

// applied returns a file after an operation, in memory of its own.
func applied(old []byte, op diskOp) []byte {
	size := len(old)
	if op.kind == 't' {
		size = int(op.offset)
	} else {
		size = max(size, int(op.offset)+len(op.data))
	}
	b := make([]byte, size)
	copy(b, old)
	if op.kind == 'w' {
		copy(b[op.offset:], op.data)
	}
	return b
}

// sector is what a disk writes whole or not at all, bytes.
const sector = 512

// cut returns the files as they are after a cut: of what was not synced, any
// part may have reached the disk, in any order, sector by sector.
func (d *disk) cut(rng *rand.Rand) map[string][]byte {
	out := make(map[string][]byte, len(d.files))
	for path, b := range d.files {
		out[path] = b
	}
	kind := rng.IntN(4)
	for path, ops := range d.pending {
		switch kind {
		case 0: // nothing has
			continue
		case 1: // all has, up to somewhere
			ops = ops[:rng.IntN(len(ops)+1)]
		case 2: // some has
			ops = slices.DeleteFunc(slices.Clone(ops), func(diskOp) bool { return rng.IntN(2) == 0 })
		}
		for i, op := range ops {
			if op.kind == 'w' && (kind == 3 || i == len(ops)-1) { // torn
				for at := 0; at < len(op.data); at += sector {
					if rng.IntN(4) > 0 {
						piece := op.data[at:min(at+sector, len(op.data))]
						out[path] = applied(out[path], diskOp{'w', path, op.offset + int64(at), piece})
					}
				}
				continue
			}
			out[path] = applied(out[path], op)
		}
	}
	return out
}
