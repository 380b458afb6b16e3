"""
One configuration, all automata: data, training runs and the README's table of them.

  python lab/automata.py                                      every task and model, seed 1
  python lab/automata.py --tasks=parity,a5 --models=thinking,gru --seeds=1,2,3 --jobs=2

Runs that are there already (out/automata/TASK/MODEL_SEED/report.json) are not run again; with
--jobs=0 none is, and the table is printed of what there is. A run takes one thread: about five
minutes the thinking one, a minute or two a plain one, a quarter of a minute the GRU.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("out/automata")

RANDOM = "--task=random --letters=3"
TASKS = {
    "parity": "--task=parity",
    "even_pairs": "--task=even_pairs",
    "cycle": "--task=cycle",
    "modular": "--task=modular",
    "s3": "--task=s3",
    "counter8": "--task=counter --states=8",
    "random5": f"{RANDOM} --states=5 --automaton=2",
    "random5_bit": f"{RANDOM} --states=5 --automaton=2 --answer=accept",
    "random6_bit": "--task=random --letters=4 --states=6 --automaton=1 --answer=accept",
    "random10_bit": f"{RANDOM} --states=10 --automaton=5 --answer=accept",
    "random12": "--task=random --letters=4 --states=12 --automaton=4",
    "permutations8": f"{RANDOM} --states=8 --permutations --automaton=7",
    "permutations12": f"{RANDOM} --states=12 --permutations --automaton=3",
    "permutations24": f"{RANDOM} --states=24 --permutations --automaton=7",
    "a5": "--task=a5 --generators",
    "s5": "--task=s5 --generators",
}
PLAIN = "train.py config/automata.toml --n_bits=0 --curriculum=false --free=0"
MODELS = {
    "thinking": "train.py config/automata.toml",
    "cuts anywhere": "train.py config/automata.toml --cut_late=0 --cuts=1",
    "plain 1": PLAIN,
    "plain 2": f"{PLAIN} --n_layer=2",
    "plain 4": f"{PLAIN} --n_layer=4",
    "pause": "lab/variants/pause.py config/automata.toml",
    "softmax": "lab/variants/softmax.py config/automata.toml --n_bits=6",
    "gru": "lab/variants/gru.py config/automata.toml --steps=1500",
}
ABLATIONS = ("never", "random", "constant", "swapped")


def call(words: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        command = [sys.executable, *words]
        done = subprocess.run(command, check=False, cwd=ROOT, stdout=file, stderr=file)
    if done.returncode:
        print(f"{' '.join(words)} failed: see {log}", flush=True)


def make(task: str) -> None:
    folder = ROOT / OUT / task / "data"
    if not (folder / "meta.json").exists():
        words = ["data/automata/prepare.py", *TASKS[task].split(), f"--out={folder}"]
        call(words, folder.with_suffix(".log"))


def run(task: str, model: str, seed: int) -> None:
    folder = ROOT / OUT / task / f"{model.replace(' ', '_')}_{seed}"
    if not (folder / "report.json").exists():
        own = [f"--data={folder.parent / 'data'}", f"--out={folder}", f"--seed={seed}"]
        call([*MODELS[model].split(), *own, "--threads=1"], folder.with_suffix(".log"))


def line(task: str, model: str, seed: int) -> str | None:
    """A row of the table, or None where there is no report."""
    path = ROOT / OUT / task / f"{model.replace(' ', '_')}_{seed}" / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    trained = [str(level) for level in report["trained_levels"]]
    modes = report["modes"]
    own = (modes.get("policy") or modes["never"])["accuracy"]
    window = report.get("windows", {}).get("8", {}).get("accuracy", {})
    longest = window.get("500", own.get("500", window.get("499", own.get("499"))))
    cells = [min(own[level] for level in trained), own[trained[-1]], longest]
    cells += [modes[m]["accuracy"][trained[-1]] if m in modes else None for m in ABLATIONS]
    if model.startswith("plain"):
        cells[2:] = [longest, None, None, None, None]
    shown = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
    return f"| {task} | {model} | {seed} | {' | '.join(shown)} | {report['seconds']:.0f} |"


def chosen(text: str, names: dict) -> list[str]:
    names_wanted = text.split(",") if text else list(names)
    if unknown := set(names_wanted) - set(names):
        sys.exit(f"automata.py: {', '.join(unknown)} is none of {', '.join(names)}")
    return names_wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tasks", default="", help="names, with commas; all by default")
    parser.add_argument("--models", default="", help="names, with commas; all by default")
    parser.add_argument("--seeds", default="1", help="numbers, with commas; %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; %(default)s")
    args = parser.parse_args()
    tasks, models = chosen(args.tasks, TASKS), chosen(args.models, MODELS)
    runs = [(t, m, int(s)) for t in tasks for m in models for s in args.seeds.split(",")]
    if args.jobs:
        for task in tasks:
            make(task)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job), runs))
    heads = ["task", "model", "seed", "worst trained length", "longest trained"]
    heads += ["length 500, window 8", *ABLATIONS, "seconds"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for job in runs:
        if row := line(*job):
            print(row)


if __name__ == "__main__":
    main()
