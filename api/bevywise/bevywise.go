// Package bevywise serves the REST API that Bevywise documents for its broker
// MQTTRoute, so that manager applications made for it work with Penstock. It
// holds only what the vendor documents and translates it to calls of the broker;
// it decides nothing itself.
//
// A new endpoint is a line in routes, a method in the file of its resource and
// an exchange in testdata whose expected body comes from the vendor's document.
package bevywise

import (
	"context"
	"log/slog"
	"net/http"

	"github.com/julienschmidt/httprouter"

	"penstock/api/auth"
	"penstock/broker"
)

// Config is the section [api.bevywise] of the configuration file.
type Config struct {
	// Always200 answers with status 200 throughout, for clients that read
	// the body only then.
	Always200 bool `toml:"always_200"`
}

// Prefixes are the paths below which all of this API is, each with a slash at
// its end.
var Prefixes = []string{"/bwiot/"}

type clients interface {
	Clients() []broker.ClientInfo
}

type publisher interface {
	Publish(ctx context.Context, m broker.Message) error
}

type authenticator interface {
	Login(ctx context.Context, address, name, password string) (token string, err error)
	Authenticate(ctx context.Context, token string) (auth.Identity, error)
	Logout(ctx context.Context, token string) error
}

// Deps are the parts that the API translates to. All are needed.
type Deps struct {
	Auth      authenticator // an *auth.Authority
	Clients   clients       // a *broker.Broker
	Publisher publisher     // a *broker.Broker
	Log       *slog.Logger
}

type api struct {
	cfg  Config
	deps Deps
}

// New returns the handler of all paths below Prefixes.
func New(cfg Config, d Deps) http.Handler { return (&api{cfg, d}).router() }

// handlerFunc answers a request with a body for respond, or returns an error for
// fail.
type handlerFunc func(r *http.Request, p params) (body, error)

type route struct {
	method, path string
	role         string // that the caller needs, or "" for none
	handle       handlerFunc
}

func (a *api) routes() []route {
	return []route{
		{"POST", "/bwiot/api/v1/login", "", a.login},                                    // username, password
		{"POST", "/bwiot/api/v1/logout", auth.Viewer, a.logout},                         //
		{"POST", "/bwiot/api/v1/send_all", auth.Editor, a.sendAll},                      // topic, message, QoS, retain
		{"GET", "/bwiot/api/v1/connected_devices", auth.Viewer, a.listConnectedDevices}, //
	}
}

func (a *api) router() http.Handler {
	r := httprouter.New()
	// Clients send POST with a slash at the end or without one, and few of
	// them follow a redirect with their body.
	r.RedirectTrailingSlash = false
	r.RedirectFixedPath = false
	r.NotFound = a.answer(func(*http.Request, params) (body, error) { return nil, errNoPath })
	r.MethodNotAllowed = a.answer(func(*http.Request, params) (body, error) { return nil, errBadMethod })
	for _, rt := range a.routes() {
		h := a.answer(a.admit(rt.role, rt.handle))
		r.Handler(rt.method, rt.path, h)
		r.Handler(rt.method, rt.path+"/", h)
	}
	return r
}
