"""
A GPT that may think: silent extra tokens between the tokens it says, in one file.

The network is an ordinary pre-norm decoder with rotary positions. Added are
K thoughts in the vocabulary, a gate (one number a column: think next, or speak?), an observer (one more attention head
in the last block, which watches the layers below), and control tokens: DONE, RECALL, REVISE. Two loops walk a batch of rows from left to right:
`rollout`, for training, where every word is given (`parallel_rollout` finds the same in fewer steps), and `speak`, where the model has the word.

Not here: the loss (train.py), any task, any path, any logging. The output of `generate` holds no thought.

Glossary
  B   rows in a batch
  T   real tokens in a row: tokens of the data
  C   columns of a stream: the real tokens of a row with the thoughts emitted between them
  V   words: the vocabulary of real tokens, ids 0 .. V-1
  K   thoughts, ids V .. V+K-1; never shown, never supervised
  nh  attention heads, hs head size, nh * hs = n_embd
  speak / think   the two things a column can do: predict the next real token, or emit a thought
  DONE    one more choice beside the K thoughts, inside a run of them: speak now
  RECALL  a column of its own, id V+K, which sees everything where others see a window, and speaks; it leaves no trace, the next stands in its place
  REVISE  one more choice beside the V words: take the last word back

References
  GPT-2 (Radford et al. 2019) and nanoGPT for the network; RoPE (Su et al. 2021, arXiv:2104.09864) for positions
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
    n_think: int = 16  # K, thoughts; 0 is a plain GPT
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    rope_base: float = 100.0  # the longest wavelength of the rotary positions, in columns, over 2 pi
    n_positions: int = 0  # 0: rotary positions; above: GPT-2's way, learned positions for so many columns, and its tanh GELU
    gate_init: float = 0.9  # probability of thinking of an untrained gate
    observer: str = ""  # layers whose outputs the observer head watches, e.g. "1,2,3" (0 is the embedding); "quarters" of the depth; "" is no observer
    observer_shapes: bool = False  # gradients that reach the observer go on into the layers it watches
    done: bool = False  # a run of thoughts ends with DONE, chosen among the thoughts; else by the gate
    recall: bool = False  # RECALL
    revise: bool = False  # REVISE
    sharp: float = 1.0  # spread of untrained thought logits; well above 1, a thought tells states apart before it has learned anything

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
    thoughts: Tensor  # (B, C, K) logits of the thoughts, if it thinks
    gate: Tensor  # (B, C) logit of thinking; -inf in a plain GPT
    go_on: Tensor  # (B, C) the same inside a run of thoughts: of the K thoughts against DONE, or the gate once more
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
    """

    def __init__(self, config: GPTConfig, batch: int, columns: int, window: int = 0, back: int = 0, device=None, dtype=None):
        self.window = window
        self.size = min(window + back, columns) if window and not config.recall else columns
        heads = config.n_head + bool(config.observer)  # the observer's is used in the last layer only
        shape = (config.n_layer, batch, heads, self.size, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, heads, size, hs)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)
        self.length = torch.zeros_like(self.rows) if config.revise or config.recall else 0  # columns stored so far: (B,), or the same for all rows

    def seen(self, new: int) -> int:
        """Columns of the buffer in use with `new` more."""
        return min(int(self.length.max() if torch.is_tensor(self.length) else self.length) + new, self.size)

    def view(self, opens: Tensor | None = None) -> Tensor | None:
        """What the next column sees of the buffer -> (B, 1, 1, seen) bool, or None for all of it. opens (B,): rows in which it sees everything."""
        if not torch.is_tensor(self.length):
            return None
        length = self.length[:, None]
        age = (length - torch.arange(self.seen(1), device=self.rows.device)) % self.size  # (B, seen): columns ago
        near = age < (self.window or self.size)
        return ((age <= length) & (near if opens is None else near | opens[:, None]))[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, nh, C, hs) of new columns; return those of all columns in use."""
        (_, nh, C, _), start, seen = k.shape, self.length % self.size, self.seen(k.size(2))
        if C > 1 and (self.window or torch.is_tensor(start)):
            raise ValueError("a cache with a window, or with rows of their own lengths, takes one column at a time")
        if not torch.is_tensor(start):
            if self.length + C > self.size and not self.window:
                raise ValueError(f"the cache holds {self.size} columns, {self.length + C} were asked for")
            self.keys[layer, :, :nh, start : start + C], self.values[layer, :, :nh, start : start + C] = k, v
        else:
            self.keys[layer, self.rows, :nh, start], self.values[layer, self.rows, :nh, start] = k[:, :, 0], v[:, :, 0]
        return self.keys[layer, :, :nh, :seen], self.values[layer, :, :nh, :seen]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the two halves of each head by position times frequency. x (..., C, hs); cos, sin (B or 1, 1, C, hs / 2) of that angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Observer(nn.Module):
    """
    One attention head that watches how the thinking goes: it asks with the last block's input, and what it sees, its keys and values, are the
    outputs of the layers below, side by side. What it sensed goes on with the other heads, to the words and the gate; and three numbers are read off it:
      coming   the loss of the next real token, if the column speaks now
      worth    how much one more thought here lowers the loss of what comes later, before its price
      ahead    the loss of all that comes later, thoughts' prices included
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layers, self.shapes = config.watched(), config.observer_shapes
        hs, width = config.n_embd // config.n_head, config.n_embd * len(self.layers)
        self.norm = nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(config.n_embd, hs), nn.Linear(width, 2 * hs)
        self.read = nn.Linear(hs, len(READINGS))

    def forward(self, x: Tensor, below: list[Tensor]) -> Tensor:
        """x (B, C, n_embd), below: outputs of the embedding and each layer, (B, C, n_embd) -> q, k, v as (B, C, 3, 1, hs)."""
        seen = torch.cat([below[layer] for layer in self.layers], dim=-1)  # (B, C, layers * n_embd)
        if not self.shapes:
            x, seen = x.detach(), seen.detach()
        return torch.cat([self.q(x), self.kv(self.norm(seen))], dim=-1).view(*x.shape[:2], 3, 1, -1)


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
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, nh, S, hs), S columns in view
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None and x.size(1) > 1)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, C, hs) -> (B, C, nh * hs)
        return self.proj(y), y[..., x.size(-1) :] if self.observer is not None else None


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
        V, K, D = config.vocab_size, config.n_think, config.n_embd
        if D % config.n_head or D // config.n_head % 2:
            raise ValueError(f"n_embd = {D} must split into n_head = {config.n_head} heads of even size")
        if config.done and not K:
            raise ValueError("done = true ends runs of thoughts, and there are none: n_think = 0")
        self.embedding = nn.Embedding(V + K + config.recall, D)
        self.position = nn.Embedding(config.n_positions, D) if config.n_positions else None
        watched = [bool(config.watched()) and layer == config.n_layer - 1 for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, observer) for observer in watched)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V + K)
        controls = bool(K) + config.done + config.recall  # of this many things it asks each column: think, done, recall
        self.gate = nn.Linear(D + bool(config.observer) * D // config.n_head, controls) if controls else None
        self.regret = nn.Linear(D, 1) if config.revise else None
        self.drop = nn.Dropout(config.dropout)
        frequency = config.rope_base ** -torch.linspace(0, 1, D // config.n_head // 2 + 1)[:-1]
        frequency = frequency * (not config.n_positions)
        self.register_buffer("frequency", frequency, persistent=False)  # (hs / 2,) radians per column
        self.apply(self._init)
        with torch.no_grad():
            self.head.weight[V:] *= config.sharp

    def _init(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        if module is self.gate:  # undecided by content, but held open: thoughts must be tried before they can pay
            nn.init.zeros_(module.weight)
            if self.config.n_think:
                nn.init.constant_(module.bias[:1], math.log(self.config.gate_init / (1 - self.config.gate_init)))

    def trunk(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, position: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The blocks, arguments as in `forward` -> (B, C, n_embd), and what the observer sensed, (B, C, hs), or None."""
        if not x.is_floating_point():
            x = self.embedding(x)  # (B, C) -> (B, C, n_embd)
        start = cache.length if cache is not None else 0
        if not torch.is_tensor(start) and start and x.size(1) > 1:
            raise ValueError("a cache that holds columns takes one column at a time")
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

    def control(self, x: Tensor, sensed: Tensor | None, thoughts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        -> (B, C) logits: gate, go_on, recall, as in Output. They read the trunk but do not shape it: their policy gradient's noise wears off what thoughts mean.
        """
        never, config = torch.full_like(x[..., 0], -torch.inf), self.config
        if self.gate is None:
            return never, never, never
        seen = x if sensed is None else torch.cat([x, sensed], dim=-1)
        logits = self.gate(seen.detach())  # (B, C, 1 to 3)
        gate = logits[..., 0] if config.n_think else never
        go_on = thoughts.detach().logsumexp(dim=-1) - logits[..., 1] if config.done else gate
        return gate, go_on, logits[..., -1] if config.recall else never

    def think(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Output:
        """`forward` for who needs no words and no readings."""
        x, sensed = self.trunk(x, mask, cache)
        V = self.config.vocab_size
        thoughts = F.linear(x, self.head.weight[V:], self.head.bias[V:])
        return Output(x[..., :0], thoughts, *self.control(x, sensed, thoughts), x[..., :0])

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, position: Tensor | None = None) -> Output:
        """
        x: token ids (B, C), or embeddings (B, C, n_embd), as the echo needs them.
        mask: (C, C) or (B, 1, C, C), True where a query (row) sees a key (column); None is causal.
        cache: the columns before these; x goes behind them. A cache takes one column at a time, or all at the start.
        position: (B, C) of each column, where that is not its index.
        """
        x, sensed = self.trunk(x, mask, cache, position)
        words, thoughts = self.head(x).split([self.config.vocab_size, self.config.n_think], dim=-1)
        if self.regret is not None:
            words = torch.cat([words, self.regret(x)], dim=-1)  # (B, C, V + 1)
        readings = words[..., :0] if sensed is None else self.blocks[-1].attention.observer.read(sensed)
        return Output(words, thoughts, *self.control(x, sensed, thoughts), readings)

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """
        Begin with the weights of a model of the same words and fewer thoughts, or none, or without an observer or control tokens: whatever it can say it
        says as before; what it lacks stays as it is. Raises ValueError where the shapes are of another model.
        """
        own = self.state_dict()
        if len(weights["head.weight"]) < len(weights["embedding.weight"]) != len(own["embedding.weight"]):
            raise ValueError("a model with RECALL lends its weights only to one of as many thoughts")
        for name in ("embedding.weight", "head.weight", "head.bias"):
            theirs, ours = weights[name], own[name]
            if self.config.vocab_size <= len(theirs) <= len(ours) and theirs.shape[1:] == ours.shape[1:]:
                weights = weights | {name: torch.cat([theirs.to(ours), ours[len(theirs) :]])}
        for name in ("gate.weight", "gate.bias"):  # thinking comes first
            if name in weights and name in own and len(weights[name]) == 1 < len(own[name]) and self.config.n_think:
                weights = weights | {name: torch.cat([weights[name], own[name][1:, : weights[name].size(-1)] if name == "gate.weight" else own[name][1:]])}
        for name in (f"blocks.{self.config.n_layer - 1}.attention.proj.weight", "gate.weight"):  # an observer widens them: nobody listens to it yet
            if name in weights and name in own and own[name].size(1) > weights[name].size(1):
                weights = weights | {name: F.pad(weights[name], (0, own[name].size(1) - weights[name].size(1)))}
        missing = [name for name in own if name not in weights and not name.startswith(("gate.", "regret.")) and ".observer." not in name]
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


# ----------------------------------------------------------------------------------------------
# the rollout: one column at a time, a thought or the next real token


@dataclass
class Thinking:
    """How a stream is made. All modes but `policy` take the thoughts, or their meaning, away."""

    mode: str = "policy"  # policy | never | random | constant | swapped (with the next row of the batch)
    hold: float | None = None  # runs of max_run thoughts, begun with this probability; the gate is not asked
    explore: float = 0.0  # the gate, if asked, does the one thing and the other with this probability at least
    greedy: bool = False  # think where the gate, if asked, says more than 1/2; take the likeliest thought and word
    max_run: int = 1  # thoughts in a row, at most
    budget: int = 0  # thoughts in all that a row may think where the model has the word, those taken back included; 0 is no limit
    after: Tensor | None = None  # (V,) bool: real tokens that a thought may follow; None is all
    constant: int = 0  # the thought that mode `constant` always thinks, 0 .. K-1
    window: int = 0  # columns in view, 0 for all
    hold_recall: float | None = None  # RECALL with this probability; the gate is not asked
    revisions: int = 0  # words a row may take back
    temperature: float = 1.0  # of the words, when not greedy
    top_k: int = 0  # words to choose from, 0 for all


class Rollout(NamedTuple):
    """B streams of C columns. Behind a row's last real token stand columns that are not `valid`."""

    stream: Tensor  # (B, C) token ids, thoughts and RECALL included
    pointer: Tensor  # (B, C) index in `real` of the token that the column predicts, if it speaks
    decides: Tensor  # (B, C) the gate had a choice here
    thinks: Tensor  # (B, C) a thought follows this column
    recalls: Tensor  # (B, C) RECALL follows this column
    valid: Tensor  # (B, C) the row still had something to say
    real: Tensor  # (B, T) the real tokens, with those the model said itself
    length: Tensor  # (B,) how many of them there are
    taken: Tensor  # (B, R, 2) words the model took back, one behind the other: index in `real`, word; -1 behind the last

    @property
    def speaks(self) -> Tensor:  # (B, C)
        return self.valid & ~self.thinks & ~self.recalls

    @property
    def opens(self) -> Tensor:  # (B, C) the column is a RECALL
        return F.pad(self.recalls[:, :-1], (1, 0))

    @property
    def position(self) -> Tensor:  # (B, C) of the column in its row: a RECALL stands where the next column will
        return (~self.opens).cumsum(dim=1) - (~self.opens).long()

    @property
    def may_recall(self) -> Tensor:  # (B, C) in a model that can
        return self.valid & ~self.thinks & ~self.opens

    @property
    def holds_real(self) -> Tensor:  # (B, C) the column's own token is a real one: its pointer has just moved on
        return torch.cat([self.pointer[:, :1] > 0, self.pointer[:, 1:] != self.pointer[:, :-1]], dim=1)

    def alone(self, row: int) -> "Rollout":
        """One row, without the columns behind its end."""
        C = int(self.valid[row].sum())
        return Rollout(*(part[row : row + 1, :C] for part in self[:6]), *(part[row : row + 1] for part in self[6:]))

    def view(self, window: int = 0, cut: Tensor | None = None) -> Tensor | None:
        """
        The mask (B, 1, C, C) under which one pass over the streams sees what was seen as they were made, True where a query sees a key: nothing later,
        nothing further back than the window, nothing from before a cut, (B, C) True at the first column that stays in view; but RECALL sees all that came before,
        and no other column sees it. None, causal, where that is everything.
        """
        if not window and cut is None and not self.recalls.any():
            return None
        place, c = self.position, torch.arange(self.stream.size(1), device=self.stream.device)
        seen = place[:, :, None] - place[:, None, :] < (window or len(c))  # (B, C, C)
        if cut is not None:
            segment = cut.cumsum(dim=1)  # (B, C)
            seen = seen & (segment[:, :, None] == segment[:, None, :])
        seen = (seen | self.opens[:, :, None]) & ~self.opens[:, None, :] | torch.eye(len(c), dtype=torch.bool, device=c.device)
        return (seen & (c[:, None] >= c))[:, None]


def read(model: GPT, roll: Rollout, window: int = 0, cut: Tensor | None = None, x: Tensor | None = None) -> Output:
    """One parallel pass over the streams of a rollout, or over embeddings x of them (B, C, n_embd), that sees what was seen as they were made; see `Rollout.view`."""
    return model(roll.stream if x is None else x, roll.view(window, cut), position=roll.position if model.config.recall else None)


class Noise(NamedTuple):
    """
    The chance in a rollout's thoughts, for each place that a row may come to, once at most: `runs` places for each real token, and a row stands at
    place (pointer - 1) * runs + run while the real token at `pointer` is still to come and `run` thoughts were thought since the last.
    """

    think: Tensor  # (B, places) uniform: a thought follows where it is below the probability of thinking
    thought: Tensor | None  # (B, places, K) Gumbel: argmax of logits plus this is a draw from their softmax (Gumbel 1954); None where none is drawn
    recall: Tensor  # (B, T) uniform, for each real token that is still to come: RECALL where it is below the probability; (B, 0) in a model without

    def at(self, rows: Tensor, place: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """One place of each row, rows and place (B,) -> (B,), (B, K); or many, rows (B, 1), place (B, C) -> (B, C), (B, C, K)."""
        return self.think[rows, place], None if self.thought is None else self.thought[rows, place]


def draw_noise(model: GPT, B: int, T: int, thinking: Thinking, generator=None) -> Noise:
    """For B rows of T real tokens."""
    like, places = model.embedding.weight, T * thinking.max_run
    uniform = lambda *shape: torch.rand(*shape, generator=generator, device=like.device, dtype=like.dtype)  # noqa: E731
    think = uniform(B, places)
    draws = thinking.mode == "random" or thinking.mode in ("policy", "swapped") and not thinking.greedy
    thought = gumbel(like.new_empty(B, places, model.config.n_think), generator) if draws else None
    return Noise(think, thought, uniform(B, T * model.config.recall))


def load_dice(noise: Noise, thoughts: Tensor, rows: Tensor) -> Noise:
    """Noise that makes some rows, (B,) bool, think the thoughts (B, T, R), 0 .. K-1 or -1 for none, behind each real token, and no others."""
    B, T, R = thoughts.shape
    told = F.pad(thoughts, (0, noise.think.size(1) // T - R), value=-1).flatten(1)  # (B, places)
    choice = torch.where(F.one_hot(told.clamp(min=0), noise.thought.size(2)).bool(), 0.0, -torch.inf).to(noise.thought)
    think = torch.where(rows[:, None], torch.where(told >= 0, -1.0, 2.0).to(noise.think), noise.think)  # below every probability, and above
    return noise._replace(think=think, thought=torch.where(rows[:, None, None], choice, noise.thought))


@torch.no_grad()
def rollout(model: GPT, real: Tensor, length: Tensor, thinking: Thinking, generator=None, noise: Noise | None = None) -> Rollout:
    """
    Walk all rows from left to right, one column a step, where every word is given (teacher forcing). Each row has its own pointer to its next real token.
    At every column the gate is sampled: either a thought is appended, or RECALL is, or the next real token.

    real: (B, T) ids, T >= length (B,). generator: the source of all chance in here, so that evaluation never draws from training's.
    noise: the chance, if it is drawn already: then the generator is not asked.
    Nothing in the loop waits for the device but a look, every eight columns, whether it is done.
    """
    (B, T), V, K = real.shape, model.config.vocab_size, model.config.n_think
    device, rows = real.device, torch.arange(B, device=real.device)
    runs = thinking.max_run if K and thinking.mode != "never" else 0
    recall = model.config.recall and thinking.hold_recall != 0
    if not runs and not recall:
        return without_thoughts(real, length)
    columns = max(1, (int(length.max()) - 1) * (1 + runs + recall))  # at most; a row's last token is said, not fed
    cache = KVCache(model.config, B, columns, thinking.window, 0, device, model.embedding.weight.dtype)
    noise = noise or draw_noise(model, B, T, thinking, generator)
    may_follow = thoughts_may_follow(model, thinking)
    real, none = F.pad(real, (0, 1)), torch.zeros(B, dtype=torch.bool, device=device)  # (B, T + 1): a row that is done still has something to point at
    token, pointer, run, recalls = real[:, 0], torch.ones_like(rows), torch.zeros_like(rows), none
    record = []  # of (token, pointer, decides, thinks, recalls, valid), each (B,)
    for column in range(columns):
        opens = recalls  # this column is a RECALL
        out = model.think(token[:, None], cache.view(opens), cache)
        if recall:
            cache.length = cache.length - opens.long()
        valid = pointer < length
        decides = valid & (run < runs) & may_follow[token] if runs else none
        thinks = thought = none
        if runs:
            uniform, gumbels = noise.at(rows, (pointer - 1) * runs + run)
            thinks = decides & decide(out.thinking(run[:, None])[:, 0], uniform, hold_run(run, thinking), thinking)
            thought = choose_thought(out.thoughts[:, 0], gumbels, thinking)
        if recall:
            recalls = valid & ~thinks & ~opens & decide(out.recall[:, 0], noise.recall[rows, pointer - 1], thinking.hold_recall, thinking)
        record.append((token, pointer, decides, thinks, recalls, valid))
        token = torch.where(thinks, V + thought, torch.where(recalls, V + K, real[rows, pointer]))
        run = torch.where(thinks, run + 1, 0)
        pointer = torch.where(thinks | recalls | ~valid, pointer, pointer + 1)
        if column % 8 == 7 and (pointer >= length).all():
            break
    parts = [torch.stack(part, dim=1) for part in zip(*record)]
    used = max(1, int(parts[-1].any(dim=0).sum()))
    return Rollout(*(part[:, :used] for part in parts), real[:, :-1], length, nothing_taken(real))


@torch.no_grad()
def speak(
    model: GPT, real: Tensor, given: Tensor, length: Tensor, thinking: Thinking, generator=None, stop: int = -1, watch=None, noise: Noise | None = None
) -> Rollout:
    """
    The loop of all control. Feed a column to each row, and let it do one of four things:
      REVISE   take its last word back, with the thoughts behind it: return to the column that said it, where this word is now forbidden
      think    append a thought, unless the run (max_run), the row (budget) or DONE ends it
      RECALL   append the column that sees everything
      speak    append the next real token: one of the first `given` (B,), from there to `length` (B,) the model's own; a row that says `stop` ends there
    The memory stack: for each word said, which column said it. Pushing is to write that number down; popping is to cut the cache off before that column.
    `real` (B, T) holds the given tokens, T >= length. A row says as many as it was asked to, whatever it thinks or revises.

    watch: called with every new column's token ids (B,), thoughts included, as soon as they are chosen; it is not told what is taken back.
    generator and noise as in `rollout`; the words' chance always comes from the generator.
    """
    (B, T), V, K, can = real.shape, model.config.vocab_size, model.config.n_think, model.config
    device, rows = real.device, torch.arange(B, device=real.device)
    runs, revisions = thinking.max_run if K and thinking.mode != "never" else 0, thinking.revisions if can.revise else 0
    columns = max(1, (int(length.max()) - 1) * (1 + runs + can.recall))  # of a row, at most
    cache = KVCache(can, B, columns, thinking.window, revisions * (1 + runs), device, model.embedding.weight.dtype)
    noise, may_follow = noise or draw_noise(model, B, T, thinking, generator), thoughts_may_follow(model, thinking)
    real, length, nowhere = F.pad(real, (0, 1)), length.clone(), torch.zeros(B, dtype=torch.bool, device=device)
    token, pointer, run, spent, revised = real[:, 0], torch.ones_like(rows), *torch.zeros(3, B, dtype=torch.long, device=device)
    record, at = torch.zeros(7, B, columns, dtype=torch.long, device=device), torch.zeros_like(rows)  # what each column was, and how many there are
    stack, taken = torch.zeros_like(real), torch.full((B, revisions, 2), -1, device=device)  # (index in real, word)
    forbidden = taken
    while True:
        before, opens, valid = cache.length, token == V + K, pointer < length
        own = valid & (pointer >= given)
        out = Output(*(part[:, 0] for part in model(token[:, None], cache.view(opens), cache)))
        if torch.is_tensor(before):
            cache.length = before + (valid & ~opens).long()  # a RECALL leaves no trace; a row that is done stands still

        words, thinks, recalls = out.words, nowhere, nowhere  # (B, V), or (B, V + 1) with REVISE
        if can.revise:
            may = (pointer > given) & (revised < revisions) & ((forbidden[..., 0] == pointer[:, None] - 1).sum(dim=1) < V - 1)  # leave it a word to say
            words = words.masked_fill(torch.cat([forbidden_here(forbidden, pointer, V), ~may[:, None]], dim=1), -torch.inf)
        word = choose(words, thinking, generator)
        revises = valid & (word == V)
        word = torch.where(own, word, real[rows, pointer])

        decides = valid & ~revises & (run < runs) & may_follow[token]
        if thinking.budget:
            decides = decides & (spent < thinking.budget)
        if runs:
            uniform, gumbels = noise.at(rows, (pointer - 1) * runs + run)
            thinks = decides & decide(out.thinking(run), uniform, hold_run(run, thinking), thinking)
            thought = choose_thought(out.thoughts, gumbels, thinking)
        if can.recall:
            recalls = valid & ~revises & ~thinks & ~opens & decide(out.recall, noise.recall[rows, pointer - 1], thinking.hold_recall, thinking)
        speaks = valid & ~(revises | thinks | recalls)

        now, end = torch.stack([x + torch.zeros_like(run) for x in (token, pointer, decides, thinks, recalls, run, before)]), at.clamp(max=columns - 1)
        record[:, rows, end] = torch.where(valid, now, record[:, rows, end])
        stack[rows, pointer] = torch.where(speaks, at, stack[rows, pointer])  # push
        real[rows, pointer] = torch.where(speaks, word, real[rows, pointer])
        length = torch.where(speaks & own & (word == stop), pointer + 1, length)
        token = torch.where(thinks, V + thought, torch.where(recalls, V + K, word)) if runs else torch.where(recalls, V + K, word)
        run, spent = torch.where(thinks, run + 1, 0), spent + (thinks & own)
        pointer, at = torch.where(speaks, pointer + 1, pointer), torch.where(valid, at + 1, at)

        if revises.any():  # pop
            pointer = torch.where(revises, pointer - 1, pointer)
            at = torch.where(revises, stack[rows, pointer], at)
            token, run, cache.length = torch.where(revises, record[:, rows, at.clamp(max=columns - 1)][[0, 5, 6]], torch.stack([token, run, cache.length]))
            turn = (revises[:, None] & (torch.arange(revisions, device=device) == revised[:, None]))[..., None]  # (B, R, 1)
            back = torch.stack([pointer, real[rows, pointer]], dim=-1)[:, None]  # (B, 1, 2)
            taken, forbidden = torch.where(turn, back, taken), torch.where(turn, back, forbidden)
            forbidden = forbidden.masked_fill(forbidden[..., :1] > pointer[:, None, None], -1)  # of places that the row has left again
            revised = revised + revises
        if watch:
            watch(token)
        if (pointer >= length).all():
            break
    C = int(at.max())
    (stream, place, *flags, _, _), valid = record[:, :, :C], torch.arange(C, device=device) < at[:, None]
    return Rollout(stream, torch.where(valid, place, length[:, None]), *(flag.bool() & valid for flag in flags), valid, real[:, :-1], length, taken)


def forbidden_here(forbidden: Tensor, pointer: Tensor, V: int) -> Tensor:
    """Words that were taken back, (B, R, 2) of index and word -> (B, V) bool: those taken back at the row's pointer (B,)."""
    word = torch.where(forbidden[..., 0] == pointer[:, None], forbidden[..., 1], V)  # (B, R), V for none
    return torch.zeros(len(word), V + 1, dtype=torch.bool, device=word.device).scatter(1, word, True)[:, :V]


def thoughts_may_follow(model: GPT, thinking: Thinking) -> Tensor:
    """(V + K + 1,) bool: tokens that a thought may follow. RECALL is there to speak."""
    V, K = model.config.vocab_size, model.config.n_think
    every = torch.ones(V + K + 1, dtype=torch.bool, device=model.embedding.weight.device)
    every[V + K] = False
    if thinking.after is not None:
        every[:V] = thinking.after
    return every


def nothing_taken(real: Tensor) -> Tensor:
    return torch.zeros(len(real), 0, 2, dtype=torch.long, device=real.device)


@torch.no_grad()
def parallel_rollout(model: GPT, real: Tensor, length: Tensor, thinking: Thinking, generator=None, noise=None) -> tuple[Rollout, int]:
    """
    The rollout of rows that are given to their end, as `rollout` makes it of the same noise, by guessing -> the rollout, passes through the model.

    Guess what a row does at every place; run the stream that comes of it through the model, all columns at once; see what each column does, its noise
    given; make that the guess; again, until nothing changes. A column is right if all before it are, so each pass settles at least one more
    column of each row, and in practice many: a wrong guess matters only to the columns that listen to it. Rows that are settled leave the batch.
    The result is the same but where two choices are so near a tie that rounding, which depends on the shape of the batch, decides between them.
    """
    (B, T), V, K = real.shape, model.config.vocab_size, model.config.n_think
    runs = thinking.max_run if K and thinking.mode != "never" else 0
    if not runs:
        return without_thoughts(real, length), 0
    if thinking.window or model.config.recall or model.training and model.config.dropout:
        raise ValueError("a parallel rollout has all columns in view, no RECALL, and no dropout: a pass must say twice what it said once")
    noise = noise or draw_noise(model, B, T, thinking, generator)
    may_follow = thoughts_may_follow(model, thinking)
    # the first guess is of a model that knows nothing: all logits zero
    silent = torch.zeros_like(noise.think)  # (B, places)
    run = torch.arange(runs, device=real.device).repeat(T)
    thinks = decide(silent, noise.think, hold_run(run, thinking), thinking) & F.pad(may_follow[real][..., None], (0, runs - 1), value=True).flatten(1)
    thoughts = choose_thought(silent[..., None].expand(-1, -1, K), noise.thought, thinking)
    rows, settled, passes = torch.arange(B, device=real.device), torch.zeros(B, dtype=torch.long, device=real.device), 0  # rows still in the batch
    while len(rows):
        stream, pointer, run, valid = lay_out(real[rows], length[rows], thinks[rows], thoughts[rows], V)
        out = model.think(stream)
        place, column = (pointer - 1) * runs + run, torch.arange(stream.size(1), device=real.device)
        uniform, gumbels = noise.at(rows[:, None], place)
        decides = valid & (run < runs) & may_follow[stream] & (column >= settled[:, None])  # settled columns stay, whatever rounding says
        thinks_now = decide(out.thinking(run), uniform, hold_run(run, thinking), thinking)
        thought = choose_thought(out.thoughts, gumbels, thinking)
        was, thought_was = thinks[rows[:, None], place], thoughts[rows[:, None], place]
        wrong = decides & ((thinks_now != was) | thinks_now & (thought != thought_was))
        each = rows[:, None].expand_as(place)[decides], place[decides]
        thinks[each], thoughts[each] = thinks_now[decides], thought[decides]
        unsure = wrong.any(dim=1)
        settled = wrong.int().argmax(dim=1) + 1
        if thinking.mode == "swapped":  # a row depends on the one before it
            unsure, settled = unsure.any().expand_as(unsure), torch.where(unsure, settled, stream.size(1)).min().expand_as(settled)
        rows, settled, passes = rows[unsure], settled[unsure], passes + 1
    stream, pointer, run, valid = lay_out(real, length, thinks, thoughts, V)
    decides = valid & (run < runs) & may_follow[stream]
    thinks = decides & thinks.gather(1, (pointer - 1) * runs + run)
    return Rollout(stream, pointer, decides, thinks, torch.zeros_like(thinks), valid, real.clone(), length.clone(), nothing_taken(real)), passes


def lay_out(real: Tensor, length: Tensor, thinks: Tensor, thoughts: Tensor, V: int) -> tuple[Tensor, ...]:
    """
    The streams of rows that do at each place what `thinks` (B, places) bool and `thoughts` (B, places) 0 .. K-1 say -> (B, C) token ids,
    pointer, thoughts thought since the last real token, and valid.
    """
    B, T = real.shape
    runs = thinks.size(1) // T
    count = thinks.view(B, T, runs).cumprod(dim=2).sum(dim=2)  # (B, T) thoughts behind each real token
    start = (1 + count).cumsum(dim=1) - 1 - count  # (B, T) the real token's column
    columns = max(1, int(start.gather(1, length[:, None] - 1).max()))
    column = torch.arange(columns, device=real.device).expand(B, columns).contiguous()
    pointer = torch.minimum(torch.searchsorted(start, column, right=True), length[:, None])
    run, valid = column - start.gather(1, pointer - 1), pointer < length[:, None]
    behind = ~valid & (run > 0)  # there stands the token that the pointer is at, as in `rollout`
    word = F.pad(real, (0, 1)).gather(1, pointer - 1 + behind.long())
    run = run * valid
    thought = thoughts.gather(1, ((pointer - 1) * runs + run - 1).clamp(min=0))  # of the place that was left for this one
    return torch.where(run > 0, V + thought, word), pointer, run, valid


def without_thoughts(real: Tensor, length: Tensor) -> Rollout:
    """The rollout of rows that are given to their end and never think: nothing is drawn, so all columns are known at once."""
    column = torch.arange(int(length.max()) - 1, device=real.device)
    pointer = torch.minimum(column + 1, length[:, None])  # (B, C)
    stream = real.gather(1, torch.minimum(column, length[:, None]).clamp(max=real.size(1) - 1))
    nowhere = torch.zeros_like(pointer, dtype=torch.bool)
    return Rollout(stream, pointer, nowhere, nowhere, nowhere, pointer < length[:, None], real, length, nothing_taken(real))


def hold_run(run: Tensor, thinking: Thinking) -> Tensor | None:
    """Probability of a thought, where the gate is not asked: of the first in a run, and then to go on -> as run, thoughts already in it; None where it is asked."""
    return None if thinking.hold is None else torch.where(run == 0, thinking.hold, 1.0)


def decide(logit: Tensor, uniform: Tensor, hold: Tensor | float | None, thinking: Thinking) -> Tensor:
    """Yes or no, by uniform noise in 0 .. 1: with the probability `hold` or, where that is None, as the logit says -> bool of that shape."""
    if hold is not None:
        return uniform < hold
    p = logit.sigmoid()
    return uniform < (p.round() if thinking.greedy else thinking.explore + (1 - 2 * thinking.explore) * p)


def gumbel(empty: Tensor, generator=None) -> Tensor:
    """Fills a tensor with Gumbel noise."""
    return empty.exponential_(generator=generator).log_().neg_()


def draw(logits: Tensor, generator=None) -> Tensor:
    """A draw from the softmax of (B, N) logits -> (B,), by the Gumbel-max trick (Gumbel 1954)."""
    return (logits + gumbel(torch.empty_like(logits), generator)).argmax(dim=-1)


def choose(logits: Tensor, thinking: Thinking, generator=None) -> Tensor:
    """(B, V or V + 1) word logits -> (B,) ids: the likeliest, or a draw at a temperature among the top k."""
    if thinking.greedy:
        return logits.argmax(dim=-1)
    if thinking.top_k:
        kth = logits.topk(min(thinking.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return draw(logits / thinking.temperature, generator)


def choose_thought(logits: Tensor, gumbels: Tensor | None, thinking: Thinking) -> Tensor:
    """(B, ..., K) thought logits, and noise to draw with -> (B, ...) thoughts 0 .. K-1, by policy or with an ablation."""
    if thinking.mode == "random":
        return gumbels.argmax(dim=-1)
    if thinking.mode == "constant":
        return torch.full(logits.shape[:-1], thinking.constant, device=logits.device)
    thought = (logits if gumbels is None else logits + gumbels).argmax(dim=-1)
    return thought.roll(1, dims=0) if thinking.mode == "swapped" else thought


def generate(model: GPT, prompts: list[list[int]], new_tokens: int, thinking: Thinking, generator=None, stop: int = -1, watch=None) -> tuple[list, Rollout]:
    """
    Answer prompts of any lengths in one batch -> for each the new real tokens (without `stop`), and the rollout, see `speak`.
    No thought and no control token is in the answers; whoever wants to see them finds them in the rollout's stream.
    """
    device = model.embedding.weight.device
    given = torch.tensor([len(prompt) for prompt in prompts], device=device)
    if (given == 0).any():
        raise ValueError("a prompt holds at least one token")
    real = torch.zeros(len(prompts), int(given.max()) + new_tokens, dtype=torch.long, device=device)
    for row, prompt in zip(real, prompts):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    roll = speak(model, real, given, given + new_tokens, thinking, generator, stop, watch)
    answers = [row[start:end].tolist() for row, start, end in zip(roll.real, given.tolist(), roll.length.tolist())]
    return [answer[:-1] if answer and answer[-1] == stop else answer for answer in answers], roll
