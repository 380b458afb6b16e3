"""
Figures for slides, 16:9 and in letters of 20 points or more, from a run's report.

  python workshop/slides.py --run=out/chain        writes out/chain/slides/*.png

knock_out.png (is it the thoughts?), window.png (how far does it get, and on what view?),
meaning.png (what do thoughts say?), learning.png. Needs report.json and metrics.jsonl, which a run
of train.py on sequences with answers ends with.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import DataError
from lab.report import LONGEST, draw_meaning
from options import load_config, option, run

SIZE, DPI = (13.33, 7.5), 144  # inches: a slide; 1,920 x 1,080 pixels
POINTS = 20


@dataclass
class SlidesConfig:
    run: str = option("out/chain", "folder of a finished run")


def load(folder: Path) -> tuple[dict, list[dict]]:
    """-> report, and the validations of metrics.jsonl. Raises DataError."""
    try:
        report = json.loads((folder / "report.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError as error:
        advice = "train first, or run lab/report.py"
        raise DataError(f"cannot read {error.filename} ({error.strerror}): {advice}") from None
    if "accuracy" not in report["modes"].get("policy", {}):
        raise DataError(f"{folder} holds no thinking model that answers: nothing to draw")
    return report, [m for m in map(json.loads, lines) if "validation" in m]


def curve(axis, accuracy: dict[str, float], name: str, **how) -> None:
    axis.plot([int(n) for n in accuracy], [*accuracy.values()], marker="o", label=name, **how)


def by_level(axis, report: dict) -> None:
    trained = report["trained_levels"]
    axis.axvspan(trained[0], trained[-1], color="0.92", label="trained")
    axis.set(xscale="log", xlabel=report["level"], ylabel="answers right", ylim=(-0.03, 1.03))
    axis.set_xticks(ticks := [4**i for i in range(6)], ticks)
    axis.minorticks_off()
    axis.legend()


def knock_out(axis, report: dict, _) -> None:
    for mode, line in report["modes"].items():
        short = {n: share for n, share in line["accuracy"].items() if int(n) <= LONGEST}
        curve(axis, short, mode, lw=4 if mode == "policy" else 2)
    axis.set_title("Take the thoughts away, or what they say")
    by_level(axis, report)


def window(axis, report: dict, _) -> None:
    curve(axis, report["modes"]["policy"]["accuracy"], "all in view", lw=3)
    for size, line in report["windows"].items():
        curve(axis, line["accuracy"], f"{size} positions in view", lw=3)
    axis.set_title("Little in view: the thought is the memory")
    by_level(axis, report)


def meaning(axis, report: dict, _) -> None:
    draw_meaning(report["meaning"], axis)


def learning(axis, report: dict, checks: list[dict]) -> None:
    for n in report["trained_levels"]:
        shares = [check["validation"].get(str(n)) for check in checks]
        axis.plot([check["step"] for check in checks], shares, lw=3, label=n)
    axis.set(xlabel="step", ylabel="held-out answers right", ylim=(-0.03, 1.03))
    axis.set_title(f"Short ones first: {report['seconds']:.0f} s on {report['device']}")
    axis.legend(title=report["level"], ncols=2)


def main(argv: list[str]) -> None:
    folder = Path(load_config(argv, SlidesConfig).run)
    report, checks = load(folder)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = POINTS  # ticks and legends are "medium": as large
    (folder / "slides").mkdir(exist_ok=True)
    wanted = [knock_out, window, meaning, learning]
    for draw in wanted if "meaning" in report else [knock_out, window, learning]:
        figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
        draw(axis, report, checks)
        path = folder / "slides" / f"{draw.__name__}.png"
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
        print(f"written: {path}")


if __name__ == "__main__":
    run(main, "workshop/slides.py")
