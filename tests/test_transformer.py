import copy
import pickle

import pytest
import torch

from clip.attention import MultiheadAttention, causal_mask
from clip.transformer import ResidualAttentionBlock, Transformer

L, N, D, H = 6, 3, 16, 2


@pytest.fixture
def x():
    return torch.randn(L, N, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def causal():
    torch.manual_seed(0)
    return Transformer(D, 2, H, causal_mask(9)).eval()


def test_a_block_is_its_two_equations(x):
    # ViT Eq. 2 and 3
    block = ResidualAttentionBlock(D, H)
    normed = block.ln_1(x)
    middle = x + block.attn(normed, normed, normed, need_weights=False)[0]
    assert torch.equal(block(x), middle + block.mlp(block.ln_2(middle)))


def test_without_a_mask_positions_are_interchangeable(x):
    tower = Transformer(D, 2, H)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(tower(x[order]), tower(x)[order])


def test_with_the_causal_mask_later_positions_change_nothing_before_them(causal, x):
    changed = x.clone()
    changed[4:] += 1
    out, other = causal(x), causal(changed)
    torch.testing.assert_close(out[:4], other[:4])
    assert (out[4:] - other[4:]).abs().min() > 0


def test_a_shorter_sequence_uses_the_corner_of_the_mask(causal, x):
    torch.testing.assert_close(causal(x[:4]), causal(x)[:4])


def test_sequences_of_a_batch_do_not_mix(causal, x):
    torch.testing.assert_close(causal(x)[:, 1:2], causal(x[:, 1:2]))


def test_the_attention_of_a_block_can_be_overridden(causal, x):
    causal.resblocks[0].attention = torch.zeros_like
    first = causal.resblocks[0]
    assert torch.equal(first(x), x + first.mlp(first.ln_2(x)))


@pytest.mark.parametrize("mask", [None, torch.zeros(9, 9), causal_mask(9).double(), causal_mask(9) == -torch.inf])
def test_the_mask_can_be_replaced_and_is_cast_on_use(causal, x, mask):
    block = causal.resblocks[0]
    before = block(x)
    block.attn_mask = mask
    forbids = mask is not None and bool((mask != 0).any())
    assert torch.allclose(block(x), before, atol=1e-6) is forbids
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_one_mask_for_each_head_is_accepted(causal, x):
    block = causal.resblocks[0]
    before = block(x)
    block.attn_mask = causal_mask(9).expand(N * H, 9, 9)
    torch.testing.assert_close(block(x), before)


def test_the_mask_is_no_part_of_the_state_dict_and_follows_the_block(causal):
    assert not any("mask" in name for name in causal.state_dict())
    causal.half()
    assert all(block.attn_mask.dtype == torch.float16 for block in causal.resblocks)
    causal.to("meta")
    assert all(block.attn_mask.is_meta for block in causal.resblocks)


def test_a_tower_built_without_memory_gets_its_mask_all_the_same(x):
    with torch.device("meta"):
        tower = Transformer(D, 2, H, causal_mask(9))
    tower.to_empty(device="cpu")
    assert torch.equal(tower.resblocks[1].attn_mask, causal_mask(9))


def overridden_attention(block):
    block.attention = torch.zeros_like


def overridden_forward(block):
    block.forward = torch.zeros_like


def other_attention_module(block):
    block.attn = torch.nn.MultiheadAttention(D, H)


def other_attention_method(block):
    block.attn.forward = lambda query, key, value, **options: (query.flip(0), None)


def removed(block):
    block.attn_mask = None


def replaced(block):
    block.attn_mask = torch.zeros(9, 9)


def written_into(block):
    block.attn_mask = block.attn_mask.clone()
    assert block.is_causal  # so that an answer is remembered
    block.attn_mask[0, 1] = 0


@pytest.mark.parametrize(
    "change",
    [
        overridden_attention,
        overridden_forward,
        other_attention_module,
        other_attention_method,
        removed,
        replaced,
        written_into,
    ],
)
def test_a_tower_that_may_look_ahead_says_so(causal, change):
    assert causal.is_causal
    change(causal.resblocks[1])
    assert not causal.is_causal


def test_a_tower_whose_own_forward_was_replaced_says_so(causal):
    own = causal.forward
    causal.forward = lambda x: own(x.flip(0)).flip(0)
    assert not causal.is_causal


def test_a_method_replaced_on_the_class_is_noticed(causal, monkeypatch):
    monkeypatch.setattr(ResidualAttentionBlock, "attention", lambda self, x: x)
    assert not causal.is_causal


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_compute_the_same_and_are_causal_too(causal, x, copied):
    assert causal.is_causal
    twin = copied(causal)
    assert torch.equal(twin(x), causal(x))
    assert twin.is_causal
    twin.resblocks[0].attn_mask = None
    assert not twin.is_causal
    assert causal.is_causal


def test_a_tower_used_in_inference_mode_can_be_trained_afterwards(causal, x):
    causal.bfloat16()  # so that a float32 mask has to be cast
    for block in causal.resblocks:
        block.attn_mask = causal_mask(9)
    with torch.inference_mode():
        causal(x.bfloat16())
        assert causal.is_causal
    causal(x.bfloat16()).sum().backward()


def test_weights_can_be_asked_for(x):
    block = ResidualAttentionBlock(D, H, causal_mask(L))
    assert isinstance(block.attn, MultiheadAttention)
    _, weights = block.attn(x, x, x, need_weights=True, attn_mask=block.attn_mask)
    assert torch.allclose(weights.sum(-1), torch.ones(N, L))
    assert torch.equal(weights.triu(1), torch.zeros(N, L, L))
