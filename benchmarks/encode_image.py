"""How long does the image tower take?"""

from .contest import Contest, angle
from .peak import image_operations

EAGER = ("original", "open_clip", "transformers")


def run(contest: Contest) -> None:
    for name, batches, peers in (
        ("ViT-B/32", (1, 8, 32), (*EAGER, "onnxruntime")),
        ("RN50", (8, 32), ("original", "open_clip", "onnxruntime")),  # transformers has no ResNets of CLIP's
    ):
        path = contest.checkpoint(name)
        for batch in batches:
            arguments = {"path": path, "batch": contest.size(batch, min(batch, 2))}
            contest.race(
                f"{name} float32, batch {batch}",
                "encode_image",
                dict.fromkeys(("ours", *peers), arguments),
                angle,
                1e-5,
                operations=("float32", image_operations(contest.config(name), arguments["batch"])),
            )

    arguments = {"path": contest.checkpoint("ViT-B/32"), "batch": contest.size(32, 2)}
    low = arguments | {"dtype": "bfloat16"}
    contest.race(
        "ViT-B/32 bfloat16, batch 32; peers in float32",
        "encode_image",
        {"ours": low, **dict.fromkeys(EAGER, arguments), "transformers bfloat16": low},
        angle,
        1e-3,
        operations=("bfloat16", image_operations(contest.config("ViT-B/32"), arguments["batch"])),
    )
