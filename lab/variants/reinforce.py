"""
Variant: what to think is learned by REINFORCE, without the echo: a thought is reinforced by the
loss of all that follows it, against the other rollouts of its sequence.

  python lab/variants/reinforce.py --steps=800 --out=out/reinforce

What it shows: one number for each choice of a thought is far less than a gradient for each of its
bits. It replaces train.hybrid_loss; and each sequence has several rollouts from the start, since
there must be others to compare with. Thoughts are forced and cost nothing to the end, since tries
are not meant here. Arguments are train.py's.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import train
from options import run

ROLLOUTS = 4  # of a sequence

usual_loss = train.hybrid_loss


class NoEcho(model.Thoughts):
    def echo(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., D), all zeros, and no gradient."""
        return self.embedding.weight.new_zeros(*h.shape[:-1], self.embedding.out_features)


class Trainer(train.Trainer):
    def draw(self) -> tuple:
        """A batch with ROLLOUTS of each sequence."""
        batch, plan, of = super().draw()
        own = torch.arange(len(of) // ROLLOUTS * ROLLOUTS, device=of.device) // ROLLOUTS * ROLLOUTS
        return batch.rows(own), {name: x[own] for name, x in plan.items()}, of[: len(own)]


def baseline(returns: Tensor, rollouts: int) -> Tensor:
    """
    What a (B, T, S) return-to-go is compared with: the mean, at the same token, of the other
    rollouts of the sequence, which stand one after another (Kool et al. 2019, RLOO) -> (B, T, 1).
    """
    groups = returns[:, :, 0].unflatten(0, (-1, rollouts))  # (B / rollouts, rollouts, T)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (rollouts - 1)
    return others.flatten(0, 1)[:, :, None]


def hybrid_loss(gpt, grid: train.Grid, out: train.GridOutput, batch, of, config, paid):
    """As train.hybrid_loss, and one more term: minus the mean of advantage times log p(thought)."""
    terms = usual_loss(gpt, grid, out, batch, of, config, paid)
    cost = out.loss.detach() * train.counted_tokens(batch)
    returns = train.return_to_go(cost, grid, 0.0, config.horizon)
    advantage = returns - baseline(returns, ROLLOUTS)
    number = grid.next_thought(gpt.config.vocab_size)
    log_p = gpt.thoughts.log_probability(out.thoughts, number)
    terms["thoughts"] = -train.mean(advantage * log_p, grid.thinks)
    return terms


def main(argv: list[str]) -> None:
    model.Thoughts, train.Trainer, train.hybrid_loss = NoEcho, Trainer, hybrid_loss
    train.main([*argv, "--warm_up=1"])


if __name__ == "__main__":
    run(main, "reinforce.py")
