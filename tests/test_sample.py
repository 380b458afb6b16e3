"""sample.py: answers prompts, hides what was thought, and refuses in one sentence."""

import re
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import call

import sample
from data.dataset import DataError
from runs import save_checkpoint
from train import Config

CHAINS = {
    "task": "chains",
    "vocab": ["0", "1", "2", "3", "4", "=", "+1", "+4", "*2", "\n"],
    "row_end": "\n",
    "answer_after": "=",
}
TEXT = {"task": "text", "vocab": ["a", "b", "ä", " ", "\n"]}
PROMPTS = ["3+4*2=", "1*2="]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """-> the option for the folder of a model with random weights, whose answers are nonsense."""

    def make(meta=CHAINS, seed=4, **changes):
        model = tiny(seed, vocab_size=len(meta["vocab"]), **changes)
        network = asdict(model.config)
        shared = {name: network[name] for name in asdict(Config()) if name in network}
        config = Config(**(shared | {"revise": float(network["revise"])}))
        state = {"config": asdict(config), "network": network, "meta": meta}
        state |= {"curriculum": {}, "optimisers": []}
        state |= {"model": model.state_dict(), "progress": {"paid": True}}
        save_checkpoint(tmp_path / "checkpoint.pt", state)
        return f"--run={tmp_path}"

    return make


@pytest.fixture
def say(capsys):
    """Arguments -> the lines that sample.py prints."""

    def answer(*arguments):
        sample.main(list(arguments))
        return capsys.readouterr().out.splitlines()

    return answer


def visible(line):
    """Without what stands in brackets."""
    return re.sub(r"\[[^]]*\]", "", line)


# ----------------------------------------------------------------------------------------------
# as a command


def test_without_prompts_it_answers_one_of_the_main_job(checkpoint):
    done = call("sample.py", checkpoint(), input="")
    assert done.returncode == 0 and done.stdout.startswith("3+4*2=")
    assert done.stdout.count("\n") == 1


def test_what_the_user_can_mend_is_one_sentence(checkpoint):
    done = call("sample.py", checkpoint(), "")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "sample.py: a prompt is empty: it must hold at least one token\n"


def test_help_names_every_option():
    done = call("sample.py", "--help")
    assert done.returncode == 0 and "--show_thoughts" in done.stdout and "1000" in done.stdout


# ----------------------------------------------------------------------------------------------
# what shows


def test_an_answer_is_all_that_shows_unless_thoughts_are_asked_for(checkpoint, say):
    run = checkpoint()
    quiet, loud = say(run, *PROMPTS), say(run, "--show_thoughts", *PROMPTS)
    assert [visible(line) for line in loud] == quiet and loud != quiet
    assert all(line.startswith(prompt) for line, prompt in zip(quiet, PROMPTS))
    assert "[" not in "".join(quiet) and set(re.findall(r"\[(.*?)\]", loud[0])) <= set("0123")


def test_it_adds_no_more_tokens_than_it_may(checkpoint, say):
    assert len(say(checkpoint(TEXT), "--max_new_tokens=7", "ab")[0]) <= 2 + 7


def test_on_a_terminal_thoughts_are_dimmed(checkpoint, say, monkeypatch):
    run, thoughts = checkpoint(), r"\[(\d)\]"
    plain = say(run, "--show_thoughts", PROMPTS[0])[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    dimmed = re.sub(thoughts, "\033[2m[\\1]\033[0m", plain)
    assert say(run, "--show_thoughts", PROMPTS[0]) == [dimmed] != [plain]


def test_a_token_that_is_taken_back_never_shows_unless_asked_for(checkpoint, say):
    run = checkpoint(seed=1, revise=True)
    quiet, loud = say(run, PROMPTS[0]), say(run, "--show_thoughts", PROMPTS[0])
    assert "[not " in loud[0] and [visible(line) for line in loud] == quiet
    assert "[not " not in say(run, "--show_thoughts", "--revisions=0", PROMPTS[0])[0]


def test_what_happened_is_printed_and_kept_by_hand(capsys):
    transcript = sample.Transcript(sample.Vocabulary(CHAINS), show_thoughts=True)
    happened = [("token", 3), ("think", 12), ("token", 1), ("revise", 1), ("token", 2)]
    for event in [*happened, ("revise", 2), ("token", 4), ("recall", 14), ("token", 9)]:
        transcript.watch(*event)
    transcript.print(transcript.held)
    assert capsys.readouterr().out == "3[2][not 1][not 2]4[recall]"
    assert transcript.cells == [[3, 12], [4, 14], [9]]


def test_recall_is_shown_and_can_be_forced_and_forbidden(checkpoint, say):
    run = checkpoint(recall=True)
    show = ("--show_thoughts", PROMPTS[0])
    always, never = (say(run, f"--recall={how}", *show)[0] for how in ("always", "never"))
    assert always.startswith("3") and "[recall]" in always and "[recall]" not in never


def test_a_text_is_decoded_by_whole_characters(checkpoint, say):
    line = say(checkpoint(TEXT), "--temperature=1", "--max_new_tokens=40", "ä")
    assert "ä" in line[0] and "\ufffd" not in "".join(line)


# ----------------------------------------------------------------------------------------------
# where prompts come from, and how answers are drawn


def test_prompts_come_from_a_file_too(checkpoint, say, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("3+4=\n\n1*2=\n")
    assert [line[:4] for line in say(checkpoint(), f"--file={file}")] == ["3+4=", "1*2="]


def test_prompts_come_from_standard_input_too(checkpoint):
    done = call("sample.py", checkpoint(), input="3+4=\n1*2=\n")
    assert [line[:4] for line in done.stdout.splitlines()] == ["3+4=", "1*2="]


def test_the_same_seed_draws_the_same(checkpoint, say):
    run = checkpoint()
    several = ("--temperature=1", "--samples=5", "--show_thoughts", *PROMPTS)
    first = say(run, *several)
    assert len(first) == 10 and len(set(first)) > 2
    assert say(run, *several) == first != say(run, "--seed=2", *several)


def test_ablations_change_the_thoughts_only_or_take_them_away(checkpoint, say):
    run = checkpoint()
    assert "[" not in say(run, "--mode=never", "--show_thoughts", PROMPTS[0])[0]
    constant = say(run, "--mode=constant", "--show_thoughts", PROMPTS[0])[0]
    assert set(re.findall(r"\[(.*?)\]", constant)) == {"0"}


def thoughts_in(line):
    return re.findall(r"\[(\d)\]", line)


def test_swapped_thoughts_are_those_of_the_next_prompt_in_their_order(checkpoint, say):
    run = checkpoint()
    show = ("--show_thoughts", *PROMPTS)
    own = [thoughts_in(line) for line in say(run, *show)]
    swapped = [thoughts_in(line) for line in say(run, "--mode=swapped", *show)]
    for thoughts, others in zip(swapped, reversed(own)):
        endless = others * (1 + len(thoughts) // len(others))
        assert thoughts == endless[: len(thoughts)]
    assert own != swapped


def test_a_price_overrules_the_gate(checkpoint, say):
    run = checkpoint(observer="quarters")
    assert "[" not in say(run, "--price=1e9", "--show_thoughts", PROMPTS[0])[0]


def test_the_observer_says_what_it_expected(checkpoint, say):
    answer, line = say(checkpoint(observer="quarters"), "--introspect", PROMPTS[0])
    pattern = r"  \d+ thoughts(, worth -?[\d.]+ nats each)?; sure [\d.]+ a token, least of '.+'"
    assert re.match(pattern, line) and answer.startswith(PROMPTS[0])


def test_introspection_reads_each_token_off_the_cell_that_emitted_it(checkpoint, tiny):
    model = tiny(observer="quarters", recall=True, vocab_size=10)
    cells = [[3, 11, 14], [6, 12, 10], [5, 14], [1], [9]]  # RECALL is 14
    readings = model(torch.tensor([[3, 11, 6, 12, 10, 5, 1]])).readings[0]
    vocabulary = sample.Vocabulary(CHAINS)
    line = sample.introspect(model, cells, 3, vocabulary, 0)
    worth = (readings[0, 1] + readings[2, 1] + readings[3, 1]).item() / 3
    nats = readings[5, 0].clamp(min=0).item()
    sure = torch.tensor(-nats).exp().item()
    assert line.startswith(f"  3 thoughts, worth {worth:.2f} nats each; sure {sure:.2f} a token")
    assert line.endswith(f"least of '1' ({nats:.2f} nats expected)")


# ----------------------------------------------------------------------------------------------
# bad input

REFUSED = [
    (["3+x="], "'x' in '3\\+x=' "),
    (["--mode=none"], "'none' is none of policy, never"),
    (["--recall=none"], "'none' is none of policy, never, always"),
    (["--mode=swapped", "1*2="], "two different prompts"),
    (["--mode=swapped", "1*2=", "1*2="], "two different prompts"),
    (["--introspect", "1*2="], "no observer"),
    (["--price=0.1", "1*2="], "no observer"),
    (["--file=/nowhere"], "cannot read prompts"),
    (["--show_thought"], "nearest is 'show_thoughts'"),
    (["--temperature=-1"], "at least 0"),
    (["--max_new_tokens=0"], "at least 1"),
    (["--device=tpu"], "'tpu' is not here"),
]


@pytest.mark.parametrize("arguments, sentence", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(checkpoint, arguments, sentence, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match=sentence) as refused:
        sample.main([checkpoint(), *arguments])
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match="train first"):
        sample.main([f"--run={tmp_path}", "1*2="])


def test_a_price_without_thoughts_and_too_long_a_prompt_are_refused(checkpoint):
    with pytest.raises(DataError, match="no thoughts"):
        sample.main([checkpoint(observer="quarters", n_bits=0), "--price=1", "1*2="])
    with pytest.raises(DataError, match="end after 4 cells"):
        sample.main([checkpoint(n_positions=4), "1*2*2="])
