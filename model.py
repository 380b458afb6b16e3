"""
A GPT that may think: the network, its cache, and `generate`, the loop in which it thinks, recalls,
revises and speaks.

An ordinary pre-norm decoder with rotary positions. Added are thoughts of d bits; a gate, one number
a cell: think next, or emit a token; an observer, one more attention head in the last block, which
watches the layers below; and what RECALL and REVISE need.

Not here: how any of it is trained (train.py), any task, any path, any logging.

Glossary
  B     sequences in a batch
  T     real tokens in a sequence: tokens of the data
  C     cells of a stream: the real tokens of a sequence and the thoughts emitted between them
  V     vocabulary of real tokens, ids 0 .. V-1
  d     bits of a thought; K = 2^d thoughts, ids V .. V+K-1; never shown, never supervised
  D     n_embd; nh attention heads of size hs
  think / emit   what a cell can do: be followed by a thought, or predict the next real token
  RECALL  id V+K: a cell that sees everything where others see a window; nobody sees it
  REVISE  one more class beside the V tokens: take the last token back

References
  GPT-2 (Radford et al. 2019) and nanoGPT for the network; RoPE (Su et al. 2021, arXiv:2104.09864)
  for positions; bits: Bengio et al. 2013, arXiv:1308.3432, and finite scalar quantisation
  (Mentzer et al. 2023, arXiv:2309.15505)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------------------
# configuration and visibility

ROPE_BASE = 100.0  # the longest wavelength of the rotary positions, in cells, over 2 pi
GATE_INIT = 0.95  # probability of thinking of an untrained gate: thoughts must be tried to pay
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
    observer: str = ""  # layers watched, e.g. "0,1" (0: the embedding), or "quarters"; "": none
    recall: bool = False
    revise: bool = False

    @property
    def n_think(self) -> int:
        """K, how many different thoughts there are."""
        return 2**self.n_bits if self.n_bits else 0

    def watched(self) -> list[int]:
        """Layers that the observer watches. Raises ValueError."""
        L = self.n_layer
        layers = [min(round(L * quarter / 4), L - 1) for quarter in (1, 2, 3)]
        if self.observer != "quarters":
            try:
                layers = [int(layer) for layer in self.observer.split(",") if layer]
            except ValueError:
                message = "is neither quarters nor layers such as 1,2,3"
                raise ValueError(f"observer = {self.observer!r} {message}") from None
        if any(not 0 <= layer < L for layer in layers):
            message = f"the layers below the last block are 0 to {L - 1}"
            raise ValueError(f"observer = {self.observer!r}: {message}")
        return sorted(set(layers))


class Cells(NamedTuple):
    """Where cells stand and what may see them, (B, C) each; None: nothing special about any."""

    position: Tensor  # index in the stream
    segment: Tensor | None = None  # a cell sees its own segment only: a cut begins a new one
    seen: Tensor | None = None  # bool: later cells may see it; absent ones and RECALL are not seen
    sees_all: Tensor | None = None  # bool: RECALL, from which neither window nor cut hides anything

    def part(self, columns: slice) -> "Cells":
        return Cells(*(x if x is None else x[:, columns] for x in self))

    def then(self, new: "Cells") -> "Cells":
        both = zip(self, new)
        return Cells(*(None if b is None else torch.cat([a, b], dim=1) for a, b in both))


def visible(query: Cells, key: Cells, window: int = 0) -> Tensor | None:
    """
    -> (B, Q, K) bool, True where a query sees a key; the queries are the last Q of the keys. A cell
    sees itself, and what comes before it in its segment, less than `window` positions back (0: all
    of it), and is there to be seen. None where that is all that comes before.
    """
    Q, K = query.position.size(1), key.position.size(1)
    if Q == K and not window and key.segment is None and key.seen is None:
        return None
    before = torch.ones(Q, K, dtype=torch.bool, device=key.position.device).tril(K - Q)
    near = before[None]
    if window:
        near = near & (query.position[:, :, None] - key.position[:, None, :] < window)
    if key.segment is not None:
        near = near & (query.segment[:, :, None] == key.segment[:, None, :])
    if key.sees_all is not None:
        near = near | query.sees_all[:, :, None] & before
    if key.seen is not None:
        near = near & key.seen[:, None, :]
    return near | before & ~before.tril(K - Q - 1)


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
    cache: Cache


# ----------------------------------------------------------------------------------------------
# the network


class Thoughts(nn.Module):
    """
    A thought is d bits, each -1 or 1; its number, 0 .. 2^d - 1, is the binary number in which bit i
    counts 2^i. Its embedding is linear in the bits.

    The trunk is mapped to d numbers h, one a bit. A bit is the sign of tanh(h_i) + NOISE * e, e
    standard normal, the bits independent of each other: a policy, with p(bit i is set) =
    Phi(tanh(h_i) / NOISE), Phi the normal distribution function. Backward, a bit is tanh(h_i):
    straight through (Bengio et al. 2013). No thought is ever without a gradient, as unused ones
    are under a softmax: all of them share the same d rows of weights.
    """

    NOISE = 0.3  # a number far from 0 is as good as sure of its bit; one near 0 tries both

    def __init__(self, n_bits: int, n_embd: int):
        super().__init__()
        self.head = nn.Linear(n_embd, n_bits)
        self.embedding = nn.Linear(n_bits, n_embd)
        self.register_buffer("counts", 2 ** torch.arange(n_bits), persistent=False)

    def bits(self, number: Tensor) -> Tensor:
        """Thoughts' numbers (...) -> their bits (..., d), each -1.0 or 1.0."""
        is_set = (number[..., None] & self.counts) > 0
        return torch.where(is_set, 1.0, -1.0).to(self.embedding.weight.dtype)

    def forward(self, number: Tensor) -> Tensor:
        """Thoughts' numbers (...) -> embeddings (..., D)."""
        return self.embedding(self.bits(number))

    def likeliest(self, h: Tensor) -> Tensor:
        """h (..., d) -> thoughts' numbers (...). A number of exactly 0 is a bit that is not set."""
        return ((h > 0) * self.counts).sum(dim=-1)

    def draw(self, h: Tensor, generator=None) -> Tensor:
        """h (..., d) -> thoughts' numbers (...), drawn by the policy."""
        noise = torch.empty_like(h).normal_(generator=generator)
        return self.likeliest(h.tanh() + self.NOISE * noise)

    def log_probability(self, h: Tensor, number: Tensor) -> Tensor:
        """log p of the thoughts `number` (...), in nats, drawn from h (..., d) -> (...)."""
        return torch.special.log_ndtr(h.tanh() * self.bits(number) / self.NOISE).sum(dim=-1)

    def echo(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., D), all zeros; backward, h gets what the bits' embedding would."""
        soft = h.tanh()
        return F.linear(soft - soft.detach(), self.embedding.weight)


class Observer(nn.Module):
    """
    One attention head that watches how the thinking goes: it asks with the last block's input, and
    what it sees, its keys and values, are made of the outputs of the layers below, side by side.
    What it attends to goes on with the other heads, to the logits. What it sensed, that and the
    cell's own value on top, goes to the gate, and three numbers are read off it, in nats:
      predicted_loss     of the next real token, if the cell emits now: the entropy of its logits,
                         and what the head adds to it
      value_of_thinking  by how much one more thought lowers later losses, before its price
      cost_to_go         the loss of all that comes later, thoughts' prices included
    It learns to watch: no gradient goes from it into the layers that it watches.
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
        """x (B, C, D); below: outputs of embedding and layers, (B, C, D) -> (B, C, 3, 1, hs)."""
        watched = torch.cat([below[layer] for layer in self.layers], dim=-1).detach()
        qkv = torch.cat([self.q(x.detach()), self.kv(watched)], dim=-1)  # (B, C, 3 * hs)
        return qkv.view(*x.shape[:2], 3, 1, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the two halves of each head. x (..., C, hs); cos, sin (B, 1, C, hs / 2)."""
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
        """-> (B, C, D); what the observer sensed, (B, C, hs), or None; keys and values so far."""
        q, k, v = self.heads(x, below, turn)
        own = v[:, -1]  # (B, C, hs) the observer's value of the cell itself
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, C, hs) -> (B, C, nh * hs)
        sensed = None if self.observer is None else y[..., x.size(-1) :] + own
        return self.proj(y), sensed, (k, v)


class Gate(nn.Module):
    """
    A yes or no of every cell: a logit, which says yes with probability p before training. It reads
    the trunk but does not shape it: its policy gradient's noise would wear off what thoughts mean.
    """

    def __init__(self, width: int, p: float):
        super().__init__()
        self.out, self.p = nn.Linear(width, 1), p

    def reset(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, math.log(self.p / (1 - self.p)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, width) -> (B, C)"""
        return self.out(x.detach())[..., 0]


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
        last = config.n_layer - 1
        self.blocks = nn.ModuleList(
            Block(config, observed and layer == last) for layer in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V + config.revise)  # REVISE is the last
        self.gate = Gate(D + observed * hs, GATE_INIT) if config.n_bits else None
        self.recall_gate = Gate(D + observed * hs, 0.5) if config.recall else None
        self.drop = nn.Dropout(config.dropout)
        frequency = ROPE_BASE ** -torch.linspace(0, 1, hs // 2 + 1)[:-1]
        frequency = frequency * (not config.n_positions)
        self.register_buffer("frequency", frequency, persistent=False)  # (hs / 2,) radians a cell
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        if module is self.thoughts:  # small like all embeddings: larger, chance is learned by heart
            nn.init.normal_(module.embedding.weight, std=0.02)
        if isinstance(module, Gate):
            module.reset()

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (...) of real tokens, thoughts and RECALL -> (..., D)."""
        V, K = self.config.vocab_size, self.config.n_think
        number = ids - V
        is_thought = (number >= 0) & (number < K)
        token = torch.where(number < 0, ids, ids - K)  # RECALL comes right behind the tokens
        x = self.embedding(token * ~is_thought)
        if self.thoughts is None:
            return x
        return torch.where(is_thought[..., None], self.thoughts(number * is_thought), x)

    def forward(
        self, x: Tensor, cells: Cells | None = None, cache: Cache | None = None, window: int = 0
    ) -> Output:
        """
        x: ids (B, C), or embeddings (B, C, D). cells: where they stand; None: one behind the other,
        behind those in the cache. window: positions in view, 0 for all. Raises ValueError.
        """
        if not x.is_floating_point():
            x = self.embed(x)  # (B, C) -> (B, C, D)
        B, C, _ = x.shape
        if cells is None:
            start = cache.cells.position[:, -1:] + 1 if cache else 0
            cells = Cells(start + torch.arange(C, device=x.device).expand(B, C))
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
        heard = x if sensed is None else torch.cat([x, sensed], dim=-1)
        readings = x[..., :0]
        if sensed is not None:
            log_p = logits.detach().log_softmax(dim=-1)
            entropy = -(log_p.exp() * log_p).sum(dim=-1, keepdim=True)  # (B, C, 1)
            readings = self.blocks[-1].attention.observer.read(sensed)  # (B, C, 3)
            readings = readings + F.pad(entropy, (0, len(READINGS) - 1))
        return Output(
            logits,
            x[..., :0] if self.thoughts is None else self.thoughts.head(x),
            never if self.gate is None else self.gate(heard),
            never if self.recall_gate is None else self.recall_gate(heard),
            readings,
            cache,
        )

    def optimiser(self, lr: float, gate_lr: float, decay: float) -> torch.optim.AdamW:
        """AdamW; matrices decay; the gates and the observer have a learning rate of their own."""
        late = ("gate.", "recall_gate.")
        gates = {p for n, p in self.named_parameters() if n.startswith(late) or ".observer." in n}
        matrices = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - gates
        rest = [p for p in self.parameters() if p not in matrices and p not in gates]
        matrices = [p for p in self.parameters() if p in matrices]
        gates = [p for p in self.parameters() if p in gates]
        groups = [
            {"params": matrices, "peak_lr": lr, "weight_decay": decay},
            {"params": rest, "peak_lr": lr, "weight_decay": 0.0},
            {"params": gates, "peak_lr": gate_lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))

    # ------------------------------------------------------------------------------------------
    # weights from elsewhere

    def warm_start(self, weights: dict[str, Tensor]) -> None:
        """
        Begin with the weights of a smaller model: one without thoughts, observer or control tokens
        that this one has. Overlapping slices are copied; rows beyond them keep their initial value,
        columns beyond them become zero, so that what is new has no effect yet: it emits what it
        did. Raises ValueError if the weights do not fit.
        """
        own = self.state_dict()
        new = ("gate.", "recall_gate.", "thoughts.")
        missing = [n for n in own if n not in weights and not n.startswith(new)]
        missing = [n for n in missing if ".observer." not in n]
        wrong = [n for n, w in weights.items() if n not in own or not fits(w, own[n], self.config)]
        if missing or wrong:
            names = ", ".join((missing + wrong)[:3])
            raise ValueError(f"weights of another shape: {names}")
        with torch.no_grad():
            for name, w in weights.items():
                if w.ndim == 2:
                    own[name][: len(w)] = 0
                own[name][tuple(slice(size) for size in w.shape)] = w

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> "GPT":
        """
        GPT-2 weights of Hugging Face, e.g. "gpt2", in a model with `changes` to its GPTConfig.
        Raises ImportError without transformers, OSError or ValueError if there are none to be had.
        """
        from transformers import GPT2LMHeadModel

        theirs = GPT2LMHeadModel.from_pretrained(name)
        c = theirs.config
        sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
        sizes |= {"vocab_size": c.vocab_size, "n_positions": c.n_positions}
        model = cls(GPTConfig(**(changes | sizes)))
        model.warm_start(from_gpt2(theirs.state_dict()))
        return model


def fits(weight: Tensor, own: Tensor, config: GPTConfig) -> bool:
    """Whether `own` is the weight or, by an observer, RECALL or REVISE, a little more than it."""
    more = [a - b for a, b in zip(own.shape, weight.shape)]
    beside = max(config.n_embd // config.n_head, 1)  # an observer adds columns, the others a row
    return own.ndim == weight.ndim and more[0] in (0, 1) and all(m in (0, beside) for m in more[1:])


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of Hugging Face's GPT2LMHeadModel -> ours. Its Conv1D keeps its matrices
    transposed; its head is tied to its embedding."""
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.proj",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    }
    word = weights["transformer.wte.weight"]
    ours = {"embedding.weight": word, "head.weight": word, "head.bias": torch.zeros(len(word))}
    ours["position.weight"] = weights["transformer.wpe.weight"]
    for name, value in weights.items():
        if name.startswith("transformer.ln_f."):
            ours[name.replace("transformer.ln_f", "norm")] = value
        if name.startswith("transformer.h."):
            layer, _, rest = name.removeprefix("transformer.h.").partition(".")
            module, _, kind = rest.rpartition(".")
            if module in names:
                value = value.T if value.ndim == 2 else value
                ours[f"blocks.{layer}.{names[module]}.{kind}"] = value
    return ours


# ----------------------------------------------------------------------------------------------
# how it thinks, and the loop in which it does

MODES = ("policy", "never", "random", "constant", "swapped")


@dataclass
class Thinking:
    """How thoughts are made. All modes but `policy` take them, or what they say, away."""

    mode: str = "policy"  # one of MODES; swapped: what the sequence before it thinks
    max_run: int = 1  # thoughts in a row, at most
    force: float | None = None  # probability of runs of max_run thoughts; None: the gate is asked
    force_recall: float | None = None  # probability of RECALL; None: its gate is asked
    price: float | None = None  # nats; think where the observer expects more than that of it
    explore: float = 0.0  # least probability with which a gate does the one thing, and the other
    greedy: bool = False  # do the likelier thing, think the likeliest thought
    after: Tensor | None = None  # (V,) bool: real tokens that a thought may follow; None: all
    constant: int = 0  # the thought of mode `constant`
    window: int = 0  # positions in view, 0 for all

    def runs(self, config: GPTConfig) -> int:
        """Thoughts in a row, at most, of such a model."""
        return self.max_run if config.n_bits and self.mode != "never" else 0


def decide(logit: Tensor, force: float | None, thinking: Thinking, generator=None) -> Tensor:
    """Yes or no with the probability `force` or, if None, as the logit says -> bool, its shape."""
    p = logit.sigmoid() if force is None else torch.full_like(logit, force)
    if force is None:
        least = thinking.explore
        p = p.round() if thinking.greedy else least + (1 - 2 * least) * p
    return torch.rand(p.shape, generator=generator, device=p.device) < p


def wants_to_think(out: Output, run: int, thinking: Thinking, generator=None) -> Tensor:
    """-> (B,) bool, by the last cell of the output, with `run` thoughts since the last token."""
    logit, force = out.gate[:, -1], thinking.force
    if thinking.price is not None:
        logit = 1e4 * (out.readings[:, -1, 1] - thinking.price)
        force = None
    return decide(logit, 1.0 if force is not None and run else force, thinking, generator)


def choose_thought(model: GPT, h: Tensor, thinking: Thinking, generator=None) -> Tensor:
    """Numbers of the bits (B, d) -> numbers of the thoughts (B,), by policy or by an ablation."""
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
    instead: Iterator[int] | None = None,
    watch: Callable | None = None,
) -> list[int]:
    """
    Continue a prompt by up to `new_tokens` real tokens, or to `stop` -> prompt and answer. At every
    cell one of four things happens, and only the last of them shows:
      REVISE  if likelier than all tokens together: back to where the last one was emitted, and
              another instead
      THINK   a thought is appended, at most max_run in a row
      RECALL  one cell looks at everything, and emits
      emit    the next token is appended
    The memory stack: for each token, what there was when it was emitted. Pushing costs a reference,
    since a cache is never changed. `instead`: thoughts to think in place of the model's own.
    `watch` is called with what happened, "token", "think", "recall" or "revise", and an id.
    At most `revisions` tokens are taken back. Raises ValueError for an empty prompt or answer.
    """
    if not prompt or new_tokens < 1:
        raise ValueError("a prompt and its answer hold at least one token each")
    config, device = model.config, model.embedding.weight.device
    V, RECALL = config.vocab_size, config.vocab_size + config.n_think
    max_run, after = thinking.runs(config), thinking.after
    watch = watch or (lambda what, token: None)
    tokens, memory_stack, cache, run = [prompt[0]], [], None, 0
    watch("token", prompt[0])
    cell = prompt[0]  # the id that goes through the network next
    while True:
        out = model(torch.tensor([[cell]], device=device), None, cache, thinking.window)
        cache = out.cache if config.recall else out.cache.last(thinking.window)
        logits = out.logits[0, -1]

        may_revise = config.revise and revisions and len(tokens) > len(prompt) and run == 0
        if may_revise:  # a token must be left to emit
            may_revise = memory_stack[-1][2].isfinite().sum() > 1
        if may_revise and logits[V] > logits[:V].logsumexp(dim=0):
            taken_back = tokens[-1]
            tokens, cache, logits = memory_stack.pop()
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
            if config.recall and decide(out.recall, thinking.force_recall, thinking, generator):
                looked = model(torch.tensor([[RECALL]], device=device), None, cache)
                logits = looked.logits[0, -1]
                watch("recall", RECALL)
            logits = logits[:V].clone()

        memory_stack.append((tokens.copy(), cache, logits))
        given = len(tokens) < len(prompt)
        chosen = choose_token(logits, temperature, top_k, generator)
        cell, run = prompt[len(tokens)] if given else chosen, 0
        tokens.append(cell)
        watch("token", cell)
        if len(tokens) == len(prompt) + new_tokens or cell == stop and not given:
            return tokens
