"""common.py against torch.nn's own layers and against formulas written another way, in float64."""

import math

import pytest
import torch
from torch import nn

from common import (MLP, Attention, Block, Cache, LayerNorm, PatchEmbed, autocast, gelu_tanh, patchify,
                    quick_gelu, resize_table, sincos_2d, unpatchify)

B, N, D, HEADS = 2, 7, 16, 4


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
    probe = torch.randn_like(ours)
    left, right = zip(*[(x, x) for x in inputs], *parameters)
    for a, b in zip(torch.autograd.grad(ours, left, probe, retain_graph=True),
                    torch.autograd.grad(theirs, right, probe, retain_graph=True)):
        close(a, b)


def copy_attention(ours, theirs):
    theirs.in_proj_weight.data, theirs.out_proj.weight.data = ours.qkv.weight.data, ours.proj.weight.data
    if theirs.in_proj_bias is not None:
        nn.init.normal_(ours.qkv.bias), nn.init.normal_(ours.proj.bias)
        theirs.in_proj_bias.data, theirs.out_proj.bias.data = ours.qkv.bias.data, ours.proj.bias.data


def randomise(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double()


def test_layer_norm_is_the_slides_formula():
    norm, x = randomise(LayerNorm(D, eps=1e-5)), tokens()
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
    ours, theirs = Attention(D, HEADS).double(), nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    copy_attention(ours, theirs)
    x, context = tokens(), tokens(5)
    expected, weights = theirs(x, context, context, average_attn_weights=False)
    same_gradients(ours(x, context), expected, x, context,
                   parameters=[(ours.qkv.weight, theirs.in_proj_weight), (ours.qkv.bias, theirs.in_proj_bias)])
    close(ours(x, context, return_weights=True)[1], weights)


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_is_the_encoder_layer(norm_first):
    ours = randomise(Block(D, HEADS, post_norm=not norm_first))
    theirs = nn.TransformerEncoderLayer(D, HEADS, 4 * D, 0.0, "gelu", 1e-6, True, norm_first).double()
    copy_layer(ours, theirs)
    x = tokens()
    same_gradients(ours(x), theirs(x), x, parameters=[(ours.mlp.fc1.weight, theirs.linear1.weight),
                                                      (ours.norm2.bias, theirs.norm2.bias)])


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_with_cross_attention_is_the_decoder_layer(norm_first):
    ours = randomise(Block(D, HEADS, causal=True, cross=True, post_norm=not norm_first))
    theirs = nn.TransformerDecoderLayer(D, HEADS, 4 * D, 0.0, "gelu", 1e-6, True, norm_first).double()
    copy_layer(ours, theirs)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    for a, b in ((theirs.norm2, ours.norm_cross), (theirs.norm3, ours.norm2)):
        a.load_state_dict(b.state_dict())
    x, context = tokens(), tokens(5)
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    same_gradients(ours(x, context), theirs(x, context, tgt_mask=mask), x, context)


def copy_layer(ours, theirs):
    copy_attention(ours.attn, theirs.self_attn)
    for a, b in ((theirs.linear1, ours.mlp.fc1), (theirs.linear2, ours.mlp.fc2), (theirs.norm1, ours.norm1),
                 (theirs.norm2, ours.norm2)):
        a.load_state_dict(b.state_dict())


def test_activations():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    close(gelu_tanh(x), 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    exact = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    close(MLP(D, D).act(x), exact)
    assert 4e-4 < (gelu_tanh(x) - exact).abs().max() < 4.8e-4 and 0.02 < (quick_gelu(x) - exact).abs().max() < 0.021


@pytest.mark.parametrize("chunks", [[1] * N, [3, 1, 1, 2], [N]])
def test_cached_steps_equal_the_full_pass(chunks):
    block, x, cache, out = Block(D, HEADS, causal=True).double(), tokens(), Cache(N), []
    for part in x.split(chunks, dim=1):
        out.append(block(part, cache=cache))
    close(torch.cat(out, 1), block(x), 1e-12)
    with pytest.raises(ValueError, match="room for 7"):
        block(x[:, :1], cache=cache)


def test_bfloat16_paths_agree():
    """On a CPU the written-out branch runs up to 512 tokens, the fused one above and in float32."""
    attention = Attention(D, HEADS)
    x = torch.randn(1, 512, D)
    with torch.autocast("cpu", torch.bfloat16):
        short = attention(x)
    assert (short.float() - attention(x)).abs().max() < 0.02
    x = torch.randn(1, 513, D)
    with torch.autocast("cpu", torch.bfloat16):
        fused, written = attention(x), attention(x, return_weights=True)[0]
    assert (fused.float() - written.float()).abs().max() < 0.02


def test_causal_attention_is_blind_to_what_follows():
    attention, x = Attention(D, HEADS, causal=True).double(), tokens()
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
    with pytest.raises(ValueError, match="patches of 5 x 5 do not divide a picture of 8 x 12"):
        patchify(images, 5)


def test_patch_embedding_is_a_strided_convolution():
    embed = PatchEmbed(D, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    same_gradients(embed(patchify(images, 4)), embed.proj(images).flatten(2).transpose(1, 2), images)


def test_sincos_table():
    table = sincos_2d(8, 3)  # MAE's: first half column, second half row
    close(table[1], torch.tensor([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]))
    close(table[3], torch.tensor([0, 0, 1, 1, math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]))
    assert sincos_2d(8, 2, 5).shape == (10, 8) and table.dtype == torch.float32
    with pytest.raises(ValueError):
        sincos_2d(6, 3)


def test_resize_table():
    table = torch.randn(1, 1 + 16, D)
    assert resize_table(table, 4, extra=1) is table
    bigger = resize_table(table, 8, extra=1)
    assert bigger.shape == (1, 65, D) and (bigger[:, 0] == table[:, 0]).all()
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # the column number
    wide = resize_table(ramp, 8, antialias=False).reshape(8, 8)
    assert (wide == wide[0]).all() and (wide.diff(dim=1) > 0).all() and abs(wide.mean() - 1.5) < 1e-5


def test_autocast_says_what_it_chose_once(capsys):
    from common import multiplies_bf16
    multiplies_bf16.cache_clear()
    for precision, dtype in (("bf16", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast("cpu", precision):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert capsys.readouterr().out.splitlines() == ["precision: bfloat16 (--precision bf16)",
                                                    "precision: float32 (--precision fp32)"]
    autocast("cpu")
    assert "this cpu has" in capsys.readouterr().out
