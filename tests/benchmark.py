"""Training pictures/s of a script's model and of Hugging Face's, in alternation within one run.

    python tests/benchmark.py                      # all, default sizes, float32 and bfloat16
    python tests/benchmark.py vit --image-size 224 --patch-size 16 --dim 768 --depth 12 --heads 12 --batch-size 8

The peer is measured only where `transformers` is installed, with each attention that it offers; its
faster one counts. Both train by the same step: forward, backward, clip, AdamW. Times are medians.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import igpt  # noqa: E402
import mae  # noqa: E402
import vit  # noqa: E402


def ours_vit(o, labels):
    model = vit.ViT(o.image_size, o.patch_size, o.dim, o.depth, o.heads, num_classes=o.classes)
    return model, lambda x: model.loss(x, labels)[0]


def peer_vit(o, labels, attention):
    import transformers
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=o.image_size, patch_size=o.patch_size, hidden_size=o.dim, num_hidden_layers=o.depth,
        num_attention_heads=o.heads, intermediate_size=4 * o.dim, num_labels=o.classes,
        attn_implementation=attention, layer_norm_eps=1e-6))
    return model, lambda x: F.cross_entropy(model(x).logits.float(), labels)


def ours_mae(o, labels):
    model = mae.MAE(o.image_size, o.patch_size, o.dim, o.depth, o.heads)
    return model, lambda x: model(x)[0]


def all_tokens(o, labels):
    """The ablation: hidden patches enter the encoder as mask tokens."""
    model = mae.MAE(o.image_size, o.patch_size, o.dim, o.depth, o.heads, encoder_sees_masks=True)
    return model, lambda x: model(x)[0]


def peer_mae(o, labels, attention):
    import transformers
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        image_size=o.image_size, patch_size=o.patch_size, hidden_size=o.dim, num_hidden_layers=o.depth,
        num_attention_heads=o.heads, intermediate_size=4 * o.dim, decoder_hidden_size=64, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=256, attn_implementation=attention,
        layer_norm_eps=1e-6))
    return model, lambda x: model(x).loss


def pixels(x, side=16, colours=64):
    return (x[:, :1, :side, :side].flatten(1) * 1e4).long() % colours


def ours_igpt(o, labels):
    model = igpt.ImageGPT(16, o.dim, o.depth, o.heads)
    return model, lambda x: model.loss(pixels(x))[0]


def peer_igpt(o, labels, attention):
    import transformers
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(
        vocab_size=65, n_positions=256, n_embd=o.dim, n_layer=o.depth, n_head=o.heads, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, attn_implementation=attention))
    start = torch.full((o.batch_size, 1), 64, device=o.device)

    def loss(x):
        tokens = pixels(x)
        logits = model(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return model, loss


MODELS = {"vit": (ours_vit, peer_vit), "mae": (ours_mae, peer_mae), "igpt": (ours_igpt, peer_igpt)}


class Trainer:
    """One model in one precision; `step()` trains once and keeps the time it took."""

    def __init__(self, model, loss, images, precision):
        self.model, self.loss, self.images = model.to(images.device).train(), loss, images
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=images.device.type != "mps")
        self.amp = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.times = []

    def step(self):
        wait = torch.cuda.synchronize if self.images.is_cuda else lambda: None
        wait()
        start = time.perf_counter()
        with self.amp:
            loss = self.loss(self.images)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        wait()
        self.times.append(time.perf_counter() - start)


def matrix_rate(device, precision, n=2048):
    """The machine's own multiply-adds per second, in 10^9, on one n x n matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(8):
        if a.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - start)
    return n**3 / min(times) / 1e9


def measure(name, o):
    """Rows of pictures/s: ours and each attention of the peer, float32 and bfloat16."""
    torch.manual_seed(0)
    images = torch.randn(o.batch_size, 3, o.image_size, o.image_size, device=o.device)
    labels = torch.randint(o.classes, (o.batch_size,), device=o.device)
    ours, peer = MODELS[name]
    makers = {"ours": lambda: ours(o, labels)}
    if name == "mae":
        makers["ours, all tokens in the encoder"] = lambda: all_tokens(o, labels)
    try:
        import transformers  # noqa: F401
        makers |= {f"transformers {a}": lambda a=a: peer(o, labels, a) for a in ("eager", "sdpa")}
        if name == "igpt":
            del makers["transformers sdpa"]  # refused by this model
    except ImportError:
        print("transformers is not installed: no peer to compare with")
    rows = []
    for precision in ("fp32", "bf16"):
        trainers = {key: Trainer(*make(), images, precision) for key, make in makers.items()}
        for i in range(o.warmup + o.rounds):
            for trainer in trainers.values():
                trainer.step()
        rate = {k: o.batch_size / statistics.median(t.times[o.warmup:]) for k, t in trainers.items()}
        peers = [v for k, v in rate.items() if "ours" not in k]
        ratio = rate["ours"] / max(peers) if peers else None
        rows.append(dict(model=name, precision=precision, pictures_per_second=rate, ratio=ratio,
                         matrix_gmacs=matrix_rate(o.device, precision)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    for option, default in dict(image_size=32, patch_size=4, dim=128, depth=4, heads=4, classes=10, batch_size=64,
                                rounds=30, warmup=5).items():
        parser.add_argument("--" + option.replace("_", "-"), type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    o = parser.parse_args()
    rows = [row for name in o.models for row in measure(name, o)]
    if o.json:
        print(json.dumps(rows))
        return
    for row in rows:
        rates = ", ".join(f"{k} {v:.0f}" for k, v in row["pictures_per_second"].items())
        ratio = f"; ours / faster peer {row['ratio']:.2f}" if row["ratio"] else ""
        print(f"{row['model']} {row['precision']}: pictures/s {rates}{ratio}; "
              f"machine {row['matrix_gmacs']:.0f} G multiply-adds/s")


if __name__ == "__main__":
    main()
