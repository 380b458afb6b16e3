"""
Make arithmetic rows, offline and seeded: train.bin, val.bin, test.bin, probe.json and meta.json
beside this file (or in --out).

  python data/arithmetic/prepare.py                 chains modulo 5, one token an operation
  python data/arithmetic/prepare.py --modulus=10 --tokens=characters
  python data/arithmetic/prepare.py --task=addition --digits=5
  python data/arithmetic/prepare.py --input=my_rows.txt --out=out/data/mine
  python data/arithmetic/prepare.py --demonstrate --guesses=0.2
  python data/arithmetic/prepare.py --width=16 --think_after==      3+4*2..............=4
  python data/arithmetic/prepare.py --width=4 --parts=3 --think_after=";="      3+4*2..;+3...=2

chain     3+4*2=4: left to right, no precedence, modulo a small number; + and * by 1 .. modulus - 1.
          Level: operations. With --width a question has room for so many, and dots fill it; with
          --parts it has up to so many parts, each with this room, and `;` between them.
addition  57+968=1025: plain, most significant digit first. --reversed writes all three numbers
          backwards. Level: digits of the longer operand. --pad writes zeros in front: each operand
          has --digits digits, the sum one more, and there is that one level.
--input   your own rows, any lines of the form question=answer. Level: characters of the question.
          They may carry <think> and <revise>, see data/dataset.py.

--demonstrate writes the running value of a chain as a thought behind each number:
3<think>3</think>+4<think>2</think>=2. --guesses puts a wrong digit before a right one in the
answers of a share of the training rows: 57+968=103<revise>25. Two rows that differ in these alone
are one.

No validation row is ever a training row, with one exception that is announced: where a level has
fewer than 100 different rows (there are only 40 chains of one operation), they serve for both.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import (
    THOUGHT,
    DataError,
    Vocabulary,
    add_option,
    check_tags,
    one_sentence,
    untagged,
    write_rows,
)

TEST_LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 128, 1024)
N_VAL, N_TEST = 500, 500  # rows a level, at most
LEAST = 20  # rows in a file of one's own

# ----------------------------------------------------------------------------------------------
# rows


def operations(modulus: int) -> list[str]:
    """What may follow a number in a chain."""
    return [f"{sign}{x}" for sign in "+*" for x in range(1, modulus)]


def in_parts(n: int, parts: int, width: int, draw: random.Random) -> list[int]:
    """n operations in up to so many parts -> operations of each, 1 to width."""
    count = draw.choice([k for k in range(1, parts + 1) if k <= n <= k * width])
    while True:
        ends = [0, *sorted(draw.sample(range(1, n), count - 1)), n]
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        if max(sizes) <= width:
            return sizes


def chain(
    n: int,
    modulus: int,
    draw: random.Random,
    demonstrate: bool = False,
    width: int = 0,
    parts: int = 1,
) -> str:
    """
    One row of n operations, without its row end. With a width in up to so many parts, each with
    dots up to `width` operations.
    """
    value = draw.randrange(modulus)
    row = f"{value}<think>{value}</think>" if demonstrate else str(value)
    sizes = in_parts(n, parts, width, draw) if parts > 1 else [n]
    for i, size in enumerate(sizes):
        row += ";" * (i > 0)
        for _ in range(size):
            sign, x = draw.choice("+*"), draw.randrange(1, modulus)
            value = (value + x if sign == "+" else value * x) % modulus
            row += f"{sign}{x}<think>{value}</think>" if demonstrate else f"{sign}{x}"
        row += "." * (width - size)
    return f"{row}={value}"


def probe(vocabulary: Vocabulary, rows: list[str], modulus: int) -> dict:
    """Chains with the running value behind each token, for the report: which thought says it?"""
    labels = []
    for row in rows:
        value, said, sign = None, [], ""
        for token in row.partition("=")[0]:
            if token in "+*":
                sign = token
            else:
                x = int(token)
                value = x if value is None else (value + x if sign == "+" else value * x) % modulus
            said.append(None if token in "+*" else value)
        count = len(vocabulary.encode(row))
        if count < len(row):  # an operation is one token: its value stands behind its digit
            said = [value for value in said if value is not None]
        labels.append(said + [None] * (count - len(said)))
    return {"name": "running value", "values": list(range(modulus)), "rows": rows, "labels": labels}


def addition(n: int, backwards: bool, draw: random.Random, pad: bool = False) -> str:
    """
    One row whose longer operand has n digits; with pad both have, zeros in front counted, and the
    sum has n + 1.
    """
    lowest = 10 ** (n - 1) if n > 1 and not pad else 0
    a, b = draw.randrange(lowest, 10**n), draw.randrange(10**n)
    first, second = (a, b) if draw.random() < 0.5 else (b, a)
    numbers = [str(first), str(second), str(a + b)]
    if pad:
        numbers = [x.zfill(size) for x, size in zip(numbers, (n, n, n + 1))]
    return "{}+{}={}".format(*(x[::-1] if backwards else x for x in numbers))


def guess(row: str, base: int, draw: random.Random) -> str:
    """The row with another digit below base, and <revise>, before one digit of its answer."""
    at = draw.randrange(row.index("=") + 1, len(row))
    wrong = draw.choice([digit for digit in map(str, range(base)) if digit != row[at]])
    return f"{row[:at]}{wrong}<revise>{row[at:]}"


def read_rows(path: str) -> list[str]:
    """Lines question=answer of a file. Raises DataError that names the first of another form."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            check_tags(line, "=")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        question, equals, answer = untagged(line).partition("=")
        if not (question and equals and answer) or "=" in answer:
            message = f"{line!r} is not of the form question=answer"
            raise DataError(f"{path}, line {number}: {message}")
        rows.append(line)
    if len(rows) < LEAST:
        message = f"{path} has {len(rows)} rows; at least {LEAST} are needed"
        raise DataError(f"{message} to train on some and hold out others")
    return rows


def distinct(make: Callable[[], str], wanted: int) -> list[str]:
    """Up to `wanted` rows, different without their tags; gives up when new ones hardly come."""
    rows, misses = {}, 0
    while len(rows) < wanted and misses < 1000:
        row = make()
        misses = misses + 1 if untagged(row) in rows else 0
        rows.setdefault(untagged(row), row)
    return list(rows.values())


def split(levels: dict[int, list[str]], n_val: int) -> tuple[list, list]:
    """-> training and validation rows as (row, level); a tenth, at most n_val a level, is held."""
    train, val = [], []
    for level, rows in levels.items():
        held = min(n_val, len(rows) // 10)
        if len(rows) < 100:
            few = f"level {level} has only {len(rows)} different rows"
            print(f"{few}: they serve for training and validation alike")
            val += [(row, level) for row in rows]
            train += [(row, level) for row in rows]
        else:
            val += [(row, level) for row in rows[:held]]
            train += [(row, level) for row in rows[held:]]
    return train, val


# ----------------------------------------------------------------------------------------------
# tasks: {level: rows}, rows of levels that are not trained, the task in words


def of_a_file(path: str, draw: random.Random):
    levels, rows = {}, {}
    for row in read_rows(path):
        rows.setdefault(untagged(row), row)  # the first of two that differ in their tags alone
    for plain, row in rows.items():
        levels.setdefault(plain.index("="), []).append(row)
    for some in levels.values():
        draw.shuffle(some)
    return dict(sorted(levels.items())), [], Path(path).name


def of_additions(args, draw: random.Random):
    sizes = [args.digits] if args.pad else range(1, args.digits + 1)
    levels = {}
    for n in sizes:
        make = partial(addition, n, args.reversed, draw, args.pad)
        levels[n] = distinct(make, args.rows + N_VAL)
    how = ", padded" * args.pad + ", reversed" * args.reversed
    return levels, [], f"addition of up to {args.digits} digits{how}"


def of_chains(args, draw: random.Random):
    def make(n: int) -> str:
        return chain(n, args.modulus, draw, args.demonstrate, args.width, args.parts)

    sizes = range(1, args.levels + 1)
    levels = {n: distinct(partial(make, n), args.rows + N_VAL) for n in sizes}
    longer = [n for n in TEST_LEVELS if args.levels < n <= (args.width * args.parts or n)]
    test = [(make(n), n) for n in longer for _ in range(N_TEST)]
    token = "an operation" if args.tokens == "operations" else "a character"
    shown = ", running values demonstrated" * args.demonstrate
    return levels, test, f"chains modulo {args.modulus}, one token {token}{shown}"


def tokens_of(args, rows: list[str]) -> list[str]:
    """The vocabulary of these rows, but the row end."""
    if args.task == "chain" and args.tokens == "operations" and not args.input:
        numbers = [str(x) for x in range(args.modulus)]
        marks = ["."] * bool(args.width) + [";"] * (args.parts > 1)
        return [*numbers, "=", *operations(args.modulus), *marks]
    text = "".join(THOUGHT.sub("", row).replace("<revise>", "") for row in rows)
    return sorted(set(text) | {"="})


# ----------------------------------------------------------------------------------------------


def check(args) -> None:
    """Raises DataError with one sentence for what cannot be made."""
    if args.demonstrate and (args.input or args.task != "chain"):
        raise DataError("--demonstrate is for chains: other rows have no running value")
    if args.pad and (args.input or args.task != "addition"):
        raise DataError("--pad is for --task=addition")
    if args.width and (args.input or args.task != "chain" or args.demonstrate):
        raise DataError("--width is for chains without --demonstrate")
    if args.parts > 1 and not args.width:
        raise DataError("--parts needs a --width, the operations that a part has room for")
    if 0 < args.width * args.parts < args.levels:
        room = f"--width={args.width}, --parts={args.parts}"
        raise DataError(f"a question of {room} has no room for --levels={args.levels}")
    if args.guesses and args.input:
        raise DataError("--guesses is not for --input: your rows bring their own <revise>")


def parse(argv=None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=formatter)

    add = partial(add_option, parser)
    add("--task", "chain", "which rows are made here", choices=("chain", "addition"))
    add("--input", "", "a text file of question=answer lines, instead")
    add("--modulus", 5, "chain: of the numbers", 2, 10)
    tokens = ("operations", "characters")
    add("--tokens", "operations", "chain: is `+3` one token or two", choices=tokens)
    add("--levels", 8, "chain: operations in the longest training row", 1, 1000)
    add("--width", 0, "chain: operations that a question has room for; 0: as many as it has", 0)
    add("--parts", 1, "chain: parts of a question, at most, each of that width", 1)
    add("--demonstrate", False, "chain: the running value as a thought")
    add("--digits", 5, "addition: digits of the longer operand", 1, 8)
    add("--reversed", False, "addition: least significant digit first")
    add("--pad", False, "addition: zeros in front, so that all numbers have one length")
    share = "training rows whose answer has a wrong first guess, 0 to 1"
    add("--guesses", 0.0, share, 0, 1, metavar="SHARE")
    add("--rows", 50_000, "training rows a level, at most", 1)
    add("--think_after", "", "characters that a thought may follow, e.g. 0123456789")
    add("--seed", 1337, "of everything that is drawn")
    add("--out", str(Path(__file__).parent), "folder; beside this file by default")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    draw = random.Random(args.seed)
    with one_sentence(args.out):
        check(args)
        if args.input:
            levels, test, task = of_a_file(args.input, draw)
            counts = "characters of the question"
        elif args.task == "addition":
            levels, test, task = of_additions(args, draw)
            counts = "digits"
        else:
            levels, test, task = of_chains(args, draw)
            counts = "operations"
        train, val = split(levels, N_VAL)
        if args.guesses:
            base = args.modulus if args.task == "chain" else 10
            for i in sorted(draw.sample(range(len(train)), round(args.guesses * len(train)))):
                train[i] = (guess(train[i][0], base, draw), train[i][1])
            task += f", a wrong first guess in {args.guesses:.0%} of the training rows"
        tokens = tokens_of(args, [row for row, _ in train + val + test])
        meta = {"task": task, "vocab": tokens + ["\n"], "row_end": "\n", "answer_after": "="}
        meta |= {"level": counts, "seed": args.seed}
        if args.think_after:
            meta["think_after"] = [token for token in tokens if token[-1] in args.think_after]
            if not meta["think_after"]:
                raise DataError(f"no token ends in one of --think_after={args.think_after}")
        out = Path(args.out)
        vocabulary = write_rows(out, meta, {"train": train, "val": val, "test": test})
        if args.task == "chain" and not args.input and not args.width:
            longest = [untagged(row) for row, n in val if n == args.levels]
            truth = probe(vocabulary, longest, args.modulus)
            (out / "probe.json").write_text(json.dumps(truth))
    print(f"{task}: vocabulary of {len(meta['vocab'])}, written to {out}")


if __name__ == "__main__":
    main()
