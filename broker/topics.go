package broker

import (
	"iter"
	"strings"
	"unicode/utf8"
)

// Topics and filters: who subscribed to a topic (subIndex), which retained
// topics a filter names (topicTree), and which strings are topics or filters
// at all. Nothing here locks, logs or stores. The holder of an index guards it
// with its own RWMutex: add, remove, put and delete want the write lock; match,
// get and len the read lock, held until the last visit has returned. A visit
// must not change the index it is called from.

const (
	// maxTopicBytes is what a length-prefixed string can carry [MQTT-4.7.3-3].
	// Whatever the limits are, nothing longer is valid: a topic given to
	// Publish never saw the wire.
	maxTopicBytes = 65535

	// maxPlainSubs is how many subscribers of one filter are searched one by
	// one; above, a subSet keeps their positions.
	maxPlainSubs = 32

	// maxPlainKids is how many children of a level are searched one by one;
	// above, a map finds them. A map of one entry takes some 250 bytes, and most
	// levels of a gateway's topics have a handful of children.
	maxPlainKids = 8
)

// cutLevel splits off the first level. more tells "a/" (an empty level
// follows) from "a" (none does).
func cutLevel(s string) (level, rest string, more bool) {
	if i := strings.IndexByte(s, '/'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// validTopic reports whether topic may be the name of a PUBLISH: not empty
// [MQTT-4.7.3-1], no wildcard [MQTT-3.3.2-2], no U+0000 [MQTT-4.7.3-2], well
// formed UTF-8 without surrogates [MQTT-1.5.4-1]. maxBytes and maxLevels bound
// it further; 0 leaves only the standard's own 65,535 bytes. A client's topic
// that replaces a Topic Alias is empty, and is not for this function.
func validTopic(topic string, maxBytes, maxLevels int) bool {
	if topic == "" || len(topic) > maxTopicBytes || maxBytes > 0 && len(topic) > maxBytes {
		return false
	}
	levels, ascii := 1, true
	for i := 0; i < len(topic); i++ {
		switch c := topic[i]; {
		case c == '/':
			levels++
		case c == 0, c == '+', c == '#':
			return false
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	return (maxLevels <= 0 || levels <= maxLevels) && (ascii || utf8.ValidString(topic))
}

// validFilter reports whether filter may be subscribed to: as validTopic, but
// with '+' alone in any level [MQTT-4.7.1-2] and '#' alone in the last
// [MQTT-4.7.1-1]; wildcards count as levels. It knows nothing of $share: split
// first, then ask about the rest.
func validFilter(filter string, maxBytes, maxLevels int) bool {
	if filter == "" || len(filter) > maxTopicBytes || maxBytes > 0 && len(filter) > maxBytes {
		return false
	}
	levels, ascii := 1, true
	for i := 0; i < len(filter); i++ {
		switch c := filter[i]; {
		case c == '/':
			levels++
		case c == 0:
			return false
		case c == '+', c == '#':
			if i > 0 && filter[i-1] != '/' {
				return false
			}
			if i < len(filter)-1 && (c == '#' || filter[i+1] != '/') {
				return false
			}
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	return (maxLevels <= 0 || levels <= maxLevels) && (ascii || utf8.ValidString(filter))
}

// splitShare takes $share/group/rest apart [MQTT-4.8.2-1] [MQTT-4.8.2-2].
// Anything that does not start with "$share/" is not shared: it is returned as
// rest, unchecked, with ok set. A shared filter is ok when its group is neither
// empty nor holds '/', '+' or '#', and its rest is a valid filter; limits on
// the rest are the caller's to check. When !ok, group and rest are empty.
func splitShare(filter string) (group, rest string, shared, ok bool) {
	rest, shared = strings.CutPrefix(filter, "$share/")
	if !shared {
		return "", filter, false, true
	}
	group, rest, _ = cutLevel(rest)
	// A group is one level of a topic name.
	if !validTopic(group, 0, 0) || !validFilter(rest, 0, 0) {
		return "", "", true, false
	}
	return group, rest, true, true
}

// levelNode is one level of a trie with a P in it. The root's own level is
// empty and means nothing.
type levelNode[P any] struct {
	level string
	kids  *levelKids[P] // nil for a leaf, which most nodes are
	data  P
}

// levelKids holds the children of a node: few, or many when it is not nil.
type levelKids[P any] struct {
	few  []*levelNode[P]
	many map[string]*levelNode[P]
}

func (n *levelNode[P]) child(level string) *levelNode[P] {
	k := n.kids
	if k == nil {
		return nil
	}
	if k.many != nil {
		return k.many[level]
	}
	for _, c := range k.few {
		if c.level == level {
			return c
		}
	}
	return nil
}

func (n *levelNode[P]) childCount() int {
	if n.kids == nil {
		return 0
	}
	return len(n.kids.few) + len(n.kids.many)
}

func (n *levelNode[P]) children() iter.Seq[*levelNode[P]] {
	return func(yield func(*levelNode[P]) bool) {
		if n.kids == nil {
			return
		}
		for _, c := range n.kids.few {
			if !yield(c) {
				return
			}
		}
		for _, c := range n.kids.many {
			if !yield(c) {
				return
			}
		}
	}
}

// attach adds c, whose level n does not have yet.
func (n *levelNode[P]) attach(c *levelNode[P]) {
	if n.kids == nil {
		n.kids = new(levelKids[P])
	}
	k := n.kids
	if k.many == nil && len(k.few) < maxPlainKids {
		k.few = append(k.few, c)
		return
	}
	if k.many == nil {
		k.many = make(map[string]*levelNode[P], 2*maxPlainKids)
		for _, f := range k.few {
			k.many[f.level] = f
		}
		k.few = nil
	}
	k.many[c.level] = c
}

// detach forgets the child called level. A map does not shrink, so it is given
// up for a slice well before it is empty, and for nothing with the last child.
func (n *levelNode[P]) detach(level string) {
	k := n.kids
	if k == nil {
		return
	}
	if k.many != nil {
		delete(k.many, level)
		if len(k.many) <= maxPlainKids/2 {
			for _, c := range k.many {
				k.few = append(k.few, c)
			}
			k.many = nil
		}
	} else {
		for i, c := range k.few {
			if c.level == level {
				last := len(k.few) - 1
				k.few[i], k.few[last] = k.few[last], nil
				k.few = k.few[:last]
				break
			}
		}
	}
	if n.childCount() == 0 {
		n.kids = nil
	}
}

// subSet is the subscribers of one filter, in no order.
type subSet[T comparable] struct {
	all []T
	pos map[T]int // where each is in all; nil while they are few
}

func (s *subSet[T]) find(v T) int {
	if s.pos != nil {
		if i, ok := s.pos[v]; ok {
			return i
		}
		return -1
	}
	for i, o := range s.all {
		if o == v {
			return i
		}
	}
	return -1
}

func (s *subSet[T]) add(v T) bool {
	if s.find(v) >= 0 {
		return false
	}
	s.all = append(s.all, v)
	switch {
	case s.pos != nil:
		s.pos[v] = len(s.all) - 1
	case len(s.all) > maxPlainSubs:
		s.pos = make(map[T]int, 2*maxPlainSubs)
		for i, o := range s.all {
			s.pos[o] = i
		}
	}
	return true
}

// remove puts the last into the place of v: a whole fleet that leaves one topic
// costs as much as it did to come.
func (s *subSet[T]) remove(v T) bool {
	i := s.find(v)
	if i < 0 {
		return false
	}
	last := len(s.all) - 1
	moved := s.all[last]
	s.all[i] = moved
	clear(s.all[last:]) // or the slice keeps a gone subscriber alive
	s.all = s.all[:last]
	if s.pos != nil {
		s.pos[moved] = i
		delete(s.pos, v) // after the line above: v may be the last
		if last <= maxPlainSubs/2 {
			s.pos = nil
		}
	}
	if cap(s.all) > maxPlainSubs && last <= cap(s.all)/4 {
		s.all = append(make([]T, 0, 2*last), s.all...)
	}
	return true
}

func (s *subSet[T]) visit(visit func(T)) {
	for _, v := range s.all {
		visit(v)
	}
}

// subIndex finds the subscriptions whose filter matches a topic. T stands for
// one subscription, that is one subscriber with one filter; usually a pointer.
// The zero value is an empty index. The holder locks; see the top of this file.
//
// Filters without a wildcard are entries of a map, found at once by the whole
// topic. The others are a trie, in which the filters "a/+" and "a/#" both end
// at or under the node "a".
type subIndex[T comparable] struct {
	literal map[string]*subSet[T]
	wild    levelNode[wildSubs[T]]
	count   int
}

// wildSubs is what a node of the trie of wildcard filters holds. A set is nil
// when it is empty.
type wildSubs[T comparable] struct {
	plus *levelNode[wildSubs[T]] // the child called "+"
	here *subSet[T]              // filters that end with this level
	hash *subSet[T]              // filters that end with "#" below this level
}

// len is the number of subscriptions.
func (x *subIndex[T]) len() int { return x.count }

func hasWildcard(filter string) bool {
	return strings.HasSuffix(filter, "#") || strings.IndexByte(filter, '+') >= 0
}

// add subscribes v to filter, which the caller has validated and freed of
// $share. A v that already has the filter is not added again. A filter without
// wildcards is kept as it is: it should not be a piece of a packet's buffer.
func (x *subIndex[T]) add(filter string, v T) {
	var set *subSet[T]
	if hasWildcard(filter) {
		set = x.makeWild(filter)
	} else if set = x.literal[filter]; set == nil {
		if x.literal == nil {
			x.literal = make(map[string]*subSet[T])
		}
		set = new(subSet[T])
		x.literal[filter] = set
	}
	if set.add(v) {
		x.count++
	}
}

// makeWild returns the subscribers of a wildcard filter, making them and the
// nodes on the way there. Each node has a copy of its level, for a piece of the
// filter would keep the whole filter in memory.
func (x *subIndex[T]) makeWild(filter string) *subSet[T] {
	n, set := &x.wild, (**subSet[T])(nil)
	for rest, more := filter, true; more; {
		var level string
		level, rest, more = cutLevel(rest)
		if level == "#" {
			set = &n.data.hash
			break
		}
		next := n.data.plus
		if level != "+" {
			next = n.child(level)
		}
		if next == nil {
			next = &levelNode[wildSubs[T]]{level: strings.Clone(level)}
			if level == "+" {
				n.data.plus = next
			} else {
				n.attach(next)
			}
		}
		n, set = next, &next.data.here
	}
	if *set == nil {
		*set = new(subSet[T])
	}
	return *set
}

// remove ends the subscription of v to filter, and reports whether there was
// one. What only this subscription needed of the index is freed.
func (x *subIndex[T]) remove(filter string, v T) bool {
	if hasWildcard(filter) {
		if !x.removeWild(filter, v) {
			return false
		}
	} else {
		set := x.literal[filter]
		if set == nil || !set.remove(v) {
			return false
		}
		if len(set.all) == 0 {
			delete(x.literal, filter)
		}
		if len(x.literal) == 0 {
			x.literal = nil
		}
	}
	x.count--
	return true
}

func (x *subIndex[T]) removeWild(filter string, v T) bool {
	// keep is the last node on the way that something else needs too, and cut
	// its child on the way: what to cut off if the filter's end comes empty.
	n, keep, cut := &x.wild, &x.wild, ""
	hash := false
	for rest, more := filter, true; more; {
		var level string
		level, rest, more = cutLevel(rest)
		if level == "#" {
			hash = true
			break
		}
		if n == &x.wild || wildUses(n) > 1 {
			keep, cut = n, level
		}
		if level == "+" {
			n = n.data.plus
		} else {
			n = n.child(level)
		}
		if n == nil {
			return false
		}
	}
	set := &n.data.here
	if hash {
		set = &n.data.hash
	}
	if *set == nil || !(*set).remove(v) {
		return false
	}
	if len((*set).all) > 0 {
		return true
	}
	*set = nil
	switch {
	case n == &x.wild || wildUses(n) > 0:
	case cut == "+":
		keep.data.plus = nil
	default:
		keep.detach(cut)
	}
	return true
}

// wildUses counts what a node of the wildcard filters is there for.
func wildUses[T comparable](n *levelNode[wildSubs[T]]) int {
	uses := n.childCount()
	if n.data.plus != nil {
		uses++
	}
	if n.data.here != nil {
		uses++
	}
	if n.data.hash != nil {
		uses++
	}
	return uses
}

// match calls visit for every subscription whose filter matches topic
// [MQTT-4.7.1-2] [MQTT-4.7.1-3], once each, in no order; a filter that starts
// with a wildcard does not match a topic that starts with '$' [MQTT-4.7.2-1].
// Nothing is allocated.
//
// Each level of a filter takes one level of the topic, so a node has one place
// in a topic and is visited at most once. A match costs one look into the map
// and at most min(2^depth, nodes the wildcard filters have within the topic's
// depth) visits, each of them reading one level of the topic: many '+' branch
// only as far as somebody subscribed to the branches.
func (x *subIndex[T]) match(topic string, visit func(T)) {
	if set := x.literal[topic]; set != nil {
		set.visit(visit)
	}
	if !strings.HasPrefix(topic, "$") {
		matchWild(&x.wild, topic, true, visit)
		return
	}
	// Past the first level wildcards match as everywhere.
	level, rest, more := cutLevel(topic)
	if n := x.wild.child(level); n != nil {
		matchWild(n, rest, more, visit)
	}
}

// matchWild visits what lies under n for the rest of a topic; more tells
// whether there is a rest. It calls itself only where a topic goes two ways.
func matchWild[T comparable](n *levelNode[wildSubs[T]], rest string, more bool, visit func(T)) {
	for {
		if n.data.hash != nil { // also without a rest: "a/#" matches "a"
			n.data.hash.visit(visit)
		}
		if !more {
			if n.data.here != nil {
				n.data.here.visit(visit)
			}
			return
		}
		plus := n.data.plus
		if n.kids == nil && plus == nil {
			return
		}
		var level string
		level, rest, more = cutLevel(rest)
		n = n.child(level)
		switch {
		case n == nil && plus == nil:
			return
		case n == nil:
			n = plus
		case plus != nil:
			matchWild(plus, rest, more, visit)
		}
	}
}

// topicTree maps topic names to values, and finds those that a filter matches.
// The zero value is an empty tree. The holder locks; see the top of this file.
//
// It is only a trie. With 100,000 topics and a pointer for value it takes 131
// bytes a topic where sensors have two topics each, 99 where all are on one
// level (64-bit; the topic's own string not counted). A map beside it would
// cost 35 more to answer get in half of its 60 ns.
type topicTree[V any] struct {
	root  levelNode[storedTopic[V]]
	count int
}

// storedTopic is the value of a node; topic is empty in a node without one.
type storedTopic[V any] struct {
	topic string
	value V
}

// len is the number of topics.
func (t *topicTree[V]) len() int { return t.count }

// get returns the value of topic.
func (t *topicTree[V]) get(topic string) (V, bool) {
	n := &t.root
	for rest, more := topic, true; more && n != nil; {
		var level string
		level, rest, more = cutLevel(rest)
		n = n.child(level)
	}
	if n == nil || n.data.topic == "" {
		var none V
		return none, false
	}
	return n.data.value, true
}

// put sets the value of topic, which must be valid (validTopic), and returns
// the value it had. The string is kept until the next put, and shared with a
// value that has it too: it should not be a piece of a packet's buffer. The
// levels are copies, or they would keep strings alive that were replaced.
func (t *topicTree[V]) put(topic string, v V) (old V, replaced bool) {
	n := &t.root
	for rest, more := topic, true; more; {
		var level string
		level, rest, more = cutLevel(rest)
		c := n.child(level)
		if c == nil {
			c = &levelNode[storedTopic[V]]{level: strings.Clone(level)}
			n.attach(c)
		}
		n = c
	}
	if n.data.topic != "" {
		old = n.data.value
		n.data = storedTopic[V]{topic, v}
		return old, true
	}
	n.data = storedTopic[V]{topic, v}
	t.count++
	return old, false
}

// delete forgets topic and returns the value it had. What only this topic
// needed of the tree is freed.
func (t *topicTree[V]) delete(topic string) (old V, ok bool) {
	// As in subIndex.removeWild.
	n, keep, cut := &t.root, &t.root, ""
	for rest, more := topic, true; more; {
		var level string
		level, rest, more = cutLevel(rest)
		if n == &t.root || n.data.topic != "" || n.childCount() > 1 {
			keep, cut = n, level
		}
		if n = n.child(level); n == nil {
			return old, false
		}
	}
	if n.data.topic == "" {
		return old, false
	}
	old = n.data.value
	n.data = storedTopic[V]{}
	t.count--
	if n.childCount() == 0 {
		keep.detach(cut)
	}
	return old, true
}

// match calls visit for every topic that filter matches, by the rules of
// subIndex.match, once each and in no order, until visit returns false. The
// filter must be valid (validFilter) and free of $share.
//
// A node is visited at most once: "#" costs the nodes under it, a '+' the
// children of the nodes it meets, a plain level one look in each of them.
func (t *topicTree[V]) match(filter string, visit func(topic string, v V) bool) {
	matchFilter(&t.root, filter, true, true, visit)
}

// matchFilter visits what lies under n for the rest of a filter; more tells
// whether there is a rest. It returns false when visit did.
func matchFilter[V any](n *levelNode[storedTopic[V]], rest string, more, root bool, visit func(string, V) bool) bool {
	for more {
		if rest == "#" {
			return visitAll(n, root, visit)
		}
		var level string
		level, rest, more = cutLevel(rest)
		if level == "+" {
			for c := range n.children() {
				if root && strings.HasPrefix(c.level, "$") {
					continue
				}
				if !matchFilter(c, rest, more, false, visit) {
					return false
				}
			}
			return true
		}
		if n = n.child(level); n == nil {
			return true
		}
		root = false
	}
	return n.data.topic == "" || visit(n.data.topic, n.data.value)
}

// visitAll visits the topics of n and of all under it; from the root, all but
// those that start with '$'.
func visitAll[V any](n *levelNode[storedTopic[V]], root bool, visit func(string, V) bool) bool {
	if n.data.topic != "" && !visit(n.data.topic, n.data.value) {
		return false
	}
	for c := range n.children() {
		if root && strings.HasPrefix(c.level, "$") {
			continue
		}
		if !visitAll(c, false, visit) {
			return false
		}
	}
	return true
}
