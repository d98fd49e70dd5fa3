"""Each committed study is found again by its own notebook: with its parameters, the cells that make
ask for the study's stages, by hash, and for no other. No data, no weights, nothing is trained."""
import ast, shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from m2mkd import core
from m2mkd.core import hash_of, read_json
from m2mkd.data import Data
from m2mkd.pipeline import Lab
from m2mkd.stage import Stage, stages_in
from m2mkd.where import Here

root = Path(__file__).resolve().parents[1]
STUDIES = "vmoe_tiny_imagenet/one_set", "vmoe_tiny_imagenet/transfer", "vmoe_routing/three_routings"


class Images(SimpleNamespace):
    "What a notebook and a lab ask of a set of images: its classes, size and number."
    split, ids = "none", SimpleNamespace(tolist=list)
    def __len__(self): return self.n


def as_recorded(record):
    """A record as the committed stages have it: everything decayed; the first ones did not name
    their files, and the first tables of hybrids not their images."""
    if record.get("training"):
        record = {**record, "training": {**record["training"], "decay": "all"}}
    for left_out in (None, "files", "images"):
        yield {k: v for k, v in record.items() if k != left_out}


class Committed:
    "A committed study in place of a Lab's work: `asked` are the hashes of the stages it gave."
    def __init__(self, folder):
        self.stages, self.asked = stages_in(folder), set()
        self.tasks = {hash_of(s.settings["task"]): s for s in self.stages.values()
                      if s.settings.get("training")}

    def images(self, lab, task=None):
        stage = self.tasks[hash_of(task := task or lab.task)]
        record = stage.settings
        classes, a_class = tuple(record["classes"]), record["task"]["train"]["per_class"]
        n = len(classes) * a_class if a_class else 25_000              # in one file of four
        found = Images(classes=classes, image_size=record["image_size"], n=n)
        assert n // record["training"]["batch_size"] == stage.done["steps"] // stage.done["epochs"]
        lab.sets[task] = found, found, record["images"]
        return found, found

    def find(self, records, inputs, run, seed):
        return [self.one(f"{n}-s{seed}", r, tuple(inputs)) for n, r in records.items()]

    def one(self, name, record, inputs):
        known = [d for d in map(hash_of, as_recorded(record)) if d in self.stages]
        assert known, f"the study has no stage {name} with this record"
        assert self.stages[known[0]].path.name == f"{name}-{known[0]}"
        self.asked |= {known[0]}
        return Stage(self.stages[known[0]].path, inputs)


def cells(path, given):
    """The sources of the cells that make: the parameters, those `given` that differ from them (as
    papermill injects them), the others."""
    found = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    own = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(found[0].source).body}
    mine = [f"{k} = {v!r}" for k, v in given.items() if k in own and own[k] != v]
    rest = [c.source for c in found[1:] if "read" not in c.metadata.get("tags", ())]
    return [found[0].source, "\n".join(["# Parameters", *mine]), *rest]


def run(sources, monkeypatch):
    "Run cells as a kernel would, with the history that `parameters` reads."
    history, names = [], {}
    shell = lambda: SimpleNamespace(user_ns={"In": history})
    monkeypatch.setattr(core, "get_ipython", shell, raising=False)
    for source in sources:
        history.append(source)
        exec(source, names)
    return names


@pytest.mark.parametrize("study", STUDIES)
def test_a_committed_study_is_found_by_its_notebook(study, tmp_path, monkeypatch):
    settings = read_json(root/"runs"/study/"settings.json")
    shutil.copytree(root/"runs"/study, tmp_path/study)
    monkeypatch.setenv("M2MKD_RUNS", str(tmp_path))
    committed = Committed(tmp_path/study)
    monkeypatch.setattr(Lab, "images", lambda lab, task=None: committed.images(lab, task))
    monkeypatch.setattr(Lab, "_stages", lambda lab, *asked: committed.find(*asked))
    monkeypatch.setattr(Lab, "map", lambda lab, *job: Here().map(*job))
    monkeypatch.setattr(Data, "load", lambda data: Images(classes=(), n=0))
    notebook = root/f"nbs/experiments/{settings['experiment']}.ipynb"
    run(cells(notebook, settings["parameters"]), monkeypatch)
    assert committed.asked == set(committed.stages)
    saved, said = read_json(tmp_path/study/"settings.json"), ("baseline", "primary", "data",
                                                              "contrasts", "question")
    assert {k: saved[k] for k in said} == {k: settings[k] for k in said}
    before, after = (read_json(place/study/"results.json") for place in (root/"runs", tmp_path))
    for part in ("main", "factors", "tuned"): assert after[part] == before[part]
    assert sorted(map(str, after["arms"])) == sorted(map(str, before["arms"]))
    for name, table in after["tables"].items(): assert table == before["tables"][name]
