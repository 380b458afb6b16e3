"""lab/bench.py prints its two tables; nothing is timed here."""

from conftest import small

import train
from lab import bench
from model import generate


def test_there_is_a_row_for_each_kind_of_step_and_each_length(chains, tmp_path, capsys):
    options = f"--data={chains} --out={tmp_path} --device=cpu --repeats=1 --cells=8 --n_embd=16"
    bench.main(options.split())
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    assert [line[0] for line in lines[2:5]] == ["| plain GPT", "| warm-up", "| cost phase"]
    assert [line[0] for line in lines[7:]] == ["| 2", "| 4", "| 8"]
    assert not list(tmp_path.iterdir()), "it trains, but saves nothing"


def test_every_part_of_a_step_is_timed(chains, tmp_path):
    trainer = train.Trainer(small(chains, tmp_path, curriculum=False))
    untouched = train.rollout
    ms = bench.step(trainer, paid=True)
    assert list(ms) == list(bench.PARTS) and all(time > 0 for time in ms.values())
    assert train.rollout == untouched and trainer.step == 1


def test_without_a_cache_the_tokens_are_the_same(tiny):
    model = tiny()
    assert bench.without_cache(model, 3, 9) == generate(model, [3], 9, bench.THINKING)
