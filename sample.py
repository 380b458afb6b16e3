"""
Let a trained model answer prompts. What it thinks stays silent, unless you ask.

  python sample.py "3+4*2=" "1*3*3+4="                  prompts on the command line
  python sample.py --file=prompts.txt                   one prompt a line; without prompts and file: standard input
  python sample.py --show_thoughts "3+4*2="             thoughts dimmed, in brackets, numbered 0 .. K-1
  python sample.py --greedy=false --samples=5 "3+4="    several draws of each prompt, in one batch
  python sample.py --run=out/shakespeare --greedy=false --top_k=20 --max_new_tokens=1000 "ROMEO:"

The same seed gives the same text. A single sample is printed while it is made. A text may be of any length: the model sees a window that
slides, by default as many columns as it was trained on, in constant memory.
"""

import codecs
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import DataError, Vocabulary
from model import Rollout, generate
from train import Config, as_trained, load_config, load_model, pick_device, run


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
    show_thoughts: bool = False
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


def bracketed(token: int, vocabulary: Vocabulary, dim: bool) -> bytes:
    """A token as it is shown: a thought in brackets, dimmed on a terminal."""
    V = len(vocabulary.tokens)
    if token < V:
        return vocabulary.pieces[token]
    return (f"\033[2m[{token - V}]\033[0m" if dim else f"[{token - V}]").encode()


def stream_to(vocabulary: Vocabulary, show_thoughts: bool):
    """-> what `rollout` calls with each new column of its only row: prints it, whole characters at a time."""
    decoder, dim = codecs.getincrementaldecoder("utf-8")("replace"), sys.stdout.isatty()

    def write(token) -> None:
        token = int(token)
        if token != vocabulary.row_end and (token < len(vocabulary.tokens) or show_thoughts):
            print(decoder.decode(bracketed(token, vocabulary, dim)), end="", flush=True)

    return write


def show(roll: Rollout, row: int, vocabulary: Vocabulary, dim: bool) -> str:
    """The row's stream, its thoughts in brackets."""
    columns = (roll.pointer[row] <= roll.length[row]) & roll.valid[row]
    last = int(roll.real[row, roll.length[row] - 1])  # predicted by the last column, itself never fed
    tokens = roll.stream[row][columns].tolist() + [last] * (last != vocabulary.row_end)
    return b"".join(bracketed(token, vocabulary, dim) for token in tokens).decode("utf-8", "replace")


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], SampleConfig)
    if config.mode not in ("policy", "never", "random", "constant", "swapped"):
        raise DataError(f"mode = {config.mode!r} is none of policy, never, random, constant, swapped")
    if config.temperature <= 0 or config.samples < 1 or config.max_new_tokens < 1:
        raise DataError("temperature, samples and max_new_tokens must be positive")
    model, vocabulary, state = load_model(config.run, pick_device(config.device))
    prompts = read_prompts([a for a in argv if not a.startswith("--")], config)
    if not prompts:
        raise DataError("there is no prompt")
    ids = [vocabulary.encode(prompt) for prompt in prompts for _ in range(config.samples)]
    trained = Config(**state["config"])
    window = config.window
    if window < 0:
        window = trained.block * (1 + trained.max_run * (trained.n_think > 0)) if vocabulary.row_end < 0 else 0
    thinking = dataclasses.replace(
        as_trained(state, vocabulary), mode=config.mode, greedy=config.greedy, window=window, temperature=config.temperature, top_k=config.top_k
    )
    generator = torch.Generator(model.embedding.weight.device).manual_seed(config.seed)
    watch = stream_to(vocabulary, config.show_thoughts) if len(ids) == 1 else None
    if watch:
        watch(ids[0][0])
    try:
        answers, roll = generate(model, ids, config.max_new_tokens, thinking, generator, vocabulary.row_end, watch)
    except ValueError as error:
        raise DataError(str(error)) from None
    if watch:
        return print()
    for row, (prompt, answer) in enumerate(zip(ids, answers)):
        print(show(roll, row, vocabulary, sys.stdout.isatty()) if config.show_thoughts else vocabulary.decode(prompt + answer))


if __name__ == "__main__":
    run(main, "sample.py")
