package broker

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// MQTT over WebSocket (MQTT 5 section 6, RFC 6455), the server's side of it.

const (
	webSocketPath = "/mqtt"
	webSocketGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
	// maxRequest bounds the request line and the headers, in bytes.
	maxRequest = 8 << 10
)

// webSocketProtocols are the subprotocols that are taken, the best first.
// "mqttv3.1" is what clients said before there was a standard [MQTT-6.0.0-3].
var webSocketProtocols = []string{"mqtt", "mqttv3.1"}

// Opcodes and close codes of RFC 6455.
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA

	closeNormal      = 1000
	closeProtocol    = 1002
	closeUnsupported = 1003
)

// webSocket does the handshakes of a listener.
type webSocket struct {
	ln      *listener
	origins []string // in lower case
}

func newWebSocket(ln *listener, origins []string) *webSocket {
	w := &webSocket{ln: ln}
	for _, o := range origins {
		w.origins = append(w.origins, strings.ToLower(o))
	}
	return w
}

var requestReaders = sync.Pool{New: func() any { return bufio.NewReader(nil) }}

// upgrade reads the HTTP request of a connection and answers it. It returns the
// connection as a stream of MQTT.
func (ws *webSocket) upgrade(sock net.Conn, wire *wire) (net.Conn, error) {
	limited := &io.LimitedReader{R: sock, N: maxRequest}
	br := requestReaders.Get().(*bufio.Reader)
	br.Reset(limited)
	defer func() {
		br.Reset(nil)
		requestReaders.Put(br)
	}()
	r, err := http.ReadRequest(br)
	if err != nil {
		switch {
		case limited.N == 0:
			return nil, refuseHTTP(sock, http.StatusRequestHeaderFieldsTooLarge, "the request is too long")
		case errors.As(err, new(net.Error)), errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
			return nil, err // there is nobody to answer
		}
		return nil, refuseHTTP(sock, http.StatusBadRequest, "this is no HTTP request")
	}
	protocol, status, why := ws.check(r)
	if status != 0 {
		err := refuseHTTP(sock, status, why)
		if status == http.StatusForbidden {
			err = &handshakeError{limitOrigin, fmt.Errorf("%w: %q", err, r.Header.Get("Origin"))}
		}
		return nil, err
	}
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + webSocketGUID))
	answer := "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Accept: " + base64.StdEncoding.EncodeToString(sum[:]) + "\r\n" +
		"Sec-WebSocket-Protocol: " + protocol + "\r\n\r\n" // [MQTT-6.0.0-4]
	if _, err := io.WriteString(sock, answer); err != nil {
		return nil, err
	}
	early, _ := br.Peek(br.Buffered()) // there are so many
	return newWSConn(ws.ln, sock, wire, bytes.Clone(early)), nil
}

// check returns the subprotocol, or the status and the text of a refusal.
func (ws *webSocket) check(r *http.Request) (protocol string, status int, why string) {
	h := r.Header
	key, err := base64.StdEncoding.DecodeString(h.Get("Sec-WebSocket-Key"))
	offered := tokens(h, "Sec-WebSocket-Protocol")
	if i := slices.IndexFunc(webSocketProtocols, func(p string) bool { return slices.Contains(offered, p) }); i >= 0 {
		protocol = webSocketProtocols[i]
	}
	has := func(header, token string) bool {
		return slices.ContainsFunc(tokens(h, header), func(t string) bool { return strings.EqualFold(t, token) })
	}
	switch {
	case r.URL.Path != webSocketPath:
		return "", http.StatusNotFound, "MQTT over WebSocket is at " + webSocketPath
	case r.Method != http.MethodGet || !r.ProtoAtLeast(1, 1) || r.Host == "" || !has("Connection", "upgrade") || !has("Upgrade", "websocket"):
		return "", http.StatusBadRequest, "this is the address of MQTT over WebSocket, and the request is not one for that"
	case h.Get("Sec-WebSocket-Version") != "13":
		return "", http.StatusUpgradeRequired, "WebSocket version 13 is spoken here"
	case err != nil || len(key) != 16:
		return "", http.StatusBadRequest, "Sec-WebSocket-Key is not 16 bytes in base64"
	case protocol == "":
		return "", http.StatusBadRequest, `the client must offer the WebSocket subprotocol "mqtt"`
	case !ws.allowed(h.Get("Origin"), r.Host):
		return "", http.StatusForbidden, "pages of this origin may not connect: broker.listener.origins does not have it"
	}
	return protocol, 0, ""
}

// allowed reports whether a page may connect. Programs that are not browsers
// send no Origin.
func (ws *webSocket) allowed(origin, host string) bool {
	if origin == "" || slices.Contains(ws.origins, "*") || slices.Contains(ws.origins, strings.ToLower(origin)) {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && strings.EqualFold(u.Host, host)
}

// tokens returns the elements of a header that is a list.
func tokens(h http.Header, name string) []string {
	var list []string
	for _, v := range h.Values(name) {
		for t := range strings.SplitSeq(v, ",") {
			list = append(list, strings.TrimSpace(t))
		}
	}
	return list
}

// refuseHTTP answers a request with an error, and returns it.
func refuseHTTP(sock net.Conn, status int, why string) error {
	head := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n", status, http.StatusText(status), len(why)+1)
	if status == http.StatusUpgradeRequired {
		head += "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
	}
	_, _ = io.WriteString(sock, head+"\r\n"+why+"\n") // closing in any case
	if h, ok := sock.(half); ok {
		_ = h.CloseWrite() // closing in any case
	}
	return fmt.Errorf("websocket: %s", why)
}

// wsConn is a WebSocket connection as a stream of MQTT. Frames are taken apart
// where they were read to, and never gathered, so it has no buffer.
type wsConn struct {
	net.Conn // TLS or TCP
	wire     *wire
	ln       *listener

	// The reader's.
	early   []byte // came with the request
	head    [14]byte
	headLen int    // bytes of the header that are there
	inFrame bool   // the header is complete
	left    uint64 // bytes of the payload to come
	masked  uint64 // bytes of the payload that came
	open    bool   // a message is in pieces, and not complete
	control []byte // payload of a control frame
	ended   error

	writeMu sync.Mutex
	header  [14]byte // room for pending
	pending []byte   // to be written before anything else: a frame's header, control frames
	owed    int      // bytes of the frame begun that are still to be written
	goodbye bool     // a Close frame was sent, or will never be

	code atomic.Uint32 // of the Close frame, 0: not known yet

	pongMu sync.Mutex
	pong   []byte // control frame that answers the last Ping
}

func newWSConn(ln *listener, sock net.Conn, wire *wire, early []byte) *wsConn {
	return &wsConn{Conn: sock, wire: wire, ln: ln, early: early}
}

// closeError is a breach of RFC 6455, with the code of the Close frame.
type closeError struct {
	code uint16
	text string
}

func (e *closeError) Error() string { return "websocket: " + e.text }

// Read reads from the payloads of binary frames, across their bounds
// [MQTT-6.0.0-2]. After a deadline it goes on where it was.
func (w *wsConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for w.ended == nil {
		n, err := 0, error(nil)
		if len(w.early) > 0 {
			n = copy(p, w.early)
			w.early = w.early[n:]
		} else if n, err = w.Conn.Read(p); n == 0 {
			return 0, err
		}
		n, w.ended = w.unwrap(p[:n])
		var wrong *closeError
		if errors.As(w.ended, &wrong) {
			w.sayGoodbye(wrong.code)
			w.ln.b.notice("client disconnected for an error", "listener", w.ln.name, "address", w.RemoteAddr().String(), "err", wrong)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, w.ended
}

// unwrap takes frames apart, in place. It returns how many bytes of MQTT are now
// at the front of buf; those that came before an error are good.
func (w *wsConn) unwrap(buf []byte) (n int, err error) {
	in := buf
	for len(in) > 0 {
		if !w.inFrame {
			need := headerSize(w.head[:w.headLen])
			k := copy(w.head[w.headLen:need], in)
			w.headLen += k
			in = in[k:]
			if w.headLen == 2 {
				if err := w.checkHead(); err != nil {
					return n, err
				}
			}
			if w.headLen < headerSize(w.head[:w.headLen]) {
				continue
			}
			if err := w.beginFrame(); err != nil {
				return n, err
			}
		} else {
			k := int(min(w.left, uint64(len(in))))
			piece := in[:k]
			in = in[k:]
			unmask(piece, w.head[w.headLen-4:w.headLen], w.masked)
			w.left -= uint64(k)
			w.masked += uint64(k)
			if w.head[0]&8 != 0 {
				w.control = append(w.control, piece...)
			} else {
				n += copy(buf[n:], piece)
			}
		}
		if w.inFrame && w.left == 0 {
			if err := w.endFrame(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// headerSize returns how long a frame's header is, as far as that can be said
// from the beginning of it.
func headerSize(head []byte) int {
	if len(head) < 2 {
		return 2
	}
	switch head[1] & 0x7F {
	case 126:
		return 2 + 2 + 4
	case 127:
		return 2 + 8 + 4
	}
	return 2 + 4
}

// checkHead checks the first two bytes of a frame.
func (w *wsConn) checkHead() error {
	wrong := func(text string) error { return &closeError{closeProtocol, text} }
	final, op := w.head[0]&0x80 != 0, w.head[0]&0x0F
	switch {
	case w.head[0]&0x70 != 0:
		return wrong("a reserved bit is set, though no extension was agreed on")
	case w.head[1]&0x80 == 0:
		return wrong("a frame from a client is not masked")
	}
	switch op {
	case opBinary:
		if w.open {
			return wrong("a message begins within another")
		}
	case opContinuation:
		if !w.open {
			return wrong("a continuation of nothing")
		}
	case opText:
		return &closeError{closeUnsupported, "a text frame, MQTT is binary"} // [MQTT-6.0.0-1]
	case opClose, opPing, opPong:
		if !final || w.head[1]&0x7F > 125 {
			return wrong("a control frame is in pieces, or too long")
		}
	default:
		return wrong("a frame of a kind that does not exist")
	}
	return nil
}

// beginFrame reads the length. The header is complete.
func (w *wsConn) beginFrame() error {
	least := uint64(0)
	switch w.left = uint64(w.head[1] & 0x7F); w.left {
	case 126:
		w.left, least = uint64(binary.BigEndian.Uint16(w.head[2:])), 126
	case 127:
		w.left, least = binary.BigEndian.Uint64(w.head[2:]), 1<<16
	}
	if w.left < least || w.left >= 1<<63 {
		return &closeError{closeProtocol, "the length of a frame is not written as it must be"}
	}
	w.inFrame, w.masked = true, 0
	return nil
}

// endFrame is called when a frame is complete.
func (w *wsConn) endFrame() error {
	w.inFrame, w.headLen = false, 0
	op := w.head[0] & 0x0F
	payload := w.control
	w.control = nil
	switch op {
	case opBinary, opContinuation:
		w.open = w.head[0]&0x80 == 0
	case opPing:
		frame := append(frameHeader(nil, opPong, len(payload)), payload...)
		w.pongMu.Lock()
		w.pong = frame // of several Pings the last counts (RFC 6455, 5.5.3)
		w.pongMu.Unlock()
		w.sendPong()
	case opClose:
		code := uint16(closeNormal)
		if len(payload) > 0 {
			if len(payload) < 2 {
				return &closeError{closeProtocol, "half a close code"}
			}
			code = binary.BigEndian.Uint16(payload)
			if code < 1000 || code >= 5000 || code >= 1004 && code <= 1006 || code >= 1015 && code < 3000 {
				return &closeError{closeProtocol, "a close code that nobody may send"}
			}
		}
		w.sayGoodbye(code)
		return io.EOF
	}
	return nil
}

// unmask undoes the masking of a piece of payload that begins at offset.
func unmask(p, key []byte, offset uint64) {
	var k [8]byte
	for i := range k {
		k[i] = key[(offset+uint64(i))&3]
	}
	word := binary.LittleEndian.Uint64(k[:])
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)^word)
	}
	for i := range p {
		p[i] ^= k[i]
	}
}

// frameHeader appends the header of a whole message.
func frameHeader(b []byte, op byte, n int) []byte {
	b = append(b, 0x80|op)
	switch {
	case n < 126:
		return append(b, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	}
	return binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
}

var frameBufs = sync.Pool{New: func() any { b := make([]byte, 0, writePiece+256); return &b }}

// Write writes p as one binary frame. Where it returns less than len(p), be it
// for a deadline or without an error (see tlsConn), the caller may go on with
// the rest, and only with that.
func (w *wsConn) Write(p []byte) (int, error) {
	w.writeMu.Lock()
	w.wire.ours.Store(true)
	n, err := w.write(p)
	w.wire.ours.Store(false)
	w.writeMu.Unlock()
	w.sendPong() // one that could not be sent meanwhile
	return n, err
}

// write is Write; writeMu is held.
func (w *wsConn) write(p []byte) (int, error) {
	if w.goodbye {
		return 0, net.ErrClosed
	}
	if len(p) > 0 && w.owed == 0 {
		w.push()
		w.pending = frameHeader(w.pending, opBinary, len(p))
		w.owed = len(p)
	}
	piece := p[:min(len(p), w.owed, writePiece)]
	buf := frameBufs.Get().(*[]byte)
	defer frameBufs.Put(buf)
	*buf = append(append((*buf)[:0], w.pending...), piece...)
	if len(*buf) == 0 {
		return 0, nil
	}
	n, err := w.Conn.Write(*buf)
	ahead := min(n, len(w.pending))
	w.pending = w.pending[ahead:]
	w.owed -= n - ahead
	return n - ahead, err
}

// push makes room at the end of pending. writeMu is held.
func (w *wsConn) push() {
	if len(w.pending) == 0 {
		w.pending = w.header[:0]
	}
}

// sendPong answers a Ping, unless a write is under way, which does it at its
// end: the reader must not wait for a client that does not read.
func (w *wsConn) sendPong() {
	for {
		w.pongMu.Lock()
		none := w.pong == nil
		w.pongMu.Unlock()
		if none || !w.writeMu.TryLock() {
			return
		}
		if w.owed > 0 || w.goodbye {
			w.writeMu.Unlock()
			return
		}
		w.pongMu.Lock()
		w.pending, w.pong = append(w.pending, w.pong...), nil
		w.pongMu.Unlock()
		w.wire.grace()
		_, _ = w.write(nil) // what could not be written comes first the next time
		w.writeMu.Unlock()
	}
}

// sayGoodbye sends a Close frame, once, with the code that was given first. If
// a frame is being written it leaves that to the next call, at the latest Close.
func (w *wsConn) sayGoodbye(code uint16) {
	w.code.CompareAndSwap(0, uint32(code))
	if !w.writeMu.TryLock() {
		return
	}
	defer w.writeMu.Unlock()
	if w.owed == 0 && !w.goodbye {
		w.push()
		w.pending = binary.BigEndian.AppendUint16(frameHeader(w.pending, opClose, 2), uint16(w.code.Load()))
		_ = w.wire.SetWriteDeadline(time.Now().Add(closeWithin)) // fails on Write too
		_, _ = w.write(nil)                                      // closing in any case
	}
	w.goodbye = true
}

// closeWithin is how long a Close frame may take to get into the socket's
// buffer, where it mostly finds room at once.
const closeWithin = 100 * time.Millisecond

// CloseWrite says that nothing more comes, to WebSocket and what is below.
func (w *wsConn) CloseWrite() error {
	w.sayGoodbye(closeNormal)
	if h, ok := w.Conn.(half); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close implements net.Conn.
func (w *wsConn) Close() error {
	w.sayGoodbye(closeNormal)
	return w.Conn.Close()
}
