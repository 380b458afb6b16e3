"""
The lens: which edges of a network carry its answer, found by patching, and how much they explain.

  python train.py config/deals.toml --report=false
  python lab/lens.py --run=out/deals --swap=coke,pepsi,fanta
  python lab/lens.py --run=out/deals --against=out/deals_biased      before and after fine-tuning
  python lab/lens.py --run=out/chain                                 with thoughts, too

Writes lens.json and lens.png into the run's folder: a minute or two with two layers on one core.

Everything rests on one function, `masked_run`. Each reader reads the sum of all sources below it,
and each edge (source, reader) may carry what the source puts out in another run instead: of another
row, the corrupt one, or of another checkpoint. Masks of 0 and 1 are patching and circuits; the
gradient with respect to the mask is attribution. Streams are laid out alike, thoughts where the
clean row has them; what is thought is each row's own.

Not here: growth of circuits in training (lab/growth.py), mending (lab/mend.py), the thoughts'
circuit (lab/relay.py), models with an observer.

Glossary, beside model.py's
  source    the embedding, a head, an MLP: S of them. Attention's output bias is no source
  reader    q, k or v of a head, an MLP, or the logits: R of them
  mask      (S, R), or (S, R, C) by cell: share of an edge that carries the other run
  F         mean over pairs of d = logit(clean row's right answer) - logit(corrupt row's)
  f         faithfulness of a circuit C, all other edges corrupt: 1 if it does what the model does,
            0 if all is corrupt: (F(C) - F(corrupt)) / (F(clean) - F(corrupt))
  CPR, CMD  areas under f and |1 - f| over the share of edges kept

References: patching: Zhang & Nanda 2023 (arXiv:2309.16042); integrated gradients over edges: EAP-IG
(Hanna et al. 2024, arXiv:2403.17806), masks as in auto-circuit (Miller et al. 2024,
arXiv:2407.08734); f, CPR, CMD: MIB (arXiv:2504.13151); random circuits: arXiv:2410.13032.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import Batch, DataError, Vocabulary, load_split
from model import GPT, Cells, GPTConfig, Thinking, rotate, visible
from options import load_config, option, run
from runs import load_model
from train import RECALL_SLOT, as_trained, rollout

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the edges, kept
STEPS = 50  # of integrated gradients
RANDOM = 100  # circuits, to compare with
LEAST = 20  # pairs
ENOUGH = 0.85  # f of a circuit that explains the model


@dataclass
class LensConfig:
    run: str = option("out/deals", "folder of the checkpoint")
    against: str = option("", "folder of a checkpoint fine-tuned from it")
    data: str = option("", "folder of the data, if not where the checkpoint was trained")
    level: int = option(0, "of the rows; 0: the highest", 0)
    rows: int = option(400, "held-out rows", 2 * LEAST)
    swap: str = option("", "tokens put in each other's place in the yes-no spectrum, with commas")
    answers: str = option("yes,no", "the two ends of the spectrum")


# ----------------------------------------------------------------------------------------------
# the masked run


def sources(config: GPTConfig) -> list[str]:
    """Names of all S: embedding, 0.0 (layer.head), .. 0.mlp, 1.0 .."""
    layers = range(config.n_layer)
    heads = [[f"{n}.{h}" for h in range(config.n_head)] + [f"{n}.mlp"] for n in layers]
    return ["embedding", *sum(heads, [])]


def readers(config: GPTConfig) -> list[str]:
    """Names of all R, in the order in which they read: 0.0.q, 0.1.q .. 0.mlp, 1.0.q .. logits"""
    found = []
    for n in range(config.n_layer):
        found += [f"{n}.{h}.{kind}" for kind in "qkv" for h in range(config.n_head)] + [f"{n}.mlp"]
    return [*found, "logits"]


def all_edges(config: GPTConfig) -> Tensor:
    """-> (S, R) bool: which sources come before which readers."""
    edges = torch.zeros(len(sources(config)), len(readers(config)), dtype=torch.bool)
    for j, reader in enumerate(readers(config)):
        n, _, what = reader.partition(".")
        below = 1 + int(n) * (config.n_head + 1) if what else len(edges)
        edges[: below + config.n_head * (what == "mlp"), j] = True
    return edges


class Streams(NamedTuple):
    """Streams laid out alike."""

    ids: Tensor  # (B, C) up to the cell that says the answer's first token
    cells: Cells  # where they stand, (1, C)
    window: int


def masked_run(
    model: GPT, streams: Streams, other: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    -> what the output heads read, (B, C, D); what each source puts out, (S, B, C, D). other: the
    latter, of another run. mask: see above; 0 for edges that do not exist. None: the model's own.
    """
    config, cells = model.config, streams.cells
    H, D = config.n_head, config.n_embd
    see = visible(cells, cells, streams.window)
    see = see if see is None else see[:, None]
    angle = cells.position[:, None, :, None] * model.frequency  # (1, 1, C, hs / 2)
    x = model.embed(streams.ids)
    put_out = [x if model.position is None else x + model.position(cells.position)]
    bias, at = torch.zeros(D), 0

    def read(count: int) -> Tensor:
        """The inputs of the next readers -> (count, B, C, D)."""
        nonlocal at
        here = torch.stack(put_out)
        x = (here.sum(dim=0) + bias).expand(count, *here.shape[1:])
        if mask is not None:
            m = mask[: len(here), at : at + count]
            m = (m if m.dim() == 3 else m[..., None]).expand(-1, -1, here.size(2))
            x = x + torch.einsum("src,sbcd->rbcd", m, other[: len(here)] - here)
        at += count
        return x

    for block in model.blocks:
        attention = block.attention
        x = block.norm1(read(3 * H)).unflatten(0, (3, H))  # (3, H, B, C, D)
        weight = attention.qkv.weight.view(3, H, -1, D)
        qkv = torch.einsum("khbcd,khed->kbhce", x, weight)  # (3, B, H, C, hs)
        qkv = qkv + attention.qkv.bias.view(3, 1, H, 1, -1)
        q, k = rotate(qkv[:2], angle.cos(), angle.sin())
        y = F.scaled_dot_product_attention(q, k, qkv[2], see, is_causal=see is None)
        put_out += torch.einsum("bhce,dhe->hbcd", y, attention.proj.weight.view(D, H, -1))
        bias = bias + attention.proj.bias
        put_out.append(block.down(block.gelu(block.up(block.norm2(read(1)[0])))))
    return model.norm(read(1)[0]), torch.stack(put_out)


class Patch:
    """
    Clean and corrupt streams, what is measured, and F of any mask. toward, offset: (B, D) and (B,),
    d = last cell's output . toward + offset. donor: the model of the corrupt run, if another.
    """

    def __init__(self, model: GPT, clean: Streams, corrupt: Tensor, toward, offset, donor=None):
        self.model, self.clean, self.toward, self.offset = model, clean, toward, offset
        self.edges = all_edges(model.config)
        with torch.no_grad():
            self.other = masked_run(donor or model, clean._replace(ids=corrupt))[1]
        self.ends = self.F(), self.F(self.edges.float())  # clean, corrupt

    def rows(self, mask: Tensor | None = None) -> Tensor:
        """-> d of each pair, (B,)."""
        last = masked_run(self.model, self.clean, self.other, mask)[0][:, -1]
        return (last * self.toward).sum(dim=1) + self.offset

    @torch.no_grad()
    def F(self, mask: Tensor | None = None) -> float:
        return self.rows(mask).mean().item()

    def faithfulness(self, kept: Tensor) -> float:
        """f of the circuit of the edges kept, (S, R) bool."""
        clean, corrupt = self.ends
        return (self.F((self.edges & ~kept).float()) - corrupt) / (clean - corrupt)


def toward_answers(model: GPT, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,), (B,) -> toward, offset: d is logit(a) - logit(b)."""
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    return weight[a] - weight[b], bias[a] - bias[b]


# ----------------------------------------------------------------------------------------------
# attribution


def attribution(patch: Patch, steps: int = STEPS, by_cell: bool = False) -> Tensor:
    """
    Integrated gradients over the mask, midpoints -> (S, R), or (S, R, C); their sum tends to
    F(corrupt) - F(clean). One step from mask 0 would be plain gradients, see `gradients`.
    """
    full = patch.edges.float()
    if by_cell:
        full = full[..., None].repeat(1, 1, patch.clean.ids.size(1))
    return sum(gradients(patch, full, (k + 0.5) / steps) for k in range(steps)) / steps


def gradients(patch: Patch, full: Tensor, at: float = 0.0) -> Tensor:
    """dF / dmask where all edges carry the share `at` of the corrupt run; at 0: EAP."""
    mask = (full * at).requires_grad_()
    return torch.autograd.grad(patch.rows(mask).mean(), mask)[0] * full


def exact(patch: Patch) -> Tensor:
    """The slow twin of attribution: F with one edge corrupt, less F(clean) -> (S, R)."""
    effect, clean = torch.zeros(patch.edges.shape), patch.ends[0]
    for edge in patch.edges.nonzero():
        mask = torch.zeros(patch.edges.shape)
        mask[tuple(edge)] = 1
        effect[tuple(edge)] = patch.F(mask) - clean
    return effect


def by_node_and_cell(patch: Patch) -> Tensor:
    """F with one source corrupt for all who read it, at one cell, less F(clean) -> (S, C)."""
    S, C = len(patch.edges), patch.clean.ids.size(1)
    effect, clean = torch.zeros(S, C), patch.ends[0]
    for s in range(S):
        for c in range(C):
            mask = torch.zeros(*patch.edges.shape, C)
            mask[s, :, c] = patch.edges[s].float()
            effect[s, c] = patch.F(mask) - clean
    return effect


@torch.no_grad()
def direct(patch: Patch) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Direct contributions to d of the clean rows: (S, B), and of the biases {name: (B,)}. They sum to
    d exactly, for they use the row's own standard deviation in the last norm.
    """
    model = patch.model
    put_out = masked_run(model, patch.clean)[1][:, :, -1]  # (S, B, D)
    bias = sum(block.attention.proj.bias for block in model.blocks)
    parts = torch.cat([put_out, bias.expand(1, *put_out.shape[1:])])
    deviation = (parts.sum(dim=0).var(dim=1, correction=0) + model.norm.eps).sqrt()  # (B,)
    centred = parts - parts.mean(dim=2, keepdim=True)
    parts = (centred * model.norm.weight * patch.toward).sum(dim=2) / deviation
    return parts[:-1], {
        "attention biases": parts[-1],
        "final norm's bias": patch.toward @ model.norm.bias,
        "head's bias": patch.offset,
    }


# ----------------------------------------------------------------------------------------------
# circuits


def top(score: Tensor, edges: Tensor, count: int) -> Tensor:
    """The edges with the largest scores, whatever their signs -> (S, R) bool."""
    best = score.abs().masked_fill(~edges, -1).flatten().topk(count).indices
    return torch.zeros(edges.numel(), dtype=torch.bool).scatter(0, best, True).view_as(edges)


def jaccard(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


def pearson(a: Tensor, b: Tensor, edges: Tensor) -> float:
    return torch.corrcoef(torch.stack([a[edges], b[edges]]))[0, 1].item()


def curve(patch: Patch, score: Tensor) -> dict:
    """f of circuits by size -> {"share", "f", "CPR", "CMD"}."""
    count = int(patch.edges.sum())
    f = [patch.faithfulness(top(score, patch.edges, round(share * count))) for share in SHARES]
    x, y = torch.tensor(SHARES), torch.tensor(f)
    areas = {"CPR": torch.trapezoid(y, x), "CMD": torch.trapezoid((1 - y).abs(), x)}
    return {"share": SHARES, "f": f} | {name: area.item() for name, area in areas.items()}


def size(patch: Patch, score: Tensor) -> int:
    """Edges in the smallest circuit, by rank, with f of ENOUGH, to within a fortieth of all."""
    count = int(patch.edges.sum())
    for k in range(1, count, max(1, count // 40)):
        if patch.faithfulness(top(score, patch.edges, k)) >= ENOUGH:
            return k
    return count


def random_circuits(patch: Patch, count: int) -> list[float]:
    """f of RANDOM circuits of so many edges, drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(patch.edges.shape, generator=generator) for _ in range(RANDOM)]
    return [patch.faithfulness(top(draw, patch.edges, count)) for draw in draws]


# ----------------------------------------------------------------------------------------------
# rows and pairs


def check(model: GPT, vocabulary: Vocabulary, folder: str) -> None:
    """Raises DataError for a model that the lens cannot look through."""
    if model.config.observer:
        raise DataError(f"the model in {folder} has an observer, which the lens cannot see through")
    if vocabulary.is_text:
        raise DataError(f"the model in {folder} reads a text: the lens needs rows with answers")


def streams(model: GPT, thinking: Thinking, real: Tensor) -> tuple[Streams, Tensor]:
    """
    Prompts and their answers' first tokens, real (B, T) -> streams, thoughts included, of those
    that are laid out as most are; their numbers (N,).
    """
    length = torch.full_like(real[:, 0], real.size(1))
    with torch.no_grad():
        grid, _ = rollout(model, real, length, thinking, torch.Generator().manual_seed(0))
    there = grid.present.flatten(1)
    layouts, which, count = there.unique(dim=0, return_inverse=True, return_counts=True)
    common = which == count.argmax()
    layout = layouts[count.argmax()].nonzero()[:, 0]  # (C,) cells of the grid
    recalls = (layout % grid.token.size(2) == grid.token.size(2) + RECALL_SLOT)[None]
    position = (~recalls).long().cumsum(dim=1) - (~recalls).long()
    cells = Cells(position, None, ~recalls, recalls) if recalls.any() else Cells(position)
    ids = grid.token.flatten(1)[common][:, layout]
    return Streams(ids, cells, thinking.window), common.nonzero()[:, 0]


def alike(batch: Batch) -> Tensor:
    """Rows whose prompts are as long as most are -> (B, T): prompts, and one token more."""
    prompt = batch.prompt.mode().values
    return batch.real[batch.prompt == prompt, : prompt + 1]


def mixed(model: GPT, thinking: Thinking, real: Tensor, donor: GPT | None = None) -> list[Patch]:
    """
    Rows (B, T) paired at random where their right answers differ -> two halves: one to find
    circuits with, and one to judge them by. Raises DataError if there are too few.
    """
    found, index = streams(model, thinking, real)
    answer = real[index, -1]
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    first, second = torch.arange(len(index)), order
    differ = answer[first] != answer[second]
    first, second = first[differ], second[differ]
    if len(first) < 2 * LEAST:
        raise DataError(f"only {len(first)} pairs of rows are laid out alike and differ in answer")
    patches = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        a, b = first[half], second[half]
        aim = toward_answers(model, answer[a], answer[b])
        clean = found._replace(ids=found.ids[a])
        patches.append(Patch(model, clean, found.ids[b], *aim, donor))
    return patches


def inspect(found: Patch, held: Patch) -> dict:
    """
    What the lens says of a model: checks of itself, scores, circuits. Found on one half of the
    pairs, and judged on the other.
    """
    edges, model = found.edges, found.model
    score, truth = attribution(found), exact(found)
    plain = gradients(found, edges.float())
    change = found.ends[1] - found.ends[0]
    half = round(edges.sum().item() / 2)
    with torch.no_grad():
        own = model(held.clean.ids, held.clean.cells, None, held.clean.window).logits
        ours = model.head(masked_run(model, held.clean)[0])
        parts, biases = direct(held)
        gap = parts.sum(dim=0) + sum(biases.values()) - held.rows()
        right = (held.rows() > 0) & (held.rows(edges.float()) < 0)
    f, others = held.faithfulness(top(score, edges, half)), random_circuits(held, half)
    k, swapped = size(held, score), attribution(held)
    apart, p = right.float().mean().item(), (1 + sum(x >= f for x in others)) / (1 + RANDOM)
    typical = sorted(others)[RANDOM // 2]
    return {
        "pairs": len(held.toward),
        "edges": int(edges.sum()),
        "error of the masked run": (own - ours).abs().max().item(),
        "error of direct contributions": gap.abs().max().item(),
        "pairs told apart": apart,
        "F, clean and corrupt": held.ends,
        "integrated gradients, error of the sum": abs(score.sum().item() / change - 1),
        "plain gradients, error of the sum": abs(plain.sum().item() / change - 1),
        "integrated gradients, Pearson with exact": pearson(score, truth, edges),
        "plain gradients, Pearson with exact": pearson(plain, truth, edges),
        "curve": curve(held, score),
        "f of half of the edges": f,
        "f of random halves": {"median": typical, "highest": max(others)},
        "p": p,
        "circuit": k,
        "split-half Jaccard": jaccard(top(score, edges, k), top(swapped, edges, k)),
        "is a circuit": apart >= 0.5 and f >= ENOUGH and p < 0.01,
        "scores": score.tolist(),
    }


# ----------------------------------------------------------------------------------------------
# the spectrum, and two checkpoints


def token_ids(names: str, vocabulary: Vocabulary) -> list[int]:
    """Names with commas -> ids. Raises DataError."""
    words = names.split(",")
    if unknown := [word for word in words if word not in vocabulary.index]:
        raise DataError(f"{unknown[0]!r} is no token of this model")
    return [vocabulary.index[word] for word in words]


def spectrum(model: GPT, thinking: Thinking, real: Tensor, ends: list[int], swap: list[int]):
    """
    Direct contributions to logit(ends[0]) - logit(ends[1]), by component, with each of the tokens
    `swap` in the place of whichever of them a row (B, T) has -> (tokens, S + 3 biases, B).
    """
    place = torch.isin(real, torch.tensor(swap))
    real, place = real[place.any(dim=1)], place[place.any(dim=1)]
    if len(real) < LEAST:
        raise DataError(f"only {len(real)} rows hold one of the tokens to swap")
    found = []
    for token in swap:
        clean, _ = streams(model, thinking, real.where(~place, token))
        ones = torch.ones(len(clean.ids), dtype=torch.long)
        patch = Patch(model, clean, clean.ids, *toward_answers(model, *(i * ones for i in ends)))
        parts, biases = direct(patch)
        found.append(torch.cat([parts, torch.stack([*biases.values()])]))
    return torch.stack(found)


def carriers(before: GPT, after: GPT, thinking: Thinking, real: Tensor) -> dict:
    """
    Which component carries what fine-tuning changed: on rows (B, T) that the two answer
    differently, each source of `after` is put into `before`. -> {source: share of the change of d
    that it brings about, d = logit of the new answer - logit of the old}. {} if rows are few.
    """
    found, _ = streams(before, thinking, real)
    old, new = (
        m(found.ids, found.cells, None, found.window).logits[:, -1] for m in (before, after)
    )
    old, new = old.argmax(dim=1), new.argmax(dim=1)
    differ = old != new
    if differ.sum() < LEAST:
        return {}
    clean = found._replace(ids=found.ids[differ])
    aim = [toward_answers(m, new[differ], old[differ]) for m in (before, after)]
    patch = Patch(before, clean, clean.ids, *aim[0], donor=after)
    there = Patch(after, clean, clean.ids, *aim[1]).ends[0]
    masks = {name: patch.edges & False for name in sources(before.config)}
    for s, mask in enumerate(masks.values()):
        mask[s] = patch.edges[s]
    masks["all of them"] = patch.edges
    share = {name: patch.F(mask.float()) - patch.ends[0] for name, mask in masks.items()}
    return {name: x / (there - patch.ends[0]) for name, x in share.items()}


def compare(before: list[Patch], after: list[Patch], k: int) -> dict:
    """Scores of two checkpoints on the same pairs, beside those of two halves of the pairs."""
    edges = before[0].edges
    old, floor, new = (attribution(patch) for patch in (*before, after[0]))
    tops = [top(score, edges, k) for score in (old, floor, new)]
    return {
        "Jaccard with before": jaccard(tops[0], tops[2]),
        "split-half Jaccard": jaccard(tops[0], tops[1]),
        "Pearson with before": pearson(old, new, edges),
        "split-half Pearson": pearson(old, floor, edges),
        "scores": new.tolist(),
    }


# ----------------------------------------------------------------------------------------------
# figures


def draw_circuit(axes, config: GPTConfig, score: Tensor, k: int) -> None:
    """The k strongest edges, bottom to top; red lowers d when corrupt, blue raises it."""
    place = {"embedding": (config.n_head / 2, 0.0), "logits": (config.n_head / 2, 2.0)}
    for n in range(config.n_layer):
        place |= {f"{n}.{h}": (h, n + 0.5) for h in range(config.n_head)}
        place[f"{n}.mlp"] = (config.n_head, n + 1.0)
    place["logits"] = (config.n_head / 2, config.n_layer + 0.5)
    strong = top(score, all_edges(config), k) & (score != 0)
    most = score.abs().max()
    for s, r in strong.nonzero().tolist():
        reader = readers(config)[r]
        (x, y), (u, v) = (
            place[sources(config)[s]],
            place[reader.removesuffix("." + reader[-1]) if reader[-1] in "qkv" else reader],
        )
        width = 0.3 + 4 * (score[s, r].abs() / most).item()
        axes.plot([x, u], [y, v], lw=width, color="C3" if score[s, r] < 0 else "C0", alpha=0.6)
    for name, (x, y) in place.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=8, bbox={"fc": "w", "pad": 2})
    axes.set(title=f"the circuit: {k} edges", xlim=(-0.5, config.n_head + 0.5))
    axes.axis("off")


def draw(report: dict, config: GPTConfig, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 + ("spectrum" in report) + ("against" in report)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    axes, score = list(axes), torch.tensor(report["scores"])
    if "spectrum" in report:
        axis, bars = axes.pop(0), report["spectrum"]
        for i, (token, mean) in enumerate(bars["mean"].items()):
            y = [j + 0.8 * (i / len(bars["mean"]) - 0.5) for j in range(len(mean))]
            axis.barh(y, mean, 0.8 / len(bars["mean"]), label=token, align="edge")
        axis.set_yticks(range(len(bars["components"])), bars["components"], fontsize=7)
        axis.set(title="direct contribution", xlabel="mean, nats: " + bars["ends"])
        axis.axvline(0, color="k", lw=0.5)
        axis.legend(fontsize=7)
    draw_circuit(axes.pop(0), config, score, report["circuit"])
    axis, found = axes.pop(0), report["curve"]
    axis.plot(found["share"], found["f"], "o-", label="circuits by rank")
    axis.axhline(1, color="k", lw=0.5)
    others = report["f of random halves"]
    axis.plot([0.5] * 2, others.values(), "x", color="C3", label="random: median, highest of 100")
    axis.set(xlabel="share of the edges kept", title="faithfulness", ylim=(-0.2, 1.3))
    axis.legend(fontsize=7)
    if "against" in report:
        axis, new = axes.pop(0), torch.tensor(report["against"]["scores"])
        edges = all_edges(config)
        axis.plot(score[edges], new[edges], ".")
        names = sources(config), readers(config)
        for s, r in top(new - score, edges, 5).nonzero().tolist():
            at = score[s, r].item(), new[s, r].item()
            axis.annotate(f"{names[0][s]} > {names[1][r]}", at, fontsize=6)
        axis.axline((0, 0), slope=1, color="k", lw=0.5)
        axis.set(title="edges before and after", xlabel="score before", ylabel="score after")
    figure.savefig(path, dpi=70)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# together


def load(folder: str) -> tuple[GPT, Vocabulary, Thinking, str]:
    """-> model, vocabulary, how it thinks, folder of its data. Raises DataError."""
    model, vocabulary, state = load_model(folder)
    check(model, vocabulary, folder)
    return model, vocabulary, as_trained(state, vocabulary), state["config"]["data"]


def load_alike(folder: str, run: str, model: GPT, vocabulary: Vocabulary) -> GPT:
    """The model in a folder, of the shape and vocabulary of `run`'s. Raises DataError."""
    other, its_vocabulary, *_ = load(folder)
    if its_vocabulary.tokens != vocabulary.tokens or other.config != model.config:
        raise DataError(f"{folder} is not of the shape and vocabulary of {run}")
    return other


def held_out_rows(folder: str, vocabulary: Vocabulary, rows: int, level: int = 0) -> Tensor:
    """Validation rows, prompts and their answers' first tokens (B, T). Raises DataError."""
    val = load_split(folder, "val", vocabulary, 0)
    level = level or val.levels[-1]
    if level not in val.levels:
        raise DataError(f"the data have no level {level}, but {val.levels[0]} to {val.levels[-1]}")
    return alike(val.first(rows, level))


def main(argv: list[str]) -> None:
    config = load_config(argv, LensConfig)
    model, vocabulary, thinking, data = load(config.run)
    real = held_out_rows(config.data or data, vocabulary, config.rows, config.level)
    patches = mixed(model, thinking, real)
    report = {"run": config.run} | inspect(*patches)
    if config.swap:
        ends, swap = (token_ids(x, vocabulary) for x in (config.answers, config.swap))
        parts = spectrum(model, thinking, real, ends, swap)  # (tokens, S + 3, B)
        names = [*sources(model.config), *direct(patches[0])[1]]
        same = [
            [torch.corrcoef(torch.stack([parts[0, s], part[s]]))[0, 1].item() for part in parts]
            for s in range(len(sources(model.config)))
        ]
        tokens = config.swap.split(",")
        means = dict(zip(tokens, parts.mean(dim=2).tolist()))
        report["spectrum"] = {"components": names, "mean": means, "correlation with first": same}
        report["spectrum"]["mean size"] = parts[0].abs().mean(dim=1).tolist()
        report["spectrum"]["ends"] = " - ".join(config.answers.split(","))
    if config.against:
        other = load_alike(config.against, config.run, model, vocabulary)
        found = compare(patches, mixed(other, thinking, real), report["circuit"])
        report["against"] = {"run": config.against} | found
        report["against"]["carriers"] = carriers(model, other, thinking, real)
    out = Path(config.run)
    (out / "lens.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, model.config, out / "lens.png")
    print(json.dumps({k: v for k, v in report.items() if k != "scores"}, indent=1))
    print(f"written: {out / 'lens.json'}, {out / 'lens.png'}")


if __name__ == "__main__":
    run(main, "lens.py")
