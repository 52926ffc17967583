// Package api serves Penstock's HTTP APIs: its own under /api/v1, those that are
// compatible with other vendors in packages below, and the pages that monitors
// read: /healthz, /readyz and /metrics.
//
// A new endpoint of the own API is a line in routes, a method in the file of its
// resource and an exchange in testdata.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"penstock/api/auth"
	"penstock/api/bevywise"
	"penstock/broker"
	"penstock/storage"
)

// theBroker is what the APIs need of broker.Broker.
type theBroker interface {
	Publish(ctx context.Context, m broker.Message) error
	Clients() []broker.ClientInfo
	Listeners() []broker.ListenerInfo
	Stats() broker.Stats
	Health() broker.Health
}

var _ theBroker = (*broker.Broker)(nil)

// Deps are the parts that the APIs show and steer. All but Panel and Wear are
// needed.
type Deps struct {
	Broker  theBroker // a *broker.Broker
	DB      *storage.DB
	Log     *slog.Logger
	Version string // of the binary, as "penstock version" prints it
	// Panel returns the state that the LEDs show and the pattern of each LED
	// by its role. It is called from any goroutine; nil if there are no LEDs.
	Panel func() (state string, leds map[string]string)
	// Wear returns what the flash says about its own age. It is called from any
	// goroutine; nil if nobody asks the flash.
	Wear func() Wear
	// LogLevel is the level of Log, changed at run time.
	LogLevel *slog.LevelVar
}

// limits bounds what a client can hold of the gateway.
type limits struct {
	connections int           // open at a time; more wait to be accepted
	perAddress  int           // of these, from one address; more are closed
	body        int64         // bytes of a request's body
	header      int           // bytes of a request's header
	readHeader  time.Duration // for the whole header: a client that drips it byte by byte is cut off
	read        time.Duration // for the whole request
	write       time.Duration // from the end of the header to the end of the answer
	idle        time.Duration // between two requests of a connection
	shutdown    time.Duration // for requests that run when Run is told to end
}

var defaultLimits = limits{
	connections: 256,
	perAddress:  32,
	body:        1 << 20,
	header:      16 << 10,
	readHeader:  5 * time.Second,
	read:        15 * time.Second,
	write:       30 * time.Second,
	idle:        30 * time.Second,
	shutdown:    2 * time.Second,
}

// Server serves all HTTP APIs on one address.
type Server struct {
	cfg    Config
	deps   Deps
	limits limits
	auth   *auth.Authority
	ln     net.Listener // nil when off
	http   *http.Server
}

// Listen binds the address of cfg. Connections wait until Run is called; if it
// never is, Close releases the address.
func Listen(cfg Config, d Deps) (*Server, error) {
	return listen(cfg, d, defaultLimits)
}

func listen(cfg Config, d Deps, lim limits) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, deps: d, limits: lim, auth: auth.New(d.DB, cfg.TokenIdle.D(), d.Log)}
	s.http = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: lim.readHeader,
		ReadTimeout:       lim.read,
		WriteTimeout:      lim.write,
		IdleTimeout:       lim.idle,
		MaxHeaderBytes:    lim.header,
		ErrorLog:          slog.NewLogLogger(d.Log.Handler(), slog.LevelDebug),
	}
	spare := spareConns{conns: make(map[net.Conn]struct{})}
	s.http.ConnState = spare.note
	s.http.RegisterOnShutdown(spare.close)
	if cfg.HTTP == off {
		return s, nil
	}
	ln, err := net.Listen("tcp", cfg.HTTP)
	if err != nil {
		return nil, fmt.Errorf("api.http: %w", err)
	}
	s.ln = limitListener(ln, lim.connections, lim.perAddress)
	return s, nil
}

// Addr returns the address that is really listened on, or nil when HTTP is off.
func (s *Server) Addr() net.Addr {
	if s.ln == nil {
		return nil
	}
	return s.ln.Addr()
}

// Close releases the address of a server that was never run.
func (s *Server) Close() error {
	if s.ln == nil {
		return nil
	}
	return s.ln.Close()
}

// Run serves until ctx ends, lets the requests that are running then finish, for
// a few seconds, and returns nil. It returns an error if it cannot accept
// connections. It is called once.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	authDone := make(chan error, 1)
	authCtx, stopAuth := context.WithCancel(context.WithoutCancel(ctx))
	go func() { authDone <- s.auth.Run(authCtx) }()
	// After the last request, since requests still note the use of tokens.
	defer func() { stopAuth(); <-authDone }()

	if s.ln == nil {
		<-ctx.Done()
		return nil
	}
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.ln) }()
	s.deps.Log.Info("http listening", "address", s.ln.Addr().String())
	select {
	case err := <-served:
		return fmt.Errorf("serve http: %w", err)
	case <-ctx.Done():
	}
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), s.limits.shutdown)
	defer stop()
	err := s.http.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		s.deps.Log.Warn("http requests cut off at shutdown")
		err = s.http.Close()
	}
	<-served // ErrServerClosed
	if err != nil {
		return fmt.Errorf("stop http: %w", err)
	}
	return nil
}

// handler puts the APIs together. Each has a router of its own under its prefix:
// httprouter has one tree for all, in which their paths would collide.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", s.router())
	vendor := bevywise.New(s.cfg.Bevywise, bevywise.Deps{
		Auth:      s.auth,
		Clients:   s.deps.Broker,
		Publisher: s.deps.Broker,
		Log:       s.deps.Log,
	})
	for _, prefix := range bevywise.Prefixes {
		mux.Handle(prefix, vendor)
	}
	return s.guard(mux)
}
