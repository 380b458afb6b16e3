"""What several tests share: a tiny model that disagrees with itself about when to think, and a data folder made once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from model import GPT, GPTConfig  # noqa: E402


@pytest.fixture
def tiny():
    """
    (V=5, d=2 bits, K=4, ...) -> GPT in evaluation mode; its gate is random, so about half of the
    columns think.
    """

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 5, "n_bits": 2, "n_layer": 2, "n_head": 2, "n_embd": 16}
        model = GPT(GPTConfig(**(sizes | changes)))
        for parameter in model.parameters():  # far from the small weights of the start, where every column is alike
            torch.nn.init.normal_(parameter, std=0.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def chains(tmp_path_factory):
    """A small data set: chains modulo 3 of up to 3 operations."""
    folder = tmp_path_factory.mktemp("chains")
    prepare(folder, "--modulus=3", "--levels=3", "--rows=2000")
    return folder


ARITHMETIC, AUTOMATA = "data/arithmetic/prepare.py", "data/automata/prepare.py"


def prepare(folder, *arguments, script=ARITHMETIC):
    return call(script, f"--out={folder}", *arguments, check=True)


def call(script, *arguments, check=False, **options):
    """Run a script as a person does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check, timeout=300, **options)
