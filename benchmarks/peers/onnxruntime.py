"""onnxruntime, with the towers exported from our plain model."""

import os
from functools import cache
from pathlib import Path

import onnxruntime
import torch

import clip

from .. import inputs
from ..process import Run, serve


class Tower(torch.nn.Module):
    """One method of a model as a module, which is what can be exported."""

    def __init__(self, model: clip.model.CLIP, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(x)


@cache
def session(path: str, method: str, length: int | None = None) -> onnxruntime.InferenceSession:
    """The exported tower, for any batch; `length` is that of texts."""
    exported = Path(path).with_suffix(f".{method}.{length}.onnx")
    if not exported.exists():
        model, _ = clip.load(path, device="cpu", tower="image" if method == "encode_image" else "text")
        example = inputs.images(2) if length is None else torch.full((2, length), 49407)
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            Tower(model, method), (example,), exported, dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])


def runner(chosen: onnxruntime.InferenceSession, x: torch.Tensor) -> Run:
    name = chosen.get_inputs()[0].name
    return lambda: chosen.run(None, {name: x.numpy()})[0]


def encode_image(path: str, batch: int) -> Run:
    return runner(session(path, "encode_image"), inputs.images(batch))


def encode_text(path: str, batch: int) -> Run:
    """Padded to the longest of the batch."""
    tokens = clip.tokenize(inputs.texts("captions", batch)).long()
    tokens = tokens[:, : tokens.argmax(dim=1).max() + 1]
    return runner(session(path, "encode_text", tokens.shape[1]), tokens)


if __name__ == "__main__":
    serve("onnxruntime", [encode_image, encode_text])
