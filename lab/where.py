"""
Where does a model of mixed text think: in the prose, or where something must be worked out? Writes
where.json and where.png to the run's folder.

  python lab/where.py --run=out/mixed --plain=out/mixed_plain      half a minute

The text is of data/mixed: a sum is a digit, operations and `=`, all of them in the window; what
belongs to no sum is prose. Measured on validation windows, thoughts greedy, for each mode of
report.py and for the plain model:
  prose nats   a character that follows a character of prose
  sums         share whose answer is right, and by operations
  in prose     thoughts a character of prose
  at sums      share of the sums' operations that a thought follows
The picture is a page of text with every token marked that a thought follows.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, load_split
from data.mixed.prepare import MODULUS, OPERATIONS
from lab.report import PART, most_used_thought, write_rounded
from model import GPT, MODES, Thinking
from options import load_config, option, run
from runs import load_model, load_plain, pick_device
from train import as_trained, rollout

PAGE = 16  # windows in the picture
COLUMNS = {
    "prose nats": "prose_nats",
    "sums": "sums_right",
    "in prose": "thoughts_in_prose",
    "at sums": "thoughts_at_sums",
}


@dataclass
class WhereConfig:
    run: str = option("out/mixed", "folder of the thinking model")
    plain: str = option("", "folder of a plain one, to stand beside it")
    windows: int = option(1000, "windows of validation text, at most", 2)
    device: str = option("auto", "auto, cpu, cuda or mps")


@torch.no_grad()
def read(model: GPT, real: Tensor, thinking: Thinking) -> tuple[Tensor, ...]:
    """
    real (N, T) -> nats of the next token, whether it is the likeliest, whether a thought comes
    before it: all but for the last token, (N, T - 1).
    """
    generator, parts = torch.Generator(real.device).manual_seed(0), []
    for some in real.split(PART):
        length = torch.full_like(some[:, 0], some.size(1))
        grid, out = rollout(model, some, length, thinking, generator)
        said = out.loss * grid.emits, out.right & grid.emits, grid.thinks
        parts.append([said[0].sum(dim=2), said[1].any(dim=2), said[2].any(dim=2)])
    return tuple(torch.cat(part)[:, :-1].cpu() for part in zip(*parts))


def find_sums(tokens: list[str]) -> list[tuple[int, int]]:
    """-> (place of the digit, place of `=`) of each sum whose answer follows in these tokens."""
    sums = []
    for equals in range(len(tokens) - 1):
        begin = equals - 1
        while begin >= 0 and tokens[begin] in OPERATIONS:
            begin -= 1
        if tokens[equals] == "=" and 0 <= begin < equals - 1 and tokens[begin].isdigit():
            sums.append((begin, equals))
    return sums


def measure(texts: list[list[str]], nats: Tensor, right: Tensor, thinks: Tensor) -> dict:
    """Windows as tokens, and what `read` says of them -> the numbers of the docstring."""
    marks = {*OPERATIONS, *map(str, range(MODULUS)), "="}
    prose = torch.tensor([[token not in marks for token in text] for text in texts])
    answers, thoughtful = {}, []
    for i, text in enumerate(texts):
        for begin, equals in find_sums(text):
            answers.setdefault(equals - begin - 1, []).append(right[i, equals].item())
            thoughtful += thinks[i, begin + 1 : equals].tolist()
    every = [x for some in answers.values() for x in some]
    return {
        "prose_nats": nats[prose[:, :-1] & prose[:, 1:]].mean().item(),
        "sums_right": sum(every) / len(every),
        "sums_right_by_operations": {n: sum(x) / len(x) for n, x in sorted(answers.items())},
        "thoughts_in_prose": thinks[prose[:, :-1]].double().mean().item(),
        "thoughts_at_sums": sum(thoughtful) / len(thoughtful),
    }


def where(config: WhereConfig) -> tuple[dict, list[list[str]], Tensor]:
    """-> what where.json holds; windows as tokens; whether each thinks. Raises DataError."""
    device = pick_device(config.device)
    model, vocabulary, state = load_model(config.run, device)
    if not vocabulary.is_text or not model.config.n_bits:
        raise DataError(f"{config.run} is not a thinking model of a text")
    text = load_split(state["config"]["data"], "val", vocabulary, state["config"]["block"])
    real = text.first(config.windows, text.block).real.to(device)
    texts = [[vocabulary.tokens[i] for i in row] for row in real.tolist()]
    if not any(find_sums(text) for text in texts):
        raise DataError(f"the text of {config.run} has no sums: make it with data/mixed/prepare.py")
    thinking = as_trained(state, vocabulary)
    thinking.constant = most_used_thought(model, text, thinking, config.windows)
    said = {mode: read(model, real, dataclasses.replace(thinking, mode=mode)) for mode in MODES}
    found = {mode: measure(texts, *what) for mode, what in said.items()}
    if config.plain:
        plain, words, plain_state = load_plain(config.plain, vocabulary, device)
        found["plain"] = measure(texts, *read(plain, real, as_trained(plain_state, words)))
    return found, texts, said["policy"][2]


def draw_page(lines: list[list[tuple[str, bool]]], path: Path) -> None:
    """Lines of (token, whether it is marked)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = max(sum(len(token) for token, _ in line) for line in lines)
    figure, axis = plt.subplots(figsize=(0.11 * width, 0.26 * len(lines)), layout="constrained")
    axis.set(xlim=(-1, width), ylim=(len(lines), -1))
    axis.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for token, marked in line:
            if marked:
                box = (x - 0.5, y - 0.45), len(token), 0.9
                axis.add_patch(plt.Rectangle(*box, color="#f6b26b", lw=0))
            for letter in token.replace("\n", "\u00b7"):
                axis.text(x, y, letter, family="monospace", size=9, ha="center", va="center")
                x += 1
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, WhereConfig)
    found, texts, thinks = where(config)
    folder = Path(config.run)
    found = write_rounded(found, folder / "where.json")
    page = zip(texts[:PAGE], thinks.tolist())
    draw_page([[*zip(text, [*marks, False])] for text, marks in page], folder / "where.png")
    print(f"{'':10s}" + "".join(f"{heading:>12s}" for heading in COLUMNS))
    for name, numbers in found.items():
        print(f"{name:10s}" + "".join(f"{numbers[key]:12.4f}" for key in COLUMNS.values()))
    print(f"written: {folder / 'where.json'}, {folder / 'where.png'}")


if __name__ == "__main__":
    run(main, "where.py")
