"""
Variant: teaches runs of several thoughts. All of them come behind the question, or behind each of
its parts, and in training the question is read with a finger, which moves on by a token with every
thought.

  python data/arithmetic/prepare.py --width=16 --think_after== --out=out/data/silent
  python lab/variants/finger.py config/silent.toml --data=out/data/silent
  python data/arithmetic/prepare.py --width=6 --parts=3 --levels=12 --think_after=";=" \
    --out=out/data/parts
  python lab/variants/finger.py config/parts.toml --data=out/data/parts

Behind a question all of it is in view at once. A model then learns short questions by heart, in one
look; its thoughts carry the answer, not the work, and longer questions are out of reach. With the
finger a thought, number r of its run, sees the tokens r and r + 1 of its part (from 0), and the
part's last token, behind which the run begins (r = 0), sees 0 and 1. It also sees the thoughts of
its run. All that came before is dimmed: attention's logits are lowered by as much as is drawn for
the sequence, hardly at all or beyond recognition. So whoever wants to know what was read before
must think it, and what is learned with the finger is never far from what is needed without. Token
0 of a later part is the last thought of the part before.

Whether a level is mastered is judged by the half of the sequences in which the finger presses
hardest. Once all are, it is lifted little by little, for as long as they stay so; and nothing
counts as learned before it is gone. Where the gate decides, and after training, there is none.

Parts must have one length (prepare.py's --width), so that token r is always equally far from
thought r, and nothing may jump (forget = 0). What it shows is in docs/where.md. It replaces
model.visible, and train.py's rollout, Curriculum and Trainer. Arguments are train.py's.
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

PRESS = 16.0  # by how much it lowers logits, at first: the median of what is drawn
LIFT = 0.99  # what is left of that after a step in which all levels are mastered
GONE = 0.01  # what is left when it counts as lifted

usual_visible, usual_rollout = model.visible, train.rollout
finger = None  # tokens of a part; thoughts in a run; (B, 1, 1) by how much it lowers logits


def visible(query: Cells, key: Cells, window: int = 0) -> Tensor | None:
    """As model.visible; with a finger (B, n_query, n_key) to add to the attention's logits."""
    mask = usual_visible(query, key, window)
    if finger is None or mask is None:  # None: there are no thoughts
        return mask
    (size, R, press), here, at = finger, query.position[:, :, None], key.position[:, None, :]
    r = (here - size) % (size + R)  # (B, n_query, 1) cells since a part's last token
    near = (at == here - size) | (at == here - size + 1) | (at >= here - r)
    return torch.where(near, 0.0, -press).masked_fill(~mask, -torch.inf)


def rollout(gpt, real, length, thinking, *others, press: Tensor | None = None, **options):
    """As train.rollout. press: (B,) by how much the finger lowers logits."""
    global finger
    if press is not None:
        size = int(may_follow(real[0], thinking.after).int().argmax())
        finger = size, thinking.max_run, press[:, None, None]
    try:
        return usual_rollout(gpt, real, length, thinking, *others, **options)
    finally:
        finger = None


class Curriculum(train.Curriculum):
    press = PRESS

    def grow(self, level: Tensor, right: Tensor) -> None:
        super().grow(level, right)
        if self.learned and self.right > train.MASTERED:
            self.press *= LIFT
        if self.press > GONE:
            self.right = min(self.right, train.LEARNED)


class Trainer(train.Trainer):
    @property
    def thinking(self) -> Thinking:
        """In the warm-up, one thought more than the longest level in use."""
        usual, most = super().thinking, self.curriculum.levels[-1] + 1
        return usual if self.paid else replace(usual, max_run=min(usual.max_run, most))

    def draw(self) -> tuple:
        """As ever; and how hard the finger presses. The level of what shall not count is -1."""
        batch, plan, of = super().draw()
        u = torch.rand(of.shape, device=of.device)
        press = self.curriculum.press * u / (1 - u)
        press *= plan["forced"][:, 0, 0] != UNFORCED  # there the gate decides all
        level = batch.level.masked_fill(u < 0.5, -1)
        return batch._replace(level=level), plan | {"press": press}, of


def main(argv: list[str]) -> None:
    model.visible, train.rollout = visible, rollout
    train.Trainer, train.Curriculum = Trainer, Curriculum
    train.main(argv)


if __name__ == "__main__":
    run(main, "finger.py")
