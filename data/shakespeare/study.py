"""
Where a text model thinks, what its thoughts encode, and what a note of them is worth once all before it is forgotten.

  python data/shakespeare/study.py --run=out/shakespeare_notes --plain=out/shakespeare_plain

Writes study.json and study.png into the run's folder. All windows are validation text, thoughts greedy, dropout off, own random generator.

After forgetting: a window's context is read, thinking as trained; then as many thoughts as one run holds are thought (the note), all before them
is taken out of view, and the next 16 tokens are predicted from the note and from each other. Nothing thought before the cut but the
note is seen behind it, and what is thought behind it is thought without a view of what came before. Beside it: the plain model with its full context, and the plain model whose context
is cut at the same place (its first token is then predicted by the token frequencies of the training text).
"""

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import DataError, Text, Vocabulary, load_split  # noqa: E402
from loss import token_loss  # noqa: E402
from model import GPT  # noqa: E402
from report import (  # noqa: E402
    ReportConfig, by_chance, joint_counts, load_plain, mutual_information,
)  # fmt: skip
from runs import Config, as_trained, load_config, load_model, pick_device, run  # noqa: E402
from stream import Thinking, rollout  # noqa: E402

BEHIND = 16  # tokens behind the cut
PLACES = ("start of a line", "start of a word", "inside a word", "behind a word", "in a speaker's name")


@dataclass
class StudyConfig:
    run: str = "out/shakespeare_notes"  # folder of the thinking model
    plain: str = "out/shakespeare_plain"  # folder of the plain one
    data: str = ""  # folder of the data, if it is not where the checkpoint was trained
    windows: int = 1000  # of validation text, at most
    device: str = "auto"


# ----------------------------------------------------------------------------------------------
# after forgetting


@torch.no_grad()
def notes(model: GPT, context: Tensor, thinking: Thinking, count: int, generator=None) -> Tensor:
    """(B, T) real tokens, read with the thoughts the model has on the way -> (B, count) ids of the thoughts it has behind the last of them."""
    length = torch.full((len(context),), context.size(1), device=context.device)
    roll = rollout(model, context, length, thinking, generator)
    rows, end = torch.arange(len(context), device=context.device), roll.valid.sum(dim=1)  # the last token itself is never fed
    stream = torch.cat([roll.stream, context.new_zeros(len(context), count + 1)], dim=1)
    stream[rows, end] = context[:, -1]
    for i in range(count):
        said = model.think(stream).thoughts[rows, end + i]  # causal: what stands behind is not seen
        thought = model.thoughts.choose(said)
        stream[rows, end + i + 1] = model.config.vocab_size + thought
    return stream.gather(1, end[:, None] + 1 + torch.arange(count, device=context.device))


def behind_note(model: GPT, note: Tensor, real: Tensor, thinking: Thinking, generator=None) -> Tensor:
    """Losses (B, T) in nats of the real tokens (B, T) that follow a note (B, n) of thoughts, with nothing else in view."""
    row = torch.cat([note, real], dim=1)
    length = torch.full((len(row),), row.size(1), device=row.device)
    roll = rollout(model, row, length, thinking, generator)
    words = row.clamp(max=model.config.vocab_size - 1)  # thoughts are no words; what the note would have said is not asked
    return token_loss(model, roll._replace(real=words))[:, note.size(1) - 1 :]


def after_forgetting(model: GPT, plain: GPT, real: Tensor, frequency: Tensor, thinking: Thinking, trained: Config) -> dict:
    """Windows (B, T) cut BEHIND tokens before their end -> {curve: [nats at each distance]}, and the share of the gap that the note closes."""
    generator = torch.Generator(real.device).manual_seed(0)
    context, behind = real[:, :-BEHIND], real[:, -BEHIND:]
    never = Thinking(mode="never")
    length = lambda x: torch.full((len(x),), x.size(1), device=x.device)  # noqa: E731
    plain_loss = lambda x: token_loss(plain, rollout(plain, x, length(x), never))  # noqa: E731
    first = -frequency.log()[behind[:, :1]]
    note = notes(model, context, thinking, trained.max_run, generator)
    random = model.config.vocab_size + torch.randint(model.config.n_think, note.shape, generator=generator, device=note.device)
    losses = {
        "plain, full context": plain_loss(real)[:, -BEHIND:],
        "plain, cut": torch.cat([first, plain_loss(behind)], dim=1),
        "note": behind_note(model, note, behind, never),
        "note, goes on thinking": behind_note(model, note, behind, thinking, generator),
        "note swapped with another window's": behind_note(model, note.roll(1, dims=0), behind, never),
        "note random": behind_note(model, random, behind, never),
        "note constant": behind_note(model, note.mode(dim=0).values.expand_as(note), behind, never),
        "thinking, full context": token_loss(model, rollout(model, real, length(real), thinking, generator))[:, -BEHIND:],
    }
    total = {name: loss.sum(dim=1) for name, loss in losses.items()}  # (B,) each
    gap = total["plain, cut"] - total["plain, full context"]
    closed = {name: ((total["plain, cut"] - total[name]).sum() / gap.sum()).item() for name in losses if name.startswith("note")}
    gain = total["plain, cut"] - total["note"]
    error = (gain - closed["note"] * gap).std().item() / len(gap) ** 0.5 / gap.mean().item()  # of a ratio of means, by the delta method
    _, counts = torch.unique(note, dim=0, return_counts=True)
    p = counts / counts.sum()
    return {
        "windows": len(real),
        "context": context.size(1),
        "curves": {name: [round(x, 4) for x in loss.mean(dim=0).tolist()] for name, loss in losses.items()},
        "gap_nats": round(gap.mean().item(), 3),
        "closed": {name: round(share, 4) for name, share in closed.items()},
        "closed_interval": round(1.96 * error, 4),
        "bits_a_note_can_carry": trained.max_run * model.config.n_bits,
        "different_notes": len(counts),
        "entropy_bits": round(-(p * p.log2()).sum().item(), 2),
        "bits_saved_behind": round(gain.mean().item() / math.log(2), 2),
    }


# ----------------------------------------------------------------------------------------------
# where and what


def describe(text: str) -> dict[str, list]:
    """For every character: where what comes next stands (an index of PLACES), letters since the word began, characters since the line began, number of the speaker."""
    in_name, speaker, now, numbers = [False] * len(text), [], "", {}
    names = {m.end(): (m.start(), m.group(1)) for m in re.finditer(r"(?:(?<=\n\n)|\A)([A-Z][^\n:]{0,30}):(?=\n)", text)}
    for end, (start, _) in names.items():
        in_name[max(0, start - 1) : end - 1] = [True] * (end - 1 - max(0, start - 1))
    place, in_word, in_line, word, line = [], [], [], 0, 0
    for i, c in enumerate(text):
        now = names.get(i, (0, now))[1]
        following = text[i + 1 : i + 2]
        word = word + 1 if c.isalpha() or c == "'" else 0
        line = 0 if c == "\n" else line + 1
        if in_name[i]:
            place.append(4)
        elif c == "\n":
            place.append(0)
        elif word:
            place.append(2 if following.isalpha() or following == "'" else 3)
        else:
            place.append(1 if following.isalpha() else 3)
        in_word.append(min(word, 10))
        in_line.append(min(line // 8, 6))
        speaker.append(numbers.setdefault(now, len(numbers)))
    return {"place": place, "letters since the word began": in_word, "place in the line": in_line, "speaker": speaker}


def token_ends(tokens: Tensor, vocabulary: Vocabulary) -> tuple[str, Tensor]:
    """-> the text as characters (one a byte), and (N,) the index of each token's last byte in it."""
    blob = b"".join(vocabulary.pieces[i] for i in tokens.tolist())
    size = torch.tensor([len(piece) for piece in vocabulary.pieces])
    return blob.decode("latin-1"), size[tokens].cumsum(0) - 1


def information(thoughts: Tensor, labels: Tensor) -> float:
    """I(thought; label) in nats less what shuffled labels seem to have, which is the bias of so small a sample."""
    told = mutual_information(joint_counts(thoughts, labels)[1])
    return told - by_chance(thoughts, labels)


@torch.no_grad()
def where_and_what(model: GPT, plain: GPT, text: Text, vocabulary: Vocabulary, thinking: Thinking, config: StudyConfig) -> dict:
    """Thinking rates by place and by the plain model's loss; information in the first thought of a run about what one might have in mind there."""
    batch = text.first(config.windows, text.block)
    characters, ends = token_ends(text.tokens, vocabulary)
    labels = {name: torch.tensor(values) for name, values in describe(characters).items()}
    at = text.spread(config.windows)[:, None] + torch.arange(text.block + 1)  # (N, T) index of each window's tokens in the text
    generator, found = torch.Generator(config.device).manual_seed(0), []
    for i in range(0, len(at), 100):
        real = batch.real[i : i + 100].to(config.device)
        length = torch.full((len(real),), real.size(1), device=config.device)
        roll = rollout(model, real, length, thinking, generator)
        hard = token_loss(plain, rollout(plain, real, length, Thinking(mode="never")))  # (B, T - 1)
        here = roll.holds_real & roll.decides
        thought = torch.cat([roll.stream[:, 1:], roll.stream[:, :1]], dim=1) - model.config.vocab_size
        index = at[i : i + 100].gather(1, roll.pointer.cpu() - 1)
        found.append(torch.stack([x[here].cpu().double() for x in (roll.thinks, thought, index, hard.gather(1, roll.pointer.clamp(max=hard.size(1)) - 1))]))
    thinks, thought, index, hard = torch.cat(found, dim=1)
    thinks, thought, index = thinks.bool(), thought.long(), index.long()
    place = labels["place"][ends[index]]
    quartile = torch.bucketize(hard, hard.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=hard.dtype)))
    rate = lambda where: [round(thinks[where].double().mean().item(), 4), int(where.sum())]  # noqa: E731
    result = {
        "thinking_rate_and_count_by_place": {name: rate(place == k) for k, name in enumerate(PLACES)},
        "thinking_rate_by_plain_loss": {f"quartile {k + 1}": rate(quartile == k) + [round(hard[quartile == k].mean().item(), 3)] for k in range(4)},
        "information_nats": {},
    }
    if thinks.any():
        t, i = thought[thinks], index[thinks]
        about = {"last token": text.tokens[i], "token before it": text.tokens[(i - 1).clamp(min=0)], "next token": text.tokens[(i + 1).clamp(max=len(text.tokens) - 1)]}
        about |= {name: values[ends[i]] for name, values in labels.items() if name != "place"}
        result["information_nats"] = {n: round(information(t, y), 4) for n, y in about.items()}
        used = torch.unique(t, return_counts=True)[1] / len(t)
        entropy = -torch.xlogy(used, used).sum().item()
        result["different_first_thoughts"] = len(used)
        result["entropy_nats_of_first_thoughts"] = round(entropy, 3)
    return result


# ----------------------------------------------------------------------------------------------
# together


def draw(study: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    forgetting = study["after_forgetting"]
    for name, curve in forgetting["curves"].items():
        a.plot(range(1, BEHIND + 1), curve, label=name, marker=".", ls="--" if "plain" in name else "-")
    a.set(xlabel="tokens behind the cut", ylabel="nats", title=f"after forgetting: the note closes {forgetting['closed']['note']:.0%} of the gap")
    a.legend(fontsize=7)
    for axis, part, title in ((b, "thinking_rate_and_count_by_place", "thoughts by place"), (c, "thinking_rate_by_plain_loss", "thoughts by the plain model's loss")):
        axis.barh([*study[part]], [value[0] for value in study[part].values()])
        axis.set(xlabel="share of tokens that a thought follows", title=title, xlim=(0, 1))
    d.barh([*study["information_nats"]], [*study["information_nats"].values()])
    d.set(xlabel="nats", title="what a run's first thought tells")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, StudyConfig)
    config.device = pick_device(config.device)
    model, vocabulary, state = load_model(config.run, config.device)
    trained = Config(**state["config"])
    if not trained.n_think or vocabulary.row_end >= 0:
        raise DataError(f"{config.run} is not a thinking model of a text")
    plain, _, _ = load_plain(ReportConfig(plain=config.plain, device=config.device), vocabulary)
    folder = config.data or trained.data
    train, text = (load_split(folder, split, vocabulary, trained.block) for split in ("train", "val"))
    if trained.block <= BEHIND:
        raise DataError(f"the windows of {trained.block} tokens are too short: {BEHIND} lie behind the cut")
    frequency = torch.bincount(train.tokens, minlength=len(vocabulary.tokens)).float() + 1
    thinking = dataclasses.replace(as_trained(state, vocabulary), greedy=True)
    real = text.first(config.windows, text.block).real[:, 1:].to(config.device)
    study = {"task": state["meta"]["task"], "run": config.run, "plain": config.plain, "seed": trained.seed}
    study["after_forgetting"] = after_forgetting(model, plain, real, (frequency / frequency.sum()).to(config.device), thinking, trained)
    study |= where_and_what(model, plain, text, vocabulary, thinking, config)
    out = Path(config.run)
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    draw(study, out / "study.png")
    print(json.dumps({name: value for name, value in study.items() if name != "task"}, indent=1))
    print(f"written: {out / 'study.json'}, {out / 'study.png'}")


if __name__ == "__main__":
    run(main, "study.py")
