"""Representation alignment (REPA): "Training Diffusion Transformers Is Easier Than You Think",
Yu et al. 2024, arXiv 2410.06940; its diffusion Transformer is SiT, Ma et al. 2024, 2401.08740.

Diffusion in short, as the lecture covers it later. Mix a picture with noise, more and more:

    path      x_t = (1 - t) picture + t noise     from t = 0, the picture, to t = 1, noise alone
    velocity  d x_t / d t = noise - picture       the way x_t goes when t grows
    sampler   take fresh noise at t = 1, go back along the velocity, arrive at a new picture

On the way back nobody knows the picture: a network v guesses noise - picture from x_t, t and the
class. To guess well it must know what x_t shows, and such features are slow to learn. REPA takes
them from a model that has them; the slide: "training representation to reconstruct representation
of existing model". The tokens h of an early block, which sees the noisy x_t, are trained to point
where the tokens of a frozen teacher point, which sees the clean picture:

    loss = mean (v(x_t, t, class) - (noise - picture))^2 - 0.5 mean cos(projector(h), teacher)

    python repa.py                                     # shapes at 16 x 16, 3 minutes, two CPU cores
    python repa.py --align 0 --out out/plain           # plain SiT; then --compare its checkpoint
    python repa.py --teacher out/jepa/checkpoint.pt    # or vit, mae, DINOv2

Default run: Frechet distance 9.3 (Gaussian pixels 315.5, training pictures 0.4); probe 0.407
(untrained 0.120, raw pixels 0.329); 2 min 42 s on two bfloat16 CPU cores, seed 0.

Differences from the paper:
1. Pixels of 16 x 16, not the latents of a VAE; the projector is 2 D wide, not 2048.
2. The default teacher is a small ViT trained on the labels for seconds, not DINOv2.
3. Time and class start larger than N(0, .02), else in minutes the blocks hardly hear of them.
4. Rate 8e-3 with warm-up and decay, not 1e-4; EMA 0.995, not 0.9999; `--times lognormal`.
"""

import argparse
import copy
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from common import (MLP, Attention, Block, LayerNorm, PatchEmbed, autocast, gelu_tanh, patchify,
                    resize_table, sincos_2d, unpatchify)

SIZES = {  # S to XL are the paper's
    "tiny": dict(image_size=16, patch_size=2, dim=128, depth=4, heads=4, align_depth=2,
                 projector_dim=256),
    "S": dict(patch_size=2, dim=384, depth=12, heads=6, align_depth=4, projector_dim=2048),
    "B": dict(patch_size=2, dim=768, depth=12, heads=12, align_depth=4, projector_dim=2048),
    "L": dict(patch_size=2, dim=1024, depth=24, heads=16, align_depth=8, projector_dim=2048),
    "XL": dict(patch_size=2, dim=1152, depth=28, heads=16, align_depth=8, projector_dim=2048),
}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean, deviation
# LayerNorm without gamma and beta: adaLN computes these from time and class
norm = lambda dim: nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def mix(t, path="linear"):
    """The path x_t = a picture + s noise, from picture (t = 0) to noise (t = 1) -> a, s and their
    derivatives by t, so that velocity = a' picture + s' noise."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    angle, rate = t * (math.pi / 2), math.pi / 2
    return angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos()


class TimeEmbed(nn.Module):
    """t (B,) in 0..1 -> (B, D): cosines and sines of it, 128 frequencies from 1 down to 1e-4."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        k = torch.arange(128, dtype=t.dtype, device=t.device)
        angle = t[:, None] * torch.exp(-math.log(10000) / 128 * k)  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class SiTBlock(nn.Module):
    """A pre-norm layer, x (B, N, D), steered by c (B, D): adaLN-Zero. Shift and scale stand for
    LayerNorm's beta and gamma; the gates start at zero, so each block starts as the identity."""

    def __init__(self, dim, heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.attn = norm(dim), Attention(dim, heads)
        self.norm2, self.mlp = norm(dim), MLP(dim, int(dim * mlp_ratio), act=gelu_tanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.adaLN_modulation(c)[:, None].chunk(6, dim=-1))  # each (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> the velocity of each patch (B, N, P*P*C)."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final, self.linear = norm(dim), nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SiT(nn.Module):
    """x_t (B, C, H, H), t (B,) in 0..1, classes y (B,) -> velocity (B, C, H, H); t = 1 is noise.

    `teacher_dim`: width of the tokens to align with; 0: no projector, plain SiT.
    `sit_time`: the weights learned SiT's time, in which t = 0 is noise."""

    def __init__(self, image_size=16, patch_size=2, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 num_classes=10, channels=3, align_depth=2, teacher_dim=128, projector_dim=256,
                 path="linear", sit_time=False):
        super().__init__()
        self.patch_size, self.grid, self.channels = patch_size, image_size // patch_size, channels
        self.align_depth, self.path, self.sit_time = align_depth, path, sit_time
        self.null = num_classes
        self.x_embedder = PatchEmbed(dim, patch_size, channels)
        self.t_embedder = TimeEmbed(dim)
        table = nn.Embedding(num_classes + 1, dim)  # the last row: the null class, "any picture"
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, dim), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size**2 * channels)
        self.projectors = nn.ModuleList(nn.Sequential(  # a list: the authors allow many teachers
            nn.Linear(dim, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim),
            nn.SiLU(), nn.Linear(projector_dim, teacher_dim)) for _ in range(teacher_dim > 0))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The authors': xavier, zero biases; zero gates and output: the first velocity is 0. But
        time and class start larger: N(0, .02) there, in the table and in the maps of t."""
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.5)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: it is filled
        nn.init.zeros_(self.x_embedder.proj.bias)
        for module in self.modules():  # the projectors last: nothing else depends on them
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight), nn.init.zeros_(module.bias)
        for module in [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]:
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed[0] = sincos_2d(self.pos_embed.shape[2], self.grid)

    def layers(self, x, t, y, stop=None):
        """-> what each block hands on, depth times (B, N, D), and the velocity; the blocks after
        number `stop` are left out, and then so is the velocity."""
        t = 1 - t if self.sit_time else t
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (B, D)
        x, out = self.x_embedder(patchify(x, self.patch_size)) + self.pos_embed, []  # (B, N, D)
        for block in self.blocks[:stop]:
            out.append(x := block(x, c))
        if stop:
            return out, None
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        return out, -v if self.sit_time else v

    def forward(self, x, t, y):
        return self.layers(x, t, y)[1]

    def loss(self, images, y, z=None, align=0.5, label_dropout=0.1, times="uniform"):
        """images (B, C, H, H), classes y (B,), the teacher's tokens z (B, N, Z) or None
        -> (velocity loss - align * alignment, dict(velocity=, alignment=))."""
        y = torch.where(torch.rand(y.shape, device=y.device) < label_dropout, self.null, y)
        noise = torch.randn_like(images)
        if times == "uniform":
            t = torch.rand_like(images[:, 0, 0, 0])  # (B,)
        else:  # more often in the middle: noise to picture as exp(N(0, 1))
            odds = torch.randn_like(images[:, 0, 0, 0]).exp()
            t = odds / (1 + odds) if self.path == "linear" else 2 / math.pi * odds.atan()
        a, s, da, ds = mix(t[:, None, None, None], self.path)
        layers, v = self.layers(a * images + s * noise, t, y)
        loss = (v.to(images.dtype) - (da * images + ds * noise)).square().mean()
        out = dict(velocity=loss.detach())
        if z is not None:
            h = self.projectors[0](layers[self.align_depth - 1]).to(images.dtype)  # (B, N, Z)
            h, z = (F.normalize(tokens, dim=-1) for tokens in (h, z.to(images.dtype)))
            cosine = (h * z).sum(-1).mean()  # over pictures and patches
            loss, out["alignment"] = loss - align * cosine, cosine.detach()
        return loss, out

    def features(self, images, layer=None):
        """(B, C, H, H) -> (B, D): mean of the aligned (or another) block's tokens at t = 0.5,
        half picture and half noise, for the null class: labels don't leak into the probe."""
        t = torch.full((len(images),), 0.5, device=images.device, dtype=images.dtype)
        a, s, _, _ = mix(t[0], self.path)
        layers, _ = self.layers(a * images + s * torch.randn_like(images), t,
                                torch.full_like(t, self.null, dtype=torch.long),
                                layer or self.align_depth)
        return layers[-1].mean(1)

    @classmethod
    def from_pretrained(cls, path, sit_time=None):
        """From this script's file, REPA's last.pt or training file, or SiT-XL-2-256.pt; EMA weights
        if there are any. sit_time=None finds out: in SiT's files time runs the other way, and they
        predict a variance, too, which is dropped, as their authors do. Else UserError."""
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the training files
            content = data.load_checkpoint(path)
        with data.refuse(f"{path}: does not hold a SiT"):
            own = content["args"] if content.get("script") == "repa" else {}
            state = content.get("ema") or content.get("model") or content
            state = {k.removeprefix("module."): v for k, v in state.items()
                     if "projectors." not in k or "projectors.0." in k}  # of the first teacher
            dim, C, P, _ = state["x_embedder.proj.weight"].shape
            depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
            sigma = len(state["final_layer.linear.bias"]) == 2 * P * P * C
            if sigma:  # rows (P, P, 2C): the first C are the velocity
                for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
                    state[key] = state[key].unflatten(0, (P * P, 2 * C))[:, :C].flatten(0, 1)
            last = state.get("projectors.0.4.weight", torch.empty(0, 0))
            model = cls(math.isqrt(state["pos_embed"].shape[1]) * P, P, dim, depth,
                        own.get("heads") or (16 if dim == 1152 else dim // 64),
                        len(state["blocks.0.mlp.fc1.bias"]) / dim,
                        len(state["y_embedder.embedding_table.weight"]) - 1, C,
                        own.get("align_depth") or (8 if depth > 12 else min(4, depth)), *last.shape,
                        own.get("path", "linear"), sigma if sit_time is None else sit_time)
            model.load_state_dict(state)
        return model


@torch.no_grad()
def sample(model, noise, y, steps=50, method="euler", cfg=1.0, interval=(0, 1), generator=None):
    """noise (B, C, H, H), classes y (B,) -> pictures (B, C, H, H), by going from t = 1 to 0.

    euler: follow the velocity. heun: average it over each step, at twice the cost. sde: add fresh
    noise of strength w = 2t, and undo it on average by the score, d log p(x_t) / d x.
    cfg > 1, classifier-free guidance: exaggerate what the class adds, at times in `interval`."""
    exact = torch.float32 if noise.device.type == "mps" else torch.float64
    x, null = noise.to(exact), torch.full_like(y, model.null)

    def direction(x, t, guided):
        both, labels = (torch.cat([x, x]), torch.cat([y, null])) if guided else (x, y)
        time = torch.full((len(both),), t, dtype=noise.dtype, device=noise.device)
        v = model(both.to(noise.dtype), time, labels).to(exact)
        if method == "sde":
            a, s, da, ds = mix(torch.tensor(t, dtype=exact), model.path)
            score = (a / da * v - both) / (s * s - a / da * ds * s)
            v = v - t * score  # half of w, times the score
        if guided:
            of_class, of_any = v.chunk(2)
            v = of_any + cfg * (of_class - of_any)
        return v

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    if method == "sde":  # near 0 the score is steep: the last step is long, and without noise
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    for i, (t, following) in enumerate(zip(times, times[1:])):
        guided, dt = cfg > 1 and interval[0] <= t <= interval[1], following - t
        v = direction(x, t, guided)
        if method == "heun" and i + 1 < steps:
            v = (v + direction(x + dt * v, following, guided)) / 2
        x = x + dt * v
        if method == "sde" and i + 1 < steps:
            x = x + math.sqrt(2 * t * -dt) * torch.randn(x.shape, generator=generator, dtype=exact,
                                                         device=x.device)
    return x.to(noise.dtype)


class Teacher(nn.Module):
    """A frozen ViT encoder: images (B, 3, H, H), normalised -> patch tokens (B, N, D)."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 class_token=False, act=F.gelu):
        super().__init__()
        self.patch_size, self.dim, grid = patch_size, dim, image_size // patch_size
        self.imagenet = False  # ImageNet's mean and deviation (timm's own: 0.5), or the data set's
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, class_token + grid**2, dim))
        self.pos_embed.data[0, int(class_token):] = sincos_2d(dim, grid)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, act=act) for _ in range(depth))
        self.norm = LayerNorm(dim)

    def forward(self, images):
        P, extra = self.patch_size, int(self.cls_token is not None)
        rows, columns = images.shape[2] // P, images.shape[3] // P
        # REPA stretches DINOv2's table as timm does; torch.hub's code differs by about 1 %.
        table = resize_table(self.pos_embed, rows, columns, extra)
        x = self.patch_embed(patchify(images, P)) + table[:, extra:]
        if extra:
            token = (self.cls_token + table[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([token, x], dim=1)  # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -rows * columns:]

    @torch.no_grad()
    def look(self, dataset, images, grid, amp):
        """uint8 pictures (B, 3, H, H) -> unit tokens (B, grid * grid, D) float16: they are rescaled
        so that there are as many patches as the student has."""
        mean, std = IMAGENET.to(images.device) if self.imagenet else (dataset.mean, dataset.std)
        x = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
        if x.shape[2] != (side := grid * self.patch_size):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=side < x.shape[2])
        with amp:
            x = self(x)
        return F.normalize(x.float(), dim=-1).half()

    @classmethod
    def from_pretrained(cls, path):
        """This repository's vit, mae or jepa checkpoint, or a release of DINOv2, timm, MAE or
        I-JEPA (target encoder); else UserError."""
        content = data.load_checkpoint(path)
        with data.refuse(f"{path}: does not hold a ViT encoder"):
            state = content.get("target_encoder", content.get("model", content))
            if content.get("script") == "jepa":
                state = {k[15:]: v for k, v in state.items() if k.startswith("target_encoder.")}
            skip = ("decoder_", "mask_token", "encoder_mask_token", "head.", "pre_logits")
            state = {k.removeprefix("module."): v for k, v in state.items()
                     if not k.startswith(skip)}
            for key in [k for k in state if k.endswith(".gamma")]:  # DINOv2's scale of a branch:
                name = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
                gamma = state.pop(key)  # the same as scaling its last map
                state[f"{name}.weight"] = gamma[:, None] * state[f"{name}.weight"]
                state[f"{name}.bias"] = gamma * state[f"{name}.bias"]
            own = content["args"] if "script" in content else {}
            dim, _, P, _ = state["patch_embed.proj.weight"].shape
            extra = "cls_token" in state
            teacher = cls(math.isqrt(state["pos_embed"].shape[1] - extra) * P, P, dim,
                          1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
                          own.get("heads") or (16 if dim in (1280, 1408) else dim // 64),
                          len(state["blocks.0.mlp.fc1.bias"]) / dim, extra,
                          gelu_tanh if own.get("tanh_gelu") else F.gelu)
            teacher.load_state_dict(state)
            teacher.imagenet = not own
        return teacher.eval().requires_grad_(False)


def train_teacher(dataset, args, amp, steps):
    """A small ViT that learns the classes with the mean of its patch tokens; no diffusion in it."""
    torch.manual_seed(args.seed)
    images, labels = dataset.train_images, dataset.train_labels
    teacher = Teacher(args.image_size, args.patch_size)
    head = nn.Linear(teacher.dim, len(dataset.class_names))
    model = nn.ModuleList([teacher, head]).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(1, steps))
    for step in tqdm(range(steps), desc="teacher"):
        torch.manual_seed(args.seed * 1_000_003 + step)
        index = data.batch_index(len(labels), 64, step, args.seed).to(images.device)
        with amp:
            tokens = teacher(dataset.normalise(data.augment(images[index])))  # (B, N, D)
            loss = F.cross_entropy(head(tokens.mean(1)).float(), labels[index])
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return teacher


def pick_teacher(args, dataset, amp, out):
    """The file of --teacher; else a network that is trained here first, for "random" not at all,
    and kept for --resume. None if nothing is to be aligned."""
    if args.teacher in (None, "random") and (args.align or args.teacher):
        steps, began = 0 if args.teacher else args.teacher_steps, time.time()
        print(f"teacher: a small ViT, trained for {steps} steps with the pictures' labels")
        state = train_teacher(dataset, args, amp, steps).state_dict()
        args.teacher, args.teacher_seconds = str(out / "teacher.pt"), time.time() - began
        data.save_checkpoint(args.teacher, script="teacher", model=state, args=dict(heads=4))
    return args.teacher and Teacher.from_pretrained(args.teacher).to(dataset.train_images.device)


@torch.no_grad()
def generate(model, dataset, labels, args, amp, cfg=1.0):
    """Classes (n,) -> pictures (n, 3, H, H) uint8, the same ones for the same seed."""
    g = torch.Generator(labels.device).manual_seed(args.seed)
    side, parts = model.grid * model.patch_size, []
    for y in labels.split(100):
        noise = torch.randn(len(y), 3, side, side, generator=g, device=y.device)
        with amp:
            x = sample(model, noise, y, args.sample_steps, args.sampler, cfg, args.interval, g)
        parts.append((dataset.denormalise(x) * 255).round().byte())
    return torch.cat(parts)


def frechet(x, y):
    """Distance of the Gaussians fitted to features x (n, D) and y (m, D), in float64:
    |m1 - m2|^2 + trace(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))."""
    x, y = x.cpu().double(), y.cpu().double()
    S1, S2 = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(S1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S2 @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + S1.trace() + S2.trace() - 2 * cross).item()


def measure(model, dataset, args, amp):
    """-> velocity: the loss on 500 test pictures, mean of 8 fixed times, with fixed noise. frechet:
    distance of --samples own pictures to as many test pictures of the same classes, in the features
    of a small CNN, never the teacher's; _floor: of training pictures instead; _ceiling: of Gaussian
    pixels that have the training set's mean and deviation in each channel."""
    fixed, losses = torch.Generator().manual_seed(0), []
    x, y = dataset.normalise(dataset.test_images[:500]), dataset.test_labels[:500]
    noise = torch.randn(x.shape, generator=fixed).to(x.device)
    for t in torch.linspace(1 / 16, 15 / 16, 8, device=x.device):
        a, s, da, ds = mix(t, model.path)
        with amp, torch.no_grad():
            v = model(a * x + s * noise, t.expand(len(x)), y)
        losses.append((v.float() - (da * x + ds * noise)).square().mean().item())
    cnn, n = data.train_cnn(dataset, args.seed), min(args.samples, len(dataset.test_labels))
    real, labels = dataset.test_images[:n], dataset.test_labels[:n]
    noise = dataset.denormalise(torch.randn(real.shape, generator=fixed).to(real.device))
    scores, fp32 = {"velocity": sum(losses) / 8}, torch.autocast(x.device.type, enabled=False)
    for key, images in (("frechet", generate(model, dataset, labels, args, amp)),
                        ("frechet_floor", dataset.train_images[:n]),
                        ("frechet_ceiling", (noise * 255).round().byte())):
        scores[key] = frechet(*(data.extract(cnn.features, dataset, x, fp32)
                                for x in (images, real)))
    return scores


def probe_by_block(model, dataset, amp, training=4000, held=1000):
    """The paper's curve: accuracy of a linear probe on each block on `held` training pictures."""
    n = min(training + held, len(dataset.train_images))
    cut, y, curve = n - n * held // (training + held), dataset.train_labels, []
    for block in range(1, len(model.blocks) + 1):
        f = data.extract(lambda x: model.features(x, block), dataset, dataset.train_images[:n], amp)
        curve.append((block, data.linear_probe(f[:cut], y[:cut], f[cut:], y[cut:n])))
    return curve


def draw(model, dataset, out, args, amp):
    """samples.png, one class a column; the training's curves; the probe by block."""
    labels = dataset.train_labels.unique()[:10].repeat(8)
    images = generate(model, dataset, labels, args, amp, args.cfg)
    data.save_png(out / "samples.png", images, columns=len(labels) // 8)
    with data.refuse(f"--compare {args.compare}: not a model of such pictures"):
        other = args.compare and SiT.from_pretrained(args.compare).to(labels.device)
        curves = {name: probe_by_block(m, dataset, amp)
                  for name, m in (("this run", model), ("--compare", other)) if m}
    data.save_chart(out / "blocks.svg", curves, "block", "linear probe at t = 0.5")
    if args.load:
        return ["samples.png", "blocks.svg"]
    with data.refuse(f"{out / 'log.csv'}: not the whole log of a run"):
        log = data.read_log(out / "log.csv")
        data.save_chart(out / "training.svg", {
            name: zip(log["step"], log[name]) for name in ("velocity", "alignment")}, "step",
            "velocity loss; alignment: mean cosine")
    return ["samples.png", "blocks.svg", "training.svg"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "repa", SIZES, steps=1100, batch_size=64, lr=8e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--align", 0.5, "weight of the alignment; 0: plain SiT", type=number(float, 0, 100))
    parser.add("--align-until", None, "step at which alignment ends", type=number(int, 1))
    parser.add("--align-depth", None, "the aligned block, else the size's", type=number(int, 1))
    parser.add("--projector-dim", None, "its width, else the size's", type=number(int, 1, 65536))
    parser.add("--teacher", None, "a vit, mae, jepa, DINOv2, timm file, or random")
    parser.add("--teacher-steps", 300, "if it has to be trained first", type=number(int, 1))
    parser.add("--path", "linear", "from picture to noise", choices=["linear", "cosine"])
    parser.add("--times", "lognormal", "how training draws t", choices=["uniform", "lognormal"])
    parser.add("--label-dropout", 0.1, "share of null labels", type=number(float, 0, 1))
    parser.add("--ema", 0.995, "decay of the averaged weights", type=number(float, 0, 1))
    parser.add("--sampler", "heun", "from noise to picture", choices=["euler", "heun", "sde"])
    parser.add("--sample-steps", 15, "of the sampler", type=number(int, 1))
    parser.add("--samples", 1000, "pictures for the Frechet distance", type=number(int, 2))
    parser.add("--cfg", 2.0, "guidance of samples.png; 1: none", type=number(float, 1, 100))
    parser.add("--interval", [0.0, 1.0], "times with guidance", type=number(float, 0, 1), nargs=2)
    parser.add("--compare", None, "another run's checkpoint in the chart of blocks")
    args = data.parse(parser, "repa", SIZES, argv)
    if args.align_depth > args.depth:
        raise data.UserError(f"--align-depth {args.align_depth}: there are {args.depth} blocks")
    return args


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load:
        model = SiT.from_pretrained(args.load)
        args.steps, args.patch_size = 0, model.patch_size
        args.image_size = model.grid * model.patch_size
    dataset = data.open_data(args, device)
    teacher, K = None, len(dataset.class_names)
    if args.load and (model.channels != 3 or model.null != K):
        raise data.UserError(f"{args.load}: makes {model.channels} channels of {model.null} "
                             f"classes; to score it takes 3 and {K}")
    if not args.load:
        teacher = pick_teacher(args, dataset, amp, out)
        model = SiT(args.image_size, args.patch_size, args.dim, args.depth, args.heads, 4.0, K, 3,
                    args.align_depth, teacher.dim if teacher else 0, args.projector_dim, args.path)
        torch.manual_seed(args.seed)
        model.init_weights()  # once more: so the trunk does not depend on the projector
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  betas=(0.9, 0.999), weight_decay=0, fused=device.type != "mps")
    start, scores = data.resume(args, "repa", model=model, ema=ema, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="repa", model=model.state_dict(),
                             ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    seen = teacher and torch.cat([teacher.look(dataset, x, model.grid, amp) for x in
                                  dataset.train_images.split(100)])  # once and for all epochs
    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        i = data.batch_index(len(dataset.train_labels), args.batch_size, step, args.seed).to(device)
        x, y = dataset.train_images[i], dataset.train_labels[i]
        z = seen[i] if args.align and step < (args.align_until or args.steps) else None
        with amp:
            loss, parts = loss_function(dataset.normalise(x), y, z, args.align,
                                        args.label_dropout, args.times)
        optimizer.zero_grad()
        loss.backward()
        steps.check(step, loss, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        with torch.no_grad():  # the average follows closely at first, then at --ema
            for slow, fast in zip(ema.parameters(), model.parameters()):
                slow.lerp_(fast, 1 - min(args.ema, (1 + step) / (10 + step)))
        scores = dict(loss=steps.loss, seconds=steps.seconds(), images_seen=(step + 1) * len(x))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=steps.loss,
                     velocity=parts["velocity"], alignment=parts.get("alignment", math.nan),
                     lr=rate)
        if steps.due(step):
            save(step + 1)

    scores |= measure(ema, dataset, args, amp)
    scores["teacher_seconds"] = getattr(args, "teacher_seconds", 0.0)
    untrained = copy.deepcopy(ema)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, ema.features, untrained.features, amp)
    files = draw(ema, dataset, out, args, amp)
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
