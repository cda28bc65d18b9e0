"""`clip search`: which pictures of an index are nearest to a sentence, or to another picture?"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..preprocess import ImageError, open_image
from ..tasks.retrieval import QDRANT, Index, Match, Query, model_of
from ..tasks.search_backends import BACKENDS
from ..tasks.vector_store import VectorStore
from .command import (
    CommandError,
    add_command,
    add_model_options,
    count,
    load_model,
    picture_to_write,
    printable,
    require_matplotlib,
)

TILE = 2.2  # inches
EPILOG = """\
A cosine is between -1 and 1. With OpenAI's models it is near 0.3 for a sentence and a photograph that fit; the nearest
is the nearest even if nothing fits.

examples:
  clip search "a red bicycle" --index photos.clipindex
  clip search "a red bicycle" "snow" --index photos.clipindex --grid matches.png
  clip search --image holiday.jpg --more "at night" --less people --index photos.clipindex
  clip search "a red bicycle" --index photos.clipindex --json | jq -r '.matches[].path'
  clip search "a red bicycle" --index photos.clipindex --backend faiss-hnsw --recall"""


def add_search_command(commands: argparse._SubParsersAction) -> None:
    """Add `search` to the commands of `clip`."""
    parser = add_command(
        commands,
        "search",
        help="find pictures by a sentence, or by another picture",
        description="Find the pictures of an index that are nearest to a sentence, or to another picture.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_search)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to look for; each is a query of its own")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PICTURE", help="a picture to find the like of; may be repeated"
    )
    parser.add_argument("--index", required=True, metavar="INDEX", help="what `clip index` made")
    parser.add_argument("--top", type=count, default=9, metavar="K", help="matches to show (default: 9)")
    parser.add_argument("--grid", type=picture_to_write, metavar="FILE", help="also draw the matches, as a picture")
    for name, what in (("--more", "more"), ("--less", "less")):
        parser.add_argument(
            name,
            action="append",
            default=[],
            metavar="TERM",
            help=f"{what} like this, in every query: words, or the path of a picture; may be repeated",
        )
    parser.add_argument(
        "--weight", type=float, default=0.5, metavar="W", help="of --more and --less beside the query (default: 0.5)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="exact", help="how to search (default: exact)")
    parser.add_argument("--server", metavar="ADDRESS", help=f"of Qdrant (default: {QDRANT})")
    parser.add_argument(
        "--recall", action="store_true", help="also search exactly, and tell how many of the nearest the backend found"
    )
    add_model_options(parser, "--model")


def _search(options: argparse.Namespace) -> int:
    if options.grid:
        require_matplotlib("--grid", "search")
    queries = _queries(options)
    made_by = model_of(options.index)
    if made_by is None:
        raise CommandError(f"{options.index}: there is no index; make one: clip index FOLDER -o {options.index}")
    if not len(VectorStore(options.index)):
        print(f"clip search: {options.index}: the index is empty; clip index fills it", file=sys.stderr)
        return 1
    towers = {"text" if isinstance(term, str) else "image" for query in queries for _, term in query.terms}
    tower = towers.pop() if len(towers) == 1 else None
    options.model = options.model or made_by
    model, preprocess = load_model(options, tower=tower)

    index = Index.open(options.index, model, preprocess, options.backend, options.server)
    answers = index.search(*queries, top=options.top)
    for query, matches in zip(queries, answers, strict=True):
        recall = index.recall(query, top=options.top) if options.recall else None
        if options.json:
            line = {"query": str(query), "matches": [asdict(match) for match in matches]}
            print(json.dumps(line if recall is None else {**line, "recall": recall}))
        else:
            print(_as_table(str(query), matches))
            if recall is not None:
                nearest = min(options.top, len(index))
                print(f"  recall  {recall:.3f} of the {nearest} nearest, found by {options.backend}\n")
    if options.grid:
        _draw_grid(options.grid, [str(query) for query in queries], answers)
    return 0


def _queries(options: argparse.Namespace) -> list[Query]:
    """Each text and each picture, with what all of them should be more and less like."""
    starts = [*options.texts, *(Path(picture) for picture in options.image)]
    if not starts:
        raise CommandError('what to look for? give a text, as in: clip search "a red bicycle", or --image PICTURE')
    terms = [(options.weight, _term(text)) for text in options.more]
    terms += [(-options.weight, _term(text)) for text in options.less]
    return [Query([(1, start), *terms]) for start in starts]


def _term(text: str) -> str | Path:
    """A picture, if there is such a file; otherwise words."""
    return Path(text) if os.path.isfile(text) else text


def _as_table(query: str, matches: Sequence[Match]) -> str:
    """One query's answer for people."""
    lines = [printable(query), "  rank  cosine  picture"]
    for match in matches:
        copies = f"  (and {', '.join(map(_shown, match.copies))})" if match.copies else ""
        lines.append(f"  {match.rank:4}  {match.cosine:6.3f}  {_shown(match.path)}{copies}")
    return "\n".join(lines) + "\n"


def _shown(path: str) -> str:
    """A path for people: short where it can be."""
    below = os.path.relpath(path)
    return printable(path if below.startswith(os.pardir) else below)


def _draw_grid(file: str, queries: Sequence[str], answers: Sequence[Sequence[Match]]) -> None:
    """The matches side by side, each with its cosine; one query in a square, several in a row each."""
    from matplotlib.figure import Figure  # pyplot would want a screen

    most = max(1, *map(len, answers)) if answers else 1
    columns = math.ceil(math.sqrt(most)) if len(queries) == 1 else most
    rows = math.ceil(most / columns)
    figure = Figure(figsize=(columns * TILE, len(queries) * (rows * (TILE + 0.2) + 0.4)), layout="constrained")
    parts = figure.subfigures(len(queries), 1, squeeze=False)[:, 0]
    for part, query, matches in zip(parts, queries, answers, strict=True):
        part.suptitle(printable(query), wrap=True, parse_math=False)
        for place, axes in enumerate(part.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if place < len(matches):
                _draw_match(axes, matches[place])
    figure.savefig(file)


def _draw_match(axes: object, match: Match) -> None:
    """One picture with its cosine; or its name, if it cannot be read any more."""
    axes.set_title(f"{match.cosine:.3f}", fontsize=9)
    try:
        picture = open_image(match.path).convert("RGB")
    except ImageError:
        axes.text(0.5, 0.5, os.path.basename(_shown(match.path)), ha="center", transform=axes.transAxes)
    else:
        picture.thumbnail((400, 400))
        axes.imshow(picture)
