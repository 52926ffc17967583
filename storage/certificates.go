package storage

import (
	"context"
	"time"
)

// Certificate is a certificate with its private key, kept in the database.
type Certificate struct {
	Name string
	// Own: the gateway has made it, and makes it anew when it is time.
	Own  bool
	Made time.Time // when it was put here, to the millisecond
	// Chain is the certificate in PEM, and behind it those that lead to a known
	// one. Key is its private key in PEM.
	Chain, Key []byte
}

// PutCertificate adds c, or replaces the one of its name.
func (db *DB) PutCertificate(ctx context.Context, c Certificate) error {
	_, err := db.write.ExecContext(ctx, `
		INSERT INTO certificate (name, own, made, chain, key) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET own = excluded.own, made = excluded.made, chain = excluded.chain, key = excluded.key`,
		c.Name, c.Own, millis(c.Made), blob(c.Chain), blob(c.Key))
	return wrap(err, "put certificate")
}

// Certificate returns the certificate of that name, or ErrNotFound.
func (db *DB) Certificate(ctx context.Context, name string) (Certificate, error) {
	c := Certificate{Name: name}
	var made int64
	err := db.read.QueryRowContext(ctx, `SELECT own, made, chain, key FROM certificate WHERE name = ?`, name).
		Scan(&c.Own, &made, &c.Chain, &c.Key)
	if err != nil {
		return Certificate{}, wrap(err, "read certificate")
	}
	c.Made = fromMillis(made)
	return c, nil
}

// DeleteCertificate deletes the certificate of that name. It returns ErrNotFound
// if there is none.
func (db *DB) DeleteCertificate(ctx context.Context, name string) error {
	res, err := db.write.ExecContext(ctx, `DELETE FROM certificate WHERE name = ?`, name)
	return affected(res, err, "delete certificate")
}
