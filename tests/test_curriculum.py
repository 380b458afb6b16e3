"""Which levels are in use, how often each is drawn, and when thoughts begin to cost."""

import dataclasses

import pytest
import torch
from conftest import small

import train
from data.dataset import Rows
from train import LEARNED, MASTERED, PATIENCE, POOL, Curriculum, Trainer, pools


def feed(curriculum, share, times=100, level=None):
    """The same batch over and over, until a stage is gained: a share of the newest is right."""
    stage = curriculum.stage
    level = (curriculum.newest or curriculum.every)[0] if level is None else level
    right = torch.arange(100) < round(100 * share)
    for _ in range(times):
        curriculum.grow(torch.full((100,), level), right)
        if curriculum.stage > stage:
            break


def large(levels=3):
    return Curriculum({level: POOL for level in range(1, levels + 1)})


def test_levels_come_into_use_together_until_they_are_enough_sequences():
    assert pools({1: POOL, 2: POOL, 3: POOL}) == [1, 2, 3]
    assert pools({1: POOL // 2, 2: POOL // 2, 3: POOL - 1, 4: 1, 5: 9 * POOL}) == [2, 4, 5]
    assert pools({1: POOL, 2: POOL, 3: POOL - 1}) == [1, 3], "too few are left: with the last"
    assert pools({1: POOL, 2: POOL // 2 - 1, 3: POOL // 2}) == [3]
    assert pools({1: 1, 2: 1}) == [2] and pools({7: 9}) == [1]


def test_the_next_levels_come_when_the_newest_are_mastered_and_not_before():
    curriculum = Curriculum({2: POOL // 2, 3: POOL // 2, 5: POOL})
    assert curriculum.levels == curriculum.newest == [2, 3] and curriculum.mastered == []
    feed(curriculum, MASTERED - 0.01)
    assert curriculum.stage == 0
    feed(curriculum, 1.0)
    assert curriculum.levels == [2, 3, 5] and curriculum.newest == [5]
    assert curriculum.mastered == [2, 3] and not curriculum.learned
    feed(curriculum, 1.0, times=5)
    assert not curriculum.learned, "what was right before says nothing about the newest"
    feed(curriculum, 1.0)
    assert curriculum.learned and curriculum.mastered == [2, 3, 5]


def test_only_sequences_of_the_newest_levels_count():
    curriculum = large()
    feed(curriculum, 1.0)
    before = curriculum.stage, curriculum.right
    feed(curriculum, 1.0, level=1)
    assert (curriculum.stage, curriculum.right) == before


def test_half_of_a_batch_is_of_the_newest_levels_as_long_as_they_are_not_learned():
    rows = Rows(torch.tensor([1, 2, 0] * 400).numpy(), torch.arange(400).numpy() % 4 + 1, 0, 2)
    alike, generator = [1 / 4] * 4, torch.Generator().manual_seed(0)
    wanted = {0: alike, 1: [1 / 8] * 3 + [5 / 8], 2: [1 / 8] * 2 + [3 / 8] * 2, 4: alike}
    for newest, shares in wanted.items():
        level = rows.draw(20_000, [1, 2, 3, 4], generator, newest=newest).level
        share = level.bincount(minlength=5)[1:] / 20_000
        torch.testing.assert_close(share, torch.tensor(shares), atol=0.02, rtol=0)
    curriculum = Curriculum({1: POOL, 2: POOL // 2, 3: POOL // 2})
    assert len(curriculum.newest) == 1
    feed(curriculum, 1.0)
    assert len(curriculum.newest) == 2
    feed(curriculum, 1.0)
    assert curriculum.learned and len(curriculum.newest) == 0


def test_all_levels_are_taken_in_when_the_rate_must_fall():
    curriculum = large(4)
    feed(curriculum, 1.0)
    assert not curriculum.move_on(79, 100) and curriculum.move_on(80, 100)
    assert curriculum.levels == [1, 2, 3, 4] and curriculum.newest == [2, 3, 4]
    assert curriculum.mastered == [1] and not curriculum.learned, "2 was not mastered"
    before = vars(curriculum).copy()
    assert not curriculum.move_on(81, 100)
    assert vars(curriculum) == before, "there is nothing left"
    last = large(1)
    assert last.move_on(80, 100) and last.gave_up, "the only level was in use before"
    at_once = Curriculum({1: 9, 2: 9}, grows=False)
    assert at_once.levels == at_once.mastered == [1, 2] and at_once.newest == []
    assert not at_once.move_on(80, 100) and not at_once.gave_up


def test_patience_with_one_stage_ends():
    curriculum = large(4)
    feed(curriculum, 0.5, times=25)
    feed(curriculum, 1.0)
    feed(curriculum, 0.5, times=round(100 * PATIENCE))
    assert not curriculum.move_on(60, 100), "each stage has its own"
    feed(curriculum, 0.5, times=1)
    assert curriculum.move_on(61, 100) and curriculum.levels == [1, 2, 3, 4]
    assert curriculum.gave_up and curriculum.mastered == [1]
    feed(curriculum, 1.0)
    feed(curriculum, 1.0)
    assert curriculum.learned and not curriculum.move_on(70, 100), "and may still be learned"
    assert curriculum.steps_left(70, 100) == 20


def test_what_is_given_up_is_not_cut_any_more(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path))
    plans = [trainer.draw()[1] for _ in range(5)]
    assert all(any(plan[what].any() for plan in plans) for what in ("cuts", "jumps"))
    trainer.curriculum.gave_up = True
    plans = [trainer.draw()[1] for _ in range(5)]
    assert not any(plan[what].any() for plan in plans for what in ("cuts", "jumps"))


def test_a_curriculum_goes_on_from_its_state():
    first, second = large(4), large(4)
    feed(first, 1.0)
    first.move_on(80, 100)
    feed(first, 0.8, times=5)
    vars(second).update(vars(first))
    assert vars(second) == vars(first) and second.levels == [1, 2, 3, 4]
    for curriculum in (first, second):
        feed(curriculum, 1.0)
        assert curriculum.learned and curriculum.mastered == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------
# in a run


@pytest.fixture
def trainer(chains, tmp_path, monkeypatch):
    """At most 100 steps, the last 20 of them FALL; every level is a stage."""
    monkeypatch.setattr(train, "POOL", 1)
    return Trainer(small(chains, tmp_path, steps=100))


def walk(trainer, first, end):
    """Decide after each step from the first -> the one after which thoughts cost, or None."""
    for trainer.step in range(first, end):
        trainer.next_phase()
        if trainer.paid:
            return trainer.step


def test_once_all_levels_are_learned_only_the_cost_phase_is_left(trainer, capsys):
    feed(trainer.curriculum, 1.0)
    feed(trainer.curriculum, 1.0)
    assert trainer.curriculum.mastered == [1, 2] and walk(trainer, 0, 30) is None
    assert trainer.left == 100 - 29
    feed(trainer.curriculum, 1.0)
    feed(trainer.curriculum, LEARNED - 0.001)
    assert trainer.curriculum.learned and walk(trainer, 30, 60) is None, "nearly"
    feed(trainer.curriculum, 1.0, level=1)
    assert walk(trainer, 30, 60) == 31
    trainer.step = 50
    assert trainer.left == 0 and not capsys.readouterr().out


def test_the_loop_ends_where_no_steps_are_left(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path, steps=20))
    trainer.curriculum.learned_at = 1
    assert train.train(trainer) and trainer.step == 1 + 4


def test_a_run_that_is_resumed_with_more_steps_goes_on(trainer):
    for _ in range(4):
        feed(trainer.curriculum, 1.0)
    assert walk(trainer, 30, 60) == 31
    trainer.config = dataclasses.replace(trainer.config, steps=1000)
    trainer.step = 50
    assert trainer.left == 30 + 200 - 50


def test_without_a_curriculum_thoughts_cost_when_the_warm_up_is_over(chains, tmp_path):
    how = {"curriculum": False, "steps": 100}
    assert walk(Trainer(small(chains, tmp_path, warm_up=0.4, **how)), 0, 100) == 41
    never = Trainer(small(chains, tmp_path, warm_up=1.0, **how))
    assert walk(never, 0, 101) is None and never.left == 0


def test_a_plain_model_has_nothing_to_pay_for(chains, tmp_path):
    how = {"n_bits": 0, "curriculum": False, "steps": 100, "warm_up": 0.4}
    trainer = Trainer(small(chains, tmp_path, **how))
    assert trainer.curriculum.learned and walk(trainer, 0, 100) is None
    trainer = Trainer(small(chains, tmp_path, recall=True, **how))
    assert walk(trainer, 0, 100) == 41, "but a RECALL has its price, too"


def test_at_the_last_call_all_levels_come_into_use_and_thoughts_cost(trainer, capsys):
    feed(trainer.curriculum, 1.0)
    assert walk(trainer, 0, 80) is None and trainer.curriculum.levels == [1, 2]
    assert not capsys.readouterr().out
    assert walk(trainer, 80, 100) == 81 and trainer.curriculum.levels == [1, 2, 3]
    assert trainer.curriculum.mastered == [1]
    assert "level 2 is not learned after 80 steps" in capsys.readouterr().out
    feed(trainer.curriculum, 1.0)
    trainer.next_phase()
    assert trainer.curriculum.learned and trainer.left == 100 - 81, (
        "what is mastered later than that does not make a run longer"
    )


def test_a_step_draws_what_the_curriculum_says_and_tells_it_what_was_right(trainer, monkeypatch):
    drawn, walked, heard = [], [], []
    draw, walk = trainer.rows.draw, train.rollout

    def note(size, levels, generator, newest):
        drawn.append((levels, newest, draw(size, levels, generator, newest=newest)))
        return drawn[-1][2]

    def listen(*what, **how):
        walked.append(walk(*what, **how))
        return walked[-1]

    monkeypatch.setattr(train, "rollout", listen)
    monkeypatch.setattr(trainer.rows, "draw", note)
    monkeypatch.setattr(Curriculum, "grow", lambda self, *what: heard.append(what))
    trainer.curriculum.stage = 1  # levels 1 and 2, of which 2 is new
    trainer.train_step()
    levels, newest, batch = drawn[0]
    assert (levels, newest) == ([1, 2], 1) and torch.equal(heard[0][0], batch.level)
    grid, out = walked[0]
    right = train.answers_right(out, grid, train.counted_tokens(batch))
    assert torch.equal(heard[0][1], right) and 0 < right.sum() < len(right)


def test_a_try_counts_for_no_level(trainer, monkeypatch):
    heard = []
    monkeypatch.setattr(Curriculum, "grow", lambda _, level, right: heard.append(level))
    trainer.paid = True
    trainer.train_step()
    n = len(heard[0]) // 5  # a try beside one sequence in four
    assert (heard[0][:-n] > 0).all() and (heard[0][-n:] == -1).all()


def test_a_try_is_of_a_sequence_cut_at_the_same_places_in_which_the_gate_decides(trainer):
    trainer.curriculum.stage = 3  # all levels are in use
    before, plan, of = trainer.draw()
    assert (plan["forced"] == train.THINK).all() and "tries" not in plan
    assert (of == train.NO_TRY).all() and plan["cuts"].sum(dim=1).max() == 1
    trainer.paid, most = True, {True: 0, False: 0}
    for _ in range(10):
        batch, plan, of = trainer.draw()
        size = len(before.real)  # the tries come beside
        n = size // 4
        assert of.tolist() == [train.NO_TRY] * size + [*range(n)]
        alike = torch.cat([batch.real, plan["cuts"], plan["jumps"]], dim=1)
        assert torch.equal(alike[size:], alike[:n]) and (plan["tries"][:-n] == train.NO_TRY).all()
        assert ((plan["tries"][-n:] != train.NO_TRY).sum(dim=1) == 1).all()
        decides = (plan["forced"] == train.UNFORCED).flatten(1).all(dim=1)
        assert decides.tolist() == [True] * n + [False] * (size - n) + [True] * n
        for one in (False, True):
            most[one] = max(most[one], int(plan["cuts"][decides == one].sum(dim=1).max()))
    assert most[False] == 1 < most[True], "where the gate decides, many thoughts are needed"


def test_what_was_learned_is_said(trainer):
    told = train.what_was_learned
    rest = "; thoughts never cost anything"
    assert told(trainer) == "no level was learned; not learned: 1 to 3" + rest
    feed(trainer.curriculum, 1.0)
    assert told(trainer).startswith("learned: levels 1 to 1; not learned: 2 to 3; ")
    trainer.paid = True
    for _ in range(2):
        feed(trainer.curriculum, 1.0)
    assert told(trainer) == "learned: levels 1 to 3"
