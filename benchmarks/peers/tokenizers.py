"""Hugging Face's tokenizers, in Rust, as transformers puts them together for CLIP."""

import torch

from clip.simple_tokenizer import SimpleTokenizer

from .. import inputs
from ..process import Run, serve
from . import prepare_torchvision

prepare_torchvision()
from transformers import CLIPTokenizer  # noqa: E402


def tokenize(texts: list) -> Run:
    ours, texts = SimpleTokenizer(), inputs.texts(*texts)
    theirs = CLIPTokenizer(vocab=ours.encoder, merges=list(ours.bpe_ranks)).backend_tokenizer
    theirs.enable_padding(length=77, pad_id=0, pad_token="!")
    theirs.enable_truncation(77)
    return lambda: torch.tensor([row.ids for row in theirs.encode_batch_fast(texts)])


if __name__ == "__main__":
    serve("tokenizers", [tokenize])
