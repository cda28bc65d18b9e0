"""Figures as tables, beside what was aimed at, and as a picture."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from .contest import MACHINE

EAGER = ("original", "open_clip", "transformers")


@dataclass(frozen=True)
class Target:
    """How our figure of a case should compare with that of the best of some entrants.

    Our time should be `bound` times shorter at least, our memory `bound` times theirs at most.
    """

    question: str
    case: str
    against: tuple[str, ...]
    bound: float

    @property
    def what(self) -> str:
        """What is measured, in words."""
        return f"`{self.question}` {self.case}"

    @property
    def is_time(self) -> bool:
        """Whether it is about time, not memory."""
        return not self.case.endswith("peak memory")


TARGETS = [
    Target("tokenize", "English, warm", ("original",), 12),
    Target("tokenize", "English, first pass", ("original",), 5),
    Target("tokenize", "English, warm", ("tokenizers",), 8),
    Target("tokenize", "noisy Unicode and HTML", ("original",), 2),
    Target("tokenize", "every other one noisy", ("original",), 2),
    Target("load", "ViT-B/32, call", ("original",), 8),
    Target("load", "ViT-B/32, whole process", ("original",), 3),
    Target("load", "ViT-B/32, peak memory", ("original",), 0.55),
    Target("preprocess", "1080p JPEGs, 2 threads", ("original",), 1.8),
    Target("encode_image", "ViT-B/32 float32, batch 1", EAGER, 2.4),
    Target("encode_image", "ViT-B/32 float32, batch 8", EAGER, 2.2),
    Target("encode_image", "ViT-B/32 float32, batch 32", EAGER, 2.3),
    Target("encode_image", "ViT-B/32 float32, batch 1", ("onnxruntime",), 1.05),
    Target("encode_image", "ViT-B/32 float32, batch 8", ("onnxruntime",), 1.05),
    Target("encode_image", "ViT-B/32 float32, batch 32", ("onnxruntime",), 1.05),
    Target("encode_image", "ViT-B/32 float32, batch 32", (MACHINE,), 0.8),
    Target("encode_image", "ViT-B/32 bfloat16, batch 32; peers in float32", EAGER, 4),
    Target("encode_image", "RN50 float32, batch 8", EAGER, 2),
    Target("encode_image", "RN50 float32, batch 32", EAGER, 3),
    Target("encode_image", "RN50 float32, batch 8", ("onnxruntime",), 1),
    Target("encode_image", "RN50 float32, batch 32", ("onnxruntime",), 1),
    Target("encode_text", "ViT-B/32 float32, batch 32", ("original",), 15),
    Target("encode_text", "ViT-B/32 float32, batch 256", ("original",), 20),
    Target("encode_text", "ViT-B/32 float32, batch 32", ("transformers",), 2.2),
    Target("encode_text", "ViT-B/32 float32, batch 256", ("transformers",), 2.2),
    Target("zero_shot_classifier", "100 classes x 80 templates", ("original",), 20),
    Target("train_step", "ViT-B/32 float32, batch 32", ("open_clip",), 2.2),
    Target("train_step", "ViT-B/32 bfloat16, batch 32", ("original",), 1.5),
    Target("train_step", "ViT-B/32 float32, batch 32, peak memory", ("open_clip",), 0.7),
]


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured: the ratio, and the entrant it is against; None where that was not possible."""

    target: Target
    ratio: float | None = None
    against: str = ""

    @property
    def verdict(self) -> str:
        """Whether the ratio is on the right side of the bound."""
        if self.ratio is None:
            return "not measured"
        bound = self.target.bound
        return "met" if (self.ratio >= bound if self.target.is_time else self.ratio <= bound) else "not met"


def outcome(target: Target, results: dict[str, dict]) -> Outcome:
    """Compare a target with the results, by question."""
    case = results.get(target.question, {}).get("cases", {}).get(target.case)
    figures = {name: statistics.median(values) for name, values in case["figures"].items()} if case else {}
    peers = [name for name in target.against if name in figures]
    if not peers or "ours" not in figures:
        return Outcome(target)
    best = min(peers, key=figures.get)
    ours, theirs = figures["ours"], figures[best]
    return Outcome(target, theirs / ours if target.is_time else ours / theirs, best)


def markdown(results: dict[str, dict]) -> str:
    """The table of targets, then each question's figures, with what they were measured on."""
    lines = ["| what | against | target | measured | |", "|---|---|---|---|---|"]
    for row in (outcome(target, results) for target in TARGETS):
        named = f"best of {', '.join(row.target.against)}" if len(row.target.against) > 1 else row.target.against[0]
        if row.against and row.against != named:
            named += f" ({row.against})"
        bound = f"{row.target.bound:g}x" if row.target.is_time else f"at most {row.target.bound:g}x"
        measured = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"| {row.target.what} | {named} | {bound} | {measured} | {row.verdict} |")
    for result in results.values():
        lines += ["", *_figures(result)]
    return "\n".join(lines) + "\n"


def _figures(result: dict) -> list[str]:
    """One question: medians, spread, how many times faster or smaller we are, and the share of the machine's peak."""
    facts = [f"{name} {value}" for name, value in result["machine"].items()] + list(result["versions"].values())
    lines = [f"## {result['question']}", "", "; ".join(facts), ""]
    if result["quick"]:
        lines += ["A smoke run with small inputs: the figures mean nothing.", ""]
    for dtype, ways in result["peak"].items():
        best = max(ways, key=ways.get)
        found = ", ".join(f"{way} {rate / 1e9:.0f}" for way, rate in ways.items())
        lines += [f"The machine's peak in {dtype} is that of {best}, in GFLOP/s: {found}.", ""]
    lines += [f"{name} is left out: {reason}" for name, reason in result["left out"].items()]
    lines += [
        "",
        "| case | entrant | median | min - max | to ours | of the peak |",
        "|---|---|---|---|---|---|",
    ]
    for case, measured in result["cases"].items():
        figures = dict(measured["figures"])
        needed = figures.pop(MACHINE, [None])[0]
        ours = statistics.median(figures["ours"])
        for name, values in figures.items():
            median = statistics.median(values)
            spread = " - ".join(_written(value, measured["unit"]) for value in (min(values), max(values)))
            share = f"{needed / median:.0%}" if needed else ""
            lines.append(
                f"| {case} | {name} | {_written(median, measured['unit'])} | {spread} | {median / ours:.2f} | {share} |"
            )
    return lines


def _written(value: float, unit: str) -> str:
    """A figure with its unit."""
    return f"{value:.0f} MiB" if unit == "MiB" else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def draw(results: dict[str, dict], path: Path) -> None:
    """Draw a bar for each target: how many times less time or memory we take, and a mark where it should end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in (outcome(target, results) for target in TARGETS) if row.ratio is not None]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        ratio, bound = (x if row.target.is_time else 1 / x for x in (row.ratio, row.target.bound))
        axes.barh(y, ratio - 1, left=1, height=0.6, color="#4c78a8" if row.verdict == "met" else "#e0a458")
        axes.plot([bound, bound], [y - 0.42, y + 0.42], color="black", linewidth=1.5)
        axes.annotate(
            f"{ratio:.3g}", (max(1, ratio, bound), y), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    ticks = (0.5, 1, 2, 3, 5, 10, 20, 30, 50)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(
        range(len(rows)), [f"{row.target.what.replace('`', '')}  |  {row.against}" for row in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How many times less time or memory we take. Mark: the target. Blue: met.", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
