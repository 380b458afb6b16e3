"""
Variant: trained pause tokens. All thoughts are one and the same, so that they can carry nothing,
and give only time; all else, training included, is as ever.

  python lab/variants/pause.py config/automata.toml --data=FOLDER --out=out/pause

After Goyal et al. 2023, Think before you speak (arXiv:2310.02226). What it shows: more cells to
compute in do not help here; it is what a thought says that does. Arguments are train.py's.
"""

import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model
import train
from options import run


class Pause(model.Thoughts):
    """Whatever its numbers say, a thought is number 0."""

    def likeliest(self, h: Tensor) -> Tensor:
        return super().likeliest(h) * 0


if __name__ == "__main__":
    model.Thoughts = Pause
    run(train.main, "pause.py")
