"""
Make the notebooks and the answers from their scripts.

  python workshop/make.py

exercises.py -> exercises.ipynb, solutions.ipynb, answers.md; one_step.py -> one_step.ipynb;
knock_out.py -> knock_out.ipynb. A script is a row of cells: `# %%` begins code, `# %% [markdown]`
text, and `# %% [markdown] answer` text that is not for the exercise sheet. Between `# SOLUTION` and
`# STUB` stands what is to be found out, between `# STUB` and `# END`, commented, what stands there
instead. Notebooks hold no outputs. They need no package here, and Jupyter to be run.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SPOT = re.compile(r"^ *# SOLUTION\n(.*?)^ *# STUB\n(.*?)^ *# END\n", re.DOTALL | re.MULTILINE)


class Cell(NamedTuple):
    kind: str  # code, markdown or answer
    text: str


def read(script: Path) -> list[Cell]:
    """A script -> its cells, markers still in place."""
    cells = []
    for part in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            kind = "answer" if "answer" in head else "markdown"
            cells.append(Cell(kind, re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()))
        else:
            cells.append(Cell("code", text.strip() + "\n"))
    return cells


def with_solution(text: str) -> str:
    return SPOT.sub(lambda found: found[1], text).strip()


def with_stub(text: str) -> str:
    uncommented = re.compile(r"^( *)# ?", re.MULTILINE)
    return SPOT.sub(lambda found: uncommented.sub(r"\1", found[2]), text).strip()


def exercises(cells: list[Cell]) -> list[list[Cell]]:
    """-> what comes before the first exercise, then the cells of each."""
    parts = [[]]
    for cell in cells:
        if cell.text.startswith("## ") and cell.kind == "markdown":
            parts.append([])
        parts[-1].append(cell)
    return parts


def notebook(cells: list[tuple[str, str]]) -> str:
    """(kind, text) of each cell -> the text of an .ipynb file, without outputs."""
    found = []
    for number, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell |= {"source": text.splitlines(keepends=True)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def sheet(cells: list[Cell]) -> str:
    stubs = [(c.kind, with_stub(c.text)) for c in cells if c.kind != "answer"]
    return notebook(stubs)


def solved(cells: list[Cell]) -> str:
    def shown(cell: Cell) -> tuple[str, str]:
        if cell.kind == "code":
            return "code", with_solution(cell.text)
        return "markdown", f"**Answer.** {cell.text}" if cell.kind == "answer" else cell.text

    return notebook([shown(cell) for cell in cells])


def answers(cells: list[Cell]) -> str:
    """-> markdown: each exercise's text, its solution and answer folded."""
    lines = ["# Twelve exercises, with answers\n\nMade by `python workshop/make.py`.\n"]
    for part in exercises(cells)[1:]:
        code = [with_solution(c.text) for c in part if c.kind == "code" and SPOT.search(c.text)]
        answer = next(c.text for c in part if c.kind == "answer")
        lines += [part[0].text, "\n<details><summary>Answer</summary>\n"]
        lines += ["```python", *code, "```\n", answer, "\n</details>\n"]
    return "\n".join(lines)


def made() -> dict[str, str]:
    """-> {name of a file in this folder: its text}."""
    twelve = read(HERE / "exercises.py")
    files = {"exercises.ipynb": sheet(twelve), "solutions.ipynb": solved(twelve)}
    files["answers.md"] = answers(twelve)
    for name in ("one_step", "knock_out"):
        files[f"{name}.ipynb"] = solved(read(HERE / f"{name}.py"))
    return files


def main() -> None:
    for name, text in made().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"written: {HERE / name}")


if __name__ == "__main__":
    sys.exit(main())
