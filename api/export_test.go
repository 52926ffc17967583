package api

import "time"

// Routes returns every route as "METHOD /path".
func Routes() []string {
	var list []string
	for _, r := range (&Server{}).routes() {
		list = append(list, r.method+" "+r.path)
	}
	return list
}

// ListenImpatient is Listen with limits that a test can wait for.
func ListenImpatient(connections int, timeout time.Duration) func(Config, Deps) (*Server, error) {
	return func(cfg Config, d Deps) (*Server, error) {
		lim := defaultLimits
		lim.connections = connections
		lim.readHeader, lim.read, lim.idle, lim.shutdown = timeout, timeout, timeout, timeout
		return listen(cfg, d, lim)
	}
}
