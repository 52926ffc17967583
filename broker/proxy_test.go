package broker

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"penstock/internal/units"
	"penstock/storage"
)

// proxyHeader makes a header of version 2.
func proxyHeader(command, family byte, body []byte) []byte {
	b := append(bytes.Clone(proxyV2), 0x20|command, family)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(body))), body...)
}

// v2 makes a header of version 2 for a client.
func v2(t testing.TB, client string) []byte {
	ap := netip.MustParseAddrPort(client)
	family, other := byte(0x11), []byte{192, 0, 2, 1}
	if ap.Addr().Is6() {
		family, other = 0x21, make([]byte, 16)
	}
	body := append(ap.Addr().AsSlice(), other...)
	body = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(body, ap.Port()), 1883)
	return proxyHeader(1, family, body)
}

func TestParseProxy(t *testing.T) {
	v4 := []byte{198, 51, 100, 7, 192, 0, 2, 1, 0x12, 0x34, 0, 80}
	v6 := append(append(append([]byte{}, netip.MustParseAddr("2001:db8::7").AsSlice()...), make([]byte, 16)...), 0x12, 0x34, 0, 80)
	long := "PROXY TCP6 " + strings.Repeat("f", 100)
	for _, tt := range []struct {
		name, wire string
		client     string // "" if it is not known
		own, bad   bool
	}{
		{"v1", "PROXY TCP4 198.51.100.7 192.0.2.1 4660 80\r\n", "198.51.100.7:4660", false, false},
		{"v1, IPv6", "PROXY TCP6 2001:db8::7 ::1 4660 80\r\n", "[2001:db8::7]:4660", false, false},
		{"v1, mapped", "PROXY TCP6 ::ffff:198.51.100.7 ::1 4660 80\r\n", "198.51.100.7:4660", false, false},
		{"v1, unknown", "PROXY UNKNOWN\r\n", "", false, false},
		{"v1, unknown, with text", "PROXY UNKNOWN ffff::1 ::1 1 2\r\n", "", false, false},
		{"v1, the longest", "PROXY UNKNOWN " + strings.Repeat("f", maxProxyV1-16) + "\r\n", "", false, false},
		{"v1, longer", "PROXY UNKNOWN " + strings.Repeat("f", maxProxyV1-15) + "\r\n", "", false, true},
		{"v1, no end", long, "", false, true},
		{"v1, address of the other family", "PROXY TCP6 198.51.100.7 192.0.2.1 4660 80\r\n", "", false, true},
		{"v1, zone", "PROXY TCP6 fe80::1%eth0 ::1 4660 80\r\n", "", false, true},
		{"v1, two spaces", "PROXY TCP4  198.51.100.7 192.0.2.1 4660 80\r\n", "", false, true},
		{"v1, a port above 65535", "PROXY TCP4 198.51.100.7 192.0.2.1 65536 80\r\n", "", false, true},
		{"v1, a port with a zero ahead", "PROXY TCP4 198.51.100.7 192.0.2.1 080 80\r\n", "", false, true},
		{"v1, too few", "PROXY TCP4 198.51.100.7 192.0.2.1 80\r\n", "", false, true},
		{"v1, UDP", "PROXY UDP4 198.51.100.7 192.0.2.1 4660 80\r\n", "", false, true},
		{"v1, in small letters", "proxy TCP4 198.51.100.7 192.0.2.1 4660 80\r\n", "", false, true},
		{"v1, LF alone", "PROXY TCP4 198.51.100.7 192.0.2.1 4660 80\n", "", false, true},
		{"v2", string(proxyHeader(1, 0x11, v4)), "198.51.100.7:4660", false, false},
		{"v2, IPv6", string(proxyHeader(1, 0x21, v6)), "[2001:db8::7]:4660", false, false},
		{"v2, with extensions", string(proxyHeader(1, 0x11, append(bytes.Clone(v4), 4, 0, 1, 0))), "198.51.100.7:4660", false, false},
		{"v2, unix", string(proxyHeader(1, 0x31, make([]byte, 216))), "", false, false},
		{"v2, unspecified", string(proxyHeader(1, 0x00, nil)), "", false, false},
		{"v2, LOCAL", string(proxyHeader(0, 0x00, nil)), "", true, false},
		{"v2, LOCAL with an address", string(proxyHeader(0, 0x11, v4)), "", true, false},
		{"v2, another command", string(proxyHeader(2, 0x11, v4)), "", false, true},
		{"v2, short", string(proxyHeader(1, 0x11, v4[:11])), "", false, true},
		{"v2, IPv6, short", string(proxyHeader(1, 0x21, v4)), "", false, true},
		{"v2, unix, short", string(proxyHeader(1, 0x31, v6)), "", false, true},
		{"v2, UDP", string(proxyHeader(1, 0x12, v4)), "", false, true},
		{"v2, too long", string(proxyHeader(1, 0x11, make([]byte, maxProxyV2+1))), "", false, true},
		{"version 3", string(proxyV2) + "\x31\x11\x00\x0c" + string(v4), "", false, true},
		{"MQTT", "\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00", "", false, true},
		{"nothing", "", "", false, true},
		{"cut", "PROXY TCP4 198.51", "", false, true},
		{"v2, cut", string(proxyHeader(1, 0x11, v4))[:20], "", false, true},
	} {
		const behind = "behind it"
		r := strings.NewReader(tt.wire + behind)
		if tt.bad {
			r = strings.NewReader(tt.wire)
		}
		client, own, err := parseProxy(r)
		got := ""
		if client.IsValid() {
			got = client.String()
		}
		if (err != nil) != tt.bad || got != tt.client || own != tt.own {
			t.Errorf("%s: got %q, own %v, %v; want %q, %v, error %v", tt.name, got, own, err, tt.client, tt.own, tt.bad)
		}
		if rest, _ := io.ReadAll(r); !tt.bad && string(rest) != behind {
			t.Errorf("%s: %q is left, want %q", tt.name, rest, behind)
		}
	}
}

// FuzzProxyHeader: a header is read without what is behind it, within its
// bounds, and means the same whatever is behind it.
func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte("PROXY TCP4 198.51.100.7 192.0.2.1 4660 80\r\nrest"))
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Add(v2(f, "198.51.100.7:4660"))
	f.Add(v2(f, "[2001:db8::7]:4660"))
	f.Add(proxyHeader(0, 0, nil))
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := bytes.NewReader(wire)
		client, own, err := parseProxy(r)
		if err != nil {
			if client.IsValid() || own {
				t.Errorf("%v, and all the same client %v, own %v", err, client, own)
			}
			return
		}
		n := len(wire) - r.Len()
		if n > len(proxyV2)+4+maxProxyV2 || !bytes.HasPrefix(wire, proxyV2) && n > maxProxyV1 {
			t.Errorf("%d bytes were read", n)
		}
		if own && client.IsValid() {
			t.Errorf("the proxy's own, and from %v", client)
		}
		again, ownAgain, err := parseProxy(bytes.NewReader(wire[:n]))
		if again != client || ownAgain != own || err != nil {
			t.Errorf("without what is behind it: %v, %v, %v; want %v, %v", again, ownAgain, err, client, own)
		}
		if client.IsValid() {
			same, _, err := parseProxy(bytes.NewReader(v2(t, client.String())))
			if same != client || err != nil {
				t.Errorf("%v written anew is %v, %v", client, same, err)
			}
		}
	})
}

// dialProxy connects as a proxy does.
func (s *server) dialProxy(listener int, header []byte) *client {
	s.t.Helper()
	c, err := net.Dial("tcp", s.b.Listeners()[listener].Addr.String())
	if err != nil {
		s.t.Fatal(err)
	}
	cl := s.on(c)
	cl.send(header)
	return cl
}

// The client's address is the one in the header: in the list of clients, and
// for who may connect without a user name.
func TestProxyProtocol(t *testing.T) {
	s := start(t, t.TempDir(), withListeners(
		ListenerConfig{ProxyProtocol: true, ProxyFrom: []string{"127.0.0.0/8"}, ConnectTimeout: units.Duration(time.Second)},
		ListenerConfig{ProxyProtocol: true, ProxyFrom: []string{"192.0.2.0/24"}},
		ListenerConfig{ProxyProtocol: true, ProxyFrom: []string{"127.0.0.1"}, Anonymous: "all", Protocol: "websocket"},
	))
	for _, tt := range []struct {
		name    string
		header  []byte
		code    byte
		address string
	}{
		{"v1, this machine", []byte("PROXY TCP4 127.9.9.9 127.0.0.1 4660 80\r\n"), 0, "127.9.9.9:4660"},
		{"v2, this machine", v2(t, "[::1]:4660"), 0, "[::1]:4660"},
		{"v1, elsewhere", []byte("PROXY TCP4 198.51.100.7 127.0.0.1 4660 80\r\n"), 5, ""},
		{"v2, elsewhere", v2(t, "198.51.100.7:4660"), 5, ""},
		{"unknown", []byte("PROXY UNKNOWN\r\n"), 5, ""},
		{"the proxy itself", proxyHeader(0, 0, nil), 0, "127.0.0.1:"},
	} {
		c := s.dialProxy(0, tt.header)
		if code := c.hello(connectOptions{id: "c", version: 4, clean: true}); code != tt.code {
			t.Errorf("%s: code %d, want %d", tt.name, code, tt.code)
		}
		if tt.code == 0 {
			eventually(t, tt.name+": a client from "+tt.address, func() bool {
				list := s.b.Clients()
				return len(list) == 1 && strings.HasPrefix(list[0].Address, tt.address)
			})
			c.disconnect()
		}
		eventually(t, "it is gone", func() bool { return len(s.b.connections()) == 0 })
	}
	// Bad and missing headers, and peers that may not send one.
	for i, header := range [][]byte{[]byte("PROXY TCP4 nonsense\r\n"), connectPacket(connectOptions{id: "a client without a proxy", version: 4})} {
		s.dialProxy(0, header).expectEnd()
		eventually(t, "it is counted", func() bool { return s.limited("proxy-header") == uint64(i+1) })
	}
	s.dialProxy(0, []byte("PROXY TC")).expectEnd() // and nothing more
	eventually(t, "it is counted", func() bool { return s.limited("connect-timeout") == 1 })
	s.dialProxy(1, nil).expectEnd()
	eventually(t, "it is counted", func() bool { return s.limited("proxy-header") == 3 })
	// WebSocket behind it.
	sock, err := dialWeb(s.b.Listeners()[2].Addr, func(a net.Addr) (net.Conn, error) {
		c, err := net.Dial("tcp", a.String())
		if err == nil {
			_, err = c.Write(v2(t, "198.51.100.7:4660"))
		}
		return c, err
	}, "", "mqtt")
	if err != nil {
		t.Fatal(err)
	}
	if code := s.on(sock).hello(connectOptions{id: "c", version: 4, clean: true}); code != 0 {
		t.Errorf("over WebSocket: code %d", code)
	}
	eventually(t, "it has its address", func() bool {
		list := s.b.Clients()
		return len(list) == 1 && list[0].Address == "198.51.100.7:4660"
	})
}

// Whom the proxy does not know has no address, not even the proxy's.
func TestProxyUnknownHasNoAddress(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	go func() { _, _ = client.Write([]byte("PROXY UNKNOWN\r\n")) }() // readProxy says if it did not arrive
	c, addr, err := newListener(&Broker{cfg: DefaultConfig()}, ListenerConfig{}).readProxy(server)
	if err != nil || addr.IsValid() || c.RemoteAddr().String() != "unknown" {
		t.Errorf("address %v, %v, %v", c.RemoteAddr(), addr, err)
	}
}

// So many connections from one address, as the proxy says it, and one more is
// told.
func TestConnectionsPerAddress(t *testing.T) {
	proxy := ListenerConfig{ProxyProtocol: true, ProxyFrom: []string{"127.0.0.1"}, Anonymous: "all"}
	own := proxy
	own.MaxConnectionsPerAddress = 3
	s := start(t, t.TempDir(), func(c *Config, sc *storage.Config) {
		withListeners(proxy, proxy, own, ListenerConfig{})(c, sc)
		c.MaxConnectionsPerAddress = 2
	})
	// Each with a client identifier of its own, or they would take over.
	ids := 0
	connect := func(listener int, address string, version, want byte) *client {
		t.Helper()
		ids++
		c := s.dialProxy(listener, v2(t, address+":1"))
		if code := c.hello(connectOptions{id: strings.Repeat("x", ids), version: version, clean: true}); code != want {
			t.Errorf("listener %d, %s, version %d: code %#x, want %#x", listener, address, version, code, want)
		}
		return c
	}
	first := connect(0, "198.51.100.7", 4, 0)
	connect(1, "198.51.100.7", 5, 0)
	connect(0, "198.51.100.7", 5, reasonQuota).expectEnd()
	connect(1, "198.51.100.7", 4, 3).expectEnd()
	connect(1, "198.51.100.7", 3, 3).expectEnd()
	connect(0, "198.51.100.8", 4, 0)
	for range 3 {
		connect(2, "198.51.100.7", 4, 0) // counts by itself
	}
	connect(2, "198.51.100.7", 5, reasonQuota).expectEnd()
	for range 4 { // this machine is not counted
		ids++
		c, err := net.Dial("tcp", s.b.Listeners()[3].Addr.String())
		if err != nil {
			t.Fatal(err)
		}
		if code := s.on(c).hello(connectOptions{id: strings.Repeat("x", ids), version: 4, clean: true}); code != 0 {
			t.Errorf("this machine: code %d", code)
		}
	}
	if got := s.limited("connections-per-address"); got != 4 {
		t.Errorf("%d counted, want 4", got)
	}
	first.disconnect()
	eventually(t, "there is room again", func() bool {
		ids++
		c := s.dialProxy(0, v2(t, "198.51.100.7:1"))
		return c.hello(connectOptions{id: strings.Repeat("x", ids), version: 4, clean: true}) == 0
	})
}
