"""`clip index`: pictures become vectors, once, so that they can be searched."""

import argparse
import json
import os
import sys
from dataclasses import asdict

from ..clip import available_models
from ..tasks.retrieval import Index, folders_of, model_of
from .command import add_command, add_draft_option, add_model_options, count, draft_side, load_model, printable

MODEL = "ViT-B/32"
EPILOG = f"""\
Without --model it is the one that made the index; {MODEL} for a new one.

When the command is done, the index holds exactly what is below the folders. The next run reads only files that are new
or have changed (in size or time), and drops what is gone. Killed at any moment, it goes on where it was. Equal contents
are embedded once. Bad files are listed at the end, and not read again until they change.

examples:
  clip index ~/Pictures /mnt/camera -o photos.clipindex
  clip index -o photos.clipindex                           the same folders again, with the same model
  clip index drawings -o drawings.clipindex --model tiny

clip search looks something up in it."""


def add_index_command(commands: argparse._SubParsersAction) -> None:
    """Add `index` to the commands of `clip`."""
    parser = add_command(
        commands,
        "index",
        help="prepare folders of pictures for search, or catch up with them",
        description="Embed every picture below some folders, so that `clip search` finds it.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_index)
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="folders of pictures (default: those of last time)"
    )
    parser.add_argument("-o", "--out", required=True, metavar="INDEX", help="the index: a folder, made if need be")
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="pictures at once (default: 64)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="threads that read (default: 2)")
    add_draft_option(parser)
    add_model_options(parser, "--model")


def _index(options: argparse.Namespace) -> int:
    folders = folders_of(options.out, options.folders)  # a typing error should not cost the loading of a model
    options.model = options.model or model_of(options.out) or MODEL
    if options.model not in available_models() and os.path.isfile(options.model):
        options.model = os.path.abspath(options.model)  # a search may start from another folder
    model, preprocess = load_model(options)
    try:
        index = Index.build(
            options.out,
            folders,
            model,
            preprocess,
            options.model,
            batch_size=options.batch_size,
            workers=options.workers,
            draft=draft_side(options, model),
            progress=True,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None
    changes = index.changes
    if options.json:
        print(json.dumps({"index": options.out, "model": options.model, "pictures": len(index), **asdict(changes)}))
    else:
        print(
            f"{options.out}: {len(index)} different picture{'s' * (len(index) != 1)}; {changes.embedded} embedded, "
            f"{changes.recognised} copied or moved, {changes.unchanged} unchanged, {changes.dropped} dropped"
        )
    for path, error in changes.errors.items():
        print(f"clip index: {printable(path)}: {error}", file=sys.stderr)
    if changes.errors:
        print(f"clip index: {len(changes.errors)} could not be read", file=sys.stderr)
    return 1 if changes.errors else 0
