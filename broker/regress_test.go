package broker

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"penstock/storage"
)

// cutter is a member of a share group at whose first delivery the journal
// commits, as its goroutine may at any moment.
type cutter struct {
	party
	done bool
}

func (l *cutter) sendPublish(m *storage.Message, qos byte, dup, retain bool, id uint16, ids []uint32, b *batch) outcome {
	if !l.done {
		l.done = true
		l.r.commit()
	}
	return l.party.sendPublish(m, qos, dup, retain, id, ids, b)
}

// A commit while a session's shared messages are handed over does not delete
// their segments before the new claims are in the journal.
func TestAdoptedSurvivesCut(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 1000)
	a := r.connect("a", 1000)
	a.subscribe(1, "$share/g/t")
	r.commit()
	for i := range 100 {
		pub.publish(storage.Message{Topic: "t", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, uint16(1+i))
	}
	r.commit() // stored: PUBACKs leave
	acked := len(pub.answers)
	b := &cutter{party: party{r: r}}
	b.s = r.p.open(b, opening{clientID: "b", version: 4, expiry: 1000, window: 1000}, &r.b).s
	r.commit()
	b.acks.link = b
	b.s.attach(b, &b.acks, &r.b)
	b.subscribe(1, "$share/g/t")
	r.commit()
	r.p.leave(a.s, a, leaving{}, &r.b)
	r.commit()
	r.p.end(a.s, &r.b)
	r.boot() // power cut
	n := 0
	for _, s := range r.p.sessions {
		n += s.waiting()
	}
	if acked != 100 || n != 100 {
		t.Errorf("%d acknowledged, %d deliveries after the cut, want 100", acked, n)
	}
}

// What a session in two share groups with the same filter leaves goes once to
// each.
func TestOrphansKeepTheirGroup(t *testing.T) {
	for range 20 {
		r := newRig(t)
		pub := r.connect("pub", 1000)
		a := r.connect("a", 1000)
		a.subscribe(1, "$share/g1/t", "$share/g2/t")
		m1, m2 := r.connect("m1", 1000), r.connect("m2", 1000)
		pub.publish(storage.Message{Topic: "t", Payload: []byte("x"), QoS: 2}, 1)
		r.commit()
		m1.subscribe(2, "$share/g1/t")
		m2.subscribe(2, "$share/g2/t")
		r.commit()
		r.p.leave(a.s, a, leaving{}, &r.b)
		r.p.end(a.s, &r.b)
		r.commit()
		if len(m1.deliveries) != 1 || len(m2.deliveries) != 1 {
			t.Fatalf("g1 got %d, g2 got %d, want one each", len(m1.deliveries), len(m2.deliveries))
		}
	}
}

// A sole member of a share group may subscribe again while a publisher is
// between looking the routes up and delivering [MQTT-3.8.4-4].
func TestResubscribeLosesNothing(t *testing.T) {
	r := newRig(t)
	pub := r.connect("pub", 10)
	a := r.connect("a", 10)
	a.subscribe(1, "$share/g/t")
	r.commit()
	rt := r.p.routesFor("t") // conn.publish has done this
	a.subscribe(1, "$share/g/t")
	r.p.accept(pub.s, &pub.acks, rt, &storage.Message{Topic: "t", Payload: []byte("x"), QoS: 1}, 1, &r.b)
	r.commit()
	if slices.Contains(pub.answers, "4:1") && len(a.deliveries) == 0 {
		t.Error("acknowledged, and the group's only member, subscribed all the time, never gets it")
	}
}

// A client is not locked out by its own will, which the new one replaces.
func TestWillDoesNotLockItselfOut(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 1 << 10 })
	o := connectOptions{id: "c", version: 5, expiry: 1000, will: &storage.Message{Topic: "w", Payload: make([]byte, 600)}}
	s.connect(o)
	c := s.dial() // the network broke, the client comes back
	if code := c.hello(o); code != 0 {
		t.Errorf("takeover with the same will: refused with %#x", code)
	}
}

// The same after a power cut.
func TestWillDoesNotLockOutAfterCut(t *testing.T) {
	small := func(c *Config, _ *storage.Config) { c.MaxRetained = 1 << 10 }
	s := start(t, t.TempDir(), small)
	o := connectOptions{id: "c", version: 5, expiry: 1000, will: &storage.Message{Topic: "w", Payload: make([]byte, 600)}}
	s.connect(o)
	s.stop()
	n := start(t, s.dir, small)
	if code := n.dial().hello(o); code != 0 {
		t.Errorf("after a restart: refused with %#x", code)
	}
}

// Retained messages to the bound do not keep out who has a will.
func TestFullRetainedStoreServes(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 4 << 10 })
	c, _ := s.connect(connectOptions{id: "vandal", clean: true})
	for i := range 40 {
		c.publish(fmt.Sprintf("r/%d", i), "x", 0, true)
	}
	c.ping()
	if code := s.dial().hello(connectOptions{id: "device", version: 5, clean: true, will: &storage.Message{Topic: "status/device", Payload: []byte("offline: the link was lost")}}); code != 0 {
		t.Errorf("a device with a will: refused with %#x", code)
	}
}

// A larger retained message in place of a small one has the same bound.
func TestRetainedReplacementIsBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 64 << 10 })
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
	for i := range 50 {
		c.publish(fmt.Sprintf("r/%d", i), "x", 0, true)
	}
	big := strings.Repeat("x", 200<<10)
	for i := range 50 {
		c.publish(fmt.Sprintf("r/%d", i), big, 0, true)
	}
	c.ping()
	if got := s.b.Stats().RetainedBytes; got > 64<<10 {
		t.Errorf("%d bytes retained, the bound is %d", got, 64<<10)
	}
}

// What one SUBSCRIBE finds is not gathered without a bound.
func TestSubscribeIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 100 })
	const levels, topics = 10, 1000
	prefix := strings.Repeat("a/", levels)
	for i := range topics {
		r.p.publish(nil, &storage.Message{Topic: prefix + fmt.Sprint(i), Payload: []byte("r"), Retain: true}, &r.b, nil)
	}
	var filters []string
	for mask := range 1 << levels {
		f := ""
		for i := range levels {
			f += string("a+"[mask>>i&1]) + "/"
		}
		filters = append(filters, f+"+")
	}
	c := r.connect("c", 1)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	c.subscribe(0, filters...)
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	mib := (after.TotalAlloc - before.TotalAlloc) >> 20
	if mib > 8 {
		t.Errorf("one SUBSCRIBE of %d bytes over %d retained messages (queue bound %d): %d MiB allocated, %v", len(filters)*(2*levels+4), topics, r.cfg.MaxQueueMessages, mib, took)
	}
}

// A QoS 2 PUBLISH that is sent again is not refused when its first copy was
// taken over: the client would use the identifier for its next message, which
// would be taken for a repetition, acknowledged and lost.
func TestRefusedRepetitionFreesTheIdentifier(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 1 << 10 })
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(2, "t/#")
	c, _ := s.connect(connectOptions{id: "c", version: 5, expiry: 1000})
	c.send(c.publishPacket("t/r", "one", 2, 1, 7)) // retain
	c.expect(typePubrec)
	sub.take()
	c.c.Close() // say the PUBREC did not arrive
	// Meanwhile somebody removes the retained message and fills the store.
	o, _ := s.connect(connectOptions{id: "o", clean: true})
	o.publish("t/r", "", 1, true)
	sub.take()
	for i := range 20 {
		o.publish(fmt.Sprintf("fill/%d", i), "x", 0, true)
	}
	o.ping()
	c, present := s.connect(connectOptions{id: "c", version: 5, expiry: 1000})
	if !present {
		t.Fatal("no session")
	}
	c.send(c.publishPacket("t/r", "one", 2, 1|8, 7)) // DUP
	_, body := c.expect(typePubrec)
	if len(body) < 3 || body[2] < 0x80 {
		return // taken: it is answered as the first one was
	}
	// Refused: the identifier is free for the client [MQTT-4.3.3-4].
	c.send(c.publishPacket("t/new", "two", 2, 0, 7))
	_, body = c.expect(typePubrec)
	if len(body) > 2 && body[2] >= 0x80 {
		t.Fatalf("refused too: % x", body)
	}
	c.send(packet(typePubrel<<4|2, u16(7)))
	c.expect(typePubcomp)
	_ = sub.c.SetReadDeadline(time.Now().Add(time.Second))
	for {
		first, body, err := sub.tryRead()
		if err != nil {
			t.Fatal("the new message was acknowledged (PUBREC, PUBCOMP) and never delivered")
		}
		if first>>4 == typePublish && strings.Contains(string(body), "two") {
			return
		}
	}
}

// Connections that wait for a password to be checked give back what they hold
// when they are evicted.
func TestWaitingLoginsAreBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxConnections = 10 })
	hash, err := HashPassword("right")
	if err == nil {
		err = s.db.PutCredential(context.Background(), storage.Credential{Username: "u", Hash: hash}, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.b.hashing <- struct{}{} // a Pi Zero does 16 a second
	defer func() { <-s.b.hashing }()
	for range 6 {
		for range 10 {
			c := s.dial()
			c.version = 4
			c.send(connectPacket(connectOptions{id: "x", version: 4, clean: true, user: "u", password: "wrong"}))
		}
		eventually(t, "the oldest may give way", func() bool {
			s.b.mu.Lock()
			defer s.b.mu.Unlock()
			e := s.b.listeners[0].waiting.Front()
			return e != nil && time.Since(e.Value.(*slot).since) >= evictAfter
		})
	}
	buf := make([]byte, 4<<20)
	n := strings.Count(string(buf[:runtime.Stack(buf, true)]), ").authenticate(")
	if n > 20 {
		t.Errorf("%d connections wait to be checked, 10 may be open", n)
	}
}

// A connection that lingers counts until its socket is closed.
func TestLingeringCounts(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxConnections = 10 })
	for i := range 200 {
		c := s.dial()
		c.version = 5
		connect := connectPacket(connectOptions{id: fmt.Sprint(i), version: 5, clean: true})
		c.send(append(connect, connect...)) // a second CONNECT
		for {                               // and the client does not close
			if _, _, err := c.tryRead(); err != nil {
				break
			}
		}
	}
	buf := make([]byte, 4<<20)
	n := strings.Count(string(buf[:runtime.Stack(buf, true)]), ").linger(")
	if n > 10+maxRefused {
		t.Errorf("%d sockets are open for connections that are over, 10 may be open in all", n)
	}
}

// A refusal arrives though the client has sent more behind its CONNECT: the
// socket is not reset.
func TestRefusalIsNotReset(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.Anonymous = "none" })
	c := s.dial()
	c.version = 4
	connect := connectPacket(connectOptions{id: "x", version: 4, clean: true})
	c.send(append(connect, packet(typePublish<<4, str("t"), make([]byte, 200<<10))...))
	_ = c.c.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 64)
	n, err := c.c.Read(buf)
	if n == 4 && err == nil {
		_, err = c.c.Read(buf)
	}
	if err != io.EOF {
		t.Errorf("CONNACK of %d bytes and then %v, want 4 and the end of the file", n, err)
	}
}

// The buffer of an output is at most twice what max_output says.
func TestOutputMemory(t *testing.T) {
	s := start(t, t.TempDir())
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(0, "t")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	payload := strings.Repeat("x", 300<<10)
	for range 100 { // the socket's buffers, and then ours
		pub.send(pub.publishPacket("t", payload, 0, 0, 0))
	}
	pub.ping()
	sess := s.b.plane.session("sub")
	sess.mu.Lock()
	c := sess.link.(*conn)
	sess.mu.Unlock()
	c.outMu.Lock()
	held := cap(c.out)
	c.outMu.Unlock()
	if most := 2 * int(s.b.cfg.MaxOutput); held > most {
		t.Errorf("the buffer that gathers is %d KiB (another is being written), max_output is %d KiB", held>>10, s.b.cfg.MaxOutput>>10)
	}
}

// Expired retained messages make room when there is little left.
func TestExpiredRetainedMakesRoom(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxRetained = 4 << 10 })
	now := r.p.now()
	for i := range 40 {
		m := &storage.Message{Topic: fmt.Sprintf("r/%d", i), Payload: []byte("x"), Retain: true, Expires: now + 1}
		if !r.p.fullFor(m) {
			r.p.publish(nil, m, &r.b, nil)
		}
	}
	r.p.now = func() int64 { return now + 3600e3 }
	r.p.sweep(time.Now().Add(time.Hour), &r.b)
	if r.p.fullFor(&storage.Message{Topic: "new", Payload: []byte("x"), Retain: true}) {
		t.Errorf("an hour after all %d retained messages have expired there is no room for one", r.p.retained.len())
	}
}

// Whoever breaks the WebSocket protocol a thousand times does not fill the log.
func TestWebSocketLogIsBounded(t *testing.T) {
	// see wsConn.Read: log.Info, not notice
	s := startWeb(t)
	var log syncBuffer
	s.b.log = slog.New(slog.NewTextHandler(&log, nil))
	const n = 300
	for range n {
		c, err := dialWeb(s.b.Listeners()[0].Addr, func(a net.Addr) (net.Conn, error) { return net.Dial("tcp", a.String()) }, "", "mqtt")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.(*webClient).Conn.Write([]byte{0x82, 0x00, 0, 0, 0, 0}) // not masked
		buf := make([]byte, 64)
		_, _ = c.Read(buf)
		c.Close()
	}
	if got := strings.Count(log.String(), "client disconnected for an error"); got > noticeBurst+20 {
		t.Errorf("%d lines for %d breaches, want at most about %d", got, n, noticeBurst)
	}
}

// The routes that a publisher's connection remembers are bounded.
func TestRoutesMemory(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.Anonymous = "all" })
	for i := range 100 {
		c, _ := s.connect(connectOptions{id: fmt.Sprint("sub", i), clean: true})
		c.subscribe(0, "#")
		go func() { _, _ = io.Copy(io.Discard, c.c) }()
	}
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	pub.ping()
	before := heap()
	for i := range maxTopics {
		pub.send(pub.publishPacket(fmt.Sprintf("t/%d", i), "", 0, 0, 0))
	}
	pub.ping()
	// What is on its way to the subscribers goes when they have read it.
	eventually(t, fmt.Sprintf("one publisher with %d topics and 100 subscribers to # holds at most 3 MiB", maxTopics), func() bool {
		return heap() < before+3<<20
	})
}

// A rule for link-local addresses matches clients with a zone.
func TestACLMatchesZone(t *testing.T) {
	ap, err := netip.ParseAddrPort("[fe80::1%eth0]:1234") // as TCPAddr.String has it
	if err != nil {
		t.Fatal(err)
	}
	who := principal{clientID: "c", address: ap.Addr().Unmap()} // as OnConnect does
	a := newACL([]storage.ACLRule{{Action: "any", Filter: "#", Address: "fe80::/10"}})
	if a.allows(who, actionPublish, "t") {
		t.Error("a denial for fe80::/10 does not hold for fe80::1 with a zone")
	}
}

// The largest output that the configuration allows has a buffer.
func TestLargestOutput(t *testing.T) {
	// Twice the largest max_output in acknowledgements, and one more packet of
	// the largest max_packet.
	if most, need := bufferSize(len(buffers)-1), 2*(128<<20)+256<<20; most < need {
		t.Errorf("the largest buffer has %d bytes, %d may be needed", most, need)
	}
}

// awaitLogin returns when a login waits for its turn to hash, and no longer for
// the database.
func awaitLogin(t *testing.T) {
	t.Helper()
	eventually(t, "it waits", func() bool {
		stacks := make([]byte, 1<<20)
		for _, g := range strings.Split(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if state, _, _ := strings.Cut(g, "\n"); strings.Contains(state, "[select") && strings.Contains(g, "(*Broker).authenticate") && !strings.Contains(g, "database/sql") {
				return true
			}
		}
		return false
	})
}

// A connection that was given up while it waited for its password to be checked
// does not take the session from the one that the client has made since.
func TestGhostTakesNothingOver(t *testing.T) {
	s := start(t, t.TempDir())
	hash, err := HashPassword("right")
	if err == nil {
		err = s.db.PutCredential(context.Background(), storage.Credential{Username: "u", Hash: hash}, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	o := connectOptions{id: "c", version: 5, expiry: 100, user: "u", password: "right"}
	s.b.hashing <- struct{}{} // many others wait too
	ghost := s.dial()
	ghost.send(connectPacket(o))
	awaitLogin(t)
	ghost.c.Close() // the client has lost patience
	s.b.logins.add(hash, []byte("right"))
	c, _ := s.connect(o)
	c.ping()
	<-s.b.hashing
	eventually(t, "one connection is left", func() bool { return len(s.b.connections()) == 1 })
	c.ping() // and it is the new one
}

// Over TLS and WebSocket, where a read cannot wait without a buffer, that buffer
// is no larger than what has come asks for.
func TestBufferOfPartialPacket(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	cfg := DefaultConfig()
	c := connOn(&Broker{cfg: cfg, plane: &plane{}}, theirs)
	c.up = true
	c.in, c.w, c.need = make([]byte, smallBuffer), smallBuffer, 100<<10
	c.makeRoom()
	if n := len(c.in); n > midBuffer || c.w != smallBuffer {
		t.Errorf("%d bytes hold a buffer of %d", c.w, n)
	}
}

// The will of a client whose CONNECT was refused is not published, though its
// session was made and could not be stored.
func TestRefusedConnectHasNoWill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		sub := p.connect(connectOptions{id: "sub", version: 4, clean: true})
		sub.subscribe(0, "w")
		release := p.holdCommits()
		c := p.dial()
		c.version = 5
		go c.send(connectPacket(connectOptions{id: "c", version: 5, expiry: 100, will: &storage.Message{Topic: "w", Payload: []byte("offline")}}))
		first, body := c.read()
		if first>>4 != typeConnack || body[1] < 0x80 {
			t.Fatalf("CONNACK % x", body)
		}
		c.c.Close()
		_ = sub.c.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 64)
		if n, err := sub.c.Read(buf); err == nil {
			t.Errorf("CONNACK %#x, and a will is published: %q", body[1], buf[:n])
		}
		release()
	})
}

// headed is a connection from a proxy.
type headed struct {
	net.Conn
	in   io.Reader
	from net.Addr
}

func (h *headed) Read(p []byte) (int, error) { return h.in.Read(p) }
func (h *headed) RemoteAddr() net.Addr       { return h.from }

// A program on the proxy's machine does not pass for one on this machine.
func TestProxiedLoopbackIsNotOurs(t *testing.T) {
	l := &listener{proxyFrom: []netip.Prefix{netip.MustParsePrefix("10.0.0.5/32")}}
	raw := &headed{in: strings.NewReader("PROXY TCP4 127.0.0.1 127.0.0.1 4000 8883\r\n"), from: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 5), Port: 1}}
	c, _, err := l.readProxy(raw)
	if err != nil {
		t.Fatal(err)
	}
	ap, err := netip.ParseAddrPort(c.RemoteAddr().String()) // as OnConnect does
	if err == nil && ap.Addr().Unmap().IsLoopback() {
		t.Error(`who comes from 127.0.0.1 of the proxy 10.0.0.5 is let in by anonymous = "loopback"`)
	}
}

func heapNow() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// max_subscriptions_total bounds what filters take, not only their number.
func TestSubscriptionsAreBoundedInBytes(t *testing.T) {
	for name, filter := range map[string]string{
		"long":       "/" + strings.Repeat("x", 4000),
		"7 levels":   strings.Repeat("/x", 6) + "/+",
		"short":      "/+",
		"127 levels": strings.Repeat("/x", 125) + "/+",
		"127 long":   strings.Repeat("/"+strings.Repeat("x", 31), 125) + "/+",
	} {
		r := newRig(t)
		c := r.connect("c", 1)
		before := heapNow()
		const n = 500
		for i := range n {
			c.subscribe(0, fmt.Sprint(i, filter))
		}
		each := (heapNow() - before) / int64(c.s.weight)
		all := each * int64(r.cfg.MaxAllSubs)
		t.Logf("%s: %d bytes for each of %d", name, each, c.s.weight)
		if all > 512<<20 {
			t.Errorf("%s: %d bytes a subscription: max_subscriptions_total = %d allows %d MiB", name, each, r.cfg.MaxAllSubs, all>>20)
		}
		runtime.KeepAlive(c)
	}
}

// A client of MQTT 3.1.1 whose QoS 2 PUBLISH was taken over before the retained
// store became full is not disconnected when it sends it again.
func TestRepetitionOf311IsTaken(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 1 << 10 })
	c, _ := s.connect(connectOptions{id: "c"})
	c.send(c.publishPacket("t/r", "one", 2, 1, 7))
	c.expect(typePubrec)
	c.c.Close()
	o, _ := s.connect(connectOptions{id: "o", clean: true})
	o.publish("t/r", "", 1, true)
	for i := range 20 {
		o.publish(fmt.Sprintf("fill/%d", i), "x", 0, true)
	}
	o.ping()
	c, _ = s.connect(connectOptions{id: "c"})
	c.send(c.publishPacket("t/r", "one", 2, 1|8, 7)) // DUP
	if first, _, err := c.tryRead(); err != nil || first>>4 != typePubrec {
		t.Errorf("the repetition of a message that is safe: %#x, %v, want a PUBREC", first, err)
	}
}

// What is expired does not take the places of what is found.
func TestRetainedBehindExpired(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxQueueMessages = 10 })
	for i := range maxMisses + 100 {
		r.p.publish(nil, &storage.Message{Topic: fmt.Sprintf("a/%d", i), Payload: []byte("x"), Retain: true, Expires: r.p.now() - 1}, &r.b, nil)
	}
	r.p.publish(nil, &storage.Message{Topic: "z", Payload: []byte("y"), Retain: true}, &r.b, nil)
	for i := range 20 {
		c := r.connect(fmt.Sprint("c", i), 1)
		c.subscribe(0, "#")
		if len(c.deliveries) == 0 && c.s.live == 0 {
			t.Fatal("the one retained message that has not expired is not delivered, and not counted as dropped")
		}
	}
}

// What bridges say of themselves counts as retained like all else.
func TestBridgeStatesAreBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 64 << 10 })
	c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
	big := strings.Repeat("x", 50<<10)
	for i := range 200 {
		c.publish(fmt.Sprintf("$SYS/broker/connection/%d/state", i), big, 0, true)
	}
	c.ping()
	s.b.plane.mu.RLock()
	n := s.b.plane.retained.ownBytes
	s.b.plane.mu.RUnlock()
	if n > 1<<20 {
		t.Errorf("a client retains %d KiB below $SYS at max_retained = 64 KiB", n>>10)
	}
}

// And what was acknowledged there lasts.
func TestBridgeStateLasts(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 1)
	c.publish(storage.Message{Topic: "$SYS/broker/connection/b/state", Payload: []byte("0"), QoS: 1, Retain: true}, 1)
	r.commit()
	acked := len(c.answers) == 1
	r.boot()
	if acked && r.p.Retained("$SYS/broker/connection/b/state") == nil {
		t.Error("a client's retained message was acknowledged at QoS 1 and is gone after a cut (rule 6 of delivery.md)")
	}
}

// A PUBLISH that the rules forbid, and whose identifier is in use, is answered
// and not routed, though the release is committed in between.
func TestRepetitionPassesNoRule(t *testing.T) {
	r := newRig(t)
	sub := r.connect("sub", 10)
	sub.subscribe(0, "secret")
	c := r.connect("c", 10)
	c.publish(storage.Message{Topic: "ok", Payload: []byte("x"), QoS: 2}, 7)
	r.commit()
	c.s.pubrel(7, &c.acks, &r.b)
	again := c.s.received(7, &c.acks, &r.b) // conn.publish: then no rule is asked
	r.commit()                              // the journal's goroutine
	if !again {
		c.publish(storage.Message{Topic: "secret", Payload: []byte("forbidden"), QoS: 2}, 7)
	}
	if len(sub.deliveries) > 0 {
		t.Errorf("routed though no rule was asked: %q", sub.deliveries)
	}
}

// The same over TLS.
func TestGhostOverTLS(t *testing.T) {
	var k kind
	for _, k = range kinds(t) {
		if k.protocol == "mqtts" {
			break
		}
	}
	s := start(t, t.TempDir(), withListeners(k.cfg))
	hash, err := HashPassword("right")
	if err == nil {
		err = s.db.PutCredential(context.Background(), storage.Credential{Username: "u", Hash: hash}, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	dial := func() *client {
		c, err := k.dial(s.b.Listeners()[0].Addr)
		if err != nil {
			t.Fatal(err)
		}
		return s.on(c)
	}
	o := connectOptions{id: "c", version: 5, expiry: 100, user: "u", password: "right"}
	s.b.hashing <- struct{}{}
	ghost := dial()
	ghost.send(connectPacket(o))
	awaitLogin(t)
	ghost.c.(*tls.Conn).NetConn().(*net.TCPConn).Close()
	s.b.logins.add(hash, []byte("right"))
	c := dial()
	if code := c.hello(o); code != 0 {
		t.Fatal(code)
	}
	c.ping()
	<-s.b.hashing
	eventually(t, "one connection is left", func() bool { return len(s.b.connections()) == 1 })
	c.ping() // and it is the new one
}

// A CONNECT whose CONNACK never leaves, because the disk stalls, changes
// neither how long the session lasts nor what waits in it, nor a will that is
// still to come.
func TestRefusedConnectChangesNothing(t *testing.T) {
	for name, o := range map[string]opening{
		"no expiry":            {clientID: "c", version: 5, expiry: 0, window: 10},
		"other expiry, a will": {clientID: "c", version: 5, expiry: 5, window: 10, will: &will{msg: &storage.Message{Topic: "w", Payload: []byte("new")}, who: &principal{}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			pub := r.connect("pub", 10)
			c := &party{r: r}
			old := &will{msg: &storage.Message{Topic: "w", Payload: []byte("old"), QoS: 1}, delay: 60, who: &principal{}}
			c.s = r.p.open(c, opening{clientID: "c", version: 5, expiry: 1000, window: 10, will: old}, &r.b).s
			r.p.said(c.s, true)
			c.acks.link = c
			c.s.attach(c, &c.acks, &r.b)
			c.subscribe(1, "t")
			r.p.leave(c.s, c, leaving{}, &r.b)
			pub.publish(storage.Message{Topic: "t", Payload: []byte("kept"), QoS: 1}, 1)
			r.commit()

			refused := &party{r: r}
			got := r.p.open(refused, o, &r.b)
			r.p.leave(got.s, refused, leaving{unsaid: true, clean: true, before: got.before}, &r.b)
			for _, boot := range []bool{false, true} {
				if boot {
					r.commit()
					r.boot()
				}
				s := r.p.session("c")
				if s == nil {
					t.Fatalf("after a restart %v: the session is gone", boot)
				}
				if s.waiting() != 1 || s.expiry != 1000 {
					t.Errorf("after a restart %v: %d messages and an expiry of %d s, want 1 and 1000", boot, s.waiting(), s.expiry)
				}
				if w := r.p.wills["c"]; w == nil || string(w.msg.Payload) != "old" || w.due == 0 {
					t.Errorf("after a restart %v: will is %+v, want the old one, on its way", boot, w)
				}
			}
		})
	}
}

// A session of which no CONNACK ever spoke is not there for the next CONNECT:
// its client, which has none, would have to leave [MQTT-3.2.2-4].
func TestUnsaidSessionEnds(t *testing.T) {
	r := newRig(t)
	refused := &party{r: r}
	got := r.p.open(refused, opening{clientID: "c", version: 5, expiry: 1000, window: 10}, &r.b)
	r.p.leave(got.s, refused, leaving{unsaid: true}, &r.b)
	r.commit()
	if got := r.p.open(refused, opening{clientID: "c", version: 5, expiry: 1000, window: 10}, &r.b); got.present {
		t.Error("the session is there")
	}
}

// A SUBSCRIBE that looks at much does not keep others from the index.
func TestSubscribeTakesTurns(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	for i := range 20_000 {
		r.p.retained.put(fmt.Sprintf("a/b%d", i), &storage.Message{Topic: fmt.Sprintf("a/b%d", i), Payload: []byte("x")})
	}
	var filters []filterRequest
	for i := range 300 {
		filters = append(filters, filterRequest{filter: fmt.Sprintf("+/+/x%d", i)})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b batch
		r.p.subscribe(c.s, &c.acks, 1, 0, filters, &b)
	}()
	turns := 0
	for {
		r.p.mu.RLock()
		n := len(c.s.subs)
		r.p.mu.RUnlock()
		if n > 0 && n < len(filters) {
			turns++
		}
		if n == len(filters) {
			break
		}
		runtime.Gosched()
	}
	<-done
	if turns < 3 {
		t.Errorf("others had the index %d times during a SUBSCRIBE of %d filters", turns, len(filters))
	}
}

// What a connection subscribes to when its session has gone to another is not
// added, and what a session adds after its end is not stored.
func TestSubscribeAfterTheEnd(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	r.p.leave(c.s, c, leaving{hasExpiry: true}, &r.b) // its end
	c.subscribe(1, "t")
	if n := r.p.subs.len(); n != 0 {
		t.Errorf("%d subscriptions of a session that has ended", n)
	}
	id := c.s.id
	r.p.journal.Change(func(tx storage.Tx) error {
		return tx.PutSubscription(storage.Subscription{Session: id, Filter: "t"})
	}, nil)
	r.commit()
	if img, err := r.store.Load(); err != nil || len(img.Subscriptions) != 0 {
		t.Errorf("stored: %v, %v", img.Subscriptions, err)
	}
}

// Wills do not get past the bound of retained messages.
func TestRetainedWillsAreBounded(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxRetained = 128 << 10 })
	watch, _ := s.connect(connectOptions{id: "watch", version: 5, clean: true})
	watch.subscribe(0|8, "w/#")
	for i := range 6 {
		c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true, will: &storage.Message{Topic: fmt.Sprintf("w/%d", i), Payload: make([]byte, 60<<10), Retain: true}})
		c.c.Close()
		watch.take() // published in any case
	}
	if got := s.b.Stats(); got.RetainedBytes > 128<<10 || got.Limited["retained"] != 4 {
		t.Errorf("%d bytes are retained, %d times refused; want 2 of 60 kB, and 4 times", got.RetainedBytes, got.Limited["retained"])
	}
	if err := s.b.Publish(context.Background(), Message{Topic: "w/more", Payload: make([]byte, 60<<10), Retain: true}); err != ErrQuota {
		t.Errorf("Publish: got %v, want ErrQuota", err)
	}
}

// A will retained at QoS 0 is in the store before the will is not.
func TestRetainedWillSurvivesCut(t *testing.T) {
	r := newRig(t)
	log := slog.New(slog.DiscardHandler)
	r.p = newPlane(&r.cfg, storage.NewJournal(r.store, storage.Config{RetainFlush: 10e9}, log), log)
	c := &party{r: r}
	c.s = r.p.open(c, opening{clientID: "c", version: 5, expiry: 1000, window: 10,
		will: &will{msg: &storage.Message{Topic: "w", Payload: []byte("gone"), Retain: true}, who: &principal{}}}, &r.b).s
	r.commit()
	r.p.leave(c.s, c, leaving{}, &r.b)
	r.commit()
	r.boot()
	if m := r.p.Retained("w"); m == nil && r.p.wills["c"] == nil {
		t.Error("neither the will nor its message is there after a cut")
	}
}

// A client need not wait for its CONNACK, nor for anything else, to have said
// what it had to say (3.1.4).
func TestClientThatDoesNotWait(t *testing.T) {
	s := start(t, t.TempDir())
	watch, _ := s.connect(connectOptions{id: "watch", clean: true})
	watch.subscribe(1, "t")
	for i := range 50 {
		c := s.dial()
		c.send(slices.Concat(connectPacket(connectOptions{id: fmt.Sprint("c", i), version: 4, clean: true}), c.publishPacket("t", fmt.Sprint(i), 0, 0, 0), []byte{typeDisconnect << 4, 0}))
		c.c.Close()
	}
	got := map[string]bool{}
	for range 50 {
		got[watch.take().payload] = true
	}
	if len(got) != 50 {
		t.Errorf("got %v, want 50 messages", got)
	}
}

// A retained message needs no new routes while nobody subscribes.
func TestRetainedKeepsItsRoutes(t *testing.T) {
	r := newRig(t)
	c := r.connect("c", 10)
	c.subscribe(0, "t")
	rt := r.p.routesFor("t")
	m := &storage.Message{Topic: "t", Payload: []byte("x"), Retain: true}
	if r.p.retain(m, rt, &receipt{}) != rt {
		t.Error("the routes were computed anew")
	}
	c.subscribe(0, "+")
	if r.p.retain(m, rt, &receipt{}) == rt {
		t.Error("a new subscription was not seen")
	}
}

// What a client that is away pins is its own messages, not those of others that
// were stored beside them.
func TestPinnedSegmentsAreCompacted(t *testing.T) {
	r := newRig(t)
	pub, away, bulk := r.connect("pub", 1000), r.connect("away", 10), r.connect("bulk", 1000)
	away.subscribe(1, "small")
	bulk.subscribe(2, "large")
	r.commit()
	r.p.leave(away.s, away, leaving{}, &r.b)
	stored := func() (size int) {
		r.commit()
		r.commit()
		img, err := r.store.Load()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range img.Segments {
			size += len(s.Body)
		}
		return size
	}
	for i := range 20 {
		pub.publish(storage.Message{Topic: "small", Payload: fmt.Appendf(nil, "m%d", i), QoS: 1}, uint16(1+i))
		for k := range 20 {
			pub.publish(storage.Message{Topic: "large", Payload: make([]byte, 2000), QoS: 2}, uint16(1000+20*i+k))
		}
		r.commit() // QoS 2 is stored in any case
		for seq := range uint64(20) {
			id := bulk.s.packetID(bulk.s.nextSeq - 20 + seq)
			bulk.s.pubrec(id, 0, &r.b)
			r.commit()
			bulk.s.pubcomp(id, &r.b)
		}
	}
	if n := bulk.s.waiting(); n != 0 {
		t.Fatalf("%d messages are not acknowledged", n)
	}
	if size := stored(); size > 1000 {
		t.Errorf("%d bytes are stored for 20 messages of a few bytes", size)
	}
	r.boot()
	if size := stored(); size > 1000 {
		t.Errorf("%d bytes are stored after a restart", size)
	}
	again := r.connect("away", 100)
	if len(again.deliveries) != 20 || !strings.HasPrefix(again.deliveries[19], "m19 ") {
		t.Errorf("got %d of 20: %q", len(again.deliveries), again.deliveries)
	}
	for seq := range uint64(20) {
		again.s.puback(again.s.packetID(again.s.nextSeq-20+seq), &r.b)
	}
}

// Large payloads arrive whole and in order between small ones, also at a client
// that reads late.
func TestLargePayloadsInOrder(t *testing.T) {
	s := start(t, t.TempDir())
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(1, "t")
	pub, _ := s.connect(connectOptions{id: "pub", clean: true})
	const n = 300
	payload := func(i int) string {
		size := []int{10, 20_000, 5, 300_000, 64 << 10, 1000, 17_000}[i%7]
		return fmt.Sprintf("%d ", i) + strings.Repeat(string(rune('a'+i%26)), size)
	}
	got := map[byte]int{} // by QoS, the message that came last
	take := func() (i int) {
		t.Helper()
		d := sub.take()
		if _, err := fmt.Sscan(d.payload, &i); err != nil || d.payload != payload(i) {
			t.Fatalf("got a payload of %d bytes that is none of ours: %.20q", len(d.payload), d.payload)
		}
		qos := byte(i % 2)
		want := i // QoS 0 may be lost
		if last, ok := got[qos]; ok {
			want = last + 2
		}
		if i < want || qos == 1 && i > want {
			t.Fatalf("message %d of QoS %d, want %d", i, qos, want)
		}
		got[qos] = i
		return i
	}
	for i := range 60 { // the reader keeps up
		pub.send(pub.publishPacket("t", payload(i), byte(i%2), 0, uint16(1+i)))
		take()
	}
	for i := 60; i < n; i++ { // it does not
		pub.send(pub.publishPacket("t", payload(i), byte(i%2), 0, uint16(1+i)))
	}
	for take() != n-1 {
	}
}
