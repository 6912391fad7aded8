"""Masked autoencoder (MAE): "... Are Scalable Vision Learners", He et al. 2021, arXiv 2111.06377.

Hide three quarters of a picture's patches, show the encoder only what is left, and let a small
decoder paint the hidden pixels. To fill such holes, neighbouring pixels do not suffice: the encoder
must find out what is in the picture. It never sees a hidden patch, which is 2 to 3 times faster.

    loss = sum_hidden mean_pixels (prediction - target)^2 / number of hidden patches

    python mae.py                                   # shapes, 3 minutes on two CPU cores
    python mae.py --norm-pix --out out/norm_pix     # target: each patch normalised by itself
    python mae.py --masking block --mask-ratio 0.5 --out out/block    # the table of maskings
    python vit.py --init out/mae/checkpoint.pt --out out/tuned        # fine-tune with labels

Default run: a linear probe on the patch mean reaches 0.830 (class token 0.731; the same network
untrained 0.271; raw pixels 0.322) in 2 min 37 s in all, on two bfloat16 CPU cores, seed 0.

Differences from the paper:
1. Peak rate 2e-3 whatever the batch, not 1.5e-4 * batch / 256: steps are few, batches small.
2. Shift and flip, not random resized crops: the pictures are 32 pixels wide.
3. Gradients are clipped at norm 1, as in all six scripts here.
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

SIZES = {  # B, L and H are the paper's, with one decoder for all; T is the usual one for CIFAR
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4,
                 decoder_dim=64, decoder_depth=1, decoder_heads=2),
    "T": dict(patch_size=2, dim=192, depth=12, heads=3,
              decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12,
              decoder_dim=512, decoder_depth=8, decoder_heads=16),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16,
              decoder_dim=512, decoder_depth=8, decoder_heads=16),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16,
              decoder_dim=512, decoder_depth=8, decoder_heads=16),
}


class MAE(nn.Module):
    """images (B, 3, H, H), normalised -> (loss, pred (B, N, P*P*3), mask (B, N), 1 = hidden).

    `norm_pix`: the target is each patch normalised by its own mean and variance.
    `encoder_sees_masks`: the paper's ablation; hidden patches enter the encoder as mask tokens.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 decoder_dim=64, decoder_depth=1, decoder_heads=2, norm_pix=False,
                 encoder_sees_masks=False):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.norm_pix, self.has_decoder = norm_pix, True
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim)
        token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder_mask_token = token if encoder_sees_masks else None

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, decoder_dim),
                                              requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads, mlp_ratio)
                                            for _ in range(decoder_depth))
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The authors': xavier for every matrix (q, k, v as one), zero biases, tokens N(0, .02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight), nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.patch_embed.proj.reset_parameters()  # its bias keeps the default of a convolution
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: it is filled
        for name, p in self.named_parameters():
            if name.endswith("token"):
                nn.init.normal_(p, std=0.02)
        for table in (self.pos_embed, self.decoder_pos_embed):  # fixed; zero for the class token
            table[0, 1:] = sincos_2d(table.shape[2], self.grid)

    def encode(self, images, shown=None):
        """(B, 3, H, H) -> (B, 1 + n, D), class token first. shown (B, n): the patches to encode."""
        x = patchify(images, self.patch_size)  # (B, N, P*P*3)
        positions = self.pos_embed[:, 1:]  # (1, N, D)
        if shown is not None and self.encoder_mask_token is None:  # the hidden ones are left out
            x, positions = take(x, shown), positions[0][shown]  # (B, n, ...)
        x = self.patch_embed(x)
        if shown is not None and self.encoder_mask_token is not None:
            seen = torch.zeros_like(x[:, :, :1]).scatter(1, shown[:, :, None], 1) == 1  # (B, N, 1)
            x = torch.where(seen, x, self.encoder_mask_token.to(x.dtype))
        x = x + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + n, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x, restore):
        """(B, 1 + n, D) of shown patches, restore (B, N) -> pixels of all patches (B, N, P*P*3)."""
        x = self.decoder_embed(x)  # (B, 1 + n, decoder_dim)
        if (missing := restore.shape[1] + 1 - x.shape[1]) > 0:
            hidden = self.mask_token.to(x.dtype).expand(len(x), missing, -1)
            x = torch.cat([x, hidden], dim=1)  # class token, shown patches, hidden patches
            x = take(x, F.pad(restore + 1, (1, 0)))  # and now in reading order
        x = x + self.decoder_pos_embed  # (B, 1 + N, decoder_dim)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, images):
        """(B, 3, H, H) -> what to predict (B, N, P*P*3), and its mean and deviation to undo it."""
        x = patchify(images, self.patch_size)
        if not self.norm_pix:
            return x, 0.0, 1.0
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)  # divided by P*P*3 - 1
        deviation = (var + 1e-6).sqrt()
        return (x - mean) / deviation, mean, deviation

    def forward(self, images, mask_ratio=0.75, noise=None):
        """noise (B, N): the patches with the smallest numbers are shown. Default: drawn here."""
        if not self.has_decoder:
            raise data.UserError("this file held an encoder only; to reconstruct pictures, load "
                                 "a mae_visualize_vit_*.pth or mae_pretrain_vit_*_full.pth file")
        N = self.grid**2
        if noise is None:
            noise = torch.rand(len(images), N, device=images.device)
        order = noise.argsort(dim=1)  # which patch comes first, second, ...: (B, N)
        restore = order.argsort(dim=1)  # and at which place each patch is
        n = int(N * (1 - mask_ratio))
        mask = (restore >= n).float()  # 1 = hidden
        pred = self.decode(self.encode(images, order[:, :n]), restore)
        target, _, _ = self.target(images)
        error = (pred.to(target.dtype) - target).square().mean(-1)  # (B, N)
        return (error * mask).sum() / mask.sum(), pred, mask  # over hidden patches alone

    def features(self, images, pool="mean"):
        """(B, 3, H, H), nothing hidden -> (B, D): "mean" of the patches or "cls" token."""
        x = self.encode(images)
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(1)

    @classmethod
    def from_pretrained(cls, path, norm_pix=False):
        """From the authors' {"model": ...} files or this script's; else UserError.

        norm_pix: True for mae_pretrain_*_full.pth, False for mae_visualize_*.pth; files of this
        script know it. An encoder-only file gives a model with `features` but without `forward`.
        """
        content = data.load_checkpoint(path)
        state, args = content.get("model", content), content.get("args", {})
        with data.refuse(f"{path}: does not hold a masked autoencoder"):
            dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
            depth, decoder_depth = (1 + max((int(k[len(name):].split(".")[0]) for k in state
                                             if k.startswith(name)), default=-1)
                                    for name in ("blocks.", "decoder_blocks."))
            width = state["decoder_embed.bias"].numel() if decoder_depth else 512
            own = content.get("script") == "mae"
            heads = args["heads"] if own else 16 if dim == 1280 else dim // 64
            image_size = math.isqrt(state["pos_embed"].shape[1]) * patch_size
            model = cls(image_size, patch_size, dim, depth, heads,
                        len(state["blocks.0.mlp.fc1.bias"]) / dim, width, decoder_depth,
                        args["decoder_heads"] if own else 16, args["norm_pix"] if own else norm_pix,
                        "encoder_mask_token" in state)
            model.has_decoder = decoder_depth > 0
            missing, unknown = model.load_state_dict(state, strict=False)
            if unknown or any(not k.startswith(("decoder_", "mask_token")) or model.has_decoder
                              for k in missing):
                raise ValueError(f"missing {missing[:2]}, unknown {unknown[:2]}")
        return model


def take(x, index):
    """x (B, N, D), index (B, n) -> (B, n, D): the tokens index[b] of x[b]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def mask_noise(masking, B, n, mask_ratio, device):
    """Noise (B, n*n) for MAE.forward, which shows the patches with the smallest numbers.

    random: uniform. grid: shows the first patch of every 2 x 2 before others. block: hides
    rectangles of at least 4 patches, aspect 0.3 to 3.3, until there are enough (as in BEiT).
    """
    noise = torch.rand(B, n, n, device=device)
    if masking == "grid":
        noise[:, ::2, ::2] -= 1
    if masking == "block":
        for picture in noise:
            while (picture > 1).sum() < n * n * mask_ratio:
                area, aspect = torch.empty(2).uniform_(0, 1).tolist()
                area, aspect = 4 + area * n * n / 4, math.exp((2 * aspect - 1) * math.log(3.3))
                h, w = (min(n, max(1, round(math.sqrt(area * a)))) for a in (aspect, 1 / aspect))
                y, x = (int(torch.randint(n - side + 1, ())) for side in (h, w))
                picture[y:y + h, x:x + w] = picture[y:y + h, x:x + w] % 1 + 1
    return noise.flatten(1)


@torch.no_grad()
def draw(model, dataset, out, args, amp):
    """16 test pictures: input | masked | reconstruction | the same with the shown patches pasted
    in. In the third, shown patches are noise: nothing ever trains their prediction. With norm_pix
    the prediction is un-normalised by the hidden patches' own statistics."""
    images, P = dataset.normalise(dataset.test_images[:16]), model.patch_size
    torch.manual_seed(args.seed)
    noise = mask_noise(args.masking, len(images), model.grid, args.mask_ratio, images.device)
    with amp:
        _, pred, mask = model(images, args.mask_ratio, noise)
    _, mean, deviation = model.target(images)
    painted = unpatchify(pred.float() * deviation + mean, P)
    hidden = unpatchify(mask[:, :, None].expand(-1, -1, 3 * P * P), P)
    panels = [dataset.denormalise(x) for x in (images, painted)]
    panels = [panels[0], panels[0] * (1 - hidden) + 0.5 * hidden, panels[1],
              panels[0] * (1 - hidden) + panels[1] * hidden]
    data.save_png(out / "reconstruction.png", torch.stack(panels, 1).flatten(0, 1), columns=8)
    if model.norm_pix:
        print("reconstruction.png: mean and contrast of each hidden patch come from the original")
    return ["reconstruction.png"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "mae", SIZES, steps=2900, batch_size=64, lr=2e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--weight-decay", 0.05, "of matrices", type=number(float, 0, 10))
    parser.add("--augment", "light", "light: shift, flip", choices=["none", "light"])
    parser.add("--mask-ratio", 0.75, "share of hidden patches", type=number(float, 0.01, 0.99))
    parser.add("--masking", "random", "which patches", choices=["random", "block", "grid"])
    parser.add("--norm-pix", False, "target: each patch normalised by itself",
               action=argparse.BooleanOptionalAction)
    parser.add("--encoder-sees-masks", False, "the ablation: mask tokens in the encoder, too",
               action="store_true")
    for name, what in (("dim", "width"), ("depth", "layers"), ("heads", "attention heads")):
        parser.add(f"--decoder-{name}", None, f"{what} of the decoder, else the size's",
                   type=number(int, 1, 65536))
    args = data.parse(parser, "mae", SIZES, argv)
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        raise data.UserError(f"--decoder-dim {args.decoder_dim} must be a multiple of 4 and of "
                             f"--decoder-heads {args.decoder_heads}")
    return args


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load:
        model = MAE.from_pretrained(args.load, args.norm_pix)
        args.steps, args.patch_size = 0, model.patch_size
        args.image_size = model.grid * model.patch_size
    dataset = data.open_data(args, device)
    N = (args.image_size // args.patch_size) ** 2
    if not 0 < (shown := int(N * (1 - args.mask_ratio))) < N:
        raise data.UserError(f"--mask-ratio {args.mask_ratio} shows {shown} of {N} patches")
    torch.manual_seed(args.seed)
    if not args.load:
        model = MAE(args.image_size, args.patch_size, args.dim, args.depth, args.heads, 4.0,
                    args.decoder_dim, args.decoder_depth, args.decoder_heads, args.norm_pix,
                    args.encoder_sees_masks)
    model.to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in weights if (p.ndim > 1) == decays],
                   weight_decay=args.weight_decay * decays) for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")
    start, scores = data.resume(args, "mae", model=model, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="mae", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    forward = torch.compile(model) if args.compile else model
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed)
        x = dataset.train_images[index.to(device)]
        x = dataset.normalise(x if args.augment == "none" else data.augment(x))
        noise = mask_noise(args.masking, len(x), model.grid, args.mask_ratio, device)
        with amp:
            loss, _, _ = forward(x, args.mask_ratio, noise)
        optimizer.zero_grad()
        loss.backward()
        steps.check(step, loss, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        scores = dict(loss=steps.loss, seconds=steps.seconds(), images_seen=(step + 1) * len(x))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=steps.loss,
                     lr=rate)
        if steps.due(step):
            save(step + 1)

    model.eval()
    untrained = copy.deepcopy(model)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    scores["probe_cls"] = data.linear_probe(
        *data.both_sets(lambda x: model.features(x, "cls"), dataset, amp))
    files = draw(model, dataset, out, args, amp) if model.has_decoder else []
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
