import math

import pytest
import torch
from torch import nn

from clip.attention import MultiheadAttention, causal_mask, is_causal_mask, merge_heads, split_heads

L, S, N, D, H = 5, 7, 3, 24, 4


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def pair(draw):
    """Ours and PyTorch's, with the same weights."""
    ours, theirs = MultiheadAttention(D, H), nn.MultiheadAttention(D, H)
    theirs.load_state_dict({name: draw(*entry.shape) for name, entry in theirs.state_dict().items()})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_it_is_a_subclass_with_the_same_state_dict(pair):
    ours, theirs = pair
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def masks(draw):
    forbidden = torch.zeros(L, S, dtype=torch.bool)
    forbidden[:, 1::2] = True
    padding = torch.tensor([[False] * S, [False] * 4 + [True] * 3, [False] * 6 + [True]])
    return {
        "no mask": {},
        "numbers": {"attn_mask": draw(L, S)},
        "booleans": {"attn_mask": forbidden},
        "one mask a head": {"attn_mask": draw(N * H, L, S)},
        "padding": {"key_padding_mask": padding},
        "padding and booleans": {"key_padding_mask": padding, "attn_mask": forbidden},
    }


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_outputs_and_weights_are_pytorchs_under_every_mask(pair, draw, need_weights, average):
    query, key, value = draw(L, N, D), draw(S, N, D), draw(S, N, D)
    for kind, mask in masks(draw).items():
        options = {"need_weights": need_weights, "average_attn_weights": average, **mask}
        (ours, our_weights), (theirs, their_weights) = (attend(query, key, value, **options) for attend in pair)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=kind)
        assert (our_weights is None) == (their_weights is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(our_weights, their_weights, msg=kind)


def test_self_attention_and_a_single_sequence_are_pytorchs(pair, draw):
    ours, theirs = pair
    for x in (draw(L, N, D), draw(L, D)):
        for got, want in zip(ours(x, x, x), theirs(x, x, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_value_of_its_own_is_projected_though_query_and_key_are_one(pair, draw):
    x, value = draw(S, N, D), draw(S, N, D)
    ours, theirs = (attend(x, x, value)[0] for attend in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_two_positions_one_head_by_hand():
    attend = MultiheadAttention(1, 1)
    for parameter in attend.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(attend.in_proj_bias)
    nn.init.zeros_(attend.out_proj.bias)
    # Q = K = V = x = (0, ln 3): position 0 scores both 0 and takes the mean; position 1 scores (0, ln² 3)
    x = torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    out, weights = attend(x, x, x)
    high = math.exp(math.log(3) ** 2) / (1 + math.exp(math.log(3) ** 2))
    assert torch.allclose(weights[0], torch.tensor([[0.5, 0.5], [1 - high, high]]))
    assert torch.allclose(out.flatten(), torch.tensor([math.log(3) / 2, high * math.log(3)]))


def test_a_permutation_of_the_keys_changes_nothing_and_one_of_the_queries_permutes_the_output(pair, draw):
    ours, _ = pair
    query, key, value = draw(L, N, D), draw(S, N, D), draw(S, N, D)
    out = ours(query, key, value)[0]
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    torch.testing.assert_close(ours(query, key[order], value[order])[0], out, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours(query[order[order < L]], key, value)[0], out[order[order < L]])


def test_a_causal_promise_needs_its_mask(pair, draw):
    x = draw(L, N, D)
    with pytest.raises(RuntimeError, match="expected the mask"):
        pair[0](x, x, x, is_causal=True)
    mask = causal_mask(L)
    torch.testing.assert_close(
        pair[0](x, x, x, attn_mask=mask, is_causal=True)[0], pair[1](x, x, x, attn_mask=mask)[0], rtol=1e-5, atol=1e-4
    )


def test_heads_are_split_and_merged_without_loss(draw):
    x = draw(L, N, D)
    heads = split_heads(x, H)
    assert heads.shape == (N, H, L, D // H)
    assert torch.equal(heads[1, 2, 3], x[3, 1, 2 * D // H : 3 * D // H])  # head 2 owns the third quarter of the width
    assert torch.equal(merge_heads(heads), x)


def test_the_causal_mask_by_hand():
    inf = torch.inf
    assert torch.equal(causal_mask(3), torch.tensor([[0, -inf, -inf], [0, 0, -inf], [0, 0, 0]]))


@pytest.mark.parametrize(
    ("change", "causal"),
    [
        (lambda m: m, True),
        (lambda m: m.half(), True),
        (lambda m: m.expand(6, 4, 4), True),
        (lambda m: m == -torch.inf, True),
        (lambda m: torch.where(m == 0, 5.0, m), True),  # what lies behind may weigh as it likes
        (torch.zeros_like, False),
        (lambda m: m.nan_to_num(neginf=-1e4), False),  # e^-10000 is 0, but a promise it is not
        (lambda m: m.index_fill(1, torch.tensor([3]), 0.0), False),
        (lambda m: m.T, False),
    ],
)
def test_a_mask_is_causal_if_every_look_ahead_is_forbidden(change, causal):
    assert is_causal_mask(change(causal_mask(4))) is causal
