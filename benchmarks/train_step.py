"""How long does a training step take, and how much memory: 32 pairs with short captions, ViT-B/32?"""

from .contest import Contest, difference
from .inputs import texts
from .peak import image_operations, text_operations


def run(contest: Contest) -> None:
    path, batch = contest.checkpoint("ViT-B/32"), contest.size(32, 2)
    config, captions = contest.config("ViT-B/32"), texts("captions", batch)
    forward = image_operations(config, batch) + text_operations(config, captions, batch)
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.1)):
        arguments = {"path": path, "batch": batch, "dtype": dtype}
        contest.race(
            f"ViT-B/32 {dtype}, batch 32",
            "train_step",
            dict.fromkeys(("ours", "original", "open_clip"), arguments),
            difference,
            tolerance,
            operations=(dtype, 3 * forward),
            memory=True,
        )
