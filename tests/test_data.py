"""Rows from text to tensors and back; and one clear sentence for everything that can be wrong with them."""

import json
import random

import pytest
import torch
from conftest import call, prepare

from data.arithmetic.prepare import addition, chain, distinct, probe, split
from data.dataset import DataError, Vocabulary, load_meta, load_split, read_bin, write_bin


def load(folder):
    vocabulary = Vocabulary(load_meta(folder))
    return vocabulary, {name: load_split(folder, name, vocabulary, 8) for name in ("train", "val", "test") if (folder / f"{name}.bin").exists()}


def texts(rows, vocabulary):
    return [vocabulary.decode(row[:n].tolist()) for row, n in zip(rows.all.real, rows.all.length)]


def test_a_chain_is_worked_left_to_right_without_precedence():
    draw = random.Random(0)
    for n in (1, 2, 5, 40):
        question, answer = chain(n, 5, draw).split("=")
        value = int(question[0])
        for sign, x in zip(question[1::2], question[2::2]):
            value = (value + int(x) if sign == "+" else value * int(x)) % 5
        assert value == int(answer) and len(question) == 2 * n + 1


def test_addition_adds_forwards_and_backwards():
    draw = random.Random(0)
    for backwards in (False, True):
        for n in range(1, 9):
            a, b, c = (int(x[::-1] if backwards else x) for x in addition(n, backwards, draw).replace("=", "+").split("+"))
            assert a + b == c and max(len(str(a)), len(str(b))) == n


def test_no_validation_row_is_a_training_row_except_where_there_are_too_few(chains):
    vocabulary, rows = load(chains)
    train, val = set(texts(rows["train"], vocabulary)), texts(rows["val"], vocabulary)
    assert not train & {row for row in val if row.count("+") + row.count("*") > 2}
    assert {row for row in val if len(row) == 6} <= train, "3 * 4 chains of one operation: the same rows serve for both"
    announced = split({1: ["a"] * 12, 2: [str(i) for i in range(200)]}, 50)
    assert len(announced[1]) == 12 + 20


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


@pytest.mark.parametrize("tokens, count", [("operations", 1), ("characters", 2)])
def test_an_operation_is_one_token_or_two(tmp_path, tokens, count):
    prepare(tmp_path, f"--tokens={tokens}", "--levels=2", "--rows=300")
    vocabulary = Vocabulary(load_meta(tmp_path))
    assert len(vocabulary.encode("3+4*2=")) == 2 + 2 * count
    assert vocabulary.decode(vocabulary.encode("3+4*2=")) == "3+4*2="
    truth = probe(vocabulary, ["3+4*2=4"], 5)["labels"][0]
    assert [value for value in truth if value is not None] == [3, 2, 4] and len(truth) == 3 + 2 * count


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name in "ab":
        prepare(tmp_path / name, "--levels=2", "--rows=200", "--seed=3")
    for file in ("train.bin", "val.bin", "test.bin", "meta.json", "probe.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"{'ab'[i % 2] * (i % 7 + 1)}{i}={i % 3}\n" for i in range(60)))
    prepare(tmp_path / "own", f"--input={file}")
    vocabulary, rows = load(tmp_path / "own")
    assert set(texts(rows["train"], vocabulary)) | set(texts(rows["val"], vocabulary)) == set(file.read_text().splitlines(keepends=True))
    assert vocabulary.meta["level"] == "characters of the question"


def test_thoughts_may_be_limited_to_follow_some_characters(tmp_path):
    prepare(tmp_path, "--think_after=0123456789", "--tokens=characters", "--levels=2", "--rows=200")
    vocabulary = Vocabulary(load_meta(tmp_path))
    allowed = [token for token, may in zip(vocabulary.tokens, vocabulary.think_after()) if may]
    assert allowed == list("01234")


def test_distinct_gives_up_when_rows_run_out():
    draw = random.Random(0)
    assert len(distinct(lambda: str(draw.randrange(7)), 100)) == 7


# ----------------------------------------------------------------------------------------------
# what can be wrong


def test_a_bin_file_reads_as_written_and_any_damage_is_noticed(tmp_path):
    path = tmp_path / "x.bin"
    write_bin(path, [1, 2, 0, 3, 0], [1, 1])
    tokens, levels = read_bin(path)
    assert tokens.tolist() == [1, 2, 0, 3, 0] and levels.tolist() == [1, 1]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for blob in (whole[:-1], whole[:30], whole + b"x", b"<html>an error page</html>" * 9, bytes(flipped), b""):
        path.write_bytes(blob)
        with pytest.raises(DataError):
            read_bin(path)
    with pytest.raises(DataError, match="prepare.py"):
        read_bin(tmp_path / "missing.bin")


def refused(script, *arguments, **options):
    """Runs a script that must fail with one sentence on standard error -> the sentence."""
    done = call(script, *arguments, **options)
    assert done.returncode != 0 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_every_bad_input_gets_one_sentence(chains, tmp_path):
    trained = tmp_path / "run"
    common = [f"--data={chains}", "--n_layer=1", "--n_embd=16", "--n_head=2", "--n_bits=2"]
    common += ["--batch_tokens=64", "--device=cpu", "--report=false"]
    call("train.py", *common, "--steps=2", f"--out={trained}", check=True)

    assert "'n_layer'" in refused("train.py", "--n_layers=3"), "the nearest key is named"
    assert "not a int" in refused("train.py", "--steps=many")
    assert "n_head" in refused("train.py", *common, "--n_embd=15", f"--out={tmp_path / 'x'}")
    assert "'n_bits'" in refused("train.py", *common, "--n_bit=3", f"--out={tmp_path / 'x'}")
    assert "1 to 24 bits" in refused("train.py", *common, "--n_bits=25", f"--out={tmp_path / 'x'}")
    assert "is not here" in refused("train.py", *common, "--device=abacus", f"--out={tmp_path / 'x'}")
    assert "cannot read config" in refused("train.py", "config/missing.toml")
    bad_toml = tmp_path / "bad.toml"
    bad_toml.write_text("steps = = 3")
    assert "not TOML" in refused("train.py", bad_toml)
    assert "meta.json" in refused("train.py", f"--data={tmp_path / 'nowhere'}")
    assert "thought_grad" in refused("train.py", *common, "--thought_grad=guess", f"--out={tmp_path / 'x'}")
    assert "precision" in refused("train.py", *common, "--precision=half", f"--out={tmp_path / 'x'}")

    assert "'7'" in refused("sample.py", f"--run={trained}", "1+7=") and "vocabulary" in refused("sample.py", f"--run={trained}", "1+7=")
    assert "no checkpoint" in refused("sample.py", f"--run={tmp_path / 'nowhere'}", "1+1=")
    assert "prompt" in refused("sample.py", f"--run={trained}", input="")
    assert "cannot read" in refused("sample.py", f"--run={trained}", "--file=nowhere.txt")
    assert "another shape" in refused("train.py", *common, "--n_embd=32", "--steps=4", f"--out={trained}", "--resume=true")
    checkpoint = trained / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for blob in (whole[: len(whole) // 2], b"not a checkpoint"):
        checkpoint.write_bytes(blob)
        assert "damaged" in refused("sample.py", f"--run={trained}", "1+1=")
        assert "damaged" in refused("train.py", *common, "--steps=4", f"--out={trained}", "--resume=true")
    assert checkpoint.read_bytes() == b"not a checkpoint", "nothing is overwritten by a failed run"
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    assert "another program" in refused("sample.py", f"--run={trained}", "1+1=")

    rows = tmp_path / "rows.txt"
    rows.write_text("1=1\n" * 30 + "two equals = a = b\n")
    assert "line 31" in refused("data/arithmetic/prepare.py", f"--input={rows}", f"--out={tmp_path / 'own'}")
    assert "cannot read" in refused("data/arithmetic/prepare.py", "--input=nowhere.txt")


def test_a_diverging_run_stops_with_a_sentence_and_keeps_its_last_checkpoint(chains, tmp_path):
    done = call("train.py", f"--data={chains}", "--steps=200", "--lr=1e30", "--clip=1e30", "--warmup=1", "--device=cpu", "--save_every=1", "--log_every=1", f"--out={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "the loss is" in done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 1e30
