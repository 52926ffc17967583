package storage

import (
	"math"
	"slices"
)

// A salvage knows our tables by what stands in their records, because the schema
// may be lost. A new table gets a row in salvagedTables.

// columnKind is the type of a STRICT column.
type columnKind byte

const (
	columnInt columnKind = iota
	columnText
	columnBlob
)

// column is a column in the order in which records have it.
type column struct {
	name string
	kind columnKind
}

// salvagedTable is a table that a salvage keeps.
type salvagedTable struct {
	name  string
	since int // number of the migration that makes it
	// rowid: the first column is the rowid, and NULL in the record. Else the
	// table is WITHOUT ROWID: its b-tree is that of an index.
	rowid   bool
	columns []column
	// added is how many of the last columns came later, with a migration: rows that
	// were written before have none of them.
	added   int
	addedIn int
	// valid reports whether values of the right kinds can be a row.
	valid func(row []any) bool
}

// segmentTable is the name of the table that has most of the data.
const segmentTable = "segment"

// salvagedTables are all tables but meta, which a new database has of its own,
// in the order in which they are saved.
func salvagedTables() []salvagedTable {
	return []salvagedTable{
		{"operator", 1, false, []column{{"name", columnText}, {"role", columnText}, {"hash", columnText}, {"created", columnInt}}, 0, 0, func(r []any) bool {
			return r[0] != "" && slices.Contains([]any{"admin", "editor", "viewer"}, r[1])
		}},
		{"token", 1, false, []column{{"hash", columnBlob}, {"operator", columnText}, {"expires", columnInt}, {"last_used", columnInt}}, 0, 0, func(r []any) bool {
			return len(r[0].([]byte)) == 32
		}},
		{"credential", 1, false, []column{{"username", columnText}, {"hash", columnText}, {"created", columnInt}}, 0, 0, nil},
		{"acl_rule", 1, true, []column{{"position", columnInt}, {"username", columnText}, {"client_id", columnText}, {"address", columnText},
			{"action", columnText}, {"filter", columnText}, {"allow", columnInt}}, 0, 0, func(r []any) bool {
			return slices.Contains([]any{"publish", "subscribe", "receive", "any"}, r[4]) && within(r[6], 1)
		}},
		{"session", 2, true, []column{{"id", columnInt}, {"client_id", columnText}, {"expiry_s", columnInt}, {"protocol", columnInt},
			{"created_ms", columnInt}, {"ceiling", columnInt}, {"progress", columnBlob}, {"left_at", columnInt}}, 1, 5, func(r []any) bool {
			return r[0].(int64) > 0 && within(r[2], math.MaxUint32) && within(r[3], math.MaxUint8) && within(r[5], math.MaxInt64)
		}},
		{"subscription", 2, false, []column{{"session_id", columnInt}, {"filter", columnText}, {"options", columnInt}, {"identifier", columnInt}}, 0, 0, func(r []any) bool {
			return within(r[2], math.MaxUint8) && within(r[3], math.MaxUint32)
		}},
		{"inbound", 2, false, []column{{"session_id", columnInt}, {"packet_id", columnInt}}, 0, 0, func(r []any) bool {
			return within(r[1], math.MaxUint16) && r[0].(int64) > 0
		}},
		{"retained", 2, false, []column{{"topic", columnText}, {"message", columnBlob}}, 0, 0, func(r []any) bool {
			u := unpacker{buf: r[1].([]byte)}
			m := u.message()
			return u.err == nil && m.Topic == r[0]
		}},
		{"will", 2, false, []column{{"client_id", columnText}, {"delay_s", columnInt}, {"message", columnBlob}, {"due_at", columnInt}}, 1, 5, func(r []any) bool {
			u := unpacker{buf: r[2].([]byte)}
			u.message()
			return u.err == nil && within(r[1], math.MaxUint32)
		}},
		{"flash", 4, false, []column{{"day", columnInt}, {"cause", columnText}, {"bytes", columnInt}}, 0, 0, func(r []any) bool {
			return within(r[2], math.MaxInt64) && slices.Contains(causeNames[:], r[1].(string))
		}},
		{"clock", 5, true, []column{{"id", columnInt}, {"stamp", columnInt}, {"wall_ms", columnInt}, {"true_ms", columnInt}, {"owed_from", columnInt},
			{"guessed", columnInt}, {"boot", columnText}, {"boot_ms", columnInt}, {"stopped", columnInt}}, 0, 0, func(r []any) bool {
			return r[0] == int64(1)
		}},
		{"time_off", 5, true, []column{{"era", columnInt}, {"ms", columnInt}}, 0, 0, func(r []any) bool { return within(r[1], math.MaxInt64) }},
		{segmentTable, 3, true, []column{{"id", columnInt}, {"head", columnBlob}, {"body", columnBlob}}, 0, 0, nil}, // read apart from the others, a part of it later
	}
}

// width reports whether a row of the table may have n columns.
func (t *salvagedTable) width(n int) bool { return n <= len(t.columns) && n >= len(t.columns)-t.added }

// within reports whether an int64 is from 0 to most.
func within(v any, most int64) bool { return v.(int64) >= 0 && v.(int64) <= most }

// row returns the values of a record as a row of the table, and false if it is
// none. exact wants as many columns as the table has; else a newer program may
// have added some behind ours.
func (t *salvagedTable) row(c cell, values []any, exact bool) ([]any, bool) {
	if len(values) < len(t.columns)-t.added || exact && len(values) > len(t.columns) {
		return nil, false
	}
	for len(values) < len(t.columns) {
		values = append(values, int64(0))
	}
	values = values[:len(t.columns)]
	if t.rowid {
		if values[0] != nil {
			return nil, false
		}
		values[0] = c.rowid
	}
	for i, col := range t.columns {
		ok := false
		switch col.kind {
		case columnInt:
			_, ok = values[i].(int64)
		case columnText:
			_, ok = values[i].(string)
		case columnBlob:
			_, ok = values[i].([]byte)
		}
		if !ok {
			return nil, false
		}
	}
	return values, t.valid == nil || t.valid(values)
}
