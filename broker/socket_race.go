//go:build race

package broker

import "syscall"

// The race detector knows that what was written to a socket was written before
// it was read, but only of these calls.

func readNonblock(fd uintptr, b []byte) (int, error)  { return again(syscall.Read, fd, b) }
func writeNonblock(fd uintptr, b []byte) (int, error) { return again(syscall.Write, fd, b) }

// again makes the call, again where a signal has interrupted it.
func again(call func(int, []byte) (int, error), fd uintptr, b []byte) (int, error) {
	for {
		if n, err := call(int(fd), b); err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
