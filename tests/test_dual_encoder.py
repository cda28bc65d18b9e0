"""Any two towers: what CLIP's give together they give alone, what is saved comes back, and everything works with it."""

import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, filled
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

import clip
from clip import DualEncoder
from clip.app.cli import main
from clip.checkpoints import CheckpointError
from clip.optimize import OptimizedDualEncoder, optimized_copy
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.tasks.explain import explain, text_tokens
from clip.tasks.linear_probe import probe_features
from clip.tasks.retrieval import Index
from clip.towers import ResidualHead, TextTransformer, TimmTower, TransformersTower, WordTokenizer, build, describe
from clip.training.data import Batches, Pair
from clip.training.gradients import backward
from clip.training.loss import clip_loss
from clip.training.options import TrainingOptions
from clip.training.trainer import Trainer

# torchvision without its kernels, as it is where it has no wheel for the processor, is enough for timm
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
from transformers import BertConfig, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "photo", "of", "dog", "cat", "red", "##dish", "green", "wall"]
TEXTS = ["a dog", "a photo of a reddish cat", "wall", "a green zebra of a wall of a photo"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40)}


def word_tokenizer():
    """BERT's tokenizer, with a small vocabulary."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=30)  # as saved tokenizers do, which is no business of ours
    return WordTokenizer(tokenizer)


def bert(dropout=0.1):
    """A small BERT, whose sizes all differ."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    drops = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **sizes, **drops))


def text_tower(model):
    """The text tower of a CLIP as a module of its own, with the same weights."""
    sizes = TINY["vit"]
    tower = TextTransformer(
        model.context_length,
        model.vocab_size,
        sizes["transformer_width"],
        sizes["transformer_layers"],
        sizes["transformer_heads"],
        sizes["embed_dim"],
    )
    weights = model.state_dict()
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    return tower.eval()


def mixed(dropout=0.1):
    """Our ViT and a BERT, each with another head, and a preprocessing that is not CLIP's."""
    tower, encoder = filled(TINY["vit"]).visual, bert(dropout)
    tower.proj = None
    torch.manual_seed(2)
    return DualEncoder(
        tower,
        TransformersTower(encoder, "mean", context_length=16),
        nn.Linear(128, 10, bias=False),
        ResidualHead(24, 10, dropout),
        logit_scale=math.log(20),
        tokenizer=word_tokenizer(),
        preprocess=Preprocess(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "squash"),
    ).eval()


def outside():
    """A ResNet of timm's and a BERT."""
    pytest.importorskip("timm")
    torch.manual_seed(3)
    tower = TimmTower("test_resnet", input_resolution=64)
    return DualEncoder(
        tower,
        TransformersTower(bert(), "pooler", context_length=16),
        nn.Linear(tower.output_dim, 10, bias=False),
        nn.Linear(24, 10, bias=False),
        tokenizer=word_tokenizer(),
        preprocess=Preprocess(64, tower.mean, tower.std),
    ).eval()


def clips(kind="vit"):
    """CLIP's own towers."""
    model = filled(TINY[kind])
    return DualEncoder(model.visual, text_tower(model))


MODELS = {"mixed": mixed, "outside": outside, "clips": clips}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def saved(tmp_path):
    """The path of a file that holds the mixed model."""
    path = tmp_path / "mixed.safetensors"
    clip.save(mixed(), path)
    return path


def pictures(model, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *[model.visual.input_resolution] * 2, generator=generator)


def ids(model, texts=TEXTS):
    return (model.tokenizer or clip.tokenize)(texts, model.context_length)


# What it computes


def test_clips_own_towers_give_what_they_give_in_a_clip(tiny):
    model = DualEncoder(tiny.visual, text_tower(tiny), logit_scale=tiny.logit_scale.item())
    images, texts = pictures(tiny, 3), clip.tokenize(TEXTS)
    assert torch.equal(model.encode_image(images), tiny.encode_image(images))
    assert torch.equal(model.encode_text(texts), tiny.encode_text(texts))
    for ours, theirs in zip(model(images, texts), tiny(images, texts), strict=True):
        assert torch.equal(ours, theirs)
    assert (model.dtype, model.context_length) == (tiny.dtype, tiny.context_length)


def test_a_clip_s_projections_as_heads_give_what_it_gives(tiny_vit):
    images, expected = pictures(tiny_vit), tiny_vit.encode_image(pictures(tiny_vit))
    head = nn.Linear(*tiny_vit.visual.proj.shape, bias=False)
    head.weight.data = tiny_vit.visual.proj.data.T
    tiny_vit.visual.proj = None
    torch.testing.assert_close(DualEncoder(tiny_vit.visual, text_tower(tiny_vit), head).encode_image(images), expected)


def test_the_residual_head_is_that_of_simple_clip():
    head = ResidualHead(3, 2).eval()
    head.projection.weight.data, head.projection.bias.data = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.zeros(2)
    head.fc.weight.data, head.fc.bias.data = torch.tensor([[0.0, 1], [0, 0]]), torch.tensor([0.0, 5])
    # p = (3, -4); gelu(-4) = -0.0001; so (3, -4) + (-0.0001, 5) = (3, 1), which a LayerNorm makes (1, -1)
    torch.testing.assert_close(head(torch.tensor([[3.0, -2, 7]])), torch.tensor([[1.0, -1]]), atol=1e-4, rtol=0)
    assert [sum(p.numel() for p in ResidualHead(width, 256).parameters()) for width in (2048, 768)] == [590848, 263168]


@pytest.mark.parametrize("pooling", ["first", "mean", "pooler"])
def test_texts_are_pooled_as_transformers_would_with_its_own_mask(pooling):
    encoder, tokenizer = bert().eval(), word_tokenizer()
    tower = TransformersTower(encoder, pooling, context_length=16)
    for text, row in zip(TEXTS, tower(tokenizer(TEXTS, 16)), strict=True):
        output = encoder(torch.tensor([tokenizer.tokenizer.encode(text).ids]))
        states = output.last_hidden_state[0]
        expected = {"first": states[0], "mean": states.mean(dim=0), "pooler": output.pooler_output[0]}[pooling]
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean", "pooler"])
def test_padding_changes_no_features(pooling):
    tower, tokens = TransformersTower(bert().eval(), pooling, context_length=16), word_tokenizer()(TEXTS, 16)
    together = tower(tokens)
    for i, text in enumerate(tokens):
        end = int((text >= 0).sum())
        torch.testing.assert_close(tower(text[None, :end])[0], together[i], atol=1e-6, rtol=1e-5)


def test_an_encoder_may_use_its_padding_id_within_a_text():
    encoder = bert().eval()
    encoder.config.pad_token_id = 3  # of [SEP], as in tokenizers that pad with what ends a text
    tower, text = TransformersTower(encoder, "mean", context_length=16), torch.tensor([[2, 5, 8, 3]])
    expected = encoder(text).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(tower(F.pad(text, (0, 4), value=-1)), expected, atol=1e-6, rtol=1e-5)


def test_the_tokenizer_gives_the_ids_of_transformers_own(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    theirs = BertTokenizer.from_pretrained(tmp_path, do_lower_case=True)
    ours = WordTokenizer(theirs.backend_tokenizer)(TEXTS, 16)
    for row, text in zip(ours.tolist(), TEXTS, strict=True):
        expected = theirs(text)["input_ids"]
        assert row == expected + [-1] * (16 - len(expected))


def test_a_text_that_is_too_long_is_refused_or_cut_before_its_last_special_token():
    tokenizer = word_tokenizer()
    with pytest.raises(RuntimeError, match=r"text 1, 'a photo of a reddish.* has 9 tokens .* context length of 6"):
        tokenizer(["a dog", TEXTS[1]], 6)
    assert tokenizer(["a dog", TEXTS[1]], 6, truncate=True).tolist() == [[2, 5, 8, 3, -1, -1], [2, 5, 6, 7, 5, 3]]
    assert tokenizer("a dog", 6).tolist() == [[2, 5, 8, 3, -1, -1]]


def test_more_positions_than_the_encoder_has_are_refused():
    with pytest.raises(ValueError, match="at most 20, got 21"):
        TransformersTower(bert(), context_length=21)


def test_a_tower_of_timm_is_its_model_without_the_classifier():
    timm = pytest.importorskip("timm")
    tower = TimmTower("test_vit", input_resolution=96).eval()
    whole = timm.create_model("test_vit", img_size=96).eval()
    whole.load_state_dict(tower.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tower(images), whole.forward_head(whole.forward_features(images), pre_logits=True))
    assert tower(images).shape == (2, tower.output_dim)


# Saved and loaded


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_what_is_saved_comes_back_bit_for_bit(model, ending, tmp_path):
    path = tmp_path / f"model{ending}"
    clip.save(model, path)
    loaded, preprocess = clip.load(path, device="cpu")
    assert type(loaded) is DualEncoder
    assert not loaded.training
    assert repr(preprocess) == repr(model.preprocess)
    assert torch.equal(ids(loaded), ids(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for ours, theirs in zip(loaded(pictures(model), ids(model)), model(pictures(model), ids(model)), strict=True):
        assert torch.equal(ours, theirs)
    clip.save(loaded, tmp_path / f"again{ending}")
    assert (tmp_path / f"again{ending}").read_bytes() == path.read_bytes()


def test_loading_leaves_the_random_numbers_of_the_caller_alone(saved):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    clip.load(saved, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", MODELS)
def test_one_tower_is_loaded_without_the_other(kind, tmp_path):
    model = MODELS[kind]()
    clip.save(model, tmp_path / "model.safetensors")
    image, _ = clip.load(tmp_path / "model.safetensors", device="cpu", tower="image")
    text, _ = clip.load(tmp_path / "model.safetensors", device="cpu", tower="text")
    assert torch.equal(image.encode_image(pictures(model)), model.encode_image(pictures(model)))
    assert torch.equal(encode_texts(text, TEXTS), encode_texts(model, TEXTS))
    assert not image.state_dict().keys() & text.state_dict().keys() - {"logit_scale"}
    with pytest.raises(RuntimeError, match="cannot embed texts"):
        image.encode_text(ids(model))
    with pytest.raises(RuntimeError, match="cannot embed pictures"):
        text.encode_image(pictures(model))
    with pytest.raises(ValueError, match="both towers"):
        clip.save(text, tmp_path / "text.safetensors")


def test_in_half_precision_the_features_stay_near(model, tmp_path):
    clip.save(model, tmp_path / "model.safetensors")
    half, _ = clip.load(tmp_path / "model.safetensors", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == half.encode_image(pictures(model)).dtype == torch.bfloat16
    assert half.logit_scale.dtype == torch.float32
    for name in ("encode_image", "encode_text"):
        given = pictures(model) if name == "encode_image" else ids(model)
        near = F.cosine_similarity(getattr(half, name)(given).float(), getattr(model, name)(given))
        assert near.min() > 0.995, name


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"class": "Popen", "args": "true"}, "expected a description of one of Identity, Linear"),
        ({"class": "TransformersTower"}, "expected a description of one of"),
        ({"class": "TimmTower", "name": "hf-hub:somebody/something"}, "timm has no model 'hf-hub:somebody"),
        ({"class": "TransformersTower", "encoder": {"name": "pipeline", "config": {}}}, "text encoder .* 'pipeline'"),
        (
            {
                "class": "TransformersTower",
                "encoder": {"name": "BertModel", "config": {"auto_map": {"AutoModel": ""}}},
            },
            "BertConfig has no auto_map",
        ),
        (
            {
                "class": "TransformersTower",
                "encoder": {"name": "BertModel", "config": {"attn_implementation": "somebody/kernel"}},
            },
            "BertConfig has no attn_implementation",
        ),
    ],
)
def test_a_file_that_asks_for_anything_else_is_refused(tower, message, saved):
    if "name" in tower:
        pytest.importorskip("timm")
    if "encoder" in tower:
        tower |= {"pooling": "mean", "context_length": 16}
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    written = json.loads(header["__metadata__"]["clip_config"])
    header["__metadata__"]["clip_config"] = json.dumps(written | {"text_tower": tower})
    text = json.dumps(header).encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=message):
        clip.load(saved, device="cpu")


def test_weights_of_other_sizes_are_refused(saved):
    data = saved.read_bytes()
    saved.write_bytes(data.replace(b'\\"out_features\\": 10', b'\\"out_features\\": 11'))
    with pytest.raises(CheckpointError, match=r"visual_projection.weight \(expected \(11, 128\), got \(10, 128\)\)"):
        clip.load(saved, device="cpu")


def test_a_damaged_tokenizer_is_refused(saved):
    data = saved.read_bytes()
    assert data.count(b'"WordPiece"') == 1
    saved.write_bytes(data.replace(b'"WordPiece"', b'"WordPieze"'))
    with pytest.raises(CheckpointError, match="expected a tokenizer's JSON text"):
        clip.load(saved, device="cpu")


def test_what_cannot_be_described_cannot_be_saved(tmp_path):
    model = mixed()
    model.text_projection = nn.Sequential(nn.Linear(24, 10))
    with pytest.raises(ValueError, match="expected one of Identity, Linear"):
        clip.save(model, tmp_path / "model.safetensors")
    model = mixed()
    model.preprocess.transforms.pop()
    with pytest.raises(ValueError, match="five steps"):
        clip.save(model, tmp_path / "model.safetensors")
    model = mixed()
    model.visual.transformer.resblocks[0].adapter = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"unexpected: visual\.transformer\.resblocks\.0\.adapter\.weight"):
        clip.save(model, tmp_path / "model.safetensors")
    model = clips()
    model.tokenizer = lambda texts, context_length, truncate: clip.tokenize(texts)
    with pytest.raises(ValueError, match="expected a WordTokenizer, or None"):
        clip.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_no_folder_of_this_machine_gets_into_a_file(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    encoder = BertModel.from_pretrained(tmp_path / "bert")
    assert str(tmp_path) not in json.dumps(describe(TransformersTower(encoder, context_length=16)))


def test_an_encoder_is_built_again_from_what_differs_in_its_configuration():
    sizes = dict(vocab_size=30, dim=12, n_layers=1, n_heads=2, hidden_dim=20, max_position_embeddings=9)
    left_over = dict(gradient_checkpointing=False)  # old files have entries that no class knows any more
    tower = TransformersTower(DistilBertModel(DistilBertConfig(**sizes, **left_over)), context_length=9)
    description = describe(tower)
    assert description["encoder"] == {"name": "DistilBertModel", "config": sizes}
    again = build(json.loads(json.dumps(description)))
    again.load_state_dict(tower.state_dict())
    text = torch.randint(5, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.eval()(text), tower.eval()(text))


# Used


def test_every_task_works_with_it(model, tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (70, 50), colour).save(tmp_path / f"{name}.png")
    files = sorted(str(path) for path in tmp_path.glob("*.png"))
    read = gather(encode_images(model, model.preprocess, files)).values
    assert torch.allclose(read, F.normalize(model.encode_image(model.preprocess.batch(files)), dim=-1), atol=1e-6)
    texts = encode_texts(model, TEXTS, batch_size=2)
    assert torch.allclose(texts, F.normalize(model.encode_text(ids(model)), dim=-1), atol=1e-6)

    images = model.preprocess.batch(files)
    torch.testing.assert_close(clip.similarity(model, images, TEXTS), read @ texts.T, atol=1e-6, rtol=0)
    classifier = clip.ZeroShotClassifier(model, ["dog", "cat"], "a photo of a {}")
    prompts = encode_texts(model, ["a photo of a dog", "a photo of a cat"])
    expected = (model.logit_scale.exp() * read @ prompts.T).softmax(dim=-1)
    torch.testing.assert_close(classifier(images).probabilities, expected, atol=1e-5, rtol=0)

    heat = explain(model, Image.open(files[0]), "a dog", "occlusion", window=24, stride=16)
    assert heat.shape == (50, 70)
    assert len(next(probe_features(model, model.preprocess, files))) == 2

    index = Index.build(tmp_path / "index", [tmp_path], model, model.preprocess, "model")  # warns of nothing
    [matches] = index.search("a dog", top=2)
    assert sorted(match.path for match in matches) == files


def test_a_text_tower_alone_searches_what_the_whole_model_indexed(tmp_path, saved):
    Image.new("RGB", (70, 50), COLOURS["red"]).save(tmp_path / "red.png")
    assert main(["index", str(tmp_path), "-o", str(tmp_path / "index"), "--model", str(saved), "--device", "cpu"]) == 0
    assert main(["search", "a dog", "--index", str(tmp_path / "index"), "--device", "cpu"]) == 0


@pytest.mark.parametrize("kind", ["mixed", "outside"])
def test_the_last_states_of_a_foreign_encoder_are_its_text_tokens(kind):
    model = MODELS[kind]()
    for text in TEXTS:
        [ids] = [model.tokenizer.tokenizer.encode(text).ids]
        expected = model.text_tower.encoder(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(text_tokens(model, text), expected, atol=1e-6, rtol=1e-5)


def test_the_last_text_token_becomes_what_the_text_tower_gives():
    model = clips()
    features = text_tokens(model, "a red cat")
    assert features.shape == (5, 64)
    torch.testing.assert_close(
        features[-1:] @ model.text_tower.text_projection, model.encode_text(ids(model, "a red cat"))
    )


def test_a_text_tower_that_shows_no_tokens_is_named(saved):
    model = clips()
    model.text_tower = Average()
    with pytest.raises(ValueError, match="text_tokens needs CLIP's text tower or one of transformers, got Average"):
        text_tokens(model, "a dog")
    image, _ = clip.load(saved, device="cpu", tower="image")
    with pytest.raises(ValueError, match="text_tokens needs the plain model and its text tower, got DualEncoder"):
        text_tokens(image, "a dog")


def test_a_linear_probe_stands_on_what_the_tower_gives_before_any_head(model, saved):
    picture = Image.new("RGB", (70, 50), COLOURS["red"])
    features = gather(probe_features(model, model.preprocess, [picture])).values
    image = model.preprocess(picture)[None]
    if hasattr(model.visual, "proj"):
        projection, model.visual.proj = model.visual.proj, None
        expected = model.visual(image)
        model.visual.proj = projection
        assert features.shape == (1, 128)
    else:
        expected = model.visual(image)
    torch.testing.assert_close(features, expected)
    text, _ = clip.load(saved, device="cpu", tower="text")
    for other in (optimized_copy(model), text):
        with pytest.raises(ValueError, match="a linear probe needs the plain model and its image tower, got"):
            gather(probe_features(other, model.preprocess, [picture]))


# Optimised


class Average(nn.Module):
    """A text tower of the caller's own."""

    context_length = 77

    def forward(self, text):
        return text.float().mean(dim=1, keepdim=True).expand(-1, 24)


def assert_same_features(found, wanted, error=1e-5):
    for name, given in (("encode_image", pictures(wanted, 5)), ("encode_text", ids(wanted))):
        with torch.no_grad():
            one, other = (F.normalize(getattr(model, name)(given).float(), dim=-1) for model in (found, wanted))
        assert (one - other).abs().max() < error, name


LEFT = {"mixed": "text_tower", "outside": "visual, text_tower"}


@pytest.mark.parametrize("kind", MODELS)
def test_an_optimised_copy_embeds_the_same_and_says_what_it_left_as_it_was(kind):
    model = MODELS[kind]().train()  # of which the copy is as it is in evaluation
    if kind in LEFT:
        with pytest.warns(UserWarning, match=f"copied and not optimised: {LEFT[kind]}$"):
            copied = clip.optimize(model)
    else:
        copied = clip.optimize(model)
    assert type(copied) is type(optimized_copy(model)) is OptimizedDualEncoder  # the latter without a word
    assert clip.optimize(copied) is copied
    assert_same_features(copied, model.eval())
    owned = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not owned & {tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers())}
    assert not any(module.training for module in copied.modules())


def test_with_towers_and_heads_of_ours_nothing_is_left_as_it_was():
    for kind in ("vit", "rn"):
        model = clips(kind)
        model.visual_projection, model.text_projection = ResidualHead(24, 10), nn.Linear(24, 10, bias=False)
        copied = clip.optimize(model)  # warnings are errors here
        assert_same_features(copied, model.eval())
        parts = {type(part) for part in copied.modules()}
        assert not parts & {nn.Linear, nn.BatchNorm2d, type(model.text_tower), type(model.visual)}


def test_a_head_of_the_callers_own_is_left_as_it_was():
    model = clips()
    model.visual_projection = nn.Sequential(nn.Linear(24, 10))
    with pytest.warns(UserWarning, match="copied and not optimised: visual_projection$"):
        assert_same_features(clip.optimize(model), model)


@pytest.mark.parametrize("kind", MODELS)
def test_an_optimised_copy_in_half_precision_points_the_same_way(kind):
    model = MODELS[kind]()
    copied = optimized_copy(model, torch.bfloat16)
    assert copied.dtype == copied.encode_image(pictures(model)).dtype == torch.bfloat16
    assert_same_features(copied, model, 0.05)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_optimised_tower_alone_embeds_what_it_can(saved, tower):
    model, _ = clip.load(saved, device="cpu", tower=tower)
    copied = optimized_copy(model)
    names = {"image": ("encode_image", pictures(mixed())), "text": ("encode_text", ids(mixed()))}
    name, given = names.pop(tower)
    torch.testing.assert_close(getattr(copied, name)(given), getattr(model, name)(given), atol=1e-5, rtol=1e-4)
    [(other, given)] = names.values()
    with pytest.raises(RuntimeError, match="this model cannot embed"):
        getattr(copied, other)(given)


def test_a_changed_dual_encoder_is_copied_whole():
    model = clips()
    model.encode_text = lambda text: text
    with pytest.warns(UserWarning, match="not optimised: the model itself"):
        assert type(clip.optimize(model)) is DualEncoder


def test_an_optimised_copy_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="save the model it was made from"):
        clip.save(clip.optimize(clips()), tmp_path / "x.pt")


# Trained


class Walls:
    """Plain pictures of one colour, named in words that both tokenizers know."""

    def __len__(self):
        return 16

    def draw(self, index, rng):
        name = list(COLOURS)[index % 2]
        shade = tuple(min(255, channel + rng.randrange(15)) for channel in COLOURS[name])
        return [Pair(Image.new("RGB", (64, 64), shade), f"a {name} wall", name)]


def trainer(folder, model, **options):
    settings = dict(batch_size=4, steps=4, warmup=1, lr=1e-3, save_every=2, out=str(folder), loss="multi-positive")
    options = TrainingOptions(**settings | options)
    batches = Batches(Walls(), 4, model.preprocess, context_length=model.context_length, tokenizer=model.tokenizer)
    folder.mkdir(exist_ok=True)
    return Trainer(model, batches, options)


def weights(model):
    return {name: entry.clone() for name, entry in model.state_dict().items()}


def moved(before, model):
    """The names of the entries that are not what they were."""
    return {name for name, entry in model.state_dict().items() if not torch.equal(entry, before[name])}


def test_one_step_moves_both_towers_and_both_heads(model, tmp_path):
    before, learner = weights(model), trainer(tmp_path, model)
    row = learner.update(next(learner.batches.epoch(0)))
    assert math.isfinite(row["loss"])
    parts = {name.partition(".")[0] for name in moved(before, model)}
    heads = {f"{tower}_projection" for tower in ("visual", "text")} & {name.partition(".")[0] for name in before}
    assert parts == {"visual", "text_tower", "logit_scale"} | heads


def test_a_killed_run_takes_the_same_steps(tmp_path):
    whole = trainer(tmp_path / "whole", mixed())
    whole.run()
    half = trainer(tmp_path / "half", mixed())
    half.total = 2
    half.run()
    again = trainer(tmp_path / "half", clip.load(tmp_path / "half" / "last.pt", device="cpu")[0])
    again.resume()
    again.total = 4
    again.run()
    assert not moved(weights(whole.model), again.model)
    assert type(clip.load(tmp_path / "half" / "best.safetensors", device="cpu")[0]) is DualEncoder


def test_a_batch_in_chunks_gives_the_gradient_of_the_whole():
    model = mixed(dropout=0.0).train()
    batch = next(Batches(Walls(), 6, model.preprocess, context_length=16, tokenizer=model.tokenizer).epoch(0))
    gradients = []
    for chunk in (None, 4):
        model.zero_grad()
        backward(model, batch.images, batch.tokens, batch.identities, clip_loss, chunk)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-5, rtol=1e-3, msg=name)


def test_in_chunks_dropout_leaves_out_the_same_numbers_both_times():
    model = mixed(dropout=0.5).train()
    batch = next(Batches(Walls(), 6, model.preprocess, context_length=16, tokenizer=model.tokenizer).epoch(0))
    torch.manual_seed(0)
    texts = torch.cat([model.encode_text(part) for part in batch.tokens.split(4)])
    clip_loss(model.encode_image(batch.images), texts, model.logit_scale.exp(), batch.identities).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(0)
    backward(model, batch.images, batch.tokens, batch.identities, clip_loss, 4)
    for name, whole in expected.items():
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, whole, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("frozen", "part"),
    [
        ("image", ("visual",)),
        ("text", ("text_",)),
        ("visual", ("visual.",)),
        ("text_tower", ("text_tower.",)),
        ("visual.transformer.resblocks.1", ("visual.transformer.resblocks.1.",)),
        ("text_tower.encoder.embeddings", ("text_tower.encoder.embeddings.",)),
    ],
)
def test_what_is_frozen_stays_and_learns_from_the_step_at_which_it_thaws(frozen, part, tmp_path):
    model = mixed()
    before = weights(model)
    learner = trainer(tmp_path, model, freeze=(frozen,), thaw=2, steps=3, weight_decay=0.1)
    batch = next(learner.batches.epoch(0))
    learnt = {name for name in before if name.startswith(part)}
    for _ in range(2):
        learner.update(batch)
        assert not moved(before, model) & learnt
        assert moved(before, model)
    learner.update(batch)
    assert learnt - moved(before, model) <= {
        "text_tower.encoder.pooler.dense.weight",
        "text_tower.encoder.pooler.dense.bias",
    }


def test_a_resumed_run_knows_what_has_thawed(tmp_path):
    learner = trainer(tmp_path, mixed(), freeze=("visual", "text_tower"), thaw=2, steps=4)
    learner.run()
    whole = weights(learner.model)
    again = trainer(tmp_path / "again", mixed(), freeze=("visual", "text_tower"), thaw=2, steps=4)
    for batch in list(again.batches.epoch(0))[:3]:
        again.update(batch)
    again.save()
    third = trainer(tmp_path / "again", mixed(), freeze=("visual", "text_tower"), thaw=2, steps=4)
    third.resume()
    assert all(parameter.requires_grad for parameter in third.model.parameters())
    third.run()
    assert not moved(whole, third.model)


@pytest.mark.parametrize("kind", ["outside", "clips"])
def test_the_statistics_of_a_frozen_stage_stay_and_the_others_move(kind, tmp_path):
    model, stage = (outside(), "visual.model.layer1") if kind == "outside" else (clips("rn"), "visual.layer1")
    before = weights(model)
    learner = trainer(tmp_path, model, freeze=(stage,))
    learner.update(next(learner.batches.epoch(0)))
    statistics = {name for name in moved(before, model) if name.endswith("running_mean")}
    assert statistics
    assert not [name for name in moved(before, model) if name.startswith(f"{stage}.")]


def test_dropout_of_a_frozen_tower_is_off_and_that_of_its_head_on(tmp_path):
    model = mixed()
    trainer(tmp_path, model, freeze=("text_tower",))
    modes = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert modes.pop("text_projection.dropout")
    assert modes
    assert not any(modes.values())


def test_a_scale_is_learnt_or_fixed_or_capped(tmp_path):
    for number, (options, expected) in enumerate([({"scale": 20.0}, 20), ({"max_scale": 5.0}, 5)]):
        learner = trainer(tmp_path / str(number), mixed(), **options)
        assert learner.update(next(learner.batches.epoch(0)))["scale"] == pytest.approx(expected)
    learner = trainer(tmp_path / "learnt", mixed())
    assert learner.update(next(learner.batches.epoch(0)))["scale"] not in (pytest.approx(20, abs=1e-6), 20)


# From the command line


@pytest.fixture
def table(tmp_path):
    """Sixteen pictures of two colours in folders of classes, and in a table."""
    lines = ["image,caption"]
    for number in range(16):
        name = list(COLOURS)[number % 2]
        picture = tmp_path / "classes" / name / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), COLOURS[name]).save(picture)
        lines.append(f"classes/{name}/{number}.png,a {name} wall")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path / "captions.csv"


def test_the_commands_work_with_it(saved, table, tmp_path, capsys):
    picture, classes = str(tmp_path / "classes" / "red" / "0.png"), str(tmp_path / "classes")
    model = ["--model", str(saved), "--device", "cpu"]
    commands = [
        ["classify", picture, "--labels", "dog", "cat", *model],
        ["embed", picture, "-o", str(tmp_path / "pictures.npz"), *model],
        ["embed", "--text", "a dog", "-o", str(tmp_path / "texts.npz"), *model],
        ["evaluate", "zero-shot", classes, *model],
        ["evaluate", "retrieval", str(table), *model],
        ["explain", picture, "--text", "a dog", "--method", "occlusion", "-o", str(tmp_path / "map.png"), *model],
        ["index", classes, "-o", str(tmp_path / "index"), *model],
        ["search", "--image", picture, "--index", str(tmp_path / "index"), *model],
    ]
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr())
    out = tmp_path / "run"
    train = ["train", str(table), "--init", str(saved), "--out", str(out), "--device", "cpu", "--steps", "2"]
    train += ["--batch-size", "4", "--validation", "0.4", "--freeze", "visual", "text_tower", "--thaw", "1"]
    assert main(train) == 0, capsys.readouterr()
    trained, preprocess = clip.load(out / "best.safetensors", device="cpu")
    assert type(trained) is DualEncoder
    assert repr(preprocess) == repr(mixed().preprocess)
    assert main(["train", "--resume", "--out", str(out)]) == 0, capsys.readouterr()
