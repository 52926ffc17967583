package broker

import (
	"fmt"
	"testing"
)

func TestPublishSubscribe(t *testing.T) {
	for _, version := range []byte{3, 4, 5} {
		for qos := range byte(3) {
			t.Run(fmt.Sprintf("v%d qos%d", version, qos), func(t *testing.T) {
				s := start(t, t.TempDir())
				sub, present := s.connect(connectOptions{id: "sub", version: version, clean: true})
				if present {
					t.Error("session present for a new client")
				}
				if got := sub.subscribe(qos, "a/+"); got[0] != qos {
					t.Errorf("granted %d, want %d", got[0], qos)
				}
				pub, _ := s.connect(connectOptions{id: "pub", version: version, clean: true})
				for i := range 100 {
					pub.publish("a/b", fmt.Sprintf("m%d", i), qos, false)
				}
				sub.takeAll("m%d", 0, 100)
			})
		}
	}
}

func TestPersistentSession(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for qos := byte(1); qos < 3; qos++ {
			t.Run(fmt.Sprintf("v%d qos%d", version, qos), func(t *testing.T) {
				dir := t.TempDir()
				s := start(t, dir)
				opt := connectOptions{id: "sub", version: version, expiry: 3600}
				sub, _ := s.connect(opt)
				sub.subscribe(qos, "a/#")
				sub.disconnect()
				pub, _ := s.connect(connectOptions{id: "pub", version: version, clean: true})
				for i := range 50 {
					pub.publish("a/b", fmt.Sprintf("m%d", i), qos, false)
				}
				s.stop()
				s = start(t, dir)
				sub, present := s.connect(opt)
				if !present {
					t.Error("session is not present after a restart")
				}
				sub.takeAll("m%d", 0, 50)
				pub, _ = s.connect(connectOptions{id: "pub", version: version, clean: true})
				pub.publish("a/c", "m50", qos, false)
				sub.takeAll("m%d", 50, 1)
			})
		}
	}
}
