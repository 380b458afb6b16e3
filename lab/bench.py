"""
What a training step and a generated cell cost, in milliseconds on this machine: two tables.

  python lab/bench.py                    the main job, less than half a minute on one core
  python lab/bench.py config/FILE.toml   the same of another experiment

Steps are train.py's own, of an untrained model with all levels in use: of a plain GPT, in the
warm-up, and in the cost phase. What is compared runs in turn in one process, so that what disturbs
one disturbs the others; medians of `repeats` turns, behind one that does not count.

A generated cell is a token or a thought, in turn. Beside `generate`: the same without a cache, and
GPT-2 of Hugging Face transformers, of the same shape, if that is installed.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from model import GPT, Thinking, choose_thought, choose_token, generate
from options import load_config, option, run

PARTS = ("rollout", "backward", "optimiser", "the rest")
THINKING = Thinking(force=1.0, greedy=True)  # a thought behind each token


@dataclass
class BenchConfig(train.Config):
    threads: int = option(1, "CPU threads, 0 for torch's choice", 0)
    repeats: int = option(7, "turns, of which the median is taken", 1)
    cells: int = option(256, "to generate, at most", 8)


def in_turn(jobs: dict[str, Callable], repeats: int) -> dict[str, list]:
    """Call all jobs, one behind the other, `repeats` times -> what each returned, turn by turn."""
    turns = [{name: job() for name, job in jobs.items()} for _ in range(1 + repeats)]
    return {name: [turn[name] for turn in turns[1:]] for name in jobs}


def table(columns: list[str], rows: list[list]) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for name, *values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in values) + " |")


class Clock:
    """Milliseconds by part: what has passed since the last call is of the part that is named."""

    def __init__(self, device: str):
        self.device, self.ms = device, dict.fromkeys(PARTS, 0.0)
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.ms[part] += 1e3 * (now - self.last)
        self.last = now

    def on(self, function: Callable, part: str) -> Callable:
        """The function, timed as a part."""

        def timed(*arguments, **options):
            self("the rest")
            result = function(*arguments, **options)
            self(part)
            return result

        return timed


def step(trainer: train.Trainer, paid: bool) -> dict[str, float]:
    """One training step, in the cost phase or not -> milliseconds by part."""
    trainer.paid, clock = paid, Clock(trainer.device)
    hook = trainer.optimisers[0].register_step_pre_hook(lambda *_: clock("backward"))
    with (
        patch.object(train, "rollout", clock.on(train.rollout, "rollout")),
        patch.object(trainer, "update", clock.on(trainer.update, "optimiser")),
    ):
        trainer.train_step()
    hook.remove()
    clock("the rest")
    return clock.ms


def steps(config: BenchConfig) -> None:
    """The table of training steps."""
    config = dataclasses.replace(config, curriculum=False, warm_up=1.0)
    plain = dataclasses.replace(config, n_bits=0, observer="", recall=False, revise=0.0)
    plain, thinking = train.Trainer(plain), train.Trainer(config)
    jobs = {
        "plain GPT": partial(step, plain, False),
        "warm-up": partial(step, thinking, False),
        "cost phase": partial(step, thinking, True),
    }
    rows = []
    for name, found in in_turn(jobs, config.repeats).items():
        by_part = [median(ms[part] for ms in found) for part in PARTS]
        rows.append([name, *by_part, median(sum(ms.values()) for ms in found)])
    table(["ms a step", *PARTS, "all"], rows)


@torch.no_grad()
def without_cache(model: GPT, prompt: int, tokens: int) -> list[int]:
    """A thought and a token in turn, for each the whole stream again -> the real tokens."""
    V, device, stream = model.config.vocab_size, model.embedding.weight.device, [prompt]
    for _ in range(tokens):
        if model.config.n_bits:
            thoughts = model(torch.tensor([stream], device=device)).thoughts
            stream.append(V + int(choose_thought(model, thoughts[:, -1], THINKING)))
        logits = model(torch.tensor([stream], device=device)).logits[0, -1, :V]
        stream.append(choose_token(logits, 0.0, 0))
    return [token for token in stream if token < V]


def gpt2(model: GPT, cells: int):
    """-> what generates tokens with GPT-2 of the model's shape, or None without the package."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c, device = model.config, model.embedding.weight.device
    shape = {"n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_positions": cells + 1}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, **shape, **ends)).to(device).eval()
    start = torch.ones(1, 1, dtype=torch.long, device=device)
    how = {"max_new_tokens": cells, "do_sample": False, "attention_mask": start}
    return lambda: peer.generate(start, **how)


def cells(config: BenchConfig) -> None:
    """The table of generated cells."""
    trainer, rows = train.Trainer(config), []
    model = trainer.model.eval()

    def ms_a_cell(job: Callable, length: int) -> float:
        clock = Clock(trainer.device)
        job()
        clock("the rest")
        return clock.ms["the rest"] / length

    for length in (config.cells // 4, config.cells // 2, config.cells):
        tokens = length // (2 if config.n_bits else 1)
        jobs = {
            "generate": partial(generate, model, [0], tokens, THINKING, revisions=0),
            "without a cache": partial(without_cache, model, 0, tokens),
            "GPT-2 of transformers": gpt2(model, length),
        }
        jobs = {name: partial(ms_a_cell, job, length) for name, job in jobs.items() if job}
        found = in_turn(jobs, config.repeats)
        rows.append([length, *map(median, found.values())])
    table(["cells; ms a cell", *jobs], rows)


def main(argv: list[str]) -> None:
    config = load_config(argv, BenchConfig)
    steps(config)
    cells(config)


if __name__ == "__main__":
    run(main, "bench.py")
