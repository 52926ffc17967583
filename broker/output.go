package broker

import (
	"errors"
	"os"
	"syscall"
	"time"

	"penstock/storage"
)

// say writes what is sent before the session is up.
func (c *conn) say(packet []byte) {
	c.outMu.Lock()
	c.put(packet)
	c.outMu.Unlock()
	c.flush()
}

// put appends a packet to the output, unless nothing more is accepted. outMu is
// held.
func (c *conn) put(packet []byte) {
	if !c.stopped {
		c.reserve(len(packet))
		c.out = append(c.out, packet...)
		c.otherOut++
	}
}

// room implements link.
func (c *conn) room() bool { return c.below(highWater) }

// roomQoS0 implements link.
func (c *conn) roomQoS0() bool { return c.below(int(c.b.cfg.MaxOutput)) }

func (c *conn) below(mark int) bool {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if len(c.out)+c.inWrite < mark || c.stopped {
		return true
	}
	c.starved = true
	return false
}

// sendPublish implements link.
func (c *conn) sendPublish(m *storage.Message, qos byte, dup, retain bool, packetID uint16, ids []uint32, b *batch) outcome {
	var expiry uint32
	if m.Expires != 0 {
		expiry = uint32(max(1, (c.b.plane.remains(m)+999)/1000))
	}
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.stopped {
		return outGone
	}
	alias, known := c.alias(m.Topic)
	c.reserve(maxPublishHeader + m.Size() + 5*len(ids))
	before := len(c.out)
	c.out = appendPublish(c.out, m, c.version, qos, dup, retain, packetID, expiry, alias, known, ids)
	if c.tooLarge(before) && alias > 0 && !known {
		alias = 0
		c.out = appendPublish(c.out[:before], m, c.version, qos, dup, retain, packetID, expiry, 0, false, ids)
	}
	if c.tooLarge(before) {
		if c.out = c.out[:before]; before == 0 {
			c.outOf.free()
			c.out, c.outOf = nil, nil
		}
		return outTooLarge
	}
	if alias > 0 && !known {
		if c.outAlias == nil {
			c.outAlias = make(map[string]uint16)
		}
		c.outAlias[m.Topic] = alias
	}
	c.msgsOut[qos]++
	c.bytesOut[qos] += uint64(len(c.out) - before)
	c.payloadOut += uint64(len(m.Payload))
	c.mark(b)
	return outSent
}

// alias returns the Topic Alias to send a topic with, and whether the client
// knows it already; 0 if it gets none. The first topics get one each, for as
// long as the connection lasts. outMu is held.
func (c *conn) alias(topic string) (alias uint16, known bool) {
	if c.aliasMax == 0 || len(topic) <= 3 { // what the property takes
		return 0, false
	}
	if alias, known = c.outAlias[topic]; known || len(c.outAlias) >= c.aliasMax {
		return alias, known
	}
	return uint16(len(c.outAlias) + 1), false
}

// sendAck implements link.
func (c *conn) sendAck(kind byte, packetID uint16, reason byte, codes []byte, b *batch) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.stopped {
		return
	}
	text := c.reasonText(reason, codes)
	c.reserve(maxAckHeader + len(codes) + len(text))
	before := len(c.out)
	c.appendAck(kind, packetID, reason, codes, text)
	if c.tooLarge(before) { // without the text: [MQTT-3.4.2-2] and its like
		c.out = c.out[:before]
		c.appendAck(kind, packetID, reason, codes, "")
	}
	if c.tooLarge(before) { // [MQTT-3.1.2-24]: the client cannot be told what it waits for
		c.out = c.out[:before]
		c.b.serving.Go(func() { c.kick(reasonTooLarge, "acknowledgement does not fit into the Maximum Packet Size") })
		return
	}
	c.otherOut++
	c.mark(b)
}

func (c *conn) appendAck(kind byte, packetID uint16, reason byte, codes []byte, text string) {
	if kind == typeSuback || kind == typeUnsuback {
		c.out = appendSuback(c.out, kind, c.version, packetID, codes, text)
	} else {
		c.out = appendAck(c.out, kind, c.version, packetID, reason, text)
	}
}

// reasonText returns the reason string for an acknowledgement that refuses
// something, unless the client wants none [MQTT-3.1.2-29].
func (c *conn) reasonText(reason byte, codes []byte) string {
	for _, code := range codes {
		reason = max(reason, code)
	}
	if reason < 0x80 || c.noProblems {
		return ""
	}
	return reasonTexts[reason]
}

// mark has the connection flushed at the end of the batch. outMu is held.
func (c *conn) mark(b *batch) {
	if !c.marked {
		c.marked = true
		b.add(c)
	}
}

// inlineWrite is how much is written by who has it to send, in bytes. More is
// left to a goroutine, which is worth its start then.
const inlineWrite = 8 << 10

// flush sends what there is to be sent, unless a writer is at it: a little at
// once, if the socket takes it, and otherwise by a new writer. It never waits.
func (c *conn) flush() {
	c.outMu.Lock()
	c.marked = false
	if c.writing || len(c.out) == 0 {
		c.outMu.Unlock()
		return
	}
	c.writing = true
	if c.raw == nil || len(c.out) > inlineWrite {
		c.outMu.Unlock()
		go c.write(nil, nil)
		return
	}
	buf, of := c.takeOut()
	c.outMu.Unlock()
	c.now = buf
	err := c.raw.Control(c.writable) // not Write, which would wait, and heed a deadline of long ago
	rest := c.now
	c.now = nil
	c.b.plane.networkOut.Add(uint64(len(buf) - len(rest)))
	if err != nil || len(rest) > 0 {
		go c.write(rest, of)
		return
	}
	of.free()
	c.outMu.Lock()
	defer c.outMu.Unlock()
	c.inWrite = 0
	if len(c.out) > 0 || c.starved || c.crowded {
		go c.write(nil, nil)
		return
	}
	c.writing = false
	c.tellSent()
}

// writeNow writes what the socket takes of c.now without waiting. What is wrong
// with the socket is left for the writer to find.
func (c *conn) writeNow(fd uintptr) {
	for len(c.now) > 0 {
		n, err := writeNonblock(fd, c.now)
		if err != nil || n == 0 {
			return
		}
		c.now = c.now[n:]
	}
}

// takeOut takes the output buffer to write it. outMu is held.
func (c *conn) takeOut() (buf []byte, of *buffer) {
	buf, of = c.out, c.outOf
	c.out, c.outOf = nil, nil
	c.inWrite = len(buf)
	c.addUp()
	return buf, of
}

// write sends rest, which was taken before and is made of of, and then what is
// in the output buffer until there is nothing more, and ends. There is one at a
// time.
func (c *conn) write(rest []byte, of *buffer) {
	defer c.b.recovered(c)
	var b batch
	for {
		if len(rest) > 0 {
			err := c.writeOut(rest)
			of.free()
			if err != nil {
				c.unwritable(err)
				return
			}
		}
		c.outMu.Lock()
		c.inWrite = 0
		if c.crowded {
			c.crowded = false
			c.wake()
		}
		if c.starved && !c.stopped && len(c.out) < highWater {
			c.starved = false
			c.outMu.Unlock()
			c.sess.drained(&b)
			b.flush()
			c.outMu.Lock()
		}
		if len(c.out) == 0 {
			c.writing = false
			c.addUp()
			c.tellSent()
			c.outMu.Unlock()
			return
		}
		rest, of = c.takeOut()
		c.outMu.Unlock()
	}
}

// unwritable ends a connection to which nothing can be written any more. What a
// client that has closed has sent before is still handled: its reader finds the
// end.
func (c *conn) unwritable(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load() {
		c.b.plane.limit(limitOutput)
		c.b.notice("client disconnected, it took nothing for too long", "client", c.who.clientID, "address", c.sock.RemoteAddr().String(), "err", err)
	}
	c.outMu.Lock()
	c.stopped, c.writing, c.inWrite = true, false, 0
	c.outOf.free()
	c.out, c.outOf = nil, nil
	c.tellSent()
	c.outMu.Unlock()
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		c.broken.Store(true)
		c.wake()
		return
	}
	_ = c.Close()
}

// writePiece is how much is written under one deadline: a client that takes
// its packets slowly, but takes them, is not to be cut off.
const writePiece = 64 << 10

// piece returns what of buf, which starts with a packet, is written at once.
// A WebSocket frame is one packet: clients may take several in one, or one in
// several, but paho's for C does not.
func (c *conn) piece(buf []byte) []byte {
	if c.ln.web != nil {
		if size, _, err := frameSize(buf); err == nil {
			return buf[:min(size, len(buf))]
		}
	}
	return buf[:min(len(buf), writePiece)]
}

// writeOut writes buf to the socket.
func (c *conn) writeOut(buf []byte) error {
	for len(buf) > 0 {
		piece := c.piece(buf)
		buf = buf[len(piece):]
		for len(piece) > 0 {
			c.outMu.Lock()
			if !c.stopped { // Close has set a deadline of its own
				_ = c.sock.SetWriteDeadline(time.Now().Add(c.b.cfg.WriteTimeout.D())) // fails on Write too
			}
			c.outMu.Unlock()
			n, err := c.sock.Write(piece)
			c.b.plane.networkOut.Add(uint64(n))
			c.outMu.Lock()
			c.inWrite -= n // what the client can have is not held against it
			c.outMu.Unlock()
			if err != nil && !(n > 0 && errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load()) {
				return err
			}
			piece = piece[n:]
		}
	}
	return nil
}

// What a PUBLISH takes besides topic, payload, properties and subscription
// identifiers, and an acknowledgement or DISCONNECT besides codes and text, at
// most, in bytes.
const (
	maxPublishHeader = 32
	maxAckHeader     = 16
)

// reserve makes room in the output buffer for n bytes. outMu is held.
func (c *conn) reserve(n int) {
	if cap(c.out)-len(c.out) >= n {
		return
	}
	next := getBuffer(0, len(c.out)+n)
	size := copy(next.bytes, c.out)
	c.outOf.free()
	c.out, c.outOf = next.bytes[:size], next
}

// tooLarge reports whether the packet that was written to out from before on
// is larger than the client takes. outMu is held.
func (c *conn) tooLarge(before int) bool {
	return c.maxPacket > 0 && len(c.out)-before > c.maxPacket
}

// tellSent wakes who waits for the writer. outMu is held.
func (c *conn) tellSent() {
	if c.sent != nil {
		close(c.sent)
		c.sent = nil
	}
}

// addUp adds what was counted to the plane's counters. outMu is held.
func (c *conn) addUp() {
	p := c.b.plane
	packets := c.otherOut
	for q := range c.msgsOut {
		if c.msgsOut[q] > 0 {
			p.messagesOut[q].Add(c.msgsOut[q])
			packets += c.msgsOut[q]
			p.bytesOut[q].Add(c.bytesOut[q])
			c.msgsOut[q], c.bytesOut[q] = 0, 0
		}
	}
	if packets > 0 {
		p.packetsOut.Add(packets)
		p.payloadOut.Add(c.payloadOut)
		c.otherOut, c.payloadOut = 0, 0
	}
}
