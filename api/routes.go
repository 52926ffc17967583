package api

import (
	"errors"
	"net"
	"net/http"
	"net/netip"

	"github.com/julienschmidt/httprouter"

	"penstock/api/auth"
)

// access says who may call a route.
type access int

const (
	everybody access = iota
	scraper          // a viewer, or whoever asks from the gateway itself
	viewer
	admin
)

// handlerFunc answers a request, or returns an error for writeError and writes
// nothing.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

type route struct {
	method, path string
	access       access
	handle       handlerFunc
}

func (s *Server) routes() []route {
	return []route{
		{"GET", "/healthz", everybody, s.getHealthz},
		{"GET", "/readyz", everybody, s.getReadyz},
		{"GET", "/metrics", scraper, s.getMetrics},

		{"GET", "/api/v1/status", viewer, s.getStatus},
		{"PUT", "/api/v1/log-level", admin, s.putLogLevel}, // {"level":"debug"}
	}
}

func (s *Server) router() http.Handler {
	r := httprouter.New()
	r.RedirectTrailingSlash = false
	r.RedirectFixedPath = false
	r.NotFound = s.answer(func(http.ResponseWriter, *http.Request) error { return errNoPath })
	r.MethodNotAllowed = s.answer(func(http.ResponseWriter, *http.Request) error { return errBadMethod })
	for _, rt := range s.routes() {
		h := s.answer(func(w http.ResponseWriter, req *http.Request) error {
			if err := s.admit(req, rt.access); err != nil {
				return err
			}
			return rt.handle(w, req)
		})
		r.Handler(rt.method, rt.path, h)
		if rt.method == http.MethodGet { // net/http leaves the body out
			r.Handler(http.MethodHead, rt.path, h)
		}
	}
	return r
}

func (s *Server) answer(h handlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := h(w, r)
		if err == nil {
			return
		}
		var known *apiError
		if !errors.As(err, &known) && r.Context().Err() == nil {
			s.deps.Log.Error("http request failed", "err", err, "method", r.Method, "url", redact(r.URL))
		}
		writeError(w, err)
	})
}

// admit returns nil if who makes the request may do so.
func (s *Server) admit(r *http.Request, a access) error {
	role := auth.Admin
	switch a {
	case everybody:
		return nil
	case scraper:
		if s.cfg.MetricsLoopback && fromLoopback(r) {
			return nil
		}
		role = auth.Viewer
	case viewer:
		role = auth.Viewer
	}
	token := auth.Token(r.Header)
	if token == "" {
		return errNoToken
	}
	who, err := s.auth.Authenticate(r.Context(), token)
	if errors.Is(err, auth.ErrInvalidToken) {
		return errBadToken
	}
	if err != nil {
		return err
	}
	if !who.May(role) {
		return errForbidden
	}
	return nil
}

func fromLoopback(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}
