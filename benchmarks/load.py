"""How long does `clip.load` take, and how much memory at its peak?

    python benchmarks/load.py [FILE]

FILE is a checkpoint; without one, a ViT-B/32 with made-up weights is written in OpenAI's layout first. Each row is a
fresh process: ours, and the steps of the original (torch.jit.load, a model initialised at random, weights copied into
it, converted to float32), with our model class standing in for theirs. Linux only: peaks are read from /proc.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
START = """
import re, time, torch, clip
from clip.model import CLIP, convert_weights
from clip.config import ARCHIVE_SIZES, CLIPConfig
path = {path!r}
def peak_kib(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # this process's own
before = peak_kib()
start = time.perf_counter()
"""
END = """
seconds = time.perf_counter() - start
peak = peak_kib()
size = sum(entry.nbytes for entry in model.state_dict().values())
print(seconds, before / 1024, peak / 1024, size / 2**20)
"""
WAYS = {
    "clip.load": "model, _ = clip.load(path, device='cpu')",
    "the original's steps": """
weights = torch.jit.load(path, map_location="cpu").eval().state_dict()
weights = {name: tensor for name, tensor in weights.items() if name not in ARCHIVE_SIZES}
model = CLIP(**vars(CLIPConfig.from_state_dict(weights)))
convert_weights(model)
model.load_state_dict(weights)
model.eval().float()
""",
}


def write_file(path: Path) -> None:
    """A ViT-B/32 in OpenAI's layout, by the rule of the tests."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/golden")]
    from test_main_job import write_full_size

    write_full_size("ViT-B/32", path, half=True)


def measure(way: str, path: Path) -> list[float]:
    """Seconds, resident MiB before and at the peak, and MiB of weights, of one load in a process of its own."""
    code = START.format(path=str(path)) + WAYS[way] + END
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    given = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        path = given or Path(folder) / "ViT-B-32.pt"
        if given is None:
            write_file(path)
        runs = {way: [] for way in WAYS}
        for _ in range(REPEATS):
            for way in WAYS:  # interleaved, so that both see the same machine
                runs[way].append(measure(way, path))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{path.name}, {runs['clip.load'][0][3]:.0f} MiB of float32 weights, median of {REPEATS}")
    print(f"{'':22}{'seconds':>9}{'(min - max)':>16}{'peak MiB':>10}{'above start':>13}")
    for way, rows in runs.items():
        seconds = [row[0] for row in rows]
        before, peak = (statistics.median(row[i] for row in rows) for i in (1, 2))
        spread = f"({min(seconds):.2f} - {max(seconds):.2f})"
        print(f"{way:22}{statistics.median(seconds):9.2f}{spread:>16}{peak:10.0f}{peak - before:13.0f}")


if __name__ == "__main__":
    main()
