"""Everything that touches the disk, and the yardsticks that all six models are measured with.

    python data.py                    # a sheet of the default pictures, their captions and facts
    python data.py --data cifar10     # downloads the official archive the first time

Data sets, batches, augmentation; linear probe, kNN, a small convolutional net; checkpoints, log,
PNG, SVG; the command line that the scripts share. A whole data set stays on the device as uint8.
"""

import argparse
import contextlib
import functools
import hashlib
import html
import io
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
    """A mistake that the user can mend: one line, what is wrong and what would be right."""


@contextlib.contextmanager
def refuse(message):
    """Whatever a bad file, disk or network raises inside becomes one UserError line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # corrupt bytes can raise nearly anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = lines[1:2] if lines and lines[0].endswith(":") else lines[:1]  # a heading or a line
        raise UserError(f"{message} ({' '.join(lines)[:150] or type(error).__name__})") from None


# ---------------------------------------------------------------------------------------- data sets


@dataclass
class Data:
    """Images (N, 3, H, H) uint8, labels (N,) int64, N captions; mean and std (3,) in 0..1."""

    name: str
    class_names: list
    train_images: torch.Tensor
    train_labels: torch.Tensor
    train_captions: list
    test_images: torch.Tensor
    test_labels: torch.Tensor
    test_captions: list
    unseen_images: torch.Tensor = None  # shapes only: colour-and-shape pairs never trained on
    unseen_labels: torch.Tensor = None
    unseen_captions: list = field(default_factory=list)
    root: pathlib.Path = pathlib.Path("datasets")

    def __post_init__(self):
        self.image_size = self.train_images.shape[-1]
        some = self.train_images[:10_240_000 // self.image_size**2]  # 10,000 of 32 x 32
        pixels = some.transpose(0, 1).flatten(1).float() / 255  # (3, n H H)
        self.mean, self.std = pixels.mean(1), pixels.std(1).clamp(min=1e-3)

    def to(self, device):
        """Moves every tensor to the device; returns self."""
        for key, value in vars(self).items():
            setattr(self, key, value.to(device) if torch.is_tensor(value) else value)
        return self

    def normalise(self, images):
        """uint8 (B, 3, H, H) -> float32, each channel of mean 0 and variance 1 in training."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalise(self, images):
        """The inverse of normalise, as pictures in 0..1."""
        return (images.float() * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)


def load(name="shapes", root="datasets", seed=0, image_size=None):
    """Data by name: shapes (drawn from the seed), cifar10, cifar100, or the path of your own .npz.

    `image_size` rescales the pictures. Raises UserError for whatever can't be read as pictures.
    """
    root = pathlib.Path(root)
    if name == "shapes":
        data = shapes(seed)
    elif name in CIFAR:
        data = cifar(name, root, seed)
    elif str(name).endswith(".npz"):
        data = npz(pathlib.Path(name))
    else:
        raise UserError(f"--data {name}: choose shapes, cifar10, cifar100 or a path ending in .npz")
    data.root = root
    if image_size and image_size != data.image_size:
        resize = lambda x: F.interpolate(x.float(), (image_size,) * 2, mode="bilinear",
                                         antialias=True).round().byte()
        for key in ("train_images", "test_images", "unseen_images"):
            if (images := getattr(data, key)) is not None:
                setattr(data, key, torch.cat([resize(part) for part in images.split(1000)]))
        data.__post_init__()
    return data


SHAPES = "circle square triangle diamond star heart cross ring moon arrow".split()
COLOURS = {"red": (215, 45, 45), "orange": (240, 135, 25), "yellow": (240, 215, 45),
           "green": (45, 165, 65), "cyan": (60, 195, 210), "blue": (50, 85, 215),
           "purple": (145, 65, 190), "pink": (240, 125, 180)}
PLACES = {"in the middle": (0, 0), "on the left": (-1, 0), "on the right": (1, 0),
          "at the top": (0, -1), "at the bottom": (0, 1)}
WORDINGS = ["a {size} {colour} {shape} {place}", "{place} a {size} {colour} {shape}",
            "one {colour} {shape}, {size}, {place}", "there is a {size} {colour} {shape} {place}"]


def signed_distance(shape, x, y):
    """Distance to the outline of a shape of about unit radius, < 0 inside; (n, H, H), y is down."""
    r, up, side = torch.hypot(x, y), -y, x.abs()
    if shape == "circle":
        return r - 0.85
    if shape == "square":
        return torch.maximum(side, y.abs()) - 0.76
    if shape == "triangle":
        return torch.maximum(-up - 0.6, 0.87 * side + 0.5 * up - 0.46)
    if shape == "diamond":
        return 0.83 * side + 0.55 * y.abs() - 0.55
    if shape == "star":  # fold the plane onto half of one arm; what is left is one straight line
        angle = (torch.atan2(x, up) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        return 0.59 * (r * angle.cos() - 1) + 0.81 * r * angle.sin().abs()
    if shape == "heart":
        point = torch.maximum(0.76 * side - 0.65 * up - 0.6, up - 0.35)
        return torch.minimum(torch.hypot(side - 0.43, up - 0.32) - 0.5, point)
    if shape == "cross":
        bar = lambda a, b: torch.maximum(a - 0.29, b - 0.88)
        return torch.minimum(bar(side, y.abs()), bar(y.abs(), side))
    if shape == "ring":
        return (r - 0.66).abs() - 0.24
    if shape == "moon":
        return torch.maximum(r - 0.92, 0.78 - torch.hypot(x - 0.5, y + 0.1))
    head = torch.maximum(0.7 * side + 0.7 * up - 0.63, -up)  # arrow
    return torch.minimum(head, torch.maximum(side - 0.27, (up + 0.43).abs() - 0.46))


def shapes(seed=0, size=32, counts=(20000, 2000, 1000)):
    """The default pictures: one coloured shape on a muted, faintly textured ground; class = shape.

    counts: training, test, unseen. Colour, size, place, angle and ground do not depend on the
    class, and the ground is as often lighter as darker than the shape: single pixels tell little.
    Of each shape, two of the eight colours occur only in the unseen pictures.
    """
    g, total = torch.Generator().manual_seed(seed), sum(counts)
    uniform = lambda low, high, *n: low + (high - low) * torch.rand(total, *n, generator=g)
    pick = lambda n: torch.randint(n, (total,), generator=g)
    shape = torch.cat([torch.randperm(n, generator=g) % 10 for n in counts])
    common, rare = torch.tensor([1, 2, 4, 5, 6, 7])[pick(6)], torch.tensor([0, 3])[pick(2)]
    colour = (3 * shape + torch.where(torch.arange(total) < total - counts[2], common, rare)) % 8
    place, big, wording, texture = pick(5), pick(2), pick(4), pick(4)
    radius = (uniform(9, 10.5) + 2.5 * big) * size / 32
    centre = torch.tensor(list(PLACES.values()))[place] * uniform(3, 5, 1) + uniform(-1, 1, 2)
    centre = centre * size / 32 + (size - 1) / 2
    angle, tilt, phase = uniform(-0.3, 0.3), uniform(0, 3.14), uniform(0, 6.28)
    wave = uniform(0.35, 0.8) * 32 / size
    paint = torch.tensor(list(COLOURS.values()))[colour] + uniform(-15, 15, 3)
    ground = uniform(35, 225, 1) + uniform(-30, 30, 3)
    tint = uniform(-22, 22, 3)  # what the texture adds to the ground at its crests

    images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for s, name in enumerate(SHAPES):
        for i in (shape == s).nonzero()[:, 0].split(500):
            at = lambda t: t[i, None, None]  # (n, 1, 1)
            turn = lambda a, x, y: (at(a.cos()) * x + at(a.sin()) * y,
                                    at(a.cos()) * y - at(a.sin()) * x)
            dx, dy = turn(angle, x - at(centre[:, 0]), y - at(centre[:, 1]))
            distance = at(radius) * signed_distance(name, dx / at(radius), dy / at(radius))
            inside = (0.5 - distance).clamp(0, 1)[:, None]  # soft over a pixel: no jagged edges
            a, b = ((at(wave) * t + at(phase)).sin() for t in turn(tilt, x, y))
            patterns = torch.stack([a / 2, a * b / 2, (a + b) / 4, x / size + 0 * a])
            crest = patterns[texture[i], torch.arange(len(i))][:, None]  # (n, 1, H, H)
            back = ground[i, :, None, None] + tint[i, :, None, None] * crest
            images[i] = (back + inside * (paint[i, :, None, None] - back)).clamp(0, 255).byte()
    say = lambda w, k, c, s, p: WORDINGS[w].format(
        size=("small", "big")[k], colour=list(COLOURS)[c], shape=SHAPES[s], place=list(PLACES)[p])
    captions = list(map(say, *(x.tolist() for x in (wording, big, colour, shape, place))))
    parts, start = [], 0
    for n in counts:
        part = slice(start, start := start + n)
        parts += [images[part], shape[part], captions[part]]
    return Data("shapes", list(SHAPES), *parts)


# The official binary archives (nothing in them is ever unpickled):
# archive, its md5, folder, label bytes of a record, files of 10,000 or 50,000 records, class names
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
                "cifar-10-batches-bin", 1, {f"data_batch_{i}.bin": 10000 for i in range(1, 6)}
                | {"test_batch.bin": 10000}, "batches.meta.txt"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
                 2, {"train.bin": 50000, "test.bin": 10000}, "fine_label_names.txt"),
}
KINDS = ["", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good "]
CIFAR_TEMPLATES = [f"a {kind}photo of {a} {{}}." for a in ("a", "the") for kind in KINDS] + [
    f"a photo of {a} {size} {{}}." for a in ("a", "the") for size in ("small", "big")]


def cifar(name, root, seed):
    """CIFAR from `root`, downloaded if its folder is missing; captions from CLIP's templates."""
    archive, md5, folder, label_bytes, files, names = CIFAR[name]
    if not (root / folder).is_dir():
        sizes = {file: n * (3072 + label_bytes) for file, n in files.items()}
        download(CIFAR_URL + archive, md5, root, folder, sizes | {names: None})
    path, images, labels = root / folder, [], []
    with refuse(f"{path} is damaged: delete it, and the next run downloads it again"):
        classes = [k.replace("_", " ") for k in (path / names).read_text().split()]
        for file, n in files.items():
            records = torch.from_numpy(np.fromfile(path / file, np.uint8))
            if records.numel() != n * (3072 + label_bytes):
                raise ValueError(f"{file}: {len(records)} bytes, not {n * (3072 + label_bytes)}")
            records = records.reshape(n, -1)
            labels.append(records[:, label_bytes - 1].long())
            images.append(records[:, label_bytes:].reshape(n, 3, 32, 32))
            if len(classes) != int(name[5:]) or labels[-1].max() >= len(classes):
                raise ValueError(f"{file}: label {labels[-1].max()}, {len(classes)} class names")
    g, parts = torch.Generator().manual_seed(seed), []
    for split in (slice(0, -1), slice(-1, None)):  # the last file is the test set
        y = torch.cat(labels[split])
        wording = torch.randint(len(CIFAR_TEMPLATES), y.shape, generator=g)
        parts += [torch.cat(images[split]), y,
                  [CIFAR_TEMPLATES[w].format(classes[k]) for w, k in zip(wording, y)]]
    return Data(name, classes, *parts)


def download(url, md5, root, folder, members):
    """A .tar.gz from the network; its `members` {name: size} land in root/folder, all or none.

    All work is done in a temporary folder, and one rename ends it: an interrupted download leaves
    nothing that could be taken for whole. Members are read by name, so no path is ever followed.
    """
    with refuse(f"could not get {url}: nothing was kept; try again, or unpack it into {root}"):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder}.part-", dir=root) as part:
            file, digest = pathlib.Path(part) / "archive", hashlib.md5()
            with urllib.request.urlopen(url, timeout=30) as answer, open(file, "wb") as out, tqdm(
                    total=int(answer.headers.get("Content-Length") or 0) or None, unit="B",
                    unit_scale=True, desc=url.split("/")[-1]) as bar:
                while block := answer.read(1 << 20):
                    out.write(block), digest.update(block), bar.update(len(block))
            if digest.hexdigest() != md5:
                raise ValueError(f"{file.stat().st_size} bytes of md5 {digest.hexdigest()}")
            (new := pathlib.Path(part) / folder).mkdir()
            with tarfile.open(file, "r:gz") as tar:
                for name, size in members.items():
                    member = tar.getmember(f"{folder}/{name}")
                    if not member.isreg() or size not in (None, member.size):
                        raise ValueError(f"{name} is not a plain file of {size} bytes")
                    (new / name).write_bytes(tar.extractfile(member).read())
            if not (root / folder).is_dir():  # else another run was quicker
                new.rename(root / folder)


def npz(path):
    """Your own pictures: `images` uint8 (N, H, H, 3), `labels` (N,) whole numbers from 0; optional
    `captions` (N,) and `class_names` (K,). A tenth is the test set, the same one for any seed."""
    with refuse(f"{path}: not a readable .npz without pickled objects"):
        with np.load(path, allow_pickle=False) as file:
            held = {key: np.atleast_1d(file[key]) for key in file}
    images, labels = held.get("images", np.empty(0)), held.get("labels", np.empty(0))
    n, *side = images.shape
    if (images.dtype != np.uint8 or not images.size or side != side[:1] * 2 + [3] or n < 20
            or labels.shape != (n,) or labels.dtype.kind not in "iu"
            or not 0 <= labels.min() <= labels.max() < 10000):
        found = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in held.items())
        raise UserError(f"{path}: needs images uint8 (N, H, H, 3) and labels (N,) from 0 to 9999, "
                        f"N >= 20; it holds {found}")
    names = [str(k) for k in held.get("class_names", range(labels.max() + 1))]
    captions = held.get("captions", labels)
    if len(names) <= labels.max() or len(captions) != n:
        raise UserError(f"{path}: {len(names)} class_names, {len(captions)} captions do not fit "
                        f"{n} pictures with labels up to {labels.max()}")
    if "captions" not in held:
        captions = [f"a photo of a {names[k]}." for k in labels]
    order, parts = torch.randperm(n, generator=torch.Generator().manual_seed(0)), []
    for i in order.split([len(order) - len(order) // 10, len(order) // 10]):
        parts += [torch.from_numpy(images[i]).permute(0, 3, 1, 2).contiguous(),
                  torch.from_numpy(labels[i].astype(np.int64)), [str(captions[j]) for j in i]]
    return Data(path.stem, names, *parts)


# --------------------------------------------------------------------------- batches, on the device


@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_index(n, batch_size, step, seed):
    """The pictures of a step, (B,) int64: epochs without repetition, told by the step alone."""
    batch_size = min(batch_size, n)
    epoch, i = divmod(step, n // batch_size)
    return permutation(n, epoch, seed)[i * batch_size:(i + 1) * batch_size]


def augment(images, pad=4, flip=True):
    """A shift of each picture by up to `pad` pixels (reflected edges) and a mirror image, batched.

    uint8 (B, 3, H, H) -> the same, with random numbers from the pictures' device.
    """
    B, _, H, W = images.shape
    pad = min(pad, H - 1, W - 1)
    draw = lambda n: torch.randint(n, (B, 1), device=images.device)
    inward = lambda i, n: n - 1 - (n - 1 - i.abs()).abs()  # reflect at the first and the last pixel
    rows = inward(draw(2 * pad + 1) - pad + torch.arange(H, device=images.device), H)  # (B, H)
    columns = inward(draw(2 * pad + 1) - pad + torch.arange(W, device=images.device), W)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns) if flip else columns
    one = torch.arange(B, device=images.device)[:, None, None]
    return images[one, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mix(images, targets):
    """Mixup or cutmix with the reversed batch, then random erasing of a square: the stronger
    augmentation. images (B, 3, H, W) float, targets (B, K) probabilities -> the same, mixed."""
    B, _, H, W = images.shape
    keep = torch.rand(()).item()
    if torch.rand(()) < 0.5:
        mixed = keep * images + (1 - keep) * images.flip(0)
    else:
        h, w = round(H * math.sqrt(1 - keep)), round(W * math.sqrt(1 - keep))
        y, x = torch.randint(H - h + 1, ()), torch.randint(W - w + 1, ())
        mixed, keep = images.clone(), 1 - h * w / (H * W)
        mixed[:, :, y:y + h, x:x + w] = images.flip(0)[:, :, y:y + h, x:x + w]
    for i in (torch.rand(B) < 0.25).nonzero()[:, 0]:
        y, x = torch.randint(H - H // 4 + 1, (2,))
        mixed[i, :, y:y + H // 4, x:x + W // 4] = torch.randn(3, 1, 1).to(images)
    return mixed, keep * targets + (1 - keep) * targets.flip(0)


# --------------------------------------------------------------------------------------- yardsticks


@torch.no_grad()
def extract(features, data, images, amp):
    """features(normalised pictures) -> (B, D), over all images: (N, D) float32."""
    with amp:  # 50: on a CPU, what fits its cache is fastest
        x = torch.cat([features(data.normalise(part)).float()
                       for part in images.split(500 if images.is_cuda else 50)])
    if not x.isfinite().all():
        raise UserError("the network's outputs are not finite: it diverged; try a smaller --lr")
    return x


def both_sets(features, data, amp):
    """-> train_x, train_y, test_x, test_y: what linear_probe and knn take, of all pictures."""
    return (extract(features, data, data.train_images, amp), data.train_labels,
            extract(features, data, data.test_images, amp), data.test_labels)


def linear_probe(train_x, train_y, test_x, test_y, percent=100):
    """Accuracy (0..1) of logistic regression on features train_x (N, D), labels train_y (N,) int64.

    L-BFGS on standardised features of the first `percent`, at least 20. The L2 weight is the best
    of four on a held-out tenth of them; then all are fitted, and the test set is touched once.
    """
    train_x, train_y = (t[:max(20, len(t) * percent // 100)] for t in (train_x, train_y))
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x, K = (train_x - mean) / std, (test_x - mean) / std, int(train_y.max()) + 1

    def fit(x, y, l2, w, iterations):
        w = w.clone().requires_grad_()  # (D + 1, K), the bias last
        lbfgs = torch.optim.LBFGS([w], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure():
            w.grad = None
            loss = F.cross_entropy(x @ w[:-1] + w[-1], y) + l2 / 2 * (w[:-1] ** 2).sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        return w.detach()

    score = lambda w, x, y: ((x @ w[:-1] + w[-1]).argmax(1) == y).float().mean().item()
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))
    held, kept = order.to(train_y.device).tensor_split([len(order) // 10])
    trials, w = [], train_x.new_zeros(train_x.shape[1] + 1, K)
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4):  # from stiff to free, each from where the last one ended
        w = fit(train_x[kept], train_y[kept], l2, w, 25)
        trials.append((score(w, train_x[held], train_y[held]), l2, w))
    _, l2, w = max(trials, key=lambda trial: trial[0])
    return score(fit(train_x, train_y, l2, w, 60), test_x, test_y)


def knn(train_x, train_y, test_x, test_y, k=20):
    """Accuracy (0..1) of a vote of the k nearest by cosine, each weighing exp(cosine / 0.07)."""
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    one_hot, right = F.one_hot(train_y).float(), 0
    for x, y in zip(test_x.split(500), test_y.split(500)):
        cosine, index = (x @ train_x.T).topk(min(k, len(train_x)))  # (b, k)
        votes = ((cosine / 0.07).exp()[:, :, None] * one_hot[index]).sum(1)  # (b, K)
        right += (votes.argmax(1) == y).sum().item()
    return right / len(test_y)


def probe_scores(data, features, random_features, amp):
    """What all six scripts report: probe, the same with 1 % of the labels, knn; two baselines."""
    pixels = lambda x: F.adaptive_avg_pool2d(x, min(32, data.image_size)).flatten(1)
    own = both_sets(features, data, amp)
    return dict(probe=linear_probe(*own), probe_1_percent=linear_probe(*own, percent=1),
                knn=knn(*own), probe_random=linear_probe(*both_sets(random_features, data, amp)),
                probe_pixels=linear_probe(*both_sets(pixels, data, amp)))


class SmallCNN(nn.Module):
    """The convolutional baseline: (B, 3, H, H) -> logits (B, K); `features` -> (B, 4 * width)."""

    def __init__(self, num_classes=10, width=32):
        super().__init__()
        stage = lambda a, b: [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(
            *stage(3, width), nn.MaxPool2d(2), *stage(width, 2 * width), nn.MaxPool2d(2),
            *stage(2 * width, 4 * width), *stage(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images):
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def train_cnn(data, seed=0, steps=200, batch_size=128):
    """A SmallCNN trained on the labels, in eval mode; kept in the data folder for the next call."""
    content = [t.cpu().numpy().tobytes() for t in (data.train_images, data.train_labels)]
    content.append(repr((data.class_names, seed, steps, batch_size)).encode())
    path = data.root / f"cnn-{hashlib.md5(b''.join(content)).hexdigest()[:16]}.pt"
    torch.manual_seed(seed)
    device, layout = data.train_images.device, torch.channels_last  # the faster one on a CPU
    cnn = SmallCNN(len(data.class_names)).to(device, memory_format=layout)
    if path.exists():
        with refuse(f"{path}: delete it, and the next run makes it again"):
            cnn.load_state_dict(load_checkpoint(path, "cnn")["model"])
        return cnn.eval()
    optimizer = torch.optim.AdamW(cnn.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        i = batch_index(len(data.train_images), batch_size, step, seed).to(device)
        x = data.normalise(augment(data.train_images[i])).contiguous(memory_format=layout)
        loss = F.cross_entropy(cnn(x), data.train_labels[i])
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    save_checkpoint(path, script="cnn", model=cnn.state_dict())
    return cnn.eval()


# ----------------------------------------------------------------------- checkpoints, log, pictures


def save_checkpoint(path, **content):
    """State dicts and plain values, whole or not at all: the last good one is never damaged."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def whole(path):
    """The path; ValueError if a zip file has a wrong checksum or folder flag: PyTorch is blind."""
    file = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
    if file and (file.testzip() or any(part.external_attr & 16 for part in file.infolist())):
        raise ValueError("it is damaged")
    return path


def load_checkpoint(path, script=None):
    """A file of tensors and plain values -> dict; code in it never runs. `script`: who wrote it."""
    with refuse(f"{path}: not a whole PyTorch file of plain tensors"):
        try:
            content = torch.load(whole(path), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it is damaged, or holds objects other than tensors") from None
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    if script and (writer := content.get("script", "another program")) != script:
        raise UserError(f"{path}: written by {writer}, not by {script}.py")
    return content


def resume(args, script, **parts):
    """With --resume, fills the parts (model, optimizer, ...) from --out; -> step, scores."""
    path = pathlib.Path(args.out) / "checkpoint.pt"
    if not args.resume or not path.exists():
        print(f"no checkpoint in {args.out} yet: this run starts anew") if args.resume else None
        return 0, {}
    checkpoint = load_checkpoint(path, script)
    with refuse(f"{path}: does not fit these options"):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["step"], checkpoint["scores"]


def log(path, step, **numbers):
    """A line of log.csv, numbers or tensors of one element. Lines from this step on, those of an
    earlier run or of one that was killed after its last checkpoint, make room for it."""
    with refuse(f"cannot write {path}"):
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) < step]
        new = ",".join([str(step), *(f"{float(v):.9g}" for v in numbers.values())])
        write_file(path, "\n".join([",".join(["step", *numbers]), *rows, new, ""]).encode())


def read_log(path):
    """What `log` wrote -> {column: its numbers}; ValueError if lines are damaged."""
    head, *rows = (line.split(",") for line in path.read_text().splitlines())
    return dict(zip(head, zip(*(map(float, row) for row in rows), strict=True), strict=True))


def write_file(path, content):
    """Bytes, through a part file: a reader or a kill never meets half of them."""
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    with refuse(f"cannot write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def save_png(path, images, columns=8, gap=2):
    """Pictures (N, 3, H, W), uint8 or 0..1, in rows of `columns`; small ones are enlarged."""
    if images.dtype != torch.uint8:
        images = (images.float().clamp(0, 1) * 255).round().byte()
    zoom, columns = max(1, 96 // images.shape[2]), min(columns, len(images))
    rows = -(-len(images) // columns)
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    images = F.pad(images, (0, gap, 0, gap), value=255)
    sheet = images.new_full((rows * columns, *images.shape[1:]), 255)
    sheet[:len(images)] = images
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    sheet = F.pad(sheet.flatten(0, 1).flatten(1, 2), (0, 0, gap, 0, gap, 0), value=255)
    H, W, _ = sheet.shape
    lines = np.pad(sheet.reshape(H, -1).numpy(), ((0, 0), (1, 0)))  # a line: filter byte 0, RGB...
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    head, body = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0), zlib.compress(lines.tobytes(), 9)
    write_file(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body)
               + chunk(b"IEND", b""))


def ticks(low, high):
    """Some round numbers in low..high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 3 or 1))
    step = next(s for s in (5 * unit, 2 * unit, unit) if (high - low) / s >= 3 or s == unit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def save_chart(path, series, xlabel, ylabel, lines=True):
    """An SVG chart of {label: [(x, y), ...]} with axes, ticks, legend; lines=False: points."""
    series = {name: [p for p in xy if all(map(math.isfinite, p))] for name, xy in series.items()}
    xs, ys = zip(*([p for xy in series.values() for p in xy] or [(0, 0)]))
    scale = lambda v, low, high, a, b: a + (b - a) * (v - low) / ((high - low) or 1)
    px = lambda x: scale(x, min(xs), max(xs), 70, 510)
    py = lambda y: scale(y, min(ys), max(ys), 310, 30)
    text = lambda x, y, words, more="": (
        f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>')
    width = 560 + max([120, *(7 * len(name) for name in series)])
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="370" font-size="12" '
           f'font-family="sans-serif"><rect width="{width}" height="370" fill="white"/>'
           '<path d="M70 30V310H510" fill="none" stroke="black"/>',
           text(290, 355, xlabel, 'text-anchor="middle"'),
           text(0, 0, ylabel, 'text-anchor="middle" transform="translate(18 170) rotate(-90)"')]
    for x in ticks(min(xs), max(xs)):
        out += [text(px(x), 328, f"{x:.7g}", 'text-anchor="middle"'),
                f'<path d="M{px(x):.1f} 310v5" stroke="black"/>']
    for y in ticks(min(ys), max(ys)):
        out += [text(62, py(y) + 4, f"{y:.6g}", 'text-anchor="end"'),
                f'<path d="M70 {py(y):.1f}h-5" stroke="black"/>']
    for i, (name, xy) in enumerate(series.items()):
        hue, xy = f"hsl({i * 137 % 360} 65% 42%)", [(px(x), py(y)) for x, y in xy]
        path_ = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
        out += [f'<polyline fill="none" stroke="{hue}" points="{path_}"/>'] * lines
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{hue}"/>'
                for x, y in (xy if not lines or len(xy) <= 30 else []) + [(530, 40 + 18 * i)]]
        out.append(text(540, 44 + 18 * i, name))
    write_file(path, "\n".join(out + ["</svg>\n"]).encode())


# ------------------------------------------------------------------- command line and training loop


class Parser(argparse.ArgumentParser):
    """argparse that refuses a wrong argument in one line, and shows every default in --help."""

    def __init__(self, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def add(self, name, default, help, **more):
        self.add_argument(name, default=default, help=f"{help} (default: {default})", **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high=10**12):
    """An argparse type: an int or a float from low to high."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        word = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {word} from {low} to {high}")

    return convert


def common_options(parser, script, sizes, steps, batch_size, lr):
    """The options that all six scripts share, in the same words."""
    count = number(int, 1, 10**9)
    parser.add("--data", "shapes", "shapes, cifar10, cifar100 or the path of your own .npz")
    parser.add("--data-dir", "datasets", "where data sets are kept")
    parser.add("--size", "tiny", f"of the model: {', '.join(sizes)}", choices=sizes)
    for name, what in (("image-size", "side to which pictures are rescaled"), ("dim", "width D"),
                       ("patch-size", "side of a patch"), ("depth", "number of layers"),
                       ("heads", "number of attention heads")):
        parser.add(f"--{name}", None, f"{what}, else the size's", type=number(int, 1, 65536))
    parser.add("--steps", steps, "training steps", type=count)
    parser.add("--batch-size", batch_size, "pictures in a step", type=count)
    parser.add("--lr", lr, "peak learning rate", type=number(float, 0, 100))
    parser.add("--seed", 0, "of weights, pictures and their order", type=number(int, 0, 10**9))
    parser.add("--device", "auto", "a device's name, or auto: cuda, else mps, else cpu")
    parser.add("--precision", "auto", "of matrix products", choices=["auto", "bf16", "fp32"])
    parser.add("--compile", False, "torch.compile: faster after a slow start", action="store_true")
    parser.add("--out", f"out/{script}", "folder of checkpoint, log and pictures")
    parser.add("--resume", False, "go on from --out's checkpoint and options", action="store_true")
    parser.add("--load", None, "only score and draw this checkpoint or released file")
    parser.add("--save-seconds", 30.0, "time between checkpoints", type=number(float, 0))


def parse(parser, script, sizes, argv=None):
    """Arguments. What is not given comes from the checkpoint of --resume, for --load the data set
    and the seed; then from --size."""
    args, stored = parser.parse_args(argv), {}
    if empty := [key for key, value in vars(args).items() if value == ""]:  # of an unset $VARIABLE
        raise UserError(f"--{empty[0].replace('_', '-')} is empty; see --help")
    if args.resume and (path := pathlib.Path(args.out) / "checkpoint.pt").exists():
        stored = load_checkpoint(path, script).get("args", {})
        stored = {key: stored[key] for key in stored if key not in ("out", "resume")}
    elif args.load:
        with contextlib.suppress(UserError):  # a released file; the model's own loader reads it
            stored = load_checkpoint(args.load, script).get("args", {})
            stored = {key: stored[key] for key in ("data", "data_dir", "seed") if key in stored}
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    for key, value in sizes[args.size].items():
        setattr(args, key, value if getattr(args, key, None) is None else getattr(args, key))
    if args.dim % args.heads or args.dim % 4:
        raise UserError(f"--dim {args.dim} must be a multiple of --heads {args.heads} and of 4")
    return args


def pick_device(name):
    """A torch.device; UserError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    with refuse(f"--device {name}: not on this machine"):
        (x := torch.zeros(1, device=name)).item()  # an error on "meta", which holds no numbers
        return x.device


def open_data(args, device):
    """The Data that the options name, on the device; checks that the patches fit its pictures."""
    data = load(args.data, args.data_dir, args.seed, args.image_size).to(device)
    args.image_size = data.image_size
    if args.image_size % args.patch_size:
        raise UserError(f"--patch-size {args.patch_size} does not divide the pictures' side "
                        f"{args.image_size}; --image-size rescales them")
    return data


class Steps:
    """`for step in Steps(...)`: training steps with a progress bar; Ctrl-C ends after a step."""

    def __init__(self, args, start=0, scores={}):
        self.range, self.every = range(start, args.steps), args.save_seconds
        self.stop = self.ended = False
        self.saved = time.time()
        self.began = self.saved - scores.get("seconds", 0)

    def __iter__(self):
        def stop(*_):
            self.stop = True
            signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait

        before = signal.signal(signal.SIGINT, stop)
        first, last = self.range.start, self.range.stop
        try:
            with tqdm(self.range, initial=first, total=last, mininterval=0.5) as self.bar:
                for step in self.bar:
                    yield step
                    if self.ended:
                        raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self, step, loss, norm):
        """Ends the run if the loss or its gradient is not finite; the weights stay as they are."""
        self.loss, norm = loss.item(), norm.item()
        if not math.isfinite(self.loss + norm):
            raise UserError(f"the loss is {self.loss:g}, the norm of its gradient {norm:g} at step "
                            f"{step}; the last checkpoint is as it was")
        self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)

    def seconds(self):
        return time.time() - self.began

    def due(self, step):
        """Time for a checkpoint: at intervals, at the end, and after Ctrl-C."""
        self.ended = self.stop  # after a Ctrl-C from here on, one more step: it has to be saved
        if self.ended or step + 1 == self.range.stop or time.time() - self.saved > self.every:
            self.saved = time.time()
            return True


def report(scores, out, files):
    """Prints the scores and the paths of what was written; returns the scores."""
    show = lambda x: str(x) if isinstance(x, int) else f"{x:.4f}"
    for key, value in scores.items():
        print(f"{key:>16}  {' '.join(map(show, value if isinstance(value, list) else [value]))}")
    print("wrote " + " ".join(str(pathlib.Path(out) / file) for file in files))
    return scores


def run(train, parse_args):
    """A script's main. Exit status: 0, 2 after one line for a UserError, 130 after Ctrl-C."""
    try:
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the checkpoint", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # what torch raises on a CPU; on a GPU a subclass
        if "memory" not in str(error):
            raise
        print("error: out of memory; lower --batch-size, --size or --image-size", file=sys.stderr)
        sys.exit(2)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add("--data", "shapes", "shapes, cifar10, cifar100 or the path of your own .npz")
    parser.add("--data-dir", "datasets", "where data sets are kept")
    parser.add("--seed", 0, "of the drawn pictures", type=number(int, 0, 10**9))
    parser.add("--out", "out/data", "where the sheet goes")
    return parser.parse_args(argv)


def main(args):
    """Draws a sheet of 32 training pictures, prints their captions and the data set's facts."""
    data, sheet = load(args.data, args.data_dir, args.seed), pathlib.Path(args.out) / "sheet.png"
    save_png(sheet, data.train_images[:32], columns=8)
    for i, caption in enumerate(data.train_captions[:32]):
        print(f"row {i // 8 + 1}, column {i % 8 + 1}: {caption}")
    print(f"{data.name}: {len(data.train_images)} training, {len(data.test_images)} test pictures, "
          f"{len(data.unseen_captions)} of unseen pairs, {data.image_size} pixels square")
    print(f"{len(data.class_names)} classes: {', '.join(data.class_names)}")
    print(f"mean {data.mean.tolist()}, std {data.std.tolist()}\nwrote {sheet}")


if __name__ == "__main__":
    run(main, parse_args)
