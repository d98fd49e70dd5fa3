"""Every notebook in a process of its own, as in a kernel: lessons as they stand, experiments by papermill with
`-p smoke True`.

An error if one fails, or if an experiment's smoke run needs over a minute of a core."""
import os, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root, LIMIT = Path(__file__).resolve().parents[1], 60


def command(notebook, folder):
    "What runs a notebook: a lesson's cells, or an experiment with its small parameters."
    if notebook.parent.name != "experiments":
        return Path(sys.executable).with_name("nbdev_test"), "--path", notebook, "--n_workers", "0"
    return (sys.executable, "-m", "papermill", notebook, Path(folder)/"out.ipynb", "-p", "smoke", "True",
            "--cwd", notebook.parent, "--no-progress-bar", "--log-level", "ERROR")


def run(notebook):
    "(passed, seconds of a core) of one notebook; its stages go to a folder that is then removed."
    with tempfile.TemporaryDirectory() as runs:
        environment = {**os.environ, "M2MKD_RUNS": runs}
        test = subprocess.Popen(command(notebook, runs), cwd=root, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(test.pid, 0)                 # not of a clock: a busy machine is no fault of a notebook
    return status == 0, used.ru_utime + used.ru_stime


with ThreadPoolExecutor(2) as pool:
    lessons, experiments = (sorted((root/folder).glob("[!_.]*.ipynb")) for folder in ("nbs", "nbs/experiments"))
    notebooks = [*experiments, *lessons]
    results = list(zip(notebooks, pool.map(run, notebooks)))
for notebook, (passed, seconds) in results: print(f"{notebook.name}: {'passed' if passed else 'FAILED'}, {seconds:.0f} s")
bad = [notebook.name for notebook, (passed, seconds) in results if not passed or notebook in experiments and seconds > LIMIT]
if bad: sys.exit(f"failed, or an experiment whose smoke run takes over {LIMIT} s: {', '.join(bad)}")
