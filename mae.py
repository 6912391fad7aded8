"""Masked autoencoder (MAE): "... Are Scalable Vision Learners", He et al. 2021, arXiv 2111.06377.

Mask three quarters of an image's patches (the slide's "blocks"): the encoder gets only the others,
and no mask tokens. A small decoder then predicts the pixels of the masked ones. It can do so
well only if the encoder tells it what is in the image. If the encoder got all patches, a step would
take 2 to 3 times as long. (The slide encodes blocks and then masks them out: not so here.)

    loss = 1 / (number of masked patches) * sum over masked patches of mean (pred - target)^2

    python mae.py                                   # the default data set, "shapes"
    python mae.py --norm-pix --out out/norm_pix     # target: each patch normalized by itself
    python vit.py --init out/mae/checkpoint.pt --out out/tuned        # fine-tune with labels

Default run, seed 0, 18 minutes on one older core (3:54 on two newer): a linear probe (a linear
classifier of the mean of the patch tokens) 0.843; of the untrained network 0.267, of pixels 0.326.

Differences from the paper:
1. Peak learning rate 2e-3 for any batch size, not 1.5e-4 * batch size / 256: the run is short.
2. Random shift and flip, not random resized crops: by default, images are only 32 pixels wide.
3. By default a decoder of one layer of width 64, not eight of 512; gradients clipped at norm 1.
"""

import functools
import math
import pathlib

import torch
from torch import nn

import data
from common import Block, LayerNorm, PatchEmbed, patchify, sincos_2d, unpatchify
from data import UserError

# --------------------------------------------------------------------------------------- the model


def take(x, index):
    """x (B, N, D), index (B, n) -> (B, n, D): from each sequence the n tokens at its indices."""
    index = index[:, :, None].expand(-1, -1, x.shape[2])  # gather wants an index for every number
    return x.gather(1, index)


class MAE(nn.Module):
    """images (B, 3, H, H), normalized -> loss, pred (B, N, P*P*3), mask (B, N) with 1 for masked.

    norm_pix: the target is each patch normalized by its own mean and std.
    decoder_depth=0: the encoder alone, without a decoder; `features` works, `forward` does not.
    To copy this, also copy: take, Block, Attention, MLP, LayerNorm, PatchEmbed, patchify,
    sincos_2d.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 decoder_dim=64, decoder_depth=1, decoder_heads=2, norm_pix=False):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.norm_pix = norm_pix
        self.has_decoder = decoder_depth > 0
        N = self.grid**2

        # A ViT. Its position table is fixed, not learned; row 0, the class token's, is zero.
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + N, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim)

        # The decoder can be narrow and have few layers. Probes and fine-tuning do not use it.
        if self.has_decoder:
            self.decoder_embed = nn.Linear(dim, decoder_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
            table = torch.zeros(1, 1 + N, decoder_dim)
            self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth))
            self.decoder_norm = LayerNorm(decoder_dim)
            self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * 3)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As in the authors' code: Xavier for all matrices, biases zero (except patch_embed's),
        class and mask token normal with std 0.02, norms with gain 1, bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # q, k and v are one matrix: Xavier counts 3 D outputs, as in the authors' code.
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        # A new bias, as PyTorch draws it: data.untrained calls this method on a trained model, too.
        # (The weight is replaced below.)
        self.patch_embed.proj.reset_parameters()
        # proj.weight has a convolution's shape, (D, 3, P, P), from which Xavier would count D P P
        # outputs. flatten gives a view of it, the matrix (D, 3 P P): so this fills proj.weight.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        self.pos_embed[0, 1:] = sincos_2d(self.pos_embed.shape[2], self.grid)
        if self.has_decoder:
            nn.init.normal_(self.mask_token, std=0.02)
            self.decoder_pos_embed[0, 1:] = sincos_2d(self.decoder_pos_embed.shape[2], self.grid)

    def encode(self, images, visible=None):
        """(B, 3, H, H) -> (B, 1 + n, D), class token first. visible (B, n): the indices of the n
        patches that the encoder sees; None: all of them, n = N."""
        side = self.grid * self.patch_size
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(images.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        x = patchify(images, self.patch_size)  # (B, N, P*P*3)
        positions = self.pos_embed[:, 1:]  # (1, N, D)
        if visible is not None:  # from here on, the masked patches do not exist
            x = take(x, visible)  # (B, n, P*P*3)
            positions = positions[0][visible]  # (B, n, D): all images look up the same table (N, D)
        x = self.patch_embed(x) + positions  # (B, n, D)
        cls_token = self.cls_token + self.pos_embed[:, :1]  # adds zero, as the authors' code does
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + n, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x, restore):
        """x (B, 1 + n, D), class token and visible patches -> pixels of all patches (B, N, P*P*3).

        `forward`, below, shuffles the patches and encodes the first n; the rest are masked. restore
        (B, N): the position of each patch in the shuffled order."""
        x = self.decoder_embed(x)  # (B, 1 + n, decoder_dim)
        cls_token = x[:, :1]
        x = x[:, 1:]
        # Append the same mask token for each masked patch. Then go back to the reading order.
        B, n, _ = x.shape
        mask_tokens = self.mask_token.expand(B, restore.shape[1] - n, -1)  # (B, N - n, decoder_dim)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, N, decoder_dim)
        x = take(x, restore)  # (B, N, decoder_dim); patch i comes from position restore[i]
        x = torch.cat([cls_token, x], dim=1)  # (B, 1 + N, decoder_dim)
        x = x + self.decoder_pos_embed  # only this tells one mask token from another
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # without the class token

    def target(self, images):
        """(B, 3, H, H) -> what to predict, (B, N, P*P*3): the patches; normalized if norm_pix."""
        x = patchify(images, self.patch_size)
        if self.norm_pix:
            mean, std = self.patch_statistics(x)
            x = (x - mean) / std
        return x

    def patch_statistics(self, patches):
        """(B, N, P*P*3) -> mean and std of each patch, (B, N, 1) both."""
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True)  # divided by P*P*3 - 1, as by the authors
        return mean, (variance + 1e-6).sqrt()

    def forward(self, images, mask_ratio=0.75, noise=None):
        """noise (B, N): the patches with the smallest numbers stay visible. Default: random."""
        if not self.has_decoder:
            raise UserError("this model has no decoder; to reconstruct images, load a "
                            "mae_visualize_vit_*.pth or mae_pretrain_vit_*_full.pth file")
        N = self.grid**2
        n = int(N * (1 - mask_ratio))  # number of visible patches; rounded down as by the authors
        if not 0 < n < N:
            raise UserError(f"mask ratio {mask_ratio} leaves {n} of {N} patches visible: "
                            "at least one must be visible, and one masked")

        # Random masking: shuffle the patches, keep the first n.
        if noise is None:
            noise = torch.rand(len(images), N, device=images.device)
        order = noise.argsort(dim=1)  # which patch comes first, second, ...: (B, N)
        # Its inverse: where each patch stands in this order. In the order 2, 0, 3, 1 patch 0 stands
        # at 1, patch 1 at 3, and so on: restore is 1, 3, 0, 2. argsort gives just this: where the
        # smallest number stands, which is patch 0, then where patch 1 stands, and so on.
        restore = order.argsort(dim=1)
        mask = (restore >= n).float()  # 1 = masked: it did not come among the first n

        # Encode the visible patches, decode all patches.
        latent = self.encode(images, visible=order[:, :n])  # (B, 1 + n, D)
        pred = self.decode(latent, restore)  # (B, N, P*P*3)

        # The loss: mean squared error of each patch, averaged over the masked patches alone.
        target = self.target(images)
        pred = pred.to(target.dtype)  # under autocast bfloat16; loss and images need float32
        error = (pred - target).square().mean(dim=-1)  # (B, N)
        loss = (error * mask).sum() / mask.sum()
        return loss, pred, mask

    def features(self, images, pool="mean"):
        """(B, 3, H, H), nothing masked -> (B, D): the "mean" of the patches, or the "cls" token."""
        x = self.encode(images)
        if pool == "cls":
            return x[:, 0]
        return x[:, 1:].mean(dim=1)

    @classmethod
    def from_pretrained(cls, path, norm_pix=False, heads=None, decoder_heads=None):
        """Reads the authors' files or this script's; else UserError. The other arguments are what
        the authors' files do not store. norm_pix: True for mae_pretrain_vit_*_full.pth, False for
        mae_visualize_vit_*.pth. heads, decoder_heads: None means as many as in the authors' models.
        """
        with data.errors_become(f"{path}: does not hold a masked autoencoder"):
            state, sizes = data.read_mae(path, heads=heads, decoder_heads=decoder_heads)
            sizes.setdefault("norm_pix", norm_pix)  # this script's files know it themselves
            model = cls(**sizes)
            model.load_state_dict(state)
        return model


# ------------------------------------------------------------------------------ scores and pictures


@torch.no_grad()
def draw_reconstructions(model, dataset, out, args, amp):
    """16 test images, four panels each: original | masked | reconstruction | the same with the
    visible patches pasted in. In the third, the visible patches are meaningless: no loss trains
    them. With norm_pix, each prediction gets the true patch's mean and std."""
    P = model.patch_size
    images = dataset.normalize(dataset.test_images[:16])
    torch.manual_seed(args.seed)
    with amp:
        _, pred, mask = model(images, args.mask_ratio)
    if model.norm_pix:
        mean, std = model.patch_statistics(patchify(images, P))
        pred = pred * std + mean
        print("reconstruction.png: the mean and std of each patch come from the original")
    # From one number a patch to one a pixel: (16, 3, H, H), 1 = masked.
    mask = unpatchify(mask[:, :, None].expand(-1, -1, P * P * 3), P)
    original = dataset.denormalize(images)
    reconstruction = dataset.denormalize(unpatchify(pred, P))
    masked = original * (1 - mask) + 0.5 * mask  # 0.5 is gray
    pasted = original * (1 - mask) + reconstruction * mask
    panels = torch.stack([original, masked, reconstruction, pasted], dim=1)  # (16, 4, 3, H, H)
    data.save_png(out / "reconstruction.png", panels.flatten(0, 1), columns=8)
    return ["reconstruction.png"]


# ---------------------------------------------------------------------------------------- training

SIZES = {  # B, L and H are the paper's; tiny, and T for CIFAR-10, are of this repository
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


def parse_args(argv=None):
    parser = data.Parser(__doc__)
    data.common_options(parser, "mae", SIZES, steps=2900, batch_size=64, lr=2e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=data.number(int, 0))
    parser.add("--weight-decay", 0.05, "The weight decay of all matrices and tokens.",
               type=data.number(float, 0, 10))
    parser.add("--augment", "light", "Changes of training images; light: random shift and flip.",
               choices=["none", "light"])
    parser.add("--mask-ratio", 0.75, "The share of patches that is masked.",
               type=data.number(float, 0.01, 0.99))
    parser.add("--norm-pix", False, "The target is each patch normalized by its own mean and std.",
               action="store_true")
    parser.add("--decoder-dim", None, "The width of the decoder, if not that of --size.",
               type=data.number(int, 1, 65536))
    parser.add("--decoder-depth", None, "The decoder's number of layers, if not that of --size.",
               type=data.number(int, 1, 65536))
    parser.add("--decoder-heads", None, "The decoder's number of heads, if not that of --size.",
               type=data.number(int, 1, 65536))
    args = data.parse(parser, "mae", SIZES, argv)  # --size fills in what is None
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        raise UserError(f"--decoder-dim {args.decoder_dim} must be a multiple of 4 and of "
                        f"--decoder-heads {args.decoder_heads}")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build(args):
    """A new model with the sizes in the options."""
    return MAE(image_size=args.image_size, patch_size=args.patch_size,
               dim=args.dim, depth=args.depth, heads=args.heads,
               decoder_dim=args.decoder_dim, decoder_depth=args.decoder_depth,
               decoder_heads=args.decoder_heads, norm_pix=args.norm_pix)


def train(args):
    """Trains a model, scores it, draws the picture; returns the scores. --load: no training."""
    # Set-up: device, data, model, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    if args.load:
        model = MAE.from_pretrained(args.load, args.norm_pix)
        args.steps = 0
        args.patch_size = model.patch_size
        args.image_size = model.grid * model.patch_size
        # Images are normalized as in the training of this model; for released files: ImageNet's.
        args.mean, args.std = data.statistics(args.load)
    dataset = data.open_data(args, device)
    torch.manual_seed(args.seed)
    if not args.load:
        model = build(args)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]  # all but the position tables
    matrices = [p for p in trained if p.ndim > 1]  # the class and the mask token are among them
    vectors = [p for p in trained if p.ndim == 1]  # biases and norms: without weight decay
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")
    start, scores = data.resume(args, "mae", model=model, optimizer=optimizer)
    forward = torch.compile(model) if args.compile else model

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="mae", model=model.state_dict(),
                             optimizer=optimizer.state_dict(), step=step,
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
        images = dataset.train_images[index.to(device)]
        if args.augment == "light":
            images = data.augment(images)
        images = dataset.normalize(images)
        with amp:
            loss, _, _ = forward(images, args.mask_ratio)
        optimizer.zero_grad()
        loss.backward()
        # One bad batch can give a huge gradient: scale all gradients down if their norm exceeds 1.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.check(step, loss, norm)  # waits for both numbers; not finite: the run ends
        optimizer.step()
        scores = progress.scores(images_seen=(step + 1) * len(images))  # loss, seconds, images_seen
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=scores["loss"],
                     lr=lr)
        if progress.due(step):
            save(step + 1, scores)

    # Scores and pictures.
    model.eval()
    untrained = data.untrained(model, args.seed)
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    # The same probe on the class token. (both_sets: features, labels of training and test images.)
    cls_features = functools.partial(model.features, pool="cls")
    scores["probe_cls"] = data.linear_probe(*data.both_sets(cls_features, dataset, amp))
    files = []
    if model.has_decoder:
        files += draw_reconstructions(model, dataset, out=out, args=args, amp=amp)
    if not args.load:
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
