"What may be imported when: no torch where nothing is trained, nothing heavy before it is used."
import os, re, subprocess, sys
from importlib import import_module
from pathlib import Path

import pytest

import m2mkd

from refusing import refusing

root = Path(__file__).resolve().parents[1]

TORCH_FREE = ("bars", "core", "folder", "lock", "pages", "report", "results", "stage", "stats",
              "stop", "study", "tables")
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
    return python(refusing(MAKERS) + code)


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
         "networkx", "scipy.stats", "scipy.optimize", "IPython", "loky")
LISTED = "import {module}, sys\nprint(*sys.modules)"


@pytest.fixture(scope="module")
def loaded(): return set(python(LISTED.format(module="m2mkd.pipeline, m2mkd.nac")).split())


@pytest.mark.parametrize("name", HEAVY)
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


@pytest.mark.parametrize("name", m2mkd.__all__)
def test_every_name_that_is_offered_is_there(name):
    value = getattr(m2mkd, name)
    assert value is getattr(import_module(f"m2mkd.{m2mkd._home[name]}"), name) and callable(value)


def test_no_name_that_is_offered_hides_a_module():
    modules = {f.stem for f in (root/"m2mkd").glob("*.py")}
    assert not modules & {*m2mkd.__all__} and len(m2mkd.__all__) == len({*m2mkd.__all__})
    assert {*m2mkd.__all__} | {m for m in modules if m[0] != "_"} <= {*dir(m2mkd)}


@pytest.mark.parametrize("name,said", [
    ("Lb", "m2mkd has no 'Lb'; nearest: Lab"), ("Distilation", "nearest: Distillation"),
    ("evaluat", "nearest: evaluate"), ("VIT", "nearest: ViT"), ("quux", "there are: Lab, ")])
def test_an_unknown_name_gets_the_nearest(name, said):
    assert not hasattr(m2mkd, name)
    with pytest.raises(AttributeError, match=re.escape(said)): getattr(m2mkd, name)
    with pytest.raises(ImportError, match=name): exec(f"from m2mkd import {name}")


ALONE = """
import sys
before = set(sys.modules)
import m2mkd
assert m2mkd.__version__ and m2mkd.__doc__ and "Lab" in dir(m2mkd) and not hasattr(m2mkd, "Lb")
new = {n.partition(".")[0] for n in set(sys.modules) - before} - sys.stdlib_module_names
assert new == {"m2mkd"}, new
from m2mkd import parameters, core
assert parameters is core.parameters
"""


def test_the_package_alone_loads_nothing_but_itself(): without_torch(ALONE)


MODULES = """
from m2mkd import nac, evaluate, Lab
import m2mkd.data, types
from m2mkd.evaluate import evaluate as function
assert all(isinstance(m, types.ModuleType) for m in (nac, evaluate, m2mkd.data, m2mkd.convert))
assert evaluate is m2mkd.evaluate and evaluate.evaluate is function and nac.preset("micro")
"""


def test_a_module_stays_a_module_under_its_name(): python(MODULES)
