package conformance

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"penstock/broker"
)

// webSocket is a client that speaks frames of RFC 6455, written by hand.
type webSocket struct {
	*client
	response *http.Response
	stream   []byte // what came in binary frames and was not yet read
	opcodes  []byte // of all frames that came
}

// dialWebSocket opens a connection and asks for the subprotocols.
func (s *server) dialWebSocket(t *testing.T, protocols string) *webSocket {
	t.Helper()
	w := &webSocket{client: s.dial(t, 5)}
	request := "GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
	if protocols != "" {
		request += "Sec-WebSocket-Protocol: " + protocols + "\r\n"
	}
	w.send([]byte(request + "\r\n"))
	w.c.SetReadDeadline(time.Now().Add(patience))
	w.r = bufio.NewReader(w.c)
	var err error
	if w.response, err = http.ReadResponse(w.r, nil); err != nil {
		t.Fatal(err)
	}
	return w
}

// wsFrame is one masked frame; first is FIN and the opcode.
func wsFrame(first byte, data []byte) []byte {
	mask := []byte{0x11, 0x22, 0x33, 0x44}
	f := []byte{first}
	if len(data) < 126 {
		f = append(f, 0x80|byte(len(data)))
	} else {
		f = binary.BigEndian.AppendUint16(append(f, 0x80|126), uint16(len(data)))
	}
	f = append(f, mask...)
	for i, b := range data {
		f = append(f, b^mask[i%4])
	}
	return f
}

// readFrame takes the next frame; err is that of the connection's end.
func (w *webSocket) readFrame() error {
	w.c.SetReadDeadline(time.Now().Add(patience))
	var head [2]byte
	if _, err := io.ReadFull(w.r, head[:]); err != nil {
		return err
	}
	n := int(head[1])
	switch {
	case n > 126: // masked, or larger than anything here
		return errors.New("a frame that no server sends")
	case n == 126:
		var long [2]byte
		if _, err := io.ReadFull(w.r, long[:]); err != nil {
			return err
		}
		n = int(binary.BigEndian.Uint16(long[:]))
	}
	data := make([]byte, n)
	_, err := io.ReadFull(w.r, data)
	w.opcodes = append(w.opcodes, head[0]&0x0F)
	if op := head[0] & 0x0F; op == 0 || op == 2 {
		w.stream = append(w.stream, data...)
	}
	return err
}

// take returns the next n bytes of MQTT.
func (w *webSocket) takeBytes(n int) []byte {
	w.t.Helper()
	for len(w.stream) < n {
		if err := w.readFrame(); err != nil {
			w.t.Fatalf("read: %v, after % x", err, w.stream)
		}
	}
	out := w.stream[:n]
	w.stream = w.stream[n:]
	return out
}

// takePacket returns the next packet, of less than 128 bytes.
func (w *webSocket) takePacket() []byte {
	w.t.Helper()
	head := bytes.Clone(w.takeBytes(2))
	return append(head, w.takeBytes(int(head[1]))...)
}

func overWebSocket(c *broker.Config) { c.Listeners[0].Protocol = "websocket" }

// TestWebSocket5 speaks MQTT over WebSocket.
func TestWebSocket5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-6.0.0-1", "MQTT-6.0.0-2", "MQTT-6.0.0-3", "MQTT-6.0.0-4")
	s := start(t, overWebSocket)
	hello := connectFields{version: 5, clean: true, id: "ws"}.frame()
	ping := []byte{kindPingreq << 4, 0}
	for _, protocols := range []string{"mqtt", "x, mqtt", "mqtt, y"} {
		w := s.dialWebSocket(t, protocols)
		if got := w.response.Header.Values("Sec-WebSocket-Protocol"); w.response.StatusCode != 101 || len(got) != 1 || got[0] != "mqtt" {
			t.Errorf("offered %q: got status %d, subprotocol %q; want 101 and mqtt", protocols, w.response.StatusCode, got)
		}
		if got := w.response.Header.Get("Sec-WebSocket-Accept"); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Errorf("got accept key %q", got)
		}
		w.drop()
	}
	for _, protocols := range []string{"", "chat", "MQTT2"} {
		w := s.dialWebSocket(t, protocols)
		if w.response.StatusCode == 101 {
			t.Errorf("offered %q: taken, want a refusal", protocols)
		}
		w.drop()
	}
	session := func(name string, send func(*webSocket)) {
		t.Run(name, func(t *testing.T) {
			w := s.dialWebSocket(t, "mqtt")
			send(w)
			for _, kind := range []byte{kindConnack, kindSuback, kindPublish, kindPingresp} {
				if p := w.takePacket(); p[0]>>4 != kind {
					t.Fatalf("got % x, want packet %d", p, kind)
				}
			}
			for _, op := range w.opcodes {
				if op != 2 && op != 0 {
					t.Errorf("got a frame with opcode %d, want binary ones", op)
				}
			}
		})
	}
	probe := &client{version: 5}
	all := join(hello, probe.subscribeFrame(1, 0, []string{"t"}), probe.publishFrame(message{topic: "t", payload: strings.Repeat("x", 100)}), ping)
	session("all packets in one frame", func(w *webSocket) { w.send(wsFrame(0x82, all)) })
	session("a frame for each byte", func(w *webSocket) {
		for i := range all {
			w.send(wsFrame(0x82, all[i:i+1]))
		}
	})
	session("fragments of one message, and empty frames", func(w *webSocket) {
		w.send(wsFrame(0x02, all[:5]), wsFrame(0x00, nil), wsFrame(0x00, all[5:30]), wsFrame(0x80, all[30:40]), wsFrame(0x82, nil), wsFrame(0x82, all[40:]))
	})
	session("ping frames in between", func(w *webSocket) {
		w.send(wsFrame(0x02, all[:5]), wsFrame(0x8A, nil), wsFrame(0x80, all[5:]))
	})
	t.Run("text frame", func(t *testing.T) {
		for _, before := range [][]byte{nil, hello} {
			w := s.dialWebSocket(t, "mqtt")
			if before != nil {
				w.send(wsFrame(0x82, before))
				w.takePacket()
			}
			w.send(wsFrame(0x81, ping))
			var err error
			for err == nil {
				err = w.readFrame()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection was not closed")
			}
			if bytes.Contains(w.stream, []byte{kindPingresp << 4, 0}) {
				t.Error("a text frame was taken")
			}
		}
	})
}
