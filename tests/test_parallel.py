"""More than one process: what two do with half of the rows each is what one does with all, and the death of one leaves something to go on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call

from runs import load_checkpoint

SMALL = "--n_layer=1 --n_embd=32 --n_bits=3 --warmup=2 --device=cpu --log_every=1".split()
SMALL += ["--eval_rows=10", "--report=false"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]


def start(*arguments):
    """train.py in two processes, in the background."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *SMALL, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_saved(process, folder):
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


def workers(process):
    """The two processes that torchrun started -> their ids."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [int(pid) for pid, parent, command in rows if int(parent) == process.pid and "train.py" in command]


FREE_AND_PAID = ["--steps=12", "--free=0.4", "--rollouts=2"]
CHANGES = [  # thoughts cost from step 6 on; or in the last two steps, with all levels in use then
    ["--observer=0", "--baseline=both", "--explore=0.1", "--curriculum=false"],
    ["--recall=true", "--window=6", "--revise=true", "--done=true", "--max_run=2"],
]


@pytest.mark.parametrize("changes", CHANGES)
def test_two_processes_learn_what_one_learns_with_twice_the_batch(chains, tmp_path, changes):
    arguments = [f"--data={chains}", *FREE_AND_PAID, *changes]
    process = start(*arguments, "--batch_tokens=105", f"--out={tmp_path / 'two'}")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    call("train.py", *SMALL, *arguments, "--batch_tokens=210", f"--out={tmp_path / 'one'}", check=True)
    one, two = (load_checkpoint(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=1e-5)
    assert two["curriculum"] == one["curriculum"] and one["curriculum"]["right"] > 0
    assert one["progress"]["paid"] and all(map(torch.equal, one["random"], two["random"]))

    lines, wanted = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("two", "one"))
    assert len(lines) == len(wanted) == 12, "one process writes"
    paid_from = 6 if "--curriculum=false" in changes else 10
    assert [line["paid"] for line in wanted] == [step >= paid_from for step in range(12)]
    for line, want in zip(lines, wanted):
        for name in set(want) - {"seconds", "tokens_per_second", "passes_per_column", "validation"}:
            assert line[name] == pytest.approx(want[name], abs=1e-5), name
    assert printed.count("step    11") == printed.count("saved") == 1, "one process speaks"
    assert {file.name for file in (tmp_path / "two").iterdir()} == {"checkpoint.pt", "config.json", "metrics.jsonl"}


LEFT = """
import weakref, torch, torch.distributed as dist
from runs import join, leave
join("cpu")
group = weakref.ref(dist.group.WORLD)
torch.optim.AdamW([torch.zeros(1)])  # imports what would hold on to the group
leave()
assert group() is None
"""


def test_a_group_is_gone_once_left_so_that_none_of_its_threads_can_abort_the_exit():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    left = subprocess.run([sys.executable, "-c", LEFT], cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, timeout=300)
    assert left.returncode == 0, left.stderr


@pytest.mark.skipif(not shutil.which("ps"), reason="ps finds the processes")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_a_sentence_and_a_checkpoint(chains, tmp_path, victim):
    arguments = [f"--data={chains}", "--batch_tokens=100", f"--out={tmp_path}"]
    process = start(*arguments, "--steps=100000", "--save_every=5")
    until_saved(process, tmp_path)
    os.kill(sorted(workers(process))[victim], signal.SIGKILL)
    _, message = process.communicate(timeout=300)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert process.returncode != 0 and step > 0
    assert "another process is gone" in message and f"is of step {step}" in message and "--resume=true" in message

    process = start(*arguments, f"--steps={step + 3}", "--resume=true")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.count(f"resumed {tmp_path} at step {step}") == 1
    assert load_checkpoint(tmp_path)["progress"]["step"] == step + 3


def test_ctrl_c_stops_all_at_the_same_step_and_saves(chains, tmp_path):
    process = start(f"--data={chains}", "--batch_tokens=100", f"--out={tmp_path}", "--steps=100000", "--save_every=5")
    until_saved(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=300)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert process.returncode != 0 and message.count(f"stopped at step {step} and saved; go on with: torchrun --nproc_per_node=2 train.py") == 1
