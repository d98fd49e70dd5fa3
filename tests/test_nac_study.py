"The notebook of the NAC study, with the parameters of its committed run."
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from m2mkd import core
from m2mkd.core import Parameters, read_json
from m2mkd.pipeline import Lab
from m2mkd.study import Study
from m2mkd.where import Here

root = Path(__file__).resolve().parents[1]
NOTEBOOK, MICRO = root/"nbs/experiments/nac_tiny_imagenet.ipynb", root/"runs/nac_tiny_imagenet/micro"


@pytest.fixture
def cells(monkeypatch, tmp_path):
    "Code cells, where no image is loaded: a record says what its hash needs of them."
    shutil.copytree(MICRO, tmp_path/"micro")
    (stage,) = (MICRO/"stages").glob("E2E_scale-free-s0-*")
    record, values = read_json(stage/"settings.json"), read_json(MICRO/"settings.json")["parameters"]
    class Images(SimpleNamespace):
        def __len__(self): return 1
    sets = [Images(classes=record["classes"], image_size=record["image_size"])] * 2
    def images(lab, task=None):
        lab.sets[task or lab.task] = *sets, record["images"]
        return sets
    monkeypatch.setattr(Lab, "images", images)
    monkeypatch.setattr(Lab, "map", lambda lab, *job: Here().map(*job))
    given = Parameters(values | {"runs": str(tmp_path/"micro")}, values)
    monkeypatch.setattr(core, "parameters", lambda: given)
    found = nbformat.read(NOTEBOOK, as_version=4).cells
    return [c.source for c in found if c.cell_type == "code"]


def test_committed_stages_are_found_again(cells):
    "All arms, the control of one seed too; then weights are asked for, which are not in git."
    space = {}
    with pytest.raises(FileNotFoundError, match="E2E_scale-free.* weights are not in git"):
        for cell in cells: exec(cell, space)
    found, kept = space["study"], Study.read(MICRO)
    assert found.rows == kept.rows and len(found.rows) == 25 and found.factors == kept.factors
    for said in ("question", "data", "baseline", "primary"):
        assert getattr(found, said) == getattr(kept, said)
    assert list(found.contrasts) == list(kept.contrasts)
    names = {k for k in found.parameters if found.parameters[k] != kept.parameters.get(k)}
    assert names == {"runs"} and found.parameters.keys() == kept.parameters.keys()
