"""All that the six models share beside the Transformer: data sets, yardsticks, files, command line.

    python data.py                    # draws 32 images of the default data set, with captions
    python data.py --data cifar10     # downloads the official archive the first time

Nobody needs to read this file beside the slides, but two parts are worth it: `shapes`, the data set
that all default runs train on, and `linear_probe`, the yardstick for what a model has learned.

Sections: 1 data sets, 2 batches and augmentation, 3 yardsticks, 4 pictures, 5 checkpoints and log,
6 command line and run, 7 released weights.

Letters: B images in a batch, N images in a data set, D width of the features, K classes,
H and W height and width of an image.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import html
import html.entities
import inspect
import io
import math
import os
import pathlib
import pickle
import re
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# -------------------------------------------------------------------------------------- 1 data sets


@dataclass
class Data:
    """A data set in memory; `to` moves it to the device whole, as bytes.

    After construction it also has `image_size`, the side H of an image, and `mean` and `std`, float
    (3,): the statistics of the color channels of the training images, on the scale 0 to 1.
    """

    name: str  # "shapes", "cifar10" or "cifar100"; of your own file its name without .npz
    class_names: list  # K texts; label k means class_names[k]
    train_images: torch.Tensor  # (N, 3, H, H) uint8
    train_labels: torch.Tensor  # (N,) int64, from 0 to K - 1
    train_captions: list  # N texts, one for each image
    test_images: torch.Tensor  # the same three for the test set
    test_labels: torch.Tensor
    test_captions: list
    unseen_images: torch.Tensor = None  # only `shapes` has them: images of pairs of a color and
    unseen_labels: torch.Tensor = None  # a shape that occur in no training and in no test image
    unseen_captions: list = field(default_factory=list)
    root: pathlib.Path = pathlib.Path("datasets")  # the folder in which data sets are kept

    def __post_init__(self):
        self.measure()

    def measure(self):
        """Sets image_size, mean and std."""
        self.image_size = self.train_images.shape[-1]
        enough = max(1, 10_240_000 // self.image_size**2)  # 10,000 images of 32 x 32 pixels
        pixels = self.train_images[:enough].transpose(0, 1).flatten(1).float() / 255  # (3, n H H)
        self.mean = pixels.mean(1)
        self.std = pixels.std(1).clamp(min=1e-3)

    def to(self, device):
        """Moves every tensor to the device and returns self."""
        for key, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, key, value.to(device))
        return self

    def normalize_with(self, mean, std):
        """From now on, with the three means and stds that a released model was trained with."""
        self.mean = torch.tensor(mean).to(self.mean)
        self.std = torch.tensor(std).to(self.std)

    def normalize(self, images):
        """uint8 (B, 3, H, H) -> float32, with mean 0 and variance 1 in each channel."""
        return normalize(images, self.mean, self.std)

    def denormalize(self, images):
        """The inverse of normalize: float (B, 3, H, H) -> the same with values from 0 to 1."""
        return (images.float() * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)


def normalize(images, mean, std):
    """uint8 (B, 3, H, H) -> float32: (images / 255 - mean) / std, three means and three stds."""
    mean = torch.as_tensor(mean, device=images.device)[:, None, None]
    std = torch.as_tensor(std, device=images.device)[:, None, None]
    return (images.float() / 255 - mean) / std


def load(name="shapes", root="datasets", seed=0, image_size=None):
    """The Data of a name: shapes, cifar10, cifar100, or the path of your own file ending in .npz.

    The seed decides what `shapes` draws and which captions CIFAR gets. `image_size` rescales the
    images. Raises UserError for whatever cannot be read as images.
    """
    root = pathlib.Path(root)
    if name == "shapes":
        dataset = shapes(seed)
    elif name in CIFAR:
        dataset = cifar(name, root, seed)
    elif str(name).endswith(".npz"):
        dataset = npz(pathlib.Path(name))
    else:
        raise UserError(f"--data {name}: choose shapes, cifar10, cifar100 or a path ending in .npz")
    dataset.root = root
    if image_size and image_size != dataset.image_size:
        dataset.train_images = rescale(dataset.train_images, image_size)
        dataset.test_images = rescale(dataset.test_images, image_size)
        if dataset.unseen_images is not None:
            dataset.unseen_images = rescale(dataset.unseen_images, image_size)
        dataset.measure()
    return dataset


def rescale(images, size):
    """uint8 (N, 3, H, H) -> uint8 (N, 3, size, size)."""
    parts = []
    for part in images.split(1000):  # all at once would need four times the memory, as floats
        part = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        parts.append(part.round().byte())
    return torch.cat(parts)


SHAPES = ["circle", "square", "triangle", "diamond", "star",
          "heart", "cross", "ring", "moon", "arrow"]
COLORS = {  # name -> red, green, blue, each from 0 to 255
    "red": (215, 45, 45),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 45),
    "green": (45, 165, 65),
    "cyan": (60, 195, 210),
    "blue": (50, 85, 215),
    "purple": (145, 65, 190),
    "pink": (240, 125, 180),
}
POSITIONS = {  # name -> direction of x and of y; y points downwards
    "in the middle": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
CAPTIONS = [
    "a {size} {color} {shape} {position}",
    "{position} a {size} {color} {shape}",
    "one {color} {shape}, {size}, {position}",
    "there is a {size} {color} {shape} {position}",
]


def shapes(seed=0, size=32, counts=(20000, 2000, 1000)):
    """The default data set: colored shapes on a textured ground, with captions; class = shape.

    counts: how many training, test and unseen images. Size, position, angle and ground do not
    depend on the class, color only by the pairs left out, and the ground is lighter than the shape
    as often as it is darker: a pixel tells little about the class, one has to look at the form.

    To copy this, also copy: CAPTIONS, COLORS, Data, POSITIONS, SHAPES, normalize, signed_distance,
    turn.
    """
    total = sum(counts)
    generator = torch.Generator().manual_seed(seed)

    def choose(n):
        """A whole number from 0 to n - 1 for each image, (total,)."""
        return torch.randint(n, (total,), generator=generator)

    def uniform(low, high, *more):
        """Numbers from low to high, (total, *more)."""
        return low + (high - low) * torch.rand(total, *more, generator=generator)

    # What is in each image. Each of the ten shapes occurs equally often.
    shape = torch.cat([torch.randperm(n, generator=generator) % 10 for n in counts])
    # The rule of the unseen pairs: shape s has its own order of the eight colors, which begins with
    # color 3 s (modulo 8). Places 0 and 3 of this order occur only in the unseen images: so two
    # colors of each shape are left out, other ones for most shapes, and each color is trained.
    common = torch.tensor([1, 2, 4, 5, 6, 7])[choose(6)]
    rare = torch.tensor([0, 3])[choose(2)]
    is_unseen = torch.arange(total) >= total - counts[2]
    place = torch.where(is_unseen, rare, common)
    color = (3 * shape + place) % 8
    position = choose(5)
    is_big = choose(2)
    wording = choose(4)
    texture = choose(4)

    # Where and how it is drawn, in pixels.
    radius = (uniform(9, 10.5) + 2.5 * is_big) * size / 32
    direction = torch.tensor(list(POSITIONS.values()))[position]  # (total, 2): x, y
    # uniform(3, 5, 1) is (total, 1), one number for x and y; uniform(-1, 1, 2) is one for each.
    center = direction * uniform(3, 5, 1) + uniform(-1, 1, 2)
    center = center * size / 32 + (size - 1) / 2
    angle = uniform(-0.3, 0.3)  # of the shape, in radians
    tilt = uniform(0, 3.14)  # of the texture
    phase = uniform(0, 6.28)
    wave = uniform(0.35, 0.8) * 32 / size  # the texture's frequency, in radians for one pixel
    paint = torch.tensor(list(COLORS.values()))[color] + uniform(-15, 15, 3)
    ground = uniform(35, 225, 1) + uniform(-30, 30, 3)
    tint = uniform(-22, 22, 3)  # what the texture adds to the ground where it is 1

    images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")  # each (H, W)
    for s in range(10):
        for i in (shape == s).nonzero()[:, 0].split(500):  # (n,): 500 images at a time
            # The shape, in coordinates that turn with it and in which its radius is 1.
            scale = radius[i, None, None]  # (n, 1, 1)
            dx = x - center[i, 0, None, None]
            dy = y - center[i, 1, None, None]
            dx, dy = turn(dx, dy, angle[i])
            distance = scale * signed_distance(SHAPES[s], dx / scale, dy / scale)
            inside = (0.5 - distance).clamp(0, 1)[:, None]  # (n, 1, H, W); soft over one pixel

            # One of four textures: stripes, checks, coarser checks (all from -0.5 to 0.5), and a
            # slope from left to right, from 0 to 1.
            across, along = turn(x, y, tilt[i])
            a = (wave[i, None, None] * across + phase[i, None, None]).sin()
            b = (wave[i, None, None] * along + phase[i, None, None]).sin()
            slope = (x / size).expand_as(a)
            pattern = torch.empty_like(a)  # (n, H, W)
            for t, candidate in enumerate([a / 2, a * b / 2, (a + b) / 4, slope]):
                has_it = texture[i] == t  # (n,)
                pattern[has_it] = candidate[has_it]
            pattern = pattern[:, None]  # (n, 1, H, W)

            back = ground[i, :, None, None] + tint[i, :, None, None] * pattern
            drawn = back + inside * (paint[i, :, None, None] - back)
            images[i] = drawn.clamp(0, 255).byte()

    color_names = list(COLORS)
    position_names = list(POSITIONS)
    captions = []
    for n in range(total):
        captions.append(CAPTIONS[wording[n]].format(
            size="big" if is_big[n] else "small", color=color_names[color[n]],
            shape=SHAPES[shape[n]], position=position_names[position[n]]))

    parts = []
    end = 0
    for count in counts:
        start = end
        end = start + count
        parts += [images[start:end], shape[start:end], captions[start:end]]
    return Data("shapes", list(SHAPES), *parts)


def turn(x, y, angle):
    """The coordinates x and y, (H, W) or (n, H, W), turned by n angles: two times (n, H, W)."""
    cos = angle.cos()[:, None, None]
    sin = angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def signed_distance(shape, x, y):
    """About the distance of points (n, H, W) to the outline of a shape, negative inside of it.

    It is exact where the nearest part of the outline is straight or a circle, which is enough to
    draw. The shape's radius is about 1, and y points downwards.
    """
    r = torch.hypot(x, y)
    up = -y
    side = x.abs()  # all ten but the moon are symmetric
    if shape == "circle":
        return r - 0.85
    if shape == "square":
        return torch.maximum(side, y.abs()) - 0.76
    if shape == "triangle":
        return torch.maximum(-up - 0.6, 0.87 * side + 0.5 * up - 0.46)
    if shape == "diamond":
        return 0.83 * side + 0.55 * y.abs() - 0.55
    if shape == "star":
        arm = 2 * math.pi / 5  # the angle between two arms
        # The angle from the nearest arm: from -arm / 2 to arm / 2.
        angle = (torch.atan2(x, up) + arm / 2) % arm - arm / 2
        along = r * angle.cos()  # coordinates along that arm, and across it
        across = (r * angle.sin()).abs()
        # One straight line, through the arm's tip, (along, across) = (1, 0); (0.59, 0.81) has
        # length 1 and is at a right angle to it.
        return 0.59 * (along - 1) + 0.81 * across
    if shape == "heart":  # two discs; below them (up < 0.35) a point
        point = torch.maximum(0.76 * side - 0.65 * up - 0.6, up - 0.35)
        return torch.minimum(torch.hypot(side - 0.43, up - 0.32) - 0.5, point)
    if shape == "cross":  # two bars
        upright = torch.maximum(side - 0.29, y.abs() - 0.88)
        level = torch.maximum(y.abs() - 0.29, side - 0.88)
        return torch.minimum(upright, level)
    if shape == "ring":
        return (r - 0.66).abs() - 0.24
    if shape == "moon":  # a disc without a second disc
        return torch.maximum(r - 0.92, 0.78 - torch.hypot(x - 0.5, y + 0.1))
    head = torch.maximum(0.7 * side + 0.7 * up - 0.63, -up)  # arrow
    return torch.minimum(head, torch.maximum(side - 0.27, (up + 0.43).abs() - 0.46))


# The official binary archives of CIFAR; nothing in them is ever unpickled.
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": (
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",  # the archive's MD5
        "cifar-10-batches-bin",  # its folder
        1,  # label bytes of a record; the last of them is the label
        {  # file -> number of records; the last file is the test set
            "data_batch_1.bin": 10000,
            "data_batch_2.bin": 10000,
            "data_batch_3.bin": 10000,
            "data_batch_4.bin": 10000,
            "data_batch_5.bin": 10000,
            "test_batch.bin": 10000,
        },
        "batches.meta.txt",  # the file of the class names
    ),
    "cifar100": (
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        2,
        {"train.bin": 50000, "test.bin": 10000},
        "fine_label_names.txt",
    ),
}
CIFAR_TEMPLATES = [  # the 18 prompts of CLIP's authors
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a black and white photo of a {}.",
    "a low contrast photo of a {}.",
    "a high contrast photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a photo of the {}.",
    "a blurry photo of the {}.",
    "a black and white photo of the {}.",
    "a low contrast photo of the {}.",
    "a high contrast photo of the {}.",
    "a bad photo of the {}.",
    "a good photo of the {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
    "a photo of the small {}.",
    "a photo of the big {}.",
]


def cifar(name, root, seed):
    """CIFAR from the folder `root`, downloaded if it is missing; captions from CLIP's templates."""
    archive, md5, folder, label_bytes, files, names_file = CIFAR[name]
    record_bytes = label_bytes + 3 * 32 * 32
    path = root / folder
    if not path.is_dir():
        members = {file: n * record_bytes for file, n in files.items()}
        members[names_file] = None  # of any size
        download(CIFAR_URL + archive, md5, root=root, folder=folder, members=members)
    images = []
    labels = []
    # (errors_become makes whatever goes wrong inside a UserError that begins with this message.)
    with errors_become(f"{path} is damaged: delete it, and the next run downloads it again"):
        text = (path / names_file).read_text(encoding="utf8")
        class_names = [line.replace("_", " ") for line in text.split()]
        if len(class_names) != int(name.removeprefix("cifar")):
            raise ValueError(f"{names_file}: {len(class_names)} class names")
        for file, n in files.items():
            content = torch.from_numpy(np.fromfile(path / file, np.uint8))
            if len(content) != n * record_bytes:
                raise ValueError(f"{file}: {len(content)} bytes, not {n * record_bytes}")
            records = content.reshape(n, record_bytes)
            labels.append(records[:, label_bytes - 1].long())
            images.append(records[:, label_bytes:].reshape(n, 3, 32, 32))
            if labels[-1].max() >= len(class_names):
                raise ValueError(f"{file}: label {labels[-1].max()} of {len(class_names)} classes")
    train_labels = torch.cat(labels[:-1])
    generator = torch.Generator().manual_seed(seed)
    return Data(
        name=name,
        class_names=class_names,
        train_images=torch.cat(images[:-1]),
        train_labels=train_labels,
        train_captions=describe(train_labels, class_names, generator),
        test_images=images[-1],
        test_labels=labels[-1],
        test_captions=describe(labels[-1], class_names, generator),
    )


def describe(labels, class_names, generator):
    """A caption for each label (n,): its class name in a template drawn at random; n texts."""
    templates = torch.randint(len(CIFAR_TEMPLATES), labels.shape, generator=generator)
    return [CIFAR_TEMPLATES[t].format(class_names[k]) for t, k in zip(templates, labels)]


def download(url, md5, root, folder, members):
    """Gets a .tar.gz; its `members` {name: size or None} arrive in root/folder, all or none.

    All work is done in a temporary folder, and one rename ends it: an interrupted download leaves
    nothing that could be taken for whole. Members are read by name, so a hostile archive cannot
    write to other places.
    """
    message = f"could not get {url}: nothing was kept; try again, or unpack it into {root}"
    with errors_become(message):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder}.part-", dir=root) as part:
            archive = pathlib.Path(part) / "archive"
            found = fetch(url, archive)
            if found != md5:
                raise ValueError(f"{archive.stat().st_size} bytes of md5 {found}")
            new = pathlib.Path(part) / folder
            new.mkdir()
            with tarfile.open(archive, "r:gz") as tar:
                for name, size in members.items():
                    member = tar.getmember(f"{folder}/{name}")
                    if not member.isreg() or size not in (None, member.size):
                        raise ValueError(f"{name} is not a plain file of {size} bytes")
                    (new / name).write_bytes(tar.extractfile(member).read())
            if not (root / folder).is_dir():  # it is there if another run was quicker
                new.rename(root / folder)


def fetch(url, path):
    """Writes what a web server answers to the path, with a progress bar; returns its MD5."""
    digest = hashlib.md5()
    with urllib.request.urlopen(url, timeout=30) as answer, open(path, "wb") as file:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=url.split("/")[-1]) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def npz(path):
    """An own data set: `images` uint8 (N, H, H, 3), `labels` (N,) whole numbers from 0.

    Optional: `captions`, N texts, and `class_names`, K texts. A tenth becomes the test set, for any
    seed the same one. Raises UserError if an array is missing or does not fit.
    """
    with errors_become(f"{path}: not a readable .npz without pickled objects"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.atleast_1d(file[key]) for key in file}
    images = arrays.get("images", np.empty(0))
    labels = arrays.get("labels", np.empty(0))
    n = len(images)
    side = images.shape[1] if images.ndim > 1 else 0
    good_images = images.dtype == np.uint8 and images.shape == (n, side, side, 3) and side > 0
    good_labels = labels.dtype.kind in "iu" and labels.shape == (n,)
    if not good_images or not good_labels or n < 20 or labels.min() < 0 or labels.max() > 9999:
        found = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        raise UserError(f"{path}: needs images uint8 (N, H, H, 3) and labels (N,) from 0 to 9999, "
                        f"N >= 20; it holds {found}")

    K = int(labels.max()) + 1
    class_names = [str(k) for k in range(K)]
    if "class_names" in arrays:
        class_names = texts(path, "class_names", arrays["class_names"])
        if len(class_names) < K:
            raise UserError(f"{path}: {len(class_names)} class_names for labels up to {K - 1}")
    captions = [f"a photo of a {class_names[k]}." for k in labels]
    if "captions" in arrays:
        captions = texts(path, "captions", arrays["captions"])
        if len(captions) != n:
            raise UserError(f"{path}: {len(captions)} captions for {n} images")

    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = []
    for i in order.split([n - n // 10, n // 10]):
        parts.append(torch.from_numpy(images[i]).permute(0, 3, 1, 2).contiguous())
        parts.append(torch.from_numpy(labels[i].astype(np.int64)))
        parts.append([captions[j] for j in i])
    return Data(path.stem, class_names, *parts)


def texts(path, key, array):
    """An array (n,) of texts, unicode or UTF-8 bytes -> list of str; else UserError."""
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise UserError(f"{path}: {key} must be one text each, an array of texts (N,); "
                        f"it holds {array.dtype} {array.shape}")
    with errors_become(f"{path}: {key} must be texts in UTF-8"):
        if array.dtype.kind == "S":
            array = np.char.decode(array, "utf8")
        return [str(text) for text in array]


def zero_shot_task(dataset):
    """What CLIP classifies without training: -> names (K texts), templates (M texts), parts.

    A name put for the {} of a template is a prompt; the first template is the one to use alone.
    parts: {"seen": (images, targets), "unseen": ...}, where targets (n,) int64 index the names.
    For `shapes` the names are the 80 pairs of a color and a shape, and the templates are "one {}"
    and the captions with every size and position. Any other data set has its class names, CLIP's
    templates for CIFAR, and no part "unseen".

    To copy this, also copy: CAPTIONS, CIFAR_TEMPLATES, COLORS, POSITIONS, SHAPES.
    """
    if dataset.unseen_images is None:
        parts = {"seen": (dataset.test_images, dataset.test_labels)}
        return dataset.class_names, CIFAR_TEMPLATES, parts

    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    templates = ["one {}"]
    for caption in CAPTIONS:
        for size in ("small", "big"):
            for position in POSITIONS:
                template = caption.replace("{color} {shape}", "{}")
                template = template.replace("{size}", size)
                templates.append(template.replace("{position}", position))

    def targets(captions):
        found = []
        for caption in captions:
            for k, name in enumerate(names):
                if name in caption:
                    found.append(k)
        return torch.tensor(found, device=dataset.mean.device)

    parts = {
        "seen": (dataset.test_images, targets(dataset.test_captions)),
        "unseen": (dataset.unseen_images, targets(dataset.unseen_captions)),
    }
    return names, templates, parts


# ---------------------------------------------------------------------- 2 batches and augmentation


def batch_index(n, batch_size, step, seed):
    """Which of n images are in the batch of a step, (B,) int64.

    Epochs without repetition. The step alone decides, so that a resumed run sees the same batches.

    To copy this, also copy: permutation.
    """
    batch_size = min(batch_size, n)
    batches = n // batch_size  # in an epoch
    epoch = step // batches
    start = step % batches * batch_size
    return permutation(n, epoch, seed)[start:start + batch_size]


@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    """The order of the n images in an epoch; kept, because each of its steps asks for it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def augment(images, pad=4, flip=True):
    """Shifts each image by up to `pad` pixels (edges reflected) and mirrors half of the images.

    uint8 (B, 3, H, W) -> the same; all images at once, by indexing, on the device of the images.
    """
    B, _, H, W = images.shape
    device = images.device
    pad = min(pad, H - 1, W - 1)

    def shifted(side):
        """For each image, which row (or column) of pixels comes where after a shift, (B, side)."""
        shift = torch.randint(2 * pad + 1, (B, 1), device=device) - pad
        i = shift + torch.arange(side, device=device)
        i = torch.where(i < 0, -i, i)  # reflect at the first pixel: -1 becomes 1
        return torch.where(i > side - 1, 2 * (side - 1) - i, i)  # and at the last

    rows = shifted(H)
    columns = shifted(W)
    if flip:
        is_mirrored = torch.randint(2, (B, 1), device=device) == 1
        columns = torch.where(is_mirrored, columns.flip(1), columns)
    image = torch.arange(B, device=device)[:, None, None]
    pixels = images.permute(0, 2, 3, 1)  # (B, H, W, 3)
    pixels = pixels[image, rows[:, :, None], columns[:, None, :]]  # indices broadcast to (B, H, W)
    return pixels.permute(0, 3, 1, 2)


def mixup_or_cutmix(images, targets):
    """Mixes the batch with itself in reverse order: half of the batches by mixup, half by cutmix.

    images (B, 3, H, W) float, targets (B, K) probabilities -> the same, mixed. Mixup blends two
    images (Zhang 2018), cutmix pastes a rectangle of the one into the other (Yun 2019).
    """
    B, _, H, W = images.shape
    keep = torch.rand(()).item()  # the share of the first image
    other = images.flip(0)
    if torch.rand(()) < 0.5:
        mixed = keep * images + (1 - keep) * other
    else:
        # A rectangle with the share 1 - keep of the area.
        h = round(H * math.sqrt(1 - keep))
        w = round(W * math.sqrt(1 - keep))
        y = torch.randint(H - h + 1, ())
        x = torch.randint(W - w + 1, ())
        mixed = images.clone()
        mixed[:, :, y:y + h, x:x + w] = other[:, :, y:y + h, x:x + w]
        keep = 1 - h * w / (H * W)  # in whole pixels
    return mixed, keep * targets + (1 - keep) * targets.flip(0)


def random_erasing(images):
    """A quarter of the images get a square of one random color (Zhong 2020).

    images (B, 3, H, H) float, normalized -> the same. The square's side is H / 4.
    """
    B, _, H, _ = images.shape
    side = H // 4
    images = images.clone()
    for i in (torch.rand(B) < 0.25).nonzero()[:, 0]:
        y, x = torch.randint(H - side + 1, (2,))
        images[i, :, y:y + side, x:x + side] = torch.randn(3, 1, 1).to(images)
    return images


# ------------------------------------------------------------------------------------- 3 yardsticks


@torch.no_grad()
def extract(features, dataset, images, amp):
    """The features of all images: uint8 (N, 3, H, H) -> (N, D) float32.

    features: a function of normalized images, (B, 3, H, H) -> (B, D); if it is of a model with
    batch norm, call eval first. amp: the context of `autocast`. Raises UserError if a feature is
    not finite.
    """
    batch_size = 500 if images.is_cuda else 50  # on a CPU, what fits its cache is fastest
    parts = []
    with amp:
        for part in images.split(batch_size):
            parts.append(features(dataset.normalize(part)).float())
    x = torch.cat(parts)
    if not x.isfinite().all():
        raise UserError("the network's outputs are not finite: it diverged; try a smaller --lr")
    return x


def both_sets(features, dataset, amp):
    """-> train_x, train_y, test_x, test_y: the features of all images, for linear_probe and knn.

    To copy this, also copy: extract.
    """
    train_x = extract(features, dataset, dataset.train_images, amp)
    test_x = extract(features, dataset, dataset.test_images, amp)
    return train_x, dataset.train_labels, test_x, dataset.test_labels


def linear_probe(train_x, train_y, test_x, test_y, percent=100):
    """How well a linear classifier reads the classes off frozen features: test accuracy, 0 to 1.

    train_x (N, D) features, train_y (N,) int64 labels, of which the first `percent` % are used (but
    at least 20). Logistic regression: weight W (K, D) and bias b (K,) minimize

        mean of cross_entropy(x W^T + b, y)  +  l2 / 2 * sum of W^2

    l2 is the best of four on a tenth of the training features, held out (few of them choose partly
    by chance). Then all are fitted, and the test features are used once, for the accuracy.

    To copy this, also copy: accuracy, fit, standardize.
    """
    n = max(20, len(train_y) * percent // 100)
    train_y = train_y[:n]
    train_x, test_x = standardize(train_x[:n], test_x)
    n, D = train_x.shape
    K = int(train_y.max()) + 1

    # Search: hold out a tenth, fit the rest with each l2.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(train_y.device)
    held = order[:n // 10]
    kept = order[n // 10:]
    weight = train_x.new_zeros(K, D)
    bias = train_x.new_zeros(K)
    best = -1.0
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4):  # each starts where the last one ended: that is quicker
        weight, bias = fit(train_x[kept], train_y[kept], weight, bias, l2=l2, iterations=25)
        score = accuracy(train_x[held], train_y[held], weight, bias)
        if score > best:
            best = score
            best_l2 = l2
            start = (weight, bias)

    weight, bias = fit(train_x, train_y, *start, l2=best_l2, iterations=60)
    return accuracy(test_x, test_y, weight, bias)


def standardize(train_x, test_x):
    """Both sets of features (N, D), shifted and scaled so that train_x has mean 0 and std 1."""
    mean = train_x.mean(0)
    std = train_x.std(0) + 1e-6
    return (train_x - mean) / std, (test_x - mean) / std


def fit(x, y, weight, bias, l2, iterations):
    """Logistic regression by L-BFGS, from weight (K, D) and bias (K,) on; returns new ones."""
    weight = weight.clone().requires_grad_()
    bias = bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations,
                                  line_search_fn="strong_wolfe")

    def loss_and_gradient():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_and_gradient)  # which calls it once or more for each iteration
    return weight.detach(), bias.detach()


def accuracy(x, y, weight, bias):
    """The share of features x (N, D) whose class y (N,) gets the largest score, from 0 to 1."""
    predicted = F.linear(x, weight, bias).argmax(1)
    return (predicted == y).float().mean().item()


def knn(train_x, train_y, test_x, test_y, k=20):
    """Accuracy, 0 to 1, of a vote of the k nearest training features; nothing is trained.

    Near means a large cosine, and a neighbor's vote weighs exp(cosine / 0.07) (Wu 2018, DINO).
    """
    train_x = F.normalize(train_x, dim=1)
    test_x = F.normalize(test_x, dim=1)
    classes = F.one_hot(train_y).float()  # (N, K)
    k = min(k, len(train_x))
    correct = 0
    for x, y in zip(test_x.split(500), test_y.split(500)):  # x (b, D)
        cosine, neighbor = (x @ train_x.T).topk(k)  # each (b, k)
        weight = (cosine / 0.07).exp()
        votes = (weight[:, :, None] * classes[neighbor]).sum(1)  # (b, K)
        correct += (votes.argmax(1) == y).sum().item()
    return correct / len(test_y)


def untrained(model, seed):
    """A copy of a model with new random weights, drawn as those of a new model."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, ScaledLinear):  # DINOv2's, below: its factors start at 1
            nn.init.ones_(module.gamma)
    return model


def probe_scores(dataset, features, random_features, amp):
    """The accuracies that all six scripts report, of `features` and of two baselines.

    probe, the same with 1 % of the labels, and knn; probe_random: the same network untrained;
    probe_pixels: no network, the pixels themselves, averaged to at most 32 x 32.
    """
    side = min(32, dataset.image_size)

    def pixels(images):
        return F.adaptive_avg_pool2d(images, side).flatten(1)

    own = both_sets(features, dataset, amp)
    return dict(
        probe=linear_probe(*own),
        probe_1_percent=linear_probe(*own, percent=1),
        knn=knn(*own),
        probe_random=baseline(random_features, dataset, amp),
        probe_pixels=baseline(pixels, dataset, amp),
    )


def baseline(features, dataset, amp):
    """linear_probe of features that no training changes: kept in the data folder for other runs."""
    if len(dataset.train_images) < 2000:  # it takes a moment only
        return linear_probe(*both_sets(features, dataset, amp))
    # A hundred features tell which function it is: another seed or size gives another file. So does
    # another linear_probe, or a change in what it calls.
    x = extract(features, dataset, dataset.test_images[:100], amp)
    key = x.cpu().numpy().tobytes()
    for function in (linear_probe, standardize, fit, accuracy):
        key += inspect.getsource(function).encode()
    path = dataset.root / f"probe-{digest(dataset, key)}.pt"
    if path.exists():
        with contextlib.suppress(UserError, KeyError):  # a damaged file is made again
            return load_checkpoint(path, "baseline")["probe"]
    probe = linear_probe(*both_sets(features, dataset, amp))
    keep(path, script="baseline", probe=probe)
    return probe


def digest(dataset, more):
    """16 letters that change with the images, the labels, and the bytes in `more`."""
    hashed = hashlib.md5(more)
    for tensor in (dataset.train_images, dataset.train_labels,
                   dataset.test_images, dataset.test_labels):
        hashed.update(tensor.cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def keep(path, **content):
    """A checkpoint that only spares the next run some time: if it cannot be written, so be it."""
    try:
        save_checkpoint(path, **content)
    except UserError as error:  # a read-only data folder is no reason to end a run
        print(f"not kept for the next run: {error}")


def frechet(x, y):
    """How far two sets of features x (n, D) and y (m, D) are apart: the squared Frechet distance.

    A Gaussian is fitted to each set, with the set's mean m and covariance S, and

        distance = |m_x - m_y|^2 + trace(S_x + S_y - 2 (S_x^(1/2) S_y S_x^(1/2))^(1/2))

    It is 0 if both sets are the same (Heusel 2017: with Inception's features it is the FID). Two
    sets of the same kind are above 0, the more so the smaller they are: compare only equal numbers
    of images. Computed in float64, on the CPU.
    """
    x = x.cpu().double()
    y = y.cpu().double()
    S_x = x.T.cov()
    S_y = y.T.cov()
    values, vectors = torch.linalg.eigh(S_x)
    scales = torch.diag(values.clamp(min=0).sqrt())
    root = vectors @ scales @ vectors.T  # S_x^(1/2)
    # The trace of a matrix's root is the sum of the roots of its eigenvalues.
    cross = torch.linalg.eigvalsh(root @ S_y @ root).clamp(min=0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + S_x.trace() + S_y.trace() - 2 * cross).item()


class SmallCNN(nn.Module):
    """A small convolutional network, the baseline: (B, 3, H, H) -> logits (B, K)."""

    def __init__(self, num_classes=10, width=32):
        super().__init__()

        def stage(channels_in, channels_out):
            conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        self.body = nn.Sequential(
            *stage(3, width),
            nn.MaxPool2d(2),
            *stage(width, 2 * width),
            nn.MaxPool2d(2),
            *stage(2 * width, 4 * width),
            *stage(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images):
        """(B, 3, H, H) -> (B, 4 * width): the mean over the positions."""
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def train_cnn(dataset, seed=0, steps=200, batch_size=128):
    """A SmallCNN trained on the labels, in eval mode; kept in the data folder for the next call."""
    device = dataset.train_images.device
    layout = torch.channels_last  # the faster one on a CPU

    def new_cnn():
        torch.manual_seed(seed)
        return SmallCNN(len(dataset.class_names)).to(device, memory_format=layout)

    # The file's name tells what it was trained on, and how: other images are another network.
    recipe = [VERSION, dataset.class_names, seed, steps, batch_size,
              dataset.mean.tolist(), dataset.std.tolist()]
    path = dataset.root / f"cnn-{digest(dataset, repr(recipe).encode())}.pt"
    if path.exists():
        with contextlib.suppress(UserError, KeyError, RuntimeError):  # a damaged file is made again
            cnn = new_cnn()
            cnn.load_state_dict(load_checkpoint(path, "cnn")["model"])
            return cnn.eval()

    cnn = new_cnn()
    optimizer = torch.optim.AdamW(cnn.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        i = batch_index(len(dataset.train_images), batch_size, step, seed).to(device)
        x = dataset.normalize(augment(dataset.train_images[i])).contiguous(memory_format=layout)
        loss = F.cross_entropy(cnn(x), dataset.train_labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    keep(path, script="cnn", model=cnn.state_dict())
    return cnn.eval()


# --------------------------------------------------------------------------------------- 4 pictures


def save_png(path, images, columns=8, gap=2):
    """Images (N, 3, H, W), uint8 or float from 0 to 1, in rows of `columns`; enlarges small ones.

    To copy this, also copy: UserError, png_chunk, errors_become, replace, write_file.
    """
    if images.dtype != torch.uint8:
        images = (images.float().clamp(0, 1) * 255).round().byte()
    zoom = max(1, 96 // images.shape[2])
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    h, w = images.shape[2:]
    H = gap + rows * (h + gap)
    W = gap + columns * (w + gap)
    sheet = torch.full((H, W, 3), 255, dtype=torch.uint8)  # white
    for n, image in enumerate(images):
        y = gap + n // columns * (h + gap)
        x = gap + n % columns * (w + gap)
        sheet[y:y + h, x:x + w] = image.permute(1, 2, 0)
    lines = np.pad(sheet.reshape(H, -1).numpy(), ((0, 0), (1, 0)))  # a line: filter byte 0, RGB...
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits, 2: RGB
    content = b"\x89PNG\r\n\x1a\n"
    content += png_chunk(b"IHDR", header)
    content += png_chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    content += png_chunk(b"IEND", b"")
    write_file(path, content)


def png_chunk(kind, body):
    """A part of a PNG file: length, kind, body, checksum."""
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


# Eight colors that the color-blind can tell apart, too (Okabe and Ito 2008; the yellow is darker).
CURVE_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7",
                "#E69F00", "#56B4E9", "#000000", "#A09000"]


def save_chart(path, series, xlabel, ylabel, lines=True):
    """An SVG chart of {label: [(x, y), ...]} with axes, ticks and legend; lines=False: points.

    Points that are not finite are left out.

    To copy this, also copy: CURVE_COLORS, UserError, errors_become, replace, ticks, write_file.
    """
    curves = {}
    for name, points in series.items():
        curves[name] = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    every = [point for points in curves.values() for point in points] or [(0, 0)]
    xs = [x for x, y in every]
    ys = [y for x, y in every]
    left = min(xs)
    right = max(xs)
    low = min(ys)
    high = max(ys)

    def px(x):  # the axes are 440 pixels long
        return 70 + 440 * (x - left) / ((right - left) or 1)

    def py(y):  # and 280 high; y grows upwards
        return 310 - 280 * (y - low) / ((high - low) or 1)

    def text(x, y, words, more=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>'

    width = 560 + max([120, *(7 * len(name) for name in curves)])  # room for the legend
    height = max(370, 60 + 18 * len(curves))  # room for a long legend
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           f'font-size="12" font-family="sans-serif">'
           f'<rect width="{width}" height="{height}" fill="white"/>'
           '<path d="M70 30V310H510" fill="none" stroke="black"/>']
    out.append(text(290, 355, xlabel, 'text-anchor="middle"'))
    out.append(text(0, 0, ylabel,
                    'text-anchor="middle" transform="translate(18 170) rotate(-90)"'))
    for x in ticks(left, right):
        out.append(text(px(x), 328, f"{x:.7g}", 'text-anchor="middle"'))
        out.append(f'<path d="M{px(x):.1f} 310v5" stroke="black"/>')
    for y in ticks(low, high):
        out.append(text(62, py(y) + 4, f"{y:.6g}", 'text-anchor="end"'))
        out.append(f'<path d="M70 {py(y):.1f}h-5" stroke="black"/>')
    for i, (name, points) in enumerate(curves.items()):
        color = f"hsl({i * 137 % 360} 65% 42%)"  # steps of 137 degrees: neighbors differ
        if len(curves) <= len(CURVE_COLORS):
            color = CURVE_COLORS[i]
        pixels = [(px(x), py(y)) for x, y in points]
        if lines:
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            out.append(f'<polyline fill="none" stroke="{color}" points="{corners}"/>')
        if lines and len(pixels) > 30:
            pixels = []  # so many dots would hide the line
        for x, y in pixels + [(530, 40 + 18 * i)]:  # the last is the legend's
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        out.append(text(540, 44 + 18 * i, name))
    write_file(path, "\n".join(out + ["</svg>\n"]).encode())


def ticks(low, high):
    """Round numbers from low to high, at least three if they differ."""
    if low == high:
        return [low]
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    for step in (5 * unit, 2 * unit, unit):
        if (high - low) / step >= 3:
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def compare_logs(path, folders, columns, x, xlabel, ylabel, relative=False, file="log.csv"):
    """One chart from the logs of several runs: a curve for each of the folders and columns.

    x: the column of the horizontal axis. relative: each curve is divided by its first value.
    A folder without a whole log that has these columns is refused with a UserError.
    """
    folders = [pathlib.Path(folder) for folder in folders]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):  # a/run and b/run
        names = [str(folder) for folder in folders]
    series = {}
    for name, folder in zip(names, folders):
        with errors_become(f"{folder}: holds no whole {file} with {x}, {', '.join(columns)}"):
            table = read_log(folder / file)
            for column in columns:
                label = f"{name}: {column.replace('_', ' ')}" if len(columns) > 1 else name
                values = table[column]
                if relative:
                    first = max(values[0], 1e-9)
                    values = [value / first for value in values]
                series[label] = list(zip(table[x], values))
    save_chart(path, series, xlabel, ylabel)


# ---------------------------------------------------------------------------- 5 checkpoints and log

VERSION = 2  # of the names in a checkpoint; 1 was before the rewrite, and is refused
NOT_REPLACED = set()  # the logs that could not be written


def save_checkpoint(path, **content):
    """State dicts and plain values, whole or not at all: the last good one is never damaged.

    Each file has the entry "ema", averaged weights, None for models without any.
    """
    buffer = io.BytesIO()
    torch.save({"ema": None} | content | {"version": VERSION}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path, script=None):
    """A file of tensors and plain values -> dict; code in it never runs.

    `script`: which script must have written it. Raises UserError.
    """
    with errors_become(f"{path}: not a whole PyTorch file of plain tensors"):
        check_zip(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it is damaged, or holds objects other than tensors") from None
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    if script and content.get("script") != script:
        writer = content.get("script", "another program")
        raise UserError(f"{path}: written by {writer}, not by {script}.py")
    if "script" in content and content.get("version") != VERSION:
        raise UserError(f"{path}: written by another version of this repository; train it again")
    return content


def check_zip(path):
    """ValueError if a zip file has a wrong checksum, or a part is said to be a folder (one flipped
    bit): PyTorch looks at neither, and gives wrong numbers or zeros."""
    if zipfile.is_zipfile(path):
        file = zipfile.ZipFile(path)
        if file.testzip() or any(part.external_attr & 16 for part in file.infolist()):
            raise ValueError("it is damaged")


def resume(args, script, **parts):
    """With --resume, fills the parts (model, optimizer, ...) from --out; -> step, scores."""
    path = pathlib.Path(args.out) / "checkpoint.pt"
    if not args.resume:
        return 0, {}
    if not path.exists():
        print(f"no checkpoint in {args.out} yet: this run starts anew")
        return 0, {}
    checkpoint = load_checkpoint(path, script)
    with errors_become(f"{path}: does not fit these options"):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["step"], checkpoint["scores"]


def log(path, step, **numbers):
    """Adds a line to a log.csv: the step and the numbers, which may be tensors of one element.

    Lines from this step on are deleted first: they are an earlier run's, or were written by a run
    that was killed after its last checkpoint. If the file is there but cannot be replaced (on
    Windows: as long as a spreadsheet shows it), this line is left out, and training goes on.
    """
    path = pathlib.Path(path)
    header = ",".join(["step", *numbers])
    new = ",".join([str(step), *(f"{float(value):.9g}" for value in numbers.values())])
    attempts = 1 if path in NOT_REPLACED else 5  # only the first line waits
    for attempt in range(attempts):
        if attempt > 0:
            time.sleep(0.25)
        with errors_become(f"cannot write {path}"):
            if add_line(path, header, new, step):
                return
    if path not in NOT_REPLACED:
        NOT_REPLACED.add(path)
        print(f"{path} cannot be written (is it open elsewhere?); lines are left out until it can")


def add_line(path, header, new, step):
    """One attempt of `log` -> True, or False if the file is there but cannot be replaced."""
    try:
        rows = path.read_text(encoding="utf8").splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) < step]
        replace(path, "\n".join([header, *rows, new, ""]).encode())
    except PermissionError:
        if not path.exists():  # nothing can be written into this folder at all
            raise
        return False
    return True


def read_log(path):
    """What `log` wrote -> {column: its numbers}; ValueError if it holds no whole lines."""
    header, *rows = path.read_text(encoding="utf8").splitlines()
    table = {name: [] for name in header.split(",")}
    if not rows:
        raise ValueError("it has no lines")
    for row in rows:
        numbers = [float(word) for word in row.split(",")]
        for name, number in zip(table, numbers, strict=True):  # strict: as many as columns
            table[name].append(number)
    return table


def write_file(path, content):
    """Writes bytes, whole or not at all; UserError if that is not possible."""
    with errors_become(f"cannot write {path}"):
        replace(pathlib.Path(path), content)


def replace(path, content):
    """Writes to a part file and renames it: neither a reader nor a kill ever meets half a file."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------- 6 command line and run


class UserError(ValueError):
    """A mistake that the user can mend: one line, what is wrong and what would be right."""


@contextlib.contextmanager
def errors_become(message):
    """Whatever a bad file, disk or network raises inside becomes one UserError line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # corrupt bytes can raise nearly anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].endswith(":"):
            lines = lines[1:]  # the first is only a heading
        reason = lines[0][:150] if lines else type(error).__name__
        raise UserError(f"{message} ({reason})") from None


class Parser(argparse.ArgumentParser):
    """argparse that refuses a wrong argument in one line, and names the defaults in --help."""

    def __init__(self, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def add(self, name, default, help, **more):
        """An option and a sentence about it, to which the default is added if there is one."""
        is_flag = "action" in more
        if default is not None and default != [] and not is_flag:
            help = f"{help} (default: {default})"
        self.add_argument(name, default=default, help=help, **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high=10**12):
    """An argparse type: an int or a float from low to high."""

    def convert(text):
        try:
            value = kind(text)
            if low <= value <= high:
                return value
        except ValueError:
            pass  # refused below, as a number out of range is
        word = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {word} from {low} to {high}")

    return convert


def common_options(parser, script, sizes, steps, batch_size, lr):
    """The options that all six scripts share, in the same words."""
    count = number(int, 1, 10**9)
    side = number(int, 1, 65536)
    parser.add("--data", "shapes", "The data set: shapes, cifar10, cifar100 or the path of your "
               "own file ending in .npz.")
    parser.add("--data-dir", "datasets", "The folder in which data sets are kept.")
    parser.add("--size", "tiny", "The size of the model, a name for its width, depth and so on.",
               choices=sizes)
    parser.add("--image-size", None, "All images are rescaled to this side, in pixels; without it "
               "they stay as they are, or get the side that belongs to --size.", type=side)
    parser.add("--patch-size", None, "The side of a patch in pixels, if not that of --size.",
               type=side)
    parser.add("--dim", None, "The width D of the Transformer, if not that of --size.", type=side)
    parser.add("--depth", None, "The number of layers, if not that of --size.", type=side)
    parser.add("--heads", None, "The number of attention heads in a layer, if not that of --size.",
               type=side)
    parser.add("--steps", steps, "The number of training steps, one batch each.", type=count)
    parser.add("--batch-size", batch_size, "The number of images in a batch.", type=count)
    parser.add("--lr", lr, "The highest learning rate, which is reached after the warm-up.",
               type=number(float, 0, 100))
    parser.add("--seed", 0, "The random seed: it decides the initial weights, the drawn images and "
               "their order.", type=number(int, 0, 10**9))
    parser.add("--device", "auto", "The device to compute on: cuda, mps or cpu; auto takes the "
               "first of them that this machine has.")
    parser.add("--precision", "auto", "The number format of matrix products: bf16, fp32, or auto, "
               "which is bf16 where that is known to be faster.",
               choices=["auto", "bf16", "fp32"])
    parser.add("--compile", False, "Run the model through torch.compile, which is faster after a "
               "slow start and needs a C++ compiler.", action="store_true")
    parser.add("--out", f"out/{script}", "The folder into which checkpoint, log and pictures are "
               "written.")
    parser.add("--resume", False, "Go on from the checkpoint in --out, with the options stored in "
               "it.", action="store_true")
    parser.add("--load", None, "Do not train: load this checkpoint or released file, score it and "
               "draw its pictures.")
    parser.add("--save-seconds", 30.0, "The time between two checkpoints, in seconds.",
               type=number(float, 0))


# What stands in the args of a checkpoint, but --resume does not take from there: two options of the
# new run, and the names of the classes, which `open_data` notes for who loads the file.
NOT_RESUMED = ["out", "resume", "class_names"]


def parse(parser, script, sizes, argv=None):
    """The arguments. What is not given comes from the checkpoint of --resume, then from --size.

    With --load, the data set, the seed, and the mean and std of its images come from the
    checkpoint, if a script of this repository wrote it. Raises UserError.
    """
    in_notebook = "ipykernel" in sys.modules and any(word.endswith(".json") for word in sys.argv)
    if argv is None and in_notebook:
        argv = []  # sys.argv is the kernel's: -f kernel.json
    args = parser.parse_args(argv)
    for key, value in vars(args).items():
        if value == "":  # an unset $VARIABLE in a shell
            raise UserError(f"--{key.replace('_', '-')} is empty; see --help")

    stored = {}
    checkpoint = pathlib.Path(args.out) / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        stored = load_checkpoint(checkpoint, script).get("args", {})
        stored = {key: value for key, value in stored.items() if key not in NOT_RESUMED}
    elif args.load:
        with contextlib.suppress(UserError):  # a released file: the model's own loader reads it
            content = load_checkpoint(args.load)
            if "script" in content:  # of this repository, perhaps of another script
                stored = content.get("args", {})
            # No sizes: the script reads those of the model from its weights.
            wanted = ("data", "data_dir", "seed", "mean", "std")
            stored = {key: stored[key] for key in wanted if key in stored}
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)

    for key, value in sizes[args.size].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.dim % args.heads or args.dim % 4:
        raise UserError(f"--dim {args.dim} must be a multiple of --heads {args.heads} and of 4")
    return args


def pick_device(name):
    """A torch.device; UserError if this machine does not have it."""
    if name == "auto":
        name = "cpu"
        if torch.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    with errors_become(f"--device {name}: not on this machine"):
        x = torch.zeros(1, device=name)
        x.item()  # an error on "meta", which holds no numbers
        return x.device


def autocast(device, precision="auto"):
    """A context in which matrix products are computed in bfloat16; prints which format and why.

    precision: "auto", bfloat16 where that is known to be faster; "bf16" always; "fp32" never.
    Weights, residual sums and LayerNorms stay float32.

    To copy this, also copy: bf16_is_faster.
    """
    kind = torch.device(device).type
    if precision == "auto":
        use_bf16 = bf16_is_faster(kind)
        machine = "this GPU" if kind == "cuda" else f"this {kind}"
        verdict = "faster" if use_bf16 else "not known to be faster"
        reason = f"bfloat16 is {verdict} on {machine}"
    else:
        use_bf16 = precision == "bf16"
        reason = f"--precision {precision}"
    print(f"precision: {'bfloat16' if use_bf16 else 'float32'} ({reason})")
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=use_bf16)


def bf16_is_faster(kind):
    """Whether bfloat16 is known to be faster than float32; kind: "cpu", "cuda" or another device
    type. On a CPU, only with AMX: on a Xeon with AVX512-BF16 and no AMX, all six scripts train
    faster in float32, by a factor of 1.1 to 1.6 (tests/measurements.md)."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # old PyTorch: None
        return has_amx is not None and has_amx()
    return False


def open_data(args, device):
    """The Data that the options name, on the device; checks that the patches fit its images.

    With args.mean and args.std (from the checkpoint of --resume or --load), images are normalized
    as they were in its training. Notes in args what a checkpoint must hold so that your own image
    can be classified later.
    """
    dataset = load(args.data, args.data_dir, args.seed, args.image_size).to(device)
    if getattr(args, "mean", None) is not None:
        dataset.normalize_with(args.mean, args.std)
    args.image_size = dataset.image_size
    if args.image_size % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size} does not divide the images' side "
                        f"{args.image_size}; --image-size rescales them")
    args.class_names = list(dataset.class_names)
    args.mean = dataset.mean.tolist()
    args.std = dataset.std.tolist()
    return dataset


class Progress:
    """The training steps with a progress bar: `for step in progress:`. Ctrl-C ends after a step."""

    def __init__(self, args, start, scores):
        self.start = start
        self.steps = args.steps
        self.save_seconds = args.save_seconds
        self.saved = time.time()
        self.began = self.saved - scores.get("seconds", 0)  # a resumed run counts on
        self.stop = False  # Ctrl-C was pressed
        self.ended = False  # and `due` has asked for the last checkpoint

    def __iter__(self):
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:  # only there Python allows a handler
            before = signal.getsignal(signal.SIGINT)

            def stop(*_):
                self.stop = True
                signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait

            signal.signal(signal.SIGINT, stop)
        steps = range(self.start, self.steps)
        try:
            with tqdm(steps, initial=self.start, total=self.steps, mininterval=0.5) as self.bar:
                for step in self.bar:
                    yield step
                    if self.ended:
                        raise KeyboardInterrupt
            if self.stop:  # Ctrl-C came after the last checkpoint: no scores
                raise KeyboardInterrupt
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)

    def check(self, step, loss, norm):
        """Ends the run if the loss or the norm of its gradient is not finite.

        The weights stay as they are, and so does the last checkpoint.
        """
        self.loss = loss.item()
        norm = norm.item()
        if not math.isfinite(self.loss) or not math.isfinite(norm):
            raise UserError(f"the loss is {self.loss:g}, the norm of its gradient {norm:g} at step "
                            f"{step}; the last checkpoint is as it was")
        self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)

    def scores(self, images_seen):
        """The scores that every script has during the training."""
        return dict(loss=self.loss, seconds=time.time() - self.began, images_seen=images_seen)

    def due(self, step):
        """Whether it is time for a checkpoint: at intervals, at the end, and after Ctrl-C."""
        # A Ctrl-C that comes later than this line ends the run one step later, with that step's own
        # checkpoint.
        self.ended = self.stop
        is_last = step + 1 == self.steps
        if self.ended or is_last or time.time() - self.saved >= self.save_seconds:
            self.saved = time.time()
            return True
        return False


def report(scores, out, files):
    """Prints the scores and the paths of what was written; returns the scores."""
    for key, value in scores.items():
        values = value if isinstance(value, list) else [value]
        words = [str(v) if isinstance(v, int) else f"{v:.4f}" for v in values]
        print(f"{key:>16}  {' '.join(words)}")
    print("wrote " + " ".join(str(pathlib.Path(out) / file) for file in files))
    return scores


def run(train, parse_args):
    """A script's main. Exit status: 0, 2 after one line for a UserError, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that cannot show a letter shows a "?"
            stream.reconfigure(errors="replace")
    try:
        if sys.version_info < (3, 10):
            raise UserError(f"these scripts need Python 3.10 or newer, and this is "
                            f"{sys.version.split()[0]}")
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the checkpoint", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:  # torch's, also on a GPU; numpy's
        if is_compiler_error(error):
            print("error: torch.compile found no working C++ compiler; leave out --compile",
                  file=sys.stderr)
        elif re.search("out of memory|not enough memory|allocate", str(error)):
            print("error: out of memory; lower --batch-size, --size or --image-size",
                  file=sys.stderr)
        else:
            raise
        sys.exit(2)


def is_compiler_error(error):
    """Whether torch.compile raised it; by name, for importing its modules takes seconds."""
    kind = type(error)
    return kind.__module__ == "torch._inductor.exc" or kind.__name__ == "BackendCompilerFailed"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add("--data", "shapes", "The data set: shapes, cifar10, cifar100 or the path of your "
               "own file ending in .npz.")
    parser.add("--data-dir", "datasets", "The folder in which data sets are kept.")
    parser.add("--seed", 0, "The random seed of the drawn images.", type=number(int, 0, 10**9))
    parser.add("--out", "out/data", "The folder into which the sheet of images is written.")
    return parser.parse_args(argv)


def main(args):
    """Draws a sheet of 32 training images, prints their captions and the data set's facts."""
    dataset = load(args.data, args.data_dir, args.seed)
    sheet = pathlib.Path(args.out) / "sheet.png"
    save_png(sheet, dataset.train_images[:32], columns=8)
    for i, caption in enumerate(dataset.train_captions[:32]):
        print(f"row {i // 8 + 1}, column {i % 8 + 1}: {caption}")
    print(f"{dataset.name}: {len(dataset.train_images)} training images, "
          f"{len(dataset.test_images)} test images, {len(dataset.unseen_captions)} images "
          f"of unseen pairs; {dataset.image_size} pixels square")
    print(f"{len(dataset.class_names)} classes: {', '.join(dataset.class_names)}")
    print(f"mean {dataset.mean.tolist()}, std {dataset.std.tolist()}")
    print(f"wrote {sheet}")


# ------------------------------------------------------------------------------ 7 released weights
#
# Nobody reads this beside the slides. Each reader takes the path of a file and returns
# (state dict in this repository's names, keyword arguments of the class that it fits).
# What a file does not hold at all raises; `errors_become` in `from_pretrained` makes it one line.

# Whose checkpoints hold a ViT encoder; "teacher" is the teacher.pt of repa.py.
ENCODERS = ("vit", "mae", "jepa", "teacher")

# Mean and std of red, green and blue with which released models had their images normalized.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # MAE, I-JEPA, DINOv2
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # Google's ViT and timm's vit_*; timm's deit_*: IMAGENET
OPENAI = ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))  # CLIP
NORMALIZE = {"half": HALF, "imagenet": IMAGENET, "openai": OPENAI}

# Width of the encoder -> number of attention heads, in the files that the authors released.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16}
DECODER_HEADS = {512: 16}  # MAE
IGPT_HEADS = {512: 8, 1024: 8, 1536: 16, 3072: 24}
CLIP_IMAGE_HEADS = {768: 12, 1024: 16}
CLIP_TEXT_HEADS = {512: 8, 640: 10, 768: 12, 1024: 16}


def count_heads(path, args, wanted):
    """The numbers of attention heads, which no tensor tells -> {"heads": 12, ...}.

    wanted: {word of the constructor: (width, what the caller gave or None, released widths)}.
    args: the options in a checkpoint of this repository, {} for other files. UserError if a
    number is neither given, nor in args, nor known from the width.
    """
    heads = {}
    words = []
    widths = []
    for word, (width, given, released) in wanted.items():
        heads[word] = given or args.get(word) or released.get(width)
        if heads[word] is None:
            words.append(f"{word}=...")
            widths.append(str(width))
    if words:
        raise UserError(f"{path}: does not tell its number of attention heads, and its width "
                        f"{' or '.join(widths)} is none that was released: call "
                        f"from_pretrained(..., {', '.join(words)})")
    return heads


def harmless_classes():
    """What training files hold beside tensors: parsed options and numpy's numbers."""
    make_number, _ = np.float64(0).__reduce__()  # how numpy stores a number: function, arguments

    def stand_in(module):
        """make_number as "<module>.scalar": PyTorch looks a function up by this name, and numpy 1
        and 2 write different ones into the file."""
        def scalar(*args):
            return make_number(*args)

        scalar.__module__ = module
        scalar.__qualname__ = "scalar"
        return scalar

    classes = [argparse.Namespace, np.dtype,
               stand_in("numpy.core.multiarray"),  # of numpy 1
               stand_in("numpy._core.multiarray")]  # of numpy 2
    for kind in ("float64", "float32", "int64", "int32", "bool"):
        classes.append(type(np.dtype(kind)))
    return classes


def read_file(path, *scripts):
    """A file of weights -> its content (dict). `scripts`: whose checkpoints are welcome, "vit"."""
    with torch.serialization.safe_globals(harmless_classes()):
        content = load_checkpoint(path)
    writer = content.get("script")
    if writer is not None and writer not in scripts:
        raise UserError(f"{path}: written by {writer}, not by {'.py or '.join(scripts)}.py")
    return content


def own_args(content):
    """The options of the run that wrote a checkpoint of this repository; {} for other files."""
    if "script" in content:
        return need(content, "args")
    return {}


def is_own(path):
    """Whether a file is a checkpoint of this repository, and not one of the authors' files."""
    if str(path).endswith(".npz") or is_torchscript(path):
        return False
    return "script" in read_file(path, *ENCODERS, "igpt", "clip", "repa")


def statistics(path):
    """Mean and std of the images with which an encoder's file was trained.

    This repository's files store them; (None, None) if not. Released files do not, so this is a
    guess: HALF for those with a head, as Google's and most of timm's, IMAGENET for those without
    one, as MAE's, I-JEPA's and DINOv2's.
    """
    if str(path).endswith(".npz"):
        state, heads = read_google(path)
    else:
        content = read_file(path, *ENCODERS)
        if "script" in content:  # this repository's
            args = own_args(content)
            return args.get("mean"), args.get("std")
        state = encoder_part(content)
    return HALF if "head.weight" in state else IMAGENET


def has_classes(path, dataset):
    """Whether a file's head was trained for the classes of this data set, as far as the file tells.
    path=None, a model trained on this data set: True."""
    if path is None or not is_own(path):
        return True
    names = own_args(read_file(path, *ENCODERS, "igpt")).get("class_names")
    return names is None or names == dataset.class_names


def unwrap(content):
    """The state dict in the content of a file -> the same, its names without wrappers' prefixes.

    It may lie under "model" or "state_dict". DistributedDataParallel puts "module." before each
    name, torch.compile "_orig_mod.".
    """
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise ValueError(f"its entry {name} is not a tensor with a name")
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        state[name] = value
    return state


def with_prefix(state, prefix):
    """The tensors whose names begin with `prefix`, without it: "encoder." of a whole I-JEPA."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


def without(state, *prefixes):
    """The tensors whose names do not begin with any of the prefixes."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def need(state, name):
    """state[name]; a ValueError that names what is missing."""
    if name not in state:
        raise ValueError(f"it lacks {name}")
    return state[name]


def patch_shape(state, name):
    """The shape (D, C, P, P) of the weight of a patch embedding."""
    shape = need(state, name).shape
    if len(shape) != 4:
        raise ValueError(f"{name} has shape {tuple(shape)}, not (D, C, P, P)")
    return shape


def count_blocks(state, prefix):
    """The number of Transformer layers: "blocks." -> 12 if blocks.0 to blocks.11 are there."""
    depth = 0
    while f"{prefix}{depth}.mlp.fc1.weight" in state:
        depth += 1
    if depth == 0:
        raise ValueError(f"it lacks {prefix}0.mlp.fc1.weight")
    return depth


def grid_side(n):
    """The side of a square grid of n positions: 196 -> 14."""
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"its {n} positions are no square grid")
    return side


def rename(name, table):
    """A parameter's name after the replacements (theirs, ours) of the table, in their order."""
    for theirs, ours in table:
        name = name.replace(theirs, ours)
    return name


def join_qkv(state, q, k, v, qkv):
    """The three linear maps whose names hold `q`, `k`, `v` become one map, named `qkv`."""
    joined = dict(state)
    for name in state:
        if q in name:
            names = (name, name.replace(q, k), name.replace(q, v))
            parts = [need(joined, each) for each in names]
            for each in names:
                del joined[each]
            joined[name.replace(q, qkv)] = torch.cat(parts)  # rows: queries | keys | values
    return joined


# ---- encoders: vit.py, repa.Teacher


def encoder_sizes(state):
    """What the tensors of a ViT tell -> (image_size, patch_size, dim, depth, mlp_ratio) as dict."""
    dim, _, _, patch_size = patch_shape(state, "patch_embed.proj.weight")
    positions = need(state, "pos_embed").shape[1]
    if "cls_token" in state:
        positions = positions - 1
    hidden = len(need(state, "blocks.0.mlp.fc1.bias"))
    return dict(image_size=grid_side(positions) * patch_size, patch_size=patch_size, dim=dim,
                depth=count_blocks(state, "blocks."), mlp_ratio=hidden / dim)


def read_encoder(path, heads=None, head=True):
    """An image encoder -> (state in the names of vit.ViT, its constructor's words).

    Reads this repository's vit, mae, jepa (target encoder) and teacher checkpoints, timm's .pth,
    Google's .npz, MAE, I-JEPA's target encoder (also in Hugging Face's names) and DINOv2.
    head=False leaves the classifier out: for repa.Teacher. A file without one has num_classes 0.
    """
    if str(path).endswith(".npz"):
        args = {"tanh_gelu": True}  # as Google's code in JAX has it
        state, args["heads"] = read_google(path)
    else:
        content = read_file(path, *ENCODERS)
        args = own_args(content)
        state = encoder_part(content)
    if "fc_norm.weight" in state:
        raise ValueError("a fine-tuned MAE file (fc_norm) is not read; take mae_pretrain_*.pth")
    state = scale_names(state)
    if not head:
        state = without(state, "head.", "pre_logits.")
    if "pre_logits.weight" in state:  # Google's ImageNet-21k: head(tanh(pre_logits(features)))
        state = {rename(name, HIDDEN_HEAD): tensor for name, tensor in state.items()}
    sizes = encoder_sizes(state)
    sizes |= count_heads(path, args, {"heads": (sizes["dim"], heads, ENCODER_HEADS)})
    sizes["class_token"] = "cls_token" in state
    sizes["tanh_gelu"] = bool(args.get("tanh_gelu"))
    if head:
        matrix = state.get("head.2.weight", state.get("head.weight", ()))
        sizes["num_classes"] = len(matrix)
    return state, sizes


HIDDEN_HEAD = [  # the three layers of an nn.Sequential: Linear, Tanh, Linear
    ("head.", "head.2."),
    ("pre_logits.", "head.0."),
]


def encoder_part(content):
    """The content of a file that is not Google's -> the state dict of its image encoder."""
    if "target_encoder" in content:  # the authors' I-JEPA: {"encoder":, "predictor":, ...}
        content = content["target_encoder"]
    state = unwrap(content)
    if any(name.startswith("target_encoder.") for name in state):  # this repository's I-JEPA
        state = with_prefix(state, "target_encoder.")
    state = encoder_names(state)
    # MAE's decoder; DINOv2's unused mask token; pre_logits in old files of timm,
    # which timm itself does not use
    return without(state, "decoder_", "mask_token", "pre_logits.fc.")


def scale_names(state):
    """DINOv2 multiplies each branch by a vector: "blocks.0.ls1.gamma" -> attn.proj.gamma."""
    table = [("ls1.gamma", "attn.proj.gamma"), ("ls2.gamma", "mlp.fc2.gamma")]
    return {rename(name, table): tensor for name, tensor in state.items()}


HUGGING_FACE_IJEPA = [
    ("ijepa.", ""),  # before all names of IJepaForImageClassification
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),  # .weight, .bias
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm.", "norm."),  # the last one, after all blocks
    # Files, and the package transformers up to version 4:
    ("encoder.layer.", "blocks."),  # encoder.layer.0.layernorm_before.weight
    ("attention.output.dense", "attn.proj"),
    ("attention.attention.", "attn."),  # encoder.layer.0.attention.attention.query.weight
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    # In a model that transformers 5 has read (state_dict()); its mlp.fc1, mlp.fc2 have our names:
    ("layers.", "blocks."),  # layers.0.layernorm_before.weight
    ("attention.q_proj", "attn.query"),
    ("attention.k_proj", "attn.key"),
    ("attention.v_proj", "attn.value"),
    ("attention.o_proj", "attn.proj"),
]


def encoder_names(state):
    """Hugging Face's I-JEPA encoder -> timm's names. All other encoders have them already."""
    if not any("embeddings.position_embeddings" in name for name in state):
        return state
    state = without(state, "classifier.")
    state = {rename(name, HUGGING_FACE_IJEPA): tensor for name, tensor in state.items()}
    return join_qkv(state, q="attn.query", k="attn.key", v="attn.value", qkv="attn.qkv")


GOOGLE = [
    ("opt/target/", ""),  # before all names of some files
    ("params/", ""),  # and of others
    ("embedding/", "patch_embed/proj/"),
    ("Transformer/posembed_input/pos_embedding", "pos_embed"),
    ("Transformer/encoderblock_", "blocks/"),
    ("Transformer/encoder_norm", "norm"),
    ("LayerNorm_0", "norm1"),  # Transformer/encoderblock_0/LayerNorm_0/scale
    ("LayerNorm_2", "norm2"),
    ("MultiHeadDotProductAttention_1/out", "attn/proj"),
    ("MultiHeadDotProductAttention_1", "attn"),  # /query, /key, /value
    ("MlpBlock_3/Dense_0", "mlp/fc1"),
    ("MlpBlock_3/Dense_1", "mlp/fc2"),
    ("/kernel", "/weight"),  # of linear maps and of the convolution
    ("/scale", "/weight"),  # of LayerNorms
    ("/", "."),
]


def read_google(path):
    """Google's .npz of JAX arrays -> (state dict in timm's names, number of heads)."""
    state = {}
    heads = None
    with errors_become(f"{path}: not a Google ViT .npz"), np.load(path, allow_pickle=False) as file:
        for theirs in file:
            name = rename(theirs, GOOGLE)
            if name == "cls":
                name = "cls_token"
            array = file[theirs].astype(np.float32)
            if name.endswith("attn.query.weight"):
                heads = array.shape[1]  # of [D, heads, d]
            state[name] = google_tensor(name, torch.from_numpy(array))
        need(state, "patch_embed.proj.bias")
        state = join_qkv(state, q="attn.query", k="attn.key", v="attn.value", qkv="attn.qkv")
    return state, heads


def google_tensor(name, x):
    """An array of Google's under our name -> the tensor in PyTorch's order of dimensions."""
    if name.endswith(".bias"):
        return x.flatten()  # of q, k and v: [heads, d] -> [D]
    if name == "patch_embed.proj.weight":
        return x.permute(3, 2, 0, 1)  # [y, x, 3, D] -> [D, 3, y, x]
    if name.endswith("attn.proj.weight"):
        return x.flatten(0, 1).T  # [heads, d, D] -> [D, D]
    if name.endswith(".weight") and x.ndim > 1:
        return x.flatten(1).T  # [in, out] or, for q, k and v, [in, heads, d] -> [out, in]
    return x


class ScaledLinear(nn.Linear):
    """gamma * (W x + b): a linear map and, after it, DINOv2's LayerScale, a factor per output.

    It could be multiplied into W and b, but would then round differently; the file's
    numbers are kept as they are.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.gamma = nn.Parameter(torch.ones(out_features))

    def forward(self, x):
        return self.gamma * super().forward(x)


def load_weights(model, state):
    """Fills a vit.ViT or repa.Teacher with what read_encoder gave. Two kinds of files need other
    layers first: DINOv2 scales its branches, ImageNet-21k files have a hidden layer in the head.
    """
    for name in state:
        if name.endswith(".gamma"):  # "blocks.0.attn.proj.gamma"
            name = name.removesuffix(".gamma")
            parent, _, child = name.rpartition(".")
            plain = model.get_submodule(name)
            scaled = ScaledLinear(plain.in_features, plain.out_features)
            setattr(model.get_submodule(parent), child, scaled)
    if "head.0.weight" in state:
        hidden, dim = state["head.0.weight"].shape
        num_classes = len(state["head.2.weight"])
        model.head = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(),
                                   nn.Linear(hidden, num_classes))
    model.load_state_dict(state)


# ---- mae.py


def read_mae(path, heads=None, decoder_heads=None):
    """facebookresearch/mae's files and this repository's -> (state, words of mae.MAE).

    An encoder-only file has decoder_depth 0 and no decoder_dim, decoder_heads. norm_pix comes
    from this repository's files alone; the authors' do not tell it.
    """
    content = read_file(path, "mae")
    args = own_args(content)
    state = unwrap(content)
    sizes = encoder_sizes(state)
    wanted = {"heads": (sizes["dim"], heads, ENCODER_HEADS)}
    sizes["decoder_depth"] = 0
    if "decoder_embed.weight" in state:
        sizes["decoder_dim"] = len(state["decoder_embed.weight"])
        sizes["decoder_depth"] = count_blocks(state, "decoder_blocks.")
        wanted["decoder_heads"] = (sizes["decoder_dim"], decoder_heads, DECODER_HEADS)
    sizes |= count_heads(path, args, wanted)
    if "norm_pix" in args:
        sizes["norm_pix"] = args["norm_pix"]
    return state, sizes


# ---- igpt.py

HUGGING_FACE_IGPT = [
    ("transformer.", ""),  # before all names but lm_head
    ("h.", "blocks."),  # transformer.h.0.ln_1.weight
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    ("ln_f.", "norm."),  # f: final
    ("attn.c_attn.", "attn.qkv."),
    ("attn.c_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("lm_head.", "head."),
    ("wte.", "token_embed."),  # word token embedding
    ("wpe.weight", "pos_embed"),  # word position embedding
]


def read_igpt(path, heads=None):
    """Hugging Face's ImageGPTForCausalImageModeling and this repository's -> (state, words).

    A missing classifier (10 classes) and a missing palette are filled with zeros: igpt.py asks for
    --palette, and reads it with read_palette.
    """
    content = read_file(path, "igpt")
    args = own_args(content)
    state = unwrap(content)
    if "pos_embed" not in state:
        state = hugging_face_igpt(state)
    num_colors, dim = need(state, "token_embed.weight").shape
    state.setdefault("classifier.weight", torch.zeros(10, dim))
    state.setdefault("palette", torch.zeros(num_colors, 3))
    hidden = len(need(state, "blocks.0.mlp.fc1.weight"))
    sizes = dict(image_size=grid_side(len(need(state, "pos_embed"))), dim=dim,
                 depth=count_blocks(state, "blocks."), mlp_ratio=hidden / dim,
                 num_colors=num_colors, num_classes=len(state["classifier.weight"]),
                 objective=args.get("objective", "ar"))
    sizes |= count_heads(path, args, {"heads": (dim, heads, IGPT_HEADS)})
    return state, sizes


def hugging_face_igpt(content):
    """Its names -> ours. Its linear maps are stored as [in, out], their biases are all zero, and
    the start vector is one more row of the token table."""
    state = {}
    for theirs, tensor in content.items():
        name = rename(theirs, HUGGING_FACE_IGPT)
        if theirs.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal masks, in files of old versions
        if name.endswith(".bias"):
            if tensor.any():
                raise ValueError(f"{theirs} is not zero")
            continue
        if ".attn." in name or ".mlp." in name:
            tensor = tensor.T
        state[name] = tensor
    table = need(state, "token_embed.weight")
    num_colors = len(need(state, "head.weight"))
    if len(table) != num_colors + 1:
        raise ValueError(f"{len(table)} token vectors for {num_colors} colors")
    state["token_embed.weight"] = table[:-1]
    state["start"] = table[-1]
    return state


def read_palette(path, colors):
    """OpenAI's kmeans_centers.npy, (K, 3) in -1..1 -> tensor; else UserError."""
    with errors_become(f"{path}: not a palette of {colors} colors"):
        palette = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        if palette.shape != (colors, 3):
            raise ValueError(f"shape {tuple(palette.shape)}")
        if not palette.abs().max() <= 1.001:  # "not <=" is true for NaN, too
            raise ValueError("its numbers do not lie between -1 and 1")
    return palette


# ---- jepa.py


def read_jepa(path, heads=None, predictor_heads=None):
    """The authors' .pth.tar, Hugging Face's encoder, this repository's files -> (state, words).

    Hugging Face's file fills both encoders and has no predictor: then the state lacks all names
    that begin with "predictor.", and IJEPA.from_pretrained keeps those of the new model.
    """
    content = read_file(path, "jepa")
    args = own_args(content)
    state = jepa_state(content)
    encoder = with_prefix(state, "encoder.")
    sizes = encoder_sizes(encoder)
    sizes |= count_heads(path, args, {"heads": (sizes["dim"], heads, ENCODER_HEADS)})
    sizes["predictor_dim"] = 384  # in all released sizes
    sizes["predictor_depth"] = 12
    if "predictor.predictor_embed.weight" in state:
        sizes["predictor_dim"] = len(state["predictor.predictor_embed.weight"])
        sizes["predictor_depth"] = count_blocks(state, "predictor.predictor_blocks.")
    # A predictor has as many heads as its encoder.
    sizes["predictor_heads"] = predictor_heads or args.get("predictor_heads") or sizes["heads"]
    if "center" in args:
        sizes["center"] = args["center"]
    return state, sizes


def jepa_state(content):
    """The content of a file -> state with "encoder.", "target_encoder." and "predictor." names."""
    if "target_encoder" in content:  # the authors' file: a state dict for each part
        state = {}
        for name in ("encoder", "target_encoder", "predictor"):
            for key, tensor in unwrap(need(content, name)).items():
                state[f"{name}.{key}"] = tensor
        return state
    state = unwrap(content)
    if any(name.startswith("target_encoder.") for name in state):
        return state  # this repository's
    both = {}
    for key, tensor in encoder_names(state).items():
        both[f"encoder.{key}"] = tensor
        both[f"target_encoder.{key}"] = tensor
    return both


# ---- repa.py


def read_sit(path, heads=None, sit_time=None):
    """REPA's last.pt or training file, SiT-XL-2-256.pt, this repository's -> (state, words).

    The weights are those of the average (EMA) if the file has them. sit_time=None finds out: in
    SiT's files t = 0 is noise and t = 1 the image, and they predict a variance, too, which is
    dropped.
    """
    content = read_file(path, "repa")
    args = own_args(content)
    if content.get("ema"):
        content = content["ema"]
    state = {}
    for name, tensor in unwrap(content).items():
        if not name.startswith("projectors.") or name.startswith("projectors.0."):
            state[rename(name, SIT)] = tensor  # projectors.1 and on belong to other teachers
    dim, channels, patch_size, _ = patch_shape(state, "x_embedder.proj.weight")
    patch_numbers = channels * patch_size**2
    has_variance = len(need(state, "final_layer.linear.bias")) == 2 * patch_numbers
    if has_variance:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = state[name].unflatten(0, (patch_size**2, 2, channels))  # pixel, kind, channel
            state[name] = rows[:, 0].flatten(0, 1)  # kind 0 is the velocity, 1 the variance
    if sit_time is None:
        sit_time = has_variance
    depth = count_blocks(state, "blocks.")
    hidden = len(need(state, "blocks.0.mlp.fc1.bias"))
    grid = grid_side(need(state, "pos_embed").shape[1])
    sizes = dict(image_size=grid * patch_size, patch_size=patch_size, dim=dim, depth=depth,
                 mlp_ratio=hidden / dim,
                 num_classes=len(need(state, "class_embed.weight")) - 1,  # less the null class
                 channels=channels, align_depth=args.get("align_depth") or sit_align_depth(depth),
                 teacher_dim=0, sit_time=sit_time)
    sizes |= count_heads(path, args, {"heads": (dim, heads, ENCODER_HEADS)})
    if "projector.4.weight" in state:  # its last Linear
        sizes["teacher_dim"], sizes["projector_dim"] = state["projector.4.weight"].shape
    return state, sizes


SIT = [
    ("y_embedder.embedding_table.", "class_embed."),
    ("projectors.0.", "projector."),
]


def sit_align_depth(depth):
    """The block that REPA aligns: 8 in L and XL, 4 in B."""
    if depth > 12:
        return 8
    return min(4, depth)


# ---- clip.py

OPENAI_TEXT = [  # beginnings of names; what follows them is the same or in the next table
    ("transformer.resblocks.", "text_encoder.blocks."),
    ("token_embedding.", "text_encoder.token_embed."),
    ("positional_embedding", "text_encoder.pos_embed"),
    ("ln_final.", "text_encoder.norm."),
    ("text_projection", "W_t.weight"),
    ("logit_scale", "t"),  # the logarithm of the scale
]
OPENAI_BLOCK = [  # inside a Transformer layer, transformer.resblocks.0.attn.in_proj_weight
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
]
OPENAI_VIT = [
    ("visual.class_embedding", "image_encoder.cls_token"),
    ("visual.positional_embedding", "image_encoder.pos_embed"),
    ("visual.conv1.", "image_encoder.patch_embed.proj."),  # has no bias
    ("visual.ln_pre.", "image_encoder.norm_pre."),
    ("visual.ln_post.", "image_encoder.norm."),
    ("visual.transformer.resblocks.", "image_encoder.blocks."),
    ("visual.proj", "W_i.weight"),
]
OPENAI_RESNET = [  # our numbers count the layers of an nn.Sequential: ReLU and pooling, too
    ("visual.conv1.", "image_encoder.stem.0."),
    ("visual.bn1.", "image_encoder.stem.1."),
    ("visual.conv2.", "image_encoder.stem.3."),
    ("visual.bn2.", "image_encoder.stem.4."),
    ("visual.conv3.", "image_encoder.stem.6."),
    ("visual.bn3.", "image_encoder.stem.7."),
    ("visual.layer1.", "image_encoder.stages.0."),  # visual.layer1.0.conv1.weight
    ("visual.layer2.", "image_encoder.stages.1."),
    ("visual.layer3.", "image_encoder.stages.2."),
    ("visual.layer4.", "image_encoder.stages.3."),
    ("visual.attnpool.positional_embedding", "image_encoder.pos_embed"),
    ("visual.attnpool.c_proj.", "W_i."),
    ("visual.attnpool.", "image_encoder.pool."),  # q_proj, k_proj, v_proj
]
OPENAI_BOTTLENECK = [  # inside a layer of the ResNet, visual.layer1.0.conv1.weight
    (".conv1.", ".body.0."),
    (".bn1.", ".body.1."),  # weight, bias, running_mean, running_var, num_batches_tracked
    (".conv2.", ".body.3."),
    (".bn2.", ".body.4."),
    (".conv3.", ".body.7."),
    (".bn3.", ".body.8."),
    (".downsample.0.", ".shortcut.1."),  # the convolution; shortcut.0 is a mean
    (".downsample.1.", ".shortcut.2."),
]


def is_torchscript(path):
    """Whether a file is a TorchScript archive, a program with its weights, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_clip(path, heads=None, text_heads=None):
    """An OpenAI archive, a plain state dict in their names, this repository's -> (state, words).

    Their archives are TorchScript, and to read one is to run the program in it: read those that
    you trust, and keep the tensors: torch.save(torch.jit.load(path).state_dict(), "plain.pt").
    Words that an encoder has no use for (a ResNet's patches, CBOW's layers) are left out.
    """
    args = {}
    with errors_become(f"{path}: not a whole TorchScript archive"):
        if is_torchscript(path):
            check_zip(path)
            content = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            content = read_file(path, "clip")
            args = own_args(content)
    if args.get("objective", "contrastive") != "contrastive":
        raise ValueError(f"it was trained with --objective {args['objective']}")
    state = unwrap(content)
    if "W_t.weight" not in state:
        state = openai_names(state)
    sizes, wanted = clip_image_sizes(with_prefix(state, "image_encoder."), heads)
    text_sizes, text_wanted = clip_text_sizes(with_prefix(state, "text_encoder."), text_heads)
    sizes |= text_sizes
    sizes |= count_heads(path, args, wanted | text_wanted)
    sizes["embed_dim"] = len(need(state, "W_t.weight"))
    return state, sizes


def clip_image_sizes(state, heads):
    """State of the image encoder -> (constructor's words, what count_heads has to find)."""
    grid = grid_side(len(need(state, "pos_embed")) - 1)  # less the class token; ResNet: the mean
    if "cls_token" in state:
        dim, _, _, patch_size = patch_shape(state, "patch_embed.proj.weight")
        sizes = dict(image_encoder="vit", image_size=grid * patch_size, patch_size=patch_size,
                     dim=dim, depth=count_blocks(state, "blocks."))
        return sizes, {"heads": (dim, heads, CLIP_IMAGE_HEADS)}
    depth = []  # the number of layers in each stage
    while f"stages.{len(depth)}.0.body.0.weight" in state:
        stage = with_prefix(state, f"stages.{len(depth)}.")
        depth.append(len({name.split(".")[0] for name in stage}))
    dim = need(state, "pool.qkv.weight").shape[1] // 4  # a stage hands on 4 times its width
    # The stem halves twice, each stage but the first once.
    image_size = grid * 2 ** (len(depth) + 1)
    return dict(image_encoder="resnet", image_size=image_size, dim=dim, depth=tuple(depth)), {}


def clip_text_sizes(state, text_heads):
    """State of the text encoder -> (constructor's words, what count_heads has to find)."""
    vocab_size, text_dim = need(state, "token_embed.weight").shape
    sizes = dict(vocab_size=vocab_size, text_dim=text_dim)
    if "pos_embed" not in state:
        return sizes | dict(text_encoder="cbow"), {}
    sizes |= dict(text_encoder="transformer", context_length=len(state["pos_embed"]),
                  text_depth=count_blocks(state, "blocks."))
    return sizes, {"text_heads": (text_dim, text_heads, CLIP_TEXT_HEADS)}


def openai_names(content):
    """A state dict in OpenAI's names -> in ours."""
    is_vit = "visual.proj" in content
    state = {}
    for theirs, tensor in content.items():
        if theirs in ("input_resolution", "context_length", "vocab_size"):
            continue  # numbers, no weights
        state[openai_name(theirs, is_vit)] = tensor
    # Projections are stored [in, out], but for the ResNet's, which is a linear map.
    state["W_t.weight"] = need(state, "W_t.weight").T
    if is_vit:
        state["W_i.weight"] = state["W_i.weight"].T
    else:
        state = join_qkv(state, q="pool.q_proj", k="pool.k_proj", v="pool.v_proj", qkv="pool.qkv")
    state["t"] = need(state, "t").reshape(())  # open_clip's may have one dimension
    return state


def openai_name(name, is_vit):
    """ "visual.transformer.resblocks.0.ln_1.bias" -> "image_encoder.blocks.0.norm1.bias"."""
    if not name.startswith("visual."):
        return rename(rename_start(name, OPENAI_TEXT), OPENAI_BLOCK)
    if is_vit:
        return rename(rename_start(name, OPENAI_VIT), OPENAI_BLOCK)
    name = rename_start(name, OPENAI_RESNET)
    if name.startswith("image_encoder.stages."):
        name = rename(name, OPENAI_BOTTLENECK)
    return name


def rename_start(name, table):
    """The name with its beginning replaced as the first fitting row (theirs, ours) says."""
    for theirs, ours in table:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# ---- the text cleaning of OpenAI's tokenizer, which is that of the package ftfy


@functools.lru_cache
def cleaning_table():
    """Code point -> what replaces it, for str.translate."""
    table = {}
    # Control characters, but for tab, line feed, form feed and return, are deleted.
    for first, last in ((0, 8), (11, 11), (14, 31), (127, 127), (0x206A, 0x206F),
                        (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFC)):
        for code in range(first, last + 1):
            table[code] = None
    # Ligatures become letters: "ﬁ" -> "fi".
    ligatures = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬅﬆ"
    letters = "IJ ij 'n DŽ Dž dž LJ Lj lj NJ Nj nj DZ Dz dz ff fi fl ffi ffl ſt st".split()
    for ligature, plain in zip(ligatures, letters):
        table[ord(ligature)] = plain
    # Curly quotes become straight ones.
    for quote in "ʼ‘’‚‛":
        table[ord(quote)] = "'"
    for quote in "“”„‟":
        table[ord(quote)] = '"'
    # Letters as wide as Chinese ones, or half as wide, become plain: "Ａ" -> "A", "ｱ" -> "ア".
    for code in (0x3000, *range(0xFF01, 0xFFEF)):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    return table


@functools.lru_cache
def upper_case_entities():
    """ "&EACUTE;" -> "É": what HTML does not know in capitals, but ftfy reads all the same."""
    upper = {}
    for name, character in html.entities.html5.items():  # "eacute;": "é", "Eacute;": "É", ...
        entity = f"&{name.upper()}"
        is_unknown = html.unescape(entity) == entity
        if name == name.lower() and name.endswith(";") and is_unknown:
            upper[entity] = character.upper()
    return upper


def resolve_entity(match):
    """A match of "&amp;" -> "&"."""
    entity = match[0]
    return upper_case_entities().get(entity) or html.unescape(entity)


def clean_text(text):
    """As OpenAI: HTML entities are resolved repeatedly up to the line of the first "<"; the
    characters of cleaning_table are replaced; entities are resolved twice everywhere; lower
    case."""
    end = len(text)
    if "<" in text:  # it may be HTML, which ftfy leaves alone from this line on
        end = text.rfind("\n", 0, text.index("<")) + 1
    start = text[:end]
    before = None
    while start != before:
        before = start
        start = re.sub("&#?[0-9A-Za-z]{1,24};", resolve_entity, start)
    text = (start + text[end:]).translate(cleaning_table())
    text = unicodedata.normalize("NFC", text)
    return html.unescape(html.unescape(text)).lower()


@functools.lru_cache
def unicode_class(letter):
    """All characters whose Unicode category begins with `letter`, "L" for letters, "N" for
    numbers -> the inside of a regular expression's [...]: "A-Za-zª-ª...".

    Python's `re` has no name for these sets.
    """
    ranges = []
    first = None  # of the range that is open
    for code in range(sys.maxunicode + 2):  # one more than there are, to close the last range
        inside = code <= sys.maxunicode and unicodedata.category(chr(code))[0] == letter
        if inside and first is None:
            first = code
        if not inside and first is not None:
            ranges.append(f"{chr(first)}-{chr(code - 1)}")
            first = None
    return "".join(ranges)


# ---- position tables


def resize_table(table, rows, columns=None, extra=0, antialias=True):
    """A position table (1, extra + n*n, D) -> (1, extra + rows*columns, D), bicubic.

    The first `extra` rows, the class token's, stay. timm uses antialias, the code of MAE does not.
    """
    columns = columns or rows
    n = math.isqrt(table.shape[1] - extra)  # the old side
    if n == rows and n == columns:
        return table
    first = table[:, :extra]
    grid = table[:, extra:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=antialias)
    grid = grid.flatten(2).transpose(1, 2)  # (1, rows * columns, D)
    return torch.cat([first, grid], dim=1)


if __name__ == "__main__":
    run(main, parse_args)
