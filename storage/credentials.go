package storage

import (
	"context"
	"time"
)

// Credential lets MQTT clients connect under a user name.
type Credential struct {
	Username string
	// Hash is the password's hash, in whatever form the broker verifies.
	Hash    string
	Created time.Time // to the millisecond
}

// PutCredential adds c if create is true, and returns ErrConflict if its user
// name exists. Otherwise it changes the hash of the existing one, and returns
// ErrNotFound if there is none.
func (db *DB) PutCredential(ctx context.Context, c Credential, create bool) error {
	if create {
		_, err := db.write.ExecContext(ctx, `INSERT INTO credential (username, hash, created) VALUES (?, ?, ?)`,
			c.Username, c.Hash, millis(c.Created))
		return wrap(err, "add credential")
	}
	res, err := db.write.ExecContext(ctx, `UPDATE credential SET hash = ? WHERE username = ?`, c.Hash, c.Username)
	return affected(res, err, "change credential")
}

// Credential returns the credential of that user name, or ErrNotFound.
func (db *DB) Credential(ctx context.Context, username string) (Credential, error) {
	c := Credential{Username: username}
	var created int64
	err := db.read.QueryRowContext(ctx, `SELECT hash, created FROM credential WHERE username = ?`, username).
		Scan(&c.Hash, &created)
	if err != nil {
		return Credential{}, wrap(err, "read credential")
	}
	c.Created = fromMillis(created)
	return c, nil
}

// Credentials returns all credentials by user name.
func (db *DB) Credentials(ctx context.Context) ([]Credential, error) {
	rows, err := db.read.QueryContext(ctx, `SELECT username, hash, created FROM credential ORDER BY username`)
	if err != nil {
		return nil, wrap(err, "list credentials")
	}
	defer rows.Close()
	var list []Credential
	for rows.Next() {
		var c Credential
		var created int64
		if err := rows.Scan(&c.Username, &c.Hash, &created); err != nil {
			return nil, wrap(err, "list credentials")
		}
		c.Created = fromMillis(created)
		list = append(list, c)
	}
	return list, wrap(rows.Err(), "list credentials")
}

// DeleteCredential deletes the credential of that user name. It returns
// ErrNotFound if there is none.
func (db *DB) DeleteCredential(ctx context.Context, username string) error {
	res, err := db.write.ExecContext(ctx, `DELETE FROM credential WHERE username = ?`, username)
	return affected(res, err, "delete credential")
}
