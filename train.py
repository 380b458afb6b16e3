"""
Train a GPT to think silently, from scratch: rollout, two parallel passes, hybrid loss, loop.

  python train.py config/chain.toml                    the main job
  python train.py config/chain.toml --think_cost=0.1   any value of `Config` can be changed
  python train.py config/chain.toml --resume=true      go on where Ctrl-C stopped it
  torchrun --nproc_per_node=2 train.py config/chain.toml   in two processes, as one would with twice the batch

Writes to `out`: checkpoint.pt, metrics.jsonl, config.json and, at the end, report.json and report.png (report.py).
Not here: any task (tasks come from data/), the network (model.py).

Glossary beside model.py's
  pass 1    one parallel forward over the recorded streams, everything in view
  pass 2    another, in which columns from the row's cut on see only columns from the cut on
  cut       the column of a thought; what came before it is forgotten
  price     think_cost, in nats a thought
  nats      natural-log units of loss
"""

import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Batch, DataError, Vocabulary, load_meta, load_split, load_vocabulary
from model import GPT, GPTConfig, Noise, Output, Rollout, Thinking, draw_noise, from_gpt2, load_dice, parallel_rollout, read, rollout, speak

# ----------------------------------------------------------------------------------------------
# config


@dataclass
class Config:
    data: str = "data/arithmetic"  # folder with meta.json, train.bin, val.bin
    block: int = 64  # tokens in a window of a text; rows have lengths of their own
    demonstrate: float = 1.0  # share of the rows with demonstrated thoughts whose thoughts are kept and supervised; in the rest they are left to be discovered
    out: str = "out/chain"  # folder for everything that is written
    plain: str = ""  # folder of a finished plain run, shown beside this one in the report
    init_from: str = ""  # begin with the weights in this folder, of a model with fewer thoughts or none; or hf:NAME, GPT-2 weights of Hugging Face
    resume: bool = False  # go on from the checkpoint in `out`
    seed: int = 1
    device: str = "auto"  # auto | cpu | cuda | mps
    threads: int = 0  # CPU threads, 0 for torch's choice
    compile: bool = False  # torch.compile the two parallel passes
    shown_share: float = 0.0  # share of each batch, at least, that is drawn from the rows whose thoughts are demonstrated
    # the network
    n_think: int = 16  # K, thoughts; 0 trains a plain GPT
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    rope_base: float = 100.0
    n_positions: int = 0  # 0: rotary positions; above: learned ones, for so many columns, as GPT-2 has
    observer: str = ""  # layers that the observer head watches: "quarters" of the depth, or "0,1"; "" is no observer
    observer_shapes: bool = False  # gradients that reach the observer go on into the layers it watches
    window: int = 0  # columns in view, in training and after; 0 for all
    done: bool = False  # a run of thoughts ends with DONE, chosen among the thoughts; else by the gate
    recall: bool = False  # RECALL, a column that sees past the window and past a cut
    revise: bool = False  # REVISE, a word that takes the last word back
    # optimisation
    steps: int = 1500
    batch_tokens: int = 1536  # real tokens a step and process, all rollouts counted: many short rows or few long ones
    lr: float = 1e-3
    gate_lr: float = 5e-3  # of the gate and the observer; they start late and have few weights
    warmup: int = 100  # steps of linear warm-up
    final_lr: float = 0.1  # cosine decay to this share of lr
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient norm, the observer's apart from all others'
    prompt_weight: float = 0.01  # weight of the prompt's own tokens in the loss; the answer's is 1
    curriculum: bool = True  # shortest levels first, the next when the longest is mastered
    mastered: float = 0.5  # nats a token of the answer (moving average) at which a level counts as mastered
    # thoughts
    max_run: int = 1  # thoughts in a row, at most
    hold: float = 1.0  # probability of a run of thoughts behind a token, as long as thoughts are free
    gate_init: float = 0.95  # the gate's own, when it takes over
    sharp: float = 1.0  # spread of untrained thought logits; above 1, a thought is a hash of the state before it has learned anything
    thought_grad: str = "echo"  # echo | reinforce
    echo_scale: float = 1.0  # of the echo's gradient
    forget: float = 1.0  # share of rows that forget, while thoughts are free
    forget_paid: float = 0.8  # the same, once they are paid
    cut_last: float = 0.5  # share of cuts put as late as they can be, so that one thought must tell all
    cut_every: int = 0  # real tokens from cut to cut, on average, in a row that forgets; 0 is one cut a row
    charge_thinking: float = 1.0  # weight of the word that a column that thinks would have said
    imitate: float = 0.1  # weight of thinking in pass 2, behind the cut, what was thought in full view
    tell: float = 0.0  # reward, in nats a nat, of thoughts that tell columns apart, whatever about them
    split_every: int = 60  # steps between splits of an overused thought, while levels are being added or, without curriculum, in the first half of the free phase; 0 never
    free: float = 0.4  # share of the steps, at least, in which thoughts are free and the gate is not trained
    think_cost: float = 0.05  # price of a thought, in nats
    recall_cost: float = 0.2  # price of a RECALL, in nats
    hold_recall: float = 0.3  # probability of a RECALL, as long as it is free
    gate_weight: float = 1.0  # weight of the gate's policy gradient
    horizon: int = 0  # real tokens whose loss a thought is rewarded by; 0 is all that follow
    explore: float = 0.0  # in the paid phase, probability at which the gate does the one thing, and the other, whatever it says
    baseline: str = "leave_one_out"  # of the gate's policy gradient: leave_one_out | observer | both
    observer_weight: float = 1.0  # weight of the observer's error in what it reads off
    corrupt: float = 0.1  # with REVISE: share of the answer's tokens that are tried with a wrong word in their place, to be taken back
    rollouts: int = 4  # rollouts of each row in the paid phase, each the baseline of the others
    rollout: str = "auto"  # sequential | parallel, one and the same rollout found in two ways | auto: parallel on a GPU, or where rows are few
    # habits
    eval_every: int = 100
    eval_rows: int = 200  # validation rows a level
    log_every: int = 50
    save_every: int = 500
    report: bool = True


def parse_value(name: str, text, kind: type):
    """A value from the command line or a TOML file as the field's type."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(text).lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise DataError(f"{name} = {text!r} is not a {kind.__name__}") from None


def load_config(argv: list[str], kind=Config):
    """[FILE.toml] [--key=value ...] -> kind. Raises DataError that names the nearest key for an unknown one."""
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    values = {}
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            values[name] = text if equals else "true"
            continue
        try:
            values |= tomllib.loads(Path(argument).read_text())
        except OSError as error:
            raise DataError(f"cannot read config {argument} ({error.strerror})") from None
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{argument} is not TOML: {error}") from None
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
            raise DataError(f"there is no config key {name!r}; the nearest is {near!r}")
    return kind(**{name: parse_value(name, value, fields[name]) for name, value in values.items()})


def model_config(vocab_size: int, config: Config) -> GPTConfig:
    shared = {f.name for f in dataclasses.fields(GPTConfig)} & {f.name for f in dataclasses.fields(Config)}
    return GPTConfig(vocab_size, **{name: getattr(config, name) for name in shared})


def pick_device(name: str) -> str:
    mps = torch.backends.mps.is_available() and WORLD == 1  # it has no all_reduce
    there = [d for d, here in (("cuda", torch.cuda.is_available()), ("mps", mps), ("cpu", True)) if here]
    if name not in ("auto", *there):
        raise DataError(f"device = {name!r} is not here; this machine has {', '.join(there)}")
    return there[0] if name == "auto" else name


# ----------------------------------------------------------------------------------------------
# several processes

# Every process has the same weights, the same generators in the same state, and draws the same whole batch, with all its noise; each works on its own share of
# the rows. What they share is what `total` adds up: the sums and counts that losses are means of, the gradients, what the curriculum and the splits go by, and
# the wish to stop. So all of them do the same next, and the first alone writes and speaks.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def join(device: str) -> None:
    """Meet the other processes. Raises DataError where they are more than there are GPUs."""
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise DataError(f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, and here are {torch.cuda.device_count()}; or --device=cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    dist.all_reduce(torch.zeros(1, device=device))  # processes that cannot talk say why here; later it means that one is gone


def leave() -> None:
    """Leave, but not before all have heard the last thing that matters: whoever is gone first may cut the others short."""
    try:
        total(torch.zeros(()))
    except ConnectionError:
        pass
    dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """
    The sum of x over all processes, the same to the last bit in each. Backward, x is the process's own and the rest a constant: a function of totals has
    the same value everywhere, and its gradients, added up over the processes, are those of one process with all rows. Raises ConnectionError.
    """
    if WORLD == 1:
        return x
    everyone = x.detach().clone()
    try:
        dist.all_reduce(everyone)
    except RuntimeError as error:
        raise ConnectionError("another process is gone or out of reach") from error
    return everyone + (x - x.detach())


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over all columns of all processes -> scalar; 0 where nothing has weight."""
    return total((x * weight).sum()) / total(weight.sum()).clamp(min=1)


def add_up_gradients(model: GPT) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = total(torch.cat([g.flatten() for g in gradients]))  # one message, not one a parameter
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


# ----------------------------------------------------------------------------------------------
# forgetting and echo


def draw_cuts(roll: Rollout, prompt: Tensor, forget: float, last: float = 0.0, every: int = 0, generator=None) -> Tensor:
    """
    -> (B, C) bool, True at a cut: the first column that stays in view.

    A cut falls right after a real token of the prompt (never its last one) that a thought follows, so that this thought
    is the first thing in view. A share `forget` of the rows forgets. With `every` = 0 there is one cut a row and any such place is as
    likely as another, but a share `last` of the rows takes the last; otherwise each place is a cut with probability 1 / every.
    """
    B, C = roll.stream.shape
    column = torch.arange(C, device=roll.stream.device)
    eligible = roll.thinks & roll.holds_real & (roll.pointer < prompt[:, None])
    shapes = total(F.one_hot(torch.tensor(RANK), WORLD)[:, None] * torch.tensor([B, C]))  # (WORLD, 2): drawn for all processes' rows, whoever's they are
    rows, start, widest = int(shapes[:, 0].sum()), int(shapes[:RANK, 0].sum()), int(shapes[:, 1].max())
    draw = lambda columns: torch.rand(rows, columns, generator=generator, device=column.device)[start : start + B, :C]  # noqa: E731
    if every:
        cut = draw(widest) < 1 / every
    else:
        score = torch.where(draw(1) < last, column / C, draw(widest))
        cut = column == score.masked_fill(~eligible, -1).argmax(dim=1, keepdim=True)
    cut = cut & eligible & (draw(1) < forget)
    return F.pad(cut[:, :-1], (1, 0))  # the thought stands one column behind the token it follows


def echo(model: GPT, roll: Rollout, thoughts: Tensor, chosen: Tensor, scale: float = 1.0) -> Tensor:
    """
    Straight-through embeddings of the streams: E[z] + scale * (p - stop_gradient(p)) @ E_thoughts for a thought z, p = softmax of
    the logits (B, C, K) that chose it in pass 1, at the columns `chosen` (B, C). The value is E[z]; backward, whatever is said later reaches those logits.
    -> (B, C, n_embd). After Bengio et al. 2013, arXiv:1308.3432.
    """
    p = thoughts.softmax(dim=-1)
    carry = (p - p.detach()) @ model.embedding.weight[model.config.vocab_size :][: model.config.n_think].detach()  # all zeros
    carry = torch.where(chosen[..., None], scale * carry, 0)
    return model.embedding(roll.stream) + F.pad(carry, (0, 0, 1, 0))[:, :-1]  # a thought stands one column behind its logits


# ----------------------------------------------------------------------------------------------
# the hybrid loss


def targets(roll: Rollout) -> Tensor:
    """(B, C): the real token that each column would say. Behind a row's end, its last one."""
    return roll.real.gather(1, roll.pointer.clamp(max=roll.real.size(1) - 1))


def word_loss(words: Tensor, roll: Rollout) -> Tensor:
    """(B, C, V) -> (B, C): -log p(the next real token) in nats, where the column speaks and where it could have; 0 behind a row's end."""
    loss = F.cross_entropy(words.flatten(0, 1), targets(roll).flatten(), reduction="none")
    return loss.view_as(roll.pointer) * roll.valid


def weighted(loss: Tensor, roll: Rollout, answer: Tensor, prompt_weight: float, charge_thinking: float = 1.0) -> Tensor:
    """
    Weighted mean of the (B, C) loss over `answer` (B, C), the answers' columns, plus prompt_weight times that over the others -> scalar.

    A column that goes on to think, or to recall, is charged, too, for what it would have said, with the weight `charge_thinking`. That closes a leak: in
    pass 2 a later thought, thought in full view, may know the answer, but the column before it must do with the thought at the cut. And the
    gate's choice is between two things that are both trained. A weight of 0 leaves the leak open.
    """
    charge = torch.where(roll.speaks, 1.0, charge_thinking) * roll.valid
    return mean(loss, charge * answer) + prompt_weight * mean(loss, charge * ~answer)


def at_positions(value: Tensor, roll: Rollout) -> Tensor:
    """(B, C) -> (B, T + 1): the value at the first column that could say each real token; 0 where there is none."""
    B, T = roll.real.shape
    return value.new_zeros(B, T + 1).scatter_add(1, roll.pointer, value * (roll.holds_real & roll.valid))


def return_to_go(loss: Tensor, roll: Rollout, think_cost: float, horizon: int = 0, recall_cost: float = 0.0) -> Tensor:
    """
    (B, C): minus the (B, C) loss of all real tokens said from this column on, minus the price of all thoughts and RECALLs decided from it on;
    with a horizon, of so many real tokens only, and of the thoughts and RECALLs before the last of them.
    """
    reward = -loss * roll.speaks - think_cost * roll.thinks - recall_cost * roll.recalls
    returns = reward.flip(1).cumsum(1).flip(1)
    if not horizon:
        return returns
    return returns - F.pad(at_positions(returns, roll), (0, horizon)).gather(1, roll.pointer + horizon)


def leave_one_out(returns: Tensor, roll: Rollout, rollouts: int) -> Tensor:
    """
    (B, C) baseline: the mean return-to-go of the other rollouts of the same row from the same real position on.
    Rows stand in groups of `rollouts`. Zero where there is no other. After Kool et al. 2019 (RLOO).
    """
    at = at_positions(returns, roll)
    groups = at.view(-1, rollouts, at.size(1))
    others = (groups.sum(1, keepdim=True) - groups) / max(1, rollouts - 1)
    return others.view_as(at).gather(1, roll.pointer)


def baseline(returns: Tensor, cost: Tensor, ahead: Tensor, roll: Rollout, config: Config) -> Tensor:
    """
    (B, C): what a return-to-go is compared with, whatever the column did. The mean of the row's other rollouts, or of a single rollout what it would
    have lost by speaking at once; what the observer saw `ahead` (B, C); or both: the observer, mended by what it missed in the other rollouts.
    """
    if config.baseline == "observer":
        return -ahead
    if config.rollouts == 1:
        return -cost
    seen = -ahead if config.baseline == "both" else torch.zeros_like(returns)
    return seen + leave_one_out(returns - seen, roll, config.rollouts)


def worth_of_thinking(cost: Tensor, roll: Rollout, rollouts: int, horizon: int) -> tuple[Tensor, Tensor]:
    """
    Nats by which a thought at a column lowered the (B, C) cost of what was said later, before its price -> (B, C), and where that is known (B, C) bool.
    With a horizon of one token: its cost if said at once less its cost behind the thought. Else from the other rollouts of the row that did the other thing at
    the same real token: the later cost of those that spoke less that of those that thought, for each column its own cost against the others' mean.
    """
    later = -return_to_go(cost, roll, 0.0, horizon)
    if horizon == 1:
        return cost - later, roll.thinks
    first = roll.decides & roll.holds_real
    grouped = lambda where: at_positions(where.float(), roll).view(-1, rollouts, roll.real.size(1) + 1)  # noqa: E731
    thought, spoke = grouped(first & roll.thinks), grouped(first & ~roll.thinks)  # (B / rollouts, rollouts, T + 1)
    value = at_positions(later, roll).view_as(thought)
    mean = lambda which: (value * which).sum(1, keepdim=True) / which.sum(1, keepdim=True).clamp(min=1)  # noqa: E731
    worth = torch.where(thought > 0, mean(spoke) - value, value - mean(thought))
    known = ((thought + spoke) * thought.sum(1, keepdim=True) * spoke.sum(1, keepdim=True)) > 0
    back = lambda x: x.view(len(cost), -1).gather(1, roll.pointer)  # noqa: E731
    return back(worth), back(known) & first


def observer_loss(readings: Tensor, targets: tuple, where: tuple) -> Tensor:
    """Squared error of each reading (B, C, R) against its own target (B, C), mean over its own columns (B, C) bool, summed -> scalar, nats squared."""
    error = (readings - torch.stack(targets, dim=-1).detach()).square()
    counted = torch.stack(where, dim=-1)
    return (total((error * counted).sum((0, 1))) / total(counted.sum((0, 1))).clamp(min=1)).sum()


def policy_gradient(log_probability: Tensor, advantage: Tensor, where: Tensor) -> Tensor:
    """REINFORCE: minus the mean of advantage times log-probability of what was done, over the columns `where` -> scalar."""
    return -mean(advantage.detach() * log_probability, where)


def log_choice(gate: Tensor, thinks: Tensor, explore: float) -> Tensor:
    """log p of what was done, in nats, of a gate (logits) that does the one thing, and the other, with probability `explore` whatever it says."""
    free = math.log(1 - 2 * explore) + F.logsigmoid(torch.where(thinks, gate, -gate))
    return torch.logaddexp(free, torch.tensor(explore).log().to(free))


def thought_log_probability(thoughts: Tensor, roll: Rollout, vocab_size: int) -> Tensor:
    """(B, C, K) logits -> (B, C): log p of the thought that follows each column, in nats; 0 where none does."""
    chosen = F.pad(roll.stream[:, 1:] - vocab_size, (0, 1)).clamp(0, thoughts.size(2) - 1)
    return thoughts.log_softmax(dim=-1).gather(2, chosen[..., None])[..., 0] * roll.thinks


def information_kept(thoughts: Tensor, where: Tensor) -> Tensor:
    """
    What a thought drawn from the softmax of (B, C, K) logits tells, in nats, of which of the columns `where` (B, C) it was thought at:
    entropy of the mean softmax less the mean entropy -> scalar, 0 to log K; 0 where there are no columns. After Krause, Perona & Gomes 2010.
    """
    p, count = thoughts[where].softmax(dim=-1), total(where.sum()).clamp(min=1)  # (N, K)
    entropy = lambda q: -torch.xlogy(q, q.clamp(min=1e-9)).sum(dim=-1)  # noqa: E731
    return entropy(total(p.sum(dim=0)) / count) - total(entropy(p).sum()) / count


def wrong_words(batch: Batch, V: int, corrupt: float, generator=None) -> Tensor:
    """
    -> (B, T): a wrong word for some of the real tokens, -1 for the others. Those that the data hold, and else, with the probability `corrupt`, one of the
    other words; of a row with an answer only in the answer, since nobody takes back what it was asked.
    """
    B, T = batch.real.shape
    place = torch.arange(T, device=batch.real.device)
    own = (place >= torch.where(batch.prompt < batch.length, batch.prompt, 1)[:, None]) & (place < batch.length[:, None])
    tries = torch.rand(B, T, generator=generator, device=place.device) < corrupt
    other = torch.randint(1, V, (B, T), generator=generator, device=place.device)
    drawn = torch.where(own & tries, (batch.real + other) % V, -1)
    return torch.where(batch.wrong >= 0, batch.wrong, drawn)


def with_wrong_words(roll: Rollout, wrong: Tensor, window: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Put wrong words (B, T), -1 for none, behind the streams, as columns of their own. Each stands right behind the column that says the true one, at that
    position, and sees what came before; nobody sees it. So all else is as if it had never been.
    -> token ids (B, E), which of them are there (B, E); positions (B, C + E) and mask (B, 1, C + E, C + E) of all columns.
    """
    (B, C), device = roll.stream.shape, wrong.device
    column, after = torch.arange(C, device=device), (~roll.opens).cumsum(dim=1)  # (B, C) the position behind each column
    speaker = torch.zeros(B, wrong.size(1) + 1, dtype=torch.long, device=device).scatter_add(1, roll.pointer, column * roll.speaks)  # (B, T + 1)
    E = max(1, int((wrong >= 0).sum(dim=1).max()))
    place = (wrong >= 0).int().argsort(dim=1, descending=True, stable=True)[:, :E]  # (B, E) those that are there, in order, then others
    word, behind = wrong.gather(1, place), speaker.gather(1, place)
    position = torch.cat([roll.position, after.gather(1, behind)], dim=1)
    back = position[:, C:, None] - position[:, None, :C]  # (B, E, C) columns ago
    sees = (column <= behind[..., None]) & ~roll.opens[:, None] & (back < (window or C + 1))
    mask = roll.view(window)
    mask = (column[:, None] >= column).expand(B, C, C) if mask is None else mask[:, 0]
    alone = torch.eye(E, dtype=torch.bool, device=device).expand(B, E, E)
    rows = torch.cat([F.pad(mask, (0, E)), torch.cat([sees, alone], dim=2)], dim=1)
    return word.clamp(min=0), word >= 0, position, rows[:, None]


def first_pass(model: GPT, here: Tensor, roll: Rollout, batch: Batch, config: Config) -> tuple[Output, Tensor]:
    """Pass 1 over the embedded streams (B, C, n_embd), and with REVISE over wrong words beside them -> output of the streams, loss of not taking those back."""
    if not config.revise:
        return read(model, roll, config.window, x=here), here.new_zeros(())
    C, V = roll.stream.size(1), model.config.vocab_size
    word, there, position, mask = with_wrong_words(roll, batch.wrong, config.window)
    out = model(torch.cat([here, model.embedding(word)], dim=1), mask, position=position)
    regret = -out.words[:, C:].log_softmax(dim=-1)[..., V]  # (B, E)
    asked = roll.valid & ((roll.pointer >= batch.prompt[:, None]) | (batch.prompt >= batch.length)[:, None])  # weigh a wrong word like a right one
    return Output(*(part[:, :C] for part in out)), total((regret * there).sum()) / total(asked.sum()).clamp(min=1)


def hybrid_loss(model: GPT, roll: Rollout, batch: Batch, config: Config, paid: bool, generator=None) -> tuple[Tensor, dict]:
    """All of a training step but the rollout and the optimiser -> loss, {name: number} and "row_loss" (B,) for the log."""
    answer = roll.valid & (roll.pointer >= batch.prompt[:, None])  # (B, C) columns that would say a token of the answer
    shown = batch.shown[:, None]  # (B, 1) the row's thoughts are demonstrated
    here = model.embedding(roll.stream)  # (B, C, n_embd)
    full, regret = first_pass(model, here, roll, batch, config)  # pass 1
    loss_full = loss_kept = word_loss(full.words, roll)
    loss = weighted(loss_full, roll, answer, config.prompt_weight, config.charge_thinking) + regret
    right = ((full.words.argmax(-1) == targets(roll)) | ~(answer & roll.speaks)).all(dim=1)
    log = {"loss": loss.item(), "accuracy": mean(right.float(), torch.ones_like(right)).item()}
    if config.revise:
        log["regret"] = regret.item()

    if model.config.n_think:  # pass 2
        x = echo(model, roll, full.thoughts, roll.thinks & ~shown, config.echo_scale) if config.thought_grad == "echo" else roll.stream
        forget = config.forget_paid if paid else config.forget
        cut = draw_cuts(roll, batch.prompt, forget, config.cut_last, config.cut_every, generator)
        again = not forget and not config.dropout and not config.compile  # what pass 2 would say was said in pass 1 already
        kept = full if again else read(model, roll, config.window, cut, x)
        loss_kept = word_loss(kept.words, roll)
        mean_kept = weighted(loss_kept, roll, answer, config.prompt_weight, config.charge_thinking)
        loss, log["loss_forgotten"] = loss + mean_kept, mean_kept.item()
        if again and config.thought_grad == "echo":  # the gradient that would have reached x, sent on to the logits; x - here is zero
            loss = loss + ((x - here) * torch.autograd.grad(mean_kept, here, retain_graph=True)[0]).sum()
        if config.imitate and forget:  # with the past forgotten, think what was thought in full view
            behind = roll.thinks & (cut.cumsum(dim=1) > 0)
            loss = loss - config.imitate * mean(thought_log_probability(kept.thoughts, roll, model.config.vocab_size), behind)
        if config.tell:
            loss = loss - config.tell * information_kept(full.thoughts, roll.thinks)

    weight = torch.where(answer, 1.0, config.prompt_weight)
    cost = loss_full.detach() * weight
    returns = return_to_go(cost, roll, config.think_cost * paid, config.horizon, config.recall_cost * paid)
    ahead = full.readings[..., 2].detach() if config.observer else torch.zeros_like(cost)
    thinking = full.thinking(~(roll.holds_real | roll.opens))  # (B, C) logit
    if paid:  # when to think, when to recall
        advantage = returns - baseline(returns, cost, ahead, roll, config)
        choices = policy_gradient(log_choice(thinking, roll.thinks, config.explore), advantage, roll.decides & ~shown) if model.config.n_think else 0.0
        if config.recall:
            choices = choices + policy_gradient(log_choice(full.recall, roll.recalls, config.explore), advantage, roll.may_recall)
        loss = loss + config.gate_weight * choices
    if config.observer:
        worth, known = worth_of_thinking(cost, roll, config.rollouts if paid else 1, config.horizon)
        error = observer_loss(full.readings, (loss_full, worth, -returns), (roll.valid, known, roll.valid))
        loss, log["observer"] = loss + config.observer_weight * error, error.item()
    if model.config.n_think and config.thought_grad == "reinforce":  # what to think, without the echo
        returns = return_to_go(loss_kept.detach() * weight, roll, 0.0, config.horizon)
        action = thought_log_probability(full.thoughts, roll, model.config.vocab_size)
        loss = loss + policy_gradient(action, returns - leave_one_out(returns, roll, config.rollouts), roll.thinks & ~shown)
    if batch.thoughts.size(2):  # what to think, and when, as demonstrated
        told = thought_log_probability(full.thoughts, roll, model.config.vocab_size)
        loss = loss - mean(told, roll.thinks & shown) - mean(log_choice(thinking, roll.thinks, 0.0), roll.decides & shown)

    log["row_loss"] = (loss_kept.detach() * answer).sum(dim=1) / answer.sum(dim=1).clamp(min=1)
    return loss, log


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
# evaluation


def evaluate(model: GPT, batch: Batch, thinking: Thinking, generator=None) -> tuple[Rollout, Tensor]:
    """The model answers a batch's prompts by itself -> the rollout, (B,) bool: the whole answer is right."""
    trained = model.training  # a model that came for evaluation only keeps its dropout off
    model.eval()
    roll = speak(model, batch.real, batch.prompt, batch.length, thinking, generator)
    model.train(trained)
    return roll, (roll.real == batch.real).all(dim=1)


@torch.no_grad()
def token_loss(model: GPT, roll: Rollout, window: int = 0) -> Tensor:
    """-> (B, T - 1): -log p of each real token but the first where it was said, in nats; 0 behind a row's end."""
    trained = model.training
    model.eval()
    loss = word_loss(read(model, roll, window).words, roll) * roll.speaks
    model.train(trained)
    return loss.new_zeros(len(loss), roll.real.size(1) + 1).scatter_add(1, roll.pointer, loss)[:, 1:-1]


# ----------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Written beside and renamed: a reader, or a crash midway, finds the old file or the new one, never a part."""
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(folder: str, device="cpu") -> dict:
    path = Path(folder) / "checkpoint.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no checkpoint in {folder}: train first") from None
    except Exception as error:
        raise DataError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or not ours") from None


def load_weights(model: GPT, weights: dict) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split(":", 1)[-1].split())
        raise DataError(f"the checkpoint is of another shape than the config asks for: {detail}") from None


def begin_with(model: GPT, source: str, vocabulary: Vocabulary) -> None:
    """Adopt the weights that `init_from` names. Raises DataError."""
    if source.startswith("hf:"):
        try:
            from transformers import GPT2LMHeadModel

            weights = from_gpt2(GPT2LMHeadModel.from_pretrained(source[3:]).state_dict())
        except ImportError:
            raise DataError("GPT-2 weights need the package transformers: pip install transformers") from None
        except (OSError, ValueError) as error:
            raise DataError(f"no GPT-2 weights from {source}: {str(error).splitlines()[0]}") from None
    else:
        state = load_checkpoint(source)
        weights = state["model"]
        if load_vocabulary(state["meta"]).tokens != vocabulary.tokens:
            raise DataError(f"the model in {source} has another vocabulary: it was trained on {state['meta']['task']}")
    try:
        model.adopt(weights)
    except ValueError as error:
        raise DataError(f"init_from = {source!r}: {error}") from None


def load_model(folder: str, device: str = "cpu") -> tuple[GPT, Vocabulary, dict]:
    """A trained model from its checkpoint alone -> model in evaluation mode, vocabulary, the checkpoint."""
    state = load_checkpoint(folder, device)
    try:
        vocabulary = load_vocabulary(state["meta"])
        model = GPT(model_config(len(vocabulary.tokens), Config(**state["config"]))).to(device)
        load_weights(model, state["model"])
        return model.eval(), vocabulary, state
    except (KeyError, TypeError):
        raise DataError(f"the checkpoint in {folder} was written by another program or version") from None


def how_to_think(config: Config, vocabulary: Vocabulary, paid: bool) -> Thinking:
    """As the model was trained to: by its gate or, as long as neither price nor demonstrations have taught it anything, as often as it is made to."""
    taught = paid or config.demonstrate and vocabulary.meta.get("thoughts")
    hold = {} if taught else {"hold": config.hold}
    return Thinking(max_run=config.max_run, after=vocabulary.think_after(), window=config.window, hold_recall=None if paid else config.hold_recall, **hold)


def as_trained(state: dict, vocabulary: Vocabulary) -> Thinking:
    """How the model of a checkpoint thinks."""
    return how_to_think(Config(**state["config"]), vocabulary, state["progress"]["paid"])


# ----------------------------------------------------------------------------------------------
# the loop


def rolls_in_parallel(config: Config, device: str, rows: int) -> bool:
    """
    Sequential, a column costs what it costs to call the network, and its rows' share; parallel, there are few calls, but a column is computed again in
    every pass. On a CPU the calls are dear for few rows only (bench.py shows where), on a GPU for all. Dropout allows no second pass.
    """
    possible = not (config.dropout or config.window or config.recall)
    return config.rollout == "parallel" or config.rollout == "auto" and possible and (device != "cpu" or rows <= 16)


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
        self.parallel = torch.compile(self.model, dynamic=True) if config.compile else self.model
        self.optimiser = self.model.optimiser(config.lr, config.gate_lr, config.weight_decay, (config.beta1, config.beta2))
        named = [(".observer." in name, p) for name, p in self.model.named_parameters()]  # the observer's surprises must not shorten everyone's step
        self.clipped = [[p for watching, p in named if watching == which] for which in (False, True)]
        self.generator = torch.Generator().manual_seed(config.seed)  # rows
        self.noise = torch.Generator(self.device).manual_seed(config.seed)  # rollouts, cuts
        self.step, self.seconds, self.paid = 0, 0.0, False
        self.reached = 1 if config.curriculum else len(self.train_rows.levels)  # levels in use
        self.average = 2.0  # moving average of the loss of the longest level in use
        self.usage = torch.ones(config.n_think) / max(1, config.n_think)

    @property
    def thinking(self) -> Thinking:
        return how_to_think(self.config, self.vocabulary, self.paid)

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
            noise = load_dice(noise, batch.thoughts, batch.shown)
        if rolls_in_parallel(c, self.device, len(batch.real)):
            roll, passes = parallel_rollout(self.model, batch.real, batch.length, thinking, noise=noise)
        else:
            roll = rollout(self.model, batch.real, batch.length, thinking, noise=noise)
            passes = roll.stream.size(1) * (self.model.gate is not None)
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
            result[level] = round((right.float().mean() if asked else token_loss(self.model, roll, self.config.window).mean()).item(), 4)
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


def run(entry, name: str) -> None:
    """Call a main with the command line; what the user can mend becomes one sentence and exit code 1."""
    try:
        entry(sys.argv[1:])
    except (DataError, FloatingPointError) as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    run(main, "train.py")
