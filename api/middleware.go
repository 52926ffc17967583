package api

import (
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"time"
)

// guard is around every request of every API: it bounds the body, keeps a panic
// in one request, and writes the request log.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w}
		r.Body = http.MaxBytesReader(w, r.Body, s.limits.body)
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.deps.Log.Error("panic in http request", "err", p, "method", r.Method, "url", redact(r.URL),
					"stack", string(debug.Stack()))
				if rec.status == 0 {
					writeError(rec, errInternal)
				}
			}
			if log := s.deps.Log; log.Enabled(r.Context(), slog.LevelDebug) {
				log.Debug("http request", "method", r.Method, "url", redact(r.URL), "status", rec.status,
					"address", r.RemoteAddr, "took", time.Since(start))
			}
		}()
		next.ServeHTTP(rec, r)
	})
}

// recorder remembers the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int // 0 until the header is written
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController find the writer.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// secrets are the names, in lower case, of parameters whose value is never
// logged. Some vendors' clients send them in the query.
var secrets = []string{"token", "password", "passwd", "secret"}

// redact returns u as it may be logged. What cannot be parsed is left out whole:
// a secret may be in it.
func redact(u *url.URL) string {
	if u.RawQuery == "" {
		return u.EscapedPath()
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return u.EscapedPath() + "?(unreadable)"
	}
	for name, values := range q {
		for _, secret := range secrets {
			if strings.Contains(strings.ToLower(name), secret) {
				for i := range values {
					values[i] = "redacted"
				}
			}
		}
	}
	return u.EscapedPath() + "?" + q.Encode()
}
