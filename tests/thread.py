"""The lecture's thread, measured: "more semantic loss functions -> better performance and faster training".

    python tests/thread.py                                 # shapes, 3 seeds
    python tests/thread.py --data cifar10 --images 1024000 256000 --batch-size 256 --finetune-steps 2000

The same encoder (patch 4, width 128, depth 4, 4 heads), the same images and the same probes for each objective, by the
scripts' own commands: `python mae.py --steps 1200 --seed 0 --out out/thread/...`; a run that has ended is not repeated.
Prints a Markdown table, mean and standard deviation over the seeds, and draws the linear probe against images seen and
seconds. iGPT works at 16 x 16 with a token for each pixel; I-JEPA masks single patches. "fine-tuned": `vit.py --init`
with the encoder of the longest run, all labels, 400 steps.
"""

import argparse
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
NAMES = {
    "vit": "ViT: labels",
    "clip": "CLIP: captions",
    "jepa": "I-JEPA: representations",
    "mae": "MAE: pixels",
    "igpt": "iGPT: the next pixel",
    "random": "untrained ViT",
    "pixels": "raw pixels",
}
OPTIONS = {  # where README's table was not measured with the default
    "igpt": ["--dim", "128", "--depth", "4", "--colors", "64", "--batch-size", "8"],  # as large as the other encoders
    "jepa": ["--masking", "random"],
}
COLUMNS = {  # score -> its name in the table
    "probe": "linear",
    "knn": "kNN",
    "probe_1_percent": "1 % of labels",
    "accuracy": "fine-tuned",
    "seconds": "seconds of training",
}


# --------------------------------------------------------------------------------------------- the runs


def run_folder(options, name):
    """Where a run is kept. The folder of an own data set, path/own.npz, has its stem: own."""
    return options.out / pathlib.Path(options.data).stem / name


def run(options, name, words):
    """Runs a script unless it has ended before; its output goes to a file beside the run. -> its scores."""
    folder = run_folder(options, name)
    path = folder / "checkpoint.pt"
    ended = path.exists() and "probe" in data.load_checkpoint(path)["scores"]
    if not ended:
        folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        command = [sys.executable, *words, "--data", options.data, "--data-dir", options.data_dir, "--out", str(folder)]
        with open(folder / "output.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=log,
                           stderr=log, check=True)
    print(f"{'there' if ended else 'done '} {' '.join(words)}", flush=True)
    return data.load_checkpoint(path)["scores"]


def training_words(options, script, images, seed):
    """The command of a run that sees a number of images."""
    more = OPTIONS.get(script, [])
    if options.batch_size:
        more = more + ["--batch-size", str(options.batch_size)]  # the last of two equal options counts
    batch_size = importlib.import_module(script).parse_args(more).batch_size
    return [f"{script}.py", "--steps", str(images // batch_size), "--seed", str(seed), *more]


def tuning_words(options, script, seed):
    """The command that fine-tunes the encoder of a script's longest run; "random": a new encoder."""
    words = ["vit.py", "--steps", str(options.finetune_steps), "--seed", str(seed)]
    if options.batch_size:
        words += ["--batch-size", str(options.batch_size)]
    if script != "random":
        encoder = run_folder(options, f"{script}-{max(options.images)}-{seed}") / "checkpoint.pt"
        words += ["--init", str(encoder), "--layer-decay", "0.75"]
    return words


def baselines(options, seed):
    """-> {"pixels": scores, "random": scores}: the same probes on raw pixels and on an untrained ViT."""
    device = data.pick_device("auto")
    dataset = data.load(options.data, options.data_dir, seed).to(device)
    torch.manual_seed(seed)
    untrained = vit.ViT(image_size=dataset.image_size, num_classes=1).to(device)

    def pixels(images):
        return images.flatten(1)

    found = {}
    for name, features in (("pixels", pixels), ("random", untrained.features)):
        both = data.both_sets(features, dataset, contextlib.nullcontext())
        found[name] = {
            "probe": data.linear_probe(*both),
            "knn": data.knn(*both),
            "probe_1_percent": data.linear_probe(*both, percent=1),
        }
    return found


def measure(options):
    """-> {(script, images seen): the scores of each seed}; the baselines have seen 0 images."""
    found = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        # All trainings are handed to the pool first; then their results are collected in order.
        jobs = {}
        for seed in options.seeds:
            for images in options.images:
                for script in options.scripts:
                    words = training_words(options, script, images, seed)
                    jobs[script, images, seed] = pool.submit(run, options, f"{script}-{images}-{seed}", words)
        for (script, images, seed), job in jobs.items():
            scores = job.result()
            scores.pop("accuracy", None)  # of vit.py's own head: the column is that of fine-tuning
            found.setdefault((script, images), []).append(scores)

        for seed in options.seeds:
            for name, scores in baselines(options, seed).items():
                found.setdefault((name, 0), []).append(scores)

        # Fine-tuning starts from the longest runs, so it waits for all of them.
        jobs = {}
        if options.finetune_steps:
            for script in ["random", "mae", "jepa"]:
                for seed in options.seeds:
                    if script == "random" or script in options.scripts:
                        name = "scratch" if script == "random" else script
                        words = tuning_words(options, script, seed)
                        jobs[script, seed] = pool.submit(run, options, f"{name}-tuned-{seed}", words)
        for (script, seed), job in jobs.items():
            images = 0 if script == "random" else max(options.images)
            scores = found[script, images][options.seeds.index(seed)]
            scores["accuracy"] = job.result()["accuracy"]
    return found


# -------------------------------------------------------------------------------------- table and charts


def mean(runs, key):
    return statistics.mean(scores[key] for scores in runs)


def cell(runs, key):
    """A cell of the table: the mean and the standard deviation over the seeds."""
    values = [scores[key] for scores in runs if key in scores]
    if not values:
        return ""
    if key == "seconds":
        return f"{statistics.mean(values):.0f}"
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def print_table(found):
    """The best linear probe first."""
    print("| learns from | images | " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    rows = sorted(found.items(), key=lambda row: mean(row[1], "probe"), reverse=True)
    for (script, images), runs in rows:
        cells = " | ".join(cell(runs, key) for key in COLUMNS)
        print(f"| {NAMES[script]} | {images:,} | {cells} |")


def draw_chart(found, options, axis, xlabel):
    """The linear probe of each script against the images or the seconds; at 0, that of the untrained network."""
    series = {}
    for script in options.scripts:
        points = [(0, mean(found[script, options.images[0]], "probe_random"))]
        for images in options.images:
            runs = found[script, images]
            points.append((mean(runs, axis), mean(runs, "probe")))
        series[NAMES[script]] = sorted(points)
    name = f"{pathlib.Path(options.data).stem}-{axis}.svg"
    data.save_chart(options.out / name, series, xlabel, "linear probe")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="shapes, cifar10, cifar100 or the path of an own .npz")
    parser.add_argument("--data-dir", default=str(ROOT / "datasets"), help="the folder in which data sets are kept")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "thread", help="the folder of all runs")
    parser.add_argument("--images", type=int, nargs="+", default=[76800, 19200], help="seen in training")
    parser.add_argument("--batch-size", type=int, help="default: the scripts' own, for iGPT 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each of them")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS[:-1], choices=SCRIPTS, help="all but igpt by default")
    parser.add_argument("--finetune-steps", type=int, default=400, help="0: no fine-tuning")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on a share of the cores")
    options = parser.parse_args()
    # The scripts run in the repository's folder, from where relative paths would lead elsewhere.
    options.out = options.out.resolve()
    options.data_dir = str(pathlib.Path(options.data_dir).resolve())
    if options.data.endswith(".npz"):
        options.data = str(pathlib.Path(options.data).resolve())
    found = measure(options)
    print_table(found)
    draw_chart(found, options, axis="images_seen", xlabel="images seen")
    draw_chart(found, options, axis="seconds", xlabel="seconds")


if __name__ == "__main__":
    main()
