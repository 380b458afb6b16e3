"""
How long does a model think behind each part of a question? Writes parts.json and parts.png into the
run's folder.

  python lab/parts.py --run=out/parts      seconds

The questions are chains in parts (data/arithmetic/prepare.py --parts). Measured on validation rows,
thoughts greedy:
  thoughts      behind a part, by its operations, for parts that end with ; and with =
  correlation   of thoughts and operations, over all parts, and over those of one row: both less
                their row's mean, in rows of several parts
The picture: some rows, a line each; every thought is a mark where it stands.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, load_split
from lab.report import write_rounded
from lab.where import draw_page
from options import load_config, option, run
from runs import load_model, pick_device
from train import as_trained, evaluate

PAGE = 12  # rows in the picture
MARK = "\u00b7"  # a thought in it


@dataclass
class PartsConfig:
    run: str = option("out/parts", "folder of the thinking model")
    rows: int = option(200, "validation rows a level, at most", 2)
    device: str = option("auto", "auto, cpu, cuda or mps")


def find_parts(tokens: list[str], thoughts: list[int]) -> list[tuple[str, int, int]]:
    """A row's tokens, and how many thoughts follow each -> (last token, operations, thoughts)."""
    parts, operations = [], 0
    for token, count in zip(tokens, thoughts):
        operations += token[0] in "+*"
        if token in ";=":
            parts.append((token, operations, count))
            operations = 0
    return parts


def measure(rows: list[list[tuple[str, int, int]]]) -> dict:
    """Parts of each row, see `find_parts` -> the numbers of the docstring."""
    counts = {";": {}, "=": {}}
    for last, operations, thoughts in itertools.chain(*rows):
        counts[last].setdefault(operations, []).append(thoughts)
    pairs = [torch.tensor([part[1:] for part in row]).double() for row in rows]
    within = [some - some.mean(dim=0) for some in pairs if len(some) > 1]
    correlation = {
        name: torch.corrcoef(torch.cat(some).T)[0, 1].item()
        for name, some in {"all": pairs, "one_row": within}.items()
    }
    mean = {k: {n: sum(x) / len(x) for n, x in sorted(by.items())} for k, by in counts.items()}
    return {"thoughts": mean, "correlation": correlation}


def main(argv: list[str]) -> None:
    config = load_config(argv, PartsConfig)
    device = pick_device(config.device)
    model, vocabulary, state = load_model(config.run, device)
    if ";" not in vocabulary.tokens or not model.config.n_bits:
        raise DataError(f"{config.run} is not a thinking model of questions in parts")
    split = load_split(state["config"]["data"], "val", vocabulary, state["config"]["block"])
    thinking, generator = as_trained(state, vocabulary), torch.Generator(device).manual_seed(0)
    parts, lines = [], []
    for level in split.levels:
        batch = split.first(config.rows, level).to(device)
        grid, _, _ = evaluate(model, batch, thinking, generator)
        counts = grid.thinks.sum(dim=2).tolist()
        for ids, count, length in zip(batch.real.tolist(), counts, batch.length.tolist()):
            tokens = [vocabulary.tokens[i] for i in ids[: length - 1]]
            parts.append(find_parts(tokens, count))
            marked = ([(token, False)] + [(MARK, True)] * n for token, n in zip(tokens, count))
            lines.append([*itertools.chain(*marked)])
    folder = Path(config.run)
    found = write_rounded(measure(parts), folder / "parts.json")
    draw_page(lines[-PAGE:], folder / "parts.png")
    print(json.dumps(found, indent=1) + f"\nwritten: {folder / 'parts.json'}, parts.png")


if __name__ == "__main__":
    run(main, "parts.py")
