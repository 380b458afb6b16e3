"""
What several tests share: a tiny model of two minds about thinking, grids written out by hand, the
slow twin of `train.rollout`, and a data folder made once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ.setdefault("NANOTHINK_STEPS", "5")  # of workshop/kit.py's small runs

from data.dataset import Batch  # noqa: E402
from model import GPT, Cells, GPTConfig, Output, Thinking  # noqa: E402
from train import WRONG_SLOT, Config, Grid, rollout  # noqa: E402

V, D_BITS, K = 5, 2, 4  # real tokens, bits of a thought, thoughts of the tiny model
RECALL = V + K


@pytest.fixture
def tiny():
    """-> GPT in evaluation mode, whose gates are random: about half of the cells think."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        sizes = {"vocab_size": V, "n_bits": D_BITS, "n_layer": 2, "n_head": 2, "n_embd": 16}
        model = GPT(GPTConfig(**(sizes | changes)))
        for name, parameter in model.named_parameters():  # as they start, all cells are alike
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.0 if "gate.out.bias" in name else 0.5)
        return model.eval()

    return make


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------
# grids


def grid_of(streams, runs=2):
    """
    Streams of ids -> Grid. Below V an id is a real token; the thoughts and the RECALL that follow
    it are its own. The last real token is only predicted. Places where nothing is hold rubbish.
    """
    length = max(sum(i < V for i in stream) for stream in streams)
    token = torch.full((len(streams), length, runs + 3), V + 1)
    token[:, :, 0], present = 0, torch.zeros_like(token, dtype=torch.bool)
    for b, stream in enumerate(streams):
        t, slot = -1, 0
        for i in stream:
            t, slot = (t + 1, 0) if i < V else (t, runs + 1 if i == RECALL else slot + 1)
            token[b, t, slot], present[b, t, slot] = i, True
        present[b, t, 0] = False
    asked = present & (torch.arange(runs + 3) < runs)  # as if a thought might follow every token
    return Grid(token, present, asked, torch.zeros_like(asked))


def streams_of(grid):
    """The other way round, without the last real token."""
    return [ids[there].tolist() for ids, there in zip(grid.token, grid.present)]


def batch_of(grid, prompt, **changes):
    """Sequences that begin with a prompt of so many tokens."""
    length = grid.present[:, :, 0].sum(dim=1) + 1
    prompt = torch.as_tensor(prompt).expand_as(length)
    return Batch.plain(grid.token[:, :, 0], length, prompt, length)._replace(**changes)


def replay(model, grid, window=0, **how):
    """What a rollout puts out whose thoughts and wrong tokens are those of the grid."""
    real, runs = grid.token[:, :, 0], grid.token.size(2) - 3
    thoughts = slice(1, 1 + runs)
    number = grid.token[:, :, thoughts] - model.config.vocab_size
    how["forced"] = torch.where(grid.present[:, :, thoughts], number, -1)
    wrong = torch.where(grid.present[:, :, WRONG_SLOT], grid.token[:, :, WRONG_SLOT], -1)
    if (wrong >= 0).any():
        how["wrong"] = wrong
    length = grid.present[:, :, 0].sum(dim=1) + 1
    return rollout(model, real, length, Thinking(max_run=runs, window=window), **how)[1]


def segments(grid, cuts):
    """(B, T) bool, tokens behind which a sequence is cut -> (B, T, S)."""
    begins = torch.zeros_like(grid.token)
    begins[:, :, 1] = cuts & (begins.size(2) > 3)  # a model without thoughts is never cut
    return begins.flatten(1).cumsum(dim=1).view_as(begins)


def alone(model, grid, b, window=0, segment=None):
    """
    The slow twin of a rollout: one sequence by itself, without cache, cell behind cell, with a mask
    written out rule by rule -> {(t, slot): model.Output without its cache} of the cells present.
    """
    S = grid.token.size(2)
    cells, position, lasting = [], [], 0
    for t in range(grid.token.size(1)):
        for slot in range(S):
            if grid.present[b, t, slot]:
                cells.append((t, slot))
                position.append(lasting)
                lasting += slot < S - 2
    sees = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for i, (t, slot) in enumerate(cells):
        for j, (t_key, slot_key) in enumerate(cells[: i + 1]):
            near = not window or position[i] - position[j] < window
            if segment is not None:
                near = near and segment[b, t, slot] == segment[b, t_key, slot_key]
            if model.config.recall and slot == S - 2:
                near = True
            sees[i, j] = i == j or near and slot_key < S - 2
    if not cells:
        return {}
    ids = torch.tensor([[int(grid.token[b, t, slot]) for t, slot in cells]])
    with patch("model.visible", return_value=sees[None]):
        out = model(ids, Cells(torch.tensor([position])))
    return {c: Output(*(part[0, i] for part in out[:-1]), None) for i, c in enumerate(cells)}


# ----------------------------------------------------------------------------------------------
# data and runs

ARITHMETIC, AUTOMATA = "data/arithmetic/prepare.py", "data/automata/prepare.py"


@pytest.fixture(scope="session")
def chains(tmp_path_factory):
    """A small data set: chains modulo 3 of up to 3 operations."""
    folder = tmp_path_factory.mktemp("chains")
    prepare(folder, "--modulus=3", "--levels=3", "--rows=2000")
    return folder


def prepare(folder, *arguments, script=ARITHMETIC):
    return call(script, f"--out={folder}", *arguments, check=True)


def call(script, *arguments, check=False, **options):
    """Run a script as a person does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=check, **(how | options))


def small(data, out, **changes):
    """Config of a run that is over at once."""
    sizes = {"n_embd": 32, "n_bits": 3, "batch_tokens": 200, "steps": 20, "eval_rows": 20}
    where = {"data": str(data), "out": str(out), "device": "cpu", "report": False}
    return Config(**(sizes | where | changes))


# ----------------------------------------------------------------------------------------------
# pages, in a browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
QUIET += " --disable-background-networking --disable-component-update"


@pytest.fixture
def browse(tmp_path):
    """
    (page, script, hash) -> what the script, run at the page's end, left in `result`. Fails on
    anything that the browser complains about.
    """
    if not CHROMIUM:
        pytest.skip(f"there is none of {', '.join(NAMES)} on PATH to read the page with")

    def read(html: str, script: str, hash: str = ""):
        ask = "make('pre', document.body, JSON.stringify(result)).id = 'result'"
        ask = f"<script>let result\n{script}\n{ask}</script>"
        copy = tmp_path / "copy.html"
        copy.write_text(html.replace("</body>", ask + "</body>"), encoding="utf-8")
        command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", "--dump-dom", copy.as_uri() + hash]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "CONSOLE" not in done.stderr, done.stderr
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:]
        unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return json.loads(unescaped)

    return read
