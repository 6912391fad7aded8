"""Training pictures/s of each script's model and of its peers, in alternation within one run.

    python tests/benchmark.py                      # all six, default sizes, float32 and bfloat16
    python tests/benchmark.py vit --image-size 224 --patch-size 16 --dim 768 --depth 12 --heads 12 --batch-size 8
    python tests/benchmark.py clip --grow          # and how the cost grows with width, depth, tokens, batch
    python tests/benchmark.py --sample             # pictures/s drawn by iGPT and SiT
    python tests/benchmark.py --precision bf16 --compile    # a GPU: with torch.compile, too

Peers are Hugging Face's models, with each attention that they offer, timm's ViT, and the authors' I-JEPA and REPA, where
`transformers` and `timm` are installed, and facebookresearch/ijepa and sihyun-yu/REPA on PYTHONPATH; the fastest one
counts. All train by the same step: forward, backward, clip, AdamW. Times are medians. "share": multiply-adds of the step
(matrix products alone), divided by its time and by the machine's own rate at one large product. Peak memory: what three
steps hold beyond what was held before them.
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


def ours_vit(o):
    model = vit.ViT(o.image_size, o.patch_size, o.dim, o.depth, o.heads, num_classes=o.classes)
    return model, lambda x: model.loss(x, labels(x, o))[0]


def labels(x, o):
    return torch.arange(len(x), device=x.device) % o.classes


def hf(o, **more):
    return dict(image_size=o.image_size, patch_size=o.patch_size, hidden_size=o.dim, num_hidden_layers=o.depth,
                num_attention_heads=o.heads, intermediate_size=4 * o.dim, layer_norm_eps=1e-6) | more


def hf_vit(o, attention):
    import transformers
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        **hf(o, num_labels=o.classes, attn_implementation=attention)))
    return model, lambda x: F.cross_entropy(model(x).logits.float(), labels(x, o))


def timm_vit(o):
    import timm
    model = timm.models.VisionTransformer(o.image_size, o.patch_size, num_classes=o.classes, embed_dim=o.dim,
                                          depth=o.depth, num_heads=o.heads)
    return model, lambda x: F.cross_entropy(model(x).float(), labels(x, o))


def ours_mae(o, masks=False):
    model = mae.MAE(o.image_size, o.patch_size, o.dim, o.depth, o.heads, encoder_sees_masks=masks)
    return model, lambda x: model(x)[0]


def hf_mae(o, attention):
    import transformers
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**hf(
        o, decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=256, attn_implementation=attention)))
    return model, lambda x: model(x).loss


def pixels(x, side=16, colours=64):
    return (x[:, :1, :side, :side].flatten(1) * 1e4).long() % colours


def ours_igpt(o):
    model = igpt.ImageGPT(16, o.dim, o.depth, o.heads)
    return model, lambda x: model.loss(pixels(x))[0]


def hf_igpt(o, attention):
    import transformers
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(
        vocab_size=65, n_positions=256, n_embd=o.dim, n_layer=o.depth, n_head=o.heads, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, attn_implementation=attention))

    def loss(x):
        tokens = pixels(x)
        logits = model(input_ids=F.pad(tokens[:, :-1], (1, 0), value=64)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return model, loss


def ids(x, length):
    """Captions of 12 tokens, [SOS] and [EOS], padded to a length."""
    words = torch.arange(len(x) * 12, device=x.device).reshape(-1, 12) % 1000
    return F.pad(F.pad(F.pad(words, (1, 0), value=1022), (0, 1), value=1023), (0, length - 14))


def ours_clip(o):
    model = clip.CLIP(o.image_size, o.patch_size, o.dim, o.depth, o.heads)
    return model, lambda x: model.loss(x, ids(x, 77))[0]


def hf_clip(o, attention):
    """With captions that are no longer than they must be, as ours cuts them."""
    import transformers
    text = dict(vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                max_position_embeddings=77, eos_token_id=1023, bos_token_id=1022, pad_token_id=0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=hf(o), projection_dim=512, attn_implementation=attention))
    return model, lambda x: model(input_ids=ids(x, 14), pixel_values=x, return_loss=True).loss


def masks(x, o):
    """-> which patches are shown and which hidden: 40 % and 60 %."""
    n = (o.image_size // o.patch_size) ** 2
    order = torch.rand(len(x), n, device=x.device).argsort(1)
    return order[:, :int(0.4 * n)], order[:, int(0.4 * n):]


def ours_jepa(o):
    model = jepa.IJEPA(o.image_size, o.patch_size, o.dim, o.depth, o.heads, centre=True)

    def loss(x):
        shown, hidden = masks(x, o)
        return model.loss(x, shown, hidden[None])[0]

    return model, loss


def ours_repa(o):
    """At 16 x 16 with patches of 2, as in the default run."""
    model = repa.SiT(16, 2, o.dim, o.depth, o.heads)
    return model, lambda x: model.loss(x[:, :, :16, :16], labels(x, o), torch.ones(len(x), 64, 128, device=x.device))[0]


def official_jepa(o):
    """facebookresearch/ijepa on PYTHONPATH."""
    from src.masks.utils import apply_masks
    from src.models.vision_transformer import VisionTransformer, VisionTransformerPredictor
    more = dict(mlp_ratio=4, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    make = lambda: VisionTransformer([o.image_size], o.patch_size, embed_dim=o.dim, depth=o.depth, num_heads=o.heads, **more)
    predictor = VisionTransformerPredictor((o.image_size // o.patch_size) ** 2, o.dim, 64, 2, o.heads, **more)
    model = torch.nn.ModuleList([make(), predictor, make().requires_grad_(False)])

    def loss(x):
        shown, hidden = ([index] for index in masks(x, o))
        with torch.no_grad():
            target = apply_masks(F.layer_norm(model[2](x), (o.dim,)), hidden)
        return F.smooth_l1_loss(predictor(model[0](x, shown), shown, hidden).float(), target.float())

    return model, loss


def official_repa(o):
    """sihyun-yu/REPA on PYTHONPATH; it needs timm."""
    from loss import SILoss
    from models.sit import SiT
    model = SiT("linear", 16, 2, 3, o.dim, o.dim, encoder_depth=2, depth=o.depth, num_heads=o.heads, num_classes=10, use_cfg=True,
                z_dims=[128], projector_dim=256, qk_norm=False, fused_attn=True)

    def loss(x):
        zs = [torch.ones(len(x), 64, 128, device=x.device)]
        velocity, alignment = SILoss()(model, x[:, :, :16, :16], dict(y=labels(x, o)), zs)
        return velocity.mean() + 0.5 * alignment.mean()

    return model, loss


OURS = {"vit": ours_vit, "mae": ours_mae, "igpt": ours_igpt, "clip": ours_clip, "jepa": ours_jepa, "repa": ours_repa}


def hugging_face(make, *attentions):
    return [("transformers", f"transformers {name}", functools.partial(make, attention=name)) for name in attentions]


PEERS = {  # of each script: (the package that has to be importable, label, maker)
    "vit": [*hugging_face(hf_vit, "eager", "sdpa"), ("timm", "timm", timm_vit)],
    "mae": hugging_face(hf_mae, "eager", "sdpa"),
    "igpt": hugging_face(hf_igpt, "eager"),  # it refuses sdpa
    "clip": hugging_face(hf_clip, "eager", "sdpa"),
    "jepa": [("src", "the authors'", official_jepa)],
    "repa": [("loss", "the authors'", official_repa)],
}


@functools.cache
def installed(package):
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"no package {package}: not compared with", file=sys.stderr)
    return found


def makers(name, o):
    """{label: a maker of (model, loss of images), given o}, of peers those that are importable."""
    found = {"ours": OURS[name]}
    if o.compile:
        found["ours compiled"] = lambda o: compiled(*OURS[name](o))
    if name == "mae":
        found["ours, all tokens in the encoder"] = functools.partial(ours_mae, masks=True)
    return found | {label: make for package, label, make in PEERS[name] if installed(package)}


def compiled(model, loss):
    name = "loss" if hasattr(model, "loss") else "forward"  # what the scripts compile
    setattr(model, name, torch.compile(getattr(model, name)))
    return model, loss


def seconds(f, device):
    """How long f() takes, a GPU's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


class Trainer:
    """One model in one precision; `step()` trains once and keeps the time it took."""

    def __init__(self, model, loss, images, precision):
        self.model, self.loss, self.images = model.to(images.device).train(), loss, images
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


def matrix_rate(device, precision):
    """The machine's own multiply-adds per second, in 10^9, on one large matrix product."""
    n = 2048 if torch.device(device).type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return n**3 / min(seconds(lambda: a @ a, device) for _ in range(8)) / 1e9


def multiply_adds(trainer):
    """Of a training step's matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter, trainer.amp:
        trainer.loss(trainer.images).backward()
    return counter.get_total_flops() / 2


def held(name, label, precision, o):
    """The peak memory of three steps, in MiB, beyond what there was before; on a CPU (Linux), weights do not count."""
    images = torch.randn(o.batch_size, 3, o.image_size, o.image_size, device=o.device)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        peak, before = lambda: torch.cuda.max_memory_allocated() / 2**20, torch.cuda.memory_allocated() / 2**20
    trainer = Trainer(*makers(name, o)[label](o), images, precision)
    if not images.is_cuda:
        status = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far, that of the imports
        peak, before = lambda: status("VmHWM") / 1024, status("VmRSS") / 1024
    for _ in range(3):
        trainer.step()
    return peak() - before


def memory(name, label, precision, o):
    """On a CPU in a process of its own, as a process does not give back what it has once held."""
    if torch.device(o.device).type != "cpu":
        return held(name, label, precision, o)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(held, name, label, precision, o).result()


def measure(name, o):
    """A row for each precision: pictures/s, memory and arithmetic of ours and of each peer."""
    torch.manual_seed(0)
    images = torch.randn(o.batch_size, 3, o.image_size, o.image_size, device=o.device)
    rows = []
    for precision in o.precision:
        trainers = {label: Trainer(*make(o), images, precision) for label, make in makers(name, o).items()}
        work = multiply_adds(trainers["ours"])
        for i in range(o.warmup + o.rounds):
            for trainer in trainers.values():
                trainer.step()
        rate = {k: o.batch_size / statistics.median(t.times[o.warmup:]) for k, t in trainers.items()}
        peers = [v for k, v in rate.items() if "ours" not in k]
        machine = matrix_rate(o.device, precision)
        rows.append(dict(
            model=name, precision=precision, pictures_per_second=rate, ratio=rate["ours"] / max(peers) if peers else None,
            mib={k: memory(name, k, precision, o) for k in trainers} if o.memory else {},
            mega_multiply_adds=work / o.batch_size / 1e6, matrix_gmacs=machine,
            share=work / o.batch_size * max(v for k, v in rate.items() if k in ("ours", "ours compiled")) / machine / 1e9))
    best = max((v for row in rows for k, v in row["pictures_per_second"].items() if "ours" not in k), default=None)
    rows[-1]["best_to_best"] = best and max(row["pictures_per_second"]["ours"] for row in rows) / best
    return rows


@torch.no_grad()
def sampling(o):
    """Pictures/s drawn in float32: by iGPT (8 of 256 tokens, with a cache), by SiT (64 of 16 x 16, 15 Euler steps)."""
    tokens, noise = torch.empty(8, 0, dtype=torch.long, device=o.device), torch.randn(64, 3, 16, 16, device=o.device)
    gpt, sit = (OURS[name](o)[0].to(o.device).eval() for name in ("igpt", "repa"))
    ways = {"igpt": {"ours": lambda: gpt.sample(tokens)},
            "repa": {"ours": lambda: repa.sample(sit, noise, labels(noise, o), 15)}}
    if installed("transformers"):
        hf, start = hf_igpt(o, "eager")[0].to(o.device).eval(), torch.full((8, 1), 64, device=o.device)
        ways["igpt"]["transformers eager"] = lambda: hf.generate(start, max_length=256, do_sample=True, top_k=0)
    if installed("loss"):
        from samplers import euler_sampler
        theirs = official_repa(o)[0].to(o.device).eval()
        ways["repa"]["the authors'"] = lambda: euler_sampler(theirs, noise, labels(noise, o), 15)
    for name, draw in ways.items():
        rounds = [{label: seconds(f, o.device) for label, f in draw.items()} for _ in range(5)]
        count = len(tokens) if name == "igpt" else len(noise)
        print(f"{name} sampling: pictures/s " + ", ".join(
            f"{label} {count / statistics.median(times[label] for times in rounds[1:]):.2f}" for label in draw))


def grow(name, o):
    """ms a step in bfloat16 as one of width, depth, tokens and batch grows and the others stay."""
    for axis, values in (("dim", (64, 128, 256, 512)), ("depth", (2, 4, 8)), ("image_size", (16, 32, 64)),
                         ("batch_size", (16, 64, 256))):
        for value in values:
            at = argparse.Namespace(**{**vars(o), axis: value})
            images = torch.randn(at.batch_size, 3, at.image_size, at.image_size, device=at.device)
            trainer = Trainer(*OURS[name](at), images, "bf16")
            for _ in range(o.warmup + 8):
                trainer.step()
            print(f"{name}, {axis} {value}: {1000 * statistics.median(trainer.times[o.warmup:]):.1f} ms a step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(OURS), help=", ".join(OURS))
    for option, default in dict(image_size=32, patch_size=4, dim=128, depth=4, heads=4, classes=10, batch_size=64,
                                rounds=30, warmup=5).items():
        parser.add_argument("--" + option.replace("_", "-"), type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--grow", action="store_true", help="how a step's cost grows instead")
    parser.add_argument("--sample", action="store_true", help="sampling of iGPT and SiT instead")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    o = parser.parse_args()
    if o.sample:
        return sampling(o)
    if o.grow:
        return [grow(name, o) for name in o.models]
    rows = [row for name in o.models for row in measure(name, o)]
    if o.json:
        print(json.dumps(rows))
        return
    for row in rows:
        rates = ", ".join(f"{k} {v:.0f}" + (f" ({row['mib'][k]:.0f} MiB)" if row["mib"] else "")
                          for k, v in row["pictures_per_second"].items())
        ratio = f"; ours / fastest peer {row['ratio']:.2f}" if row["ratio"] else ""
        best = f", best precision to best {row['best_to_best']:.2f}" if row.get("best_to_best") else ""
        print(f"{row['model']} {row['precision']}: pictures/s {rates}{ratio}{best}; {row['mega_multiply_adds']:.0f} M "
              f"multiply-adds a picture, share {row['share']:.2f} of {row['matrix_gmacs']:.0f} G/s")


if __name__ == "__main__":
    main()
