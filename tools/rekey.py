"""Names stages anew by the identity of their settings: `python tools/rekey.py FOLDER ...`, all
folders that hold each other's inputs.

At first a stage's hash covered module paths ("m2mkd.nac:NAC") and every field; now it covers short
names and what is not at its base (core.identity). The stages under runs went through this once;
yours of the same time can, too (keep a copy until it is through). For each stage: the names of
classes and the hashes of its inputs in settings.json, the folder's name, and in done.json the hash
and the sums of settings.json and of itself. No other number is touched; a second run changes nothing."""
import sys
from pathlib import Path

from m2mkd.core import from_plain, hash_of, read_json, sha256, write_json
from m2mkd.folder import _own_sum


def renamed(plain, hashes):
    "Plain settings with short class names, and with the new hashes of the inputs that are among `hashes`."
    if isinstance(plain, list): return [renamed(v, hashes) for v in plain]
    if not isinstance(plain, dict): return plain
    found = {k: renamed(v, hashes) for k, v in plain.items()}
    if "class" in plain: found["class"] = type(from_plain(plain)).__name__
    if "inputs" in plain and "name" in plain: found["inputs"] = [hashes.get(h, h) for h in plain["inputs"]]
    return found


def plan(folders):
    "[(folder, new settings, new name)] of the stages below `folders`, each after its inputs."
    found = [path.parent for f in folders for path in sorted(Path(f).rglob("settings.json"))]
    stages = {}
    for path in found: stages.setdefault(path.name.rpartition("-")[2], []).append(path)
    hashes, todo = {}, []
    def visit(old):
        if old in hashes or old not in stages: return
        for path in stages[old]:
            plain = read_json(path/"settings.json")
            for h in plain.get("inputs", []): visit(h)
            settings = renamed(plain, hashes)
            hashes[old] = hash_of(settings)
            todo.append((path, settings, f"{path.name.rpartition('-')[0]}-{hashes[old]}"))
    for old in stages: visit(old)
    return todo


def apply(path, settings, name):
    "Write one stage's new settings, sum and hash, and rename its folder."
    write_json(path/"settings.json", settings)
    if (path/"done.json").exists():
        done = read_json(path/"done.json")
        sums = done["sums"] | {"settings.json": sha256(path/"settings.json")}
        done |= {"hash": name.rpartition("-")[2], "sums": sums}
        if "done.json" in sums: sums["done.json"] = _own_sum(done)
        write_json(path/"done.json", done)
    path.rename(path.with_name(name))


if __name__ == "__main__":
    todo = plan(sys.argv[1:])
    for step in todo: apply(*step)
    print(f"{len(todo)} stages, {sum(path.name != name for path, _, name in todo)} of them with a new name")
