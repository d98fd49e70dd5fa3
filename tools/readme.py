"README.md from nbs/index.ipynb: a few lines over nbconvert (nbdev's own command needs Quarto)."
import posixpath, re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(\]\(|src=")(?!https?:|#)([^)"]+)')      # of an image or a text, to a file of this repository


def without_directives(cell):
    "The cell's source less nbdev's `#|` lines; a cell that is hidden becomes empty."
    lines = cell.source.splitlines()
    if any(re.match(r"#\|\s*hide\b", line) for line in lines): return ""
    return "\n".join(line for line in lines if not line.startswith("#|"))


def write(notebook=root/"nbs/index.ipynb", target=root/"README.md"):
    "Writes `target`; links become relative to it, pictures among the outputs go to figures/."
    nb = nbformat.read(notebook, as_version=4)
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        cell.source = without_directives(cell)
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream"]      # values and pictures, not what was said on the way
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    nb.metadata.setdefault("language_info", {})["name"] = "python"      # the name beside the code fence
    text, resources = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "../figures", "unique_key": "readme"})
    for name, data in resources["outputs"].items(): (target.parent/"nbs"/name).resolve().write_bytes(data)
    text = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)
    target.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


if __name__ == "__main__": write()
