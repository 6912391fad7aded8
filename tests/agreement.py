"""Outputs of each model beside those of the authors' code, on the same random weights, by hand.

    pip install timm transformers                    # in an environment of its own
    git clone https://github.com/facebookresearch/mae       code/mae
    git clone https://github.com/facebookresearch/ijepa     code/ijepa
    git clone https://github.com/openai/CLIP                code/CLIP
    git clone https://github.com/sihyun-yu/REPA             code/REPA
    python tests/agreement.py --code code

Each line is one case: the other program builds a small model with random weights and saves it in its own format, our
`from_pretrained` reads that file, and both get the same input. Prints a Markdown table. What is not installed is named
and left out.
"""

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import clip  # noqa: E402
import igpt  # noqa: E402
import jepa  # noqa: E402
import mae  # noqa: E402
import repa  # noqa: E402
import vit  # noqa: E402

NORM = functools.partial(torch.nn.LayerNorm, eps=1e-6)


def randomize(model, std=0.05):
    """Adds noise to every parameter, so that none is zero or one and drops out of the comparison."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * std)
    return model.eval()


def save(folder, content):
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def load_file(path, name):
    """A module from its path alone: openai/CLIP's package has the name of our script."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------- the cases
#
# Each function takes a folder for the file of weights and the folder of the clones, and yields one or more Cases.


@dataclasses.dataclass
class Case:
    label: str  # which outputs are compared
    program: str  # with those of which program
    theirs: torch.nn.Module
    ours: torch.nn.Module
    their_run: object  # a function: input -> output tensor
    our_run: object
    x: torch.Tensor  # the input


def vit_cases(folder, code):
    import timm
    theirs = randomize(timm.models.VisionTransformer(64, 16, num_classes=10, embed_dim=192, depth=3, num_heads=3))
    ours = vit.ViT.from_pretrained(save(folder, theirs.state_dict()))
    yield Case("ViT, logits", "timm", theirs, ours, their_run=theirs, our_run=ours, x=torch.randn(2, 3, 64, 64))


def mae_cases(folder, code):
    """The authors' code is written for timm 0.3.2 and an older numpy: two names are put back."""
    import numpy
    import timm.models.vision_transformer as timm_vit
    numpy.float = float
    block = timm_vit.Block

    def block_with_qk_scale(*args, qk_scale=None, **kwargs):
        return block(*args, **kwargs)

    timm_vit.Block = block_with_qk_scale
    sys.path.insert(0, str(code / "mae"))
    import models_mae
    timm_vit.Block = block
    for norm_pix in (False, True):
        theirs = models_mae.MaskedAutoencoderViT(img_size=64, patch_size=16, embed_dim=192, depth=3, num_heads=3,
                                                 decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=2,
                                                 norm_layer=NORM, norm_pix_loss=norm_pix)
        randomize(theirs)
        ours = mae.MAE.from_pretrained(save(folder, dict(model=theirs.state_dict())), norm_pix=norm_pix, heads=3,
                                       decoder_heads=2)
        images = torch.randn(2, 3, 64, 64)

        def run(model, images):
            torch.manual_seed(0)  # both draw the noise of the mask by torch.rand(B, N)
            loss, pred, mask = model(images, mask_ratio=0.75)
            return torch.cat([loss[None], pred.flatten(), mask.flatten().to(pred.dtype)])

        label = "MAE, loss, pixels and mask" + (", norm_pix" if norm_pix else "")
        yield Case(label, "facebookresearch/mae", theirs, ours, their_run=functools.partial(run, theirs),
                   our_run=functools.partial(run, ours), x=images)


def igpt_cases(folder, code):
    import transformers
    config = transformers.ImageGPTConfig(vocab_size=65, n_positions=64, n_embd=512, n_layer=3, n_head=8)
    theirs = transformers.ImageGPTForCausalImageModeling(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if not name.endswith("bias"):  # the released models have none
                p.add_(torch.randn(p.shape) * 0.02)
    theirs.eval()
    ours = igpt.ImageGPT.from_pretrained(save(folder, theirs.state_dict()))
    tokens = torch.randint(64, (2, 64))

    def run(tokens):
        shifted = torch.cat([torch.full((2, 1), 64), tokens[:, :-1]], dim=1)  # 64: their start token
        return theirs(input_ids=shifted).logits

    yield Case("iGPT, logits", "transformers", theirs, ours, their_run=run, our_run=ours, x=tokens)


def clip_cases(folder, code):
    """Their LayerNorm computes in float32 always: here in the precision of its input."""
    model = load_file(code / "CLIP" / "clip" / "model.py", "openai_clip_model")
    model.LayerNorm.forward = torch.nn.LayerNorm.forward
    for label, layers, width, patch in [("ViT", 3, 768, 16), ("ResNet", (1, 2, 1, 1), 64, None)]:
        theirs = model.CLIP(embed_dim=64, image_resolution=64, vision_layers=layers, vision_width=width,
                            vision_patch_size=patch, context_length=77, vocab_size=100, transformer_width=512,
                            transformer_heads=8, transformer_layers=2)
        randomize(theirs, std=0.01)
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        ours = clip.CLIP.from_pretrained(save(folder, theirs.state_dict()))
        ids = torch.randint(1, 98, (3, 77))
        ids[:, 10] = 99  # [EOS], the largest id

        def run(model, images):
            logits = model(images, ids)
            return logits[0] if isinstance(logits, tuple) else logits  # theirs: also the transposed ones

        yield Case(f"CLIP {label}, logits", "openai/CLIP", theirs, ours, their_run=functools.partial(run, theirs),
                   our_run=functools.partial(run, ours), x=torch.randn(3, 3, 64, 64))


def jepa_cases(folder, code):
    sys.path.insert(0, str(code / "ijepa"))
    from src.models.vision_transformer import VisionTransformer, VisionTransformerPredictor
    more = dict(mlp_ratio=4, qkv_bias=True, norm_layer=NORM)
    encoder = VisionTransformer([64], 16, embed_dim=192, depth=3, num_heads=3, **more)
    predictor = VisionTransformerPredictor(16, 192, 96, 2, 3, **more)
    theirs = randomize(torch.nn.ModuleDict(dict(encoder=encoder, predictor=predictor)))
    content = dict(encoder=encoder.state_dict(), predictor=predictor.state_dict(), target_encoder=encoder.state_dict())
    ours = jepa.IJEPA.from_pretrained(save(folder, content), heads=3, predictor_heads=3)
    context_idx = torch.tensor([[0, 1, 5, 7], [2, 3, 8, 15]])
    target_idx = torch.tensor([[4, 10], [6, 9]])

    def run(images):
        z = encoder(images, [context_idx])
        return torch.cat([z.flatten(), predictor(z, [context_idx], [target_idx]).flatten()])

    def ours_run(images):
        z = ours.encoder(images, context_idx)
        return torch.cat([z.flatten(), ours.predictor(z, context_idx, target_idx).flatten()])

    yield Case("I-JEPA, context and predictions", "facebookresearch/ijepa", theirs, ours, their_run=run,
               our_run=ours_run, x=torch.randn(2, 3, 64, 64))


def time_table(t, dim, max_period=10000):
    """Their TimestepEmbedder.positional_embedding, in the precision of t; theirs is in float32 always."""
    frequencies = max_period ** (-torch.arange(dim // 2, dtype=t.dtype) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def repa_cases(folder, code):
    sys.path.insert(0, str(code / "REPA"))
    from models.sit import SiT, TimestepEmbedder
    from samplers import euler_sampler
    theirs = SiT("linear", input_size=8, patch_size=2, in_channels=4, hidden_size=384, decoder_hidden_size=384,
                 encoder_depth=2, depth=3, num_heads=6, num_classes=1000, use_cfg=True, z_dims=[768],
                 projector_dim=2048, qk_norm=False, fused_attn=True)
    TimestepEmbedder.positional_embedding = staticmethod(time_table)
    randomize(theirs)
    ours = repa.SiT.from_pretrained(save(folder, dict(ema=theirs.state_dict())))
    t = torch.tensor([0.3, 0.8])
    y = torch.tensor([5, 1000])  # 1000: no class

    def run(x):
        return theirs(x, t.to(x), y)[0]

    def ours_run(x):
        return ours(x, t.to(x), y)

    noise = torch.randn(2, 4, 8, 8)
    yield Case("SiT, velocity", "sihyun-yu/REPA", theirs, ours, their_run=run, our_run=ours_run, x=noise)

    def samples(noise):
        return euler_sampler(theirs, noise, torch.tensor([5, 7]), num_steps=20, heun=True, cfg_scale=1.8,
                             guidance_low=0.0, guidance_high=0.7)

    def our_samples(noise):
        return repa.sample(ours, noise, torch.tensor([5, 7]), steps=20, method="heun", cfg=1.8, interval=(0, 0.7))

    yield Case("SiT, samples by Heun, guidance 1.8", "sihyun-yu/REPA", theirs, ours, their_run=samples,
               our_run=our_samples, x=noise)


# ------------------------------------------------------------------------------------------ the comparison


@torch.no_grad()
def difference(case, dtype):
    """The largest difference of an output, divided by the largest absolute value of their output."""
    case.theirs.eval().to(dtype)
    case.ours.eval().to(dtype)
    x = case.x.to(dtype) if case.x.is_floating_point() else case.x
    theirs = case.their_run(x).double()
    ours = case.our_run(x).double()
    return ((theirs - ours).abs().max() / theirs.abs().max()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", default="code", type=pathlib.Path, help="The folder that holds the clones.")
    options = parser.parse_args()
    print("| output | their code | float64 | float32 |\n|---|---|---|---|")
    for cases in (vit_cases, mae_cases, igpt_cases, clip_cases, jepa_cases, repa_cases):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                for case in cases(pathlib.Path(folder), options.code):
                    exact = difference(case, torch.float64)
                    single = difference(case, torch.float32)
                    print(f"| {case.label} | {case.program} | {exact:.1e} | {single:.1e} |", flush=True)
            except (ImportError, FileNotFoundError) as error:
                print(f"{cases.__name__} is left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
