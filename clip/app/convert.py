"""`clip convert`: a model in the form in which other programs read it, compared with the original before it appears."""

import argparse
import json
from pathlib import Path

import torch

from ..checkpoints import read_checkpoint
from ..checkpoints.convert import FORMS, appearing, write_as
from ..clip import _tokenizer, find_checkpoint, load
from ..config import UNSEEN, CLIPConfig
from ..model import CLIP, check_entries
from .command import CommandError, add_command

SAMPLES = 4  # pictures, and texts, of random numbers
TOLERANCE = 1e-5  # of the largest number; the weights are the same to the bit, the memory they lie in is another
EPILOG = """\
forms:
  openai        one file: OpenAI's state dict, for clip.model.build_model(torch.load(TARGET)) of the released package.
                It cannot say more than shapes show: QuickGELU, heads of 64 channels, OpenAI's preprocessing.
  huggingface   a folder for transformers.CLIPModel, CLIPTokenizer and CLIPImageProcessor.from_pretrained. ViTs only.
  open_clip     a folder for open_clip.create_model_from_pretrained("local-dir:TARGET").

examples:
  clip convert ViT-B/32 vit-b-32 --to huggingface
  clip convert open_clip_pytorch_model.bin laion --to huggingface --set activation=gelu"""


def add_convert_command(commands: argparse._SubParsersAction) -> None:
    """Add `convert` to the commands of `clip`."""
    parser = add_command(
        commands,
        "convert",
        help="write a model for OpenAI's package, transformers or open_clip",
        description="Write a model in the form in which another program reads it. It is loaded again and compared\n"
        "with the original before it gets its name: nothing half-written is ever at TARGET.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_convert)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a model's name, hf-hub:OWNER/NAME, or the path of any file or folder that clip.load reads",
    )
    parser.add_argument("target", metavar="TARGET", help="a file or folder that is not there yet")
    parser.add_argument("--to", required=True, choices=FORMS, help="for whom, see below")
    parser.add_argument(
        "--set",
        dest="known",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help=f"what SOURCE does not say: {', '.join(UNSEEN)}",
    )


def _setting(text: str) -> tuple[str, object]:
    """`activation=gelu` as ("activation", "gelu"), `vision_heads=16` as ("vision_heads", 16), for argparse."""
    name, equals, value = text.partition("=")
    if name not in UNSEEN or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a name among {', '.join(UNSEEN)}, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _convert(options: argparse.Namespace) -> int:
    target = Path(options.target)
    if target.exists():
        raise CommandError(f"{target} is there already; name a place where nothing is")
    if not target.absolute().parent.is_dir():
        raise CommandError(f"{target}: there is no folder {str(target.parent)!r} to write it in")
    source = find_checkpoint(options.source)
    config, weights = read_checkpoint(source, known=dict(options.known))
    if not isinstance(config, CLIPConfig):
        raise CommandError(
            f"{options.source} is a DualEncoder, and these forms hold a CLIP with its own two towers only; clip.save "
            "writes it whole"
        )
    check_entries(config, weights)
    known = {name: getattr(config, name) for name in UNSEEN}
    with appearing(target) as written:
        write_as(options.to, written, config, weights)
        if options.to == "huggingface" and config.vocab_size == len(_tokenizer.encoder):
            _write_tokenizer(written)
        weights.clear()
        if read_checkpoint(written)[0] != config:
            raise CommandError("the configuration did not come back as it was written; this is a bug, nothing was kept")
        difference = _compare(source, written, known)
    if options.json:
        answer = {"source": options.source, "target": options.target, "form": options.to, "difference": difference}
        print(json.dumps(answer))
    else:
        print(f"{target}, in the form of {options.to}: loaded again, it embeds as {options.source} does")
        print(f"largest difference in {SAMPLES} pictures and {SAMPLES} texts: {difference:.1e} of the largest number")
    return 0


def _write_tokenizer(folder: Path) -> None:
    """The files of transformers.CLIPTokenizer, which then makes of a text the ids that `clip.tokenize` makes of it."""
    merges = ["#version: 0.2", *(" ".join(pair) for pair in _tokenizer.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(_tokenizer.encoder, ensure_ascii=False), encoding="utf-8")
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))


def _compare(source: str, written: Path, known: dict[str, object]) -> float:
    """The largest difference between what the two embed, or a CommandError if it is not a rounding."""
    expected, found = _features(load(source, "cpu", config=known)[0]), _features(load(written, "cpu")[0])
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))
    if not difference <= TOLERANCE:  # nor is it if it is not a number
        raise CommandError(f"the features differ by {difference:.1e} after loading; this is a bug, nothing was kept")
    return difference


@torch.no_grad()
def _features(model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model makes of pictures and texts of random numbers."""
    random = torch.Generator().manual_seed(0)
    side = model.visual.input_resolution
    images = torch.randn(SAMPLES, 3, side, side, generator=random)
    tokens = torch.randint(1, model.vocab_size - 1, (SAMPLES, model.context_length), generator=random)
    tokens[:, -1] = model.vocab_size - 1
    return model.encode_image(images), model.encode_text(tokens)
