"papermill and our notebooks: parameters, the bars, and what a failed run leaves."
import contextlib, os, pty, subprocess, sys, termios

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

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
