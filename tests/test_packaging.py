"settings.ini is the one source: the other files repeat it, and the wheel made from it stands alone."
import ast, os, re, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from refusing import refusing

root = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters="=", interpolation=None)
ini.read(root/"settings.ini")
settings = ini["DEFAULT"]


def required(*keys): return [r for key in keys for r in settings[f"{key}requirements"].split()]


def test_environment_repeats_the_requirements():
    environment = yaml.safe_load((root/"environment.yml").read_text())
    names = [d for d in environment["dependencies"] if isinstance(d, str)]
    listed = [p for d in environment["dependencies"] if isinstance(d, dict) for p in d["pip"] if not p.startswith("-")]
    assert listed == required("", "notebook_") and names == [f"python>={settings['min_python']}", "pip"]


def test_constraints_cover_all_and_hold_no_address():
    lines = (root/"constraints.txt").read_text().splitlines()
    for line in lines: assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [\w .'<>=()*!]+)?", line), line
    pinned = {}
    for line in lines: pinned.setdefault(Requirement(line).name, []).append(Requirement(line).specifier)
    for r in map(Requirement, required("", "notebook_", "figures_", "dev_")):
        assert r.name in pinned, f"{r.name} is not in constraints.txt: make constraints"
        for pin in pinned[r.name]: assert next(iter(pin)).version in r.specifier, f"{r} against {pin}: make constraints"


def test_versions_agree():
    said = yaml.safe_load((root/"CITATION.cff").read_text())["version"]
    code = ast.parse((root/"m2mkd/__init__.py").read_text()).body
    (own,) = (n.value.value for n in code if "__version__" in map(ast.unparse, getattr(n, "targets", ())))
    assert said == own == settings["version"] and f"## {said}" in (root/"CHANGELOG.md").read_text()


def test_installed_as_required():
    for r in map(Requirement, required("", "notebook_", "figures_", "dev_")): assert r.specifier.contains(version(r.name), prereleases=True), r


NEEDS = """
import importlib, pkgutil
import m2mkd
assert m2mkd.__version__ == "{version}", m2mkd.__version__
assert "{site}" in m2mkd.__file__, m2mkd.__file__
names = [m.name for m in pkgutil.iter_modules(m2mkd.__path__)]
for name in names: importlib.import_module(f"m2mkd.{name}")
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what belongs to it."
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        (source/name).write_bytes((root/name).read_bytes())
    (source/"m2mkd").mkdir()
    for f in (root/"m2mkd").glob("*.py"): (source/"m2mkd"/f.name).write_bytes(f.read_bytes())
    run = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", dist, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(dist.glob("*.whl"))


def test_wheel_imports_with_the_run_time_requirements_alone(wheel, tmp_path):
    site = tmp_path/"site"
    zipfile.ZipFile(wheel).extractall(site)                              # a pure wheel is its own installed form
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    asked = [r for r in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in r]
    assert sorted(map(str, map(Requirement, asked))) == sorted(map(str, map(Requirement, required(""))))
    assert {r for r in re.findall(r"^Provides-Extra: (.*)$", metadata, re.M)} == {"notebooks", "dev"}
    refused = {Requirement(r).name.replace("-", "_") for r in required("notebook_", "dev_")} | {"IPython", "jupyter_client", "nbformat"}
    refused -= {"tensorboard"}                                           # others look for it by themselves
    code = refusing(refused) + NEEDS.replace("{version}", settings["version"]).replace("{site}", str(site))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(list((root/"m2mkd").glob("*.py"))) - 1             # all but __init__
