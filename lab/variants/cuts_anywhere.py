"""
Variant: a cut falls at any thought of the prompt alike, once a step, and what is thought behind it
stays in view.

  python lab/variants/cuts_anywhere.py config/automata.toml --data=FOLDER --out=out/cuts_anywhere

What it shows: a later thought, thought in full view, knows the answer. Without late cuts nothing
asks the thought at the cut to tell apart states that give the same answer now and another later.
Try a task with --answer=accept of data/automata/prepare.py. Arguments are train.py's, but `cuts`
stays 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from options import run


def main(argv: list[str]) -> None:
    train.CUT_LATE = 0.0
    train.main([*argv, "--cuts=1"])


if __name__ == "__main__":
    run(main, "cuts_anywhere.py")
