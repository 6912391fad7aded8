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
import mae  # noqa: E402
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


def images_per_second(script, batch_size, mode, check_every, device, seconds=4.0):
    """Training steps of the default model on random images: forward, backward, clip, AdamW. mode: None, or one of
    torch.compile; check_every: the loss is read (and the GPU waited for) every so many steps."""
    torch.manual_seed(0)
    model = {"vit": vit.ViT, "mae": mae.MAE}[script]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.arange(batch_size, device=device) % 10
    amp = data.autocast(device)

    def loss_function(images):
        if script == "vit":
            return model.loss(images, labels)[0]
        return model(images)[0]

    if mode is not None:
        loss_function = torch.compile(loss_function, mode=mode)
    done = 0
    began = None
    while began is None or time.perf_counter() - began < seconds:
        for step in range(check_every):
            with amp:
                loss = loss_function(images)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()
        done += check_every
        if began is None and done >= 20:  # the first steps compile and warm up
            began = time.perf_counter()
            done = 0
    return done * batch_size / (time.perf_counter() - began)


def measure_loop(options, results):
    """{"vit, batch 1024, compiled": images/s}, beside the default loop: batch 256, not compiled, a check each step."""
    device = data.pick_device(options.device)
    for script in ("vit", "mae"):
        for batch_size in ((4,) if options.tiny else (256, 1024, 2048)):
            for mode, check_every in ((None, 1), (None, 10), ("default", 1), ("reduce-overhead", 10)):
                name = f"loop: {script}, batch {batch_size}, compile {mode}, check every {check_every}"
                if name in results or (options.tiny and mode is not None):
                    continue
                speed = images_per_second(script, batch_size, mode=mode, check_every=check_every, device=device,
                                          seconds=0.1 if options.tiny else 4.0)
                keep(options, results, name, {"images_per_second": round(speed)})


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
            cells[-1] = f"{scores['images_per_second']} images/s"
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
