"""The steps of broker/interop with paho for Python (1.6, as Debian 12 has it).

Called as client.py URL VERSION USERNAME PASSWORD CAFILE; harness_test.go says
what is written and read.
"""

import collections
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
from urllib.parse import urlparse

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE = 20  # seconds, for every single wait
ORDERED = 200  # messages
V31, V311, V5 = 3, 4, 5

url, version, username, password, ca = sys.argv[1:6]
version = int(version)


class Failed(Exception):
    pass


def want(what, got, expected):
    if got != expected:
        raise Failed("%s: got %r, want %r" % (what, got, expected))


def properties(kind, **values):
    p = Properties(kind)
    for name, value in values.items():
        setattr(p, name, value)
    return p


class Client:
    """A paho client, with its callbacks turned into queues."""

    def __init__(self, name, stays=False, secret=password, will=None):
        self.name = "%s-python-%d" % (name, version)
        self.stays = stays
        at = urlparse(url)
        options = {"protocol": version}
        if version != V5:
            options["clean_session"] = not stays
        if at.scheme in ("ws", "wss"):
            options["transport"] = "websockets"
        c = self.paho = mqtt.Client(self.name, **options)
        if at.scheme in ("ws", "wss"):
            c.ws_set_options(path=at.path)
        if ca != "-":
            c.tls_set(ca)
        c.username_pw_set(username, secret)
        c.reconnect_delay_set(min_delay=1, max_delay=1)
        if will:
            c.will_set(will, "gone", qos=1)
        self.connacks, self.disconnects, self.messages = queue.Queue(), queue.Queue(), queue.Queue()
        self.answers = collections.defaultdict(queue.Queue)  # SUBACK and UNSUBACK, by packet identifier
        self.lock = threading.Lock()
        c.on_connect = self.on_connect
        c.on_disconnect = lambda c, u, rc, p=None: self.disconnects.put(rc)
        c.on_message = lambda c, u, m: self.messages.put(m)
        c.on_subscribe = lambda c, u, mid, codes, p=None: self.answer(mid, codes)
        if version == V5:
            c.on_unsubscribe = lambda c, u, mid, p, codes: self.answer(mid, codes)
        else:
            c.on_unsubscribe = lambda c, u, mid: self.answer(mid, [])

    def on_connect(self, c, userdata, flags, rc, properties=None):
        code = rc.value if version == V5 else rc
        self.connacks.put((code, bool(flags["session present"])))

    def answer(self, mid, codes):
        if not isinstance(codes, (list, tuple)):
            codes = [codes]
        with self.lock:
            self.answers[mid].put([c.value if version == V5 else c for c in codes])

    def wait_answer(self, mid):
        with self.lock:
            q = self.answers[mid]
        try:
            return q.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed("no SUBACK or UNSUBACK")

    def connect(self):
        at = urlparse(url)
        more = {}
        if version == V5:
            more["clean_start"] = not self.stays
            if self.stays:
                more["properties"] = properties(PacketTypes.CONNECT, SessionExpiryInterval=3600)
        self.paho.connect(at.hostname, at.port, keepalive=30, **more)
        self.paho.loop_start()
        return self.connack()

    def connack(self):
        try:
            return self.connacks.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed("no CONNACK")

    def open(self, present=False):
        code, got = self.connect()
        want("CONNACK", code, 0)
        if version != V31:  # which has no such flag
            want("session present", got, present)
        return self

    def close(self):
        self.paho.disconnect()
        try:
            self.disconnects.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed("still connected after DISCONNECT")
        self.paho.loop_stop()

    def subscribe(self, *filters):
        """filters are pairs of filter and QoS."""
        rc, mid = self.paho.subscribe(list(filters)) if version != V5 else self.paho.subscribe(
            [(f, mqtt.SubscribeOptions(qos)) for f, qos in filters])
        want("subscribe", rc, mqtt.MQTT_ERR_SUCCESS)
        granted = self.wait_answer(mid)
        want("granted QoS", granted, [qos for _, qos in filters])
        return self

    def unsubscribe(self, topic):
        rc, mid = self.paho.unsubscribe(topic)
        want("unsubscribe", rc, mqtt.MQTT_ERR_SUCCESS)
        return self.wait_answer(mid)

    def publish(self, topic, payload, qos, retain=False, **values):
        p = properties(PacketTypes.PUBLISH, **values) if values else None
        return self.paho.publish(topic, payload, qos, retain, p)

    def published(self, *args, **values):
        info = self.publish(*args, **values)
        info.wait_for_publish(PATIENCE)
        if not info.is_published():
            raise Failed("no acknowledgement of %r" % (args[0],))

    def next(self):
        try:
            return self.messages.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed("no message")

    def texts(self, n):
        return [self.next().payload.decode() for _ in range(n)]


def connect():
    Client("connect").open().close()


def refused_login():
    c = Client("refused", secret="wrong")
    code, present = c.connect()
    c.paho.loop_stop()
    want("CONNACK", code, 0x86 if version == V5 else 4)
    want("session present", present, False)


def one(qos):
    topic = "one/%d" % qos
    sub = Client("one-sub").open().subscribe((topic, 2))
    pub = Client("one-pub").open()
    pub.published(topic, "öne\0", qos)
    m = sub.next()
    want("message", (m.topic, m.payload.decode(), m.qos, m.retain), (topic, "öne\0", qos, False))
    pub.close()
    sub.close()


def order(qos):
    topic = "order/%d" % qos
    sub = Client("order-sub").open().subscribe((topic, qos))
    pub = Client("order-pub").open()
    sent = [pub.publish(topic, str(i), qos) for i in range(ORDERED)]
    want("messages", sub.texts(ORDERED), [str(i) for i in range(ORDERED)])
    for info in sent:
        info.wait_for_publish(PATIENCE)
        want("acknowledged", info.is_published(), True)
    pub.close()
    sub.close()


def retained():
    topic = "retained/a"
    live = Client("retained-live").open().subscribe((topic, 1))
    pub = Client("retained-pub").open()
    pub.published(topic, "on", 1, True)
    m = live.next()
    want("to a subscriber that was there", (m.payload, m.retain), (b"on", False))
    late = Client("retained-late").open().subscribe((topic, 1))
    m = late.next()
    want("to a late subscriber", (m.payload, m.qos, m.retain), (b"on", 1, True))
    late.close()
    pub.published(topic, "", 1, True)
    late = Client("retained-late").open().subscribe((topic, 1))
    pub.published(topic, "marker", 1)
    m = late.next()
    want("after it was cleared", (m.payload, m.retain), (b"marker", False))
    for c in (late, live, pub):
        c.close()


def will():
    sub = Client("will-sub").open().subscribe(("will/#", 1))
    Client("will-polite", will="will/polite").open().close()
    child = subprocess.Popen([sys.executable, __file__] + sys.argv[1:6] + ["will"], stdout=subprocess.PIPE)
    want("the child", child.stdout.readline(), b"connected\n")
    child.kill()
    child.wait()
    m = sub.next()
    want("will", (m.topic, m.payload, m.qos, m.retain), ("will/killed", b"gone", 1, False))
    sub.close()


def hold_will():
    Client("will-killed", will="will/killed").open()
    print("connected", flush=True)
    threading.Event().wait()


def queue_some(topic, first=0):
    """Publishes 20 messages, the even ones with QoS 1, the odd ones with QoS 2."""
    pub = Client("queue-pub").open()
    for i in range(first, first + 20):
        pub.published(topic, str(i), 1 + i % 2)
    pub.close()


def want_queued(c, first=0):
    got = [c.next() for _ in range(20)]
    for qos in (1, 2):
        want("queued with QoS %d" % qos, [m.payload.decode() for m in got if m.qos == qos],
             [str(i) for i in range(first, first + 20) if 1 + i % 2 == qos])


def session():
    Client("session", stays=True).open().subscribe(("session/#", 2)).close()
    queue_some("session/a")
    c = Client("session", stays=True).open(present=True)
    want_queued(c)
    c.close()
    # Clean: nothing is left.
    c = Client("session").open(present=False)
    c.close()


def restart():
    global url
    Client("restart", stays=True).open().subscribe(("restart/#", 2)).close()
    queue_some("restart/a")
    pub = Client("restart-pub").open()
    pub.published("restart-retained", "kept", 1, True)
    pub.close()
    print("restart", flush=True)
    url = sys.stdin.readline().strip()
    c = Client("restart", stays=True).open(present=True)
    want_queued(c)
    queue_some("restart/b", 20)
    want_queued(c, 20)
    c.subscribe(("restart-retained", 1))
    m = c.next()
    want("retained", (m.payload, m.retain), (b"kept", True))
    c.close()


def reconnect():
    """The connection breaks, and paho comes back by itself."""
    c = Client("reconnect", stays=True).open().subscribe(("reconnect/#", 2))
    with socket.socket(fileno=os.dup(c.paho.socket().fileno())) as below:  # TLS and WebSocket
        below.shutdown(socket.SHUT_RDWR)
    queue_some("reconnect/a")
    code, present = c.connack()
    want("CONNACK", code, 0)
    if version != V31:
        want("session present", present, True)
    want_queued(c)
    c.close()


def unsubscribe():
    c = Client("unsubscribe").open().subscribe(("unsubscribe/a", 1), ("unsubscribe/b", 1))
    want("UNSUBACK", c.unsubscribe("unsubscribe/a"), [0] if version == V5 else [])
    c.published("unsubscribe/a", "a", 1)
    c.published("unsubscribe/b", "b", 1)
    want("message", c.next().topic, "unsubscribe/b")
    c.close()


def wildcard():
    c = Client("wildcard").open().subscribe(("plus/+/t", 1), ("hash/#", 1))
    topics = ["plus/a/t", "plus/a", "plus/a/b/t", "plus//t", "hash", "hash/a", "hash/a/b", "hashes", "plus/end/t"]
    for topic in topics:
        c.published(topic, "", 1)
    matching = ["plus/a/t", "plus//t", "hash", "hash/a", "hash/a/b", "plus/end/t"]
    want("topics", [c.next().topic for _ in matching], matching)
    c.close()


def granted_qos():
    # subscribe compares the answer.
    Client("granted").open().subscribe(("granted/0", 0), ("granted/2", 2), ("granted/1", 1)).close()


def large_payload():
    c = Client("large").open().subscribe(("large", 1))
    payload = bytes(i * 7 % 251 for i in range(300000))
    c.published("large", payload, 1)
    want("unchanged", c.next().payload == payload, True)
    c.close()


def user_properties():
    pairs = [("unit", "°C"), ("unit", "K"), ("", "empty")]
    c = Client("user").open().subscribe(("user", 1))
    c.published("user", "", 1, UserProperty=pairs, ContentType="text/plain", PayloadFormatIndicator=1)
    p = c.next().properties
    want("user properties", p.UserProperty, pairs)
    want("content type", p.ContentType, "text/plain")
    want("payload format", p.PayloadFormatIndicator, 1)
    c.close()


def message_expiry():
    Client("expiry", stays=True).open().subscribe(("expiry", 1)).close()
    pub = Client("expiry-pub").open()
    pub.published("expiry", "short", 1, MessageExpiryInterval=1)
    pub.published("expiry", "long", 1, MessageExpiryInterval=1000)
    # A retained message that expires later shows when it is time.
    pub.published("expiry-clock", "tick", 1, True, MessageExpiryInterval=1)
    marker = 0
    while True:
        c = Client("expiry-clock").open().subscribe(("expiry-clock", 1))
        marker += 1
        pub.published("expiry-clock", str(marker), 1)
        m = c.next()
        c.close()
        if not m.retain:
            break
    pub.close()
    c = Client("expiry", stays=True).open(present=True)
    m = c.next()
    want("first message", m.payload, b"long")
    left = m.properties.MessageExpiryInterval
    if not 900 < left < 1000:
        raise Failed("what is left of 1000 s is %d s" % left)
    c.close()


def topic_alias():
    sub = Client("alias-sub").open().subscribe(("alias/#", 1))
    pub = Client("alias-pub").open()
    pub.published("alias/a", "1", 1, TopicAlias=1)
    pub.published("alias/b", "2", 1, TopicAlias=2)
    pub.published("", "3", 1, TopicAlias=1)
    pub.published("alias/c", "4", 1, TopicAlias=1)  # means another topic from now on
    pub.published("", "5", 1, TopicAlias=1)
    got = [sub.next() for _ in range(5)]
    want("topics", [(m.topic, m.payload.decode()) for m in got],
         [("alias/a", "1"), ("alias/b", "2"), ("alias/a", "3"), ("alias/c", "4"), ("alias/c", "5")])
    for m in got:
        # This client has said nothing of a Topic Alias Maximum [MQTT-3.1.2-26].
        want("alias to the subscriber", hasattr(m.properties, "TopicAlias"), False)
    pub.close()
    sub.close()


def shared_subscription():
    arrived = queue.Queue()
    members = []
    for i in range(2):
        c = Client("shared-%d" % i).open()
        c.paho.on_message = lambda c, u, m, i=i: arrived.put((i, m.payload.decode()))
        members.append(c.subscribe(("$share/group/shared", 1)))
    alone = Client("shared-alone").open().subscribe(("shared", 1))
    pub = Client("shared-pub").open()
    texts = [str(i) for i in range(50)]
    for text in texts:
        pub.published("shared", text, 1)
    want("without a group", alone.texts(50), texts)
    got = [[], []]
    for _ in texts:
        try:
            i, text = arrived.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed("%d messages, want 50" % (len(got[0]) + len(got[1])))
        got[i].append(text)
    want("both together", sorted(got[0] + got[1], key=int), texts)
    for i in range(2):
        want("in order", got[i], sorted(got[i], key=int))
        want("member %d has some" % i, len(got[i]) > 0, True)
    for c in members + [alone, pub]:
        c.close()


def request_response():
    answering = Client("responder").open().subscribe(("request", 1))
    asking = Client("requester").open().subscribe(("response/a", 1))
    asking.published("request", "2+2", 1, ResponseTopic="response/a", CorrelationData=b"\0\1\377")
    m = answering.next()
    answering.published(m.properties.ResponseTopic, "4", 1, CorrelationData=m.properties.CorrelationData)
    m = asking.next()
    want("response", (m.payload, m.properties.CorrelationData), (b"4", b"\0\1\377"))
    asking.close()
    answering.close()


def reason_codes():
    """The reason code of a PUBACK is not shown by this version of paho."""
    c = Client("reasons").open()
    want("UNSUBACK of what was not subscribed", c.unsubscribe("nothing/here"), [0x11])
    gone = queue.Queue()

    def on_disconnect(paho, userdata, rc, properties=None):
        paho.disconnect()  # or it would come back, and take over in its turn
        gone.put(rc)

    c.paho.on_disconnect = on_disconnect
    other = Client("reasons").open()
    try:
        rc = gone.get(timeout=PATIENCE)
    except queue.Empty:
        raise Failed("not disconnected by its successor")
    # paho 1.6 shows a DISCONNECT only if it has a reason and properties, else
    # an error of its own.
    if isinstance(rc, mqtt.ReasonCodes):
        want("DISCONNECT of who was taken over", rc.value, 0x8E)
    c.paho.loop_stop()
    other.close()


STEPS = [
    ("connect", connect),
    ("refused-login", refused_login),
    ("qos0", lambda: one(0)),
    ("qos1", lambda: one(1)),
    ("qos2", lambda: one(2)),
    ("order-qos0", lambda: order(0)),
    ("order-qos1", lambda: order(1)),
    ("order-qos2", lambda: order(2)),
    ("retained", retained),
    ("will", will),
    ("session", session),
    ("restart", restart),
    ("unsubscribe", unsubscribe),
    ("wildcard", wildcard),
    ("granted-qos", granted_qos),
    ("large-payload", large_payload),
    ("reconnect", reconnect),
]
STEPS_V5 = [
    ("user-properties", user_properties),
    ("message-expiry", message_expiry),
    ("topic-alias", topic_alias),
    ("shared-subscription", shared_subscription),
    ("request-response", request_response),
    ("reason-codes", reason_codes),
]


def main():
    if sys.argv[6:] == ["will"]:
        hold_will()
        return
    for name, step in STEPS + (STEPS_V5 if version == V5 else []):
        try:
            step()
        except Exception as e:
            if not isinstance(e, Failed):
                traceback.print_exc()
            print("not ok %s: %s" % (name, " ".join(repr(e).splitlines())), flush=True)
        else:
            print("ok %s" % name, flush=True)


main()
