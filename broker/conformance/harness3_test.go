package conformance

import (
	"errors"
	"os"
	"testing"

	"penstock/broker"
	"penstock/storage"
)

// v3 connects a client of MQTT 3.1.1 with a clean session.
func (s *server) v3(t testing.TB, id string) *client {
	t.Helper()
	c, _ := s.connect(t, connectFields{version: 4, clean: true, id: id})
	return c
}

// v3Session connects a client of MQTT 3.1.1 that keeps its session, and
// returns session present.
func (s *server) v3Session(t testing.TB, id string) (*client, bool) {
	t.Helper()
	c, a := s.connect(t, connectFields{version: 4, id: id})
	return c, a.present
}

// v5 connects a client of MQTT 5 with a clean start and these properties.
func (s *server) v5(t testing.TB, id string, properties ...[]byte) (*client, connack) {
	t.Helper()
	return s.connect(t, connectFields{version: 5, clean: true, id: id, props: properties})
}

// connectRaw is a CONNECT of MQTT 3.1.1 whose flags and payload need not fit.
func connectRaw(flags byte, payload ...[]byte) []byte {
	return frame(kindConnect<<4, str("MQTT"), []byte{4, flags}, u16(0), join(payload...))
}

// silent wants nothing to wait for the client: the next message that it gets
// is one that it sends to itself now.
func (c *client) silent() {
	c.t.Helper()
	const topic = "is anything there"
	c.subscribe(1, topic)
	c.publish(message{topic: topic, qos: 1})
	if m := c.take(); m.topic != topic {
		c.t.Fatalf("got %+v, want no message", m)
	}
	c.unsubscribe(topic)
}

// refused3 sends packets on a new connection of MQTT 3.1.1 that is connected,
// and wants it to be closed without an answer.
func (s *server) refused3(t testing.TB, what string, packets ...[]byte) {
	t.Helper()
	s.refusedAs(t, 4, what, packets...)
}

func (s *server) refusedAs(t testing.TB, version byte, what string, packets ...[]byte) {
	t.Helper()
	c, _ := s.connect(t, connectFields{version: version, clean: true, id: "refused"})
	c.refused(what, packets...)
}

// closedWithout sends a first packet and wants the connection to be closed
// without a CONNACK.
func (s *server) closedWithout(t testing.TB, what string, packets ...[]byte) {
	t.Helper()
	s.dial(t, 4).refused(what, packets...)
}

// refused sends packets and wants the connection to be closed without an
// answer. A PINGREQ behind them shows at once that it was not.
func (c *client) refused(what string, packets ...[]byte) {
	c.t.Helper()
	defer c.c.Close()
	c.trySend(join(packets...), []byte{kindPingreq << 4, 0})
	if p, err := c.tryRead(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("%s: % .40x: got packet %v, want the connection closed without an answer", what, join(packets...), p)
	}
}

// returns sends a CONNECT and wants a CONNACK with this return code, without
// session present, and the end.
func (s *server) returns(t testing.TB, code byte, connect []byte) {
	t.Helper()
	c := s.dial(t, 4)
	defer c.c.Close()
	c.send(connect)
	got := c.end()
	if len(got) != 1 || got[0].first != kindConnack<<4 || string(got[0].body) != string([]byte{0, code}) {
		t.Errorf("got %v, want a CONNACK with return code %d and the end", got, code)
	}
}

// device makes a device's login.
func device(t testing.TB, db *storage.DB, name, password string) {
	t.Helper()
	hash, err := broker.HashPassword(password)
	if err != nil {
		t.Fatal(err)
	}
	credential(t, db, name, hash)
}

func credential(t testing.TB, db *storage.DB, name, hash string) {
	t.Helper()
	if err := db.PutCredential(t.Context(), storage.Credential{Username: name, Hash: hash}, true); err != nil {
		t.Fatal(err)
	}
}

// rules makes a function that startIn prepares the database with.
func rules(t testing.TB, list ...storage.ACLRule) func(*storage.DB) error {
	return func(db *storage.DB) error { return db.ReplaceACLRules(t.Context(), list) }
}
