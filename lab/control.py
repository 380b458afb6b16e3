"""
Are RECALL and REVISE used where they help, and do answers follow thoughts? control.json, from a
checkpoint.

  python lab/control.py --run=out/recall     a minute on one CPU thread

Measured on validation sequences; what does not apply to a model is left out.

  recall    answers right, RECALLs at the question's last token and elsewhere (of a token), and cost
            (nats of the answer and the price of all RECALLs): as the gate decides, never, always,
            and as often as the gate, but at random
  revise    of wrong tokens behind the right ones, how many REVISE takes back, and of right ones;
            and answers drawn at temperature 1, with REVISE forbidden and allowed
  follow    in each sequence one thought is that of another sequence, which has another answer:
            answers that follow it, and answers that do not care
  shown     demonstrated thoughts that the model thinks, too, by itself

Not here: the loop that is measured (model.generate).
"""

import dataclasses
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs
import train
from data.dataset import Batch, DataError, Rows, load_split
from model import GPT, Thinking, generate


@dataclass
class ControlConfig:
    run: str = train.option("out/recall", "folder of the checkpoint, and of control.json")
    rows: int = train.option(500, "validation sequences a level", 1)
    drawn: int = train.option(200, "answers that are drawn, for REVISE", 1)
    revisions: int = train.option(8, "tokens an answer may take back", 1)


def recall(model: GPT, split: Rows, thinking: Thinking, price: float, rows: int) -> dict:
    """{how: {"right", "at the question", "elsewhere", "cost"}}, mean over levels."""
    result, often = {}, 0.0
    for how in ("gate", "never", "always", "at random"):
        force = {"gate": None, "never": 0.0, "always": 1.0, "at random": often}[how]
        asked, parts = dataclasses.replace(thinking, force_recall=force), []
        for level in split.levels:
            batch, generator = split.first(rows, level), torch.Generator().manual_seed(level)
            grid, right, loss = train.evaluate(model, batch, asked, generator)
            nats = (loss * train.counted_tokens(batch)[:, :, 0]).sum(dim=1)
            recalls = grid.recalls.any(dim=2)  # (B, T)
            count, there = recalls.sum(dim=1), recalls.gather(1, batch.prompt[:, None] - 1)[:, 0]
            elsewhere = (count - there.long()) / (batch.length - 2)
            numbers = [right, there, elsewhere, nats + price * count, count / (batch.length - 1)]
            parts.append(torch.stack([number.double() for number in numbers]).mean(dim=1))
        *numbers, each = torch.stack(parts).mean(dim=0).tolist()
        often = each if how == "gate" else often
        result[how] = dict(zip(("right", "at the question", "elsewhere", "cost"), numbers))
    return result


@torch.no_grad()
def taken_back(model: GPT, batch: Batch, thinking: Thinking, tried: Tensor) -> float:
    """
    Share that REVISE takes back of the tokens `tried` (B, T) in an answer, each behind the right
    ones; -1: none is tried. A sequence's last token does not count: what was said is never revised.
    """
    V, t = model.config.vocab_size, torch.arange(tried.size(1))
    wrong = train.wrong_tokens(batch._replace(wrong=tried), 0.0, V)
    grid, out = train.rollout(model, batch.real, batch.length, thinking, wrong=wrong)
    regret = out.loss[:, :, train.WRONG_SLOT]  # -log p(REVISE), nats
    asked = grid.present[:, :, train.WRONG_SLOT] & (t + 2 < batch.length[:, None])  # (B, T)
    return (regret < math.log(2))[asked].float().mean().item()


def draw(model: GPT, row: list[int], prompt: int, thinking: Thinking, revisions: int, generator):
    """Draw an answer -> a Counter: how many of its tokens were (taken back?, right?)."""
    said, counts = [], Counter()

    def watch(what: str, token: int) -> None:
        if what == "token":
            said.append(token)
        if what == "revise":
            counts[True, said.pop() == row[len(said)]] += 1

    how = {"temperature": 1.0, "revisions": revisions, "watch": watch}
    generate(model, row[:prompt], len(row) - prompt, thinking, generator, **how)
    return counts + Counter((False, a == b) for a, b in zip(said[prompt:], row[prompt:]))


def revise(model: GPT, batch: Batch, thinking: Thinking, drawn: int, revisions: int) -> dict:
    """REVISE in prefixes and in answers of the model's own, see above; all are shares."""
    real, other, result = batch.real, batch.real.roll(1, dims=0), {}
    wrong = other.masked_fill(other == real, -1)  # what another sequence says in the same place
    result["wrong tokens of prefixes taken back"] = taken_back(model, batch, thinking, wrong)
    result["right tokens of prefixes taken back"] = taken_back(model, batch, thinking, real)
    for name, allowed in (("forbidden", 0), ("allowed", revisions)):
        generator, hits, counts = torch.Generator().manual_seed(0), 0, Counter()
        for i in torch.arange(drawn) % len(real):
            row = real[i, : batch.length[i]].tolist()
            found = draw(model, row, int(batch.prompt[i]), thinking, allowed, generator)
            hits += not found[False, False]
            counts += found
        result[f"answers right, REVISE {name}"] = hits / drawn
    for right, name in enumerate(("wrong", "right")):
        taken, kept = counts[True, right], counts[False, right]
        result[f"{name} tokens of its own taken back"] = taken / max(1, taken + kept)
    return result


def thoughts_of(grid: train.Grid, model: GPT) -> Tensor:
    """-> (B, T, R) numbers of the thoughts behind each token, -1 where there is none."""
    number = torch.where(grid.present, grid.token - model.config.vocab_size, -1)
    return number[:, :, 1 : train.RECALL_SLOT]


@torch.no_grad()
def follow(model: GPT, split: Rows, thinking: Thinking, rows: int) -> dict:
    """
    {level: {"rows", "follows", "keeps"}}: in each sequence the thoughts behind the question's last
    token but one (in a chain, the last operation) are those of a donor, which goes on with the same
    token, "=", and has another answer. Share of answers that are the donor's, and share that are
    the sequence's own, of sequences that were right, as was the donor.
    """
    result = {}
    for level in split.levels:
        batch, generator = split.first(rows, level), torch.Generator().manual_seed(level)
        grid, right, _ = train.evaluate(model, batch, thinking, generator)
        (B, T), thoughts = batch.real.shape, thoughts_of(grid, model)
        t, every, here = torch.arange(T), torch.arange(B), batch.prompt - 2
        is_answer = t >= batch.prompt[:, None]  # (B, T)
        answer = batch.real.masked_fill(~is_answer, -1)
        able = right & (thoughts[every, here, 0] >= 0)  # (B,)
        fits = able[:, None] & able & (batch.prompt[:, None] == batch.prompt)  # (B, B)
        fits = fits & (answer[:, None] != answer).any(dim=2)
        fits = fits & (batch.length[:, None] == batch.length)
        asked = fits.any(dim=1)
        if not asked.any():
            continue
        donor = (fits * torch.rand(B, B, generator=generator)).argmax(dim=1)
        forced = thoughts.masked_fill((t > here[:, None])[:, :, None], train.UNFORCED)
        forced[every, here] = thoughts[donor, here[donor]]
        other = batch._replace(real=torch.where(is_answer, batch.real[donor], batch.real))
        result[level] = {"rows": int(asked.sum())}
        for name, wanted in (("follows", other), ("keeps", batch)):
            how = (model, wanted.real, wanted.length, thinking)
            again, out = train.rollout(*how, forced=forced)
            hits = train.answers_right(out, again, train.counted_tokens(wanted))
            result[level][name] = hits[asked].float().mean().item()
    return result


def shown(model: GPT, split: Rows, thinking: Thinking, rows: int) -> dict:
    """{level: {"thoughts", "sequences"}}: share of each in which it thinks what was shown."""
    result = {}
    for level in split.levels:
        batch = split.first(rows, level)
        grid, _ = train.rollout(model, batch.real, batch.length, thinking)
        thoughts = thoughts_of(grid, model)[batch.shown]
        told = F.pad(batch.thoughts, (0, thoughts.size(2) - batch.thoughts.size(2)), value=-1)
        same = thoughts == told[batch.shown]  # (B, T, R)
        each = same[told[batch.shown] >= 0].float().mean().item()
        all_of_them = same.flatten(1).all(dim=1).float().mean().item()
        result[level] = {"thoughts": each, "sequences": all_of_them}
    return result


def main(argv: list[str]) -> None:
    config = train.load_config(argv, ControlConfig)
    model, vocabulary, state = runs.load_model(config.run)
    trained, thinking = train.trained_config(state), train.as_trained(state, vocabulary)
    split = load_split(trained.data, "val", vocabulary, trained.block)
    if not isinstance(split, Rows):
        raise DataError(f"the run in {config.run} is of a text, which has no answers")
    found, last = {}, split.first(config.rows, split.levels[-1])
    if model.config.recall:
        found["recall"] = recall(model, split, thinking, trained.think_cost, config.rows)
    if model.config.revise:
        found["revise"] = revise(model, last, thinking, config.drawn, config.revisions)
    if model.config.n_bits:
        found["follow"] = follow(model, split, thinking, config.rows)
        if last.thoughts.size(2):
            found["shown"] = shown(model, split, thinking, config.rows)
    for name, part in found.items():
        print(name)
        for key, value in part.items():
            print(f"  {key!s:36} {json.dumps(value)}")
    Path(config.run, "control.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    train.run(main, "lab/control.py")
