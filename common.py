"""The lecture's recap in code, and the other Transformer parts that the six models share.

Letters, here and in every script: B images in a batch, N tokens, D width, h heads, d = D / h the
width of a head, P patch side, K classes (iGPT: colors; I-JEPA: patches of a target). Images are
(B, 3, H, W), sequences are (B, N, D): a token is a row here and a column on the slides. "To copy
this, also copy: ..." names all that is needed, except for UserError and reading files (data.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.LayerNorm):
    """(..., D) -> (..., D), each token by itself (slide "Transformer Layer": "column-wise"):

        y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta

    E and Var (divided by D, not D - 1) run over the D numbers of one token; gamma is `weight`, beta
    is `bias`. eps is 1e-6 in ViT, MAE, I-JEPA, DINOv2 and SiT, and 1e-5 in CLIP. (Image GPT has
    RMSNorm: no E, no beta.)
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps=eps)


class Attention(nn.Module):
    """Multi-head attention, x (B, N, D) -> (B, N, D): softmax(q k^T / sqrt(d)) v in each head.

    The slide's hypernetwork: the output y = A v is linear in the values v. The weights A are no
    parameters. Another branch computes them from the input: the softmax of queries times keys.
    One matrix mixes the concatenated outputs of the heads, the slide's Omega_c: `proj`.

    context (B, M, D): cross-attention; queries come from x, keys and values from the context.
    causal: token i attends to tokens 0..i only. cache: a Cache, and x holds the new tokens alone.
    return_weights: returns (y, A), A (B, h, N, M); each row of A sums to 1.
    """

    def __init__(self, dim, heads, bias=True, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)  # rows: queries | keys | values
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, context=None, cache=None, return_weights=False):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        if context is not None:  # cross-attention: only the queries come from x
            _, k, v = self.qkv(context).chunk(3, dim=-1)  # each (B, M, D)
        q = self.split_heads(q)  # (B, h, N, d)
        k = self.split_heads(k)  # (B, h, M, d)
        v = self.split_heads(v)  # (B, h, M, d)
        if cache is not None:
            k, v = cache.append(k, v)  # M counts the earlier tokens, too
        N = q.shape[2]
        M = k.shape[2]
        mask = None  # which keys a query may see: all of them
        if self.causal and N > 1:  # one query alone is the last token, which may see all keys
            # The queries are the last N of M tokens: query i is token M - N + i, and sees the keys
            # up to there: tril(M - N) keeps the keys j <= M - N + i.
            mask = torch.ones(N, M, dtype=torch.bool, device=x.device).tril(M - N)

        # Both branches compute the same formula. The first is the faster one in bfloat16 on a CPU,
        # up to some 500 tokens.
        if return_weights or (q.dtype == torch.bfloat16 and q.device.type == "cpu" and M <= 512):
            q = q / math.sqrt(q.shape[3])
            scores = q @ k.transpose(-2, -1)  # q k^T / sqrt(d): (B, h, N, M)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = scores.softmax(dim=-1)  # a row: how much one query attends to each key
            y = weights @ v  # (B, h, N, d)
        else:
            y = self.fused(q, k, v, mask)

        y = y.transpose(1, 2).flatten(2)  # the heads side by side: (B, N, D)
        y = self.proj(y)  # Omega_c
        if return_weights:
            return y, weights
        return y

    def split_heads(self, x):
        """(B, N, D) -> (B, h, N, d): each head gets d of the D numbers of a token."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def fused(q, k, v, mask):
        """softmax(q k^T / sqrt(d)) v by PyTorch's fused kernel, which never stores the weights."""
        if mask is not None and q.shape[2] == k.shape[2]:  # the kernel knows the plain causal mask
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MLP(nn.Module):
    """(..., D) -> (..., D), each token by itself: D -> hidden -> D, `act` in between."""

    def __init__(self, dim, hidden, bias=True, act=F.gelu):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One Transformer layer, (B, N, D) -> (B, N, D).

    Pre-norm, all six models:          `post_norm`, the slide "Transformer Layer -- Complete":
        x = x + attention(norm(x))         x = norm(x + attention(x))
        x = x + mlp(norm(x))               x = norm(x + mlp(x))

    cross=True adds what the slides' decoder has in between: attention to `context` (B, M, D).
    To copy this, also copy: Attention, MLP, LayerNorm.
    """

    def __init__(self, dim, heads, mlp_ratio=4.0, bias=True, act=F.gelu, norm=LayerNorm,
                 causal=False, post_norm=False, cross=False):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = norm(dim)
        self.attn = Attention(dim, heads, bias=bias, causal=causal)
        if cross:
            self.norm_cross = norm(dim)
            self.cross_attn = Attention(dim, heads, bias=bias)
        self.norm2 = norm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), bias=bias, act=act)

    def forward(self, x, context=None, cache=None):
        if self.post_norm:  # as on the recap slide: first add, then normalize
            x = self.norm1(x + self.attn(x, cache=cache))
            if context is not None:
                x = self.norm_cross(x + self.cross_attn(x, context))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x), cache=cache)
        if context is not None:
            x = x + self.cross_attn(self.norm_cross(x), context)
        return x + self.mlp(self.norm2(x))


class Cache:
    """Keys and values of the tokens so far, for sampling: a new token then costs one row of
    attention, not a pass over all tokens. There is room for `length` tokens."""

    def __init__(self, length):
        self.length = length
        self.used = 0  # tokens so far
        self.k = None  # allocated at the first append
        self.v = None

    def append(self, k, v):
        """k, v (B, h, n, d) of n new tokens -> those of all tokens so far, (B, h, used, d)."""
        B, h, n, d = k.shape
        if self.used + n > self.length:
            raise ValueError(f"the cache has room for {self.length} tokens, not {self.used + n}")
        if self.k is None:
            self.k = k.new_empty(B, h, self.length, d)
            self.v = v.new_empty(B, h, self.length, d)
        self.k[:, :, self.used:self.used + n] = k
        self.v[:, :, self.used:self.used + n] = v
        self.used += n
        return self.k[:, :, :self.used], self.v[:, :, :self.used]


def patchify(images, P):
    """(B, C, H, W) -> (B, N, P*P*C), N = HW / P^2: patches in reading order, each (P, P, C)."""
    B, C, H, W = images.shape
    if H % P or W % P:
        raise ValueError(f"patches of {P} x {P} do not divide an image of {H} x {W}")
    x = images.reshape(B, C, H // P, P, W // P, P)  # (B, C, row, y, column, x)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, row, column, y, x, C)
    return x.reshape(B, -1, P * P * C)


def unpatchify(patches, P, rows=None):
    """(B, N, P*P*C) -> (B, C, H, W), patchify's inverse; a square grid unless `rows` is given."""
    rows = rows or math.isqrt(patches.shape[1])
    x = patches.unflatten(2, (P, P, -1)).unflatten(1, (rows, -1))  # (B, row, column, y, x, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, row, y, column, x)
    return x.flatten(4).flatten(2, 3)  # row and y, column and x become one: (B, C, H, W)


class PatchEmbed(nn.Module):
    """Patches from patchify, (B, N, P*P*C) -> tokens (B, N, D), by one trainable linear map.

    A Conv2d on the image with kernel = stride = P is the same map. Released files store its weight
    in that form, (D, C, P, P): so the Conv2d here holds the weight, and is never called.
    """

    def __init__(self, dim, patch_size, channels=3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, patches):
        weight = self.proj.weight.permute(0, 2, 3, 1)  # (D, P, P, C), the order of a patch
        return F.linear(patches, weight.flatten(1), self.proj.bias)


def sincos_2d(dim, rows, columns=None):
    """A position table of fixed waves, (rows * columns, D) float32, as in MAE, I-JEPA and SiT. The
    patch in row r and column c gets

        [sin(c omega) | cos(c omega) | sin(r omega) | cos(r omega)]

    omega: D/4 frequencies from fast to slow, omega_k = 10000^(-k / (D/4)). Near patches get similar
    vectors: the first half of a vector tells the column, the second half the row.
    """
    if dim % 4:
        raise ValueError(f"a sin-cos table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns or rows), indexing="ij")
    r = r.flatten()[:, None] * omega  # (N, D/4)
    c = c.flatten()[:, None] * omega  # (N, D/4)
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=1).float()


def gelu_tanh(x):
    """The GELU of Google's ViT and of SiT; it differs from the exact one by at most 4.8e-4:
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return F.gelu(x)  # in bfloat16 the difference hardly matters; this is 3 times as fast
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    """The GELU of Image GPT and CLIP, x * sigmoid(1.702 x): at most 0.021 from the exact one."""
    return F.silu(1.702 * x) / 1.702  # silu(z) = z * sigmoid(z), here with z = 1.702 x
