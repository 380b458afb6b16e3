"""
Make a text in which prose is interrupted by sums that a reader must work out, seeded: train.bin,
val.bin and meta.json beside this file (or in --out).

  python data/mixed/prepare.py                         ..dost thou 3+4*2*2=3 lie so low? Are..
  python data/mixed/prepare.py --input=my.txt --share=0.3
  python data/mixed/prepare.py --primer --out=out/data/primer         ost thou 3+4*2*2=3

Prose is Shakespeare's, or --input, see data/shakespeare/prepare.py. Sums are chains modulo 5 of 1
to --levels operations, left to right, put between words at random places. A token is a character,
or an operation, `+4`. Nothing tells where a sum begins.

--primer makes rows question=answer in the same vocabulary: a sum behind up to 16 characters of the
prose, which has to be answered, while nobody asks about the prose. Level: operations.

A chain of three operations or more that stands in the validation text stands neither in the
training text nor in the primer. There are so few shorter ones that they are the same everywhere.
"""

import argparse
import random
import re
import sys
import zlib
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic.prepare import N_VAL, chain, distinct, operations, split
from data.dataset import add_option, one_sentence, write_rows
from data.shakespeare.prepare import find_text, write

MODULUS = 5
OPERATIONS = operations(MODULUS)
FEW = 2  # operations of a chain that is the same everywhere
END = "|"  # of a row of the primer, in which lines may break
AROUND = 16  # characters of prose before a sum of the primer, at most


def item(n: int, held_out: bool, draw: random.Random) -> str:
    """A chain of n operations, for validation or not."""
    while True:
        row = chain(n, MODULUS, draw)
        if n <= FEW or (zlib.crc32(row.encode()) % 10 == 0) == held_out:
            return row


def mix(prose: str, share: float, levels: int, held_out: bool, draw: random.Random) -> str:
    """Put chains between words until they are about this share of all tokens."""
    words = re.findall(r"\S+\s*|\s+", prose)
    tokens = 4 + (1 + levels) / 2  # of a chain and the blank behind it, on average
    chance = share / (1 - share) * len(prose) / len(words) / tokens
    parts = []
    for word in words:
        parts.append(word)
        if draw.random() < chance:
            parts.append(item(draw.randint(1, levels), held_out, draw) + " ")
    return "".join(parts)


def primer(prose: str, n: int, draw: random.Random) -> str:
    """A chain of n operations behind some prose."""
    some = draw.randrange(AROUND + 1)
    start = draw.randrange(len(prose) - some)
    return prose[start : start + some] + item(n, False, draw)


def main(argv=None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=formatter)
    add = partial(add_option, parser)
    add("--input", "", "a text file (UTF-8), instead of Shakespeare")
    add("--primer", False, "rows to begin with, instead of the text")
    add("--share", 0.2, "of all tokens of the text that belong to sums", 0.01, 0.9)
    add("--levels", 6, "operations in the longest sum", 1, 20)
    add("--rows", 20_000, "rows of the primer a level, at most", 100)
    add("--seed", 1337, "of everything that is drawn")
    add("--out", str(Path(__file__).parent), "folder; beside this file by default")
    args = parser.parse_args(argv)
    with one_sentence(args.out):
        kept = Path(__file__).resolve().parents[1] / "shakespeare" / "input.txt"
        prose, name = find_text(args.input, kept)
        prose = re.sub(r"[=+*|\d]", "", prose)  # these belong to sums
        draw, cut = random.Random(args.seed), int(0.9 * len(prose))
        letters = {*prose, *map(str, range(MODULUS)), *"= ", END}
        meta = {"source": name, "vocab": sorted(letters) + OPERATIONS}
        sums = f"chains modulo {MODULUS} of up to {args.levels} operations"
        if args.primer:
            meta |= {"task": f"{sums}, behind a piece of {name}", "level": "operations"}
            meta |= {"row_end": END, "answer_after": "="}
            levels = range(1, args.levels + 1)
            make = {n: partial(primer, prose[:cut], n, draw) for n in levels}
            rows, held = split({n: distinct(make[n], args.rows + N_VAL) for n in levels}, N_VAL)
            write_rows(Path(args.out), meta, {"train": rows, "val": held})
        else:
            meta |= {
                "task": f"{name}, {sums} in {args.share:.0%} of it",
                "level": "tokens a window",
            }
            train = mix(prose[:cut], args.share, args.levels, False, draw)
            val = mix(prose[cut:], args.share, args.levels, True, draw)
            write(Path(args.out), meta, train, val)
    print(f"vocabulary of {len(meta['vocab'])}, written to {args.out}")


if __name__ == "__main__":
    main()
