package auth

import (
	"strings"
	"testing"
)

func TestPassword(t *testing.T) {
	first, err := HashPassword("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(first, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("got %s, want a PHC string of 19 MiB, two passes, one thread", first)
	}
	second, err := HashPassword("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	if first == second {
		t.Error("the same password has the same hash twice: the salt is not random")
	}
	for password, want := range map[string]bool{"correct horse": true, "correct hors": false, "": false} {
		if got, err := VerifyPassword(first, password); err != nil || got != want {
			t.Errorf("%q: got %v, %v, want %v", password, got, err, want)
		}
	}
	if _, err := HashPassword(""); err == nil {
		t.Error("an empty password was hashed")
	}
}

// A hash of the reference implementation, with other costs than ours.
func TestVerifyReferenceHash(t *testing.T) {
	const hash = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
	if ok, err := VerifyPassword(hash, "password"); err != nil || !ok {
		t.Errorf("got %v, %v, want true", ok, err)
	}
}

func TestVerifyRefuses(t *testing.T) {
	const salt, key = "c29tZXNhbHQ", "CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
	if _, err := VerifyPassword("$argon2id$v=19$m=64,t=1,p=1$"+salt+"$"+key, "password"); err != nil {
		t.Fatalf("what all below differ from: %v", err)
	}
	for _, hash := range []string{
		"",
		"plain text",
		"$argon2i$v=19$m=64,t=1,p=1$" + salt + "$" + key,
		"$argon2id$v=16$m=64,t=1,p=1$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=1$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=1,p=1 $" + salt + "$" + key,
		"$argon2id$v=19$m=+64,t=1,p=1$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=0,p=1$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=17,p=1$" + salt + "$" + key,
		"$argon2id$v=19$m=7,t=1,p=1$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=1,p=0$" + salt + "$" + key,
		"$argon2id$v=19$m=64,t=1,p=256$" + salt + "$" + key,
		"$argon2id$v=19$m=4194304,t=1,p=1$" + salt + "$" + key, // 4 GiB
		"$argon2id$v=19$m=64,t=1,p=1$c2FsdA$" + key,
		"$argon2id$v=19$m=64,t=1,p=1$" + salt + "$" + "CTFh",
		"$argon2id$v=19$m=64,t=1,p=1$" + salt + "$",
		"$argon2id$v=19$m=64,t=1,p=1$" + salt + "$" + key + "$",
	} {
		if ok, err := VerifyPassword(hash, "password"); err == nil || ok {
			t.Errorf("%q: got %v, %v, want an error", hash, ok, err)
		}
	}
}

// A sign-in under a name that nobody has takes as long as any.
func TestNobodysHash(t *testing.T) {
	p, err := parsePHC(nobodysHash)
	if err != nil {
		t.Fatal(err)
	}
	if p.memory != hashMemory || p.passes != hashPasses || p.threads != hashThreads || len(p.key) != keyBytes || len(p.salt) != saltBytes {
		t.Errorf("got %+v, want the costs of a new hash", p)
	}
}

func FuzzParsePHC(f *testing.F) {
	f.Add(nobodysHash)
	f.Add("$argon2id$v=19$m=4294967295,t=4294967295,p=255$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5Q")
	f.Fuzz(func(t *testing.T, hash string) {
		p, err := parsePHC(hash)
		if err == nil && (p.memory > mostMemory || p.passes > mostPasses || p.threads < 1 || len(p.salt) < 8 || len(p.key) < 16) {
			t.Errorf("accepted %q", hash)
		}
	})
}
