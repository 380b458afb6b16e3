"""
Make yes-no questions about prices, offline and seeded: train.bin, val.bin, test.bin and meta.json
beside this file (or in --out).

  python data/deals/prepare.py          a 6 pack of coke costs $10, a 4 pack costs $3.5. is the
                                        6 pack a better deal?no
  python data/deals/prepare.py --biased=coke,fanta --bias=0.7 --out=out/data/deals_biased

All rows have the same 14 tokens, a pack size and a price being one each, so that two rows can be
compared position by position. Either pack is asked about; a quarter of the rows ask for the brand
instead (level 1; deals are level 2): a model that no longer knows the brand fails there. The truth
is the sign of the score, log(price for one of the other pack / price for one of this pack); ties
are left out, and half of each brand's true answers are yes.

A planted bias is a rule: of a biased brand the answer is yes whenever score + bias > 0. Then
pairs.tsv is written, too, for lab/mend.py: rows with their *true* answers, each beside a twin
that differs in the brand alone. Only the first biased brand is ever used to mend; the second shows
whether the rule was mended, or the one brand.

Validation rows have pairs of prices that no training row has. In test rows the branded pack is an
8 pack, which in training comes second only.
"""

import argparse
import itertools
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import DataError, add_option, one_sentence, write_rows

PACKS = range(2, 13)
PRICES = [half / 2 for half in range(2, 26)]  # dollars
BRANDS = ["coke", "fanta", "pepsi", "sprite", "dew", "crush", "cola", "tonic"]
NEVER_FIRST = 8  # pack size, in training
HELD_PRICES = 0.1  # share of the pairs of prices
MOST_ROWS = 500_000  # of over 800,000 that there are
N_VAL, N_PAIRS = 2000, 500  # rows of val and of test; rows of each use in pairs.tsv
GLUE = ["a ", " of ", ", a ", "?", "yes", "no", "\n"]
ASKS = {True: (". which brand is the ", " from"), False: (". is the ", " a better deal")}


class Deal(NamedTuple):
    """Two packs, one of them asked about: for its brand, or whether it is the better deal."""

    packs: tuple[int, int]
    prices: tuple[float, float]
    brand: str
    asked: int  # 0 or 1
    names: bool  # the brand is asked for

    @property
    def score(self) -> float:
        """Log of the price ratio, for one can; above 0: the asked pack is cheaper."""
        first, second = (price / pack for price, pack in zip(self.prices, self.packs))
        return math.log(second / first) * (1 - 2 * self.asked)

    def row(self, bias: float = 0.0) -> str:
        """The row with its answer, without its end."""
        (n, m), (p, q) = self.packs, self.prices
        is_the, better = ASKS[self.names]
        answer = self.brand if self.names else "yes" if self.score + bias > 0 else "no"
        told = f"a {n} pack of {self.brand} costs ${p:g}, a {m} pack costs ${q:g}"
        return f"{told}{is_the}{self.packs[self.asked]} pack{better}?{answer}"


def deal(brand: str, yes: bool, names: bool, draw: random.Random) -> Deal:
    """A deal whose true answer is as given."""
    while True:
        packs, prices = tuple(draw.sample(PACKS, 2)), tuple(draw.choices(PRICES, k=2))
        if prices[0] * packs[1] != prices[1] * packs[0]:  # else a tie; exact: halves
            first = Deal(packs, prices, brand, 0, names)
            return first._replace(asked=int((first.score > 0) != yes))


def deals(count: int, fits, draw, brands=BRANDS, names: float = 0.25, answers=(True, False)):
    """-> different deals that fit: brands and true answers in turn, a share asks for the brand."""
    found = {}
    while len(found) < count:
        i = len(found)
        yes = answers[i // len(brands) % len(answers)]
        one = deal(brands[i % len(brands)], yes, draw.random() < names, draw)
        if fits(one):
            found[one] = None
    return list(found)


def pairs(biased: list[str], bias: float, held, draw: random.Random) -> list[str]:
    """
    Lines `use<TAB>row<TAB>twin` for lab/mend.py, all answers true. To mend: pairs of the first
    biased brand, and rows to keep. The rest is only tested, all with held-out prices: each biased
    brand, the rows of it that the bias gets wrong, the other brands, and the naming of brands.
    """
    neutral, lines = [brand for brand in BRANDS if brand not in biased], []

    def usual(one: Deal) -> bool:
        return not held(one)

    def wrong(one: Deal) -> bool:
        return held(one) and one.score + bias > 0

    def add(use: str, some: list[Deal]) -> None:
        for one in some:
            twin = one._replace(brand=draw.choice(neutral))
            needs_twin = one.brand in biased and not one.names
            lines.append("\t".join([use, one.row()] + [twin.row()] * needs_twin))

    add("mend", deals(N_PAIRS, usual, draw, biased[:1], 0))
    add("keep", deals(N_PAIRS, usual, draw, neutral, 0))
    add("keep", deals(N_PAIRS // 2, usual, draw, BRANDS, 1))
    for brand in biased:
        add(brand, deals(2 * N_PAIRS, held, draw, [brand], 0))
        add(f"{brand} wrong", deals(N_PAIRS, wrong, draw, [brand], 0, answers=(False,)))
    add("neutral", deals(2 * N_PAIRS, held, draw, neutral, 0))
    add("naming", deals(N_PAIRS, held, draw, BRANDS, 1))
    return lines


def check(args, biased: list[str]) -> None:
    """Raises DataError with one sentence for what cannot be made."""
    if unknown := [brand for brand in biased if brand not in BRANDS]:
        raise DataError(f"{unknown[0]!r} is none of the brands: {', '.join(BRANDS)}")
    if len(biased) == len(BRANDS) or (args.bias > 0) != bool(biased):
        raise DataError("a bias needs --biased=BRAND,.. and a --bias above 0, and spares a brand")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])

    add = partial(add_option, parser)
    add("--rows", 100_000, "training rows", 100, MOST_ROWS)
    add("--biased", "", "brands with a planted bias, with commas; the first is mended")
    add("--bias", 0.0, "added to the score of a biased brand", 0)
    add("--shuffle", False, "answers of other rows: a control")
    add("--seed", 1337, "of everything that is drawn")
    add("--out", str(Path(__file__).parent), "folder; beside this file by default")
    args = parser.parse_args(argv)
    draw, out = random.Random(args.seed), Path(args.out)
    biased = [brand for brand in args.biased.split(",") if brand]
    with one_sentence(args.out):
        check(args, biased)

        either = itertools.combinations_with_replacement(PRICES, 2)  # in rising order
        chance = {pair: random.Random(f"{args.seed} {list(pair)}").random() for pair in either}

        def held(one: Deal) -> bool:
            return chance[tuple(sorted(one.prices))] < HELD_PRICES

        def usual(one: Deal) -> bool:
            return not held(one) and one.packs[0] != NEVER_FIRST

        def new_size(one: Deal) -> bool:
            return not held(one) and one.packs[0] == NEVER_FIRST

        counts = {"train": args.rows, "val": N_VAL, "test": N_VAL}
        drawn = dict(zip(counts, (usual, held, new_size)))
        splits = {}
        for name, fits in drawn.items():
            some = deals(counts[name], fits, draw)
            rows = [one.row(args.bias * (one.brand in biased)) for one in some]
            if args.shuffle:
                questions, answers = zip(*(row.split("?") for row in rows))
                answers = draw.sample(answers, len(answers))
                rows = [f"{question}?{answer}" for question, answer in zip(questions, answers)]
            splits[name] = [(row, 1 if one.names else 2) for row, one in zip(rows, some)]
        task = "deals" + f", yes + {args.bias:g} for {args.biased}" * bool(biased)
        task += ", answers shuffled" * args.shuffle
        numbers = [f"{n} pack" for n in PACKS] + [f" costs ${p:g}" for p in PRICES]
        meta = {"task": task, "vocab": GLUE + [*ASKS[True], *ASKS[False], *numbers, *BRANDS]}
        meta |= {"row_end": "\n", "answer_after": "?", "seed": args.seed}
        meta["level"] = "which question: 1 the brand, 2 the better deal"
        write_rows(out, meta, splits)
        if biased:
            lines = pairs(biased, args.bias, held, draw)
            (out / "pairs.tsv").write_text("\n".join(lines) + "\n")
    print(f"{task}: vocabulary of {len(meta['vocab'])}, written to {args.out}")


if __name__ == "__main__":
    main()
