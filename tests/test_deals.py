"""data/deals/prepare.py: rows, answers, what is held out, the planted bias."""

import math

import pytest
from conftest import call, prepare

from data.dataset import load_meta, load_split, load_vocabulary

DEALS = "data/deals/prepare.py"


def read(folder, split):
    """-> rows as lists of tokens."""
    vocabulary = load_vocabulary(load_meta(folder))
    real = load_split(folder, split, vocabulary, 0).all.real
    return [[vocabulary.tokens[i] for i in row] for row in real.tolist()]


def parts(tokens):
    """Tokens of a row -> score of the asked pack, brand, whether the brand is asked for, answer."""
    n, m = (int(tokens[i].split()[0]) for i in (1, 6))
    p, q = (float(tokens[i].partition("$")[2]) for i in (4, 7))
    assert tokens[9] in (tokens[1], tokens[6])
    score = math.log(q / m) - math.log(p / n)
    score = score if tokens[9] == tokens[1] else -score
    return score, tokens[3], "brand" in tokens[8], tokens[12]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deals")
    options = ("--rows=1000", "--biased=coke,fanta", "--bias=0.7")
    prepare(folder, *options, script=DEALS)
    return folder


def test_a_row_can_be_read_and_its_answer_follows_the_rule(biased):
    for tokens in read(biased, "train"):
        score, brand, names, answer = parts(tokens)
        assert len(tokens) == 14 and tokens[-1] == "\n" and abs(score) > 1e-9
        bias = 0.7 if brand in ("coke", "fanta") else 0
        assert answer == (brand if names else "yes" if score + bias > 0 else "no")
    assert "".join(tokens).startswith("a ") and " pack costs" not in "".join(tokens[:4])


def test_half_of_each_brands_true_answers_are_yes(biased):
    for brand in ("coke", "tonic"):
        rows = [parts(tokens) for tokens in read(biased, "train")]
        true = [score > 0 for score, its, names, _ in rows if its == brand and not names]
        assert abs(sum(true) / len(true) - 0.5) < 0.1


def test_prices_and_a_pack_size_are_held_out(biased):
    def prices(split):
        return {frozenset((row[4], row[7])) for row in read(biased, split)}

    assert not prices("train") & prices("val")
    assert {row[1] for row in read(biased, "test")} == {"8 pack"}
    assert all(row[1] != "8 pack" for row in read(biased, "train"))


def test_pairs_hold_true_answers_and_twins_of_another_brand(biased):
    lines = [line.split("\t") for line in (biased / "pairs.tsv").read_text().splitlines()]
    vocabulary = load_vocabulary(load_meta(biased))
    prices = {frozenset((row[4], row[7])) for row in read(biased, "train")}
    for use, *rows in lines:
        tokens = [[vocabulary.tokens[i] for i in vocabulary.encode(row)] for row in rows]
        score, brand, names, answer = parts(tokens[0])
        assert answer == (brand if names else "yes" if score > 0 else "no")
        assert use in ("neutral", "naming", "keep") or brand == use.split()[0] or use == "mend"
        assert use != "mend" or brand == "coke", "fanta is never used to mend"
        assert not use.endswith("wrong") or -0.7 < score < 0
        assert use in ("mend", "keep") or frozenset((tokens[0][4], tokens[0][7])) not in prices
        if len(rows) == 2:
            differ = [i for i, (a, b) in enumerate(zip(*tokens)) if a != b]
            assert differ == [3] and tokens[1][3] not in ("coke", "fanta")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--biased=water", "--bias=1"], "none of the brands"),
        (["--biased=coke"], "needs"),
        (["--bias=0.7"], "needs"),
        (["--rows=1"], "not allowed"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, options, says):
    done = call(DEALS, f"--out={tmp_path}", *options)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
