"papermill and our notebooks: parameters, the bars, and what a failed run leaves."
import contextlib, os, pty, signal, subprocess, sys, termios, time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from m2mkd import bars
from m2mkd.folder import Folder

CELLS = ("steps = 30    # how many\nlr = 0.1      # rate\nseeds = [0]   # which",
         "from m2mkd import core\np = core.parameters()\np",
         "import time\nfor i in core.progress(range(p.steps), 'steps'): time.sleep(0.1)",
         "print('the end')")


@pytest.fixture
def notebook(tmp_path):
    nb = new_notebook(cells=[new_code_cell(c) for c in CELLS],
                      metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path/"small.ipynb")
    return tmp_path/"small.ipynb"


def command(notebook, *arguments):
    return [sys.executable, "-m", "papermill", str(notebook), str(notebook.with_name("out.ipynb")), *arguments]


def papermill(notebook, *arguments, cwd=None):
    return subprocess.run(command(notebook, *arguments), cwd=cwd, capture_output=True, text=True)


def outputs(notebook): return [c.outputs for c in nbformat.read(notebook.with_name("out.ipynb"), 4).cells if c.cell_type == "code"]


def test_parameters_arrive_from_any_folder(notebook, tmp_path):
    (tmp_path/"elsewhere").mkdir()
    run = papermill(notebook, "--inject-paths", "-p", "steps", "1", "-p", "lr", "1", "-p", "seeds", "[3, 4]", cwd=tmp_path/"elsewhere")
    assert run.returncode == 0, run.stderr
    assert "namespace(steps=1, lr=1.0, seeds=[3, 4])" in str(outputs(notebook)) and "the end" in str(outputs(notebook))


def test_unknown_parameter_stops_the_run_and_names_the_nearest(notebook):
    run = papermill(notebook, "-p", "step", "5")
    assert run.returncode != 0 and "unknown parameter of this notebook 'step'; nearest: steps" in run.stderr
    assert "the end" not in str(outputs(notebook))


def on_a_terminal(words):
    "The exit code of a command on a terminal of 100 columns, and what it wrote there."
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}           # a kernel that sees it leaves stderr alone
    run, said = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment), b""
    os.close(theirs)
    with contextlib.suppress(OSError):                                                         # when the other side is closed
        while chunk := os.read(ours, 4096): said += chunk
    os.close(ours)
    return run.wait(), said.decode(errors="replace")


def test_bars_are_on_the_terminal_and_not_in_the_notebook(notebook):
    code, said = on_a_terminal(command(notebook))
    assert code == 0 and "steps:  " in said and "/30 [" in said and "Executing: " in said
    assert outputs(notebook)[-2] == [] and "the end" in str(outputs(notebook)[-1])


@pytest.mark.parametrize("words,whose", [
    ("python3 -m papermill a.ipynb b.ipynb", True), ("/venv/bin/python -u -m m2mkd run a.ipynb b.ipynb", True),
    ("/venv/bin/python /venv/bin/papermill a.ipynb b.ipynb", True), ("papermill a.ipynb b.ipynb", True), ("", False),
    ("/usr/bin/python3 /usr/bin/jupyter-lab --notebook-dir /home/me/m2mkd", False),
    ("/usr/bin/jupyter-lab /home/me/papermill", False), ("python /usr/bin/jupyter-lab -m papermill", False)])
def test_whose_kernel_it_is(words, whose): assert bars._papermill(words.split()) is whose


def test_a_starter_that_nobody_may_see(monkeypatch):
    def gone(pid): raise psutil.NoSuchProcess(pid)
    monkeypatch.setattr(psutil, "Process", gone)
    assert bars._starter() == []


def test_without_a_terminal_a_long_bar_leaves_a_few_lines(notebook):
    assert papermill(notebook, "--log-output", "-p", "steps", "120").returncode == 0
    lines = [line for o in outputs(notebook)[-2] for line in o.text.splitlines()]
    assert len(lines) == 2 and "100%" in lines[-1] and "\r" not in str(lines)


def test_nbdev_test_sees_the_defaults(notebook):
    text = notebook.read_text().replace("range(p.steps)", "range(p.steps // 30)").replace("p = core.parameters()\\np", "p = core.parameters()\\nassert vars(p) == dict(steps=30, lr=0.1, seeds=[0])")
    notebook.write_text(text)
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    CaptureShell().run_all(read_nb(notebook), exc_stop=True)


TRAINING = """root = ""
from m2mkd.augment import Augment
from m2mkd.data import Data
from m2mkd.pipeline import Lab, Task
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, ViT
print("begun")"""
LONG = """lab = Lab(root, runtime=Runtime(device="cpu", log_steps=3))
digits = Task(train=Data(name="digits"), test=(Data(name="digits", split="test"),))
teacher = ViT(depths=(1, 1), options=dict(patch_size=4, embed_dim=16, num_heads=2))
stage = lab.end_to_end("meta", Meta(like=teacher), digits, Training(epochs=12, batch_size=64, lr=0.05, augment=Augment(flip=0)))"""


def test_run_passes_a_signal_on_and_the_next_run_goes_on(tmp_path):
    "`python -m m2mkd run` is papermill that ends with a checkpoint, the notebook so far and 128 + n; the rest is trained to the bit."
    nb = new_notebook(cells=[new_code_cell(c) for c in (TRAINING, LONG, "print('not reached')")],
                      metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path/"small.ipynb")
    words = [sys.executable, "-m", "m2mkd", "run", str(tmp_path/"small.ipynb"), str(tmp_path/"out.ipynb"), "-p", "root", str(tmp_path/"runs")]
    papermill = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    def lines(): return sum(len(f.read_text().splitlines()) for f in tmp_path.glob("runs/meta-*/metrics.jsonl"))
    while lines() < 4 and papermill.poll() is None: time.sleep(0.05)
    for _ in range(2): papermill.send_signal(signal.SIGINT), time.sleep(0.005)      # and its twin
    said = papermill.communicate()[1]
    assert papermill.returncode == 130 and "Traceback" not in said and said.splitlines()[-1].startswith("stopped by SIGINT"), said
    shown = str(outputs(tmp_path/"small.ipynb"))
    assert "begun" in shown and "is written, the next run goes on there" in shown and "not reached" not in shown
    stopped = next((tmp_path/"runs").glob("meta-*"))
    assert 0 < Folder(stopped).checkpoint()["step"] < 264
    for root in (tmp_path/"runs", tmp_path/"straight"): exec(f"{TRAINING}\nroot = {str(root)!r}\n{LONG}", {})
    resumed, straight = Folder(stopped), Folder(tmp_path/"straight"/stopped.name)
    timeless = [[{k: v for k, v in m.items() if k != "seconds"} for m in f.metrics()] for f in (resumed, straight)]
    assert timeless[0] == timeless[1] and all(v.equal(straight.weights()[k]) for k, v in resumed.weights().items())
