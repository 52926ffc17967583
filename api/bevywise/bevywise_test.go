package bevywise_test

import (
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"penstock/api/bevywise"
	"penstock/api/internal/apitest"
	"penstock/broker"
)

var update = flag.Bool("update", false, "record responses anew")

func TestExchanges(t *testing.T) {
	seen := apitest.Run(t, *update, func(t *testing.T, file string) *apitest.Gateway {
		cfg := apitest.Config()
		cfg.Bevywise.Always200 = strings.Contains(file, "always_200")
		g := apitest.Start(t, cfg)
		g.Broker.OnPublish = func(_ context.Context, m broker.Message) error {
			switch {
			case strings.Contains(m.Topic, "#"):
				return broker.ErrInvalidTopic
			case m.Topic == "late":
				return context.DeadlineExceeded
			case m.Topic == "defect":
				return errors.New("defect")
			}
			return nil
		}
		if !strings.Contains(file, "none") {
			g.Broker.Set(func(clients *[]broker.ClientInfo, _ *broker.Health, _ *broker.Stats) {
				*clients = []broker.ClientInfo{{ID: "client1"}, {ID: "client2"}}
			})
		}
		return g
	})
	apitest.CheckRoutes(t, bevywise.Routes(), seen)
}

// Every route is known with a slash at its end too.
func TestTrailingSlash(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	for _, route := range bevywise.Routes() {
		method, path, _ := strings.Cut(route, " ")
		for _, p := range []string{path, path + "/"} {
			if status, _ := request(t, g, method, p, "", ""); status == http.StatusNotFound || status/100 == 3 {
				t.Errorf("%s %s: got status %d", method, p, status)
			}
		}
	}
}

// What was sent is what the broker is asked to publish, in every form of body.
func TestSendAllMessage(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	for _, tt := range []struct {
		name, query, body string
		want              broker.Message
	}{
		{"defaults", "", `{"topic":"a/b","message":"on"}`, broker.Message{Topic: "a/b", Payload: []byte("on")}},
		{"JSON", "", `{"topic":"a","message":"é\u0000","QoS":2,"retain":1}`, broker.Message{Topic: "a", Payload: []byte("é\x00"), QoS: 2, Retain: true}},
		{"quoted numbers", "", `{"topic":"a","message":"on","QoS":"1","retain":"1"}`, broker.Message{Topic: "a", Payload: []byte("on"), QoS: 1, Retain: true}},
		{"booleans", "", `{"topic":"a","message":true,"retain":true}`, broker.Message{Topic: "a", Payload: []byte("true"), Retain: true}},
		{"a number stays as it is written", "", `{"topic":"a","message":21.50}`, broker.Message{Topic: "a", Payload: []byte("21.50")}},
		{"JSON in JSON", "", `{"topic":"a","message":{"b": 1}}`, broker.Message{Topic: "a", Payload: []byte(`{"b": 1}`)}},
		{"form", "", `topic=a%2Fb&message=x+y&QoS=1`, broker.Message{Topic: "a/b", Payload: []byte("x y"), QoS: 1}},
		{"query", "?topic=a&message=on&QoS=1&retain=0", ``, broker.Message{Topic: "a", Payload: []byte("on"), QoS: 1}},
		{"query with small qos", "?topic=a&message=on&qos=2", ``, broker.Message{Topic: "a", Payload: []byte("on"), QoS: 2}},
		{"empty, to end a retained one", "?topic=a&message=&retain=1", ``, broker.Message{Topic: "a", Payload: []byte{}, Retain: true}},
	} {
		status, body := request(t, g, "POST", "/bwiot/api/v1/send_all"+tt.query, apitest.EditorToken, tt.body)
		if status != http.StatusOK {
			t.Errorf("%s: got status %d, %s", tt.name, status, body)
			continue
		}
		sent := g.Broker.Published()
		if got := sent[len(sent)-1]; !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// A publication that waits for the disk is not waited for when its client has
// gone, nor for ever.
func TestSendAllIsBounded(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	left := make(chan time.Duration, 1)
	g.Broker.OnPublish = func(ctx context.Context, _ broker.Message) error {
		deadline, _ := ctx.Deadline()
		left <- time.Until(deadline)
		return ctx.Err()
	}
	request(t, g, "POST", "/bwiot/api/v1/send_all?topic=a&message=b&QoS=1", apitest.AdminToken, "")
	if d := <-left; d <= 0 || d > 30*time.Second {
		t.Errorf("got %v to publish in, want some, and less than an answer may take", d)
	}
}

// Who reads the log learns that the message may come yet; a topic that nobody
// can publish to is the caller's affair.
func TestSendAllFailureIsLogged(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{broker.ErrInvalidTopic, ""},
		{context.DeadlineExceeded, `level=WARN msg="message of the api not durable in time, it may still be delivered" err="context deadline exceeded" topic=a`},
		{errors.New("defect"), `level=WARN msg="message of the api not published" err=defect topic=a`},
	} {
		g := apitest.Start(t, apitest.Config())
		g.Broker.OnPublish = func(context.Context, broker.Message) error { return tt.err }
		request(t, g, "POST", "/bwiot/api/v1/send_all?topic=a&message=b", apitest.AdminToken, "")
		if got := g.Log.String(); tt.want == "" && strings.Contains(got, "WARN") || !strings.Contains(got, tt.want) {
			t.Errorf("%v: got log %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestStorageFault(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	if err := g.DB.Close(); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct{ method, path, token string }{
		{"POST", "/bwiot/api/v1/login?username=ann&password=secret", ""},
		{"GET", "/bwiot/api/v1/connected_devices", apitest.AdminToken},
	} {
		status, body := request(t, g, r.method, r.path, r.token, "")
		if status != http.StatusInternalServerError || !strings.Contains(body, `"bwapi-status":"fail"`) {
			t.Errorf("%s: got %d, %s, want 500", r.path, status, body)
		}
		if strings.Contains(body, "database") {
			t.Errorf("%s: got %s, which tells a stranger about the inside", r.path, body)
		}
	}
	if !strings.Contains(g.Log.String(), `msg="bevywise request failed" err="read token: sql: database is closed"`) {
		t.Errorf("the reason is not in the log:\n%s", g.Log)
	}
}

func TestBodyTooLarge(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	big := `{"topic":"a","message":"` + strings.Repeat("x", 1<<20) + `"}`
	status, body := request(t, g, "POST", "/bwiot/api/v1/send_all", apitest.AdminToken, big)
	if status != http.StatusRequestEntityTooLarge {
		t.Errorf("got %d, %s, want 413", status, body)
	}
	if n := len(g.Broker.Published()); n != 0 {
		t.Errorf("%d messages were published", n)
	}
}

func TestLoginIsRateLimited(t *testing.T) {
	g := apitest.Start(t, apitest.Config())
	const wrong = "/bwiot/api/v1/login?username=ann&password=wrong"
	var status int
	var body string
	for range 10 {
		if status, body = request(t, g, "POST", wrong, "", ""); status != http.StatusOK {
			break
		}
	}
	if status != http.StatusTooManyRequests || !strings.Contains(body, `"bwapi-status-reason":"Invalid Login"`) {
		t.Errorf("got %d, %s, want 429 with the documented reason", status, body)
	}
	// Nor does the right password help now: who guesses must not learn it.
	if status, _ = request(t, g, "POST", "/bwiot/api/v1/login?username=ann&password=secret", "", ""); status != http.StatusTooManyRequests {
		t.Errorf("the right password: got %d, want 429", status)
	}
}

func request(t *testing.T, g *apitest.Gateway, method, path, token, body string) (status int, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, g.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", token)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}
