"""data/mixed/prepare.py: prose with sums in it, a primer; lab/where.py: where a model thinks."""

import json
import random
import re

import pytest
import torch
from conftest import prepare

import train
from data.dataset import DataError, load_meta, load_split, load_vocabulary
from lab import where

MIXED = "data/mixed/prepare.py"
SUM = re.compile(r"(?<![\d+*])(\d(?:[+*]\d)+)=(\d)")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """-> folder with the text in it, and the primer in its folder primer."""
    folder, draw = tmp_path_factory.mktemp("mixed"), random.Random(0)
    words = ["to", "be", "or", "not", "2+2=5", "is", "the", "question:\n"]
    (folder / "prose.txt").write_text(" ".join(draw.choices(words, k=6000)))
    given = f"--input={folder}/prose.txt"
    prepare(folder, given, "--levels=3", "--share=0.4", script=MIXED)
    prepare(folder / "primer", given, "--levels=3", "--rows=200", "--primer", script=MIXED)
    return folder


def text_of(folder, split):
    vocabulary = load_vocabulary(load_meta(folder))
    return vocabulary.decode(load_split(folder, split, vocabulary, 32).tokens.tolist())


def rows_of(folder, split):
    vocabulary = load_vocabulary(load_meta(folder))
    return [vocabulary.decode(row) for row in load_split(folder, split, vocabulary, 0).all.real]


def value_of(question):
    value = int(question[0])
    for sign, x in re.findall(r"([+*])(\d)", question):
        value = (value + int(x) if sign == "+" else value * int(x)) % 5
    return str(value)


def test_sums_in_the_text_are_right_and_as_many_as_asked_for(mixed):
    for split in ("train", "val"):
        text = text_of(mixed, split)
        sums = SUM.findall(text)
        assert sums and all(value_of(question) == answer for question, answer in sums)
        assert text.count("=") == len(sums)  # what looked like one in the prose is gone
    ids = load_split(mixed, "train", load_vocabulary(load_meta(mixed)), 32).tokens
    sums = SUM.findall(text_of(mixed, "train"))
    tokens = sum(4 + len(question) // 2 for question, _ in sums)  # with the blank behind it
    assert abs(tokens / len(ids) - 0.4) < 0.05


def test_long_sums_of_the_validation_text_are_nowhere_else(mixed):
    def long(text):
        return {question for question, _ in SUM.findall(text) if len(question) == 7}

    held, primer = long(text_of(mixed, "val")), "".join(rows_of(mixed / "primer", "train"))
    assert held and not held & long(text_of(mixed, "train")) and not held & long(primer)


def test_a_row_of_the_primer_is_a_sum_behind_some_prose(mixed):
    assert load_meta(mixed / "primer")["vocab"] == load_meta(mixed)["vocab"]
    rows = [row.partition("|")[0] for row in rows_of(mixed / "primer", "train")]
    around = [SUM.split(row)[0] for row in rows]
    assert all(SUM.search(row).end() == len(row) for row in rows)
    assert 0 <= min(map(len, around)) and 10 < max(map(len, around)) <= 16
    assert any("\n" in prose for prose in around), "as in the text"


def test_sums_are_found_where_all_of_them_is_in_the_window():
    tokens = ["a", " ", "3", "+4", "*2", "=", "4", " ", "+1", "=", "2"]
    assert where.find_sums(tokens) == [(2, 5)]
    assert where.find_sums(["+4", "=", "2", "1", "+1", "="]) == []
    assert where.find_sums(["3", "=", "3"]) == []


def test_what_is_measured_by_hand():
    texts = [["a", "3", "+4", "*2", "=", "4", " ", "b"]]
    nats = torch.tensor([[9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.5]])  # only b follows prose
    right = torch.tensor([[False, False, False, False, True, False, False]])
    thinks = torch.tensor([[True, False, True, False, False, False, False]])
    assert where.measure(texts, nats, right, thinks) == {
        "prose_nats": 0.5,
        "sums_right": 1.0,
        "sums_right_by_operations": {2: 1.0},
        "thoughts_in_prose": 0.5,
        "thoughts_at_sums": 0.5,
    }


@pytest.fixture(scope="module")
def run(mixed):
    """A model of the text that begins with what it learned from the primer."""
    small = ["--steps=3", "--n_embd=16", "--n_head=2", "--batch_tokens=128", "--report=false"]
    small += ["--eval_rows=4"]
    train.main([*small, f"--data={mixed}/primer", f"--out={mixed}/first"])
    more = [f"--data={mixed}", f"--init_from={mixed}/first", f"--out={mixed}/run"]
    train.main(["config/mixed.toml", *small, *more])
    plain = [f"--data={mixed}", "--init_from=", "--n_bits=0", f"--out={mixed}/plain"]
    train.main(["config/mixed.toml", *small, *plain])
    return mixed / "run"


def test_every_mode_and_the_plain_model_are_measured_and_a_page_is_drawn(run, capsys):
    where.main([f"--run={run}", f"--plain={run.parent}/plain", "--windows=20"])
    found = json.loads((run / "where.json").read_text())
    assert list(found) == ["policy", "never", "random", "constant", "swapped", "plain"]
    assert found["never"]["thoughts_in_prose"] == 0 < found["random"]["thoughts_in_prose"]
    assert (run / "where.png").exists() and "at sums" in capsys.readouterr().out


def test_a_model_of_rows_or_without_thoughts_is_refused(run):
    for folder in ("first", "plain"):
        with pytest.raises(DataError, match="not a thinking model of a text"):
            where.main([f"--run={run.parent}/{folder}"])


def test_of_a_text_the_gate_decides_in_all_windows(run):
    options = {"data": str(run.parent), "block": 32, "n_embd": 16, "n_head": 2, "tries": 0.1}
    trainer = train.Trainer(train.Config(**options, batch_tokens=32 * 50))
    trainer.paid = True
    _, plan, of = trainer.draw()
    assert (plan["forced"] == train.UNFORCED).all() and of.tolist() == [-1] * 50 + [*range(5)]
