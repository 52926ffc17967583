package api

import "net/http"

type healthJSON struct {
	Ready    bool     `json:"ready"`
	Degraded bool     `json:"degraded"`
	Reasons  []string `json:"reasons"`
}

func (s *Server) health() healthJSON {
	h := s.deps.Broker.Health()
	reasons := append([]string{}, h.Reasons...)
	if w := s.wear(); w != nil && w.Warning != "" {
		h.Degraded = true
		reasons = append(reasons, w.Warning)
	}
	return healthJSON{h.Ready, h.Degraded, reasons}
}

// getHealthz is for whoever restarts a process that hangs: it answers as long as
// requests are answered at all, whatever else is wrong. A restart mends no disk.
func (s *Server) getHealthz(w http.ResponseWriter, r *http.Request) error {
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	return nil
}

// getReadyz is for whoever sends clients here: 503 while the broker does not
// serve, or cannot make anything durable and so acknowledges nothing.
func (s *Server) getReadyz(w http.ResponseWriter, r *http.Request) error {
	h := s.health()
	status := http.StatusOK
	if !h.Ready {
		status = http.StatusServiceUnavailable
	}
	writeJSON(w, status, h)
	return nil
}
