package api

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
)

// apiError is an error whose text the client may read.
type apiError struct {
	status  int
	code    string // for programs; never changes
	message string // for people
}

func (e *apiError) Error() string { return e.message }

var (
	errInternal   = &apiError{http.StatusInternalServerError, "internal", "internal error: the log has the reason"}
	errNoToken    = &apiError{http.StatusUnauthorized, "unauthorized", "sign in first: the Authorization header has no token"}
	errBadToken   = &apiError{http.StatusUnauthorized, "unauthorized", "sign in again: the token is not valid, or no longer"}
	errForbidden  = &apiError{http.StatusForbidden, "forbidden", "the operator's role does not allow this"}
	errNoPath     = &apiError{http.StatusNotFound, "not_found", "there is nothing at this path"}
	errBadMethod  = &apiError{http.StatusMethodNotAllowed, "method_not_allowed", "this path does not know the method"}
	errNoJSON     = &apiError{http.StatusUnsupportedMediaType, "unsupported_media_type", "the body has to be application/json"}
	errBodyTooBig = &apiError{http.StatusRequestEntityTooLarge, "too_large", "the body is too large"}
)

func errInvalid(message string) error {
	return &apiError{http.StatusBadRequest, "invalid", message}
}

// writeError is the only place where the own API writes errors:
// {"error":{"code":"…","message":"…"}}. What the handler did not choose to tell
// is not told.
func writeError(w http.ResponseWriter, err error) {
	e := errInternal
	errors.As(err, &e)
	writeJSON(w, e.status, map[string]any{"error": map[string]string{"code": e.code, "message": e.message}})
}

// writeJSON writes v, which always can be encoded. That the client has gone is
// no error of ours.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.Encode(v)
}

// readJSON decodes the body into v, strictly: an unknown key is more likely a
// misspelt one than one to be ignored.
func readJSON(r *http.Request, v any) error {
	if ct, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || ct != "application/json" {
		return errNoJSON
	}
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if err == nil {
		_, err = dec.Token()
		if err == nil {
			return errInvalid("the body has more than one JSON value")
		}
	}
	var tooBig *http.MaxBytesError
	switch {
	case errors.Is(err, io.EOF) && dec.InputOffset() > 0:
		return nil
	case errors.Is(err, io.EOF):
		return errInvalid("the body is empty")
	case errors.As(err, &tooBig):
		return errBodyTooBig
	}
	return errInvalid("the body is not the JSON that was expected: " + err.Error())
}
