"""`clip evaluate`: how good is a model at a task, beside what was published about it?

    files                      training/data.py reads them: pictures with captions, a class being a caption too
      │  features              tasks/encode.py, tasks/linear_probe.py
      │  scores                cosines with sentences, or logits of the probe
      │  figures               tasks/metrics.py
    a table, or JSON           with the figures of published.py beside them; confusion.py draws the confusion matrix

What is measured is a share in [0, 1] in JSON and a percentage in the table; what was published is in percent in both.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoints.released import MODELS, sha256_of
from ..model import CLIP
from ..preprocess import Preprocess
from ..tasks.encode import Rows, encode_images, encode_texts, gather
from ..tasks.linear_probe import fit_linear_probe, probe_features, require_scikit_learn, split
from ..tasks.metrics import (
    confusion_matrix,
    mean_per_class_accuracy,
    mean_reciprocal_rank_at_k,
    recall_at_k,
    top_k_accuracy,
)
from ..tasks.zero_shot import ZeroShotClassifier
from ..training.data import Captioned, read_captions
from .command import (
    CommandError,
    add_command,
    add_model_options,
    complaining,
    count,
    load_model,
    picture_to_write,
    require_matplotlib,
)
from .confusion import NEEDS_MATPLOTLIB, commonest_confusions, draw_confusion
from .published import datasets, published

TEMPLATES = Path(__file__).parent / "templates"  # those that the paper quotes
QUOTED = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.txt")))
CONFUSED = 5  # pairs of classes in the table
NAMES = 25  # characters for the names of figures
WORDS = {  # for those that do not speak for themselves
    "top_1": "top-1 accuracy",
    "top_5": "top-5 accuracy",
    "mean_per_class": "mean per class accuracy",
    "strength": "regularisation λ",
    "validation_top_1": "validation accuracy",
}
EPILOG = """\
After each of them, --json prints one JSON object instead of a table, and --debug shows where an error comes from.

examples:
  clip evaluate zero-shot imagenet/val --labels names.txt --templates mine.txt --dataset imagenet
  clip evaluate retrieval captions_val2017.json --images val2017 --prefix "a photo of " --dataset coco
  clip evaluate linear-probe food/train food/test --confusion food.png

clip evaluate TASK --help tells more."""
PICTURES = """\
what {} may be:
  FOLDER                        a folder of pictures for each class
  labels.csv, labels.tsv        columns image and caption, the caption being the name of the class
  labels.jsonl                  {{"image_path": ..., "caption": ...}} a line
  shards/*.tar                  WebDataset shards
"""
ZERO_SHOT_EPILOG = f"""\
{PICTURES.format("PICTURES")}
what is in the files:
  --labels      a line for each class: its name; or its folder (or label in the table), a tab, and its name. Names may
                be there without pictures. Without a file, classes are called as their folders. _ is a space.
  --templates   a sentence a line, with {{}} for the name; several are averaged. The paper quotes few of those it used,
                and these can be had by name: {QUOTED}.
  Empty lines, and lines that begin with #, are left out in both.

examples:
  clip evaluate zero-shot pets/test --templates pets --dataset pets
  clip evaluate zero-shot imagenet/val --labels names.txt --templates mine.txt --dataset imagenet --confusion in.png"""
RETRIEVAL_EPILOG = """\
R@k     recall at k, elsewhere hits at k: the share of queries with a right answer among the first k
MRR@k   mean reciprocal rank at k: 1 / the place of the first right answer, or 0 if it is beyond k

A picture may find any of its captions. The paper put "a photo of" in front of each caption (App. E.1).

examples:
  clip evaluate retrieval captions.txt --images Flickr8k
  clip evaluate retrieval captions_val2017.json --images val2017 --prefix "a photo of " --dataset coco"""
LINEAR_PROBE_EPILOG = f"""\
{PICTURES.format("TRAIN, TEST and VALIDATION")}
The protocol is the paper's: features before the projection for ViTs, logistic regression by scikit-learn's L-BFGS, its
regularisation chosen on validation pictures, the final fit on those and the training pictures together.

examples:
  clip evaluate linear-probe food/train food/test
  clip evaluate linear-probe train.csv test.csv --validation val.csv --model ViT-L/14 --confusion matrix.png"""


def add_evaluate_command(commands: argparse._SubParsersAction) -> None:
    """Add `evaluate` and its tasks to the commands of `clip`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a model on pictures whose classes or captions are known",
        description="Measure a model on a task with known answers, beside what was published about it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    zero_shot = add_command(
        tasks,
        "zero-shot",
        help="name the class of each picture, by sentences alone (CLIP §3.1)",
        description="Name the class of each picture, by sentences alone, and count how often it is the right one.",
        epilog=ZERO_SHOT_EPILOG,
    )
    zero_shot.set_defaults(run=_zero_shot)
    zero_shot.add_argument("pictures", metavar="PICTURES", help="pictures with their classes, see below")
    zero_shot.add_argument("--labels", metavar="FILE", help="what the classes are called, see below")
    zero_shot.add_argument("--templates", metavar="FILE", default="photo", help="sentences for them (default: photo)")
    _add_shared_options(zero_shot, matrix=True)

    retrieval = add_command(
        tasks,
        "retrieval",
        help="find the pictures of captions, and the captions of pictures (App. E.1)",
        description="Look for each caption's picture among all pictures, and for each picture's captions among all.",
        epilog=RETRIEVAL_EPILOG,
    )
    retrieval.set_defaults(run=_retrieval)
    retrieval.add_argument("captions", metavar="CAPTIONS", help="a table, JSON lines, COCO's captions, or .tar shards")
    retrieval.add_argument("--prefix", metavar="TEXT", default="", help="put in front of each caption as it is")
    retrieval.add_argument("--at", nargs="+", type=count, default=[1, 5, 10], metavar="K", help="(default: 1 5 10)")
    _add_shared_options(retrieval, matrix=False)

    probe = add_command(
        tasks,
        "linear-probe",
        help="learn a linear classifier on the features of frozen weights (§3.2, App. A.3)",
        description="Learn a linear classifier on the image features, and ask it about other pictures.",
        epilog=LINEAR_PROBE_EPILOG,
    )
    probe.set_defaults(run=_linear_probe)
    probe.add_argument("train", metavar="TRAIN", help="pictures to learn from, see below")
    probe.add_argument("test", metavar="TEST", help="pictures to be asked about")
    probe.add_argument("--validation", metavar="PICTURES", help="the data set's own (default: a fifth of TRAIN)")
    probe.add_argument("--seed", type=int, metavar="N", default=0, help="another one takes another fifth (default: 0)")
    _add_shared_options(probe, matrix=True)


def _add_shared_options(parser: argparse.ArgumentParser, matrix: bool) -> None:
    """What all tasks have; `matrix` for those with a confusion matrix."""
    task = parser.prog.split()[-1]
    parser.add_argument("--images", metavar="FOLDER", help="where pictures in tables and JSON lie (default: beside it)")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        choices=datasets(task),
        help=f"show published figures for it beside yours: {', '.join(datasets(task))}",
    )
    if matrix:
        parser.add_argument(
            "--confusion",
            type=picture_to_write,
            metavar="FILE",
            help="draw which classes are taken for which (.png, .pdf, ...)",
        )
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="pictures at once (default: 64)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="threads that read them (default: 2)")
    add_model_options(parser, "--model", default="ViT-B/32")


# The three tasks


def _zero_shot(options: argparse.Namespace) -> int:
    if options.confusion:
        require_matplotlib(*NEEDS_MATPLOTLIB)
    items = _labelled(options.pictures, options.images)
    names = _names(options.labels, _labels(items))
    templates = _templates(options.templates)
    model, preprocess = load_model(options, optimized=True)
    classifier = ZeroShotClassifier(model, list(names.values()), templates, progress=True)
    vectors, read = _encoded(encode_images, model, preprocess, items, options)
    scores, targets = vectors @ classifier.weights.cpu(), _targets(read, list(names))

    facts = {
        "pictures": len(read),
        "unreadable": len(items) - len(read),
        "classes": len(names),
        "templates": len(templates),
    }
    return _report(options, facts, _accuracies(scores, targets), confusion_matrix(scores, targets), classifier.labels)


def _retrieval(options: argparse.Namespace) -> int:
    items = read_captions(options.captions, options.images)
    model, preprocess = load_model(options, optimized=True)
    vectors, read = _encoded(encode_images, model, preprocess, items, options)
    texts = [options.prefix + caption for item in read for caption in item.captions]
    captions = encode_texts(model, texts, truncate=True, progress=True)

    number = {identity: place for place, identity in enumerate(dict.fromkeys(item.identity for item in read))}
    of_picture = torch.tensor([number[item.identity] for item in read])
    of_caption = torch.tensor([number[item.identity] for item in read for _ in item.captions])
    similarities, right = vectors @ captions.T, of_picture[:, None] == of_caption  # (pictures, captions)
    figures = {}
    for name, *asked in (("picture_to_text", similarities, right), ("text_to_picture", similarities.T, right.T)):
        figures |= {f"{name}_R@{k}": share for k, share in recall_at_k(*asked, options.at).items()}
        figures |= {f"{name}_MRR@{k}": mean for k, mean in mean_reciprocal_rank_at_k(*asked, options.at).items()}

    facts = {"pictures": len(read), "unreadable": len(items) - len(read), "captions": len(texts)}
    return _report(options, facts, figures)


def _linear_probe(options: argparse.Namespace) -> int:
    require_scikit_learn()
    if options.confusion:
        require_matplotlib(*NEEDS_MATPLOTLIB)
    sources = {"train": options.train, "validation": options.validation, "test": options.test}
    parts = {name: _labelled(source, options.images) for name, source in sources.items() if source}
    labels = _labels(parts["train"])
    if len(labels) < 2:
        raise CommandError(f"{options.train}: expected at least two classes, got only {labels[0]!r}")
    for name, items in parts.items():
        if unknown := set(_labels(items)) - set(labels):
            raise CommandError(
                f"{sources[name]}: {min(unknown)!r} is no class of {options.train}, where it could be learned"
            )
    model, preprocess = load_model(options)
    facts: dict[str, int] = {}
    data: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # features and targets
    for name, items in parts.items():
        vectors, read = _encoded(probe_features, model, preprocess, items, options)
        facts |= {f"{name}_pictures": len(read), f"{name}_unreadable": len(items) - len(read)}
        data[name] = vectors, _targets(read, labels)

    (train, train_targets), (test, targets) = data["train"], data["test"]
    if "validation" in data:
        probe = fit_linear_probe(train, train_targets, *data["validation"])
    else:
        rest, kept = split(train_targets, seed=options.seed)
        probe = fit_linear_probe(train[rest], train_targets[rest], train[kept], train_targets[kept])
    scores = probe(test)

    facts |= {"classes": len(labels), "features": train.shape[1]}
    figures = {"strength": probe.strength, "validation_top_1": probe.validation_accuracy[probe.strength]}
    figures |= _accuracies(scores, targets)
    return _report(options, facts, figures, confusion_matrix(scores, targets), labels)


# What goes in


def _labelled(path: str, images: str | None) -> list[Captioned]:
    """Pictures with their class as the one caption: the folder's name, or what is said in a table."""
    items = read_captions(path, images, templates=("{}",))
    spelled: dict[str, str] = {}
    for item in items:
        if len(item.captions) > 1:
            raise CommandError(f"{path}: expected one class a picture, got {', '.join(item.captions)} of {item.source}")
        written = item.captions[0] if item.identity == item.group else item.identity  # that of a folder is its name
        if (other := spelled.setdefault(_label(item), written)) != written:
            raise CommandError(f"{path}: {other!r} and {written!r} are one class, as _ is a space: rename one of them")
    return items


def _label(item: Captioned) -> str:
    """The class of a labelled picture, with spaces for _ wherever it was written."""
    return item.captions[0].replace("_", " ")


def _labels(items: Iterable[Captioned]) -> list[str]:
    """The classes of labelled pictures."""
    return sorted({_label(item) for item in items})


def _names(file: str | None, labels: Sequence[str]) -> dict[str, str]:
    """How each class is called in sentences, those without pictures included."""
    if file is None:
        return {label: label for label in labels}
    classes: dict[str, int] = {}  # with the number of its line, as the names
    names: dict[str, int] = {}
    for number, line in _lines(file).items():
        folder, _, name = line.partition("\t")
        label = folder.strip().replace("_", " ")
        for kind, word, seen in (("class", label, classes), ("name", name.strip() or label, names)):
            if word in seen:
                raise CommandError(f"{file}, line {number}: the {kind} {word!r} stands in line {seen[word]} already")
            seen[word] = number
    if missing := [label for label in labels if label not in classes]:
        raise CommandError(
            f"{file}: nothing says how {missing[0]!r} is called (missing: {len(missing)} of {len(labels)} classes); "
            "expected a line with its name, or with its folder, a tab and its name"
        )
    return dict(zip(classes, names, strict=True))


def _templates(file: str) -> list[str]:
    """The sentences of a file, or those the paper quotes under a name."""
    shipped = TEMPLATES / f"{file}.txt"
    if not Path(file).exists() and not shipped.exists():
        raise CommandError(f"{file}: there is no such file, nor is it one of {QUOTED}")
    return list(_lines(file if Path(file).exists() else shipped).values())


def _lines(file: str | Path) -> dict[int, str]:
    """The lines that say something, by their numbers."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: expected UTF-8 text ({error})") from error
    lines = {number: line for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")}
    if not lines:
        raise CommandError(f"{file}: expected at least one line that is not empty")
    return lines


def _encoded(
    encode: Callable[..., Iterator[Rows]],
    model: CLIP,
    preprocess: Preprocess,
    items: Sequence[Captioned],
    options: argparse.Namespace,
) -> tuple[torch.Tensor, list[Captioned]]:
    """The vectors of the pictures that can be read, and the items they belong to; complaints about the others."""
    pictures = [item.open for item in items]
    batches = encode(model, preprocess, pictures, options.batch_size, options.workers, progress=True)
    rows = gather(complaining("evaluate", batches))
    return rows.values, [items[index] for index in rows.indices]


# What comes out


def _targets(items: Iterable[Captioned], labels: Sequence[str]) -> torch.Tensor:
    """The classes of labelled pictures as numbers."""
    place = {label: number for number, label in enumerate(labels)}
    return torch.tensor([place[_label(item)] for item in items])


def _accuracies(scores: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """What is said of a classifier; top-5 if that is not all there is."""
    ks = (1, 5) if scores.shape[1] > 5 else (1,)
    figures = {f"top_{k}": share for k, share in top_k_accuracy(scores, targets, ks).items()}
    return figures | {"mean_per_class": mean_per_class_accuracy(scores, targets)}


def _report(
    options: argparse.Namespace,
    facts: dict[str, int],
    figures: dict[str, float],
    matrix: torch.Tensor | None = None,
    names: Sequence[str] = (),
) -> int:
    """Print what was measured, draw the confusion matrix if asked to, and return the exit code."""
    released = _released_name(options.model) if options.dataset else None
    known = published(options.task, options.dataset, released) if released else []
    if options.json:
        answer = {"task": options.task, "model": options.model, **facts, **figures}
        if options.dataset:
            answer |= {"dataset": options.dataset, "published": [asdict(figure) for figure in known]}
        print(json.dumps(answer))
    else:
        print(f"{options.task} of {options.model}\n")
        for name, number in facts.items():
            if number:
                print(f"{name.replace('_', ' '):{NAMES}}{number:9,}")
        print(f"\n{'':{NAMES}} measured{'   published' if known else ''}")
        for name, value in figures.items():
            words = WORDS.get(name, name.replace("_", " "))
            others = [f"{figure.percent:g} % ({figure.source})" for figure in known if figure.name == name]
            print(f"{words:{NAMES}}{_shown(name, value):>9}   {', '.join(others)}".rstrip())
        if options.dataset and not known:
            print(f"\nnothing published about {options.model} on {options.dataset} is known here")
        if matrix is not None and (confused := commonest_confusions(matrix, names, CONFUSED)):
            print("\nmost often confused")
            print("\n".join(f"{times:6}  {true} → {taken}" for times, true, taken in confused))
    if matrix is not None and options.confusion:
        draw_confusion(matrix, names, options.confusion)
    return 1 if any(number for name, number in facts.items() if name.endswith("unreadable")) else 0


def _released_name(model: str) -> str | None:
    """Which of OpenAI's models this name, or the content of this file, is."""
    if model in MODELS or not Path(model).is_file():
        return model if model in MODELS else None
    digest = sha256_of(Path(model)).hexdigest()
    return next((name for name, url in MODELS.items() if digest in url), None)


def _shown(name: str, value: float) -> str:
    """A share in percent; what is none, with three digits."""
    return f"{value:.3g}" if name == "strength" else f"{value:.3f}" if "MRR" in name else f"{value:.1%}"
