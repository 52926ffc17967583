package storage

import (
	"context"
	"time"
)

// Token is the right of an operator to use the HTTP APIs without a password.
type Token struct {
	// Hash is the SHA-256 of the token, 32 bytes. The token itself is known
	// to its bearer only.
	Hash []byte
	// Operator is the name of an existing operator.
	Operator string
	// Expires and LastUsed are kept to the millisecond.
	Expires, LastUsed time.Time
}

// PutToken adds t. It returns ErrConflict if its hash exists or its operator
// does not.
func (db *DB) PutToken(ctx context.Context, t Token) error {
	_, err := db.write.ExecContext(ctx, `INSERT INTO token (hash, operator, expires, last_used) VALUES (?, ?, ?, ?)`,
		blob(t.Hash), t.Operator, millis(t.Expires), millis(t.LastUsed))
	return wrap(err, "put token")
}

// Token returns the token with that hash, expired or not, or ErrNotFound.
func (db *DB) Token(ctx context.Context, hash []byte) (Token, error) {
	t := Token{Hash: hash}
	var expires, lastUsed int64
	err := db.read.QueryRowContext(ctx, `SELECT operator, expires, last_used FROM token WHERE hash = ?`, blob(hash)).
		Scan(&t.Operator, &expires, &lastUsed)
	if err != nil {
		return Token{}, wrap(err, "read token")
	}
	t.Expires, t.LastUsed = fromMillis(expires), fromMillis(lastUsed)
	return t, nil
}

// TouchToken notes that the token was used and when it now expires. It returns
// ErrNotFound if the token has ended meanwhile, and never brings it back.
func (db *DB) TouchToken(ctx context.Context, hash []byte, lastUsed, expires time.Time) error {
	res, err := db.write.ExecContext(ctx, `UPDATE token SET last_used = ?, expires = ? WHERE hash = ?`,
		millis(lastUsed), millis(expires), blob(hash))
	return affected(res, err, "touch token")
}

// DeleteToken ends a token. It returns ErrNotFound if there is none.
func (db *DB) DeleteToken(ctx context.Context, hash []byte) error {
	res, err := db.write.ExecContext(ctx, `DELETE FROM token WHERE hash = ?`, blob(hash))
	return affected(res, err, "delete token")
}

// DeleteExpiredTokens ends every token whose time was up at now, and returns how
// many there were.
func (db *DB) DeleteExpiredTokens(ctx context.Context, now time.Time) (int, error) {
	res, err := db.write.ExecContext(ctx, `DELETE FROM token WHERE expires <= ?`, millis(now))
	if err != nil {
		return 0, wrap(err, "delete expired tokens")
	}
	n, err := res.RowsAffected()
	return int(n), wrap(err, "delete expired tokens")
}
