"""
Is the observer right, and does anyone listen to it? calibration.json, from a checkpoint with an observer head.

  python calibrate.py --run=out/observer

Everything is asked *before* the answer is seen: of the column that is about to say it. Rows are held out, dropout is off, thinking is
greedy where it is not said otherwise. Beside the observer stand what one would use without it: entropy and largest probability of the words,
the gate, and a linear probe of the last layer (ridge regression on training rows, to the same target).

  wrong    will the next token of this answer, right so far, be wrong? Area under the ROC curve at lengths of 50% to 95% right answers
  pays     will a thought here pay for itself? Known by doing both: two rollouts that differ in one decision. Area under the ROC curve
  places   what a thought is worth behind the first token of a prompt, in its middle, behind the last but one and behind the last
  loss     predicted against real loss of the next token, Spearman's rank correlation
  blind    accuracy, or nats a token, and thoughts with the head's output zeroed or swapped with another row's, for all or for the gate alone
  steered  the same when the gate is not asked: a thought wherever the observer expects more of it than a price, for several prices
  variance of the gate's policy gradient with each baseline, as a share of that with none; one frozen model, the same rollouts
  cost     parameters, and seconds of a forward and backward pass, as ratios to the same model without the head (median of alternating passes)
  notes    what the first note foretold: does confusion go with divergence in the middle layers, does sudden convergence announce a right token, and does
           the observer look elsewhere than its neighbours?
"""

import dataclasses
import json
import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Batch, DataError, Rows, Text, load_split
from loss import baseline, evaluate, log_choice, policy_gradient, return_to_go, targets, token_loss, word_loss
from model import GPT
from observe import attention_pattern, look
from runs import Config, as_trained, load_config, load_model, run
from sample import steered
from stream import Rollout, Thinking, read, rollout

PRICES = (-10.0, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # nats a thought; at the first one it always thinks


@dataclass
class CalibrationConfig:
    run: str = "out/observer"  # folder of the checkpoint; calibration.json is written there
    rows: int = 500  # held-out rows a level, or windows of a text
    batches: int = 100  # for the variance


# ----------------------------------------------------------------------------------------------
# ranks


def ranks(x: Tensor) -> Tensor:
    """(N,) -> (N,) ranks from 1, equal values sharing their mean rank."""
    _, place, count = x.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1).double() / 2)[place]


def auroc(score: Tensor, event: Tensor) -> float:
    """P(score of an event > score of a non-event), ties counted half (Mann & Whitney 1947); nan where there is only one kind."""
    positive, negative = int(event.sum()), int((~event).sum())
    if not positive or not negative:
        return math.nan
    return ((ranks(score)[event].sum() - positive * (positive + 1) / 2) / (positive * negative)).item()


def spearman(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


# ----------------------------------------------------------------------------------------------
# signs: what could be known at a column, before the next token


@torch.no_grad()
def signs(model: GPT, roll: Rollout) -> tuple[dict[str, Tensor], Tensor]:
    """-> {name: (B, C)}, higher where more trouble is expected, with the real "loss" beside them, and the last layer's output (B, C, n_embd)."""
    last = []
    hook = model.norm.register_forward_hook(lambda _m, _x, y: last.append(y))
    out = read(model, roll)
    hook.remove()
    p = out.words.softmax(dim=-1)
    found = {"entropy": -torch.xlogy(p, p).sum(-1), "largest probability": -p.max(-1).values, "gate": out.gate, "loss": word_loss(out.words, roll)}
    return found | dict(zip(("observer", "worth", "ahead"), out.readings.unbind(-1))), last[0]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def fit_probe(model: GPT, rows: Rows | Text, thinking: Thinking, generator) -> Tensor:
    """Ridge regression from the last layer to the coming loss, on rows of training -> (n_embd + 1,)."""
    batch = rows.draw(1000 if isinstance(rows, Rows) else 200, rows.levels, generator)
    roll = rollout(model, batch.real, batch.length, thinking, generator)
    found, last = signs(model, roll)
    x, y = with_one(last)[roll.valid].double(), found["loss"][roll.valid].double()
    return torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.size(1)).double(), x.T @ y).float()


# ----------------------------------------------------------------------------------------------
# the questions


def wrong(model: GPT, splits: list, thinking: Thinking, probe: Tensor, rows: int) -> dict:
    """{level: {"accuracy", sign: area under the ROC curve}} for levels that are neither easy nor hopeless."""
    result = {}
    for split, level in ((split, level) for split in splits for level in split.levels if level <= 32):
        batch = split.first(rows, level)
        roll, right = evaluate(model, batch, thinking, torch.Generator().manual_seed(level))
        if not 0.5 <= (accuracy := right.float().mean().item()) <= 0.95:
            continue
        found, last = signs(model, roll)
        found["probe"] = with_one(last) @ probe
        same = F.pad(roll.real == batch.real, (0, 1), value=True)  # (B, T + 1)
        right_so_far = same.cumprod(dim=1).bool().gather(1, roll.pointer - 1)  # (B, C)
        asked = (roll.pointer >= batch.prompt[:, None]) & roll.speaks & right_so_far
        error = ~same.gather(1, roll.pointer)[asked]
        areas = {name: auroc(found[name][asked], error) for name in ("observer", "probe", "largest probability", "entropy")}
        result[level] = {"accuracy": accuracy} | areas
    return result


@contextmanager
def decided(model: GPT, column: Tensor, thinks: bool):
    """Within, the gate is told what to do at `column` (B,) of each row, and asked everywhere else."""
    seen = [0]

    def tell(_module, _x, gate):  # (B, C, 1)
        here = torch.arange(seen[0], seen[0] + gate.size(1)) == column[:, None]
        seen[0] += gate.size(1)
        return torch.where(here[..., None], 1e4 if thinks else -1e4, gate)

    hook = model.gate.register_forward_hook(tell)
    try:
        yield
    finally:
        hook.remove()


def worth(model: GPT, batch: Batch, roll: Rollout, column: Tensor, thinking: Thinking, config: Config) -> Tensor:
    """
    Two greedy rollouts of each row that differ in one decision, at `column` (B,) of `roll`: what the tokens from there on cost without that
    thought less what they cost with it (weighted as in training, over `horizon` tokens) -> (B,), nats.
    """
    place, cost = roll.pointer.gather(1, column[:, None]), []  # (B, 1) the next real token there
    weight = torch.where(torch.arange(1, batch.real.size(1)) >= batch.prompt[:, None], 1.0, config.prompt_weight)
    later = torch.arange(1, batch.real.size(1)) - place  # (B, T - 1)
    counted = (later >= 0) & ((later < config.horizon) | (config.horizon == 0))
    for thinks in (False, True):
        with decided(model, column, thinks):
            other = rollout(model, batch.real, batch.length, thinking, torch.Generator().manual_seed(2))
        cost.append((token_loss(model, other) * weight * counted).sum(dim=1))
    return cost[0] - cost[1]


def pays(model: GPT, split: Rows | Text, thinking: Thinking, config: Config, rows: int) -> dict:
    """The worth of a thought at one column of each row, drawn from those where the gate was asked; it pays if that is above the price."""
    generator, worths, found_all = torch.Generator().manual_seed(1), [], []
    for level in split.levels:
        batch = split.first(rows if isinstance(split, Text) else rows // 2, level)
        roll = rollout(model, batch.real, batch.length, thinking, generator)
        column = torch.where(roll.decides, torch.rand(roll.decides.shape, generator=generator), -1).argmax(dim=1)
        worths.append(worth(model, batch, roll, column, thinking, config))
        found_all.append({name: sign.gather(1, column[:, None])[:, 0] for name, sign in signs(model, roll)[0].items()})
    known = torch.cat(worths)
    found = {name: torch.cat([f[name] for f in found_all]) for name in found_all[0]}
    event = known > config.think_cost
    areas = {name: auroc(found[name], event) for name in ("worth", "observer", "entropy", "largest probability", "gate")}
    return {"share": event.float().mean().item(), "columns": len(known)} | areas | {"correlation": spearman(found["worth"], known)}


def places(model: GPT, split: Rows, thinking: Thinking, config: Config, rows: int) -> dict:
    """{level: {behind which token of the prompt: mean worth of one thought there, nats, all other decisions left to the gate}}."""
    result = {}
    for level in split.levels:
        batch = split.first(rows, level)
        roll = rollout(model, batch.real, batch.length, thinking, torch.Generator().manual_seed(0))
        result[level] = {}
        for name, place in (("first", 0 * batch.prompt), ("middle", batch.prompt // 2 - 1), ("last but one", batch.prompt - 2), ("last", batch.prompt - 1)):
            column = ((roll.pointer - 1 == place[:, None]) & roll.holds_real & roll.valid).int().argmax(dim=1)
            result[level][name] = worth(model, batch, roll, column, thinking, config).mean().item()
    return result


def loss_ranks(model: GPT, splits: list, thinking: Thinking, probe: Tensor, rows: int) -> dict:
    """Spearman's correlation of each sign with the real loss of the next token, over all columns that speak."""
    parts = []
    for level in splits[0].levels:
        batch = splits[0].first(rows, level)
        roll = rollout(model, batch.real, batch.length, thinking, torch.Generator().manual_seed(0))
        found, last = signs(model, roll)
        found["probe"] = with_one(last) @ probe
        parts.append({name: sign[roll.speaks] for name, sign in found.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    names = ("observer", "probe", "entropy", "largest probability")
    bias = (joined["observer"].mean() - joined["loss"].mean()).item()
    return {"columns": len(joined["loss"]), "bias_nats": bias} | {name: spearman(joined[name], joined["loss"]) for name in names}


@contextmanager
def blinded(model: GPT, how: str, gate_only: bool = False):
    """Within, the observer's output is zeroed or swapped with the next row's: for the gate alone, or for the words and the readings, too."""
    attention, D = model.blocks[-1].attention, model.config.n_embd

    def blind(y):  # (B, C, ... hs): what was sensed is at the end
        sensed = y[..., D:]
        return torch.cat([y[..., :D], torch.zeros_like(sensed) if how == "zeroed" else sensed.roll(1, dims=0)], dim=-1)

    hooks = [m.register_forward_pre_hook(lambda _m, x: (blind(x[0]),)) for m in ([] if gate_only else [attention.proj]) + ([model.gate] if model.gate else [])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scores(model: GPT, split: Rows | Text, thinking: Thinking, rows: int) -> dict:
    """-> {"score": answers right, or nats a token, over all trained levels; "thoughts": a row; "thoughts_by_level": {level: a row}}."""
    each, thoughts = [], {}
    for level in split.levels:
        batch = split.first(rows, level)
        roll, right = evaluate(model, batch, thinking, torch.Generator().manual_seed(level))
        each.append((right.float() if isinstance(split, Rows) else token_loss(model, roll)).mean().item())
        thoughts[level] = (roll.thinks & roll.valid).sum().item() / len(right)
    return {"score": sum(each) / len(each), "thoughts": sum(thoughts.values()) / len(thoughts), "thoughts_by_level": thoughts}


def blind(model: GPT, split: Rows | Text, thinking: Thinking, rows: int) -> dict:
    """{what is taken away: `scores`}."""
    result = {"nothing": scores(model, split, thinking, rows)}
    for how in ("zeroed", "swapped"):
        for gate_only in (False, True) if model.gate else (False,):
            with blinded(model, how, gate_only):
                result[f"{how}{', for the gate' * gate_only}"] = scores(model, split, thinking, rows)
    return result


def steer(model: GPT, split: Rows | Text, thinking: Thinking, rows: int) -> dict:
    """{price: `scores`} without the gate."""
    result = {}
    for price in PRICES:
        with steered(model, price):
            result[price] = scores(model, split, thinking, rows)
    return result


def variance(model: GPT, rows: Rows | Text, thinking: Thinking, config: Config, batches: int) -> dict:
    """Variance of the gate's policy gradient, summed over its weights, by baseline, as a share of that without any."""
    generator, gradients = torch.Generator().manual_seed(3), {}
    longest = rows.longest(rows.levels[-1])
    for _ in range(batches):
        batch = rows.draw(max(1, config.batch_tokens // longest // config.rollouts), rows.levels, generator).repeat(config.rollouts)
        roll = rollout(model, batch.real, batch.length, dataclasses.replace(thinking, greedy=False, explore=config.explore), generator)
        out = read(model, roll)
        weight = torch.where(roll.valid & (roll.pointer >= batch.prompt[:, None]), 1.0, config.prompt_weight)
        cost = (word_loss(out.words, roll) * weight).detach()
        returns, ahead = return_to_go(cost, roll, config.think_cost, config.horizon), out.readings[..., 2].detach()
        action = log_choice(out.gate, roll.thinks, config.explore)
        for name in ("none", "leave_one_out", "observer", "both"):
            compared = 0 if name == "none" else baseline(returns, cost, ahead, roll, dataclasses.replace(config, baseline=name))
            loss = policy_gradient(action, returns - compared, roll.decides)
            gradient = torch.autograd.grad(loss, [*model.gate.parameters()], retain_graph=True)
            gradients.setdefault(name, []).append(torch.cat([g.flatten() for g in gradient]))
    spread = {name: torch.stack(some).var(dim=0).sum().item() for name, some in gradients.items()}
    return {name: value / spread["none"] for name, value in spread.items()}


def cost(model: GPT, rows: Rows | Text, config: Config, passes: int = 30) -> dict:
    batch = rows.draw(config.batch_tokens // rows.longest(rows.levels[-1]), rows.levels, torch.Generator().manual_seed(4))
    pair = [GPT(dataclasses.replace(model.config, observer=observer)) for observer in (model.config.observer, "")]
    seconds = [[], []]
    for _ in range(passes):
        for one, spent in zip(pair, seconds):
            start = time.perf_counter()
            sum(part.sum() for part in one(batch.real)).backward()
            spent.append(time.perf_counter() - start)
    size, median = ([f(x) for x in y] for f, y in ((lambda m: sum(p.numel() for p in m.parameters()), pair), (statistics.median, seconds)))
    return {"parameters": size[0] / size[1], "seconds": median[0] / median[1]}


def far_apart(model: GPT, roll: Rollout) -> tuple[float, float]:
    """
    Total variation, 0 to 1, between what two heads of the last block look at, mean over columns: from the observer to the head most like it, and from
    each other head to the one most like it (mean).
    """
    patterns = []
    hook = model.blocks[-1].attention.register_forward_hook(lambda attention, given, _: patterns.append(attention_pattern(attention, *given[:5])))
    with torch.no_grad():
        read(model, roll)
    hook.remove()
    pattern = patterns[0]  # (B, nh + 1, C, C)
    distance = torch.stack([(pattern - pattern[:, h : h + 1]).abs().sum(-1).mean((0, 2)) / 2 for h in range(pattern.size(1))])  # (nh + 1, nh + 1)
    distance.fill_diagonal_(torch.inf)
    return distance[-1].min().item(), distance[:-1, :-1].min(dim=1).values.mean().item()


def notes(model: GPT, split: Rows | Text, thinking: Thinking, rows: int) -> dict:
    """Over all columns that speak. Middle layers are those behind a quarter and before the last of the depth; the first alone where there are two."""
    parts = []
    for level in split.levels:
        batch = split.first(rows, level)
        roll = rollout(model, batch.real, batch.length, thinking, torch.Generator().manual_seed(0))
        out, sight = look(model, roll.stream, roll.view())
        layers = range(model.config.n_layer // 4, model.config.n_layer - 1) or [0]
        middle = {name: getattr(sight, name)[..., list(layers)].mean(-1) for name in ("change", "attention", "lens")}
        lens = torch.cat([torch.full_like(sight.lens[..., :1], math.log(model.config.vocab_size)), sight.lens], dim=-1)
        drop = (lens[..., :-1] - lens[..., 1:]).max(dim=-1).values  # the most by which one layer narrowed down the words
        loss, right = word_loss(out.words, roll), out.words.argmax(-1) == targets(roll)
        part = middle | {"slope": sight.slope, "drop": drop, "certain": -sight.lens[..., -1], "loss": loss, "right": right, "coming": out.readings[..., 0]}
        parts.append({name: value[roll.speaks] for name, value in part.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result = {f"{what} and {name}": spearman(joined[name], joined[what]) for what in ("loss", "coming") for name in ("change", "attention", "lens", "slope")}
    result |= {f"right, {name}": auroc(joined[name], joined["right"]) for name in ("drop", "certain")}
    result["observer apart"], result["others apart"] = far_apart(model, roll)
    look_at = sight.observer[..., 0][roll.speaks].mean().item(), sight.attention[..., -1][roll.speaks].mean().item()
    return result | {"observer entropy": look_at[0], "others entropy": look_at[1]}


def calibrate(config: CalibrationConfig) -> dict:
    """All of it for a model with an observer; of one without only `places`, and `blind` with nothing taken away, to stand beside it."""
    model, vocabulary, state = load_model(config.run)
    trained = Config(**state["config"])
    if trained.done or trained.recall:
        raise DataError("calibrate.py knows thinking and speaking only: train without done and recall")
    train_rows, *splits = (load_split(trained.data, name, vocabulary, trained.block) for name in ("train", "val", "test") if Path(trained.data, f"{name}.bin").exists())
    thinking = dataclasses.replace(as_trained(state, vocabulary), greedy=True)
    result = {"task": state["meta"]["task"], "seed": trained.seed, "steps": state["progress"]["step"], "params": sum(p.numel() for p in model.parameters())}
    if trained.n_think and isinstance(train_rows, Rows):
        result["places"] = places(model, splits[0], thinking, trained, config.rows // 5)
    if not trained.observer:
        return result | {"blind": {"nothing": scores(model, splits[0], thinking, config.rows // 5)}}
    probe = fit_probe(model, train_rows, thinking, torch.Generator().manual_seed(0))
    if isinstance(train_rows, Rows):
        result["wrong"] = wrong(model, splits, thinking, probe, config.rows)
    result["loss"] = loss_ranks(model, splits, thinking, probe, config.rows)
    result["cost"] = cost(model, train_rows, trained)
    result["notes"] = notes(model, splits[0], thinking, config.rows // 5)
    result["blind"] = blind(model, splits[0], thinking, config.rows // 5)
    if trained.n_think and state["progress"]["paid"]:
        result["steered"] = steer(model, splits[0], thinking, config.rows // 5)
        result["pays"] = pays(model, splits[0], thinking, trained, config.rows)
        result["variance"] = variance(model, train_rows, thinking, trained, config.batches)
    return result


def main(argv: list[str]) -> None:
    config = load_config(argv, CalibrationConfig)
    result = calibrate(config)
    Path(config.run, "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, part in result.items():
        print(name, json.dumps(part) if isinstance(part, dict) else part)


if __name__ == "__main__":
    run(main, "calibrate.py")
