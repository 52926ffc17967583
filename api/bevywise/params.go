package bevywise

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"strconv"
)

// params are the parameters of a request. The vendor says "raw data in body" and
// "given as a parameter", and its clients do all of it: a JSON object, a form,
// or the query. What is in the body counts before what is in the query.
type params map[string]string

// readParams reads the body, which the caller has bounded.
func readParams(r *http.Request) (params, error) {
	p := params{}
	for name, values := range r.URL.Query() {
		p[name] = values[0]
	}
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	text = bytes.TrimSpace(text)
	kind, attr, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch {
	case len(text) == 0:
		return p, nil
	// Known by its first byte: curl and others call any body a form.
	case text[0] == '{':
		return p, p.addJSON(text)
	case kind == "multipart/form-data":
		return p, p.addMultipart(text, attr["boundary"])
	case kind == "application/x-www-form-urlencoded":
		form, err := url.ParseQuery(string(text))
		for name, values := range form {
			p[name] = values[0]
		}
		return p, err
	}
	return p, errors.New("the body is neither a JSON object nor a form")
}

func (p params) addJSON(text []byte) error {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		return err
	}
	for name, raw := range object {
		switch raw[0] {
		case '"':
			var s string
			if err := json.Unmarshal(raw, &s); err != nil {
				return err
			}
			p[name] = s
		case 'n': // null is as good as nothing
		default: // a number, or a message that is JSON itself
			p[name] = string(raw)
		}
	}
	return nil
}

func (p params) addMultipart(text []byte, boundary string) error {
	parts := multipart.NewReader(bytes.NewReader(text), boundary)
	for {
		part, err := parts.NextPart()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		value, err := io.ReadAll(part)
		if err != nil {
			return err
		}
		p[part.FormName()] = string(value)
	}
}

// text returns a parameter that has to be there and may be empty.
func (p params) text(name string) (string, error) {
	v, ok := p[name]
	if !ok {
		return "", errParameter(name, "It has to be given.")
	}
	return v, nil
}

// name returns a parameter that has to be there and cannot be empty.
func (p params) name(name string) (string, error) {
	if p[name] == "" {
		return "", errParameter(name, "It has to be given.")
	}
	return p[name], nil
}

// number returns an optional parameter from 0 to most, 0 if it is not given.
func (p params) number(name string, most int) (int, error) {
	v := p[name]
	if v == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 || n > most {
		return 0, errParameter(name, "It is a number from 0 to "+strconv.Itoa(most)+".")
	}
	return n, nil
}

// flag returns an optional parameter that is 0 or 1.
func (p params) flag(name string) (bool, error) {
	switch p[name] {
	case "", "0", "false":
		return false, nil
	case "1", "true":
		return true, nil
	}
	return false, errParameter(name, "It is 0 or 1.")
}
