"What the house asks of its files: experiments, notebooks, sizes, floors."
import ast, re, subprocess
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from papermill.translators import PythonTranslator

root = Path(__file__).resolve().parents[1]
experiments = sorted((root/"nbs/experiments").glob("*.ipynb"))
lessons = sorted((root/"nbs").glob("*.ipynb"))
modules = sorted((root/"m2mkd").glob("[!_]*.py"))
executed = sorted((root/"runs").rglob("*.ipynb"))
each = lambda name, files: pytest.mark.parametrize(name, files, ids=lambda f: f.stem)

# A module imports from the floors below its own, from core, and on its own floor from nothing but what is named here.
FLOORS = {name: floor for floor, names in enumerate((
    "bars checkpoint core folder lock measure products stop",
    "augment chain data families given graphs layouts optimizer pixels results sources stats tables "
    "vit where",
    "arguments modulated nac phase plain routing task tokenizers train vmoe",
    "cached convert convert_nac distill evaluate stage",
    "pipeline report study",
    "pages")) for name in names.split()}
BESIDE = dict(
    core={"bars", "measure"}, folder={"lock", "products"}, families={"chain"}, vit={"chain", "families"}, sources={"layouts"},
    given={"sources", "pixels", "augment"}, data={"sources", "augment", "given", "pixels"},
    train={"arguments", "phase"}, vmoe={"routing"}, nac={"modulated", "tokenizers"}, plain={"modulated"},
    cached={"distill"}, convert={"convert_nac"}, measure={"folder", "products"})


def code_cells(path): return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]


def parameter_lines(path):
    "The lines of the parameters cell that set something, as (line, parsed statement)."
    lines = [line for line in code_cells(path)[0].source.splitlines() if line.strip() and not line.startswith("#")]
    return [(line, ast.parse(line).body) for line in lines]


@each("path", experiments)
def test_parameters_cell(path):
    cells = code_cells(path)
    assert cells[0].metadata.get("tags") == ["parameters"], "the first code cell is to be tagged parameters"
    for line, body in parameter_lines(path):
        assert len(body) == 1 and isinstance(body[0], ast.AnnAssign) and isinstance(body[0].target, ast.Name), f"one name: type = value a line: {line}"
        ast.literal_eval(body[0].value)
        assert re.search(r"\S\s+# \S", line), f"a trailing # is to say what it is: {line}"
    assert "parameters()" in cells[1].source, "the second code cell is to call core.parameters()"
    shown = {p.name: (p.inferred_type_name, p.help) for p in PythonTranslator.inspect(cells[0])}
    for line, (node,) in parameter_lines(path):
        kind, said = shown[node.target.id]
        assert kind == ast.unparse(node.annotation) and said, f"papermill --help-notebook does not understand: {line}"


@each("path", experiments)
def test_every_parameter_is_read(path):
    declared = {body[0].target.id for _, body in parameter_lines(path)}
    tree = ast.parse("\n".join("\n".join(line for line in c.source.splitlines() if line[:1] not in "%!") for c in code_cells(path)[1:]))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    if "vars" in read: return                                           # all of them go on as they are
    assert declared <= read, f"declared and never read: {sorted(declared - read)}"


@each("path", experiments)
def test_experiments_export_nothing(path):
    assert not re.search(r"#\| ?(default_exp|export)", path.read_text()), "an experiment exports nothing"


def test_the_library_imports_no_experiment():
    for f in modules: assert "experiments" not in re.findall(r"(?:from|import) +([\w.]+)", f.read_text()), f.name


@each("path", lessons + experiments + executed)
def test_notebook_shows_no_machine_and_no_person(path):
    text = path.read_text()
    found = re.findall(r"/(?:home|root|tmp|Users|work|mnt)/[\w.-]+|[\w.+-]+@[\w-]+\.[a-z]{2,}(?![\w(])", text)
    assert not found, f"paths of a machine or addresses: {sorted(set(found))[:5]}"
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@each("path", lessons + experiments)
def test_notebook_has_no_error_and_no_widget(path):
    for cell in code_cells(path):
        kinds = {o.output_type for o in cell.outputs} | {k for o in cell.outputs for k in o.get("data", {})}
        assert not kinds & {"error", "application/vnd.jupyter.widget-view+json"}, cell.source[:80]


LINK = re.compile(r"""(?:\]\(\s*<?|(?:src|href)=["'])(?![a-z]+:|#|//)([^)>\s"'#?]+)""")      # of a text or a picture, to a file
texts = [root/name for name in "README.md CONTRIBUTING.md LOG.md CHANGELOG.md".split()] + sorted((root/"runs").rglob("*.md"))
texts = [p for p in texts if not {"quickstart", "smoke"} & set(p.relative_to(root).parts)]

def linked(path):
    "Relative links of a Markdown file or of a notebook's text; code and formulas have none."
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    return LINK.findall(re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$", "", text, flags=re.S))

@pytest.mark.parametrize("path", texts + lessons + experiments, ids=lambda p: str(p.relative_to(root)))
def test_links_lead_somewhere(path):
    assert not [link for link in linked(path) if not (path.parent/unquote(link)).exists()]

def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.md").write_text("[a](b.md) ![p](c/d.svg 'title') [x](https://a.b/c) [y](#z) [q](a.md#there) "
                                 "<img src=\"e.svg\"> `[n](o)`")
    assert linked(tmp_path/"a.md") == ["b.md", "c/d.svg", "a.md", "e.svg"]
    assert len(linked(root/"README.md")) > 10

def results(text):
    "What stands between the two comments of the results block."
    found = re.findall(r"^<!-- results -->$(.*?)^<!-- /results -->$", text, re.S | re.M)
    assert len(found) == 1 == text.count("<!-- results -->") == text.count("<!-- /results -->")
    return found[0].strip()

def test_the_results_are_in_the_readme():
    cells = nbformat.read(root/"nbs/index.ipynb", as_version=4).cells
    here, = (c.source for c in cells if "<!-- results -->" in c.source)
    assert results(here).replace("](../", "](") == results((root/"README.md").read_text())


MESSAGES_FROM = "6b64e2b"       # what is not before this commit has a subject of at most 72 characters, and a body

def bad_messages(folder, since):
    """Subjects of commits that are not before `since`, merges left out, that are too long or stand alone; None where git
    does not know it."""
    def git(*words): return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    if git("merge-base", "--is-ancestor", since, "HEAD").returncode: return None
    said = git("log", "--no-merges", "--format=%s%x01%b%x00", f"{since}..HEAD").stdout.split("\0")
    pairs = [m.strip("\n").partition("\x01") for m in said if m.strip()]
    return [subject for subject, _, body in pairs if len(subject) > 72 or not body.strip()]

def test_commits_have_a_short_subject_and_a_reason():
    bad = bad_messages(root, MESSAGES_FROM)
    if bad is None: pytest.skip("not a checkout with that history")
    assert not bad

def test_bad_messages_are_found(tmp_path):
    def commit(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, "commit", "-q", "--allow-empty", *words], cwd=tmp_path, check=True)
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    first = commit("-m", "x" * 99)
    for subject in ("good", "y" * 73, "z" * 72): commit("-m", subject, "-m", "why")
    commit("-m", "alone")
    assert bad_messages(tmp_path, first) == ["alone", "y" * 73]
    assert bad_messages(tmp_path, "f" * 40) is None


def test_cleaning_keeps_the_parameters_tag():
    ini = ConfigParser(delimiters="=", interpolation=None)
    ini.read(root/"settings.ini")
    assert ini["DEFAULT"]["allowed_cell_metadata_keys"].split() == ["tags"]


@each("path", modules)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{len(text.splitlines())} lines: two ideas?"
    assert max(map(len, text.splitlines())) <= 180
    for f in ast.walk(ast.parse(text)):
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert f.end_lineno - f.lineno < 50, f"{f.name} has {f.end_lineno - f.lineno + 1} lines"


@each("path", modules)
def test_floors(path):
    assert path.stem in FLOORS, f"{path.stem} has no floor yet: give it one in this test"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("m2mkd")): continue
        name = (node.module or "").removeprefix("m2mkd").lstrip(".")
        for used in [name] if name else [a.name for a in node.names]:
            allowed = used == "core" or FLOORS[used] < FLOORS[path.stem] or used in BESIDE.get(path.stem, ())
            assert allowed, f"{path.stem} (floor {FLOORS[path.stem]}) imports {used} (floor {FLOORS[used]})"


def test_the_library_needs_no_notebook_tool():
    for f in modules:
        for node in ast.walk(ast.parse(f.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"fastcore", "nbdev", "IPython", "papermill", "ipywidgets"}, f.name


def test_no_large_file():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if run.returncode: pytest.skip("not a git checkout")
    files = [root/name for name in run.stdout.split("\0") if name and not name.startswith("tests/reference/")]
    large = [f.name for f in files if f.exists() and f.stat().st_size > 500_000]
    assert set(large) <= {"shared.safetensors"}            # up to 1 MB, says test_stage
