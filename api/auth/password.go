package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"golang.org/x/crypto/argon2"
)

// The cost of a new hash: 19 MiB, two passes, one thread. It takes some 40 ms on
// a desktop and about a second on the smallest gateway, which is enough for the
// few operators; device logins are hashed otherwise.
const (
	hashMemory  = 19 * 1024 // KiB
	hashPasses  = 2
	hashThreads = 1
	saltBytes   = 16
	keyBytes    = 32
)

// The most a stored hash may ask for: a row that was tampered with must not take
// the gateway's memory.
const (
	mostMemory = 256 * 1024 // KiB
	mostPasses = 16
)

// nobodysHash is verified where there is no operator. Its key is no password's:
// nobody knows one whose hash is all zeros.
const nobodysHash = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

var errNoHash = errors.New("not an argon2id hash in PHC form")

// HashPassword returns the argon2id hash of a password as a PHC string. It
// takes 19 MiB and up to a second on a small gateway. An empty password is an
// error.
func HashPassword(password string) (string, error) {
	if password == "" {
		return "", errors.New("the password is empty")
	}
	salt := make([]byte, saltBytes)
	rand.Read(salt)            // never fails: it ends the process instead
	defer debug.FreeOSMemory() // the 19 MiB would stay with the process for minutes
	key := argon2.IDKey([]byte(password), salt, hashPasses, hashMemory, hashThreads, keyBytes)
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, hashMemory, hashPasses, hashThreads,
		b64.EncodeToString(salt), b64.EncodeToString(key)), nil
}

// VerifyPassword reports whether hash, a PHC string of any reasonable cost, is
// the password's. It returns an error if hash is none.
func VerifyPassword(hash, password string) (bool, error) {
	p, err := parsePHC(hash)
	if err != nil {
		return false, err
	}
	defer debug.FreeOSMemory()
	got := argon2.IDKey([]byte(password), p.salt, p.passes, p.memory, p.threads, uint32(len(p.key)))
	return subtle.ConstantTimeCompare(got, p.key) == 1, nil
}

type phc struct {
	memory, passes uint32
	threads        uint8
	salt, key      []byte
}

func parsePHC(hash string) (phc, error) {
	fields := strings.Split(hash, "$")
	if len(fields) != 6 || fields[0] != "" || fields[1] != "argon2id" {
		return phc{}, errNoHash
	}
	if fields[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return phc{}, fmt.Errorf("argon2id hash of another version: %s", fields[2])
	}
	var p phc
	// Written back, because Sscanf lets spaces, signs and a rest pass.
	_, err := fmt.Sscanf(fields[3], "m=%d,t=%d,p=%d", &p.memory, &p.passes, &p.threads)
	if err != nil || fmt.Sprintf("m=%d,t=%d,p=%d", p.memory, p.passes, p.threads) != fields[3] {
		return phc{}, errNoHash
	}
	if p.passes < 1 || p.passes > mostPasses || p.threads < 1 || p.memory < 8*uint32(p.threads) || p.memory > mostMemory {
		return phc{}, fmt.Errorf("argon2id hash asks for unreasonable costs: %s", fields[3])
	}
	b64 := base64.RawStdEncoding.Strict()
	if p.salt, err = b64.DecodeString(fields[4]); err != nil || len(p.salt) < 8 || len(p.salt) > 64 {
		return phc{}, errNoHash
	}
	if p.key, err = b64.DecodeString(fields[5]); err != nil || len(p.key) < 16 || len(p.key) > 64 {
		return phc{}, errNoHash
	}
	return p, nil
}
