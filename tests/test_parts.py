"""lab/parts.py: how long a model thinks behind each part of a question."""

import json

import pytest
from conftest import small

from data.arithmetic.prepare import main as prepare
from data.dataset import DataError
from lab import parts
from train import Trainer, train


def test_parts_of_a_row_by_hand():
    tokens = ["3", "+4", "*2", ".", ";", "+1", ".", ".", "="]
    thoughts = [0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert parts.find_parts(tokens, thoughts) == [(";", 2, 2), ("=", 1, 1)]


def test_within_a_row_only_what_differs_between_its_parts_counts():
    longer = [(";", 1, 4), ("=", 2, 3)]  # the second row thinks more, at the wrong part
    found = parts.measure([[("=", 1, 1)], longer, [(";", 1, 2), ("=", 2, 1)]])
    assert found["thoughts"] == {";": {1: 3.0}, "=": {1: 1.0, 2: 2.0}}
    assert found["correlation"]["one_row"] == pytest.approx(-1)
    assert found["correlation"]["all"] > -0.5


def test_parts_json_and_its_picture_stand_beside_the_run(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    prepare(
        ["--width=2", "--parts=2", "--levels=3", "--rows=200", "--think_after=;=", f"--out={data}"]
    )
    out.mkdir()
    train(Trainer(small(data, out, max_run=3)))
    parts.main([f"--run={out}", "--rows=20", "--device=cpu"])
    found = json.loads((out / "parts.json").read_text())
    assert set(found["thoughts"]["="]) == {"1", "2"} and (out / "parts.png").exists()
    prepare(["--levels=2", "--rows=200", f"--out={data}"])
    train(Trainer(small(data, out)))
    with pytest.raises(DataError, match="questions in parts"):
        parts.main([f"--run={out}"])
