"""
Look inside a trained model while it answers or reads: trace.json, trace.png, and trace.html, a page
for any browser.

  python lab/observe.py --run=out/observer "3+4*2=" "1*3*3+4="     it answers
  python lab/observe.py --run=out/observer --teach "3+4*2=4"       it reads, and thinks on the way
  python lab/observe.py --run=out/shakespeare --input=scene.txt    it reads a file

A trace holds, for every cell: what came next; the loss of that, real and as the observer predicted
it; the gate; and for every layer how far and where to it moved the residual stream, how widely its
attention was spread, and what it would have emitted (the logit lens, nostalgebraist 2020: final
norm and head, applied to the layer's output). It is worked out in one more pass over a rollout.

Not here: how well it does (lab/report.py). Glossary beside model.py's: L layers; entropy in nats, 0
where one thing is certain; a cell's numbers are about the token that comes after it.
"""

import codecs
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, Vocabulary
from model import GPT, READINGS, Cells, Output, Thinking, generate
from options import load_config, option, run
from runs import load_model, pick_device
from train import Grid, as_trained, rollout, trained_config

TOP = 3  # tokens shown of each layer
LONGEST = 1000  # real tokens of a text that are read
WIDTH, STRIPS = 60, 4  # cells in a strip of the picture, and strips, at most


@dataclass
class ObserveConfig:
    run: str = option("out/chain", "folder of the checkpoint")
    input: str = option("", "file to read; a text as one, sequences line by line")
    teach: bool = option(False, "read the prompts to their end instead of answering them")
    out: str = option("out/trace", "folder for what is written")
    max_new_tokens: int = option(32, "tokens of an answer, at most", 1)
    device: str = option("auto", "auto, cpu, cuda or mps")


# ----------------------------------------------------------------------------------------------
# one pass, looked into


class Sight(NamedTuple):
    """What happened at every cell in every layer."""

    change: Tensor  # (B, C, L) length of what the layer added, over the length of what was there
    cosine: Tensor  # (B, C, L) of the residual stream before the layer and after it
    attention: Tensor  # (B, C, L) entropy of the attention, mean over its heads
    observer: Tensor  # (B, C, 1) the same of the observer's head; (B, C, 0) without one
    lens: Tensor  # (B, C, L) entropy of the next token by each layer
    slope: Tensor  # (B, C) of `lens` over the layers, least squares; 0 where there is one layer
    tokens: Tensor  # (B, C, L, TOP) likeliest next tokens by each layer
    p: Tensor  # (B, C, L, TOP) their probabilities


OF_LAYER = ("change", "cosine", "attention", "lens")  # one number a layer


def attention_pattern(attention, x: Tensor, below: list, turn: tuple, mask: Tensor | None):
    """What went into an attention -> (B, nh, C, C), what each cell looked at, worked out again."""
    q, k, _ = attention.heads(x, below, turn)  # (B, nh, C, hs)
    score = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5  # (B, nh, C, C)
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=x.device).tril()
    return score.masked_fill(~mask, -torch.inf).softmax(dim=-1)


@torch.no_grad()
def look(
    model: GPT, ids: Tensor, cells: Cells | None = None, window: int = 0
) -> tuple[Output, Sight]:
    """The pass `model(ids, cells, None, window)`, undisturbed, and what went on inside it."""
    caught = []  # of each block what went into its attention

    def catch(attention, given, _):
        caught.append((attention, *given[:4]))

    hooks = [block.attention.register_forward_hook(catch) for block in model.blocks]
    try:
        output = model(ids, cells, None, window)
    finally:
        for hook in hooks:
            hook.remove()
    below = caught[0][2]  # one list for all blocks, which by now holds the outputs of all layers
    before, after = torch.stack(below[:-1], dim=2), torch.stack(below[1:], dim=2)  # (B, C, L, D)
    spread = [torch.special.entr(attention_pattern(*what)).sum(dim=-1) for what in caught]
    heads, lens, top = model.config.n_head, [], []  # spread: (B, nh, C), one head more in the last
    for x in below[1:]:  # layer by layer, for V may be 50,000
        p = model.head(model.norm(x)).softmax(dim=-1)  # (B, C, V)
        lens.append(torch.special.entr(p).sum(dim=-1))
        top.append(p.topk(min(TOP, p.size(-1))))
    lens = torch.stack(lens, dim=2)
    depth = torch.arange(lens.size(2), device=lens.device) - (lens.size(2) - 1) / 2
    return output, Sight(
        change=(after - before).norm(dim=-1) / before.norm(dim=-1),
        cosine=F.cosine_similarity(before, after, dim=-1),
        attention=torch.stack([entropy[:, :heads].mean(dim=1) for entropy in spread], dim=2),
        observer=spread[-1][:, heads:].transpose(1, 2),
        lens=lens,
        slope=(lens * depth).sum(dim=2) / depth.square().sum().clamp(min=1e-9),
        tokens=torch.stack([t.indices for t in top], dim=2),
        p=torch.stack([t.values for t in top], dim=2),
    )


# ----------------------------------------------------------------------------------------------
# a trace: what can be written down


def shown(ids: list[int], vocabulary: Vocabulary, recall: int) -> list[str]:
    """
    The text of each id: thoughts as [k], the id `recall` as [recall], the end of a sequence not at
    all. Where a token ends inside a character, the token that ends it shows the character.
    """
    V, decoder = len(vocabulary.tokens), codecs.getincrementaldecoder("utf-8")("replace")
    last = max((i for i, number in enumerate(ids) if number < V), default=-1)
    texts = []
    for i, number in enumerate(ids):
        if number >= V:
            texts.append("[recall]" if number == recall else f"[{number - V}]")
        else:
            piece = b"" if number == vocabulary.row_end else vocabulary.pieces[number]
            texts.append(decoder.decode(piece, i == last))
    return texts


def rounded(x: Tensor) -> list[float]:
    return [round(number, 4) for number in x.tolist()]


def trace(model: GPT, grid: Grid, given: int, thinking: Thinking, vocabulary: Vocabulary) -> dict:
    """A rollout of one sequence, whose first `given` tokens were given -> its part of the trace."""
    config, V, there = model.config, model.config.vocab_size, grid.present
    recall, names = V + config.n_think, [*vocabulary.tokens, "[revise]"]

    def at_cells(x: Tensor) -> Tensor:  # (1, T, S) -> (1, C)
        return x[there][None]

    following = F.pad(grid.token[:, 1:, :1], (0, 0, 0, 1)).expand_as(grid.token)
    ids, target = at_cells(grid.token), at_cells(following)
    lasting = (ids != recall).long()  # RECALL stands where the next cell will
    cells = Cells(lasting.cumsum(dim=1) - lasting, None, ids != recall, ids == recall)
    output, sight = look(model, ids, cells, thinking.window)
    loss = rounded(F.cross_entropy(output.logits[0], target[0], reduction="none"))
    slope, gate = rounded(sight.slope[0]), rounded(output.gate[0].sigmoid())
    asked, thinks = (at_cells(x)[0].tolist() for x in (grid.asked, grid.thinks))
    place = there.nonzero()[:, 1].tolist()  # (C,) tokens before the cell's own
    texts = shown(ids[0].tolist() + target[0, -1:].tolist(), vocabulary, recall)
    found = []
    for c, number in enumerate(ids[0].tolist()):
        cell = {"token": number, "text": texts[c], "thought": number >= V}
        cell |= {"own": number < V and place[c] >= given, "next": names[target[0, c]]}
        cell |= {"loss": loss[c], "slope": slope[c], "layers": []}
        if config.n_bits:
            cell |= {"gate": gate[c], "asked": asked[c], "thinks": thinks[c]}
        if config.observer:
            cell |= dict(zip(READINGS, rounded(output.readings[0, c])))
            cell["observer"] = round(sight.observer[0, c, 0].item(), 4)
        for layer in range(config.n_layer):
            numbers = {k: round(getattr(sight, k)[0, c, layer].item(), 4) for k in OF_LAYER}
            likeliest = zip(sight.tokens[0, c, layer], rounded(sight.p[0, c, layer]))
            cell["layers"].append(numbers | {"tokens": [[names[i], p] for i, p in likeliest]})
        found.append(cell)
        if number >= V:  # the likeliest token before the thought, and behind it
            before, behind = (x["layers"][-1]["tokens"][0] for x in found[-2:])
            cell |= {"without": before, "with": behind}
    return {"cells": found, "last": {"text": texts[-1], "own": place[-1] + 1 >= given}}


def read_texts(prompts: list[str], file: str, vocabulary: Vocabulary) -> list[str]:
    """The prompts, or the file: a text as one, sequences line by line. Raises DataError."""
    if bool(prompts) == bool(file):
        raise DataError("give either prompts or --input=FILE")
    if prompts:
        return prompts
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a text from {file}: {error}") from None
    texts = [text] if vocabulary.is_text else [line for line in text.splitlines() if line]
    if not any(texts):
        raise DataError(f"there is no text in {file}")
    return texts


def make_trace(texts: list[str], config: ObserveConfig, model: GPT, vocabulary, state) -> dict:
    """-> what trace.json holds. Raises DataError."""
    device, reads = model.head.weight.device, config.teach or bool(config.input)
    thinking, notes, sequences = as_trained(state, vocabulary), [], []
    if vocabulary.is_text and not thinking.window:  # a text has no end, its windows have
        thinking.window = trained_config(state).block * (1 + thinking.longest_run(model.config))
    if thinking.force is not None and model.config.n_bits:
        notes.append("Its gate has learned nothing yet: it thinks as it was made to in training.")
    generator = torch.Generator(device).manual_seed(0)
    for text in texts:
        ids = vocabulary.encode(text)
        if len(ids) < 1 + reads:
            message = "read holds at least two tokens" if reads else "answer holds at least one"
            raise DataError(f"a text to {message}, {text!r} has {len(ids)}")
        if len(ids) > LONGEST:
            notes.append(f"Of a text of {len(ids):,} tokens the first {LONGEST:,} were read.")
        ids = ids[:LONGEST]
        given, how = len(ids), (thinking, generator)
        try:
            if not reads:
                new, end = config.max_new_tokens, vocabulary.row_end
                ids = generate(model, ids, new, *how, stop=end)
            real = torch.tensor([ids], device=device)
            grid, _ = rollout(model, real, torch.tensor([len(ids)], device=device), *how)
            sequences.append(trace(model, grid, given, thinking, vocabulary))
        except ValueError as error:
            raise DataError(str(error)) from None
    found = {"task": state["meta"]["task"], "run": config.run, "step": state["progress"]["step"]}
    return found | {"notes": notes, "sequences": sequences}


# ----------------------------------------------------------------------------------------------
# the picture and the page


def visible_text(text: str) -> str:
    text = text.replace("\n", "↵").replace(" ", "␣")
    return "".join(c if c.isprintable() else "·" for c in text)


def by_layer(cells: list[dict], name: str):  # -> array (L, C)
    return torch.tensor([[layer[name] for layer in cell["layers"]] for cell in cells]).T.numpy()


def draw_strip(part, cells: list[dict], scales: dict, widest: int) -> None:
    """Curves of the cells, and an image a layer's number, in a part of a figure."""
    L, x, has_gate = len(cells[0]["layers"]), range(len(cells)), "gate" in cells[0]
    heights = [2.2] + [0.9] * has_gate + [max(0.5, 0.22 * L)] * 2
    axes = part.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for name, label in (("loss", "real loss"), ("predicted_loss", "as the observer predicted it")):
        if name in cells[0]:
            axes[0].plot(x, [cell[name] for cell in cells], marker="o", ms=3, lw=1, label=label)
    axes[0].set(ylabel="nats", ylim=scales["loss"])
    axes[0].legend(fontsize=8, loc="upper right", ncols=2, framealpha=0.6)
    if has_gate:
        colours = ["C2" if cell["asked"] else "0.8" for cell in cells]
        axes[1].bar(x, [cell["gate"] for cell in cells], color=colours)
        axes[1].set(ylabel="gate", ylim=(0, 1))
    for c in x:
        for axis in axes[:-2] if cells[c]["thought"] else []:
            axis.axvspan(c - 0.5, c + 0.5, color="0.9", zorder=0)
    for axis, name, label in ((axes[-2], "change", "change"), (axes[-1], "lens", "entropy")):
        kind = {"aspect": "auto", "origin": "lower", "norm": scales[name]}
        image = axis.imshow(by_layer(cells, name), **kind)
        bar = part.colorbar(image, ax=axis, pad=0.01, fraction=0.03, aspect=8, format="%.2g")
        bar.set_ticks([image.norm.vmin, image.norm.vmax])
        bar.minorticks_off()
        axis.set_yticks(range(L), range(1, 1 + L), fontsize=7)
        axis.set_ylabel(f"{label}\nby layer", fontsize=8)
    axes[-1].set_xlim(-0.5, widest - 0.5)
    top = axes[0].secondary_xaxis("top")
    for axis, name, colour in ((axes[-1], "text", "black"), (top, "next", "C0")):
        texts = [visible_text(cell[name]) for cell in cells]
        how = {"fontsize": 8, "family": "monospace", "parse_math": False, "color": colour}
        axis.set_xticks(x, texts, rotation=90 if max(map(len, texts)) > 2 else 0, **how)


def draw(trace: dict, path: Path) -> None:
    """Strips of cells. Below each its token, above it what came next; thoughts stand on grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    strips = []
    for cells in (sequence["cells"] for sequence in trace["sequences"]):
        size = math.ceil(len(cells) / math.ceil(len(cells) / WIDTH))  # strips about alike
        strips += [cells[i : i + size] for i in range(0, len(cells), size)]
    drawn = strips[:STRIPS]
    every, widest = [cell for cells in drawn for cell in cells], max(20, *map(len, drawn))
    losses = [value for cell in every for value in (cell["loss"], cell.get("predicted_loss", 0))]
    change, L = by_layer(every, "change"), len(every[0]["layers"])
    scales = {
        "loss": (min(0, *losses) - 0.15, 1.25 * max(losses)),
        "change": LogNorm(change.min(), change.max()),  # the first layer moves embeddings far
        "lens": Normalize(0, by_layer(every, "lens").max()),
    }
    height = 3.3 + 0.9 * ("gate" in every[0]) + 2 * max(0.5, 0.22 * L)
    size = (2.2 + 0.19 * widest, height * len(drawn) + 0.5)
    figure = plt.figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, cells in zip(parts, drawn):
        draw_strip(part, cells, scales, widest)
    title = f"{trace['task']}\nbelow the token read, above the next one; thoughts on grey"
    if len(strips) > len(drawn):
        title += f"; {len(drawn)} strips of {len(strips)}, trace.json has all"
    figure.suptitle(title, fontsize=9, parse_math=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def page(trace: dict) -> str:
    """observe.html with the trace in it. `<` is escaped, so that no token ends the script."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    data = json.dumps(trace, allow_nan=False).replace("<", "\\u003c")
    return template.replace("TRACE_GOES_HERE", data)


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], ObserveConfig)
    model, vocabulary, state = load_model(config.run, pick_device(config.device))
    prompts = [a for a in argv if not a.startswith("--")]
    texts = read_texts(prompts, config.input, vocabulary)
    found, folder = make_trace(texts, config, model, vocabulary, state), Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {config.out} ({error.strerror})") from None
    (folder / "trace.json").write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "trace.html").write_text(page(found), encoding="utf-8")
    draw(found, folder / "trace.png")
    print("\n".join(found["notes"] + [f"written: {folder}/trace.json, trace.png, trace.html"]))


if __name__ == "__main__":
    run(main, "lab/observe.py")
