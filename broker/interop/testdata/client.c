/* The steps of broker/interop with paho for C (1.3), the synchronous API with
 * callbacks. Called as client URL VERSION USERNAME PASSWORD CAFILE;
 * harness_test.go says what is written and read. A client that a failed step
 * leaves open is left to the end of the process. */

#include <MQTTClient.h>

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE 20 /* seconds, for every single wait */
#define ORDERED 200 /* messages */

static char **arguments; /* of this program, for the one that is killed */
static char url[256];
static int version;
static const char *username, *password, *ca;

static char why[512]; /* the step failed */

static int fail(const char *format, ...)
{
	va_list values;
	va_start(values, format);
	vsnprintf(why, sizeof why, format, values);
	va_end(values);
	return 0;
}

/* A step, and what it calls, returns 0 when it has called fail. */
#define DO(call) do { if (!(call)) return 0; } while (0)
#define WANT(what, got, want) DO(want_int(what, got, want))
#define WANT_TEXT(what, got, want) DO(want_text(what, got, (int)strlen(got), want))

static int want_int(const char *what, long got, long want)
{
	return got == want ? 1 : fail("%s: got %ld, want %ld", what, got, want);
}

static int want_text(const char *what, const char *got, int length, const char *want)
{
	if (length == (int)strlen(want) && memcmp(got, want, length) == 0)
		return 1;
	return fail("%s: got \"%.*s\", want \"%s\"", what, length > 100 ? 100 : length, got, want);
}

/* What paho's threads tell is guarded by mutex; changed is signalled for it. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

struct message {
	struct message *next;
	char *topic;
	MQTTClient_message *paho;
};

/* In the steps clients are static: one that a failed step leaves open still
 * calls back. */
struct client {
	MQTTClient handle;
	int stays; /* its session outlives the connection */
	int present; /* what CONNACK said of the session */
	struct message *first, **last;
	int waiting; /* messages in the list */
	int lost, disconnected, acknowledged; /* reason codes; -1: not yet */
};

static int arrived(void *context, char *topic, int topic_length, MQTTClient_message *message)
{
	struct client *c = context;
	struct message *m = calloc(1, sizeof *m);
	(void)topic_length; /* no topic here has a zero byte */
	m->topic = topic;
	m->paho = message;
	pthread_mutex_lock(&mutex);
	*c->last = m;
	c->last = &m->next;
	c->waiting++;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mutex);
	return 1;
}

static void set(int *to, int value)
{
	pthread_mutex_lock(&mutex);
	*to = value;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mutex);
}

static void lost(void *context, char *cause)
{
	(void)cause;
	set(&((struct client *)context)->lost, 1);
}

static void disconnected(void *context, MQTTProperties *properties, enum MQTTReasonCodes reason)
{
	(void)properties;
	set(&((struct client *)context)->disconnected, reason);
}

static void published_with(void *context, int token, int packet, MQTTProperties *properties, enum MQTTReasonCodes reason)
{
	(void)token;
	(void)packet;
	(void)properties;
	set(&((struct client *)context)->acknowledged, reason);
}

/* wait_for_sum waits for *a + *b to be at least least; mutex is locked. */
static int wait_for_sum(const int *a, const int *b, int least)
{
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += PATIENCE;
	while (*a + *b < least)
		if (pthread_cond_timedwait(&changed, &mutex, &end) != 0)
			return 0;
	return 1;
}

static int wait_until(const int *value, int least)
{
	static const int nothing = 0;
	return wait_for_sum(value, &nothing, least);
}

static int next(struct client *c, struct message *m)
{
	pthread_mutex_lock(&mutex);
	int there = wait_until(&c->waiting, 1);
	if (there) {
		struct message *first = c->first;
		*m = *first;
		c->first = first->next;
		if (c->first == NULL)
			c->last = &c->first;
		c->waiting--;
		free(first);
	}
	pthread_mutex_unlock(&mutex);
	return there ? 1 : fail("no message");
}

static void done_with(struct message *m)
{
	MQTTClient_freeMessage(&m->paho);
	MQTTClient_free(m->topic);
}

static int next_is(struct client *c, const char *what, const char *topic, const char *payload, int qos, int retain)
{
	struct message m;
	DO(next(c, &m));
	WANT_TEXT(what, m.topic, topic);
	if (!want_text(what, m.paho->payload, m.paho->payloadlen, payload)) {
		snprintf(why + strlen(why), sizeof why - strlen(why), " (DUP %d, packet identifier %d)", m.paho->dup, m.paho->msgid);
		return 0;
	}
	WANT(what, m.paho->qos, qos);
	WANT(what, m.paho->retained, retain);
	done_with(&m);
	return 1;
}

static void add_number(MQTTProperties *list, enum MQTTPropertyCodes code, unsigned value)
{
	MQTTProperty p = {.identifier = code};
	switch (MQTTProperty_getType(code)) {
	case MQTTPROPERTY_TYPE_BYTE: p.value.byte = value; break;
	case MQTTPROPERTY_TYPE_TWO_BYTE_INTEGER: p.value.integer2 = value; break;
	default: p.value.integer4 = value;
	}
	MQTTProperties_add(list, &p);
}

static void add_bytes(MQTTProperties *list, enum MQTTPropertyCodes code, const char *data, int length, const char *value)
{
	MQTTProperty p = {.identifier = code};
	p.value.data.data = (char *)data;
	p.value.data.len = length;
	p.value.value.data = (char *)value;
	p.value.value.len = value == NULL ? 0 : strlen(value);
	MQTTProperties_add(list, &p);
}

/* make makes a client of its own. */
static int make(struct client *c, const char *name, int stays)
{
	char id[100];
	snprintf(id, sizeof id, "%s-c-%d", name, version);
	if (c->handle != NULL)
		MQTTClient_destroy(&c->handle); /* of a step that failed */
	memset(c, 0, sizeof *c);
	c->stays = stays;
	c->last = &c->first;
	c->lost = c->disconnected = c->acknowledged = -1;
	MQTTClient_createOptions options = MQTTClient_createOptions_initializer;
	options.MQTTVersion = version;
	WANT("create", MQTTClient_createWithOptions(&c->handle, url, id, MQTTCLIENT_PERSISTENCE_NONE, NULL, &options), 0);
	WANT("callbacks", MQTTClient_setCallbacks(c->handle, c, lost, arrived, NULL), 0);
	if (version == 5) {
		WANT("callbacks", MQTTClient_setDisconnected(c->handle, c, disconnected), 0);
		WANT("callbacks", MQTTClient_setPublished(c->handle, c, published_with), 0);
	}
	return 1;
}

/* dial connects; *code is what CONNACK said. */
static int dial(struct client *c, const char *secret, const char *will_topic, int *code)
{
	MQTTClient_connectOptions options = MQTTClient_connectOptions_initializer;
	MQTTClient_connectOptions options5 = MQTTClient_connectOptions_initializer5;
	MQTTClient_SSLOptions tls = MQTTClient_SSLOptions_initializer;
	MQTTClient_willOptions will = MQTTClient_willOptions_initializer;
	char *const uris[] = {url};
	if (version == 5)
		options = options5;
	options.MQTTVersion = version;
	options.serverURIs = uris; /* another one after a restart */
	options.serverURIcount = 1;
	options.keepAliveInterval = 30;
	options.connectTimeout = PATIENCE;
	options.username = username;
	options.password = secret;
	options.reliable = 0;
	options.maxInflightMessages = ORDERED;
	if (strcmp(ca, "-") != 0) {
		tls.trustStore = ca;
		tls.verify = 1;
		options.ssl = &tls;
	}
	if (will_topic != NULL) {
		will.topicName = will_topic;
		will.message = "gone";
		will.qos = 1;
		options.will = &will;
	}
	if (version == 5) {
		MQTTProperties properties = MQTTProperties_initializer;
		options.cleanstart = !c->stays;
		if (c->stays)
			add_number(&properties, MQTTPROPERTY_CODE_SESSION_EXPIRY_INTERVAL, 3600);
		MQTTResponse r = MQTTClient_connect5(c->handle, &options, &properties, NULL);
		*code = r.reasonCode;
		MQTTResponse_free(r);
		MQTTProperties_free(&properties);
	} else {
		options.cleansession = !c->stays;
		*code = MQTTClient_connect(c->handle, &options);
	}
	c->present = options.returned.sessionPresent;
	return 1;
}

static int open_again(struct client *c, int present)
{
	int code;
	DO(dial(c, password, NULL, &code));
	WANT("CONNACK", code, 0);
	if (version == 4) /* 3.1 has no such flag, and paho 1.3 does not show that of 5 */
		WANT("session present", c->present, present);
	return 1;
}

static int open_new(struct client *c, const char *name, int stays)
{
	DO(make(c, name, stays));
	return open_again(c, 0);
}

static int leave(struct client *c)
{
	if (version == 5)
		WANT("disconnect", MQTTClient_disconnect5(c->handle, PATIENCE * 1000, MQTTREASONCODE_NORMAL_DISCONNECTION, NULL), 0);
	else
		WANT("disconnect", MQTTClient_disconnect(c->handle, PATIENCE * 1000), 0);
	return 1;
}

static int close_for_good(struct client *c)
{
	DO(leave(c));
	MQTTClient_destroy(&c->handle);
	return 1;
}

static int subscribe_many(struct client *c, int count, char *const *filters, const int *qos)
{
	int granted[10];
	memcpy(granted, qos, count * sizeof *qos);
	if (version == 5) {
		MQTTResponse r = MQTTClient_subscribeMany5(c->handle, count, filters, granted, NULL, NULL);
		if (count == 1)
			granted[0] = r.reasonCode;
		else if (r.reasonCodes == NULL || r.reasonCodeCount != count)
			return fail("SUBACK has %d codes, want %d", r.reasonCodeCount, count);
		for (int i = 0; count > 1 && i < count; i++)
			granted[i] = r.reasonCodes[i];
		MQTTResponse_free(r);
	} else {
		WANT("subscribe", MQTTClient_subscribeMany(c->handle, count, filters, granted), 0);
	}
	for (int i = 0; i < count; i++)
		WANT("granted QoS", granted[i], qos[i]);
	return 1;
}

static int subscribe(struct client *c, const char *filter, int qos)
{
	char *const filters[] = {(char *)filter};
	return subscribe_many(c, 1, filters, &qos);
}

/* publish sends; *token is what is waited for. properties may be NULL. */
static int publish(struct client *c, const char *topic, const void *payload, int length, int qos, int retain,
		   MQTTProperties *properties, MQTTClient_deliveryToken *token)
{
	MQTTClient_message m = MQTTClient_message_initializer;
	m.payload = (void *)payload;
	m.payloadlen = length;
	m.qos = qos;
	m.retained = retain;
	if (version == 5) {
		m.struct_version = 1;
		if (properties != NULL)
			m.properties = *properties;
		MQTTResponse r = MQTTClient_publishMessage5(c->handle, topic, &m, token);
		WANT("publish", r.reasonCode, 0);
		MQTTResponse_free(r);
	} else {
		WANT("publish", MQTTClient_publishMessage(c->handle, topic, &m, token), 0);
	}
	return 1;
}

/* published publishes and waits for the acknowledgement. */
static int published(struct client *c, const char *topic, const char *payload, int qos, int retain, MQTTProperties *properties)
{
	MQTTClient_deliveryToken token;
	DO(publish(c, topic, payload, strlen(payload), qos, retain, properties, &token));
	if (qos > 0)
		WANT("acknowledgement", MQTTClient_waitForCompletion(c->handle, token, PATIENCE * 1000), 0);
	return 1;
}

static int step_connect(void)
{
	static struct client c;
	DO(open_new(&c, "connect", 0));
	return close_for_good(&c);
}

static int step_refused_login(void)
{
	static struct client c;
	int code;
	DO(make(&c, "refused", 0));
	DO(dial(&c, "wrong", NULL, &code));
	WANT("CONNACK", code, version == 5 ? MQTTREASONCODE_BAD_USER_NAME_OR_PASSWORD : 4);
	MQTTClient_destroy(&c.handle);
	return 1;
}

static int one(int qos)
{
	static struct client sub, pub;
	DO(open_new(&sub, "one-sub", 0));
	DO(subscribe(&sub, "one", 2));
	DO(open_new(&pub, "one-pub", 0));
	DO(published(&pub, "one", "\xc3\xb6ne", qos, 0, NULL));
	DO(next_is(&sub, "message", "one", "\xc3\xb6ne", qos, 0));
	DO(close_for_good(&pub));
	return close_for_good(&sub);
}

static int step_qos0(void) { return one(0); }
static int step_qos1(void) { return one(1); }
static int step_qos2(void) { return one(2); }

static int order(int qos)
{
	static struct client sub, pub;
	MQTTClient_deliveryToken tokens[ORDERED];
	char text[20];
	DO(open_new(&sub, "order-sub", 0));
	DO(subscribe(&sub, "order", qos));
	DO(open_new(&pub, "order-pub", 0));
	for (int i = 0; i < ORDERED; i++)
		DO(publish(&pub, "order", text, snprintf(text, sizeof text, "%d", i), qos, 0, NULL, &tokens[i]));
	for (int i = 0; i < ORDERED; i++) {
		snprintf(text, sizeof text, "%d", i);
		DO(next_is(&sub, "order", "order", text, qos, 0));
	}
	for (int i = 0; qos > 0 && i < ORDERED; i++)
		WANT("acknowledgement", MQTTClient_waitForCompletion(pub.handle, tokens[i], PATIENCE * 1000), 0);
	DO(close_for_good(&pub));
	return close_for_good(&sub);
}

static int step_order_qos0(void) { return order(0); }
static int step_order_qos1(void) { return order(1); }
static int step_order_qos2(void) { return order(2); }

static int step_retained(void)
{
	static struct client live, late, pub;
	DO(open_new(&live, "retained-live", 0));
	DO(subscribe(&live, "retained", 1));
	DO(open_new(&pub, "retained-pub", 0));
	DO(published(&pub, "retained", "on", 1, 1, NULL));
	DO(next_is(&live, "to a subscriber that was there", "retained", "on", 1, 0));
	DO(open_new(&late, "retained-late", 0));
	DO(subscribe(&late, "retained", 1));
	DO(next_is(&late, "to a late subscriber", "retained", "on", 1, 1));
	DO(close_for_good(&late));
	DO(published(&pub, "retained", "", 1, 1, NULL));
	DO(open_new(&late, "retained-late", 0));
	DO(subscribe(&late, "retained", 1));
	DO(published(&pub, "retained", "marker", 1, 0, NULL));
	DO(next_is(&late, "after it was cleared", "retained", "marker", 1, 0));
	DO(close_for_good(&late));
	DO(close_for_good(&live));
	return close_for_good(&pub);
}

static int step_will(void)
{
	static struct client sub, polite;
	int code, pipes[2];
	char line[20];
	DO(open_new(&sub, "will-sub", 0));
	DO(subscribe(&sub, "will/#", 1));
	DO(make(&polite, "will-polite", 0));
	DO(dial(&polite, password, "will/polite", &code));
	WANT("CONNACK", code, 0);
	DO(close_for_good(&polite));

	WANT("pipe", pipe(pipes), 0);
	pid_t child = fork();
	if (child == 0) {
		dup2(pipes[1], STDOUT_FILENO);
		execl(arguments[0], arguments[0], url, arguments[2], username, password, ca, "will", (char *)NULL);
		_exit(127);
	}
	close(pipes[1]);
	FILE *said = fdopen(pipes[0], "r");
	char *got = fgets(line, sizeof line, said);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	fclose(said);
	WANT_TEXT("the child", got == NULL ? "" : got, "connected\n");
	DO(next_is(&sub, "will", "will/killed", "gone", 1, 0));
	return close_for_good(&sub);
}

static int hold_will(void)
{
	static struct client c;
	int code;
	DO(make(&c, "will-killed", 0));
	DO(dial(&c, password, "will/killed", &code));
	WANT("CONNACK", code, 0);
	puts("connected");
	for (;;)
		pause();
}

/* queue_some publishes 20 messages, the even ones with QoS 1, the odd ones
 * with QoS 2. */
static int queue_some(const char *topic, int first)
{
	static struct client pub;
	char text[20];
	DO(open_new(&pub, "queue-pub", 0));
	for (int i = first; i < first + 20; i++) {
		snprintf(text, sizeof text, "%d", i);
		DO(published(&pub, topic, text, 1 + i % 2, 0, NULL));
	}
	return close_for_good(&pub);
}

/* want_queued takes them; each QoS is in order. first is even. */
static int want_queued(struct client *c, const char *topic, int first)
{
	int expected[3] = {0, first, first + 1};
	char text[20];
	for (int i = 0; i < 20; i++) {
		struct message m;
		DO(next(c, &m));
		int qos = m.paho->qos;
		if (qos < 1 || qos > 2)
			return fail("a queued message has QoS %d", qos);
		snprintf(text, sizeof text, "%d", expected[qos]);
		WANT_TEXT("topic", m.topic, topic);
		DO(want_text(qos == 1 ? "queued with QoS 1" : "queued with QoS 2", m.paho->payload, m.paho->payloadlen, text));
		expected[qos] += 2;
		done_with(&m);
	}
	return 1;
}

static int step_session(void)
{
	static struct client c;
	DO(open_new(&c, "session", 1));
	DO(subscribe(&c, "session/#", 2));
	DO(leave(&c));
	DO(queue_some("session/a", 0));
	DO(open_again(&c, 1)); /* the same client, as paho has kept it */
	DO(want_queued(&c, "session/a", 0));
	DO(close_for_good(&c));
	DO(open_new(&c, "session", 0)); /* clean: nothing is left */
	return close_for_good(&c);
}

/* The connection of this one breaks with the broker. */
static int step_restart(void)
{
	static struct client away, there, pub;
	DO(open_new(&away, "restart-away", 1));
	DO(subscribe(&away, "restart/#", 2));
	DO(leave(&away));
	DO(open_new(&there, "restart-there", 1));
	DO(subscribe(&there, "restart2/#", 2));
	DO(queue_some("restart/a", 0));
	DO(open_new(&pub, "restart-pub", 0));
	DO(published(&pub, "restart-retained", "kept", 1, 1, NULL));
	DO(close_for_good(&pub));
	puts("restart");
	if (fgets(url, sizeof url, stdin) == NULL)
		return fail("no URL after the restart");
	url[strcspn(url, "\n")] = 0;
	pthread_mutex_lock(&mutex);
	int noticed = wait_until(&there.lost, 1);
	pthread_mutex_unlock(&mutex);
	WANT("loss of the connection noticed", noticed, 1);
	DO(open_again(&away, 1));
	DO(want_queued(&away, "restart/a", 0));
	DO(open_again(&there, 1));
	DO(queue_some("restart2/b", 20));
	DO(want_queued(&there, "restart2/b", 20));
	DO(subscribe(&there, "restart-retained", 1));
	DO(next_is(&there, "retained", "restart-retained", "kept", 1, 1));
	DO(close_for_good(&there));
	return close_for_good(&away);
}

static int step_unsubscribe(void)
{
	static struct client c;
	char *const filters[] = {"unsubscribe/a", "unsubscribe/b"};
	const int qos[] = {1, 1};
	DO(open_new(&c, "unsubscribe", 0));
	DO(subscribe_many(&c, 2, filters, qos));
	if (version == 5) {
		MQTTResponse r = MQTTClient_unsubscribe5(c.handle, "unsubscribe/a", NULL);
		WANT("UNSUBACK", r.reasonCode, 0);
		MQTTResponse_free(r);
	} else {
		WANT("UNSUBACK", MQTTClient_unsubscribe(c.handle, "unsubscribe/a"), 0);
	}
	DO(published(&c, "unsubscribe/a", "a", 1, 0, NULL));
	DO(published(&c, "unsubscribe/b", "b", 1, 0, NULL));
	DO(next_is(&c, "message", "unsubscribe/b", "b", 1, 0));
	return close_for_good(&c);
}

static int step_wildcard(void)
{
	static const struct { const char *topic; int matches; } topics[] = {
		{"plus/a/t", 1}, {"plus/a", 0}, {"plus/a/b/t", 0}, {"plus//t", 1}, {"hash", 1},
		{"hash/a", 1}, {"hash/a/b", 1}, {"hashes", 0}, {"plus/end/t", 1},
	};
	const int n = sizeof topics / sizeof *topics;
	char *const filters[] = {"plus/+/t", "hash/#"};
	const int qos[] = {1, 1};
	static struct client c;
	DO(open_new(&c, "wildcard", 0));
	DO(subscribe_many(&c, 2, filters, qos));
	for (int i = 0; i < n; i++)
		DO(published(&c, topics[i].topic, "", 1, 0, NULL));
	for (int i = 0; i < n; i++)
		if (topics[i].matches)
			DO(next_is(&c, "topics", topics[i].topic, "", 1, 0));
	return close_for_good(&c);
}

static int step_granted_qos(void)
{
	char *const filters[] = {"granted/0", "granted/2", "granted/1"};
	const int qos[] = {0, 2, 1};
	static struct client c;
	DO(open_new(&c, "granted", 0));
	DO(subscribe_many(&c, 3, filters, qos));
	return close_for_good(&c);
}

static int step_large_payload(void)
{
	enum { LENGTH = 300000 };
	static unsigned char payload[LENGTH];
	MQTTClient_deliveryToken token;
	static struct client c;
	struct message m;
	for (int i = 0; i < LENGTH; i++)
		payload[i] = i * 7 % 251;
	DO(open_new(&c, "large", 0));
	DO(subscribe(&c, "large", 1));
	DO(publish(&c, "large", payload, LENGTH, 1, 0, NULL, &token));
	WANT("acknowledgement", MQTTClient_waitForCompletion(c.handle, token, PATIENCE * 1000), 0);
	DO(next(&c, &m));
	WANT("length", m.paho->payloadlen, LENGTH);
	WANT("difference", memcmp(m.paho->payload, payload, LENGTH), 0);
	done_with(&m);
	return close_for_good(&c);
}

static int want_property(MQTTProperties *list, enum MQTTPropertyCodes code, int index, const char *data, int length)
{
	MQTTProperty *p = MQTTProperties_getPropertyAt(list, code, index);
	if (p == NULL)
		return fail("no %s %d", MQTTPropertyName(code), index);
	if (p->value.data.len != length || memcmp(p->value.data.data, data, length) != 0)
		return fail("%s %d: got \"%.*s\"", MQTTPropertyName(code), index, p->value.data.len, p->value.data.data);
	return 1;
}

static int step_user_properties(void)
{
	static const char *const pairs[][2] = {{"unit", "\xc2\xb0""C"}, {"unit", "K"}, {"", "empty"}};
	MQTTProperties list = MQTTProperties_initializer;
	static struct client c;
	struct message m;
	for (int i = 0; i < 3; i++)
		add_bytes(&list, MQTTPROPERTY_CODE_USER_PROPERTY, pairs[i][0], strlen(pairs[i][0]), pairs[i][1]);
	add_bytes(&list, MQTTPROPERTY_CODE_CONTENT_TYPE, "text/plain", 10, NULL);
	add_number(&list, MQTTPROPERTY_CODE_PAYLOAD_FORMAT_INDICATOR, 1);
	DO(open_new(&c, "user", 0));
	DO(subscribe(&c, "user", 1));
	DO(published(&c, "user", "", 1, 0, &list));
	MQTTProperties_free(&list);
	DO(next(&c, &m));
	MQTTProperties *got = &m.paho->properties;
	WANT("user properties", MQTTProperties_propertyCount(got, MQTTPROPERTY_CODE_USER_PROPERTY), 3);
	for (int i = 0; i < 3; i++) {
		DO(want_property(got, MQTTPROPERTY_CODE_USER_PROPERTY, i, pairs[i][0], strlen(pairs[i][0])));
		MQTTLenString value = MQTTProperties_getPropertyAt(got, MQTTPROPERTY_CODE_USER_PROPERTY, i)->value.value;
		DO(want_text("value", value.data, value.len, pairs[i][1]));
	}
	DO(want_property(got, MQTTPROPERTY_CODE_CONTENT_TYPE, 0, "text/plain", 10));
	WANT("payload format", MQTTProperties_getNumericValue(got, MQTTPROPERTY_CODE_PAYLOAD_FORMAT_INDICATOR), 1);
	done_with(&m);
	return close_for_good(&c);
}

static int published_expiring(struct client *c, const char *topic, const char *payload, int retain, int seconds)
{
	MQTTProperties list = MQTTProperties_initializer;
	add_number(&list, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL, seconds);
	int ok = published(c, topic, payload, 1, retain, &list);
	MQTTProperties_free(&list);
	return ok;
}

static int step_message_expiry(void)
{
	static struct client c, pub, clock;
	struct message m;
	DO(open_new(&c, "expiry", 1));
	DO(subscribe(&c, "expiry", 1));
	DO(leave(&c));
	DO(open_new(&pub, "expiry-pub", 0));
	DO(published_expiring(&pub, "expiry", "short", 0, 1));
	DO(published_expiring(&pub, "expiry", "long", 0, 1000));
	/* A retained message that expires later shows when it is time. */
	DO(published_expiring(&pub, "expiry-clock", "tick", 1, 1));
	for (int expired = 0; !expired;) {
		DO(open_new(&clock, "expiry-clock", 0));
		DO(subscribe(&clock, "expiry-clock", 1));
		DO(published(&pub, "expiry-clock", "marker", 1, 0, NULL));
		DO(next(&clock, &m));
		expired = !m.paho->retained;
		done_with(&m);
		DO(close_for_good(&clock));
	}
	DO(close_for_good(&pub));
	DO(open_again(&c, 1));
	DO(next(&c, &m));
	DO(want_text("first message", m.paho->payload, m.paho->payloadlen, "long"));
	int left = MQTTProperties_getNumericValue(&m.paho->properties, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL);
	if (left <= 900 || left >= 1000)
		return fail("what is left of 1000 s is %d s", left);
	done_with(&m);
	return close_for_good(&c);
}

static int step_topic_alias(void)
{
	static const struct { const char *topic; int alias; const char *means; } sent[] = {
		{"alias/a", 1, "alias/a"}, {"alias/b", 2, "alias/b"}, {"", 1, "alias/a"},
		{"alias/c", 1, "alias/c"}, {"", 1, "alias/c"},
	};
	const int n = sizeof sent / sizeof *sent;
	static struct client sub, pub;
	struct message m;
	DO(open_new(&sub, "alias-sub", 0));
	DO(subscribe(&sub, "alias/#", 1));
	DO(open_new(&pub, "alias-pub", 0));
	for (int i = 0; i < n; i++) {
		MQTTProperties list = MQTTProperties_initializer;
		add_number(&list, MQTTPROPERTY_CODE_TOPIC_ALIAS, sent[i].alias);
		DO(published(&pub, sent[i].topic, "x", 1, 0, &list));
		MQTTProperties_free(&list);
	}
	for (int i = 0; i < n; i++) {
		DO(next(&sub, &m));
		WANT_TEXT("topics", m.topic, sent[i].means);
		/* This client has said nothing of a Topic Alias Maximum [MQTT-3.1.2-26]. */
		WANT("alias to the subscriber", MQTTProperties_hasProperty(&m.paho->properties, MQTTPROPERTY_CODE_TOPIC_ALIAS), 0);
		done_with(&m);
	}
	DO(close_for_good(&pub));
	return close_for_good(&sub);
}

static int step_shared_subscription(void)
{
	enum { COUNT = 50 };
	static struct client members[2], alone, pub;
	char text[20], seen[COUNT] = {0};
	DO(open_new(&members[0], "shared-0", 0));
	DO(open_new(&members[1], "shared-1", 0));
	for (int i = 0; i < 2; i++)
		DO(subscribe(&members[i], "$share/group/shared", 1));
	DO(open_new(&alone, "shared-alone", 0));
	DO(subscribe(&alone, "shared", 1));
	DO(open_new(&pub, "shared-pub", 0));
	for (int i = 0; i < COUNT; i++) {
		snprintf(text, sizeof text, "%d", i);
		DO(published(&pub, "shared", text, 1, 0, NULL));
	}
	for (int i = 0; i < COUNT; i++) {
		snprintf(text, sizeof text, "%d", i);
		DO(next_is(&alone, "without a group", "shared", text, 1, 0));
	}
	pthread_mutex_lock(&mutex);
	int there = wait_for_sum(&members[0].waiting, &members[1].waiting, COUNT);
	int counts[2] = {members[0].waiting, members[1].waiting};
	pthread_mutex_unlock(&mutex);
	if (!there)
		return fail("the members have %d and %d of %d messages", counts[0], counts[1], COUNT);
	WANT("both together", counts[0] + counts[1], COUNT);
	if (counts[0] == 0 || counts[1] == 0)
		return fail("one member has all messages");
	for (int i = 0; i < 2; i++) {
		for (int last = -1; counts[i] > 0; counts[i]--) {
			struct message m;
			DO(next(&members[i], &m));
			snprintf(text, sizeof text, "%.*s", m.paho->payloadlen, (char *)m.paho->payload);
			int number = atoi(text);
			if (number <= last || number >= COUNT || seen[number]++)
				return fail("member %d: %d after %d, or twice", i, number, last);
			last = number;
			done_with(&m);
		}
	}
	for (int i = 0; i < 2; i++)
		DO(close_for_good(&members[i]));
	DO(close_for_good(&alone));
	return close_for_good(&pub);
}

static int step_request_response(void)
{
	static const char correlation[] = {0, 1, (char)255};
	MQTTProperties list = MQTTProperties_initializer, answer = MQTTProperties_initializer;
	static struct client asking, answering;
	struct message m;
	DO(open_new(&answering, "responder", 0));
	DO(subscribe(&answering, "request", 1));
	DO(open_new(&asking, "requester", 0));
	DO(subscribe(&asking, "response/a", 1));
	add_bytes(&list, MQTTPROPERTY_CODE_RESPONSE_TOPIC, "response/a", 10, NULL);
	add_bytes(&list, MQTTPROPERTY_CODE_CORRELATION_DATA, correlation, 3, NULL);
	DO(published(&asking, "request", "2+2", 1, 0, &list));
	MQTTProperties_free(&list);

	DO(next(&answering, &m));
	DO(want_property(&m.paho->properties, MQTTPROPERTY_CODE_RESPONSE_TOPIC, 0, "response/a", 10));
	MQTTProperty *data = MQTTProperties_getProperty(&m.paho->properties, MQTTPROPERTY_CODE_CORRELATION_DATA);
	if (data == NULL)
		return fail("the request has no correlation data");
	MQTTProperties_add(&answer, data);
	DO(published(&answering, "response/a", "4", 1, 0, &answer));
	MQTTProperties_free(&answer);
	done_with(&m);

	DO(next(&asking, &m));
	DO(want_text("response", m.paho->payload, m.paho->payloadlen, "4"));
	DO(want_property(&m.paho->properties, MQTTPROPERTY_CODE_CORRELATION_DATA, 0, correlation, 3));
	done_with(&m);
	DO(close_for_good(&asking));
	return close_for_good(&answering);
}

static int step_reason_codes(void)
{
	static struct client c, other;
	MQTTClient_deliveryToken token;
	DO(open_new(&c, "reasons", 0));
	MQTTResponse r = MQTTClient_unsubscribe5(c.handle, "nothing/here", NULL);
	WANT("UNSUBACK of what was not subscribed", r.reasonCode, MQTTREASONCODE_NO_SUBSCRIPTION_FOUND);
	MQTTResponse_free(r);

	DO(publish(&c, "$SYS/mine", "x", 1, 1, 0, NULL, &token));
	pthread_mutex_lock(&mutex);
	wait_until(&c.acknowledged, 0);
	int code = c.acknowledged;
	pthread_mutex_unlock(&mutex);
	WANT("PUBACK of what is not allowed", code, MQTTREASONCODE_NOT_AUTHORIZED);

	DO(open_new(&other, "reasons", 0));
	pthread_mutex_lock(&mutex);
	wait_until(&c.disconnected, 0);
	code = c.disconnected;
	pthread_mutex_unlock(&mutex);
	WANT("DISCONNECT of who was taken over", code, MQTTREASONCODE_SESSION_TAKEN_OVER);
	return close_for_good(&other);
}

static const struct {
	const char *name;
	int (*run)(void);
	int only5;
} steps[] = {
	{"connect", step_connect, 0},
	{"refused-login", step_refused_login, 0},
	{"qos0", step_qos0, 0},
	{"qos1", step_qos1, 0},
	{"qos2", step_qos2, 0},
	{"order-qos0", step_order_qos0, 0},
	{"order-qos1", step_order_qos1, 0},
	{"order-qos2", step_order_qos2, 0},
	{"retained", step_retained, 0},
	{"will", step_will, 0},
	{"session", step_session, 0},
	{"restart", step_restart, 0},
	{"unsubscribe", step_unsubscribe, 0},
	{"wildcard", step_wildcard, 0},
	{"granted-qos", step_granted_qos, 0},
	{"large-payload", step_large_payload, 0},
	{"user-properties", step_user_properties, 1},
	{"message-expiry", step_message_expiry, 1},
	{"topic-alias", step_topic_alias, 1},
	{"shared-subscription", step_shared_subscription, 1},
	{"request-response", step_request_response, 1},
	{"reason-codes", step_reason_codes, 1},
};

int main(int argc, char **argv)
{
	if (argc < 6) {
		fputs("usage: client URL VERSION USERNAME PASSWORD CAFILE\n", stderr);
		return 2;
	}
	arguments = argv;
	snprintf(url, sizeof url, "%s", argv[1]);
	version = atoi(argv[2]);
	username = argv[3];
	password = argv[4];
	ca = argv[5];
	setvbuf(stdout, NULL, _IOLBF, 0);
	MQTTClient_init_options init = MQTTClient_init_options_initializer;
	init.do_openssl_init = 1;
	MQTTClient_global_init(&init);
	if (argc == 7 && strcmp(argv[6], "will") == 0) {
		hold_will();
		fprintf(stderr, "%s\n", why);
		return 1;
	}
	for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
		if (steps[i].only5 && version != 5)
			continue;
		if (steps[i].run())
			printf("ok %s\n", steps[i].name);
		else
			printf("not ok %s: %s\n", steps[i].name, why);
	}
	return 0;
}
