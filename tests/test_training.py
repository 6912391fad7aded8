"""What the training loops of all six scripts have in common."""

import importlib

import pytest
import torch

import clip
import data
import igpt
import jepa
import mae
import repa
import vit

SMALL = ["--dim", 16, "--depth", 2, "--heads", 2, "--batch-size", 16, "--device", "cpu", "--precision", "fp32"]
MORE = {
    "vit": [],
    "mae": ["--decoder-dim", 8, "--decoder-depth", 1, "--decoder-heads", 2],
    "jepa": ["--predictor-dim", 8, "--predictor-depth", 1, "--masking", "random"],
    "igpt": ["--image-size", 8, "--colors", 8],
    "clip": ["--text-dim", 16, "--text-depth", 1, "--text-heads", 2, "--embed-dim", 16],
    "repa": ["--teacher", "random", "--projector-dim", 8, "--align-depth", 1, "--samples", 8, "--sample-steps", 2],
}


@pytest.mark.parametrize("name", MORE)
def test_each_step_augments_clips_and_has_its_learning_rate(name, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "probe_scores", lambda *args: {})  # probes take longer than the training here
    monkeypatch.setattr(data, "linear_probe", lambda *args, **more: 0.0)
    calls = []
    rates = []
    step = torch.optim.AdamW.step
    clip_norm = torch.nn.utils.clip_grad_norm_
    augment = data.augment

    def spy_step(optimizer, *args, **more):
        calls.append("step")
        rates.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:  # vectors have no weight decay (step 6 is one of repa.py's small CNN)
            assert len(rates) > 5 or group["weight_decay"] == 0 or all(p.ndim > 1 for p in group["params"])
        return step(optimizer, *args, **more)

    def spy_clip(parameters, max_norm):
        calls.append(f"clip {max_norm}")
        return clip_norm(parameters, max_norm)

    def spy_augment(*args, **more):
        calls.append("augment")
        return augment(*args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    module = importlib.import_module(name)
    words = ["--data", pictures, "--data-dir", pictures.parent, *SMALL, *MORE[name], "--steps", 5, "--warmup", 2]
    args = module.parse_args([str(word) for word in (*words, "--out", tmp_path)])
    if name != "repa":  # its images are not changed, as the teacher's tokens are computed once
        monkeypatch.setattr(data, "augment", spy_augment)
    module.train(args)
    if name == "repa":
        assert calls[:10] == ["clip 1.0", "step"] * 5  # then the small CNN is trained
    else:
        assert calls == ["augment", "clip 1.0", "step"] * 5
    expected = [module.learning_rate(n, args) for n in range(5)]
    assert expected[0] < expected[1] < expected[2] == args.lr > expected[3] > expected[4] > 0
    assert rates[:5] == [pytest.approx([rate] * len(rates[0])) for rate in expected]


@pytest.mark.parametrize("name", MORE)
def test_help_names_every_option(name, script):
    """test_repository.py asks each option for a sentence; here the page is printed."""
    done = script(f"{name}.py", "--help")
    assert done.returncode == 0
    options = done.stdout[done.stdout.index("options:"):]
    for key in vars(importlib.import_module(name).parse_args([])):
        if key != "mlp_ratio":  # of one size of jepa.py, no option
            assert f"  --{key.replace('_', '-')}" in options, key


def test_the_papers_sizes_have_the_papers_heads():
    heads = {"Ti": 3, "S": 6, "B": 12, "L": 16, "H": 16, "XL": 16, "g": 16}
    for module in (vit, mae, jepa, repa):
        for size, words in module.SIZES.items():
            if size in heads:
                assert words["heads"] == heads[size], (module.__name__, size)
    assert all(words["decoder_heads"] == 16 for size, words in mae.SIZES.items() if size in "BLH")
    assert {size: words["patch_size"] for size, words in vit.SIZES.items()} == {
        "tiny": 4, "Ti": 16, "S": 16, "B": 16, "L": 16, "H": 14}
    assert [igpt.SIZES[size]["heads"] for size in ("S", "M", "L", "XL")] == [8, 8, 16, 24]


def test_files_of_released_widths_get_the_heads_of_their_size():
    for module in (vit, mae, jepa, repa):
        for words in module.SIZES.values():
            assert data.ENCODER_HEADS.get(words["dim"], words["heads"]) == words["heads"], (module.__name__, words)
    for words in mae.SIZES.values():
        assert data.DECODER_HEADS.get(words["decoder_dim"], words["decoder_heads"]) == words["decoder_heads"]
    for size in ("S", "M", "L", "XL"):
        assert data.IGPT_HEADS[igpt.SIZES[size]["dim"]] == igpt.SIZES[size]["heads"]
    for size, words in clip.SIZES.items():
        if size != "tiny":
            assert data.CLIP_TEXT_HEADS[words["text_dim"]] == words["text_heads"]
            if words["image_encoder"] == "vit":
                assert data.CLIP_IMAGE_HEADS[words["dim"]] == words["heads"]
