"""What one GPU reaches in minutes, by hand: the commands of the scripts as they are, run one after another.

    python tests/gpu.py --data-dir datasets --minutes 10          # from the first item that has no result yet
    python tests/gpu.py --items vit vit_seeds                     # only these
    python tests/gpu.py --tiny --device cpu --data own.npz        # does each command run? seconds, and no result

Each command writes its scores to out/gpu/results.json as soon as it has ended, and is not run again. A command that was
stopped by the time limit goes on from its checkpoint the next time. At the end stands a Markdown table. `--list` prints
the commands alone. REPA's teachers have a script of their own, tests/teachers.py.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import vit  # noqa: E402

# About 3 million parameters: patches of 4, so 64 tokens of an image of 32 x 32 pixels.
ENCODER = "--patch-size 4 --dim 192 --depth 9 --heads 6"
EPOCHS_100 = "--batch-size 512 --steps 9800"  # 100 times the 50,000 images of CIFAR-10
VIT = f"vit.py {ENCODER} {EPOCHS_100} --augment strong --lr 0.002 --warmup 980"
SIT = "--image-size 32 --patch-size 4 --dim 256 --depth 8 --heads 4 --align-depth 3"

# item -> its commands by name; {out} is the folder of all runs. The order is that of the plan.
ITEMS = {
    "vit": {
        "vit": VIT,
    },
    "mae": {
        "mae": f"mae.py {ENCODER} --batch-size 512 --steps 9800 --lr 0.002 --warmup 980 --norm-pix "
               "--decoder-dim 128 --decoder-depth 2 --decoder-heads 4",
        "mae_tuned": f"vit.py --init {{out}}/mae/checkpoint.pt {EPOCHS_100} --augment strong --lr 0.002 "
                     "--layer-decay 0.75 --warmup 980",
    },
    "jepa": {
        "jepa": f"jepa.py {ENCODER} {EPOCHS_100} --predictor-dim 96 --predictor-depth 3 --warmup 980",
        "jepa_random_patch2": "jepa.py --patch-size 2 --batch-size 256 --steps 4000 --masking random",
        "jepa_paper_patch2": "jepa.py --patch-size 2 --batch-size 256 --steps 4000 --masking multiblock",
    },
    "igpt": {
        "igpt": "igpt.py --image-size 16 --dim 256 --depth 12 --heads 8 --colors 512 --batch-size 128 --steps 8000 "
                "--lr 0.001",
    },
    "clip": {
        "clip": f"clip.py {ENCODER} {EPOCHS_100} --lr 0.002 --warmup 980",
    },
    "sit": {
        "sit": f"repa.py {SIT} --steps 12000 --batch-size 256 --lr 0.001 --samples 10000 "
               "--teacher {out}/vit/checkpoint.pt",
    },
    "vit_seeds": {
        f"vit_{seed}": f"{VIT} --seed {seed}"
        for seed in (1, 2)
    },
}
SHOWN = ["accuracy", "probe", "probe_last_four", "knn", "nats_per_pixel", "probe_by_layer", "zero_shot_seen", "frechet",
         "seconds"]


# --------------------------------------------------------------------------------------------- the loop's speed


class Loop:
    """The training loop of vit.py, at its default size, on any data set and batch.

    number_format: "bf16", or "fp16" with a scaler of the loss, for GPUs without bfloat16 units.
    """

    def __init__(self, dataset, batch_size, number_format="bf16", compiled=False):
        device = dataset.mean.device
        self.dataset = dataset
        self.batch_size = batch_size
        torch.manual_seed(0)
        self.model = vit.ViT(image_size=dataset.image_size, num_classes=len(dataset.class_names)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=device.type == "cuda")
        dtype = torch.float16 if number_format == "fp16" else torch.bfloat16
        self.amp = torch.autocast(device.type, dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=number_format == "fp16")  # else it does nothing
        if compiled:
            torch.compiler.reset()  # forget what was compiled for another batch size
        self.loss_function = torch.compile(self.model.loss) if compiled else self.model.loss
        self.done = 0  # steps

    def step(self, is_checked):
        """is_checked: wait for the loss and the norm of its gradient, as data.Progress.check does in every step."""
        dataset = self.dataset
        index = data.batch_index(len(dataset.train_images), self.batch_size, self.done, 0).to(dataset.mean.device)
        images = dataset.normalize(data.augment(dataset.train_images[index]))
        with self.amp:
            loss, _ = self.loss_function(images, dataset.train_labels[index])
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if is_checked:
            loss.item()
            norm.item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1

    def images_per_second(self, check_every, seconds):
        self.step(is_checked=True)  # now the GPU has no work left
        began = time.perf_counter()
        steps = 0
        while time.perf_counter() - began < seconds:
            for number in range(10):
                self.step(is_checked=number % check_every == 0)
            steps += 10
        self.step(is_checked=True)
        return (steps + 1) * self.batch_size / (time.perf_counter() - began)


def measure_loop(options, results):
    """Images/s with a check at every step, as in the scripts, and at every tenth one: medians of five, in alternation."""
    dataset = data.load(options.data, options.data_dir).to(data.pick_device(options.device))
    for batch_size in ((4,) if options.tiny else (64, 1024)):
        for number_format, compiled in (("bf16", False), ("bf16", True), ("fp16", False)):
            name = f"loop: vit, batch {batch_size}, {number_format}{', compiled' if compiled else ''}"
            if name in results or (options.tiny and number_format == "fp16" and options.device == "cpu"):
                continue
            loop = Loop(dataset, batch_size, number_format=number_format, compiled=compiled and not options.tiny)
            for _ in range(2 if options.tiny else 20):  # compiles, and warms up
                loop.step(is_checked=True)
            rates = {1: [], 10: []}
            for _ in range(5):
                for check_every in rates:
                    rates[check_every].append(loop.images_per_second(check_every, 0.1 if options.tiny else 0.8))
            keep(options, results, name, {
                "images_per_second": round(statistics.median(rates[1])),
                "checked_every_ten": round(statistics.median(rates[10])),
            })


# --------------------------------------------------------------------------------------------- the runs


def keep(options, results, name, scores):
    """Adds a result to results.json, whole or not at all; --tiny keeps none."""
    print(f"{name}: {scores}", flush=True)
    results[name] = scores
    if not options.tiny:
        data.write_file(options.out / "results.json", json.dumps(results, indent=1).encode())


def full_command(options, name, text):
    words = text.format(out=options.out).split() + ["--data", options.data, "--data-dir", options.data_dir]
    words += ["--out", str(options.out / name), "--device", options.device]
    if "--seed" not in words:
        words += ["--seed", "0"]
    if options.tiny:  # the last of two equal options counts
        words += ["--steps", "2", "--batch-size", "8", "--warmup", "1"]
        if words[0] == "repa.py":
            words += ["--samples", "8", "--sample-steps", "2", "--teacher-steps", "2"]
    elif (options.out / name / "checkpoint.pt").exists():
        words.append("--resume")
    return [sys.executable, *words]


def run(options, results, name, text, deadline):
    """One command within the time left; its output goes to a file beside its checkpoint."""
    if name in results:
        return
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = full_command(options, name, text)
    print(" ".join(command[1:]), flush=True)
    began = time.time()
    with open(folder / "output.txt", "w", encoding="utf8") as log:
        try:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True,
                           timeout=max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            print(f"{name}: no time left; it goes on from its checkpoint the next time")
            return
        except subprocess.CalledProcessError as error:
            lines = (folder / "output.txt").read_text(encoding="utf8").splitlines()
            print(f"{name}: exit status {error.returncode}: {lines[-1] if lines else ''}")
            if options.tiny:
                raise
            return
    scores = data.load_checkpoint(folder / "checkpoint.pt")["scores"]
    keep(options, results, name, scores | {"wall_seconds": round(time.time() - began)})


def print_table(results):
    print("| run | " + " | ".join(SHOWN) + " |\n|" + "---|" * (len(SHOWN) + 1))
    for name, scores in results.items():
        cells = []
        for key in SHOWN:
            value = scores.get(key, "")
            if isinstance(value, list):
                value = " ".join(f"{v:.3f}" for v in value)
            elif key == "seconds" and value:
                value = f"{value:.0f}"
            elif isinstance(value, float):
                value = f"{value:.4f}"
            cells.append(str(value))
        if "images_per_second" in scores:
            cells[-1] = (f"{scores['images_per_second']} images/s, with a check every ten steps "
                         f"{scores['checked_every_ten']}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    seeds = [results[name]["accuracy"] for name in ("vit", "vit_1", "vit_2") if name in results]
    if len(seeds) > 1:
        print(f"vit, {len(seeds)} seeds: {statistics.mean(seeds):.4f} ± {statistics.stdev(seeds):.4f}")


def main():
    names = ["loop", *ITEMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", default=names, choices=names, help="in this order")
    parser.add_argument("--minutes", type=float, default=15, help="after which no command goes on")
    parser.add_argument("--data", default="cifar10", help="the data set of all runs")
    parser.add_argument("--data-dir", default=str(ROOT / "datasets"), help="the folder in which data sets are kept")
    parser.add_argument("--device", default="cuda", help="cuda, mps or cpu")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "gpu", help="the folder of all runs")
    parser.add_argument("--tiny", action="store_true", help="two steps of each command, to see that it runs")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.data_dir = str(pathlib.Path(options.data_dir).resolve())
    if options.data.endswith(".npz"):
        options.data = str(pathlib.Path(options.data).resolve())
    if options.tiny:
        options.out = options.out / "tiny"
    if options.list:
        for commands in ITEMS.values():
            for name, text in commands.items():
                print(" ".join(["python", *full_command(options, name, text)[1:]]))
        return
    path = options.out / "results.json"
    results = {}
    if path.exists() and not options.tiny:
        results = json.loads(path.read_text(encoding="utf8"))
    deadline = time.time() + 60 * options.minutes
    for item in options.items:
        if item == "loop":
            measure_loop(options, results)
            continue
        for name, text in ITEMS[item].items():
            if time.time() < deadline:
                run(options, results, name, text, deadline)
    print_table(results)


if __name__ == "__main__":
    main()
