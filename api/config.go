package api

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"penstock/api/bevywise"
	"penstock/internal/units"
)

// off is the value of HTTP that opens no listener.
const off = "off"

// Config is the section [api] of the configuration file.
type Config struct {
	// HTTP is the address to listen on, as "host:port" or ":port", or "off".
	HTTP string `toml:"http"`
	// TokenIdle is how long a token lives after its last use.
	TokenIdle units.Duration `toml:"token_idle"`
	// MetricsLoopback lets /metrics be read without a token from the gateway
	// itself. Switch it off behind a proxy on the same machine, which makes
	// everybody local.
	MetricsLoopback bool `toml:"metrics_loopback"`
	// Bevywise configures the API that is compatible with Bevywise MQTTRoute.
	Bevywise bevywise.Config `toml:"bevywise"`
}

// DefaultConfig returns the configuration of a gateway installed as a service.
func DefaultConfig() Config {
	return Config{
		HTTP:            ":8080",
		TokenIdle:       units.Duration(12 * time.Hour),
		MetricsLoopback: true,
	}
}

// Validate returns an error that names the first key whose value cannot work.
func (c Config) Validate() error {
	if c.HTTP != off {
		_, port, err := net.SplitHostPort(c.HTTP)
		if err != nil {
			return fmt.Errorf(`api.http: %q is no address: write ":8080", "host:8080" or "off"`, c.HTTP)
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("api.http: %q is no port from 0 to 65535", port)
		}
	}
	if d := c.TokenIdle.D(); d < time.Minute || d > 366*24*time.Hour {
		return errors.New("api.token_idle: " + c.TokenIdle.String() + " is outside 1m to 366d")
	}
	return nil
}
