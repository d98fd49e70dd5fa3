"What a notebook's cells may show and need: pictures and tags, reading without torch, smoke runs."
import ast, re, subprocess, symtable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import m2mkd

root = Path(__file__).resolve().parents[1]
experiments = sorted((root/"nbs/experiments").glob("*.ipynb"))
shown_to_all = sorted((root/"nbs").rglob("[!_.]*.ipynb")) + sorted((root/"runs").rglob("*.ipynb"))
ignored = {".ipynb_checkpoints", "quickstart", "smoke"}
shown_to_all = [p for p in shown_to_all if not ignored & set(p.relative_to(root).parts[:-1])]
def each(files):
    return pytest.mark.parametrize("path", files, ids=lambda f: f"{f.parent.name}/{f.stem}")

KNOWN = {"make", "read", "digits", "sample-photo", "matrix"}           # beside parameters
LIGHT = set("bars core folder lock pages report results stage stats stop study tables".split())
HEAVY = set("torch torchvision timm kornia datasets sklearn torchmetrics safetensors".split()) | {"accelerate"}


def cells_of(path, kind="code"):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]

def tags(cell): return set(cell.metadata.get("tags", ()))

def plain(source):
    "The source less what only IPython understands."
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


# --- pictures of a data set: forbidden by its terms, but for digits and scikit-learn's photographs

DRAWS = r"imshow|imsave|figimage|matshow|spy|pcolor\w*|heatmap|clustermap|\w*OffsetImage|BboxImage"
DRAWS = re.compile(rf"\b(?:{DRAWS}|show_\w*(?:image|batch|picture)\w*|save_image|make_grid)\b")
CANVAS = re.compile(r"\b(?:subplots|figure|Figure|subplot\w*|add_axes|gca|gcf|FacetGrid)\(")
PICTURE = {f"image/{kind}" for kind in "png jpeg gif webp bmp svg+xml".split()} | {"application/pdf"}


def draws(text, names=frozenset()):
    "Whether a text draws: by a word, or by one of `names` that it loads and does not bind itself."
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)]
    own = {n.id for n in found if isinstance(n.ctx, ast.Store)}
    return bool(DRAWS.search(text) or {n.id for n in found} & names - own)

def drawing_names(sources):
    """Names by which a cell comes to show a picture: functions that draw one, what is assigned from them, and
    figures and axes that are drawn upon."""
    statements = [(n, ast.get_source_segment(s, n)) for s in sources for n in ast.parse(s).body]
    parts = [[n for t in getattr(node, "targets", ()) for n in ast.walk(t)] for node, _ in statements]
    binds = [{n.id for n in some if isinstance(n, ast.Name)} for some in parts]
    canvases = [names for names, (_, text) in zip(binds, statements) if CANVAS.search(text)]
    names, before = set(), None
    while names != before:
        before = set(names)
        for mine, (node, text) in zip(binds, statements):
            if not draws(text, names): continue
            names |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else mine
            names |= set().union(*(c for c in canvases if c & set(re.findall(r"\w+", text))))
    return names


def pictures(output):
    "Of a cell's output: (whether it shows a picture, whether that holds pixels beyond doubt)."
    data = output.get("data", {})
    kinds = "text/html", "text/markdown", "text/latex", "image/svg+xml"
    text = " ".join("".join(data.get(k, "")) for k in kinds)
    sure = bool(re.search(r"<image\b|<img\b|data:image|!\[[^]]*\]\(attachment", text))
    what = "".join(data.get("text/plain", ""))[:60]
    sure |= "image/jpeg" in data or "PIL" in what or "core.display.Image" in what
    return sure or bool(PICTURE & set(data)), sure


def untold(path, given=("digits", "sample-photo", "matrix")):
    "Cells of a notebook that show a picture and do not say of what, as sentences."
    cells = cells_of(path)
    names = drawing_names([plain(c.source) for c in cells])
    found = []
    for cell in cells:
        seen, sure = zip(*map(pictures, cell.get("outputs", [])), (False, False))
        drawn = any(sure) or any(seen) and draws(plain(cell.source), names)
        if drawn and not tags(cell) & set(given): found.append(cell)
    texts = cells_of(path, "markdown")
    found += [c for c in texts if c.get("attachments") or "data:image" in c.source]
    return [f"{path.name}, cell {c.id}: a picture, and no tag of {', '.join(given)} says of what: "
            f"{c.source[:60]!r}" for c in found]


@each(shown_to_all)
def test_no_picture_of_a_data_set(path):
    given = "sample-photo", "matrix"
    if root/"runs" not in path.parents: given += "digits",        # there it would be what the smoke run showed
    assert not untold(path, given)


def test_the_library_draws_no_pictures():
    "So no name of it hides one."
    for p in sorted((root/"m2mkd").glob("*.py")): assert not DRAWS.search(p.read_text()), p.name

def tracked():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if run.returncode: pytest.skip("not a git checkout")
    return [root/name for name in run.stdout.split("\0") if name and (root/name).exists()]

RASTER = set(".png .jpg .jpeg .jpe .jfif .gif .webp .bmp .tif .tiff .ppm .ico .avif".split())
SETS = set(".parquet .arrow .npz .npy .tar .zip .gz .mat".split())
MATRICES = re.compile(r"_(graphs|scales|matrix)\.svg$")          # heat maps of numbers, embedded as pixels

def misplaced(files):
    "Files that are pictures or data sets, or drawings with pixels in them."
    def pixels(f): return not MATRICES.search(f.name) and re.search(r"<image\b|data:image", f.read_text())
    return [f.name for f in files if f.suffix.lower() in RASTER | SETS or f.suffix == ".svg" and pixels(f)]

def test_no_picture_file_of_a_data_set(): assert not misplaced(tracked())


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
def output(**data):
    kinds = dict(png="image/png", jpeg="image/jpeg", svg="image/svg+xml", html="text/html", text="text/plain")
    return [new_output("display_data", {kinds[k]: v for k, v in data.items()})]

SHOWN = output(png=PNG, text="<Figure size 1x1 with 1 Axes>")
AS_PIL = output(png=PNG, jpeg=PNG, text="<PIL.Image.Image>")
AS_SVG = output(svg="<svg><image/></svg>")
AS_HTML = output(html=f'<table><img src="data:image/png;base64,{PNG}"></table>')
AS_FILE = output(png=PNG, text="<IPython.core.display.Image object>")

@pytest.mark.parametrize("sources,outputs", [
    (["plt.imshow(images[0])"], SHOWN),
    (["ax.pcolormesh(x)"], SHOWN),
    (["f(x)"], AS_PIL),
    (["f(x)"], AS_SVG),
    (["f(x)"], AS_HTML),
    (["def thumbs(x):\n    for a in x: ax.imshow(a)", "thumbs(images)"], SHOWN),
    (["def a(x): ax.imshow(x)", "def b(x): a(x)", "def c(x): b(x)\nc(images)"], SHOWN),
    (["figure, axes = plt.subplots()\naxes[0].imshow(x)", "figure"], SHOWN),
    (["draw = plt.imshow", "draw(x)"], SHOWN),
    (["getattr(plt, 'imshow')(x)"], SHOWN),
    (["%matplotlib inline\nshow_images(x)"], SHOWN),
    (["display(Image('a.png'))"], AS_FILE),
    (["figure, axes = plt.subplots()", "for ax in axes: ax.imshow(x)", "figure"], SHOWN),
    (["f = thumbs = partial(plt.imshow)", "f(x)"], SHOWN)])
def test_a_picture_without_a_tag_is_found(tmp_path, sources, outputs):
    nb = new_notebook(cells=[*map(new_code_cell, sources)])
    nb.cells[-1].outputs = outputs
    def found(*given):
        nb.cells[-1].metadata["tags"] = list(given)
        nbformat.write(nb, tmp_path/"thumbnails.ipynb")
        return untold(tmp_path/"thumbnails.ipynb")
    assert len(found("read")) == 1 and "thumbnails.ipynb, cell " + nb.cells[-1].id in found()[0]
    assert not found("read", "digits")

def test_curves_need_no_tag_and_attachments_are_refused(tmp_path):
    nb = new_notebook(cells=[new_code_cell("plt.imshow(x)"), new_code_cell("curves(table)", outputs=SHOWN)])
    nbformat.write(nb, tmp_path/"a.ipynb")
    assert not untold(tmp_path/"a.ipynb")
    nb.cells.append(new_markdown_cell("![](attachment:a.png)", attachments={"a.png": {"image/png": PNG}}))
    nbformat.write(nb, tmp_path/"a.ipynb")
    assert len(untold(tmp_path/"a.ipynb")) == 1

def test_a_picture_file_is_found(tmp_path):
    for name in ("a.JPEG", "b.svg", "c.svg", "set.parquet"): (tmp_path/name).write_text("<svg></svg>")
    (tmp_path/"b.svg").write_text('<svg><image href="data:image/png;base64,"/></svg>')
    assert misplaced(sorted(tmp_path.iterdir())) == ["a.JPEG", "b.svg", "set.parquet"]


# --- tags: what makes and what reads ---

def names(source):
    """(bound, loaded now, loaded later) of a cell: names that it binds at its top, those that it loads
    before it has bound them, and those that its functions load when they are called."""
    bound, now, later = set(), set(), set()
    for node in ast.parse(plain(source)).body:
        table = symtable.symtable(ast.unparse(node), "cell", "exec")
        simple = isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr))   # load, then bind
        symbols = table.get_symbols()
        mine = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
        mine -= {"genexpr", "listcomp", "setcomp", "dictcomp", "lambda"}
        used = {s.get_name() for s in symbols if s.is_referenced()}
        walrus = {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
        now |= used - bound - walrus - (set() if simple else mine)
        if isinstance(node, ast.AugAssign): now |= mine - bound
        bound |= mine | walrus
        later |= inner(table)
    return bound, now, later - bound

def inner(table):
    "Global names that functions and comprehensions inside load."
    return {s.get_name() for child in table.get_children() for s in child.get_symbols()
            if s.is_global() and s.is_referenced()}.union(*map(inner, table.get_children()))

def made_only(cells):
    "{name: read cell} of names that a read cell loads and that only `make` cells have bound by then."
    found, made, had, owed = {}, set(), set(), {}
    for cell in cells:
        bound, now, later = names(cell.source)
        if "make" in tags(cell): made |= bound; continue
        if "read" in tags(cell):
            found |= {n: cell.source for n in now & made - had}
            owed |= {n: cell.source for n in later}
        had |= bound
    return found | {n: s for n, s in owed.items() if n in made - had}

def imports(source):
    "Modules that a cell imports, in its functions too; of ours without `m2mkd.`."
    for node in ast.walk(ast.parse(plain(source))):
        if isinstance(node, ast.Import): yield from (a.name.removeprefix("m2mkd.") for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "m2mkd": yield from (m2mkd._home.get(a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield node.module.removeprefix("m2mkd.")

def heavy(source):
    ours = {p.stem for p in (root/"m2mkd").glob("[!_]*.py")}
    return {m for m in imports(source) if m.split(".")[0] in (HEAVY | ours) - LIGHT}


@each(experiments)
def test_tags_of_cells(path):
    cells = [c for c in cells_of(path) if c.source.strip()]
    assert tags(cells[0]) == {"parameters"} and not any("parameters" in tags(c) for c in cells[1:])
    for cell in cells[1:]:
        assert tags(cell) <= KNOWN, f"unknown tags {sorted(tags(cell) - KNOWN)} in: {cell.source[:60]}"
        assert not {"make", "read"} <= tags(cell), f"a cell makes or reads: {cell.source[:60]}"
        if "read" in tags(cell): assert not heavy(cell.source), f"a read cell imports {sorted(heavy(cell.source))}"
    assert not made_only(cells), f"read cells use what only make cells define: {made_only(cells)}"


def cell(tag, source): return new_code_cell(source, metadata={"tags": [tag]} if tag else {})

@pytest.mark.parametrize("sources,wrong", [
    ([("make", "stage = 1"), ("read", "print(stage)")], {"stage"}),
    ([("make", "a = 1"), ("read", "a += 1")], {"a"}),
    ([("make", "a = 1"), ("read", "a = a + 1")], {"a"}),
    ([("make", "a = 1"), ("read", "a = 2\nprint(a)")], set()),
    ([("make", "a = 1"), ("read", "def f(): return a")], {"a"}),
    ([("make", "a = 1"), ("read", "def f(a): return a")], set()),
    ([("make", "a = 1"), ("read", "[a for a in (1,)]")], set()),
    ([("make", "a = 1"), ("read", "[b for b in a]")], {"a"}),
    ([("make", "import numpy as np"), ("read", "np.zeros(1)")], {"np"}),
    ([("make", "def f(): 0"), ("read", "x = lambda: f()")], {"f"}),
    ([("make", "import numpy as np"), ("read", "import numpy as np"), ("read", "np.zeros(1)")], set()),
    ([("make", "for a in (1,): pass"), ("read", "f'{a}'")], {"a"}),
    ([("make", "with x as a: pass"), ("read", "%time\na.b")], {"a"}),
    ([("make", "a = 1"), ("", "a = 2"), ("read", "a")], set()),
    ([("make", "if (a := 1): pass"), ("read", "print(a)")], {"a"}),
    ([("make", "a = 1"), ("read", "print(a)"), ("read", "a = 2")], {"a"}),
    ([("make", "x = 1"), ("read", "for x in (1,): print(x)")], set())])
def test_what_only_make_cells_define_is_found(sources, wrong):
    assert set(made_only([cell(*s) for s in sources])) == wrong

@pytest.mark.parametrize("source,wrong", [
    ("import torch.nn as nn", {"torch.nn"}),
    ("from m2mkd.pipeline import Lab", {"pipeline"}),
    ("from m2mkd import data", {"data"}),
    ("def f():\n    import timm", {"timm"}),
    ("import m2mkd.train", {"train"}),
    ("from m2mkd import study, report\nimport pandas", set()),
    ("from m2mkd.study import Study\nimport seaborn as sns", set())])
def test_heavy_imports_are_found(source, wrong): assert heavy(source) == wrong


# --- smoke runs say that they are ---

def default(path, name):
    "The default of a parameter of an experiment."
    for node in ast.parse(next(c for c in cells_of(path) if "parameters" in tags(c)).source).body:
        if node.target.id == name: return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} has no parameter {name}")

def unsaid(path):
    "What is missing at the top of an experiment with the outputs of a smoke run; empty: nothing."
    if not any(c.get("outputs") for c in cells_of(path)) or not default(path, "smoke"): return ""
    top = "\n".join(c.source for c in cells_of(path, "markdown")[:2])
    if "outputs here are a smoke run" not in " ".join(top.split()):
        return f"{path.name}: say on top: The outputs here are a smoke run"
    links = [link for link in re.findall(r"\]\(([^)#]+)", top) if re.search(r"\bruns\b", link)]
    bad = [link for link in links if not (path.parent/link).exists()]
    return f"{path.name}: link the real run in runs/: {bad or 'no link'}" if bad or not links else ""

@each(experiments)
def test_smoke_outputs_say_so(path):
    assert default(path, "smoke") in (True, False)
    assert not unsaid(path)

def test_smoke_outputs_that_do_not_say_so_are_found(tmp_path):
    parameters = cell("parameters", "smoke: bool = True  # small")
    nb = new_notebook(cells=[new_markdown_cell("# a study"), parameters, cell("", "print(1)")])
    def found():
        nbformat.write(nb, tmp_path/"study.ipynb")
        return unsaid(tmp_path/"study.ipynb")
    assert not found()
    nb.cells[2].outputs = [new_output("stream", text="1\n")]
    assert "say on top" in found()
    nb.cells[0].source += "\nThe outputs here\nare a smoke run; the real one is [here](runs/a)."
    assert "runs/a" in found()
    (tmp_path/"runs/a").mkdir(parents=True)
    assert not found()
    nb.cells[1].source = "smoke: bool = False  # small"
    nb.cells[0].source = "# a study"
    assert not found()
