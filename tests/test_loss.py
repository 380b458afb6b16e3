"""The loss, term by term: by hand, by finite difference of the hand-derived formula, by enumeration of all rollouts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from data.dataset import Batch
from loss import (
    baseline, draw_cuts, echo, hybrid_loss, information_kept, leave_one_out, log_choice, observer_loss, policy_gradient, return_to_go, thought_log_probability, weighted, word_loss, worth_of_thinking,
)  # fmt: skip
from runs import Config
from stream import Rollout, Thinking, rollout


def roll_of(rows, real, V=5, length=None):
    """A Rollout from streams written out: numbers below V are real tokens, the others thoughts."""
    columns = max(map(len, rows))
    real = torch.tensor(real)
    length = torch.full((len(rows),), real.size(1)) if length is None else length
    stream = torch.tensor([row + [0] * (columns - len(row)) for row in rows])
    pointer = (stream < V).cumsum(1)
    thinks = F.pad(stream[:, 1:] >= V, (0, 1))
    valid = torch.arange(columns) < torch.tensor([[len(row)] for row in rows])
    decides = valid & (stream < V) & (pointer < length[:, None])
    return Rollout(stream, pointer.clamp(max=real.size(1)), decides, thinks, torch.zeros_like(thinks), valid, real, length, torch.zeros(len(real), 0, 2))


def batch_of(roll, prompt):
    return Batch.plain(roll.real, roll.length, torch.full_like(roll.length, prompt), torch.zeros_like(roll.length))


# ----------------------------------------------------------------------------------------------
# forgetting


def test_the_mask_by_hand():
    roll = roll_of([[0, 1, 2, 3]] * 3, [[0, 1, 2, 3, 4]] * 3)
    one, none, two = roll.view(cut=torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()).int().tolist()
    assert one[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert none[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert two[0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_nothing_before_the_cut_is_felt_behind_it_except_through_the_cuts_thought(tiny):
    model = tiny()
    x = torch.tensor([[1, 6, 2, 7, 3, 4]])  # the cut is at thought 7, column 3
    mask = roll_of(x.tolist(), [[1, 2, 3, 4]]).view(cut=torch.tensor([[0, 0, 0, 1, 0, 0]]).bool())
    before, thought = x.clone(), x.clone()
    before[0, :3] = torch.tensor([4, 5, 0])
    thought[0, 3] = 5
    words = model(x, mask=mask).words[:, 3:]
    assert torch.equal(model(before, mask=mask).words[:, 3:], words)
    assert not torch.allclose(model(thought, mask=mask).words[:, 3:], words), "the thought is the carrier"


def test_cuts_fall_on_thoughts_right_after_real_tokens_of_the_prompt():
    # row 0: thoughts at columns 1, 2 (a run of two), 4 and 6; the prompt is 0 1 2, so the thought behind 2 (column 6) is too late
    roll = roll_of([[0, 5, 6, 1, 5, 2, 7, 3], [0, 1, 2, 3]], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.tensor([3, 3])
    cut = lambda *how: draw_cuts(roll, prompt, *how, generator=generator)  # noqa: E731
    drawn = torch.stack([cut(1.0) for _ in range(50)])
    assert (drawn[:, 0].sum(dim=1) == 1).all() and drawn[:, 0].any(dim=0).nonzero().flatten().tolist() == [1, 4]
    assert not drawn[:, 1].any(), "no thought, no cut"
    assert cut(1.0, 1.0).nonzero().tolist() == [[0, 4]], "the last one that may be"
    assert not cut(0.0).any()
    assert cut(1.0, 0.0, 1).nonzero().tolist() == [[0, 1], [0, 4]], "every = 1: all there are"
    assert 20 < sum(int(cut(1.0, 0.0, 4).sum()) for _ in range(100)) < 80, "every = 4: a quarter of them, 50 expected"


# ----------------------------------------------------------------------------------------------
# echo


def test_the_echo_leaves_the_forward_value_alone(tiny):
    model = tiny()
    roll = roll_of([[0, 5, 1, 7, 2]], [[0, 1, 2, 3]])
    thoughts = model(roll.stream).thoughts
    torch.testing.assert_close(echo(model, roll, thoughts, roll.thinks), model.embedding(roll.stream))


def test_the_echos_gradient_is_the_straight_through_one(tiny):
    """For a thought behind column c: d loss / d logits_k = scale * p_k * (E_k - sum_j p_j E_j) . g, g = d loss / d embedding at c + 1."""
    model = tiny()
    roll = roll_of([[0, 5, 1, 7, 2]], [[0, 1, 2, 3]])
    logits = torch.randn(1, 5, 3, requires_grad=True)
    x = echo(model, roll, logits, roll.thinks, scale=2.0)
    x.retain_grad()
    (model(x).words ** 2).sum().backward()
    E, p = model.embedding.weight[5:].detach(), logits.detach().softmax(-1)
    for column in range(5):
        expected = torch.zeros(3)
        if roll.thinks[0, column]:
            g = x.grad[0, column + 1]
            expected = 2.0 * p[0, column] * (E @ g - (p[0, column] @ E) @ g)
        torch.testing.assert_close(logits.grad[0, column], expected)


def test_what_thoughts_tell_by_hand():
    sure = 50 * F.one_hot(torch.tensor([[0, 1, 2, 3]]), 4).float()
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert information_kept(sure, everywhere).item() == pytest.approx(math.log(4)), "four columns, a thought for each"
    assert information_kept(0 * sure, everywhere).item() == pytest.approx(0), "undecided everywhere"
    assert information_kept(sure, torch.tensor([[True, False, False, False]])).item() == pytest.approx(0), "the same everywhere"
    assert information_kept(sure, torch.tensor([[True, True, False, False]])).item() == pytest.approx(math.log(2))


# ----------------------------------------------------------------------------------------------
# words, prices, baselines


def test_every_column_is_charged_for_the_word_it_would_say_and_prompts_less():
    roll = roll_of([[0, 5, 1, 2]], [[0, 1, 2, 3]])  # column 0 would say 1, the thought behind it says it, then 2, 3
    words = torch.zeros(1, 4, 5)
    words[0, 0, 1] = words[0, 3, 3] = 2.0
    loss = word_loss(words, roll)
    uniform, sharp = torch.log(torch.tensor(5.0)), torch.log(4 + torch.e**2 * torch.ones(())) - 2
    torch.testing.assert_close(loss, torch.stack([sharp, uniform, uniform, sharp])[None])
    answer = torch.tensor([[False, False, False, True]])
    torch.testing.assert_close(weighted(loss, roll, answer, 0.1), sharp + 0.1 * (sharp + 2 * uniform) / 3)
    torch.testing.assert_close(weighted(loss, roll, answer, 0.1, 0.5), sharp + 0.1 * (0.5 * sharp + 2 * uniform) / 2.5)
    torch.testing.assert_close(weighted(loss, roll, answer, 0.1, 0.0), sharp + 0.1 * uniform)


def test_the_log_probability_of_a_thought_is_read_from_the_column_before_it():
    roll = roll_of([[0, 5, 1, 7]], [[0, 1, 2]])
    thoughts = torch.randn(1, 4, 3)
    expected = [thoughts[0, 0].log_softmax(-1)[0], 0.0, thoughts[0, 2].log_softmax(-1)[2], 0.0]
    torch.testing.assert_close(thought_log_probability(thoughts, roll, 5)[0], torch.tensor(expected))


def test_return_to_go_and_price_by_hand():
    roll = roll_of([[0, 5, 1, 6, 2]], [[0, 1, 2, 3]])
    loss = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0]])  # what columns 0 and 2 would have lost counts for nothing: they think
    # decided at column 0: two thoughts at 0.5 and all of the loss; at column 1 the first thought is already thought
    assert return_to_go(loss, roll, 0.5).tolist() == [[-8.0, -7.5, -6.5, -6.0, -4.0]]


def test_a_horizon_counts_only_the_next_real_tokens():
    roll = roll_of([[0, 5, 1, 6, 2], [0, 1, 7, 2]], [[0, 1, 2, 3]] * 2)
    loss = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0], [1.0, 9.0, 2.0, 4.0, 0.0]])
    assert return_to_go(loss, roll, 0.5, 1).tolist() == [[-1.5, -1.0, -2.5, -2.0, -4.0], [-1.0, -2.5, -2.0, -4.0, 0.0]]
    assert return_to_go(loss, roll, 0.5, 2).tolist() == [[-4.0, -3.5, -6.5, -6.0, -4.0], [-3.5, -6.5, -6.0, -4.0, 0.0]]
    assert torch.equal(return_to_go(loss, roll, 0.5, 9), return_to_go(loss, roll, 0.5))


def test_leave_one_out_by_hand():
    # three rollouts of one row; returns at their first columns: 1, 2, 6 at the first real position, 3, 5, 4 at the second
    roll = roll_of([[0, 1], [0, 5, 1], [0, 1]], [[0, 1, 2]] * 3)
    returns = torch.tensor([[1.0, 3.0, 0.0], [2.0, 9.0, 5.0], [6.0, 4.0, 0.0]])
    baseline = leave_one_out(returns, roll, 3)
    assert baseline[0, :2].tolist() == [4.0, 4.5]
    assert baseline[1].tolist() == [3.5, 3.5, 3.5], "a thought's column is compared with the others from the same real position on"
    assert baseline[2, :2].tolist() == [1.5, 4.0]
    assert leave_one_out(returns, roll, 1).abs().sum() == 0, "alone there is no baseline"


# ----------------------------------------------------------------------------------------------
# the policy gradient, against all rollouts there are


def all_rollouts(model, real):
    """Every rollout of one row with at most one thought between tokens -> list of streams."""
    K, V, T = model.config.n_think, model.config.vocab_size, len(real)
    choices = [None, *range(V, V + K)]
    for between in itertools.product(choices, repeat=T - 1):
        yield [token for r, z in zip(real, between) for token in ([r] if z is None else [r, z])]


def log_probability(model, roll, gate_only=False):
    """Of all that a rollout decided -> (gate actions (B,), thoughts (B,))."""
    out = model(roll.stream)
    gate = F.logsigmoid(torch.where(roll.thinks, out.gate, -out.gate)) * roll.decides
    return gate, thought_log_probability(out.thoughts, roll, model.config.vocab_size), out


@pytest.mark.parametrize("baseline", ["none", "leave one out", "speaking at once"])
def test_the_policy_gradient_equals_exact_enumeration(tiny, baseline):
    """The expectation of the estimator is the gradient of the expected loss plus price, whatever the baseline."""
    model = tiny(1, vocab_size=3, n_think=2, n_layer=1, n_embd=8).double()
    real, cost = [0, 1, 2], 0.3
    weights = [model.gate.weight, model.gate.bias]
    rolls = [roll_of([stream], [real], V=3) for stream in all_rollouts(model, real)]
    probabilities, objective, returns, at_once = [], 0.0, [], []
    for roll in rolls:
        gate, thought, out = log_probability(model, roll)
        probability = (gate.sum() + thought.sum().detach()).exp()  # thoughts' contents are another term's business
        loss = word_loss(out.words, roll).detach()
        objective = objective + probability * ((loss * roll.speaks).sum() + cost * roll.thinks.sum())
        probabilities.append(probability.item())
        returns.append(return_to_go(loss, roll, cost))
        at_once.append(-loss)
    assert sum(probabilities) == pytest.approx(1)
    exact = torch.autograd.grad(objective, weights, retain_graph=True)

    actions = [log_probability(model, roll)[0] for roll in rolls]  # one graph, used for every pair

    def estimate(index, advantage):
        decides = rolls[index].decides
        return policy_gradient(actions[index], advantage, decides) * decides.sum()

    total = 0.0
    if baseline != "leave one out":
        for i, (p, r) in enumerate(zip(probabilities, returns)):
            total = total + p * estimate(i, r - at_once[i] if baseline == "speaking at once" else r)
    else:  # all pairs of rollouts, the second the baseline of the first
        for i, j in itertools.product(range(len(rolls)), repeat=2):
            r, s = returns[i], returns[j]
            both = roll_of([rolls[i].stream[0].tolist(), rolls[j].stream[0].tolist()], [real, real], V=3)
            padded = torch.zeros(both.stream.shape, dtype=torch.double)
            padded[0, : r.size(1)], padded[1, : s.size(1)] = r[0], s[0]
            others = leave_one_out(padded, both, 2)[:1, : r.size(1)]
            total = total + probabilities[i] * probabilities[j] * estimate(i, r - others)
    for found, wanted in zip(torch.autograd.grad(total, weights), exact):
        torch.testing.assert_close(found, wanted)


def test_reinforce_on_thoughts_equals_exact_enumeration(tiny):
    model = tiny(2, vocab_size=3, n_think=2, n_layer=1, n_embd=8).double()
    weights = [model.head.weight, model.head.bias]
    objective = total = 0.0
    for stream in all_rollouts(model, [0, 1, 2]):
        roll = roll_of([stream], [[0, 1, 2]], V=3)
        gate, thought, out = log_probability(model, roll)
        probability = (gate.sum().detach() + thought.sum()).exp()
        loss = word_loss(out.words, roll).detach()
        objective = objective + probability * (loss * roll.speaks).sum()
        total = total + probability.item() * policy_gradient(thought, return_to_go(loss, roll, 0.0), roll.thinks) * roll.thinks.sum()
    exact = torch.autograd.grad(objective, weights, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(total, weights), exact):
        torch.testing.assert_close(found, wanted)


# ----------------------------------------------------------------------------------------------
# the whole


def test_a_plain_model_pays_cross_entropy_and_nothing_else(tiny):
    model = tiny(n_think=0)
    real = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    length = torch.tensor([4, 4])
    roll = rollout(model, real, length, Thinking())
    loss, _ = hybrid_loss(model, roll, batch_of(roll, 1), Config(n_think=0), paid=False)
    words = model(real[:, :-1]).words
    torch.testing.assert_close(loss, F.cross_entropy(words.flatten(0, 1), real[:, 1:].flatten()))


@pytest.mark.parametrize("thought_grad", ["echo", "reinforce"])
@pytest.mark.parametrize("paid", [False, True])
def test_who_gets_a_gradient(tiny, paid, thought_grad):
    """Thoughts always learn; the gate learns in the paid phase only."""
    model = tiny(4).train()
    real = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    length = torch.full((32,), 6)
    roll = rollout(model, real, length, Thinking(), torch.Generator().manual_seed(0))
    config = Config(n_think=3, thought_grad=thought_grad, rollouts=4)
    hybrid_loss(model, roll, batch_of(roll, 4), config, paid, torch.Generator().manual_seed(0))[0].backward()
    assert model.head.weight.grad[5:].abs().sum() > 0
    assert (model.gate.weight.grad is not None) == paid


# ----------------------------------------------------------------------------------------------
# the observer


def test_the_worth_of_a_thought_by_hand():
    # two rollouts of the row 0 1 2: the first thinks behind 0 and behind 1, the second behind 1 only
    roll = roll_of([[0, 5, 1, 6, 2], [0, 1, 5, 2]], [[0, 1, 2, 3], [0, 1, 2, 3]])
    cost = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0], [3.0, 9.0, 5.0, 6.0, 0.0]])
    worth, known = worth_of_thinking(cost, roll, rollouts=2, horizon=0)
    assert known.tolist() == [[True, False, False, False, False], [True, False, False, False, False]], "behind 0 they differ"
    assert worth[0, 0] == worth[1, 0] == (3 + 5 + 6) - (1 + 2 + 4), "what was spoken later cost 14 without and 7 with"
    worth, known = worth_of_thinking(cost, roll, rollouts=2, horizon=1)
    assert known.tolist() == roll.thinks.tolist() and worth[known].tolist() == [9 - 1, 9 - 2, 9 - 5], "the next token: said at once, or behind the thought"


def test_one_against_several_is_compared_with_their_mean():
    roll = roll_of([[0, 5, 1], [0, 1], [0, 1]], [[0, 1, 2]] * 3)
    cost = torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
    worth, known = worth_of_thinking(cost, roll, rollouts=3, horizon=0)
    assert known[:, 0].all() and worth[:, 0].tolist() == [5.0 - 2.0, 4.0 - 2.0, 6.0 - 2.0]


def test_each_reading_errs_on_its_own_columns():
    readings = torch.tensor([[[1.0, 0.0, 2.0], [3.0, 5.0, 0.0]]])
    zero, all_, first = torch.zeros(1, 2), torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert observer_loss(readings, (zero, zero, zero), (all_, first, first)).item() == (1 + 9) / 2 + 0 + 4
    assert observer_loss(readings, (zero, zero, zero), (all_, ~all_, first)).item() == 5 + 0 + 4, "nothing known, nothing lost"


def test_the_baselines_by_hand():
    roll = roll_of([[0, 1], [0, 1]], [[0, 1, 2], [0, 1, 2]])
    returns, ahead = torch.tensor([[-3.0, -1.0], [-5.0, -2.0]]), torch.tensor([[4.0, 1.0], [4.0, 1.5]])
    of = lambda name, rollouts=2: baseline(returns, -returns, ahead, roll, Config(baseline=name, rollouts=rollouts)).tolist()  # noqa: E731
    assert of("leave_one_out") == [[-5, -2], [-3, -1]]
    assert of("observer") == [[-4, -1], [-4, -1.5]]
    assert of("both") == [[-4 + (-5 + 4), -1 + (-2 + 1.5)], [-4 + (-3 + 4), -1.5 + (-1 + 1)]]
    assert of("leave_one_out", rollouts=1) == returns.tolist(), "a single one: what speaking at once would cost"


def test_an_exploring_gate_says_the_probability_of_what_it_did():
    gate = torch.tensor([-200.0, -1.0, 3.0])
    for explore in (0.0, 0.1):
        think, speak = (log_choice(gate, torch.full((3,), did), explore) for did in (True, False))
        assert torch.isfinite(think).all()
        torch.testing.assert_close(think.exp() + speak.exp(), torch.ones(3))
        torch.testing.assert_close(think.exp(), explore + (1 - 2 * explore) * gate.sigmoid())
