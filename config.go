package main

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"penstock/api"
	"penstock/broker"
	"penstock/hw"
	"penstock/internal/units"
	"penstock/storage"
)

// Config is what is fixed per installation: the configuration file. Every
// package owns its section; what changes at run time is in the database.
type Config struct {
	Log     LogConfig      `toml:"log"`
	Storage storage.Config `toml:"storage"`
	Broker  broker.Config  `toml:"broker"`
	API     api.Config     `toml:"api"`
	HW      hw.Config      `toml:"hw"`
}

// DefaultConfig returns what holds where a file says nothing.
func DefaultConfig() Config {
	return Config{
		Log:     DefaultLogConfig(),
		Storage: storage.DefaultConfig(),
		Broker:  broker.DefaultConfig(),
		API:     api.DefaultConfig(),
		HW:      hw.DefaultConfig(),
	}
}

// Validate returns every error of every section, each naming its key, or nil.
func (c Config) Validate() error {
	return errors.Join(c.Log.Validate(), c.Storage.Validate(), c.Broker.Validate(), c.API.Validate(), c.HW.Validate(), c.validateAddresses())
}

// validateAddresses returns what no section sees by itself: two keys with one
// address, of which the second could never be listened on. It leaves addresses
// that are none to the sections.
func (c Config) validateAddresses() error {
	type listener struct {
		key, address string
		host         netip.Addr // the zero one if it is a name
		port         int
	}
	var errs []error
	var seen []listener
	add := func(key, address string) {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return
		}
		l := listener{key: key, address: address, host: netip.IPv6Unspecified()}
		if l.port, err = net.LookupPort("tcp", port); err != nil {
			if key != "api.http" { // which says so itself
				errs = append(errs, fmt.Errorf("%s: %q is not a port from 0 to 65535", key, port))
			}
			return
		}
		if host == "localhost" {
			host = "127.0.0.1"
		}
		if host != "" {
			l.host, _ = netip.ParseAddr(host)
			l.host = l.host.Unmap()
		}
		for _, other := range seen {
			// Go listens for 0.0.0.0 on every address of IPv6 too.
			anyHost := l.host.IsUnspecified() || other.host.IsUnspecified()
			sameHost := l.host == other.host && l.host.IsValid() || l.address == other.address
			if l.port == other.port && l.port != 0 && (anyHost || sameHost) {
				errs = append(errs, fmt.Errorf("%s and %s: %q and %q are the same address: give one of them another port", other.key, key, other.address, address))
			}
		}
		seen = append(seen, l)
	}
	paths := make(map[string]string) // of unix sockets, to their key
	for i, l := range c.Broker.Listeners {
		key := fmt.Sprintf("broker.listener[%d].address", i)
		switch network, address := l.Network(); network {
		case broker.NetworkTCP:
			add(key, address)
		case broker.NetworkUnix:
			path := filepath.Clean(address)
			if other := paths[path]; other != "" {
				errs = append(errs, fmt.Errorf("%s and %s: both are %q: give one of them another path", other, key, path))
			}
			paths[path] = key
		}
	}
	add("api.http", c.API.HTTP) // "off" is no address
	return errors.Join(errs...)
}

// setDev lays over c what a trial on a desk needs: nothing listens beyond this
// machine, data stays in the working directory, and LEDs are a line of text.
func (c *Config) setDev() {
	c.Storage.Dir = "data"
	c.Broker.Anonymous = "loopback"
	c.Broker.Listeners = []broker.ListenerConfig{
		{Name: "tcp", Address: "127.0.0.1:1883"},
		{Name: "web", Address: "127.0.0.1:9001", Protocol: "websocket"},
	}
	c.API.HTTP = "127.0.0.1:8080"
	c.HW.Backend = "sim"
}

// configFlags are the flags by which every command finds its configuration.
type configFlags struct {
	Config string `placeholder:"FILE" help:"Configuration file (TOML). Without it the built-in defaults hold."`
	Data   string `placeholder:"DIR" help:"Data directory, instead of storage.dir."`
}

// addressFlags are the flags that change what is listened on.
type addressFlags struct {
	Dev  bool   `help:"Trial on this machine: data in ./data, loopback addresses, simulated hardware."`
	MQTT string `name:"mqtt" placeholder:"ADDR" help:"Address of the first MQTT listener, instead of broker.listener.address (\":0\" takes a free port)."`
	HTTP string `name:"http" placeholder:"ADDR" help:"Address of the API, instead of api.http (\"off\" closes it)."`
}

// effective returns the defaults, overlaid by the file, by --dev and by the
// other flags, in this order, and validated.
func (f configFlags) effective(a addressFlags) (Config, error) {
	cfg := DefaultConfig()
	if f.Config != "" {
		doc, err := os.ReadFile(f.Config)
		if err != nil {
			return Config{}, fmt.Errorf("read the configuration: %w", err)
		}
		if cfg, err = decodeConfig(f.Config, doc); err != nil {
			return Config{}, err
		}
	}
	if a.Dev {
		cfg.setDev()
	}
	if f.Data != "" {
		cfg.Storage.Dir = f.Data
	}
	if a.MQTT != "" {
		if len(cfg.Broker.Listeners) == 0 {
			cfg.Broker.Listeners = []broker.ListenerConfig{{Name: "tcp"}}
		}
		cfg.Broker.Listeners[0].Address = a.MQTT
		if a.Dev {
			cfg.Broker.Listeners[1].Address = "127.0.0.1:0" // a trial beside another one
		}
	}
	if a.HTTP != "" {
		cfg.API.HTTP = a.HTTP
	}
	if err := cfg.Validate(); err != nil {
		return Config{}, fmt.Errorf("flags and configuration together: %w", err)
	}
	dir, err := filepath.Abs(cfg.Storage.Dir)
	if err != nil {
		return Config{}, fmt.Errorf("storage.dir: %w", err)
	}
	cfg.Storage.Dir = dir
	return cfg, nil
}

// decodeConfig reads the TOML document doc over the defaults. What is wrong
// in it is returned as configErrors, each with its place; file is the name
// that they carry.
func decodeConfig(file string, doc []byte) (Config, error) {
	doc = bytes.TrimPrefix(doc, []byte("\ufeff")) // some editors write one
	w := configWalk{file: file, at: make(map[string]place)}
	w.walk(doc)
	cfg := DefaultConfig()
	if len(w.errs) == 0 {
		if err := toml.NewDecoder(bytes.NewReader(doc)).DisallowUnknownFields().Decode(&cfg); err != nil {
			w.addDecodeError(err)
		}
	}
	if len(w.errs) == 0 {
		w.addInvalid(cfg.Validate())
	}
	if len(w.errs) > 0 {
		slices.SortStableFunc(w.errs, func(a, b configError) int {
			if a.line != b.line {
				return a.line - b.line
			}
			return a.column - b.column
		})
		return Config{}, w.errs
	}
	return cfg, nil
}

// place is where something stands in the file, counted from 1; the column
// counts bytes. The zero place is nowhere in particular.
type place struct{ line, column int }

// configError is one thing that is wrong in a configuration file.
type configError struct {
	file string
	place
	key  string // dotted, may be empty
	text string // what is wrong and what to write instead
}

// Error puts the place first, as compilers do, so that editors find it.
func (e configError) Error() string {
	s := e.file
	if e.line > 0 {
		s += fmt.Sprintf(":%d:%d", e.line, e.column)
	}
	if e.key != "" {
		s += ": " + e.key
	}
	return s + ": " + e.text
}

// configErrors is everything wrong in one file, in the order of the file.
type configErrors []configError

// Error returns one line per error.
func (e configErrors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// configWalk looks at every key of a document before the decoder does. The
// decoder is strict about unknown keys, but takes a number for a duration (and
// makes nanoseconds of it), "Dir" for "dir", and [broker.listener] for
// [[broker.listener]]; and of several wrong values it names the first only.
type configWalk struct {
	file string
	p    unstable.Parser
	errs configErrors
	at   map[string]place // by key with indexes, as "broker.listener[1].name"
}

// walk fills w.at and w.errs. A document that is no TOML is left to the
// decoder, whose error says where.
func (w *configWalk) walk(doc []byte) {
	w.p.Reset(doc)
	tables := make(map[string]int) // how often [[name]] was met
	var table []string             // the current [table], and the same with indexes
	var indexed string
	known := true // the current table is part of Config
	for w.p.NextExpression() {
		e := w.p.Expression()
		if e.Kind == unstable.KeyValue {
			if known {
				w.keyValue(table, indexed, e)
			}
			continue
		}
		keys := keyNodes(e)
		if len(keys) == 0 {
			continue // a comment
		}
		table, indexed = nil, ""
		for i, k := range keys {
			table = append(table, string(k.Data))
			indexed = join(indexed, string(k.Data))
			name := strings.Join(table, ".")
			if i == len(keys)-1 && e.Kind == unstable.ArrayTable {
				tables[name]++
			}
			if n := tables[name]; n > 0 {
				indexed += fmt.Sprintf("[%d]", n-1)
			}
		}
		at := w.placeOf(keys[0].Raw)
		w.at[indexed] = at
		typ, errText := lookup(table)
		known = errText == ""
		if known && e.Kind == unstable.ArrayTable && typ.Kind() != reflect.Slice {
			known, errText = false, fmt.Sprintf("there is one of it only: write [%s]", strings.Join(table, "."))
		} else if known && e.Kind == unstable.Table && typ.Kind() == reflect.Slice {
			known, errText = false, fmt.Sprintf("there may be several of it: write [[%s]]", strings.Join(table, "."))
		} else if known && !isTable(typ) && typ.Kind() != reflect.Slice {
			known, errText = false, fmt.Sprintf("this is a key, not a section: write %s = %s below [%s]",
				table[len(table)-1], wanted(typ), strings.Join(table[:len(table)-1], "."))
		}
		if !known {
			w.add(at, strings.Join(table, "."), errText)
		}
	}
	if w.p.Error() != nil {
		w.errs = nil
	}
}

// keyValue checks "key = value" in the given table.
func (w *configWalk) keyValue(table []string, indexed string, e *unstable.Node) {
	keys := keyNodes(e)
	path := slices.Clone(table)
	for _, k := range keys {
		path = append(path, string(k.Data))
		indexed = join(indexed, string(k.Data))
	}
	typ, errText := lookup(path)
	if errText != "" {
		if len(path) == 1 {
			if sections := sectionsWith(path[0]); len(sections) == 1 {
				errText = "this key belongs in a section: write it below " + sections[0]
			}
		}
		w.add(w.placeOf(keys[0].Raw), strings.Join(path, "."), errText)
		return
	}
	w.value(path, indexed, typ, e.Value(), w.placeOf(keys[0].Raw))
}

// value checks the value at path against the type that Config has there. key
// is the place of its key, for values that have none of their own.
func (w *configWalk) value(path []string, indexed string, typ reflect.Type, v *unstable.Node, key place) {
	at := key
	if v.Raw.Length > 0 {
		at = w.placeOf(v.Raw)
	}
	w.at[indexed] = at
	if !fits(typ, v.Kind) || typ == bytesType && bytes.HasPrefix(v.Data, []byte("-")) {
		want := wanted(typ)
		if list := listExamples[path[len(path)-1]]; list != "" && typ.Kind() == reflect.Slice {
			want = "a list in brackets, as " + list
		}
		w.add(at, indexed, fmt.Sprintf("%s does not fit here: write %s", kindWords[v.Kind], want))
		return
	}
	switch v.Kind {
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			w.keyValue(path, indexed, it.Node())
		}
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.Comment {
				continue
			}
			w.value(path, fmt.Sprintf("%s[%d]", indexed, i), typ.Elem(), it.Node(), at)
			i++
		}
	}
}

func (w *configWalk) add(at place, key, text string) {
	w.errs = append(w.errs, configError{file: w.file, place: at, key: key, text: text})
}

func (w *configWalk) placeOf(r unstable.Range) place {
	start := w.p.Shape(r).Start
	return place{start.Line, start.Column}
}

// addDecodeError adds what the decoder found although the walk did not.
func (w *configWalk) addDecodeError(err error) {
	var unknown *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		for _, e := range unknown.Errors {
			line, column := e.Position()
			w.add(place{line, column}, strings.Join(e.Key(), "."), "no such key")
		}
	case errors.As(err, &decode):
		line, column := decode.Position()
		key := strings.Join(decode.Key(), ".")
		text := strings.TrimPrefix(decode.Error(), "toml: ")
		if strings.HasSuffix(text, "already defined") {
			key, text = "", text+": keep one of the two"
		} else if key == "" {
			text += "; text needs quotes, a section its brackets, as in penstock.example.toml"
		}
		w.add(place{line, column}, key, text)
	default:
		w.add(place{}, "", err.Error())
	}
}

// keyPrefix finds the key, or the two keys, at the start of a Validate error.
var keyPrefix = regexp.MustCompile(`^([a-z0-9_.\[\]]+)(?: and ([a-z0-9_.\[\]]+))?: `)

// addInvalid adds the errors of Validate, with the place of the key that each
// begins with, if the file has it; of two keys, of the last that it has.
func (w *configWalk) addInvalid(err error) {
	if err == nil {
		return
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range many.Unwrap() {
			w.addInvalid(err)
		}
		return
	}
	var at place
	if m := keyPrefix.FindStringSubmatch(err.Error()); m != nil {
		key := m[1]
		at = w.at[m[2]]
		for key != "" && at == (place{}) {
			at = w.at[key]
			key = key[:max(strings.LastIndexAny(key, ".["), 0)]
		}
	}
	w.add(at, "", err.Error())
}

// keyNodes returns the parts of the key of a table or a key and its value.
func keyNodes(e *unstable.Node) []*unstable.Node {
	var keys []*unstable.Node
	for it := e.Key(); it.Next(); {
		keys = append(keys, it.Node())
	}
	return keys
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// lookup returns the type of Config at path; in a list of sections the path
// has no index. If there is nothing, it returns a text that says what there
// is instead.
func lookup(path []string) (reflect.Type, string) {
	typ := reflect.TypeFor[Config]()
	for i, key := range path {
		if typ.Kind() == reflect.Slice && isTable(typ.Elem()) {
			typ = typ.Elem()
		}
		switch {
		case typ.Kind() == reflect.Map:
			typ = typ.Elem()
		case isTable(typ):
			next, ok := fields(typ)[key]
			if !ok {
				return nil, noSuchKey(path[:i], key, typ)
			}
			typ = next
		default:
			return nil, fmt.Sprintf("%s has no keys below it: write %s = %s", strings.Join(path[:i], "."), path[i-1], wanted(typ))
		}
	}
	return typ, ""
}

// fields returns the types of a section's keys by name.
func fields(typ reflect.Type) map[string]reflect.Type {
	m := make(map[string]reflect.Type)
	for i := range typ.NumField() {
		if f := typ.Field(i); f.IsExported() && f.Tag.Get("toml") != "-" {
			m[f.Tag.Get("toml")] = f.Type
		}
	}
	return m
}

// sectionsWith returns the sections that have the key, in their brackets.
func sectionsWith(key string) []string {
	var found []string
	var search func(path string, typ reflect.Type)
	search = func(path string, typ reflect.Type) {
		brackets := "[" + path + "]"
		if typ.Kind() == reflect.Slice {
			typ, brackets = typ.Elem(), "["+brackets+"]"
		}
		if !isTable(typ) || typ.Kind() == reflect.Map {
			return
		}
		for name, typ := range fields(typ) {
			if name == key {
				found = append(found, brackets)
			}
			search(join(path, name), typ)
		}
	}
	for name, typ := range fields(reflect.TypeFor[Config]()) {
		search(name, typ)
	}
	return found
}

// noSuchKey says what to write instead of key, which section does not have.
func noSuchKey(section []string, key string, typ reflect.Type) string {
	var names []string
	for name := range fields(typ) {
		names = append(names, name)
	}
	slices.Sort(names)
	best, bestDistance := "", 3
	for _, name := range names {
		if d := distance(strings.ToLower(key), name); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	what := "key"
	if len(section) == 0 {
		what = "section"
	}
	if best != "" {
		return fmt.Sprintf("no such %s: did you mean %s?", what, strings.Join(append(slices.Clone(section), best), "."))
	}
	if len(section) == 0 {
		return "no such section: there are " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("no such key: [%s] has %s", strings.Join(section, "."), strings.Join(names, ", "))
}

// distance is the number of letters to change, add or remove to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

var (
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
	durationType    = reflect.TypeFor[units.Duration]()
	bytesType       = reflect.TypeFor[units.Bytes]()
)

// isText reports whether a value of the type is written in quotes.
func isText(typ reflect.Type) bool {
	return typ.Kind() == reflect.String || reflect.PointerTo(typ).Implements(textUnmarshaler)
}

// isTable reports whether the type is a section or a table of names.
func isTable(typ reflect.Type) bool {
	return !isText(typ) && (typ.Kind() == reflect.Struct || typ.Kind() == reflect.Map)
}

// fits reports whether a TOML value of the kind may stand for the type.
func fits(typ reflect.Type, kind unstable.Kind) bool {
	switch {
	case typ == bytesType:
		return kind == unstable.String || kind == unstable.Integer
	case isText(typ):
		return kind == unstable.String
	case isTable(typ):
		return kind == unstable.InlineTable
	}
	switch typ.Kind() {
	case reflect.Bool:
		return kind == unstable.Bool
	case reflect.Float64:
		return kind == unstable.Float || kind == unstable.Integer
	case reflect.Slice:
		return kind == unstable.Array
	}
	return kind == unstable.Integer
}

// wanted says how a value of the type is written.
func wanted(typ reflect.Type) string {
	switch {
	case typ == durationType:
		return `a time with its unit in quotes, as "500ms", "20s" or "30d"`
	case typ == bytesType:
		return `an amount of bytes, as "64KiB" or "1MiB"`
	case isText(typ):
		return `text in quotes, as "text"`
	case isTable(typ):
		return `a section, as [name] with its keys below`
	}
	switch typ.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Float64:
		return "a number, as 0.5"
	case reflect.Slice:
		return `a list in brackets, as ["text"]`
	}
	return "a whole number, as 10"
}

// listExamples are lists as they are written, by their key.
var listExamples = map[string]string{
	"origins":    `["https://host"]`,
	"proxy_from": `["10.0.0.0/8"]`,
}

var kindWords = map[unstable.Kind]string{
	unstable.String:        "text",
	unstable.Bool:          "true or false",
	unstable.Float:         "a number with a point",
	unstable.Integer:       "a number",
	unstable.LocalDate:     "a date",
	unstable.LocalTime:     "a time of day",
	unstable.LocalDateTime: "a date",
	unstable.DateTime:      "a date",
	unstable.Array:         "a list",
	unstable.InlineTable:   "a section",
}
