package broker

import (
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"penstock/storage"
)

// pbkdf2Iterations suits a small ARM: about 60 ms on a Pi Zero.
const pbkdf2Iterations = 20000

// maxPBKDF2Iterations bounds what a stored hash can make us compute.
const maxPBKDF2Iterations = 10_000_000

// HashPassword returns what is stored of a device's password:
// $pbkdf2-sha256$i=ITERATIONS$SALT$HASH, in unpadded base64.
func HashPassword(password string) (string, error) {
	salt := make([]byte, 16)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("make salt: %w", err)
	}
	key, err := pbkdf2.Key(sha256.New, password, salt, pbkdf2Iterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("hash password: %w", err)
	}
	b64 := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$pbkdf2-sha256$i=%d$%s$%s", pbkdf2Iterations, b64(salt), b64(key)), nil
}

// verifyPassword reports whether password is the one of which HashPassword
// made hash.
func verifyPassword(hash string, password []byte) (bool, error) {
	parts := strings.Split(hash, "$")
	if len(parts) != 5 || parts[1] != "pbkdf2-sha256" || !strings.HasPrefix(parts[2], "i=") {
		return false, errors.New("stored password hash is not one of ours")
	}
	iterations, err := strconv.Atoi(parts[2][2:])
	if err != nil || iterations < 1 || iterations > maxPBKDF2Iterations {
		return false, errors.New("stored password hash has an impossible iteration count")
	}
	salt, err := base64.RawStdEncoding.DecodeString(parts[3])
	if err != nil {
		return false, fmt.Errorf("stored password hash: salt: %w", err)
	}
	want, err := base64.RawStdEncoding.DecodeString(parts[4])
	if err != nil || len(want) != sha256.Size {
		return false, errors.New("stored password hash has a torn key")
	}
	got, err := pbkdf2.Key(sha256.New, string(password), salt, iterations, sha256.Size)
	if err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(got, want) == 1, nil
}

// authenticate decides on a CONNECT. It returns 0, or the reason code of the
// refusal and why.
func (b *Broker) authenticate(c *conn, hasUser bool, password []byte) (byte, string) {
	who := c.who
	if !hasUser {
		if c.ln.limits.anonymous == "all" || c.ln.limits.anonymous == "loopback" && who.address.IsLoopback() {
			return reasonSuccess, ""
		}
		return reasonNotAuthorized, "a user name and a password are needed here"
	}
	const unchecked = "the login could not be checked"
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	cred, err := b.db.Credential(ctx, who.username)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		return reasonBadCredentials, badLogin
	case err != nil:
		b.log.Error("device login could not be checked", "err", err, "client", who.clientID)
		return reasonUnavailable, unchecked
	}
	if b.logins.has(cred.Hash, password) {
		return reasonSuccess, ""
	}
	select {
	case b.hashing <- struct{}{}: // one at a time: a storm of logins must not take the machine
	default:
		c.queued = true
		timer := time.NewTimer(time.Until(c.deadline))
		defer timer.Stop()
		select {
		case b.hashing <- struct{}{}:
		case <-c.closing:
			return reasonUnavailable, unchecked
		case <-timer.C:
			b.plane.limit(limitLogins)
			return reasonBusy, "too many logins wait to be checked"
		}
	}
	ok, err := verifyPassword(cred.Hash, password)
	<-b.hashing
	if err != nil {
		b.log.Error("device login could not be checked", "err", err, "client", who.clientID, "username", who.username)
		return reasonUnavailable, unchecked
	}
	if !ok {
		return reasonBadCredentials, badLogin
	}
	b.logins.add(cred.Hash, password)
	return reasonSuccess, ""
}

// badLogin is the same for a wrong name and a wrong password, so that the
// answer does not say which names there are.
const badLogin = "user name or password is wrong"
