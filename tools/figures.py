"""Redraws what the committed runs say, for `make figures`: figures/*.svg by those cells of the
notebooks that do not `make` stages, a page for each run, runs/README.md, and the results in
README.md and nbs/index.ipynb. What needs torch or data cannot be imported here."""
import contextlib, io, json, os, re, sys, tempfile, time
from importlib.abc import MetaPathFinder
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))                   # this checkout's package, not an installed one

import matplotlib
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from m2mkd.core import parameters, read_json, whole
from m2mkd.pages import index, page, read, results_block, runs_in
from m2mkd.report import alt_of

CLAIMS = {"vmoe_tiny_imagenet": "V-MoE +3.5 (Base, ImageNet)",      # of arXiv 2402.16918's abstract
          "nac_tiny_imagenet": "NAC up to +5.6 (Tiny-ImageNet)"}
MAKERS = {"torch", "torchvision", "timm", "safetensors", "accelerate", "kornia", "datasets",
          "torchmetrics"}
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=\n<!-- /results -->)", re.S)


class NoMakers(MetaPathFinder):
    "Refuses what makes stages, also where it is installed."
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in MAKERS: return None
        raise ModuleNotFoundError(f"{name} cannot be imported where only records are read; a cell "
                                  "that needs it should have the tag `make`", name=name)


def said(path): return path.relative_to(root).as_posix()


def write(path, text):
    "Write what is new, whole."
    if path.exists() and path.read_text(encoding="utf-8") == text: return
    with whole(path) as p: p.write_text(text, encoding="utf-8")

# --- the cells of a notebook that read, on one run ---

def given(run, cell):
    """A cell with the run's parameters, as papermill would put it below the `cell` that declares
    them; one line says which of them that no longer has."""
    kept, declared = read_json(run/"settings.json")["parameters"], vars(parameters([cell]))
    gone = [k for k in kept if k not in declared]
    if gone: print(f"{said(run)}: its notebook no longer has {', '.join(gone)}")
    here = {"smoke": False, **kept, "runs": "", "study": run.name}
    return "\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in here.items() if k in declared)])


def read_cells(run, notebook):
    "[(number, source)] of the code cells without the tag `make`, with the run's parameters."
    cells = [c for c in read_json(notebook)["cells"] if c["cell_type"] == "code"]
    found = []
    for number, cell in enumerate(cells, 1):
        tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
        if "make" not in tags and source.strip(): found.append((number, source))
        if "parameters" in tags: found.append((number, given(run, source)))
    return found


@contextlib.contextmanager
def quiet_shell():
    "An IPython shell that keeps nothing and prints nothing."
    settings = Config({"HistoryManager": {"enabled": False}})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
         contextlib.redirect_stderr(io.StringIO()):
        shell = InteractiveShell(config=settings, ipython_dir=folder)
        shell.showtraceback = shell.showsyntaxerror = lambda *args, **more: None
        yield shell


def wrong_with(result):
    "What a cell that ran failed with, in one line; empty if it did not."
    wrong = result.error_before_exec or result.error_in_exec
    if isinstance(wrong, KeyboardInterrupt): raise wrong
    return wrong and f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"


def draw(run, notebook):
    "Run the cells on a run; a ValueError names the cell, and what is wrong."
    cells = read_cells(run, notebook)
    with quiet_shell() as shell:
        for number, source in cells:
            if not (wrong := wrong_with(shell.run_cell(source, store_history=True))): continue
            first = next(filter(str.strip, source.splitlines()))
            raise ValueError(f"code cell {number} of {said(notebook)} ({first:.60}) fails: {wrong}")
        place = Path(shell.user_ns.get("place", run))
    if place.resolve() == run.resolve(): return
    raise ValueError(f"{said(notebook)} reads {place} with this run's parameters: its `place` "
                     "should be runs_folder(f\"<experiment>/{P.study}\", P.runs)")

# --- all runs ---

def figures_of(runs):
    "{run: its figures}: figures/<experiment>_<study>_*.svg, by the longest name that fits."
    found = {run: [] for run in runs}
    for svg in sorted((root/"figures").glob("*.svg")):
        fit = [r for r in runs if f"{svg.stem}_".startswith(f"{r.parent.name}_{r.name}_")]
        if fit: found[max(fit, key=lambda r: len(r.name) + len(r.parent.name))].append(svg)
    return found


def written(folder):
    "What tells whether a file was written anew."
    return {p: (s.st_ino, s.st_mtime_ns) for p in folder.glob("*.svg") for s in [p.stat()]}


def draw_all(runs):
    "All figures; exits with a sentence for each run that fails, and each figure that none draws."
    before, wrong, drawn = written(root/"figures"), [], []
    for run in runs:
        notebook = root/f"nbs/experiments/{run.parent.name}.ipynb"
        if not notebook.exists():
            print(f"{said(run)}: there is no {said(notebook)}; a page without figures")
            continue
        try: draw(run, notebook)
        except ValueError as e: wrong.append(f"{said(run)}: {e}")
        else: drawn.append(run)
    after, its = written(root/"figures"), figures_of(runs)
    old = [svg for run in drawn for svg in its[run] if after[svg] == before.get(svg)]
    wrong += [f"{said(svg)} is drawn by no notebook any more: remove it" for svg in old]
    if wrong: sys.exit("\n".join(wrong))
    return its


def replaced(text, block, path):
    "`text` with `block` between the two comments of the results."
    if len(BLOCK.findall(text)) == 1: return BLOCK.sub(lambda _: block, text)
    raise ValueError(f"{said(path)} should have <!-- results --> and <!-- /results --> once, each "
                     "on a line of its own")


def results_in(studies):
    "{path: text}: the results in nbs/index.ipynb, and in README.md as tools/readme.py would."
    readme, source = root/"README.md", root/"nbs/index.ipynb"
    block, notebook = results_block(studies, CLAIMS, source.parent), read_json(source)
    cells = [c for c in notebook["cells"] if "<!-- results -->" in "".join(c["source"])]
    for c in cells or [{"source": ""}]:
        c["source"] = replaced("".join(c["source"]), block, source).splitlines(keepends=True)
    text = replaced(readme.read_text(encoding="utf-8"), block.replace("](../", "]("), readme)
    return {source: json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", readme: text}


def pages_of(figures):
    "{path: text} of a page for each run of `figures` {run: its figures}, and of all lists of runs."
    results = {run: read(run) for run in figures}
    pages = {run/"README.md": page(its, {svg: alt_of(svg) for svg in figures[run]})
             for run, its in results.items()}
    names = {(run.parent.name, run.name): svgs for run, svgs in figures.items()}
    pages[root/"runs/README.md"] = index(root/"runs", names)
    return pages | results_in(list(results.values()))


def main():
    start = time.monotonic()
    sys.meta_path.insert(0, NoMakers())
    os.environ.pop("M2MKD_RUNS", None)                  # the runs and figures of this checkout
    matplotlib.use("agg"), matplotlib.rcdefaults()      # no window, and nobody's own style
    runs = runs_in(root/"runs")
    figures = draw_all(runs)
    for path, text in pages_of(figures).items(): write(path, text)
    print(f"{len(runs)} runs, {sum(map(len, figures.values()))} figures: "
          f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try: main()
    except (ValueError, OSError) as e: sys.exit(str(e))
