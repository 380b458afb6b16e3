"""The fast ways give what the slow ones give: rollouts by words and in parallel, packed passes, and the choice between them. Nothing here is timed."""

import json

import pytest
import torch
from test_train import same, small

import bench
from data.dataset import Batch, DataError
from fast import Packing, parallel_rollout, read_packed, rollout_by_words
from loss import draw_cuts, hybrid_loss, word_loss
from runs import Config
from stream import Thinking, read, rollout
from train import Trainer, rolls_in_parallel


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(40))
def test_the_parallel_rollout_is_the_sequential_one(tiny, seed):
    """
    480 cases, none alike: models, gates, noise, lengths, thoughts in a row, holds, ablations. In double precision: there a tie that rounding
    could decide has never been seen; in single precision about one choice in a million is one.
    """
    draw = seeded(seed)
    pick = lambda options: options[int(torch.randint(len(options), (1,), generator=draw))]  # noqa: E731
    model = tiny(seed, observer=pick(["", "quarters"]), n_layer=pick([1, 2])).double()
    with torch.no_grad():
        model.gate.bias += pick([-2.0, 0.0, 2.0])
    for case in range(12):
        B, T = pick([1, 2, 7]), pick([1, 2, 9, 14])
        real, length = torch.randint(5, (B, T), generator=draw), torch.randint(1, T + 1, (B,), generator=draw)
        thinking = Thinking(
            mode=pick(["policy", "policy", "policy", "swapped", "random", "constant", "never"]),
            hold=pick([None, None, 0.0, 0.4, 1.0]),
            explore=pick([0.0, 0.1]),
            greedy=pick([False, False, True]),
            max_run=pick([1, 2, 3]),
            after=pick([None, torch.rand(5, generator=draw) < 0.6]),
        )
        slow = rollout(model, real, length, thinking, seeded(case))
        fast, passes = parallel_rollout(model, real, length, thinking, seeded(case))
        for name, a, b in zip(slow._fields, slow[:-1], fast):
            assert torch.equal(a, b), f"{name} differs in case {case}: {thinking}"
        assert passes <= slow.stream.size(1) + 1


@pytest.mark.parametrize("seed", range(20))
def test_the_rollout_by_words_is_the_one_by_columns(tiny, seed):
    """240 cases as above, some through a window, some with learned positions."""
    draw = seeded(100 + seed)
    pick = lambda options: options[int(torch.randint(len(options), (1,), generator=draw))]  # noqa: E731
    model = tiny(seed, observer=pick(["", "quarters"]), n_layer=pick([1, 2]), n_positions=pick([0, 60]), done=pick([False, True])).double()
    for case in range(12):
        B, T, runs = pick([1, 2, 7]), pick([1, 2, 9, 14]), pick([1, 1, 2, 3])
        real, length = torch.randint(5, (B, T), generator=draw), torch.randint(1, T + 1, (B,), generator=draw)
        thinking = Thinking(
            mode=pick(["policy", "policy", "policy", "random", "constant", "never"]),
            hold=pick([None, None, 0.0, 0.4, 1.0]),
            explore=pick([0.0, 0.1]),
            greedy=pick([False, False, True]),
            max_run=runs,
            after=pick([None, torch.rand(5, generator=draw) < 0.6]),
            window=pick([0, 0, 1, 2, 5]),
        )
        slow = rollout(model, real, length, thinking, seeded(case))
        fast, passes = rollout_by_words(model, real, length, thinking, seeded(case))
        for name, a, b in zip(slow._fields, slow[:-1], fast):
            assert torch.equal(a, b), f"{name} differs in case {case}: {thinking}"
        assert slow.window == fast.window and passes <= runs * (int(length.max()) - 1)


def test_it_settles_in_two_passes_if_thoughts_hang_on_nothing_and_one_by_one_if_each_hangs_on_the_last(tiny):
    real, length = torch.randint(5, (4, 20), generator=seeded(0)), torch.full((4,), 20)
    model = tiny()
    with torch.no_grad():
        model.thoughts.head.weight.zero_()  # thoughts that are noise, and a gate that reads nothing
        model.gate.weight.zero_()
    assert parallel_rollout(model, real, length, Thinking(max_run=2), seeded(0))[1] <= 3
    assert parallel_rollout(model, real, length, Thinking("constant", hold=1.0), seeded(0))[1] == 1, "known beforehand, and seen to be right"


def test_what_a_parallel_rollout_cannot_do_is_refused(tiny, chains, tmp_path):
    real, length = torch.zeros(1, 4, dtype=torch.long), torch.tensor([4])
    with pytest.raises(ValueError, match="in view"):
        parallel_rollout(tiny(), real, length, Thinking(window=3))
    with pytest.raises(ValueError, match="dropout"):
        parallel_rollout(tiny(dropout=0.1).train(), real, length, Thinking())
    with pytest.raises(DataError, match="dropout"):
        Trainer(small(chains, tmp_path, rollout="parallel", dropout=0.1))
    with pytest.raises(DataError, match="'guessed'"):
        Trainer(small(chains, tmp_path, rollout="guessed"))


@pytest.mark.parametrize("changes", [{"max_run": 2}, {"thought_grad": "reinforce"}, {"n_bits": 0}])
def test_training_is_the_same_whichever_way_the_streams_are_found(chains, tmp_path, changes):
    """Bit for bit: both find the same streams, and draw the same noise."""
    states = []
    for way in ("sequential", "parallel"):
        trainer = Trainer(small(chains, tmp_path, rollout=way, curriculum=False, free=0.4, **changes))
        logs = [trainer.train_step() for _ in range(12)]
        states.append(trainer.state() | {"config": None})
    assert trainer.paid or not trainer.config.n_think
    assert same(*states)
    assert all(0 <= log["passes_per_column"] <= 1.1 for log in logs)


def test_auto_is_parallel_on_an_accelerator_and_for_few_words(chains, tmp_path):
    config = small(chains, tmp_path)
    parallel = lambda device, rows, words: rolls_in_parallel(config, device, rows, words)  # noqa: E731
    assert parallel("cuda", 512, 64) and parallel("cpu", 12, 64) and not parallel("cpu", 128, 9) and not parallel("cpu", 4, 512)
    config.dropout = 0.1
    assert not parallel("cuda", 512, 64)
    config.rollout, config.dropout = "sequential", 0.0
    assert not parallel("cuda", 512, 64)


@pytest.mark.parametrize("seed", range(24))
def test_what_is_packed_says_what_it_says_in_its_stream(tiny, seed):
    """The slow twin computes every column of every row, those behind its end and before its cut, too. Values, and gradients of what is said behind the cuts."""
    draw = seeded(seed)
    model = tiny(seed, observer=("", "quarters")[seed % 2], recall=seed % 3 == 0, n_positions=(0, 60)[seed % 4 == 1]).double()
    real, length = torch.randint(5, (7, 12), generator=draw), torch.tensor([12, 2, 7, 3, 1, 12, 5])
    thinking = Thinking(max_run=2, window=(0, 4)[seed % 2], hold=(None, 0.6)[seed // 12])
    roll = rollout(model, real, length, thinking, draw)
    is_text = seed % 4 == 3  # several cuts a row
    cuts = draw_cuts(roll, length if is_text else length - 1, 0.8, 0.5, draw)
    cut, short = cuts.first, roll.without_thoughts(cuts.hidden)
    behind = short.valid & ((cut.cumsum(dim=1) > 0) | ~cut.any(dim=1, keepdim=True))
    x = model.embed(roll.stream).detach().requires_grad_()
    known, twin = read(model, roll, x=x), read(model, short, cut, x)
    packed = read_packed(model, short, cut, x, known)
    where = short.valid if model.config.recall else behind
    for part, slow, before in zip(packed, twin, known):
        torch.testing.assert_close(part[short.valid], slow[short.valid])
        left_out = part[short.valid & ~where], before[short.valid & ~where]
        assert torch.equal(*left_out), "before the cut nothing is computed"
    said = lambda out: word_loss(out.words, short)[behind].sum()  # noqa: E731
    of_x = [torch.autograd.grad(said(out), x, retain_graph=True)[0] for out in (packed, twin)]
    torch.testing.assert_close(*of_x)


def test_some_passes_are_packed_and_some_hide_thoughts(tiny):
    """So that the test above compares what it says it does."""
    model, packs, hides, widths = tiny(), 0, 0, []
    model.norm.register_forward_pre_hook(lambda _, x: widths.append(x[0].size(1)))
    real = torch.randint(5, (7, 12), generator=seeded(0))
    length = torch.tensor([12, 2, 7, 3, 1, 12, 5])
    for seed in range(12):
        roll = rollout(model, real, length, Thinking(max_run=2, hold=0.6), seeded(seed))
        cuts = draw_cuts(roll, length - 1, 0.8, 0.5, seeded(seed))
        short = roll.without_thoughts(cuts.hidden)
        read_packed(model, short, cuts.first, None, read(model, roll))
        packs += widths[-1] < widths[-2]
        hides += bool((cuts.hidden & roll.valid).any())
    assert packs >= 8 and hides >= 8, (packs, hides)


@pytest.mark.parametrize("paid", [False, True])
def test_the_loss_and_its_gradients_are_those_of_passes_that_leave_nothing_out(tiny, monkeypatch, paid):
    """But for the echo from a prompt's own words before its cut, which here weigh nothing."""
    real, length = torch.randint(5, (8, 9), generator=seeded(0)).repeat_interleave(4, 0), torch.tensor([9, 3, 5, 9, 2, 4, 9, 7]).repeat_interleave(4)
    batch, found = Batch.plain(real, length, length - 1, torch.ones_like(length)), []
    config = Config(n_bits=2, observer="quarters", prompt_weight=0.0, forget_paid=0.5)
    for way in (read_packed, lambda model, roll, cut=None, x=None, known=None: read(model, roll, cut, x)):
        monkeypatch.setattr("loss.read_packed", way)
        model = tiny(4, observer="quarters").double().train()
        loss, log = hybrid_loss(model, rollout(model, real, length, Thinking(), seeded(0)), batch, config, paid, seeded(0))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()], log["loss_forgotten"]))
    torch.testing.assert_close(*found)


def test_packing_wastes_little_and_loses_nothing():
    used = torch.arange(8) < torch.tensor([8, 1, 7, 2, 5, 3, 0])[:, None]
    packing = Packing(used)
    assert (packing.rows, packing.width) == (4, 8), "8; 7 and 1; 5, 2; 3: the shortest beside the longest"
    x = torch.arange(56).view(7, 8)
    assert torch.equal(packing.unpack(packing.pack(x), -1), torch.where(used, x, -1))


@pytest.mark.parametrize("thought_grad", ["echo", "reinforce"])
@pytest.mark.parametrize("paid", [False, True])
def test_with_nothing_forgotten_the_second_pass_is_saved_and_every_gradient_is_the_same(tiny, paid, thought_grad):
    """The slow twin forgets with a probability that is never met, and runs its second pass."""
    real = torch.randint(5, (8, 9), generator=seeded(0)).repeat_interleave(4, 0)
    length = torch.full((32,), 9)
    found = []
    for forget in (0.0, 1e-30):
        model = tiny(4, observer="quarters").double().train()
        roll = rollout(model, real, length, Thinking(), seeded(0))
        batch = Batch.plain(real, length, length // 2, torch.ones_like(length))
        share = {"forget": forget, "forget_paid": forget}
        config = Config(n_bits=2, thought_grad=thought_grad, observer="quarters", **share)
        passes = []
        model.norm.register_forward_hook(lambda *_: passes.append(1))
        loss, log = hybrid_loss(model, roll, batch, config, paid, seeded(0))
        loss.backward()
        assert len(passes) == (1 if forget == 0 else 2)
        found.append((loss.detach(), [p.grad for p in model.parameters()], log["loss_forgotten"]))
    torch.testing.assert_close(*found)


# ----------------------------------------------------------------------------------------------
# the bench


def test_the_bench_prints_its_tables_and_one_line_of_json(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda c, device, kind: 1000 * c.length)  # each a process of its own, else
    shape = "--n_layer=1 --n_head=2 --n_embd=16 --words=5 --bits=2 --length=16 --lengths=8,16"
    bench.main(f"{shape} --repeats=2 --device=cpu".split())
    printed = capsys.readouterr().out
    for title in ("Training steps on the same real tokens", "Power of the stream's length", "Parts of a step", "Peers"):
        assert title in printed
    found = json.loads(printed.splitlines()[-1])
    assert [row["columns"] for row in found["growth"]] == [8, 16, 16, 16, 16, 16]
    assert found["exponents"][0]["plain step, MB"] == 1.0
    for row in found["parts"]:
        together = sum(row[f"{part}, ms"][1] for part in ("rollout", "passes", "losses", "optimiser"))
        assert row["together, ms"][1] == pytest.approx(together, rel=0.01), "the parts add up"


def test_a_power_law_is_found():
    assert bench.exponent([64, 128, 256], [3.0, 12.0, 48.0]) == 2.0
    assert bench.cell(bench.spread([0.003, 0.001, 0.002], 1e3)) == "2.00 (1.00-3.00)"


def test_the_peer_without_a_cache_walks_the_same_columns(tiny):
    """It differs from our rollout in nothing but the cache: the same thoughts without noise."""
    model, columns = tiny(2), 13
    real, length = torch.randint(5, (3, 7), generator=seeded(0)), torch.full((3,), 7)
    thinking = Thinking(hold=1.0, greedy=True)
    roll = rollout(model, real, length, thinking)
    model.thoughts.noise = lambda *shape, generator=None: 0.0
    stream = bench.without_cache(model, real, columns, None)
    assert torch.equal(stream[:, :12], roll.stream) and torch.equal(stream[:, 12], real[:, 6])
