package bevywise

import (
	"context"
	"errors"
	"net/http"
	"time"

	"penstock/broker"
)

// publishTimeout is how long a publication with QoS > 0 may wait for the disk.
// It is below the time in which an answer has to be written.
const publishTimeout = 20 * time.Second

// sendAll publishes. "Success" with QoS > 0 means what a PUBACK means.
func (a *api) sendAll(r *http.Request, p params) (body, error) {
	m, err := readMessage(p)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), publishTimeout)
	defer cancel()
	err = a.deps.Publisher.Publish(ctx, m)
	if err != nil {
		b := failure("Message could not be delivered")
		b["detail"] = a.notSent(r, m.Topic, err)
		return b, nil
	}
	return done("Message sent to subscribers of topic:" + m.Topic), nil
}

// notSent says why Publish returned err, and logs what is no fault of the
// caller.
func (a *api) notSent(r *http.Request, topic string, err error) (detail string) {
	gone := r.Context().Err() != nil
	switch {
	case errors.Is(err, broker.ErrInvalidTopic):
		return "This topic cannot be published to: it begins with $, has a +, # or NUL, is no UTF-8, or is too long."
	case errors.Is(err, broker.ErrQuota):
		return "There is no room for another retained message (broker.max_retained)."
	case errors.Is(err, broker.ErrDiskFull):
		return "The disk is nearly full, and the message would have to be stored (storage.reserve)."
	case errors.Is(err, broker.ErrQueueFull):
		return "The queue of a subscriber, or of all together, is full (broker.queue_overflow is reject)."
	case errors.Is(err, context.DeadlineExceeded):
		if !gone {
			a.deps.Log.Warn("message of the api not durable in time, it may still be delivered", "err", err, "topic", topic)
		}
		return "The broker did not make it durable in time; it may still be delivered."
	}
	if !gone {
		a.deps.Log.Warn("message of the api not published", "err", err, "topic", topic)
	}
	return "The log has the reason."
}

func readMessage(p params) (m broker.Message, err error) {
	if m.Topic, err = p.name("topic"); err != nil {
		return m, err
	}
	payload, err := p.text("message") // an empty one ends a retained one
	if err != nil {
		return m, err
	}
	m.Payload = []byte(payload)
	if _, ok := p["QoS"]; !ok {
		p["QoS"] = p["qos"] // who writes it small means it all the same
	}
	qos, err := p.number("QoS", 2)
	if err != nil {
		return m, err
	}
	m.QoS = byte(qos)
	m.Retain, err = p.flag("retain")
	return m, err
}
