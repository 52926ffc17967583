package broker

import (
	"sync"
	"time"
)

// notices bounds what the log says of single connections: whoever connects a
// thousand times a second must not fill the flash with it.
type notices struct {
	mu    sync.Mutex
	full  time.Time // when the bucket is full again
	quiet int       // not logged since the last one that was
}

// A burst of noticeBurst notices is logged, then one every noticeEvery.
const (
	noticeBurst = 100
	noticeEvery = time.Second
)

// notice logs what happened to one connection, unless too much happens.
func (b *Broker) notice(msg string, args ...any) {
	n := &b.notices
	n.mu.Lock()
	now := time.Now()
	if n.full.Before(now) {
		n.full = now
	}
	if n.full.Sub(now) >= noticeBurst*noticeEvery {
		n.quiet++
		n.mu.Unlock()
		return
	}
	n.full = n.full.Add(noticeEvery)
	quiet := n.quiet
	n.quiet = 0
	n.mu.Unlock()
	b.log.Info(msg, notLogged(quiet, args...)...)
}
