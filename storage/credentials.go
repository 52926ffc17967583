package storage

import (
	"context"
	"database/sql"
	"slices"
	"strings"
	"time"
)

// Credential lets MQTT clients connect under a user name: it is what the
// gateway knows of a device.
type Credential struct {
	Username string
	// Hash is the password's hash, in whatever form the broker verifies; empty
	// if the device has none and connects with a certificate.
	Hash string
	// Groups are the groups that the device is in, sorted, without repetition.
	Groups []string
	// Disabled: the device may not connect.
	Disabled bool
	Created  time.Time // to the millisecond
}

// PutCredential adds c if create is true, and returns ErrConflict if its user
// name exists. Otherwise it changes the existing one but for its time of
// creation, and returns ErrNotFound if there is none.
func (db *DB) PutCredential(ctx context.Context, c Credential, create bool) error {
	const doing = "put credential"
	tx, err := db.write.BeginTx(ctx, nil)
	if err != nil {
		return wrap(err, doing)
	}
	defer tx.Rollback()
	if create {
		_, err = tx.ExecContext(ctx, `INSERT INTO credential (username, hash, created, disabled) VALUES (?, ?, ?, ?)`,
			c.Username, c.Hash, millis(c.Created), c.Disabled)
		err = wrap(err, doing)
	} else {
		var res sql.Result
		res, err = tx.ExecContext(ctx, `UPDATE credential SET hash = ?, disabled = ? WHERE username = ?`, c.Hash, c.Disabled, c.Username)
		err = affected(res, err, doing)
	}
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM device_group WHERE username = ?`, c.Username); err != nil {
		return wrap(err, doing)
	}
	groups := slices.Clone(c.Groups)
	slices.Sort(groups)
	for _, name := range slices.Compact(groups) {
		if _, err := tx.ExecContext(ctx, `INSERT INTO device_group (username, name) VALUES (?, ?)`, c.Username, name); err != nil {
			return wrap(err, doing)
		}
	}
	return wrap(tx.Commit(), doing)
}

// SetCredentialHash changes the hash of a credential if it is still old, and
// leaves the rest of it. It returns ErrNotFound if there is none of the name, or
// its hash is another by now.
func (db *DB) SetCredentialHash(ctx context.Context, username, old, hash string) error {
	res, err := db.write.ExecContext(ctx, `UPDATE credential SET hash = ? WHERE username = ? AND hash = ?`, hash, username, old)
	return affected(res, err, "change credential")
}

// selectCredentials reads credentials with their groups. No name of a group has
// a control character.
const selectCredentials = `SELECT username, hash, disabled, created,
	coalesce((SELECT group_concat(name, char(31) ORDER BY name) FROM device_group g WHERE g.username = c.username), '') FROM credential c`

func scanCredential(scan func(...any) error) (c Credential, err error) {
	var created int64
	var groups string
	err = scan(&c.Username, &c.Hash, &c.Disabled, &created, &groups)
	c.Created = fromMillis(created)
	if groups != "" {
		c.Groups = strings.Split(groups, "\x1f")
	}
	return c, err
}

// Credential returns the credential of that user name, or ErrNotFound.
func (db *DB) Credential(ctx context.Context, username string) (Credential, error) {
	c, err := scanCredential(db.read.QueryRowContext(ctx, selectCredentials+` WHERE username = ?`, username).Scan)
	if err != nil {
		return Credential{}, wrap(err, "read credential")
	}
	return c, nil
}

// Credentials returns all credentials by user name.
func (db *DB) Credentials(ctx context.Context) ([]Credential, error) {
	rows, err := db.read.QueryContext(ctx, selectCredentials+` ORDER BY username`)
	if err != nil {
		return nil, wrap(err, "list credentials")
	}
	defer rows.Close()
	var list []Credential
	for rows.Next() {
		c, err := scanCredential(rows.Scan)
		if err != nil {
			return nil, wrap(err, "list credentials")
		}
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
