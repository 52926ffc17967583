package broker

import (
	"context"
	"fmt"
)

// ReloadRights reads the access rules from the database and puts them in force
// for all clients. It is called after a change to rules or devices there.
func (b *Broker) ReloadRights(ctx context.Context) error {
	rules, err := b.db.ACLRules(ctx)
	if err != nil {
		return fmt.Errorf("load access rules: %w", err)
	}
	b.plane.acl.Store(newACL(rules))
	return nil
}
