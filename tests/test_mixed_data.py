"""Rows that show how to think and how to take a first guess back: from tags to ids to tensors;
and the task that asks for what was said before."""

import json
import random
import re

import numpy as np
import pytest
import torch

from data.arithmetic import prepare
from data.arithmetic.prepare import chain, guess
from data.dataset import Batch, DataError, Text, Vocabulary, load_meta, load_split, untagged
from data.recall import prepare as recall_task

VOCAB = [*"01234=", "+4", "*2", "\n"]
META = {"vocab": VOCAB, "row_end": "\n", "answer_after": "=", "thoughts": ["2", "4", "x"]}


def load(folder, split="train"):
    vocabulary = Vocabulary(load_meta(folder))
    return vocabulary, load_split(folder, split, vocabulary, 8)


def test_a_tagged_row_becomes_ids_behind_the_tokens():
    vocabulary, V, K = Vocabulary(META), 9, 3
    tagged = "3+4<think>2</think>*2<think>4x</think>=4"
    assert vocabulary.encode_row(tagged) == [3, 6, V + 0, 7, V + 1, V + 2, 5, 4]
    assert vocabulary.encode_row("3+4=1<revise>2\n") == [3, 6, 5, 1, V + K, 2, 8]
    assert vocabulary.encode_row("3+4*2=4\n") == vocabulary.encode("3+4*2=4\n")
    assert untagged("3+4<think>2</think>*2<think>4x</think>=1<revise>4") == "3+4*2=4"
    with pytest.raises(DataError, match="vocabulary"):
        vocabulary.encode("3+4<think>2</think>="), "a prompt knows no tags"
    with pytest.raises(DataError, match="none of the demonstrated thoughts"):
        vocabulary.encode_row("3<think>9</think>=3")
    with pytest.raises(DataError, match="think_after"):
        Vocabulary(META | {"think_after": ["+4"]}).encode_row("3<think>2</think>+4=2")


def test_a_thought_may_have_the_name_of_a_longer_token():
    vocabulary = Vocabulary(META | {"thoughts": ["+4", "4"]})
    assert vocabulary.thoughts_in("3<think>+4</think>+4<think>44</think>=2") == ["+4", "4", "4"]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("3<think>2=4", "not closed"),
        ("3<think>2<think>4</think></think>=4", "inside another"),
        ("3</think>=4", "without its <think>"),
        ("3<think>2</think></think>=4", "without its <think>"),
        ("3<think></think>=4", "empty"),
        ("<think>2</think>3=4", "before the first token"),
        ("3<think>2<revise></think>=4", "inside a thought"),
        ("3=<revise>4", "no wrong first guess"),
        ("3=1<think>2</think><revise>4", "between"),
        ("3=4<revise>", "no token behind"),
        ("3=4<revise>\n", "no token behind"),
        ("3=1<revise><revise>4", "in a row"),
        ("3=1<revise>2<revise>4", "in a row"),
        ("3=4<revise>4", "that is right"),
        ("3+1<revise>4=4", "only an answer"),
    ],
)
def test_a_malformed_row_is_refused_by_name(row, complaint):
    with pytest.raises(DataError, match=complaint):
        Vocabulary(META).encode_row(row)


def test_a_malformed_line_of_a_file_is_named(tmp_path):
    (tmp_path / "rows.txt").write_text("1=1\n" * 30 + "1<think>2=1\n")
    with pytest.raises(DataError, match="line 31: .*not closed"):
        prepare.read_rows(tmp_path / "rows.txt")


def read_slowly(row):
    """A tagged row -> its real characters, thoughts behind each, wrong guess before each."""
    real, thoughts, wrong, mistake = [], [], [], None
    for piece in re.findall(r"<think>.*?</think>|<revise>|.", row):
        if piece == "<revise>":
            mistake = real.pop()
            thoughts.pop(), wrong.pop()
        elif len(piece) > 1:
            thoughts[-1] += piece[7:-8]
        else:
            real, thoughts, wrong, mistake = (
                real + [piece],
                thoughts + [[]],
                wrong + [mistake],
                None,
            )
    return real, thoughts, wrong


def test_a_mixed_file_is_read_as_its_slow_twin_reads_it(tmp_path):
    draw, rows = random.Random(0), []
    tags = ["", "", "<think>u</think>", "<think>vwu</think>"]
    answers = ["12", "9<revise>12", "19<revise>2", "9<revise>18<revise>2"]
    for i in range(300):
        question = f"{i:03d}"[: draw.randrange(1, 4)] + str(i)
        row = "".join(c + draw.choice(tags) for c in question) + "="
        rows.append(row + draw.choice(["", "<think>w</think>"]) + draw.choice(answers))
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    prepare.main([f"--input={tmp_path / 'rows.txt'}", f"--out={tmp_path}"])
    vocabulary, seen = Vocabulary(load_meta(tmp_path)), []
    names = vocabulary.meta["thoughts"]
    assert names == ["u", "v", "w"] and vocabulary.meta["revisions"] is True
    known = {untagged(row): row for row in rows}
    for split in ("train", "val"):
        everything = load(tmp_path, split)[1].all
        for real, length, prompt, level, thoughts, wrong, shown in zip(*everything):
            text, end = vocabulary.decode(real[:length].tolist()), length - 1
            characters, behind, mistakes = read_slowly(known[text[:-1]])
            assert text == "".join(characters) + "\n" and prompt == text.index("=") + 1 == level + 1
            found = [[names[k] for k in some if k >= 0] for some in thoughts[:end].tolist()]
            guesses = [vocabulary.tokens[w] if w >= 0 else None for w in wrong[:end].tolist()]
            assert found == behind and guesses == mistakes and shown == any(behind)
            assert (thoughts[end:] == -1).all() and (wrong[end:] == -1).all(), "none behind the end"
            seen.append(text)
    assert len(set(seen)) >= 290 and thoughts.shape[-1] == 3


def test_a_batch_is_cut_to_its_longest_row_and_keeps_its_types(tmp_path):
    prepare.main(
        ["--demonstrate", "--guesses=0.5", "--levels=4", "--rows=200", f"--out={tmp_path}"]
    )
    _, rows = load(tmp_path)
    for some in (rows.draw(50, [1, 2], torch.Generator().manual_seed(0)), rows.first(5, 4)):
        for batch in (some, some.rows(torch.tensor([2, 2, 0])).to("cpu")):
            B, T = batch.real.shape
            assert T == batch.length.max() and batch.thoughts.shape == (B, T, 1)
            assert batch.wrong.shape == (B, T) and batch.shown.all()
            assert [part.dtype for part in batch] == [torch.long] * 6 + [torch.bool]


def test_rows_and_texts_without_demonstrations_have_none(chains):
    text = Text(np.arange(50, dtype=np.uint16), 8)
    for batch in (
        load(chains)[1].first(9, 2),
        text.first(3, 8),
        text.first(3, 8).rows(torch.tensor([1, 1])),
    ):
        assert batch.thoughts.shape == (*batch.real.shape, 0)
        assert (batch.wrong == -1).all() and not batch.shown.any()
        assert [part.dtype for part in batch] == [torch.long] * 6 + [torch.bool]
        assert all(torch.equal(a, b) for a, b in zip(batch, Batch.plain(*batch[:4])))


def test_tags_change_neither_the_rows_nor_which_are_drawn(tmp_path):
    kinds, batches = ([], ["--demonstrate"], ["--demonstrate", "--guesses=0.5"]), []
    for i, options in enumerate(kinds):
        folder = tmp_path / str(i)
        prepare.main([*options, "--levels=3", "--rows=300", f"--out={folder}"])
        rows = load(folder)[1]
        batches.append(rows.draw(99, [1, 3], torch.Generator().manual_seed(1)))
        assert not (load(folder, "val")[1].all.wrong >= 0).any(), "guesses are for training"
    plain, shown, both = batches
    assert all(torch.equal(a, b) for batch in (shown, both) for a, b in zip(plain[:4], batch[:4]))
    assert not plain.shown.any() and shown.shown.all() and both.shown.all()
    assert 20 < (both.wrong >= 0).sum() < 80 and not (shown.wrong >= 0).any()


def test_demonstrated_chains_say_their_running_value():
    for n in (1, 2, 7):
        plain, shown = (chain(n, 5, random.Random(n), show) for show in (False, True))
        value, steps = None, re.findall(r"([+*]?)(\d)<think>(\d)</think>", shown)
        for sign, x, thought in steps:
            after = int(x) if value is None else value + int(x) if sign == "+" else value * int(x)
            value = after % 5
            assert value == int(thought)
        assert untagged(shown) == plain and len(steps) == n + 1 and shown.endswith(f"={value}")


def test_a_guess_is_wrong_at_one_place_of_the_answer():
    draw, places = random.Random(0), set()
    for _ in range(200):
        row = guess("57+968=1025", 10, draw)
        wrong, right = re.fullmatch(r"57\+968=\d*(\d)<revise>(\d)\d*", row).groups()
        assert wrong != right and untagged(row) == "57+968=1025"
        places.add(row.index("<"))
    assert places == {8, 9, 10, 11}
    assert {guess("1+1=0", 2, draw) for _ in range(20)} == {"1+1=1<revise>0"}


# ----------------------------------------------------------------------------------------------
# recall


def test_recall_asks_for_a_digit_that_was_given():
    draw, asked, filler = random.Random(0), set(), re.escape(recall_task.FILLER)
    for n in (1, 3, 10):
        for _ in range(100):
            row = recall_task.recall(n, 10, 10, 16, draw)
            given = dict(re.findall(r"([a-j])=(\d);", row))
            form = rf"(?:.=\d;){{{n}}}[{filler}]{{16}}(.)\?(\d)"
            letter, answer = re.fullmatch(form, row).groups()
            assert len(given) == n and given[letter] == answer
            asked.add((n, list(given).index(letter)))
    assert {place for n, place in asked if n == 3} == {0, 1, 2}, "not always the same one"


def test_recall_rows_are_held_out(tmp_path):
    recall_task.main(["--levels=3", "--rows=400", f"--out={tmp_path}"])
    (vocabulary, train), val = load(tmp_path), load(tmp_path, "val")[1]
    texts = []
    for rows in (train, val):
        pairs = zip(rows.all.real, rows.all.length)
        texts.append({vocabulary.decode(row[:n].tolist()) for row, n in pairs})
    assert train.levels == val.levels == [1, 2, 3] and not texts[0] & texts[1]
    assert len(texts[1]) == len(val.all.real) == 3 * 90
    asked = val.all.real.gather(1, val.all.prompt[:, None] - 1)[:, 0].tolist()
    assert vocabulary.decode(asked) == "?" * 270
    assert json.loads((tmp_path / "meta.json").read_text())["level"] == "assignments"
    with pytest.raises(SystemExit, match="prepare.py: --levels=11 needs"):
        recall_task.main(["--levels=11", f"--out={tmp_path}"])
