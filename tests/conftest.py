import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A small .npz of 120 pictures in 3 classes that differ in brightness: scripts run on it in seconds."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 16, 16, 3)) + 80 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("pictures") / "own.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture
def script(tmp_path):
    """Runs a script of the repository as a user would; returns the finished process."""

    def call(*words, **more):
        command = [sys.executable, *(str(word) for word in words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **more)

    return call
