"""Vision Transformer (ViT): "An Image is Worth 16x16 Words", Dosovitskiy et al. 2021, 2010.11929.

Cut an image into patches and make each patch a token by one linear map: the rest is a Transformer
encoder that is not made for images. What a convolution has built in (neighbors matter, a shifted
object is the same object), this encoder must learn from labeled images, so it needs many of them.

    loss = cross_entropy(head(class token of norm(blocks([class; patches E] + positions))), label)

E is the linear map of the patches, and [a; b] puts a before b, as in the paper's equation 1.

    python vit.py                                      # the default data set, "shapes"
    python vit.py --data cifar10 --steps 17000         # 19 minutes on a CPU with AMX
    python vit.py --init out/mae/checkpoint.pt --out out/tuned    # fine-tune a trained encoder
    python vit.py --train-images 1000 --out out/few    # train on few images; compare with a CNN

Default run, seed 0, 26 minutes on one older core (4:28 on two newer): test accuracy 0.940. Linear
probes (linear classifiers on fixed features): of the untrained network 0.302, of raw pixels 0.326.

Differences from the paper:
1. The learned position table starts as MAE's fixed sin-cos table of rows and columns, so it need
   not learn what is near what. Accuracy after 600 steps, seeds 0, 1, 2: 0.556, 0.458, 0.429; with
   small random numbers as the start, as in the authors' code, 0.303, 0.230, 0.453.
2. For small images and little data: random shifts, no crops; label smoothing; weight decay 0.05, on
   matrices alone.
3. No dropout anywhere, and the head is one linear layer, as in later recipes (DeiT, MAE).
"""

import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Block, LayerNorm, PatchEmbed, gelu_tanh, patchify, sincos_2d
from data import UserError

# --------------------------------------------------------------------------------------- the model


class ViT(nn.Module):
    """images (B, 3, H, H), normalized -> logits (B, K); the features if num_classes is 0.

    class_token=False: the features are the mean of the patches. tanh_gelu=True: the approximate
    GELU, for Google's released weights.
    To copy this, also copy: Block, Attention, MLP, LayerNorm, PatchEmbed, gelu_tanh, patchify,
    sincos_2d, data.resize_table.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 num_classes=10, class_token=True, tanh_gelu=False):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.tanh_gelu = tanh_gelu
        self.extra = 1 if class_token else 0  # row 0 of the position table is the class token's
        act = gelu_tanh if tanh_gelu else F.gelu

        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + self.grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, act=act) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.set_head(num_classes)
        self.init_weights()

    def set_head(self, num_classes):
        """A new head, all zero: the first loss is then log K exactly. (In the first step only the
        head learns: the gradient reaches the layers below it through the head's weights, which are
        still 0.) 0 classes: no head."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(len(self.norm.weight), num_classes)
            self.head.to(self.norm.weight)  # its device and number format
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def init_weights(self):
        """Google's: Xavier for the matrices of the blocks; for the patch projection LeCun's, std =
        1 / sqrt(inputs); zero for the head, the class token and most biases. Ours: positions, see
        difference 1 above."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # Xavier's range depends on the shape of a matrix, and qkv.weight holds three of (D, D):
            # initialize each by itself. A chunk is a view, so this writes into qkv.weight.
            for matrix in block.attn.qkv.weight.chunk(3):  # (D, D)
                nn.init.xavier_uniform_(matrix)
            nn.init.normal_(block.mlp.fc1.bias, std=1e-6)  # as good as zero, as in Google's code
            nn.init.normal_(block.mlp.fc2.bias, std=1e-6)
        numbers = 3 * self.patch_size**2  # in a patch
        nn.init.normal_(self.patch_embed.proj.weight, std=numbers ** -0.5)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.zeros_(self.pos_embed)
        self.pos_embed[0, self.extra:] = sincos_2d(self.pos_embed.shape[2], self.grid)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if isinstance(self.head, nn.Linear):  # the first loop above has filled it, too
            nn.init.zeros_(self.head.weight)

    def embed(self, images):
        """The five steps of the slides: (B, 3, H, H) -> (B, 1 + N, D), class token first. Without
        class token it is N, not 1 + N, here and in all shapes below."""
        side = self.grid * self.patch_size
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(images.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        # 1. Divide image into P x P patches.
        # 2. Create sequence of length N = HW / P^2.
        # 3. Flatten the patches ...
        x = patchify(images, self.patch_size)  # (B, N, P*P*3): 16 * 16 * 3 = 768 for P = 16
        # ... and map to D dimensions with a trainable linear projection. (Its matrix is stored in
        # the shape of a convolution's weight, (D, 3, P, P), as in the released files.)
        x = self.patch_embed(x)  # (B, N, D)
        # 4. Add a learned 1-D position embedding: a table with a row for each index of a sequence.
        # (Here it starts with values that tell rows and columns, difference 1.)
        x = x + self.pos_embed[:, self.extra:]
        # 5. Include a learnable [class] embedding. It has a position embedding, too.
        if self.cls_token is not None:
            cls_token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        return x

    def tokens(self, images):
        """(B, 3, H, H) -> (B, 1 + N, D): the five steps, then the Transformer encoder."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images):
        """(B, 3, H, H) -> (B, D): the class token, or the mean of the patches if there is none."""
        x = self.tokens(images)
        if self.cls_token is None:
            return x.mean(dim=1)
        return x[:, 0]

    def forward(self, images):
        return self.head(self.features(images))  # (B, K)

    def loss(self, images, targets, label_smoothing=0.0):
        """-> (cross-entropy, logits (B, K)); targets: classes (B,) or probabilities (B, K)."""
        logits = self(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
        return loss, logits

    def adapt(self, num_classes=None, image_size=None):
        """For fine-tuning (section 3.2). num_classes: a new head. image_size: the position table is
        interpolated to the new number of patches (bicubic, as in timm; Google's code: bilinear);
        UserError if patches do not divide image_size. Class token and last norm are kept. (MAE's
        authors take the mean of the patches and a new norm instead.)"""
        if image_size is not None:
            if image_size % self.patch_size:
                raise UserError(f"patches of {self.patch_size} pixels do not divide images of "
                                f"{image_size}; change --image-size")
            self.grid = image_size // self.patch_size
            table = data.resize_table(self.pos_embed.detach(), self.grid, extra=self.extra)
            self.pos_embed = nn.Parameter(table)
        if num_classes is not None:
            self.set_head(num_classes)

    @classmethod
    def from_pretrained(cls, path, num_classes=None, image_size=None, heads=None):
        """From a vit, mae or jepa checkpoint of this repository, or a file of timm (state dict),
        Google (.npz), MAE, I-JEPA (target encoder) or DINOv2; else UserError. num_classes and
        image_size: see `adapt`. heads: the number of attention heads, which a released file does
        not store; None: the usual number for its width D, such as 12 for 768."""
        with data.errors_become(f"{path}: does not hold a ViT encoder"):
            state, sizes = data.read_encoder(path, heads=heads)
            model = cls(**sizes)
            data.load_weights(model, state)
        model.adapt(num_classes, image_size)
        return model


# ------------------------------------------------------------------------------ scores and pictures


@torch.no_grad()
def attention_maps(model, images):
    """(B, 3, H, H) -> (layers, B, h, 1 + N, 1 + N): how much each token attends to each."""
    maps = []
    x = model.embed(images)
    for block in model.blocks:
        _, weights = block.attn(block.norm1(x), return_weights=True)
        maps.append(weights)
        x = block(x)
    return torch.stack(maps)


def attention_distance(maps, patch_size):
    """Figure 7 right: the mean distance in pixels from a patch to all patches, weighted by how much
    it attends to each; (layers, B, h, 1 + N, 1 + N) -> (layers, h)."""
    # The side of the grid. isqrt rounds down: it is n for n^2 tokens, and with a class token, too.
    n = math.isqrt(maps.shape[-1])
    # Leave out the class token, which is nowhere in the image. Scale the rest to the sum 1 again.
    maps = maps[..., -n * n:, -n * n:]
    maps = maps / maps.sum(dim=-1, keepdim=True)
    steps = torch.arange(n, dtype=maps.dtype, device=maps.device) * patch_size
    corners = torch.cartesian_prod(steps, steps)  # of the patches, in reading order, (N, 2)
    distance = torch.cdist(corners, corners)  # (N, N)
    by_patch = (maps * distance).sum(dim=-1)  # (layers, B, h, N)
    return by_patch.mean(dim=(1, 3))


def rollout(maps):
    """Attention rollout (Abnar and Zuidema 2020): how much of each patch reaches the features,
    (layers, B, h, 1 + N, 1 + N) -> (B, 1, n, n), one number for each patch of the n x n grid; the
    largest of an image is 1."""
    identity = torch.eye(maps.shape[-1], device=maps.device)
    # flow[i, j] of an image: how much of token j of the input is in token i, so far.
    flow = identity
    for layer in maps.mean(dim=2):  # the heads' mean, (B, 1 + N, 1 + N)
        # Rollout assumes that half of a token comes through the attention, half past it, along the
        # residual path.
        flow = ((layer + identity) / 2) @ flow  # (B, 1 + N, 1 + N)
    n = math.isqrt(maps.shape[-1])
    if maps.shape[-1] == n * n:  # no class token: the features are the mean of the patches
        flow = flow.mean(dim=1)
    else:
        flow = flow[:, 0, 1:]  # how much of each patch is in the class token
    flow = flow.reshape(-1, 1, n, n)
    return flow / flow.amax(dim=(2, 3), keepdim=True)


def stretch(images):
    """(B, 3, H, W) -> the same, each image with values from 0 to 1."""
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def draw_filters(model, out):
    """Figure 7 left: as in the paper, the first 28 principal components of the D filters of the
    patch embedding. (A filter is the weights that make one number of a token from the pixels.)"""
    weight = model.patch_embed.proj.weight  # (D, 3, P, P)
    filters = (weight - weight.mean(dim=0)).flatten(1)
    # The rows of Vh are the principal components, the most important first: (.., 3*P*P).
    components = torch.linalg.svd(filters, full_matrices=False).Vh
    images = components[:28].unflatten(1, weight.shape[1:])
    data.save_png(out / "filters.png", stretch(images), columns=7)


@torch.no_grad()
def draw_positions(model, out):
    """Figure 7 center: one tile for each patch, the cosine similarity of its position embedding
    with those of all patches. In the paper's figure, training has made the rows and columns that
    one sees; a new model here has them from the start (difference 1). The mean embedding is
    subtracted first: what all have in common would make them all similar. In each tile, the
    smallest value is black and the largest white."""
    table = model.pos_embed[0, model.extra:]  # (N, D)
    table = F.normalize(table - table.mean(dim=0), dim=1)
    similarity = table @ table.T  # (N, N)
    # Row i of it is the tile of patch i, in gray: three equal channels.
    tiles = similarity.reshape(-1, 1, model.grid, model.grid).expand(-1, 3, -1, -1)
    data.save_png(out / "positions.png", stretch(tiles), columns=model.grid)


def draw_attention_distance(model, dataset, out):
    """Figure 7 right: one dot for each head of each layer, the mean over 128 test images."""
    distances = []
    for images in dataset.normalize(dataset.test_images[:128]).split(8):
        maps = attention_maps(model, images)
        distances.append(attention_distance(maps, model.patch_size))
    distances = torch.stack(distances).mean(dim=0)  # (layers, h)
    series = {}
    for i, by_layer in enumerate(distances.T.tolist(), start=1):
        series[f"head {i}"] = list(enumerate(by_layer, start=1))  # (layer, distance)
    data.save_chart(out / "attention_distance.svg", series, "layer",
                    "mean attention distance (pixels)", lines=False)


def draw_rollout(model, dataset, out):
    """Eight test images; below each, the same image, darker where less of it reaches the
    features."""
    images = dataset.test_images[:8]
    light = rollout(attention_maps(model, dataset.normalize(images)))  # (8, 1, n, n)
    # From one number a patch to one number a pixel.
    light = F.interpolate(light, images.shape[2:], mode="bilinear")
    images = images.float() / 255
    data.save_png(out / "rollout.png", torch.cat([images, images * light]), columns=8)


def draw(model, dataset, out):
    """The slide "ViT: Visualizing Internals" (figure 7) and rollout; returns the files' names."""
    draw_filters(model, out)
    draw_positions(model, out)
    draw_attention_distance(model, dataset, out)
    draw_rollout(model, dataset, out)
    return ["filters.png", "positions.png", "attention_distance.svg", "rollout.png"]


def score_classifier(classifier, dataset, amp):
    """The share of the test images whose largest logit is that of their class.
    To copy this, also copy: data.extract.
    """
    logits = data.extract(classifier, dataset, dataset.test_images, amp)
    return (logits.argmax(dim=1) == dataset.test_labels).float().mean().item()


# ---------------------------------------------------------------------------------------- training

# B, L and H are the paper's; Ti and S come from DeiT; tiny is ours, for small images. The slide's
# "MLP size" is 4 * dim in each.
SIZES = {
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4),
    "Ti": dict(patch_size=16, dim=192, depth=12, heads=3),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16),
}


def parse_args(argv=None):
    number = data.number
    parser = data.Parser(__doc__)
    data.common_options(parser, "vit", SIZES, steps=1700, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=number(int, 0))
    parser.add("--weight-decay", 0.05, "The weight decay of all weight matrices.",
               type=number(float, 0, 10))
    parser.add("--label-smoothing", 0.1, "This share of a target is spread over all classes.",
               type=number(float, 0, 0.99))
    parser.add("--augment", "light", "Changes of training images; light: random shift and flip; "
               "strong: also mixup or cutmix, and random erasing.",
               choices=["none", "light", "strong"])
    parser.add("--train-images", None, "Train on this number of images only, and train a small CNN "
               "on them for comparison.", type=number(int, 20))
    parser.add("--init", None, "Fine-tune this vit, mae, jepa or released file with a new head.")
    parser.add("--normalize", None, "How images of --load or --init are normalized. half: mean and "
               "std 0.5; imagenet: those of ImageNet; openai: those of CLIP. Released files "
               "do not tell, so without it: half if there is a head, as in most ViTs, else "
               "imagenet, as in MAE and DINOv2. Exceptions: DeiT (imagenet), and ViTs whose head "
               "was removed (half).",
               choices=list(data.NORMALIZE))
    parser.add("--layer-decay", 1.0, "Each layer's learning rate is this factor times that of the "
               "next layer, nearer to the output; 1: all are equal.", type=number(float, 0, 1))
    args = data.parse(parser, "vit", SIZES, argv)
    if args.load and args.init:
        raise UserError("--load does not train, so --init has no use; leave out one of them")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def layer_groups(model, args):
    """Two optimizer groups a layer; "scale" is the factor of its learning rate.

    With --layer-decay 0.5 and two blocks: norm and head 1, blocks.1 0.5, blocks.0 0.25, patch
    projection, positions and class token 0.125. A trained encoder's first layers change least.
    """
    first = [*model.patch_embed.parameters(), model.pos_embed]
    if model.cls_token is not None:
        first.append(model.cls_token)
    last = [*model.norm.parameters(), *model.head.parameters()]
    middle = [list(block.parameters()) for block in model.blocks]
    layers = [first, *middle, last]
    groups = []
    for i, layer in enumerate(layers):
        scale = args.layer_decay ** (len(layers) - 1 - i)
        # Weight decay is for matrices (the patch projection has 4 dimensions), not for biases,
        # norms, class token and position table (the last two have 3).
        matrices = [p for p in layer if p.ndim in (2, 4)]
        others = [p for p in layer if p.ndim not in (2, 4)]
        groups.append(dict(params=matrices, scale=scale, weight_decay=args.weight_decay))
        groups.append(dict(params=others, scale=scale, weight_decay=0.0))
    return groups


def build(args):
    """A new model with the sizes in the options. class_names are put into args by open_data."""
    return ViT(image_size=args.image_size, patch_size=args.patch_size,
               dim=args.dim, depth=args.depth, heads=args.heads,
               num_classes=len(args.class_names))


def read_model(args):
    """The model of --load or --init. Changes args: they get the model's sizes, and how its images
    are normalized. With --init, --image-size keeps its value: `train` adapts the model to it."""
    path = args.load or args.init
    checkpoint = pathlib.Path(args.out) / "checkpoint.pt"
    if args.init and args.resume and checkpoint.exists():
        # A fine-tuning that goes on: its own checkpoint has sizes and normalization, too, and the
        # file of --init may be gone by now. (The weights come later, from data.resume.)
        path = checkpoint
    model = ViT.from_pretrained(path)
    args.patch_size = model.patch_size
    args.dim = len(model.norm.weight)
    args.depth = len(model.blocks)
    # Images are normalized as in the training of the file, unless --normalize says how.
    if args.normalize is None:
        args.mean, args.std = data.statistics(path)
    else:
        args.mean, args.std = data.NORMALIZE[args.normalize]
    # The checkpoint's args also need heads and GELU: the shapes of the weights do not tell them.
    args.heads = model.blocks[0].attn.heads
    args.tanh_gelu = model.tanh_gelu
    if args.load:
        args.steps = 0
        args.image_size = model.grid * model.patch_size
    return model


def train(args):
    """Trains a model, scores it, draws the pictures; returns the scores. --load: no training."""
    # Set-up: device, data, model, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    if args.load or args.init:
        model = read_model(args)  # first: open_data needs the sizes and normalization it finds
    dataset = data.open_data(args, device)
    K = len(dataset.class_names)
    if args.train_images:  # for the model, the small CNN, and the probes below
        dataset.train_images = dataset.train_images[:args.train_images]
        dataset.train_labels = dataset.train_labels[:args.train_images]
    torch.manual_seed(args.seed)
    if args.init:
        model.adapt(K, args.image_size)  # a trained encoder, a new head
    elif not args.load:  # a new one
        model = build(args)
    model.to(device)
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    optimizer = torch.optim.AdamW(layer_groups(model, args), fused=device.type != "mps")
    # Without --resume: start is 0, scores is {}, and model and optimizer stay as they are.
    start, scores = data.resume(args, "vit", model=model, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="vit", model=model.state_dict(),
                             optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    # Training.
    progress = data.Progress(args, start, scores)
    for step in progress:
        # Each step of each run has its own seed: a resumed run goes on exactly as without a stop.
        torch.manual_seed(args.seed * 1_000_003 + step)
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed)
        index = index.to(device)
        images = dataset.train_images[index]
        targets = dataset.train_labels[index]
        if args.augment != "none":
            images = data.augment(images)
        images = dataset.normalize(images)
        if args.augment == "strong":  # the target of a mixed image is two classes in part
            images, targets = data.mixup_or_cutmix(images, F.one_hot(targets, K).float())
            images = data.random_erasing(images)
        with amp:
            loss, _ = loss_function(images, targets, args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        # One bad batch can give a huge gradient: scale all gradients down if their norm exceeds 1.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.check(step, loss, norm)  # waits for both numbers; not finite: the run ends
        optimizer.step()
        scores = progress.scores(images_seen=(step + 1) * len(images))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=scores["loss"],
                     lr=lr)
        if progress.due(step):
            save(step + 1, scores)

    # Scores and pictures.
    model.eval()
    # The accuracy needs a head for these classes. A model trained here has it: args.load is None,
    # and has_classes(None) True. A file of --load may have none, or one for other classes.
    if model.num_classes == K and data.has_classes(args.load, dataset):
        scores["accuracy"] = score_classifier(model, dataset, amp)
    if args.train_images:
        scores["cnn"] = score_classifier(data.train_cnn(dataset, args.seed), dataset, amp)
    untrained = data.untrained(model, args.seed)  # a copy with new weights, for comparison
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    files = draw(model, dataset, out)
    if not args.load:
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
