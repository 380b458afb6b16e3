"""The loop around the loss: optimiser, resume, interruption, bad input, and the claim itself."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import AUTOMATA, ROOT, prepare, small

import runs
import train
from data.dataset import DataError, write_rows
from model import GPT, GPTConfig, Thinking, generate
from runs import same
from train import CLIP, FALL, NO_TRY, Config, Trainer, evaluate, hybrid_loss, rollout, schedule

WATCHED = {"observer": "0"}
PLAIN, NOISY = {"n_bits": 0}, {"dropout": 0.1}
EVERYTHING = WATCHED | {"recall": True, "window": 4, "revise": 0.3, "max_run": 2, "horizon": 2}


def arguments(config, **changes):
    """A config as a person types it."""
    values = dataclasses.asdict(config) | changes
    return [f"--{name}={value}" for name, value in values.items()]


# ----------------------------------------------------------------------------------------------
# the optimisers


def groups_of(trainer):
    return [group for optimiser in trainer.optimisers for group in optimiser.param_groups]


def test_the_learning_rate_rises_and_falls_at_last():
    rising = [schedule(step, 100, 0.9) for step in (0, 49, 99)]
    assert rising == pytest.approx([1 / 100, 50 / 100, 1])
    falling = [schedule(2000, 100, left) for left in (FALL, FALL / 2, 0)]
    assert falling == pytest.approx([1, 1 / 2, 0])


def test_matrices_decay_and_gates_and_observer_have_a_learning_rate_of_their_own(chains, tmp_path):
    rates = {"lr": 1e-3, "gate_lr": 7e-3, "weight_decay": 0.3}
    trainer = Trainer(small(chains, tmp_path, **EVERYTHING, **rates))
    groups = {}
    for name, parameter in trainer.model.named_parameters():
        owners = groups_of(trainer)
        owners = [g for g in owners if any(parameter is p for p in g["params"])]
        groups[name] = [(g["peak_lr"], g["weight_decay"]) for g in owners]
    assert groups.pop("blocks.0.attention.qkv.weight") == [(1e-3, 0.3)]
    assert groups.pop("blocks.0.attention.qkv.bias") == [(1e-3, 0.0)]
    assert groups.pop("thoughts.head.weight") == [(1e-3, 0.3)]
    assert groups.pop("embedding.weight") == groups.pop("norm.weight") == [(1e-3, 0.0)]
    for name, group in groups.items():
        late = "gate." in name or ".observer." in name
        assert group[0][0] == (7e-3 if late else 1e-3) and len(group) == 1, name
        assert not late or group[0][1] == 0, name


def test_a_step_has_the_learning_rate_of_the_schedule(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path, steps=200, rise=100, lr=1e-3, gate_lr=7e-3))
    for trainer.step in (0, 60, 190):
        trainer.update(sum(p.sum() for p in trainer.model.parameters()))
        share = schedule(trainer.step, 100, 1 - trainer.step / 200)
        rates = [group["lr"] for group in groups_of(trainer)]
        rate = 1e-3 * share
        assert rates == pytest.approx([rate, rate, 7 * rate, rate])


def test_gradients_are_clipped_and_those_of_gates_and_observer_apart(chains, tmp_path):
    """What one has too much of must not shrink the other."""

    def norms(scale_of_gates, scale_of_rest):
        trainer = Trainer(small(chains, tmp_path, **WATCHED))
        named = list(trainer.model.named_parameters())
        decides = ["gate." in name or ".observer." in name for name, _ in named]
        sides = [
            [p for (_, p), is_one in zip(named, decides) if is_one == s] for s in (True, False)
        ]
        scales = scale_of_gates, scale_of_rest
        trainer.update(sum(k * sum(p.sum() for p in some) for k, some in zip(scales, sides)))
        sizes = [math.sqrt(sum(p.numel() for p in some)) for some in sides]
        return [torch.cat([p.grad.flatten() for p in s]).norm().item() for s in sides], sizes

    (gates, rest), sizes = norms(100.0, 1e-3)
    assert gates == pytest.approx(CLIP, rel=1e-4)
    assert rest == pytest.approx(1e-3 * sizes[1], rel=1e-4), "small enough as it is"
    (gates, rest), sizes = norms(1e-3, 100.0)
    assert rest == pytest.approx(CLIP, rel=1e-4)
    assert gates == pytest.approx(1e-3 * sizes[0], rel=1e-4)


def test_the_rate_of_gates_rises_anew_when_thoughts_begin_to_cost(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path, steps=1000, rise=10))
    trainer.step, shares = 50, []
    for trainer.paid in (0, 1, 5, 10, 11):
        trainer.update(sum(p.sum() for p in trainer.model.parameters()))
        groups = [group for optimiser in trainer.optimisers for group in optimiser.param_groups]
        assert all(g["lr"] == g["peak_lr"] for g in groups if not g["apart"])
        shares += [g["lr"] / g["peak_lr"] for g in groups if g["apart"]]
    assert shares == pytest.approx([1, 0.1, 0.5, 1, 1])


def test_a_gate_learns_from_what_is_rare_and_large():
    """A thought that saves 10 nats, and in the next 99 steps costs .05, should be thought."""
    model = GPT(GPTConfig(vocab_size=5))
    _, adamw = model.optimisers(1e-3, 1e-3, 0.0)
    bias = model.gate.out.bias
    before = bias.item()
    for step in range(1000):
        bias.grad = torch.tensor([0.05 if step % 100 else -10.0])
        adamw.step()
    assert bias.item() > before


def test_tries_teach_the_gates_and_nothing_else(chains, tmp_path):
    """A gate that never thinks: where it decides there is a thought in tries only."""
    trainer = Trainer(small(chains, tmp_path, batch_tokens=4000))
    trainer.paid = True
    with torch.no_grad():
        trainer.model.gate.out.bias.fill_(-100.0)
    batch, plan, of = trainer.draw()
    grid, out = rollout(trainer.model, batch.real, batch.length, trainer.thinking, **plan)
    is_try, thoughts = of != NO_TRY, grid.thinks.flatten(1).sum(dim=1)
    assert torch.equal(grid.tried.flatten(1).any(dim=1), is_try) and (thoughts[is_try] == 1).all()
    assert not thoughts[of[is_try]].any()
    how = batch, of, trainer.config, True
    before = hybrid_loss(trainer.model, grid, out, *how)
    out.loss[is_try] += 3
    after = hybrid_loss(trainer.model, grid, out, *how)
    assert after["tokens"] == before["tokens"] and after["gate"] != before["gate"]


def test_thoughts_are_forced_but_where_the_gate_decides(chains, tmp_path, monkeypatch):
    how = {"forget": 0.5, "force_think_prob": 0.5, "batch_tokens": 2000}
    trainer, seen, train_loss = Trainer(small(chains, tmp_path, **how)), {}, train.hybrid_loss

    def walk(*what, cuts, **how):
        seen["cuts"], (seen["grid"], out) = cuts, rollout(*what, cuts=cuts, **how)
        return seen["grid"], out

    def add_up(model, grid, out, batch, of, *others):
        seen["tries"] = is_try = of != NO_TRY
        seen["decides"] = is_try | (torch.arange(len(of)) < is_try.sum())
        return train_loss(model, grid, out, batch, of, *others)

    monkeypatch.setattr(train, "rollout", walk)
    monkeypatch.setattr(train, "hybrid_loss", add_up)
    trainer.train_step()
    thinks, cuts = seen["grid"].thinks[:, :, 0], seen["cuts"]
    assert 0.4 < thinks.sum() / seen["grid"].present[:, :, 0].sum() < 0.6, (
        "in the warm-up by chance"
    )
    assert 10 < cuts.sum() < len(cuts) - 10 and thinks[cuts].all(), "and wherever it is cut"
    trainer.paid = True
    with torch.no_grad():
        trainer.model.gate.out.bias.fill_(-100.0)
    trainer.train_step()
    grid, decides = seen["grid"], seen["decides"]
    assert decides.sum() > 20 and not grid.thinks[decides & ~seen["tries"]].any()
    forced = ~decides
    assert torch.equal(grid.thinks[forced][:, :, 0], grid.present[forced][:, :, 0])


def test_positions_jump_only_where_thoughts_can_bridge_it(chains, tmp_path, monkeypatch):
    seen = []

    def walk(*how, jumps, **more):
        seen.append(int(jumps.max()))
        return rollout(*how, jumps=jumps, **more)

    monkeypatch.setattr(train, "rollout", walk)
    for changes in ({}, {"window": 4}):
        Trainer(small(chains, tmp_path, batch_tokens=2000, **changes)).train_step()
    learned = Trainer(small(chains, tmp_path, batch_tokens=2000))
    learned.model.position = torch.nn.Embedding(64, 32)
    learned.model.config.n_positions = 64
    learned.train_step()
    assert seen[0] > 30 and seen[1:] == [0, 0]


def test_each_step_of_each_seed_draws_a_batch_of_its_own(chains, tmp_path, monkeypatch):
    batches, draw = set(), Trainer.draw

    def note(trainer):
        batch, *more = draw(trainer)
        batches.add(str(batch.real.tolist()))
        return batch, *more

    monkeypatch.setattr(Trainer, "draw", note)
    for seed in (1, 2):
        trainer = Trainer(small(chains, tmp_path, seed=seed))
        for _ in range(3):
            trainer.train_step()
    assert len(batches) == 6


def test_a_loss_that_is_not_a_number_stops_the_run(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path))
    with torch.no_grad():
        trainer.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer.train_step()


# ----------------------------------------------------------------------------------------------
# stopping and going on


@pytest.mark.parametrize("changes", [WATCHED, PLAIN, NOISY, EVERYTHING])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    chains, tmp_path, monkeypatch, changes
):
    """Levels come at steps 4 and 8, the stop lies in between, and from step 12 thoughts cost."""

    def every_fourth_step(curriculum, *_):
        curriculum.right += 1
        if curriculum.right == 4:
            curriculum.stage, curriculum.right = min(curriculum.stage + 1, 3), 0

    monkeypatch.setattr(train, "POOL", 1)
    monkeypatch.setattr(train.Curriculum, "grow", every_fourth_step)
    config = small(chains, tmp_path, eval_rows=3, **changes)
    whole = Trainer(config)
    for _ in range(14):
        whole.train_step()
        whole.validate()  # evaluation must not draw from training's chance
    first = Trainer(config)
    for _ in range(6):
        first.train_step()
    runs.save_checkpoint(tmp_path / "checkpoint.pt", first.state())
    second = Trainer(config)
    second.load_state(runs.load_checkpoint(tmp_path))
    for _ in range(8):
        second.train_step()
    assert same(second.state(), whole.state())
    assert len(first.curriculum.levels) == 2 and whole.curriculum.learned
    assert whole.paid == (config.n_bits > 0) and not first.paid


def test_a_resumed_run_has_the_rates_that_it_is_given(chains, tmp_path):
    first = Trainer(small(chains, tmp_path))
    changed = Trainer(small(chains, tmp_path, lr=1e-4, gate_lr=3e-4, weight_decay=0.5))
    changed.load_state(first.state())
    groups = groups_of(changed)
    assert [group["peak_lr"] for group in groups] == [1e-4, 1e-4, 3e-4, 1e-4]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5, 0.0, 0.0]


def test_ctrl_c_saves_and_the_run_goes_on(chains, tmp_path, monkeypatch, capsys):
    """It stops between two steps, says how to go on, and ends as if nothing had happened."""
    config, step = small(chains, tmp_path / "cut", steps=8), Trainer.train_step
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it

    def interrupted(trainer):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 4 and saved.* --resume=true"):
        train.main(arguments(config))
    state = runs.load_checkpoint(config.out)
    assert state["progress"]["step"] == 4
    monkeypatch.setattr(Trainer, "train_step", step)
    train.main(arguments(config, resume=True))
    assert f"resumed {config.out} at step 4" in capsys.readouterr().out
    train.main(arguments(config, out=tmp_path / "whole"))
    states = [runs.load_checkpoint(tmp_path / name) for name in ("cut", "whole")]
    assert same(*(state["model"] for state in states))
    files = {file.name for file in (tmp_path / "cut").iterdir()}
    assert files == {"checkpoint.pt", "metrics.jsonl", "config.json"}
    assert signal.getsignal(signal.SIGINT) is before


def test_metrics_of_steps_that_a_resumed_run_takes_again_are_dropped(chains, tmp_path):
    config = small(chains, tmp_path, steps=6, eval_every=2)
    train.main(arguments(config))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 5]
    assert set(json.loads(lines[-1])["validation"]) == {"1", "2", "3"}, "accuracy of each level"
    trainer = Trainer(dataclasses.replace(config, resume=True, steps=9))
    state = trainer.state()
    state["progress"]["step"] = 4
    runs.save_checkpoint(tmp_path / "checkpoint.pt", state)
    train.begin(trainer)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]


def test_a_second_run_does_not_overwrite_the_first_ones_checkpoints(chains, tmp_path):
    for number in (1, 2):
        runs.save_checkpoint(tmp_path / "checkpoint.pt", {"run": number})
        train.begin(Trainer(small(chains, tmp_path)))
        kept = torch.load(tmp_path / f"checkpoint.{number}.pt", weights_only=True)
        assert kept == {"run": number}
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_write_killed_midway_leaves_the_old_one_readable(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    runs.save_checkpoint(path, {"step": 1})

    def killed(state, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


class Trap:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_saved(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    runs.save_checkpoint(path, {"weights": torch.zeros(3)})
    whole = path.read_bytes()

    def save(state, file):
        file.write(whole[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(DataError, match="is the disk full"):
        runs.save_checkpoint(path, {"weights": torch.ones(3)})
    assert path.read_bytes() == whole


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="damaged or not ours"):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "trapped").exists()


# ----------------------------------------------------------------------------------------------
# bad input


@pytest.fixture(scope="module")
def finished(chains, tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train.main(arguments(small(chains, folder, steps=2)))
    return folder


def refused(monkeypatch, *argv):
    """What train.py says, and nothing but that: one sentence, exit 1."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        train.run(train.main, "train.py")
    message = stopped.value.code  # a string: Python prints it and exits with 1
    assert message.startswith("train.py: ") and "\n" not in message
    return message


BAD = {
    "--n_layers=2": "no config key 'n_layers'; the nearest is 'n_layer'",
    "--=2": "no config key ''",
    "--steps=0": "steps = 0 is not allowed: at least 1",
    "--forget=1.5": "forget = 1.5 is not allowed: 0 to 0.9",
    "--lr=nan": "lr = 'nan' is not",
    "--lr=2": "lr = 2 is not allowed: 0 to 1",
    "--max_run=1000": "max_run = 1000 is not allowed: 1 to 64",
    "--tries=1.5": "tries = 1.5 is not allowed: 0 to 1",
    "--batch_tokens=-5": "batch_tokens = -5 is not allowed: at least 1",
    "--window=1": "window = 1 shows a cell only itself",
    "--seed=99999999999999999999": "is not allowed: 0 to 4294967296",
    "--out=": "out is empty: name a folder",
    "--think_cost=inf": "think_cost = 'inf' is not",
    "--steps=many": "steps = 'many' is not",
    "--steps=1e3": "steps = '1e3' is not",
    "--curriculum=perhaps": "curriculum = 'perhaps' is not",
    "--n_embd=30": "n_embd = 30 must split into n_head = 4 even heads",
    "--observer=1": "nor layers below the last block, 0 to 0",
    "--observer=half": "is neither quarters nor layers",
    "--device=abacus": "device = 'abacus' is not here; this machine has",
    "--data=nowhere": "cannot read nowhere/meta.json",
    "--plain=nowhere": "no checkpoint in nowhere: train first",
    "--init_from=nowhere": "no checkpoint in nowhere: train first",
    "--resume=true": "no checkpoint in",
    "none.toml": "cannot read config none.toml (No such file or directory)",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_gets_one_sentence_and_writes_nothing(chains, tmp_path, monkeypatch, argument):
    argv = arguments(small(chains, tmp_path / "out"))
    assert BAD[argument] in refused(monkeypatch, *argv, argument)
    assert not (tmp_path / "out").exists()


def test_a_config_file_that_is_no_config_is_refused_in_a_sentence(tmp_path, monkeypatch):
    for text, said in {b"steps": "is not TOML", b"setps = 3": "'steps'", b"\xff": "is not"}.items():
        (tmp_path / "bad.toml").write_bytes(text)
        assert said in refused(monkeypatch, tmp_path / "bad.toml")


def test_a_damaged_or_foreign_checkpoint_is_refused(chains, finished, tmp_path, monkeypatch):
    argv = arguments(small(chains, tmp_path, resume=True))
    whole = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "damaged or not ours" in refused(monkeypatch, *argv)
    runs.save_checkpoint(tmp_path / "checkpoint.pt", {"weights": torch.zeros(3)})
    assert "another program or version" in refused(monkeypatch, *argv)
    argv = arguments(small(chains, tmp_path / "new", init_from=tmp_path))
    assert "another program or version" in refused(monkeypatch, *argv)


def test_a_checkpoint_of_other_data_or_another_shape_is_refused(
    chains, finished, tmp_path, monkeypatch
):
    resume = small(chains, finished, resume=True)
    other = prepare(tmp_path, "--modulus=3", "--levels=2", "--rows=200", "--seed=2")
    assert other.returncode == 0
    assert "other data" in refused(monkeypatch, *arguments(resume, data=tmp_path))
    assert "another shape" in refused(monkeypatch, *arguments(resume, n_embd=64))
    assert "at step 2 already" in refused(monkeypatch, *arguments(resume, steps=2))


def test_more_demonstrated_thoughts_than_the_model_holds_are_refused(tmp_path, monkeypatch):
    meta = {"task": "copy", "vocab": list("abc=\n"), "row_end": "\n", "answer_after": "="}
    rows = [("a<think>ab</think>=a", 1), ("b<think>c</think>=b", 1)]
    write_rows(tmp_path, meta, {"train": rows, "val": rows})
    for few in ({"n_bits": 1, "max_run": 2}, {"n_bits": 2, "max_run": 1}):
        argv = arguments(small(tmp_path, tmp_path / "out", **few))
        assert "3 thoughts, up to 2 in a row: more than" in refused(monkeypatch, *argv)
    Trainer(small(tmp_path, tmp_path / "out", n_bits=2, max_run=2)).train_step()


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert not stopped.value.code
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "--" in line}
    for field in dataclasses.fields(Config):
        line = lines[f"--{field.name}"]
        assert str(field.default) in line and field.metadata["help"] in line


def test_a_config_file_and_the_command_line_after_it(tmp_path):
    (tmp_path / "my.toml").write_text("steps = 7\nlr = 0.5\nrecall = true\n")
    config = train.load_config([str(tmp_path / "my.toml"), "--lr=0.25", "--resume"], Config)
    assert config == Config(steps=7, lr=0.25, recall=True, resume=True)


def test_every_config_in_the_repository_is_one(monkeypatch):
    for path in sorted((ROOT / "config").glob("*.toml")):
        train.load_config([str(path)], Config)


SCRIPT = """
import sys
sys.path.insert(0, "{root}")
from pathlib import Path
from data.dataset import write_rows
meta = {{"task": "copy", "vocab": list("ab=\\n"), "row_end": "\\n", "answer_after": "="}}
rows = [(f"{{x}}={{x}}", 1) for x in ("a", "b", "ab", "ba")] * 20
write_rows(Path("{folder}"), meta, {{"train": rows, "val": rows}})
"""


def unmade(folder):
    """A folder that holds nothing but the script that makes its data."""
    folder.mkdir(exist_ok=True)
    (folder / "prepare.py").write_text(SCRIPT.format(folder=folder, root=ROOT))
    return folder


def test_data_are_made_when_they_are_first_needed(tmp_path, capfd):
    unmade(tmp_path)
    for said in (True, False):
        Trainer(small(tmp_path, tmp_path / "out"))
        assert ("holds no data yet" in capfd.readouterr().out) == said
    (tmp_path / "meta.json").unlink()
    (tmp_path / "prepare.py").write_text("raise SystemExit(1)")
    with pytest.raises(DataError, match="prepare.py failed"):
        Trainer(small(tmp_path, tmp_path / "out"))


# ----------------------------------------------------------------------------------------------
# several processes

TWO = """
import os, sys, torch, runs, train
seen, average = {}, runs.average_gradients

def note(model):
    average(model)
    copies = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    seen.setdefault("gradient", copies)

class Kept(train.Trainer):
    def __init__(self, config):
        super().__init__(config)
        seen["trainer"] = self

runs.average_gradients, train.Trainer = note, Kept
train.main(sys.argv[2:])
state = seen["trainer"].state()
del state["progress"]["seconds"]
torch.save({"state": state, "gradient": seen["gradient"]}, f"{sys.argv[1]}/{runs.RANK}.pt")
"""


def test_two_processes_average_their_gradients_and_end_with_the_same_weights(tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(TWO)
    phases = {"steps": 12, "curriculum": False, "warm_up": 0.5}
    config = small(unmade(tmp_path / "data"), tmp_path / "out", observer="0", **phases)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "two.py", tmp_path, *arguments(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, timeout=300, **how)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second) and first["state"]["progress"]["paid"]
    once = ("holds no data yet", "parameters", "trained in")
    assert [done.stdout.count(said) for said in once] == [1, 1, 1], "one makes data and speaks"
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 1, "and writes"

    gradients = []
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setattr(runs, "total", lambda x: x)
    monkeypatch.setattr(train, "CLIP", 1e9)
    monkeypatch.setattr(runs, "average_gradients", lambda model: None)
    for rank in (0, 1):
        monkeypatch.setattr(runs, "RANK", rank)
        trainer = Trainer(config)
        trainer.train_step()
        named = trainer.model.named_parameters()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named})
    for name, averaged in first["gradient"].items():
        one, two = (gradient[name] for gradient in gradients)
        torch.testing.assert_close(averaged, (one + two) / 2)
    one, two = (gradient["head.weight"] for gradient in gradients)
    assert not torch.equal(one, two), "each has a batch of its own"


# ----------------------------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("changes", [{}, {"recall": True, "max_run": 2, "window": 3}])
def test_an_answer_is_right_if_generate_says_it(chains, tmp_path, changes):
    trainer = Trainer(small(chains, tmp_path, lr=1e-2, steps=60, **changes))
    for _ in range(60):
        trainer.train_step()
    batch, right = trainer.val_rows.first(30, 3), []
    thinking = dataclasses.replace(trainer.thinking, greedy=True, force=None, force_recall=None)
    for row, prompt, length in zip(batch.real, batch.prompt, batch.length):
        said = generate(trainer.model, row[:prompt].tolist(), int(length - prompt), thinking)
        right.append(said == row[:length].tolist())
    assert evaluate(trainer.model, batch, thinking)[1].tolist() == right
    assert 0 < sum(right) < 30


def test_evaluation_switches_dropout_off_and_leaves_the_model_as_it_was(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path, dropout=0.5))
    batch, thinking = trainer.val_rows.first(5, 3), Thinking(greedy=True)
    for training in (True, False):
        trainer.model.train(training)
        found = [evaluate(trainer.model, batch, thinking) for _ in range(2)]
        assert torch.equal(found[0][2], found[1][2]) and same(*(list(f[0]) for f in found))
        assert trainer.model.training == training


@pytest.mark.parametrize("changes", [{}, {"recall": True, "revise": 0.3}])
def test_evaluation_with_a_generator_leaves_the_chance_of_training_alone(chains, tmp_path, changes):
    trainer = Trainer(small(chains, tmp_path, **changes))
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    evaluate(trainer.model, trainer.val_rows.first(5, 3), trainer.thinking, generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_free_answers_with_swapped_thoughts_think_what_the_rollout_thought(
    chains, tmp_path, monkeypatch
):
    """One prompt at a time there is nobody to swap with, so they are handed on from the grid."""
    trainer, seen = Trainer(small(chains, tmp_path, revise=0.3)), []

    def answer(*_, instead):
        seen.append(instead[:3])

    monkeypatch.setattr(train, "generate", answer)
    thinking = Thinking("swapped", force=1.0, greedy=True)
    grid, _, _ = evaluate(trainer.model, trainer.val_rows.first(5, 3), thinking)
    assert seen == (grid.token[:, :3, 1] - trainer.model.config.vocab_size).tolist()


def test_evaluation_adds_up_the_nats_of_each_token_where_it_is_emitted(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path))
    batch = trainer.val_rows.first(20, 2)
    grid, _, nats = evaluate(trainer.model, batch, Thinking("never"))
    logits = trainer.model(batch.real[:, :-1]).logits.log_softmax(dim=-1)
    wanted = -logits.gather(2, batch.real[:, 1:, None])[:, :, 0]
    torch.testing.assert_close(nats[:, :-1], wanted)
    assert not nats[:, -1].any() and grid.emits[:, :-1, 0].all()


def test_a_model_comes_back_from_its_folder_and_thinks_as_it_was_trained(finished, chains):
    model, vocabulary, state = runs.load_model(finished)
    assert isinstance(model, GPT) and not model.training and vocabulary.row_end >= 0
    assert same(model.state_dict(), state["model"])
    thinking = train.as_trained(state, vocabulary)
    assert thinking == Thinking(greedy=True), "by the gate"
    state["progress"]["paid"] = False
    unpaid = train.as_trained(state, vocabulary)
    assert unpaid == Thinking(force=1.0, force_recall=1.0, greedy=True)
    state["progress"]["paid"] = True
    assert train.as_trained(state, vocabulary) == Thinking(greedy=True), "by the gate"
    state["config"]["patience"] = 3
    with pytest.raises(DataError, match="another version"):
        train.as_trained(state, vocabulary)


# ----------------------------------------------------------------------------------------------
# the claim


def test_thoughts_learn_to_carry_the_state_and_nothing_else_does(tmp_path):
    """
    One layer learns from scratch whether the number of b's in up to nine letters is even. Without
    its thoughts, or with others', it guesses.
    """
    prepare(tmp_path, "--task=parity", "--levels=9", "--rows=900", script=AUTOMATA)
    how = {"n_bits": 8, "batch_tokens": 512, "lr": 3e-3, "steps": 800, "warm_up": 1.0}
    trainer = Trainer(small(tmp_path, tmp_path / "run", eval_rows=100, **how))
    for _ in range(800):
        trainer.train_step()
        if trainer.curriculum.learned and trainer.step % 25 == 0 and trainer.validate()[9] > 0.97:
            break
    rows = [trainer.val_rows.first(100, level) for level in (7, 8, 9)]

    def accuracy(mode):
        chance = torch.Generator().manual_seed(0)
        thinking = dataclasses.replace(trainer.thinking, mode=mode, greedy=True)
        right = [evaluate(trainer.model, batch, thinking, chance)[1] for batch in rows]
        return [some.float().mean().item() for some in right]

    assert accuracy("policy")[-1] >= 0.95
    for mode in ("never", "random", "constant", "swapped"):
        assert sum(accuracy(mode)) / 3 <= 0.7, f"{mode}: no meaning, no answer (chance is 0.5)"
