//go:build interop

package interop

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/autopaho"
	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"
)

// TestPahoGo is paho.golang, which speaks MQTT 5 only: paho for all steps, and
// autopaho, which comes back by itself, for reconnect.
func TestPahoGo(t *testing.T) {
	t.Parallel()
	for _, listener := range []string{"tcp", "tls"} {
		t.Run(versionNames[v5]+"-"+listener, func(t *testing.T) {
			t.Parallel()
			g := &goRun{server: startServer(t), listener: listener}
			for _, step := range stepsOf(v5) {
				run := goSteps[step]
				if run == nil {
					t.Errorf("goSteps has no %q", step)
					continue
				}
				t.Run(step, func(t *testing.T) { run(t, g) })
			}
		})
	}
	for listener, scheme := range map[string]string{"tcp": "mqtt", "tls": "tls", "ws": "ws", "wss": "wss"} {
		t.Run("autopaho-"+listener, func(t *testing.T) {
			t.Parallel()
			g := &goRun{server: startServer(t), listener: listener}
			t.Run("reconnect", func(t *testing.T) { goReconnect(t, g, scheme) })
		})
	}
}

// goRun is what the steps of one way share.
type goRun struct {
	*server
	listener string
}

// goClient is a paho client, with its callbacks turned into channels.
type goClient struct {
	t            *testing.T
	paho         *paho.Client
	conn         net.Conn
	messages     chan *paho.Publish
	disconnected chan *paho.Disconnect
}

// goOptions is what differs from client to client.
type goOptions struct {
	stays    bool
	password string
	will     string
}

// roots returns the configuration that trusts the server's certificate.
func (g *goRun) roots(t *testing.T) *tls.Config {
	t.Helper()
	ca, err := os.ReadFile(g.caFile())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		t.Fatal("ca.pem has no certificate")
	}
	return &tls.Config{RootCAs: pool}
}

// patient returns a context that ends after patience.
func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// dial makes a client and sends CONNECT.
func (g *goRun) dial(t *testing.T, id string, opt goOptions) (*goClient, *paho.Connack, error) {
	t.Helper()
	var conn net.Conn
	var err error
	if g.listener == "tls" {
		if conn, err = tls.Dial("tcp", g.addrs["tls"], g.roots(t)); err == nil {
			conn = packets.NewThreadSafeConn(conn)
		}
	} else {
		conn, err = net.Dial("tcp", g.addrs["tcp"])
	}
	if err != nil {
		t.Fatal(err)
	}
	c := &goClient{
		t:            t,
		conn:         conn,
		messages:     make(chan *paho.Publish, 1000),
		disconnected: make(chan *paho.Disconnect, 1),
	}
	t.Cleanup(func() { conn.Close() })
	c.paho = paho.NewClient(paho.ClientConfig{
		Conn:          conn,
		PacketTimeout: patience,
		OnPublishReceived: []func(paho.PublishReceived) (bool, error){func(r paho.PublishReceived) (bool, error) {
			c.messages <- r.Packet
			return true, nil
		}},
		OnServerDisconnect: func(d *paho.Disconnect) { c.disconnected <- d },
		OnClientError:      func(error) {}, // of a connection that was closed or killed on purpose; else a step misses something
	})
	connect := &paho.Connect{
		ClientID:     id,
		KeepAlive:    30,
		CleanStart:   !opt.stays,
		UsernameFlag: true,
		Username:     username,
		PasswordFlag: true,
		Password:     []byte(password),
	}
	if opt.password != "" {
		connect.Password = []byte(opt.password)
	}
	if opt.stays {
		connect.Properties = &paho.ConnectProperties{SessionExpiryInterval: paho.Uint32(3600)}
	}
	if opt.will != "" {
		connect.WillMessage = &paho.WillMessage{Topic: opt.will, Payload: []byte("gone"), QoS: 1}
	}
	ack, err := c.paho.Connect(patient(t), connect)
	return c, ack, err
}

// open connects; present is what CONNACK has to say of the session.
func (g *goRun) open(t *testing.T, id string, present bool, opt goOptions) *goClient {
	t.Helper()
	c, ack, err := g.dial(t, id, opt)
	if err != nil {
		t.Fatalf("%s: connect: %v", id, err)
	}
	if ack.SessionPresent != present {
		t.Fatalf("%s: session present: got %t, want %t", id, ack.SessionPresent, present)
	}
	return c
}

func (g *goRun) clean(t *testing.T, id string) *goClient {
	t.Helper()
	return g.open(t, id, false, goOptions{})
}

func (c *goClient) close() {
	c.t.Helper()
	if err := c.paho.Disconnect(&paho.Disconnect{}); err != nil {
		c.t.Fatal(err)
	}
	<-c.paho.Done()
}

func (c *goClient) subscribe(subs ...paho.SubscribeOptions) *goClient {
	c.t.Helper()
	ack, err := c.paho.Subscribe(patient(c.t), &paho.Subscribe{Subscriptions: subs})
	if err != nil {
		c.t.Fatalf("subscribe: %v", err)
	}
	for i, s := range subs {
		if i >= len(ack.Reasons) || ack.Reasons[i] != s.QoS {
			c.t.Fatalf("SUBACK: got %v for %+v", ack.Reasons, subs)
		}
	}
	return c
}

func filter(topic string, qos byte) paho.SubscribeOptions {
	return paho.SubscribeOptions{Topic: topic, QoS: qos}
}

func (c *goClient) publish(p *paho.Publish) {
	c.t.Helper()
	if _, err := c.paho.Publish(patient(c.t), p); err != nil {
		c.t.Fatalf("publish to %q: %v", p.Topic, err)
	}
}

// message returns a message without properties.
func message(topic, payload string, qos byte) *paho.Publish {
	return &paho.Publish{Topic: topic, Payload: []byte(payload), QoS: qos}
}

func (c *goClient) next() *paho.Publish {
	c.t.Helper()
	return take(c.t, c.messages, "message")
}

// take returns what comes out of a channel.
func take[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
	}
	t.Fatalf("no %s within %s", what, patience)
	panic("unreachable")
}

// wantMessage compares what there is besides properties.
func wantMessage(t *testing.T, what string, m *paho.Publish, topic, payload string, qos byte, retain bool) {
	t.Helper()
	got := fmt.Sprintf("%s %q QoS %d retain %t", m.Topic, m.Payload, m.QoS, m.Retain)
	if want := fmt.Sprintf("%s %q QoS %d retain %t", topic, payload, qos, retain); got != want {
		t.Fatalf("%s: got %s, want %s", what, got, want)
	}
}

// queueSome publishes 20 messages from first on, the even ones with QoS 1, the
// odd ones with QoS 2.
func (g *goRun) queueSome(t *testing.T, topic string, first int) {
	t.Helper()
	pub := g.clean(t, "queue-pub")
	for i := first; i < first+20; i++ {
		pub.publish(message(topic, strconv.Itoa(i), byte(1+i%2)))
	}
	pub.close()
}

// wantQueued takes them; each QoS is in order. first is even.
func wantQueued(t *testing.T, from <-chan *paho.Publish, topic string, first int) {
	t.Helper()
	next := map[byte]int{1: first, 2: first + 1}
	for range 20 {
		m := take(t, from, "queued message")
		wantMessage(t, "queued", m, topic, strconv.Itoa(next[m.QoS]), m.QoS, false)
		next[m.QoS] += 2
	}
}

var goSteps = map[string]func(t *testing.T, g *goRun){
	"connect":             func(t *testing.T, g *goRun) { g.clean(t, "connect").close() },
	"refused-login":       goRefusedLogin,
	"qos0":                func(t *testing.T, g *goRun) { goOne(t, g, 0) },
	"qos1":                func(t *testing.T, g *goRun) { goOne(t, g, 1) },
	"qos2":                func(t *testing.T, g *goRun) { goOne(t, g, 2) },
	"order-qos0":          func(t *testing.T, g *goRun) { goOrder(t, g, 0) },
	"order-qos1":          func(t *testing.T, g *goRun) { goOrder(t, g, 1) },
	"order-qos2":          func(t *testing.T, g *goRun) { goOrder(t, g, 2) },
	"retained":            goRetained,
	"will":                goWill,
	"session":             goSession,
	"restart":             goRestart,
	"unsubscribe":         goUnsubscribe,
	"wildcard":            goWildcard,
	"granted-qos":         goGrantedQoS,
	"large-payload":       goLargePayload,
	"user-properties":     goUserProperties,
	"message-expiry":      goMessageExpiry,
	"topic-alias":         goTopicAlias,
	"shared-subscription": goSharedSubscription,
	"request-response":    goRequestResponse,
	"reason-codes":        goReasonCodes,
}

func goRefusedLogin(t *testing.T, g *goRun) {
	_, ack, err := g.dial(t, "refused", goOptions{password: "wrong"})
	if err == nil || ack == nil || ack.ReasonCode != packets.ConnackBadUsernameOrPassword {
		t.Fatalf("got %+v, %v, want reason code 0x86", ack, err)
	}
}

func goOne(t *testing.T, g *goRun, qos byte) {
	sub := g.clean(t, "one-sub").subscribe(filter("one", 2))
	pub := g.clean(t, "one-pub")
	pub.publish(message("one", "öne\x00", qos))
	wantMessage(t, "message", sub.next(), "one", "öne\x00", qos, false)
	pub.close()
	sub.close()
}

func goOrder(t *testing.T, g *goRun, qos byte) {
	const n = 200
	sub := g.clean(t, "order-sub").subscribe(filter("order", qos))
	pub := g.clean(t, "order-pub")
	for i := range n - 1 {
		how := paho.PublishOptions{Method: paho.PublishMethod_AsyncSend}
		if _, err := pub.paho.PublishWithOptions(patient(t), message("order", strconv.Itoa(i), qos), how); err != nil {
			t.Fatal(err)
		}
	}
	// Acknowledged last of all: paho.golang 0.23 must not be closed before, for
	// it panics on a PUBREC that comes then.
	pub.publish(message("order", strconv.Itoa(n-1), qos))
	for i := range n {
		wantMessage(t, "order", sub.next(), "order", strconv.Itoa(i), qos, false)
	}
	pub.close()
	sub.close()
}

func goRetained(t *testing.T, g *goRun) {
	live := g.clean(t, "retained-live").subscribe(filter("retained", 1))
	pub := g.clean(t, "retained-pub")
	pub.publish(&paho.Publish{Topic: "retained", Payload: []byte("on"), QoS: 1, Retain: true})
	wantMessage(t, "to a subscriber that was there", live.next(), "retained", "on", 1, false)
	late := g.clean(t, "retained-late").subscribe(filter("retained", 1))
	wantMessage(t, "to a late subscriber", late.next(), "retained", "on", 1, true)
	late.close()
	pub.publish(&paho.Publish{Topic: "retained", QoS: 1, Retain: true})
	late = g.clean(t, "retained-late").subscribe(filter("retained", 1))
	pub.publish(message("retained", "marker", 1))
	wantMessage(t, "after it was cleared", late.next(), "retained", "marker", 1, false)
	for _, c := range []*goClient{late, live, pub} {
		c.close()
	}
}

// The other clients are processes that are killed; of this one the kernel does
// the same to the connection: it is closed without DISCONNECT.
func goWill(t *testing.T, g *goRun) {
	sub := g.clean(t, "will-sub").subscribe(filter("will/#", 1))
	g.open(t, "will-polite", false, goOptions{will: "will/polite"}).close()
	killed := g.open(t, "will-killed", false, goOptions{will: "will/killed"})
	if err := killed.conn.Close(); err != nil {
		t.Fatal(err)
	}
	wantMessage(t, "will", sub.next(), "will/killed", "gone", 1, false)
	sub.close()
}

func goSession(t *testing.T, g *goRun) {
	stays := goOptions{stays: true}
	g.open(t, "session", false, stays).subscribe(filter("session/#", 2)).close()
	g.queueSome(t, "session/a", 0)
	c := g.open(t, "session", true, stays)
	wantQueued(t, c.messages, "session/a", 0)
	c.close()
	g.clean(t, "session").close() // clean: nothing is left
}

func goRestart(t *testing.T, g *goRun) {
	stays := goOptions{stays: true}
	g.open(t, "restart", false, stays).subscribe(filter("restart/#", 2)).close()
	g.queueSome(t, "restart/a", 0)
	pub := g.clean(t, "restart-pub")
	pub.publish(&paho.Publish{Topic: "restart-retained", Payload: []byte("kept"), QoS: 1, Retain: true})
	pub.close()
	if err := g.restart(); err != nil {
		t.Fatal(err)
	}
	c := g.open(t, "restart", true, stays)
	wantQueued(t, c.messages, "restart/a", 0)
	g.queueSome(t, "restart/b", 20)
	wantQueued(t, c.messages, "restart/b", 20)
	c.subscribe(filter("restart-retained", 1))
	wantMessage(t, "retained", c.next(), "restart-retained", "kept", 1, true)
	c.close()
}

func goUnsubscribe(t *testing.T, g *goRun) {
	c := g.clean(t, "unsubscribe").subscribe(filter("unsubscribe/a", 1), filter("unsubscribe/b", 1))
	ack, err := c.paho.Unsubscribe(patient(t), &paho.Unsubscribe{Topics: []string{"unsubscribe/a"}})
	if err != nil || !slices.Equal(ack.Reasons, []byte{0}) {
		t.Fatalf("UNSUBACK: got %+v, %v", ack, err)
	}
	c.publish(message("unsubscribe/a", "a", 1))
	c.publish(message("unsubscribe/b", "b", 1))
	wantMessage(t, "message", c.next(), "unsubscribe/b", "b", 1, false)
	c.close()
}

func goWildcard(t *testing.T, g *goRun) {
	c := g.clean(t, "wildcard").subscribe(filter("plus/+/t", 1), filter("hash/#", 1))
	for _, topic := range wildcardTopics {
		c.publish(message(topic, "", 1))
	}
	for _, topic := range wildcardMatches {
		wantMessage(t, "topics", c.next(), topic, "", 1, false)
	}
	c.close()
}

func goGrantedQoS(t *testing.T, g *goRun) {
	// subscribe compares the answer.
	g.clean(t, "granted").subscribe(filter("granted/0", 0), filter("granted/2", 2), filter("granted/1", 1)).close()
}

func goLargePayload(t *testing.T, g *goRun) {
	payload := largePayload()
	c := g.clean(t, "large").subscribe(filter("large", 1))
	c.publish(&paho.Publish{Topic: "large", Payload: payload, QoS: 1})
	if got := c.next().Payload; !bytes.Equal(got, payload) {
		t.Fatalf("%d bytes arrived that are not the %d that were sent", len(got), len(payload))
	}
	c.close()
}

func goUserProperties(t *testing.T, g *goRun) {
	pairs := paho.UserProperties{{Key: "unit", Value: "°C"}, {Key: "unit", Value: "K"}, {Key: "", Value: "empty"}}
	c := g.clean(t, "user").subscribe(filter("user", 1))
	c.publish(&paho.Publish{Topic: "user", QoS: 1, Properties: &paho.PublishProperties{
		User: pairs, ContentType: "text/plain", PayloadFormat: paho.Byte(1),
	}})
	got := c.next().Properties
	if !slices.Equal(got.User, pairs) || got.ContentType != "text/plain" || got.PayloadFormat == nil || *got.PayloadFormat != 1 {
		t.Fatalf("got %+v", got)
	}
	c.close()
}

func goMessageExpiry(t *testing.T, g *goRun) {
	stays := goOptions{stays: true}
	g.open(t, "expiry", false, stays).subscribe(filter("expiry", 1)).close()
	pub := g.clean(t, "expiry-pub")
	expiring := func(topic, payload string, retain bool, seconds uint32) {
		pub.publish(&paho.Publish{Topic: topic, Payload: []byte(payload), QoS: 1, Retain: retain,
			Properties: &paho.PublishProperties{MessageExpiry: &seconds}})
	}
	expiring("expiry", "short", false, 1)
	expiring("expiry", "long", false, 1000)
	// A retained message that expires later shows when it is time.
	expiring("expiry-clock", "tick", true, 1)
	for expired := false; !expired; {
		clock := g.clean(t, "expiry-clock").subscribe(filter("expiry-clock", 1))
		pub.publish(message("expiry-clock", "marker", 1))
		expired = !clock.next().Retain
		clock.close()
	}
	pub.close()
	c := g.open(t, "expiry", true, stays)
	m := c.next()
	wantMessage(t, "first message", m, "expiry", "long", 1, false)
	if left := m.Properties.MessageExpiry; left == nil || *left <= 900 || *left >= 1000 {
		t.Fatalf("what is left of 1000 s: %+v", m.Properties)
	}
	c.close()
}

func goTopicAlias(t *testing.T, g *goRun) {
	sub := g.clean(t, "alias-sub").subscribe(filter("alias/#", 1))
	pub := g.clean(t, "alias-pub")
	sent := []struct {
		topic string
		alias uint16
		means string
	}{{"alias/a", 1, "alias/a"}, {"alias/b", 2, "alias/b"}, {"", 1, "alias/a"}, {"alias/c", 1, "alias/c"}, {"", 1, "alias/c"}}
	for _, s := range sent {
		pub.publish(&paho.Publish{Topic: s.topic, Payload: []byte("x"), QoS: 1, Properties: &paho.PublishProperties{TopicAlias: &s.alias}})
	}
	for _, s := range sent {
		m := sub.next()
		wantMessage(t, "message", m, s.means, "x", 1, false)
		if m.Properties.TopicAlias != nil { // this client has no Topic Alias Maximum [MQTT-3.1.2-26]
			t.Fatalf("an alias, %d, to the subscriber", *m.Properties.TopicAlias)
		}
	}
	pub.close()
	sub.close()
}

func goSharedSubscription(t *testing.T, g *goRun) {
	const n = 50
	var members [2]*goClient
	for i := range members {
		members[i] = g.clean(t, "shared-"+strconv.Itoa(i)).subscribe(filter("$share/group/shared", 1))
	}
	alone := g.clean(t, "shared-alone").subscribe(filter("shared", 1))
	pub := g.clean(t, "shared-pub")
	for i := range n {
		pub.publish(message("shared", strconv.Itoa(i), 1))
	}
	for i := range n {
		wantMessage(t, "without a group", alone.next(), "shared", strconv.Itoa(i), 1, false)
	}
	var all []int
	counts, last := [2]int{}, [2]int{-1, -1}
	late := time.After(patience)
	for range n {
		var m *paho.Publish
		who := 0
		select {
		case m = <-members[0].messages:
		case m = <-members[1].messages:
			who = 1
		case <-late:
			t.Fatalf("the members have %v of %d messages", counts, n)
		}
		number, err := strconv.Atoi(string(m.Payload))
		if err != nil || number <= last[who] {
			t.Fatalf("member %d: %q after %d", who, m.Payload, last[who])
		}
		last[who] = number
		counts[who]++
		all = append(all, number)
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) != n || counts[0] == 0 || counts[1] == 0 {
		t.Fatalf("%d different messages, %v to each member; want %d, and some to each", len(all), counts, n)
	}
	for _, c := range []*goClient{members[0], members[1], alone, pub} {
		c.close()
	}
}

func goRequestResponse(t *testing.T, g *goRun) {
	correlation := []byte{0, 1, 255}
	answering := g.clean(t, "responder").subscribe(filter("request", 1))
	asking := g.clean(t, "requester").subscribe(filter("response/a", 1))
	asking.publish(&paho.Publish{Topic: "request", Payload: []byte("2+2"), QoS: 1, Properties: &paho.PublishProperties{
		ResponseTopic: "response/a", CorrelationData: correlation,
	}})
	request := answering.next().Properties
	answering.publish(&paho.Publish{Topic: request.ResponseTopic, Payload: []byte("4"), QoS: 1,
		Properties: &paho.PublishProperties{CorrelationData: request.CorrelationData}})
	m := asking.next()
	wantMessage(t, "response", m, "response/a", "4", 1, false)
	if !bytes.Equal(m.Properties.CorrelationData, correlation) {
		t.Fatalf("correlation data: got %v", m.Properties.CorrelationData)
	}
	asking.close()
	answering.close()
}

func goReasonCodes(t *testing.T, g *goRun) {
	c := g.clean(t, "reasons")
	unsuback, err := c.paho.Unsubscribe(patient(t), &paho.Unsubscribe{Topics: []string{"nothing/here"}})
	if err != nil || !slices.Equal(unsuback.Reasons, []byte{0x11}) {
		t.Fatalf("UNSUBACK of what was not subscribed: got %+v, %v", unsuback, err)
	}
	puback, err := c.paho.Publish(patient(t), message("$SYS/mine", "x", 1))
	if err == nil || puback == nil || puback.ReasonCode != packets.PubackNotAuthorized {
		t.Fatalf("PUBACK of what is not allowed: got %+v, %v", puback, err)
	}
	other := g.clean(t, "reasons")
	if d := take(t, c.disconnected, "DISCONNECT"); d.ReasonCode != packets.DisconnectSessionTakenOver {
		t.Fatalf("DISCONNECT of who was taken over: got %#x", d.ReasonCode)
	}
	other.close()
}

// goReconnect breaks the connection under autopaho, which comes back.
func goReconnect(t *testing.T, g *goRun, scheme string) {
	u, err := url.Parse(g.url(scheme, g.listener))
	if err != nil {
		t.Fatal(err)
	}
	messages := make(chan *paho.Publish, 100)
	up := make(chan *paho.Connack, 10)
	failed := make(chan error, 10)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c, err := autopaho.NewConnection(ctx, autopaho.ClientConfig{
		ServerUrls:                    []*url.URL{u},
		TlsCfg:                        g.roots(t),
		KeepAlive:                     30,
		CleanStartOnInitialConnection: true,
		SessionExpiryInterval:         3600,
		ReconnectBackoff:              func(int) time.Duration { return 10 * time.Millisecond },
		ConnectTimeout:                patience,
		ConnectUsername:               username,
		ConnectPassword:               []byte(password),
		OnConnectionUp:                func(_ *autopaho.ConnectionManager, ack *paho.Connack) { up <- ack },
		OnConnectError: func(err error) {
			select {
			case failed <- err:
			default: // the first ones say enough
			}
		},
		ClientConfig: paho.ClientConfig{
			ClientID: "reconnect",
			OnPublishReceived: []func(paho.PublishReceived) (bool, error){func(r paho.PublishReceived) (bool, error) {
				messages <- r.Packet
				return true, nil
			}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	connected := func(present bool) {
		t.Helper()
		select {
		case ack := <-up:
			if ack.SessionPresent != present {
				t.Fatalf("session present: got %t, want %t", ack.SessionPresent, present)
			}
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(patience):
			t.Fatal("not connected")
		}
	}
	connected(false)
	if _, err := c.Subscribe(patient(t), &paho.Subscribe{Subscriptions: []paho.SubscribeOptions{filter("reconnect/#", 2)}}); err != nil {
		t.Fatal(err)
	}
	plain := &goRun{server: g.server, listener: "tcp"}
	c.TerminateConnectionForTest()
	plain.queueSome(t, "reconnect/a", 0)
	connected(true)
	wantQueued(t, messages, "reconnect/a", 0)
	if err := c.Disconnect(patient(t)); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	<-c.Done()
}
