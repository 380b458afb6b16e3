"""Looking inside: the looking changes nothing, the numbers are right by hand, and the page is read in a browser."""

import json
import math
import re
import shutil
import subprocess
from itertools import groupby

import pytest
import torch
from conftest import call
from test_data import refused

from data.dataset import Vocabulary
from model import KVCache
from observe import draw, look, page, shown, trace
from sample import introspect
from stream import Rollout, Thinking, generate, rollout

LETTERS = Vocabulary({"vocab": list("abcde")})


def answer(model, window=0, prompt=(0, 1, 2), max_run=2) -> Rollout:
    return generate(model, [list(prompt)], 9, Thinking(greedy=True, max_run=max_run, window=window))[1]


# ----------------------------------------------------------------------------------------------
# one pass, looked into


SOME = [(0, "", 0), (2, "", 0), (2, "quarters", 0), (0, "quarters", 3), (2, "quarters", 3)]


@pytest.mark.parametrize("n_bits, observer, window", SOME)
def test_looking_changes_nothing_and_the_last_layer_says_what_the_model_says(
    tiny, n_bits, observer, window
):
    model = tiny(n_bits=n_bits, observer=observer)
    ids = 5 + model.config.n_think
    stream = torch.randint(ids, (2, 9), generator=torch.Generator().manual_seed(0))
    c = torch.arange(9)
    band = (c[:, None] >= c) & (c[:, None] - c < (window or 9))
    plain, (output, sight) = model(stream, mask=band), look(model, stream, band)
    assert all(torch.equal(a, b) for a, b in zip(plain, output))
    p = plain.words.softmax(dim=-1).topk(3)
    assert torch.equal(sight.words[:, :, -1], p.indices)
    torch.testing.assert_close(sight.p[:, :, -1], p.values)
    assert sight.observer.shape == (2, 9, bool(observer))
    assert not any(block.attention._forward_hooks for block in model.blocks), "nothing stays behind to slow the next pass"


def entropy(p) -> float:
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


@torch.no_grad()
def test_velocities_by_hand(tiny):
    model = tiny(n_layer=3, observer="0,2")
    stream = torch.tensor([[0, 6, 3, 1]])
    _, sight = look(model, stream)
    angle = torch.arange(4)[:, None] * model.frequency
    below = [model.embed(stream)]
    for layer, block in enumerate(model.blocks):
        q, k, v = (part[0] for part in block.attention.heads(block.norm1(below[-1]), below, angle.cos(), angle.sin()))  # (nh, C, hs)
        mixed = torch.zeros(4, 8 * len(q))
        for c in range(4):
            spread = []
            for head in range(len(q)):
                p = torch.stack([q[head, c] @ k[head, s] / 8**0.5 for s in range(c + 1)]).softmax(dim=0)
                mixed[c, 8 * head : 8 * head + 8] = sum(p[s] * v[head, s] for s in range(c + 1))
                spread.append(entropy(p))
            assert sight.attention[0, c, layer].item() == pytest.approx(sum(spread[:2]) / 2, abs=1e-5)
            if len(spread) == 3:
                assert sight.observer[0, c, 0].item() == pytest.approx(spread[2], abs=1e-5)
        x = below[-1] + block.attention.proj(mixed)
        below.append(x + block.down(block.gelu(block.up(block.norm2(x)))))
        for c in range(4):
            old, new = below[-2][0, c], below[-1][0, c]
            assert sight.change[0, c, layer].item() == pytest.approx(math.dist(old, new) / math.hypot(*old), rel=1e-4)
            assert sight.cosine[0, c, layer].item() == pytest.approx((old @ new).item() / math.hypot(*old) / math.hypot(*new), abs=1e-5)
            words = model.head(model.norm(new)).softmax(dim=0)
            assert sight.lens[0, c, layer].item() == pytest.approx(entropy(words), abs=1e-5)
    torch.testing.assert_close(sight.slope, (sight.lens[..., 2] - sight.lens[..., 0]) / 2)  # least squares through three points


# ----------------------------------------------------------------------------------------------
# traces


@pytest.mark.parametrize("window", [0, 4])
def test_a_trace_is_of_the_model_that_answered_column_by_column(tiny, window):
    model = tiny(observer="quarters")
    roll = answer(model, window)
    columns = trace(model, roll, 3, LETTERS)["columns"]
    cache = KVCache(model.config, 1, len(columns), window)
    assert any(column["thought"] for column in columns) and any(column["own"] for column in columns)
    for i, column in enumerate(columns):
        out = model(torch.tensor([[column["token"]]]), cache=cache)
        truth = LETTERS.index[column["next"]]
        assert column["loss"] == pytest.approx(-out.words[0, 0].log_softmax(dim=0)[truth].item(), abs=1e-3)
        assert [column[name] for name in ("coming", "worth", "ahead")] == pytest.approx(out.readings[0, 0].tolist(), abs=1e-3)
        assert column["gate"] == pytest.approx(out.gate[0, 0].sigmoid().item(), abs=1e-3)
        assert column["thinks"] == (i + 1 < len(columns) and columns[i + 1]["thought"])
        if column["thought"]:
            assert (column["without"], column["with"]) == (columns[i - 1]["layers"][-1]["words"][0], column["layers"][-1]["words"][0])
            assert column["text"] == f"[{column['token'] - 5}]" and columns[i - 1]["next"] == column["next"]


def test_what_a_model_does_not_have_its_trace_does_not_hold(tiny):
    ids = torch.tensor([[0, 1, 2, 3]])
    for model in (tiny(n_bits=0), tiny(n_bits=0, observer="quarters"), tiny()):
        roll = rollout(model, ids, torch.tensor([4]), Thinking(greedy=True))
        found = trace(model, roll, 4, LETTERS)
        column = found["columns"][0]
        assert ("gate" in column) == bool(model.config.n_think) and ("coming" in column) == bool(model.config.observer)
        assert "".join(c["text"] for c in found["columns"] if not c["thought"]) + found["last"]["text"] == "abcd"
        assert not any(c["own"] for c in found["columns"]) and not found["last"]["own"], "it only read"


def test_a_character_in_two_tokens_is_shown_once():
    vocabulary = Vocabulary({"vocab": ["?", "?", "a"]})
    vocabulary.pieces = [b"\xc3", b"\xa9", b"a"]
    assert shown([2, 0, 3, 1, 2], vocabulary) == ["a", "", "[0]", "é", "a"]
    assert shown([2, 0], vocabulary) == ["a", "\ufffd"]
    assert shown([2, 4, 3], vocabulary, recall=4) == ["a", "[recall]", "[0]"]


@pytest.mark.parametrize("max_run", [1, 2])
def test_the_line_about_an_answer_comes_from_columns_that_had_not_seen_it(tiny, max_run):
    model = tiny(observer="quarters")
    roll = answer(model, max_run=max_run)
    thinks = roll.thinks[0].tolist()
    columns = [c for c in range(len(thinks)) if not thinks[c] and roll.pointer[0, c] >= 3]
    coming = [max(0.0, model(roll.stream[:, : c + 1]).readings[0, -1, 0].item()) for c in columns]  # of prefixes that end before the token
    most = max(range(len(columns)), key=lambda i: coming[i])
    runs = [len(list(run)) for thinks, run in groupby(thinks) if thinks]
    line = introspect(model, roll, 0, 3, LETTERS)
    token = LETTERS.decode([roll.real[0, 3 + most]])
    assert line.startswith(f"sure {math.exp(-sum(coming) / 9):.2f} a token; hesitated most at {token!r} after ") and f"({coming[most]:.2f} nats" in line
    assert f"; {sum(runs)} thoughts, longest before " in line and f" ({max(runs)}, gate " in line
    assert line != introspect(model, answer(model, prompt=(4, 4)), 0, 2, LETTERS), "another answer, another line"
    silent = generate(model, [[0, 1, 2]], 9, Thinking(mode="never", greedy=True))[1]
    assert introspect(model, silent, 0, 3, LETTERS).endswith("did not think")


# ----------------------------------------------------------------------------------------------
# the page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
HOSTILE = ["<script>owned = 1</script>", "</script>", "&amp;", "\"'`", "\n", "<!--", "<img src=x onerror='owned = 1'>", "\u2028 $x$ {TRACE_GOES_HERE}"]


@pytest.fixture
def browse(tmp_path):
    """(page, script, hash) -> what the script, run at the page's end, left in `result`. Fails on anything the browser complains about."""
    if not CHROMIUM:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on PATH to read the page with")

    def run(html: str, script: str, hash: str = ""):
        ask = f"<script>let result\n{script}\nmake('pre', document.body, JSON.stringify(result)).id = 'result'</script>"
        (tmp_path / "copy.html").write_text(html.replace("</body>", ask + "</body>"), encoding="utf-8")
        address = (tmp_path / "copy.html").as_uri() + hash
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run([CHROMIUM, *QUIET.split(), profile, "--enable-logging=stderr", "--dump-dom", address], capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:]
        return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    return run


@pytest.fixture
def traced(tiny):
    model = tiny(observer="quarters")
    return {"task": "letters", "run": "", "step": 0, "notes": [], "rows": [trace(model, answer(model), 3, LETTERS)]}


def visible_text(row) -> str:
    return "".join(c["text"] for c in row["columns"] if not c["thought"]) + row["last"]["text"]


def test_the_page_needs_nothing_but_itself(traced):
    html = page(traced)
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc\s*=|<link|@import|url\(|fetch\(", html) and "default-src 'none'" in html


def test_the_page_folds_thoughts_and_shows_what_would_have_been_said_without_them(traced, browse):
    row, thoughts = traced["rows"][0], [c for c in traced["rows"][0]["columns"] if c["thought"]]
    assert browse(page(traced), "result = rows.innerText.trim()") == visible_text(row)
    look_at_thoughts = "result = [...rows.querySelectorAll('.thought')].filter(t => t.offsetParent).map(t => t.textContent)"
    assert browse(page(traced), look_at_thoughts) == []
    said = [f"{c['text']}else “{c['without'][0]}” {math.floor(100 * c['without'][1] + 0.5)}%" for c in thoughts]
    assert browse(page(traced), "show_thoughts.click()\n" + look_at_thoughts) == said == browse(page(traced), look_at_thoughts, "#thoughts")


def test_the_colours_follow_the_choice_and_so_do_the_numbers(traced, browse):
    script = "result = radios.map(r => { r.click(); return [...rows.querySelectorAll('.token')].map(t => [getComputedStyle(t).backgroundColor, t.dataset.number]) })"
    coming, loss, gate = browse(page(traced), script)
    assert all(a != b for a, b in ((coming, loss), (loss, gate), (gate, coming)))
    tokens = traced["rows"][0]["columns"]
    spoken = [c for c, behind in zip(tokens, tokens[1:]) if not behind["thought"]] + tokens[-1:]
    assert [n for _, n in loss if n != "–"] == [f"{c['loss']:.2f}" for c in spoken], "each token shows what the column that said it lost"


def test_the_keyboard_moves_from_token_to_token_and_each_tells_its_numbers(traced, browse):
    press = "const press = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))\n"
    where = "[...shown.keys()].filter(t => t.offsetParent).indexOf(document.activeElement)"
    script = f"rows.querySelector('.token').focus(); result = [{where}]; for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End']) {{ press(key); result.push({where}) }}"
    last = len(visible_text(traced["rows"][0])) - 1
    assert browse(page(traced), press + script) == [0, 1, 2, 1, last]
    told = browse(page(traced), "[...shown.keys()].at(-1).click()\nresult = [panel.innerText, document.activeElement.tabIndex, getComputedStyle(document.activeElement).outlineStyle]")
    column = traced["rows"][0]["columns"][-1]
    assert f"{column['loss']:.2f} nats" in told[0] and all(words[0][0] in told[0] for words in (layer["words"] for layer in column["layers"]))
    assert told[1] == 0 and told[2] in ("solid", "dashed"), "in the tab order, and marked: dashed where the window itself has no focus"


def test_hostile_text_is_shown_and_never_run(tiny, browse, tmp_path):
    vocabulary = Vocabulary({"vocab": HOSTILE})
    model = tiny(vocab_size=len(HOSTILE), observer="quarters")
    ids = torch.arange(len(HOSTILE))[None]
    roll = rollout(model, ids, torch.tensor([8]), Thinking(greedy=True))
    found = {"task": HOSTILE[0], "run": "", "step": 0, "notes": [HOSTILE[6]], "rows": [trace(model, roll, 8, vocabulary)]}
    draw(found, tmp_path / "trace.png")  # a $ starts no formula
    script = "for (const t of shown.keys()) t.click()\nresult = [typeof owned, [...shown].filter(([t, x]) => !x.thought).map(([t]) => t.textContent).join(''), document.images.length]"
    assert browse(page(found), script, "#thoughts") == ["undefined", "".join(HOSTILE), 0]


# ----------------------------------------------------------------------------------------------
# as a person runs it


def test_observe_and_introspect_as_a_person_runs_them(chains, tmp_path):
    common = [f"--data={chains}", "--n_layer=1", "--n_embd=16", "--n_head=2", "--batch_tokens=64", "--device=cpu", "--report=false", "--steps=2"]
    plain, watched, out = tmp_path / "plain", tmp_path / "watched", tmp_path / "trace"
    call("train.py", *common, "--n_bits=0", f"--out={plain}", check=True)
    call("train.py", *common, "--n_bits=2", "--observer=quarters", f"--out={watched}", check=True)
    call("observe.py", f"--run={watched}", f"--out={out}", "1+2=", "2*2*2=", check=True)
    found = json.loads((out / "trace.json").read_text())
    assert len(found["rows"]) == 2 and found["notes"] and (out / "trace.png").stat().st_size > 1000 and "TRACE_GOES_HERE" not in (out / "trace.html").read_text()
    text = tmp_path / "rows.txt"
    text.write_text("1+2=0\n2*2=1\n")
    call("observe.py", f"--run={plain}", f"--out={out}", f"--input={text}", check=True)
    rows = json.loads((out / "trace.json").read_text())["rows"]
    assert [visible_text(row) for row in rows] == ["1+2=0", "2*2=1"] and "gate" not in rows[0]["columns"][0]
    lines = call("sample.py", f"--run={watched}", "--introspect", "1+2=", "2*2*2=", check=True).stdout.splitlines()
    assert lines[0].startswith("1+2=") and re.match("  sure|  said nothing", lines[1]) and lines[2].startswith("2*2*2=")

    assert "no observer" in refused("sample.py", f"--run={plain}", "--introspect", "1+2=")
    assert "no observer" in refused("sample.py", f"--run={plain}", "--price=0.1", "1+2=")
    assert "either prompts or --input" in refused("observe.py", f"--run={watched}") and "either" in refused("observe.py", f"--run={watched}", f"--input={text}", "1+2=")
    assert "cannot read" in refused("observe.py", f"--run={watched}", "--input=nowhere.txt")
    assert "cannot write" in refused("observe.py", f"--run={watched}", f"--out={text}", "1+2=")
    assert "two tokens" in refused("observe.py", f"--run={watched}", "--teach", "1")
    assert "'7'" in refused("observe.py", f"--run={watched}", "7")
    assert "no checkpoint" in refused("observe.py", f"--run={tmp_path / 'nowhere'}", "1+2=")
    assert "'teach'" in refused("observe.py", "--teech=true", "1+2=")
