"use strict"
/*
The forward pass of model.py's GPT and its `generate`, in plain JavaScript, cell by cell, without
gradient: what runs in the page that play.py writes. tests/test_play.py compares it with torch.

Not here: learned positions, RECALL, REVISE, temperature. Names are model.py's: V tokens, d bits, D
n_embd, hs the size of a head, k and v keys and values. All numbers are double precision.
*/

// base64 of float32, tensor behind tensor, and {name: shape} -> {name: Float32Array}, row by row
function unpack(base64, shapes) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0))
  const all = new Float32Array(bytes.buffer), weights = {}
  let at = 0
  for (const [name, shape] of Object.entries(shapes)) {
    const size = shape.reduce((a, b) => a * b, 1)
    weights[name] = all.subarray(at, at + size)
    at += size
  }
  return weights
}

function linear(net, name, x) {
  const w = net.weights[name + ".weight"], b = net.weights[name + ".bias"]
  const y = new Float64Array(b.length)
  for (let i = 0, at = 0; i < y.length; i++) {
    let sum = b[i]
    for (let j = 0; j < x.length; j++) sum += w[at++] * x[j]
    y[i] = sum
  }
  return y
}

function layerNorm(net, name, x) {
  const w = net.weights[name + ".weight"], b = net.weights[name + ".bias"]
  let mean = 0, variance = 0
  for (const a of x) mean += a / x.length
  for (const a of x) variance += (a - mean) ** 2 / x.length
  const scale = 1 / Math.sqrt(variance + 1e-5)
  return x.map((a, i) => (a - mean) * scale * w[i] + b[i])
}

// JavaScript has no error function: Abramowitz & Stegun 7.1.26, wrong by less than 1.5e-7
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x))
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t
    + 0.254829592) * t
  return Math.sign(x) * (1 - series * Math.exp(-x * x))
}
const gelu = x => x * 0.5 * (1 + erf(x / Math.SQRT2))

// of a Float64Array, in place
function softmax(x) {
  let top = -Infinity, sum = 0
  for (const a of x) top = Math.max(top, a)
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - top)
  for (let i = 0; i < x.length; i++) x[i] /= sum
  return x
}

// x behind all that `kept` holds, at n * x.length; -> kept, or a larger copy
function append(kept, x, n) {
  const at = n * x.length
  if (at + x.length > kept.length) {
    const larger = new Float64Array(2 * (at + x.length))
    larger.set(kept)
    kept = larger
  }
  kept.set(x, at)
  return kept
}

const add = (x, y) => x.map((a, i) => a + y[i])
const join = (...parts) => Float64Array.from(parts.flatMap(part => [...part]))

// the halves of a head, turned by RoPE, in place
function rotate(head, position, frequency) {
  const half = frequency.length
  for (let i = 0; i < half; i++) {
    const cos = Math.cos(position * frequency[i]), sin = Math.sin(position * frequency[i])
    const a = head[i], b = head[half + i]
    head[i] = a * cos - b * sin
    head[half + i] = a * sin + b * cos
  }
  return head
}

// id of a token or a thought -> its embedding (D)
function embed(net, id) {
  const { V, D, d } = net
  const table = net.weights["embedding.weight"]
  if (id < V) return Float64Array.from(table.subarray(id * D, id * D + D))
  const bits = Array.from({ length: d }, (_, i) => Math.floor((id - V) / 2 ** i) % 2 ? 1 : -1)
  return linear(net, "thoughts.embedding", bits)
}

// -> what model.Attention returns of one cell, and of each head what it looked at
function attention(net, layer, x, below, cache, window) {
  const { D, heads, hs, frequency } = net, name = `blocks.${layer}.attention`
  const watches = net.watched.length > 0 && layer === net.layers - 1
  let [q, k, v] = [0, 1, 2].map(part => linear(net, name + ".qkv", x).slice(part * D, part * D + D))
  if (watches) {
    const seen = join(...net.watched.map(i => below[i])), part = name + ".observer"
    const hidden = linear(net, part + ".kv.1", layerNorm(net, part + ".kv.0", seen)).map(gelu)
    const kv = linear(net, part + ".kv.3", hidden)
    q = join(q, linear(net, part + ".q", x))
    k = join(k, kv.slice(0, hs))
    v = join(v, kv.slice(hs))
  }
  const count = heads + watches, width = count * hs, kept = cache.layers[layer]
  for (let head = 0; head < count; head++) {
    for (const part of [q, k]) {
      rotate(part.subarray(head * hs, head * hs + hs), cache.position, frequency)
    }
  }
  const last = cache.position, first = window ? Math.max(0, last - window + 1) : 0
  const keys = kept.k = append(kept.k, k, last), values = kept.v = append(kept.v, v, last)
  const y = new Float64Array(width), looked = []
  for (let at = 0; at < y.length; at += hs) {
    const p = new Float64Array(last - first + 1)
    for (let c = 0; c < p.length; c++) {
      const cell = (first + c) * width
      let score = 0
      for (let i = at; i < at + hs; i++) score += q[i] * keys[cell + i]
      p[c] = score / Math.sqrt(hs)
    }
    softmax(p)
    for (let c = 0; c < p.length; c++) {
      const cell = (first + c) * width
      for (let i = at; i < at + hs; i++) y[i] += p[c] * values[cell + i]
    }
    looked.push(p)
  }
  const sensed = watches ? add(y.slice(D), v.slice(D)) : null
  return { y: linear(net, name + ".proj", y), sensed, looked }
}

const nothing = () => ({ k: new Float64Array(0), v: new Float64Array(0) })
const emptyCache = net => ({ position: 0, layers: Array.from({ length: net.layers }, nothing) })

/*
One cell, the id of a token or a thought, through the network; the cache grows by it. window:
positions in view, 0 for all. -> logits (V), thoughts (d), gate, readings (3, or 0 without
observer), and attention [layer][head][cell], of the cells in view, the last is the cell itself.
*/
function forward(net, cache, id, window = 0) {
  let x = embed(net, id), sensed = null
  const below = [x], looked = []
  for (let layer = 0; layer < net.layers; layer++) {
    const name = `blocks.${layer}`
    const result = attention(net, layer, layerNorm(net, name + ".norm1", x), below, cache, window)
    x = add(x, result.y)
    const hidden = linear(net, name + ".up", layerNorm(net, name + ".norm2", x)).map(gelu)
    x = add(x, linear(net, name + ".down", hidden))
    sensed = result.sensed
    below.push(x)
    looked.push(result.looked)
  }
  cache.position++
  x = layerNorm(net, "norm", x)
  const out = { logits: linear(net, "head", x), thoughts: [], gate: -Infinity, readings: [] }
  if (net.d) {
    out.thoughts = linear(net, "thoughts.head", x)
    out.gate = linear(net, "gate.out", sensed ? join(x, sensed) : x)[0]
  }
  if (sensed) {
    const name = `blocks.${net.layers - 1}.attention.observer.read`
    out.readings = linear(net, name, sensed)
    const entropies = softmax(out.logits.slice()).map(p => p && -p * Math.log(p))
    out.readings[0] += entropies.reduce((a, b) => a + b)
  }
  return { ...out, attention: looked }
}

const argmax = x => x.indexOf(Math.max(...x))
const likeliest = h => h.reduce((id, a, i) => a > 0 ? id + 2 ** i : id, 0)

// of the last cell, with `run` thoughts since the last token; price: null, or nats
function wantsToThink(net, out, run, price) {
  if (price !== null) return out.readings[1] > price
  if (net.force !== null) return run > 0 || net.force > 0
  return out.gate > 0
}

/*
Continue a prompt, ids, greedily -> cells: all that went through the network and, last, the token
that came then, which did not; each with its id, t (which token), slot (0, or which thought behind
it), given, and out: logits, thoughts, gate, readings.
how: mode, policy, never, random, constant or swapped; window; price; thoughts, the
numbers to think one after another, again and again, if swapped; draw(), a number, if random; edits
{"t.slot": number, or -1 not to think there}; most, new tokens.
*/
function generate(net, prompt, how) {
  const { mode = "policy", window = 0, price = null, thoughts = [], edits = {}, most = 32 } = how
  const cells = [], cache = emptyCache(net)
  let count = 1, slot = 0, id = prompt[0], swapped = 0
  while (true) {
    const { attention, ...out } = forward(net, cache, id, window)
    cells.push({ id, t: count - 1, slot, given: count <= prompt.length, out })
    const place = `${count - 1}.${slot + 1}`, edited = slot < net.maxRun && place in edits
    let thinks = net.d > 0 && mode !== "never" && slot < net.maxRun
    thinks &&= (slot > 0 || !net.after || net.after[id]) && wantsToThink(net, out, slot, price)
    thinks &&= mode !== "swapped" || thoughts.length > 0
    if (edited ? edits[place] >= 0 : thinks) {
      let thought = { random: how.draw, constant: () => 0 }[mode]?.() ?? likeliest(out.thoughts)
      if (mode === "swapped" && thinks) thought = thoughts[swapped++ % thoughts.length]
      id = net.V + (edited ? edits[place] : thought)
      slot++
      continue
    }
    const given = count < prompt.length
    id = given ? prompt[count] : argmax(out.logits)
    count++
    slot = 0
    if (count === prompt.length + most || (id === net.rowEnd && !given)) {
      return [...cells, { id, t: count - 1, slot, given, out: null }]
    }
  }
}

// what a page holds -> net. Sizes are model.GPTConfig's.
function makeNet({ network, thinking, tokens, row_end, shapes, weights }) {
  const { n_bits, n_layer, n_head, n_embd } = network, hs = n_embd / n_head
  return {
    V: tokens.length, d: n_bits, D: n_embd, layers: n_layer, heads: n_head, hs,
    watched: network.watched, frequency: network.frequency, rowEnd: row_end,
    maxRun: thinking.max_run, force: thinking.force, after: thinking.after,
    weights: unpack(weights, shapes),
  }
}

// text -> ids, the longest token that fits first; or an Error that names what does not fit
function encode(tokens, text) {
  const ids = [], sizes = tokens.map(token => token.length)
  for (let at = 0; at < text.length;) {
    let best = -1
    tokens.forEach((token, i) => {
      if (text.startsWith(token, at) && (best < 0 || sizes[i] > sizes[best])) best = i
    })
    if (best < 0) {
      const known = tokens.filter(token => token !== "\n").join(" ")
      throw new Error(`“${text[at]}”, character ${at + 1}, fits no token. There are: ${known}`)
    }
    ids.push(best)
    at += sizes[best]
  }
  return ids
}

if (typeof module !== "undefined") {
  module.exports = { makeNet, forward, emptyCache, generate, encode }
}
