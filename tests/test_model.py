"""The network and the rollout: every fast path against its slow, obvious twin."""

import math

import pytest
import torch

from model import GPT, GPTConfig, KVCache, Output, Thoughts
from stream import Noise, Thinking, draw, draw_noise, generate, rollout


def ids(model, rows=4, columns=9, seed=0):
    total = model.config.vocab_size + model.config.n_think
    return torch.randint(total, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_bits, observer", [(0, ""), (2, ""), (2, "0,1"), (0, "quarters")])
def test_one_column_at_a_time_equals_all_at_once(tiny, n_bits, observer):
    model = tiny(n_bits=n_bits, observer=observer)
    x = ids(model)
    cache = KVCache(model.config, *x.shape)
    steps = [model(x[:, c : c + 1], cache=cache) for c in range(x.size(1))]
    for at_once, one_by_one in zip(model(x), zip(*steps)):
        torch.testing.assert_close(torch.cat(one_by_one, dim=1), at_once)


def test_a_prompt_fed_at_once_then_columns_equals_all_at_once(tiny):
    model = tiny()
    x = ids(model)
    cache = KVCache(model.config, *x.shape)
    model(x[:, :6], cache=cache)
    torch.testing.assert_close(model(x[:, 6:7], cache=cache).words, model(x[:, :7]).words[:, 6:])


@pytest.mark.parametrize("window", [1, 3, 20])
def test_the_ring_cache_equals_a_banded_mask(tiny, window):
    model = tiny(observer="quarters")
    x = ids(model, columns=12)
    cache = KVCache(model.config, 4, 12, window)
    words = torch.cat([model(x[:, c : c + 1], cache=cache).words for c in range(12)], dim=1)
    c = torch.arange(12)
    band = (c[:, None] >= c) & (c[:, None] - c < window)
    torch.testing.assert_close(words, model(x, mask=band).words)
    assert cache.keys.size(3) == min(window, 12), "memory is the window's"


def test_only_distances_matter_to_rope_so_a_shifted_stream_reads_the_same(tiny):
    model = tiny()
    x = ids(model)
    cut = 4
    c = torch.arange(9)
    mask = (c[:, None] >= c) & ((c >= cut) | (c[:, None] < cut))
    torch.testing.assert_close(model(x, mask=mask).words[:, cut:], model(x[:, cut:]).words, atol=1e-4, rtol=1e-4)


def test_without_thoughts_it_is_exactly_a_plain_gpt(tiny):
    model = tiny(n_bits=0)
    names = " ".join(model.state_dict())
    assert "gate" not in names and "thoughts" not in names
    assert model.embedding.num_embeddings == model.head.out_features == 5
    out = model(ids(model))
    assert out.thoughts.shape == (4, 9, 0) and (out.gate == -torch.inf).all()
    real = ids(model)
    length = torch.full((4,), 9)
    roll = rollout(model, real, length, Thinking())
    assert torch.equal(roll.stream, real[:, :8]) and not roll.thinks.any()
    assert torch.equal(roll.pointer, torch.arange(1, 9).expand(4, 8))


def test_embeddings_in_place_of_ids_give_the_same_output(tiny):
    model = tiny()
    x = ids(model)
    torch.testing.assert_close(model(model.embed(x)).words, model(x).words)


def test_the_gate_reads_the_trunk_but_sends_it_no_gradient(tiny):
    model = tiny()
    model(ids(model)).gate.sum().backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert reached == ["gate.weight", "gate.bias"]


# ----------------------------------------------------------------------------------------------
# thoughts


def test_the_bits_of_a_number_by_hand():
    thoughts = Thoughts(3, 2)
    found = thoughts.bits(torch.tensor([0, 1, 2, 4, 6, 7])).tolist()
    assert found[:4] == [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    assert found[4:] == [[-1, 1, 1], [1, 1, 1]]


def test_a_thoughts_embedding_is_linear_in_its_bits():
    thoughts = Thoughts(2, 3)
    W, b = thoughts.embedding.weight, thoughts.embedding.bias.data.normal_()
    signs = [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    by_hand = torch.stack([b + x * W[:, 0] + y * W[:, 1] for x, y in signs])
    torch.testing.assert_close(thoughts(torch.arange(4)), by_hand)


def some_thoughts(d=3):
    """-> Thoughts of d bits, numbers of one column (d,), and by hand p of each thought (K,)."""
    thoughts, h = Thoughts(d, 4), torch.tensor([0.1, -0.4, 0.0, 0.7])[:d]
    p = [0.5 * (1 + math.erf(math.tanh(x) / 0.3 / math.sqrt(2))) for x in h.tolist()]
    bits = [[number >> i & 1 for i in range(d)] for number in range(2**d)]
    each = [math.prod(q if bit else 1 - q for q, bit in zip(p, number)) for number in bits]
    return thoughts, h, torch.tensor(each)


def test_the_probability_of_a_thought_by_hand_and_all_of_them_sum_to_one():
    thoughts, h, p = some_thoughts()
    found = thoughts.log_probability(h.expand(8, 3), torch.arange(8)).exp()
    torch.testing.assert_close(found, p)
    assert found.sum().item() == pytest.approx(1) and found.min() > 0.001


def test_drawn_thoughts_have_those_probabilities():
    thoughts, h, p = some_thoughts()
    noise = thoughts.noise(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(thoughts.choose(h, noise), minlength=8) / 20_000
    torch.testing.assert_close(share, p, atol=0.012, rtol=0)


def test_the_likeliest_thought_has_a_set_bit_where_the_number_is_positive():
    thoughts, h, p = some_thoughts(2)
    assert thoughts.choose(h) == p.argmax() == 1
    assert thoughts.choose(torch.tensor([-0.1, 0.2])) == 2
    assert thoughts.choose(torch.zeros(2)) == 0, "a tie is a bit that is not set"


def test_the_echo_is_zero_and_its_gradient_is_that_of_bits_that_are_tanh():
    thoughts, h = Thoughts(3, 5), torch.randn(2, 4, 3, requires_grad=True)
    g = torch.randn(2, 4, 5)
    value = thoughts.echo(h)
    assert value.shape == g.shape and not value.any()
    (value * g).sum().backward()
    by_hand = (g @ thoughts.embedding.weight) * (1 - h.detach().tanh() ** 2)
    torch.testing.assert_close(h.grad, by_hand)
    assert not thoughts.embedding.weight.grad.any(), "what is zero moves no weight"


def test_words_recall_and_thoughts_are_embedded_each_in_its_own_way(tiny):
    model = tiny(recall=True)  # words 0 .. 4, thoughts 5 .. 8, RECALL 9
    x = model.embed(torch.tensor([[3, 7, 9, 0, 5]]))[0]
    rows, thought = model.embedding.weight, model.thoughts
    assert len(rows) == 6 and torch.equal(x[[0, 2, 3]], rows[[3, 5, 0]])
    torch.testing.assert_close(x[[1, 4]], thought(torch.tensor([2, 0])))


@pytest.mark.parametrize("n_bits", [-1, 25])
def test_how_many_bits_a_thought_may_have(n_bits):
    with pytest.raises(ValueError, match="n_bits"):
        GPT(GPTConfig(vocab_size=3, n_bits=n_bits, n_embd=8))


# ----------------------------------------------------------------------------------------------
# the observer


def test_quarters_of_the_depth():
    layers = lambda n_layer, observer="quarters": GPTConfig(n_layer=n_layer, observer=observer).watched()  # noqa: E731
    assert [layers(n) for n in (1, 2, 4, 8, 40)] == [[0], [0, 1], [1, 2, 3], [2, 4, 6], [10, 20, 30]]
    assert layers(4, "0,3") == [0, 3] and layers(4, "") == []
    for bad in ("thirds", "4", "-1"):
        with pytest.raises(ValueError, match="observer"):
            layers(4, bad)


def test_the_observer_is_one_head_that_looks_at_the_layers_below(tiny):
    model = tiny(n_layer=3, observer="0,2")
    x = ids(model, rows=1, columns=5)
    inputs, sensed = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    model.blocks[-1].register_forward_hook(lambda _m, _i, y: sensed.append(y[1]))
    out = model(x)
    block, hs = model.blocks[-1], 8
    observer = block.attention.observer
    watched = torch.cat([inputs[0], inputs[2]], dim=-1)  # outputs of the embedding and of the second layer
    q = observer.q(block.norm1(inputs[2]))[0]
    k, v = observer.kv(watched)[0].split(hs, dim=-1)
    angle = torch.arange(5)[:, None] * model.frequency
    turn = lambda z: torch.cat([z[:, :4] * angle.cos() - z[:, 4:] * angle.sin(), z[:, :4] * angle.sin() + z[:, 4:] * angle.cos()], dim=1)  # noqa: E731
    for c in range(5):
        weight = (turn(k)[: c + 1] @ turn(q)[c] / hs**0.5).softmax(dim=0)
        torch.testing.assert_close(sensed[0][0, c], weight @ v[: c + 1] + v[c])
    p, (coming, worth, ahead) = out.words[0].softmax(dim=-1), observer.read(sensed[0][0]).T
    torch.testing.assert_close(out.readings[0], torch.stack([coming - (p * p.log()).sum(dim=-1), worth, ahead], dim=-1))


def test_without_an_observer_there_are_no_readings_and_with_one_nobody_listens_to_every_word_is_the_same(tiny):
    model, watched = tiny(), tiny(seed=1, observer="quarters")
    assert model(ids(model)).readings.shape == (4, 9, 0) and not [name for name in model.state_dict() if "observer" in name]
    watched.adopt(model.state_dict())
    out = watched(ids(model))
    assert out.readings.shape == (4, 9, 3)
    torch.testing.assert_close(out.words, model(ids(model)).words)


@pytest.mark.parametrize("shapes", [False, True])
def test_the_observer_watches_and_moves_nothing_unless_asked_to(tiny, shapes):
    model = tiny(observer="quarters", observer_shapes=shapes)
    model(ids(model)).readings.sum().backward()
    assert model.blocks[-1].attention.observer.q.weight.grad.abs().sum() > 0
    assert (model.embedding.weight.grad.abs().sum() > 0) == shapes


# ----------------------------------------------------------------------------------------------
# the rollout


class Scripted(torch.nn.Module):
    """Thinks behind the tokens it is told to, thought number token % 4; would always say word 4."""

    def __init__(self, thinks_behind):
        super().__init__()
        self.config = GPTConfig(vocab_size=5, n_bits=2, n_layer=1, n_head=1, n_embd=2)
        self.embedding, self.thoughts = torch.nn.Embedding(5, 2), Thoughts(2, 2)
        self.thinks_behind = torch.tensor(thinks_behind)

    def forward(self, x, mask=None, cache=None):
        cache.length += 1
        words = torch.nn.functional.one_hot(torch.full_like(x, 4), 5).float()
        thoughts = 9 * self.thoughts.bits(x % 4)
        gate = torch.where(torch.isin(x, self.thinks_behind), 9.0, -9.0)
        return Output(words, thoughts, gate, gate, torch.full_like(gate, -torch.inf), words[..., :0])

    think = forward


def test_a_rollout_by_hand():
    # rows 0 1 2 and 1 1: a thought behind every 1 (and, as max_run = 2, behind the thought 5 + 1 = 6 if told so)
    real, length = torch.tensor([[0, 1, 2], [1, 1, 0]]), torch.tensor([3, 2])
    roll = rollout(Scripted([1]), real, length, Thinking(greedy=True, max_run=1))
    assert roll.stream.tolist() == [[0, 1, 6], [1, 6, 1]]  # column 3 of row 1 lies behind its end
    assert roll.pointer.tolist() == [[1, 2, 2], [1, 1, 2]]
    assert roll.thinks.tolist() == [[False, True, False], [True, False, False]]
    assert roll.decides.tolist() == [[True, True, False], [True, False, False]]  # no choice behind a thought, nor at the end
    assert roll.valid.tolist() == [[True, True, True], [True, True, False]]
    assert roll.speaks.tolist() == [[True, False, True], [False, True, False]]


def test_thoughts_in_a_row_stop_at_max_run_and_follow_only_what_they_may():
    real, length = torch.tensor([[1, 1]]), torch.tensor([2])
    chatty = Scripted([1, 5, 6, 7, 8])
    for run in (1, 2, 4):
        roll = rollout(chatty, real, length, Thinking(greedy=True, max_run=run))
        assert roll.thinks.sum() == run, "a model that would think for ever is stopped, and still speaks"
    nowhere = Thinking(greedy=True, after=torch.tensor([True, False, True, True, True]))
    assert not rollout(chatty, real, length, nowhere).thinks.any()


def slow_rollout(model, real, length, thinking, noise):
    """One row in plain Python, the whole prefix recomputed for every column, with the row's own noise -> stream."""
    V, runs = model.config.vocab_size, thinking.max_run
    stream, pointer, run = [int(real[0])], 1, 0
    while pointer < length:
        c = torch.arange(len(stream))
        band = (c[:, None] >= c) & (c[:, None] - c < (thinking.window or len(stream)))
        _, thoughts, gate, *_ = (y[0, -1] for y in model(torch.tensor([stream]), mask=band))
        place = (pointer - 1) * runs + run
        probability = gate.sigmoid() if thinking.hold is None else thinking.hold if run == 0 else 1.0
        may = run < runs and (run > 0 or thinking.after is None or bool(thinking.after[stream[-1]]))
        if may and noise.think[place] < probability:
            e = noise.thought[place]
            bits = [math.tanh(h) + 0.3 * x > 0 for h, x in zip(thoughts.tolist(), e.tolist())]
            stream, run = stream + [V + sum(2**i for i, bit in enumerate(bits) if bit)], run + 1
        else:
            stream, run, pointer = stream + [int(real[pointer])], 0, pointer + 1
    return stream[:-1]


def test_rows_that_never_think_need_no_walk(tiny):
    model = tiny()
    real, length = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([6, 4, 5, 2])
    walked = rollout(model, real, length, Thinking(hold=0.0))  # may think, and never does
    for known, found in zip(rollout(model, real, length, Thinking(mode="never")), walked[:-1]):
        assert torch.equal(known, found & False) if found is walked.decides else torch.equal(known, found)


@pytest.mark.parametrize("seed", range(8))
def test_a_rollout_that_is_given_all_words_equals_the_slow_one_with_the_same_noise(tiny, seed):
    """Lengths, gates and noise of all kinds; nothing but the thoughts is computed, and the loop looks only now and then whether it is done."""
    draw = torch.Generator().manual_seed(seed)
    model, runs = tiny(seed, observer=("", "quarters")[seed % 2]), 1 + seed % 3
    real, length = torch.randint(5, (6, 12), generator=draw), torch.randint(1, 13, (6,), generator=draw)
    after = torch.tensor([True, True, False, True, True]) if seed % 4 == 3 else None
    thinking = Thinking(max_run=runs, window=(0, 4)[seed // 4], after=after, hold=(None, None, 0.5)[seed % 3])
    roll = rollout(model, real, length, thinking, torch.Generator().manual_seed(1))
    noise = draw_noise(model, 6, 12, thinking, torch.Generator().manual_seed(1))
    for b in range(6):
        alone = Noise(noise.think[b], noise.thought[b], noise.recall[b])
        assert roll.stream[b][roll.valid[b]].tolist() == slow_rollout(model, real[b], length[b], thinking, alone)
    assert roll.valid.any(dim=0).all(), "no column is empty"


def test_who_needs_no_words_gets_the_thoughts_and_the_gate_of_those_who_do(tiny):
    for observer in ("", "quarters"):
        model = tiny(observer=observer)
        for part, whole in zip(model.think(ids(model))[1:5], model(ids(model))[1:5]):
            torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("mode", ["random", "constant", "swapped"])
def test_ablations_keep_the_rows_and_change_only_the_thoughts(mode):
    real, length = torch.tensor([[0, 1, 2], [1, 1, 2], [2, 2, 2]]), torch.tensor([3, 3, 3])
    policy = rollout(Scripted([0, 1, 2]), real, length, Thinking(greedy=True))
    ablated = rollout(Scripted([0, 1, 2]), real, length, Thinking(mode, greedy=True, constant=2), torch.Generator().manual_seed(0))
    assert torch.equal(ablated.thinks, policy.thinks) and torch.equal(ablated.real, policy.real)
    thoughts = ablated.stream[:, 1::2] - 5
    if mode == "constant":
        assert (thoughts == 2).all()
    if mode == "swapped":
        assert torch.equal(thoughts, (policy.stream[:, 1::2] - 5).roll(1, dims=0))
    if mode == "random":
        assert not torch.equal(ablated.stream, policy.stream)
    assert not rollout(Scripted([0, 1, 2]), real, length, Thinking("never")).thinks.any()


# ----------------------------------------------------------------------------------------------
# generate


def test_generate_hides_every_thought_stops_and_is_repeatable(tiny):
    model = tiny(3)
    prompts = [[1], [2, 3, 4, 0], [0, 0]]
    say = lambda seed: generate(model, prompts, 10, Thinking(max_run=3), torch.Generator().manual_seed(seed), stop=4)  # noqa: E731
    answers, roll = say(1)
    assert roll.thinks.any(), "this model thinks"
    assert all(token < 4 for answer in answers for token in answer), "neither thoughts nor the stop token are said"
    assert all(len(answer) == 10 or roll.real[b][roll.length[b] - 1] == 4 for b, answer in enumerate(answers))
    assert say(1)[0] == answers and say(2)[0] != answers


def test_a_row_generates_the_same_alone_and_in_company(tiny):
    model, thinking = tiny(5), Thinking(greedy=True, max_run=2)
    prompts = [[1], [2, 3, 4, 0], [0, 0]]
    together, _ = generate(model, prompts, 6, thinking)
    assert together == [generate(model, [prompt], 6, thinking)[0][0] for prompt in prompts]


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -2.0]]).expand(20_000, 3)
    share = torch.bincount(draw(logits, torch.Generator().manual_seed(0)), minlength=3) / 20_000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.01, rtol=0)


def test_top_k_and_temperature(tiny):
    model = tiny()
    say = lambda **changes: generate(model, [[1]] * 50, 5, Thinking(mode="never", **changes), torch.Generator().manual_seed(0))[0]  # noqa: E731
    greedy = say(greedy=True)
    assert say(top_k=1) == greedy and say(temperature=1e-4) == greedy and say() != greedy
