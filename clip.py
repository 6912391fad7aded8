"""CLIP: "Learning Transferable Visual Models From Natural Language ...", Radford 2021, 2103.00020.

Encode a batch of images and a batch of their captions, and train both encoders to find out which
caption belongs to which image. For this they must learn what is in an image and what words mean.
Then a sentence is a classifier: an image belongs to the class whose prompt is most similar to it.

    logits = e^t I_e T_e^T,  loss = (cross_entropy(logits, [0..B-1]) + the same of logits^T) / 2

    python clip.py                                    # the default data set, "shapes"
    python clip.py --text-encoder transformer --out out/order     # it knows the words' order
    python clip.py --objective bow --out out/bow      # predict which words are in the caption
    python clip.py --image-encoder resnet --out out/resnet --compare out/clip
    python clip.py --load ViT-B-32.pt --tokenizer bpe_simple_vocab_16e6.txt.gz --data cifar10

Default run, seed 0, 25 minutes on one older core (5:24 on two newer). Zero-shot, 80 pairs of color
and shape as the classes: 0.957 on images of pairs seen in training, 0.858 on those in no caption
(chance 0.013). A linear classifier of I_f tells the shape: 0.993 (untrained 0.363, pixels 0.326).

Differences from the paper:
1. Small encoders and batches, a tokenizer learned from the captions, CBOW for the text: all faster.
   Initial std: text tokens 0.5 (theirs: 0.02), their positions 0.1 (theirs: 0.01); ViT: Xavier's.
2. For small images: random shift and mirroring (left and right exchanged in the caption), no crops.
   For a short run: learning rate 1e-3 (5e-4), weight decay 0.05 (0.2), gradient norm at most 1.
3. `bow`, `caption`: no details are published. Ours choose the class with the likeliest words.
"""

import collections
import functools
import gzip
import math
import pathlib
import re

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import Attention, Block, LayerNorm, PatchEmbed, patchify, quick_gelu, sincos_2d
from data import UserError

# --------------------------------------------------------------------------------------- the model


class ImageTransformer(nn.Module):
    """Images (B, 3, H, H), normalized -> I_f (B, D): the class token after the last layer.

    A ViT with one more LayerNorm, before the first layer. Inside CLIP, `dim` is the slide's d_i,
    and CLIP calls `init_weights`; without CLIP, call it yourself: positions are zero until then.
    To copy this, also copy: transformer_layers, Block, Attention, MLP, LayerNorm, PatchEmbed,
    patchify, quick_gelu, sincos_2d.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, exact_gelu=False):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.patch_embed.proj.bias = None  # CLIP's patch projection has no bias
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(torch.zeros(1 + self.grid**2, dim))  # row 0: class token
        self.norm_pre = LayerNorm(dim, eps=1e-5)
        self.blocks = transformer_layers(dim, depth, heads, exact_gelu=exact_gelu)
        self.norm = LayerNorm(dim, eps=1e-5)

    @torch.no_grad()
    def init_weights(self):
        """CLIP.init_weights calls it. The layers (the loop below): Xavier's std, which is
        sqrt(2 / (inputs + outputs))."""
        P = self.patch_size
        dim = len(self.cls_token)
        nn.init.normal_(self.patch_embed.proj.weight, std=(3 * P**2) ** -0.5)
        # Short vectors, as by the authors: norm_pre makes all tokens equally long.
        nn.init.normal_(self.cls_token, std=dim**-0.5)
        nn.init.normal_(self.pos_embed[0], std=dim**-0.5)
        self.pos_embed[1:] = sincos_2d(dim, self.grid)  # start values: the table is trained
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=dim**-0.5)  # Xavier for each of q, k, v
            nn.init.normal_(block.attn.proj.weight, std=dim**-0.5)  # Xavier: dim -> dim
            nn.init.normal_(block.mlp.fc1.weight, std=(2.5 * dim) ** -0.5)  # Xavier: dim -> 4 dim
            nn.init.normal_(block.mlp.fc2.weight, std=(2.5 * dim) ** -0.5)
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(linear.bias)

    def forward(self, images):
        side = self.grid * self.patch_size
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(images.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N, D)
        x = x + self.pos_embed[1:]
        cls_token = self.cls_token + self.pos_embed[0]
        x = torch.cat([cls_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class TextTransformer(nn.Module):
    """ids (B, 77) -> T_f (B, D): the output at [EOS], the last token before the padding. As
    attention is causal, it sees the whole text, and no token before it does.

    Inside CLIP, `dim` is the slide's d_t, and CLIP calls `init_weights`; else call it yourself.
    To copy this, also copy: transformer_layers, eos_position, Block, Attention, MLP, LayerNorm,
    quick_gelu.
    """

    def __init__(self, vocab_size=1024, context_length=77, dim=128, depth=2, heads=4,
                 exact_gelu=False):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(context_length, dim))
        self.blocks = transformer_layers(dim, depth, heads, exact_gelu=exact_gelu, causal=True)
        self.norm = LayerNorm(dim, eps=1e-5)

    @torch.no_grad()
    def init_weights(self):
        """CLIP.init_weights calls it. The authors' numbers, but, for a short run, larger ones for
        token_embed and pos_embed; and zero for the biases of the MLPs."""
        dim = self.pos_embed.shape[1]
        depth = len(self.blocks)
        nn.init.normal_(self.token_embed.weight, std=0.5)
        nn.init.normal_(self.pos_embed, std=0.1)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * dim) ** -0.5)
            # These two add to x in each layer: smaller, so that x does not grow with the depth.
            nn.init.normal_(block.attn.proj.weight, std=(2 * dim * depth) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=(2 * dim * depth) ** -0.5)
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(linear.bias)

    def tokens(self, ids, prefix=None):
        """ids (B, N) -> (B, N, D). prefix (B, n, D): only for Captioner, far below, which puts n
        vectors of the image before those of the tokens. (It makes each of the n with other weights,
        so they need no positions.)"""
        N = ids.shape[1]
        x = self.token_embed(ids) + self.pos_embed[:N]  # (B, N, D)
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)  # (B, n + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -N:])  # without the prefix

    def forward(self, ids):
        eos = eos_position(ids)  # (B,)
        # Attention is causal: the padding after [EOS] changes nothing. To save time, cut it off
        # after the longest text of the batch.
        x = self.tokens(ids[:, :eos.max() + 1])  # (B, N, D)
        return x[torch.arange(len(x), device=x.device), eos]  # of text b, the vector at eos[b]


class CBOW(nn.Module):
    """Continuous bag of words, ids (B, 77) -> T_f (B, D): the mean of the tokens' vectors, in which
    the order of the words is lost. CLIP calls `init_weights`.
    To copy this, also copy: eos_position.
    """

    def __init__(self, vocab_size=1024, dim=128):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, dim)

    def init_weights(self):
        nn.init.normal_(self.token_embed.weight, std=0.5)

    def forward(self, ids):
        eos = eos_position(ids)[:, None]  # (B, 1)
        ids = ids[:, :eos.max() + 1]  # (B, N): after it, there is only padding
        position = torch.arange(ids.shape[1], device=ids.device)
        is_text = position <= eos  # (B, N): not the padding
        x = self.token_embed(ids) * is_text[:, :, None]  # (B, N, D)
        return x.sum(1) / (eos + 1)  # the number of its tokens, at positions 0 to eos


def transformer_layers(dim, depth, heads, exact_gelu=False, causal=False):
    """`depth` Transformer layers, with CLIP's quick_gelu or with the exact GELU.

    To copy this, also copy: Block, Attention, MLP, LayerNorm, quick_gelu.
    """
    act = F.gelu if exact_gelu else quick_gelu
    norm = functools.partial(LayerNorm, eps=1e-5)
    return nn.ModuleList(
        Block(dim, heads, act=act, norm=norm, causal=causal) for _ in range(depth))


def eos_position(ids):
    """ids (..., 77) -> the position of [EOS] in each text, (...). Its id is the largest of all."""
    return ids.argmax(-1)


def l2_normalize(x, axis):
    """Vectors of length 1, in float32 or float64: bfloat16 is too coarse for cosines."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 to float32; float64 stays
    return x / x.norm(dim=axis, keepdim=True)


class CLIP(nn.Module):
    """images (B, 3, H, H), normalized, and ids (B, 77) -> logits (B, B), a row for each image.

    image_encoder: "vit" or "resnet". text_encoder: "transformer", or "cbow" as in this script's
    default run. exact_gelu: not CLIP's quick_gelu. In a training, keep t at most log(100).
    (For "vit" alone, a copy needs no ResNet, Bottleneck and conv_and_norm.)
    To copy this, also copy: ImageTransformer, TextTransformer, CBOW, transformer_layers,
    eos_position, l2_normalize, ResNet, Bottleneck, conv_and_norm, Block, Attention, MLP, LayerNorm,
    PatchEmbed, patchify, quick_gelu, sincos_2d.
    """

    def __init__(self, image_size=32, patch_size=4, dim=128, depth=4, heads=4, embed_dim=512,
                 text_dim=128, text_depth=2, text_heads=4, vocab_size=1024, context_length=77,
                 image_encoder="vit", text_encoder="transformer", exact_gelu=False):
        super().__init__()
        if image_encoder == "vit":
            self.image_encoder = ImageTransformer(
                image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                exact_gelu=exact_gelu)
            self.W_i = nn.Linear(dim, embed_dim, bias=False)
        elif image_encoder == "resnet":
            self.image_encoder = ResNet(image_size, dim, depth)
            # The attention at the end of ResNet, far below, has no output projection of its own:
            # W_i serves as one, and so it has a bias.
            self.W_i = nn.Linear(4 * dim, embed_dim)
        else:
            raise ValueError(f"image_encoder must be 'vit' or 'resnet', not {image_encoder!r}")
        if text_encoder == "transformer":
            self.text_encoder = TextTransformer(
                vocab_size=vocab_size, context_length=context_length, dim=text_dim,
                depth=text_depth, heads=text_heads, exact_gelu=exact_gelu)
        elif text_encoder == "cbow":
            self.text_encoder = CBOW(vocab_size, text_dim)
        else:
            raise ValueError(f"text_encoder must be 'transformer' or 'cbow', not {text_encoder!r}")
        self.W_t = nn.Linear(text_dim, embed_dim, bias=False)
        # The slide calls t the temperature, but multiplies by e^t: so t is log(1 / temperature).
        self.t = nn.Parameter(torch.tensor(0.0))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """PyTorch's defaults everywhere, then the changes below. (__init__ has given the defaults
        already; data.untrained calls this again, on a copy of a trained model.)"""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.image_encoder.init_weights()
        self.text_encoder.init_weights()
        nn.init.normal_(self.W_i.weight, std=self.W_i.in_features**-0.5)
        nn.init.normal_(self.W_t.weight, std=self.W_t.in_features**-0.5)
        nn.init.constant_(self.t, math.log(1 / 0.07))

    def forward(self, I, T):
        """The slide's pseudo-code, in its words. Its n is B here, d_e is `embed_dim`."""
        # extract feature representations of each modality
        I_f = self.image_encoder(I)  # (B, d_i)
        T_f = self.text_encoder(T)  # (B, d_t)
        # joint multimodal embedding (B, d_e)
        I_e = l2_normalize(self.W_i(I_f), axis=1)
        T_e = l2_normalize(self.W_t(T_f), axis=1)
        # scaled pairwise cosine similarities (B, B)
        with torch.autocast(I_e.device.type, enabled=False):  # not in bfloat16: too coarse
            logits = (I_e @ T_e.T) * torch.exp(self.t)
        return logits

    def loss(self, I, T):
        """The slide's last four lines: -> loss, logits (B, B). As in the paper, if two images of
        the batch have equal captions, each one's caption still counts as wrong for the other."""
        logits = self(I, T)
        # symmetric loss function
        labels = torch.arange(len(logits), device=logits.device)
        # cross_entropy takes each row as one example: an image and all texts. For a text and all
        # images, transpose. (Which of the two the slide calls axis=0 does not matter for the sum.)
        loss_i = F.cross_entropy(logits, labels)  # a row: which text belongs to this image
        loss_t = F.cross_entropy(logits.T, labels)  # a column: which image belongs to this text
        loss = (loss_i + loss_t) / 2
        return loss, logits

    def features(self, images):
        """(B, 3, H, H) -> I_f (B, d_i), before the projection."""
        return self.image_encoder(images)

    def encode_image(self, images):
        """(B, 3, H, H) -> (B, d_e), not yet of length 1."""
        return self.W_i(self.image_encoder(images))

    def encode_text(self, ids):
        """(B, 77) -> (B, d_e), not yet of length 1."""
        return self.W_t(self.text_encoder(ids))

    def classifier(self, prompts):
        """Slide "Zero-Shot", (2): prompts (K, M, 77), M for each class. Returns a linear
        classifier, images (B, 3, H, H) -> logits (B, K): each class has one vector, the mean of the
        embeddings of its M prompts (all of length 1, before and after)."""
        T_e = []
        for T in prompts:  # (M, 77): the prompts of one class
            T_e.append(l2_normalize(self.encode_text(T), axis=1).mean(0))
        T_e = l2_normalize(torch.stack(T_e), axis=1)  # (K, d_e); a mean of unit vectors is shorter

        def classify(images):
            I_e = l2_normalize(self.encode_image(images), axis=1)  # (B, d_e)
            with torch.autocast(I_e.device.type, enabled=False):  # as in forward
                return (I_e @ T_e.T) * torch.exp(self.t)

        return classify

    @classmethod
    def from_pretrained(cls, path, heads=None, text_heads=None, exact_gelu=False):
        """From this script's files, OpenAI's, or open_clip's with OpenAI's parameter names
        (laion2b's). OpenAI's contain code that runs on loading: read only those that you trust.
        heads, text_heads: no released file tells them; None: as in OpenAI's encoders of this width.
        exact_gelu: True for open_clip's models whose names do not end in "-quickgelu"."""
        with data.errors_become(f"{path}: does not hold a CLIP"):
            state, sizes = data.read_clip(path, heads=heads, text_heads=text_heads)
            model = cls(**sizes, exact_gelu=exact_gelu)
            model.load_state_dict(state)
        return model.eval()  # so that a ResNet's batch norms use the stored statistics


# ------------------------------------------------------------------------ zero-shot classification


def tokenize_prompts(tokenizer, names, templates):
    """K names of classes, M templates as "a photo of a {}." -> ids of all prompts, (K, M, 77)."""
    texts = [template.format(name) for name in names for template in templates]
    ids = tokenizer(texts, truncate=True)  # (K * M, 77)
    return ids.unflatten(0, (len(names), len(templates)))


def zero_shot(model, dataset, parts, prompts, amp, limit=None):
    """Slide "Zero-Shot", (3): the accuracy on the first `limit` images of each part.

    prompts (K, M, 77). parts: {"seen": (images, targets), ...}, see data.zero_shot_task. amp: the
    context, made by data.autocast, in which the model computes.
    To copy this, also copy: data.extract.
    """
    with torch.no_grad(), amp:
        classify = model.classifier(prompts)
    scores = {}
    for part, (images, targets) in parts.items():
        # extract normalizes the images, and calls classify batch by batch, without gradients.
        logits = data.extract(classify, dataset, images[:limit], amp)  # (number of images, K)
        is_correct = logits.argmax(1) == targets[:limit]
        scores[f"zero_shot_{part}"] = is_correct.float().mean().item()
    return scores


# ----------------------------------------------------------------------------------- the tokenizer

SOS = "<|startoftext|>"
EOS = "<|endoftext|>"
# What counts as a word: [SOS], [EOS], an English ending such as 's, a run of letters, one digit, or
# a run of other characters. Spaces are dropped. Tokenizer puts Unicode's letters in the place of
# {letters}, likewise for {numbers}. (All as in OpenAI's pattern; (?i:...) ignores the case.)
WORD = (r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
        r"[{letters}]+|[{numbers}]|[^\s{letters}{numbers}]+")


@functools.lru_cache
def bytes_to_symbols():
    """Each of the 256 bytes -> the character that stands for it in tokens. The order of this dict
    gives the ids: its first entry has id 0.

    OpenAI's file of the vocabulary has spaces between symbols, so no symbol may be a space or
    another character that does not print. Most bytes are printed as themselves: 97 as "a". They
    come first, so "a" has the id 64. The others take letters from number 256 on: "Ā", "ā", ...
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    code = 256
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(code)
            code += 1
    return table


def symbols(word):
    """ "low" -> ("l", "o", "w</w>"): the bytes of a word; "</w>" marks its end. A character that
    UTF-8 cannot write (half of a UTF-16 pair) counts as "?".
    To copy this, also copy: bytes_to_symbols.
    """
    table = bytes_to_symbols()
    parts = [table[byte] for byte in word.encode("utf8", "replace")]
    parts[-1] += "</w>"
    return tuple(parts)


def merge(parts, pair):
    """("l", "o", "l", "o"), ("l", "o") -> ("lo", "lo"): joins each occurrence, from the left."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


class Tokenizer:
    """Lower-cased byte pair encoding, slide "Text Encoder": words are split into bytes, and then
    the pairs of neighbors that are frequent are joined again. A frequent word becomes one token.

    Ids, in this order: 256 bytes; 256 bytes at the end of a word; one for each merge; [SOS]; [EOS].
    With OpenAI's merges, the ids are those of OpenAI's tokenizer, with rare exceptions: U+0345,
    characters newer than this Python's Unicode tables, and wrongly decoded text, which OpenAI's
    tokenizer repairs first (with the package ftfy).
    To copy this, also copy: SOS, EOS, WORD, bytes_to_symbols, symbols, merge, data.clean_text,
    data.cleaning_table, data.resolve_entity, data.upper_case_entities, data.unicode_class.
    """

    def __init__(self, merges):
        """merges: ["l o", "lo w</w>", ...]: two symbols to join, in the order of learning."""
        self.merges = list(merges)
        self.rank = {}  # pair of symbols -> its number among the merges
        for i, line in enumerate(self.merges):
            first, second = line.split(" ")
            self.rank[first, second] = i

        # The vocabulary, in the order of ids.
        byte_symbols = list(bytes_to_symbols().values())
        tokens = byte_symbols + [symbol + "</w>" for symbol in byte_symbols]
        tokens += [line.replace(" ", "") for line in self.merges]
        tokens += [SOS, EOS]
        self.vocab_size = len(tokens)
        self.ids = {token: i for i, token in enumerate(tokens)}

        letters = data.unicode_class("L")
        numbers = data.unicode_class("N")
        self.pattern = re.compile(WORD.format(letters=letters, numbers=numbers))
        self.known = {}  # word -> its ids: each word is computed only once

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns the merges: joins the most frequent pair of neighbors, again and again."""
        # Count the words. Then each word becomes a tuple of symbols.
        pattern = cls([]).pattern  # a tokenizer without merges, only for its pattern
        words = collections.Counter()
        for text in texts:
            words.update(pattern.findall(data.clean_text(text)))
        words = {symbols(word): count for word, count in words.items()}

        merges = []
        while len(merges) < vocab_size - 514:  # 2 * 256 bytes, [SOS] and [EOS] are there
            # How often does each pair of neighbors occur?
            pairs = collections.Counter()
            for word, count in words.items():
                for pair in zip(word, word[1:]):
                    pairs[pair] += count
            if not pairs:  # each word is one token
                break
            # Join the most frequent pair in all words. Of equally frequent ones, take the last in
            # the order of the alphabet: the result must not depend on the order of the texts.
            highest = max(pairs.values())
            best = max(pair for pair, count in pairs.items() if count == highest)
            words = {merge(word, best): count for word, count in words.items()}
            merges.append(" ".join(best))
        return cls(merges)

    @classmethod
    def from_file(cls, path):
        """OpenAI's bpe_simple_vocab_16e6.txt.gz, or a checkpoint of this script; else UserError."""
        with data.errors_become(f"{path}: does not hold a tokenizer"):
            if not str(path).endswith(".gz"):
                return cls(data.load_checkpoint(path, "clip")["args"]["merges"])
            with gzip.open(path, "rt", encoding="utf8") as file:
                lines = file.read().rstrip("\n").split("\n")
            # Without the header, and only as many merges as OpenAI uses: 49,408 tokens - 514.
            merges = lines[1:1 + 48894]
            if not merges:
                raise ValueError("it is empty")
            return cls(merges)

    def encode(self, text):
        """A text -> the list of its tokens' ids, without [SOS] and [EOS]. (clean_text also makes it
        lower-cased, as the slide says.)"""
        ids = []
        for word in self.pattern.findall(data.clean_text(text)):
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            ids += self.known[word]
        return ids

    def encode_word(self, word):
        """A word -> the list of its tokens' ids."""
        if word in (SOS, EOS):
            return [self.ids[word]]
        parts = symbols(word)  # begin with bytes
        while True:
            # Which neighbors may be joined?
            pairs = [pair for pair in zip(parts, parts[1:]) if pair in self.rank]
            if not pairs:
                return [self.ids[part] for part in parts]
            # Join the pair that was learned first, as in training, and look again.
            parts = merge(parts, min(pairs, key=self.rank.get))

    def __call__(self, texts, context_length=77, truncate=False):
        """A text or a list of B texts -> ids (B, 77) int64: [SOS], the text, [EOS], zeros.

        A text that is too long is refused with a UserError; truncate=True cuts off its end.
        """
        if isinstance(texts, str):
            texts = [texts]
        room = context_length - 2  # for the text, between [SOS] and [EOS]
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > room and not truncate:
                raise UserError(f"{text[:50]!r}...: {len(ids)} tokens, but there is room for "
                                f"{room}; truncate=True cuts off the rest")
            row = [self.ids[SOS], *ids[:room], self.ids[EOS]]
            rows.append(row + [0] * (context_length - len(row)))
        return torch.tensor(rows)


# ------------------------------------------------------------------------------ scores and pictures


def evaluate(model, dataset, parts, prompts, args, amp):
    """The scores of a trained model. parts: see data.zero_shot_task; prompts (K, M, 77)."""
    one_prompt = zero_shot(model, dataset, parts, prompts[:, :1], amp=amp)
    scores = {"chance": 1 / len(prompts)}
    if isinstance(model, Captioner):  # uses one prompt only
        scores |= one_prompt
    else:
        scores |= zero_shot(model, dataset, parts, prompts, amp=amp)
    for name, value in one_prompt.items():
        scores[f"{name}_one_prompt"] = value
    # The linear probes, of this image encoder, of one with new weights, and of pixels.
    clip = model if isinstance(model, CLIP) else model.clip
    untrained = data.untrained(clip, args.seed)
    return scores | data.probe_scores(dataset, clip.features, untrained.features, amp)


@torch.no_grad()
def draw_prompts(model, dataset, names, parts, prompts, out, amp):
    """prompts.png: images, and to the right of each one bars for its five likeliest classes: green
    is the correct one, red are the others. Prints their names and the correct one's rank, as on the
    slide "Examples"."""
    images = []
    targets = []
    for part_images, part_targets in parts.values():
        n = 16 // len(parts)  # about 16 images in all
        images.append(part_images[:n])
        targets += part_targets[:n].tolist()
    images = torch.cat(images)
    with amp:
        logits = model.classifier(prompts)(dataset.normalize(images))
    p = logits.float().softmax(dim=1)  # (number of images, K)

    panels = []
    for image, target, row in zip(images.cpu(), targets, p.cpu()):
        order = row.argsort(descending=True).tolist()  # the likeliest class first
        print(f"{names[target]} ({row[target]:.1%}) ranked {order.index(target) + 1} out of "
              f"{len(names)} labels")
        for k in order[:5]:
            mark = "✓" if k == target else "✗"
            print(f"    {mark} {names[k]} {row[k]:.1%}")
        panels += [image, bars(row, order[:5], target, dataset.image_size)]
    data.save_png(out / "prompts.png", torch.stack(panels), columns=8)
    return ["prompts.png"]


def bars(row, order, target, side):
    """A white image (3, side, side) with one bar below the other: for each class in `order`, as
    long as its probability in row (K,), green if it is the target, else red."""
    image = torch.full((3, side, side), 255, dtype=torch.uint8)
    for i, k in enumerate(order):
        color = (50, 160, 80) if k == target else (205, 90, 80)
        top = i * side // len(order) + 1
        bottom = (i + 1) * side // len(order)
        length = round(row[k].item() * side)
        image[:, top:bottom, :length] = torch.tensor(color)[:, None, None]
    return image


@torch.no_grad()
def draw_similarity(model, dataset, tokenizer, out, amp):
    """similarity.png: 12 test images; below, one row for each caption and in it one square for each
    image: the darker, the more similar. A good model has a dark diagonal."""
    images = dataset.test_images[:12]
    captions = dataset.test_captions[:12]
    ids = tokenizer(captions, truncate=True).to(images.device)
    with amp:
        logits = model(dataset.normalize(images), ids)
    similarity = logits.T  # (text, image)
    similarity = (similarity - similarity.min()) / (similarity.max() - similarity.min())
    ink = torch.tensor([1, 0.7, 0.3], device=images.device)  # white minus ink is dark blue
    squares = 1 - similarity[:, :, None] * ink  # (text, image, 3)
    H = dataset.image_size
    squares = squares[:, :, :, None, None].expand(-1, -1, -1, H, H)
    rows = torch.cat([images[None] / 255, squares])  # (1 + 12, 12, 3, H, H)
    data.save_png(out / "similarity.png", rows.flatten(0, 1), columns=len(images))
    for i, caption in enumerate(captions):
        print(f"similarity.png, row {i + 2}: {caption}")
    return ["similarity.png"]


def draw_zero_shot(out, folders):
    """zero_shot.svg: how zero-shot accuracy grew in training, on 250 images of the part "seen", in
    this run and in those in `folders`."""
    data.compare_logs(out / "zero_shot.svg", [out, *folders], ["zero_shot_seen"], x="images_seen",
                      xlabel="images seen", ylabel="zero-shot accuracy, one prompt",
                      file="zero_shot.csv")
    return ["zero_shot.svg"]


# ---------------------------------------------------------------------- what CLIP was compared with
#
# You can skip this section: the paper's other image encoder, a ResNet, and the two objectives on
# the slide "Contrastive Loss" that learn more slowly: predict the caption's words, or write it.


def conv_and_norm(channels, width, side, stride=1):
    """A convolution with side x side weights, and a batch norm in place of its bias."""
    conv = nn.Conv2d(channels, width, side, stride=stride, padding=side // 2, bias=False)
    return [conv, nn.BatchNorm2d(width)]


class Bottleneck(nn.Module):
    """A layer of the ResNet, (B, channels, H, W) -> (B, 4 * width, H / stride, W / stride).

    With a stride, average pooling shrinks the image, not a strided convolution.
    To copy this, also copy: conv_and_norm.
    """

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            *conv_and_norm(channels, width, 1), nn.ReLU(),
            *conv_and_norm(width, width, 3), nn.ReLU(), nn.AvgPool2d(stride),
            *conv_and_norm(width, 4 * width, 1))
        self.shortcut = nn.Identity()
        if channels != 4 * width:  # the first layer of a stage; no other has a stride
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), *conv_and_norm(channels, 4 * width, 1))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (B, 3, H, H), normalized -> I_f (B, 4 * dim). A usual ResNet ends with the mean over
    all positions; in CLIP's, attention decides how much weight each position gets. (It has no
    output projection: W_i, which comes next, does its work.) CLIP calls `init_weights`.

    depth: the number of layers in each stage, (3, 4, 6, 3) for RN50; a single number is divided
    among two stages. dim: the inner width of the last stage, whose output has 4 * dim. Each earlier
    stage is half as wide as the next.
    To copy this, also copy: Bottleneck, conv_and_norm, Attention.
    """

    def __init__(self, image_size=32, dim=128, depth=4):
        super().__init__()
        if isinstance(depth, int):
            depth = (depth - depth // 2, depth // 2)
        number = len(depth)  # of stages
        # Sides shrink by this factor: 4 in the stem, and 2 in each stage but the first.
        self.patch_size = 2 ** (number + 1)
        self.grid = image_size // self.patch_size
        # 4 * dim must be a multiple of 64, the width of a head in the attention. The stem begins
        # with dim / 2^number channels, so 2^number must divide dim.
        if image_size % self.patch_size or dim % 16 or dim % 2**number or min(depth) == 0:
            raise UserError(f"a ResNet of {number} stages needs --image-size divisible by "
                            f"{self.patch_size}, --dim by 16, --depth of at least 2")

        # The stem halves height and width twice, by a stride and by a mean over squares.
        width = dim // 2 ** (number - 1)  # of the first stage
        self.stem = nn.Sequential(
            *conv_and_norm(3, width // 2, 3, stride=2), nn.ReLU(),
            *conv_and_norm(width // 2, width // 2, 3), nn.ReLU(),
            *conv_and_norm(width // 2, width, 3), nn.ReLU(), nn.AvgPool2d(2))

        # Each stage but the first halves height and width in its first layer. For the layer that
        # comes next, channels is the width of its input, width its inner width, stride its step.
        stages = []
        channels = width
        stride = 1
        for layers in depth:
            blocks = []
            for _ in range(layers):
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
                stride = 1  # only the first block of a stage has a stride
            stages.append(nn.Sequential(*blocks))
            width = 2 * width
            stride = 2
        self.stages = nn.Sequential(*stages)

        # channels is 4 * dim now. Row 0 is the position of the mean.
        self.pos_embed = nn.Parameter(torch.zeros(1 + self.grid**2, channels))
        self.pool = Attention(channels, channels // 64)
        self.pool.proj = nn.Identity()  # CLIP's W_i does its work

    @torch.no_grad()
    def init_weights(self):
        """CLIP.init_weights calls it, after PyTorch's own initialization."""
        channels = self.pos_embed.shape[1]
        nn.init.normal_(self.pos_embed, std=channels**-0.5)
        nn.init.normal_(self.pool.qkv.weight, std=channels**-0.5)
        for stage in self.stages:
            for block in stage:
                # gamma of the last batch norm is zero: only the shortcut counts at first.
                nn.init.zeros_(block.body[-1].weight)

    def forward(self, images):
        side = self.grid * self.patch_size
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {tuple(images.shape[2:])}, but the position table of this "
                             f"model is for {side} x {side} pixels")
        x = self.stages(self.stem(images))  # (B, 4 * dim, H / patch_size, W / patch_size)
        x = x.flatten(2).transpose(1, 2)  # (B, N, 4 * dim)
        # Attention pooling, a cross-attention: the mean over the positions is the query; keys and
        # values come from the mean and all positions, the context.
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, 1 + N, 4 * dim)
        x = x + self.pos_embed
        return self.pool(x[:, :1], context=x)[:, 0]


class BagOfWords(nn.Module):
    """From the image, predict which tokens are in its caption, in whatever order.

    clip: a CLIP; its image encoder is trained. V is the number of tokens in the vocabulary.
    To copy this, also copy: eos_position.
    """

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(clip.W_i.in_features, clip.text_encoder.token_embed.num_embeddings)

    def histogram(self, ids):
        """ids (..., 77) -> (..., V): the share of each token in a text; sum 1, or 0 if it is
        empty."""
        eos = eos_position(ids)[..., None]
        position = torch.arange(ids.shape[-1], device=ids.device)
        is_text = (position > 0) & (position < eos)  # neither [SOS], nor [EOS], nor padding
        share = is_text / (eos - 1).clamp(min=1)  # each of its eos - 1 tokens counts the same
        # Add the share of each position to the entry of the token at this position.
        zeros = share.new_zeros(*ids.shape[:-1], self.head.out_features)
        return zeros.scatter_add(-1, ids, share)

    def loss(self, images, ids):
        """-> loss, logits (B, V)."""
        logits = self.head(self.clip.features(images)).float()
        # The target is a distribution: the histogram of the caption's tokens.
        return F.cross_entropy(logits, self.histogram(ids)), logits

    def classifier(self, prompts):
        """prompts (K, M, 77) -> a function, images (B, 3, H, H) -> scores (B, K)."""
        weights = self.histogram(prompts).mean(dim=1).T  # (V, K)

        def classify(images):
            log_p = self.head(self.clip.features(images)).float().log_softmax(dim=1)  # (B, V)
            # The score of a class: the mean log p of the tokens of its prompts.
            # Not in bfloat16: it would round the scores of several classes to the same number.
            with torch.autocast(images.device.type, enabled=False):
                return log_p @ weights

        return classify


class Captioner(nn.Module):
    """Write the caption, token by token; the image becomes four tokens in front of [SOS].

    clip: a CLIP; both of its encoders are trained. The text encoder, a TextTransformer, writes.
    To copy this, also copy: eos_position.
    """

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        text_dim = clip.W_t.in_features
        self.prefix = nn.Linear(clip.W_i.in_features, 4 * text_dim)
        self.head = nn.Linear(text_dim, clip.text_encoder.token_embed.num_embeddings)

    def log_p(self, I_f, ids):
        """I_f (B, d_i), ids (B, 77) -> (B, N - 1), N the length of the longest text: log p of each
        token after [SOS], given the image and the tokens before it; 0 after [EOS]."""
        eos = eos_position(ids)[:, None]  # (B, 1)
        ids = ids[:, :eos.max() + 1]  # (B, N)
        prefix = self.prefix(I_f).unflatten(1, (4, -1))  # (B, 4, D)
        # `tokens` drops the prefix's outputs. Output 0 is that at [SOS]; output i predicts token
        # i + 1, so the last token is no input.
        x = self.clip.text_encoder.tokens(ids[:, :-1], prefix)  # (B, N - 1, D)
        logits = self.head(x).float().transpose(1, 2)  # (B, V, N - 1), as cross_entropy wants it
        # reduction="none": one number for each token of the caption, its -log p, (B, N - 1).
        log_p = -F.cross_entropy(logits, ids[:, 1:], reduction="none")
        position = torch.arange(1, ids.shape[1], device=ids.device)
        is_text = position <= eos
        return log_p * is_text

    def loss(self, images, ids):
        """Returns (loss, log p (B, N - 1)). The loss is the mean of -log p over all tokens."""
        log_p = self.log_p(self.clip.features(images), ids)
        # If [EOS] stands at position 5, 5 tokens are predicted: those at positions 1 to 5.
        number_of_tokens = eos_position(ids).sum()
        return -log_p.sum() / number_of_tokens, log_p

    def classifier(self, prompts):
        """prompts (K, M, 77) -> a function, images (B, 3, H, H) -> scores (B, K): log p of the
        first prompt of each class as the beginning of a caption, so without its [EOS]."""
        ids = prompts[:, 0]
        ids = ids[:, :eos_position(ids).max() + 1]  # (K, N)
        # [EOS] has the largest id, V - 1. Padding need not be excluded: its log p is 0.
        is_not_eos = ids[:, 1:] < self.head.out_features - 1

        def classify(images):
            scores = []
            for I_f in self.clip.features(images):  # one image with all prompts
                log_p = self.log_p(I_f.expand(len(ids), -1), ids)  # (K, N - 1)
                scores.append((log_p * is_not_eos).sum(dim=1))
            return torch.stack(scores)

        return classify


# ---------------------------------------------------------------------------------------- training


def paper_size(encoder, patch_size, dim, depth, text_dim, embed_dim, image_size=224):
    """A row of the paper's table: 12 layers of text, and heads of width 64. (A ResNet ignores
    `heads`: those of its attention pooling have that width by themselves.)"""
    return dict(image_encoder=encoder, image_size=image_size, patch_size=patch_size, dim=dim,
                depth=depth, heads=dim // 64, text_encoder="transformer", text_dim=text_dim,
                text_depth=12, text_heads=text_dim // 64, embed_dim=embed_dim)


SIZES = {  # all but tiny are the paper's; patch_size of a ResNet: how much it shrinks an image
    "tiny": dict(image_encoder="vit", patch_size=4, dim=128, depth=4, heads=4, text_encoder="cbow",
                 text_dim=128, text_depth=2, text_heads=4, embed_dim=512),
    "B/32": paper_size("vit", 32, dim=768, depth=12, text_dim=512, embed_dim=512),
    "B/16": paper_size("vit", 16, dim=768, depth=12, text_dim=512, embed_dim=512),
    "L/14": paper_size("vit", 14, dim=1024, depth=24, text_dim=768, embed_dim=768),
    "L/14@336": paper_size("vit", 14, dim=1024, depth=24, text_dim=768, embed_dim=768,
                           image_size=336),
    "RN50": paper_size("resnet", 32, dim=512, depth=(3, 4, 6, 3), text_dim=512, embed_dim=1024),
    "RN101": paper_size("resnet", 32, dim=512, depth=(3, 4, 23, 3), text_dim=512, embed_dim=512),
    "RN50x4": paper_size("resnet", 32, dim=640, depth=(4, 6, 10, 6), text_dim=640, embed_dim=640,
                         image_size=288),
    "RN50x16": paper_size("resnet", 32, dim=768, depth=(6, 8, 18, 8), text_dim=768, embed_dim=768,
                          image_size=384),
    "RN50x64": paper_size("resnet", 32, dim=1024, depth=(3, 15, 36, 10), text_dim=1024,
                          embed_dim=1024, image_size=448),
}


def parse_args(argv=None):
    number = data.number
    positive = number(int, 1, 65536)
    parser = data.Parser(__doc__)
    data.common_options(parser, "clip", SIZES, steps=1650, batch_size=64, lr=1e-3)
    parser.add("--warmup", 100, "The learning rate grows linearly for this number of steps.",
               type=number(int, 0))
    parser.add("--weight-decay", 0.05, "The weight decay of all weights but biases, norms, the "
               "class token and the scale t.",
               type=number(float, 0, 10))
    parser.add("--augment", "light", "Changes of training images; light: random shift, and "
               "mirroring, where left and right can be exchanged in the caption.",
               choices=["none", "light"])
    parser.add("--objective", "contrastive", "What is trained; contrastive: CLIP; bow: predict the "
               "words of the caption; caption: write the caption.",
               choices=["contrastive", "bow", "caption"])
    parser.add("--image-encoder", None, "The image encoder, if not that of --size.",
               choices=["vit", "resnet"])
    parser.add("--text-encoder", None, "The text encoder, if not that of --size: cbow (the mean of "
               "the tokens' vectors) for tiny, transformer for the others. --objective caption "
               "always has a transformer.", choices=["transformer", "cbow"])
    parser.add("--embed-dim", None, "The width of the joint embedding, if not that of --size.",
               type=positive)
    parser.add("--text-dim", None, "The width of the text encoder, if not that of --size.",
               type=positive)
    parser.add("--text-depth", None, "The number of layers of the text encoder, if not that of "
               "--size.", type=positive)
    parser.add("--text-heads", None, "The number of attention heads in a layer of the text "
               "encoder, if not that of --size.", type=positive)
    parser.add("--tokenizer", None, "The path of OpenAI's bpe_simple_vocab_16e6.txt.gz, or of a "
               "checkpoint of this script. Without it, one is learned from the captions; with "
               "--load it is that of the checkpoint. A released file needs this option.")
    parser.add("--exact-gelu", False, "The model of --load has the exact GELU, as most of "
               "open_clip's models have, and not OpenAI's quick_gelu.", action="store_true")
    parser.add("--normalize", "openai", "How images of a released --load are normalized. half: "
               "mean and std 0.5, for some models of open_clip (ViT-L-14 of laion2b_s32b_b82k).",
               choices=list(data.NORMALIZE))
    parser.add("--vocab-size", 1024, "The largest size of the vocabulary that is learned.",
               type=number(int, 514))
    parser.add("--compare", [], "The --out folders of other runs: zero_shot.svg shows them, too.",
               nargs="+")
    args = data.parse(parser, "clip", SIZES, argv)
    if args.objective == "caption":
        args.text_encoder = "transformer"
    if args.image_encoder == "vit" and not isinstance(args.depth, int):
        raise UserError(f"--image-encoder vit: --size {args.size} is a ResNet's; choose another "
                        "--size or a --depth")
    if args.text_encoder == "transformer" and args.text_dim % args.text_heads:
        raise UserError(f"--text-dim {args.text_dim} must be a multiple of --text-heads "
                        f"{args.text_heads}")
    if args.objective == "contrastive" and args.batch_size < 2:
        raise UserError("--batch-size 1: the contrastive loss compares the captions of a "
                        "batch, so it needs at least 2")
    for folder in args.compare:
        if not (pathlib.Path(folder) / "zero_shot.csv").is_file():
            raise UserError(f"--compare {folder}: not the --out folder of a run of clip.py")
    return args


def learning_rate(step, args):
    """Linear warm-up to the peak --lr, then half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    progress = (step - args.warmup) / (args.steps - args.warmup)  # from 0 towards 1
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def load(args):
    """-> the model of --load and its tokenizer. Changes args: the sizes of images and patches
    become the model's; images are normalized as in our file, or as --normalize says for a released
    one; there are no training steps."""
    model = CLIP.from_pretrained(args.load, exact_gelu=args.exact_gelu)
    released = not data.is_own(args.load)  # by OpenAI or open_clip
    if released:  # for our own files, data.parse has read mean and std
        args.mean, args.std = data.NORMALIZE[args.normalize]
    args.steps = 0  # no training
    args.patch_size = model.image_encoder.patch_size
    args.image_size = model.image_encoder.grid * args.patch_size
    if released and not args.tokenizer:
        raise UserError(f"--load {args.load}: needs --tokenizer bpe_simple_vocab_16e6.txt.gz")
    tokenizer = Tokenizer.from_file(args.tokenizer or args.load)
    vocab_size = model.text_encoder.token_embed.num_embeddings
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"--tokenizer {args.tokenizer}: {tokenizer.vocab_size} tokens, but "
                        f"--load {args.load} has {vocab_size}")
    return model, tokenizer


def pick_tokenizer(args, dataset):
    """That of --tokenizer, else a new one, learned from the captions."""
    if args.tokenizer:
        return Tokenizer.from_file(args.tokenizer)
    return Tokenizer.train(dataset.train_captions, args.vocab_size)


def left_and_right(tokenizer, captions):
    """The tokens of "left" and "right", for `mirror`: it mirrors images, and exchanges these two.

    (-1, -1) if "left" and "right" occur in no caption: no token has the id -1, so `mirror` mirrors
    the images and exchanges nothing.
    (None, None) if one of them has several tokens and cannot be exchanged: nothing is mirrored.
    """
    if not any(re.search(r"\b(left|right)\b", caption.lower()) for caption in captions):
        return -1, -1
    left = tokenizer.encode("left")
    right = tokenizer.encode("right")
    if len(left) > 1 or len(right) > 1:
        return None, None
    return left[0], right[0]


def mirror(images, ids, left, right):
    """Mirrors each image with probability 1/2, and then exchanges left and right in its caption.

    left, right: the tokens of these two words, -1 or None; see left_and_right.
    """
    if left is None:
        return images, ids
    is_mirrored = torch.rand(len(images), device=images.device) < 0.5
    images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
    exchanged = torch.where(ids == left, right, ids)
    # Compare with ids, not with exchanged: else each left would become left again.
    exchanged = torch.where(ids == right, left, exchanged)
    return images, torch.where(is_mirrored[:, None], exchanged, ids)


def build(args, vocab_size):
    """A new model with the sizes in the options."""
    clip = CLIP(image_size=args.image_size, patch_size=args.patch_size,
                dim=args.dim, depth=args.depth, heads=args.heads, embed_dim=args.embed_dim,
                text_dim=args.text_dim, text_depth=args.text_depth, text_heads=args.text_heads,
                vocab_size=vocab_size, image_encoder=args.image_encoder,
                text_encoder=args.text_encoder)
    if args.objective == "bow":
        return BagOfWords(clip)
    if args.objective == "caption":
        return Captioner(clip)
    return clip


def make_optimizer(model, args, device):
    """AdamW with the betas and eps of the paper's ViTs; vectors have no weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # biases, norms, cls_token, t
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    # fused: one pass over all weights, which is faster; untested on Macs (mps), so not used there.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=device.type != "mps")


def train(args):
    """Trains a model, scores it, draws the pictures; returns the scores. --load: no training."""
    # Set-up: device, data, tokenizer, model, optimizer.
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)  # matrix products in bfloat16 where that is fast
    out = pathlib.Path(args.out)
    if args.load:  # it sets the images' size, which open_data needs
        model, tokenizer = load(args)
    dataset = data.open_data(args, device)
    if not args.load:
        tokenizer = pick_tokenizer(args, dataset)
        torch.manual_seed(args.seed)
        model = build(args, tokenizer.vocab_size)
    model.to(device)
    names, templates, parts = data.zero_shot_task(dataset)
    prompts = tokenize_prompts(tokenizer, names, templates).to(device)
    train_ids = tokenizer(dataset.train_captions, truncate=True).to(device)
    sides = left_and_right(tokenizer, dataset.train_captions)
    # Shift images by up to 4 pixels; those of `shapes` by 2, as their captions tell positions.
    is_shapes = dataset.unseen_images is not None  # only it has unseen pairs
    pad = 2 if is_shapes else 4
    optimizer = make_optimizer(model, args, device)
    start, scores = data.resume(args, "clip", model=model, optimizer=optimizer)
    loss_function = torch.compile(model.loss) if args.compile else model.loss

    def save(step, scores):
        data.save_checkpoint(out / "checkpoint.pt", script="clip", model=model.state_dict(),
                             optimizer=optimizer.state_dict(), step=step,
                             args=vars(args) | {"merges": tokenizer.merges}, scores=scores)

    # Training.
    if start == 0 and not args.load:  # a new run does not append to an earlier run's scores
        with data.errors_become(f"cannot delete {out / 'zero_shot.csv'}, of an earlier run"):
            (out / "zero_shot.csv").unlink(missing_ok=True)
    progress = data.Progress(args, start, scores)
    for step in progress:
        # Each step of each run has its own seed: a resumed run goes on exactly as without a stop.
        torch.manual_seed(args.seed * 1_000_003 + step)
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = data.batch_index(len(train_ids), args.batch_size, step, args.seed).to(device)
        images = dataset.train_images[index]
        ids = train_ids[index]
        if args.augment == "light":
            images, ids = mirror(images, ids, *sides)
            images = data.augment(images, pad=pad, flip=False)
        images = dataset.normalize(images)
        with amp:
            loss, _ = loss_function(images, ids)
        optimizer.zero_grad()
        loss.backward()
        # One bad batch can give a huge gradient: scale all gradients down if their norm exceeds 1.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.check(step, loss, norm)  # waits for both numbers; not finite: the run ends
        optimizer.step()
        if isinstance(model, CLIP):  # the paper: never scale the logits by more than 100
            model.t.data.clamp_(max=math.log(100))
        scores = progress.scores(images_seen=(step + 1) * len(images))
        if step % 10 == 0 or step + 1 == args.steps:
            data.log(out / "log.csv", step, images_seen=scores["images_seen"], loss=scores["loss"],
                     lr=lr)
        if (step + 1) % max(1, args.steps // 10) == 0:
            model.eval()
            found = zero_shot(model, dataset, parts, prompts[:, :1], amp=amp, limit=250)
            model.train()
            data.log(out / "zero_shot.csv", step, images_seen=scores["images_seen"], **found)
        if progress.due(step):
            save(step + 1, scores)

    # Scores and pictures.
    model.eval()
    scores |= evaluate(model, dataset, parts, prompts, args=args, amp=amp)
    files = draw_prompts(model, dataset, names, parts, prompts=prompts, out=out, amp=amp)
    if isinstance(model, CLIP):
        files += draw_similarity(model, dataset, tokenizer, out, amp=amp)
    if not args.load:
        save(max(start, args.steps), scores)  # start is larger if resumed with fewer --steps
        files += draw_zero_shot(out, args.compare) + ["checkpoint.pt", "log.csv", "zero_shot.csv"]
    return data.report(scores, out, files)


if __name__ == "__main__":
    data.run(train, parse_args)
