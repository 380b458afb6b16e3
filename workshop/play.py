"""
Write a page in which a trained model runs: one file for any browser, weights inside, no network.

  python workshop/play.py --run=out/chain                       writes out/chain/play.html
  python workshop/play.py --run=out/chain --out=workshop/play.html

The page is play.in.html with gpt.js, the network in JavaScript, and with what `payload` collects:
sizes, weights, held-out rows to try, and what each thought means, counted by lab/report.py: with
the data's probe.json or, where there is none, by the answer that the model has so far. It
answers greedily, as sample.py does; a gate that was never taught thinks where it was made to in
training. Not for models with RECALL, REVISE or learned positions, nor for running text.
"""

import base64
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, Rows, Vocabulary, load_split
from lab.report import meaning
from model import GPT, Thinking, generate
from options import load_config, option, run
from runs import load_model
from train import as_trained, trained_config

HERE = Path(__file__).parent
ROWS = 3  # held-out rows of each level that the page offers
PROBED = 15  # rows that are labelled by the model's own answers,
LONGEST_ANSWER = 8  # of so many tokens


@dataclass
class PlayConfig:
    run: str = option("out/chain", "folder of the checkpoint")
    out: str = option("", "the page; by default play.html in that folder")
    data: str = option("", "folder of the data, if not where the checkpoint was trained")


def check(model: GPT, vocabulary: Vocabulary) -> None:
    """Raises DataError for a model that gpt.js cannot run."""
    config = model.config
    cannot = {
        "RECALL": config.recall,
        "REVISE": config.revise,
        "learned positions": config.n_positions,
        "a text instead of rows with answers": vocabulary.is_text,
    }
    if has := [name for name, there in cannot.items() if there]:
        raise DataError(f"the page cannot play a model with {' and '.join(has)}")


def held_out(folder: Path, vocabulary: Vocabulary, block: int) -> list[dict]:
    """A few rows of each level of the validation and test data, {"level", "prompt", "answer"}."""
    names = ["val", "test"] if (folder / "test.bin").exists() else ["val"]
    found = []
    for rows in (load_split(folder, name, vocabulary, block) for name in names):
        for level in rows.levels:
            batch = rows.first(ROWS, level)
            for real, prompt, length in zip(batch.real, batch.prompt, batch.length):
                row = {"level": level, "prompt": vocabulary.decode(real[:prompt])}
                found.append(row | {"answer": vocabulary.decode(real[prompt : length - 1])})
    return found


def own_probe(model: GPT, rows: Rows, vocabulary: Vocabulary, thinking: Thinking) -> dict:
    """
    A probe as in data/arithmetic/prepare.py for data that have none: the label of a token is what
    the model would answer if the question ended there.
    """
    batch = rows.first(PROBED, rows.levels[-1])

    @cache
    def answer(question: tuple[int, ...]) -> str:
        prompt = [*question, vocabulary.answer_after]
        said = generate(model, prompt, LONGEST_ANSWER, thinking, stop=vocabulary.row_end)
        return vocabulary.decode(i for i in said[len(prompt) :] if i != vocabulary.row_end)

    prompts = [row[:n] for row, n in zip(batch.real.tolist(), batch.prompt.tolist())]
    labels = [[answer(tuple(p[:n])) for n in range(1, len(p))] + [None] for p in prompts]
    values = sorted({answer for line in labels for answer in line[:-1]})
    texts = [vocabulary.decode(prompt) for prompt in prompts]
    return {"name": "answer so far", "values": values, "rows": texts, "labels": labels}


def payload(model: GPT, vocabulary: Vocabulary, state: dict, folder: Path, run: str) -> dict:
    """What the page holds, to be written as JSON. Raises DataError."""
    check(model, vocabulary)
    thinking, probe = as_trained(state, vocabulary), folder / "probe.json"
    block, legend = trained_config(state).block, None
    if model.config.n_bits:
        if probe.exists():
            labelled = json.loads(probe.read_text())
        else:
            rows = load_split(folder, "val", vocabulary, block)
            labelled = own_probe(model, rows, vocabulary, thinking)
        legend = meaning(model, vocabulary, thinking, labelled)
    after = thinking.after
    watched = model.config.watched()
    weights = {name: w.detach().float().cpu() for name, w in model.named_parameters()}
    blob = b"".join(w.numpy().astype("<f4").tobytes() for w in weights.values())
    return {
        "task": state["meta"]["task"],
        "level": state["meta"]["level"],
        "run": run,
        "seed": trained_config(state).seed,
        "tokens": vocabulary.tokens,
        "row_end": vocabulary.row_end,
        "network": asdict(model.config)
        | {"watched": watched, "frequency": model.frequency.double().tolist()},
        "thinking": {
            "max_run": thinking.max_run,
            "force": thinking.force,
            "after": None if after is None else after.tolist(),
            "window": thinking.window,
        },
        "legend": legend,
        "rows": held_out(folder, vocabulary, block),
        "shapes": {name: list(w.shape) for name, w in weights.items()},
        "weights": base64.b64encode(blob).decode(),
    }


def page(found: dict) -> str:
    """The whole page. `<` is escaped in the data, so that no token ends their script element."""
    html = (HERE / "play.in.html").read_text(encoding="utf-8")
    html = html.replace("GPT_GOES_HERE", (HERE / "gpt.js").read_text(encoding="utf-8"))
    data = json.dumps(found, allow_nan=False).replace("<", "\\u003c")
    return html.replace("MODEL_GOES_HERE", data)


def main(argv: list[str]) -> None:
    config = load_config(argv, PlayConfig)
    model, vocabulary, state = load_model(config.run)
    folder = Path(config.data or trained_config(state).data)
    html = page(payload(model, vocabulary, state, folder, config.run))
    out = Path(config.out or Path(config.run) / "play.html")
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror})") from None
    print(f"written: {out}, {len(html.encode()):,} bytes; open it in a browser")


if __name__ == "__main__":
    run(main, "workshop/play.py")
