package broker

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// fill reads more from the socket, until at least one more byte of a packet
// of the given size is there. It is where a connection waits; before it does
// so, everything that gathered is sent.
func (c *conn) fill(size int) error {
	c.settle()
	if err := c.awaitOutput(); err != nil {
		return err
	}
	if c.up && c.heard {
		c.heard = false
		c.touch()
	}
	waking := c.parking()
	if waking {
		c.holding.Store(true)
		if !c.over() {
			c.holding.Store(false)
			c.rearm()
			return nil
		}
	}
	n, err := c.receive(size)
	c.networkIn += uint64(n)
	if waking {
		c.holding.Store(false)
		c.rearm() // the deadline may have been moved to wake us
		if n == 0 && !c.over() && !c.closed.Load() {
			return nil
		}
	}
	if n > 0 {
		return nil
	}
	if c.closed.Load() {
		return errClosed
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		if !c.up {
			c.b.plane.limit(limitConnectTimeout)
			return c.fail(&wireError{reasonUnspecified, "no CONNECT in time"})
		}
		if c.keepAlive == 0 || time.Now().Before(c.deadline) {
			c.rearm() // somebody woke us, too late to be of use
			return nil
		}
		return c.fail(&wireError{reasonKeepAlive, "keep alive timed out"}) // [MQTT-3.1.2-22]
	}
	return err
}

// receive waits for bytes of a packet of the given size, and reads what is
// there. It returns how many came.
func (c *conn) receive(size int) (int, error) {
	c.need = size
	if c.raw != nil {
		c.readN, c.readErr = 0, nil
		if err := c.raw.Read(c.readable); err != nil {
			return 0, err
		}
		return c.readN, c.readErr
	}
	if c.r == c.w {
		c.release()
		if c.small == nil {
			c.small = new([smallBuffer]byte)
		}
		c.in = c.small[:]
	}
	c.makeRoom()
	n, err := c.sock.Read(c.in[c.w:])
	c.w += n
	return n, err
}

// readNow reads what the socket has. It returns false when that is nothing:
// then the runtime waits, and meanwhile the connection has no buffer.
func (c *conn) readNow(fd uintptr) bool {
	c.makeRoom()
	switch n, err := readNonblock(fd, c.in[c.w:]); {
	case err == syscall.EAGAIN:
		c.shelve()
		return false
	case err != nil:
		c.readErr = os.NewSyscallError("read", err)
	case n == 0:
		c.readErr = io.EOF
	default:
		c.readN = n
		c.w += n
	}
	return true
}

// makeRoom makes room in the input buffer for at least one byte, and for the whole
// packet where the buffer is large enough. A larger one is taken only when the
// bytes have come that fill this one: a length announced costs nothing.
func (c *conn) makeRoom() {
	switch {
	case c.r == c.w:
		c.r, c.w = 0, 0
	case c.r > 0 && (c.r+c.need > len(c.in) || c.w == len(c.in)):
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	if c.w < len(c.in) {
		return
	}
	class := bigClass
	if !c.up || c.raw == nil { // a CONNECT is small, and who is not raw may wait for long with what it has
		class = 0
	}
	next := getBuffer(class, c.w-c.r+1)
	n := copy(next.bytes, c.in[c.r:c.w])
	c.release()
	c.inOf, c.in, c.w = next, next.bytes, n
}

// shelve keeps of the input buffer only what is unread, while the connection
// waits. A buffer that is mostly full is kept as it is.
func (c *conn) shelve() {
	unread := c.in[c.r:c.w]
	if c.inOf == nil || len(unread) > len(c.in)/4 {
		return
	}
	var kept []byte
	if len(unread) > 0 {
		kept = make([]byte, len(unread))
		copy(kept, unread)
	}
	c.release()
	c.in, c.w = kept, len(kept)
}

// release gives the input buffer back.
func (c *conn) release() {
	c.inOf.free()
	c.in, c.inOf, c.r, c.w = nil, nil, 0, 0
}
