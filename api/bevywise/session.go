package bevywise

import (
	"errors"
	"net/http"

	"penstock/api/auth"
)

// admit puts the sign-in before h, and reads the parameters only of those who
// have signed in, or who want to.
func (a *api) admit(role string, h handlerFunc) handlerFunc {
	return func(r *http.Request, _ params) (body, error) {
		if role != "" {
			token := auth.Token(r.Header)
			if token == "" {
				return nil, errNoToken
			}
			who, err := a.deps.Auth.Authenticate(r.Context(), token)
			if errors.Is(err, auth.ErrInvalidToken) {
				return nil, errBadToken
			}
			if err != nil {
				return nil, err
			}
			if !who.May(role) {
				return nil, errForbidden
			}
		}
		p, err := readParams(r)
		var tooBig *http.MaxBytesError
		if errors.As(err, &tooBig) {
			return nil, err
		}
		if err != nil {
			return nil, &apiError{http.StatusBadRequest, "Missing parameter:body", "The body is neither a JSON object nor a form."}
		}
		return h(r, p)
	}
}

// login answers with a token, which is opaque to the client.
func (a *api) login(r *http.Request, p params) (body, error) {
	username, err := p.name("username")
	if err != nil {
		return nil, err
	}
	password, err := p.name("password")
	if err != nil {
		return nil, err
	}
	token, err := a.deps.Auth.Login(r.Context(), r.RemoteAddr, username, password)
	if errors.Is(err, auth.ErrInvalidLogin) {
		return failure("Invalid Login"), nil
	}
	if err != nil {
		return nil, err
	}
	b := done("Logged in")
	b["access_token"] = token
	return b, nil
}

func (a *api) logout(r *http.Request, _ params) (body, error) {
	err := a.deps.Auth.Logout(r.Context(), auth.Token(r.Header))
	if errors.Is(err, auth.ErrInvalidToken) { // ended since it was admitted
		return nil, errBadToken
	}
	if err != nil {
		return nil, err
	}
	return done("Logged Out"), nil
}
