"""
A GPT that may think: the network, its cache, and `generate`, the loop in which it thinks, recalls,
revises and emits.

An ordinary pre-norm decoder with rotary positions. Added are thoughts of d bits; a gate, one number
a cell: think next, or emit a token; an observer, one more attention head in the last block, which
watches the layers below; and what RECALL and REVISE need.

Not here: how any of it is trained (train.py), any task, any path, any logging.

Glossary
  B     sequences in a batch
  T     real tokens in a sequence: tokens of the data
  stream  one sequence's cells in reading order
  trunk   embedding and blocks: all that lies below the output heads
  cell  one input of the network, a real token, a thought or RECALL, together with its outputs
  C     cells that go through the network together; in a cache, all so far
  V     vocabulary of real tokens, ids 0 .. V-1
  d     bits of a thought; 2^d thoughts, ids V .. V+2^d-1; never part of the text
  D     n_embd; nh attention heads of size hs
  think / emit   what follows a cell: a thought, or the next real token
  RECALL  the last id, an input only: a cell that sees everything before it, despite window and cut,
          predicts the next token, and is seen by no other
  REVISE  an output only, one more class beside the V tokens: take the last token back
  cut     a place from which on a stream sees nothing of what came before (made by train.py)

References
  GPT-2 (Radford et al. 2019) and nanoGPT for the network; RoPE (Su et al. 2021, arXiv:2104.09864)
  for positions; bits: Bengio et al. 2013, arXiv:1308.3432, and finite scalar quantisation
  (Mentzer et al. 2023, arXiv:2309.15505); Muon: kellerjordan.github.io/posts/muon
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------------------
# configuration and visibility

ROPE_BASE = 100.0  # rotary wavelengths: 2 pi to nearly 2 pi * ROPE_BASE cells; streams are short
GATE_INIT = 0.6  # a new gate thinks, or nobody would see what thoughts are worth; but is not sure
READINGS = ("predicted_loss", "value_of_thinking", "cost_to_go")  # of the observer, in nats


@dataclass
class GPTConfig:
    vocab_size: int = 0  # V
    n_bits: int = 8  # d; 0 is a plain GPT
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    n_positions: int = 0  # 0: rotary; else GPT-2's way: as many learned positions, and tanh GELU
    observer: str = ""  # layers below the last that are watched, e.g. "0,1", or "quarters"
    recall: bool = False
    revise: bool = False

    @property
    def n_think(self) -> int:
        """How many different thoughts there are, 2^d."""
        return 2**self.n_bits if self.n_bits else 0

    def watched(self) -> list[int]:
        """Whose outputs the observer watches: 0 the embedding, 1 the first block .. ValueError."""
        L = self.n_layer
        if self.observer == "quarters":
            return sorted({min(round(L * quarter / 4), L - 1) for quarter in (1, 2, 3)})
        layers = {layer.strip() for layer in self.observer.split(",") if layer}
        if not layers <= {str(layer) for layer in range(L)}:
            message = f"is neither quarters nor layers below the last block, 0 to {L - 1}"
            raise ValueError(f"observer = {self.observer!r} {message}")
        return sorted(map(int, layers))


class Cells(NamedTuple):
    """Where cells stand and what may see them, (B, C) each; None: nothing special about any."""

    position: Tensor  # index in the stream
    segment: Tensor | None = None  # a cell sees its own segment only: a cut begins a new one
    seen: Tensor | None = None  # bool: later cells may see it; not so padding and RECALL
    sees_all: Tensor | None = None  # bool: RECALL, from which neither window nor cut hides anything

    def part(self, columns: slice) -> "Cells":
        return Cells(*(x if x is None else x[:, columns] for x in self))

    def then(self, new: "Cells") -> "Cells":
        both = zip(self, new)
        return Cells(*(None if b is None else torch.cat([a, b], dim=1) for a, b in both))


def visible(query: Cells, key: Cells, window: int = 0) -> Tensor | None:
    """
    -> (B, n_query, n_key) bool, True where a query sees a key; the queries are the last n_query of
    the keys. A cell sees itself; and what comes before it, if that is `seen` and, unless the cell
    `sees_all`, of its own segment and less than `window` positions back (0: any). None: plain
    causal attention needs no mask.
    """
    n_query, n_key = query.position.size(1), key.position.size(1)
    if n_query == n_key and not window and key.segment is None and key.seen is None:
        return None
    ones = torch.ones(n_query, n_key, dtype=torch.bool, device=key.position.device)
    before = ones.tril(n_key - n_query)  # or the cell itself
    itself = before.triu(n_key - n_query)
    near = before[None]
    if window:
        near = near & (query.position[:, :, None] - key.position[:, None, :] < window)
    if key.segment is not None:
        near = near & (query.segment[:, :, None] == key.segment[:, None, :])
    if key.sees_all is not None:
        near = near | (query.sees_all[:, :, None] & before)
    if key.seen is not None:
        near = near & key.seen[:, None, :]
    return near | itself


class Cache(NamedTuple):
    """Keys and values of the cells so far: a value, grown by torch.cat, never changed."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, nh, C, hs)
    cells: Cells

    def last(self, count: int) -> "Cache":
        """The last `count` cells only, which is all that a window shows; 0: all."""
        columns = slice(-count, None) if count else slice(None)
        layers = [(k[:, :, columns], v[:, :, columns]) for k, v in self.layers]
        return Cache(layers, self.cells.part(columns))


class Output(NamedTuple):
    """What every cell puts out, whatever went in."""

    logits: Tensor  # (B, C, V) of the next real token; (B, C, V + 1) with REVISE
    thoughts: Tensor  # (B, C, d) numbers whose signs are a thought's bits, see Thoughts
    gate: Tensor  # (B, C) logit of thinking; -inf in a plain GPT
    recall: Tensor  # (B, C) logit of RECALL; -inf in a model without
    readings: Tensor  # (B, C, 3) of the observer, see READINGS; (B, C, 0) without one
    last: Tensor  # (B, C, D) what all of these are made of
    cache: Cache


# ----------------------------------------------------------------------------------------------
# the network


class Thoughts(nn.Module):
    """
    A thought is d bits, each -1 or 1; its id, 0 .. 2^d - 1, is the binary number in which bit i
    counts 2^i. Its embedding is linear in the bits.

    The trunk is mapped to d numbers h, one a bit. A bit is the sign of tanh(h_i) + NOISE * e, e
    standard normal, the bits independent of each other: p(bit i is set) = Phi(tanh(h_i) / NOISE),
    Phi the normal distribution function. What to think is learned through `echo`, as if a bit were
    tanh(h_i): straight through (Bengio et al. 2013). Under a softmax over 2^d thoughts one that is
    never drawn gets no gradient; here all share the same d rows of weights.
    """

    NOISE = 0.2  # |tanh(h)| near 1: sure of the bit (p > .999); h = 0: a coin flip

    def __init__(self, n_bits: int, n_embd: int):
        super().__init__()
        self.head = nn.Linear(n_embd, n_bits)
        self.embedding = nn.Linear(n_bits, n_embd)
        self.register_buffer("counts", 2 ** torch.arange(n_bits), persistent=False)

    def bits(self, thought: Tensor) -> Tensor:
        """Thoughts' ids (...) -> their bits (..., d), each -1.0 or 1.0."""
        is_set = (thought[..., None] & self.counts) > 0
        return torch.where(is_set, 1.0, -1.0).to(self.embedding.weight.dtype)

    def forward(self, thought: Tensor) -> Tensor:
        """Thoughts' ids (...) -> embeddings (..., D)."""
        return self.embedding(self.bits(thought))

    def likeliest(self, h: Tensor) -> Tensor:
        """h (..., d) -> thoughts' ids (...). Where h is exactly 0 the bit is not set."""
        return ((h > 0) * self.counts).sum(dim=-1)

    def draw(self, h: Tensor, generator=None) -> Tensor:
        """h (..., d) -> thoughts' ids (...), drawn at random as said above."""
        noise = torch.empty_like(h).normal_(generator=generator)
        return self.likeliest(h.tanh() + self.NOISE * noise)

    def log_probability(self, h: Tensor, thought: Tensor) -> Tensor:
        """log p, in nats, that thoughts (...) are drawn from h (..., d) -> (...)."""
        return torch.special.log_ndtr(h.tanh() * self.bits(thought) / self.NOISE).sum(dim=-1)

    def echo(self, h: Tensor) -> Tensor:
        """
        h (..., d) -> (..., D), all zeros. Added to a thought's embedding it changes no value, but
        gives h, of the cell before, the gradient that the bits would get if they were tanh(h).
        """
        soft = h.tanh()
        return F.linear(soft - soft.detach(), self.embedding.weight)


class Observer(nn.Module):
    """
    One attention head that watches how the thinking goes. Its query is made of the last block's
    input, its keys and values of the outputs of the layers below, side by side. Like the other
    heads it adds to the last block's output. What it sensed, its attention's output plus the
    cell's own value, goes to the gate, and three numbers are read off it, in nats:
      predicted_loss     of the next real token, if the cell emits now: the entropy of its logits,
                         and what the head adds to it
      value_of_thinking  by how much one more thought lowers later losses, before its price
      cost_to_go         the loss of all that comes later, thoughts' prices included
    Its gradient stops at its inputs: it does not change the layers that it watches.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layers = config.watched()
        hs, width = config.n_embd // config.n_head, config.n_embd * len(self.layers)
        self.q = nn.Linear(config.n_embd, hs)
        self.kv = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * hs), nn.GELU(), nn.Linear(2 * hs, 2 * hs)
        )
        self.read = nn.Linear(hs, len(READINGS))

    def forward(self, x: Tensor, below: list[Tensor]) -> Tensor:
        """x (B, C, D); below: (B, C, D) of embedding and layers -> q, k, v, (B, C, 3, 1, hs)."""
        watched = torch.cat([below[layer] for layer in self.layers], dim=-1).detach()
        qkv = torch.cat([self.q(x.detach()), self.kv(watched)], dim=-1)  # (B, C, 3 * hs)
        return qkv.view(*x.shape[:2], 3, 1, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the halves of each head. x (2, B, nh, C, hs); cos, sin (B, 1, C, hs / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, observed: bool):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        hs = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.observer = Observer(config) if observed else None
        self.proj = nn.Linear(config.n_embd + observed * hs, config.n_embd)

    def heads(self, x: Tensor, below: list[Tensor], turn: tuple) -> tuple[Tensor, ...]:
        """-> q, k, v, each (B, nh, C, hs), q and k rotated; nh is one more with the observer."""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.n_head, -1)
        if self.observer is not None:
            qkv = torch.cat([qkv, self.observer(x, below)], dim=3)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, C, 3, nh, hs) -> (3, B, nh, C, hs)
        return *rotate(qkv[:2], *turn), qkv[2]

    def forward(self, x, below, turn, mask, past):
        """
        x (B, C, D); below: list of (B, C, D); turn: cos and sin; mask: (B, 1, C, keys) or None;
        past: keys and values of the cache, or None -> (B, C, D); what the observer sensed, (B, C,
        hs), or None; keys and values so far.
        """
        q, k, v = self.heads(x, below, turn)
        own = v[:, -1]  # (B, C, hs) the last head's value, which is the observer's if there is one
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, C, hs) -> (B, C, nh * hs)
        sensed = None if self.observer is None else y[..., x.size(-1) :] + own
        return self.proj(y), sensed, (k, v)


class Gate(nn.Module):
    """A yes or no of every cell: a logit, which says yes with probability p before training."""

    def __init__(self, width: int, p: float):
        super().__init__()
        self.out, self.p = nn.Linear(width, 1), p

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, width) -> (B, C)"""
        return self.out(x)[..., 0]


class Block(nn.Module):
    def __init__(self, config: GPTConfig, observed: bool):
        super().__init__()
        D = config.n_embd
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(config, observed)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.gelu = nn.GELU("tanh" if config.n_positions else "none")
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, *attend):
        y, sensed, kept = self.attention(self.norm1(x), *attend)
        x = x + self.drop(y)
        return x + self.drop(self.down(self.gelu(self.up(self.norm2(x))))), sensed, kept


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        """Raises ValueError for a configuration that fits no network."""
        super().__init__()
        self.config = config
        V, D, hs = config.vocab_size, config.n_embd, config.n_embd // config.n_head
        if D % config.n_head or hs % 2:
            raise ValueError(f"n_embd = {D} must split into n_head = {config.n_head} even heads")
        observed = bool(config.watched())
        self.embedding = nn.Embedding(V + config.recall, D)  # RECALL is the last
        self.position = nn.Embedding(config.n_positions, D) if config.n_positions else None
        self.thoughts = Thoughts(config.n_bits, D) if config.n_bits else None
        layers = range(config.n_layer)
        self.blocks = nn.ModuleList(Block(config, observed and i == layers[-1]) for i in layers)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V + config.revise)  # REVISE is the last; not tied to the embedding
        self.gate = Gate(D + observed * hs, GATE_INIT) if config.n_bits else None
        self.recall_gate = Gate(D + observed * hs, 0.5) if config.recall else None
        self.drop = nn.Dropout(config.dropout)
        frequency = ROPE_BASE ** -torch.linspace(0, 1, hs // 2 + 1)[:-1]
        if config.n_positions:
            frequency = 0 * frequency  # learned positions instead: nothing is turned
        self.register_buffer("frequency", frequency, persistent=False)  # (hs / 2,) radians a cell
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))  # GPT-2: .02
            nn.init.zeros_(module.bias)
        # `apply` comes to a module after its parts, so these two have the last word. Thoughts begin
        # small: at first they are random hashes of what was read, and help to memorise the data.
        if module is self.thoughts:
            nn.init.normal_(module.embedding.weight, std=0.02)
        if isinstance(module, Gate):
            nn.init.zeros_(module.out.weight)
            nn.init.constant_(module.out.bias, math.log(module.p / (1 - module.p)))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (...) of real tokens, thoughts and RECALL -> (..., D)."""
        V, K = self.config.vocab_size, self.config.n_think
        thought = ids - V
        is_thought = (thought >= 0) & (thought < K)
        token = torch.where(thought < 0, ids, ids - K)  # RECALL comes right after the tokens
        x = self.embedding(token * ~is_thought)  # of thoughts any row, which is not used
        if self.thoughts is None:
            return x
        return torch.where(is_thought[..., None], self.thoughts(thought * is_thought), x)

    def forward(
        self, x: Tensor, cells: Cells | None = None, cache: Cache | None = None, window: int = 0
    ) -> Output:
        """
        x: ids (B, C), or embeddings (B, C, D). cells: where they stand; None: one after another,
        after those in the cache. window: positions in view, 0 for all. Raises ValueError.
        """
        if not x.is_floating_point():
            x = self.embed(x)  # (B, C) -> (B, C, D)
        if cells is None:
            start = cache.cells.position[:, -1:] + 1 if cache else 0
            cells = Cells(start + torch.arange(x.size(1), device=x.device).expand(x.shape[:2]))
        keys = cache.cells.then(cells) if cache else cells
        mask = visible(cells, keys, window)
        if mask is not None:
            mask = mask[:, None]  # (B, 1, C, keys), the same for all heads
        if self.position is not None:
            if int(cells.position.max()) >= self.config.n_positions:
                raise ValueError(f"learned positions end after {self.config.n_positions} cells")
            x = x + self.position(cells.position)
        angle = cells.position[:, None, :, None] * self.frequency  # (B, 1, C, hs / 2)
        turn = angle.cos(), angle.sin()
        x = self.drop(x)
        below, layers = [x], []  # outputs of embedding and layers (B, C, D); keys and values
        for layer, block in enumerate(self.blocks):
            past = cache.layers[layer] if cache else None
            x, sensed, kept = block(x, below, turn, mask, past)
            below.append(x)
            layers.append(kept)
        return self._outputs(self.norm(x), sensed, Cache(layers, keys))

    def _outputs(self, x: Tensor, sensed: Tensor | None, cache: Cache) -> Output:
        """x (B, C, D); what the observer sensed (B, C, hs), or None."""
        logits = self.head(x)
        never = torch.full_like(x[..., 0], -torch.inf)
        # gates read the trunk and do not shape it: what tries teach is noisy
        gate_input = (x if sensed is None else torch.cat([x, sensed], dim=-1)).detach()
        readings = x[..., :0]
        if sensed is not None:
            p = logits.detach().softmax(dim=-1)
            entropy = torch.special.entr(p).sum(dim=-1, keepdim=True)  # (B, C, 1)
            readings = self.blocks[-1].attention.observer.read(sensed)  # (B, C, 3)
            readings = readings + F.pad(entropy, (0, len(READINGS) - 1))
        return Output(
            logits,
            x[..., :0] if self.thoughts is None else self.thoughts.head(x),
            never if self.gate is None else self.gate(gate_input),
            never if self.recall_gate is None else self.recall_gate(gate_input),
            readings,
            x,
            cache,
        )

    def optimisers(self, lr: float, gate_lr: float, decay: float) -> list[torch.optim.Optimizer]:
        """
        Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else; Muon's steps
        are scaled to be as large as AdamW's. Weights of linear layers decay, those of the gates and
        the observer excepted, whose group is `apart`, with a learning rate of its own. What a try
        teaches them is little as a rule, and seldom much: AdamW divides by the size of recent
        gradients, and over few steps (beta 2) it would make the seldom as little as the rest.
        """
        blocks, matrices, gates, rest = [], [], [], []
        is_matrix = {m.weight for m in self.modules() if isinstance(m, nn.Linear)}
        for name, p in self.named_parameters():
            apart = name.startswith(("gate.", "recall_gate.")) or ".observer." in name
            matrix = blocks if name.startswith("blocks.") else matrices
            (gates if apart else matrix if p in is_matrix else rest).append(p)
        kinds = (blocks, lr, decay), (matrices, lr, decay), (gates, gate_lr, 0.0), (rest, lr, 0.0)
        first, *others = [
            {"params": some, "peak_lr": peak, "weight_decay": d, "apart": some is gates}
            | {"betas": (0.9, 0.999 if some is gates else 0.95)}
            for some, peak, d in kinds
            if some
        ]
        muon = torch.optim.Muon([first], lr=lr, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, lr=lr)]


# ----------------------------------------------------------------------------------------------
# how it thinks, and the loop in which it does

MODES = ("policy", "never", "random", "constant", "swapped")


@dataclass
class Thinking:
    """
    How thoughts are made. All modes but `policy` are ablations: `never` takes thoughts away, the
    others what they say. `swapped` gives a sequence the thoughts of the one before it in the batch;
    a batch of one (`generate`) has no other, there give `instead`.
    """

    mode: str = "policy"  # one of MODES
    max_run: int = 1  # thoughts in a row, at most
    force: float | None = None  # after a token, with this probability max_run thoughts, else none
    force_recall: float | None = None  # RECALL with this probability. None: the gate is asked
    price: float | None = None  # nats; if set, think where the observer's value_of_thinking is more
    greedy: bool = False  # the likeliest thought, not one drawn
    after: Tensor | None = None  # (V,) bool: real tokens that a thought may follow; None: all
    constant: int = 0  # the thought of mode `constant`
    window: int = 0  # positions in view, 0 for all

    def longest_run(self, config: GPTConfig) -> int:
        """R, thoughts in a row, at most, of such a model."""
        return self.max_run if config.n_bits and self.mode != "never" else 0


def decide(logit: Tensor, force: float | None, generator=None) -> Tensor:
    """Yes with the probability `force`; if None, where the logit is positive -> bool, its shape."""
    if force is None:
        return logit > 0
    return torch.rand(logit.shape, generator=generator, device=logit.device) < force


def wants_to_think(out: Output, run: int, thinking: Thinking, generator=None) -> Tensor:
    """-> (B,) bool, by the last cell of the output, with `run` thoughts since the last token."""
    if thinking.price is not None:
        return out.readings[:, -1, READINGS.index("value_of_thinking")] > thinking.price
    force = 1.0 if thinking.force is not None and run else thinking.force  # a run, once begun
    return decide(out.gate[:, -1], force, generator)


def choose_thought(model: GPT, h: Tensor, thinking: Thinking, generator=None) -> Tensor:
    """h (B, d), see Thoughts -> ids of thoughts (B,), by the model itself or by an ablation."""
    if thinking.mode == "random":
        return model.thoughts.draw(torch.zeros_like(h), generator)
    if thinking.mode == "constant":
        return torch.full(h.shape[:1], thinking.constant, device=h.device)
    greedy = thinking.greedy
    thought = model.thoughts.likeliest(h) if greedy else model.thoughts.draw(h, generator)
    return thought.roll(1, dims=0) if thinking.mode == "swapped" else thought


def choose_token(logits: Tensor, temperature: float, top_k: int, generator=None) -> int:
    """(V,) -> an id: the likeliest (temperature 0), or a draw among the top k (0: all)."""
    if not temperature:
        return int(logits.argmax())
    if top_k:
        kth = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = (logits / temperature).softmax(dim=0)
    return int(torch.multinomial(p, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    new_tokens: int,
    thinking: Thinking,
    generator: torch.Generator | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    stop: int = -1,
    revisions: int = 8,
    instead: list[int] | None = None,
    watch: Callable | None = None,
) -> list[int]:
    """
    Continue a prompt by up to `new_tokens` real tokens, or to `stop` -> prompt and answer, without
    thoughts. After every cell, of the prompt too, one of four things happens:
      REVISE  if likelier than all tokens together: back to where the last one was emitted, and
              another instead; only after a token of the answer, at most `revisions` times
      THINK   a thought is appended, at most max_run in a row
      RECALL  one cell looks at everything, and emits
      emit    the next token is appended; within the prompt, the one that is given
    The memory stack: for each token, what there was when it was emitted; a cache is never changed,
    so that it can be kept. `instead`: thoughts to think in place of the model's own, in turn.
    `watch` is called with what happened, "token", "think", "recall" or "revise", and an id.
    Raises ValueError for an empty prompt or answer.
    """
    if not prompt or new_tokens < 1:
        raise ValueError("a prompt and its answer hold at least one token each")
    config, device = model.config, model.embedding.weight.device
    V, RECALL = config.vocab_size, config.vocab_size + config.n_think
    max_run, after = thinking.longest_run(config), thinking.after
    if instead is not None:
        max_run, instead = max_run * bool(instead), cycle(instead)
    watch = watch or (lambda what, token: None)
    cell, run, cache = prompt[0], 0, None  # cell: the id that goes through the network next
    tokens, memory_stack = [cell], []  # memory_stack: (cache, logits) of each token emitted
    watch("token", cell)
    while True:
        out = model(torch.tensor([[cell]], device=device), None, cache, thinking.window)
        cache = out.cache if config.recall else out.cache.last(thinking.window)
        logits = out.logits[0, -1]

        may_revise = config.revise and revisions and len(tokens) > len(prompt) and run == 0
        may_revise = may_revise and memory_stack[-1][1].isfinite().sum() > 1  # one must be left
        if may_revise and logits[V] > logits[:V].logsumexp(dim=0):
            taken_back, (cache, logits) = tokens.pop(), memory_stack.pop()
            logits[taken_back] = -torch.inf
            revisions -= 1
            watch("revise", taken_back)
        else:
            may_think = run < max_run and (run > 0 or after is None or bool(after[cell]))
            if may_think and wants_to_think(out, run, thinking, generator):
                own = choose_thought(model, out.thoughts[:, -1], thinking, generator)
                cell, run = V + (int(own) if instead is None else next(instead)), run + 1
                watch("think", cell)
                continue
            if config.recall and decide(out.recall, thinking.force_recall, generator):
                looked = model(torch.tensor([[RECALL]], device=device), None, cache)
                logits = looked.logits[0, -1]
                watch("recall", RECALL)
            logits = logits[:V].clone()

        if config.revise:
            memory_stack.append((cache, logits))
        given = len(tokens) < len(prompt)
        chosen = choose_token(logits, temperature, top_k, generator)
        cell, run = prompt[len(tokens)] if given else chosen, 0
        tokens.append(cell)
        watch("token", cell)
        if len(tokens) == len(prompt) + new_tokens or (cell == stop and not given):
            return tokens
