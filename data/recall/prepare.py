"""
Make rows that ask for what was said before, offline and seeded: train.bin, val.bin and meta.json beside this file (or in --out).

  python data/recall/prepare.py                          a=3;k=1;x=7;.,-..-,,.-.,.-.,a?3, one token an assignment
  python data/recall/prepare.py --tokens=characters
  python data/recall/prepare.py --filler=40 --levels=8

A row gives some letters a digit each, goes on with filler, and asks for one of the letters. A model that sees only its last few tokens,
all filler, must have carried the digits along. Level: assignments.

No validation row is ever a training row; with few assignments it may differ in the filler alone.
"""

import argparse
import random
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic.prepare import distinct, split  # noqa: E402
from data.dataset import DataError, write_rows  # noqa: E402

FILLER = ".,-"


def recall(n: int, letters: int, digits: int, filler: int, draw: random.Random) -> str:
    """One row of n assignments, without its row end."""
    given = {letter: draw.randrange(digits) for letter in draw.sample(string.ascii_lowercase[:letters], n)}
    asked = draw.choice(list(given))
    return "".join(f"{letter}={digit};" for letter, digit in given.items()) + "".join(draw.choices(FILLER, k=filler)) + f"{asked}?{given[asked]}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--letters", type=int, default=10, help="how many there are, from a on; up to 26")
    parser.add_argument("--digits", type=int, default=10, help="a letter gets one of 0 .. digits - 1")
    parser.add_argument("--levels", type=int, default=6, help="assignments in the longest training row")
    parser.add_argument("--filler", type=int, default=16, help="tokens between the last assignment and the question")
    parser.add_argument("--rows", type=int, default=50_000, help="training rows a level, at most")
    parser.add_argument("--tokens", choices=("assignments", "characters"), default="assignments", help="is `a=3;` one token or four")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", default=str(Path(__file__).parent))
    args = parser.parse_args(argv)
    draw, n_val = random.Random(args.seed), 500
    try:
        if not (1 <= args.levels <= args.letters <= 26 and 2 <= args.digits <= 10 and args.filler >= 0 and args.rows >= 1):
            raise DataError("there must be 1 to 26 letters, at most that many levels, 2 to 10 digits, no negative filler, and a row a level")
        sizes = (args.letters, args.digits, args.filler, draw)
        train, val = split({n: distinct(lambda: recall(n, *sizes), args.rows + n_val) for n in range(1, args.levels + 1)}, n_val)
        task = f"recall of one of up to {args.levels} letters behind {args.filler} tokens of filler, one token {'an assignment' if args.tokens == 'assignments' else 'a character'}"
        merged = [f"{letter}={digit};" for letter in string.ascii_lowercase[: args.letters] for digit in string.digits[: args.digits]]
        words = merged * (args.tokens == "assignments") + [*string.ascii_lowercase[: args.letters], *string.digits[: args.digits], *"=;?", *FILLER, "\n"]
        meta = {"task": task, "vocab": words, "row_end": "\n", "answer_after": "?", "level": "assignments", "seed": args.seed}
        write_rows(Path(args.out), meta, {"train": train, "val": val})
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{task}: vocabulary of {len(words)}, written to {args.out}")


if __name__ == "__main__":
    main()
