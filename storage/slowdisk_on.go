//go:build slowdisk

package storage

import (
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// slow is the layer between SQLite and a disk that takes longer to sync than the
// one that there is.
var slow struct {
	sync.Mutex
	takes    time.Duration // more that each sync takes
	under    uintptr       // the VFS below
	methods  sqlite3.Tsqlite3_io_methods
	wrappers map[uintptr]uintptr // methods below, to those that wait
}

// slowDisk has each fsync of every database that is opened from here on take
// longer, by what PENSTOCK_FSYNC says, as "20ms". It panics if that is no
// duration: nobody shall measure a disk that is not slow.
var slowDisk = sync.OnceFunc(func() {
	takes := os.Getenv("PENSTOCK_FSYNC")
	if takes == "" {
		return
	}
	var err error
	if slow.takes, err = time.ParseDuration(takes); err != nil {
		panic(fmt.Sprint("PENSTOCK_FSYNC: ", err))
	}
	tls := libc.NewTLS()
	slow.under = sqlite3.Xsqlite3_vfs_find(tls, 0)
	slow.wrappers = make(map[uintptr]uintptr)
	over := libc.Xcalloc(tls, 1, libc.Tsize_t(unsafe.Sizeof(sqlite3.Tsqlite3_vfs{})))
	name, err := libc.CString("slow")
	if err != nil || over == 0 {
		panic(fmt.Sprint("no memory: ", err))
	}
	v := (*sqlite3.Tsqlite3_vfs)(unsafe.Add(nil, over))
	*v = *(*sqlite3.Tsqlite3_vfs)(unsafe.Add(nil, slow.under))
	v.FpNext, v.FzName = 0, name
	v.FxOpen = codeOf(slowOpen)
	if rc := sqlite3.Xsqlite3_vfs_register(tls, over, 1); rc != 0 {
		panic(fmt.Sprint("register: ", rc))
	}
})

// codeOf and funcOf turn Go's functions into C's pointers and back, as the
// translated SQLite does it.
func codeOf(f any) uintptr { return (*[2]uintptr)(unsafe.Pointer(&f))[1] }

func funcOf[F any](p uintptr) F {
	box := &struct{ p uintptr }{p}
	return *(*F)(unsafe.Pointer(box))
}

func slowOpen(tls *libc.TLS, _, name, file uintptr, flags int32, out uintptr) int32 {
	rc := funcOf[func(*libc.TLS, uintptr, uintptr, uintptr, int32, uintptr) int32]((*sqlite3.Tsqlite3_vfs)(unsafe.Add(nil, slow.under)).FxOpen)(tls, slow.under, name, file, flags, out)
	f := (*sqlite3.Tsqlite3_file)(unsafe.Add(nil, file))
	if rc != 0 || f.FpMethods == 0 {
		return rc
	}
	slow.Lock()
	defer slow.Unlock()
	below := f.FpMethods
	if slow.wrappers[below] == 0 {
		over := libc.Xcalloc(tls, 1, libc.Tsize_t(unsafe.Sizeof(sqlite3.Tsqlite3_io_methods{})))
		m := (*sqlite3.Tsqlite3_io_methods)(unsafe.Add(nil, over))
		*m = *(*sqlite3.Tsqlite3_io_methods)(unsafe.Add(nil, below))
		slow.methods = *m // those of a database and of its log have one xSync
		m.FxSync = codeOf(slowSync)
		slow.wrappers[below] = over
	}
	f.FpMethods = slow.wrappers[below]
	return rc
}

// slowSync waits in the kernel, as fsync does: one of Go's timers would add up to
// a millisecond.
func slowSync(tls *libc.TLS, file uintptr, flags int32) int32 {
	end := time.Now().Add(slow.takes)
	for left := slow.takes; left > 0; left = time.Until(end) {
		ts := syscall.NsecToTimespec(int64(left))
		_ = syscall.Nanosleep(&ts, nil) // when it is interrupted, then it is called again
	}
	return funcOf[func(*libc.TLS, uintptr, int32) int32](slow.methods.FxSync)(tls, file, flags)
}
