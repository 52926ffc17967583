package broker

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"penstock/storage"
)

// reasonOf returns the reason code of a wire error, 0 for no error.
func reasonOf(err error) byte {
	var w *wireError
	if errors.As(err, &w) {
		return w.reason
	}
	return 0
}

func TestFrameSize(t *testing.T) {
	for _, tc := range []struct {
		in           []byte
		size, header int
		more         bool
		reason       byte
	}{
		{nil, 0, 0, true, 0},
		{[]byte{0x30}, 0, 0, true, 0},
		{[]byte{0x30, 0x80}, 0, 0, true, 0},
		{[]byte{0x30, 0xFF, 0xFF, 0xFF}, 0, 0, true, 0},
		{[]byte{0x30, 0}, 2, 2, false, 0},
		{[]byte{0x30, 127}, 129, 2, false, 0},
		{[]byte{0x30, 0x80, 1}, 131, 3, false, 0},
		{[]byte{0x30, 0xFF, 0x7F}, 16386, 3, false, 0},
		{[]byte{0x30, 0xFF, 0xFF, 0x7F}, 2097155, 4, false, 0},
		{[]byte{0x30, 0xFF, 0xFF, 0xFF, 0x7F}, 5 + maxVarint, 5, false, 0},
		{[]byte{0x30, 0xFF, 0xFF, 0xFF, 0xFF}, 0, 0, false, reasonMalformed},
		{[]byte{0x30, 0x80, 0x80, 0x80, 0x80, 0}, 0, 0, false, reasonMalformed},
	} {
		size, header, err := frameSize(tc.in)
		if size != tc.size || header != tc.header || (err == errNeedMore) != tc.more || reasonOf(err) != tc.reason {
			t.Errorf("% x: got %d, %d, %v; want %d, %d, more %v, reason %#x", tc.in, size, header, err, tc.size, tc.header, tc.more, tc.reason)
		}
	}
}

func TestVarint(t *testing.T) {
	for _, v := range []int{0, 1, 127, 128, 16383, 16384, 2097151, 2097152, maxVarint} {
		b := appendVarint(nil, v)
		if len(b) != varintSize(v) {
			t.Errorf("%d: %d bytes, size says %d", v, len(b), varintSize(v))
		}
		r := reader{buf: append(b, 0xAA)}
		if got := r.varint(); got != v || len(r.buf) != 1 || r.err != nil {
			t.Errorf("%d: read as %d, %d bytes left, %v", v, got, len(r.buf), r.err)
		}
	}
	for _, b := range [][]byte{{}, {0x80}, {0xFF, 0xFF, 0xFF, 0xFF}, {0x80, 0x80, 0x80, 0x80, 1}} {
		r := reader{buf: b}
		if r.varint(); r.err == nil {
			t.Errorf("% x: no error", b)
		}
	}
}

func TestValidText(t *testing.T) {
	for in, want := range map[string]bool{
		"": true, "abc": true, "größe": true, "日本": true, "\U0001F600": true, "\x7f": true,
		"a\x00b": false, "\x00": false, "\xff": false, "a\xc3": false, "\xed\xa0\x80": false, "\xc0\x80": false,
	} {
		if got := validText([]byte(in)); got != want {
			t.Errorf("%q: got %v, want %v", in, got, want)
		}
	}
}

func TestParsePublish(t *testing.T) {
	topic := str("a/b")
	user := append([]byte{propUser}, append(str("k"), str("v")...)...)
	for _, tc := range []struct {
		name    string
		version byte
		first   byte
		body    []byte
		reason  byte
		want    publishFrame
	}{
		{"QoS 0", 4, 0x30, append(topic, "hi"...), 0, publishFrame{topic: []byte("a/b"), payload: []byte("hi")}},
		{"QoS 1, DUP, RETAIN", 4, 0x3B, append(append(str("a"), 1, 2), "hi"...), 0, publishFrame{topic: []byte("a"), payload: []byte("hi"), packetID: 258, qos: 1, dup: true, retain: true}},
		{"no payload", 3, 0x30, topic, 0, publishFrame{topic: []byte("a/b"), payload: []byte{}}},
		{"QoS 3", 4, 0x36, append(str("a"), 0, 1), reasonMalformed, publishFrame{}},
		{"DUP at QoS 0", 4, 0x38, topic, reasonMalformed, publishFrame{}},
		{"identifier 0", 4, 0x32, append(str("a"), 0, 0), reasonProtocolError, publishFrame{}},
		{"no identifier", 4, 0x32, append(str("a"), 1), reasonMalformed, publishFrame{}},
		{"topic cut short", 4, 0x30, []byte{0, 5, 'a'}, reasonMalformed, publishFrame{}},
		{"topic not UTF-8", 4, 0x30, str("\xff"), reasonMalformed, publishFrame{}},
		{"U+0000 in the topic", 4, 0x30, str("a\x00"), reasonMalformed, publishFrame{}},
		{"v5, no properties", 5, 0x30, append(str("a"), 0, 'x'), 0, publishFrame{topic: []byte("a"), payload: []byte("x")}},
		{"v5, properties missing", 5, 0x30, str("a"), reasonMalformed, publishFrame{}},
		{"v5, properties cut short", 5, 0x30, append(str("a"), 9, 1), reasonMalformed, publishFrame{}},
		{"v5, all properties", 5, 0x30, bytes.Join([][]byte{str("a"), props5(user, []byte{propMessageExpiry, 0, 0, 0, 9}, []byte{propPayloadFormat, 1}, []byte{propTopicAlias, 0, 7}, []byte{propContentType}, str("t"), []byte{propResponseTopic}, str("r"), []byte{propCorrelationData}, str("\xff\x00"), user), []byte("x")}, nil), 0,
			publishFrame{topic: []byte("a"), payload: []byte("x"), expiry: 9, hasExpiry: true, alias: 7,
				properties: bytes.Join([][]byte{user, {propPayloadFormat, 1}, {propContentType}, str("t"), {propResponseTopic}, str("r"), {propCorrelationData}, str("\xff\x00"), user}, nil)}},
		{"expiry twice", 5, 0x30, append(str("a"), props5([]byte{2, 0, 0, 0, 1, 2, 0, 0, 0, 1})...), reasonProtocolError, publishFrame{}},
		{"payload format 7", 5, 0x30, append(str("a"), props5([]byte{1, 7})...), reasonProtocolError, publishFrame{}},
		{"alias 0", 5, 0x30, append(str("a"), props5([]byte{propTopicAlias, 0, 0})...), reasonAliasInvalid, publishFrame{}},
		{"subscription identifier", 5, 0x30, append(str("a"), props5([]byte{propSubscriptionID, 1})...), reasonProtocolError, publishFrame{}},
		{"response topic with a wildcard", 5, 0x30, append(str("a"), props5([]byte{propResponseTopic}, str("a/#"))...), reasonProtocolError, publishFrame{}},
		{"property of another packet", 5, 0x30, append(str("a"), props5([]byte{propSessionExpiry, 0, 0, 0, 1})...), reasonMalformed, publishFrame{}},
		{"property identifier above 63", 5, 0x30, append(str("a"), props5([]byte{0x80 | 2, 0})...), reasonMalformed, publishFrame{}},
		{"property cut short", 5, 0x30, append(str("a"), props5([]byte{2, 0, 0})...), reasonMalformed, publishFrame{}},
	} {
		var scratch []byte
		got, err := parsePublish(tc.first, tc.body, tc.version, &scratch)
		if reasonOf(err) != tc.reason {
			t.Errorf("%s: got %v, want reason %#x", tc.name, err, tc.reason)
		}
		if err == nil && !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func TestParseAck(t *testing.T) {
	long := append([]byte{0, 1, 0x80}, props5([]byte{propReasonString}, str("why"), []byte{propUser}, str("k"), str("v"))...)
	for _, tc := range []struct {
		name    string
		first   byte
		body    []byte
		version byte
		id      uint16
		reason  byte
		fails   byte
	}{
		{"PUBACK", 0x40, []byte{1, 2}, 4, 258, 0, 0},
		{"PUBREL", 0x62, []byte{1, 2}, 4, 258, 0, 0},
		{"PUBREL with wrong flags", 0x60, []byte{1, 2}, 4, 0, 0, reasonMalformed},
		{"PUBACK with flags", 0x42, []byte{1, 2}, 4, 0, 0, reasonMalformed},
		{"v5 with a reason", 0x50, []byte{0, 1, 0x97}, 5, 1, 0x97, 0},
		{"v5 with properties", 0x50, long, 5, 1, 0x80, 0},
		{"v5 with a byte behind", 0x50, append(long, 0), 5, 0, 0, reasonMalformed},
		{"v5 with a wrong property", 0x40, append([]byte{0, 1, 0}, props5([]byte{1, 1})...), 5, 0, 0, reasonMalformed},
		{"v4 with a reason", 0x40, []byte{0, 1, 0}, 4, 0, 0, reasonMalformed},
		{"identifier 0", 0x40, []byte{0, 0}, 4, 0, 0, reasonProtocolError},
		{"PUBCOMP with a reason of PUBACK", 0x70, long, 5, 0, 0, reasonProtocolError},
		{"PUBACK with a reason that there is not", 0x40, []byte{0, 1, 0x11}, 5, 0, 0, reasonProtocolError},
		{"PUBREL sent again, v3", 0x6A, []byte{0, 1}, 3, 1, 0, 0},
		{"PUBREL with DUP, v4", 0x6A, []byte{0, 1}, 4, 0, 0, reasonMalformed},
		{"cut short", 0x40, []byte{1}, 4, 0, 0, reasonMalformed},
		{"empty", 0x40, nil, 5, 0, 0, reasonMalformed},
	} {
		id, reason, err := parseAck(tc.first, tc.body, tc.version)
		if reasonOf(err) != tc.fails || err == nil && (id != tc.id || reason != tc.reason) {
			t.Errorf("%s: got %d, %#x, %v; want %d, %#x, failure %#x", tc.name, id, reason, err, tc.id, tc.reason, tc.fails)
		}
	}
}

func TestParseSubscribe(t *testing.T) {
	for _, tc := range []struct {
		name    string
		version byte
		first   byte
		body    []byte
		want    string // identifier, then filters with options
		fails   byte
	}{
		{"two filters", 4, 0x82, bytes.Join([][]byte{{0, 1}, str("a"), {0}, str("b/#"), {2}}, nil), "1 0 [{a 0} {b/# 2}]", 0},
		{"v5", 5, 0x82, bytes.Join([][]byte{{0, 1}, props5([]byte{propSubscriptionID, 0x80, 1}, []byte{propUser}, str("k"), str("v")), str("a"), {0x2E}}, nil), "1 128 [{a 46}]", 0},
		{"flags", 4, 0x80, bytes.Join([][]byte{{0, 1}, str("a"), {0}}, nil), "", reasonMalformed},
		{"identifier 0", 4, 0x82, bytes.Join([][]byte{{0, 0}, str("a"), {0}}, nil), "", reasonProtocolError},
		{"no filter", 4, 0x82, []byte{0, 1}, "", reasonProtocolError},
		{"no options", 5, 0x82, bytes.Join([][]byte{{0, 1}, {0}, str("a")}, nil), "", reasonMalformed},
		{"QoS 3", 4, 0x82, bytes.Join([][]byte{{0, 1}, str("a"), {3}}, nil), "", reasonMalformed},
		{"v4 with options of v5", 4, 0x82, bytes.Join([][]byte{{0, 1}, str("a"), {4}}, nil), "", reasonMalformed},
		{"retain handling 3", 5, 0x82, bytes.Join([][]byte{{0, 1}, {0}, str("a"), {0x30}}, nil), "", reasonProtocolError},
		{"reserved option bits", 5, 0x82, bytes.Join([][]byte{{0, 1}, {0}, str("a"), {0x40}}, nil), "", reasonMalformed},
		{"subscription identifier 0", 5, 0x82, bytes.Join([][]byte{{0, 1}, {2, propSubscriptionID, 0}, str("a"), {0}}, nil), "", reasonProtocolError},
		{"subscription identifier twice", 5, 0x82, bytes.Join([][]byte{{0, 1}, {4, propSubscriptionID, 1, propSubscriptionID, 2}, str("a"), {0}}, nil), "", reasonProtocolError},
		{"wrong property", 5, 0x82, bytes.Join([][]byte{{0, 1}, {2, propPayloadFormat, 0}, str("a"), {0}}, nil), "", reasonMalformed},
		{"filter not UTF-8", 4, 0x82, bytes.Join([][]byte{{0, 1}, str("\xff"), {0}}, nil), "", reasonMalformed},
	} {
		id, identifier, filters, err := parseSubscribe(tc.first, tc.body, tc.version)
		if reasonOf(err) != tc.fails || err == nil && fmt.Sprint(id, identifier, filters) != tc.want {
			t.Errorf("%s: got %d %d %v, %v; want %s, failure %#x", tc.name, id, identifier, filters, err, tc.want, tc.fails)
		}
	}
}

func TestParseUnsubscribe(t *testing.T) {
	for _, tc := range []struct {
		name    string
		version byte
		first   byte
		body    []byte
		want    string
		fails   byte
	}{
		{"two filters", 4, 0xA2, bytes.Join([][]byte{{0, 1}, str("a"), str("b")}, nil), "1 [a b]", 0},
		{"v5", 5, 0xA2, bytes.Join([][]byte{{0, 1}, props5([]byte{propUser}, str("k"), str("v")), str("a")}, nil), "1 [a]", 0},
		{"flags", 4, 0xA0, bytes.Join([][]byte{{0, 1}, str("a")}, nil), "", reasonMalformed},
		{"identifier 0", 4, 0xA2, bytes.Join([][]byte{{0, 0}, str("a")}, nil), "", reasonProtocolError},
		{"no filter", 5, 0xA2, []byte{0, 1, 0}, "", reasonProtocolError},
		{"wrong property", 5, 0xA2, bytes.Join([][]byte{{0, 1}, {2, propSubscriptionID, 1}, str("a")}, nil), "", reasonMalformed},
		{"cut short", 4, 0xA2, []byte{0, 1, 0, 9, 'a'}, "", reasonMalformed},
	} {
		id, filters, err := parseUnsubscribe(tc.first, tc.body, tc.version)
		if reasonOf(err) != tc.fails || err == nil && fmt.Sprint(id, filters) != tc.want {
			t.Errorf("%s: got %d %v, %v; want %s, failure %#x", tc.name, id, filters, err, tc.want, tc.fails)
		}
	}
}

func TestParseDisconnect(t *testing.T) {
	for _, tc := range []struct {
		name    string
		version byte
		body    []byte
		want    disconnectFrame
		fails   byte
	}{
		{"v4", 4, nil, disconnectFrame{}, 0},
		{"v4 with a body", 4, []byte{0}, disconnectFrame{}, reasonMalformed},
		{"v5, empty", 5, nil, disconnectFrame{}, 0},
		{"v5, reason alone", 5, []byte{4}, disconnectFrame{reason: 4}, 0},
		{"v5, expiry", 5, append([]byte{0}, props5([]byte{propSessionExpiry, 0, 0, 1, 0}, []byte{propReasonString}, str("x"))...), disconnectFrame{expiry: 256, hasExpiry: true}, 0},
		{"v5, expiry twice", 5, append([]byte{0}, props5([]byte{propSessionExpiry, 0, 0, 1, 0, propSessionExpiry, 0, 0, 1, 0})...), disconnectFrame{}, reasonProtocolError},
		{"v5, wrong property", 5, []byte{0, 2, 1, 1}, disconnectFrame{}, reasonMalformed},
		{"v5, cut short", 5, []byte{0, 5, 17}, disconnectFrame{}, reasonMalformed},
		{"v5, a byte behind", 5, []byte{0, 0, 0}, disconnectFrame{}, reasonMalformed},
	} {
		got, err := parseDisconnect(tc.body, tc.version)
		if reasonOf(err) != tc.fails || err == nil && got != tc.want {
			t.Errorf("%s: got %+v, %v; want %+v, failure %#x", tc.name, got, err, tc.want, tc.fails)
		}
	}
}

func TestParseConnect(t *testing.T) {
	hello := func(version, flags byte, rest ...[]byte) []byte {
		return bytes.Join(append([][]byte{str("MQTT"), {version, flags, 0, 0}}, rest...), nil)
	}
	user := append([]byte{propUser}, append(str("k"), str("v")...)...)
	for _, tc := range []struct {
		name string
		body []byte
		want byte
	}{
		{"v4", hello(4, 2, str("c")), 0},
		{"v5", hello(5, 2, []byte{0}, str("c")), 0},
		{"all of them", hello(5, 6, props5([]byte{17, 0, 0, 0, 1, 33, 0, 1, 39, 0, 0, 0, 1, 34, 0, 0, 25, 1, 23, 0}, user, user), str("c"), props5([]byte{24, 0, 0, 0, 1, 1, 1, 2, 0, 0, 0, 1, 3}, str("t"), []byte{8}, str("r"), []byte{9}, str("\xff"), user), str("w"), str("")), 0},
		{"expiry twice", hello(5, 2, props5([]byte{17, 0, 0, 0, 1, 17, 0, 0, 0, 1}), str("c")), reasonProtocolError},
		{"receive maximum 0", hello(5, 2, props5([]byte{33, 0, 0}), str("c")), reasonProtocolError},
		{"maximum packet size 0", hello(5, 2, props5([]byte{39, 0, 0, 0, 0}), str("c")), reasonProtocolError},
		{"request problem information 2", hello(5, 2, props5([]byte{23, 2}), str("c")), reasonProtocolError},
		{"request response information 2", hello(5, 2, props5([]byte{25, 2}), str("c")), reasonProtocolError},
		{"will, payload format 2", hello(5, 6, []byte{0}, str("c"), props5([]byte{1, 2}), str("w"), str("")), reasonProtocolError},
		{"will, delay twice", hello(5, 6, []byte{0}, str("c"), props5([]byte{24, 0, 0, 0, 1, 24, 0, 0, 0, 1}), str("w"), str("")), reasonProtocolError},
		{"will, response topic with a wildcard", hello(5, 6, []byte{0}, str("c"), props5([]byte{8}, str("r/+")), str("w"), str("")), reasonProtocolError},
		{"cut short", hello(5, 2, []byte{9, 17}), reasonMalformed},
		{"empty", nil, 1},
		{"other protocol", append(str("HTTP"), 4, 2, 0, 0, 0, 1, 'c'), 1},
		{"level 6", hello(6, 2, str("c")), reasonUnsupportedVersion},
		{"reserved flag", hello(4, 3, str("c")), reasonMalformed},
		{"will QoS without a will", hello(4, 0x0A, str("c")), reasonMalformed},
		{"will retain without a will", hello(4, 0x22, str("c")), reasonMalformed},
		{"will QoS 3", hello(4, 0x1E, str("c"), str("w"), str("")), reasonMalformed},
		{"password without a user name, v4", hello(4, 0x42, str("c"), str("p")), reasonMalformed},
		{"password without a user name, v5", hello(5, 0x42, []byte{0}, str("c"), str("p")), 0},
		{"client identifier not UTF-8", hello(4, 2, str("\xff")), reasonMalformed},
		{"no client identifier, persistent", hello(4, 0, str("")), reasonClientIDInvalid},
		{"no client identifier, v5", hello(5, 0, []byte{0}, str("")), 0},
		{"bytes behind", hello(4, 2, str("c"), []byte{0}), reasonMalformed},
		{"authentication method", hello(5, 2, props5([]byte{21}, str("m")), str("c")), reasonBadAuthMethod},
		{"authentication data alone", hello(5, 2, props5([]byte{22}, str("d")), str("c")), reasonProtocolError},
		{"property of a PUBLISH", hello(5, 2, props5([]byte{35, 0, 1}), str("c")), reasonMalformed},
		{"property 200", hello(5, 2, props5([]byte{200}), str("c")), reasonMalformed},
		{"will property in CONNECT", hello(5, 6, props5([]byte{24, 0, 0, 0, 1}), str("c"), []byte{0}, str("w"), str("")), reasonMalformed},
	} {
		_, err := parseConnect(tc.body)
		got := reasonOf(err)
		if err == errNotMQTT {
			got = 1
		}
		if got != tc.want {
			t.Errorf("%s: got %#x (%v), want %#x", tc.name, got, err, tc.want)
		}
	}
	// Cut short anywhere, it is malformed; and what it says is read.
	will := props5([]byte{24, 0, 0, 0, 7, 2, 0, 0, 0, 9, 3}, str("t"))
	whole := hello(5, 0xEE, props5([]byte{17, 0, 0, 0, 8, 33, 0, 5, 39, 0, 0, 1, 0, 34, 0, 6, 25, 1, 23, 0}), str("c"), will, str("w"), str("gone"), str("u"), str("p"))
	for n := 10; n < len(whole); n++ { // before that it may be no MQTT at all
		if _, err := parseConnect(whole[:n]); reasonOf(err) != reasonMalformed {
			t.Errorf("cut after %d bytes: got %v, want it malformed", n, err)
		}
	}
	f, err := parseConnect(whole)
	want := connectFrame{
		version: 5, cleanStart: true, clientID: "c", username: "u", password: []byte("p"), hasUsername: true, willDelay: 7,
		expiry: 8, receiveMax: 5, maxPacket: 256, aliasMax: 6, wantResponse: true, noProblems: true,
		will: &storage.Message{Topic: "w", Payload: []byte("gone"), Properties: append([]byte{3}, str("t")...), QoS: 1, Retain: true, Expires: 9001},
	}
	if err != nil || !reflect.DeepEqual(*f, want) {
		t.Errorf("got %+v, will %+v, %v; want %+v, will %+v", f, f.will, err, want, want.will)
	}
	// MQTT 3.1, 3.1.3: the flag may be set and the field missing.
	f, err = parseConnect(append(str("MQIsdp"), 3, 0xC2, 0, 0, 0, 1, 'c'))
	if err != nil || f.hasUsername {
		t.Errorf("MQTT 3.1 without the announced user name: got %+v, %v; want no user name", f, err)
	}
}

func TestAppend(t *testing.T) {
	m := &storage.Message{Topic: "a", Payload: []byte("p"), Properties: []byte{propPayloadFormat, 1}}
	for _, tc := range []struct {
		name string
		got  []byte
		want []byte
	}{
		{"PUBLISH v4", appendPublish(nil, m, 4, 0, false, false, 0, 9, 0, false, []uint32{1}), []byte{0x30, 4, 0, 1, 'a', 'p'}},
		{"PUBLISH v3, all flags", appendPublish(nil, m, 3, 2, true, true, 258, 0, 0, false, nil), []byte{0x3D, 6, 0, 1, 'a', 1, 2, 'p'}},
		{"PUBLISH v5", appendPublish(nil, m, 5, 1, false, false, 3, 9, 0, false, []uint32{1, 128}), []byte{0x32, 19, 0, 1, 'a', 0, 3, 12, 2, 0, 0, 0, 9, 1, 1, 11, 1, 11, 0x80, 1, 'p'}},
		{"PUBACK", appendAck(nil, typePuback, 5, 258, 0, ""), []byte{0x40, 2, 1, 2}},
		{"PUBACK with a reason", appendAck(nil, typePuback, 5, 1, 0x87, ""), []byte{0x40, 3, 0, 1, 0x87}},
		{"PUBACK v4 with a reason", appendAck(nil, typePuback, 4, 1, 0x87, ""), []byte{0x40, 2, 0, 1}},
		{"PUBREL", appendAck(nil, typePubrel, 4, 1, 0, ""), []byte{0x62, 2, 0, 1}},
		{"SUBACK v4", appendSuback(nil, typeSuback, 4, 1, []byte{0, 0x80}, ""), []byte{0x90, 4, 0, 1, 0, 0x80}},
		{"SUBACK v5", appendSuback(nil, typeSuback, 5, 1, []byte{2, 0x8F}, ""), []byte{0x90, 5, 0, 1, 0, 2, 0x8F}},
		{"UNSUBACK v4", appendSuback(nil, typeUnsuback, 4, 1, []byte{0}, ""), []byte{0xB0, 2, 0, 1}},
		{"UNSUBACK v5", appendSuback(nil, typeUnsuback, 5, 1, []byte{0, 0x11}, ""), []byte{0xB0, 5, 0, 1, 0, 0, 0x11}},
		{"PUBLISH with a new alias", appendPublish(nil, m, 5, 0, false, false, 0, 0, 7, false, nil), []byte{0x30, 10, 0, 1, 'a', 5, 35, 0, 7, 1, 1, 'p'}},
		{"PUBLISH with a known alias", appendPublish(nil, m, 5, 0, false, false, 0, 0, 7, true, nil), []byte{0x30, 9, 0, 0, 5, 35, 0, 7, 1, 1, 'p'}},
		{"PUBACK with a reason string", appendAck(nil, typePuback, 5, 1, 0x87, "no"), []byte{0x40, 9, 0, 1, 0x87, 5, 31, 0, 2, 'n', 'o'}},
		{"SUBACK with a reason string", appendSuback(nil, typeSuback, 5, 1, []byte{0x87}, "no"), []byte{0x90, 9, 0, 1, 5, 31, 0, 2, 'n', 'o', 0x87}},
		{"DISCONNECT with a reason string", appendDisconnect(nil, 0x8E, "no"), []byte{0xE0, 7, 0x8E, 5, 31, 0, 2, 'n', 'o'}},
		{"CONNACK v3", appendConnack(nil, 3, true, 0, nil), []byte{0x20, 2, 0, 0}},
		{"CONNACK v4", appendConnack(nil, 4, true, 0, nil), []byte{0x20, 2, 1, 0}},
		{"CONNACK v5", appendConnack(nil, 5, false, 0x87, []byte{36, 1}), []byte{0x20, 5, 0, 0x87, 2, 36, 1}},
		{"DISCONNECT", appendDisconnect(nil, 0x8E, ""), []byte{0xE0, 1, 0x8E}},
	} {
		if !bytes.Equal(tc.got, tc.want) {
			t.Errorf("%s: got % x, want % x", tc.name, tc.got, tc.want)
		}
	}
}

// No bytes whatever make a parser panic, and a PUBLISH that is read and
// written again is the same.
func FuzzFrame(f *testing.F) {
	for _, version := range []byte{3, 4, 5} {
		for _, p := range everyPacket(version) {
			f.Add(p, version)
			f.Add(p[:len(p)-1], version)
		}
	}
	f.Add(packet(0x3D, str("a"), u16(9), props5([]byte{2, 0, 0, 0, 9, 35, 0, 1, 1, 1, 8}, str("r"), []byte{9}, str("c"), []byte{3}, str("t")), []byte("pay")), byte(5))
	f.Add(packet(0x30, str("\xff")), byte(4))
	f.Add([]byte{0x30, 0xFF, 0xFF, 0xFF, 0xFF}, byte(5))
	f.Add(packet(0x82, u16(1), props5([]byte{11, 0x80, 1}), str(strings.Repeat("/", 300)), []byte{0x2E}), byte(5))
	f.Fuzz(func(t *testing.T, in []byte, version byte) {
		version = 3 + version%3
		size, header, err := frameSize(in)
		if err != nil {
			return
		}
		if header < 2 || header > 5 || size < header || size-header > maxVarint {
			t.Fatalf("% x: size %d, header %d", in, size, header)
		}
		first, body := in[0], in[header:min(size, len(in))]
		_, _, _ = parseAck(first, body, version)
		_, _ = parseDisconnect(body, version)
		_, _ = parseConnect(body)
		if id, _, filters, err := parseSubscribe(first, body, version); err == nil && (id == 0 || len(filters) == 0) {
			t.Errorf("% x: SUBSCRIBE with identifier %d and %d filters", in, id, len(filters))
		}
		if id, filters, err := parseUnsubscribe(first, body, version); err == nil && (id == 0 || len(filters) == 0) {
			t.Errorf("% x: UNSUBSCRIBE with identifier %d and %d filters", in, id, len(filters))
		}
		var scratch, scratch2 []byte
		first = typePublish<<4 | first&0x0F
		p, err := parsePublish(first, body, version, &scratch)
		if err != nil {
			return
		}
		if p.hasExpiry && p.expiry == 0 { // not written again: it is over
			return
		}
		m := &storage.Message{Topic: string(p.topic), Payload: p.payload, Properties: p.properties}
		out := appendPublish(nil, m, version, p.qos, p.dup, p.retain, p.packetID, p.expiry, 0, false, nil)
		size, header, err = frameSize(out)
		if err != nil || size != len(out) || out[0] != first {
			t.Fatalf("% x: written as % x: size %d of %d, %v", in, out, size, len(out), err)
		}
		q, err := parsePublish(out[0], out[header:], version, &scratch2)
		if err != nil {
			t.Fatalf("% x: written as % x: %v", in, out, err)
		}
		q.alias = p.alias // an alias is resolved, not passed on
		if string(q.topic) != string(p.topic) || !bytes.Equal(q.payload, p.payload) || !bytes.Equal(q.properties, p.properties) ||
			q.expiry != p.expiry || q.hasExpiry != p.hasExpiry || q.packetID != p.packetID || q.qos != p.qos || q.dup != p.dup || q.retain != p.retain {
			t.Errorf("% x: got %+v, then %+v", in, p, q)
		}
	})
}
