"""REPA's question, by hand: how many steps does a teacher save, and what in it does so?

    python jepa.py                                               # a teacher: out/jepa/checkpoint.pt
    python tests/teachers.py --teacher out/jepa/checkpoint.pt    # seed 0: a training for each target
    python tests/teachers.py --table                             # the results of all seeds so far

The network, its start, the batches, times and noise are the same for all five targets of the alignment:

    plain       none: SiT as it was before REPA
    teacher     the teacher's tokens
    untrained   those of the same network with new random weights
    pixels      the clean pixels of the patch: no network at all
    irepa       the teacher's tokens as in iREPA (arXiv 2512.10794): normalized over the image, and with a 3 x 3
                convolution as projector

After the warm-up the learning rate is constant, so a long training passes through the results of a short one: each is
scored after a quarter, half and all of its steps, with the averaged weights. Results are kept in
out/teachers/results.json, and not measured again; frechet.svg shows them as curves, and samples.png stands in a folder
for each training. Other options are those of repa.py, for example, on a GPU:

    --data cifar10 --image-size 32 --patch-size 4 --dim 256 --depth 8 --heads 4 --align-depth 3 --batch-size 256
    --lr 0.004 --steps 1200 --samples 5000 --classifier-steps 4000 --compile

(of 24 such trainings one diverged, and one fell back near its end: a lower rate is safer).
"""

import argparse
import copy
import json
import math
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import jepa  # noqa: E402
import mae  # noqa: E402
import repa  # noqa: E402
import vit  # noqa: E402
from common import patchify  # noqa: E402

TARGETS = ["plain", "teacher", "untrained", "pixels", "irepa"]
MODELS = {"jepa": jepa.IJEPA, "mae": mae.MAE, "vit": vit.ViT}
# Four blocks come after the aligned one. 8 steps of Heun: sampling is half of the time here.
# 0.5 is the paper's weight of the alignment.
DEFAULTS = ["--depth", "6", "--align-depth", "2", "--steps", "600", "--lr", "0.004", "--sample-steps", "8",
            "--align", "0.5"]


# --------------------------------------------------------------------------------------------- the targets


class ConvProjector(nn.Module):
    """iREPA's projector: a 3 x 3 convolution over the grid of tokens, (B, N, D) -> (B, N, Z)."""

    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, teacher_dim, kernel_size=3, padding=1)
        nn.init.xavier_uniform_(self.conv.weight.flatten(1))
        nn.init.zeros_(self.conv.bias)

    def forward(self, h):
        side = math.isqrt(h.shape[1])
        h = h.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
        return self.conv(h).flatten(2).transpose(1, 2)


class NormalizedTeacher(nn.Module):
    """iREPA's targets: what differs between the patches of an image, without what all have in common."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.patch_size = teacher.patch_size
        self.mean = teacher.mean
        self.std = teacher.std

    def forward(self, images):
        tokens = self.teacher(images).float()  # (B, N, Z)
        tokens = tokens - tokens.mean(dim=1, keepdim=True)
        return tokens / (tokens.std(dim=1, keepdim=True) + 1e-6)


def untrained_teacher(options, seed):
    """A Teacher like that of --teacher, with new random weights."""
    content = data.load_checkpoint(options.teacher)
    trained = MODELS[content["script"]].from_pretrained(options.teacher)
    model = data.untrained(trained, seed)
    path = options.out / f"untrained-{seed}.pt"
    data.save_checkpoint(path, script=content["script"], model=model.state_dict(), args=content["args"])
    return repa.Teacher.from_pretrained(path)


def target_tokens(target, options, args, dataset, amp):
    """What each patch of the training images is aligned with: (images, N, Z) of length 1; None for plain SiT."""
    images = dataset.train_images
    if target == "plain":
        return None
    if target == "pixels":
        patches = patchify(dataset.normalize(images), args.patch_size)
        return F.normalize(patches, dim=-1).half()
    if target == "untrained":
        teacher = untrained_teacher(options, args.seed)
    else:
        teacher = repa.Teacher.from_pretrained(options.teacher)
    if target == "irepa":
        teacher = NormalizedTeacher(teacher)
    grid = args.image_size // args.patch_size
    return repa.teacher_tokens(teacher.to(images.device), dataset, images, grid=grid, amp=amp)


# --------------------------------------------------------------------------------------------- the runs


def score(ema, dataset, args, amp, cnn, classifier):
    """velocity: the error on test images. frechet: how far samples are from test images. agreement: how often the
    classifier finds in a sample the class that was asked for."""
    index = torch.arange(args.samples, device=dataset.test_labels.device)
    labels = dataset.test_labels[index % len(dataset.test_labels)]  # more samples than test images: the labels again
    real = dataset.test_images[:args.samples]
    made = repa.generate(ema, dataset, labels=labels, args=args, amp=amp)
    real_features = data.extract(cnn.features, dataset, real, amp)
    made_features = data.extract(cnn.features, dataset, made, amp)
    found = data.extract(classifier, dataset, made, amp).argmax(dim=1)
    return dict(
        velocity=repa.velocity_error(ema, dataset, amp),
        frechet=data.frechet(made_features, real_features),
        agreement=(found == labels).float().mean().item(),
    )


def train(target, options, args):
    """One training -> its scores after a quarter, half and all steps. The loop is that of repa.py."""
    device = data.pick_device(args.device)
    amp = data.autocast(device, args.precision)
    dataset = data.open_data(args, device)
    cnn = data.train_cnn(dataset, args.seed)
    classifier = data.train_cnn(dataset, args.seed, steps=options.classifier_steps)  # a better one
    tokens = target_tokens(target, options, args, dataset, amp)

    torch.manual_seed(args.seed)
    model = repa.build(args, teacher_dim=0 if tokens is None else tokens.shape[2])
    if target == "irepa":
        model.projector = ConvProjector(args.dim, tokens.shape[2])
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=device.type != "mps")
    loss_function = model.loss
    if args.compile:  # with the random numbers that it would draw without
        loss_function = torch.compile(model.loss, options={"fallback_random": True})
    results = []
    seconds = 0.0
    began = time.time()
    for step in range(args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)  # the same times and noise for each target
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / (args.warmup + 1))
        index = data.batch_index(len(dataset.train_images), args.batch_size, step, args.seed).to(device)
        images = dataset.normalize(dataset.train_images[index])
        z = None if tokens is None else tokens[index]
        with amp:
            loss, parts = loss_function(images, dataset.train_labels[index], z, align=args.align,
                                        label_dropout=args.label_dropout, times=args.times)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        repa.update_average(ema, model, step, limit=args.ema)
        if step + 1 in (args.steps // 4, args.steps // 2, args.steps):
            seconds += time.time() - began  # without the time of scoring
            if not math.isfinite(loss.item()):
                raise SystemExit(f"{target} {args.seed}: the loss is {loss.item():g} at step {step}; try a lower --lr")
            if args.label_dropout == 1:
                repa.use_null_class(ema)
            scores = score(ema, dataset, args, amp, cnn, classifier)
            alignment = parts["alignment"].item() if tokens is not None else None
            results.append(scores | dict(step=step + 1, alignment=alignment, seconds=seconds))
            print(target, args.seed, results[-1], flush=True)
            began = time.time()
    folder = options.out / f"{target}-{args.seed}"
    folder.mkdir(exist_ok=True)
    repa.draw_samples(ema, dataset, folder, args=args, amp=amp)
    results[-1]["probes"] = [accuracy for block, accuracy in repa.probe_by_block(ema, dataset, amp)]
    results[-1]["classifier"] = vit.score_classifier(classifier, dataset, amp)
    return results


# --------------------------------------------------------------------------------------------- the table


def steps_until(results, goal):
    """The step at which the Frechet distance of a run reaches a goal: between two scores, a straight line of both
    logarithms. None if it never does; the first scored step if it is below from there on."""
    if results[0]["frechet"] <= goal:
        return results[0]["step"]
    for before, after in zip(results, results[1:]):
        if after["frechet"] <= goal:
            share = math.log(before["frechet"] / goal) / math.log(before["frechet"] / after["frechet"])
            return before["step"] * (after["step"] / before["step"]) ** share
    return None


def times_fewer(run, plain):
    """By what factor a run needs fewer steps than plain SiT for the distance with which that one ends."""
    end = plain[-1]
    needed = steps_until(run, end["frechet"])
    if needed is None:
        return "< 1"
    return f"{end['step'] / needed:.2f}"


def cell(parts, key):
    """Mean and standard deviation of a score over the seeds."""
    values = [part[key] for part in parts]
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def print_table(results):
    """A row for each target. "times fewer steps": until plain's last Frechet distance, seed by seed."""
    seeds = sorted({name.split()[1] for name in results})
    steps = [part["step"] for part in next(iter(results.values()))]
    heads = ["target", "seeds", *(f"Frechet, {step} steps" for step in steps), "times fewer steps", "velocity error",
             "class found", "probe by block"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for target in TARGETS:
        runs = {seed: results[f"{target} {seed}"] for seed in seeds if f"{target} {seed}" in results}
        if not runs:
            continue
        cells = [target, str(len(runs))]
        for parts in zip(*runs.values()):  # the scores of all seeds after the same number of steps
            cells.append(cell(parts, "frechet"))
        factors = []
        for seed, run in runs.items():
            if f"plain {seed}" in results:
                factors.append(times_fewer(run, results[f"plain {seed}"]))
        cells.append(", ".join(factors))
        last = [run[-1] for run in runs.values()]
        cells.append(cell(last, "velocity"))
        cells.append(cell(last, "agreement"))
        blocks = zip(*[part["probes"] for part in last])  # for each block its accuracy in all seeds
        cells.append(" ".join(f"{statistics.mean(block):.3f}" for block in blocks))
        print("| " + " | ".join(cells) + " |")
    found = cell([run[-1] for run in results.values()], "classifier")
    print(f"test images whose class the classifier finds: {found}")


def draw_chart(results, out):
    """The Frechet distance of each target against the steps, the mean of its seeds: "training is easier", as curves."""
    series = {}
    for target in TARGETS:
        runs = [run for name, run in results.items() if name.split()[0] == target]
        series[target] = []
        for parts in zip(*runs):  # the scores of all seeds after the same number of steps
            distance = statistics.mean(part["frechet"] for part in parts)
            series[target].append((parts[0]["step"], distance))
    data.save_chart(out / "frechet.svg", series, "steps", "Frechet distance")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="the checkpoint of jepa.py, mae.py or vit.py")
    parser.add_argument("--seed", type=int, default=0, help="of images, start, batches and noise")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="in this order")
    parser.add_argument("--classifier-steps", type=int, default=600,
                        help="of the CNN that looks for the class asked for in each sample")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "teachers", help="the folder of results")
    parser.add_argument("--table", action="store_true", help="print the table alone")
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"

    def kept():
        return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}

    if not options.table:
        if not options.teacher:
            parser.error("--teacher is needed: the checkpoint of a run of jepa.py, mae.py or vit.py")
        words = [*DEFAULTS, "--seed", str(options.seed), *more]  # the last of two equal options counts
        for target in options.targets:
            name = f"{target} {options.seed}"
            if name not in kept():
                found = train(target, options, repa.parse_args(words))
                data.write_file(path, json.dumps(kept() | {name: found}, indent=1).encode())
    results = kept()
    if results:
        print_table(results)
        draw_chart(results, options.out)


if __name__ == "__main__":
    main()
