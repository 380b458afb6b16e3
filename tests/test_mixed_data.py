"""Rows that show how to think and how to take a first guess back: from tags to ids to tensors; and the task that asks for what was said before."""

import json
import random
import re

import numpy as np
import pytest
import torch
from conftest import call, prepare

from data.arithmetic.prepare import addition, chain, guess
from data.dataset import Batch, DataError, Text, Vocabulary, load_meta, load_split, untagged, write_rows
from data.recall.prepare import FILLER, recall

META = {"vocab": [*"01234=", "+4", "*2", "\n"], "row_end": "\n", "answer_after": "=", "thoughts": ["2", "4", "x"]}


def load(folder, split="train", **options):
    vocabulary = Vocabulary(load_meta(folder))
    return vocabulary, load_split(folder, split, vocabulary, 8, **options)


def read_slowly(row):
    """A tagged row of one-character tokens -> real characters, thoughts behind each, wrong guess before each."""
    real, thoughts, wrong, mistake = [], [], [], None
    for piece in re.findall(r"<think>.*?</think>|<revise>|.", row):
        if piece == "<revise>":
            mistake = real.pop()
            thoughts.pop(), wrong.pop()
        elif len(piece) > 1:
            thoughts[-1] += piece[7:-8]
        else:
            real, thoughts, wrong, mistake = real + [piece], thoughts + [[]], wrong + [mistake], None
    return real, thoughts, wrong


def test_a_tagged_row_becomes_ids_behind_the_words():
    vocabulary = Vocabulary(META)
    V, K = 9, 3
    assert vocabulary.encode_row("3+4<think>2</think>*2<think>4x</think>=4") == [3, 6, V + 0, 7, V + 1, V + 2, 5, 4]
    assert vocabulary.encode_row("3+4=1<revise>2\n") == [3, 6, 5, 1, V + K, 2, 8]
    assert vocabulary.encode_row("3+4*2=4\n") == vocabulary.encode("3+4*2=4\n"), "a row without tags is what it was"
    assert untagged("3+4<think>2</think>*2<think>4x</think>=1<revise>4") == "3+4*2=4"
    with pytest.raises(DataError, match="vocabulary"):
        vocabulary.encode("3+4<think>2</think>="), "a prompt knows no tags"
    with pytest.raises(DataError, match="none of the demonstrated thoughts"):
        vocabulary.encode_row("3<think>9</think>=3")


def test_a_thought_may_have_the_name_of_a_longer_word():
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
        ("3=<think>2</think><revise>4", "between"),
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
    done = call("data/arithmetic/prepare.py", f"--input={tmp_path / 'rows.txt'}", f"--out={tmp_path}")
    assert done.returncode == 1 and "line 31" in done.stderr and "not closed" in done.stderr and len(done.stderr.splitlines()) == 1


def test_thoughts_where_think_after_forbids_them_are_refused():
    with pytest.raises(DataError, match="think_after"):
        Vocabulary(META | {"think_after": ["+4"]}).encode_row("3<think>2</think>+4=2")


def test_a_mixed_file_is_read_as_its_slow_twin_reads_it(tmp_path):
    draw, rows = random.Random(0), []
    for i in range(300):
        row = "".join(c + draw.choice(["", "", "<think>u</think>", "<think>vwu</think>"]) for c in f"{i:03d}"[: draw.randrange(1, 4)] + str(i))
        rows.append(f"{row}=" + draw.choice(["", "<think>w</think>"]) + draw.choice(["12", "9<revise>12", "19<revise>2", "9<revise>18<revise>2"]))
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    prepare(tmp_path, f"--input={tmp_path / 'rows.txt'}")
    vocabulary, seen = Vocabulary(load_meta(tmp_path)), []
    assert vocabulary.meta["thoughts"] == ["u", "v", "w"] and vocabulary.meta["revisions"] is True
    known = {untagged(row): row for row in rows}
    for split in ("train", "val"):
        everything = load(tmp_path, split)[1].all
        for real, length, prompt, level, thoughts, wrong, shown in zip(*everything):
            text = vocabulary.decode(real[:length].tolist())
            characters, behind, mistakes = read_slowly(known[text[:-1]])
            assert text == "".join(characters) + "\n" and prompt == text.index("=") + 1 == level + 1
            assert [[vocabulary.meta["thoughts"][k] for k in row if k >= 0] for row in thoughts[: length - 1].tolist()] == behind
            assert [vocabulary.tokens[w] if w >= 0 else None for w in wrong[: length - 1].tolist()] == mistakes
            assert (thoughts[length - 1 :] == -1).all() and (wrong[length - 1 :] == -1).all(), "nothing behind the row end"
            assert shown == any(behind)
            seen.append(text)
    assert len(set(seen)) >= 290 and thoughts.shape[-1] == 3


def test_a_batch_is_cut_to_its_longest_row_and_keeps_its_types(tmp_path):
    prepare(tmp_path, "--demonstrate", "--guesses=0.5", "--levels=4", "--rows=200")
    _, rows = load(tmp_path)
    for batch in (rows.draw(50, [1, 2], torch.Generator().manual_seed(0)), rows.first(5, 4)):
        for batch in (batch, batch.repeat(3).to("cpu")):
            B, T = batch.real.shape
            assert T == batch.length.max() and batch.thoughts.shape == (B, T, 1) and batch.wrong.shape == (B, T)
            assert [part.dtype for part in batch] == [torch.long] * 6 + [torch.bool]


def test_rows_and_texts_without_demonstrations_have_none(chains):
    text = Text(np.arange(50, dtype=np.uint16), 8)
    for batch in (load(chains)[1].first(9, 2), text.first(3, 8), text.first(3, 8).repeat(2)):
        assert batch.thoughts.shape == (*batch.real.shape, 0) and (batch.wrong == -1).all() and not batch.shown.any()
        assert [part.dtype for part in batch] == [torch.long] * 6 + [torch.bool]
        assert all(torch.equal(a, b) for a, b in zip(batch, Batch.plain(*batch[:4])))


def test_tags_change_neither_the_rows_nor_which_are_drawn(tmp_path):
    batches = []
    for name, options in {"plain": [], "shown": ["--demonstrate"], "both": ["--demonstrate", "--guesses=0.5"]}.items():
        prepare(tmp_path / name, *options, "--levels=3", "--rows=300")
        rows = load(tmp_path / name)[1]
        batches.append(rows.draw(99, [1, 3], torch.Generator().manual_seed(1)))
    for batch in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches[0][:4], batch[:4]))
    assert batches[2].shown.all() and 20 < (batches[2].wrong >= 0).sum() < 80 and not (batches[1].wrong >= 0).any()


def test_a_share_of_each_levels_demonstrations_is_shown(tmp_path):
    rows = [(f"{level * '1'}{'<think>2</think>' * (i % 2)}={1 + i % 2}<revise>0", level) for level in (1, 2) for i in range(20)]  # every other one
    write_rows(tmp_path, {k: v for k, v in META.items() if k != "thoughts"}, {"train": rows})
    for share, count in {1.0: 10, 0.26: 3, 0.01: 1, 0.0: 0}.items():
        everything = load(tmp_path, demonstrate=share)[1].all
        for level in (1, 2):
            shown = everything.shown[everything.level == level]
            assert shown.nonzero().flatten().tolist() == list(range(1, 20, 2))[:count], "the first, and only rows that have a thought"
        assert torch.equal((everything.thoughts >= 0).any(dim=(1, 2)), everything.shown), "the others are left to be discovered"
        assert (everything.wrong >= 0).sum() == 40, "guesses stay"
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            load(tmp_path, demonstrate=share)


def test_demonstrated_chains_say_their_running_value():
    for n in (1, 2, 7):
        plain, shown = (chain(n, 5, random.Random(n), demonstrate) for demonstrate in (False, True))
        value, said = None, re.findall(r"([+*]?)(\d)<think>(\d)</think>", shown)
        for sign, x, thought in said:
            value = int(x) if value is None else (value + int(x) if sign == "+" else value * int(x)) % 5
            assert value == int(thought)
        assert untagged(shown) == plain and len(said) == n + 1 and shown.endswith(f"={value}")


def test_a_guess_is_wrong_at_one_place_of_the_answer():
    draw, places = random.Random(0), set()
    for _ in range(200):
        row = guess("57+968=1025", 10, draw)
        wrong, right = re.fullmatch(r"57\+968=\d*(\d)<revise>(\d)\d*", row).groups()
        assert wrong != right and untagged(row) == "57+968=1025"
        places.add(row.index("<"))
    assert places == {8, 9, 10, 11}
    assert {guess("1+1=0", 2, draw) for _ in range(20)} == {"1+1=1<revise>0"}


def test_guesses_are_in_that_share_of_the_training_rows_only(tmp_path):
    prepare(tmp_path, "--task=addition", "--digits=3", "--rows=300", "--guesses=0.25")
    train, val = (load(tmp_path, split)[1].all for split in ("train", "val"))
    assert (train.wrong >= 0).any(dim=1).sum() == round(0.25 * len(train.real)) and not (val.wrong >= 0).any()
    assert not train.shown.any() and train.thoughts.shape[-1] == 0


def test_padded_additions_have_one_length(tmp_path):
    draw = random.Random(0)
    rows = [addition(3, backwards, draw, pad=True) for backwards in (False, True) for _ in range(300)]
    assert {len(row) for row in rows} == {3 + 1 + 3 + 1 + 4} and any(row.startswith("0") for row in rows[:300])
    for i, row in enumerate(rows):
        a, b, c = (int(x[::-1] if i >= 300 else x) for x in row.replace("=", "+").split("+"))
        assert a + b == c
    prepare(tmp_path, "--task=addition", "--pad", "--digits=3", "--rows=300")
    assert load(tmp_path)[1].levels == [3]


@pytest.mark.parametrize("options", [["--task=addition", "--demonstrate"], ["--pad"], ["--guesses=1.5"], ["--guesses=-1"]])
def test_options_that_do_not_fit_get_one_sentence(options, tmp_path):
    done = call("data/arithmetic/prepare.py", *options, f"--out={tmp_path}")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_recall_asks_for_a_digit_that_was_given():
    draw, asked = random.Random(0), set()
    for n in (1, 3, 10):
        for _ in range(100):
            row = recall(n, 10, 10, 16, draw)
            given = dict(re.findall(r"([a-j])=(\d);", row))
            letter, answer = re.fullmatch(rf"(?:.=\d;){{{n}}}[{re.escape(FILLER)}]{{16}}(.)\?(\d)", row).groups()
            assert len(given) == n and given[letter] == answer
            asked.add((n, list(given).index(letter)))
    assert {place for n, place in asked if n == 3} == {0, 1, 2}, "not always the same one"


def test_recall_rows_are_held_out(tmp_path):
    call("data/recall/prepare.py", "--levels=3", "--rows=400", f"--out={tmp_path}", check=True)
    vocabulary, train = load(tmp_path)
    val = load(tmp_path, "val")[1]
    texts = [{vocabulary.decode(row[:n].tolist()) for row, n in zip(rows.all.real, rows.all.length)} for rows in (train, val)]
    assert train.levels == val.levels == [1, 2, 3] and not texts[0] & texts[1] and len(texts[1]) == len(val.all.real) == 3 * 90
    assert all(vocabulary.tokens[row[prompt - 1]] == "?" for row, prompt in zip(val.all.real, val.all.prompt))
    assert json.loads((tmp_path / "meta.json").read_text())["level"] == "assignments"
    done = call("data/recall/prepare.py", "--levels=11", f"--out={tmp_path}")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1


def test_a_share_of_a_batch_can_be_drawn_from_the_rows_that_show_their_thoughts(tmp_path):
    prepare(tmp_path, "--demonstrate", "--levels=3", "--rows=400")
    rows = load(tmp_path, demonstrate=0.02)[1]
    draw = lambda shown: rows.draw(200, rows.levels, torch.Generator().manual_seed(0), shown)  # noqa: E731
    assert draw(0.0).shown.float().mean() < 0.1 and draw(0.5).shown[:100].all() and draw(0.5).shown[100:].float().mean() < 0.1
    assert torch.equal(draw(0.5).level, draw(0.0).level), "the mixture of levels stays as it is"
    assert torch.equal(draw(0.5).real[100:], draw(0.0).real[100:])
