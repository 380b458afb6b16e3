"""The network against a naive one, its cache, and `generate` against a loop without a cache."""

import math

import pytest
import torch
from conftest import RECALL, K, V, seeded

from model import (
    GPT,
    Cache,
    Cells,
    GPTConfig,
    Output,
    Thinking,
    Thoughts,
    choose_thought,
    choose_token,
    decide,
    generate,
    visible,
    wants_to_think,
)
from runs import from_gpt2, warm_start


def ids(rows=3, cells=9, seed=0, total=V + K):
    return torch.randint(total, (rows, cells), generator=seeded(seed))


# ----------------------------------------------------------------------------------------------
# the network


def naive_gpt(model, stream):
    """A plain GPT of one sequence, cell by cell and head by head, with sums -> logits (C, V)."""
    w, c = model.state_dict(), model.config
    hs, C = c.n_embd // c.n_head, len(stream)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turned(x, position):  # RoPE: numbers i and i + hs / 2 are one complex number
        z = torch.complex(x[: hs // 2], x[hs // 2 :])
        angle = torch.tensor([position * 100 ** (-2 * i / hs) for i in range(hs // 2)])
        z = z * torch.polar(torch.ones(hs // 2), angle)
        return torch.cat([z.real, z.imag])

    def gelu(x):
        if c.n_positions:
            return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    x = w["embedding.weight"][stream]
    if c.n_positions:
        x = x + w["position.weight"][:C]
    for layer in range(c.n_layer):
        block = f"blocks.{layer}"
        qkv = linear(f"{block}.attention.qkv", norm(f"{block}.norm1", x))
        heads = []
        for head in range(c.n_head):
            own = slice(head * hs, (head + 1) * hs)
            q, k, v = (part[:, own] for part in qkv.split(c.n_embd, dim=1))
            if not c.n_positions:
                q, k = (torch.stack([turned(y[i], i) for i in range(C)]) for y in (q, k))
            sums = [(k[: i + 1] @ q[i] / hs**0.5).exp() for i in range(C)]
            heads.append(torch.stack([s @ v[: i + 1] / s.sum() for i, s in enumerate(sums)]))
        x = x + linear(f"{block}.attention.proj", torch.cat(heads, dim=1))
        x = x + linear(f"{block}.down", gelu(linear(f"{block}.up", norm(f"{block}.norm2", x))))
    return linear("head", norm("norm", x))


@pytest.mark.parametrize("n_positions", [0, 12])
def test_without_thoughts_it_is_a_plain_gpt(tiny, n_positions):
    model = tiny(n_bits=0, n_positions=n_positions)
    assert not [name for name in model.state_dict() if "gate" in name or "thoughts" in name]
    out = model(ids(total=V))
    for row, logits in zip(ids(total=V), out.logits):
        torch.testing.assert_close(logits, naive_gpt(model, row), atol=1e-4, rtol=1e-4)
    assert out.thoughts.shape == (3, 9, 0) and out.readings.shape == (3, 9, 0)
    assert (out.gate == -torch.inf).all() and (out.recall == -torch.inf).all()


def test_what_goes_in_may_be_ids_or_their_embeddings(tiny):
    model = tiny()
    torch.testing.assert_close(model(model.embed(ids())).logits, model(ids()).logits)


def test_tokens_recall_and_thoughts_are_embedded_each_in_its_own_way(tiny):
    model = tiny(recall=True)
    x, rows = model.embed(torch.tensor([3, 7, RECALL, 0, 5])), model.embedding.weight
    assert len(rows) == V + 1 and torch.equal(x[[0, 2, 3]], rows[[3, 5, 0]])
    torch.testing.assert_close(x[[1, 4]], model.thoughts(torch.tensor([2, 0])))


def test_the_gates_read_the_trunk_but_send_it_no_gradient(tiny):
    model = tiny(recall=True, observer="quarters")
    out = model(ids())
    (out.gate + out.recall).sum().backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(reached) == 4 and all("gate.out." in name for name in reached)


def test_a_new_gate_thinks_but_is_easily_persuaded():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, n_embd=8))
    assert model(ids()).gate.sigmoid().flatten().tolist() == pytest.approx([0.6] * 27)


def test_what_fits_no_network_is_refused(tiny):
    for sizes in ({"n_embd": 15}, {"n_embd": 6}):
        with pytest.raises(ValueError, match="even heads"):
            tiny(**sizes)
    with pytest.raises(ValueError, match="end after 8 cells"):
        tiny(n_positions=8)(ids())


# ----------------------------------------------------------------------------------------------
# cache and visibility

KINDS = [{"n_bits": 0}, {}, {"observer": "0,1"}, {"n_positions": 9}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_what_goes_through_in_chunks_equals_all_at_once(tiny, kind, chunk):
    model, x = tiny(**kind), ids(total=V)
    parts, cache = [], None
    for start in range(0, 9, chunk):
        out = model(x[:, start : start + chunk], None, cache)
        cache = out.cache
        parts.append(out[:5])
    for at_once, by_chunk in zip(model(x)[:5], zip(*parts)):
        torch.testing.assert_close(torch.cat(by_chunk, dim=1), at_once)
    assert cache.layers[0][0].size(2) == cache.cells.position.size(1) == 9


def test_a_cache_is_never_changed_so_one_can_go_back_to_it(tiny):
    model, x = tiny(), ids()
    before = model(x[:, :4]).cache
    model(x[:, 5:6], None, before)  # another continuation
    again = model(x[:, 4:], None, before)
    torch.testing.assert_close(again.logits, model(x).logits[:, 4:])


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_cache_cut_to_the_window_equals_a_window_over_everything(tiny, window):
    model, x, cache = tiny(observer="quarters"), ids(cells=12), None
    for c, at_once in enumerate(model(x, window=window).logits.unbind(dim=1)):
        out = model(x[:, c : c + 1], None, cache, window)
        cache = out.cache.last(window)
        torch.testing.assert_close(out.logits[:, 0], at_once)
    assert cache.layers[0][0].size(2) == min(window, 12), "memory is the window's"


def test_one_layer_with_a_window_knows_the_last_cells_and_nothing_else(tiny):
    model, x = tiny(n_layer=1), ids(cells=12)
    seen = model(x, window=4).logits
    for c in range(12):
        torch.testing.assert_close(seen[:, c], model(x[:, max(0, c - 3) : c + 1]).logits[:, -1])


def test_behind_a_cut_it_is_as_if_the_stream_began_there(tiny):
    """For only distances matter to rotary positions."""
    model, x, c = tiny(), ids(), torch.arange(9).expand(3, 9)
    out = model(x, Cells(c, segment=(c >= 4).long()))
    torch.testing.assert_close(out.logits[:, 4:], model(x[:, 4:]).logits)
    torch.testing.assert_close(out.logits[:, :4], model(x[:, :4]).logits)


def test_absent_cells_change_nothing(tiny):
    model, x, there = tiny(observer="quarters"), ids(rows=1), torch.tensor([0, 1, 4, 5, 8])
    seen = torch.isin(torch.arange(9), there)[None]
    out = model(x, Cells(seen.cumsum(dim=1) - seen.long(), seen=seen))
    torch.testing.assert_close(out.logits[:, there], model(x[:, there]).logits)


def cells_of(rows):
    """Rows of (position, segment, seen, sees_all) -> Cells of one sequence."""
    position, segment, seen, sees_all = torch.tensor(rows).T[:, None]
    return Cells(position, segment, seen.bool(), sees_all.bool())


@pytest.mark.parametrize("seed", range(6))
def test_who_sees_whom_rule_by_rule(seed):
    draw, C, window = seeded(seed), 10, (0, 3)[seed % 2]
    gaps, cuts, seen, opens = torch.randint(4, (4, C), generator=draw)
    columns = [(gaps > 0).cumsum(0), (cuts == 0).cumsum(0), seen > 0, opens == 0]
    cells = cells_of(torch.stack([column.long() for column in columns], dim=1).tolist())
    found = visible(cells.part(slice(4, None)), cells, window)[0]  # the last six ask
    for query in range(4, C):
        for key in range(C):
            position, segment, is_seen, sees_all = (part[0].tolist() for part in cells)
            sees = key < query and is_seen[key]
            if not sees_all[query]:
                sees = sees and segment[key] == segment[query]
                sees = sees and (not window or position[query] - position[key] < window)
            assert found[query - 4, key] == (sees or key == query)


def test_no_mask_is_made_where_a_cell_sees_all_before_it():
    cells = Cells(torch.arange(5)[None])
    assert visible(cells, cells) is None


# ----------------------------------------------------------------------------------------------
# thoughts


def test_the_bits_of_a_number_by_hand():
    found = Thoughts(3, 2).bits(torch.tensor([0, 1, 2, 4, 6, 7])).tolist()
    assert found[:4] == [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    assert found[4:] == [[-1, 1, 1], [1, 1, 1]]


def test_a_thoughts_embedding_is_linear_in_its_bits():
    thoughts = Thoughts(2, 3)
    W, b = thoughts.embedding.weight, thoughts.embedding.bias.data.normal_()
    signs = [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    by_hand = torch.stack([b + x * W[:, 0] + y * W[:, 1] for x, y in signs])
    torch.testing.assert_close(thoughts(torch.arange(4)), by_hand)


H = torch.tensor([0.1, -0.4, 0.0])


def probabilities():
    """p of each thought (8,) at the numbers H, by hand: Phi(tanh(h) / 0.2) for each bit."""
    p = [0.5 * (1 + math.erf(math.tanh(h) / 0.2 / math.sqrt(2))) for h in H.tolist()]
    bits = [[number >> i & 1 for i in range(3)] for number in range(8)]
    each = [math.prod(q if bit else 1 - q for q, bit in zip(p, number)) for number in bits]
    return torch.tensor(each)


def test_the_probability_of_a_thought_by_hand_and_all_of_them_sum_to_one():
    found = Thoughts(3, 4).log_probability(H.expand(8, 3), torch.arange(8)).exp()
    torch.testing.assert_close(found, probabilities())
    assert found.sum().item() == pytest.approx(1)


def test_drawn_thoughts_have_those_probabilities():
    drawn = Thoughts(3, 4).draw(H.expand(20_000, 3), seeded(0))
    share = torch.bincount(drawn, minlength=8) / 20_000
    torch.testing.assert_close(share, probabilities(), atol=0.012, rtol=0)


def test_the_likeliest_thought_has_the_bits_whose_numbers_are_positive():
    h = torch.tensor([[0.1, -0.4], [-0.1, 0.2], [0.0, 0.0]])
    assert Thoughts(2, 4).likeliest(h).tolist() == [1, 2, 0], "0 is a bit that is not set"


def test_an_echo_is_zero_and_its_gradient_is_that_of_bits_that_are_tanh():
    thoughts, h = Thoughts(3, 5), torch.randn(2, 4, 3, requires_grad=True)
    g = torch.randn(2, 4, 5)
    value = thoughts.echo(h)
    assert value.shape == g.shape and not value.any()
    (value * g).sum().backward()
    by_hand = (g @ thoughts.embedding.weight) * (1 - h.detach().tanh() ** 2)
    torch.testing.assert_close(h.grad, by_hand)
    assert not thoughts.embedding.weight.grad.any(), "what is zero moves no weight"


# ----------------------------------------------------------------------------------------------
# the observer


def test_which_layers_are_watched():
    found = [GPTConfig(n_layer=n, observer="quarters").watched() for n in (1, 2, 4, 40)]
    assert found == [[0], [0, 1], [1, 2, 3], [10, 20, 30]]
    assert GPTConfig(n_layer=4, observer="3,0").watched() == [0, 3]
    assert GPTConfig(n_layer=4).watched() == []
    for bad in ("thirds", "4", "-1"):
        with pytest.raises(ValueError, match="observer"):
            GPTConfig(n_layer=4, observer=bad).watched()


def test_the_observer_is_one_more_head_that_looks_at_the_layers_below(tiny):
    model, hs, C = tiny(n_layer=3, observer="0,2"), 8, 5
    inputs, block = [], model.blocks[-1]
    for each in model.blocks:
        each.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    out, observer = model(ids(rows=1, cells=C)), block.attention.observer
    watched = torch.cat([inputs[0], inputs[2]], dim=-1)  # outputs of embedding and second layer
    q = observer.q(block.norm1(inputs[2]))[0]
    k, v = observer.kv(watched)[0].split(hs, dim=-1)
    angle = torch.arange(C)[:, None] * 100 ** (-torch.arange(hs // 2) / (hs // 2))

    def turned(z):
        z = torch.complex(*z.split(hs // 2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    for c in range(C):
        weight = (turned(k)[: c + 1] @ turned(q)[c] / hs**0.5).softmax(dim=0)
        read = observer.read(weight @ v[: c + 1] + v[c])  # its own value once more
        p = out.logits[0, c].softmax(dim=-1)
        read[0] -= (p * p.log()).sum()  # predicted loss: the entropy, and what the head adds
        torch.testing.assert_close(out.readings[0, c], read)


def test_the_observer_moves_nothing_that_it_watches(tiny):
    model = tiny(observer="quarters")
    model(ids()).readings.sum().backward()
    touched = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    reached = [name for name, gradient in touched if gradient.any()]
    assert reached and all(".observer." in name for name in reached)


# ----------------------------------------------------------------------------------------------
# weights from elsewhere, and the optimisers

MATRICES = ("attention.qkv", "attention.proj", "up", "down")


@pytest.mark.parametrize("more", [{"observer": "quarters"}, {"recall": True}, {"revise": True}])
def test_what_is_new_has_no_effect_yet(tiny, more):
    small, large = tiny(), tiny(seed=1, **more)
    warm_start(large, small.state_dict())
    known, found = small(ids()), large(ids())
    torch.testing.assert_close(found.logits[..., :V], known.logits)
    torch.testing.assert_close(found[1:3], known[1:3])  # what it thinks, and when


def test_a_plain_gpt_may_learn_to_think(tiny):
    plain, thinker = tiny(n_bits=0), tiny(seed=1)
    warm_start(thinker, plain.state_dict())
    torch.testing.assert_close(thinker(ids(total=V)).logits, plain(ids(total=V)).logits)


@pytest.mark.parametrize("other", [{"n_embd": 32}, {"n_layer": 1}, {"n_layer": 3}, {"n_bits": 3}])
def test_weights_that_do_not_fit_are_refused(tiny, other):
    with pytest.raises(ValueError, match="another shape"):
        warm_start(tiny(), tiny(**other).state_dict())


def test_gpt2_emits_what_it_does_in_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 12}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **sizes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = GPT(GPTConfig(vocab_size=V, n_bits=2, observer="quarters", **sizes)).eval()
    warm_start(ours, from_gpt2(theirs.state_dict()))
    x = ids(total=V)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_gates_and_observer_have_their_own_learning_rate_and_only_matrices_decay(tiny):
    model = tiny(observer="quarters", recall=True)
    names = {p: name for name, p in model.named_parameters()}
    muon, adam = model.optimisers(1e-3, 5e-3, 0.1)
    groups = [*muon.param_groups, *adam.param_groups]
    blocks, matrices, gates, rest = ({names[p] for p in group["params"]} for group in groups)
    assert [group["peak_lr"] for group in groups] == [1e-3, 1e-3, 5e-3, 1e-3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0, 0]
    assert sum(map(len, (blocks, matrices, gates, rest))) == len(names)
    assert all("gate." in name or ".observer." in name for name in gates) and len(gates) == 14
    assert blocks == {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in MATRICES}
    assert "head.weight" in matrices and "embedding.weight" in rest


# ----------------------------------------------------------------------------------------------
# choices


def saying(gate=0.0, worth=0.0, rows=2000):
    """The output of so many cells that all have the same gate and reading."""
    gate = torch.full((rows, 1), gate)
    readings = torch.tensor([0.0, worth, 0.0]).expand(rows, 1, 3)
    logits, h = torch.zeros(rows, 1, V), torch.zeros(rows, 1, 2)
    return Output(logits, h, gate, gate, readings, None, None)


def test_a_gate_says_yes_where_its_logit_is_positive_unless_it_is_forced():
    logit = torch.tensor([-torch.inf, -0.1, 0.1, 9.0]).expand(2000, 4)
    assert decide(logit, None)[0].tolist() == [False, False, True, True]
    shares = [decide(logit, force, seeded(0)).float().mean().item() for force in (0.0, 0.3, 1.0)]
    assert shares == pytest.approx([0, 0.3, 1], abs=0.03)


def test_when_it_thinks():
    def share(out, run, **how):
        return wants_to_think(out, run, Thinking(**how), seeded(0)).float().mean().item()

    assert [share(saying(logit), 0) for logit in (-0.1, 0.1)] == [0, 1], "as its gate says"
    assert share(saying(-9.0), 0, force=0.3) == pytest.approx(0.3, abs=0.03)
    assert share(saying(-9.0), 1, force=0.3) == 1, "what is forced is a run of thoughts"
    assert share(saying(9.0, worth=0.1), 0, price=0.2, force=1.0) == 0, "not worth its price"
    assert share(saying(-9.0, worth=0.3), 0, price=0.2, force=0.0) == 1


def test_what_it_thinks_instead(tiny):
    model, h = tiny(), torch.tensor([[9.0, 9.0], [9.0, -9.0], [-9.0, -9.0]])

    def thought(mode, **how):
        return choose_thought(model, h, Thinking(mode, **how), seeded(0)).tolist()

    assert thought("policy") == thought("policy", greedy=True) == [3, 1, 0]
    assert thought("swapped") == [0, 3, 1], "what the sequence before it in the batch thinks"
    assert thought("constant", constant=2) == [2, 2, 2]
    h = h[:1].expand(4000, 2)
    count = torch.bincount(torch.tensor(thought("random")))
    assert count.tolist() == pytest.approx([1000] * 4, abs=100)


def test_tokens_are_drawn_by_their_logits_temperature_and_top_k():
    logits = torch.tensor([0.0, 1.0, -2.0])

    def share(temperature, top_k):
        draw = seeded(0)
        drawn = [choose_token(logits, temperature, top_k, draw) for _ in range(3000)]
        return torch.bincount(torch.tensor(drawn), minlength=3) / 3000

    assert choose_token(logits, 0.0, 0) == 1
    torch.testing.assert_close(share(1.0, 0), logits.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(share(2.0, 0), (logits / 2).softmax(0), atol=0.03, rtol=0)
    best = logits[:2].softmax(0)
    torch.testing.assert_close(share(1.0, 2)[:2], best, atol=0.03, rtol=0)
    assert share(1.0, 2)[2] == 0 and share(1.0, 1)[1] == 1


# ----------------------------------------------------------------------------------------------
# generate

REVISIONS = V - 1  # one token is always left to emit


def slow_generate(model, prompt, new_tokens, thinking, draw, temperature):
    """
    No cache, no stack of them: the whole stream again for each cell. `places` remembers of each
    token the stream that emitted it, whether that recalled, and what was taken back there
    -> tokens, and what happened.
    """
    config, window = model.config, thinking.window
    stream, tokens, places, happened, run = prompt[:1], prompt[:1], [], [], 0
    revisions = 0
    while len(tokens) < len(prompt) + new_tokens:
        out = model(torch.tensor([stream]), window=window)
        may_revise = config.revise and len(tokens) > len(prompt) and not run
        if may_revise and revisions < REVISIONS and out.logits[0, -1].softmax(dim=0)[V] > 0.5:
            happened.append(("revise", tokens.pop()))
            revisions += 1
            stream, recalls, taken_back = places.pop()
            taken_back = [*taken_back, happened[-1][1]]
        else:
            taken_back = []
            if run < thinking.max_run and wants_to_think(out, run, thinking, draw):
                thought = V + int(choose_thought(model, out.thoughts[:, -1], thinking, draw))
                stream, run = [*stream, thought], run + 1
                happened.append(("think", thought))
                continue
            recalls = config.recall and bool(decide(out.recall[:, -1], None))
            happened += [("recall", RECALL)] * recalls
        there = torch.tensor([stream + [RECALL] * recalls])
        looks = there == RECALL
        cells = Cells(torch.arange(there.size(1))[None], seen=~looks, sees_all=looks)
        logits = model(there, cells, window=window).logits[0, -1, :V]
        logits[taken_back] = -torch.inf
        places.append((stream, recalls, taken_back))
        token, run = choose_token(logits, temperature, 0, draw), 0
        token = prompt[len(tokens)] if len(tokens) < len(prompt) else token
        stream, tokens = [*stream, token], [*tokens, token]
        happened.append(("token", token))
    return tokens, happened


def test_generate_equals_a_loop_without_a_cache(tiny):
    met = set()
    for seed in range(32):
        recall, revise = seed % 2 == 1, seed % 4 > 1
        model = tiny(seed, recall=recall, revise=revise, observer=("", "quarters")[seed // 16])
        if revise:
            model.head.bias.data[V] += 2
        window, greedy = (0, 5)[seed // 4 % 2], seed % 5 == 0
        thinking, happened = Thinking(max_run=1 + seed % 3, window=window, greedy=greedy), []
        with torch.no_grad():
            known = slow_generate(model, [1, 4, 2], 12, thinking, seeded(seed), float(not greedy))
        how = {"revisions": REVISIONS, "watch": lambda *event: happened.append(event)}
        tokens = generate(model, [1, 4, 2], 12, thinking, seeded(seed), float(not greedy), **how)
        assert (tokens, happened[1:]) == known and happened[0] == ("token", 1), seed
        met |= {(what, window) for what, _ in happened}
    assert len(met) == 8, "token, think, recall and revise, each with and without a window"


class Scripted(torch.nn.Module):
    """After each token it emits what `then` says, the first of it unless that was taken back."""

    def __init__(self, then, regrets=(), thinks=()):
        super().__init__()
        self.config = GPTConfig(vocab_size=V, n_bits=2, n_layer=1, revise=True)
        self.embedding, self.thoughts = torch.nn.Embedding(V, 2), Thoughts(2, 2)
        self.then, self.regrets, self.thinks, self.fed = then, regrets, thinks, []

    def forward(self, x, cells=None, cache=None, window=0):
        cell = int(x)
        length = cache.cells.position.size(1) if cache else 0
        self.fed.append((cell, length))
        logits = torch.full((1, 1, V + 1), -9.0)
        for rank, token in enumerate(self.then.get(cell, ())):
            logits[0, 0, token] = 5.0 - rank
        logits[0, 0, V] = 9.0 if cell in self.regrets else -9.0
        gate = torch.full((1, 1), 9.0 if cell in self.thinks else -9.0)
        h = torch.full((1, 1, 2), 9.0)  # thought 3
        cells = Cells(torch.arange(length + 1)[None])
        return Output(logits, h, gate, gate - 99, h[..., :0], None, Cache([], cells))


def run(model, prompt, new_tokens, after=None, **how):
    """Greedily -> tokens, and in words what happened."""
    names, happened = {"token": "%d", "think": "[%d]", "revise": "not %d"}, []
    how |= {"watch": lambda what, token: happened.append(names[what] % token)}
    tokens = generate(model, prompt, new_tokens, Thinking(greedy=True, after=after), **how)
    return tokens, " ".join(happened)


def test_taking_back_returns_to_where_the_token_was_emitted_thoughts_and_cache_and_all():
    model = Scripted({0: [3], 8: [3, 4, 2], 2: [1]}, regrets=[3, 4], thinks=[0])
    tokens, happened = run(model, [0], 2)
    assert tokens == [0, 2, 1]
    assert happened == "0 [8] 3 not 3 4 not 4 2 1"
    assert model.fed == [(0, 0), (8, 1), (3, 2), (4, 2), (2, 2)], "the cell, and those before it"


def test_no_more_is_taken_back_than_is_allowed_and_nothing_of_the_prompt():
    model = Scripted({1: [3, 4, 2], 3: [1], 4: [1]}, regrets=[1, 3, 4])
    assert run(model, [1], 1)[1] == "1 3"
    assert run(model, [1, 3], 1)[1] == "1 3 1"
    assert run(model, [1], 3, revisions=1)[1] == "1 3 not 3 4 1 3"
    assert run(model, [1], 3, revisions=0)[1] == "1 3 1 3"


def test_a_token_is_always_left_to_emit():
    model = Scripted({1: [0, 1, 2, 3, 4]}, regrets=range(V))
    assert run(model, [1], 2, revisions=7)[0][1] == 4


def test_it_stops_at_the_stop_token_unless_that_is_given():
    model = Scripted({0: [1], 1: [2], 2: [3], 3: [4]})
    assert run(model, [0], 9, stop=3)[0] == [0, 1, 2, 3]
    assert run(model, [0, 3], 9, stop=3)[0][:3] == [0, 3, 4]
    assert run(model, [0], 2, stop=3)[0] == [0, 1, 2]


def test_it_thinks_only_after_what_a_thought_may_follow():
    after = torch.tensor([True, False, True, True, True])
    model = Scripted({0: [1], 8: [1], 1: [1]}, thinks=[0, 1])
    assert run(model, [0], 2, after)[1] == "0 [8] 1 1"


def test_thoughts_may_be_given_in_place_of_its_own():
    model = Scripted({0: [0], 5: [1], 6: [0]}, thinks=[0, 1])
    assert run(model, [0], 3, instead=[0, 1])[1] == "0 [5] 1 [6] 0 [5] 1"


def test_an_ablated_model_still_answers_without_or_with_other_thoughts(tiny):
    model = tiny(3)
    for mode in ("never", "random", "constant"):
        happened, thinking = [], Thinking(mode, constant=2, max_run=2)
        tokens = generate(model, [1], 12, thinking, seeded(0), watch=lambda *e: happened.append(e))
        thoughts = {number - V for what, number in happened if what == "think"}
        assert len(tokens) == 13 and max(tokens) < V, "no thought shows"
        assert thoughts == {"never": set(), "random": {0, 1, 2, 3}, "constant": {2}}[mode]


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny(), [], 3, Thinking())
