"""The hybrid loss: its terms by hand, gradients by enumeration and finite difference, the whole."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import D_BITS, RECALL, K, V, alone, batch_of, grid_of, seeded, streams_of

import train
from data.dataset import Batch
from model import Thinking
from train import (
    ASK_GATE,
    Config,
    Pass,
    answers_right,
    baseline,
    counted_tokens,
    demonstration_loss,
    draw_cut,
    gate_loss,
    hybrid_loss,
    imitation_loss,
    log_choice,
    observer_loss,
    read,
    return_to_go,
    rollout,
    token_loss,
    value_of_thinking,
    with_wrong_tokens,
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


def several(stream, count):
    """So many sequences, all with this stream."""
    return grid_of([stream] * count)


# a thought behind each token but the last, behind 0 and behind 2 a run of two; of the prompt, the
# first six tokens, five can have a cut behind them
STREAM = [0, 5, 6, 1, 5, 2, 5, 6, 3, 5, 4, 5, 0, 5, 1, 5, 2]


def cuts(count=4000, share=1.0, late=1.0, prompt=6, stream=STREAM):
    """-> the grid, its cut, and the tokens behind whose thoughts sequences are cut (B, T)."""
    torch.manual_seed(0)
    grid = several(stream, count)
    cut = draw_cut(grid, batch_of(grid, prompt), share, late)
    begins = cut.segment[:, :, 1] - cut.segment[:, :, 0]
    return grid, cut, begins.bool()


def near(shares, wanted):
    torch.testing.assert_close(shares, torch.tensor(wanted), atol=0.03, rtol=0)


def test_a_late_cut_falls_at_the_last_place_or_the_one_before_or_the_one_before_that():
    _, cut, begins = cuts()
    assert (begins.sum(dim=1) == 1).all()
    near(begins.float().mean(dim=0), [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 0, 0, 0])
    assert torch.equal(begins.int().argmax(dim=1), 4 - cut.depth), "places behind it"


def test_other_cuts_fall_anywhere_behind_a_token_of_the_prompt_but_its_last():
    _, cut, begins = cuts(late=0.0)
    near(begins.float().mean(dim=0), [0.2] * 5 + [0.0] * 3)
    assert not cut.depth.any()


def test_only_thoughts_are_places_for_a_cut():
    _, _, begins = cuts(200, stream=[0, 1, 5, 2, 3, 5, 6, 4, 0])
    assert begins.any(dim=0).tolist() == [False, True, False, True, False, False]
    _, cut, begins = cuts(20, stream=[0, 1, 2, 3])
    assert not begins.any() and cut.used.equal(cut.left.present), "no thought, no cut"


def test_a_share_is_cut_and_a_share_of_those_late_and_only_those_hide_thoughts():
    grid, cut, begins = cuts(share=0.8, late=0.25)
    hides = (grid.present & ~cut.left.present).flatten(1).any(dim=1)
    near(torch.stack([begins.any(dim=1), hides]).float().mean(dim=1), [0.8, 0.2])
    assert not cut.depth[~hides].any() and begins[hides].any(dim=1).all()
    whole = ~begins.any(dim=1)
    assert torch.equal(cut.used[whole], grid.present[whole]), "what is not cut is read as it is"


def test_behind_a_late_cut_only_its_own_run_of_thoughts_is_left():
    grid, cut, begins = cuts(200)
    left = {1: [0, 5, 6, 1, 2, 3, 4, 0, 1], 3: [0, 5, 6, 1, 5, 2, 5, 6, 3, 4, 0, 1]}
    used = {1: [5, 6, 1, 2, 3, 4, 0, 1], 3: [5, 6, 3, 4, 0, 1]}
    for place in (1, 3):
        b = int(begins[:, place - 1].int().argmax())
        assert streams_of(cut.left)[b] == left[place], "what is thought before it is thought"
        assert grid.token[b, cut.used[b]].tolist() == used[place], "the thought is the first cell"
    assert set(begins.nonzero()[:, 1].tolist()) == {0, 1, 2, 3, 4}


def test_a_wrong_token_takes_no_part_in_a_truncated_pass():
    grid = several([0, 5, 1, 5, 2, 3], 1)
    grid.present[:, 1, -1] = True
    cut = draw_cut(grid, batch_of(grid, 3), 1.0, 0.0)
    assert not cut.used[:, :, -1].any() and not cut.left.present[:, :, -1].any()


def test_in_a_text_every_thought_behind_a_token_is_a_cut_and_none_is_hidden():
    grid, cut, begins = cuts(20, prompt=8)
    assert begins.tolist() == [[True] * 7 + [False]] * 20 and not cut.depth.any()
    assert torch.equal(cut.left.present, grid.present)
    assert off(grid, cut.segment)[0] == [0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert torch.equal(cut.used, cut.left.present & (cut.segment > 0)), "all but the first token"


def forgetful(tiny, **sizes):
    """-> a model, what a truncated pass takes, and the grid it is taken of."""
    model = tiny(1, **sizes).double()
    real, length = torch.randint(V, (30, 8), generator=seeded(0)), torch.full((30,), 8)
    grid = rollout(model, real, length, Thinking(max_run=2, force=0.7), seeded(0))
    torch.manual_seed(0)
    return model, grid, draw_cut(grid, batch_of(grid, 7), 1.0, 0.7)


def test_the_thought_at_the_cut_is_all_that_is_felt_of_what_came_before(tiny):
    model, grid, cut = forgetful(tiny)
    first = (cut.segment[:, :, 1] > cut.segment[:, :, 0]).nonzero()
    before, thought = grid.token.clone(), grid.token.clone()
    for b, t in first.tolist():
        before[b, :t, :] = V + 1
        before[b, : t + 1, 0] = 4
        thought[b, t, 1] = V + (thought[b, t, 1] - V + 1) % K
    behind = cut.used & (cut.segment > 0)

    def loss(token):
        grid_of_other = grid._replace(token=token)
        return read(model, grid_of_other, 0, cut.used, cut.segment).gate[behind]

    assert torch.equal(loss(before), loss(grid.token))
    assert not torch.allclose(loss(thought), loss(grid.token))


# ----------------------------------------------------------------------------------------------
# tokens, prices, baselines


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
    out = Pass(None, on(grid, *rows).bool(), *[None] * 5)
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


def test_a_rollout_is_compared_with_the_others_of_its_sequence_at_the_same_token():
    grid = grid_of([[0, 1, 2], [0, 5, 1, 2], [0, 1, 2]])
    returns = on(grid, [1.0, 3.0], [2.0, 9.0, 5.0], [6.0, 4.0])
    of_three = off(grid, baseline(returns, -returns, 3))
    assert of_three == [[4.0, 4.5], [3.5, 3.5, 3.5], [1.5, 4.0]], "a thought's as its token's"
    assert off(grid, baseline(returns, -returns, 1)) == off(grid, returns), "emitting at once"


def test_rollouts_are_not_compared_with_those_of_other_sequences():
    grid = grid_of([[0, 1]] * 2 + [[2, 3]] * 2)
    returns = on(grid, [1.0], [2.0], [10.0], [20.0])
    assert off(grid, baseline(returns, -returns, 2)) == [[2.0], [1.0], [20.0], [10.0]]


def test_an_exploring_gate_knows_the_probability_of_what_it_did():
    logit = torch.tensor([-200.0, -1.0, 3.0])
    yes = torch.ones(3).bool()
    for explore in (0.0, 0.1, 0.5):
        log_p = [log_choice(logit, did, explore) for did in (yes, ~yes)]
        assert torch.isfinite(log_p[0]).all()
        torch.testing.assert_close(log_p[0].exp() + log_p[1].exp(), torch.ones(3))
        wanted = explore + (1 - 2 * explore) * logit.sigmoid()
        torch.testing.assert_close(log_p[0].exp(), wanted)


def test_the_gate_loss_by_hand():
    logit, yes = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([True, False, True])
    advantage, asked = torch.tensor([2.0, -3.0, 7.0]), torch.tensor([True, True, False])
    log_p = [math.log(0.5), math.log(1 - torch.tensor(1.0).sigmoid())]
    by_hand = -(2 * log_p[0] - 3 * log_p[1]) / 2
    assert gate_loss(logit, yes, asked, advantage, 0.0).item() == pytest.approx(by_hand)


# ----------------------------------------------------------------------------------------------
# the policy gradient, against all rollouts there are


def every_rollout(model, real, after):
    """
    All ways in which one sequence can be rolled out, up to two thoughts in a row -> a grid each.
    `after`: tokens that a thought may follow.
    """
    K = model.config.n_think
    thoughts = range(len(model.embedding.weight), len(model.embedding.weight) + K)
    runs = [run for n in range(3) for run in itertools.product(thoughts, repeat=n)]
    for chosen in itertools.product(runs, repeat=len(real) - 1):
        if all(after[i] or not run for i, run in zip(real, chosen)):
            stream = itertools.chain(*([i, *run] for i, run in zip(real, chosen)), real[-1:])
            grid = grid_of([list(stream)])
            yield grid._replace(token=torch.where(grid.present, grid.token, real[-1]))


@pytest.mark.parametrize("explore", [0.0, 0.1])
@pytest.mark.parametrize("compared", ["nothing", "emitting at once", "another rollout"])
def test_the_policy_gradient_is_that_of_the_expected_cost(tiny, monkeypatch, compared, explore):
    """
    The expectation of the gate's loss over all rollouts, each as probable as the gate makes it,
    has the gradient of the expected cost plus price; whatever the baseline.
    """
    monkeypatch.setattr("conftest.V", 3)
    model = tiny(1, vocab_size=3, n_bits=1, n_layer=1, n_embd=8).double()
    after, price, objective, found = torch.tensor([True, False, True]), 0.3, 0.0, []
    thinking = Thinking(max_run=2, after=after)
    for grid in every_rollout(model, [0, 1, 2, 0], after):
        out, asked = read(model, grid), train.may_think(grid, thinking)
        yes = explore + (1 - 2 * explore) * out.gate.sigmoid()
        p = torch.where(grid.thinks, yes, 1 - yes)[asked].prod()
        number = (grid.token.roll(-1, dims=2) - 3) * grid.thinks
        thought = model.thoughts.log_probability(out.thoughts, number)[grid.thinks].sum().exp()
        p, cost = p * thought.detach(), out.loss.detach()
        objective = objective + p * (cost[grid.emits].sum() + price * grid.thinks.sum())
        found.append((grid, out.gate, asked, p.item(), cost, return_to_go(cost, grid, price)))
    assert len(found) == 7 * 7 and sum(f[3] for f in found) == pytest.approx(1)

    def estimate(one, compared_with=0.0):
        grid, gate, asked, p, _, returns = one
        loss = gate_loss(gate, grid.thinks, asked, returns - compared_with, explore)
        return p * asked.sum() * loss

    if compared == "nothing":
        expected = sum(estimate(one) for one in found)
    if compared == "emitting at once":
        expected = sum(estimate(one, baseline(one[5], one[4], 1)) for one in found)
    if compared == "another rollout":
        expected = 0.0
        for one, other in itertools.product(found, found):
            both = [torch.cat([one[i], other[i]]) for i in (5, 4)]
            expected = expected + other[3] * estimate(one, baseline(*both, 2)[:1])
    weights = [model.gate.out.weight, model.gate.out.bias]
    gradients = [torch.autograd.grad(x, weights, retain_graph=True) for x in (expected, objective)]
    torch.testing.assert_close(*gradients)


# ----------------------------------------------------------------------------------------------
# the echo


def test_the_echos_gradient_is_that_of_a_soft_embedding(tiny, monkeypatch):
    """
    Let the embedding of a thought behind a cell move with that cell's numbers in the full pass, by
    W (tanh(h) - tanh(h as it is)). The truncated passes' loss then has, by finite differences in
    all weights at once, the gradient that it has with the echo, which is 0.
    """
    model = tiny(3).double()
    real, length = torch.randint(V, (4, 7), generator=seeded(0)), torch.full((4,), 7)
    grid = rollout(model, real, length, Thinking(max_run=2, force=0.7), seeded(0))
    config = Config(n_bits=D_BITS, max_run=2, cuts=2)
    weights, direction = list(model.parameters()), [torch.randn_like(p) for p in model.parameters()]

    def truncated():
        torch.manual_seed(1)
        terms, *_ = hybrid_loss(model, grid, batch_of(grid, 5), Thinking(), config, False)
        return terms["truncated"]

    gradients = torch.autograd.grad(truncated(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction) if g is not None)
    heard = gradients[[n for n, _ in model.named_parameters()].index("thoughts.head.weight")]
    assert heard is not None and heard.abs().sum() > 0

    kept, values = [], []
    monkeypatch.setattr(model.thoughts, "echo", lambda h: kept.append(h.detach().tanh()) or 0.0)
    truncated()
    for step in (1e-6, -1e-6):
        calls = iter(kept)

        def soft(h, calls=calls):
            return F.linear(h.tanh() - next(calls), model.thoughts.embedding.weight)

        monkeypatch.setattr(model.thoughts, "echo", soft)
        with torch.no_grad():
            for p, d in zip(weights, direction):
                p += step * d
            values.append(truncated().item())
            for p, d in zip(weights, direction):
                p -= step * d
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_an_echo_goes_to_the_cell_before_the_thought_and_only_where_it_is_asked_for(tiny):
    """For bit i: d loss / d h_i = (1 - tanh(h_i)^2) W_i . d loss / d embedding of the thought."""
    model, grid = tiny().double(), grid_of([[0, 5, 6, 1, 2, 7, 3]])
    h = torch.randn(*grid.token.shape, D_BITS, dtype=torch.double, requires_grad=True)
    embed, inputs = model.embed, []
    model.embed = lambda ids: inputs.append(embed(ids).detach().requires_grad_()) or inputs[-1]
    echoes = F.pad(grid.thinks[:, :, :-1], (1, 0))
    echoes[0, 2] = False  # the thought 7 is to have none
    out = read(model, grid, h=h, echoes=echoes)
    plain = read(model, grid)
    assert torch.equal(out.loss, plain.loss), "forward there is nothing to hear"
    loss = (out.loss * grid.emits).sum()
    in_h, in_x = torch.autograd.grad(loss, [h, inputs[0]])
    W, wanted = model.thoughts.embedding.weight, torch.zeros_like(h)
    for slot, column in ((0, 1), (1, 2)):  # 5 and 6 are the second and the third cell
        slope = 1 - h[0, 0, slot].tanh() ** 2
        wanted[0, 0, slot] = slope * (in_x[0, column] @ W)
    torch.testing.assert_close(in_h, wanted)


# ----------------------------------------------------------------------------------------------
# the observer


def test_what_a_thought_is_worth_by_hand():
    """The first rollout thinks behind 0 and 1, the second behind 1 only."""
    grid = grid_of([[0, 5, 1, 6, 2, 3], [0, 1, 5, 2, 3]])
    cost = on(grid, [9.0, 1.0, 9.0, 2.0, 4.0], [3.0, 9.0, 5.0, 6.0])
    worth, known = value_of_thinking(cost, grid, Config(), 2)
    assert off(grid, known) == [[True, *[False] * 4], [True, *[False] * 3]], "there they differ"
    assert worth[0, 0, 0] == worth[1, 0, 0] == (3 + 5 + 6) - (1 + 2 + 4)
    worth, known = value_of_thinking(cost, grid, Config(horizon=2), 2)
    assert worth[0, 0, 0] == worth[1, 0, 0] == (3 + 5) - (1 + 2), "two tokens on"
    worth, known = value_of_thinking(cost, grid, Config(horizon=1), 1)
    assert torch.equal(known, grid.thinks), "what a thinking cell would have lost is known"
    assert worth[known].tolist() == [9 - 1, 9 - 2, 9 - 5]


def test_one_against_several_is_compared_with_their_mean():
    grid = grid_of([[0, 5, 1, 2], [0, 1, 2], [0, 1, 2]])
    cost = on(grid, [0.0, 1.0, 1.0], [2.0, 2.0], [4.0, 2.0])
    worth, known = value_of_thinking(cost, grid, Config(), 3)
    assert known[:, 0, 0].all() and worth[:, 0, 0].tolist() == [5 - 2, 4 - 2, 6 - 2]
    assert not value_of_thinking(cost, grid, Config(), 1)[1].any(), "alone, nothing is known"


def test_each_reading_errs_where_its_own_target_is_known():
    readings = torch.tensor([[[[1.0, 0.0, 2.0], [3.0, 5.0, 0.0]]]])
    zero, all_, first = torch.zeros(1, 1, 2), torch.ones(1, 1, 2).bool(), torch.tensor([[[1, 0]]])
    targets = [zero, zero + 1, zero]
    assert observer_loss(readings, targets, [all_, first, first]).item() == 5 + 1 + 4
    assert observer_loss(readings, targets, [all_, first & 0, first]).item() == 5 + 0 + 4


# ----------------------------------------------------------------------------------------------
# thoughts that are shown, imitated, or tried with a wrong token


def log_phi(x):
    return torch.special.log_ndtr(x / 0.3)


def test_demonstrated_thoughts_are_learned_by_heart_and_so_is_when_to_think(tiny):
    grid = grid_of([[0, 6, 1, 2], [0, 7, 1, 2]])
    h, gate = torch.randn(2, 3, 5, D_BITS), torch.randn(2, 3, 5)
    out = Pass(None, None, h, None, gate, None, None)
    batch = batch_of(grid, 2, shown=torch.tensor([True, False]))
    asked = train.may_think(grid, Thinking(max_run=1))
    asked[:, :, 1] = False
    soft = h[0, 0, 0].tanh()
    what = log_phi(soft[0]) + log_phi(-soft[1])  # 6 is thought 1: its first bit is set
    when = F.logsigmoid(gate[0, 0, 0]) + F.logsigmoid(-gate[0, 1, 0])
    found = demonstration_loss(tiny(), out, grid, batch, asked)
    torch.testing.assert_close(found, -what - when / 2)


def test_thoughts_behind_a_cut_are_imitated(tiny):
    grid = grid_of([[0, 5, 1, 8, 2]])
    h = torch.randn(1, 3, 5, D_BITS)
    out = Pass(None, None, h, None, None, None, None)
    first, second = h[0, 0, 0].tanh(), h[0, 1, 0].tanh()
    wanted = -(log_phi(-first).sum() + log_phi(second).sum()) / 2
    torch.testing.assert_close(imitation_loss(tiny(), out, grid), wanted)
    grid.present[0, 0, 0] = False  # the token before the cut
    torch.testing.assert_close(imitation_loss(tiny(), out, grid), -log_phi(second).sum())


def test_wrong_tokens_stand_beside_the_right_ones_of_an_answer():
    grid = grid_of([[0, 5, 1, 2, 3]] * 2000)
    wrong = torch.full((2000, 4), -1)
    wrong[0, 1], wrong[0, 2] = 4, 4  # of these two only the second is in the answer
    torch.manual_seed(0)
    few = with_wrong_tokens(grid, batch_of(grid, 2, wrong=wrong), 1e-9, V)
    assert few.present[:, :, -1].nonzero().tolist() == [[0, 1]] and few.token[0, 1, -1] == 4
    many = with_wrong_tokens(grid, batch_of(grid, 2, wrong=wrong), 0.25, V)
    near(many.present[1:, :, -1].float().mean(dim=0), [0.0, 0.25, 0.25, 0.0])
    drawn = many.token[1:, 1, -1][many.present[1:, 1, -1]].bincount(minlength=V)
    assert drawn[2] == 0 and (drawn[[0, 1, 3, 4]] > 50).all(), "any but the right one"
    for b in (0, 7):
        assert torch.equal(many.present[b, :, :-1], grid.present[b, :, :-1])


# ----------------------------------------------------------------------------------------------
# the whole


def test_a_plain_model_pays_cross_entropy_and_nothing_else(tiny):
    model, real = tiny(n_bits=0), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    grid = rollout(model, real, torch.tensor([4, 4]), Thinking())
    terms, _, expected = hybrid_loss(
        model, grid, batch_of(grid, 1), Thinking(), Config(n_bits=0), False
    )
    logits = model(real[:, :-1]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), real[:, 1:].flatten())
    assert list(terms) == ["tokens"] and expected.all()
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


@pytest.mark.parametrize("late, horizon", [(0.0, 0), (1.0, 2)])
@pytest.mark.parametrize("sizes", [{}, {"recall": True, "revise": True, "observer": "0,1"}])
def test_the_whole_loss_of_the_cost_phase_is_its_terms_by_hand(
    tiny, monkeypatch, sizes, late, horizon
):
    """
    Three sequences, four rollouts each; the third shows how to think. The prompt is two tokens, so
    that the only place for a cut is behind the first, and what thinks there is cut there.
    """
    monkeypatch.setattr(train, "CUT_LATE", late)
    model, price, weight, explore = tiny(7, **sizes).double(), 0.4, 0.5, 0.05
    length = torch.tensor([6, 5, 6]).repeat_interleave(4)
    real = torch.tensor([[0, 1, 2, 3, 4, 2], [3, 0, 2, 1, 1, 0], [2, 2, 0, 4, 1, 3]])
    thoughts = torch.full((3, 6, 2), -1)
    thoughts[2, 1], thoughts[2, 3] = torch.tensor([1, 2]), torch.tensor([3, -1])
    wrong = torch.full((3, 6), -1)
    wrong[0, 3] = wrong[1, 2] = 4
    shown, more = torch.tensor([False, False, True]), {"thoughts": thoughts, "wrong": wrong}
    batch = Batch.plain(real, length[::4], torch.full((3,), 2), length[::4])
    batch = batch._replace(shown=shown, **more).repeat(4)
    thinking = Thinking(max_run=2, explore=explore, window=5)
    forced = torch.where(batch.shown[:, None, None], batch.thoughts, ASK_GATE)
    torch.manual_seed(3)
    grid = rollout(model, batch.real, length, thinking, forced=forced)
    config = Config(
        n_bits=D_BITS, max_run=2, window=5, think_cost=price, thinking_weight=weight, cuts=2,
        explore=explore, observer=sizes.get("observer", ""), recall="recall" in sizes,
        revise=1e-12 if sizes else 0.0, horizon=horizon, forget=1.0,
    )  # fmt: skip
    found, right, expected = hybrid_loss(model, grid, batch, thinking, config, True)
    if config.revise:
        grid = with_wrong_tokens(grid, batch, config.revise, V)

    def log_p(one, t, slot):
        """Of the thought that follows."""
        thought = torch.tensor(one.ids[t][slot + 1] - V)
        return model.thoughts.log_probability(one.cells[t, slot].thoughts, thought)

    full = [ByHand(model, grid, b, batch, alone(model, grid, b, 5)) for b in range(12)]
    wanted = {"tokens": average(pair for one in full for pair in one.charged(weight))}

    # what is left behind the cut: first as drawn, then, for the second truncated pass, late
    truncated = []
    for is_late in (late, 1.0):
        left, segment = grid.present.clone(), torch.zeros_like(grid.token)
        left[:, :, -1] = False
        for b in range(12):
            if left[b, 0, 1]:
                segment[b, 0, 1:] = segment[b, 1:] = 1
                left[b, 1:, 1:3] &= not is_late
        used = left.clone()
        if not config.recall:
            used[:, 0, 0] &= ~left[:, 0, 1]
        kept, left = grid._replace(present=left), left & ((segment == 1) | ~left[:, :1, 1:2])
        truncated.append([])
        for b in range(12):
            cells = alone(model, grid, b, 5, used, segment)
            cells = {c: out for c, out in cells.items() if left[b][c]}
            truncated[-1].append(ByHand(model, kept, b, batch, cells))
    wanted["truncated"] = sum(
        average(pair for one in some for pair in one.charged(weight)) for some in truncated
    )
    behind = [(one, t, s) for one in truncated[0] for t, s in one.cells]
    imitated = [
        -log_p(one, t, s)
        for one, t, s in behind
        if one.does(t, s) == "think"
    ]
    wanted["imitation"] = 0.01 * sum(imitated) / len(imitated)

    gate, recall = [], []
    to_go = [one.to_go(price, horizon) for one in full]
    for b, one in enumerate(full):
        group = [to_go[o] for o in range(b - b % 4, b - b % 4 + 4) if o != b]
        for t, slot in one.emitting():
            advantage = sum(o[t, 0] for o in group) / 3 - to_go[b][t, slot]
            did = one.does(t, slot)
            if slot < 2 and not batch.shown[b]:
                p = explore + (1 - 2 * explore) * one.cells[t, slot].gate.sigmoid()
                gate.append(-advantage * (p if did == "think" else 1 - p).log())
            if slot < 3 and did != "think":
                p = explore + (1 - 2 * explore) * one.cells[t, slot].recall.sigmoid()
                recall.append(-advantage * (p if did == "recall" else 1 - p).log())
    wanted["gate"] = sum(gate) / len(gate)
    shown = [(one, t, s) for one in full[8:] for t, s in one.emitting() if s < 3]
    taught = [
        log_p(one, t, s)
        for one, t, s in shown
        if one.does(t, s) == "think"
    ]
    when = [
        F.logsigmoid(one.cells[t, s].gate * (1 if one.does(t, s) == "think" else -1))
        for one, t, s in shown
        if s < 2
    ]
    wanted["demonstrations"] = -sum(taught) / len(taught) - sum(when) / len(when)

    if sizes:
        wanted["recall"] = sum(recall) / len(recall)
        tried = [(one, c) for one in full for c in one.cells if c[1] == 4]
        counted = sum(one.counts(t) for one in full for t, slot in one.cells if slot == 0)
        lost = [-one.cells[c].logits.log_softmax(dim=0)[V] for one, c in tried]
        wanted["revise"] = len(tried) / counted * sum(lost) / len(lost)
        errors = {"predicted": [], "worth": [], "to go": []}
        for b, one in enumerate(full):
            rest = one.to_go(0.0, horizon)
            group = [full[o] for o in range(b - b % 4, b - b % 4 + 4)]
            for t, slot in one.emitting():
                predicted, worth, cost_to_go = one.cells[t, slot].readings
                errors["predicted"].append((predicted - one.loss(t, slot).detach()) ** 2)
                errors["to go"].append((cost_to_go - to_go[b][t, slot]) ** 2)
                thinks = one.does(t, 0) == "think"
                others = [o for o in group if (o.does(t, 0) == "think") != thinks]
                if slot == 0 and others:
                    theirs = sum(o.to_go(0.0, horizon)[t, 0] for o in others) / len(others)
                    gain = theirs - rest[t, 0] if thinks else rest[t, 0] - theirs
                    errors["worth"].append((worth - gain) ** 2)
        wanted["observer"] = sum(sum(e) / len(e) for e in errors.values())
        assert min(map(len, (tried, recall, errors["worth"]))) > 2

    said = [
        all(one.cells[c].logits.argmax() == one.real[c[0] + 1] for c in one.cells
            if one.does(*c) == "emit" and one.counts(c[0]))
        for one in truncated[0]
    ]  # fmt: skip
    assert right.tolist() == said and expected.all()
    assert 2 < grid.present[:, 0, 1].sum() < 8 and len(imitated) > 3 and len(taught) == 12
    torch.testing.assert_close(found, wanted)
    # the gates' gradients, too: advantages are numbers, probabilities are not
    gates = [p for n, p in model.named_parameters() if "gate." in n or ".observer.read" in n]
    gradients = [torch.autograd.grad(sum(terms.values()), gates) for terms in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_in_the_warm_up_thoughts_are_free_and_the_gate_is_left_alone(tiny):
    model = tiny(2, observer="0,1")
    real, length = torch.randint(V, (8, 6), generator=seeded(0)), torch.full((8,), 6)
    grid = rollout(model, real, length, Thinking(), seeded(0))
    losses = {}
    for price in (0.0, 5.0):
        config = Config(n_bits=D_BITS, observer="0,1", think_cost=price)
        for paid in (False, True):
            torch.manual_seed(0)
            terms, *_ = hybrid_loss(model, grid, batch_of(grid, 4), Thinking(), config, paid)
            losses[price, paid] = {name: term.item() for name, term in terms.items()}
    assert losses[0.0, False] == losses[5.0, False] and "gate" not in losses[5.0, False]
    assert losses[0.0, True]["gate"] != losses[5.0, True]["gate"]


def test_the_curriculum_goes_by_answers_behind_the_cut_where_one_may_expect_them(tiny):
    """Not by those in full view, nor by sequences that were cut before the last place."""
    model = tiny(vocab_size=3)  # so few that one who knows nothing is often right
    real, length = torch.randint(3, (200, 6), generator=seeded(0)), torch.full((200,), 6)
    grid = rollout(model, real, length, Thinking(), seeded(0))
    batch, config = batch_of(grid, 5), Config(n_bits=D_BITS, forget=1.0)
    torch.manual_seed(7)
    _, right, expected = hybrid_loss(model, grid, batch, Thinking(), config, False)
    torch.manual_seed(7)
    cut, counted = draw_cut(grid, batch, 1.0, train.CUT_LATE), counted_tokens(batch)
    kept = read(model, grid, 0, cut.used, cut.segment)
    behind = answers_right(kept, cut.left._replace(present=cut.used), counted)
    in_full = answers_right(read(model, grid), grid, counted)
    assert torch.equal(right, behind) and 20 < behind.sum() < 180
    assert (behind != in_full).sum() > 10
    assert torch.equal(expected, cut.depth == 0) and 0 < expected.sum() < 200


def test_with_nothing_forgotten_there_is_one_truncated_pass_that_sees_everything(tiny):
    model, real = tiny(1), torch.randint(V, (5, 6), generator=seeded(0))
    grid = rollout(model, real, torch.full((5,), 6), Thinking(force=1.0), seeded(0))
    config = Config(n_bits=D_BITS, forget=0.0, cuts=3)
    terms, *_ = hybrid_loss(model, grid, batch_of(grid, 4), Thinking(), config, False)
    torch.testing.assert_close(terms["truncated"], terms["tokens"])


def test_thoughts_that_are_shown_have_no_echo(tiny):
    """What they say is given: only later tokens learn to read them."""
    model, real = tiny(1), torch.randint(V, (4, 6), generator=seeded(0))
    length, heads = torch.full((4,), 6), list(model.thoughts.head.parameters())
    grid = rollout(model, real, length, Thinking(force=1.0), seeded(0))
    for shown in (False, True):
        batch = batch_of(grid, 4, shown=torch.full((4,), shown))
        terms, *_ = hybrid_loss(model, grid, batch, Thinking(), Config(n_bits=D_BITS), False)
        gradient = torch.autograd.grad(terms["truncated"], heads)
        assert (gradient[0].abs().sum() == 0) == shown
