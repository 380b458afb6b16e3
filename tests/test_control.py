"""RECALL and REVISE from the rollout to the loss, what nobody may ever see, and lab/control.py."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import RECALL, K, V, batch_of, call, grid_of, replay, seeded, small, streams_of

import runs
import train
from data.dataset import Batch
from lab import control
from model import Thinking, generate
from train import (
    UNFORCED,
    answers_right,
    counted_tokens,
    rollout,
    wrong_tokens,
)

# ----------------------------------------------------------------------------------------------
# who sees RECALL and wrong tokens, and what they see


def moved(model, grid, **how):
    """[[token, slot], ...]: cells whose output changes when the first token is another one."""
    other = grid._replace(token=grid.token.clone())
    other.token[0, 0, 0] += 1
    before, after = (replay(model, g, **how).thoughts[0] for g in (grid, other))
    return ((before != after).any(dim=-1) & grid.present[0]).nonzero().tolist()


@pytest.mark.parametrize("layers", [1, 2])
def test_recall_sees_past_a_window_and_past_a_cut_where_others_do_not(tiny, layers):
    model = tiny(recall=True, n_layer=layers)
    grid = grid_of([[0, 1, 5, 2, 6, 3, RECALL, 1, RECALL, 4]])
    cuts = torch.arange(grid.token.size(1))[None] == 1  # the thought behind 1 is the first behind
    recalls = [[3, 3], [4, 3]]  # token, slot
    cut = moved(model, grid, cuts=cuts)
    assert cut == [[0, 0], [1, 0], *recalls]
    reach = 1 + layers  # in a window of two positions each layer sees one cell further back
    window = moved(model, grid, window=2)
    assert window == [[0, 0], [1, 0], [1, 1]][:reach] + recalls


def test_nobody_sees_a_recall_or_a_wrong_token(tiny):
    model = tiny(recall=True, revise=True)
    bare, recalled = grid_of([[0, 5, 1, 2, 6, 3]]), grid_of([[0, 5, RECALL, 1, RECALL, 2, 6, 3]])
    wrong = wrong_tokens(batch_of(recalled, 1), 1.0, V)
    assert (wrong >= 0).tolist() == [[True, True, True, False]]
    alone, there = model(bare.token[bare.present][None], window=3), bare.present
    a, b = replay(model, recalled, 3), replay(model, recalled, 3, wrong=wrong)
    for found in (a, b):
        torch.testing.assert_close(found.gate[there], alone.gate[0])
    torch.testing.assert_close(a.loss[recalled.present], b.loss[recalled.present])


def test_a_wrong_token_regrets_what_it_would_if_it_had_been_emitted(tiny):
    """And with it a model takes back in `generate` what it regrets in the pass."""
    model = tiny(n_bits=0, revise=True).double()
    real = torch.tensor([[1, 2, 3, 4, 0]])
    batch = Batch.plain(real, torch.tensor([5]), torch.tensor([1]), torch.tensor([1]))
    wrong = torch.tensor([[-1, 0, 1, 2, 1]])
    wrong_next = wrong_tokens(batch._replace(wrong=wrong), 0.0, V)
    for window in (0, 2):
        thinking = Thinking(window=window)
        _, out = rollout(model, real, batch.length, thinking, wrong=wrong_next)
        regret = out.loss[0, :, -1]
        for t in range(4):
            emitted = torch.cat([real[:, : t + 1], wrong[:, t + 1 : t + 2]], dim=1)
            logits = model(emitted, window=window).logits[0, -1]
            torch.testing.assert_close(regret[t], -logits.log_softmax(dim=0)[V])


# ----------------------------------------------------------------------------------------------
# rollout, pass and generate agree


@pytest.mark.parametrize("seed", range(6))
def test_a_cell_that_emits_recalls_where_its_gate_says_so(tiny, seed):
    model = tiny(seed, recall=True, revise=seed % 2 > 0, n_bits=seed % 3).double()
    real = torch.randint(V, (6, 9), generator=seeded(seed))
    length = torch.tensor([9, 2, 7, 3, 9, 4])
    thinking = Thinking(max_run=2, greedy=True, window=(0, 3)[seed % 2])
    grid, out = rollout(model, real, length, thinking)
    asked = grid.present & ~grid.thinks
    asked[:, :, -2:] = False
    assert 0 < grid.recalls.sum() < asked.sum()
    assert torch.equal(grid.recalls[asked], (out.recall > 0)[asked])


def heard(model, prompt, new_tokens, thinking, **how):
    """-> tokens; [(what, id), ...]"""
    happened = []
    how |= {"watch": lambda *event: happened.append(event)}
    return generate(model, prompt, new_tokens, thinking, **how), happened


@pytest.mark.parametrize("seed", range(8))
def test_generate_does_what_a_rollout_over_its_own_answer_does(tiny, seed):
    model = tiny(seed, recall=True).double()
    thinking = Thinking(max_run=2, greedy=True, window=(0, 4)[seed % 2])
    tokens, happened = heard(model, [1, 3], 7, thinking)
    real, length, prompt = torch.tensor([tokens]), torch.tensor([9]), torch.tensor([2])
    grid, out = rollout(model, real, length, thinking)
    assert streams_of(grid)[0] == [token for _, token in happened[:-1]]
    counted = counted_tokens(Batch.plain(real, length, prompt, length))
    assert answers_right(out, grid, counted).all()


def random_case(tiny, case):
    draw = seeded(case)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=draw))]

    control_tokens = {"recall": pick(True, False), "revise": pick(True, True, False)}
    model = tiny(case, n_bits=pick(0, 2), n_layer=pick(1, 2), **control_tokens)
    with torch.no_grad():
        model.head.bias[V:] += pick(0.0, 2.0, 5.0)
    thinking = Thinking(
        max_run=pick(1, 2, 4),
        window=pick(0, 1, 4),
        greedy=pick(True, False),
        force=pick(None, None, 0.5),
        force_recall=pick(None, None, 1.0),
    )
    prompt = torch.randint(V, (pick(1, 2, 6),), generator=draw).tolist()
    how = {"temperature": pick(0.0, 1.0), "top_k": pick(0, 2), "revisions": pick(0, 1, 3)}
    return model, prompt, pick(1, 4, 7), thinking, how | {"generator": draw}


def test_nothing_hidden_ever_shows_and_every_limit_holds(tiny):
    seen = Counter()
    for case in range(150):
        model, prompt, new, thinking, how = random_case(tiny, case)
        tokens, happened = heard(model, prompt, new, thinking, **how)
        assert len(tokens) == len(prompt) + new and tokens[: len(prompt)] == prompt
        assert all(0 <= token < V for token in tokens)
        named = {"token": range(V), "think": range(V, V + K), "revise": range(V)}
        named["recall"] = [V + model.config.n_think]
        assert all(token in named[what] for what, token in happened)
        counts = Counter(what for what, _ in happened)
        assert counts["revise"] <= how["revisions"], "no more is taken back than is allowed"
        order = " ".join(what for what, _ in happened) + " "
        assert "think " * (thinking.max_run + 1) not in order
        assert order.count("recall") == order.count("recall token"), "what it saw is said at once"
        seen += counts
    assert min(seen[what] for what in ("think", "recall", "revise")) > 40


# ----------------------------------------------------------------------------------------------
# lab/control.py


def one_level(batch):
    return SimpleNamespace(levels=[1], first=lambda *_: batch)


@pytest.fixture
def batch():
    """Prompts of three tokens, answers of two."""
    real = torch.randint(V, (30, 5), generator=seeded(0))
    length = torch.full((30,), 5)
    return Batch.plain(real, length, torch.full((30,), 3), torch.ones(30, dtype=torch.long))


def test_recall_always_never_by_its_gate_and_at_random(tiny, batch):
    model, thinking = tiny(recall=True), Thinking(greedy=True, window=2)
    free, paid = (control.recall(model, one_level(batch), thinking, p, 30) for p in (0.0, 0.5))
    places = {how: (line["at the question"], line["elsewhere"]) for how, line in free.items()}
    assert places["never"] == (0, 0) and places["always"] == (1, 1)
    for how, line in free.items():
        there, elsewhere = places[how]
        price = 0.5 * (there + 3 * elsewhere)  # four tokens of each sequence are emitted
        assert paid[how]["cost"] == pytest.approx(line["cost"] + price)
        force = {"never": 0.0, "always": 1.0, "gate": None}.get(how)
        again = Thinking(greedy=True, window=2, force_recall=force)
        if how != "at random":
            _, right, loss = train.evaluate(model, batch, again)
            assert line["right"] == pytest.approx(right.double().mean().item())
            assert line["cost"] == pytest.approx(loss[:, 2:].sum().item() / 30, rel=1e-5)
    often = {how: places[how][0] + 3 * places[how][1] for how in ("gate", "at random")}
    assert often["at random"] == pytest.approx(often["gate"], abs=0.5) and often["gate"] > 0


def test_what_is_taken_back_in_prefixes_is_what_generate_would_take_back(tiny, batch):
    model, regrets = tiny(n_bits=0, revise=True), []
    model.head.bias.data[V] += 4
    for row in batch.real:
        prefix = torch.cat([row[:3], (row[3:4] + 1) % V])
        regrets.append(model(prefix[None]).logits[0, -1].softmax(dim=0)[V] > 0.5)
    tried = torch.full_like(batch.real, -1)
    tried[:, 3:] = (batch.real[:, 3:] + 1) % V  # the last of these does not count
    share = control.taken_back(model, batch, Thinking(), tried)
    assert 0 < share < 1 and share == pytest.approx(sum(map(float, regrets)) / 30)


def test_answers_with_and_without_revisions_by_hand(tiny, batch, monkeypatch):
    """A model that takes back a wrong token, and the right one that follows, twice."""

    def speak(model, prompt, new_tokens, thinking, generator, temperature, revisions, watch):
        row = next(r for r in batch.real.tolist() if r[:3] == prompt)
        wrong = (row[3] + 1) % V
        events = [("token", token) for token in prompt] + [("token", wrong)]
        if revisions:
            again = [("token", row[3]), ("revise", row[3])]
            events += [("revise", wrong), *again, *again, ("token", row[3])]
        for event in [*events, ("token", row[4])]:
            watch(*event)

    monkeypatch.setattr(control, "generate", speak)
    rows = batch.real.unique(dim=0)[:1].expand(30, 5)
    batch = batch._replace(real=rows)
    found = control.revise(tiny(n_bits=0, revise=True), batch, Thinking(), 40, 8)
    assert found["answers right, REVISE forbidden"] == 0
    assert found["answers right, REVISE allowed"] == 1
    assert found["wrong tokens of its own taken back"] == 1
    assert found["right tokens of its own taken back"] == 2 / 4


def test_a_sequence_thinks_as_before_but_anothers_thought_at_one_place(tiny, batch, monkeypatch):
    model, thinking, asked = tiny(2), Thinking(greedy=True, max_run=2), []
    grid, _, loss = train.evaluate(model, batch, thinking)

    def walk(model, real, length, thinking, forced):
        asked.append((real, forced))
        return rollout(model, real, length, thinking, forced=forced)

    right = torch.arange(30) % 3 > 0
    monkeypatch.setattr(train, "evaluate", lambda *_: (grid, right, loss))
    monkeypatch.setattr(train, "rollout", walk)
    found = control.follow(model, one_level(batch), thinking, 30)[1]
    (other, forced), (own, same_forced) = asked
    assert torch.equal(own, batch.real) and torch.equal(forced, same_forced)
    thoughts = torch.where(grid.present, grid.token - V, -1)[:, :, 1:-2]
    able = right & (thoughts[:, 1, 0] >= 0)
    assert 1 < found["rows"] == able.sum()
    for b in able.nonzero()[:, 0]:
        assert torch.equal(forced[b, 0], thoughts[b, 0]) and (forced[b, 2:] == UNFORCED).all()
        donors = [d for d in range(30) if able[d] and torch.equal(batch.real[d, 3:], other[b, 3:])]
        assert torch.equal(other[b, :3], own[b, :3]) and not torch.equal(other[b, 3:], own[b, 3:])
        assert any(torch.equal(forced[b, 1], thoughts[d, 1]) for d in donors)


def test_demonstrated_thoughts_are_followed_where_they_are_its_own(tiny, batch):
    model, thinking = tiny(2), Thinking(greedy=True, max_run=2)
    grid, _ = rollout(model, batch.real, batch.length, thinking)
    told = torch.where(grid.present, grid.token - V, -1)[:, :, 1:-2]
    shown = torch.arange(30) < 20
    batch = batch._replace(thoughts=told, shown=shown)
    split = one_level(batch)
    assert control.shown(model, split, thinking, 30) == {1: {"thoughts": 1.0, "sequences": 1.0}}
    place = (told[:20] >= 0).nonzero()[0]
    told[tuple(place)] ^= 1
    found = control.shown(model, split, thinking, 30)[1]
    assert found["thoughts"] == pytest.approx(1 - 1 / int((told[:20] >= 0).sum()))
    assert found["sequences"] == pytest.approx(19 / 20)


def test_a_run_with_everything_is_measured_from_the_command_line(chains, tmp_path):
    tokens = {"recall": True, "revise": 0.2, "window": 4}
    trainer = train.Trainer(small(chains, tmp_path, steps=3, **tokens))
    trainer.train_step()
    runs.save_checkpoint(tmp_path / "checkpoint.pt", trainer.state())
    done = call("lab/control.py", f"--run={tmp_path}", "--rows=20", "--drawn=4")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "control.json").read_text())
    assert {"recall", "revise", "follow"} <= set(found)
