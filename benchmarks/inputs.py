"""What the peers are fed with, the same for all and in every run: weights, pictures, captions."""

import gzip
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .peers import ROOT

sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "golden")]
from archive import write_archive
from fill import fill

RESOLUTION = 224
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "grey")
MEDIA = ("photo", "picture", "drawing", "painting", "sketch", "statue", "rendering", "scan", "print", "poster")
LOOKS = ("good", "bad", "blurry", "bright", "dark", "large", "small", "low-resolution")
TEMPLATES = [f"a {look} {medium} of a {{}}." for medium in MEDIA for look in LOOKS]  # 80
GARBLED = ("â€œoldâ€\x9d", "cafÃ©", "&amp;amp;", "&lt;b&gt;", "&#39;s", "&eacute;t&eacute;", "ＦＵＬＬ", "e\u0301")
FOREIGN = ("zürich", "naïve", "東京", "москва", "🙂", "Ελλάδα", "“quoted”", "œuvre", "niño", "kraków")


def checkpoint(sizes: dict[str, int | str], path: Path) -> None:
    """Write a model of these sizes with made-up weights, in half precision, in the layout of OpenAI's files."""
    from clip.model import CLIP  # not above: in the original's process, that name is another package

    with torch.device("meta"):
        entries = CLIP(**sizes).state_dict()
    write_archive({key: torch.as_tensor(fill(key, tuple(entry.shape))) for key, entry in entries.items()}, path)


def images(count: int) -> torch.Tensor:
    """(count, 3, 224, 224), standard normal, as preprocessed pictures about are."""
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(count))


def photographs(folder: Path, count: int) -> None:
    """Write JPEGs of 1920 x 1080 pixels: photographs of scikit-image, cut and enlarged, with grain as of a sensor."""
    import skimage

    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        with Image.open(Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[i % len(PHOTOGRAPHS)]) as photograph:
            picture = photograph.convert("RGB")
        left, top = generator.uniform(0, 0.3, 2)
        box = (left * picture.width, top * picture.height, (left + 0.7) * picture.width, (top + 0.7) * picture.height)
        enlarged = np.asarray(picture.resize((1920, 1080), Image.Resampling.LANCZOS, box), np.float32)
        grain = generator.normal(0, 4, enlarged.shape)
        Image.fromarray((enlarged + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)


def texts(kind: str, count: int) -> list[str]:
    """`count` short captions: English "captions", "noisy" ones with broken Unicode, HTML and other scripts, or "mixed".

    Their words are drawn from thousands; each tenth is none of CLIP's tokens, but two together.
    """
    generator, words = random.Random(kind), vocabulary()
    forms = ("a {} {} {}.", "A photo of the {} {} in a {}", "{} {}, {}", "two {} {}s near the {}, seen from above")

    def word() -> str:
        return "".join(generator.choices(words, k=1 + (generator.random() < 0.1)))

    def caption(noisy: bool) -> str:
        text = generator.choice(forms).format(generator.choice(COLOURS), word(), word())
        if not noisy:
            return text
        found = text.split(" ")
        for pool in (GARBLED, FOREIGN):
            found.insert(generator.randrange(len(found) + 1), generator.choice(pool))
        return "<p>" + " ".join(found) + "</p>" if generator.random() < 0.2 else "  ".join(found)

    share = {"captions": 0, "mixed": 0.5, "noisy": 1}[kind]
    return [caption(generator.random() < share) for _ in range(count)]


def class_names(count: int) -> list[str]:
    """`count` different words."""
    return random.Random("classes").sample(vocabulary(), count)


@cache
def vocabulary() -> list[str]:
    """The English-looking words among CLIP's tokens, some ten thousand, frequent ones first."""
    with gzip.open(ROOT / "bpe_vocab" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as lines:
        merged = ("".join(line.split()) for line in lines)
        whole = (word.removesuffix("</w>") for word in merged if word.endswith("</w>"))
        return [word for word in whole if word.isascii() and word.isalpha() and len(word) > 2][:12000]
