"""
Variant: a thought is drawn from a softmax over K = 2^n_bits thoughts, each with an embedding of
its own, instead of bit by bit.

  python lab/variants/softmax.py config/automata.toml --data=FOLDER --n_bits=5 --out=out/softmax

What it shows: a thought that is not used gets no gradient, so that two states that once share a
thought stay together. It takes the same arguments as train.py; the checkpoint is its own.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import runs
import train


class SoftmaxThoughts(nn.Module):
    """In place of model.Thoughts, with the same methods; h (..., K) are logits of thoughts."""

    def __init__(self, n_bits: int, n_embd: int):
        super().__init__()
        self.head = nn.Linear(n_embd, 2**n_bits)
        self.embedding = nn.Embedding(2**n_bits, n_embd)

    def bits(self, number: Tensor) -> Tensor:
        """(...) -> (..., K): 1 at the thought, else -1; times infinity, noise that forces it."""
        return 2.0 * F.one_hot(number, self.head.out_features) - 1

    def forward(self, number: Tensor) -> Tensor:
        return self.embedding(number)

    def noise(self, *shape: int, generator=None) -> Tensor:
        """Gumbel noise (*shape, K): argmax of logits plus this is a draw (Gumbel 1954)."""
        like = self.embedding.weight
        u = torch.rand(*shape, self.head.out_features, generator=generator, device=like.device)
        return -(-u.clamp(1e-9, 1 - 1e-7).log()).log()

    def choose(self, h: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        return (h + noise).argmax(dim=-1)

    def log_probability(self, h: Tensor, number: Tensor) -> Tensor:
        return h.log_softmax(dim=-1).gather(-1, number[..., None])[..., 0]

    def echo(self, h: Tensor) -> Tensor:
        p = h.softmax(dim=-1)
        return (p - p.detach()) @ self.embedding.weight.detach()


if __name__ == "__main__":
    model.Thoughts = SoftmaxThoughts
    runs.run(train.main, "softmax.py")
