"""
Exercises: each stub fails, each solution passes. Notebooks are what their scripts say, and run.

Here small runs last 5 steps. NANOTHINK_STEPS=500 python -m pytest tests/test_workshop.py trains
them to the end, three minutes on one core, and checks what was learned, too.
"""

import json

import pytest
from conftest import ROOT

from workshop import make

PARTS = make.exercises(make.read(ROOT / "workshop/exercises.py"))
NAMES = [part[0].text.splitlines()[0].removeprefix("## ") for part in PARTS[1:]]
FOLDER = ROOT / "workshop"


def run(namespace: dict, part: list[make.Cell], change) -> None:
    for cell in part:
        if cell.kind == "code":
            exec(change(cell.text), namespace)  # noqa: S102


@pytest.fixture(scope="module")
def setup():
    """What the exercises begin with, and the first, whose `pairs` the second uses."""
    namespace = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(FOLDER)
        run(namespace, PARTS[0] + PARTS[1], make.with_solution)
    return namespace


def test_there_are_twelve_and_each_says_how_hard_and_how_long():
    assert len(NAMES) == 12
    for part in PARTS[1:]:
        text = part[0].text
        assert "Before you run it" in text and text.splitlines()[1][:3].strip("●○") == ""
        assert "minutes" in text and sum(c.kind == "answer" for c in part) == 1
        assert any(make.SPOT.search(c.text) for c in part)


@pytest.mark.parametrize("number", range(1, 13), ids=NAMES)
def test_a_stub_fails_and_its_solution_passes(setup, number):
    part = PARTS[number]
    with pytest.raises(AssertionError):
        run(dict(setup), part, make.with_stub)
    run(dict(setup), part, make.with_solution)


def test_a_stub_and_a_solution_by_hand():
    text = "def f():\n    # SOLUTION\n    return 1\n    # STUB\n    # # yours\n    # return 0\n"
    text += "    # END\n"
    assert make.with_solution(text) == "def f():\n    return 1"
    assert make.with_stub(text) == "def f():\n    # yours\n    return 0"


@pytest.mark.parametrize("name", make.made())
def test_what_stands_there_is_what_the_scripts_make(name):
    assert (FOLDER / name).read_text("utf-8") == make.made()[name], "python workshop/make.py"


def test_the_sheet_gives_nothing_away_and_no_notebook_holds_outputs():
    sheet = (FOLDER / "exercises.ipynb").read_text("utf-8")
    answers = [cell.text for part in PARTS for cell in part if cell.kind == "answer"]
    assert not any(json.dumps(text[:40], ensure_ascii=False)[1:-1] in sheet for text in answers)
    assert "SOLUTION" not in sheet and "soft.detach()" not in sheet
    for path in FOLDER.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize("name", ["one_step", "knock_out"])
def test_a_notebook_runs_from_top_to_bottom(name):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
