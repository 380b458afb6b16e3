"""The grid: what it says by hand, and the rollout against slow, obvious ones."""

import pytest
import torch
from conftest import RECALL, K, V, alone, grid_of, replay, seeded, segments, streams_of

import train
from model import Thinking, wants_to_think
from train import NO_THOUGHT, UNFORCED, rollout

# ----------------------------------------------------------------------------------------------
# what a grid says


@pytest.fixture
def grid():
    """0 [5 6] 1 RECALL 2 [7] 3, with 4 tried in the place of 2."""
    grid = grid_of([[0, 5, 6, 1, RECALL, 2, 7, 3]])
    grid.token[0, 1, 4], grid.present[0, 1, 4] = 4, True
    return grid


def by_token(cells):
    return cells[0].int().tolist()


def test_a_cell_thinks_or_recalls_or_emits_and_a_wrong_token_does_none_of_these(grid):
    assert by_token(grid.present) == [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [1, 1, 0, 0, 0], [0] * 5]
    assert by_token(grid.thinks) == [[1, 1, 0, 0, 0], [0] * 5, [1, 0, 0, 0, 0], [0] * 5]
    assert by_token(grid.recalls) == [[0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert by_token(grid.emits) == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5]


def test_the_gate_is_asked_except_behind_a_run_that_is_over_or_a_token_that_forbids_it(tiny):
    after = torch.tensor([True, True, False, True, True])
    forced = torch.tensor([[[1, 2], [NO_THOUGHT, 3], [1, 2], [1, 2]]])  # after 0, 1, 2, 3
    how = torch.tensor([[0, 1, 2, 3]]), torch.tensor([4]), Thinking(max_run=2, after=after)
    grid, _ = rollout(tiny(), *how, forced=forced)
    asked = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert by_token(grid.asked) == asked, "and after the last token nothing is"
    assert by_token(grid.thinks) == [[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]


# ----------------------------------------------------------------------------------------------
# the rollout


def step_by_step(model, real, thinking, forced=None):
    """
    The slow twin of a greedy rollout, of one sequence: no cache, no batch; for every cell the whole
    stream goes through the network again -> the stream, without the last real token.
    """
    stream = []
    for t in range(len(real) - 1):
        stream.append(int(real[t]))
        run = 0
        while True:
            ids = torch.tensor([[i for i in stream if i != RECALL]])
            out = model(ids, window=thinking.window)
            if thinking.price is not None:
                wants = bool(out.readings[0, -1, 1] > thinking.price)
            elif thinking.force is not None:
                wants = bool(thinking.force) or run > 0
            else:
                wants = bool(out.gate[0, -1] > 0)
            thought = int(model.thoughts.likeliest(out.thoughts[0, -1]))
            if run == 0 and thinking.after is not None and not thinking.after[real[t]]:
                wants, told = False, UNFORCED
            elif forced is not None and run < thinking.max_run:
                told = int(forced[t, run])
                wants, thought = (wants, thought) if told == UNFORCED else (told >= 0, max(told, 0))
            if run == thinking.max_run or not wants:
                break
            stream.append(V + thought)
            run += 1
        force = thinking.force_recall
        if bool(out.recall[0, -1] > 0) if force is None else force:
            stream.append(RECALL)
    return stream


AFTER = torch.tensor([True, False, True, False, True])
WAYS = {  # of thinking, and what the model is like
    "one": ({}, {}),
    "runs": ({"max_run": 3}, {}),
    "window": ({"max_run": 3, "window": 4}, {}),
    "window of one": ({"max_run": 2, "window": 1}, {}),
    "think_after": ({"max_run": 3, "after": AFTER}, {}),
    "forced runs": ({"max_run": 3, "force": 1.0}, {}),
    "forced silence": ({"max_run": 3, "force": 0.0}, {}),
    "forced, after": ({"max_run": 2, "force": 1.0, "after": AFTER, "window": 3}, {}),
    "recall": ({"max_run": 3, "window": 3}, {"recall": True}),
    "forced recall": ({"force_recall": 1.0}, {"recall": True}),
    "price": ({"max_run": 3, "price": 0.3}, {"observer": "0,1"}),
    "learned positions": ({"max_run": 2, "window": 5}, {"n_positions": 60, "recall": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_rollout_is_what_one_gets_cell_by_cell_with_the_whole_stream_each_time(tiny, way):
    changes, sizes = WAYS[way]
    thinking, runs, recalls = Thinking(greedy=True, **changes), set(), set()
    for seed in range(3):
        model = tiny(seed, **sizes).double()
        real = torch.randint(V, (5, 9), generator=seeded(seed))
        length = torch.tensor([9, 2, 7, 3, 9])
        grid, _ = rollout(model, real, length, thinking)
        twin = [step_by_step(model, r[:n], thinking) for r, n in zip(real, length)]
        assert streams_of(grid) == twin
        runs |= set(grid.thinks.sum(dim=2)[grid.present[:, :, 0]].tolist())
        recalls |= set(grid.recalls[grid.present].tolist())
    possible = {"forced runs": {3}, "forced silence": {0}}
    assert possible.get(way, {0, thinking.max_run}) <= runs, "all kinds of runs were among them"
    assert (True in recalls) == model.config.recall


def test_forced_thoughts_are_thought_and_the_gate_says_the_rest(tiny):
    model, thinking = tiny().double(), Thinking(greedy=True, max_run=2)
    real, length = torch.randint(V, (4, 8), generator=seeded(0)), torch.tensor([8, 5, 8, 8])
    forced = torch.randint(UNFORCED, K, (4, 8, 2), generator=seeded(1))
    forced[:, 0], forced[:, 1] = torch.tensor([3, 1]), torch.tensor([2, -1])
    grid, _ = rollout(model, real, length, thinking, forced=forced)
    twin = [step_by_step(model, r[:n], thinking, f) for r, n, f in zip(real, length, forced)]
    assert streams_of(grid) == twin
    assert all(stream[1:3] == [V + 3, V + 1] and stream[4] == V + 2 for stream in twin)
    silent, _ = rollout(model, real, length, thinking, forced=torch.full_like(forced, -1))
    free, _ = rollout(model, real, length, thinking)
    assert free.thinks.any() and not silent.thinks.any()


def test_a_plain_model_and_one_that_must_not_think_hold_real_tokens_only(tiny):
    real, length = torch.randint(V, (3, 6), generator=seeded(0)), torch.tensor([6, 2, 4])
    for model, thinking in ((tiny(n_bits=0), Thinking()), (tiny(), Thinking("never", force=1.0))):
        grid, _ = rollout(model, real, length, thinking)
        assert streams_of(grid) == [r[: n - 1].tolist() for r, n in zip(real, length)]


def test_ablations_take_away_what_thoughts_say_but_not_when_they_are_thought(tiny):
    model, real = tiny(3), torch.randint(V, (40, 6), generator=seeded(0))
    length, drawn = torch.full((40,), 6), []
    for mode in ("policy", "swapped", "constant", "random"):
        thinking = Thinking(mode, force=1.0, greedy=True, constant=2)
        grid, out = rollout(model, real, length, thinking, seeded(1))
        assert grid.thinks[:, :5, 0].all()
        thought = grid.token[:, :5, 1] - V
        own = model.thoughts.likeliest(out.thoughts)[:, :5, 0]
        if mode == "policy":
            assert torch.equal(thought, own)
        if mode == "swapped":
            assert torch.equal(thought, own.roll(1, dims=0)) and not torch.equal(thought, own)
        if mode == "constant":
            assert (thought == 2).all()
        drawn.append(thought.flatten().bincount(minlength=K) / 200)
    assert (drawn[-1] - 1 / K).abs().max() < 0.1, "at random: all alike"


def test_a_forced_run_is_whole_or_not_at_all(tiny):
    real, length = torch.randint(V, (50, 9), generator=seeded(0)), torch.full((50,), 9)
    grid, _ = rollout(tiny(), real, length, Thinking(max_run=3, force=0.5), seeded(0))
    runs = grid.thinks.sum(dim=2)[:, :8]
    assert set(runs.unique().tolist()) == {0, 3} and 0.4 < (runs == 3).float().mean() < 0.6


# ----------------------------------------------------------------------------------------------
# what it puts out


def agrees(model, grid, b, found, slow):
    """What a rollout says about sequence b is what the sequence says alone."""
    for (t, slot), (logits, *rest) in slow.items():
        wrong = slot == grid.token.size(2) - 1
        target = V if wrong else int(grid.token[b, t + 1, 0])
        right = int(logits.argmax()) == target
        wanted = [-logits.log_softmax(dim=0)[target], torch.tensor(right), *rest[:-1]]
        for part, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(part[b, t, slot], value)


REAL, LENGTH = torch.randint(V, (6, 9), generator=seeded(0)), torch.tensor([9, 2, 7, 3, 9, 4])


def mixed(model, window=0, real=REAL, **how):
    """A rollout of sequences of all lengths, with wrong tokens where the model has REVISE."""
    if model.config.revise:
        tried = torch.rand(6, 9, generator=seeded(0)) < 0.8
        tried &= torch.arange(9) + 1 < LENGTH[:, None]
        how["wrong"] = torch.where(tried, (REAL + 1) % V, -1)
    return rollout(model, real, LENGTH, Thinking(max_run=2, window=window), seeded(0), **how)


MODELS = {
    "plain": {"n_bits": 0},
    "bare": {},
    "observer": {"observer": "0,1"},
    "recall": {"recall": True},
    "revise": {"revise": True},
    "plain with both": {"n_bits": 0, "recall": True, "revise": True},
    "all": {"recall": True, "revise": True, "observer": "1", "n_positions": 60},
}


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("sizes", MODELS)
def test_a_rollout_puts_out_what_each_sequence_does_alone_without_a_cache(tiny, sizes, window):
    model = tiny(1, **MODELS[sizes]).double()
    grid, found = mixed(model, window)
    for b in range(6):
        agrees(model, grid, b, found, alone(model, grid, b, window))


@pytest.mark.parametrize("chunk", [3, 5])
def test_how_many_cells_go_together_makes_no_difference(tiny, monkeypatch, chunk):
    for sizes in MODELS.values():
        model = tiny(1, **sizes).double()
        grid, found = mixed(model, 4)
        monkeypatch.setattr(train, "CHUNK", chunk)
        other, again = mixed(model, 4)
        assert torch.equal(grid.present, other.present)
        for a, b in zip(found, again):
            torch.testing.assert_close(a[grid.present], b[grid.present])
        monkeypatch.undo()


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("sizes", MODELS)
def test_cells_see_their_own_segment_only_and_recall_sees_everything(tiny, sizes, window):
    model = tiny(1, **MODELS[sizes]).double()
    cuts = torch.rand(6, 9, generator=seeded(2)) < 0.5
    grid, found = mixed(model, window, cuts=cuts)
    segment = segments(grid, cuts)
    assert bool(segment.any()) == (model.config.n_bits > 0)
    for b in range(6):
        agrees(model, grid, b, found, alone(model, grid, b, window, segment))


def test_a_rollout_whose_thoughts_are_forced_puts_out_the_same(tiny):
    for sizes in MODELS.values():
        model = tiny(2, **sizes).double()
        grid, found = mixed(model, 4)
        for a, b in zip(found, replay(model, grid, 4)):
            torch.testing.assert_close(a[grid.present], b[grid.present])


def test_what_stands_behind_a_sequences_end_changes_nothing(tiny):
    model = tiny(recall=True, revise=True)
    there = torch.arange(9) < LENGTH[:, None]
    (grid, found), (other, again) = mixed(model, 3), mixed(model, 3, torch.where(there, REAL, 2))
    assert torch.equal(grid.present, other.present)
    for a, b in zip(found, again):
        assert torch.equal(a[grid.present], b[grid.present])


def test_under_dropout_the_loss_sees_the_policy_that_acted(tiny, monkeypatch):
    """One pass decides and is differentiated: the logits are the same, dropout and all."""
    model, asked = tiny(dropout=0.5).train(), []

    def decide_and_note(out, *how):
        asked.append(out.gate[:, -1])
        return wants_to_think(out, *how)

    monkeypatch.setattr(train, "wants_to_think", decide_and_note)
    grid, out = rollout(model, REAL, LENGTH, Thinking(max_run=2))
    columns = grid.asked.flatten(1).any(dim=0)
    decided, seen = torch.stack(asked, dim=1), out.gate.flatten(1)[:, columns]
    where = grid.asked.flatten(1)[:, columns]
    assert where.sum() > 40 and torch.equal(decided[where], seen[where])
    again = rollout(model, REAL, LENGTH, Thinking(max_run=2))[1].gate
    assert not torch.equal(again, out.gate), "dropout is on"
