"""The loss, term by term: by hand, by finite difference of the hand-derived formula, by enumeration of all rollouts."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from data.dataset import Batch
from loss import (
    baseline, draw_cuts, echo, hybrid_loss, leave_one_out, log_choice, observer_loss,
    policy_gradient, return_to_go, rows_right, thought_log_probability, weighted, word_loss,
    worth_of_thinking,
)  # fmt: skip
from runs import Config
from stream import Rollout, Thinking, read, rollout


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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_cuts_fall_on_thoughts_right_after_real_tokens_of_the_prompt():
    # row 0: thoughts at columns 1, 2 (a run of two), 4 and 6; the prompt is 0 1 2, so the thought
    # behind 2 (column 6) is too late
    roll = roll_of([[0, 5, 6, 1, 5, 2, 7, 3], [0, 1, 2, 3]], [[0, 1, 2, 3, 4]] * 2)
    generator, prompt = seeded(0), torch.tensor([3, 3])
    cut = lambda *how: draw_cuts(roll, prompt, *how, generator=generator)  # noqa: E731
    drawn = torch.stack([cut(1.0).first for _ in range(50)])
    assert (drawn[:, 0].sum(dim=1) == 1).all()
    assert drawn[:, 0].any(dim=0).nonzero().flatten().tolist() == [1, 4]
    assert not drawn[:, 1].any(), "no thought, no cut"
    assert not cut(0.0, 1.0).first.any() and not cut(0.0, 1.0).hidden.any()
    assert 20 < sum(int(cut(0.5).first[0].any()) for _ in range(80)) < 60, "half of the rows"


def eight_places(rows=4000):
    """
    Rows of eight real tokens with a thought behind each but the last; behind the first and the
    third a run of two. The prompt is the first six, so cuts may fall behind five places.
    """
    stream = [0, 5, 6, 1, 5, 2, 5, 6, 3, 5, 4, 5, 0, 5, 1, 5, 2]
    return roll_of([stream], [[0, 1, 2, 3, 4, 0, 1, 2, 3]]), [1, 4, 6, 9, 11], rows


def test_a_late_cut_falls_at_the_last_place_or_the_one_before_or_the_one_before_that():
    one, places, rows = eight_places()
    roll = Rollout(*(part.repeat_interleave(rows, dim=0) for part in one[:-1]))
    cut = draw_cuts(roll, torch.full((rows,), 6), 1.0, 1.0, seeded(0))
    assert (cut.first.sum(dim=1) == 1).all()
    share = cut.first.float().mean(dim=0)
    wanted = torch.zeros(17)
    wanted[places[::-1]] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])
    torch.testing.assert_close(share, wanted, atol=0.03, rtol=0)
    assert torch.equal(torch.tensor(places[::-1])[cut.depth], cut.first.int().argmax(dim=1))


def test_in_a_text_every_thought_behind_a_token_is_a_cut_and_none_is_hidden():
    roll = roll_of([[0, 5, 1, 2, 6, 7, 3]], [[0, 1, 2, 3, 4]])
    for seed in range(8):
        cut = draw_cuts(roll, torch.tensor([5]), 1.0, 1.0, seeded(seed))
        assert cut.first.int().tolist() == [[0, 1, 0, 0, 1, 0, 0]]
        assert not cut.hidden.any() and cut.depth.tolist() == [0]
    assert not draw_cuts(roll, torch.tensor([5]), 0.0, 1.0, seeded(0)).first.any()


def test_a_share_of_the_cuts_is_late_and_only_those_hide_thoughts():
    one, places, rows = eight_places()
    roll = Rollout(*(part.repeat_interleave(rows, dim=0) for part in one[:-1]))
    prompt = torch.full((rows,), 6)
    anywhere = draw_cuts(roll, prompt, 1.0, 0.0, seeded(0))
    assert not anywhere.hidden.any() and not anywhere.depth.any()
    share = anywhere.first.float().mean(dim=0)[places]
    torch.testing.assert_close(share, torch.full((5,), 0.2), atol=0.03, rtol=0)
    some = draw_cuts(roll, prompt, 0.8, 0.25, seeded(0))
    assert abs(some.first.any(dim=1).float().mean() - 0.8) < 0.03
    hides = some.hidden.any(dim=1)
    assert abs(hides.float().mean() - 0.8 * 0.25) < 0.03 and some.first[hides].any(dim=1).all()
    assert not some.depth[~hides].any()


def test_hidden_are_the_later_thoughts_but_not_those_of_the_same_run():
    roll, places, _ = eight_places()
    later = {1: [4, 6, 7, 9, 11, 13, 15], 4: [6, 7, 9, 11, 13, 15], 6: [9, 11, 13, 15]}
    later |= {9: [11, 13, 15], 11: [13, 15]}
    seen, generator = {}, seeded(0)
    for _ in range(200):
        cut = draw_cuts(roll, torch.tensor([6]), 1.0, 1.0, generator)
        seen[int(cut.first[0].nonzero())] = cut.hidden[0].nonzero().flatten().tolist()
    assert seen == later and sorted(seen) == places


def test_streams_without_their_hidden_thoughts_by_hand():
    roll = roll_of([[0, 5, 1, 6, 7, 2, 8, 3]], [[0, 1, 2, 3, 4]])
    hidden = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 0]]).bool()
    short = roll.without_thoughts(hidden)
    assert short.thinks.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert short.valid.int().tolist() == [[1, 1, 1, 0, 0, 1, 0, 1]]
    assert short.speaks.int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 1]], "1 and 2 now speak at once"
    assert torch.equal(short.position, roll.position)


def forgetful(tiny, **changes):
    """-> a model; a rollout with runs of up to two thoughts, as pass 2 reads it; its late cuts."""
    real = torch.randint(5, (12, 8), generator=seeded(0))
    length = torch.randint(5, 9, (12,), generator=seeded(0))
    model = tiny(**changes).double()
    roll = rollout(model, real, length, Thinking(max_run=2), seeded(0))
    cut = draw_cuts(roll, length - 1, 1.0, 0.8, seeded(0))
    assert cut.hidden.any() and (cut.depth > 0).any()
    return model, roll.without_thoughts(cut.hidden), cut


@pytest.mark.parametrize("recall", [False, True])
def test_the_second_pass_is_one_over_what_is_left_with_its_positions_kept(tiny, recall):
    """Row by row, the hidden columns taken out of the stream by hand; before a cut, too."""
    model, short, cut = forgetful(tiny, recall=recall)
    out = read(model, short, cut.first)
    for b in range(len(short.stream)):
        left = short.valid[b]
        stream, position = short.stream[b, left], short.position[b, left]
        segment, opens = cut.first[b].cumsum(0)[left], short.opens[b, left]
        c = torch.arange(len(stream))
        sees = (segment[:, None] == segment) | opens[:, None]
        mask = (sees & (c[:, None] >= c) & ~opens) | torch.eye(len(c), dtype=torch.bool)
        by_hand = model(stream[None], mask, position=position[None])
        for part, wanted in zip(out, by_hand):
            torch.testing.assert_close(part[b, left], wanted[0])


@pytest.mark.parametrize("recall", [False, True])
def test_hidden_thoughts_have_no_influence_and_get_no_gradient(tiny, recall):
    model, short, cut = forgetful(tiny, recall=recall)
    x = model.embed(short.stream).detach().requires_grad_()
    loss = word_loss(read(model, short, cut.first, x).words, short)
    loss.sum().backward()
    there = x.grad.abs().sum(dim=-1) > 0
    assert not there[cut.hidden].any() and there[cut.first].all()
    other = x.detach() + torch.randn(x.shape).double() * cut.hidden[..., None]
    assert torch.equal(word_loss(read(model, short, cut.first, other).words, short), loss)


# ----------------------------------------------------------------------------------------------
# echo


def test_the_echo_leaves_the_forward_value_alone(tiny):
    model = tiny()
    roll = roll_of([[0, 5, 1, 7, 2]], [[0, 1, 2, 3]])
    h = model(roll.stream).thoughts
    torch.testing.assert_close(echo(model, roll, h, roll.thinks), model.embed(roll.stream))


def test_the_echos_gradient_is_the_straight_through_one(tiny):
    """
    For a thought behind column c, and bit i: d loss / d h_i = (1 - tanh(h_i)^2) W_i . g with
    g = d loss / d embedding at c + 1; and nothing where none was chosen.
    """
    model = tiny()
    roll = roll_of([[0, 5, 1, 7, 2]], [[0, 1, 2, 3]])
    h = torch.randn(1, 5, 2, requires_grad=True)
    for chosen in (roll.thinks, roll.thinks & torch.tensor([[True, True, False, False, False]])):
        h.grad, x = None, echo(model, roll, h, chosen)
        x.retain_grad()
        (model(x).words ** 2).sum().backward()
        W, soft = model.thoughts.embedding.weight.detach(), h.detach().tanh()
        for column in range(5):
            expected = torch.zeros(2)
            if chosen[0, column]:
                g = x.grad[0, column + 1]
                expected = (1 - soft[0, column] ** 2) * (W.T @ g)
            torch.testing.assert_close(h.grad[0, column], expected)


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


def test_the_log_probability_of_a_thought_is_read_from_the_column_before_it(tiny):
    roll = roll_of([[0, 5, 1, 7]], [[0, 1, 2]])
    model, h = tiny(), torch.randn(1, 4, 2)
    log_phi = torch.distributions.Normal(0.0, 0.3).cdf(h.tanh()).log()[0]
    log_not = torch.distributions.Normal(0.0, 0.3).cdf(-h.tanh()).log()[0]
    first = log_not[0, 0] + log_not[0, 1]  # thought 0
    second = log_not[2, 0] + log_phi[2, 1]  # thought 2
    expected = torch.stack([first, torch.zeros(()), second, torch.zeros(())])
    torch.testing.assert_close(thought_log_probability(model, h, roll)[0], expected)


def test_a_row_is_right_if_every_word_of_its_answer_is_the_likeliest_where_it_speaks():
    roll = roll_of([[0, 5, 1, 2]] * 4, [[0, 1, 2, 3]] * 4)  # says 1, 1, 2, 3; column 0 thinks
    words = F.one_hot(torch.tensor([[1, 1, 2, 3], [4, 1, 2, 3], [1, 1, 4, 3], [1, 1, 2, 4]]), 5)
    everything, last = torch.ones(4, 4).bool(), torch.tensor([[False, False, False, True]] * 4)
    assert rows_right(words.float(), roll, everything).tolist() == [True, True, False, False]
    assert rows_right(words.float(), roll, last).tolist() == [True, True, True, False]


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


def log_probability(model, roll):
    """Of all that a rollout decided -> (gate actions (B,), thoughts (B,))."""
    out = model(roll.stream)
    gate = F.logsigmoid(torch.where(roll.thinks, out.gate, -out.gate)) * roll.decides
    return gate, thought_log_probability(model, out.thoughts, roll), out


@pytest.mark.parametrize("baseline", ["none", "leave one out", "speaking at once"])
def test_the_policy_gradient_equals_exact_enumeration(tiny, baseline):
    """The expectation of the estimator is the gradient of the expected loss plus price, whatever the baseline."""
    model = tiny(1, vocab_size=3, n_bits=1, n_layer=1, n_embd=8).double()
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
    model = tiny(2, vocab_size=3, n_bits=1, n_layer=1, n_embd=8).double()
    weights = [model.thoughts.head.weight, model.thoughts.head.bias]
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
    model = tiny(n_bits=0)
    real = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    length = torch.tensor([4, 4])
    roll = rollout(model, real, length, Thinking())
    loss, _ = hybrid_loss(model, roll, batch_of(roll, 1), Config(n_bits=0), paid=False)
    words = model(real[:, :-1]).words
    torch.testing.assert_close(loss, F.cross_entropy(words.flatten(0, 1), real[:, 1:].flatten()))


def by_columns(stream, columns, words, real, prompt):
    """
    What the columns that are left of a stream say -> for each (column, whether it thinks, index of
    the real token it would say, -log p of that, whether that is one of the answer).
    """
    found = []
    for i, column in enumerate(columns):
        thinks = i + 1 < len(columns) and int(stream[columns[i + 1]]) >= 5
        pointer = int((stream[: column + 1] < 5).sum())
        loss = -words[i].log_softmax(dim=-1)[real[pointer]]
        found.append((column, thinks, pointer, loss, pointer >= prompt))
    return found


def weighted_by_hand(said, charge_thinking, prompt_weight):
    total = 0.0
    for which, weight in ((True, 1.0), (False, prompt_weight)):
        part = [(charge_thinking if s[1] else 1.0, s[3]) for s in said if s[4] == which]
        total = total + weight * sum(w * loss for w, loss in part) / sum(w for w, _ in part)
    return total


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_the_whole_loss_of_the_cost_phase_is_its_terms_by_hand(tiny, late):
    """
    Two rows, four rollouts each. The prompt is two tokens, so the only place for a cut is behind
    the first; rows that think there are cut there. Every term is worked out row by row.
    """
    model, prompt, price = tiny(4, done=True).double(), 2, 0.4
    real = torch.tensor([[0, 1, 2, 3, 4, 2], [3, 0, 2, 1, 1, 0]]).repeat_interleave(4, 0)
    length = torch.tensor([6] * 4 + [5] * 4)
    roll = rollout(model, real, length, Thinking(max_run=2), seeded(0))
    config = Config(
        n_bits=2, done=True, max_run=2, rollouts=4, forget=0.0, forget_paid=1.0, cut_late=late,
        cuts=1,
        prompt_weight=0.3, charge_thinking=0.5, imitate=0.2, think_cost=price, gate_weight=1.5,
    )  # fmt: skip
    found, log = hybrid_loss(model, roll, batch_of(roll, prompt), config, True, seeded(0))

    in_full, forgotten, imitated, rollouts, right, cuts = [], [], [], [], [], 0
    for b in range(8):
        stream = roll.stream[b, roll.valid[b]]
        one, all_, is_thought = model(stream[None]), list(range(len(stream))), stream >= 5
        said = by_columns(stream, all_, one.words[0], real[b], prompt)
        in_full += said
        # the second pass
        words, thoughts, left = one.words[0], one.thoughts[0], all_
        if is_cut := bool(is_thought[1]):
            run = 2 if is_thought[2] else 1
            left = [c for c in all_[1:] if not (late and is_thought[c] and c > run)]
            two = model(stream[left][None], position=torch.tensor([left]))
            words = torch.cat([one.words[0, :1], two.words[0]])
            thoughts = torch.cat([one.thoughts[0, :1], two.thoughts[0]])
            left = [0, *left]
        kept = by_columns(stream, left, words, real[b], prompt)
        forgotten += kept
        asked = [(w, real[b, k[2]]) for w, k in zip(words, kept) if k[4] and not k[1]]
        right.append(all(w.argmax() == token for w, token in asked))
        cuts += is_cut
        for i, (column, thinks, *_) in enumerate(kept):
            if is_cut and column >= 1 and thinks:
                number = stream[column + 1] - 5
                imitated.append(model.thoughts.log_probability(thoughts[i], number))
        # the gate
        runs = [0] * len(stream)
        for c in all_[1:]:
            runs[c] = runs[c - 1] + 1 if is_thought[c] else 0
        returns, to_go = [0.0] * len(stream), 0.0
        for column, thinks, _, loss, answer in reversed(said):
            to_go -= price if thinks else loss.item() * (1.0 if answer else 0.3)
            returns[column] = to_go
        logit = [(one.go_on if runs[c] else one.gate)[0, c] for c in all_]
        log_p = [F.logsigmoid(x if s[1] else -x) for x, s in zip(logit, said)]
        first = {s[2]: returns[s[0]] for s in said if runs[s[0]] == 0}
        rollouts.append((said, runs, returns, log_p, first))

    gate = []
    for b, (said, runs, returns, log_p, _) in enumerate(rollouts):
        others = [rollouts[o][4] for o in range(b - b % 4, b - b % 4 + 4) if o != b]
        for column, _, pointer, *_ in said:
            if runs[column] < 2:
                advantage = returns[column] - sum(o[pointer] for o in others) / 3
                gate.append(-advantage * log_p[column])
    assert 0 < cuts < 8 and any(max(r[1]) == 2 for r in rollouts) and imitated
    imitation = -sum(imitated) / len(imitated)
    by_hand = weighted_by_hand(in_full, 0.5, 0.3) + weighted_by_hand(forgotten, 0.5, 0.3)
    by_hand = by_hand + 0.2 * imitation + 1.5 * sum(gate) / len(gate)
    torch.testing.assert_close(found, by_hand)
    assert log["right"].tolist() == right and log["asked"].all()
    weights = [model.gate.weight, model.gate.bias]
    mine, hand = (torch.autograd.grad(loss, weights) for loss in (found, by_hand))
    torch.testing.assert_close(mine, hand)


def test_every_further_late_cut_adds_its_own_token_loss(tiny):
    """There is one place only, behind the first token, so that all looks are the same."""
    model, real = tiny(4), torch.tensor([[0, 1, 2, 3, 4, 2]])
    roll = rollout(model, real, torch.tensor([6]), Thinking(hold=1.0), seeded(0))
    loss = {}
    for cuts in (1, 3):
        config = Config(n_bits=2, forget=1.0, cut_late=1.0, cuts=cuts, imitate=0.0)
        loss[cuts], log = hybrid_loss(model, roll, batch_of(roll, 2), config, False, seeded(0))
    assert (loss[3] - loss[1]).item() == pytest.approx(2 * log["loss_forgotten"], rel=1e-5)


def test_reinforce_rewards_the_cuts_thought_for_words_behind_the_hidden_ones(tiny):
    """And hidden thoughts for nothing. A thought behind each of 0, 1, 2, and 3 is the answer."""
    model = tiny(4).double()
    real, weights = torch.tensor([[0, 1, 2, 3]]), list(model.thoughts.head.parameters())
    roll = rollout(model, real, torch.tensor([4]), Thinking(hold=1.0), seeded(0))
    how = {"forget": 1.0, "cut_late": 1.0, "cuts": 1, "rollouts": 1, "imitate": 0.0}
    how["prompt_weight"] = 0.3
    config, batch = Config(n_bits=2, thought_grad="reinforce", **how), batch_of(roll, 3)
    stream, one, seen = roll.stream[0], model(roll.stream), set()
    for seed in range(8):
        found, _ = hybrid_loss(model, roll, batch, config, False, seeded(seed))
        cut = draw_cuts(roll, batch.prompt, 1.0, 1.0, seeded(seed))
        first = int(cut.first[0].nonzero())
        left = [first, *range(first + 1, 6, 2)]  # the cut's thought, then real tokens only
        two = model(stream[left][None], position=torch.tensor([left]))
        words = torch.cat([one.words[0, :first], two.words[0]])
        by_hand, to_go, seen = [], 0.0, seen | {first}
        said = by_columns(stream, [*range(first), *left], words, real[0], 3)
        for column, thinks, _, loss, answer in reversed(said):
            number = stream[min(column + 1, 5)] - 5
            if thinks:
                log_p = model.thoughts.log_probability(one.thoughts[0, column], number)
                by_hand.append(-to_go * log_p)
            else:
                to_go -= loss.item() * (1.0 if answer else 0.3)
        by_hand = sum(by_hand) / len(by_hand)
        wanted = torch.autograd.grad(by_hand, weights, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, weights), wanted)
    assert seen == {1, 3}


def test_the_curriculum_goes_by_answers_behind_the_cut_where_one_may_expect_them(tiny):
    """Not by those in full view, nor by rows that were cut before the last place."""
    model = tiny(vocab_size=3)  # so few that one who knows nothing is often right
    real, length = torch.randint(3, (200, 6), generator=seeded(0)), torch.full((200,), 6)
    roll = rollout(model, real, length, Thinking(), seeded(0))
    batch, config = batch_of(roll, 5), Config(n_bits=2, forget=1.0, cut_late=0.5)
    _, log = hybrid_loss(model, roll, batch, config, False, seeded(7))
    cut = draw_cuts(roll, batch.prompt, 1.0, 0.5, seeded(7))
    short, answer = roll.without_thoughts(cut.hidden), roll.valid & (roll.pointer >= 5)
    behind = rows_right(read(model, short, cut.first).words, short, answer)
    in_full = rows_right(read(model, roll).words, roll, answer)
    assert torch.equal(log["right"], behind) and 20 < behind.sum() < 180
    assert (behind != in_full).sum() > 10
    assert torch.equal(log["asked"], cut.depth == 0) and 0 < log["asked"].sum() < 200


@pytest.mark.parametrize("thought_grad", ["echo", "reinforce"])
@pytest.mark.parametrize("paid", [False, True])
def test_who_gets_a_gradient(tiny, paid, thought_grad):
    """Thoughts always learn; the gate learns in the paid phase only."""
    model = tiny(4).train()
    real = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    length = torch.full((32,), 6)
    roll = rollout(model, real, length, Thinking(), torch.Generator().manual_seed(0))
    config = Config(n_bits=2, thought_grad=thought_grad, rollouts=4)
    batch = batch_of(roll, 4)
    hybrid_loss(model, roll, batch, config, paid, torch.Generator().manual_seed(0))[0].backward()
    assert model.thoughts.head.weight.grad.abs().sum() > 0
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
