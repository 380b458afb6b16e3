"""Rows from text to tensors and back; and one clear sentence for everything that can be wrong."""

import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import call, prepare, small

from data.arithmetic.prepare import addition, chain, distinct, main, probe, split
from data.dataset import DataError, Vocabulary, load_meta, load_split, read_bin, write_bin
from options import load_config
from runs import load_model, save_checkpoint
from train import Config, Trainer


def load(folder):
    vocabulary, names = Vocabulary(load_meta(folder)), ("train", "val", "test")
    names = [name for name in names if (folder / f"{name}.bin").exists()]
    return vocabulary, {name: load_split(folder, name, vocabulary, 8) for name in names}


def texts(rows, vocabulary):
    return [vocabulary.decode(row[:n].tolist()) for row, n in zip(rows.all.real, rows.all.length)]


# ----------------------------------------------------------------------------------------------
# rows


def test_a_chain_is_worked_left_to_right_without_precedence():
    draw = random.Random(0)
    for n in (1, 2, 5, 40):
        question, answer = chain(n, 5, draw).split("=")
        value = int(question[0])
        for sign, x in zip(question[1::2], question[2::2]):
            value = (value + int(x) if sign == "+" else value * int(x)) % 5
        assert value == int(answer) and len(question) == 2 * n + 1


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_addition_adds_forwards_and_backwards(backwards, pad):
    draw = random.Random(0)
    for n in range(1, 9):
        numbers = addition(n, backwards, draw, pad).replace("=", "+").split("+")
        a, b, c = (int(x[::-1] if backwards else x) for x in numbers)
        assert a + b == c
        assert [*map(len, numbers)] == [n, n, n + 1] if pad else max(map(len, numbers[:2])) == n


def test_distinct_gives_up_when_rows_run_out():
    draw = random.Random(0)
    assert len(distinct(lambda: str(draw.randrange(7)), 100)) == 7


def test_no_validation_row_is_a_training_row_except_where_there_are_too_few(chains):
    vocabulary, rows = load(chains)
    train, val = set(texts(rows["train"], vocabulary)), texts(rows["val"], vocabulary)
    assert not train & {row for row in val if row.count("+") + row.count("*") > 2}
    assert {row for row in val if len(row) == 6} <= train, "3 * 4 chains of one operation: the same"
    announced = split({1: ["a"] * 12, 2: [str(i) for i in range(200)]}, 50)
    assert len(announced[1]) == 12 + 20


# ----------------------------------------------------------------------------------------------
# splits and batches


def test_every_split_holds_the_levels_it_should(chains):
    _, rows = load(chains)
    assert rows["train"].levels == rows["val"].levels == [1, 2, 3]
    assert rows["test"].levels == [4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 128, 1024]


def test_drawn_rows_have_the_asked_levels_and_fit_their_batch(chains):
    vocabulary, rows = load(chains)
    batch = rows["train"].draw(300, [1, 2], torch.Generator().manual_seed(0))
    assert set(batch.level.tolist()) == {1, 2} and batch.real.size(1) == batch.length.max()
    for row, length, prompt, level in zip(*batch[:4]):
        text = vocabulary.decode(row[:length].tolist())
        assert text.endswith("\n") and vocabulary.decode(row[:prompt].tolist()).endswith("=")
        assert text.count("+") + text.count("*") == level


def test_half_of_a_batch_is_drawn_from_the_newest_levels(chains):
    rows = load(chains)[1]["train"]
    batch = rows.draw(3000, [1, 2, 3], torch.Generator().manual_seed(0), newest=1)
    share = torch.bincount(batch.level, minlength=4)[1:] / 3000
    torch.testing.assert_close(share, torch.tensor([1 / 6, 1 / 6, 2 / 3]), atol=0.03, rtol=0)


@pytest.mark.parametrize("tokens, count", [("operations", 1), ("characters", 2)])
def test_an_operation_is_one_token_or_two(tmp_path, tokens, count):
    main([f"--tokens={tokens}", "--levels=2", "--rows=300", f"--out={tmp_path}"])
    vocabulary = Vocabulary(load_meta(tmp_path))
    assert len(vocabulary.encode("3+4*2=")) == 2 + 2 * count
    assert vocabulary.decode(vocabulary.encode("3+4*2=")) == "3+4*2="
    truth = probe(vocabulary, ["3+4*2=4"], 5)["labels"][0]
    assert [value for value in truth if value is not None] == [3, 2, 4]
    assert len(truth) == 3 + 2 * count


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name in "ab":
        main(["--levels=2", "--rows=200", "--seed=3", f"--out={tmp_path / name}"])
    for file in ("train.bin", "val.bin", "test.bin", "meta.json", "probe.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "rows.txt"
    lines = [f"{'ab'[i % 2] * (i % 7 + 1)}{i}={i % 3}\n" for i in range(60)]
    file.write_text("".join(lines), encoding="utf-8-sig")  # with a byte order mark
    prepare(tmp_path / "own", f"--input={file}")
    vocabulary, rows = load(tmp_path / "own")
    assert set(vocabulary.tokens) == set("ab=0123456789\n")
    assert {*texts(rows["train"], vocabulary), *texts(rows["val"], vocabulary)} == set(lines)
    assert vocabulary.meta["level"] == "characters of the question"


def test_thoughts_may_be_limited_to_follow_some_characters(tmp_path):
    options = ["--think_after=0123456789", "--tokens=characters", "--levels=2", "--rows=200"]
    main([*options, f"--out={tmp_path}"])
    vocabulary = Vocabulary(load_meta(tmp_path))
    allowed = [token for token, may in zip(vocabulary.tokens, vocabulary.think_after()) if may]
    assert allowed == list("01234")


def test_chains_of_one_width_have_dots_behind_them(tmp_path):
    main(["--width=12", "--levels=3", "--rows=50", f"--out={tmp_path}"])
    vocabulary = Vocabulary(load_meta(tmp_path))
    rows = load_split(tmp_path, "test", vocabulary, 1)
    assert rows.levels == [4, 5, 6, 7, 8, 12] and not (tmp_path / "probe.json").exists()
    rows = load_split(tmp_path, "train", vocabulary, 1)
    short = vocabulary.decode(rows.first(1, 2).real[0].tolist())
    assert short.index("=") == 1 + 2 * 2 + 10 and short.count(".") == 10


def test_parts_of_a_question_have_one_width_and_one_value_runs_through_them():
    draw, seen = random.Random(1), set()
    for n in [1, 4, 9] * 50:
        question, answer = chain(n, 5, draw, width=4, parts=3).split("=")
        parts = question[1:].split(";")
        assert {len(part.replace("+", "").replace("*", "")) for part in parts} == {4}
        operations = re.findall(r"[+*]\d", question)
        value = int(question[0])
        for sign, x in operations:
            value = (value + int(x) if sign == "+" else value * int(x)) % 5
        assert len(operations) == n and value == int(answer)
        seen.add((n, len(parts)))
    assert seen == {(1, 1), (4, 1), (4, 2), (4, 3), (9, 3)}


# ----------------------------------------------------------------------------------------------
# what can be wrong


def test_a_bin_file_reads_as_written_and_any_damage_is_noticed(tmp_path):
    path = tmp_path / "x.bin"
    meta = {"task": "x", "vocab": list("abcd")}
    write_bin(path, [1, 2, 0, 3, 0], [1, 1], meta)
    tokens, levels = read_bin(path, meta)
    assert tokens.tolist() == [1, 2, 0, 3, 0] and levels.tolist() == [1, 1]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    page = b"<html>an error page</html>" * 9
    for blob in (whole[:-1], whole[:30], whole + b"x", page, bytes(flipped), b""):
        path.write_bytes(blob)
        with pytest.raises(DataError):
            read_bin(path, meta)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="does not belong"):
        read_bin(path, meta | {"vocab": list("abdc")})
    with pytest.raises(DataError, match="prepare.py"):
        read_bin(tmp_path / "missing.bin", meta)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--task=addition", "--demonstrate"], "running value"),
        (["--pad"], "--task=addition"),
        (["--guesses=nan"], "--guesses=nan is not allowed: 0 to 1"),
        (["--digits=9", "--task=addition"], "--digits=9 is not allowed: 1 to 8"),
        (["--levels=0"], "--levels=0 is not allowed: 1 to 1000"),
        (["--rows=0"], "--rows=0 is not allowed: at least 1"),
        (["--width=4"], "no room for --levels=8"),
        (["--width=2", "--parts=3"], "no room for --levels=8"),
        (["--parts=2"], "--parts needs a --width"),
        (["--width=16", "--demonstrate"], "--width is for chains without"),
        (["--think_after=Q", "--levels=1"], "no token ends in one of"),
        (["--input=nowhere.txt"], "cannot read"),
        (["--input=rows.txt"], "line 31"),
        (["--input=few.txt"], "at least 20"),
    ],
)
def test_options_and_files_that_do_not_fit_get_one_sentence(
    options, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("1=1\n" * 30 + "two equals = a = b\n")
    (tmp_path / "few.txt").write_text("1=1\n" * 3)
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--out=made"])
    message = str(stopped.value.code)
    assert message.startswith("prepare.py: ") and sentence in message and "\n" not in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--n_layers=3", "'n_layer'"),
        ("--steps=many", "not a int"),
        ("--steps=0", "at least 1"),
        ("--lr=nan", "not a float"),
        ("--resume=perhaps", "not a bool"),
        ("--n_bits=49", "0 to 48"),
        ("missing.toml", "cannot read config"),
        ("bad.toml", "not TOML"),
    ],
)
def test_a_config_that_cannot_be_is_refused(argument, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(DataError, match=sentence):
        load_config([argument], Config)


def test_a_run_that_cannot_begin_says_why(chains, tmp_path):
    for changes, sentence in [
        ({"data": str(tmp_path)}, "meta.json"),
        ({"device": "abacus"}, "is not here"),
        ({"n_embd": 15, "n_head": 2}, "n_head"),
        ({"observer": "7"}, "observer"),
        ({"init_from": str(tmp_path)}, "no checkpoint"),
    ]:
        with pytest.raises(DataError, match=sentence):
            Trainer(replace(small(chains, tmp_path), **changes))
    done = call("train.py", f"--data={tmp_path}")
    assert done.returncode == 1 and done.stderr.startswith("train.py: cannot read")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_checkpoint_or_another_programs_is_refused(chains, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(DataError, match="no checkpoint"):
        load_model(tmp_path)
    save_checkpoint(path, Trainer(small(chains, tmp_path)).state())
    model, vocabulary, state = load_model(tmp_path)
    with pytest.raises(DataError, match="'7' in '1.7=' .character 3. does not fit"):
        vocabulary.encode("1+7=")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(state["model"]["head.weight"].numpy().tobytes()) + 5] ^= 1
    for blob in (whole[: len(whole) // 2], b"not a checkpoint", bytes(flipped)):
        path.write_bytes(blob)
        with pytest.raises(DataError, match="damaged"):
            load_model(tmp_path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="another program"):
        load_model(tmp_path)
