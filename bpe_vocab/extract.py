"""Cut the merges that CLIP uses out of the vocabulary file that OpenAI published, and check either file.

    python bpe_vocab/extract.py                     check the file that ships here
    python bpe_vocab/extract.py PUBLISHED.txt.gz    check the published file, and write the one that ships here from it

Both files are gzipped text: one header line, then one merge per line, two symbols with a space between them, in the
order in which they were learned. The published file lists 2¹⁸ merges; CLIP's 49,408 ids leave room for the first 48,894
(49,408 - 2 * 256 byte symbols - 2 special tokens). Ours is the published file cut after that many.
"""

import gzip
import hashlib
import sys
from pathlib import Path

SHIPPED = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 49408 - 2 * 256 - 2

PUBLISHED_GZ_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SHIPPED_TEXT_SHA256 = "685491abbdad36159d094ecdc23bebc0dd53f8d1df35c4d74ef6036db2ba7572"


def extract(published: Path) -> bytes:
    """Return the text of our file, header included, cut from the published gzip file.

    Raises
    ------
    ValueError
        If `published` is not the file that OpenAI published.
    """
    archive = published.read_bytes()
    _check(archive, PUBLISHED_GZ_SHA256, published)
    lines = gzip.decompress(archive).splitlines(keepends=True)
    return b"".join(lines[: 1 + MERGES])


def write(text: bytes, path: Path) -> None:
    """Write `text` gzipped, without a time or a name in the header, so that the same text gives the same file."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as archive:
        archive.write(text)


def check(shipped: Path = SHIPPED) -> None:
    """Raise `ValueError` unless `shipped` holds, unpacked, exactly what `extract` returned."""
    _check(gzip.decompress(shipped.read_bytes()), SHIPPED_TEXT_SHA256, shipped)


def _check(content: bytes, expected: str, path: Path) -> None:
    """Compare the sha256 of `content`, which came from `path`, with the one on record."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: expected sha256 {expected}, found {found}; the file is damaged or another one")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(extract(Path(sys.argv[1])), SHIPPED)
    check()
    print(f"{SHIPPED}: {MERGES:,} merges, as published")
