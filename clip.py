"""CLIP: "Learning Transferable Visual Models From Natural Language Supervision", Radford 2021.

Show a batch of pictures and their captions to two encoders, and train both to tell which caption
belongs to which picture. To do so they must find out what is in a picture and what words mean. From
then on a sentence is a classifier: the class whose prompt lies nearest to the picture wins.

    loss = (cross_entropy(logits, i) + cross_entropy(logits^T, i)) / 2,  logits = e^t I_e T_e^T

    python clip.py                                    # shapes, 3 minutes on two CPU cores
    python clip.py --text-encoder transformer         # which reads the order of words, too
    python clip.py --objective bow --out out/bow      # predict the caption's words, or write it:
    python clip.py --objective caption --out out/caption --compare out/bow out/clip
    python clip.py --image-encoder resnet --out out/resnet --compare out/clip
    python clip.py --load ViT-B-32.pt --tokenizer bpe_simple_vocab_16e6.txt.gz --data cifar10

Default run, seed 0, zero-shot among 80 pairs of colour and shape (chance 0.013): 0.928 on pairs
named in training, 0.841 on pairs that no caption named; with one prompt 0.860 and 0.770. Probe
0.988 (untrained 0.342, raw pixels 0.322). 2 min 44 s in all, on two bfloat16 CPU cores; --steps
2400: 0.970 and 0.902 in 3 min 42 s; --image-encoder resnet: 1.000 and 0.994 in 2 min 20 s.

Differences from the paper:
1. Small towers, batches of 64, a tokenizer learned from the captions: minutes on a CPU. A bag of
   words by default, which learns sooner what words mean than a Transformer.
2. The ViT starts like vit.py's; tokens start from N(0, .5) and their positions from N(0, .1), not
   .02 and .01: in a few minutes the latter are hardly told apart.
3. Shift and mirror (left is then right in the caption), no crops; gradients clipped at norm 1.
4. How the two other objectives were scored, the paper does not tell: here by log p of the prompt.
"""

import collections
import copy
import functools
import gzip
import html.entities
import itertools
import math
import pathlib
import re
import sys
import unicodedata
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
from common import (Attention, Block, LayerNorm, PatchEmbed, autocast, patchify, quick_gelu,
                    sincos_2d)


def size(patch_size, dim, depth, text_dim, embed_dim, image_size=224):
    """A row of the paper's table: 12 layers of text, heads of 64. No patch size: a ResNet."""
    return dict(image_encoder="vit" if patch_size else "resnet", image_size=image_size,
                patch_size=patch_size or 32, dim=dim, depth=depth, heads=dim // 64,
                text_dim=text_dim, text_depth=12, text_heads=text_dim // 64, embed_dim=embed_dim)


SIZES = {  # all but tiny are the paper's; dim of a ResNet: the width of its last 3 x 3 convolution
    "tiny": dict(image_encoder="vit", patch_size=4, dim=128, depth=4, heads=4,
                 text_dim=128, text_depth=2, text_heads=4, embed_dim=512),
    "B/32": size(32, 768, 12, 512, 512), "B/16": size(16, 768, 12, 512, 512),
    "L/14": size(14, 1024, 24, 768, 768), "L/14@336": size(14, 1024, 24, 768, 768, 336),
    "RN50": size(None, 512, (3, 4, 6, 3), 512, 1024),
    "RN101": size(None, 512, (3, 4, 23, 3), 512, 512),
    "RN50x4": size(None, 640, (4, 6, 10, 6), 640, 640, 288),
    "RN50x16": size(None, 768, (6, 8, 18, 8), 768, 768, 384),
    "RN50x64": size(None, 1024, (3, 15, 36, 10), 1024, 1024, 448)}
PIXELS = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # mean, deviation in released models
SOS, EOS = "<|startoftext|>", "<|endoftext|>"
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that print as themselves
BYTES = {b: chr(b) for b in BYTES} | {  # byte -> the character that stands for it, in ids' order
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)}
CLEAN = dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
                       *range(0xFFF9, 0xFFFD)])  # control characters go; ligatures, quotes and
CLEAN |= zip(map(ord, "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬅﬆʼ‘’‚‛“”„‟"),  # wide letters become plain
             "IJ ij 'n DŽ Dž dž LJ Lj lj NJ Nj nj DZ Dz dz ff fi fl ffi ffl ſt st "
             "' ' ' ' ' \" \" \" \"".split())
CLEAN |= {c: unicodedata.normalize("NFKC", chr(c)) for c in (0x3000, *range(0xFF01, 0xFFEF))}

UPPER = {f"&{name.upper()}": character.upper() for name, character in html.entities.html5.items()
         if name == name.lower() and name[-1] == ";" and name.upper() not in html.entities.html5}


def clean(text):
    """As OpenAI: entities are resolved repeatedly up to the line of the first "<", then twice."""
    end = len(text) if "<" not in text else text.rfind("\n", 0, text.index("<")) + 1
    text, rest, before = text[:end], text[end:], None
    while text != before:
        before, text = text, re.sub("&#?[0-9A-Za-z]{1,24};",
                                    lambda m: UPPER.get(m[0]) or html.unescape(m[0]), text)
    text = html.unescape(html.unescape(text + rest)).translate(CLEAN)
    return unicodedata.normalize("NFC", text).lower()


def symbols(word):
    """"low" -> ("l", "o", "w</w>")."""
    *first, last = (BYTES[byte] for byte in word.encode("utf8", "replace"))
    return *first, last + "</w>"


def merge(parts, pair):
    """("l", "o", "l", "o"), ("l", "o") -> ("lo", "lo"): every occurrence, from the left."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


class Tokenizer:
    """Lower-cased byte-pair encoding: a text's words, as bytes, joined pair by pair into tokens.

    Ids: 256 bytes, the same at the end of a word ("a</w>"), one a merge, [SOS], [EOS]. Equal to
    OpenAI's on ASCII; elsewhere but for U+0345, characters that are newer than Python's tables, and
    mojibake, which theirs repairs (ftfy).
    """

    def __init__(self, merges):
        """merges: "l o", "lo w</w>", ...: which two symbols to join, the most urgent pair first."""
        self.merges, self.known = list(merges), {}
        pairs = [(a, b) for a, b in (pair.split(" ") for pair in self.merges)]
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        tokens = [*BYTES.values(), *(c + "</w>" for c in BYTES.values()), *map("".join, pairs)]
        self.ids = {token: i for i, token in enumerate([*tokens, SOS, EOS])}
        self.vocab_size, kinds = len(tokens) + 2, {"L": "", "N": ""}  # letters and numbers
        for kind, run in itertools.groupby(map(chr, range(sys.maxunicode + 1)),
                                           lambda c: unicodedata.category(c)[0]):
            if kind in kinds:
                first, *_, last = [*run] * 2
                kinds[kind] += f"{first}-{last}"
        self.words = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
                                r"[{L}]+|[{N}]|[^\s{L}{N}]+".format(**kinds)).findall

    @classmethod
    def train(cls, texts, vocab_size):
        """Starts from bytes and joins the most frequent pair of neighbours, again and again."""
        find, merges = cls([]).words, []
        words = collections.Counter(word for text in texts for word in find(clean(text)))
        words = {symbols(word): n for word, n in words.items()}
        while len(merges) < vocab_size - 514:
            pairs = collections.Counter()
            for word, n in words.items():
                for pair in zip(word, word[1:]):
                    pairs[pair] += n
            if not pairs:  # every word is a token
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            words = {merge(word, best): n for word, n in words.items()}
            merges.append(" ".join(best))
        return cls(merges)

    @classmethod
    def from_file(cls, path):
        """OpenAI's bpe_simple_vocab_16e6.txt.gz, or a checkpoint of this script; else UserError."""
        with data.refuse(f"{path}: holds no tokenizer"):
            if not str(path).endswith(".gz"):
                return cls(data.load_checkpoint(path, "clip")["args"]["merges"])
            with gzip.open(path, "rt", encoding="utf8") as file:  # a header, and far too many
                return cls(file.read().rstrip("\n").split("\n")[1:48895] or ["none"])

    def encode(self, text):
        """A text -> the list of its tokens' ids, without [SOS] and [EOS]."""
        words = self.words(clean(text))
        for word in {*words} - self.known.keys():
            parts = (word,) if word in (SOS, EOS) else symbols(word)
            while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.rank]:
                parts = merge(parts, min(pairs, key=self.rank.get))
            self.known[word] = [self.ids[part] for part in parts]
        return [i for word in words for i in self.known[word]]

    def __call__(self, texts, context_length=77, truncate=False):
        """A text or B of them -> ids (B, 77) int64: [SOS], the text, [EOS], zeros."""
        out = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids, n = self.encode(text), context_length - 2
            if len(ids) > n and not truncate:
                raise data.UserError(f"{text[:50]!r}...: {len(ids)} tokens, {n} fit")
            out.append([self.ids[SOS], *ids[:n], self.ids[EOS]] + [0] * (n - len(ids)))
        return torch.tensor(out)


norm = functools.partial(LayerNorm, eps=1e-5)


class ViT(nn.Module):
    """images (B, 3, H, H), normalised -> I_f (B, D): the class token after the last layer."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.patch_embed.proj.bias = None
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(torch.zeros(1 + self.grid**2, dim))
        self.norm_pre, self.norm = norm(dim), norm(dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, act=quick_gelu, norm=norm)
                                      for _ in range(depth)))

    def forward(self, images):
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed[1:]  # (B, N, D)
        cls = (self.cls_token + self.pos_embed[0]).expand(len(x), 1, -1)
        x = self.norm_pre(torch.cat([cls, x], dim=1))  # (B, 1 + N, D); vit.py has no norm_pre
        return self.norm(self.blocks(x)[:, 0])


def conv(channels, width, side, stride=1):
    """Convolution, batch norm, ReLU."""
    return (nn.Conv2d(channels, width, side, stride, side // 2, bias=False),
            nn.BatchNorm2d(width), nn.ReLU())


class Bottleneck(nn.Module):
    """(B, C, H, W) -> (B, 4 width, H / stride, W / stride); a stride is a mean over squares."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.body = nn.Sequential(*conv(channels, width, 1), *conv(width, width, 3),
                                  nn.AvgPool2d(stride), *conv(width, 4 * width, 1)[:2])
        self.shortcut = nn.Identity() if channels == 4 * width else nn.Sequential(
            nn.AvgPool2d(stride), *conv(channels, 4 * width, 1)[:2])

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """images (B, 3, H, H), normalised -> I_f (B, 4 dim): attention pooling instead of a mean.

    depth: layers in each stage. A stage halves the sides (but the first one) and doubles the width,
    up to `dim`. A single number is divided among two stages: 4 x 4 places for 32 x 32 pixels.
    """

    def __init__(self, image_size=32, dim=128, depth=4):
        super().__init__()
        depth = (depth - depth // 2, depth // 2) if isinstance(depth, int) else depth
        w, self.patch_size = dim >> (len(depth) - 1), 2 << len(depth)
        if image_size % self.patch_size or dim % 16 or dim % (1 << len(depth)) or not all(depth):
            raise data.UserError(f"a ResNet of {len(depth)} stages needs --image-size divisible by "
                                 f"{self.patch_size}, --dim by 16, --depth of at least 2")
        self.grid = image_size // self.patch_size
        self.stem = nn.Sequential(*conv(3, w // 2, 3, stride=2), *conv(w // 2, w // 2, 3),
                                  *conv(w // 2, w, 3), nn.AvgPool2d(2))
        self.stages = nn.Sequential(*(nn.Sequential(
            Bottleneck(2 * w << i, w << i, 2) if i else Bottleneck(w, w),
            *(Bottleneck(4 * w << i, w << i) for _ in range(layers - 1)))
            for i, layers in enumerate(depth)))
        self.pos_embed = nn.Parameter(torch.zeros(1 + self.grid**2, 4 * dim))
        self.pool = Attention(4 * dim, 4 * dim // 64)
        self.pool.proj = nn.Identity()  # W_i takes its place

    def forward(self, images):
        x = self.stages(self.stem(images)).flatten(2).transpose(1, 2)  # (B, N, 4 dim)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.pos_embed
        return self.pool(x[:, :1], context=x)[:, 0]  # the mean asks; it and all places answer


class TextTransformer(nn.Module):
    """ids (B, 77) -> T_f (B, D): what stands at [EOS], which sees all tokens before it."""

    def __init__(self, vocab_size=1024, context_length=77, dim=128, depth=2, heads=4):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(context_length, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, act=quick_gelu, norm=norm, causal=True)
                                      for _ in range(depth)))
        self.norm = norm(dim)

    def tokens(self, ids, before=()):
        """ids (B, n) -> (B, n, D). before [(B, m, D)]: tokens to begin with, dropped at the end."""
        x = self.token_embed(ids) + self.pos_embed[:ids.shape[1]]  # (B, n, D)
        x = self.blocks(torch.cat([*before, x], dim=1))  # (B, m + n, D)
        return self.norm(x[:, -ids.shape[1]:])

    def forward(self, ids):
        eos = ids.argmax(1)  # [EOS] is the largest id
        x = self.tokens(ids[:, :eos.max() + 1])  # causal: what follows the last [EOS] does nothing
        return x[torch.arange(len(x), device=x.device), eos]


class CBOW(nn.Module):
    """ids (B, 77) -> T_f (B, D): the mean of the tokens' vectors, whatever their order."""

    def __init__(self, vocab_size=1024, dim=128):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, dim)

    def forward(self, ids):
        eos = ids.argmax(1, keepdim=True)
        place = torch.arange(eos.max() + 1, device=ids.device)  # beyond, there is padding only
        inside = (place <= eos)[:, :, None]  # (B, n, 1)
        return (self.token_embed(ids[:, :len(place)]) * inside).sum(1) / (eos + 1)


def l2_normalize(x, axis):
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse for cosines
    return x / x.norm(dim=axis, keepdim=True)


class CLIP(nn.Module):
    """images (B, 3, H, H), normalised, ids (B, 77) -> logits (B, B), a row for each image."""

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, embed_dim=512,
                 text_dim=128, text_depth=2, text_heads=4, vocab_size=1024, context_length=77,
                 image_encoder="vit", text_encoder="transformer"):
        super().__init__()
        vit = image_encoder == "vit"
        self.image_encoder = (ViT(image_size, patch_size, dim, depth, heads) if vit else
                              ResNet(image_size, dim, depth))
        self.text_encoder = CBOW(vocab_size, text_dim) if text_encoder == "cbow" else \
            TextTransformer(vocab_size, context_length, text_dim, text_depth, text_heads)
        self.W_i = nn.Linear(dim if vit else 4 * dim, embed_dim, bias=not vit)
        self.W_t = nn.Linear(text_dim, embed_dim, bias=False)
        self.t = nn.Parameter(torch.tensor(0.0))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal, by the ends of names; t = ln(1 / 0.07); PyTorch's own for what is not named."""
        image, d_i, d_t = self.image_encoder, self.W_i.in_features, self.W_t.in_features
        deep = (2 * d_t * len(getattr(self.text_encoder, "blocks", [0]))) ** -0.5
        stds = {"W_i.weight": d_i**-0.5, "W_t.weight": d_t**-0.5, "cls_token": d_i**-0.5,
                "image_encoder.pos_embed": d_i**-0.5, "pool.qkv.weight": d_i**-0.5,
                "token_embed.weight": 0.5, "text_encoder.pos_embed": 0.1,
                "attn.qkv.bias": 0, "attn.proj.bias": 0, "fc1.bias": 0, "fc2.bias": 0,
                "body.8.weight": 0}  # each layer of a ResNet starts as the identity
        blocks = {"image": {"attn.qkv.weight": d_i**-0.5, "attn.proj.weight": d_i**-0.5,
                            "fc1.weight": (2.5 * d_i) ** -0.5, "fc2.weight": (2.5 * d_i) ** -0.5},
                  "text_": {"attn.qkv.weight": d_t**-0.5, "attn.proj.weight": deep,
                            "fc1.weight": (2 * d_t) ** -0.5, "fc2.weight": deep}}
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, p in self.named_parameters():
            for end, std in (stds | blocks.get(name[:5], {})).items():
                if name.endswith(end):
                    nn.init.normal_(p, std=std)
        nn.init.constant_(self.t, math.log(1 / 0.07))
        if isinstance(image, ViT):
            image.pos_embed[1:] = sincos_2d(d_i, image.grid)
            nn.init.normal_(image.patch_embed.proj.weight, std=(3 * image.patch_size**2) ** -0.5)

    def forward(self, I, T):
        """The slide's pseudo-code, in its words. [n, d_i]: d_i numbers for each of n images."""
        # extract feature representations of each modality
        I_f = self.image_encoder(I)  # [n, d_i]
        T_f = self.text_encoder(T)  # [n, d_t]
        # joint multimodal embedding [n, d_e]
        I_e = l2_normalize(self.W_i(I_f), axis=1)
        T_e = l2_normalize(self.W_t(T_f), axis=1)
        # scaled pairwise cosine similarities [n, n]
        return self.logits(I_e, T_e)

    def logits(self, I_e, T_e):
        with torch.autocast(I_e.device.type, enabled=False):
            return (I_e @ T_e.T) * torch.exp(self.t)

    def loss(self, I, T):
        """-> (the loss of picking a text for each image and an image for each text, logits)."""
        logits = self(I, T)
        # symmetric loss function
        labels = torch.arange(len(logits), device=logits.device)
        loss_i = F.cross_entropy(logits, labels)  # axis=0 on the slide: the examples are the rows
        loss_t = F.cross_entropy(logits.T, labels)  # axis=1: they are the columns
        return (loss_i + loss_t) / 2, logits

    def features(self, images):
        """(B, 3, H, H) -> I_f (B, d_i), before the projection."""
        return self.image_encoder(images)

    def encode_image(self, images):
        return self.W_i(self.image_encoder(images))  # (B, d_e), not normalised

    def encode_text(self, ids):
        return self.W_t(self.text_encoder(ids))  # (B, d_e), not normalised

    def classifier(self, prompts):
        """Slide "Zero-Shot", (2): prompts (K, M, 77), M a class -> a function, images -> (B, K)."""
        T_e = [l2_normalize(self.encode_text(T), axis=1) for T in prompts.flatten(0, 1).split(400)]
        classes = torch.cat(T_e).unflatten(0, prompts.shape[:2]).mean(1)  # (K, d_e), of M prompts
        classes = l2_normalize(classes, axis=1)
        return lambda I: self.logits(l2_normalize(self.encode_image(I), axis=1), classes)

    @classmethod
    def from_pretrained(cls, path):
        """From an OpenAI archive, a plain state dict in their names, or this script's file.

        Their archives are TorchScript, and to read one is to run the program in it: read those that
        you trust, and keep the tensors: torch.save(torch.jit.load(path).state_dict(), "plain.pt").
        The model comes in eval mode, which a ResNet needs.
        """
        with data.refuse(f"{path}: not a whole TorchScript archive"):
            archive = zipfile.is_zipfile(path) and any(
                name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())
            content = (torch.jit.load(data.whole(path), map_location="cpu").state_dict()
                       if archive else data.load_checkpoint(path))
        own = content.get("script") == "clip"
        with data.refuse(f"{path}: does not hold a CLIP"):
            state, args = (content["model"], content["args"]) if own else (openai(content), {})
            if args.get("objective", "contrastive") != "contrastive":
                raise ValueError(f"it was trained with --objective {args['objective']}")
            image = {k[14:]: v for k, v in state.items() if k.startswith("image_encoder.")}
            text = {k[13:]: v for k, v in state.items() if k.startswith("text_encoder.")}
            count = lambda names, start: len({name[len(start):].split(".")[0] for name in names
                                              if name.startswith(start)})
            if vit := "cls_token" in image:
                dim, _, _, P = image["patch_embed.proj.weight"].shape
                depth = count(image, "blocks.")
            else:
                depth = [count(image, f"stages.{i}.") for i in range(count(image, "stages."))]
                dim, P = len(image["pool.qkv.bias"]) // 12, 2 << len(depth)
            vocab_size, d_t = text["token_embed.weight"].shape
            places = len(text.get("pos_embed", []))
            model = cls(P * math.isqrt(len(image["pos_embed"]) - 1), P, dim, depth,
                        args.get("heads") or dim // 64, len(state["W_t.weight"]), d_t,
                        count(text, "blocks."), args.get("text_heads") or d_t // 64, vocab_size,
                        places, "vit" if vit else "resnet", "transformer" if places else "cbow")
            model.load_state_dict(state)
            model.released = not own
        return model.eval()


OPENAI = {  # their names -> ours: regular expressions, each applied to what the one before left
    r"visual\.attnpool\.c_proj": "W_i", r"visual\.proj": "W_i.weight", "visual": "image_encoder",
    "^(?=transformer|token_emb|positional|ln_final)": "text_encoder.", "logit_scale": "t",
    r"(transformer|attnpool)\.": "", "token_embedding": "token_embed", "resblocks": "blocks",
    "positional_embedding": "pos_embed", "class_embedding": "cls_token", "in_proj_": "qkv.",
    "text_projection": "W_t.weight", "out_proj": "proj", "ln_(?=[12])": "norm", "c_fc": "fc1",
    "ln_pre": "norm_pre", "ln_(post|final)": "norm", "c_proj": "fc2",
    r"layer(\d)": lambda m: f"stages.{int(m[1]) - 1}",
    r"downsample\.(\d)": lambda m: f"shortcut.{int(m[1]) + 1}",
    r"(\d)\.conv(\d)": lambda m: f"{m[1]}.body.{'037'[int(m[2]) - 1]}",
    r"(\d)\.bn(\d)": lambda m: f"{m[1]}.body.{'148'[int(m[2]) - 1]}",
    r"encoder\.(conv|bn)(\d)": lambda m: f"encoder.stem.{3 * int(m[2]) - 3 + (m[1] == 'bn')}"}


def openai(content):
    """A state dict in OpenAI's names -> in ours."""
    state, vit = {}, "visual.proj" in content
    for name, tensor in content.items():
        name = name.replace("visual.conv1", "visual.patch_embed.proj") if vit else name
        for theirs, ours in OPENAI.items():
            name = re.sub(theirs, ours, name)
        if name not in ("input_resolution", "context_length", "vocab_size"):  # no weights
            state[name] = tensor
    for name in ("W_t.weight", "W_i.weight")[:1 + vit]:
        state[name] = state[name].T
    for part in () if vit else ("weight", "bias"):
        state["image_encoder.pool.qkv." + part] = torch.cat(
            [state.pop(f"image_encoder.{q}_proj.{part}") for q in "qkv"])
    return state


class BagOfWords(nn.Module):
    """Before CLIP, 2: from the picture, predict the tokens of its caption, in whatever order."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip  # of which the image encoder is used
        self.head = nn.Linear(clip.W_i.in_features, clip.text_encoder.token_embed.num_embeddings)

    def shares(self, ids):
        """(..., 77) -> (..., V), summing to 1: equal shares of the tokens between [SOS], [EOS]."""
        place, eos = torch.arange(ids.shape[-1], device=ids.device), ids.argmax(-1, keepdim=True)
        share = ((place > 0) & (place < eos)) / (eos - 1).clamp(min=1)
        return share.new_zeros(*ids.shape[:-1], self.head.out_features).scatter_add(-1, ids, share)

    def loss(self, images, ids):
        logits = self.head(self.clip.features(images)).float()  # (B, V)
        return F.cross_entropy(logits, self.shares(ids)), logits

    def classifier(self, prompts):
        W = self.shares(prompts).mean(1).T  # (V, K)
        return lambda images: self.head(self.clip.features(images)).float().log_softmax(1) @ W


class Captioner(nn.Module):
    """Before CLIP, 1: with the picture as four tokens to begin with, write its caption."""

    def __init__(self, clip):
        super().__init__()
        self.clip, d_t = clip, clip.W_t.in_features  # both encoders are used, the text's to write
        self.prefix = nn.Linear(clip.W_i.in_features, 4 * d_t)
        self.head = nn.Linear(d_t, clip.text_encoder.token_embed.num_embeddings)

    def log_p(self, I_f, ids):
        """I_f (B, d_i), ids (B, 77) -> log p of the tokens after [SOS], 0 after [EOS]: (B, n)."""
        eos = ids.argmax(1, keepdim=True)
        ids = ids[:, :eos.max() + 1]  # (B, 1 + n)
        x = self.clip.text_encoder.tokens(ids[:, :-1], [self.prefix(I_f).unflatten(1, (4, -1))])
        log_p = -F.cross_entropy(self.head(x).float().transpose(1, 2), ids[:, 1:], reduction="none")
        return log_p * (torch.arange(1, ids.shape[1], device=ids.device) <= eos)

    def loss(self, images, ids):
        log_p = self.log_p(self.clip.features(images), ids)
        return -log_p.sum() / ids.argmax(1).sum(), log_p  # per token

    def classifier(self, prompts):
        """A class scores log p of the first of its prompts (K, M, 77) as a caption's beginning."""
        ids = prompts[:, 0, :prompts[:, 0].argmax(1).max() + 1]  # (K, 1 + n)
        words = ids[:, 1:] < self.head.out_features - 1  # without [EOS]
        return lambda images: torch.stack([(self.log_p(f.expand(len(ids), -1), ids) * words).sum(1)
                                           for f in self.clip.features(images)])


OBJECTIVES = {"contrastive": lambda clip: clip, "bow": BagOfWords, "caption": Captioner}


def zero_shot_task(dataset, tokenizer):
    """-> K names, prompts (K, M, 77) of them, {part: (pictures, right names)}.

    shapes: the 80 pairs of colour and shape, in the captions' words with every size and place.
    Other data sets: their class names, in CLIP's templates for CIFAR. The first is "one prompt".
    """
    device, names, templates = dataset.mean.device, dataset.class_names, data.CIFAR_TEMPLATES
    parts = {"seen": (dataset.test_images, dataset.test_labels)}
    if dataset.name == "shapes":
        names = [f"{colour} {shape}" for shape in data.SHAPES for colour in data.COLOURS]
        find = lambda texts: torch.tensor([next(k for k, name in enumerate(names) if name in text)
                                           for text in texts], device=device)
        templates = ["one {}"] + [
            wording.replace("{colour} {shape}", "{{}}").format(size=size, place=place)
            for wording in data.WORDINGS for size in ("small", "big") for place in data.PLACES]
        parts = {"seen": (dataset.test_images, find(dataset.test_captions)),
                 "unseen": (dataset.unseen_images, find(dataset.unseen_captions))}
    prompts = tokenizer([t.format(name) for name in names for t in templates], truncate=True)
    return names, prompts.unflatten(0, (len(names), -1)).to(device), parts


def zero_shot(model, dataset, parts, prompts, amp, limit=None):
    """Slide "Zero-Shot", (3): prompts (K, M, 77) -> accuracy on `limit` pictures of each part."""
    with torch.no_grad(), amp:
        classify = model.classifier(prompts)
    return {f"zero_shot_{part}": (data.extract(classify, dataset, images[:limit], amp).argmax(1)
                                  == right[:limit]).float().mean().item()
            for part, (images, right) in parts.items()}


def retrieval(model, dataset, tokenizer, amp, n=1000):
    """Recall at 1, 5 and 10 among n test pairs: texts of an image, images of a text. Right is what
    says the same: captions of the same words, but for fillers and commas, in whatever order."""
    images, captions = dataset.test_images[:n], dataset.test_captions[:n]
    ids = tokenizer(captions, truncate=True).to(images.device)
    with torch.no_grad(), amp:
        T_e = l2_normalize(torch.cat([model.encode_text(T) for T in ids.split(200)]), axis=1)
    I_e = l2_normalize(data.extract(model.encode_image, dataset, images, amp), axis=1)
    said = [frozenset(c.replace(",", "").split()) - {"a", "one", "there", "is"} for c in captions]
    fact = torch.tensor([said.index(words) for words in said], device=images.device)
    hit = lambda cosine, k: (fact[cosine.topk(min(k, len(fact))).indices] == fact[:, None]).any(1)
    return {key: [hit(cosine, k).float().mean().item() for k in (1, 5, 10)] for key, cosine in (
        ("image_to_text", I_e @ T_e.T), ("text_to_image", T_e @ I_e.T))}


def multiply_adds(encoder, image_size):
    """The arithmetic of an image encoder for one picture."""
    picture = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(encoder).eval().to("meta")(picture)
    return counter.get_total_flops() / 2


@torch.no_grad()
def draw(model, dataset, tokenizer, task, out, amp):
    """prompts.png: pictures, each with bars for its five likeliest prompts, the right one in green.
    similarity.png: 12 test pictures, and a row for each one's caption, darker where closer."""
    names, prompts, parts = task
    shown = [(image, k) for images, right in parts.values()
             for image, k in zip(images[:16 // len(parts)], right.tolist())]
    sheet, H = [], dataset.image_size
    with amp:
        logits = model.classifier(prompts)(dataset.normalise(torch.stack([x for x, _ in shown])))
    for (image, right), p in zip(shown, logits.softmax(1).tolist()):
        ranked = sorted(range(len(p)), key=lambda k: -p[k])
        print(f"{names[right]} ({p[right]:.1%}) ranked {ranked.index(right) + 1} out of {len(p)}")
        bars = torch.full((3, H, H), 255, dtype=torch.uint8)
        for i, k in enumerate(ranked[:5]):
            print(f"    {'✓' if k == right else '✗'} {names[k]} {p[k]:.1%}")
            colour = torch.tensor((50, 160, 80) if k == right else (205, 90, 80))[:, None, None]
            bars[:, i * H // 5 + 1:(i + 1) * H // 5, :round(p[k] * H)] = colour
        sheet += [image.cpu(), bars]
    data.save_png(out / "prompts.png", torch.stack(sheet), columns=8)
    if not isinstance(model, CLIP):
        return ["prompts.png"]
    images, captions = dataset.test_images[:12], dataset.test_captions[:12]
    with amp:
        ids = tokenizer(captions, truncate=True).to(images.device)
        shade = model(dataset.normalise(images), ids).T[:, :, None, None, None]  # (text, image)
    shade = (shade - shade.min()) / (shade.max() - shade.min())
    ink = torch.tensor([1, 0.7, 0.3], device=images.device)[:, None, None].expand(3, H, H)
    sheet = torch.cat([images[None] / 255, 1 - shade * ink]).flatten(0, 1)
    data.save_png(out / "similarity.png", sheet, columns=len(images))
    print("\n".join(f"similarity.png, row {i + 2}: {text}" for i, text in enumerate(captions)))
    return ["prompts.png", "similarity.png"]


def charts(out, folders):
    """Zero-shot accuracy against pictures and against arithmetic, of this run and of others."""
    pictures, arithmetic = {}, {}
    for folder in map(pathlib.Path, [out, *folders]):
        with data.refuse(f"--compare {folder}: holds no zero_shot.csv of clip.py"):
            log = data.read_log(folder / "zero_shot.csv")
            pictures[folder.name] = zip(log["images_seen"], log["zero_shot_seen"])
            arithmetic[folder.name] = zip(log["multiply_adds"], log["zero_shot_seen"])
    words = "zero-shot accuracy, one prompt"
    data.save_chart(out / "zero_shot.svg", pictures, "pictures seen", words)
    data.save_chart(out / "arithmetic.svg", arithmetic, "10^12 multiply-adds of the image encoder",
                    words)
    return ["zero_shot.svg", "arithmetic.svg"]


def evaluate(model, dataset, tokenizer, task, scores, out, args, amp):
    """Adds every score to `scores`, draws the pictures and returns their names."""
    names, prompts, parts = task
    scores["chance"], clip = 1 / len(names), model if isinstance(model, CLIP) else model.clip
    one = zero_shot(model, dataset, parts, prompts[:, :1], amp)
    scores |= one if args.objective == "caption" else zero_shot(model, dataset, parts, prompts, amp)
    scores |= {key + "_one_prompt": value for key, value in one.items()}
    if clip is model:
        scores |= retrieval(model, dataset, tokenizer, amp)
    untrained = copy.deepcopy(clip)
    torch.manual_seed(args.seed)
    untrained.init_weights()
    scores |= data.probe_scores(dataset, clip.features, untrained.features, amp)
    return draw(model, dataset, tokenizer, task, out, amp)


def parse_args(argv=None):
    parser, number = data.Parser(__doc__), data.number
    data.common_options(parser, "clip", SIZES, steps=1650, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "steps of linear warm-up", type=number(int, 0))
    parser.add("--weight-decay", 0.05, "of matrices", type=number(float, 0, 10))
    parser.add("--augment", "light", "light: shift, mirror (left is then right in the caption)",
               choices=["none", "light"])
    parser.add("--objective", "contrastive", "bow: predict the words; caption: write them",
               choices=OBJECTIVES)
    parser.add("--image-encoder", None, "else the size's", choices=["vit", "resnet"])
    parser.add("--text-encoder", "cbow", "cbow: the mean of the tokens' vectors; for --objective "
               "caption, always transformer", choices=["transformer", "cbow"])
    for name, what in (("embed-dim", "width of the joint embedding"),
                       ("text-dim", "width of the text encoder"), ("text-depth", "its layers"),
                       ("text-heads", "its attention heads")):
        parser.add(f"--{name}", None, f"{what}, else the size's", type=number(int, 1, 65536))
    parser.add("--tokenizer", None, "OpenAI's bpe_simple_vocab_16e6.txt.gz; else learn one")
    parser.add("--vocab-size", 1024, "most tokens to learn", type=number(int, 514))
    parser.add("--compare", [], "folders of other runs, for the charts", nargs="+")
    args = data.parse(parser, "clip", SIZES, argv)
    args.text_encoder = "transformer" if args.objective == "caption" else args.text_encoder
    if args.text_dim % args.text_heads:
        raise data.UserError(f"--text-heads {args.text_heads} must divide --text-dim "
                             f"{args.text_dim}")
    for folder in args.compare:
        if not (pathlib.Path(folder) / "zero_shot.csv").is_file():
            raise data.UserError(f"--compare {folder}: not the --out folder of a run of clip.py")
    return args


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * min((step + 1) / (args.warmup + 1), 0.5 * (1 + math.cos(math.pi * progress)))


def pick_tokenizer(args, dataset, model):
    """--tokenizer, else that of --load, else one learned from the captions."""
    if model and model.released and not args.tokenizer:
        raise data.UserError(f"--load {args.load}: needs --tokenizer bpe_simple_vocab_16e6.txt.gz")
    tokenizer = Tokenizer.train(dataset.train_captions, args.vocab_size) if not (
        args.tokenizer or model) else Tokenizer.from_file(args.tokenizer or args.load)
    if model and tokenizer.vocab_size != (n := model.text_encoder.token_embed.num_embeddings):
        raise data.UserError(f"--tokenizer {args.tokenizer}: {tokenizer.vocab_size} tokens, but "
                             f"--load {args.load} has {n}")
    args.merges = tokenizer.merges  # so that the checkpoint holds them
    return tokenizer


def mirror(images, ids, left, right):
    """Mirrors half of the pictures, and says left for right in their captions (each one token)."""
    turn = torch.rand(len(images), device=images.device) < 0.5
    images = torch.where(turn[:, None, None, None], images.flip(3), images)
    if len(left) == len(right) == 1:
        swapped = torch.where(ids == left[0], right[0], torch.where(ids == right[0], left[0], ids))
        ids = torch.where(turn[:, None], swapped, ids)
    return images, ids


def train(args):
    device, out = data.pick_device(args.device), pathlib.Path(args.out)
    amp = autocast(device, args.precision)
    if args.load:
        model = CLIP.from_pretrained(args.load)
        args.steps, args.patch_size = 0, model.image_encoder.patch_size
        args.image_size = model.image_encoder.grid * args.patch_size
    dataset = data.open_data(args, device)
    if args.load and model.released:
        dataset.mean, dataset.std = torch.tensor(PIXELS, device=device)
    tokenizer = pick_tokenizer(args, dataset, model if args.load else None)
    texts = tokenizer(dataset.train_captions, truncate=True).to(device)  # (all, 77)
    sides = [tokenizer.encode(word) for word in ("left", "right")]
    _, prompts, parts = task = zero_shot_task(dataset, tokenizer)
    torch.manual_seed(args.seed)
    if not args.load:
        model = CLIP(args.image_size, args.patch_size, args.dim, args.depth, args.heads,
                     args.embed_dim, args.text_dim, args.text_depth, args.text_heads,
                     tokenizer.vocab_size, 77, args.image_encoder, args.text_encoder)
        work = multiply_adds(model.image_encoder, args.image_size) / 1e12
        model = OBJECTIVES[args.objective](model)
    model.to(device)
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == decays],
                   weight_decay=args.weight_decay * decays) for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=device.type != "mps")
    start, scores = data.resume(args, "clip", model=model, optimizer=optimizer)

    def save(step):
        data.save_checkpoint(out / "checkpoint.pt", script="clip", model=model.state_dict(),
                             ema=None, optimizer=optimizer.state_dict(), step=step,
                             args=vars(args), scores=scores)

    loss_function = torch.compile(model.loss) if args.compile else model.loss
    for step in (steps := data.Steps(args, start, scores)):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = data.batch_index(len(texts), args.batch_size, step, args.seed).to(device)
        x, ids = dataset.train_images[index], texts[index]
        if args.augment == "light":
            x, ids = mirror(x, ids, *sides)
            x = data.augment(x, pad=2 if dataset.name == "shapes" else 4, flip=False)
        with amp:
            loss, _ = loss_function(dataset.normalise(x), ids)
        optimizer.zero_grad()
        loss.backward()
        steps.check(step, loss, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        if args.objective == "contrastive":  # so that logits are never scaled by over 100
            model.t.data.clamp_(max=math.log(100))
        scores = dict(loss=steps.loss, seconds=steps.seconds(), images_seen=(step + 1) * len(x))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=steps.loss,
                     lr=rate)
        if (step + 1) % max(1, args.steps // 10) == 0:
            model.eval()
            found = zero_shot(model, dataset, parts, prompts[:, :1], amp, limit=250)
            model.train()
            data.log(out / "zero_shot.csv", step, images_seen=scores["images_seen"],
                     multiply_adds=scores["images_seen"] * work, **found)
        if steps.due(step):
            save(step + 1)

    model.eval()
    files = evaluate(model, dataset, tokenizer, task, scores, out, args, amp)
    if not args.load:
        save(max(start, args.steps))
        files += [*charts(out, args.compare), "checkpoint.pt", "log.csv", "zero_shot.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
