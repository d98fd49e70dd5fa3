"""Makes what is generated: `export` the package from the notebooks, `clean` the notebooks, `readme` from the index.

Without an argument: all three, and an error that names each file that was not as its source says."""
import hashlib, re, sys
from pathlib import Path
from textwrap import TextWrapper

from nbdev import maker
from nbdev.clean import nbdev_clean
from nbdev.config import add_init, get_config
from nbdev.doclinks import nbglob
from nbdev.export import nb_export

import readme

root = Path(__file__).resolve().parents[1]
package = root/"m2mkd"


class Wrapper(TextWrapper):
    "Wraps a list of names after `__all__ = ` at 100 columns; nbdev's own goes to 130."
    def __init__(self, **how):
        super().__init__(**how | {"width": 100, "initial_indent": " " * len("__all__ = ")})

    def wrap(self, text): return "\n".join(super().wrap(text)).lstrip().split("\n")

maker.TextWrapper = Wrapper


def homes():
    "Module name -> notebook that exports it; an error if two notebooks export one module."
    found = {}
    for nb in sorted(nbglob(root/"nbs", as_path=True)):
        for name in re.findall(r'"#\| ?default_exp ([\w.]+)', nb.read_text(encoding="utf-8")):
            if name in found: sys.exit(f"{nb.name} and {found[name].name} both export {name}: the later would overwrite the earlier")
            found[name] = nb
    return found


def export():
    "Every module from its notebook; an error names a module that no notebook exports."
    known = homes()
    for nb in known.values(): nb_export(nb, lib_path=package)
    add_init(get_config().lib_path)
    stale = [f.name for f in sorted(package.glob("*.py")) if f.stem not in known and not f.name.startswith("_")]
    if stale: sys.exit(f"no notebook exports {', '.join(stale)}: delete it, or give it back its notebook")


def clean(): nbdev_clean(str(root/"nbs"))


def sums():
    "Digest of each file that is generated here."
    files = [*package.glob("*.py"), *(root/"nbs").rglob("[!_.]*.ipynb"), root/"README.md"]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists() and ".ipynb_checkpoints" not in f.parts}


def check():
    "export, clean, readme; an error if any file changed."
    before = sums()
    export(); clean(); readme.write()
    after = sums()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if changed: sys.exit("out of sync until now (they are right now; look at them, then commit): " + ", ".join(changed))
    print(f"in sync: {len(homes())} modules, {len(after)} files")


if __name__ == "__main__": {"export": export, "clean": clean, "readme": readme.write, "": check}[(*sys.argv[1:], "")[0]]()
