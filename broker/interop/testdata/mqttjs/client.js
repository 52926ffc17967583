// The steps of broker/interop with MQTT.js. Called as
// client.js URL VERSION USERNAME PASSWORD CAFILE; harness_test.go says what is
// written and read.
'use strict'

const assert = require('node:assert')
const { spawn } = require('node:child_process')
const { once } = require('node:events')
const fs = require('node:fs')
const readline = require('node:readline')
const mqtt = require('mqtt')

const PATIENCE = 20000 // milliseconds, for every single wait
const ORDERED = 200 // messages

let url = process.argv[2]
const version = Number(process.argv[3])
const [username, password, ca] = process.argv.slice(4, 7)
const v5 = version === 5

// within rejects if a promise takes longer than PATIENCE.
function within (promise, what) {
  let timer
  const late = new Promise((resolve, reject) => {
    timer = setTimeout(() => reject(new Error('no ' + what)), PATIENCE)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

// Queue is what events fill and steps take from.
class Queue {
  constructor () {
    this.items = []
    this.takers = []
  }

  put (item) {
    const taker = this.takers.shift()
    if (taker) taker(item)
    else this.items.push(item)
  }

  take (what) {
    if (this.items.length) return this.items.shift()
    return within(new Promise(resolve => this.takers.push(resolve)), what)
  }
}

const clients = new Set() // those that are not closed

class Client {
  constructor (name, more = {}) {
    const { stays = false, ...options } = more
    this.connacks = new Queue()
    this.errors = new Queue()
    this.disconnects = new Queue()
    this.messages = new Queue()
    this.mqtt = mqtt.connect(url, {
      clientId: `${name}-js-${version}`,
      protocolVersion: version,
      protocolId: version === 3 ? 'MQIsdp' : 'MQTT',
      clean: !stays,
      resubscribe: false, // the session is the broker's to keep
      reconnectPeriod: 100,
      connectTimeout: PATIENCE,
      keepalive: 30,
      username,
      password,
      ...(ca !== '-' && { ca: fs.readFileSync(ca), rejectUnauthorized: true }),
      ...(v5 && stays && { properties: { sessionExpiryInterval: 3600 } }),
      ...options
    })
    clients.add(this)
    this.mqtt.on('connect', packet => this.connacks.put(packet))
    this.mqtt.on('error', err => this.errors.put(err))
    this.mqtt.on('disconnect', packet => this.disconnects.put(packet))
    this.mqtt.on('message', (topic, payload, packet) => this.messages.put(packet))
  }

  async opened (present = false) {
    const failed = once(this.mqtt, 'error').then(([err]) => { throw err })
    failed.catch(() => {}) // nobody listens any more once it is connected
    const connack = await Promise.race([this.connacks.take('CONNACK'), failed])
    if (version !== 3) assert.strictEqual(connack.sessionPresent, present, 'session present')
    return this
  }

  close () {
    clients.delete(this)
    return within(this.mqtt.endAsync(), 'end of the connection')
  }

  // subscribe takes pairs of filter and QoS.
  async subscribe (...filters) {
    const list = Object.fromEntries(filters.map(([filter, qos]) => [filter, { qos }]))
    const granted = await within(this.mqtt.subscribeAsync(list), 'SUBACK')
    assert.deepStrictEqual(granted.map(g => [g.topic, g.qos]), filters, 'granted QoS')
    return this
  }

  publish (topic, payload, qos, more = {}) {
    return within(this.mqtt.publishAsync(topic, payload, { qos, ...more }), 'acknowledgement')
  }

  next () {
    return this.messages.take('message')
  }

  async texts (n) {
    const list = []
    while (list.length < n) list.push(String((await this.next()).payload))
    return list
  }
}

function open (name, more) {
  return new Client(name, more).opened()
}

const numbers = (from, to) => Array.from({ length: to - from }, (_, i) => String(from + i))

const steps = {
  async connect () {
    await (await open('connect')).close()
  },

  async 'refused-login' () {
    const c = new Client('refused', { password: 'wrong', reconnectPeriod: 0 })
    const err = await c.errors.take('refusal')
    await c.close()
    assert.strictEqual(err.code, v5 ? 0x86 : 4)
  },

  qos0: () => one(0),
  qos1: () => one(1),
  qos2: () => one(2),
  'order-qos0': () => order(0),
  'order-qos1': () => order(1),
  'order-qos2': () => order(2),

  async retained () {
    const live = await open('retained-live')
    await live.subscribe(['retained', 1])
    const pub = await open('retained-pub')
    await pub.publish('retained', 'on', 1, { retain: true })
    let m = await live.next()
    assert.deepStrictEqual([String(m.payload), m.retain], ['on', false], 'a subscriber that was there')
    let late = await open('retained-late')
    await late.subscribe(['retained', 1])
    m = await late.next()
    assert.deepStrictEqual([String(m.payload), m.qos, m.retain], ['on', 1, true], 'a late subscriber')
    await late.close()
    await pub.publish('retained', '', 1, { retain: true })
    late = await open('retained-late')
    await late.subscribe(['retained', 1])
    await pub.publish('retained', 'marker', 1)
    m = await late.next()
    assert.deepStrictEqual([String(m.payload), m.retain], ['marker', false], 'after it was cleared')
    for (const c of [late, live, pub]) await c.close()
  },

  async will () {
    const sub = await open('will-sub')
    await sub.subscribe(['will/#', 1])
    await (await open('will-polite', { will: willOn('will/polite') })).close()
    const args = [__filename, url, ...process.argv.slice(3, 7), 'will']
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    const [said] = await within(once(child.stdout, 'data'), 'connection of the child')
    assert.strictEqual(String(said), 'connected\n')
    child.kill('SIGKILL')
    const m = await sub.next()
    assert.deepStrictEqual([m.topic, String(m.payload), m.qos, m.retain], ['will/killed', 'gone', 1, false])
    await sub.close()
  },

  async session () {
    await (await (await open('session', { stays: true })).subscribe(['session/#', 2])).close()
    await queueSome('session/a')
    const c = await new Client('session', { stays: true }).opened(true)
    await wantQueued(c)
    await c.close()
    await (await open('session')).close() // clean: nothing is left
  },

  async restart () {
    await (await (await open('restart', { stays: true })).subscribe(['restart/#', 2])).close()
    await queueSome('restart/a')
    const pub = await open('restart-pub')
    await pub.publish('restart-retained', 'kept', 1, { retain: true })
    await pub.close()
    const input = readline.createInterface({ input: process.stdin })
    console.log('restart')
    url = (await within(once(input, 'line'), 'URL'))[0]
    input.close()
    const c = await new Client('restart', { stays: true }).opened(true)
    await wantQueued(c)
    await queueSome('restart/b', 20)
    await wantQueued(c, 20)
    await c.subscribe(['restart-retained', 1])
    const m = await c.next()
    assert.deepStrictEqual([String(m.payload), m.retain], ['kept', true], 'retained')
    await c.close()
  },

  async unsubscribe () {
    const c = await open('unsubscribe')
    await c.subscribe(['unsubscribe/a', 1], ['unsubscribe/b', 1])
    const unsuback = await within(c.mqtt.unsubscribeAsync('unsubscribe/a'), 'UNSUBACK')
    if (v5) assert.deepStrictEqual([...unsuback.granted], [0])
    await c.publish('unsubscribe/a', 'a', 1)
    await c.publish('unsubscribe/b', 'b', 1)
    assert.strictEqual((await c.next()).topic, 'unsubscribe/b')
    await c.close()
  },

  async wildcard () {
    const c = await open('wildcard')
    await c.subscribe(['plus/+/t', 1], ['hash/#', 1])
    for (const topic of ['plus/a/t', 'plus/a', 'plus/a/b/t', 'plus//t', 'hash', 'hash/a', 'hash/a/b', 'hashes', 'plus/end/t']) {
      await c.publish(topic, '', 1)
    }
    for (const topic of ['plus/a/t', 'plus//t', 'hash', 'hash/a', 'hash/a/b', 'plus/end/t']) {
      assert.strictEqual((await c.next()).topic, topic)
    }
    await c.close()
  },

  async 'granted-qos' () {
    const c = await open('granted')
    await c.subscribe(['granted/0', 0], ['granted/2', 2], ['granted/1', 1])
    await c.close()
  },

  async 'large-payload' () {
    const payload = Buffer.alloc(300000)
    for (let i = 0; i < payload.length; i++) payload[i] = i * 7 % 251
    const c = await open('large')
    await c.subscribe(['large', 1])
    await c.publish('large', payload, 1)
    assert(payload.equals((await c.next()).payload), 'not what was sent')
    await c.close()
  },

  // The connection breaks, and MQTT.js comes back by itself.
  async reconnect () {
    const c = await open('reconnect', { stays: true })
    await c.subscribe(['reconnect/#', 2])
    c.mqtt.stream.destroy()
    await within(once(c.mqtt, 'close'), 'end of the connection')
    await queueSome('reconnect/a')
    await c.opened(true)
    await wantQueued(c)
    await c.close()
  }
}

const steps5 = {
  async 'user-properties' () {
    const properties = {
      userProperties: { unit: ['°C', 'K'], '': 'empty' },
      contentType: 'text/plain',
      payloadFormatIndicator: true
    }
    const c = await open('user')
    await c.subscribe(['user', 1])
    await c.publish('user', '', 1, { properties })
    const got = (await c.next()).properties
    assert.deepStrictEqual({ ...got, userProperties: { ...got.userProperties } }, properties)
    await c.close()
  },

  async 'message-expiry' () {
    await (await (await open('expiry', { stays: true })).subscribe(['expiry', 1])).close()
    const pub = await open('expiry-pub')
    const expiring = seconds => ({ properties: { messageExpiryInterval: seconds } })
    await pub.publish('expiry', 'short', 1, expiring(1))
    await pub.publish('expiry', 'long', 1, expiring(1000))
    // A retained message that expires later shows when it is time.
    await pub.publish('expiry-clock', 'tick', 1, { retain: true, ...expiring(1) })
    for (let expired = false; !expired;) {
      const clock = await open('expiry-clock')
      await clock.subscribe(['expiry-clock', 1])
      await pub.publish('expiry-clock', 'marker', 1)
      expired = !(await clock.next()).retain
      await clock.close()
    }
    await pub.close()
    const c = await new Client('expiry', { stays: true }).opened(true)
    const m = await c.next()
    assert.strictEqual(String(m.payload), 'long')
    const left = m.properties.messageExpiryInterval
    assert(left > 900 && left < 1000, `what is left of 1000 s is ${left} s`)
    await c.close()
  },

  // MQTT.js uses aliases on its own, one for each topic, once it is told to;
  // and says how many it takes.
  async 'topic-alias' () {
    const sub = await open('alias-sub', { properties: { topicAliasMaximum: 10 } })
    await sub.subscribe(['alias/#', 1])
    const pub = await open('alias-pub', { autoUseTopicAlias: true, autoAssignTopicAlias: true })
    const sent = []
    pub.mqtt.on('packetsend', p => { if (p.cmd === 'publish') sent.push(p.topic) })
    const topics = ['alias/a', 'alias/b', 'alias/a', 'alias/c', 'alias/b']
    for (const topic of topics) await pub.publish(topic, topic, 1)
    assert.deepStrictEqual(sent, ['alias/a', 'alias/b', '', 'alias/c', ''], 'topics on the way to the broker')
    for (const topic of topics) {
      const m = await sub.next()
      assert.deepStrictEqual([m.topic || topic, String(m.payload)], [topic, topic])
    }
    await pub.close()
    await sub.close()
  },

  async 'shared-subscription' () {
    const arrived = new Queue()
    const members = []
    for (const i of [0, 1]) {
      const c = await open(`shared-${i}`)
      c.mqtt.on('message', (topic, payload) => arrived.put([i, String(payload)]))
      members.push(await c.subscribe(['$share/group/shared', 1]))
    }
    const alone = await open('shared-alone')
    await alone.subscribe(['shared', 1])
    const pub = await open('shared-pub')
    const texts = numbers(0, 50)
    for (const text of texts) await pub.publish('shared', text, 1)
    assert.deepStrictEqual(await alone.texts(50), texts, 'without a group')
    const got = [[], []]
    for (let n = 0; n < 50; n++) {
      const [i, text] = await arrived.take('message of the group')
      got[i].push(Number(text))
    }
    for (const list of got) {
      assert(list.length > 0, 'a member has no message')
      assert.deepStrictEqual(list, [...list].sort((a, b) => a - b), 'order of a member')
    }
    assert.deepStrictEqual(got.flat().sort((a, b) => a - b).map(String), texts, 'both together')
    for (const c of [...members, alone, pub]) await c.close()
  },

  async 'request-response' () {
    const answering = await open('responder')
    await answering.subscribe(['request', 1])
    const asking = await open('requester')
    await asking.subscribe(['response/a', 1])
    const correlationData = Buffer.from([0, 1, 255])
    await asking.publish('request', '2+2', 1, { properties: { responseTopic: 'response/a', correlationData } })
    const request = (await answering.next()).properties
    await answering.publish(request.responseTopic, '4', 1, { properties: { correlationData: request.correlationData } })
    const m = await asking.next()
    assert.strictEqual(String(m.payload), '4')
    assert(correlationData.equals(m.properties.correlationData), 'correlation data')
    await asking.close()
    await answering.close()
  },

  async 'reason-codes' () {
    const c = await open('reasons', { reconnectPeriod: 0 })
    const unsuback = await within(c.mqtt.unsubscribeAsync('nothing/here'), 'UNSUBACK')
    assert.deepStrictEqual([...unsuback.granted], [0x11], 'UNSUBACK of what was not subscribed')
    const err = await c.publish('$SYS/mine', 'x', 1).then(() => undefined, err => err)
    assert.strictEqual(err?.code, 0x87, 'PUBACK of what is not allowed')
    const other = await open('reasons')
    const packet = await c.disconnects.take('DISCONNECT')
    assert.strictEqual(packet.reasonCode, 0x8E, 'DISCONNECT of who was taken over')
    await other.close()
    await c.close()
  }
}

async function one (qos) {
  const sub = await open('one-sub')
  await sub.subscribe(['one', 2])
  const pub = await open('one-pub')
  await pub.publish('one', 'öne\0', qos)
  const m = await sub.next()
  assert.deepStrictEqual([m.topic, String(m.payload), m.qos, m.retain], ['one', 'öne\0', qos, false])
  await pub.close()
  await sub.close()
}

async function order (qos) {
  const sub = await open('order-sub')
  await sub.subscribe(['order', qos])
  const pub = await open('order-pub')
  const texts = numbers(0, ORDERED)
  const sent = Promise.all(texts.map(text => pub.publish('order', text, qos)))
  sent.catch(() => {}) // it is awaited below, unless the order is wrong
  assert.deepStrictEqual(await sub.texts(ORDERED), texts)
  await sent
  await pub.close()
  await sub.close()
}

function willOn (topic) {
  return { topic, payload: Buffer.from('gone'), qos: 1, retain: false }
}

// queueSome publishes 20 messages, the even ones with QoS 1, the odd ones with
// QoS 2.
async function queueSome (topic, first = 0) {
  const pub = await open('queue-pub')
  for (let i = first; i < first + 20; i++) await pub.publish(topic, String(i), 1 + i % 2)
  await pub.close()
}

// wantQueued takes them; each QoS is in order.
async function wantQueued (c, first = 0) {
  const got = []
  while (got.length < 20) got.push(await c.next())
  for (const qos of [1, 2]) {
    assert.deepStrictEqual(
      got.filter(m => m.qos === qos).map(m => String(m.payload)),
      numbers(first, first + 20).filter(i => 1 + i % 2 === qos), `queued with QoS ${qos}`)
  }
}

async function holdWill () {
  await open('will-killed', { will: willOn('will/killed') })
  console.log('connected')
}

async function main () {
  for (const [name, step] of Object.entries({ ...steps, ...(v5 && steps5) })) {
    try {
      await step()
      console.log(`ok ${name}`)
    } catch (err) {
      console.error(err)
      console.log(`not ok ${name}: ${String(err.message).replace(/\s+/g, ' ')}`)
      for (const c of clients) c.mqtt.end(true) // or they would come back again and again
      clients.clear()
    }
  }
  process.exit(0) // whatever is still open
}

if (process.argv[7] === 'will') holdWill()
else main()
