"""
When does a circuit come into being? Train a model, and look through the lens on the way.

  python lab/growth.py config/deals.toml --n_layer=2 --out=out/deals2
  python lab/growth.py --out=out/chain --threads=1             the main job

Takes what train.py takes, and trains as it does. Writes growth.json and growth.png, and the
checkpoint, into `out`. At steps that lie ever further apart: the share of pairs of validation rows
that the model tells apart (lab/lens.py); the smallest circuit that explains 85% of F; how many of
its LAST strongest edges are those of the finished model, as Jaccard index, beside that of the
finished model found on the two halves of the pairs: more than that no method can find.

Not here: the lens itself (lab/lens.py).
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError
from lab.lens import attribution, check, held_out_rows, jaccard, mixed, size, top
from model import GPT, Thinking
from options import load_config, run
from runs import save_checkpoint
from train import Config, Trainer, begin

RATIO = 1.5  # from one look to the next, in steps
FIRST = 20  # step of the first look after step 0
ROWS = 300
LAST = 10  # strongest edges that are compared
FEW = 10  # steps of integrated gradients


def look(model: GPT, thinking: Thinking, real: Tensor) -> dict:
    """What the lens sees; "scores" of both halves of the pairs, None where it sees no effect."""
    seen = {"told apart": 0.0, "F": 0.0, "circuit": None, "scores": None}
    try:
        found, held = mixed(model, thinking, real)
    except DataError:  # thoughts are laid out in too many ways as yet
        return seen
    apart = (held.rows() > 0) & (held.rows(held.edges.float()) < 0)
    seen |= {"told apart": apart.float().mean().item(), "F": held.ends[0] - held.ends[1]}
    seen["scores"] = [attribution(patch, FEW) for patch in (found, held)]
    seen["circuit"] = size(held, seen["scores"][0])
    return seen


def compared(looks: list[dict], edges: Tensor) -> tuple[list[dict], float]:
    """-> looks, "Jaccard" with the last of them in place of the scores; its split-half Jaccard."""
    last = looks[-1]["scores"]
    if last is None:
        raise DataError("the finished model's thoughts are laid out in too many ways")
    tops = [top(score, edges, LAST) for score in last]
    for seen in looks:
        scores = seen.pop("scores")
        seen["Jaccard"] = scores and jaccard(top(scores[1], edges, LAST), tops[0])
    return looks, jaccard(*tops)


def draw(looks: list[dict], floor: float, count: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [max(1, seen["step"]) for seen in looks]
    shares = {
        "pairs told apart": [seen["told apart"] for seen in looks],
        f"{LAST} strongest edges, Jaccard with the last look": [seen["Jaccard"] for seen in looks],
        f"edges for f = .85, share of all {count}": [
            seen["circuit"] and seen["circuit"] / count for seen in looks
        ],
    }
    for name, values in shares.items():
        points = [(x, y) for x, y in zip(steps, values) if y is not None]
        axis.plot(*zip(*points), "o-", ms=3, label=name)
    axis.axhline(floor, color="C1", ls=":", label="split-half Jaccard of the last look")
    axis.set(xlabel="steps", xscale="log", ylim=(0, 1.02))
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, Config)
    trainer = Trainer(config)
    check(trainer.model, trainer.vocabulary, config.out)
    begin(trainer)
    real = held_out_rows(config.data, trainer.vocabulary, ROWS)
    looks, following = [], 0
    while True:
        last = trainer.left <= 0
        if trainer.step >= following or last:
            model = copy.deepcopy(trainer.model).eval().cpu()
            thinking = dataclasses.replace(trainer.thinking, greedy=True)
            looks.append({"step": trainer.step} | look(model, thinking, real))
            shown = {k: v for k, v in looks[-1].items() if k != "scores"}
            print(json.dumps(shown), flush=True)
            following = max(FIRST, trainer.step * RATIO)
        if last:
            break
        trainer.train_step()
    edges = mixed(model, thinking, real)[0].edges
    looks, floor = compared(looks, edges)
    out = Path(config.out)
    save_checkpoint(out / "checkpoint.pt", trainer.state())
    report = {"edges": int(edges.sum()), "split-half Jaccard": floor, "looks": looks}
    (out / "growth.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(looks, floor, int(edges.sum()), out / "growth.png")
    print(f"validation: {trainer.validate()}; split-half Jaccard {floor:.2f}")
    print(f"written: {out}/checkpoint.pt, growth.json, growth.png")


if __name__ == "__main__":
    run(main, "growth.py")
