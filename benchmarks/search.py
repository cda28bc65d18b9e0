"""How many queries a second, exactly and by faiss, and how many of the nearest does each way find?

    python -m benchmarks.search [--sizes 10000 100000 1000000] [--width 512]

Vectors of unit length in half precision, the exact ones memory-mapped from a file as an index has them. They are made
up: 32 random numbers each, mapped to 512 and blurred a little. (Embeddings of pictures have about as many directions;
vectors random in all 512 are all equally far from each other, and no search but the exact one finds the nearest.) So
speeds hold for any vectors, recalls for these; `clip search --backend ... --recall` tells that of your own pictures.

Queries come one by one, as people ask them, and 64 at once. A million vectors take about
3 GB of memory, 1 GB in the folder for temporary files, and some minutes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from clip.tasks.search_backends import BACKENDS, ExactSearch, FaissSearch, overlap

from .contest import machine

LATENT, BLUR = 32, 0.2
TOP, QUERIES, AT_ONCE = 10, 64, 64
SECONDS = 3  # for one figure
WRITTEN = 50_000  # vectors made at once


def make_vectors(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """(count, width), float32, of unit length; the same directions for every generator."""
    directions = torch.randn(LATENT, width, generator=torch.Generator().manual_seed(0))
    vectors = F.normalize(torch.randn(count, LATENT, generator=generator) @ directions, dim=1)
    noise = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    return F.normalize(vectors + BLUR * noise, dim=1)


def write_vectors(file: Path, count: int, width: int) -> torch.Tensor:
    """(count, width), float16, mapped from a file that is written first."""
    generator = torch.Generator().manual_seed(1)
    with file.open("wb") as stream:
        for start in range(0, count, WRITTEN):
            part = make_vectors(min(WRITTEN, count - start), width, generator)
            stream.write(part.half().numpy().tobytes())
    return torch.from_numpy(np.memmap(file, np.float16, "c", shape=(count, width)))


def queries_per_second(search: ExactSearch | FaissSearch, queries: torch.Tensor, at_once: int) -> float:
    """The median over parts of the queries, one after the other until the time is up."""
    parts = queries.split(at_once)
    search.nearest(parts[0], TOP)
    rates, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(rates) < 3:
        part = parts[len(rates) % len(parts)]
        start = time.perf_counter()
        search.nearest(part, TOP)
        rates.append(len(part) / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    print(
        f"{machine()['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"faiss {faiss.__version__}; {options.width} numbers a vector, float16; the {TOP} nearest"
    )
    print(f"{'vectors':>9}  {'backend':12}{'ready after':>13}{'one by one':>14}{f'{AT_ONCE} at once':>14}{'recall':>9}")
    queries = make_vectors(QUERIES, options.width, torch.Generator().manual_seed(2))
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            vectors = write_vectors(Path(folder) / "vectors.f16", size, options.width)
            _, nearest = ExactSearch(vectors).nearest(queries, TOP)
            for name in (name for name in BACKENDS if name != "qdrant"):
                start = time.perf_counter()
                kind = name.removeprefix("faiss-")
                search = ExactSearch(vectors) if name == "exact" else FaissSearch(vectors, kind)
                ready = time.perf_counter() - start
                recall = overlap(search.nearest(queries, TOP)[1], nearest)
                one, many = (queries_per_second(search, queries, at_once) for at_once in (1, AT_ONCE))
                print(f"{size:9,}  {name:12}{ready:10.1f} s {one:10.0f} /s {many:10.0f} /s {recall:8.3f}", flush=True)
                del search
            del vectors


if __name__ == "__main__":
    main()
