"""vit.py: parameter counts, released formats, its maths written another way, and the real command."""

import csv
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import vit
from common import sincos_2d
from vit import ViT


@pytest.mark.parametrize("size, patch, count", [  # 224 pixels, 1,000 classes: Google's own numbers
    ("Ti", 16, 5_717_416), ("S", 16, 22_050_664), ("S", 32, 22_878_952), ("B", 8, 86_576_872),
    ("B", 16, 86_567_656), ("B", 32, 88_224_232), ("L", 16, 304_326_632), ("L", 32, 306_535_400),
    ("H", 14, 632_045_800)])
def test_parameter_counts(size, patch, count):
    sizes = {**vit.SIZES[size], "patch_size": patch}
    with torch.device("meta"):
        model = ViT.__new__(ViT)
        ViT.init_weights, kept = (lambda self: None), ViT.init_weights
        try:
            model.__init__(image_size=224, num_classes=1000, **sizes)
        finally:
            ViT.init_weights = kept
    assert sum(p.numel() for p in model.parameters()) == count


def random_state(dim=64, depth=2, patch=4, tokens=1 + 16, classes=5, cls=True, head=True):
    """A timm state dict with random weights."""
    torch.manual_seed(0)
    shapes = {"pos_embed": (1, tokens, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
              "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    if cls:
        shapes["cls_token"] = (1, 1, dim)
    if head:
        shapes |= {"head.weight": (classes, dim), "head.bias": (classes,)}
    for i in range(depth):
        for name, shape in {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
                            "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                            "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.fc1.weight": (4 * dim, dim),
                            "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)
                            }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def reference(state, images, heads, gelu=F.gelu, pool=None):
    """The Vision Transformer as one function of a timm state dict: convolution, torch's own attention kernel."""
    s = {k: v.double() for k, v in state.items()}
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"],
                 stride=s["patch_embed.proj.weight"].shape[-1]).flatten(2).mT
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + s["pos_embed"]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)
    linear = lambda x, name: F.linear(x, s[name + ".weight"], s[name + ".bias"])
    for i in range(sum(k.endswith("norm1.bias") for k in s)):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv")
        qkv = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = x + linear(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape), b + "attn.proj")
        x = x + linear(gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2")
    x = norm(x, "norm")
    x = x[:, 0] if "cls_token" in s else x.mean(1)
    if "pre_logits.weight" in s:
        x = linear(x, "pre_logits").tanh()
    return linear(x, "head") if "head.weight" in s else x


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agree(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_timm_state_dict(tmp_path):
    state = random_state(dim=128)
    torch.save(state, tmp_path / "timm.pth")
    model = ViT.from_pretrained(tmp_path / "timm.pth")
    expected = reference(state, IMAGES, heads=2)
    assert (model(IMAGES.float()) - expected).abs().max() < 1e-5 * expected.abs().max()
    agree(model.double()(IMAGES), expected)
    fresh = ViT.from_pretrained(tmp_path / "timm.pth", num_classes=7, image_size=24)
    assert fresh.pos_embed.shape == (1, 37, 128) and (fresh(torch.randn(1, 3, 24, 24)) == 0).all()


def google_arrays(state, heads, prefix="", pre_logits=False):
    """The inverse of the loader: timm's names -> Google's .npz."""
    dim, out = state["norm.bias"].numel(), {}
    flax = {"norm": "Transformer/encoder_norm", "head": "head", "pre_logits": "pre_logits"}
    for i in range(sum(k.endswith("norm1.bias") for k in state)):
        block = f"Transformer/encoderblock_{i}/"
        flax |= {f"blocks.{i}.norm1": block + "LayerNorm_0", f"blocks.{i}.norm2": block + "LayerNorm_2",
                 f"blocks.{i}.mlp.fc1": block + "MlpBlock_3/Dense_0",
                 f"blocks.{i}.mlp.fc2": block + "MlpBlock_3/Dense_1"}
        attention, weight = block + "MultiHeadDotProductAttention_1/", state[f"blocks.{i}.attn.qkv.weight"]
        for n, name in enumerate(("query", "key", "value")):
            part = slice(n * dim, (n + 1) * dim)
            out[attention + name + "/kernel"] = weight[part].T.reshape(dim, heads, -1)
            out[attention + name + "/bias"] = state[f"blocks.{i}.attn.qkv.bias"][part].reshape(heads, -1)
        out[attention + "out/kernel"] = state[f"blocks.{i}.attn.proj.weight"].T.reshape(heads, -1, dim)
        out[attention + "out/bias"] = state[f"blocks.{i}.attn.proj.bias"]
    for ours, theirs in flax.items():
        if f"{ours}.bias" in state:
            weight = state[f"{ours}.weight"]
            out[f"{theirs}/{'kernel' if weight.ndim == 2 else 'scale'}"] = weight.mT if weight.ndim == 2 else weight
            out[f"{theirs}/bias"] = state[f"{ours}.bias"]
    out["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    out["embedding/bias"], out["cls"] = state["patch_embed.proj.bias"], state["cls_token"]
    out["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    return {prefix + k: v.contiguous().numpy() for k, v in out.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("pre_logits", [False, True])
def test_google_npz(tmp_path, prefix, pre_logits):
    state = random_state(dim=128)
    if pre_logits:
        state |= {"pre_logits.weight": torch.randn(128, 128) * 0.1, "pre_logits.bias": torch.randn(128)}
    np.savez(tmp_path / "B_16.npz", **google_arrays(state, 2, prefix))
    model = ViT.from_pretrained(tmp_path / "B_16.npz").double()
    tanh = lambda x: F.gelu(x, approximate="tanh")
    agree(model(IMAGES), reference(state, IMAGES, 2, tanh))
    assert (model(IMAGES) - reference(state, IMAGES, 2)).abs().max() > 1e-6  # timm's exact GELU is another model


def test_encoder_only_releases(tmp_path):
    """MAE {"model"}, I-JEPA {"target_encoder"} with "module." and no class token, DINOv2 with layer scale."""
    state = random_state(head=False)
    mae = {**state, "mask_token": torch.zeros(1, 1, 8), "encoder_mask_token": torch.zeros(1, 1, 64),
           "decoder_embed.weight": torch.zeros(8, 64)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    agree(ViT.from_pretrained(tmp_path / "mae.pth").double().features(IMAGES), reference(state, IMAGES, 1))

    scales = {f"blocks.{i}.ls{n}.gamma": torch.rand(64) for i in range(2) for n in (1, 2)}
    torch.save({**state, **scales, "mask_token": torch.zeros(1, 64)}, tmp_path / "dino.pth")
    folded = dict(state)
    for i in range(2):
        for n, name in ((1, "attn.proj"), (2, "mlp.fc2")):
            gamma = scales[f"blocks.{i}.ls{n}.gamma"].double()
            folded[f"blocks.{i}.{name}.weight"] = torch.diag(gamma) @ state[f"blocks.{i}.{name}.weight"].double()
            folded[f"blocks.{i}.{name}.bias"] = gamma * state[f"blocks.{i}.{name}.bias"]
    features = ViT.from_pretrained(tmp_path / "dino.pth").features(IMAGES.float())
    assert (features - reference(folded, IMAGES, 1)).abs().max() < 1e-5

    jepa = random_state(cls=False, head=False, tokens=16)
    other = {f"module.{k}": v + 1 for k, v in jepa.items()}
    torch.save({"encoder": other, "target_encoder": {f"module.{k}": v for k, v in jepa.items()}, "epoch": 3},
               tmp_path / "jepa.pth.tar")
    model = ViT.from_pretrained(tmp_path / "jepa.pth.tar", num_classes=3)
    assert model.cls_token is None and model.head.weight.shape == (3, 64)
    agree(model.double().features(IMAGES), reference(jepa, IMAGES, 1))


def test_own_checkpoints(tmp_path):
    """vit, mae and jepa of this repository; heads come from their arguments."""
    args = dict(heads=4)
    state = random_state()
    data.save_checkpoint(tmp_path / "vit.pt", script="vit", model=state, args=args)
    agree(ViT.from_pretrained(tmp_path / "vit.pt").double()(IMAGES), reference(state, IMAGES, 4))
    bare = random_state(cls=False, head=False, tokens=16)
    both = {f"encoder.{k}": v + 1 for k, v in bare.items()} | {f"target_encoder.{k}": v for k, v in bare.items()}
    data.save_checkpoint(tmp_path / "jepa.pt", script="jepa", model=both, args=args)
    agree(ViT.from_pretrained(tmp_path / "jepa.pt").double().features(IMAGES), reference(bare, IMAGES, 4))


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("norm.bias"), lambda s: s.update(extra=torch.ones(1)), lambda s: s.pop("patch_embed.proj.weight"),
    lambda s: s.update(pos_embed=torch.ones(1, 12, 64)), lambda s: s.update(cls_token=torch.ones(64)),
    lambda s: s.clear(), lambda s: s.update(register_tokens=torch.ones(1, 4, 64)),
    lambda s: s.update({"fc_norm.weight": s.pop("norm.weight")}), lambda s: s.update({"blocks.x.y": torch.ones(1)}),
    lambda s: s.update({"patch_embed.proj.weight": torch.ones(64, 3)}), lambda s: s.update({1: torch.ones(1)}),
    lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(64), "x.gamma": torch.ones(64)}),
    lambda s: s.update(model=5), lambda s: s.update(script="vit")])
def test_other_files_are_refused(tmp_path, spoil):
    state = random_state()
    spoil(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold a ViT encoder") as error:
        ViT.from_pretrained(tmp_path / "x.pth")
    assert "\n" not in str(error.value)
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(data.UserError, match="x.npz: not a Google ViT"):
        ViT.from_pretrained(tmp_path / "x.npz")


def test_the_first_loss_is_log_k():
    torch.manual_seed(0)
    model = ViT(num_classes=7)
    loss, logits = model.loss(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert logits.shape == (4, 7) and abs(loss.item() - math.log(7)) < 1e-6


def test_it_overfits_eight_pictures():
    torch.manual_seed(0)
    model, images, labels = ViT(16, 4, 32, 2, 2, num_classes=8), torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        loss, logits = model.loss(images, labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.05 and (logits.argmax(1) == labels).all()


def test_without_positions_the_order_of_patches_does_not_matter():
    torch.manual_seed(0)
    model = ViT(16, 4, 32, 2, 2).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    swapped = torch.cat([x[:, :, 8:], x[:, :, :8]], 2)  # upper and lower half
    assert (model.features(x) - model.features(swapped)).abs().max() > 1e-3
    torch.nn.init.zeros_(model.pos_embed)
    assert (model.features(x) - model.features(swapped)).abs().max() < 1e-12


def test_pictures_of_attention():
    torch.manual_seed(0)
    model = ViT(16, 4, 32, 3, 2).eval()
    maps = vit.attention_maps(model, torch.randn(2, 3, 16, 16))
    assert maps.shape == (3, 2, 2, 17, 17) and torch.allclose(maps.sum(-1), torch.ones(3, 2, 2, 17))
    uniform = torch.full((1, 1, 1, 5, 5), 0.2)  # 2 x 2 patches of 8 pixels: 0, 8, 8 and 8 sqrt 2 away
    assert vit.attention_distance(uniform, 8).item() == pytest.approx((16 + 8 * math.sqrt(2)) / 4)
    only = torch.zeros(2, 1, 1, 5, 5)
    only[0, :, :, :, 3] = only[1, :, :, :, 1] = 1  # all look at the third patch, then at the first
    assert vit.rollout(only)[0, 0].tolist() == [[0.5, 0], [1, 0]]
    assert torch.allclose(vit.rollout(uniform[..., :4, :4] * 1.25), torch.ones(1, 1, 2, 2))  # without class token


def test_layer_decay_and_weight_decay():
    model = ViT(16, 4, 32, 2, 2)
    args = type("Args", (), dict(layer_decay=0.5, weight_decay=0.1))
    groups = {id(p): (g["scale"], g["weight_decay"]) for g in vit.parameter_groups(model, args) for p in g["params"]}
    of = lambda name: groups[id(dict(model.named_parameters())[name])]
    assert of("head.weight") == (1, 0.1) and of("norm.weight") == (1, 0) and of("blocks.1.mlp.fc1.weight") == (0.5, 0.1)
    assert of("blocks.0.attn.qkv.bias") == (0.25, 0) and of("pos_embed") == of("cls_token") == (0.125, 0)
    assert of("patch_embed.proj.weight") == (0.125, 0.1) and len(groups) == len(list(model.parameters()))


def test_learning_rate():
    args = type("Args", (), dict(lr=2.0, warmup=9, steps=109))
    rate = [vit.learning_rate(step, args) for step in range(109)]
    assert rate[0] == pytest.approx(0.2) and rate[9] == 2 and rate[59] == pytest.approx(1) and rate[108] < 0.001
    assert all(a < b for a, b in zip(rate[:9], rate[1:10])) and all(a > b for a, b in zip(rate[9:], rate[10:]))


def test_init():
    torch.manual_seed(0)
    model = ViT(16, 4, 64, 2, 2)
    for matrix in model.blocks[1].attn.qkv.weight.chunk(3):  # xavier of q, k and v, not of the three as one
        assert math.sqrt(6 / 256) < matrix.abs().max() < math.sqrt(6 / 128)
    assert (model.pos_embed[0, 1:] == sincos_2d(64, 4)).all() and (model.pos_embed[0, 0] == 0).all()
    assert (model.head.weight == 0).all() and 0 < model.blocks[0].mlp.fc1.bias.abs().max() < 1e-5


def test_label_smoothing():
    torch.manual_seed(0)
    model = ViT(16, 4, 32, 2, 2, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    loss, logits = model.loss(IMAGES.float(), torch.tensor([1, 4]), 0.2)
    target = 0.8 * F.one_hot(torch.tensor([1, 4]), 5) + 0.2 / 5
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert model.loss(IMAGES.float(), target)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_another_picture_size_is_refused_or_stretches_the_table(tmp_path):
    state = random_state()
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    model = ViT.from_pretrained(tmp_path / "half.pth", image_size=24)
    grid = state["pos_embed"].half().float()[:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    wide = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert model.pos_embed.dtype == torch.float32 and torch.allclose(model.pos_embed[:, 1:], wide, atol=1e-6)
    with pytest.raises(ValueError, match="16 patches, but this model has 36 positions"):
        model(IMAGES.float())
    with pytest.raises(data.UserError, match="its patches of 4 pixels do not divide pictures of 18"):
        ViT.from_pretrained(tmp_path / "half.pth", 3, 18)


# ----------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--batch-size", 16, "--save-seconds", 0, "--device", "cpu"]


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["vit.py", "--data", pictures, *SMALL, "--out", tmp_path / "a"]
    done = script(*words, "--steps", 40, "--warmup", 5, "--lr", 0.003)
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert float(scores["accuracy"]) == 1 and scores["images_seen"] == "640"
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn"} <= set(scores)
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    rows = list(csv.DictReader(open(tmp_path / "a" / "log.csv")))
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30, 39]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    checkpoint = data.load_checkpoint(tmp_path / "a" / "checkpoint.pt", "vit")
    assert set(checkpoint) == {"script", "model", "ema", "optimizer", "step", "args", "scores"}
    assert checkpoint["step"] == 40 and checkpoint["scores"]["accuracy"] == 1

    done = script("vit.py", "--data", pictures, "--load", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "b")
    assert done.returncode == 0 and re.search(r"accuracy  1.0000", done.stdout)
    log = (tmp_path / "a" / "log.csv").read_text()
    again = script("vit.py", "--load", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "a")
    assert again.stdout.replace("/a/", "/b/")[-200:] == done.stdout[-200:]  # on the data set that it was trained on
    assert (tmp_path / "a" / "log.csv").read_text() == log


def test_fine_tuning_a_released_file(script, pictures, tmp_path):
    """A Google file: its heads, patch and GELU are not the options' own, and survive the round trip."""
    state = random_state(dim=128, patch=8, tokens=1 + 4)
    np.savez(tmp_path / "google.npz", **google_arrays(state, heads=2))
    done = script("vit.py", "--data", pictures, "--init", tmp_path / "google.npz", "--image-size", 32, "--steps", 1,
                  "--layer-decay", 0.7, "--augment", "strong", "--train-images", 20, "--lr", 0, "--out", tmp_path)
    assert done.returncode == 0 and "cnn" in done.stdout, done.stderr
    tuned, images = ViT.from_pretrained(tmp_path / "checkpoint.pt"), torch.randn(2, 3, 32, 32)
    released = ViT.from_pretrained(tmp_path / "google.npz", 3, 32)
    assert tuned.pos_embed.shape == (1, 17, 128) and torch.equal(tuned.features(images), released.features(images))
    done = script("vit.py", "--data", pictures, "--init", tmp_path / "google.npz", "--image-size", 20,
                  "--out", tmp_path)
    assert done.returncode == 2 and "--patch-size 8 does not divide" in done.stderr


def test_each_step_augments_clips_and_scales_the_rate(pictures, tmp_path, monkeypatch):
    calls, rates = [], []
    for owner, name in ((data, "augment"), (data, "mix"), (torch.nn.utils, "clip_grad_norm_")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=original, n=name, **k: calls.append((n, a[1:])) or f(*a, **k))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        [g["lr"] / g.get("scale", 1) for g in self.param_groups]) or step(self))
    monkeypatch.setattr(data, "probe_scores", lambda dataset, f, g, amp: dict(
        same=float((f(torch.ones(1, 3, 16, 16)) == g(torch.ones(1, 3, 16, 16))).all())))
    scores = vit.train(vit.parse_args(["--data", str(pictures), *map(str, SMALL), "--steps", "3", "--augment", "strong",
                                       "--layer-decay", "0.5", "--train-images", "30", "--out", str(tmp_path)]))
    assert [name for name, _ in calls[:6]] == ["augment", "mix", "clip_grad_norm_"] * 2 and calls[2][1] == (1.0,)
    assert all(len(set(map(lambda r: round(r, 12), row))) == 1 for row in rates) and scores["same"] == 0
    assert scores["images_seen"] == 48 and "cnn" in scores


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("vit.py", "--data", pictures, *SMALL, "--steps", 40, "--augment", "strong")


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the pictures' side 16"),
    (["--heads", 3], "--dim 16 must be a multiple of --heads 3 and of 4"),
    (["--dim", 30], "--dim 30 must be a multiple of --heads 2 and of 4"),
    (["--device", "meta"], "--device meta: not on this machine"),
    (["--size", "XXL"], "invalid choice: 'XXL'"),
    (["--steps", 0], "argument --steps: '0' is not a whole number from 1"),
    (["--lr", "nan"], "argument --lr: 'nan' is not a number from 0"),
    (["--device", "tpu9"], "--device tpu9: not on this machine"),
    (["--init", "missing.pt"], "missing.pt"), (["--load", ""], "--load is empty"), (["--out", ""], "--out is empty"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
    (["--out", "data.py"], "cannot write data.py"),
    (["--lr", 100, "--warmup", 0, "--steps", 60], "the last checkpoint is as it was"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(vit, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_help_explains_every_option(script):
    done = script("vit.py", "--help")
    assert done.returncode == 0 and done.stdout.count("(default:") == len(vars(vit.parse_args([])))
