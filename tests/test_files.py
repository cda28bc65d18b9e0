"""Checkpoint files of every form: the same model comes out of each, and what is no checkpoint is one clear error."""

import dataclasses
import io
import json
import math
import pickle
import re
import zipfile
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from archive import write_archive
from conftest import filled
from hypothesis import given, settings
from hypothesis import strategies as st

from clip.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from clip.checkpoints.files import EMBEDDING, ROWS, trained_rows
from clip.config import CLIPConfig
from clip.model import config_of

# Bare weights are read with a warning about what they do not say; test_open_clip.py has its tests.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not say its model's")

TEXT = {"context_length": 11, "vocab_size": 31, "transformer_width": 16, "transformer_heads": 1}
CONFIGS = {
    "ViT": CLIPConfig(12, 24, 2, 20, 8, **TEXT, transformer_layers=3),
    "ResNet": CLIPConfig(12, 64, (1, 2, 1, 1), 4, None, **TEXT, transformer_layers=2),
}
WEIGHTS = {name: filled(vars(config)).state_dict() for name, config in CONFIGS.items()}
VIT = WEIGHTS["ViT"]


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def in_training(weights, key):
    """What a training program saves: the weights under a key, the optimizer's state beside them."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"epoch": 3, "name": "run", "optimizer": optimizer.state_dict(), key: weights, "loss": 0.5}


FORMS = {
    "TorchScript": lambda weights, path: write_archive(weights, path, half=False),
    "zip": torch.save,
    "legacy": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save_file,
    "state_dict": lambda weights, path: torch.save(in_training(weights, "state_dict"), path),
    "model_state_dict": lambda weights, path: torch.save(in_training(weights, "model_state_dict"), path),
    "model": lambda weights, path: torch.save(in_training(weights, "model"), path),
    "module.": lambda weights, path: torch.save(prefixed(weights, "module."), path),
    "_orig_mod.": lambda weights, path: torch.save(prefixed(weights, "_orig_mod."), path),
    "module._orig_mod.": lambda weights, path: torch.save(prefixed(weights, "module._orig_mod."), path),
    "_orig_mod.module.": lambda weights, path: safetensors.torch.save_file(
        prefixed(weights, "_orig_mod.module."), path
    ),
    "legacy training": lambda weights, path: torch.save(
        in_training(prefixed(weights, "module."), "state_dict"), path, _use_new_zipfile_serialization=False
    ),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


# -- every form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(tmp_path, form, model):
    path = tmp_path / "any.name"
    FORMS[form](WEIGHTS[model], path)
    config, weights = read_checkpoint(path)
    assert config == CONFIGS[model]
    assert_equal(weights, WEIGHTS[model])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_the_dtypes_of_the_file_are_kept(tmp_path, form, dtype):
    half = {name: tensor.to(dtype) if tensor.dim() > 1 else tensor for name, tensor in VIT.items()}
    FORMS[form](half, tmp_path / "half")
    assert_equal(read_checkpoint(tmp_path / "half")[1], half)


def test_a_released_archive_has_both_precisions_and_three_sizes_too_many(tmp_path):
    write_archive(VIT, tmp_path / "ViT.pt", input_resolution=24, context_length=11, vocab_size=31)
    config, weights = read_checkpoint(tmp_path / "ViT.pt")
    assert config == CONFIGS["ViT"]
    assert weights.keys() == VIT.keys()
    assert weights["visual.conv1.weight"].dtype == torch.float16
    assert weights["ln_final.weight"].dtype == torch.float32


def test_prefixes_are_taken_off_only_where_all_names_have_them(tmp_path):
    torch.save({**VIT, "module.extra": torch.ones(1)}, tmp_path / "x.pt")
    assert "module.extra" in read_checkpoint(tmp_path / "x.pt")[1]


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
class TestWriting:
    @pytest.mark.parametrize("model", CONFIGS)
    def test_weights_and_configuration_come_back_bit_by_bit(self, tmp_path, suffix, model):
        # what shapes do not show: heads, activation, a resolution between two multiples of the stride
        config = dataclasses.replace(
            CONFIGS[model],
            activation="gelu",
            transformer_heads=4,
            image_resolution=CONFIGS[model].image_resolution + 3,
        )
        weights = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in WEIGHTS[model].items()}
        before = dict(weights)
        write_checkpoint(tmp_path / f"x{suffix}", config, weights)
        found, tensors = read_checkpoint(str(tmp_path / f"x{suffix}"))
        assert found == config
        assert_equal(tensors, weights)
        assert list(tensors) == list(weights)
        assert weights.keys() == before.keys()
        assert all(weights[name] is before[name] for name in before)
        assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]

    def test_others_can_read_it(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, CONFIGS["ViT"], VIT)
        if suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            assert_equal(saved["state_dict"], VIT)
            text = saved["clip_config"]
        else:
            assert_equal(safetensors.torch.load_file(path), VIT)
            with safetensors.safe_open(path, "pt") as file:
                assert file.metadata()["format"] == "pt"
                text = file.metadata()["clip_config"]
        assert CLIPConfig(**json.loads(text)) == CONFIGS["ViT"]

    def test_what_was_read_can_be_written_over_its_own_file(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        write_checkpoint(path, CONFIGS["ViT"], VIT)
        for _ in range(2):
            write_checkpoint(path, *read_checkpoint(path))
        assert_equal(read_checkpoint(path)[1], VIT)

    def test_a_link_stays_a_link(self, tmp_path, suffix):
        link, target = tmp_path / f"link{suffix}", tmp_path / f"target{suffix}"
        link.symlink_to(target)
        write_checkpoint(link, CONFIGS["ViT"], VIT)
        assert link.is_symlink()
        assert_equal(read_checkpoint(target)[1], VIT)

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path, suffix):
        resource = pytest.importorskip("resource")
        path = tmp_path / f"x{suffix}"
        path.write_bytes(b"old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
            with pytest.raises(CheckpointError, match=rf"x\{suffix}: cannot be written \(File too large\)"):
                write_checkpoint(path, CONFIGS["ViT"], VIT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"old")]

    def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(b"old")
        with pytest.raises((ValueError, AttributeError)):
            write_checkpoint(path, CONFIGS["ViT"], {**VIT, "odd": "text"})
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"old")]

    def test_a_missing_folder_is_named(self, tmp_path, suffix):
        with pytest.raises(CheckpointError, match=r"none/x\S+: cannot be written \(No such file or directory\)"):
            write_checkpoint(tmp_path / "none" / f"x{suffix}", CONFIGS["ViT"], VIT)


@pytest.mark.parametrize("name", ["x.bin", "x", "x.pt.zip", ".pt", "x.PT"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a file name ending in \.safetensors or \.pt, got"):
        write_checkpoint(tmp_path / name, CONFIGS["ViT"], VIT)
    assert not list(tmp_path.iterdir())


# -- what is no checkpoint --------------------------------------------------------------------------------------------


def refuse(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_no_file_an_empty_one_and_a_folder_are_told_apart(tmp_path):
    refuse(tmp_path / "none.pt", "no such file")
    (tmp_path / "empty.pt").touch()
    refuse(tmp_path / "empty.pt", "empty")
    refuse(tmp_path, "found a folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><head><title>403</title>", "web page"),
        (b"\xef\xbb\xbf\n <html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:40d365\nsize 353976522\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n", r"begins with b'\\x89PNG"),
        (b"a", "begins with b'a'"),
        (bytes(1000), r"begins with b'\\x00"),
        (b"PK", "truncated"),
        (b"\x80", "truncated"),
        (b"12345678{", "safetensors header"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    refuse(tmp_path / "x.pt", message)


@pytest.mark.parametrize("form", ["TorchScript", "zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, form, kept):
    path = tmp_path / "x.pt"
    FORMS[form](VIT, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refuse(path, "truncated|damaged")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)},
            r"no 'visual\.\S+' among its 2 entries \(fc\.bias, fc",
        ),
        ({name: tensor for name, tensor in VIT.items() if name != "text_projection"}, "no 'text_projection' among"),
        ({**VIT, "visual.conv1.weight": torch.ones(20, 3)}, r"visual\.conv1\.weight .* 4 dimensions"),
        ({"epoch": 3, "net": VIT}, r"under one of state_dict, .* found 2 entries \(epoch, net\)"),
        ({}, "found 0 entries"),
        ({"state_dict": {}}, "among its 0 entries"),
        ({0: torch.ones(1)}, "expected names of tensors"),
        ([VIT], "found a value of type list"),
        (torch.ones(3), "found a value of type StoredTensor"),
        (7, "found a value of type int"),
        ({**VIT, "text_projection": torch.empty(0, 12)}, "do not fit"),
        ({**VIT, "text_projection": VIT["text_projection"].to(torch.int8)}, r"'text_projection' of torch\.int8"),
        ({**VIT, "clip_config": {"embed_dim": 3}}, "is no CLIPConfig"),
        ({**VIT, "clip_config": "{"}, "is no CLIPConfig"),
        ({**VIT, "clip_config": "[1]"}, "is no CLIPConfig"),
        ({**VIT, "clip_config": "[" * 100_000}, "is no CLIPConfig"),
        ({**VIT, "clip_config": json.dumps({"embed_dim": 12})}, "is no CLIPConfig"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", message)


def test_empty_weights_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**VIT, "positional_embedding": torch.empty(0, 16)}, path)
    refuse(path, r"'positional_embedding' of torch\.float32 and shape \(0, 16\)")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "change", [{"vision_width": 10**9}, {"image_resolution": 8000}, {"vision_layers": 3}, {"vision_patch_size": 4}]
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(tmp_path, suffix, change):
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, dataclasses.replace(CONFIGS["ViT"], **change), VIT)
    refuse(path, "its configuration says .* the shapes of its weights say")


def test_whole_models_and_foreign_code_are_named_and_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", r"asks for 'torch\.nn\.modules\.linear\.Linear'.*torch\.save\(model\.state_dict\(\)")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(print, protocol=2))
    refuse(tmp_path / "x.pt", r"asks for '(__builtin__|builtins)\.print'")


# -- any bytes at all -------------------------------------------------------------------------------------------------

SMALL = {name: tensor for name, tensor in VIT.items() if "resblocks" not in name or ".ln_" in name}


def rezip(data, content):
    """The zip file with another data.pkl, and a checksum that is right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return out.getvalue()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One small file of each form, and a path to write others to."""
    folder = tmp_path_factory.mktemp("samples")
    data = {}
    for form in ("TorchScript", "zip", "legacy", "safetensors"):
        FORMS[form](SMALL, folder / form)
        data[form] = (folder / form).read_bytes()
    return data, folder / "mutated"


NUMBERS = [
    n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
]
PLACE = st.integers(0, 10**6)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), PLACE, st.binary(min_size=1, max_size=4) | st.sampled_from(NUMBERS)),
        st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("copy"), PLACE, st.tuples(PLACE, st.integers(1, 200))),
        st.tuples(st.just("cut"), PLACE, st.integers(1, 200)),
        st.tuples(st.just("end"), PLACE, st.none()),
    ),
    min_size=1,
    max_size=6,
)


def mutate(data, mutations):
    for kind, place, what in mutations:
        place %= max(len(data), 1)
        if kind == "write":
            data = data[:place] + what + data[place + len(what) :]
        elif kind == "insert":
            data = data[:place] + what + data[place:]
        elif kind == "copy":
            start = what[0] % max(len(data), 1)
            data = data[:place] + data[start : start + what[1]] + data[place:]
        elif kind == "cut":
            data = data[:place] + data[place + what :]
        else:
            data = data[:place]
    return data


def assert_read_or_refused(path, data):
    path.write_bytes(data)
    with suppress(CheckpointError):
        for tensor in read_checkpoint(path)[1].values():
            assert tensor.numel() * tensor.dtype.itemsize <= len(data)
            tensor.clone()


@pytest.mark.parametrize("form", ["TorchScript", "zip", "legacy", "safetensors"])
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(mutations=MUTATIONS)
def test_a_mutated_file_is_read_or_refused(samples, form, mutations):
    data, path = samples
    assert_read_or_refused(path, mutate(data[form], mutations))


@pytest.mark.parametrize("form", ["TorchScript", "zip", "legacy", "safetensors"])
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(mutations=MUTATIONS)
def test_a_file_with_mutated_contents_is_read_or_refused(samples, form, mutations):
    """As above, but only what describes the tensors is mutated, and what guards it is made right again."""
    data, path = samples
    if form in ("TorchScript", "zip"):
        with zipfile.ZipFile(io.BytesIO(data[form])) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            mutated = rezip(data[form], mutate(archive.read(name), mutations))
    elif form == "legacy":
        numbers = len(data[form]) - sum(8 + tensor.nbytes for tensor in SMALL.values())
        mutated = mutate(data[form][:numbers], mutations) + data[form][numbers:]
    else:
        end = 8 + int.from_bytes(data[form][:8], "little")
        header = mutate(data[form][8:end], mutations)
        mutated = len(header).to_bytes(8, "little") + header + data[form][end:]
    assert_read_or_refused(path, mutated)


# -- a vocabulary in part ---------------------------------------------------------------------------------------------


@pytest.fixture
def part_of_a_vocabulary(tiny_vit):
    """A model's weights in which only three tokens were ever seen, and what `trained_rows` leaves of them."""
    seen = torch.zeros(49408, dtype=torch.bool)
    seen[[5, 300, 49407]] = True
    weights = tiny_vit.state_dict()
    weights[EMBEDDING][~seen] = 0
    return weights, trained_rows(weights, seen)


def test_rows_left_out_come_back_as_zeros(tmp_path, tiny_vit, part_of_a_vocabulary):
    whole, part = part_of_a_vocabulary
    write_checkpoint(tmp_path / "part.safetensors", config_of(tiny_vit), part)
    assert (tmp_path / "part.safetensors").stat().st_size < 49408 * 64 * 4
    _, weights = read_checkpoint(tmp_path / "part.safetensors")
    assert weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([5, 300, 49407], dtype=torch.int32),  # no size at the end
        torch.tensor([5, 5, 300, 49408], dtype=torch.int32),
        torch.tensor([-1, 5, 300, 49408], dtype=torch.int32),
        torch.tensor([5, 300, 49408, 49408], dtype=torch.int32),
        torch.tensor([5, 300, 49407, 2**31 - 1], dtype=torch.int32),  # would fill the memory
        torch.tensor([5.0, 300.0, 49407.0, 49408.0]),
        torch.tensor([[5, 300], [49407, 49408]], dtype=torch.int32),
    ],
    ids=["short", "twice", "negative", "beyond", "huge", "float", "square"],
)
def test_ids_of_rows_that_make_no_sense_are_refused(tmp_path, tiny_vit, part_of_a_vocabulary, ids):
    part = {**part_of_a_vocabulary[1], ROWS: ids}
    write_checkpoint(tmp_path / "bad.safetensors", config_of(tiny_vit), part)
    with pytest.raises(CheckpointError, match=re.escape(ROWS)):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_training_state_lies_beside_the_weights(tmp_path, tiny_vit):
    state = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "best": math.inf}
    write_checkpoint(tmp_path / "last.pt", config_of(tiny_vit), tiny_vit.state_dict(), state)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["training"]
    assert saved["step"] == 7
    assert torch.equal(saved["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert read_checkpoint(tmp_path / "last.pt")[0] == config_of(tiny_vit)
    with pytest.raises(ValueError, match=r"ending in \.pt"):
        write_checkpoint(tmp_path / "last.safetensors", config_of(tiny_vit), tiny_vit.state_dict(), state)
