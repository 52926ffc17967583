package storage

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"
)

func TestOperators(t *testing.T) {
	db, ctx := mustOpen(t, t.TempDir()), t.Context()
	created := time.UnixMilli(1653671250425)
	ann := Operator{Name: "ann", Role: "admin", Hash: "h1", Created: created}
	bob := Operator{Name: "bob", Role: "viewer", Hash: "h2", Created: created}
	for _, o := range []Operator{bob, ann} {
		if err := db.PutOperator(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := db.Operator(ctx, "ann"); err != nil || got != ann {
		t.Errorf("got %v, %v, want %v", got, err, ann)
	}
	if got, err := db.Operators(ctx); err != nil || !slices.Equal(got, []Operator{ann, bob}) {
		t.Errorf("got %v, %v, want ann and bob", got, err)
	}
	if _, err := db.Operator(ctx, "eve"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: got %v, want ErrNotFound", err)
	}
	if err := db.PutOperator(ctx, Operator{Name: "eve", Role: "king"}); err == nil {
		t.Error("a role that does not exist was stored")
	}

	token := Token{Hash: bytes.Repeat([]byte{1}, 32), Operator: "ann"}
	if err := db.PutToken(ctx, token); err != nil {
		t.Fatal(err)
	}
	changed := Operator{Name: "ann", Role: "editor", Hash: "h3", Created: created.Add(time.Hour)}
	if err := db.PutOperator(ctx, changed); err != nil {
		t.Fatal(err)
	}
	changed.Created = created // stays
	if got, err := db.Operator(ctx, "ann"); err != nil || got != changed {
		t.Errorf("changed: got %v, %v, want %v", got, err, changed)
	}
	if _, err := db.Token(ctx, token.Hash); err != nil {
		t.Errorf("token of a changed operator: %v", err)
	}
	if err := db.DeleteOperator(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Token(ctx, token.Hash); !errors.Is(err, ErrNotFound) {
		t.Errorf("token of a deleted operator: got %v, want ErrNotFound", err)
	}
	if err := db.DeleteOperator(ctx, "ann"); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete again: got %v, want ErrNotFound", err)
	}
}

func TestTokens(t *testing.T) {
	db, ctx := mustOpen(t, t.TempDir()), t.Context()
	if err := db.PutOperator(ctx, Operator{Name: "ann", Role: "admin"}); err != nil {
		t.Fatal(err)
	}
	now := time.UnixMilli(1653671250425)
	token := func(n byte, expires time.Time) Token {
		return Token{Hash: bytes.Repeat([]byte{n}, 32), Operator: "ann", Expires: expires, LastUsed: now}
	}
	old, fresh := token(1, now), token(2, now.Add(time.Millisecond))
	for _, tk := range []Token{old, fresh} {
		if err := db.PutToken(ctx, tk); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.PutToken(ctx, old); !errors.Is(err, ErrConflict) {
		t.Errorf("again: got %v, want ErrConflict", err)
	}
	if err := db.PutToken(ctx, Token{Hash: bytes.Repeat([]byte{3}, 32), Operator: "eve"}); !errors.Is(err, ErrConflict) {
		t.Errorf("unknown operator: got %v, want ErrConflict", err)
	}
	if err := db.PutToken(ctx, Token{Operator: "ann"}); err == nil {
		t.Error("a token without a hash was stored")
	}
	if n, err := db.DeleteExpiredTokens(ctx, now); err != nil || n != 1 {
		t.Errorf("got %d deleted, %v, want 1", n, err)
	}
	if _, err := db.Token(ctx, old.Hash); !errors.Is(err, ErrNotFound) {
		t.Errorf("expired: got %v, want ErrNotFound", err)
	}
	later := now.Add(time.Hour)
	if err := db.TouchToken(ctx, fresh.Hash, now, later); err != nil {
		t.Fatal(err)
	}
	got, err := db.Token(ctx, fresh.Hash)
	if err != nil || got.Operator != "ann" || !got.Expires.Equal(later) || !got.LastUsed.Equal(now) {
		t.Errorf("touched: got %v, %v", got, err)
	}
	if err := db.DeleteToken(ctx, fresh.Hash); err != nil {
		t.Fatal(err)
	}
	if err := db.DeleteToken(ctx, fresh.Hash); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete again: got %v, want ErrNotFound", err)
	}
	if err := db.TouchToken(ctx, fresh.Hash, now, later); !errors.Is(err, ErrNotFound) {
		t.Errorf("touch after delete: got %v, want ErrNotFound", err)
	}
}

func TestCredentials(t *testing.T) {
	db, ctx := mustOpen(t, t.TempDir()), t.Context()
	// MQTT allows an empty user name.
	empty := Credential{Username: "", Hash: "h0", Created: time.UnixMilli(1)}
	pump := Credential{Username: "pump", Hash: "h1", Created: time.UnixMilli(2)}
	for _, c := range []Credential{pump, empty} {
		if err := db.PutCredential(ctx, c, true); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.PutCredential(ctx, pump, true); !errors.Is(err, ErrConflict) {
		t.Errorf("again: got %v, want ErrConflict", err)
	}
	if err := db.PutCredential(ctx, Credential{Username: "valve"}, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("change of an unknown one: got %v, want ErrNotFound", err)
	}
	if err := db.PutCredential(ctx, Credential{Username: "pump", Hash: "h2"}, false); err != nil {
		t.Fatal(err)
	}
	pump.Hash = "h2"
	if got, err := db.Credential(ctx, "pump"); err != nil || got != pump {
		t.Errorf("got %v, %v, want %v", got, err, pump)
	}
	if got, err := db.Credentials(ctx); err != nil || !slices.Equal(got, []Credential{empty, pump}) {
		t.Errorf("got %v, %v, want two", got, err)
	}
	if err := db.DeleteCredential(ctx, "pump"); err != nil {
		t.Fatal(err)
	}
	if err := db.DeleteCredential(ctx, "pump"); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete again: got %v, want ErrNotFound", err)
	}
	if _, err := db.Credential(ctx, "pump"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: got %v, want ErrNotFound", err)
	}
}

func TestACLRules(t *testing.T) {
	db, ctx := mustOpen(t, t.TempDir()), t.Context()
	if got, err := db.ACLRules(ctx); err != nil || len(got) != 0 {
		t.Errorf("new: got %v, %v, want none", got, err)
	}
	rules := []ACLRule{
		{Position: 1, Username: "pump", ClientID: "c", Address: "192.0.2.0/24", Action: "publish", Filter: "plant/%u/#", Allow: true},
		{Position: 2, Action: "any", Filter: "#"},
	}
	for range 2 { // the second time it replaces
		if err := db.ReplaceACLRules(ctx, rules); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := db.ACLRules(ctx); err != nil || !slices.Equal(got, rules) {
		t.Errorf("got %v, %v, want %v", got, err, rules)
	}
	if err := db.ReplaceACLRules(ctx, []ACLRule{{Action: "any", Filter: "x"}, {Action: "dance", Filter: "#"}}); err == nil {
		t.Error("an action that does not exist was stored")
	}
	if got, err := db.ACLRules(ctx); err != nil || !slices.Equal(got, rules) {
		t.Errorf("after a failed replacement: got %v, %v, want %v", got, err, rules)
	}
	// Positions are given by the order of the list.
	if err := db.ReplaceACLRules(ctx, []ACLRule{rules[1], rules[0]}); err != nil {
		t.Fatal(err)
	}
	if got, err := db.ACLRules(ctx); err != nil || len(got) != 2 || got[0].Position != 1 || got[0].Filter != "#" {
		t.Errorf("reordered: got %v, %v", got, err)
	}
}
