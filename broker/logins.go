package broker

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"sync"
)

// maxLogins is how many verified logins are remembered.
const maxLogins = 10000

// logins remembers which passwords were verified since the start. To hash one
// takes 60 ms on a small gateway, one at a time: without it a fleet that comes
// back after a power cut, or a flood of wrong passwords, would keep out those
// who are known. The passwords themselves are not kept, nor anything that helps
// to guess them: only a MAC under a key that is never stored. The zero value
// is ready, for all goroutines.
type logins struct {
	mu    sync.Mutex
	key   []byte
	known map[[sha256.Size]byte]struct{}
}

// mark is what is remembered of a password for a stored hash: when the hash is
// replaced, what was verified against the old one is forgotten. l.mu is held.
func (l *logins) mark(hash string, password []byte) (sum [sha256.Size]byte) {
	if l.key == nil {
		l.key = make([]byte, sha256.Size)
		rand.Read(l.key) // never fails: it ends the process instead
	}
	mac := hmac.New(sha256.New, l.key)
	mac.Write([]byte(hash)) // never fails, and a hash of ours holds no zero
	mac.Write([]byte{0})
	mac.Write(password)
	mac.Sum(sum[:0])
	return sum
}

// has reports whether password was verified against hash before.
func (l *logins) has(hash string, password []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.known[l.mark(hash, password)]
	return ok
}

// add remembers that password was verified against hash.
func (l *logins) add(hash string, password []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known == nil {
		l.known = make(map[[sha256.Size]byte]struct{})
	}
	if len(l.known) >= maxLogins {
		for old := range l.known { // any one: the map's order is random
			delete(l.known, old)
			break
		}
	}
	l.known[l.mark(hash, password)] = struct{}{}
}
