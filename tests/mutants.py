"""
Mutation testing: break one line of model.py or train.py at a time, and see that a test fails.

  python tests/mutants.py            all of them, half an hour on two cores
  python tests/mutants.py gate       those with the word in their name

Prints of each mutant the first test that fails; exits 1 if one survives. That all of them can still
be made is a test of its own (test_mutants.py).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "loss",
    "grid",
    "model",
    "curriculum",
    "train",
    "where",
)  # those that look inside the two files

# {what is broken: (file, a piece of it that is there once, what stands there instead)}
MUTANTS = {
    # thoughts
    "the echo is dropped": ("train.py", "x[:, :1] + echo[:, None]", "x[:, :1]"),
    "the echo has no gradient": (
        "model.py",
        "soft - soft.detach()",
        "soft.detach() - soft.detach()",
    ),
    "a given thought is echoed": ("train.py", "echo = echo * (given < 0)[:, None]", "pass"),
    "bits are drawn without noise": ("model.py", "h.tanh() + self.NOISE * noise", "h.tanh()"),
    "log p of a thought ignores the noise": (
        "model.py",
        "self.bits(thought) / self.NOISE",
        "self.bits(thought)",
    ),
    "bits count from the other end": (
        "model.py",
        "2 ** torch.arange(n_bits)",
        "2 ** torch.arange(n_bits).flip(0)",
    ),
    "swapped thoughts are one's own": (
        "model.py",
        "thought.roll(1, dims=0)",
        "thought.roll(0, dims=0)",
    ),
    "random thoughts are the model's": (
        "model.py",
        "draw(torch.zeros_like(h), generator)",
        "draw(h, generator)",
    ),
    # visibility
    "the window is one wider": (
        "model.py",
        "key.position[:, None, :] < window",
        "key.position[:, None, :] <= window",
    ),
    "a cut hides nothing": (
        "model.py",
        "near & (query.segment[:, :, None] == key.segment[:, None, :])",
        "near",
    ),
    "RECALL sees what others see": (
        "model.py",
        "near | (query.sees_all[:, :, None] & before)",
        "near",
    ),
    "what nobody may see is seen": ("model.py", "near = near & key.seen[:, None, :]", "pass"),
    "positions do not turn": ("model.py", "*rotate(qkv[:2], *turn)", "*qkv[:2]"),
    "the cache forgets too much": (
        "model.py",
        "slice(-count, None) if count",
        "slice(1 - count, None) if count > 1",
    ),
    # forgetting
    "nothing is cut": ("train.py", '"cuts": cuts & cut', '"cuts": cuts & False'),
    "all are cut": ("train.py", '"cuts": cuts & cut', '"cuts": cuts'),
    "what is cut need not think": (
        "train.py",
        "torch.where(thinks, THINK, NO_THOUGHT)",
        "torch.where(thinks, UNFORCED, NO_THOUGHT)",
    ),
    "the gate decides nowhere": ("train.py", ".masked_fill(decides, UNFORCED)", ""),
    "where the gate decides there is one cut": (
        "train.py",
        "torch.where(decides | is_text,",
        "torch.where(is_text,",
    ),
    "a cut needs a thought": (
        "train.py",
        "segment + cuts[:, t, None]",
        "segment + (cuts[:, t] & asked)[:, None]",
    ),
    "nothing jumps": ("train.py", "count = count + jumps[:, t, None]", "pass"),
    "a text jumps": ("train.py", "one & ~cut & ~is_text", "one & ~cut"),
    "a window jumps": ("train.py", "not c.window and self", "self"),
    # the hybrid loss
    "thinking cells are not charged": (
        "train.py",
        "thinking_weight * (grid.thinks | grid.recalls)",
        "0 * (grid.thinks | grid.recalls)",
    ),
    "thoughts are for nothing": ("train.py", "config.think_cost * paid", "0.0"),
    "thoughts cost in the warm-up": (
        "train.py",
        "config.think_cost * paid",
        "config.think_cost",
    ),
    "a try is compared with itself": ("train.py", "returns - returns[of]", "returns - returns"),
    "the gate learns the contrary": (
        "train.py",
        "torch.where(gained > 0, yes",
        "torch.where(gained < 0, yes",
    ),
    "a try counts whatever it changed": ("train.py", "-mean(gained.abs() * F", "-mean(1.0 * F"),
    "tries teach the network": (
        "train.py",
        "token_loss(out.loss, grid, counted & own,",
        "token_loss(out.loss, grid, counted,",
    ),
    "all sequences are tries": ("train.py", 'plan["tries"][:size] = NO_TRY', "pass"),
    "nothing is tried": ("train.py", "wants, grid.tried[:, t, r] = wants ^ tried, tried", "pass"),
    "a try goes on to try": (
        "train.py",
        "tries[:, t] = tries[:, t].masked_fill(tried, NO_TRY)",
        "pass",
    ),
    "the horizon is ignored": ("train.py", "if not horizon:", "if True:"),
    "the gate decides everywhere": (
        "train.py",
        "c.forget * (not gave_up), number < n)",
        "c.forget * (not gave_up), number >= 0)",
    ),
    "the prompt counts": (
        "train.py",
        "(t + 1 >= batch.prompt[:, None])",
        "(t + 1 >= 0 * batch.prompt[:, None])",
    ),
    "demonstrations do not say when": ("train.py", " - mean(when, grid.asked & shown)", ""),
    "the observer learns the contrary": (
        "train.py",
        "torch.where(grid.thinks, free, -free), -returns]",
        "torch.where(grid.thinks, -free, free), returns]",
    ),
    "the observer shapes what it watches": (
        "model.py",
        "for layer in self.layers], dim=-1).detach()",
        "for layer in self.layers], dim=-1)",
    ),
    "the gate shapes the trunk": ("model.py", "dim=-1)).detach()", "dim=-1))"),
    "REVISE is never right": (
        "train.py",
        "aim = target[:, at // S].masked_fill(slot == S + WRONG_SLOT, V)",
        "aim = target[:, at // S]",
    ),
    "tries teach REVISE": ("train.py", "[:, :, slot] & own[:, :, 0] for", "[:, :, slot] for"),
    # the loop
    "patience has no end": ("train.py", "self.waited > PATIENCE * steps or ", ""),
    "what is given up is cut": ("train.py", "c.forget * (not gave_up)", "c.forget"),
    "what is given up jumps": ("train.py", "* far * (share > 0)", "* far"),
    "the learning rate never falls": (
        "train.py",
        "0.5 * (1 - math.cos(math.pi * min(1, rest / FALL)))",
        "1.0",
    ),
    "the learning rate never rises": ("train.py", "min(1, (step + 1) / rise) * ", ""),
    "gates are clipped with the rest": (
        "train.py",
        "self.clipped[p in apart]",
        "self.clipped[False]",
    ),
    "the gradient is not clipped": (
        "train.py",
        "clip_grad_norm_(some, CLIP)",
        "clip_grad_norm_(some, 1e9)",
    ),
    "gates have everybody's rate": ("model.py", "(gates, gate_lr, 0.0)", "(gates, lr, 0.0)"),
    "weights do not decay": ("model.py", "(blocks, lr, decay)", "(blocks, lr, 0.0)"),
    "a try is of another sequence": (
        "train.py",
        "batch.rows(which), {",
        "batch.rows(which - 1), {",
    ),
    "a try is cut elsewhere": (
        "train.py",
        "{name: x[which] for name, x in plan.items()}",
        "{name: x[which - 1] for name, x in plan.items()}",
    ),
    "a try counts as mastered": ("train.py", ".masked_fill(of != NO_TRY, -1)", ""),
    "nothing is ever mastered": (
        "train.py",
        "if self.right > MASTERED and",
        "if self.right > 1.5 and",
    ),
    "the levels that are left never come": (
        "train.py",
        "[: self.stage] + [len(self.every)]",
        "[: self.stage] + [self.stages[self.stage]]",
    ),
    "mastered is learned": (
        "train.py",
        "self.learned and self.right > LEARNED and",
        "self.learned and",
    ),
    "what is learned goes on": (
        "train.py",
        "if self.learned_at is None:\n            return steps - step",
        "if True:\n            return steps - step",
    ),
    "gates do not begin anew": (
        "train.py",
        'if group["apart"] and self.paid else',
        "if False else",
    ),
    "gates forget what is rare": (
        "model.py",
        "0.999 if some is gates else",
        "0.95 if some is gates else",
    ),
    "thoughts never cost": (
        "train.py",
        "            self.paid += 1",
        "            self.paid += 0",
    ),
    "every step draws the same": (
        "train.py",
        "hash((c.seed, self.step, runs.RANK))",
        "hash((c.seed, runs.RANK))",
    ),
}


def mutated(name: str) -> tuple[str, str]:
    """-> the file's name, its text with the change."""
    file, old, new = MUTANTS[name]
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{name}: {file} has {text.count(old)} places {old!r}")
    return file, text.replace(old, new)


def killer(tree: Path, name: str) -> str:
    """The first test that fails in the copy of the project; "" if none does."""
    file, text = mutated(name)
    (tree / file).write_text(text)
    tests = [f"tests/test_{part}.py" for part in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, check=False, capture_output=True, text=True
    )
    shutil.copy(ROOT / file, tree / file)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if done.returncode else ""


def main(words: list[str]) -> None:
    chosen = [name for name in MUTANTS if all(word in name for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".*", "out", "*.bin", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for name in chosen:
            found = killer(tree, name)
            print(f"{name}: {found or 'SURVIVES'}", flush=True)
            survivors += [name] * (not found)
    print(f"{len(chosen)} mutants, {len(survivors)} survive")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main(sys.argv[1:])
