package storage

import (
	"context"
	"time"
)

// Operator is someone who may sign in to the HTTP APIs.
type Operator struct {
	Name string
	// Role is "admin", "editor" or "viewer".
	Role string
	// Hash is the password's PHC string.
	Hash    string
	Created time.Time // to the millisecond
}

// PutOperator adds o, or changes the role and the hash of the operator of that
// name and keeps its time of creation and its tokens.
func (db *DB) PutOperator(ctx context.Context, o Operator) error {
	_, err := db.write.ExecContext(ctx, `
		INSERT INTO operator (name, role, hash, created) VALUES (?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET role = excluded.role, hash = excluded.hash`,
		o.Name, o.Role, o.Hash, millis(o.Created))
	return wrap(err, "put operator")
}

// Operator returns the operator of that name, or ErrNotFound.
func (db *DB) Operator(ctx context.Context, name string) (Operator, error) {
	o := Operator{Name: name}
	var created int64
	err := db.read.QueryRowContext(ctx, `SELECT role, hash, created FROM operator WHERE name = ?`, name).
		Scan(&o.Role, &o.Hash, &created)
	if err != nil {
		return Operator{}, wrap(err, "read operator")
	}
	o.Created = fromMillis(created)
	return o, nil
}

// Operators returns all operators by name.
func (db *DB) Operators(ctx context.Context) ([]Operator, error) {
	rows, err := db.read.QueryContext(ctx, `SELECT name, role, hash, created FROM operator ORDER BY name`)
	if err != nil {
		return nil, wrap(err, "list operators")
	}
	defer rows.Close()
	var list []Operator
	for rows.Next() {
		var o Operator
		var created int64
		if err := rows.Scan(&o.Name, &o.Role, &o.Hash, &created); err != nil {
			return nil, wrap(err, "list operators")
		}
		o.Created = fromMillis(created)
		list = append(list, o)
	}
	return list, wrap(rows.Err(), "list operators")
}

// DeleteOperator deletes the operator and its tokens. It returns ErrNotFound if
// there is none of that name.
func (db *DB) DeleteOperator(ctx context.Context, name string) error {
	res, err := db.write.ExecContext(ctx, `DELETE FROM operator WHERE name = ?`, name)
	return affected(res, err, "delete operator")
}
