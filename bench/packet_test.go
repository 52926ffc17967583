package main

import (
	"bytes"
	"errors"
	"testing"
)

func TestEncode(t *testing.T) {
	at0v5, at1v5 := newTemplate(v5, "a/b", 0, 14, 3), newTemplate(v5, "a/b", 1, 14, 3)
	at0, at1 := newTemplate(v311, "a/b", 0, 14, 3), newTemplate(v311, "a/b", 1, 14, 3)
	tests := []struct {
		name string
		got  []byte
		want string
	}{
		{"connect, clean", appendConnect(nil, v311, "c1", true), "\x10\x0e\x00\x04MQTT\x04\x02\x02\x58\x00\x02c1"},
		{"connect, persistent", appendConnect(nil, v311, "c1", false), "\x10\x0e\x00\x04MQTT\x04\x00\x02\x58\x00\x02c1"},
		{"subscribe", appendSubscribe(nil, v311, 258, []string{"a/+"}, 2), "\x82\x08\x01\x02\x00\x03a/+\x02"},
		{"connect, clean, MQTT 5", appendConnect(nil, v5, "c1", true), "\x10\x0f\x00\x04MQTT\x05\x02\x02\x58\x00\x00\x02c1"},
		{"connect, persistent, MQTT 5", appendConnect(nil, v5, "c1", false), "\x10\x14\x00\x04MQTT\x05\x00\x02\x58\x05\x11\x00\x01\x51\x80\x00\x02c1"},
		{"subscribe to two, MQTT 5", appendSubscribe(nil, v5, 258, []string{"a/+", "#"}, 2), "\x82\x0d\x01\x02\x00\x00\x03a/+\x02\x00\x01#\x02"},
		{"QoS 0, MQTT 5", at0v5.append(nil, 0, 0x0102), "\x30\x14\x00\x03a/b\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x01\x02xx"},
		{"QoS 1, MQTT 5", at1v5.append(nil, 0x1234, 5), "\x32\x16\x00\x03a/b\x12\x34\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x05xx"},
		{"puback", appendAck(nil, puback, 0x1234), "\x40\x02\x12\x34"},
		{"pubrel", appendAck(nil, pubrel, 0x1234), "\x62\x02\x12\x34"},
		{"QoS 0", at0.append(nil, 0, 0x0102), "\x30\x13\x00\x03a/b\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x01\x02xx"},
		{"QoS 1", at1.append(nil, 0x1234, 5), "\x32\x15\x00\x03a/b\x12\x34\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x05xx"},
		{"length of two bytes", appendLength(nil, 321), "\xc1\x02"},
		{"length of four bytes", appendLength(nil, 268_435_455), "\xff\xff\xff\x7f"},
	}
	for _, tt := range tests {
		if string(tt.got) != tt.want {
			t.Errorf("%s: got % x, want % x", tt.name, tt.got, tt.want)
		}
	}
}

func TestTemplateRoundTrip(t *testing.T) {
	for _, version := range []byte{v311, v5} {
		for qos := range byte(3) {
			tm := newTemplate(version, "plant/line7/state", qos, 200, 7)
			b := tm.append([]byte{0xFF}, 40000, 1<<40)[1:]
			b[0] |= 1 // RETAIN
			f, n, err := nextFrame(b)
			if err != nil || n != len(b) {
				t.Fatalf("version %d, QoS %d: length %d, error %v, want %d and none", version, qos, n, err, len(b))
			}
			got, err := f.message(version)
			id := uint16(40000)
			if qos == 0 {
				id = 0
			}
			if err != nil || got.qos != qos || got.packetID != id || got.publisher != 7 || got.seq != 1<<40 || !got.retain ||
				string(got.topic) != "plant/line7/state" || len(got.payload) != 200 || got.payload[199] != 'x' {
				t.Errorf("version %d, QoS %d: got %+v, error %v", version, qos, got, err)
			}
		}
	}
}

func TestTemplateDoesNotAllocate(t *testing.T) {
	tm := newTemplate(v311, "plant/line7/state", 1, 100, 7)
	b := make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(100, func() { b = tm.append(b[:0], 1, 2) }); n != 0 {
		t.Errorf("%v allocations a message, want none", n)
	}
}

// Every proper prefix of a packet needs more bytes.
func TestNextFramePartial(t *testing.T) {
	tm := newTemplate(v311, "a", 1, 200, 0)
	whole := tm.append(nil, 1, 0)
	for i := range whole {
		if _, n, err := nextFrame(whole[:i]); n != 0 || err != nil {
			t.Errorf("%d of %d bytes: length %d, error %v, want 0 and none", i, len(whole), n, err)
		}
	}
	two := append(bytes.Clone(whole), 0xD0, 0)
	if f, n, err := nextFrame(two); n != len(whole) || err != nil || len(f.body) != len(whole)-3 {
		t.Errorf("of two packets: length %d, body %d, error %v", n, len(f.body), err)
	}
	if f, n, err := nextFrame(two[len(whole):]); n != 2 || err != nil || f.kind() != pingresp {
		t.Errorf("second packet: length %d, type %d, error %v", n, f.kind(), err)
	}
}

func TestMalformed(t *testing.T) {
	if _, _, err := nextFrame([]byte{0x30, 0x80, 0x80, 0x80, 0x80, 1}); !errors.Is(err, errMalformed) {
		t.Errorf("length of five bytes: error %v, want errMalformed", err)
	}
	for _, f := range []frame{
		{0x30, nil},
		{0x30, []byte{0, 200, 'a'}},
		{0x30, append([]byte{0, 1, 'a'}, make([]byte, stampBytes-1)...)},
		{0x32, append([]byte{0, 1, 'a', 0, 1}, make([]byte, stampBytes-1)...)},
	} {
		if _, err := f.message(v311); !errors.Is(err, errMalformed) {
			t.Errorf("message of % x: error %v, want errMalformed", f.body, err)
		}
	}
	properties := frame{0x30, append([]byte{0, 1, 'a', 1}, make([]byte, stampBytes+1)...)}
	if _, err := properties.message(v5); !errors.Is(err, errMalformed) {
		t.Errorf("message with properties: error %v, want errMalformed", err)
	}
	if _, err := (frame{0x40, []byte{0, 1, 0x97}}).packetID(); err == nil {
		t.Error("PUBACK with reason code 0x97: no error")
	}
	if id, err := (frame{0x40, []byte{0, 1, 0x10, 0}}).packetID(); id != 1 || err != nil {
		t.Errorf("PUBACK with reason code 0x10: identifier %d, error %v", id, err)
	}
	if _, err := (frame{0x40, []byte{1}}).packetID(); !errors.Is(err, errMalformed) {
		t.Errorf("PUBACK of one byte: error %v, want errMalformed", err)
	}
}
