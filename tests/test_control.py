"""Control tokens: DONE, RECALL, REVISE. The loop in plain Python beside the real one, and what no token may do."""

import dataclasses
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import stream
from control import told
from data.dataset import Batch
from loss import first_pass, hybrid_loss, return_to_go, with_wrong_words, wrong_words
from runs import Config
from stream import Thinking, draw_noise, generate, load_dice, read, rollout, speak


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slow_speak(model, row, real, given, length, thinking, generator, stop=-1):
    """
    One row of a batch by itself, as the first note has it: no cache, all computed anew for every column, and a memory stack of copies.
    The batch's chance is drawn as it draws it, and the row takes its own -> stream, real tokens, words taken back.
    """
    V, K, runs, can, rows = model.config.vocab_size, model.config.n_think, thinking.max_run, model.config, len(real)
    noise = draw_noise(model, *real.shape, thinking, generator)
    real, given, length = real[row].tolist(), int(given[row]), int(length[row])
    stream, pointer, run, spent, stack, taken, forbidden = [real[0]], 1, 0, 0, [], [], {}
    chance = lambda p, uniform, hold: uniform < (hold if hold is not None else p.round() if thinking.greedy else p)  # noqa: E731
    while pointer < length:
        waits = torch.empty(rows, V)  # Gumbel noise is minus the logarithm of exponential waits
        words_noise = 0 if thinking.greedy else -waits.exponential_(generator=generator).log()[row]
        context = torch.tensor([token for token in stream[:-1] if token != V + K] + stream[-1:])  # a RECALL is seen by nobody but itself
        c, opened = torch.arange(len(context)), stream[-1] == V + K
        mask = (c[:, None] - c < (thinking.window or len(c))) & (c[:, None] >= c)
        mask[-1] |= opened
        words, thoughts, gate, go_on, recall, _ = (y[0, -1] for y in model(context[None], mask))
        regrets = can.revise and words.softmax(dim=-1)[-1] > 0.5
        words = words[:V].clone()
        words[list(forbidden.get(pointer, []))] = -torch.inf
        word = int((words + words_noise).argmax())
        if regrets and pointer > given and len(taken) < thinking.revisions and len(forbidden.get(pointer - 1, [])) < V - 1:
            stream, run = stack.pop()
            pointer -= 1
            taken.append([pointer, real[pointer]])
            forbidden = {place: some for place, some in forbidden.items() if place <= pointer}
            forbidden.setdefault(pointer, set()).add(real[pointer])
            continue
        place = (pointer - 1) * runs + run
        may = K and thinking.mode != "never" and run < runs and not opened and not (thinking.budget and spent >= thinking.budget)
        hold = None if thinking.hold is None else thinking.hold if run == 0 else 1.0
        if may and chance((go_on if run else gate).sigmoid(), noise.think[row, place], hold):
            drawn = [0.0] * len(thoughts) if noise.thought is None else noise.thought[row, place]
            bits = [math.tanh(h) + 0.3 * e > 0 for h, e in zip(thoughts.tolist(), drawn)]
            thought = sum(2**i for i, bit in enumerate(bits) if bit)
            stream, run, spent = stream + [V + thought], run + 1, spent + 1
        elif can.recall and not opened and chance(recall.sigmoid(), noise.recall[row, pointer - 1], thinking.hold_recall):
            stream, run = stream + [V + K], 0
        else:
            stack.append((list(stream), run))
            if pointer >= given:
                real[pointer] = word
                length = pointer + 1 if word == stop else length
            stream, pointer, run = stream + [real[pointer]], pointer + 1, 0
    return stream[:-1], real[:length], taken


def some_model(tiny, case):
    """A random model with random control tokens, far from its start; and how it is to think."""
    draw = seeded(case)
    pick = lambda options: options[int(torch.randint(len(options), (), generator=draw))]  # noqa: E731
    bits, layers, coin = pick([0, 2]), pick([1, 2]), [True, False]
    control = {"done": bool(bits) and pick(coin), "recall": pick(coin)}
    control["revise"] = pick([True, *coin])
    model = tiny(case, n_bits=bits, n_layer=layers, observer=pick(["", "0"]), **control)
    with torch.no_grad():
        if model.regret is not None:
            model.regret.bias += pick([0.0, 2.0])
        if model.gate is not None:
            model.gate.bias += pick([-1.0, 0.0, 3.0])
    thinking = Thinking(
        max_run=pick([1, 2, 4]), window=pick([0, 2, 5]), budget=pick([0, 0, 3]), revisions=pick([0, 1, 4, 9]), greedy=pick([True, False]),
        hold=pick([None, None, 0.5]), hold_recall=pick([None, None, 0.0, 1.0]),
    )  # fmt: skip
    return model, thinking, pick


@pytest.mark.parametrize("case", range(60))
def test_the_loop_in_a_batch_with_a_cache_equals_the_loop_of_one_row_without(tiny, case):
    model, thinking, pick = some_model(tiny, case)
    real = torch.randint(5, (4, 9), generator=seeded(case))
    given, length, stop = torch.tensor([1, 2, 5, 9]), torch.tensor([9, 7, 9, 9]), pick([-1, 3])
    roll = speak(model, real, given, length, thinking, seeded(7), stop)
    for b in range(4):
        stream, said, taken = slow_speak(model, b, real, given, length, thinking, seeded(7), stop)
        assert roll.stream[b][roll.valid[b]].tolist() == stream
        assert roll.real[b, : roll.length[b]].tolist() == said
        assert [pair for pair in roll.taken[b].tolist() if pair[0] >= 0] == taken


def test_the_cases_above_do_everything(tiny):
    seen = {"thoughts": 0, "recalls": 0, "words taken back": 0, "twice in one place": 0}
    for case in range(60):
        model, thinking, _ = some_model(tiny, case)
        roll = speak(model, torch.randint(5, (4, 9), generator=seeded(case)), torch.tensor([1, 2, 5, 9]), torch.tensor([9, 7, 9, 9]), thinking, seeded(7))
        places = roll.taken[..., 0]
        seen = {
            "thoughts": seen["thoughts"] + int(roll.thinks.sum()),
            "recalls": seen["recalls"] + int(roll.recalls.sum()),
            "words taken back": seen["words taken back"] + int((places >= 0).sum()),
            "twice in one place": seen["twice in one place"] + int(((places[:, 1:] >= 0) & (places[:, 1:] == places[:, :-1])).sum()),
        }
    assert min(seen.values()) > 10, seen


def test_where_all_words_are_given_both_loops_walk_the_same_way(tiny):
    for case in range(20):
        model, thinking, _ = some_model(tiny, case)
        thinking = dataclasses.replace(thinking, budget=0)  # nobody trains on a budget
        real, length = torch.randint(5, (4, 9), generator=seeded(case)), torch.tensor([9, 7, 3, 8])
        walked, spoken = rollout(model, real, length, thinking, seeded(1)), speak(model, real, length, length, thinking, seeded(1))
        for row in range(4):
            for a, b in zip(walked.alone(row)[:6], spoken.alone(row)[:6]):
                assert torch.equal(a, b)


@pytest.mark.parametrize("record", [stream.as_graph, lambda step, state: make_fx(step)(*(x.clone() for x in state))], ids=["called", "recorded"])
def test_a_column_that_sees_its_whole_buffer_is_the_same_column_and_can_be_recorded(tiny, monkeypatch, record):
    """What a CUDA graph needs: the same shapes at every column, and nothing that Python would have to look at. Its stand-in here replays the recorded operations."""
    monkeypatch.setattr(stream, "as_graph", record)
    for case in range(15):
        model, thinking, _ = some_model(tiny, case)
        model, real, length = model.double(), torch.randint(5, (4, 9), generator=seeded(case)), torch.tensor([9, 7, 3, 8])
        usual, whole = (rollout(model, real, length, thinking, seeded(1), graph=graph) for graph in (False, True))
        assert all(map(torch.equal, usual[:-1], whole[:-1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_column_as_a_cuda_graph_is_the_same_column(tiny):
    for case in range(15):
        model, thinking, _ = some_model(tiny, case)
        real, length = torch.randint(5, (4, 9), generator=seeded(case)).cuda(), torch.tensor([9, 7, 3, 8]).cuda()
        noise = torch.Generator("cuda").manual_seed(1)
        start = noise.get_state()
        usual = rollout(model.double().cuda(), real, length, thinking, noise)
        noise.set_state(start)
        assert all(map(torch.equal, usual[:-1], rollout(model, real, length, thinking, noise, graph=True)[:-1]))


def test_no_thought_and_no_control_token_is_ever_said_and_every_budget_holds(tiny):
    """Hundreds of random models and prompts here, thousands by `python control.py hidden`."""
    for case in range(300):
        model, thinking, pick = some_model(tiny, case)
        V, K, new = 5, model.config.n_think, pick([1, 4, 7])
        prompts = [torch.randint(V, (pick([1, 2, 6]),), generator=seeded(case + row)).tolist() for row in range(3)]
        heard = []
        answers, roll = generate(model, prompts, new, thinking, seeded(case), watch=heard.append)
        assert all(len(answer) == new and max(answer) < V for answer in answers)
        assert all(roll.real[b, : len(prompt)].tolist() == prompt for b, prompt in enumerate(prompts)), "what was given is not taken back"
        run, longest = torch.zeros(3, dtype=torch.long), 0
        for column in roll.thinks.T:
            run = (run + 1) * column
            longest = max(longest, int(run.max()))
        assert longest <= thinking.max_run and (not thinking.budget or roll.thinks.sum(dim=1).max() <= thinking.budget)
        assert ((roll.taken[..., 0] >= 0).sum(dim=1) <= thinking.revisions).all()
        assert not (roll.recalls & roll.opens).any(), "one RECALL a word"
        assert ((roll.stream[roll.valid] >= V) == ~roll.holds_real[roll.valid]).all() and roll.stream.max() <= V + K


# ----------------------------------------------------------------------------------------------
# training


def test_one_pass_over_a_stream_sees_what_was_seen_column_by_column(tiny):
    for case in range(20):
        model, thinking, _ = some_model(tiny, case)
        real, length = torch.randint(5, (3, 8), generator=seeded(case)), torch.tensor([8, 5, 8])
        roll = rollout(model, real, length, dataclasses.replace(thinking, greedy=True), seeded(1))
        out, run = read(model, roll), ~(roll.holds_real | roll.opens)
        if thinking.hold is None and model.config.n_think and thinking.max_run == 1:
            assert torch.equal((out.thinking(run) > 0)[roll.decides], roll.thinks[roll.decides])
        if thinking.hold_recall is None and model.config.recall:
            assert torch.equal((out.recall > 0)[roll.may_recall], roll.recalls[roll.may_recall])


def test_recall_sees_past_the_window_and_past_a_cut_and_nobody_else_does(tiny):
    model = tiny(n_bits=0, recall=True)
    roll = rollout(model, torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]), Thinking(hold_recall=1.0))._replace(stream=torch.tensor([[1, 2, 5, 3]]))
    roll = roll._replace(valid=torch.ones(1, 4, dtype=torch.bool))
    roll = roll._replace(recalls=torch.tensor([[False, True, False, False]]))  # columns 1, 2, RECALL, 3
    assert roll.position.tolist() == [[0, 1, 2, 2]], "it leaves no trace: the next column stands in its place, and does not see it"
    assert roll._replace(window=2).view()[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]]
    cut = torch.tensor([[False, True, False, False]])
    assert roll.view(cut=cut)[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]]
    assert roll._replace(recalls=torch.zeros(1, 4).bool()).view() is None, "causal, with everything in view"


def test_recall_has_its_price_by_hand(tiny):
    model = tiny(n_bits=0, recall=True)
    roll = rollout(model, torch.tensor([[1, 2, 3]]), torch.tensor([3]), Thinking(hold_recall=1.0))
    assert roll.stream.tolist() == [[1, 5, 2, 5]] and roll.recalls.tolist() == [[True, False, True, False]]
    loss = torch.tensor([[9.0, 1.0, 9.0, 2.0]])  # only the columns that speak count
    assert return_to_go(loss, roll, 0.0, recall_cost=0.5).tolist() == [[-4.0, -3.5, -2.5, -2.0]]
    assert return_to_go(loss, roll, 0.0, horizon=1, recall_cost=0.5).tolist() == [[-1.5, -1.0, -2.5, -2.0]]


def test_done_is_a_decision_of_its_own_beside_the_gate(tiny):
    model = tiny(done=True)
    x = torch.tensor([[1, 5, 6]])
    out = model(x)
    seen, _ = model.trunk(x)
    done = model.gate(seen)[..., 1].sigmoid()  # probability of DONE, inside a run
    torch.testing.assert_close(out.go_on.sigmoid(), 1 - done)
    in_runs = out.thinking(torch.tensor([[0, 1, 2]]))[:, 1:]
    torch.testing.assert_close(in_runs.sigmoid(), 1 - done[:, 1:])
    torch.testing.assert_close(out.thinking(0).sigmoid(), model.gate(seen)[..., 0].sigmoid())
    out.go_on.sum().backward()
    assert model.gate.weight.grad[1].abs().sum() > 0 and not model.gate.weight.grad[0].any()
    others = [p.grad for name, p in model.named_parameters() if not name.startswith("gate.")]
    assert others == [None] * len(others), "when to stop does not shape what is thought"


def test_wrong_words_stand_in_the_answer_and_are_wrong():
    real, length, prompt = torch.randint(5, (50, 8), generator=seeded(0)), torch.full((50,), 7), torch.full((50,), 4)
    batch = Batch.plain(real, length, prompt, length)
    wrong = wrong_words(batch, 5, 0.5, seeded(1))
    there = wrong >= 0
    assert not there[:, :4].any() and not there[:, 7:].any() and 0.4 < there[:, 4:7].float().mean() < 0.6
    assert (wrong != real)[there].all() and wrong.max() == 4
    assert (wrong_words(batch._replace(wrong=torch.full_like(real, 2)), 5, 0.5, seeded(1)) == 2).all(), "the data's own come first"


@pytest.mark.parametrize("case", range(6))
def test_a_wrong_word_beside_the_stream_says_what_it_would_say_in_its_place_and_nobody_sees_it(tiny, case):
    """One parallel pass against a pass for each wrong word, over the columns up to it and the word itself."""
    model = tiny(case, revise=True, recall=case % 2 > 0)
    window = (0, 4)[case // 3]
    real, length = torch.randint(5, (3, 8), generator=seeded(case)), torch.tensor([8, 5, 8])
    roll = rollout(model, real, length, Thinking(max_run=2, window=window), seeded(1))
    wrong = torch.full((3, 8), -1)
    wrong[0, 2], wrong[0, 6], wrong[1, 4], wrong[2, 1] = 4, 0, 3, 2
    word, there, position, mask = with_wrong_words(roll, wrong)
    C = roll.stream.size(1)
    out = model(torch.cat([roll.stream, word], dim=1), mask, position=position)
    torch.testing.assert_close(out.words[:, :C], read(model, roll).words)
    assert there.sum(dim=1).tolist() == [2, 1, 1]
    for b, place, e in ((0, 2, 0), (0, 6, 1), (1, 4, 0), (2, 1, 0)):
        end = int((roll.speaks[b] & (roll.pointer[b] == place)).int().argmax()) + 1
        kept = roll.stream[b, :end][~roll.opens[b, :end]]
        alone, c = torch.cat([kept, wrong[b, place : place + 1]])[None], torch.arange(len(kept) + 1)
        band = (c[:, None] - c < (window or len(c))) & (c[:, None] >= c)
        torch.testing.assert_close(out.words[b, C + e], model(alone, band).words[0, -1])


def test_a_wrong_word_weighs_as_much_as_a_right_one_by_hand(tiny):
    model = tiny(n_bits=0, revise=True)
    real = torch.tensor([[1, 2, 3, 4]])
    batch = Batch.plain(real, torch.tensor([4]), torch.tensor([2]), torch.tensor([0]))._replace(wrong=torch.tensor([[-1, -1, 0, -1]]))
    roll = rollout(model, real, batch.length, Thinking())
    here, config = model.embed(roll.stream), Config(n_bits=0, revise=True)
    _, regret = first_pass(model, here, roll, batch, config)
    alone = -model(torch.tensor([[1, 2, 0]])).words[0, 2].log_softmax(-1)[5]
    torch.testing.assert_close(regret, alone / 2)  # one wrong word, two words of the answer


def test_loaded_dice_make_a_row_think_what_it_is_told_and_leave_the_others_alone(tiny):
    model, real, length = tiny(2), torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([4, 4])
    told = torch.tensor([[[0, 2], [-1, -1], [1, -1], [-1, -1]]] * 2)
    for hold in (None, 1.0, 0.0):
        thinking = Thinking(max_run=3, hold=hold)
        noise = draw_noise(model, 2, 4, thinking, seeded(0))
        free = rollout(model, real, length, thinking, noise=noise)
        loaded = load_dice(model, noise, told, torch.tensor([[True], [False]]))
        roll = rollout(model, real, length, thinking, noise=loaded)
        assert roll.alone(0).stream.tolist() == [[1, 5, 7, 2, 3, 6]]
        assert roll.alone(1).stream.tolist() == free.alone(1).stream.tolist()


def test_a_row_thinks_as_before_but_another_rows_thought_at_one_place(tiny):
    """Of a prompt of four tokens, behind the last but `back`; what comes later it thinks itself."""
    model, real = tiny(2), torch.tensor([[1, 2, 3, 4, 0], [4, 0, 1, 2, 0]])
    batch = Batch.plain(real, torch.tensor([5, 5]), torch.tensor([4, 4]), torch.tensor([1, 1]))
    greedy, donor, differ = Thinking(greedy=True), torch.tensor([1, 0]), 0
    row = model, real, batch.prompt, batch.length, greedy
    for bias, thinks in ((99.0, True), (-99.0, False)):
        model.gate.bias.data.fill_(bias)
        roll = speak(*row)
        for back, behind in ((1, 2), (2, 1)):
            noise, there = told(model, roll, batch, 1, back, donor)
            assert there.tolist() == [thinks] * 2
            again, place = speak(*row, noise=noise), 2 * behind + 1  # where it stands
            if thinks:
                assert torch.equal(again.stream[:, :place], roll.stream[:, :place])
                assert torch.equal(again.stream[:, place], roll.stream[donor, place])
                number = model.thoughts.choose(read(model, again).thoughts) + 5
                assert torch.equal(again.stream[:, place + 2], number[:, place + 1])
                differ += (again.stream != roll.stream).any(dim=1).sum()
    assert differ >= 2


def test_demonstrated_thoughts_and_gates_are_supervised_by_hand(tiny):
    """Beside the words' loss: -log p of each thought where it is shown, and of the gate's choice wherever it had one."""
    model, real, length = tiny(2), torch.tensor([[1, 2, 3]]), torch.tensor([3])
    batch = Batch.plain(real, length, torch.tensor([2]), length)._replace(thoughts=torch.tensor([[[2], [-1], [-1]]]), shown=torch.tensor([True]))
    noise = draw_noise(model, 1, 3, Thinking(), seeded(0))
    loaded = load_dice(model, noise, batch.thoughts, batch.shown[:, None])
    roll = rollout(model, real, length, Thinking(), noise=loaded)
    assert roll.stream.tolist() == [[1, 7, 2]]
    config = Config(forget=0.0, imitate=0.0)
    taught, _ = hybrid_loss(model, roll, batch, config, False)
    alone, _ = hybrid_loss(model, roll, batch._replace(thoughts=batch.thoughts[:, :, :0]), config, False)
    out = model(roll.stream)
    gates = out.gate[0].sigmoid().log()[0] + (-out.gate[0]).sigmoid().log()[2]  # thinks behind 1, may and does not behind 2
    a, b = (math.tanh(h) / 0.3 for h in out.thoughts[0, 0].tolist())  # 2: bit 1 alone is set
    thought = sum(math.log((1 + math.erf(x / 2**0.5)) / 2) for x in (-a, b))  # both by Phi
    by_hand = -thought - gates.item() / 2
    torch.testing.assert_close((taught - alone).item(), by_hand, atol=1e-4, rtol=0)
    alone.backward()
    assert not model.thoughts.head.weight.grad.any(), "what is shown is told, not echoed"


def test_control_tokens_can_be_added_to_a_model_that_thinks(tiny):
    model, richer = tiny(observer=""), tiny(seed=1, done=True, recall=True, revise=True, observer="quarters")
    x = torch.randint(9, (2, 6), generator=seeded(0))
    with torch.no_grad():
        richer.gate.weight[:, 16:] = 0
    richer.adopt(model.state_dict())
    for name in ("thoughts", "gate"):
        torch.testing.assert_close(getattr(richer(x), name), getattr(model(x), name))
    torch.testing.assert_close(richer(x).words[..., :5], model(x).words)
