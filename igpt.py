"""Image GPT (iGPT): "Generative Pretraining from Pixels", Chen et al. 2020, ICML.

GPT-2 for images. A token is a pixel in the nearest color of a palette, 256 tokens at 16 x 16. A
Transformer reads them as one long row and predicts each pixel from those before it; so its inner
layers find out what is in the image, and become features that a linear classifier can use.

    L_gen = - mean over pixels i of log p(x_i | x_0, ..., x_{i-1})

    python igpt.py                                    # the default data set, "shapes", at 16 x 16
    python igpt.py --objective bert --out out/bert    # predict 15 % masked pixels from the others
    python igpt.py --finetune out/igpt/checkpoint.pt --steps 1500 --out out/tuned    # with labels
    python igpt.py --load pytorch_model.bin --palette kmeans_centers.npy

Default run, seed 0, 13 minutes on one older core (3:40 on two newer): 0.208 nats per pixel (1.870
for a model that knows only how frequent each color is); linear probe of the best layer, 2 of 8:
0.410 (untrained 0.264, raw pixels 0.331). Seed 1, with other images: 0.332 (raw pixels 0.350).

Differences from the paper:
1. 256 tokens (theirs: 1,024 or more), 8 colors (theirs: 512): so even a short run learns shapes.
2. The palette is k-means of this data set's pixels (of which pixels theirs is, is not published).
3. Images are shifted and flipped; gradients are clipped at norm 1, as in all six scripts.
   Fine-tuning has pre-training's learning rate and cosine (theirs: searched, no cosine).
4. The position table is trained, but starts as MAE's sin-cos table of rows and columns (theirs:
   random). The root mean square of its numbers is 0.7; so token_embed and start, to which it is
   added, have std 0.5 at first: with 0.02, as theirs, the color would hardly count in the sum.
"""

import functools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Block, Cache, quick_gelu, sincos_2d
from data import UserError

# --------------------------------------------------------------------------------------- the model


class ImageGPT(nn.Module):
    """tokens (B, N) int64, each one of K colors, N = H * H -> logits (B, N, K).

    logits[:, i] predicts token i. With objective "ar" (autoregressive) the model sees the tokens
    before i, with "bert" all tokens but the masked ones: pass `keep`, see random_keep.
    To copy this, also copy: Block, Attention, MLP, LayerNorm, Cache, quick_gelu, sincos_2d.
    """

    def __init__(self, image_size=16, dim=64, depth=8, heads=4, mlp_ratio=4.0, num_colors=8,
                 num_classes=10, objective="ar"):
        super().__init__()
        if objective not in ("ar", "bert"):
            raise ValueError(f'objective {objective!r}: it must be "ar" (autoregressive) or "bert"')
        self.image_size = image_size
        self.objective = objective
        self.token_embed = nn.Embedding(num_colors, dim)
        self.start = nn.Parameter(torch.zeros(dim))  # stands before the first pixel; no color
        self.pos_embed = nn.Parameter(torch.zeros(image_size**2, dim))  # see init_weights

        # OpenAI's layer norm subtracts no mean and has no bias: it is today's RMSNorm,
        # x / sqrt(mean(x^2) + eps) * gain.
        norm = functools.partial(nn.RMSNorm, eps=1e-5)
        # Slide "Image GPT - Transformer Layer": the norm stands before attention and MLP, as in
        # GPT-2. That is what Block does by default. Different from GPT-2: RMSNorm, no biases, and
        # the activation x * sigmoid(1.702 x), quick_gelu.
        is_causal = objective == "ar"
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=mlp_ratio, bias=False, act=quick_gelu, norm=norm,
                  causal=is_causal) for _ in range(depth))
        self.norm = norm(dim)
        self.head = nn.Linear(dim, num_colors, bias=False)  # GPT-2 takes token_embed's
        self.classifier = nn.Linear(dim, num_classes, bias=False)  # for fine-tuning alone
        # red, green, blue from -1 to 1; all zeros: not set yet, see fit_palette
        self.register_buffer("palette", torch.zeros(num_colors, 3))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's, except for pos_embed, token_embed and start (difference 4)."""
        depth = len(self.blocks)
        dim = self.pos_embed.shape[1]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=dim**-0.5)  # outputs as large as inputs
            # Smaller with more layers, since each one's output is added to the same sum. (OpenAI
            # does this for attention alone: the MLP's output keeps 0.02.)
            nn.init.normal_(block.attn.proj.weight, std=(dim * depth) ** -0.5)
        nn.init.zeros_(self.head.weight)  # all logits are 0: the first loss is log K exactly
        nn.init.zeros_(self.classifier.weight)
        nn.init.normal_(self.token_embed.weight, std=0.5)
        nn.init.normal_(self.start, std=0.5)
        self.pos_embed.copy_(sincos_2d(dim, self.image_size))

    def encode(self, images):
        """(B, 3, H, H) in 0..1 -> tokens (B, N): the nearest color of each pixel, row by row."""
        x = images.flatten(2).transpose(1, 2)  # (B, N, 3)
        x = x * 2 - 1  # the scale of the palette
        # Probes call this under autocast; but bfloat16 would mix up similar colors.
        with torch.autocast(x.device.type, enabled=False):
            # |x - c|^2 = |x|^2 - 2 x c + |c|^2; here without |x|^2, the same for all colors c.
            distance = self.palette.square().sum(dim=1) - 2 * x @ self.palette.T  # (B, N, K)
        return distance.argmin(dim=-1)

    def decode(self, tokens):
        """tokens (B, N) -> images (B, 3, H, H) in 0..1."""
        x = (self.palette[tokens] + 1) / 2  # (B, N, 3)
        return x.transpose(1, 2).unflatten(2, (self.image_size, self.image_size))

    def embed(self, tokens, keep=None):
        """tokens (B, N) -> what the first layer reads, (B, N, D)."""
        x = self.token_embed(tokens)  # (B, N, D)
        if self.objective == "ar":
            # Shift by one: position i holds pixel i - 1, and its output predicts pixel i.
            start = self.start.expand(len(x), 1, -1)
            x = torch.cat([start, x[:, :-1]], dim=1)
        elif keep is not None:
            # The paper has no <mask> token: a masked pixel's embedding is zero, and only its
            # position remains.
            x = x * keep[:, :, None]
        return x + self.pos_embed

    def hidden(self, tokens, keep=None):
        """tokens (B, N) -> the last layer's output, normalized, (B, N, D)."""
        x = self.embed(tokens, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens, keep=None):
        """keep (B, N), for "bert" alone: 1 for visible and 0 for masked pixels."""
        return self.head(self.hidden(tokens, keep))  # (B, N, K)

    def loss(self, tokens, labels=None, keep=None):
        """Returns (loss, the logits of forward). The loss is L_gen in nats per pixel; with labels
        (B,), for fine-tuning, it is L_gen + L_clf.

        keep (B, N), for "bert" alone: L_gen is the mean over each image's masked pixels (keep = 0).
        """
        x = self.hidden(tokens, keep)  # (B, N, D)
        logits = self.head(x).float()  # (B, N, K)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        nats = nats.reshape(tokens.shape)  # (B, N)
        if keep is not None:
            masked = 1 - keep
            count = masked.sum(dim=1).clamp(min=1)  # an image may have none: it counts as 0
            nats = (nats * masked).sum(dim=1) / count  # (B,)
        loss = nats.mean()  # L_gen
        if labels is not None:
            class_logits = self.classifier(x.mean(dim=1)).float()  # (B, number of classes)
            loss = loss + F.cross_entropy(class_logits, labels)  # L_clf
        return loss, logits

    def features(self, tokens, layer):
        """tokens (B, N) -> (B, D), the paper's section 2.4: the first `layer` layers (0: none),
        then the norm that comes next: norm1 of the following layer, or the final norm. Then the
        mean over the N positions."""
        x = self.embed(tokens)
        for block in self.blocks[:layer]:
            x = block(x)
        if layer == len(self.blocks):
            x = self.norm(x)
        else:
            x = self.blocks[layer].norm1(x)
        return x.mean(dim=1)

    @torch.no_grad()
    def sample(self, given, temperature=1.0, top_k=None, generator=None):
        """given (B, n): the first n tokens, n from 0 to N -> (B, N), the others drawn one by one.
        For "ar" alone. Caches keep the earlier keys and values, so a pass reads only new tokens."""
        if self.objective != "ar":
            raise ValueError('a "bert" model sees later pixels, so it cannot be sampled in order')
        B, n = given.shape
        N = len(self.pos_embed)
        if n == N:
            return given
        caches = [Cache(N) for _ in self.blocks]

        # The first pass: the start vector and all given pixels at once.
        start = self.start.expand(B, 1, -1)
        x = torch.cat([start, self.token_embed(given)], dim=1)  # (B, n + 1, D)
        x = x + self.pos_embed[:n + 1]
        logits = self.next_logits(x, caches)
        token = self.draw_token(logits, temperature, top_k, generator)  # pixel n, (B, 1)
        tokens = [given, token]  # the caches now hold the start vector and pixels 0 to n - 1

        # The others: each pass reads one pixel, the last drawn one, and draws the next.
        for i in range(n + 1, N):
            # token is pixel i - 1. As in embed, it stands at position i, to predict pixel i.
            x = self.token_embed(token) + self.pos_embed[i]  # (B, 1, D)
            logits = self.next_logits(x, caches)
            token = self.draw_token(logits, temperature, top_k, generator)
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    def next_logits(self, x, caches):
        """x (B, new, D), the embedded new tokens -> logits (B, K) of the token after them."""
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache=cache)
        return self.head(self.norm(x[:, -1]))

    @staticmethod
    def draw_token(logits, temperature, top_k, generator):
        """logits (B, K) -> tokens (B, 1), drawn from softmax(logits / temperature); temperature 0:
        always the most probable token. top_k: only the k most probable tokens, and those equal to
        the k-th; None: all."""
        if temperature < 1e-6:  # 0, or so small that the division could overflow
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float() / temperature
        if top_k is not None:
            k = min(top_k, logits.shape[1])
            least = logits.topk(k).values[:, -1:]  # (B, 1), the k-th largest
            logits = logits.masked_fill(logits < least, -math.inf)
        probabilities = logits.softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)

    @classmethod
    def from_pretrained(cls, path, heads=None):
        """From this script's file, or Hugging Face's ImageGPTForCausalImageModeling state dict. The
        latter has no palette: it stays zero (see data.read_palette). Any other file raises
        UserError. heads: their number, which Hugging Face's files do not contain; None: that of the
        released model of this size. (This script's files contain it.)"""
        with data.errors_become(f"{path}: does not hold an Image GPT"):
            state, sizes = data.read_igpt(path, heads=heads)
            model = cls(**sizes)
            model.load_state_dict(state)
        return model


# ------------------------------------------------------------------------ the palette and the masks


@torch.no_grad()
def fit_palette(images, colors, seed=0, pixels=50_000, iterations=10):
    """k-means of single pixels: uint8 images (n, 3, H, H) -> palette (K, 3) in -1..1. Starts at
    random pixels. A color that no pixel uses moves to a pixel with a large error."""
    g = torch.Generator().manual_seed(seed)
    x = images.transpose(0, 1).flatten(1).T  # (3, n, H, H) -> (3, all) -> (all pixels, 3)
    index = torch.randint(len(x), (pixels,), generator=g)
    x = x[index.to(x.device)].float() / 127.5 - 1  # (pixels, 3)
    palette = x[:colors].clone()
    for _ in range(iterations):
        # Give each pixel to its nearest color, then move each color to the mean of its pixels.
        distance, nearest = torch.cdist(x, palette).min(dim=1)  # both (pixels,)
        count = torch.bincount(nearest, minlength=colors)
        total = torch.zeros_like(palette).index_add(0, nearest, x)  # sum of each color's pixels
        palette = total / count[:, None].clamp(min=1)
        unused = (count == 0).nonzero()[:, 0]  # each moves to a pixel with a large error
        worst = distance.topk(len(unused)).indices
        palette[unused] = x[worst]
    return palette


def random_keep(tokens, share=0.15):
    """The masks of "bert": (B, N), 0 for masked pixels; each is masked with probability `share`."""
    noise = torch.rand(tokens.shape, device=tokens.device)
    return (noise > share).float()


# ------------------------------------------------------------------------------ scores and pictures


@torch.no_grad()
def nats_per_pixel(model, tokens, amp):
    """The mean loss over tokens (n, N). For "bert", the masks are drawn here.
    To copy this, also copy: random_keep.
    """
    total = 0.0
    with amp:
        for batch in tokens.split(100):
            keep = None
            if model.objective == "bert":
                keep = random_keep(batch)
            loss, _ = model.loss(batch, keep=keep)
            total += loss.item() * len(batch)
    return total / len(tokens)


def image_features(images, model, dataset, layer):
    """model.features for data.extract, which passes normalized images: encode needs 0..1."""
    tokens = model.encode(dataset.denormalize(images))
    return model.features(tokens, layer)


def features_by_layer(model, tokens):
    """tokens (B, N) -> (B, depth + 1, D): model.features of all layers, in one pass."""
    x = model.embed(tokens)
    means = []
    for block in model.blocks:
        means.append(block.norm1(x).mean(dim=1))
        x = block(x)
    means.append(model.norm(x).mean(dim=1))
    return torch.stack(means, dim=1)


def probe_by_layer(model, dataset, amp):
    """Slide "Linear Probes": the accuracy of a linear classifier on each layer, 0 to depth. Fitted
    on four fifths of at most 5,000 training images, scored on the last fifth: the test images must
    not choose the layer.
    To copy this, also copy: features_by_layer, data.extract, data.linear_probe, data.accuracy,
    data.fit, data.standardize.
    """

    def features(images):
        return features_by_layer(model, model.encode(dataset.denormalize(images)))

    n = min(5000, len(dataset.train_images))
    x = data.extract(features, dataset, dataset.train_images[:n], amp)  # (n, depth + 1, D)
    y = dataset.train_labels[:n]
    split = n * 4 // 5
    curve = []
    for layer in range(len(model.blocks) + 1):
        f = x[:, layer]  # (n, D)
        curve.append(data.linear_probe(f[:split], y[:split], f[split:], y[split:]))
    return curve


def draw_palette(model, dataset, tokens, out):
    """16 test images above the same images in the colors of the palette."""
    images = dataset.test_images[:16].float() / 255
    rounded = model.decode(tokens[:16])
    data.save_png(out / "palette.png", torch.cat([images, rounded]), columns=16)
    return ["palette.png"]


def draw_completions(model, tokens, out, args, amp):
    """Slide "Sampling the Distribution", 8 test images in the palette's colors: original | given
    part | four samples."""
    rows = model.image_size // 2  # the rows of pixels that the model is given
    if args.given_rows is not None:
        rows = args.given_rows
    tokens = tokens[:8]
    given = tokens[:, :rows * model.image_size].repeat_interleave(4, dim=0)
    g = torch.Generator(tokens.device).manual_seed(args.seed)
    with amp:
        samples = model.sample(given, args.temperature, args.top_k, generator=g)
    original = model.decode(tokens)  # (8, 3, H, H)
    part = original.clone()
    part[:, :, rows:] = 0.5  # gray
    samples = model.decode(samples).unflatten(0, (-1, 4))  # (8, 4, 3, H, H)
    panels = torch.cat([original[:, None], part[:, None], samples], dim=1)  # (8, 6, 3, H, H)
    data.save_png(out / "completions.png", panels.flatten(0, 1), columns=6)
    return ["completions.png"]


def evaluate(model, dataset, out, args, amp):
    """-> (the scores of a trained model, the names of the pictures that it draws)."""
    torch.manual_seed(args.seed)  # for the masks of "bert"
    tokens = torch.cat([model.encode(x.float() / 255) for x in dataset.test_images.split(500)])
    scores = {}
    scores["nats_per_pixel"] = nats_per_pixel(model, tokens, amp)
    # The entropy: the loss of a model that knows only how frequent each color is.
    share = torch.bincount(tokens.flatten()).float() / tokens.numel()
    scores["palette_entropy"] = torch.special.entr(share).sum().item()  # sum of - p log p
    # The accuracy is scored if the classifier was fine-tuned (a new one is all zeros), for these
    # classes: only a file of --load may have others. (has_classes(None) is True.) As in `loss`, the
    # classifier gets the mean of the tokens after the final norm.
    if model.classifier.weight.any() and data.has_classes(args.load, dataset):
        last = functools.partial(image_features, model=model, dataset=dataset,
                                 layer=len(model.blocks))
        x = data.extract(last, dataset, dataset.test_images, amp)
        predicted = model.classifier(x).argmax(dim=1)
        scores["accuracy"] = (predicted == dataset.test_labels).float().mean().item()

    # The chart of the slide "Representation Quality", and the layer that performs best.
    curve = probe_by_layer(model, dataset, amp)
    data.save_chart(out / "layers.svg", {"linear probe": list(enumerate(curve))}, "layer",
                    "accuracy on held-out training images")
    best = curve.index(max(curve))
    print(f"the probe on held-out training images is best on layer {best}")
    scores["probe_by_layer"] = curve
    # This layer's final scores, on the test images: trained, untrained, and raw pixels instead.
    untrained = data.untrained(model, args.seed)  # a copy with new weights and the same palette
    features = functools.partial(image_features, model=model, dataset=dataset, layer=best)
    random_features = functools.partial(image_features, model=untrained, dataset=dataset,
                                        layer=best)
    scores |= data.probe_scores(dataset, features, random_features, amp)
    files = ["layers.svg"] + draw_palette(model, dataset, tokens, out)
    if model.objective == "ar":
        files += draw_completions(model, tokens, out, args=args, amp=amp)
    return scores, files


# ---------------------------------------------------------------------------------------- training

# S to XL have 76M, 455M, 1.4B and 6.8B parameters. XL's number of heads is not published: with 24,
# each is 3072 / 24 = 128 wide, as M's. patch_size 1: a token is a pixel.
SIZES = {
    "tiny": dict(image_size=16, patch_size=1, dim=64, depth=8, heads=4, colors=8),
    "S": dict(image_size=32, patch_size=1, dim=512, depth=24, heads=8, colors=512),
    "M": dict(image_size=32, patch_size=1, dim=1024, depth=36, heads=8, colors=512),
    "L": dict(image_size=32, patch_size=1, dim=1536, depth=48, heads=16, colors=512),
    "XL": dict(image_size=64, patch_size=1, dim=3072, depth=60, heads=24, colors=512),
}


def parse_args(argv=None):
    number = data.number
    parser = data.Parser(__doc__)
    data.common_options(parser, "igpt", SIZES, steps=900, batch_size=16, lr=3e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=number(int, 0))
    parser.add("--augment", "light", "Changes of training images; light: random shift and flip.",
               choices=["none", "light"])
    parser.add("--objective", "ar", "What to predict; ar: each pixel from those before it; bert: "
               "15 %% masked pixels from all others.", choices=["ar", "bert"])
    parser.add("--colors", None, "The number of colors in the palette, if not that of --size.",
               type=number(int, 2, 4096))
    parser.add("--palette", None, "A file of colors, OpenAI's kmeans_centers.npy; without it, a "
               "new model's palette is fitted to the training images.")
    parser.add("--finetune", None, "Start from this checkpoint or released file, and train it to "
               "predict the classes, too.")
    parser.add("--given-rows", None, "The number of pixel rows that a completion starts from, if "
               "not half of them; 0: images from nothing.", type=number(int, 0))
    parser.add("--temperature", 1.0, "The temperature of sampling; 0 takes the most probable color "
               "each time.", type=number(float, 0, 100))
    parser.add("--top-k", None, "Sample only from this number of the most probable colors.",
               type=number(int, 1))
    args = data.parse(parser, "igpt", SIZES, argv)
    if args.patch_size != 1:
        raise UserError(f"--patch-size must be 1, not {args.patch_size}: a token is a pixel")
    if args.load and args.finetune:
        raise UserError("--load does not train, so --finetune has no use; leave one out")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build(args):
    """A new model with the sizes in the options. class_names are put into args by open_data."""
    return ImageGPT(image_size=args.image_size, dim=args.dim, depth=args.depth, heads=args.heads,
                    num_colors=args.colors, num_classes=len(args.class_names),
                    objective=args.objective)


def read(args):
    """The model of --load or --finetune. Changes args: its sizes and its objective replace those in
    the options; with --load there is no training."""
    path = args.load or args.finetune
    model = ImageGPT.from_pretrained(path)
    if args.palette is None and not model.palette.any():
        raise UserError(f"{path}: holds no colors; give those it was trained with, "
                        "--palette kmeans_centers.npy for OpenAI's models")
    args.image_size = model.image_size
    args.objective = model.objective
    args.dim = model.pos_embed.shape[1]
    args.depth = len(model.blocks)
    args.heads = model.blocks[0].attn.heads
    args.colors = len(model.palette)
    if args.load:
        args.steps = 0
    return model


def set_palette(model, args, dataset):
    """The colors of --palette, else those of the model's file, else (a new model) k-means."""
    if args.palette:
        model.palette = data.read_palette(args.palette, args.colors)
    elif not model.palette.any():
        model.palette = fit_palette(dataset.train_images, args.colors, args.seed)


def train(args):
    """Trains a model, scores it, draws the pictures; returns the scores. --load: no training."""
    # Set-up: device, data, model, palette, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    # Where the model comes from. --load: read the file. --finetune: read it, with a new classifier.
    # A resumed run of either kind: build it, with the sizes that parse_args has read from its
    # checkpoint; data.resume, below, fills in its weights and palette. Else: build a new one.
    resumed = args.resume and (out / "checkpoint.pt").exists()
    starts_fine_tuning = args.finetune and not resumed
    if args.load or starts_fine_tuning:
        model = read(args)  # before open_data, which needs this model's image size
    dataset = data.open_data(args, device)
    if args.given_rows is not None and args.given_rows > args.image_size:
        raise UserError(f"--given-rows must be at most {args.image_size}, an image's rows")
    torch.manual_seed(args.seed)
    if starts_fine_tuning:  # a trained model, with a new classifier for these classes
        model.classifier = nn.Linear(args.dim, len(dataset.class_names), bias=False)
        nn.init.zeros_(model.classifier.weight)
    elif not args.load:
        model = build(args)
    if not resumed:
        set_palette(model, args, dataset)
    model.to(device)
    print(f"{args.image_size**2} tokens an image, {args.colors} colors")
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type != "mps")
    start, scores = data.resume(args, "igpt", model=model, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="igpt", model=model.state_dict(),
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
        tokens = model.encode(images.float() / 255)
        labels = None
        if args.finetune:
            labels = dataset.train_labels[index.to(device)]
        keep = None
        if args.objective == "bert":
            keep = random_keep(tokens)
        with amp:
            loss, _ = loss_function(tokens, labels, keep)
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
    more, files = evaluate(model, dataset, out, args=args, amp=amp)
    scores |= more
    if not args.load:
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
