# %% [markdown]
# # Twelve exercises
#
# A trained model of the main job, chains modulo 5, is at hand; nothing needs to be trained for
# exercises 1 to 6 and 8. Each has a question to answer *before* you run anything: write your answer
# down, that is most of the exercise. Then replace what stands below `# your turn`, and run the
# check. `●○○` is easy, `●●●` is not. Answers: workshop/answers.md, folded.
#
# A row is worked from left to right, without precedence, modulo 5: in `3+4*2=` the running values
# are 3, 2 (=7 mod 5), 4 (=2*2). Words:
#
# - *row*: one task, such as `3+4*2=`, with its answer; tokens here are `3`, `+4`, `*2`, `=` ..
# - *cell* = *box* = *position*: one place in the sequence, a token or a thought
# - *rollout*: one walk along a row; at each cell the *gate* decides: think, or emit?
# - *cut*: a place in a row from which on nothing before it is visible
# - *d*: bits of a thought (8); *D*: numbers of an embedding (64); *B*: rows of a batch
# - modes, on the page and in the code: as trained = `policy`, none = `never`, random = `random`,
#   always 0 = `constant`, the second row's = `swapped`

# %%
import dataclasses
import math
import random
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

ROOT = next(
    folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "model.py").exists()
)
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F

import model
import train
from data.arithmetic import prepare
from lab.variants import reinforce
from workshop import kit

torch.set_num_threads(1)
gpt, vocabulary, thinking = kit.trained()
V = len(vocabulary.tokens)

# %% [markdown]
# ## 1. Decode the thoughts
# ●○○, 5 minutes. Behind each number of a row the model thinks one of 256 thoughts. In chains
# modulo 5 there are five running values.
#
# **Before you run it:** how many different thoughts will you see in 200 rows? Can two thoughts
# mean the same? Can one mean two things?

# %%
row = "3+4*2="
print(row, kit.thoughts([row])[0], kit.running_values(row))


def decode(thoughts: list[int], values: list[int]) -> dict[int, int]:
    """Thoughts and the running values beside them -> {thought: the value it stands for}."""
    # SOLUTION
    counts = Counter(zip(thoughts, values))
    return {thought: value for (thought, value), _ in reversed(counts.most_common())}
    # STUB
    # # your turn
    # return {thought: 0 for thought in thoughts}
    # END


# %%
def pairs(seed: int) -> list[tuple[int, int]]:
    rows = kit.new_rows(200, 8, seed)
    thoughts, values = kit.thoughts(rows), map(kit.running_values, rows)
    every = [pair for line in zip(thoughts, values) for pair in zip(*line)]
    return [(thought, value) for thought, value in every if thought >= 0]


code = decode(*zip(*pairs(seed=1)))
print(dict(sorted(code.items(), key=lambda item: item[1])))
hits = [code.get(thought) == value for thought, value in pairs(seed=2)]
assert sum(hits) > 0.98 * len(hits), f"on new rows your code is right in {sum(hits)} of {len(hits)}"

# %% [markdown] answer
# A dozen with the model in play.html: several thoughts mean the same value, since nothing in the
# loss asks for one name each. None means two values: the answers behind it would be wrong.

# %% [markdown]
# ## 2. Change one thought
# ●○○, 5 minutes. Behind the number at `place` (0 is the first) the model has to think of another
# running value than the true one. Everything else is as it was: the row can still be read.
# `kit.operations("3+4*2=")` is `[("+", 4), ("*", 2)]`; `kit.apply(3, "+", 4)` is 2.
#
# **Before you run it:** what will it answer to `3+4*2=` if behind `+4` it thinks "4"? What it
# would have answered anyway, what the changed value leads to, or something else?


# %%
def predict(row: str, place: int, value: int) -> int:
    """The answer of a model that believes in `value` behind the number at `place`."""
    # SOLUTION
    for sign, x in kit.operations(row)[place:]:
        value = kit.apply(value, sign, x)
    return value
    # STUB
    # # your turn: what does it answer, and why?
    # return kit.running_values(row)[-1]
    # END


# %%
def changed_rows(count: int) -> tuple[list[str], list[tuple[int, int]], list[int]]:
    """Rows with your answers, which thought the model has to think where, and what it says."""
    draw, names, rows, instead, values = random.Random(0), {}, [], [], []
    for thought, value in pairs(seed=1):
        names.setdefault(value, thought)
    for row in kit.new_rows(count, 6, seed=3):
        place = draw.randrange(1, 6)
        value = (kit.running_values(row)[place] + draw.randrange(1, 5)) % 5
        rows.append(f"{row.partition('=')[0]}={predict(row, place, value)}")
        instead.append((place, names[value]))
        values.append(value)
    return rows, instead, values


rows, instead, values = changed_rows(100)
as_you_said = kit.says(rows, instead)
message = f"right in {sum(as_you_said)} of 100"
if not all(as_you_said):
    wrong = as_you_said.index(False)
    row, _, yours = rows[wrong].partition("=")
    message += f"; for example {row}=, place {instead[wrong][0]}, believes {values[wrong]}: "
    message += f"it does not answer {yours} (left to right, modulo 5)"
print(message)
assert sum(as_you_said) >= 95, message

# %% [markdown] answer
# It goes on from the changed value: `4*2` is 3 modulo 5. The row is in full view, but the answer
# does not come from it: thoughts are a cause of the answer, not a comment on it.

# %% [markdown]
# ## 3. Knock the thoughts out
# ●○○, 8 minutes. `model.Thinking.mode` takes thoughts away (`never`) or what they say (`random`,
# `constant`, `swapped`). `train.evaluate(gpt, batch, thinking, generator)` returns the rollout,
# which answers are right, (B,), and the loss. `policy` is the model as trained; give
# `torch.Generator().manual_seed(0)` so that `random` repeats.
#
# **Before you run it:** guess the share of right answers in each mode; chance is 0.2. A network
# that was *trained* with one constant thought, a pause token, has the same extra cells to compute
# in: will it be better than chance?

# %%
rows = kit.batch_of(kit.new_rows(200, 8, seed=4), vocabulary)


def knock_out(batch) -> dict[str, float]:
    """-> {mode: share of answers right} for every mode of model.MODES."""
    # SOLUTION
    shares = {}
    for mode in model.MODES:
        changed, generator = dataclasses.replace(thinking, mode=mode), torch.Generator()
        _, right, _ = train.evaluate(gpt, batch, changed, generator.manual_seed(0))
        shares[mode] = right.float().mean().item()
    return shares
    # STUB
    # # your turn: dataclasses.replace(thinking, mode=mode) is a changed copy
    # return {mode: 1.0 for mode in model.MODES}
    # END


# %%
shares = knock_out(rows)
print(shares)
assert list(shares) == list(model.MODES), f"a share for each of {model.MODES}"
assert shares["policy"] > 0.95, f"as trained it is right in {shares['policy']:.2f}, not above 0.95"
high = [mode for mode, share in shares.items() if mode != "policy" and share >= 0.45]
assert not high, f"{high}: 0.45 or more right without its own thoughts: was the mode set?"

# %% [markdown] answer
# 1.00, and 0.07 (`random`) to 0.20 (`never`) for the others: nowhere better than chance. Trained
# pause tokens: 0.175 to 0.250 in five seeds (`python lab/experiments.py main --models=pause`): more
# cells do not help, what they say does.

# %% [markdown]
# ## 4. How much must it see?
# ●○○, 8 minutes. `thinking.window` is the number of positions in view, tokens and thoughts
# counted, the cell itself among them. The model was trained on rows of at most 8 operations; here
# are rows of 64.
#
# **Before you run it:** with everything in view, is it better or worse than in a window of 8? What
# is the smallest window that it can do with? Count the cells that it needs, on paper.

# %%
long_rows = kit.batch_of(kit.new_rows(20, 64, seed=5), vocabulary)


def right_in(window: int) -> float:
    changed = dataclasses.replace(thinking, window=window)
    return train.evaluate(gpt, long_rows, changed)[1].float().mean().item()


def smallest_window() -> int:
    """
    -> the least number of positions in view at which 95% of `long_rows` are right. 0 is all. Try
    from 1 upwards: more is not always better.
    """
    # SOLUTION
    return next(window for window in range(1, 130) if right_in(window) >= 0.95)
    # STUB
    # # your turn
    # return 128
    # END


# %%
window = smallest_window()
share, less = right_in(window), right_in(window - 1) if window > 1 else 0.0
print(f"all in view {right_in(0):.2f}, {window} positions {share:.2f}")
message = f"right in {window}: {share:.2f}, it should be 0.95 or more; in one less: {less:.2f}, "
assert window > 0 and share >= 0.95 > less, message + "it should be less than 0.95"

# %% [markdown] answer
# To go on it needs two cells: the operation, and the thought before it. To answer it needs three
# (the model in play.html): the answer comes from the thought behind `=`, which says nothing of its
# own, and looks over `=` at the last value's thought. Forbid that one thought on the page, and two
# are enough. In full view it is worse, since distances come up that it never met in training. What
# it carries along is a *state*, one of five values.

# %% [markdown]
# ## 5. Write the echo
# ●●○, 12 minutes. `h` (d = 8 numbers) comes out of the cell before; the bits are
# z = sign(h) = +-1; the thought goes in as `W z + b` (D = 64). A sign has no useful gradient, so
# `Thoughts.echo(h)` is added to the embedding. Its value is zero, but backward it acts as if the
# bits had been `tanh(h)`: a straight-through estimator (Bengio et al. 2013). `x.detach()` has the
# same value as `x` and no gradient.
#
# **Before you run it, on paper:** the loss has gradient g, (D,), with respect to the thought's
# embedding `W z + b`, W of shape (D, d). What is the gradient of h_i? What is it for a bit with
# h_i = 5?


# %%
def echo(self, h):
    """self: a model.Thoughts; h (..., d) -> (..., D): all zeros, with a gradient."""
    # SOLUTION
    soft = h.tanh()
    return F.linear(soft - soft.detach(), self.embedding.weight)
    # STUB
    # # your turn: the value must be zero
    # return F.linear(h.tanh(), self.embedding.weight)
    # END


def by_hand(W, h, g):
    """W (D, d), h (d,), g (D,) -> (d,), what you found on paper."""
    # SOLUTION
    return (1 - h.tanh() ** 2) * (g @ W)
    # STUB
    # # your turn
    # return g @ W
    # END


# %%
h, g = torch.tensor([0.3, -2.0, 5.0, 0.0, 1.0, -1.0, 0.5, 3.0], requires_grad=True), torch.randn(64)
(of_echo,) = torch.autograd.grad((gpt.thoughts.echo(h) * g).sum(), h)
kit.same(by_hand(gpt.thoughts.embedding.weight, h, g).detach(), of_echo, "your gradient by hand")
print("by hand: passed")

# %%
zeros, gradient = echo(gpt.thoughts, h), None
if zeros.requires_grad:
    (gradient,) = torch.autograd.grad((zeros * g).sum(), h, allow_unused=True)
assert gradient is not None and gradient.any(), "your echo passes no gradient back to h"
kit.same(zeros, torch.zeros(64), "the value of your echo")
kit.same(gradient, of_echo, "the gradient through your echo")


def head_gradient():
    """Of a rollout's loss, for the weights that choose the bits."""
    batch = kit.batch_of(kit.new_rows(8, 3, seed=6), vocabulary)
    _, out = train.rollout(gpt, batch.real, batch.length, thinking)
    return torch.autograd.grad(out.loss.sum(), gpt.thoughts.head.weight)[0]


expected = head_gradient()
with patch.object(model.Thoughts, "echo", echo):
    kit.same(head_gradient(), expected, "the gradient through a rollout with your echo")
print("echo: passed")

# %% [markdown] answer
# The gradient of h_i is (1 - tanh(h_i)^2) times g W_i, the product of g with column i of W. At
# h_i = 5 it is 0.00018 of what it is at 0: a bit that is sure is hardly moved any more.

# %% [markdown]
# ## 6. Write the forgetting mask
# ●●○, 10 minutes. Where a row is *cut* nothing that came before is visible from there on.
# `train.draw_plan` draws the cuts; each cut begins a new segment, and `model.visible` makes the
# mask. `segment` holds the number of each cell's segment, for example 0 0 0 1 1 1. Cells alternate
# token, thought, ...; a thought's bits were chosen by the cell before it.
#
# **Before you run it:** draw the mask of six cells with a cut behind the third. Which cell after
# the cut can still tell what the first three said?


# %%
def forgetting_mask(segment):
    """segment (B, C) -> (B, C, C) bool: [b, i, j] is True where cell i sees cell j."""
    # SOLUTION
    C = segment.size(1)
    causal = torch.ones(C, C, dtype=torch.bool).tril()
    return causal & (segment[:, :, None] == segment[:, None, :])
    # STUB
    # # your turn: this one never forgets
    # B, C = segment.shape
    # return torch.ones(C, C, dtype=torch.bool).tril().expand(B, C, C)
    # END


# %%
print(forgetting_mask(torch.tensor([[0, 0, 0, 1, 1, 1]]))[0].int())
batch, forced = kit.batch_of(kit.new_rows(16, 5, seed=7), vocabulary), dataclasses.replace(thinking)
torch.manual_seed(0)
forced.force = 1.0  # think behind every token, as in the warm-up
plan = train.draw_plan(batch, forced, 1.0, torch.zeros(16, dtype=torch.bool))
with torch.no_grad():
    grid, out = train.rollout(gpt, batch.real, batch.length, forced, **plan)
    ids = grid.token[:, :-1, :2].flatten(1)  # (B, C) token, thought, token, thought ..
    segment = F.pad(plan["cuts"][:, :-1, None].long(), (1, 0)).flatten(1).cumsum(dim=1)
    cells = model.Cells(torch.arange(ids.size(1)).expand_as(ids), segment)
    yours, expected = forgetting_mask(segment), model.visible(cells, cells)
    assert yours.shape == expected.shape, f"shape {tuple(yours.shape)}, not (B, C, C)"
    for b, i, j in (yours != expected).nonzero().tolist()[:1]:
        says = "sees" if yours[b, i, j] else "does not see"
        where = f"they are in segments {segment[b, i]} and {segment[b, j]}"
        raise AssertionError(f"row {b}: cell i = {i} (from 0) {says} cell j = {j}; {where}")
    with patch("model.visible", lambda query, key, window: forgetting_mask(key.segment)):
        logits = gpt(ids, cells).logits
    loss = F.cross_entropy(logits[:, 1::2].flatten(0, 1), batch.real[:, 1:].flatten())
    kit.same(loss, out.loss[:, :-1, 1].mean(), "the loss of a rollout with your mask")
print("passed")

# %% [markdown] answer
# A cell sees an earlier one of the same segment. The cut is behind a token, before its thought:
# cell 4, the thought itself, was chosen by cell 3, which had seen everything, and is the first
# that is visible afterwards. So it is the only messenger, and what is needed later has to be in
# its bits.

# %% [markdown]
# ## 7. Train without forgetting
# ●●○, 10 minutes, a quarter of a minute of it for each run. `kit.tiny_run(forget=0.8)` trains on
# chains modulo 3 of at most 3 operations; every field of `train.Config` can be given.
#
# **Before you run it:** without cuts the model can always look the row up. How much will its
# thoughts tell about the running value, of 1.09 nats? Will its answers be right?


# %%
def never_forgets():
    """-> a small run in which no row is ever cut."""
    # SOLUTION
    return kit.tiny_run(forget=0.0)
    # STUB
    # # your turn
    # return kit.tiny_run()
    # END


# %%
told = {}
for name, small in (("with cuts", kit.tiny_run()), ("without", never_forgets())):
    told[name] = kit.meant(small)["mutual_information"]
    print(f"{name}: thoughts tell {told[name]:.2f} nats, forget = {small.config.forget}")
assert never_forgets().config.forget == 0 and kit.tiny_run().config.forget > 0
assert not kit.LEARNS or told["with cuts"] > told["without"] + 0.3

# %% [markdown] answer
# Far less: 0.09 nats here, against 1.05 with cuts (seed 2), and 0.68 of the longest rows are right,
# against 1.00. A thought that repeats what attention can look up earns nothing, so nothing makes it
# mean anything. It is forgetting, not the price, that gets thoughts read.

# %% [markdown]
# ## 8. Teach the gate
# ●●○, 12 minutes. Each choice of the gate is yes or no: think on, or emit. To know what it was
# worth, a sequence is rolled out several times: first as the gate wants, then as a *try*, in which
# it is not followed at one place. `gained` says by how much the try did better, from there on, than
# the first rollout; `yes` what was done there. Turn that into a loss: a cross-entropy that says
# "do it" where something was gained, and else "do not", times how much.
#
# **Before you run it:** thinking costs .05 nats nine times, and saves 1 nat the tenth time. Should
# the gate say yes? Would it, if you left out "times how much"?


# %%
def gate_loss(logit, yes, tried, gained):
    """Four tensors of one shape -> scalar: the mean over where `tried` is true."""
    # SOLUTION
    better = torch.where(gained > 0, yes, ~yes)
    log_p = F.logsigmoid(torch.where(better, logit, -logit))
    return -(gained.abs() * log_p * tried).sum() / tried.sum()
    # STUB
    # # your turn: this one leaves out how much was gained
    # better = torch.where(gained > 0, yes, ~yes)
    # log_p = F.logsigmoid(torch.where(better, logit, -logit))
    # return -(log_p * tried).sum() / tried.sum()
    # END


# %%
logit, yes = torch.randn(8, 5, 4), torch.rand(8, 5, 4) < 0.5
gained, tried = torch.randn(8, 5, 4), torch.rand(8, 5, 4) < 0.3
expected = train.gate_loss(logit, yes, tried, gained)
kit.same(gate_loss(logit, yes, tried, gained), expected, "your loss")
batch = kit.batch_of([row for row in kit.new_rows(4, 3, seed=8) for _ in range(4)], vocabulary)
asking, of = dataclasses.replace(thinking, force=None), torch.arange(16) // 4 * 4
tries = train.draw_tries(batch, asking, recall=0.0)
tries[::4] = of[::4] = train.NO_TRY  # the first of four goes as the gate wants
grid, out = train.rollout(gpt, batch.real, batch.length, asking, tries=tries)
terms = train.hybrid_loss(gpt, grid, out, batch, of, train.Config(), True)
with patch.object(train, "gate_loss", gate_loss):
    yours = train.hybrid_loss(gpt, grid, out, batch, of, train.Config(), True)
kit.same(yours["gate"].detach(), terms["gate"].detach(), "the gate's term with your loss")

# %% [markdown] answer
# Yes: on average a thought gains (1 - 9 * .05) / 10 = .055 nats. The loss is least where
# p / (1 - p) is what yes gains in all over what it loses in all, 1 / .45, so the logit is positive.
# Without "how much" only the count would matter, nine to one against thinking.

# %% [markdown]
# ## 9. Too few thoughts
# ●●○, 15 minutes. With one bit there are two thoughts for three running values
# (`kit.tiny_run(n_bits=1)`; in the main job: `python train.py --n_bits=2`, four for five).
# `counts` (X, Y) says how often each of X thoughts stood beside each of Y values.
#
# **Before you run it:** what is the best that can be done with two thoughts and three values? Which
# values will be merged: can you know?


# %%
def merged(counts: list[list[int]]) -> list[set[int]]:
    """-> the sets of two or more values that are mostly told by the same thought."""
    # SOLUTION
    best = torch.tensor(counts).argmax(dim=0).tolist()  # of each value, its most frequent thought
    groups = [{y for y, x in enumerate(best) if x == thought} for thought in set(best)]
    return [group for group in groups if len(group) > 1]
    # STUB
    # # your turn
    # return []
    # END


# %%
assert merged([[9, 0, 1], [0, 8, 7]]) == [{1, 2}] and merged([[5, 0], [0, 5]]) == []
found = kit.meant(kit.tiny_run(n_bits=1))
print(f"thoughts {found['thoughts']}, counts {found['counts']}, merged {merged(found['counts'])}")
assert len(found["thoughts"]) <= 2 and (merged(found["counts"]) or not found["thoughts"])

# %% [markdown] answer
# Two of three values share a thought; rows that end on the two are right half of the time, so at
# best two thirds of all. Small runs reach less: if values are merged, their products and sums are
# merged, too, and addition modulo 3 permits no merging that stays consistent. Which two is luck of
# the seed.

# %% [markdown]
# ## 10. What does a thought cost?
# ●●●, 20 minutes. Does a higher price mean fewer thoughts? One run a price answers little: runs
# differ by their seeds. Report a mean and the half width of its 95% confidence interval: the
# standard deviation (n - 1), over the root of n, times Student's t, 4.303 for n = 3, 2.776 for 5.
#
# Six runs, a minute and a half.
#
# **Before you run it:** at which price, in nats, does a thought no longer pay, if without it
# an answer of three values must be guessed?

# %%
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def summary(values: list[float]) -> tuple[float, float]:
    """-> the mean, and the half width of its 95% interval."""
    # SOLUTION
    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, STUDENT[n] * deviation / math.sqrt(n)
    # STUB
    # # your turn: a mean alone says nothing about luck
    # return sum(values) / len(values), 0.0
    # END


# %%
mean, half = summary([1.0, 2.0, 3.0])
assert mean == 2 and abs(half - 2.484) < 0.001
for price in (0.05, 1.0):
    counts = []
    for seed in (1, 2, 3):
        run = kit.tiny_run(seed=seed, think_cost=price)
        batch = run.val_rows.first(100, run.val_rows.levels[-1])
        grid, _, _ = train.evaluate(
            run.model, batch, dataclasses.replace(run.thinking, greedy=True)
        )
        counts.append(grid.thinks.sum().item() / len(batch.real))
    mean, half = summary(counts)
    print(f"price {price}: {mean:.2f} +- {half:.2f} thoughts a row, of 6 places; {counts}")

# %% [markdown] answer
# Guessing one of three costs ln 3 = 1.10 nats, so the four thoughts that carry the value through a
# row of three operations must cost less than 0.27 nats each. Here: 5.61 +- 0.71 thoughts a row at
# 0.05 nats, 1.02 +- 4.37 at 1.0 (seeds 1, 2, 3: none, none, 3.05). Two of three have given thinking
# up, and still the second interval holds the first: with three seeds it reaches 2.5 standard
# deviations to each side. The price acts in the last fifth of the steps only.

# %% [markdown]
# ## 11. A task of your own
# ●●●, 30 minutes. A file of `question=answer` lines is a task. One that is worth thoughts has an
# answer that depends on *all* of the question, through a state that can be kept in few bits.
#
# **Before you run it:** how many states does your task have? What can be said of the answer by
# someone who saw only the last character?


# %%
def my_rows(draw: random.Random) -> list[str]:
    """-> at least 1,000 lines question=answer, questions of 1 to at least 6 characters."""
    # SOLUTION
    rows = []
    for _ in range(4000):
        letters = draw.choices("abc", k=draw.randint(1, 10))
        rows.append(f"{''.join(letters)}={(letters.count('b') - letters.count('c')) % 3}")
    return rows
    # STUB
    # # your turn: this answer is the last character, which nobody needs to think for
    # words = ["".join(draw.choices("012", k=draw.randint(1, 10))) for _ in range(4000)]
    # return [f"{word}={word[-1]}" for word in words]
    # END


# %%
kit.FOLDER.mkdir(parents=True, exist_ok=True)
(kit.FOLDER / "mine.txt").write_text("\n".join(my_rows(random.Random(0))) + "\n")
prepare.main([f"--input={kit.FOLDER / 'mine.txt'}", f"--out={kit.FOLDER / 'mine'}"])
long = [row for row in set(my_rows(random.Random(0))) if row.index("=") >= 4]
by_last = {}
for row in long:
    by_last.setdefault(row[row.index("=") - 1], []).append(row.partition("=")[2])
guessed = sum(Counter(answers).most_common(1)[0][1] for answers in by_last.values()) / len(long)
print(f"by the last character alone {guessed:.0%} can be guessed")
assert len(long) >= 500 and len({row.index("=") for row in long}) >= 3 and guessed < 0.7

# %% [markdown] answer
# Here: the number of b less that of c, modulo 3: three states, and the last letter tells nothing.
# Train it with `python train.py config/automata.toml --data=out/data/mine --out=out/mine`, then
# `python workshop/play.py --run=out/mine` writes a page of it.

# %% [markdown]
# ## 12. REINFORCE in place of the echo
# ●●●, 45 minutes with training. Instead of a gradient for each bit, reinforce the thought as a
# whole: minus the mean, over all thoughts, of its advantage times `gpt.thoughts.log_probability`.
# The return is what emitting later costs (`train.return_to_go`, price 0), the baseline, what the
# other rollouts of the sequence returned on average, is `reinforce.baseline`.
#
# **Before you run it:** a row of 5 thoughts of 8 bits gets one number from REINFORCE. How many does
# it get through the echo? Which estimator is unbiased, and which learns sooner?


# %%
def reinforce_term(gpt, grid, out, batch, config):
    """-> scalar, the loss term of what was thought."""
    # SOLUTION
    cost = out.loss.detach() * train.counted_tokens(batch)
    returns = train.return_to_go(cost, grid, 0.0, config.horizon)
    advantage = returns - reinforce.baseline(returns, reinforce.ROLLOUTS)
    log_p = gpt.thoughts.log_probability(out.thoughts, grid.next_thought(gpt.config.vocab_size))
    return -train.mean(advantage * log_p, grid.thinks)
    # STUB
    # # your turn: this one forgets the baseline
    # cost = out.loss.detach() * train.counted_tokens(batch)
    # returns = train.return_to_go(cost, grid, 0.0, config.horizon)
    # log_p = gpt.thoughts.log_probability(out.thoughts, grid.next_thought(gpt.config.vocab_size))
    # return -train.mean(returns * log_p, grid.thinks)
    # END


# %%
torch.manual_seed(0)
batch = kit.batch_of([row for row in kit.new_rows(4, 3, seed=9) for _ in range(4)], vocabulary)
drawn = dataclasses.replace(thinking, greedy=False, force=1.0, mode="random")  # any thought at all
grid, out = train.rollout(gpt, batch.real, batch.length, drawn)
config, of = train.Config(), torch.full((16,), train.NO_TRY)
expected = reinforce.hybrid_loss(gpt, grid, out, batch, of, config, False)["thoughts"]
term = reinforce_term(gpt, grid, out, batch, config)
kit.same(term.detach(), expected.detach(), "your term")

# %% [markdown] answer
# Through the echo each of the 40 bits gets a number of its own, and from every later token that
# attends to it. REINFORCE is unbiased, the echo is not: it takes a sign for a slope. It learns all
# the same, and sooner: after 800 steps 8 operations are right in .995 to 1.000 with the echo, in
# .180 to .205 with REINFORCE, which is chance (three seeds each). The whole variant is
# `python lab/variants/reinforce.py --steps=800 --warm_up=1 --out=out/reinforce`; a softmax over
# thoughts in place of bits: lab/variants/softmax.py.
