"""Everything that touches the disk, and the yardsticks that all six models are measured with.

    python data.py                        # draw a sheet of the default pictures, print captions and facts
    python data.py --data cifar10         # downloads the official archive once

Data sets, batches and augmentation; linear probe, kNN, a small convolutional net; checkpoints, log, PNG and SVG;
the command line that the six scripts share. Pictures are (N, 3, H, W) uint8 and stay whole on the device.
"""

import argparse
import colorsys
import functools
import hashlib
import math
import os
import pathlib
import pickle
import signal
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line, what is wrong and what would be right."""


# ------------------------------------------------------------------------------------------------ data sets


@dataclass
class Data:
    """A data set. Images (N, 3, H, W) uint8, labels (N,) int64, captions N strings; mean, std (3,) in 0..1."""

    name: str
    class_names: list
    train_images: torch.Tensor
    train_labels: torch.Tensor
    train_captions: list
    test_images: torch.Tensor
    test_labels: torch.Tensor
    test_captions: list
    unseen_images: torch.Tensor = None  # `shapes` only: colour-and-shape pairs that training never shows
    unseen_labels: torch.Tensor = None
    unseen_captions: list = field(default_factory=list)
    root: pathlib.Path = pathlib.Path("datasets")
    mean: torch.Tensor = None
    std: torch.Tensor = None

    def __post_init__(self):
        pixels = self.train_images[:10000].transpose(0, 1).flatten(1).float() / 255  # (3, n H W)
        self.mean, self.std = pixels.mean(1), pixels.std(1).clamp(min=1e-3)

    @property
    def image_size(self):
        return self.train_images.shape[-1]

    def to(self, device):
        """Moves every tensor, the whole set, to the device; returns self."""
        for key, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, key, value.to(device))
        return self

    def normalise(self, images):
        """uint8 (B, 3, H, W) -> float32, zero mean and unit variance per channel over the training set."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalise(self, images):
        """The inverse of normalise, clipped to pictures in 0..1."""
        return (images.float() * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)


def load(name="shapes", root="datasets", seed=0, image_size=None):
    """A Data by name: "shapes" (drawn from the seed), "cifar10", "cifar100", or the path of an .npz of your own.

    `image_size` rescales the pictures (antialiased). Raises UserError for anything that can't be read as pictures.
    """
    root = pathlib.Path(root)
    if name == "shapes":
        data = shapes(seed)
    elif name in CIFAR:
        data = cifar(name, root, seed)
    elif str(name).endswith(".npz"):
        data = npz(pathlib.Path(name), seed)
    else:
        raise UserError(f"--data {name}: choose shapes, cifar10, cifar100 or a path that ends in .npz")
    data.root = root
    if image_size and image_size != data.image_size:
        for key in ("train_images", "test_images", "unseen_images"):
            if (images := getattr(data, key)) is not None:
                parts = (F.interpolate(part.float(), (image_size,) * 2, mode="bilinear", antialias=True)
                         for part in images.split(1000))
                setattr(data, key, torch.cat([part.round().clamp(0, 255).byte() for part in parts]))
        data.__post_init__()  # mean and std of the rescaled pictures
    return data


SHAPES = ["circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "moon", "arrow"]
COLOURS = {"red": (215, 45, 45), "orange": (240, 135, 25), "yellow": (240, 215, 45), "green": (45, 165, 65),
           "cyan": (60, 195, 210), "blue": (50, 85, 215), "purple": (145, 65, 190), "pink": (240, 125, 180)}
PLACES = {"in the middle": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1),
          "at the bottom": (0, 1)}
WORDINGS = ["a {size} {colour} {shape} {place}", "{place} a {size} {colour} {shape}",
            "a {colour} {shape}, {size}, {place}", "there is a {size} {colour} {shape} {place}"]


def is_unseen(shape, colour):
    """Two of the eight colours of each shape (by index) occur only in the `unseen` pictures."""
    return (colour - 3 * shape) % 8 in (0, 3)


def signed_distance(shape, x, y):
    """Distance to the outline of a shape of about unit radius, negative inside; y points down. (n, H, W) each."""
    r, up, side = torch.hypot(x, y), -y, x.abs()
    if shape == "circle":
        return r - 0.85
    if shape == "square":
        return torch.maximum(side, y.abs()) - 0.76
    if shape == "triangle":
        return torch.maximum(-up - 0.6, 0.87 * side + 0.5 * up - 0.46)
    if shape == "diamond":
        return 0.83 * side + 0.55 * y.abs() - 0.55
    if shape == "star":  # fold the plane onto one of ten half-arms, then one straight line
        angle = (torch.atan2(x, up) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        return 0.59 * (r * angle.cos() - 1) + 0.81 * r * angle.sin().abs()
    if shape == "heart":
        lobe = torch.hypot(side - 0.43, up - 0.32) - 0.5
        return torch.minimum(lobe, torch.maximum(0.76 * side - 0.65 * up - 0.6, up - 0.35))
    if shape == "cross":
        arm = lambda a, b: torch.maximum(a - 0.29, b - 0.88)
        return torch.minimum(arm(side, y.abs()), arm(y.abs(), side))
    if shape == "ring":
        return (r - 0.66).abs() - 0.24
    if shape == "moon":
        return torch.maximum(r - 0.92, 0.78 - torch.hypot(x - 0.5, y + 0.1))
    head = torch.maximum(0.7 * side + 0.7 * up - 0.63, -up)  # arrow, pointing up
    return torch.minimum(head, torch.maximum(side - 0.27, (up + 0.43).abs() - 0.46))


def shapes(seed=0, size=32, counts=(20000, 2000, 1000)):
    """The default pictures: one coloured shape on a calm, muted, textured ground; the class is the shape.

    counts: training, test and unseen pictures. The colour, size, place, angle and ground vary independently of the
    class, and the ground is as often lighter as darker than the shape, so that mean colours tell nothing.
    """
    g = torch.Generator().manual_seed(seed)
    total = sum(counts)
    uniform = lambda low, high: low + (high - low) * torch.rand(total, generator=g)
    pick = lambda n: torch.randint(n, (total,), generator=g)
    shape = torch.cat([torch.randperm(n, generator=g) % len(SHAPES) for n in counts])
    rare = torch.arange(total) >= counts[0] + counts[1]
    offset = torch.where(rare, torch.tensor([0, 3])[pick(2)], torch.tensor([1, 2, 4, 5, 6, 7])[pick(6)])
    colour, place, big, wording = (3 * shape + offset) % 8, pick(len(PLACES)), pick(2), pick(len(WORDINGS))
    radius = torch.where(big == 1, uniform(11.5, 13), uniform(9, 10.5)) * size / 32
    shift = torch.tensor(list(PLACES.values()))[place] * (uniform(3, 5) * size / 32)[:, None]
    centre = (size - 1) / 2 + shift + torch.stack([uniform(-1, 1), uniform(-1, 1)], 1) * size / 32
    angle = uniform(-math.pi / 10, math.pi / 10)
    paint = torch.tensor(list(COLOURS.values()))[colour] + torch.stack([uniform(-15, 15) for _ in range(3)], 1)

    hsv = zip(uniform(0, 1).tolist(), uniform(0.05, 0.3).tolist(), uniform(0.15, 0.95).tolist())
    ground = 255 * torch.tensor([colorsys.hsv_to_rgb(*c) for c in hsv])
    tint = torch.stack([uniform(-22, 22) for _ in range(3)], 1)  # the texture's second colour, minus the first
    texture, tilt, wave, phase = pick(4), uniform(0, math.pi), uniform(0.35, 0.8) * 32 / size, uniform(0, 6.3)

    images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for s, name in enumerate(SHAPES):
        for i in (shape == s).nonzero()[:, 0].split(500):
            column = lambda t: t[i, None, None]
            dx, dy = x - column(centre[:, 0]), y - column(centre[:, 1])
            cos, sin, r = column(angle).cos(), column(angle).sin(), column(radius)
            distance = r * signed_distance(name, (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r)
            inside = (0.5 - distance).clamp(0, 1)[:, None]  # (n, 1, H, W), soft over one pixel: no jagged edges
            a = column(wave) * (column(tilt).cos() * x + column(tilt).sin() * y)
            b = column(wave) * (column(tilt).cos() * y - column(tilt).sin() * x)
            a, b = (a + column(phase)).sin(), (b + 2 * column(phase)).sin()
            patterns = torch.stack([x / (size - 1) + 0 * a, a / 2, a * b / 2, (a + b) / 4])  # fade, stripes, ...
            amount = patterns[texture[i], torch.arange(len(i))][:, None]
            back = ground[i, :, None, None] + tint[i, :, None, None] * amount
            picture = back + inside * (paint[i, :, None, None] - back)
            images[i] = picture.round().clamp(0, 255).byte()
    colours, places = list(COLOURS), list(PLACES)
    captions = [WORDINGS[w].format(size=("small", "big")[k], colour=colours[c], shape=SHAPES[s], place=places[p])
                for w, k, c, s, p in torch.stack([wording, big, colour, shape, place], 1).tolist()]
    cut = [0, counts[0], counts[0] + counts[1], total]
    parts = [(images[a:b], shape[a:b], captions[a:b]) for a, b in zip(cut, cut[1:])]
    return Data("shapes", list(SHAPES), *parts[0], *parts[1], *parts[2])


# The official binary archives: no pickle is ever read. Name: folder, md5 of the archive, label bytes, files, names.
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin", 1,
                [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"], "batches.meta.txt"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary", 2,
                 ["train.bin", "test.bin"], "fine_label_names.txt"),
}
CIFAR_TEMPLATES = [f"{kind} of {article} {{}}." for article in ("a", "the") for kind in (
    "a photo", "a blurry photo", "a black and white photo", "a low contrast photo", "a high contrast photo",
    "a bad photo", "a good photo")] + [f"a photo of {a} {size} {{}}." for a in ("a", "the") for size in ("small", "big")]


def cifar(name, root, seed):
    """CIFAR-10 or -100 from `root`, downloaded if its folder is missing; captions are CLIP's templates for CIFAR."""
    archive, md5, folder, label_bytes, files, names = CIFAR[name]
    size = (3072 + label_bytes) * (50000 // (len(files) - 1))
    sizes = dict.fromkeys(files, size) | {files[-1]: (3072 + label_bytes) * 10000}
    if not (root / folder).is_dir():
        download(CIFAR_URL + archive, md5, root, folder, sizes | {names: None})
    classes = read_bytes(root / folder / names).decode(errors="replace").split()
    if len(classes) != int(name[5:]):
        raise UserError(f"{root / folder / names}: {len(classes)} class names, not {name[5:]}: delete the folder")
    images, labels = [], []
    for file in files:
        raw = np.frombuffer(read_bytes(root / folder / file), np.uint8)
        if raw.size != sizes[file]:
            raise UserError(f"{root / folder / file}: {raw.size} bytes, not {sizes[file]}: delete the folder "
                            f"{root / folder} and start again to download it anew")
        records = torch.from_numpy(raw.reshape(-1, 3072 + label_bytes).copy())
        labels.append(records[:, label_bytes - 1].long())
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
        if labels[-1].max() >= len(classes):
            raise UserError(f"{root / folder / file}: label {labels[-1].max()} of {len(classes)}: delete the folder")
    g = torch.Generator().manual_seed(seed)
    caption = lambda labels: [CIFAR_TEMPLATES[t].format(classes[k].replace("_", " ")) for t, k in zip(
        torch.randint(len(CIFAR_TEMPLATES), (len(labels),), generator=g).tolist(), labels.tolist())]
    train, test = torch.cat(labels[:-1]), labels[-1]
    return Data(name, classes, torch.cat(images[:-1]), train, caption(train), images[-1], test, caption(test))


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def download(url, md5, root, folder, members):
    """Fetches a .tar.gz and puts its `members` {name: size} into root/folder: whole and checked, or not at all.

    Everything happens in a temporary folder that is renamed at the end, so an interrupted download leaves nothing
    that could be taken for whole. Members are read one by one by their full name; no path in the archive is followed.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder}.part-", dir=root) as part:
            part, digest = pathlib.Path(part), hashlib.md5()
            with urllib.request.urlopen(url, timeout=30) as answer, open(part / "archive", "wb") as out:
                expected = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=expected or None, unit="B", unit_scale=True, desc=url.split("/")[-1]) as bar:
                    while block := answer.read(1 << 20):
                        out.write(block), digest.update(block), bar.update(len(block))
            if digest.hexdigest() != md5:
                raise UserError(f"{url}: md5 {digest.hexdigest()}, not {md5} ({out_size(part)} bytes came, "
                                f"{expected or 'an unknown number'} announced): nothing was kept, try again")
            (part / folder).mkdir()
            with tarfile.open(part / "archive", "r:gz") as tar:
                for name, size in members.items():
                    member = tar.getmember(f"{folder}/{name}")
                    if not member.isreg() or (size and member.size != size):
                        raise UserError(f"{url}: {folder}/{name} is not a plain file of {size} bytes")
                    (part / folder / name).write_bytes(tar.extractfile(member).read())
            if not (root / folder).is_dir():  # else another run was quicker
                os.replace(part / folder, root / folder)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"could not get {url} ({error}): nothing was kept; try again, or unpack the archive "
                        f"yourself into {root}") from None


def out_size(part):
    return (part / "archive").stat().st_size


def npz(path, seed):
    """Your own pictures: `images` (N, H, H, 3) uint8, `labels` (N,) whole numbers from 0, optional `captions` (N,)
    and `class_names` (K,) strings. A tenth of them, drawn from the seed, is the test set."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("images", "labels", "captions", "class_names") if key in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error, NotImplementedError,
            MemoryError, struct.error) as error:
        raise UserError(f"{path}: not a readable .npz without pickled objects ({str(error)[:120]})") from None
    for key in ("images", "labels"):
        if key not in arrays:
            raise UserError(f"{path}: holds no array {key!r}; it needs images (N, H, H, 3) uint8 and labels (N,)")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(f"{path}: images are {images.dtype} {images.shape}, not uint8 (N, H, H, 3): square, RGB")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or len(labels) < 20 or labels.min() < 0:
        raise UserError(f"{path}: labels must be {len(images)} whole numbers from 0 (20 pictures or more), not "
                        f"{labels.dtype} {labels.shape}")
    if labels.max() > 10000:
        raise UserError(f"{path}: label {labels.max()}: number the classes 0, 1, 2, ...")
    names = [str(n) for n in arrays.get("class_names", [f"class {k}" for k in range(labels.max() + 1)])]
    if len(names) <= labels.max():
        raise UserError(f"{path}: {len(names)} class_names for labels up to {labels.max()}")
    captions = [str(c) for c in arrays.get("captions", [f"a photo of a {names[k]}." for k in labels])]
    if len(captions) != len(labels):
        raise UserError(f"{path}: {len(captions)} captions for {len(labels)} pictures")
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([len(order) // 10, len(order) - len(order) // 10])
    part = lambda index: (images[index], labels[index], [captions[i] for i in index])
    return Data(path.stem, names, *part(train), *part(test))


# ------------------------------------------------------------------------------------ batches, on the device


@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_index(n, batch_size, step, seed):
    """Which pictures step `step` sees, (B,) int64: epochs without repetition, computed from the step alone."""
    batch_size = min(batch_size, n)
    epoch, i = divmod(step, n // batch_size)
    return permutation(n, epoch, seed)[i * batch_size:(i + 1) * batch_size]


def augment(images, pad=4, flip=True):
    """The usual CIFAR augmentation, batched: a shift by up to `pad` pixels (reflected edge) and a mirror image.

    uint8 (B, 3, H, W) -> the same; each picture gets its own shift, drawn on the pictures' device.
    """
    B, _, H, W = images.shape
    draw = lambda n: torch.randint(n, (B, 1), device=images.device)
    rows = draw(2 * pad + 1) - pad + torch.arange(H, device=images.device)  # (B, H), source row of each row
    columns = draw(2 * pad + 1) - pad + torch.arange(W, device=images.device)
    if flip:
        columns = torch.where(draw(2) == 1, W - 1 - columns, columns)
    rows, columns = (t.abs() for t in (rows, columns))  # reflect at the first, then at the last row and column
    rows, columns = (H - 1) - (H - 1 - rows).abs(), (W - 1) - (W - 1 - columns).abs()
    return images[torch.arange(B, device=images.device)[:, None, None], :, rows[:, :, None],
                  columns[:, None, :]].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- yardsticks


@torch.no_grad()
def extract(features, data, images, amp, batch_size=500):
    """features(normalised (B, 3, H, W)) -> (B, D), over all images: (N, D) float32."""
    with amp:
        return torch.cat([features(data.normalise(part)).float() for part in images.split(batch_size)])


def linear_probe(train_x, train_y, test_x, test_y):
    """Accuracy (0..1) of multinomial logistic regression on frozen features, train_x (N, D), train_y (N,) int64.

    Features are standardised; L-BFGS fits the convex problem; the L2 weight is the best of four on a held-out tenth
    of the training set, then all of it is used; the test set is touched once.
    """
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x, classes = (train_x - mean) / std, (test_x - mean) / std, int(train_y.max()) + 1

    def fit(x, y, l2, start):
        w = start.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS([w], max_iter=60, tolerance_change=1e-5, line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            loss = F.cross_entropy(x @ w[:-1] + w[-1], y) + l2 / 2 * (w[:-1] ** 2).sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        return w.detach()

    accuracy = lambda w, x, y: (((x @ w[:-1] + w[-1]).argmax(1)) == y).float().mean().item()
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0)).to(train_y.device)
    held, kept = order.split([len(order) // 10, len(order) - len(order) // 10])
    best, w = (-1, None, None), train_x.new_zeros(train_x.shape[1] + 1, classes)
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4):  # from stiff to free, each start where the last one ended
        w = fit(train_x[kept], train_y[kept], l2, w)
        best = max(best, (accuracy(w, train_x[held], train_y[held]), l2, w), key=lambda b: b[0])
    return accuracy(fit(train_x, train_y, best[1], best[2]), test_x, test_y)


def knn(train_x, train_y, test_x, test_y, k=20):
    """Accuracy (0..1) of a vote of the k nearest training features by cosine, weighted by exp(cosine / 0.07)."""
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    one_hot, right = F.one_hot(train_y).float(), 0
    for x, y in zip(test_x.split(500), test_y.split(500)):
        cosine, index = (x @ train_x.T).topk(min(k, len(train_x)))  # (b, k)
        votes = ((cosine / 0.07).exp()[:, :, None] * one_hot[index]).sum(1)  # (b, K)
        right += (votes.argmax(1) == y).sum().item()
    return right / len(test_y)


def probe_scores(data, features, random_features, amp):
    """The four accuracies that all six scripts report: probe, knn, and the probe's two baselines."""
    y, test_y = data.train_labels, data.test_labels
    x, test_x = (extract(features, data, images, amp) for images in (data.train_images, data.test_images))
    scores = {"probe": linear_probe(x, y, test_x, test_y), "knn": knn(x, y, test_x, test_y)}
    x, test_x = (extract(random_features, data, images, amp) for images in (data.train_images, data.test_images))
    scores["probe_random"] = linear_probe(x, y, test_x, test_y)
    x, test_x = (images.flatten(1).float() for images in (data.train_images, data.test_images))
    return scores | {"probe_pixels": linear_probe(x, y, test_x, test_y)}


class SmallCNN(nn.Module):
    """The convolutional baseline, (B, 3, H, W) -> logits (B, K); `features` -> (B, 128)."""

    def __init__(self, num_classes=10, width=32):
        super().__init__()
        stage = lambda a, b: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*stage(3, width), nn.MaxPool2d(2), *stage(width, 2 * width), nn.MaxPool2d(2),
                                  *stage(2 * width, 4 * width), *stage(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images):
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def train_cnn(data, seed=0, steps=200, batch_size=128):
    """A SmallCNN trained on the labels of `data`, in eval mode; kept in the data folder for the next call."""
    key = hashlib.md5(data.train_images[:100].cpu().numpy().tobytes()).hexdigest()[:8]
    path = data.root / f"cnn-{data.name}-{data.image_size}-{seed}-{len(data.train_images)}-{steps}-{key}.pt"
    torch.manual_seed(seed)
    cnn = SmallCNN(len(data.class_names)).to(data.train_images.device).to(memory_format=torch.channels_last)
    if path.exists():
        cnn.load_state_dict(load_checkpoint(path, "cnn")["model"])
        return cnn.eval()
    optimizer = torch.optim.AdamW(cnn.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        index = batch_index(len(data.train_images), batch_size, step, seed)
        images = data.normalise(augment(data.train_images[index])).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(cnn(images), data.train_labels[index])
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    save_checkpoint(path, script="cnn", model=cnn.state_dict())
    return cnn.eval()


# ------------------------------------------------------------------------------ checkpoints, log, pictures


def save_checkpoint(path, **content):
    """Writes a dict of state dicts and plain values; through a part file, so the last good one is never damaged."""
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush(), os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def load_checkpoint(path, script=None):
    """The content of a .pt, .pth, .bin or .tar file: tensors and plain values only, no code is ever run.

    `script` names the one that must have written it. Raises UserError for any other, cut short or corrupt file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, MemoryError,
            AssertionError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise UserError(f"{path}: not a whole PyTorch file of plain tensors ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    if script and content.get("script") != script:
        raise UserError(f"{path}: written by {content.get('script', 'another program')}, not by {script}.py")
    return content


class Log:
    """log.csv: a line for each `write`, flushed at once. Opened at step `start`, it drops the lines from there on."""

    def __init__(self, path, start=0):
        self.path, lines = pathlib.Path(path), []
        if start and self.path.exists():
            lines = self.path.read_text().splitlines()
            lines = lines[:1] + [line for line in lines[1:] if line[:1].isdigit() and int(line.split(",")[0]) < start]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w")
            self.file.write("".join(line + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self.empty = not lines

    def write(self, step, **numbers):
        """Tensors among the numbers are read here."""
        if self.empty:
            self.file.write(",".join(["step", *numbers]) + "\n")
            self.empty = False
        try:
            self.file.write(",".join([str(step), *(f"{float(v):.7g}" for v in numbers.values())]) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None


def write_file(path, content):
    try:
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def save_png(path, images, columns=8, gap=2):
    """Pictures (N, 3, H, W), uint8 or float in 0..1, as one PNG of rows of `columns`; small ones are enlarged."""
    if images.dtype != torch.uint8:
        images = (images.float().clamp(0, 1) * 255).round().byte()
    N, _, H, W = images.shape
    zoom, rows = max(1, 96 // H), -(-N // columns)
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    H, W = H * zoom + gap, W * zoom + gap
    sheet = torch.full((3, rows * H + gap, columns * W + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * H, gap + i % columns * W
        sheet[:, y:y + H - gap, x:x + W - gap] = image
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    lines = np.pad(sheet.permute(1, 2, 0).reshape(sheet.shape[1], -1).numpy(), ((0, 0), (1, 0)))  # filter byte 0
    head = struct.pack(">IIBBBBB", sheet.shape[2], sheet.shape[1], 8, 2, 0, 0, 0)
    write_file(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
               + chunk(b"IEND", b""))


def save_chart(path, series, xlabel, ylabel, lines=True):
    """An SVG chart of {label: [(x, y), ...]} with axes, ticks and legend; `lines=False` draws the points alone."""
    points = [p for values in series.values() for p in values if all(map(math.isfinite, p))] or [(0, 0)]
    (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in zip(*points))
    px, py = (lambda x: 70 + 450 * (x - x0) / (x1 - x0)), (lambda y: 310 - 280 * (y - y0) / (y1 - y0))
    text = lambda x, y, s, more="": f'<text x="{x:.1f}" y="{y:.1f}" {more}>{s}</text>'
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="680" height="370" font-family="sans-serif" font-size="12">'
           '<rect width="680" height="370" fill="white"/><path d="M70 30V310H520" fill="none" stroke="black"/>']
    for i in range(6):
        x, y = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        out += [text(px(x), 328, f"{x:.3g}", 'text-anchor="middle"'), text(62, py(y) + 4, f"{y:.3g}", 'text-anchor="end"'),
                f'<path d="M{px(x):.1f} 310v5M70 {py(y):.1f}h-5" stroke="black"/>']
    out += [text(295, 355, xlabel, 'text-anchor="middle"'),
            text(0, 0, ylabel, 'text-anchor="middle" transform="translate(18 170) rotate(-90)"')]
    for i, (label, values) in enumerate(series.items()):
        hue = f"hsl({i * 137 % 360} 65% 42%)"
        xy = [(px(x), py(y)) for x, y in values if math.isfinite(x) and math.isfinite(y)]
        if lines and xy:
            out.append(f'<polyline fill="none" stroke="{hue}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in xy)}"/>')
        if len(xy) <= 60 or not lines:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{hue}"/>' for x, y in xy]
        out += [f'<circle cx="540" cy="{40 + 18 * i}" r="4" fill="{hue}"/>', text(550, 44 + 18 * i, label)]
    write_file(path, "\n".join(out + ["</svg>\n"]).encode())


# ---------------------------------------------------------------------------------- command line and training loop


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong argument is a UserError: one line instead of the whole usage."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add(self, name, default, help, **more):
        self.add_argument(name, default=default, help=f"{help} (default: {default})".replace("%", "%%"), **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from low to high."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number "
                                             f"from {low} to {high}")
        return value

    return convert


def common_options(parser, script, sizes, steps, batch_size, lr):
    """The options that all six scripts share, in the same words."""
    one = number(int, 1, 10**9)
    parser.add("--data", "shapes", "shapes, cifar10, cifar100 or the path of an .npz of your own")
    parser.add("--data-dir", "datasets", "where data sets are kept")
    parser.add("--size", "tiny", f"the model: {', '.join(sizes)}", choices=sizes)
    for name, help in (("image-size", "rescale the pictures to this side"), ("patch-size", "side of a patch"),
                       ("dim", "width D"), ("depth", "number of layers"), ("heads", "heads of each attention")):
        parser.add(f"--{name}", None, f"{help}, instead of the size's own", type=number(int, 1, 100000))
    parser.add("--steps", steps, "training steps", type=one)
    parser.add("--batch-size", batch_size, "pictures a step", type=one)
    parser.add("--lr", lr, "peak learning rate", type=number(float, 0, 1000))
    parser.add("--seed", 0, "of initial weights, data order and all else that is random", type=number(int, 0, 10**9))
    parser.add("--device", "auto", "auto (cuda, else mps, else cpu), or a device's name")
    parser.add("--precision", "auto", "of matrix products", choices=["auto", "bf16", "fp32"])
    parser.add("--compile", False, "use torch.compile: faster steps after a slow start", action="store_true")
    parser.add("--out", f"out/{script}", "folder of checkpoint, log and pictures")
    parser.add("--resume", False, "go on from the checkpoint in --out, with its options", action="store_true")
    parser.add("--load", None, "weights to evaluate and draw without training: a checkpoint or a released file")
    parser.add("--save-seconds", 30.0, "time between checkpoints", type=number(float, 0))


def parse(parser, script, sizes, argv=None):
    """Reads the arguments; --resume takes the checkpoint's for all that are not given; --size fills the rest."""
    args = parser.parse_args(argv)
    path = pathlib.Path(args.out) / "checkpoint.pt"
    if args.resume and path.exists():
        stored = load_checkpoint(path, script)["args"]
        parser.set_defaults(**{k: v for k, v in stored.items() if k not in ("resume", "out", "device")})
        args = parser.parse_args(argv)
    for key, value in sizes[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.dim % args.heads:
        raise UserError(f"--heads {args.heads} does not divide --dim {args.dim}")
    return args


def pick_device(name):
    """"auto" is cuda, else mps, else cpu; prints nothing, raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0][:80]})") from None


def open_data(args, device):
    """The Data that the options name, on the device; sets args.image_size and checks that patches fit."""
    data = load(args.data, args.data_dir, args.seed, args.image_size).to(device)
    args.image_size = data.image_size
    if args.image_size % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size} does not divide the picture's side {args.image_size}")
    return data


def resume(args, script, **parts):
    """Fills parts (model, optimizer, ema) from --out's checkpoint if --resume; returns its step and seconds."""
    path = pathlib.Path(args.out) / "checkpoint.pt"
    if not args.resume or not path.exists():
        return 0, 0.0
    checkpoint = load_checkpoint(path, script)
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["step"], checkpoint["scores"]["seconds"]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: does not fit these options ({str(error).splitlines()[0][:100]})") from None


class Steps:
    """`for step in Steps(...)`: a progress bar over the training steps, on which Ctrl-C ends a step in peace.

    `due(step)` says when to write the checkpoint: at intervals, at the end and after Ctrl-C.
    """

    def __init__(self, args, start=0, seconds=0.0):
        self.start, self.total, self.every = start, args.steps, args.save_seconds
        self.began, self.saved, self.stop = time.time() - seconds, time.time(), False

    @property
    def seconds(self):
        return time.time() - self.began

    def __iter__(self):
        def stop(*_):
            self.stop = True
            signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait

        before = signal.signal(signal.SIGINT, stop)
        try:
            with tqdm(range(self.start, self.total), initial=self.start, total=self.total, mininterval=0.5) as self.bar:
                for step in self.bar:
                    yield step
                    if self.stop:
                        raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self, loss, step):
        """Stops the run if the loss is not finite; shows it on the bar."""
        if not math.isfinite(value := loss.item()):
            raise UserError(f"the loss is {value} at step {step}: the last checkpoint is as it was; try a lower --lr")
        self.bar.set_postfix_str(f"loss {value:.4f}", refresh=False)

    def due(self, step):
        if self.stop or step + 1 == self.total or time.time() - self.saved > self.every:
            self.saved = time.time()
            return True


def report(script, out, scores, files):
    """Prints the scores and the files that were written; returns the scores."""
    for key, value in scores.items():
        print(f"{key:>16}  {f'{value:.4f}' if isinstance(value, float) else value}")
    print(f"{script}: wrote " + ", ".join(str(pathlib.Path(out) / file) for file in files))
    return scores


def run(train, parse_args):
    """The scripts' main: exit status 2 and one line for a UserError, 130 for Ctrl-C, otherwise 0."""
    try:
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the checkpoint is kept; --resume goes on from it", file=sys.stderr)
        sys.exit(130)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add("--data", "shapes", "shapes, cifar10, cifar100 or the path of an .npz of your own")
    parser.add("--data-dir", "datasets", "where data sets are kept")
    parser.add("--image-size", None, "rescale the pictures to this side", type=number(int, 4, 1024))
    parser.add("--seed", 0, "of the drawn pictures", type=number(int, 0, 10**9))
    parser.add("--out", "out/data", "where the sheet goes")
    return parser.parse_args(argv)


def main(args):
    data = load(args.data, args.data_dir, args.seed, args.image_size)
    save_png(pathlib.Path(args.out) / "sheet.png", data.train_images[:32], columns=8)
    for i, caption in enumerate(data.train_captions[:32]):
        print(f"row {i // 8 + 1}, column {i % 8 + 1}: {caption}")
    unseen = "" if data.unseen_images is None else f", {len(data.unseen_images)} of unseen pairs"
    print(f"{data.name}: {len(data.train_images)} training and {len(data.test_images)} test pictures{unseen}, "
          f"{data.image_size} x {data.image_size}; {len(data.class_names)} classes: {', '.join(data.class_names)}")
    print(f"mean {[round(v, 4) for v in data.mean.tolist()]}, std {[round(v, 4) for v in data.std.tolist()]}")
    print(f"wrote {pathlib.Path(args.out) / 'sheet.png'}")


if __name__ == "__main__":
    run(main, parse_args)
