package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// Dialers of the connect storm. Each has a source address of its own, so that
// there are ports enough however long the last ones are remembered.
const dialers = 16

// Options of Linux that package syscall does not name.
const (
	ipBindAddressNoPort = 24 // the port is chosen by connect, which knows the whole 4-tuple
	tcpSynCount         = 7  // how often a SYN that nobody answers is sent again
)

// runConnects lets dialers connect and disconnect, with a clean session each
// time, as fast as the broker lets them. They use blocking sockets: so the
// generator takes less of the machine than with Go's own.
func runConnects(ctx context.Context, t target, l load) ([]phase, error) {
	to, err := netip.ParseAddrPort(t.addr)
	if err != nil {
		return nil, err
	}
	g := newCrew(ctx)
	defer g.wg.Wait()
	defer g.cancel(nil)
	end, err := measure(t, "")
	if err != nil {
		return nil, err
	}
	var begun, done atomic.Uint64
	until := time.Now().Add(l.time)
	for i := range dialers {
		g.run("dialer", i, func() error {
			d := newDialer(i, to)
			for g.ctx.Err() == nil {
				if l.messages > 0 && begun.Add(1) > l.messages || l.messages == 0 && !time.Now().Before(until) {
					break
				}
				if err := d.visit(); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	g.wg.Wait()
	if err := g.err(); err != nil {
		return nil, err
	}
	ph, err := end(done.Load(), done.Load())
	ph.unit = "connections"
	return []phase{ph}, err
}

// A dialer opens one connection after the other.
type dialer struct {
	from, to syscall.SockaddrInet4
	hello    []byte // a CONNECT whose client identifier ends with a number
	number   uint32
	buf      [64]byte
}

func newDialer(i int, to netip.AddrPort) *dialer {
	d := &dialer{}
	d.to.Addr, d.to.Port = to.Addr().As4(), int(to.Port())
	d.from.Addr = [4]byte{127, 0, 1, byte(1 + i)}
	d.hello = appendConnect(nil, v311, "bench-visitor-"+strconv.Itoa(i)+"-00000000", true)
	return d
}

const visitTimeout = 10 * time.Second

// visit connects, waits for the CONNACK, says goodbye and waits until the
// broker has closed the connection: so it has handled the DISCONNECT.
func (d *dialer) visit() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer syscall.Close(fd)
	timeout := syscall.NsecToTimeval(int64(visitTimeout))
	if err := errors.Join(
		syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &timeout),
		// Closing resets: nothing of the connection is left behind.
		syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1}),
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, tcpSynCount, 3),
		syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, ipBindAddressNoPort, 1),
		syscall.Bind(fd, &d.from),
	); err != nil {
		return fmt.Errorf("set up a socket: %w", err)
	}
	if err := again(func() error { return syscall.Connect(fd, &d.to) }); err != nil && !errors.Is(err, syscall.EISCONN) {
		return fmt.Errorf("connect: %w", err)
	}
	d.number++
	digits := d.hello[len(d.hello)-8:]
	binary.BigEndian.PutUint64(digits, hexDigits(d.number))
	if err := d.write(fd, d.hello); err != nil {
		return err
	}
	got := 0
	for got < 4 {
		n, err := d.read(fd, d.buf[got:])
		if err != nil {
			return fmt.Errorf("await CONNACK: %w", err)
		}
		if n == 0 {
			return fmt.Errorf("connection closed after % x instead of a CONNACK", d.buf[:got])
		}
		got += n
	}
	if want := [4]byte{connack << 4, 2}; got != 4 || [4]byte(d.buf[:4]) != want {
		return fmt.Errorf("got % x, want the CONNACK % x", d.buf[:got], want)
	}
	if err := d.write(fd, disconnectPacket); err != nil {
		return err
	}
	if n, err := d.read(fd, d.buf[:]); n != 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("after DISCONNECT: got % x, error %v, want the end", d.buf[:max(0, n)], err)
	}
	return nil
}

func (d *dialer) write(fd int, b []byte) error {
	err := again(func() error { return syscall.Sendto(fd, b, syscall.MSG_NOSIGNAL, nil) })
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

func (d *dialer) read(fd int, b []byte) (n int, err error) {
	err = again(func() (err error) {
		n, err = syscall.Read(fd, b)
		return err
	})
	return max(0, n), err
}

// again repeats what one of the signals of Go's own scheduler has interrupted.
func again(f func() error) error {
	for {
		err := f()
		if !errors.Is(err, syscall.EINTR) && !errors.Is(err, syscall.EALREADY) {
			return err
		}
		runtime.Gosched()
	}
}

// hexDigits returns the eight digits of n as the bytes of a big-endian number.
func hexDigits(n uint32) uint64 {
	var v uint64
	for range 8 {
		v = v>>8 | uint64("0123456789abcdef"[n&15])<<56
		n >>= 4
	}
	return v
}
