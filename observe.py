"""
Look inside a trained model while it answers or reads: trace.json, trace.png and trace.html, a page for any browser.

  python observe.py --run=out/observer "3+4*2=" "1*3*3+4="      it answers, as in sample.py
  python observe.py --run=out/observer --teach "3+4*2=4"        it reads what is given, to the end, and thinks where it would
  python observe.py --run=out/shakespeare --input=scene.txt     reads a file: a text as one, rows line by line

A trace holds, for every column: the token and what came next; the loss of that, real and as the observer saw it coming; the gate; the
velocity: how far, and where to, each layer moved the residual stream, how widely its attention was spread, and what it would have said (the logit lens:
the final norm and the word head, applied to the layer's output). A model without thoughts or without an observer has no such rows.
Training pays nothing for any of this: it is worked out here, in one more pass over a stream that is already there.

Not here: how well it does (report.py). References: the logit lens, nostalgebraist 2020.
Glossary beside model.py's: L layers; entropy in nats, 0 where one thing is certain; a column's numbers are about the token that comes after it.
"""

import codecs
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import DataError, Vocabulary
from loss import targets, word_loss
from model import GPT, READINGS, Output
from runs import Config, as_trained, load_config, load_model, pick_device, run
from sample import columns_in_view
from stream import Rollout, generate, rollout

TOP = 3  # words shown of each layer
LONGEST = 1000  # real tokens of a text that are read
WIDTH, STRIPS = 60, 4  # columns in a strip of the picture, and strips at most


@dataclass
class ObserveConfig:
    run: str = "out/chain"  # folder of the checkpoint
    input: str = ""  # file to read, in place of prompts
    teach: bool = False  # read the prompts to their end instead of answering them
    out: str = "out/trace"  # folder for what is written
    max_new_tokens: int = 32  # real tokens an answer may have
    greedy: bool = True  # the likeliest word and thought; false draws them
    seed: int = 1
    device: str = "auto"


# ----------------------------------------------------------------------------------------------
# one pass, looked into


class Sight(NamedTuple):
    """What happened at every column in every layer."""

    change: Tensor  # (B, C, L) length of what the layer added to the residual stream, over the length of what was there
    cosine: Tensor  # (B, C, L) of the stream before the layer and after it
    attention: Tensor  # (B, C, L) entropy of the attention, mean over its heads, nats
    observer: Tensor  # (B, C, 1) the same of the observer's head; (B, C, 0) without one
    lens: Tensor  # (B, C, L) entropy of the words after each layer, nats
    slope: Tensor  # (B, C) of `lens` over the layers, least squares, nats a layer; 0 where there is one layer
    words: Tensor  # (B, C, L, TOP) ids of the likeliest words after each layer
    p: Tensor  # (B, C, L, TOP) their probabilities


def attention_pattern(attention, x: Tensor, below: list, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """What went into an attention -> (B, nh, C, C), what each column looked at, worked out again: the fast path never holds it."""
    q, k, _ = attention.heads(x, below, cos, sin)  # (B, nh, C, hs)
    score = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5  # (B, nh, C, C)
    if mask is None:
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
    return score.masked_fill(~mask, -torch.inf).softmax(dim=-1)


@torch.no_grad()
def look(model: GPT, stream: Tensor, mask: Tensor | None = None, position: Tensor | None = None) -> tuple[Output, Sight]:
    """The pass `model(stream, mask, position=position)` over (B, C) ids, undisturbed, and what went on inside it."""
    caught = []  # of each block: its attention and (x, below, cos, sin, mask)
    hooks = [b.attention.register_forward_hook(lambda attention, given, _: caught.append((attention, *given[:5]))) for b in model.blocks]
    try:
        output = model(stream, mask, position=position)
    finally:
        for hook in hooks:
            hook.remove()
    below = caught[0][2]  # one list for all blocks, and the pass adds to it as it goes: by now the outputs of the embedding and all L layers
    before, after = torch.stack(below[:-1], dim=2), torch.stack(below[1:], dim=2)  # (B, C, L, n_embd)
    entropy = [torch.special.entr(attention_pattern(*what)).sum(dim=-1) for what in caught]  # (B, nh, C), one head more in the last
    heads = model.config.n_head
    lens, words, p = [], [], []
    for x in below[1:]:
        said = model.head(model.norm(x)).softmax(dim=-1)  # (B, C, V); by layer: V may be 50,000
        top = said.topk(min(TOP, said.size(-1)))
        lens, words, p = lens + [torch.special.entr(said).sum(dim=-1)], words + [top.indices], p + [top.values]
    lens = torch.stack(lens, dim=2)
    depth = torch.arange(lens.size(2), device=lens.device) - (lens.size(2) - 1) / 2
    return output, Sight(
        change=(after - before).norm(dim=-1) / before.norm(dim=-1),
        cosine=F.cosine_similarity(before, after, dim=-1),
        attention=torch.stack([e[:, :heads].mean(dim=1) for e in entropy], dim=2),
        observer=entropy[-1][:, heads:].transpose(1, 2),
        lens=lens,
        slope=(lens * depth).sum(dim=2) / depth.square().sum().clamp(min=1e-9),
        words=torch.stack(words, dim=2),
        p=torch.stack(p, dim=2),
    )


# ----------------------------------------------------------------------------------------------
# a trace: what can be written down


def shown(tokens: list[int], vocabulary: Vocabulary, recall: int = -1) -> list[str]:
    """
    The text of each token, thoughts as [k], the id `recall` as [recall]. The texts of the real ones, one behind the other, are the text: where a token ends inside a
    character, the character is shown with the token that ends it. The end of a row is not shown.
    """
    V, decoder = len(vocabulary.tokens), codecs.getincrementaldecoder("utf-8")("replace")
    last = max((i for i, token in enumerate(tokens) if token < V), default=-1)
    hidden = lambda t: "[recall]" if t == recall else f"[{t - V}]"  # noqa: E731
    return [hidden(t) if t >= V else "" if t == vocabulary.row_end else decoder.decode(vocabulary.pieces[t], i == last) for i, t in enumerate(tokens)]


def trace(model: GPT, roll: Rollout, given: int, vocabulary: Vocabulary) -> dict:
    """A rollout of one row, of which `given` real tokens were given -> what trace.json holds of it. Numbers of a column are about what comes after it."""
    roll = roll.alone(0)
    C = roll.stream.size(1)
    output, sight = look(model, roll.stream, roll.view(), roll.position)
    rounded = lambda x: [round(number, 4) for number in x.tolist()]  # noqa: E731
    tokens, coming_next = roll.stream[0].tolist(), targets(roll)[0].tolist()
    texts = shown(tokens + coming_next[-1:], vocabulary, model.config.vocab_size + model.config.n_think)
    pointer, thinks, decides = (part[0].tolist() for part in (roll.pointer, roll.thinks, roll.decides))
    loss, slope, gate = rounded(word_loss(output.words, roll)[0]), rounded(sight.slope[0]), rounded(output.gate[0].sigmoid())
    columns = []
    for c in range(C):
        thought = tokens[c] >= model.config.vocab_size
        column = {"token": tokens[c], "text": texts[c], "thought": thought, "own": not thought and pointer[c] > given}
        column |= {"next": vocabulary.tokens[coming_next[c]], "loss": loss[c], "slope": slope[c]}
        if model.config.n_think:
            column |= {"gate": gate[c], "asked": decides[c], "thinks": thinks[c]}
        if model.config.observer:
            column |= dict(zip(READINGS, rounded(output.readings[0, c]))) | {"observer": round(sight.observer[0, c, 0].item(), 4)}
        column["layers"] = [
            {name: round(getattr(sight, name)[0, c, layer].item(), 4) for name in ("change", "cosine", "attention", "lens")}
            | {"words": [[vocabulary.tokens[w], p] for w, p in zip(sight.words[0, c, layer].tolist(), rounded(sight.p[0, c, layer]))]}
            for layer in range(model.config.n_layer)
        ]
        if thought:  # the likeliest word and its probability before the thought, and behind it
            column |= {"without": columns[-1]["layers"][-1]["words"][0], "with": column["layers"][-1]["words"][0]}
        columns.append(column)
    return {"given": given, "columns": columns, "last": {"text": texts[-1], "own": pointer[-1] >= given}}


def read_texts(arguments: list[str], config: ObserveConfig, vocabulary: Vocabulary) -> list[str]:
    """The prompts, or the file: a text as one, rows line by line. Raises DataError."""
    if bool(arguments) == bool(config.input):
        raise DataError("give either prompts or --input=FILE")
    if arguments:
        return arguments
    try:
        text = Path(config.input).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a text from {config.input}: {error}") from None
    return [text] if vocabulary.row_end < 0 else [line for line in text.splitlines() if line]


def make_trace(texts: list[str], model: GPT, vocabulary: Vocabulary, state: dict, config: ObserveConfig) -> dict:
    """-> what trace.json holds. Raises DataError."""
    trained, device = Config(**state["config"]), model.embedding.weight.device
    window, reads = columns_in_view(trained, vocabulary), config.teach or bool(config.input)
    thinking = dataclasses.replace(as_trained(state, vocabulary), greedy=config.greedy, window=window)
    generator, rows, notes = torch.Generator(device).manual_seed(config.seed), [], []
    for text in texts:
        ids = vocabulary.encode(text)
        if len(ids) < 1 + reads:
            raise DataError(f"a text to {'read holds at least two tokens' if reads else 'answer holds at least one token'}, {text!r} has {len(ids)}")
        if len(ids) > LONGEST:
            notes.append(f"Of a text of {len(ids):,} tokens the first {LONGEST:,} were read.")
            ids = ids[:LONGEST]
        try:
            if reads:
                real, length = torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device)
                roll = rollout(model, real, length, thinking, generator)
            else:
                _, roll = generate(model, [ids], config.max_new_tokens, thinking, generator, vocabulary.row_end)
            rows.append(trace(model, roll, len(ids), vocabulary))
        except ValueError as error:
            raise DataError(str(error)) from None
    if model.config.n_think and thinking.hold is not None:
        notes.append("Its gate has learned nothing yet: it thinks as often as it was made to in training.")
    return {"task": state["meta"]["task"], "run": config.run, "step": state["progress"]["step"], "notes": notes, "rows": rows}


# ----------------------------------------------------------------------------------------------
# the picture and the page


def draw(trace: dict, path: Path) -> None:
    """Strips of columns. Below each column its token, above it what came next; thoughts stand on grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    visible = lambda text: "".join(c if c.isprintable() else "·" for c in text.replace("\n", "↵").replace(" ", "␣"))  # noqa: E731
    strips = []
    for columns in (row["columns"] for row in trace["rows"]):
        size = math.ceil(len(columns) / math.ceil(len(columns) / WIDTH))  # about alike, rather than a last one of two columns
        strips += [columns[i : i + size] for i in range(0, len(columns), size)]
    drawn, widest = strips[:STRIPS], max(map(len, strips[:STRIPS]))
    first = drawn[0][0]
    heights = [2.2] + [0.9] * ("gate" in first) + [max(0.5, 0.22 * len(first["layers"]))] * 2
    figure = plt.figure(figsize=(2.2 + 0.19 * max(widest, 20), (sum(heights) + 1.1) * len(drawn) + 0.5), layout="constrained")
    layers = lambda strip, name: torch.tensor([[layer[name] for layer in column["layers"]] for column in strip]).T.numpy()  # noqa: E731  (L, C)
    every = [column for strip in drawn for column in strip]
    losses = [value for column in every for value in (column["loss"], column.get("coming", 0))]
    # the first layer moves the small embeddings many times as far as the next ones move the stream: velocity on a logarithmic scale
    scale = {"change": LogNorm(layers(every, "change").min(), layers(every, "change").max()), "lens": Normalize(0, layers(every, "lens").max())}
    for part, strip in zip(figure.subfigures(len(drawn), 1, squeeze=False)[:, 0], drawn):
        axes = part.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        x = range(len(strip))
        axes[0].plot(x, [column["loss"] for column in strip], color="C0", marker="o", ms=3.5, lw=1, label="real loss of the next token")
        if "coming" in first:
            axes[0].plot(x, [column["coming"] for column in strip], color="C1", marker="s", ms=3, lw=1, ls="--", label="loss the observer saw coming")
        axes[0].set(ylabel="nats", ylim=(min(0, *losses) - 0.15, 1.25 * max(losses)))
        axes[0].legend(fontsize=8, loc="upper right", ncols=2, framealpha=0.6)
        if "gate" in first:
            axes[1].bar(x, [column["gate"] for column in strip], color=["C2" if column["asked"] else "0.8" for column in strip])
            axes[1].set(ylabel="gate", ylim=(0, 1))
        for axis, name, label, colours in ((axes[-2], "change", "velocity", "magma"), (axes[-1], "lens", "entropy", "viridis")):
            image = axis.imshow(layers(strip, name), aspect="auto", origin="lower", cmap=colours, norm=scale[name])
            part.colorbar(image, ax=axis, pad=0.01, fraction=0.03, aspect=8, format="%.2g", ticks=[image.norm.vmin, image.norm.vmax]).minorticks_off()
            axis.set_yticks(range(len(first["layers"])), range(1, 1 + len(first["layers"])), fontsize=7)
            axis.set_ylabel(f"{label}\nby layer", fontsize=8)
        for axis in axes[: len(heights) - 2]:
            for c in x:
                if strip[c]["thought"]:
                    axis.axvspan(c - 0.5, c + 0.5, color="0.9", zorder=0)
        axes[-1].set_xlim(-0.5, max(widest, 20) - 0.5)
        for axis, name, colour in ((axes[-1], "text", "black"), (axes[0].secondary_xaxis("top"), "next", "C0")):
            texts = [visible(column[name]) for column in strip]
            rotation = 90 if max(map(len, texts)) > 2 else 0
            axis.set_xticks(x, texts, fontsize=8, family="monospace", parse_math=False, rotation=rotation, color=colour)
    cut = f"; the first {len(drawn)} strips of {len(strips)}, trace.json has all" if len(strips) > len(drawn) else ""
    figure.suptitle(f"{trace['task']}\nbelow the token read, above the next real token; thoughts on grey{cut}", fontsize=9, parse_math=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def page(trace: dict) -> str:
    """observe.html with the trace in it: one file, nothing to fetch. No token can end the script element: `<` is escaped."""
    template = (Path(__file__).parent / "observe.html").read_text(encoding="utf-8")
    return template.replace("TRACE_GOES_HERE", json.dumps(trace, allow_nan=False).replace("<", "\\u003c"))


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], ObserveConfig)
    if config.max_new_tokens < 1:
        raise DataError("max_new_tokens must be positive")
    model, vocabulary, state = load_model(config.run, pick_device(config.device))
    texts = read_texts([a for a in argv if not a.startswith("--")], config, vocabulary)
    if not texts:
        raise DataError(f"there is no text in {config.input}")
    found, folder = make_trace(texts, model, vocabulary, state, config), Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {config.out} ({error.strerror})") from None
    (folder / "trace.json").write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "trace.html").write_text(page(found), encoding="utf-8")
    draw(found, folder / "trace.png")
    for note in found["notes"]:
        print(note)
    print("written: " + ", ".join(str(folder / f"trace.{kind}") for kind in ("json", "png", "html")))


if __name__ == "__main__":
    run(main, "observe.py")
