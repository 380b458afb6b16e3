"""
The loss that makes thoughts mean something: forgetting, the echo, the hybrid loss term by term, wrong words to be taken back.

Every term is a plain function of tensors with its formula in the docstring, and has a test that works it out by hand.
Not here: how streams are made (stream.py), the network (model.py), the loop (train.py).

Glossary beside model.py's
  pass 1    one parallel forward over the recorded streams, everything in view that was in view as they were made
  pass 2    another, in which columns from the row's cut on see only columns from the cut on
  cut       the column of a thought; what came before it is forgotten
  price     think_cost, in nats a thought; recall_cost, in nats a RECALL
  nats      natural-log units of loss
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Batch
from fast import read_packed
from model import GPT, Output
from runs import RANK, WORLD, Config, mean, total
from stream import Rollout, Thinking, read, speak

# ----------------------------------------------------------------------------------------------
# forgetting and echo


class Cuts(NamedTuple):
    """What each row forgets in pass 2."""

    first: Tensor  # (B, C) bool, True at the first column that stays in view; at most one a row that has an answer
    hidden: Tensor  # (B, C) bool: thoughts behind it that are taken away, too
    depth: Tensor  # (B,) places for a cut that lie behind it, in rows with such hidden thoughts; 0 in the others


def draw_cuts(roll: Rollout, prompt: Tensor, forget: float, late: float = 0.0, generator=None) -> Cuts:
    """
    A cut falls right after a real token of the prompt (never its last one) that a thought follows, so that this thought is the first thing in view. A share
    `forget` of the rows forgets, at any such place alike. But a share `late` of them is cut at the last place, or the one before, or the one before that ..,
    with probabilities 1/2, 1/4, 1/8 .., and thinks no more behind it. Then the thought at the cut must tell by itself what the
    next few words need: not only the answer, but all that makes a difference to it later. Otherwise a later thought, thought in full view, would know it.
    A text is all prompt and every word of it counts: there each such place of a row that forgets is a cut, and `late` means nothing.
    """
    B, C = roll.stream.shape
    eligible = roll.thinks & roll.holds_real & (roll.pointer < prompt[:, None])
    shapes = total(F.one_hot(torch.tensor(RANK), WORLD)[:, None] * torch.tensor([B, C]))  # (WORLD, 2): drawn for all processes' rows, whoever's they are
    rows, start, widest = int(shapes[:, 0].sum()), int(shapes[:RANK, 0].sum()), int(shapes[:, 1].max())
    draw = lambda columns: torch.rand(rows, columns, generator=generator, device=roll.stream.device)[start : start + B, :C]  # noqa: E731
    anywhere = draw(widest).masked_fill(~eligible, -1)
    behind = eligible.flip(1).cumsum(dim=1).flip(1) - 1  # (B, C) places behind each place
    depth = torch.minimum((-draw(1).clamp(min=1e-6).log2()).long(), behind[:, :1]).clamp(min=0)  # (B, 1)
    is_text = (prompt == roll.length)[:, None]  # (B, 1)
    is_late, is_cut = (draw(1) < late) & ~is_text, draw(1) < forget
    place = torch.where(is_late, behind == depth, F.one_hot(anywhere.argmax(dim=1), C).bool()) | is_text
    first = F.pad((place & eligible & is_cut)[:, :-1], (1, 0))  # the thought stands one column behind the token it follows
    pointer = (roll.pointer * first).sum(dim=1, keepdim=True)  # (B, 1) the real token behind the cut; 0 without a cut
    is_late = is_late & (pointer > 0)
    hidden = is_late & F.pad(roll.thinks[:, :-1], (1, 0)) & (roll.pointer > pointer)
    return Cuts(first, hidden, (depth * is_late)[:, 0])


def echo(model: GPT, roll: Rollout, h: Tensor, chosen: Tensor) -> Tensor:
    """
    Straight-through embeddings of the streams: W z + W (tanh(h) - stop_gradient(tanh(h))) for a thought of bits z, h (B, C, d) the numbers that chose them in
    pass 1, at the columns `chosen` (B, C). The value is W z; backward, whatever is said later reaches those numbers. -> (B, C, n_embd).
    After Bengio et al. 2013, arXiv:1308.3432.
    """
    carry = torch.where(chosen[..., None], model.thoughts.echo(h), 0)  # all zeros
    return model.embed(roll.stream) + F.pad(carry, (0, 0, 1, 0))[:, :-1]  # a thought stands one column behind its numbers


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


def thought_log_probability(model: GPT, h: Tensor, roll: Rollout) -> Tensor:
    """Numbers of the bits (B, C, d) -> (B, C): log p of the thought that follows each column, in nats; 0 where none does."""
    chosen = F.pad(roll.stream[:, 1:] - model.config.vocab_size, (0, 1)).clamp(0, model.config.n_think - 1)
    return model.thoughts.log_probability(h, chosen) * roll.thinks


def first_own(batch: Batch) -> Tensor:
    """-> (B, 1): index of the first real token that the model may have said itself: the answer's first, or the second of a row without an answer."""
    return torch.where(batch.prompt < batch.length, batch.prompt, 1)[:, None]


def wrong_words(batch: Batch, V: int, corrupt: float, generator=None) -> Tensor:
    """
    -> (B, T): a wrong word for some of the real tokens, -1 for the others. Those that the data hold, and else, with the probability `corrupt`, one of the
    other words; of a row with an answer only in the answer, since nobody takes back what it was asked.
    """
    B, T = batch.real.shape
    place = torch.arange(T, device=batch.real.device)
    own = (place >= first_own(batch)) & (place < batch.length[:, None])
    tries = torch.rand(B, T, generator=generator, device=place.device) < corrupt
    other = torch.randint(1, V, (B, T), generator=generator, device=place.device)
    drawn = torch.where(own & tries, (batch.real + other) % V, -1)
    return torch.where(batch.wrong >= 0, batch.wrong, drawn)


def with_wrong_words(roll: Rollout, wrong: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    sees = (column <= behind[..., None]) & ~roll.opens[:, None] & (back < (roll.window or C + 1))
    mask = roll.view()
    mask = (column[:, None] >= column).expand(B, C, C) if mask is None else mask[:, 0]
    alone = torch.eye(E, dtype=torch.bool, device=device).expand(B, E, E)
    rows = torch.cat([F.pad(mask, (0, E)), torch.cat([sees, alone], dim=2)], dim=1)
    return word.clamp(min=0), word >= 0, position, rows[:, None]


def first_pass(model: GPT, here: Tensor, roll: Rollout, batch: Batch, config: Config) -> tuple[Output, Tensor]:
    """Pass 1 over the embedded streams (B, C, n_embd), and with REVISE over wrong words beside them -> output of the streams, loss of not taking those back."""
    if not config.revise:
        return read_packed(model, roll, x=here), here.new_zeros(())
    C, V = roll.stream.size(1), model.config.vocab_size
    word, there, position, mask = with_wrong_words(roll, batch.wrong)
    out = model(torch.cat([here, model.embed(word)], dim=1), mask, position=position)
    regret = -out.words[:, C:].log_softmax(dim=-1)[..., V]  # (B, E)
    asked = roll.valid & (roll.pointer >= first_own(batch))  # weigh a wrong word like a right one
    return Output(*(part[:, :C] for part in out)), total((regret * there).sum()) / total(asked.sum()).clamp(min=1)


def rows_right(words: Tensor, roll: Rollout, answer: Tensor) -> Tensor:
    """(B, C, V) logits -> (B,) bool: at all columns of `answer` (B, C) that speak, the likeliest word is the right one."""
    return ((words.argmax(-1) == targets(roll)) | ~(answer & roll.speaks)).all(dim=1)


def late_loss(model: GPT, roll: Rollout, batch: Batch, x: Tensor, full: Output, answer: Tensor, config: Config, forget: float, generator) -> Tensor:
    """Token loss behind one more late cut a row -> scalar. Hardly any columns are behind it, so that it costs little beside the rollout and pass 1."""
    cut = draw_cuts(roll, batch.prompt, forget, 1.0, generator)
    short = roll.without_thoughts(cut.hidden)
    loss = word_loss(read_packed(model, short, cut.first, x, full).words, short)
    return weighted(loss, short, answer, config.prompt_weight, config.charge_thinking)


def hybrid_loss(model: GPT, roll: Rollout, batch: Batch, config: Config, paid: bool, generator=None) -> tuple[Tensor, dict]:
    """
    All of a training step but the rollout and the optimiser -> loss, {name: number} and, for the curriculum, "right" (B,) bool: the answer is right with
    the past cut off, and "asked" (B,) bool: rows where one may expect it.
    """
    answer = roll.valid & (roll.pointer >= batch.prompt[:, None])  # (B, C) columns that would say a token of the answer
    shown = batch.shown[:, None]  # (B, 1) the row's thoughts are demonstrated
    here = model.embed(roll.stream)  # (B, C, n_embd)
    full, regret = first_pass(model, here, roll, batch, config)  # pass 1
    loss_full = loss_kept = word_loss(full.words, roll)
    loss = weighted(loss_full, roll, answer, config.prompt_weight, config.charge_thinking) + regret
    right = rows_right(full.words, roll, answer)
    log = {"loss": loss.item(), "accuracy": mean(right.float(), torch.ones_like(right)).item(), "asked": torch.ones_like(right)}
    if config.revise:
        log["regret"] = regret.item()

    if model.config.n_think:  # pass 2
        x = echo(model, roll, full.thoughts, roll.thinks & ~shown) if config.thought_grad == "echo" else here
        forget = config.forget_paid if paid else config.forget
        cut = draw_cuts(roll, batch.prompt, forget, config.cut_late, generator)
        short = roll.without_thoughts(cut.hidden)
        again = not forget and not config.dropout and not config.compile  # what pass 2 would say was said in pass 1 already
        kept = full if again else read_packed(model, short, cut.first, x, full)
        loss_kept = word_loss(kept.words, short)
        mean_kept = weighted(loss_kept, short, answer, config.prompt_weight, config.charge_thinking)
        loss, log["loss_forgotten"] = loss + mean_kept, mean_kept.item()
        for _ in range(config.cuts - 1 if forget else 0):
            loss = loss + late_loss(model, roll, batch, x, full, answer, config, forget, generator)
        if again and config.thought_grad == "echo":  # the gradient that would have reached x, sent on to the numbers; x - here is zero
            loss = loss + ((x - here) * torch.autograd.grad(mean_kept, here, retain_graph=True)[0]).sum()
        if config.imitate and forget:  # with the past forgotten, think what was thought in full view
            behind = short.thinks & (cut.first.cumsum(dim=1) > 0)
            loss = loss - config.imitate * mean(thought_log_probability(model, kept.thoughts, short), behind)
        right, log["asked"] = rows_right(kept.words, short, answer), cut.depth == 0

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
        returns = return_to_go(loss_kept.detach() * weight, short, 0.0, config.horizon)
        action = thought_log_probability(model, full.thoughts, short)
        loss = loss + policy_gradient(action, returns - leave_one_out(returns, short, config.rollouts), short.thinks & ~shown)
    if batch.thoughts.size(2):  # what to think, and when, as demonstrated
        told = thought_log_probability(model, full.thoughts, roll)
        loss = loss - mean(told, roll.thinks & shown) - mean(log_choice(thinking, roll.thinks, 0.0), roll.decides & shown)

    return loss, log | {"right": right}


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
def token_loss(model: GPT, roll: Rollout) -> Tensor:
    """-> (B, T - 1): -log p of each real token but the first where it was said, in nats; 0 behind a row's end."""
    trained = model.training
    model.eval()
    loss = word_loss(read(model, roll).words, roll) * roll.speaks
    model.train(trained)
    return loss.new_zeros(len(loss), roll.real.size(1) + 1).scatter_add(1, roll.pointer, loss)[:, 1:-1]
