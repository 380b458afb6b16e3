"""Text: where it comes from, its windows and byte pairs, thoughts added to a model that had none, and what is left after forgetting."""

import json
import random

import pytest
import torch
from conftest import ROOT, call

from data.dataset import THOUGHT_NAMES, DataError, Text, load_meta, load_split, load_vocabulary
from data.shakespeare import prepare
from data.shakespeare.study import PLACES, behind_note, describe, information, notes
from model import GPT, GPTConfig, from_gpt2
from report import ReportConfig, by_chance, joint_counts, nats
from stream import Thinking, generate, rollout


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    """A made-up text: -> folder of its character data, the text."""
    folder, draw = tmp_path_factory.mktemp("verses"), random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    text = "\n\n".join(f"{draw.choice(['HAMLET', 'GHOST'])}:\n" + " ".join(draw.choices(words, k=8)) for _ in range(1200))
    (folder / "text.txt").write_text(text)
    call("data/shakespeare/prepare.py", f"--input={folder / 'text.txt'}", f"--out={folder}", check=True)
    return folder, text


# ----------------------------------------------------------------------------------------------
# the text


def test_a_play_in_markdown_becomes_speeches():
    markdown = "# Hamlet\n\n## ACT I\n\n_Enter two\nguards_\n\n**BERNARDO**  \nWho's there?  \n_\\[Aside]_  \n\n**FRANCISCO**  \nNay, \\--answer me:  \n"
    assert prepare.plain_text(markdown) == "BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, --answer me:\n\n"


def test_an_error_page_never_becomes_a_corpus(tmp_path, monkeypatch):
    def no_index():
        raise OSError("no index")

    monkeypatch.setattr(prepare, "from_network", lambda: b"<!DOCTYPE html><title>404</title>")
    monkeypatch.setattr(prepare, "from_package_index", no_index)
    monkeypatch.setattr(no_index, "__name__", "from_package_index")
    monkeypatch.setattr(prepare.from_network, "__name__", "from_network")
    with pytest.raises(DataError, match="no text could be fetched"):
        prepare.find_text(None, tmp_path / "input.txt")
    assert not (tmp_path / "input.txt").exists()
    (tmp_path / "input.txt").write_text("<html>")
    with pytest.raises(DataError, match="none of the texts known here"):
        prepare.find_text(None, tmp_path / "input.txt")
    with pytest.raises(DataError, match="web page"):
        prepare.find_text(str(tmp_path / "input.txt"), tmp_path / "none")


def test_a_text_that_is_known_is_called_by_its_name(tmp_path, monkeypatch):
    kept = tmp_path / "input.txt"
    monkeypatch.setattr(prepare, "KNOWN", {prepare.fingerprint(b"O, my prophetic soul!"): "a small text"})
    monkeypatch.setattr(prepare, "from_network", lambda: b"O, my prophetic soul!")
    assert prepare.find_text(None, kept) == ("O, my prophetic soul!", "a small text")
    monkeypatch.setattr(prepare, "from_network", lambda: pytest.fail("it is already there"))
    assert prepare.find_text(None, kept) == ("O, my prophetic soul!", "a small text")


def test_characters_go_to_disk_and_back_and_an_unknown_one_is_named(verses):
    folder, text = verses
    vocabulary = load_vocabulary(load_meta(folder))
    whole = torch.cat([load_split(folder, split, vocabulary, 8).tokens for split in ("train", "val")])
    assert vocabulary.decode(whole.tolist()) == text
    with pytest.raises(DataError, match="'#' in 'be#' .character 3."):
        vocabulary.encode("be#")


def test_windows_are_pieces_of_the_text():
    text = Text(torch.arange(100).numpy(), 9)
    drawn = text.draw(500, text.levels, torch.Generator().manual_seed(0))
    assert (drawn.real[:, 1:] - drawn.real[:, :-1] == 1).all() and drawn.real.shape == (500, 10)
    assert drawn.real[:, 0].min() == 0 and drawn.real[:, -1].max() == 99, "the first and the last token are in reach"
    spread = text.first(1000, 9).real
    assert len(spread) == 11 and (spread[1:, 0] >= spread[:-1, -1]).all(), "each token is predicted once at most"
    with pytest.raises(DataError, match="block = 100 does not fit"):
        Text(torch.arange(100).numpy(), 100)


def test_byte_pairs_read_any_text_and_never_read_a_thought(verses, tmp_path):
    folder, text = verses
    call("data/shakespeare/prepare.py", f"--input={folder / 'text.txt'}", f"--out={tmp_path}", "--tokenizer=bpe", "--vocab_size=280", check=True)
    vocabulary = load_vocabulary(load_meta(tmp_path))
    assert len(vocabulary.tokens) == 280 and vocabulary.encoding.n_vocab == 280 + THOUGHT_NAMES
    for odd in (text, "Ophélie — \U0001f480", "<|think_3|>"):
        ids = vocabulary.encode(odd)
        assert vocabulary.decode(ids) == odd and max(ids) < 280
    assert len(vocabulary.encode(text)) < 0.7 * len(text)
    assert vocabulary.encoding.encode("<|think_3|>", allowed_special="all") == [280 + 3], "its name is known to those who ask for it"
    thinking = Thinking(mode="never")
    model = GPT(GPTConfig(280, n_bits=0, n_layer=1, n_head=2, n_embd=8)).eval()
    found = nats(model, load_split(tmp_path, "val", vocabulary, 16), thinking, vocabulary, ReportConfig(text_windows=10, device="cpu"))
    assert found["bits_per_byte"] < found["nats"] / 0.6931, "a token is more than a byte"


def test_gpt2_byte_pairs_without_a_network_say_what_to_do(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        load_vocabulary({"encoding": "gpt2"})


# ----------------------------------------------------------------------------------------------
# training, reports and samples


def test_train_continue_with_thoughts_report_study_and_sample_as_a_person_does(verses, tmp_path):
    folder, _ = verses
    small = [f"--data={folder}", "--block=24", "--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=6", "--batch_tokens=96", "--eval_every=3", "--eval_rows=5"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    call("train.py", "config/shakespeare_plain.toml", *small, f"--out={plain}", check=True)
    more = ["--n_bits=2", f"--init_from={plain}", f"--plain={plain}", f"--out={out}", "--free=0.5"]
    call("train.py", "config/shakespeare.toml", *small, *more, check=True)
    report = json.loads((out / "report.json").read_text())
    assert set(report["modes"]) == {"policy", "never", "random", "constant", "swapped", "scattered"}
    assert all(0 < mode["nats"] < 5 and mode["interval"] > 0 for mode in report["modes"].values())
    call("data/shakespeare/study.py", f"--run={out}", f"--plain={plain}", "--windows=20", check=True)
    study = json.loads((out / "study.json").read_text())
    assert len(study["after_forgetting"]["curves"]["note"]) == 16 and (out / "study.png").exists()
    said = [call("sample.py", f"--run={out}", "--greedy=false", "--max_new_tokens=100", *options, "GHOST:", check=True).stdout for options in ([], ["--show_thoughts"])]
    assert len(said[0]) == len("GHOST:") + 100 + 1 and said[0].startswith("GHOST:")
    assert "[" not in said[0] and "[" in said[1]
    for option, complaint in {"--n_embd=32": "init_from", "--n_positions=47": "n_positions = 47 is too few", "--block=100000": "block = 100000"}.items():
        bad = call("train.py", "config/shakespeare.toml", *small, f"--init_from={plain}", f"--out={out}", option)
        assert bad.returncode == 1 and bad.stderr.startswith(f"train.py: {complaint}") and bad.stderr.count("\n") == 1


def test_a_sample_that_streams_says_what_one_that_waits_says(tiny):
    model, heard = tiny(3), []
    options = [[[1, 2]], 20, Thinking(window=6)]
    (said,), roll = generate(model, *options, torch.Generator().manual_seed(0), watch=lambda token: heard.append(int(token)))
    assert generate(model, *options, torch.Generator().manual_seed(0))[0] == [said]
    assert [1] + heard[:-1] == roll.stream[0].tolist() and [token for token in [1] + heard if token < 5][:22] == [1, 2] + said


def test_the_reported_nats_are_those_of_each_window_alone(verses):
    folder, _ = verses
    vocabulary = load_vocabulary(load_meta(folder))
    text = load_split(folder, "val", vocabulary, 12)
    model = GPT(GPTConfig(len(vocabulary.tokens), n_bits=2, n_layer=1, n_head=2, n_embd=8)).eval()
    thinking, slow = Thinking(greedy=True), []
    for row in text.first(8, 12).real:
        length = torch.tensor([len(row)])
        roll = rollout(model, row[None], length, thinking)
        words = model(roll.stream).words[0].log_softmax(-1)
        slow += [-words[c, row[p]].item() for c, p in enumerate(roll.pointer[0]) if roll.speaks[0, c]]
    found = nats(model, text, thinking, vocabulary, ReportConfig(text_windows=8, device="cpu"))
    assert len(slow) == 8 * 12 and found["nats"] == pytest.approx(sum(slow) / len(slow), abs=1e-4)


def test_a_report_of_a_model_of_16_bits_is_small_and_holds_used_thoughts_only(chains, tmp_path):
    small = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=2", "--batch_tokens=64"]
    small += ["--n_bits=16", "--curriculum=false", f"--data={chains}", f"--out={tmp_path}"]
    call("train.py", *small, "--report=false", "--device=cpu", check=True)
    call("report.py", f"--run={tmp_path}", "--rows=20", check=True)
    written = (tmp_path / "report.json").read_text()
    report, size = json.loads(written), len(written)
    used, counts = report["meaning"]["thoughts"], report["meaning"]["counts"]
    assert used == sorted(set(used)) and 0 <= used[0] and used[-1] < 2**16
    assert all(sum(row) > 0 and len(row) == 3 for row in counts) and len(counts) == len(used)
    assert 0 < report["meaning"]["by_chance"] <= report["meaning"]["label_entropy"]
    # as many rows as there are tokens to think behind, at most
    probe = json.loads((chains / "probe.json").read_text())
    labelled = sum(label is not None for row in probe["labels"] for label in row)
    assert 0 < len(used) <= sum(map(sum, counts)) <= labelled
    assert size < 10_000 + 100 * len(used) and (tmp_path / "report.png").stat().st_size > 1000


def test_thoughts_are_counted_by_hand():
    used, counts = joint_counts(torch.tensor([70, 3, 70, 2**23]), torch.tensor([0, 2, 2, 1]))
    assert used.tolist() == [3, 70, 2**23] and counts.tolist() == [[0, 0, 1], [1, 0, 1], [0, 1, 0]]
    none = torch.tensor([], dtype=torch.long)
    used, counts = joint_counts(none, none)
    assert len(used) == 0 == counts.sum()


# ----------------------------------------------------------------------------------------------
# thoughts for a model that had none


def test_a_plain_model_that_gets_thoughts_says_what_it_said(tiny):
    plain, model = tiny(0, n_bits=0), tiny(1)
    fresh = {name: part.clone() for name, part in model.thoughts.state_dict().items()}
    model.adopt(plain.state_dict())
    x = torch.randint(5, (2, 7))
    torch.testing.assert_close(model(x).words, plain(x).words)
    kept = model.thoughts.state_dict()
    new = all(torch.equal(kept[name], part) for name, part in fresh.items())
    assert new, "its thoughts are new"
    with pytest.raises(ValueError, match="blocks.1"):
        tiny(0, n_layer=1).adopt(plain.state_dict())
    with pytest.raises(ValueError, match="embedding.weight"):
        tiny(0, vocab_size=6).adopt(plain.state_dict())


def test_gpt2_weights_give_gpt2s_logits():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=4)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = GPT(GPTConfig(50, n_bits=2, n_layer=3, n_head=4, n_embd=24, n_positions=32)).eval()
    ours.adopt(from_gpt2(theirs.state_dict()))
    x = torch.randint(50, (2, 32))
    torch.testing.assert_close(ours(x).words, theirs(x).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="end after 32"):
        ours(torch.zeros(1, 33, dtype=torch.long))


# ----------------------------------------------------------------------------------------------
# the study


def test_behind_a_note_nothing_of_the_context_is_seen_but_the_note(tiny):
    model, thinking = tiny(2), Thinking(greedy=True)
    draw = torch.Generator().manual_seed(0)
    contexts, real = torch.randint(5, (40, 6), generator=draw), torch.randint(5, (1, 4), generator=draw).repeat(40, 1)
    note = notes(model, contexts, thinking, 2)
    assert note.min() >= 5 and len(torch.unique(note, dim=0)) > 1
    loss = behind_note(model, note, real, Thinking(mode="never"))
    assert loss.shape == (40, 4)
    for i in range(40):
        same = (note == note[i]).all(dim=1)
        torch.testing.assert_close(loss[same], loss[i].expand(int(same.sum()), 4))
        alone = notes(model, contexts[i : i + 1], thinking, 2)
        assert torch.equal(alone[0], note[i]), "a row's note is the same in company"
        roll = rollout(model, contexts[i : i + 1], torch.tensor([6]), thinking)
        h = model(torch.cat([roll.stream, contexts[i : i + 1, -1:]], dim=1)).thoughts[0, -1]
        assert note[i, 0] == 5 + (h[0] > 0) + 2 * (h[1] > 0), "the likeliest thought"
    slow = model(torch.cat([note[:1], real[:1]], dim=1)).words[0, 1:-1].log_softmax(-1)
    torch.testing.assert_close(loss[0], -slow[range(4), real[0]])


def test_places_by_hand():
    text = "GHOST:\nI am\n\nHAMLET:\nAy"
    found = describe(text)
    assert [PLACES[k] for k in found["place"][6:12]] == ["start of a line", "behind a word", "start of a word", "inside a word", "behind a word", "start of a line"]
    assert {i for i, k in enumerate(found["place"]) if PLACES[k] == "in a speaker's name"} == {*range(0, 5), *range(12, 19)}
    assert [found["speaker"][i] for i in (0, 8, 18, -1)] == [0, 1, 1, 2], "nobody yet, the ghost to the end of the next name, Hamlet"
    assert found["letters since the word began"][7:11] == [1, 0, 1, 2]


def test_information_of_a_chance_pairing_is_about_nothing():
    draw = torch.Generator().manual_seed(0)
    thoughts, labels = torch.randint(8, (500,), generator=draw), torch.randint(40, (500,), generator=draw)
    assert abs(information(thoughts, labels)) < 0.1 and information(thoughts, thoughts) > 1.5
    alone = torch.arange(500)  # a thought for each place: shuffled labels tell as much
    assert information(alone, labels) == pytest.approx(0) and by_chance(alone, labels) > 3
    far = thoughts * 2**20  # of many thoughts that there might be
    assert information(far, labels) == pytest.approx(information(thoughts, labels), abs=1e-9)


def test_the_shipped_text_configs_can_be_read():
    from train import load_config

    for path in sorted((ROOT / "config").glob("*.toml")):
        assert load_config([str(path)]).steps > 0
