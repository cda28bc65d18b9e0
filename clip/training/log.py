"""What a run says of itself: one JSON object a line, and a picture of it at the end."""

import json
import math
import os
from pathlib import Path
from types import TracebackType

__all__ = ["RunLog", "draw_curves", "read_log"]


class RunLog:
    """A file of JSON lines that can be cut back to an earlier state.

    Parameters
    ----------
    path : path
        Opened for appending when the log is entered, so that a log that nobody writes to leaves no file.
    events : bool
        Also write TensorBoard events beside it.
    """

    def __init__(self, path: str | os.PathLike, events: bool = False):
        self.path = Path(path)
        self._events_wanted, self._events, self._file = events, None, None

    def __enter__(self) -> "RunLog":
        if self._events_wanted:
            steps = [row["step"] for row in read_log(self.path)] if self.path.exists() else []
            self._events = _summary_writer(self.path.parent, max(steps, default=0) + 1)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events:
            self._events.close()

    def write(self, row: dict[str, float]) -> None:
        """Add a line; it is with the operating system when this returns. `row` has its "step".

        What is no number, as the gradient of a step that overflowed in float16, is written as null.

        Raises
        ------
        OSError
            If it cannot be written, naming the file.
        """
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; what was saved before is intact", str(self.path)) from error
        if self._events:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Bring what was written onto the disk."""
        if self._file:
            os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what was written after the log was `size` bytes long."""
        if self.size > size:
            os.truncate(self.path, size)


def _summary_writer(folder: Path, next_step: int) -> object:
    """TensorBoard's writer, which hides what earlier runs wrote from that step on; or a sentence how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard events need the package tensorboard: pip install clip-from-scratch[train]"
        ) from error
    return SummaryWriter(folder, purge_step=next_step)


def read_log(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a log; a last one that a killed process left half written is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def draw_curves(log: str | os.PathLike, picture: str | os.PathLike) -> None:
    """Draw a run's log: loss beside ln(batch), the scale, the gradient, and what the evaluations found.

    Parameters
    ----------
    log : path
        JSON lines as :class:`RunLog` writes them.
    picture : path
        The picture to write; its ending says the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would want a screen
    except ImportError as error:
        raise ImportError("the picture of the curves needs matplotlib: pip install clip-from-scratch[train]") from error

    rows = read_log(log)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    names = sorted({name for row in evaluations for name in row} - {"step", "validation_loss", "validation_chance"})

    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, scores, scale, gradient = figure.subplots(2, 2).flat
    at = [row["step"] for row in steps]
    loss.plot(at, [row["chance"] for row in steps], "--", color="grey", label="nothing learned")
    loss.plot(at, [row["loss"] for row in steps], alpha=0.25, color="tab:blue")
    loss.plot(at, _smooth([row["loss"] for row in steps]), color="tab:blue", label="training, smoothed")
    held = [(row["step"], row["validation_loss"]) for row in evaluations if "validation_loss" in row]
    if held:
        loss.plot(*zip(*held, strict=True), "o-", markersize=3, color="tab:orange", label="validation")
        guessed = [(row["step"], row["validation_chance"]) for row in evaluations if "validation_chance" in row]
        loss.plot(*zip(*guessed, strict=True), ":", color="tab:orange", label="validation, nothing learned")
    loss.set(title="loss", xlabel="step", ylim=(0, None))
    loss.legend()

    for name in names:
        points = [(row["step"], row[name]) for row in evaluations if name in row]
        scores.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
    scores.set(title="evaluations", xlabel="step", ylim=(0, 1.02))
    if names:
        scores.legend(fontsize="small")

    scale.plot(at, [row["scale"] for row in steps])
    scale.set(title="scale, exp(logit_scale)", xlabel="step")
    gradient.plot(at, [row["gradient_norm"] or math.nan for row in steps], linewidth=0.7)
    gradient.set(title="gradient norm", xlabel="step", yscale="log")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """An exponential running mean, over as many values as there have been at the start."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean / (1 - keep**count))
    return smoothed
