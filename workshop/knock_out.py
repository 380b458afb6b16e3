# %% [markdown]
# # Train it, knock it out
#
# The main job, chains modulo 5 of 1 to 8 operations, from nothing: about a minute on one core. Then
# its thoughts are taken away, in four ways.

# %%
import dataclasses
import sys
from pathlib import Path

ROOT = next(
    folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "model.py").exists()
)
sys.path.insert(0, str(ROOT))
import matplotlib.pyplot as plt
import torch

import model
from data.dataset import load_split
from lab import report
from workshop import kit

torch.set_num_threads(1)

# %% [markdown]
# ## Train
# **Before you run it:** in which order will it learn the lengths, and does each take longer than
# the one before?

# %%
trainer, logs = kit.main_job(), []
while trainer.left > 0:
    logs.append(trainer.train_step())
gpt = trainer.model.eval()
print(f"{trainer.step} steps, levels learned: {trainer.curriculum.mastered}")

# %%
figure, (right, level) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
steps = [log["step"] for log in logs]
right.plot(steps, [log["right"] for log in logs], lw=0.7)
right.set(ylabel="right in training", ylim=(0, 1))
level.step(steps, [log["level"] for log in logs])
level.set(xlabel="step", ylabel="longest length in use")
plt.show()

# %% [markdown]
# ## Knock it out
# `never` takes thoughts away; `random`, `constant` and `swapped` leave them where they are and
# change what they say. **Before you run it:** draw the five curves.

# %%
thinking = dataclasses.replace(trainer.thinking, greedy=True)
folder, vocabulary = trainer.config.data, trainer.vocabulary
names = ("val", "test") if kit.LEARNS else ("val",)
splits = [load_split(folder, name, vocabulary, 64) for name in names]


def accuracy(mode: str, window: int = 0) -> dict[int, float]:
    how = dataclasses.replace(thinking, mode=mode, window=window)
    return report.accuracy(gpt, splits, how, 50)["accuracy"]


curves = {mode: accuracy(mode) for mode in model.MODES}
curves["policy, window of 8"] = accuracy("policy", 8)

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for name, curve in curves.items():
    axis.plot([*curve], [*curve.values()], marker="o", ms=4, label=name)
axis.axvspan(splits[0].levels[0], splits[0].levels[-1], color="0.92", label="trained")
axis.set(xscale="log", xlabel="operations", ylabel="answers right", ylim=(-0.02, 1.03))
axis.legend()
plt.show()
longest = splits[0].levels[-1]
print({name: curve[longest] for name, curve in curves.items()}, f"at {longest} operations")
if kit.LEARNS:
    assert curves["policy"][longest] > 0.95 and curves["swapped"][longest] < 0.5

# %% [markdown]
# ## What do thoughts say?
# Each column is a thought, each row a running value. Nobody told it to count this way.

# %%
found = kit.meant(trainer)
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
report.draw_meaning(found, axis)
plt.show()
told, there = found["mutual_information"], found.get("label_entropy", 0)
print(f"thoughts tell {told:.2f} of {there:.2f} nats of the {found['label']}")
