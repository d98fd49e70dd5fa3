"What `make figures` promises: everything that is drawn comes from the records, without torch."
import importlib.util, json, os, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from m2mkd.core import read_json
from m2mkd.pages import runs_in
from m2mkd.report import alt_of
from m2mkd.results import Results
from refusing import refusing
from test_imports import MAKERS
from test_study import Made, two_arms

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("figures", root/"tools/figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

RUN = """
import runpy, socket
def connect(*args): raise OSError("there is no network")
socket.socket.connect = connect
runpy.run_path("tools/figures.py", run_name="__main__")
"""


def not_installed():
    "Top-level modules that are here, and not where only `figures_requirements` are installed."
    ini = ConfigParser(delimiters="=", interpolation=None)
    ini.read(root/"settings.ini")
    wanted, found = ini["DEFAULT"]["figures_requirements"].split(), {"m2mkd"}
    while wanted:
        need = Requirement(wanted.pop())
        if (need.marker and not need.marker.evaluate({"extra": ""})) or need.name in found: continue
        found.add(need.name)
        wanted += requires(need.name) or ()
    plain = {name.lower().replace("_", "-") for name in found}
    return {module for module, names in packages_distributions().items()
            if not plain & {name.lower().replace("_", "-") for name in names}}


@pytest.fixture(scope="module")
def drawn():
    "(exit status, what is said) of tools/figures.py in a checkout, without torch and a network."
    missing = not_installed()
    assert {*MAKERS} <= missing
    def run(place, **variables):
        run = subprocess.run([sys.executable, "-c", refusing(missing) + RUN], cwd=place,
                             capture_output=True, text=True, env={**os.environ, **variables})
        return run.returncode, run.stdout + run.stderr
    return run


def git(place, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *words], cwd=place, capture_output=True, text=True,
                          check=True).stdout


def commit(place):
    git(place, "init", "-q"), git(place, "add", "-A"), git(place, "commit", "-q", "-m", "all")

# --- a small checkout: a study with a notebook, and a benchmark without ---

PLACE = """
from m2mkd.folder import figures_folder, runs_folder
place = runs_folder(f"vmoe_tiny_imagenet/{P.study}", P.runs)
pictures = place if P.smoke or P.runs else figures_folder()
assert (P.smoke, P.runs, P.seeds, P.new) == (False, "", [0, 1, 2], "as it is")
"""
CELLS = [
    ("parameters", 'smoke: bool = True  # small\nstudy: str = "other"  # name\n'
                   'runs: str = ""  # folder\nseeds: list[int] = [0]  # of students\n'
                   'new: str = "as it is"  # after the run'),
    ("", "from m2mkd.core import parameters\n\nP = parameters()"),
    ("make", "import torch"), ("", PLACE), ("make", "study = torch.nothing"),
    ("read", "from m2mkd.pages import accuracy\nfrom m2mkd.report import intervals, save\n"
             "from m2mkd.study import Study"),
    ("read", "study = Study.read(place)\naccuracy(study)"),
    ("read", 'fig = intervals(study)\n'
             'name = f"vmoe_tiny_imagenet_{P.study}_end.svg"\n'
             'save(fig, pictures/name, alt="m2mKD is ahead.")\nfig')]


def notebook(path, cells):
    code = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []})
            for tag, source in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=code), path)


EMPTY = "# a\n\n<!-- results -->\nold\n<!-- /results -->\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, drawn):
    "A checkout, drawn once and committed; and what was said."
    place = tmp_path_factory.mktemp("checkout")
    for name in ("m2mkd", "tools"):
        shutil.copytree(root/name, place/name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", ".gitignore"): shutil.copy(root/name, place/name)
    (place/"README.md").write_text(EMPTY)
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(EMPTY.strip())])
    (place/"nbs").mkdir()
    (place/"nbs/index.ipynb").write_text(json.dumps(index, indent=1) + "\n")
    made = Made(place/"runs/vmoe_tiny_imagenet/two_arms")
    made.study(two_arms(made), question="Help?", data="made up", primary="m2mKD", parameters=dict(
        smoke=False, study="two_arms", runs="elsewhere", seeds=[0, 1, 2], gone=3)).save()
    speed = Results(place/"runs/speed/cpu", "Fast?", dict(smoke=False))
    speed.main = "fast"
    speed.save()
    Results(place/"runs/speed/smoke", "Fast?").save()
    notebook(place/"nbs/experiments/vmoe_tiny_imagenet.ipynb", CELLS)
    status, said = drawn(place)
    assert status == 0, said
    commit(place)
    return place, said


def test_a_run_is_drawn_with_its_parameters(checkout):
    place, said = checkout
    assert alt_of(place/"figures/vmoe_tiny_imagenet_two_arms_end.svg") == "m2mKD is ahead."
    assert "runs/vmoe_tiny_imagenet/two_arms: its notebook no longer has gone\n" in said
    assert "runs/speed/cpu: there is no nbs/experiments/speed.ipynb" in said
    assert "2 runs, 1 figures" in said


def test_pages_show_figures_and_lead_to_metrics(checkout):
    place, _ = checkout
    run = place/"runs/vmoe_tiny_imagenet/two_arms"
    page, index = (run/"README.md").read_text(), (place/"runs/README.md").read_text()
    assert "![m2mKD is ahead.](../../../figures/vmoe_tiny_imagenet_two_arms_end.svg)" in page
    assert "(vmoe_tiny_imagenet/two_arms/README.md)" in index and "smoke" not in index
    assert "(../figures/vmoe_tiny_imagenet_two_arms_end.svg)" in index
    assert "fast" in (place/"runs/speed/cpu/README.md").read_text()
    assert not (place/"runs/speed/smoke/README.md").exists()


def test_results_stand_in_the_readme_and_its_notebook(checkout):
    place, _ = checkout
    readme = (place/"README.md").read_text()
    (cell,) = nbformat.read(place/"nbs/index.ipynb", as_version=4).cells
    assert cell.source == readme.replace("](runs/", "](../runs/").strip() and "\nold" not in readme
    assert "ahead of end-to-end training in 1 of 1 comparisons" in readme
    assert "| **+3.3** (+1.9 to +4.8), n = 3 | not run |" in " ".join(readme.split())


def test_a_second_time_changes_nothing(checkout, drawn, tmp_path):
    "Whatever the user's own style and folder of runs are."
    place, _ = checkout
    (tmp_path/"style").write_text("font.size: 30\nsvg.fonttype: none\n")
    status, said = drawn(place, MATPLOTLIBRC=str(tmp_path/"style"), M2MKD_RUNS=str(tmp_path/"runs"))
    assert status == 0 and git(place, "status", "--porcelain") == "", said


def test_what_fails_is_named_and_no_page_is_touched(checkout, drawn, tmp_path):
    place = tmp_path/"copy"
    shutil.copytree(checkout[0], place, symlinks=True)
    notebook(place/"nbs/experiments/vmoe_tiny_imagenet.ipynb",
             [*CELLS[:-1], ("read", "\n1 / 0\nsave()")])
    notebook(place/"nbs/experiments/speed.ipynb", [("", "import torch.nn as nn")])
    (place/"README.md").write_text(EMPTY)
    status, said = drawn(place)
    assert status == 1 and (place/"README.md").read_text() == EMPTY
    for run, cell in (
            ("vmoe_tiny_imagenet/two_arms", "8 of nbs/experiments/vmoe_tiny_imagenet.ipynb (1 / 0) "
             "fails: ZeroDivisionError: division by zero"),
            ("speed/cpu", "1 of nbs/experiments/speed.ipynb (import torch.nn as nn) fails: Mod")):
        assert f"runs/{run}: code cell {cell}" in said
    assert len(said.splitlines()) == 3, said                  # and what the notebook no longer has


def test_a_figure_is_of_the_longest_name_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "root", tmp_path)
    (tmp_path/"figures").mkdir()
    for name in ("a_b_x", "a_b_c_x", "a_bc_x", "d_x"): (tmp_path/f"figures/{name}.svg").touch()
    runs = [tmp_path/"runs/a/b", tmp_path/"runs/a/b_c"]
    its = {run.name: [svg.stem for svg in found] for run, found in figures.figures_of(runs).items()}
    assert its == {"b": ["a_b_x"], "b_c": ["a_b_c_x"]}


@pytest.mark.parametrize("text", ["none", EMPTY + EMPTY, EMPTY.replace("/", "")])
def test_the_block_of_results_is_there_once(text):
    with pytest.raises(ValueError, match="README.md should have <!-- results --> and"):
        figures.replaced(text, "new", root/"README.md")


@pytest.mark.parametrize("cells, said", [
    ([("", "1 +")], "SyntaxError"), ([("", "import sys\nsys.exit()")], "SystemExit"),
    ([("parameters", "a: int = 1\nseeds: list = x")], "parameter seeds: x cannot be read"),
    ([("", "place = '/elsewhere'")], "reads /elsewhere with this run's parameters: its `place`"),
    ([("parameters", "seeds: int = 0"), ("", "from m2mkd.core import parameters\nparameters()")],
     "code cell 2 of nbs/experiments/a.ipynb .from m2mkd.core import parameters. fails: "
     "ValueError: parameter seeds = .0, 1.")])
def test_a_sentence_says_what_is_wrong_with_a_notebook(tmp_path, monkeypatch, cells, said):
    monkeypatch.setattr(figures, "root", tmp_path)
    run, path = tmp_path/"runs/a/b", tmp_path/"nbs/experiments/a.ipynb"
    Results(run, "Why?", dict(seeds=[0, 1])).save()
    notebook(path, cells)
    with pytest.raises(ValueError, match=said) as e: figures.draw(run, path)
    assert "\n" not in str(e.value)

# --- the repository itself ---

def test_a_clone_redraws_all_that_is_committed(drawn, tmp_path):
    "Each figure, page and number, without torch, data and a network."
    found = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=root,
                           capture_output=True, text=True)
    if found.returncode: pytest.skip("not a git checkout")
    for name in filter(None, found.stdout.split("\0")):
        if not (root/name).is_file(): continue
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/name, tmp_path/name)
    commit(tmp_path)
    status, said = drawn(tmp_path)
    assert status == 0 and git(tmp_path, "status", "--porcelain") == "", said


def test_a_seeds_metrics_are_three_clicks_away():
    assert "](runs/README.md)" in (root/"README.md").read_text()
    for run in runs_in(root/"runs"):
        assert f"]({run.relative_to(root/'runs')}/README.md)" in (root/"runs/README.md").read_text()
        its, page = read_json(run/"results.json"), (run/"README.md").read_text()
        for row in its.get("arms", ()): assert f"(stages/{row['stage']}/metrics.jsonl)" in page
