"""Training images/s of each script's model and of its peers, in alternation within one run.

    python tests/benchmark.py                      # all six, default sizes, float32 and bfloat16
    python tests/benchmark.py vit --image-size 224 --patch-size 16 --dim 768 --depth 12 --heads 12 --batch-size 8
    python tests/benchmark.py clip --grow          # and how the cost grows with width, depth, tokens, batch
    python tests/benchmark.py --sample             # images/s drawn by iGPT and SiT
    python tests/benchmark.py --arithmetic         # multiply-adds of CLIP's two image encoders
    python tests/benchmark.py --precision bf16 --compile    # a GPU: with torch.compile, too

Peers are Hugging Face's models, with each attention that they offer, timm's ViT, and the authors' I-JEPA and REPA,
where `transformers` and `timm` are installed, and facebookresearch/ijepa and sihyun-yu/REPA on PYTHONPATH; the fastest
one counts. All train by the same step: forward, backward, clip, AdamW. Times are medians. "share": multiply-adds of the
step (matrix products alone), divided by its time and by the machine's own rate at one large product. Peak memory: what
three steps hold beyond what was held before them.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import clip  # noqa: E402
import igpt  # noqa: E402
import jepa  # noqa: E402
import mae  # noqa: E402
import repa  # noqa: E402
import vit  # noqa: E402

# ------------------------------------------------------------------------------------- models and peers
#
# Each function takes the options and returns a model and its loss, a function of images (B, 3, H, H).


def sizes(options):
    """The options that the constructors of all models with patches share."""
    return dict(image_size=options.image_size, patch_size=options.patch_size, dim=options.dim, depth=options.depth,
                heads=options.heads)


def labels(images, options):
    return torch.arange(len(images), device=images.device) % options.classes


def hugging_face_sizes(options):
    return dict(image_size=options.image_size, patch_size=options.patch_size, hidden_size=options.dim,
                num_hidden_layers=options.depth, num_attention_heads=options.heads,
                intermediate_size=4 * options.dim, layer_norm_eps=1e-6)


def ours_vit(options):
    model = vit.ViT(**sizes(options), num_classes=options.classes)

    def loss(images):
        loss, logits = model.loss(images, labels(images, options))
        return loss

    return model, loss


def hugging_face_vit(options, attention):
    import transformers
    config = transformers.ViTConfig(**hugging_face_sizes(options), num_labels=options.classes,
                                    attn_implementation=attention)
    model = transformers.ViTForImageClassification(config)

    def loss(images):
        return F.cross_entropy(model(images).logits.float(), labels(images, options))

    return model, loss


def timm_vit(options):
    import timm
    model = timm.models.VisionTransformer(options.image_size, options.patch_size, num_classes=options.classes,
                                          embed_dim=options.dim, depth=options.depth, num_heads=options.heads)

    def loss(images):
        return F.cross_entropy(model(images).float(), labels(images, options))

    return model, loss


def ours_mae(options):
    model = mae.MAE(**sizes(options))

    def loss(images):
        loss, pred, mask = model(images)
        return loss

    return model, loss


def ours_mae_all_tokens(options):
    """The arithmetic of an encoder that sees mask tokens: it reads as many tokens as there are patches."""
    model = mae.MAE(**sizes(options))

    def loss(images):
        noise = torch.rand(len(images), model.grid**2, device=images.device)
        order = noise.argsort(dim=1)  # (B, N)
        restore = order.argsort(dim=1)
        mask = (restore >= int(0.25 * model.grid**2)).float()  # 1 = masked, three quarters
        latent = model.encode(images, visible=order)  # all N patches, in another order
        pred = model.decode(latent, restore)
        target = model.target(images)
        error = (pred.to(target.dtype) - target).square().mean(dim=-1)  # (B, N)
        return (error * mask).sum() / mask.sum()

    return model, loss


def hugging_face_mae(options, attention):
    import transformers
    config = transformers.ViTMAEConfig(**hugging_face_sizes(options), decoder_hidden_size=64,
                                       decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                       decoder_intermediate_size=256, attn_implementation=attention)
    model = transformers.ViTMAEForPreTraining(config)

    def loss(images):
        return model(images).loss

    return model, loss


def color_tokens(images, side=16, colors=64):
    """Some color for each pixel of side x side: tokens (B, side * side)."""
    return (images[:, :1, :side, :side].flatten(1) * 1e4).long() % colors


def ours_igpt(options):
    model = igpt.ImageGPT(image_size=16, dim=options.dim, depth=options.depth, heads=options.heads, num_colors=64)

    def loss(images):
        loss, logits = model.loss(color_tokens(images))
        return loss

    return model, loss


def hugging_face_igpt(options, attention):
    import transformers
    config = transformers.ImageGPTConfig(vocab_size=65, n_positions=256, n_embd=options.dim, n_layer=options.depth,
                                         n_head=options.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                         attn_implementation=attention)
    model = transformers.ImageGPTForCausalImageModeling(config)

    def loss(images):
        tokens = color_tokens(images)
        logits = model(input_ids=F.pad(tokens[:, :-1], (1, 0), value=64)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return model, loss


def caption_ids(images, length):
    """Captions of 12 tokens, [SOS] and [EOS], padded to a length: (B, length)."""
    ids = torch.arange(len(images) * 12, device=images.device).reshape(-1, 12) % 1000
    ids = F.pad(ids, (1, 0), value=1022)
    ids = F.pad(ids, (0, 1), value=1023)
    return F.pad(ids, (0, length - 14))


def ours_clip(options):
    model = clip.CLIP(**sizes(options))

    def loss(images):
        loss, logits = model.loss(images, caption_ids(images, 77))
        return loss

    return model, loss


def hugging_face_clip(options, attention):
    """With captions that are no longer than they must be, as ours cuts them."""
    import transformers
    text = dict(vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                max_position_embeddings=77, eos_token_id=1023, bos_token_id=1022, pad_token_id=0)
    config = transformers.CLIPConfig(text_config=text, vision_config=hugging_face_sizes(options), projection_dim=512,
                                     attn_implementation=attention)
    model = transformers.CLIPModel(config)

    def loss(images):
        return model(input_ids=caption_ids(images, 14), pixel_values=images, return_loss=True).loss

    return model, loss


def jepa_masks(images, options):
    """-> context (B, n) and target (B, K), 40 % and 60 % of the patches."""
    N = (options.image_size // options.patch_size) ** 2
    order = torch.rand(len(images), N, device=images.device).argsort(dim=1)
    n = int(0.4 * N)
    return order[:, :n], order[:, n:]


def ours_jepa(options):
    model = jepa.IJEPA(**sizes(options), center=True)

    def loss(images):
        context_idx, target_idx = jepa_masks(images, options)
        loss, pred = model.loss(images, context_idx, target_idx[None])
        return loss

    return model, loss


def official_jepa(options):
    """facebookresearch/ijepa on PYTHONPATH."""
    from src.masks.utils import apply_masks
    from src.models.vision_transformer import VisionTransformer, VisionTransformerPredictor
    more = dict(mlp_ratio=4, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    encoder = VisionTransformer([options.image_size], options.patch_size, embed_dim=options.dim, depth=options.depth,
                                num_heads=options.heads, **more)
    target_encoder = VisionTransformer([options.image_size], options.patch_size, embed_dim=options.dim,
                                       depth=options.depth, num_heads=options.heads, **more)
    target_encoder.requires_grad_(False)
    N = (options.image_size // options.patch_size) ** 2
    predictor = VisionTransformerPredictor(N, options.dim, 64, 2, options.heads, **more)

    def loss(images):
        context_idx, target_idx = jepa_masks(images, options)
        with torch.no_grad():
            target = apply_masks(F.layer_norm(target_encoder(images), (options.dim,)), [target_idx])
        pred = predictor(encoder(images, [context_idx]), [context_idx], [target_idx])
        return F.smooth_l1_loss(pred.float(), target.float())

    return torch.nn.ModuleList([encoder, predictor, target_encoder]), loss


def ours_repa(options):
    """At 16 x 16 with patches of 2, as in the default run."""
    model = repa.SiT(image_size=16, patch_size=2, dim=options.dim, depth=options.depth, heads=options.heads)

    def loss(images):
        z = torch.ones(len(images), 64, 128, device=images.device)  # the teacher's tokens
        loss, parts = model.loss(images[:, :, :16, :16], labels(images, options), z)
        return loss

    return model, loss


def official_repa(options):
    """sihyun-yu/REPA on PYTHONPATH; it needs timm."""
    from loss import SILoss
    from models.sit import SiT
    model = SiT("linear", input_size=16, patch_size=2, in_channels=3, hidden_size=options.dim,
                decoder_hidden_size=options.dim, encoder_depth=2, depth=options.depth, num_heads=options.heads,
                num_classes=10, use_cfg=True, z_dims=[128], projector_dim=256, qk_norm=False, fused_attn=True)

    def loss(images):
        zs = [torch.ones(len(images), 64, 128, device=images.device)]
        classes = dict(y=labels(images, options))
        velocity, alignment = SILoss()(model, images[:, :, :16, :16], classes, zs)
        return velocity.mean() + 0.5 * alignment.mean()

    return model, loss


OURS = {"vit": ours_vit, "mae": ours_mae, "igpt": ours_igpt, "clip": ours_clip, "jepa": ours_jepa, "repa": ours_repa}


def hugging_face(make, *attentions):
    return [("transformers", f"transformers {name}", functools.partial(make, attention=name)) for name in attentions]


PEERS = {  # of each script: (the package that has to be importable, label, maker)
    "vit": [*hugging_face(hugging_face_vit, "eager", "sdpa"), ("timm", "timm", timm_vit)],
    "mae": hugging_face(hugging_face_mae, "eager", "sdpa"),
    "igpt": hugging_face(hugging_face_igpt, "eager"),  # it refuses sdpa
    "clip": hugging_face(hugging_face_clip, "eager", "sdpa"),
    "jepa": [("src", "the authors'", official_jepa)],
    "repa": [("loss", "the authors'", official_repa)],
}


@functools.cache
def installed(package):
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"no package {package}: not compared with", file=sys.stderr)
    return found


def makers(name, options):
    """{label: a function, options -> (model, loss of images)}, of peers those that are importable."""
    found = {"ours": OURS[name]}
    if options.compile:
        found["ours compiled"] = functools.partial(ours_compiled, name=name)
    if name == "mae":
        found["ours, all tokens in the encoder"] = ours_mae_all_tokens
    for package, label, make in PEERS[name]:
        if installed(package):
            found[label] = make
    return found


def ours_compiled(options, name):
    model, loss = OURS[name](options)
    method = "loss" if hasattr(model, "loss") else "forward"  # what the scripts compile
    setattr(model, method, torch.compile(getattr(model, method)))
    return model, loss


# ------------------------------------------------------------------------------------------ measurements


def wait(device):
    """For a GPU's work to end."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(call, device):
    """How long call() takes, a GPU's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


class Trainer:
    """One model in one precision; `step()` trains once and keeps the time it took."""

    def __init__(self, model, loss, images, precision):
        self.model = model.to(images.device).train()
        self.loss = loss
        self.images = images
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=images.device.type != "mps")
        self.amp = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.times = []

    def step(self):
        self.times.append(seconds(self.train, self.images.device))

    def train(self):
        with self.amp:
            loss = self.loss(self.images)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def random_images(options):
    return torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)


def matrix_rate(device, precision):
    """The machine's own multiply-adds per second on one large matrix product."""
    n = 2048 if torch.device(device).type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    while len(times) < 8 and sum(times) < 10:  # a CPU without bfloat16 units takes a minute for one
        times.append(seconds(lambda: a @ a, device))
    return n**3 / min(times)


def step_multiply_adds(trainer):
    """Of a training step's matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter, trainer.amp:
        trainer.loss(trainer.images).backward()
    return counter.get_total_flops() / 2


def process_status(key):
    """A line of Linux's /proc/self/status, in MiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024


def peak_memory(name, label, precision, options):
    """Of three steps, in MiB, beyond what there was before; on a CPU (Linux), weights do not count."""
    images = random_images(options)
    on_gpu = images.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    model, loss = makers(name, options)[label](options)
    trainer = Trainer(model, loss, images, precision)
    if not on_gpu:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far, that of the imports
        before = process_status("VmRSS")
    for _ in range(3):
        trainer.step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else process_status("VmHWM")
    return peak - before


def memory(name, label, precision, options):
    """On a CPU in a process of its own, as a process does not give back what it has once held."""
    if torch.device(options.device).type != "cpu":
        return peak_memory(name, label, precision, options)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, name, label, precision, options).result()


def measure_in(name, precision, images, options):
    """-> a row: images/s, memory and arithmetic of ours and of each peer, in one precision."""
    trainers = {}
    for label, make in makers(name, options).items():
        model, loss = make(options)
        trainers[label] = Trainer(model, loss, images, precision)
    work = step_multiply_adds(trainers["ours"]) / options.batch_size  # for one image
    for _ in range(options.warmup + options.rounds):
        for trainer in trainers.values():
            trainer.step()

    rate = {}
    for label, trainer in trainers.items():
        rate[label] = options.batch_size / statistics.median(trainer.times[options.warmup:])
    ours = max(rate["ours"], rate.get("ours compiled", 0))
    peers = [rate[label] for label in rate if "ours" not in label]
    machine = matrix_rate(options.device, precision)
    mib = {}
    if options.memory:
        mib = {label: memory(name, label, precision, options) for label in trainers}
    return dict(model=name, precision=precision, images_per_second=rate,
                ratio=rate["ours"] / max(peers) if peers else None, mib=mib,
                mega_multiply_adds=work / 1e6, matrix_gmacs=machine / 1e9, share=work * ours / machine)


def measure(name, options):
    """-> a row for each precision; the last one also compares the best of ours with the best peer."""
    torch.manual_seed(0)
    images = random_images(options)
    rows = [measure_in(name, precision, images, options) for precision in options.precision]
    ours = []
    peers = []
    for row in rows:
        for label, rate in row["images_per_second"].items():
            if label == "ours":
                ours.append(rate)
            elif "ours" not in label:
                peers.append(rate)
    rows[-1]["best_to_best"] = max(ours) / max(peers) if peers else None
    return rows


def print_row(row):
    rates = []
    for label, rate in row["images_per_second"].items():
        text = f"{label} {rate:.0f}"
        if row["mib"]:
            text += f" ({row['mib'][label]:.0f} MiB)"
        rates.append(text)
    line = f"{row['model']} {row['precision']}: images/s {', '.join(rates)}"
    if row["ratio"]:
        line += f"; ours / fastest peer {row['ratio']:.2f}"
    if row.get("best_to_best"):
        line += f", best precision to best {row['best_to_best']:.2f}"
    print(f"{line}; {row['mega_multiply_adds']:.0f} M multiply-adds an image, "
          f"share {row['share']:.2f} of {row['matrix_gmacs']:.0f} G/s")


# ------------------------------------------------------------------- sampling, growth, CLIP's arithmetic


@torch.no_grad()
def sampling(options):
    """Images/s drawn in float32: by iGPT (8 of 256 tokens, with a cache), by SiT (64 of 16 x 16, 15 Euler steps)."""
    device = options.device
    given = torch.empty(8, 0, dtype=torch.long, device=device)
    noise = torch.randn(64, 3, 16, 16, device=device)
    y = labels(noise, options)
    gpt = ours_igpt(options)[0].to(device).eval()
    sit = ours_repa(options)[0].to(device).eval()
    igpt_ways = {"ours": functools.partial(gpt.sample, given)}
    sit_ways = {"ours": functools.partial(repa.sample, sit, noise, y, steps=15)}
    if installed("transformers"):
        theirs = hugging_face_igpt(options, "eager")[0].to(device).eval()
        start = torch.full((8, 1), 64, device=device)
        igpt_ways["transformers eager"] = functools.partial(theirs.generate, start, max_length=256, do_sample=True,
                                                            top_k=0)
    if installed("loss"):
        from samplers import euler_sampler
        official = official_repa(options)[0].to(device).eval()
        sit_ways["the authors'"] = functools.partial(euler_sampler, official, noise, y, 15)

    for name, ways, count in (("igpt", igpt_ways, len(given)), ("repa", sit_ways, len(noise))):
        times = {label: [] for label in ways}
        for _ in range(5):  # in alternation; the first round does not count
            for label, draw in ways.items():
                times[label].append(seconds(draw, device))
        rates = [f"{label} {count / statistics.median(times[label][1:]):.2f}" for label in ways]
        print(f"{name} sampling: images/s {', '.join(rates)}")


def grow(name, options):
    """ms a step in bfloat16 as one of width, depth, tokens and batch grows and the others stay."""
    axes = {"dim": (64, 128, 256, 512), "depth": (2, 4, 8), "image_size": (16, 32, 64), "batch_size": (16, 64, 256)}
    for axis, values in axes.items():
        for value in values:
            changed = argparse.Namespace(**vars(options) | {axis: value})
            model, loss = OURS[name](changed)
            trainer = Trainer(model, loss, random_images(changed), "bf16")
            for _ in range(options.warmup + 8):
                trainer.step()
            time_ms = 1000 * statistics.median(trainer.times[options.warmup:])
            print(f"{name}, {axis} {value}: {time_ms:.1f} ms a step")


def arithmetic(options):
    """Multiply-adds for one image of CLIP's image encoders: the default ViT, and a ResNet with its options."""
    for name in ("vit", "resnet"):
        model = clip.CLIP(**sizes(options), image_encoder=name)
        encoder = model.image_encoder.eval().to("meta")  # shapes without numbers
        image = torch.empty(1, 3, options.image_size, options.image_size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(image)
        parameters = sum(p.numel() for p in encoder.parameters())
        print(f"clip, {name}: {counter.get_total_flops() / 2e6:.1f} M multiply-adds an image, "
              f"{parameters / 1e6:.2f} M parameters")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(OURS), help=", ".join(OURS))
    numbers = dict(image_size=32, patch_size=4, dim=128, depth=4, heads=4, classes=10, batch_size=64, rounds=30,
                   warmup=5)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--grow", action="store_true", help="how a step's cost grows instead")
    parser.add_argument("--sample", action="store_true", help="sampling of iGPT and SiT instead")
    parser.add_argument("--arithmetic", action="store_true", help="CLIP's ViT against its ResNet instead")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    if options.arithmetic:
        return arithmetic(options)
    if options.sample:
        return sampling(options)
    if options.grow:
        for name in options.models:
            grow(name, options)
        return None
    rows = []
    for name in options.models:
        rows += measure(name, options)
    if options.json:
        print(json.dumps(rows))
        return None
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()
