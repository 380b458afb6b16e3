"""The page that plays: its network against torch, in Node and in a browser; and what it offers."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, small

import train
from data.arithmetic.prepare import chain
from data.dataset import Batch, DataError, Vocabulary, load_vocabulary
from model import GPT, Thinking, generate
from runs import load_model, save_checkpoint
from workshop import kit, play

NODE = shutil.which("node")
BUILT = ROOT / "workshop/play.html"
LETTERS = Vocabulary({"vocab": ["a", "b", "c", "d", "\n"], "row_end": "\n", "answer_after": "d"})
WINDOWS, ROWS = (0, 8, 16), 200

# for each job: a prompt, how to think, and what came of it, cell by cell
JOBS = """
const answers = jobs.map(({ prompt, how }) => {
  const cells = generate(net, prompt, how)
  return cells.map(({ id, out }) => out ? { id, ...out, logits: [...out.logits] } : { id })
})
"""


def small_page(model: GPT, thinking: Thinking, vocabulary=LETTERS) -> dict:
    """What gpt.makeNet needs of a page, for a model without a checkpoint."""
    state = {"meta": {"task": "letters", "level": "letters"}, "config": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play, "as_trained", lambda *_: thinking)
        patch.setattr(play, "held_out", lambda *_: [])
        for name in ("load_split", "own_probe", "meaning"):
            patch.setattr(play, name, lambda *_: None)
        patch.setattr(play, "trained_config", lambda _: train.Config())
        return play.payload(model, vocabulary, state, ROOT / "nowhere", "out/letters")


def in_node(found: dict, jobs: list[dict], tmp_path) -> list:
    """-> for each job what came of it, run by Node."""
    if not NODE:
        pytest.skip("there is no node on PATH to run the page's network with")
    (tmp_path / "page.json").write_text(json.dumps([found, jobs]))
    script = f"""
    const {{ makeNet, generate }} = require({json.dumps(str(ROOT / "workshop/gpt.js"))})
    const [page, jobs] = JSON.parse(require("fs").readFileSync("page.json"))
    const net = makeNet(page)
    {JOBS}
    console.log(JSON.stringify(answers))"""
    (tmp_path / "jobs.js").write_text(script)
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([NODE, "jobs.js"], check=False, **how)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def in_torch(model: GPT, prompt: list[int], thinking: Thinking, thoughts=None, stop=4) -> list:
    """The same by model.generate: ids of all cells."""
    ids, swapped = [], thinking.mode == "swapped"
    instead = (thoughts or []) if swapped else None
    how = {"instead": instead, "stop": stop, "watch": lambda what, number: ids.append(number)}
    generate(model, prompt, 32, thinking, **how)
    return ids


def same(cells: list[dict], model: GPT, window: int) -> float:
    """The largest difference of any output from the model's, of one pass over the same cells."""
    ids = [cell["id"] for cell in cells[:-1]]
    with torch.no_grad():
        out = model(torch.tensor([ids]), window=window)
    worst = 0.0
    for c, cell in enumerate(cells[:-1]):
        for name in ("logits", "thoughts", "readings"):
            own = cell[name]  # JSON has no typed arrays
            own = torch.tensor([*own.values()] if isinstance(own, dict) else own)
            expected = getattr(out, name)[0, c]
            assert own.shape == expected.shape
            worst = max(worst, (own - expected).abs().max().item() if len(own) else 0)
        worst = max(worst, abs(cell["gate"] - out.gate[0, c].item()))
    return worst


# ----------------------------------------------------------------------------------------------
# the network


@pytest.mark.parametrize("kind", [{}, {"observer": "quarters", "n_layer": 3}, {"max_run": 2}])
def test_the_network_is_torchs_in_every_window_and_under_every_knock_out(tiny, tmp_path, kind):
    runs = kind.pop("max_run", 1)
    model = tiny(n_embd=32, n_head=4, n_bits=3, **kind)
    after = torch.tensor([True, True, False, True, True]) if runs == 2 else None
    thinking = Thinking(max_run=runs, greedy=True, after=after)
    prompt, thoughts, draw = [0, 1, 2, 0, 3, 1, 2, 2, 1, 3], [5, 2, 7], random.Random(0)
    jobs, ways = [], []
    for window in WINDOWS:
        for mode in ("policy", "never", "constant", "swapped", "price"):
            price = 0.1 if mode == "price" else None
            mode = "policy" if price else mode
            if price and not model.config.observer:
                continue
            how = {"mode": mode, "window": window, "thoughts": thoughts, "price": price}
            jobs.append({"prompt": prompt, "how": how})
            ways.append(replace(thinking, mode=mode, window=window, price=price))
        edits = {f"{t}.1": draw.randrange(-1, 8) for t in range(9)}
        jobs.append({"prompt": prompt, "how": {"window": window, "edits": edits}})
        ways.append(None)
    for job, way, cells in zip(jobs, ways, in_node(small_page(model, thinking), jobs, tmp_path)):
        ids = [cell["id"] for cell in cells]
        assert same(cells, model, job["how"]["window"]) < 1e-4, "logits, gate, bits, readings"
        if way:
            assert ids == in_torch(model, prompt, way, thoughts), way
        else:  # what was asked for is what was thought, and not where it was forbidden
            given, t, behind = prompt[:9], -1, {}
            for number in ids:
                t += number < 5
                if number >= 5:
                    behind.setdefault(t, number - 5)
            for place, number in job["how"]["edits"].items():
                assert behind.get(int(place[0]), -1) == number, given


def test_a_gate_that_was_never_taught_is_forced_as_in_training(tiny, tmp_path):
    for force in (0.0, 1.0):
        model, thinking = tiny(), Thinking(greedy=True, force=force)
        jobs = [{"prompt": [0, 1, 2], "how": {}}]
        (cells,) = in_node(small_page(model, thinking), jobs, tmp_path)
        assert [cell["id"] for cell in cells] == in_torch(model, [0, 1, 2], thinking)


@pytest.fixture(scope="module")
def built():
    """-> the page that stands in workshop/, what it holds, and its model."""
    html = BUILT.read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="model">(.*?)</script>', html, re.DOTALL)[1])
    model = kit.from_page(BUILT).gpt
    return html, found, model


def test_on_new_rows_the_built_page_thinks_and_answers_token_for_token_as_torch(built, tmp_path):
    _, found, model = built
    meta = {"vocab": found["tokens"], "row_end": "\n", "answer_after": "="}
    vocabulary, draw = load_vocabulary(meta), random.Random(20)
    prompts, jobs, near = [], [], 0
    for i in range(ROWS):
        row = chain(1 + i % 8, 5, draw)
        prompts.append(vocabulary.encode(row[: row.index("=") + 1]))
        jobs.append({"prompt": prompts[-1], "how": {"window": 0 if i % 2 else 8}})
    for prompt, job, cells in zip(prompts, jobs, in_node(found, jobs, tmp_path)):
        window = job["how"]["window"]
        ids = [cell["id"] for cell in cells]
        thinking = Thinking(greedy=True, window=window)
        stop = vocabulary.row_end
        assert ids == in_torch(model, prompt, thinking, stop=stop)
        assert same(cells, model, window) < 1e-4
        for cell in cells[:-1]:
            best = sorted(cell["logits"])[-2:]
            near += best[1] - best[0] < 1e-3 or min(map(abs, cell["thoughts"].values())) < 1e-3
    print(f"near-ties: {near}")  # of the cells, where rounding might have chosen


# ----------------------------------------------------------------------------------------------
# the page


def test_the_built_page_is_what_play_py_makes_and_needs_nothing_but_itself(built):
    html, found, _ = built
    assert html == play.page(found), "python workshop/play.py --out=workshop/play.html"
    assert len(html.encode()) <= 1_000_000
    code = html.replace(found["weights"], "")
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc\s*=|<link|@import|url\(|fetch\(", code)
    assert "default-src 'none'" in html
    lines = (ROOT / "workshop/play.in.html").read_text() + (ROOT / "workshop/gpt.js").read_text()
    assert max(map(len, lines.splitlines())) <= 100


def test_in_a_browser_it_runs_as_in_node_and_asks_nobody(built, browse, tmp_path):
    html, found, _ = built
    jobs = [{"prompt": encode(found, r["prompt"]), "how": {"window": w}}
            for r in found["rows"][-9::3] for w in (0, 8)]  # fmt: skip
    script = (
        f"const jobs = {json.dumps(jobs)}\n{JOBS}\n"
        + """
    const begin = performance.now()
    generate(net, encode(model.tokens, longest.prompt), { window: 8 })
    const seconds = (performance.now() - begin) / 1000
    result = [answers.map(cells => cells.map(c => c.id)),
      performance.getEntriesByType('resource').length, seconds]"""
    )
    answers, requests, seconds = browse(html, script)
    expected = in_node(found, jobs, tmp_path)
    assert answers == [[cell["id"] for cell in cells] for cells in expected]
    assert requests == 0
    print(f"1,024 operations in a window of 8: {seconds:.2f} s")


def encode(found: dict, text: str) -> list[int]:
    return Vocabulary({"vocab": found["tokens"]}).encode(text)


SAYS = "[...main.querySelectorAll('.answer')].map(a => a.textContent.match(/answers (\\S+)/)[1])"


def test_a_changed_thought_stands_beside_the_intact_one_and_in_the_address(built, browse):
    script = f"""
    const before = {SAYS}
    boxes[0].get('1.1').click()
    const select = panel.querySelector('select')
    select.value = order.find(([, m]) => m.value === 4)[0]
    select.dispatchEvent(new Event('change'))
    const after = {SAYS}, where = location.hash
    document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: 'x'}}))
    const forbidden = {SAYS}, gap = state.edits
    result = [before, after, where, forbidden, {{...gap}}, copy.disabled]
    """.replace("panel.", "element('panel').").replace("copy.", "element('copy').")
    before, after, where, forbidden, gap, disabled = browse(built[0], script, "#row=3%2B4*2%3D")
    assert before == ["4"] and after == ["4", "3"], "(3 + 4) * 2, and 4 * 2, modulo 5"
    assert "edit=1.1" in where and len(forbidden) == 2 and gap == {"1.1": -1} and disabled


def test_the_address_sets_all_and_the_command_is_the_same_in_python(built, browse):
    hash = "#row=3%2B4*2%3D&second=1*3*3%2B4%3D&mode=swapped&window=8&hide=lesson,rows&big=1"
    script = f"""
    const shown = ['lesson', 'rows', 'change', 'panel'].map(id => !element(id).hidden)
    result = [{SAYS}, shown, command(), document.documentElement.className, location.hash,
      [...boxes[1].values()].map(b => b.firstChild.textContent).join('')]"""
    answers, shown, command, big, where, stream = browse(built[0], script, hash)
    assert len(answers) == 2 and shown == [False, False, True, True] and big == "big"
    options = "--show_thoughts --mode=swapped --window=8 '3+4*2=' '1*3*3+4='"
    assert command[0] == f"python sample.py {options}" and "first line" in command[1]
    assert "mode=swapped" in where and "hide=lesson%2Crows" in where
    _, found, model = built
    prompts = [encode(found, row) for row in ("3+4*2=", "1*3*3+4=")]
    how, stop = Thinking(greedy=True, window=8), found["row_end"]
    thoughts = [i - model.config.vocab_size for i in in_torch(model, prompts[1], how, stop=stop)]
    swapped = replace(how, mode="swapped")
    ids = in_torch(model, prompts[0], swapped, [k for k in thoughts if k >= 0], stop)
    names = [*found["tokens"], *(f"[{k}]" for k in range(model.config.n_think))]
    assert stream == "".join(names[i] for i in ids).replace("\n", "↵")


def test_a_lesson_waits_for_the_guess_and_boxes_come_one_by_one(built, browse):
    script = f"""
    const lessons = [...element('lesson').querySelectorAll('button')], said = {{}}, toldOf = []
    for (const lesson of [4, 5, 0, 1, 2, 3].map(i => lessons[i])) {{
      lesson.click()
      const before = {SAYS}, question = element('ask').textContent
      const marked = main.querySelectorAll('.edited').length
      element('guessed').click()
      said[lesson.textContent[0]] = [before, {SAYS}, question, marked]
      toldOf.push(main.textContent.includes('with three it does'))
    }}
    const own = model.rows.find(r => r.prompt === state.row), lent = model.rows.find(
      r => r.prompt === state.second)
    const seen = () => [...boxes[0].values()].filter(b => !b.classList.contains('late')).length
    element('step').click()
    element('step').click()
    const two = seen()
    element('all').click()
    boxes[0].get('0.0').focus()
    const arrow = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key}}))
    arrow('ArrowRight')
    const at = state.chosen
    result = [said, own.answer, lent.answer, longest.answer, toldOf, two, seen(),
      boxes[0].size, at]"""
    said, own, lent, long, told, two, every, count, at = browse(built[0], script)
    assert said["1"][:2] == [["?"], [own]], "nothing is changed, but the answer waits"
    assert said["5"][0] == ["?"] and said["5"][1][0] != said["5"][1][1] == long
    assert [[len(x) for x in said[n][:2]] for n in "2346"] == [[1, 2]] * 4
    assert said["3"][1] == [own, lent] and lent != own != said["4"][1][1]
    assert "behind *1, now says 2 instead of 4" in said["4"][2] and said["4"][3] == 1
    assert told == [False, True] + [False] * 4, "behind lesson 6, and gone with the next"
    assert two == 2 and every == count and at == [0, 0, 1]


def test_what_cannot_be_read_is_said_in_a_sentence_and_never_run(built, browse):
    script = """
    const row = element('row')
    row.value = '3+<img src=x onerror="owned=1">'
    row.dispatchEvent(new Event('input'))
    result = [element('problem').textContent, typeof owned, document.images.length]"""
    said, owned, images = browse(built[0], script)
    assert "“+”, character 2" in said and owned == "undefined" and images == 0


# ----------------------------------------------------------------------------------------------
# as a person makes it


@pytest.mark.parametrize("kind", [{"n_bits": 0}, {"observer": "quarters"}])
def test_a_page_of_ones_own_checkpoint(chains, tmp_path, browse, kind):
    trainer = train.Trainer(small(chains, tmp_path, **kind))
    save_checkpoint(tmp_path / "checkpoint.pt", trainer.state())
    said = call("workshop/play.py", f"--run={tmp_path}", check=True).stdout
    assert str(tmp_path / "play.html") in said
    script = """result = [model.task, boxes.length, net.watched.length,
      element('price') !== null, about()]"""
    html = (tmp_path / "play.html").read_text()
    task, sides, watched, priced, about = browse(html, script, "#mode=never&price=0.5")
    assert task.startswith("chains modulo 3") and priced == bool(watched) == ("observer" in kind)
    assert "modulo 3: in 1+2*2= the running values are 1, 0 (=3 mod 3), 0 (=0*2)." in about
    assert sides == (1 if kind == {"n_bits": 0} else 2)


def test_without_a_probe_a_thought_is_known_by_the_answer_so_far(tiny):
    model, thinking = tiny(), Thinking(greedy=True)
    real = torch.tensor([[0, 1, 2, 3, 4], [1, 3, 0, 4, 4]])
    batch = Batch.plain(real, torch.tensor([5, 4]), torch.tensor([4, 2]), torch.tensor([3, 3]))
    rows = SimpleNamespace(levels=[3], first=lambda count, level: batch)
    probe = play.own_probe(model, rows, LETTERS, thinking)
    assert probe["rows"] == ["abcd", "bd"] and [len(line) for line in probe["labels"]] == [4, 2]
    for question, label in (([0, 1, 2], probe["labels"][0][2]), ([1], probe["labels"][1][0])):
        said = generate(model, [*question, 3], 8, thinking, stop=4)[len(question) + 1 :]
        assert label == LETTERS.decode(said).rstrip("\n") and label in probe["values"]


def test_what_cannot_be_played_is_refused_in_a_sentence(chains, tmp_path):
    trainer = train.Trainer(small(chains, tmp_path, recall=True, revise=0.1))
    save_checkpoint(tmp_path / "checkpoint.pt", trainer.state())
    with pytest.raises(DataError, match="RECALL and REVISE"):
        play.main([f"--run={tmp_path}"])
    with pytest.raises(DataError, match="no checkpoint"):
        play.main(["--run=nowhere"])
    assert load_model(str(tmp_path))[0].config.recall and not (tmp_path / "play.html").exists()
