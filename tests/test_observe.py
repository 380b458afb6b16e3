"""Looking inside: it changes nothing, the numbers are right by hand, and the page can be read."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from conftest import call, grid_of, replay, small

import train
from data.dataset import DataError, Vocabulary
from lab import observe
from lab.observe import draw, look, page, shown, trace
from model import READINGS, Thinking, generate
from runs import save_checkpoint

LETTERS = Vocabulary({"vocab": list("abcde")})
GREEDY = Thinking(greedy=True, max_run=2)


def one(model, thinking=GREEDY, prompt=(0, 1, 2)):
    """-> grid of an answer to a prompt, how long the prompt is."""
    real = torch.tensor([generate(model, list(prompt), 9, thinking)])
    grid, _ = train.rollout(model, real, torch.tensor([real.size(1)]), thinking)
    return grid, len(prompt)


# ----------------------------------------------------------------------------------------------
# one pass, looked into


SOME = [(0, "", 0), (2, "", 0), (2, "quarters", 0), (0, "quarters", 3), (2, "quarters", 3)]


@pytest.mark.parametrize("n_bits, observer, window", SOME)
def test_looking_changes_nothing_and_the_last_layer_says_what_the_model_says(
    tiny, n_bits, observer, window
):
    model = tiny(n_bits=n_bits, observer=observer)
    ids = torch.randint(5 + model.config.n_think, (2, 9))
    plain, (output, sight) = model(ids, window=window), look(model, ids, window=window)
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], output[:5]))
    top = plain.logits.softmax(dim=-1).topk(3)
    assert torch.equal(sight.tokens[:, :, -1], top.indices)
    torch.testing.assert_close(sight.p[:, :, -1], top.values)
    assert sight.observer.shape == (2, 9, bool(observer))
    left = [block.attention._forward_hooks for block in model.blocks]
    assert not any(left), "nothing stays behind to slow the next pass"


def entropy(p) -> float:
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


@torch.no_grad()
def test_the_numbers_of_a_layer_by_hand(tiny):
    model = tiny(n_layer=3, observer="0,2")
    ids = torch.tensor([[0, 6, 3, 1]])
    _, sight = look(model, ids)
    angle = torch.arange(4)[:, None] * model.frequency
    turn = angle.cos(), angle.sin()
    below = [model.embed(ids)]
    for layer, block in enumerate(model.blocks):
        heads = block.attention.heads(block.norm1(below[-1]), below, turn)
        q, k, v = (part[0] for part in heads)  # (nh, C, hs)
        mixed = torch.zeros(4, 8 * len(q))
        for c in range(4):
            spread = []
            for head in range(len(q)):
                score = torch.stack([q[head, c] @ k[head, s] / 8**0.5 for s in range(c + 1)])
                p = score.softmax(dim=0)
                mixed[c, 8 * head : 8 * head + 8] = p @ v[head, : c + 1]
                spread.append(entropy(p))
            mean = sum(spread[:2]) / 2
            assert sight.attention[0, c, layer].item() == pytest.approx(mean, abs=1e-5)
            if layer == 2:
                assert sight.observer[0, c, 0].item() == pytest.approx(spread[2], abs=1e-5)
        x = below[-1] + block.attention.proj(mixed)
        below.append(x + block.down(block.gelu(block.up(block.norm2(x)))))
        for c in range(4):
            old, new = below[-2][0, c], below[-1][0, c]
            change = math.dist(old, new) / math.hypot(*old)
            cosine = (old @ new).item() / math.hypot(*old) / math.hypot(*new)
            lens = entropy(model.head(model.norm(new)).softmax(dim=0))
            assert sight.change[0, c, layer].item() == pytest.approx(change, rel=1e-4)
            assert sight.cosine[0, c, layer].item() == pytest.approx(cosine, abs=1e-5)
            assert sight.lens[0, c, layer].item() == pytest.approx(lens, abs=1e-5)
    # least squares through three points
    torch.testing.assert_close(sight.slope, (sight.lens[..., 2] - sight.lens[..., 0]) / 2)


# ----------------------------------------------------------------------------------------------
# traces


@pytest.mark.parametrize("window", [0, 4])
def test_a_trace_is_of_the_model_that_answered_cell_by_cell(tiny, window):
    model, thinking = tiny(observer="quarters"), Thinking(greedy=True, max_run=2, window=window)
    grid, given = one(model, thinking)
    found, heard = trace(model, grid, given, thinking, LETTERS), []
    generate(model, [0, 1, 2], 9, thinking, watch=lambda what, number: heard.append(number))
    cells, cache = found["cells"], None
    assert [cell["token"] for cell in cells] == heard[:-1], "what it thought when it answered"
    real = [cell for cell in cells if not cell["thought"]]
    assert [cell["own"] for cell in real] == [False] * 3 + [True] * 8 and found["last"]["own"]
    assert len(real) < len(cells)
    for i, cell in enumerate(cells):
        out = model(torch.tensor([[cell["token"]]]), None, cache, window)
        cache, log_p = out.cache, out.logits[0, 0].log_softmax(dim=0)
        assert cell["loss"] == pytest.approx(-log_p[LETTERS.index[cell["next"]]].item(), abs=1e-3)
        readings = [cell[name] for name in READINGS]
        assert readings == pytest.approx(out.readings[0, 0].tolist(), abs=1e-3)
        assert cell["gate"] == pytest.approx(out.gate[0, 0].sigmoid().item(), abs=1e-3)
        assert cell["thinks"] == (i + 1 < len(cells) and cells[i + 1]["thought"])
        run = i - max(j for j in range(i + 1) if not cells[j]["thought"])
        assert cell["asked"] == (run < 2), "behind the second thought the gate has no choice"
        if cell["thought"]:
            before, behind = (cells[j]["layers"][-1]["tokens"][0] for j in (i - 1, i))
            assert (cell["without"], cell["with"]) == (before, behind)
            assert cell["text"] == f"[{cell['token'] - 5}]" and cells[i - 1]["next"] == cell["next"]


def test_what_a_model_does_not_have_its_trace_does_not_hold(tiny):
    for model in (tiny(n_bits=0), tiny(n_bits=0, observer="quarters"), tiny()):
        ids = torch.tensor([[0, 1, 2, 3]])
        grid, _ = train.rollout(model, ids, torch.tensor([4]), GREEDY)
        found = trace(model, grid, 4, GREEDY, LETTERS)
        cell = found["cells"][0]
        assert ("gate" in cell) == bool(model.config.n_bits)
        assert ("predicted_loss" in cell) == bool(model.config.observer)
        assert visible_text(found) == "abcd"
        assert not any(c["own"] for c in found["cells"] + [found["last"]]), "it only read"


def test_what_recall_sees_is_what_a_rollout_sees(tiny):
    model = tiny(recall=True, revise=True)
    grid = grid_of([[0, 6, 1, 7, 9, 2, 9, 3, 4]])
    loss = replay(model, grid, 2).loss[grid.present]
    how = Thinking(greedy=True, max_run=2, window=2)
    cells = trace(model, grid, 5, how, LETTERS)["cells"]
    assert [cell["loss"] for cell in cells] == pytest.approx(loss.tolist(), abs=1e-3)
    texts = " ".join(cell["text"] for cell in cells)
    assert texts == "a [1] b [2] [recall] c [recall] d"


def test_of_a_long_text_the_beginning_is_read_through_the_window_of_training(tiny, monkeypatch):
    monkeypatch.setattr(observe, "LONGEST", 12)
    model, progress = tiny(), {"paid": True, "step": 7}
    state = {"config": {"block": 2, "max_run": 2}, "meta": {"task": "abc"}, "progress": progress}
    config = observe.ObserveConfig(input="some file")
    found = observe.make_trace(["abcd" * 5, "ab"], config, model, LETTERS, state)
    assert found["task"] == "abc" and found["step"] == 7 and "20 tokens" in found["notes"][0]
    assert [visible_text(sequence) for sequence in found["sequences"]] == ["abcd" * 3, "ab"]
    thinking = Thinking(greedy=True, max_run=2, window=6)
    ids = torch.tensor([[0, 1, 2, 3] * 3])
    grid, _ = train.rollout(model, ids, torch.tensor([12]), thinking)
    assert found["sequences"][0] == trace(model, grid, 12, thinking, LETTERS)


def test_a_character_in_two_tokens_is_shown_once():
    vocabulary = Vocabulary({"vocab": ["?", "?", "a"]})
    vocabulary.pieces = [b"\xc3", b"\xa9", b"a"]
    assert shown([2, 0, 3, 1, 2], vocabulary, 5) == ["a", "", "[0]", "é", "a"]
    assert shown([2, 0], vocabulary, 5) == ["a", "\ufffd"]
    assert shown([2, 4, 3], vocabulary, 4) == ["a", "[recall]", "[0]"]


# ----------------------------------------------------------------------------------------------
# the page

HOSTILE = ["<script>owned = 1</script>", "</script>", "&amp;", "\"'`", "\n", "<!--"]
HOSTILE += ["<img src=x onerror='owned = 1'>", "\u2028 $x$ {TRACE_GOES_HERE}"]


def whole(*sequences, task="letters"):
    return {"task": task, "run": "", "step": 0, "notes": [], "sequences": [*sequences]}


@pytest.fixture
def traced(tiny):
    model = tiny(observer="quarters")
    return whole(trace(model, *one(model), GREEDY, LETTERS))


def visible_text(sequence) -> str:
    cells = [cell for cell in sequence["cells"] if not cell["thought"]]
    return "".join(cell["text"] for cell in [*cells, sequence["last"]])


def test_the_page_needs_nothing_but_itself(traced):
    html = page(traced)
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc\s*=|<link|@import|url\(|fetch\(", html)
    assert "default-src 'none'" in html


SHOWN = "result = [...sequences.querySelectorAll('.thought')]"
SHOWN += ".filter(t => t.offsetParent).map(t => t.textContent)"


def test_the_page_folds_thoughts_and_shows_what_would_have_been_said_without_them(traced, browse):
    sequence, html = traced["sequences"][0], page(traced)
    assert browse(html, "result = sequences.innerText.trim()") == visible_text(sequence)
    assert browse(html, SHOWN) == []
    said = []
    for cell in sequence["cells"]:
        if cell["thought"]:
            name, p = cell["without"]
            said.append(f"{cell['text']}else “{name}” {math.floor(100 * p + 0.5)}%")
    assert browse(html, "show_thoughts.click()\n" + SHOWN) == said
    assert browse(html, SHOWN, "#thoughts") == said


def test_the_colours_follow_the_choice_and_so_do_the_numbers(traced, browse):
    script = """result = radios.map(radio => {
      radio.click()
      const tokens = [...sequences.querySelectorAll('.token')]
      return tokens.map(t => [getComputedStyle(t).backgroundColor, t.dataset.number])
    })"""
    predicted, loss, gate = browse(page(traced), script)
    assert predicted != loss != gate != predicted
    cells = traced["sequences"][0]["cells"]
    emitters = [c for c, behind in pairwise(cells) if not behind["thought"]] + cells[-1:]
    numbers = [number for _, number in loss if number != "–"]
    assert numbers == [f"{c['loss']:.2f}" for c in emitters], "of the cell that emitted the token"


def test_the_keyboard_moves_from_token_to_token_and_each_tells_its_numbers(traced, browse):
    script = """
    const spans = [...shown.keys()], where = () => spans.indexOf(document.activeElement)
    sequences.querySelector('.token').focus()
    result = [where()]
    for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End']) {
      document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))
      result.push(where())
    }
    spans.at(-1).click()
    const style = getComputedStyle(document.activeElement)
    result.push(panel.innerText, document.activeElement.tabIndex, style.outlineStyle)
    spans.find(t => shown.get(t).thought).click()
    result.push(panel.innerText)"""
    *places, told, order, outline, thought = browse(page(traced), script, "#thoughts")
    count = len(traced["sequences"][0]["cells"])
    assert places == [0, 1, 2, 1, count]
    cell = traced["sequences"][0]["cells"][-1]
    assert f"{cell['loss']:.2f} nats" in told
    assert all(layer["tokens"][0][0] in told for layer in cell["layers"])
    assert order == 0 and outline in ("solid", "dashed")  # dashed where the window has no focus
    cell = next(cell for cell in traced["sequences"][0]["cells"] if cell["thought"])
    assert f"without it: “{cell['without'][0]}”" in thought and "The gate gave" in thought


def test_hostile_text_is_shown_and_never_run(tiny, browse, tmp_path):
    vocabulary = Vocabulary({"vocab": HOSTILE})
    model = tiny(vocab_size=len(HOSTILE), observer="quarters")
    grid, _ = train.rollout(model, torch.arange(8)[None], torch.tensor([8]), GREEDY)
    found = whole(trace(model, grid, 8, GREEDY, vocabulary), task=HOSTILE[0])
    found["notes"].append(HOSTILE[6])
    draw(found, tmp_path / "trace.png")  # a $ starts no formula
    script = """for (const t of shown.keys()) t.click()
    const texts = [...shown].filter(([t, x]) => !x.thought).map(([t]) => t.textContent)
    result = [typeof owned, texts.join(''), document.images.length]"""
    assert browse(page(found), script, "#thoughts") == ["undefined", "".join(HOSTILE), 0]


# ----------------------------------------------------------------------------------------------
# as a person runs it


@pytest.fixture(scope="module")
def runs(chains, tmp_path_factory):
    """-> folders of a plain model and of one with an observer."""
    folders = []
    for kind in ({"n_bits": 0}, {"observer": "quarters", "n_layer": 2}):
        folders.append(tmp_path_factory.mktemp("run"))
        trainer = train.Trainer(small(chains, folders[-1], **kind))
        save_checkpoint(folders[-1] / "checkpoint.pt", trainer.state())
    return folders


def test_observe_as_a_person_runs_it(runs, tmp_path):
    plain, watched = runs
    out, text = tmp_path / "trace", tmp_path / "rows.txt"
    call("lab/observe.py", f"--run={watched}", f"--out={out}", "1+2=", "2*2*2=", check=True)
    found = json.loads((out / "trace.json").read_text())
    assert len(found["sequences"]) == 2 and "has learned nothing yet" in found["notes"][0]
    assert (out / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert "TRACE_GOES_HERE" not in (out / "trace.html").read_text()
    text.write_text("1+2=0\n2*2=1\n")
    observe.main([f"--run={plain}", f"--out={out}", f"--input={text}"])
    found = json.loads((out / "trace.json").read_text())
    assert [visible_text(sequence) for sequence in found["sequences"]] == ["1+2=0", "2*2=1"]
    assert "gate" not in found["sequences"][0]["cells"][0] and not found["notes"]


REFUSED = {
    "": "either prompts or --input",
    "1+2= --input={text}": "either prompts or --input",
    "--input=nowhere.txt": "cannot read",
    "--input={empty}": "no text",
    "--out={text} 1+2=": "cannot write",
    "--teach 1": "two tokens",
    "7": "'7'",
    "--run=nowhere 1+2=": "no checkpoint",
    "--teech=true 1+2=": "'teach'",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_observed_is_refused_in_a_sentence(runs, tmp_path, arguments):
    text, empty = tmp_path / "rows.txt", tmp_path / "empty.txt"
    text.write_text("1+2=0\n")
    empty.write_text("\n")
    with pytest.raises(DataError, match=REFUSED[arguments]):
        observe.main([f"--run={runs[1]}", *arguments.format(text=text, empty=empty).split()])
