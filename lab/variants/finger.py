"""
Variant: how to think in a row is learned. All thoughts come behind the question, and in training
most sequences are read with a finger, which moves on by a token with every thought.

  python data/arithmetic/prepare.py --width=16 --think_after== --out=out/data/silent
  python lab/variants/finger.py config/silent.toml --data=out/data/silent

Behind a question all of it is in view at once. A model of one layer then learns short questions by
heart, in one look; its thoughts carry the answer, not the work, and longer questions are out of
reach. Where the finger is used, thought number r sees of the question the tokens r and r + 1 only,
and the question's last token, behind which it begins (r = 0), sees 0 and 1: whoever wants to know
what was read before must think it. Where the gate decides, and after training, there is no finger.

It adds to model.visible. Questions must have one length (prepare.py's --width), so that token r is
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

SHARE = 0.7  # of the sequences in which nothing is decided by the gate

usual_visible, usual_rollout = model.visible, train.rollout
finger = None  # (B,) position of the question's last token where it is read so, else 0


def visible(query: Cells, key: Cells, window: int = 0) -> Tensor | None:
    """As model.visible; and in a sequence with a finger, a thought sees two tokens only."""
    mask = usual_visible(query, key, window)
    if finger is None:
        return mask
    last, at = finger[:, None, None], key.position[:, None, :]
    r = query.position[:, :, None] - last  # (B, n_query, 1), below 0 within the question
    near = (at == r) | (at == r + 1) | (at >= last)
    return mask & (near | (r < 0) | (last == 0))


def rollout(*arguments, where: Tensor | None = None, **options) -> tuple:
    """As train.rollout. where: (B,) see `finger`."""
    global finger
    finger = where
    try:
        return usual_rollout(*arguments, **options)
    finally:
        finger = None


class Trainer(train.Trainer):
    @property
    def thinking(self) -> Thinking:
        """In the warm-up, one thought more than the longest level in use."""
        usual, most = super().thinking, self.curriculum.levels[-1] + 1
        return usual if self.paid else replace(usual, max_run=min(usual.max_run, most))

    def draw(self) -> tuple:
        """As ever, and in the plan: where the finger is."""
        batch, plan, teaches = super().draw()
        reads = torch.rand(teaches.shape, device=teaches.device) < SHARE
        reads &= ~teaches | (self.thinking.force is not None)
        return batch, plan | {"where": (batch.prompt - 1) * reads}, teaches


def main(argv: list[str]) -> None:
    model.visible, train.rollout, train.Trainer = visible, rollout, Trainer
    train.main(argv)


if __name__ == "__main__":
    run(main, "finger.py")
