"Prints what the last cell with an output shows in a notebook: `python tools/show.py NOTEBOOK`."
import sys

import nbformat


def text(output):
    "An output as text; a picture as nothing."
    return output.get("text") or output.get("data", {}).get("text/plain", "") if "image/png" not in output.get("data", {}) else ""


cells = nbformat.read(sys.argv[1], as_version=4).cells
shown = [said for c in cells if (said := "\n".join(filter(None, map(text, c.get("outputs", [])))).strip())]
print(shown[-1] if shown else f"{sys.argv[1]} shows nothing")
