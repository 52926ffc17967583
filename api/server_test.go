package api_test

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"penstock/api"
	"penstock/api/internal/apitest"
	"penstock/broker"
)

func TestConfigValidate(t *testing.T) {
	if err := api.DefaultConfig().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for _, tt := range []struct {
		http, idle string
		want       string // what the error starts with, "" for none
	}{
		{"off", "12h", ""},
		{"127.0.0.1:0", "1m", ""},
		{"[::1]:8080", "30d", ""},
		{"8080", "12h", "api.http: "},
		{"", "12h", "api.http: "},
		{":http", "12h", "api.http: "},
		{":65536", "12h", "api.http: "},
		{":8080", "59s", "api.token_idle: "},
		{":8080", "367d", "api.token_idle: "},
	} {
		cfg := api.DefaultConfig()
		cfg.HTTP = tt.http
		if err := cfg.TokenIdle.UnmarshalText([]byte(tt.idle)); err != nil {
			t.Fatal(err)
		}
		err := cfg.Validate()
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s, %s: got %v, want no error", tt.http, tt.idle, err)
		case tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)):
			t.Errorf("%s, %s: got %v, want an error that starts with %q", tt.http, tt.idle, err, tt.want)
		}
	}
}

func TestOff(t *testing.T) {
	cfg := apitest.Config()
	cfg.HTTP = "off"
	g := apitest.Start(t, cfg)
	if g.URL != "" {
		t.Errorf("listens on %s", g.URL)
	}
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
}

func TestAddressTaken(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	cfg := apitest.Config()
	cfg.HTTP = strings.TrimPrefix(g.URL, "http://")
	_, err := api.Listen(cfg, api.Deps{Broker: g.Broker, DB: g.DB, Log: slog.New(slog.DiscardHandler), LogLevel: g.Level})
	if err == nil || !strings.HasPrefix(err.Error(), "api.http: ") {
		t.Errorf("got %v, want an error that names the key", err)
	}
}

// A request that runs when the server is told to stop gets its answer, and new
// ones are refused.
func TestShutdownIsGraceful(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	running, finish := make(chan struct{}), make(chan struct{})
	g.Broker.OnPublish = func(context.Context, broker.Message) error {
		close(running)
		<-finish
		return nil
	}
	answered := make(chan string, 1)
	go func() { answered <- sendAll(g) }()
	<-running
	stopped := make(chan error, 1)
	go func() { stopped <- g.Stop() }()
	addr := strings.TrimPrefix(g.URL, "http://")
	eventually(t, "the address is still open", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case err := <-stopped:
		t.Errorf("stopped with %v while a request was running", err)
	default:
	}
	close(finish)
	if got := <-answered; !strings.Contains(got, `"success"`) {
		t.Errorf("the request that ran got %s", got)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// A connection without a request, as browsers keep it, does not hold up the stop.
func TestShutdownClosesSpareConnections(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	c, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// Connections are accepted in order: with this answer the one before is known.
	if resp, err := http.Get(g.URL + "/healthz"); err != nil {
		t.Fatal(err)
	} else {
		resp.Body.Close()
	}
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
	if strings.Contains(g.Log.String(), "cut off") {
		t.Errorf("the stop waited until its time was over:\n%s", g.Log)
	}
}

// A request that never ends does not hold up the stop.
func TestShutdownIsBounded(t *testing.T) {
	g := apitest.StartWith(t, apitest.Config(), api.ListenImpatient(10, 50*time.Millisecond))
	running := make(chan struct{})
	g.Broker.OnPublish = func(ctx context.Context, _ broker.Message) error {
		close(running)
		<-ctx.Done() // of the connection that is cut
		return ctx.Err()
	}
	go sendAll(g)
	<-running
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(g.Log.String(), "http requests cut off at shutdown") {
		t.Errorf("the log does not say so:\n%s", g.Log)
	}
}

func sendAll(g *apitest.Gateway) string {
	req, err := http.NewRequest("POST", g.URL+"/bwiot/api/v1/send_all?topic=a&message=b", nil)
	if err != nil {
		return err.Error()
	}
	req.Header.Set("Authorization", apitest.AdminToken)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Clients that hold a connection without making a request of it are cut off.
func TestSlowClientsAreCutOff(t *testing.T) {
	g := apitest.StartWith(t, apitest.Config(), api.ListenImpatient(10, 100*time.Millisecond))
	for _, tt := range []struct{ name, sent string }{
		{"says nothing", ""},
		{"half a header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "},
		{"half a body", "POST /bwiot/api/v1/login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"},
		{"says nothing after a request", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, g)
			if _, err := io.WriteString(c, tt.sent); err != nil {
				t.Fatal(err)
			}
			if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("the connection was not closed: %v", err)
			}
		})
	}
}

// Beyond the limit connections wait, and are served when others end.
func TestConnectionsAreLimited(t *testing.T) {
	g := apitest.StartWith(t, apitest.Config(), api.ListenImpatient(2, 10*time.Second))
	get := func(c net.Conn) error {
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	first, second, third := dial(t, g), dial(t, g), dial(t, g)
	for _, c := range []net.Conn{first, second} {
		if err := get(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := third.SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if err := get(third); err == nil {
		t.Error("a third connection was served")
	}
	first.Close()
	if err := third.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := http.ReadResponse(bufio.NewReader(third), nil); err != nil {
		t.Errorf("the third connection after the first had ended: %v", err)
	}
}

func TestHeaderTooLarge(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	req, err := http.NewRequestWithContext(t.Context(), "GET", g.URL+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Long", strings.Repeat("x", 64<<10))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %d, want 431", resp.StatusCode)
	}
}

// A panic ends its request only, and is logged with where it was.
func TestPanic(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	g.Broker.OnPublish = func(context.Context, broker.Message) error { panic("boom") }
	if got := sendAll(g); !strings.Contains(got, `"code":"internal"`) {
		t.Errorf("got %s, want an internal error", got)
	}
	for _, want := range []string{"boom", "server_test.go"} {
		if !strings.Contains(g.Log.String(), want) {
			t.Errorf("the log has no %q:\n%s", want, g.Log)
		}
	}
	resp, err := http.Get(g.URL + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// With requests logged, no secret of a query is in the log, whatever became of
// the request.
func TestSecretsAreNotLogged(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	g.Level.Set(slog.LevelDebug)
	const hidden = "hunter2"
	for _, path := range []string{
		"/bwiot/api/v1/login?username=ann&password=" + hidden,
		"/bwiot/api/v1/connected_devices?token=" + hidden,
		"/api/v1/status?access_token=" + hidden,
		"/api/v1/status?new_password=" + hidden + "&PASSWORD=" + hidden,
		"/api/v1/status?a=1;token=" + hidden, // cannot be parsed
	} {
		resp, err := http.Post(g.URL+path, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	log := g.Log.String()
	if strings.Contains(log, hidden) {
		t.Errorf("the log has the secret:\n%s", log)
	}
	if n := strings.Count(log, `msg="http request"`); n != 5 {
		t.Errorf("got %d requests in the log, want 5:\n%s", n, log)
	}
	if !strings.Contains(log, "username=ann") {
		t.Errorf("the log has lost what is no secret:\n%s", log)
	}
}

func TestStorageFault(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	if err := g.DB.Close(); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", g.URL+"/api/v1/status", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", apitest.AdminToken)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusInternalServerError || strings.Contains(string(body), "database") {
		t.Errorf("got %d, %s, want 500 and no reason", resp.StatusCode, body)
	}
	if !strings.Contains(g.Log.String(), `msg="http request failed" err="read token: sql: database is closed"`) {
		t.Errorf("the reason is not in the log:\n%s", g.Log)
	}
}

// Beside Penstock's own metrics, which have a golden page, there are those of the
// process.
func TestProcessMetrics(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	resp, err := http.Get(g.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "penstock_connections"} {
		if !strings.Contains(string(page), "\n"+name+" ") {
			t.Errorf("the page has no %s:\n%s", name, page)
		}
	}
	if got, want := resp.Header.Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8"; got != want {
		t.Errorf("got Content-Type %q, want %q", got, want)
	}
}

func TestLogLevelIsSet(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	req, err := http.NewRequestWithContext(t.Context(), "PUT", g.URL+"/api/v1/log-level", strings.NewReader(`{"level":"debug"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", apitest.AdminToken)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got := g.Level.Level(); got != slog.LevelDebug {
		t.Errorf("got level %v, want debug", got)
	}
}

func dial(t *testing.T, g *apitest.Gateway) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// eventually waits until what is no longer so.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s %s", what)
		}
	}
}

// A flash near its end is a reason to look, and none to send clients elsewhere.
func TestWearInHealth(t *testing.T) {
	g := apitest.StartWith(t, apitest.Config(), func(cfg api.Config, d api.Deps) (*api.Server, error) {
		d.Wear = func() api.Wear { return api.Wear{Device: "mmcblk0", Used: 90, Warning: "flash: replace it"} }
		return api.Listen(cfg, d)
	})
	resp, err := http.Get(g.URL + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"ready":true,"degraded":true,"reasons":["flash: replace it"]}`; resp.StatusCode != 200 || strings.TrimSpace(string(body)) != want {
		t.Errorf("got %d %s, want 200 %s", resp.StatusCode, body, want)
	}
}
