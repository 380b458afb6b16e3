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
# splitting an overused thought


@torch.no_grad()
def split_thought(model: GPT, optimiser: torch.optim.Optimizer, usage: Tensor, generator=None) -> bool:
    """
    If the least used thought has under a sixth of its share of the uses (K,), make it a noisy copy of the most used one, so that two values which
    share a thought can part. As Linde, Buzo & Gray (1980) split a crowded code; moments of the copied rows are reset.
    """
    dead, top = int(usage.argmin()), int(usage.argmax())
    if usage[dead] >= 0.16 / len(usage):
        return False
    V = model.config.vocab_size
    for weight in (model.embedding.weight, model.head.weight):
        noise = 0.3 * weight[V + top].std() * torch.randn(2, weight.size(1), generator=generator).to(weight.device)
        weight[V + dead] = weight[V + top] + noise[0]
        weight[V + top] += noise[1]
    model.head.bias[V + dead] = model.head.bias[V + top]
    for weight in (model.embedding.weight, model.head.weight, model.head.bias):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimiser.state[weight]:
                optimiser.state[weight][name][V + dead] = 0
    usage[dead] = usage[top] = usage[top] / 2
    return True


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
        self.reached = 1 if config.curriculum else len(self.train_rows.levels)  # levels in use
        self.average = 2.0  # moving average of the loss of the longest level in use
        self.usage = torch.ones(config.n_think) / max(1, config.n_think)

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
        levels = self.train_rows.levels[: self.reached]
        rows = max(WORLD, WORLD * c.batch_tokens // self.train_rows.longest(levels[-1]) // several)
        first, end = (several * (rows * rank // WORLD) for rank in (RANK, RANK + 1))  # a row's rollouts stay together
        whole = self.train_rows.draw(rows, levels, self.generator, c.shown_share).to(self.device).repeat(several)
        if c.revise:
            whole = whole._replace(wrong=wrong_words(whole, len(self.vocabulary.tokens), c.corrupt, self.noise))
        batch = Batch(*(part[first:end] for part in whole))
        thinking, noise = dataclasses.replace(self.thinking, explore=c.explore), None
        if self.model.gate is not None:
            noise = Noise(*(part[first:end] for part in draw_noise(self.model, *whole.real.shape, thinking, self.noise)))
        if c.n_think and batch.thoughts.size(2):
            noise = load_dice(noise, batch.thoughts, batch.shown[:, None])
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
        self.grow(batch, log.pop("row_loss"))
        if c.n_think:
            self.split(roll)
        self.step += 1
        return log

    def grow(self, batch: Batch, row_loss: Tensor) -> None:
        """Add the next level once the longest one in use is mastered; after the last, thoughts begin to cost."""
        longest = batch.level == self.train_rows.levels[self.reached - 1]
        if count := total(longest.sum()).item():
            self.average += 0.1 * (total(row_loss[longest].sum()).item() / count - self.average)
        mastered = self.average < self.config.mastered or not self.config.curriculum
        if mastered and self.reached < len(self.train_rows.levels):
            self.reached, self.average = self.reached + 1, 1.0
        elif mastered and self.model.gate is not None and self.step >= self.config.free * self.config.steps:
            self.paid = True

    def split(self, roll: Rollout) -> None:
        used = total(torch.bincount(roll.stream[:, 1:][roll.thinks[:, :-1]].cpu() - self.model.config.vocab_size, minlength=self.config.n_think))
        self.usage += 0.05 * (used / used.sum().clamp(min=1) - self.usage)
        early = self.step < 0.5 * self.config.free * self.config.steps  # a split disturbs; there must be time to settle
        growing = self.reached < len(self.train_rows.levels) or early and not self.config.curriculum
        if self.config.split_every and growing and self.step % self.config.split_every == self.config.split_every - 1:
            split_thought(self.model, self.optimiser, self.usage, self.generator)

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
            "progress": {"step": self.step, "seconds": self.seconds, "reached": self.reached, "average": self.average, "paid": self.paid},
            "usage": self.usage,
            "random": [self.generator.get_state(), self.noise.get_state(), torch.get_rng_state()],
        }

    def load_state(self, state: dict) -> None:
        if state.get("meta") != self.meta:
            raise DataError(f"the checkpoint was trained on other data than {self.config.data} holds now")
        load_weights(self.model, state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.usage = state["usage"].cpu()
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


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if WORLD > 1:
        join(pick_device(config.device))
    trainer = Trainer(config)
    prepare_out(trainer)
    count = sum(p.numel() for p in trainer.model.parameters())
    machine = f"{trainer.device}, {torch.get_num_threads()} threads" + f", {WORLD} processes" * (WORLD > 1)
    if not RANK:
        print(f"{trainer.meta['task']}; {count:,} parameters, {config.n_layer} layers, {config.n_think} thoughts; {machine}", flush=True)
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
    print(f"trained in {trainer.seconds:.0f} s; saved {config.out}/checkpoint.pt", flush=True)
    if config.report:
        import report

        report.main([f"--run={config.out}", f"--plain={config.plain}"])


if __name__ == "__main__":
    run(main, "train.py")
