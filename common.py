"""The Transformer parts that the six models share: the lecture's recap slides, in code.

Shape letters, here and in every script: B pictures, N tokens, D width, h heads, d = D / h the width
of a head, P patch side, K classes. Pictures are (B, 3, H, W), sequences (B, N, D): a token is a row
here and a column on the slides. A class pasted into a notebook needs only those above it.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


def gelu_tanh(x):
    """Google's ViT's and SiT's, within 4.8e-4 of the exact GELU. bfloat16 is coarser than that."""
    exact = x.dtype == torch.bfloat16 and x.device.type == "cpu"  # three times as fast there
    return F.gelu(x, approximate="none" if exact else "tanh")


def quick_gelu(x):
    """x * sigmoid(1.702 x), Image GPT's and CLIP's: at most 0.021 away from the exact GELU."""
    return F.silu(1.702 * x) / 1.702  # one pass where the formula takes three


class LayerNorm(nn.LayerNorm):
    """(..., D) -> (..., D), each token by itself (slide "Transformer Layer": "column-wise"):

        y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta

    E and Var (divided by D, not D - 1) run over the D numbers of one token; gamma is `weight`, beta
    `bias`. eps is 1e-6 in ViT, MAE, I-JEPA, DINOv2, SiT and 1e-5 in CLIP.
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps=eps)


class Cache:
    """Keys and values of the tokens so far, room for `length`: a sampling step costs one token."""

    def __init__(self, length):
        self.length, self.used, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        """k, v (B, h, n, d) of n new tokens -> those of all tokens so far, (B, h, used, d)."""
        if self.k is None:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in (k, v))
        end = self.used + k.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has room for {self.length} tokens, not {end}")
        self.k[:, :, self.used:end], self.v[:, :, self.used:end] = k, v
        self.used = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention, x (B, N, D) -> (B, N, D): softmax(q k^T / sqrt(d)) v in each head.

    As the recap's hypernetwork: the output is linear in the values, y = A v, and the weights A are
    no parameters; another branch, the softmax of queries times keys, computes them from the input.
    The outputs of the heads, concatenated, are mixed by one matrix, the slide's Omega_c: `proj`.

    `context` (B, M, D): cross-attention, queries from x, keys and values from context.
    `causal`: token i sees tokens 0..i. `cache`: a Cache; then x holds the new tokens alone.
    `return_weights`: returns (y, A), A (B, h, N, M), each row summing to 1.
    """

    def __init__(self, dim, heads, bias=True, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)  # rows: queries | keys | values
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, context=None, cache=None, return_weights=False):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        if context is not None:  # only the queries come from x
            _, k, v = self.qkv(context).chunk(3, dim=-1)  # each (B, M, D)
        # (B, N or M, D) -> (B, h, N or M, d)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        N, M, d = q.shape[2], k.shape[2], q.shape[3]
        mask = None
        if self.causal and N > 1:  # query i is token M - N + i of the sequence
            mask = torch.ones(N, M, dtype=torch.bool, device=x.device).tril(M - N)
        # Both branches are one formula; up to 500 tokens of bfloat16 on a CPU, this is faster.
        if return_weights or (q.dtype == torch.bfloat16 and x.device.type == "cpu" and M <= 512):
            scores = (q * d**-0.5) @ k.transpose(-2, -1)  # (B, h, N, M)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = scores.softmax(dim=-1)  # how much token n listens to token m
            y = weights @ v  # (B, h, N, d)
        else:
            whole = mask is not None and N == M
            y = F.scaled_dot_product_attention(q, k, v, None if whole else mask, is_causal=whole)
        y = self.proj(y.transpose(1, 2).flatten(2))  # heads side by side, then Omega_c: (B, N, D)
        return (y, weights) if return_weights else y


class MLP(nn.Module):
    """(..., D) -> (..., D), each token by itself: D -> hidden -> D."""

    def __init__(self, dim, hidden, bias=True, act=F.gelu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One Transformer layer, (B, N, D) -> (B, N, D).

    Pre-norm, all six models:          `post_norm`, the slide "Transformer Layer -- Complete":
        x = x + attention(norm(x))         x = norm(x + attention(x))
        x = x + mlp(norm(x))               x = norm(x + mlp(x))

    `cross=True` adds the decoder's extra stage in between: attention to `context` (B, M, D).
    """

    def __init__(self, dim, heads, mlp_ratio=4.0, bias=True, act=F.gelu, norm=LayerNorm,
                 causal=False, post_norm=False, cross=False):
        super().__init__()
        self.post_norm = post_norm
        self.norm1, self.attn = norm(dim), Attention(dim, heads, bias, causal)
        if cross:
            self.norm_cross, self.cross_attn = norm(dim), Attention(dim, heads, bias)
        self.norm2, self.mlp = norm(dim), MLP(dim, int(dim * mlp_ratio), bias, act)

    def forward(self, x, context=None, cache=None):
        if self.post_norm:
            x = self.norm1(x + self.attn(x, cache=cache))
            if context is not None:
                x = self.norm_cross(x + self.cross_attn(x, context))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x), cache=cache)
        if context is not None:
            x = x + self.cross_attn(self.norm_cross(x), context)
        return x + self.mlp(self.norm2(x))


def patchify(images, P):
    """(B, C, H, W) -> (B, N, P*P*C), N = HW / P^2: patches in reading order, each (P, P, C)."""
    B, C, H, W = images.shape
    if H % P or W % P:
        raise ValueError(f"patches of {P} x {P} do not divide a picture of {H} x {W}")
    x = images.reshape(B, C, H // P, P, W // P, P)  # (B, C, row, y, column, x)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)  # (B, row, column, y, x, C)


def unpatchify(patches, P, rows=None):
    """(B, N, P*P*C) -> (B, C, H, W), patchify's inverse; a square grid unless `rows` is given."""
    rows = rows or math.isqrt(patches.shape[1])
    x = patches.unflatten(2, (P, P, -1)).unflatten(1, (rows, -1))  # (B, row, column, y, x, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Flattened patches (B, N, P*P*C) -> tokens (B, N, D), by one trainable linear map.

    A Conv2d with kernel = stride = P is the same map; its weight has that form, (D, C, P, P).
    """

    def __init__(self, dim, patch_size, channels=3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, patches):
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        return F.linear(patches, weight, self.proj.bias)


def sincos_2d(dim, rows, columns=None):
    """The fixed position table of MAE, I-JEPA and SiT, (rows * columns, D) float32. For the patch
    at (r, c), with w_k = 10000^(-k / (D/4)) and k = 0 .. D/4 - 1:
    [sin(c w) | cos(c w) | sin(r w) | cos(r w)]: first half column, second half row."""
    if dim % 4:
        raise ValueError(f"a sin-cos table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns or rows), indexing="ij")
    c, r = (t.flatten()[:, None] * omega for t in (c, r))  # each (N, D/4)
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=1).float()


def resize_table(table, rows, columns=None, extra=0, antialias=True):
    """A position table (1, extra + n*n, D) -> (1, extra + rows*columns, D), bicubic. The first
    `extra` rows (class token) stay. timm uses antialias, the code of MAE does not."""
    columns, n = columns or rows, math.isqrt(table.shape[1] - extra)
    if (n, n) == (rows, columns):
        return table
    grid = table[:, extra:].reshape(1, n, n, -1).permute(0, 3, 1, 2).float()  # (1, D, n, n)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=antialias).to(table.dtype)
    return torch.cat([table[:, :extra], grid.flatten(2).transpose(1, 2)], dim=1)


@functools.lru_cache  # so that each choice is printed once
def multiplies_bf16(device, precision):
    """Whether to use bfloat16 on a kind of device ("cpu", "cuda", ...); prints that and why."""
    bf16, why = precision == "bf16", f"--precision {precision}"
    if precision == "auto" and device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"this GPU has {'' if bf16 else 'no '}bfloat16 units"
    elif precision == "auto":
        units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        bf16 = device == "cpu" and any(getattr(torch.cpu, u, lambda: False)() for u in units)
        why = f"this {device} has {'' if bf16 else 'no known '}bfloat16 units"
    print(f"precision: {'bfloat16' if bf16 else 'float32'} ({why})")
    return bf16


def autocast(device, precision="auto"):
    """A context in which matrix products are bfloat16: "auto" where the hardware has it natively,
    "bf16" always, "fp32" never. Weights, residual sums and LayerNorms stay float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=multiplies_bf16(kind, precision))
