"""
Let a trained model answer prompts. What it thinks stays hidden, unless you ask.

  python sample.py "3+4*2=" "1*3*3+4="              prompts on the command line
  python sample.py --file=prompts.txt               one a line; or on standard input
  python sample.py --show_thoughts "3+4*2="         thoughts in brackets, by their numbers
  python sample.py --mode=swapped --show_thoughts "3+4*2=" "1*3*3+4="
  python sample.py --run=out/text --temperature=1 --max_new_tokens=1000 "ROMEO:"

Without prompts it answers one of the main job. Text is printed while it is made.
"""

import codecs
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import DataError, Vocabulary
from model import GPT, MODES, generate
from options import load_config, option, run
from runs import load_model, pick_device
from train import as_trained, trained_config

DEFAULT_PROMPT = "3+4*2="
RECALL = ("policy", "never", "always")


@dataclass
class SampleConfig:
    run: str = option("out/chain", "folder of the checkpoint")
    file: str = option("", "prompts, one a line")
    samples: int = option(1, "of each prompt", 1)
    max_new_tokens: int = option(32, "tokens of an answer, at most", 1)
    temperature: float = option(0.0, "of tokens; 0: the likeliest token and thought", 0)
    top_k: int = option(0, "tokens to draw from; 0 for all", 0)
    window: int = option(-1, "positions in view; 0 for all, -1 as in training", -1)
    mode: str = option("policy", "policy, never, random, constant, or swapped: the next prompt's")
    price: float = option(-1.0, "nats that a thought must be worth; below 0: ask the gate")
    revisions: int = option(8, "tokens that an answer may take back, with REVISE", 0)
    recall: str = option("policy", "policy, never or always, with RECALL")
    show_thoughts: bool = option(False, "in brackets; [not x] is what was taken back")
    introspect: bool = option(False, "what the observer expected of each answer")
    seed: int = option(1, "of everything that is drawn", 0, 2**32)
    device: str = option("auto", "auto, cpu, cuda or mps")


def read_prompts(prompts: list[str], file: str) -> list[str]:
    """From the command line, a file or standard input; if there are none, the default."""
    try:
        if file:
            prompts = prompts + [p for p in Path(file).read_text("utf-8-sig").splitlines() if p]
        elif not prompts and not sys.stdin.isatty():
            prompts = [p for p in sys.stdin.read().splitlines() if p]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts: {error}") from None
    if "" in prompts:
        raise DataError("a prompt is empty: it must hold at least one token")
    return prompts or [DEFAULT_PROMPT]


def check(config: SampleConfig, model: GPT, prompts: list[str]) -> None:
    """Raises DataError for what this model or these prompts do not allow."""
    for value, allowed in ((config.mode, MODES), (config.recall, RECALL)):
        if value not in allowed:
            raise DataError(f"{value!r} is none of {', '.join(allowed)}")
    if config.mode == "swapped" and len(set(prompts)) < 2:
        raise DataError("mode = swapped needs two different prompts, to swap their thoughts")
    has = f"the model in {config.run} has no"
    if (config.introspect or config.price >= 0) and not model.config.observer:
        raise DataError(f"{has} observer to ask: train one with --observer=quarters")
    if config.price >= 0 and not model.config.n_bits:
        raise DataError(f"{has} thoughts, so none has a price")


class Transcript:
    """What `generate` reports: printed, one event late, for REVISE may take it back; and kept."""

    def __init__(self, vocabulary: Vocabulary, show_thoughts: bool):
        self.vocabulary, self.show = vocabulary, show_thoughts
        self.held, self.decoder = b"", codecs.getincrementaldecoder("utf-8")("replace")
        self.cells = []  # of each token its id, then those of the thoughts and RECALL behind it

    def watch(self, what: str, number: int) -> None:
        name = b"recall" if what == "recall" else b"%d" % (number - len(self.vocabulary.tokens))
        if what == "revise":
            self.cells.pop()
            self.held, name = b"", b"not " + self.vocabulary.pieces[number]
        self.print(self.held)
        dimmed = b"\033[2m[%b]\033[0m" if sys.stdout.isatty() else b"[%b]"
        self.held = dimmed % name * self.show
        if what == "token":
            self.held = self.vocabulary.pieces[number] * (number != self.vocabulary.row_end)
            self.cells.append([])
        if what != "revise":
            self.cells[-1].append(number)

    def print(self, piece: bytes, end: str = "") -> None:
        print(self.decoder.decode(piece, bool(end)), end=end, flush=True)  # whole characters only


@torch.no_grad()
def introspect(model: GPT, cells: list[list[int]], given: int, vocabulary: Vocabulary, window: int):
    """
    What the observer expected of the answer behind `given` tokens -> a line. Sure is e to the minus
    the mean loss that it predicted. No reading knows its own token, or what RECALL saw.
    """
    V, K, stream, emitters = model.config.vocab_size, model.config.n_think, [], []
    for cell in cells:
        emitters.append(len(stream) - 1)  # a token is emitted by the last cell before it
        stream += [number for number in cell if number < V + K]
    seen = torch.tensor([stream[:-1]], device=model.embedding.weight.device)
    readings = model(seen, window=window).readings[0].tolist()
    worth = [readings[c - 1][1] for c, number in enumerate(stream) if number >= V]
    line = f"  {len(worth)} thoughts"
    if worth:
        line += f", worth {sum(worth) / len(worth):.2f} nats each"
    said = [(max(readings[c][0], 0), cell[0]) for c, cell in zip(emitters, cells)][given:]
    said = [(nats, token) for nats, token in said if token != vocabulary.row_end]
    if said:
        most, token = max(said)
        line += f"; sure {math.exp(-sum(nats for nats, _ in said) / len(said)):.2f} a token, "
        line += f"least of {vocabulary.decode([token])!r} ({most:.2f} nats expected)"
    return line


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], SampleConfig)
    prompts = read_prompts([a for a in argv if not a.startswith("--")], config.file)
    device = pick_device(config.device)
    model, vocabulary, state = load_model(config.run, device)
    check(config, model, prompts)
    ids = {prompt: vocabulary.encode(prompt) for prompt in prompts}
    trained, thinking = trained_config(state), as_trained(state, vocabulary)
    if config.window >= 0:
        thinking.window = config.window
    elif vocabulary.is_text and not thinking.window:  # a text has no end, its windows have
        thinking.window = trained.block * (1 + thinking.longest_run(model.config))
    thinking.greedy = not config.temperature
    thinking.price = config.price if config.price >= 0 else None
    if config.recall != "policy":
        thinking.force_recall = float(config.recall == "always")
    generator = torch.Generator(device).manual_seed(config.seed)

    options = {"generator": generator, "temperature": config.temperature, "top_k": config.top_k}
    options |= {"stop": vocabulary.row_end, "revisions": config.revisions}

    def answer(prompt: str, mode: str, watch, instead=None) -> None:
        how, new = dataclasses.replace(thinking, mode=mode), config.max_new_tokens
        try:
            generate(model, ids[prompt], new, how, instead=instead, watch=watch, **options)
        except ValueError as error:
            raise DataError(str(error)) from None

    for i, prompt in [(i, p) for i, p in enumerate(prompts) for _ in range(config.samples)]:
        transcript = Transcript(vocabulary, config.show_thoughts)
        instead = None
        if config.mode == "swapped":
            events, following = [], prompts[i + 1 :] + prompts
            other = next(p for p in following if p != prompt)
            answer(other, "policy", lambda *event: events.append(event))
            numbers = [number for what, number in events if what == "think"]
            instead = [number - model.config.vocab_size for number in numbers]
        answer(prompt, config.mode, transcript.watch, instead)
        transcript.print(transcript.held, end="\n")
        if config.introspect:
            given = len(ids[prompt])
            print(introspect(model, transcript.cells, given, vocabulary, thinking.window))


if __name__ == "__main__":
    run(main, "sample.py")
