"""Vision Transformer (ViT): "An Image is Worth 16x16 Words", Dosovitskiy et al. 2021, arXiv 2010.11929.

A picture is cut into patches, each patch becomes one token by one linear map, and from there on it is
a Transformer encoder without any knowledge of pictures. Whatever a convolution has built in (that
neighbours matter, that a shifted object is the same object) must be learned from labelled examples.

    loss = -log softmax(head(norm(blocks(x))[class token]))[label],   x = patches E + positions

    python vit.py                                   # shapes, 3 minutes on a laptop
    python vit.py --data cifar10 --steps 20000      # CIFAR-10
    python vit.py --init out/mae/checkpoint.pt      # fine-tune a pre-trained encoder

Differences from the paper:
1. The position table is learned, but starts as the fixed sin-cos table: from small random numbers a
   model of this size stays at chance for tens of thousands of pictures.
2. Crop, flip, label smoothing and AdamW for Adam with L2: a few thousand pictures need them.
3. No dropout, and no hidden layer in the head: later recipes (AugReg, DeiT, MAE) do without.
"""

import copy
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from common import (Block, LayerNorm, PatchEmbed, autocast, gelu_tanh, patchify, resize_table,
                    sincos_2d)

SIZES = {  # Ti and S come from DeiT, B, L and H from the paper's table
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4),
    "Ti": dict(patch_size=16, dim=192, depth=12, heads=3),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16),
}


class ViT(nn.Module):
    """images (B, 3, H, W), normalised -> logits (B, K). Without `class_token` the patch mean is classified."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0, num_classes=10,
                 class_token=True, act=F.gelu):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, class_token + self.grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, act=act) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.pre_logits = None  # Google's ImageNet-21k files alone have this hidden layer
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Google's: linear maps xavier-uniform (queries, keys and values each), patches lecun-normal, head zero."""
        for name, p in self.named_parameters():
            if name.endswith("attn.qkv.weight"):
                for part in p.chunk(3):
                    nn.init.xavier_uniform_(part)
            elif name.startswith("blocks") and p.ndim == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.normal_(p, std=1e-6) if ".mlp." in name else p.zero_()
        nn.init.normal_(self.patch_embed.proj.weight, std=self.patch_embed.proj.weight[0].numel() ** -0.5)
        self.pos_embed[0, -self.grid**2:] = sincos_2d(self.pos_embed.shape[2], self.grid)
        self.head.weight.zero_()

    def tokens(self, images):
        """(B, 3, H, W) -> (B, 1 + N, D), normed; class token first."""
        x = patchify(images, self.patch_size)  # 1. divide into P x P patches
        # 2. that is a sequence of length N = HW / P^2: (B, N, P*P*3)
        x = self.patch_embed(x)  # 3. flattened patches to D dimensions: (B, N, D)
        x = x + self.pos_embed[:, -x.shape[1]:]  # 4. add a learned 1-D position embedding
        if self.cls_token is not None:  # 5. include a learnable [class] embedding (it has a position, too)
            cls = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images):
        """(B, 3, H, W) -> (B, D): the class token, or the mean of the patches if there is none."""
        x = self.tokens(images)
        return x[:, 0] if self.cls_token is not None else x.mean(1)

    def forward(self, images):
        x = self.features(images)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return self.head(x)  # (B, K)

    def loss(self, images, targets, label_smoothing=0.0):
        """targets (B,) class numbers or (B, K) probabilities -> cross-entropy, logits (B, K)."""
        logits = self(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing), logits

    @classmethod
    def from_pretrained(cls, path, num_classes=None, image_size=None):
        """A ViT with the weights of a file; raises UserError for any that does not hold such an encoder.

        Reads this repository's vit, mae and jepa checkpoints and the releases of timm (state dict), Google
        (.npz), MAE, I-JEPA (its target encoder) and DINOv2. `num_classes` puts a new head of zeros on it,
        `image_size` stretches the position table to another grid (bicubic, antialiased, as timm does).
        """
        state, act, heads = read_encoder(path)
        try:
            dim, _, _, patch = state["patch_embed.proj.weight"].shape
            extra = 1 if "cls_token" in state else 0
            grid = math.isqrt(state["pos_embed"].shape[1] - extra)
            depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
            model = cls(grid * patch, patch, dim, depth, heads or {1152: 16, 1280: 16, 1408: 16}.get(dim, dim // 64),
                        state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
                        len(state["head.weight"]) if "head.weight" in state else 1, bool(extra), act)
            if "pre_logits.weight" in state:
                model.pre_logits = nn.Linear(dim, len(state["pre_logits.weight"]))
            for key in ("head.weight", "head.bias"):  # an encoder alone gets a head of zeros
                state.setdefault(key, model.state_dict()[key])
            model.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise data.UserError(f"{path}: not a ViT encoder ({str(error).splitlines()[0][:100]})") from None
        if num_classes:
            model.pre_logits, model.head = None, nn.Linear(dim, num_classes)
            nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)
        if image_size:
            model.grid = image_size // patch
            model.pos_embed = nn.Parameter(resize_table(model.pos_embed.data, model.grid, extra=extra))
        return model


def read_encoder(path):
    """A file -> (state dict in timm's names, activation, heads or None for the width's usual number)."""
    if str(path).endswith(".npz"):
        return read_google(path), gelu_tanh, None
    content = data.load_checkpoint(path)
    state = content.get("target_encoder", content.get("model", content))
    if content.get("script") == "jepa":
        state = {k[15:]: v for k, v in state.items() if k.startswith("target_encoder.")}
    state = {k.removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    for i in range(len(state)):  # DINOv2 scales each branch by a vector: the same as scaling its last map's rows
        for scale, name in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if (gamma := state.pop(f"blocks.{i}.{scale}.gamma", None)) is not None:
                for part in ("weight", "bias"):
                    old = state[f"blocks.{i}.{name}.{part}"]
                    state[f"blocks.{i}.{name}.{part}"] = (gamma * old.T).T
    state = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    return state, F.gelu, content["args"]["heads"] if "args" in content and "script" in content else None


def read_google(path):
    """Google's .npz (JAX arrays, [in, out], heads apart) -> state dict in timm's names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k.removeprefix("opt/target/").removeprefix("params/"): torch.from_numpy(file[k]) for k in file}
        a = lambda key: arrays[key].float()
        dim, state = arrays["embedding/bias"].shape[0], {}
        state["cls_token"], state["pos_embed"] = a("cls"), a("Transformer/posembed_input/pos_embedding")
        state["patch_embed.proj.weight"] = a("embedding/kernel").permute(3, 2, 0, 1)
        state["patch_embed.proj.bias"] = a("embedding/bias")
        state["norm.weight"], state["norm.bias"] = (a(f"Transformer/encoder_norm/{p}") for p in ("scale", "bias"))
        for key in ("head", "pre_logits"):
            if f"{key}/kernel" in arrays:
                state[f"{key}.weight"], state[f"{key}.bias"] = a(f"{key}/kernel").T, a(f"{key}/bias")
        for i in range(sum(k.endswith("LayerNorm_0/scale") for k in arrays)):
            ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
            attention = theirs + "MultiHeadDotProductAttention_1/"
            for name, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
                state[f"{ours}{name}.weight"] = a(f"{theirs}{layer}/scale")
                state[f"{ours}{name}.bias"] = a(f"{theirs}{layer}/bias")
            qkv = [(a(f"{attention}{n}/kernel"), a(f"{attention}{n}/bias")) for n in ("query", "key", "value")]
            state[f"{ours}attn.qkv.weight"] = torch.cat([w.reshape(dim, dim).T for w, _ in qkv])
            state[f"{ours}attn.qkv.bias"] = torch.cat([b.flatten() for _, b in qkv])
            state[f"{ours}attn.proj.weight"] = a(f"{attention}out/kernel").reshape(dim, dim).T
            state[f"{ours}attn.proj.bias"] = a(f"{attention}out/bias")
            for name, layer in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
                state[f"{ours}mlp.{name}.weight"] = a(f"{theirs}MlpBlock_3/{layer}/kernel").T
                state[f"{ours}mlp.{name}.bias"] = a(f"{theirs}MlpBlock_3/{layer}/bias")
        return state
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, data.zipfile.BadZipFile, data.zlib.error) as error:
        raise data.UserError(f"{path}: not a Google ViT .npz ({str(error).splitlines()[0][:100]})") from None


# ---------------------------------------------------------------------------------- evaluation and pictures


@torch.no_grad()
def accuracy(model, dataset, amp):
    logits = data.extract(model, dataset, dataset.test_images, amp)
    return (logits.argmax(1) == dataset.test_labels).float().mean().item()


@torch.no_grad()
def attention_maps(model, images):
    """(B, 3, H, W) -> one (B, h, 1 + N, 1 + N) a layer: how much each token listens to each."""
    maps, hooks = [], []
    for block in model.blocks:
        look = lambda attn, inputs: maps.append(attn.forward(*inputs, return_weights=True)[1])
        hooks.append(block.attn.register_forward_pre_hook(look))
    model.tokens(images)
    for hook in hooks:
        hook.remove()
    return maps


def attention_distance(maps, grid, patch_size):
    """Figure 7 right: mean distance in pixels between a patch and what it attends to, (layers, h)."""
    cells = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    distance = torch.cdist(cells, cells).to(maps[0].device) * patch_size  # (N, N)
    maps = [m[:, :, -grid**2:, -grid**2:].float() for m in maps]  # patches alone, weights renormalised
    return torch.stack([(m / m.sum(-1, keepdim=True) * distance).sum(-1).mean((0, 2)) for m in maps])


def rollout(maps, grid):
    """Attention rollout (Abnar and Zuidema 2020): how the class token draws on each patch, (B, 1, grid, grid)."""
    flow = torch.eye(maps[0].shape[-1], device=maps[0].device)
    for m in maps:
        m = m.float().mean(1) + torch.eye(m.shape[-1], device=m.device)  # the residual path
        flow = m / m.sum(-1, keepdim=True) @ flow
    row = flow[:, 0, -grid**2:]
    return (row / row.amax(1, keepdim=True)).reshape(-1, 1, grid, grid)


def draw(model, dataset, out):
    """The slide "ViT: Visualizing Internals", and rollout; returns the file names."""
    weight = model.patch_embed.proj.weight.detach().float()  # (D, 3, P, P)
    components = torch.linalg.svd((weight - weight.mean(0)).flatten(1), full_matrices=False)[2][:28]
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    filters = ((components - low) / (high - low)).reshape(-1, *weight.shape[1:])
    data.save_png(out / "filters.png", filters, columns=7)
    grid = model.grid
    positions = F.normalize(model.pos_embed.detach()[0, -grid**2:].float(), dim=1)
    tiles = (positions @ positions.T).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1)
    data.save_png(out / "positions.png", (tiles + 1) / 2, columns=grid)
    images = dataset.test_images[:128]
    maps = attention_maps(model, dataset.normalise(images))
    dots = attention_distance(maps, grid, model.patch_size).tolist()
    data.save_chart(out / "attention_distance.svg", {f"head {h + 1}": [(i + 1, row[h]) for i, row in enumerate(dots)]
                    for h in range(len(dots[0]))}, "layer", "mean attention distance (pixels)", lines=False)
    pictures = images[:8].float() / 255
    light = F.interpolate(rollout([m[:8] for m in maps], grid), pictures.shape[2:], mode="bilinear")
    data.save_png(out / "rollout.png", torch.cat([pictures, pictures * light]), columns=8)
    return ["filters.png", "positions.png", "attention_distance.svg", "rollout.png"]


# ------------------------------------------------------------------------------------------------- training


def parse_args(argv=None):
    parser = data.Parser(__doc__)
    data.common_options(parser, "vit", SIZES, steps=1700, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=data.number(int, 0))
    parser.add("--weight-decay", 0.05, "of weight matrices", type=data.number(float, 0))
    parser.add("--label-smoothing", 0.1, "share of the target spread evenly", type=data.number(float, 0, 0.99))
    parser.add("--augment", "light", "none; light: shift and flip; strong: also mixup or cutmix, and erasing",
               choices=["none", "light", "strong"])
    parser.add("--train-images", None, "use only so many training pictures", type=data.number(int, 1))
    parser.add("--init", None, "fine-tune this checkpoint (vit, mae, jepa or a release) with a new head")
    parser.add("--layer-decay", 1.0, "learning rate's factor from layer to layer downward",
               type=data.number(float, 0, 1))
    return data.parse(parser, "vit", SIZES, argv)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def parameter_groups(model, args):
    """No decay for vectors, tables and tokens; layer i of n learns with layer_decay^(n - i) of the rate."""
    groups, n = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else n if name.startswith(("norm", "head")) else 0
        decay = args.weight_decay if p.ndim > 1 and "pos_embed" not in name and "cls_token" not in name else 0.0
        scale = args.layer_decay ** (n - layer)
        groups.setdefault((scale, decay), dict(params=[], scale=scale, weight_decay=decay))["params"].append(p)
    return list(groups.values())


def mix(images, targets):
    """Mixup or cutmix with the batch in reverse, and random erasing: (B, 3, H, W), (B, K) -> the same."""
    B, _, H, W = images.shape
    share = torch.distributions.Beta(0.8, 0.8).sample().item()  # of the first picture
    if torch.rand(()) < 0.5:
        mixed = share * images + (1 - share) * images.flip(0)
    else:
        h, w = round(H * math.sqrt(1 - share)), round(W * math.sqrt(1 - share))
        y, x = torch.randint(H - h + 1, ()), torch.randint(W - w + 1, ())
        mixed, share = images.clone(), 1 - h * w / (H * W)
        mixed[:, :, y:y + h, x:x + w] = images.flip(0)[:, :, y:y + h, x:x + w]
    for i in (torch.rand(B) < 0.25).nonzero()[:, 0]:
        y, x = torch.randint(3 * H // 4, ()), torch.randint(3 * W // 4, ())
        mixed[i, :, y:y + H // 4, x:x + W // 4] = torch.randn(3, 1, 1).to(images)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    dataset, amp = data.open_data(args, device), autocast(device, args.precision)
    classes = len(dataset.class_names)
    images, labels = dataset.train_images[:args.train_images], dataset.train_labels[:args.train_images]

    def build():
        torch.manual_seed(args.seed)
        return ViT(args.image_size, args.patch_size, args.dim, args.depth, args.heads, num_classes=classes).to(device)

    model = build()
    if args.load:
        model = ViT.from_pretrained(args.load).to(device)
    elif args.init:
        model = ViT.from_pretrained(args.init, classes, args.image_size).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, fused=device.type != "mps")
    start, seconds = data.resume(args, "vit", model=model, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss
    log, steps = data.Log(out / "log.csv", start), data.Steps(args, start, seconds)
    scores = {}
    for step in steps:
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        index = data.batch_index(len(images), args.batch_size, step, args.seed).to(device)
        x, y = images[index], labels[index]
        x = dataset.normalise(x if args.augment == "none" else data.augment(x))
        if args.augment == "strong":
            x, y = mix(x, F.one_hot(y, classes).float())
        with amp:
            loss, logits = loss_function(x, y, args.label_smoothing)
        steps.check(loss, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step + 1 == args.steps:
            log.write(step, images_seen=(step + 1) * args.batch_size, loss=loss, lr=rate)
        if steps.due(step):
            scores = dict(loss=loss.item(), seconds=steps.seconds, images_seen=(step + 1) * args.batch_size)
            data.save_checkpoint(out / "checkpoint.pt", script="vit", model=model.state_dict(), ema=None,
                                 optimizer=optimizer.state_dict(), step=step + 1, args=vars(args), scores=scores)
    model.eval()
    scores["accuracy"] = accuracy(model, dataset, amp)
    scores |= data.probe_scores(dataset, model.features, build().features, amp)
    return data.report("vit", out, scores, ["checkpoint.pt", "log.csv", *draw(model, dataset, out)])


if __name__ == "__main__":
    data.run(train, parse_args)
