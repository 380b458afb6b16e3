"""The runs behind the tables can be started, and the tables hold what the reports say."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from data.dataset import DataError
from lab import experiments
from options import load_config
from train import Config


@pytest.mark.parametrize("name", experiments.SETS)
def test_every_run_of_every_set_can_be_started(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for task, model in experiments.SETS[name]:
        (script, *options), *after = experiments.commands(name, task, model, "3")
        config = load_config(options, Config)
        assert Path(script).exists() and config.seed == 3 and config.report
        assert config.data == f"out/data/{task}" and config.out == f"out/{name}/{task}/{model}_3"
        assert Path(experiments.DATA[task].split()[0]).exists()
        assert all(Path(instrument).exists() for instrument, *_ in after)
        if config.plain:
            assert (task, "plain") in experiments.SETS[name] and config.plain.endswith("plain_3")
    assert name in experiments.TABLES


def test_every_shipped_config_can_be_read():
    for path in sorted((ROOT / "config").glob("*.toml")):
        config = load_config([str(path)], Config)
        assert config.out == f"out/{path.stem}"


def test_a_row_of_the_table_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "OUT", tmp_path)
    folder = tmp_path / "automata" / "a5" / "thinking_1"
    folder.mkdir(parents=True)
    modes = {"policy": {"1": 1.0, "2": 0.5}, "never": {"1": 0.75, "2": 0.25}}
    report = {"trained_levels": [1, 2], "seconds": 12.4}
    report["modes"] = {mode: {"accuracy": accuracy} for mode, accuracy in modes.items()}
    report["windows"] = {"8": {"accuracy": {"499": 0.125}}}
    (folder / "report.json").write_text(json.dumps(report))
    jobs = [("a5", "thinking", "1"), ("a5", "gru", "1")]
    experiments.table("automata", jobs)
    heads, rule, *rows = capsys.readouterr().out.splitlines()
    assert rows == ["| a5 | thinking | 1 | 0.500 | 0.500 | 0.125 | 0.250 | - | - | - | 12 |"]
    assert heads.count("|") == rule.count("|") == rows[0].count("|")
    report["modes"].pop("policy")  # a plain model
    (folder / "report.json").write_text(json.dumps(report))
    assert experiments.row(folder, experiments.TABLES["automata"])[:4] == ["0.250"] * 2 + [
        "0.125",
        "-",
    ]


def test_several_seeds_end_in_a_line_from_least_to_largest():
    columns = [["0.9", "0.95", "1.0"], ["1.0", "1.0"], ["-", "-"], ["98", "101"]]
    assert [experiments.span(x) for x in columns] == ["0.9 to 1.0", "1.0", "-", "98 to 101"]


def test_a_set_runs_what_is_missing_and_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "OUT", tmp_path)
    quick = "lab/variants/gru.py --steps=3 --eval_rows=5 --n_embd=8"
    monkeypatch.setitem(experiments.SETS, "automata", {("parity", "gru"): quick})
    monkeypatch.setitem(experiments.DATA, "parity", experiments.DATA["parity"] + " --levels=3")
    experiments.main(["automata", "--seeds=1,2", "--jobs=0"])
    assert capsys.readouterr().out.count("\n") == 2, "nothing is there"
    experiments.main(["automata", "--seeds=1,2", "--jobs=1"])
    assert capsys.readouterr().out.count("| parity | gru | ") == 3, "two seeds, and their span"
    report = tmp_path / "automata" / "parity" / "gru_1" / "report.json"
    written = report.stat().st_mtime_ns
    experiments.main(["automata", "--models=gru"])
    assert report.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "argv", [[], ["everything"], ["main", "--models=gpt"], ["main", "--job=1"]]
)
def test_what_is_unknown_is_refused_with_the_names_there_are(argv):
    with pytest.raises(DataError, match="main|thinking|jobs"):
        experiments.main(argv)
