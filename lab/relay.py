"""
The thoughts' circuit: which edges write the running value into a thought, which read it, and is it
the same circuit after every operation?

  python train.py --threads=1                (or lab/growth.py, which looks on)
  python lab/relay.py --run=out/chain

Writes relay.json and relay.png into the run's folder. A thought follows every token, the last 8
cells are in view, and rows are held-out ones of 2 to 128 operations.
  One step: the cell of an operation puts out the next thought. Corrupt, the thought before it is
    another row's, or all cells are. d = sum of the thought head's outputs over the bits in which
    what comes next differs, each with the sign of the clean row's. Scores are integrated gradients
    over edges and cells.
  One thought: it is replaced by another row's at the same token, and all else goes on freely. The
    answer follows if it is the one that the model gives to the spliced question: the other row's
    up to that token, and this row's from there on.
  Running on a circuit: every edge outside it carries another row's run, at every step, from the
    first thought to the answer.

Not here: what thoughts mean (lab/report.py), the lens (lab/lens.py).
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, load_split
from lab.lens import (
    Patch,
    Streams,
    alike,
    attribution,
    jaccard,
    load,
    masked_run,
    pearson,
    readers,
    sources,
    streams,
    top,
    toward_answers,
)
from model import GPT, Cells, Thinking
from options import load_config, option, run
from train import UNFORCED, rollout

VIEW = 8  # cells
STEPS = 20  # of integrated gradients


@dataclass
class RelayConfig:
    run: str = option("out/chain", "folder of the thinking model")
    data: str = option("", "folder of the data, if not where the checkpoint was trained")
    rows: int = option(200, "held-out rows a length", 40)
    far: int = option(128, "the long rows' level", 2)


# ----------------------------------------------------------------------------------------------
# one step


def step(model: GPT, ids: Tensor, at: int, whole: bool, last: bool = False) -> Patch:
    """
    ids (B, C) of streams of tokens and thoughts in turn -> the cell `at` with the VIEW cells
    before it; corrupt the thought before it, or the whole view, is the next row's. d is of the
    thought that comes next, or of the answer's token (`last`).
    """
    begin = max(0, at + 1 - VIEW * model.config.n_layer)
    clean = ids[:, begin : at + 1]
    corrupt = clean.clone()
    other = clean.roll(1, dims=0)
    changed = slice(None) if whole else slice(-2, -1)
    corrupt[:, changed] = other[:, changed]
    view = Streams(clean, Cells(torch.arange(clean.size(1))[None]), VIEW)
    with torch.no_grad():
        outs = [masked_run(model, view._replace(ids=x))[0][:, -1] for x in (clean, corrupt)]
        if last:
            a, b = (model.head(x).argmax(dim=1) for x in outs)
            differ = a != b
        else:
            a, b = (model.thoughts.head(x).sign() for x in outs)  # (B, d)
            differ = (a != b).any(dim=1)
    if differ.sum() < 10:
        raise DataError("fewer than 10 rows' next thoughts depend on what is swapped")
    if last:
        toward, offset = toward_answers(model, a[differ], b[differ])
    else:
        sign, head = ((a - b) / 2)[differ], model.thoughts.head
        toward, offset = (sign @ head.weight).detach(), (sign @ head.bias).detach()
    view = view._replace(ids=clean[differ])
    return Patch(model, view, corrupt[differ], toward, offset)


def strongest(model: GPT, score: Tensor, count: int) -> list[list]:
    """Scores by cell (S, R, C) -> the largest: [edge, cells before the last, score]."""
    S, R, C = score.shape
    names = sources(model.config), readers(model.config)
    found = []
    for i in score.abs().flatten().topk(count).indices.tolist():
        s, r, c = i // (R * C), i // C % R, i % C
        found.append([f"{names[0][s]} > {names[1][r]}", C - 1 - c, score[s, r, c].item()])
    return found


# ----------------------------------------------------------------------------------------------
# a whole row


@torch.no_grad()
def follows(model: GPT, thinking: Thinking, real: Tensor, behind: list[int]) -> dict[int, float]:
    """{operations behind the thought that is replaced: share of answers that follow it}"""
    length = torch.full_like(real[:, 0], real.size(1))
    grid, _ = rollout(model, real, length, thinking)
    own = grid.token[:, :, 1] - model.config.vocab_size  # (B, T)

    def answer(ids: Tensor, forced: Tensor | None = None) -> Tensor:
        grid, _ = rollout(model, ids, length, thinking, None, forced)
        stream = grid.token[:, :-1, :2].flatten(1)  # tokens and thoughts in turn
        return model(stream, None, None, thinking.window).logits[:, -1].argmax(dim=1)

    before, found = answer(real), {}
    for operations in behind:
        t = real.size(1) - 3 - operations  # behind them come "=" and the answer
        forced = torch.full((*real.shape, 1), UNFORCED)
        forced[:, t, 0] = own.roll(1, dims=0)[:, t]
        spliced = torch.cat([real.roll(1, dims=0)[:, : t + 1], real[:, t + 1 :]], dim=1)
        aim = answer(spliced)
        differ = aim != before
        if differ.any():
            hits = (answer(real, forced) == aim)[differ]
            found[operations] = hits.float().mean().item()
    return found


@torch.no_grad()
def running(model: GPT, real: Tensor, kept: Tensor) -> float:
    """Share of answers right where only the edges kept, (S, R) bool, carry this row's run."""
    V, view = model.config.vocab_size, VIEW * model.config.n_layer
    mask, clean, other, last = (~kept).float(), real[:, :0], real[:, :0], ()
    for cell in range(2 * real.size(1) - 2):
        if cell % 2:
            new = [V + model.thoughts.likeliest(model.thoughts.head(x)) for x in last]
        else:
            new = real[:, cell // 2], real[:, cell // 2].roll(1, dims=0)
        clean, other = (
            torch.cat([ids, x[:, None]], dim=1)[:, -view:] for ids, x in zip((clean, other), new)
        )
        at = Cells(torch.arange(clean.size(1))[None])
        theirs, put_out = masked_run(model, Streams(other, at, VIEW))
        ours, _ = masked_run(model, Streams(clean, at, VIEW), put_out, mask)
        last = ours[:, -1], theirs[:, -1]
    return (model.head(last[0]).argmax(dim=1) == real[:, -1]).float().mean().item()


# ----------------------------------------------------------------------------------------------
# together


def circuits(model: GPT, near: Tensor, far: Tensor, operations: int) -> dict:
    """near, far: streams (B, C) of rows of 2 and of so many operations."""
    report, halves = {}, [near[::2], near[1::2]]
    read = attribution(step(model, near, 4, whole=False), STEPS, by_cell=True)
    report["reads the last thought"] = strongest(model, read, 6)
    patches = [step(model, half, 4, whole=True) for half in halves]
    patches.append(step(model, far, 2 * operations, whole=True))
    by_cell = attribution(step(model, near, 4, whole=True), STEPS, by_cell=True)
    report["writes the next"] = strongest(model, by_cell, 10)
    scores, edges = [attribution(patch, STEPS) for patch in patches], patches[0].edges
    count = int(edges.sum())
    k = next(
        k for k in range(1, count + 1) if patches[1].faithfulness(top(scores[0], edges, k)) >= 0.85
    )
    tops = [top(score, edges, k) for score in scores]
    answer = attribution(step(model, near, near.size(1) - 1, whole=True, last=True), STEPS)
    report |= {
        "edges": count,
        "circuit of 2 operations": k,
        "its f there": patches[1].faithfulness(tops[0]),
        "its f at the last of the far": patches[2].faithfulness(tops[0]),
        "Jaccard, 2 and far": jaccard(tops[0], tops[2]),
        "Jaccard, split-half of 2": jaccard(tops[0], tops[1]),
        "Pearson, 2 and far": pearson(scores[0], scores[2], edges),
        "Pearson, split-half of 2": pearson(scores[0], scores[1], edges),
        "scores": [score.tolist() for score in scores],
    }
    both = {}
    for size in sorted({k, *(round(count * share) for share in (0.25, 0.4, 0.5, 0.6, 0.75, 1))}):
        both[size] = top(scores[0], edges, size) | top(answer, edges, size)
    return report | {"kept": both}


def draw(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (a, b, c) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    bars = report["reads the last thought"][::-1] + report["writes the next"][::-1]
    names = [f"{edge}, {back} back" if back else edge for edge, back, _ in bars]
    color = ["C0"] * len(report["reads the last thought"]) + ["C1"] * len(report["writes the next"])
    a.barh(range(len(bars)), [-score for *_, score in bars], color=color)
    a.set_yticks(range(len(bars)), names, fontsize=6)
    a.set(title="blue: the last thought alone is swapped; orange: all is", xlabel="- score")
    for name, found in report["the answer follows"].items():
        b.plot([1 + int(n) for n in found], [*found.values()], "o-", ms=3, label=name)
    b.set(xscale="log", ylim=(0, 1.02), xlabel="1 + operations behind the replaced thought")
    b.set(title="share of answers that follow one thought")
    b.legend(fontsize=7)
    for name, found in report["right on a circuit"].items():
        c.plot([kept for kept, _ in found], [right for _, right in found], "o-", ms=3, label=name)
    c.set(title="share right, running on a circuit", xlabel="edges kept", ylim=(0, 1.02))
    c.legend(fontsize=7)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, RelayConfig)
    model, vocabulary, thinking, data = load(config.run)
    if not model.config.n_bits or model.config.recall or thinking.after is not None:
        raise DataError(f"the model in {config.run} does not think behind every token")
    thinking = dataclasses.replace(thinking, force=1.0, window=VIEW, max_run=1)
    rows = {}
    for level, split in ((2, "val"), (8, "val"), (config.far, "test")):
        found = load_split(config.data or data, split, vocabulary, 0)
        if level not in found.levels:
            raise DataError(f"{split}.bin has no rows of level {level}")
        rows[level] = alike(found.first(config.rows, level))
    near, far = (streams(model, thinking, rows[n])[0].ids for n in (2, config.far))
    report = {"run": config.run} | circuits(model, near, far, config.far)
    behind = {8: list(range(9)), config.far: [n for n in (0, 8, 32, 128) if n <= config.far]}
    report["the answer follows"] = {
        f"{level} operations": follows(model, thinking, rows[level], n)
        for level, n in behind.items()
    }
    kept = report.pop("kept")
    report["right on a circuit"] = {
        f"{level} operations": [[int(c.sum()), running(model, real, c)] for c in kept.values()]
        for level, real in rows.items()
    }
    out = Path(config.run)
    (out / "relay.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, out / "relay.png")
    for name, found in report.items():
        if name != "scores":
            print(f"{name}: {found}")
    print(f"written: {out / 'relay.json'}, {out / 'relay.png'}")


if __name__ == "__main__":
    run(main, "relay.py")
