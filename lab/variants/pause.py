"""
Variant: trained pause tokens. All thoughts are one and the same, so that they can carry nothing,
and give only time; all else, training included, is as ever.

  python lab/variants/pause.py config/automata.toml --data=FOLDER --out=out/pause

After Goyal et al. 2023, Think before you speak (arXiv:2310.02226). What it shows: more cells to
compute in do not help here; it is what a thought says that does. Arguments are train.py's.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from options import run

NEVER = -100.0  # its tanh is -1, and has a gradient of exactly 0: no bit is ever set


class Trainer(train.Trainer):
    def __init__(self, config: train.Config):
        super().__init__(config)
        if self.model.thoughts is not None:
            torch.nn.init.zeros_(self.model.thoughts.head.weight)
            torch.nn.init.constant_(self.model.thoughts.head.bias, NEVER)


if __name__ == "__main__":
    train.Trainer = Trainer
    run(train.main, "pause.py")
