"""`clip train`: the fields of TrainingOptions as a command line."""

import argparse
import dataclasses
import json
import math
import sys
import time
import types
import typing

from ..training.options import TrainingOptions
from ..training.run import prepare, train
from .command import CommandError, add_command

GROUPS = {  # heading of the help: the options below it
    "data": "images templates shares validation holdout zero_shot augment twins seed workers",
    "model": "model init freeze thaw",
    "length, one of": "epochs steps minutes",
    "update": "batch_size chunk checkpointing precision loss scale max_scale lr image_lr text_lr warmup weight_decay "
    "max_norm",
    "what is seen and saved": "out evaluate_every save_every tensorboard device",
}
METAVARS = {int: "N", float: "X", str: "TEXT"} | dict.fromkeys(("images", "zero_shot", "out"), "FOLDER")
METAVARS |= {"holdout": "FILE", "model": "MODEL", "init": "WEIGHTS", "device": "DEVICE"}
BY_HEART = 300  # updates within which one batch is learned, if all is well
EPILOG = """\
what CAPTIONS may be, one or more of these:
  captions.csv, captions.txt    columns image and caption; several rows of one picture are its captions
  pairs.jsonl                   {"image_path": ..., "captions": [...]} a line
  annotations.json              COCO captions
  FOLDER                        a folder of pictures for each class, named by --templates
  shards/*.tar                  WebDataset shards
  drawn                         scenes drawn on the spot, no files needed

is it learning?  The loss starts near ln(batch), which is what guessing costs. If it stays there, try
  clip train CAPTIONS --overfit-one-batch     a sound set-up learns one batch by heart within a few hundred steps
  clip train CAPTIONS --dry-run               reads, updates once, evaluates, says how long it will take, writes nothing

examples:
  clip train drawn --model tiny --precision bfloat16 --minutes 10 --out runs/drawn
  clip train captions.txt --images Flickr8k --model ViT-B/32 --init openai --lr 1e-5 --epochs 5 --out runs/flickr
  clip train --resume --out runs/flickr"""


def add_train_command(commands: argparse._SubParsersAction) -> None:
    """Add `train` to the commands of `clip`."""
    parser = add_command(
        commands,
        "train",
        help="learn from pictures and captions, from scratch or from given weights",
        description="Train a CLIP on pictures and captions; clip.load reads the result, OUT/best.safetensors.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_train)
    parser.add_argument("captions", nargs="*", metavar="CAPTIONS", help="what to learn from, see below")
    fields = {field.name: field for field in dataclasses.fields(TrainingOptions)}
    types = typing.get_type_hints(TrainingOptions)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            _add(group, fields[name], types[name])
    aid = parser.add_argument_group("going on, and first aid").add_mutually_exclusive_group()
    aid.add_argument("--resume", action="store_true", help="go on with the run in OUT, by the options saved there")
    aid.add_argument("--overfit-one-batch", action="store_true", help="learn a single batch by heart; writes nothing")
    aid.add_argument("--dry-run", action="store_true", help="try everything once; writes nothing")


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: object) -> None:
    """One field as an option: --batch-size for batch_size, its type and default as in the dataclass."""
    flag, about = "--" + field.name.replace("_", "-"), field.metadata["help"]
    choices = field.metadata["choices"]
    if kind is bool:
        group.add_argument(flag, action="store_true", help=about)
        return
    many = typing.get_origin(kind) is tuple
    (value_type,) = (one for one in typing.get_args(kind) or (kind,) if one not in (types.NoneType, ...))
    default = field.default
    if default not in (None, ()):
        about += f" (default: {' '.join(map(str, default)) if many else default})"
    group.add_argument(
        flag,
        type=value_type,
        nargs="+" if many else None,
        choices=choices,
        default=default,
        metavar=None if choices else METAVARS.get(field.name, METAVARS[value_type]),
        help=about,
    )


def _train(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(TrainingOptions)]
    options = TrainingOptions(**{name: getattr(arguments, name) for name in names})
    if arguments.resume:
        if options != TrainingOptions(out=options.out):
            raise CommandError("--resume goes by the options saved in the run's folder; give it nothing but --out")
        options = dataclasses.replace(TrainingOptions.read(options.out), out=options.out)  # it may have been moved
    if not options.captions:
        raise CommandError('say what to learn from, before all options: caption files, a folder of classes, or "drawn"')
    if arguments.dry_run:
        return _dry_run(options, arguments.json)
    if arguments.overfit_one_batch:
        return _overfit(options, arguments.json)
    trainer = train(options, arguments.resume)
    best = f"{options.out}/best.safetensors"
    if arguments.json:
        print(json.dumps({"steps": trainer.step, "checkpoint": best}))
    else:
        print(f'{trainer.step} steps; clip.load("{best}") loads the result')
    return 0


def _dry_run(options: TrainingOptions, as_json: bool) -> int:
    """Read, update, evaluate and time everything once."""
    trainer = prepare(options)
    batches = trainer.batches.epoch(0)
    trainer.update(next(batches))  # the first is slower than all others
    started = time.monotonic()
    batch = next(batches, None) or next(trainer.batches.epoch(0))
    read = time.monotonic() - started
    row = trainer.update(batch)
    seconds = time.monotonic() - started
    steps = trainer.total or round(60 * options.minutes / seconds)
    parameters = sum(p.numel() for p in trainer.parameters)
    figures = trainer.evaluate(trainer.model.eval()) if trainer.evaluate else {}
    if as_json:
        facts = {
            "parameters": parameters,
            "batches": len(trainer.batches),
            "loss": row["loss"],
            "chance": row["chance"],
        }
        facts |= {"step_seconds": seconds, "read_seconds": read, "steps": steps, "evaluation": figures}
        print(json.dumps(facts))
        return 0
    name = options.model if options.init in ("scratch", "openai") else options.init
    print(f"model       {name}, {parameters:,} parameters to train, on {trainer.device}")
    print(f"pairs       {len(trainer.batches)} batches of {options.batch_size} an epoch")
    print(f"one batch   {', '.join(repr(caption) for caption in batch.captions[:3])}, ...")
    print(f"loss        {row['loss']:.3f}; guessing costs {row['chance']:.3f}")
    print(f"speed       {seconds:.2f} s a step, {read:.2f} s of it to read the pictures")
    print(f"length      {steps} steps, about {_duration(seconds * steps)}")
    if figures:
        print("evaluation  " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    print("nothing was written")
    return 0


def _duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _overfit(options: TrainingOptions, as_json: bool) -> int:
    """Learn one batch until it is known by heart, or until it is clear that this does not happen."""
    trainer = prepare(dataclasses.replace(options, steps=BY_HEART, epochs=None, minutes=None, warmup=20))
    batch = next(trainer.batches.epoch(0))
    for _ in range(BY_HEART):
        row = trainer.update(batch)
        learned = row["loss"] < 0.05 * row["chance"]
        if as_json:
            print(json.dumps(row), flush=True)
        elif row["step"] == 1 or row["step"] % 10 == 0 or learned:
            bar = "█" * math.ceil(40 * min(1, row["loss"] / row["chance"]))
            print(f"step {row['step']:4}  loss {row['loss']:7.4f} of {row['chance']:.2f}  {bar}", flush=True)
        if learned:
            print("learned by heart: model, loss and optimiser work; nothing was written", file=sys.stderr)
            return 0
    print(
        f"not learned: the loss is {row['loss']:.3f} of {row['chance']:.3f}. Equal captions in a batch cannot be told "
        "apart (try --loss multi-positive); otherwise try another --lr, and look whether captions belong to pictures",
        file=sys.stderr,
    )
    return 1
