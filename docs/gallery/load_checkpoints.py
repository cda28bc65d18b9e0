"""
Load any checkpoint
===================

What one learns here: ``clip.load`` reads the forms in which CLIP models are passed around, finds out by itself which
one it has before it, and runs nothing of what a file says. Each of them is made here, on the spot, and read back.
"""

# %%
# The model, and what it says of one picture: this is to come back out of every file.

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import clip
from clip.checkpoints.convert import write_as
from clip.model import CLIP, config_of

FOLDER = TemporaryDirectory()
folder = Path(FOLDER.name)

model, preprocess = clip.load("tiny", device="cpu")
image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check(path: Path, original: CLIP = model) -> None:
    """Load a file, and compare what it says of a picture with what the original says."""
    loaded, _ = clip.load(path, device="cpu")
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    image_features, expected = loaded.encode_image(image), original.encode_image(image)
    print(f"{path.name:24} {size / 1e6:5.1f} MB   equal: {torch.equal(image_features, expected)}")


# %%
# **Ours.** ``clip.save`` writes safetensors, which every program reads, with the sizes beside the weights, or ``.pt``.

clip.save(model, folder / "model.safetensors")
clip.save(model, folder / "model.pt")
check(folder / "model.safetensors")
check(folder / "model.pt")

# %%
# **A state dict** by ``torch.save``, and a checkpoint of a training program: the weights under some key, names perhaps
# with a prefix that ``DataParallel`` left there.

torch.save(model.state_dict(), folder / "state_dict.pt")
wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
torch.save({"epoch": 32, "state_dict": wrapped}, folder / "epoch_32.pt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that a file of bare weights says neither activation nor heads
    check(folder / "state_dict.pt")
    check(folder / "epoch_32.pt")

# %%
# **OpenAI's archives** are TorchScript: a zip of code and of data, made from a tree of modules. The numbers are read,
# the code is not even looked at. Such a tree can be made of empty modules.


class Node(nn.Module):
    """A module that holds parameters, and does nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


archive = Node()
for name, tensor in model.state_dict().items():
    *parents, leaf = name.split(".")
    node = archive
    for parent in parents:
        if parent not in node._modules:
            node.add_module(parent, Node())
        node = node._modules[parent]
    node.register_buffer(leaf, tensor)
for name, size in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
    archive.register_buffer(name, torch.tensor(size))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated
    torch.jit.script(archive).save(str(folder / "archive.pt"))
check(folder / "archive.pt")

# %%
# **open_clip** has folders, of weights and a file that says what shapes do not show. The command ``clip convert`` makes
# them, by this function, and compares before it lets them appear.

write_as("open_clip", folder / "open_clip", config_of(model), model.state_dict())
check(folder / "open_clip")

# %%
# **Hugging Face** has folders, too, with names of its own for everything; and only Vision Transformers, which ``tiny``
# is none of. So here is another, untrained.

torch.manual_seed(0)
vit = CLIP(64, 64, 2, 128, 16, 77, 49408, 64, 1, 2).eval()
write_as("huggingface", folder / "huggingface", config_of(vit), vit.state_dict())
print(*sorted(file.name for file in (folder / "huggingface").iterdir()), sep="\n")
check(folder / "huggingface", vit)

# %%
# What is no CLIP, or is damaged, is one clear sentence.

(folder / "half.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])
try:
    clip.load(folder / "half.safetensors")
except clip.CheckpointError as error:
    print(str(error).replace(str(folder), "..."))

# %%
FOLDER.cleanup()
