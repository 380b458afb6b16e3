"""
Streams: the real tokens of a row with the thoughts between them, made one column at a time by a model that thinks, recalls, revises and speaks.

Two loops walk a batch of rows from left to right: `rollout`, for training, where every word is given (fast.py finds the same in fewer steps), and
`speak`, where the model has the word: evaluation and sampling. `generate` answers prompts; what it gives back holds no thought.

Not here: the network (model.py, whose glossary holds here, too), the loss (loss.py), any task, any path, any logging.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache, Output


@dataclass
class Thinking:
    """How a stream is made. All modes but `policy` take the thoughts, or their meaning, away."""

    mode: str = "policy"  # policy | never | random | constant | swapped (with the next row of the batch)
    hold: float | None = None  # runs of max_run thoughts, begun with this probability; the gate is not asked
    explore: float = 0.0  # the gate, if asked, does the one thing and the other with this probability at least
    greedy: bool = False  # think where the gate, if asked, says more than 1/2; take the likeliest thought and word
    max_run: int = 1  # thoughts in a row, at most
    budget: int = 0  # thoughts that a row may think in all, those taken back included, in `speak`; 0 is no limit
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
    window: int = 0  # columns that were in view as the streams were made, 0 for all

    @property
    def speaks(self) -> Tensor:  # (B, C)
        return self.valid & ~self.thinks & ~self.recalls

    @property
    def opens(self) -> Tensor:  # (B, C) the column is a RECALL
        return F.pad(self.recalls[:, :-1], (1, 0))

    @property
    def position(self) -> Tensor:  # (B, C) of the column in its row: a RECALL stands where the next column will
        return (~self.opens).cumsum(dim=1) - (~self.opens).long()

    def without_thoughts(self, hidden: Tensor) -> "Rollout":
        """The same streams as if the thoughts at the columns hidden (B, C) had not been thought. The others keep their positions."""
        return self._replace(thinks=self.thinks & ~F.pad(hidden[:, 1:], (0, 1)), valid=self.valid & ~hidden)

    @property
    def may_recall(self) -> Tensor:  # (B, C) in a model that can
        return self.valid & ~self.thinks & ~self.opens

    @property
    def holds_real(self) -> Tensor:  # (B, C) the column's own token is a real one: its pointer has just moved on
        return torch.cat([self.pointer[:, :1] > 0, self.pointer[:, 1:] != self.pointer[:, :-1]], dim=1)

    def alone(self, row: int) -> "Rollout":
        """One row, without the columns behind its end."""
        C = int(self.valid[row].sum())
        return Rollout(*(part[row : row + 1, :C] for part in self[:6]), *(part[row : row + 1] for part in self[6:9]), self.window)

    def view(self, cut: Tensor | None = None, pack=None) -> Tensor | None:
        """
        The mask (B, 1, C, C) under which one pass over the streams sees what was seen as they were made, True where a query sees a key: nothing later,
        nothing further back than the window, nothing from before a cut, (B, C) True at the first column that stays in view, nor, where there are cuts, columns
        that are not valid; but RECALL sees all that came before, and no other column sees it. None, causal, where that is everything. (R, 1, W, W) of columns laid elsewhere by `pack`, (B, C) -> (R, W), as fast.py does.
        """
        if not self.window and cut is None and pack is None and not self.recalls.any():
            return None
        lay = pack or (lambda x: x)
        place, opens = lay(self.position), lay(self.opens)  # (B, C)
        seen = place[:, :, None] - place[:, None, :] < (self.window or self.stream.size(1))  # (B, C, C)
        if cut is not None:
            segment = lay(cut.cumsum(dim=1))  # (B, C)
            seen = seen & (segment[:, :, None] == segment[:, None, :])
        there = ~opens if cut is None else ~opens & lay(self.valid)  # (B, C)
        c = torch.arange(place.size(1), device=place.device)
        own = torch.eye(len(c), dtype=torch.bool, device=c.device)
        seen = (seen | opens[:, :, None]) & there[:, None, :] | own
        if pack:
            row = pack(torch.arange(len(self.stream), device=c.device)[:, None].expand_as(self.stream))
            seen = seen & (row[:, :, None] == row[:, None, :])
        return (seen & (c[:, None] >= c))[:, None]


def read(model: GPT, roll: Rollout, cut: Tensor | None = None, x: Tensor | None = None) -> Output:
    """One parallel pass over the streams of a rollout, or over embeddings x of them (B, C, n_embd), that sees what was seen as they were made; see `Rollout.view`."""
    return model(roll.stream if x is None else x, roll.view(cut), position=roll.position if model.config.recall else None)


class Noise(NamedTuple):
    """
    The chance in a rollout's thoughts, for each place that a row may come to, once at most: `runs` places for each real token, and a row stands at
    place (pointer - 1) * runs + run while the real token at `pointer` is still to come and `run` thoughts were thought since the last.
    """

    think: Tensor  # (B, places) uniform: a thought follows where it is below the probability of thinking
    thought: Tensor | None  # (B, places, d) standard normal, of a thought's bits, see `Thoughts`; None where none is drawn
    recall: Tensor  # (B, T) uniform, for each real token that is still to come: RECALL where it is below the probability; (B, 0) in a model without

    def at(self, rows: Tensor, place: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """One place of each row, rows and place (B,) -> (B,), (B, d); or many, rows (B, 1), place (B, C) -> (B, C), (B, C, d)."""
        return self.think[rows, place], None if self.thought is None else self.thought[rows, place]


def draw_noise(model: GPT, B: int, T: int, thinking: Thinking, generator=None) -> Noise:
    """For B rows of T real tokens."""
    like, places = model.embedding.weight, T * thinking.max_run
    uniform = lambda *shape: torch.rand(*shape, generator=generator, device=like.device, dtype=like.dtype)  # noqa: E731
    think = uniform(B, places)
    draws = thinking.mode == "random" or thinking.mode in ("policy", "swapped") and not thinking.greedy
    thought = model.thoughts.noise(B, places, generator=generator) if draws and model.thoughts is not None else None
    return Noise(think, thought, uniform(B, T * model.config.recall))


def load_dice(model: GPT, noise: Noise, thoughts: Tensor, where: Tensor) -> Noise:
    """Noise that makes rows think the thoughts (B, T, R), 0 .. K-1 or -1 for none, behind the real tokens `where` (B, T or 1) bool, and no others there."""
    B, T, R = thoughts.shape
    runs = noise.think.size(1) // T
    told, where = F.pad(thoughts, (0, runs - R), value=-1).flatten(1), where.expand(B, T).repeat_interleave(runs, dim=1)  # (B, places)
    choice = model.thoughts.bits(told.clamp(min=0)) * torch.inf
    think = torch.where(where, torch.where(told >= 0, -1.0, 2.0).to(noise.think), noise.think)  # below every probability, and above
    return noise._replace(think=think, thought=torch.where(where[..., None], choice, noise.thought))


@torch.no_grad()
def rollout(model: GPT, real: Tensor, length: Tensor, thinking: Thinking, generator=None, noise: Noise | None = None, graph: bool = False) -> Rollout:
    """
    Walk all rows from left to right, one column a step, where every word is given (teacher forcing). Each row has its own pointer to its next real token.
    At every column the gate is sampled: either a thought is appended, or RECALL is, or the next real token.

    real: (B, T) ids, T >= length (B,). generator: the source of all chance in here, so that evaluation never draws from training's.
    noise: the chance, if it is drawn already: then the generator is not asked.
    graph: a column's work is recorded once, as kernels of a GPU, and then only launched; see `as_graph`.
    Nothing in the loop waits for the device but a look, every eight columns, whether it is done.
    """
    (B, T), V, K = real.shape, model.config.vocab_size, model.config.n_think
    device, rows = real.device, torch.arange(B, device=real.device)
    runs = thinking.max_run if K and thinking.mode != "never" else 0
    recall = model.config.recall and thinking.hold_recall != 0
    if not runs and not recall:
        return without_thoughts(real, length, thinking.window)
    columns = max(1, (int(length.max()) - 1) * (1 + runs + recall))  # at most; a row's last token is said, not fed
    cache = KVCache(model.config, B, columns, thinking.window, 0, device, model.embedding.weight.dtype, whole=graph)
    noise = noise or draw_noise(model, B, T, thinking, generator)
    may_follow = thoughts_may_follow(model, thinking)
    real, none = F.pad(real, (0, 1)), torch.zeros(B, dtype=torch.bool, device=device)  # (B, T + 1): a row that is done still has something to point at

    def step(token, pointer, run, opens, stored):
        """A column's token, the next real one, thoughts since the last, whether it is a RECALL, columns in the cache -> the same of the next, and what to record."""
        cache.length = stored
        out = model.think(token[:, None], cache.view(opens), cache)
        valid = pointer < length
        decides = valid & (run < runs) & may_follow[token] if runs else none
        thinks = recalls = thought = none
        if runs:
            uniform, chance = noise.at(rows, (pointer - 1) * runs + run)
            thinks = decides & decide(out.thinking(run[:, None])[:, 0], uniform, hold_run(run, thinking), thinking)
            thought = choose_thought(model, out.thoughts[:, 0], chance, thinking)
        if recall:
            recalls = valid & ~thinks & ~opens & decide(out.recall[:, 0], noise.recall[rows, pointer - 1], thinking.hold_recall, thinking)
        told = torch.stack([token, pointer, decides, thinks, recalls, valid])
        token = torch.where(thinks, V + thought, torch.where(recalls, V + K, real[rows, pointer]))
        pointer = torch.where(thinks | recalls | ~valid, pointer, pointer + 1)
        run = torch.where(thinks, run + 1, 0)
        stored = cache.length - opens.long() if recall else cache.length  # a RECALL leaves no trace
        return token, pointer, run, recalls, stored, told

    state, record = (real[:, 0], torch.ones_like(rows), torch.zeros_like(rows), none, cache.length), []
    step = as_graph(step, state) if graph else step
    for column in range(columns):
        *state, told = step(*state)
        record.append(told)
        if column % 8 == 7 and (state[1] >= length).all():  # the pointer
            break
    told = torch.stack(record, dim=2)  # (6, B, C)
    told = told[:, :, : max(1, int(told[5].any(dim=0).sum()))]
    return Rollout(told[0], told[1], *told[2:].bool(), real[:, :-1], length, nothing_taken(real), thinking.window)


def as_graph(step, state: tuple[Tensor, ...]):
    """
    A function of tensors as a CUDA graph: its kernels are recorded once, and from then on launched together, without Python between them. It must compute with
    the same shapes at every call; what it changes besides, it changes alike when called again with the same. state: arguments to record it with.
    On other devices it stays as it is.
    """
    if state[0].device.type != "cuda":
        return step
    places = [x.clone() for x in state]  # the graph reads here, always
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step(*places)  # libraries get ready at their first call, which cannot be recorded
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(*places)

    def launch(*state):
        for place, x in zip(places, state):
            place.copy_(x)
        graph.replay()
        return [x.clone() for x in made]

    return launch


@torch.no_grad()
def speak(
    model: GPT, real: Tensor, given: Tensor, length: Tensor, thinking: Thinking, generator=None, stop: int = -1, watch=None, noise: Noise | None = None
) -> Rollout:
    """
    The loop of all control. Feed a column to each row, and let it do one of four things:
      REVISE   if that is likelier than not, take its last word back, with the thoughts behind it: return to the column that said it, where this word is now forbidden
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
    while True:
        before, opens, valid = cache.length, token == V + K, pointer < length
        own = valid & (pointer >= given)
        out = Output(*(part[:, 0] for part in model(token[:, None], cache.view(opens), cache)))
        if torch.is_tensor(before):
            cache.length = before + (valid & ~opens).long()  # a RECALL leaves no trace; a row that is done stands still

        words, thinks, thought, recalls, revises = out.words[:, :V], nowhere, nowhere, nowhere, nowhere
        if can.revise:
            may = (pointer > given) & (revised < revisions) & ((taken[..., 0] == pointer[:, None] - 1).sum(dim=1) < V - 1)  # leave it a word to say
            revises = valid & may & (out.words[:, V] > words.logsumexp(dim=-1))  # a decision, not a draw: likelier than all words together
            words = words.masked_fill(taken_here(taken, pointer, V), -torch.inf)
        word = torch.where(own, choose(words, thinking, generator), real[rows, pointer])

        decides = valid & ~revises & (run < runs) & may_follow[token]
        if thinking.budget:
            decides = decides & (spent < thinking.budget)
        if runs:
            uniform, chance = noise.at(rows, (pointer - 1) * runs + run)
            thinks = decides & decide(out.thinking(run), uniform, hold_run(run, thinking), thinking)
            thought = choose_thought(model, out.thoughts, chance, thinking)
        if can.recall:
            recalls = valid & ~revises & ~thinks & ~opens & decide(out.recall, noise.recall[rows, pointer - 1], thinking.hold_recall, thinking)
        speaks = valid & ~(revises | thinks | recalls)

        now, end = torch.stack([x + torch.zeros_like(run) for x in (token, pointer, decides, thinks, recalls, run, before)]), at.clamp(max=columns - 1)
        record[:, rows, end] = torch.where(valid, now, record[:, rows, end])
        stack[rows, pointer] = torch.where(speaks, at, stack[rows, pointer])  # push
        real[rows, pointer] = torch.where(speaks, word, real[rows, pointer])
        length = torch.where(speaks & own & (word == stop), pointer + 1, length)
        token = torch.where(thinks, V + thought, torch.where(recalls, V + K, word))
        run, spent = torch.where(thinks, run + 1, 0), spent + thinks
        pointer, at = torch.where(speaks, pointer + 1, pointer), torch.where(valid, at + 1, at)

        if revises.any():  # pop
            pointer = torch.where(revises, pointer - 1, pointer)
            at = torch.where(revises, stack[rows, pointer], at)
            token, run, cache.length = torch.where(revises, record[:, rows, at.clamp(max=columns - 1)][[0, 5, 6]], torch.stack([token, run, cache.length]))
            turn = (revises[:, None] & (torch.arange(revisions, device=device) == revised[:, None]))[..., None]  # (B, R, 1)
            back = torch.stack([pointer, real[rows, pointer]], dim=-1)[:, None]  # (B, 1, 2)
            taken, revised = torch.where(turn, back, taken), revised + revises
        if watch:
            watch(token)
        if (pointer >= length).all():
            break
    C = int(at.max())
    (stream, place, *flags, _, _), valid = record[:, :, :C], torch.arange(C, device=device) < at[:, None]
    flags = (flag.bool() & valid for flag in flags)
    return Rollout(stream, torch.where(valid, place, length[:, None]), *flags, valid, real[:, :-1], length, taken, thinking.window)


def taken_here(taken: Tensor, pointer: Tensor, V: int) -> Tensor:
    """Words that were taken back, (B, R, 2) of index and word -> (B, V) bool: those taken back at the row's pointer (B,)."""
    word = torch.where(taken[..., 0] == pointer[:, None], taken[..., 1], V)  # (B, R), V for none
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


def without_thoughts(real: Tensor, length: Tensor, window: int = 0) -> Rollout:
    """The rollout of rows that are given to their end and never think: nothing is drawn, so all columns are known at once."""
    column = torch.arange(int(length.max()) - 1, device=real.device)
    pointer = torch.minimum(column + 1, length[:, None])  # (B, C)
    stream = real.gather(1, torch.minimum(column, length[:, None]).clamp(max=real.size(1) - 1))
    nowhere = torch.zeros_like(pointer, dtype=torch.bool)
    return Rollout(stream, pointer, nowhere, nowhere, nowhere, pointer < length[:, None], real, length, nothing_taken(real), window)


def hold_run(run: Tensor, thinking: Thinking) -> Tensor | None:
    """Probability of a thought, where the gate is not asked: of the first in a run, and then to go on -> as run, thoughts already in it; None where it is asked."""
    return None if thinking.hold is None else torch.where(run == 0, thinking.hold, 1.0)


def decide(logit: Tensor, uniform: Tensor, hold: Tensor | float | None, thinking: Thinking) -> Tensor:
    """Yes or no, by uniform noise in 0 .. 1: with the probability `hold` or, where that is None, as the logit says -> bool of that shape."""
    if hold is not None:
        return uniform < hold
    p = logit.sigmoid()
    return uniform < (p.round() if thinking.greedy else thinking.explore + (1 - 2 * thinking.explore) * p)


def draw(logits: Tensor, generator=None) -> Tensor:
    """A draw from the softmax of (B, N) logits -> (B,), by the Gumbel-max trick (Gumbel 1954)."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(dim=-1)


def choose(logits: Tensor, thinking: Thinking, generator=None) -> Tensor:
    """(B, V) word logits -> (B,) ids: the likeliest, or a draw at a temperature among the top k."""
    if thinking.greedy:
        return logits.argmax(dim=-1)
    if thinking.top_k:
        kth = logits.topk(min(thinking.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return draw(logits / thinking.temperature, generator)


def choose_thought(model: GPT, h: Tensor, chance: Tensor | None, thinking: Thinking) -> Tensor:
    """Numbers of the bits h (B, ..., d), and noise to draw with -> (B, ...) thoughts 0 .. K-1, by policy or with an ablation."""
    if thinking.mode == "random":
        return model.thoughts.choose(torch.zeros_like(h), chance)
    if thinking.mode == "constant":
        return torch.full(h.shape[:-1], thinking.constant, device=h.device)
    thought = model.thoughts.choose(h, 0.0 if chance is None else chance)
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
