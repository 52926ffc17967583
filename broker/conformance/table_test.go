package conformance

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// standards are the tables of docs/conformance.md.
var standards = []struct {
	heading string // of its section
	list    string // file with the numbers of all its statements, one a line
	covers  string // function with which a test says what it covers
}{
	{"## MQTT 3.1.1", "testdata/mqtt311.txt", "covers3"},
	{"## MQTT 5", "testdata/mqtt5.txt", "covers5"},
}

// row is a row of a table: | statement | wording | side | tests or a reason |.
type row struct {
	line              int
	id, wording, side string
	tests             []string // TestX, or broker.TestX of the package beside this one
	reason            string   // where there are no tests
}

var testName = regexp.MustCompile("`((?:broker\\.)?Test[A-Za-z0-9_]+)`")

// tableRows returns the rows below a heading, to the next one of its level. A
// second section with the same heading counts too: then its rows are double.
func tableRows(doc, heading string) (rows []row, found bool) {
	inside := false
	for i, line := range strings.Split(doc, "\n") {
		if strings.HasPrefix(line, "## ") {
			inside = strings.TrimSpace(line) == heading
			found = found || inside
			continue
		}
		if !inside || !strings.HasPrefix(line, "| MQTT-") {
			continue
		}
		r := row{line: i + 1}
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if len(cells) == 4 {
			r.wording, r.side, r.reason = cells[1], cells[2], cells[3]
			for _, m := range testName.FindAllStringSubmatch(cells[3], -1) {
				r.tests = append(r.tests, m[1])
			}
		}
		r.id = strings.TrimSpace(cells[0])
		rows = append(rows, r)
	}
	return rows, found
}

// claims is, by the name of a test, what statements it says it covers; covers
// is the function it says so with.
func claims(t *testing.T, dir, covers string) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in %s: %v", dir, err)
	}
	all := make(map[string][]string)
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Test") {
				continue
			}
			all[fn.Name.Name] = nil
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				if id, ok := call.Fun.(*ast.Ident); !ok || id.Name != covers || len(call.Args) == 0 {
					return true
				}
				for _, arg := range call.Args[1:] {
					if lit, ok := arg.(*ast.BasicLit); ok {
						if s, err := strconv.Unquote(lit.Value); err == nil {
							all[fn.Name.Name] = append(all[fn.Name.Name], s)
						}
					}
				}
				return true
			})
		}
	}
	return all
}

// checkTable returns what is wrong with a table, a line each.
func checkTable(rows []row, ids []string, here, beside map[string][]string) (wrong []string) {
	add := func(r row, what string) {
		wrong = append(wrong, "line "+strconv.Itoa(r.line)+", "+r.id+": "+what)
	}
	seen := map[string]bool{}
	for _, r := range rows {
		switch {
		case !slices.Contains(ids, r.id):
			add(r, "there is no such statement")
		case seen[r.id]:
			add(r, "is there twice")
		case r.wording == "" || r.reason == "":
			add(r, "wants four cells: statement, what it asks, side, tests or the reason why there is none")
		case r.side != "server" && r.side != "client" && r.side != "both":
			add(r, "the side is server, client or both, not "+r.side)
		case len(r.tests) == 0 && len(r.reason) < 15:
			add(r, "has neither a test nor a reason")
		}
		seen[r.id] = true
		for _, name := range r.tests {
			if other, ok := strings.CutPrefix(name, "broker."); ok {
				if _, ok := beside[other]; !ok {
					add(r, name+" does not exist")
				}
				continue
			}
			covered, ok := here[name]
			switch {
			case !ok:
				add(r, name+" does not exist")
			case !slices.Contains(covered, r.id):
				add(r, name+" does not say that it covers it: name the statement in the test's covers call")
			}
		}
	}
	for _, id := range ids {
		if !seen[id] {
			wrong = append(wrong, id+" has no row: give it one with a test, or the reason why it does not apply")
		}
	}
	for name, covered := range here {
		for _, id := range covered {
			if !slices.Contains(ids, id) {
				wrong = append(wrong, name+" says that it covers "+id+", which does not exist")
			}
		}
	}
	slices.Sort(wrong)
	return wrong
}

// TestConformanceTable checks that docs/conformance.md has every statement of
// the standards, and that what it says of tests is true.
func TestConformanceTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	beside := claims(t, "..", "")
	for _, std := range standards {
		list, err := os.ReadFile(std.list)
		if err != nil {
			t.Error(err)
			continue
		}
		ids := strings.Fields(string(list))
		rows, found := tableRows(string(doc), std.heading)
		if !found || len(ids) < 100 {
			t.Errorf("docs/conformance.md has no section %q, or %s is short", std.heading, std.list)
			continue
		}
		for _, w := range checkTable(rows, ids, claims(t, ".", std.covers), beside) {
			t.Errorf("docs/conformance.md, %s: %s", std.heading, w)
		}
	}
}

// TestConformanceTableFindsBreaches gives the check tables that are wrong.
func TestConformanceTableFindsBreaches(t *testing.T) {
	ids := []string{"MQTT-1.0.0-1", "MQTT-1.0.0-2"}
	here := map[string][]string{"TestA": {"MQTT-1.0.0-1"}, "TestB": nil}
	beside := map[string][]string{"TestC": nil}
	const right = "| MQTT-1.0.0-1 | text | both | `TestA` |\n| MQTT-1.0.0-2 | text | server | `broker.TestC` |\n"
	for _, tt := range []struct{ doc, want string }{
		{right, ""},
		{strings.Replace(right, "`broker.TestC`", "the client's own affair", 1), ""},
		{strings.Replace(right, "0-2", "0-3", 1), "no such statement"},
		{strings.Replace(right, "0-2", "0-1", 1), "is there twice"},
		{right + "## S\n" + right, "is there twice"},
		{strings.Split(right, "\n")[0], "MQTT-1.0.0-2 has no row"},
		{strings.Replace(right, "TestA", "TestX", 1), "TestX does not exist"},
		{strings.Replace(right, "TestA", "TestB", 1), "TestB does not say that it covers it"},
		{strings.Replace(right, "TestA", "TestA` `TestB", 1), "TestB does not say that it covers it"},
		{strings.Replace(right, "broker.TestC", "broker.TestA", 1), "broker.TestA does not exist"},
		{strings.Replace(right, "both", "neither", 1), "the side is"},
		{strings.Replace(right, "`TestA`", "none", 1), "neither a test nor a reason"},
		{strings.Replace(right, "| both ", "", 1), "four cells"},
	} {
		rows, found := tableRows("# Title\n\n## S\n\n"+tt.doc+"\n## Next\n\n| MQTT-9.9.9-9 | x | x | x |\n", "## S")
		got := strings.Join(checkTable(rows, ids, here, beside), "\n")
		if !found || (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.doc, got, tt.want)
		}
	}
}
