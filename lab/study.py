"""
What a note of thoughts is worth once all before it is forgotten; where a text model thinks, and
what its thoughts say.

  python lab/study.py --run=out/shakespeare_notes --plain=out/shakespeare_plain
  python lab/study.py --run=out/keyhole             where it thinks, and what each bit says

Writes study.json and study.png into the run's folder: some minutes for 1,000 windows on one core.

After forgetting, if there is a plain model: a window's context is read, thinking as trained. Behind
its last token as many thoughts as one run holds are thought: the note. Then the next 16 tokens are
predicted from the note and from each other, with nothing else in view. The gap that it may close
lies between a plain model with the whole context and the plain model cut at the same place, whose
first token is predicted by token frequencies. All windows are validation text, and thoughts greedy.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, Text, Vocabulary, load_split
from lab.report import write_rounded
from model import GPT, Thinking
from options import load_config, option, run
from runs import load_model, load_plain, pick_device
from train import UNFORCED, as_trained, rollout

BEHIND = 16  # tokens behind the cut
PART = 100  # windows that go through together
ABOUT = (
    "what comes next",
    "letters of the word",
    "characters of the line",
    "vowel, consonant, other",
)
PLACES = ("line begins", "word begins", "inside a word", "behind a word", "a speaker's name")


@dataclass
class StudyConfig:
    run: str = option("out/shakespeare_notes", "folder of the thinking model")
    plain: str = option("", "folder of a plain one, to measure what forgetting costs")
    data: str = option("", "folder of the data, if not where the checkpoint was trained")
    windows: int = option(1000, "windows of validation text, at most", 2)
    device: str = option("auto", "auto, cpu, cuda or mps")


def in_parts(measure: Callable, *tensors: Tensor) -> Tensor:
    """measure(*tensors), PART windows at a time."""
    return torch.cat([measure(*part) for part in zip(*(x.split(PART) for x in tensors))])


# ----------------------------------------------------------------------------------------------
# after forgetting


@torch.no_grad()
def losses(model: GPT, window: int, given: Tensor, real: Tensor) -> Tensor:
    """Nats (B, T) of real tokens (B, T) behind ids (B, n), tokens or thoughts, and nothing else."""
    logits = model(torch.cat([given, real[:, :-1]], dim=1), window=window).logits
    logits = logits[:, given.size(1) - 1 :]  # (B, T, V)
    return F.cross_entropy(logits.transpose(1, 2), real, reduction="none")


def notes(model: GPT, thinking: Thinking, generator, context: Tensor) -> Tensor:
    """(B, T) tokens, read with the thoughts the model has on the way -> (B, R) ids of the note."""
    real = F.pad(context, (0, 1))  # the last token of a rollout is never read itself
    length = torch.full_like(real[:, 0], real.size(1))
    grid, _ = rollout(model, real, length, thinking, generator)
    thoughts = slice(1, 1 + thinking.max_run)
    number = grid.token[:, :, thoughts] - model.config.vocab_size  # (B, T + 1, R)
    forced = torch.where(grid.present[:, :, thoughts], number, -1)
    forced[:, -2] = UNFORCED
    always = dataclasses.replace(thinking, force=1.0, price=None, after=None)
    grid, _ = rollout(model, real, length, always, generator, forced)
    return grid.token[:, -2, thoughts]


def after_forgetting(thinker, plain, real: Tensor, frequency: Tensor) -> dict:
    """
    thinker, plain: (model, Thinking); real: windows (B, T), cut BEHIND tokens before their end;
    frequency (V,) of tokens -> {curve: [nats at each distance]}, and the share of the gap that the
    note closes.
    """
    (model, thinking), generator = thinker, torch.Generator(real.device).manual_seed(0)
    context, behind = real[:, :-BEHIND], real[:, -BEHIND:]
    note = in_parts(partial(notes, model, thinking, generator), context)
    K, V = model.config.n_think, model.config.vocab_size
    given = {
        "note": note,
        "note swapped": note.roll(1, dims=0),  # what the window before it had
        "note random": torch.randint_like(note, V, V + K),
        "note constant": note.mode(dim=0).values.expand_as(note),
    }
    plain_losses, own_losses = (partial(losses, m, how.window) for m, how in (plain, thinker))
    nats = {name: in_parts(own_losses, ids, behind) for name, ids in given.items()}
    total = {name: loss.sum(dim=1) for name, loss in nats.items()}  # (B,) each
    whole = in_parts(plain_losses, real[:, :1], real[:, 1:])[:, -BEHIND:]
    cut = in_parts(plain_losses, behind[:, :1], behind[:, 1:])
    cut = torch.cat([-frequency.log()[behind[:, :1]], cut], dim=1)
    gap, gain = (cut - whole).sum(dim=1), cut.sum(dim=1) - total["note"]
    closed = {name: ((cut.sum() - loss.sum()) / gap.sum()).item() for name, loss in total.items()}
    # the error of a ratio of means, by the delta method
    error = (gain - closed["note"] * gap).std() / len(gap) ** 0.5 / gap.mean()
    counts = torch.unique(note, dim=0, return_counts=True)[1]
    p, curves = counts / counts.sum(), {"plain, whole context": whole, "plain, cut": cut} | nats
    return {
        "curves": {name: x.mean(dim=0).tolist() for name, x in curves.items()},
        "gap_nats": gap.mean().item(),
        "closed": closed,
        "closed_interval": 1.96 * error.item(),
        "bits_a_note_can_carry": thinking.max_run * model.config.n_bits,
        "entropy_bits": -(p * p.log2()).sum().item(),
        "bits_saved_behind": gain.mean().item() / math.log(2),
    }


# ----------------------------------------------------------------------------------------------
# where and what


def describe(text: str) -> dict[str, list[int]]:
    """
    For every character, {name: label}: where what comes next stands, an index of PLACES; how many
    letters its word has so far, up to 10; how many characters its line has, in eights, up to 6; its
    kind.
    """
    names = re.finditer(r"(?:(?<=\n\n)|\A)[A-Z][^\n:]{0,30}:(?=\n)", text)
    in_name = {i for m in names for i in range(m.start() - 1, m.end() - 1)}
    found, word, line = {name: [] for name in ABOUT}, 0, 0
    for i, c in enumerate(text):
        following = text[i + 1 : i + 2]
        word = word + 1 if c.isalpha() or c == "'" else 0
        line = 0 if c == "\n" else line + 1
        goes_on = following.isalpha() or following == "'" and word > 0
        place = 0 if c == "\n" else (2 if word else 1) if goes_on else 3
        kind = 0 if c.lower() in "aeiou" else 1 if c.isalpha() else 2
        labels = (4 if i in in_name else place, min(word, 10), min(line // 8, 6), kind)
        for name, label in zip(ABOUT, labels):
            found[name].append(label)
    return found


def frequencies(ids: Tensor, kinds: int) -> Tensor:
    """-> (kinds,) shares of each among ids (N,), as if each had been seen once more."""
    counts = torch.bincount(ids, minlength=kinds).float() + 1
    return counts / counts.sum()


def told(bits: Tensor, label: Tensor) -> float:
    """
    Nats that bits (N, d) of 0 and 1 tell a linear reader of labels (N,): by how much it is better
    than the labels' frequencies, on the second half. It is fitted to the first.
    """
    kinds, bits = int(label.max()) + 1, bits.float()
    (seen, kept), (known, asked) = bits.tensor_split(2), label.tensor_split(2)
    reader = torch.nn.Linear(bits.size(1), kinds)
    optimiser = torch.optim.LBFGS(reader.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(reader(seen), known)
        loss.backward()
        return loss

    optimiser.step(closure)
    guess = -frequencies(known, kinds).log()[asked].mean()
    with torch.no_grad():
        return (guess - F.cross_entropy(reader(kept), asked)).item()


def where_and_what(thinker, text: Text, vocabulary: Vocabulary, size: int) -> dict:
    """Thinking rates by place, and what the first thought of a run tells, in `size` windows."""
    (model, thinking), windows = thinker, text.first(size, text.block).real  # (N, T)
    blob = b"".join(vocabulary.pieces[i] for i in text.tokens.tolist())
    ends = torch.tensor([len(piece) for piece in vocabulary.pieces])[text.tokens].cumsum(0) - 1
    about = {k: torch.tensor(x)[ends] for k, x in describe(blob.decode("latin-1")).items()}
    place = about["what comes next"]
    index = text.spread(size)[:, None] + torch.arange(text.block + 1)  # (N, T) in the text
    generator = torch.Generator(model.embedding.weight.device).manual_seed(0)
    found = []
    for real, at in zip(windows.split(PART), index.split(PART)):
        real = real.to(generator.device)
        length = torch.full_like(real[:, 0], real.size(1))
        grid, _ = rollout(model, real, length, thinking, generator)
        asked = grid.asked[:, :, 0].cpu()
        parts = (grid.thinks[:, :, 0].cpu(), grid.token[:, :, 1].cpu(), at)
        found.append(torch.stack([part[asked].long() for part in parts]))
    thinks, thought, index = torch.cat(found, dim=1)
    by_place = {name: thinks[place[index] == k] for k, name in enumerate(PLACES)}
    by_place = {name: [x.double().mean().item(), len(x)] for name, x in by_place.items() if len(x)}
    thought, index = thought[thinks > 0], index[thinks > 0]
    labels = {name: label[index] for name, label in about.items()}
    for name, step in {"last token": 0, "token before it": -1, "next token": 1}.items():
        labels[name] = text.tokens[(index + step).clamp(0, len(text.tokens) - 1)]
    labels = labels if len(thought) > 1 else {}
    number = thought.to(generator.device) - model.config.vocab_size
    bits = (model.thoughts.bits(number) > 0).long().cpu()  # (N, d)
    of_bits = {k: [told(bit[:, None], label) for bit in bits.T] for k, label in labels.items()}
    known = {name: told(bits, label) for name, label in labels.items()}
    found = {"rate_and_count_by_place": by_place, "told_nats": known}
    return found | {"told_by_each_bit": of_bits}


# ----------------------------------------------------------------------------------------------
# together


def draw(study: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    if found := study.get("after_forgetting"):
        for name, curve in found["curves"].items():
            a.plot(range(1, BEHIND + 1), curve, label=name, ls="--" if "plain" in name else "-")
        a.set(xlabel="tokens behind the cut", ylabel="nats")
        a.set(title=f"the note closes {found['closed']['note']:.0%} of the gap")
        a.legend(fontsize=7)
    a.axis("on" if found else "off")
    rates, known = study["rate_and_count_by_place"], study["told_nats"]
    b.barh([*rates], [rate for rate, _ in rates.values()])
    b.set(xlabel="share of tokens that a thought follows", xlim=(0, 1))
    c.barh([*known], [*known.values()])
    c.set(xlabel="nats", title="what a run's first thought tells a linear reader")
    bits = study["told_by_each_bit"]
    if bits:
        shown = d.imshow([*bits.values()], aspect="auto", cmap="Blues", vmin=0)
        d.set_yticks(range(len(bits)), [*bits])
        d.set(xlabel="bit", title="what each bit tells, in nats")
        figure.colorbar(shown, ax=d)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, StudyConfig)
    device = pick_device(config.device)
    model, vocabulary, state = load_model(config.run, device)
    block = state["config"]["block"]
    if not model.config.n_bits or not vocabulary.is_text:
        raise DataError(f"{config.run} is not a thinking model of a text")
    if config.plain and block <= BEHIND:
        raise DataError(f"windows of {block} tokens are too short: {BEHIND} lie behind the cut")
    thinker = (model, as_trained(state, vocabulary))
    folder = config.data or state["config"]["data"]
    text = load_split(folder, "val", vocabulary, block)
    torch.manual_seed(0)
    study = {"task": state["meta"]["task"], "run": config.run, "plain": config.plain}
    if config.plain:
        other, _, its_state = load_plain(config.plain, vocabulary, device)
        train = load_split(folder, "train", vocabulary, block)
        frequency = frequencies(train.tokens, len(vocabulary.tokens)).to(device)
        real = text.first(config.windows, block).real[:, 1:].to(device)
        plain = (other, as_trained(its_state, vocabulary))
        study["after_forgetting"] = after_forgetting(thinker, plain, real, frequency)
    study |= where_and_what(thinker, text, vocabulary, config.windows)
    out = Path(config.run)
    study = write_rounded(study, out / "study.json")
    draw(study, out / "study.png")
    print(json.dumps(study, indent=1) + f"\nwritten: {out / 'study.json'}, {out / 'study.png'}")


if __name__ == "__main__":
    run(main, "study.py")
