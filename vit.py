"""Vision Transformer (ViT): "An Image is Worth 16x16 Words", Dosovitskiy et al. 2021, 2010.11929.

A picture is cut into patches, one linear map makes each patch a token, and from there on it is a
Transformer encoder that knows nothing of pictures. What a convolution has built in (neighbours
matter, a shifted object is the same object) must be learned from labelled examples: many of them.

    loss = cross_entropy(head(norm(blocks(patches E + positions))[class token]), label)

    python vit.py                                      # shapes, 3 minutes on two CPU cores
    python vit.py --data cifar10 --steps 17000         # CIFAR-10, 20 minutes
    python vit.py --init out/mae/checkpoint.pt --out out/tuned    # fine-tune a trained encoder
    python vit.py --train-images 1000 --out out/few    # the data-hunger slide, beside a small CNN

Default run: accuracy 0.945 (probes: the same network untrained 0.292, raw pixels 0.322) in
2 min 30 s in all, on two bfloat16 CPU cores, seed 0.

Differences from the paper:
1. The learned position table starts as the fixed sin-cos table. From small random numbers, a model
   of this size stays at chance for tens of thousands of pictures.
2. AdamW, shift and flip, and label smoothing: data sets are thousands of times smaller than JFT.
3. No dropout and no hidden layer in the head, as in the recipes that followed (DeiT, MAE).
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

SIZES = {  # B, L and H are the paper's; Ti and S come from DeiT
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4),
    "Ti": dict(patch_size=16, dim=192, depth=12, heads=3),
    "S": dict(patch_size=16, dim=384, depth=12, heads=6),
    "B": dict(patch_size=16, dim=768, depth=12, heads=12),
    "L": dict(patch_size=16, dim=1024, depth=24, heads=16),
    "H": dict(patch_size=14, dim=1280, depth=32, heads=16),
}

GOOGLE = {"Transformer/encoderblock_": "blocks.", "/LayerNorm_0": ".norm1", "/kernel": ".weight",
          "/MultiHeadDotProductAttention_1/out": ".attn.proj", "/LayerNorm_2": ".norm2",
          "/MultiHeadDotProductAttention_1/": ".attn.", "/MlpBlock_3/Dense_0": ".mlp.fc1",
          "/MlpBlock_3/Dense_1": ".mlp.fc2", "Transformer/encoder_norm": "norm", "/bias": ".bias",
          "Transformer/posembed_input/pos_embedding": "pos_embed", "/scale": ".weight",
          "embedding.": "patch_embed.proj.", "cls": "cls_token"}  # its names -> timm's


class ViT(nn.Module):
    """images (B, 3, H, H), normalised -> logits (B, K). No class token: the patch mean is used."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, mlp_ratio=4.0,
                 num_classes=10, class_token=True, act=F.gelu):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, class_token + self.grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, act=act) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.pre_logits = None  # a hidden layer, in Google's ImageNet-21k files alone
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Google's: xavier (q, k and v each), zero head and class token, MLP biases tiny."""
        for name, p in self.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2:
                for matrix in p.chunk(3) if "qkv" in name else [p]:
                    nn.init.xavier_uniform_(matrix)
            elif "norm" in name and name.endswith("weight"):
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=1e-6 if "mlp" in name else 0)
        nn.init.normal_(self.patch_embed.proj.weight, std=(3 * self.patch_size**2) ** -0.5)
        self.pos_embed[0, -self.grid**2:] = sincos_2d(self.pos_embed.shape[2], self.grid)

    def tokens(self, images, maps=None):
        """(B, 3, H, H) -> (B, 1 + N, D), class token first. A list `maps` collects attention."""
        # 1. Divide the picture into P x P patches: 2. a sequence of length N = HW / P^2.
        x = patchify(images, self.patch_size)  # (B, N, P*P*3)
        # 3. The flattened patches are mapped to D dimensions by a trainable linear projection.
        x = self.patch_embed(x)  # (B, N, D)
        # 4. Add a learned 1-D position embedding.
        if x.shape[1] != self.grid**2:
            raise ValueError(f"{x.shape[1]} patches, but this model has {self.grid**2} positions")
        x = x + self.pos_embed[:, -x.shape[1]:]
        # 5. Include a learnable [class] embedding; it has a position embedding, too.
        if self.cls_token is not None:
            token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([token, x], dim=1)  # (B, 1 + N, D)
        for block in self.blocks:
            if maps is not None:
                maps.append(block.attn(block.norm1(x), return_weights=True)[1])
            x = block(x)
        return self.norm(x)

    def features(self, images):
        """(B, 3, H, H) -> (B, D): the class token, or the mean of the patches if there is none."""
        x = self.tokens(images)
        return x.mean(1) if self.cls_token is None else x[:, 0]

    def forward(self, images):
        x = self.features(images)
        return self.head(x if self.pre_logits is None else self.pre_logits(x).tanh())  # (B, K)

    def loss(self, images, targets, label_smoothing=0.0):
        """targets: classes (B,) or probabilities (B, K) -> (cross-entropy, logits (B, K))."""
        logits = self(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing), logits

    @classmethod
    def from_pretrained(cls, path, num_classes=None, image_size=None):
        """A ViT from a file: this repository's vit, mae or jepa checkpoint, or a release of timm
        (state dict), Google (.npz), MAE, I-JEPA (target encoder) or DINOv2; else UserError.

        `num_classes`: a new head, zero. `image_size`: position table stretched to another grid.
        """
        with data.refuse(f"{path}: does not hold a ViT encoder"):
            read = read_google if str(path).endswith(".npz") else read_encoder
            state, act, heads = read(path)
            dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
            table, extra = state["pos_embed"], "cls_token" in state
            depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
            heads = heads or (16 if dim in (1152, 1280, 1408) else dim // 64)
            mlp_ratio = len(state["blocks.0.mlp.fc1.bias"]) / dim
            K = len(state.setdefault("head.bias", torch.zeros(num_classes or 1)))
            state.setdefault("head.weight", torch.zeros(K, dim))
            model = cls(math.isqrt(table.shape[1] - extra) * patch_size, patch_size, dim, depth,
                        heads, mlp_ratio, K, extra, act)
            if "pre_logits.bias" in state:
                model.pre_logits = nn.Linear(dim, len(state["pre_logits.bias"]))
            model.load_state_dict(state)
        if num_classes:
            model.pre_logits, model.head = None, nn.Linear(dim, num_classes)
            nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)
        if image_size:
            if image_size % patch_size:
                raise data.UserError(f"{path}: its patches of {patch_size} pixels do not divide "
                                     f"pictures of {image_size}; change --image-size")
            model.grid = image_size // patch_size
            table = resize_table(model.pos_embed.detach(), model.grid, extra=extra)
            model.pos_embed = nn.Parameter(table)
        return model


def read_encoder(path):
    """A .pt or .pth file -> (state dict in timm's names, activation, heads if the file tells)."""
    content = data.load_checkpoint(path)
    state = content.get("target_encoder", content.get("model", content))
    if content.get("script") == "jepa":
        state = {k[15:]: v for k, v in state.items() if k.startswith("target_encoder.")}
    state = {k.removeprefix("module."): v for k, v in state.items()
             if torch.is_tensor(v) and not k.startswith(
                 ("decoder_", "mask_token", "encoder_mask_token", "pre_logits.fc"))}
    for key in [k for k in state if k.endswith(".gamma")]:  # DINOv2 scales each branch by a vector,
        name = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        gamma = state.pop(key)  # which is the same as scaling the last map of the branch
        state[f"{name}.weight"] = gamma[:, None] * state[f"{name}.weight"]
        state[f"{name}.bias"] = gamma * state[f"{name}.bias"]
    args = content["args"] if "script" in content else {}
    return state, gelu_tanh if args.get("tanh_gelu") else F.gelu, args.get("heads")


def read_google(path):
    """Google's .npz of JAX arrays -> as read_encoder."""
    with data.refuse(f"{path}: not a Google ViT .npz"), np.load(path, allow_pickle=False) as file:
        arrays = {k.removeprefix("opt/target/").removeprefix("params/"): file[k] for k in file}
        D, state = len(arrays["embedding/bias"]), {}
        for name, array in arrays.items():
            for theirs, ours in GOOGLE.items():
                name = name.replace(theirs, ours)
            if name.endswith(".bias"):
                array = array.ravel()  # of q, k and v: [h, d]
            elif array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)  # [y, x, 3, D] -> [D, 3, y, x]
            elif name.endswith(".weight") and array.ndim > 1:  # [in, out] -> [out, in]
                array = (array.reshape(D, D) if array.ndim == 3 else array).T  # 3: [D, h, d]
            state[name] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        for q in [name for name in state if ".query." in name]:
            parts = [state.pop(q.replace("query", part)) for part in ("query", "key", "value")]
            state[q.replace("query", "qkv")] = torch.cat(parts)
    return state, gelu_tanh, None


@torch.no_grad()
def attention_maps(model, images):
    """(B, 3, H, H) -> (layers, B, h, 1 + N, 1 + N): how much each token listens to each."""
    model.tokens(images, maps := [])
    return torch.stack(maps)


def attention_distance(maps, patch_size):
    """Figure 7 right: mean distance in pixels from a patch to what it attends to, (layers, h)."""
    n = math.isqrt(maps.shape[-1])
    maps = maps[..., -n * n:, -n * n:]
    maps = maps / maps.sum(-1, keepdim=True)  # the class token left out, the rest sums to 1 again
    side = torch.arange(n, dtype=maps.dtype, device=maps.device) * patch_size
    cells = torch.cartesian_prod(side, side)  # (N, 2)
    return (maps * torch.cdist(cells, cells)).sum(-1).mean((1, 3))


def rollout(maps):
    """Attention rollout (Abnar and Zuidema 2020): what reaches the features, (B, 1, n, n)."""
    flow = identity = torch.eye(maps.shape[-1], device=maps.device)
    for layer in maps.mean(2):
        flow = (layer + identity) / 2 @ flow  # half through attention, half along the residual
    n = math.isqrt(maps.shape[-1])
    flow = flow[:, 0, 1:] if maps.shape[-1] > n * n else flow.mean(1)  # no class token: the mean
    flow = flow.reshape(-1, 1, n, n)
    return flow / flow.amax((2, 3), keepdim=True)


@torch.no_grad()
def draw(model, dataset, out):
    """The slide "ViT: Visualizing Internals" and rollout; returns the names of the files."""
    low, high = (lambda x, f=f: f(x, (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    stretch = lambda x: (x - low(x)) / (high(x) - low(x))  # each picture from 0 to 1
    weight = model.patch_embed.proj.weight  # (D, 3, P, P)
    components = torch.linalg.svd((weight - weight.mean(0)).flatten(1), full_matrices=False)[2]
    data.save_png(out / "filters.png", stretch(components[:28].unflatten(1, weight.shape[1:])), 7)
    n = model.grid
    table = model.pos_embed[0, -n * n:]
    table = F.normalize(table - table.mean(0), dim=1)
    tiles = (table @ table.T).reshape(-1, 1, n, n).expand(-1, 3, -1, -1)
    data.save_png(out / "positions.png", stretch(tiles), columns=n)
    parts = dataset.normalise(dataset.test_images[:128]).split(8)
    maps = attention_maps(model, parts[0])
    heads = torch.stack([attention_distance(attention_maps(model, x), model.patch_size)
                         for x in parts]).mean(0).T.tolist()
    data.save_chart(out / "attention_distance.svg", {
        f"head {h + 1}": list(enumerate(distances, 1)) for h, distances in enumerate(heads)},
        "layer", "mean attention distance (pixels)", lines=False)
    images = dataset.test_images[:8].float() / 255
    light = F.interpolate(rollout(maps), images.shape[2:], mode="bilinear")
    data.save_png(out / "rollout.png", torch.cat([images, images * light]))
    return ["filters.png", "positions.png", "attention_distance.svg", "rollout.png"]


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "vit", SIZES, steps=1700, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--weight-decay", 0.05, "of matrices", type=number(float, 0, 10))
    parser.add("--label-smoothing", 0.1, "share for the other classes", type=number(float, 0, 0.99))
    parser.add("--augment", "light", "light: shift, flip; strong: and mixup or cutmix, erasing",
               choices=["none", "light", "strong"])
    parser.add("--train-images", None, "so many only; trains a CNN, too", type=number(int, 20))
    parser.add("--init", None, "fine-tune this vit, mae, jepa or released file with a new head")
    parser.add("--layer-decay", 1.0, "of the rate, from layer to layer", type=number(float, 0, 1))
    return data.parse(parser, "vit", SIZES, argv)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model, args):
    """Layer i of n learns at layer_decay^(n - i) of the rate; vectors and tables do not decay."""
    groups, n = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        top = n if name.startswith(("norm", "head")) else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else top
        key = args.layer_decay ** (n - layer), args.weight_decay * (p.ndim in (2, 4))
        groups.setdefault(key, []).append(p)
    return [dict(params=g, scale=scale, weight_decay=wd) for (scale, wd), g in groups.items()]


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load or args.init:
        model = ViT.from_pretrained(args.load or args.init)
        args.patch_size, args.dim = model.patch_size, len(model.norm.weight)
        args.depth, args.heads = len(model.blocks), model.blocks[0].attn.heads
        args.tanh_gelu = model.blocks[0].mlp.act is gelu_tanh
        if args.load:
            args.steps, args.image_size = 0, model.grid * model.patch_size
    dataset = data.open_data(args, device)
    K = len(dataset.class_names)
    if args.train_images:  # for the probes, too
        dataset.train_images = dataset.train_images[:args.train_images]
        dataset.train_labels = dataset.train_labels[:args.train_images]
    torch.manual_seed(args.seed)
    if args.init:
        model = ViT.from_pretrained(args.init, K, args.image_size)
    elif not args.load:
        model = ViT(args.image_size, args.patch_size, args.dim, args.depth, args.heads,
                    num_classes=K)
    model.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=device.type != "mps")
    start, scores = data.resume(args, "vit", model=model, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="vit", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        index = data.batch_index(len(dataset.train_labels), args.batch_size, step, args.seed)
        x, y = dataset.train_images[index.to(device)], dataset.train_labels[index.to(device)]
        x = dataset.normalise(x if args.augment == "none" else data.augment(x))
        if args.augment == "strong":
            x, y = data.mix(x, F.one_hot(y, K).float())
        with amp:
            loss, _ = loss_function(x, y, args.label_smoothing)
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
    if model.head.out_features == K:
        logits = data.extract(model, dataset, dataset.test_images, amp)
        scores["accuracy"] = (logits.argmax(1) == dataset.test_labels).float().mean().item()
    if args.train_images:
        cnn = data.extract(data.train_cnn(dataset, args.seed), dataset, dataset.test_images, amp)
        scores["cnn"] = (cnn.argmax(1) == dataset.test_labels).float().mean().item()
    untrained = copy.deepcopy(model)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, model.features, untrained.features, amp)
    files = draw(model, dataset, out)
    if not args.load:
        save(max(start, args.steps))
        files += ["checkpoint.pt", "log.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
