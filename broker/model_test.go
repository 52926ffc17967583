package broker

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"penstock/storage"
	"penstock/storage/storagetest"
)

// The model checker runs the real session, ticket and journal code against
// clients that keep MQTT's rules to the letter, over a store that loses what
// was not committed. Every step is drawn from a seed: a packet moves, a commit
// runs or fails, a connection breaks, the power goes. Then the run is brought
// to rest and the promises of docs/delivery.md are checked.

// In half of the runs packet identifiers are scarce, so that they come round to
// the same ones often; block and window are small against them, as they are in
// the product. In the other half there are plenty, and clients acknowledge on
// the next connection what they received on the last one: that is only safe
// while identifiers do not come round within a moment.
const (
	scarceIDs   = 16
	plentyIDs   = 4096
	modelBlock  = 3
	modelWindow = 3
)

type simPacket struct {
	kind   byte
	id     uint16
	qos    byte
	dup    bool
	retain bool
	from   int // publisher
	n      int // its message's number
}

// simMessage is a message that a client publishes and has not finished.
type simMessage struct {
	n, id  int
	qos    byte
	retain bool
	pubrel bool // PUBREC received: only the PUBREL is repeated
}

type simClient struct {
	w        *sim
	index    int
	name     string
	conn     *simConn
	persists bool // a CONNACK for a persistent session has come
	subQoS   byte // 0: does not subscribe
	subSent  bool
	subAcked bool
	clean    bool // Clean Start until a CONNACK comes
	unsub    bool // UNSUBSCRIBE sent, no UNSUBACK

	sent    []byte               // QoS of the messages published so far
	out     []*simMessage        // unfinished, in order
	acked   map[int]byte         // message number → QoS
	need    map[int][]int        // message number → subscribers whose SUBACK came before it was sent
	maxRet  int                  // highest acknowledged retained message
	slow    bool                 // withholds some acknowledgements
	held    []simPacket          // PUBLISH packets received and not yet acknowledged
	late    map[uint16]simPacket // acknowledged on this connection what the last one brought
	qos2    map[uint16]bool
	got     map[[2]int]int // (publisher, number) → times
	highest map[[2]int]int // (publisher, QoS) → highest number seen
}

// simConn is one connection: link and owner to the broker, two queues of
// packets to the client.
type simConn struct {
	c        *simClient
	acks     ackQueue
	sess     *session
	present  bool
	durable  <-chan struct{}
	up       bool
	closed   bool
	toClient []simPacket
	toBroker []simPacket
}

func (k *simConn) room() bool        { return len(k.toClient) < 8 }
func (k *simConn) roomQoS0() bool    { return true }
func (k *simConn) flush()            {}
func (k *simConn) farewell() leaving { return leaving{unsaid: !k.up} }

func (k *simConn) takeOver(byte) <-chan struct{} {
	k.close()
	done := make(chan struct{})
	close(done)
	return done
}

func (k *simConn) close() {
	k.closed = true
	k.toClient, k.toBroker = nil, nil
}

func (k *simConn) sendPublish(m *storage.Message, qos byte, dup, retain bool, id uint16, _ []uint32, _ *batch) outcome {
	k.send(simPacket{kind: typePublish, id: id, qos: qos, dup: dup, retain: retain, from: int(m.Payload[0]), n: int(m.Payload[1])})
	return outSent
}

func (k *simConn) sendAck(kind byte, id uint16, _ byte, _ []byte, _ *batch) {
	k.send(simPacket{kind: kind, id: id})
}

func (k *simConn) send(p simPacket) {
	if !k.closed {
		k.toClient = append(k.toClient, p)
	}
}

type sim struct {
	rng     *rand.Rand
	cfg     Config
	scfg    storage.Config
	log     *slog.Logger
	store   *storagetest.Memory
	journal *storage.Journal
	plane   *plane
	clients []*simClient
	cut     bool // the power goes during the commit that runs
	calm    bool // nothing fails any more
	full    int  // how many commits fail before the disk takes one again
	ids     uint64
	memory  memory
	part    *part  // read from the disk, and not put yet
	lossy   bool   // queues are short, and drop what is oldest
	filter  string // what subscribers subscribe to
	shared  bool   // it is a shared subscription: each message goes to one of them
	ended   bool   // a session of the share group has ended, so what it had went on to others
	steps   int
	cuts    int
	failure string
	trace   *strings.Builder // nil: none
}

func (w *sim) note(format string, args ...any) {
	if w.trace != nil {
		fmt.Fprintf(w.trace, format+"\n", args...)
	}
}

func (w *sim) fail(format string, args ...any) {
	if w.failure == "" {
		w.failure = fmt.Sprintf(format, args...)
		w.note("FAILURE: %s", w.failure)
	}
}

func newSim(seed uint64, trace *strings.Builder) *sim {
	w := &sim{rng: rand.New(rand.NewPCG(seed, 1)), cfg: DefaultConfig(), log: slog.New(slog.DiscardHandler), store: &storagetest.Memory{}, trace: trace}
	w.cfg.Window = modelWindow
	if w.rng.IntN(2) == 0 {
		w.scfg.CompactFrom = -1
	}
	w.scfg.MergeFrom = 2 * w.rng.IntN(3) // 0: there are never enough
	// Next to nothing of a queue is in memory, or all of it.
	w.memory = defaultMemory
	if w.rng.IntN(3) > 0 {
		w.memory = memory{online: w.rng.IntN(4), away: w.rng.IntN(2), chunk: 1 + w.rng.IntN(3), bytes: 1 << (3 * w.rng.IntN(4)), budget: 1 << 20}
		if w.rng.IntN(4) == 0 {
			w.memory.budget = 0
		}
	}
	if w.lossy = w.rng.IntN(6) == 0; w.lossy {
		w.cfg.MaxQueueMessages = 2 + w.rng.IntN(8)
	}
	w.ids = []uint64{scarceIDs, plentyIDs}[seed%2]
	w.filter, w.shared = "t/#", seed%3 == 0
	if w.shared {
		w.filter = "$share/g/t/#"
	}
	w.cfg.WillGrace = 0
	w.store.BeforeCommit = func() bool {
		if w.full > 0 && !w.calm {
			w.full--
			return true
		}
		return w.chance(40) && w.breakCommit()
	}
	w.store.AfterCommit = func() bool { return w.chance(40) && w.breakCommit() }
	w.store.Fails = func() bool { return w.chance(100) }
	w.boot()
	for i := range 3 {
		c := &simClient{
			w: w, index: i, name: "c" + strconv.Itoa(i), acked: map[int]byte{}, need: map[int][]int{}, maxRet: -1,
			qos2: map[uint16]bool{}, got: map[[2]int]int{}, highest: map[[2]int]int{},
		}
		if i < 2 {
			c.subQoS = byte(1 + w.rng.IntN(2))
		}
		c.slow = w.rng.IntN(2) == 0
		w.clients = append(w.clients, c)
	}
	return w
}

func (w *sim) chance(n int) bool { return !w.calm && w.rng.IntN(n) == 0 }

// breakCommit makes the commit that runs fail, and decides whether the power
// goes with it.
func (w *sim) breakCommit() bool {
	w.cut = w.rng.IntN(2) == 0
	return true
}

// boot starts a broker on what the store remembers.
func (w *sim) boot() {
	w.journal = storage.NewJournal(w.store, w.scfg, w.log)
	w.plane = newPlane(&w.cfg, w.journal, w.log)
	w.plane.ids, w.plane.block, w.plane.memory = w.ids, modelBlock, w.memory
	w.plane.background = func(f func()) { f() }
	p := w.plane
	p.pause = func(time.Duration) { // commits run meanwhile
		if _ = w.journal.Commit(); w.cut {
			p.stopping.Store(true) // until the power goes, which is next
		}
	}
	if err := w.plane.restore(); err != nil {
		w.fail("restore: %v", err)
	}
}

// power cuts the power: RAM and connections are gone.
func (w *sim) power() {
	w.cuts++
	w.part, w.full = nil, 0
	w.note("power cut")
	for _, c := range w.clients {
		c.lost()
	}
	w.boot()
}

// away adds to the journal since when clients are away, of all that are.
func (w *sim) away() {
	var ids []storage.SessionID
	for _, s := range w.plane.all() {
		if s.owner == nil && s.id != 0 {
			ids = append(ids, s.id)
		}
	}
	slices.Sort(ids)
	w.plane.mark(ids, nil, false)
}

// here checks, when a CONNACK leaves, that a restart would not take the client
// for away since an earlier time.
func (w *sim) here(c *simClient) {
	img, err := w.store.Load()
	if err != nil {
		w.fail("load: %v", err)
		return
	}
	for _, s := range img.Sessions {
		if s.ClientID == c.name && s.Left != 0 {
			w.fail("%s: is back, and stored as away", c.name)
		}
	}
}

func (w *sim) commit() {
	if w.chance(6) {
		w.away()
	}
	w.cut = false
	commit := w.journal.Commit
	if w.chance(3) {
		commit = w.journal.CommitChanges
	}
	err := commit()
	w.note("commit: %v", err)
	if err != nil && !errors.Is(err, storagetest.ErrCut) {
		w.fail("commit: %v", err)
	}
	if w.cut {
		w.power()
	}
}

// load reads what a session asks for from the store. Much may happen until the
// session has it.
func (w *sim) load() {
	var b batch
	if part := w.part; part != nil {
		w.note("what was read for %s is put", part.s.clientID)
		w.part = nil
		part.put(&b)
		return
	}
	s := w.plane.loads.pop()
	if s == nil {
		return
	}
	part, err := w.plane.readPart(s)
	w.note("read for %s: %v", s.clientID, err)
	switch {
	case err != nil:
		w.plane.loads.push(s)
	case part == nil:
	case w.chance(2):
		w.part = part
	default:
		part.put(&b)
	}
}

// lost is the client's view of a broken connection.
func (c *simClient) lost() {
	if c.conn != nil {
		c.conn.close()
		c.conn = nil
	}
}

// drop breaks a connection, and lets the broker notice.
func (c *simClient) drop() {
	k := c.conn
	c.lost()
	if k.sess != nil {
		var b batch
		unlock := c.w.plane.lockID(c.name)
		c.w.cut = false
		c.w.plane.leave(k.sess, k, k.farewell(), &b)
		unlock()
		if c.w.cut {
			c.w.power()
		}
	}
	c.w.note("%s: connection lost", c.name)
}

func (c *simClient) connect() {
	c.lost() // a connection that is still there is taken over
	c.w.cut = false
	k := &simConn{c: c}
	c.conn = k
	var b batch
	if c.w.chance(6) || c.w.full > 0 && c.w.chance(2) {
		c.clean = true
	}
	if c.clean {
		c.persists, c.held, c.out, c.qos2, c.late = false, nil, nil, map[uint16]bool{}, map[uint16]simPacket{}
		c.subSent, c.subAcked, c.unsub = false, false, false
		c.unneed()
		c.w.ended = true
	}
	window := 1 + c.w.rng.IntN(modelWindow)
	o := c.w.plane.open(k, opening{clientID: c.name, version: 4, expiry: 1000, window: window, cleanStart: c.clean}, &b)
	k.sess, k.present, k.durable = o.s, o.present, o.durable
	c.w.note("%s: connects", c.name)
	if c.w.cut {
		c.w.power()
		return
	}
	c.w.connack(k)
}

// unneed takes the client off the lists of who must get what: it has asked to
// get nothing more. In a share group another member gets what was meant for it,
// as long as there is one, but nothing of QoS 2 that the client may have
// [MQTT-4.8.2-5].
func (c *simClient) unneed() {
	others := slices.ContainsFunc(c.w.clients, func(o *simClient) bool { return o != c && o.subAcked })
	for _, o := range c.w.clients {
		for n, l := range o.need {
			if c.w.shared && others && o.sent[n] == 1 {
				continue
			}
			o.need[n] = slices.DeleteFunc(slices.Clone(l), func(i int) bool { return c.w.shared || i == c.index })
		}
	}
}

// connack completes a connection once what CONNACK says is durable.
func (w *sim) connack(k *simConn) {
	if k.up || k.closed {
		return
	}
	if k.durable != nil {
		select {
		case <-k.durable:
		default:
			return
		}
	}
	k.up = true
	w.here(k.c)
	p := simPacket{kind: typeConnack}
	if k.present {
		p.n = 1
	}
	k.send(p)
	w.plane.said(k.sess, false)
	k.acks.link = k
	var b batch
	k.sess.attach(k, &k.acks, &b)
	w.note("%s: up, session present %v", k.c.name, k.present)
}

// handle lets the broker handle the next packet of a client.
func (c *simClient) handle() {
	k, w := c.conn, c.w
	w.cut = false
	p := k.toBroker[0]
	k.toBroker = k.toBroker[1:]
	w.note("%s → broker: %+v", c.name, p)
	var b batch
	switch p.kind {
	case typePublish:
		topic := "t/" + strconv.Itoa(c.index)
		m := &storage.Message{Topic: topic, Payload: []byte{byte(p.from), byte(p.n)}, QoS: p.qos, Retain: p.retain}
		w.plane.accept(k.sess, &k.acks, w.plane.routesFor(topic), m, p.id, &b)
	case typePuback:
		k.sess.puback(p.id, &b)
	case typePubrec:
		k.sess.pubrec(p.id, 0, &b)
	case typePubrel:
		k.sess.pubrel(p.id, &k.acks, &b)
	case typePubcomp:
		k.sess.pubcomp(p.id, &b)
	case typeUnsubscribe:
		w.plane.unsubscribe(k.sess, &k.acks, p.id, []string{w.filter}, &b)
	case typeSubscribe:
		w.plane.subscribe(k.sess, &k.acks, p.id, 0, []filterRequest{{filter: w.filter, options: c.subQoS | 2<<4}}, &b)
	}
	if w.cut { // only a defect that is put in commits here
		w.power()
	}
}

// receive lets a client handle the next packet of the broker.
func (c *simClient) receive() {
	k, w := c.conn, c.w
	full := !k.room()
	p := k.toClient[0]
	k.toClient = k.toClient[1:]
	w.note("broker → %s: %+v", c.name, p)
	switch p.kind {
	case typeConnack:
		if c.persists && p.n == 0 {
			w.fail("%s: session is gone", c.name)
		}
		if c.clean && p.n == 1 {
			w.fail("%s: session present after clean start", c.name)
		}
		c.persists, c.clean = true, false
		c.late = map[uint16]simPacket{}
		for _, h := range c.held { // acknowledged late, on the next connection
			if h.qos == 1 && w.ids == plentyIDs {
				c.late[h.id] = h
				k.toBroker = append(k.toBroker, simPacket{kind: typePuback, id: h.id})
			}
		}
		c.held = nil
		for _, m := range c.out {
			if m.pubrel {
				k.toBroker = append(k.toBroker, simPacket{kind: typePubrel, id: uint16(m.id)})
			} else {
				k.toBroker = append(k.toBroker, simPacket{kind: typePublish, id: uint16(m.id), qos: m.qos, dup: true, retain: m.retain, from: c.index, n: m.n})
			}
		}
		if c.unsub {
			k.toBroker = append(k.toBroker, simPacket{kind: typeUnsubscribe, id: 98})
		} else if c.subSent && !c.subAcked {
			k.toBroker = append(k.toBroker, simPacket{kind: typeSubscribe, id: 99})
		}
	case typeSuback:
		if c.subSent && !c.unsub {
			c.subAcked = true
		}
	case typeUnsuback:
		c.unsub, c.subSent = false, false
	case typePuback, typePubrec:
		for i, m := range c.out {
			if m.id != int(p.id) {
				continue
			}
			if p.kind == typePuback && m.qos != 1 || p.kind == typePubrec && m.qos != 2 {
				w.fail("%s: acknowledgement %d for a message of QoS %d", c.name, p.kind, m.qos)
			}
			c.acked[m.n] = m.qos
			if m.retain {
				c.maxRet = max(c.maxRet, m.n)
			}
			if m.qos == 1 {
				c.out = slices.Delete(c.out, i, i+1)
			} else {
				m.pubrel = true
				k.toBroker = append(k.toBroker, simPacket{kind: typePubrel, id: p.id})
			}
			break
		}
	case typePubcomp:
		c.out = slices.DeleteFunc(c.out, func(m *simMessage) bool { return m.id == int(p.id) && m.pubrel })
	case typePubrel:
		delete(c.qos2, p.id)
		k.toBroker = append(k.toBroker, simPacket{kind: typePubcomp, id: p.id})
	case typePublish:
		c.delivered(p)
	}
	if full && !k.closed && k.room() {
		var b batch
		k.sess.drained(&b)
	}
}

func (c *simClient) delivered(p simPacket) {
	w := c.w
	for _, h := range c.held {
		if h.id == p.id && (h.from != p.from || h.n != p.n) {
			w.fail("%s: identifier %d is used for %d/%d while %d/%d has it", c.name, p.id, p.from, p.n, h.from, h.n)
		}
	}
	late, isLate := c.late[p.id]
	if isLate && (late.from != p.from || late.n != p.n) {
		w.fail("%s: identifier %d is used for %d/%d, and was last for %d/%d, acknowledged just now", c.name, p.id, p.from, p.n, late.from, late.n)
	}
	fresh := true
	if p.qos == 2 {
		fresh = !c.qos2[p.id]
		c.qos2[p.id] = true
	}
	if fresh {
		key := [2]int{p.from, p.n}
		c.got[key]++
		if p.qos == 2 && c.got[key] > 1 && !(w.shared && w.ended) {
			w.fail("%s: message %d/%d came twice at QoS 2", c.name, p.from, p.n)
		}
		// A message first sent before the subscription was there may come late,
		// when its publisher sends it again. So may one whose first copy went to
		// another member of a share group.
		if c.got[key] == 1 && slices.Contains(w.clients[p.from].need[p.n], c.index) && !w.shared {
			line := [2]int{p.from, int(p.qos)}
			if last, ok := c.highest[line]; ok && p.n < last && !w.lossy { // a restart may bring back what was dropped
				w.fail("%s: message %d/%d came after %d", c.name, p.from, p.n, last)
			}
			c.highest[line] = p.n
		}
	}
	c.held = append(c.held, p)
	if !c.slow || isLate || w.rng.IntN(4) > 0 {
		c.acknowledge(len(c.held) - 1)
	}
}

// acknowledge sends the acknowledgement of a held message.
func (c *simClient) acknowledge(i int) {
	p := c.held[i]
	c.held = slices.Delete(c.held, i, i+1)
	kind := byte(typePuback)
	if p.qos == 2 {
		kind = typePubrec
	}
	c.conn.toBroker = append(c.conn.toBroker, simPacket{kind: kind, id: p.id})
}

func (c *simClient) publish() {
	if len(c.out) >= 3 || len(c.sent) >= 20 {
		return
	}
	id := 1
	for slices.ContainsFunc(c.out, func(m *simMessage) bool { return m.id == id }) {
		id++ // the lowest one free, so that identifiers come back soon
	}
	m := &simMessage{n: len(c.sent), id: id, qos: byte(1 + c.w.rng.IntN(2))}
	// Order is promised per QoS: a QoS 1 message that is sent again may well
	// replace a QoS 2 message that came after its first copy.
	m.retain = m.qos == 1 && c.w.rng.IntN(3) == 0
	c.sent = append(c.sent, m.qos)
	c.out = append(c.out, m)
	for _, s := range c.w.clients {
		if s.subAcked {
			c.need[m.n] = append(c.need[m.n], s.index)
		}
	}
	c.conn.toBroker = append(c.conn.toBroker, simPacket{kind: typePublish, id: uint16(id), qos: m.qos, retain: m.retain, from: c.index, n: m.n})
}

// step does one thing at random.
func (w *sim) step() {
	w.steps++
	c := w.clients[w.rng.IntN(len(w.clients))]
	if c.conn != nil {
		w.connack(c.conn)
	}
	switch d := w.rng.IntN(100); {
	case d < 8:
		w.commit()
	case d < 16 && (w.part != nil || len(w.plane.loads.list) > 0):
		w.load()
	case w.chance(150):
		w.full = 1 + w.rng.IntN(3)
	case w.full > 0 && w.chance(30):
		c.connect()
	case w.chance(250):
		w.power()
	case c.conn == nil:
		c.connect()
	case w.chance(80):
		c.drop()
	case w.chance(200):
		c.connect()
	case !c.conn.up || c.persists && len(c.conn.toClient) > 0 && c.conn.toClient[0].kind == typeConnack || d < 45:
		if len(c.conn.toClient) > 0 {
			c.receive()
		}
	case c.subAcked && c.persists && w.chance(60):
		c.subAcked, c.unsub = false, true
		c.unneed()
		c.conn.toBroker = append(c.conn.toBroker, simPacket{kind: typeUnsubscribe, id: 98})
	case c.subQoS > 0 && c.persists && !c.subSent && d < 60:
		c.subSent = true
		c.conn.toBroker = append(c.conn.toBroker, simPacket{kind: typeSubscribe, id: 99})
	case d < 78:
		if len(c.conn.toBroker) > 0 {
			c.handle()
		}
	case d < 93:
		if c.persists {
			c.publish()
		}
	default:
		if len(c.held) > 0 && (w.calm || w.rng.IntN(8) == 0) {
			c.acknowledge(w.rng.IntN(len(c.held)))
		}
	}
}

// rest lets everything that is under way come to its end, with nothing failing.
func (w *sim) rest() {
	w.calm = true
	for range 3 {
		for idle := 0; idle < 3 && w.failure == ""; {
			idle++
			for _, c := range w.clients {
				if c.conn == nil {
					c.connect()
					idle = 0
				}
				w.connack(c.conn)
				for len(c.conn.toClient) > 0 {
					c.receive()
					idle = 0
				}
				for len(c.held) > 0 {
					c.acknowledge(0)
					idle = 0
				}
				for len(c.conn.toBroker) > 0 {
					c.handle()
					idle = 0
				}
			}
			if _, any := w.journal.Pending(); any || w.part != nil || len(w.plane.loads.list) > 0 {
				idle = 0
			}
			w.load()
			w.commit() // also when only a failed group is left
		}
	}
}

// check checks the promises after rest.
func (w *sim) check() {
	for _, c := range w.clients {
		if len(c.out) > 0 {
			w.fail("%s: message %d was never acknowledged to the end", c.name, c.out[0].n)
		}
		for n := range c.acked {
			key := [2]int{c.index, n}
			if w.shared && (w.lossy || slices.ContainsFunc(w.clients, func(o *simClient) bool { return o.got[key] > 0 })) {
				continue
			}
			for _, s := range c.need[n] {
				if !w.lossy && w.clients[s].got[key] == 0 {
					w.fail("message %d/%d was acknowledged and is lost to %s", c.index, n, w.clients[s].name)
				}
			}
		}
	}
	for _, s := range w.plane.all() {
		if s.live != 0 || len(s.inbound) != 0 {
			w.fail("%s: %d deliveries and %d identifiers are left over", s.clientID, s.live, len(s.inbound))
		}
		if s.bytes != 0 || s.spill.count != 0 || len(s.spill.runs) != 0 {
			w.fail("%s: %d bytes and %d deliveries on the disk are left over", s.clientID, s.bytes, s.spill.count)
		}
	}
	if p := w.plane; p.queueMessages.Load() != 0 || p.queueBytes.Load() != 0 || p.spilledMessages.Load() != 0 || p.spilledBytes.Load() != 0 {
		w.fail("%d messages of %d bytes are counted in queues, %d and %d of them on the disk only", p.queueMessages.Load(), p.queueBytes.Load(), p.spilledMessages.Load(), p.spilledBytes.Load())
	}
	if p := w.plane; p.dropped[dropDamaged].Load() != 0 {
		w.fail("%d messages were missing on the disk", p.dropped[dropDamaged].Load())
	}
	if st := w.journal.Stats(); st.Segments != 0 || st.SegmentBytes != 0 {
		w.fail("%d segments of %d bytes are counted", st.Segments, st.SegmentBytes)
	}
	w.power() // what is retained must be in the store
	for _, c := range w.clients {
		m := w.plane.Retained("t/" + strconv.Itoa(c.index))
		if c.maxRet >= 0 && (m == nil || int(m.Payload[1]) < c.maxRet) {
			w.fail("%s: retained message %d was acknowledged and is not kept", c.name, c.maxRet)
		}
	}
	w.commit() // a commit of unknown fate may have left a segment that only a restart finds
	if img, err := w.store.Load(); err != nil || len(img.Segments) > 0 {
		w.fail("%d segments are left over, error %v", len(img.Segments), err)
	}
}

// runModel does one run and returns what went wrong, empty if nothing did.
func runModel(seed uint64, trace *strings.Builder) (failure string, cuts int) {
	w := newSim(seed, trace)
	for range 400 {
		if w.failure != "" {
			return w.failure, w.cuts
		}
		w.step()
	}
	w.rest()
	if w.failure == "" {
		w.check()
	}
	return w.failure, w.cuts
}

// modelRuns returns how many runs a test does: under an emulator (-short) a
// few, in a soak many.
func modelRuns(n int) int {
	switch runs, err := strconv.Atoi(os.Getenv("PENSTOCK_MODEL_RUNS")); {
	case err == nil:
		return runs
	case os.Getenv("PENSTOCK_SOAK") != "":
		return 40 * n
	case testing.Short():
		return n / 50
	}
	return n
}

func TestModel(t *testing.T) {
	if s := os.Getenv("PENSTOCK_MODEL_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		var trace strings.Builder
		failure, _ := runModel(seed, &trace)
		t.Logf("%s\n%s", trace.String(), failure)
		return
	}
	start, cuts := time.Now(), 0
	n := modelRuns(50000)
	for seed := range uint64(n) {
		failure, c := runModel(seed, nil)
		cuts += c
		if failure != "" {
			t.Fatalf("seed %d: %s (PENSTOCK_MODEL_SEED=%d shows every step)", seed, failure, seed)
		}
	}
	t.Logf("%d runs, %d power cuts, %.0f runs a second", n, cuts, float64(n)/time.Since(start).Seconds())
}
