"""What the six scripts promise, tried over and over: how many tries, and how many of them they survived. By hand.

    python tests/proof.py                          # all five sections, about 20 minutes of one core
    python tests/proof.py kills --kills 5          # killed at random moments, resumed: the same run, bit for bit
    python tests/proof.py files --flips 2          # damaged, hostile and mistaken files: one line, or read right
    python tests/proof.py options --combinations 9 # wrong values: one line; right ones: two steps, or one line
    python tests/proof.py faults                   # loss not finite, disk full, network bad: the last checkpoint stays
    python tests/proof.py memory --steps 2000      # resident memory after 1,000 steps and at the end
    python tests/proof.py files options --scripts mae vit --seed 1

Each failure is one line, then comes a table. All is written to a temporary folder. Exit status: 1 if anything failed.
Not tried: CUDA, MPS, --compile, Ctrl-C while Python imports, power loss (nothing is fsynced), two writers on one log.
"""

import argparse
import contextlib
import gzip
import importlib
import inspect
import io
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from unittest import mock

os.environ |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}  # stderr: one line or none
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np  # noqa: E402
import torch  # noqa: E402

import clip  # noqa: E402
import data  # noqa: E402
import igpt  # noqa: E402
import jepa  # noqa: E402
import mae  # noqa: E402
import repa  # noqa: E402
import vit  # noqa: E402
from conftest import brightness, difference, plain  # noqa: E402

MODULES = dict(vit=vit, mae=mae, jepa=jepa, repa=repa, clip=clip, igpt=igpt)
SMALL = "--dim 16 --depth 2 --heads 2 --batch-size 16 --warmup 2 --precision fp32 --device cpu --save-seconds 0"
MORE = {
    "vit": "--augment strong",
    "mae": "--decoder-dim 8 --decoder-depth 1 --decoder-heads 2",
    "jepa": "--predictor-dim 8 --predictor-depth 1 --masking random",
    "repa": "--align-depth 1 --projector-dim 16 --teacher-steps 2 --samples 8 --sample-steps 2 --image-size 16",
    "clip": "--text-dim 16 --text-depth 1 --text-heads 2 --embed-dim 16",
    "igpt": "--image-size 8 --colors 12",
}

# ------------------------------------------------------------------------------------- tries and their count


class Tally:
    """The rows of the table: what was tried -> how often, how often it was survived, and in how many seconds."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.rows = {}
        self.last = time.time()  # when the last try ended

    def add(self, row, survived):
        now = time.time()
        counts = self.rows.setdefault(row, [0, 0, 0.0])
        counts[0] += 1
        counts[1] += int(survived)
        counts[2] += now - self.last
        self.last = now

    def print(self, title):
        """-> whether all was survived."""
        total = [sum(column) for column in zip(*self.rows.values())]
        print(f"\n{title:<86}{'tried':>9}{'survived':>10}{'seconds':>9}")
        for row, (tried, survived, seconds) in [*self.rows.items(), ("in all", total)]:
            print(f"  {row:<84}{tried:>9}{survived:>10}{seconds:>9.1f}", flush=True)
        return total[0] == total[1]


TALLY = Tally()


def count(row, survived, detail=""):
    TALLY.add(row, bool(survived))
    if not survived:
        print(f"FAILED {row}: {' '.join(str(detail).split())[:900]}", flush=True)


class Late(BaseException):
    pass


def attempt(call, limit=60):
    """-> ("refused", the line), ("read", the result) or ("failed", why): all that a caller can see."""

    def late(*_):
        raise Late(f"more than {limit} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return "read", call()
    except data.UserError as error:
        return "failed" if "\n" in str(error) else "refused", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too, is nothing that a loader may raise
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def main_of(name, *words):
    """A script's main in this process, as attempt."""

    def call():
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                data.run(MODULES[name].train, lambda: MODULES[name].parse_args([str(word) for word in words]))
            except SystemExit as stop:
                text = stderr.getvalue()
                if stop.code == 2 and text.startswith("error: ") and text.count("\n") == 1:
                    raise data.UserError(text[:-1]) from None
                raise RuntimeError(f"exit {stop.code}: {text}") from None

    return attempt(call, limit=180)


def small(name, folder, *words):
    """The arguments of a run that takes a second."""
    return [*SMALL.split(), *MORE[name].split(), "--data", folder / "own.npz", "--data-dir", folder / name, *words]


def start(name, *words, **more):
    """A script in a process of its own."""
    command = [sys.executable, f"{name}.py", *(str(word) for word in words)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def finish(run):
    """Waits for a process; -> what it wrote to stderr."""
    return run.communicate()[1]


def short_runs(folder):
    """The folder of a short run of each script, trained once."""
    for name in MODULES:
        out = folder / "own" / name
        if not out.exists():
            count("a short run", *was_read(main_of(name, *small(name, folder, "--steps", 2, "--out", out))))
    return folder / "own"


def was_read(found):
    """What attempt returns -> the arguments of `count`."""
    kind, result = found
    return kind == "read", result


# ---------------------------------------------------------------------------------------------------- kills


def changed(path):
    """When a file was last changed, 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def writes(folder):
    """Whether a file is being written at this moment."""
    return any(".part-" in file for file in os.listdir(folder))


def kills(args, folder, rng, steps=150):
    for name in args.scripts:
        words = small(name, folder, "--steps", steps)
        whole = folder / name / "whole"
        began = time.time()
        run = start(name, *words, "--out", whole)
        run.stdout.readline()  # "precision: ...": all is imported
        imported = time.time() - began
        error = finish(run)
        total = time.time() - began
        count(f"{name}: whole run", run.returncode == 0, error)
        training = data.load_checkpoint(whole / "checkpoint.pt")["scores"]["seconds"]
        kill(name, words, folder, rng, args.kills, steps, training, scoring=total - training)
        for _ in range(args.kills // 4):
            interrupt(name, words, folder / name / "stopped", after=rng.uniform(0, total - imported))
        stopped = folder / name / "stopped"
        error = finish(start(name, *words, "--out", stopped, "--resume"))
        found = attempt(lambda: difference(whole, stopped))
        count(f"{name}: after Ctrl-C the same run, bit for bit", found == ("read", []), (found, error))
        two_runs(name, words, folder / name / "both", steps)


def kill(name, words, folder, rng, kills, steps, training, scoring):
    """Kills a run again and again. training, scoring: how many seconds these parts of a whole run take."""
    whole = folder / name / "whole"
    cut = folder / name / "cut"
    path = cut / "checkpoint.pt"
    last = 0  # the step of the last checkpoint
    in_scoring = 0  # how many kills came after the training
    for i in range(kills):  # each life saves at least once, then goes on for a random time
        before = changed(path)
        run = start(name, *words, "--out", cut, "--resume")
        while last < steps and run.poll() is None and changed(path) == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 2 * training / kills if last < steps else scoring))
        if i % 2:  # every second one dies amid a write, if one comes soon
            limit = time.time() + 0.3
            while time.time() < limit and not writes(cut):
                pass
        run.kill()
        run.communicate()
        kind, found = attempt(lambda: data.load_checkpoint(path, name)["step"])
        survived = kind == "read" and (found > last or last == steps)
        count(f"{name}: killed, and the checkpoint is whole and further on", survived, found)
        if last == steps:
            in_scoring += 1
        if kind == "read":
            last = found
    halves = len(list(cut.glob("*.part-*")))
    error = finish(start(name, "--out", cut, "--resume"))  # with the stored options
    found = attempt(lambda: difference(whole, cut))
    count(f"{name}: then the same run, bit for bit ({in_scoring} kills in scoring, {halves} amid a write)",
          found == ("read", []), (found, error))


def interrupt(name, words, out, after):
    """Ctrl-C `after` seconds."""
    run = start(name, *words, "--out", out, "--resume")
    run.stdout.readline()
    time.sleep(after)
    run.send_signal(signal.SIGINT)
    output, error = run.communicate()
    path = out / "checkpoint.pt"
    kind, _ = attempt(lambda: not path.exists() or data.load_checkpoint(path))
    one_line = error.startswith("interrupted; ") and error.count("\n") == 1 and run.returncode == 130
    over = "\nwrote " in output and not error  # it came when all was done
    count(f"{name}: Ctrl-C", kind == "read" and (one_line or over), (run.returncode, error, kind))


def two_runs(name, words, out, steps):
    """Two runs at once that write into one folder."""
    pair = [start(name, *words, "--out", out) for _ in range(2)]
    errors = [finish(run) for run in pair]
    found = attempt(lambda: data.load_checkpoint(out / "checkpoint.pt")["step"])
    commas = {line.count(",") for line in (out / "log.csv").read_text().splitlines()}
    ended = [run.returncode for run in pair] == [0, 0]
    count(f"{name}: two runs in one folder", ended and len(commas) == 1 and found == ("read", steps), (errors, found))


# ---------------------------------------------------------------------------------------------------- files


class Bomb:
    """What runs when a pickle with it is loaded carelessly: it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def bombs(marker):
    """File contents with code in them, in each container that a reader may meet."""
    bomb = Bomb(marker)
    out = [io.BytesIO() for _ in range(5)]
    torch.save({"model": bomb, "script": "vit"}, out[0])
    torch.save({"model": bomb}, out[1], _use_new_zipfile_serialization=False)
    np.savez(out[2], images=np.array([bomb], object), labels=np.zeros(20, int))
    np.save(out[3], np.array([bomb], object), allow_pickle=True)
    with data.zipfile.ZipFile(out[4], "w") as file:  # as a TorchScript archive
        file.writestr("archive/data.pkl", pickle.dumps(bomb, 2))
        file.writestr("archive/constants.pkl", pickle.dumps(bomb, 2))
        file.writestr("archive/version", b"3")
    return [pickle.dumps(bomb, 2), gzip.compress(pickle.dumps(bomb, 0)), *(file.getvalue() for file in out)]


def damages(body, rng, flips):
    """-> (row of the table, damaged content) of a file's content."""
    n = len(body)
    for cut in sorted({1, 4, 30, 100, n // 10, n // 2, n - n // 10, n - 22, n - 1, rng.randrange(n)}):
        if 0 <= cut < n:
            yield "cut short", body[:cut]
    head = (0, min(n, 300))
    directory = (max(0, n - 2000), n)  # a zip's
    for low, high in (head, (0, n), directory):
        for _ in range(flips):
            i = rng.randrange(low, high)
            flipped = bytes([body[i] ^ 1 << rng.randrange(8)])
            yield "a bit flipped", body[:i] + flipped + body[i + 1:]
    for _ in range(2):
        i = rng.randrange(n)
        yield "up to 99 bytes overwritten", body[:i] + rng.randbytes(min(99, n - i)) + body[i + 99:]
    yield "99 bytes more", body + rng.randbytes(99)


def arrays(content):
    """-> (dict, key, array) of all arrays in nested dicts that can be cut in half."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from arrays(value)
        elif getattr(value, "ndim", 0) and max(value.shape) > 1:
            yield content, key, value


def other_size(path, rng):
    """The content of a file with one array cut in half, and that half."""
    if path.suffix == ".npz":
        content = dict(np.load(path))
    elif path.suffix == ".npy":
        content = {"": np.load(path)}
    else:
        content = torch.load(path, weights_only=False)
    owner, key, value = rng.choice(list(arrays(content)))
    side = rng.choice([i for i, n in enumerate(value.shape) if n > 1])
    index = [slice(None)] * value.ndim
    index[side] = slice(value.shape[side] // 2)
    owner[key] = value[tuple(index)]
    return content, owner[key]


def write(path, content):
    """Bytes, or what np.savez, np.save or torch.save writes, in the place of whatever was there; None: nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if content is None:
        return
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".npy":
        np.save(path, content[""])
    else:
        torch.save(content, path)


READERS = {  # names of files -> who reads them, its own reader first
    "timm.pth legacy.pth dino.pth vit.pt teacher.pt google.npz": "ViT Teacher",
    "mae*": "MAE ViT Teacher",
    "ijepa.pth.tar jepa.pt ijepa?hf.bin": "IJEPA ViT Teacher",
    "sit.pt repa*": "SiT",
    "openai* archive.pt": "CLIP",
    "clip.pt": "CLIP Tokenizer",
    "igpt*": "ImageGPT",
    "*.gz": "Tokenizer",
    "palette.npy": "palette",
    "own.npz": "npz",
    "cnn-*": "cnn",
    "cifar*/data_batch_1.bin cifar*/batches.meta.txt": "cifar",
}


def good_files(good, own):
    """{path: names of its readers}: each kind of file that the scripts read, small and with 2 heads."""
    test = {name: importlib.import_module(f"test_{name}") for name in (*MODULES, "data")}
    state = test["vit"].random_state(dim=32)
    ijepa = test["jepa"].random_file(dim=32, width=16)
    openai = test["clip"].random_file("vit")
    made = {
        "timm.pth": state,
        "legacy.pth": state,
        "mae full.pth": test["mae"].random_file(dim=32, decoder=16),
        "mae encoder.pth": test["mae"].random_file(dim=32, decoder_depth=0),
        "ijepa.pth.tar": ijepa,
        "ijepa hf.bin": test["jepa"].hugging_face(ijepa["encoder"], "ijepa."),
        "igpt hf.bin": test["igpt"].hf_file(dim=32),
        "sit.pt": test["repa"].random_file(dim=32, sigma=True, Z=()),
        "repa last.pt": {"ema": test["repa"].random_file(dim=32), "args": argparse.Namespace(resolution=256)},
        "openai vit.pt": openai,
        "openai resnet.pt": test["clip"].random_file("resnet"),
    }
    for name, content in made.items():
        torch.save(content, good / name, _use_new_zipfile_serialization=name != "legacy.pth")
    halves = {name: tensor.half() for name, tensor in openai.items()}
    torch.jit.save(torch.jit.script(test["clip"].Tree(halves)), good / "archive.pt")
    test["repa"].random_teacher(good, dim=32)  # dino.pth
    np.savez(good / "google.npz", **test["vit"].google_arrays(state, heads=2))
    np.save(good / "palette.npy", np.linspace(-1, 1, 60).reshape(20, 3))
    pairs = "".join(f"{a} {b}\n" for a in "abcdefgh" for b in "ijklmnop")
    (good / "vocabulary.txt.gz").write_bytes(gzip.compress(b"header\n" + pairs.encode()))
    for name in MODULES:
        shutil.copy(own / name / "checkpoint.pt", good / f"{name}.pt")
    shutil.copy(own / "repa" / "teacher.pt", good)
    shutil.copy(good.parent / "own.npz", good)
    test["data"].cifar_folder(good)
    data.train_cnn(data.load(str(good / "own.npz"), good), steps=2)

    kinds = {}
    for names, who in READERS.items():
        for name in names.split():
            for path in good.glob(name):
                kinds[path] = who
    return kinds


def readers(images):
    """{name: a function that reads the file at a path}. images: a data set."""

    def cnn(path):
        images.root = path.parent
        return data.train_cnn(images, steps=2)

    return {
        "ViT": lambda path: vit.ViT.from_pretrained(path, heads=2),
        "MAE": lambda path: mae.MAE.from_pretrained(path, heads=2, decoder_heads=2),
        "IJEPA": lambda path: jepa.IJEPA.from_pretrained(path, heads=2, predictor_heads=2),
        "SiT": lambda path: repa.SiT.from_pretrained(path, heads=2),
        "Teacher": lambda path: repa.Teacher.from_pretrained(path, heads=2),
        "CLIP": lambda path: clip.CLIP.from_pretrained(path, heads=2, text_heads=2),
        "ImageGPT": lambda path: igpt.ImageGPT.from_pretrained(path, heads=2),
        "Tokenizer": clip.Tokenizer.from_file,
        "palette": lambda path: data.read_palette(path, 20),
        "npz": lambda path: data.load(str(path)),
        "cifar": lambda path: data.load("cifar10", path.parents[1]),
        "cnn": cnn,
    }


def files(args, folder, rng):
    archive, md5, where, label_bytes, parts, names = data.CIFAR["cifar10"]
    few = (archive, md5, where, label_bytes, dict.fromkeys(parts, 20), names)  # 20 images in a file
    with mock.patch.dict(data.CIFAR, cifar10=few):
        bad_files(args, folder, rng)
    bad_logs(args, folder)


def bad_files(args, folder, rng):
    good = folder / "good"
    bad = folder / "bad"
    marker = folder / "bomb"  # appears if code in a file was run
    own = short_runs(folder)
    read = readers(data.load(str(folder / "own.npz")))

    def judge(row, path, reader, right):
        """Counts a read as survived if it is refused in one line, or if right(what was read)."""
        torch.manual_seed(0)  # an encoder-only file leaves the decoder as it was drawn
        kind, found = attempt(lambda: read[reader](path))
        survived = kind == "refused" or (kind == "read" and right(found))
        shown = "" if kind == "read" else found
        count(row, survived and not marker.exists(),
              f"{reader} of {path.name}: {kind} {shown} bomb: {marker.exists()}")
        marker.unlink(missing_ok=True)

    def never(found):
        return False

    good.mkdir()
    kinds = good_files(good, own)
    expected = {}
    for path, who in kinds.items():
        for reader in who.split():
            torch.manual_seed(0)
            kind, found = attempt(lambda: read[reader](path))
            count("whole", kind == "read", f"{reader} of {path.name}: {kind} {found}")
            if kind == "read":
                expected[path, reader] = plain(found)

    shutil.copytree(good, bad)
    for path, who in kinds.items():
        place = bad / path.relative_to(good)
        body = path.read_bytes()
        first = who.split()[0]
        has_checksum = who != "cifar" and path.name not in ("legacy.pth", "palette.npy")

        def is_same(found):
            return plain(found) == expected.get((path, reader))

        for row, content in damages(body, rng, args.flips):
            reader = rng.choice(who.split())
            write(place, content)
            if has_checksum or (row == "cut short" and path.suffix != ".txt"):
                judge(row, place, reader, is_same)
            else:
                row = f"{row} (legacy .pth, .npy, CIFAR: only crashes count)"
                judge(row, place, reader, lambda found: True)
        for content in (b"", b"hello", b"<!DOCTYPE html>\n<html>404</html>", b"PK\x03\x04" + bytes(99)):
            write(place, content)
            judge("empty, a text, a web page", place, first, never)
        for content in bombs(marker):
            write(place, content)
            judge("code in it", place, first, never)
        write(place, None)
        judge("missing", place, first, lambda found: who == "cnn")  # which is then trained anew
        write(place, None)
        place.mkdir()
        judge("a folder", place, first, never)
        if path.name != "archive.pt" and who != "cifar" and path.suffix != ".gz":
            for _ in range(args.flips):
                content, part = other_size(path, rng)
                write(place, content)
                reader = rng.choice(who.split())

                def fits(found):
                    """The array is not used, or the model has its size."""
                    state = found.state_dict() if hasattr(found, "state_dict") else {}
                    return is_same(found) or part.shape in [tensor.shape for tensor in state.values()]

                judge("an array of another size", place, reader, fits)
        write(place, body)
        for reader in read:
            if reader not in ("cnn", "cifar", *who.split()):
                judge("of another model", path, reader, never)


def bad_logs(args, folder):
    own = short_runs(folder)
    for name in args.scripts:
        out = folder / "bad" / name
        for log in (own / name).glob("*.csv"):
            body = log.read_bytes()
            for content in (b"", body[:-9], b"\xff" + body, b"nonsense\n" * 9, None):
                shutil.copytree(own / name, out, dirs_exist_ok=True)
                write(out / log.name, content)
                for steps in (2, 3):  # it ended, and goes on
                    kind, why = main_of(name, "--resume", "--steps", steps, "--out", out)
                    count("log damaged or missing, then --resume", kind != "failed", f"{name} {content}: {why}")


# -------------------------------------------------------------------------------------------------- options


def recorded(name):
    """{option: (default, keywords of add_argument)} of a script."""
    found = {}
    add = data.Parser.add

    def record(self, option, default, help, **more):
        found[option] = (default, more)
        add(self, option, default, help, **more)

    with mock.patch.object(data.Parser, "add", record):
        MODULES[name].parse_args([])
    return found


def limits(more):
    """What was given to data.number: its kind, low and high."""
    return inspect.getclosurevars(more["type"]).nonlocals


def wrong_values(option, more, folder):
    """-> lists of words that no script should take after the option."""
    if "type" in more:
        low = limits(more)["low"]
        high = limits(more)["high"]
        wrong = ["", "x", "nan", "inf", "-inf", "1e999", "1,5", "0x10", low - 1, 2 * high + 1]
        if limits(more)["kind"] is int:
            wrong.append("1.5")
        return [[], *([value] * more.get("nargs", 1) for value in wrong)]
    if "action" in more:
        return [["=1"], ["=yes"]]
    if "choices" in more:
        return [["nonsense"], [""], ["TINY"], []]
    below = folder / "own.npz" / "below"
    if option in ("--out", "--data-dir"):  # nearly every other text is a folder
        return [[below], []]
    return [[below], [], ["nonsense"], [""], [folder]]


def right_value(name, option, more, folder, rng):
    """-> the words of a random value that is right by itself."""
    own = folder / "own" / name / "checkpoint.pt"
    encoders = [folder / "own" / script / "checkpoint.pt" for script in ("vit", "mae", "jepa")]
    fixed = {
        "--steps": [2],
        "--dim": [4, 8, 12, 16, 16, 32],
        "--depth": [1, 2, 3],
        "--heads": [1, 2, 4],
        "--patch-size": [1] if name == "igpt" else [1, 2, 4],
        "--image-size": [4, 8, 16, 16, 12],
        "--batch-size": [1, 3, 16, 64],
        "--seed": [0, 10**9],
        "--lr": [0, 1e-3, 0.1, 100],
        "--teacher-steps": [1, 2],
        "--sample-steps": [1, 2, 5],
        "--device": ["cpu", "auto"],
        "--data": ["shapes", folder / "own.npz", folder / "odd.npz"],
        "--data-dir": [folder / "cache"],
        "--out": [folder / "out"],
        "--load": [own],
        "--init": encoders,
        "--teacher": ["random", *encoders],
        "--finetune": [own],
        "--palette": [folder / "good.npy"],
        "--tokenizer": [own],
        "--compare": [own] if name == "repa" else [own.parent],
    }
    for end in ("dim", "depth", "heads"):
        if option.endswith(f"-{end}"):  # --decoder-dim as --dim
            option = f"--{end}"
    if option in fixed:
        return [rng.choice(fixed[option])]
    if "choices" in more:
        return [rng.choice(list(more["choices"]))]
    low = limits(more)["low"]
    high = limits(more)["high"]
    if limits(more)["kind"] is int:
        near = [low, low + 1, low + 5]
    else:
        near = [low, rng.uniform(low, min(high, 1)), min(high, 100.0)]
    return [min(rng.choice(near), high) for _ in range(more.get("nargs", 1))]


def options(args, folder, rng):
    short_runs(folder)
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8)
    captions = ["", "<&>", "\u65e5\u672c " * 200, "left", "x\ny"] * 4
    np.savez(folder / "odd.npz", images=images, labels=np.zeros(20, np.int16), captions=captions)
    np.save(folder / "good.npy", np.linspace(-1, 1, 36).reshape(12, 3))
    draw = data.shapes
    with mock.patch.object(data, "shapes", lambda seed: draw(seed, counts=(60, 20, 10))):
        for name in args.scripts:
            found = recorded(name)
            for option, (_, more) in found.items():
                for values in wrong_values(option, more, folder):
                    try_wrong(name, option, values, more, folder)
            for _ in range(args.combinations):
                try_combination(name, found, folder, rng)


def try_wrong(name, option, values, more, folder):
    words = [f"{option}{values[0]}"] if "action" in more else [option, *values]
    if option == "--data-dir":
        words += ["--data", "cifar10"]  # or it would not be used
    kind, why = main_of(name, *small(name, folder, "--steps", 2, "--out", folder / "out"), *words)
    value = str(values[0]) if values else ""
    is_named = option in why or (value != "" and value in why)  # of a file, its name is enough
    count(f"{name}: a wrong value", kind == "refused" and is_named, f"{words}: {kind} {why}")


def try_combination(name, found, folder, rng):
    """found: {option: (default, keywords of add_argument)}."""
    always = {"--steps", "--data", "--data-dir", "--out", "--image-size", "--teacher-steps", "--sample-steps"}
    for size in MODULES[name].SIZES.values():  # or the model would be as large as the paper's
        always |= {f"--{key.replace('_', '-')}" for key in size}
    words = []
    for option, (default, more) in found.items():
        is_flag = "action" in more
        likely = 0.15 if default in (None, []) or is_flag else 0.5
        if option != "--compile" and (option in always or rng.random() < likely):
            words.append(option)
            if not is_flag:
                words += right_value(name, option, more, folder, rng)
    shutil.rmtree(folder / "out", ignore_errors=True)
    if "--resume" in words:
        shutil.copytree(folder / "own" / name, folder / "out")
    kind, why = main_of(name, *words)
    row = f"{name}: a combination of right values"
    if kind == "refused":
        row += ", refused in one line"
    count(row, kind != "failed", f"{why}: python {name}.py {' '.join(str(word) for word in words)}")


# --------------------------------------------------------------------------------------------------- faults


def faults(args, folder, rng):
    short_runs(folder)
    for name in args.scripts:
        for bad in (float("nan"), float("inf"), -float("inf")):
            bad_loss(name, bad, folder)
        full_disk(name, folder)
        kind, why = main_of(name, *small(name, folder, "--steps", 5, "--out", folder / "own.npz" / "x"))
        count(f"{name}: --out below a file", kind == "refused" and "own.npz/x" in why, why)
    bad_network(folder / "net")


LOSSES = {  # of each script: the class and the method that computes the loss
    "vit": (vit.ViT, "loss"),
    "mae": (mae.MAE, "forward"),
    "jepa": (jepa.IJEPA, "loss"),
    "repa": (repa.SiT, "loss"),
    "clip": (clip.CLIP, "loss"),
    "igpt": (igpt.ImageGPT, "loss"),
}


def bad_loss(name, bad, folder):
    """A run whose fourth loss, that of step 3, is not finite."""
    owner, method = LOSSES[name]
    original = getattr(owner, method)
    out = folder / "faults" / name / str(bad)
    trained = []  # an entry for each training step

    def spoiled(self, *args, **more):
        found = original(self, *args, **more)
        loss = found[0] if isinstance(found, tuple) else found
        if loss.requires_grad:  # scores and pictures compute it without a gradient
            trained.append(loss)
        if len(trained) == 4:
            loss = loss * bad
        return (loss, *found[1:]) if isinstance(found, tuple) else loss

    with mock.patch.object(owner, method, spoiled):
        kind, why = main_of(name, *small(name, folder, "--steps", 9, "--out", out))
    kept = data.load_checkpoint(out / "checkpoint.pt")
    is_finite = all(tensor.isfinite().all() for tensor in kept["model"].values())
    count(f"{name}: a loss that is not finite at step 3",
          kind == "refused" and "step 3" in why and kept["step"] == 3 and is_finite, why)


def full_disk(name, folder):
    """A short run goes on, but no file may become larger than a limit."""
    path = folder / "own" / name / "checkpoint.pt"
    body = path.read_bytes()
    for limit in (0, 20, len(body) // 2, len(body) - 1):
        run = start(name, "--resume", "--out", path.parent, "--steps", 5,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        error = finish(run)
        one_line = run.returncode == 2 and error.startswith("error: cannot write") and error.count("\n") == 1
        kind, step = attempt(lambda: data.load_checkpoint(path)["step"])
        is_kept = path.read_bytes() == body or (kind == "read" and step > 2)  # under the last limit, some of them fit
        is_clean = not list(path.parent.glob("*.part*"))
        count(f"{name}: the disk is full", one_line and kind == "read" and is_kept and is_clean,
              (run.returncode, error, kind, step))


def hostile_archives(test):
    """Archives with links, folders and devices in the place of files, or with paths that lead elsewhere."""
    found = [
        test.archive(**{"set/./a.bin": b"12345"}),
        test.archive(**{"../set/a.bin": b"12345", "set/b.txt": b""}),
        test.archive(**{"/set/a.bin": b"12345", "set/b.txt": b""}),
        test.archive(**{"set/a.bin": b"1234567", "set/b.txt": b""}),
    ]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        for to in ("/etc/passwd", "../../x", "b.txt"):
            link = test.link("set/a.bin", kind, to)
            found.append(test.archive(**{"set/a.bin": link, "set/b.txt": b"", "../evil": b"out"}))
    return found


def answers(test, good):
    """-> (row of the table, how the web server answers). good: a whole archive."""
    n = len(good)
    starts = [b"", good[:1], good[:n // 2]]
    for status in (403, 404, 500):
        yield "403, 404, 500", dict(status=status)
    for body in starts:
        yield "the server stalls", dict(body=body, length=n, stall=1)
    for body in [*starts, good[:-1]]:
        yield "cut off", dict(body=body, length=n)
    for length in (1, n - 1, 10**12, -5, "many"):
        yield "a wrong length", dict(length=length)
    for body in [*starts, b"<html>", good[:50] + b"!" + good[51:]]:
        yield "wrong bytes", dict(body=body)
    for body in hostile_archives(test):
        yield "a hostile archive", dict(body=body, trusted=True)  # its checksum is the right one


def bad_network(root):
    test = importlib.import_module("test_data")
    good = test.archive(**{"set/a.bin": b"12345", "set/b.txt": b"names", "../evil": b"out", "/tmp/evil": b"out"})
    opened = data.urllib.request.urlopen
    impatient = mock.patch.object(data.urllib.request, "urlopen", lambda url, timeout: opened(url, timeout=0.3))
    with test.web_server() as web, impatient:
        for row, answer in answers(test, good):
            web.answer.clear()
            web.answer.update({"body": good} | answer)
            expected = web.answer["body"] if "trusted" in answer else good
            md5 = data.hashlib.md5(expected).hexdigest()
            shutil.rmtree(root, ignore_errors=True)
            kind, why = attempt(lambda: data.download(web.url, md5, root, "set", {"a.bin": 5, "b.txt": None}))
            left = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
            whole = {"refused": {}, "read": {"a.bin": b"12345", "b.txt": b"names"}}
            count(f"download: {row}", left == whole.get(kind), f"{answer}: {kind} {why} {left}")


# --------------------------------------------------------------------------------------------------- memory


def resident(name, words):
    """-> {step: resident bytes when it is logged}, of a training in this fresh process."""
    torch.set_num_threads(1)
    sizes = {}
    log = data.log

    def watched(path, step, **numbers):
        log(path, step, **numbers)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        sizes[step] = pages * resource.getpagesize()

    with mock.patch.object(data, "log", watched), contextlib.redirect_stdout(io.StringIO()):
        MODULES[name].train(MODULES[name].parse_args(words))
    return sizes


def memory(args, folder, rng):
    for name in args.scripts:
        batch_size = 8 if name == "jepa" else 4  # centered targets need 8
        words = small(name, folder, "--depth", 1, "--batch-size", batch_size, "--save-seconds", 1,
                      "--steps", args.steps, "--out", folder / "memory" / name)
        if name == "repa":
            words += ["--align-depth", 1]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes = pool.apply(resident, (name, [str(word) for word in words]))
        first = sizes[1000]
        last = sizes[args.steps - 1]
        row = f"{name}: resident memory, {first / 2**20:.1f} MiB after 1,000 steps, {last / first - 1:+.2%}"
        count(f"{row} after {args.steps:,}", last < 1.05 * first, sizes)


def main():
    sections = dict(kills=kills, files=files, options=options, faults=faults, memory=memory)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(sections), help=", ".join(sections))
    parser.add_argument("--scripts", nargs="+", default=list(MODULES), choices=MODULES, help="all by default")
    numbers = {
        "kills": (20, "of a script; a quarter as many Ctrl-C"),
        "flips": (4, "in a part of a file"),
        "combinations": (200, "of a script's options"),
        "steps": (5000, "of the memory section, more than 1,000"),
        "seed": (0, "of all that is random"),
    }
    for name, (default, help) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} (default: {default})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    survived = []
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        folder = pathlib.Path(folder)
        brightness(folder / "own.npz", 40, args.seed)
        for name in args.sections:
            TALLY.clear()
            sections[name](args, folder, random.Random(args.seed))
            survived.append(TALLY.print(name))
    sys.exit(0 if all(survived) else 1)


if __name__ == "__main__":
    main()
