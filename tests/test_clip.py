import inspect
import re

import numpy as np
import pytest
import torch
from archive import write_archive
from conftest import TINY, filled
from PIL import Image

import clip
from clip.config import CLIPConfig
from clip.model import CLIP

# Bare weights do not say how their model was trained; that is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not say its model's")

SIZES = TINY["vit"] | {"transformer_heads": 1}  # one head to 64 channels, as a file without a configuration implies


@pytest.fixture(scope="module")
def model():
    return filled(SIZES)


@pytest.fixture(scope="module")
def archive(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "tiny.pt"
    write_archive(model.state_dict(), path, input_resolution=48)
    return path


def rounded(model):
    """The weights as a half-precision file holds them."""
    in_float32 = re.compile("ln_|embedding|logit_scale")
    entries = model.state_dict().items()
    return {name: value if in_float32.search(name) else value.half() for name, value in entries}


# -- load and save ----------------------------------------------------------------------------------------------------


def test_an_archive_of_openais_kind_loads_as_float32_on_the_cpu(model, archive):
    loaded, preprocess = clip.load(str(archive), device="cpu")
    assert not loaded.training
    assert {entry.dtype for entry in loaded.state_dict().values()} == {torch.float32}
    for name, entry in rounded(model).items():
        assert torch.equal(loaded.state_dict()[name], entry.float()), name
    assert preprocess(Image.new("RGB", (50, 70))).shape == (3, 48, 48)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_and_embeddings_in_float32(model, archive, dtype):
    loaded, _ = clip.load(archive, device="cpu", dtype=dtype)
    assert loaded.dtype == dtype
    for name, entry in rounded(model).items():
        want = entry if entry.dtype == torch.float32 else entry.to(dtype)
        assert torch.equal(loaded.state_dict()[name], want), name
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    reference, _ = clip.load(archive, device="cpu")
    cosine = torch.cosine_similarity(loaded.encode_image(images).float(), reference.encode_image(images))
    assert cosine.min() > 0.999


def test_double_precision_is_double_throughout(archive):
    loaded, _ = clip.load(archive, device="cpu", dtype=torch.float64)
    assert {entry.dtype for entry in loaded.state_dict().values()} == {torch.float64}
    assert loaded.encode_text(clip.tokenize("a dog")).dtype == torch.float64


def test_the_model_does_not_depend_on_its_file_any_more(archive, tmp_path):
    path = tmp_path / "copy.pt"
    path.write_bytes(archive.read_bytes())
    loaded, _ = clip.load(path, device="cpu")
    before = {name: entry.clone() for name, entry in loaded.state_dict().items()}
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(entry, before[name]) for name, entry in loaded.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load_give_the_same_bits(tmp_path, suffix, dtype):
    config = CLIPConfig(**TINY["rn"] | {"activation": "gelu"})  # four heads and GELU: the shapes do not tell
    path = tmp_path / f"model{suffix}"
    first = filled(vars(config))
    clip.save(first, path)
    loaded, _ = clip.load(path, device="cpu", dtype=dtype)
    clip.save(loaded, path)
    again, _ = clip.load(path, device="cpu", dtype=dtype)
    for name, entry in again.state_dict().items():
        assert entry.dtype == loaded.state_dict()[name].dtype
        assert torch.equal(entry, loaded.state_dict()[name]), name
        if dtype == torch.float32:
            assert torch.equal(entry, first.state_dict()[name]), name
    assert again.transformer.resblocks[0].attn.num_heads == 4
    tokens = clip.tokenize("a dog")
    assert torch.equal(again.encode_text(tokens), loaded.encode_text(tokens))


def test_a_failed_save_keeps_the_file_that_was_there(model, tmp_path):
    path = tmp_path / "model.pt"
    clip.save(model, path)
    before = path.read_bytes()
    changed = filled(SIZES)
    changed.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
    with pytest.raises(ValueError, match="activation"):
        clip.save(changed, path)
    with pytest.raises(ValueError, match="safetensors"):
        clip.save(model, tmp_path / "model.bin")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_model_with_parts_that_load_would_not_expect_is_not_saved(tmp_path):
    changed = filled(SIZES)
    changed.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"2 unexpected: adapter\.weight, adapter\.bias"):
        clip.save(changed, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_an_error_naming_the_file(model, tmp_path):
    weights = model.state_dict()
    del weights["visual.ln_post.bias"]
    path = tmp_path / "half.pt"
    torch.save(weights, path)
    with pytest.raises(clip.CheckpointError, match=r"half\.pt: .*1 missing: visual.ln_post.bias"):
        clip.load(path, device="cpu")


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_written_by_torch_save_load_though_the_original_fails_on_them(model, tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    loaded, _ = clip.load(path, device="cpu")
    assert all(torch.equal(entry, model.state_dict()[name]) for name, entry in loaded.state_dict().items())


def test_jit_warns_and_gives_the_same_model(archive):
    with pytest.warns(UserWarning, match="plain PyTorch"):
        loaded, _ = clip.load(archive, device="cpu", jit=True)
    assert type(loaded) is CLIP


def test_names_nobody_knows_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(RuntimeError, match=r"not found.*did you mean 'ViT-B/32'\?.*'RN50x64'"):
        clip.load("vit-b/32")
    with pytest.raises(RuntimeError, match=r"missing\.pt not found"):
        clip.load(tmp_path / "missing.pt")


def test_a_released_name_is_looked_for_in_the_folder_given(tmp_path):
    with pytest.raises(clip.DownloadError, match=re.escape(str(tmp_path / "ViT-B-32.pt"))):
        clip.load("ViT-B/32", download_root=tmp_path, local_files_only=True)


def test_clients_own_entries_in_the_table_are_found(model, tmp_path, monkeypatch):
    monkeypatch.setitem(clip.clip._MODELS, "mine", "https://localhost/mine.pt")
    assert "mine" in clip.available_models()
    with pytest.raises(clip.DownloadError, match="expected a URL that ends in"):
        clip.load("mine", download_root=tmp_path)


@pytest.mark.parametrize("device", ["cpu", "CPU", "auto", None, torch.device("cpu"), "cpu:0"])
def test_devices_are_named_in_any_case(archive, device):
    expected = "cuda" if torch.cuda.is_available() and device in ("auto", None) else "cpu"
    expected = "mps" if torch.backends.mps.is_available() and device == "auto" else expected
    assert clip.load(archive, device=device)[0].logit_scale.device.type == expected


def test_devices_that_do_not_exist_are_errors(archive):
    with pytest.raises(RuntimeError, match="there is no device cuda:63 here"):
        clip.load(archive, device=63)
    with pytest.raises(ValueError, match="got 'gpu'"):
        clip.load(archive, device="gpu")
    with pytest.raises(RuntimeError, match="there is no device cuda:63 here"):
        clip.load(archive, device="CUDA:63")
    with pytest.raises(ValueError, match=r"floating point type, got torch.int8"):
        clip.load(archive, device="cpu", dtype=torch.int8)


def test_signatures_begin_as_in_the_released_package():
    assert list(inspect.signature(clip.load).parameters)[:4] == ["name", "device", "jit", "download_root"]
    assert list(inspect.signature(clip.tokenize).parameters) == ["texts", "context_length", "truncate"]
    assert list(inspect.signature(clip.clip._download).parameters)[:2] == ["url", "root"]
    sizes = list(inspect.signature(CLIP).parameters)
    assert sizes[:5] == ["embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size"]
    assert sizes[5:10] == [
        "context_length",
        "vocab_size",
        "transformer_width",
        "transformer_heads",
        "transformer_layers",
    ]


def test_names_that_clients_import_are_there():
    from clip.clip import _MODELS, _convert_image_to_rgb, _download, _tokenizer, _transform, load, tokenize
    from clip.model import (  # noqa: F401
        AttentionPool2d,
        Bottleneck,
        LayerNorm,
        ModifiedResNet,
        QuickGELU,
        ResidualAttentionBlock,
        Transformer,
        VisionTransformer,
        build_model,
        convert_weights,
    )
    from clip.simple_tokenizer import SimpleTokenizer

    assert isinstance(_tokenizer, SimpleTokenizer)
    for name in ("build_model", "BICUBIC", "Image", "Resize", "CenterCrop", "ToTensor", "Normalize", "_Tokenizer"):
        assert hasattr(clip.clip, name), name
    assert _transform(64)(Image.new("L", (80, 99))).shape == (3, 64, 64)
    assert _convert_image_to_rgb(Image.new("L", (1, 1))).mode == "RGB"
    assert (_MODELS["RN50"].endswith("/RN50.pt"), clip.load, clip.tokenize) == (True, load, tokenize)
    assert callable(_download)


def test_a_script_for_the_original_runs(archive):
    # The usage that OpenAI's README shows, with the path of a file for the name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess = clip.load(str(archive), device=device)
    picture = Image.fromarray(np.arange(60 * 40 * 4, dtype=np.uint8).reshape(60, 40, 4))
    image = preprocess(picture).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
    with torch.no_grad():
        model.encode_image(image)
        model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 3)
    assert probs.sum() == pytest.approx(1, abs=1e-3)
    assert logits_per_text.shape == (3, 1)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_of_the_original_readme():
    tokens = clip.tokenize(["a diagram", "a dog", "a cat"])
    assert tokens.dtype == torch.int32
    assert tokens.shape == (3, 77)
    assert tokens[:, :5].tolist() == [
        [49406, 320, 22697, 49407, 0],
        [49406, 320, 1929, 49407, 0],
        [49406, 320, 2368, 49407, 0],
    ]
    assert not tokens[:, 4:].any()


def test_one_text_and_none_at_all():
    assert torch.equal(clip.tokenize("a dog"), clip.tokenize(["a dog"]))
    assert clip.tokenize([]).shape == (0, 77)
    assert clip.tokenize("")[0, :3].tolist() == [49406, 49407, 0]
    assert torch.equal(clip.tokenize(text for text in ("a dog",)), clip.tokenize("a dog"))


def test_a_text_that_just_fits_and_one_that_does_not():
    assert clip.tokenize("dog " * 75)[0, -1] == 49407
    with pytest.raises(RuntimeError) as caught:
        clip.tokenize(["fine", "dog " * 70 + "a b c d e f red fish"])
    assert str(caught.value).startswith("text 1, ")
    assert "has 80 tokens" in str(caught.value)
    assert "context length of 77" in str(caught.value)
    assert "a b c d e " in str(caught.value)  # where it would be cut
    assert " f " not in str(caught.value).split("cut it after")[1]


def test_truncation_keeps_the_end_token():
    whole, cut = clip.tokenize("1 2 3 4 5", context_length=9), clip.tokenize("1 2 3 4 5", 5, truncate=True)
    assert cut[0, :4].equal(whole[0, :4])
    assert cut[0, 4] == 49407
    assert clip.tokenize("1 2 3 4 5", 7, truncate=True)[0].equal(whole[0, :7])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (5, "expected a string or a list of strings, got int"),
        (None, "got NoneType"),
        (["a", None], "text 1 is of type NoneType: None"),
        ([["a"]], "text 0 is of type list"),
        (b"a dog", "got bytes|of type int"),
    ],
)
def test_what_is_no_text_is_a_type_error(texts, message):
    for function in (clip.tokenize, clip.count_tokens):
        with pytest.raises(TypeError, match=message):
            function(texts)


def test_tokens_are_counted_with_their_brackets():
    assert clip.count_tokens(["", "a dog", "dog " * 100]) == [2, 4, 102]
    assert clip.count_tokens("a dog") == [4]


def test_a_context_too_small_for_the_brackets_is_refused():
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        clip.tokenize("a dog", context_length=1, truncate=True)
