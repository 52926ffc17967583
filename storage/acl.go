package storage

import (
	"context"
)

// ACLRule allows or forbids topics to some clients.
type ACLRule struct {
	// Position is the rule's place in the list, from 1: the first rule that
	// matches decides.
	Position int
	// Username, ClientID and Address limit the rule to some clients; empty
	// is any. Address is a CIDR prefix.
	Username, ClientID, Address string
	// Action is "publish", "subscribe", "receive" or "any".
	Action string
	// Filter is a topic filter in which %u stands for the client's user name
	// and %c for its client id.
	Filter string
	Allow  bool
}

// ACLRules returns all rules by position.
func (db *DB) ACLRules(ctx context.Context) ([]ACLRule, error) {
	rows, err := db.read.QueryContext(ctx, `
		SELECT position, username, client_id, address, action, filter, allow FROM acl_rule ORDER BY position`)
	if err != nil {
		return nil, wrap(err, "list acl rules")
	}
	defer rows.Close()
	var list []ACLRule
	for rows.Next() {
		var r ACLRule
		if err := rows.Scan(&r.Position, &r.Username, &r.ClientID, &r.Address, &r.Action, &r.Filter, &r.Allow); err != nil {
			return nil, wrap(err, "list acl rules")
		}
		list = append(list, r)
	}
	return list, wrap(rows.Err(), "list acl rules")
}

// ReplaceACLRules makes rules the whole list, or changes nothing and returns an
// error. The order of the slice counts: Position is ignored and given anew,
// from 1.
func (db *DB) ReplaceACLRules(ctx context.Context, rules []ACLRule) error {
	const doing = "replace acl rules"
	tx, err := db.write.BeginTx(ctx, nil)
	if err != nil {
		return wrap(err, doing)
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, `DELETE FROM acl_rule`); err != nil {
		return wrap(err, doing)
	}
	for i, r := range rules {
		_, err := tx.ExecContext(ctx, `
			INSERT INTO acl_rule (position, username, client_id, address, action, filter, allow)
			VALUES (?, ?, ?, ?, ?, ?, ?)`,
			i+1, r.Username, r.ClientID, r.Address, r.Action, r.Filter, r.Allow)
		if err != nil {
			return wrap(err, doing)
		}
	}
	return wrap(tx.Commit(), doing)
}
