"""Variants replace one piece of the program, and the rest takes no notice."""

import json

import pytest
import torch
from conftest import ROOT, batch_of, call, grid_of, replay, seeded, small

import model
import train
from data.arithmetic.prepare import main as prepare_arithmetic
from data.automata.prepare import main as prepare_automata
from lab.variants import finger, reinforce
from lab.variants.softmax import SoftmaxThoughts
from model import Cells
from runs import load_model


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    prepare_automata(["--task=parity", "--levels=8", f"--out={folder}"])
    return folder


def test_pause_tokens_stay_one_thought_for_every_program_that_loads_them(parity, tmp_path):
    options = ["--n_bits=3", "--steps=4", "--eval_rows=10", "--n_embd=16", "--n_head=2"]
    options += [f"--data={parity}", f"--out={tmp_path}", "--report=false"]
    call("lab/variants/pause.py", *options, check=True)
    gpt, _, _ = load_model(str(tmp_path))
    h = gpt.thoughts.head(100 * torch.randn(500, 16))
    assert not gpt.thoughts.likeliest(h).any() and not gpt.thoughts.draw(h).any()


def test_softmax_thoughts_by_hand():
    thoughts = SoftmaxThoughts(1, 4)
    h = torch.tensor([[2.0, 1.0]], requires_grad=True)
    p = h.softmax(dim=-1)
    log_p = thoughts.log_probability(h, torch.tensor([1]))
    torch.testing.assert_close(log_p, p[:, 1].log())
    assert thoughts.likeliest(h).tolist() == [0]
    echo = thoughts.echo(h)
    assert not echo.any()
    (gradient,) = torch.autograd.grad(echo.sum(), h)
    value = thoughts.embedding.weight.sum(dim=1)
    expected = p[0] * (value - (p[0] * value).sum())
    torch.testing.assert_close(gradient[0], expected)


def test_drawn_softmax_thoughts_match_their_probabilities():
    h = torch.tensor([0.0, 1.0, -1.0, 0.5])
    drawn = SoftmaxThoughts(2, 4).draw(h.expand(20_000, 4), seeded(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, h.softmax(dim=-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("variant", ["pause", "softmax", "reinforce", "finger"])
def test_a_variant_trains_like_the_program(variant, parity, tmp_path):
    options = ["--n_bits=3", "--steps=4", "--eval_rows=10", "--n_embd=16", "--n_head=2"]
    options += [f"--data={parity}", f"--out={tmp_path}", "--report=false"]
    said = call(f"lab/variants/{variant}.py", *options, check=True).stdout
    assert "no level was learned" in said and (tmp_path / "checkpoint.pt").exists()
    assert f"lab/variants/{variant}.py" in (ROOT / f"lab/variants/{variant}.py").read_text()


def test_reinforce_rewards_a_thought_by_what_comes_behind_it_and_nothing_else(tiny, monkeypatch):
    """Two rollouts of a sequence, with one thought each; the term by hand."""
    grid = grid_of([[1, 5, 2, 3, 4], [1, 8, 2, 3, 4]], runs=1)  # the thoughts 0 and 3
    batch, gpt = batch_of(grid, 3), tiny(0)
    monkeypatch.setattr(reinforce, "usual_loss", lambda *_: {})
    monkeypatch.setattr(reinforce, "ROLLOUTS", 2)
    how = grid, replay(gpt, grid), batch, None, train.Config(), False
    terms = reinforce.hybrid_loss(gpt, *how)
    cost = []
    for thought in (5, 8):  # of the answer, 4
        logits = gpt(torch.tensor([[1, thought, 2, 3]])).logits[0, -1]
        cost.append(-logits.log_softmax(dim=-1)[4])
    h = gpt(torch.tensor([[1]])).thoughts[0, 0]
    log_p = gpt.thoughts.log_probability(h.expand(2, -1), torch.tensor([0, 3]))
    advantage = torch.stack([cost[1] - cost[0], cost[0] - cost[1]])
    expected = -(advantage * log_p).mean()
    torch.testing.assert_close(terms["thoughts"], expected)


def test_without_the_echo_numbers_get_no_gradient_from_later_losses():
    thoughts, h = reinforce.NoEcho(2, 8), torch.randn(3, 2, requires_grad=True)
    assert thoughts.echo(h).shape == (3, 8) and not thoughts.echo(h).requires_grad


def test_reinforce_has_rollouts_to_compare(chains, tmp_path):
    trainer = reinforce.Trainer(small(chains, tmp_path))
    real = trainer.draw()[0].real
    assert not trainer.paid and (real.view(-1, 4, real.size(1)) == real[::4, None]).all()


def test_a_finger_dims_what_came_before_but_two_tokens(monkeypatch):
    """
    Tokens 0, 1, 2, then ; at 3, thoughts at 4 and 5, tokens 6 and 7, then = at 8, and thoughts at 9
    and 10. In the second sequence it does not press.
    """
    monkeypatch.setattr(finger, "finger", (3, 2, torch.tensor([7.0, 0.0])[:, None, None]))
    cells = Cells(torch.arange(11).expand(2, 11), seen=torch.ones(2, 11, dtype=torch.bool))
    added = finger.visible(cells, cells)
    clear = {2: [0, 1, 2], 3: [0, 1, 3], 4: [1, 2, 3, 4], 5: [2, 3, 4, 5]}
    clear |= {8: [5, 6, 8], 9: [6, 7, 8, 9], 10: [7, 8, 9, 10]}
    for cell, at in clear.items():
        assert (added[0, cell] == 0).nonzero()[:, 0].tolist() == at
        assert (added[0, cell] == -7).sum() == cell + 1 - len(at)
    assert torch.equal(added[1] == 0, torch.ones(11, 11).tril().bool())
    assert torch.equal(added.isinf(), torch.ones(2, 11, 11).triu(1).bool()), "what comes later"


def test_a_finger_is_lifted_while_all_is_mastered_and_nothing_is_learned_before_it_is_gone():
    curriculum, level, right = finger.Curriculum({1: 100}), torch.ones(4).long(), torch.ones(4) > 0
    curriculum.right = 1.0
    curriculum.grow(level, right)
    assert curriculum.learned and curriculum.press == finger.PRESS, "mastered only now"
    curriculum.right = 1.0
    curriculum.grow(level, right)
    assert curriculum.press == finger.PRESS * finger.LIFT
    curriculum.move_on(1, 100)
    assert curriculum.learned_at is None
    curriculum.grow(level, ~right)
    assert curriculum.press == finger.PRESS * finger.LIFT, "it waits"
    curriculum.press, curriculum.right = finger.GONE, 1.0
    curriculum.grow(level, right)
    curriculum.move_on(2, 100)
    assert curriculum.learned_at == 2


def test_runs_grow_with_the_levels_until_thoughts_cost(chains, tmp_path):
    trainer = finger.Trainer(small(chains, tmp_path, max_run=9))
    assert trainer.thinking.max_run == trainer.curriculum.levels[-1] + 1 == 4
    trainer.paid = 1
    assert trainer.thinking.max_run == 9


@pytest.mark.parametrize("paid", [False, True])
def test_no_finger_where_the_gate_decides(paid, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "visible", finger.visible)
    monkeypatch.setattr(train, "Curriculum", finger.Curriculum)
    data = tmp_path / "data"
    prepare_arithmetic(["--width=4", "--levels=2", "--think_after==", f"--out={data}"])
    trainer = finger.Trainer(small(data, tmp_path, max_run=3, batch_tokens=800))
    trainer.paid = paid
    batch, plan, of = trainer.draw()
    press, tried = plan.pop("press"), of[of != train.NO_TRY]
    assert len(tried) == (len(of) // 5 if paid else 0) and not press[tried].any()
    assert (press > 0).sum() == len(of) - 2 * len(tried) and press.min() < 1 < 40 < press.max()
    assert (batch.level[press > finger.PRESS] > 0).all(), "what is pressed hard counts"
    assert (batch.level[(0 < press) & (press < finger.PRESS / 2)] == -1).all()
    trainer.model.eval()
    read, free = (
        finger.rollout(trainer.model, batch.real, batch.length, trainer.thinking, seeded(0), **how)
        for how in (plan | {"press": press}, plan)
    )
    off = (read[1].loss - free[1].loss).abs().flatten(1).amax(dim=1)
    assert (off[press == 0] < 1e-5).all() and (off[press > finger.PRESS] > 1e-5).all()


def test_a_gru_learns_parity(parity, tmp_path):
    own = (f"--data={parity}", f"--out={tmp_path}", "--steps=400", "--n_embd=32", "--threads=1")
    call("lab/variants/gru.py", *own, "--batch_tokens=1536", check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["modes"]["policy"]["accuracy"]["8"] > 0.95
