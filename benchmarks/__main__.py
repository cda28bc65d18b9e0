"""Measure, print the table, draw the picture: `python -m benchmarks [QUESTION ...]`."""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

from .contest import Contest
from .peers import ROOT
from .table import draw, markdown

QUESTIONS = ("tokenize", "load", "preprocess", "encode_image", "encode_text", "zero_shot_classifier", "train_step")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder for the results")
    parser.add_argument("--threads", type=int, default=2, help="of each entrant (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one small round: does it work? The figures mean nothing")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is in the folder")
    options = parser.parse_args()
    if unknown := set(options.questions) - set(QUESTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; questions are {', '.join(QUESTIONS)}")

    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for question in [] if options.table else options.questions or QUESTIONS:
            module = importlib.import_module(f".{question}", __package__)
            print(f"{question}: {module.__doc__.splitlines()[0]}", flush=True)
            with Contest(question, options.out, Path(work), options.threads, options.quick) as contest:
                try:
                    module.run(contest)
                except Exception as error:  # the other questions can be answered all the same
                    failed = True
                    print(f"{question} failed: {error}", file=sys.stderr)

    files = {question: options.out / f"{question}.json" for question in QUESTIONS}
    results = {question: json.loads(file.read_text()) for question, file in files.items() if file.exists()}
    text = markdown(results)
    print(text)
    (options.out / "results.md").write_text(text)
    draw(results, options.out / "ratios.png")
    return failed


if __name__ == "__main__":
    sys.exit(main())
