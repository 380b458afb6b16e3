"""
Make rows of regular tasks, offline and seeded: what a finite automaton has read, and
the answer of the state it ends in. train.bin, val.bin, test.bin, probe.json, meta.json.

  python data/automata/prepare.py --task=parity --out=out/data/parity
  python data/automata/prepare.py --task=a5 --generators --out=out/data/a5
  python data/automata/prepare.py --task=random --states=8 --letters=3 --permutations \\
      --automaton=7 --out=out/data/random8

A row is letters, `=`, and one token: abca=3. Level: letters. The tasks:

parity      abba=1     1 if the number of b's is even (2 states)
even_pairs  abba=1     1 if the number of ab's and ba's is even: if the first letter
                       is the last (5 states)
cycle       ++.-=1     a walk on a cycle of 5: stay, forwards, back (5 states)
modular     3+4*2=1    modulo 5, * before + and -; levels are odd (25 states)
s3 s5 a5    213231=321 the product of permutations (6, 120, 60 states). An element is
                       one token, the images of 1, 2, ..; the left one is applied first
counter     aabb=2     a counts down, b up, never below 0 or above states - 1
random      abca=3     an automaton drawn at random, all of whose states are reached

Every task is one table: the next state for each letter and state. --answer=accept asks
for one bit instead of the state: half of the states, drawn, accept. It is drawn again
until no two states are equivalent, so that as many states are needed as there are.

No validation row is ever a training row, except at levels of fewer than 100 different
rows: there the same rows serve for both. test.bin has longer rows than were trained.

References: parity, even_pairs, cycle and modular are the regular tasks of Deletang et
al. 2023, Neural Networks and the Chomsky Hierarchy (arXiv 2207.02098), who train up to
40 letters and test on 41 to 500. s3, s5 and a5 are word problems as in Merrill et al.
2024, The Illusion of State in State-Space Models (arXiv 2404.08819).
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import string
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic.prepare import distinct, split
from data.dataset import DataError, Vocabulary, add_option, one_sentence, write_rows

TEST_LEVELS = (16, 24, 48, 100, 500)
TRIES = 10_000  # draws of an automaton before giving up

# Two generators of each group; A5 is the even permutations, so both of its are even.
GROUPS = {"s3": ("213", "231"), "s5": ("21345", "23451"), "a5": ("23145", "23451")}
TASKS = ("parity", "even_pairs", "cycle", "modular", *GROUPS, "counter", "random")
OWN_ANSWER = ("parity", "even_pairs", "modular")  # not the state

# The tasks for which an option means something.
APPLIES = {
    "states": ("counter", "random"),
    "letters": ("random",),
    "permutations": ("random",),
    "generators": tuple(GROUPS),
}


# ----------------------------------------------------------------------------------------
# automata


class Machine(NamedTuple):
    """A finite automaton with an answer for each state. L letters, S states."""

    name: str  # the task, in words
    letters: list[str]  # L tokens
    states: list[str]  # S names; it starts in the first
    table: list[list[int]]  # (L, S) table[letter][state] -> the next state
    answer: list[str]  # (S,) a token for each state
    turns: tuple = ()  # letters that may stand at each place, in turn; () is any

    def run(self, word: list[int]) -> list[int]:
        """Letters (n,) -> the state after each of them (n,)."""
        state, states = 0, []
        for letter in word:
            state = self.table[letter][state]
            states.append(state)
        return states

    def row(self, n: int, draw: random.Random) -> str:
        """One row of n letters, without its row end."""
        word = [0] * n
        for i, allowed in enumerate(self.turns or [range(len(self.letters))]):
            places = range(i, n, max(1, len(self.turns)))
            word[i :: places.step] = draw.choices(allowed, k=len(places))
        question = "".join(self.letters[letter] for letter in word)
        return f"{question}={self.answer[self.run(word)[-1]]}"


def parity() -> Machine:
    name = "parity check: is the number of b's even"
    return Machine(name, ["a", "b"], ["even", "odd"], [[0, 1], [1, 0]], ["1", "0"])


def even_pairs() -> Machine:
    """A state is the first and the last letter."""
    name = "even pairs: is the first letter the last"
    states = ["none", "aa", "ab", "ba", "bb"]
    table = [[1, 1, 1, 3, 3], [4, 2, 2, 4, 4]]
    return Machine(name, ["a", "b"], states, table, ["1", "1", "0", "0", "1"])


def cycle() -> Machine:
    places = [str(i) for i in range(5)]
    table = [[(i + step) % 5 for i in range(5)] for step in (0, 1, -1)]
    return Machine("cycle navigation on 5 places", [".", "+", "-"], places, table, places)


def modular() -> Machine:
    """
    * before + and -. A state is (sum of the terms that are done, product of the term at
    hand), from (0, 1) on. A number multiplies the product, * changes nothing, + and -
    close the term and open one of 1 or -1. All 25 states are needed: the answer is sum +
    product, and *0 in between leaves the sum. (The paper's text counts 5 states, one for
    each result; its code has precedence, as here.)
    """
    start = (0, 1)
    pairs = [start, *sorted(set(itertools.product(range(5), repeat=2)) - {start})]
    index = {pair: i for i, pair in enumerate(pairs)}
    table = [[index[s, p * x % 5] for s, p in pairs] for x in range(5)]
    table += [[index[(s + p) % 5, sign % 5] for s, p in pairs] for sign in (1, -1)]
    table += [[index[pair] for pair in pairs]]
    return Machine(
        name="modular arithmetic modulo 5 with precedence, without brackets",
        letters=list("01234+-*"),
        states=[f"{s}+{p}" for s, p in pairs],
        table=table,
        answer=[str((s + p) % 5) for s, p in pairs],
        turns=(range(5), range(5, 8)),
    )


def then(p: str, q: str) -> str:
    """The permutation p, and q after it; each is written as the images of 1, 2, .."""
    return "".join(q[int(image) - 1] for image in p)


def closure(generators: tuple[str, ...]) -> list[str]:
    """All elements of the group, in order; the identity is the first."""
    found = ["".join(sorted(generators[0]))]
    for element in found:  # grows while it is read
        found += {then(element, g) for g in generators} - set(found)
    return sorted(found)


def group(task: str, generators: bool) -> Machine:
    """Word problem: a state is the product of the letters so far."""
    elements = closure(GROUPS[task])
    letters = list(GROUPS[task]) if generators else elements
    index = {element: i for i, element in enumerate(elements)}
    table = [[index[then(element, g)] for element in elements] for g in letters]
    name = f"word problem of {task.upper()}{', two generators' if generators else ''}"
    return Machine(name, letters, elements, table, elements)


def counter(states: int) -> Machine:
    values = [str(i) for i in range(states)]
    down = [max(i - 1, 0) for i in range(states)]
    up = [min(i + 1, states - 1) for i in range(states)]
    name = f"counter that saturates at 0 and {states - 1}"
    return Machine(name, ["a", "b"], values, [down, up], values)


def at_random(states: int, letters: int, permutations: bool, draw) -> Machine:
    """One draw: each letter is any permutation, or any function, of the states."""
    if permutations:
        table = [draw.sample(range(states), states) for _ in range(letters)]
    else:
        table = [draw.choices(range(states), k=states) for _ in range(letters)]
    name = f"random automaton of {states} states and {letters} letters"
    name += ", each a permutation" * permutations
    names = [str(i) for i in range(states)]
    return Machine(name, list(string.ascii_lowercase[:letters]), names, table, names)


FIXED = {"parity": parity, "even_pairs": even_pairs, "cycle": cycle, "modular": modular}


def reachable(table: list[list[int]]) -> set[int]:
    """States that some word leads to from state 0."""
    found, new = {0}, {0}
    while new:
        new = {row[state] for row in table for state in new} - found
        found |= new
    return found


def classes(table: list[list[int]], answer: list[str]) -> list[int]:
    """
    The class of each state (S,): two are in one if no word ends in different answers from
    them. Moore's partition refinement: split by answer, then by the classes of the next
    states, until nothing splits. As many classes as states: the automaton is minimal.
    """
    part = [answer.index(token) for token in answer]
    while True:
        keys = [(part[s], *(part[row[s]] for row in table)) for s in range(len(part))]
        index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        if len(index) == len(set(part)):
            return part
        part = [index[key] for key in keys]


def half(states: int, draw: random.Random) -> list[str]:
    """An answer for each state: half of them, rounded down, accept with 1."""
    accept = set(draw.sample(range(states), states // 2))
    return [str(int(state in accept)) for state in range(states)]


def make_machine(
    task: str,
    states: int = 8,
    letters: int = 3,
    answer: str = "state",
    permutations: bool = False,
    generators: bool = False,
    automaton: int = 1,
) -> Machine:
    """
    A machine all of whose states are reachable and, with answer="accept", no two of whose
    states are equivalent. Draws until it is so; raises DataError if that hardly happens.
    """
    draw = random.Random(automaton)
    for _ in range(TRIES):
        if task in GROUPS:
            machine = group(task, generators)
        elif task == "counter":
            machine = counter(states)
        elif task == "random":
            machine = at_random(states, letters, permutations, draw)
        else:
            machine = FIXED[task]()
        if answer == "accept":
            machine = machine._replace(answer=half(len(machine.states), draw))
        size = len(machine.states)
        if len(reachable(machine.table)) < size:
            continue
        if answer == "state" or len(set(classes(machine.table, machine.answer))) == size:
            return machine
    needed = "all reachable" + " and no two equivalent" * (answer == "accept")
    raise DataError(
        f"{TRIES:,} automata were drawn, none of {states} states that are {needed}: "
        "ask for fewer states, more letters or --permutations"
    )


# ----------------------------------------------------------------------------------------
# rows


def probe(machine: Machine, vocabulary: Vocabulary, rows: list[str]) -> dict:
    """Rows with the state after each token, for the report: which thought says which?"""
    labels = []
    for row in rows:
        ids = vocabulary.encode(row)
        word = ids[: ids.index(vocabulary.answer_after)]  # the letters come first in vocab
        said = [machine.states[state] for state in machine.run(word)]
        labels.append(said + [None] * (len(ids) - len(word)))
    return {"name": "state", "values": machine.states, "rows": rows, "labels": labels}


def check(args: argparse.Namespace) -> None:
    """Raises DataError with one sentence for what cannot be made."""
    for option, tasks in APPLIES.items():
        if getattr(args, option) is not None and args.task not in tasks:
            allowed = " and ".join(", ".join(tasks).rsplit(", ", 1))
            raise DataError(f"--{option} is for {allowed}, not for --task={args.task}")
    if args.answer == "accept" and args.task in OWN_ANSWER:
        raise DataError(f"--answer=accept is not for --task={args.task}: it has its own answer")
    if args.automaton is not None and args.task != "random" and args.answer != "accept":
        raise DataError("--automaton is for --task=random and for --answer=accept")


def parse(argv=None) -> argparse.Namespace:
    """
    Options that mean nothing for most tasks are None unless given, so that check() can say
    so; their defaults are those of make_machine.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=formatter)

    number = partial(add_option, parser, metavar="N")

    def flag(option: str, help: str) -> None:
        parser.add_argument(option, action="store_true", default=None, help=help)

    parser.add_argument("--task", choices=TASKS, default="parity", help="default: parity")
    number("--levels", 12, "longest length that is trained (default: %(default)s)", 1, 1000)
    number("--rows", 20_000, "training rows a level, at most (default: %(default)s)", 100)
    number("--seed", 1337, "draws the rows (default: %(default)s)")
    number("--automaton", None, "draws the random automaton, and which states accept (default: 1)")
    number("--states", None, "counter, random: how many states (default: 8)", 2, 200)
    number("--letters", None, "random: how many letters (default: 3)", 1, 26)
    parser.add_argument(
        "--answer",
        choices=("state", "accept"),
        default="state",
        help="the state, or one bit; for tasks that ask for the state (default: state)",
    )
    flag("--permutations", "random: each letter permutes the states (default: no)")
    flag("--generators", "s3, s5, a5: the letters are two generators (default: all elements)")
    here = str(Path(__file__).parent)
    parser.add_argument("--out", default=here, help="folder (default: beside this file)")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    draw, n_val, n_test = random.Random(args.seed), 500, 200
    with one_sentence(args.out):
        check(args)
        given = ("states", "letters", "permutations", "generators", "automaton")
        options = {name: getattr(args, name) for name in given}
        options = {name: value for name, value in options.items() if value is not None}
        machine = make_machine(args.task, answer=args.answer, **options)
        step = max(1, len(machine.turns))  # a question of numbers and operators is odd
        sizes = range(1, args.levels + 1, step)
        wanted = args.rows + min(n_val, args.rows // 9)  # a tenth of all is held out
        levels = {n: distinct(partial(machine.row, n, draw), wanted) for n in sizes}
        few = [str(n) for n, rows in levels.items() if len(rows) < 100]
        if few:
            print(f"too few rows to hold any out, they serve for both: levels {', '.join(few)}")
        with contextlib.redirect_stdout(io.StringIO()):  # it says so in a line a level
            train, val = split(levels, n_val)
        untrained = [n - (n - 1) % step for n in TEST_LEVELS]
        untrained = [n for n in untrained if n > args.levels]
        test = [(machine.row(n, draw), n) for n in untrained for _ in range(n_test)]

        task = machine.name + ": does it accept" * (args.answer == "accept")
        if args.task == "random" or args.answer == "accept":
            task += f" (automaton {options.get('automaton', 1)})"
        answers = sorted(set(machine.answer))
        vocab = list(dict.fromkeys([*machine.letters, *answers, "=", "\n"]))
        meta = {"task": task, "vocab": vocab, "row_end": "\n", "answer_after": "="}
        meta |= {"level": "letters", "seed": args.seed}
        out = Path(args.out)
        vocabulary = write_rows(out, meta, {"train": train, "val": val, "test": test})
        longest = [row for row, n in val if n == sizes[-1]]
        truth = probe(machine, vocabulary, longest[:n_val])
        (out / "probe.json").write_text(json.dumps(truth))
    print(f"{task}: vocabulary of {len(vocab)}, written to {out}")


if __name__ == "__main__":
    main()
