"""Regular tasks: rows against definitions that are no tables; automata that are needed whole."""

import itertools
import json
import random

import pytest
from conftest import call

from data.automata.prepare import (
    GROUPS,
    TASKS,
    Machine,
    classes,
    closure,
    half,
    main,
    make_machine,
    reachable,
    then,
)
from data.dataset import Vocabulary, load_meta, load_split

SMALL = ("--levels=7", "--rows=300")


def prepared(folder, *arguments):
    """-> the vocabulary, and the rows of each split as text, without their ends."""
    main([*arguments, f"--out={folder}"])
    vocabulary = Vocabulary(load_meta(folder))
    splits = {}
    for name in ("train", "val", "test"):
        rows = load_split(folder, name, vocabulary, 8).all
        pairs = zip(rows.real, rows.length)
        splits[name] = [vocabulary.decode(row[: n - 1].tolist()) for row, n in pairs]
    return vocabulary, splits


def drawn(task, lengths=(1, 2, 3, 7, 30), **options):
    """Questions with their answers, 40 of each length."""
    machine, draw = make_machine(task, **options), random.Random(0)
    return [machine.row(n, draw).split("=") for n in lengths for _ in range(40)]


# ----------------------------------------------------------------------------------------
# the answers


def test_parity_counts_the_bs():
    for question, answer in drawn("parity"):
        assert int(answer) == (question.count("b") % 2 == 0)


def test_even_pairs_compares_the_first_letter_with_the_last():
    for question, answer in drawn("even_pairs"):
        assert int(answer) == (question[0] == question[-1])
        pairs = [a + b for a, b in itertools.pairwise(question)]
        assert int(answer) == ((pairs.count("ab") + pairs.count("ba")) % 2 == 0)


def test_cycle_navigation_is_a_sum_modulo_5():
    for question, answer in drawn("cycle"):
        assert int(answer) == (question.count("+") - question.count("-")) % 5


def test_modular_arithmetic_has_the_precedence_of_python():
    for question, answer in [("3+4*2", "1"), ("1-1-1", "4"), ("0*1+4*3-2", "0")]:
        machine = make_machine("modular")
        word = [machine.letters.index(c) for c in question]
        assert machine.answer[machine.run(word)[-1]] == answer
    for question, answer in drawn("modular", (1, 3, 5, 7, 31)):
        assert int(answer) == eval(question) % 5
        assert question[::2].isdigit() and not set(question[1::2]) & set("01234")


@pytest.mark.parametrize("generators", [False, True])
@pytest.mark.parametrize("task", GROUPS)
def test_a_word_problem_moves_each_thing_from_place_to_place(task, generators):
    size = int(task[1])
    for question, answer in drawn(task, generators=generators):
        letters = [question[i : i + size] for i in range(0, len(question), size)]
        for thing in range(1, size + 1):
            place = thing
            for letter in letters:  # the left one first
                place = int(letter[place - 1])
            assert int(answer[thing - 1]) == place
        assert not generators or set(letters) <= set(GROUPS[task])


def test_s3_by_hand():
    assert then("213", "231") == "321" and then("231", "213") == "132", "it does not commute"
    assert closure(GROUPS["s3"]) == ["123", "132", "213", "231", "312", "321"]


@pytest.mark.parametrize("task, size", [("s3", 6), ("a5", 60), ("s5", 120)])
def test_a_group_is_closed_and_has_its_size(task, size):
    elements = closure(GROUPS[task])
    assert len(set(elements)) == size
    assert {then(p, g) for p in elements for g in GROUPS[task]} == set(elements)
    assert elements[0] == "".join(sorted(elements[0])), "it starts at the identity"
    if task == "a5":  # even: an even number of pairs stands in the wrong order
        for p in elements:
            assert sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


def test_a_counter_is_clamped_at_every_step():
    for states in (2, 5):
        for question, answer in drawn("counter", states=states):
            value = 0
            for letter in question:
                value = min(max(value + (1 if letter == "b" else -1), 0), states - 1)
            assert int(answer) == value


def test_a_random_automaton_is_followed_letter_by_letter():
    machine = make_machine("random", states=6, letters=4, automaton=3)
    for question, answer in drawn("random", states=6, letters=4, automaton=3):
        state = "0"
        for letter in question:
            state = str(machine.table["abcd".index(letter)][int(state)])
        assert answer == state


# ----------------------------------------------------------------------------------------
# the automata that are drawn


def told_apart(machine, p, q):
    """Slow twin of classes(): is there a word after which p and q answer differently?"""
    seen, queue = {(p, q)}, [(p, q)]
    for a, b in queue:
        if machine.answer[a] != machine.answer[b]:
            return True
        for row in machine.table:
            if (row[a], row[b]) not in seen:
                seen.add((row[a], row[b]))
                queue.append((row[a], row[b]))
    return False


def test_moore_agrees_with_a_search_for_a_word():
    draw = random.Random(0)
    merged = 0
    for _ in range(200):
        table = [draw.choices(range(5), k=5) for _ in range(2)]
        machine = Machine("", ["a", "b"], list("01234"), table, half(5, draw))
        part = classes(table, machine.answer)
        for p, q in itertools.combinations(range(5), 2):
            assert (part[p] != part[q]) == told_apart(machine, p, q)
        merged += len(set(part)) < 5
    assert 0 < merged < 200, "both kinds were among them"


def test_states_that_nothing_leads_to_are_not_reachable():
    assert reachable([[2, 1, 0], [2, 0, 2]]) == {0, 2}


@pytest.mark.parametrize("permutations", [False, True])
@pytest.mark.parametrize("states", [2, 5, 8])
def test_a_random_automaton_that_accepts_needs_all_its_states(states, permutations):
    for automaton in range(20):
        options = {"states": states, "letters": 2, "automaton": automaton}
        machine = make_machine("random", answer="accept", permutations=permutations, **options)
        assert reachable(machine.table) == set(range(states))
        pairs = itertools.combinations(range(states), 2)
        assert all(told_apart(machine, p, q) for p, q in pairs)
        assert machine.answer.count("1") == states // 2
        if permutations:
            assert all(sorted(row) == list(range(states)) for row in machine.table)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_needs_all_its_states(task):
    machine = make_machine(task)
    size = len(machine.states)
    assert len(reachable(machine.table)) == size
    assert len(set(classes(machine.table, machine.answer))) == size
    known = {"parity": 2, "even_pairs": 5, "cycle": 5, "modular": 25}
    assert size == known.get(task, size)


# ----------------------------------------------------------------------------------------
# the files


@pytest.mark.parametrize("task", TASKS)
def test_letters_and_answers_are_single_tokens(tmp_path, task):
    vocabulary, splits = prepared(tmp_path, f"--task={task}", *SMALL)
    machine = make_machine(task)
    step = 2 if task == "modular" else 1
    for name, trained in (("train", True), ("val", True), ("test", False)):
        rows = load_split(tmp_path, name, vocabulary, 8)
        longer = [n - (n - 1) % step for n in (16, 24, 48, 100, 500)]
        assert rows.levels == (list(range(1, 8, step)) if trained else longer)
        assert all(rows.all.length == rows.all.level + 3), "letters, =, the answer, the end"
        assert trained or set(rows.count.values()) == {200}
    for row in splits["val"] + splits["test"][-5:]:
        tokens = [vocabulary.tokens[i] for i in vocabulary.encode(row)]
        assert "".join(tokens) == row
        assert set(tokens[:-2]) <= set(machine.letters) and tokens[-1] in machine.answer
    assert vocabulary.meta["level"] == "letters" and vocabulary.meta["seed"] == 1337


@pytest.mark.parametrize("task", ["parity", "modular", "a5", "counter"])
def test_the_probe_names_the_state_after_each_letter(tmp_path, task):
    vocabulary, splits = prepared(tmp_path, f"--task={task}", *SMALL)
    probe, machine = json.loads((tmp_path / "probe.json").read_text()), make_machine(task)
    assert probe["values"] == machine.states and 0 < len(probe["rows"]) <= 500
    assert set(probe["rows"]) <= set(splits["val"])
    for row, labels in zip(probe["rows"], probe["labels"]):
        ids = vocabulary.encode(row)
        assert len(labels) == len(ids) and labels[7:] == [None, None], "7 letters, = and answer"
        state = 0
        for i, label in zip(ids, labels[:7]):
            state = machine.table[machine.letters.index(vocabulary.tokens[i])][state]
            assert label == machine.states[state]
        assert machine.answer[state] == vocabulary.tokens[ids[-1]]


def test_no_validation_row_is_a_training_row_where_there_are_100(tmp_path, capsys):
    _, splits = prepared(tmp_path, "--task=parity", "--levels=9", "--rows=200")
    train, val = splits["train"], splits["val"]
    assert len(set(train)) == len(train), "rows are distinct"
    few = [row for row in val if row.index("=") < 7]
    assert len(few) == sum(2**n for n in range(1, 7)) and set(few) <= set(train)
    assert not set(train) & (set(val) - set(few))
    assert sum(row.index("=") == 9 for row in train) == 200, "as many as asked for"
    lines = capsys.readouterr().out.splitlines()
    assert sum("1, 2, 3, 4, 5, 6" in line for line in lines) == 1
    assert not any("training and validation" in line for line in lines)


def test_the_same_seed_makes_the_same_files_and_another_other_rows(tmp_path):
    options = ["--task=random", "--states=5", "--answer=accept", *SMALL]
    for name, more in [("a", []), ("b", []), ("c", ["--seed=1"]), ("d", ["--automaton=2"])]:
        main([*options, *more, f"--out={tmp_path / name}"])
    for file in ("train.bin", "val.bin", "test.bin", "meta.json", "probe.json"):
        a, b, c, d = [(tmp_path / name / file).read_bytes() for name in "abcd"]
        assert a == b and a != c and a != d, file


def test_the_seed_of_the_rows_is_not_that_of_the_automaton(tmp_path):
    rows = []
    for seed in (1, 2):
        _, splits = prepared(tmp_path, "--task=random", f"--seed={seed}", *SMALL)
        rows.append(dict(row.split("=") for row in splits["train"]))
    shared = rows[0].keys() & rows[1].keys()
    assert len(shared) > 100 and all(rows[0][q] == rows[1][q] for q in shared)


# ----------------------------------------------------------------------------------------
# what can be wrong


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--task=counter --states=1", "--states=1"),
        ("--task=random --states=201", "--states=201"),
        ("--task=random --letters=0", "--letters=0"),
        ("--task=random --letters=27", "--letters=27"),
        ("--levels=0", "--levels=0"),
        ("--rows=0", "--rows=0"),
        ("--task=even_pairs --states=5", "--states is for counter and random"),
        ("--task=parity --states=2", "--states is for"),
        ("--task=counter --letters=3", "--letters is for random"),
        ("--task=counter --permutations", "--permutations is for random"),
        ("--task=random --generators", "--generators is for s3, s5 and a5"),
        ("--task=modular --answer=accept", "--answer=accept is not for"),
        ("--task=cycle --automaton=3", "--automaton is for"),
        ("--task=random --states=200 --letters=1", "fewer states"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments.split(), f"--out={tmp_path / 'out'}"])
    message = str(stopped.value.code)
    assert message.startswith("prepare.py: ") and named in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_as_a_person_runs_it(tmp_path):
    script = "data/automata/prepare.py"
    file = tmp_path / "file"
    file.write_text("")
    done = call(script, "--levels=3", f"--out={file}")
    assert done.returncode == 1 and "cannot write" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    text = call(script, "--help", check=True).stdout
    for option in ("levels", "rows", "seed", "automaton", "states", "letters", "answer"):
        assert f"--{option}" in text
    assert text.count("default") >= 11, "every option says what it is without it"
