"""The hybrid loss: its terms by hand, gradients by enumeration and finite difference, the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import D_BITS, RECALL, V, alone, batch_of, grid_of, replay, seeded, segments

import train
from data.dataset import Batch
from model import Cells, Thinking, Thoughts
from train import (
    JUMP,
    NO_THOUGHT,
    NO_TRY,
    RECALL_SLOT,
    THINK,
    UNFORCED,
    Config,
    GridOutput,
    answers_right,
    counted_tokens,
    demonstration_loss,
    draw_plan,
    draw_tries,
    gain,
    gate_loss,
    hybrid_loss,
    observer_loss,
    return_to_go,
    rollout,
    token_loss,
    wrong_tokens,
)


def on(grid, *rows):
    """Numbers for the cells of each stream, in reading order -> (B, T, S), 99 elsewhere."""
    values = torch.full(grid.present.shape, 99.0)
    for b, row in enumerate(rows):
        values[b, grid.present[b]] = torch.tensor(row, dtype=values.dtype)
    return values


def off(grid, values):
    """The other way round, for the cells that are present -> a list a stream."""
    return [v[there].tolist() for v, there in zip(values.expand(grid.present.shape), grid.present)]


ALL = torch.ones(1, 1, 1, dtype=torch.bool)

# ----------------------------------------------------------------------------------------------
# forgetting


NONE = torch.zeros(4000, dtype=torch.bool)  # no sequence teaches the gate
FORCED = Thinking(force=1.0)


def near(shares, wanted):
    torch.testing.assert_close(shares, torch.tensor(wanted), atol=0.03, rtol=0)


def many(prompt, **changes):
    """4,000 times the same sequence, of 8 tokens."""
    return batch_of(grid_of([[0, 1, 2, 3, 4, 0, 1, 2]] * 4000), prompt)._replace(**changes)


def planned(*what):
    plan = draw_plan(*what)
    return plan["forced"][:, :, 0], plan["cuts"], plan["jumps"]


def test_a_share_is_cut_at_one_token_of_the_prompt_but_its_last_and_the_others_jump_there():
    torch.manual_seed(0)
    forced, cuts, jumps = planned(many(6), FORCED, 0.8, NONE)
    assert (forced == THINK).all()
    assert ((cuts | (jumps > 0)).sum(dim=1) <= 1).all()
    near(cuts.float().mean(dim=0), [0.16] * 5 + [0.0] * 3)
    near((jumps > 0).float().mean(dim=0), [0.04] * 5 + [0.0] * 3)
    assert jumps.max() == JUMP and 25 < jumps[jumps > 0].float().mean() < 40
    assert not any(x.any() for x in planned(many(6), FORCED, 0.0, NONE)[1:]), "neither, if none is"
    assert not planned(many(6), FORCED, 1.0, NONE)[2].any()
    for thinking in (FORCED, Thinking()):
        _, *nowhere = planned(many(1), thinking, 0.5, ~NONE)
        assert not nowhere[0].any() and not nowhere[1].any(), "there is no place"


def test_where_the_gate_decides_each_token_is_a_cut_with_a_probability_of_the_sequences_own():
    after = torch.tensor([True, True, False, True, True])
    forced, cuts, jumps = planned(many(6), Thinking(after=after), 0.8, ~NONE)
    assert (forced == UNFORCED).all()
    near(cuts.float().mean(dim=0), [0.4, 0.4, 0.0, 0.4, 0.4] + [0.0] * 3)
    assert ((jumps > 0).sum(dim=1) <= 1).all() and not cuts[(jumps > 0).any(dim=1)].any()
    times = F.one_hot(cuts.sum(dim=1), 5).float().mean(dim=0)  # of four, none to all are alike
    near(times, [0.2 + 0.8 / 5] + [0.8 / 5] * 4)


def test_what_is_cut_thinks_there():
    forced, cuts, jumps = planned(many(6), Thinking(force=0.25), 0.8, NONE)
    near((forced == THINK).float().mean(dim=0), [0.25] * 8)
    assert set(forced.unique().tolist()) == {THINK, NO_THOUGHT}
    assert (forced[cuts | (jumps > 0)] == THINK).all() and cuts.any() and jumps.any()


def test_a_text_is_cut_at_many_of_its_thoughts_and_never_jumps():
    forced, cuts, jumps = planned(many(8), Thinking(force=0.25), 0.6, NONE)
    assert (forced[cuts] == THINK).all() and (cuts.sum(dim=1) > 1).any() and not jumps.any()
    near(cuts.float().mean(dim=0), [0.25 * 0.6 * 0.875] * 7 + [0.0])


def test_a_demonstration_is_followed_and_cut_only_where_it_shows_a_thought():
    thoughts = torch.full((4000, 8, 1), -1)
    thoughts[:, 1] = thoughts[:, 3] = 2
    shown = torch.arange(4000) < 2000
    forced, cuts, _ = planned(many(6, thoughts=thoughts, shown=shown), FORCED, 1.0, NONE)
    assert torch.equal(forced[shown], thoughts[shown, :, 0]) and (forced[~shown] == THINK).all()
    near(cuts[shown].float().mean(dim=0), [0, 0.5, 0, 0.5, 0, 0, 0, 0])
    near(cuts[~shown].float().mean(dim=0), [0.2] * 5 + [0.0] * 3)


def test_a_plain_gpt_stays_where_it_is(tiny):
    how = tiny(n_bits=0), torch.tensor([[0, 1, 2, 3]]), torch.tensor([4]), Thinking()
    there = rollout(*how, jumps=torch.tensor([[0, 9, 0, 0]]))[1].loss
    assert torch.equal(there, rollout(*how)[1].loss)


def test_what_follows_a_jump_stands_further_on(tiny):
    model, grid = tiny().double(), grid_of([[0, 5, 1, 6, 7, 2, 3]])
    found = replay(model, grid, jumps=torch.tensor([[0, 9, 0, 0]])).gate[grid.present]
    position = torch.tensor([[0, 1, 2, 12, 13, 14]])  # 0 5 1, then 6 7 2
    torch.testing.assert_close(
        found, model(grid.token[grid.present][None], Cells(position)).gate[0]
    )


def test_the_thought_at_the_cut_is_all_that_is_felt_of_what_came_before(tiny):
    model, grid = tiny(1).double(), grid_of([[0, 5, 6, 1, 5, 2, 7, 6, 3, 5, 4, 5, 0]] * 3)
    grid.token[1, :2, 0], grid.token[1, 0, 1:3] = 4, 8  # other tokens and thoughts before the cut
    grid.token[2, 2, 1] = 8  # another thought at it
    cuts = torch.arange(6).expand(3, 6) == 2
    one, other, changed = replay(model, grid, cuts=cuts).gate
    behind = grid.present[0] & (torch.arange(6) > 2)[:, None]
    torch.testing.assert_close(one[behind], other[behind])
    assert not torch.isclose(one[behind], changed[behind]).any()


# ----------------------------------------------------------------------------------------------
# tokens, prices, tries


def test_every_cell_is_charged_for_the_token_it_would_emit_and_one_that_thinks_with_a_weight():
    grid = grid_of([[0, 5, 1, RECALL, 2, 3]])
    loss = on(grid, [1.0, 2.0, 4.0, 8.0, 16.0])  # 0 goes on to think and 1 to RECALL
    found = [token_loss(loss, grid, ALL, weight).item() for weight in (1.0, 0.5, 0.0)]
    assert found == pytest.approx([31 / 5, (0.5 + 2 + 2 + 8 + 16) / 4, 26 / 3])
    grid.present[0, 0, -1] = True  # a wrong token, of no account here
    assert token_loss(loss, grid, ALL, 0.0).item() == pytest.approx(26 / 3)


def test_the_tokens_of_an_answer_count_or_all_of_a_text():
    grid = grid_of([[0, 1, 2, 3]] * 2)
    counted = counted_tokens(batch_of(grid, [2, 4]))[:, :, 0]
    assert counted[:, :3].tolist() == [[False, True, True], [True, True, True]]
    loss = on(grid, [1.0, 2.0, 4.0], [8.0, 16.0, 32.0])
    assert token_loss(loss, grid, counted[:, :, None], 1.0).item() == pytest.approx(62 / 5)
    assert token_loss(loss, grid, ALL & False, 1.0).item() == 0, "nothing counts, nothing is lost"


def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest_where_it_is_emitted():
    grid = grid_of([[0, 5, 1, 2, 3]] * 4)  # the cells would say 1, 1, 2, 3; the first one thinks
    rows = [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]
    out = GridOutput(None, on(grid, *rows).bool(), *[None] * 5)
    assert answers_right(out, grid, ALL).tolist() == [True, True, False, False]
    last = counted_tokens(batch_of(grid, 3))
    assert answers_right(out, grid, last).tolist() == [True, True, True, False]


LOSS = [9.0, 1.0, 9.0, 2.0, 4.0], [1.0, 9.0, 2.0, 4.0]  # a cell that thinks pays no 9
TWO = [0, 5, 1, 6, 2, 3], [0, 1, 7, 2, 3]


def test_return_to_go_by_hand():
    grid = grid_of(TWO)
    found = off(grid, return_to_go(on(grid, *LOSS), grid, 0.5))
    assert found == [[-8.0, -7.5, -6.5, -6.0, -4.0], [-7.5, -6.5, -6.0, -4.0]]


def test_a_recall_has_the_price_of_a_thought():
    grid = grid_of([[0, RECALL, 1, 5, RECALL, 2]])
    cost = on(grid, [9.0, 1.0, 9.0, 9.0, 2.0])
    assert off(grid, return_to_go(cost, grid, 0.5)) == [[-4.5, -4.0, -3.0, -2.5, -2.0]]


def test_a_horizon_counts_the_next_tokens_and_what_is_thought_for_them():
    grid = grid_of(TWO)
    found = {n: off(grid, return_to_go(on(grid, *LOSS), grid, 0.5, n)) for n in (0, 1, 2, 3)}
    assert found[1] == [[-1.5, -1.0, -2.5, -2.0, -4.0], [-1.0, -2.5, -2.0, -4.0]]
    assert found[2] == [[-4.0, -3.5, -6.5, -6.0, -4.0], [-3.5, -6.5, -6.0, -4.0]]
    assert found[3] == found[0]


def test_a_sequence_has_one_try_at_a_token_that_a_thought_may_follow():
    torch.manual_seed(0)
    after = torch.tensor([True, False, True, True, True])
    tries = draw_tries(many(6), Thinking(max_run=2, after=after), 0.0)
    assert ((tries != NO_TRY).sum(dim=1) == 1).all()
    near((tries == 0).float().mean(dim=0), [0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0])
    near((tries == 1).float().mean(dim=0), [0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0])
    tries = draw_tries(many(6), Thinking(after=torch.zeros(5).bool()), 0.5)
    near((tries == RECALL_SLOT).float().mean(dim=0), [0.5 / 7] * 7 + [0.0])
    assert ((tries == NO_TRY) | (tries == RECALL_SLOT)).all(), "no thought may follow any"
    shown = many(6)._replace(shown=torch.ones(len(tries)).bool())
    assert (draw_tries(shown, Thinking(), 0.5) == NO_TRY).all(), "demonstrations stay as they are"


@pytest.mark.parametrize("wants", [0, 1, 2, 3])
def test_a_try_does_the_other_thing_at_one_place_and_what_the_gate_wants_elsewhere(
    tiny, monkeypatch, wants
):
    """A gate that wants so many thoughts behind each token."""
    model, R = tiny(), 3
    gate = lambda out, run, *_: torch.full((R + 1,), run < wants)  # noqa: E731
    monkeypatch.setattr(train, "wants_to_think", gate)
    tries = torch.full((R + 1, 4), NO_TRY)
    tries[:R, 1] = torch.arange(R)
    real = torch.randint(V, (1, 4), generator=seeded(0)).expand(R + 1, 4)
    how = Thinking(max_run=R), seeded(0)
    grid, _ = rollout(model, real, torch.full((R + 1,), 4), *how, tries=tries)
    runs = grid.thinks.sum(dim=2)[:, :3]
    assert (runs[:, [0, 2]] == wants).all() and runs[R, 1] == wants
    assert runs[:R, 1].tolist() == [r if r < wants else wants + 1 for r in range(R)]
    assert grid.tried.nonzero().tolist() == [[r, 1, min(r, wants)] for r in range(R)]


def test_a_try_is_compared_with_what_it_is_a_try_of_at_the_same_token():
    grid = grid_of([[0, 5, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 6, 2]])
    returns = on(grid, [1.0, 2.0, 3.0], [7.0, 5.0], [4.0, 9.0], [8.0, 2.0, 1.0])
    found = gain(returns, torch.tensor([NO_TRY, NO_TRY, 0, 1]))[2:, :2, 0]
    assert found.tolist() == [[3, 6], [1, -3]], "a thought's as its token's"


def test_the_gate_loss_by_hand():
    logit, yes = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([True, False, True, True])
    gained, tried = torch.tensor([2.0, -3.0, -1.0, 7.0]), torch.tensor([1, 1, 1, 0]).bool()
    p = logit.sigmoid()
    by_hand = -(2 * math.log(0.5) + 3 * math.log(p[1]) + 1 * math.log(1 - p[2])) / 3
    assert gate_loss(logit, yes, tried, gained).item() == pytest.approx(by_hand)


def test_a_gate_ends_with_yes_where_yes_gains_on_average():
    """Thinking often costs a little, and seldom gains a lot."""
    yes, lucky = torch.arange(100) % 2 == 0, torch.arange(100) < 20
    for luck in (2.0, 1.0):
        worth = torch.where(lucky, luck, -0.3)
        logit = torch.zeros((), requires_grad=True)
        optimiser = torch.optim.SGD([logit], lr=2.0)
        for _ in range(500):
            optimiser.zero_grad()
            gained = torch.where(yes, worth, -worth)
            gate_loss(logit.expand(100), yes, torch.ones(100).bool(), gained).backward()
            optimiser.step()
        ratio = worth[lucky].sum() / -worth[~lucky].sum()
        assert logit.item() == pytest.approx(math.log(ratio), abs=1e-3)
        assert (logit > 0) == (worth.mean() > 0)


# ----------------------------------------------------------------------------------------------
# the echo


@pytest.mark.parametrize("how", [{}, {"max_run": 2, "force": 0.7}, {"window": 3}])
def test_the_gradient_of_a_rollout_is_that_of_soft_embeddings(tiny, monkeypatch, how):
    """
    Let the embedding of each thought move with the numbers that it was made of, by
    W (tanh(h) - tanh(h as it is)). Then the loss has, by finite differences in all weights at once,
    the gradient that it has with the echo, which is 0: through all thoughts of the rollout.
    """
    model = tiny(3).double()
    real, length = torch.randint(V, (4, 7), generator=seeded(0)), torch.full((4,), 7)
    cuts = torch.arange(7).expand(4, 7) == torch.tensor([[1], [2], [9], [9]])
    weights, direction = list(model.parameters()), [torch.randn_like(p) for p in model.parameters()]
    thinking, asked = Thinking(**{"force": 1.0, **how}), []
    usual = train.choose_thought
    monkeypatch.setattr(train, "choose_thought", lambda *a: asked.append(usual(*a)) or asked[-1])

    def loss():
        grid, out = rollout(model, real, length, thinking, seeded(1), cuts=cuts)
        return (out.loss * grid.emits).sum()

    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction) if g is not None)
    heard = gradients[[n for n, _ in model.named_parameters()].index("thoughts.head.weight")]
    assert heard is not None and heard.abs().sum() > 0

    drawn, kept, values, own = asked.copy(), [], [], model.thoughts.echo
    monkeypatch.setattr(model.thoughts, "echo", lambda h: kept.append(h.detach().tanh()) or own(h))
    loss()
    for step in (1e-6, -1e-6):
        soft, same = iter(kept), iter(drawn)

        def choose(*how, same=same):
            usual(*how)  # the same draws
            return next(same)

        monkeypatch.setattr(train, "choose_thought", choose)

        def echo(h, soft=soft):
            return F.linear(h.tanh() - next(soft), model.thoughts.embedding.weight)

        monkeypatch.setattr(model.thoughts, "echo", echo)
        with torch.no_grad():
            for p, d in zip(weights, direction):
                p += step * d
            values.append(loss().item())
            for p, d in zip(weights, direction):
                p -= step * d
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_the_echo_by_hand():
    """For bit i: d loss / d h_i = (1 - tanh(h_i)^2) W_i . d loss / d embedding of the thought."""
    thoughts, h = Thoughts(D_BITS, 8), torch.randn(3, D_BITS, requires_grad=True)
    echo, upstream = thoughts.echo(h), torch.randn(3, 8)
    assert not echo.any(), "forward there is nothing to hear"
    (gradient,) = torch.autograd.grad(echo, h, upstream)
    wanted = (1 - h.tanh() ** 2) * (upstream @ thoughts.embedding.weight)
    torch.testing.assert_close(gradient, wanted)


def test_thoughts_that_are_forced_have_no_echo(tiny):
    """What they say is given: only later tokens learn to read them."""
    model, real = tiny(1), torch.randint(V, (4, 6), generator=seeded(0))
    length, weights = torch.full((4,), 6), list(model.thoughts.parameters())
    for forced in (UNFORCED, 2):
        told = torch.full((4, 6, 1), forced)
        _, out = rollout(model, real, length, Thinking(force=1.0), forced=told)
        head, _, embedding, _ = torch.autograd.grad(out.loss.sum(), weights, allow_unused=True)
        assert (head is None or not head.any()) == (forced == 2) and embedding.any()


# ----------------------------------------------------------------------------------------------
# the observer


def test_each_reading_errs_where_its_own_target_is_known():
    readings = torch.tensor([[[[1.0, 0.0, 2.0], [3.0, 5.0, 0.0]]]])
    zero, all_, first = torch.zeros(1, 1, 2), torch.ones(1, 1, 2).bool(), torch.tensor([[[1, 0]]])
    targets = [zero, zero + 1, zero]
    assert observer_loss(readings, targets, [all_, first, first]).item() == 5 + 1 + 4
    assert observer_loss(readings, targets, [all_, first & 0, first]).item() == 5 + 0 + 4


# ----------------------------------------------------------------------------------------------
# thoughts that are shown, and tokens that are tried


def log_phi(x):
    return torch.special.log_ndtr(x / 0.2)


def test_demonstrated_thoughts_are_learned_by_heart_and_so_is_when_to_think(tiny):
    grid = grid_of([[0, 6, 1, 2], [0, 7, 1, 2]])
    h, gate = torch.randn(2, 3, 5, D_BITS), torch.randn(2, 3, 5)
    out = GridOutput(None, None, h, gate, None, None, None)
    batch = batch_of(grid, 2, shown=torch.tensor([True, False]))
    grid.asked[:, :, 1] = False
    soft = h[0, 0, 0].tanh()
    what = log_phi(soft[0]) + log_phi(-soft[1])  # 6 is thought 1: its first bit is set
    when = F.logsigmoid(gate[0, 0, 0]) + F.logsigmoid(-gate[0, 1, 0])
    found = demonstration_loss(tiny(), out, grid, batch)
    torch.testing.assert_close(found, -what - when / 2)


def test_wrong_tokens_are_tried_in_the_place_of_those_of_an_answer():
    batch = batch_of(grid_of([[0, 5, 1, 2, 3]] * 2000), 2)
    shown = torch.full((2000, 4), -1)
    shown[0, 1], shown[0, 2] = 4, 4  # of these two only the second is in the answer
    batch = batch._replace(wrong=shown)
    torch.manual_seed(0)
    few = wrong_tokens(batch, 1e-9, V)
    assert few[0].tolist() == [-1, 4, -1, -1] and (few[1:] == -1).all(), "behind the token before"
    many = wrong_tokens(batch, 0.25, V)[1:]
    near((many >= 0).float().mean(dim=0), [0.0, 0.25, 0.25, 0.0])
    drawn = many[:, 1][many[:, 1] >= 0].bincount(minlength=V)
    assert drawn[2] == 0 and (drawn[[0, 1, 3, 4]] > 50).all(), "any but the right one"


# ----------------------------------------------------------------------------------------------
# the whole


def test_a_plain_model_pays_cross_entropy_and_nothing_else(tiny):
    model, real = tiny(n_bits=0), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    grid, out = rollout(model, real, torch.tensor([4, 4]), Thinking())
    how = batch_of(grid, 1), torch.tensor([NO_TRY] * 2), Config(n_bits=0), False
    terms = hybrid_loss(model, grid, out, *how)
    logits = model(real[:, :-1]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), real[:, 1:].flatten())
    assert list(terms) == ["tokens"]
    torch.testing.assert_close(terms["tokens"], wanted)


def average(pairs):
    """[(weight, value)] -> weighted mean."""
    pairs = list(pairs)
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


class ByHand:
    """One sequence of a grid, alone: what each cell does, and what it costs."""

    def __init__(self, model, grid, b, batch, cells):
        self.b, self.cells, self.there = b, cells, grid.present[b].tolist()
        self.real, self.prompt = batch.real[b].tolist(), int(batch.prompt[b])
        self.ids, self.recall = grid.token[b].tolist(), grid.token.size(2) - 2

    def emitting(self):
        """All cells but the wrong tokens."""
        return [c for c in self.cells if c[1] != self.recall + 1]

    def does(self, t, slot):
        thinks = slot + 1 < self.recall and self.there[t][slot + 1]
        recalls = slot < self.recall and self.there[t][self.recall]
        return "think" if thinks else "recall" if recalls else "emit"

    def loss(self, t, slot):
        return -self.cells[t, slot].logits.log_softmax(dim=0)[self.real[t + 1]]

    def counts(self, t):
        return t + 1 >= self.prompt

    def charged(self, weight):
        """(weight, loss) of all cells that say a token that counts."""
        for t, slot in self.emitting():
            if self.counts(t):
                yield 1.0 if self.does(t, slot) == "emit" else weight, self.loss(t, slot)

    def to_go(self, price, horizon):
        """{cell: cost of what is emitted and thought from it on, for so many tokens}."""
        total, found = 0.0, {}
        for t, slot in reversed(self.emitting()):
            if self.does(t, slot) != "emit":
                total += price
            elif self.counts(t):
                total += self.loss(t, slot).item()
            found[t, slot] = total
        beyond = {(t, slot): found.get((t + horizon, 0), 0.0) for t, slot in found}
        return {cell: x - beyond[cell] * (horizon > 0) for cell, x in found.items()}


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("sizes", [{}, {"recall": True, "revise": True, "observer": "0,1"}])
def test_the_whole_loss_of_the_cost_phase_is_its_terms_by_hand(tiny, sizes, horizon):
    """
    Three sequences, four rollouts each, three of them tries. The second is cut behind its first
    token; the third shows how to think.
    """
    model, price, weight = tiny(7, **sizes).double(), 0.4, 0.5
    length = torch.tensor([6, 5, 6]).repeat_interleave(4)
    real = torch.tensor([[0, 1, 2, 3, 4, 2], [3, 0, 2, 1, 1, 0], [2, 2, 0, 4, 1, 3]])
    thoughts = torch.full((3, 6, 2), -1)
    thoughts[2, 1], thoughts[2, 3] = torch.tensor([1, 2]), torch.tensor([3, -1])
    wrong = torch.full((3, 6), -1)
    wrong[0, 3] = wrong[1, 2] = wrong[2, 4] = 4
    shown, more = torch.tensor([False, False, True]), {"thoughts": thoughts, "wrong": wrong}
    batch = Batch.plain(real, length[::4], torch.full((3,), 2), length[::4])
    batch = batch._replace(shown=shown, **more).rows(torch.arange(12) // 4)
    thinking = Thinking(max_run=2, window=5)
    forced = torch.where(batch.shown[:, None, None], batch.thoughts, UNFORCED)
    cuts = torch.zeros_like(batch.real, dtype=torch.bool)
    cuts[4:8, 0] = True
    torch.manual_seed(3)
    tried = wrong_tokens(batch, 1e-12, V) if sizes else None
    tries = torch.full_like(batch.real, NO_TRY)
    for b, t, which in ((1, 2, 0), (2, 1, 1), (3, 3, 0), (5, 0, 0), (6, 2, 1), (7, 3, 1)):
        tries[b, t] = RECALL_SLOT if sizes and b in (3, 6, 7) else which
    how = {"forced": forced, "cuts": cuts, "wrong": tried, "tries": tries}
    grid, out = rollout(model, batch.real, length, thinking, **how)
    config = Config(
        n_bits=D_BITS, max_run=2, window=5, think_cost=price, thinking_weight=weight,
        observer=sizes.get("observer", ""), recall="recall" in sizes,
        revise=1e-12 if sizes else 0.0, horizon=horizon,
    )  # fmt: skip
    segment = segments(grid, cuts)
    of = (torch.arange(12) // 4 * 4).where((tries != NO_TRY).any(dim=1), NO_TRY)
    found = hybrid_loss(model, grid, out, batch, of, config, True)

    def log_p(one, t, slot):
        """Of the thought that follows."""
        thought = torch.tensor(one.ids[t][slot + 1] - V)
        return model.thoughts.log_probability(one.cells[t, slot].thoughts, thought)

    slow = [alone(model, grid, b, 5, segment) for b in range(12)]
    full = [ByHand(model, grid, b, batch, cells) for b, cells in enumerate(slow)]
    own = [one for b, one in enumerate(full) if of[b] == NO_TRY]
    wanted = {"tokens": average(pair for one in own for pair in one.charged(weight))}
    gate, recall, worths = [], [], {}
    to_go = [one.to_go(price, horizon) for one in full]

    def taught(logit, did, gained):
        return abs(gained) * -F.logsigmoid(logit if did == (gained > 0) else -logit)

    for b, t in (tries != NO_TRY).nonzero().tolist():
        one, base = full[b], b - b % 4
        gained = to_go[base][t, 0] - to_go[b][t, 0]
        slots = [slot for (at, slot) in one.cells if at == t and slot < 3]
        if tries[b, t] == RECALL_SLOT:
            last = one.cells[t, max(slots)]
            recall.append(taught(last.recall, one.does(t, max(slots)) == "recall", gained))
        else:  # the gate was followed up to there
            thinks = [one.does(t, slot) == "think" for slot in slots]
            slot = next(s for s in slots if (one.cells[t, s].gate > 0) != thinks[s])
            did = thinks[slot]
            gate.append(taught(one.cells[t, slot].gate, did, gained))
            free = full[base].to_go(0.0, horizon)[t, 0] - one.to_go(0.0, horizon)[t, 0]
            worths[b, t, slot] = free if did else -free
    wanted["gate"] = sum(gate) / len(gate)
    shown = [(one, t, s) for one in full[8:] for t, s in one.emitting() if s < 3]
    told = [log_p(one, t, s) for one, t, s in shown if one.does(t, s) == "think"]
    when = [
        F.logsigmoid(one.cells[t, s].gate * (1 if one.does(t, s) == "think" else -1))
        for one, t, s in shown
        if s < 2
    ]
    wanted["demonstrations"] = -sum(told) / len(told) - sum(when) / len(when)

    if sizes:
        wanted["recall"] = sum(recall) / len(recall)
        tried = [(one, c) for one in own for c in one.cells if c[1] == 4]
        counted = sum(one.counts(t) for one in own for t, slot in one.cells if slot == 0)
        lost = [-one.cells[c].logits.log_softmax(dim=0)[V] for one, c in tried]
        wanted["revise"] = len(tried) / counted * sum(lost) / len(lost)
        errors = {"predicted": [], "worth": [], "to go": []}
        for b, one in enumerate(full):
            for t, slot in one.emitting():
                predicted, worth, cost_to_go = one.cells[t, slot].readings
                if one in own:
                    errors["predicted"].append((predicted - one.loss(t, slot).detach()) ** 2)
                    errors["to go"].append((cost_to_go - to_go[b][t, slot]) ** 2)
                if (b, t, slot) in worths:
                    errors["worth"].append((worth - worths[b, t, slot]) ** 2)
        wanted["observer"] = sum(sum(e) / len(e) for e in errors.values())
        assert min(map(len, (tried, recall, errors["worth"]))) > 2

    torch.testing.assert_close(found, wanted)
    # the gates' gradients, too: advantages are numbers, probabilities are not
    gates = [p for n, p in model.named_parameters() if "gate." in n or ".observer.read" in n]
    gradients = [torch.autograd.grad(sum(terms.values()), gates) for terms in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_in_the_warm_up_thoughts_are_free_and_the_gate_is_left_alone(tiny):
    model = tiny(2, observer="0,1")
    real, length = torch.randint(V, (2, 6), generator=seeded(0)), torch.full((8,), 6)
    real = real.repeat_interleave(4, dim=0)
    tries = torch.full((8, 6), NO_TRY)
    tries[1, 1] = tries[6, 2] = 0
    grid, out = rollout(model, real, length, Thinking(), seeded(0), tries=tries)
    of, losses = torch.tensor([NO_TRY, 0, NO_TRY, NO_TRY, NO_TRY, NO_TRY, 4, NO_TRY]), {}
    for price in (0.0, 5.0):
        config = Config(n_bits=D_BITS, observer="0,1", think_cost=price)
        for paid in (False, True):
            terms = hybrid_loss(model, grid, out, batch_of(grid, 4), of, config, paid)
            losses[price, paid] = {name: term.item() for name, term in terms.items()}
    assert losses[0.0, False] == losses[5.0, False] and "gate" not in losses[5.0, False]
    assert losses[0.0, True]["gate"] != losses[5.0, True]["gate"]
