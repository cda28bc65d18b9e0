"""`clip draw`: pictures with captions, made on the spot."""

import argparse
import json

from ..training.drawn import write_folder
from .command import add_command, count

EPILOG = """\
examples:
  clip draw -o drawings
  clip draw --count 200 --held-out -o drawings     what no model of ours was trained on
  clip train drawings/captions.csv --model tiny --minutes 5 --out runs/drawings"""


def add_draw_command(commands: argparse._SubParsersAction) -> None:
    """Add `draw` to the commands of `clip`."""
    parser = add_command(
        commands,
        "draw",
        help="make pictures with captions to learn from or to try things on",
        description="Draw simple scenes, with a caption for each: pictures, and captions.csv beside them.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_draw)
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--count", type=count, default=100, metavar="N", help="pictures (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: 0)")
    parser.add_argument("--size", type=count, default=128, metavar="PIXELS", help="side of a picture (default: 128)")
    parser.add_argument(
        "--held-out", action="store_true", help="only combinations of colour and thing that training never shows"
    )


def _draw(options: argparse.Namespace) -> int:
    write_folder(options.out, options.count, options.seed, options.size, options.held_out)
    if options.json:
        print(json.dumps({"folder": options.out, "pictures": options.count}))
    else:
        print(f"{options.count} pictures and captions.csv in {options.out}")
    return 0
