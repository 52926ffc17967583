package broker

import (
	"net/netip"
	"strings"

	"penstock/storage"
)

// principal is who a connection belongs to, as rights see it.
type principal struct {
	username string
	clientID string
	address  netip.Addr
}

type action byte

const (
	actionPublish action = 1 << iota
	actionSubscribe
	actionReceive
)

// acl is an ordered list of rules; the first that matches decides, and where
// none does access is allowed. It is immutable.
type acl struct {
	rules   []aclRule
	receive bool // some rule speaks of receiving
}

type aclRule struct {
	storage.ACLRule
	actions action
	net     netip.Prefix
}

// newACL makes an acl of stored rules. A rule with an address that cannot be
// read matches nobody if it allows, and everybody if it denies.
func newACL(rows []storage.ACLRule) *acl {
	a := &acl{}
	for _, row := range rows {
		r := aclRule{ACLRule: row}
		switch row.Action {
		case "publish":
			r.actions = actionPublish
		case "subscribe":
			r.actions = actionSubscribe
		case "receive":
			r.actions = actionReceive
		case "any":
			r.actions = actionPublish | actionSubscribe | actionReceive
		}
		if row.Address != "" {
			prefix, err := netip.ParsePrefix(row.Address)
			if err != nil {
				if row.Allow {
					continue
				}
				r.Address = ""
			}
			r.net = prefix
		}
		a.receive = a.receive || r.actions&actionReceive != 0 && !row.Allow
		a.rules = append(a.rules, r)
	}
	return a
}

// allows reports whether who may act on a topic name or, to subscribe, on a
// topic filter. Clients do not publish below "$", but for a bridge's state:
// those topics are the broker's own.
func (a *acl) allows(who principal, act action, topic string) bool {
	if act == actionPublish && strings.HasPrefix(topic, "$") && !bridgeState(topic) {
		return false
	}
	for i := range a.rules {
		r := &a.rules[i]
		if r.actions&act == 0 ||
			r.Username != "" && r.Username != who.username ||
			r.ClientID != "" && r.ClientID != who.clientID ||
			r.Address != "" && !r.net.Contains(who.address.WithZone("")) { // a rule knows no interfaces
			continue
		}
		filter, ok := expand(r.Filter, who)
		if ok && covers(filter, topic) {
			return r.Allow
		}
	}
	return true
}

// bridgeState reports whether topic is the one below "$" on which Mosquitto's
// bridges say, also with their will, whether they are connected:
// $SYS/broker/connection/NAME/state.
func bridgeState(topic string) bool {
	name, ok := strings.CutPrefix(topic, "$SYS/broker/connection/")
	name, state := strings.CutSuffix(name, "/state")
	return ok && state && name != "" && !strings.Contains(name, "/")
}

// expand replaces %u and %c in a rule's filter. A name that is empty, or that
// would change the filter's shape, makes the rule match nothing.
func expand(filter string, who principal) (string, bool) {
	if !strings.Contains(filter, "%") {
		return filter, true
	}
	for _, v := range [...]struct{ mark, value string }{{"%u", who.username}, {"%c", who.clientID}} {
		if !strings.Contains(filter, v.mark) {
			continue
		}
		if v.value == "" || strings.ContainsAny(v.value, "/+#%") {
			return "", false
		}
		filter = strings.ReplaceAll(filter, v.mark, v.value)
	}
	return filter, true
}

// covers reports whether everything that b can stand for, a topic name or a
// filter, is matched by the filter a.
func covers(a, b string) bool {
	if strings.HasPrefix(b, "$") && (strings.HasPrefix(a, "+") || strings.HasPrefix(a, "#")) {
		return false // [MQTT-4.7.2-1]
	}
	if a == "+/#" {
		a = "#" // the same topics, for every topic has a first level
	}
	for {
		al, arest, amore := strings.Cut(a, "/")
		if al == "#" {
			return true
		}
		bl, brest, bmore := strings.Cut(b, "/")
		if bl == "#" || al != "+" && al != bl {
			return false
		}
		switch {
		case !amore && !bmore:
			return true
		case amore && !bmore:
			return arest == "#" // "a/#" covers "a"
		case !amore:
			return false
		}
		a, b = arest, brest
	}
}
