// Package apitest runs recorded exchanges against the HTTP APIs over a real
// socket and a real database.
//
// A file testdata/*.txtar is a series of exchanges with one server, each of up
// to three parts:
//
//	-- wrong password: request --
//	POST /bwiot/api/v1/login
//	Content-Type: application/json
//
//	{"username":"ann","password":"wrong"}
//	-- wrong password: documented --
//	{"bwapi-status":"fail"}
//	-- wrong password: response --
//	200 application/json
//	{"bwapi-status":"fail","bwapi-status-reason":"Invalid Login"}
//
// "documented" is what a vendor's document says, typed from it: the response has
// to have its keys and values, and may have more. "response" is the status, the
// media type and the body as they are; go test -update records it anew.
package apitest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"penstock/api"
	"penstock/api/auth"
	"penstock/storage"
)

// Every operator's password is "secret". The hash is a cheap one.
const secretHash = "$argon2id$v=19$m=64,t=1,p=1$cGVuc3RvY2stdGVzdGluZw$BKGQFT4X7rGGUBoAPjbybCwavSzjYkvSq/mK+MTUeqM"

// The tokens of operators ann, an admin, ed, an editor, and vi, a viewer. The
// last is ann's and has expired.
const (
	AdminToken   = "admin-token"
	EditorToken  = "editor-token"
	ViewerToken  = "viewer-token"
	ExpiredToken = "expired-token"
)

// Gateway is a running server and what it stands on.
type Gateway struct {
	URL    string
	DB     *storage.DB
	Broker *Broker
	Log    *Log
	Level  *slog.LevelVar
	// Stop ends the server and returns what Run returned.
	Stop func() error
}

// Start serves the APIs on a free port of the loopback until the test ends.
func Start(t testing.TB, cfg api.Config) *Gateway {
	t.Helper()
	return StartWith(t, cfg, api.Listen)
}

// StartWith is Start with another constructor of the server.
func StartWith(t testing.TB, cfg api.Config, listen func(api.Config, api.Deps) (*api.Server, error)) *Gateway {
	t.Helper()
	g := &Gateway{Broker: NewBroker(), Log: &Log{}, Level: &slog.LevelVar{}}
	log := slog.New(slog.NewTextHandler(g.Log, &slog.HandlerOptions{Level: g.Level}))
	storageConfig := storage.DefaultConfig()
	storageConfig.Dir = t.TempDir()
	var err error
	if g.DB, err = storage.Open(t.Context(), storageConfig, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.DB.Close() })
	now := time.Now()
	for _, op := range []struct {
		name, role, token string
		expires           time.Time
	}{
		{"ann", auth.Admin, AdminToken, now.Add(time.Hour)},
		{"ed", auth.Editor, EditorToken, now.Add(time.Hour)},
		{"vi", auth.Viewer, ViewerToken, now.Add(time.Hour)},
		{"ann", auth.Admin, ExpiredToken, now.Add(-time.Millisecond)},
	} {
		if err := g.DB.PutOperator(t.Context(), storage.Operator{Name: op.name, Role: op.role, Hash: secretHash, Created: now}); err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256([]byte(op.token))
		if err := g.DB.PutToken(t.Context(), storage.Token{Hash: hash[:], Operator: op.name, Expires: op.expires, LastUsed: now}); err != nil {
			t.Fatal(err)
		}
	}
	srv, err := listen(cfg, api.Deps{
		Broker:   g.Broker,
		DB:       g.DB,
		Log:      log,
		Version:  "v1.2.3",
		Panel:    func() (string, map[string]string) { return "running", map[string]string{"status": "on"} },
		LogLevel: g.Level,
	})
	if err != nil {
		t.Fatal(err)
	}
	if addr := srv.Addr(); addr != nil {
		g.URL = "http://" + addr.String()
	}
	g.Stop = run(t, srv)
	return g
}

// Config is a configuration for tests: port 0 of the loopback.
func Config() api.Config {
	cfg := api.DefaultConfig()
	cfg.HTTP = "127.0.0.1:0"
	return cfg
}

// Run runs every file of testdata against a gateway of its own, made by start,
// and returns the method and path of each request, without the query.
func Run(t *testing.T, update bool, start func(t *testing.T, file string) *Gateway) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata/*.txtar: %v", err)
	}
	var seen []string
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			seen = append(seen, play(t, ar, start(t, file), update)...)
			if update {
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	return seen
}

// play makes the exchanges of ar in turn, and compares or records them.
func play(t *testing.T, ar *txtar.Archive, g *Gateway, update bool) (seen []string) {
	t.Helper()
	parts := map[string][]byte{}
	for _, f := range ar.Files {
		parts[f.Name] = f.Data
	}
	var out []txtar.File
	for _, f := range ar.Files {
		name, kind, _ := strings.Cut(f.Name, ": ")
		switch kind {
		case "request":
		case "documented", "response":
			if parts[name+": request"] == nil {
				t.Errorf("%s: has no request", f.Name)
			}
			continue
		default:
			t.Errorf("%s: is not request, documented or response", f.Name)
			continue
		}
		out = append(out, f)
		route, got, body := exchange(t, g.URL, f.Data)
		seen = append(seen, route)
		if doc, ok := parts[name+": documented"]; ok {
			out = append(out, txtar.File{Name: name + ": documented", Data: doc})
			if err := contains(body, doc); err != nil {
				t.Errorf("%s: the response is not what the vendor documents: %v\n%s", name, err, body)
			}
		}
		want := parts[name+": response"]
		if !update && !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%swant\n%sif that is meant, run go test with -update", name, got, want)
		}
		out = append(out, txtar.File{Name: name + ": response", Data: got})
	}
	ar.Files = out
	return seen
}

// volatile are the parts of a body that differ from run to run.
var volatile = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`"access_token":"[A-Za-z0-9_-]{43}"`), `"access_token":"(a token)"`},
	{regexp.MustCompile(`"uptime_seconds":\d+`), `"uptime_seconds":0`},
	{regexp.MustCompile(`(?s)(# HELP penstock_[^\n]*\n).*`), "${1}(and so on)\n"},
}

// exchange makes a request and returns its method and path, the response in the
// form of the file, and its body.
func exchange(t *testing.T, base string, request []byte) (route string, response, body []byte) {
	t.Helper()
	head, content, _ := strings.Cut(string(request), "\n\n")
	lines := strings.Split(strings.TrimSpace(head), "\n")
	method, target, ok := strings.Cut(lines[0], " ")
	if !ok {
		t.Fatalf("%q is not METHOD /path", lines[0])
	}
	req, err := http.NewRequestWithContext(t.Context(), method, base+target, strings.NewReader(strings.TrimSuffix(content, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines[1:] {
		key, value, _ := strings.Cut(line, ": ")
		req.Header.Add(key, value)
	}
	// Redirects are answers, not something to be followed.
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	for _, v := range volatile {
		body = v.re.ReplaceAll(body, []byte(v.with))
	}
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	response = fmt.Appendf(nil, "%d %s\n%s", resp.StatusCode, kind, body)
	path, _, _ := strings.Cut(target, "?")
	return method + " " + path, response, body
}

// contains returns an error unless the JSON object got has all members of want,
// with the same values.
func contains(got, want []byte) error {
	var g, w map[string]any
	if err := json.Unmarshal(want, &w); err != nil {
		return fmt.Errorf("the documented body is no JSON object: %w", err)
	}
	if err := json.Unmarshal(got, &g); err != nil {
		return fmt.Errorf("no JSON object: %w", err)
	}
	for key, value := range w {
		if !reflect.DeepEqual(g[key], value) {
			return fmt.Errorf("%s is %v, not %v", key, g[key], value)
		}
	}
	return nil
}

// CheckRoutes names every route, as "METHOD /path", without a recorded exchange.
func CheckRoutes(t *testing.T, routes, seen []string) {
	t.Helper()
	recorded := map[string]bool{}
	for _, route := range seen {
		recorded[route] = true
	}
	for _, route := range routes {
		if !recorded[route] {
			t.Errorf("%s has no exchange: write its request into a file in testdata and run go test with -update", route)
		}
	}
}

// Log keeps what was logged.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *Log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
