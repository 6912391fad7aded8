"""data.py: the images, the yardsticks, and what happens to every kind of bad file."""

import argparse
import contextlib
import hashlib
import http.server
import io
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, read_png
from conftest import brightness as write_images

import data
import vit


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes")


# ---------------------------------------------------------------------------------------- data sets


def test_shapes_are_what_the_design_says(shapes):
    assert shapes.train_images.shape == (20000, 3, 32, 32) and shapes.train_images.dtype == torch.uint8
    assert shapes.test_images.shape == (2000, 3, 32, 32) and shapes.unseen_images.shape == (1000, 3, 32, 32)
    assert torch.bincount(shapes.train_labels).tolist() == [2000] * 10
    again = data.shapes(0)
    other = data.shapes(1)
    assert (again.train_images == shapes.train_images).all() and again.test_captions == shapes.test_captions
    assert (other.train_images != shapes.train_images).any()


def test_only_the_form_tells_the_shape(shapes):
    """Size and position are independent of the class, and the ground is lighter as often as it is darker."""
    n = 10_000
    captions = shapes.train_captions[:n]
    images = shapes.train_images[:n].float().mean(1)  # gray
    center = images[:, 14:18, 14:18].mean((1, 2))
    border = torch.cat([images[:, 0], images[:, -1]], dim=1).mean(1)
    is_lighter = border > center
    for k in range(10):
        chosen = [caption for caption, label in zip(captions, shapes.train_labels) if label == k]
        assert abs(sum("big" in caption for caption in chosen) / len(chosen) - 0.5) < 0.07
        for position in data.POSITIONS:
            assert abs(sum(position in caption for caption in chosen) / len(chosen) - 0.2) < 0.06
        assert 0.3 < is_lighter[shapes.train_labels[:n] == k].float().mean() < 0.7


def test_captions_name_shape_color_size_and_position(shapes):
    def pair(caption):
        words = re.findall(r"\w+", caption)
        color, = set(words) & set(data.COLORS)
        shape, = set(words) & set(data.SHAPES)
        assert len({"small", "big"} & set(words)) == 1 and sum(p in caption for p in data.POSITIONS) == 1
        return shape, color

    seen = {pair(c) for c in shapes.train_captions} | {pair(c) for c in shapes.test_captions}
    unseen = {pair(c) for c in shapes.unseen_captions}
    assert len(seen) == 60 and len(unseen) == 20 and not seen & unseen
    for captions, labels in ((shapes.train_captions, shapes.train_labels),
                             (shapes.unseen_captions, shapes.unseen_labels)):
        assert all(pair(c)[0] == data.SHAPES[k] for c, k in zip(captions[:500], labels))


def test_captions_are_true(shapes):
    """A big shape covers more pixels than a small one, red is red, left is left, and the top is above."""
    images = shapes.train_images[:4000].float()
    ground = torch.cat([images[:, :, 0], images[:, :, -1]], -1).median(-1).values[:, :, None, None]
    shape = (images - ground).abs().amax(1) > 60  # (n, H, W)
    area = shape.float().mean((1, 2))
    column = (shape * torch.arange(32.0)).sum((1, 2)) / shape.sum((1, 2)).clamp(min=1)
    row = (shape * torch.arange(32.0)[:, None]).sum((1, 2)) / shape.sum((1, 2)).clamp(min=1)

    def has(word):
        return torch.tensor([word in c for c in shapes.train_captions[:4000]]) & (area > 0.05)

    assert area[has("big")].mean() > 1.3 * area[has("small")].mean()
    assert column[has("on the left")].mean() < 13.5 < 17.5 < column[has("on the right")].mean()
    assert row[has("at the top")].mean() < 13.5 < 17.5 < row[has("at the bottom")].mean()
    color = (images * shape[:, None]).sum((2, 3)) / shape.sum((1, 2)).clamp(min=1)[:, None]
    for name in ("red", "green", "blue"):
        assert color[has(f" {name} ")].mean(0).argmax() == ["red", "green", "blue"].index(name)
    assert color[has(" yellow ")].mean(0)[1] > color[has(" orange ")].mean(0)[1] + 20  # yellow has more green


def test_each_name_has_its_form():
    """At six points by which the shapes differ: inside (negative) or outside."""
    points = torch.tensor([[0.5, -0.5], [0.6, 0.4], [0.2, 0.3], [0.8, 0.2], [-0.5, 0.1], [-0.4, 0.7]])
    inside = {  # x, y, with y pointing downwards; no two shapes are alike
        "circle": "111111", "square": "111011", "triangle": "011010", "diamond": "001010", "star": "001011",
        "heart": "101010", "cross": "001110", "ring": "110111", "moon": "000011", "arrow": "001000"}
    for name, expected in inside.items():
        distance = data.signed_distance(name, points[:, 0][None, None], points[:, 1][None, None])[0, 0]
        assert "".join(str(int(d < 0)) for d in distance) == expected, name


def test_signed_distances_have_unit_slope_or_less():
    """Else the soft edge of one pixel would be sharper or softer than for the circle."""
    y, x = torch.meshgrid(torch.linspace(-1.5, 1.5, 301), torch.linspace(-1.5, 1.5, 301), indexing="ij")
    for name in data.SHAPES:
        distance = data.signed_distance(name, x, y)
        slope = torch.hypot(*torch.gradient(distance, spacing=0.01))
        edge = distance.abs() < 0.02
        assert 0.85 < slope[edge].mean() < 1.15, name
        assert 0.25 < (distance < 0).float().mean() * 9 / 2 < 1.4, name


def test_image_size_rescales(shapes):
    small = data.load("shapes", image_size=16)
    assert small.train_images.shape == (20000, 3, 16, 16) and small.unseen_images.shape[-1] == 16
    pooled = shapes.test_images[:100].float().reshape(100, 3, 16, 2, 16, 2).mean((3, 5))
    assert (small.test_images[:100].float() - pooled).abs().mean() < 4


def test_one_large_image_is_enough_to_measure():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 3300, 13)[None, :, :, :3300]  # larger than all that is read
    own = data.Data("large", ["a"], images, torch.zeros(1), [], images[:0], torch.zeros(0), [])
    assert own.image_size == 3300 and torch.allclose(own.mean, images[0, :, 0].float().mean(1) / 255, atol=1e-4)


def test_normalize_and_back(shapes):
    x = shapes.normalize(shapes.train_images[:10000])
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert (shapes.denormalize(x) * 255 - shapes.train_images[:10000]).abs().max() < 1e-2


def cifar_folder(root, name="cifar10", n=None):
    """The official layout, with random pixels; returns what was written."""
    _, _, folder, label_bytes, files, names = data.CIFAR[name]
    (root / folder).mkdir(parents=True)
    classes = int(name[5:])
    rng = np.random.default_rng(0)
    (root / folder / names).write_text("\n".join(f"class_{k}" for k in range(classes)) + "\n\n", encoding="utf8")
    written = {}
    for file, n in files.items():
        records = rng.integers(0, 256, (n, 3072 + label_bytes), dtype=np.uint8)
        records[:, :label_bytes] %= classes
        records.tofile(root / folder / file)
        written[file] = records
    return root / folder, written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_the_official_layout(tmp_path, name):
    folder, written = cifar_folder(tmp_path, name)
    cifar = data.load(name, tmp_path)
    label_bytes = data.CIFAR[name][3]
    first, *_, last = written.values()
    assert cifar.train_images.shape == (50000, 3, 32, 32) and cifar.test_images.shape == (10000, 3, 32, 32)
    assert (cifar.train_labels[:100].numpy() == first[:100, label_bytes - 1]).all()  # CIFAR-100: the fine one
    assert (cifar.train_images[5].numpy().ravel() == first[5, label_bytes:]).all()
    assert (cifar.test_images[7].numpy().ravel() == last[7, label_bytes:]).all()
    assert f"class {cifar.test_labels[0]}" in cifar.test_captions[0] and len(set(cifar.train_captions)) > 100

    file = folder / list(written)[0]
    whole = file.read_bytes()
    for bad in (whole[:-1], whole + b"x", b"", whole[:3073]):
        file.write_bytes(bad)
        with pytest.raises(data.UserError, match="is damaged: delete it"):
            data.load(name, tmp_path)
    file.write_bytes(bytes([255] * label_bytes) + whole[label_bytes:])
    with pytest.raises(data.UserError, match="label 255"):
        data.load(name, tmp_path)
    file.unlink()
    with pytest.raises(data.UserError, match="No such file"):
        data.load(name, tmp_path)


@contextlib.contextmanager
def web_server():
    """A local web server; `answer` holds the bytes, and how to misbehave."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if answer.get("status", 200) != 200:
                return self.send_error(answer["status"])
            self.send_response(200)
            self.send_header("Content-Length", str(answer.get("length", len(answer["body"]))))
            self.end_headers()
            self.wfile.write(answer["body"])
            if "stall" in answer:
                time.sleep(answer["stall"])

        def log_message(self, *_):
            pass

    answer = {}
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    web.answer = answer
    web.url = f"http://127.0.0.1:{web.server_port}/archive.tar.gz"
    yield web
    web.shutdown()
    web.server_close()


@pytest.fixture
def server():
    with web_server() as web:
        yield web


def archive(**members):
    """A .tar.gz of {name: bytes, or a TarInfo}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def test_download_is_whole_or_nothing(server, tmp_path):
    good = archive(**{"set/a.bin": b"12345", "set/b.txt": b"names", "../evil": b"out", "/etc/evil": b"out"})
    md5 = hashlib.md5(good).hexdigest()

    def get():
        data.download(server.url, md5, tmp_path / "root", "set", {"a.bin": 5, "b.txt": None})

    def refused(reason):
        with pytest.raises(data.UserError, match=reason) as error:
            get()
        assert "\n" not in str(error.value) and list((tmp_path / "root").iterdir()) == []

    server.answer.update(status=404, body=b"")
    refused("404")
    server.answer.update(status=200, body=good[:-20])
    refused("md5")
    server.answer.update(body=good[:-20], length=len(good))  # cut off
    refused("nothing was kept")
    server.answer.update(body=good + b"!", length=len(good))  # lies about its length: the rest is not read
    get()
    assert (tmp_path / "root" / "set" / "a.bin").read_bytes() == b"12345"
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["set"]  # and the hostile members went nowhere
    assert sorted(p.name for p in (tmp_path / "root" / "set").iterdir()) == ["a.bin", "b.txt"]


def test_download_that_stalls(server, tmp_path, monkeypatch):
    original = data.urllib.request.urlopen
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: original(url, timeout=0.3))
    server.answer.update(body=b"only the start", length=1000, stall=1.5)
    with pytest.raises(data.UserError, match="timed out"):
        data.download(server.url, "0" * 32, tmp_path, "set", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("members", [
    {"set/a.bin": link("set/a.bin", tarfile.SYMTYPE, "/etc/passwd"), "set/b.txt": b""},
    {"set/a.bin": link("set/a.bin", tarfile.LNKTYPE, "../../x"), "set/b.txt": b""},
    {"set/a.bin": link("set/a.bin", tarfile.DIRTYPE, ""), "set/b.txt": b""},
    {"set/a.bin": b"12345", "set/b.txt": link("set/b.txt", tarfile.SYMTYPE, "a.bin")},
    {"set/a.bin": b"1234", "set/b.txt": b""},
    {"other/a.bin": b"12345", "../set/a.bin": b"12345", "set/b.txt": b""},
])
def test_hostile_archives_are_refused(server, tmp_path, members):
    body = archive(**members)
    server.answer.update(body=body)
    with pytest.raises(data.UserError, match="nothing was kept"):
        data.download(server.url, hashlib.md5(body).hexdigest(), tmp_path, "set", {"a.bin": 5, "b.txt": None})
    assert list(tmp_path.iterdir()) == []


def test_load_downloads_once(server, tmp_path, monkeypatch):
    folder, _ = cifar_folder(tmp_path / "made")
    body = archive(**{f"{folder.name}/{p.name}": p.read_bytes() for p in folder.iterdir()})
    monkeypatch.setattr(data, "CIFAR_URL", server.url + "/")
    name, _, *rest = data.CIFAR["cifar10"]
    monkeypatch.setitem(data.CIFAR, "cifar10", (name, hashlib.md5(body).hexdigest(), *rest))
    server.answer.update(body=body)
    assert data.load("cifar10", tmp_path / "root").train_labels.shape == (50000,)
    server.answer.update(status=404)
    data.load("cifar10", tmp_path / "root")  # from the folder


def test_own_npz(pictures, tmp_path):
    own = data.load(str(pictures))
    assert own.train_images.shape == (108, 3, 16, 16) and own.test_images.shape == (12, 3, 16, 16)
    assert own.class_names == ["0", "1", "2"] and own.name == "own"
    assert all(own.train_captions[i] == f"a photo of a {own.train_labels[i]}." for i in range(108))
    brightness = own.train_images.float().mean((1, 2, 3))
    assert (brightness.div(80).long() == own.train_labels).all()  # images and labels stay together
    images = np.zeros((20, 8, 8, 3), np.uint8)
    labels = np.arange(20)
    np.savez(tmp_path / "named.npz", images=images, labels=labels % 2, class_names=["cat", "dog"],
             captions=[f"number {i}" for i in range(20)])
    named = data.load(str(tmp_path / "named.npz"), seed=5)
    assert (named.test_labels == data.load(str(tmp_path / "named.npz")).test_labels).all()  # for any seed
    np.savez(tmp_path / "big_endian.npz", images=images, labels=(labels % 2).astype(">i4"))
    assert data.load(str(tmp_path / "big_endian.npz")).train_labels.max() == 1
    assert named.class_names == ["cat", "dog"] and sorted(named.train_captions + named.test_captions) == sorted(
        f"number {i}" for i in range(20))
    np.savez(tmp_path / "bytes.npz", images=images, labels=labels % 2, class_names=np.array([b"cat", b"dog"]),
             captions=np.array(["Löwe".encode()] * 20))
    own = data.load(str(tmp_path / "bytes.npz"))
    assert own.class_names == ["cat", "dog"] and set(own.train_captions) == {"Löwe"}


def test_zero_shot_task(shapes, pictures, tmp_path):
    names, templates, parts = data.zero_shot_task(shapes)
    assert len(names) == len(set(names)) == 80 and len(templates) == 41 and templates[0] == "one {}"
    assert all(template.count("{}") == 1 for template in templates) and list(parts) == ["seen", "unseen"]
    for part, captions, n in (("seen", shapes.test_captions, 2000), ("unseen", shapes.unseen_captions, 1000)):
        images, targets = parts[part]
        assert len(images) == len(targets) == n
        prompts = {template.format(names[k]) for template in templates for k in targets[:1]}
        assert captions[0] in prompts  # a caption is one of its name's prompts
        assert all(names[k] in caption for k, caption in zip(targets, captions))
    (tmp_path / "shapes.npz").write_bytes(pictures.read_bytes())
    own = data.load(str(tmp_path / "shapes.npz"))  # of the same name, but not the built-in data set
    names, templates, parts = data.zero_shot_task(own)
    assert own.name == "shapes" and names == ["0", "1", "2"] and templates == data.CIFAR_TEMPLATES
    assert list(parts) == ["seen"] and (parts["seen"][1] == own.test_labels).all()


IMAGES = np.zeros((20, 8, 8, 3), np.uint8)
LABELS = np.zeros(20, np.int64)


@pytest.mark.parametrize("arrays", [
    dict(pictures=IMAGES, labels=LABELS), dict(images=IMAGES), dict(images=IMAGES.astype(np.float32), labels=LABELS),
    dict(images=IMAGES[..., :1], labels=LABELS), dict(images=IMAGES[:, :4], labels=LABELS),
    dict(images=IMAGES[0], labels=LABELS), dict(images=IMAGES, labels=LABELS[:5]),
    dict(images=IMAGES, labels=LABELS - 1),
    dict(images=IMAGES, labels=LABELS / 2), dict(images=IMAGES[:0], labels=LABELS[:0]),
    dict(images=IMAGES, labels=LABELS + 10**6), dict(images=IMAGES, labels=LABELS, captions=["one"]),
    dict(images=IMAGES, labels=LABELS + 3, class_names=["a"]), dict(images=np.array(["x"] * 20), labels=LABELS),
    dict(images=np.array([{}, []], dtype=object), labels=LABELS), dict(images=np.uint8(3), labels=LABELS),
    dict(images=IMAGES[:, :0, :0], labels=LABELS), dict(images=IMAGES, labels=LABELS, captions="one"),
    dict(images=IMAGES, labels=LABELS + 1, class_names="one"),
    dict(images=IMAGES, labels=LABELS, captions=[["five"] * 5] * 20),
    dict(images=IMAGES, labels=LABELS, captions=np.arange(20)),
    dict(images=IMAGES, labels=LABELS, captions=np.array([b"\xff"] * 20)),
    dict(images=IMAGES, labels=LABELS, class_names=[["a", "b"]]),
])
def test_bad_npz(tmp_path, arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(data.UserError, match="bad.npz") as error:
        data.load(str(tmp_path / "bad.npz"))
    assert "\n" not in str(error.value)


def test_damaged_npz(pictures, tmp_path):
    whole = pictures.read_bytes()
    for bad in (b"", b"PK", whole[:100], whole[:-30], b"\x80\x04" + whole, pickle.dumps({}),
                whole[:5000] + whole[6000:]):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(data.UserError, match="bad.npz"):
            data.load(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "bad.npz", images=np.array([Bomb()], dtype=object), labels=LABELS)
    with pytest.raises(data.UserError, match="bad.npz"):  # and its code does not run
        data.load(str(tmp_path / "bad.npz"))
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(data.UserError):
            data.load(str(missing))


# ------------------------------------------------------------------------------ batches, yardsticks


def test_batches_are_epochs_without_repetition():
    seen = torch.cat([data.batch_index(100, 10, step, seed=3) for step in range(20)])
    assert seen[:100].sort().values.tolist() == list(range(100)) == seen[100:].sort().values.tolist()
    assert (seen[:100] != seen[100:]).any()
    assert (data.batch_index(100, 10, 7, 3) == seen[70:80]).all()
    assert (data.batch_index(100, 10, 7, 4) != seen[70:80]).any()
    assert len(data.batch_index(5, 64, 3, 0)) == 5


def test_augment_shifts_and_mirrors():
    torch.manual_seed(0)
    image = torch.arange(3 * 8 * 8).reshape(3, 8, 8).byte()
    out = data.augment(image.expand(400, 3, 8, 8), pad=2)
    possible = set()
    for flipped in (image, image.flip(2)):
        padded = torch.nn.functional.pad(flipped.float(), (2, 2, 2, 2), mode="reflect").byte()
        possible |= {padded[:, y:y + 8, x:x + 8].numpy().tobytes() for y in range(5) for x in range(5)}
    drawn = {image.numpy().tobytes() for image in out}
    assert drawn == possible and len(possible) == 50
    assert (data.augment(image.expand(400, 3, 8, 8), pad=0, flip=False) == image).all()


def test_mixing_keeps_the_shares():
    """Images of one value each: the mean of a mixed image tells the shares, and the target must agree."""
    torch.manual_seed(0)
    values = torch.arange(4.0)
    images = values[:, None, None, None].expand(4, 3, 16, 16)
    blended = 0
    for _ in range(100):
        mixed, shares = data.mixup_or_cutmix(images, torch.eye(4))
        assert torch.allclose(shares.sum(1), torch.ones(4))
        assert torch.allclose(mixed.mean((1, 2, 3)), shares @ values, atol=1e-4)
        blended += (mixed[0] == mixed[0, 0, 0, 0]).all().item()
    assert 30 < blended < 70  # half by mixup, which leaves each image of one value
    assert (images == values[:, None, None, None]).all()


def test_erasing_paints_a_square():
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    erased = 0
    for _ in range(100):
        for before, after in zip(images, data.random_erasing(images)):
            changed = (before != after).any(0)  # (16, 16)
            if changed.any():
                erased += 1
                assert changed.sum() == 16 and changed.any(0).sum() == 4
                assert (after[:, changed] == after[:, changed][:, :1]).all()  # one color
    assert 60 < erased < 140  # a quarter of 400


def test_probe_scores_uses_each_feature(pictures, monkeypatch):
    own = data.load(str(pictures))
    amp = torch.autocast("cpu", enabled=False)

    def brightness(x):
        return x.mean((1, 2, 3))[:, None]

    def noise(x):
        return torch.randn(len(x), 4, generator=torch.Generator().manual_seed(len(x)))

    scores = data.probe_scores(own, brightness, noise, amp)
    assert list(scores) == ["probe", "probe_1_percent", "knn", "probe_random", "probe_pixels"]
    assert scores["probe"] == 1 and scores["probe_random"] < 0.8 and scores["probe_pixels"] == 1

    asked = []

    def linear_probe(train_x, train_y, test_x, test_y, percent=100):
        asked.append((train_x.shape[1], percent))
        return 0.25

    monkeypatch.setattr(data, "linear_probe", linear_probe)
    scores = data.probe_scores(own, brightness, noise, amp)
    assert asked == [(1, 100), (1, 1), (4, 100), (3 * 16 * 16, 100)]
    assert scores["knn"] == data.knn(*data.both_sets(brightness, own, amp)) != 0.25


def test_features_must_be_finite(pictures):
    own = data.load(str(pictures))
    for bad in (math.nan, math.inf):

        def features(x):
            return x.flatten(1) + bad * (x.mean((1, 2, 3)) > 1)[:, None]

        with pytest.raises(data.UserError, match="not finite: it diverged"):
            data.extract(features, own, own.train_images, torch.autocast("cpu", enabled=False))


def test_linear_probe_is_logistic_regression():
    torch.manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.randn(600, 8) + 2.5 * torch.nn.functional.one_hot(y, 8)
    score = data.linear_probe(x[:500], y[:500], x[500:], y[500:])
    best = (x[500:, :3].argmax(1) == y[500:]).float().mean().item()  # Bayes
    assert abs(score - best) < 0.05 and score > 0.85
    scaled = x * torch.logspace(-3, 3, 8) + 100
    assert abs(data.linear_probe(scaled[:500], y[:500], scaled[500:], y[500:]) - score) < 0.03
    noise = torch.randn(600, 8)
    assert data.linear_probe(noise[:500], y[:500], noise[500:], y[500:]) < 0.5
    ring = torch.randn(600, 2)
    inside = (ring.norm(dim=1) < 1.18).long()  # not linearly separable
    assert data.linear_probe(ring[:500], inside[:500], ring[500:], inside[500:]) < 0.65


def test_linear_probe_with_few_labels_sees_no_others():
    torch.manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.randn(600, 8) + torch.nn.functional.one_hot(y, 8)
    few = data.linear_probe(x[:500], y[:500], x[500:], y[500:], percent=6)
    assert few == data.linear_probe(x[:30], y[:30], x[500:], y[500:])
    assert few < data.linear_probe(x[:500], y[:500], x[500:], y[500:])


def test_linear_probe_has_the_right_optimum():
    """At the minimum of the docstring's formula, its gradient vanishes: dL/dW = (p - onehot)^T x / n + l2 W."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y = torch.randint(3, (200,))
    weight, bias = data.fit(x, y, torch.zeros(3, 5), torch.zeros(3), l2=0.01, iterations=100)
    error = (x @ weight.T + bias).softmax(1) - torch.eye(3)[y]
    assert (error.T @ x / 200 + 0.01 * weight).abs().max() < 1e-3 and error.mean(0).abs().max() < 1e-3
    train_x, test_x = data.standardize(3 * x + 7, x)
    assert train_x.mean(0).abs().max() < 1e-5 and (train_x.std(0) - 1).abs().max() < 1e-5
    assert torch.allclose(test_x, (x - (3 * x + 7).mean(0)) / (3 * x).std(0), atol=1e-4)
    assert data.accuracy(torch.eye(3), torch.tensor([0, 1, 1]), torch.eye(3), torch.zeros(3)) == pytest.approx(2 / 3)


def test_frechet_is_the_distance_of_two_gaussians():
    torch.manual_seed(0)
    x = torch.randn(500, 3) @ torch.randn(3, 3)
    assert abs(data.frechet(x, x)) < 1e-9
    assert data.frechet(x, x + 2) == pytest.approx(12, rel=1e-5)  # only the means differ, by 2 in each of 3
    m = x.mean(0)  # the same mean, thrice the std: trace(S) * (1 + 9 - 2 * 3)
    assert data.frechet(x, m + 3 * (x - m)) == pytest.approx(4 * x.T.cov().trace().item(), rel=1e-4)
    y = torch.randn(400, 3) + 1
    S_x = x.T.cov().double()
    S_y = y.T.cov().double()
    cross = torch.linalg.eigvals(S_x @ S_y).real.sqrt().sum()  # the same eigenvalues as under the root
    expected = (m - y.mean(0)).square().sum() + S_x.trace() + S_y.trace() - 2 * cross
    assert data.frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)


def test_knn_votes():
    x = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    y = torch.tensor([0, 0, 1, 1])
    assert data.knn(x, y, 5 * x, y, k=2) == 1
    assert data.knn(x, y, x, 1 - y, k=1) == 0
    assert data.knn(x, y, x[2:3], torch.tensor([1]), k=4) == 1  # the nearer ones weigh more
    x = torch.tensor([[1, 0], [0.9, 0.19**0.5], [0.9, -(0.19**0.5)]])  # one at cosine 1 against two at 0.9
    assert data.knn(x, torch.tensor([0, 1, 1]), x[:1], torch.tensor([0]), k=3) == 1  # exp(0.1 / 0.07) is above 2


def test_small_cnn_learns_and_is_cached(pictures, tmp_path, monkeypatch):
    own = data.load(str(pictures), tmp_path)
    cnn = data.train_cnn(own, steps=60, batch_size=32)
    assert (cnn(own.normalize(own.test_images)).argmax(1) == own.test_labels).all()
    assert cnn.features(own.normalize(own.test_images)).shape == (12, 128) and not cnn.training
    monkeypatch.setattr(data, "augment", None)  # a second training would fail
    with pytest.raises(TypeError):
        own.train_labels = own.train_labels.flip(0)
        data.train_cnn(own, steps=60, batch_size=32)  # other labels are another net
    own.train_labels = own.train_labels.flip(0)
    again = data.train_cnn(own, steps=60, batch_size=32)
    assert all((a == b).all() for a, b in zip(cnn.state_dict().values(), again.state_dict().values()))
    path, = tmp_path.glob("cnn-*.pt")
    monkeypatch.undo()
    whole = path.read_bytes()
    damaged = dict(cnn.state_dict(), **{"head.bias": torch.ones(7)})  # its other weights fit
    data.save_checkpoint(path, script="cnn", model={key: value + 1 for key, value in damaged.items()})
    for content in (path.read_bytes(), whole[:1000]):  # such files are made again
        path.write_bytes(content)
        again = data.train_cnn(own, steps=60, batch_size=32)
        assert all(torch.equal(a, b) for a, b in zip(cnn.state_dict().values(), again.state_dict().values()))
    assert path.read_bytes() == whole


def test_a_read_only_data_folder_does_not_end_a_run(pictures, tmp_path, capsys):
    (tmp_path / "file").touch()
    own = data.load(str(pictures), tmp_path / "file" / "datasets")  # nothing can be written under a file
    assert not data.train_cnn(own, steps=1).training
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("not kept for the next run: cannot write")


def test_baselines_are_kept(tmp_path, monkeypatch):
    """For each function, data set, precision and source of linear_probe a file, which holds what linear_probe says. Not
    for small sets."""
    write_images(tmp_path / "own.npz", 2300)
    own = data.load(str(tmp_path / "own.npz"), tmp_path)
    amp = data.autocast("cpu", "fp32")

    def pixels(images):
        return images.flatten(1)

    def noise(images):
        return torch.randn(len(images), 8, generator=torch.Generator().manual_seed(0))

    assert data.baseline(pixels, own, amp) == data.linear_probe(*data.both_sets(pixels, own, amp))
    path, = tmp_path.glob("probe-*.pt")
    data.save_checkpoint(path, script="baseline", probe=0.125)
    assert data.baseline(pixels, own, amp) == 0.125  # from the file
    assert data.baseline(noise, own, amp) != 0.125  # another function
    own.train_labels = own.train_labels.flip(0)
    assert data.baseline(pixels, own, amp) != 0.125  # other labels
    own.train_labels = own.train_labels.flip(0)
    own.test_labels = own.test_labels.flip(0)
    assert data.baseline(pixels, own, amp) != 0.125  # other labels of the test set
    own.test_labels = own.test_labels.flip(0)
    for damaged in (b"", b"damaged", path.read_bytes()[:-30]):
        path.write_bytes(damaged)
        assert data.baseline(pixels, own, amp) > 0.5
    data.save_checkpoint(path, script="baseline")
    assert data.baseline(pixels, own, amp) > 0.5
    with monkeypatch.context() as patch:  # a student's own probe
        patch.setattr(data, "linear_probe", lambda *sets: 0.25)
        assert data.baseline(pixels, own, amp) == 0.25
    with monkeypatch.context() as patch:  # or a part of it
        patch.setattr(data, "accuracy", lambda *parts: 0.75)
        assert data.baseline(pixels, own, amp) == 0.75
    path.unlink()
    for key in ("train_images", "train_labels"):
        setattr(own, key, getattr(own, key)[:1000])
    data.baseline(pixels, own, amp)
    assert not path.exists() and len(list(tmp_path.glob("probe-*.pt"))) == 5


def test_an_untrained_copy_has_new_weights():
    model = vit.ViT(image_size=16, dim=16, depth=1, heads=2)
    model.blocks[0].attn.proj = data.ScaledLinear(16, 16)
    torch.manual_seed(5)
    model.init_weights()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    copied = data.untrained(model, seed=5).state_dict()
    assert all((copied[name] == p).all() for name, p in start.items())
    assert all((copied[name] != p).any() for name, p in model.state_dict().items())


def test_normalize_is_that_of_the_data_set(pictures):
    own = data.load(str(pictures))
    images = own.test_images[:3]
    assert (data.normalize(images, own.mean.tolist(), own.std.tolist()) == own.normalize(images)).all()
    expected = (images[1, 2, 5, 7] / 255 - own.mean[2]) / own.std[2]
    assert own.normalize(images)[1, 2, 5, 7].item() == pytest.approx(expected.item(), abs=1e-6)


# ----------------------------------------------------------------------- checkpoints, log, pictures


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "deep" / "c.pt"
    data.save_checkpoint(path, script="mae")
    data.save_checkpoint(path, script="vit", model={"w": torch.ones(2)}, args={"lr": 0.1})
    content = data.load_checkpoint(path, "vit")
    assert (content["model"]["w"] == 1).all() and content["args"] == {"lr": 0.1} and content["version"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]
    with pytest.raises(data.UserError, match="written by vit, not by mae.py"):
        data.load_checkpoint(path, "mae")
    for old in (dict(script="vit", model={}), dict(script="vit", version=1)):
        torch.save(old, path)
        with pytest.raises(data.UserError, match="another version of this repository; train it again"):
            data.load_checkpoint(path)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    data.save_checkpoint(path, step=1)

    def full_disk(self, content):
        open(self, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(data.UserError, match="cannot write .*No space left"):
        data.save_checkpoint(path, step=2)
    assert data.load_checkpoint(path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(data.UserError, match="cannot write"):
        data.save_checkpoint(path / "under_a_file" / "c.pt", step=2)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint ran')",)


def test_bad_checkpoints(tmp_path):
    good = tmp_path / "good.pt"
    bad = tmp_path / "bad.pt"
    torch.save({"model": {"w": torch.randn(100)}, "step": 3}, good)
    whole = good.read_bytes()
    cut = [whole[:n] for n in (0, 1, 4, 50, len(whole) // 2, len(whole) - 1)]
    for content in [*cut, b"hello", pickle.dumps(Bomb(), protocol=2),
                    pickle.dumps([1, 2], protocol=2)]:
        bad.write_bytes(content)
        with pytest.raises(data.UserError, match="bad.pt: not a whole") as error:
            data.load_checkpoint(bad)
        assert "\n" not in str(error.value)
    for value in (Bomb(), torch.nn.Linear(2, 2), [1], torch.ones(2)):
        torch.save(value, bad)
        with pytest.raises(data.UserError):
            data.load_checkpoint(bad)
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(data.UserError):
            data.load_checkpoint(path)
    weight = whole.index(torch.load(good)["model"]["w"].numpy().tobytes()) + 50
    record = whole.rindex(b"PK\1\2", 0, whole.rindex(b"/data/0"))  # of the weight, in the zip's directory
    for i, bit in ((weight, 1), (record + 38, 16)):  # torch.load is blind to both: a number, a file marked as a folder
        bad.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1:])
        with pytest.raises(data.UserError, match="bad.pt: not a whole PyTorch file"):
            data.load_checkpoint(bad)


def test_log_drops_what_is_repeated(tmp_path):
    path = tmp_path / "log.csv"
    for step in range(5):
        data.log(path, step, loss=torch.tensor(step / 3), lr=0.1)
    lines = path.read_text(encoding="utf8").splitlines()
    assert lines[0] == "step,loss,lr" and float(lines[2].split(",")[1]) == pytest.approx(1 / 3, abs=1e-8)
    data.log(path, 3, loss=9, lr=0.1)
    assert path.read_text(encoding="utf8").splitlines() == lines[:4] + ["3,9,0.1"]
    read = data.read_log(path)
    assert list(read) == ["step", "loss", "lr"] and read["step"] == [0, 1, 2, 3] and read["loss"][3] == 9
    for damage in ("", "step,loss\n", "step,loss\n1\n", "step,loss\n1,2\n3\n", "step,loss\n1,two\n"):
        (tmp_path / "bad.csv").write_text(damage, encoding="utf8")
        with pytest.raises(ValueError):
            data.read_log(tmp_path / "bad.csv")
    path.write_text("", encoding="utf8")
    data.log(path, 0, loss=1, lr=0.1)
    assert path.read_text(encoding="utf8") == "step,loss,lr\n0,1,0.1\n"


def test_log_that_cannot_be_replaced(tmp_path, monkeypatch, capsys):
    """As on Windows while a spreadsheet shows it: the run waits for a second, says so once, and goes on."""
    path = tmp_path / "log.csv"
    data.log(path, 0, loss=1)
    attempts = []

    def locked(part, target):
        attempts.append(target)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.os, "replace", locked)
    monkeypatch.setattr(data.time, "sleep", attempts.append)
    data.log(path, 10, loss=2)
    data.log(path, 20, loss=3)
    line, = capsys.readouterr().out.splitlines()
    assert "log.csv cannot be written" in line and attempts.count(path) == 6
    assert 0.5 < sum(wait for wait in attempts if wait != path) < 2
    with pytest.raises(data.UserError, match="cannot write"):  # there is none yet: the folder is read-only
        data.log(tmp_path / "other.csv", 0, loss=1)
    monkeypatch.undo()
    data.log(path, 30, loss=4)
    assert data.read_log(path) == {"step": [0, 30], "loss": [1, 4]}
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_compare_logs(tmp_path):
    for name, values in (("one", (2, 1, 4)), ("two", (10, 5, 20))):
        for step, value in enumerate(values):
            data.log(tmp_path / name / "log.csv", step, loss=value, feature_std=1)
    folders = [tmp_path / "one", str(tmp_path / "two")]

    def legend_and_curves(folders, columns, **more):
        chart = tmp_path / "c.svg"
        data.compare_logs(chart, folders, columns, x="step", xlabel="step", ylabel="loss", **more)
        root = xml.etree.ElementTree.parse(chart).getroot()
        words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        curves = [e.get("points") for e in root.iter("{http://www.w3.org/2000/svg}polyline")]
        return words[-len(curves):], curves

    words, curves = legend_and_curves(folders, ["loss"])
    assert words == ["one", "two"] and curves[0] != curves[1]
    words, curves = legend_and_curves(folders, ["loss"], relative=True)
    assert curves[0] == curves[1] == "70.0,216.7 290.0,310.0 510.0,30.0"  # 1, 1/2, 2
    words, curves = legend_and_curves(folders, ["loss", "feature_std"])
    assert words == ["one: loss", "one: feature std", "two: loss", "two: feature std"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").rename(tmp_path / "deep" / "two")
    words, _ = legend_and_curves([tmp_path / "deep" / "two", tmp_path / "two"], ["loss"])
    assert words == [str(tmp_path / "deep" / "two"), str(tmp_path / "two")]  # one name twice: the whole paths
    for folder, columns in ((tmp_path / "none", ["loss"]), (tmp_path / "two", ["height"])):
        with pytest.raises(data.UserError, match=f"{folder.name}: holds no whole log.csv") as error:
            legend_and_curves([folder], columns)
        assert "\n" not in str(error.value)


def test_png(tmp_path):
    images = torch.randint(0, 255, (5, 3, 96, 90), dtype=torch.uint8)
    data.save_png(tmp_path / "a.png", images, columns=3)
    sheet = read_png(tmp_path / "a.png")
    assert sheet.shape == (3, 2 + 2 * 98, 2 + 3 * 92)
    assert (sheet[:, 2:98, 2:92] == images[0]).all() and (sheet[:, 100:196, 94:184] == images[4]).all()
    assert (sheet[:, :2] == 255).all() and (sheet[:, 100:196, 186:] == 255).all()
    data.save_png(tmp_path / "b.png", torch.tensor([0.0, 0.5, 2.0])[None, :, None, None].expand(1, 3, 32, 32))
    assert read_png(tmp_path / "b.png")[:, 50, 50].tolist() == [0, 128, 255]
    assert read_png(tmp_path / "b.png").shape == (3, 100, 100)  # enlarged threefold


def test_chart(tmp_path):
    series = {"a<b & c": [(0, 1), (5, 3), (10, 2)], "two": [(0, 0), (10, math.nan)], "none": []}
    data.save_chart(tmp_path / "c.svg", series, "steps", "loss")
    root = xml.etree.ElementTree.parse(tmp_path / "c.svg").getroot()
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"steps", "loss", "a<b & c", "two", "0", "10", "3"} <= set(words)
    line = next(root.iter("{http://www.w3.org/2000/svg}polyline")).get("points")
    assert line == "70.0,216.7 290.0,30.0 510.0,123.3"  # y grows upwards


@pytest.mark.parametrize("low, high, expected", [
    (1, 4, [1, 2, 3, 4]), (12.8, 16.5, [13, 14, 15, 16]), (0, 0, [0]), (3.7, 3.7, [3.7]),
    (-0.3, 0.9, [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
    (0, 108800, [0, 20000, 40000, 60000, 80000, 100000])])
def test_ticks_are_round(low, high, expected):
    assert data.ticks(low, high) == pytest.approx(expected)


# ---------------------------------------------------------------------------------- command line


def test_number():
    assert data.number(int, 1)("3") == 3 and data.number(float, 0, 1)("0.5") == 0.5
    for kind, text in ((int, "2.5"), (int, "0"), (int, "x"), (float, "nan"), (float, "inf"), (float, "-1"),
                       (float, "")):
        with pytest.raises(data.argparse.ArgumentTypeError, match="number from"):
            data.number(kind, 1)(text)


SIZES = {"tiny": dict(image_size=None, patch_size=4, dim=64, depth=2, heads=4)}


def parse(argv):
    parser = data.Parser("A model.")
    data.common_options(parser, "vit", SIZES, steps=5, batch_size=64, lr=1e-3)
    return data.parse(parser, "vit", SIZES, argv)


def test_help_says_every_option_in_a_sentence(capsys):
    parser = data.Parser("A model.")
    data.common_options(parser, "vit", SIZES, steps=5, batch_size=64, lr=1e-3)
    for action in parser._actions[1:]:  # the first is --help
        sentence = action.help.split(" (default")[0]
        assert sentence[0].isupper() and sentence[-1] == "." and len(sentence.split()) > 4
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "their order. (default: 0)" in words and "None" not in words and "False" not in words


def test_sizes_and_stored_options(tmp_path, pictures):
    args = parse(["--dim", "128", "--out", str(tmp_path), "--data", str(pictures)])
    assert (args.dim, args.depth, args.patch_size, args.resume) == (128, 2, 4, False)
    own = data.open_data(args, torch.device("cpu"))
    assert args.class_names == own.class_names == ["0", "1", "2"] and args.image_size == 16
    assert args.mean == own.mean.tolist() and args.std == own.std.tolist()
    data.save_checkpoint(tmp_path / "checkpoint.pt", script="vit", args=vars(args))
    stored = data.load_checkpoint(tmp_path / "checkpoint.pt")["args"]
    assert stored["class_names"] == own.class_names and stored["std"] == args.std
    again = parse(["--out", str(tmp_path), "--resume", "--steps", "7"])
    assert (again.dim, again.data, again.steps, again.resume) == (128, str(pictures), 7, True)
    assert not hasattr(again, "class_names") and again.mean == args.mean
    loaded = parse(["--load", str(tmp_path / "checkpoint.pt")])
    assert (loaded.dim, loaded.data) == (64, str(pictures)) and loaded.std == args.std
    assert not hasattr(loaded, "class_names")
    # The file of another script (mae.py's, loaded by vit.py) tells its data set, too; a released file does not.
    data.save_checkpoint(tmp_path / "mae.pt", script="mae", args=vars(args) | {"seed": 7})
    other = parse(["--load", str(tmp_path / "mae.pt")])
    assert (other.data, other.seed, other.mean) == (str(pictures), 7, args.mean)
    torch.save({"args": {"seed": 9}, "model": {}}, tmp_path / "released.pt")
    assert parse(["--load", str(tmp_path / "released.pt")]).seed == 0
    for words in (["--dim", "30"], ["--heads", "3"], ["--out", ""], ["--size", "huge"], ["--steps", "0"]):
        with pytest.raises(data.UserError):
            parse(words)


def test_a_notebook_has_arguments_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    with pytest.raises(data.UserError):
        parse(None)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert parse(None).steps == 5
    monkeypatch.setattr(sys, "argv", ["vit.py", "--steps", "3"])  # by %run
    assert parse(None).steps == 3


def test_autocast_says_what_it_chose_at_each_run(capsys):
    x = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with data.autocast("cpu", precision):
            assert (x @ x).dtype == dtype
    data.autocast(torch.device("cpu"))
    *lines, auto = capsys.readouterr().out.splitlines()
    assert lines == ["precision: bfloat16 (--precision bf16)"] * 2 + ["precision: float32 (--precision fp32)"]
    assert auto in ("precision: bfloat16 (bfloat16 is faster on this cpu)",
                    "precision: float32 (bfloat16 is not known to be faster on this cpu)")


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_computes_in_bfloat16_only_with_amx(amx, monkeypatch):
    """Where it has AVX512-BF16 alone, bfloat16 is slower than float32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert data.autocast("cpu")._enabled == amx


def progress(steps=3, save_seconds=100.0, start=0, scores={}):
    return data.Progress(argparse.Namespace(steps=steps, save_seconds=save_seconds), start, scores)


def test_batch_loss_must_be_finite():
    for bad in (math.nan, math.inf):
        steps = progress()
        with pytest.raises(data.UserError, match=f"the loss is {bad}, .* at step 1"):
            for step in steps:
                steps.check(step, torch.tensor([1.0, bad, 1.0][step]), torch.ones(()))
        steps = progress()
        with pytest.raises(data.UserError, match=f"its gradient {bad} at step 2"):
            for step in steps:
                steps.check(step, torch.ones(()), torch.tensor([1.0, 1.0, bad][step]))


def test_progress_keeps_the_scores_and_knows_when_to_save():
    steps = progress(steps=5, start=2, scores={"seconds": 100})
    due = []
    for step in steps:
        steps.check(step, torch.tensor(step / 2), torch.ones(()))
        due.append((step, steps.due(step)))
    assert due == [(2, False), (3, False), (4, True)]
    scores = steps.scores(images_seen=320)
    assert scores["loss"] == 2 and scores["images_seen"] == 320 and 100 <= scores["seconds"] < 110
    steps = progress(save_seconds=0.0)
    assert all(steps.due(step) for step in steps)


def test_ctrl_c_ends_after_a_saved_step():
    before = signal.getsignal(signal.SIGINT)
    steps = progress()
    saved = []
    with pytest.raises(KeyboardInterrupt):
        for step in steps:
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            if steps.due(step):
                saved.append(step)
    assert saved == [1] and signal.getsignal(signal.SIGINT) is before

    steps = progress()
    with pytest.raises(KeyboardInterrupt):  # after the last checkpoint: the scores do not begin
        for step in steps:
            if steps.due(step) and step == 2:
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_in_a_thread():
    """As in some notebooks: there Python refuses a handler of Ctrl-C."""
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(progress()))
    thread.start()
    thread.join()
    assert seen == [0, 1, 2]


def test_the_sheet(script, tmp_path, pictures):
    done = script("data.py", "--out", tmp_path)
    assert done.returncode == 0 and "20000 training images, 2000 test images, 1000 images of unseen" in done.stdout
    sheet = read_png(tmp_path / "sheet.png")
    shapes = data.load("shapes")
    assert (sheet[:, 2:98:3, 100:196:3] == shapes.train_images[1]).all()
    assert f"row 1, column 2: {shapes.train_captions[1]}\n" in done.stdout
    assert script("data.py", "--out", tmp_path, "--data", pictures).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_print_a_letter(script, tmp_path, encoding):
    np.savez(tmp_path / "own.npz", images=IMAGES, labels=LABELS, class_names=["кошка"])
    done = script("data.py", "--out", tmp_path, "--data", tmp_path / "own.npz",
                  env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and "1 classes: ?????" in done.stdout
    done = script("data.py", "--data", "кошка.npz", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ?????.npz")


class InvalidCxxCompiler(RuntimeError):
    """As PyTorch's own, whose module takes seconds to import."""


InvalidCxxCompiler.__module__ = "torch._inductor.exc"


class BackendCompilerFailed(RuntimeError):
    pass


@pytest.mark.parametrize("error, status, words", [
    (data.UserError("no such thing"), 2, "error: no such thing"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to reserve"), 2, "error: out of memory"),
    (RuntimeError("CUDA out of memory. Tried to reserve 2 GiB"), 2, "error: out of memory"),
    (MemoryError("Unable to allocate 8.88 PiB for an array"), 2, "error: out of memory"),  # numpy's
    (InvalidCxxCompiler("No working C++ compiler found"), 2, "error: torch.compile found no working C++ compiler"),
    (BackendCompilerFailed("#include <memory>\nerror"), 2, "error: torch.compile found no working C++ compiler"),
])
def test_run_turns_errors_into_one_line(capsys, error, status, words):
    def train(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        data.run(train, list)
    message = capsys.readouterr().err
    assert stop.value.code == status and message.startswith(words) and message.count("\n") == 1


def test_an_older_python_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "version", "3.9.18 (main)")
    with pytest.raises(SystemExit):
        data.run(None, None)
    assert capsys.readouterr().err == "error: these scripts need Python 3.10 or newer, and this is 3.9.18\n"


def test_another_file_of_the_name_data_is_named(tmp_path):
    """A notebook in a folder that holds the student's own data.py: the error says which file was found."""
    (tmp_path / "data.py").write_text("mine = 1\n", encoding="utf8")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import vit"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf8", timeout=600)
    assert f"from 'data' ({tmp_path / 'data.py'})" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [["--data", "imagenet"], ["--data", "none.npz"], ["--seed", "-1"], ["--sed", "1"]])
def test_mistakes_end_in_one_line(script, words):
    done = script("data.py", *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["shapes do not match", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_keep_their_traceback(words):
    def train(args):
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        data.run(train, list)


# ------------------------------------------------------------------------------------- position tables


def test_resize_table():
    table = torch.randn(1, 1 + 16, 12)
    assert data.resize_table(table, 4, extra=1) is table
    bigger = data.resize_table(table, 8, extra=1)
    assert bigger.shape == (1, 65, 12) and (bigger[:, 0] == table[:, 0]).all()
    assert data.resize_table(table, 3, 5, extra=1).shape == (1, 1 + 15, 12)  # rows and columns
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # the column number
    wide = data.resize_table(ramp, 8, antialias=False).reshape(8, 8)
    assert (wide == wide[0]).all() and (wide.diff(dim=1) > 0).all() and abs(wide.mean() - 1.5) < 1e-5
