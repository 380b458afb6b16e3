"""
What exercises and notebooks share: a trained model, rows, what it thinks and says, small runs.

The trained model is the one in out/chain or, where there is none yet, the one inside
workshop/play.html, so that nothing needs to be trained first. Tiny runs are of chains modulo 3
of at most 3 operations; each is trained once and kept. For the tests NANOTHINK_STEPS makes them
shorter: then nothing is learned, `LEARNS` is False, data go to a temporary folder, and the trained
model is always the page's.
"""

import base64
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.arithmetic import prepare
from data.dataset import Batch, Vocabulary, load_vocabulary
from lab.report import meaning
from model import GPT, GPTConfig, Thinking
from runs import load_model
from train import UNFORCED, Config, Trainer, answers_right, as_trained, counted_tokens, rollout

ROOT = Path(__file__).resolve().parents[1]
STEPS = int(os.environ.get("NANOTHINK_STEPS", "500"))
LEARNS = STEPS >= 500
TEMPORARY = tempfile.TemporaryDirectory()  # gone when the program ends
FOLDER = ROOT / "out/data" if LEARNS else Path(TEMPORARY.name)  # for data


class Trained(NamedTuple):
    gpt: GPT
    vocabulary: Vocabulary
    thinking: Thinking  # greedy, as after training


def from_page(path: Path) -> Trained:
    """The model inside a page that play.py wrote."""
    text = re.search(r'id="model">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1]
    found = json.loads(text)
    sizes = {field.name: found["network"][field.name] for field in dataclasses.fields(GPTConfig)}
    gpt, how = GPT(GPTConfig(**sizes)).eval(), found["thinking"]
    blob = torch.frombuffer(bytearray(base64.b64decode(found["weights"])), dtype=torch.float32)
    parts = blob.split([torch.Size(shape).numel() for shape in found["shapes"].values()])
    for (name, shape), part in zip(found["shapes"].items(), parts):
        gpt.get_parameter(name).data = part.view(shape)
    ends = {"row_end": found["tokens"][found["row_end"]], "answer_after": "="}
    vocabulary = load_vocabulary({"task": found["task"], "vocab": found["tokens"]} | ends)
    after = None if how["after"] is None else torch.tensor(how["after"])
    how = {"max_run": how["max_run"], "force": how["force"], "window": how["window"]}
    return Trained(gpt, vocabulary, Thinking(greedy=True, after=after, **how))


@cache
def trained() -> Trained:
    """The main job's model, chains modulo 5, of out/chain if one of that job is there."""
    page, run = ROOT / "workshop/play.html", ROOT / "out/chain"
    ours = from_page(page)
    if LEARNS and (run / "checkpoint.pt").exists():
        gpt, vocabulary, state = load_model(str(run))
        if vocabulary.tokens == ours.vocabulary.tokens and gpt.config.n_bits:
            page, ours = run, Trained(gpt, vocabulary, as_trained(state, vocabulary))
    print(f"the model in {page.relative_to(ROOT)}")
    return ours


# ----------------------------------------------------------------------------------------------
# rows


def new_rows(count: int, operations: int, seed: int) -> list[str]:
    """Chains modulo 5 with their answers, such as 3+4*2=4."""
    draw = random.Random(seed)
    return [prepare.chain(operations, 5, draw) for _ in range(count)]


def operations(row: str) -> list[tuple[str, int]]:
    """3+4*2=4 -> [("+", 4), ("*", 2)]"""
    return [(sign, int(x)) for sign, x in re.findall(r"([+*])(\d)", row)]


def apply(value: int, sign: str, x: int) -> int:
    """One operation, modulo 5."""
    return (value + x if sign == "+" else value * x) % 5


def running_values(row: str) -> list[int]:
    """3+4*2=4 -> [3, 2, 4], the value behind each number."""
    values = [int(row[0])]
    for sign, x in operations(row):
        values.append(apply(values[-1], sign, x))
    return values


def batch_of(rows: list[str], vocabulary: Vocabulary) -> Batch:
    """Rows with answers -> a batch; T is that of the longest."""
    end = vocabulary.tokens[vocabulary.row_end]
    ids = [torch.tensor(vocabulary.encode(row + end)) for row in rows]
    length = torch.tensor([len(x) for x in ids])
    real = pad_sequence(ids, batch_first=True, padding_value=vocabulary.row_end)  # (B, T)
    prompt = (real == vocabulary.answer_after).long().argmax(dim=1) + 1
    return Batch.plain(real, length, prompt, prompt)


# ----------------------------------------------------------------------------------------------
# what it thinks and says


@torch.no_grad()
def thoughts(rows: list[str]) -> list[list[int]]:
    """What the main job's model thinks behind each number of each row; -1 where it does not."""
    gpt, vocabulary, thinking = trained()
    batch = batch_of(rows, vocabulary)
    grid, _ = rollout(gpt, batch.real, batch.length, thinking)
    number = torch.where(
        grid.thinks[:, :, 0], grid.next_thought(len(vocabulary.tokens))[:, :, 0], -1
    )
    return [line[: len(operations(row)) + 1] for line, row in zip(number.tolist(), rows)]


@torch.no_grad()
def says(rows: list[str], instead: list[tuple[int, int]] | None = None) -> list[bool]:
    """
    Whether the main job's model gives each row's answer. instead: for each row a place (0: behind
    the first number) and the thought that it has to think there.
    """
    gpt, vocabulary, thinking = trained()
    batch, forced = batch_of(rows, vocabulary), None
    if instead:
        forced = torch.full((*batch.real.shape, 1), UNFORCED)
        for line, (place, thought) in zip(forced, instead):
            line[place] = thought
    grid, out = rollout(gpt, batch.real, batch.length, thinking, forced=forced)
    return answers_right(out, grid, counted_tokens(batch)).tolist()


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Raises AssertionError that says by how much they differ."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert worst < 1e-5, f"{what}: off by up to {worst:.3g}"


# ----------------------------------------------------------------------------------------------
# small runs


def tiny(**changes) -> Trainer:
    """Not yet trained, on chains modulo 3 of 1 to 3 operations; seed 2, with which 500 steps do."""
    data = FOLDER / "workshop"
    if not (data / "probe.json").exists():
        shorter = patch.object(prepare, "N_TEST", 1)  # nobody asks for rows of 1,024 operations
        with contextlib.redirect_stdout(io.StringIO()), shorter:
            prepare.main(["--modulus=3", "--levels=3", "--rows=3000", f"--out={data}"])
    sizes = {"n_bits": 3, "seed": 2, "lr": 2e-3, "steps": STEPS}
    return Trainer(Config(**(sizes | {"data": str(data), "device": "cpu"} | changes)))


def main_job() -> Trainer:
    """The main job, not yet trained; in a hurry, a tiny one."""
    return Trainer(Config(data=str(ROOT / "data/arithmetic"), device="cpu")) if LEARNS else tiny()


@cache
def tiny_run(**changes) -> Trainer:
    """A tiny run, trained: a quarter of a minute, but each is trained only once."""
    trainer = tiny(**changes)
    with contextlib.redirect_stdout(io.StringIO()):
        while trainer.left > 0:
            trainer.train_step()
    trainer.model.eval()
    return trainer


def meant(run: Trainer) -> dict:
    """What the thoughts of a run mean: see lab.report.meaning."""
    thinking = dataclasses.replace(run.thinking, greedy=True)
    probe = json.loads(Path(run.config.data, "probe.json").read_text())
    return meaning(run.model, run.vocabulary, thinking, probe)
