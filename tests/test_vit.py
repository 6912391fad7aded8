"""vit.py: parameter counts, released formats, its maths written another way, and the real command."""

import csv
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, block_shapes, brightness

import data
import vit
from common import sincos_2d
from vit import ViT


@pytest.mark.parametrize("size, patch, count", [  # 224 pixels, 1,000 classes: Google's own numbers
    ("Ti", 16, 5_717_416), ("S", 16, 22_050_664), ("S", 32, 22_878_952), ("B", 8, 86_576_872),
    ("B", 16, 86_567_656), ("B", 32, 88_224_232), ("L", 16, 304_326_632), ("L", 32, 306_535_400),
    ("H", 14, 632_045_800)])
def test_parameter_counts(monkeypatch, size, patch, count):
    monkeypatch.setattr(ViT, "init_weights", lambda self: None)
    sizes = {**vit.SIZES[size], "patch_size": patch}
    with torch.device("meta"):
        model = ViT(image_size=224, num_classes=1000, **sizes)
    assert sum(p.numel() for p in model.parameters()) == count


# ------------------------------------------------------------------------------------ released files


def random_state(dim=192, depth=2, patch=4, tokens=1 + 16, classes=5, cls=True, head=True):
    """A timm state dict with random weights; 192 and 384 are released widths, with 3 and 6 heads."""
    torch.manual_seed(0)
    shapes = {"pos_embed": (1, tokens, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
              "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    if cls:
        shapes["cls_token"] = (1, 1, dim)
    if head:
        shapes |= {"head.weight": (classes, dim), "head.bias": (classes,)}
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}", dim)
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def reference(state, images, heads, gelu=F.gelu):
    """The Vision Transformer as one function of a timm state dict: convolution, torch's own attention kernel."""
    s = {k: v.double() for k, v in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"],
                 stride=s["patch_embed.proj.weight"].shape[-1]).flatten(2).mT
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + s["pos_embed"]
    for i in range(sum(k.endswith("norm1.bias") for k in s)):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv")
        qkv = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = linear(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape), b + "attn.proj")
        x = x + s.get(b + "ls1.gamma", 1) * y
        y = linear(gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2")
        x = x + s.get(b + "ls2.gamma", 1) * y
    x = norm(x, "norm")
    x = x[:, 0] if "cls_token" in s else x.mean(1)
    if "pre_logits.weight" in s:
        x = linear(x, "pre_logits").tanh()
    return linear(x, "head") if "head.weight" in s else x


def tanh(x):
    return F.gelu(x, approximate="tanh")


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agree(ours, theirs, tolerance=1e-9):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_timm_state_dict(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "timm.pth")
    model = ViT.from_pretrained(tmp_path / "timm.pth")
    expected = reference(state, IMAGES, heads=3)
    agree(model(IMAGES.float()), expected, 1e-5)
    agree(model.double()(IMAGES), expected)
    fresh = ViT.from_pretrained(tmp_path / "timm.pth", num_classes=7, image_size=24)
    assert fresh.pos_embed.shape == (1, 37, 192) and fresh.num_classes == 7
    logits = fresh(torch.randn(1, 3, 24, 24))
    assert logits.shape == (1, 7) and (logits == 0).all()


def test_heads_of_an_unreleased_width(tmp_path):
    """No tensor tells the number of heads: it is never guessed."""
    state = random_state(dim=64)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(data.UserError, match=r"own.pth: .* width 64 .*heads=") as error:
        ViT.from_pretrained(tmp_path / "own.pth")
    assert "\n" not in str(error.value)
    for heads in (2, 4):
        agree(ViT.from_pretrained(tmp_path / "own.pth", heads=heads).double()(IMAGES), reference(state, IMAGES, heads))


def google_arrays(state, heads, prefix="", pre_logits=False):
    """The inverse of the loader: timm's names -> Google's .npz."""
    dim = state["norm.bias"].numel()
    out = {}
    flax = {"norm": "Transformer/encoder_norm", "head": "head", "pre_logits": "pre_logits"}
    for i in range(sum(k.endswith("norm1.bias") for k in state)):
        block = f"Transformer/encoderblock_{i}/"
        flax |= {f"blocks.{i}.norm1": block + "LayerNorm_0", f"blocks.{i}.norm2": block + "LayerNorm_2",
                 f"blocks.{i}.mlp.fc1": block + "MlpBlock_3/Dense_0",
                 f"blocks.{i}.mlp.fc2": block + "MlpBlock_3/Dense_1"}
        attention = block + "MultiHeadDotProductAttention_1/"
        weight = state[f"blocks.{i}.attn.qkv.weight"]
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
    out["embedding/bias"] = state["patch_embed.proj.bias"]
    out["cls"] = state["cls_token"]
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
    assert model.num_classes == 5 and model.tanh_gelu
    agree(model(IMAGES), reference(state, IMAGES, 2, tanh))
    assert (model(IMAGES) - reference(state, IMAGES, 2)).abs().max() > 1e-6  # timm's exact GELU is another model
    fresh = ViT.from_pretrained(tmp_path / "B_16.npz", num_classes=3)  # without the hidden layer of the old head
    assert (fresh(IMAGES.float()) == 0).all() and fresh.head.weight.shape == (3, 128)


def test_encoder_only_releases(tmp_path):
    """MAE {"model"}, I-JEPA {"target_encoder"} with "module." and no class token, DINOv2 with layer scale."""
    state = random_state(head=False)
    mae = {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    model = ViT.from_pretrained(tmp_path / "mae.pth").double()
    agree(model.features(IMAGES), reference(state, IMAGES, 3))
    assert model.num_classes == 0 and torch.equal(model(IMAGES), model.features(IMAGES))  # no head, as in timm

    scales = {f"blocks.{i}.ls{n}.gamma": torch.rand(192) for i in range(2) for n in (1, 2)}
    torch.save({**state, **scales, "mask_token": torch.zeros(1, 192)}, tmp_path / "dino.pth")
    model = ViT.from_pretrained(tmp_path / "dino.pth")
    agree(model.features(IMAGES.float()), reference(state | scales, IMAGES, 3), 1e-5)
    agree(model.double().features(IMAGES), reference(state | scales, IMAGES, 3))

    jepa = random_state(cls=False, head=False, tokens=16)
    other = {f"module.{k}": v + 1 for k, v in jepa.items()}
    torch.save({"encoder": other, "target_encoder": {f"module.{k}": v for k, v in jepa.items()}, "epoch": 3},
               tmp_path / "jepa.pth.tar")
    model = ViT.from_pretrained(tmp_path / "jepa.pth.tar", num_classes=3)
    assert model.cls_token is None and model.head.weight.shape == (3, 192)
    agree(model.double().features(IMAGES), reference(jepa, IMAGES, 3))


def test_own_checkpoints(tmp_path):
    """vit, mae and jepa of this repository; heads and GELU come from their arguments."""
    args = dict(heads=4)
    state = random_state(dim=64)
    data.save_checkpoint(tmp_path / "vit.pt", script="vit", model=state, args=args)
    agree(ViT.from_pretrained(tmp_path / "vit.pt").double()(IMAGES), reference(state, IMAGES, 4))
    data.save_checkpoint(tmp_path / "tanh.pt", script="vit", model=state, args=args | {"tanh_gelu": True})
    agree(ViT.from_pretrained(tmp_path / "tanh.pt").double()(IMAGES), reference(state, IMAGES, 4, tanh))
    encoder = random_state(dim=64, head=False)
    data.save_checkpoint(tmp_path / "mae.pt", script="mae", model=encoder | {"mask_token": torch.zeros(1, 1, 8)},
                         args=args)
    agree(ViT.from_pretrained(tmp_path / "mae.pt").double().features(IMAGES), reference(encoder, IMAGES, 4))
    bare = random_state(dim=64, cls=False, head=False, tokens=16)
    both = {f"encoder.{k}": v + 1 for k, v in bare.items()} | {f"target_encoder.{k}": v for k, v in bare.items()}
    data.save_checkpoint(tmp_path / "jepa.pt", script="jepa", model=both, args=args)
    agree(ViT.from_pretrained(tmp_path / "jepa.pt").double().features(IMAGES), reference(bare, IMAGES, 4))


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("norm.bias"), lambda s: s.update(extra=torch.ones(1)), lambda s: s.pop("patch_embed.proj.weight"),
    lambda s: s.update(pos_embed=torch.ones(1, 12, 192)), lambda s: s.update(cls_token=torch.ones(192)),
    lambda s: s.clear(), lambda s: s.update(register_tokens=torch.ones(1, 4, 192)),
    lambda s: s.update({"fc_norm.weight": s.pop("norm.weight")}), lambda s: s.update({"blocks.x.y": torch.ones(1)}),
    lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 3)}), lambda s: s.update({1: torch.ones(1)}),
    lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(192), "x.gamma": torch.ones(192)}),
    lambda s: s.update(model=5), lambda s: s.update(script="vit", version=2)])
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


def test_checkpoints_of_others_are_refused(tmp_path):
    """Those of another script's model, and those written before the rewrite, in one line."""
    data.save_checkpoint(tmp_path / "x.pt", script="igpt", model=random_state(), args=dict(heads=3))
    with pytest.raises(data.UserError, match="x.pt: written by igpt, not by vit"):
        ViT.from_pretrained(tmp_path / "x.pt")
    torch.save(dict(script="vit", model=random_state(), args=dict(heads=3)), tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="x.pt: written by another version of this repository; train it again"):
        ViT.from_pretrained(tmp_path / "x.pt")


# -------------------------------------------------------------------------------------------- the model


def small(depth=2, **more):
    torch.manual_seed(0)
    return ViT(image_size=16, patch_size=4, dim=32, depth=depth, heads=2, **more)


def test_the_first_loss_is_log_k():
    torch.manual_seed(0)
    model = ViT(num_classes=7)
    loss, logits = model.loss(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert logits.shape == (4, 7) and abs(loss.item() - math.log(7)) < 1e-6


def test_it_overfits_eight_images():
    model = small(num_classes=8)
    images = torch.randn(8, 3, 16, 16)
    labels = torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss, logits = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and (logits.argmax(1) == labels).all()


def test_without_positions_the_order_of_patches_does_not_matter():
    model = small().double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    swapped = torch.cat([x[:, :, 8:], x[:, :, :8]], 2)  # upper and lower half
    assert (model.features(x) - model.features(swapped)).abs().max() > 1e-3
    torch.nn.init.zeros_(model.pos_embed)
    assert (model.features(x) - model.features(swapped)).abs().max() < 1e-12


@pytest.mark.parametrize("class_token", [True, False])
def test_the_five_steps_written_out(class_token):
    """embed in loops over patches: the class token first, then each patch in reading order with its own position."""
    model = small(class_token=class_token).double()
    for p in (model.pos_embed, *([model.cls_token] if class_token else [])):
        torch.nn.init.normal_(p)
    weight = model.patch_embed.proj.weight.flatten(1)
    table = list(model.pos_embed[0])
    expected = []
    for image in IMAGES:
        rows = [table[0] + model.cls_token[0, 0]] if class_token else []
        for n in range(16):
            r = n // 4 * 4
            c = n % 4 * 4
            patch = image[:, r:r + 4, c:c + 4].flatten()
            rows.append(weight @ patch + model.patch_embed.proj.bias + table[class_token + n])
        expected.append(torch.stack(rows))
    agree(model.embed(IMAGES), torch.stack(expected))
    tokens = model.tokens(IMAGES)
    assert tokens.shape == (2, 16 + class_token, 32)
    agree(model.features(IMAGES), tokens[:, 0] if class_token else tokens.mean(1))


def test_images_of_another_shape_are_refused():
    model = ViT(image_size=32, patch_size=4, dim=32, depth=1, heads=2)
    for H, W in ((16, 64), (64, 16), (28, 28), (32, 36)):  # 16 x 64 has as many patches as 32 x 32
        with pytest.raises(ValueError, match=rf"images of \({H}, {W}\), .* for 32 x 32 pixels") as error:
            model(torch.zeros(1, 3, H, W))
        assert "\n" not in str(error.value)
    model(torch.zeros(1, 3, 32, 32))


def test_maps_of_attention():
    model = small(depth=3).eval()
    maps = vit.attention_maps(model, torch.randn(2, 3, 16, 16))
    assert maps.shape == (3, 2, 2, 17, 17) and torch.allclose(maps.sum(-1), torch.ones(3, 2, 2, 17))
    uniform = torch.full((1, 1, 1, 5, 5), 0.2)  # 2 x 2 patches of 8 pixels: 0, 8, 8 and 8 sqrt 2 away
    assert vit.attention_distance(uniform, 8).item() == pytest.approx((16 + 8 * math.sqrt(2)) / 4)
    fifth = torch.zeros(1, 1, 1, 10, 10)  # 3 x 3 patches and a class token: all attend to the patch in the middle
    fifth[..., 5] = 1
    assert vit.attention_distance(fifth, 8).item() == pytest.approx((4 * 8 + 4 * 8 * math.sqrt(2)) / 9)
    first = torch.zeros(1, 1, 1, 10, 10)  # all attend to the first patch
    first[..., 1] = 1
    corner = sum(math.hypot(x, y) for x in range(3) for y in range(3)) * 8 / 9
    assert vit.attention_distance(first, 8).item() == pytest.approx(corner)
    only = torch.zeros(2, 1, 1, 5, 5)
    only[0, :, :, :, 3] = 1  # all attend to the third patch, then to the first
    only[1, :, :, :, 1] = 1
    assert vit.rollout(only)[0, 0].tolist() == [[0.5, 0], [1, 0]]
    assert torch.allclose(vit.rollout(uniform[..., :4, :4] * 1.25), torch.ones(1, 1, 2, 2))  # without class token


def test_maps_are_those_of_the_model():
    """The maps of a layer times its values, head by head, give what the model computes in this layer."""
    model = small().double()
    maps = vit.attention_maps(model, IMAGES)
    x = model.embed(IMAGES)
    for block, weights in zip(model.blocks, maps):
        values = block.attn.qkv(block.norm1(x))[..., 64:]  # (B, 1 + N, D)
        heads = [weights[:, h] @ values[..., 16 * h:16 * h + 16] for h in range(2)]
        x = x + block.attn.proj(torch.cat(heads, dim=-1))
        x = x + block.mlp(block.norm2(x))
    agree(model.norm(x), model.tokens(IMAGES))


def of(model, groups):
    """-> a function from a parameter's name to the (scale, weight decay) of its group."""
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return lambda name: found[id(model.get_parameter(name))]


def test_layer_decay_and_weight_decay():
    model = small()
    where = of(model, vit.layer_groups(model, types.SimpleNamespace(layer_decay=0.5, weight_decay=0.1)))
    assert where("head.weight") == (1, 0.1) and where("norm.weight") == (1, 0) and where("head.bias") == (1, 0)
    assert where("blocks.1.mlp.fc1.weight") == (0.5, 0.1) and where("blocks.0.attn.qkv.bias") == (0.25, 0)
    assert where("pos_embed") == where("cls_token") == (0.125, 0) and where("patch_embed.proj.weight") == (0.125, 0.1)
    bare = small(class_token=False, num_classes=0)  # as a released encoder with --load
    where = of(bare, vit.layer_groups(bare, types.SimpleNamespace(layer_decay=0.5, weight_decay=0.1)))
    assert where("pos_embed") == (0.125, 0) and where("norm.bias") == (1, 0)


def test_without_layer_decay_the_groups_are_plain():
    """Default options: three steps give the same weights, bit for bit, as two groups, matrices and the rest."""
    weights = []
    for plain in (True, False):
        model = small()
        if plain:
            matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
            groups = [dict(params=matrices, weight_decay=0.5),
                      dict(params=[p for p in model.parameters() if p.ndim not in (2, 4)], weight_decay=0.0)]
        else:
            groups = vit.layer_groups(model, types.SimpleNamespace(layer_decay=1.0, weight_decay=0.5))
            assert all(group["scale"] == 1 for group in groups)
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        for _ in range(3):
            loss, _ = model.loss(IMAGES.float(), torch.arange(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(model.state_dict())
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_learning_rate():
    args = types.SimpleNamespace(lr=2.0, warmup=9, steps=109)
    lr = [vit.learning_rate(step, args) for step in range(109)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == 2 and lr[59] == pytest.approx(1) and lr[108] < 0.001
    assert all(a < b for a, b in zip(lr[:9], lr[1:10])) and all(a > b for a, b in zip(lr[9:], lr[10:]))


def test_init():
    torch.manual_seed(0)
    model = ViT(image_size=16, patch_size=4, dim=64, depth=2, heads=2)
    fresh = [p.clone() for p in model.parameters()]
    for again in (False, True):  # a second time, after a training, for the untrained baseline
        if again:
            for p in model.parameters():
                torch.nn.init.constant_(p, 3)
            model.init_weights()
        for matrix in model.blocks[1].attn.qkv.weight.chunk(3):  # xavier of q, k and v, not of the three as one
            assert math.sqrt(6 / 256) < matrix.abs().max() < math.sqrt(6 / 128)
        assert math.sqrt(6 / 320) * 0.9 < model.blocks[0].mlp.fc1.weight.abs().max() < math.sqrt(6 / 320)
        assert (model.pos_embed[0, 1:] == sincos_2d(64, 4)).all() and (model.pos_embed[0, 0] == 0).all()
        for bias in (model.blocks[0].mlp.fc1.bias, model.blocks[1].mlp.fc2.bias):
            assert 0 < bias.abs().max() < 1e-5
        for name in ("head.weight", "head.bias", "cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias",
                     "blocks.1.attn.proj.bias", "norm.bias", "blocks.0.norm1.bias"):
            assert (model.get_parameter(name) == 0).all(), name
        assert (model.norm.weight == 1).all() and (model.blocks[0].norm2.weight == 1).all()
        assert model.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.1)
    assert [p.shape for p in fresh] == [p.shape for p in model.parameters()]


def test_label_smoothing():
    model = small(num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    loss, logits = model.loss(IMAGES.float(), torch.tensor([1, 4]), 0.2)
    target = 0.8 * F.one_hot(torch.tensor([1, 4]), 5) + 0.2 / 5
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert model.loss(IMAGES.float(), target)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_adapt(tmp_path):
    """Another image size stretches the position table and keeps the head; a new head is zero and keeps the table."""
    state = random_state()
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    model = ViT.from_pretrained(tmp_path / "half.pth", image_size=24)
    grid = state["pos_embed"].half().float()[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    wide = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert model.pos_embed.dtype == torch.float32 and torch.allclose(model.pos_embed[:, 1:], wide, atol=1e-6)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0].half().float())
    assert torch.equal(model.head.weight, state["head.weight"].half().float()) and model.num_classes == 5
    with pytest.raises(ValueError, match="16, 16.* for 24 x 24 pixels"):
        model(IMAGES.float())
    table = model.pos_embed.clone()
    model.double().adapt(num_classes=4)
    assert model.head.weight.dtype == torch.float64
    model.float().adapt(num_classes=0)
    assert model.num_classes == 0 and torch.equal(model.pos_embed, table)
    images = torch.randn(1, 3, 24, 24)
    assert torch.equal(model(images), model.features(images))
    with pytest.raises(data.UserError, match="patches of 4 pixels do not divide images of 18"):
        ViT.from_pretrained(tmp_path / "half.pth", 3, 18)


# ------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--batch-size", 16, "--save-seconds", 0, "--device", "cpu"]


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["vit.py", "--data", pictures, *SMALL, "--out", tmp_path / "a"]
    done = script(*words, "--steps", 60, "--warmup", 5, "--lr", 0.003)
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert float(scores["accuracy"]) == 1 and scores["images_seen"] == "960"
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn"} <= set(scores)
    files = re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split()
    assert [file.rsplit("/")[-1] for file in files] == [
        "filters.png", "positions.png", "attention_distance.svg", "rollout.png", "checkpoint.pt", "log.csv"]
    for file in files:
        assert (ROOT / file).stat().st_size > 100
    rows = list(csv.DictReader(open(tmp_path / "a" / "log.csv")))
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30, 40, 50, 59]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    checkpoint = data.load_checkpoint(tmp_path / "a" / "checkpoint.pt", "vit")
    assert set(checkpoint) == {"script", "version", "model", "ema", "optimizer", "step", "args", "scores"}
    assert checkpoint["step"] == 60 and checkpoint["scores"]["accuracy"] == 1

    done = script("vit.py", "--data", pictures, "--load", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "b")
    assert done.returncode == 0 and re.search(r"accuracy  1.0000", done.stdout)
    log = (tmp_path / "a" / "log.csv").read_text()
    again = script("vit.py", "--load", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "a")
    assert again.stdout.replace("/a/", "/b/") == done.stdout  # on the data set that it was trained on
    assert (tmp_path / "a" / "log.csv").read_text() == log


def test_fine_tuning_a_released_file(script, pictures, tmp_path):
    """A Google file: its heads, patch and GELU are not the options' own, and survive the round trip."""
    state = random_state(dim=128, patch=8, tokens=1 + 4)
    np.savez(tmp_path / "google.npz", **google_arrays(state, heads=2))
    done = script("vit.py", "--data", pictures, "--init", tmp_path / "google.npz", "--image-size", 32, "--steps", 1,
                  "--layer-decay", 0.7, "--augment", "strong", "--train-images", 20, "--lr", 0, "--data-dir", tmp_path,
                  "--out", tmp_path)
    assert done.returncode == 0 and "cnn" in done.stdout, done.stderr
    images = torch.randn(2, 3, 32, 32)
    tuned = ViT.from_pretrained(tmp_path / "checkpoint.pt")
    released = ViT.from_pretrained(tmp_path / "google.npz", 3, 32)
    assert tuned.pos_embed.shape == (1, 17, 128) and torch.equal(tuned.features(images), released.features(images))
    done = script("vit.py", "--data", pictures, "--init", tmp_path / "google.npz", "--image-size", 20,
                  "--out", tmp_path)
    assert done.returncode == 2 and "--patch-size 8 does not divide" in done.stderr


def train(*words):
    return vit.train(vit.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("kind", ["dino", "jepa", "google"])
def test_a_fine_tuned_encoder_resumes_and_loads_without_its_first_file(pictures, tmp_path, kind):
    """Layer scale, no class token, tanh GELU and a hidden layer in the head: all of it comes from checkpoint.pt."""
    has_class_token = kind != "jepa"
    state = random_state(cls=has_class_token, head=False, tokens=17 if has_class_token else 16)
    path = tmp_path / "first.pth"
    if kind == "dino":
        state |= {f"blocks.{i}.ls{n}.gamma": torch.rand(192) for i in range(2) for n in (1, 2)}
    if kind == "google":
        path = tmp_path / "first.npz"
        state |= {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5),
                  "pre_logits.weight": torch.zeros(192, 192), "pre_logits.bias": torch.zeros(192)}
        np.savez(path, **google_arrays(state, heads=3))
    else:
        torch.save(state, path)
    words = ["--data", pictures, "--init", path, "--batch-size", 8, "--warmup", 0, "--device", "cpu",
             "--precision", "fp32"]
    train(*words, "--steps", 2, "--out", tmp_path)
    path.unlink()
    tuned = ViT.from_pretrained(tmp_path / "checkpoint.pt")
    assert tuned.num_classes == 3 and tuned.blocks[0].attn.heads == 3 and tuned.tanh_gelu == (kind == "google")
    assert (tuned.cls_token is not None) == has_class_token
    kept = {"model": tuned.state_dict()}
    assert any(name.endswith("gamma") for name in kept["model"]) == (kind == "dino")
    scores = train("--out", tmp_path, "--resume")  # it has ended: only the scores again
    assert scores["images_seen"] == 16 and scores["accuracy"] == train(
        "--data", pictures, "--load", tmp_path / "checkpoint.pt", "--out", tmp_path / "b")["accuracy"]
    again = ViT.from_pretrained(tmp_path / "checkpoint.pt").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept["model"].items())
    scores = train("--out", tmp_path, "--resume", "--steps", 4)  # and two more steps
    assert scores["images_seen"] == 32
    again = ViT.from_pretrained(tmp_path / "checkpoint.pt").state_dict()
    assert not torch.equal(again["blocks.0.attn.qkv.weight"], kept["model"]["blocks.0.attn.qkv.weight"])


def test_resuming_with_other_sizes_or_classes_is_refused(refused, pictures, tmp_path):
    torch.save(random_state(head=False), tmp_path / "first.pth")
    train("--data", pictures, "--init", tmp_path / "first.pth", "--steps", 1, "--out", tmp_path / "tuned", *SMALL[-4:])
    images = np.zeros((40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "ten.npz", images=images, labels=np.arange(40) % 10)
    for words in (["--data", tmp_path / "ten.npz"], ["--image-size", 24]):
        assert "does not fit these options" in refused(vit, "--out", tmp_path / "tuned", "--resume", *words)
    train("--data", pictures, *SMALL, "--steps", 1, "--out", tmp_path / "plain")
    assert "does not fit these options" in refused(vit, "--out", tmp_path / "plain", "--resume", "--dim", 32)


def test_a_head_for_other_classes_gets_no_accuracy(pictures, tmp_path):
    """As many classes with other names: what the head finds says nothing about them."""
    arrays = dict(np.load(pictures))
    np.savez(tmp_path / "renamed.npz", **arrays, class_names=["dark", "gray", "light"])
    train("--data", pictures, "--steps", 1, "--batch-size", 8, "--out", tmp_path)
    path = tmp_path / "checkpoint.pt"
    assert "accuracy" in train("--load", path, "--out", tmp_path / "a")
    assert "accuracy" not in train("--load", path, "--data", tmp_path / "renamed.npz", "--out", tmp_path / "b")
    dataset = data.load(str(pictures))
    assert data.has_classes(path, dataset) and data.has_classes(None, dataset)
    torch.save(random_state(classes=3), tmp_path / "released.pt")
    assert data.has_classes(tmp_path / "released.pt", dataset)  # it does not tell


@pytest.mark.parametrize("kind, mean, std", [
    ("google", [0.5] * 3, [0.5] * 3), ("timm", [0.5] * 3, [0.5] * 3),
    ("mae", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("vit", None, None), ("own mae", None, None)])
def test_a_released_file_sees_images_as_in_its_training(pictures, tmp_path, monkeypatch, kind, mean, std):
    """With --load, images are normalized as the file's authors did; own checkpoints use their data set's numbers."""
    state = random_state(head=kind in ("google", "timm", "vit"), classes=3)
    path = tmp_path / "file.pth"
    if kind == "google":
        path = tmp_path / "file.npz"
        np.savez(path, **google_arrays(state, heads=3))
    elif kind == "timm":
        torch.save(state, path)
    elif kind == "mae":
        torch.save({"model": state}, path)
    else:
        data.save_checkpoint(path, script=kind.removeprefix("own "), model=state, args=dict(heads=3))
    used = []
    original = data.probe_scores

    def probe_scores(dataset, *more):
        used.append(dataset)
        return original(dataset, *more)

    monkeypatch.setattr(data, "probe_scores", probe_scores)
    scores = train("--data", pictures, "--load", path, "--out", tmp_path / "out", "--device", "cpu",
                   "--precision", "fp32")
    dataset = data.load(str(pictures))
    expected_mean = dataset.mean if mean is None else torch.tensor(mean)
    expected_std = dataset.std if std is None else torch.tensor(std)
    assert torch.allclose(used[0].mean, expected_mean) and torch.allclose(used[0].std, expected_std)
    if "accuracy" in scores:
        images = (dataset.test_images.double() / 255 - expected_mean[:, None, None]) / expected_std[:, None, None]
        logits = reference(state, images, 3, tanh if kind == "google" else F.gelu)
        expected = (logits.argmax(1) == dataset.test_labels).double().mean().item()
        assert scores["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert ("accuracy" in scores) == ("head.weight" in state)


def test_images_are_normalized_as_in_the_training_of_the_file(pictures, tmp_path):
    """With --init, too, at each resume, and with other data; --normalize chooses, for DeiT's files."""
    torch.save(random_state(head=True, classes=3), tmp_path / "timm.pth")
    words = ["--data", pictures, "--device", "cpu", "--precision", "fp32", "--steps", 2, "--save-seconds", 0]

    def statistics(out):
        args = data.load_checkpoint(out / "checkpoint.pt")["args"]
        return [round(x, 4) for x in (*args["mean"], *args["std"])]

    train(*words, "--init", tmp_path / "timm.pth", "--out", tmp_path / "a")
    assert statistics(tmp_path / "a") == [0.5] * 6
    train("--out", tmp_path / "a", "--resume", "--steps", 4)
    assert statistics(tmp_path / "a") == [0.5] * 6
    train(*words, "--init", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "b")
    assert statistics(tmp_path / "b") == [0.5] * 6
    train(*words, "--init", tmp_path / "timm.pth", "--normalize", "imagenet", "--out", tmp_path / "c")
    assert statistics(tmp_path / "c") == [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
    brightness(tmp_path / "other.npz", 60, seed=1)
    args = vit.parse_args(["--load", str(tmp_path / "c" / "checkpoint.pt"), "--data", str(tmp_path / "other.npz")])
    vit.read_model(args)
    dataset = data.open_data(args, torch.device("cpu"))
    assert dataset.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_each_step_augments_clips_and_scales_the_learning_rate(pictures, tmp_path, monkeypatch):
    calls = []
    lrs = []

    def record(owner, name):
        original = getattr(owner, name)

        def call(*words, **more):
            calls.append((name, words[1:]))
            return original(*words, **more)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((data, "augment"), (data, "mixup_or_cutmix"), (data, "random_erasing"),
                        (torch.nn.utils, "clip_grad_norm_")):
        record(owner, name)
    original = torch.optim.AdamW.step

    def step(self):
        if "scale" in self.param_groups[0]:  # not the small CNN's
            lrs.append([group["lr"] / group["scale"] for group in self.param_groups])
        return original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def probe_scores(dataset, features, random_features, amp):
        ones = torch.ones(1, 3, 16, 16)
        return dict(same=float((features(ones) == random_features(ones)).all()), n=len(dataset.train_images))

    monkeypatch.setattr(data, "probe_scores", probe_scores)
    args = vit.parse_args(["--data", str(pictures), *map(str, SMALL), "--steps", "3", "--augment", "strong",
                           "--layer-decay", "0.5", "--train-images", "30", "--data-dir", str(tmp_path),
                           "--out", str(tmp_path)])
    scores = vit.train(args)
    names = ["augment", "mixup_or_cutmix", "random_erasing", "clip_grad_norm_"]
    assert [name for name, _ in calls[:8]] == names * 2 and calls[3][1] == (1.0,)
    assert lrs == [pytest.approx([vit.learning_rate(step, args)] * len(lrs[0])) for step in range(3)]
    assert scores["same"] == 0 and scores["images_seen"] == 48 and "cnn" in scores and scores["n"] == 30


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("vit.py", "--data", pictures, *SMALL, "--steps", 40, "--augment", "strong")


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the images' side 16"),
    (["--heads", 3], "--dim 16 must be a multiple of --heads 3 and of 4"),
    (["--dim", 30], "--dim 30 must be a multiple of --heads 2 and of 4"),
    (["--device", "meta"], "--device meta: not on this machine"),
    (["--size", "XXL"], "invalid choice: 'XXL'"),
    (["--augment", "heavy"], "invalid choice: 'heavy'"),
    (["--steps", 0], "argument --steps: '0' is not a whole number from 1"),
    (["--lr", "nan"], "argument --lr: 'nan' is not a number from 0"),
    (["--device", "tpu9"], "--device tpu9: not on this machine"),
    (["--init", "missing.pt"], "missing.pt"), (["--load", ""], "--load is empty"), (["--out", ""], "--out is empty"),
    (["--load", "a.pt", "--init", "b.pt"], "--load does not train, so --init has no use"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
    (["--out", "data.py"], "cannot write data.py"),
    (["--lr", 100, "--warmup", 0, "--steps", 60], "the last checkpoint is as it was"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(vit, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_help_explains_every_option(script):
    """Each option but --help has a sentence; each with a default names it, flags and options without one aside."""
    done = script("vit.py", "--help")
    options = done.stdout[done.stdout.index("options:"):]
    parts = re.split(r"\n  (?=-)", options)[2:]
    args = vars(vit.parse_args([]))
    assert done.returncode == 0
    assert len(parts) == len(args)
    for part in parts:
        text = " ".join(part.split())
        assert re.search(r"\.( \(default: \S+\))?$", text), text
        key = text.split()[0].removeprefix("--").replace("-", "_")
        is_from_size = key in vit.SIZES["tiny"] or args[key] is None or args[key] is False
        assert ("(default:" in text) == (not is_from_size), text
