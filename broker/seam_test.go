package broker

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"penstock/internal/units"
	"penstock/storage"
	"penstock/storage/storagetest"
)

// spy is a second hook in mochi that sees what mochi sees, and can panic
// there.
type spy struct {
	mqtt.HookBase
	mu    sync.Mutex
	kinds []byte
	sizes []int
	panic func(pk packets.Packet) bool
}

func (s *spy) ID() string               { return "spy" }
func (s *spy) Provides(event byte) bool { return event == mqtt.OnPacketRead }

func (s *spy) OnPacketRead(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	s.mu.Lock()
	s.kinds = append(s.kinds, pk.FixedHeader.Type)
	s.sizes = append(s.sizes, pk.FixedHeader.Remaining)
	s.mu.Unlock()
	if s.panic != nil && s.panic(pk) {
		panic("put in by a test")
	}
	return pk, nil
}

func (s *spy) seen() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.kinds)
}

func (s *server) spy() *spy {
	s.t.Helper()
	h := &spy{}
	if err := s.b.mochi.AddHook(h, nil); err != nil {
		s.t.Fatal(err)
	}
	return h
}

// connGoroutines returns how many goroutines belong to connections.
func connGoroutines() int {
	var dump bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&dump, 2) // into memory
	n := 0
	for g := range strings.SplitSeq(dump.String(), "\n\n") {
		if strings.Contains(g, "broker.(*conn)") || strings.Contains(g, "mochi-mqtt/server/v2.(*Client)") {
			n++
		}
	}
	return n
}

// quiet waits until nothing is left of any connection: not here, not in mochi,
// no goroutine.
func (s *server) quiet() {
	s.t.Helper()
	eventually(s.t, "nothing is left of the connections", func() bool {
		return len(s.b.connections()) == 0 && s.b.mochi.Clients.Len() == 0 && s.b.plane.connections.Load() == 0 &&
			atomic.LoadInt64(&s.b.mochi.Info.ClientsConnected) == 0 && connGoroutines() == 0
	})
}

// ping fails unless the connection is alive and everything before was read.
func (c *client) ping() {
	c.t.Helper()
	c.send([]byte{typePingreq << 4, 0})
	c.expect(typePingresp)
}

// alive fails unless the broker serves a new client.
func (s *server) alive() {
	s.t.Helper()
	c, _ := s.connect(connectOptions{id: "alive", clean: true})
	c.subscribe(1, "alive")
	c.publish("alive", "yes", 1, false)
	c.takeAll("yes%.0d", 0, 1)
	c.disconnect()
}

// props5 makes properties: pairs of an identifier and its bytes.
func props5(parts ...[]byte) []byte {
	body := bytes.Join(parts, nil)
	return append(appendVarint(nil, len(body)), body...)
}

func u32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// mochi sees one CONNECT, whole and never a byte beyond, however the bytes
// come.
func TestMochiSeesConnectOnly(t *testing.T) {
	for _, version := range []byte{3, 4, 5} {
		for _, chunk := range []int{1, 3, 1 << 20} {
			t.Run(fmt.Sprintf("v%d by %d", version, chunk), func(t *testing.T) {
				s := start(t, t.TempDir())
				spy := s.spy()
				c := s.dial()
				c.version, c.raw = version, true
				all := bytes.Join([][]byte{
					connectPacket(connectOptions{id: "c", version: version, clean: true}),
					packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a"), []byte{2}),
					{typePingreq << 4, 0},
					c.publishPacket("a", "zero", 0, 0, 0),
					c.publishPacket("a", "one", 1, 0, 2),
					c.publishPacket("a", "two", 2, 0, 3),
					packet(typePubrel<<4|2, u16(3)),
					packet(typePuback<<4, u16(900)),
					packet(typePubrec<<4, u16(901)),
					packet(typePubcomp<<4, u16(902)),
					{typePingreq << 4, 0},
					packet(typeUnsubscribe<<4|2, u16(4), c.noProps(), str("a")),
					{typePingreq << 4, 0},
					{typeDisconnect << 4, 0},
					c.publishPacket("a", "behind", 1, 0, 9), // nothing counts behind a DISCONNECT
				}, nil)
				go func() { // the broker answers meanwhile
					for len(all) > 0 {
						n := min(chunk, len(all))
						if _, err := c.c.Write(all[:n]); err != nil {
							return // it has closed behind the DISCONNECT
						}
						all = all[n:]
					}
				}()
				got := map[byte]int{}
				for {
					first, _, err := c.tryRead()
					if err != nil {
						break
					}
					got[first>>4]++
				}
				c.c.Close()
				want := map[byte]int{typeConnack: 1, typeSuback: 1, typePingresp: 3, typePublish: 3, typePuback: 1, typePubrec: 1, typePubcomp: 1, typePubrel: 1, typeUnsuback: 1}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("answers by packet type: got %v, want %v", got, want)
				}
				if got, want := spy.seen(), []byte{typeConnect}; !bytes.Equal(got, want) {
					t.Errorf("mochi saw %v, want %v", got, want)
				}
				s.quiet()
			})
		}
	}
}

// Before CONNECT was accepted no packet does anything, and one that is not a
// CONNECT ends the connection.
func TestNothingBeforeConnect(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxConnect = 4096 })
	spy := s.spy()
	for kind := byte(0); kind < 16; kind++ {
		if kind == typeConnect {
			continue
		}
		for _, flags := range []byte{0, 1, 2, 3} {
			c := s.dial()
			c.send(packet(kind<<4|flags, str("early"), u16(1), []byte("x")))
			if reason := c.expectEnd(); reason != 0 {
				t.Errorf("type %d: got a DISCONNECT with reason %#x, want none before CONNECT", kind, reason)
			}
		}
	}
	s.quiet()
	if got := spy.seen(); len(got) != 0 {
		t.Errorf("mochi saw packets %v before any CONNECT, want none", got)
	}
	// Nor does what follows a CONNECT that is refused.
	for name, bad := range map[string][]byte{
		"wrong version":  packet(typeConnect<<4, str("MQTT"), []byte{6, 2, 0, 0}, str("c")),
		"bad login":      connectPacket(connectOptions{id: "c", version: 4, clean: true, user: "nobody", password: "x"}),
		"no client id":   connectPacket(connectOptions{version: 4}),
		"reserved flags": append([]byte{typeConnect<<4 | 1}, connectPacket(connectOptions{id: "c", version: 4, clean: true})[1:]...),
		"too long":       connectPacket(connectOptions{id: strings.Repeat("c", 5000), version: 4, clean: true}),
	} {
		c := s.dial()
		c.send(append(bad, c.publishPacket("early", "x", 1, 1, 1)...))
		for {
			first, _, err := c.tryRead()
			if err != nil {
				break
			}
			if first>>4 != typeConnack {
				t.Errorf("%s: got packet %#x, want at most a CONNACK", name, first)
			}
		}
	}
	s.quiet()
	st := s.b.Stats()
	if st.Retained != 0 || st.MessagesIn != [3]uint64{} || st.Sessions != 0 {
		t.Errorf("got %d retained, %v messages in, %d sessions, want none of them", st.Retained, st.MessagesIn, st.Sessions)
	}
}

// mochi reads through 2 kB: a long CONNECT takes several Reads, and what
// follows it at once is not lost.
func TestLongConnect(t *testing.T) {
	for _, chunk := range []int{1000, 1 << 20} {
		s := start(t, t.TempDir())
		sub, _ := s.connect(connectOptions{id: "sub", clean: true})
		sub.subscribe(1, "will")
		payload := strings.Repeat("w", 60000)
		all := connectPacket(connectOptions{id: strings.Repeat("c", 60000), version: 4, clean: true, will: &storage.Message{Topic: "will", Payload: []byte(payload), QoS: 1}})
		c := s.dial()
		all = append(all, c.publishPacket("will", "alive", 1, 0, 1)...)
		for part := all; len(part) > 0; part = part[min(chunk, len(part)):] {
			c.send(part[:min(chunk, len(part))])
		}
		if first, body := c.read(); first != typeConnack<<4 || body[1] != 0 {
			t.Fatalf("long CONNECT: got % x % x, want success", first, body)
		}
		c.expectAck(typePuback, 1)
		c.c.Close()
		sub.takeAll("alive%.0d", 0, 1)
		if d := sub.take(); d.payload != payload {
			t.Errorf("will has %d bytes, want %d", len(d.payload), len(payload))
		}
	}
}

// However a connection ends, nothing of it stays.
func TestEveryEndingLeavesNothing(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.ConnectTimeout = units.Duration(200 * time.Millisecond) })
	spy := s.spy()
	spy.panic = func(pk packets.Packet) bool { return pk.Connect.ClientIdentifier == "panics" }
	up := func(version byte, id string) *client {
		c, _ := s.connect(connectOptions{id: id, version: version, clean: true})
		return c
	}
	end := func(c *client) {
		c.expectEnd()
		c.c.Close()
	}
	for _, version := range []byte{3, 4, 5} {
		for name, try := range map[string]func(){
			"DISCONNECT": func() { up(version, "c").disconnect() },
			"close":      func() { up(version, "c").c.Close() },
			"reset": func() {
				c := up(version, "c").c.(*net.TCPConn)
				c.SetLinger(0)
				c.Close()
			},
			"half close": func() {
				c := up(version, "c")
				c.c.(*net.TCPConn).CloseWrite()
				end(c)
			},
			"error": func() {
				c := up(version, "c")
				c.send([]byte{0, 0})
				end(c)
			},
			"half a packet": func() {
				c := up(version, "c")
				c.send([]byte{typePublish << 4, 100, 0})
				c.c.Close()
			},
			"takeover": func() {
				old := up(version, "c")
				up(version, "c").c.Close()
				old.expectEnd()
				old.c.Close()
			},
			"closed before CONNACK": func() {
				c := s.dial()
				c.send(connectPacket(connectOptions{id: "c", version: version, clean: true}))
				c.c.Close()
			},
			"half a CONNECT": func() {
				c := s.dial()
				c.send(connectPacket(connectOptions{id: "c", version: version, clean: true})[:9])
				c.c.Close()
			},
			"silence": func() { end(s.dial()) },
			"refusal": func() {
				c := s.dial()
				c.send(connectPacket(connectOptions{id: "c", version: version, user: "nobody", password: "x"}))
				end(c)
			},
			"panic": func() {
				c := s.dial()
				c.send(connectPacket(connectOptions{id: "panics", version: version, clean: true}))
				end(c)
			},
			"nonsense": func() { c := s.dial(); c.send([]byte("GET / HTTP/1.1\r\n\r\n")); end(c) },
		} {
			before := s.b.plane.sockets.Load()
			try()
			eventually(t, "the connection is accepted", func() bool { return s.b.plane.sockets.Load() > before })
			s.quiet()
			if got := s.b.Stats(); got.Connections != 0 || got.Sessions != 0 || got.Subscriptions != 0 {
				t.Errorf("v%d, after %s: got %d connections, %d sessions, %d subscriptions, want none", version, name, got.Connections, got.Sessions, got.Subscriptions)
			}
		}
	}
	s.alive()
}

// everyPacket is one well-formed packet of each type for a version.
func everyPacket(version byte) map[string][]byte {
	c := &client{version: version}
	var props, ackTail, disconnectTail []byte
	if version == 5 {
		user := append([]byte{propUser}, append(str("k"), str("v")...)...)
		props = props5([]byte{propMessageExpiry}, u32(9), user)
		ackTail = append([]byte{0}, props5([]byte{propReasonString}, str("r"))...)
		disconnectTail = append([]byte{0}, props5([]byte{propReasonString}, str("bye"))...)
	}
	return map[string][]byte{
		"CONNECT": connectPacket(connectOptions{id: "c", version: version, clean: true, expiry: 1, receiveMax: 2, maxPacket: 9999, will: &storage.Message{Topic: "w", Payload: []byte("p")}, willDelay: 1}),
		"CONNACK": packet(typeConnack<<4, []byte{0, 0}, c.noProps()), "PUBLISH 0": packet(typePublish<<4, str("a/b"), props, []byte("pay")),
		"PUBLISH 1": packet(typePublish<<4|2, str("a/b"), u16(1), props, []byte("pay")), "PUBLISH 2": packet(typePublish<<4|4, str("a/b"), u16(1), props, []byte("pay")),
		"PUBACK": packet(typePuback<<4, u16(1), ackTail), "PUBREC": packet(typePubrec<<4, u16(1), ackTail),
		"PUBREL": packet(typePubrel<<4|2, u16(1), ackTail), "PUBCOMP": packet(typePubcomp<<4, u16(1), ackTail),
		"SUBSCRIBE": packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a"), []byte{1}, str("b"), []byte{0}),
		"SUBACK":    packet(typeSuback<<4, u16(1), c.noProps(), []byte{0}), "UNSUBSCRIBE": packet(typeUnsubscribe<<4|2, u16(1), c.noProps(), str("a"), str("b")),
		"UNSUBACK": packet(typeUnsuback<<4, u16(1), c.noProps()), "PINGREQ": {typePingreq << 4, 0}, "PINGRESP": {typePingresp << 4, 0},
		"DISCONNECT": packet(typeDisconnect<<4, disconnectTail), "AUTH": packet(typeAuth<<4, []byte{0x18}, props5([]byte{21}, str("m"))), "reserved": packet(0, u16(1)),
	}
}

// Every prefix of every packet, as it stands and with a length that fits it:
// the broker stays up, the connection ends, and nothing of it stays.
func TestTruncatedPackets(t *testing.T) {
	s := start(t, t.TempDir())
	for _, version := range []byte{3, 4, 5} {
		for name, whole := range everyPacket(version) {
			t.Run(fmt.Sprintf("v%d %s", version, name), func(t *testing.T) {
				_, header, err := frameSize(whole)
				if err != nil {
					t.Fatal(err)
				}
				body := whole[header:]
				try := func(what string, b []byte) {
					t.Helper()
					c := s.dial()
					if name != "CONNECT" {
						c.send(connectPacket(connectOptions{id: "t", version: version, clean: true}))
					}
					c.send(b)
					c.c.(*net.TCPConn).CloseWrite()
					for {
						if _, _, err := c.tryRead(); err != nil {
							if ne, ok := err.(net.Error); ok && ne.Timeout() {
								t.Errorf("%s: the connection is still there", what)
							}
							break
						}
					}
					c.c.Close()
				}
				for n := range len(whole) {
					try(fmt.Sprintf("the first %d bytes", n), whole[:n])
				}
				for n := range len(body) {
					try(fmt.Sprintf("a body of %d bytes", n), packet(whole[0], body[:n]))
				}
				try("a byte too many", packet(whole[0], body, []byte{0}))
			})
		}
	}
	s.quiet()
	s.alive()
}

// Packets above the bound end the connection at once, before their bytes come.
func TestOversizedPackets(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.MaxPacket, c.MaxConnect = 2000, 1500 })
	for _, version := range []byte{3, 4, 5} {
		for kind := byte(0); kind < 16; kind++ {
			c := s.dial()
			c.send([]byte{kind << 4, 0xFF, 0xFF, 0xFF, 0x7F}) // 256 MB, announced by five bytes
			c.expectEnd()
			if kind == typeConnect {
				continue
			}
			c, _ = s.connect(connectOptions{id: "c", version: version, clean: true})
			c.send([]byte{kind << 4, 0xFF, 0xFF, 0xFF, 0x7F})
			want := byte(0)
			if version == 5 {
				want = reasonTooLarge
			}
			if got := c.expectEnd(); got != want {
				t.Errorf("v%d, type %d: got reason %#x, want %#x", version, kind, got, want)
			}
			c, _ = s.connect(connectOptions{id: "c", version: version, clean: true})
			c.send([]byte{kind << 4, 0xFF, 0xFF, 0xFF, 0xFF, 0x01}) // a length of five bytes
			if version == 5 {
				want = reasonMalformed
			}
			if got := c.expectEnd(); got != want {
				t.Errorf("v%d, type %d, length of five bytes: got reason %#x, want %#x", version, kind, got, want)
			}
		}
		// The bound itself.
		c, _ := s.connect(connectOptions{id: "c", version: version, clean: true})
		p := c.publishPacket("a", "", 1, 0, 1)
		fit := strings.Repeat("x", 2000-len(p)-1)
		if p = c.publishPacket("a", fit, 1, 0, 1); len(p) != 2000 {
			t.Fatalf("the packet has %d bytes, want 2000", len(p))
		}
		c.send(p)
		c.expectAck(typePuback, 1)
		c.send(c.publishPacket("a", fit+"x", 1, 0, 2))
		want := byte(0)
		if version == 5 {
			want = reasonTooLarge
		}
		if got := c.expectEnd(); got != want {
			t.Errorf("v%d, a byte above the bound: got reason %#x, want %#x", version, got, want)
		}
		// And of a CONNECT.
		for extra, want := range []bool{true, false} {
			o := connectOptions{version: version, clean: true}
			o.id = strings.Repeat("c", 1500-len(connectPacket(o))-1+extra)
			c := s.dial()
			c.send(connectPacket(o))
			first, body, err := c.tryRead()
			if got := err == nil && first>>4 == typeConnack && body[1] == 0; got != want {
				t.Errorf("v%d, CONNECT of %d bytes: accepted %v, want %v", version, len(connectPacket(o)), got, want)
			}
			c.c.Close()
		}
	}
	s.quiet()
}

func TestSecondConnect(t *testing.T) {
	s := start(t, t.TempDir())
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(0, "will/#")
	for version, want := range map[byte]byte{3: 0, 4: 0, 5: reasonProtocolError} {
		topic := fmt.Sprintf("will/%d", version)
		o := connectOptions{id: "c", version: version, clean: true, will: &storage.Message{Topic: topic}}
		c, _ := s.connect(o)
		c.send(connectPacket(o))
		if got := c.expectEnd(); got != want {
			t.Errorf("v%d: got reason %#x, want %#x", version, got, want)
		}
		if d := sub.take(); d.topic != topic {
			t.Errorf("v%d: got %q, want the will", version, d.topic)
		}
	}
	c := s.dial() // also when both come at once
	two := connectPacket(connectOptions{id: "c", version: 5, clean: true})
	c.send(append(two, two...))
	if got := c.expectEnd(); got != reasonProtocolError {
		t.Errorf("two at once: got reason %#x, want %#x", got, reasonProtocolError)
	}
}

// Of many connections that want one client identifier at the same time exactly
// one stays, and that one is subscribed and gets messages.
func TestConcurrentTakeover(t *testing.T) {
	const contenders, rounds = 50, 4
	for _, o := range []connectOptions{{id: "c", version: 4}, {id: "c", version: 5, expiry: 60}, {id: "c", version: 5, clean: true}} {
		t.Run(fmt.Sprintf("v%d clean %v", o.version, o.clean), func(t *testing.T) {
			s := start(t, t.TempDir())
			pub, _ := s.connect(connectOptions{id: "pub", clean: true})
			for round := range rounds {
				var wg sync.WaitGroup
				got := make(chan int, contenders)
				acked := make(chan int, contenders) // who has its SUBACK
				conns := make([]*client, contenders)
				for i := range contenders {
					conns[i] = s.dial()
					conns[i].version = o.version
				}
				var gone atomic.Int32
				for i, c := range conns {
					wg.Go(func() {
						defer gone.Add(1)
						_, err := c.c.Write(append(connectPacket(o), packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a"), []byte{1})...))
						for err == nil {
							var first byte
							var body []byte
							if first, body, err = c.tryRead(); err != nil {
								return
							}
							switch first >> 4 {
							case typeSuback:
								acked <- i
							case typePublish:
								d := parseDelivery(first, body, o.version)
								if _, err = c.c.Write(packet(typePuback<<4, u16(d.id))); d.payload == fmt.Sprint(round) {
									got <- i
								}
							}
						}
					})
				}
				survivors := func() []*conn {
					var all []*conn
					for _, c := range s.b.connections() {
						if c.sock.RemoteAddr().String() != pub.c.LocalAddr().String() {
							all = append(all, c)
						}
					}
					return all
				}
				// All have come to an end but one, and that one has its SUBACK.
				ended := func() bool {
					return gone.Load() == contenders-1 && s.b.plane.connections.Load() == 2 && len(survivors()) == 1 && s.b.mochi.Clients.Len() == 0
				}
				eventually(t, "one connection stays", func() bool {
					if !ended() {
						return false
					}
					return len(s.b.Clients()) == 2
				})
				left := survivors()[0].sock.RemoteAddr().String()
				eventually(t, "the survivor is subscribed", func() bool {
					for {
						select {
						case i := <-acked:
							if conns[i].c.LocalAddr().String() == left {
								return true
							}
						default:
							return false
						}
					}
				})
				pub.publish("a", fmt.Sprint(round), 1, false)
				select {
				case i := <-got:
					if conns[i].c.LocalAddr().String() != left {
						t.Errorf("round %d: the message came on a connection that lost", round)
					}
				case <-time.After(patience):
					t.Fatalf("round %d: the survivor gets no message", round)
				}
				for _, c := range conns {
					c.c.Close()
				}
				wg.Wait()
				if len(got) != 0 {
					t.Errorf("round %d: the message came more than once", round)
				}
				eventually(t, "the survivor is gone", func() bool { return s.b.plane.connections.Load() == 1 })
			}
			pub.disconnect()
			s.quiet()
		})
	}
}

func TestTakeoverReason(t *testing.T) {
	s := start(t, t.TempDir())
	for version, want := range map[byte]byte{3: 0, 4: 0, 5: reasonTakenOver} {
		old, _ := s.connect(connectOptions{id: "c", version: version, expiry: 60})
		c, present := s.connect(connectOptions{id: "c", version: version, expiry: 60})
		if !present && version >= 4 {
			t.Errorf("v%d: no session present", version)
		}
		if got := old.expectEnd(); got != want {
			t.Errorf("v%d: got reason %#x, want %#x", version, got, want)
		}
		c.ping()
		c.disconnect()
	}
	// A stranger that only knows the client identifier takes nothing over.
	c, _ := s.connect(connectOptions{id: "c", clean: true})
	thief := s.dial()
	thief.send(connectPacket(connectOptions{id: "c", version: 4, clean: true, user: "nobody", password: "x"}))
	thief.expectEnd()
	c.ping()
}

// mochi ignores reason 0x04 in a DISCONNECT of one byte; then the will is
// lost.
func TestDisconnectAndWill(t *testing.T) {
	s := start(t, t.TempDir())
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(0, "will/#")
	for i, tc := range []struct {
		name    string
		version byte
		last    []byte
		fires   bool
	}{
		{"v5, no reason", 5, []byte{typeDisconnect << 4, 0}, false},
		{"v5, reason 0", 5, []byte{typeDisconnect << 4, 1, 0}, false},
		{"v5, reason 4, length 1", 5, []byte{typeDisconnect << 4, 1, 4}, true},
		{"v5, reason 4, length 2", 5, []byte{typeDisconnect << 4, 2, 4, 0}, true},
		{"v4", 4, []byte{typeDisconnect << 4, 0}, false},
		{"v3", 3, []byte{typeDisconnect << 4, 0}, false},
		{"closed", 4, nil, true},
		{"error", 5, []byte{0, 0}, true},
		{"malformed DISCONNECT", 5, []byte{typeDisconnect<<4 | 1, 0}, true},
		{"DISCONNECT with bytes behind", 5, []byte{typeDisconnect << 4, 3, 0, 0, 7}, true},
		{"v4 DISCONNECT with a body", 4, []byte{typeDisconnect << 4, 1, 0}, true},
	} {
		topic := fmt.Sprintf("will/%d", i)
		c, _ := s.connect(connectOptions{id: "c", version: tc.version, clean: true, will: &storage.Message{Topic: topic, Payload: []byte("gone")}})
		if tc.last != nil {
			c.send(tc.last)
			c.expectEnd()
		}
		c.c.Close()
		eventually(t, "the session is gone", func() bool { return s.b.plane.session("c") == nil })
		sub.publish("will/end", "", 0, false) // everything before it has come when it comes
		d := sub.take()
		if got := d.topic == topic; got != tc.fires {
			t.Errorf("%s: will published %v, want %v", tc.name, got, tc.fires)
		}
		if d.topic != "will/end" {
			sub.take()
		}
	}
}

// Legal, and refused by mochi.
func TestEmptyWillAndPassword(t *testing.T) {
	s := start(t, t.TempDir())
	hash, err := HashPassword("")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.db.PutCredential(context.Background(), storage.Credential{Username: "u", Hash: hash}, true); err != nil {
		t.Fatal(err)
	}
	sub, _ := s.connect(connectOptions{id: "sub", clean: true})
	sub.subscribe(0, "will")
	for _, version := range []byte{3, 4, 5} {
		c, _ := s.connect(connectOptions{id: "c", version: version, clean: true, user: "u", will: &storage.Message{Topic: "will"}})
		c.c.Close()
		if d := sub.take(); d.topic != "will" || d.payload != "" {
			t.Errorf("v%d: got %q %q, want an empty will", version, d.topic, d.payload)
		}
	}
}

func TestConnectRefusals(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, _ *storage.Config) { c.Anonymous = "none" })
	hello := func(name string, version, flags byte, rest ...[]byte) []byte {
		return packet(typeConnect<<4, append([][]byte{str(name), {version, flags, 0, 0}}, rest...)...)
	}
	none := []byte{}
	login := append(str("nobody"), str("x")...)
	for _, tc := range []struct {
		name string
		in   []byte
		want []byte // the whole answer; nil: nothing, just closed
	}{
		{"MQTT 6", hello("MQTT", 6, 2, none, str("c")), []byte{0x20, 3, 0, 0x84, 0}},
		{"MQTT 3", hello("MQTT", 3, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"MQTT 0", hello("MQTT", 0, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"MQIsdp 4", hello("MQIsdp", 4, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"MQIsdp 2", hello("MQIsdp", 2, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"MQIsdp 5", hello("MQIsdp", 5, 2, []byte{0}, str("c")), []byte{0x20, 2, 0, 1}},
		// Mosquitto's bridges set the high bit at first and fall back on code 1 only.
		{"bridge of 3.1.1", hello("MQTT", 0x84, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"bridge of 3.1", hello("MQIsdp", 0x83, 2, str("c")), []byte{0x20, 2, 0, 1}},
		{"other protocol", hello("HTTP", 4, 2, str("c")), nil},
		{"no login, v3", hello("MQIsdp", 3, 2, str("c")), []byte{0x20, 2, 0, 5}},
		{"no login, v4", hello("MQTT", 4, 2, str("c")), []byte{0x20, 2, 0, 5}},
		{"no login, v5", hello("MQTT", 5, 2, []byte{0}, str("c")), []byte{0x20, 3, 0, 0x87, 0}},
		{"bad login, v3", hello("MQIsdp", 3, 0xC2, str("c"), login), []byte{0x20, 2, 0, 4}},
		{"bad login, v4", hello("MQTT", 4, 0xC2, str("c"), login), []byte{0x20, 2, 0, 4}},
		{"bad login, v5", hello("MQTT", 5, 0xC2, []byte{0}, str("c"), login), []byte{0x20, 3, 0, 0x86, 0}},
		{"no client id, v3", hello("MQIsdp", 3, 2, str("")), []byte{0x20, 2, 0, 2}},
		{"no client id, v4 persistent", hello("MQTT", 4, 0, str("")), []byte{0x20, 2, 0, 2}},
		{"authentication method", hello("MQTT", 5, 2, props5([]byte{21}, str("SCRAM")), str("c")), []byte{0x20, 3, 0, 0x8C, 0}},
		{"reserved flag, v4", hello("MQTT", 4, 3, str("c")), nil},
		{"reserved flag, v5", hello("MQTT", 5, 3, []byte{0}, str("c")), []byte{0x20, 3, 0, 0x81, 0}},
		{"will QoS 3", hello("MQTT", 5, 0x1E, []byte{0}, str("c"), []byte{0}, str("w"), str("p")), []byte{0x20, 3, 0, 0x81, 0}},
		{"will QoS without a will", hello("MQTT", 5, 0x0A, []byte{0}, str("c")), []byte{0x20, 3, 0, 0x81, 0}},
		{"will topic with a wildcard", hello("MQTT", 5, 6, []byte{0}, str("c"), []byte{0}, str("w/#"), str("p")), []byte{0x20, 3, 0, 0x90, 0}},
		{"password without a user name, v4", hello("MQTT", 4, 0x42, str("c"), str("p")), nil},
		{"receive maximum 0", hello("MQTT", 5, 2, props5([]byte{33, 0, 0}), str("c")), []byte{0x20, 3, 0, 0x82, 0}},
		{"maximum packet size 0", hello("MQTT", 5, 2, props5([]byte{39}, u32(0)), str("c")), []byte{0x20, 3, 0, 0x82, 0}},
	} {
		c := s.dial()
		c.send(tc.in)
		c.c.SetReadDeadline(time.Now().Add(patience))
		got, err := io.ReadAll(c.c)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if len(got) > 5 && got[4] > 3 && got[5] == propReasonString { // says why; the words are free
			got = []byte{got[0], 3, got[2], got[3], 0}
		}
		if !bytes.Equal(got, tc.want) {
			t.Errorf("%s: got % x, want % x", tc.name, got, tc.want)
		}
	}
	s.quiet()
}

// A keep alive above 43,690 s overflows in mochi, and the client is
// disconnected at once.
func TestLongKeepAlive(t *testing.T) {
	s := start(t, t.TempDir())
	for _, keepAlive := range []uint16{43690, 43691, 50000, 65535} {
		c, _ := s.connect(connectOptions{id: "c", clean: true, keepAlive: keepAlive})
		c.ping()
		c.ping()
		c.disconnect()
	}
}

// stubborn is a listener whose Accept fails for a while.
type stubborn struct {
	net.Listener
	fails atomic.Int32
}

func (l *stubborn) Accept() (net.Conn, error) {
	if l.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// A panic in a connection costs that connection, and its session goes down as
// with any other end.
func TestPanicIsSurvived(t *testing.T) {
	for _, version := range []byte{4, 5} {
		s := start(t, t.TempDir())
		sub, _ := s.connect(connectOptions{id: "sub", clean: true})
		sub.subscribe(1, "will", "a")
		s.b.plane.mu.Lock()
		s.b.plane.subs.add("defect", &subscription{topic: "defect"}) // of no session
		s.b.plane.mu.Unlock()
		o := connectOptions{id: "c", version: version, expiry: 60, will: &storage.Message{Topic: "will", Payload: []byte("gone"), QoS: 1}}
		c, _ := s.connect(o)
		c.subscribe(1, "b")
		c.send(c.publishPacket("a", "before", 1, 0, 77))
		c.expectAck(typePuback, 77)
		c.send(c.publishPacket("defect", "x", 0, 0, 0))
		c.expectEnd()
		sub.takeAll("before%.0d", 0, 1)
		sub.takeAll("gone%.0d", 0, 1)
		eventually(t, "the session is down", func() bool { return !s.b.plane.connected("c") })
		sub.publish("b", "later", 1, false)
		c, present := s.connect(o)
		if !present {
			t.Errorf("v%d: the session is lost", version)
		}
		c.takeAll("later%.0d", 0, 1)
		c.disconnect()
		sub.disconnect()
		s.quiet()
	}
}

// The reason of a disconnection arrives although the client is still sending:
// bytes that nobody reads would make a reset of it.
func TestLingeringClose(t *testing.T) {
	s := start(t, t.TempDir())
	for i := range 20 {
		c, _ := s.connect(connectOptions{id: "c", version: 5, clean: true})
		c.send(append([]byte{typePublish<<4 | 6, 2}, make([]byte, 512<<10)...)) // QoS 3, and much more behind it
		c.send(make([]byte, 64<<10))
		first, body, err := c.tryRead()
		if err != nil || first != typeDisconnect<<4 || body[0] != reasonMalformed {
			t.Fatalf("try %d: got % x % x, %v, want a DISCONNECT with reason 0x81", i, first, body, err)
		}
		c.c.Close()
	}
	s.quiet()
}

// At a stop everybody is told, and the connections are over when Run returns.
func TestStopTellsClients(t *testing.T) {
	s := start(t, t.TempDir())
	var clients []*client
	for i := range 20 {
		c, _ := s.connect(connectOptions{id: fmt.Sprint(i), version: byte(3 + i%3), clean: true})
		clients = append(clients, c)
	}
	idle := s.dial() // no CONNECT yet
	eventually(t, "all connections are there", func() bool { return len(s.b.connections()) == 21 })
	s.stop()
	if n := len(s.b.connections()); n != 0 {
		t.Errorf("%d connections are left after Run", n)
	}
	for i, c := range clients {
		want := byte(0)
		if c.version == 5 {
			want = reasonShuttingDown
		}
		if got := c.expectEnd(); got != want {
			t.Errorf("client %d: got reason %#x, want %#x", i, got, want)
		}
	}
	idle.expectEnd()
}

// late is a socket on which something happens between the decision to move the
// read deadline and the move.
type late struct {
	net.Conn
	before func()
}

func (l *late) SetReadDeadline(t time.Time) error {
	if f := l.before; f != nil && (t.IsZero() || t.After(time.Now())) {
		l.before = nil
		f()
	}
	return l.Conn.SetReadDeadline(t)
}

// pipes is a broker in a synctest bubble: connections are net.Pipes, the
// database is memory, the clock is virtual.
type pipes struct {
	t     *testing.T
	b     *Broker
	store *storagetest.Memory
	ln    *pipeListener
}

type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// bubble starts a broker. It must be called in a synctest bubble.
func bubble(t *testing.T, fails int32, change ...func(*Config)) *pipes {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Anonymous = "all"
	for _, f := range change {
		f(&cfg)
	}
	log := slog.New(slog.DiscardHandler)
	p := &pipes{t: t, store: &storagetest.Memory{}, ln: &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}}
	b := &Broker{cfg: cfg, log: log, started: time.Now(), hashing: make(chan struct{}, 1), conns: make(map[*conn]struct{})}
	p.b = b
	b.journal = storage.NewJournal(p.store, storage.DefaultConfig(), log)
	b.plane = newPlane(&b.cfg, b.journal, log)
	opts := mochiOptions(&b.cfg)
	opts.Logger = log
	b.mochi = mqtt.New(opts)
	if err := b.mochi.AddHook(&hook{b: b}, nil); err != nil {
		t.Fatal(err)
	}
	ln := &stubborn{Listener: p.ln}
	ln.fails.Store(fails)
	b.slots.max = cfg.MaxConnections
	l := newListener(b, ListenerConfig{Name: "pipe"})
	l.ln = ln
	b.listeners = []*listener{l}
	b.serving.Go(func() { b.accept(l) })
	ctx, cancel := context.WithCancel(context.Background())
	var journal sync.WaitGroup
	journal.Go(func() { _ = b.journal.Run(ctx) }) // returns nil only
	t.Cleanup(func() {
		b.stopping.Store(true)
		p.ln.Close()
		for _, c := range b.connections() {
			c.kick(reasonShuttingDown, "")
		}
		b.serving.Wait()
		cancel()
		journal.Wait()
		synctest.Wait()
	})
	return p
}

// holdCommits makes every commit wait until the returned function is called.
func (p *pipes) holdCommits() (release func()) {
	hold := make(chan struct{})
	p.store.BeforeCommit = func() bool { <-hold; return false }
	return func() { close(hold) }
}

func (p *pipes) dial() *client {
	p.t.Helper()
	ours, theirs := net.Pipe()
	select {
	case p.ln.conns <- theirs:
	case <-time.After(time.Hour):
		p.t.Fatal("nobody accepts")
	}
	p.t.Cleanup(func() { ours.Close() })
	return &client{t: p.t, c: ours, version: 4}
}

func (p *pipes) connect(o connectOptions) *client {
	p.t.Helper()
	c := p.dial()
	c.version = o.version
	c.send(connectPacket(o))
	if first, body := c.read(); first != typeConnack<<4 || body[1] != 0 {
		p.t.Fatalf("CONNACK: got % x % x, want success", first, body)
	}
	return c
}

// lasts returns how long the connection lasts, and the reason of its end. It
// waits for at most d.
func (c *client) lasts(d time.Duration) (time.Duration, byte) {
	c.t.Helper()
	begin, reason := time.Now(), byte(0)
	c.c.SetReadDeadline(begin.Add(d))
	all, err := io.ReadAll(c.c)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		return d, 0
	}
	for len(all) >= 3 {
		if all[0] == typeDisconnect<<4 {
			reason = all[2]
		}
		size, _, err := frameSize(all)
		if err != nil {
			break
		}
		all = all[size:]
	}
	return time.Since(begin), reason
}

// Running out of file descriptors does not end the accept loop.
func TestAcceptGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 20)
		begin := time.Now()
		p.connect(connectOptions{id: "c", version: 4, clean: true}).ping()
		// 5, 10, … 640 ms, then a second each time: it neither spins nor sleeps long.
		if got := time.Since(begin); got < 10*time.Second || got > 20*time.Second {
			t.Errorf("20 failures delayed the next connection by %v, want pauses that grow to a second", got)
		}
	})
}

func TestConnectDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		whole := connectPacket(connectOptions{id: "c", version: 5, clean: true})
		for _, n := range []int{0, 1, len(whole) - 1} {
			c := p.dial()
			go c.c.Write(whole[:n]) // ends with the connection at the latest
			if got, _ := c.lasts(time.Hour); got != p.b.cfg.ConnectTimeout.D() {
				t.Errorf("%d bytes of a CONNECT: closed after %v, want %v", n, got, p.b.cfg.ConnectTimeout.D())
			}
		}
		c := p.dial() // nor does a drip of bytes keep it open
		begin := time.Now()
		for i := range whole {
			if _, err := c.c.Write(whole[i : i+1]); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if got := time.Since(begin); got > 11*time.Second {
			t.Errorf("a drip of bytes: still there after %v", got)
		}
	})
}

func TestKeepAliveIsEnforced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		var wg sync.WaitGroup
		for _, seconds := range []uint16{1, 60, 43691, 65535} {
			for version, want := range map[byte]byte{3: 0, 4: 0, 5: reasonKeepAlive} {
				c := p.connect(connectOptions{id: "c", version: version, clean: true, keepAlive: seconds})
				got, reason := c.lasts(100 * time.Hour)
				least := time.Duration(seconds) * time.Second * 3 / 2
				if got < least || got > least*5/4 || reason != want {
					t.Errorf("v%d, keep alive %d s: ended after %v with reason %#x, want %v or a little more and %#x", version, seconds, got, reason, least, want)
				}
			}
		}
		c := p.connect(connectOptions{id: "c", version: 5, clean: true})
		if got, reason := c.lasts(1000 * time.Hour); got != 1000*time.Hour {
			t.Errorf("keep alive 0: ended after %v with reason %#x, want never", got, reason)
		}
		// Half a packet is none.
		c = p.connect(connectOptions{id: "d", version: 5, clean: true, keepAlive: 10})
		wg.Go(func() {
			for range 9 {
				if _, err := c.c.Write([]byte{typePublish << 4}); err != nil {
					return
				}
				time.Sleep(4 * time.Second)
			}
		})
		if got, _ := c.lasts(time.Hour); got > 25*time.Second {
			t.Errorf("a drip of bytes kept the connection for %v", got)
		}
		wg.Wait()
	})
}

// Every packet of the client pushes the deadline out, not PINGREQ alone; what
// we send does not.
func TestEveryPacketCountsForKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		c := p.connect(connectOptions{id: "c", version: 5, clean: true, keepAlive: 10})
		c.c.SetReadDeadline(time.Time{})
		go io.Copy(io.Discard, c.c) // ends with the connection
		for i := range 20 {
			for name, b := range map[string][]byte{
				"PUBLISH 0": c.publishPacket("a", "x", 0, 0, 0), "PUBLISH 1": c.publishPacket("a", "x", 1, 0, 1), "PUBACK": packet(typePuback<<4, u16(9)),
				"SUBSCRIBE": packet(typeSubscribe<<4|2, u16(1), []byte{0}, str("b"), []byte{0}), "PINGREQ": {typePingreq << 4, 0},
			} {
				if _, err := c.c.Write(b); err != nil {
					t.Fatalf("round %d: the connection ended before %s: %v", i, name, err)
				}
				time.Sleep(14 * time.Second)
			}
		}
		sub := p.connect(connectOptions{id: "sub", version: 4, clean: true, keepAlive: 10})
		sub.subscribe(0, "c")
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 100 {
				if _, err := c.c.Write(c.publishPacket("c", "x", 0, 0, 0)); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
		if got, _ := sub.lasts(time.Hour); got > 20*time.Second {
			t.Errorf("a client that only receives lasted %v, want 15 s and a little", got)
		}
		wg.Wait()
	})
}

// While acknowledgements wait for the disk we do not read a 3.1.1 client that
// is past its bound and has been read ahead as far as we do, and must not hold
// its silence against it.
func TestKeepAliveRestsWhileHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = 5 })
		sub := p.connect(connectOptions{id: "sub", version: 4})
		sub.subscribe(1, "a")
		sub.disconnect()
		synctest.Wait()
		release := p.holdCommits()
		pub := p.connect(connectOptions{id: "pub", version: 4, clean: true, keepAlive: 10})
		for i := range uint16(5) {
			pub.send(pub.publishPacket("a", "x", 1, 0, 1+i))
		}
		pub.ping() // at the bound, and not past it
		pub.send(pub.publishPacket("a", "x", 1, 0, 6))
		large := strings.Repeat("x", parkLimit*3/4)
		pub.send(pub.publishPacket("a", large, 1, 0, 7)) // parked
		pub.send(pub.publishPacket("a", large, 1, 0, 8)) // the one too many
		wrote := make(chan struct{})
		go func() { // nobody reads it for now
			defer close(wrote)
			_, _ = pub.c.Write(pub.publishPacket("a", "x", 1, 0, 9)) // seen by its PUBACK
		}()
		time.Sleep(5 * time.Minute)
		select {
		case <-wrote:
			t.Error("a client past its bound was read")
		default:
		}
		release()
		for i := range uint16(9) {
			pub.expectAck(typePuback, 1+i)
		}
		pub.ping()
	})
}

// CONNACK, SUBACK and UNSUBACK of a persistent session leave when what they
// say is durable; those of a clean one at once.
func TestAcknowledgedSessionIsDurable(t *testing.T) {
	for _, version := range []byte{4, 5} {
		synctest.Test(t, func(t *testing.T) {
			p := bubble(t, 0)
			silent := func(what string, c *client) {
				t.Helper()
				c.c.SetReadDeadline(time.Now().Add(5 * time.Second))
				var b [1]byte
				if _, err := c.c.Read(b[:]); err == nil {
					t.Errorf("v%d: %s left before the commit", version, what)
				}
			}
			expect := func(c *client, kind byte) {
				t.Helper()
				if first, _ := c.read(); first>>4 != kind {
					t.Fatalf("v%d: got packet %#x, want type %d", version, first, kind)
				}
			}
			o := connectOptions{id: "c", version: version, expiry: 60}
			release := p.holdCommits()
			c := p.dial()
			c.version = version
			c.send(connectPacket(o))
			silent("CONNACK", c)
			release()
			expect(c, typeConnack)

			for what, b := range map[string][]byte{"SUBACK": packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a"), []byte{1})} {
				release = p.holdCommits()
				c.send(b)
				silent(what, c)
				release()
				expect(c, typeSuback)
			}
			release = p.holdCommits()
			c.send(packet(typeUnsubscribe<<4|2, u16(2), c.noProps(), str("a")))
			silent("UNSUBACK", c)
			release()
			expect(c, typeUnsuback)
			c.disconnect()
			time.Sleep(2 * time.Second)

			// Nothing of a clean session is stored; but that the old one is gone must be.
			release = p.holdCommits()
			c = p.dial()
			c.version = version
			c.send(connectPacket(connectOptions{id: "c", version: version, clean: true}))
			silent("CONNACK of a clean start", c)
			release()
			expect(c, typeConnack)
			time.Sleep(2 * time.Second)
			release = p.holdCommits()
			c.send(packet(typeSubscribe<<4|2, u16(1), c.noProps(), str("a"), []byte{1}))
			expect(c, typeSuback)
			clean := p.connect(connectOptions{id: "clean", version: version, clean: true})
			clean.ping()
			release()
		})
	}
}

// A store that cannot commit refuses persistent sessions in time, and does not
// keep the client waiting for ever.
func TestConnectWhileStoreHangs(t *testing.T) {
	for version, want := range map[byte]string{4: "20020003", 5: "2003008800"} {
		synctest.Test(t, func(t *testing.T) {
			p := bubble(t, 0)
			release := p.holdCommits()
			defer release()
			c := p.dial()
			c.send(connectPacket(connectOptions{id: "c", version: version, expiry: 60}))
			c.c.SetReadDeadline(time.Now().Add(time.Minute))
			got, err := io.ReadAll(c.c)
			if len(got) > 5 { // it also says why
				got = []byte{got[0], 3, got[2], got[3], 0}
			}
			if err != nil || fmt.Sprintf("%x", got) != want {
				t.Errorf("v%d: got %x, %v, want %s", version, got, err, want)
			}
		})
	}
}

// A client that takes nothing is disconnected after the write timeout, and
// holds up nobody meanwhile.
func TestWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0)
		c := p.connect(connectOptions{id: "c", version: 5, clean: true})
		c.send([]byte{typePingreq << 4, 0}) // and the answer is never read
		time.Sleep(p.b.cfg.WriteTimeout.D() - time.Second)
		if n := len(p.b.connections()); n != 1 {
			t.Errorf("%d connections before the write timeout, want 1", n)
		}
		time.Sleep(10 * time.Second)
		if n := len(p.b.connections()); n != 0 {
			t.Errorf("%d connections after the write timeout, want none", n)
		}
		if got := p.b.Stats().Limited["output"]; got != 1 {
			t.Errorf("counted %d times as output, want 1", got)
		}
	})
}

// A close that comes between the decision to move the read deadline and the
// move must still wake the reader.
func TestCloseWhileDeadlineMoves(t *testing.T) {
	for _, keepAlive := range []uint16{0, 3600} {
		synctest.Test(t, func(t *testing.T) {
			p := bubble(t, 0)
			ours, theirs := net.Pipe()
			defer ours.Close()
			sock := &late{Conn: theirs}
			var cl *conn
			sock.before = nil
			p.ln.conns <- sock
			c := &client{t: t, c: ours, version: 5}
			synctest.Wait()
			cl = p.b.connections()[0]
			sock.before = func() { cl.kick(reasonAdministrative, "") } // at the first move after CONNECT
			c.send(connectPacket(connectOptions{id: "c", version: 5, clean: true, keepAlive: keepAlive}))
			got, reason := c.lasts(time.Minute)
			if got > 5*time.Second || reason != reasonAdministrative {
				t.Errorf("keep alive %d: ended after %v with reason %#x, want at once with %#x", keepAlive, got, reason, reasonAdministrative)
			}
			synctest.Wait()
			select {
			case <-cl.gone:
			default:
				t.Errorf("keep alive %d: the reader still waits", keepAlive)
			}
		})
	}
}

// A 3.1.1 publisher that is past the bound is read ahead, so that its PINGREQ
// is answered while the disk stalls; what was parked is handled afterwards.
func TestPingIsFoundWhileHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = 5 })
		sub := p.connect(connectOptions{id: "sub", version: 4})
		sub.subscribe(1, "a")
		sub.disconnect()
		synctest.Wait()
		release := p.holdCommits()
		pub := p.connect(connectOptions{id: "pub", version: 4, clean: true, keepAlive: 10})
		var buf []byte
		for i := range uint16(20) {
			buf = append(buf, pub.publishPacket("a", "x", 1, 0, 1+i)...)
		}
		pub.send(buf)
		synctest.Wait()
		go pub.c.Write([]byte{typePingreq << 4, 0})
		first, _, err := pub.tryRead()
		release()
		if err != nil || first != typePingresp<<4 {
			t.Fatalf("got %#x, %v, want a PINGRESP", first, err)
		}
		for i := range uint16(20) {
			pub.expectAck(typePuback, 1+i)
		}
		pub.send([]byte{typeDisconnect << 4, 0}) // and nothing is lost by leaving right after
	})
}

// Being woken when the acknowledgements have left costs nobody the connection,
// with a keep alive or without.
func TestHeldBackClientIsWoken(t *testing.T) {
	for _, keepAlive := range []uint16{0, 10} {
		synctest.Test(t, func(t *testing.T) {
			p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = 5 })
			sub := p.connect(connectOptions{id: "sub", version: 4})
			sub.subscribe(1, "a")
			sub.disconnect()
			synctest.Wait()
			release := p.holdCommits()
			pub := p.connect(connectOptions{id: "pub", version: 4, clean: true, keepAlive: keepAlive})
			var buf []byte
			for i := range uint16(20) {
				buf = append(buf, pub.publishPacket("a", "x", 1, 0, 1+i)...)
			}
			pub.send(buf)
			synctest.Wait()
			release()
			for i := range uint16(20) {
				pub.expectAck(typePuback, 1+i)
			}
			if d, _ := pub.lasts(3 * time.Second); d < 3*time.Second {
				t.Errorf("keep alive %d: the connection ended after %v", keepAlive, d)
			}
		})
	}
}

// connOn makes a connection that no broker has accepted.
func connOn(b *Broker, sock net.Conn) *conn {
	return newConn(b, &slot{ln: newListener(b, ListenerConfig{}), raw: sock, since: time.Now()}, sock)
}

// A wake that comes too late to be of use does not end the connection.
func TestLateWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		cfg := DefaultConfig()
		c := connOn(&Broker{cfg: cfg, plane: &plane{}, log: slog.New(slog.DiscardHandler)}, theirs)
		c.up, c.version, c.keepAlive, c.heard = true, 4, time.Minute, true
		filled := make(chan error, 1)
		go func() {
			for {
				if err := c.fill(2); err != nil || c.w > c.r {
					filled <- err
					return
				}
			}
		}()
		synctest.Wait()
		if err := theirs.SetReadDeadline(past); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := ours.Write([]byte{typePingreq << 4, 0}); err != nil {
			t.Fatal(err)
		}
		if err := <-filled; err != nil {
			t.Errorf("the read ended with %v", err)
		}
	})
}

// A client that takes its packets slowly, but takes them, is not cut off; one
// that takes nothing is.
func TestSlowIsNotStalled(t *testing.T) {
	for _, tt := range []struct {
		pause time.Duration // between 512 bytes taken
		alive bool
	}{{time.Second, true}, {time.Hour, false}} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			cfg := DefaultConfig()
			cfg.WriteTimeout = units.Duration(10 * time.Second)
			c := connOn(&Broker{cfg: cfg, plane: &plane{}}, theirs)
			done := make(chan struct{})
			go func() {
				defer close(done)
				b := make([]byte, 512)
				for {
					time.Sleep(tt.pause)
					if _, err := ours.Read(b); err != nil {
						return
					}
				}
			}()
			if err := c.writeOut(make([]byte, 2*writePiece)); (err == nil) != tt.alive {
				t.Errorf("512 bytes every %v: error %v", tt.pause, err)
			}
			theirs.Close()
			<-done
		})
	}
}

// A DISCONNECT that waits behind parked packets counts, also when the
// connection ends first: no will [MQTT-3.14.4-3].
func TestGoodbyeBehindParkedPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := bubble(t, 0, func(c *Config) { c.ReceiveMaximum = 5 })
		sub := p.connect(connectOptions{id: "sub", version: 4})
		sub.subscribe(1, "a")
		sub.disconnect()
		watch := p.connect(connectOptions{id: "watch", version: 4, clean: true})
		watch.subscribe(0, "will")
		o := connectOptions{id: "pub", version: 4, clean: true, will: &storage.Message{Topic: "will", Payload: []byte("gone")}}
		pub := p.connect(o)
		synctest.Wait()
		release := p.holdCommits()
		var buf []byte
		for i := range uint16(20) {
			buf = append(buf, pub.publishPacket("a", "x", 1, 0, 1+i)...)
		}
		pub.send(append(buf, typeDisconnect<<4, 0))
		synctest.Wait()
		pub.c.Close()
		o.will = nil
		p.connect(o) // takes the session over
		watch.c.SetReadDeadline(time.Now().Add(2 * time.Second))
		if first, body, err := watch.tryRead(); err == nil {
			t.Errorf("will of a client that said goodbye: %x %q", first, body)
		}
		release()
	})
}
