"""`clip classify`: which of these labels is it?"""

import argparse
import json
import sys
from dataclasses import asdict

from tqdm import tqdm

from ..tasks.encode import read_pictures
from ..tasks.zero_shot import NONE_PROMPTS, TEMPLATE, Match, ZeroShotClassifier
from .command import add_command, add_model_options, count, load_model, printable

BATCH = 32  # pictures in the model at once
EPILOG = """\
probability   which of these labels, between 0 and 100 %, all together 100: it depends on the other labels, and is
              high for the least bad one even when none fits (then try --none)
cosine        how alike this picture and this label are, between -1 and 1, whatever the other labels: with OpenAI's
              models a match is near 0.3, anything else near 0.15

examples:
  clip classify photo.jpg --labels "a dog" "a cat"
  clip classify *.jpg --labels forest lake town --template "an aerial photo of a {}." --template "a map of a {}."
  clip classify photo.jpg --labels "a dog" "a cat" --none --json"""


def add_classify_command(commands: argparse._SubParsersAction) -> None:
    """Add `classify` to the commands of `clip`."""
    parser = add_command(
        commands,
        "classify",
        help="say which of your labels fits a picture best",
        description="Say which of your labels fits each picture best, with labels made up on the spot.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_classify)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help="names to choose from")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f'a sentence with {{}} for the label; repeat it to average several (default: "{TEMPLATE}")',
    )
    parser.add_argument("--none", action="store_true", help='add the answer "none of these"')
    parser.add_argument("--top", type=count, default=5, metavar="K", help="labels to show (default: 5)")
    add_model_options(parser, "--model", default="ViT-B/32")


def _classify(options: argparse.Namespace) -> int:
    model, preprocess = load_model(options, optimized=len(options.pictures) > BATCH)
    none_prompts = NONE_PROMPTS if options.none else ()
    classifier = ZeroShotClassifier(model, options.labels, options.template or TEMPLATE, none_prompts)

    show = _as_json if options.json else _as_table
    paths, bad = options.pictures, 0
    for rows in read_pictures(paths, preprocess, BATCH, progress=len(paths) > 1):
        answers = classifier(rows.values).top(options.top) if rows.indices else []
        lines = {index: show(paths[index], answer) for index, answer in zip(rows.indices, answers, strict=True)}
        for index in sorted([*rows.indices, *rows.errors]):
            if index in lines:
                tqdm.write(lines[index])
            elif options.json:
                tqdm.write(json.dumps({"picture": paths[index], "error": str(rows.errors[index])}))
            else:
                tqdm.write(printable(f"clip classify: {rows.errors[index]}"), file=sys.stderr)
        bad += len(rows.errors)
    if bad:
        print(f"clip classify: {bad} of {len(paths)} pictures could not be read", file=sys.stderr)
    return 1 if bad else 0


def _as_json(path: str, matches: list[Match]) -> str:
    """One picture's answer as one line."""
    return json.dumps({"picture": path, "matches": [asdict(match) for match in matches]})


def _as_table(path: str, matches: list[Match]) -> str:
    """One picture's answer as a small table, with a bar of up to 20 blocks for each probability."""
    labels = [printable(match.label) for match in matches]
    width = max(len("label"), *map(len, labels))
    lines = [printable(path), f"  {'label':{width}}  probability  cosine"]
    for label, match in zip(labels, matches, strict=True):
        bar = "█" * round(20 * match.probability)
        lines.append(f"  {label:{width}}  {match.probability:11.2%}  {match.cosine:6.3f}  {bar}".rstrip())
    return "\n".join(lines) + "\n"
