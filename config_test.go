package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"penstock/broker"
	"penstock/internal/units"
)

// exampleFile shows every key; the tests below keep it true.
const exampleFile = "penstock.example.toml"

func TestConfigErrors(t *testing.T) {
	tests := []struct {
		name string
		doc  string
		want []string // one line each
	}{
		{"unknown key", "[storage]\n  dirr = \"a\"\n",
			[]string{"c.toml:2:3: storage.dirr: no such key: did you mean storage.dir?"}},
		{"unknown key, nothing like it", "[log]\ncolour = true\n",
			[]string{"c.toml:2:1: log.colour: no such key: [log] has format, level"}},
		{"unknown section, its keys are not named again", "[storrage]\ndir = \"a\"\n\n[log]\nlevel = \"info\"\n",
			[]string{"c.toml:1:2: storrage: no such section: did you mean storage?"}},
		{"unknown section, nothing like it", "[persistence]\n",
			[]string{"c.toml:1:2: persistence: no such section: there are api, broker, hw, log, storage"}},
		{"a key without its section", "window = 3\n",
			[]string{"c.toml:1:1: window: this key belongs in a section: write it below [broker]"}},
		{"a key without its section, of which there may be several", "address = \":1883\"\n",
			[]string{"c.toml:1:1: address: this key belongs in a section: write it below [[broker.listener]]"}},
		{"a key without a section that no section has", "colour = 3\n",
			[]string{"c.toml:1:1: colour: no such section: there are api, broker, hw, log, storage"}},
		{"a port that is none", "[[broker.listener]]\nname = \"a\"\naddress = \":70000\"\n",
			[]string{`c.toml:3:11: broker.listener[0].address: "70000" is not a port from 0 to 65535`}},
		{"a port of the API that is none", "[api]\nhttp = \":70000\"\n",
			[]string{`c.toml:2:8: api.http: "70000" is no port from 0 to 65535`}},
		{"two listeners on one address", "[[broker.listener]]\nname = \"a\"\naddress = \":1883\"\n[[broker.listener]]\nname = \"b\"\naddress = \"127.0.0.1:1883\"\n",
			[]string{`c.toml:6:11: broker.listener[0].address and broker.listener[1].address: ":1883" and "127.0.0.1:1883" are the same address: give one of them another port`}},
		{"a listener on the API's default", "[[broker.listener]]\nname = \"a\"\naddress = \":8080\"\n",
			[]string{`c.toml:3:11: broker.listener[0].address and api.http: ":8080" and ":8080" are the same address: give one of them another port`}},
		{"the API on the listener's default", "[api]\nhttp = \"localhost:1883\"\n",
			[]string{`c.toml:2:8: broker.listener[0].address and api.http: ":1883" and "localhost:1883" are the same address: give one of them another port`}},
		{"dotted key", "log.levle = \"info\"\n",
			[]string{"c.toml:1:1: log.levle: no such key: did you mean log.level?"}},
		{"upper case", "[storage]\nDIR = \"a\"\n",
			[]string{"c.toml:2:1: storage.DIR: no such key: did you mean storage.dir?"}},
		{"a number for text", "[storage]\ndir = 3\n",
			[]string{`c.toml:2:7: storage.dir: a number does not fit here: write text in quotes, as "text"`}},
		{"text for true or false", "[api]\nmetrics_loopback = \"yes\"\n",
			[]string{"c.toml:2:20: api.metrics_loopback: text does not fit here: write true or false"}},
		{"a time without unit", "[storage]\ncommit_delay = 20\n",
			[]string{`c.toml:2:16: storage.commit_delay: a number does not fit here: write a time with its unit in quotes, as "500ms", "20s" or "30d"`}},
		{"a time with an unknown unit", "[storage]\ncommit_delay = \"20 sec\"\n",
			[]string{`c.toml:2:16: storage.commit_delay: "20 sec" is no duration: write 500ms, 20s, 5m, 12h or 30d`}},
		{"less than no bytes", "[broker]\nmax_packet = -5\n",
			[]string{`c.toml:2:14: broker.max_packet: a number does not fit here: write an amount of bytes, as "64KiB" or "1MiB"`}},
		{"a number that is too large", "[broker]\nwindow = 99999999999999999999\n",
			[]string{`c.toml:2:10: broker.window: `}},
		{"a value out of its range, in a list", "[[broker.listener]]\nname = \"a\"\naddress = \":1\"\n[[broker.listener]]\nname = \"b\"\naddress = \"1883\"\n",
			[]string{`c.toml:6:11: broker.listener[1].address: `}},
		{"a list for text", "[storage]\ndir = [\n  \"a\",\n]\n",
			[]string{`c.toml:2:1: storage.dir: a list does not fit here: write text in quotes, as "text"`}},
		{"a key used as a section", "[storage.dir]\nname = \"a\"\n",
			[]string{`c.toml:1:2: storage.dir: this is a key, not a section: write dir = text in quotes, as "text" below [storage]`}},
		{"a section used as a key", "storage = \"here\"\n",
			[]string{"c.toml:1:11: storage: text does not fit here: write a section, as [name] with its keys below"}},
		{"one listener in single brackets", "[broker.listener]\nname = \"tcp\"\n",
			[]string{"c.toml:1:2: broker.listener: there may be several of it: write [[broker.listener]]"}},
		{"a single section in double brackets", "[[storage]]\ndir = \"a\"\n",
			[]string{"c.toml:1:3: storage: there is one of it only: write [storage]"}},
		{"unknown key of the second listener",
			"[[broker.listener]]\nname = \"a\"\naddress = \":1\"\n[[broker.listener]]\nport = 1883\n",
			[]string{"c.toml:5:1: broker.listener.port: no such key: [broker.listener] has address, anonymous, connect_timeout, max_connections, max_connections_per_address, max_packet, mode, name, origins, protocol, proxy_from, proxy_protocol, tls_cert, tls_key"}},
		{"unknown key in an inline table", "broker.listener = [{name = \"a\", addr = \":1\"}]\n",
			[]string{"c.toml:1:33: broker.listener.addr: no such key: [broker.listener] has address, anonymous, connect_timeout, max_connections, max_connections_per_address, max_packet, mode, name, origins, protocol, proxy_from, proxy_protocol, tls_cert, tls_key"}},
		{"a number in a table of names", "[hw.leds]\nstatus = 1\n",
			[]string{`c.toml:2:10: hw.leds.status: a number does not fit here: write text in quotes, as "text"`}},
		{"several at once, in the order of the file", "[api]\nhttpp = \":1\"\n[log]\nlevel = 1\n",
			[]string{
				"c.toml:2:1: api.httpp: no such key: did you mean api.http?",
				`c.toml:4:9: log.level: a number does not fit here: write text in quotes, as "text"`,
			}},
		{"text for a list", "[[broker.listener]]\norigins = \"https://a\"\n",
			[]string{`c.toml:2:11: broker.listener[0].origins: text does not fit here: write a list in brackets, as ["https://host"]`}},
		{"a listener without a name", "[[broker.listener]]\naddress = \":1\"\n",
			[]string{`c.toml:1:3: broker.listener[0].name: there is none: write one for the log and the status, as "plant"`}},
		{"a name given twice", "[[broker.listener]]\nname = \"a\"\naddress = \":1\"\n[[broker.listener]]\nname = \"a\"\naddress = \":2\"\n",
			[]string{`c.toml:5:8: broker.listener[1].name: broker.listener[0] has the name "a" too: give each its own`}},
		{"an address that is none", "[[broker.listener]]\nname = \"a\"\naddress = \"1883\"\n",
			[]string{`c.toml:3:11: broker.listener[0].address: "1883" is no address: write ":1883", "host:1883", "unix:/path" or "fd:NAME"`}},
		{"an address of the API that is none", "[api]\nhttp = \"8080\"\n",
			[]string{`c.toml:2:8: api.http: "8080" is no address: write ":8080", "host:8080" or "off"`}},
		{"a keep alive that is no whole seconds", "[broker]\nmax_keep_alive = \"1500ms\"\n",
			[]string{`c.toml:2:18: broker.max_keep_alive: 1.5s is not whole seconds from 0s to 65535s`}},
		{"values of $SYS topics too often", "[broker]\nsys_interval = \"100ms\"\n",
			[]string{`c.toml:2:16: broker.sys_interval: 100ms is not between 1s and 1h, nor 0s`}},
		{"an origin with a path", "[[broker.listener]]\nname = \"a\"\naddress = \":1\"\nprotocol = \"websocket\"\norigins = [\"https://a/\"]\n",
			[]string{`c.toml:5:12: broker.listener[0].origins[0]: "https://a/": an origin is without a path: take the last / away`}},
		{"twice the same key", "[log]\nlevel = \"info\"\nlevel = \"warn\"\n",
			[]string{"c.toml:3:1: key level is already defined: keep one of the two"}},
		{"no value", "[log]\nlevel =\n",
			[]string{"c.toml:2:8: unexpected character U+000A at start of value; text needs quotes, a section its brackets, as in penstock.example.toml"}},
		{"no quotes", "[log]\nlevel = info\n",
			[]string{"c.toml:2:12: expected newline but got U+006F 'o'; text needs quotes, a section its brackets, as in penstock.example.toml"}},
		{"an open bracket", "[log\n",
			[]string{"c.toml:1:5: expected ']' to close table name; text needs quotes, a section its brackets, as in penstock.example.toml"}},
		{"a value that no one knows", "[log]\nformat = \"text\"\nlevel = \"loud\"\n",
			[]string{`c.toml:3:9: log.level: "loud" is no level: write debug, info, warn or error`}},
		{"two values that no one knows", "[log]\nformat = \"xml\"\n[broker]\nanonymous = \"perhaps\"\n",
			[]string{
				`c.toml:2:10: log.format: "xml" is no format: write auto, text, journal or logfmt`,
				`c.toml:4:13: broker.anonymous: `,
			}},
		{"lines that end as on Windows, and a byte order mark", "\ufeff[log]\r\nlevel = 1\r\n",
			[]string{`c.toml:2:9: log.level: a number does not fit here: write text in quotes, as "text"`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := decodeConfig("c.toml", []byte(tt.doc))
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.Split(err.Error(), "\n")
			same := len(got) == len(tt.want)
			for i := range min(len(got), len(tt.want)) {
				want := tt.want[i]
				if strings.HasSuffix(want, ": ") { // the rest is another package's wording
					same = same && strings.HasPrefix(got[i], want)
				} else {
					same = same && got[i] == want
				}
			}
			if !same {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(tt.want, "\n  "))
			}
		})
	}
}

// TestSameAddress: an address is refused only if it cannot be listened on.
func TestSameAddress(t *testing.T) {
	for _, tt := range []struct {
		first, second, http string
		want                int // errors
	}{
		{"192.0.2.1:1883", "127.0.0.1:1883", "[::1]:1883", 0},
		{":0", ":0", ":0", 0},
		{":1883", ":1884", "off", 0},
		{"gateway:1883", "plant:1883", "off", 0},
		{"gateway:1883", "gateway:1883", "off", 1},
		{"localhost:1883", "127.0.0.1:1883", "off", 1},
		{"0.0.0.0:1883", "[::1]:1883", "off", 1},
		{"[::ffff:192.0.2.1]:1883", "192.0.2.1:1883", "off", 1},
		{"127.0.0.1:1883", "127.0.0.1:1884", ":1884", 1},
		{":1883", ":1883", ":1883", 3},
	} {
		cfg := DefaultConfig()
		cfg.Broker.Listeners = []broker.ListenerConfig{{Name: "a", Address: tt.first}, {Name: "b", Address: tt.second}}
		cfg.API.HTTP = tt.http
		got := 0
		if err := cfg.Validate(); err != nil {
			got = strings.Count(err.Error(), "are the same address")
		}
		if got != tt.want {
			t.Errorf("%s, %s, %s: got %d errors, want %d: %v", tt.first, tt.second, tt.http, got, tt.want, cfg.Validate())
		}
	}
}

func TestConfigFileOverDefaults(t *testing.T) {
	got, err := decodeConfig("c.toml", []byte(`
# a comment
[log]
level = "debug" # another
[storage]
commit_delay = "5ms"
[[broker.listener]]
name = "lan"
address = "192.0.2.1:1883"
[[broker.listener]]
name = "local"
address = "127.0.0.1:1884"
[api]
http = "off"
bevywise.always_200 = true
[hw]
leds = {status = "ACT"}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.Log.Level = "debug"
	want.Storage.CommitDelay = units.Duration(5 * time.Millisecond)
	want.Broker.Listeners = []broker.ListenerConfig{
		{Name: "lan", Address: "192.0.2.1:1883"},
		{Name: "local", Address: "127.0.0.1:1884"},
	}
	want.API.HTTP = "off"
	want.API.Bevywise.Always200 = true
	want.HW.LEDs["status"] = "ACT"
	if !sameConfig(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

// sameConfig reports whether two configurations mean the same: TOML has no list
// that is nil.
func sameConfig(a, b Config) bool {
	lists := func(c *Config) {
		c.Broker.Listeners = slices.Clone(c.Broker.Listeners)
		for i := range c.Broker.Listeners {
			l := &c.Broker.Listeners[i]
			l.Origins, l.ProxyFrom = append([]string{}, l.Origins...), append([]string{}, l.ProxyFrom...)
		}
	}
	lists(&a)
	lists(&b)
	return reflect.DeepEqual(a, b)
}

func TestDefaultsAreValidAndFresh(t *testing.T) {
	cfg := DefaultConfig()
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	cfg.Broker.Listeners[0].Address = "changed"
	if cfg.HW.LEDs == nil {
		t.Fatal("hw.leds is nil; a map that a file can add to is wanted")
	}
	cfg.HW.LEDs["status"] = "changed"
	if again := DefaultConfig(); reflect.DeepEqual(again.Broker, cfg.Broker) || reflect.DeepEqual(again.HW, cfg.HW) {
		t.Error("a change to one DefaultConfig shows in the next")
	}
}

// TestEffectiveConfigReadsBack: what `penstock check` prints is a file.
func TestEffectiveConfigReadsBack(t *testing.T) {
	want := DefaultConfig()
	want.setDev()
	var doc bytes.Buffer
	if err := printConfig(&doc, want); err != nil {
		t.Fatal(err)
	}
	got, err := decodeConfig("printed.toml", doc.Bytes())
	if err != nil {
		t.Fatalf("%v in\n%s", err, doc.String())
	}
	if !sameConfig(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestFlagsOverFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "penstock.toml")
	if err := os.WriteFile(file, []byte("[storage]\ndir = \"/srv/a\"\n[api]\nhttp = \":81\"\n[hw]\nbackend = \"off\"\n[log]\nlevel = \"warn\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	type facts struct{ dir, mqtt, http, anonymous, backend, level string }
	tests := []struct {
		name  string
		flags configFlags
		addr  addressFlags
		want  facts
	}{
		{"file", configFlags{Config: file}, addressFlags{},
			facts{"/srv/a", ":1883", ":81", "loopback", "off", "warn"}},
		{"--dev over the file", configFlags{Config: file}, addressFlags{Dev: true},
			facts{filepath.Join(here, "data"), "127.0.0.1:1883", "127.0.0.1:8080", "loopback", "sim", "warn"}},
		{"--data, --mqtt and --http over --dev", configFlags{Data: dir}, addressFlags{Dev: true, MQTT: ":0", HTTP: "off"},
			facts{dir, ":0", "off", "loopback", "sim", "info"}},
	}
	beside, err := configFlags{}.effective(addressFlags{Dev: true, MQTT: "127.0.0.1:1884"})
	if err != nil {
		t.Fatal(err)
	}
	if got := beside.Broker.Listeners[1].Address; got != "127.0.0.1:0" {
		t.Errorf("--dev with --mqtt: WebSocket on %s, want a free port", got)
	}
	for _, tt := range tests {
		cfg, err := tt.flags.effective(tt.addr)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		got := facts{cfg.Storage.Dir, cfg.Broker.Listeners[0].Address, cfg.API.HTTP, cfg.Broker.Anonymous, cfg.HW.Backend, cfg.Log.Level}
		if got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestErrorOfAFlagHasNoPlaceInTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "penstock.toml")
	if err := os.WriteFile(file, []byte("[api]\nhttp = \":81\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := configFlags{Config: file}.effective(addressFlags{HTTP: "nonsense"})
	if err == nil || !strings.Contains(err.Error(), "api.http") || strings.Contains(err.Error(), "penstock.toml:2") {
		t.Errorf("got %v, want an error of api.http without a line of the file", err)
	}
}

// keyLine is a line of the example that becomes a setting without its mark;
// prose has a space after the mark.
var keyLine = regexp.MustCompile(`(?m)^#((?:[a-z0-9_.]+ = |\[).*)$`)

func TestExampleEqualsDefaults(t *testing.T) {
	doc, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	for name, doc := range map[string][]byte{"as it is": doc, "with every key uncommented": keyLine.ReplaceAll(doc, []byte("$1"))} {
		got, err := decodeConfig(exampleFile, doc)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if want := DefaultConfig(); !sameConfig(got, want) {
			t.Errorf("%s: the example says\n%+v\nthe defaults are\n%+v\nMake %s show the defaults.", name, got, want, exampleFile)
		}
	}
}

// TestExampleHasEveryKey: each key of Config stands in the example, with a
// sentence above it.
func TestExampleHasEveryKey(t *testing.T) {
	doc, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	lines := strings.Split(string(doc), "\n")
	section := ""
	for i, line := range lines {
		setting := strings.TrimPrefix(line, "#")
		if name, ok := strings.CutPrefix(setting, "["); ok {
			section = strings.Trim(name, "[]")
			have[section] = true
			continue
		}
		if !keyLine.MatchString(line) {
			continue
		}
		key, _, _ := strings.Cut(setting, " = ")
		have[section+"."+key] = true
		if i == 0 || !strings.HasPrefix(lines[i-1], "# ") {
			t.Errorf("%s:%d: %s has no sentence above it that says what it does", exampleFile, i+1, key)
		}
	}
	for _, key := range configKeys(nil, reflect.TypeFor[Config]()) {
		if !have[key] {
			t.Errorf("%s is missing in %s: add it with its default and a sentence", key, exampleFile)
		}
		delete(have, key)
	}
}

// configKeys returns the dotted names of all keys of a section and of the
// sections in it.
func configKeys(path []string, typ reflect.Type) []string {
	var keys []string
	for name, typ := range fields(typ) {
		if name == "" || strings.ToLower(name) != name {
			keys = append(keys, strings.Join(path, ".")+": a field without a toml name in small letters")
			continue
		}
		sub := append(slices.Clone(path), name)
		switch {
		case isTable(typ) && typ.Kind() == reflect.Struct:
			keys = append(keys, configKeys(sub, typ)...)
		case typ.Kind() == reflect.Slice && isTable(typ.Elem()):
			keys = append(keys, configKeys(sub, typ.Elem())...)
		default:
			keys = append(keys, strings.Join(sub, "."))
		}
	}
	slices.Sort(keys)
	return keys
}

func FuzzConfig(f *testing.F) {
	f.Add("[log]\nlevel = \"debug\"\n[[broker.listener]]\nname = \"a\"\naddress = \":1\"\n")
	f.Add("broker.listener = [{name = \"a\", addr = 1}]\n[hw.leds]\na = 'b'\n")
	f.Add("[storage]\ndir.x = [1, [2], {a = 1}]\n# c\n[[storage]]\n")
	f.Fuzz(func(t *testing.T, doc string) {
		_, err := decodeConfig("c.toml", []byte(doc))
		// The walk may be stricter than the decoder, never looser: what the
		// decoder refuses is refused.
		cfg := DefaultConfig()
		strict := toml.NewDecoder(strings.NewReader(strings.TrimPrefix(doc, "\ufeff"))).DisallowUnknownFields().Decode(&cfg)
		if strict != nil && err == nil {
			t.Errorf("accepted %q, the decoder says %v", doc, strict)
		}
	})
}
