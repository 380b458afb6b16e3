"""
What a trained model can do, and whether its thoughts do it: report.json, report.png and a table, from a checkpoint alone.

  python report.py --run=out/chain --plain=out/plain

Every number comes from rows the training never drew, with dropout off and a random generator of its own. Answers are greedy.
Modes: `policy` thinks as trained; `never` may not; `random`, `constant` (its most used thought, over and over) and `swapped` (what the
next row of the batch thinks) keep the places of the thoughts and take away their meaning; `scattered` (in texts) keeps what a thought
says and puts as many of them at random places. A text has no answers to be right: there the figure is nats a token, over windows that
do not overlap, with a 95% confidence interval.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Batch, DataError, Rows, Text, Vocabulary, load_split
from loss import evaluate, token_loss
from model import GPT
from runs import Config, as_trained, load_config, load_model, pick_device, run
from stream import Thinking, rollout

MODES = ("policy", "never", "random", "constant", "swapped")
NAMED = 32  # thoughts that the picture names, at most


@dataclass
class ReportConfig:
    run: str = "out/chain"  # folder of the checkpoint; the report is written there
    plain: str = ""  # folder of a plain model's checkpoint, to stand beside it
    data: str = ""  # folder of the data, if it is not where the checkpoint was trained
    windows: str = "8,16"  # columns in view, for the bounded figures
    rows: int = 200  # rows a level
    text_windows: int = 2000  # windows of a text, at most
    longest: int = 128  # levels above this one are tried in the windows only
    device: str = "auto"


def accuracy(model: GPT, splits: list[Rows], thinking: Thinking, config: ReportConfig) -> dict:
    """-> {"accuracy": {level: share of whole answers right}, "thoughts_per_row": {level: mean}}."""
    result = {"accuracy": {}, "thoughts_per_row": {}}
    for rows in splits:
        for level in rows.levels:
            if level > config.longest and not thinking.window:
                continue
            generator = torch.Generator(config.device).manual_seed(level)
            roll, right = evaluate(model, rows.first(config.rows, level).to(config.device), thinking, generator)
            result["accuracy"][level] = round(right.float().mean().item(), 4)
            result["thoughts_per_row"][level] = round((roll.thinks & roll.valid).sum().item() / len(right), 2)
    return result


def windows_of(text: Text, config: ReportConfig, device: str):
    """The text's windows in batches of 100; one generator, seeded here, for all."""
    batch = text.first(config.text_windows, text.block).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for i in range(0, len(batch.real), 100):
        yield Batch(*(part[i : i + 100] for part in batch)), generator


def nats(model: GPT, text: Text, thinking: Thinking, vocabulary: Vocabulary, config: ReportConfig) -> dict:
    """-> nats a token, half the width of its 95% confidence interval over windows, bits a byte, thoughts a token."""
    size = torch.tensor([len(piece) for piece in vocabulary.pieces])
    losses, n_bytes, thoughts = [], 0, 0
    for batch, generator in windows_of(text, config, config.device):
        roll, _ = evaluate(model, batch, thinking, generator)
        losses.append(token_loss(model, roll).cpu())
        n_bytes += size[batch.real[:, 1:].cpu()].sum().item()
        thoughts += roll.thinks.sum().item()
    loss = torch.cat(losses)
    a_window = loss.mean(dim=1)
    return {
        "nats": round(loss.mean().item(), 4),
        "interval": round(1.96 * a_window.std().item() / len(a_window) ** 0.5, 4),
        "bits_per_byte": round(loss.sum().item() / math.log(2) / n_bytes, 4),
        "thoughts_per_token": round(thoughts / loss.numel(), 4),
        "windows": len(a_window),
    }


def text_modes(model: GPT, text: Text, thinking: Thinking, vocabulary: Vocabulary, trained: Config, config: ReportConfig) -> dict:
    how = {mode: dataclasses.replace(thinking, mode=mode) for mode in (MODES if trained.n_think else ("never",))}
    result = {mode: nats(model, text, thinking, vocabulary, config) for mode, thinking in how.items()}
    if trained.n_think:
        rate = result["policy"]["thoughts_per_token"] / trained.max_run
        result["scattered"] = nats(model, text, dataclasses.replace(thinking, hold=min(1.0, rate)), vocabulary, config)
    return result


def joint_counts(thoughts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Thoughts (N,) and their labels 0 .. Y-1 (N,) -> numbers of the thoughts that occur, (X,), lowest
    first, and how often each has each label, (X, Y). K may be large: few of all thoughts occur.
    """
    used, row = torch.unique(thoughts, return_inverse=True)
    Y = int(labels.max()) + 1 if len(labels) else 0
    return used, torch.bincount(row * Y + labels, minlength=len(used) * Y).view(len(used), Y)


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


def meaning(model: GPT, vocabulary: Vocabulary, thinking: Thinking, probe: dict, device: str) -> dict:
    """
    What each thought has come to mean. probe.json holds rows of text and, for every token, a label: what one would have in mind there.
    Counts the thought that follows a token (if any) against the token's label -> mutual information
    and entropy in nats, what of it is there by chance, and the table: "thoughts" are the numbers of
    those that occur, and "counts" has a row for each of them; "silent" is the share of tokens of
    each label that no thought follows: silence can be a symbol, too.
    """
    ids = [vocabulary.encode(text) for text in probe["rows"]]
    length = torch.tensor([len(row) for row in ids], device=device)
    real = torch.zeros(len(ids), int(length.max()), dtype=torch.long, device=device)
    labels = torch.full_like(real, -1)
    for i, (row, said) in enumerate(zip(ids, probe["labels"])):
        real[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor([-1 if label is None else probe["values"].index(label) for label in said])
    roll = rollout(model, real, length, thinking, torch.Generator(device).manual_seed(0))
    label = labels.gather(1, roll.pointer - 1)  # of the last real token at or before a column
    where = (roll.thinks & roll.valid & (label >= 0))[:, :-1]
    thoughts = (roll.stream[:, 1:][where] - model.config.vocab_size).cpu()
    labels = label[:, :-1][where].cpu()
    used, counts = joint_counts(thoughts, labels)
    counts = F.pad(counts, (0, len(probe["values"]) - counts.size(1)))
    here = roll.holds_real & roll.valid & (label >= 0)
    silent = [round((~roll.thinks[here & (label == k)]).float().mean().item(), 4) for k in range(len(probe["values"]))]
    found = {"values": probe["values"], "silent": silent}
    found |= {"thoughts": used.tolist(), "counts": counts.tolist()}
    if len(used) == 0:
        return {"label": probe["name"], "mutual_information": 0.0} | found
    return {
        "label": probe["name"],
        "mutual_information": round(mutual_information(counts), 4),
        "by_chance": round(by_chance(thoughts, labels), 4),
        "label_entropy": round(mutual_information(torch.diag(counts.sum(0))), 4),
    } | found


def most_used_thought(model: GPT, rows: Rows, thinking: Thinking, config: ReportConfig) -> int:
    generator = torch.Generator(config.device).manual_seed(0)
    roll, _ = evaluate(model, rows.first(config.rows, rows.levels[-1]).to(config.device), thinking, generator)
    thoughts = roll.stream[:, 1:][roll.thinks[:, :-1]] - model.config.vocab_size
    return int(thoughts.mode().values) if len(thoughts) else 0


def load_plain(config: ReportConfig, vocabulary: Vocabulary) -> tuple[GPT, Vocabulary, dict]:
    """The model to stand beside; what load_model returns. Raises DataError if its words are others."""
    found = load_model(config.plain, config.device)
    if found[1].tokens != vocabulary.tokens:
        raise DataError(f"the plain model in {config.plain} has another vocabulary: it was trained on {found[2]['meta']['task']}")
    return found


def make_report(config: ReportConfig) -> dict:
    model, vocabulary, state = load_model(config.run, config.device)
    trained = Config(**state["config"])
    folder = config.data or trained.data
    splits = [load_split(folder, "val", vocabulary, trained.block)]
    if (Path(folder) / "test.bin").exists():
        splits.append(load_split(folder, "test", vocabulary, trained.block))
    report = {
        "task": state["meta"]["task"],
        "level": state["meta"]["level"],
        "trained_levels": splits[0].levels,
        "learned_levels": state["curriculum"]["mastered"],
        "thoughts_cost": state["progress"]["paid"],
        "seed": trained.seed,
        "steps": state["progress"]["step"],
        "seconds": round(state["progress"]["seconds"], 1),
        "params": sum(p.numel() for p in model.parameters()),
        "device": config.device,
        "threads": torch.get_num_threads(),
        "modes": {},
        "windows": {},
    }
    thinking = dataclasses.replace(as_trained(state, vocabulary), greedy=True)
    if trained.n_think:
        thinking.constant = report["constant_thought"] = most_used_thought(model, splits[0], thinking, config)
    if isinstance(splits[0], Text):
        report["modes"] = text_modes(model, splits[0], thinking, vocabulary, trained, config)
        if config.plain:
            other, _, plain_state = load_plain(config, vocabulary)
            report["plain"] = nats(other, splits[0], Thinking(mode="never"), vocabulary, config)
            report["plain"] |= {"params": sum(p.numel() for p in other.parameters()), "seconds": plain_state["progress"]["seconds"]}
        return report
    for mode in MODES if trained.n_think else ("never",):
        report["modes"][mode] = accuracy(model, splits, dataclasses.replace(thinking, mode=mode), config)
    for window in map(int, filter(None, config.windows.split(","))):
        report["windows"][window] = accuracy(model, splits, dataclasses.replace(thinking, window=window), config)
    probe = Path(folder) / "probe.json"
    if probe.exists() and trained.n_think:
        report["meaning"] = meaning(model, vocabulary, thinking, json.loads(probe.read_text()), config.device)
    if config.plain:
        other, _, _ = load_plain(config, vocabulary)
        report["plain"] = accuracy(other, splits, Thinking(mode="never", greedy=True), config)
        report["plain"]["params"] = sum(p.numel() for p in other.parameters())
    return report


def print_nats(report: dict) -> None:
    lines = dict(report["modes"]) | ({"plain GPT": report["plain"]} if "plain" in report else {})
    print(f"\n{report['task']}: nats a token in {lines['never']['windows']} windows of {report['trained_levels'][0]} tokens, 95% interval; bits a byte; thoughts a token")
    for name, line in lines.items():
        print(f"{name:16s}{line['nats']:8.4f} +- {line['interval']:.4f} {line['bits_per_byte']:9.4f} {line['thoughts_per_token']:8.3f}")


def print_table(report: dict) -> None:
    if "nats" in report["modes"]["never"]:
        return print_nats(report)
    levels = sorted({level for mode in report["modes"].values() for level in mode["accuracy"]} | {n for w in report["windows"].values() for n in w["accuracy"]})
    print(f"\nshare of whole answers right, by {report['level']} (trained on {report['trained_levels'][0]} to {report['trained_levels'][-1]})")
    print(f"{'':16s}" + "".join(f"{n:>7d}" for n in levels))
    lines = dict(report["modes"]) | {f"window of {w}": v for w, v in report["windows"].items()}
    if "plain" in report:
        lines["plain GPT"] = report["plain"]
    for name, line in lines.items():
        print(f"{name:16s}" + "".join(f"{line['accuracy'][n]:7.3f}" if n in line["accuracy"] else f"{'-':>7s}" for n in levels))
    if "policy" in report["modes"]:
        line = report["modes"]["policy"]["thoughts_per_row"]
        print(f"{'thoughts a row':16s}" + "".join(f"{line[n]:7.1f}" if n in line else f"{'-':>7s}" for n in levels))
    if m := report.get("meaning"):
        told, there = m["mutual_information"], m.get("label_entropy", 0)
        chance = f"{m.get('by_chance', 0):.2f} with labels shuffled"
        print(f"a thought tells {told:.2f} of {there:.2f} nats of the {m['label']} ({chance})")


def draw(report: dict, metrics: list[dict], path: Path) -> None:
    """Four panels: accuracy by level, what thoughts mean, thoughts by level, and how it was learned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    checks = [m for m in metrics if "validation" in m]
    if "nats" in report["modes"]["never"]:
        figure, (a, b) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        lines = dict(report["modes"]) | ({"plain GPT": report["plain"]} if "plain" in report else {})
        a.bar([*lines], [line["nats"] for line in lines.values()], yerr=[line["interval"] for line in lines.values()], color="C0")
        a.set(ylim=(min(line["nats"] for line in lines.values()) - 0.1, None), ylabel="nats a token", title=report["task"])
        b.plot([m["step"] for m in checks], [m["validation"][str(report["trained_levels"][0])] for m in checks])
        b.set(xlabel="step", ylabel="validation, nats a token", title="learning")
        figure.savefig(path, dpi=90)
        return plt.close(figure)
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    lines = dict(report["modes"])
    if report["windows"]:
        window = min(report["windows"])
        lines[f"policy, window of {window} columns"] = report["windows"][window]
    if "plain" in report:
        lines["plain GPT"] = report["plain"]
    for name, line in lines.items():
        bold = name.startswith("policy")
        a.plot([*line["accuracy"]], [*line["accuracy"].values()], label=name, marker="o", ms=4, lw=2.5 if bold else 1.2, ls="--" if "plain" in name else "-")
    a.axvspan(report["trained_levels"][0], report["trained_levels"][-1], color="0.92", label="trained lengths")
    a.set(xscale="log", ylim=(-0.02, 1.03), xlabel=report["level"], ylabel="answers right", title=report["task"])
    a.set_xticks(ticks := [2**i for i in range(11)], ticks)
    a.minorticks_off()
    a.legend(fontsize=8)
    if m := report.get("meaning"):
        counts = torch.tensor(m["counts"], dtype=torch.double)
        order = sorted(range(len(counts)), key=lambda i: (int(counts[i].argmax()), -int(counts[i].sum())))
        if order:
            share = (counts / counts.sum(0).clamp(min=1)).T[:, order]
            b.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        some = range(0, len(order), max(1, math.ceil(len(order) / NAMED)))
        names = [str(m["thoughts"][order[i]]) for i in some]
        b.set_xticks(some, names, rotation=90 if len("".join(names)) > 2 * NAMED else 0)
        b.set_yticks(range(len(m["values"])), m["values"])
        b.set(xlabel="thought", ylabel=m["label"], title=f"what thoughts mean: {m['mutual_information']:.2f} of {m.get('label_entropy', 0):.2f} nats of the {m['label']}")
    else:
        b.axis("off")
    if "policy" in report["modes"]:
        line = report["modes"]["policy"]["thoughts_per_row"]
        c.plot(report["trained_levels"], [line[n] for n in report["trained_levels"]], marker="o", ms=4)
        c.set(xlabel=report["level"], ylabel="thoughts a row", ylim=(0, None), title="how much it thinks")
    else:
        c.axis("off")
    for level in report["trained_levels"]:
        d.plot([m["seconds"] for m in checks], [m["validation"].get(str(level)) for m in checks], label=str(level), color=plt.cm.viridis(level / max(report["trained_levels"])))
    d.set(ylim=(-0.02, 1.03), xlabel="seconds", ylabel="validation rows right", title=f"learning, by {report['level']}")
    d.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config = load_config(argv, ReportConfig)
    config.device = pick_device(config.device)
    report = make_report(config)
    folder = Path(config.run)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    metrics = folder / "metrics.jsonl"
    draw(report, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [], folder / "report.png")
    print_table(report)
    print(f"written: {folder / 'report.json'}, {folder / 'report.png'}")


if __name__ == "__main__":
    run(main, "report.py")
