"""
Make arithmetic rows, offline and seeded: train.bin, val.bin, test.bin and meta.json beside this file (or in --out).

  python data/arithmetic/prepare.py                                 chains modulo 5, one token an operation
  python data/arithmetic/prepare.py --modulus=10 --tokens=characters
  python data/arithmetic/prepare.py --task=addition --digits=5
  python data/arithmetic/prepare.py --input=my_rows.txt             any lines of the form question=answer
  python data/arithmetic/prepare.py --demonstrate --guesses=0.2     with thoughts and wrong first guesses that are shown

chain     3+4*2=4: left to right, no precedence, modulo a small number; + and * by 1 .. modulus - 1. Level: operations.
addition  57+968=1025: plain, most significant digit first. --reversed writes all three numbers backwards. Level: digits of the longer operand.
          --pad writes zeros in front: each operand has --digits digits, the sum one more, and there is that one level.
--input   your own rows. Level: characters of the question. They may carry <think> and <revise>, see data/dataset.py.

--demonstrate writes the running value of a chain as a thought behind each number: 3<think>3</think>+4<think>2</think>=2. --guesses puts a
wrong digit before a right one in the answers of a share of the training rows: 57+968=103<revise>25. Two rows that differ in these alone are one.

No validation row is ever a training row, with one exception that is announced: where a level has fewer than 100 different rows
(there are only 40 chains of one operation), the same rows serve for both.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import THOUGHT, DataError, Vocabulary, check_tags, untagged, write_rows  # noqa: E402

TEST_LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 128, 1024)


def chain(n: int, modulus: int, draw: random.Random, demonstrate: bool = False) -> str:
    """One row of n operations, without its row end."""
    value = draw.randrange(modulus)
    row = f"{value}<think>{value}</think>" if demonstrate else str(value)
    for _ in range(n):
        sign, x = draw.choice("+*"), draw.randrange(1, modulus)
        value = (value + x if sign == "+" else value * x) % modulus
        row += f"{sign}{x}<think>{value}</think>" if demonstrate else f"{sign}{x}"
    return f"{row}={value}"


def probe(vocabulary: Vocabulary, rows: list[str], modulus: int) -> dict:
    """Chains with the running value behind each token, for the report: which thought says which value?"""
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
        if len(vocabulary.encode(row)) < len(row):  # an operation is one token: its value stands behind its digit
            said = [value for value in said if value is not None]
        labels.append(said + [None] * (len(vocabulary.encode(row)) - len(said)))
    return {"name": "running value", "values": list(range(modulus)), "rows": rows, "labels": labels}


def addition(n: int, backwards: bool, draw: random.Random, pad: bool = False) -> str:
    """One row whose longer operand has n digits; with pad both have, zeros in front counted, and the sum has n + 1."""
    a, b = draw.randrange(10 ** (n - 1) if n > 1 and not pad else 0, 10**n), draw.randrange(10**n)
    numbers = [str(x) for x in ((a, b, a + b) if draw.random() < 0.5 else (b, a, a + b))]
    if pad:
        numbers = [x.zfill(size) for x, size in zip(numbers, (n, n, n + 1))]
    return "{}+{}={}".format(*(x[::-1] if backwards else x for x in numbers))


def guess(row: str, base: int, draw: random.Random) -> str:
    """The row with another digit below base, and <revise>, before one digit of its answer."""
    at = draw.randrange(row.index("=") + 1, len(row))
    wrong = draw.choice([digit for digit in map(str, range(base)) if digit != row[at]])
    return f"{row[:at]}{wrong}<revise>{row[at:]}"


def read_rows(path: str) -> list[str]:
    """Lines `question=answer` of a file. Raises DataError that names the first line of another form."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
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
            raise DataError(f"{path}, line {number}: {line!r} is not of the form question=answer")
        rows.append(line)
    if len(rows) < 20:
        raise DataError(f"{path} has {len(rows)} rows; at least 20 are needed to train on some and hold out others")
    return rows


def distinct(make, wanted: int) -> list[str]:
    """Up to `wanted` rows, different without their tags; gives up when new ones hardly come."""
    rows, misses = {}, 0
    while len(rows) < wanted and misses < 1000:
        row = make()
        misses = misses + 1 if untagged(row) in rows else 0
        rows.setdefault(untagged(row), row)
    return list(rows.values())


def split(levels: dict[int, list[str]], n_val: int) -> tuple[list, list]:
    """-> train and validation rows as (row, level); a tenth of a level, at most n_val, is held out."""
    train, val = [], []
    for level, rows in levels.items():
        if len(rows) < 100:
            print(f"level {level} has only {len(rows)} different rows: they serve for training and validation alike")
            held, rest = rows, rows
        else:
            held, rest = rows[: min(n_val, len(rows) // 10)], rows[min(n_val, len(rows) // 10) :]
        train += [(row, level) for row in rest]
        val += [(row, level) for row in held]
    return train, val


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--task", choices=("chain", "addition"), default="chain")
    parser.add_argument("--input", help="a text file of question=answer lines, instead of a task made here")
    parser.add_argument("--modulus", type=int, choices=range(2, 11), default=5, metavar="2..10", help="chain: numbers are 0 .. modulus - 1")
    parser.add_argument("--tokens", choices=("operations", "characters"), default="operations", help="chain: is `+3` one token or two")
    parser.add_argument("--digits", type=int, default=5, help="addition: digits of the longer operand, up to 8")
    parser.add_argument("--reversed", action="store_true", help="addition: least significant digit first")
    parser.add_argument("--pad", action="store_true", help="addition: zeros in front, so that all numbers have one length")
    parser.add_argument("--demonstrate", action="store_true", help="chain: the running value as a thought behind each number")
    parser.add_argument("--guesses", type=float, default=0.0, metavar="SHARE", help="training rows whose answer has a wrong first guess, 0 to 1")
    parser.add_argument("--levels", type=int, default=8, help="chain: operations in the longest training row")
    parser.add_argument("--rows", type=int, default=50_000, help="training rows a level, at most")
    parser.add_argument("--think_after", default="", help="only these characters may be followed by a thought, e.g. 0123456789")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", default=str(Path(__file__).parent))
    args = parser.parse_args(argv)
    draw, n_val, n_test = random.Random(args.seed), 500, 500
    if not 1 <= args.digits <= 8:
        parser.error("--digits must be 1 to 8")

    try:
        if args.demonstrate and (args.input or args.task != "chain"):
            raise DataError("--demonstrate is for chains: other rows have no running value")
        if args.pad and (args.input or args.task != "addition"):
            raise DataError("--pad is for --task=addition")
        if not 0 <= args.guesses <= 1:
            raise DataError(f"--guesses={args.guesses} is not a share between 0 and 1")
        if args.guesses and args.input:
            raise DataError("--guesses is not for --input: your rows bring their own <revise>")
        test = []
        if args.input:
            levels: dict[int, list[str]] = {}
            first: dict[str, str] = {}
            for row in read_rows(args.input):
                first.setdefault(untagged(row), row)  # the first of two that differ in their tags alone
            for plain, row in first.items():
                levels.setdefault(plain.index("="), []).append(row)
            for rows in levels.values():
                draw.shuffle(rows)
            task, counts = Path(args.input).name, "characters of the question"
        elif args.task == "addition":
            sizes = [args.digits] if args.pad else range(1, args.digits + 1)
            levels = {n: distinct(lambda: addition(n, args.reversed, draw, args.pad), args.rows + n_val) for n in sizes}
            task, counts = f"addition of up to {args.digits} digits{', padded' if args.pad else ''}{', reversed' if args.reversed else ''}", "digits"
        else:
            levels = {n: distinct(lambda: chain(n, args.modulus, draw, args.demonstrate), args.rows + n_val) for n in range(1, args.levels + 1)}
            test = [(chain(n, args.modulus, draw, args.demonstrate), n) for n in TEST_LEVELS if n > args.levels for _ in range(n_test)]
            task, counts = f"chains modulo {args.modulus}, one token {'an operation' if args.tokens == 'operations' else 'a character'}", "operations"
            task += ", running values demonstrated" if args.demonstrate else ""
        train, val = split(dict(sorted(levels.items())), n_val)
        if args.guesses:
            chosen, base = set(draw.sample(range(len(train)), round(args.guesses * len(train)))), args.modulus if args.task == "chain" else 10
            train = [(guess(row, base, draw) if i in chosen else row, level) for i, (row, level) in enumerate(train)]
            task += f", a wrong first guess in {args.guesses:.0%} of the training rows"

        characters = sorted({c for row, _ in train + val + test for c in THOUGHT.sub("", row).replace("<revise>", "")} | {"="})
        if args.task == "chain" and args.tokens == "operations" and not args.input:
            characters = [str(i) for i in range(args.modulus)] + ["="]
            characters += [f"{sign}{x}" for sign in "+*" for x in range(1, args.modulus)]
        meta = {"task": task, "vocab": characters + ["\n"], "row_end": "\n", "answer_after": "=", "level": counts, "seed": args.seed}
        if args.think_after:
            meta["think_after"] = [t for t in characters if t[-1] in args.think_after]
        out = Path(args.out)
        vocabulary = write_rows(out, meta, {"train": train, "val": val, "test": test})
        if args.task == "chain" and not args.input:
            truth = probe(vocabulary, [untagged(row) for row, n in val if n == args.levels], args.modulus)
            (out / "probe.json").write_text(json.dumps(truth))
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{task}: vocabulary of {len(meta['vocab'])}, written to {out}")


if __name__ == "__main__":
    main()
