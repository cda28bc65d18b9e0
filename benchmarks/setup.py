"""Set up the peers' environment: `python -m benchmarks.setup` makes benchmarks/.venv, without a second torch.

The environment sees the packages of the interpreter that makes it. The original is named `clip` as we are, so it lies
in a folder of its own, which its process alone looks into. Those that ask for other builds of torch than the one that
is here come without what they ask for.
"""

import subprocess
import sys
import venv
from pathlib import Path

from .peers import ENVIRONMENT, ORIGINAL, PYTHON

ALONE = ["open_clip_torch==3.3.0", "torchvision==0.28.0"]
ORIGINAL_PACKAGE = "clip-anytorch==2.6.0"


def main() -> None:
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    running = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(own) / "running_interpreter.pth").write_text("\n".join(running) + "\n")

    install = [PYTHON, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", *ALONE], check=True)
    subprocess.run([*install, "--no-deps", "--target", ORIGINAL, ORIGINAL_PACKAGE], check=True)
    subprocess.run([*install, "--requirement", Path(__file__).with_name("requirements.txt")], check=True)
    print(f"the peers are in {ENVIRONMENT}; now: {Path(sys.executable).name} -m benchmarks")


if __name__ == "__main__":
    main()
