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


HEAVY = ("kornia", "datasets", "sklearn", "torchmetrics", "pandas", "pyarrow", "matplotlib", "seaborn",
         "networkx", "scipy.stats", "scipy.optimize", "IPython")
EXPECTED = "torchmetrics", "pandas", "pyarrow", "matplotlib", "scipy.stats", "scipy.optimize"
LISTED = "import {module}, sys\nprint(*sys.modules)"


@pytest.fixture(scope="module")
def loaded(): return set(python(LISTED.format(module="m2mkd.pipeline, m2mkd.nac")).split())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xfail(n in EXPECTED, reason=(
    "evaluate's torchmetrics and pipeline's pandas are still to be loaded when used"))) for n in HEAVY])
def test_loaded_when_used(loaded, name):
    assert "m2mkd.pipeline" in loaded and name not in loaded


NEUTRAL = """
import pickle, random, sys
import numpy as np, torch, timm
def states(): return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
before = states()
for name in {names}:
    __import__(name)
    assert states() == before, name
"""


def test_what_is_loaded_late_draws_no_random_number():
    "Else the first block of `seeded` in which it is loaded would differ from the second."
    names = [n for n in HEAVY if n not in ("IPython", "seaborn", "matplotlib")]
    python(NEUTRAL.format(names=[*names, "kornia.enhance", "pyarrow.parquet", "sklearn.datasets"]))
