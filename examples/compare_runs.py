"""Compare runs of `clip train`: one panel for each thing they were asked while they trained, one line for each run.

    python examples/compare_runs.py runs/with-twins runs/without-twins -o twins.png

A run is its folder, finished or still going. Needs matplotlib (`pip install clip-from-scratch[train]`).
"""

import argparse
from pathlib import Path

import matplotlib

from clip.training.log import read_log

matplotlib.use("Agg")
from matplotlib import pyplot

NOT_ASKED = {"step", "loss", "chance", "scale", "gradient_norm", "lr", "samples_per_second"}  # what every step tells

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
parser.add_argument("-o", "--out", type=Path, default="runs.png", help="the picture to write")
options = parser.parse_args()

logs = {run.name: read_log(run / "log.jsonl") for run in options.runs}
figures = sorted({name for rows in logs.values() for row in rows for name in row} - NOT_ASKED)
if not figures:
    parser.error("nothing was evaluated in these runs")

_, panels = pyplot.subplots(
    1, len(figures), figsize=(3.2 * len(figures), 3.2), sharey=True, squeeze=False, layout="constrained"
)
for figure, panel in zip(figures, panels[0], strict=True):
    for name, rows in logs.items():
        asked = [row for row in rows if figure in row]
        panel.plot([row["step"] for row in asked], [row[figure] for row in asked], marker=".", label=name)
    panel.set(title=figure.replace("_", " "), xlabel="step")
    panel.grid(alpha=0.3)
panels[0, 0].legend()
pyplot.savefig(options.out, dpi=100)
print(f"{', '.join(figures)} of {', '.join(logs)}; see {options.out}")
