"""
A fault campaign: a run that is killed, has no room left on its disk, or finds its files damaged.

  python lab/faults.py --kills=200 --preparations=100 --full=100 --damages=1000

A small run gets SIGKILL, SIGTERM or SIGINT at a random moment of training, validation or saving,
and is then resumed until it is through. The same with files that may not grow beyond a random size.
The preparation of data is killed in a folder that holds other data. Of each file a run reads one
bit is flipped, or its end is cut off.

Counted, and all should be 0:
  lost        runs that lost more steps than lie between two checkpoints; asked to stop: any
  changed     runs whose last weights are not, bit for bit, those of an uninterrupted one
  tracebacks  runs that ended in one
  unnoticed   damaged files, or mixtures of two preparations, that were read as if they were sound

Not here: bad values and prompts (fuzz.py). Needs fork, so not for Windows.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data.arithmetic import prepare
from data.dataset import DataError, load_meta, load_split, load_vocabulary
from options import load_config, option, run
from runs import load_checkpoint, same

STEPS, EVERY = 60, 7  # of a run, and between two of its checkpoints
RUN = f"--steps={STEPS} --eval_every={EVERY} --eval_rows=10 --batch_tokens=256"
SMALL = "--n_embd=16 --n_head=2 --threads=1 --report=false"
DATA = ["--modulus=3", "--levels=3", "--rows=300"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class FaultsConfig:
    kills: int = option(200, "runs that are sent a signal", 0)
    preparations: int = option(100, "preparations of data that are killed", 0)
    full: int = option(100, "runs whose disk is full", 0)
    damages: int = option(1000, "damaged files", 0)
    seed: int = option(1, "of all moments and places", 0)


# ----------------------------------------------------------------------------------------------
# processes

steps_done = multiprocessing.Value("l", 0)  # by the child that trains


def start(entry, argv: list[str], log: Path, room: int = 0) -> int:
    """Fork a process that calls `entry` as a command would -> its number. room: bytes a file."""
    if pid := os.fork():
        return pid
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        sys.argv = ["program", *argv]
        run(entry, "program")
    except SystemExit as end:
        print(end, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def training(folder: Path, data: Path, log: Path, resume: bool, room: int = 0) -> int:
    argv = [*RUN.split(), *SMALL.split(), f"--data={data}", f"--out={folder}"]
    return start(train.main, [*argv, "--resume=true"] if resume else argv, log, room)


def saved(folder: Path) -> int:
    """Steps that a checkpoint holds; 0 without one."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    return load_checkpoint(folder)["progress"]["step"]


# ----------------------------------------------------------------------------------------------
# the campaigns: each adds to `found`


def stopped_runs(count: int, stop, base: Path, data: Path, draw, found: Counter) -> None:
    """stop(folder, log, data, draw) -> steps that a run may lose. Then it is resumed, or begun."""
    log = base / "log.txt"
    for _ in range(count):
        folder = base / "run"
        shutil.rmtree(folder, ignore_errors=True)
        steps_done.value = 0
        may_lose = stop(folder, log, data, draw)
        found["lost"] += steps_done.value - saved(folder) > may_lose
        found["tracebacks"] += "Traceback" in log.read_text()
        if saved(folder) < saved(base / "whole"):
            os.waitpid(training(folder, data, log, saved(folder) > 0), 0)
            found["tracebacks"] += "Traceback" in log.read_text()
        ends = [load_checkpoint(f)["model"] for f in (folder, base / "whole")]
        found["changed"] += not same(*ends)


def kill(folder: Path, log: Path, data: Path, draw, seconds: float) -> int:
    pid, number = training(folder, data, log, False), draw.choice(SIGNALS)
    time.sleep(draw.uniform(0, seconds))
    os.kill(pid, number)
    os.waitpid(pid, 0)
    return EVERY if number == signal.SIGKILL else 0


def fill(folder: Path, log: Path, data: Path, draw, size: int) -> int:
    room = draw.randint(8192, size)  # enough for what it prints
    os.waitpid(training(folder, data, log, False, room), 0)
    return STEPS  # nothing can be saved


def preparations(count: int, base: Path, draw, found: Counter) -> None:
    """New data over old ones, killed midway: the old ones, the new ones, or a refusal."""
    homes = {name: base / name for name in ("old", "new")}
    for seed, home in enumerate(homes.values()):
        prepare.main([*DATA, f"--seed={seed}", f"--out={home}"])
    began = time.monotonic()
    prepare.main([*DATA, "--seed=1", f"--out={base / 'timed'}"])
    seconds = time.monotonic() - began
    whole = [content(home) for home in homes.values()]
    for _ in range(count):
        shutil.rmtree(base / "mixed", ignore_errors=True)
        shutil.copytree(homes["old"], base / "mixed")
        argv = [*DATA, "--seed=1", f"--out={base / 'mixed'}"]
        pid = start(prepare.main, argv, base / "log.txt")
        time.sleep(draw.uniform(0, 1.2 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            found["unnoticed"] += not any(same(content(base / "mixed"), one) for one in whole)
        except DataError:
            found["refused"] += 1


def content(folder: Path) -> list:
    """All that train.py would read of a data folder. Raises DataError."""
    vocabulary = load_vocabulary(load_meta(folder))
    splits = [load_split(folder, name, vocabulary, 8) for name in ("train", "val", "test")]
    return [vocabulary.meta] + [rows.all.real for rows in splits]


def damages(count: int, base: Path, data: Path, draw, found: Counter) -> None:
    """Of all files in turn: one bit is flipped, or the end is cut off."""
    names = ("meta.json", "train.bin", "val.bin", "test.bin")
    files = [(base / "whole" / "checkpoint.pt", load_checkpoint)]
    files = [*files, *((data / name, content) for name in names)]
    sound_files = [(path, read, path.read_bytes(), read(path.parent)) for path, read in files]
    for i in range(count):
        path, read, sound, before = sound_files[i % len(files)]
        at, damaged = draw.randrange(len(sound)), bytearray(sound)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged if draw.random() < 0.7 else sound[:at])
        try:
            found["unnoticed"] += not same(read(path.parent), before)
        except DataError:
            found["refused"] += 1
        except Exception:
            found["tracebacks"] += 1
            traceback.print_exc()
        path.write_bytes(sound)


def main(argv: list[str]) -> None:
    config = load_config(argv, FaultsConfig)
    torch.set_num_threads(1)
    step = train.Trainer.train_step

    def counted(trainer) -> dict:
        log = step(trainer)
        steps_done.value = trainer.step
        return log

    train.Trainer.train_step = counted
    draw, bad = random.Random(config.seed), 0
    with tempfile.TemporaryDirectory() as home:
        base, data = Path(home), Path(home) / "data"
        prepare.main([*DATA, f"--out={data}"])
        began = time.monotonic()
        os.waitpid(training(base / "whole", data, base / "log.txt", False), 0)
        seconds, size = time.monotonic() - began, (base / "whole/checkpoint.pt").stat().st_size
        killed, filled = partial(kill, seconds=seconds), partial(fill, size=size)
        campaigns = {
            "killed": (config.kills, partial(stopped_runs, stop=killed, data=data)),
            "disk full": (config.full, partial(stopped_runs, stop=filled, data=data)),
            "preparation killed": (config.preparations, preparations),
            "file damaged": (config.damages, partial(damages, data=data)),
        }
        for name, (count, campaign) in campaigns.items():
            found = Counter(lost=0, changed=0, tracebacks=0, unnoticed=0)
            campaign(count, base=base, draw=draw, found=found)
            bad += sum(found.values()) - found["refused"]
            counts = ", ".join(f"{number} {what}" for what, number in found.items())
            print(f"{name}: {count} times; {counts}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    run(main, "faults.py")
