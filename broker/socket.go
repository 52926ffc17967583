//go:build !race

package broker

import (
	"syscall"
	"unsafe"
)

// readNonblock and writeNonblock are read(2) and write(2) on a socket that does
// not block. Unlike syscall.Read and Write they say nothing to Go's scheduler:
// a call that never waits needs no other thread to take over, and each such word
// after a pause wakes the runtime's monitor, a second thread for every message
// of a quiet broker.
func readNonblock(fd uintptr, b []byte) (int, error) {
	return transfer(syscall.SYS_READ, fd, b)
}

func writeNonblock(fd uintptr, b []byte) (int, error) {
	return transfer(syscall.SYS_WRITE, fd, b)
}

// transfer makes the call, again where a signal has interrupted it. b is not
// empty.
func transfer(call, fd uintptr, b []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
			continue
		}
		return 0, errno
	}
}
