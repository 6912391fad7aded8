"""igpt.py: parameter counts, Hugging Face's files, its maths written another way, and the real command."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import igpt
from igpt import ImageGPT


@pytest.mark.parametrize("size, count", [("S", 76_571_648), ("M", 455_157_760), ("L", 1_362_250_752)])
def test_parameter_counts(monkeypatch, size, count):
    monkeypatch.setattr(ImageGPT, "init_weights", lambda self: None)
    o = igpt.SIZES[size]
    with torch.device("meta"):
        model = ImageGPT(o["image_size"], o["dim"], o["depth"], o["heads"], num_colours=o["colours"])
    assert sum(p.numel() for name, p in model.named_parameters() if "classifier" not in name) == count


def test_xl_has_the_papers_count():
    o = igpt.SIZES["XL"]  # 60 layers are too many to build here: the sum for one layer times 60
    L, D, N, K = o["depth"], o["dim"], o["image_size"] ** 2, o["colours"]
    assert L * (12 * D * D + 2 * D) + N * D + 2 * K * D + 2 * D == 6_810_875_904


# --------------------------------------------------------------------------------- Hugging Face's files


def hf_file(dim=512, depth=1, K=20, side=4):
    """The state dict of ImageGPTForCausalImageModeling, small and random, old buffers included."""
    torch.manual_seed(0)
    r = lambda *shape: 0.1 * torch.randn(shape)
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
    norm = lambda x, g: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * g
    x = torch.cat([s["wte.weight"][-1].expand(len(tokens), 1, -1), s["wte.weight"][tokens[:, :-1]]], 1)
    x = x + s["wpe.weight"]
    for i in range(sum("ln_1" in k for k in s)):
        h, keys, out = f"h.{i}.", [], []
        q, k, v = (norm(x, s[h + "ln_1.weight"]) @ s[h + "attn.c_attn.weight"]).chunk(3, -1)
        for n in range(x.shape[1]):
            y = []
            for a in range(heads):
                d = slice(a * x.shape[2] // heads, (a + 1) * x.shape[2] // heads)
                w = torch.softmax((k[:, :n + 1, d] @ q[:, n, d, None])[..., 0] * (x.shape[2] // heads) ** -0.5, 1)
                y.append((w[:, None] @ v[:, :n + 1, d])[:, 0])
            out.append(torch.cat(y, 1))
        x = x + torch.stack(out, 1) @ s[h + "attn.c_proj.weight"]
        y = norm(x, s[h + "ln_2.weight"]) @ s[h + "mlp.c_fc.weight"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ s[h + "mlp.c_proj.weight"]
    return norm(x, s["ln_f.weight"]) @ s["lm_head.weight"].T


TOKENS = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefix", [True, False])
def test_hugging_face_file(tmp_path, prefix):
    state = hf_file()
    kept = state if prefix else {k.removeprefix("transformer."): v for k, v in state.items()}
    torch.save(kept, tmp_path / "igpt.bin")
    expected = reference(state, TOKENS)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        logits = ImageGPT.from_pretrained(tmp_path / "igpt.bin").to(dtype)(TOKENS)
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()


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
    assert igpt.read_palette(tmp_path / "good.npy", 20).shape == (20, 3)
    np.save(tmp_path / "bytes.npy", 127 * np.ones((20, 3)))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-9])
    for name in ("bytes.npy", "pickled.npy", "cut.npy", "missing.npy"):
        with pytest.raises(data.UserError, match=f"{name}: not a palette of 20 colours"):
            igpt.read_palette(tmp_path / name, 20)
    with pytest.raises(data.UserError, match="not a palette of 64"):
        igpt.read_palette(tmp_path / "good.npy", 64)


# -------------------------------------------------------------------------------------------- properties


def small(**more):
    torch.manual_seed(0)
    model = ImageGPT(4, 32, 3, 2, num_colours=20, **more).double()
    for p in (model.head.weight, model.classifier.weight):
        torch.nn.init.normal_(p, std=0.3)
    model.palette = torch.rand(20, 3).double() * 2 - 1
    return model


def test_the_first_loss_is_log_k():
    loss, classes = ImageGPT(4, 32, 2, 2, num_colours=20).loss(TOKENS)
    assert loss.item() == pytest.approx(math.log(20), abs=1e-6) and (classes == 0).all()


def test_logits_are_blind_to_their_pixel_and_all_that_follow():
    model, changed = small(), TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    difference = (model(TOKENS) - model(changed)).abs().amax((0, 2))
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()


def test_bert_sees_everything_but_the_hidden_pixels():
    model, keep = small(objective="bert"), torch.ones(2, 16).double()
    keep[:, [3, 9]] = 0
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 20
    assert torch.equal(model(TOKENS, keep), model(changed, keep))
    changed = TOKENS.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 20
    assert ((model(TOKENS, keep) - model(changed, keep)).abs().amax((0, 2)) > 0).all()
    logp = model(TOKENS, keep).log_softmax(-1).gather(2, TOKENS[:, :, None])[:, :, 0]
    assert model.loss(TOKENS, keep=keep)[0].item() == pytest.approx(-logp[:, [3, 9]].mean().item())


def test_the_joint_loss_adds_up():
    model, labels = small(), torch.tensor([3, 7])
    logp = model(TOKENS).log_softmax(-1).gather(2, TOKENS[:, :, None]).mean()
    classes = model.layers(TOKENS)[-1].mean(1) @ model.classifier.weight.T
    both, out = model.loss(TOKENS, labels)
    assert torch.allclose(out, classes)
    assert both.item() == pytest.approx(-logp.item() + F.cross_entropy(classes, labels).item(), rel=1e-6)


def test_layers_are_what_the_next_block_reads():
    model = small()
    x = torch.cat([model.start.expand(2, 1, -1), model.token_embed(TOKENS)[:, :-1]], 1) + model.pos_embed
    expected = []
    for block in model.blocks:
        expected.append(block.norm1(x))
        x = block(x)
    expected.append(model.norm(x))
    layers = model.layers(TOKENS)
    assert len(layers) == 4 and all(torch.allclose(a, b) for a, b in zip(layers, expected))
    assert torch.allclose(model.features(TOKENS, 2), expected[2].mean(1))


@pytest.mark.parametrize("n", [0, 1, 8])
def test_cached_sampling_gives_the_same_tokens(n):
    model, g = small(), lambda: torch.Generator().manual_seed(5)
    cached = model.sample(TOKENS[:, :n], generator=g())
    assert cached.shape == (2, 16) and (cached[:, :n] == TOKENS[:, :n]).all()
    assert (cached == model.sample(TOKENS[:, :n], generator=g(), cached=False)).all()
    assert (cached != model.sample(TOKENS[:, :n], generator=torch.Generator().manual_seed(6))).any()


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


def test_palette_encodes_and_decodes():
    model = small()
    pictures = torch.rand(3, 3, 4, 4).double()
    tokens = model.encode(pictures)
    pixels = pictures.permute(0, 2, 3, 1).reshape(3, 16, 1, 3) * 2 - 1
    assert (tokens == (pixels - model.palette).square().sum(-1).argmin(-1)).all()
    assert (model.encode(model.decode(tokens)) == tokens).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.float().encode(pictures.float()) == tokens).all()
    model = small()
    assert torch.allclose(model.decode(tokens)[1, :, 2, 3], (model.palette[tokens[1, 11]] + 1) / 2)


def test_k_means_finds_the_colours():
    torch.manual_seed(0)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 250, 250], [9, 9, 9]])
    pictures = colours[torch.randint(5, (50, 64))].transpose(1, 2).reshape(50, 3, 8, 8).byte()
    palette = igpt.fit_palette(pictures, 5, pixels=2000)
    found = ((palette + 1) * 127.5).round().int().tolist()
    assert sorted(found) == sorted(colours.tolist())


def test_it_overfits_eight_pictures():
    torch.manual_seed(0)
    model, tokens = ImageGPT(4, 64, 2, 2, num_colours=20), torch.randint(20, (8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss, _ = model.loss(tokens)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < math.log(8) / 16 + 0.1  # which of the eight it is, the first pixel or two must tell


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--colours", 12, "--image-size", 8, "--batch-size", 16,
         "--save-seconds", 0, "--device", "cpu"]


def test_the_command_learns_draws_and_scores(script, pictures, tmp_path):
    words = ["igpt.py", "--data", pictures, *SMALL]
    done = script(*words, "--out", tmp_path / "a", "--steps", 30, "--warmup", 5)
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ +(\w+)  (.+)$", done.stdout, re.M))
    assert scores["images_seen"] == "480" and "64 tokens a picture, 12 colours" in done.stdout
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn", "nats_per_pixel", "palette_entropy",
            "probe_by_layer"} <= set(scores)
    assert len(scores["probe_by_layer"].split()) == 3
    assert float(scores["nats_per_pixel"]) < float(scores["palette_entropy"])
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    path = tmp_path / "a" / "checkpoint.pt"
    assert ImageGPT.from_pretrained(path).palette.any()
    done = script("igpt.py", "--load", path, "--out", tmp_path / "b", "--given-rows", 2, "--top-k", 3)
    again = dict(re.findall(r"^ +(\w+)  (.+)$", done.stdout, re.M))
    assert done.returncode == 0 and again["nats_per_pixel"] == scores["nats_per_pixel"]
    done = script(*words, "--out", tmp_path / "c", "--finetune", path, "--steps", 5)
    assert done.returncode == 0 and "accuracy  " in done.stdout, done.stderr
    done = script(*words, "--out", tmp_path / "d", "--objective", "bert", "--steps", 5)
    assert done.returncode == 0 and "completions" not in done.stdout, done.stderr


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("igpt.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 2], "--patch-size must be 1"), (["--given-rows", 9], "--given-rows at most 8"),
    (["--colours", 1], "argument --colours: '1' is not a whole number from 2"),
    (["--objective", "gan"], "invalid choice: 'gan'"), (["--palette", "data.py"], "data.py: not a palette of 12"),
    (["--temperature", 0], "argument --temperature: '0' is not a number from 0.01"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"), (["--finetune", "none.pt"], "none.pt")])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(igpt, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_help_explains_every_option(script):
    done = script("igpt.py", "--help")
    assert done.returncode == 0 and done.stdout.count("(default:") == len(vars(igpt.parse_args([])))
