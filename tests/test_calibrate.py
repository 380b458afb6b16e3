"""Calibration: rank statistics by hand, and the interventions that it rests on."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import V, alone, call, seeded, small

import runs
import train
from data.dataset import Batch
from lab import calibrate
from lab.calibrate import Subject, auroc, blinded, intervene, look, ranks, spearman
from model import Thinking
from train import rollout


def test_ranks_share_ties():
    assert ranks(torch.tensor([30.0, 10.0, 10.0, 20.0])).tolist() == [4, 1.5, 1.5, 3]


def test_area_under_the_curve_by_counting_pairs():
    score, event = torch.tensor([1.0, 2, 2, 3]), torch.tensor([False, False, True, True])
    assert auroc(score, event) == (1 + 0.5 + 1 + 1) / 4
    assert auroc(-score, event) == 1 - 3.5 / 4
    assert math.isnan(auroc(score, event | True)), "one kind only"


def test_rank_correlation_sees_order_and_nothing_else():
    x = torch.randn(50, generator=seeded(0))
    assert abs(spearman(x, x.exp()) - 1) < 1e-9 and abs(spearman(x, -x) + 1) < 1e-9


@pytest.fixture
def subject(tiny):
    return Subject(tiny(observer="0,1"), Thinking(greedy=True, max_run=2), train.Config(max_run=2))


@pytest.fixture
def batch():
    length = torch.arange(20) % 3 + 6
    real = torch.randint(V, (20, 8), generator=seeded(0))
    return Batch.plain(real, length, torch.full((20,), 3), length)


@pytest.mark.parametrize("chunk", [512, 4])
def test_each_sign_belongs_to_its_cell(subject, batch, chunk, monkeypatch):
    """A rollout, in chunks, against each sequence alone."""
    monkeypatch.setattr(train, "CHUNK", chunk)
    D = subject.model.config.n_embd
    subject.probe = torch.randn(D + 1, 2, generator=seeded(1))
    grid, found = look(subject, batch)
    for b in range(20):
        for (t, slot), out in alone(subject.model, grid, b).items():
            p = out.logits.softmax(dim=0)
            wanted = {"entropy": -(p * p.log()).sum(), "largest probability": -p.max()}
            wanted |= dict(zip(calibrate.READINGS, out.readings))
            wanted["loss"] = -p[grid.token[b, t + 1, 0]].log()
            wanted["probe of loss"] = subject.probe[:D, 0] @ found["last"][b, t, slot]
            wanted["probe of loss"] += subject.probe[D, 0]
            for name, value in wanted.items():
                torch.testing.assert_close(found[name][b, t, slot], value, atol=1e-4, rtol=1e-4)


def test_the_probe_finds_what_is_linear_in_the_last_layer(subject, batch, monkeypatch):
    grid, found = look(subject, batch)
    loss = found["last"] @ torch.randn(16, generator=seeded(1)) + 2.0
    seen = grid, found | {"loss": loss, "cost": 3.0 - loss}
    monkeypatch.setattr(calibrate, "look", lambda *_: seen)
    monkeypatch.setattr(calibrate, "RIDGE", 1e-6)
    subject.probe = calibrate.fit_probe(subject, SimpleNamespace(levels=[1], draw=lambda *_: batch))
    monkeypatch.undo()
    _, again = look(subject, batch)
    for name, wanted in (("probe of loss", loss), ("probe of cost", 3.0 - loss)):
        there = grid.present
        torch.testing.assert_close(again[name][there], wanted[there], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("horizon", [0, 2])
def test_the_value_of_a_thought_is_that_of_two_rollouts_that_differ_in_it(subject, batch, horizon):
    """Each sequence by itself, with what it thinks told cell by cell up to there."""
    subject.trained.horizon = horizon
    model, thinking = subject.model, subject.thinking
    grid, found = look(subject, batch)
    asked = grid.asked[:, :, :-3].flatten(1)
    cell = (torch.rand(asked.shape, generator=seeded(0)) * asked).argmax(dim=1)
    values = intervene(subject, batch, found["own"], cell)
    assert (cell % 2).unique().tolist() == [0, 1], "within runs, too"
    for b in range(20):
        t, run = divmod(int(cell[b]), 2)
        real, length = batch.real[b : b + 1], batch.length[b : b + 1]
        so_far = torch.where(grid.present[b], grid.token[b] - V, -1)[:, 1:-2]  # (T, R)
        costs = []
        for thought in (-1, int(found["own"][b, t, run])):
            forced = torch.full((1, 8, 2), train.UNFORCED)
            forced[0, :t], forced[0, t, :run] = so_far[:t], so_far[t, :run]
            forced[0, t, run] = thought
            other, out = rollout(model, real, length, thinking, forced=forced)
            assert bool(other.thinks[0, t, run]) == (thought >= 0)
            loss = (out.loss * other.emits).sum(dim=2)[0]
            first = max(t, 2)  # a prompt of 3 tokens: the loss at its last is the answer's first
            costs.append(loss[first : t + horizon if horizon else None].sum())
        torch.testing.assert_close(values[b], costs[0] - costs[1], atol=1e-5, rtol=1e-5)


def test_a_blinded_model_is_one_whose_observer_nobody_listens_to(subject, batch):
    model, D = subject.model, subject.model.config.n_embd
    out = model(batch.real)
    with blinded(model, "zeroed"):
        zeroed = model(batch.real)
    with blinded(model, "swapped", gates_only=True):
        swapped = model(batch.real)
    assert torch.equal(swapped.logits, out.logits) and not torch.allclose(swapped.gate, out.gate)
    assert torch.equal(model(batch.real).gate, out.gate), "left as it was"
    with torch.no_grad():
        model.blocks[-1].attention.proj.weight[:, D:] = 0
        model.gate.out.weight[:, D:] = 0
    deaf = model(batch.real)
    torch.testing.assert_close(zeroed.logits, deaf.logits)
    torch.testing.assert_close(zeroed.gate, deaf.gate)
    assert not torch.allclose(out.logits, zeroed.logits)


def test_errors_are_foretold_only_where_the_answer_is_right_so_far(subject, batch, monkeypatch):
    """By hand: of two answers of three tokens one is wrong from its second on."""
    grid, _ = rollout(subject.model, batch.real[:2], torch.tensor([6, 6]), Thinking("never"))
    right = torch.ones_like(grid.present)
    right[1, 3:] = False
    scores = torch.zeros(grid.present.shape)
    scores[1, 3], scores[1, 4] = 1.0, -1.0  # the third token is no longer asked about
    names = ("predicted_loss", "probe of loss", *calibrate.RIVALS)
    found = dict.fromkeys(names, scores) | {"right": right}
    monkeypatch.setattr(calibrate, "look", lambda *_: (grid, found))

    two = Batch(*(part[:2] for part in batch))
    split = SimpleNamespace(levels=[3], first=lambda *_: two)
    answer = calibrate.wrong(subject, [split], 2)
    assert answer == {3: {"accuracy": 0.5} | dict.fromkeys(names, 1.0)}


def test_a_run_is_calibrated_from_the_command_line(chains, tmp_path):
    config = small(chains, tmp_path, observer="0", n_layer=2, curriculum=False, warm_up=0.2)
    trainer = train.Trainer(config)
    train.begin(trainer)
    train.train(trainer)
    done = call("lab/calibrate.py", f"--run={tmp_path}", "--rows=20")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert {"predicted_loss", "cost_to_go", "wrong", "blinded"} <= set(found)
    assert found["value_of_thinking"]["cells"] > 40  # one of each sequence
    dear, free = found["steered"]["2.0"], found["steered"]["-10.0"]
    assert dear["thoughts"] <= free["thoughts"] and free["thoughts"] > 1


def test_a_run_without_an_observer_is_refused_in_one_sentence(chains, tmp_path):
    trainer = train.Trainer(small(chains, tmp_path))
    runs.save_checkpoint(tmp_path / "checkpoint.pt", trainer.state())
    done = call("lab/calibrate.py", f"--run={tmp_path}")
    assert done.returncode == 1 and "has no observer" in done.stderr
    assert "Traceback" not in done.stderr
