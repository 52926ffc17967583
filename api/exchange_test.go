package api_test

import (
	"flag"
	"strings"
	"testing"
	"time"

	"penstock/api"
	"penstock/api/internal/apitest"
	"penstock/broker"
	"penstock/storage"
)

var update = flag.Bool("update", false, "record responses and golden files anew")

func TestExchanges(t *testing.T) {
	seen := apitest.Run(t, *update, func(t *testing.T, file string) *apitest.Gateway {
		cfg := apitest.Config()
		cfg.MetricsLoopback = !strings.Contains(file, "metrics_token")
		g := apitest.Start(t, cfg)
		g.Broker.Set(func(_ *[]broker.ClientInfo, health *broker.Health, stats *broker.Stats) {
			switch {
			case strings.Contains(file, "health_degraded"):
				*health = broker.Health{Ready: true, Degraded: true, Reasons: []string{"bridge: no uplink since 12:00"}}
			case strings.Contains(file, "health_starting"):
				*health = broker.Health{Reasons: []string{"restoring sessions"}}
			case strings.Contains(file, "health_storage"):
				*health = broker.Health{Degraded: true, Reasons: []string{"storage: commits fail, acknowledgements wait: disk full"}}
				stats.Journal.Failing = "disk full"
			case strings.Contains(file, "status_salvage"):
				stats.Salvage = &storage.SalvageReport{
					Time: time.Date(2026, 11, 24, 11, 36, 25, 0, time.UTC), Why: "database disk image is malformed (11)", File: "penstock.db.corrupt-20261124T113625Z",
					Seconds: 0.25, Pages: 2, Running: true, Given: 14, Unclaimed: 1,
					Tables: []storage.SalvagedRows{{Table: "session", Kept: 3, Lost: 1}, {Table: "segment", Kept: 7, Unknown: true}},
				}
				*health = broker.Health{Ready: true, Degraded: true, Reasons: []string{stats.Salvage.Summary()}}
			}
		})
		return g
	})
	apitest.CheckRoutes(t, api.Routes(), seen)
}
