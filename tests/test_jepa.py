"""jepa.py: parameter counts, the authors' files, its maths written another way, and the real command."""

import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, block_shapes, loss_falls, read_png, transformer

import data
import jepa
from common import sincos_2d
from jepa import IJEPA
from vit import ViT


@pytest.mark.parametrize("size, side, encoder, predictor", [  # fixed tables included
    ("T", 32, 5_360_448, 10_820_544), ("S", 224, 21_664_896, 11_018_880), ("B", 224, 85_797_120, 11_314_176),
    ("L", 224, 303_299_584, 22_157_824), ("H", 224, 630_762_240, 22_377_728), ("g", 224, 1_011_368_576, 29_550_976)])
def test_parameter_counts(monkeypatch, size, side, encoder, predictor):
    monkeypatch.setattr(IJEPA, "init_weights", lambda self: None)
    with torch.device("meta"):
        model = IJEPA(side, **jepa.SIZES[size])
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.target_encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.predictor.parameters()) == predictor


# ------------------------------------------------------------------------------------ the authors' files


def random_file(dim=192, depth=2, width=384, predictor_depth=1, patch=4, n=4):
    """The content of a .pth.tar as the authors write it, random numbers in every tensor, tables included."""
    torch.manual_seed(0)

    encoder = {"pos_embed": (1, n * n, dim), "norm.weight": (dim,), "norm.bias": (dim,),
               "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        encoder |= block_shapes(f"blocks.{i}", dim)
    predictor = {"mask_token": (1, 1, width), "predictor_pos_embed": (1, n * n, width),
                 "predictor_embed.weight": (width, dim), "predictor_embed.bias": (width,),
                 "predictor_norm.weight": (width,), "predictor_norm.bias": (width,),
                 "predictor_proj.weight": (dim, width), "predictor_proj.bias": (dim,)}
    for i in range(predictor_depth):
        predictor |= block_shapes(f"predictor_blocks.{i}", width)

    def draw(shapes):
        return {f"module.{name}": 0.1 * torch.randn(shape) for name, shape in shapes.items()}

    return {"encoder": draw(encoder), "predictor": draw(predictor), "target_encoder": draw(encoder),
            "opt": {}, "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 128, "world_size": 16, "lr": 0.001}


def double(state):
    return {name.removeprefix("module."): tensor.double() for name, tensor in state.items()}


def encode(state, image, visible=None, heads=3, P=4):
    s = double(state)
    x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=P).flatten(1).T
    x = x + s["pos_embed"][0]
    x = transformer(s, x if visible is None else x[visible], "blocks.", heads)
    return F.layer_norm(x, x.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-6)


def predict(state, z, context, target, heads=3):
    s = double(state)

    def linear(x, name):
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    table = s["predictor_pos_embed"][0]
    x = torch.cat([linear(z, "predictor_embed") + table[context], s["mask_token"][0] + table[target]])
    x = transformer(s, x, "predictor_blocks.", heads)[len(context):]
    x = F.layer_norm(x, x.shape[-1:], s["predictor_norm.weight"], s["predictor_norm.bias"], 1e-6)
    return linear(x, "predictor_proj")


G = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 3, 16, 16, generator=G, dtype=torch.float64)
ORDER = torch.rand(3, 16, generator=G).argsort(1)
CONTEXT = ORDER[:, :6]
TARGETS = torch.stack([ORDER[:, 6:10], ORDER[:, 8:12]])


def near(ours, theirs, tolerance):
    return (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_the_authors_file(tmp_path):
    file = random_file()
    torch.save(file, tmp_path / "x.pth.tar")
    model = IJEPA.from_pretrained(tmp_path / "x.pth.tar")
    z = torch.stack([encode(file["encoder"], i, c) for i, c in zip(IMAGES, CONTEXT)])
    whole = torch.stack([encode(file["target_encoder"], i) for i in IMAGES])
    pred = torch.stack([torch.stack([predict(file["predictor"], *row) for row in zip(z, CONTEXT, idx)])
                        for idx in TARGETS])
    target = torch.stack([torch.stack([w[i] for w, i in zip(whole, idx)]) for idx in TARGETS])
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    error = (pred - target).abs()
    loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model.to(dtype)
        images = IMAGES.to(dtype)
        assert near(model.encoder(images, CONTEXT), z, tolerance)
        assert near(model.target_encoder(images), whole, tolerance)
        assert near(model.encoder(images), torch.stack([encode(file["encoder"], i) for i in IMAGES]), tolerance)
        assert near(model.predictor(z.to(dtype), CONTEXT, TARGETS[1]), pred[1], tolerance)
        ours, predictions = model.loss(images, CONTEXT, TARGETS)
        assert predictions.shape == (2, 3, 4, 192)
        assert near(ours, loss, tolerance) and near(predictions, pred, tolerance)
    features = ViT.from_pretrained(tmp_path / "x.pth.tar").double().features(IMAGES)
    assert (features - model.features(IMAGES)).abs().max() < 1e-12  # vit.py --init takes the target encoder, too


def hugging_face(state, prefix):
    names = {"pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
             "norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if "qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                out[prefix + name.replace("blocks.", "encoder.layer.").replace(
                    "attn.qkv", f"attention.attention.{part}")] = piece
            continue
        if name.startswith("norm."):
            name = "layernorm." + name[5:]
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[prefix + name] = tensor
    return out


@pytest.mark.parametrize("prefix", ["", "ijepa."])
def test_hugging_face_encoder(tmp_path, prefix):
    file = random_file()
    torch.save(hugging_face(file["encoder"], prefix), tmp_path / "x.bin")
    model = IJEPA.from_pretrained(tmp_path / "x.bin").double()
    expected = torch.stack([encode(file["encoder"], i) for i in IMAGES])
    assert (model.target_encoder(IMAGES) - expected).abs().max() < 1e-9
    assert (model.encoder(IMAGES) - expected).abs().max() < 1e-9
    z = model.encoder(IMAGES, CONTEXT)  # the file has no predictor: it is that of a new model
    assert model.predictor(z, CONTEXT, TARGETS[0]).isfinite().all()
    assert (model.predictor.predictor_norm.weight == 1).all() and (model.predictor.mask_token != 0).all()


def test_a_hugging_face_file_that_lacks_a_tensor_is_refused(tmp_path):
    file = hugging_face(random_file()["encoder"], "")
    file.pop("layernorm.bias")
    torch.save(file, tmp_path / "x.bin")
    with pytest.raises(data.UserError, match="x.bin: does not hold an I-JEPA"):
        IJEPA.from_pretrained(tmp_path / "x.bin")


def test_heads_that_no_file_tells(tmp_path):
    """A state dict does not tell its number of heads: for a width that was not released, the caller must."""
    model = small(predictor_heads=4)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(data.UserError, match=r"heads=\.\.\.") as error:
        IJEPA.from_pretrained(tmp_path / "bare.pt")
    assert "\n" not in str(error.value)
    loss, predictions = model.loss(IMAGES, CONTEXT, TARGETS)
    loaded = IJEPA.from_pretrained(tmp_path / "bare.pt", heads=2, predictor_heads=4).double()
    ours, others = loaded.loss(IMAGES, CONTEXT, TARGETS)
    assert abs(ours - loss) < 1e-12 and (others - predictions).abs().max() < 1e-12
    assert (loaded.features(IMAGES) - model.features(IMAGES)).abs().max() < 1e-12
    like_the_encoder = IJEPA.from_pretrained(tmp_path / "bare.pt", heads=2).double()  # another predictor
    assert (like_the_encoder.loss(IMAGES, CONTEXT, TARGETS)[0] - loss).abs() > 1e-6


@pytest.mark.parametrize("spoil", [
    lambda f: f["predictor"].pop("module.mask_token"), lambda f: f["encoder"].pop("module.norm.bias"),
    lambda f: f["encoder"].update(extra=torch.ones(1)), lambda f: f.clear(), lambda f: f.pop("encoder"),
    lambda f: f["target_encoder"].update({"module.pos_embed": torch.ones(1, 9, 192)})])
def test_other_files_are_refused(tmp_path, spoil):
    file = random_file()
    spoil(file)
    torch.save(file, tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold an I-JEPA") as error:
        IJEPA.from_pretrained(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- masks


def grids(index, side):
    """(..., K) -> (..., side, side) bool"""
    flat = torch.zeros(*index.shape[:-1], side * side, dtype=torch.bool).scatter(-1, index, True)
    return flat.unflatten(-1, (side, side))


def released_masks(B, side, step, min_keep=4):
    """facebookresearch/ijepa's multiblock sampler with its biases, on one mask list after the other.

    One number sets area and aspect, from a generator seeded by the step; a block never fills a side nor lies at the
    last row or column; surplus context is cut off at its end, the bottom.
    """
    g = torch.Generator().manual_seed(step)
    sizes = []
    for scale, aspect in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1), (1, 1))):
        u = torch.rand(1, generator=g).item()
        area = int(side**2 * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        sizes.append([min(side - 1, round(math.sqrt(area * r))) for r in (ratio, 1 / ratio)])

    def draw(h, w, closed=()):
        for trial in range(20 * len(closed) + 20):  # after each 20 failures, one target is forgotten
            y = int(torch.randint(max(1, side - h), (1,)))
            x = int(torch.randint(max(1, side - w), (1,)))
            block = torch.zeros(side, side, dtype=torch.bool)
            block[y:y + h, x:x + w] = True
            for target in closed[:len(closed) - trial // 20]:
                block = block & ~target
            if block.sum() > min_keep:
                return block
        raise AssertionError("no context")  # the released one goes on for ever

    contexts = []
    targets = []
    for _ in range(B):
        blocks = [draw(*sizes[0]) for _ in range(4)]
        contexts.append(draw(*sizes[1], blocks).flatten().nonzero()[:, 0])
        targets.append(torch.stack([block.flatten().nonzero()[:, 0] for block in blocks]))
    n = min(len(context) for context in contexts)
    return torch.stack([context[:n] for context in contexts]), torch.stack(targets).transpose(0, 1)


@pytest.mark.parametrize("masking, targets", [("multiblock", 4), ("blocks", 1), ("random", 1)])
def test_no_target_is_in_the_context(masking, targets):
    torch.manual_seed(0)
    for _ in range(20):
        context, target = jepa.sample_masks(masking, 16, 8, "cpu")
        assert context.dtype == target.dtype == torch.int64 and target.shape[:2] == (targets, 16)
        assert not (grids(context, 8) & grids(target, 8).any(0)).any()
        assert (grids(context, 8).sum((1, 2)) == context.shape[1]).all() and context.shape[1] >= 4
        assert (grids(target, 8).sum((2, 3)) == target.shape[2]).all()
        if masking == "multiblock":  # each target is a full rectangle
            rows = grids(target, 8).any(3).sum(2)
            columns = grids(target, 8).any(2).sum(2)
            assert (rows * columns == target.shape[2]).all()


def full_squares(target, side):
    """For each patch of target (B, H, W) bool: whether it lies in a square of side x side patches that is all target."""
    x = target[:, None].float()
    corners = (F.avg_pool2d(x, side, stride=1) == 1).float()
    return F.conv_transpose2d(corners, torch.ones(1, 1, side, side))[:, 0] > 0


def test_block_masks_are_blocks_and_leave_nothing_out():
    torch.manual_seed(0)
    for grid, side, share, K in ((8, 2, 0.6, 39), (8, 3, 0.5, 32), (14, 4, 0.6, 118)):
        context, target = jepa.block_masks(32, grid, share=share, side=side)
        assert target.shape == (1, 32, K) and context.shape == (32, grid**2 - K)
        assert (torch.cat([context, target[0]], dim=1).sort(1).values == torch.arange(grid**2)).all()
        target = grids(target, grid)[0]  # (32, grid, grid)
        cut = (target & ~full_squares(target, side)).sum((1, 2))
        assert cut.max() < side**2 and (cut == 0).any()  # all but a part of the last block
    share = grids(jepa.block_masks(500, 8)[1], 8)[0].float().mean(0)  # how often each patch is a target
    assert (share - share.flip(0)).abs().max() < 0.12 and (share - share.T).abs().max() < 0.12
    assert share.min() > 0.15 and share.max() < 0.9
    for grid in (1, 2):  # on 2 x 2 patches, one block would cover all, and all masks would be equal
        with pytest.raises(data.UserError, match="leave no context, or are always the same"):
            jepa.block_masks(2, grid)
    assert jepa.block_masks(2, 3)[1].shape == (1, 2, 6)


def test_random_masks_are_fair_and_leave_nothing_out():
    torch.manual_seed(0)
    draws = [jepa.random_masks(16, 64) for _ in range(40)]
    for context, target in draws:
        assert context.shape == (16, 25) and target.shape == (1, 16, 39)  # 39 is the first above 0.6 * 64
        assert (torch.cat([context, target[0]], dim=1).sort(1).values == torch.arange(64)).all()
    share = torch.stack([grids(target, 8).float().mean((0, 1)) for _, target in draws]).mean(0)
    assert (share - 39 / 64).abs().max() < 0.1  # 640 draws: a std of 0.02
    assert jepa.random_masks(2, 100, share=0.25)[1].shape == (1, 2, 25)
    with pytest.raises(data.UserError, match="leave no context"):
        jepa.random_masks(2, 1)


def test_plain_arguments_of_the_blocks():
    torch.manual_seed(0)
    context, target = jepa.multiblock_masks(8, 12, number=2, scale=(0.25, 0.25), aspect=(1, 1), min_keep=40)
    assert target.shape == (2, 8, 36) and context.shape[1] >= 40  # two squares of 6 x 6


def test_the_sampler_uses_every_position_and_shape():
    torch.manual_seed(0)
    draws = [jepa.multiblock_masks(64, 8) for _ in range(60)]
    target = torch.stack([grids(t, 8).float().mean((0, 1)) for _, t in draws]).mean(0)
    context = torch.stack([grids(c, 8).float().mean(0) for c, _ in draws]).mean(0)
    assert target[7, 7] > 0.02 and abs(target[0, 0] - target[7, 7]) < 0.02
    assert abs(context[:4].mean() - context[4:].mean()) < 0.03  # surplus is dropped anywhere, not at the bottom
    heights = {int(grids(t[0, 0], 8).any(1).sum()) for _, t in draws}
    widths = {int(grids(t[0, 0], 8).any(0).sum()) for _, t in draws}
    assert heights == widths == {3, 4}  # the released sampler never draws 3 rows by 4 columns
    assert 16 < sum(c.shape[1] for c, _ in draws) / 60 < 24


def test_the_released_sampler_has_biases_that_ours_lacks():
    torch.manual_seed(0)
    draws = [released_masks(64, 8, step) for step in range(12)]
    target = torch.stack([grids(t, 8).float().mean((0, 1)) for _, t in draws]).mean(0)
    context = torch.stack([grids(c, 8).float().mean(0) for c, _ in draws]).mean(0)
    assert target[7].max() == target[:, 7].max() == context[7].max() == 0  # the last row and column: never
    assert context[0].mean() > 3 * context[6].mean()  # what is cut off is the bottom
    assert {t.shape[2] for _, t in draws} == {9, 12}  # 3 x 3 or 4 x 3: scale and aspect are one number
    ours = [jepa.multiblock_masks(64, 8) for _ in range(60)]
    target = torch.stack([grids(t, 8).float().mean((0, 1)) for _, t in ours]).mean(0)
    context = torch.stack([grids(c, 8).float().mean(0) for c, _ in ours]).mean(0)
    assert target[7].min() > 0 and target[:, 7].min() > 0 and context[7].max() > 0.1
    assert abs(context[0].mean() - context[7].mean()) < 0.05  # the bottom is cut no more than the top


def test_a_large_grid_has_the_papers_numbers():
    torch.manual_seed(0)
    for masks in (lambda step: released_masks(16, 16, step, min_keep=10),
                  lambda step: jepa.multiblock_masks(16, 16, min_keep=10)):
        kept = [masks(step)[0].shape[1] for step in range(20)]
        assert 75 < sum(kept) / 20 < 100  # 85 of 256 at 16 images a batch


def test_both_samplers_agree_where_they_should():
    """The same block areas and, over many batches, the same share of patches that are targets."""
    torch.manual_seed(0)
    areas = []
    unions = []
    for masks in ([jepa.multiblock_masks(16, 16) for _ in range(60)], [released_masks(16, 16, s) for s in range(60)]):
        areas.append(sum(t.shape[2] for _, t in masks) / 60)
        unions.append(sum(grids(t, 16).any(0).float().mean() for _, t in masks) / 60)
    assert all(0.15 * 256 - 4 < area < 0.2 * 256 + 4 for area in areas) and abs(areas[0] - areas[1]) < 3
    assert abs(unions[0] - unions[1]) < 0.05


@pytest.mark.parametrize("grid, more", [
    (8, dict(number=16, scale=(0.9, 0.95))), (8, dict(min_keep=63)), (2, {}), (1, {})])
def test_impossible_masks_do_not_hang(grid, more):
    with pytest.raises(data.UserError, match=f"of {grid} x {grid} patches as context"):
        jepa.multiblock_masks(8, grid, **more)


# -------------------------------------------------------------------------------------------- properties


def small(cls=IJEPA, **more):
    torch.manual_seed(0)
    model = cls(image_size=16, patch_size=4, dim=32, depth=2, heads=2, predictor_dim=16, predictor_depth=1, **more)
    return model.double()


def test_init():
    model = small()
    assert (model.encoder.pos_embed[0] == sincos_2d(32, 4)).all() and not model.encoder.pos_embed.requires_grad
    assert (model.predictor.predictor_pos_embed[0] == sincos_2d(16, 4)).all()
    for weight, size in ((model.encoder.blocks[0].attn.qkv.weight, 32 + 96),
                         (model.predictor.predictor_proj.weight, 16 + 32)):
        limit = math.sqrt(6 / size)  # Xavier: uniform up to sqrt(6 / (fan in + fan out))
        assert 0.9 * limit < weight.abs().max() <= limit
    std = model.encoder.patch_embed.proj.weight.std().item()
    assert abs(std * math.sqrt(3 * 4 * 4) - 1) < 0.1  # 1,536 numbers: within 5 std
    assert (model.encoder.patch_embed.proj.bias == 0).all() and (model.encoder.blocks[1].mlp.fc2.bias == 0).all()
    assert (model.encoder.norm.weight == 1).all() and (model.predictor.predictor_norm.bias == 0).all()
    assert 0.005 < model.predictor.mask_token.std() < 0.04
    for slow, fast in zip(model.target_encoder.parameters(), model.encoder.parameters()):
        assert (slow == fast).all() and not slow.requires_grad


def test_gradients_reach_encoder_and_predictor_alone():
    model = small()
    model.loss(IMAGES, CONTEXT, TARGETS)[0].backward()
    assert all((p.grad != 0).any() for p in model.predictor.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all((p.grad != 0).any() for p in model.encoder.parameters() if p.requires_grad)
    gradient = model.encoder.norm.weight.grad
    without = small(jepa.WithoutStopGradient)
    without.loss(IMAGES, CONTEXT, TARGETS)[0].backward()  # the same values, another gradient
    assert (without.encoder.norm.weight.grad - gradient).abs().max() > 0.1 * gradient.abs().max()


def test_the_context_encoder_is_blind_and_blocks_do_not_see_each_other():
    model = small()
    changed = IMAGES.clone()
    masked = int(ORDER[0, 12])  # neither context nor target
    changed[0, :, masked // 4 * 4:masked // 4 * 4 + 4, masked % 4 * 4:masked % 4 * 4 + 4] += 5
    loss, pred = model.loss(IMAGES, CONTEXT, TARGETS)
    other_loss, other = model.loss(changed, CONTEXT, TARGETS)
    assert (pred == other).all() and loss != other_loss  # but the target encoder saw it
    alone = model.loss(IMAGES, CONTEXT, TARGETS[:1])[1]
    assert (alone[0] - pred[0]).abs().max() < 1e-12


def loss_of_targets(model, h):
    """The loss written another way: h (B, N, D) are the targets of all patches, after their normalization."""
    loss, predictions = model.loss(IMAGES, CONTEXT, TARGETS)
    errors = []
    for m in range(2):
        for b in range(3):
            error = (predictions[m, b] - h[b][TARGETS[m, b]]).abs()
            errors.append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
    return loss, torch.stack(errors).mean()


def layer_norm(h):
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_the_targets_are_the_target_encoders():
    model = small()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.mul_(1.5)  # so that the two encoders differ
    ours, expected = loss_of_targets(model, layer_norm(model.target_encoder(IMAGES)))
    assert abs(ours - expected) < 1e-12
    without = small(jepa.WithoutStopGradient)
    without.load_state_dict(model.state_dict())
    no_stop, expected = loss_of_targets(without, layer_norm(without.encoder(IMAGES)))
    assert abs(no_stop - expected) < 1e-12 and abs(ours - no_stop) > 1e-6


def test_centered_targets():
    model = small(center=True)
    h = model.target_encoder(IMAGES)
    expected = torch.empty_like(h)
    for b in range(3):
        for i in range(16):
            expected[b, i] = h[b, i] - h[:, i].mean(0) - h[b].mean(0) + h.mean((0, 1))
    expected = expected / (expected.flatten(0, 1).std(0) + 1e-4)
    assert (jepa.center_targets(h) - expected).abs().max() < 1e-10
    ours, theirs = loss_of_targets(model, expected)
    assert abs(ours - theirs) < 1e-10
    assert abs(ours - small().loss(IMAGES, CONTEXT, TARGETS)[0]) > 1e-3  # not LayerNorm's
    centered = jepa.center_targets(torch.randn(8, 16, 32) * 3 + torch.randn(16, 32) + torch.randn(8, 1, 32))
    assert centered.mean(0).abs().max() < 1e-5 and centered.mean(1).abs().max() < 1e-5
    assert (centered.std((0, 1)) - 1).abs().max() < 1e-3


def test_the_loss_is_computed_in_the_images_format():
    """In bfloat16 the last three digits of predictions and targets would be lost where they are compared."""
    model = small().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, predictions = model.loss(IMAGES.float(), CONTEXT, TARGETS)
    assert loss.dtype == predictions.dtype == torch.float32


def test_images_of_another_shape_are_refused():
    model = small()
    for shape in ((1, 3, 8, 32), (1, 3, 32, 32), (1, 3, 32, 8)):  # the first and the last have 16 patches, too
        images = torch.randn(shape, dtype=torch.float64)
        for call in (model.encoder, model.target_encoder, model.features):
            with pytest.raises(ValueError, match="16 x 16 pixels"):
                call(images)
        with pytest.raises(ValueError, match="16 x 16 pixels"):
            model.features(images, last=4)


def test_features_are_means_of_the_target_encoders_patches():
    model = small()
    outputs = []
    for block in model.target_encoder.blocks:
        block.register_forward_hook(lambda module, inputs, out: outputs.append(out.mean(1)))
    last = model.features(IMAGES)
    assert (last - model.target_encoder(IMAGES).mean(1)).abs().max() < 1e-12 and last.shape == (3, 32)
    layers = torch.cat(outputs[:2], dim=1)
    assert (model.features(IMAGES, last=2) - layers).abs().max() < 1e-12
    assert (model.features(IMAGES, last=4) - layers).abs().max() < 1e-12  # there are only two


def test_the_average_is_exact():
    model = small()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1)
    before = [p.clone() for p in model.target_encoder.parameters()]
    model.update_target(0.9)
    for was, slow, fast in zip(before, model.target_encoder.parameters(), model.encoder.parameters()):
        assert (slow - (0.9 * was + 0.1 * fast)).abs().max() < 1e-12
    model.update_target(0)
    for slow, fast in zip(model.target_encoder.parameters(), model.encoder.parameters()):
        assert (slow - fast).abs().max() < 1e-12


def test_schedules():
    args = types.SimpleNamespace(lr=1e-3, warmup=10, steps=100, ema=0.996, last_ema=1, no_ema=False)
    lrs = [jepa.learning_rate(step, args) for step in range(101)]
    momenta = [jepa.ema_momentum(step, args) for step in range(101)]
    assert max(lrs) == lrs[10] == 1e-3 and lrs[100] < 1e-9 and lrs[0] == pytest.approx(1e-3 / 11)
    assert momenta[0] == 0.996 and momenta[50] == pytest.approx(0.998) and momenta[100] == 1
    args.no_ema = True
    assert jepa.ema_momentum(50, args) == 0


def test_collapse_is_measured(monkeypatch):
    model = small()
    dataset = types.SimpleNamespace(test_images=torch.zeros(400, 3, 16, 16))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    for features, std, rank in ((x, 32**-0.5, 32), (x + 3, None, 32), (torch.ones(400, 32), 0, 1),
                                (x[:, :1] * torch.ones(32), None, 1)):
        monkeypatch.setattr(data, "extract", lambda *a, f=features: f)
        found = jepa.collapse(model, dataset, None)
        assert abs(found["effective_rank"] - rank) < 1.5
        assert std is None or abs(found["feature_std"] - std) < 0.01


@pytest.mark.parametrize("center", [False, True])
def test_it_overfits_eight_images(center):
    torch.manual_seed(0)
    model = IJEPA(image_size=16, patch_size=4, dim=64, depth=2, heads=2, predictor_dim=64, predictor_depth=2,
                  center=center)
    images = torch.randn(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    order = torch.rand(8, 16).argsort(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    first = model.loss(images, order[:, :8], order[None, :, 8:])[0].item()
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 250)  # large steps to the end may end in a spike
        loss, _ = model.loss(images, order[:, :8], order[None, :, 8:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * first


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--predictor-dim", 8, "--predictor-depth", 1,
         "--batch-size", 16, "--save-seconds", 0, "--device", "cpu", "--masking", "random"]


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["jepa.py", "--data", pictures, *SMALL, "--out", tmp_path / "a"]
    done = script(*words, "--steps", 40, "--warmup", 5, "--lr", 0.003)
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert scores["images_seen"] == "640"
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "probe_last_four", "knn", "feature_std",
            "effective_rank"} <= set(scores)
    files = re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split()
    assert {"masks.png", "predictions.png", "collapse.svg"} <= {file.split("/")[-1] for file in files}
    for file in files:
        assert (ROOT / file).stat().st_size > 100
    assert loss_falls(tmp_path / "a")
    masks = read_png(tmp_path / "a" / "masks.png")[:, 2:98]  # the first row: image, context, target
    assert (masks[:, :, 100:196] == 128).all(0).float().mean() == pytest.approx(10 / 16, abs=0.02)
    assert (masks[:, :, 198:294] == 128).all(0).float().mean() == pytest.approx(6 / 16, abs=0.02)
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "jepa")
    assert set(checkpoint) == {"version", "script", "model", "ema", "optimizer", "step", "args", "scores"}
    done = script("jepa.py", "--data", pictures, "--load", path, "--out", tmp_path / "b")
    again = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert done.returncode == 0 and again["probe"] == scores["probe"], done.stderr
    done = script("vit.py", "--data", pictures, "--init", path, "--steps", 2, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    tuned = data.load_checkpoint(tmp_path / "c" / "checkpoint.pt")["model"]["blocks.1.mlp.fc1.weight"]
    assert (tuned - checkpoint["model"]["target_encoder.blocks.1.mlp.fc1.weight"]).abs().max() < 1e-2


def test_the_options_of_the_lesson_run(pictures, tmp_path):
    folders = []
    for words in (["--no-ema"], ["--no-ema", "--no-stop-grad"], ["--no-center"], ["--masking", "multiblock"]):
        out = tmp_path / words[-1].strip("-")
        words = ["--data", pictures, *SMALL, "--steps", 2, "--patch-size", 2, "--out", out, *words]
        if folders:
            words += ["--compare", *folders]
        folders.append(out)
        scores = jepa.train(jepa.parse_args([str(word) for word in words]))
        assert scores["images_seen"] == 32 and math.isfinite(scores["loss"])
    weights = [data.load_checkpoint(folder / "checkpoint.pt")["model"] for folder in folders[:2]]
    assert not torch.equal(*(w["encoder.blocks.0.mlp.fc1.weight"] for w in weights))  # with and without the gradient
    chart = (out / "collapse.svg").read_text()  # of the last run, beside the others
    assert chart.count("<polyline") == 8 and ">no-stop-grad: feature std</text>" in chart


@pytest.mark.parametrize("words, same", [(["--no-ema"], True), ([], False)])
def test_without_the_average_both_encoders_are_one(pictures, tmp_path, words, same):
    words = ["--data", pictures, *SMALL, "--steps", 3, "--lr", 0.01, "--warmup", 0, "--out", tmp_path, *words]
    jepa.train(jepa.parse_args([str(word) for word in words]))
    state = data.load_checkpoint(tmp_path / "checkpoint.pt", "jepa")["model"]
    difference = state["encoder.blocks.0.mlp.fc1.weight"] - state["target_encoder.blocks.0.mlp.fc1.weight"]
    assert (difference.abs().max() < 1e-6) == same


def test_the_paper_s_targets_are_stored_with_the_checkpoint(pictures, tmp_path):
    for name, words in (("centered", []), ("plain", ["--no-center"])):
        words = ["--data", pictures, *SMALL, "--steps", 1, "--out", tmp_path / name, *words]
        jepa.train(jepa.parse_args([str(word) for word in words]))
        model = IJEPA.from_pretrained(tmp_path / name / "checkpoint.pt")
        assert model.center == (name == "centered") and model.predictor.predictor_blocks[0].attn.heads == 2


def test_masks_of_the_sizes():
    assert jepa.parse_args([]).masking == "blocks"
    assert jepa.parse_args(["--size", "B"]).masking == "multiblock"
    assert jepa.parse_args(["--size", "B", "--masking", "random"]).masking == "random"


def decays(group):
    return group["weight_decay"], {p.ndim for p in group["params"]}


def test_matrices_decay_and_vectors_do_not(pictures, tmp_path, monkeypatch):
    seen = []
    original = torch.optim.AdamW

    def adamw(groups, **more):
        seen.extend(groups)
        return original(groups, **more)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    words = ["--data", pictures, *SMALL, "--steps", 1, "--weight-decay", 0.3, "--out", tmp_path]
    jepa.train(jepa.parse_args([str(word) for word in words]))
    assert [decays(group) for group in seen[:2]] == [(0.3, {2, 3, 4}), (0.0, {1})]
    assert not any(p.requires_grad is False for group in seen[:2] for p in group["params"])


def test_every_size_is_an_option():
    for size, o in jepa.SIZES.items():
        args = vars(jepa.parse_args(["--size", size]))
        assert all(args[key] == value for key, value in o.items())


@pytest.mark.parametrize("log", [b"", b"step,loss\n", b"nonsense\n0\n", b"step,effective_rank,feature_std\n0,1,2\n9,1"])
def test_a_damaged_log_is_refused(refused, pictures, tmp_path, log):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.csv").write_bytes(log)
    message = refused(jepa, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path / "a",
                      "--compare", tmp_path / "other")
    assert "other: holds no whole log.csv with step, effective_rank, feature_std" in message


@pytest.mark.parametrize("released", [True, False])
def test_loaded_files_see_images_as_in_their_training(pictures, tmp_path, monkeypatch, released):
    """Those of the authors with ImageNet's mean and std, own ones with what they store."""
    model = IJEPA(image_size=16, dim=192, depth=1, heads=3, predictor_dim=48, predictor_heads=3)
    state = model.state_dict()
    path = tmp_path / "file.pth"
    if released:
        parts = {}
        for part in ("encoder", "predictor", "target_encoder"):
            parts[part] = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        torch.save(parts, path)
    else:
        args = dict(heads=3, predictor_heads=3, center=True, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        data.save_checkpoint(path, script="jepa", model=state, args=args)
    used = []

    def probe_scores(dataset, features, random_features, amp):
        used.append(torch.cat([dataset.mean, dataset.std]).tolist())
        return {}

    monkeypatch.setattr(data, "probe_scores", probe_scores)
    words = ["--load", str(path), "--data", str(pictures), "--device", "cpu", "--out", str(tmp_path), "--masking", "random"]
    jepa.train(jepa.parse_args(words))
    expected = [0.485, 0.456, 0.406, 0.229, 0.224, 0.225] if released else [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert used[0] == pytest.approx(expected)


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("jepa.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the images' side 16"),
    (["--predictor-dim", 6], "--predictor-dim 6 must be a multiple of 4 and of --heads 2"),
    (["--masking", "multiblock", "--patch-size", 8], "fewer than 4 of 2 x 2 patches as context"),
    (["--patch-size", 16], "masks of 0.6 of 1 patches leave no context"),
    (["--batch-size", 7], "--batch-size 7 is too small for centered targets"),
    (["--compare", "nowhere"], "--compare nowhere: not the --out folder"),
    (["--masking", "diagonal"], "invalid choice: 'diagonal'"),
    (["--ema", 2], "argument --ema: '2' is not a number from 0 to 1"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(jepa, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_small_batches_without_centered_targets():
    assert jepa.parse_args(["--no-center", "--batch-size", "2"]).batch_size == 2
    assert jepa.parse_args(["--batch-size", "8"]).center
    for words in ([], ["--no-center"]):
        model = jepa.build(jepa.parse_args(["--image-size", "32", *words]))
        assert model.center == (not words)
