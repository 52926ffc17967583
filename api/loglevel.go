package api

import (
	"log/slog"
	"net/http"
	"strings"
)

type logLevelJSON struct {
	Level string `json:"level"` // "debug", "info", "warn" or "error"
}

// levels are the levels that can be set, by name.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

func (s *Server) logLevel() string { return strings.ToLower(s.deps.LogLevel.Level().String()) }

func (s *Server) putLogLevel(w http.ResponseWriter, r *http.Request) error {
	var body logLevelJSON
	if err := readJSON(r, &body); err != nil {
		return err
	}
	level, ok := levels[body.Level]
	if !ok {
		return errInvalid("level is debug, info, warn or error")
	}
	s.deps.LogLevel.Set(level)
	s.deps.Log.Log(r.Context(), level, "log level changed", "level", body.Level)
	writeJSON(w, http.StatusOK, logLevelJSON{s.logLevel()})
	return nil
}
