package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// module is the path of this module, as in go.mod.
const module = "penstock"

// mayImport says which packages of this module a package may import in what is
// compiled into the program: downwards only, and hw and systemd know nobody.
// internal/... is open to all, and imports internal/... only. Tests are free,
// and so are packages that only tests import: their names end with "test".
// A new package gets a line here.
var mayImport = map[string][]string{
	".":                  {"api", "broker", "hw", "storage", "systemd"},
	"api":                {"api/*", "broker", "broker/bridge", "storage"},
	"api/*":              {"api/*", "broker", "broker/bridge", "storage"},
	"broker":             {"storage"},
	"broker/bridge":      {"broker", "storage"},
	"broker/conformance": {}, // tests only
	"broker/interop":     {}, // tests only
	"storage":            {},
	"hw":                 {},
	"systemd":            {},
	"bench":              {"storage"}, // a program of its own
	"internal/units":     {},
}

// owners says who alone may import a library, tests included. A key that ends
// with "/" stands for everything below it.
var owners = map[string][]string{
	"database/sql":                        {"storage"},
	"database/sql/driver":                 {"storage"},
	"modernc.org/":                        {"storage"},
	"github.com/mochi-mqtt/":              {"broker"},
	"github.com/gorilla/websocket":        {"broker"},
	"periph.io/":                          {"hw"},
	"github.com/julienschmidt/httprouter": {"api", "api/*"},
	"github.com/VictoriaMetrics/":         {"api", "api/*"},
	"golang.org/x/crypto/argon2":          {"api", "api/*"},
	"github.com/alecthomas/kong":          {"."},
	"github.com/pelletier/go-toml/":       {"."},
	// Nobody may:
	"log":                                    {}, // log/slog, handed in
	"C":                                      {}, // the program is built without cgo
	"plugin":                                 {}, // needs cgo
	"net/http/pprof":                         {}, // registers itself where it is imported
	"github.com/mochi-mqtt/server/v2/config": {}, // pulls in four databases
}

// testsOnly are libraries and packages that only tests, and bench, may import.
var testsOnly = []string{"testing", "os/exec", "github.com/rogpeppe/go-internal/", "github.com/eclipse/paho.golang/", "github.com/gorilla/websocket"}

// goFile is one parsed file of the module.
type goFile struct {
	path string // below the root, with slashes
	pkg  string // its folder, "." for the root
	test bool   // a test, or in a package for tests
	ast  *ast.File
}

func newGoFile(name string, f *ast.File) goFile {
	pkg := path.Dir(name)
	return goFile{path: name, pkg: pkg, test: strings.HasSuffix(name, "_test.go") || forTests(pkg), ast: f}
}

// forTests reports whether a package is there for tests only.
func forTests(pkg string) bool { return strings.HasSuffix(path.Base(pkg), "test") }

// imports returns the import paths of the file and where they stand.
func (f goFile) imports() map[string]token.Pos {
	m := make(map[string]token.Pos)
	for _, spec := range f.ast.Imports {
		if name, err := strconv.Unquote(spec.Path.Value); err == nil {
			m[name] = spec.Pos()
		}
	}
	return m
}

// goFiles parses every Go file below root, whatever its build constraints.
func goFiles(t *testing.T, root string) ([]goFile, *token.FileSet) {
	t.Helper()
	fset := token.NewFileSet()
	var files []goFile
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); name != root && (n == "testdata" || n == "vendor" || strings.HasPrefix(n, ".")) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		f, err := parser.ParseFile(fset, rel, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, newGoFile(rel, f))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files, fset
}

// rowOf returns the row of mayImport for a package.
func rowOf(pkg string) (allowed []string, ok bool) {
	if allowed, ok = mayImport[pkg]; ok {
		return allowed, true
	}
	for dir := path.Dir(pkg); dir != "."; dir = path.Dir(dir) {
		if allowed, ok = mayImport[dir+"/*"]; ok {
			return allowed, true
		}
	}
	return nil, false
}

// among reports whether pkg is in a list that may have "x/*" for all below x.
func among(pkg string, list []string) bool {
	return slices.ContainsFunc(list, func(entry string) bool {
		dir, all := strings.CutSuffix(entry, "/*")
		return pkg == entry || all && strings.HasPrefix(pkg, dir+"/")
	})
}

// owned reports whether name is the library, or below it if that ends with "/".
func owned(name, library string) bool {
	return name == library || strings.HasSuffix(library, "/") && strings.HasPrefix(name, library)
}

// checkImports returns what breaks the rules above, a line each.
func checkImports(files []goFile, fset *token.FileSet) []string {
	var wrong []string
	add := func(pos token.Pos, what string) { wrong = append(wrong, fset.Position(pos).String()+": "+what) }
	for _, f := range files {
		allowed, known := rowOf(f.pkg)
		if !known && !f.test {
			add(f.ast.Package, "package "+f.pkg+" has no row in mayImport (arch_test.go): say there what it may import")
			continue
		}
		for name, pos := range f.imports() {
			if inner, ok := strings.CutPrefix(name, module+"/"); ok {
				switch {
				case f.test:
				case forTests(inner):
					add(pos, inner+" is for tests")
				case !strings.HasPrefix(inner, "internal/") && !among(inner, allowed):
					add(pos, f.pkg+" must not import "+inner+": dependencies point the other way (mayImport in arch_test.go)")
				}
				continue
			}
			for library, list := range owners {
				if owned(name, library) && !among(f.pkg, list) {
					who := "nobody may import "
					if len(list) > 0 {
						who = "only " + strings.Join(list, ", ") + " may import "
					}
					add(pos, who+name+"")
				}
			}
			for _, library := range testsOnly {
				if owned(name, library) && !f.test && f.pkg != "bench" {
					add(pos, name+" is for tests and bench")
				}
			}
		}
	}
	return wrong
}

// checkHabits returns packages without exactly one comment, and init functions.
func checkHabits(files []goFile, fset *token.FileSet) []string {
	var wrong []string
	comments := make(map[string][]string)
	for _, f := range files {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		have := comments[f.pkg]
		if f.ast.Doc != nil {
			have = append(have, f.path)
		}
		comments[f.pkg] = have
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				wrong = append(wrong, fset.Position(fn.Pos()).String()+": no init functions: let main, or a constructor, do it")
			}
		}
	}
	for pkg, where := range comments {
		if len(where) != 1 {
			wrong = append(wrong, "package "+pkg+" has "+strconv.Itoa(len(where))+" package comments, want one ("+strings.Join(where, ", ")+")")
		}
	}
	return wrong
}

func TestArchitecture(t *testing.T) {
	files, fset := goFiles(t, ".")
	for _, pkg := range []string{".", "api", "broker", "hw", "storage", "systemd"} {
		if !slices.ContainsFunc(files, func(f goFile) bool { return f.pkg == pkg }) {
			t.Errorf("no file of %s was found: the test looks in the wrong place", pkg)
		}
	}
	wrong := append(checkImports(files, fset), checkHabits(files, fset)...)
	slices.Sort(wrong)
	for _, w := range wrong {
		t.Error(w)
	}
}

// TestArchitectureFindsBreaches gives the rules files that break them.
func TestArchitectureFindsBreaches(t *testing.T) {
	tests := []struct {
		path, src string
		want      []string // in the order of checkImports, then checkHabits
	}{
		{"hw/led.go", "// Package hw.\npackage hw\nimport _ \"penstock/broker\"\n",
			[]string{"hw must not import broker"}},
		{"broker/a.go", "// Package broker.\npackage broker\nimport _ \"penstock/api\"\n",
			[]string{"broker must not import api"}},
		{"broker/a_test.go", "package broker\nimport _ \"penstock/api\"\n", nil},
		{"internal/units/a.go", "// Package units.\npackage units\nimport _ \"penstock/storage\"\n",
			[]string{"internal/units must not import storage"}},
		{"api/cedalo/a.go", "// Package cedalo.\npackage cedalo\nimport _ \"penstock/storage\"\nimport _ \"github.com/julienschmidt/httprouter\"\n", nil},
		{"api/a_test.go", "package api\nimport _ \"database/sql\"\n",
			[]string{"only storage may import database/sql"}},
		{"api/a.go", "// Package api.\npackage api\nimport _ \"modernc.org/sqlite/lib\"\n",
			[]string{"only storage may import modernc.org/sqlite/lib"}},
		{"broker/config.go", "// Package broker.\npackage broker\nimport _ \"github.com/mochi-mqtt/server/v2/config\"\n",
			[]string{"nobody may import github.com/mochi-mqtt/server/v2/config"}},
		{"broker/bridge/a.go", "// Package bridge.\npackage bridge\nimport _ \"github.com/mochi-mqtt/server/v2/packets\"\n",
			[]string{"only broker may import github.com/mochi-mqtt/server/v2/packets"}},
		{"storage/a.go", "// Package storage.\npackage storage\nimport _ \"os/exec\"\n",
			[]string{"os/exec is for tests and bench"}},
		{"storage/a_test.go", "package storage\nimport _ \"os/exec\"\n", nil},
		{"storage/storagetest/a.go", "// Package storagetest.\npackage storagetest\nimport _ \"penstock/storage\"\nimport _ \"testing\"\n", nil},
		{"broker/a.go", "// Package broker.\npackage broker\nimport _ \"penstock/storage/storagetest\"\n",
			[]string{"storage/storagetest is for tests"}},
		{"gadget/a.go", "// Package gadget.\npackage gadget\n",
			[]string{"package gadget has no row in mayImport"}},
		{"hw/a.go", "package hw\n", []string{"package hw has 0 package comments"}},
		{"hw/a.go", "// Package hw.\npackage hw\nfunc init() {}\n", []string{"no init functions"}},
	}
	for _, tt := range tests {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, tt.path, tt.src, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files := []goFile{newGoFile(tt.path, f)}
		got := append(checkImports(files, fset), checkHabits(files, fset)...)
		ok := len(got) == len(tt.want)
		for i := range min(len(got), len(tt.want)) {
			ok = ok && strings.Contains(got[i], tt.want[i])
		}
		if !ok {
			t.Errorf("%s: %q: got %q, want %q", tt.path, tt.src, got, tt.want)
		}
	}
}
