"""Make the file of the embedded model from a finished run: half precision, and only the words that it has met.

    python examples/tiny/pack.py runs/tiny -o clip/weights/tiny.safetensors

The vocabulary has 49,408 tokens, and most of a small model would be embeddings of tokens that training never saw. They
are left out of the file and come back as zeros when it is loaded.
"""

import argparse
import random
from pathlib import Path

import torch

import clip
from clip.checkpoints import write_checkpoint
from clip.checkpoints.files import trained_rows
from clip.model import config_of
from clip.training.data import read_captions
from clip.training.drawn import sample_scene
from clip.training.options import TrainingOptions

SCENES = 50_000  # enough to have met every word of the drawn world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args()

    model, _ = clip.load(options.run / "best.safetensors", device="cpu")
    seen = torch.zeros(model.vocab_size, dtype=torch.bool)
    seen[clip.tokenize(list(captions(TrainingOptions.read(options.run)))).unique().long()] = True

    weights = {name: half(tensor) for name, tensor in model.state_dict().items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(options.out, config_of(model), trained_rows(weights, seen))
    size = options.out.stat().st_size
    print(f"{options.out}: {size / 1e6:.2f} MB, {int(seen.sum())} of {len(seen)} tokens")


def captions(options: TrainingOptions) -> set[str]:
    """Every caption that the run could have met; of the drawn world, a large sample."""
    found = set()
    for source in options.captions:
        if source == "drawn":
            rng = random.Random(0)
            found |= {sample_scene(rng, held_out=False).caption(rng) for _ in range(SCENES)}
        else:
            found |= {caption for item in read_captions(source, options.images) for caption in item.captions}
    return found


def half(tensor: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers in float16, counters as they are."""
    return tensor.half() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    main()
