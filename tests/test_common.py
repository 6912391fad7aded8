"""common.py against torch.nn's own layers and against formulas written another way, in float64."""

import math

import pytest
import torch
from torch import nn

from common import (MLP, Attention, Block, Cache, LayerNorm, PatchEmbed, gelu_tanh, patchify, quick_gelu, sincos_2d,
                    unpatchify)

B = 2
N = 7
D = 16
HEADS = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(n=N, batch=B):
    return torch.randn(batch, n, D, dtype=torch.float64, requires_grad=True)


def close(ours, theirs, tolerance=1e-6):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance


def same_gradients(ours, theirs, *inputs, parameters=()):
    """The same output, and the same gradient for the inputs and for pairs of parameters (ours, theirs)."""
    close(ours, theirs)
    direction = torch.randn_like(ours)
    left = [*inputs, *(pair[0] for pair in parameters)]
    right = [*inputs, *(pair[1] for pair in parameters)]
    our_gradients = torch.autograd.grad(ours, left, direction, retain_graph=True)
    their_gradients = torch.autograd.grad(theirs, right, direction, retain_graph=True)
    for a, b in zip(our_gradients, their_gradients):
        close(a, b)


def copy_attention(ours, theirs):
    theirs.in_proj_weight.data = ours.qkv.weight.data
    theirs.out_proj.weight.data = ours.proj.weight.data
    if theirs.in_proj_bias is not None:
        nn.init.normal_(ours.qkv.bias)
        nn.init.normal_(ours.proj.bias)
        theirs.in_proj_bias.data = ours.qkv.bias.data
        theirs.out_proj.bias.data = ours.proj.bias.data


def randomize(module):
    """Random numbers also where the initialization has zeros and ones."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double()


def test_layer_norm_is_the_slides_formula():
    norm = randomize(LayerNorm(D, eps=1e-5))
    x = tokens()
    mean = x.sum(-1, keepdim=True) / D
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / D
    same_gradients(norm(x), (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias, x)
    assert LayerNorm(D).eps == 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_is_multihead_attention(bias, causal):
    ours = Attention(D, HEADS, bias=bias, causal=causal).double()
    theirs = nn.MultiheadAttention(D, HEADS, bias=bias, batch_first=True).double()
    copy_attention(ours, theirs)
    x = tokens()
    mask = torch.ones(N, N, dtype=torch.bool).triu(1) if causal else None
    expected, weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    same_gradients(ours(x), expected, x, parameters=[(ours.qkv.weight, theirs.in_proj_weight),
                                                     (ours.proj.weight, theirs.out_proj.weight)])
    y, ours_weights = ours(x, return_weights=True)
    close(ours_weights, weights)
    same_gradients(y, expected, x)


def test_cross_attention_is_multihead_attention():
    ours = Attention(D, HEADS).double()
    theirs = nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    copy_attention(ours, theirs)
    x = tokens()
    context = tokens(5)
    expected, weights = theirs(x, context, context, average_attn_weights=False)
    same_gradients(ours(x, context), expected, x, context,
                   parameters=[(ours.qkv.weight, theirs.in_proj_weight), (ours.qkv.bias, theirs.in_proj_bias)])
    close(ours(x, context, return_weights=True)[1], weights)


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_is_the_encoder_layer(norm_first):
    ours = randomize(Block(D, HEADS, post_norm=not norm_first))
    theirs = nn.TransformerEncoderLayer(D, HEADS, dim_feedforward=4 * D, dropout=0.0, activation="gelu",
                                        layer_norm_eps=1e-6, batch_first=True, norm_first=norm_first).double()
    copy_layer(ours, theirs)
    x = tokens()
    same_gradients(ours(x), theirs(x), x, parameters=[(ours.mlp.fc1.weight, theirs.linear1.weight),
                                                      (ours.norm2.bias, theirs.norm2.bias)])


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_with_cross_attention_is_the_decoder_layer(norm_first):
    ours = randomize(Block(D, HEADS, causal=True, cross=True, post_norm=not norm_first))
    theirs = nn.TransformerDecoderLayer(D, HEADS, dim_feedforward=4 * D, dropout=0.0, activation="gelu",
                                        layer_norm_eps=1e-6, batch_first=True, norm_first=norm_first).double()
    copy_layer(ours, theirs)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    theirs.norm2.load_state_dict(ours.norm_cross.state_dict())
    theirs.norm3.load_state_dict(ours.norm2.state_dict())
    x = tokens()
    context = tokens(5)
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    same_gradients(ours(x, context), theirs(x, context, tgt_mask=mask), x, context)


def copy_layer(ours, theirs):
    copy_attention(ours.attn, theirs.self_attn)
    theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
    theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())
    theirs.norm1.load_state_dict(ours.norm1.state_dict())
    theirs.norm2.load_state_dict(ours.norm2.state_dict())


def test_activations():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    close(gelu_tanh(x), 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    exact = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    close(MLP(D, D).act(x), exact)
    assert 4e-4 < (gelu_tanh(x) - exact).abs().max() < 4.8e-4
    assert 0.02 < (quick_gelu(x) - exact).abs().max() < 0.021


@pytest.mark.parametrize("chunks", [[1] * N, [3, 1, 1, 2], [N]])
def test_cached_steps_equal_the_full_pass(chunks):
    block = Block(D, HEADS, causal=True).double()
    x = tokens()
    cache = Cache(N)
    out = [block(part, cache=cache) for part in x.split(chunks, dim=1)]
    close(torch.cat(out, 1), block(x), 1e-12)
    with pytest.raises(ValueError, match="room for 7"):
        block(x[:, :1], cache=cache)


def test_bfloat16_paths_agree(monkeypatch):
    """On a CPU the written-out branch runs up to 512 tokens, the fused one above and in float32."""
    attention = Attention(D, HEADS)
    calls = []
    fused_kernel = Attention.fused
    monkeypatch.setattr(attention, "fused", lambda *args: calls.append(args[0].shape[2]) or fused_kernel(*args))
    x = torch.randn(1, 512, D)
    with torch.autocast("cpu", torch.bfloat16):
        short = attention(x)
    assert (short.float() - attention(x)).abs().max() < 0.02
    x = torch.randn(1, 513, D)
    with torch.autocast("cpu", torch.bfloat16):
        fused = attention(x)
        written = attention(x, return_weights=True)[0]
    assert (fused.float() - written.float()).abs().max() < 0.02
    assert calls == [512, 513]  # the first of them in float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("causal, n", [(False, N), (True, N), (True, 3), (True, 1)])
def test_the_fused_kernel_and_the_written_out_branch_agree(dtype, tolerance, causal, n):
    """n queries and N keys: with n < N, a cache holds the keys of the first N - n tokens."""
    attention = Attention(D, HEADS, causal=causal)
    nn.init.normal_(attention.qkv.weight, std=0.5)  # so that the weights are far from equal
    attention.to(dtype)
    x = torch.randn(B, N, D, dtype=dtype)
    new = x[:, N - n:]

    def cache():
        cache = Cache(N)
        if n < N:
            attention(x[:, :N - n], cache=cache)
        return cache

    written, weights = attention(new, cache=cache(), return_weights=True)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
    q = attention.split_heads(q)[:, :, N - n:]
    k = attention.split_heads(k)
    v = attention.split_heads(v)
    mask = torch.ones(n, N, dtype=torch.bool).tril(N - n) if causal else None
    fused = Attention.fused(q, k, v, mask)  # (B, h, n, d)
    fused = attention.proj(fused.transpose(1, 2).flatten(2))
    chosen = attention(new, cache=cache())  # by the branch that this format takes
    assert fused.dtype == written.dtype == dtype and weights.shape == (B, HEADS, n, N)
    assert weights.amax() > 0.5
    close(fused, written, tolerance)
    close(fused, chosen, tolerance)


def test_causal_attention_is_blind_to_what_follows():
    attention = Attention(D, HEADS, causal=True).double()
    x = tokens()
    changed = x.detach().clone()
    changed[:, 4:] += 1
    difference = (attention(x) - attention(changed)).abs().amax((0, 2))
    assert (difference[:4] == 0).all() and (difference[4:] > 0).all()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        Attention(16, 3)


def test_patchify_puts_the_top_left_square_first():
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert (patches[:, 0] == images[:, :, :4, :4].permute(0, 2, 3, 1).reshape(2, -1)).all()
    assert (patches[:, 1] == images[:, :, :4, 4:8].permute(0, 2, 3, 1).reshape(2, -1)).all()
    assert (patches[:, 3] == images[:, :, 4:, :4].permute(0, 2, 3, 1).reshape(2, -1)).all()
    assert (unpatchify(patches, 4, rows=2) == images).all()
    square = torch.randn(1, 3, 12, 12)
    assert (unpatchify(patchify(square, 3), 3) == square).all()
    with pytest.raises(ValueError, match="patches of 5 x 5 do not divide an image of 8 x 12"):
        patchify(images, 5)


def test_patch_embedding_is_a_strided_convolution():
    embed = PatchEmbed(D, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    same_gradients(embed(patchify(images, 4)), embed.proj(images).flatten(2).transpose(1, 2), images)


def test_sincos_table():
    table = sincos_2d(8, 3)  # MAE's: first half column, second half row
    one = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    close(table[1], torch.tensor([*one, 0, 0, 1, 1]))  # row 0, column 1
    close(table[3], torch.tensor([0, 0, 1, 1, *one]))  # row 1, column 0
    assert sincos_2d(8, 2, 5).shape == (10, 8) and table.dtype == torch.float32
    close(sincos_2d(8, 2, 5)[5], table[3])  # two rows of five: the sixth patch begins the second row
    with pytest.raises(ValueError):
        sincos_2d(6, 3)
