"""clip.py: parameter counts, OpenAI's files and tokenizer, its maths written another way, and the real command."""

import gzip
import math
import re
import string

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, loss_falls
from torch import nn

import clip
import data
from clip import CLIP, Tokenizer
from common import sincos_2d


@pytest.mark.parametrize("size, total, visual", [  # as the authors' code builds them
    ("B/32", 151_277_313, 87_849_216), ("B/16", 149_620_737, 86_192_640), ("L/14", 427_616_513, 303_966_208),
    ("L/14@336", 427_944_193, 304_293_888), ("RN50", 102_007_137, 38_316_896), ("RN101", 119_688_033, 56_259_936),
    ("RN50x4", 178_300_601, 87_137_080), ("RN50x16", 290_979_217, 167_328_912), ("RN50x64", 623_258_305, 420_380_352)])
def test_parameter_counts(monkeypatch, size, total, visual):
    monkeypatch.setattr(CLIP, "init_weights", lambda self: None)
    sizes = clip.SIZES[size]
    with torch.device("meta"):
        model = CLIP(**sizes, vocab_size=49408)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for part in (model.image_encoder, model.W_i) for p in part.parameters()) == visual
    if sizes["image_encoder"] == "vit":
        assert model.image_encoder.blocks[0].attn.heads == sizes["dim"] // 64
    assert model.text_encoder.blocks[0].attn.heads == sizes["text_dim"] // 64 and len(model.text_encoder.blocks) == 12


def test_each_size_has_the_text_encoder_of_its_paper():
    for size in clip.SIZES:
        expected = "cbow" if size == "tiny" else "transformer"  # the paper's are all Transformers
        assert clip.parse_args(["--size", size]).text_encoder == expected
    assert clip.parse_args(["--size", "B/32", "--text-encoder", "cbow"]).text_encoder == "cbow"
    assert clip.parse_args(["--text-encoder", "transformer"]).text_encoder == "transformer"
    assert clip.parse_args(["--objective", "caption"]).text_encoder == "transformer"


def test_initial_weights():
    """Each matrix by its own std; what is not named here keeps PyTorch's own initialization."""
    d_i = 256
    d_t = 192
    depth = 2
    expected = {"W_i.weight": d_i**-0.5, "W_t.weight": d_t**-0.5, "image_encoder.cls_token": d_i**-0.5,
                "image_encoder.patch_embed.proj.weight": 48**-0.5, "text_encoder.pos_embed": 0.1,
                "text_encoder.token_embed.weight": 0.5}
    for i in range(depth):
        image = f"image_encoder.blocks.{i}."
        text = f"text_encoder.blocks.{i}."
        expected |= {image + "attn.qkv.weight": d_i**-0.5, image + "attn.proj.weight": d_i**-0.5,
                     image + "mlp.fc1.weight": (2.5 * d_i) ** -0.5, image + "mlp.fc2.weight": (2.5 * d_i) ** -0.5,
                     text + "attn.qkv.weight": d_t**-0.5, text + "attn.proj.weight": (2 * d_t * depth) ** -0.5,
                     text + "mlp.fc1.weight": (2 * d_t) ** -0.5, text + "mlp.fc2.weight": (2 * d_t * depth) ** -0.5}
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expected |= {f"{image}{part}.bias": 0, f"{text}{part}.bias": 0}
    torch.manual_seed(0)
    model = CLIP(dim=d_i, depth=depth, text_dim=d_t, text_depth=depth)
    for p in model.parameters():
        p.data.fill_(7)
    model.init_weights()  # sets every weight anew
    for name, p in model.named_parameters():
        if name in expected:
            rel = 0.03 if p.numel() > 10_000 else 0.2  # PyTorch's own start differs from some of them by only 9 %
            assert p.std().item() == pytest.approx(expected.pop(name), rel=rel), name
        elif "norm" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        else:
            assert name in ("t", "image_encoder.pos_embed"), name
    assert not expected
    assert (model.image_encoder.pos_embed[1:] == sincos_2d(d_i, 8)).all()
    assert model.image_encoder.pos_embed[0].std().item() == pytest.approx(d_i**-0.5, rel=0.2)

    model = CLIP(image_encoder="resnet", text_encoder="cbow")
    for stage in model.image_encoder.stages:
        for block in stage:
            assert (block.body[8].weight == 0).all() and (block.body[1].weight == 1).all()
    for weight in (model.image_encoder.pos_embed, model.image_encoder.pool.qkv.weight, model.W_i.weight):
        assert weight.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert model.text_encoder.token_embed.weight.std().item() == pytest.approx(0.5, rel=0.05)


# ------------------------------------------------------------------------------------------ OpenAI's files


def random_file(kind, V=40, E=24, D=64, D_t=64, layers=2, n=4, P=4, w=8):
    """The state dict of OpenAI's CLIP, small and random, in its names: ViT of 16 pixels, ResNet of 64."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return 0.3 * torch.randn(shape, generator=g)

    def norm(name, D):
        return {f"{name}.weight": 1 + r(D), f"{name}.bias": r(D)}

    def block(name, D):
        return {f"{name}.attn.in_proj_weight": r(3 * D, D), f"{name}.attn.in_proj_bias": r(3 * D),
                f"{name}.attn.out_proj.weight": r(D, D), f"{name}.attn.out_proj.bias": r(D),
                f"{name}.mlp.c_fc.weight": r(4 * D, D), f"{name}.mlp.c_fc.bias": r(4 * D),
                f"{name}.mlp.c_proj.weight": r(D, 4 * D), f"{name}.mlp.c_proj.bias": r(D),
                **norm(f"{name}.ln_1", D), **norm(f"{name}.ln_2", D)}

    s = {"positional_embedding": r(77, D_t), "text_projection": r(D_t, E), "logit_scale": torch.tensor(1.5),
         "token_embedding.weight": r(V, D_t), **norm("ln_final", D_t)}
    for i in range(layers):
        s |= block(f"transformer.resblocks.{i}", D_t)
    if kind == "vit":
        s |= {"visual.class_embedding": r(D), "visual.positional_embedding": r(1 + n * n, D), "visual.proj": r(D, E),
              "visual.conv1.weight": r(D, 3, P, P), **norm("visual.ln_pre", D), **norm("visual.ln_post", D)}
        for i in range(layers):
            s |= block(f"visual.transformer.resblocks.{i}", D)
        return s

    def bn(name, D):
        return {**norm(name, D), f"{name}.running_mean": r(D), f"{name}.running_var": 0.5 + r(D).abs(),
                f"{name}.num_batches_tracked": torch.tensor(3)}

    def conv(i, name, a, b, side):
        return {f"{name}conv{i}.weight": r(b, a, side, side) / side, **bn(f"{name}bn{i}", b)}

    s |= conv(1, "visual.", 3, w // 2, 3) | conv(2, "visual.", w // 2, w // 2, 3) | conv(3, "visual.", w // 2, w, 3)
    channels = w
    for stage, count in enumerate((1, 2, 1, 1)):
        for i in range(count):
            name = f"visual.layer{stage + 1}.{i}."
            width = w * 2**stage
            s |= conv(1, name, channels, width, 1) | conv(2, name, width, width, 3) | conv(3, name, width, 4 * width, 1)
            if i == 0:
                s[f"{name}downsample.0.weight"] = r(4 * width, channels, 1, 1)
                s |= bn(f"{name}downsample.1", 4 * width)
            channels = 4 * width
    s["visual.attnpool.positional_embedding"] = r(1 + 2 * 2, channels)
    for q in ("q_proj", "k_proj", "v_proj", "c_proj"):
        out = E if q == "c_proj" else channels
        s |= {f"visual.attnpool.{q}.weight": r(out, channels) / 100, f"visual.attnpool.{q}.bias": r(out)}
    return s


def quick(y):
    return y / (1 + torch.exp(-1.702 * y))


def transformer(s, x, prefix, mask, act):
    """OpenAI's blocks on one sequence (N, D), with torch's own attention; heads are 64 wide."""
    D = x.shape[1]
    i = 0
    while f"{prefix}{i}.ln_1.weight" in s:
        b = {k[len(f"{prefix}{i}."):]: v for k, v in s.items() if k.startswith(f"{prefix}{i}.")}
        attention = nn.MultiheadAttention(D, D // 64, dtype=torch.float64)
        attention.load_state_dict({k[5:]: v for k, v in b.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (D,), b["ln_1.weight"], b["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.layer_norm(x, (D,), b["ln_2.weight"], b["ln_2.bias"])
        y = F.linear(y, b["mlp.c_fc.weight"], b["mlp.c_fc.bias"])
        x = x + F.linear(act(y), b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
        i += 1
    return x


def reference_text(s, ids, act=quick):
    out = []
    for row in ids:
        mask = torch.full((77, 77), -math.inf, dtype=torch.float64).triu(1)
        x = s["token_embedding.weight"][row] + s["positional_embedding"]
        x = transformer(s, x, "transformer.resblocks.", mask, act)
        x = F.layer_norm(x, x.shape[1:], s["ln_final.weight"], s["ln_final.bias"])
        out.append(x[row.argmax()] @ s["text_projection"])
    return torch.stack(out)


def reference_image(s, images, act=quick):
    s = {k[7:]: v for k, v in s.items() if k.startswith("visual.")}
    if "proj" in s:
        out = []
        for image in images:
            P = s["conv1.weight"].shape[-1]
            x = F.conv2d(image[None], s["conv1.weight"], stride=P)[0].flatten(1).T
            x = torch.cat([s["class_embedding"][None], x]) + s["positional_embedding"]
            x = F.layer_norm(x, x.shape[1:], s["ln_pre.weight"], s["ln_pre.bias"])
            x = transformer(s, x, "transformer.resblocks.", None, act)
            out.append(F.layer_norm(x[0], x.shape[1:], s["ln_post.weight"], s["ln_post.bias"]) @ s["proj"])
        return torch.stack(out)

    def conv(x, i, name="", stride=1):
        weight = s[f"{name}conv{i}.weight"]
        return bn(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), f"{name}bn{i}")

    def bn(x, name):
        statistics = [s[f"{name}.running_mean"], s[f"{name}.running_var"]]
        return F.batch_norm(x, *statistics, s[f"{name}.weight"], s[f"{name}.bias"])

    x = conv(conv(conv(images, 1, stride=2).relu(), 2).relu(), 3).relu()
    x = F.avg_pool2d(x, 2)
    for stage in "1234":
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in s:
            name = f"layer{stage}.{i}."
            stride = 2 if stage > "1" and i == 0 else 1
            y = conv(conv(x, 1, name).relu(), 2, name).relu()
            y = conv(F.avg_pool2d(y, stride), 3, name)
            if i == 0:
                x = bn(F.conv2d(F.avg_pool2d(x, stride), s[name + "downsample.0.weight"]), name + "downsample.1")
            x = (x + y).relu()
            i += 1
    x = x.flatten(2).permute(2, 0, 1)  # (N, B, C)
    x = torch.cat([x.mean(0, keepdim=True), x]) + s["attnpool.positional_embedding"][:, None]
    p = {k[9:]: v for k, v in s.items() if k.startswith("attnpool.")}
    return F.multi_head_attention_forward(
        x[:1], x, x, x.shape[2], x.shape[2] // 64, None,
        torch.cat([p["q_proj.bias"], p["k_proj.bias"], p["v_proj.bias"]]), None, None, False, 0, p["c_proj.weight"],
        p["c_proj.bias"], use_separate_proj_weight=True, q_proj_weight=p["q_proj.weight"],
        k_proj_weight=p["k_proj.weight"], v_proj_weight=p["v_proj.weight"], need_weights=False)[0][0]


def random_ids(V=40):
    ids = torch.zeros(4, 77, dtype=torch.int64)
    for row, n in zip(ids, (1, 5, 30, 76)):  # an empty text, ..., a full one
        row[0] = V - 2
        row[n] = V - 1
        row[1:n] = torch.randint(V - 2, (n - 1,), generator=torch.Generator().manual_seed(n))
    return ids


class Tree(nn.Module):
    """Modules whose state dict is a given one: what a TorchScript archive is made from."""

    def __init__(self, state):
        super().__init__()
        for name in {k.split(".")[0] for k in state}:
            if name in state:
                self.register_buffer(name, state[name])
            else:
                below = {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + ".")}
                self.add_module(name, Tree(below))

    def forward(self):
        return 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openai_file(tmp_path, kind, archive):
    s = random_file(kind)
    path = tmp_path / "clip.pt"
    side = 16 if kind == "vit" else 64
    images = torch.randn(3, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = random_ids()
    if archive:  # theirs: matrices in half precision, and three numbers that are no weights
        s = {k: v.half().float() if v.ndim > 1 else v for k, v in s.items()}
        extra = {k: torch.tensor(7) for k in ("input_resolution", "context_length", "vocab_size")}
        stored = {k: v.half() if v.ndim > 1 else v for k, v in s.items()} | extra
        torch.jit.save(torch.jit.script(Tree(stored)), path)
    else:
        torch.save(s, path)
    s = {k: v.double() for k, v in s.items()}
    with pytest.raises(data.UserError, match=r"width 64.* none .* released: call from_pretrained\(.*heads=") as error:
        CLIP.from_pretrained(path)
    assert "\n" not in str(error.value) and "text_heads=" in str(error.value)
    model = CLIP.from_pretrained(path, heads=1, text_heads=1)
    assert not model.training
    I = reference_image(s, images)
    T = reference_text(s, ids)
    logits = math.exp(1.5) * (I / I.norm(dim=1)[:, None]) @ (T / T.norm(dim=1)[:, None]).T
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model.to(dtype)
        with torch.no_grad():
            x = images.to(dtype)
            found = [model.encode_image(x), model.encode_text(ids), model(x, ids)]
        for ours, theirs in zip(found, (I, T, logits)):
            assert ours.dtype == dtype and (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_open_clips_files_have_the_exact_gelu(tmp_path):
    """In OpenAI's names, but LAION's models were trained with another activation, which no tensor tells."""
    s = random_file("vit")
    torch.save(s, tmp_path / "laion.pt")
    model = CLIP.from_pretrained(tmp_path / "laion.pt", heads=1, text_heads=1, exact_gelu=True).double()
    s = {k: v.double() for k, v in s.items()}
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = random_ids()
    with torch.no_grad():
        found = [model.encode_image(images), model.encode_text(ids)]
    exact = [reference_image(s, images, F.gelu), reference_text(s, ids, F.gelu)]
    other = [reference_image(s, images), reference_text(s, ids)]
    for ours, theirs, openais in zip(found, exact, other):
        assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()
        assert (ours - openais).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("visual.proj"), lambda s: s.pop("text_projection"), lambda s: s.pop("token_embedding.weight"),
    lambda s: s.update(extra=torch.ones(1)), lambda s: s.clear(), lambda s: s.pop("ln_final.bias"),
    lambda s: s.update(x=3),
    lambda s: s.update({"visual.positional_embedding": torch.ones(16, 64)})])
def test_other_files_are_refused(tmp_path, spoil):
    state = random_file("vit")
    spoil(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="x.pt: does not hold a CLIP") as error:
        CLIP.from_pretrained(tmp_path / "x.pt", heads=1, text_heads=1)
    assert "\n" not in str(error.value)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-100])
    for name in ("cut.pt", "missing.pt"):
        with pytest.raises(data.UserError, match=f"{name}: not a whole PyTorch file"):
            CLIP.from_pretrained(tmp_path / name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "clip.pt"
    weight = torch.arange(99.0)
    torch.jit.save(torch.jit.script(Tree({"visual.proj": weight})), path)
    body = bytearray(path.read_bytes())
    body[body.index(weight.numpy().tobytes()) + 50] ^= 1
    path.write_bytes(body)
    with pytest.raises(data.UserError, match="clip.pt: not a whole TorchScript archive .*damaged"):
        CLIP.from_pretrained(path)


# ------------------------------------------------------------------------------------------------ tokenizer


BPE = ROOT.parent / "shared" / "data" / "bpe_simple_vocab_16e6.txt.gz"
needs_bpe = pytest.mark.skipif(not BPE.exists(), reason="OpenAI's vocabulary lies not in ../shared/data")
GOLDEN = {  # ids that the authors' tokenizer gave
    "Hello World!": "3306 1002 256", "a photo of a cat": "320 1125 539 320 2368",
    "it's a dog's life": "585 568 320 1929 568 970", "'sample' text": "568 34162 262 4160",
    "don't 2021 ½ x²": "847 713 273 271 273 272 33613 343 41175", "café naïve": "15304 1097 35689 563",
    "日本語": "39121 44353 34002 508", "😀": "7334", "hello_world": "3306 318 1002",
    "A&amp;B &lt;tag&gt;": "320 261 321 283 3640 285", "“curly” ‘quotes’": "257 20795 257 262 5808 262",
    "ﬁne ＡＢ": "3797 3937", "": "", " \t\n a  photo ": "320 1125", "a\x0bb": "3937", "&II;": "158 227 486",
    "< &II;": "283 261 2329 282", "&amp;amp;amp;lt;": "283", "<|endoftext|>": "49407",
    "e\u0301": "4166", "a photo of a automobile.": "320 1125 539 320 25258 269"}


@pytest.fixture(scope="session")
def openai():
    return Tokenizer.from_file(BPE)


@pytest.mark.parametrize("text, clean", [  # what ftfy 6.3, html.unescape twice and lower() give
    ("&ldquo;hi&rdquo;", '"hi"'), ("<b>&ldquo;hi&rdquo;", "<b>“hi”"), ("“hi”<b>", '"hi"<b>'),
    ("&#xff21;", "a"), ("<&#xff21;", "<ａ"), ("&LTDOT;", "<dot;"), ("&EACUTE;", "é"), ("<&EACUTE;", "<&eacute;"),
    ("a\n<&amp;amp;amp;quot;", "a\n<&amp;quot;"), ("＆amp;", "&")])
def test_texts_are_cleaned_as_openai_cleans_them(text, clean):
    """Entities behind a "<" are resolved after the characters are replaced: curly quotes stay there."""
    assert data.clean_text(text) == clean


@needs_bpe
@pytest.mark.parametrize("text, ids", GOLDEN.items())
def test_openai_vocabulary(openai, text, ids):
    ids = [int(i) for i in ids.split()]
    assert openai.encode(text) == ids
    assert openai(text).tolist() == [[49406, *ids, 49407] + [0] * (75 - len(ids))]


@needs_bpe
def test_openai_vocabulary_at_large(openai):
    assert openai.vocab_size == 49408 and len(openai.merges) == 48894
    assert openai.merges[0] == "i n" and openai.merges[-1] == "jeky ll</w>"
    classes = "airplane 16451 automobile 25258 bird 3329 cat 2368 deer 8700 dog 1929 frog 11438 horse 4558 ship 1158"
    for name, i in re.findall(r"(\w+) (\d+)", classes):
        assert openai.encode(name) == [int(i)]


def test_ids_are_in_openais_order():
    tokenizer = Tokenizer(["l o", "lo w</w>"])
    assert tokenizer.vocab_size == 516 and tokenizer.encode("!aA") == [256, 64, 64 + 256]  # two words: "!", "aa"
    assert tokenizer.encode("low lo") == [513, 75, 78 + 256]  # "lo" ends a word there: "l", "o</w>"
    assert tokenizer(["low", ""]).tolist() == [[514, 513, 515] + [0] * 74, [514, 515] + [0] * 75]


def test_too_long_texts():
    tokenizer = Tokenizer([])
    assert tokenizer("a " * 75)[0, -1] == 513
    with pytest.raises(data.UserError, match="'a a a.*76 tokens, but there is room for 75"):
        tokenizer("a " * 76)
    assert (tokenizer("a " * 76, truncate=True) == tokenizer("a " * 75)).all()
    assert tokenizer("a b c", context_length=4, truncate=True).tolist() == [[512, 64 + 256, 65 + 256, 513]]


def test_training_a_tokenizer():
    """Against the textbook's example, and on text: merging again gives what training made of each word."""
    texts = ["low low low low low lower lower newest newest newest newest newest newest widest widest widest"]
    assert Tokenizer.train(texts, 514 + 4).merges == ["s t</w>", "e st</w>", "l o", "w est</w>"]
    captions = data.shapes(counts=(300, 10, 10)).train_captions
    tokenizer = Tokenizer.train(captions, 1024)
    words = {word for caption in captions for word in caption.replace(",", " ,").split()}
    assert tokenizer.vocab_size < 1024 and all(len(tokenizer.encode(word)) == 1 for word in words)
    assert Tokenizer.train(captions, 530).vocab_size == 530
    rng = torch.Generator().manual_seed(0)
    back = {i: token for token, i in tokenizer.ids.items()}
    for _ in range(200):  # nothing is lost
        text = "".join(string.printable[i] for i in torch.randint(95, (20,), generator=rng)).replace("&", "")
        assert "".join(back[i] for i in tokenizer.encode(text)).replace("</w>", "") == "".join(text.lower().split())


def test_tokenizer_files(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("header\nl o\nlo w</w>\n")
    assert Tokenizer.from_file(tmp_path / "a.gz").merges == ["l o", "lo w</w>"]
    (tmp_path / "empty.gz").write_text("")
    (tmp_path / "words.gz").write_bytes(gzip.compress(b"header\nno pair of symbols\n"))
    (tmp_path / "text.gz").write_text("l o")
    (tmp_path / "text.pt").write_text("l o")
    for name in ("text.gz", "text.pt", "missing.gz", "empty.gz", "words.gz"):
        with pytest.raises(data.UserError, match=name):
            Tokenizer.from_file(tmp_path / name)


# -------------------------------------------------------------------------------------------- properties


def small(objective="contrastive", **more):
    torch.manual_seed(0)
    model = CLIP(image_size=16, patch_size=4, dim=32, depth=2, heads=2, embed_dim=16, text_dim=32, text_depth=2,
                 text_heads=2, vocab_size=40, **more)
    if objective == "bow":
        model = clip.BagOfWords(model)
    elif objective == "caption":
        model = clip.Captioner(model)
    return model.double().eval()


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IDS = random_ids()


@pytest.mark.parametrize("image_encoder", ["vit", "resnet"])
def test_images_of_another_shape_are_refused(image_encoder):
    """Rows and columns are compared: 8 x 32 pixels have as many patches as 16 x 16."""
    model = small(image_encoder=image_encoder)
    for H, W in ((8, 32), (32, 8), (32, 32), (16, 24)):
        message = rf"images of \({H}, {W}\), but the position table of this model is for 16 x 16 pixels"
        with pytest.raises(ValueError, match=message) as error:
            model.encode_image(torch.zeros(1, 3, H, W, dtype=torch.float64))
        assert "\n" not in str(error.value)


def test_unknown_encoders_are_refused():
    with pytest.raises(ValueError, match="image_encoder must be 'vit' or 'resnet', not 'ViT'"):
        CLIP(image_encoder="ViT")
    with pytest.raises(ValueError, match="text_encoder must be 'transformer' or 'cbow', not 'bert'"):
        CLIP(text_encoder="bert")


def test_forward_and_loss_are_the_papers():
    model = small()
    logits = model(IMAGES, IDS)
    loss, again = model.loss(IMAGES, IDS)
    assert (logits == again).all()
    for i in range(4):
        for j in range(4):
            cosine = F.cosine_similarity(model.encode_image(IMAGES)[i], model.encode_text(IDS)[j], dim=0)
            assert (logits[i, j] - cosine / 0.07).abs() < 1e-6  # t is stored as float32
    p = logits.exp()
    right = torch.arange(4)
    expected = -(p / p.sum(1, keepdim=True))[right, right].log().mean() - (p / p.sum(0))[right, right].log().mean()
    assert (loss - expected / 2).abs() < 1e-12
    turned, _ = model.loss(IMAGES[[2, 0, 3, 1]], IDS[[2, 0, 3, 1]])
    assert (turned - loss).abs() < 1e-12


@pytest.mark.parametrize("image_encoder", ["vit", "resnet"])
@pytest.mark.parametrize("text_encoder", ["transformer", "cbow"])
def test_the_first_loss_is_log_b(image_encoder, text_encoder):
    """On the default data and batch, within 5 %: nothing is known at start."""
    dataset = data.shapes(counts=(256, 10, 10))
    tokenizer = Tokenizer.train(dataset.train_captions, 1024)
    B = clip.parse_args([]).batch_size
    for seed in range(2):
        torch.manual_seed(seed)
        model = CLIP(vocab_size=tokenizer.vocab_size, image_encoder=image_encoder, text_encoder=text_encoder)
        with torch.no_grad():
            images = dataset.normalize(dataset.train_images)
            ids = tokenizer(dataset.train_captions)
            losses = [model.loss(*pair)[0].item() for pair in zip(images.split(B), ids.split(B))]
        assert losses == pytest.approx([math.log(B)] * len(losses), rel=0.05)
        assert model.t.exp().item() == pytest.approx(1 / 0.07)


def test_text_after_eos_and_padding_do_nothing():
    for model in (small(), small(text_encoder="cbow")):
        changed = IDS.clone()
        changed[1, 6:] = 7
        before = model.encode_text(IDS)
        assert (model.encode_text(changed) - before).abs().max() < 1e-12
        assert (model.encode_text(IDS[:2]) - before[:2]).abs().max() < 1e-12  # in a shorter batch
        changed[1, 3] = (changed[1, 3] + 1) % 38
        assert (model.encode_text(changed)[1] - before[1]).abs().max() > 1e-4


def test_a_transformer_sees_order_and_a_bag_of_words_does_not():
    swapped = IDS.clone()
    swapped[2, [1, 2]] = swapped[2, [2, 1]]
    assert swapped[2, 1] != swapped[2, 2]
    for text_encoder, low, high in (("transformer", 1e-4, math.inf), ("cbow", 0, 1e-12)):
        model = small(text_encoder=text_encoder)
        assert low <= (model.encode_text(swapped) - model.encode_text(IDS)).abs().max() <= high
    table = model.text_encoder.token_embed.weight
    expected = torch.stack([table[row[:row.argmax() + 1]].mean(0) for row in IDS])
    assert (model.text_encoder(IDS) - expected).abs().max() < 1e-12


def test_tokens_are_causal():
    text = small().text_encoder
    changed = IDS[:, :30].clone()
    changed[3, 10:] = (changed[3, 10:] + 1) % 38
    difference = (text.tokens(IDS[:, :30]) - text.tokens(changed))[3].abs().amax(1)
    assert (difference[:10] == 0).all() and (difference[10:] > 0).all()


def test_classifier_is_the_normalized_mean_of_normalized_prompts():
    model = small()
    prompts = IDS.reshape(2, 2, 77)
    T = [[model.encode_text(ids[None])[0] for ids in row] for row in prompts]
    W = torch.stack([sum(t / t.norm() for t in row) for row in T])
    expected = F.cosine_similarity(model.encode_image(IMAGES)[:, None], W[None], dim=2) / 0.07
    assert (model.classifier(prompts)(IMAGES) - expected).abs().max() < 1e-6
    assert (model.classifier(IDS[:, None])(IMAGES) - model(IMAGES, IDS)).abs().max() < 1e-12


class NumberTexts:
    """A tokenizer that keeps the texts and gives text i the ids i, i, ..."""

    def __call__(self, texts, truncate):
        self.texts = texts
        return torch.arange(len(texts))[:, None].expand(-1, 77)


def test_zero_shot_names_the_pair_that_an_image_shows():
    dataset = data.shapes(counts=(20, 1000, 400))
    tokenizer = NumberTexts()
    names, templates, parts = data.zero_shot_task(dataset)
    prompts = clip.tokenize_prompts(tokenizer, names, templates)
    assert len(names) == 80 and prompts.shape == (80, 41, 77)
    captions = {tokenizer.texts[i] for i in prompts[:, 1:, 0].flatten()}
    assert set(dataset.test_captions + dataset.unseen_captions) <= captions and len(captions) == 3200
    assert all(name in tokenizer.texts[i] for name, row in zip(names, prompts[:, :, 0]) for i in row)
    for part, caps, labels in (("seen", dataset.test_captions, dataset.test_labels),
                               ("unseen", dataset.unseen_captions, dataset.unseen_labels)):
        assert len(parts[part][1]) == len(caps)
        for k, caption, label in zip(parts[part][1], caps, labels):
            color, shape = names[k].split()
            assert shape == data.SHAPES[label] and {color, shape} < set(caption.replace(",", "").split())
    seen = set(parts["seen"][1].tolist())
    unseen = set(parts["unseen"][1].tolist())
    assert len(seen) == 60 and len(unseen) == 20 and not seen & unseen  # a task that labels cannot solve


def test_zero_shot_counts_the_correct_images():
    class Brightness:
        """Class 0 if the first pixel is dark, else class 1."""

        def classifier(self, prompts):
            return lambda images: torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0]], dim=1)

    dataset = data.shapes(counts=(20, 20, 20))
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[2:] = 255
    targets = torch.tensor([0, 1, 1, 1])
    parts = {"seen": (images, targets), "unseen": (images[2:], targets[2:])}
    amp = torch.autocast("cpu", enabled=False)
    scores = clip.zero_shot(Brightness(), dataset, parts, None, amp=amp)
    assert scores == {"zero_shot_seen": 0.75, "zero_shot_unseen": 1}
    assert clip.zero_shot(Brightness(), dataset, parts, None, amp=amp, limit=2)["zero_shot_seen"] == 0.5


def test_mirrored_images_have_mirrored_captions():
    dataset = data.shapes(counts=(400, 10, 10))
    tokenizer = Tokenizer.train(dataset.train_captions, 1024)
    ids = tokenizer(dataset.train_captions)
    left, right = clip.left_and_right(tokenizer, dataset.train_captions)
    assert [left] == tokenizer.encode("left") and [right] == tokenizer.encode("right")
    torch.manual_seed(0)
    images, exchanged = clip.mirror(dataset.train_images, ids, left, right)
    number = 0
    for before, after, x, y, text in zip(dataset.train_images, images, ids, exchanged, dataset.train_captions):
        if (after == before.flip(2)).all():
            number += 1
            text = re.sub("left|right", lambda m: {"left": "right", "right": "left"}[m[0]], text)
        assert (after == before).all() or (after == before.flip(2)).all()
        assert (y == tokenizer(text)[0]).all()
    assert 160 < number < 240


def test_images_are_not_mirrored_where_the_caption_cannot_be():
    """Unless left and right are one token each, a mirrored image would have a wrong caption."""
    dataset = data.shapes(counts=(40, 10, 10))
    tokenizer = Tokenizer.train(dataset.train_captions, 524)  # too few tokens for whole words
    ids = tokenizer(dataset.train_captions)
    assert len(tokenizer.encode("left")) > 1 and len(tokenizer.encode("right")) > 1
    assert clip.left_and_right(tokenizer, dataset.train_captions) == (None, None)
    for word in ("left", "right"):  # one of them is enough
        captions = [caption.replace(word, "side") for caption in dataset.train_captions]
        assert clip.left_and_right(tokenizer, captions) == (None, None)
    images, same = clip.mirror(dataset.train_images, ids, None, None)
    assert (images == dataset.train_images).all() and (same == ids).all()


def test_images_are_mirrored_where_no_caption_tells_sides():
    """As for CIFAR-10: "left" is then no token of a learned tokenizer, and need not be."""
    dataset = data.shapes(counts=(400, 10, 10))
    captions = ["a photo of a cat."] * 400
    tokenizer = Tokenizer.train(captions, 1024)
    sides = clip.left_and_right(tokenizer, captions)
    torch.manual_seed(0)
    ids = tokenizer(captions)
    images, same = clip.mirror(dataset.train_images, ids, *sides)
    is_mirrored = (images == dataset.train_images.flip(3)).flatten(1).all(1)
    is_kept = (images == dataset.train_images).flatten(1).all(1)
    assert (is_mirrored | is_kept).all() and 160 < is_mirrored.sum() < 240 and (same == ids).all()


def test_bag_of_words():
    model = small("bow")
    rows = IDS[1:]
    loss, logits = model.loss(IMAGES[1:], rows)
    log_p = logits.log_softmax(1)
    words = [row[1:row.argmax()] for row in rows]
    expected = torch.stack([p[w].mean() for p, w in zip(log_p, words)])
    assert (loss + expected.mean()).abs() < 1e-6
    scores = model.classifier(rows[:, None])(IMAGES[1:])
    assert (scores.diagonal() - expected).abs().max() < 1e-6
    two = model.classifier(torch.stack([rows, rows.flip(0)], dim=1))(IMAGES[1:])  # two prompts a class: their mean
    assert (two - (scores + scores.flip(1)) / 2).abs().max() < 1e-6


def test_scores_of_bag_of_words_are_not_rounded():
    """In bfloat16, classes whose prompts differ in few words would be equal."""
    model = small("bow").float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.classifier(IDS[:, None])(IMAGES.float())
    assert scores.dtype == torch.float32 and (scores.bfloat16().float() != scores).any()


def test_captioner():
    """Its loss is the mean over tokens of -log p(token | image, tokens before), one pass for each token here."""
    model = small("caption")
    rows = IDS[:3]
    text = model.clip.text_encoder
    expected = []
    for image, row in zip(IMAGES, rows):
        before = model.prefix(model.clip.features(image[None])).reshape(1, 4, 32)
        for n in range(1, row.argmax() + 1):
            x = torch.cat([before, text.token_embed(row[None, :n]) + text.pos_embed[:n]], 1)
            for block in text.blocks:
                assert block.attn.causal
                x = block(x)
            x = text.norm(x[:, -1])
            expected.append(model.head(x)[0].log_softmax(0)[row[n]])
    loss, log_p = model.loss(IMAGES[:3], rows)
    assert (loss + sum(expected) / len(expected)).abs() < 1e-6
    scores = model.classifier(rows[:, None])(IMAGES[:3])
    without_eos = torch.stack([p[:row.argmax() - 1].sum() for p, row in zip(log_p, rows)])
    assert (scores.diagonal() - without_eos).abs().max() < 1e-6
    changed = IMAGES[:3] + 1
    assert (model.loss(changed, rows)[1] != log_p).any(1).all()  # it looks at the image


@pytest.mark.parametrize("objective", ["contrastive", "bow", "caption"])
def test_it_overfits_eight_pairs(objective):
    model = small(objective).float().train()
    g = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 4, 4, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    ids = torch.zeros(8, 77, dtype=torch.int64)
    ids[:, 0] = 38
    ids[:, 1:4] = torch.randint(38, (8, 3), generator=g)
    ids[:, 4] = 39
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        loss, _ = model.loss(images, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    floor = math.log(3) if objective == "bow" else 0  # three words share the mass
    assert loss - floor < 0.05 and model.classifier(ids[:, None])(images).argmax(1).tolist() == list(range(8))


# ---------------------------------------------------------------------------------------- the real command


SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--text-dim", 16, "--text-depth", 1, "--text-heads", 2,
         "--embed-dim", 16,
         "--batch-size", 16, "--save-seconds", 0, "--device", "cpu"]


@pytest.mark.parametrize("objective", ["contrastive", "bow", "caption"])
def test_the_command_learns_draws_and_scores(script, pictures, tmp_path, objective):
    words = ["clip.py", "--data", pictures, *SMALL, "--objective", objective, "--out", tmp_path / "a"]
    more = ["--image-encoder", "resnet", "--text-encoder", "cbow"] if objective == "bow" else []
    done = script(*words, *more, "--steps", 30, "--warmup", 5, "--lr", 0.003)
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^ *(\w+)  (\S.*)$", done.stdout, re.M))
    assert scores["images_seen"] == "480" and scores["chance"] == "0.3333"
    assert {"loss", "seconds", "probe", "probe_random", "probe_pixels", "knn", "zero_shot_seen"} <= set(scores)
    assert "zero_shot_unseen" not in scores  # these images have no unseen pairs
    for file in re.search(r"^wrote (.*)$", done.stdout, re.M)[1].split():
        assert (ROOT / file).stat().st_size > 100
    assert loss_falls(tmp_path / "a")
    path = tmp_path / "a" / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "clip")
    assert set(checkpoint) == {"script", "version", "model", "ema", "optimizer", "step", "args", "scores"}
    if objective != "contrastive":
        with pytest.raises(data.UserError, match=f"--objective {objective}"):
            CLIP.from_pretrained(path)
        return
    assert "similarity.png, row 2: a photo of a" in done.stdout and re.search(r"✓ .* [\d.]+%", done.stdout)
    assert float(scores["zero_shot_seen"]) > 0.6  # three classes of three brightnesses
    model = CLIP.from_pretrained(path)
    assert model.image_encoder.blocks[0].attn.heads == 2 and Tokenizer.from_file(path).encode("photo")
    done = script("clip.py", "--data", pictures, "--load", path, "--out", tmp_path / "b")
    again = dict(re.findall(r"^ *(\w+)  (\S.*)$", done.stdout, re.M))
    assert done.returncode == 0 and again["zero_shot_seen"] == scores["zero_shot_seen"]
    words = ["--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path / "c"]
    done = script("clip.py", *words, "--compare", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert all(f">{name}</text>" in (tmp_path / "c" / "zero_shot.svg").read_text() for name in "ac")


def train_briefly(monkeypatch, *words, evaluate=lambda *args, **more: {}):
    """The real training loop, without the scores at its end."""
    monkeypatch.setattr(clip, "evaluate", evaluate)
    monkeypatch.setattr(clip, "draw_prompts", lambda *args, **more: [])
    monkeypatch.setattr(clip, "draw_similarity", lambda *args, **more: [])
    return clip.train(clip.parse_args([str(word) for word in words]))


def test_the_temperature_is_capped(monkeypatch, pictures, tmp_path):
    start = CLIP.init_weights

    def hot(self):
        start(self)
        self.t.data.fill_(4.7)  # e^4.7 = 110

    monkeypatch.setattr(CLIP, "init_weights", hot)
    train_briefly(monkeypatch, "--data", pictures, *SMALL, "--steps", 1, "--out", tmp_path)
    t = data.load_checkpoint(tmp_path / "checkpoint.pt")["model"]["t"]
    assert t.exp().item() == pytest.approx(100, rel=1e-6)


def test_a_new_run_begins_a_new_zero_shot_log(monkeypatch, pictures, tmp_path):
    """A row of an earlier run at a step that the new one does not log would be drawn as its own."""
    words = ["--data", pictures, *SMALL, "--out", tmp_path]
    train_briefly(monkeypatch, *words, "--steps", 3)
    assert data.read_log(tmp_path / "zero_shot.csv")["step"] == [0, 1, 2]
    train_briefly(monkeypatch, *words, "--steps", 20)
    log = data.read_log(tmp_path / "zero_shot.csv")
    assert log["step"] == list(range(1, 20, 2)) and set(log) == {"step", "images_seen", "zero_shot_seen"}
    path = tmp_path / "zero_shot.csv"
    path.write_text(re.sub(r"^19,.*$", "19,320,0.125", path.read_text(encoding="utf8"), flags=re.M), encoding="utf8")
    train_briefly(monkeypatch, *words, "--steps", 22, "--resume")  # goes on from step 20, and keeps the rows
    assert data.read_log(path)["zero_shot_seen"][9] == 0.125  # the row of step 19, as it was before
    assert data.read_log(tmp_path / "zero_shot.csv")["step"] == list(range(1, 22, 2))


def test_a_released_file_brings_its_pixel_statistics_and_needs_its_tokenizer(
        monkeypatch, refused, pictures, tmp_path):
    torch.save(random_file("vit", V=516, D=768, D_t=512, layers=1), tmp_path / "openai.pt")
    for merges in ("l o\nlo w</w>", "l o"):
        with gzip.open(tmp_path / f"{len(merges)}.gz", "wt") as file:
            file.write(f"header\n{merges}\n")
    found = []

    def evaluate(model, dataset, *args, **more):
        found.append(dataset)
        return {}

    words = ["--data", pictures, "--load", tmp_path / "openai.pt", "--out", tmp_path, "--device", "cpu"]
    assert "needs --tokenizer bpe_simple" in refused(clip, *words)
    assert "3.gz: 515 tokens, but --load" in refused(clip, *words, "--tokenizer", tmp_path / "3.gz")
    train_briefly(monkeypatch, *words, "--tokenizer", tmp_path / "12.gz", evaluate=evaluate)
    assert found[0].mean.tolist() == pytest.approx([0.4815, 0.4578, 0.4082])
    assert found[0].std.tolist() == pytest.approx([0.2686, 0.2613, 0.2758])
    train_briefly(monkeypatch, *words, "--tokenizer", tmp_path / "12.gz", "--normalize", "half", evaluate=evaluate)
    assert found[1].mean.tolist() == found[1].std.tolist() == [0.5, 0.5, 0.5]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_killed_and_resumed_is_the_same_run(same_run, pictures):
    same_run("clip.py", "--data", pictures, *SMALL, "--steps", 40)


@pytest.mark.parametrize("words, message", [
    (["--patch-size", 5], "--patch-size 5 does not divide the images' side 16"),
    (["--image-encoder", "resnet", "--dim", 20], "a ResNet of 2 stages needs"),
    (["--text-encoder", "transformer", "--text-heads", 3], "--text-heads 3"),
    (["--batch-size", 1], "--batch-size 1: the contrastive loss"),
    (["--tokenizer", "data.py"], "data.py: "),
    (["--compare", "nowhere"], "--compare nowhere: "),
    (["--objective", "guess"], "invalid choice: 'guess'"),
    (["--load", "data.py"], "data.py: not a whole PyTorch file"),
    (["--vocab-size", 100], "argument --vocab-size: '100' is not a whole number from 514"),
])
def test_mistakes_end_in_one_line(refused, pictures, tmp_path, words, message):
    assert message in refused(clip, "--data", pictures, *SMALL, "--steps", 2, "--out", tmp_path, *words)


def test_options_that_do_not_fit_together():
    with pytest.raises(data.UserError, match="--image-encoder vit: --size RN50 is a ResNet's"):
        clip.parse_args(["--size", "RN50", "--image-encoder", "vit"])
    assert clip.parse_args(["--size", "RN50", "--image-encoder", "vit", "--depth", "4", "--dim", "64"]).depth == 4
    assert clip.parse_args(["--text-dim", "130"]).text_dim == 130  # CBOW has no heads
    with pytest.raises(data.UserError, match="--text-dim 130 must be a multiple of --text-heads 4"):
        clip.parse_args(["--text-dim", "130", "--text-encoder", "transformer"])


@pytest.mark.parametrize("words, exact", [([], False), (["--exact-gelu"], True)])
def test_the_activation_of_a_loaded_model(monkeypatch, words, exact):
    class Stop(Exception):
        pass

    def from_pretrained(path, exact_gelu):
        assert exact_gelu == exact
        raise Stop

    monkeypatch.setattr(CLIP, "from_pretrained", from_pretrained)
    with pytest.raises(Stop):
        clip.load(clip.parse_args(["--load", "laion.pt", *words]))


def test_the_other_objectives_take_batches_of_one():
    for objective in ("bow", "caption"):
        assert clip.parse_args(["--batch-size", "1", "--objective", objective]).batch_size == 1
