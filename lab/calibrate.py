"""
Is the observer right, and does anyone listen to it? calibration.json, from a checkpoint.

  python lab/calibrate.py --run=out/observer     a minute or two on one CPU thread

Measured on held-out sequences, with greedy thoughts. A reading is taken at a cell that has not
seen what it is about. Beside it stands what one would use without an observer: entropy and largest
probability of the next token, the gate's logit, and a linear probe of the last layer (ridge
regression on training sequences, to the same target).

  predicted_loss     Spearman's rank correlation with the real loss of the next token
  cost_to_go         the same with the real cost to go
  wrong              will the next token of an answer, right so far, be wrong? Area under the ROC
                     curve, at levels with 50% to 95% right answers
  value_of_thinking  will a thought here pay for itself? Known by intervention: two rollouts that
                     differ in this one decision. Area under the ROC curve, rank correlation
  blinded            answers right, or nats a token, and thoughts a sequence, with the observer's
                     output zeroed or swapped with another sequence's: for the gates, or for all
  steered            the same where the gate is not asked: a thought wherever the observer expects
                     more of it than a price

Not here: what the observer looks at (observe.py). Reference: Mann & Whitney 1947, the area as a
statistic of ranks.
"""

import dataclasses
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs
import train
from data.dataset import Batch, DataError, Rows, load_split
from model import GPT, READINGS, Thinking

PRICES = (-10.0, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # nats; at -10 it always thinks
LONGEST = 32  # level up to which errors are predicted
RIDGE = 0.1
RIVALS = ("entropy", "largest probability")


@dataclass
class CalibrateConfig:
    run: str = train.option("out/observer", "folder of the checkpoint, and of calibration.json")
    rows: int = train.option(500, "held-out sequences a level, or windows of a text", 1)


@dataclass
class Subject:
    """A model, and how it was trained: what all questions need."""

    model: GPT
    thinking: Thinking  # greedy
    trained: train.Config
    probe: Tensor | None = None  # (D + 1, 2), from the last layer to loss and cost to go


# ----------------------------------------------------------------------------------------------
# ranks


def ranks(x: Tensor) -> Tensor:
    """(N,) -> (N,) ranks from 1; equal values share their mean rank."""
    _, place, count = x.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1).double() / 2)[place]


def auroc(score: Tensor, event: Tensor) -> float:
    """P(score of an event > score of a non-event), ties counted half; nan without one of them."""
    positive, negative = int(event.sum()), int((~event).sum())
    if not positive or not negative:
        return math.nan
    above = ranks(score)[event].sum() - positive * (positive + 1) / 2
    return (above / (positive * negative)).item()


def spearman(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


# ----------------------------------------------------------------------------------------------
# what could be known at a cell, and what came of it


@torch.no_grad()
def look(subject: Subject, batch: Batch) -> tuple[train.Grid, dict[str, Tensor]]:
    """
    A rollout, and for each of its cells (B, T, S): the readings and their rivals, higher where more
    trouble is expected; "loss" of the next token and "cost" to go, nats, and "right"; "own", the
    number of the thought it would think; "last" (B, T, S, D), what the token logits are made of.
    """
    model, trained = subject.model, subject.trained
    grid, out = train.rollout(model, batch.real, batch.length, subject.thinking)
    p = model.head(out.last).softmax(dim=-1)
    cost = out.loss * train.counted_tokens(batch)
    found = dict(zip(READINGS, out.readings.unbind(dim=-1)))
    found |= {"entropy": torch.special.entr(p).sum(dim=-1), "largest probability": -p.amax(dim=-1)}
    found |= {"gate": out.gate, "loss": out.loss, "right": out.right, "last": out.last}
    found["cost"] = -train.return_to_go(cost, grid, trained.think_cost, trained.horizon)
    if model.thoughts is not None:
        found["own"] = model.thoughts.likeliest(out.thoughts)
    if subject.probe is not None:
        probes = F.pad(out.last, (0, 1), value=1.0) @ subject.probe  # (B, T, S, 2)
        found["probe of loss"], found["probe of cost"] = probes.unbind(dim=-1)
    return grid, found


def fit_probe(subject: Subject, split) -> Tensor:
    """Ridge regression from the last layer to loss and cost to go -> weights (D + 1, 2)."""
    size = 1000 if isinstance(split, Rows) else 200
    grid, found = look(subject, split.draw(size, split.levels, torch.Generator().manual_seed(0)))
    x = F.pad(found["last"], (0, 1), value=1.0)[grid.present].double()  # (N, D + 1)
    y = torch.stack([found["loss"], found["cost"]], dim=-1)[grid.present].double()  # (N, 2)
    ridge = RIDGE * torch.eye(x.size(1), dtype=torch.double)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ----------------------------------------------------------------------------------------------
# the questions


def correlations(subject: Subject, split, rows: int) -> dict:
    """{reading: {sign: rank correlation with what is read}}, over all cells that emit."""
    parts, result = [], {}
    for level in split.levels:
        grid, found = look(subject, split.first(rows, level))
        parts.append({name: value[grid.emits] for name, value in found.items()})
    signs = joined(parts)
    for reading, truth in (("predicted_loss", "loss"), ("cost_to_go", "cost")):
        names = (reading, f"probe of {truth}", *RIVALS)
        result[reading] = {name: spearman(signs[name], signs[truth]) for name in names}
        result[reading]["bias"] = (signs[reading] - signs[truth]).mean().item()
    return result


def wrong(subject: Subject, splits: list[Rows], rows: int) -> dict:
    """{level: {"accuracy", sign: area}} for levels that are neither easy nor hopeless."""
    result = {}
    levels = [(level, split) for split in splits for level in split.levels if level <= LONGEST]
    for level, split in levels:
        batch = split.first(rows, level)
        grid, found = look(subject, batch)
        asked = grid.emits & train.counted_tokens(batch)  # (B, T, S), one cell of a token at most
        so_far = (found["right"] | ~asked).all(dim=2).int().cumprod(dim=1).bool()  # (B, T)
        accuracy = so_far[:, -1].float().mean().item()
        if not 0.5 <= accuracy <= 0.95:
            continue
        asked = asked & F.pad(so_far[:, :-1], (1, 0), value=True)[:, :, None]
        error, signs = ~found["right"][asked], ("predicted_loss", "probe of loss", *RIVALS)
        areas = {sign: auroc(found[sign][asked], error) for sign in signs}
        result[level] = {"accuracy": accuracy} | areas
    return result


@torch.no_grad()
def intervene(subject: Subject, batch: Batch, own: Tensor, cell: Tensor) -> Tensor:
    """
    Two rollouts of each sequence that differ in one decision, at cell t * R + slot, cell (B,): what
    the tokens of training's horizon cost without a thought there less what they cost with it ->
    (B,), nats. own (B, T, S): the number of the thought that it would think at each cell.
    """
    (B, T), R, trained = batch.real.shape, own.size(2) - 3, subject.trained
    own = own[:, :, :R].flatten(1).gather(1, cell[:, None])  # (B, 1)
    later = torch.arange(T) - (cell // R)[:, None]  # (B, T) tokens since then
    near = (later >= 0) & (later < (trained.horizon or T))
    counted, costs = train.counted_tokens(batch)[:, :, 0] & near, []
    for told in (torch.full_like(own, train.NO_THOUGHT), own):
        forced = torch.full((B, T * R), train.UNFORCED).scatter(1, cell[:, None], told)
        how = subject.model, batch.real, batch.length, subject.thinking
        grid, out = train.rollout(*how, forced=forced.view(B, T, R))
        loss = out.loss * grid.emits
        costs.append((loss.sum(dim=2) * counted).sum(dim=1))
    return costs[0] - costs[1]


def values(subject: Subject, split, rows: int) -> dict:
    """At one cell of each sequence, drawn from those where the gate is asked."""
    generator, parts = torch.Generator().manual_seed(1), []
    for level in split.levels:
        batch = split.first(rows, level)
        grid, found = look(subject, batch)
        asked = grid.asked[:, :, :-3].flatten(1)  # (B, T * R)
        cell = (torch.rand(asked.shape, generator=generator) * asked).argmax(dim=1)  # (B,)
        part = {"known": intervene(subject, batch, found["own"], cell)}
        for sign in ("value_of_thinking", "predicted_loss", "gate", *RIVALS):
            part[sign] = found[sign][:, :, :-3].flatten(1).gather(1, cell[:, None])[:, 0]
        parts.append({name: value[asked.any(dim=1)] for name, value in part.items()})
    signs = joined(parts)
    known = signs.pop("known")  # (N,) nats
    pays = known > subject.trained.think_cost
    result = {"cells": len(known), "mean": known.mean().item(), "pays": pays.float().mean().item()}
    for name, sign in signs.items():
        result[name] = {"area": auroc(sign, pays), "correlation": spearman(sign, known)}
    return result


@contextmanager
def blinded(model: GPT, how: str, gates_only: bool = False):
    """Within, the observer's output is "zeroed" or "swapped": for the gates, or for all."""
    D = model.config.n_embd

    def blind(_module, inputs):  # (B, C, D + hs): what was sensed is at the end
        x, sensed = inputs[0][..., :D], inputs[0][..., D:]
        sensed = torch.zeros_like(sensed) if how == "zeroed" else sensed.roll(1, dims=0)
        return torch.cat([x, sensed], dim=-1)

    listen = [model.gate, model.recall_gate]
    listen += [] if gates_only else [model.blocks[-1].attention.proj]
    hooks = [m.register_forward_pre_hook(blind) for m in listen if m is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scores(subject: Subject, split, rows: int, **changes) -> dict:
    """Answers right, or nats a token, and thoughts a sequence: mean over all trained levels."""
    parts, thinking = [], dataclasses.replace(subject.thinking, **changes)
    for level in split.levels:
        batch, generator = split.first(rows, level), torch.Generator().manual_seed(level)
        grid, right, loss = train.evaluate(subject.model, batch, thinking, generator)
        score = right.double() if isinstance(split, Rows) else loss.sum(1) / (batch.length - 1)
        parts.append([score.mean().item(), int(grid.thinks.sum()) / len(right)])
    score, thoughts = torch.tensor(parts).mean(dim=0).tolist()
    return {"score": score, "thoughts": thoughts}


def blind(subject: Subject, split, rows: int) -> dict:
    """{what is taken away: `scores`}"""
    result = {"nothing": scores(subject, split, rows)}
    for how in ("zeroed", "swapped"):
        for name, gates_only in ((f"{how} for the gates", True), (how, False)):
            with blinded(subject.model, how, gates_only):
                result[name] = scores(subject, split, rows)
    return result


def calibrate(config: CalibrateConfig) -> dict:
    """All questions that apply -> {question: answers}. Raises DataError."""
    model, vocabulary, state = runs.load_model(config.run)
    trained, rows, few = train.trained_config(state), config.rows, max(1, config.rows // 5)
    if not model.config.observer:
        message = f"the model in {config.run} has no observer: train one with --observer=quarters"
        raise DataError(message)
    names = [n for n in ("train", "val", "test") if Path(trained.data, f"{n}.bin").exists()]
    learned, *splits = [load_split(trained.data, n, vocabulary, trained.block) for n in names]
    paid = state["progress"]["paid"]
    if not paid:
        trained.think_cost = 0.0  # as the observer learned it
    subject = Subject(model, train.as_trained(state, vocabulary), trained)
    subject.probe = fit_probe(subject, learned)
    result = {"seed": trained.seed, "steps": state["progress"]["step"]}
    result |= correlations(subject, splits[0], rows)
    if isinstance(learned, Rows):
        result["wrong"] = wrong(subject, splits, rows)
    result["blinded"] = blind(subject, splits[0], few)
    if model.config.n_bits and paid:
        result["value_of_thinking"] = values(subject, splits[0], rows)
        result["steered"] = {p: scores(subject, splits[0], few, price=p) for p in PRICES}
    return result


def main(argv: list[str]) -> None:
    config = train.load_config(argv, CalibrateConfig)
    result = calibrate(config)
    Path(config.run, "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, part in result.items():
        print(f"{name:18s} {json.dumps(part)}")


if __name__ == "__main__":
    train.run(main, "lab/calibrate.py")
