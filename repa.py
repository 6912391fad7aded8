"""Representation alignment (REPA): "... Easier Than You Think", Yu et al. 2024, arXiv 2410.06940.

Diffusion in short: x_t = (1 - t) image + t noise is the image at t = 0 and pure noise at t = 1; its
velocity is (noise - image). A network v (here SiT, arXiv 2401.08740) learns to guess this from x_t,
t and the class. A new image: begin with noise, and repeat x = x - step * v, from t = 1 to t = 0.
(Not in one step: many images fit one x_t, and v learns the mean of their velocities.)
To guess well, v must find out what x_t shows. REPA helps: a projector maps each token h after an
early block to a vector that should point in the same direction as a frozen teacher's token for the
same patch. The gradient trains the blocks up to h, too: they must find out what the teacher knows.

    loss = mean (v(x_t, t, class) - (noise - image))^2 - w mean cos(projector(h), teacher(image))

    python repa.py                                    # the default data set, "shapes", at 16 x 16
    python repa.py --align 0 --out out/plain          # plain SiT
    python repa.py --teacher out/jepa/checkpoint.pt   # or a vit, mae or DINOv2 file

Default run, seed 0, 5:20 minutes on two cores: Frechet distance 9.8 (lower is better; noise 315).

Differences from the paper (in brackets its numbers):
1. For a CPU: 16 x 16 pixels, no VAE; a projector of width 256 (2048); a ViT with labels as teacher.
2. For a short run: times mostly near 0.5 (uniform); a warm-up and a cosine from the learning rate
   8e-3 (1e-4, constant); AdamW's second beta 0.95 (0.999); the alignment's weight w = 1 (0.5);
   averages of decay 0.995 (0.9999); 15 Heun steps (SDE, 250); and `start_larger`.
"""

import copy
import functools
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from common import MLP, Attention, Block, LayerNorm, PatchEmbed
from common import gelu_tanh, patchify, sincos_2d, unpatchify
from data import UserError

# --------------------------------------------------------------------------------------- the model


class TimeEmbed(nn.Module):
    """t (B,) in 0..1 -> (B, D): cos(f t), sin(f t) for 128 frequencies f from 1 to 0.0001; MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, dim),
            nn.SiLU(),
            nn.Linear(dim, dim))

    def forward(self, t):
        # t is at most 1, as in SiT (in DiT 1000): so no angle is larger than 1 radian (57 degrees).
        k = torch.arange(128, dtype=t.dtype, device=t.device)
        frequency = torch.exp(-math.log(10000) / 128 * k)  # 10000^(-k / 128): (128,)
        angle = t[:, None] * frequency  # (B, 128)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, 256)
        return self.mlp(waves)


class SiTBlock(nn.Module):
    """A pre-norm Transformer layer for x (B, N, D), controlled by c (B, D), the sum of the time's
    and the class's embedding.

    For attention and MLP each, c gives shift and 1 + scale, in place of LayerNorm's beta and gamma,
    and a gate, by which the branch's output is multiplied before it is added. Gates start at zero
    (SiT.init_weights): at first, a block changes nothing. All this is DiT's adaLN-Zero (Peebles
    and Xie 2022, arXiv 2212.09748).
    To copy this, also copy: Attention, MLP, gelu_tanh.
    """

    def __init__(self, dim, heads, mlp_ratio=4.0):
        super().__init__()
        # elementwise_affine=False: without gamma and beta, which adaLN computes from c.
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act=gelu_tanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        c = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = c.chunk(6, dim=-1)  # each (B, 1, D)
        branch = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(branch)
        branch = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(branch)


class FinalLayer(nn.Module):
    """Tokens x (B, N, D), c (B, D) -> the velocity of each patch, (B, N, P*P*C)."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)  # as in SiTBlock
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        c = self.adaLN_modulation(c)[:, None]  # (B, 1, 2 D)
        shift, scale = c.chunk(2, dim=-1)  # each (B, 1, D)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SiT(nn.Module):
    """x_t (B, C, H, H), t (B,) in 0..1, classes y (B,) -> velocity (B, C, H, H); t = 1 is noise.

    align_depth: which block is aligned, from 1. teacher_dim: the width Z of the teacher's tokens;
    0: plain SiT. sit_time: True for released SiT weights, whose time runs from noise to image.
    To copy this, also copy: TimeEmbed, SiTBlock, FinalLayer, draw_times, Attention, MLP, gelu_tanh,
    PatchEmbed, patchify, unpatchify, sincos_2d.
    """

    def __init__(self, image_size=16, patch_size=2, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 num_classes=10, channels=3, align_depth=2, teacher_dim=128, projector_dim=256,
                 sit_time=False):
        super().__init__()
        if not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth {align_depth}: there are {depth} blocks")
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.channels = channels
        self.align_depth = align_depth
        self.sit_time = sit_time
        self.null = num_classes  # one more class, "any image"
        N = self.grid**2

        self.x_embedder = PatchEmbed(dim, patch_size, channels)
        self.t_embedder = TimeEmbed(dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, N, dim), requires_grad=False)  # fixed
        self.blocks = nn.ModuleList(SiTBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size**2 * channels)
        self.init_weights()
        self.projector = None
        if teacher_dim > 0:  # made last: so with the same seed, all other weights are plain SiT's
            self.projector = nn.Sequential(
                nn.Linear(dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, teacher_dim))
            for linear in self.projector[::2]:  # the three Linear layers
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def init_weights(self):
        """The authors' initialization: Xavier for every matrix, zero biases, normal with std 0.02
        for time and class. adaLN and output start at zero, so the first velocity is 0. Then
        `start_larger` replaces what time and class got (difference 2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # proj.weight has a convolution's shape, (D, C, P, P), from which Xavier would count D P P
        # outputs. flatten gives a view of it, the matrix (D, C P P): so this fills proj.weight.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed[0] = sincos_2d(self.pos_embed.shape[2], self.grid)
        self.start_larger()  # without this line, all weights start as the authors' do

    def start_larger(self):
        """Difference 2. c, the sum of time and class, reaches a block as W silu(c), with the matrix
        W of adaLN_modulation. W starts at zero, and AdamW changes each of its numbers by about the
        learning rate in a step, however small the gradient. So W silu(c) grows fast only if c is
        large: with std 0.02, the blocks would learn late what time it is, and which class.
        Frechet distance, seeds 0, 1, 2: 9.9, 8.1, 11.2; without this method 10.8, 8.6, 12.3."""
        nn.init.xavier_uniform_(self.t_embedder.mlp[0].weight)
        nn.init.xavier_uniform_(self.t_embedder.mlp[2].weight)
        nn.init.normal_(self.class_embed.weight, std=0.5)

    def embed(self, x, t, y):
        """-> the tokens (B, N, D) of x_t, and c (B, D), which tells the blocks time and class."""
        side = self.grid * self.patch_size
        if x.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(x.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        x = self.x_embedder(patchify(x, self.patch_size))
        x = x + self.pos_embed
        c = self.t_embedder(t) + self.class_embed(y)
        return x, c

    def forward(self, x, t, y, return_tokens=False):
        """return_tokens: returns (velocity, the tokens h after the aligned block (B, N, D))."""
        sign = 1
        if self.sit_time:  # released SiT files: time runs the other way, so the velocity does, too
            t = 1 - t
            sign = -1
        x, c = self.embed(x, t, y)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == self.align_depth:
                h = x  # what the loss aligns
        x = self.final_layer(x, c)  # (B, N, P*P*C)
        velocity = sign * unpatchify(x, self.patch_size)
        if return_tokens:
            return velocity, h
        return velocity

    def loss(self, images, y, z=None, align=0.5, label_dropout=0.1, times="uniform"):
        """images (B, C, H, H), classes y (B,), the teacher's tokens z (B, N, Z); z=None: plain SiT.
        Returns (loss, out): out["velocity"] is the velocity's error, out["alignment"] the mean
        cosine, if there is a z."""
        # Some labels become the null class, "any image": guided_velocity needs its velocity, too.
        is_dropped = torch.rand(y.shape, device=y.device) < label_dropout
        y = torch.where(is_dropped, self.null, y)

        # Diffusion: go to a point between image and noise, and guess the velocity there.
        noise = torch.randn_like(images)
        if times == "uniform":
            t = torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)
        elif times == "lognormal":
            t = draw_times(images)
        else:
            raise ValueError(f"times must be uniform or lognormal, not {times}")
        x_t = (1 - t) * images + t * noise
        target = noise - images  # the velocity: the derivative of x_t by t
        pred, h = self(x_t, t.flatten(), y, return_tokens=True)  # (B, C, H, H), (B, N, D)
        loss = (pred.to(images.dtype) - target).square().mean()
        out = dict(velocity=loss.detach())

        # Alignment: each token h, computed from x_t, is to point in the direction of the teacher's
        # token for the same patch, computed from the clean image.
        if z is not None:
            h = self.projector(h).to(images.dtype)  # (B, N, Z), float32 also under autocast
            h = F.normalize(h, dim=-1)
            z = z.to(images.dtype)
            z = F.normalize(z, dim=-1)  # teacher_tokens gives unit vectors already; others may not
            cosine = (h * z).sum(dim=-1)  # (B, N), of each patch with the same patch
            loss = loss - align * cosine.mean()
            out["alignment"] = cosine.mean().detach()
        return loss, out

    def features(self, images, layer=None):
        """(B, C, H, H) -> (B, D): mean of the tokens after the aligned block, or block `layer`, at
        t = 0.5, so half noise, and with the null class: a label must not help the probe."""
        B = len(images)
        t = torch.full((B,), 0.5, dtype=images.dtype, device=images.device)
        y = torch.full((B,), self.null, device=images.device)
        noise = torch.randn_like(images)
        x_t = 0.5 * images + 0.5 * noise  # forward's 1 - t for sit_time is not needed: it is 0.5
        x, c = self.embed(x_t, t, y)
        last = layer or self.align_depth
        for block in self.blocks[:last]:
            x = block(x, c)
        return x.mean(dim=1)

    @classmethod
    def from_pretrained(cls, path, heads=None, sit_time=None):
        """Reads this script's file, REPA's last.pt, a checkpoint of REPA's train.py, or SiT's
        SiT-XL-2-256.pt; else UserError. Averaged weights are taken if the file has them.
        sit_time=None: True for SiT's releases, False for all other files. (The last layer of SiT's
        releases has twice as many outputs, as DiT's: half of them predict a variance, and are left
        out here.)
        heads=None: as in the file; for released files, as in the paper's model of this width."""
        with data.errors_become(f"{path}: does not hold a SiT"):
            state, sizes = data.read_sit(path, heads=heads, sit_time=sit_time)
            model = cls(**sizes)
            model.load_state_dict(state)
        return model


def draw_times(images):
    """Times (B, 1, 1, 1) that are not uniform, but more often near 0.5 than near 0 or 1: t is the
    sigmoid of n ~ N(0, 1). (The authors call this option lognormal, as t / (1 - t) is exp(n).)"""
    n = torch.randn(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)
    odds = n.exp()
    return odds / (1 + odds)  # the sigmoid of n


# -------------------------------------------------------------------------------------- the sampler


def guided_velocity(model, x, t, y, cfg, dtype):
    """The velocity at x (B, C, H, H) and time t, a float. dtype: the model's; x may be float64.

    cfg > 1 is classifier-free guidance: from velocity(any image), go cfg times the way to
    velocity(class). cfg = 1 ends exactly there, cfg = 2 goes twice as far."""
    t = torch.full((len(y),), t, dtype=dtype, device=y.device)  # (B,)
    if cfg <= 1:
        return model(x.to(dtype), t, y).to(x.dtype)
    null = torch.full_like(y, model.null)
    labels = torch.cat([y, null])  # (2 B,): both velocities in one pass
    x_twice = torch.cat([x, x]).to(dtype)
    v = model(x_twice, t.repeat(2), labels).to(x.dtype)
    of_class, of_any = v.chunk(2)  # each (B, C, H, H)
    return of_any + cfg * (of_class - of_any)


@torch.no_grad()
def sample(model, noise, y, steps=50, method="euler", cfg=1.0, interval=(0, 1), generator=None):
    """noise (B, C, H, H), classes y (B,) -> images (B, C, H, H), by going from t = 1 to t = 0.

    euler: each step follows the velocity at its start. heun: each step but the last follows the
    mean of this velocity and that where Euler's step would end, at nearly twice the cost. cfg:
    guidance, in steps that start at a time in `interval`.
    `generator` is not used: it is here so that sample and sample_sde are called in the same way.
    To copy this, also copy: guided_velocity.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method must be euler or heun, not {method}")
    # Many small steps are added up: in float64, where the device has it.
    x = noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        t = times[i]
        dt = times[i + 1] - t  # negative: from noise to image
        strength = 1.0  # no guidance
        if interval[0] <= t <= interval[1]:
            strength = cfg
        v = guided_velocity(model, x, t, y, cfg=strength, dtype=noise.dtype)
        if method == "heun" and i + 1 < steps:  # the last step, to t = 0, is Euler's, as in REPA
            end = x + dt * v  # where Euler's step would arrive
            v_end = guided_velocity(model, end, times[i + 1], y, cfg=strength, dtype=noise.dtype)
            v = (v + v_end) / 2
        x = x + dt * v
    return x.to(noise.dtype)


@torch.no_grad()
def sample_sde(model, noise, y, steps=50, cfg=1.0, interval=(0, 1), generator=None):
    """As `sample`, but each step removes twice as much of the noise in x, and then (except in the
    last step) adds fresh noise. This can correct errors of earlier steps, but needs more steps.

    To copy this, also copy: guided_velocity.
    """
    # The velocity tells which noise n is in x:
    #     x = (1 - t) image + t n  and  v = n - image  give  n = x + (1 - t) v.
    # A step of `sample` is dt v = dt n - dt image, with dt < 0: it adds |dt| image, and leaves
    # (t - |dt|) n of the noise t n. Here a step is dt (v + n): it adds |dt| image, too, but leaves
    # (t - 2 |dt|) n. Fresh noise brings the variance of the noise back to that of `sample`:
    # (t - |dt|)^2 - (t - 2 |dt|)^2 is 2 t |dt|, but for the small dt^2.
    # (The network's v is a mean over many images and noises, and so is n. That x is nevertheless
    # distributed as with `sample`, if steps are small, is proved in Song et al. 2021, arXiv
    # 2011.13456. Their "score" is -n / t here.)
    # Many small steps are added up: in float64, where the device has it.
    x = noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)

    # As in REPA's code, the last step goes from 0.04 to 0, and it alone adds no noise. (It leaves
    # -0.04 n, which is hardly visible.)
    times = torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist() + [0.0]
    for i in range(steps):
        t = times[i]
        dt = times[i + 1] - t  # negative: from noise to image
        strength = 1.0  # no guidance
        if interval[0] <= t <= interval[1]:
            strength = cfg
        v = guided_velocity(model, x, t, y, cfg=strength, dtype=noise.dtype)
        n = x + (1 - t) * v
        x = x + dt * (v + n)
        if i + 1 < steps:
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            std = math.sqrt(2 * t * -dt)
            x = x + std * fresh
    return x.to(noise.dtype)


# -------------------------------------------------------------------------------------- the teacher


class Teacher(nn.Module):
    """A ViT encoder: images (B, 3, H, W), normalized -> patch tokens (B, N, D). A class token, if
    the weights have one, is used inside, and not returned.

    To copy this, also copy: Block, Attention, MLP, LayerNorm, PatchEmbed, patchify, sincos_2d,
    gelu_tanh, data.resize_table.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 class_token=False, tanh_gelu=False):
        super().__init__()
        self.patch_size = patch_size
        self.dim = dim
        self.extra = 1 if class_token else 0  # tokens before those of the patches
        # How its images are normalized: from_pretrained sets it; None: as those of the data set.
        self.mean = None
        self.std = None
        self.patch_embed = PatchEmbed(dim, patch_size)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        grid = image_size // patch_size
        table = torch.zeros(1, self.extra + grid**2, dim)
        table[0, self.extra:] = sincos_2d(dim, grid)
        self.pos_embed = nn.Parameter(table)
        act = gelu_tanh if tanh_gelu else F.gelu
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, act=act) for _ in range(depth))
        self.norm = LayerNorm(dim)

    def forward(self, images):
        _, _, H, W = images.shape
        P = self.patch_size
        # For other sizes the table is interpolated as in timm, which REPA uses. DINOv2's own code
        # (torch.hub) does it in another way: its tokens differ by about 1 %.
        table = data.resize_table(self.pos_embed, H // P, W // P, extra=self.extra)
        x = self.patch_embed(patchify(images, P))
        x = x + table[:, self.extra:]
        if self.extra:
            cls_token = self.cls_token + table[:, :1]
            cls_token = cls_token.expand(len(x), -1, -1)
            x = torch.cat([cls_token, x], dim=1)  # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, self.extra:]  # the patches alone

    @classmethod
    def from_pretrained(cls, path, heads=None):
        """Frozen, from this repository's vit, mae, jepa or teacher checkpoint, or a release of
        DINOv2, timm, MAE or I-JEPA (target encoder); else UserError."""
        with data.errors_become(f"{path}: does not hold a ViT encoder"):
            state, sizes = data.read_encoder(path, heads=heads, head=False)
            teacher = cls(**sizes)
            data.load_weights(teacher, state)
            teacher.mean, teacher.std = data.statistics(path)
        return teacher.eval().requires_grad_(False)


@torch.no_grad()
def teacher_tokens(teacher, dataset, images, grid, amp):
    """uint8 images (n, 3, H, H) -> unit tokens (n, grid * grid, Z) float16.

    Images are rescaled so that the teacher has as many patches as the student, grid * grid.
    To copy this, also copy: data.normalize.
    """
    mean = dataset.mean if teacher.mean is None else teacher.mean
    std = dataset.std if teacher.std is None else teacher.std
    side = grid * teacher.patch_size  # for DINOv2, 14 times the student's grid
    parts = []
    for x in images.split(100):  # at most (100, 3, H, H)
        x = data.normalize(x, mean, std)
        if x.shape[2] != side:
            is_smaller = side < x.shape[2]  # only then does it need antialias
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=is_smaller)
        with amp:
            x = teacher(x)
        x = F.normalize(x.float(), dim=-1)
        parts.append(x.half())  # all tokens of a data set stay in memory
    return torch.cat(parts)


def train_teacher(args, dataset, amp):
    """A small ViT that learns the classes from the mean of its tokens; no diffusion in it."""
    print(f"teacher: a small ViT, trained for {args.teacher_steps} steps with the images' labels")
    device = dataset.mean.device
    torch.manual_seed(args.seed)
    teacher = Teacher(args.image_size, args.patch_size)
    head = nn.Linear(teacher.dim, len(dataset.class_names))  # only for this training
    model = nn.ModuleList([teacher, head]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = args.teacher_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="teacher"):
        torch.manual_seed(args.seed * 1_000_003 + step)  # as in train
        index = data.batch_index(len(dataset.train_images), 64, step, args.seed)
        index = index.to(device)
        images = data.augment(dataset.train_images[index])
        images = dataset.normalize(images)
        with amp:
            tokens = teacher(images)  # (B, N, D)
            logits = head(tokens.mean(dim=1))  # (B, K)
            loss = F.cross_entropy(logits.float(), dataset.train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher


def pick_teacher(args, dataset, amp, out):
    """The frozen teacher; None with --align 0 and no --teacher. (--align 0 with a --teacher
    checks the code: the model gets a projector that nothing uses, so it must equal plain SiT.)"""
    path = out / "teacher.pt"  # beside checkpoint.pt, so that --resume finds it
    # With --resume, a run goes on if there is its checkpoint.pt, else it begins anew.
    is_kept = args.resume and path.exists() and (out / "checkpoint.pt").exists()
    if args.teacher is None and args.align == 0:
        return None
    elif args.teacher == "random":  # a control: a ViT that is not trained
        torch.manual_seed(args.seed)
        teacher = Teacher(args.image_size, args.patch_size)
    elif args.teacher is not None:  # a file
        teacher = Teacher.from_pretrained(args.teacher)
    elif is_kept:  # the run goes on: with the teacher that its first part trained
        teacher = Teacher.from_pretrained(path)
    else:
        began = time.time()
        teacher = train_teacher(args, dataset, amp)
        args.teacher_seconds = time.time() - began
        data.save_checkpoint(path, script="teacher", model=teacher.state_dict(),
                             args=dict(heads=4))  # Teacher's default; the weights do not show it
    return teacher.to(dataset.mean.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------ scores and pictures


def generate(model, dataset, labels, args, amp, cfg=1.0):
    """Classes (n,) -> images (n, 3, H, H) uint8, the same ones for the same seed.
    To copy this, also copy: guided_velocity, sample, sample_sde.
    """
    generator = torch.Generator(labels.device).manual_seed(args.seed)
    side = model.grid * model.patch_size
    options = dict(steps=args.sample_steps, cfg=cfg, interval=args.interval, generator=generator)
    parts = []
    for y in labels.split(100):  # a part at a time, for the memory of the device
        noise = torch.randn(len(y), 3, side, side, generator=generator, device=y.device)
        with amp:
            if args.sampler == "sde":
                images = sample_sde(model, noise, y, **options)
            else:
                images = sample(model, noise, y, method=args.sampler, **options)
        images = dataset.denormalize(images) * 255  # from 0 to 255: denormalize clamps
        parts.append(images.round().byte())
    return torch.cat(parts)


@torch.no_grad()
def velocity_error(model, dataset, amp):
    """The velocity loss on 500 test images: the mean of 8 fixed times, with fixed noise."""
    images = dataset.normalize(dataset.test_images[:500])
    y = dataset.test_labels[:500]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    errors = []
    for t in torch.linspace(1 / 16, 15 / 16, 8, device=images.device):  # 1/16, 3/16, ...
        x_t = (1 - t) * images + t * noise
        velocity = noise - images
        with amp:
            pred = model(x_t, t.expand(len(images)), y)
        error = (pred.float() - velocity).square().mean()
        errors.append(error.item())
    return sum(errors) / len(errors)


def frechet_scores(model, dataset, args, amp):
    """Frechet distances (data.frechet) to the first --samples test images: how much mean and
    covariance of a small CNN's features differ. (The CNN is not the teacher, to favor no model.)
    frechet: of new images of the same classes. frechet_floor: of training images.
    frechet_ceiling: of Gaussian pixels with the mean and std of the training images, clamped."""
    cnn = data.train_cnn(dataset, args.seed)
    fp32 = torch.autocast(dataset.mean.device.type, enabled=False)

    def features(images):
        return data.extract(cnn.features, dataset, images, fp32)

    n = min(args.samples, len(dataset.test_labels))
    real = features(dataset.test_images[:n])
    made = generate(model, dataset, labels=dataset.test_labels[:n], args=args, amp=amp)
    torch.manual_seed(args.seed)
    noise = dataset.denormalize(torch.randn(made.shape).to(made.device)) * 255
    return dict(
        frechet=data.frechet(features(made), real),
        frechet_floor=data.frechet(features(dataset.train_images[:n]), real),
        frechet_ceiling=data.frechet(features(noise.round().byte()), real),
    )


def probe_by_block(model, dataset, amp):
    """The paper's curve, [(block, accuracy of a linear probe)]. The probe is trained on four fifths
    of at most 5000 training images, and tested on the last fifth. (Test images are kept for
    the final scores. The default teacher has learned the labels of that fifth, too. This hardly
    matters: on test images, accuracies were at most 0.014 higher or lower, seeds 1, 2.)
    To copy this, also copy: data.extract, data.linear_probe, data.accuracy, data.fit,
    data.standardize.
    """
    images = dataset.train_images[:5000]
    y = dataset.train_labels[:5000]
    split = len(y) - len(y) // 5  # the first image that the probe does not learn from
    curve = []
    for block in range(1, len(model.blocks) + 1):
        features = functools.partial(model.features, layer=block)
        x = data.extract(features, dataset, images, amp)
        accuracy = data.linear_probe(x[:split], y[:split], x[split:], y[split:])
        curve.append((block, accuracy))
    return curve


def draw_samples(model, dataset, out, args, amp):
    """New images, one class a column, with the guidance --cfg."""
    classes = dataset.train_labels.unique()[:10]
    labels = classes.repeat(8)
    images = generate(model, dataset, labels=labels, args=args, amp=amp, cfg=args.cfg)
    data.save_png(out / "samples.png", images, columns=len(classes))
    return ["samples.png"]


def draw_probes(model, other, dataset, out, amp):
    """How well each block's features tell the class, here and in the model of --compare, if any."""
    curves = {"this run": probe_by_block(model, dataset, amp)}
    if other is not None:
        curves["--compare"] = probe_by_block(other, dataset, amp)
    data.save_chart(out / "blocks.svg", curves, "block", "linear probe at t = 0.5")
    return ["blocks.svg"]


def draw_training(out):
    """The two parts of the loss over the steps of the training, from log.csv."""
    data.compare_logs(out / "training.svg", [out], ["velocity", "alignment"], x="step",
                      xlabel="step", ylabel="velocity loss; alignment: mean cosine")
    return ["training.svg"]


# ---------------------------------------------------------------------------------------- training

SIZES = {  # B, L and XL are REPA's, S is SiT's (on latents there, on pixels here)
    "tiny": dict(image_size=16, patch_size=2, dim=128, depth=4, heads=4,
                 align_depth=2, projector_dim=256),
    "S": dict(patch_size=2, dim=384, depth=12, heads=6, align_depth=4, projector_dim=2048),
    "B": dict(patch_size=2, dim=768, depth=12, heads=12, align_depth=4, projector_dim=2048),
    "L": dict(patch_size=2, dim=1024, depth=24, heads=16, align_depth=8, projector_dim=2048),
    "XL": dict(patch_size=2, dim=1152, depth=28, heads=16, align_depth=8, projector_dim=2048),
}


def parse_args(argv=None):
    count = data.number(int, 1, 10**9)
    share = data.number(float, 0, 1)
    parser = data.Parser(__doc__)
    data.common_options(parser, "repa", SIZES, steps=1100, batch_size=64, lr=8e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=data.number(int, 0))
    parser.add("--align", 1.0, "The weight w of the alignment in the loss; with 0, the model is "
               "SiT, without alignment.",
               type=data.number(float, 0, 100))
    parser.add("--align-until", None, "The step at which the alignment ends.", type=count)
    parser.add("--align-depth", None, "The aligned block, if not that of --size.", type=count)
    parser.add("--projector-dim", None, "The projector's width, if not that of --size.",
               type=data.number(int, 1, 65536))
    parser.add("--teacher", None, "The teacher's file (vit, mae, jepa, DINOv2, timm), or random: "
               "an untrained ViT. Without --teacher, a small ViT is trained first, if --align > 0.")
    parser.add("--teacher-steps", 300, "The training steps of the small ViT that is the teacher if "
               "there is no --teacher.", type=count)
    parser.add("--times", "lognormal", "How training draws the times; uniform: from 0 to 1, as in "
               "the paper; lognormal: more often near 0.5.",
               choices=["uniform", "lognormal"])
    parser.add("--label-dropout", 0.1, "The share of null labels in training; 1: no labels at all. "
               "With 0, the null class is not trained, but guidance and probes need it.",
               type=share)
    parser.add("--ema", 0.995, "The decay of the averaged weights, which are scored. It grows from "
               "0.1 up to this.", type=share)
    parser.add("--sampler", "heun", "How noise becomes an image; euler: one velocity a step; heun: "
               "the mean of two; sde: with fresh noise in each step.",
               choices=["euler", "heun", "sde"])
    parser.add("--sample-steps", 15, "The number of steps of the sampler.", type=count)
    parser.add("--samples", 1000, "The number of images for the Frechet distance, at most that of "
               "the test images.", type=data.number(int, 2))
    parser.add("--cfg", 2.0, "The guidance of the images in samples.png, a stronger pull to the "
               "class; 1 is none.",
               type=data.number(float, 1, 100))
    parser.add("--interval", [0.0, 1.0], "Guidance is used at the times between these two (0 is "
               "the image, 1 noise).", type=share, nargs=2)
    parser.add("--compare", None, "A checkpoint whose probes are drawn beside those of this run.")
    args = data.parse(parser, "repa", SIZES, argv)  # fills in what --size tells
    if args.align_depth > args.depth:
        raise UserError(f"--align-depth {args.align_depth}: there are {args.depth} blocks")
    if args.interval[0] > args.interval[1]:
        raise UserError("--interval: the first time must be the smaller one")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build(args, teacher_dim):
    """A new model with the sizes in the options; teacher_dim=0: without a projector. class_names
    are put into args by open_data."""
    return SiT(image_size=args.image_size, patch_size=args.patch_size,
               dim=args.dim, depth=args.depth, heads=args.heads,
               num_classes=len(args.class_names), align_depth=args.align_depth,
               teacher_dim=teacher_dim, projector_dim=args.projector_dim)


@torch.no_grad()
def update_average(ema, model, step, limit):
    """Each averaged weight a follows the trained one w: a = decay * a + (1 - decay) * w. As the
    weights change most at first, the decay grows with the step, from 0.1 up to `limit`."""
    decay = min(limit, (1 + step) / (10 + step))
    for a, w in zip(ema.parameters(), model.parameters()):
        a.lerp_(w, 1 - decay)


@torch.no_grad()
def use_null_class(model):
    """After a training without labels only the null class is known: every class becomes this."""
    null = model.class_embed.weight[model.null].clone()
    model.class_embed.weight[:] = null


def check_fit(model, dataset, path):
    """UserError if the model makes other images than the data set's: no score would make sense."""
    K = len(dataset.class_names)
    if model.channels != 3 or model.null != K:  # the null class comes after the K others
        raise UserError(f"{path}: makes images of {model.channels} channels and {model.null} "
                        f"classes; to be scored, they must be 3 and {K}")
    side = model.grid * model.patch_size
    if side != dataset.image_size:
        raise UserError(f"{path}: makes images of {side} x {side} pixels, not "
                        f"{dataset.image_size} x {dataset.image_size}")


def read_compared(args, dataset):
    """The model of --compare, or None. It is read before the training: a mistake shows at once."""
    if args.compare is None:
        return None
    model = SiT.from_pretrained(args.compare)
    check_fit(model, dataset, args.compare)
    return model.to(dataset.mean.device)


def train(args):
    """Trains a model, scores it, draws the pictures; returns the scores. --load: no training."""
    # Set-up: device, data, teacher, model, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    if args.load:
        model = SiT.from_pretrained(args.load)
        args.steps = 0  # the loop below is left out
        args.patch_size = model.patch_size
        args.image_size = model.grid * model.patch_size
    dataset = data.open_data(args, device)
    compared = read_compared(args, dataset)
    if args.load:
        check_fit(model, dataset, args.load)
    else:
        teacher = pick_teacher(args, dataset, amp, out)
        torch.manual_seed(args.seed)
        model = build(args, teacher_dim=teacher.dim if teacher else 0)
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)  # the average of the weights over the steps
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type != "mps")
    start, scores = data.resume(args, "repa", model=model, ema=ema, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss
    if not args.load and args.align > 0:  # the teacher is asked once, for all epochs
        all_z = teacher_tokens(teacher, dataset, dataset.train_images, grid=model.grid, amp=amp)

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="repa", model=model.state_dict(),
                             ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    # Training.
    progress = data.Progress(args, start, scores)
    for step in progress:
        # Each step of each run has its own seed: a resumed run goes on exactly as without a stop.
        torch.manual_seed(args.seed * 1_000_003 + step)
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed)
        index = index.to(device)
        images = dataset.normalize(dataset.train_images[index])
        z = None
        if args.align > 0 and (args.align_until is None or step < args.align_until):
            z = all_z[index]  # (B, N, Z)
        with amp:
            loss, parts = loss_function(images, dataset.train_labels[index], z, align=args.align,
                                        label_dropout=args.label_dropout, times=args.times)
        optimizer.zero_grad()
        loss.backward()
        # One bad batch can give a huge gradient: scale all gradients down if their norm exceeds 1.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.check(step, loss, norm)  # waits for both numbers; not finite: the run ends
        optimizer.step()
        update_average(ema, model, step, limit=args.ema)
        scores = progress.scores(images_seen=(step + 1) * len(images))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=scores["loss"],
                     velocity=parts["velocity"], alignment=parts.get("alignment", math.nan), lr=lr)
        if progress.due(step):
            save(step + 1, scores)

    # Scores and pictures of `ema`, the averaged weights; training.svg is about `model`.
    if args.label_dropout == 1:
        use_null_class(ema)
    scores["velocity"] = velocity_error(ema, dataset, amp)
    scores |= frechet_scores(ema, dataset, args, amp)
    scores["teacher_seconds"] = getattr(args, "teacher_seconds", 0.0)
    untrained = data.untrained(ema, args.seed)  # a copy with new weights, for comparison
    scores |= data.probe_scores(dataset, ema.features, untrained.features, amp)
    files = draw_samples(ema, dataset, out, args=args, amp=amp)
    files += draw_probes(ema, compared, dataset, out=out, amp=amp)
    if not args.load:
        files += draw_training(out)
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
