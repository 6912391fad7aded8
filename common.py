"""The Transformer parts that the six models share: the lecture's recap slides, in code.

Shape letters, here and in every script: B pictures, N tokens, D width, h heads, d = D / h width of a head,
P patch side, K classes. Pictures are (B, 3, H, W), sequences (B, N, D): a token is a row here, a column on the slides.
Every class takes plain arguments and works when it is pasted alone into a notebook.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def gelu_tanh(x):
    """GELU's tanh approximation: Google's ViT, DiT, SiT. At most 4.8e-4 away from the exact form."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    """x * sigmoid(1.702 x): Image GPT and CLIP. At most 0.021 away from the exact form."""
    return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """(..., D) -> (..., D), each token by itself ("calculated column-wise", slide "Transformer Layer -- Complete"):

        y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta

    E and Var (the biased one, divided by D) run over the D numbers of one token; gamma = `weight`, beta = `bias`.
    eps is 1e-6 in ViT, MAE, I-JEPA, DINOv2 and SiT, 1e-5 in CLIP: it matters when released weights must give the same outputs.
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps=eps)


class Cache:
    """Keys and values of the tokens read so far, with room for `length`: sampling then costs one token a step."""

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
    """Multi-head attention, x (B, N, D) -> (B, N, D): softmax(q k^T / sqrt(d)) v in each of h heads.

    As the recap's hypernetwork: the output is linear in the values, y = A v, and the weights A of that linear map are
    not parameters: another branch, the softmax of queries times keys, computes them from the input. The heads'
    outputs are concatenated and mixed by one matrix, the slide's Omega_c, here `proj`.

    `context` (B, M, D): cross-attention; queries come from x, keys and values from context (slide "Cross-Attention").
    `causal`: token i sees tokens 0..i. `cache`: a Cache; x holds only the tokens that are new.
    `return_weights`: returns (y, A) with A (B, h, N, M), each row summing to 1.
    """

    def __init__(self, dim, heads, bias=True, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)  # rows: queries | keys | values
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, context=None, cache=None, return_weights=False):
        D = x.shape[-1]
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:D], None if bias is None else bias[:D])  # (B, N, D)
            k, v = F.linear(context, weight[D:], None if bias is None else bias[D:]).chunk(2, dim=-1)  # (B, M, D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, N or M, d)
        if cache is not None:
            k, v = cache.append(k, v)
        N, M, d = q.shape[2], k.shape[2], q.shape[3]
        mask = None
        if self.causal and N > 1:  # query i is token M - N + i of the sequence and sees the keys up to itself
            mask = torch.ones(N, M, dtype=torch.bool, device=x.device).tril(M - N)
        # Both branches are the same formula; written out is the faster one for short sequences in bfloat16 on a CPU.
        if return_weights or (q.dtype == torch.bfloat16 and q.device.type == "cpu" and 1 < N <= 512):
            scores = (q * d**-0.5) @ k.transpose(-2, -1)  # (B, h, N, M)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = scores.softmax(dim=-1)  # how much token n listens to token m
            y = weights @ v  # (B, h, N, d)
        else:
            whole = mask is not None and N == M
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if whole else mask, is_causal=whole)
        y = self.proj(y.transpose(1, 2).flatten(2))  # concatenate the heads: (B, N, D)
        return (y, weights) if return_weights else y


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D), each token by itself: D -> hidden -> D."""

    def __init__(self, dim, hidden, bias=True, act=F.gelu):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden, bias=bias), act, nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One Transformer layer, (B, N, D) -> (B, N, D).

    Pre-norm, which all six models use:               Post-norm, the recap slide (`post_norm=True`):
        x = x + attention(norm(x))                        x = norm(x + attention(x))
        x = x + mlp(norm(x))                              x = norm(x + mlp(x))

    `cross=True` adds the decoder's extra stage between the two: cross-attention to `context` (B, M, D).
    """

    def __init__(self, dim, heads, mlp_ratio=4.0, bias=True, act=F.gelu, norm=LayerNorm, causal=False,
                 post_norm=False, cross=False):
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
    """(B, C, H, W) -> (B, N, P*P*C), N = H W / P^2: patches in reading order, each flattened as (P, P, C)."""
    B, C, H, W = images.shape
    if H % P or W % P:
        raise ValueError(f"patches of {P} x {P} do not divide a picture of {H} x {W}")
    x = images.reshape(B, C, H // P, P, W // P, P)  # (B, C, row, y, column, x)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)  # (B, row, column, y, x, C)


def unpatchify(patches, P, rows=None):
    """(B, N, P*P*C) -> (B, C, H, W), the inverse of patchify; a square grid unless `rows` is given."""
    B, N, _ = patches.shape
    rows = rows or math.isqrt(N)
    x = patches.reshape(B, rows, N // rows, P, P, -1)  # (B, row, column, y, x, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * P, N // rows * P)


class PatchEmbed(nn.Module):
    """Flattened patches (B, N, P*P*C) -> tokens (B, N, D), by one trainable linear map.

    A Conv2d with kernel = stride = P, run on the whole picture, is the same map. Its weight is kept in that form,
    (D, C, P, P), because released checkpoints hold it so; it is multiplied as the matrix that it is.
    """

    def __init__(self, dim, patch_size, channels=3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def sincos_2d(dim, rows, columns=None):
    """The fixed position table of MAE, I-JEPA and SiT, (rows * columns, D) float32.

    For the patch at (r, c), with w_k = 10000^(-k / (D/4)) and k = 0 .. D/4 - 1:
    [sin(c w) | cos(c w) | sin(r w) | cos(r w)]; the first half tells the column, the second the row.
    """
    if dim % 4:
        raise ValueError(f"a sin-cos table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns or rows), indexing="ij")
    c, r = (t.flatten()[:, None].double() * omega for t in (c, r))  # each (N, D/4)
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=1).float()


def resize_table(table, rows, columns=None, extra=0, antialias=True):
    """A position table (1, extra + n*n, D) for another grid -> (1, extra + rows*columns, D), bicubic.

    The first `extra` rows (class token) stay. timm resizes with antialias, MAE's and I-JEPA's code without.
    """
    columns, n = columns or rows, math.isqrt(table.shape[1] - extra)
    if (n, n) == (rows, columns):
        return table
    grid = table[:, extra:].reshape(1, n, n, -1).permute(0, 3, 1, 2).float()  # (1, D, n, n)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=antialias).to(table.dtype)
    return torch.cat([table[:, :extra], grid.flatten(2).transpose(1, 2)], dim=1)


_announced = set()


def autocast(device, precision="auto"):
    """A context in which matrix products run in bfloat16 where the hardware multiplies it natively, else in float32.

    precision: "auto", "bf16" or "fp32". Prints its choice once, with the reason. Parameters stay float32.
    """
    device = torch.device(device)
    if precision != "auto":
        bf16, reason = precision == "bf16", f"--precision {precision}"
    elif device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"this GPU {'multiplies' if bf16 else 'does not multiply'} bfloat16 natively"
    elif device.type == "cpu":
        probes = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False) for unit in ("amx_tile", "avx512_bf16"))
        bf16 = any(probe() for probe in probes)
        reason = f"this CPU has {'' if bf16 else 'no '}bfloat16 units (AMX or AVX-512-BF16)"
    else:
        bf16, reason = False, f"the safe choice on {device.type}"
    if (line := f"precision: {'bfloat16' if bf16 else 'float32'} on {device.type} ({reason})") not in _announced:
        _announced.add(line)
        print(line)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
