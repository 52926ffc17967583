package bevywise

import (
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"

	"penstock/api/auth"
)

// body is the JSON object of an answer.
type body map[string]any

// success and failure are the two kinds of answer that the vendor documents.
// Both are the outcome of a request that was understood: status 200.
func success(more body) body {
	b := body{"bwapi-status": "success"}
	for k, v := range more {
		b[k] = v
	}
	return b
}

func done(reason string) body { return success(body{"bwapi-status-reason": reason}) }

func failure(reason string) body {
	return body{"bwapi-status": "fail", "bwapi-status-reason": reason}
}

// apiError is a request that came to nothing. The vendor documents two families
// of bodies for one condition, so an answer has the keys of both.
type apiError struct {
	status int
	reason string
	detail string
}

func (e *apiError) Error() string { return e.reason }

var (
	errNoToken   = &apiError{http.StatusUnauthorized, "Authorization Credentials not provided", "Authentication credentials were not provided."}
	errBadToken  = &apiError{http.StatusUnauthorized, "Invalid Access Token", "Invalid token."}
	errForbidden = &apiError{http.StatusForbidden, "Permission denied", "You do not have permission to perform this action."}
	errNoPath    = &apiError{http.StatusNotFound, "Not found", "Not found."}
	errBadMethod = &apiError{http.StatusMethodNotAllowed, "Method not allowed", "Method not allowed."}
	errTooBig    = &apiError{http.StatusRequestEntityTooLarge, "Request too large", "The body is too large."}
	errInternal  = &apiError{http.StatusInternalServerError, "Internal error", "Internal error."}
)

// errParameter is the answer to a parameter that is missing or malformed: the
// vendor has one text for both.
func errParameter(name, detail string) error {
	return &apiError{http.StatusBadRequest, "Missing parameter:" + name, detail}
}

// answer is the only place where this API writes.
func (a *api) answer(h handlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := h(r, nil)
		if err != nil {
			a.fail(w, r, err)
			return
		}
		a.respond(w, http.StatusOK, b)
	})
}

func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	var wait *auth.RateLimitError
	var tooBig *http.MaxBytesError
	e := errInternal
	switch {
	case errors.As(err, &e):
	case errors.As(err, &wait):
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.RetryAfter.Seconds()))))
		e = &apiError{http.StatusTooManyRequests, "Invalid Login", "Too many sign-ins. Try again later."}
	case errors.As(err, &tooBig):
		e = errTooBig
	case r.Context().Err() == nil:
		a.deps.Log.Error("bevywise request failed", "err", err, "path", r.URL.Path)
	}
	b := failure(e.reason)
	b["detail"] = e.detail
	a.respond(w, e.status, b)
}

func (a *api) respond(w http.ResponseWriter, status int, b body) {
	if a.cfg.Always200 {
		status = http.StatusOK
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.Encode(b) // that the client has gone is no error of ours
}
