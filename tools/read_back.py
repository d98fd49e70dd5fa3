"""Reads the kernels of the NAC study's graphs back from the committed figure that drew them, once:
the weights that they came from are gone. `python tools/read_back.py` writes graphs.json.

The figure holds a picture a kernel: a square of one colour a node pair, seaborn's rocket_r over
0..1 in 256 steps. So a value is known to 1/512 (the middle of its step), and no link is missed: the
kernel is truncated, its smallest value is 0.39. The number of links is that of the titles."""
import base64, io, json, re, subprocess
from pathlib import Path

import numpy as np
import seaborn as sns
from PIL import Image

from m2mkd.core import whole

COMMIT, FIGURE = "60d1452", "figures/nac_tiny_imagenet_micro_graphs.svg"
NODES, PLACE = 32, Path("runs/nac_tiny_imagenet/micro/graphs.json")


def kernel(png):
    "The kernel (NODES, NODES) of a picture; its rows run from the bottom."
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)[::-1]
    at = [((np.arange(NODES) + 0.5) * n / NODES).astype(int) for n in pixels.shape[:2]]
    colours = sns.color_palette("rocket_r", as_cmap=True)(np.arange(256), bytes=True)[:, :3]
    far = np.abs(pixels[np.ix_(*at)][:, :, None] - colours.astype(int)).sum(-1)
    step = far.argmin(-1)
    assert not far.min(-1).any() and (step == step.T).all() and (step.diagonal() == 255).all()
    return np.where(step == 0, 0, np.where(step == 255, 1, (step + 0.5) / 256))


def links(kernel):
    "[node, node, value] of each pair of nodes with a link."
    a, b = np.nonzero(np.triu(kernel, 1))
    return [[int(i), int(j), round(float(kernel[i, j]), 3)] for i, j in zip(a, b)]


def graphs(svg):
    "A dict a picture: prior, when, links; a ValueError where a title says another number of links."
    pictures = re.findall(r"data:image/png;base64,\s*([\w+/=\s]+)\"", svg)
    titles = re.findall(r"<!-- ([\w-]+), (\w+) -->.*?<!-- (\d+) links -->", svg, re.S)
    for picture, (prior, when, number) in zip(pictures, titles, strict=True):
        found = links(kernel(base64.b64decode(picture)))
        if len(found) != int(number): raise ValueError(f"{prior}, {when}: {len(found)} links")
        yield dict(prior=prior, when=when, links=found)


if __name__ == "__main__":
    show = ["git", "show", f"{COMMIT}:{FIGURE}"]
    svg = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    lines = ",\n  ".join(json.dumps(g) for g in graphs(svg))
    source = (f"read back from {FIGURE} at commit {COMMIT} by tools/read_back.py, to 1/512; nodes "
              "in the order of the figure (clustered by the kernel before training); links as "
              "[node, node, expected kernel]; first seed")
    with whole(PLACE) as p:
        p.write_text(f'{{"source": "{source}",\n "nodes": {NODES},\n "graphs": [\n  {lines}]}}\n')
