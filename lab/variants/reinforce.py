"""
Variant: what to think is learned by REINFORCE, without the echo: a thought is reinforced by the
loss of all that follows it in a truncated pass, against the other rollouts of its sequence.

  python lab/variants/reinforce.py --steps=800 --warm_up=1 --out=out/reinforce

What it shows: one number for each choice of a thought is far less than a gradient for each of its
bits. It replaces train.hybrid_loss; and each sequence has several rollouts from the start, since
there must be others to compare with. Arguments are train.py's.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import train
from options import run

usual_loss = train.hybrid_loss


class NoEcho(model.Thoughts):
    def echo(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., D), all zeros, and no gradient."""
        return self.embedding.weight.new_zeros(*h.shape[:-1], self.embedding.out_features)


class Trainer(train.Trainer):
    def draw(self) -> train.Batch:
        """A batch with several rollouts of each sequence, in the warm-up, too."""
        paid, self.paid = self.paid, True
        batch = super().draw()
        self.paid = paid
        return batch


def hybrid_loss(gpt, grid: train.Grid, batch, thinking, config: train.Config, paid: bool):
    """As train.hybrid_loss, and one more term: minus the mean of advantage times log p(thought)."""
    terms, right, expected = usual_loss(gpt, grid, batch, thinking, config, paid)
    out = train.read(gpt, grid, config.window)
    cut = train.draw_cut(grid, batch, config.forget, train.CUT_LATE)
    with torch.no_grad():
        kept = train.read(gpt, grid, config.window, cut.used, cut.segment)
    cost = kept.loss * train.counted_tokens(batch)
    returns = train.return_to_go(cost, cut.left, 0.0, config.horizon)
    advantage = returns - train.baseline(returns, cost, config.rollouts)
    thoughts = cut.used[:, :, 1 : train.RECALL_SLOT]
    seen = F.pad(thoughts, (0, 3))  # what follows this cell is a thought behind the cut
    number = grid.next_thought(gpt.config.vocab_size)
    log_p = gpt.thoughts.log_probability(out.thoughts, number)
    terms["thoughts"] = -train.mean(advantage * log_p, seen)
    return terms, right, expected


def main(argv: list[str]) -> None:
    model.Thoughts, train.Trainer, train.hybrid_loss = NoEcho, Trainer, hybrid_loss
    train.main(argv)


if __name__ == "__main__":
    run(main, "reinforce.py")
