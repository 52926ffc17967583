package main

import (
	"bytes"
	"errors"
	"testing"
)

func TestEncode(t *testing.T) {
	at0, at1 := newTemplate("a/b", 0, 14, 3), newTemplate("a/b", 1, 14, 3)
	tests := []struct {
		name string
		got  []byte
		want string
	}{
		{"connect, clean", appendConnect(nil, "c1", true), "\x10\x0e\x00\x04MQTT\x04\x02\x02\x58\x00\x02c1"},
		{"connect, persistent", appendConnect(nil, "c1", false), "\x10\x0e\x00\x04MQTT\x04\x00\x02\x58\x00\x02c1"},
		{"subscribe", appendSubscribe(nil, 258, "a/+", 2), "\x82\x08\x01\x02\x00\x03a/+\x02"},
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
	for qos := range byte(3) {
		tm := newTemplate("plant/line7/state", qos, 200, 7)
		b := tm.append([]byte{0xFF}, 40000, 1<<40)[1:]
		f, n, err := nextFrame(b)
		if err != nil || n != len(b) {
			t.Fatalf("QoS %d: length %d, error %v, want %d and none", qos, n, err, len(b))
		}
		got, err := f.message()
		want := message{qos: qos, packetID: 40000, publisher: 7, seq: 1 << 40}
		if qos == 0 {
			want.packetID = 0
		}
		if err != nil || got != want {
			t.Errorf("got %+v, error %v, want %+v", got, err, want)
		}
	}
}

func TestTemplateDoesNotAllocate(t *testing.T) {
	tm := newTemplate("plant/line7/state", 1, 100, 7)
	b := make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(100, func() { b = tm.append(b[:0], 1, 2) }); n != 0 {
		t.Errorf("%v allocations a message, want none", n)
	}
}

// Every proper prefix of a packet needs more bytes.
func TestNextFramePartial(t *testing.T) {
	tm := newTemplate("a", 1, 200, 0)
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
		if _, err := f.message(); !errors.Is(err, errMalformed) {
			t.Errorf("message of % x: error %v, want errMalformed", f.body, err)
		}
	}
	if _, err := (frame{0x40, []byte{1}}).packetID(); !errors.Is(err, errMalformed) {
		t.Errorf("PUBACK of one byte: error %v, want errMalformed", err)
	}
}
