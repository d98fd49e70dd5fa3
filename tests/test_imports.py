"What may be imported when: no torch where nothing is trained, nothing heavy before it is used."
import os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

TORCH_FREE = "bars", "core", "lock", "stop"
MAKERS = ("torch", "torchvision", "timm", "safetensors", "kornia", "datasets", "accelerate",
          "torchmetrics")


def python(code):
    "What a fresh process prints that runs `code`."
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(root)})
    assert run.returncode == 0, run.stderr
    return run.stdout


def without_torch(code):
    "`python(code)` where what makes stages cannot be imported."
    return python(f"import sys\nsys.modules.update(dict.fromkeys({MAKERS}))\n{code}")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imported_without_torch(module): without_torch(f"import m2mkd.{module}")


SETTINGS = """
import numpy as np
from m2mkd.core import Settings, from_plain, hash_of, number, to_plain
class Lone(Settings):
    lr: float = 0.1
    depths: tuple = (1, 2)
assert number(np.float64(3)) == 3.0 and from_plain(to_plain(Lone(lr=np.float32(0.5)))) == Lone(lr=0.5)
print(hash_of(Lone(lr=0.5)))
"""


def test_settings_and_their_hash_need_no_torch():
    assert without_torch(SETTINGS) == python(f"import torch\n{SETTINGS}")
