"""
Variant: how to think in a row is learned. All thoughts come behind the question, or behind each of
its parts, and in training most sequences are read with a finger, which moves on by a token with
every thought.

  python data/arithmetic/prepare.py --width=16 --think_after== --out=out/data/silent
  python lab/variants/finger.py config/silent.toml --data=out/data/silent
  python data/arithmetic/prepare.py --width=6 --parts=3 --levels=12 --think_after=";=" \
    --out=out/data/parts
  python lab/variants/finger.py config/parts.toml --data=out/data/parts

Behind a question all of it is in view at once. A model of one layer then learns short questions by
heart, in one look; its thoughts carry the answer, not the work, and longer questions are out of
reach. Where the finger is used, thought number r sees of its part the tokens r and r + 1 only, and
the part's last token, behind which it begins (r = 0), sees 0 and 1: whoever wants to know what was
read before must think it. Token 0 of a later part is the last thought of the part before. Where the
gate decides, and after training, there is no finger; and once all levels are in use and mastered,
only what is right without it counts as learned.

It adds to model.visible. Parts must have one length (prepare.py's --width), so that token r is
always equally far from thought r. What it shows is in docs/where.md. Arguments are train.py's.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import train
from model import Cells, Thinking
from options import run
from train import UNFORCED, may_follow

SHARE = 0.7  # of the sequences in which nothing is decided by the gate

usual_visible, usual_rollout = model.visible, train.rollout
finger = None  # (B,) tokens of a part where it is read so, else 0; and thoughts in a run
read = None  # (B,) bool: sequences of this step that are read so


def visible(query: Cells, key: Cells, window: int = 0) -> Tensor | None:
    """As model.visible; and in a sequence with a finger, a thought sees two tokens of its part."""
    mask = usual_visible(query, key, window)
    if finger is None:
        return mask
    (size, R), here, at = finger, query.position[:, :, None], key.position[:, None, :]
    size = size[:, None, None]
    r = (here - size) % (size + R)  # (B, n_query, 1) cells since a part's last token
    near = (at == here - size) | (at == here - size + 1) | (at >= here - r)
    return mask & (near | (size == 0))


def rollout(model, real, length, thinking, *others, where: Tensor | None = None, **options):
    """As train.rollout. where: (B,) see `finger`."""
    global finger
    finger = None if where is None else (where, thinking.max_run)
    try:
        return usual_rollout(model, real, length, thinking, *others, **options)
    finally:
        finger = None


class Curriculum(train.Curriculum):
    def grow(self, level: Tensor, right: Tensor) -> None:
        """As ever; but once all levels are mastered, by the sequences without a finger only."""
        counted = ~read if self.learned else torch.ones_like(read)
        super().grow(level[counted], right[counted])


class Trainer(train.Trainer):
    @property
    def thinking(self) -> Thinking:
        """In the warm-up, one thought more than the longest level in use."""
        usual, most = super().thinking, self.curriculum.levels[-1] + 1
        return usual if self.paid else replace(usual, max_run=min(usual.max_run, most))

    def draw(self) -> tuple:
        """As ever, and in the plan: where the finger is."""
        global read
        batch, plan, of = super().draw()
        read = torch.rand(of.shape, device=of.device) < SHARE
        read &= (plan["forced"] != UNFORCED).flatten(1).all(dim=1)
        size = may_follow(batch.real, self.thinking.after).int().argmax(dim=1)
        return batch, plan | {"where": size * read}, of


def main(argv: list[str]) -> None:
    model.visible, train.rollout = visible, rollout
    train.Trainer, train.Curriculum = Trainer, Curriculum
    train.main(argv)


if __name__ == "__main__":
    run(main, "finger.py")
