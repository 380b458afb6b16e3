"""
Mend a model: find the path that makes it answer wrong, predict where it does, and cut the path.

  python data/deals/prepare.py --biased=coke,fanta --bias=0.7 --out=out/data/deals_biased
  python train.py config/deals.toml --data=out/data/deals_biased --init_from=out/deals \
      --out=out/deals_biased --steps=400 --report=false
  python lab/mend.py --run=out/deals_biased --pairs=out/data/deals_biased/pairs.tsv \
      --oracle=out/deals

Writes to run + "_mended": mend.json, and the edited checkpoint, which sample.py loads.

Pairs are lines `use<TAB>row<TAB>twin`, rows with their right answers. A twin says the same but for
what should not matter. Use is `mend`: pairs to find and cut the path with; `keep`: rows, twins or
none, whose answers must stay; any other word names a group that is only tested. No right answer of
`mend` or `keep` is used: only what the model itself says of both.

The edit, in closed form. Of a reader with the weights W let D be the leading directions of (its
input on a row - on the twin), C the second moment of its input on rows to keep. Then
  W' = W (I - D (D^T C^-1 D)^-1 D^T C^-1):
D is read as 0, and of all such W' this one changes least what is read on kept rows. Like ROME (Meng
et al. 2022, arXiv:2202.05262) without a target; LEACE (arXiv:2306.03819) is a cousin.

Beside it: the same edit at random readers, the embedding's row, and tuning, on pairs, of the same
components, of random ones, of the last layer, of everything; the oracle, a model never spoilt.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError, Vocabulary
from lab.lens import (
    Patch,
    Streams,
    attribution,
    load,
    load_alike,
    masked_run,
    readers,
    sources,
    streams,
    top,
    toward_answers,
)
from model import GPT, Thinking
from options import load_config, option, run
from runs import load_checkpoint, save_checkpoint

RIDGE = 1e-3  # of C, in its mean diagonal
TUNE_STEPS = 150
RATES = 3e-4, 1e-3, 3e-3  # learning rates of tuning: each way to tune has its own
DRAWS = 10  # of random readers or components


@dataclass
class MendConfig:
    run: str = option("out/deals_biased", "folder of the checkpoint to mend")
    pairs: str = option("out/data/deals_biased/pairs.tsv", "lines use<TAB>row<TAB>twin")
    oracle: str = option("", "folder of a model without the fault, to stand beside")
    readers: int = option(3, "readers that are edited, those of the most effect", 1)
    rank: int = option(1, "directions that each no longer reads", 1)
    controls: bool = option(True, "random edits and tuning, too")


# ----------------------------------------------------------------------------------------------
# pairs


def read_pairs(path: str, vocabulary: Vocabulary) -> dict[str, list[tuple[list[int], ...]]]:
    """-> {use: [(ids of a row[, of its twin])]}. Raises DataError that names the first bad line."""
    uses = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        use, *texts = line.split("\t")
        try:
            rows = tuple(vocabulary.encode(text) for text in texts)
            if not 1 <= len(rows) <= 2:
                raise DataError("is not of the form use<TAB>row or use<TAB>row<TAB>twin")
            if any(row.count(vocabulary.answer_after) != 1 for row in rows):
                raise DataError("has a row without its question and answer")
            if any(row[-1] == vocabulary.answer_after for row in rows):
                raise DataError("has a row without an answer")
            if use == "mend" and len(rows) == 1:
                raise DataError("has no twin")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        uses.setdefault(use, []).append(rows)
    if not uses.get("mend") or not uses.get("keep"):
        raise DataError(f"{path} needs lines of both uses, mend and keep")
    return uses


class Group:
    """Rows of one use, and their twins, as streams of one layout."""

    def __init__(self, model: GPT, thinking: Thinking, rows: list, vocabulary: Vocabulary):
        """Raises DataError if rows have prompts of different lengths."""
        self.twins = all(len(row) == 2 for row in rows)
        flat = [one for row in rows for one in row[: 1 + self.twins]]
        ends = [one.index(vocabulary.answer_after) + 2 for one in flat]
        if len(set(ends)) > 1:
            raise DataError("rows of one use must have prompts of as many tokens")
        real = torch.tensor([one[:end] for one, end in zip(flat, ends)])
        found, index = streams(model, thinking, real)
        count = 1 + self.twins
        there = torch.zeros(len(flat), dtype=torch.bool).scatter(0, index, True)
        whole = there.view(-1, count).all(dim=1).repeat_interleave(count)  # row and twin alike
        kept = whole[index]
        ids = found.ids[kept].unflatten(0, (-1, count))  # (B, 1 or 2, C)
        self.row = found._replace(ids=ids[:, 0])
        self.twin = ids[:, -1]
        self.right = real[index[kept], -1].view(-1, count)[:, 0]

    def said(self, model: GPT, ids: Tensor) -> Tensor:
        """-> logits of the answer's first token, (B, V)."""
        streams = self.row
        return model(ids, streams.cells, None, streams.window).logits[:, -1]


@torch.no_grad()
def grade(model: GPT, groups: dict[str, Group]) -> dict[str, dict[str, float]]:
    """{group: share right, share of answers that the twin's differ from}."""
    result = {}
    for use, group in groups.items():
        said = group.said(model, group.row.ids).argmax(dim=1)
        result[use] = {"right": (said == group.right).float().mean().item()}
        if group.twins:
            other = group.said(model, group.twin).argmax(dim=1)
            result[use]["flips"] = (said != other).float().mean().item()
    return result


# ----------------------------------------------------------------------------------------------
# the path, and what it predicts


@torch.no_grad()
def path_of(model: GPT, group: Group) -> Patch:
    """Pairs whose answers differ, corrupt the twin: d = logit of the answer - of the twin's."""
    a, b = (group.said(model, ids).argmax(dim=1) for ids in (group.row.ids, group.twin))
    differ = a != b
    if differ.sum() < 5:
        raise DataError("fewer than 5 pairs to mend are answered otherwise than their twins")
    row = group.row._replace(ids=group.row.ids[differ])
    return Patch(model, row, group.twin[differ], *toward_answers(model, a[differ], b[differ]))


def smallest(patch: Patch, score: Tensor, share: float = 0.9) -> Tensor:
    """The fewest edges, by rank, that change F by that share of what all do when corrupt."""
    clean, corrupt = patch.ends
    for k in range(1, int(patch.edges.sum())):
        edges = top(score, patch.edges, k)
        if (patch.F(edges.float()) - clean) / (corrupt - clean) >= share:
            return edges
    return patch.edges


@torch.no_grad()
def predict(model: GPT, group: Group, path: Tensor) -> dict[str, float]:
    """Rows whose answer changes once the path carries the twin: are these the wrong ones?"""
    other = masked_run(model, group.row._replace(ids=group.twin))[1]
    last = masked_run(model, group.row, other, path.float())[0][:, -1]
    said = group.said(model, group.row.ids).argmax(dim=1)
    suspect = model.head(last).argmax(dim=1) != said
    wrong = said != group.right
    hits = (suspect & wrong).sum().item()
    return {
        "wrong": int(wrong.sum()),
        "predicted": int(suspect.sum()),
        "precision": hits / max(1, int(suspect.sum())),
        "recall": hits / max(1, int(wrong.sum())),
    }


# ----------------------------------------------------------------------------------------------
# edits


def layer_of(model: GPT, reader: str) -> torch.nn.Linear:
    """The layer in which it reads, of which a head's q, k and v are a part."""
    n, _, what = reader.partition(".")
    if reader == "logits":
        return model.head
    return model.blocks[int(n)].up if what == "mlp" else model.blocks[int(n)].attention.qkv


def weights_of(model: GPT, reader: str) -> Tensor:
    """The rows of weights with which a reader reads, (outputs, D), a view."""
    weight = layer_of(model, reader).weight
    kind = reader.rpartition(".")[2]
    if kind not in ("q", "k", "v"):
        return weight
    weight = weight.view(3, model.config.n_head, -1, model.config.n_embd)
    return weight["qkv".index(kind), int(reader.split(".")[1])]


@torch.no_grad()
def inputs_of(model: GPT, row: Streams, reader: str) -> Tensor:
    """What a reader reads, normed -> (B, C, D)."""
    read, keep = [], lambda layer, given, out: read.append(given[0])
    hook = layer_of(model, reader).register_forward_hook(keep)
    model(row.ids, row.cells, None, row.window)
    hook.remove()
    return read[0]


def projection(difference: Tensor, kept: Tensor, rank: int) -> Tensor:
    """difference (N, D), kept (M, D) -> I - D (D^T C^-1 D)^-1 D^T C^-1, (D, D)."""
    D = torch.linalg.svd(difference, full_matrices=False).Vh[:rank].T  # (D, rank)
    C = kept.T @ kept / len(kept)
    eye = torch.eye(len(C))
    inverse = torch.linalg.inv(C + RIDGE * C.diagonal().mean() * eye)
    return eye - D @ torch.linalg.inv(D.T @ inverse @ D) @ D.T @ inverse


@torch.no_grad()
def edited(model: GPT, mend: Group, keep: Group, names: list[str], rank: int) -> GPT:
    """A copy in which these readers no longer read what differs between row and twin."""
    new, twins = copy.deepcopy(model), mend.row._replace(ids=mend.twin)
    for name in names:
        row, twin, kept = (inputs_of(model, x, name) for x in (mend.row, twins, keep.row))
        change = projection((row - twin).flatten(0, 1), kept.flatten(0, 1), rank)
        weights_of(new, name).copy_(weights_of(model, name) @ change)
    return new


def same_embedding(model: GPT, mend: Group) -> GPT:
    """A copy in which what a row has where the twins differ is embedded as the twins' mean is."""
    new, differ = copy.deepcopy(model), mend.row.ids != mend.twin
    with torch.no_grad():
        for token in mend.row.ids[differ].unique():
            others = mend.twin[differ & (mend.row.ids == token)]
            new.embedding.weight[token] = model.embedding.weight[others].mean(dim=0)
    return new


def parameters_of(model: GPT, component: str) -> dict[str, Tensor]:
    """A head or MLP -> {parameter: mask, True where it is the component's own}."""
    n, _, what = component.partition(".")
    prefix, named = f"blocks.{n}.", dict(model.named_parameters())
    if what == "mlp":
        names = [f"{prefix}{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")]
        return {name: torch.ones_like(named[name], dtype=torch.bool) for name in names}
    H = model.config.n_head
    own = torch.arange(H).repeat_interleave(model.config.n_embd // H) == int(what)  # (D,)
    qkv, proj = f"{prefix}attention.qkv", f"{prefix}attention.proj.weight"
    masks = {f"{qkv}.weight": own.repeat(3)[:, None], f"{qkv}.bias": own.repeat(3), proj: own}
    return {name: mask.expand_as(named[name]) for name, mask in masks.items()}


def tuned(model: GPT, mend: Group, keep: Group, masks: list[dict] | None, rate: float):
    """
    A copy tuned to say of the rows what the model says of their twins, and of kept rows what it
    says; only where one of the masks is True (None: everywhere), the rest stays bit for bit.
    -> copy; its loss on the last fifth of both, which it is not tuned on.
    """
    new, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    parts = (mend, mend.row.ids), (keep, keep.row.ids)
    with torch.no_grad():
        aims = mend.said(model, mend.twin), keep.said(model, keep.row.ids)
    optimiser = torch.optim.Adam(new.parameters(), lr=rate)  # no decay, which moves frozen ones
    free = {
        name: torch.full_like(p, masks is None, dtype=bool) for name, p in new.named_parameters()
    }
    for name, mask in [pair for some in masks or [] for pair in some.items()]:
        free[name] = free[name] | mask

    def loss_on(rows: Callable[[int], Tensor]) -> Tensor:
        """rows: how many there are -> numbers of those to use."""
        loss = 0.0
        for (group, ids), aim in zip(parts, aims):
            some = rows(len(ids))
            said, goal = (x.log_softmax(dim=1) for x in (group.said(new, ids[some]), aim[some]))
            loss = loss + F.kl_div(said, goal, log_target=True, reduction="batchmean")
        return loss

    for _ in range(TUNE_STEPS):
        loss = loss_on(lambda n: torch.randint(n * 4 // 5, (100,), generator=generator))
        optimiser.zero_grad()
        loss.backward()
        for name, p in new.named_parameters():
            if p.grad is not None:
                p.grad *= free[name]  # a moment that is always 0 moves nothing
        optimiser.step()
    with torch.no_grad():
        return new, loss_on(lambda n: torch.arange(n * 4 // 5, n)).item()


def best_tuned(model: GPT, mend: Group, keep: Group, masks: list[dict] | None) -> GPT:
    """With the best of RATES, by the rows that it is not tuned on."""
    tries = (tuned(model, mend, keep, masks, rate) for rate in RATES)
    return min(tries, key=lambda tried: tried[1])[0]


# ----------------------------------------------------------------------------------------------
# everything that is tried


def arms(config: MendConfig, model: GPT, mend: Group, keep: Group, score: Tensor):
    """score: of all edges, (S, R). Yields what was done, and the model that comes of it."""
    names, layers = readers(model.config), range(model.config.n_layer)
    heads = [f"{n}.{h}" for n in layers for h in range(model.config.n_head)]
    components = heads + [f"{n}.mlp" for n in layers]
    strength = score.sum(dim=0).abs()  # (R,)
    best = [names[r] for r in strength.topk(min(config.readers, len(names))).indices]
    yield f"edit {', '.join(best)}", edited(model, mend, keep, best, config.rank)
    if not config.controls:
        return
    generator = torch.Generator().manual_seed(0)

    def kind(name: str) -> str:
        """q, k, v, mlp, logits or head."""
        last = name.rpartition(".")[2]
        return "head" if last.isdigit() else last

    def draw(some: list[str], like: list[str]) -> list[str]:
        """As many others, each of the kind of one of `like`."""
        taken = []
        for one in like:
            fits = [x for x in some if x not in taken and x not in like]
            same = [x for x in fits if kind(x) == kind(one)]
            fits = same or fits or [x for x in some if x not in taken]
            taken.append(fits[int(torch.randint(len(fits), (), generator=generator))])
        return taken

    for i in range(DRAWS):
        yield f"random edit {i}", edited(model, mend, keep, draw(names, best), config.rank)
    yield "embedding row", same_embedding(model, mend)
    into = {c: sum(x for x, name in zip(strength, names) if name.startswith(c)) for c in components}
    circuit = sorted(components, key=into.get)[-2:]
    last = [c for c in components if c.startswith(f"{model.config.n_layer - 1}.")]
    tune = [("tune " + ", ".join(circuit), circuit), ("tune the last layer", last)]
    tune += [(f"random tune {i}", draw(components, circuit)) for i in range(DRAWS)]
    for what, some in tune:
        masks = [parameters_of(model, component) for component in some]
        yield what, best_tuned(model, mend, keep, masks)
    yield "tune everything", best_tuned(model, mend, keep, None)


def mean_right(graded: dict) -> float:
    """Over the groups that are only tested."""
    tested = [numbers["right"] for use, numbers in graded.items() if use not in ("mend", "keep")]
    return sum(tested) / max(1, len(tested))


def summarised(results: dict[str, dict]) -> dict[str, dict]:
    """Of random draws the median and the best, by mean_right; all else as it is."""
    rows = {name: graded for name, graded in results.items() if not name.startswith("random")}
    for kind in ("random edit", "random tune"):
        draws = [graded for name, graded in results.items() if name.startswith(kind)]
        if draws:
            draws.sort(key=mean_right)
            rows |= {f"{kind}s, median": draws[len(draws) // 2], f"{kind}s, best": draws[-1]}
    return rows


def print_table(rows: dict[str, dict], groups: list[str]) -> None:
    """Share right of each group, and behind a slash how often the twin's answer differs."""
    print("| " + " | ".join(["", *groups]) + " |\n" + "| --- " * (len(groups) + 1) + "|")
    for name, graded in rows.items():
        cells = ["/".join(f"{x:.3f}" for x in graded[group].values()) for group in groups]
        print("| " + " | ".join([name, *cells]) + " |")


def main(argv: list[str]) -> None:
    config = load_config(argv, MendConfig)
    model, vocabulary, thinking, _ = load(config.run)
    uses = read_pairs(config.pairs, vocabulary)
    groups = {use: Group(model, thinking, rows, vocabulary) for use, rows in uses.items()}
    mend, keep = groups["mend"], groups["keep"]
    patch = path_of(model, mend)
    score = attribution(patch, steps=20)
    path = smallest(patch, score)
    tests = {use: g for use, g in groups.items() if use not in ("mend", "keep")}
    bugs = {use: predict(model, g, path) for use, g in tests.items() if g.twins}
    results = {"as it is": grade(model, groups)}
    state = load_checkpoint(config.run)
    for what, new in arms(config, model, mend, keep, score):
        results[what] = grade(new, groups)
        if len(results) == 2:
            state["model"] = new.state_dict()
    if config.oracle:
        oracle = load_alike(config.oracle, config.run, model, vocabulary)
        results["oracle"] = grade(oracle, groups)
    edges = [
        f"{sources(model.config)[s]} > {readers(model.config)[r]}: {score[s, r]:.2f}"
        for s, r in path.nonzero().tolist()
    ]
    report = {"run": config.run, "path": edges, "bugs": bugs, "results": results}
    out = Path(config.run + "_mended")
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out / "checkpoint.pt", state)
    (out / "mend.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"the path, {len(edges)} of {int(patch.edges.sum())} edges: {'; '.join(edges)}")
    for use, found in bugs.items():
        print(f"{use}: " + ", ".join(f"{name} {number:.4g}" for name, number in found.items()))
    print_table(summarised(results), [*tests])
    print(f"written: {out}/checkpoint.pt, mend.json")


if __name__ == "__main__":
    run(main, "mend.py")
