"""I-JEPA: "... a Joint-Embedding Predictive Architecture", Assran et al. 2023, arXiv 2301.08243.

An encoder sees the context (the slide's "one block"), a second one the whole image. A predictor
predicts the second's outputs for the masked blocks: meaning, not pixels. The second gets no
gradient, it slowly follows the first. If the loss trained both, they could agree on a constant.

    loss = mean smooth_l1(predictor(encoder(context), masked), norm(target_encoder(image))[masked])

    python jepa.py                                    # the default data set, "shapes"
    python jepa.py --no-ema --no-stop-grad --out out/collapsed    # see it collapse
    python jepa.py --masking multiblock --no-center --out out/paper    # the paper's masks

Default run (19 minutes, older core), seeds 0-2: linear probe 0.752, 0.665, 0.647; untrained 0.305.

Differences from the paper:
1. norm is `center_targets`; with LayerNorm, so short a run learns little (linear probe 0.328).
2. For small images: blocks of 2 x 2 patches are masked, 60 % in all, and predicted together.
3. For a short run: initial weights as in MAE's code, but larger for the patch projection; momentum
   0.99 to 0.999 (0.996 to 1); constant weight decay; flip and shift, no crops; gradient norm <= 1.
"""

import argparse
import copy
import functools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Block, LayerNorm, PatchEmbed, patchify, sincos_2d, unpatchify
from data import UserError

# --------------------------------------------------------------------------------------- the model


def take(x, index):
    """x (B, N, D), index (B, n) -> (B, n, D): from each sequence the n tokens at its indices."""
    index = index[:, :, None].expand(-1, -1, x.shape[2])  # gather wants an index for every number
    return x.gather(1, index)


class Encoder(nn.Module):
    """A ViT without class token: images (B, 3, H, H), normalized -> (B, N, D).

    With context_idx (B, n) it sees only the patches with these indices: -> (B, n, D).
    To copy this, also copy: take, Block, Attention, MLP, LayerNorm, PatchEmbed, patchify,
    sincos_2d.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim)

    def embed(self, images):
        """(B, 3, H, H) -> the tokens of all patches, with positions, (B, N, D)."""
        side = self.grid * self.patch_size
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(images.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        return self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed

    def forward(self, images, context_idx=None):
        x = self.embed(images)
        if context_idx is not None:
            x = take(x, context_idx)  # (B, n, D): masked patches never enter the layers
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """z (B, n, D), the encoder's output; context_idx (B, n), its patches; target_idx (B, K), the
    patches to predict -> (B, K, D), their predicted representations. One target is K patches,
    predicted in one call. IJEPA.loss calls it for M targets (paper: M = 4 blocks).

    To copy this, also copy: Block, Attention, MLP, LayerNorm, sincos_2d.
    """

    def __init__(self, grid=8, dim=128, predictor_dim=64, predictor_depth=2, predictor_heads=4):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        table = sincos_2d(predictor_dim, grid)[None]  # (1, N, predictor_dim), fixed
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_dim, predictor_heads) for _ in range(predictor_depth))
        self.predictor_norm = LayerNorm(predictor_dim)
        self.predictor_proj = nn.Linear(predictor_dim, dim)

    def forward(self, z, context_idx, target_idx):
        positions = self.predictor_pos_embed[0]  # (N, predictor_dim)
        context = self.predictor_embed(z) + positions[context_idx]  # (B, n, predictor_dim)
        # Mask tokens differ only in their position. Each asks: what is here?
        mask_tokens = self.mask_token + positions[target_idx]  # (B, K, predictor_dim)
        x = torch.cat([context, mask_tokens], dim=1)  # (B, n + K, predictor_dim)
        for block in self.predictor_blocks:
            x = block(x)
        x = x[:, context_idx.shape[1]:]  # (B, K, predictor_dim): the mask tokens alone
        return self.predictor_proj(self.predictor_norm(x))


class IJEPA(nn.Module):
    """An `encoder`, a `predictor`, and a `target_encoder`, the slow average of the encoder.

    predictor_heads: by default as many as the encoder has. center=True (so in this script's default
    run): the targets are `center_targets` of the target encoder's output; False: a LayerNorm of it
    without weights, as in the authors' code. After each step of a training, call `update_target`.
    To copy this, also copy: Encoder, Predictor, center_targets, take, Block, Attention, MLP,
    LayerNorm, PatchEmbed, patchify, sincos_2d.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 predictor_dim=64, predictor_depth=2, predictor_heads=None, center=False):
        super().__init__()
        self.center = center
        self.encoder = Encoder(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth,
                               heads=heads, mlp_ratio=mlp_ratio)
        self.predictor = Predictor(grid=self.encoder.grid, dim=dim, predictor_dim=predictor_dim,
                                   predictor_depth=predictor_depth,
                                   predictor_heads=predictor_heads or heads)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_encoder.requires_grad_(False)  # no gradient trains it: see update_target
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Random, as in MAE's code: Xavier for the Linear layers, zero biases, std 0.02 for the
        mask token. Only the patch projection gets another std, see below."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # As in MAE's code, q, k and v are one matrix: Xavier counts 3 D outputs, and draws
                # smaller weights than for three matrices.
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):  # in PatchEmbed, which uses its weight as a matrix
                # From 3 P^2 numbers of std 1, weights of this std make outputs of std 1. With std
                # 0.02, as by I-JEPA's authors, the outputs have std 0.02 sqrt(48) = 0.14 (P = 4).
                # The numbers of the position table have a root mean square of 0.7: in the sum,
                # what the patch shows would hardly count.
                nn.init.normal_(module.weight, std=1 / math.sqrt(3 * self.encoder.patch_size**2))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.predictor.mask_token, std=0.02)
        self.target_encoder.load_state_dict(self.encoder.state_dict())  # both start equal

    def loss(self, images, context_idx, target_idx):
        """context_idx (B, n), target_idx (M, B, K): M targets of K patches. Returns (loss,
        predictions (M, B, K, D)); the loss is the mean over all these.

        smooth_l1, and LayerNorm if not center, are those of the authors' code; the paper has L2."""
        z = self.encoder(images, context_idx)  # (B, n, D): sees the context alone
        h = self.targets(images)  # (B, N, D): sees the whole image; without gradient
        losses = []
        predictions = []
        for idx in target_idx:  # one target after another, (B, K), each by itself
            pred = self.predictor(z, context_idx, idx).to(h.dtype)  # (B, K, D), never bfloat16
            losses.append(F.smooth_l1_loss(pred, take(h, idx)))
            predictions.append(pred)
        return torch.stack(losses).mean(), torch.stack(predictions)

    @torch.no_grad()  # the stop-gradient: targets are given, the loss does not train them
    def targets(self, images):
        """What the predictor has to find for each patch, (B, 3, H, H) -> (B, N, D)."""
        return self.normalize(self.target_encoder(images))

    def normalize(self, h):
        """The norm in the formula of the loss, (B, N, D) -> (B, N, D). (The encoder's last
        LayerNorm has a trained gain, so h can become large or small, and the loss with it.)"""
        h = h.to(torch.promote_types(h.dtype, torch.float32))  # bfloat16 to float32; float64 stays
        if not self.center:  # the authors'
            return F.layer_norm(h, h.shape[-1:])
        return center_targets(h)

    @torch.no_grad()
    def update_target(self, momentum):
        """After each step: target = momentum * target + (1 - momentum) * encoder."""
        for target, p in zip(self.target_encoder.parameters(), self.encoder.parameters()):
            target.lerp_(p, 1 - momentum)

    def features(self, images, last=1):
        """(B, 3, H, H) -> (B, D): the patch mean of the target encoder, the one that the paper
        evaluates. last=4: the patch means of its last four layers side by side, before the final
        norm, (B, 4 D)."""
        encoder = self.target_encoder
        if last == 1:
            return encoder(images).mean(dim=1)
        x = encoder.embed(images)
        means = []
        for block in encoder.blocks:
            x = block(x)
            means.append(x.mean(dim=1))  # (B, D)
        return torch.cat(means[-last:], dim=1)

    @classmethod
    def from_pretrained(cls, path, heads=None, predictor_heads=None):
        """From the authors' .pth.tar, this script's file, or Hugging Face's; else UserError.
        Hugging Face's files have no predictor: the model then has an untrained one."""
        with data.errors_become(f"{path}: does not hold an I-JEPA"):
            state, sizes = data.read_jepa(path, heads=heads, predictor_heads=predictor_heads)
            model = cls(**sizes)  # with `center`, too, if the file is this script's
            if not any(name.startswith("predictor.") for name in state):  # keep the untrained one
                for name, tensor in model.predictor.state_dict().items():
                    state[f"predictor.{name}"] = tensor
            model.load_state_dict(state)
        return model


def center_targets(h):
    """This repository's targets, (B, N, D) -> (B, N, D), for B > 1. Subtracts from each token the
    mean of the batch at its position, then the mean of its image over all positions; then each of
    the D numbers gets variance 1 over all tokens of the batch.

    What is left cannot be guessed from the position, nor from what all patches of the image share,
    such as its color: it is how this patch differs from the rest of its image. To predict this for
    a masked patch, one must find out from the others which object is there, and how it lies.
    Linear probe after training, seeds 0, 1, 2: 0.752, 0.665, 0.647, with LayerNorm's targets 0.328,
    0.344, 0.296.
    """
    h = h - h.mean(dim=0, keepdim=True)  # what all images have in common at this position goes
    h = h - h.mean(dim=1, keepdim=True)  # what this image has in common at all positions goes
    return h / (h.std(dim=(0, 1)) + 1e-4)


class WithoutStopGradient(IJEPA):
    """The experiment --no-stop-grad: the trained encoder itself gives the targets, and the loss may
    change them, too, until they are easy to predict and empty. (Collapse: the encoder's outputs
    become nearly the same for all images, or differ in few directions only. center_targets does not
    prevent it: it scales the differences that are left up to variance 1, even if they are tiny, or
    the same in all D numbers.) The scores still use
    target_encoder, which here only follows the encoder; with --no-ema, it equals the encoder.
    To copy this, also copy: IJEPA, Encoder, Predictor, center_targets, take, Block, Attention, MLP,
    LayerNorm, PatchEmbed, patchify, sincos_2d.
    """

    def targets(self, images):
        return self.normalize(self.encoder(images))


# --------------------------------------------------------------------------------------- the masks


def multiblock_masks(B, grid, number=4, scale=(0.15, 0.2), aspect=(0.75, 1.5), min_keep=4):
    """The paper's masks of grid x grid patches: `number` target blocks, and as context a large
    block without the targets, with at least min_keep patches left (authors: 11, on larger grids)
    -> context_idx (B, n), target_idx (number, B, K), int64. UserError if they do not fit.

    The authors' code differs: it never uses the last row and column, one random number decides both
    area and aspect, and contexts are made equally large by dropping their last patches, the bottom.
    To copy this, also copy: rectangles.
    """
    for _ in range(50):  # trials
        # 1. The target blocks. They may overlap.
        targets = rectangles(B, grid, number=number, scale=scale, aspect=aspect)  # (B, number, N)
        # 2. The context block is a square of 85 to 100 % of the image, before rounding.
        context = rectangles(B, grid, number=1, scale=(0.85, 1.0), aspect=(1.0, 1.0))
        context = context[:, 0]  # (B, N)
        # 3. No context patch may be a target, else the predictor could copy.
        context = context & ~targets.any(dim=1)
        # 4. A batch needs contexts of equal size: the smallest in it decides.
        n = int(context.sum(dim=1).min())
        if n >= min_keep:
            # 5. Of each context keep n random patches: context + noise is at least 1 there and less
            # than 1 elsewhere, so the n largest are random patches of the context.
            noise = torch.rand(B, grid**2)
            context_idx = (context + noise).topk(n, dim=1).indices
            # 6. From booleans to indices: nonzero gives a row (block, image, patch) for each True,
            # sorted by block, then image.
            by_block = targets.transpose(0, 1)  # (number, B, N)
            patch = by_block.nonzero()[:, 2]  # (number * B * K,): each block has K patches
            return context_idx, patch.reshape(number, B, -1)
    raise UserError(f"{number} target blocks leave fewer than {min_keep} of {grid} x {grid} "
                    "patches as context; use a smaller --patch-size, or --masking random")


def rectangles(B, grid, number, scale, aspect):
    """-> (B, number, N) bool, N = grid * grid: blocks of patches, all of one size. The share of the
    image lies between the two numbers of `scale`, height / width between those of `aspect`; then
    both sides are rounded."""
    # empty(()) is a single number; uniform_ draws it from torch's generator, which `train` seeds.
    area = grid**2 * torch.empty(()).uniform_(*scale).item()  # height * width, in patches
    ratio = torch.empty(()).uniform_(*aspect).item()  # height / width
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    height = min(max(height, 1), grid)
    width = min(max(width, 1), grid)
    top = torch.randint(grid - height + 1, (B, number, 1))  # of each block; all are equally likely
    left = torch.randint(grid - width + 1, (B, number, 1))
    # A block is where both its row and its column are True (T). With top = 1, height = 2, left = 2
    # and width = 3:
    #                   columns  F F T T T F
    #            rows F          . . . . . .
    #                 T          . . # # # .
    #                 T          . . # # # .
    #                 F ...      . . . . . .
    i = torch.arange(grid)
    rows = (i >= top) & (i < top + height)  # (B, number, grid)
    columns = (i >= left) & (i < left + width)  # (B, number, grid)
    return (rows[:, :, :, None] & columns[:, :, None, :]).flatten(2)


def block_masks(B, grid, share=0.6, side=2):
    """This repository's masks: blocks of side x side patches at random positions mask a `share`
    of the grid x grid patches. These K patches are one target (M = 1); the rest is the context
    -> context_idx (B, n), target_idx (1, B, K), int64.

    To copy this, also copy: rectangles.
    """
    N = grid**2
    K = math.ceil(share * N)  # number of target patches
    # A block that covers all patches would leave nothing to chance: always the same target, below.
    if K >= N or side >= grid:
        raise UserError(f"masks of {share} of {N} patches leave no context, or are always the "
                        "same; use more patches")
    # 1. For each image N blocks, more than are needed. They may overlap.
    size = side**2 / N  # share of the image
    blocks = rectangles(B, grid, number=N, scale=(size, size), aspect=(1.0, 1.0))
    # 2. Imagine them placed one after another. `first` is, for each patch, the number of the first
    # block that covers it, from 0 on; N if none does. With first = 2, 0, 0, 5, ... patches 1 and 2
    # are covered first, then patch 0, then patch 3.
    block_number = torch.arange(N)[:, None]  # (N, 1); blocks is (B, N blocks, N patches)
    first = torch.where(blocks, block_number, N).amin(dim=1)  # (B, N patches)
    # 3. The K patches that are covered first are the target. The last block may be cut. (stable:
    # patches of one block stay in reading order.)
    order = first.argsort(dim=1, stable=True)
    return order[:, K:], order[None, :, :K]


def random_masks(B, N, share=0.6):
    """For comparison: a random `share` of the N patches is the target, the rest is the context
    -> context_idx (B, n), target_idx (1, B, K), int64."""
    K = math.ceil(share * N)  # number of target patches
    if K >= N:
        raise UserError(f"masks of {share} of {N} patches leave no context; use more patches")
    order = torch.rand(B, N).argsort(dim=1)  # for each image a random order of its patches
    return order[:, K:], order[None, :, :K]


def sample_masks(masking, B, grid, device):
    """masking "multiblock", "blocks" or "random"
    -> context_idx (B, n), target_idx (M, B, K), on the device.
    To copy this, also copy: multiblock_masks, block_masks, random_masks, rectangles.
    """
    if masking == "multiblock":
        context_idx, target_idx = multiblock_masks(B, grid)
    elif masking == "blocks":
        context_idx, target_idx = block_masks(B, grid)
    else:
        context_idx, target_idx = random_masks(B, grid**2)
    return context_idx.to(device), target_idx.to(device)


# ----------------------------------------------------------------------------- scores and pictures


@torch.no_grad()
def collapse(model, dataset, amp, n=500):
    """Two measures of collapse, of the features (n, D) of n test images.

    feature_std: after each image's features are scaled to length 1, the std over the images, then
    the mean over D. 0 if all are equal; at most about 1 / sqrt(D), as the squares of the D numbers
    of a vector of length 1 have the mean 1 / D.
    effective_rank: in how many directions the features differ. With s the singular values of the
    features minus their mean, and p = s / sum(s): e to the power of the entropy of p. If k of the
    values are equal and the others 0, it is k. At least 1, at most D and n - 1.
    To copy this, also copy: data.extract.
    """
    x = data.extract(model.features, dataset, dataset.test_images[:n], amp)  # (n, D)
    std = F.normalize(x, dim=1).std(dim=0)  # (D,)
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    entropy = torch.special.entr(share).sum()  # the sum of -share * log(share)
    return dict(feature_std=std.mean().item(), effective_rank=entropy.exp().item())


def put(x, index, values):
    """A copy of x (B, N, D) in which the tokens at index (B, n) are `values` (B, n, D)."""
    index = index[:, :, None].expand(-1, -1, x.shape[2])
    return x.scatter(1, index, values)


def draw_masks(model, dataset, out, args):
    """Each row: a test image | its context | its targets, a panel each; the rest is gray."""
    P = model.encoder.patch_size
    grid = model.encoder.grid
    images = dataset.test_images[:8].float() / 255
    torch.manual_seed(args.seed)
    context_idx, target_idx = sample_masks(args.masking, len(images), grid, images.device)
    patches = patchify(images, P)  # (8, N, P*P*3)
    gray = torch.full_like(patches, 0.5)
    panels = [images]
    for idx in [context_idx, *target_idx]:
        panels.append(unpatchify(put(gray, idx, take(patches, idx)), P))
    sheet = torch.stack(panels, dim=1).flatten(0, 1)
    data.save_png(out / "masks.png", sheet, columns=len(panels))
    return ["masks.png"]


@torch.no_grad()
def draw_predictions(model, dataset, out, args, amp):
    """8 test images, four panels each:
    1. the image,
    2. its context, the rest gray,
    3. in place of each target patch, a patch of the training images: of all patches of 500 images,
       the one whose representation is nearest to the predicted vector,
    4. the same with the true target vector: what a perfect predictor would give."""
    P = model.encoder.patch_size
    grid = model.encoder.grid
    images = dataset.normalize(dataset.test_images[:8])
    others = dataset.normalize(dataset.train_images[:500])
    torch.manual_seed(args.seed)
    context_idx, target_idx = sample_masks(args.masking, len(images), grid, images.device)
    with amp:
        _, predictions = model.loss(images, context_idx, target_idx)
        # All in one batch, (508, N, D): center_targets subtracts the batch's means, and what is
        # compared must be normalized together.
        h = model.targets(torch.cat([images, others]))
    truth = h[:len(images)]
    # All patches of the other images, and their representations.
    representations = h[len(images):].flatten(0, 1)  # (500 * N, D)
    candidates = patchify(dataset.denormalize(others), P).flatten(0, 1)  # (500 * N, P*P*3)

    def nearest(z):
        """(8, K, D) -> (8, K, P*P*3): the patches whose representations are nearest."""
        index = torch.cdist(z.flatten(0, 1), representations).argmin(dim=1)
        return candidates[index].unflatten(0, z.shape[:2])

    original = dataset.denormalize(images)
    patches = patchify(original, P)
    gray = torch.full_like(patches, 0.5)
    context = put(gray, context_idx, take(patches, context_idx))
    predicted = context
    best = context
    for idx, pred in zip(target_idx, predictions):
        predicted = put(predicted, idx, nearest(pred))
        best = put(best, idx, nearest(take(truth, idx)))
    panels = [original, unpatchify(context, P), unpatchify(predicted, P), unpatchify(best, P)]
    sheet = torch.stack(panels, dim=1).flatten(0, 1)
    data.save_png(out / "predictions.png", sheet, columns=8)  # two images, four panels each
    return ["predictions.png"]


def draw_collapse(out, args):
    """How both measures of collapse change during this run, and during those of --compare."""
    folders = [out, *args.compare]
    data.compare_logs(out / "collapse.svg", folders, ["effective_rank", "feature_std"], x="step",
                      xlabel="step", ylabel="share of the first value", relative=True)
    return ["collapse.svg"]


# ---------------------------------------------------------------------------------------- training

SIZES = {  # B, L, H and g are the paper's; a predictor has as many heads as its encoder
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4,
                 predictor_dim=64, predictor_depth=2),
    "T": dict(patch_size=4, dim=192, depth=12, heads=3,
              predictor_dim=384, predictor_depth=6),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6,
              predictor_dim=384, predictor_depth=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12,
              predictor_dim=384, predictor_depth=6),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16,
              predictor_dim=384, predictor_depth=12),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16,
              predictor_dim=384, predictor_depth=12),
    "g": dict(patch_size=16, dim=1408, depth=40, heads=16, mlp_ratio=48 / 11,  # MLP: 6144
              predictor_dim=384, predictor_depth=16),
}


def parse_args(argv=None):
    number = data.number
    parser = data.Parser(__doc__)
    data.common_options(parser, "jepa", SIZES, steps=1600, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=number(int, 0))
    parser.add("--weight-decay", 0.05, "The weight decay of matrices and of the mask token.",
               type=number(float, 0, 10))
    parser.add("--augment", "light", "Changes of training images; light: random shift and flip.",
               choices=["none", "light"])
    parser.add("--masking", None, "What is masked; multiblock: the paper's large blocks; blocks: "
               "smaller ones; random: single patches. Without it, blocks for --size tiny, and "
               "multiblock for the others.",
               choices=["multiblock", "blocks", "random"])
    parser.add("--center", True, "The targets are centered, by position and by image; with "
               "--no-center they get the authors' LayerNorm.",
               action=argparse.BooleanOptionalAction)
    parser.add("--ema", 0.99, "The momentum of the target encoder in the first step.",
               type=number(float, 0, 1))
    parser.add("--last-ema", 0.999, "The momentum of the target encoder in the last step.",
               type=number(float, 0, 1))
    parser.add("--no-ema", False, "The target encoder is a copy of the encoder, not an average.",
               action="store_true")
    parser.add("--no-stop-grad", False, "The trained encoder gives the targets itself, so that the "
               "features can collapse.",
               action="store_true")
    parser.add("--compare", [], "The --out folders of other runs; collapse.svg shows them, too.",
               nargs="+")
    parser.add("--predictor-dim", None, "The width of the predictor, if not that of --size.",
               type=number(int, 1, 65536))
    parser.add("--predictor-depth", None, "The number of layers of the predictor, if not that of "
               "--size.",
               type=number(int, 1, 65536))
    args = data.parse(parser, "jepa", SIZES, argv)  # --size fills in what is None
    if args.masking is None:
        args.masking = "blocks" if args.size == "tiny" else "multiblock"
    for folder in args.compare:
        if not (pathlib.Path(folder) / "log.csv").is_file():
            raise UserError(f"--compare {folder}: not the --out folder of a run of jepa.py")
    if args.predictor_dim % 4 or args.predictor_dim % args.heads:
        raise UserError(f"--predictor-dim {args.predictor_dim} must be a multiple of 4 and of "
                        f"--heads {args.heads}")
    if args.center and args.batch_size < 8:
        raise UserError(f"--batch-size {args.batch_size} is too small for centered targets, "
                        "which subtract the mean of the batch; use 8 or more, or --no-center")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_momentum(step, args):
    """The momentum of the target encoder: linear from --ema to --last-ema."""
    if args.no_ema:
        return 0.0
    progress = step / args.steps  # from 0 towards 1
    return args.ema + (args.last_ema - args.ema) * progress


def build(args):
    """A new model with the sizes in the options."""
    Model = WithoutStopGradient if args.no_stop_grad else IJEPA
    return Model(image_size=args.image_size, patch_size=args.patch_size,
                 dim=args.dim, depth=args.depth, heads=args.heads,
                 mlp_ratio=getattr(args, "mlp_ratio", 4.0),  # only size g has another one
                 predictor_dim=args.predictor_dim, predictor_depth=args.predictor_depth,
                 center=args.center)


def train(args):
    """Trains a model, scores it, draws the pictures; returns the scores. --load: no training."""
    # Set-up: device, data, model, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    if args.load:
        model = IJEPA.from_pretrained(args.load)
        args.steps = 0
        args.patch_size = model.encoder.patch_size
        args.image_size = model.encoder.grid * args.patch_size
        # Images are normalized as in the training of the file.
        args.mean, args.std = data.statistics(args.load)
    dataset = data.open_data(args, device)
    torch.manual_seed(args.seed)
    if not args.load:
        model = build(args)
    model.to(device)
    # Everything is trained except the target encoder and the position tables.
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]  # and the mask token
    vectors = [p for p in trained if p.ndim == 1]  # biases and norms: without weight decay
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type != "mps")
    start, scores = data.resume(args, "jepa", model=model, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="jepa", model=model.state_dict(),
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
        grid = model.encoder.grid
        context_idx, target_idx = sample_masks(args.masking, len(images), grid, device)
        with amp:
            loss, _ = loss_function(images, context_idx, target_idx)
        optimizer.zero_grad()
        loss.backward()
        # One bad batch can give a huge gradient: scale all gradients down if their norm exceeds 1.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.check(step, loss, norm)  # waits for both numbers; not finite: the run ends
        optimizer.step()
        model.update_target(ema_momentum(step, args))
        scores = progress.scores(images_seen=(step + 1) * len(images))
        if step % 50 == 0 or step + 1 == args.steps:  # rarely: it takes features of 500 images
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=scores["loss"],
                     lr=lr, **collapse(model, dataset, amp))
        if progress.due(step):
            save(step + 1, scores)

    # Scores and pictures.
    model.eval()
    scores |= collapse(model, dataset, amp)
    untrained = data.untrained(model, args.seed)
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    last_four = functools.partial(model.features, last=4)
    scores["probe_last_four"] = data.linear_probe(*data.both_sets(last_four, dataset, amp))
    files = draw_masks(model, dataset, out, args)
    files += draw_predictions(model, dataset, out=out, args=args, amp=amp)
    if not args.load:
        files += draw_collapse(out, args)
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
