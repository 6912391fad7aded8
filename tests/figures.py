"""Draws figures/models.png, the strip of README: six tiles from a picture that each default run wrote, by hand.

    python tests/figures.py        # after the six default runs: it reads out/igpt/completions.png and so on
"""

import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from conftest import read_png  # noqa: E402

TILE = 96  # the side of a tile in the scripts' pictures; between two tiles lies a white gap
GAP = 2

# script -> its picture, and which tiles (row, column) of it to show: three rows of two
PANELS = {
    "igpt": ("completions.png", [(2, 1), (2, 3), (6, 1), (6, 4), (4, 1), (4, 3)]),
    "vit": ("rollout.png", [(0, 0), (1, 0), (0, 2), (1, 2), (0, 6), (1, 6)]),
    "clip": ("similarity.png", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
    "mae": ("reconstruction.png", [(0, 1), (0, 3), (1, 1), (1, 3), (4, 5), (4, 7)]),
    "jepa": ("predictions.png", [(0, 1), (0, 2), (1, 1), (1, 2), (3, 1), (3, 2)]),
    "repa": ("samples.png", [(5, 1), (5, 2), (4, 7), (3, 8), (4, 5), (4, 0)]),
}

LETTERS = {  # those of the six names, 5 wide and 8 high; # is black
    "a": "..... ..... .###. ....# .#### #...# .#### .....",
    "c": "..... ..... .###. #.... #.... #.... .###. .....",
    "e": "..... ..... .###. #...# ##### #.... .###. .....",
    "g": "..... ..... .#### #...# #...# .#### ....# .###.",
    "i": "..#.. ..... .##.. ..#.. ..#.. ..#.. .###. .....",
    "j": "...#. ..... ..##. ...#. ...#. ...#. #..#. .##..",
    "l": ".##.. ..#.. ..#.. ..#.. ..#.. ..#.. .###. .....",
    "m": "..... ..... ##.#. #.#.# #.#.# #.#.# #.#.# .....",
    "p": "..... ..... ####. #...# #...# ####. #.... #....",
    "r": "..... ..... #.##. ##... #.... #.... #.... .....",
    "t": ".#... .#... ###.. .#... .#... .#..# ..##. .....",
    "v": "..... ..... #...# #...# #...# .#.#. ..#.. .....",
}


def write_name(name, zoom=3):
    """-> (8 * zoom, W, 3) uint8, black on white."""
    rows = []
    for i in range(8):
        letters = [LETTERS[letter].split()[i] for letter in name]
        rows.append([0 if dot == "#" else 255 for dot in ".".join(letters)])
    return np.array(rows, np.uint8).repeat(zoom, 0).repeat(zoom, 1)[:, :, None].repeat(3, 2)


def draw_panel(name):
    """Name and six tiles of a script's picture -> (H, W, 3) uint8, with a white margin."""
    file, places = PANELS[name]
    sheet = read_png(ROOT / "out" / name / file).permute(1, 2, 0).numpy()  # (H, W, 3)
    step = TILE + GAP
    panel = np.full((40 + 3 * step, 2 * step + 16, 3), 255, np.uint8)
    word = write_name(name)
    panel[6:6 + word.shape[0], :word.shape[1]] = word
    for k, (row, column) in enumerate(places):
        tile = sheet[GAP + row * step:, GAP + column * step:][:TILE, :TILE]
        top = 40 + k // 2 * step
        left = k % 2 * step
        panel[top:top + TILE, left:left + TILE] = tile
    return panel


def main():
    strip = np.concatenate([draw_panel(name) for name in PANELS], axis=1)
    images = torch.from_numpy(strip).permute(2, 0, 1)[None]
    data.save_png(ROOT / "figures" / "models.png", images, columns=1, gap=0)


if __name__ == "__main__":
    main()
