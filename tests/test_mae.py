"""mae.py: parameter counts, the authors' files, its maths written another way, and the real command."""

import argparse
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, block_shapes, loss_falls, read_png, transformer

import data
import mae
from common import sincos_2d
from mae import MAE
from vit import ViT


@pytest.mark.parametrize("size, encoder, decoder, trainable", [  # 224 pixels; T: 32
    ("B", 85_798_656, 26_109_184, 111_655_680), ("L", 303_301_632, 26_240_256, 329_239_296),
    ("H", 630_764_800, 26_309_708, 656_613_964)])
def test_parameter_counts(monkeypatch, size, encoder, decoder, trainable):
    monkeypatch.setattr(MAE, "init_weights", lambda self: None)
    with torch.device("meta"):
        model = MAE(224, **mae.SIZES[size])
    in_decoder = {name: name.startswith(("decoder_", "mask_token")) for name, _ in model.named_parameters()}
    assert sum(p.numel() for name, p in model.named_parameters() if not in_decoder[name]) == encoder
    assert sum(p.numel() for name, p in model.named_parameters() if in_decoder[name]) == decoder
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_size_t():
    """The well-known ViT-T for CIFAR has 7,212,684 parameters; it lacks a few that the paper's form has."""
    lacks = (12 + 4) * 3 * 192 + (192 * 192 + 192) + 2 * 192 + 192  # q k v biases, decoder_embed and _norm, a table row
    assert sum(p.numel() for p in MAE(32, **mae.SIZES["T"]).parameters()) == 7_212_684 + lacks


# ------------------------------------------------------------------------------------ the authors' files


def random_file(dim=192, depth=2, decoder=512, decoder_depth=1, patch=4, n=4):
    """{"model": ...} as the authors write it, with random numbers in every tensor, tables included."""
    torch.manual_seed(0)

    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + n * n, dim), "norm.weight": (dim,), "norm.bias": (dim,),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}", dim)
    if decoder_depth:
        shapes |= {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, 1 + n * n, decoder),
                   "decoder_embed.weight": (decoder, dim), "decoder_embed.bias": (decoder,),
                   "decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,),
                   "decoder_pred.weight": (3 * patch**2, decoder), "decoder_pred.bias": (3 * patch**2,)}
    for i in range(decoder_depth):
        shapes |= block_shapes(f"decoder_blocks.{i}", decoder)
    return {"model": {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}}


def reference(file, images, noise, mask_ratio, norm_pix, heads=3, decoder_heads=16, P=4):
    """MAE as a loop over single images and patches, from a file's tensors, in float64."""
    s = {name: tensor.double() for name, tensor in file["model"].items()}

    def linear(x, name):
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    losses = []
    preds = []
    masks = []
    for image, numbers in zip(images, noise):
        N = len(numbers)
        side = math.isqrt(N)
        squares = [image[:, r * P:(r + 1) * P, c * P:(c + 1) * P] for r in range(side) for c in range(side)]
        embedded = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=P).flatten(1).T
        embedded = embedded + s["pos_embed"][0, 1:]
        visible = sorted(range(N), key=numbers.tolist().__getitem__)[:int(N * (1 - mask_ratio))]
        x = torch.cat([s["cls_token"][0] + s["pos_embed"][0, :1], embedded[visible]])
        x = linear(norm(transformer(s, x, "blocks.", heads), "norm"), "decoder_embed")
        full = s["mask_token"][0].repeat(1 + N, 1)
        full[0] = x[0]
        full[[1 + i for i in visible]] = x[1:]
        full = transformer(s, full + s["decoder_pos_embed"][0], "decoder_blocks.", decoder_heads)
        pred = linear(norm(full, "decoder_norm"), "decoder_pred")[1:]
        errors = []
        for i in set(range(N)) - set(visible):
            target = squares[i].permute(1, 2, 0).flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            errors.append(((pred[i] - target) ** 2).mean())
        losses.append(sum(errors) / len(errors))
        preds.append(pred)
        masks.append(torch.tensor([float(i not in visible) for i in range(N)]))
    return sum(losses) / len(losses), torch.stack(preds), torch.stack(masks)


G = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 3, 16, 16, generator=G, dtype=torch.float64)
NOISE = torch.rand(3, 16, generator=G)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_full_file(tmp_path, norm_pix, mask_ratio):
    file = random_file()
    torch.save(file, tmp_path / "full.pth")
    model = MAE.from_pretrained(tmp_path / "full.pth", norm_pix)
    expected = reference(file, IMAGES, NOISE, mask_ratio, norm_pix)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        loss, pred, mask = model.to(dtype)(IMAGES.to(dtype), mask_ratio, NOISE)
        assert (mask == expected[2]).all() and abs(loss - expected[0]) < tolerance * expected[0]
        assert (pred - expected[1]).abs().max() < tolerance * expected[1].abs().max()


def test_encoder_only_file(tmp_path):
    file = random_file(decoder_depth=0)
    torch.save(file, tmp_path / "encoder.pth")
    model = MAE.from_pretrained(tmp_path / "encoder.pth").double()
    vit = ViT.from_pretrained(tmp_path / "encoder.pth").double()
    assert (model.features(IMAGES, "cls") - vit.features(IMAGES)).abs().max() < 1e-12
    assert (model.features(IMAGES) - vit.tokens(IMAGES)[:, 1:].mean(1)).abs().max() < 1e-12
    with pytest.raises(data.UserError, match="mae_visualize_vit"):
        model(IMAGES)
    assert not [name for name in model.state_dict() if name.startswith(("decoder", "mask_token"))]


def test_heads_that_no_file_tells(tmp_path):
    """A state dict does not tell its number of heads: for a width that was not released, the caller must."""
    model = small()
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save({"model": model.state_dict()}, tmp_path / "wrapped.pt")
    expected = model(IMAGES, 0.75, NOISE)
    for path in (tmp_path / "bare.pt", tmp_path / "wrapped.pt"):
        with pytest.raises(data.UserError, match=r"heads=\.\.\., decoder_heads=\.\.\.") as error:
            MAE.from_pretrained(path)
        assert "\n" not in str(error.value)
        loaded = MAE.from_pretrained(path, heads=2, decoder_heads=2).double()
        for ours, theirs in zip(loaded(IMAGES, 0.75, NOISE), expected):
            assert (ours - theirs).abs().max() < 1e-12
        other = MAE.from_pretrained(path, heads=4, decoder_heads=2).double()
        assert (other(IMAGES, 0.75, NOISE)[0] - expected[0]).abs() > 1e-6  # another model: why it has to be told


def test_training_files_of_the_authors(tmp_path):
    """Theirs hold an argparse.Namespace and the optimizer beside the model."""
    file = random_file()
    torch.save(file | {"args": argparse.Namespace(model="mae_vit"), "epoch": 3, "scaler": {"scale": 1.0}}, tmp_path / "x.pth")
    loss, _, _ = MAE.from_pretrained(tmp_path / "x.pth").double()(IMAGES, 0.75, NOISE)
    assert abs(loss - reference(file, IMAGES, NOISE, 0.75, False)[0]) < 1e-9 * loss


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("decoder_pred.bias"), lambda s: s.pop("norm.bias"), lambda s: s.pop("mask_token"),
    lambda s: s.update(extra=torch.ones(1)), lambda s: s.clear(), lambda s: s.update(pos_embed=torch.ones(1, 9, 192)),
    lambda s: s.update({"head.weight": torch.ones(2, 192)}), lambda s: s.pop("decoder_blocks.0.norm1.bias")])
def test_other_files_are_refused(tmp_path, spoil):
    file = random_file()
    spoil(file["model"])
    torch.save(file, tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold a masked autoencoder") as error:
        MAE.from_pretrained(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- properties


def small(**more):
    torch.manual_seed(0)
    model = MAE(image_size=16, patch_size=4, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1,
                decoder_heads=2, **more)
    return model.double()


def test_init_is_the_authors():
    model = small()
    assert (model.pos_embed[0, 1:] == sincos_2d(32, 4)).all() and (model.pos_embed[0, 0] == 0).all()
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    for weight, size in ((model.blocks[0].attn.qkv.weight, 32 + 96), (model.decoder_pred.weight, 16 + 48),
                         (model.patch_embed.proj.weight, 48 + 32)):
        limit = math.sqrt(6 / size)  # Xavier: uniform up to sqrt(6 / (fan in + fan out))
        assert 0.95 * limit < weight.abs().max() <= limit
    assert (model.blocks[0].mlp.fc1.bias == 0).all() and (model.patch_embed.proj.bias != 0).all()
    assert 0.01 < model.cls_token.std() < 0.03


def square(i):
    """The pixels of patch i of a grid of 4 x 4, as an index of an image (3, 16, 16)."""
    top = i // 4 * 4
    left = i % 4 * 4
    return slice(None), slice(top, top + 4), slice(left, left + 4)


def test_the_encoder_is_blind_to_masked_patches_and_the_loss_to_visible_ones():
    model = small()
    loss, pred, mask = model(IMAGES, 0.75, NOISE)
    assert mask.sum(1).tolist() == [12, 12, 12] and pred.shape == (3, 16, 48)
    masked = next(i for i in range(16) if mask[0, i] == 1)
    visible = next(i for i in range(16) if mask[0, i] == 0)
    changed = IMAGES.clone()
    changed[0][square(masked)] += 5
    other_loss, other, _ = model(changed, 0.75, NOISE)
    assert (other == pred).all() and other_loss != loss  # what is masked is the target, never the input
    changed = IMAGES.clone()
    changed[0][square(visible)] += 5
    assert (model(changed, 0.75, NOISE)[1][0] != pred[0]).any()
    gradient, = torch.autograd.grad(loss, pred)
    assert ((gradient != 0).any(-1) == (mask == 1)).all()


def test_images_of_another_shape_and_masks_of_nothing_are_refused():
    model = small()
    for shape in ((1, 3, 8, 32), (1, 3, 32, 32), (1, 3, 32, 8)):  # the first and the last have 16 patches, too
        with pytest.raises(ValueError, match="16 x 16 pixels"):
            model(torch.randn(shape, dtype=torch.float64))
        with pytest.raises(ValueError, match="16 x 16 pixels"):
            model.features(torch.randn(shape, dtype=torch.float64))
    for mask_ratio in (0, 1):
        with pytest.raises(ValueError, match="at least one must be visible, and one masked"):
            model(IMAGES, mask_ratio)


def test_random_masks_are_fair():
    torch.manual_seed(0)
    model = small()
    share = torch.stack([model(IMAGES)[2] for _ in range(300)]).mean((0, 1))
    assert (share - 0.75).abs().max() < 0.08


def test_only_visible_patches_enter_the_blocks():
    model = small()
    lengths = []
    for blocks in (model.blocks, model.decoder_blocks):
        blocks[0].register_forward_hook(lambda module, inputs, out: lengths.append(out.shape[1]))
    model(IMAGES, 0.75, NOISE)
    assert lengths == [1 + 4, 1 + 16]


def test_it_overfits_eight_images():
    torch.manual_seed(0)
    model = MAE(image_size=16, patch_size=4, dim=64, depth=2, heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2)
    images = torch.randn(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.rand(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(400):
        loss, _, _ = model(images, 0.75, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # from 1, the variance of the pixels


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--decoder-dim", 8, "--decoder-depth", 1, "--decoder-heads", 2,
         "--batch-size", 16, "--save-seconds", 0, "--device", "cpu"]


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["mae.py", "--data", pictures, *SMALL, "--out", tmp_path / "a"]
    done = script(*words, "--steps", 30, "--warmup", 5, "--lr", 0.003, "--norm-pix")
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert scores["images_seen"] == "480" and "come from the original" in done.stdout
    assert {"loss", "seconds", "probe", "probe_cls", "probe_random", "probe_pixels", "knn"} <= set(scores)
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    assert loss_falls(tmp_path / "a")
    masked = read_png(tmp_path / "a" / "reconstruction.png")[:, 2:98, 100:196]  # the first image's second panel
    assert (masked == 128).all(0).float().mean() == pytest.approx(0.75, abs=0.02)  # gray
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "mae")
    assert set(checkpoint) == {"script", "version", "model", "ema", "optimizer", "step", "args", "scores"}
    model = MAE.from_pretrained(path)
    assert model.norm_pix and model.blocks[0].attn.heads == 2

    done = script("mae.py", "--data", pictures, "--load", path, "--out", tmp_path / "b")
    again = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert done.returncode == 0 and again["probe"] == scores["probe"]
    done = script("vit.py", "--data", pictures, "--init", path, "--steps", 2, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    tuned = data.load_checkpoint(tmp_path / "c" / "checkpoint.pt")["model"]
    assert (tuned["blocks.1.mlp.fc1.weight"] - checkpoint["model"]["blocks.1.mlp.fc1.weight"]).abs().max() < 1e-3


@pytest.mark.parametrize("released", [True, False])
def test_loaded_files_see_images_as_in_their_training(pictures, tmp_path, monkeypatch, released):
    """Those of the authors with ImageNet's mean and std, own ones with what they store."""
    model = MAE(image_size=16, dim=192, depth=1, heads=3, decoder_dim=512, decoder_heads=16)
    path = tmp_path / "file.pth"
    if released:
        torch.save({"model": model.state_dict()}, path)
    else:
        args = dict(heads=3, decoder_heads=16, norm_pix=False, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        data.save_checkpoint(path, script="mae", model=model.state_dict(), args=args)
    used = []

    def probe_scores(dataset, features, random_features, amp):
        used.append(torch.cat([dataset.mean, dataset.std]).tolist())
        return {}

    monkeypatch.setattr(data, "probe_scores", probe_scores)
    mae.train(mae.parse_args(["--load", str(path), "--data", str(pictures), "--device", "cpu", "--out", str(tmp_path)]))
    expected = [0.485, 0.456, 0.406, 0.229, 0.224, 0.225] if released else [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert used[0] == pytest.approx(expected)


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("mae.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the images' side 16"),
    (["--decoder-heads", 3], "a multiple of 4 and of --decoder-heads 3"),
    (["--mask-ratio", 1], "argument --mask-ratio: '1' is not a number from 0.01 to 0.99"),
    (["--mask-ratio", 0.99], "mask ratio 0.99 leaves 0 of 16 patches visible"),
    (["--mask-ratio", 0.01, "--patch-size", 16], "mask ratio 0.01 leaves 0 of 1 patches visible"),
    (["--augment", "diagonal"], "invalid choice: 'diagonal'"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(mae, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)
