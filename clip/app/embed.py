"""`clip embed`: pictures or texts become rows of numbers in a file."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from ..checkpoints.files import replacing
from ..tasks.encode import encode_images, encode_texts, gather
from .command import (
    CommandError,
    add_command,
    add_draft_option,
    add_model_options,
    complaining,
    count,
    draft_side,
    load_model,
)

EPILOG = """\
what is in the file, for numpy.load:
  features   (N, E) float32, rows of unit length: a @ b is the cosine of two of them, from one model
  names      (N,) the pictures' paths as they were given, or the texts; row i of features belongs to name i
  kind       "pictures" or "texts"
  model      its name, as it was given

Pictures that cannot be read have no row; they are listed, and the exit code is 1.

examples:
  clip embed holiday/*.jpg -o pictures.npz
  clip embed --texts captions.txt -o texts.npz --model ViT-L/14
  clip embed --text "a dog" "a cat" -o labels.npz --model tiny
  python -c 'import numpy; f = numpy.load("pictures.npz"); print(f["names"], f["features"].shape)'"""


def add_embed_command(commands: argparse._SubParsersAction) -> None:
    """Add `embed` to the commands of `clip`."""
    parser = add_command(
        commands,
        "embed",
        help="write the features of pictures or texts to a file",
        description="Write the features of pictures, or of texts, to a file that NumPy reads. Only the tower that is\n"
        "needed is loaded.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_embed)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="picture files")
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="embed these texts instead of pictures")
    parser.add_argument("--texts", metavar="FILE", help='embed the lines of a text file (UTF-8), or "-" for stdin')
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to write, ending in .npz")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of stopping")
    parser.add_argument(
        "--image-size", type=count, metavar="PIXELS", help="read pictures at another size than the model was trained at"
    )
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="at once (default: 64)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="threads that read (default: 2)")
    add_draft_option(parser)
    add_model_options(parser, "--model", default="ViT-B/32")


def _embed(options: argparse.Namespace) -> int:
    if sum(given is not None for given in (options.pictures or None, options.text, options.texts)) != 1:
        raise CommandError("expected one of these: picture files, --text with texts, or --texts with a file of them")
    out = Path(options.out)
    if out.suffix != ".npz" or not out.parent.is_dir():  # now rather than after an hour
        raise CommandError(f"expected the name of a file in a folder that exists, ending in .npz, got {options.out}")

    if options.image_size and not options.pictures:
        raise CommandError("--image-size is about pictures, and there are only texts here")

    kind = "pictures" if options.pictures else "texts"
    texts = [] if options.pictures else options.text or _read_lines(options.texts)
    tower = "image" if options.pictures else "text"
    model, preprocess = load_model(options, tower=tower, image_size=options.image_size, optimized=True)
    if options.pictures:
        batches = encode_images(
            model,
            preprocess,
            options.pictures,
            options.batch_size,
            options.workers,
            progress=True,
            draft=draft_side(options, model),
        )
        rows = gather(complaining("embed", batches))
        features, names, errors = rows.values, [options.pictures[i] for i in rows.indices], rows.errors
    else:
        features = encode_texts(model, texts, options.batch_size, options.truncate, progress=True)
        names, errors = texts, {}

    with replacing(out) as file:
        np.savez(
            file,
            features=features.numpy(),
            names=np.array(names, dtype=np.str_),
            kind=np.array(kind),
            model=np.array(options.model),
        )
    if errors:
        print(f"clip embed: {len(errors)} of {len(options.pictures)} pictures could not be read", file=sys.stderr)
    if options.json:
        bad = {options.pictures[i]: str(error) for i, error in errors.items()}
        answer = {"file": options.out, "kind": kind, "model": options.model, "shape": list(features.shape)}
        print(json.dumps({**answer, "errors": bad}))
    else:
        things = kind if len(names) != 1 else kind.removesuffix("s")
        print(f"{options.out}: {len(names)} {things}, {features.shape[1]} numbers each, by {options.model}")
    return 1 if errors else 0


def _read_lines(file: str) -> list[str]:
    """The texts of a file, one a line; empty lines are none."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: expected a text in UTF-8 ({error})") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise CommandError(f"{file}: there is no text in it")
    return texts
