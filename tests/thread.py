"""The lecture's thread, measured: "more semantic loss functions -> better performance and faster training".

    python tests/thread.py                                 # shapes, 3 seeds
    python tests/thread.py --data cifar10 --pictures 1024000 256000 --batch-size 256 --finetune-steps 2000

The same encoder (patch 4, width 128, depth 4, 4 heads), the same pictures and the same probes for each objective, by the
scripts' own commands: `python mae.py --steps 1200 --seed 0 --out out/thread/...`; a run that has ended is not repeated.
Prints a Markdown table, mean and standard deviation over the seeds, and draws the linear probe against pictures and seconds.
iGPT works at 16 x 16 with a token a pixel. "fine-tuned": `vit.py --init` of the longest run, all labels, 400 steps.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import importlib
import os
import pathlib
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import vit  # noqa: E402

SCRIPTS = ["vit", "clip", "jepa", "mae", "igpt"]
NAMES = {"vit": "ViT: labels", "clip": "CLIP: captions", "jepa": "I-JEPA: representations", "mae": "MAE: pixels",
         "igpt": "iGPT: the next pixel", "random": "untrained ViT", "pixels": "raw pixels"}
COLUMNS = {"probe": "linear", "knn": "kNN", "probe_1_percent": "1 % of labels", "accuracy": "fine-tuned",
           "seconds": "seconds of training"}


def scores_of(folder):
    return data.load_checkpoint(folder / "checkpoint.pt")["scores"]


def run(o, name, words):
    """A script's command, unless it has ended before; its output goes to a file beside the run."""
    folder = o.out / o.data / name
    done = (folder / "checkpoint.pt").exists() and "probe" in scores_of(folder)
    if not done:
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // o.jobs))
        command = [sys.executable, *words, "--data", o.data, "--data-dir", o.data_dir, "--out", str(folder)]
        with open(folder / "output.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=log,
                           stderr=log, check=True)
    print(f"{'there' if done else 'done '} {' '.join(words)}", flush=True)
    return scores_of(folder)


def baselines(o, seed):
    """-> {"pixels": scores, "random": scores}: the same probes on raw pixels and on an untrained ViT."""
    device, found = data.pick_device("auto"), {}
    dataset = data.load(o.data, o.data_dir, seed).to(device)
    torch.manual_seed(seed)
    untrained = vit.ViT(num_classes=1).to(device)
    for name, f in (("pixels", lambda x: x.flatten(1)), ("random", untrained.features)):
        own = data.both_sets(f, dataset, contextlib.nullcontext())
        found[name] = dict(probe=data.linear_probe(*own), knn=data.knn(*own),
                           probe_1_percent=data.linear_probe(*own, percent=1))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--data-dir", default="datasets")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "thread")
    parser.add_argument("--pictures", type=int, nargs="+", default=[76800, 19200], help="seen in training")
    parser.add_argument("--batch-size", type=int, help="default: the scripts' own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS[:-1], choices=SCRIPTS)
    parser.add_argument("--finetune-steps", type=int, default=400, help="0: no fine-tuning")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on a share of the cores")
    o = parser.parse_args()
    batch = ["--batch-size", str(o.batch_size)] if o.batch_size else []
    size = lambda script: o.batch_size or importlib.import_module(script).parse_args([]).batch_size  # its own
    steps = lambda script, n: ["--steps", str(n // size(script)), *batch]
    found = collections.defaultdict(list)  # (script, pictures) -> the scores of each seed
    found["random", 0], found["pixels", 0] = ([{} for _ in o.seeds] for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        jobs = {(script, n, seed): pool.submit(run, o, f"{script}-{n}-{seed}", [
            f"{script}.py", *steps(script, n), "--seed", str(seed)])
            for seed in o.seeds for n in o.pictures for script in o.scripts}
        for (script, n, seed), job in jobs.items():
            found[script, n].append({k: v for k, v in job.result().items() if k != "accuracy"})  # vit.py's own
        tuned = [s for s in o.scripts if s in ("mae", "jepa")] + ["scratch"] if o.finetune_steps else []
        jobs = {(script, seed): pool.submit(run, o, f"{script}-tuned-{seed}", [
            "vit.py", "--steps", str(o.finetune_steps), *batch, "--seed", str(seed), *(() if script == "scratch" else (
                "--init", str(o.out / o.data / f"{script}-{max(o.pictures)}-{seed}" / "checkpoint.pt"),
                "--layer-decay", "0.75"))]) for script in tuned for seed in o.seeds}
        for (script, seed), job in jobs.items():
            row = ("random", 0) if script == "scratch" else (script, max(o.pictures))
            found[row][o.seeds.index(seed)]["accuracy"] = job.result()["accuracy"]
    for i, seed in enumerate(o.seeds):
        for name, scores in baselines(o, seed).items():
            found[name, 0][i].update(scores)

    def cell(runs, key):
        values = [scores[key] for scores in runs if key in scores]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and key != "seconds" else ""
        return f"{statistics.mean(values):.0f}" if key == "seconds" else f"{statistics.mean(values):.3f}{spread}"

    found = dict(sorted(found.items(), key=lambda item: -statistics.mean(run["probe"] for run in item[1])))
    print("| learns from | pictures | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (2 + len(COLUMNS)))
    for (script, n), runs in found.items():
        print(f"| {NAMES[script]} | {n:,} | " + " | ".join(cell(runs, key) for key in COLUMNS) + " |")
    for axis in ("images_seen", "seconds"):
        mean = lambda runs, key: statistics.mean(scores[key] for scores in runs)
        series = {NAMES[script]: [(0, mean(found[script, o.pictures[0]], "probe_random"))] + sorted(
            (mean(runs, axis), mean(runs, "probe")) for (name, _), runs in found.items() if name == script)
            for script in o.scripts}
        data.save_chart(o.out / f"{o.data}-{axis}.svg", series, axis.replace("images_seen", "pictures seen"), "linear probe")


if __name__ == "__main__":
    main()
