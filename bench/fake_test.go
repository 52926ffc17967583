package main

import (
	"bytes"
	"encoding/binary"
	"net"
	"strings"
	"sync"
)

// faults are what a fake broker does wrong, to show that the generator notices.
// Each names a message by its sequence number; 0, the first, is left alone.
type faults struct {
	lose, repeat, swap uint64
	lowerQoS           uint64
	forgetSession      bool
	silent             uint64 // it is never acknowledged
	wrongAck           uint64
}

// fake is the smallest broker that the generator's workloads can do with.
type fake struct {
	faults faults
	l      net.Listener
	wg     sync.WaitGroup

	mu       sync.Mutex
	sessions map[string]*fakeSession
	open     map[net.Conn]bool
}

type fakeSession struct {
	conn   net.Conn // nil when offline
	filter string
	queue  [][]byte // what came meanwhile
	nextID uint16
	held   []byte // the message that changes places with its successor
}

func newFake(f faults) (*fake, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &fake{faults: f, l: l, sessions: map[string]*fakeSession{}, open: map[net.Conn]bool{}}
	b.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.open[conn] = true
			b.mu.Unlock()
			b.wg.Go(func() { b.serve(conn) })
		}
	})
	return b, nil
}

func (b *fake) addr() string { return b.l.Addr().String() }

func (b *fake) close() {
	b.l.Close()
	b.mu.Lock()
	for conn := range b.open {
		conn.Close()
	}
	b.mu.Unlock()
	b.wg.Wait()
}

func (b *fake) serve(conn net.Conn) {
	defer conn.Close()
	c := &client{conn: conn, in: make([]byte, readBytes)}
	var s *fakeSession
	id, clean := "", false
	waiting := map[uint16]frame{} // QoS 2 messages whose PUBREL has not come
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.open, conn)
		if s != nil && s.conn == conn {
			s.conn = nil
			if clean {
				delete(b.sessions, id)
			}
		}
	}()
	for {
		f, ok, err := c.next()
		if err == nil && !ok {
			err = c.fill()
		}
		if err != nil {
			return
		}
		if !ok {
			continue
		}
		b.mu.Lock()
		switch f.kind() {
		case 1: // CONNECT
			clean = f.body[7]&2 != 0
			id = string(f.body[12:])
			s = b.sessions[id]
			present := byte(1)
			if s == nil || clean || b.faults.forgetSession {
				s, present = &fakeSession{}, 0
				b.sessions[id] = s
			}
			s.conn = conn
			conn.Write([]byte{connack << 4, 2, present, 0})
			for _, p := range s.queue {
				conn.Write(p)
			}
			s.queue = nil
		case 8: // SUBSCRIBE
			n := int(binary.BigEndian.Uint16(f.body[2:]))
			s.filter = string(f.body[4 : 4+n])
			conn.Write([]byte{suback << 4, 3, f.body[0], f.body[1], f.body[4+n]})
		case publish:
			m, _ := f.message()
			if m.qos == 2 {
				waiting[m.packetID] = frame{f.first, bytes.Clone(f.body)}
			} else {
				b.route(f, m)
			}
			if m.qos > 0 && (m.seq == 0 || m.seq != b.faults.silent) {
				ack := m.packetID
				if m.seq > 0 && m.seq == b.faults.wrongAck {
					ack += 1000
				}
				conn.Write(appendAck(nil, puback+m.qos-1, ack))
			}
		case pubrec, pubrel:
			packetID, _ := f.packetID()
			if held, ok := waiting[packetID]; ok {
				delete(waiting, packetID)
				m, _ := held.message()
				b.route(held, m)
			}
			conn.Write(appendAck(nil, f.kind()+1, packetID))
		case 12: // PINGREQ
			conn.Write([]byte{pingresp << 4, 0})
		case 14: // DISCONNECT
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
	}
}

// route sends a message to each session whose filter matches.
func (b *fake) route(f frame, m message) {
	n := int(binary.BigEndian.Uint16(f.body))
	topic, payload := string(f.body[2:2+n]), f.body[len(f.body)-payloadBytes:]
	for _, s := range b.sessions {
		prefix, suffix, wild := strings.Cut(s.filter, "+")
		if s.filter != topic && (!wild || !strings.HasPrefix(topic, prefix) || !strings.HasSuffix(topic, suffix)) {
			continue
		}
		qos := m.qos
		if m.seq > 0 && m.seq == b.faults.lowerQoS {
			qos--
		}
		t := newTemplate(topic, qos, payloadBytes, m.publisher)
		copy(t.data[len(t.data)-payloadBytes:], payload)
		s.nextID++
		p := t.append(nil, s.nextID, m.seq)
		switch {
		case m.seq == 0:
			s.send(p)
		case m.seq == b.faults.lose:
		case m.seq == b.faults.repeat:
			s.send(p)
			s.send(p)
		case m.seq == b.faults.swap:
			s.held = p
		default:
			s.send(p)
			if s.held != nil {
				s.send(s.held)
				s.held = nil
			}
		}
	}
}

func (s *fakeSession) send(p []byte) {
	if s.conn == nil {
		s.queue = append(s.queue, p)
		return
	}
	s.conn.Write(p)
}
