"""A file as memory: bounds, the file's safety, and pages that go with their tensor."""

import os
import sys
from pathlib import Path

import pytest
import torch

from clip.checkpoints import CheckpointError
from clip.checkpoints.mapped_file import map_file

NUMBERS = torch.arange(2_000_000, dtype=torch.int32)  # 8 MB


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(NUMBERS.numpy().tobytes())
    return path


def test_tensors_are_the_bytes_of_the_file_and_outlive_the_block(path):
    with map_file(path) as file:
        whole = file.tensor(0, 2_000_000, torch.int32)
        part = file.tensor(40, 3, torch.int32)
        shifted = file.tensor(1, 2, torch.int32)
    path.unlink()
    assert torch.equal(whole, NUMBERS)
    assert part.tolist() == [10, 11, 12]
    assert shifted.tolist() == [1 << 24, 2 << 24]
    assert shifted.data_ptr() % 4 == 0


def test_writing_to_a_tensor_leaves_the_file_alone(path):
    before = path.read_bytes()
    with map_file(path) as file:
        tensor = file.tensor(0, 2_000_000, torch.int32)
        tensor.zero_()
        assert not tensor.any()
        assert file.tensor(0, 1, torch.int32).item() == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("start", "length"), [(-1, 4), (0, -4), (8_000_000, 4), (7_999_998, 4), (0, 2**70), (2**70, 0)]
)
def test_nothing_outside_the_file_can_be_reached(path, start, length):
    with map_file(path) as file:
        for reach in (file.read, file.crc32):
            with pytest.raises(CheckpointError, match=r"file ends at 8000000"):
                reach(start, length)
        with pytest.raises(CheckpointError, match=r"numbers: needs bytes"), map_file(path) as again:
            again.tensor(start, length // 4, torch.int32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_go_with_their_tensor(path):
    def resident():
        """KiB of the file that are in this process's memory."""
        maps = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(maps.split("Rss:")[1].split()[0])

    with map_file(path) as file:
        first, second = file.tensor(0, 1_000_000, torch.int32), file.tensor(4_000_000, 1_000_000, torch.int32)
    assert resident() == 0
    assert first.sum() + second.sum() == NUMBERS.sum()
    assert resident() > 7_000
    del first
    assert resident() < 4_500
    assert torch.equal(second, NUMBERS[1_000_000:])


def test_a_path_that_is_no_file_is_named(tmp_path):
    def message(path):
        with pytest.raises(CheckpointError) as caught, map_file(path):
            pass
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    assert "no such file" in message(tmp_path / "missing.pt")
    assert "found a folder" in message(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "empty" in message(tmp_path / "empty.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        assert "device or a pipe" in message(tmp_path / "pipe.pt")


def test_a_file_that_may_not_be_read_is_named(path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop root
    with pytest.raises(CheckpointError, match=r"numbers: cannot be read \(Permission denied\)"), map_file(path):
        pass
