package broker

import (
	"context"
	"fmt"
	"testing"

	"penstock/storage"
)

func TestLogins(t *testing.T) {
	var l logins
	if l.has("hash", []byte("secret")) {
		t.Error("known before it was added")
	}
	l.add("hash", []byte("secret"))
	for _, tc := range []struct {
		hash, password string
		want           bool
	}{
		{"hash", "secret", true},
		{"hash", "Secret", false},
		{"hash", "", false},
		{"other", "secret", false},
		{"hashs", "ecret", false},
	} {
		if got := l.has(tc.hash, []byte(tc.password)); got != tc.want {
			t.Errorf("%s, %s: got %v, want %v", tc.hash, tc.password, got, tc.want)
		}
	}
	for i := range maxLogins + 10 {
		l.add("hash", fmt.Append(nil, i))
	}
	if len(l.known) != maxLogins {
		t.Errorf("%d logins are remembered, want %d", len(l.known), maxLogins)
	}
}

// Who signed in once gets in again while all the hashing is taken; a wrong
// password, and the right one once it was changed, do not.
func TestKnownLoginDoesNotWait(t *testing.T) {
	s := start(t, t.TempDir())
	put := func(password string, create bool) {
		t.Helper()
		hash, err := HashPassword(password)
		if err == nil {
			err = s.db.PutCredential(context.Background(), storage.Credential{Username: "u", Hash: hash}, create)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put("right", true)
	hello := func(password string) connectOptions {
		return connectOptions{id: "c", clean: true, user: "u", password: password}
	}
	s.connect(hello("right"))
	s.b.hashing <- struct{}{} // somebody else's, for long
	s.connect(hello("right"))
	<-s.b.hashing
	put("new", false)
	for _, password := range []string{"right", "wrong"} {
		o := hello(password)
		o.version = 4
		c := s.dial()
		c.send(connectPacket(o))
		if _, body := c.read(); body[1] != 4 {
			t.Errorf("%s: got return code %d, want 4", password, body[1])
		}
	}
	s.connect(hello("new"))
}
