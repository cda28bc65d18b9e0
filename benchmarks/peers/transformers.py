"""transformers, with our weights moved key by key, as the tests do."""

from functools import cache

import torch

import clip

from .. import inputs
from ..process import Run, serve
from . import prepare_torchvision

prepare_torchvision()
from peer import as_transformers  # noqa: E402


@cache
def model(path: str, dtype: str) -> torch.nn.Module:
    return as_transformers(clip.load(path, device="cpu")[0]).to(getattr(torch, dtype))


def encode_image(path: str, batch: int, dtype: str = "float32") -> Run:
    images = inputs.images(batch).to(getattr(torch, dtype))
    return torch.no_grad()(lambda: model(path, dtype).get_image_features(pixel_values=images).pooler_output)


def encode_text(path: str, batch: int, dtype: str = "float32") -> Run:
    """Padded to the longest of the batch, as its tokenizer does if asked."""
    tokens = clip.tokenize(inputs.texts("captions", batch)).long()
    end = tokens.argmax(dim=1)
    tokens = tokens[:, : end.max() + 1]
    mask = (torch.arange(tokens.shape[1]) <= end[:, None]).long()

    def run() -> torch.Tensor:
        return model(path, dtype).get_text_features(input_ids=tokens, attention_mask=mask).pooler_output

    return torch.no_grad()(run)


if __name__ == "__main__":
    serve("transformers", [encode_image, encode_text])
