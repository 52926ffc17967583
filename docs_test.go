package main

import (
	"encoding"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const configDoc = "docs/configuration.md"

// TestConfigurationDoc: each key of Config has a row with its default in the
// document, and the document has no other.
func TestConfigurationDoc(t *testing.T) {
	doc, err := os.ReadFile(configDoc)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range docErrors(string(doc), DefaultConfig()) {
		t.Errorf("%s: %s", configDoc, text)
	}
}

// What the test above is for is found in a document that is wrong.
func TestDocErrors(t *testing.T) {
	type section struct {
		Level string  `toml:"level"`
		Size  int     `toml:"size"`
		Share float64 `toml:"share"`
	}
	type config struct {
		Log  section   `toml:"log"`
		List []section `toml:"list"`
	}
	cfg := config{Log: section{"info", 10, 0.5}, List: []section{{"warn", 1, 2}}}
	const head = "## [log]\n| Key | Type | Default |\n|---|---|---|\n"
	const list = "## [[list]]\n| `level` | text | `\"warn\"` |\n| `size` | number | `1` |\n| `share` | number | `2` |\n"
	const level, size, share = "| `level` | text | `\"info\"` | a |\n", "| `size` | number | `10` | b |\n", "| `share` | number | `0.5` | c |\n"
	for _, tt := range []struct {
		name, doc string
		want      []string
	}{
		{"right", head + level + size + share + list, nil},
		{"a row is missing", head + level + share + list, []string{"log.size has no row: add one below ## [log], with the default `10`"}},
		{"a section is missing", head + level + size + share, []string{
			"list.level has no row: add one below ## [[list]], with the default `\"warn\"`",
			"list.share has no row: add one below ## [[list]], with the default `2`",
			"list.size has no row: add one below ## [[list]], with the default `1`",
		}},
		{"another default", head + level + "| `size` | number | `11` |\n" + share + list, []string{"log.size: the default is said to be `11` and is `10`: correct the row"}},
		{"no default", head + "| `level` |\n" + size + share + list, []string{"log.level: the default is said to be nothing and is `\"info\"`: correct the row"}},
		{"a key that is gone", head + level + size + share + "| `colour` | text | `\"red\"` |\n" + list, []string{"log.colour is no key of the program: remove its row, or correct its name"}},
		{"twice", head + level + size + share + size + list, []string{"log.size has two rows: keep one"}},
		{"rows of other tables", head + level + size + share + list + "## Values\n| `size` | x |\n", nil},
	} {
		if got := docErrors(tt.doc, cfg); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.name, strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
		}
	}
}

// TestInstallSteps: who installs finds the same commands in both places, and
// the configuration is checked before the service starts.
func TestInstallSteps(t *testing.T) {
	steps := regexp.MustCompile("(?s)\n(sudo install .*?)```")
	var found []string
	for _, name := range []string{"README.md", "systemd/README.md"} {
		doc, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		m := steps.FindStringSubmatch(string(doc))
		if m == nil {
			t.Fatalf("%s has no commands that begin with sudo install", name)
		}
		found = append(found, m[1])
	}
	if found[0] != found[1] {
		t.Errorf("README.md says\n%s\nsystemd/README.md says\n%s\nMake them the same.", found[0], found[1])
	}
	check, enable := strings.Index(found[0], "penstock check"), strings.Index(found[0], "enable --now")
	if check < 0 || enable < check {
		t.Errorf("penstock check does not come before enable --now in\n%s", found[0])
	}
}

var (
	docSection = regexp.MustCompile(`^## (?:\[\[([a-z_.]+)\]\]|\[([a-z_.]+)\])$`)
	docRow     = regexp.MustCompile("^\\| `([a-z0-9_]+)` \\|(?:[^|]*\\| `([^`]*)` \\|)?")
)

// docErrors compares the tables below headings like "## [section]" with cfg,
// whose values are the defaults. A row is "| `key` | type | `default` | …".
func docErrors(doc string, cfg any) []string {
	want := make(map[string]docKey)
	docKeys(want, "", reflect.ValueOf(cfg))
	var errs []string
	seen := make(map[string]bool)
	section := ""
	for line := range strings.Lines(doc) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasPrefix(line, "## ") {
			section = ""
			if m := docSection.FindStringSubmatch(line); m != nil {
				section = m[1] + m[2]
			}
			continue
		}
		m := docRow.FindStringSubmatch(line)
		if section == "" || m == nil {
			continue
		}
		key := section + "." + m[1]
		is, ok := want[key]
		switch {
		case !ok:
			errs = append(errs, key+" is no key of the program: remove its row, or correct its name")
		case seen[key]:
			errs = append(errs, key+" has two rows: keep one")
		case m[2] != is.text:
			said := "nothing"
			if m[2] != "" {
				said = "`" + m[2] + "`"
			}
			errs = append(errs, fmt.Sprintf("%s: the default is said to be %s and is `%s`: correct the row", key, said, is.text))
		}
		seen[key] = true
	}
	var missing []string
	for key, is := range want {
		if !seen[key] {
			missing = append(missing, fmt.Sprintf("%s has no row: add one below ## %s, with the default `%s`", key, is.section, is.text))
		}
	}
	slices.Sort(missing)
	return append(errs, missing...)
}

// docKey is where a key belongs in the document, and its default as TOML.
type docKey struct{ section, text string }

// docKeys adds the keys of the section v, whose dotted name is path. Of a list
// of sections the first one has the defaults, of an empty one the zero values.
func docKeys(keys map[string]docKey, path string, v reflect.Value) {
	section := "[" + path + "]"
	if v.Kind() == reflect.Slice {
		section = "[" + section + "]"
		if v.Len() == 0 {
			v = reflect.Zero(v.Type().Elem())
		} else {
			v = v.Index(0)
		}
	}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name := f.Tag.Get("toml")
		if !f.IsExported() || name == "-" {
			continue
		}
		key := join(path, name)
		typ := f.Type
		if typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if isTable(typ) && typ.Kind() == reflect.Struct {
			docKeys(keys, key, v.Field(i))
			continue
		}
		keys[key] = docKey{section, tomlText(v.Field(i))}
	}
}

// tomlText returns a value as a person writes it in the file. A kind that it
// does not know shows as Go prints it, which no row will say.
func tomlText(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		text, err := m.MarshalText()
		if err != nil {
			return err.Error()
		}
		return strconv.Quote(string(text))
	}
	switch {
	case v.Kind() == reflect.String:
		return strconv.Quote(v.String())
	case v.Kind() == reflect.Map && v.Len() == 0:
		return "{}"
	}
	return fmt.Sprint(v.Interface())
}
