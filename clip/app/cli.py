"""The `clip` command.

    clip classify PICTURE... --labels "a dog" "a cat"     which of these is it?
    clip verify MODEL                                     is this model the published one?
    clip draw --count 1000 -o FOLDER                      pictures with captions, drawn on the spot
    clip train CAPTIONS... --out FOLDER                   learn from pictures and captions

Answers go to standard output, progress and complaints to standard error. The exit code is 0 if all went well, 1 if
some pictures could not be read or a check failed, 2 if the command could not start.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from tqdm import tqdm

from .. import __version__
from ..checkpoints.released import MODELS, DownloadError, download
from ..clip import EMBEDDED, available_models, load
from ..model import CLIP
from ..preprocess import ImageError, Preprocess, open_image
from ..tasks.zero_shot import NONE_PROMPTS, TEMPLATE, Match, ZeroShotClassifier
from ..training.drawn import write_folder
from .command import CommandError
from .train import add_train_command
from .verify import verify

BATCH = 32  # pictures in the model at once


def main(arguments: list[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process, if None) and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"clip {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        if str(stop):
            print(f"clip {options.command}: {stop}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clip", description="OpenAI's CLIP: pictures and words in one space.")
    parser.add_argument("--version", action="version", version=f"clip-from-scratch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    classify = commands.add_parser(
        "classify",
        help="say which of your labels fits a picture best",
        description="Say which of your labels fits each picture best, with labels made up on the spot.",
        epilog="""\
probability   which of these labels, between 0 and 100 %, all together 100: it depends on the other labels, and is
              high for the least bad one even when none fits (then try --none)
cosine        how alike this picture and this label are, between -1 and 1, whatever the other labels: with OpenAI's
              models a match is near 0.3, anything else near 0.15

examples:
  clip classify photo.jpg --labels "a dog" "a cat"
  clip classify *.jpg --labels forest lake town --template "an aerial photo of a {}." --template "a map of a {}."
  clip classify photo.jpg --labels "a dog" "a cat" --none --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    classify.set_defaults(run=_classify)
    classify.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files")
    classify.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help="names to choose from")
    classify.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f'a sentence with {{}} for the label; repeat it to average several (default: "{TEMPLATE}")',
    )
    classify.add_argument("--none", action="store_true", help='add the answer "none of these"')
    classify.add_argument("--top", type=_count, default=5, metavar="K", help="labels to show (default: 5)")
    classify.add_argument("--json", action="store_true", help="print one JSON object a line instead of tables")
    _add_model_options(classify, "--model", default="ViT-B/32")

    check = commands.add_parser(
        "verify",
        help="compare a model with the figures published about it",
        description="Compare a released model with published figures: its size, token ids and, for ViT-B/32, the "
        "cosines printed in OpenAI's notebook for seven pictures of scikit-image.",
    )
    check.set_defaults(run=_verify)
    check.add_argument("--download", action="store_true", help="fetch the released file if it is not here yet")
    _add_model_options(check, "model")

    draw = commands.add_parser(
        "draw",
        help="make pictures with captions to learn from or to try things on",
        description="Draw simple scenes, with a caption for each: pictures, and captions.csv beside them.",
    )
    draw.set_defaults(run=_draw)
    draw.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new or empty folder")
    draw.add_argument("--count", type=_count, default=100, metavar="N", help="pictures (default: 100)")
    draw.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: 0)")
    draw.add_argument("--size", type=_count, default=128, metavar="PIXELS", help="side of a picture (default: 128)")
    draw.add_argument(
        "--held-out", action="store_true", help="only combinations of colour and thing that training never shows"
    )

    add_train_command(commands)
    return parser


def _add_model_options(parser: argparse.ArgumentParser, name: str, default: str | None = None) -> None:
    """The model, by name or path, and where it runs."""
    choices = ", ".join(available_models())
    parser.add_argument(name, metavar="MODEL", default=default, help=f"a checkpoint's path, or one of {choices}")
    parser.add_argument("--device", metavar="DEVICE", help='"cpu", "cuda", "cuda:1", "mps" or "auto"')


def _count(text: str) -> int:
    """A positive number, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _classify(options: argparse.Namespace) -> int:
    model, preprocess = _load(options)
    none_prompts = NONE_PROMPTS if options.none else ()
    try:
        classifier = ZeroShotClassifier(model, options.labels, options.template or TEMPLATE, none_prompts)
    except (RuntimeError, ValueError) as error:
        raise CommandError(error) from error

    show = _as_json if options.json else _as_table
    bad = 0
    many = len(options.pictures) > 1
    with tqdm(total=len(options.pictures), unit="picture", disable=None if many else True) as bar:
        for paths, images in _read(options.pictures, preprocess):
            readable = [image for image in images if not isinstance(image, ImageError)]
            answers = iter(classifier(torch.stack(readable)).top(options.top) if readable else [])
            for path, image in zip(paths, images, strict=True):
                if not isinstance(image, ImageError):
                    bar.write(show(path, next(answers)))
                elif options.json:
                    bar.write(json.dumps({"picture": path, "error": str(image)}, ensure_ascii=False))
                else:
                    bar.write(f"clip classify: {image}", file=sys.stderr)
                bad += isinstance(image, ImageError)
            bar.update(len(paths))
    if bad:
        print(f"clip classify: {bad} of {len(options.pictures)} pictures could not be read", file=sys.stderr)
    return 1 if bad else 0


def _read(paths: list[str], preprocess: Preprocess) -> Iterator[tuple[list[str], list[torch.Tensor | ImageError]]]:
    """Batches of paths with what was read there: a tensor for the model, or why there is none."""

    def read(path: str) -> torch.Tensor | ImageError:
        try:
            return preprocess(open_image(path))
        except ImageError as error:
            return error
        except ValueError as error:  # of a shape that cannot be resized
            return ImageError(f"{path}: {error}")

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            yield batch, list(pool.map(read, batch))


def _as_json(path: str, matches: list[Match]) -> str:
    """One picture's answer as one line."""
    return json.dumps({"picture": path, "matches": [asdict(match) for match in matches]}, ensure_ascii=False)


def _as_table(path: str, matches: list[Match]) -> str:
    """One picture's answer as a small table, with a bar of up to 20 blocks for each probability."""
    width = max(len("label"), *(len(match.label) for match in matches))
    lines = [path, f"  {'label':{width}}  probability  cosine"]
    for match in matches:
        bar = "█" * round(20 * match.probability)
        lines.append(f"  {match.label:{width}}  {match.probability:11.2%}  {match.cosine:6.3f}  {bar}".rstrip())
    return "\n".join(lines) + "\n"


def _verify(options: argparse.Namespace) -> int:
    if options.model in EMBEDDED:
        raise CommandError(f"nothing was published about {options.model}, which is ours; see docs/model_card.md")
    try:
        model, preprocess = _load(options, local_files_only=not options.download)
    except CommandError as error:
        if isinstance(error.__cause__, DownloadError) and not options.download:
            raise CommandError(f"{error}\nOr fetch it now: clip verify {options.model} --download") from error
        raise
    failed = 0
    try:
        file = download(MODELS[options.model], local_files_only=True) if options.model in MODELS else options.model
        for check in verify(model, preprocess, file):
            failed += not check.passed
            print(f"{'pass' if check.passed else 'FAIL'}  {check.what}")
            print(f"        expected  {check.expected}")
            print(f"        measured  {check.measured}")
    except ImportError as error:
        raise CommandError(error) from error
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


def _draw(options: argparse.Namespace) -> int:
    try:
        write_folder(options.out, options.count, options.seed, options.size, options.held_out)
    except (ValueError, OSError) as error:
        raise CommandError(error) from error
    print(f"{options.count} pictures and captions.csv in {options.out}")
    return 0


def _load(options: argparse.Namespace, local_files_only: bool = False) -> tuple[CLIP, Preprocess]:
    """The model of the command line, or a CommandError that says why not."""
    try:
        return load(options.model, options.device, local_files_only=local_files_only)
    except (RuntimeError, ValueError) as error:
        raise CommandError(error) from error
