package broker

import (
	"penstock/storage"
)

// will is the Will Message of a connected client (3.1.2.5), or one whose
// client went and whose delay has not passed. It is stored, so that the will
// of a client that was connected when the power went is published too.
type will struct {
	msg   *storage.Message // Expires is the interval in milliseconds plus one, counting from the publication; 0: none
	delay uint32           // Will Delay Interval, seconds
	due   int64            // stamp of when to publish it; 0 while the client is connected. Guarded by plane.sessMu
	kept  int64            // the due that is stored, or about to be. Likewise
	who   *principal       // whose rights count; nil after a restart, when they were checked before
}

// arm remembers the will of a client that has just connected.
func (p *plane) arm(clientID string, w *will) {
	p.sessMu.Lock()
	if old := p.wills[clientID]; old != nil {
		p.willBytes.Add(-int64(old.msg.Size()))
	}
	p.wills[clientID] = w
	p.willBytes.Add(int64(w.msg.Size()))
	p.sessMu.Unlock()
	// The will is read when the commit runs, or clients that come and go while
	// commits fail would pile theirs up. One that is gone by then has its
	// deletion later in the journal, behind its message.
	p.journal.Change(func(tx storage.Tx) error {
		w, due := p.willToKeep(clientID)
		if w == nil {
			return nil
		}
		return tx.PutWill(storage.Will{ClientID: clientID, Delay: w.delay, Due: due, Message: w.msg})
	}, nil)
}

// willToKeep returns a client's will, nil if there is none, and when it is due, which
// the caller stores now.
func (p *plane) willToKeep(clientID string) (w *will, due int64) {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	if w = p.wills[clientID]; w != nil {
		due, w.kept = w.due, w.due
	}
	return w, due
}

// disarm forgets a will that shall not be published. It reports whether it
// was still there.
func (p *plane) disarm(clientID string, w *will) bool {
	p.sessMu.Lock()
	there := p.wills[clientID] == w
	if there {
		delete(p.wills, clientID)
		p.willBytes.Add(-int64(w.msg.Size()))
	}
	p.sessMu.Unlock()
	if there {
		p.journal.Change(func(tx storage.Tx) error { return tx.DeleteWill(clientID) }, nil)
	}
	return there
}

// fireWill publishes a will. The message is added to the journal ahead of the
// will's deletion: a cut between the two publishes it twice, not never.
func (p *plane) fireWill(clientID string, w *will, b *batch) {
	p.sessMu.Lock()
	there := p.wills[clientID] == w
	p.sessMu.Unlock()
	if !there {
		return
	}
	m := *w.msg
	if m.Expires != 0 {
		m.Expires += p.now() - 1
	}
	if w.who == nil || p.acl.Load().allows(*w.who, actionPublish, m.Topic) {
		if p.fullFor(&m) {
			p.limit(limitRetained)
			m.Retain = false // published, but not kept
		}
		p.publishAs(receipt{promised: true}, p.session(clientID), &m, b, nil)
		if m.Retain {
			p.journal.HurryRetained(m.Topic)
		}
	}
	p.disarm(clientID, w)
}

// willRoom reports whether a client's new will has room. The one that it takes
// the place of makes some.
func (p *plane) willRoom(clientID string, m *storage.Message) bool {
	p.sessMu.Lock()
	defer p.sessMu.Unlock()
	size := int64(m.Size())
	if old := p.wills[clientID]; old != nil {
		size -= int64(old.msg.Size())
	}
	return size <= 0 || p.willBytes.Load()+size <= int64(p.cfg.MaxRetained)
}
