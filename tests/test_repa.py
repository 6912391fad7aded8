"""repa.py: parameter counts, the authors' files, its maths written another way, and the real command."""

import argparse
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import mae
import repa
import vit
from common import autocast, sincos_2d
from repa import SiT, Teacher, sample


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


def random_file(dim=64, depth=3, patch=2, n=4, C=4, K=5, sigma=False, Z=(24,), projector=40):
    """A state dict as the authors write it, with random numbers in every tensor, zero-initialised ones too."""
    torch.manual_seed(0)
    shapes = {"x_embedder.proj": (dim, C, patch, patch), "t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim),
              "final_layer.linear": (patch * patch * C * (1 + sigma), dim), "final_layer.adaLN_modulation.1": (2 * dim, dim)}
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
    return state | {"pos_embed": torch.randn(1, n * n, dim), "y_embedder.embedding_table.weight": torch.randn(K + 1, dim)}


def reference(s, x, t, y, patch=2, heads=1):
    """The velocity and the tokens after each block, from the state dict alone, in float64."""
    s = {k: v.double() for k, v in s.items()}
    linear = lambda name, x: x @ s[f"{name}.weight"].T + s[f"{name}.bias"]
    silu = lambda x: x / (1 + (-x).exp())
    standard = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    gelu = lambda x: x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    waves = torch.tensor([t_ * 10000 ** (-k / 128) for t_ in t.tolist() for k in range(128)], dtype=torch.float64)
    waves = waves.reshape(len(t), 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([waves.cos(), waves.sin()], 1))))
    c = silu(c + s["y_embedder.embedding_table.weight"][y])
    x = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=patch)
    n, (B, D) = x.shape[2], c.shape
    x, tokens = x.flatten(2).transpose(1, 2) + s["pos_embed"], []
    for i in range(sum("mlp.fc1.weight" in k for k in s)):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c).reshape(B, 6, 1, D)
        q, k, v = linear(f"blocks.{i}.attn.qkv", standard(x) * (1 + m[:, 1]) + m[:, 0]).reshape(
            B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(2, 3) / math.sqrt(D // heads)).softmax(-1) @ v
        x = x + m[:, 2] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).reshape(B, -1, D))
        h = gelu(linear(f"blocks.{i}.mlp.fc1", standard(x) * (1 + m[:, 4]) + m[:, 3]))
        tokens.append(x := x + m[:, 5] * linear(f"blocks.{i}.mlp.fc2", h))
    shift, scale = linear("final_layer.adaLN_modulation.1", c).reshape(B, 2, 1, D).unbind(1)
    x = linear("final_layer.linear", standard(x) * (1 + scale) + shift)
    x = x.reshape(B, n, n, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, n * patch, n * patch)
    return x, tokens


G = torch.Generator().manual_seed(1)
X, T = torch.randn(3, 4, 8, 8, generator=G, dtype=torch.float64), torch.rand(3, generator=G, dtype=torch.float64)
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
        x, t = X.to(dtype), T.to(dtype)
        assert (model.to(dtype)(x, t, Y) - expected).abs().max() < tolerance * expected.abs().max()
        hidden = model.layers(x, t, Y, stop=2)[0][-1]
        assert (hidden - tokens[1]).abs().max() < tolerance * tokens[1].abs().max()


def test_sit_files_run_the_other_way(tmp_path):
    state = random_file(sigma=True, Z=())
    torch.save(state, tmp_path / "SiT.pt")
    model = SiT.from_pretrained(tmp_path / "SiT.pt").double()
    expected = -reference(state, X, 1 - T, Y)[0][:, :4]
    assert (model(X, T, Y) - expected).abs().max() < 1e-9 * expected.abs().max()
    assert not SiT.from_pretrained(tmp_path / "SiT.pt", sit_time=False).sit_time


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


def random_teacher(tmp_path):
    """A DINOv2 file for 5 x 5 patches: class token, LayerScale, an unused mask token."""
    torch.manual_seed(0)
    model = vit.ViT(70, 14, 64, 2, 1)
    state = {k: torch.randn_like(v) / (10 if v.ndim > 1 else 3) for k, v in model.state_dict().items() if "head" not in k}
    gammas = {f"blocks.{i}.ls{j}.gamma": torch.rand(64) for i in range(2) for j in (1, 2)}
    torch.save(state | gammas | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dino.pth")
    return state | gammas


@pytest.mark.parametrize("n", [5, 3])
def test_dinov2_is_a_teacher(tmp_path, n):
    s = {k: v.double() for k, v in random_teacher(tmp_path).items()}
    images = torch.randn(2, 3, 14 * n, 14 * n, dtype=torch.float64)
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    table = s["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (5, 5))
    if n != 5:
        table = F.interpolate(table, (n, n), mode="bicubic", antialias=True)
    x = x + table.flatten(2).transpose(1, 2)
    x = torch.cat([(s["cls_token"] + s["pos_embed"][:, :1]).expand(2, -1, -1), x], 1)
    norm = lambda name, x: F.layer_norm(x, (64,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)
    linear = lambda name, x: F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])
    for b in ("blocks.0", "blocks.1"):
        q, k, v = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).chunk(3, -1)
        x = x + s[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", (q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
        x = x + s[f"{b}.ls2.gamma"] * linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
    expected = norm("norm", x)[:, 1:]
    teacher = Teacher.from_pretrained(tmp_path / "dino.pth")
    assert teacher.imagenet and not any(p.requires_grad for p in teacher.parameters())
    got = teacher(images.float())
    assert got.shape == (2, n * n, 64) and (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("script", ["vit", "mae", "jepa"])
def test_this_repositorys_encoders_are_teachers(tmp_path, script):
    torch.manual_seed(0)
    args, images = dict(heads=2), torch.randn(2, 3, 16, 16)
    if script == "mae":
        model = mae.MAE(16, 4, 32, 2, 2)
        expected = model.encode(images)[:, 1:]
        state = model.state_dict()
    else:
        model = vit.ViT(16, 4, 32, 2, 2, class_token=script == "vit")
        expected = model.tokens(images)[:, -16:]
        state = model.state_dict()
    if script == "jepa":
        state = {f"target_encoder.{k}": v for k, v in state.items() if "head" not in k}
        state |= {k.replace("target_encoder", "encoder"): v + 1 for k, v in state.items()}
        state["predictor.mask_token"] = torch.ones(1)
    torch.save(dict(script=script, model=state, args=args), tmp_path / "checkpoint.pt")
    teacher = Teacher.from_pretrained(tmp_path / "checkpoint.pt")
    assert (teacher(images) - expected).abs().max() < 1e-5 and not teacher.imagenet


def test_no_teacher_in_other_files(tmp_path):
    torch.save(random_file(), tmp_path / "x.pth")
    with pytest.raises(data.UserError, match="x.pth: does not hold a ViT encoder"):
        Teacher.from_pretrained(tmp_path / "x.pth")


# -------------------------------------------------------------------------------------------- properties


def small(**more):
    """A SiT whose zero-initialised tensors are random: with the true ones, every output is 0."""
    torch.manual_seed(0)
    model = SiT(8, 2, 32, 3, 2, num_classes=5, channels=4, align_depth=2, teacher_dim=24, projector_dim=16, **more)
    for name, p in model.named_parameters():
        if "adaLN" in name or "final" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.double()


def test_init():
    torch.manual_seed(0)
    model = SiT(teacher_dim=40)
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 2])
    layers, v = model.layers(x, t, y)
    assert (v == 0).all() and all((layer == layers[0]).all() for layer in layers)
    assert (model.pos_embed[0] == sincos_2d(128, 8)).all() and not model.pos_embed.requires_grad
    bound = lambda a, b: math.sqrt(6 / (a + b))
    for weight, limit in ((model.blocks[0].attn.qkv.weight, bound(128, 384)), (model.x_embedder.proj.weight, bound(12, 128)),
                          (model.projectors[0][4].weight, bound(256, 40)), (model.t_embedder.mlp[0].weight, bound(256, 128))):
        assert 0.95 * limit < weight.abs().max() <= limit
    assert 0.47 < model.y_embedder["embedding_table"].weight.std() < 0.53


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_paths(path):
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64, requires_grad=True)
    a, s, da, ds = repa.mix(t, path)
    assert (torch.autograd.grad(a.sum(), t, retain_graph=True)[0] - da).abs().max() < 1e-12
    assert (torch.autograd.grad(s.sum(), t)[0] - ds).abs().max() < 1e-12
    ends = repa.mix(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    assert (torch.stack(ends[:2]) - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-12  # picture, then noise


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_weight_0_is_plain_flow_matching_to_the_bit():
    model = small()
    torch.manual_seed(5)
    dropped, noise, t = torch.rand(3) < 0.1, torch.randn_like(X), torch.rand(3, dtype=torch.float64)
    y = torch.where(dropped, 5, Y)
    u = t[:, None, None, None]
    plain = (model((1 - u) * X + u * noise, t, y) - (noise - X)).square().mean()
    expected = gradients(model, plain)
    torch.manual_seed(5)
    loss, out = model.loss(X, Y, Z, align=0)
    got = gradients(model, loss)
    assert loss == plain and out["alignment"] != 0
    assert all((got[k] == expected[k]).all() for k in expected)
    assert all((got[k] == 0).all() for k in got if k.startswith("projectors"))
    torch.manual_seed(5)
    assert model.loss(X, Y)[0] == plain  # nor does it matter whether there is a teacher


def test_the_loss_with_alignment():
    model = small(path="cosine")
    torch.manual_seed(5)
    torch.rand(3), (noise := torch.randn_like(X)), (odds := torch.randn(3, dtype=torch.float64).exp())
    t = (2 / math.pi * odds.atan())
    u = t[:, None, None, None] * math.pi / 2
    x = u.cos() * X + u.sin() * noise
    layers, _ = model.layers(x, t, torch.full_like(Y, 5))
    v = math.pi / 2 * (u.cos() * noise - u.sin() * X)
    cosine = F.cosine_similarity(model.projectors[0](layers[1]), Z, dim=-1).mean()
    expected = F.mse_loss(model(x, t, torch.full_like(Y, 5)), v) - 0.7 * cosine
    torch.manual_seed(5)
    loss, out = model.loss(X, Y, Z, align=0.7, label_dropout=1.0, times="lognormal")
    assert abs(loss - expected) < 1e-12 and abs(out["alignment"] - cosine) < 1e-12


def test_alignment_reaches_the_projector_and_the_blocks_before_it():
    model = small()
    torch.manual_seed(5)
    a = gradients(model, model.loss(X, Y, Z, align=1.0)[0])
    torch.manual_seed(5)
    b = gradients(model, model.loss(X, Y, Z, align=0.0)[0])
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert all(k in changed for k in a if k.startswith(("projectors", "blocks.0.attn", "blocks.1.mlp", "x_embedder")))
    assert not any(k.startswith(("blocks.2", "final_layer")) for k in changed)


def test_labels_are_dropped_as_often_as_asked():
    model, seen = small(), []
    model.y_embedder["embedding_table"].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    for share in (0.0, 0.3, 1.0):
        seen.clear()
        model.loss(torch.zeros(300, 4, 8, 8, dtype=torch.float64), torch.arange(300) % 5, label_dropout=share)
        assert abs((seen[0] == 5).double().mean() - share) < 0.1 * (0 < share < 1) + 1e-9


class Gaussian:
    """The exact velocity of pictures ~ N(2, 0.5^2) in each pixel, class 0, or N(-2, 0.5^2), the null class."""

    null, path = 1, "linear"

    def __init__(self, path):
        self.path = path

    def __call__(self, x, t, y):
        a, s, da, ds = (u[:, None, None, None] for u in repa.mix(t.double(), self.path))
        mean = torch.where(y == 0, 2.0, -2.0)[:, None, None, None]
        var = 0.25 * a * a + s * s
        pull = (x - a * mean) / var  # E[picture | x] = mean + a / 4 pull, E[noise | x] = s pull
        return (da * (mean + 0.25 * a * pull) + ds * s * pull).to(x.dtype)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("method, steps, tolerance", [("euler", 100, 0.03), ("heun", 20, 0.03), ("sde", 100, 0.04)])
def test_samplers_turn_noise_into_the_right_distribution(path, method, steps, tolerance):
    noise = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    x = sample(Gaussian(path), noise, torch.zeros(2, dtype=torch.long), steps, method, generator=g)
    assert x.dtype == torch.float32 and abs(x.mean() - 2) < tolerance and abs(x.std() - 0.5) < tolerance
    ordered = torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]
    assert 0.2 < ordered < 0.6 if method == "sde" else ordered > 0.99  # with fresh noise, or none


def test_guidance():
    class Model(Gaussian):  # a velocity of 1 for the class, 0 for null
        calls = []

        def __call__(self, x, t, y):
            self.calls.append((len(x), t[0].item()))
            return torch.where(y == 0, 1.0, 0.0)[:, None, None, None].expand_as(x)

    model, zero, y = Model("linear"), torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    assert (sample(model, zero, y, 10, cfg=3.0) + 3).abs().max() < 1e-6
    assert [n for n, _ in model.calls] == [4] * 10  # both velocities in one call
    model.calls.clear()
    x = sample(model, zero, y, 10, cfg=3.0, interval=(0.35, 0.75))  # from t = 0.7, 0.6, 0.5, 0.4
    assert (x + 0.6 * 1 + 0.4 * 3).abs().max() < 1e-6
    assert [n for n, _ in model.calls] == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]


def test_frechet_distance():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 3, generator=g, dtype=torch.float64), torch.randn(4000, 3, generator=g, dtype=torch.float64)
    x, y = ((z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T for z in (x, y))  # exactly N(0, 1)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    a, b = (x * torch.tensor([1.0, 2, 3])) @ turn, (y * torch.tensor([2.0, 2, 1])) @ turn + 1
    assert abs(repa.frechet(a, b) - (3 + 1 + 0 + 4)) < 1e-8  # commuting: sum of squared differences
    assert abs(repa.frechet(a, a)) < 1e-8
    A, B = a.T.cov(), (b @ torch.diag(torch.tensor([1.0, 2, 1], dtype=torch.float64))).T.cov()
    trace = torch.linalg.eigvals(A @ B).sqrt().real.sum()  # another way: eigenvalues of the product
    c = b @ torch.diag(torch.tensor([1.0, 2, 1], dtype=torch.float64))
    assert abs(repa.frechet(a, c) - ((c.mean(0)**2).sum() + A.trace() + B.trace() - 2 * trace)) < 1e-6


def test_it_overfits_eight_pictures():
    torch.manual_seed(0)
    model = SiT(16, 4, 64, 2, 2, num_classes=8, align_depth=1, teacher_dim=16, projector_dim=32)
    images, z = torch.randn(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), torch.randn(8, 16, 16)
    optimizer, y = torch.optim.AdamW(model.parameters(), 5e-3), torch.arange(8).repeat(8)
    for _ in range(300):
        loss, out = model.loss(images.repeat(8, 1, 1, 1), y, z.repeat(8, 1, 1), label_dropout=0.0)
        optimizer.zero_grad(), loss.backward(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step()
    made = sample(model, torch.randn(8, 3, 16, 16), torch.arange(8), 20)
    assert out["alignment"] > 0.8 and (made - images).square().mean() < 0.2  # of variance 1


def test_teacher_looks_at_the_students_grid(pictures, tmp_path):
    random_teacher(tmp_path)
    dataset, teacher = data.load(str(pictures)), Teacher.from_pretrained(tmp_path / "dino.pth")
    seen = []
    teacher.patch_embed.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    images = dataset.train_images[:3]
    z = teacher.look(dataset, images, 4, autocast("cpu", "fp32"))
    assert z.shape == (3, 16, 64) and (z.float().norm(dim=-1) - 1).abs().max() < 1e-2 and seen[0].shape == (3, 16, 588)
    expected = (images.float().mean((2, 3)) / 255 - repa.IMAGENET[0]) / repa.IMAGENET[1]
    assert (seen[0].reshape(3, -1, 3).mean(1) - expected).abs().max() < 0.05


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--patch-size", 4, "--depth", 2, "--heads", 2, "--align-depth", 1, "--projector-dim", 16,
         "--batch-size", 16, "--teacher-steps", 4, "--samples", 8, "--sample-steps", 3, "--save-seconds", 0, "--device", "cpu"]


def scores_of(done):
    return dict(re.findall(r"^ +(\w+)  (\S+)$", done.stdout, re.M))


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["repa.py", "--data", pictures, "--data-dir", tmp_path, *SMALL]
    done = script(*words, "--out", tmp_path / "a", "--steps", 20, "--warmup", 2, "--align-until", 12)
    assert done.returncode == 0, done.stderr
    scores = scores_of(done)
    assert scores["images_seen"] == "320" and "a small" in done.stdout
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn", "frechet", "frechet_floor",
            "frechet_ceiling"} <= set(scores)
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "repa")
    assert set(checkpoint) == {"script", "model", "ema", "optimizer", "step", "args", "scores"}
    model = SiT.from_pretrained(path)
    assert model.blocks[0].attn.heads == 2 and model.align_depth == 1
    assert all((model.state_dict()[k] == v).all() for k, v in checkpoint["ema"].items())
    log = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert "nan" not in log[2] and "nan" in log[-1]  # aligned at step 10, no longer at step 19

    done = script(*words, "--load", path, "--out", tmp_path / "b", "--compare", path)
    assert done.returncode == 0, done.stderr
    again = scores_of(done)
    assert all(again[key] == scores[key] for key in ("probe", "frechet", "frechet_floor", "frechet_ceiling"))


def test_plain_and_aligned_start_the_same(pictures, tmp_path):
    words = ["--data", pictures, "--data-dir", tmp_path, *SMALL, "--steps", 8, "--precision", "fp32"]
    runs = {"plain": ["--align", 0], "zero": ["--align", 0, "--teacher", "random"], "aligned": ["--teacher", "random"]}
    models = {}
    for name, more in runs.items():
        repa.train(repa.parse_args([str(word) for word in (*words, *more, "--out", tmp_path / name)]))
        models[name] = data.load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
    assert "projectors.0.0.weight" not in models["plain"]
    assert all((models["zero"][k] == v).all() for k, v in models["plain"].items())  # the control with a projector
    assert not (models["aligned"]["blocks.0.attn.qkv.weight"] == models["plain"]["blocks.0.attn.qkv.weight"]).all()
    first = [(tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[3] for name in ("plain", "aligned")]
    assert first[0] == first[1]  # the velocity loss of step 0


@pytest.mark.parametrize("log", [None, b"nonsense\n0\n", b"\xff"])
def test_a_damaged_log_is_refused(pictures, tmp_path, monkeypatch, log):
    monkeypatch.setattr(repa, "probe_by_block", lambda *args: [(1, 0.5)])
    model = SiT(16, 8, 16, 1, 2, num_classes=3, align_depth=1, teacher_dim=0)
    if log is not None:
        (tmp_path / "log.csv").write_bytes(log)
    with pytest.raises(data.UserError, match="log.csv: not the whole log of a run"):
        repa.draw(model, data.load(str(pictures)), tmp_path, repa.parse_args(["--sample-steps", "1"]), autocast("cpu", "fp32"))


def test_a_model_of_other_pictures_is_not_compared(pictures, tmp_path):
    words, own = ["--sample-steps", "1", "--compare", str(tmp_path / "sit.pt")], data.load(str(pictures))
    torch.save(random_file(sigma=True, Z=()), tmp_path / "sit.pt")  # of 8 x 8 latents
    model = SiT(16, 8, 16, 1, 2, num_classes=3, align_depth=1, teacher_dim=0)
    with pytest.raises(data.UserError, match="--compare .*sit.pt: not a model of such pictures"):
        repa.draw(model, own, tmp_path, repa.parse_args(words), autocast("cpu", "fp32"))


def test_killed_and_resumed_is_the_same_run(same_run, pictures, tmp_path):
    same_run("repa.py", "--data", pictures, "--data-dir", tmp_path, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the pictures' side 16"),
    (["--align-depth", 3], "--align-depth 3: there are 2 blocks"),
    (["--teacher", "data.py"], "data.py: not a whole PyTorch file"),
    (["--label-dropout", 2], "'2' is not a number from 0 to 1"),
    (["--load", "README.md"], "README.md: not a whole PyTorch file"),
    (["--samples", 1], "'1' is not a whole number from 2"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(repa, "--data", pictures, "--data-dir", tmp_path, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_latents_are_not_scored(script, pictures, tmp_path):
    torch.save(random_file(), tmp_path / "last.pt")
    done = script("repa.py", "--data", pictures, "--load", tmp_path / "last.pt", "--out", tmp_path)
    assert done.returncode == 2 and "4 channels" in done.stderr and done.stderr.count("\n") == 1


def test_help_explains_every_option(script):
    done = script("repa.py", "--help")
    assert done.returncode == 0 and done.stdout.count("(default:") == len(vars(repa.parse_args([])))
