package broker

import "sync"

// buffer is memory for input or output of connections. A connection has one
// only while there is something to read or to write, so that ten thousand idle
// ones need none.
type buffer struct {
	bytes []byte // its whole size
	class int
}

// Sizes of buffers, bytes.
const (
	smallBuffer = 1 << 10  // class 0
	midBuffer   = 8 << 10  // class 1
	bigBuffer   = 64 << 10 // class 2; each further class is twice as large
)

// bigClass is the class of what is read into.
const bigClass = 2

// The last class is of 512 MiB, more than the largest packet.
var buffers [16]sync.Pool

// bufferSize returns the size of the buffers of a class.
func bufferSize(class int) int {
	switch class {
	case 0:
		return smallBuffer
	case 1:
		return midBuffer
	}
	return bigBuffer << (class - bigClass)
}

// getBuffer returns a buffer of at least the given size, in a class not below
// the one given.
func getBuffer(class, size int) *buffer {
	for bufferSize(class) < size {
		class++
	}
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{bytes: make([]byte, bufferSize(class)), class: class}
}

// free gives the buffer back. It may be nil.
func (b *buffer) free() {
	if b != nil {
		buffers[b.class].Put(b)
	}
}
