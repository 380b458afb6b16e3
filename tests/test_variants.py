"""Variants replace one piece of the program, and the rest takes no notice."""

import json

import pytest
import torch
from conftest import call

from lab.automata import MODELS, TASKS, line
from lab.variants.pause import Pause
from lab.variants.softmax import SoftmaxThoughts


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    call("data/automata/prepare.py", "--task=parity", "--levels=8", f"--out={folder}", check=True)
    return folder


def test_pause_tokens_are_all_one_thought():
    thoughts = Pause(3, 8)
    h = torch.randn(50, 3)
    assert thoughts.choose(h, thoughts.noise(50)).tolist() == [0] * 50


def test_softmax_thoughts_by_hand():
    thoughts = SoftmaxThoughts(1, 4)
    h = torch.tensor([[2.0, 1.0]], requires_grad=True)
    p = h.softmax(-1)
    log_p = thoughts.log_probability(h, torch.tensor([1]))
    torch.testing.assert_close(log_p, p[:, 1].log())
    forced = thoughts.bits(torch.tensor([1])) * torch.inf
    assert thoughts.choose(h).tolist() == [0] and thoughts.choose(h, forced).tolist() == [1]
    echo = thoughts.echo(h)
    assert not echo.any()
    (gradient,) = torch.autograd.grad(echo.sum(), h)
    value = thoughts.embedding.weight.sum(dim=1)
    expected = p[0] * (value - (p[0] * value).sum())
    torch.testing.assert_close(gradient[0], expected)


def test_drawn_softmax_thoughts_match_their_probabilities():
    thoughts = SoftmaxThoughts(2, 4)
    h = torch.tensor([0.0, 1.0, -1.0, 0.5])
    noise = thoughts.noise(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(thoughts.choose(h, noise), minlength=4) / 20_000
    torch.testing.assert_close(share, h.softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("variant", ["pause", "softmax"])
def test_a_variant_trains_like_the_program(variant, parity, tmp_path):
    small = ("--n_bits=3", "--steps=4", "--eval_rows=10", "--n_embd=16", "--n_head=2")
    own = (f"--data={parity}", f"--out={tmp_path}", "--report=false")
    said = call(f"lab/variants/{variant}.py", *own, *small, check=True).stdout
    assert "no level was learned" in said and (tmp_path / "checkpoint.pt").exists()


def test_a_gru_learns_parity(parity, tmp_path):
    own = (f"--data={parity}", f"--out={tmp_path}", "--steps=400", "--n_embd=32", "--threads=1")
    call("lab/variants/gru.py", *own, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["modes"]["policy"]["accuracy"]["8"] > 0.95


def test_the_table_of_automata_says_nothing_where_there_is_no_report():
    assert line(next(iter(TASKS)), next(iter(MODELS)), 10**6) is None
