package broker

import (
	"strings"
	"testing"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// What a client may have unacknowledged is bounded in bytes too: a thousand
// messages of a megabyte would not fit into the memory while the disk is slow.
func TestHeldMessagesAreBounded(t *testing.T) {
	for _, version := range []byte{4, 5} {
		s := start(t, t.TempDir(), func(_ *Config, c *storage.Config) { c.CommitDelay = units.Duration(time.Second) })
		away, _ := s.connect(connectOptions{id: "away", version: 5, expiry: 100})
		away.subscribe(1, "t")
		away.disconnect()
		eventually(t, "the subscriber is away", func() bool { return s.b.Stats().Connections == 0 })
		pub, _ := s.connect(connectOptions{id: "pub", version: version, clean: true})
		const n, size = 30, 600 << 10
		go func() {
			for i := range n {
				if _, err := pub.c.Write(pub.publishPacket("t", strings.Repeat("x", size), 1, 0, uint16(1+i))); err != nil {
					return
				}
			}
		}()
		stop, sampled := make(chan struct{}), make(chan int64)
		go func() {
			most := int64(0)
			for {
				most = max(most, s.b.plane.held.Load())
				select {
				case <-stop:
					sampled <- most
					return
				case <-time.After(time.Millisecond):
				}
			}
		}()
		eventually(t, "as much as may be is waited for", func() bool { return s.b.plane.held.Load() > heldLimit/2 })
		for i := range n {
			pub.expectAck(typePuback, uint16(1+i))
		}
		close(stop)
		most := <-sampled
		if most > heldLimit+size+100 {
			t.Errorf("v%d: up to %d bytes were held, want at most the %d that may be", version, most, heldLimit)
		}
		eventually(t, "nothing is held", func() bool { return s.b.plane.held.Load() == 0 })
	}
}
