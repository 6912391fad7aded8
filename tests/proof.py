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

import clip, data, igpt, jepa, mae, repa, vit  # noqa: E401, E402
from conftest import brightness, difference, plain  # noqa: E402

MODULES = dict(vit=vit, mae=mae, jepa=jepa, repa=repa, clip=clip, igpt=igpt)
SMALL = "--dim 16 --depth 2 --heads 2 --batch-size 16 --warmup 2 --precision fp32 --device cpu --save-seconds 0"
MORE = {"vit": "--augment strong", "mae": "--decoder-dim 8 --decoder-depth 1 --decoder-heads 2",
        "jepa": "--predictor-dim 8 --predictor-depth 1 --min-keep 1 --masking random",
        "repa": "--align-depth 1 --projector-dim 16 --teacher-steps 2 --samples 8 --sample-steps 2 --image-size 16",
        "clip": "--text-dim 16 --text-depth 1 --text-heads 2 --embed-dim 16", "igpt": "--image-size 8 --colours 12"}
TALLY, CLOCK = {}, [0.0]  # row of the table -> tried, survived, seconds; the time of the last try


def count(row, ok, detail=""):
    tried, survived, seconds = TALLY.get(row, (0, 0, 0.0))
    now = time.time()
    TALLY[row], CLOCK[0] = (tried + 1, survived + bool(ok), seconds + now - CLOCK[0]), now
    if not ok:
        print(f"FAILED {row}: {' '.join(str(detail).split())[:900]}", flush=True)


class Late(BaseException):
    pass


def attempt(call, limit=20):
    """-> ("refused", the line), ("read", the result) or ("failed", why): all that a caller can see."""
    def late(*_):
        raise Late(f"more than {limit} s")

    signal.signal(signal.SIGALRM, late), signal.alarm(limit)
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
                known = stop.code == 2 and text.startswith("error: ") and text.count("\n") == 1
                raise data.UserError(text[:-1]) if known else RuntimeError(f"exit {stop.code}: {text}") from None

    return attempt(call, 60)


def small(name, folder, *words):
    return [*f"{SMALL} {MORE[name]}".split(), "--data", folder / "own.npz", "--data-dir", folder / name, *words]


def start(name, *words, **more):
    return subprocess.Popen([sys.executable, f"{name}.py", *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def runs(folder):
    """The folder of a short run of each script, trained once."""
    for name in MODULES:
        if not (folder / "own" / name).exists():
            count("a short run", *main_of(name, *small(name, folder, "--steps", 2, "--out", folder / "own" / name)))
    return folder / "own"


# -------------------------------------------------------------------------------------------------------- sections


def kills(o, folder, rng, steps=150):
    stamp = lambda path: path.stat().st_mtime_ns if path.exists() else 0
    for name in o.scripts:
        whole, cut, stopped, both = (folder / name / way for way in ("whole", "cut", "stopped", "both"))
        words = small(name, folder, "--steps", steps)
        began, run = time.time(), start(name, *words, "--out", whole)
        run.stdout.readline()  # "precision: ...": all is imported
        imported, error = time.time() - began, run.communicate()[1]
        count(f"{name}: whole run", run.returncode == 0, error)
        total, path, last, scoring = time.time() - began, cut / "checkpoint.pt", 0, 0
        training = data.load_checkpoint(whole / "checkpoint.pt")["scores"]["seconds"]
        for i in range(o.kills):  # each life saves at least once, then goes on for a random time
            before, run = stamp(path), start(name, *words, "--out", cut, "--resume")
            while last < steps and run.poll() is None and stamp(path) == before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 2 * training / o.kills if last < steps else total - training))
            limit = time.time() + 0.3 * (i % 2)  # every second one dies amid a write, if one comes soon
            while time.time() < limit and not any(".part-" in file for file in os.listdir(cut)):
                pass
            run.kill(), run.communicate()
            kind, found = attempt(lambda: data.load_checkpoint(path, name)["step"])
            count(f"{name}: killed, and the checkpoint is whole and further on",
                  kind == "read" and (found > last or last == steps), found)
            scoring, last = scoring + (last == steps), found if kind == "read" else last
        halves = len(list(cut.glob("*.part-*")))
        error = start(name, "--out", cut, "--resume").communicate()[1]  # with the stored options
        found = attempt(lambda: difference(whole, cut))
        count(f"{name}: then the same run, bit for bit ({scoring} kills in scoring, {halves} amid a write)",
              found == ("read", []), (found, error))
        for _ in range(o.kills // 4):
            run = start(name, *words, "--out", stopped, "--resume")
            run.stdout.readline()
            time.sleep(rng.uniform(0, total - imported))
            run.send_signal(signal.SIGINT)
            output, error = run.communicate()
            path = stopped / "checkpoint.pt"
            kept = attempt(lambda: not path.exists() or data.load_checkpoint(path))
            line = error.startswith("interrupted; ") and error.count("\n") == 1 and run.returncode == 130
            over = "\nwrote " in output and not error  # it came when all was done
            count(f"{name}: Ctrl-C", kept[0] == "read" and (line or over), (run.returncode, error, kept[0]))
        error = start(name, *words, "--out", stopped, "--resume").communicate()[1]
        found = attempt(lambda: difference(whole, stopped))
        count(f"{name}: after Ctrl-C the same run, bit for bit", found == ("read", []), (found, error))
        pair = [start(name, *words, "--out", both) for _ in range(2)]
        errors = [run.communicate()[1] for run in pair]
        found = attempt(lambda: data.load_checkpoint(both / "checkpoint.pt")["step"])
        commas = {line.count(",") for line in (both / "log.csv").read_text().splitlines()}
        count(f"{name}: two runs in one folder", [run.returncode for run in pair] == [0, 0] and len(commas) == 1
              and found == ("read", steps), (errors, found))


class Bomb:
    """What runs when a pickle with it is loaded carelessly: it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def bombs(marker):
    """File contents with code in them, in each container that a reader may meet."""
    bomb, out = Bomb(marker), [io.BytesIO() for _ in range(5)]
    torch.save({"model": bomb, "script": "vit"}, out[0])
    torch.save({"model": bomb}, out[1], _use_new_zipfile_serialization=False)
    np.savez(out[2], images=np.array([bomb], object), labels=np.zeros(20, int))
    np.save(out[3], np.array([bomb], object), allow_pickle=True)
    with data.zipfile.ZipFile(out[4], "w") as file:  # as a TorchScript archive
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"archive/{name}", pickle.dumps(bomb, 2) if "pkl" in name else b"3")
    return [pickle.dumps(bomb, 2), gzip.compress(pickle.dumps(bomb, 0)), *(x.getvalue() for x in out)]


def damages(body, rng, flips):
    n = len(body)
    for cut in sorted({1, 4, 30, 100, n // 10, n // 2, n - n // 10, n - 22, n - 1, rng.randrange(n)} & {*range(n)}):
        yield "cut short", body[:cut]
    for low, high in ((0, min(n, 300)), (0, n), (max(0, n - 2000), n)):  # head, anywhere, a zip's directory
        for i in (rng.randrange(low, high) for _ in range(flips)):
            yield "a bit flipped", body[:i] + bytes([body[i] ^ 1 << rng.randrange(8)]) + body[i + 1:]
    for i in (rng.randrange(n), rng.randrange(n)):
        yield "up to 99 bytes overwritten", body[:i] + rng.randbytes(min(99, n - i)) + body[i + 99:]
    yield "99 bytes more", body + rng.randbytes(99)


def other_size(path, rng):
    """The content of a file with one array cut in half, and that half."""
    def arrays(x):
        for key, value in x.items():
            if isinstance(value, dict):
                yield from arrays(value)
            elif getattr(value, "ndim", 0) and max(value.shape) > 1:
                yield x, key, value

    content = dict(np.load(path)) if path.suffix == ".npz" else {"": np.load(path)} if path.suffix == ".npy" else \
        torch.load(path, weights_only=False)
    x, key, value = rng.choice(list(arrays(content)))
    side = rng.choice([i for i, n in enumerate(value.shape) if n > 1])
    x[key] = value[tuple(slice(n // 2 if i == side else n) for i, n in enumerate(value.shape))]
    return content, x[key]


def write(path, content):
    """Bytes, or what np.savez, np.save or torch.save writes, in the place of whatever was there; None: nothing."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        {".npz": lambda: np.savez(path, **content), ".npy": lambda: np.save(path, content[""])}.get(
            path.suffix, lambda: torch.save(content, path))()


def good_files(good, own):
    """{path: names of its readers, its own first}: each kind of file that the scripts read, small."""
    test = {name: importlib.import_module(f"test_{name}") for name in (*MODULES, "data")}
    state, openai = test["vit"].random_state(), test["clip"].random_file("vit")
    made = {"timm.pth": state, "legacy.pth": state, "mae full.pth": test["mae"].random_file(),
            "mae encoder.pth": test["mae"].random_file(decoder_depth=0), "ijepa.pth.tar": test["jepa"].random_file(),
            "ijepa hf.bin": test["jepa"].hugging_face(test["jepa"].random_file()["encoder"], "ijepa."),
            "igpt hf.bin": test["igpt"].hf_file(), "sit.pt": test["repa"].random_file(sigma=True, Z=()),
            "repa last.pt": {"ema": test["repa"].random_file(), "args": argparse.Namespace(resolution=256)},
            "openai vit.pt": openai, "openai resnet.pt": test["clip"].random_file("resnet")}
    for name, content in made.items():
        torch.save(content, good / name, _use_new_zipfile_serialization=name != "legacy.pth")
    torch.jit.save(torch.jit.script(test["clip"].Tree({k: v.half() for k, v in openai.items()})), good / "archive.pt")
    test["repa"].random_teacher(good)
    np.savez(good / "google.npz", **test["vit"].google_arrays(test["vit"].random_state(dim=128), 2))
    np.save(good / "palette.npy", np.linspace(-1, 1, 60).reshape(20, 3))
    pairs = "".join(f"{a} {b}\n" for a in "abcdefgh" for b in "ijklmnop")
    (good / "vocabulary.txt.gz").write_bytes(gzip.compress(b"header\n" + pairs.encode()))
    for name in MODULES:
        shutil.copy(own / name / "checkpoint.pt", good / f"{name}.pt")
    shutil.copy(own / "repa" / "teacher.pt", good), shutil.copy(good.parent / "own.npz", good)
    test["data"].cifar_folder(good)
    data.train_cnn(data.load(str(good / "own.npz"), good), steps=2)
    readers = {"ViT Teacher": "timm.pth legacy.pth dino.pth vit.pt teacher.pt", "ViT": "google.npz",
               "MAE ViT Teacher": "mae*", "IJEPA ViT Teacher": "ijepa.pth.tar jepa.pt", "IJEPA": "ijepa?hf.bin",
               "SiT": "sit.pt repa*", "CLIP": "openai* archive.pt", "CLIP Tokenizer": "clip.pt", "ImageGPT": "igpt*",
               "Tokenizer": "*.gz", "palette": "palette.npy", "npz": "own.npz", "cnn": "cnn-*",
               "cifar": "cifar*/data_batch_1.bin cifar*/batches.meta.txt"}
    return {path: who for who, names in readers.items() for name in names.split() for path in good.glob(name)}


def files(o, folder, rng):
    archive, md5, where, label_bytes, parts, names = data.CIFAR["cifar10"]
    few = archive, md5, where, label_bytes, dict.fromkeys(parts, 20), names  # 20 pictures in a file
    with mock.patch.dict(data.CIFAR, cifar10=few):
        bad_files(o, folder, rng)


def bad_files(o, folder, rng):
    good, bad, marker, own = folder / "good", folder / "bad", folder / "bomb", runs(folder)
    pictures = data.load(str(folder / "own.npz"))
    read = {"ViT": vit.ViT.from_pretrained, "MAE": mae.MAE.from_pretrained, "IJEPA": jepa.IJEPA.from_pretrained,
            "SiT": repa.SiT.from_pretrained, "Teacher": repa.Teacher.from_pretrained, "CLIP": clip.CLIP.from_pretrained,
            "ImageGPT": igpt.ImageGPT.from_pretrained, "Tokenizer": clip.Tokenizer.from_file,
            "palette": lambda path: igpt.read_palette(path, 20), "npz": lambda path: data.load(str(path)),
            "cifar": lambda path: data.load("cifar10", path.parents[1]),
            "cnn": lambda path: data.train_cnn(vars(pictures).update(root=path.parent) or pictures, steps=2)}

    def see(reader, path):
        torch.manual_seed(0)  # an encoder-only file leaves the decoder as it was drawn
        return attempt(lambda: read[reader](path))

    def judge(row, path, reader, right=lambda found: False):
        kind, found = see(reader, path)
        ok = (kind == "refused" or kind == "read" and right(found)) and not marker.exists()
        count(row, ok, f"{reader} of {path.name}: {kind} {found if kind != 'read' else ''} bomb: {marker.exists()}")
        marker.unlink(missing_ok=True)

    good.mkdir()
    kinds, expected = good_files(good, own), {}
    for path, who in kinds.items():
        for reader in who.split():
            judge("whole", path, reader, lambda found: expected.update({(path, reader): plain(found)}) is None)
    shutil.copytree(good, bad)
    for path, who in kinds.items():
        place, body, first = bad / path.relative_to(good), path.read_bytes(), who.split()[0]
        blind = who == "cifar" or path.name in ("legacy.pth", "palette.npy")  # formats without a checksum
        for row, content in damages(body, rng, o.flips):
            reader = rng.choice(who.split())
            loose = blind and (row != "cut short" or path.suffix == ".txt")
            write(place, content)
            judge(f"{row} (legacy .pth, .npy, CIFAR: only crashes count)" if loose else row, place, reader,
                  lambda found: loose or plain(found) == expected[path, reader])
        for content in (b"", b"hello", b"<!DOCTYPE html>\n<html>404</html>", b"PK\x03\x04" + bytes(99)):
            write(place, content)
            judge("empty, a text, a web page", place, first)
        for content in bombs(marker):
            write(place, content)
            judge("code in it", place, first)
        write(place, None)
        judge("missing", place, first, lambda found: who == "cnn")  # which is then trained anew
        write(place, None), place.mkdir()
        judge("a folder", place, first)
        for _ in range(o.flips * (path.name != "archive.pt" and who != "cifar" and path.suffix != ".gz")):
            content, part = other_size(path, rng)
            write(place, content)
            reader = rng.choice(who.split())  # right: the array is not used, or the model has its size
            judge("an array of another size", place, reader, lambda found: plain(found) == expected[path, reader]
                  or part.shape in [x.shape for x in getattr(found, "state_dict", dict)().values()])
        write(place, body)
        for reader in set(read) - {"cnn", "cifar", *who.split()}:
            judge("of another model", path, reader)
    for name in o.scripts:
        for log in (own / name).glob("*.csv"):
            for content in (b"", log.read_bytes()[:-9], b"\xff" + log.read_bytes(), b"nonsense\n" * 9, None):
                shutil.copytree(own / name, bad / name, dirs_exist_ok=True)
                write(bad / name / log.name, content)
                for steps in (2, 3):  # it ended, and goes on
                    kind, why = main_of(name, "--resume", "--steps", steps, "--out", bad / name)
                    count("log damaged or missing, then --resume", kind != "failed", f"{name} {content}: {why}")


def recorded(name):
    """{option: (default, keywords of add_argument)} of a script."""
    found, add = {}, data.Parser.add

    def record(self, option, default, help, **more):
        found[option] = default, more
        add(self, option, default, help, **more)

    with mock.patch.object(data.Parser, "add", record):
        MODULES[name].parse_args([])
    return found


def wrong_values(option, more, folder):
    """-> lists of words that no script should take after the option."""
    if "type" in more:
        limits = inspect.getclosurevars(more["type"]).nonlocals  # of data.number
        bad = ["", "x", "nan", "inf", "-inf", "1e999", "1,5", "0x10", limits["low"] - 1, 2 * limits["high"] + 1]
        return [[v] * more.get("nargs", 1) for v in bad] + [[]] + [["1.5"]] * (limits["kind"] is int)
    if "action" in more or "choices" in more:
        return [["=1"], ["=yes"]] if "action" in more else [["nonsense"], [""], ["TINY"], []]
    below = folder / "own.npz" / "below"
    return [[below], []] + [["nonsense"], [""], [folder]] * (option not in ("--out", "--data-dir"))


def right_value(name, option, more, folder, rng):
    """-> the words of a random value that is right by itself."""
    own = [folder / "own" / name / "checkpoint.pt"]
    encoders = [folder / "own" / script / "checkpoint.pt" for script in ("vit", "mae", "jepa")]
    fixed = {"--steps": [2], "--dim": [4, 8, 12, 16, 16, 32], "--depth": [1, 2, 3], "--heads": [1, 2, 4],
             "--patch-size": [1] if name == "igpt" else [1, 2, 4], "--image-size": [4, 8, 16, 16, 12],
             "--batch-size": [1, 3, 16, 64], "--seed": [0, 10**9], "--lr": [0, 1e-3, 0.1, 100],
             "--min-keep": [1, 1, 2, 9], "--teacher-steps": [1, 2], "--sample-steps": [1, 2, 5],
             "--device": ["cpu", "auto"], "--data": ["shapes", folder / "own.npz", folder / "odd.npz"],
             "--data-dir": [folder / "cache"], "--out": [folder / "out"], "--load": own, "--init": encoders,
             "--teacher": ["random", *encoders], "--finetune": own, "--palette": [folder / "good.npy"],
             "--tokenizer": own, "--compare": [own[0].parent] if name == "clip" else own}
    same = next((f"--{end}" for end in ("dim", "depth", "heads") if option.endswith(f"-{end}")), option)
    if same in fixed:
        return [rng.choice(fixed[same])]
    if "choices" in more:
        return [rng.choice(list(more["choices"]))]
    low, high, kind = map(inspect.getclosurevars(more["type"]).nonlocals.get, ("low", "high", "kind"))
    near = [low, low + 1, low + 5] if kind is int else [low, rng.uniform(low, min(high, 1)), min(high, 100.0)]
    return [min(rng.choice(near), high) for _ in range(more.get("nargs", 1))]


def options(o, folder, rng):
    own, draw = runs(folder), data.shapes
    np.savez(folder / "odd.npz", images=np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8),
             labels=np.zeros(20, np.int16), captions=["", "<&>", "\u65e5\u672c " * 200, "left", "x\ny"] * 4)
    np.save(folder / "good.npy", np.linspace(-1, 1, 36).reshape(12, 3))
    with mock.patch.object(data, "shapes", lambda seed: draw(seed, counts=(60, 20, 10))):
        for name in o.scripts:
            found = recorded(name)
            for option, (_, more) in found.items():
                for values in wrong_values(option, more, folder):
                    words = [f"{option}{values[0]}"] if "action" in more else [option, *values]
                    words += ["--data", "cifar10"] if option == "--data-dir" else []  # or it would not be used
                    kind, why = main_of(name, *small(name, folder, "--steps", 2, "--out", folder / "out"), *words)
                    named = option in why or values and str(values[0]) and str(values[0]) in why  # a file's name
                    count(f"{name}: a wrong value", kind == "refused" and named, f"{words}: {kind} {why}")
            always = {"--" + key.replace("_", "-") for size in MODULES[name].SIZES.values() for key in size}
            always |= {"--steps", "--data", "--data-dir", "--out", "--image-size", "--teacher-steps", "--sample-steps"}
            for _ in range(o.combinations):
                words = []
                for option, (default, more) in found.items():
                    rare = default is None or "action" in more
                    if option != "--compile" and (option in always or rng.random() < (0.15 if rare else 0.5)):
                        values = [] if "action" in more else right_value(name, option, more, folder, rng)
                        words += [option, *values]
                shutil.rmtree(folder / "out", ignore_errors=True)
                if "--resume" in words:
                    shutil.copytree(own / name, folder / "out")
                kind, why = main_of(name, *words)
                row = f"{name}: a combination of right values" + ", refused in one line" * (kind == "refused")
                count(row, kind != "failed", f"{why}: python {name}.py {' '.join(map(str, words))}")


def hostile_archives(test):
    link = lambda kind, to: {"set/a.bin": test.link("set/a.bin", kind, to), "set/b.txt": b"", "../evil": b"out"}
    kinds = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE
    return [test.archive(**members) for members in (
        *(link(kind, to) for kind in kinds for to in ("/etc/passwd", "../../x", "b.txt")), {"set/./a.bin": b"12345"},
        {"../set/a.bin": b"12345", "set/b.txt": b""}, {"/set/a.bin": b"12345", "set/b.txt": b""},
        {"set/a.bin": b"1234567", "set/b.txt": b""})]


def faults(o, folder, rng):
    own, losses = runs(folder), dict(vit=(vit.ViT, "loss"), mae=(mae.MAE, "forward"), jepa=(jepa.IJEPA, "loss"),
                                     repa=(repa.SiT, "loss"), clip=(clip.CLIP, "loss"), igpt=(igpt.ImageGPT, "loss"))
    for name in o.scripts:
        for bad in (float("nan"), float("inf"), -float("inf")):
            out, calls, (owner, method) = folder / "faults" / name / str(bad), [], losses[name]

            def spoiled(self, *args, original=getattr(owner, method), **more):
                loss, *rest = original(self, *args, **more)
                calls.append(loss.requires_grad)  # jepa.py looks at it without a gradient, too
                return loss * (bad if sum(calls) == 4 else 1), *rest

            with mock.patch.object(owner, method, spoiled):
                kind, why = main_of(name, *small(name, folder, "--steps", 9, "--out", out))
            kept = data.load_checkpoint(out / "checkpoint.pt")
            finite = kept["step"] == 3 and all(v.isfinite().all() for v in kept["model"].values())
            count(f"{name}: a loss that is not finite at step 3", kind == "refused" and "step 3" in why and finite, why)
        path = own / name / "checkpoint.pt"
        body = path.read_bytes()
        for limit in (0, 20, len(body) // 2, len(body) - 1):
            run = start(name, "--resume", "--out", path.parent, "--steps", 5,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            error = run.communicate()[1]
            line = run.returncode == 2 and error.startswith("error: cannot write") and error.count("\n") == 1
            kind, step = attempt(lambda: data.load_checkpoint(path)["step"])  # under the last limit, some of its fit
            count(f"{name}: the disk is full", line and kind == "read" and (path.read_bytes() == body or step > 2)
                  and not list(path.parent.glob("*.part*")), (run.returncode, error, kind, step))
        kind, why = main_of(name, *small(name, folder, "--steps", 5, "--out", folder / "own.npz" / "x"))
        count(f"{name}: --out below a file", kind == "refused" and "own.npz/x" in why, why)
    test = importlib.import_module("test_data")
    good = test.archive(**{"set/a.bin": b"12345", "set/b.txt": b"names", "../evil": b"out", "/tmp/evil": b"out"})
    n, starts = len(good), (b"", good[:1], good[:len(good) // 2])
    answers = [("403, 404, 500", dict(status=status)) for status in (403, 404, 500)] + [
        ("the server stalls", dict(body=body, length=n, stall=1)) for body in starts] + [
        ("cut off", dict(body=body, length=n)) for body in (*starts, good[:-1])] + [
        ("a wrong length", dict(length=length)) for length in (1, n - 1, 10**12, -5, "many")] + [
        ("wrong bytes", dict(body=body)) for body in (*starts, b"<html>", good[:50] + b"!" + good[51:])] + [
        ("a hostile archive", dict(body=body, trusted=True)) for body in hostile_archives(test)]
    opened, root = data.urllib.request.urlopen, folder / "net"
    with test.web_server() as web, mock.patch.object(
            data.urllib.request, "urlopen", lambda url, timeout: opened(url, timeout=0.3)):
        for row, answer in answers:
            web.answer.clear(), web.answer.update({"body": good} | answer)
            md5 = data.hashlib.md5(web.answer["body"] if "trusted" in answer else good).hexdigest()
            shutil.rmtree(root, ignore_errors=True)
            kind, why = attempt(lambda: data.download(web.url, md5, root, "set", {"a.bin": 5, "b.txt": None}))
            left = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
            whole = {"refused": {}, "read": {"a.bin": b"12345", "b.txt": b"names"}}.get(kind)
            count(f"download: {row}", left == whole, f"{answer}: {kind} {why} {left}")


def resident(name, words):
    """-> {step: resident bytes when it is logged}, of a training in this fresh process."""
    torch.set_num_threads(1)
    sizes, log = {}, data.log

    def watched(path, step, **numbers):
        log(path, step, **numbers)
        sizes[step] = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with mock.patch.object(data, "log", watched), contextlib.redirect_stdout(io.StringIO()):
        MODULES[name].train(MODULES[name].parse_args(words))
    return sizes


def memory(o, folder, rng):
    for name in o.scripts:
        words = small(name, folder, "--depth", 1, "--batch-size", 4, "--save-seconds", 1, "--steps", o.steps,
                      "--out", folder / "memory" / name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes = pool.apply(resident, (name, [*map(str, words)]))
        first, last = sizes[1000], sizes[o.steps - 1]
        row = f"{name}: resident memory, {first / 2**20:.1f} MiB after 1,000 steps, {last / first - 1:+.2%}"
        count(f"{row} after {o.steps:,}", last < 1.05 * first, sizes)


def main():
    sections = {section.__name__: section for section in (kills, files, options, faults, memory)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(sections), help=", ".join(sections))
    parser.add_argument("--scripts", nargs="+", default=list(MODULES), choices=MODULES, help="all by default")
    for option, default, what in (
            ("kills", 20, "of a script; a quarter as many Ctrl-C"), ("flips", 4, "in a part of a file"),
            ("combinations", 200, "of a script's options"), ("steps", 5000, "of the memory section"),
            ("seed", 0, "of all that is random")):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{what} (default: {default})")
    o, good = parser.parse_args(), True
    torch.set_num_threads(1), warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        folder = pathlib.Path(folder)
        brightness(folder / "own.npz", 40, o.seed)
        for name in o.sections:
            TALLY.clear()
            CLOCK[0] = time.time()
            sections[name](o, folder, random.Random(o.seed))
            print(f"\n{name:<86}{'tried':>9}{'survived':>10}{'seconds':>9}")
            for row, (tried, survived, seconds) in [*TALLY.items(), ("in all", map(sum, zip(*TALLY.values())))]:
                print(f"  {row:<84}{tried:>9}{survived:>10}{seconds:>9.1f}", flush=True)
                good &= tried == survived
    sys.exit(not good)


if __name__ == "__main__":
    main()
