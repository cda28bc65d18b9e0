"""`clip convert`: what it writes is what it read, and appears whole or not at all."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from archive import write_archive
from conftest import TINY, filled
from transformers import CLIPModel, CLIPTokenizer

import clip
from clip.app import convert
from clip.app.cli import main
from clip.checkpoints import read_checkpoint
from clip.model import config_of
from clip.towers import TextTransformer

PLAIN = TINY["vit"] | {"transformer_heads": 1}  # what shapes alone can say
OTHER = TINY["vit"] | {"activation": "gelu", "transformer_heads": 4, "vision_heads": 8, "image_resize": "squash"}
TEXTS = ["a photo of a cat", "Straße, naïve  café!", "don't 12 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def plain(folder):
    clip.save(filled(PLAIN), folder / "plain.safetensors")
    return str(folder / "plain.safetensors")


@pytest.fixture(scope="module")
def other(folder):
    clip.save(filled(OTHER), folder / "other.pt")
    return str(folder / "other.pt")


def same(a, b):
    (config, weights), (other_config, other_weights) = read_checkpoint(a), read_checkpoint(b)
    return (
        config == other_config
        and weights.keys() == other_weights.keys()
        and all(torch.equal(weights[name], other_weights[name]) for name in weights)
    )


@pytest.mark.parametrize("form", ["huggingface", "open_clip"])
def test_there_and_back_is_the_same_model_bit_by_bit(other, tmp_path, form, capsys):
    assert main(["convert", other, str(tmp_path / "there"), "--to", form]) == 0
    assert "largest difference in 4 pictures and 4 texts: " in capsys.readouterr().out
    assert same(other, tmp_path / "there")
    back = {"huggingface": "open_clip", "open_clip": "huggingface"}[form]
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", back]) == 0
    assert same(other, tmp_path / "back")


def test_the_answer_as_json(plain, tmp_path, capsys):
    target = str(tmp_path / "x")
    assert main(["convert", plain, target, "--to", "open_clip", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("difference") <= 1e-5
    assert answer == {"source": plain, "target": target, "form": "open_clip"}


def test_a_models_name_will_do(tmp_path):
    assert main(["convert", "tiny", str(tmp_path / "x"), "--to", "open_clip"]) == 0
    assert config_of(clip.load(tmp_path / "x", device="cpu")[0]) == clip.config.TINY


def test_openais_form_is_the_state_dict_of_an_archive(plain, tmp_path):
    assert main(["convert", plain, str(tmp_path / "x.pt"), "--to", "openai"]) == 0
    assert same(plain, tmp_path / "x.pt")
    weights = torch.load(tmp_path / "x.pt")
    assert [int(weights[name]) for name in ("input_resolution", "context_length", "vocab_size")] == [48, 77, 49408]
    assert clip.model.build_model(weights).state_dict().keys() == filled(PLAIN).state_dict().keys()


ORIGINAL = Path(__file__).parent.parent / "benchmarks" / ".venv"
BUILD = """
import sys, types, torch
sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")  # torchvision's CPU build has none
import clip.model
model = clip.model.build_model(torch.load(sys.argv[1])).float()
with torch.no_grad():
    torch.save(model(torch.ones(1, 3, 48, 48), torch.tensor([[49406, 320, 2368, 49407] + [0] * 73])), sys.argv[2])
"""


@pytest.mark.skipif(not (ORIGINAL / "original").exists(), reason="needs python -m benchmarks.setup")
def test_the_original_builds_the_model_with_our_logits(plain, tmp_path):
    assert main(["convert", plain, str(tmp_path / "x.pt"), "--to", "openai"]) == 0
    command = [ORIGINAL / "bin" / "python", "-W", "ignore", "-c", BUILD, tmp_path / "x.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ORIGINAL / "original")})
    model, _ = clip.load(plain, device="cpu")
    clip.model.convert_weights(model)  # as build_model rounds
    with torch.no_grad():
        logits = model.float()(torch.ones(1, 3, 48, 48), clip.tokenize("a cat"))[0]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt")[0], logits, rtol=1e-3, atol=1e-3)


def test_what_openais_form_cannot_say_is_refused_and_not_written(other, tmp_path, capsys):
    assert main(["convert", other, str(tmp_path / "x.pt"), "--to", "openai"]) == 2
    error = capsys.readouterr().err
    for said in ("transformer_heads 4, not 1", "activation 'gelu', not 'quick_gelu'", "vision_heads 8, not 2"):
        assert said in error
    assert not list(tmp_path.iterdir())


def test_half_precision_stays_half_where_all_of_it_is(tmp_path):
    weights = {name: tensor.half() for name, tensor in filled(PLAIN).state_dict().items()}
    write_archive(weights, tmp_path / "half.pt", half=False)
    assert main(["convert", str(tmp_path / "half.pt"), str(tmp_path / "x"), "--to", "huggingface"]) == 0
    assert same(tmp_path / "half.pt", tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("form", ["openai", "huggingface", "open_clip"])
def test_towers_that_no_form_can_hold_are_refused(tmp_path, form, capsys):
    source, text_tower = str(tmp_path / "dual.pt"), TextTransformer(77, 40, width=64, layers=1, heads=1, output_dim=24)
    clip.save(clip.DualEncoder(filled(TINY["vit"]).visual, text_tower), source)
    assert main(["convert", source, str(tmp_path / "x"), "--to", form]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"clip convert: {source} is a DualEncoder, and these forms hold a CLIP with its own two")
    assert not (tmp_path / "x").exists()


# -- for transformers -------------------------------------------------------------------------------------------------


def test_transformers_reads_model_and_tokenizer_from_the_folder(other, tmp_path):
    assert main(["convert", other, str(tmp_path / "x"), "--to", "huggingface"]) == 0
    peer, tokenizer = CLIPModel.from_pretrained(tmp_path / "x").eval(), CLIPTokenizer.from_pretrained(tmp_path / "x")
    tokens = clip.tokenize(TEXTS)
    batch = tokenizer(TEXTS, padding="max_length", return_tensors="pt")
    for ids, row in zip(batch["input_ids"].tolist(), tokens.tolist(), strict=True):
        end = row.index(49407) + 1
        assert ids[:end] == row[:end]
    assert batch["input_ids"].shape == (3, 77)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    model, _ = clip.load(other, device="cpu")
    with torch.no_grad():
        expected = peer(**batch, pixel_values=images).logits_per_image
        torch.testing.assert_close(model(images, tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_resnet_is_refused_for_transformers(tmp_path, capsys):
    assert main(["convert", "tiny", str(tmp_path / "x"), "--to", "huggingface"]) == 2
    assert "has no ResNet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- what the source does not say -------------------------------------------------------------------------------------


def test_what_bare_weights_do_not_say_can_be_said(tmp_path, capsys):
    torch.save(filled(OTHER).state_dict(), tmp_path / "bare.pt")
    known = [
        "activation=gelu",
        "transformer_heads=4",
        "vision_heads=8",
        "image_resize=squash",
        "image_mean=[0.5, 0, 1]",
    ]
    settings = [part for said in known for part in ("--set", said)]
    assert main(["convert", str(tmp_path / "bare.pt"), str(tmp_path / "x"), "--to", "open_clip", *settings]) == 0
    assert capsys.readouterr().err == ""
    config, _ = read_checkpoint(tmp_path / "x")
    assert config == clip.config.CLIPConfig(**OTHER | {"image_mean": (0.5, 0, 1)})


@pytest.mark.filterwarnings("default:.* does not say")
def test_what_nobody_says_is_complained_of_once(tmp_path, capsys):
    torch.save(filled(PLAIN).state_dict(), tmp_path / "bare.pt")
    assert main(["convert", str(tmp_path / "bare.pt"), str(tmp_path / "x"), "--to", "open_clip"]) == 0
    assert capsys.readouterr().err.count("does not say its model's activation") == 1


@pytest.mark.parametrize("said", ["heads=3", "activation", "=gelu"])
def test_a_setting_that_there_is_not_is_refused(plain, said, capsys):
    with pytest.raises(SystemExit):
        main(["convert", plain, "x", "--to", "open_clip", "--set", said])
    assert "expected NAME=VALUE with a name among activation" in capsys.readouterr().err


# -- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["openai", "huggingface", "open_clip"])
def test_a_model_that_embeds_otherwise_than_its_source_does_not_appear(plain, tmp_path, form, monkeypatch, capsys):
    write = convert.write_as

    def spoil(form, path, config, weights):
        write(form, path, config, weights | {"visual.ln_post.bias": weights["visual.ln_post.bias"] + 0.01})

    monkeypatch.setattr(convert, "write_as", spoil)
    assert main(["convert", plain, str(tmp_path / "x"), "--to", form]) == 2
    assert "the features differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_write_that_failed_half_way(plain, tmp_path, monkeypatch, capsys):
    def fail(form, path, config, weights):
        path.mkdir()
        (path / "config.json").write_text("{")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(convert, "write_as", fail)
    assert main(["convert", plain, str(tmp_path / "x"), "--to", "huggingface"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(plain, tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    assert main(["convert", plain, str(tmp_path / "x"), "--to", "openai"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "mine"


def test_a_missing_folder_is_named(plain, tmp_path, capsys):
    assert main(["convert", plain, str(tmp_path / "none" / "x"), "--to", "openai"]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_are_not_those_of_the_model_are_refused(tmp_path, change, capsys):
    weights = filled(PLAIN).state_dict()
    if change == "missing":
        del weights["visual.ln_post.bias"]
    else:
        weights["adapter.bias"] = torch.ones(2)
    write_archive(weights, tmp_path / "x.pt", half=False)
    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "y"), "--to", "huggingface"]) == 2
    assert f"1 {change}: " in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
