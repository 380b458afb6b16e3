"""
What control tokens are worth: is RECALL used where it helps, does REVISE mend, does the answer follow the thought, does anything hidden ever show?

  python control.py --run=out/recall          writes control.json into the run's folder
  python control.py --hidden=5000             no run: random models and prompts, and whether a thought or control token was ever said

Measured on validation rows, which training never drew, by a generator of its own. What does not apply to a model is left out.
Not here: the loop that is measured (`speak` in stream.py).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Batch, DataError, Rows, load_split
from loss import evaluate, token_loss
from model import GPT, GPTConfig
from runs import Config, as_trained, load_config, load_model, pick_device, run
from stream import Noise, Rollout, Thinking, generate, load_dice, rollout, speak


@dataclass
class ControlConfig:
    run: str = "out/recall"
    rows: int = 500  # validation rows a level
    samples: int = 8  # of each row, at temperature 1, for REVISE
    revisions: int = 8  # words an answer may take back
    hidden: int = 0  # random models to try, instead of a run
    device: str = "auto"


def recall(model: GPT, split: Rows, thinking: Thinking, config: Config, rows: int) -> dict:
    """
    {how: answers right, RECALLs at the answer's first token, elsewhere (per token), cost: nats of the answer plus the price of all RECALLs, per row}:
    by the gate, never, always, and as many as by the gate at random places.
    """
    result, share = {}, 0.0
    for how in ("policy", "never", "always", "scattered"):
        hold = {"policy": None, "never": 0.0, "always": 1.0, "scattered": share}[how]
        parts, how_to = [], dataclasses.replace(thinking, hold_recall=hold, greedy=True)
        for level in split.levels:
            batch, generator = split.first(rows, level).to(model.embedding.weight.device), torch.Generator(model.embedding.weight.device).manual_seed(level)
            _, right = evaluate(model, batch, how_to, generator)
            roll = rollout(model, batch.real, batch.length, how_to, generator)
            asked = roll.pointer == batch.prompt[:, None]
            answer = torch.arange(1, batch.real.size(1), device=right.device) >= batch.prompt[:, None]
            nats = (token_loss(model, roll) * answer).sum(dim=1)
            at, all_of_them = (roll.recalls & asked).sum(dim=1), roll.recalls.sum(dim=1)
            elsewhere = (all_of_them - at) / (batch.length - 2)  # a row has that many other tokens to say
            parts.append(torch.stack([right, at, elsewhere, nats + config.recall_cost * all_of_them, all_of_them / (batch.length - 1)]).double().mean(dim=1))
        accuracy, at, elsewhere, cost, rate = torch.stack(parts).mean(dim=0).tolist()
        share = rate if how == "policy" else share
        result[how] = {"accuracy": accuracy, "at the question": at, "elsewhere": elsewhere, "cost": cost}
    return result


def revise(model: GPT, batch: Batch, thinking: Thinking, samples: int, revisions: int) -> dict:
    """
    Exact match of sampled answers, temperature 1, with REVISE and without; of the wrong words said the share that was taken back, and of the right ones.
    """
    batch, device = batch.repeat(samples), model.embedding.weight.device
    batch, result = batch.to(device), {}
    for name, allowed in (("forbidden", 0), ("allowed", revisions)) if model.config.revise else (("forbidden", 0),):
        how_to = dataclasses.replace(thinking, greedy=False, revisions=allowed)
        roll, right = evaluate(model, batch, how_to, torch.Generator(device).manual_seed(0))
        result[name] = right.double().mean().item()
    if model.config.revise:
        place, word = roll.taken.unbind(-1)  # (B, R)
        truth = batch.real.gather(1, place.clamp(min=0))
        false, caught = ((place >= 0) & (word == truth)).sum().item(), ((place >= 0) & (word != truth)).sum().item()
        index = torch.arange(batch.real.size(1), device=device)
        answer = (index >= batch.prompt[:, None]) & (index < batch.length[:, None])
        said_right, said_wrong = ((roll.real == batch.real) & answer).sum().item(), ((roll.real != batch.real) & answer).sum().item()
        result |= {"errors gone": 1 - (1 - result["allowed"]) / max(1e-9, 1 - result["forbidden"])}
        result |= {"false revisions": false / max(1, said_right + false), "caught": caught / max(1, said_wrong + caught), "taken back a row": (false + caught) / len(right)}
    return result


def told(
    model: GPT, roll: Rollout, batch: Batch, runs: int, back: int, donor: Tensor
) -> tuple[Noise, Tensor]:
    """
    Dice loaded so that each row thinks again what it thought in `roll`, up to the token of its prompt that is `back` before the last; but behind that token,
    what the row `donor` (B,) thought there; and from then on what it likes. -> noise for a greedy `speak`; rows that had such a thought, and donors (B,) bool.
    """
    (B, T), rows = batch.real.shape, torch.arange(len(donor), device=donor.device)
    c = torch.arange(roll.stream.size(1), device=donor.device)
    run = c - torch.where(roll.holds_real, c, 0).cummax(dim=1).values  # (B, C) thoughts behind the last real token so far
    place = (roll.pointer - 1) * runs + run
    thought = F.pad(roll.stream[:, 1:] - model.config.vocab_size, (0, 1))
    thoughts = torch.full((B, T * runs), -1, device=donor.device)
    thoughts[rows[:, None].expand_as(place)[roll.thinks], place[roll.thinks]] = thought[roll.thinks]
    thoughts, here = thoughts.view(B, T, runs), batch.prompt - 1 - back
    own, other = thoughts[rows, here], thoughts[donor, here[donor]]  # (B, runs)
    thoughts[rows, here] = other
    half = torch.full((B, T * runs), 0.5, device=donor.device)  # no chance: who is greedy and asks a gate needs none
    even = Noise(half, half.new_zeros(B, T * runs, model.config.n_bits), half[:, :T])
    where = torch.arange(T, device=donor.device) <= here[:, None]
    return load_dice(model, even, thoughts, where), (own[:, 0] >= 0) & (other[:, 0] >= 0)


def follow(model: GPT, split: Rows, thinking: Thinking, rows: int) -> dict:
    """
    {level: {"rows", "follows", "keeps"}}: in each row put another row's thought in the place of one of its own: of the last behind the question's last token but
    one (in a chain, the last operation), or "earlier" by one token. The donor is a row that goes on with the same tokens, and has another answer: who follows the
    thought gives the donor's answer. Share of rows that do, and share that give their own all the same, of rows that were right, as was the donor.
    """
    result = {}
    for level in split.levels:
        batch, generator = split.first(rows, level).to(model.embedding.weight.device), torch.Generator(model.embedding.weight.device).manual_seed(level)
        greedy, line, B = dataclasses.replace(thinking, greedy=True), {}, len(batch.real)
        roll, right = evaluate(model, batch, greedy, generator)
        if (batch.prompt != batch.prompt[0]).any():
            raise DataError(f"rows of level {level} have prompts of several lengths, so that one cannot stand in for another")
        first = int(batch.prompt[0])
        same = lambda a, b: (a[..., first:] == b[..., first:]).all(dim=-1)  # noqa: E731 one answer
        for back, suffix in ((1, ""), (2, ", earlier")):
            if first - 1 - back < 1:
                continue
            other = (batch.real[:, None, first - back : first] == batch.real[None, :, first - back : first]).all(dim=-1)  # (B, B) goes on with the same tokens
            other = other & ~same(batch.real[:, None], batch.real) & right & right[:, None]
            score = other * torch.rand(B, B, generator=generator, device=right.device)
            donor, found = score.argmax(dim=1), other.any(dim=1)
            noise, there = told(model, roll, batch, greedy.max_run, back, donor)
            again, asked = speak(model, batch.real, batch.prompt, batch.length, greedy, generator, noise=noise), found & there
            counts = {"follows": same(again.real, batch.real[donor]), "keeps": same(again.real, batch.real)}
            if asked.any():
                line |= {f"rows{suffix}": int(asked.sum())} | {name + suffix: x[asked].double().mean().item() for name, x in counts.items()}
        if len(line) == 6:
            result[level] = line
    return result


def bounded(model: GPT, split: Rows, thinking: Thinking, rows: int) -> dict:
    """
    {level: {how: answers right, "thoughts": a row, in runs that end as the model says}} where a row may think one thought for each token of its question,
    wherever it likes: with such runs, and with runs of max_run thoughts for as long as there are any left.
    """
    result, full = {}, dataclasses.replace(thinking, hold=1.0)
    for level in split.levels:
        batch = split.first(rows, level).to(model.embedding.weight.device)
        how_to = {name: dataclasses.replace(how, greedy=True, budget=int(batch.prompt.max())) for name, how in (("ended", thinking), ("full runs", full))}
        found = {name: evaluate(model, batch, how) for name, how in how_to.items()}
        result[level] = {name: right.double().mean().item() for name, (_, right) in found.items()} | {"thoughts": found["ended"][0].thinks.sum().item() / len(batch.real)}
    return result


def hidden(models: int) -> dict:
    """Random models, prompts and ways of thinking: how many answers were too short, too long, or held anything but words; and what they did."""
    found = {"models": models, "answers": 0, "words": 0, "bad": 0, "thoughts": 0, "recalls": 0, "taken back": 0, "over budget": 0}
    for seed in range(models):
        draw = torch.Generator().manual_seed(seed)
        pick = lambda options: options[int(torch.randint(len(options), (), generator=draw))]  # noqa: E731
        torch.manual_seed(seed)
        V, bits, layers, coin = pick([2, 5, 9]), pick([0, 1, 2]), pick([1, 2]), [True, False]
        control = {"done": bool(bits) and pick(coin), "recall": pick(coin), "revise": pick(coin)}
        model = GPT(GPTConfig(V, bits, layers, 1, 8, **control)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=pick([0.3, 1.0, 3.0]))
        hold = {"hold": pick([None, 0.7, 1.0]), "hold_recall": pick([None, 0.5, 1.0])}
        limits = {"max_run": pick([1, 3, 8]), "budget": pick([0, 2, 10]), "revisions": pick([0, 1, 5, 40])}
        thinking = Thinking(**hold, **limits, greedy=pick([True, False]), window=pick([0, 1, 4]), top_k=pick([0, 1, 2]), temperature=pick([0.5, 1.0, 2.0]))
        prompts, new = [torch.randint(V, (pick([1, 2, 7]),), generator=draw).tolist() for _ in range(3)], pick([1, 3, 8])
        answers, roll = generate(model, prompts, new, thinking, draw)
        behind = F.pad(roll.thinks, (limits["max_run"], 0)).unfold(1, limits["max_run"] + 1, 1).all(dim=-1)  # a run that is too long
        taken = (roll.taken[..., 0] >= 0).sum(dim=1)
        over = behind.any() or limits["budget"] and (roll.thinks.sum(dim=1) > limits["budget"]).any() or (taken > limits["revisions"]).any()
        counts = {"answers": 3, "words": 3 * new, "bad": sum(len(a) != new or not all(0 <= w < V for w in a) for a in answers), "over budget": int(bool(over))}
        counts |= {"thoughts": int(roll.thinks.sum()), "recalls": int(roll.recalls.sum()), "taken back": int(taken.sum())}
        found |= {name: found[name] + count for name, count in counts.items()}
    return found


def show(name: str, lines: dict) -> None:
    """A small table: a line a key, a column for each number."""
    columns = list(next(iter(lines.values())))
    print(f"\n{name}\n{'':14}" + "".join(f"{c:>18}" for c in columns))
    for key, line in lines.items():
        print(f"{key!s:14}" + "".join(f"{line[c]:18.3f}" for c in columns))


def main(argv: list[str]) -> None:
    config = load_config(argv, ControlConfig)
    if config.hidden:
        print(json.dumps(hidden(config.hidden)))
        return
    model, vocabulary, state = load_model(config.run, pick_device(config.device))
    trained = Config(**state["config"])
    split = load_split(trained.data, "val", vocabulary, trained.block)
    if not isinstance(split, Rows):
        raise DataError(f"the run in {config.run} is of a text, which has no answers to be right or wrong")
    thinking, found = as_trained(state, vocabulary), {}
    found["sampled"] = {split.levels[-1]: revise(model, split.first(config.rows, split.levels[-1]), thinking, config.samples, config.revisions)}
    show("answers sampled at temperature 1, share right, REVISE forbidden and allowed", found["sampled"])
    if model.config.recall:
        found["recall"] = recall(model, split, thinking, trained, config.rows)
        show("RECALL, mean over levels", found["recall"])
    if model.config.n_think:
        found["follow"] = follow(model, split, thinking, config.rows)
        if found["follow"]:
            show("with one thought of another row: answers that follow it, answers that do not", found["follow"])
    if trained.max_run > 1:
        found["bounded"] = bounded(model, split, thinking, config.rows)
        show("with a budget of one thought for each token of the question: runs ended by the model, and full ones", found["bounded"])
    (Path(config.run) / "control.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main, "control.py")
