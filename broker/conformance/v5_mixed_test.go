package conformance

import (
	"fmt"
	"testing"
)

// TestVersions5 lets clients of all versions talk to each other.
func TestVersions5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-3.3.2-3", "MQTT-3.3.2-7", "MQTT-3.1.2-5", "MQTT-3.1.2-23")
	s := start(t)
	raw := [][]byte{propByte(1, 1), propUser("a", "b"), propU32(2, 1000), propU16(35, 1), propStr(8, "r")}
	for _, pv := range []byte{3, 4, 5} {
		pub, _ := s.connect(t, connectFields{version: pv, clean: true, id: fmt.Sprint("pub", pv)})
		for _, sv := range []byte{3, 4, 5} {
			sub, _ := s.connect(t, connectFields{version: sv, clean: true, id: fmt.Sprint("sub", sv)})
			sub.subscribe(2, "t")
			for qos := range byte(3) {
				pub.publish(message{topic: "t", payload: "payload", qos: qos, raw: raw})
				m := sub.take()
				if m.topic != "t" || m.payload != "payload" || m.qos != qos {
					t.Errorf("%d to %d: got %+v", pv, sv, m)
				}
				if _, ok := find(t, m.props, 38); ok != (pv == 5 && sv == 5) {
					t.Errorf("%d to %d: got properties %v", pv, sv, m.props)
				}
			}
			sub.disconnect()
		}
	}
	t.Run("one session, several versions", func(t *testing.T) {
		pub, _ := s.connect(t, connectFields{version: 5, clean: true})
		c, _ := s.connect(t, connectFields{version: 4, id: "changes"})
		c.subscribe(2, "s/+")
		for i, version := range []byte{5, 3, 5, 4, 5} {
			c.disconnect()
			for qos := byte(1); qos <= 2; qos++ {
				pub.publish(message{topic: "s/x", payload: fmt.Sprint(i), qos: qos, raw: raw[:2]})
			}
			f := connectFields{version: version, id: "changes"}
			if version == 5 {
				f.props = [][]byte{propU32(17, 600)}
			}
			var a connack
			if c, a = s.connect(t, f); !a.present && version > 3 {
				t.Fatalf("version %d: session was lost", version)
			}
			for range 2 {
				m := c.take()
				if _, ok := find(t, m.props, 38); m.payload != fmt.Sprint(i) || ok != (version == 5) {
					t.Fatalf("version %d: got %+v, want %d", version, m, i)
				}
			}
		}
	})
}

// TestOverRestart5 restarts the broker in the middle of each exchange.
func TestOverRestart5(t *testing.T) {
	t.Parallel()
	covers5(t, "MQTT-4.4.0-1", "MQTT-4.3.2-3", "MQTT-4.3.3-3", "MQTT-4.3.3-5", "MQTT-4.3.3-6", "MQTT-4.3.3-8", "MQTT-4.3.3-10", "MQTT-3.1.2-23", "MQTT-3.3.1-1", "MQTT-3.8.3-3")
	dir := t.TempDir()
	keep := [][]byte{propU32(17, 600)}
	var s *server
	var sub, pub *client
	restart := func() {
		t.Helper()
		if s != nil {
			sub.drop() // or the broker would wait for them to take its farewell
			pub.drop()
			s.stop()
		}
		s = startIn(t, dir, nil)
		var a, b connack
		sub, a = s.connect(t, connectFields{version: 5, id: "sub", props: keep})
		pub, b = s.connect(t, connectFields{version: 5, id: "pub", props: keep})
		if a.present != b.present {
			t.Fatal("one session was kept and one was not")
		}
	}
	restart()
	sub.subscribe(2, "t", "end")
	pub.subscribe(2|4, "t")
	pub.publish(message{topic: "t", payload: "one", qos: 1})
	one := sub.receive()
	restart()
	if m := sub.receive(); m.id != one.id || !m.dup || m.payload != "one" {
		t.Errorf("got %+v, want %+v again", m, one)
	}
	sub.send(ackFrame(kindPuback, one.id))
	sub.ping()

	pub.send(pub.publishFrame(message{topic: "t", payload: "two", qos: 2, id: 9}))
	pub.ack(kindPubrec, 9)
	two := sub.receive()
	restart()
	pub.send(pub.publishFrame(message{topic: "t", payload: "two", qos: 2, id: 9, dup: true}))
	pub.ack(kindPubrec, 9)
	if m := sub.receive(); m.id != two.id || !m.dup || m.payload != "two" {
		t.Errorf("got %+v, want %+v again", m, two)
	}
	sub.send(ackFrame(kindPubrec, two.id))
	sub.ack(kindPubrel, two.id)
	restart()
	pub.send(pubrelFrame(9))
	if got := pub.ack(kindPubcomp, 9); got != 0 {
		t.Errorf("PUBCOMP: got reason %#x", got)
	}
	if got := sub.ack(kindPubrel, two.id); got != 0 {
		t.Errorf("PUBREL: got reason %#x", got)
	}
	sub.send(ackFrame(kindPubcomp, two.id))
	sub.ping()
	restart()
	pub.send(pub.publishFrame(message{topic: "t", payload: "three", qos: 2, id: 9}))
	pub.ack(kindPubrec, 9)
	pub.send(pubrelFrame(9))
	pub.ack(kindPubcomp, 9)
	sub.takePayloads("three") // and nothing before it
	pub.ping()
	if len(pub.stash) > 0 {
		t.Errorf("No Local was forgotten: got %v", pub.stash)
	}
}
