"""
The yardstick: a recurrent network, torch.nn.GRU, on the same rows, with the same curriculum.

  python lab/variants/gru.py config/automata.toml --data=FOLDER --steps=1000 --out=out/gru

A GRU keeps a state of its own, in numbers of any size, and its gradient travels back through all
of a row; it learns regular tasks in seconds. Writes report.json with modes.policy.accuracy.
Of the config it uses data, seed, batch_tokens, steps, threads, n_embd and eval_rows.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runs
import train
from data.dataset import Batch, load_meta, load_split, load_vocabulary

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


def of_the_answer(batch: Batch) -> Tensor:
    """(B, T - 1) bool: the next token is one of the answer."""
    at = torch.arange(1, batch.real.size(1))
    return (at >= batch.prompt[:, None]) & (at < batch.length[:, None])


@torch.no_grad()
def rows_right(model: GRU, batch: Batch) -> Tensor:
    """-> (B,) bool: the whole answer is the likeliest."""
    wrong = model(batch.real)[:, :-1].argmax(dim=-1) != batch.real[:, 1:]
    return ~(wrong & of_the_answer(batch)).any(dim=1)


def main(argv: list[str]) -> None:
    config = runs.load_config(argv)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    meta = load_meta(config.data)
    vocabulary = load_vocabulary(meta)
    names = [name for name in ("train", "val", "test") if Path(config.data, f"{name}.bin").exists()]
    rows, *held = (load_split(config.data, name, vocabulary, 1) for name in names)
    model = GRU(len(vocabulary.tokens), config.n_embd)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    curriculum = train.Curriculum(rows.count, config.curriculum)
    began, learned_at = time.monotonic(), None
    for step in range(config.steps):
        size = max(1, config.batch_tokens // rows.longest(curriculum.levels[-1]))
        batch = rows.draw(size, curriculum.levels, generator, newest=curriculum.emphasised)
        logits = model(batch.real)[:, :-1]
        counted = of_the_answer(batch)
        loss = F.cross_entropy(logits[counted], batch.real[:, 1:][counted])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        wrong = (logits.argmax(dim=-1) != batch.real[:, 1:]) & counted
        curriculum.grow(step, batch.level, ~wrong.any(dim=1))
        if curriculum.learned and learned_at is None:
            learned_at = (step + 1, round(time.monotonic() - began, 1))
    seconds = round(time.monotonic() - began, 1)
    accuracy = {}
    for split in held:
        for level in split.levels:
            right = rows_right(model, split.first(config.eval_rows, level))
            accuracy[level] = round(right.float().mean().item(), 4)
    report = {
        "task": meta["task"],
        "trained_levels": rows.levels,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": seconds,
        "learned_at_step_and_second": learned_at,
        "params": sum(p.numel() for p in model.parameters()),
        "modes": {"policy": {"accuracy": accuracy}},
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"GRU, {meta['task']}: all levels learned after (step, second) {learned_at}")
    print("  ".join(f"{level}: {share:.3f}" for level, share in accuracy.items()))


if __name__ == "__main__":
    runs.run(main, "gru.py")
