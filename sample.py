"""
Let a trained model answer prompts. What it thinks stays silent, unless you ask.

  python sample.py "3+4*2=" "1*3*3+4="                  prompts on the command line
  python sample.py --file=prompts.txt                   one prompt a line; without prompts and file: standard input
  python sample.py --show_thoughts "3+4*2="             thoughts dimmed, in brackets, numbered 0 .. K-1
  python sample.py --greedy=false --samples=5 "3+4="    several draws of each prompt, in one batch
  python sample.py --run=out/shakespeare --greedy=false --top_k=20 --max_new_tokens=1000 "ROMEO:"
  python sample.py --run=out/observer --introspect "3+4*2="     one line of the observer's about each answer

The same seed gives the same text. A single sample is printed while it is made. A text may be of any length: the model sees a window that
slides, by default as many columns as it was trained on, in constant memory.
"""

import codecs
import dataclasses
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import DataError, Vocabulary
from loss import targets
from model import GPT
from runs import Config, as_trained, load_config, load_model, pick_device, run
from stream import Rollout, generate, read

RECALL = {"policy": {}, "never": {"hold_recall": 0.0}, "always": {"hold_recall": 1.0}}


@dataclass
class SampleConfig:
    run: str = "out/chain"  # folder of the checkpoint
    file: str = ""  # prompts, one a line
    samples: int = 1  # of each prompt
    max_new_tokens: int = 32  # real tokens a row may add
    greedy: bool = True  # the likeliest word and thought; false draws them
    temperature: float = 1.0  # of the words, when not greedy
    top_k: int = 0  # words to choose from, 0 for all
    window: int = -1  # columns in view; 0 for all, -1 for as many as a text's window had in training
    mode: str = "policy"  # policy | never | random | constant | swapped
    price: float = -1.0  # nats: think wherever the observer expects more than this of a thought, and ask no gate; below 0 the gate is asked
    budget: int = 0  # thoughts in a prompt and its answer, at most; 0 is no limit but the model's own
    revisions: int = 8  # words an answer may take back, of a model with REVISE
    recall: str = "policy"  # policy | never | always, of a model with RECALL
    show_thoughts: bool = False
    introspect: bool = False  # how sure it was, where it hesitated, how long it thought: from the observer's readings
    seed: int = 1
    device: str = "auto"


def read_prompts(arguments: list[str], config: SampleConfig) -> list[str]:
    if arguments:
        return arguments
    if config.file:
        try:
            return [line for line in Path(config.file).read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read prompts from {config.file}: {error}") from None
    return [line for line in sys.stdin.read().splitlines() if line]


def bracketed(token: int, vocabulary: Vocabulary, n_think: int, dim: bool) -> bytes:
    """A token as it is shown: a thought or RECALL in brackets, dimmed on a terminal."""
    V = len(vocabulary.tokens)
    if token < V:
        return vocabulary.pieces[token]
    name = f"[{token - V}]" if token - V < n_think else "[recall]"
    return (f"\033[2m{name}\033[0m" if dim else name).encode()


def stream_to(vocabulary: Vocabulary, n_think: int, show_thoughts: bool):
    """-> what `speak` calls with each new column of its only row: prints it, whole characters at a time."""
    decoder, dim = codecs.getincrementaldecoder("utf-8")("replace"), sys.stdout.isatty()

    def write(token) -> None:
        token = int(token)
        if token != vocabulary.row_end and (token < len(vocabulary.tokens) or show_thoughts):
            print(decoder.decode(bracketed(token, vocabulary, n_think, dim)), end="", flush=True)

    return write


def show(roll: Rollout, row: int, vocabulary: Vocabulary, n_think: int, dim: bool) -> str:
    """The row's stream, its thoughts in brackets, and words that it took back before the word that it said instead."""
    roll, pieces = roll.alone(row), []
    last = int(roll.real[0, roll.length[0] - 1])  # predicted by the last column, itself never fed
    columns = [*zip(roll.stream[0].tolist(), roll.holds_real[0].tolist(), roll.pointer[0].tolist()), (last, True, int(roll.length[0]))]
    for token, real, pointer in columns:
        pieces += [b"[not %b]" % vocabulary.pieces[word] for place, word in roll.taken[0].tolist() if real and place == pointer - 1]
        pieces += [bracketed(token, vocabulary, n_think, dim)] * (token != vocabulary.row_end)
    return b"".join(pieces).decode("utf-8", "replace")


def columns_in_view(trained: Config, vocabulary: Vocabulary) -> int:
    """As many as in training; 0, all, where rows have an end and there was no window."""
    return trained.window or (trained.block * (1 + trained.max_run * (trained.n_think > 0)) if vocabulary.row_end < 0 else 0)


@torch.no_grad()
def introspect(model: GPT, roll: Rollout, row: int, given: int, vocabulary: Vocabulary) -> str:
    """
    What the observer says of the answer that begins behind `given` real tokens. How sure: e to the minus the mean loss it saw coming, the probability of a
    token. Every number is read at the column that said the token, or chose to think; that column sees neither the token nor anything behind it.
    """
    roll = roll.alone(row)
    C, out = roll.stream.size(1), read(model, roll)
    coming, gate = out.readings[0, :, 0].clamp(min=0).tolist(), out.gate[0].sigmoid().tolist()  # nats; a regression may miss below 0
    thinks, pointer, said = (part[0].tolist() for part in (roll.thinks | roll.recalls, roll.pointer, targets(roll)))
    answer, runs, first = [], [], 0  # columns of the answer; (thoughts in a row, gate before the first, column that ended it)
    for c in range(C):
        if thinks[c]:
            continue
        if pointer[c] >= given and said[c] != vocabulary.row_end:
            answer.append(c)
        if c > first:
            runs.append((c - first, gate[first], c))
        first = c + 1
    if not answer:
        return "said nothing"
    at = lambda c: f"{vocabulary.decode([said[c]])!r} after {vocabulary.decode(roll.real[0, : pointer[c]].tolist())[-12:]!r}"  # noqa: E731
    most = max(answer, key=lambda c: coming[c])
    sure = math.exp(-sum(coming[c] for c in answer) / len(answer))
    line = f"sure {sure:.2f} a token; hesitated most at {at(most)} ({coming[most]:.2f} nats seen coming); "
    if not runs:
        return line + "did not think"
    length, asked, c = max(runs)
    return line + f"{sum(thinks)} thought{'s' * (sum(thinks) > 1)}, longest before {at(c)} ({length}, gate {asked:.2f})"


@contextmanager
def steered(model: GPT, price: float):
    """Within, a thought is thought where the observer's `worth` is above the price, in nats; the gate is not asked."""
    D, read = model.config.n_embd, model.blocks[-1].attention.observer.read
    hook = model.gate.register_forward_hook(lambda _m, seen, gate: torch.cat([1e4 * (read(seen[0][..., D:])[..., 1:2] - price), gate[..., 1:]], dim=-1))
    try:
        yield
    finally:
        hook.remove()


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], SampleConfig)
    if config.mode not in ("policy", "never", "random", "constant", "swapped"):
        raise DataError(f"mode = {config.mode!r} is none of policy, never, random, constant, swapped")
    if config.recall not in RECALL:
        raise DataError(f"recall = {config.recall!r} is none of {', '.join(RECALL)}")
    if min(config.budget, config.revisions) < 0:
        raise DataError("budget and revisions cannot be negative")
    if config.temperature <= 0 or config.samples < 1 or config.max_new_tokens < 1:
        raise DataError("temperature, samples and max_new_tokens must be positive")
    model, vocabulary, state = load_model(config.run, pick_device(config.device))
    prompts = read_prompts([a for a in argv if not a.startswith("--")], config)
    if not prompts:
        raise DataError("there is no prompt")
    ids = [vocabulary.encode(prompt) for prompt in prompts for _ in range(config.samples)]
    if config.introspect and not model.config.observer:
        raise DataError(f"the model in {config.run} has no observer, so it cannot introspect: train one with --observer=quarters")
    if config.price >= 0 and not (model.config.observer and model.config.n_think):
        raise DataError(f"the model in {config.run} has no observer of thoughts, so a price cannot steer it: train one with --observer=quarters")
    window = columns_in_view(Config(**state["config"]), vocabulary) if config.window < 0 else config.window
    thinking = dataclasses.replace(
        as_trained(state, vocabulary), mode=config.mode, greedy=config.greedy, window=window, temperature=config.temperature, top_k=config.top_k,
        budget=config.budget, revisions=config.revisions, **RECALL[config.recall],
    )  # fmt: skip
    generator = torch.Generator(model.embedding.weight.device).manual_seed(config.seed)
    watch = None
    if len(ids) == 1 and not (model.config.revise and config.revisions):  # what is printed cannot be taken back
        watch = stream_to(vocabulary, model.config.n_think, config.show_thoughts)
    if watch:
        watch(ids[0][0])
    try:
        with steered(model, config.price) if config.price >= 0 else nullcontext():
            answers, roll = generate(model, ids, config.max_new_tokens, thinking, generator, vocabulary.row_end, watch)
    except ValueError as error:
        raise DataError(str(error)) from None
    for row, (prompt, answer) in enumerate(zip(ids, answers)):
        shown = show(roll, row, vocabulary, model.config.n_think, sys.stdout.isatty()) if config.show_thoughts else vocabulary.decode(prompt + answer)
        print("" if watch else shown)
        if config.introspect:
            print("  " + introspect(model, roll, row, len(prompt), vocabulary))


if __name__ == "__main__":
    run(main, "sample.py")
