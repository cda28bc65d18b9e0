"""The picture of a confusion matrix that can be read for two classes and for a thousand.

Rows are true classes, columns what they were taken for, the darkness the share of the row. A cell has at least three
pixels, and small shares are darkened, so that a single confusion among 480 classes is still a visible dot; names stand
at as many classes as have room, and beside the matrix the commonest confusions are written out.
"""

import os
from collections.abc import Sequence

import torch

from .command import require_matplotlib

__all__ = ["NEEDS_MATPLOTLIB", "commonest_confusions", "draw_confusion"]

NEEDS_MATPLOTLIB = ("the picture of a confusion matrix", "evaluate")

DPI = 110
CELL = 3  # pixels, at least
LINE = 13  # pixels that a name needs
SIDE = 700  # pixels of a matrix with few classes
COUNTED = 20  # classes up to which the numbers are written into the cells
LISTED = 25  # confusions beside the matrix


def commonest_confusions(matrix: torch.Tensor, names: Sequence[str], count: int) -> list[tuple[int, str, str]]:
    """The largest cells off the diagonal: how often, which class, taken for which."""
    mistakes = matrix.clone().fill_diagonal_(0)
    cells = mistakes.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    found = ((mistakes.flatten()[cell].item(), *divmod(cell, len(names))) for cell in cells)
    return [(times, names[true], names[taken]) for times, true, taken in found if times]


def draw_confusion(matrix: torch.Tensor, names: Sequence[str], picture: str | os.PathLike) -> None:
    """Draw a confusion matrix.

    Parameters
    ----------
    matrix : torch.Tensor
        (K, K), int64, as :func:`clip.tasks.metrics.confusion_matrix` counts.
    names : sequence of str
        Of the K classes.
    picture : path
        The picture to write; its ending says the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    require_matplotlib(*NEEDS_MATPLOTLIB)
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # pyplot would want a screen

    classes = len(names)
    cell = max(CELL, SIDE // classes)
    side = cell * classes
    figure = Figure(figsize=(side / DPI, side / DPI), dpi=DPI)
    grid = figure.add_axes((0, 0, 1, 1))  # what stands around it is made room for when it is saved
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    grid.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ticks = range(0, classes, -(-LINE // cell))  # rounded up
    grid.set_xticks(ticks, [names[tick] for tick in ticks], rotation=90, fontsize=7, parse_math=False)
    grid.set_yticks(ticks, [names[tick] for tick in ticks], fontsize=7, parse_math=False)
    grid.set(xlabel="taken for", ylabel="true class", title="from white to dark blue: the share of a class's pictures")
    if classes <= COUNTED:
        for row, column in matrix.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.4 else "black"
            grid.text(column, row, str(matrix[row, column].item()), ha="center", va="center", color=shade)

    confused = commonest_confusions(matrix, names, LISTED)
    lines = ["most often confused", "", *(f"{times:4}  {true} → {taken}" for times, true, taken in confused)]
    beside = dict(family="monospace", fontsize=8, va="top", transform=grid.transAxes, parse_math=False)
    grid.text(1 + 30 / side, 1, "\n".join(lines) if confused else "nothing was confused", **beside)
    figure.savefig(picture, bbox_inches="tight")
