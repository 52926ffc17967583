package api

import "penstock/api/auth"

// HashPassword returns the hash of an operator's password, an argon2id PHC
// string for storage.Operator. It takes 19 MiB and up to a second on a small
// gateway. An empty password is an error.
func HashPassword(password string) (string, error) { return auth.HashPassword(password) }

// VerifyPassword reports whether hash is the password's. It returns an error if
// hash is no argon2id PHC string.
func VerifyPassword(hash, password string) (bool, error) { return auth.VerifyPassword(hash, password) }
