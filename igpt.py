"""Image GPT (iGPT): "Generative Pretraining from Pixels", Chen et al. 2020, ICML.

GPT-2 on pictures: colours are rounded to a palette, pixels read row by row, and a Transformer that
knows nothing of rows or neighbours predicts each pixel from those before it. To predict well it has
to find out what the picture shows: inner layers become features that a linear classifier can use.

    loss = - mean over pixels i of log p(x_i | x_0 .. x_i-1)

    python igpt.py                                    # shapes at 16 x 16, 3 minutes, two CPU cores
    python igpt.py --objective bert --out out/bert    # predict 15 % hidden pixels from the others
    python igpt.py --finetune out/igpt/checkpoint.pt --out out/tuned    # with labels: L_gen + L_clf
    python igpt.py --load pytorch_model.bin --palette kmeans_centers.npy --image-size 32

Default run: 0.589 nats per pixel (the palette's entropy is 4.094); the probe on layer 1 of 0 to 4,
0.349 (untrained 0.271, raw pixels 0.329); 2 min 45 s on two bfloat16 CPU cores.

Differences from the paper:
1. Pictures of 16 x 16 and 64 colours by default: 256 tokens, not 1,024, and a smaller vocabulary.
2. The palette is Lloyd's k-means from random pixels; the authors published no recipe for theirs.
3. Shift and flip; 100 steps of warm-up and gradients clipped at norm 1, as in all six scripts.
4. The learned position table starts as MAE's sin-cos table and the colours from N(0, .5), not from
   N(0, .01) and N(0, .02): in a few minutes the latter do not find out who is above whom.
5. 24 heads in XL: its number was never published; 3072 / 24 = 128 is the width of M's heads.
"""

import copy
import functools
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Block, Cache, autocast, quick_gelu, sincos_2d

SIZES = {  # a token is a pixel: patches of 1. Parameters: 76M, 455M, 1.4B, 6.8B with 512 colours
    "tiny": dict(image_size=16, patch_size=1, dim=128, depth=4, heads=4, colours=64),
    "S": dict(image_size=32, patch_size=1, dim=512, depth=24, heads=8, colours=512),
    "M": dict(image_size=32, patch_size=1, dim=1024, depth=36, heads=8, colours=512),
    "L": dict(image_size=32, patch_size=1, dim=1536, depth=48, heads=16, colours=512),
    "XL": dict(image_size=64, patch_size=1, dim=3072, depth=60, heads=24, colours=512),
}


class ImageGPT(nn.Module):
    """tokens (B, N) int64 of K colours, N = H * H -> logits (B, N, K): [:, i] predicts token i.

    `objective`: "ar" sees the tokens before i; "bert" sees all but the hidden ones (`keep` = 0).
    """

    def __init__(self, image_size=16, dim=128, depth=4, heads=4, mlp_ratio=4.0, num_colours=64,
                 num_classes=10, objective="ar"):
        super().__init__()
        self.image_size, self.objective = image_size, objective
        self.token_embed = nn.Embedding(num_colours, dim)
        self.start = nn.Parameter(torch.zeros(dim))  # a vector for "nothing yet", not a colour
        self.pos_embed = nn.Parameter(torch.zeros(image_size**2, dim))
        norm = functools.partial(nn.RMSNorm, eps=1e-5)  # x / sqrt(mean(x^2) + eps) * gain
        # The slide's "minor change" to GPT: in each block, norm comes before attention and MLP.
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, bias=False, act=quick_gelu, norm=norm,
                  causal=objective == "ar") for _ in range(depth))
        self.norm = norm(dim)
        self.head = nn.Linear(dim, num_colours, bias=False)  # not tied to token_embed
        self.classifier = nn.Linear(dim, num_classes, bias=False)  # for fine-tuning alone
        self.register_buffer("palette", torch.zeros(num_colours, 3))  # red, green, blue in -1..1
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's, but for the tables. Both outputs are zero: the first loss is ln K exactly."""
        for name, p in self.named_parameters():
            dim = p.shape[-1]
            std = {"token_embed.weight": 0.5, "start": 0.5}.get(name, 0)
            if "qkv" in name:
                std = dim**-0.5
            elif "attn.proj" in name:
                std = (dim * len(self.blocks)) ** -0.5
            elif "mlp" in name:
                std = 0.02
            nn.init.ones_(p) if "norm" in name else nn.init.normal_(p, std=std)
        self.pos_embed.copy_(sincos_2d(self.pos_embed.shape[1], self.image_size))

    def encode(self, images):
        """Pictures (B, 3, H, H) in 0..1 -> tokens (B, N): each pixel's nearest colour, by rows."""
        x = images.flatten(2).transpose(1, 2) * 2 - 1  # (B, N, 3)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would mix up near colours
            distance = self.palette.square().sum(1) - 2 * x @ self.palette.T  # |c|^2 - 2 x c
        return distance.argmin(-1)  # of (B, N, K)

    def decode(self, tokens):
        """tokens (B, N) -> pictures (B, 3, H, H) in 0..1."""
        side = math.isqrt(tokens.shape[1])
        return (self.palette[tokens].transpose(1, 2).unflatten(2, (side, side)) + 1) / 2

    def layers(self, tokens, keep=None, stop=None):
        """tokens (B, N) -> what each layer hands on, after the norm that reads it: depth + 1 times
        (B, N, D), or those up to number `stop`. The last one is the network's output."""
        x = self.token_embed(tokens)  # (B, N, D)
        if self.objective == "ar":  # place i holds the pixel before i
            x = torch.cat([self.start.expand(len(x), 1, -1), x[:, :-1]], dim=1)
        elif keep is not None:  # a hidden pixel keeps its position alone
            x = x * keep[:, :, None]
        x, out = x + self.pos_embed, []
        for i, block in enumerate(self.blocks):
            out.append(block.norm1(x))
            if i == stop:
                return out
            x = block(x)
        return out + [self.norm(x)]

    def forward(self, tokens, keep=None):
        return self.head(self.layers(tokens, keep)[-1])  # (B, N, K)

    def features(self, tokens, layer):
        """tokens (B, N) -> (B, D): mean over the positions of layer 0 .. depth, equation 6."""
        return self.layers(tokens, stop=layer)[layer].mean(1)

    def loss(self, tokens, labels=None, keep=None):
        """-> (L_gen in nats per pixel, plus L_clf if labels (B,) are given; class logits (B, C)).

        keep (B, N), "bert" alone: 1 for shown, 0 for hidden pixels; only these count.
        """
        x = self.layers(tokens, keep)[-1]
        nats = F.cross_entropy(self.head(x).float().flatten(0, 1), tokens.flatten(),
                               reduction="none").unflatten(0, tokens.shape)  # (B, N)
        weight = torch.ones_like(nats) if keep is None else 1 - keep
        loss = ((nats * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()
        classes = self.classifier(x.mean(1))
        if labels is not None:
            loss = loss + F.cross_entropy(classes.float(), labels)
        return loss, classes

    @torch.no_grad()
    def sample(self, given, temperature=1.0, top_k=None, generator=None, cached=True):
        """given (B, n) first tokens, n from 0 -> (B, N), the rest drawn pixel by pixel.

        `cached` keeps keys and values, so that a step costs one token; without, all so far.
        """
        N, tokens = len(self.pos_embed), list(given.unbind(1))
        caches = [Cache(N) if cached else None for _ in self.blocks]
        start = self.start.expand(len(given), 1, -1)
        seen = torch.cat([start, self.token_embed(given)], dim=1)[:, :N]  # (B, n + 1, D)
        seen = seen + self.pos_embed[:seen.shape[1]]
        with torch.inference_mode():  # less bookkeeping a step than no_grad
            for i in range(len(tokens), N):
                x = seen
                for block, cache in zip(self.blocks, caches):
                    x = block(x, cache=cache)
                logits = self.head(self.norm(x[:, -1])).float() / temperature  # (B, K)
                if top_k:
                    least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
                if i + 1 < N:
                    new = (self.token_embed(tokens[-1]) + self.pos_embed[i + 1])[:, None]
                    seen = new if cached else torch.cat([seen, new], dim=1)
        return torch.stack(tokens, dim=1)

    @classmethod
    def from_pretrained(cls, path):
        """From this script's files or Hugging Face's ImageGPTForCausalImageModeling state dict.

        The latter hold no palette: see read_palette. Raises UserError for any other file.
        """
        content = data.load_checkpoint(path)
        own = content.get("script") == "igpt"
        with data.refuse(f"{path}: does not hold an Image GPT"):
            state = content["model"] if own else read_hugging_face(content)
            args = content["args"] if own else {}
            K, dim = state["token_embed.weight"].shape
            depth = sum(k.endswith("norm1.weight") for k in state)
            model = cls(math.isqrt(len(state["pos_embed"])), dim, depth,
                        args.get("heads") or {512: 8, 1024: 8, 1536: 16, 3072: 24}[dim],
                        len(state["blocks.0.mlp.fc1.weight"]) / dim, K,
                        len(state.setdefault("classifier.weight", torch.zeros(10, dim))),
                        args.get("objective", "ar"))
            state.setdefault("palette", torch.zeros(K, 3))
            model.load_state_dict(state)
        return model


def read_hugging_face(content):
    """Its names -> ours. Its linear maps are stored [in, out], their biases are all zero, and the
    start vector is one more row of the token table."""
    state = {}
    names = {"transformer.": "", "h.": "blocks.", ".ln_1.": ".norm1.", ".ln_2.": ".norm2.",
             "ln_f.": "norm.", ".c_attn.": ".qkv.", "attn.c_proj.": "attn.proj.",
             ".c_fc.": ".fc1.", "mlp.c_proj.": "mlp.fc2.", "lm_head.": "head.",
             "wte.": "token_embed.", "wpe.weight": "pos_embed"}
    for name, tensor in content.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks of old versions
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name.endswith(".bias"):
            if tensor.any():
                raise ValueError(f"{name} is not zero")
            continue
        turned = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
        state[name] = tensor.T if turned else tensor
    table = state["token_embed.weight"]
    if len(table) != len(state["head.weight"]) + 1:
        raise ValueError(f"{len(table)} token vectors for {len(state['head.weight'])} colours")
    return state | {"token_embed.weight": table[:-1], "start": table[-1]}


def read_palette(path, colours):
    """OpenAI's kmeans_centers.npy, (K, 3) in -1..1 -> tensor; else UserError."""
    with data.refuse(f"{path}: not a palette of {colours} colours"):
        palette = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        if palette.shape != (colours, 3) or not palette.abs().max() <= 1.001:
            raise ValueError(f"shape {tuple(palette.shape)}")
    return palette


@torch.no_grad()
def fit_palette(images, colours, seed=0, pixels=50_000, iterations=10):
    """k-means on single pixels of uint8 pictures (n, 3, H, H) -> (K, 3) in -1..1.

    Starts at random pixels; a colour that nobody uses is sent to the pixel that is worst served.
    """
    g = torch.Generator().manual_seed(seed)
    x = images.transpose(0, 1).flatten(1).T  # (all pixels, 3)
    x = x[torch.randint(len(x), (pixels,), generator=g).to(x.device)].float() / 127.5 - 1
    palette = x[:colours].clone()
    for _ in range(iterations):
        distance, nearest = torch.cdist(x, palette).min(1)
        count = torch.bincount(nearest, minlength=colours)[:, None]
        palette = torch.zeros_like(palette).index_add(0, nearest, x) / count.clamp(min=1)
        empty = (count[:, 0] == 0).nonzero()[:, 0]
        palette[empty] = x[distance.topk(len(empty)).indices]
    return palette


@torch.no_grad()
def nats_per_pixel(model, tokens, amp, keep=None):
    """Mean loss over tokens (n, N), and the entropy of their histogram: a model that knows how
    frequent the colours are, and nothing else, would reach the latter."""
    with amp:
        parts = [model.loss(t, keep=None if keep is None else keep[i * 100:i * 100 + 100])[0]
                 * len(t) for i, t in enumerate(tokens.split(100))]
    share = torch.bincount(tokens.flatten()).float() / tokens.numel()
    return sum(parts).item() / len(tokens), torch.special.entr(share).sum().item()


def probe_by_layer(model, dataset, to_tokens, amp, training=4000, held=1000):
    """The curve of the slide: accuracy of a linear probe on each layer, fitted on `training`
    pictures, scored on `held` others of the training set: test pictures choose nothing."""
    every = lambda x: torch.cat([layer.mean(1) for layer in model.layers(to_tokens(x))], dim=1)
    n = min(training + held, len(dataset.train_images))
    x, y = data.extract(every, dataset, dataset.train_images[:n], amp), dataset.train_labels[:n]
    cut = n - n * held // (training + held)
    return [data.linear_probe(f[:cut], y[:cut], f[cut:], y[cut:])
            for f in x.chunk(len(model.blocks) + 1, dim=1)]


@torch.no_grad()
def draw(model, dataset, tokens, curve, out, args, amp):
    """Originals above their rounding to the palette; the curve; rows of completions:
    original | what is given | four samples."""
    images = dataset.test_images[:16].float() / 255
    data.save_png(out / "palette.png", torch.cat([images, model.decode(tokens[:16])]), columns=16)
    data.save_chart(out / "layers.svg", {"linear probe": list(enumerate(curve))}, "layer",
                    "accuracy on held-out training pictures")
    if model.objective == "bert":
        return ["palette.png", "layers.svg"]
    n = (model.image_size // 2 if args.given_rows is None else args.given_rows) * model.image_size
    original = tokens[:8]
    g = torch.Generator(tokens.device).manual_seed(args.seed)
    with amp:
        samples = model.sample(original[:, :n].repeat_interleave(4, 0), args.temperature,
                               args.top_k, g)
    images, given = model.decode(original)[:, None], model.decode(original)[:, None]
    given.flatten(3)[..., n:] = 0.5  # a view: it is painted grey
    panels = [images, given, model.decode(samples).unflatten(0, (-1, 4))]
    data.save_png(out / "completions.png", torch.cat(panels, 1).flatten(0, 1), columns=6)
    return ["palette.png", "layers.svg", "completions.png"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "igpt", SIZES, steps=1500, batch_size=8, lr=3e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--augment", "light", "light: shift, flip", choices=["none", "light"])
    parser.add("--objective", "ar", "ar: from the pixels before; bert: 15 %% hidden pixels",
               choices=["ar", "bert"])
    parser.add("--colours", None, "in the palette, else the size's", type=number(int, 2, 4096))
    parser.add("--palette", None, "a kmeans_centers.npy instead of fitting one")
    parser.add("--finetune", None, "go on from this checkpoint with L_gen + L_clf")
    parser.add("--given-rows", None, "of completions; half of them", type=number(int, 0))
    parser.add("--temperature", 1.0, "of sampling", type=number(float, 0.01, 100))
    parser.add("--top-k", None, "sample from so many colours only", type=number(int, 1))
    return data.parse(parser, "igpt", SIZES, argv)


def hide(tokens, args, share=0.15):
    """The objective "bert": keep (B, N), 0 for hidden pixels, each hidden by itself; else None."""
    return (torch.rand(tokens.shape, device=tokens.device) > share).float() \
        if args.objective == "bert" else None


def evaluate(model, dataset, scores, out, args, amp):
    """Adds every score to `scores`, draws the pictures and returns their names."""
    torch.manual_seed(args.seed)
    tokens = torch.cat([model.encode(x.float() / 255) for x in dataset.test_images.split(500)])
    scores["nats_per_pixel"], scores["palette_entropy"] = nats_per_pixel(
        model, tokens, amp, hide(tokens, args))
    if args.finetune:
        with torch.no_grad(), amp:
            classes = torch.cat([model.loss(t)[1] for t in tokens.split(100)]).argmax(1)
        scores["accuracy"] = (classes == dataset.test_labels).float().mean().item()
    to_tokens = lambda x: model.encode(dataset.denormalise(x))
    curve = scores["probe_by_layer"] = probe_by_layer(model, dataset, to_tokens, amp)
    # the first that is within a standard error, of 1,000 pictures, of the best
    best = next(layer for layer, accuracy in enumerate(curve) if accuracy > max(curve) - 0.015)
    print(f"probe by layer, on held-out training pictures: layer {best}")
    untrained = copy.deepcopy(model)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, lambda x: model.features(to_tokens(x), best),
                                lambda x: untrained.features(to_tokens(x), best), amp)
    return draw(model, dataset, tokens, curve, out, args, amp)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load or args.finetune:
        model = ImageGPT.from_pretrained(args.load or args.finetune)
        args.image_size, args.objective = model.image_size, model.objective
        (args.colours, args.dim), args.depth = model.token_embed.weight.shape, len(model.blocks)
        args.heads, args.steps = model.blocks[0].attn.heads, 0 if args.load else args.steps
    dataset = data.open_data(args, device)
    C, N = len(dataset.class_names), args.image_size**2
    if args.patch_size != 1 or (args.given_rows or 0) > args.image_size:
        raise data.UserError("--patch-size must be 1, a token is a pixel; --given-rows at most "
                             f"{args.image_size}")
    torch.manual_seed(args.seed)
    if not args.load and not args.finetune:
        model = ImageGPT(args.image_size, args.dim, args.depth, args.heads, 4.0, args.colours, C,
                         args.objective)
    elif args.finetune:
        model.classifier = nn.Linear(args.dim, C, bias=False)
        nn.init.zeros_(model.classifier.weight)
    if args.palette:
        model.palette = read_palette(args.palette, args.colours)
    elif not model.palette.any():
        model.palette = fit_palette(dataset.train_images, args.colours, args.seed)
    model.to(device)
    print(f"{N} tokens a picture, {args.colours} colours")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type != "mps")
    start, scores = data.resume(args, "igpt", model=model, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="igpt", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = data.batch_index(len(dataset.train_labels), args.batch_size, step, args.seed)
        x, y = dataset.train_images[index.to(device)], dataset.train_labels[index.to(device)]
        tokens = model.encode((x if args.augment == "none" else data.augment(x)).float() / 255)
        with amp:
            loss, _ = loss_function(tokens, y if args.finetune else None, hide(tokens, args))
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
    files = evaluate(model, dataset, scores, out, args, amp)
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
