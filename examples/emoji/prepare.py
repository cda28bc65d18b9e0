"""Emoji as a data set: three studios' drawings of the same things, named in everyday English.

    pip install -r examples/emoji/requirements.txt
    python examples/emoji/prepare.py -o data/emoji

Three teams of designers drew every emoji of the Unicode standard, each in a style of its own, and the standard names
them: "grinning face", "hot beverage", "person riding a bicycle". So the same 1,870 concepts come in three styles, and a
model that learned two can be asked about the third: distribution shift (CLIP §3.3) on a small scale. Nothing is
committed here; the artwork comes from its package managers, about 16 MB in all, and is drawn on white.

    studio      comes from                           drawn from
    noto        Debian, fonts-noto-color-emoji       the font's bitmaps, by Pillow
    twemoji     npm, @twemoji/svg                    SVG, by resvg
    openmoji    npm, openmoji                        SVG, by resvg

Written into the folder: a picture `STUDIO/ID.png` for each concept, `STUDIO.csv` and, of all studios, `captions.csv`
(image, caption, id, studio; a picture with several names has several rows, and each name a row for each of
`--templates`), and `concepts.csv` (id, name, group,
held_out), where 150 concepts are marked to be kept out of training. An id is an emoji's code points, "1f600". Takes a
minute; a second run draws only what is missing.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import emoji
import resvg_py
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

SIZE = 96  # pixels: room for random crops at 64
HELD_OUT = 150

TWEMOJI = "@twemoji/svg@15.0.0"
OPENMOJI = "openmoji@17.0.0"
NOTO = "fonts-noto-color-emoji"
NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where the Debian package puts it
NOTO_POINTS = 109  # the one size of its bitmaps, 136 x 128 pixels

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two of them are a country's flag
TAGS = range(0xE0020, 0xE0080)  # they spell the flags of England, Scotland and Wales
VARIATION_SELECTOR = 0xFE0F  # "as a picture, not as text"; file names have it or not, so ids do not

# Aliases come from chat programs' shortcodes. An alias with one of these words is not plain English.
NOT_ENGLISH = re.compile(
    r"\b(abcd|bangbang|bullettrain|couplekiss|facepunch|fu|fuelpump|hankey|harambe|heartpulse|hocho|hotsprings|ideograph"
    r"|izakaya|koko|mag|mega|moyai|ng|rofl|sassy|scorpius|shit)\b"
)

Draw = Callable[[], Image.Image]


@dataclass(frozen=True)
class Concept:
    """One emoji: what it is called, where it belongs, and whether training must not see it."""

    id: str
    names: tuple[str, ...]  # the standard's first, then others
    group: str
    held_out: bool


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch the emoji of three studios, draw them, write captions.csv.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--size", type=int, default=SIZE, help="side of a picture in pixels (default: %(default)s)")
    parser.add_argument(
        "--studios", nargs="+", choices=tuple(STUDIOS), default=list(STUDIOS), help="which to draw (default: all)"
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        default=["{}"],
        metavar="TEXT",
        help='sentences with {} for a name, such as "a picture of {}"; each is a caption (default: the name alone)',
    )
    options = parser.parse_args(arguments)
    if not all("{}" in template for template in options.templates):
        parser.error(f"each template needs {{}} where the name goes, got {options.templates}")
    concepts = prepare(options.output, options.size, options.studios, options.templates)
    print(
        f"{len(concepts)} concepts in {options.output}, each drawn by {', '.join(options.studios)}; "
        f"{sum(concept.held_out for concept in concepts)} of them held out"
    )


def prepare(folder: Path, size: int, studios: Sequence[str], templates: Sequence[str] = ("{}",)) -> list[Concept]:
    """Fill `folder` as the module's docstring says, with the emoji that all of `studios` draw."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    drawings = {studio: STUDIOS[studio](cache, size) for studio in studios}  # studio -> id -> draw
    groups = openmoji_groups(cache)

    names = english_names(every_emoji())
    ids = [id for id in names if all(id in drawn for drawn in drawings.values())]
    held_out = held_out_concepts(ids)
    concepts = [Concept(id, names[id], groups.get(id, ""), id in held_out) for id in ids]

    for studio, drawn in drawings.items():
        (folder / studio).mkdir(exist_ok=True)
        for id in tqdm(ids, desc=studio, unit="picture"):
            path = folder / picture_path(studio, id)
            if not is_picture_of_size(path, size):
                write_whole(path, png(drawn[id]()))

    header = ("image", "caption", "id", "studio")
    rows = []
    for studio in studios:
        own = [
            (picture_path(studio, c.id), template.replace("{}", name), c.id, studio)
            for c in concepts
            for name in c.names
            for template in templates
        ]
        write_csv(folder / f"{studio}.csv", header, own)
        rows += own
    write_csv(folder / "captions.csv", header, rows)
    write_csv(
        folder / "concepts.csv",
        ("id", "name", "group", "held_out"),
        [(c.id, c.names[0], c.group, int(c.held_out)) for c in concepts],
    )
    write_whole(folder / "held_out.txt", "".join(f"{c.id}\n" for c in concepts if c.held_out).encode())
    return concepts


# What there is to draw, and what it is called


def every_emoji() -> list[str]:
    """All emoji but the variants that differ in skin tone only."""
    return [
        character
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and not any(ord(c) in SKIN_TONES for c in character)
    ]


def code_points(characters: Iterable[str]) -> str:
    """The id of an emoji: `code_points("❤️")` is "2764", `code_points("🇳🇴")` is "1f1f3-1f1f4"."""
    return "-".join(f"{ord(c):x}" for c in characters if ord(c) != VARIATION_SELECTOR)


def english_names(characters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each id the standard's name, then those of its aliases that are English and belong to it alone.

    "mouse" is the name of an animal and an alias of its face, so the face is called "mouse face" only.
    """
    names, aliases = {}, {}
    for character in characters:
        entry = emoji.EMOJI_DATA[character]
        id, name = code_points(character), plain_english(entry["en"])
        candidates = [plain_english(alias).removeprefix("flag for ") for alias in entry.get("alias", ())]
        if is_flag_of_a_place(character):  # Georgia is a place: the picture is of its flag, though people say Georgia
            name, candidates = f"flag of {name}", [name, *candidates]
        names[id] = name
        aliases[id] = [alias for alias in candidates if is_english(alias)]

    owners = Counter(letters(name) for name in names.values())
    for id in names:
        owners.update({letters(alias) for alias in aliases[id]})
    return {id: (name, *_own(name, aliases[id], owners)) for id, name in names.items()}


def _own(name: str, aliases: list[str], owners: Counter) -> list[str]:
    """The aliases with one owner; of several that differ in spaces and marks only, the first."""
    spellings = {}
    for alias in aliases:
        spellings.setdefault(letters(alias), alias)
    return [alias for spelling, alias in spellings.items() if owners[spelling] == 1 and spelling != letters(name)]


def plain_english(shortcode: str) -> str:
    """`plain_english(":man’s_shoe:")` is "man's shoe": lower case, ASCII, no brackets, dots or exclamation marks."""
    text = unicodedata.normalize("NFKD", shortcode.replace("’", "'").replace("&", "and").lower())
    text = text.replace("_", " ").encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9 '#*-]", "", text).split())


def is_english(alias: str) -> bool:
    """Whether a cleaned alias is words: at least three letters, no digits, none of the shortcodes' own coinages."""
    return re.fullmatch(r"[a-z' -]{3,}", alias) is not None and not NOT_ENGLISH.search(alias)


def letters(text: str) -> str:
    """What is left without spaces and marks, so that "hot dog" and "hotdog" are the same."""
    return re.sub(r"[ '-]", "", text)


def is_flag_of_a_place(character: str) -> bool:
    return any(ord(c) in REGIONAL_INDICATORS or ord(c) in TAGS for c in character)


def held_out_concepts(ids: Iterable[str]) -> set[str]:
    """The 150 ids with the smallest hashes: whatever the order, and nearly the same when emoji are added."""
    return set(sorted(ids, key=lambda id: hashlib.sha256(f"held out {id}".encode()).digest())[:HELD_OUT])


# The three studios: each is a table of what it draws, id -> a function that draws it


def noto(cache: Path, size: int) -> dict[str, Draw]:
    if not features.check("raqm"):
        sys.exit(
            "Pillow has no Raqm here, which joins code points to one emoji: install Pillow's own wheel, or libraqm"
        )
    font = ImageFont.truetype(noto_font(cache), NOTO_POINTS, layout_engine=ImageFont.Layout.RAQM)
    width = font.getlength("😀")

    def is_drawn(character: str) -> bool:
        """Whether it is one glyph, and not an empty one."""
        _, top, _, bottom = font.getbbox(character)
        return font.getlength(character) == width and bottom > top

    def draw(character: str) -> Image.Image:
        left, top, right, bottom = font.getbbox(character)
        side = max(right - left, bottom - top)
        picture = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(picture).text((side / 2, side / 2), character, font=font, embedded_color=True, anchor="mm")
        return picture.resize((size, size), Image.Resampling.LANCZOS)

    return {code_points(c): lambda c=c: draw(c) for c in every_emoji() if is_drawn(c)}


def twemoji(cache: Path, size: int) -> dict[str, Draw]:
    return svg_files(npm_package(TWEMOJI, cache), "package", size)


def openmoji(cache: Path, size: int) -> dict[str, Draw]:
    return svg_files(npm_package(OPENMOJI, cache), "package/color/svg", size)


STUDIOS = {"noto": noto, "twemoji": twemoji, "openmoji": openmoji}


def openmoji_groups(cache: Path) -> dict[str, str]:
    """The standard's group of each emoji, such as "food-drink", which OpenMoji lists beside its drawings."""
    with tarfile.open(npm_package(OPENMOJI, cache)) as archive:
        entries = json.load(archive.extractfile("package/data/openmoji.json"))
    return {code_points(entry["emoji"]): entry["group"] for entry in entries}


def svg_files(package: Path, folder: str, size: int) -> dict[str, Draw]:
    """The drawings in a folder of a package, by the code points in their names ("1F3F3-FE0F-200D-1F308.svg")."""
    drawings = {}
    with tarfile.open(package) as archive:
        for member in archive:
            parent, _, name = member.name.rpartition("/")
            if parent == folder and re.fullmatch(r"[0-9a-fA-F]+(-[0-9a-fA-F]+)*\.svg", name):
                svg = archive.extractfile(member).read().decode()
                id = code_points(chr(int(point, 16)) for point in name.removesuffix(".svg").split("-"))
                drawings[id] = lambda svg=svg: draw_svg(svg, size)
    return drawings


def draw_svg(svg: str, size: int) -> Image.Image:
    """A square SVG on white, (size, size) pixels."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGB")


# Fetching, through the package managers


def npm_package(specification: str, cache: Path) -> Path:
    """The archive of an npm package, "name@version", fetched unless it is there."""
    archive = cache / (re.sub(r"[^\w.]+", "-", specification).strip("-") + ".tgz")
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            run(["npm", "pack", "--silent", specification], scratch, "install Node.js, which brings npm")
            os.replace(only_file(scratch, "*.tgz"), archive)
    return archive


def noto_font(cache: Path) -> Path:
    """The font that is installed, or that of the Debian package, unpacked without installing it."""
    if NOTO_FONT.exists():
        return NOTO_FONT
    font = cache / NOTO_FONT.name
    if not font.exists():
        advice = (
            f"on Debian or Ubuntu run `apt-get update` first, or install {NOTO}; "
            "elsewhere leave it out: --studios twemoji openmoji"
        )
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            run(["apt-get", "download", NOTO], scratch, advice)
            run(["dpkg", "-x", only_file(scratch, "*.deb"), "unpacked"], scratch, advice)
            os.replace(Path(scratch, "unpacked", NOTO_FONT.relative_to("/")), font)
    return font


def run(command: list[str], folder: str, advice: str) -> None:
    """Run a package manager in a folder; where it is missing or fails, end with its words and the advice."""
    program = shutil.which(command[0])
    if program is None:
        sys.exit(f"{command[0]} is not installed: {advice}")
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {advice}\n{done.stderr.strip()}")


def only_file(folder: str, pattern: str) -> str:
    [path] = Path(folder).absolute().glob(pattern)
    return str(path)


# Writing: a file is there whole or not at all, so that an interrupted run can be started again


def picture_path(studio: str, id: str) -> str:
    return f"{studio}/{id}.png"


def is_picture_of_size(path: Path, size: int) -> bool:
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.size == (size, size)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
