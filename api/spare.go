package api

import (
	"net"
	"net/http"
	"sync"
)

// spareConns are the connections on which no request has come yet; a browser
// keeps some ready. http.Server.Shutdown would wait five seconds for each.
type spareConns struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

// note is an http.Server's ConnState.
func (s *spareConns) note(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if state == http.StateNew {
		s.conns[c] = struct{}{}
	} else {
		delete(s.conns, c)
	}
}

func (s *spareConns) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close() // nobody waits for an answer
	}
}
