"""The report: what it counts, worked out by hand or by a slow twin, and what it writes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import D_BITS, RECALL, V, alone, grid_of, small

import train
from data.dataset import DataError, Text, Vocabulary, load_split, write_bin
from lab import report
from lab.report import by_chance, joint_counts, mutual_information
from model import MODES, Thinking, generate
from runs import load_model, save_checkpoint

LETTERS = Vocabulary({"vocab": list("abcd") + ["\n"], "row_end": "\n"})
GREEDY = Thinking(greedy=True, max_run=2)

# ----------------------------------------------------------------------------------------------
# what thoughts mean


def test_thoughts_are_counted_by_hand():
    used, counts = joint_counts(torch.tensor([70, 3, 70, 2**23]), torch.tensor([0, 2, 2, 1]))
    assert used.tolist() == [3, 70, 2**23]
    assert counts.tolist() == [[0, 0, 1], [1, 0, 1], [0, 1, 0]]


def test_mutual_information_by_hand():
    merged = torch.tensor([[2, 0], [2, 0], [0, 4]])  # two thoughts for one label lose nothing
    assert mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(math.log(2))
    assert mutual_information(torch.tensor([[5, 5], [5, 5]])) == pytest.approx(0)
    assert mutual_information(merged) == pytest.approx(math.log(2))
    skewed = 0.5 * math.log(0.5 / (0.5 * 0.75)) + 0.25 * math.log(0.25 / (0.5 * 0.75))
    skewed += 0.25 * math.log(0.25 / (0.5 * 0.25))
    assert mutual_information(torch.tensor([[2, 0], [1, 1]])) == pytest.approx(skewed)


def test_by_chance_thoughts_tell_what_a_small_sample_lets_them():
    labels = torch.arange(2000) % 5
    for X in (5, 50):  # thoughts
        thoughts = torch.randint(X, (2000,), generator=torch.Generator().manual_seed(1))
        expected = (X - 1) * (5 - 1) / (2 * 2000)  # Miller 1955, to first order
        assert by_chance(thoughts, labels) == pytest.approx(expected, rel=0.4)
    assert by_chance(labels, labels) < 0.02, "though they tell all"


def test_what_thoughts_mean_by_hand(tiny, monkeypatch):
    """Behind b one thought, or two; behind a none; nothing behind a token without a label."""
    grid = grid_of([[0, 1, V + 3, 2, V + 1, 4], [1, V + 3, V + 0, RECALL, 0, 1, V + 2, 3, 4]])
    monkeypatch.setattr(report, "rollout", lambda *_: (grid, None))
    rows = ["abc\n", "babd\n"]
    labels = [["A", "B", None, None], ["B", "A", "B", "A", None]]
    probe = {"name": "letter", "values": ["A", "B", "C"], "rows": rows, "labels": labels}
    found = report.meaning(tiny(recall=True), LETTERS, GREEDY, probe)
    assert found["label"] == "letter" and found["values"] == ["A", "B", "C"]
    assert found["thoughts"] == [0, 2, 3]
    assert found["counts"] == [[0, 1, 0], [0, 1, 0], [0, 2, 0]]
    assert found["silent"] == [1.0, 0.0, 0.0]
    assert found["mutual_information"] == found["label_entropy"] == 0.0


def test_a_model_that_never_thinks_means_nothing(tiny):
    probe = {"name": "letter", "values": ["A"], "rows": ["ab\n"], "labels": [["A", "A", None]]}
    found = report.meaning(tiny(), LETTERS, replace(GREEDY, mode="never"), probe)
    assert found["mutual_information"] == 0.0 and found["thoughts"] == [] == found["counts"]
    assert found["silent"] == [1.0] and "by_chance" not in found


def test_the_most_used_thought_by_hand(tiny, chains, monkeypatch):
    streams = [[0, V + 3, V + 1, RECALL, 1, V + 1, 2], [0, 1, V + 1, V + 2, 4]]
    monkeypatch.setattr(report, "evaluate", lambda *_: (grid_of(streams), None, None))
    rows = Text(np.arange(20), 4)
    assert report.most_used_thought(tiny(recall=True), rows, GREEDY, 2) == 1
    monkeypatch.setattr(report, "evaluate", lambda *_: (grid_of([[0, 1], [2, 3]]), None, None))
    assert report.most_used_thought(tiny(recall=True), rows, GREEDY, 2) == 0


# ----------------------------------------------------------------------------------------------
# how well it does


@pytest.fixture(scope="module")
def runs(chains, tmp_path_factory):
    """-> {name: folder of an untrained model's checkpoint}."""
    folders = {}
    for name, n_bits in (("plain", 0), ("thinking", 16)):
        folders[name] = tmp_path_factory.mktemp(name)
        trainer = train.Trainer(small(chains, folders[name], n_bits=n_bits))
        trainer.next_phase()
        save_checkpoint(folders[name] / "checkpoint.pt", trainer.state())
    return folders


@pytest.mark.parametrize("how", [{}, {"mode": "never"}, {"mode": "constant", "constant": 1}])
@pytest.mark.parametrize("window", [0, 4])
def test_accuracy_counts_the_answers_that_generate_gives(tiny, chains, monkeypatch, how, window):
    vocabulary = train.load_vocabulary(train.load_meta(chains))
    model = tiny(vocab_size=len(vocabulary.tokens))
    splits = [load_split(chains, name, vocabulary, 1) for name in ("val", "test")]
    splits[1].levels = [12, 16]
    monkeypatch.setattr(report, "LONGEST", 12)
    thinking = replace(GREEDY, window=window, **how)
    found = report.accuracy(model, splits, thinking, 12)
    tried = [1, 2, 3, 12, 16] if window else [1, 2, 3, 12]
    assert [*found["accuracy"]] == tried == [*found["thoughts_per_row"]]
    for level in splits[0].levels:
        batch, right, thoughts = splits[0].first(12, level), 0, []
        for row, prompt in zip(batch.real.tolist(), batch.prompt.tolist()):
            new = len(row) - prompt
            right += generate(model, row[:prompt], new, thinking) == row
            grid, _ = train.rollout(model, torch.tensor([row]), torch.tensor([len(row)]), thinking)
            thoughts.append(int(grid.present[:, :, 1:3].sum()))
        assert found["accuracy"][level] == pytest.approx(right / len(batch.real), abs=1e-4)
        mean = sum(thoughts) / len(thoughts)
        assert found["thoughts_per_row"][level] == pytest.approx(mean, abs=0.01)
        assert (mean == 0) == (how.get("mode") == "never")


def test_the_nats_of_a_text_are_those_of_each_window_alone(tiny, monkeypatch):
    tokens = torch.randint(V, (8 * 12 + 1,), generator=torch.Generator().manual_seed(2))
    text, vocabulary = Text(tokens.numpy(), 12), Vocabulary({"vocab": ["a", "é", "c", "d", "e"]})
    monkeypatch.setattr(report, "PART", 3)
    model, losses, thoughts = tiny(), [], 0
    for real in text.first(8, 12).real:
        grid, _ = train.rollout(model, real[None], torch.tensor([13]), GREEDY)
        thoughts += int(grid.present[:, :, 1:3].sum())
        last = {t: (logits, slot) for (t, slot), (logits, *_) in alone(model, grid, 0).items()}
        losses.append([-last[t][0].log_softmax(0)[real[t + 1]].item() for t in range(12)])
    found = report.nats(model, text, GREEDY, vocabulary)
    every = torch.tensor(losses)
    n_bytes = 96 + int((text.first(8, 12).real[:, 1:] == 1).sum())  # é is two
    assert found["windows"] == 8 and found["nats"] == pytest.approx(every.mean().item(), abs=1e-4)
    interval = 1.96 * every.mean(dim=1).std().item() / 8**0.5
    assert found["interval"] == pytest.approx(interval, abs=1e-4)
    bits = every.sum().item() / math.log(2) / n_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    assert found["thoughts_per_token"] == pytest.approx(thoughts / 96, abs=1e-4)


# ----------------------------------------------------------------------------------------------
# the report


def written(folder):
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "report.json").read_text())


LEVELS = [*map(str, (*range(1, 9), 12, 16, 24, 32, 64, 128))]


def test_a_report_holds_what_its_readers_look_for(runs, chains, capsys):
    report.main([f"--run={runs['thinking']}", f"--plain={runs['plain']}", "--rows=4"])
    found, size = written(runs["thinking"]), (runs["thinking"] / "report.json").stat().st_size
    assert found["trained_levels"] == [1, 2, 3] and found["learned_levels"] == []
    assert not found["thoughts_cost"] and found["seed"] == 1 and found["steps"] == 0
    assert {"task", "level", "seconds", "params", "device", "threads"} <= found.keys()
    assert [*found["modes"]] == [*MODES] and [*found["windows"]] == ["8", "16"]
    for line in [*found["modes"].values(), found["plain"]]:
        assert [*line["accuracy"]] == LEVELS
    assert "1024" in found["windows"]["8"]["accuracy"], "the longest are followed in a window"
    assert set(found["modes"]["never"]["thoughts_per_row"].values()) == {0}
    assert found["modes"]["policy"]["thoughts_per_row"]["3"] > 0
    assert 0 <= found["constant_thought"] < 2**16 and found["plain"]["params"] < found["params"]

    # of 2^16 thoughts those that occur, and no more than there are tokens to think behind
    used, counts = found["meaning"]["thoughts"], found["meaning"]["counts"]
    assert used == sorted(set(used)) and len(counts) == len(used)
    assert all(sum(row) > 0 and len(row) == 3 for row in counts)
    probe = json.loads((chains / "probe.json").read_text())
    labelled = sum(label is not None for row in probe["labels"] for label in row)
    assert sum(map(sum, counts)) == labelled and size < 10_000 + 100 * len(used)
    assert 0 <= found["meaning"]["by_chance"] <= found["meaning"]["label_entropy"]

    header, *table = capsys.readouterr().out.splitlines()[2:-2]
    assert header.split() == [*LEVELS, "1024"] and len(table) == 9
    assert {len(line) for line in (header, *table)} == {len(header)}


def test_a_plain_model_has_a_report_of_its_own(runs):
    report.main([f"--run={runs['plain']}", "--rows=2"])
    found = written(runs["plain"])
    assert [*found["modes"]] == ["never"]
    assert not {"meaning", "constant_thought", "plain"} & found.keys()


def test_a_plain_model_of_another_vocabulary_stands_beside_nothing(runs, verses):
    for folder, argument in ((runs["thinking"], f"--plain={verses}"), (verses / "no", "--rows=2")):
        with pytest.raises(DataError, match="another vocabulary|no checkpoint"):
            report.main([f"--run={folder}", argument])


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    """-> folder of a text and of an untrained model's checkpoint."""
    folder = tmp_path_factory.mktemp("verses")
    meta = {"task": "letters", "vocab": list("abcde"), "level": "tokens"}
    (folder / "meta.json").write_text(json.dumps(meta))
    tokens = torch.randint(V, (500,), generator=torch.Generator().manual_seed(3)).tolist()
    for name in ("train", "val"):
        write_bin(folder / f"{name}.bin", tokens, [], meta)
    config = small(folder, folder, block=12, max_run=2, curriculum=False, n_bits=D_BITS)
    trainer = train.Trainer(config)
    trainer.paid = True  # so that the gate is asked
    with torch.no_grad():
        trainer.model.gate.out.weight.normal_()
        trainer.model.gate.out.bias.zero_()
    save_checkpoint(folder / "checkpoint.pt", trainer.state())
    return folder


def test_the_report_of_a_text_is_in_nats(verses, capsys):
    report.main([f"--run={verses}", f"--plain={verses}"])
    found = written(verses)
    modes = found["modes"]
    assert [*modes] == [*MODES, "scattered"] and found["trained_levels"] == [12]
    assert found["windows"] == {} and found["plain"]["nats"] == modes["never"]["nats"]
    assert all(line["windows"] == 41 and line["interval"] > 0 for line in modes.values())
    rate = modes["policy"]["thoughts_per_token"]
    assert 0 < rate < 2 and modes["never"]["thoughts_per_token"] == 0
    assert modes["scattered"]["thoughts_per_token"] == pytest.approx(rate, rel=0.15)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(modes) + 1 + 1
    model, vocabulary, state = load_model(verses)
    constant = replace(train.as_trained(state, vocabulary), mode="constant")
    constant.constant = found["constant_thought"]
    text = load_split(verses, "val", vocabulary, 12)
    assert modes["constant"] == report.nats(model, text, constant, vocabulary)
