"""Files in and out: any of the forms a CLIP is passed around in ↔ a configuration and a state dict with OpenAI's names.

Nothing that a file says is executed, and no model is built here.
"""

from .files import read_checkpoint, write_checkpoint
from .mapped_file import CheckpointError

__all__ = ["CheckpointError", "read_checkpoint", "write_checkpoint"]
