"""
The tables of the README: each is a set of training runs, made by one command.

  python experiments.py                     the names of the sets
  python experiments.py seeds --jobs=2      run what is missing, two runs side by side on one thread each, print the table

A run lives in out/SET/NAME and is skipped when its report.json is there. Tables are Markdown: mean, and lowest to highest over seeds.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.dataset import DataError
from runs import load_config, run

MANY = "--batch_tokens=1536"  # three times the main job's: most tables are of these
CHAIN, PLAIN = ["config/chain.toml", "--plain=", MANY], ["config/plain.toml", "--report=true", MANY]
SEEDS = (1, 2, 3, 4, 5)


@dataclass
class ExperimentConfig:
    jobs: int = 2  # runs side by side, one thread each


def seeds() -> dict:
    """The main job; thinking and plain models of two layers and one with three times the rows a step; five seeds."""
    kinds = {"thinking": CHAIN, "plain": PLAIN, "plain, short rows first": [*PLAIN, "--curriculum=true"]}
    main_job = {"the main job": {f"main_{s}": ["config/chain.toml", "--plain=", f"--seed={s}"] for s in SEEDS}}
    return main_job | {  # {row of the table: {run: options}}, as in every set
        f"{kind}, {layers} layer{'s' * (layers > 1)}": {f"{i}_{layers}_{s}": [*options, f"--n_layer={layers}", f"--seed={s}"] for s in SEEDS}
        for i, (kind, options) in enumerate(kinds.items())
        for layers in (2, 1)
    }


def ablations() -> dict:
    """One thing changed at a time: what thoughts learn while they are free, one layer, 800 steps, five seeds."""
    changes = {
        "default": [],
        "thoughts learned by REINFORCE": ["--thought_grad=reinforce"],
        "no forgetting": ["--forget=0", "--forget_paid=0"],
        "no curriculum": ["--curriculum=false"],
        "words charged only where spoken": ["--charge_thinking=0"],
        "no imitation": ["--imitate=0"],
        "one token a character": ["--data=out/data/characters"],
        "one token a character, thoughts after digits only": ["--data=out/data/characters_digits"],
    }
    base = [*CHAIN, "--n_layer=1", "--steps=800", "--free=1"]
    return {row: {f"{i}_{s}": [*base, *options, f"--seed={s}"] for s in SEEDS} for i, (row, options) in enumerate(changes.items())}


def prices() -> dict:
    """The think cost, one layer, five seeds."""
    return {
        f"price {price}": {f"{price}_{s}": [*CHAIN, "--n_layer=1", f"--think_cost={price}", f"--seed={s}"] for s in SEEDS}
        for price in (0.0, 0.05, 0.5, 0.7, 1.0)
    }


def moduli() -> dict:
    """Larger numbers, one layer, five seeds."""
    return {f"modulo {m}": {f"{m}_{s}": ["config/large_modulus.toml", f"--data=out/data/mod{m}", f"--seed={s}"] for s in SEEDS} for m in (7, 10)}


def addition() -> dict:
    """Plain multi-digit addition to five digits, and the control: reversed, to three, which needs no thoughts. Two layers; three seeds, and one."""
    forwards, backwards = ["config/addition.toml", "--data=out/data/addition_forwards"], ["--data=out/data/addition_reversed", "--steps=3000"]
    thinking = ["config/addition.toml", *backwards, "--think_cost=0.1"]
    rows = {
        "plain": [*forwards, "--n_bits=0"],
        "thinking, half of the rows forget": forwards,
        "reversed, plain": ["config/plain.toml", MANY, *backwards, "--n_layer=2", "--curriculum=true", "--report=true"],
        "reversed, thinking first free, then paid": [*thinking, "--explore=0.05"],
        "reversed, thinking paid from the start": [*thinking, "--curriculum=false", "--free=0", "--gate_init=0.5", "--rollouts=2"],
    }
    return {row: {f"{i}_{s}": [*options, f"--seed={s}"] for s in SEEDS[: 3 if i < 2 else 1]} for i, (row, options) in enumerate(rows.items())}


def shakespeare() -> dict:
    """Characters of a text: plain, thinking at two prices, and notes that outlive forgetting; three seeds, or one."""
    beside = {s: f"--plain=out/shakespeare/plain_{s}" for s in SEEDS[:3]}
    notes = {s: ["config/shakespeare_notes.toml", f"--seed={s}", beside[s]] for s in SEEDS[:3]}
    dear = ["--think_cost=0.1", "--free=0.5", "--gate_init=0.9", "--gate_lr=0.01"]
    more = ["--steps=1000", "--lr=5e-4", "--hold=0.1"]
    return {  # in this order, since some begin with the weights of others
        "plain": {f"plain_{s}": ["config/shakespeare_plain.toml", f"--seed={s}", "--report=true"] for s in SEEDS[:3]},
        "notes": {f"notes_{s}": [*options, f"--init_from=out/shakespeare/plain_{s}"] for s, options in notes.items()},
        "thinking": {f"thinking_{s}": ["config/shakespeare.toml", f"--seed={s}", beside[s]] for s in SEEDS[:3]},
        "thinking, price 0.1": {"dear_1": ["config/shakespeare.toml", *dear, "--seed=1", beside[1]]},
        "plain, 6,000 steps": {"long_1": ["config/shakespeare_plain.toml", "--steps=6000", "--seed=1", "--report=true"]},
        "notes, 1,000 steps more": {f"more_{s}": [*options, *more, f"--init_from=out/shakespeare/notes_{s}"] for s, options in notes.items()},
    }


def observer_text() -> dict:
    """The observer head on a text: a plain model, and thoughts added to it; five seeds."""
    options, begin = ["--observer=quarters", "--horizon=1", "--report=true"], "--init_from=out/observer_text/plain_"
    more = ["config/shakespeare_plain.toml", "--steps=800"]
    thinking = ["config/shakespeare.toml", "--steps=800", "--free=0.5", "--explore=0.05"]
    return {
        "plain": {f"plain_{s}": ["config/shakespeare_plain.toml", *options, f"--seed={s}"] for s in SEEDS},
        "plain, 800 steps more": {f"longer_{s}": [*more, *options, f"{begin}{s}", f"--seed={s}"] for s in SEEDS},
        "thoughts added, 800 steps": {f"thinking_{s}": [*thinking, *options, f"{begin}{s}", f"--plain=out/observer_text/longer_{s}", f"--seed={s}"] for s in SEEDS},
    }


def observer() -> dict:
    """The observer head on chains, two layers: with one, five seeds, and without, one seed."""
    kinds = {"observer, 2 layers": [], "no observer, 2 layers": ["--observer="]}
    base = ["config/observer.toml", "--report=false"]
    return {row: {f"{i}_{s}": [*base, *options, f"--seed={s}"] for s in SEEDS[: 5 if i == 0 else 1]} for i, (row, options) in enumerate(kinds.items())}


def observer_sums() -> dict:
    """The observer head of plain models that add up, two layers, five seeds: errors among rows of the trained kind."""
    base = ["config/revise.toml", "--revise=false", "--observer=quarters", "--steps=600", "--report=false"]
    return {"plain, padded additions": {f"{s}": [*base, f"--seed={s}"] for s in SEEDS}}


def recall() -> dict:
    """RECALL: a digit asked for that lies outside the window, three seeds."""
    return {"recall": {f"{s}": ["config/recall.toml", "--report=false", f"--seed={s}"] for s in SEEDS[:3]}}


def revise() -> dict:
    """REVISE: additions of five digits, sampled, by models that can take a digit back, from the start or as something added, and by models that cannot; three seeds."""
    rows, kinds = {}, {"with REVISE": [], "without": ["--revise=false"]}
    for kind, options in kinds.items():
        for steps in (1500, 2500):
            base = ["config/revise.toml", "--report=false", f"--steps={steps}", *options]
            rows[f"{kind}, {steps:,} steps"] = {f"{steps}_{len(options)}_{s}": [*base, f"--seed={s}"] for s in SEEDS[:3]}
    kinds = {"with REVISE": [], "without": ["--revise=false"], "with REVISE, half of the words corrupted": ["--corrupt=0.5"]}
    kinds["with REVISE, a wrong first guess in half of the rows"] = ["--corrupt=0", "--data=out/data/addition_guesses"]
    for name, (kind, options) in zip(("added", "longer", "half", "guesses"), kinds.items()):
        base = ["config/revise.toml", "--report=false", "--steps=1500", *options]
        rows[f"without, 1,500 steps, then {kind}, 1,500 more"] = {f"{name}_{s}": [*base, f"--init_from=out/revise/1500_1_{s}", f"--seed={s}"] for s in SEEDS[:3]}
    return rows


def demonstrations() -> dict:
    """A share of the rows says what to think where: how soon the rest is learned, and whether answers follow thoughts. One layer, 800 steps, three seeds."""
    base = [*CHAIN, "--steps=800", "--free=1", "--report=false", "--eval_every=50", "--data=out/data/demonstrated"]
    every = ["--curriculum=false"]  # who is shown thoughts of long rows needs no short ones first
    kinds = {
        "none shown, short rows first": ["--demonstrate=0"],
        "none shown, all lengths at once": ["--demonstrate=0", "--curriculum=false"],
        "1% shown": [*every, "--demonstrate=0.01"],
        "1% shown, and 10% of each batch drawn from them": [*every, "--demonstrate=0.01", "--shown_share=0.1"],
        "10% shown": [*every, "--demonstrate=0.1"],
        "100% shown": [*every, "--demonstrate=1"],
        "100% shown, imitation alone": [*every, "--demonstrate=1", "--forget=0", "--imitate=0"],
    }
    return {row: {f"{i}_{s}": [*base, *options, f"--seed={s}"] for s in SEEDS[:3]} for i, (row, options) in enumerate(kinds.items())}


def done() -> dict:
    """Up to three thoughts in a row, ended by the gate or by DONE: found, one seed, or shown that one is enough, three seeds. One layer."""
    shown = ["--data=out/data/demonstrated", "--curriculum=false", "--steps=400", "--free=1"]
    shown += ["--report=false"]
    rows = {}
    for kind, options, some in (("found", [], SEEDS[:1]), ("shown", shown, SEEDS[:3])):
        for ends, how in (("gate", []), ("DONE", ["--done=true"])):
            rows[f"{kind}, {ends} ends a run"] = {f"{kind}_{ends}_{s}": [*CHAIN, "--max_run=3", *how, *options, f"--seed={s}"] for s in some}
    return rows


SETS = {f.__name__: f for f in (seeds, ablations, prices, moduli, addition, shakespeare, observer, observer_text, observer_sums, recall, revise, demonstrations, done)}
CONTROL = ("recall", "revise", "demonstrations", "done")  # sets that control.py measures
DATA = {  # folder under out/data -> options of data/arithmetic/prepare.py; other folders have a prepare.py of their own
    "characters": ["--tokens=characters"],
    "characters_digits": ["--tokens=characters", "--think_after=0123456789"],
    "mod7": ["--modulus=7"],
    "mod10": ["--modulus=10"],
    "addition_forwards": ["--task=addition"],
    "addition_reversed": ["--task=addition", "--reversed", "--digits=3"],
    "addition_padded": ["--task=addition", "--pad"],
    "addition_guesses": ["--task=addition", "--pad", "--guesses=0.5"],
    "demonstrated": ["--demonstrate"],
}


def call(command: list[str], log: Path | None = None) -> bool:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if log:
        log.write_text(done.stdout)
    return done.returncode == 0


def prepare_data(options: list[str]) -> None:
    """Make the data that a run's options name, unless it is there."""
    folder = Path(load_config(options).data)
    if not (folder / "meta.json").exists():
        print(f"preparing {folder}", flush=True)
        script = folder / "prepare.py" if (folder / "prepare.py").exists() else "data/arithmetic/prepare.py"
        call([str(script), f"--out={folder}", *DATA.get(folder.name, [])])


def train_one(folder: Path, options: list[str]) -> None:
    if any((folder / f"{name}.json").exists() for name in ("report", "calibration", "control")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    good = call(["train.py", *options, f"--out={folder}"], folder / "log.txt")
    config = load_config(options)
    if good and config.n_think and config.report and "nats" in json.loads((folder / "report.json").read_text())["modes"]["policy"]:
        good = call(["data/shakespeare/study.py", f"--run={folder}", f"--plain={config.plain}"], folder / "study.txt")
    if good and folder.parent.name in CONTROL:
        good = call(["control.py", f"--run={folder}"], folder / "control.txt")
    elif good and (config.observer or not config.report):
        good = call(["calibrate.py", f"--run={folder}"], folder / "calibration.txt")
    print(f"{folder} {'done' if good else 'FAILED, see its log.txt'}", flush=True)


def spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    low, high, mean = min(values), max(values), sum(values) / len(values)
    return f"{mean:.{digits}f}" if low == high else f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def first_time(folder: Path, unit: str = "seconds", share: float = 0.95, up_to: int = 4) -> float | None:
    """Seconds, or steps, of training after which every validation level up to `up_to` was answered to this share."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        log = json.loads(line)
        if min((a for n, a in log.get("validation", {}).items() if int(n) <= up_to), default=0) >= share:
            return log["seconds"] if unit == "seconds" else log["step"] + 1
    return None


def measure_control(found: dict, folder: Path) -> dict[str, float | None]:
    """What control.py found, and how soon the model had learned."""
    numbers = {f"sampled, {name}": value for line in found["sampled"].values() for name, value in line.items()}
    numbers |= {f"{how}, {name}": value for how, line in found.get("recall", {}).items() for name, value in line.items()}
    numbers |= {f"{n} {'thoughts' if how == 'thoughts' else f'bounded, {how}'}": x for n, line in found.get("bounded", {}).items() for how, x in line.items()}
    if follow := found.get("follow"):
        numbers |= {f"{name} at {n}": share for n, line in follow.items() for name, share in line.items()}
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    numbers |= {n: a for n, a in last["validation"].items()} | {"seconds": last["seconds"]}
    return numbers | {f"95% at 1 to {n}, steps": first_time(folder, "steps", up_to=n) for n in (2, 4, 8)}


def measure(folder: Path) -> dict[str, float | None]:
    """All numbers of one run by the names that COLUMNS uses; lengths mean answers right at that length."""
    numbers = {}
    if (folder / "calibration.json").exists():
        numbers |= measure_observer(json.loads((folder / "calibration.json").read_text()))
    if (folder / "control.json").exists():
        numbers |= measure_control(json.loads((folder / "control.json").read_text()), folder)
    if (folder / "report.json").exists():
        numbers |= measure_report(json.loads((folder / "report.json").read_text()), folder)
    return numbers


def measure_observer(found: dict) -> dict[str, float]:
    numbers = {f"{part}, {name}": value for part in ("loss", "pays", "variance", "notes", "cost") for name, value in found.get(part, {}).items()}
    for name in ("accuracy", "observer", "probe", "largest probability", "entropy"):
        if levels := found.get("wrong"):
            numbers[f"wrong, {name}"] = sum(level[name] for level in levels.values()) / len(levels)
    numbers |= {f"{place} of {level}": worth for level, line in found.get("places", {}).items() for place, worth in line.items()}
    for part in ("blind", "steered"):
        for name, line in found.get(part, {}).items():
            numbers |= {f"{part} {name}, {what}": line[what] for what in ("score", "thoughts")}
            numbers |= {f"{part} {name}, thoughts at {n}": thoughts for n, thoughts in line["thoughts_by_level"].items()}
    return numbers


def measure_report(report: dict, folder: Path) -> dict[str, float | None]:
    policy = report["modes"].get("policy") or report["modes"]["never"]
    if "nats" in policy:
        return measure_text(report, policy, folder)
    trained = [str(n) for n in report["trained_levels"]]
    numbers = policy["accuracy"] | {"worst trained length": min(policy["accuracy"][n] for n in trained)}
    numbers |= {f"{n}, window {w}": a for w, line in report["windows"].items() for n, a in line["accuracy"].items()}
    numbers |= {f"{n}, {mode}": a for mode, line in report["modes"].items() for n, a in line["accuracy"].items()}
    numbers |= {f"thoughts at {n}": t for n, t in policy["thoughts_per_row"].items()}
    numbers |= {"nats of the value in a thought": report.get("meaning", {}).get("mutual_information")}
    if silent := report.get("meaning", {}).get("silent"):
        numbers |= {"silence behind 0": silent[0], "silence behind other values": sum(silent[1:]) / len(silent[1:])}
    return numbers | {"95% at 1 to 4, seconds": first_time(folder), "seconds": report["seconds"]}


def measure_text(report: dict, policy: dict, folder: Path) -> dict[str, float | None]:
    """The same of a run on a text: nats a token by mode, and what its notes are worth where a study was made."""
    numbers = {mode: line["nats"] for mode, line in report["modes"].items()} | {"nats": policy["nats"], "thoughts a token": policy["thoughts_per_token"]}
    numbers["seconds"] = report["seconds"]
    if "plain" in report:
        numbers |= {"plain": report["plain"]["nats"], "less than plain": report["plain"]["nats"] - policy["nats"]}
    if (folder / "study.json").exists():
        study = json.loads((folder / "study.json").read_text())["after_forgetting"]
        numbers |= {"gap, nats": study["gap_nats"], "bits it can carry": study["bits_a_note_can_carry"], "entropy, bits": study["entropy_bits"]}
        numbers |= {f"closed by {name}": share for name, share in study["closed"].items()} | {"saved behind, bits": study["bits_saved_behind"]}
    return numbers


LEARNING = ["95% at 1 to 4, seconds", "seconds"]
OBSERVER = [
    ["wrong, accuracy", *(f"wrong, {name}" for name in ("observer", "probe", "largest probability", "entropy"))],
    ["pays, share", *(f"pays, {name}" for name in ("worth", "observer", "entropy", "largest probability", "gate"))],
    [f"{place} of {n}" for n in (1, 2, 4, 8) for place in ("first", "middle", "last but one", "last")],
    [f"loss, {name}" for name in ("observer", "probe", "entropy", "largest probability")],
    [f"notes, {what} and {name}" for what in ("loss", "coming") for name in ("change", "attention", "lens", "slope")],
    [f"notes, {name}" for name in ("right, drop", "right, certain", "observer apart", "others apart", "observer entropy", "others entropy")],
    [*(f"variance, {name}" for name in ("leave_one_out", "observer", "both")), "cost, parameters", "cost, seconds"],
    [f"blind {what}, {n}" for what in ("nothing", "zeroed", "swapped", "zeroed, for the gate", "swapped, for the gate") for n in ("score", "thoughts")],
    [f"steered {price}, {n}" for price in (-10.0, 0.0, 0.05, 0.1, 0.2, 0.5) for n in ("score", "thoughts")],
]
COLUMNS = {  # the tables of each set
    "seeds": [
        ["worst trained length", "8", "12", "128", "128, window 8", "128, window 16", "1024, window 8", *LEARNING],
        ["8", "8, never", "8, random", "8, constant", "8, swapped", "nats of the value in a thought", "thoughts at 1", "thoughts at 4", "thoughts at 8"],
    ],
    "ablations": [["2", "4", "8", "128, window 8", "8, swapped", "nats of the value in a thought", *LEARNING]],
    "prices": [["1", "2", "4", "8", "128, window 8", "8, never", *(f"thoughts at {n}" for n in (1, 2, 4, 8)), "silence behind 0", "silence behind other values"]],
    "moduli": [["worst trained length", "8", "12", "128, window 8", "1024, window 8", "8, never", "8, swapped", "thoughts at 8", *LEARNING]],
    "shakespeare": [
        ["nats", "less than plain", "never", "random", "constant", "swapped", "scattered", "thoughts a token", "seconds"],
        ["gap, nats", "closed by note", "closed by note, goes on thinking", "closed by note swapped with another window's", "closed by note random", "closed by note constant", "bits it can carry", "entropy, bits", "saved behind, bits"],
    ],
    "observer": OBSERVER,
    "observer_text": [["nats", "less than plain", "never", "random", "scattered", "thoughts a token", "seconds"], *OBSERVER],
    "observer_sums": OBSERVER,
    "recall": [[f"{how}, {what}" for how in ("policy", "never", "always", "scattered") for what in ("accuracy", "at the question", "elsewhere", "cost")]],
    "revise": [["5", *(f"sampled, {x}" for x in ("forbidden", "allowed", "errors gone", "false revisions", "caught", "taken back a row")), "seconds"]],
    "demonstrations": [["2", "4", "8", *(f"95% at 1 to {n}, steps" for n in (2, 4, 8)), *(f"{x} at 8" for x in ("follows", "keeps", "follows, earlier", "keeps, earlier"))]],
    "done": [["8", "8 bounded, ended", "8 bounded, full runs", "1 thoughts", "4 thoughts", "8 thoughts", "follows, earlier at 8", "seconds"]],
    "addition": [["1", "2", "3", "4", "5", "3, never", "3, swapped", "3, constant", "thoughts at 1", "thoughts at 3", "thoughts at 5", "seconds"]],
}


def table(folders: dict[str, list[Path]], columns: list[str]) -> None:
    """Print a Markdown table: a row a kind of run, its seeds' mean and range in each column."""
    print("\n| | seeds | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 2) + "|")
    for row, runs in folders.items():
        done = [numbers for f in runs if (numbers := measure(f))]
        known = [[x for numbers in done if (x := numbers.get(c)) is not None] for c in columns]
        digits = [0 if "step" in c or "seconds" in c and "cost" not in c else 1 if "thoughts at" in c or "bits" in c else 3 for c in columns]
        cells = [spread(x, d) + (f" [{len(x)} of {len(done)}]" if 0 < len(x) < len(done) else "") for x, d in zip(known, digits)]
        print(f"| {row} | {len(done)} | " + " | ".join(cells) + " |")


@contextmanager
def side_by_side(path: Path, **options):
    """-> pyplot and a pair of axes; what is drawn on them is saved."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", **options)
    yield plt, axes
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_frontier(folders: dict[str, list[Path]], path: Path) -> None:
    """Left: answers right against thoughts a row, over all trained lengths. Right: thoughts a row by length. One colour a price."""
    with side_by_side(path) as (plt, (a, b)):
        for i, (row, runs) in enumerate(folders.items()):
            colour = plt.cm.viridis(i / max(1, len(folders) - 1))
            for j, run_folder in enumerate(runs):
                report = json.loads((run_folder / "report.json").read_text())
                levels = [str(n) for n in report["trained_levels"]]
                policy = report["modes"]["policy"]
                right, thoughts = ([policy[part][n] for n in levels] for part in ("accuracy", "thoughts_per_row"))
                a.plot(sum(thoughts) / len(levels), sum(right) / len(levels), "o", color=colour, label=None if j else row)
                b.plot(report["trained_levels"], thoughts, marker="o", ms=3, color=colour)
        a.set(xlabel="thoughts a row, mean over trained lengths", ylabel="answers right", ylim=(0, 1.03), title="what thinking buys")
        a.legend(fontsize=8)
        b.set(xlabel="operations", ylabel="thoughts a row", title="where it is spent")


def draw_observer(folders: dict[str, list[Path]], path: Path) -> None:
    """Left: answers right (or nats) against thoughts, by the gate and steered by the observer at several prices. Right: what the first note foretold."""
    with side_by_side(path, width_ratios=(1, 1.3)) as (_, (a, b)):
        found = {row: [json.loads((f / "calibration.json").read_text()) for f in some if (f / "calibration.json").exists()] for row, some in folders.items()}
        for i, (row, some) in enumerate(found.items()):
            for j, one in enumerate(some):
                if steered := one.get("steered"):
                    line = [steered[price] for price in steered]
                    a.plot([x["thoughts"] for x in line], [x["score"] for x in line], ".-", color=f"C{i}", lw=0.8, label=None if j else f"{row}: steered")
                gate = one["blind"]["nothing"]
                a.plot(gate["thoughts"], gate["score"], "*", ms=11, color=f"C{i}", mec="black", label=None if j else f"{row}: its gate")
        a.set(xlabel="thoughts a row", ylabel="answers right" if "wrong" in some[0] or "places" in some[0] else "nats a token", title="steered by the observer, price by price")
        a.legend(fontsize=7)
        pairs = [f"{what} and {name}" for what in ("loss", "coming") for name in ("change", "attention", "lens", "slope")]
        for i, (row, some) in enumerate(found.items()):
            values = [[one["notes"][pair] for pair in pairs] for one in some if "notes" in one]
            for j, one in enumerate(values):
                b.plot(one, range(len(pairs)), "o", color=f"C{i}", alpha=0.6, label=None if j else row)
        b.axvline(0, color="0.5", lw=0.8)
        b.set_yticks(range(len(pairs)), pairs)
        b.set(xlim=(-1, 1), xlabel="rank correlation, one dot a seed", title="confusion and the middle layers")
        b.legend(fontsize=7)


def draw_learning(folders: dict[str, list[Path]], path: Path) -> None:
    """Answers right on validation rows against steps: left at four operations, right at eight. One colour a kind of run, one line a seed."""
    with side_by_side(path, sharey=True) as (_, axes):
        for level, axis in zip(("4", "8"), axes):
            for i, (row, runs) in enumerate(folders.items()):
                for j, folder in enumerate(runs):
                    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                    points = [(log["step"] + 1, log["validation"][level]) for log in logs if "validation" in log]
                    axis.plot(*zip(*points), color=f"C{i}", lw=1, label=None if j else row)
            axis.set(xlabel="step", title=f"{level} operations")
        axes[0].set(ylabel="answers right", ylim=(0, 1.03))
        axes[0].legend(fontsize=7)


def main(argv: list[str]) -> None:
    config = load_config([a for a in argv if a.startswith("--")], ExperimentConfig)
    names = [a for a in argv if not a.startswith("--")]
    if not names or any(name not in SETS for name in names):
        raise DataError("name one or more of: " + "; ".join(f"{name} ({f.__doc__.strip()})" for name, f in SETS.items()))
    for name in names:
        rows = SETS[name]()
        runs = [(Path("out") / name / run_name, options) for row in rows.values() for run_name, options in row.items()]
        for _, options in runs:
            prepare_data(options)
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda one: train_one(*one), runs))
        folders = {row: [Path("out") / name / run_name for run_name in some] for row, some in rows.items()}
        for columns in COLUMNS[name]:
            table(folders, columns)
        if name == "prices":
            draw_frontier(folders, Path("out") / name / "frontier.png")
        if name == "demonstrations":
            draw_learning(folders, Path("out") / name / "learning.png")
        if name.startswith("observer"):
            draw_observer(folders, Path("out") / name / "observer.png")


if __name__ == "__main__":
    run(main, "experiments.py")
