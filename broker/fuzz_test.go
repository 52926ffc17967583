package broker

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"penstock/internal/units"
	"penstock/storage"
)

// propertyKind is how a property's value is written (2.2.2.2).
type propertyKind byte

const (
	kindByte propertyKind = iota
	kindTwo
	kindFour
	kindVarint
	kindText
	kindTopic
	kindBinary
	kindPair
)

// propertyTable is table 2-4 of MQTT 5, as far as clients send it: what each
// packet may carry. It is written down apart from the parsers, for comparison.
var propertyTable = map[byte]struct {
	kind      propertyKind
	packets   string // names of the packets, with a space before each
	low, high uint64 // of a number
	many      bool
}{
	1:  {kindByte, " PUBLISH will", 0, 1, false},
	2:  {kindFour, " PUBLISH will", 0, 1<<32 - 1, false},
	3:  {kindText, " PUBLISH will", 0, 0, false},
	8:  {kindTopic, " PUBLISH will", 0, 0, false},
	9:  {kindBinary, " PUBLISH will", 0, 0, false},
	11: {kindVarint, " SUBSCRIBE", 1, 1<<28 - 1, false},
	17: {kindFour, " CONNECT DISCONNECT", 0, 1<<32 - 1, false},
	// 21 and 22 ask for enhanced authentication, which is refused.
	23: {kindByte, " CONNECT", 0, 1, false},
	24: {kindFour, " will", 0, 1<<32 - 1, false},
	25: {kindByte, " CONNECT", 0, 1, false},
	28: {kindText, " DISCONNECT", 0, 0, false},
	31: {kindText, " PUBACK DISCONNECT", 0, 0, false},
	33: {kindTwo, " CONNECT", 1, 1<<16 - 1, false},
	34: {kindTwo, " CONNECT", 0, 1<<16 - 1, false},
	35: {kindTwo, " PUBLISH", 1, 1<<16 - 1, false},
	38: {kindPair, " CONNECT will PUBLISH PUBACK SUBSCRIBE UNSUBSCRIBE DISCONNECT", 0, 0, true},
	39: {kindFour, " CONNECT", 1, 1<<32 - 1, false},
}

// naiveProperties reports whether p may be the properties of a packet.
func naiveProperties(packet string, p []byte) bool {
	seen := map[byte]int{}
	in := bytes.NewReader(p)
	text := func() (string, bool) {
		var n uint16
		if binary.Read(in, binary.BigEndian, &n) != nil || int(n) > in.Len() {
			return "", false
		}
		b := make([]byte, n)
		_, err := io.ReadFull(in, b)
		return string(b), err == nil
	}
	good := func(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\x00") }
	for in.Len() > 0 {
		id, _ := in.ReadByte()
		spec, known := propertyTable[id]
		seen[id]++
		if !known || !strings.Contains(spec.packets, " "+packet) || seen[id] > 1 && !spec.many {
			return false
		}
		var v uint64
		size := map[propertyKind]int{kindByte: 1, kindTwo: 2, kindFour: 4}[spec.kind]
		switch {
		case size > 0:
			for range size {
				b, err := in.ReadByte()
				if err != nil {
					return false
				}
				v = v<<8 | uint64(b)
			}
		case spec.kind == kindVarint:
			for i := 0; ; i++ {
				b, err := in.ReadByte()
				if err != nil || i == 4 {
					return false
				}
				v |= uint64(b&0x7F) << (7 * i)
				if b < 0x80 {
					if b == 0 && i > 0 {
						return false // longer than it must be [MQTT-1.5.5-1]
					}
					break
				}
			}
		default:
			s, ok := text()
			if !ok || spec.kind != kindBinary && !good(s) || spec.kind == kindTopic && !naiveValid(s, 0, 0, false) {
				return false
			}
			if spec.kind == kindPair {
				if s, ok = text(); !ok || !good(s) {
					return false
				}
			}
			continue
		}
		if v < spec.low || v > spec.high {
			return false
		}
	}
	return true
}

// Every parser takes the properties that table 2-4 allows its packet, and no
// others.
func FuzzProperties(f *testing.F) {
	user := append([]byte{propUser}, append(str("k"), str("v")...)...)
	for _, p := range [][]byte{
		nil, user, append(user, user...), {propPayloadFormat, 1}, {propPayloadFormat, 2}, {propMessageExpiry, 0, 0, 0, 9},
		append([]byte{propResponseTopic}, str("a/b")...), append([]byte{propResponseTopic}, str("a/+")...),
		append([]byte{propCorrelationData}, str("\xff")...), append([]byte{propContentType}, str("\xff")...),
		{propSubscriptionID, 0x80, 1}, {propSubscriptionID, 0}, {propSubscriptionID, 1, propSubscriptionID, 1},
		{propSessionExpiry, 0, 0, 1, 0}, {propTopicAlias, 0, 1}, {propTopicAlias, 0, 0}, {propTopicAlias, 0, 1, propTopicAlias, 0, 1},
		append([]byte{propReasonString}, str("r")...), append([]byte{propServerReference}, str("s")...), {0x80, 1}, {propUser, 0, 1},
		{propReceiveMaximum, 0, 1}, {propReceiveMaximum, 0, 0}, {propMaximumPacket, 0, 0, 0, 0}, {propTopicAliasMaximum, 0, 9},
		{propRequestProblem, 1}, {propRequestResponse, 2}, {propWillDelay, 0, 0, 0, 1}, {propAuthMethod, 0, 1, 'm'},
		bytes.Join([][]byte{{propReasonString}, str("r"), {propReasonString}, str("r")}, nil),
	} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > maxVarint {
			return
		}
		all := append(appendVarint(nil, len(p)), p...)
		var scratch []byte
		for name, parse := range map[string]func() error{
			"CONNECT": func() error {
				_, err := parseConnect(bytes.Join([][]byte{str("MQTT"), {5, 2, 0, 0}, all, str("c")}, nil))
				return err
			},
			"will": func() error {
				_, err := parseConnect(bytes.Join([][]byte{str("MQTT"), {5, 6, 0, 0}, {0}, str("c"), all, str("w"), str("")}, nil))
				return err
			},
			"PUBLISH": func() error {
				_, err := parsePublish(typePublish<<4, bytes.Join([][]byte{str("a"), all, []byte("payload")}, nil), 5, &scratch)
				return err
			},
			"PUBACK": func() error {
				_, _, err := parseAck(typePuback<<4, bytes.Join([][]byte{u16(1), {0}, all}, nil), 5)
				return err
			},
			"SUBSCRIBE": func() error {
				_, _, _, err := parseSubscribe(typeSubscribe<<4|2, bytes.Join([][]byte{u16(1), all, str("a"), {0}}, nil), 5)
				return err
			},
			"UNSUBSCRIBE": func() error {
				_, _, err := parseUnsubscribe(typeUnsubscribe<<4|2, bytes.Join([][]byte{u16(1), all, str("a")}, nil), 5)
				return err
			},
			"DISCONNECT": func() error {
				_, err := parseDisconnect(append([]byte{0}, all...), 5)
				return err
			},
		} {
			if err, want := parse(), naiveProperties(name, p); (err == nil) != want {
				t.Errorf("%s with properties % x: got %v, want allowed: %v", name, p, err, want)
			}
		}
	})
}

// covers is right for every topic name, and never says of a filter what is
// wrong for a topic that it matches: else a rule would allow too much.
func FuzzCovers(f *testing.F) {
	for _, c := range matchCases {
		f.Add(c.filter, c.topic)
		f.Add(c.filter, c.filter)
	}
	f.Add("a/+", "a/#")
	f.Add("#", "+/#")
	f.Add("+/#", "#")
	f.Fuzz(func(t *testing.T, rule, name string) {
		if !validFilter(rule, 0, 0) || !validFilter(name, 0, 0) {
			return
		}
		got := covers(rule, name)
		if validTopic(name, 0, 0) {
			if want := naiveMatch(rule, name); got != want {
				t.Errorf("covers(%q, topic %q) = %v, want %v", rule, name, got, want)
			}
			return
		}
		if !got {
			// A level that is in no rule stands for all: a rule that matches the
			// topics with it covers the filter, or a denial could be evaded.
			fresh, all := rule+"\u2603", true
			fresh = strings.NewReplacer("/", "", "+", "", "#", "").Replace(fresh)
			for _, tail := range [][]string{nil, {fresh}, {fresh, fresh}} {
				levels := strings.Split(name, "/")
				if last := len(levels) - 1; levels[last] == "#" {
					levels = append(levels[:last], tail...)
				}
				for i, l := range levels {
					if l == "+" {
						levels[i] = fresh
					}
				}
				all = all && (len(levels) == 0 || naiveMatch(rule, strings.Join(levels, "/")))
			}
			if all {
				t.Errorf("covers(%q, filter %q) = false, but every topic is matched", rule, name)
			}
			return
		}
		// Some topics that name matches.
		for _, level := range []string{"", "x", "\U0001F600"} {
			for _, tail := range []string{"", "/", "/x", "/x/y"} {
				levels := strings.Split(name, "/")
				for i, l := range levels {
					if l == "+" {
						levels[i] = level
					}
				}
				topic := strings.Join(levels, "/")
				if base, ok := strings.CutSuffix(topic, "#"); ok {
					topic = strings.TrimSuffix(base, "/") + tail
				}
				if naiveValid(topic, 0, 0, false) && naiveMatch(name, topic) && !naiveMatch(rule, topic) {
					t.Errorf("covers(%q, filter %q), but topic %q is not matched", rule, name, topic)
				}
			}
		}
	})
}

// fuzzBroker is a broker whose clients are in memory.
type fuzzBroker struct {
	b      *Broker
	stop   func() error
	pipes  *pipeListener
	good   net.Conn
	defect defectLog
	served int
}

// defectLog is a log that keeps what says that the broker is wrong.
type defectLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *defectLog) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelError
}
func (l *defectLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *defectLog) WithGroup(string) slog.Handler      { return l }
func (l *defectLog) Handle(ctx context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slog.NewTextHandler(&l.buf, nil).Handle(ctx, r)
}

func (l *defectLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// startFuzz starts a broker on a fresh database.
func startFuzz(dir string) (_ *fuzzBroker, err error) {
	f := &fuzzBroker{}
	log := slog.New(&f.defect)
	cfg, scfg := DefaultConfig(), storage.DefaultConfig()
	cfg.Listeners[0].Address = "127.0.0.1:0"
	cfg.Anonymous = "all"
	cfg.MaxQueueMessages = 100
	cfg.SessionExpiry = units.Duration(time.Second)
	scfg.CommitDelay = 0
	if scfg.Dir, err = os.MkdirTemp(dir, ""); err != nil {
		return nil, err
	}
	db, err := storage.Open(context.Background(), scfg, log)
	if err != nil {
		return nil, err
	}
	if f.b, err = New(cfg, db, log); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	f.pipes = &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	l := newListener(f.b, ListenerConfig{Name: "fuzz"})
	l.ln = f.pipes
	f.b.listeners = append(f.b.listeners, l)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- f.b.Run(ctx) }()
	f.stop = func() error {
		cancel()
		return errors.Join(<-ran, db.Close(), os.RemoveAll(scfg.Dir))
	}
	f.good = f.dial()
	c := connectPacket(connectOptions{id: "good, which nobody guesses", version: 4, clean: true})
	if _, err := f.good.Write(c); err != nil {
		return nil, errors.Join(err, f.stop())
	}
	var connack [4]byte
	if _, err := io.ReadFull(f.good, connack[:]); err != nil || connack[3] != 0 {
		return nil, errors.Join(fmt.Errorf("CONNACK % x: %w", connack, err), f.stop())
	}
	return f, nil
}

func (f *fuzzBroker) dial() net.Conn {
	here, there := net.Pipe()
	f.pipes.conns <- there
	return here
}

// alone waits until the good client's is the only connection.
func (f *fuzzBroker) alone() bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
		f.b.mu.Lock()
		n := len(f.b.conns)
		f.b.mu.Unlock()
		if n == 1 {
			return true
		}
	}
	return false
}

// ping has the good client served.
func (f *fuzzBroker) ping() error {
	if err := f.good.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := f.good.Write([]byte{typePingreq << 4, 0}); err != nil {
		return fmt.Errorf("the good client: %w", err)
	}
	var b [2]byte
	if _, err := io.ReadFull(f.good, b[:]); err != nil || b != [2]byte{typePingresp << 4, 0} {
		return fmt.Errorf("the good client got % x: %w", b, err)
	}
	return nil
}

// checkOutput reports what is wrong with all that the broker has sent to one
// client. The end may be missing.
func checkOutput(out []byte) error {
	flags := map[byte]byte{typeConnack: 0, typePuback: 0, typePubrec: 0, typePubrel: 2, typePubcomp: 0, typeSuback: 0, typeUnsuback: 0, typePingresp: 0, typeDisconnect: 0, typeAuth: 0}
	for first := true; len(out) > 0; first = false {
		size, header, err := frameSize(out)
		if err == errNeedMore || err == nil && size > len(out) {
			return nil
		}
		if err != nil {
			return err
		}
		kind := out[0] >> 4
		want, known := flags[kind]
		switch {
		case kind == typePublish:
			if out[0]>>1&3 == 3 || size-header < 2 {
				return fmt.Errorf("PUBLISH % x", out[:size])
			}
		case !known, out[0]&0x0F != want:
			return fmt.Errorf("packet % x from a server", out[:size])
		case first != (kind == typeConnack):
			return fmt.Errorf("packet % x, first: %v", out[:size], first)
		}
		out = out[size:]
	}
	return nil
}

// Whatever a client sends, and in whatever pieces: no panic, the connection
// ends with the client, what it is sent are packets, and others are served.
// The low bits of how say which CONNECT comes first, the others how long the
// pieces are.
func FuzzConnection(f *testing.F) {
	for i, version := range []byte{3, 4, 5} {
		var all []byte
		for name, p := range everyPacket(version) {
			f.Add(p, byte(i))
			if name == "CONNECT" {
				f.Add(p, byte(3))
			}
			switch name {
			case "PUBLISH 0", "PUBLISH 1", "PUBLISH 2", "SUBSCRIBE", "UNSUBSCRIBE", "PUBREL", "PINGREQ":
				all = append(all, p...)
			}
		}
		f.Add(all, byte(i))
		f.Add(all, byte(i|7<<2))
	}
	f.Add(bytes.Join([][]byte{packet(0x82, u16(1), []byte{0}, str("$share/g/#"), []byte{2}), packet(0x33, str("r"), u16(2), []byte{0}, []byte("x")), packet(0x82, u16(3), []byte{0}, str("#"), []byte{1})}, nil), byte(2))
	f.Add(bytes.Join([][]byte{packet(0x30, str("t"), props5([]byte{propTopicAlias, 0, 1})), packet(0x30, str(""), props5([]byte{propTopicAlias, 0, 1}))}, nil), byte(2))
	f.Add([]byte{0x30, 0xFF, 0xFF, 0xFF, 0x7F}, byte(1))

	dir := f.TempDir()
	var fb *fuzzBroker
	f.Cleanup(func() {
		if fb != nil {
			if err := fb.stop(); err != nil {
				f.Error(err)
			}
		}
	})
	f.Fuzz(func(t *testing.T, in []byte, how byte) {
		if fb != nil && fb.served >= 1000 { // what clients left behind piles up
			if err := fb.stop(); err != nil {
				t.Fatal(err)
			}
			fb = nil
		}
		if fb == nil {
			var err error
			if fb, err = startFuzz(dir); err != nil {
				t.Fatal(err)
			}
		}
		fb.served++
		c := fb.dial()
		var out bytes.Buffer
		read := make(chan struct{})
		go func() { defer close(read); _, _ = io.Copy(&out, c) }()
		if how&3 < 3 {
			hello := connectOptions{id: "fuzz", version: 3 + how&3, clean: how&0x80 != 0}
			if how&0x40 != 0 {
				hello.expiry = 1
			}
			in = append(connectPacket(hello), in...)
		}
		piece := len(in) + 1
		if how>>2&7 > 0 {
			piece = 1 << (how >> 2 & 7)
		}
		_ = c.SetWriteDeadline(time.Now().Add(patience)) // fails on Write
		for len(in) > 0 {
			n, err := c.Write(in[:min(piece, len(in))])
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("the broker does not read on\n%s", stacks())
			}
			if err != nil {
				break // it was cut off
			}
			in = in[n:]
		}
		if err := fb.ping(); err != nil {
			t.Fatalf("%v\n%s", err, stacks())
		}
		c.Close()
		if !fb.alone() {
			t.Fatalf("the connection has not ended\n%s", stacks())
		}
		<-read
		if err := checkOutput(out.Bytes()); err != nil {
			t.Errorf("the broker sent % x: %v", out.Bytes(), err)
		}
		if said := fb.defect.String(); said != "" {
			t.Fatal(said)
		}
	})
}

// stacks returns what every goroutine does.
func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}
