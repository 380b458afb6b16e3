"""
Variant: what to think is learned by REINFORCE, without the echo: a thought is reinforced by the
loss of all that follows it, against the other rollouts of its sequence.

  python lab/variants/reinforce.py --steps=800 --warm_up=1 --out=out/reinforce

What it shows: one number for each choice of a thought is far less than a gradient for each of its
bits. It replaces train.hybrid_loss; and each sequence has several rollouts from the start, since
there must be others to compare with. Arguments are train.py's.
"""

import sys
from pathlib import Path

import torch
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
    def draw(self) -> tuple:
        """A batch with several rollouts of each sequence, in the warm-up, too."""
        paid, self.paid = self.paid, True
        batch, plan, free = super().draw()
        self.paid, rollouts = paid, self.config.rollouts
        own = torch.arange(len(free), device=free.device) // rollouts * rollouts
        return batch.rows(own), {name: x[own] for name, x in plan.items()}, free


def hybrid_loss(gpt, grid: train.Grid, out: train.GridOutput, batch, free, config, paid):
    """As train.hybrid_loss, and one more term: minus the mean of advantage times log p(thought)."""
    terms = usual_loss(gpt, grid, out, batch, free, config, paid)
    cost = out.loss.detach() * train.counted_tokens(batch)
    returns = train.return_to_go(cost, grid, 0.0, config.horizon)
    advantage = returns - train.baseline(returns, cost, config.rollouts)
    number = grid.next_thought(gpt.config.vocab_size)
    log_p = gpt.thoughts.log_probability(out.thoughts, number)
    terms["thoughts"] = -train.mean(advantage * log_p, grid.thinks)
    return terms


def main(argv: list[str]) -> None:
    model.Thoughts, train.Trainer, train.hybrid_loss = NoEcho, Trainer, hybrid_loss
    train.main(argv)


if __name__ == "__main__":
    run(main, "reinforce.py")
