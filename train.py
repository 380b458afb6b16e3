"""
Train a GPT to think silently, from scratch: rollout, forgetting, hybrid loss, curriculum, loop.

  python train.py                           the main job: chains modulo 5, a minute
  python train.py --think_cost=0.1          any value of `Config` can be changed; --help lists them
  python train.py config/automata.toml --data=FOLDER --out=out/mine      another experiment
  python train.py --resume=true             go on where Ctrl-C stopped it
  torchrun --nproc_per_node=2 train.py      two processes, each with a batch of its own

Writes to `out`: checkpoint.pt, metrics.jsonl, config.json and, at the end, report.json and
report.png (lab/report.py). Not here: the network (model.py) and any task (data/).

Glossary, beside model.py's
  rollout         walking through sequences from left to right, thoughts drawn, real tokens given
  grid            a batch of rollouts: after each real token, slots for what may follow it
  R               thoughts in a row, at most (max_run)
  jump            a place after which all stands further on, as if much lay in between
  level           how hard a sequence is, e.g. how many operations it has
  answer          the tokens of a sequence that count, after its prompt
  text            a piece of running text: all prompt, no answer, and every token counts
  warm-up         until all levels are learned, or for a share of the steps: thoughts cost
                  nothing, and are forced unless the data demonstrate some
  cost phase      what follows (`paid`): the gate decides, and each thought has its price
  try             a rollout in which a gate is not followed at one place, to see what that changes
  demonstration   a sequence whose thoughts the data show
  batch           sequences of the data, with what they demonstrate: Batch in data/dataset.py
"""

import dataclasses
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import runs
from data.dataset import Batch, DataError, Vocabulary, load_meta, load_split, load_vocabulary
from model import GPT, Cells, Output, Thinking, choose_thought, decide, generate, wants_to_think
from options import load_config, option, run

# ----------------------------------------------------------------------------------------------
# config


@dataclass
class Config:  # option(default, help, least, most)
    data: str = option("data/arithmetic", "folder with meta.json, train.bin, val.bin")
    out: str = option("out/chain", "folder for everything that is written")
    plain: str = option("", "folder of a finished plain run, to stand beside this one")
    init_from: str = option("", "begin with the weights in this folder, or hf:NAME of Hugging Face")
    resume: bool = option(False, "go on from the checkpoint in `out`")
    seed: int = option(1, "of everything that is drawn", 0, 2**32)
    device: str = option("auto", "auto, cpu, cuda or mps")
    threads: int = option(0, "CPU threads, 0 for torch's choice", 0)
    compile: bool = option(False, "torch.compile the network")
    block: int = option(64, "tokens of a piece of text; sequences have their own lengths", 1)
    # the network
    n_bits: int = option(8, "bits of a thought; 0 trains a plain GPT", 0, 48)
    n_layer: int = option(1, "layers", 1, 256)
    n_head: int = option(4, "attention heads", 1)
    n_embd: int = option(64, "width", 1, 4096)
    dropout: float = option(0.0, "dropout in training", 0, 0.99)
    observer: str = option("", "layers below the last that it watches, e.g. 0,1, or quarters")
    recall: bool = option(False, "RECALL, a cell that sees past the window")
    revise: float = option(0.0, "share of tokens tried with a wrong one, to teach REVISE", 0, 1)
    window: int = option(0, "positions in view, in training and after; 0 for all", 0)
    # optimisation
    steps: int = option(3500, "optimiser steps, at most; fewer if all levels are learned sooner", 1)
    batch_tokens: int = option(1024, "real tokens a step and process, but for tries", 1)
    lr: float = option(1e-3, "peak learning rate", 0, 1)
    rise: int = option(100, "steps in which rates rise; those of gates, once thoughts cost", 1)
    gate_lr: float = option(2e-2, "peak learning rate of gates and observer", 0, 1)
    weight_decay: float = option(0.01, "of matrices", 0, 1)
    curriculum: bool = option(True, "short sequences first, longer ones once those are mastered")
    # thoughts
    max_run: int = option(1, "thoughts in a row, at most", 1, 64)
    force_think_prob: float = option(1.0, "in the warm-up, of max_run thoughts; of RECALL", 0, 1)
    warm_up: float = option(0.8, "share of the steps, at most, before thoughts cost", 0, 1)
    think_cost: float = option(0.05, "price of a thought, or of a RECALL, in nats", 0)
    forget: float = option(0.8, "share of sequences cut; the others jump. 0: none does", 0, 0.9)
    thinking_weight: float = option(1.0, "weight of token losses of cells that go on to think", 0)
    tries: float = option(0.25, "tries beside each sequence, once thoughts cost", 0, 1)
    horizon: int = option(0, "a thought is rewarded by the loss of so many next tokens; 0: all", 0)
    # habits
    eval_every: int = option(250, "steps between validations, each with a checkpoint", 1)
    eval_rows: int = option(200, "validation sequences a level", 1)
    report: bool = option(True, "write report.json and report.png at the end")


# ----------------------------------------------------------------------------------------------
# the grid


RECALL_SLOT, WRONG_SLOT = -2, -1  # the last two slots of a token


class Grid(NamedTuple):
    """
    Rollouts of B sequences of T real tokens, with S = 1 + R + 2 slots a token: slot 0 holds the
    token, 1 to R the thoughts that follow it, then RECALL, then a wrong token that teaches REVISE.
    Reading order is `flatten(1)`. A present cell of token t predicts token t + 1; but the cell of a
    wrong token predicts REVISE. A sequence's last token is predicted, and never present itself. In
    the network an absent cell takes a place, but nobody sees it.
    """

    token: Tensor  # (B, T, S) ids, which mean something where present, and in all of slot 0
    present: Tensor  # (B, T, S) bool
    asked: Tensor  # (B, T, S) bool: whether to think on was asked here
    tried: Tensor  # (B, T, S) bool: a try: the gate was not followed here; RECALL's, in its slot

    @property
    def thinks(self) -> Tensor:  # (B, T, S) a thought follows this cell
        return self.present & F.pad(self.present[:, :, 1:RECALL_SLOT], (0, 3))

    @property
    def ends(self) -> Tensor:  # (B, T, S) a token or thought that no thought follows
        return F.pad((self.present & ~self.thinks)[:, :, :RECALL_SLOT], (0, 2))

    @property
    def recalls(self) -> Tensor:  # (B, T, S) RECALL follows this cell
        return self.ends & self.present[:, :, RECALL_SLOT, None]

    @property
    def emits(self) -> Tensor:  # (B, T, S) this cell says the next token
        says = F.pad(self.present[:, :, :WRONG_SLOT], (0, 1))  # a wrong token says REVISE
        return says & ~self.thinks & ~self.recalls

    def next_thought(self, V: int) -> Tensor:  # (B, T, S) where a cell thinks: what; else 0
        return (self.token.roll(-1, dims=2) - V) * self.thinks


def may_follow(real: Tensor, after: Tensor | None) -> Tensor:
    """-> (B, T): a thought may follow this token. after (V,): see Thinking."""
    if after is None:
        return torch.ones_like(real, dtype=torch.bool)
    return after.to(real.device)[real]


class GridOutput(NamedTuple):
    """What the cells of a grid put out, (B, T, S, ...); it means something where present only."""

    loss: Tensor  # nats: -log p(the token that comes next), or of REVISE at a wrong token
    right: Tensor  # bool: that is the likeliest
    thoughts: Tensor  # (B, T, S, d)
    gate: Tensor  # logits
    recall: Tensor
    readings: Tensor  # (B, T, S, 3 or 0)
    last: Tensor  # (B, T, S, D)


def empty_grid(model: GPT, real: Tensor, length: Tensor, R: int, wrong: Tensor | None) -> Grid:
    """
    Nothing is thought yet. wrong (B, T): ids of wrong tokens to follow each token, -1: none. Every
    RECALL is present until it is decided, at the end, whether anyone takes it.
    """
    token = real[:, :, None].repeat(1, 1, 1 + R + 2)
    present = torch.zeros_like(token, dtype=torch.bool)
    present[:, :, 0] = torch.arange(real.size(1), device=real.device) + 1 < length[:, None]
    if model.config.recall:
        token[:, :, RECALL_SLOT] = model.config.vocab_size + model.config.n_think
        present[:, :, RECALL_SLOT] = True
    if wrong is not None:
        token[:, :, WRONG_SLOT] = wrong.clamp(min=0)
        present[:, :, WRONG_SLOT] = (wrong >= 0) & present[:, :, 0]
    nowhere = torch.zeros_like(present)
    return Grid(token, present, nowhere, nowhere.clone())


NO_THOUGHT, UNFORCED, THINK = -1, -2, -3  # in `forced`
NO_TRY = -1  # in `tries`, and in `of`
CHUNK = 512  # cells of a stream, about, that go through the network together if nothing is decided


def rollout(
    model: GPT,
    real: Tensor,
    length: Tensor,
    thinking: Thinking,
    generator: torch.Generator | None = None,
    forced: Tensor | None = None,
    cuts: Tensor | None = None,
    jumps: Tensor | None = None,
    wrong: Tensor | None = None,
    tries: Tensor | None = None,
) -> tuple[Grid, GridOutput]:
    """
    Walk all sequences, real (B, T) ids of length (B,), from left to right, every token given. At
    token t the gate is asked for a thought, then after that thought for the next, until no
    sequence thinks; the last thought waits, and goes through the network with token t + 1. Gradient
    flows through all of it: from a loss, through every thought that the model chose, to the cell
    that chose it.
    forced: (B, T, R) thoughts to think there, or NO_THOUGHT, or THINK: one of its own, or UNFORCED:
    as `thinking` says; None: UNFORCED everywhere.
    cuts: (B, T) bool, what follows this token begins a new segment: a thought, if there is one.
    jumps: (B, T) positions by which all that follows this token is moved ahead. Both only at
    tokens that a thought may follow, and in a model that has thoughts.
    wrong: see empty_grid.
    tries: (B, T) where a gate is not followed, see draw_tries.
    """
    (B, T), config, device = real.shape, model.config, real.device
    R, V = thinking.longest_run(config), config.vocab_size
    grid, S = empty_grid(model, real, length, R, wrong), 1 + R + 2
    token, present = grid.token.view(B, T * S), grid.present.view(B, T * S)  # the same memory
    target = F.pad(real[:, 1:], (0, 1))  # (B, T) the next token
    may_be_asked = grid.present[:, :, 0] & may_follow(real, thinking.after)
    beside = [S + RECALL_SLOT] * config.recall + [S + WRONG_SLOT] * (wrong is not None)
    tries = torch.full_like(real, NO_TRY) if tries is None else tries.clone()
    count = segment = torch.zeros_like(length)[:, None]  # (B, 1) cells so far; cuts so far
    cache, echo = None, None
    waiting, done, parts = [], [], []  # cells yet to go through; those that went; what they put out

    def go() -> Output:
        """All waiting cells through the network."""
        nonlocal count, cache, echo
        at = torch.tensor(waiting, device=device)  # (C,) numbers of cells, t * S + slot
        x, here, slot = model.embed(token[:, at]), present[:, at], at % S
        if echo is not None:  # of the thought that waits, which is the first
            x = torch.cat([x[:, :1] + echo[:, None], x[:, 1:]], dim=1)
        lasting = here & (slot <= R)  # RECALL and wrong tokens stand where the next cell will, too
        position = (count + lasting.cumsum(dim=1) - lasting.long()) * here
        cells = Cells(position)
        if R or beside:  # else what is absent comes last, and causal attention hides it
            is_recall = (slot == S + RECALL_SLOT).expand_as(here)
            cells = Cells(position, segment.expand_as(here), lasting, is_recall)
        out = model(x, cells, cache, thinking.window)
        count, cache, echo = count + lasting.sum(dim=1, keepdim=True), out.cache, None
        if not config.recall:  # absent cells, and those beside, take columns, too
            cache = cache.last(thinking.window * (1 + R + len(beside)))
        aim = target[:, at // S].masked_fill(slot == S + WRONG_SLOT, V)
        loss = F.cross_entropy(out.logits.flatten(0, 1), aim.flatten(), reduction="none")
        right = out.logits.argmax(dim=-1) == aim
        parts.append((loss.view_as(aim), right, *out[1:-1]))  # all but logits and cache
        done.append(at)
        waiting.clear()
        return out

    for t in range(int(length.max()) - 1):
        waiting.append(t * S)
        asked = may_be_asked[:, t]
        for r in range(R):
            if not asked.any():
                break
            out = go()
            if jumps is not None and r == 0:
                count = count + jumps[:, t, None]
            h = out.thoughts[:, -1]
            wants = wants_to_think(out, r, thinking, generator)
            tried = asked & ((tries[:, t] == r) | (tries[:, t] > r) & ~wants)
            wants, grid.tried[:, t, r] = wants ^ tried, tried
            tries[:, t] = tries[:, t].masked_fill(tried, NO_TRY)
            thought, echo = choose_thought(model, h, thinking, generator), model.thoughts.echo(h)
            if forced is not None:
                given = forced[:, t, r]
                wants = torch.where(given == UNFORCED, wants, given != NO_THOUGHT)
                thought = torch.where(given >= 0, given, thought)
                echo = echo * (given < 0)[:, None]
            grid.asked[:, t, r] = asked
            asked, cell = asked & wants, t * S + r + 1
            token[:, cell], present[:, cell] = V + thought, asked
            if cuts is not None and r == 0:
                segment = segment + cuts[:, t, None]
            waiting.append(cell)
        waiting += [t * S + slot for slot in beside]
        if len(waiting) >= CHUNK:
            go()
    if waiting:
        go()

    def put(x: Tensor) -> Tensor:  # (B, cells done, ...) -> (B, T, S, ...)
        empty = x.new_zeros(B, T * S, *x.shape[2:])
        return empty.index_copy(1, torch.cat(done), x).unflatten(1, (T, S))

    out = GridOutput(*(put(torch.cat(part, dim=1)) for part in zip(*parts)))
    if config.recall:
        looks = (decide(out.recall, thinking.force_recall, generator) & grid.ends).any(dim=2)
        grid.tried[:, :, RECALL_SLOT] = (tries == RECALL_SLOT) & grid.present[:, :, 0]
        grid.present[:, :, RECALL_SLOT] = looks ^ grid.tried[:, :, RECALL_SLOT]
    return grid, out


# ----------------------------------------------------------------------------------------------
# forgetting


JUMP = 64  # positions, at most


def one_of(places: Tensor, chance: Tensor) -> Tensor:
    """(B, T) bool, and a draw for each -> (B, T) bool: one of a sequence's places, if any."""
    return F.one_hot(chance.masked_fill(~places, -1).argmax(dim=1), places.size(1)).bool() & places


def draw_plan(batch: Batch, thinking: Thinking, share: float, teaches: Tensor) -> dict:
    """
    Where to think, to forget and to jump -> {"forced", "cuts", "jumps"}, for `rollout`.
    Think: where a thought is demonstrated; else after a token with the probability thinking.force;
    if that is None, where the gate wants to in a sequence that `teaches` (B,) and in a text, and
    else after every token.
    Forget: a sequence is cut with the probability `share`, at one of these tokens (of the prompt,
    but not its last). Nothing earlier is visible from there on, so the thought there must carry
    what is needed later; else the prompt could be read again, and it would learn nothing. If the
    gate decides, or in a text, it is cut at each of these tokens with a probability drawn for the
    sequence (from 1 - thinking.force to 1): cut once, a long one would hardly ever need the thought
    at one place.
    Jump: in the others, at one of these tokens, by up to JUMP positions, to practise longer
    distances than the data have. A text does not jump, and nothing does without a share.
    """
    (B, T), device, R = batch.real.shape, batch.real.device, thinking.max_run
    chance = torch.rand(B, T, device=device)  # one draw a token: to think, to be one, to be a cut
    force = 1.0 if thinking.force is None else thinking.force
    thinks = may_follow(batch.real, thinking.after) & (chance >= 1 - force)
    thinks = torch.where(batch.shown[:, None], (batch.thoughts >= 0).any(dim=2), thinks)
    is_text = batch.is_text[:, None]
    decides = (teaches[:, None] | is_text) & (thinking.force is None)
    forced = torch.where(thinks, THINK, NO_THOUGHT).masked_fill(decides, UNFORCED)
    demonstrated = F.pad(batch.thoughts, (0, R - batch.thoughts.size(2)), value=NO_THOUGHT)
    forced = torch.where(batch.shown[:, None, None], demonstrated, forced[:, :, None])

    places = thinks & (torch.arange(T, device=device) + 1 < batch.prompt[:, None])
    one = one_of(places, chance)
    cut = torch.rand(B, 1, device=device) < share
    far = torch.randint(JUMP + 1, (B, 1), device=device)
    many = places & (chance > torch.rand(B, 1, device=device))
    cuts = torch.where(decides | is_text, many, one)
    jumps = (one & ~cut & ~is_text) * far * (share > 0)
    return {"forced": forced, "cuts": cuts & cut, "jumps": jumps}


def draw_tries(batch: Batch, thinking: Thinking, recall: float) -> Tensor:
    """
    One try a sequence -> (B, T): NO_TRY, but at one token that a thought may follow r, 0 to R - 1:
    there the gate is not followed when it is asked for thought number r, or where it stops before.
    Or, with the probability `recall`, RECALL_SLOT, at any token. None in demonstrations.
    """
    (B, T), device, R = batch.real.shape, batch.real.device, thinking.max_run
    looks = torch.rand(B, 1, device=device) < recall
    inside = torch.arange(T, device=device) + 1 < batch.length[:, None]
    places = inside & (looks | may_follow(batch.real, thinking.after)) & ~batch.shown[:, None]
    one = one_of(places, torch.rand(B, T, device=device))
    which = torch.randint(R, (B, 1), device=device).masked_fill(looks, RECALL_SLOT)
    return torch.where(one, which, NO_TRY)


# ----------------------------------------------------------------------------------------------
# the hybrid loss


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of all; the divisor is at least 1."""
    return (x * weight).sum() / weight.sum().clamp(min=1)


def counted_tokens(batch: Batch) -> Tensor:
    """-> (B, T, 1): the token after this one is the answer's; in a text, all are."""
    t = torch.arange(batch.real.size(1), device=batch.real.device)
    return ((t + 1 >= batch.prompt[:, None]) | batch.is_text[:, None])[:, :, None]


def token_loss(loss: Tensor, grid: Grid, counted: Tensor, thinking_weight: float) -> Tensor:
    """
    Mean of the (B, T, S) loss over the cells that emit a token that counts -> scalar. A cell that
    goes on to think, or to RECALL, is charged with a weight for what it would have emitted: so to
    emit is trained even where the gate prefers to think.
    """
    weight = grid.emits + thinking_weight * (grid.thinks | grid.recalls)
    return mean(loss, weight * counted)


def return_to_go(cost: Tensor, grid: Grid, price: float, horizon: int = 0) -> Tensor:
    """
    (B, T, S): minus the (B, T, S) cost of all tokens emitted from this cell on, minus the price of
    all thoughts and RECALLs decided from it on; with a horizon, of so many tokens only.
    """
    reward = -cost * grid.emits - price * (grid.thinks | grid.recalls)
    returns = reward.flatten(1).flip(1).cumsum(dim=1).flip(1).view_as(cost)
    if not horizon:
        return returns
    return returns - F.pad(returns[:, :, 0], (0, horizon))[:, horizon:, None]


def gain(returns: Tensor, of: Tensor) -> Tensor:
    """
    By how much a try did better than what it is a try `of` (B,), which went as the gate wanted: the
    difference of their (B, T, S) returns-to-go from the same token on -> (B, T, 1).
    """
    return (returns - returns[of])[:, :, :1]  # of NO_TRY: some sequence, and not looked at


def gate_loss(logit: Tensor, yes: Tensor, tried: Tensor, gained: Tensor) -> Tensor:
    """
    Mean, over the tries, of a cross-entropy: -log p of what was done if that gained, else of the
    other, times how much was gained or lost. So in the end a logit is positive where yes gains on
    average. Rollouts that label a classifier: Lagoudakis & Parr 2003.
    """
    better = torch.where(gained > 0, yes, ~yes)
    return -mean(gained.abs() * F.logsigmoid(torch.where(better, logit, -logit)), tried)


def observer_loss(readings: Tensor, targets: list[Tensor], known: list[Tensor]) -> Tensor:
    """Squared error of each reading (B, T, S, 3), mean over where its target is known, summed."""
    errors = [(readings[..., i] - target.detach()).square() for i, target in enumerate(targets)]
    return sum(mean(error, where) for error, where in zip(errors, known))


def demonstration_loss(model: GPT, out: GridOutput, grid: Grid, batch: Batch) -> Tensor:
    """-log p of what to think, and of when, where thoughts are demonstrated -> scalar, nats."""
    shown = batch.shown[:, None, None]
    number = grid.next_thought(model.config.vocab_size)
    what = model.thoughts.log_probability(out.thoughts, number)
    when = F.logsigmoid(torch.where(grid.thinks, out.gate, -out.gate))
    return -mean(what, grid.thinks & shown) - mean(when, grid.asked & shown)


def wrong_tokens(batch: Batch, share: float, V: int) -> Tensor:
    """
    Wrong tokens to teach REVISE, for `rollout` -> (B, T) ids, -1: none: those that the data hold,
    and for a share of the tokens that the model may have emitted itself a random other one.
    """
    drawn = (batch.real + torch.randint_like(batch.real, 1, V)) % V
    tried = torch.rand(drawn.shape, device=drawn.device) < share
    wrong = torch.where(batch.wrong >= 0, batch.wrong, torch.where(tried, drawn, -1))
    wrong = F.pad(wrong[:, 1:], (0, 1), value=-1)  # it follows the token before it
    return torch.where(counted_tokens(batch)[:, :, 0], wrong, -1)


def answers_right(out: GridOutput, grid: Grid, counted: Tensor) -> Tensor:
    """-> (B,) bool: every token that counts is the likeliest where it is emitted."""
    return (out.right | ~(grid.emits & counted)).flatten(1).all(dim=1)


def hybrid_loss(model, grid, out: GridOutput, batch, of, config, paid: bool) -> dict:
    """
    Cross-entropy of real tokens, what tries teach the gates, and what REVISE, the observer and
    demonstrations add -> {name: term}; the loss is their sum. of (B,): see Trainer.draw.
    """
    counted, own = counted_tokens(batch), (of == NO_TRY)[:, None, None]  # a try may be a mistake
    terms = {"tokens": token_loss(out.loss, grid, counted & own, config.thinking_weight)}
    if config.revise:
        wrong, real = (grid.present[:, :, slot] & own[:, :, 0] for slot in (WRONG_SLOT, 0))
        share = mean(wrong.float(), real & counted[:, :, 0])  # each weighs about as much as a token
        terms["revise"] = share * mean(out.loss[:, :, WRONG_SLOT], wrong)
    cost = out.loss.detach() * counted
    returns = return_to_go(cost, grid, config.think_cost * paid, config.horizon)
    tried = grid.tried & grid.asked  # the gate's; those of RECALL stand in its slot
    if paid:
        gained = gain(returns, of)
        if model.config.n_bits:
            terms["gate"] = gate_loss(out.gate, grid.thinks, tried, gained)
        if config.recall:
            here = grid.ends & grid.tried[:, :, RECALL_SLOT, None]
            terms["recall"] = gate_loss(out.recall, grid.recalls, here, gained)
    if out.readings.size(-1):
        present = (grid.emits | grid.thinks | grid.recalls) & own
        free = gain(return_to_go(cost, grid, 0.0, config.horizon), of)
        targets = [out.loss, torch.where(grid.thinks, free, -free), -returns]
        terms["observer"] = observer_loss(out.readings, targets, [present, tried, present])
    if batch.thoughts.size(2) and model.config.n_bits:
        terms["demonstrations"] = demonstration_loss(model, out, grid, batch)
    return terms


# ----------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model: GPT, batch: Batch, thinking: Thinking, generator=None):
    """
    The rollout of a batch, and how good it is: a greedy answer is right if and only if each of its
    tokens is the likeliest after the right ones before it. With REVISE the model answers freely.
    -> grid; (B,) bool: the whole answer is right; (B, T) nats of each next token, 0 after the end.
    """
    was_training = model.training
    model.eval()
    grid, out = rollout(model, batch.real, batch.length, thinking, generator)
    right = answers_right(out, grid, counted_tokens(batch))
    if model.config.revise:
        thinks, thoughts = grid.thinks, grid.next_thought(model.config.vocab_size)  # (B, T, S)
        for i, (prompt, end) in enumerate(zip(batch.prompt.tolist(), batch.length.tolist())):
            row, swapped = batch.real[i, :end].tolist(), thinking.mode == "swapped"
            instead = thoughts[i][thinks[i]].tolist() if swapped else None  # it is alone there
            if prompt < end:  # a text has no answer
                given, new = row[:prompt], end - prompt
                said = generate(model, given, new, thinking, generator, instead=instead)
                right[i] = said == row
    model.train(was_training)
    return grid, right, (out.loss * grid.emits).sum(dim=2)


# ----------------------------------------------------------------------------------------------
# the curriculum

POOL = 64  # sequences, at least, that come into use together
MASTERED = 0.9  # share of the newest that is right in training, cut or not, when the next come
LEARNED = 0.97  # the same of all levels, when nothing is left to learn
RATE = 0.2  # of the moving average of that share
PATIENCE = 0.3  # of the steps, for one stage: after that thoughts evidently cannot carry it
FALL = 0.2  # of the steps, the last: they begin when all is learned, or evidently will not be


def pools(count: dict[int, int]) -> list[int]:
    """
    {level: sequences}, shortest level first -> how many levels are in use at each stage: each adds
    as few as hold POOL sequences, the last what is left.
    """
    stages, waiting = [], 0
    for i, sequences in enumerate(count.values(), start=1):
        waiting += sequences
        if waiting >= POOL:
            stages.append(i)
            waiting = 0
    return [*stages[:-1], len(count)]


class Curriculum:
    """
    Short problems first, longer ones when the newest in use are mastered. It counts right answers,
    not nats: what a good loss is differs between tasks. If the newest are not mastered, it gives
    up: all levels come into use, and nothing is cut and nothing jumps any more, so that what no
    thought can carry is learned by looking.
    """

    def __init__(self, count: dict[int, int], grows: bool = True):
        """count: {level: sequences}, shortest first. Without `grows` all are in use at once."""
        self.every, self.grows = list(count), grows
        self.stages = pools(count) if grows else [len(count)]  # levels in use at each stage
        self.stage = int(not grows)  # how many stages are mastered
        self.right = 0.0  # moving average: share of the newest that is right
        self.waited = 0  # steps since the newest came into use
        self.gave_up = False  # they are not learned
        self.learned_at = None  # how many steps it took, once it is done

    @property
    def learned(self) -> bool:
        return self.stage == len(self.stages)

    @property
    def levels(self) -> list[int]:
        """Levels in use."""
        return self.every[: [*self.stages, len(self.every)][self.stage]]

    @property
    def mastered(self) -> list[int]:
        return self.every[: [0, *self.stages][self.stage]]

    @property
    def newest(self) -> list[int]:
        """Levels in use that are not mastered; half of each batch is drawn from them."""
        return self.levels[len(self.mastered) :]

    def grow(self, level: Tensor, right: Tensor) -> None:
        """level (B,); right (B,) bool: answered right."""
        if not self.grows or self.learned_at is not None:
            return
        counted = level >= (self.newest or self.every)[0]
        hits, count = runs.total(torch.stack([(right & counted).sum(), counted.sum()])).tolist()
        if count:
            self.right += RATE * (hits / count - self.right)
        self.waited += 1
        if self.right > MASTERED and not self.learned:
            self.stage, self.right, self.waited = self.stage + 1, 0.5, 0

    def steps_left(self, step: int, steps: int) -> int:
        """Of a run's `steps`, at most: once all levels are learned, only those of FALL."""
        if self.learned_at is None:
            return steps - step
        return min(steps, self.learned_at + math.ceil(FALL * steps)) - step

    def move_on(self, step: int, steps: int) -> bool:
        """After each step -> True if now the newest are given up, and all levels come into use."""
        if self.learned and self.right > LEARNED and self.learned_at is None:
            self.learned_at = step
        late = self.waited > PATIENCE * steps or self.steps_left(step, steps) <= FALL * steps
        late = late and not self.learned and not self.gave_up
        if late:
            self.gave_up, self.right = True, 0.0
            self.stages = self.stages[: self.stage] + [len(self.every)]
        return late


# ----------------------------------------------------------------------------------------------
# the loop

CLIP = 1.0  # largest norm of the gradient
LOG_EVERY = 50


def schedule(step: int, rise: int, rest: float) -> float:
    """
    Share of the peak learning rates, `rest` the share of all steps that is to come: a linear rise,
    then 1, and in the steps of FALL half a cosine down to 0.
    """
    return min(1, (step + 1) / rise) * 0.5 * (1 - math.cos(math.pi * min(1, rest / FALL)))


def how_to_think(config: Config, vocabulary: Vocabulary, paid: bool) -> Thinking:
    """As in training: by the gate once prices or demonstrations have taught it, else forced."""
    force = None if paid else config.force_think_prob
    taught = vocabulary.meta.get("thoughts")
    return Thinking(
        max_run=config.max_run,
        force=None if taught else force,
        force_recall=force,
        after=vocabulary.think_after(),
        window=config.window,
    )


def as_trained(state: dict, vocabulary: Vocabulary) -> Thinking:
    """How the model of a checkpoint thinks, greedily."""
    thinking = how_to_think(trained_config(state), vocabulary, state["progress"]["paid"])
    return dataclasses.replace(thinking, greedy=True)


def trained_config(state: dict) -> Config:
    """The config of a checkpoint. Raises DataError if its keys are not today's."""
    try:
        return Config(**state["config"])
    except TypeError:
        raise DataError("the checkpoint was written by another version of train.py") from None


class Trainer:
    def __init__(self, config: Config):
        """Raises DataError."""
        self.config, self.device = config, runs.pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        runs.prepare_data(config.data)
        self.vocabulary = load_vocabulary(load_meta(config.data))
        self.rows = load_split(config.data, "train", self.vocabulary, config.block)
        self.val_rows = load_split(config.data, "val", self.vocabulary, config.block)
        told = self.rows.first(1, self.rows.levels[0]).thoughts.size(2)
        symbols = len(self.vocabulary.meta.get("thoughts", []))
        if config.n_bits and (told > config.max_run or symbols > 2**config.n_bits):
            message = f"the data demonstrate {symbols} thoughts, up to {told} in a row: more than"
            raise DataError(f"{message} n_bits = {config.n_bits}, max_run = {config.max_run} hold")
        if config.n_bits and config.window == 1:
            raise DataError("window = 1 shows a cell only itself: no thought would be read later")
        torch.manual_seed(config.seed)
        self.model = runs.first_model(config, self.vocabulary).to(self.device)
        self.network = torch.compile(self.model, dynamic=True) if config.compile else self.model
        self.optimisers = self.model.optimisers(config.lr, config.gate_lr, config.weight_decay)
        self.clipped = [], []  # all else, and what decides: one must not shrink the other
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        apart = {p for group in groups if group["apart"] for p in group["params"]}
        for p in self.model.parameters():
            self.clipped[p in apart].append(p)
        grows = config.curriculum and not self.vocabulary.is_text  # which has no answers to master
        self.curriculum = Curriculum(self.rows.count, grows)
        self.step, self.seconds = 0, 0.0
        self.paid = 0  # steps of the cost phase, with this one

    @property
    def thinking(self) -> Thinking:
        return how_to_think(self.config, self.vocabulary, self.paid)

    def draw(self) -> tuple[Batch, dict, Tensor]:
        """
        A batch of the levels in use -> batch; plan, see draw_plan; (B,) the number of the sequence
        that each is a try of, or NO_TRY. Tries are the last n, copies of the first n with their
        plan; in these 2 n the gate decides. The others think after every token; but in a text the
        gate decides there, too, so that its silence stays trained.
        """
        c, levels, device = self.config, self.curriculum.levels, self.device
        size = max(1, c.batch_tokens // self.rows.longest(levels[-1]))
        n = int(c.tries * size) if self.paid else 0
        batch = self.rows.draw(size, levels, None, len(self.curriculum.newest)).to(device)
        number, gave_up = torch.arange(size, device=device), self.curriculum.gave_up
        plan = draw_plan(batch, self.thinking, c.forget * (not gave_up), number < n)
        # a window would hide what is before a jump, learned positions have no room for it
        plan["jumps"] *= not c.window and self.model.position is None
        which, of = torch.cat([number, number[:n]]), F.pad(number[:n], (size, 0), value=NO_TRY)
        batch, plan = batch.rows(which), {name: x[which] for name, x in plan.items()}
        if n:
            recall = c.recall * (0.5 if c.n_bits else 1.0)
            plan["tries"] = draw_tries(batch, self.thinking, recall)
            plan["tries"][:size] = NO_TRY
        return batch, plan, of

    def train_step(self) -> dict:
        c = self.config
        # each step seeds its own random numbers: a resumed run draws what a whole one would
        torch.manual_seed(hash((c.seed, self.step, runs.RANK)))
        batch, plan, of = self.draw()
        wrong = wrong_tokens(batch, c.revise, self.model.config.vocab_size) if c.revise else None
        use_bf16 = self.device == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(self.device, torch.bfloat16, enabled=use_bf16):
            how = self.network, batch.real, batch.length, self.thinking
            grid, out = rollout(*how, wrong=wrong, **plan)
            terms = hybrid_loss(self.model, grid, out, batch, of, c, self.paid > 0)
        self.update(sum(terms.values()))
        right = answers_right(out, grid, counted_tokens(batch))
        self.curriculum.grow(batch.level.masked_fill(of != NO_TRY, -1), right)  # a try is of none
        tokens = int(grid.emits.sum())
        log = {"step": self.step, "paid": self.paid > 0, "level": int(batch.level.max())}
        log |= {"loss": terms.pop("tokens").item()}
        log |= {f"loss_{name}": term.item() for name, term in terms.items()}
        shown = out.right[grid.emits] if self.vocabulary.is_text else right  # tokens, or answers
        log |= {"right": shown.float().mean().item(), "tokens": tokens}
        log |= {"thoughts_per_token": int(grid.thinks.sum()) / tokens}
        log |= {"recalls_per_token": int(grid.recalls.sum()) / tokens}
        self.step += 1
        self.next_phase()
        return log

    def update(self, loss: Tensor) -> None:
        """Backward, clip, one step of the optimiser. Raises FloatingPointError."""
        c = self.config
        for optimiser in self.optimisers:
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                # gates rise anew once thoughts cost: what is asked then is new to the network, and
                # until it knows it tries mislead them
                step = self.paid - 1 if group["apart"] and self.paid else self.step
                group["lr"] = group["peak_lr"] * schedule(step, c.rise, self.left / c.steps)
        loss.backward()
        if runs.WORLD > 1:
            runs.average_gradients(self.model)
        norms = [torch.nn.utils.clip_grad_norm_(some, CLIP).item() for some in self.clipped]
        if not math.isfinite(loss.item() + sum(norms)):
            message = f"the loss is {loss.item()}, its gradient {norms}, at step {self.step}"
            raise FloatingPointError(f"{message}: a lower --lr may help; this step is not saved")
        for optimiser in self.optimisers:
            optimiser.step()

    @property
    def left(self) -> int:
        return self.curriculum.steps_left(self.step, self.config.steps)

    def next_phase(self) -> None:
        """
        After each step. When all levels are learned no more than FALL of the steps are left, in
        which the learning rate falls. Levels that evidently will not be learned come into use all
        the same. Thoughts cost once fewer than 1 - warm_up of the steps are left: by default,
        while the learning rate falls.
        """
        c = self.config
        if self.curriculum.move_on(self.step, c.steps) and runs.RANK == 0:
            what = f"level {self.curriculum.newest[0]} is not learned after {self.step} steps"
            print(f"{what}: all levels are in use, and nothing is cut any more", flush=True)
        if (c.n_bits or c.recall) and self.left < (1 - c.warm_up) * c.steps:  # warm_up 1: never
            self.paid += 1

    def validate(self) -> dict:
        """{level: share of answers right, or nats a token where there is none}, greedy."""
        generator, result = torch.Generator(self.device).manual_seed(0), {}
        thinking = dataclasses.replace(self.thinking, greedy=True)
        for level in self.val_rows.levels:
            batch = self.val_rows.first(self.config.eval_rows, level).to(self.device)
            _, right, loss = evaluate(self.model, batch, thinking, generator)
            nats = loss.sum() / (batch.length - 1).sum()
            value = nats if batch.is_text.all() else right.float().mean()
            result[level] = round(value.item(), 4)
        return result

    def state(self) -> dict:
        """Everything that a resumed run needs to equal one that was never stopped."""
        return {
            "config": dataclasses.asdict(self.config),
            "network": dataclasses.asdict(self.model.config),
            "meta": self.vocabulary.meta,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": {"step": self.step, "seconds": self.seconds, "paid": self.paid},
            "curriculum": vars(self.curriculum),
            "mastered": self.curriculum.mastered,
        }

    def load_state(self, state: dict) -> None:
        """Raises DataError."""
        if state["meta"] != self.vocabulary.meta:
            message = f"the checkpoint was trained on other data than {self.config.data} holds now"
            raise DataError(message)
        if state["network"] != dataclasses.asdict(self.model.config):
            raise DataError("the checkpoint is of another shape than the config asks for")
        self.model.load_state_dict(state["model"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"]):
            rates = optimiser.state_dict()["param_groups"]  # as the config says now
            optimiser.load_state_dict(kept | {"param_groups": rates})
        for name, value in state["progress"].items():
            setattr(self, name, value)
        vars(self.curriculum).update(state["curriculum"])


def progress_line(log: dict, rate: float, seconds: float) -> str:
    phase = "costs" if log["paid"] else "warm-up"
    return (
        f"step {log['step']:5d}  {phase:7s}  level {log['level']:2d}  loss {log['loss']:.3f}  "
        f"right {log['right']:.2f}  thoughts/token {log['thoughts_per_token']:.2f}  "
        f"{rate:,.0f} tokens/s  at most {seconds:.0f} s left"
    )


def train(trainer: Trainer) -> bool:
    """The loop -> False if Ctrl-C ended it early."""
    config, out = trainer.config, Path(trainer.config.out)
    began, busy, tokens, since = time.monotonic() - trainer.seconds, 0.0, 0, 0
    file = os.devnull if runs.RANK else out / "metrics.jsonl"
    with open(file, "a", buffering=1) as metrics, runs.interruptible() as interrupted:
        last = stopped = False
        while not (last or stopped):
            mark, log = time.monotonic(), trainer.train_step()
            busy, since = busy + time.monotonic() - mark, since + 1
            tokens += log.pop("tokens")
            trainer.seconds = time.monotonic() - began
            last, stopped = trainer.left <= 0, interrupted()
            checks = trainer.step % config.eval_every == 0 or last
            logs = trainer.step % LOG_EVERY == 0 or last
            if runs.RANK:
                continue
            if logs:
                print(progress_line(log, tokens / busy, busy / since * trainer.left), flush=True)
                busy, tokens, since = 0.0, 0, 0
            if checks:
                log["validation"] = trainer.validate()
                values = "  ".join(f"{k}: {a:.3f}" for k, a in log["validation"].items())
                print(f"  validation by level: {values}", flush=True)
            if checks or logs:
                metrics.write(json.dumps(log | {"seconds": round(trainer.seconds, 2)}) + "\n")
            if checks or stopped:
                runs.save_checkpoint(out / "checkpoint.pt", trainer.state())
    return last


def what_was_learned(trainer: Trainer) -> str:
    """One line about levels and price."""
    learned, every = trainer.curriculum.mastered, trainer.curriculum.every
    line = f"learned: levels {learned[0]} to {learned[-1]}" if learned else "no level was learned"
    if len(learned) < len(every):
        line += f"; not learned: {every[len(learned)]} to {every[-1]}"
    if not trainer.curriculum.grows:
        line = "all levels were in use from the start"
    costless = trainer.config.n_bits and not trainer.paid
    return line + ("; thoughts never cost anything" if costless else "")


def begin(trainer: Trainer) -> None:
    """Go on from what lies in `out`, or prepare it for a new run. Raises DataError."""
    config = trainer.config
    if config.plain:
        runs.load_checkpoint(config.plain)  # if it is not there, say so now
    if config.resume:
        trainer.load_state(runs.load_checkpoint(config.out, trainer.device))
        if trainer.left <= 0:
            raise DataError(f"{config.out} is at step {trainer.step} already: give more --steps")
    if runs.RANK == 0:
        runs.prepare_out(config, trainer.step)
        shape, count = trainer.model.config, sum(p.numel() for p in trainer.model.parameters())
        size = f"{count:,} parameters, {shape.n_layer} layers, thoughts of {shape.n_bits} bits"
        where = f"{trainer.device}, {torch.get_num_threads()} threads"
        print(f"{trainer.vocabulary.meta['task']}; {size}; {where}", flush=True)


def main(argv: list[str]) -> None:
    config = load_config(argv, Config)
    with runs.processes(config.device):
        trainer = Trainer(config)
        begin(trainer)
        finished = train(trainer)
    if runs.RANK:
        return
    if not finished:
        again = f"python {shlex.join([sys.argv[0], *argv])} --resume=true"
        sys.exit(f"stopped at step {trainer.step} and saved; go on with: {again}")
    print(f"{what_was_learned(trainer)}\ntrained in {trainer.seconds:.0f} s", flush=True)
    if config.report:
        from lab import report  # what a run ends with; nothing here depends on it

        report.main([f"--run={config.out}", f"--plain={config.plain}"])


if __name__ == "__main__":
    run(main, "train.py")
