package api

import (
	"net/http"
	"time"

	"penstock/broker"
	"penstock/storage"
)

type statusJSON struct {
	Version       string         `json:"version"`
	UptimeSeconds int64          `json:"uptime_seconds"`
	LogLevel      string         `json:"log_level"`
	Health        healthJSON     `json:"health"`
	Listeners     []listenerJSON `json:"listeners"`

	Connections      int64  `json:"connections"`
	ConnectionsTotal uint64 `json:"connections_total"`
	Sessions         int64  `json:"sessions"`
	Subscriptions    int64  `json:"subscriptions"`
	Retained         int64  `json:"retained"`

	MessagesIn  [3]uint64         `json:"messages_in"` // by QoS, as the three below
	MessagesOut [3]uint64         `json:"messages_out"`
	BytesIn     [3]uint64         `json:"bytes_in"`
	BytesOut    [3]uint64         `json:"bytes_out"`
	Dropped     map[string]uint64 `json:"dropped"` // by cause
	Limited     map[string]uint64 `json:"limited"` // by limit

	Queue   queueJSON   `json:"queue"`
	Disk    diskJSON    `json:"disk"`
	Journal journalJSON `json:"journal"`
	Flash   flashJSON   `json:"flash"`
	// Salvage is the report of the last damaged database; null if there was
	// none, or it was acknowledged.
	Salvage *storage.SalvageReport `json:"salvage"`
	Panel   *panelJSON             `json:"panel"` // null without LEDs
}

type listenerJSON struct {
	Name        string `json:"name"`
	Protocol    string `json:"protocol"`
	Address     string `json:"address"`
	Connections int    `json:"connections"`
}

type queueJSON struct {
	Messages int64 `json:"messages"`
	Bytes    int64 `json:"bytes"`
	// Alarms counts sessions whose queue has reached a share of its bound, by percent.
	Alarms     map[string]uint64 `json:"alarms"`
	StoreBytes int64             `json:"store_bytes"` // of all queues, on the disk
	StoreMax   int64             `json:"store_max"`
}

type diskJSON struct {
	FreeBytes    int64 `json:"free_bytes"`
	ReserveBytes int64 `json:"reserve_bytes"` // 0: the disk is not watched
	Low          bool  `json:"low"`
}

type journalJSON struct {
	Commits              uint64  `json:"commits"`
	Failures             uint64  `json:"failures"`
	Records              uint64  `json:"records"`
	Elided               uint64  `json:"elided"`
	BytesWritten         uint64  `json:"bytes_written"`
	CommitSecondsAverage float64 `json:"commit_seconds_average"`
	GroupSizeAverage     float64 `json:"group_size_average"`
	Failing              string  `json:"failing"` // why the last commit failed; "" when it did not
}

type panelJSON struct {
	State string            `json:"state"`
	LEDs  map[string]string `json:"leds"` // pattern by role
}

func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) error {
	writeJSON(w, http.StatusOK, s.status())
	return nil
}

func (s *Server) status() statusJSON {
	st := s.deps.Broker.Stats()
	j := statusJSON{
		Version:       s.deps.Version,
		UptimeSeconds: uptime(st),
		LogLevel:      s.logLevel(),
		Health:        s.health(),
		Listeners:     []listenerJSON{},

		Connections:      st.Connections,
		ConnectionsTotal: st.ConnectionsTotal,
		Sessions:         st.Sessions,
		Subscriptions:    st.Subscriptions,
		Retained:         st.Retained,

		MessagesIn:  st.MessagesIn,
		MessagesOut: st.MessagesOut,
		BytesIn:     st.BytesIn,
		BytesOut:    st.BytesOut,
		Dropped:     st.Dropped,
		Limited:     st.Limited,

		Queue: queueJSON{st.QueueMessages, st.QueueBytes, st.QueueAlarms, st.Journal.SegmentBytes, st.StoreBound},
		Disk:  diskJSON{st.Disk.Free, st.Disk.Reserve, st.Disk.Low},
		Journal: journalJSON{
			Commits:              st.Journal.Commits,
			Failures:             st.Journal.Failures,
			Records:              st.Journal.Records,
			Elided:               st.Journal.Elided,
			BytesWritten:         st.Journal.BytesWritten,
			CommitSecondsAverage: average(st.Journal.CommitSeconds),
			GroupSizeAverage:     average(st.Journal.GroupSize),
			Failing:              st.Journal.Failing,
		},
	}
	j.Flash = newFlashJSON(s.deps.DB.Flash(), s.wear())
	j.Salvage = st.Salvage
	for _, l := range s.deps.Broker.Listeners() {
		j.Listeners = append(j.Listeners, listenerJSON{l.Name, l.Protocol, l.Addr.String(), l.Connections})
	}
	if j.Dropped == nil {
		j.Dropped = map[string]uint64{}
	}
	if j.Limited == nil {
		j.Limited = map[string]uint64{}
	}
	if s.deps.Panel != nil {
		state, leds := s.deps.Panel()
		if leds == nil {
			leds = map[string]string{}
		}
		j.Panel = &panelJSON{state, leds}
	}
	return j
}

// uptime returns whole seconds since the broker started, by the monotonic clock:
// the wall clock may jump from 1970 to now meanwhile.
func uptime(st broker.Stats) int64 {
	if st.Started.IsZero() {
		return 0
	}
	return int64(time.Since(st.Started) / time.Second)
}

func average(h storage.Histogram) float64 {
	var n uint64
	for _, c := range h.Counts {
		n += c
	}
	if n == 0 {
		return 0
	}
	return h.Sum / float64(n)
}
