import importlib
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data

ROOT = pathlib.Path(__file__).parents[1]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # a test machine has at least two cores


def block_shapes(name, D):
    """Names and shapes of a Transformer layer of width D, as timm and the files of MAE and I-JEPA have them."""
    shapes = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
              "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
              "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D),
              "mlp.fc2.bias": (D,)}
    return {f"{name}.{k}": v for k, v in shapes.items()}


def transformer(s, x, prefix, heads):
    """The layers of a state dict s whose names begin with prefix, on one sequence x (N, D)."""

    def linear(x, name):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)

    for i in range(sum(k.startswith(prefix) and k.endswith("norm1.bias") for k in s)):
        b = f"{prefix}{i}."
        q, k, v = linear(norm(x, b + "norm1"), b + "attn.qkv").reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1), b + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2")
    return x


def plain(x):
    """Nested tensors and values -> bytes and texts that == compares bit for bit; models, data sets: what they hold."""
    if torch.is_tensor(x):
        return x.dtype, tuple(x.shape), x.detach().contiguous().numpy().tobytes()
    if isinstance(x, torch.nn.Module):
        more = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in x.modules()]
        return plain([dict(x.state_dict()), more])
    if isinstance(x, data.Data):
        return plain({k: v for k, v in vars(x).items() if k != "root"})
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else repr(getattr(x, "merges", x))


def difference(a, b):
    """In what the folders of two finished runs differ, seconds aside."""
    one = data.load_checkpoint(a / "checkpoint.pt")
    two = data.load_checkpoint(b / "checkpoint.pt")
    for checkpoint in (one, two):
        checkpoint["scores"] = {k: v for k, v in checkpoint["scores"].items() if not k.endswith("seconds")}
    parts = [part for part in ("model", "ema", "optimizer", "step", "scores") if plain(one[part]) != plain(two[part])]
    return parts + [log.name for log in a.glob("*.csv") if log.read_bytes() != (b / log.name).read_bytes()]


def loss_falls(folder):
    """Whether the last logged loss of a run is below the first."""
    losses = data.read_log(folder / "log.csv")["loss"]
    return losses[-1] < losses[0]


def mark(path):
    """Writes 1e6 seconds into a checkpoint's scores: only a run that goes on from it has more."""
    checkpoint = data.load_checkpoint(path)
    checkpoint["scores"]["seconds"] = 1e6
    data.save_checkpoint(path, **checkpoint)


def read_png(path):
    """A decoder for what save_png writes, with every checksum verified."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    chunks = {}
    while at < len(raw):
        n, kind = struct.unpack(">I4s", raw[at:at + 8])
        chunks[kind] = raw[at + 8:at + 8 + n]
        assert zlib.crc32(kind + chunks[kind]) == struct.unpack(">I", raw[at + 8 + n:at + 12 + n])[0]
        at += 12 + n
    W, H, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, color, rest) == (8, 2, [0, 0, 0]) and list(chunks)[-1] == b"IEND"
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(H, 1 + 3 * W)
    assert (lines[:, 0] == 0).all()
    return torch.from_numpy(lines[:, 1:].reshape(H, W, 3).copy()).permute(2, 0, 1)


def brightness(path, n, seed=0):
    """Writes an .npz of n images, 16 x 16, in 3 classes that differ in brightness."""
    labels = np.arange(n) % 3
    images = np.random.default_rng(seed).integers(0, 60, (n, 16, 16, 3)) + 80 * labels[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A small .npz of 120 images: scripts run on it in seconds."""
    path = tmp_path_factory.mktemp("pictures") / "own.npz"
    brightness(path, 120)
    return path


@pytest.fixture
def script(tmp_path):
    """Runs a script of the repository as a user would; returns the finished process."""

    def call(*words, **more):
        command = [sys.executable, *(str(word) for word in words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf8", timeout=600, **more)

    return call


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a script's main in this process; returns the one line with which it refuses its arguments."""
    monkeypatch.chdir(ROOT)

    def check(module, *words):
        with pytest.raises(SystemExit) as stop:
            data.run(module.train, lambda: module.parse_args([str(word) for word in words]))
        lines = capsys.readouterr().err.splitlines()  # the progress bar's are left out
        lines = [line for line in lines if line and "it/s" not in line and "s/it" not in line]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return check


@pytest.fixture
def same_run(tmp_path):
    """Trains once whole, and once killed, interrupted and resumed: same weights, logs and scores, bit for bit."""
    if os.name == "nt":
        pytest.skip("Windows has no SIGKILL, and no SIGINT for another process")

    def check(*words):
        module = importlib.import_module(words[0].removesuffix(".py"))
        words = [*map(str, words[1:]), "--precision", "fp32"]
        module.train(module.parse_args([*words, "--out", str(tmp_path / "whole")]))
        path = tmp_path / "cut" / "checkpoint.pt"
        command = [sys.executable, f"{module.__name__}.py", *words, "--out", str(path.parent), "--resume"]
        for how in (signal.SIGKILL, signal.SIGINT):
            run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf8",
                                   env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
            before = path.stat().st_mtime_ns if path.exists() else 0
            while run.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
                time.sleep(0.01)
            run.send_signal(how)
            error = run.communicate(timeout=600)[1]
            if how == signal.SIGINT and run.returncode:
                assert run.returncode == 130 and "Traceback" not in error and "interrupted" in error
        mark(path)  # a run that began anew would give the same bits, too
        module.train(module.parse_args(["--out", str(path.parent), "--resume"]))  # with the stored options
        assert not difference(tmp_path / "whole", path.parent)
        assert data.load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["scores"]["seconds"] > 0
        assert data.load_checkpoint(path)["scores"]["seconds"] > 1e6

    return check
