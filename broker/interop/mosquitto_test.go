//go:build interop

package interop

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestMosquitto is Debian's mosquitto-clients. They have no WebSocket.
func TestMosquitto(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"mosquitto_pub", "mosquitto_sub", "mosquitto_rr"} {
		need(t, tool, "apt-get install mosquitto-clients")
	}
	for _, w := range []way{{v31, "tcp"}, {v311, "tcp"}, {v5, "tcp"}, {v5, "tls"}} {
		t.Run(versionNames[w.version]+"-"+w.listener, func(t *testing.T) {
			t.Parallel()
			m := &mosquitto{server: startServer(t), way: w}
			for _, step := range stepsOf(w.version) {
				run := mosquittoSteps[step]
				if run == nil {
					t.Errorf("mosquittoSteps has no %q", step)
					continue
				}
				t.Run(step, func(t *testing.T) { run(t, m) })
			}
		})
	}
}

// TestMosquittoBridge is a Mosquitto that is a bridge to Penstock, with the
// defaults of its bridges and as MQTT 5: what is published at one broker comes
// to the subscriber of the other, both ways, and the bridge says its state. With
// the defaults (but for the wait between attempts) its own messages come back to it once: MQTT 3.1.1 has no No Local.
func TestMosquittoBridge(t *testing.T) {
	t.Parallel()
	need(t, "mosquitto_sub", "apt-get install mosquitto-clients")
	daemon, err := exec.LookPath("mosquitto")
	if err != nil {
		daemon = "/usr/sbin/mosquitto" // not in everybody's PATH
	}
	for _, tt := range []struct {
		name, more string
		own        []string // what Mosquitto's subscriber gets of what is published there
	}{
		{"defaults", "", []string{"plant/there 1 0 to here", "plant/there 1 0 to here"}},
		{"mqttv50", "bridge_protocol_version mqttv50\n", []string{"plant/there 1 0 to here"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			here := &mosquitto{server: startServer(t), way: way{v311, "tcp"}}
			port := freePort(t)
			config := filepath.Join(here.dir, "mosquitto.conf")
			text := fmt.Sprintf("listener %s 127.0.0.1\nallow_anonymous true\nuser root\n"+
				"connection plant\naddress %s\ntopic plant/# both 1\nrestart_timeout 1\nremote_username %s\nremote_password %s\n%s",
				port, here.addrs["tcp"], username, password, tt.more)
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			there := &mosquitto{server: &server{dir: here.dir, addrs: map[string]string{"tcp": "127.0.0.1:" + port}}, way: here.way}
			state := here.subscribe(t, plain, "-q", "1", "-t", "$SYS/broker/connection/+/state")
			hereSub := here.subscribe(t, plain, "-q", "1", "-t", "plant/#")

			out := newWatched()
			cmd := exec.Command(daemon, "-v", "-c", config)
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatalf("%v: apt-get install mosquitto", err)
			}
			done := make(chan struct{})
			go func() {
				_ = cmd.Wait() // killed, or it has said why
				close(done)
			}()
			t.Cleanup(func() {
				_ = cmd.Process.Kill() // fails if it has ended
				<-done
				if t.Failed() {
					t.Logf("mosquitto said\n%s", out)
				}
			})
			if _, err := out.await(regexp.MustCompile(`Received SUBACK from`), done); err != nil {
				t.Fatal(err)
			}
			if got := state.messages(1)[0]; !strings.HasSuffix(got, "/state 1 0 1") {
				t.Errorf("state of the bridge: got %q, want 1", got)
			}
			thereSub := there.subscribe(t, plain, "-q", "1", "-t", "plant/#")
			there.publish(t, "-q", "1", "-t", "plant/there", "-m", "to here")
			hereSub.want("from the bridge", "plant/there 1 0 to here")
			thereSub.want("at Mosquitto itself", tt.own...)
			here.publish(t, "-q", "1", "-t", "plant/here", "-m", "to there")
			thereSub.want("over the bridge", append(tt.own, "plant/here 1 0 to there")...)
		})
	}
}

// freePort returns a port that nothing listens on.
func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := strings.Cut(ln.Addr().String(), ":")
	return port
}

// mosquitto is what the steps of one way share.
type mosquitto struct {
	*server
	way
}

// command returns one of mosquitto's clients, logged in, with more arguments.
func (m *mosquitto) command(tool string, args ...string) *exec.Cmd {
	host, port, _ := strings.Cut(m.addrs[m.listener], ":")
	all := []string{"-oL", tool, // or its output would wait for its end
		"-h", host, "-p", port, "-V", map[int]string{v31: "mqttv31", v311: "mqttv311", v5: "mqttv5"}[m.version],
		"-u", username, "-P", password}
	if m.listener == "tls" {
		all = append(all, "--cafile", m.caFile())
	}
	cmd := exec.Command("stdbuf", append(all, args...)...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+m.dir) // not the user's own options
	return cmd
}

// publish runs mosquitto_pub, which returns when the message is acknowledged.
func (m *mosquitto) publish(t *testing.T, args ...string) {
	t.Helper()
	m.publishLines(t, nil, args...)
}

// publishLines gives mosquitto_pub a line for each message, if there are any.
func (m *mosquitto) publishLines(t *testing.T, lines []string, args ...string) {
	t.Helper()
	if lines != nil {
		args = append(args, "-l")
	}
	cmd := m.command("mosquitto_pub", args...)
	if lines != nil {
		cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	}
	// It warns of a reason code, and ends well all the same.
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("mosquitto_pub %q: %v\n%s", args, err, out)
	}
}

// subscriber is a mosquitto_sub, or mosquitto_rr, that runs.
type subscriber struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  *watched
	done chan struct{}
}

// begin starts a client that ends with the test. Its messages are lines that
// begin with "message", with what -F has after that.
func (m *mosquitto) begin(t *testing.T, tool string, args ...string) *subscriber {
	t.Helper()
	s := &subscriber{t: t, cmd: m.command(tool, args...), out: newWatched(), done: make(chan struct{})}
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = s.cmd.Wait() // what matters is in its output
		close(s.done)
	}()
	t.Cleanup(s.kill)
	return s
}

// plain is the format of a message: its topic, QoS, retain flag and payload.
const plain = "message %t %q %r %p"

// subscribe starts a mosquitto_sub and waits until it is subscribed.
func (m *mosquitto) subscribe(t *testing.T, format string, args ...string) *subscriber {
	t.Helper()
	s := m.begin(t, "mosquitto_sub", append([]string{"-d", "-F", format}, args...)...)
	s.await(`(?m)^Subscribed .*$`)
	return s
}

func (s *subscriber) kill() {
	_ = s.cmd.Process.Kill() // fails if it has ended
	<-s.done
}

func (s *subscriber) await(re string) string {
	s.t.Helper()
	found, err := s.out.await(regexp.MustCompile(re), s.done)
	if err != nil {
		s.t.Fatalf("%q: %v", s.cmd.Args, err)
	}
	return found
}

var messageLine = regexp.MustCompile(`(?m)^message (.*)\n`)

// messages waits until there are n messages, and returns them.
func (s *subscriber) messages(n int) []string {
	s.t.Helper()
	s.await(fmt.Sprintf(`(?:(?:^|\n)(?:[^m\n].*\n|m[^e\n].*\n)*message .*){%d}\n`, n))
	return s.now()
}

// now returns the messages that are there.
func (s *subscriber) now() []string {
	var list []string
	for _, m := range messageLine.FindAllStringSubmatch(s.out.String(), -1) {
		list = append(list, m[1])
	}
	return list
}

// want waits for exactly these messages.
func (s *subscriber) want(what string, want ...string) {
	s.t.Helper()
	if got := s.messages(len(want)); !slices.Equal(got, want) {
		s.t.Fatalf("%s: got %q, want %q", what, got, want)
	}
}

// stays returns the arguments of a session that outlives the connection.
func (m *mosquitto) stays(id string) []string {
	args := []string{"-i", id, "-c"}
	if m.version == v5 {
		args = append(args, "-x", "3600")
	}
	return args
}

// leave makes a session with a subscription, and leaves it behind.
func (m *mosquitto) leave(t *testing.T, id string, args ...string) {
	t.Helper()
	cmd := m.command("mosquitto_sub", append(append(m.stays(id), "-E"), args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mosquitto_sub -E: %v\n%s", err, out)
	}
}

// queueSome publishes 20 messages from first on, 10 with QoS 1 and then 10 with
// QoS 2.
func (m *mosquitto) queueSome(t *testing.T, topic string, first int) {
	t.Helper()
	m.publishLines(t, numbers(first, first+10), "-q", "1", "-t", topic)
	m.publishLines(t, numbers(first+10, first+20), "-q", "2", "-t", topic)
}

// wantQueued waits for n messages and compares the last 20 of them.
func (s *subscriber) wantQueued(n int, topic string, first int) {
	s.t.Helper()
	got := s.messages(n)
	got = got[len(got)-20:]
	// mosquitto_sub shows a message of QoS 2 at its PUBREL.
	slices.SortStableFunc(got, func(a, b string) int { return strings.Compare(strings.Fields(a)[1], strings.Fields(b)[1]) })
	for i, line := range got {
		if want := fmt.Sprintf("%s %d 0 %d", topic, 1+i/10, first+i); line != want {
			s.t.Fatalf("queued: got %q, want %q", line, want)
		}
	}
}

func numbers(from, to int) []string {
	var list []string
	for i := from; i < to; i++ {
		list = append(list, strconv.Itoa(i))
	}
	return list
}

var mosquittoSteps = map[string]func(t *testing.T, m *mosquitto){
	"connect": func(t *testing.T, m *mosquitto) {
		m.subscribe(t, plain, "-t", "connect", "-E").await(`sending DISCONNECT`)
	},
	"refused-login":       mosquittoRefusedLogin,
	"qos0":                func(t *testing.T, m *mosquitto) { mosquittoOne(t, m, "0") },
	"qos1":                func(t *testing.T, m *mosquitto) { mosquittoOne(t, m, "1") },
	"qos2":                func(t *testing.T, m *mosquitto) { mosquittoOne(t, m, "2") },
	"order-qos0":          func(t *testing.T, m *mosquitto) { mosquittoOrder(t, m, "0") },
	"order-qos1":          func(t *testing.T, m *mosquitto) { mosquittoOrder(t, m, "1") },
	"order-qos2":          func(t *testing.T, m *mosquitto) { mosquittoOrder(t, m, "2") },
	"retained":            mosquittoRetained,
	"will":                mosquittoWill,
	"session":             mosquittoSession,
	"restart":             mosquittoRestart,
	"unsubscribe":         mosquittoUnsubscribe,
	"wildcard":            mosquittoWildcard,
	"granted-qos":         mosquittoGrantedQoS,
	"large-payload":       mosquittoLargePayload,
	"user-properties":     mosquittoUserProperties,
	"message-expiry":      mosquittoMessageExpiry,
	"topic-alias":         mosquittoTopicAlias,
	"shared-subscription": mosquittoSharedSubscription,
	"request-response":    mosquittoRequestResponse,
	"reason-codes":        mosquittoReasonCodes,
}

func mosquittoRefusedLogin(t *testing.T, m *mosquitto) {
	out, err := m.command("mosquitto_pub", "-P", "wrong", "-t", "a", "-m", "a").CombinedOutput()
	want := "bad user name or password"
	if m.version == v5 {
		want = "Bad User Name or Password" // 0x86, in its words
	}
	if err == nil || !strings.Contains(string(out), want) {
		t.Fatalf("got %v, %q, want %q", err, out, want)
	}
}

func mosquittoOne(t *testing.T, m *mosquitto, qos string) {
	sub := m.subscribe(t, plain, "-t", "one", "-q", "2")
	m.publish(t, "-t", "one", "-q", qos, "-m", "öne")
	sub.want("message", "one "+qos+" 0 öne")
}

func mosquittoOrder(t *testing.T, m *mosquitto, qos string) {
	sub := m.subscribe(t, "message %q %p", "-t", "order", "-q", qos)
	lines := numbers(0, 200)
	m.publishLines(t, lines, "-t", "order", "-q", qos)
	var want []string
	for _, line := range lines {
		want = append(want, qos+" "+line)
	}
	sub.want("order", want...)
}

func mosquittoRetained(t *testing.T, m *mosquitto) {
	topic := []string{"-q", "1", "-t", "retained"}
	live := m.subscribe(t, plain, topic...)
	m.publish(t, append(topic, "-r", "-m", "on")...)
	live.want("to a subscriber that was there", "retained 1 0 on")
	m.subscribe(t, plain, topic...).want("to a late subscriber", "retained 1 1 on")
	m.publish(t, append(topic, "-r", "-n")...)
	late := m.subscribe(t, plain, topic...)
	m.publish(t, append(topic, "-m", "marker")...)
	late.want("after it was cleared", "retained 1 0 marker")
}

func mosquittoWill(t *testing.T, m *mosquitto) {
	sub := m.subscribe(t, plain, "-q", "1", "-t", "will/#")
	will := func(topic string) []string {
		return []string{"-t", "nothing", "--will-topic", topic, "--will-payload", "gone", "--will-qos", "1"}
	}
	polite := m.subscribe(t, plain, append(will("will/polite"), "-E")...)
	<-polite.done
	m.subscribe(t, plain, will("will/killed")...).kill()
	sub.want("will", "will/killed 1 0 gone")
}

func mosquittoSession(t *testing.T, m *mosquitto) {
	filter := []string{"-q", "2", "-t", "session/#"}
	m.leave(t, "session", filter...)
	m.queueSome(t, "session/a", 0)
	m.subscribe(t, plain, append(m.stays("session"), filter...)...).wantQueued(20, "session/a", 0)
}

func mosquittoRestart(t *testing.T, m *mosquitto) {
	filter := []string{"-q", "2", "-t", "restart/#"}
	m.leave(t, "restart", filter...)
	m.queueSome(t, "restart/a", 0)
	m.publish(t, "-q", "1", "-r", "-t", "restart-retained", "-m", "kept")
	if err := m.restart(); err != nil {
		t.Fatal(err)
	}
	sub := m.subscribe(t, plain, append(m.stays("restart"), filter...)...)
	sub.wantQueued(20, "restart/a", 0)
	m.queueSome(t, "restart/b", 20)
	sub.wantQueued(40, "restart/b", 20)
	m.subscribe(t, plain, "-q", "1", "-t", "restart-retained").want("retained", "restart-retained 1 1 kept")
}

func mosquittoUnsubscribe(t *testing.T, m *mosquitto) {
	m.leave(t, "unsubscribe", "-q", "1", "-t", "unsubscribe/a", "-t", "unsubscribe/b")
	sub := m.subscribe(t, plain, append(m.stays("unsubscribe"), "-q", "1", "-t", "unsubscribe/b", "-U", "unsubscribe/a")...)
	sub.await(`received UNSUBACK`)
	m.publish(t, "-q", "1", "-t", "unsubscribe/a", "-m", "a")
	m.publish(t, "-q", "1", "-t", "unsubscribe/b", "-m", "b")
	sub.want("message", "unsubscribe/b 1 0 b")
}

func mosquittoWildcard(t *testing.T, m *mosquitto) {
	sub := m.subscribe(t, "message %t", "-q", "1", "-t", "plus/+/t", "-t", "hash/#")
	for _, topic := range wildcardTopics {
		m.publish(t, "-q", "1", "-t", topic, "-n")
	}
	sub.want("topics", wildcardMatches...)
}

// mosquitto_sub asks for the same QoS with each filter.
func mosquittoGrantedQoS(t *testing.T, m *mosquitto) {
	for _, qos := range []string{"0", "1", "2"} {
		sub := m.subscribe(t, plain, "-q", qos, "-t", "granted/a", "-t", "granted/b", "-E")
		sub.await(`Subscribed \(mid: \d+\): ` + qos + ", " + qos + `\n`)
	}
}

func mosquittoLargePayload(t *testing.T, m *mosquitto) {
	payload := largePayload()
	name := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(name, payload, 0o600); err != nil {
		t.Fatal(err)
	}
	sub := m.subscribe(t, "message %x", "-q", "1", "-t", "large")
	m.publish(t, "-q", "1", "-t", "large", "-f", name)
	if got := sub.messages(1); got[0] != hex.EncodeToString(payload) {
		t.Fatalf("%d hexadecimal digits that are not what was sent", len(got[0]))
	}
}

func mosquittoUserProperties(t *testing.T, m *mosquitto) {
	sub := m.subscribe(t, "message %P | %C | %F", "-q", "1", "-t", "user")
	m.publish(t, "-q", "1", "-t", "user", "-n",
		"-D", "publish", "user-property", "unit", "°C",
		"-D", "publish", "user-property", "unit", "K",
		"-D", "publish", "content-type", "text/plain",
		"-D", "publish", "payload-format-indicator", "1")
	sub.want("properties", "unit:°C unit:K | text/plain | 1")
}

func mosquittoMessageExpiry(t *testing.T, m *mosquitto) {
	filter := []string{"-q", "1", "-t", "expiry"}
	m.leave(t, "expiry", filter...)
	m.publish(t, append(filter, "-m", "short", "-D", "publish", "message-expiry-interval", "1")...)
	m.publish(t, append(filter, "-m", "long", "-D", "publish", "message-expiry-interval", "1000")...)
	// A retained message that expires later shows when it is time.
	clock := []string{"-q", "1", "-t", "expiry-clock"}
	m.publish(t, append(clock, "-r", "-m", "tick", "-D", "publish", "message-expiry-interval", "1")...)
	for {
		sub := m.subscribe(t, "message %r", clock...)
		m.publish(t, append(clock, "-m", "marker")...)
		first := sub.messages(1)[0]
		sub.kill()
		if first == "0" {
			break
		}
	}
	sub := m.subscribe(t, "message %p %E", append(m.stays("expiry"), filter...)...)
	payload, left, _ := strings.Cut(sub.messages(1)[0], " ")
	if n, err := strconv.Atoi(left); err != nil || payload != "long" || n <= 900 || n >= 1000 {
		t.Fatalf("first message: got %q with %q s left of 1000", payload, left)
	}
}

// mosquitto_pub leaves the topic out from the second message on.
func mosquittoTopicAlias(t *testing.T, m *mosquitto) {
	sub := m.subscribe(t, "message %t %p alias %A", "-q", "1", "-t", "alias/#")
	m.publishLines(t, numbers(0, 3), "-q", "1", "-t", "alias/a", "-D", "publish", "topic-alias", "5")
	sub.want("messages", "alias/a 0 alias ", "alias/a 1 alias ", "alias/a 2 alias ")
}

func mosquittoSharedSubscription(t *testing.T, m *mosquitto) {
	var members [2]*subscriber
	for i := range members {
		members[i] = m.subscribe(t, "message %p", "-q", "1", "-t", "$share/group/shared")
	}
	alone := m.subscribe(t, "message %p", "-q", "1", "-t", "shared")
	lines := numbers(0, 50)
	m.publishLines(t, lines, "-q", "1", "-t", "shared")
	alone.want("without a group", lines...)
	late := time.After(patience)
	for {
		_, changed := members[0].out.state()
		_, changed1 := members[1].out.state()
		if len(members[0].now())+len(members[1].now()) >= len(lines) {
			break
		}
		select {
		case <-changed:
		case <-changed1:
		case <-late:
			t.Fatalf("the members have %q and %q", members[0].now(), members[1].now())
		}
	}
	first, second := members[0].now(), members[1].now()
	all := slices.Concat(first, second)
	slices.Sort(all)
	slices.Sort(lines)
	if !slices.Equal(all, lines) || len(first) == 0 || len(second) == 0 {
		t.Fatalf("the members have %q and %q", first, second)
	}
}

func mosquittoRequestResponse(t *testing.T, m *mosquitto) {
	answering := m.subscribe(t, "message %R %D %p", "-q", "1", "-t", "request")
	asking := m.begin(t, "mosquitto_rr", "-F", "message %D %p", "-q", "1", "-t", "request", "-e", "response/a", "-m", "2+2",
		"-D", "publish", "correlation-data", "abc")
	answering.want("request", "response/a abc 2+2")
	m.publish(t, "-q", "1", "-t", "response/a", "-m", "4", "-D", "publish", "correlation-data", "abc")
	asking.want("response", "abc 4")
}

// What a UNSUBACK says mosquitto_sub does not show.
func mosquittoReasonCodes(t *testing.T, m *mosquitto) {
	out, err := m.command("mosquitto_pub", "-q", "1", "-t", "$SYS/mine", "-m", "x").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Not authorized") {
		t.Fatalf("PUBACK of what is not allowed: got %v, %q", err, out)
	}
	first := m.subscribe(t, plain, "-i", "reasons", "-t", "reasons")
	second := m.subscribe(t, plain, "-i", "reasons", "-t", "reasons")
	first.await(`Received DISCONNECT \(142\)`) // 0x8E
	second.kill()
}
