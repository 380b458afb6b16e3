"""
Make rows that ask for what was said before, offline and seeded: train.bin, val.bin and meta.json
beside this file (or in --out).

  python data/recall/prepare.py               a=3;k=1;x=7;.,-..-,,.-.,.-.,k?1
  python data/recall/prepare.py --tokens=characters
  python data/recall/prepare.py --filler=40 --levels=8

A row gives some letters a digit each, goes on with filler, and asks for one of the letters. A model
that sees only its last few cells, all filler, must have carried the digits along. An assignment
is one token, or four. Level: assignments.

No validation row is ever a training row; with few assignments it may differ in the filler alone.
"""

import argparse
import random
import string
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic.prepare import N_VAL, distinct, split
from data.dataset import DataError, add_option, one_sentence, write_rows

FILLER = ".,-"


def recall(n: int, letters: int, digits: int, filler: int, draw: random.Random) -> str:
    """One row of n assignments, without its row end."""
    names = draw.sample(string.ascii_lowercase[:letters], n)
    given = {letter: draw.randrange(digits) for letter in names}
    asked = draw.choice(names)
    row = "".join(f"{letter}={digit};" for letter, digit in given.items())
    return row + "".join(draw.choices(FILLER, k=filler)) + f"{asked}?{given[asked]}"


def check(args) -> None:
    """Raises DataError with one sentence for what cannot be made."""
    if args.levels > args.letters:
        raise DataError(f"--levels={args.levels} needs as many --letters")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])

    add = partial(add_option, parser)
    add("--letters", 10, "how many there are, from a on", 1, 26)
    add("--digits", 10, "a letter gets one of 0 .. digits - 1", 2, 10)
    add("--levels", 6, "assignments in the longest training row", 1, 26)
    add("--filler", 16, "tokens between the last assignment and the question", 0)
    add("--rows", 50_000, "training rows a level, at most", 1)
    tokens = ("assignments", "characters")
    add("--tokens", "assignments", "is `a=3;` one token or four", choices=tokens)
    add("--seed", 1337, "of everything that is drawn")
    add("--out", str(Path(__file__).parent), "folder; beside this file by default")
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    with one_sentence(args.out):
        check(args)
        sizes = (args.letters, args.digits, args.filler, draw)
        levels = {}
        for n in range(1, args.levels + 1):
            levels[n] = distinct(partial(recall, n, *sizes), args.rows + N_VAL)
        train, val = split(levels, N_VAL)
        merged = args.tokens == "assignments"
        token = "an assignment" if merged else "a character"
        task = f"recall of one of up to {args.levels} letters behind {args.filler} tokens of filler"
        task += f", one token {token}"
        letters = string.ascii_lowercase[: args.letters]
        digits = string.digits[: args.digits]
        vocab = [f"{letter}={digit};" for letter in letters for digit in digits] * merged
        vocab += [*letters, *digits, *"=;?", *FILLER, "\n"]
        meta = {"task": task, "vocab": vocab, "row_end": "\n", "answer_after": "?"}
        meta |= {"level": "assignments", "seed": args.seed}
        write_rows(Path(args.out), meta, {"train": train, "val": val})
    print(f"{task}: vocabulary of {len(vocab)}, written to {args.out}")


if __name__ == "__main__":
    main()
