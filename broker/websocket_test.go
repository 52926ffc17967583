package broker

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"penstock/storage"
)

// webClient is a WebSocket client as a stream, each Write a binary frame. It
// knows what a test needs, and shares nothing with the broker's side.
type webClient struct {
	net.Conn
	r    *bufio.Reader
	left int
	seen []byte // opcodes of control frames, in order
	code uint16 // of the Close frame
}

const webKey = "dGhlIHNhbXBsZSBub25jZQ=="

// dialWeb makes a WebSocket connection over what dial makes. extra are header
// lines.
func dialWeb(a net.Addr, dial func(net.Addr) (net.Conn, error), extra, protocol string) (net.Conn, error) {
	c, err := dial(a)
	if err != nil {
		return nil, err
	}
	request := "GET /mqtt HTTP/1.1\r\nHost: gateway\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + webKey + "\r\nSec-WebSocket-Protocol: " + protocol + "\r\n" + extra + "\r\n"
	if _, err := io.WriteString(c, request); err != nil {
		return nil, err
	}
	w := &webClient{Conn: c, r: bufio.NewReader(c)}
	resp, err := http.ReadResponse(w.r, nil)
	if err != nil {
		return nil, err
	}
	// The key and its answer are those of RFC 6455, 1.3.
	if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		return nil, fmt.Errorf("answer %s, %v", resp.Status, resp.Header)
	}
	if got := resp.Header.Get("Sec-WebSocket-Protocol"); !strings.Contains(protocol, got) || got == "" {
		return nil, fmt.Errorf("subprotocol %q of %q", got, protocol)
	}
	return w, nil
}

// frame makes a masked frame.
func frame(first byte, payload []byte) []byte {
	b := []byte{first, 0x80}
	switch n := len(payload); {
	case n < 126:
		b[1] |= byte(n)
	case n < 1<<16:
		b[1] |= 126
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	default:
		b[1] |= 127
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	key := [4]byte{0x12, 0x34, 0x56, 0x78}
	b = append(b, key[:]...)
	for i, x := range payload {
		b = append(b, x^key[i%4])
	}
	return b
}

func (w *webClient) Write(p []byte) (int, error) {
	if _, err := w.Conn.Write(frame(0x82, p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (w *webClient) Read(p []byte) (int, error) {
	for w.left == 0 {
		var head [2]byte
		if _, err := io.ReadFull(w.r, head[:]); err != nil {
			return 0, err
		}
		n := uint64(head[1])
		switch n {
		case 126:
			var l uint16
			if err := binary.Read(w.r, binary.BigEndian, &l); err != nil {
				return 0, err
			}
			n = uint64(l)
		case 127:
			if err := binary.Read(w.r, binary.BigEndian, &n); err != nil {
				return 0, err
			}
		}
		if head[0] == 0x82 {
			w.left = int(n)
			continue
		}
		if head[0]&0x88 != 0x88 || n > 125 {
			return 0, fmt.Errorf("frame % x from the broker", head)
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(w.r, payload); err != nil {
			return 0, err
		}
		w.seen = append(w.seen, head[0]&0x0F)
		if head[0]&0x0F == opClose && n >= 2 {
			w.code = binary.BigEndian.Uint16(payload)
		}
	}
	n, err := w.r.Read(p[:min(len(p), w.left)])
	w.left -= n
	return n, err
}

// web connects over WebSocket.
func (s *server) web() (*client, *webClient) {
	s.t.Helper()
	c, err := dialWeb(s.b.Listeners()[0].Addr, func(a net.Addr) (net.Conn, error) { return net.Dial("tcp", a.String()) }, "", "mqtt")
	if err != nil {
		s.t.Fatal(err)
	}
	return s.on(c), c.(*webClient)
}

func startWeb(t *testing.T, origins ...string) *server {
	t.Helper()
	return start(t, t.TempDir(), withListeners(ListenerConfig{Protocol: "websocket", Origins: origins}))
}

func TestWebSocketHandshake(t *testing.T) {
	s := startWeb(t, "https://Plant.example:8443", "http://other.example")
	const good = "GET /mqtt HTTP/1.1\r\nHost: gateway:9001\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + webKey + "\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
	with := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	origin := func(o string) string { return with("\r\n\r\n", "\r\nOrigin: "+o+"\r\n\r\n") }
	for _, tt := range []struct {
		name, request string
		status        int
		protocol      string
		limit         string // counted there
	}{
		{"good", good, 101, "mqtt", ""},
		{"an old client", with("mqtt\r\n\r\n", "mqttv3.1\r\n\r\n"), 101, "mqttv3.1", ""},
		{"several protocols", with("mqtt\r\n\r\n", "soap, mqttv3.1 ,mqtt\r\n\r\n"), 101, "mqtt", ""},
		{"a query", with("/mqtt", "/mqtt?a=b"), 101, "mqtt", ""},
		{"another path", with("/mqtt", "/"), 404, "", "websocket-handshake"},
		{"a page", "GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n", 400, "", "websocket-handshake"},
		{"another method", with("GET", "PUT"), 400, "", "websocket-handshake"},
		{"HTTP/1.0", with("HTTP/1.1", "HTTP/1.0"), 400, "", "websocket-handshake"},
		{"another version", with("Version: 13", "Version: 8"), 426, "", "websocket-handshake"},
		{"a short key", with(webKey, "AAAA"), 400, "", "websocket-handshake"},
		{"no protocol", with("Sec-WebSocket-Protocol: mqtt\r\n", ""), 400, "", "websocket-handshake"},
		{"a wrong protocol", with("mqtt\r\n\r\n", "MQTT2\r\n\r\n"), 400, "", "websocket-handshake"},
		{"no HTTP", "\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00\r\n\r\n", 400, "", "websocket-handshake"},
		{"endless headers", with("\r\n\r\n", "\r\nX: "+strings.Repeat("x", maxRequest)), 431, "", "websocket-handshake"},
		{"a page of this host", origin("http://GATEWAY:9001"), 101, "mqtt", ""},
		{"a page of another port", origin("http://gateway:80"), 403, "", "origin"},
		{"a page that is named", origin("https://plant.EXAMPLE:8443"), 101, "mqtt", ""},
		{"a page with another scheme", origin("http://plant.example:8443"), 403, "", "origin"},
		{"no page at all", origin("null"), 403, "", "origin"},
	} {
		before := s.b.Stats().Limited
		c := s.dial()
		c.send([]byte(tt.request))
		c.c.SetReadDeadline(time.Now().Add(patience))
		resp, err := http.ReadResponse(bufio.NewReader(c.c), nil)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if got := resp.Header.Get("Sec-WebSocket-Protocol"); resp.StatusCode != tt.status || got != tt.protocol {
			t.Errorf("%s: %s and %q, want %d and %q", tt.name, resp.Status, got, tt.status, tt.protocol)
		}
		if text, err := io.ReadAll(resp.Body); tt.status != 101 && (err != nil || len(text) < 20) {
			t.Errorf("%s: text %q, %v", tt.name, text, err)
		}
		if tt.limit != "" {
			eventually(t, tt.name+" is counted", func() bool { return s.limited(tt.limit) == before[tt.limit]+1 })
		}
		c.c.Close()
	}
	all := startWeb(t, "*")
	c, err := dialWeb(all.b.Listeners()[0].Addr, func(a net.Addr) (net.Conn, error) { return net.Dial("tcp", a.String()) }, "Origin: https://anywhere\r\n", "mqtt")
	if err != nil {
		t.Errorf("* does not allow all: %v", err)
	} else {
		c.Close()
	}
}

// A request that does not end is closed with the CONNECT deadline, a byte now
// and then or not.
func TestWebSocketSlowRequest(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config, sc *storage.Config) {
		withListeners(ListenerConfig{Protocol: "websocket"})(c, sc)
		c.ConnectTimeout = 1e9
	})
	silent, slow := s.dial(), s.dial()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, b := range []byte("GET /mqtt HTTP/1.1\r\nX: " + strings.Repeat("x", 1000)) {
			if _, err := slow.c.Write([]byte{b}); err != nil {
				return
			}
			select {
			case <-time.After(20 * time.Millisecond): // the attack itself
			case <-t.Context().Done():
				return
			}
		}
	}()
	silent.expectEnd()
	slow.expectEnd()
	<-done
	eventually(t, "both are counted", func() bool { return s.limited("connect-timeout") == 2 })
}

// Packets may span frames and share them, control frames come between.
func TestWebSocketFraming(t *testing.T) {
	s := startWeb(t)
	connect := connectPacket(connectOptions{id: "c", version: 4, clean: true})
	ping := []byte{typePingreq << 4, 0}
	sub := packet(typeSubscribe<<4|2, u16(1), str("a"), []byte{0})
	all := bytes.Join([][]byte{connect, ping, sub, ping}, nil)
	var bytewise, control []byte
	for i := range all {
		bytewise = append(bytewise, frame(0x82, all[i:i+1])...)
		first := byte(0x00)
		if i == 0 {
			first = 0x02
		}
		control = append(control, frame(first, all[i:i+1])...)
		control = append(control, frame(0x89, []byte("x"))...)
		control = append(control, frame(0x00, nil)...)
	}
	control = append(control, frame(0x80, nil)...)
	for name, wire := range map[string][]byte{
		"one frame":             frame(0x82, all),
		"a frame for each byte": bytewise,
		"pings within a message that is in pieces": control,
	} {
		for _, step := range []int{1, 7, len(wire)} {
			c, w := s.web()
			go func() {
				for rest := wire; len(rest) > 0; {
					n, err := w.Conn.Write(rest[:min(step, len(rest))])
					if err != nil {
						return
					}
					rest = rest[n:]
				}
			}()
			for _, want := range []byte{typeConnack, typePingresp, typeSuback, typePingresp} {
				if first, body := c.read(); first>>4 != want {
					t.Fatalf("%s, %d bytes at a time: got %x % x, want kind %d", name, step, first, body, want)
				}
			}
			if name[0] == 'p' && !bytes.Contains(w.seen, []byte{opPong}) {
				t.Errorf("%s: no pong, but % x", name, w.seen)
			}
			w.Close()
		}
	}
}

// Breaches of RFC 6455 and of section 6 of MQTT end the connection, with the
// code that says why.
func TestWebSocketBreaches(t *testing.T) {
	s := startWeb(t)
	for _, tt := range []struct {
		name string
		wire []byte
		code uint16
	}{
		{"text", frame(0x81, []byte("hello")), closeUnsupported}, // [MQTT-6.0.0-1]
		{"text in pieces", frame(0x01, []byte("hello")), closeUnsupported},
		{"not masked", []byte{0x82, 2, 0xC0, 0}, closeProtocol},
		{"a reserved bit", frame(0xC2, []byte{0xC0, 0}), closeProtocol},
		{"a kind that does not exist", frame(0x83, nil), closeProtocol},
		{"a control kind that does not exist", frame(0x8B, nil), closeProtocol},
		{"a continuation of nothing", frame(0x80, []byte{0}), closeProtocol},
		{"a message within a message", append(frame(0x02, nil), frame(0x82, nil)...), closeProtocol},
		{"a ping in pieces", frame(0x09, nil), closeProtocol},
		{"a ping that is too long", frame(0x89, make([]byte, 126)), closeProtocol},
		{"a length in too many bytes", []byte{0x82, 0xFE, 0, 125, 0, 0, 0, 0}, closeProtocol},
		{"a length above all bounds", []byte{0x82, 0xFF, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, closeProtocol},
		{"half a close code", frame(0x88, []byte{3}), closeProtocol},
		{"a close code that nobody sends", frame(0x88, []byte{0x03, 0xED}), closeProtocol},
		{"close", frame(0x88, []byte{0x03, 0xE9}), 1001},
		{"close without a code", frame(0x88, nil), closeNormal},
	} {
		c, w := s.web()
		c.hello(connectOptions{id: "c", version: 4, clean: true})
		if _, err := w.Conn.Write(tt.wire); err != nil {
			t.Fatal(err)
		}
		c.expectEnd()
		if w.code != tt.code {
			t.Errorf("%s: code %d, want %d", tt.name, w.code, tt.code)
		}
	}
}

// Frames come one after the other in what the broker writes, also when pings
// come in between, and when a client does not read for a while.
func TestWebSocketPingsWhileWriting(t *testing.T) {
	s := startWeb(t)
	c, w := s.web()
	c.hello(connectOptions{id: "c", version: 4, clean: true})
	c.subscribe(0, "a")
	pub, _ := s.web()
	pub.hello(connectOptions{id: "pub", version: 4, clean: true})
	payload := strings.Repeat("x", 100_000)
	for range 40 {
		pub.publish("a", payload, 1, false)
		if _, err := w.Conn.Write(frame(0x89, []byte("are you there?"))); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 { // QoS 0 may be dropped: the client was slow
		if got := c.take(); got.payload != payload {
			t.Fatalf("%d bytes came, or others", len(got.payload))
		}
	}
	c.send([]byte{typePingreq << 4, 0})
	c.expect(typePingresp)
	if !bytes.Contains(w.seen, []byte{opPong}) {
		t.Error("no pong")
	}
}

// An implementation that is not ours: gorilla's.
func TestWebSocketWithAnotherImplementation(t *testing.T) {
	s := startWeb(t)
	d := websocket.Dialer{Subprotocols: []string{"mqtt"}, EnableCompression: true, HandshakeTimeout: patience}
	c, resp, err := d.Dial("ws://"+s.addr+"/mqtt", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Subprotocol() != "mqtt" || resp.Header.Get("Sec-WebSocket-Extensions") != "" {
		t.Errorf("subprotocol %q, header %v", c.Subprotocol(), resp.Header)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	pong := make(chan string, 1)
	c.SetPongHandler(func(s string) error { pong <- s; return nil })
	send := func(b []byte) {
		t.Helper()
		if err := c.WriteMessage(websocket.BinaryMessage, b); err != nil {
			t.Fatal(err)
		}
	}
	send(connectPacket(connectOptions{id: "c", version: 5, clean: true}))
	if err := c.WriteControl(websocket.PingMessage, []byte("hello"), time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	send([]byte{typePingreq << 4, 0})
	var got []byte
	for len(got) == 0 || got[len(got)-2] != typePingresp<<4 {
		kind, b, err := c.ReadMessage()
		if err != nil || kind != websocket.BinaryMessage {
			t.Fatalf("kind %d, %v", kind, err)
		}
		got = append(got, b...)
	}
	if text := <-pong; text != "hello" {
		t.Errorf("pong %q", text)
	}
	send([]byte{typeDisconnect << 4, 0})
	_, _, err = c.ReadMessage()
	if !websocket.IsCloseError(err, closeNormal) {
		t.Errorf("at the end: %v, want close %d", err, closeNormal)
	}
}

// script is a socket that hands out what it is given, n bytes at a time, and
// takes at most short bytes of each Write before its deadline passes.
type script struct {
	net.Conn // nil
	in       []byte
	n        int
	short    int
	out      bytes.Buffer
	wait     bool // every other Read ends with the deadline
	turn     bool
}

func (s *script) Read(p []byte) (int, error) {
	if s.turn = !s.turn; s.wait && s.turn {
		return 0, os.ErrDeadlineExceeded
	}
	if len(s.in) == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(p[:min(len(p), s.n)], s.in)
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) {
	if s.short > 0 && len(p) > s.short {
		n, _ := s.out.Write(p[:s.short])
		return n, os.ErrDeadlineExceeded
	}
	return s.out.Write(p)
}

func (s *script) SetWriteDeadline(time.Time) error { return nil }
func (s *script) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

func scripted(s *script) *wsConn {
	b := &Broker{cfg: DefaultConfig(), plane: &plane{}, log: slog.New(slog.DiscardHandler)}
	return newWSConn(newListener(b, ListenerConfig{}), s, &wire{Conn: s}, nil)
}

// unframe returns everything that can be read, and how it ended.
func unframe(s *script, room int) (data []byte, err error) {
	w := scripted(s)
	buf := make([]byte, room)
	for {
		n, err := w.Read(buf)
		data = append(data, buf[:n]...)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return data, err
		}
	}
}

// A write that a deadline cuts short is continued where it was.
func TestWebSocketWriteGoesOn(t *testing.T) {
	for short := 1; short < 20; short++ {
		s := &script{short: short}
		w := scripted(s)
		want := bytes.Repeat([]byte("0123456789"), 30)
		for rest := want; len(rest) > 0; {
			n, err := w.Write(rest)
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			if _, err := w.unwrap(frame(0x89, []byte("x"))); err != nil { // a Ping in between
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		c := &webClient{r: bufio.NewReader(&s.out)}
		got, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(got, want) {
			t.Errorf("%d bytes at a time: %q, %v", short, got, err)
		}
	}
}

// FuzzWebSocket reads the same bytes in one piece and in small ones: what is
// read, what is answered and how it ends is the same.
func FuzzWebSocket(f *testing.F) {
	f.Add([]byte{}, byte(1), byte(1))
	f.Add(frame(0x82, []byte("packet")), byte(1), byte(3))
	f.Add(append(frame(0x02, make([]byte, 200)), frame(0x80, make([]byte, 300))...), byte(100), byte(9))
	f.Add(append(frame(0x89, []byte("ping")), frame(0x88, []byte{3, 232})...), byte(5), byte(2))
	f.Add(frame(0x81, []byte("text")), byte(2), byte(2))
	f.Add([]byte{0x82, 0xFF, 0x7F, 255, 255, 255, 255, 255, 255, 255, 1, 2, 3, 4, 5}, byte(4), byte(4))
	f.Fuzz(func(t *testing.T, wire []byte, step, room byte) {
		whole := &script{in: bytes.Clone(wire), n: len(wire) + 1}
		want, wantErr := unframe(whole, len(wire)+1)
		pieces := &script{in: bytes.Clone(wire), n: int(step) + 1, wait: true}
		got, err := unframe(pieces, int(room)+1)
		if !bytes.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(wantErr) {
			t.Errorf("in pieces: %q, %v; whole: %q, %v", got, err, want, wantErr)
		}
		if !bytes.Equal(pieces.out.Bytes(), whole.out.Bytes()) {
			t.Errorf("answers: % x, and % x", pieces.out.Bytes(), whole.out.Bytes())
		}
		if len(got) > len(wire) {
			t.Errorf("%d bytes came out of %d", len(got), len(wire))
		}
		// What is framed again by a client comes out again.
		again, _ := unframe(&script{in: frame(0x82, bytes.Clone(want)), n: int(step) + 1}, int(room)+1)
		if !bytes.Equal(again, want) {
			t.Errorf("framed again: %q, want %q", again, want)
		}
	})
}
