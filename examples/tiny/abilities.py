"""Ask a model about drawn pictures whose combinations of colour and thing training never showed.

    python examples/tiny/abilities.py tiny
    python examples/tiny/abilities.py runs/first/best.safetensors --count 500

things     which of all 480 captions "a red fish" is it?                           chance 0.2 %
counting   one, two, three, four or five of them?                                  chance 20 %
places     "a red fish above a blue boat", or the same words with places exchanged? chance 50 %
colours    the same with colours exchanged                                         chance 50 %
"""

import argparse
import json
import math

import clip
from clip.training.drawn import ABILITIES
from clip.training.evaluation import drawn_abilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or path that clip.load takes")
    parser.add_argument("--count", type=int, default=2000, help="questions for each ability (default: 2000)")
    parser.add_argument("--seed", type=int, default=12345, help="other seeds ask other questions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()

    model, preprocess = clip.load(options.model)
    figures = drawn_abilities(preprocess, options.count, options.seed)(model)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"| on combinations never trained, {options.count} questions each | right | ± |")
    print("|---|---|---|")
    for ability in ABILITIES:
        share = figures[f"drawn_{ability}"]
        error = 1.96 * math.sqrt(share * (1 - share) / options.count)  # 95 % of a normal distribution
        print(f"| {ability} | {share:.1%} | {error:.1%} |")


if __name__ == "__main__":
    main()
