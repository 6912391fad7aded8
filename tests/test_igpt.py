"""igpt.py: parameter counts, Hugging Face's files, its maths written another way, and the real command."""

import contextlib
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import sincos_2d
from conftest import ROOT

import data
import igpt
from igpt import ImageGPT


@pytest.mark.parametrize("size, count", [("S", 76_571_648), ("M", 455_157_760), ("L", 1_362_250_752)])
def test_parameter_counts(monkeypatch, size, count):
    monkeypatch.setattr(ImageGPT, "init_weights", lambda self: None)
    sizes = igpt.SIZES[size]
    with torch.device("meta"):
        model = ImageGPT(image_size=sizes["image_size"], dim=sizes["dim"], depth=sizes["depth"], heads=sizes["heads"],
                         num_colors=sizes["colors"])
    assert sum(p.numel() for name, p in model.named_parameters() if "classifier" not in name) == count


def test_xl_has_the_papers_count():
    sizes = igpt.SIZES["XL"]  # 60 layers are too many to build here: the sum for one layer times 60
    depth = sizes["depth"]
    D = sizes["dim"]
    N = sizes["image_size"] ** 2
    K = sizes["colors"]
    assert depth * (12 * D * D + 2 * D) + N * D + 2 * K * D + 2 * D == 6_810_875_904


# --------------------------------------------------------------------------------- Hugging Face's files


def hf_file(dim=512, depth=1, K=20, side=4):
    """The state dict of ImageGPTForCausalImageModeling, small and random, old buffers included."""
    torch.manual_seed(0)

    def r(*shape):
        return 0.1 * torch.randn(shape)

    state = {"transformer.wte.weight": r(K + 1, dim), "transformer.wpe.weight": r(side * side, dim)}
    for i in range(depth):
        h = f"transformer.h.{i}."
        state |= {h + "ln_1.weight": 1 + r(dim), h + "attn.c_attn.weight": r(dim, 3 * dim),
                  h + "attn.c_attn.bias": torch.zeros(3 * dim), h + "attn.c_proj.weight": r(dim, dim),
                  h + "attn.c_proj.bias": torch.zeros(dim), h + "ln_2.weight": 1 + r(dim),
                  h + "mlp.c_fc.weight": r(dim, 4 * dim), h + "mlp.c_fc.bias": torch.zeros(4 * dim),
                  h + "mlp.c_proj.weight": r(4 * dim, dim), h + "mlp.c_proj.bias": torch.zeros(dim),
                  h + "attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(), h + "attn.masked_bias": r()}
    return state | {"transformer.ln_f.weight": 1 + r(dim), "lm_head.weight": r(K, dim)}


def reference(state, tokens, heads=8):
    """OpenAI's model, position by position, from the file's tensors: logits (B, N, K) in float64."""
    s = {k.removeprefix("transformer."): v.double() for k, v in state.items()}

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    x = torch.cat([s["wte.weight"][-1].expand(len(tokens), 1, -1), s["wte.weight"][tokens[:, :-1]]], 1)
    x = x + s["wpe.weight"]
    D = x.shape[2]
    d = D // heads
    for i in range(sum("ln_1" in k for k in s)):
        h = f"h.{i}."
        out = []
        q, k, v = (norm(x, s[h + "ln_1.weight"]) @ s[h + "attn.c_attn.weight"]).chunk(3, -1)
        for n in range(x.shape[1]):
            y = []
            for a in range(heads):
                head = slice(a * d, (a + 1) * d)
                weights = torch.softmax((k[:, :n + 1, head] @ q[:, n, head, None])[..., 0] * d**-0.5, 1)
                y.append((weights[:, None] @ v[:, :n + 1, head])[:, 0])
            out.append(torch.cat(y, 1))
        x = x + torch.stack(out, 1) @ s[h + "attn.c_proj.weight"]
        y = norm(x, s[h + "ln_2.weight"]) @ s[h + "mlp.c_fc.weight"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ s[h + "mlp.c_proj.weight"]
    return norm(x, s["ln_f.weight"]) @ s["lm_head.weight"].T


TOKENS = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dim, heads", [(512, None), (48, 3)])
@pytest.mark.parametrize("prefix", [True, False])
def test_hugging_face_file(tmp_path, prefix, dim, heads):
    state = hf_file(dim=dim)
    kept = state if prefix else {k.removeprefix("transformer."): v for k, v in state.items()}
    torch.save(kept, tmp_path / "igpt.bin")
    expected = reference(state, TOKENS, heads or 8)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model = ImageGPT.from_pretrained(tmp_path / "igpt.bin", heads=heads)
        assert model.objective == "ar"
        logits = model.to(dtype)(TOKENS)
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_a_released_file_needs_its_palette(tmp_path, refused, pictures):
    torch.save(hf_file(), tmp_path / "igpt.bin")
    for option in ("--load", "--finetune"):
        line = refused(igpt, option, tmp_path / "igpt.bin", "--data", pictures, "--out", tmp_path / "out")
        assert "igpt.bin: holds no colors" in line and "--palette" in line
    np.save(tmp_path / "palette.npy", np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32))
    args = igpt.parse_args(["--load", str(tmp_path / "igpt.bin"), "--palette", str(tmp_path / "palette.npy")])
    assert igpt.read(args).image_size == 4


def test_the_heads_of_an_unknown_width_are_not_guessed(tmp_path):
    torch.save(hf_file(dim=48), tmp_path / "x.bin")
    with pytest.raises(data.UserError, match="x.bin: does not tell its number of attention heads.*48.*heads=") as error:
        ImageGPT.from_pretrained(tmp_path / "x.bin")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [
    lambda s: s.update({"transformer.h.0.attn.c_proj.bias": torch.ones(512)}), lambda s: s.pop("lm_head.weight"),
    lambda s: s.update({"transformer.wte.weight": torch.ones(20, 512)}), lambda s: s.pop("transformer.ln_f.weight"),
    lambda s: s.update(extra=torch.ones(1)), lambda s: s.clear(), lambda s: s.update(x=3),
    lambda s: s.update({"transformer.wpe.weight": torch.ones(15, 512)})])
def test_other_files_are_refused(tmp_path, spoil):
    state = hf_file()
    spoil(state)
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(data.UserError, match="x.bin: does not hold an Image GPT") as error:
        ImageGPT.from_pretrained(tmp_path / "x.bin")
    assert "\n" not in str(error.value)


def test_palette_files(tmp_path):
    np.save(tmp_path / "good.npy", np.linspace(-1, 1, 60).reshape(20, 3))
    assert data.read_palette(tmp_path / "good.npy", 20).shape == (20, 3)
    np.save(tmp_path / "bytes.npy", 127 * np.ones((20, 3)))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-9])
    for name in ("bytes.npy", "pickled.npy", "cut.npy", "missing.npy"):
        with pytest.raises(data.UserError, match=f"{name}: not a palette of 20 colors"):
            data.read_palette(tmp_path / name, 20)
    with pytest.raises(data.UserError, match="not a palette of 64"):
        data.read_palette(tmp_path / "good.npy", 64)


# -------------------------------------------------------------------------------------------- properties


def small(**more):
    torch.manual_seed(0)
    model = ImageGPT(image_size=4, dim=32, depth=3, heads=2, num_colors=20, **more).double()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    model.palette = torch.rand(20, 3).double() * 2 - 1
    return model


def test_init_is_openais_but_for_the_tables():
    torch.manual_seed(0)
    model = ImageGPT(image_size=8, dim=256, depth=2, heads=4, num_colors=64)
    stds = {"token_embed.weight": 0.5, "start": 0.5, "head.weight": 0, "classifier.weight": 0}
    for i in range(2):
        stds |= {f"blocks.{i}.attn.qkv.weight": 256**-0.5, f"blocks.{i}.attn.proj.weight": 512**-0.5,
                 f"blocks.{i}.mlp.fc1.weight": 0.02, f"blocks.{i}.mlp.fc2.weight": 0.02}
    for name, p in model.named_parameters():
        if name == "pos_embed":
            assert torch.equal(p, sincos_2d(256, 8)) and p.requires_grad
        elif "norm" in name:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(stds[name], rel=0.2 if name == "start" else 0.05)
            assert abs(p.mean()) <= 0.25 * stds[name]


@pytest.mark.parametrize("objective", ["autoregressive", "", None])
def test_an_unknown_objective_is_refused(objective):
    with pytest.raises(ValueError, match=f'objective {objective!r}: it must be "ar" .*or "bert"'):
        ImageGPT(objective=objective)


def test_the_first_loss_is_log_k():
    model = ImageGPT(image_size=4, dim=32, depth=2, heads=2, num_colors=20)
    assert model.loss(TOKENS)[0].item() == pytest.approx(math.log(20), abs=1e-6)
    assert (model(TOKENS) == 0).all()
    both, _ = model.loss(TOKENS, torch.tensor([3, 7]))
    assert both.item() == pytest.approx(math.log(20) + math.log(10), abs=1e-6)


def test_logits_are_blind_to_their_pixel_and_all_that_follow():
    model = small()
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    difference = (model(TOKENS) - model(changed)).abs().amax((0, 2))
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()


def test_bert_sees_everything_but_the_masked_pixels():
    model = small(objective="bert")
    keep = torch.ones(2, 16).double()
    keep[:, [3, 9]] = 0
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 20
    assert torch.equal(model(TOKENS, keep), model(changed, keep))
    changed = TOKENS.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 20
    assert ((model(TOKENS, keep) - model(changed, keep)).abs().amax((0, 2)) > 0).all()
    logp = model(TOKENS, keep).log_softmax(-1).gather(2, TOKENS[:, :, None])[:, :, 0]
    assert model.loss(TOKENS, keep=keep)[0].item() == pytest.approx(-logp[:, [3, 9]].mean().item())


def test_bert_takes_the_mean_in_each_image_first():
    model = small(objective="bert")
    keep = torch.ones(3, 16).double()
    keep[0, [3]] = 0
    keep[1, [2, 5, 9, 11]] = 0  # four masked pixels, and none in the third image
    tokens = TOKENS[[0, 1, 0]]
    logp = model(tokens, keep).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    expected = -(logp[0, 3] + logp[1, [2, 5, 9, 11]].mean()) / 3
    assert model.loss(tokens, keep=keep)[0].item() == pytest.approx(expected.item())


def test_random_keep_masks_each_pixel_by_itself():
    torch.manual_seed(0)
    tokens = torch.zeros(400, 256, dtype=torch.int64)
    keep = igpt.random_keep(tokens)
    assert keep.shape == tokens.shape and set(keep.unique().tolist()) == {0.0, 1.0}
    masked = 1 - keep
    assert abs(masked.mean() - 0.15) < 0.005
    # If pixels are independent, the number of masked ones is binomial, in the rows and in the columns.
    assert abs(masked.sum(1).var() / (256 * 0.15 * 0.85) - 1) < 0.4
    assert abs(masked.sum(0).var() / (400 * 0.15 * 0.85) - 1) < 0.4
    assert abs((1 - igpt.random_keep(tokens, share=0.6)).mean() - 0.6) < 0.005


def test_nats_per_pixel_is_the_mean_over_all_images():
    model = small()
    tokens = torch.randint(20, (230, 16), generator=torch.Generator().manual_seed(1))  # in parts of 100, 100 and 30
    logp = model(tokens).log_softmax(-1).gather(2, tokens[:, :, None])
    assert igpt.nats_per_pixel(model, tokens, contextlib.nullcontext()) == pytest.approx(-logp.mean().item())


def test_nats_per_pixel_of_bert_are_those_of_masked_pixels(monkeypatch):
    model = small(objective="bert")
    seen = []
    loss = model.loss
    monkeypatch.setattr(model, "loss", lambda tokens, keep=None: seen.append(keep) or loss(tokens, keep=keep))
    torch.manual_seed(0)
    igpt.nats_per_pixel(model, torch.zeros(50, 16, dtype=torch.int64), contextlib.nullcontext())
    keep, = seen
    assert keep.shape == (50, 16) and 0.8 < keep.mean() < 0.9


def test_the_joint_loss_adds_up():
    model = small()
    labels = torch.tensor([3, 7])
    logp = model(TOKENS).log_softmax(-1).gather(2, TOKENS[:, :, None]).mean()
    classes = model.features(TOKENS, 3) @ model.classifier.weight.T
    both, _ = model.loss(TOKENS, labels)
    assert both.item() == pytest.approx(-logp.item() + F.cross_entropy(classes, labels).item(), rel=1e-6)
    assert model.loss(TOKENS)[0].item() == pytest.approx(-logp.item(), rel=1e-6)


def test_features_are_what_the_next_block_reads():
    model = small()
    x = torch.cat([model.start.expand(2, 1, -1), model.token_embed(TOKENS)[:, :-1]], 1) + model.pos_embed
    expected = []
    for block in model.blocks:
        expected.append(block.norm1(x))
        x = block(x)
    expected.append(model.norm(x))
    together = igpt.features_by_layer(model, TOKENS)
    assert together.shape == (2, 4, 32)
    for layer in range(4):
        assert torch.allclose(model.features(TOKENS, layer), expected[layer].mean(1))
        assert torch.allclose(together[:, layer], expected[layer].mean(1))
    assert torch.allclose(model(TOKENS), model.head(expected[3]))


def test_a_training_step_computes_each_norm_once():
    model = small()
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model.loss(TOKENS)
    assert len(calls) == len(set(calls)) == 7


def test_the_probe_by_layer_sees_training_images_only(monkeypatch):
    model = small().float()
    torch.manual_seed(0)
    images = torch.randint(256, (50, 3, 4, 4)).byte()
    labels = torch.arange(50) % 5
    dataset = data.Data("own", list("abcde"), images, labels, [], images[:5], labels[:5], [])
    calls = []
    monkeypatch.setattr(data, "linear_probe", lambda *sets: calls.append(sets) or len(calls) / 10)
    assert igpt.probe_by_layer(model, dataset, contextlib.nullcontext()) == [0.1, 0.2, 0.3, 0.4]
    tokens = model.encode(images.float() / 255)
    for layer, (train_x, train_y, held_x, held_y) in enumerate(calls):
        expected = model.features(tokens, layer)
        assert torch.allclose(train_x, expected[:40], atol=1e-5) and torch.allclose(held_x, expected[40:], atol=1e-5)
        assert (train_y == labels[:40]).all() and (held_y == labels[40:]).all()


def next_logits(model, tokens):
    """Logits of the token after tokens (B, n), by a whole pass over an image that is filled up with zeros."""
    rest = torch.zeros(len(tokens), 16 - tokens.shape[1], dtype=torch.int64)
    return model(torch.cat([tokens, rest], 1))[:, tokens.shape[1]]


@pytest.mark.parametrize("top_k, temperature", [(None, 1.0), (5, 0.7)])
@pytest.mark.parametrize("n", [0, 1, 8, 15, 16])
def test_cached_sampling_gives_the_same_tokens(n, top_k, temperature):
    model = small()
    given = TOKENS[:, :n]
    cached = model.sample(given, temperature, top_k, generator=torch.Generator().manual_seed(5))
    assert cached.shape == (2, 16) and (cached[:, :n] == given).all()

    g = torch.Generator().manual_seed(5)
    tokens = given
    while tokens.shape[1] < 16:
        logits = next_logits(model, tokens).float() / temperature
        if top_k:
            least = logits.sort(descending=True).values[:, top_k - 1, None]
            logits[logits < least] = -math.inf
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=g)], 1)
    assert (cached == tokens).all()
    if n < 8:
        other = model.sample(given, temperature, top_k, generator=torch.Generator().manual_seed(6))
        assert (cached != other).any()


@pytest.mark.parametrize("n", [0, 1, 8])
def test_cached_logits_are_those_of_forward(n, monkeypatch):
    model = small()
    seen = []
    draw_token = ImageGPT.draw_token

    def watch(logits, *more):
        seen.append(logits)
        return draw_token(logits, *more)

    monkeypatch.setattr(ImageGPT, "draw_token", staticmethod(watch))
    tokens = model.sample(TOKENS[:, :n])
    assert torch.allclose(torch.stack(seen, 1), model(tokens)[:, n:], rtol=1e-9, atol=1e-9)


def test_sampling_follows_the_logits():
    model = small()
    greedy = model.sample(TOKENS[:, :4], top_k=1)
    logits = model(greedy)
    assert (greedy[:, 4:] == logits.argmax(-1)[:, 4:]).all()
    assert (model.sample(TOKENS[:, :4], temperature=1e-6) == greedy).all()
    torch.manual_seed(0)
    many = model.sample(TOKENS[:1, :15].expand(4000, -1))[:, 15]
    share = torch.bincount(many, minlength=20) / 4000
    assert (share - model(TOKENS[:1])[0, 15].softmax(-1)).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300])
def test_temperature_zero_takes_the_most_probable_token(temperature):
    model = small()
    tokens = model.sample(TOKENS[:, :4], temperature=temperature)
    assert (tokens[:, 4:] == model(tokens).argmax(-1)[:, 4:]).all()
    assert (model.sample(TOKENS[:, :4], temperature=temperature, top_k=3) == tokens).all()


def test_a_bert_model_cannot_be_sampled():
    with pytest.raises(ValueError, match='a "bert" model sees later pixels'):
        small(objective="bert").sample(torch.zeros(1, 3, dtype=torch.int64))


def test_samples_can_be_trained_on():
    model = small()
    model.loss(model.sample(TOKENS[:, :4]))[0].backward()
    assert model.token_embed.weight.grad.any()


def test_palette_encodes_and_decodes():
    model = small()
    images = torch.rand(3, 3, 4, 4).double()
    tokens = model.encode(images)
    pixels = images.permute(0, 2, 3, 1).reshape(3, 16, 1, 3) * 2 - 1
    assert (tokens == (pixels - model.palette).square().sum(-1).argmin(-1)).all()
    assert (model.encode(model.decode(tokens)) == tokens).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.float().encode(images.float()) == tokens).all()
    model = small()
    assert torch.allclose(model.decode(tokens)[1, :, 2, 3], (model.palette[tokens[1, 11]] + 1) / 2)


def test_k_means_finds_the_colors():
    torch.manual_seed(0)
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 250, 250], [9, 9, 9]])
    images = colors[torch.randint(5, (50, 64))].transpose(1, 2).reshape(50, 3, 8, 8).byte()
    palette = igpt.fit_palette(images, 5, pixels=2000)
    found = ((palette + 1) * 127.5).round().int().tolist()
    assert sorted(found) == sorted(colors.tolist())


def overfitted(seed):
    torch.manual_seed(seed)
    model = ImageGPT(image_size=4, dim=64, depth=2, heads=2, num_colors=20)
    tokens = torch.randint(20, (8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss, _ = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_overfits_eight_images():
    assert overfitted(0) < math.log(8) / 16 + 0.1  # which of the eight it is, the first pixel or two must tell


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--colors", 12, "--image-size", 8, "--batch-size", 16,
         "--save-seconds", 0, "--device", "cpu"]


def printed(done):
    """The scores that a finished process has printed."""
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^ +(\w+)  (.+)$", done.stdout, re.M))


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["igpt.py", "--data", pictures, *SMALL]
    done = script(*words, "--out", tmp_path / "a", "--steps", 30, "--warmup", 5)
    scores = printed(done)
    assert scores["images_seen"] == "480" and "64 tokens an image, 12 colors" in done.stdout
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn", "nats_per_pixel", "palette_entropy",
            "probe_by_layer"} <= set(scores)
    curve = [float(word) for word in scores["probe_by_layer"].split()]
    assert len(curve) == 3 and f"best on layer {curve.index(max(curve))}" in done.stdout
    assert float(scores["nats_per_pixel"]) < float(scores["palette_entropy"])
    files = re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split()
    assert len(files) == 5
    for file in files:
        assert (ROOT / file).stat().st_size > 100
    path = tmp_path / "a" / "checkpoint.pt"
    assert ImageGPT.from_pretrained(path).palette.any() and "accuracy" not in scores
    again = printed(script("igpt.py", "--load", path, "--out", tmp_path / "b", "--given-rows", 2, "--top-k", 3,
                           "--temperature", 0))
    assert again["nats_per_pixel"] == scores["nats_per_pixel"]
    done = script(*words, "--out", tmp_path / "d", "--objective", "bert", "--steps", 5)
    assert "nats_per_pixel" in printed(done) and "completions" not in done.stdout


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A short run's checkpoint, with other sizes than the options below."""
    out = tmp_path_factory.mktemp("trained")
    words = ["--data", pictures, *SMALL, "--dim", 24, "--heads", 3, "--steps", 20, "--warmup", 5, "--out", out]
    igpt.train(igpt.parse_args([str(word) for word in words]))
    return out / "checkpoint.pt"


def finetune(file, pictures, out, *words):
    words = ["--data", pictures, *SMALL, "--finetune", file, "--save-seconds", 0, "--out", out, *words]
    return igpt.train(igpt.parse_args([str(word) for word in words]))


def test_fine_tuning_starts_from_the_file_with_a_new_classifier(trained, pictures, tmp_path, capsys, monkeypatch):
    old = ImageGPT.from_pretrained(trained)
    scores = finetune(trained, pictures, tmp_path / "a", "--steps", 1, "--lr", 0)  # nothing moves
    new = ImageGPT.from_pretrained(tmp_path / "a" / "checkpoint.pt")
    assert new.classifier.weight.shape == (3, 24) and new.blocks[0].attn.heads == 3
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name])
    old_nats = data.load_checkpoint(trained)["scores"]["nats_per_pixel"]
    assert scores["nats_per_pixel"] == pytest.approx(old_nats) and "accuracy" not in scores
    scores = finetune(trained, pictures, tmp_path / "b", "--steps", 60, "--warmup", 5, "--lr", 1e-2)
    assert scores["accuracy"] > 0.9  # the classes differ in brightness, and therefore in their colors
    capsys.readouterr()
    path = tmp_path / "b" / "checkpoint.pt"
    again = igpt.train(igpt.parse_args(["--load", str(path), "--out", str(tmp_path / "c"), "--device", "cpu"]))
    assert again["accuracy"] == scores["accuracy"]
    monkeypatch.setattr(data, "has_classes", lambda file, dataset: file != str(path))
    again = igpt.train(igpt.parse_args(["--load", str(path), "--out", str(tmp_path / "d"), "--device", "cpu"]))
    assert "accuracy" not in again  # its classifier was trained for other classes


def test_fine_tuning_resumes_without_the_file(trained, pictures, tmp_path, monkeypatch):
    whole = finetune(trained, pictures, tmp_path / "whole", "--steps", 6, "--precision", "fp32")

    copy = tmp_path / "copy.pt"
    palette = tmp_path / "palette.npy"
    copy.write_bytes(trained.read_bytes())
    np.save(palette, ImageGPT.from_pretrained(trained).palette.numpy())  # the same colors once more
    real = data.Progress.due
    monkeypatch.setattr(data.Progress, "due", lambda self, step: setattr(self, "stop", step == 2) or real(self, step))
    with pytest.raises(KeyboardInterrupt):
        finetune(copy, pictures, tmp_path / "cut", "--steps", 6, "--precision", "fp32", "--palette", palette)
    monkeypatch.undo()
    copy.unlink()
    palette.unlink()
    scores = igpt.train(igpt.parse_args(["--out", str(tmp_path / "cut"), "--resume"]))
    for key in whole:
        assert key == "seconds" or scores[key] == whole[key]


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("igpt.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 2], "--patch-size must be 1"), (["--given-rows", 9], "--given-rows must be at most 8"),
    (["--colors", 1], "argument --colors: '1' is not a whole number from 2"),
    (["--objective", "gan"], "invalid choice: 'gan'"), (["--palette", "data.py"], "data.py: not a palette of 12"),
    (["--temperature", -1], "argument --temperature: '-1' is not a number from 0"),
    (["--load", "a.pt", "--finetune", "b.pt"], "--load does not train, so --finetune has no use"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"), (["--finetune", "none.pt"], "none.pt")])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(igpt, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)
