"""
What a trained model can do, and whether its thoughts do it: report.json, report.png, a table.

  python lab/report.py --run=out/chain --plain=out/plain        half a minute

All numbers are of held-out data, answers and thoughts greedy. Modes: `policy` thinks as trained;
`never` may not; `random`, `constant` (its most used thought) and `swapped` (what another sequence
of the batch thinks) leave thoughts where they are and take away what they say. A text has no
answers to be right, so there it is nats a token, over windows that do not overlap, with a 95%
confidence interval; and `scattered` leaves what thoughts say, and puts them anywhere.

Glossary: X different thoughts occur; Y labels. A label is what one would have in mind at a token.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import Batch, Rows, Text, Vocabulary, load_split
from model import GPT, MODES, Thinking
from options import load_config, option, run
from runs import load_model, load_plain, pick_device
from train import as_trained, evaluate, rollout, trained_config

WINDOWS = (8, 16)  # positions in view, for accuracy in a window
LONGEST = 128  # longer levels are tried in a window only
TEXT_WINDOWS, PART = 2000, 100  # windows of a text, at most, and how many go through together
NAMED = 32  # thoughts that the picture names, at most


@dataclass
class ReportConfig:
    run: str = option("out/chain", "folder of the checkpoint; the report is written there")
    plain: str = option("", "folder of a plain model's checkpoint, to stand beside it")
    data: str = option("", "folder of the data, if not where the checkpoint was trained")
    rows: int = option(200, "sequences a level", 1)
    device: str = option("auto", "auto, cpu, cuda or mps")


# ----------------------------------------------------------------------------------------------
# how well it does


def accuracy(model: GPT, splits: list[Rows], thinking: Thinking, rows: int) -> dict:
    """-> {"accuracy": {level: share of whole answers right}, "thoughts_per_row": {level: mean}}."""
    result, device = {"accuracy": {}, "thoughts_per_row": {}}, model.head.weight.device
    for split in splits:
        for level in split.levels:
            if level > LONGEST and not thinking.window:
                continue
            generator = torch.Generator(device).manual_seed(level)
            batch = split.first(rows, level).to(device)
            grid, right, _ = evaluate(model, batch, thinking, generator)
            thoughts = grid.thinks.sum().item() / len(right)
            result["accuracy"][level] = round(right.float().mean().item(), 4)
            result["thoughts_per_row"][level] = round(thoughts, 2)
    return result


def nats(model: GPT, text: Text, thinking: Thinking, vocabulary: Vocabulary) -> dict:
    """-> nats a token, half the width of its interval, bits a byte, thoughts a token, windows."""
    batch = text.first(TEXT_WINDOWS, text.block).to(model.head.weight.device)
    generator, losses, thoughts = torch.Generator(batch.real.device).manual_seed(0), [], 0
    for i in range(0, len(batch.real), PART):
        part = Batch(*(x[i : i + PART] for x in batch))
        grid, _, loss = evaluate(model, part, thinking, generator)
        losses.append(loss[:, :-1].cpu())
        thoughts += grid.thinks.sum().item()
    loss = torch.cat(losses)  # (windows, block)
    of_window = loss.mean(dim=1)
    n_bytes = sum(len(vocabulary.pieces[i]) for i in batch.real[:, 1:].flatten().tolist())
    return {
        "nats": round(loss.mean().item(), 4),
        "interval": round(1.96 * of_window.std().item() / len(of_window) ** 0.5, 4),
        "bits_per_byte": round(loss.sum().item() / math.log(2) / n_bytes, 4),
        "thoughts_per_token": round(thoughts / loss.numel(), 4),
        "windows": len(of_window),
    }


# ----------------------------------------------------------------------------------------------
# what its thoughts mean


def most_used_thought(model: GPT, rows: Rows | Text, thinking: Thinking, count: int) -> int:
    device = model.head.weight.device
    batch = rows.first(count, rows.levels[-1]).to(device)
    grid, _, _ = evaluate(model, batch, thinking, torch.Generator(device).manual_seed(0))
    thoughts = grid.next_thought(model.config.vocab_size)[grid.thinks]
    return int(thoughts.mode().values) if len(thoughts) else 0


def joint_counts(thoughts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Thoughts (N,) and their labels 0 .. Y-1 (N,) -> numbers of the thoughts that occur, (X,), lowest
    first, and how often each has each label, (X, Y). Few of all K thoughts occur.
    """
    used, row = torch.unique(thoughts, return_inverse=True)
    Y = int(labels.max()) + 1 if len(labels) else 0
    return used, torch.bincount(row * Y + labels, minlength=len(used) * Y).view(len(used), Y)


def write_rounded(found: dict, path: Path) -> dict:
    """Write it as JSON -> what was written: keys are strings, numbers have four places."""
    found = json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 4))
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def mutual_information(counts: Tensor) -> float:
    """Joint counts (X, Y) -> I(X; Y) in nats, of the empirical distribution."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum().item()


def by_chance(thoughts: Tensor, labels: Tensor) -> float:
    """
    What shuffled labels seem to tell of the thoughts, in nats: the bias of `mutual_information` in
    so small a sample. It grows with the number of different thoughts.
    """
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return mutual_information(joint_counts(thoughts, labels[shuffle])[1])


def meaning(model: GPT, vocabulary: Vocabulary, thinking: Thinking, probe: dict) -> dict:
    """
    What thoughts have come to mean. probe: what probe.json holds, "rows" of text and for every
    token its label, one of "values" or None. A thought has the label of the token it follows.
    -> in nats, mutual information of thoughts and labels, how much of it is there by chance, and
    the labels' entropy; "thoughts", the numbers of those that occur, and "counts", a row for each;
    "silent", the share of tokens of each label that no thought follows: silence can tell, too.
    """
    values, device = probe["values"], model.head.weight.device
    index = {None: -1} | {value: i for i, value in enumerate(values)}
    rows = [torch.tensor(vocabulary.encode(text)) for text in probe["rows"]]
    length = torch.tensor([len(row) for row in rows])
    label = [torch.tensor([index[value] for value in row]) for row in probe["labels"]]
    real, label = pad_sequence(rows, True), pad_sequence(label, True, padding_value=-1)  # (B, T)
    generator = torch.Generator(device).manual_seed(0)
    grid, _ = rollout(model, real.to(device), length.to(device), thinking, generator)
    thinks = grid.thinks.cpu() & (label >= 0)[:, :, None]  # (B, T, S)
    thoughts = grid.next_thought(model.config.vocab_size).cpu()[thinks]  # (N,)
    labels = label[:, :, None].expand_as(thinks)[thinks]  # (N,)
    used, counts = joint_counts(thoughts, labels)
    counts = F.pad(counts, (0, len(values) - counts.size(1)))
    shares = []
    for i in range(len(values)):
        here = grid.present[:, :, 0].cpu() & (label == i)
        shares.append((here & ~thinks[:, :, 0]).sum().item() / max(1, here.sum().item()))
    found = {"label": probe["name"], "mutual_information": 0.0}
    if len(used):
        found["mutual_information"] = round(mutual_information(counts), 4)
        found["by_chance"] = round(by_chance(thoughts, labels), 4)
        found["label_entropy"] = round(mutual_information(counts.sum(dim=0).diag()), 4)
    found |= {"values": values, "silent": [round(share, 4) for share in shares]}
    return found | {"thoughts": used.tolist(), "counts": counts.tolist()}


# ----------------------------------------------------------------------------------------------
# the report


def make_report(config: ReportConfig) -> dict:
    """-> what report.json holds. Raises DataError."""
    model, vocabulary, state = load_model(config.run, config.device)
    trained, meta, progress = trained_config(state), state["meta"], state["progress"]
    folder = Path(config.data or trained.data)
    names = ["val", "test"] if (folder / "test.bin").exists() else ["val"]
    splits = [load_split(folder, name, vocabulary, trained.block) for name in names]
    if config.plain:
        plain, words, plain_state = load_plain(config.plain, vocabulary, config.device)
    report = {
        "task": meta["task"],
        "level": meta["level"],
        "trained_levels": splits[0].levels,
        "learned_levels": state["mastered"],
        "thoughts_cost": progress["paid"] > 0,
        "seed": trained.seed,
        "steps": progress["step"],
        "seconds": round(progress["seconds"], 1),
        "params": sum(p.numel() for p in model.parameters()),
        "device": config.device,
        "threads": torch.get_num_threads(),
        "modes": {},
        "windows": {},
    }
    is_text, thinking = vocabulary.is_text, as_trained(state, vocabulary)

    def measure(model: GPT, **how) -> dict:
        changed = dataclasses.replace(thinking, **how)
        if is_text:
            return nats(model, splits[0], changed, vocabulary)
        return accuracy(model, splits, changed, config.rows)

    if trained.n_bits:
        thinking.constant = most_used_thought(model, splits[0], thinking, config.rows)
        report["constant_thought"] = thinking.constant
    for mode in MODES if trained.n_bits else ("never",):
        report["modes"][mode] = measure(model, mode=mode)
    if is_text and trained.n_bits:
        rate = report["modes"]["policy"]["thoughts_per_token"] / trained.max_run
        report["modes"]["scattered"] = measure(model, force=min(1.0, rate))
    if not is_text:
        report["windows"] = {window: measure(model, window=window) for window in WINDOWS}
    probe = folder / "probe.json"
    if probe.exists() and trained.n_bits:
        report["meaning"] = meaning(model, vocabulary, thinking, json.loads(probe.read_text()))
    if config.plain:
        window = plain_state["config"]["window"]
        report["plain"] = measure(plain, mode="never", window=window)
        report["plain"]["params"] = sum(p.numel() for p in plain.parameters())
        report["plain"]["seconds"] = round(plain_state["progress"]["seconds"], 1)
    return report


# ----------------------------------------------------------------------------------------------
# the table and the picture


def lines_of(report: dict) -> dict[str, dict]:
    """{name: what was measured} of all lines of the table."""
    lines = dict(report["modes"])
    lines |= {f"window of {w}": line for w, line in report["windows"].items()}
    return lines | ({"plain GPT": report["plain"]} if "plain" in report else {})


def print_table(report: dict) -> None:
    lines, trained = lines_of(report), report["trained_levels"]
    if "nats" in lines["never"]:
        windows = f"{lines['never']['windows']} windows of {trained[0]} tokens"
        print(f"\n{report['task']}: {windows}; nats a token, bits a byte, thoughts a token")
        for name, line in lines.items():
            print(f"{name:16s}{line['nats']:8.4f} +- {line['interval']:.4f}", end="")
            print(f"{line['bits_per_byte']:10.4f}{line['thoughts_per_token']:9.3f}")
        return
    levels = sorted({level for line in lines.values() for level in line["accuracy"]})
    rows = {name: (line["accuracy"], ".3f") for name, line in lines.items()}
    if "policy" in lines:
        rows["thoughts"] = lines["policy"]["thoughts_per_row"], ".1f"
    print(f"\nshare of whole answers right, by {report['level']}", end="")
    print(f" (trained on {trained[0]} to {trained[-1]})")
    print(f"{'':12s}" + "".join(f"{level:6d}" for level in levels))
    for name, (line, form) in rows.items():
        cells = (format(line[level], form) if level in line else "-" for level in levels)
        print(f"{name:12s}" + "".join(f"{cell:>6s}" for cell in cells))
    if m := report.get("meaning"):
        told, there = m["mutual_information"], m.get("label_entropy", 0)
        chance = f"{m.get('by_chance', 0):.2f} with labels shuffled"
        print(f"a thought tells {told:.2f} of {there:.2f} nats of the {m['label']} ({chance})")


def draw_text(report: dict, checks: list[dict], axes) -> None:
    lines, (bars, learning) = lines_of(report), axes.flat
    values = [line["nats"] for line in lines.values()]
    bars.bar([*lines], values, yerr=[line["interval"] for line in lines.values()])
    bars.set(ylim=(min(values) - 0.1, None), ylabel="nats a token", title=report["task"])
    level = str(report["trained_levels"][0])
    learning.plot([m["step"] for m in checks], [m["validation"][level] for m in checks])
    learning.set(xlabel="step", ylabel="validation, nats a token", title="learning")


def draw_meaning(found: dict, axis) -> None:
    """Share of each label's thoughts that are this one; thoughts of the same label side by side."""
    counts = torch.tensor(found["counts"], dtype=torch.double)  # (X, Y)
    order = sorted(range(len(counts)), key=lambda i: (int(counts[i].argmax()), -counts[i].sum()))
    if order:
        share = (counts / counts.sum(dim=0).clamp(min=1)).T[:, order].numpy()
        axis.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    some = range(0, len(order), max(1, math.ceil(len(order) / NAMED)))
    axis.set_xticks(some, [found["thoughts"][order[i]] for i in some], rotation=90)
    axis.set_yticks(range(len(found["values"])), found["values"])
    told = f"{found['mutual_information']:.2f} of {found.get('label_entropy', 0):.2f} nats"
    axis.set(xlabel="thought", ylabel=found["label"], title=f"what thoughts tell: {told}")


def draw_accuracy(report: dict, checks: list[dict], axes) -> None:
    lines, trained, level = lines_of(report), report["trained_levels"], report["level"]
    (by_level, meant), (thinking, learning) = axes
    for name, line in lines.items():
        shares, width = line["accuracy"], 2.5 if name == "policy" else 1.2
        by_level.plot([*shares], [*shares.values()], label=name, marker="o", ms=4, lw=width)
    by_level.axvspan(trained[0], trained[-1], color="0.92", label="trained")
    by_level.set(xscale="log", xlabel=level, ylabel="answers right", title=report["task"])
    by_level.set_ylim(-0.02, 1.03)
    by_level.set_xticks(ticks := [2**i for i in range(11)], ticks)
    by_level.minorticks_off()
    by_level.legend(fontsize=8)
    if "meaning" in report:
        draw_meaning(report["meaning"], meant)
    if "policy" in lines:
        count = lines["policy"]["thoughts_per_row"]
        thinking.plot(trained, [count[n] for n in trained], marker="o", ms=4)
        thinking.set(ylim=(0, None), xlabel=level, ylabel="thoughts", title="how much it thinks")
    seconds = [m["seconds"] for m in checks]
    for n in trained:
        learning.plot(seconds, [m["validation"].get(str(n)) for m in checks], label=n)
    learning.set(xlabel="seconds", ylabel="validation answers right", title=f"learning, by {level}")
    learning.set_ylim(-0.02, 1.03)
    learning.legend(fontsize=7, ncols=2)
    for axis in axes.flat:
        axis.axis("on" if axis.has_data() else "off")


def draw(report: dict, metrics: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    is_text = "nats" in report["modes"]["never"]
    figure, axes = plt.subplots(
        1 if is_text else 2, 2, figsize=(12, 4 if is_text else 8), layout="constrained"
    )
    checks = [m for m in metrics if "validation" in m]
    (draw_text if is_text else draw_accuracy)(report, checks, axes)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, ReportConfig)
    config.device = pick_device(config.device)
    report, folder = make_report(config), Path(config.run)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    path = folder / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    draw(report, metrics, folder / "report.png")
    print_table(report)
    print(f"written: {folder / 'report.json'}, {folder / 'report.png'}")


if __name__ == "__main__":
    run(main, "lab/report.py")
