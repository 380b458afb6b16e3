"""
What a training step, a rollout and a sample cost, beside their peers: a Markdown table, and one line of JSON.

  python bench.py                    three to four minutes on one thread of a CPU
  python bench.py --run=out/chain    the same of a trained model, on its own data

Everything is synthetic but for --run: rows of random words with a thought behind each (the dearest stream there is, half of its columns are thoughts), and
an untrained model. Jobs that are compared run in turn in one process, so that what disturbs one disturbs the others; medians of `repeats` turns, the lowest and
highest in brackets, and ratios within a turn. Peak memory is that of a process of its own, above what it held before the step.

Peers, with the same shape, words and columns: a rollout that keeps no keys and values and computes the whole prefix for each column, as nanoGPT
samples; and GPT-2 of Hugging Face transformers, with its cache, in the shortest loop that samples from it. It is not required: without it, its row says so.
"""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.dataset import Batch, load_split
from fast import parallel_rollout, rollout_by_words
from loss import hybrid_loss
from model import GPT, GPTConfig
from runs import Config, as_trained, how_to_think, load_config, load_model, model_config, pick_device, run
from stream import Thinking, draw, rollout, speak
from train import find_rollout


@dataclass
class BenchConfig:
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    words: int = 65  # V
    bits: int = 8  # of a thought
    rows: int = 4  # B
    length: int = 256  # columns of a stream, half of them thoughts, where the length is not what varies
    lengths: str = "64,128,256,512,1024"  # columns, for the growth
    repeats: int = 3
    threads: int = 1
    device: str = "auto"
    run: str = ""  # folder of a trained model, to time its rollouts instead
    peak: str = ""  # plain or hybrid: one step of that kind, and nothing but its peak memory is printed


def alternately(jobs: dict, repeats: int) -> dict[str, list]:
    """Call each job once to warm up, then all in turn, `repeats` times -> what each returned, turn by turn."""
    turns = [{name: job() for name, job in jobs.items()} for _ in range(1 + repeats)][1:]
    return {name: [turn[name] for turn in turns] for name in jobs}


class Clock:
    """Seconds from tick to tick; a GPU is waited for."""

    def __init__(self, device: str):
        self.device, self.parts = device, {}
        self.tick("")

    def tick(self, part: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


class Watched:
    """A model whose forward passes are timed apart from what is done with them."""

    def __init__(self, model: GPT, clock: Clock):
        self.model, self.clock = model, clock

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **options):
        self.clock.tick("losses")
        out = self.model(*args, **options)
        self.clock.tick("passes")
        return out


def timed(job, device: str):
    """-> what calls the job and returns the seconds it took."""

    def call() -> float:
        clock = Clock(device)
        job()
        clock.tick("all")
        return clock.parts["all"]

    return call


def make(c: BenchConfig, device: str, n_bits: int) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(c.words, n_bits, c.n_layer, c.n_head, c.n_embd)).to(device)


def make_batch(c: BenchConfig, device: str) -> Batch:
    """Rows of real tokens whose streams, with a thought behind each token but the last, have c.length columns."""
    T = c.length // 2 + 1
    length = torch.full((c.rows,), T)
    return Batch.plain(torch.randint(c.words, (c.rows, T), generator=torch.Generator().manual_seed(0)), length, length - 1, torch.ones_like(length)).to(device)


WAYS = ("by columns", "by words", "in parallel")  # to make one and the same rollout


def three_rollouts(model: GPT, batch: Batch, thinking: Thinking, noise, passes: list) -> dict:
    """-> jobs; passes: gets those of the parallel one through the model."""
    rows = model, batch.real, batch.length, thinking, noise
    return dict(zip(WAYS, (lambda: rollout(*rows), lambda: rollout_by_words(*rows), lambda: passes.append(parallel_rollout(*rows)[1]))))


def step_of(model: GPT, batch: Batch, config: Config, thinking: Thinking, paid: bool, device: str):
    """-> what does one whole step as train.py's, and returns seconds by part."""
    optimiser, noise = model.optimiser(1e-3, 1e-3, 0.1, (0.9, 0.99)), torch.Generator(device).manual_seed(0)

    def step() -> dict[str, float]:
        clock = Clock(device)
        roll, _ = find_rollout(model, batch, config, device, thinking, noise)
        clock.tick("rollout")
        loss, _ = hybrid_loss(Watched(model, clock), roll, batch, config, paid, noise)
        clock.tick("losses")
        optimiser.zero_grad()
        loss.backward()
        clock.tick("passes")  # there and back
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        clock.tick("optimiser")
        return clock.parts

    return step


def training_step(c: BenchConfig, device: str, n_bits: int, forget: float = 0.0):
    """A step of random rows, free phase or plain; see `step_of`."""
    how = {"prompt_weight": 1.0, "imitate": 0.1 if forget else 0.0, "rollouts": 1}
    config, batch = Config(n_bits=n_bits, forget=forget, **how), make_batch(c, device)
    return step_of(make(c, device, n_bits), batch, config, Thinking(hold=1.0), False, device)


# ----------------------------------------------------------------------------------------------
# the peers


@torch.no_grad()
def without_cache(model: GPT, real: torch.Tensor, columns: int, generator) -> torch.Tensor:
    """A thought behind each real token, the whole stream computed again for each column -> (B, columns)."""
    stream = real[:, :1]
    for column in range(columns - 1):
        noise = model.thoughts.noise(len(real), generator=generator)
        thought = model.thoughts.choose(model.think(stream).thoughts[:, -1], noise)
        thought = model.config.vocab_size + thought
        stream = torch.cat([stream, (real[:, column // 2 + 1] if column % 2 else thought)[:, None]], dim=1)
    return stream


def transformers_sampler(c: BenchConfig, device: str, noise):
    """-> what samples c.length tokens from GPT-2 of our shape, or None if the package is missing."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    shape = {"n_positions": c.length, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    shape = GPT2Config(vocab_size=c.words, bos_token_id=None, eos_token_id=None, **shape)
    model = GPT2LMHeadModel(shape).to(device).eval()

    @torch.no_grad()
    def sample() -> None:
        token, cache = torch.zeros(c.rows, 1, dtype=torch.long, device=device), None
        for _ in range(c.length):
            out = model(token, past_key_values=cache, use_cache=True)
            token, cache = draw(out.logits[:, -1], noise)[:, None], out.past_key_values

    return sample


# ----------------------------------------------------------------------------------------------
# tables


def spread(values: list[float], unit: float = 1.0) -> list[float]:
    """-> lowest, median, highest."""
    return [float(f"{unit * x:.4g}") for x in (min(values), np.median(values), max(values))]


def ratio(a: list[float], b: list[float]) -> list[float]:
    return spread([x / y for x, y in zip(a, b)])


def cell(value) -> str:
    if isinstance(value, list):
        low, middle, high = map(cell, value)
        return middle if low == high else f"{middle} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    return str(value)


def table(title: str, rows) -> list[dict]:
    """Print dictionaries with the same keys, each as soon as it comes -> all of them."""
    found = []
    for row in rows:
        if not found:
            print(f"\n**{title}**\n\n| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
        print("| " + " | ".join(map(cell, row.values())) + " |", flush=True)
        found.append(row)
    return found


def exponent(lengths: list[int], values: list[float]) -> float:
    """k of the power law length^k through the values, by least squares on logarithms."""
    return round(float(np.polyfit(np.log(lengths), np.log(values), 1)[0]), 2)


def peak_memory(c: BenchConfig, device: str, kind: str) -> int | None:
    """Bytes of one step above what was held before it, in a process of its own; None where nobody counts."""
    if device != "cuda" and not Path("/proc/self/status").exists():
        return None
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(dataclasses.replace(c, peak=kind, device=device)).items()]
    return int(subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True).stdout)


def print_peak(c: BenchConfig, device: str) -> None:
    """What that process does. On a CPU Linux counts, in /proc."""

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    n_bits = c.bits * (c.peak == "hybrid")
    training_step(dataclasses.replace(c, rows=1, length=16), device, n_bits)()
    before = peak()
    training_step(c, device, n_bits)()
    print(peak() - before)


# ----------------------------------------------------------------------------------------------
# what is measured


def growth(c: BenchConfig, device: str):
    """Steps and rollouts at several lengths, widths and batch sizes -> a row of the table for each."""
    shapes = [dataclasses.replace(c, length=int(n)) for n in c.lengths.split(",")] + [dataclasses.replace(c, n_embd=w) for w in (c.n_embd // 2, 2 * c.n_embd)]
    for s in shapes + [dataclasses.replace(c, rows=n) for n in (max(1, c.rows // 4), 4 * c.rows)]:
        model, batch, passes = make(s, device, s.bits), make_batch(s, device), []
        noise = torch.Generator(device).manual_seed(0)
        plain, hybrid = (training_step(s, device, n_bits) for n_bits in (0, s.bits))
        jobs = {"plain": plain, "hybrid": hybrid} | three_rollouts(model, batch, Thinking(hold=1.0), noise, passes)
        took = alternately({name: timed(job, device) for name, job in jobs.items()}, c.repeats)
        memory = {f"{kind} step, MB": bytes / 1e6 for kind in ("plain", "hybrid") if (bytes := peak_memory(s, device, kind)) is not None}
        yield (
            {"rows": s.rows, "columns": s.length, "width": s.n_embd, "plain step, ms": spread(took["plain"], 1e3), "hybrid step, ms": spread(took["hybrid"], 1e3)}
            | {"hybrid / plain": ratio(took["hybrid"], took["plain"])}
            | {f"{way}, columns/s": float(s.rows * s.length / np.median(took[way])) for way in WAYS}
            | {f"by columns / {way}": ratio(took["by columns"], took[way]) for way in WAYS[1:]}
            | {"passes per column": float(np.median(passes) / s.length)}
            | memory
        )


def exponents(c: BenchConfig, rows: list[dict]) -> dict:
    """Powers of the stream's length, of the rows in which nothing else varies."""
    rows = rows[: len(c.lengths.split(","))]
    lengths = [row["columns"] for row in rows]
    series = {name: [value[1] if isinstance(value := row[name], list) else value for row in rows] for name in rows[0] if name.endswith((", ms", ", MB"))}
    series |= {f"{way} rollout": [row["columns"] / row[f"{way}, columns/s"] for row in rows] for way in WAYS}
    return {name: exponent(lengths, values) for name, values in series.items()}


def operations(step) -> int:
    """Floating-point operations of a step's products with weights. (Attention's are counted on a GPU alone.)"""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def parts(steps: dict, repeats: int):
    """Where the time of each step goes, the first of them plain; the parts add up."""
    found, work = alternately(steps, repeats), {name: operations(step) for name, step in steps.items()}
    whole = {name: [sum(turn.values()) for turn in turns] for name, turns in found.items()}
    for name, turns in found.items():
        by_part = {f"{part}, ms": spread([turn[part] for turn in turns], 1e3) for part in ("rollout", "passes", "losses", "optimiser")}
        yield {"step": name} | by_part | {"together, ms": spread(whole[name], 1e3), "/ plain": ratio(whole[name], whole["plain"])} | {
            "operations / plain": work[name] / work["plain"]
        }


def random_steps(c: BenchConfig, device: str) -> dict:
    return {
        "plain": training_step(c, device, 0),
        "hybrid": training_step(c, device, c.bits),
        "hybrid, forgetting": training_step(c, device, c.bits, 0.8),
    }


def trained_steps(c: BenchConfig, device: str) -> dict:
    """Steps of a trained model, should it train on, and of an untrained plain one of its shape, on the same rows of its data, of all lengths."""
    model, vocabulary, state = load_model(c.run, device)
    config = Config(**state["config"])
    silent = {"n_bits": 0, "observer": "", "done": False, "recall": False, "revise": False}
    split = load_split(config.data, "train", vocabulary, config.block, config.demonstrate)
    rows = max(1, config.batch_tokens // split.longest(split.levels[-1]) // config.rollouts)
    batch = split.draw(rows, split.levels, torch.Generator().manual_seed(0)).to(device).repeat(config.rollouts)
    plain = dataclasses.replace(config, **silent)
    free, paid = (how_to_think(config, vocabulary, paid) for paid in (False, True))
    return {
        "plain": step_of(GPT(model_config(len(vocabulary.tokens), plain)).to(device), batch, plain, free, False, device),
        "hybrid, free": step_of(model, batch, config, free, False, device),
        "hybrid, paid": step_of(model, batch, config, paid, True, device),
    }


def masks(c: BenchConfig, device: str):
    """Attention alone, there and back: causal; under the mask of rows that forget at their middle; and with the halves of these rows packed as rows of their own."""
    for C in map(int, c.lengths.split(",")):
        heads = torch.randn(3, c.rows, c.n_head, C, c.n_embd // c.n_head, device=device, requires_grad=True)
        half = torch.arange(C, device=device) >= C // 2
        forgets = (half[:, None] == half).tril()
        packed = lambda x: x.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2)  # noqa: E731 (3, B, nh, C, hs) -> (3, 2 B, nh, C / 2, hs)
        attend = lambda x, **view: torch.nn.functional.scaled_dot_product_attention(*x, **view).sum().backward()  # noqa: E731
        jobs = {
            "causal": lambda: attend(heads, is_causal=True),
            "mask": lambda: attend(heads, attn_mask=forgets),
            "packed": lambda: attend(packed(heads), is_causal=True),
        }
        found = alternately({name: timed(job, device) for name, job in jobs.items()}, c.repeats)
        times = {f"{name}, ms": spread(found[name], 1e3) for name in jobs}
        yield {"rows": c.rows, "columns": C} | times | {f"{name} / causal": ratio(found[name], found["causal"]) for name in ("mask", "packed")}


def peers(c: BenchConfig, device: str):
    """The same columns by other ways, each against ours in the same turn."""
    model, batch = make(c, device, c.bits), make_batch(c, device)
    noise = torch.Generator(device).manual_seed(0)
    start = torch.zeros(c.rows, c.length + 1, dtype=torch.long, device=device)
    given, length = torch.ones_like(start[:, 0]), torch.full_like(start[:, 0], c.length + 1)
    on_gpu = {"rollout as a CUDA graph": lambda: rollout(model, batch.real, batch.length, Thinking(hold=1.0), noise, graph=True)} if device == "cuda" else {}
    ways = three_rollouts(model, batch, Thinking(hold=1.0), noise, passes=[])
    jobs = {
        "rollout": ways["by columns"],
        **on_gpu,
        "rollout by words": ways["by words"],
        "rollout in parallel": ways["in parallel"],
        "rollout without a cache": lambda: without_cache(model, batch.real, c.length, noise),
        "sampling": lambda: speak(model, start, given, length, Thinking("never"), noise),
        "sampling, GPT-2 of transformers": transformers_sampler(c, device, noise),
    }
    found = alternately({name: timed(job, device) for name, job in jobs.items() if job}, c.repeats)
    for name in jobs:
        if name in found:
            times = {f"time / {ours}": ratio(found[name], found[ours]) for ours in ("sampling", "rollout", "rollout by words", "rollout in parallel")}
            yield {"": name, "columns/s": float(c.rows * c.length / np.median(found[name]))} | times
        else:
            yield {"": name, "columns/s": "transformers is not installed"}


def trained(c: BenchConfig, device: str):
    """The rollouts of a trained model, free and paid, on rows of its own data."""
    model, vocabulary, state = load_model(c.run, device)
    config = Config(**state["config"])
    split = load_split(config.data, "val", vocabulary, config.block)
    batch = split.first(c.rows, split.levels[-1]).to(device)
    for name, hold in (("free", config.hold), ("paid", None)):
        noise, thinking, passes = torch.Generator(device).manual_seed(0), dataclasses.replace(as_trained(state, vocabulary), hold=hold), []
        columns = rollout(model, batch.real, batch.length, thinking, noise).stream.size(1)
        jobs = three_rollouts(model, batch, thinking, noise, passes)
        found = alternately({way: timed(job, device) for way, job in jobs.items()}, c.repeats)
        row = {"phase": name, "rows": c.rows, "columns": columns} | {f"{way}, ms": spread(found[way], 1e3) for way in jobs}
        yield row | {f"by columns / {way}": ratio(found["by columns"], found[way]) for way in WAYS[1:]} | {"passes per column": float(np.median(passes) / columns)}


def main(argv: list[str]) -> None:
    c = load_config(argv, BenchConfig)
    device = pick_device(c.device)
    torch.set_num_threads(c.threads)
    if c.peak:
        return print_peak(c, device)
    model = "" if c.run else f", {c.n_layer} layers, {c.words} words, {c.bits} bits"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads{model}; medians of {c.repeats} turns")
    if c.run:
        found = {"trained": table(f"The rollouts of {c.run}", trained(c, device))}
        found["parts"] = table("Parts of its step", parts(trained_steps(c, device), c.repeats))
    else:
        found = {"growth": table("Training steps on the same real tokens, and rollouts", growth(c, device))}
        found["exponents"] = table("Power of the stream's length with which they grow", [exponents(c, found["growth"])])
        shape = lambda c: f"rows {c.rows}, columns {c.length}, width {c.n_embd}"  # noqa: E731
        found["parts"] = table(f"Parts of a step: {shape(c)}", parts(random_steps(c, device), c.repeats))
        found["masks"] = table("Attention alone, there and back", masks(c, device))
        small = dataclasses.replace(c, rows=1, n_embd=c.n_embd // 2)
        found["peers"], found["peers, small"] = (table(f"Peers: {shape(s)}", peers(s, device)) for s in (c, small))
    print("\n" + json.dumps({"torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "config": dataclasses.asdict(c)} | found))


if __name__ == "__main__":
    run(main, "bench.py")
