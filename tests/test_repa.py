"""repa.py: parameter counts, the authors' files, its maths written another way, and the real command."""

import argparse
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, difference, loss_falls, mark, transformer

import data
import mae
import repa
from common import sincos_2d
from repa import SiT, Teacher, sample, sample_sde


@pytest.mark.parametrize("size, plain, aligned", [  # latents of 32 x 32 x 4, 1000 classes, a teacher of width 768
    ("S", 32_957_200, 39_515_664), ("B", 130_500_112, 137_845_008), ("L", 458_086_416, 465_955_600),
    ("XL", 675_111_184, 683_242_512)])
def test_parameter_counts(monkeypatch, size, plain, aligned):
    monkeypatch.setattr(SiT, "init_weights", lambda self: None)
    for teacher_dim, count in ((0, plain), (768, aligned)):
        with torch.device("meta"):
            model = SiT(32, **repa.SIZES[size], num_classes=1000, channels=4, teacher_dim=teacher_dim)
        assert sum(p.numel() for p in model.parameters()) == count


# ------------------------------------------------------------------------------------ the authors' files


def random_file(dim=192, depth=3, patch=2, n=4, C=4, K=5, sigma=False, Z=(24,), projector=40):
    """A state dict as the authors write it, with random numbers in every tensor, zero-initialized ones too."""
    torch.manual_seed(0)
    kinds = 2 if sigma else 1  # velocity, and a variance
    shapes = {"x_embedder.proj": (dim, C, patch, patch), "t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim),
              "final_layer.linear": (patch * patch * C * kinds, dim),
              "final_layer.adaLN_modulation.1": (2 * dim, dim)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{k}": v for k, v in {
            "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
            "adaLN_modulation.1": (6 * dim, dim)}.items()}
    for i, z in enumerate(Z):
        shapes |= {f"projectors.{i}.{k}": v for k, v in
                   {"0": (projector, dim), "2": (projector, projector), "4": (z, projector)}.items()}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = torch.randn(shape[0]) / 3
    state["pos_embed"] = torch.randn(1, n * n, dim)
    state["y_embedder.embedding_table.weight"] = torch.randn(K + 1, dim)
    return state


def reference(s, x, t, y, patch=2, heads=3):
    """The velocity and the tokens after each block, from the state dict alone, in float64."""
    s = {k: v.double() for k, v in s.items()}

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def silu(x):
        return x / (1 + (-x).exp())

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def gelu(x):
        return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    waves = torch.tensor([t_ * 10000 ** (-k / 128) for t_ in t.tolist() for k in range(128)], dtype=torch.float64)
    waves = waves.reshape(len(t), 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([waves.cos(), waves.sin()], 1))))
    c = silu(c + s["y_embedder.embedding_table.weight"][y])
    x = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=patch)
    n = x.shape[2]
    B, D = c.shape
    x = x.flatten(2).transpose(1, 2) + s["pos_embed"]
    tokens = []
    for i in range(sum("mlp.fc1.weight" in k for k in s)):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c).reshape(B, 6, 1, D)
        q, k, v = linear(f"blocks.{i}.attn.qkv", standard(x) * (1 + m[:, 1]) + m[:, 0]).reshape(
            B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(2, 3) / math.sqrt(D // heads)).softmax(-1) @ v
        x = x + m[:, 2] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).reshape(B, -1, D))
        h = gelu(linear(f"blocks.{i}.mlp.fc1", standard(x) * (1 + m[:, 4]) + m[:, 3]))
        x = x + m[:, 5] * linear(f"blocks.{i}.mlp.fc2", h)
        tokens.append(x)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).reshape(B, 2, 1, D).unbind(1)
    x = linear("final_layer.linear", standard(x) * (1 + scale) + shift)
    x = x.reshape(B, n, n, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, n * patch, n * patch)
    return x, tokens


G = torch.Generator().manual_seed(1)
X = torch.randn(3, 4, 8, 8, generator=G, dtype=torch.float64)
T = torch.rand(3, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 3, 5])  # the last one is the null class
Z = torch.randn(3, 16, 24, generator=G, dtype=torch.float64)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": {}, "ema": {f"module.{k}": v for k, v in s.items()}, "opt": {}, "steps": 1,
                            "args": argparse.Namespace(resolution=256)}])
def test_repa_files(tmp_path, wrap):
    state = random_file(Z=(24, 8))  # the second teacher's projector is left out
    torch.save(wrap(state), tmp_path / "last.pt")
    model = SiT.from_pretrained(tmp_path / "last.pt")
    expected, tokens = reference(state, X, T, Y)
    assert model.null == 5 and not model.sit_time
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        x = X.to(dtype)
        t = T.to(dtype)
        assert (model.to(dtype)(x, t, Y) - expected).abs().max() < tolerance * expected.abs().max()
        for depth in (1, 2, 3):
            model.align_depth = depth
            hidden = model(x, t, Y, return_tokens=True)[1]
            assert (hidden - tokens[depth - 1]).abs().max() < tolerance * tokens[depth - 1].abs().max()


def test_sit_files_run_the_other_way(tmp_path):
    state = random_file(sigma=True, Z=())
    torch.save(state, tmp_path / "SiT.pt")
    model = SiT.from_pretrained(tmp_path / "SiT.pt").double()
    expected = -reference(state, X, 1 - T, Y)[0][:, :4]
    assert (model(X, T, Y) - expected).abs().max() < 1e-9 * expected.abs().max()
    assert not SiT.from_pretrained(tmp_path / "SiT.pt", sit_time=False).sit_time


def test_a_sit_in_its_own_time_is_trained_and_probed_at_the_right_time(tmp_path):
    """Its loss and its features are those of the same weights in REPA's time, mirrored by hand."""
    torch.save(random_file(sigma=True, Z=()), tmp_path / "SiT.pt")
    model = SiT.from_pretrained(tmp_path / "SiT.pt").double()
    plain = SiT.from_pretrained(tmp_path / "SiT.pt", sit_time=False).double()
    torch.manual_seed(5)
    loss, _ = model.loss(X, Y, label_dropout=0.0)
    torch.manual_seed(5)
    torch.rand(3)
    noise = torch.randn_like(X)
    t = torch.rand(3, dtype=torch.float64)
    u = t[:, None, None, None]
    expected = (-plain((1 - u) * X + u * noise, 1 - t, Y) - (noise - X)).square().mean()
    assert abs(loss - expected) < 1e-12 * expected
    torch.manual_seed(5)
    features = model.features(X)
    torch.manual_seed(5)
    assert torch.equal(features, plain.features(X))


def test_a_width_that_was_not_released_needs_heads(tmp_path):
    state = random_file(dim=64)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(data.UserError, match="last.pt: .*heads=") as error:
        SiT.from_pretrained(tmp_path / "last.pt")
    assert "\n" not in str(error.value)
    for heads in (1, 4):
        model = SiT.from_pretrained(tmp_path / "last.pt", heads=heads).double()
        expected, _ = reference(state, X, T, Y, heads=heads)
        assert (model(X, T, Y) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("spoil", [
    lambda s: s.clear(), lambda s: s.pop("pos_embed"), lambda s: s.pop("blocks.1.mlp.fc1.bias"),
    lambda s: s.update(extra=torch.ones(1)), lambda s: s.update({"final_layer.linear.bias": torch.ones(3)})])
def test_other_files_are_refused(tmp_path, spoil):
    state = random_file()
    spoil(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="x.pt: does not hold a SiT") as error:
        SiT.from_pretrained(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def random_teacher(tmp_path, dim=192):
    """A DINOv2 file for 5 x 5 patches: class token, LayerScale, an unused mask token."""
    torch.manual_seed(0)
    model = Teacher(image_size=70, patch_size=14, dim=dim, depth=2, heads=1, class_token=True)
    state = {k: torch.randn_like(v) / (10 if v.ndim > 1 else 3) for k, v in model.state_dict().items()}
    gammas = {f"blocks.{i}.ls{j}.gamma": torch.rand(dim) for i in range(2) for j in (1, 2)}
    torch.save(state | gammas | {"mask_token": torch.zeros(1, dim)}, tmp_path / "dino.pth")
    return state | gammas


def dinov2(s, images, heads=3):
    """DINOv2's patch tokens from its state dict, in float64; 14 x 14 pixels a patch, a table of 5 x 5."""
    s = {k: v.double() for k, v in s.items()}
    B = len(images)
    n = images.shape[2] // 14
    D = len(s["norm.bias"])

    def norm(name, x):
        return F.layer_norm(x, (D,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    table = s["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (5, 5))
    if n != 5:
        table = F.interpolate(table, (n, n), mode="bicubic", antialias=True)
    x = x + table.flatten(2).transpose(1, 2)
    x = torch.cat([(s["cls_token"] + s["pos_embed"][:, :1]).expand(B, -1, -1), x], 1)
    for b in ("blocks.0", "blocks.1"):
        qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x))
        q, k, v = qkv.reshape(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / math.sqrt(D // heads)).softmax(-1) @ v
        x = x + s[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", y.transpose(1, 2).reshape(B, -1, D))
        x = x + s[f"{b}.ls2.gamma"] * linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
    return norm("norm", x)[:, 1:]


@pytest.mark.parametrize("n", [5, 3])
def test_dinov2_is_a_teacher(tmp_path, n):
    state = random_teacher(tmp_path)
    images = torch.randn(2, 3, 14 * n, 14 * n, dtype=torch.float64)
    expected = dinov2(state, images)
    teacher = Teacher.from_pretrained(tmp_path / "dino.pth")
    assert not any(p.requires_grad for p in teacher.parameters())
    got = teacher(images.float())
    assert got.shape == (2, n * n, 192) and (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (teacher.double()(images) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_teacher_of_a_width_that_was_not_released_needs_heads(tmp_path):
    state = random_teacher(tmp_path, dim=64)
    with pytest.raises(data.UserError, match="dino.pth: .*heads=") as error:
        Teacher.from_pretrained(tmp_path / "dino.pth")
    assert "\n" not in str(error.value)
    images = torch.randn(2, 3, 70, 70, dtype=torch.float64)
    teacher = Teacher.from_pretrained(tmp_path / "dino.pth", heads=4).double()
    expected = dinov2(state, images, heads=4)
    assert (teacher(images) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("script", ["vit", "mae", "jepa", "teacher"])
def test_this_repositorys_encoders_are_teachers(tmp_path, script):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    sizes = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2)
    if script == "mae":
        model = mae.MAE(**sizes)
        expected = model.encode(images)[:, 1:]
    elif script == "teacher":
        model = Teacher(**sizes)
        expected = model(images)
    else:
        model = Teacher(**sizes, class_token=script == "vit")
        expected = encoder_tokens(model.state_dict(), images)[:, -16:]
    state = model.state_dict()
    if script == "vit":
        state |= {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    if script == "jepa":
        state = {f"target_encoder.{k}": v for k, v in state.items()}
        state |= {k.replace("target_encoder", "encoder"): v + 1 for k, v in state.items()}
        state["predictor.mask_token"] = torch.ones(1)
    data.save_checkpoint(tmp_path / "checkpoint.pt", script=script, model=state, args=dict(heads=2))
    teacher = Teacher.from_pretrained(tmp_path / "checkpoint.pt")
    assert (teacher(images) - expected).abs().max() < 1e-5


def encoder_tokens(s, images):
    """All tokens of a ViT with patches of 4 x 4 and two heads, from its state dict, one image after the other."""
    rows = []
    for image in images:
        x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=4).flatten(1).T
        if "cls_token" in s:
            x = torch.cat([s["cls_token"][0], x])
        x = transformer(s, x + s["pos_embed"][0], "blocks.", 2)
        rows.append(F.layer_norm(x, x.shape[1:], s["norm.weight"], s["norm.bias"], 1e-6))
    return torch.stack(rows)


def test_no_teacher_in_other_files(tmp_path):
    torch.save(random_file(), tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold a ViT encoder"):
        Teacher.from_pretrained(tmp_path / "x.pth")


# -------------------------------------------------------------------------------------------- properties


def small():
    """A SiT whose zero-initialized tensors are random: with the true ones, every output is 0."""
    torch.manual_seed(0)
    model = SiT(image_size=8, patch_size=2, dim=32, depth=3, heads=2, num_classes=5, channels=4, align_depth=2,
                teacher_dim=24, projector_dim=16)
    for name, p in model.named_parameters():
        if "adaLN" in name or "final" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.double()


def test_init():
    torch.manual_seed(0)
    model = SiT(teacher_dim=40)
    x = torch.randn(2, 3, 16, 16)
    t = torch.rand(2)
    y = torch.tensor([1, 2])
    start, _ = model.embed(x, t, y)
    for depth in (1, 2, 3, 4):  # each block is the identity
        model.align_depth = depth
        v, tokens = model(x, t, y, return_tokens=True)
        assert (v == 0).all() and torch.equal(tokens, start)
    assert (model.pos_embed[0] == sincos_2d(128, 8)).all() and not model.pos_embed.requires_grad
    for weight, size in ((model.blocks[0].attn.qkv.weight, 128 + 384), (model.x_embedder.proj.weight, 12 + 128),
                         (model.projector[4].weight, 256 + 40), (model.t_embedder.mlp[0].weight, 256 + 128)):
        limit = math.sqrt(6 / size)
        assert 0.95 * limit < weight.abs().max() <= limit
    assert 0.47 < model.class_embed.weight.std() < 0.53
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name


def test_the_projector_changes_no_other_initial_weight():
    models = []
    for teacher_dim in (0, 40):
        torch.manual_seed(0)
        models.append(SiT(teacher_dim=teacher_dim))
    plain, aligned = models
    assert plain.projector is None
    weights = aligned.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (16, 16), (4, 16)])
def test_images_of_another_shape_are_refused(shape):
    """4 x 16 has as many patches as 8 x 8."""
    with pytest.raises(ValueError, match="8 x 8 pixels") as error:
        small()(torch.zeros(1, 4, *shape, dtype=torch.float64), T[:1], Y[:1])
    assert str(shape) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_training_draws_its_times(monkeypatch, times):
    """The quartiles of t are those of the uniform, or of the logistic function of a normal number."""
    seen = []
    monkeypatch.setattr(SiT, "forward", lambda self, x, t, y, return_tokens: seen.append(t) or (x, None))
    torch.manual_seed(0)
    small().loss(torch.zeros(20000, 4, 8, 8), torch.zeros(20000, dtype=torch.long), times=times)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    expected = quartiles
    if times == "lognormal":
        expected = torch.special.ndtri(quartiles).sigmoid()
    assert seen[0].shape == (20000,)
    assert (seen[0].quantile(quartiles) - expected).abs().max() < 0.02
    with pytest.raises(ValueError, match="uniform or lognormal, not typo"):
        small().loss(X, Y, times="typo")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_weight_0_is_plain_flow_matching_to_the_bit():
    model = small()
    torch.manual_seed(5)
    dropped = torch.rand(3) < 0.1
    noise = torch.randn_like(X)
    t = torch.rand(3, dtype=torch.float64)
    y = torch.where(dropped, 5, Y)
    u = t[:, None, None, None]
    plain = (model((1 - u) * X + u * noise, t, y) - (noise - X)).square().mean()
    expected = gradients(model, plain)
    torch.manual_seed(5)
    loss, out = model.loss(X, Y, Z, align=0)
    got = gradients(model, loss)
    assert loss == plain and out["alignment"] != 0
    assert all((got[k] == expected[k]).all() for k in expected)
    assert all((got[k] == 0).all() for k in got if k.startswith("projector"))
    torch.manual_seed(5)
    assert model.loss(X, Y)[0] == plain  # nor does it matter whether there is a teacher


def test_the_loss_with_alignment():
    model = small()
    torch.manual_seed(5)
    torch.rand(3)  # which labels are dropped: here all
    noise = torch.randn_like(X)
    odds = torch.randn(3, dtype=torch.float64).exp()
    t = odds / (1 + odds)
    u = t[:, None, None, None]
    x = (1 - u) * X + u * noise
    null = torch.full_like(Y, 5)
    v, h = model(x, t, null, return_tokens=True)
    cosine = F.cosine_similarity(model.projector(h), Z, dim=-1).mean()
    expected = F.mse_loss(v, noise - X) - 0.7 * cosine
    torch.manual_seed(5)
    loss, out = model.loss(X, Y, Z, align=0.7, label_dropout=1.0, times="lognormal")
    assert abs(loss - expected) < 1e-12 and abs(out["alignment"] - cosine) < 1e-12


def test_features_are_the_mean_token_between_image_and_noise():
    model = small()
    torch.manual_seed(5)
    x = 0.5 * X + 0.5 * torch.randn_like(X)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    for layer, depth in ((None, 2), (1, 1), (3, 3)):
        torch.manual_seed(5)
        features = model.features(X, layer=layer)
        model.align_depth = depth
        tokens = model(x, half, torch.full_like(Y, 5), return_tokens=True)[1]
        model.align_depth = 2
        assert features.shape == (3, 32) and (features - tokens.mean(1)).abs().max() < 1e-12


def test_alignment_reaches_the_projector_and_the_blocks_before_it():
    model = small()
    torch.manual_seed(5)
    a = gradients(model, model.loss(X, Y, Z, align=1.0)[0])
    torch.manual_seed(5)
    b = gradients(model, model.loss(X, Y, Z, align=0.0)[0])
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert all(k in changed for k in a if k.startswith(("projector", "blocks.0.attn", "blocks.1.mlp", "x_embedder")))
    assert not any(k.startswith(("blocks.2", "final_layer")) for k in changed)


def test_labels_are_dropped_as_often_as_asked():
    model = small()
    seen = []
    model.class_embed.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    for share in (0.0, 0.3, 1.0):
        seen.clear()
        model.loss(torch.zeros(300, 4, 8, 8, dtype=torch.float64), torch.arange(300) % 5, label_dropout=share)
        tolerance = 0.1 if share == 0.3 else 1e-9
        assert abs((seen[0] == 5).double().mean() - share) < tolerance


class Gaussian:
    """The exact velocity of images ~ N(2, 0.5^2) in each pixel, class 0, or N(-2, 0.5^2), the null class."""

    null = 1

    def __call__(self, x, t, y):
        t = t.double()[:, None, None, None]
        mean = torch.where(y == 0, 2.0, -2.0)[:, None, None, None]
        variance = 0.25 * (1 - t) ** 2 + t**2
        pull = (x - (1 - t) * mean) / variance  # E[image | x] = mean + (1 - t) / 4 pull, E[noise | x] = t pull
        return (t * pull - (mean + 0.25 * (1 - t) * pull)).to(x.dtype)


def run_sampler(model, noise, y, steps, method, **more):
    if method == "sde":
        return sample_sde(model, noise, y, steps, **more)
    return sample(model, noise, y, steps, method, **more)


@pytest.mark.parametrize("method, steps, tolerance", [("euler", 100, 0.03), ("heun", 20, 0.03), ("sde", 100, 0.04)])
def test_samplers_turn_noise_into_the_right_distribution(method, steps, tolerance):
    noise = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    x = run_sampler(Gaussian(), noise, torch.zeros(2, dtype=torch.long), steps, method, generator=g)
    assert x.dtype == torch.float32 and abs(x.mean() - 2) < tolerance and abs(x.std() - 0.5) < tolerance
    ordered = torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]
    if method == "sde":
        assert 0.2 < ordered < 0.6  # with fresh noise
    else:
        assert ordered > 0.99


def reference_sde(model, noise, y, steps, cfg, g):
    """The sampler of REPA's authors for any path a(t), s(t), here a = 1 - t, s = t, guided at all times."""
    x = noise.double()
    times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    for i in range(steps):
        t = times[i]
        a = 1 - t
        s = t
        da = -1.0
        ds = 1.0
        drifts = []
        for labels in (y, torch.full_like(y, model.null)):
            v = model(x.to(noise.dtype), torch.full((len(x),), t, dtype=noise.dtype), labels).double()
            ratio = a / da
            score = (ratio * v - x) / (s**2 - ratio * ds * s)
            drifts.append(v - 0.5 * (2 * t) * score)
        x = x + (times[i + 1] - t) * (drifts[1] + cfg * (drifts[0] - drifts[1]))
        if i + 1 < steps:
            x = x + math.sqrt(2 * t * (t - times[i + 1])) * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_sde_sampler_is_the_authors(cfg):
    model = small()
    y = torch.tensor([0, 3, 1])
    expected = reference_sde(model, X, y, 7, cfg, torch.Generator().manual_seed(1))
    got = sample_sde(model, X, y, 7, cfg=cfg, generator=torch.Generator().manual_seed(1))
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


def test_heun_in_one_dimension():
    """v = x + t, three steps by hand; the last one is Euler's."""

    class Model:
        null = 1

        def __call__(self, x, t, y):
            return x + t[:, None, None, None]

    x = 1.0
    for t in (1.0, 2 / 3, 1 / 3):
        end = x - (x + t) / 3
        v = ((x + t) + (end + t - 1 / 3)) / 2
        if t == 1 / 3:
            v = x + t
        x = x - v / 3
    got = sample(Model(), torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long), 3, "heun")
    assert abs(got.item() - x) < 1e-12


def test_unknown_samplers_are_refused():
    for method in ("sde", "Euler"):
        with pytest.raises(ValueError, match=f"method must be euler or heun, not {method}"):
            sample(Gaussian(), torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long), method=method)


class Constant:
    """A velocity of 1 for the class, 0 for null; remembers the sizes of the batches it was called with."""

    null = 1

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        return torch.where(y == 0, 1.0, 0.0)[:, None, None, None].expand_as(x)


def test_guidance():
    zero = torch.zeros(2, 1, 1, 1)
    y = torch.zeros(2, dtype=torch.long)
    model = Constant()
    assert (sample(model, zero, y, 10, cfg=3.0) + 3).abs().max() < 1e-6
    assert model.calls == [4] * 10  # both velocities in one call
    model = Constant()
    x = sample(model, zero, y, 10, cfg=3.0, interval=(0.35, 0.75))  # from t = 0.7, 0.6, 0.5, 0.4
    assert (x + 0.6 * 1 + 0.4 * 3).abs().max() < 1e-6
    assert model.calls == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]
    model = Constant()
    sample_sde(model, zero, y, 10, cfg=3.0, interval=(0.35, 0.75))  # t = 1 to 0.04 in steps of 0.107, then 0
    assert model.calls == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]


def test_it_overfits_eight_images():
    torch.manual_seed(0)
    model = SiT(image_size=16, patch_size=4, dim=64, depth=2, heads=2, num_classes=8, align_depth=1, teacher_dim=16,
                projector_dim=32)
    images = torch.randn(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    z = torch.randn(8, 16, 16)
    y = torch.arange(8).repeat(8)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(300):
        loss, out = model.loss(images.repeat(8, 1, 1, 1), y, z.repeat(8, 1, 1), label_dropout=0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    made = sample(model, torch.randn(8, 3, 16, 16), torch.arange(8), 20)
    assert out["alignment"] > 0.8 and (made - images).square().mean() < 0.2  # of variance 1


@pytest.mark.parametrize("kind", ["DINOv2", "timm", "own", "own, which does not tell"])
def test_the_teacher_sees_the_students_grid(pictures, tmp_path, kind):
    """As many patches as the student, and images normalized as in the teacher's own training."""
    state = random_teacher(tmp_path)
    path = tmp_path / "dino.pth"
    dataset = data.load(str(pictures))
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    if kind != "DINOv2":
        path = tmp_path / "other.pt"
        state = {k: v for k, v in state.items() if "gamma" not in k}
    if kind == "timm":
        torch.save(state | {"head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)}, path)
        mean = torch.full((3,), 0.5)
        std = torch.full((3,), 0.5)
    elif kind == "own":
        mean = torch.tensor([0.1, 0.2, 0.3])
        std = torch.tensor([0.4, 0.5, 0.6])
        args = dict(heads=3, mean=mean.tolist(), std=std.tolist())
        data.save_checkpoint(path, script="vit", model=state, args=args)
    elif kind != "DINOv2":
        mean = dataset.mean
        std = dataset.std
        data.save_checkpoint(path, script="vit", model=state, args=dict(heads=3))
    teacher = Teacher.from_pretrained(path)
    seen = []
    teacher.patch_embed.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    images = dataset.train_images[:3]
    z = repa.teacher_tokens(teacher, dataset, images, grid=4, amp=data.autocast("cpu", "fp32"))
    assert z.shape == (3, 16, 192) and z.dtype == torch.float16 and seen[0].shape == (3, 16, 588)
    assert (z.float().norm(dim=-1) - 1).abs().max() < 1e-2
    expected = (images.float().mean((2, 3)) / 255 - mean) / std
    assert (seen[0].reshape(3, -1, 3).mean(1) - expected).abs().max() < 0.05


def test_teacher_tokens_of_many_images(pictures, tmp_path):
    """More than one part of 100 images: the order is kept."""
    random_teacher(tmp_path)
    dataset = data.load(str(pictures))
    teacher = Teacher.from_pretrained(tmp_path / "dino.pth")
    fp32 = data.autocast("cpu", "fp32")
    images = dataset.train_images[:104]
    z = repa.teacher_tokens(teacher, dataset, images, grid=1, amp=fp32)
    last = repa.teacher_tokens(teacher, dataset, images[99:], grid=1, amp=fp32)
    assert z.shape == (104, 1, 192) and (z[99:].float() - last.float()).abs().max() < 2e-3


def test_velocity_error_is_the_loss_at_fixed_times(pictures):
    """A model that knows each image errs by nothing; one that says 0 errs by the mean of (noise - image)^2."""
    dataset = data.load(str(pictures))
    fp32 = data.autocast("cpu", "fp32")
    images = dataset.normalize(dataset.test_images)

    def zero(x, t, y):
        assert torch.equal(y, dataset.test_labels)
        return torch.zeros_like(x)

    def perfect(x, t, y):  # noise = (x - (1 - t) image) / t
        t = t[:, None, None, None]
        return (x - (1 - t) * images) / t - images

    assert repa.velocity_error(perfect, dataset, fp32) < 1e-6
    error = repa.velocity_error(zero, dataset, fp32)
    expected = 1 + images.square().mean().item()
    assert abs(error - expected) < 0.05 * expected
    assert error == repa.velocity_error(zero, dataset, fp32)


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--patch-size", 4, "--depth", 2, "--heads", 2, "--align-depth", 1, "--projector-dim", 16,
         "--batch-size", 16, "--teacher-steps", 4, "--samples", 8, "--sample-steps", 3, "--save-seconds", 0,
         "--device", "cpu"]


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without the scores that take seconds; test_the_command has them."""
    monkeypatch.setattr(repa, "frechet_scores", lambda *args: {})
    monkeypatch.setattr(data, "probe_scores", lambda *args: {})
    monkeypatch.setattr(repa, "probe_by_block", lambda *args: [(1, 0.5)])


def scores_of(done):
    return dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["repa.py", "--data", pictures, "--data-dir", pictures.parent, *SMALL]
    done = script(*words, "--out", tmp_path / "a", "--steps", 20, "--warmup", 2, "--align-until", 12)
    assert done.returncode == 0, done.stderr
    scores = scores_of(done)
    assert scores["images_seen"] == "320" and "a small" in done.stdout
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn", "frechet", "frechet_floor",
            "frechet_ceiling"} <= set(scores)
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    width = int.from_bytes((tmp_path / "a" / "samples.png").read_bytes()[16:20], "big")
    assert width == 2 + 3 * (96 + 2)  # a column for each class
    assert loss_falls(tmp_path / "a")
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "repa")
    assert set(checkpoint) == {"script", "version", "model", "ema", "optimizer", "step", "args", "scores"}
    model = SiT.from_pretrained(path)
    assert model.blocks[0].attn.heads == 2 and model.align_depth == 1
    assert all((model.state_dict()[k] == v).all() for k, v in checkpoint["ema"].items())
    # The averaged weights have moved, and are not the last ones.
    last = checkpoint["model"]["final_layer.linear.weight"]
    averaged = checkpoint["ema"]["final_layer.linear.weight"]
    assert averaged.any() and not torch.equal(averaged, last)  # both start at zero
    log = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert "nan" not in log[2] and "nan" in log[-1]  # aligned at step 10, no longer at step 19

    done = script(*words, "--load", path, "--out", tmp_path / "b", "--compare", path)
    assert done.returncode == 0, done.stderr
    again = scores_of(done)
    assert all(again[key] == scores[key] for key in ("probe", "frechet", "frechet_floor", "frechet_ceiling"))


def test_without_labels_every_class_is_the_null_class(pictures, tmp_path):
    """--label-dropout 1 trains one row of the class embedding: samples of all classes must use it."""
    words = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, "--out", tmp_path, "--steps", 2]
    repa.train(repa.parse_args([str(word) for word in [*words, "--label-dropout", 1]]))
    path = tmp_path / "checkpoint.pt"
    drawn = data.load_checkpoint(path, "repa")["model"]["class_embed.weight"]
    averaged = SiT.from_pretrained(path).class_embed.weight
    assert not torch.equal(drawn[0], drawn[-1])
    assert (averaged == averaged[-1]).all()
    assert 0 < (averaged[-1] - drawn[-1]).abs().max() < 0.1  # the null class's: averaged, not another class's


def test_the_frechet_distance_is_of_images_without_guidance(pictures, monkeypatch):
    """Of the averaged model, of the test images' classes, against the test images."""
    dataset = data.load(str(pictures))
    asked = []

    def generate(model, dataset, labels, args, amp, cfg=1.0):
        asked.append((labels, cfg))
        return dataset.test_images[:len(labels)]

    monkeypatch.setattr(repa, "generate", generate)
    args = repa.parse_args(["--data", str(pictures), "--samples", "9", "--cfg", "3"])
    scores = repa.frechet_scores(small_sit(), dataset, args, data.autocast("cpu", "fp32"))
    (labels, cfg), = asked
    assert torch.equal(labels, dataset.test_labels[:9]) and cfg == 1
    assert abs(scores["frechet"]) < 1e-3 < scores["frechet_floor"] < scores["frechet_ceiling"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_images_are_made_by_the_sampler_that_was_asked_for(pictures, sampler, monkeypatch):
    dataset = data.load(str(pictures))
    called = []
    for name in ("sample", "sample_sde"):
        def spy(*args, name=name, original=getattr(repa, name), **more):
            called.append(more.get("method", name))
            return original(*args, **more)

        monkeypatch.setattr(repa, name, spy)
    args = repa.parse_args(["--sampler", sampler, "--sample-steps", "3"])
    labels = torch.arange(120) % 3
    images = repa.generate(small_sit(), dataset, labels, args, data.autocast("cpu", "fp32"))
    assert images.shape == (120, 3, 16, 16) and images.dtype == torch.uint8
    assert called == [{"sde": "sample_sde"}.get(sampler, sampler)] * 2  # 100 images, then 20
    assert torch.equal(images, repa.generate(small_sit(), dataset, labels, args, data.autocast("cpu", "fp32")))


def test_plain_and_aligned_start_the_same(unscored, pictures, tmp_path):
    words = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, "--steps", 8, "--precision", "fp32"]
    runs = {"plain": ["--align", 0], "zero": ["--align", 0, "--teacher", "random"], "aligned": ["--teacher", "random"]}
    models = {}
    first = {}
    for name, more in runs.items():
        repa.train(repa.parse_args([str(word) for word in (*words, *more, "--out", tmp_path / name)]))
        models[name] = data.load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
        first[name] = data.read_log(tmp_path / name / "log.csv")["velocity"][0]
    assert "projector.0.weight" not in models["plain"]
    assert all((models["zero"][k] == v).all() for k, v in models["plain"].items())  # the control with a projector
    assert not (models["aligned"]["blocks.0.attn.qkv.weight"] == models["plain"]["blocks.0.attn.qkv.weight"]).all()
    assert first["plain"] == first["aligned"]  # the velocity loss of step 0


@pytest.mark.parametrize("log", [None, b"nonsense\n0\n", b"\xff"])
def test_a_damaged_log_is_refused(unscored, pictures, tmp_path, monkeypatch, log):
    """The log is spoiled after the last step, before the chart of the training is drawn."""
    path = tmp_path / "log.csv"

    def spoil(*args, **more):
        path.unlink()
        if log is not None:
            path.write_bytes(log)
        return []

    monkeypatch.setattr(repa, "draw_probes", spoil)
    words = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, "--steps", 1, "--align", 0, "--out", tmp_path]
    with pytest.raises(data.UserError, match=f"{tmp_path}: .*log.csv") as error:
        repa.train(repa.parse_args([str(word) for word in words]))
    assert "\n" not in str(error.value)


def small_sit(**more):
    return SiT(image_size=16, patch_size=8, dim=16, depth=1, heads=2, num_classes=3, align_depth=1, teacher_dim=0,
               **more)


@pytest.mark.parametrize("align_depth", [0, 3])
def test_the_aligned_block_must_exist(align_depth):
    with pytest.raises(ValueError, match=f"align_depth {align_depth}: there are 2 blocks"):
        SiT(dim=16, depth=2, heads=2, align_depth=align_depth)


def test_a_model_of_other_images_is_not_compared(pictures, tmp_path):
    torch.save(random_file(sigma=True, Z=()), tmp_path / "sit.pt")  # of 8 x 8 latents
    args = repa.parse_args(["--compare", str(tmp_path / "sit.pt")])
    with pytest.raises(data.UserError, match="sit.pt: makes images of 4 channels and 5 classes"):
        repa.read_compared(args, data.load(str(pictures)))
    larger = SiT(image_size=32, patch_size=8, dim=16, depth=1, heads=2, num_classes=3, align_depth=1, teacher_dim=0)
    with pytest.raises(data.UserError, match="--compare file: makes images of 32 x 32 pixels, not 16 x 16"):
        repa.check_fit(larger, data.load(str(pictures)), "--compare file")
    assert repa.read_compared(repa.parse_args([]), data.load(str(pictures))) is None


def test_the_chart_shows_the_probes_of_both_models(pictures, tmp_path, monkeypatch):
    """Block 1 of --compare, and of this run: each curve is that of its own model."""
    curves = {}
    monkeypatch.setattr(data, "save_chart", lambda path, series, *labels: curves.update(series))
    monkeypatch.setattr(repa, "probe_by_block", lambda model, *more: [(1, model.class_embed.weight.mean().item())])
    other = small_sit()
    torch.nn.init.ones_(other.class_embed.weight)
    data.save_checkpoint(tmp_path / "other.pt", script="repa", model=other.state_dict(),
                         args=dict(heads=2, align_depth=1))
    args = repa.parse_args(["--compare", str(tmp_path / "other.pt")])
    dataset = data.load(str(pictures))
    other = repa.read_compared(args, dataset)
    repa.draw_probes(small_sit(), other, dataset, tmp_path, data.autocast("cpu", "fp32"))
    assert set(curves) == {"this run", "--compare"}
    assert curves["--compare"] == [(1, 1.0)] and curves["this run"] != [(1, 1.0)]


def test_probe_by_block(pictures, monkeypatch):
    """Each block is asked once, in order; four fifths of the images train the probe."""
    asked = []
    sizes = []

    def features(images, layer=None):
        asked.append(layer)
        return images.flatten(1)[:, :8]

    def probe(train_x, train_y, test_x, test_y):
        sizes.append((len(train_x), len(train_y), len(test_x), len(test_y)))
        return len(sizes) / 10

    model = small()
    monkeypatch.setattr(model, "features", features)
    monkeypatch.setattr(data, "linear_probe", probe)
    dataset = data.load(str(pictures))
    curve = repa.probe_by_block(model, dataset, data.autocast("cpu", "fp32"))
    n = len(dataset.train_images)
    assert curve == [(1, 0.1), (2, 0.2), (3, 0.3)] and sorted(set(asked)) == [1, 2, 3]
    test = n // 5
    train = n - test
    assert sizes == [(train, train, test, test)] * 3


def teacher_of(out, **more):
    """What pick_teacher gives for a small data set; the options are words of the command line."""
    words = {"data": "own.npz", "align_depth": 1, "depth": 1, "teacher_steps": 2, "out": out, "patch_size": 4} | more
    argv = []
    for name, word in words.items():
        argv += [f"--{name.replace('_', '-')}"] + ([] if word is True else [str(word)])
    args = repa.parse_args(argv)
    dataset = data.load(words["data"])
    return repa.pick_teacher(args, dataset, data.autocast("cpu", "fp32"), out)


def test_each_way_to_a_teacher(pictures, tmp_path):
    own = dict(data=pictures, image_size=16)
    assert teacher_of(tmp_path, align=0, **own) is None
    random = teacher_of(tmp_path, align=0, teacher="random", **own)
    assert not (tmp_path / "teacher.pt").exists()
    trained = teacher_of(tmp_path, **own)
    kept = Teacher.from_pretrained(tmp_path / "teacher.pt")
    file = teacher_of(tmp_path / "other", teacher=tmp_path / "teacher.pt", **own)
    for teacher in (random, trained, file):
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[name]) and torch.equal(weight, file.state_dict()[name])
    assert not torch.equal(random.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_a_run_is_resumed_after_its_folder_was_moved(unscored, pictures, tmp_path):
    """The teacher comes from the new folder: it is neither trained again nor looked for in the old one."""
    words = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, "--precision", "fp32"]
    repa.train(repa.parse_args([str(word) for word in (*words, "--steps", 6, "--out", tmp_path / "old")]))
    (tmp_path / "old").rename(tmp_path / "new")
    before = (tmp_path / "new" / "teacher.pt").read_bytes()
    resumed = ["--resume", "--out", str(tmp_path / "new"), "--steps", "9", "--teacher-steps", "1"]
    mark(tmp_path / "new" / "checkpoint.pt")
    scores = repa.train(repa.parse_args(resumed))
    assert scores["images_seen"] == 9 * 16 and scores["teacher_seconds"] > 0 and scores["seconds"] > 1e6
    assert (tmp_path / "new" / "teacher.pt").read_bytes() == before and not (tmp_path / "old").exists()


def test_a_new_run_does_not_take_an_old_teacher(pictures, tmp_path):
    own = dict(data=pictures, image_size=16)
    first = teacher_of(tmp_path, **own)
    again = teacher_of(tmp_path, seed=1, **own)
    no_checkpoint = teacher_of(tmp_path, seed=2, resume=True, **own)  # of a run that was killed early
    weights = [teacher.norm.bias for teacher in (first, again, no_checkpoint)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_killed_and_resumed_is_the_same_run(same_run, pictures, tmp_path):
    same_run("repa.py", "--data", pictures, "--data-dir", pictures.parent, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the images' side 16"),
    (["--align-depth", 3], "--align-depth 3: there are 2 blocks"),
    (["--interval", 0.8, 0.2], "--interval: the first time must be the smaller one"),
    (["--teacher", "data.py"], "data.py: not a whole PyTorch file"),
    (["--label-dropout", 2], "'2' is not a number from 0 to 1"),
    (["--load", "README.md"], "README.md: not a whole PyTorch file"),
    (["--samples", 1], "'1' is not a whole number from 2"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    more = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, "--steps", 2, "--out", tmp_path, *words]
    assert message in refused(repa, *more)


def test_latents_are_not_scored(script, pictures, tmp_path):
    torch.save(random_file(), tmp_path / "last.pt")
    done = script("repa.py", "--data", pictures, "--load", tmp_path / "last.pt", "--out", tmp_path)
    assert done.returncode == 2 and "4 channels" in done.stderr and done.stderr.count("\n") == 1
