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
	// Times are kept to the millisecond. Expires is pushed out while the token
	// is used; Ends is when it ends all the same, the zero time never.
	Expires, LastUsed, Created, Ends time.Time
	// Address is where it was given to, host:port.
	Address string
}

// PutToken adds t. It returns ErrConflict if its hash exists or its operator
// does not.
func (db *DB) PutToken(ctx context.Context, t Token) error {
	_, err := db.write.ExecContext(ctx, `
		INSERT INTO token (hash, operator, expires, last_used, created, ends, address) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		blob(t.Hash), t.Operator, millis(t.Expires), millis(t.LastUsed), millis(t.Created), millisOrNever(t.Ends), t.Address)
	return wrap(err, "put token")
}

// Token returns the token with that hash, expired or not, or ErrNotFound.
func (db *DB) Token(ctx context.Context, hash []byte) (Token, error) {
	t, err := scanToken(db.read.QueryRowContext(ctx, selectTokens+` WHERE hash = ?`, blob(hash)).Scan)
	if err != nil {
		return Token{}, wrap(err, "read token")
	}
	return t, nil
}

// Tokens returns all tokens, also those that have expired, by operator, and of
// each the newest first.
func (db *DB) Tokens(ctx context.Context) ([]Token, error) {
	rows, err := db.read.QueryContext(ctx, selectTokens+` ORDER BY operator, created DESC, hash`)
	if err != nil {
		return nil, wrap(err, "list tokens")
	}
	defer rows.Close()
	var list []Token
	for rows.Next() {
		t, err := scanToken(rows.Scan)
		if err != nil {
			return nil, wrap(err, "list tokens")
		}
		list = append(list, t)
	}
	return list, wrap(rows.Err(), "list tokens")
}

const selectTokens = `SELECT hash, operator, expires, last_used, created, ends, address FROM token`

func scanToken(scan func(...any) error) (t Token, err error) {
	var expires, lastUsed, created, ends int64
	err = scan(&t.Hash, &t.Operator, &expires, &lastUsed, &created, &ends, &t.Address)
	t.Expires, t.LastUsed, t.Created = fromMillis(expires), fromMillis(lastUsed), fromMillis(created)
	if ends != 0 {
		t.Ends = fromMillis(ends)
	}
	return t, err
}

// millisOrNever is millis, and 0 for the zero time.
func millisOrNever(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return millis(t)
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
	res, err := db.write.ExecContext(ctx, `DELETE FROM token WHERE expires <= ?1 OR ends <> 0 AND ends <= ?1`, millis(now))
	if err != nil {
		return 0, wrap(err, "delete expired tokens")
	}
	n, err := res.RowsAffected()
	return int(n), wrap(err, "delete expired tokens")
}
