"""
Train a GPT to think silently, from scratch: rollout, two parallel passes, hybrid loss, loop.

  python train.py config/chain.toml                    the main job
  python train.py config/chain.toml --think_cost=0.1   any value of `Config` can be changed
  python train.py config/chain.toml --resume=true      go on where Ctrl-C stopped it
  torchrun --nproc_per_node=2 train.py config/chain.toml   in two processes, as one would with twice the batch

Writes to `out`: checkpoint.pt, metrics.jsonl, config.json and, at the end, report.json and report.png (report.py).
Not here: any task (tasks come from data/), the network (model.py), the rollout (stream.py, fast.py), the loss (loss.py), config and checkpoints (runs.py).
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import Batch, DataError, load_meta, load_split, load_vocabulary
from fast import parallel_rollout, rollout_by_words
from loss import evaluate, hybrid_loss, token_loss, wrong_words
from model import GPT
from runs import (
    RANK, WORLD, Config, add_up_gradients, autocast, begin_with, how_to_think, join, leave, load_checkpoint, load_config, load_weights, model_config, pick_device,
    run, save_checkpoint, total,
)  # fmt: skip
from stream import Noise, Rollout, Thinking, draw_noise, load_dice, rollout

# ----------------------------------------------------------------------------------------------
# the curriculum

POOL = 64  # rows, at least, that come into use together
MASTERED = 0.97  # share of the newest rows that is right, with the past cut off, when the next come into use
NEARLY, PATIENCE = 0.85, 150  # or this share, when so many steps have brought no more
RATE = 0.2  # of the moving average of that share
LAST_CALL = 0.75  # of the steps: then the levels that are left come into use all the same


def pools(count: dict[int, int]) -> list[int]:
    """{level: rows}, shortest level first -> how many levels are in use at each stage: as few more as hold POOL rows, the rest with the last."""
    stages, waiting = [], 0
    for i, rows in enumerate(count.values(), start=1):
        waiting += rows
        if waiting >= POOL:
            stages.append(i)
            waiting = 0
    return [*stages[:-1], len(count)] if waiting else stages


class Curriculum:
    """Short problems first, longer ones when the newest in use are mastered. It counts what is right, not nats, so that it knows no task."""

    def __init__(self, count: dict[int, int], grows: bool = True):
        """count: {level: rows}, shortest level first. Without `grows` all are in use from the start."""
        self.every = list(count)
        self.stages = pools(count) if grows else [len(count)]  # levels in use at each stage
        self.stage, self.grown = 0, 0  # which stage it is, and the step at which it began
        self.right = 0.0  # moving average: share of the newest rows that is right
        self.learned = not grows  # the last stage is mastered

    @property
    def levels(self) -> list[int]:
        """Levels in use."""
        return self.every[: self.stages[self.stage]]

    @property
    def newest(self) -> list[int]:
        """Levels that came into use together, last."""
        return self.levels[self.stages[self.stage - 1] if self.stage else 0 :]

    @property
    def mastered(self) -> list[int]:
        return self.levels if self.learned else self.levels[: -len(self.newest)]

    def open(self) -> None:
        """Take in all levels that are left, together with the newest, which are not mastered."""
        self.stages = self.stages[: self.stage] + [len(self.every)]
        self.right = 0.0  # what it was, it was of easier levels

    @property
    def emphasised(self) -> int:
        """How many levels, the last ones, half of the rows are drawn from; 0: all are drawn alike."""
        return 0 if self.learned else len(self.newest)

    def grow(self, step: int, level: Tensor, right: Tensor, asked: Tensor | None = None) -> None:
        """level (B,) of each row; right, asked (B,) bool: answered right, and whether one may expect it; None is all."""
        counted = (level >= self.newest[0]) & (torch.ones_like(right) if asked is None else asked)
        if count := total(counted.sum()).item():
            self.right += RATE * (total((right & counted).sum()).item() / count - self.right)
        if self.right > MASTERED or self.right > NEARLY and step - self.grown > PATIENCE:
            if self.stage < len(self.stages) - 1:
                self.stage, self.grown, self.right = self.stage + 1, step, 0.5
            else:
                self.learned = True

    def state(self) -> dict:
        """What a checkpoint keeps; `mastered` is for the report."""
        names = ("stages", "stage", "grown", "right", "learned", "mastered")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict) -> None:
        for name in ("stages", "stage", "grown", "right", "learned"):
            setattr(self, name, state[name])


# ----------------------------------------------------------------------------------------------
# the loop


def rolls_in_parallel(config: Config, device: str, rows: int, words: int) -> bool:
    """
    Word by word, a step costs what it costs to call the network, and its rows' share; parallel, there are few calls, but a column is computed again in
    every pass. On a CPU the calls are dear for few rows of few words only (bench.py shows where), on a GPU for all. Dropout allows no second pass.
    """
    possible = not (config.dropout or config.window or config.recall)
    return config.rollout == "parallel" or config.rollout == "auto" and possible and (device != "cpu" or rows <= 16 and rows * words <= 800)


def find_rollout(model: GPT, batch: Batch, config: Config, device: str, thinking: Thinking, generator=None, noise: Noise | None = None) -> tuple[Rollout, int]:
    """The one rollout there is for this noise, in the way that costs less -> the rollout, passes through the model."""
    if rolls_in_parallel(config, device, *batch.real.shape):
        return parallel_rollout(model, batch.real, batch.length, thinking, generator, noise)
    graph = config.compile and device == "cuda" and not config.n_positions  # whose end is looked for at every column, and a graph cannot look
    if not config.recall and not graph:
        return rollout_by_words(model, batch.real, batch.length, thinking, generator, noise)
    roll = rollout(model, batch.real, batch.length, thinking, generator, noise, graph)
    return roll, roll.stream.size(1) * (model.gate is not None)


class Trainer:
    def __init__(self, config: Config):
        self.config, self.device = config, pick_device(config.device)
        if config.thought_grad not in ("echo", "reinforce"):
            raise DataError(f"thought_grad = {config.thought_grad!r} is neither echo nor reinforce")
        if config.rollout not in ("sequential", "parallel", "auto"):
            raise DataError(f"rollout = {config.rollout!r} is none of sequential, parallel, auto")
        if config.rollout == "parallel" and (config.dropout or config.window or config.recall):
            raise DataError("rollout = parallel needs dropout = 0, window = 0 and recall = false: a pass must say twice what it said once")
        if config.baseline not in ("leave_one_out", "observer", "both"):
            raise DataError(f"baseline = {config.baseline!r} is none of leave_one_out, observer, both")
        if config.baseline != "leave_one_out" and not config.observer:
            raise DataError(f"baseline = {config.baseline!r} needs an observer, e.g. --observer=quarters")
        if config.window < 0 or not 0 <= config.corrupt <= 1:
            raise DataError(f"window = {config.window} cannot be negative, and corrupt = {config.corrupt} is a share, 0 to 1")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.meta = load_meta(config.data)
        self.vocabulary = load_vocabulary(self.meta)
        self.train_rows, self.val_rows = (load_split(config.data, s, self.vocabulary, config.block, config.demonstrate) for s in ("train", "val"))
        told, symbols = self.train_rows.first(1, self.train_rows.levels[0]).thoughts.size(2), len(self.meta.get("thoughts", []))
        if config.demonstrate and config.n_think and (told > config.max_run or symbols > config.n_think):
            raise DataError(f"the data demonstrate {symbols} thoughts, up to {told} in a row: more than n_think = {config.n_think}, max_run = {config.max_run}")
        columns = max(map(self.train_rows.longest, self.train_rows.levels)) * (1 + config.max_run * (config.n_think > 0) + config.recall)
        if config.n_positions and config.n_positions < columns:
            raise DataError(f"n_positions = {config.n_positions} is too few: a stream of these data may have {columns} columns")
        torch.manual_seed(config.seed)
        try:
            self.model = GPT(model_config(len(self.vocabulary.tokens), config))
        except ValueError as error:
            raise DataError(str(error)) from None
        if config.init_from and not config.resume:
            begin_with(self.model, config.init_from, self.vocabulary)
        self.model.to(self.device)
        self.autocast = autocast(config.precision, self.device)
        self.parallel = torch.compile(self.model, dynamic=True) if config.compile else self.model
        self.optimiser = self.model.optimiser(config.lr, config.gate_lr, config.weight_decay, (config.beta1, config.beta2))
        named = [(".observer." in name, p) for name, p in self.model.named_parameters()]  # the observer's surprises must not shorten everyone's step
        self.clipped = [[p for watching, p in named if watching == which] for which in (False, True)]
        self.generator = torch.Generator().manual_seed(config.seed)  # rows
        self.noise = torch.Generator(self.device).manual_seed(config.seed)  # rollouts, cuts
        self.free, self.taught = (how_to_think(config, self.vocabulary, paid) for paid in (False, True))
        self.step, self.seconds, self.paid = 0, 0.0, False
        self.curriculum = Curriculum(self.train_rows.count, config.curriculum)

    @property
    def thinking(self) -> Thinking:
        return self.taught if self.paid else self.free

    def schedule(self) -> float:
        """Share of the peak learning rates: linear warm-up, then cosine decay."""
        c, done = self.config, self.step / self.config.steps
        return min(1, (self.step + 1) / c.warmup) * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> dict:
        c = self.config
        several = c.rollouts if self.model.gate is not None and (self.paid or c.thought_grad == "reinforce") else 1
        levels = self.curriculum.levels
        rows = max(WORLD, WORLD * c.batch_tokens // self.train_rows.longest(levels[-1]) // several)
        first, end = (several * (rows * rank // WORLD) for rank in (RANK, RANK + 1))  # a row's rollouts stay together
        whole = self.train_rows.draw(rows, levels, self.generator, c.shown_share, self.curriculum.emphasised).to(self.device).repeat(several)
        if c.revise:
            whole = whole._replace(wrong=wrong_words(whole, len(self.vocabulary.tokens), c.corrupt, self.noise))
        batch = Batch(*(part[first:end] for part in whole))
        thinking, noise = dataclasses.replace(self.thinking, explore=c.explore), None
        if self.model.gate is not None:
            noise = Noise(*(part[first:end] for part in draw_noise(self.model, *whole.real.shape, thinking, self.noise)))
        if c.n_think and batch.thoughts.size(2):
            noise = load_dice(self.model, noise, batch.thoughts, batch.shown[:, None])
        with self.autocast:
            roll, passes = find_rollout(self.model, batch, c, self.device, thinking, noise=noise)
            loss, log = hybrid_loss(self.parallel, roll, batch, c, self.paid, self.noise)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * self.schedule()
        self.optimiser.zero_grad()
        loss.backward()
        if WORLD > 1:
            add_up_gradients(self.model)
        norm = sum(torch.nn.utils.clip_grad_norm_(some, c.clip).item() for some in self.clipped)
        if not math.isfinite(loss.item() + norm):
            raise FloatingPointError(f"the loss is {loss.item()}, its gradient {norm}, at step {self.step}: a lower --lr may help; nothing was saved since")
        self.optimiser.step()
        tokens = total(roll.speaks.sum()).item()
        log |= {"step": self.step, "paid": self.paid, "level": levels[-1], "thoughts_per_token": total(roll.thinks.sum()).item() / tokens, "tokens": tokens}
        if c.recall:
            log["recalls_per_token"] = total(roll.recalls.sum()).item() / tokens
        log["passes_per_column"] = passes / roll.stream.size(1)  # of this process
        self.curriculum.grow(self.step, batch.level, log.pop("right"), log.pop("asked"))
        self.charge()
        self.step += 1
        return log

    def charge(self) -> None:
        """Thoughts begin to cost once the last level is learned or, late, when it evidently is not; then all levels are in use."""
        c, curriculum = self.config, self.curriculum
        if self.step == int(LAST_CALL * c.steps) and not curriculum.learned:
            if not RANK:
                what = "thoughts begin to cost all the same" if curriculum.levels == curriculum.every else "from here on all levels are in use"
                print(f"level {curriculum.newest[0]} is not learned after {self.step} steps: {what}", flush=True)
            curriculum.open()
        late = self.step >= LAST_CALL * c.steps
        if self.model.gate is not None and self.step >= c.free * c.steps and (curriculum.learned or late):
            self.paid = True

    def validate(self) -> dict:
        """{level: share of validation rows answered right, or nats a token where there is no answer}, greedy, with its own chance."""
        own, result = torch.Generator(self.device).manual_seed(0), {}
        for level in self.val_rows.levels:
            batch = self.val_rows.first(self.config.eval_rows, level).to(self.device)
            roll, right = evaluate(self.model, batch, dataclasses.replace(self.thinking, greedy=True), own)
            asked = (batch.prompt < batch.length).any()
            result[level] = round((right.float().mean() if asked else token_loss(self.model, roll).mean()).item(), 4)
        return result

    # everything that a resumed run needs to equal one that was never stopped
    def state(self) -> dict:
        return {
            "config": dataclasses.asdict(self.config),
            "meta": self.meta,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {"step": self.step, "seconds": self.seconds, "paid": self.paid},
            "curriculum": self.curriculum.state(),
            "random": [self.generator.get_state(), self.noise.get_state(), torch.get_rng_state()],
        }

    def load_state(self, state: dict) -> None:
        if state.get("meta") != self.meta:
            raise DataError(f"the checkpoint was trained on other data than {self.config.data} holds now")
        load_weights(self.model, state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.curriculum.load_state(state["curriculum"])
        self.generator.set_state(state["random"][0].cpu())
        self.noise.set_state(state["random"][1].cpu())
        torch.set_rng_state(state["random"][2].cpu())


def progress_line(log: dict, config: Config, tokens_per_second: float, seconds_left: float) -> str:
    phase = "" if not (config.n_think or config.recall) else "  paid" if log["paid"] else "  free"
    return (
        f"step {log['step']:5d}{phase}  level {log['level']:2d}  loss {log['loss']:.3f}  accuracy {log['accuracy']:.2f}  "
        f"thoughts/token {log['thoughts_per_token']:.2f}  {tokens_per_second:,.0f} tokens/s  {seconds_left:.0f} s left"
    )


def train(trainer: Trainer) -> bool:
    """The loop -> False if Ctrl-C ended it early."""
    config, out = trainer.config, Path(trainer.config.out)
    stop = []
    former = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    started, mark, tokens = time.monotonic() - trainer.seconds, (time.monotonic(), trainer.step), 0
    last, stopped = trainer.step >= config.steps, False
    with open(os.devnull if RANK else out / "metrics.jsonl", "a", buffering=1) as metrics:
        while not (last or stopped):
            log = trainer.train_step()
            trainer.seconds = time.monotonic() - started
            tokens += log.pop("tokens")
            last, stopped = trainer.step >= config.steps, total(torch.tensor(len(stop))).item()  # one is stopped, all stop
            if RANK:
                continue
            if trainer.step % config.log_every == 0 or last:
                now, steps = time.monotonic(), trainer.step - mark[1]
                rate, left = tokens / (now - mark[0]), (now - mark[0]) / steps * (config.steps - trainer.step)
                print(progress_line(log, config, rate, left), flush=True)
                if trainer.step % config.eval_every == 0 or last:
                    log["validation"] = trainer.validate()
                    print("  validation by level: " + "  ".join(f"{k}: {a:.3f}" for k, a in log["validation"].items()), flush=True)
                metrics.write(json.dumps(log | {"seconds": round(trainer.seconds, 2), "tokens_per_second": round(rate)}) + "\n")
                mark, tokens = (time.monotonic(), trainer.step), 0
            if trainer.step % config.save_every == 0 or last or stopped:
                save_checkpoint(out / "checkpoint.pt", trainer.state())
    for number, handler in former.items():
        signal.signal(number, handler)
    return trainer.step == config.steps


def prepare_out(trainer: Trainer) -> None:
    """Resume from what lies in `out`, or move it aside: no run overwrites another's checkpoint."""
    config, out = trainer.config, Path(trainer.config.out)
    if config.resume:
        trainer.load_state(load_checkpoint(config.out, trainer.device))
    if RANK:
        return
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    if config.resume:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        metrics.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < trainer.step))
        print(f"resumed {out} at step {trainer.step}")
    else:
        if (out / "checkpoint.pt").exists():
            os.replace(out / "checkpoint.pt", out / "checkpoint.previous.pt")
            print(f"{out} held a checkpoint: moved to checkpoint.previous.pt")
        metrics.unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def what_was_learned(trainer: Trainer) -> str:
    """One line about levels and price."""
    learned, every = trainer.curriculum.mastered, trainer.curriculum.every
    line = f"learned: levels {learned[0]} to {learned[-1]}" if learned else "no level was learned"
    line += "" if len(learned) == len(every) else f"; not learned: {every[len(learned)]} to {every[-1]}"
    line = line if trainer.config.curriculum else "all levels were in use from the start"
    return line + ("; thoughts never cost anything" if trainer.config.n_bits and not trainer.paid else "")


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if WORLD > 1:
        join(pick_device(config.device))
    trainer = Trainer(config)
    prepare_out(trainer)
    count = sum(p.numel() for p in trainer.model.parameters())
    machine = f"{trainer.device}, {torch.get_num_threads()} threads" + f", {WORLD} processes" * (WORLD > 1)
    if not RANK:
        print(f"{trainer.meta['task']}; {count:,} parameters, {config.n_layer} layers, thoughts of {config.n_bits} bits; {machine}", flush=True)
    go_on = f"go on with: {f'torchrun --nproc_per_node={WORLD}' if WORLD > 1 else 'python'} train.py {' '.join(argv)} --resume=true"
    try:
        finished = train(trainer)
    except ConnectionError as error:
        try:
            rest = f"the checkpoint in {config.out} is of step {load_checkpoint(config.out)['progress']['step']}; {go_on}"
        except DataError:
            rest = f"nothing was saved yet, save_every = {config.save_every}"
        sys.exit(f"{error}, at step {trainer.step}; {rest}")
    if WORLD > 1:
        leave()
    if RANK:
        return
    if not finished:
        sys.exit(f"stopped at step {trainer.step} and saved; {go_on}")
    print(f"{what_was_learned(trainer)}\ntrained in {trainer.seconds:.0f} s; saved {config.out}/checkpoint.pt", flush=True)
    if config.report:
        import report

        report.main([f"--run={config.out}", f"--plain={config.plain}"])


if __name__ == "__main__":
    run(main, "train.py")
