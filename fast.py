"""
The same, sooner: streams found in fewer steps, and passes over fewer columns. Each has its slow, obvious twin in stream.py, and a test (tests/test_speed.py) that
they agree. Whoever wants to understand the idea may leave this file out.

  rollout_by_words   `rollout`, a word a step instead of a column
  parallel_rollout   `rollout`, by guessing whole streams
  read_packed        `read`, of the columns that are needed
"""

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache, Output
from stream import Noise, Rollout, Thinking, choose_thought, decide, draw_noise, hold_run, nothing_taken, read, thoughts_may_follow, without_thoughts

# ----------------------------------------------------------------------------------------------
# rollouts


@torch.no_grad()
def rollout_by_words(model: GPT, real: Tensor, length: Tensor, thinking: Thinking, generator=None, noise: Noise | None = None) -> tuple[Rollout, int]:
    """
    The rollout of rows that are given to their end, as `rollout` makes it of the same noise, in fewer steps -> the rollout, passes through the model.

    All rows stand at the same word, with `runs` places for thoughts behind it; a place that a row leaves empty is in nobody's view. What follows the last
    thought of a run is known, the next word, so both go through the model together: with one thought in a row at most, a step is a word. Rows that are done leave.
    """
    (B, T), V, K = real.shape, model.config.vocab_size, model.config.n_think
    runs, device = thinking.max_run if K and thinking.mode != "never" else 0, real.device
    if not runs:
        return without_thoughts(real, length, thinking.window), 0
    if model.config.recall or thinking.mode == "swapped":
        raise ValueError("a rollout by words knows no RECALL, and no row that thinks another's thoughts: they may stand at different columns")
    noise = noise or draw_noise(model, B, T, thinking, generator)
    may_follow, longest = thoughts_may_follow(model, thinking), length.argsort(descending=True)
    words, chance = real[longest], Noise(*(part if part is None else part[longest] for part in noise))
    left = (length[:, None] > torch.arange(1, T + 1, device=device)).sum(dim=0).tolist()  # rows with a word to say behind each
    cache = KVCache(model.config, B, T * (1 + runs), device=device, dtype=model.embedding.weight.dtype)
    there = torch.zeros(B, cache.size, dtype=torch.bool, device=device)  # what stands in the cache, and its position
    position, column = torch.zeros_like(there, dtype=torch.long), torch.arange(cache.size, device=device)
    thinks, thoughts, passes = torch.zeros_like(noise.think, dtype=torch.bool), torch.zeros_like(noise.think, dtype=torch.long), 0  # (B, places)
    token, stands, behind = words[:, :0], words[:, :0].bool(), torch.zeros_like(length)  # to be fed, and the position behind all that was
    for word, n in enumerate(left[: sum(n > 0 for n in left)]):
        token, stands = torch.cat([token[:n], words[:n, word : word + 1]], dim=1), F.pad(stands[:n], (0, 1), value=True)
        for run in range(runs):
            new = slice(cache.length, cache.length + token.size(1))
            there[:n, new], position[:n, new] = stands, behind[:n, None] + stands.cumsum(dim=1) - 1
            behind = behind[:n] + stands.sum(dim=1)
            now = position[:n, new]  # (n, new)
            mask = there[:n, None, : new.stop] & (column[: new.stop] <= column[new, None])  # (n, new, seen)
            if thinking.window:
                mask = mask & (now[:, :, None] - position[:n, None, : new.stop] < thinking.window)
            out, passes = model.think(token, mask[:, None], cache, now), passes + 1
            uniform, drawn = chance.at(slice(n), place := word * runs + run)
            gate = out.thinking(run)[:, -1]
            thinks[:n, place] = stands[:, -1] & may_follow[token[:, -1]] & decide(gate, uniform, hold_run(torch.tensor(run), thinking), thinking)
            thoughts[:n, place] = choose_thought(model, out.thoughts[:, -1], drawn, thinking)
            token, stands = V + thoughts[:n, place, None], thinks[:n, place, None]
    back = longest.argsort()
    return as_laid_out(real, length, thinks[back], thoughts[back], model, thinking), passes


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
        return without_thoughts(real, length, thinking.window), 0
    if thinking.window or model.config.recall or model.training and model.config.dropout:
        raise ValueError("a parallel rollout has all columns in view, no RECALL, and no dropout: a pass must say twice what it said once")
    noise = noise or draw_noise(model, B, T, thinking, generator)
    may_follow = thoughts_may_follow(model, thinking)
    # the first guess is of a model that knows nothing: all numbers zero
    silent = torch.zeros_like(noise.think)  # (B, places)
    run = torch.arange(runs, device=real.device).repeat(T)
    thinks = decide(silent, noise.think, hold_run(run, thinking), thinking) & F.pad(may_follow[real][..., None], (0, runs - 1), value=True).flatten(1)
    thoughts = choose_thought(model, silent[..., None].expand(-1, -1, model.thoughts.head.out_features), noise.thought, thinking)
    rows, settled, passes = torch.arange(B, device=real.device), torch.zeros(B, dtype=torch.long, device=real.device), 0  # rows still in the batch
    while len(rows):
        stream, pointer, run, valid = lay_out(real[rows], length[rows], thinks[rows], thoughts[rows], V)
        out = model.think(stream)
        place, column = (pointer - 1) * runs + run, torch.arange(stream.size(1), device=real.device)
        uniform, chance = noise.at(rows[:, None], place)
        decides = valid & (run < runs) & may_follow[stream] & (column >= settled[:, None])  # settled columns stay, whatever rounding says
        thinks_now = decide(out.thinking(run), uniform, hold_run(run, thinking), thinking)
        thought = choose_thought(model, out.thoughts, chance, thinking)
        was, thought_was = thinks[rows[:, None], place], thoughts[rows[:, None], place]
        wrong = decides & ((thinks_now != was) | thinks_now & (thought != thought_was))
        each = rows[:, None].expand_as(place)[decides], place[decides]
        thinks[each], thoughts[each] = thinks_now[decides], thought[decides]
        unsure = wrong.any(dim=1)
        settled = wrong.int().argmax(dim=1) + 1
        if thinking.mode == "swapped":  # a row depends on the one before it
            unsure, settled = unsure.any().expand_as(unsure), torch.where(unsure, settled, stream.size(1)).min().expand_as(settled)
        rows, settled, passes = rows[unsure], settled[unsure], passes + 1
    return as_laid_out(real, length, thinks, thoughts, model, thinking), passes


def as_laid_out(real: Tensor, length: Tensor, thinks: Tensor, thoughts: Tensor, model: GPT, thinking: Thinking) -> Rollout:
    """The rollout whose rows do at each place what `thinks` and `thoughts` say, see `lay_out`."""
    stream, pointer, run, valid = lay_out(real, length, thinks, thoughts, model.config.vocab_size)
    decides = valid & (run < thinking.max_run) & thoughts_may_follow(model, thinking)[stream]
    thinks = decides & thinks.gather(1, (pointer - 1) * thinking.max_run + run)
    return Rollout(stream, pointer, decides, thinks, torch.zeros_like(thinks), valid, real.clone(), length.clone(), nothing_taken(real), thinking.window)


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


# ----------------------------------------------------------------------------------------------
# passes


class Packing:
    """
    The columns `used` (B, C) bool of B streams, of each row those from one to another, side by side in R rows of W columns; W is the longest row's count.
    For passes over streams of different lengths, or over what is left of them behind a cut.
    """

    def __init__(self, used: Tensor):
        count = used.sum(dim=1).tolist()
        waiting, self.rows, self.width, start = deque(sorted(range(len(count)), key=count.__getitem__)), 0, max(1, *count), [0] * len(count)
        while waiting:
            b = waiting.pop()  # the longest that is left; beside it the shortest, as many as there is room for
            start[b], end = self.rows * self.width, count[b]
            while waiting and end + count[waiting[0]] <= self.width:
                b = waiting.popleft()
                start[b], end = self.rows * self.width + end, end + count[b]
            self.rows += 1
        self.used = used
        place = torch.tensor(start, device=used.device)[:, None] + used.cumsum(dim=1) - 1  # (B, C) where each column goes
        self.place = torch.where(used, place, 0).flatten()  # (B * C,)
        self.column = torch.zeros(self.rows * self.width, dtype=torch.long, device=used.device)  # (R * W,) which column each came from
        self.column[place[used]] = used.flatten().nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (R, W, ...)"""
        return x.flatten(0, 1).index_select(0, self.column).unflatten(0, (self.rows, self.width))

    def unpack(self, x: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        """(R, W, ...) -> (B, C, ...), with the rest where nothing was packed."""
        return torch.where(self.used[(...,) + (None,) * (x.ndim - 2)], x.flatten(0, 1).index_select(0, self.place).unflatten(0, self.used.shape), rest)


def read_packed(model: GPT, roll: Rollout, cut: Tensor | None = None, x: Tensor | None = None, known: Output | None = None) -> Output:
    """
    `read` without what nobody needs: what stands behind a row's end, where that is a quarter of the columns; and, if it is `known` what was said without the
    cuts, what stands before a row's first cut: it would be the same.
    """
    used = roll.valid
    if known is not None and not model.config.recall:  # RECALL sees past a cut
        used = used & ((cut.cumsum(dim=1) > 0) | ~cut.any(dim=1, keepdim=True))
    if used.sum() > 0.75 * used.numel():
        return read(model, roll, cut, x)
    packing = Packing(used)
    out = model(packing.pack(roll.stream if x is None else x), roll.view(cut, packing.pack), position=packing.pack(roll.position))
    return Output(*(packing.unpack(part, rest) for part, rest in zip(out, known or [0.0] * len(out))))
