"""How long does the text tower take for short captions?

The original and open_clip compute all 77 positions, transformers and onnxruntime those of the longest caption.
"""

from .contest import Contest, angle
from .inputs import texts
from .peak import text_operations


def run(contest: Contest) -> None:
    path = contest.checkpoint("ViT-B/32")
    for batch in (32, 256):
        count = contest.size(batch, 2)
        arguments = {"path": path, "batch": count}
        contest.race(
            f"ViT-B/32 float32, batch {batch}",
            "encode_text",
            dict.fromkeys(("ours", "original", "open_clip", "transformers", "onnxruntime"), arguments),
            angle,
            1e-5,
            operations=("float32", text_operations(contest.config("ViT-B/32"), texts("captions", count), count)),
        )
