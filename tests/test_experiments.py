"""The runs behind the README's tables can at least be started: their options exist, their data can be made, no two share a folder."""

from pathlib import Path

import pytest
from conftest import ROOT

import experiments
from data.dataset import DataError
from runs import load_config


@pytest.mark.parametrize("name", experiments.SETS)
def test_every_run_of_every_set_has_a_valid_config(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = experiments.SETS[name]()
    runs = [(run_name, options) for row in rows.values() for run_name, options in row.items()]
    assert name in experiments.COLUMNS and len({run_name for run_name, _ in runs}) == len(runs)
    for _, options in runs:
        config = load_config(options)
        assert config.data in ("data/arithmetic", "data/shakespeare", "data/recall") or Path(config.data).name in experiments.DATA


def test_an_unknown_set_is_refused_with_the_names_there_are():
    with pytest.raises(DataError, match="ablations"):
        experiments.main(["everything"])


def test_the_spread_over_seeds_by_hand():
    assert experiments.spread([0.5, 1.0]) == "0.750 (0.500-1.000)"
    assert experiments.spread([1.0]) == "1.000" and experiments.spread([]) == "-"
