"The notebook of own models: it runs from any folder, its models learn, and what its text shows does what it says."
import json, os, re, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1]/"nbs/experiments/own_models.ipynb"


def papermill(notebook, out, *arguments):
    run = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(out), *arguments], cwd=out.parent, capture_output=True,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The folder with the stages of one run of the notebook."
    folder = tmp_path_factory.mktemp("own_models")
    papermill(NOTEBOOK, folder/"out.ipynb", "-p", "runs", str(folder/"runs"))
    return folder/"runs"


def test_all_that_is_trained_learns(runs):
    results = json.loads((runs/"results.json").read_text())
    assert results["arms"].keys() == {"E2E from scratch", "m2mKD", "m2mKD, stitched", "teacher", "meta model"}
    assert min(results["arms"].values()) > 0.7 and results["bare"]["teacher"] > 0.7 and results["bare"]["student, fine-tuned"] > 0.5
    assert all(len(found) == 3 and min(found) > 0.6 for found in results["hybrids"].values())


def test_stages_hold_the_models_of_the_notebook(runs):
    models = {p.name.rsplit("-", 2)[0]: json.loads((p/"settings.json").read_text()).get("model") for p in (runs/'stages').iterdir() if p.is_dir()}
    assert models["teacher"]["class"] == "ConvNet" and models["m2mkd"]["class"] == "Mixer"
    assert models["distill-1"]["student"] == models["m2mkd"] and models["distill-1"]["meta"] == models["meta"]


def code_in_text(word):
    "The one Python block in the notebook's text that has `word`."
    text = "\n".join(c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "markdown")
    found, = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if word in block)
    return found


def my_set(root):
    "Class folders in train and val; the classes differ in brightness."
    for split, n in (("train", 64), ("val", 8)):
        for k, name in enumerate(("dark", "grey", "light")):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                noise = np.random.default_rng((k, i, n)).integers(80 * k, 80 * k + 90, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root/split/name/f"{i}.png")


def test_pretrained_teacher_and_own_images_of_the_text(tmp_path):
    "On class folders: the notebook up to its models, then the code of its text on a small ViT that is not downloaded, one epoch a stage."
    my_set(tmp_path/"my-set")
    small = 'name="deit_small_patch16_224", depths=(1, 1, 1), options=dict(embed_dim=32, num_heads=2, patch_size=4)'
    block = code_in_text("deit_small_patch16_224").replace('name="deit_small_patch16_224", depths=(3, 3, 3, 3), pretrained=True', small)
    block = block.replace("depths=(1, 1, 1, 1), width=192, heads=3, patch=16", "depths=(1, 1, 1), width=24, heads=3, patch=4")
    block = re.sub(r"training\(\d+\)", "training(1)", block)
    split = code_in_text("per_class").replace("80", "48").replace("100", "64").replace("/data/my-set", str(tmp_path/"my-set"))
    rules = code_in_text("def rules").replace("class ConvNet(Model):\n    ...", "class Fitting(ConvNet):")
    two = "two = pipeline.Task(train=task.train.but(classes=2), test=(task.test[0].but(classes=2),))\n"
    two += 'lab.finetune("two", Fitting(), [lab.end_to_end("three", Fitting(), task, training(1))], two, training(2))'
    nb = nbformat.read(NOTEBOOK, 4)
    end = next(i for i, c in enumerate(nb.cells) if c.cell_type == "code" and "def training" in c.source)
    nb.cells = nb.cells[:end + 1] + [nbformat.v4.new_code_cell(s) for s in ("lab.floor = 0", block, split, rules, two)]
    nbformat.write(nb, tmp_path/"text.ipynb")
    parameters = dict(data="my-set", root=tmp_path/"my-set", runs=tmp_path/"runs")
    papermill(tmp_path/"text.ipynb", tmp_path/"out.ipynb", *(word for k, v in parameters.items() for word in ("-p", k, str(v))))
    stages = {p.name.rsplit("-", 2)[0]: json.loads((p/"settings.json").read_text()) for p in (tmp_path/"runs/stages").iterdir()}
    assert {"teacher", "fit-0", "meta", "distill-2", "m2mkd", "two"} <= stages.keys()
    assert stages["m2mkd"]["classes"] == ["dark", "grey", "light"] and stages["two"]["classes"] == ["dark", "grey"]
    assert stages["three"]["task"]["train"]["per_class"] == [0, 48]
