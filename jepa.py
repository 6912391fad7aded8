"""I-JEPA: "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
Assran et al. 2023, arXiv 2301.08243.

Predict what a part of the picture means, not how it looks. One encoder sees a context block; from
it a narrow predictor guesses the representations of four other blocks, as a second encoder gives
them that sees the whole picture. That one learns nothing itself: it is a slow average of the first.
Without this asymmetry both would agree on a constant: the representation would collapse.

    loss = mean smooth_l1(predictor(encoder(context), positions), norm(target_encoder(picture)))

    python jepa.py                                    # shapes, 3 minutes on two CPU cores
    python jepa.py --no-ema --no-stop-grad --out out/collapsed    # see it collapse
    python jepa.py --no-ema --sigreg 0.05 --out out/sigreg        # the newer cure, no slow average
    python jepa.py --masking multiblock --out out/multiblock      # the paper's; also block, raster
    python vit.py --init out/jepa/checkpoint.pt --out out/tuned   # fine-tune the target encoder

Default run: a linear probe on the patch mean reaches 0.668, on the last four layers 0.752 (the same
network untrained 0.302; raw pixels 0.322), kNN 0.499, in 2 min 11 s in all, on two bfloat16 CPU
cores, seed 0.

Differences from the paper:
1. Targets: not LayerNorm (`--no-centre`), but less what all pictures have at a place and what one
   picture has at all places, each dimension at variance 1. Of a young encoder, LayerNorm's targets
   are mostly position and ground colour: easy to predict, and they teach nothing about shapes.
2. `tiny` hides random patches, not four blocks (`--masking multiblock`, which all other sizes do):
   blocks teach less in a short run, probe 0.425. The blocks' sampler is a corrected one
   (`--sampler official` for theirs): any place, sizes and shapes drawn apart, surplus context
   dropped at random, where the released one never uses the last row and drops the bottom.
3. MAE's start, not N(0, .02): patches as large as positions. The average from 0.99 to 0.999, not
   from 0.996 to 1, a constant weight decay, gradients clipped at 1: steps are few.
"""

import argparse
import copy
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Block, LayerNorm, PatchEmbed, autocast, patchify, sincos_2d, unpatchify

SIZES = {  # B, L, H and g are the paper's; a predictor has the heads of its encoder
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4, predictor_dim=64, predictor_depth=2,
                 masking="random"),
    "T": dict(patch_size=4, dim=192, depth=12, heads=3, predictor_dim=384, predictor_depth=6),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6, predictor_dim=384, predictor_depth=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=6),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16, predictor_dim=384, predictor_depth=12),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16, predictor_dim=384, predictor_depth=12),
    "g": dict(patch_size=16, dim=1408, depth=40, heads=16, predictor_dim=384, predictor_depth=16,
              mlp_ratio=48 / 11),
}


class Encoder(nn.Module):
    """images (B, 3, H, H), normalised -> (B, N, D), or the n patches of context_idx: (B, n, D)."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim)

    def layers(self, images, context_idx=None):
        """What each block gives, each (B, n, D), and last the norm of the last one."""
        x, positions = patchify(images, self.patch_size), self.pos_embed
        if context_idx is not None:  # hidden patches never enter
            x, positions = take(x, context_idx), self.pos_embed[0][context_idx]
        x, out = self.patch_embed(x) + positions, []
        for block in self.blocks:
            out.append(x := block(x))
        return out + [self.norm(x)]

    def forward(self, images, context_idx=None):
        return self.layers(images, context_idx)[-1]


class Predictor(nn.Module):
    """z (B, n, D) at context_idx (B, n) -> what is at target_idx (B, K), K patches: (B, K, D)."""

    def __init__(self, grid=8, dim=128, predictor_dim=64, predictor_depth=2, predictor_heads=4,
                 mlp_ratio=4.0, out_dim=None):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, predictor_dim)  # narrow: it must not do the work
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.predictor_pos_embed = nn.Parameter(sincos_2d(predictor_dim, grid)[None],
                                                requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_dim, predictor_heads, mlp_ratio)
                                              for _ in range(predictor_depth))
        self.predictor_norm = LayerNorm(predictor_dim)
        self.predictor_proj = nn.Linear(predictor_dim, out_dim or dim)

    def forward(self, z, context_idx, target_idx):
        context = self.predictor_embed(z) + self.predictor_pos_embed[0][context_idx]
        queries = self.mask_token + self.predictor_pos_embed[0][target_idx]  # "what is there?"
        x = torch.cat([context, queries], dim=1)  # (B, n + K, predictor_dim)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -target_idx.shape[1]:]))


def take(x, index):
    """x (B, N, D), index (B, n) -> (B, n, D): the tokens index[b] of x[b]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class IJEPA(nn.Module):
    """`encoder`, `target_encoder`, `predictor`. target: what is predicted, the target encoder's
    "output" on the whole picture, on the block alone ("input"), or "pixels"."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 predictor_dim=64, predictor_depth=2, predictor_heads=None, target="output",
                 centre=False):
        super().__init__()
        self.target, self.centre = target, centre
        self.encoder = Encoder(image_size, patch_size, dim, depth, heads, mlp_ratio)
        self.predictor = Predictor(self.encoder.grid, dim, predictor_dim, predictor_depth,
                                   predictor_heads or heads, 4.0,
                                   3 * patch_size**2 if target == "pixels" else dim)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """MAE's: xavier for matrices, zero biases, N(0, .02) for the mask token. Patches start as
        large as positions, not with N(0, .02): a token has to tell what it shows, too."""
        for name, p in self.named_parameters():
            if p.ndim == 4:
                nn.init.normal_(p, std=(3 * self.encoder.patch_size**2) ** -0.5)
            elif p.ndim == 3 and p.requires_grad:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 2:
                nn.init.xavier_uniform_(p)
            elif p.ndim == 1:
                nn.init.constant_(p, "norm" in name and name.endswith("weight"))
        self.target_encoder.load_state_dict(self.encoder.state_dict())  # both start as one
        self.target_encoder.requires_grad_(False)

    def targets(self, images, target_idx, encoder=None):
        """images (B, 3, H, H), target_idx (M, B, K), M blocks -> what to predict, (M, B, K, D)."""
        encoder = encoder or self.target_encoder
        if self.target == "input":  # the ablation: it sees the block alone
            x = torch.stack([encoder(images, idx) for idx in target_idx])
            return F.layer_norm(x.to(images.dtype), x.shape[-1:])
        x = patchify(images, self.encoder.patch_size)
        if self.target == "output":
            x = encoder(images).to(images.dtype)  # (B, N, D): it sees the whole picture
            if self.centre:  # less what all pictures have at a place, one has at all places
                x = x - x.mean(0, keepdim=True) - x.mean(1, keepdim=True) + x.mean((0, 1))
                x = x / (x.std((0, 1)) + 1e-4)
            else:
                x = F.layer_norm(x, x.shape[-1:])  # without gain: a token's length tells nothing
        return torch.stack([take(x, idx) for idx in target_idx])

    def loss(self, images, context_idx, target_idx, stop_grad=True):
        """context_idx (B, n), target_idx (M, B, K), one row for each block
        -> (smooth L1, mean over blocks, tokens and D; the predictions (M, B, K, D))."""
        z = self.encoder(images, context_idx)  # (B, n, D)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_grad):
            target = self.targets(images, target_idx, None if stop_grad else self.encoder)
        M = len(target_idx)  # blocks do not see each other: they are so many rows of the batch
        pred = self.predictor(z.repeat(M, 1, 1), context_idx.repeat(M, 1), target_idx.flatten(0, 1))
        pred = pred.unflatten(0, (M, -1))  # (M, B, K, D)
        return F.smooth_l1_loss(pred.to(target.dtype), target), pred

    @torch.no_grad()
    def update_target(self, momentum):
        """target = momentum * target + (1 - momentum) * encoder, after each step."""
        for slow, fast in zip(self.target_encoder.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 1 - momentum)

    def features(self, images, last=1):
        """(B, 3, H, H) -> (B, D), mean of the target encoder's patches; last=4: of its last four
        layers side by side, (B, 4 D)."""
        layers = self.target_encoder.layers(images)
        layers = layers[-1:] if last == 1 else layers[-last - 1:-1]
        return torch.cat([x.mean(1) for x in layers], dim=1)

    @classmethod
    def from_pretrained(cls, path):
        """From the authors' .pth.tar, this script's files, or Hugging Face's encoder state dict,
        which fills both encoders and leaves the predictor untrained; else UserError."""
        content = data.load_checkpoint(path)
        own, args = content.get("script") == "jepa", content.get("args", {})
        with data.refuse(f"{path}: does not hold an I-JEPA"):
            parts = {part: content[part] for part in ("encoder", "predictor", "target_encoder")
                     if part in content} or dict.fromkeys(("encoder", "target_encoder"), content)
            state = content["model"] if own else {
                f"{part}.{k}": v for part in parts for k, v in in_our_names(parts[part]).items()}
            dim, _, _, patch_size = state["encoder.patch_embed.proj.weight"].shape
            count = lambda name: sum(k.startswith(name) and k.endswith("norm1.bias") for k in state)
            released = 16 if dim in (1280, 1408) else dim // 64
            model = cls(math.isqrt(state["encoder.pos_embed"].shape[1]) * patch_size, patch_size,
                        dim, count("encoder."), args.get("heads", released),
                        len(state["encoder.blocks.0.mlp.fc1.bias"]) / dim,
                        len(state.get("predictor.predictor_embed.bias", range(384))),
                        count("predictor."), None, args.get("target", "output"),
                        args.get("centre", False))
            if len(parts) == 2 and not own:  # Hugging Face's
                state |= {k: v for k, v in model.state_dict().items() if k.startswith("predictor.")}
            model.load_state_dict(state)
        return model


def in_our_names(content):
    """A state dict of the authors or of Hugging Face -> the same in timm's names, q k v as one."""
    names = {
        "module.": "", "ijepa.": "", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer.": "blocks.",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm.": "norm.",
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2"}
    state = {}
    for name, tensor in content.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    for name in [name for name in state if ".query." in name]:
        qkv = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(qkv)
    return {k: v for k, v in state.items() if not k.startswith("classifier")}


def blocks(B, n, count, scale, aspect):
    """(B, count, n*n) bool: rectangles in a grid of n x n patches, one size for the whole batch,
    area in `scale` of the grid, height / width in `aspect`, every place equally likely."""
    uniform = lambda low, high: low + (high - low) * torch.rand(()).item()
    area, ratio = n * n * uniform(*scale), uniform(*aspect)
    h, w = (min(n, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
    y, x = (torch.randint(n - side + 1, (B, count, 1)) for side in (h, w))
    i = torch.arange(n)
    rows, columns = (i >= y) & (i < y + h), (i >= x) & (i < x + w)  # (B, count, n)
    return (rows[..., :, None] & columns[..., None, :]).flatten(2)


def official_masks(B, n, args, step):
    """As sample_masks: the released sampler with its biases, and its random numbers in its order.

    One number sets area and aspect, from a generator seeded by the step; a block never fills a
    side nor lies at the last row or column; surplus context is cut off at its end, the bottom.
    """
    g, sides = torch.Generator().manual_seed(step), []
    scale = args.target_scale
    for low, high, a, b in ((scale, scale + 0.05, 0.75, 1.5), (0.85, 1, 1, 1)):
        u = torch.rand(1, generator=g).item()
        area, aspect = int(n * n * (low + u * (high - low))), a + u * (b - a)
        sides.append([min(n - 1, round(math.sqrt(area * r))) for r in (aspect, 1 / aspect)])

    def draw(h, w, shut=()):
        for trial in range(20 * len(shut) + 20):  # each 20 failures, one target is forgotten
            y, x = (int(torch.randint(max(1, n - side), (1,))) for side in (h, w))
            block = torch.zeros(n, n, dtype=torch.bool)
            block[y:y + h, x:x + w] = True
            for target in shut[:len(shut) - trial // 20]:
                block = block & ~target
            if block.sum() > args.min_keep:
                return block
        raise data.UserError(f"--sampler official: blocks of {h} x {w} in a grid of {n} x {n} keep "
                             f"no more than --min-keep {args.min_keep} patches")

    rows = []
    for _ in range(B):
        targets = [draw(*sides[0]) for _ in range(args.targets)]
        rows.append([m.flatten().nonzero()[:, 0] for m in (draw(*sides[1], targets), *targets)])
    shown = min(len(row[0]) for row in rows)
    return torch.stack([row[0][:shown] for row in rows]), torch.stack(
        [torch.stack(block) for block in list(zip(*rows))[1:]])


def sample_masks(B, n, args, step):
    """-> context_idx (B, n_c), target_idx (M, B, K), int64; no context patch is a target."""
    if args.sampler == "official":
        return official_masks(B, n, args, step)
    scale, aspect = (args.target_scale, args.target_scale + 0.05), (0.75, 1.5)
    for _ in range(50):
        if args.masking == "multiblock":
            targets = blocks(B, n, args.targets, scale, aspect)
            context = blocks(B, n, 1, (0.85, 1), (1, 1))[:, 0] & ~targets.any(1)
        elif args.masking == "raster":  # three quarters of the picture from the first
            half = torch.arange(n) >= n // 2
            quarter = (2 * half[:, None] + half).flatten() == torch.arange(4)[:, None]
            context, targets = quarter[0].expand(B, -1), quarter[1:].expand(B, -1, -1)
        else:  # one large block, or random patches, from all the rest
            targets = blocks(B, n, 1, (0.55, 0.65), aspect) if args.masking == "block" else \
                (torch.rand(B, n * n).argsort(1).argsort(1) < 0.6 * n * n)[:, None]
            context = ~targets[:, 0]
        if (shown := int(context.sum(1).min())) >= args.min_keep:
            # As many for each picture: a random choice of its context.
            context_idx = (context.float() + torch.rand(B, n * n)).topk(shown, dim=1).indices
            return context_idx.sort(1).values, torch.stack(
                [t.nonzero()[:, 1].reshape(B, -1) for t in targets.unbind(1)])
    raise data.UserError(f"--targets {args.targets} of --target-scale {args.target_scale} leave "
                         f"fewer than --min-keep {args.min_keep} of {n} x {n} patches as context; "
                         "use fewer or smaller ones")


def sigreg(features, directions=256):
    """SIGReg (LeJEPA, 2511.08544), a cure of collapse: features (n, D) should look Gaussian from
    every side: Epps and Pulley's distance of n projections to N(0, 1), over random directions."""
    w = F.normalize(torch.randn(features.shape[1], directions, device=features.device), dim=0)
    t = torch.linspace(0, 3, 17, device=features.device)
    x = (features.float() @ w)[:, :, None] * t  # (n, directions, 17)
    gauss = (-t.square() / 2).exp()
    distance = (x.cos().mean(0) - gauss).square() + x.sin().mean(0).square()
    return 2 * len(features) * torch.trapezoid(distance * gauss, t, dim=1).mean()


@torch.no_grad()
def collapse(model, dataset, amp, n=500):
    """Of pooled target features: feature_std, the mean deviation per dimension after L2
    normalisation (1 / sqrt(D) if spread evenly, 0 if collapsed), and effective_rank, exp of the
    entropy of the singular values (from 1 to D)."""
    x = data.extract(model.features, dataset, dataset.test_images[:n], amp)
    values = torch.linalg.svdvals(x - x.mean(0))
    share = values / values.sum().clamp(min=1e-12)
    return dict(feature_std=F.normalize(x, dim=1).std(0).mean().item(),
                effective_rank=torch.special.entr(share).sum().exp().item())


@torch.no_grad()
def draw(model, dataset, out, args, amp):
    """masks.png: picture | context | the target blocks. collapse.svg: the log. predictions.png:
    picture | context | in the place of each target, the real patch whose target representation is
    nearest to the prediction | the same for the true representation, the best that could be."""
    images, P, n = dataset.normalise(dataset.test_images[:8]), args.patch_size, model.encoder.grid
    torch.manual_seed(args.seed)
    context_idx, target_idx = (i.to(images.device) for i in sample_masks(len(images), n, args, 0))
    pictures = dataset.denormalise(images)
    x = patchify(pictures, P)  # (8, N, P*P*3)
    grey = lambda idx: torch.full_like(x, 0.5).scatter(
        1, idx[:, :, None].expand(-1, -1, 3 * P * P), take(x, idx))
    context = grey(context_idx)  # all but the context grey
    panels = [pictures, unpatchify(context, P)] + [unpatchify(grey(idx), P) for idx in target_idx]
    data.save_png(out / "masks.png", torch.stack(panels, 1).flatten(0, 1), columns=len(panels))
    files = ["masks.png"] if args.load else ["masks.png", "collapse.svg"]
    if not args.load:
        curves = {}
        for folder in [out, *map(pathlib.Path, args.compare)]:
            with data.refuse(f"{folder / 'log.csv'}: not the whole log of a run"):
                log = data.read_log(folder / "log.csv")
                for key in ("effective_rank", "feature_std"):
                    share = [value / max(log[key][0], 1e-9) for value in log[key]]
                    curves[f"{folder.name}: {key.replace('_', ' ')}"] = zip(log["step"], share)
        data.save_chart(out / "collapse.svg", curves, "step", "share of the first value")
    if model.target != "output":
        return files
    bank = torch.cat([images, dataset.normalise(dataset.train_images[:500])])
    with amp:
        every = torch.arange(n * n, device=images.device).expand(1, len(bank), -1)
        truth, keys = model.targets(bank, every)[0].float().tensor_split([8])  # (8 and 500, N, D)
        _, predicted = model.loss(images, context_idx, target_idx)
    patches, panels = patchify(dataset.denormalise(bank[8:]), P).flatten(0, 1), panels[:2]
    for guess in (predicted.float(), [take(truth, idx) for idx in target_idx]):
        filled = context
        for idx, z in zip(target_idx, guess):
            nearest = torch.cdist(z.flatten(0, 1), keys.flatten(0, 1)).argmin(1)
            index = idx[:, :, None].expand(-1, -1, filled.shape[2])
            filled = filled.scatter(1, index, patches[nearest].reshape(index.shape))
        panels.append(unpatchify(filled, P))
    data.save_png(out / "predictions.png", torch.stack(panels, 1).flatten(0, 1), columns=8)
    return files + ["predictions.png"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "jepa", SIZES, steps=1200, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--weight-decay", 0.05, "of matrices, at first", type=number(float, 0, 10))
    parser.add("--last-weight-decay", 0.05, "of matrices, at the end", type=number(float, 0, 10))
    parser.add("--augment", "light", "light: shift, flip", choices=["none", "light"])
    parser.add("--masking", None, "context and targets; random for tiny, else multiblock",
               choices=["multiblock", "block", "random", "raster"])
    parser.add("--sampler", "corrected", "of multiblock; official: as released, with its biases",
               choices=["corrected", "official"])
    parser.add("--targets", 4, "of multiblock: number of targets", type=number(int, 1, 16))
    parser.add("--target-scale", 0.15, "of multiblock: a block's share, or up to 0.05 more",
               type=number(float, 0.01, 0.9))
    parser.add("--min-keep", 4, "least number of context patches", type=number(int, 1, 10000))
    parser.add("--target", "output", "what to predict: the target encoder's output on the whole "
               "picture, on the block alone, pixels", choices=["output", "input", "pixels"])
    parser.add("--centre", True, "targets less what places and pictures share; else LayerNorm",
               action=argparse.BooleanOptionalAction)
    parser.add("--ema", 0.99, "momentum of the average, at first", type=number(float, 0, 1))
    parser.add("--last-ema", 0.999, "and at the end", type=number(float, 0, 1))
    parser.add("--no-ema", False, "target encoder: the encoder as it is", action="store_true")
    parser.add("--no-stop-grad", False, "gradients through the targets, too", action="store_true")
    parser.add("--sigreg", 0.0, "weight of SIGReg", type=number(float, 0, 100))
    parser.add("--compare", [], "folders of other runs, for collapse.svg", nargs="+")
    for name, what in (("dim", "width"), ("depth", "layers")):
        parser.add(f"--predictor-{name}", None, f"{what} of the predictor, else the size's",
                   type=number(int, 1, 65536))
    args = data.parse(parser, "jepa", SIZES, argv)
    args.masking = args.masking or "multiblock"
    for folder in args.compare:
        if not (pathlib.Path(folder) / "log.csv").is_file():
            raise data.UserError(f"--compare {folder}: not the --out folder of a run of jepa.py")
    if args.sampler == "official" and args.masking != "multiblock":
        raise data.UserError("--sampler official goes with --masking multiblock")
    if args.predictor_dim % 4 or args.predictor_dim % args.heads:
        raise data.UserError(f"--predictor-dim {args.predictor_dim} must be a multiple of 4 and of "
                             f"--heads {args.heads}")
    return args


def schedule(step, args):
    """Learning rate: linear warm-up, then half a cosine down to zero. Weight decay: half a cosine
    from first to last. Momentum of the average: linear from first to last."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    rate = args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))
    part = step / args.steps
    decay = args.last_weight_decay + (args.weight_decay - args.last_weight_decay) * 0.5 * (
        1 + math.cos(math.pi * part))
    return rate, decay, 0 if args.no_ema else args.ema + part * (args.last_ema - args.ema)


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load:
        model = IJEPA.from_pretrained(args.load)
        args.steps, args.patch_size = 0, model.encoder.patch_size
        args.image_size = model.encoder.grid * args.patch_size
    dataset = data.open_data(args, device)
    n = args.image_size // args.patch_size
    for step in range(20):  # settings that can't be met end here
        sample_masks(2, n, args, step)
    torch.manual_seed(args.seed)
    if not args.load:
        model = IJEPA(args.image_size, args.patch_size, args.dim, args.depth, args.heads,
                      getattr(args, "mlp_ratio", 4.0), args.predictor_dim, args.predictor_depth,
                      None, args.target, args.centre)
    model.to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in weights if (p.ndim > 1) == decays], decays=decays)
              for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    start, scores = data.resume(args, "jepa", model=model, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="jepa", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate, decay, momentum = schedule(step, args)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay * group["decays"]
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed)
        x = dataset.train_images[index.to(device)]
        x = dataset.normalise(x if args.augment == "none" else data.augment(x))
        context_idx, target_idx = (i.to(device) for i in sample_masks(len(x), n, args, step))
        with amp:
            loss, _ = loss_function(x, context_idx, target_idx, not args.no_stop_grad)
            if args.sigreg:
                loss = loss + args.sigreg * sigreg(model.encoder(x).mean(1))
        optimizer.zero_grad()
        loss.backward()
        steps.check(step, loss, nn.utils.clip_grad_norm_(weights, 1.0))
        optimizer.step()
        model.update_target(momentum)
        scores = dict(loss=steps.loss, seconds=steps.seconds(), images_seen=(step + 1) * len(x))
        if step % 50 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=steps.loss,
                     lr=rate, **collapse(model, dataset, amp))
        if steps.due(step):
            save(step + 1)

    model.eval()
    scores |= collapse(model, dataset, amp)
    untrained = copy.deepcopy(model)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    scores["probe_last_four"] = data.linear_probe(
        *data.both_sets(lambda x: model.features(x, 4), dataset, amp))
    files = draw(model, dataset, out, args, amp)
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
