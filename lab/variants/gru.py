"""
The yardstick: a recurrent network, torch.nn.GRU, on the same sequences, with the same curriculum
and phases.

  python lab/variants/gru.py config/automata.toml --data=FOLDER --out=out/gru

A GRU keeps a state of its own, in numbers of any size, and its gradient travels back through all
of a sequence; it learns regular tasks in seconds. Writes report.json with modes.policy.accuracy.
Of the config it uses data, out, seed, block, batch_tokens, steps, rise, threads, n_embd,
weight_decay, curriculum and eval_rows.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import Batch, Text, load_meta, load_split, load_vocabulary
from lab.report import TEXT_WINDOWS
from options import load_config, run
from train import CLIP, Config, Curriculum, counted_tokens, schedule

LR = 3e-3


class GRU(nn.Module):
    def __init__(self, vocab_size: int, n_embd: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.gru = nn.GRU(n_embd, n_embd, batch_first=True)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, real: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) logits of the next."""
        return self.head(self.gru(self.embedding(real))[0])


def next_tokens(model: GRU, batch: Batch) -> tuple[Tensor, Tensor]:
    """-> mean loss of the tokens that count, in nats; (B,) bool: all of them are the likeliest."""
    logits, target = model(batch.real)[:, :-1], batch.real[:, 1:]  # (B, T - 1, V), (B, T - 1)
    there = torch.arange(1, batch.real.size(1)) < batch.length[:, None]
    counted = counted_tokens(batch)[:, :-1, 0] & there
    wrong = (logits.argmax(dim=-1) != target) & counted
    return F.cross_entropy(logits[counted], target[counted]), ~wrong.any(dim=1)


@torch.no_grad()
def measure(model: GRU, splits: list, size: int) -> dict:
    """{"accuracy": {level: share of answers right}}, of `size` sequences each; or a text's nats."""
    found = {}
    for split in splits:
        if isinstance(split, Text):
            windows = split.first(TEXT_WINDOWS, split.block)
            return {"nats": round(next_tokens(model, windows)[0].item(), 4)}
        for level in split.levels:
            right = next_tokens(model, split.first(size, level))[1]
            found[level] = round(right.float().mean().item(), 4)
    return {"accuracy": found}


def main(argv: list[str]) -> None:
    config = load_config(argv, Config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    meta = load_meta(config.data)
    vocabulary = load_vocabulary(meta)
    names = [name for name in ("train", "val", "test") if Path(config.data, f"{name}.bin").exists()]
    rows, *held = (load_split(config.data, name, vocabulary, config.block) for name in names)
    model = GRU(len(vocabulary.tokens), config.n_embd)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=config.weight_decay)
    curriculum = Curriculum(rows.count, config.curriculum and not vocabulary.is_text)
    began = time.monotonic()
    step, learned = 0, ()  # the step and the second
    while (left := curriculum.steps_left(step, config.steps)) > 0:
        optimiser.param_groups[0]["lr"] = LR * schedule(step, config.rise, left / config.steps)
        size = max(1, config.batch_tokens // rows.longest(curriculum.levels[-1]))
        batch = rows.draw(size, curriculum.levels, None, newest=len(curriculum.newest))
        loss, right = next_tokens(model, batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        curriculum.grow(batch.level, right)
        step += 1
        curriculum.move_on(step, config.steps)
        if curriculum.learned_at == step:
            learned = (step, round(time.monotonic() - began, 1))
    report = {
        "task": meta["task"],
        "trained_levels": rows.levels,
        "seed": config.seed,
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "learned_at_step_and_second": learned,
        "params": sum(p.numel() for p in model.parameters()),
        "modes": {"policy": measure(model, held, config.eval_rows)},
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"GRU, {meta['task']}: all levels learned after (step, second) {learned}")
    print(report["modes"]["policy"])


if __name__ == "__main__":
    run(main, "gru.py")
