package main

import (
	"bytes"
	"encoding/binary"
	"net"
	"slices"
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
	spoil              uint64 // as a retained message
	refuse             bool   // every CONNECT
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
	retained []frame // of MQTT 3.1.1
}

type fakeSession struct {
	conn    net.Conn // nil when offline
	version byte
	filters []string
	queue   [][]byte // what came meanwhile
	nextID  uint16
	held    []byte // the message that changes places with its successor
}

func newFake(f faults) (*fake, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return fakeOn(l, f), nil
}

func fakeOn(l net.Listener, f faults) *fake {
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
	return b
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
	defer conn.Close() // after it is known to be away
	c := &client{conn: conn, in: make([]byte, readBytes), version: v311}
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
			c.version = f.body[6]
			clean = f.body[7]&2 != 0
			id = string(f.body[12:])
			if c.version == v5 {
				id = string(f.body[13+int(f.body[10]):])
			}
			s = b.sessions[id]
			present := byte(1)
			if s == nil || clean || b.faults.forgetSession {
				s, present = &fakeSession{}, 0
				b.sessions[id] = s
			}
			s.conn, s.version = conn, c.version
			switch {
			case b.faults.refuse:
				conn.Write([]byte{connack << 4, 2, 0, 5})
			case c.version == v5:
				conn.Write([]byte{connack << 4, 6, present, 0, 3, 0x21, 1, 0}) // with a property
			default:
				conn.Write([]byte{connack << 4, 2, present, 0})
			}
			for _, p := range s.queue {
				conn.Write(p)
			}
			s.queue = nil
		case 8: // SUBSCRIBE
			head, list := f.body[:2], f.body[2:]
			answer := bytes.Clone(head)
			if c.version == v5 {
				answer, list = append(answer, 0), list[1:]
			}
			first := len(s.filters)
			for len(list) > 0 {
				n := int(binary.BigEndian.Uint16(list))
				s.filters = append(s.filters, string(list[2:2+n]))
				answer = append(answer, list[2+n])
				list = list[3+n:]
			}
			conn.Write(append(appendLength([]byte{suback << 4}, len(answer)), answer...))
			for _, kept := range b.retained {
				m, _ := kept.message(v311)
				if m.seq == 0 || m.seq != b.faults.lose {
					if b.faults.spoil > 0 && m.seq == b.faults.spoil {
						m.payload[len(m.payload)-1]++
					}
					b.deliver(s, s.filters[first:], kept, m)
				}
			}
		case publish:
			m, _ := f.message(c.version)
			if m.retain {
				b.retained = append(b.retained, frame{f.first, bytes.Clone(f.body)})
			}
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
				m, _ := held.message(c.version)
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

// route sends a message to each session that has a filter which matches.
func (b *fake) route(f frame, m message) {
	f.first &^= 1 // to those who have subscribed before, it is not a retained one
	for _, s := range b.sessions {
		b.deliver(s, s.filters, f, m)
	}
}

// matches is the matching of topic filters, without the rules for $ topics.
func matches(filter, topic string) bool {
	for {
		f, moreFilter, deeper := strings.Cut(filter, "/")
		level, moreTopic, longer := strings.Cut(topic, "/")
		if f == "#" {
			return true
		}
		if f != "+" && f != level {
			return false
		}
		if !deeper || !longer {
			return deeper == longer || deeper && moreFilter == "#"
		}
		filter, topic = moreFilter, moreTopic
	}
}

// deliver sends a message to a session if one of the filters matches.
func (b *fake) deliver(s *fakeSession, filters []string, f frame, m message) {
	if slices.ContainsFunc(filters, func(filter string) bool { return matches(filter, string(m.topic)) }) {
		qos := m.qos
		if m.seq > 0 && m.seq == b.faults.lowerQoS {
			qos--
		}
		t := newTemplate(s.version, string(m.topic), qos, len(m.payload), m.publisher)
		copy(t.data[len(t.data)-len(m.payload):], m.payload)
		t.data[0] |= f.first & 1
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
