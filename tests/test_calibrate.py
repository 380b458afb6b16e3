"""Calibration: rank statistics by hand, and the interventions that it rests on."""

import math

import pytest
import torch

from calibrate import auroc, blinded, decided, ranks, signs, spearman
from model import KVCache
from sample import steered
from stream import Thinking, read, rollout


def test_ranks_share_ties():
    assert ranks(torch.tensor([30.0, 10.0, 10.0, 20.0])).tolist() == [4, 1.5, 1.5, 3]


def test_area_under_the_curve_by_counting_pairs():
    score, event = torch.tensor([1.0, 2, 2, 3]), torch.tensor([False, False, True, True])
    assert auroc(score, event) == (1 + 0.5 + 1 + 1) / 4
    assert auroc(-score, event) == 1 - 3.5 / 4
    assert math.isnan(auroc(score, event | True)), "one kind only"


def test_rank_correlation_sees_order_and_nothing_else():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert abs(spearman(x, x.exp()) - 1) < 1e-9 and abs(spearman(x, -x) + 1) < 1e-9


def rows():
    real = torch.randint(5, (20, 6), generator=torch.Generator().manual_seed(0))
    return real, torch.full((20,), 6)


@pytest.mark.parametrize("window", [0, 3])
def test_signs_are_those_of_the_columns_as_they_were_made(tiny, window):
    model, (real, length) = tiny(observer="quarters"), rows()
    roll = rollout(model, real, length, Thinking(window=window), torch.Generator().manual_seed(0))
    found, _ = signs(model, roll)
    cache = KVCache(model.config, 20, roll.stream.size(1), window)
    for c in range(roll.stream.size(1)):
        out = model(roll.stream[:, c : c + 1], cache=cache)
        torch.testing.assert_close(torch.stack([found["observer"][:, c], found["gate"][:, c]]), torch.stack([out.readings[:, 0, 0], out.gate[:, 0]]))


def test_two_rollouts_that_differ_in_one_decision(tiny):
    model, (real, length) = tiny(observer="quarters"), rows()
    policy = rollout(model, real, length, Thinking(greedy=True), torch.Generator())
    column = policy.decides.float().argmax(dim=1)
    for thinks in (False, True):
        with decided(model, column, thinks):
            told = rollout(model, real, length, Thinking(greedy=True), torch.Generator())
        assert (told.thinks.gather(1, column[:, None]) == thinks).all()
        for row in range(20):
            assert (told.stream[row, : column[row] + 1] == policy.stream[row, : column[row] + 1]).all(), "what came before is the same"
    assert torch.equal(rollout(model, real, length, Thinking(greedy=True), torch.Generator()).stream, policy.stream), "left as it was"


def test_a_steered_model_thinks_where_the_observer_expects_more_than_the_price(tiny):
    model, (real, length) = tiny(observer="quarters"), rows()
    with steered(model, 0.3):
        roll = rollout(model, real, length, Thinking(greedy=True), torch.Generator())
    assert torch.equal(roll.thinks, roll.decides & (read(model, roll).readings[..., 1] > 0.3))
    assert 0 < roll.thinks.sum() < roll.decides.sum()


def test_a_zeroed_observer_is_one_that_nobody_listens_to(tiny):
    model, (real, _) = tiny(observer="quarters"), rows()
    with blinded(model, "zeroed"):
        blind = model(real)
    with blinded(model, "swapped", gate_only=True):
        confused = model(real)
    out = model(real)
    assert torch.equal(confused.words, out.words) and not torch.equal(confused.gate, out.gate)
    with torch.no_grad():
        model.blocks[-1].attention.proj.weight[:, 16:] = 0
        model.gate.weight[:, 16:] = 0
    assert torch.allclose(model(real).words, blind.words, atol=1e-6) and torch.allclose(model(real).gate, blind.gate, atol=1e-6)
    assert not torch.allclose(out.words, blind.words)
