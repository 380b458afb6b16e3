"""
A GPT that may think: the network.

An ordinary pre-norm decoder with rotary positions. Added are thoughts of d bits, a gate (one number a column: think next, or speak?), an observer
(one more attention head in the last block, which watches the layers below), and what the control tokens need: DONE, RECALL, REVISE.

Not here: who decides what to do with these numbers, column by column (stream.py), the loss (loss.py), any task, any path, any logging.

Glossary
  B   rows in a batch
  T   real tokens in a row: tokens of the data
  C   columns of a stream: the real tokens of a row with the thoughts emitted between them
  V   words: the vocabulary of real tokens, ids 0 .. V-1
  d   bits of a thought, K = 2^d thoughts, ids V .. V+K-1; never shown, never supervised
  nh  attention heads, hs head size, nh * hs = n_embd
  speak / think   the two things a column can do: predict the next real token, or emit a thought
  DONE    inside a run of thoughts: speak now, a decision of its own beside the gate's
  RECALL  a column of its own, id V+K, which sees everything where others see a window, and speaks; it leaves no trace, the next stands in its place
  REVISE  one more choice beside the V words: take the last word back

References
  GPT-2 (Radford et al. 2019) and nanoGPT for the network; RoPE (Su et al. 2021, arXiv:2104.09864) for positions; bits: Bengio et al. 2013,
  arXiv:1308.3432, and finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------------------
# the network


@dataclass
class GPTConfig:
    vocab_size: int = 0  # V, real tokens
    n_bits: int = 8  # d, bits of a thought; 0 is a plain GPT
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    rope_base: float = 100.0  # the longest wavelength of the rotary positions, in columns, over 2 pi
    n_positions: int = 0  # 0: rotary positions; above: GPT-2's way, learned positions for so many columns, and its tanh GELU
    gate_init: float = 0.9  # probability of thinking of an untrained gate
    observer: str = ""  # layers whose outputs the observer head watches, e.g. "1,2,3" (0 is the embedding); "quarters" of the depth; "" is no observer
    observer_shapes: bool = False  # gradients that reach the observer go on into the layers it watches
    done: bool = False  # a run of thoughts ends with DONE, a decision of its own; else by the gate
    recall: bool = False  # RECALL
    revise: bool = False  # REVISE

    @property
    def n_think(self) -> int:
        """K, how many different thoughts there are."""
        return 2**self.n_bits if self.n_bits else 0

    def watched(self) -> list[int]:
        """Layers under the observer's eyes. Raises ValueError."""
        quarters = [min(round(self.n_layer * quarter / 4), self.n_layer - 1) for quarter in (1, 2, 3)]
        try:
            layers = quarters if self.observer == "quarters" else [int(layer) for layer in filter(None, self.observer.split(","))]
        except ValueError:
            raise ValueError(f"observer = {self.observer!r} is neither quarters nor layers such as 1,2,3") from None
        if any(not 0 <= layer < self.n_layer for layer in layers):
            raise ValueError(f"observer = {self.observer!r}: the layers below the last block are 0 to {self.n_layer - 1}")
        return sorted(set(layers))


READINGS = ("coming", "worth", "ahead")  # what the observer reads off, in nats: see Observer


class Output(NamedTuple):
    """What every column says, whatever went in."""

    words: Tensor  # (B, C, V) logits of the next real token, if the column speaks; (B, C, V + 1) with REVISE
    thoughts: Tensor  # (B, C, d) numbers of the thought's bits, if it thinks: positive for a bit that is set, see Thoughts
    gate: Tensor  # (B, C) logit of thinking; -inf in a plain GPT
    go_on: Tensor  # (B, C) the same inside a run of thoughts: against DONE, or the gate once more
    recall: Tensor  # (B, C) logit of RECALL; -inf in a model without
    readings: Tensor  # (B, C, 3) of the observer; (B, C, 0) without one

    def thinking(self, run: Tensor | int) -> Tensor:
        """-> (B, C) logit of a thought, where `run` thoughts were thought since the last real token."""
        return torch.where(torch.as_tensor(run > 0), self.go_on, self.gate)


class KVCache:
    """
    Keys and values of the columns seen so far, preallocated for B rows. A column attends to itself and, with a window, to the w - 1 before it.

    Taking a row back to an earlier state is to set its length: what lies behind is written over. So rows have lengths of their own where there is REVISE or
    RECALL, and one length where there is neither. With a window the buffer is a ring, and memory per row is constant, with `back` columns to spare for being taken back;
    but RECALL keeps all. The ring's order is of no matter to attention: positions are rotated into the keys before they are stored.
    With `whole` every column attends to the whole buffer, masked, and lengths are numbers on the device: what it computes has the same shapes at every column.
    """

    def __init__(self, config: GPTConfig, batch: int, columns: int, window: int = 0, back: int = 0, device=None, dtype=None, whole: bool = False):
        self.window = window
        self.size = min(window + back, columns) if window and not config.recall else columns
        heads = config.n_head + bool(config.observer)  # the observer's is used in the last layer only
        shape = (config.n_layer, batch, heads, self.size, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, heads, size, hs)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)
        own = config.revise or config.recall
        self.length = torch.zeros_like(self.rows) if own or whole else 0  # columns stored so far: (B,), or the same for all rows
        self.whole = whole or own and self.rows.device.type != "cpu"  # to look how long the longest is would wait for the device

    def seen(self, new: int) -> int:
        """Columns of the buffer in use with `new` more."""
        return self.size if self.whole else min(int(self.length.max() if torch.is_tensor(self.length) else self.length) + new, self.size)

    def view(self, opens: Tensor | None = None) -> Tensor | None:
        """What the next column sees of the buffer -> (B, 1, 1, seen) bool, or None for all of it. opens (B,): rows in which it sees everything."""
        if not torch.is_tensor(self.length):
            return None
        length = self.length[:, None]
        age = (length - torch.arange(self.seen(1), device=self.rows.device)) % self.size  # (B, seen): columns ago
        near = age < (self.window or self.size)
        return ((age <= length) & (near if opens is None else near | opens[:, None]))[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, nh, C, hs) of new columns, of the first B rows; return those of all columns in use."""
        (B, nh, C, _), start, seen = k.shape, self.length % self.size, self.seen(k.size(2))
        if C > 1 and (self.window or torch.is_tensor(start)):
            raise ValueError("a cache with a window, or with rows of their own lengths, takes one column at a time")
        if not torch.is_tensor(start):
            if self.length + C > self.size and not self.window:
                raise ValueError(f"the cache holds {self.size} columns, {self.length + C} were asked for")
            self.keys[layer, :B, :nh, start : start + C], self.values[layer, :B, :nh, start : start + C] = k, v
        else:
            self.keys[layer, self.rows, :nh, start], self.values[layer, self.rows, :nh, start] = k[:, :, 0].to(self.keys), v[:, :, 0].to(self.values)
        return self.keys[layer, :B, :nh, :seen], self.values[layer, :B, :nh, :seen]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the two halves of each head by position times frequency. x (..., C, hs); cos, sin (B or 1, 1, C, hs / 2) of that angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Thoughts(nn.Module):
    """
    A thought is d bits, each -1 or 1; its number, 0 .. 2^d - 1, is the binary number in which bit i counts 2^i. Its embedding is linear in the bits.

    The trunk is mapped to d numbers h, one a bit. A bit is the sign of tanh(h_i) + NOISE * e, e standard normal, the bits independent of each other: a
    policy, with p(bit i is set) = Phi(tanh(h_i) / NOISE), Phi the normal distribution function, whose log-probability is a sum over bits.
    Backward, a bit is tanh(h_i): straight through (Bengio et al. 2013).
    No thought is ever without a gradient, as unused ones are under a softmax: all of them share the same d rows of weights.
    """

    NOISE = 0.3  # a number far from 0 is as good as sure of its bit, p = 0.0004 for the other; one near 0 tries both

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
        """Thoughts' numbers (...) -> embeddings (..., n_embd)."""
        return self.embedding(self.bits(number))

    def noise(self, *shape: int, generator=None) -> Tensor:
        """The chance in so many thoughts -> (*shape, d), standard normal: what `choose` needs to draw."""
        like = self.embedding.weight
        return torch.randn(*shape, len(self.counts), generator=generator, device=like.device, dtype=like.dtype)

    def choose(self, h: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Numbers h (..., d) and noise like them -> thoughts drawn (...); without noise the likeliest. A number of exactly 0 is a bit that is not set."""
        return ((h.tanh() + self.NOISE * noise > 0) * self.counts).sum(dim=-1)

    def log_probability(self, h: Tensor, number: Tensor) -> Tensor:
        """log p of the thoughts `number` (...), in nats, where they are drawn from h (..., d) -> (...)."""
        return torch.special.log_ndtr(h.tanh() * self.bits(number) / self.NOISE).sum(dim=-1)

    def echo(self, h: Tensor) -> Tensor:
        """Numbers h (..., d) -> (..., n_embd), all zeros, through which a gradient goes on to h as if the bits were tanh(h)."""
        soft = h.tanh()
        return F.linear(soft - soft.detach(), self.embedding.weight)


class Observer(nn.Module):
    """
    One attention head that watches how the thinking goes: it asks with the last block's input, and what it sees, its keys and values, are made of the
    outputs of the layers below, side by side. What it attends to goes on with the other heads, to the words. What it sensed, that and the column's own value
    on top, goes to the gate, and three numbers are read off it:
      coming   the loss of the next real token, if the column speaks now: what the words expect to lose, their entropy, and what the head adds to it
      worth    how much one more thought here lowers the loss of what comes later, before its price
      ahead    the loss of all that comes later, thoughts' prices included
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layers, self.shapes = config.watched(), config.observer_shapes
        hs, width = config.n_embd // config.n_head, config.n_embd * len(self.layers)
        self.q = nn.Linear(config.n_embd, hs)
        self.kv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * hs), nn.GELU(), nn.Linear(2 * hs, 2 * hs))
        self.read = nn.Linear(hs, len(READINGS))

    def forward(self, x: Tensor, below: list[Tensor]) -> Tensor:
        """x (B, C, n_embd), below: outputs of the embedding and each layer, (B, C, n_embd) -> q, k, v as (B, C, 3, 1, hs)."""
        seen = torch.cat([below[layer] for layer in self.layers], dim=-1)  # (B, C, layers * n_embd)
        if not self.shapes:
            x, seen = x.detach(), seen.detach()
        return torch.cat([self.q(x), self.kv(seen)], dim=-1).view(*x.shape[:2], 3, 1, -1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, observer: bool = False):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.observer = Observer(config) if observer else None
        self.proj = nn.Linear(config.n_embd + observer * config.n_embd // config.n_head, config.n_embd)

    def heads(self, x, below, cos, sin):
        """-> q, k, v, each (B, nh, C, hs), rotated; nh is one more with the observer."""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.n_head, -1)
        if self.observer is not None:
            qkv = torch.cat([qkv, self.observer(x, below)], dim=3)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, C, 3, nh, hs) -> (3, B, nh, C, hs)
        return *rotate(qkv[:2], cos, sin), qkv[2]

    def forward(self, x, below, cos, sin, mask=None, cache=None, layer=0):
        """-> (B, C, n_embd), and what the observer sensed, (B, C, hs), or None."""
        q, k, v = self.heads(x, below, cos, sin)
        own = v[:, -1]  # (B, C, hs) the observer's value of the column itself
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, nh, S, hs), S columns in view
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None and x.size(1) > 1)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, C, hs) -> (B, C, nh * hs)
        return self.proj(y), y[..., x.size(-1) :] + own if self.observer is not None else None


class Block(nn.Module):
    def __init__(self, config: GPTConfig, observer: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention = Attention(config, observer)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = nn.GELU("tanh" if config.n_positions else "none")
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, *attend):
        y, sensed = self.attention(self.norm1(x), *attend)
        x = x + self.drop(y)
        return x + self.drop(self.down(self.gelu(self.up(self.norm2(x))))), sensed


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.n_embd
        if not 0 <= config.n_bits <= 24:
            raise ValueError(f"n_bits = {config.n_bits}: a thought has 1 to 24 bits, and a plain GPT 0")
        if D % config.n_head or D // config.n_head % 2:
            raise ValueError(f"n_embd = {D} must split into n_head = {config.n_head} heads of even size")
        if config.done and not config.n_bits:
            raise ValueError("done = true ends runs of thoughts, and there are none: n_bits = 0")
        self.embedding = nn.Embedding(V + config.recall, D)  # RECALL is the last
        self.thoughts = Thoughts(config.n_bits, D) if config.n_bits else None
        self.position = nn.Embedding(config.n_positions, D) if config.n_positions else None
        watched = [bool(config.watched()) and layer == config.n_layer - 1 for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, observer) for observer in watched)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V)
        controls = bool(config.n_bits) + config.done + config.recall  # of this many things it asks each column: think, done, recall
        self.gate = nn.Linear(D + bool(config.observer) * D // config.n_head, controls) if controls else None
        self.regret = nn.Linear(D, 1) if config.revise else None
        self.drop = nn.Dropout(config.dropout)
        frequency = config.rope_base ** -torch.linspace(0, 1, D // config.n_head // 2 + 1)[:-1]
        frequency = frequency * (not config.n_positions)
        self.register_buffer("frequency", frequency, persistent=False)  # (hs / 2,) radians per column
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        if module is self.thoughts:  # like all embeddings; larger, what they happen to say at first is learned by heart
            nn.init.normal_(module.embedding.weight, std=0.02)
        if module is self.gate:  # undecided by content, but held open: thoughts must be tried before they can pay
            nn.init.zeros_(module.weight)
            if self.config.n_bits:
                nn.init.constant_(module.bias[:1], math.log(self.config.gate_init / (1 - self.config.gate_init)))

    def embed(self, ids: Tensor) -> Tensor:
        """Real tokens, thoughts and RECALL, ids (B, C) -> (B, C, n_embd)."""
        V, K = self.config.vocab_size, self.config.n_think
        number = ids - V
        thinks = (number >= 0) & (number < K)
        x = self.embedding(torch.where(number < 0, ids, (ids - K) * ~thinks))
        return x if self.thoughts is None else torch.where(thinks[..., None], self.thoughts(number * thinks), x)

    def trunk(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, position: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The blocks, arguments as in `forward` -> (B, C, n_embd), and what the observer sensed, (B, C, hs), or None."""
        if not x.is_floating_point():
            x = self.embed(x)  # (B, C) -> (B, C, n_embd)
        start = cache.length if cache is not None else 0
        if not torch.is_tensor(start) and start and x.size(1) > 1 and mask is None:
            raise ValueError("a cache that holds columns takes one column at a time, or several under a mask")
        if position is None:
            position = torch.as_tensor(start, device=x.device).view(-1, 1) + torch.arange(x.size(1), device=x.device)  # (B or 1, C)
        if self.position is not None:
            if int(position.max()) >= self.config.n_positions:
                raise ValueError(f"learned positions end after {self.config.n_positions} columns")
            x = x + self.position(position)
        angle = position[:, None, :, None] * self.frequency  # (B or 1, 1, C, hs / 2)
        cos, sin, x = angle.cos(), angle.sin(), self.drop(x)
        below = [x]  # outputs of the embedding and of each layer, (B, C, n_embd)
        for layer, block in enumerate(self.blocks):
            x, sensed = block(x, below, cos, sin, mask, cache, layer)
            below.append(x)
        if cache is not None:
            cache.length = cache.length + x.size(1)
        return self.norm(x), sensed

    def control(self, x: Tensor, sensed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        -> (B, C, d) thoughts; (B, C) logits: gate, go_on, recall; as in Output. The logits read the trunk but do not shape it: their policy gradient's noise wears off what thoughts mean.
        """
        never, config = torch.full_like(x[..., 0], -torch.inf), self.config
        thoughts = x[..., :0] if self.thoughts is None else self.thoughts.head(x)
        if self.gate is None:
            return thoughts, never, never, never
        seen = x if sensed is None else torch.cat([x, sensed], dim=-1)
        logits = self.gate(seen.detach())  # (B, C, 1 to 3)
        gate = logits[..., 0] if config.n_bits else never
        go_on = -logits[..., 1] if config.done else gate
        return thoughts, gate, go_on, logits[..., -1] if config.recall else never

    def think(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, position: Tensor | None = None) -> Output:
        """`forward` for who needs no words and no readings."""
        x, sensed = self.trunk(x, mask, cache, position)
        return Output(x[..., :0], *self.control(x, sensed), x[..., :0])

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, position: Tensor | None = None) -> Output:
        """
        x: token ids (B, C), or embeddings (B, C, n_embd), as the echo needs them.
        mask: (C, C) or (B, 1, C, C), True where a query (row) sees a key (column); None is causal.
        cache: the columns before these; x goes behind them. A cache takes one column at a time, all at the start, or several under a mask.
        position: (B, C) of each column, where that is not its index.
        """
        x, sensed = self.trunk(x, mask, cache, position)
        words = self.head(x)
        if self.regret is not None:
            words = torch.cat([words, self.regret(x)], dim=-1)  # (B, C, V + 1)
        readings = words[..., :0]
        if sensed is not None:
            log_p = words.detach().log_softmax(dim=-1)
            entropy = -(log_p.exp() * log_p).sum(dim=-1, keepdim=True)  # (B, C, 1)
            readings = self.blocks[-1].attention.observer.read(sensed) + F.pad(entropy, (0, len(READINGS) - 1))  # to `coming`
        return Output(words, *self.control(x, sensed), readings)

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """
        Begin with the weights of a model of the same words, without thoughts, an observer or control tokens that this one has: whatever it can say it
        says as before; what it lacks stays as it is. Raises ValueError where the shapes are of another model.
        """
        own, V = self.state_dict(), self.config.vocab_size
        if len(weights["embedding.weight"]) == V < len(own["embedding.weight"]):  # RECALL comes last
            weights = weights | {"embedding.weight": torch.cat([weights["embedding.weight"].to(own["embedding.weight"]), own["embedding.weight"][V:]])}
        for name in (f"blocks.{self.config.n_layer - 1}.attention.proj.weight", "gate.weight"):  # an observer widens them: nobody listens to it yet
            if name in weights and name in own and own[name].size(1) > weights[name].size(1):
                weights = weights | {name: F.pad(weights[name], (0, own[name].size(1) - weights[name].size(1)))}
        for name in ("gate.weight", "gate.bias"):  # thinking comes first
            if name in weights and name in own and len(weights[name]) == 1 < len(own[name]) and self.config.n_bits:
                weights = weights | {name: torch.cat([weights[name], own[name][1:]])}
        added = ("gate.", "regret.", "thoughts.")
        missing = [name for name in own if name not in weights and not name.startswith(added) and ".observer." not in name]
        wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
        if missing or wrong:
            raise ValueError(f"weights of another shape: {', '.join((missing + wrong)[:3])}")
        self.load_state_dict(weights, strict=False)

    def optimiser(self, lr: float, gate_lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
        """AdamW; matrices decay, embeddings, biases and norms do not; the gate and the observer have a learning rate of their own."""
        gate = {p for name, p in self.named_parameters() if name.startswith("gate.") or ".observer." in name}
        matrices = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - gate
        groups = [
            {"params": [p for p in self.parameters() if p in matrices], "peak_lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p not in matrices | gate], "peak_lr": lr, "weight_decay": 0.0},
            {"params": [p for p in self.parameters() if p in gate], "peak_lr": gate_lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of Hugging Face's GPT2LMHeadModel -> ours, for `adopt`. Their Conv1D keeps its matrices transposed; their head is tied."""
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    word = weights["transformer.wte.weight"]
    ours = {"embedding.weight": word, "head.weight": word, "head.bias": torch.zeros(len(word)), "position.weight": weights["transformer.wpe.weight"]}
    for name, value in weights.items():
        if name.startswith("transformer.ln_f."):
            ours[name.replace("transformer.ln_f", "norm")] = value
        if name.startswith("transformer.h."):
            layer, _, rest = name.removeprefix("transformer.h.").partition(".")
            module, _, kind = rest.rpartition(".")
            if module in names:
                ours[f"blocks.{layer}.{names[module]}.{kind}"] = value.T if value.ndim == 2 else value
    return ours
