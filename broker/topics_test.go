package broker

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// naiveMatch is the standard's chapter 4.7 word by word, slow and plain: what
// the indexes are compared with.
func naiveMatch(filter, topic string) bool {
	if strings.HasPrefix(topic, "$") && (strings.HasPrefix(filter, "+") || strings.HasPrefix(filter, "#")) {
		return false
	}
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if f[len(f)-1] == "#" {
		f = f[:len(f)-1]
		if len(t) < len(f) {
			return false
		}
		t = t[:len(f)]
	}
	return slices.EqualFunc(f, t, func(f, t string) bool { return f == "+" || f == t })
}

// naiveValid judges level by level and rune by rune.
func naiveValid(s string, maxBytes, maxLevels int, wildcards bool) bool {
	levels := strings.Split(s, "/")
	if len(s) < 1 || len(s) > 65535 || maxBytes != 0 && len(s) > maxBytes || maxLevels != 0 && len(levels) > maxLevels {
		return false
	}
	for i, level := range levels {
		if strings.ContainsAny(level, "+#") {
			last := i == len(levels)-1
			if !wildcards || level != "+" && (level != "#" || !last) {
				return false
			}
		}
	}
	// Bytes that are not UTF-8, surrogates among them, do not survive.
	return string([]rune(s)) == s && !strings.ContainsRune(s, 0)
}

// matchCases are the examples of the standard (MQTT 5.0, 4.7.1 to 4.7.3), and
// what is easily got wrong beside them.
var matchCases = []struct {
	filter, topic string
	want          bool
}{
	{"sport/tennis/player1/#", "sport/tennis/player1", true},
	{"sport/tennis/player1/#", "sport/tennis/player1/ranking", true},
	{"sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true},
	{"sport/tennis/player1/#", "sport/tennis/player10", false},
	{"sport/tennis/player1/#", "sport/tennis", false},
	{"sport/#", "sport", true},
	{"#", "sport", true},
	{"#", "sport/tennis/player1", true},
	{"#", "/", true},
	{"+/tennis/#", "sport/tennis", true},
	{"+/tennis/#", "sport/tennis/player1/ranking", true},
	{"+/tennis/#", "sport/golf", false},
	{"sport/tennis/+", "sport/tennis/player1", true},
	{"sport/tennis/+", "sport/tennis/player2", true},
	{"sport/tennis/+", "sport/tennis/player1/ranking", false},
	{"sport/+", "sport", false},
	{"sport/+", "sport/", true},
	{"sport/+/player1", "sport/tennis/player1", true},
	{"sport/+/player1", "sport/tennis/golf/player1", false},
	{"+", "finance", true},
	{"+", "/finance", false},
	{"+/+", "/finance", true},
	{"/+", "/finance", true},
	{"/finance", "/finance", true},
	{"/finance", "finance", false},
	{"finance", "/finance", false},
	{"#", "$SYS/", false},
	{"#", "$SYS", false},
	{"#", "$", false},
	{"+", "$SYS", false},
	{"+/#", "$SYS/uptime", false},
	{"+/monitor/Clients", "$SYS/monitor/Clients", false},
	{"+/+/Clients", "$SYS/monitor/Clients", false},
	{"$SYS/#", "$SYS/", true},
	{"$SYS/#", "$SYS", true},
	{"$SYS/#", "$SYS/monitor/Clients", true},
	{"$SYS/monitor/+", "$SYS/monitor/Clients", true},
	{"$SYS/+/Clients", "$SYS/monitor/Clients", true},
	{"$SYS/monitor/Clients", "$SYS/monitor/Clients", true},
	{"#", "a/$b", true},
	{"a/+", "a/$b", true},
	{"a/#", "a/$b", true},
	{"#", "/$b", true},
	{"+/$b", "/$b", true},
	{"ACCOUNTS", "Accounts", false},
	{"Accounts payable", "Accounts payable", true},
	{"/", "/", true},
	{"+/+", "/", true},
	{"+", "/", false},
	{"/#", "/", true},
	{"/#", "a", false},
	{"//", "/", false},
	{"+/#", "foo", true},
	{"+/#", "foo/bar/baz", true},
	{"a/+/#", "a/b", true},
	{"a/+/#", "a", false},
	{"a/+/c/#", "a/b/c", true},
	{"a/+/c/#", "a/b/c/d/e", true},
	{"a/+/c/#", "a/b/d", false},
	{"a/b", "a/b/", false},
	{"a/+/+", "a/b", false},
	{"ä/+", "ä/ö", true},
}

func TestTopicMatch(t *testing.T) {
	for _, c := range matchCases {
		if got := naiveMatch(c.filter, c.topic); got != c.want {
			t.Errorf("naiveMatch(%q, %q) = %v, want %v", c.filter, c.topic, got, c.want)
		}
		if !validFilter(c.filter, 0, 0) || !validTopic(c.topic, 0, 0) {
			t.Errorf("%q and %q are not taken for filter and topic", c.filter, c.topic)
		}

		var x subIndex[int]
		x.add(c.filter, 1)
		visits := 0
		x.match(c.topic, func(int) { visits++ })
		if got := visits == 1; got != c.want || visits > 1 {
			t.Errorf("subscription %q: topic %q visited %d times, want match %v", c.filter, c.topic, visits, c.want)
		}

		var tree topicTree[int]
		tree.put(c.topic, 1)
		visits = 0
		tree.match(c.filter, func(topic string, v int) bool {
			if topic != c.topic || v != 1 {
				t.Errorf("filter %q visits %q, %d, want %q, 1", c.filter, topic, v, c.topic)
			}
			visits++
			return true
		})
		if got := visits == 1; got != c.want || visits > 1 {
			t.Errorf("filter %q: retained %q visited %d times, want match %v", c.filter, c.topic, visits, c.want)
		}
	}
}

func TestValidTopicAndFilter(t *testing.T) {
	long := strings.Repeat("x", 65535)
	for _, c := range []struct {
		s                   string
		maxBytes, maxLevels int
		topic, filter       bool
	}{
		{"", 0, 0, false, false},
		{"a", 0, 0, true, true},
		{"/", 0, 0, true, true},
		{"//", 0, 0, true, true},
		{" ", 0, 0, true, true},
		{"$SYS/a", 0, 0, true, true},
		{"#", 0, 0, false, true},
		{"+", 0, 0, false, true},
		{"/#", 0, 0, false, true},
		{"/+", 0, 0, false, true},
		{"+/", 0, 0, false, true},
		{"+/+", 0, 0, false, true},
		{"+/tennis/#", 0, 0, false, true},
		{"sport/+/player1", 0, 0, false, true},
		{"sport/tennis/#", 0, 0, false, true},
		{"sport/tennis#", 0, 0, false, false},
		{"sport/tennis/#/ranking", 0, 0, false, false},
		{"#/", 0, 0, false, false},
		{"##", 0, 0, false, false},
		{"#a", 0, 0, false, false},
		{"a#", 0, 0, false, false},
		{"sport+", 0, 0, false, false},
		{"+sport", 0, 0, false, false},
		{"a+/b", 0, 0, false, false},
		{"a/+b", 0, 0, false, false},
		{"++", 0, 0, false, false},
		{"+#", 0, 0, false, false},
		{"a\x00b", 0, 0, false, false},
		{"\x00", 0, 0, false, false},
		{"\x01\x7f", 0, 0, true, true}, // control characters "should not", but may
		{"größe/°C", 0, 0, true, true},
		{"\ufeffa", 0, 0, true, true}, // [MQTT-1.5.4-3]
		{"\U0001f600", 0, 0, true, true},
		{"\uffff", 0, 0, true, true},
		{"a\xff", 0, 0, false, false},
		{"\xc0\xaf", 0, 0, false, false},         // '/' in two bytes
		{"\xc0\x80", 0, 0, false, false},         // U+0000 in two bytes
		{"\xed\xa0\x80", 0, 0, false, false},     // U+D800
		{"\xed\xbf\xbf", 0, 0, false, false},     // U+DFFF
		{"\xf4\x90\x80\x80", 0, 0, false, false}, // U+110000
		{"a\xe2\x82", 0, 0, false, false},
		{long, 0, 0, true, true},
		{long + "x", 0, 0, false, false},
		{long + "x", 100000, 0, false, false},
		{"abcd", 4, 0, true, true},
		{"abcde", 4, 0, false, false},
		{"ää", 3, 0, false, false}, // bytes, not runes
		{"a/b/c", 0, 3, true, true},
		{"a/b/c/", 0, 3, false, false},
		{"///", 0, 3, false, false},
		{"+/b/#", 0, 3, false, true},
		{"+/b/c/#", 0, 3, false, false},
		{strings.Repeat("/", 65535), 0, 0, true, true},
		{strings.Repeat("/", 65535), 0, 200, false, false},
	} {
		name := c.s
		if len(name) > 30 {
			name = name[:30] + "…"
		}
		if got := validTopic(c.s, c.maxBytes, c.maxLevels); got != c.topic {
			t.Errorf("validTopic(%q, %d, %d) = %v, want %v", name, c.maxBytes, c.maxLevels, got, c.topic)
		}
		if got := validFilter(c.s, c.maxBytes, c.maxLevels); got != c.filter {
			t.Errorf("validFilter(%q, %d, %d) = %v, want %v", name, c.maxBytes, c.maxLevels, got, c.filter)
		}
	}
}

func TestSplitShare(t *testing.T) {
	for _, c := range []struct {
		filter, group, rest string
		shared, ok          bool
	}{
		{"a/b", "", "a/b", false, true},
		{"", "", "", false, true},
		{"a#", "", "a#", false, true}, // validFilter's business
		{"$share", "", "$share", false, true},
		{"$shared/g/x", "", "$shared/g/x", false, true},
		{"$SHARE/g/x", "", "$SHARE/g/x", false, true},
		{"/$share/g/x", "", "/$share/g/x", false, true},
		{"$share/consumer1/sport/tennis/+", "consumer1", "sport/tennis/+", true, true},
		{"$share/consumer1//finance", "consumer1", "/finance", true, true},
		{"$share/consumer2/sport/tennis/#", "consumer2", "sport/tennis/#", true, true},
		{"$share/g/#", "g", "#", true, true},
		{"$share/g//", "g", "/", true, true},
		{"$share/ö/$SYS/#", "ö", "$SYS/#", true, true},
		{"$share/", "", "", true, false},
		{"$share//", "", "", true, false},
		{"$share//x", "", "", true, false},
		{"$share/g", "", "", true, false},
		{"$share/g/", "", "", true, false},
		{"$share/g+/x", "", "", true, false},
		{"$share/+/x", "", "", true, false},
		{"$share/#", "", "", true, false},
		{"$share/#/x", "", "", true, false},
		{"$share/g/a#", "", "", true, false},
		{"$share/g/#/a", "", "", true, false},
		{"$share/g/a+/b", "", "", true, false},
		{"$share/g\x00/a", "", "", true, false},
		{"$share/\xff/a", "", "", true, false},
		{"$share/g/\xff", "", "", true, false},
	} {
		group, rest, shared, ok := splitShare(c.filter)
		if group != c.group || rest != c.rest || shared != c.shared || ok != c.ok {
			t.Errorf("splitShare(%q) = %q, %q, %v, %v, want %q, %q, %v, %v",
				c.filter, group, rest, shared, ok, c.group, c.rest, c.shared, c.ok)
		}
	}
}

// subModel is a subIndex and what it should hold.
type subModel struct {
	index subIndex[int]
	want  map[string]map[int]bool // filter -> values
}

func (m *subModel) add(filter string, v int) {
	if m.want == nil {
		m.want = make(map[string]map[int]bool)
	}
	if m.want[filter] == nil {
		m.want[filter] = make(map[int]bool)
	}
	m.want[filter][v] = true
	m.index.add(filter, v)
}

func (m *subModel) remove(t *testing.T, filter string, v int) {
	t.Helper()
	want := m.want[filter][v]
	delete(m.want[filter], v)
	if got := m.index.remove(filter, v); got != want {
		t.Fatalf("remove(%q, %d) = %v, want %v", filter, v, got, want)
	}
}

func (m *subModel) check(t *testing.T, topic string) {
	t.Helper()
	var got, want []int
	total := 0
	for filter, vs := range m.want {
		total += len(vs)
		if naiveMatch(filter, topic) {
			want = slices.AppendSeq(want, maps.Keys(vs))
		}
	}
	m.index.match(topic, func(v int) { got = append(got, v) })
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("match(%q) visits %v, want %v", topic, got, want)
	}
	if got := m.index.len(); got != total {
		t.Fatalf("len() = %d, want %d", got, total)
	}
}

// drain removes all and looks for what is left behind.
func (m *subModel) drain(t *testing.T) {
	t.Helper()
	for filter, vs := range m.want {
		for v := range vs {
			m.remove(t, filter, v)
		}
	}
	if got := m.index.len(); got != 0 {
		t.Errorf("len() of an emptied index = %d, want 0", got)
	}
	if m.index.literal != nil || wildUses(&m.index.wild) != 0 {
		t.Errorf("an emptied index still has %d literal filters and %d nodes", len(m.index.literal), wildUses(&m.index.wild))
	}
}

// treeModel is a topicTree and what it should hold.
type treeModel struct {
	tree topicTree[int]
	want map[string]int
}

func (m *treeModel) put(t *testing.T, topic string, v int) {
	t.Helper()
	if m.want == nil {
		m.want = make(map[string]int)
	}
	wantOld, wantReplaced := m.want[topic]
	m.want[topic] = v
	if old, replaced := m.tree.put(topic, v); old != wantOld || replaced != wantReplaced {
		t.Fatalf("put(%q) = %d, %v, want %d, %v", topic, old, replaced, wantOld, wantReplaced)
	}
}

func (m *treeModel) delete(t *testing.T, topic string) {
	t.Helper()
	wantOld, wantOK := m.want[topic]
	delete(m.want, topic)
	if old, ok := m.tree.delete(topic); old != wantOld || ok != wantOK {
		t.Fatalf("delete(%q) = %d, %v, want %d, %v", topic, old, ok, wantOld, wantOK)
	}
}

func (m *treeModel) check(t *testing.T, filter string) {
	t.Helper()
	want := make(map[string]int)
	for topic, v := range m.want {
		if naiveMatch(filter, topic) {
			want[topic] = v
		}
	}
	got := make(map[string]int)
	m.tree.match(filter, func(topic string, v int) bool {
		if _, twice := got[topic]; twice {
			t.Fatalf("match(%q) visits %q twice", filter, topic)
		}
		got[topic] = v
		return true
	})
	if !maps.Equal(got, want) {
		t.Fatalf("match(%q) visits %v, want %v", filter, got, want)
	}
	if stop := len(want) / 2; stop > 0 {
		visits := 0
		m.tree.match(filter, func(string, int) bool { visits++; return visits < stop })
		if visits != stop {
			t.Fatalf("match(%q) visits %d after visit number %d returned false", filter, visits, stop)
		}
	}
	for topic, want := range m.want {
		if v, ok := m.tree.get(topic); v != want || !ok {
			t.Fatalf("get(%q) = %d, %v, want %d, true", topic, v, ok, want)
		}
	}
	_, wantOK := m.want[filter]
	if v, ok := m.tree.get(filter); ok != wantOK {
		t.Fatalf("get(%q) = %d, %v, want %v", filter, v, ok, wantOK)
	}
	if got := m.tree.len(); got != len(m.want) {
		t.Fatalf("len() = %d, want %d", got, len(m.want))
	}
}

func (m *treeModel) drain(t *testing.T) {
	t.Helper()
	for topic := range maps.Clone(m.want) {
		m.delete(t, topic)
	}
	if got := m.tree.len(); got != 0 {
		t.Errorf("len() of an emptied tree = %d, want 0", got)
	}
	if kids := m.tree.root.kids; kids != nil {
		t.Errorf("an emptied tree still has children at its root: %v", *kids)
	}
}

// randomName makes short names over a small alphabet, so that they often meet,
// with now and then one of forty levels, so that some nodes have many children.
func randomName(r *rand.Rand, wildcards bool) string {
	levels := make([]string, 1+r.IntN(4))
	for i := range levels {
		switch n := r.IntN(8); {
		case wildcards && n == 0:
			levels[i] = "+"
		case wildcards && n == 1 && i == len(levels)-1:
			levels[i] = "#"
		case n == 2:
			levels[i] = fmt.Sprint(r.IntN(40))
		default:
			levels[i] = []string{"a", "b", "", "$x"}[r.IntN(4)]
		}
	}
	name := strings.Join(levels, "/")
	if name == "" {
		return "a"
	}
	return name
}

func TestSubIndexAgainstNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		var m subModel
		for range 600 {
			filter := randomName(r, true)
			// Three in four are added, later most are removed again.
			if r.IntN(4) > 0 {
				m.add(filter, r.IntN(80))
			} else {
				m.remove(t, filter, r.IntN(80))
			}
			m.check(t, randomName(r, false))
		}
		m.drain(t)
	}
}

func TestTopicTreeAgainstNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		var m treeModel
		for i := range 300 {
			if topic := randomName(r, false); r.IntN(3) > 0 {
				m.put(t, topic, i+1)
			} else {
				m.delete(t, topic)
			}
			m.check(t, randomName(r, true))
		}
		m.drain(t)
	}
}

// A fleet on one filter goes through the position map and back.
func TestSubIndexManySubscribers(t *testing.T) {
	for _, filter := range []string{"all", "all/#", "+"} {
		var x subIndex[*int]
		subs := make([]*int, 100_000)
		for i := range subs {
			subs[i] = new(int)
			x.add(filter, subs[i])
			x.add(filter, subs[i]) // is there already
		}
		if got := x.len(); got != len(subs) {
			t.Fatalf("%s: len() = %d, want %d", filter, got, len(subs))
		}
		// Without positions, removing them all is 5,000,000,000 comparisons: only
		// seconds here, but minutes on a gateway, so the clock is no test of it.
		set := x.literal[filter]
		if hasWildcard(filter) {
			set = x.makeWild(filter)
		}
		if got := len(set.pos); got != len(subs) {
			t.Errorf("%s: %d of %d subscribers have their position kept", filter, got, len(subs))
		}
		for i, s := range subs {
			if !x.remove(filter, s) || x.remove(filter, s) {
				t.Fatalf("%s: subscriber %d is not removed exactly once", filter, i)
			}
			if i%20_000 == 0 || i > len(subs)-50 {
				n := 0
				x.match("all", func(*int) { n++ })
				if want := len(subs) - i - 1; n != want {
					t.Fatalf("%s: %d subscribers visited, want %d", filter, n, want)
				}
			}
		}
		if x.len() != 0 || x.literal != nil || wildUses(&x.wild) != 0 {
			t.Errorf("%s: the index is not empty", filter)
		}
	}
}

// A level with a child for each device is a map, and a slice again when they
// are gone.
func TestManyChildren(t *testing.T) {
	const devices = 1000
	var tree topicTree[int]
	for i := range devices {
		tree.put(fmt.Sprint(i), i)
	}
	if got := len(tree.root.kids.many); got != devices {
		t.Errorf("the map has %d children, want %d", got, devices)
	}
	for i := 2; i < devices; i++ {
		tree.delete(fmt.Sprint(i))
	}
	if few, many := len(tree.root.kids.few), tree.root.kids.many; few != 2 || many != nil {
		t.Errorf("the slice has %d children and the map %d, want 2 and no map", few, len(many))
	}
	for i := range 2 {
		if v, ok := tree.get(fmt.Sprint(i)); v != i || !ok {
			t.Errorf("get(%d) = %d, %v, want %d, true", i, v, ok, i)
		}
	}
}

// What left must not be kept alive by the memory it was listed in.
func TestSubSetForgets(t *testing.T) {
	var s subSet[*int]
	vs := make([]*int, 1000)
	for i := range vs {
		vs[i] = new(int)
		s.add(vs[i])
	}
	for _, v := range vs[3:] {
		s.remove(v)
	}
	for i, v := range s.all[:cap(s.all)] {
		if (v != nil) != (i < 3) {
			t.Errorf("place %d of %d holds %v", i, cap(s.all), v)
		}
	}
	if got := cap(s.all); got > maxPlainSubs {
		t.Errorf("3 subscribers of once 1000 have room for %d", got)
	}
	if s.pos != nil {
		t.Errorf("3 subscribers have a position map")
	}
}

// The deepest names the wire can carry cost milliseconds. In a quadratic walk
// one of them was 12 s of CPU.
func TestDeepNames(t *testing.T) {
	start := time.Now()
	topic := strings.Repeat("/", maxTopicBytes)
	plus := strings.TrimSuffix(strings.Repeat("+/", maxTopicBytes/2), "/")
	shallow := strings.Repeat("/", maxTopicBytes/2-1)
	var x subIndex[int]
	for i, filter := range []string{topic, topic[:maxTopicBytes-1] + "#", plus, plus[:len(plus)-1] + "#", "#"} {
		x.add(filter, i)
		x.add(filter, i+10)
	}
	for _, c := range []struct {
		topic string
		want  int
	}{{topic, 8}, {shallow, 6}, {"a", 2}} {
		n := 0
		x.match(c.topic, func(int) { n++ })
		if n != c.want {
			t.Errorf("a topic of %d bytes has %d matches, want %d", len(c.topic), n, c.want)
		}
	}
	if !x.remove(plus, 2) || !x.remove(plus, 12) || x.remove(plus, 2) {
		t.Errorf("the deep filter is not removed exactly twice")
	}

	var tree topicTree[int]
	tree.put(topic, 1)
	tree.put(shallow, 2)
	for filter, want := range map[string]int{topic: 1, plus: 1, "#": 2, topic[:100] + "#": 2, plus + "/#": 2} {
		n := 0
		tree.match(filter, func(string, int) bool { n++; return true })
		if n != want {
			t.Errorf("a filter of %d bytes has %d matches, want %d", len(filter), n, want)
		}
	}
	if _, ok := tree.delete(topic); !ok {
		t.Errorf("the deep topic is not deleted")
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// Filters of '+' and literals mixed, as a hostile client would choose them: the
// walk is bounded by the nodes there are, not by 2^200.
func TestManyPlus(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	var x subIndex[int]
	levels := make([]string, 200)
	for i := range 2000 {
		for j := range levels {
			levels[j] = []string{"a", "+"}[r.IntN(2)]
		}
		x.add(strings.Join(levels, "/"), i)
	}
	topic := strings.Repeat("a/", 199) + "a"
	start := time.Now()
	n := 0
	x.match(topic, func(int) { n++ })
	if n != 2000 {
		t.Errorf("%d matches, want 2000", n)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	for j := range levels {
		levels[j] = "a"
	}
	var tree topicTree[int]
	for i := range levels {
		tree.put(strings.Join(levels[:i+1], "/"), i)
	}
	n = 0
	tree.match(strings.Repeat("+/", 200)+"#", func(string, int) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d topics, want 1", n)
	}
}

// A short level that stays must not keep the long name alive it came with.
func TestNamesAreFreed(t *testing.T) {
	const n = 1000
	tail := strings.Repeat("x", 60_000)
	var x subIndex[int]
	var tree topicTree[int]
	before := heapBytes()
	for i := range n {
		long, short := fmt.Sprintf("%d/%s", i, tail), fmt.Sprintf("%d/s", i)
		tree.put(long, i)
		tree.put(short, i)
		tree.delete(long)
		x.add("+/"+long, i)
		x.add("+/"+short, i)
		x.remove("+/"+long, i)
	}
	if got := heapBytes() - before; got > 5_000_000 {
		t.Errorf("%d short names hold %d bytes", n, got)
	}
	runtime.KeepAlive(&x)
	runtime.KeepAlive(&tree)
}

// A topic that is put again is in memory once, in the string that came last.
func TestReplacedNamesAreFreed(t *testing.T) {
	const n = 200
	tail := strings.Repeat("x", 60_000)
	var tree topicTree[string]
	before := heapBytes()
	for range 3 {
		for i := range n {
			topic := fmt.Sprintf("%s/%d", tail, i)
			tree.put(topic, topic)
		}
	}
	if got := heapBytes() - before; got > n*len(tail)*3/2 {
		t.Errorf("%d names of %d bytes hold %d bytes", n, len(tail), got)
	}
	runtime.KeepAlive(&tree)
}

func TestMatchDoesNotAllocate(t *testing.T) {
	x, tree := benchIndexes()
	n := 0
	visit := func(*int) { n++ }
	visitTopic := func(string, *int) bool { n++; return true }
	for name, f := range map[string]func(){
		"subIndex.match":    func() { x.match("site/7/sensor/42/temp", visit) },
		"subIndex.match $":  func() { x.match("$SYS/uptime", visit) },
		"topicTree.match":   func() { tree.match("+/+/sensor/42/#", visitTopic) },
		"topicTree.match #": func() { tree.match("#", visitTopic) },
		"topicTree.get":     func() { tree.get("site/7/sensor/42/temp") },
		"validTopic":        func() { validTopic("site/7/größe", 100, 10) },
		"splitShare":        func() { splitShare("$share/g/site/7/größe") },
	} {
		if got := testing.AllocsPerRun(20, f); got != 0 {
			t.Errorf("%s allocates %v times", name, got)
		}
	}
}

// splitOps cuts fuzz data into lines of a byte that says what to do and a name.
func splitOps(data []byte) (ops []byte, names []string) {
	for line := range bytes.SplitSeq(data, []byte{'\n'}) {
		if len(line) > 1 && len(ops) < 100 {
			ops, names = append(ops, line[0]), append(names, string(line[1:]))
		}
	}
	return ops, names
}

// seedOps are the examples as fuzz data.
func seedOps(f *testing.F, name func(i int) string, query func(i int) string) {
	var all []byte
	for i := range matchCases {
		op := fmt.Appendf(nil, "%c%s\n", "Aa~1"[i%4], name(i))
		f.Add(op, query(i))
		all = append(all, op...)
		f.Add(all, query(i))
	}
}

func FuzzSubIndex(f *testing.F) {
	seedOps(f, func(i int) string { return matchCases[i].filter }, func(i int) string { return matchCases[i].topic })
	f.Fuzz(func(t *testing.T, data []byte, topic string) {
		if !validTopic(topic, 0, 0) {
			return
		}
		var m subModel
		ops, filters := splitOps(data)
		for i, filter := range filters {
			if !validFilter(filter, 0, 0) {
				continue
			}
			// The low bit says add or remove, the others how many.
			for v := range 1 + int(ops[i]>>1)%64 {
				if ops[i]&1 == 1 {
					m.add(filter, v)
				} else {
					m.remove(t, filter, v)
				}
			}
			m.check(t, topic)
		}
		m.drain(t)
	})
}

func FuzzTopicTree(f *testing.F) {
	seedOps(f, func(i int) string { return matchCases[i].topic }, func(i int) string { return matchCases[i].filter })
	f.Fuzz(func(t *testing.T, data []byte, filter string) {
		if !validFilter(filter, 0, 0) {
			return
		}
		var m treeModel
		ops, topics := splitOps(data)
		for i, topic := range topics {
			if !validTopic(topic, 0, 60_000) {
				continue
			}
			// As in FuzzSubIndex; the many are children of the topic.
			for v := range 1 + int(ops[i]>>1)%16 {
				name := topic
				if v > 0 {
					name += fmt.Sprint("/", v)
				}
				if ops[i]&1 == 1 {
					m.put(t, name, i+1)
				} else {
					m.delete(t, name)
				}
			}
			m.check(t, filter)
		}
		m.drain(t)
	})
}

func FuzzValidFilter(f *testing.F) {
	for _, c := range matchCases {
		f.Add(c.filter, 0, 0)
		f.Add("$share/group/"+c.filter, 20, 3)
	}
	for _, s := range []string{"", "a#", "a+/b", "$share//x", "$share/g/", "$share/+/x", "\xed\xa0\x80", "a\x00", "\xc0\xaf", "\ufeff/ö/\U0001f600"} {
		f.Add(s, 0, 0)
	}
	f.Fuzz(func(t *testing.T, s string, maxBytes, maxLevels int) {
		maxBytes, maxLevels = max(maxBytes, 0), max(maxLevels, 0)
		if got, want := validFilter(s, maxBytes, maxLevels), naiveValid(s, maxBytes, maxLevels, true); got != want {
			t.Errorf("validFilter(%q, %d, %d) = %v, want %v", s, maxBytes, maxLevels, got, want)
		}
		if got, want := validTopic(s, maxBytes, maxLevels), naiveValid(s, maxBytes, maxLevels, false); got != want {
			t.Errorf("validTopic(%q, %d, %d) = %v, want %v", s, maxBytes, maxLevels, got, want)
		}
		group, rest, shared, ok := splitShare(s)
		parts := strings.SplitN(s, "/", 3)
		wantShared := len(parts) > 1 && parts[0] == "$share"
		wantOK := !wantShared || len(parts) == 3 && naiveValid(parts[1], 0, 0, false) && naiveValid(parts[2], 0, 0, true)
		if shared != wantShared || ok != wantOK {
			t.Errorf("splitShare(%q) = shared %v, ok %v, want %v, %v", s, shared, ok, wantShared, wantOK)
		}
		if back := "$share/" + group + "/" + rest; shared && ok && back != s || !shared && rest != s {
			t.Errorf("splitShare(%q) = %q, %q", s, group, rest)
		}
	})
}

// benchIndexes holds 5,000 topics of a plant, each subscribed to and retained,
// and a few wildcard filters.
func benchIndexes() (*subIndex[*int], *topicTree[*int]) {
	var x subIndex[*int]
	var tree topicTree[*int]
	for site := range 10 {
		for sensor := range 250 {
			for _, what := range []string{"temp", "state"} {
				topic := fmt.Sprintf("site/%d/sensor/%d/%s", site, sensor, what)
				x.add(topic, new(int))
				tree.put(topic, new(int))
			}
		}
	}
	for _, filter := range []string{"a/+/c/#", "alarm/#", "+/cmd", "$SYS/#"} {
		x.add(filter, new(int))
	}
	tree.put("$SYS/uptime", new(int))
	return &x, &tree
}

func BenchmarkSubIndexMatch(b *testing.B) {
	x, _ := benchIndexes()
	for _, c := range []struct{ name, topic string }{
		{"literal", "site/7/sensor/42/temp"},
		{"wildcard", "a/b/c/d/e"},
		{"none", "other/7/sensor/42/temp"},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				x.match(c.topic, func(*int) { n++ })
			}
		})
	}
}

func BenchmarkTopicTree(b *testing.B) {
	_, tree := benchIndexes()
	b.Run("get", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tree.get("site/7/sensor/42/temp")
		}
	})
	v := new(int)
	b.Run("put", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tree.put("site/7/sensor/42/temp", v)
		}
	})
	for _, filter := range []string{"site/7/sensor/42/temp", "site/+/sensor/42/#", "#"} {
		b.Run("match "+strings.ReplaceAll(filter, "/", "_"), func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				tree.match(filter, func(string, *int) bool { n++; return true })
			}
		})
	}
}

func BenchmarkValidTopic(b *testing.B) {
	for _, topic := range []string{"site/7/sensor/42/temp", "größe/°C/küche/ofen/3"} {
		b.Run(fmt.Sprint(len(topic)), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				validTopic(topic, 1000, 100)
			}
		})
	}
}

// BenchmarkIndexMemory reports the bytes that each of 100,000 topics costs, for
// a tree of 5 levels with 2 topics at each sensor and for one flat level;
// without the topic's own string, which the holder has anyway.
func BenchmarkIndexMemory(b *testing.B) {
	plant, flat := make([]string, 100_000), make([]string, 100_000)
	for i := range plant {
		plant[i] = fmt.Sprintf("site/%d/sensor/%d/%s", i/2%50, i/100, []string{"temp", "state"}[i%2])
		flat[i] = fmt.Sprintf("device-%d", i)
	}
	v := new(int)
	report := func(name string, topics []string, fill func([]string) any) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				before := heapBytes()
				kept := fill(topics)
				b.ReportMetric(float64(heapBytes()-before)/float64(len(topics)), "B/topic")
				runtime.KeepAlive(kept)
			}
		})
	}
	tree := func(topics []string) any {
		t := new(topicTree[*int])
		for _, topic := range topics {
			t.put(topic, v)
		}
		return t
	}
	subs := func(topics []string) any {
		x := new(subIndex[*int])
		for _, topic := range topics {
			x.add(topic, v)
		}
		return x
	}
	plain := func(topics []string) any {
		m := make(map[string]*int)
		for _, topic := range topics {
			m[topic] = v
		}
		return m
	}
	report("topicTree-plant", plant, tree)
	report("topicTree-flat", flat, tree)
	report("subIndex-literal", plant, subs)
	report("map", plant, plain)
}

func heapBytes() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// BenchmarkMatchWorst is the dearest match that one client can arrange: the
// filters that max_subscriptions allows, as deep as max_topic_levels allows,
// all different, and a topic that meets every node of them. It shows the cost
// of a node; there can be no more visits than nodes.
func BenchmarkMatchWorst(b *testing.B) {
	cfg := DefaultConfig()
	r := rand.New(rand.NewPCG(7, 8))
	var x subIndex[int]
	levels := make([]string, cfg.MaxTopicLevels)
	nodes := 1
	seen := make(map[string]bool)
	for i := range cfg.MaxSubscriptions {
		for j := range levels {
			levels[j] = []string{"a", "+"}[r.IntN(2)]
		}
		filter := strings.Join(levels, "/")
		x.add(filter, i)
		for j := range len(filter) + 1 {
			if j == len(filter) || filter[j] == '/' {
				if !seen[filter[:j]] {
					seen[filter[:j]] = true
					nodes++
				}
			}
		}
	}
	seen = nil
	topic := strings.Repeat("a/", len(levels)-1) + "a"
	for b.Loop() {
		n := 0
		x.match(topic, func(int) { n++ })
		if n != x.len() {
			b.Fatalf("%d matches, want %d", n, x.len())
		}
	}
	b.ReportMetric(float64(nodes), "nodes")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(nodes), "ns/node")
}
