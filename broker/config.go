package broker

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"penstock/internal/units"
)

// Config is the [broker] section of the configuration file.
type Config struct {
	Anonymous      string `toml:"anonymous"`       // who may connect without a user name: "none", "loopback" or "all"
	MaxConnections int    `toml:"max_connections"` // connections in all

	MaxConnectionsPerAddress int `toml:"max_connections_per_address"` // connections from one address, over all listeners; 0: no bound

	ConnectTimeout   units.Duration   `toml:"connect_timeout"`         // from accept to CONNACK
	WriteTimeout     units.Duration   `toml:"write_timeout"`           // a client that takes no byte for so long is disconnected
	MaxPacket        units.Bytes      `toml:"max_packet"`              // largest packet taken from a signed-in client
	MaxConnect       units.Bytes      `toml:"max_connect"`             // largest CONNECT
	MaxTopicBytes    int              `toml:"max_topic_bytes"`         // length of a topic name or filter
	MaxTopicLevels   int              `toml:"max_topic_levels"`        // levels of a topic name or filter
	MaxSubscriptions int              `toml:"max_subscriptions"`       // per client
	ReceiveMaximum   int              `toml:"receive_maximum"`         // PUBLISH packets of QoS 1 and 2 that a client may have unacknowledged
	Window           int              `toml:"window"`                  // deliveries of QoS 1 and 2 in flight to a client
	MaxQueueMessages int              `toml:"max_queue_messages"`      // waiting for one client
	MaxQueueBytes    units.Bytes      `toml:"max_queue_bytes"`         // waiting for one client: topics, payloads and properties
	MaxQueueMemory   units.Bytes      `toml:"max_queue_memory"`        // the same for a client whose session ends with its connection, so that nothing of it is on disk
	MaxQueueAge      units.Duration   `toml:"max_queue_age"`           // how long a message may wait; 0: no bound
	MaxStore         units.Bytes      `toml:"max_store"`               // all queues on disk together
	QueueOverflow    string           `toml:"queue_overflow"`          // at a bound: "drop-oldest", "drop-newest" or "reject"
	MaxOutput        units.Bytes      `toml:"max_output"`              // written to one client and not yet taken by it: QoS 0 beyond is dropped
	MaxSessions      int              `toml:"max_sessions"`            // persistent ones
	MaxRetained      units.Bytes      `toml:"max_retained"`            // retained messages in all: topics, payloads, properties, and what the index takes
	MaxAllSubs       int              `toml:"max_subscriptions_total"` // of all clients
	SessionExpiry    units.Duration   `toml:"session_expiry"`          // longest Session Expiry Interval, and that of MQTT 3.x sessions
	MaxKeepAlive     units.Duration   `toml:"max_keep_alive"`          // longest Keep Alive of MQTT 5 clients; 0: as they ask
	ResponseInfo     string           `toml:"response_information"`    // what MQTT 5 clients get that ask for it; %c and %u are replaced
	WillGrace        units.Duration   `toml:"will_grace"`              // after a restart, wills of clients that did not come back
	SysInterval      units.Duration   `toml:"sys_interval"`            // how often $SYS topics are published; 0: never
	Listeners        []ListenerConfig `toml:"listener"`

	Version string `toml:"-"` // of the program, as $SYS/broker/version shows it

	MachineTime func() MachineTime `toml:"-"` // reads the machine's clocks; nil, but in tests: as they are
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Anonymous:        "loopback",
		MaxConnections:   10000,
		ConnectTimeout:   units.Duration(10e9),
		WriteTimeout:     units.Duration(120e9),
		MaxPacket:        1 << 20,
		MaxConnect:       128 << 10,
		MaxTopicBytes:    4096,
		MaxTopicLevels:   128,
		MaxSubscriptions: 10000,
		ReceiveMaximum:   1000,
		Window:           256,
		MaxQueueMessages: 10000000,
		MaxQueueBytes:    256 << 20,
		MaxQueueMemory:   32 << 20,
		MaxStore:         1 << 30,
		QueueOverflow:    overflowDropOldest,
		MaxOutput:        1 << 20,
		MaxSessions:      100000,
		MaxRetained:      64 << 20,
		MaxAllSubs:       200000,
		SessionExpiry:    units.Duration(30 * 24 * 3600e9),
		WillGrace:        units.Duration(30e9),
		SysInterval:      units.Duration(10e9),
		Listeners:        []ListenerConfig{{Name: "tcp", Address: ":1883", Protocol: protocolMQTT}},
	}
}

// Validate returns an error that names the key whose value cannot work.
func (c Config) Validate() error {
	switch c.Anonymous {
	case "none", "loopback", "all":
	default:
		return fmt.Errorf(`broker.anonymous: %q is none of "none", "loopback", "all"`, c.Anonymous)
	}
	err := errors.Join(
		within("max_connections", c.MaxConnections, 1, 1000000),
		within("max_connections_per_address", c.MaxConnectionsPerAddress, 0, 1000000),
		within("connect_timeout", c.ConnectTimeout, 1e8, 600e9),
		within("write_timeout", c.WriteTimeout, 1e9, 86400e9),
		within("max_packet", c.MaxPacket, 1<<10, 255<<20),
		within("max_connect", c.MaxConnect, 1<<10, 1<<20),
		within("max_topic_bytes", c.MaxTopicBytes, 16, 65535),
		within("max_topic_levels", c.MaxTopicLevels, 4, 65535),
		within("max_subscriptions", c.MaxSubscriptions, 1, 1000000),
		within("receive_maximum", c.ReceiveMaximum, 1, 65535),
		within("window", c.Window, 1, 65535),
		within("max_queue_messages", c.MaxQueueMessages, 1, 100000000),
		within("max_queue_bytes", c.MaxQueueBytes, 1<<10, 1<<40),
		within("max_queue_memory", c.MaxQueueMemory, 1<<10, 1<<30),
		within("max_queue_age", c.MaxQueueAge, 0, 36500*24*3600e9),
		within("max_store", c.MaxStore, 1<<20, 1<<44),
		within("max_output", c.MaxOutput, 64<<10, 128<<20),
		within("max_sessions", c.MaxSessions, 1, 1000000),
		within("max_retained", c.MaxRetained, 1<<10, 1<<40),
		within("max_subscriptions_total", c.MaxAllSubs, 1, 100000000),
		within("session_expiry", c.SessionExpiry, 1e9, 36500*24*3600e9),
		within("will_grace", c.WillGrace, 0, 86400e9),
	)
	switch c.QueueOverflow {
	case overflowDropOldest, overflowDropNewest, overflowReject:
	default:
		err = errors.Join(err, fmt.Errorf("broker.queue_overflow: %q is none of %q, %q, %q", c.QueueOverflow, overflowDropOldest, overflowDropNewest, overflowReject))
	}
	if c.MaxKeepAlive < 0 || c.MaxKeepAlive > 65535e9 || c.MaxKeepAlive%1e9 != 0 {
		err = errors.Join(err, fmt.Errorf("broker.max_keep_alive: %v is not whole seconds from 0s to 65535s", c.MaxKeepAlive))
	}
	if c.SysInterval != 0 && (c.SysInterval < 1e9 || c.SysInterval > 3600e9) {
		err = errors.Join(err, fmt.Errorf("broker.sys_interval: %v is not between 1s and 1h, nor 0s", c.SysInterval))
	}
	if err != nil {
		return err
	}
	if len(c.ResponseInfo) > 1024 {
		return fmt.Errorf("broker.response_information: %d bytes are more than 1024", len(c.ResponseInfo))
	}
	names := map[string]int{}
	for i, l := range c.Listeners {
		if l.Name == "" {
			return fmt.Errorf(`broker.listener[%d].name: there is none: write one for the log and the status, as "plant"`, i)
		}
		if other, twice := names[l.Name]; twice {
			return fmt.Errorf("broker.listener[%d].name: broker.listener[%d] has the name %q too: give each its own", i, other, l.Name)
		}
		names[l.Name] = i
		if err := l.validate(fmt.Sprintf("listener[%d]", i)); err != nil {
			return err
		}
	}
	if len(c.Listeners) == 0 {
		return fmt.Errorf("broker.listener: none is configured")
	}
	return nil
}

// Resolved returns c with what each listener takes from [broker] written down
// for it, for whoever reads the configuration.
func (c Config) Resolved() Config {
	c.Listeners = slices.Clone(c.Listeners)
	for i := range c.Listeners {
		l := &c.Listeners[i]
		lim := c.limits(*l)
		l.Protocol = cmp.Or(l.Protocol, protocolMQTT)
		l.MaxPacket, l.ConnectTimeout, l.Anonymous = units.Bytes(lim.maxPacket), units.Duration(lim.connectTimeout), lim.anonymous
		if network, _ := l.Network(); network == NetworkUnix {
			mode, _ := l.mode() // Validate has seen it
			l.Mode = fmt.Sprintf("%04o", mode)
		}
	}
	return c
}

// within returns an error that names the key unless lo <= v <= hi.
func within[T int | units.Duration | units.Bytes](key string, v, lo, hi T) error {
	if v < lo || v > hi {
		return fmt.Errorf("broker.%s: %v is not between %v and %v", key, v, lo, hi)
	}
	return nil
}

func (c *Config) queueBytes() int64 { return int64(c.MaxQueueBytes) }
