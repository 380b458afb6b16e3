"""
A fuzz campaign: thousands of configurations, prompts, row files and texts that nobody would write.

  python lab/fuzz.py --cases=2000

Each case calls a program with arguments and files drawn at random: values at and beyond the ends of
their ranges, no numbers, empty and huge files, NUL bytes, bytes that are no UTF-8, a byte order
mark, other line ends, emoji, right-to-left letters, the task's own separators in wrong places.

Counted, and all should be 0:
  tracebacks  calls that ended in one
  silent      calls that ended in an error without a sentence
  shown       answers in which a thought, or another hidden token, could be seen

Not here: signals, full disks and damaged files (faults.py).
"""

import contextlib
import dataclasses
import io
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train
from data.arithmetic import prepare as rows
from data.shakespeare import prepare as texts
from options import load_config, option, run

FEW = "--steps=2 --eval_every=1 --eval_rows=3 --n_embd=16 --n_head=2 --batch_tokens=64 --threads=1"
DATA = ["--modulus=3", "--levels=2", "--rows=60"]
ODD = ("nan", "inf", "-1", "0", "1", "2", "0.5", "1e9", "", "x", "true", "1e400", "-0", "½", "0,1")
PIECES = (
    *"0123456789+-*=ab<>[]?; \t\r\n",
    *("==", "\r\n", "\0", "\ufeff", "🙂", "שלום", "é", "\u2028", "<think>", "</think>", "<revise>"),
    *("1+1=2\n", "ab=1\n", "=\n", "a=\n", "=b\n", "<think>1</think>"),
)
CHAIN = ("0", "1", "2", "+1", "*2", "=")
ROWS = ("12+3=15\n", "7=7\n", "ab=b\n", "1+1<think>x</think>=2\n", "2=1<revise>2\n", "abc=c\n")
LETTERS = (*"abcdefgh,. \n", "Enter a ghost.\n\n")


@dataclass
class FuzzConfig:
    cases: int = option(2000, "calls", 1)
    seed: int = option(1, "of everything that is drawn", 0)


def call(entry, argv: list[str], name: str, found: Counter) -> str:
    """Call a program as a command does -> what it printed."""
    out = io.StringIO()
    sys.argv = [name, *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            run(entry, name)
        found["accepted"] += 1
    except SystemExit as end:
        found["refused" if end.code else "accepted"] += 1
        found["silent"] += isinstance(end.code, int) and end.code not in (0, 2)  # argparse: 2
    except BaseException as error:
        found["tracebacks"] += 1
        print(f"{name} {argv}: {type(error).__name__}: {error}", flush=True)
        traceback.print_exc()
    return out.getvalue()


def text_of(draw: random.Random, sound: tuple[str, ...], count: int) -> str:
    """Pieces that belong there, in half of the cases with a few that do not."""
    pieces = [draw.choice(sound) for _ in range(count)]
    for _ in range(draw.choice((0, 0, 1, 2, count))):
        pieces.insert(draw.randint(0, len(pieces)), draw.choice(PIECES))
    return "".join(pieces)


def blob(draw: random.Random, sound: tuple[str, ...]) -> bytes:
    """What a file may hold; seldom 10 MB on one line, sometimes no UTF-8."""
    text = text_of(draw, sound, draw.choice((0, 1, 30, 1000, 5000))).encode()
    if draw.random() < 0.1:
        text += bytes(draw.randrange(256) for _ in range(9))
    if draw.random() < 0.1:
        text = b"\xef\xbb\xbf" + text
    if draw.random() < 0.01:
        text = text[:1] * 10_000_000  # on one line
    return text


def values(kind: type, draw: random.Random) -> list[str]:
    """One to three arguments --name=value."""
    some = draw.sample(dataclasses.fields(kind), draw.randint(1, 3))
    argv = []
    for field in some:
        ends = [field.metadata.get(end) for end in ("low", "high")]
        near = [end + by for end in ends if end is not None for by in (-1, 0, 1)]
        argv.append(f"--{field.name}={draw.choice([*ODD, str(field.default), *map(str, near)])}")
    return argv


def main(argv: list[str]) -> None:
    config = load_config(argv, FuzzConfig)
    draw, found = random.Random(config.seed), Counter(tracebacks=0, silent=0, shown=0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        call(rows.main, [*DATA, "--out=data"], "prepare.py", found)
        sound = [*FEW.split(), "--data=data", "--out=model", "--report=false"]
        call(train.main, sound, "train.py", found)
        for _ in range(config.cases):
            which = draw.choice(("config", "config", "prompt", "prompt", "rows", "text"))
            if which == "config":
                shutil.rmtree("out", ignore_errors=True)
                odd = [*FEW.split(), "--data=data", "--out=out", *values(train.Config, draw)]
                call(train.main, [*odd, "--report=false"], "train.py", found)
            if which == "prompt":
                count = draw.choice((0, 1, 2, 5, 40))
                prompts = [text_of(draw, CHAIN, count) for _ in range(draw.randint(1, 2))]
                odd = values(sample.SampleConfig, draw) if draw.random() < 0.5 else []
                said = call(sample.main, ["--run=model", *odd, *prompts], "sample.py", found)
                asked = any(word.startswith(("--show", "--intro")) for word in [*odd, *prompts])
                found["shown"] += "[" in said and not asked
            if which in ("rows", "text"):
                Path("file").write_bytes(blob(draw, ROWS if which == "rows" else LETTERS))
                entry = rows.main if which == "rows" else texts.main
                call(entry, ["--input=file", "--out=made"], "prepare.py", found)
    print(f"{config.cases} calls; " + ", ".join(f"{n} {what}" for what, n in found.items()))
    sys.exit(bool(found["tracebacks"] + found["silent"] + found["shown"]))


if __name__ == "__main__":
    run(main, "fuzz.py")
