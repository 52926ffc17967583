package conformance

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"penstock/broker"
)

// framedConn is a connection over WebSocket, masked frames made by hand: what
// is written goes out in binary frames of the size given.
type framedConn struct {
	net.Conn
	r    *bufio.Reader
	size int    // of the frames written; 0: one for each Write
	in   []byte // of the binary frame that came last
	err  error  // what came that is no binary frame
}

func maskedFrame(first byte, data []byte) []byte {
	b := []byte{first, 0x80 | byte(len(data))}
	switch {
	case len(data) >= 1<<16:
		b = binary.BigEndian.AppendUint64([]byte{first, 0x80 | 127}, uint64(len(data)))
	case len(data) >= 126:
		b = binary.BigEndian.AppendUint16([]byte{first, 0x80 | 126}, uint16(len(data)))
	}
	mask := [4]byte{0xA1, 0xB2, 0xC3, 0xD4}
	b = append(b, mask[:]...)
	for i, c := range data {
		b = append(b, c^mask[i%4])
	}
	return b
}

func (c *framedConn) Write(b []byte) (int, error) {
	size := c.size
	if size == 0 {
		size = len(b)
	}
	for n := 0; n < len(b); n += size {
		if _, err := c.Conn.Write(maskedFrame(0x82, b[n:min(n+size, len(b))])); err != nil {
			return n, err
		}
	}
	return len(b), nil
}

func (c *framedConn) Read(b []byte) (int, error) {
	for len(c.in) == 0 {
		var head [2]byte
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return 0, err
		}
		n := uint64(head[1] & 0x7F)
		if n >= 126 {
			long := make([]byte, map[uint64]int{126: 2, 127: 8}[n])
			if _, err := io.ReadFull(c.r, long); err != nil {
				return 0, err
			}
			n = 0
			for _, x := range long {
				n = n<<8 | uint64(x)
			}
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return 0, err
		}
		switch opcode := head[0] & 0x0F; {
		case opcode == 8:
			return 0, io.EOF
		case opcode != 0 && opcode != 2 || head[1]&0x80 != 0:
			c.err = fmt.Errorf("got a frame with opcode %d, mask %v", opcode, head[1]&0x80 != 0)
		}
		c.in = data
	}
	n := copy(b, c.in)
	c.in = c.in[n:]
	return n, nil
}

// upgrade opens a WebSocket and offers subprotocols.
func (s *server) upgrade(t testing.TB, offer string, size int) (*client, *framedConn, *http.Response) {
	t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if offer != "" {
		offer = "Sec-WebSocket-Protocol: " + offer + "\r\n"
	}
	fmt.Fprintf(c, "GET /mqtt HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n", s.addr, offer)
	c.SetReadDeadline(time.Now().Add(patience))
	f := &framedConn{Conn: c, r: bufio.NewReader(c), size: size}
	resp, err := http.ReadResponse(f.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &client{t: t, c: f, r: bufio.NewReader(f), version: 4}, f, resp
}

func startWebSocket(t testing.TB) *server {
	return start(t, func(c *broker.Config) { c.Listeners[0].Protocol = "websocket" })
}

func TestV3WebSocket(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-6.0.0-1", "MQTT-6.0.0-2", "MQTT-7.1.1-1")
	s := startWebSocket(t)
	for _, size := range []int{0, 1, 2, 3, 7, 125, 126, 65535, 65536, 1 << 20} {
		c, f, _ := s.upgrade(t, "mqtt", size)
		payload := strings.Repeat("x", 100_000)
		if size > 0 && size < 125 {
			payload = payload[:300]
		}
		c.send(connectFields{version: 4, clean: true, id: "c"}.frame(), c.subscribeFrame(1, 2, []string{"a"}),
			c.publishFrame(message{topic: "a", qos: 1, id: 2, payload: payload}), []byte{0xC0, 0})
		if a := c.connack(); a.reason != 0 {
			t.Fatalf("frames of %d bytes: got return code %d", size, a.reason)
		}
		c.suback(1, 1)
		got := map[byte]int{}
		for range 3 {
			p := c.read()
			got[p.kind()]++
			if p.kind() == kindPublish && c.parse(p).payload != payload {
				t.Errorf("frames of %d bytes: the payload came back as another", size)
			}
		}
		if got[kindPublish] != 1 || got[kindPuback] != 1 || got[kindPingresp] != 1 {
			t.Errorf("frames of %d bytes: got packets by type %v", size, got)
		}
		if f.err != nil {
			t.Errorf("frames of %d bytes: %v", size, f.err)
		}
		c.disconnect()
	}
}

// MQTT in anything but binary frames ends the connection, and the will of the
// client is published.
func TestV3WebSocketFrames(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-6.0.0-1")
	s := startWebSocket(t)
	w, _, _ := s.upgrade(t, "mqtt", 0)
	w.send(connectFields{version: 4, clean: true, id: "w"}.frame())
	w.connack()
	w.subscribe(1, "will")
	ping := []byte{0xC0, 0}
	for what, b := range map[string][]byte{
		"text":                     maskedFrame(0x81, ping),
		"text, first fragment":     maskedFrame(0x01, ping),
		"reserved opcode 3":        maskedFrame(0x83, ping),
		"reserved opcode 11":       maskedFrame(0x8B, ping),
		"continuation of nothing":  maskedFrame(0x80, ping),
		"not masked":               {0x82, 2, 0xC0, 0},
		"extension bits":           maskedFrame(0xC2, ping),
		"close, with MQTT in it":   maskedFrame(0x88, ping),
		"long ping":                maskedFrame(0x89, bytes.Repeat(ping, 63)),
		"fragment of a ping frame": maskedFrame(0x09, nil),
	} {
		c, f, _ := s.upgrade(t, "mqtt", 0)
		c.send(connectFields{version: 4, clean: true, id: "c", will: &willFields{topic: "will", payload: what}}.frame())
		c.connack()
		f.Conn.Write(b)
		if got := c.end(); len(got) > 0 {
			t.Errorf("%s: got %v, want the connection closed", what, got)
		}
		w.takePayloads(what)
	}
	// As the first thing that comes.
	c, f, _ := s.upgrade(t, "mqtt", 0)
	f.Conn.Write(maskedFrame(0x81, connectFields{version: 4, clean: true, id: "c"}.frame()))
	c.expectClosed()
}

func TestV3WebSocketSubprotocol(t *testing.T) {
	t.Parallel()
	covers3(t, "MQTT-6.0.0-3", "MQTT-6.0.0-4")
	s := startWebSocket(t)
	for _, offer := range []string{"mqtt", "mqttv3.1, mqtt", "mqtt,chat", " mqtt "} {
		c, _, resp := s.upgrade(t, offer, 0)
		got := resp.Header.Values("Sec-WebSocket-Protocol")
		if resp.StatusCode != http.StatusSwitchingProtocols || len(got) != 1 || got[0] != "mqtt" {
			t.Errorf("offered %q: got status %d, subprotocol %q, want 101 and mqtt", offer, resp.StatusCode, got)
			continue
		}
		c.send(connectFields{version: 4, clean: true, id: "c"}.frame())
		c.connack()
	}
	for _, offer := range []string{"", "chat", "mqtt5, amqp"} {
		if _, _, resp := s.upgrade(t, offer, 0); resp.StatusCode == http.StatusSwitchingProtocols && resp.Header.Get("Sec-WebSocket-Protocol") != "" {
			t.Errorf("offered %q: got subprotocol %q", offer, resp.Header.Get("Sec-WebSocket-Protocol"))
		}
	}
}
