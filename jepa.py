"""I-JEPA: "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
Assran et al. 2023, arXiv 2301.08243.

Predict what a part of the picture means, not how it looks. One encoder sees a context block; from
it a narrow predictor guesses the representations of four other blocks, as a second encoder gives
them that sees the whole picture. That one learns nothing itself: it is a slow average of the first.
Without this asymmetry both would agree on a constant: the representation would collapse.

    loss = mean smooth_l1(predictor(encoder(context), positions), norm(target_encoder(picture)))

    python jepa.py                                    # shapes, 3 minutes on a laptop
    python jepa.py --no-ema                           # see it collapse; also --no-stop-grad
    python jepa.py --no-ema --sigreg 0.05             # the newer cure, without a slow average
    python jepa.py --masking random                   # the paper's table of masks
    python vit.py --init out/jepa/checkpoint.pt       # fine-tune the target encoder with labels

Differences from the paper:
1. A corrected block sampler: sizes and shapes are drawn apart, every place is possible, surplus
   context is dropped at random. The released one never uses the last row, and drops the bottom.
2. Targets are centred per position over the batch (`--no-centre`): the sin-cos table makes the
   targets of a young encoder mostly positional, and position is what the predictor is told.
3. Constant weight decay, a faster average (from 0.98), gradients clipped at 1: runs are short.
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

SIZES = {  # predictors are 384 wide; the heads of the predictor are those of the encoder
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4, predictor_dim=64, predictor_depth=2),
    "T": dict(patch_size=4, dim=192, depth=12, heads=3, predictor_dim=384, predictor_depth=6),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6, predictor_dim=384, predictor_depth=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=6),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16, predictor_dim=384, predictor_depth=12),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16, predictor_dim=384, predictor_depth=12),
    "g": dict(patch_size=16, dim=1408, depth=40, heads=16, mlp_ratio=48 / 11, predictor_dim=384,
              predictor_depth=16),
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
        x, positions = patchify(images, self.patch_size), self.pos_embed.expand(len(images), -1, -1)
        if context_idx is not None:  # hidden patches never enter
            x, positions = take(x, context_idx), take(positions, context_idx)
        x, out = self.patch_embed(x) + positions, []
        for block in self.blocks:
            out.append(x := block(x))
        return out + [self.norm(x)]

    def forward(self, images, context_idx=None):
        return self.layers(images, context_idx)[-1]


class Predictor(nn.Module):
    """z (B, n, D) at context_idx (B, n) -> representations at target_idx (B, K): (B, K, D)."""

    def __init__(self, grid=8, dim=128, predictor_dim=64, predictor_depth=2, heads=4,
                 mlp_ratio=4.0):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, predictor_dim)  # narrow: it must not do the work
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.predictor_pos_embed = nn.Parameter(sincos_2d(predictor_dim, grid)[None],
                                                requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_dim, heads, mlp_ratio)
                                              for _ in range(predictor_depth))
        self.predictor_norm = LayerNorm(predictor_dim)
        self.predictor_proj = nn.Linear(predictor_dim, dim)

    def forward(self, z, context_idx, target_idx):
        positions = self.predictor_pos_embed.expand(len(z), -1, -1)
        context = self.predictor_embed(z) + take(positions, context_idx)
        queries = self.mask_token + take(positions, target_idx)  # "what is there?", (B, K, d)
        x = torch.cat([context, queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -target_idx.shape[1]:]))


def take(x, index):
    """x (B, N, D), index (B, n) -> (B, n, D): the tokens index[b] of x[b]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class IJEPA(nn.Module):
    """`encoder`, `target_encoder`, `predictor`. target: what is predicted, "output" of the target
    encoder on the whole picture, "input" (it sees the target block alone) or "pixels"."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 predictor_dim=64, predictor_depth=2, predictor_heads=None, target="output",
                 centre=True):
        super().__init__()
        self.target, self.centre = target, centre
        self.encoder = Encoder(image_size, patch_size, dim, depth, heads, mlp_ratio)
        self.predictor = Predictor(self.encoder.grid, dim, predictor_dim, predictor_depth,
                                   predictor_heads or heads, 4.0)
        if target == "pixels":
            self.predictor.predictor_proj = nn.Linear(predictor_dim, 3 * patch_size**2)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The authors': N(0, .02) and zero biases; both encoders start as one."""
        for name, p in self.named_parameters():
            if "pos_embed" not in name:
                if p.ndim > 1:
                    nn.init.trunc_normal_(p, std=0.02)
                else:
                    nn.init.constant_(p, "norm" in name and name.endswith("weight"))
        self.target_encoder.load_state_dict(self.encoder.state_dict())
        self.target_encoder.requires_grad_(False)

    def targets(self, images, target_idx):
        """What the predictor should say at target_idx (B, K): (B, K, D), each token normalised."""
        if self.target == "pixels":
            return take(patchify(images, self.encoder.patch_size), target_idx)
        if self.target == "input":
            x = self.target_encoder(images, target_idx)
        else:
            x = self.target_encoder(images)  # (B, N, D): the whole picture
            if self.centre:
                x = x - x.mean(0, keepdim=True)  # what all pictures have there says nothing
            x = take(x, target_idx)
        return F.layer_norm(x.float() if x.dtype == torch.bfloat16 else x, x.shape[-1:])  # no gain

    def loss(self, images, context_idx, target_idxs, stop_grad=True):
        """context_idx (B, n), target_idxs: a list of (B, K), one for each block
        -> (smooth L1, mean over blocks, tokens and D; the predictions, a list of (B, K, D))."""
        z, out, losses = self.encoder(images, context_idx), [], []
        for target_idx in target_idxs:  # blocks do not see each other
            with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_grad):
                target = self.targets(images, target_idx)
            out.append(self.predictor(z, context_idx, target_idx))
            losses.append(F.smooth_l1_loss(out[-1].to(target.dtype), target))
        return sum(losses) / len(losses), out

    @torch.no_grad()
    def update_target(self, momentum):
        """target = momentum * target + (1 - momentum) * encoder, after each step."""
        for slow, fast in zip(self.target_encoder.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 1 - momentum)

    def features(self, images, last=1):
        """(B, 3, H, H) -> (B, D), mean of the target encoder's patches; last=4: of its last four
        blocks side by side, (B, 4 D)."""
        layers = self.target_encoder.layers(images)
        return layers[-1].mean(1) if last == 1 else torch.cat(
            [x.mean(1) for x in layers[-1 - last:-1]], dim=1)

    @classmethod
    def from_pretrained(cls, path):
        """From the authors' .pth.tar, this script's files, or Hugging Face's encoder state dict,
        which fills both encoders and leaves the predictor untrained; else UserError."""
        content = data.load_checkpoint(path)
        own, args = content.get("script") == "jepa", content.get("args", {})
        with data.refuse(f"{path}: does not hold an I-JEPA"):
            if own:
                state = content["model"]
            elif "target_encoder" in content:
                state = {f"{part}.{k.removeprefix('module.')}": v for part in
                         ("encoder", "predictor", "target_encoder")
                         for k, v in content[part].items()}
            else:
                encoder = read_hugging_face(content)
                state = {f"{part}.{k}": v for part in ("encoder", "target_encoder")
                         for k, v in encoder.items()}
            dim, _, _, patch_size = state["encoder.patch_embed.proj.weight"].shape
            count = lambda name: sum(k.startswith(name) and k.endswith("norm1.bias") for k in state)
            image_size = math.isqrt(state["encoder.pos_embed"].shape[1]) * patch_size
            released = 16 if dim in (1024, 1280, 1408) else dim // 64
            bias = state.get("predictor.predictor_embed.bias", torch.zeros(384))
            model = cls(image_size, patch_size, dim, count("encoder."), args.get("heads", released),
                        len(state["encoder.blocks.0.mlp.fc1.bias"]) / dim, len(bias),
                        count("predictor."), None, args.get("target", "output"),
                        args.get("centre", False))
            predictor = model.predictor.state_dict() if count("predictor.") == 0 else {}
            model.load_state_dict({f"predictor.{k}": v for k, v in predictor.items()} | state)
        return model


def read_hugging_face(content):
    """Its encoder's names -> ours; q, k and v are put together."""
    state, names = {}, {
        "ijepa.": "", "embeddings.position_embeddings": "pos_embed", "encoder.layer.": "blocks.",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.output.dense": "attn.proj", "layernorm.": "norm.",
        "output.dense": "mlp.fc2", "intermediate.dense": "mlp.fc1", "attention.attention.": "attn."}
    for name, tensor in content.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if not name.startswith("classifier"):
            state[name] = tensor
    for query in [name for name in state if ".query." in name]:
        parts = [state.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        state[query.replace("query", "qkv")] = torch.cat(parts)
    return state


def draw_blocks(B, n, count, scale, aspect):
    """(B, count, n*n) bool: rectangles in a grid of n x n patches, one size for the whole batch,
    area in `scale` of the grid, height / width in `aspect`, every place equally likely."""
    uniform = lambda low, high: low + (high - low) * torch.rand(()).item()
    area, ratio = n * n * uniform(*scale), uniform(*aspect)
    h, w = (min(n, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
    y, x = (torch.randint(n - side + 1, (B, count, 1)) for side in (h, w))
    i = torch.arange(n)
    rows, columns = (i >= y) & (i < y + h), (i >= x) & (i < x + w)  # (B, count, n)
    return (rows[..., :, None] & columns[..., None, :]).flatten(2)


def sample_masks(B, n, args, device):
    """-> context_idx (B, n_c), list of target_idx (B, K), int64, context and targets disjoint."""
    scale, aspect = (args.target_scale, args.target_scale + 0.05), (0.75, 1.5)
    for _ in range(50):
        if args.masking == "multiblock":
            targets = draw_blocks(B, n, args.targets, scale, aspect)
            context = draw_blocks(B, n, 1, (0.85, 1), (1, 1))[:, 0] & ~targets.any(1)
        elif args.masking == "block":  # one large block from all the rest
            targets = draw_blocks(B, n, 1, (0.55, 0.65), aspect)
            context = ~targets[:, 0]
        elif args.masking == "raster":  # one quarter of the picture from another
            i = torch.arange(n)
            quarter = ((i >= n // 2)[:, None] * 2 + (i >= n // 2)).flatten()
            targets = (quarter == torch.arange(4)[:, None]).expand(B, 4, -1)
            context, targets = targets[:, 0], targets[:, 1:]
        else:  # random patches from the others
            targets = (torch.rand(B, n * n).argsort(1).argsort(1) < 0.6 * n * n)[:, None]
            context = ~targets[:, 0]
        if (shown := int(context.sum(1).min())) >= min(4, n * n // 4):
            # As many for each picture: a random choice of its context.
            context_idx = (context.float() + torch.rand(B, n * n)).topk(shown, dim=1).indices
            return context_idx.sort(1).values.to(device), [
                t.nonzero()[:, 1].reshape(B, -1).to(device) for t in targets.unbind(1)]
    raise data.UserError(f"--targets {args.targets} of --target-scale {args.target_scale} leave no "
                         f"context in a grid of {n} x {n}; use fewer or smaller ones")


def sigreg(features, directions=256):
    """SIGReg (LeJEPA, 2511.08544): features (n, D) should look Gaussian from every side: Epps and
    Pulley's distance of n projections to N(0, 1), mean over random directions: a cure of collapse."""
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
def draw(model, dataset, history, out, args, amp):
    """masks.png: picture | context | the target blocks. predictions.png: picture | context | in the
    place of each target, the real patch whose target representation is nearest to the prediction
    | the same for the true representation, the best that could be. collapse.svg: the log."""
    images, P, n = dataset.normalise(dataset.test_images[:8]), args.patch_size, model.encoder.grid
    torch.manual_seed(args.seed)
    context_idx, target_idxs = sample_masks(len(images), n, args, images.device)
    seen = lambda idx: F.interpolate(torch.zeros(len(idx), n * n, device=idx.device).scatter(
        1, idx, 1).reshape(-1, 1, n, n), scale_factor=P)
    grey = lambda x, mask: x * mask + 0.5 * (1 - mask)
    pictures = dataset.denormalise(images)
    context = grey(pictures, seen(context_idx))
    panels = [pictures, context] + [grey(pictures, seen(idx)) for idx in target_idxs]
    data.save_png(out / "masks.png", torch.stack(panels, 1).flatten(0, 1), columns=len(panels))
    data.save_chart(out / "collapse.svg", {key: [(row["step"], row[key]) for row in history]
                                           for key in ("feature_std", "effective_rank")}, "step",
                    "effective rank; standard deviation") if history else None
    files = ["masks.png"] + ["collapse.svg"] * bool(history)
    if model.target == "pixels":
        return files
    every = torch.arange(n * n, device=images.device)
    bank = dataset.normalise(dataset.train_images[:500])
    with amp:
        keys = model.targets(bank, every.expand(len(bank), -1)).flatten(0, 1).float()
        truth = model.targets(images, every.expand(len(images), -1)).float()
        _, predicted = model.loss(images, context_idx, target_idxs)
    patches = patchify(dataset.denormalise(bank), P).flatten(0, 1)
    panels = [pictures, context]
    for guess in (predicted, [take(truth, idx) for idx in target_idxs]):
        x = patchify(context, P)
        for idx, z in zip(target_idxs, guess):
            nearest = torch.cdist(z.float().flatten(0, 1), keys).argmin(1).reshape(idx.shape)
            x = x.scatter(1, idx[:, :, None].expand(-1, -1, x.shape[2]), patches[nearest])
        panels.append(unpatchify(x, P))
    data.save_png(out / "predictions.png", torch.stack(panels, 1).flatten(0, 1), columns=8)
    return files + ["predictions.png"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "jepa", SIZES, steps=1500, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--weight-decay", 0.05, "of matrices", type=number(float, 0, 10))
    parser.add("--augment", "light", "light: shift, flip", choices=["none", "light"])
    parser.add("--masking", "multiblock", "which context and targets",
               choices=["multiblock", "block", "random", "raster"])
    parser.add("--targets", 4, "number of target blocks", type=number(int, 1, 16))
    parser.add("--target-scale", 0.15, "a block's least share of the picture; up to 0.05 more",
               type=number(float, 0.01, 0.9))
    parser.add("--target", "output", "what to predict: the target encoder's output on the whole "
               "picture, on the block alone, pixels", choices=["output", "input", "pixels"])
    parser.add("--centre", True, "centre targets", action=argparse.BooleanOptionalAction)
    parser.add("--ema", 0.98, "first momentum of the average", type=number(float, 0, 1))
    parser.add("--no-ema", False, "targets from the encoder itself", action="store_true")
    parser.add("--no-stop-grad", False, "train through the targets, too", action="store_true")
    parser.add("--sigreg", 0.0, "weight of SIGReg", type=number(float, 0, 100))
    for name, what in (("dim", "width"), ("depth", "layers")):
        parser.add(f"--predictor-{name}", None, f"{what} of the predictor, not the size's own",
                   type=number(int, 1, 65536))
    args = data.parse(parser, "jepa", SIZES, argv)
    if args.predictor_dim % 4 or args.predictor_dim % args.heads:
        raise data.UserError(f"--predictor-dim {args.predictor_dim} must be a multiple of 4 and of "
                             f"--heads {args.heads}")
    return args


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load:
        model = IJEPA.from_pretrained(args.load)
        args.steps, args.patch_size = 0, model.encoder.patch_size
        args.image_size = model.encoder.grid * args.patch_size
    dataset = data.open_data(args, device)
    n = args.image_size // args.patch_size
    torch.manual_seed(args.seed)
    if not args.load:
        model = IJEPA(args.image_size, args.patch_size, args.dim, args.depth, args.heads,
                      getattr(args, "mlp_ratio", 4.0), args.predictor_dim, args.predictor_depth,
                      None, args.target, args.centre)
    model.to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in weights if (p.ndim > 1) == decays],
                   weight_decay=args.weight_decay * decays) for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    start, scores = data.resume(args, "jepa", model=model, optimizer=optimizer)
    history = scores.pop("history", [])

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="jepa", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores | dict(history=history))

    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed)
        x = dataset.train_images[index.to(device)]
        x = dataset.normalise(x if args.augment == "none" else data.augment(x))
        context_idx, target_idxs = sample_masks(len(x), n, args, device)
        with amp:
            loss, _ = loss_function(x, context_idx, target_idxs, not args.no_stop_grad)
            if args.sigreg:
                loss = loss + args.sigreg * sigreg(model.encoder(x).mean(1))
        optimizer.zero_grad()
        loss.backward()
        steps.check(step, loss, nn.utils.clip_grad_norm_(weights, 1.0))
        optimizer.step()
        model.update_target(0 if args.no_ema else args.ema + (1 - args.ema) * step / args.steps)
        scores = dict(loss=steps.loss, seconds=steps.seconds(), images_seen=(step + 1) * len(x))
        if step % 50 == 0 or step + 1 == args.steps:
            row = dict(images_seen=scores["images_seen"], loss=steps.loss, lr=rate,
                       **collapse(model, dataset, amp))
            history.append(dict(step=step) | row)
            data.log(out / "log.csv", step, **row)
        if steps.due(step):
            save(step + 1)

    model.eval()
    scores |= collapse(model, dataset, amp)
    untrained = copy.deepcopy(model)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    four = [data.extract(lambda x: model.features(x, 4), dataset, x, amp)
            for x in (dataset.train_images, dataset.test_images)]
    scores["probe_last_four"] = data.linear_probe(four[0], dataset.train_labels, four[1],
                                                  dataset.test_labels)
    files = draw(model, dataset, history, out, args, amp)
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
