"""
The runs behind the tables: data, training, instruments, and one table a set.

  python lab/experiments.py main --seeds=1,2,3 --jobs=2
  python lab/experiments.py automata --tasks=parity,a5 --models=thinking,gru

Sets: main, chains, automata, text, keyhole, silent, parts, mixed, control, demonstrations,
observer, addition. A run lives in out/SET/TASK/MODEL_SEED and is skipped where its report.json is
there; with --jobs=0 nothing runs, and the table is of what there is. `finger` is a thinking model
taught by lab/variants/finger.py. A run takes one thread: a minute in main and chains, one to three
a thinking one of automata (others less), five to fifteen in text, keyhole, silent, parts and mixed.

Not here: the numbers themselves (report, study, where, parts, control, calibrate).
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.dataset import DataError
from options import load_config, option, run

OUT = Path("out")


@dataclass
class ExperimentsConfig:
    tasks: str = option("", "names, with commas; all by default")
    models: str = option("", "names, with commas; all by default")
    seeds: str = option("1", "numbers, with commas")
    jobs: int = option(2, "runs side by side", 0)


# ----------------------------------------------------------------------------------------------
# data: {task: what makes it}, written to out/data/TASK

CHAINS, REGULAR = "data/arithmetic/prepare.py", "data/automata/prepare.py"
RANDOM = f"{REGULAR} --task=random --letters=3"
AUTOMATA = {
    "parity": f"{REGULAR} --task=parity",
    "even_pairs": f"{REGULAR} --task=even_pairs",
    "cycle": f"{REGULAR} --task=cycle",
    "modular": f"{REGULAR} --task=modular",
    "s3": f"{REGULAR} --task=s3",
    "counter8": f"{REGULAR} --task=counter --states=8",
    "random5": f"{RANDOM} --states=5 --automaton=2",
    "random5_bit": f"{RANDOM} --states=5 --automaton=2 --answer=accept",
    "random6_bit": f"{REGULAR} --task=random --letters=4 --states=6 --answer=accept",
    "random10_bit": f"{RANDOM} --states=10 --automaton=5 --answer=accept",
    "random12": f"{REGULAR} --task=random --letters=4 --states=12 --automaton=4",
    "permutations8": f"{RANDOM} --states=8 --permutations --automaton=7",
    "permutations12": f"{RANDOM} --states=12 --permutations --automaton=3",
    "permutations24": f"{RANDOM} --states=24 --permutations --automaton=7",
    "a5": f"{REGULAR} --task=a5 --generators",
    "s5": f"{REGULAR} --task=s5 --generators",
}
DATA = AUTOMATA | {
    "chains": CHAINS,
    "modulo_7": f"{CHAINS} --modulus=7",
    "modulo_10": f"{CHAINS} --modulus=10",
    "characters": f"{CHAINS} --tokens=characters",
    "chains_shown": f"{CHAINS} --demonstrate",
    "addition": f"{CHAINS} --task=addition",
    "addition_padded": f"{CHAINS} --task=addition --pad",
    "addition_reversed": f"{CHAINS} --task=addition --reversed --digits=3",
    "silent": f"{CHAINS} --width=16 --think_after==",
    "parts": f"{CHAINS} --width=6 --parts=3 --levels=12 --think_after=;=",
    "primer": "data/mixed/prepare.py --primer",
    "mixed": "data/mixed/prepare.py",
    "recall": "data/recall/prepare.py",
    "text": "data/shakespeare/prepare.py",
}

# ----------------------------------------------------------------------------------------------
# sets: {(task, model): training && instruments}; {plain} is the plain run of the same task and
# seed, and as deep, {primer} the run of the same model and seed in the task primer

MAIN = {
    "thinking": "train.py config/chain.toml",
    "pause": "lab/variants/pause.py config/chain.toml",
    "plain": "train.py config/plain.toml --report=true",
}
ONE = "config/automata.toml"  # one configuration, all automata
LESS = f"{ONE} --steps=2500"  # what never learns would take all steps
PLAIN = f"train.py {LESS} --n_bits=0 --curriculum=false"
MODELS = {
    "thinking": f"train.py {ONE}",
    "plain_1": PLAIN,
    "plain_2": f"{PLAIN} --n_layer=2",
    "plain_4": f"{PLAIN} --n_layer=4",
    "pause": f"lab/variants/pause.py {LESS}",
    "softmax": f"lab/variants/softmax.py {LESS} --n_bits=6",
    "gru": f"lab/variants/gru.py {ONE}",
}
REVISE, ADDITION = "train.py config/revise.toml", "train.py config/addition.toml"
BACKWARDS = f"{ADDITION} --forget=0.9 --steps=3000"
FREE = "train.py config/chain.toml --think_cost=0"
AT_ONCE = f"{FREE} --curriculum=false"
OTHER_CHAINS = ("modulo_7", "modulo_10", "characters")
KEYHOLE = "config/keyhole.toml"
LOOKS = {
    "thinking": f"train.py {KEYHOLE}",
    "pause": f"lab/variants/pause.py {KEYHOLE}",
    "plain": f"train.py {KEYHOLE} --n_bits=0",
}
DEPTHS = {"": "", "_two_layers": " --n_layer=2"}
LITTLE = "--steps=4000 --batch_tokens=1024"  # what never learns would take hours
SILENT = {
    "finger": "lab/variants/finger.py config/silent.toml",
    "no_finger": f"train.py config/silent.toml {LITTLE}",
    "pause": f"lab/variants/pause.py config/silent.toml {LITTLE}",
    "plain": "train.py config/silent.toml --n_bits=0",
}
PRIMER = "config/chain.toml --n_embd=128 --weight_decay=0.5"
MIXED = "config/mixed.toml --init_from="
SUMS = f"{MIXED}{{primer}} && lab/where.py --plain={{plain}}"
PROSE = {
    ("primer", "thinking"): f"train.py {PRIMER}",
    ("primer", "pause"): f"lab/variants/pause.py {PRIMER}",
    ("mixed", "plain"): f"train.py {MIXED} --n_bits=0 --rise=100",  # which is better for it
    ("mixed", "thinking"): f"train.py {SUMS}",
    ("mixed", "pause"): f"lab/variants/pause.py {SUMS}",
}
NOTES = "train.py config/shakespeare_notes.toml --init_from={plain} --plain={plain}"
SETS = {
    "main": {("chains", model): words for model, words in MAIN.items()},
    "chains": {(task, "thinking"): MAIN["thinking"] for task in OTHER_CHAINS},
    "automata": {(task, model): words for task in AUTOMATA for model, words in MODELS.items()},
    "text": {
        ("text", "plain"): "train.py config/shakespeare_plain.toml --report=true",
        ("text", "thinking"): "train.py config/shakespeare.toml --plain={plain}",
        ("text", "notes"): f"{NOTES} && lab/study.py --plain={{plain}}",
        ("text", "notes_12"): f"{NOTES} --n_bits=12 && lab/study.py --plain={{plain}}",
        ("text", "notes_16"): f"{NOTES} --n_bits=16 && lab/study.py --plain={{plain}}",
    },
    "keyhole": {
        ("text", f"{kind}_{window}{depth}"): f"{words} --window={window}{layers}"
        for depth, layers in DEPTHS.items()
        for kind, words in LOOKS.items()
        for window in (2, 4, 8)
    }
    | {
        ("text", f"plain_all{depth}"): f"{LOOKS['plain']} --window=0{layers}"
        for depth, layers in DEPTHS.items()
    }
    | {("text", "gru"): f"lab/variants/gru.py {KEYHOLE} --n_embd=180"},
    "silent": {
        ("silent", f"{kind}{depth}"): f"{words}{layers}"
        for depth, layers in DEPTHS.items()
        for kind, words in SILENT.items()
    },
    "parts": {
        ("parts", kind): words.replace("silent", "parts") + " && lab/parts.py" * (kind != "plain")
        for kind, words in SILENT.items()
    },
    "mixed": {
        (task, f"{kind}{depth}"): words.replace(".toml", f".toml{layers}")
        for depth, layers in DEPTHS.items()
        for (task, kind), words in PROSE.items()
    },
    "control": {
        ("recall", "recall"): "train.py config/recall.toml && lab/control.py",
        ("addition_padded", "revise"): f"{REVISE} && lab/control.py",
        ("addition_padded", "no_revise"): f"{REVISE} --revise=0",
    },
    "demonstrations": {
        ("chains_shown", "shown"): f"{AT_ONCE} && lab/control.py",
        ("chains", "found"): f"{FREE} && lab/control.py",
        ("chains", "neither"): AT_ONCE,
    },
    "observer": {
        ("chains", "observer"): "train.py config/observer.toml && lab/calibrate.py",
        ("chains", "no_observer"): "train.py config/observer.toml --observer=",
    },
    "addition": {
        ("addition", "plain"): f"{ADDITION} --n_bits=0",
        ("addition", "thinking"): ADDITION,
        ("addition_reversed", "plain"): f"{BACKWARDS} --n_bits=0",
        ("addition_reversed", "thinking"): f"{BACKWARDS} --think_cost=0.1",
    },
}

# ----------------------------------------------------------------------------------------------
# tables: {heading: where the number is}, see `measure`; of several places the first that is there

ABLATED = ("never", "random", "constant", "swapped")
ABLATIONS = {mode: f"report/modes/{mode}/accuracy/{{last}}" for mode in ABLATED}
ROWS = {"worst trained length": "worst", "longest trained": "own/accuracy/{last}"}
WINDOW, OWN = "report/windows/8/accuracy/", "own/accuracy/"
NATS = {mode: f"report/modes/{mode}/nats" for mode in ABLATED}
LOSS, VALUE = "calibration/predicted_loss/", "calibration/value_of_thinking/"
CHAIN_COLUMNS = {
    **ROWS,
    "12, all in view": f"{OWN}12",
    "128, window 8": f"{WINDOW}128",
    "1024, window 8": f"{WINDOW}1024",
    **ABLATIONS,
}
TABLES = {
    "main": CHAIN_COLUMNS,
    "chains": CHAIN_COLUMNS,
    "automata": {
        **ROWS,
        "length 500, window 8": [f"{at}{n}" for n in (500, 499) for at in (WINDOW, OWN)],
        **ABLATIONS,
    },
    "text": {
        "nats a token": "own/nats",
        "plain": "report/plain/nats",
        **NATS,
        "thoughts a token": "own/thoughts_per_token",
        "closed by the note": "study/after_forgetting/closed/note",
        "closed by another note": "study/after_forgetting/closed/note swapped",
        "bits saved": "study/after_forgetting/bits_saved_behind",
    },
    "mixed": {
        "worst trained length": "worst",
        "prose, nats": "where/policy/prose_nats",
        "plain": "where/plain/prose_nats",
        "sums": "where/policy/sums_right",
        **{mode: f"where/{mode}/sums_right" for mode in ABLATIONS},
        "plain, sums": "where/plain/sums_right",
        "thoughts in prose": "where/policy/thoughts_in_prose",
        "at sums": "where/policy/thoughts_at_sums",
    },
    "keyhole": {"nats a token": "own/nats", **NATS, "thoughts a token": "own/thoughts_per_token"},
    "silent": {
        **{"worst trained length": "worst", "12": "own/accuracy/12", "16": "own/accuracy/16"},
        **ABLATIONS,
        **{f"thoughts at {n}": f"own/thoughts_per_row/{n}" for n in (1, 2, 4, 6, 8, 12)},
    },
    "parts": {
        **ROWS,
        "16": "own/accuracy/16",
        **ABLATIONS,
        **{f"thoughts at {n};": f"parts/thoughts/;/{n}" for n in range(1, 7)},
        "correlation": "parts/correlation/all",
        "in one row": "parts/correlation/one_row",
    },
    "control": {
        **{f"{how}, right": f"control/recall/{how}/right" for how in ("gate", "never", "always")},
        **{f"{how}, cost": f"control/recall/{how}/cost" for how in ("gate", "never", "always")},
        "no REVISE": "control/revise/answers right, REVISE forbidden",
        "REVISE": "control/revise/answers right, REVISE allowed",
        "greedy": "own/accuracy/{last}",
    },
    "demonstrations": {
        **ROWS,
        "follows": "control/follow/{last}/follows",
        "keeps": "control/follow/{last}/keeps",
    },
    "observer": {
        **ROWS,
        "loss": f"{LOSS}predicted_loss",
        "loss by entropy": f"{LOSS}entropy",
        "cost to go": "calibration/cost_to_go/cost_to_go",
        "value": f"{VALUE}value_of_thinking/area",
        "value by gate": f"{VALUE}gate/area",
        "zeroed": "calibration/blinded/zeroed/score",
    },
    "addition": {str(n): f"own/accuracy/{n}" for n in (1, 2, 3, 4, 5)} | ABLATIONS,
}


def flat(tree, path: str = "") -> dict[str, float]:
    """{"a": {"b": 1}} -> {"a/b": 1}, numbers only."""
    if isinstance(tree, dict):
        parts = [flat(part, f"{path}/{name}") for name, part in tree.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {path.removeprefix("/"): tree} if type(tree) in (int, float) else {}


def measure(folder: Path) -> dict[str, float]:
    """
    All numbers of a run: FILE/KEY/KEY of its JSON files; under `own` those of the mode it was
    trained for; `worst`, the least accuracy of a trained level; `last`, the longest of those.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    report = found["report"]
    modes, trained = report["modes"], [str(level) for level in report["trained_levels"]]
    own = modes.get("policy") or modes.pop("never")  # a plain model has no ablations
    numbers = flat(found) | flat({"own": own}) | {"last": int(trained[-1])}
    if "accuracy" in own:
        numbers["worst"] = min(own["accuracy"][level] for level in trained)
    return numbers


def row(folder: Path, columns: dict) -> list[str]:
    """The cells of a run: as many as there are columns, and the seconds it took."""
    numbers, cells = measure(folder), []
    for places in columns.values():
        places = [places] if isinstance(places, str) else places
        places = [place.format(last=numbers["last"]) for place in places]
        known = [numbers[place] for place in places if place in numbers]
        cells.append(f"{known[0]:.3f}" if known else "-")
    return [*cells, f"{numbers['report/seconds']:.0f}"]


def span(cells: list[str]) -> str:
    """Cells of one column -> the least and the largest."""
    values = sorted(set(cells) - {"-"}, key=float)
    return " to ".join(dict.fromkeys([values[0], values[-1]])) if values else "-"


def table(name: str, runs: list[tuple[str, str, str]]) -> None:
    """
    Print a Markdown table: a line for each (task, model, seed) that has a report; and behind those
    of several seeds one more, from their least to their largest numbers.
    """
    heads, seeds = ["task", "model", "seed", *TABLES[name], "seconds"], {}
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for task, model, seed in runs:
        folder = ROOT / OUT / name / task / f"{model}_{seed}"
        if (folder / "report.json").exists():
            seeds.setdefault((task, model), {})[seed] = row(folder, TABLES[name])
    for job, rows in seeds.items():
        if len(rows) > 1:
            rows[f"{len(rows)} seeds"] = [span(column) for column in zip(*rows.values())]
        for seed, cells in rows.items():
            print(f"| {' | '.join([*job, seed, *cells])} |")


# ----------------------------------------------------------------------------------------------
# the runner


def call(words: list[str], log: Path) -> bool:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        command, places = [sys.executable, *words], {"stdout": file, "stderr": file}
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, **places)
    if done.returncode:
        print(f"{' '.join(words)} failed: see {log}", flush=True)
    return done.returncode == 0


def make(task: str) -> None:
    folder = ROOT / OUT / "data" / task
    if not (folder / "meta.json").exists():
        call([*DATA[task].split(), f"--out={folder}"], folder.with_suffix(".log"))


def commands(name: str, task: str, model: str, seed: str) -> list[list[str]]:
    """Training, then the instruments, of one run."""
    home = OUT / name / task
    plain = "plain_two_layers" if model.endswith("_two_layers") else "plain"
    primer = OUT / name / "primer" / f"{model}_{seed}"
    others = {"plain": home / f"{plain}_{seed}", "primer": primer}
    training, *after = SETS[name][task, model].format(**others).split(" && ")
    own = [f"--data={OUT / 'data' / task}", f"--out={home / f'{model}_{seed}'}", f"--seed={seed}"]
    instruments = [[*words.split(), f"--run={home / f'{model}_{seed}'}"] for words in after]
    return [[*training.split(), *own, "--threads=1"], *instruments]


def run_one(name: str, job: tuple[str, str, str]) -> None:
    task, model, seed = job
    folder = ROOT / OUT / name / task / f"{model}_{seed}"
    if not (folder / "report.json").exists():
        log = folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        all(call(words, log) for words in commands(name, *job))  # to the first that fails


def chosen(text: str, names: list[str]) -> list[str]:
    """Those of the names that the text has, with commas; "": all. Raises DataError."""
    wanted = text.split(",") if text else names
    if unknown := [name for name in wanted if name not in names]:
        raise DataError(f"{unknown[0]} is none of {', '.join(names)}")
    return wanted


def main(argv: list[str]) -> None:
    config = load_config([word for word in argv if word.startswith("-")], ExperimentsConfig)
    names = [word for word in argv if not word.startswith("-")]
    if not names:
        raise DataError(f"name one of the sets: {', '.join(SETS)}")
    for name in chosen(",".join(names), list(SETS)):
        tasks = chosen(config.tasks, list(dict.fromkeys(task for task, _ in SETS[name])))
        models = chosen(config.models, list(dict.fromkeys(model for _, model in SETS[name])))
        asked = [job for job in SETS[name] if job[0] in tasks and job[1] in models]
        runs = [(*job, seed) for job in asked for seed in config.seeds.split(",")]
        if config.jobs:
            for task in tasks:
                make(task)
            first = [job for job in runs if "{" not in SETS[name][job[:2]]]
            for some in (first, [job for job in runs if job not in first]):
                with ThreadPoolExecutor(config.jobs) as pool:
                    list(pool.map(partial(run_one, name), some))
        table(name, runs)


if __name__ == "__main__":
    run(main, "experiments.py")
