package broker

import (
	"context"
	"fmt"
	"sync/atomic"

	"penstock/storage"
)

// salvaged returns the report of a damaged database, nil if there is none.
func (b *Broker) salvaged() *storage.SalvageReport {
	if b.db == nil { // of a test that needs none
		return nil
	}
	return b.db.Salvage()
}

// damage says, for people, what is or was damaged in the database.
func (b *Broker) damage() (reasons []string) {
	if b.db == nil {
		return nil
	}
	if why := b.db.Damage(); why != "" {
		reasons = append(reasons, "damage: the next start salvages the database: "+why)
	}
	if r := b.db.Salvage(); r != nil {
		reasons = append(reasons, r.Summary())
	}
	return reasons
}

// goOnSalvaging puts into the queues what a start had no time to read of a
// damaged database, a segment at a time: the next one when the last is durable,
// so that memory is bounded and new traffic shares each commit.
func (b *Broker) goOnSalvaging(ctx context.Context) {
	began := false
	err := b.db.Remaining(ctx, func(recs []storage.SalvagedRecord) error {
		if !began {
			began = true
			b.log.Info("queues are read on from the damaged database")
		}
		return b.plane.giveAgain(ctx, recs)
	})
	switch {
	case err == nil && began:
		b.log.Info("queues are read from the damaged database")
	case err != nil && ctx.Err() == nil:
		b.log.Error("queues could not all be read from the damaged database, the next start goes on", "err", err)
	}
}

// giveAgain puts records of a damaged database at the end of the queues of those
// sessions that are still there, as new deliveries: their old sequence numbers
// may be in use again. It returns when all of them are durable or acknowledged, or
// ctx's error. Nobody waits for it but its caller.
func (p *plane) giveAgain(ctx context.Context, recs []storage.SalvagedRecord) error {
	var b batch
	var open atomic.Int32
	done := make(chan struct{})
	settled := func(*batch) {
		if open.Add(-1) == 0 {
			close(done)
		}
	}
	open.Store(1)
	for _, rec := range recs {
		open.Add(1)
		r := receipt{acks: &ackQueue{}}
		r.ticket().then = settled
		m := clone(rec.Message) // or one of them would keep the whole segment in memory
		for _, c := range rec.Claims {
			p.giveClaim(m, c, &r, &b)
		}
		if r.pub != nil {
			p.journal.Publish(r.pub)
		}
		r.t.release(&b)
	}
	settled(&b)
	b.flush()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a commit: %w", ctx.Err())
	}
}

// giveClaim puts one claim at the end of its session's queue.
func (p *plane) giveClaim(m *storage.Message, c storage.SalvagedClaim, r *receipt, b *batch) {
	p.sessMu.Lock()
	s := p.byID[c.Session]
	p.sessMu.Unlock()
	if s == nil || s.clientID != c.ClientID { // it ended meanwhile, and another may have its number
		p.drop(dropSessionEnded)
		return
	}
	share := p.shareKey(c.Share)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		p.drop(dropSessionEnded)
		return
	}
	e := s.enqueue(m, c.QoS, c.Retain, c.Identifiers, b)
	e.share = share
	r.t.owe()
	e.ticket = r.t
	pub := r.publication(m)
	pub.Claims = append(pub.Claims, e)
	s.pump(b)
}
