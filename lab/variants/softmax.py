"""
Variant: a thought is drawn from a softmax over K = 2^n_bits thoughts, each with an embedding of
its own, instead of bit by bit.

  python lab/variants/softmax.py config/automata.toml --data=FOLDER --n_bits=6 --out=out/softmax

What it shows: a thought that is not used gets no gradient, so that two states that once share a
thought stay together. It takes train.py's arguments; the checkpoint is its own.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import train
from options import run


class SoftmaxThoughts(nn.Module):
    """In place of model.Thoughts, with the same methods; h (..., K) are logits of thoughts."""

    def __init__(self, n_bits: int, n_embd: int):
        super().__init__()
        self.head = nn.Linear(n_embd, 2**n_bits)
        self.embedding = nn.Embedding(2**n_bits, n_embd)

    def forward(self, number: Tensor) -> Tensor:
        return self.embedding(number)

    def likeliest(self, h: Tensor) -> Tensor:
        return h.argmax(dim=-1)

    def draw(self, h: Tensor, generator=None) -> Tensor:
        """The argmax of logits plus Gumbel noise is a draw (Gumbel 1954)."""
        u = torch.rand(h.shape, generator=generator, device=h.device).clamp(1e-9, 1 - 1e-7)
        return self.likeliest(h - (-u.log()).log())

    def log_probability(self, h: Tensor, number: Tensor) -> Tensor:
        return h.log_softmax(dim=-1).gather(-1, number[..., None])[..., 0]

    def echo(self, h: Tensor) -> Tensor:
        p = h.softmax(dim=-1)
        return (p - p.detach()) @ self.embedding.weight


if __name__ == "__main__":
    model.Thoughts = SoftmaxThoughts
    run(train.main, "softmax.py")
