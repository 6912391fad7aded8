"""jepa.py: parameter counts, the authors' files, its maths written another way, and the real command."""

import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, block_shapes, transformer

import data
import jepa
from common import autocast, sincos_2d
from jepa import IJEPA, sample_masks
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


def random_file(dim=64, depth=2, width=32, predictor_depth=1, patch=4, n=4):
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
    draw = lambda shapes: {f"module.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {"encoder": draw(encoder), "predictor": draw(predictor), "target_encoder": draw(encoder),
            "opt": {}, "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 128, "world_size": 16, "lr": 0.001}


def double(state):
    return {k.removeprefix("module."): v.double() for k, v in state.items()}


def encode(state, image, shown=None, heads=1, P=4):
    s = double(state)
    x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=P).flatten(1).T
    x = x + s["pos_embed"][0]
    x = transformer(s, x if shown is None else x[shown], "blocks.", heads)
    return F.layer_norm(x, x.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-6)


def predict(state, z, context, target, heads=1):
    s = double(state)
    linear = lambda x, name: F.linear(x, s[name + ".weight"], s[name + ".bias"])
    table = s["predictor_pos_embed"][0]
    x = torch.cat([linear(z, "predictor_embed") + table[context], s["mask_token"][0] + table[target]])
    x = transformer(s, x, "predictor_blocks.", heads)[len(context):]
    x = F.layer_norm(x, x.shape[-1:], s["predictor_norm.weight"], s["predictor_norm.bias"], 1e-6)
    return linear(x, "predictor_proj")


G = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 3, 16, 16, generator=G, dtype=torch.float64)
ORDER = torch.rand(3, 16, generator=G).argsort(1)
CONTEXT, TARGETS = ORDER[:, :6], torch.stack([ORDER[:, 6:10], ORDER[:, 8:12]])


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
        near = lambda ours, theirs: (ours - theirs).abs().max() < tolerance * theirs.abs().max()
        assert near(model.encoder(images, CONTEXT), z) and near(model.target_encoder(images), whole)
        assert near(model.encoder(images), torch.stack([encode(file["encoder"], i) for i in IMAGES]))
        assert near(model.predictor(z.to(dtype), CONTEXT, TARGETS[1]), pred[1])
        ours, out = model.loss(images, CONTEXT, TARGETS)
        assert near(ours, loss) and near(out, pred)
    features = ViT.from_pretrained(tmp_path / "x.pth.tar").double().features(IMAGES)
    assert (features - model.features(IMAGES)).abs().max() < 1e-12  # vit.py --init takes the target encoder, too


def hugging_face(state, prefix):
    names = {"pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "blocks.": "encoder.layer.", "norm1": "layernorm_before", "norm2": "layernorm_after",
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


@pytest.mark.parametrize("spoil", [
    lambda f: f["predictor"].pop("module.mask_token"), lambda f: f["encoder"].pop("module.norm.bias"),
    lambda f: f["encoder"].update(extra=torch.ones(1)), lambda f: f.clear(), lambda f: f.pop("encoder"),
    lambda f: f["target_encoder"].update({"module.pos_embed": torch.ones(1, 9, 64)})])
def test_other_files_are_refused(tmp_path, spoil):
    file = random_file()
    spoil(file)
    torch.save(file, tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold an I-JEPA") as error:
        IJEPA.from_pretrained(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- masks


def options(**more):
    return types.SimpleNamespace(**dict(masking="multiblock", sampler="corrected", targets=4, target_scale=0.15,
                                        min_keep=4) | more)


def grids(index, n):
    """(..., K) -> (..., n, n) bool"""
    return torch.zeros(*index.shape[:-1], n * n, dtype=torch.bool).scatter(-1, index, True).unflatten(-1, (n, n))


@pytest.mark.parametrize("masking, targets", [("multiblock", 4), ("multiblock", 1), ("block", 1), ("random", 1),
                                              ("raster", 3)])
def test_no_target_is_in_the_context(masking, targets):
    torch.manual_seed(0)
    for step in range(20):
        context, target = sample_masks(16, 8, options(masking=masking, targets=targets), step)
        assert context.dtype == target.dtype == torch.int64 and target.shape[:2] == (targets, 16)
        assert not (grids(context, 8) & grids(target, 8).any(0)).any()
        assert (grids(context, 8).sum((1, 2)) == context.shape[1]).all() and context.shape[1] >= 4
        assert (grids(target, 8).sum((2, 3)) == target.shape[2]).all()
        if masking in ("multiblock", "block"):  # each target is a full rectangle
            rows, columns = grids(target, 8).any(3).sum(2), grids(target, 8).any(2).sum(2)
            assert (rows * columns == target.shape[2]).all()


def test_the_corrected_sampler_uses_every_place_and_shape():
    torch.manual_seed(0)
    draws = [sample_masks(64, 8, options(), step) for step in range(60)]
    target = torch.stack([grids(t, 8).float().mean((0, 1)) for _, t in draws]).mean(0)
    context = torch.stack([grids(c, 8).float().mean(0) for c, _ in draws]).mean(0)
    assert target[7, 7] > 0.02 and abs(target[0, 0] - target[7, 7]) < 0.02
    assert abs(context[:4].mean() - context[4:].mean()) < 0.03  # surplus is dropped anywhere, not at the bottom
    heights = {int(grids(t[0, 0], 8).any(1).sum()) for _, t in draws}
    widths = {int(grids(t[0, 0], 8).any(0).sum()) for _, t in draws}
    assert heights == widths == {3, 4}  # the released sampler never draws 3 rows by 4 columns
    assert 16 < sum(c.shape[1] for c, _ in draws) / 60 < 24


def test_the_official_sampler_has_its_biases():
    torch.manual_seed(0)
    args = options(sampler="official")
    draws = [sample_masks(64, 8, args, step) for step in range(12)]
    target = torch.stack([grids(t, 8).float().mean((0, 1)) for _, t in draws]).mean(0)
    context = torch.stack([grids(c, 8).float().mean(0) for c, _ in draws]).mean(0)
    assert target[7].max() == target[:, 7].max() == context[7].max() == 0  # the last row and column: never
    assert context[0].mean() > 3 * context[6].mean()  # what is cut off is the bottom
    assert {t.shape[2] for _, t in draws} == {9, 12}  # 3 x 3 or 4 x 3: scale and aspect are one number
    assert (sample_masks(2, 8, args, 5)[1].shape == sample_masks(2, 8, args, 5)[1].shape)


def test_a_large_grid_has_the_papers_numbers():
    torch.manual_seed(0)
    args = options(sampler="official", min_keep=10)
    kept = [sample_masks(16, 16, args, step)[0].shape[1] for step in range(20)]
    assert 75 < sum(kept) / 20 < 95  # 85 of 256 at 16 pictures a batch


@pytest.mark.parametrize("sampler, n, more", [
    ("corrected", 8, dict(targets=16, target_scale=0.9)), ("corrected", 8, dict(min_keep=63)), ("corrected", 2, {}),
    ("official", 8, dict(min_keep=12)), ("official", 2, {}), ("official", 1, {})])
def test_impossible_masks_do_not_hang(sampler, n, more):
    with pytest.raises(data.UserError, match="--min-keep"):
        sample_masks(8, n, options(sampler=sampler, **more), 0)


# -------------------------------------------------------------------------------------------- properties


def small(**more):
    torch.manual_seed(0)
    return IJEPA(16, 4, 32, 2, 2, predictor_dim=16, predictor_depth=1, **more).double()


def test_init():
    model = small()
    assert (model.encoder.pos_embed[0] == sincos_2d(32, 4)).all() and not model.encoder.pos_embed.requires_grad
    assert (model.predictor.predictor_pos_embed[0] == sincos_2d(16, 4)).all()
    for slow, fast in zip(model.target_encoder.parameters(), model.encoder.parameters()):
        assert (slow == fast).all() and not slow.requires_grad


def test_gradients_reach_encoder_and_predictor_alone():
    model = small()
    model.loss(IMAGES, CONTEXT, TARGETS)[0].backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all((p.grad != 0).any() for p in model.encoder.parameters() if p.requires_grad)
    gradient = model.encoder.norm.weight.grad.clone()
    model.zero_grad()
    model.loss(IMAGES, CONTEXT, TARGETS, stop_grad=False)[0].backward()  # the same values, another gradient
    assert (model.encoder.norm.weight.grad - gradient).abs().max() > 0.1 * gradient.abs().max()


def test_the_context_encoder_is_blind_and_blocks_do_not_see_each_other():
    model, changed = small(), IMAGES.clone()
    hidden = int(ORDER[0, 12])  # neither context nor target
    changed[0, :, hidden // 4 * 4:hidden // 4 * 4 + 4, hidden % 4 * 4:hidden % 4 * 4 + 4] += 5
    loss, pred = model.loss(IMAGES, CONTEXT, TARGETS)
    other_loss, other = model.loss(changed, CONTEXT, TARGETS)
    assert (pred == other).all() and loss != other_loss  # but the target encoder saw it
    alone = model.loss(IMAGES, CONTEXT, TARGETS[:1])[1]
    assert (alone[0] - pred[0]).abs().max() < 1e-12
    inputs = small(target="input")
    assert inputs.loss(IMAGES, CONTEXT, TARGETS)[0] == inputs.loss(changed, CONTEXT, TARGETS)[0]


def test_targets_have_no_gain_and_pixels_are_pixels():
    model = small()
    target = model.targets(IMAGES, TARGETS)
    assert target.mean(-1).abs().max() < 1e-6 and (target.var(-1, unbiased=False) - 1).abs().max() < 1e-3
    pixels = small(target="pixels").targets(IMAGES, TARGETS)
    i = int(TARGETS[0, 1, 2])
    square = IMAGES[1, :, i // 4 * 4:i // 4 * 4 + 4, i % 4 * 4:i % 4 * 4 + 4]
    assert (pixels[0, 1, 2] == square.permute(1, 2, 0).flatten()).all()


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
    args = types.SimpleNamespace(lr=1e-3, warmup=10, steps=100, weight_decay=0.04, last_weight_decay=0.4, ema=0.996,
                                 last_ema=1, no_ema=False)
    rates, decays, momenta = zip(*(jepa.schedule(step, args) for step in range(101)))
    assert max(rates) == rates[10] == 1e-3 and rates[100] < 1e-9
    assert decays[0] == pytest.approx(0.04) and decays[50] == pytest.approx(0.22) and decays[100] == pytest.approx(0.4)
    assert momenta[0] == 0.996 and momenta[50] == pytest.approx(0.998) and momenta[100] == 1
    args.no_ema = True
    assert jepa.schedule(50, args)[2] == 0


def test_sigreg_tells_a_gaussian_from_a_collapse():
    torch.manual_seed(0)
    gauss = torch.randn(2000, 32)
    assert jepa.sigreg(gauss) < 2  # of the order of 1 whatever n is; far more for anything else
    assert jepa.sigreg(torch.zeros(2000, 32)) > 100 and jepa.sigreg(3 * gauss) > 100
    x = gauss.clone()
    x[:, :16] = 0
    assert jepa.sigreg(x) > 5


def test_collapse_is_measured(monkeypatch):
    model, pictures = small(), types.SimpleNamespace(test_images=torch.zeros(400, 3, 16, 16))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    for features, std, rank in ((x, 32**-0.5, 32), (torch.ones(400, 32), 0, 1), (x[:, :1] * torch.ones(32), None, 1)):
        monkeypatch.setattr(data, "extract", lambda *a, f=features: f)
        found = jepa.collapse(model, pictures, None)
        assert abs(found["effective_rank"] - rank) < 1.5
        assert std is None or abs(found["feature_std"] - std) < 0.01


def test_it_overfits_eight_pictures():
    torch.manual_seed(0)
    model = IJEPA(16, 4, 64, 2, 2, predictor_dim=64, predictor_depth=2)
    images = torch.randn(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    order = torch.rand(8, 16).argsort(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    first = model.loss(images, order[:, :8], order[None, :, 8:])[0].item()
    for _ in range(150):
        loss, _ = model.loss(images, order[:, :8], order[None, :, 8:])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.1 * first


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--predictor-dim", 8, "--predictor-depth", 1, "--min-keep", 1,
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
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "jepa")
    assert set(checkpoint) == {"script", "model", "ema", "optimizer", "step", "args", "scores"}
    done = script("jepa.py", "--data", pictures, "--load", path, "--min-keep", 1, "--out", tmp_path / "b")
    again = dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))
    assert done.returncode == 0 and again["probe"] == scores["probe"], done.stderr
    done = script("vit.py", "--data", pictures, "--init", path, "--steps", 2, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    tuned = data.load_checkpoint(tmp_path / "c" / "checkpoint.pt")["model"]["blocks.1.mlp.fc1.weight"]
    assert (tuned - checkpoint["model"]["target_encoder.blocks.1.mlp.fc1.weight"]).abs().max() < 1e-2


def test_the_options_of_the_lesson_run(pictures, tmp_path):
    for words in (["--no-ema", "--sigreg", 0.1], ["--no-ema", "--no-stop-grad", "--target", "input"],
                  ["--target", "pixels", "--sampler", "official", "--masking", "multiblock", "--target-scale", 0.25]):
        out, others = tmp_path / words[1].strip("-"), list(tmp_path.iterdir())
        words = ["--data", pictures, *SMALL, "--steps", 2, "--out", out, *words, *["--compare"][:len(others)], *others]
        scores = jepa.train(jepa.parse_args([str(word) for word in words]))
        assert scores["images_seen"] == 32 and math.isfinite(scores["loss"])
    chart = (out / "collapse.svg").read_text()  # of the last run, beside the others
    assert chart.count("<polyline") == 6 and ">no-stop-grad: feature std</text>" in chart


def test_every_size_is_an_option():
    for size, o in jepa.SIZES.items():
        args = vars(jepa.parse_args(["--size", size]))
        assert all(args[key] == value for key, value in o.items())


@pytest.mark.parametrize("log", [None, b"", b"step,loss\n", b"nonsense\n0\n", b"step,effective_rank,feature_std\n0,1,2\n9,1"])
def test_a_damaged_log_is_refused(pictures, tmp_path, log):
    args = jepa.parse_args(["--min-keep", "1", "--image-size", "16"])
    if log is not None:
        (tmp_path / "log.csv").write_bytes(log)
    with pytest.raises(data.UserError, match="log.csv: not the whole log of a run"):
        jepa.draw(small().float(), data.load(str(pictures)), tmp_path, args, autocast("cpu", "fp32"))


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("jepa.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the pictures' side 16"),
    (["--predictor-dim", 6], "--predictor-dim 6 must be a multiple of 4 and of --heads 2"),
    (["--min-keep", 15], "fewer than --min-keep 15 of 4 x 4 patches"),
    (["--compare", "nowhere"], "--compare nowhere: not the --out folder"),
    (["--masking", "diagonal"], "invalid choice: 'diagonal'"),
    (["--sampler", "official"], "--sampler official goes with --masking multiblock"),
    (["--ema", 2], "argument --ema: '2' is not a number from 0 to 1"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(jepa, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_help_explains_every_option(script):
    done = script("jepa.py", "--help")
    assert done.returncode == 0 and done.stdout.count("(default:") == len(vars(jepa.parse_args([])))
