"""Moves runs into the one layout, once: `python tools/move.py [FOLDER]` (by default `runs`).

runs/<experiment>/<study>/{notebook.ipynb, settings.json, results.json, stages/, labels/}, and in
stages/ a folder `<name>-s<seed>-<hash>` a stage. Older runs have their stages flat in the study's
folder, as `<name>-<hash>`, and health tables without a seed. Renames only: no number changes, and
done.json of a health table gets the `seed` and `of` (whose modules) that its inputs say. What lies
in no known place is named before anything is moved; a second run changes nothing. A study of your
own stays where it is (`Lab` takes the same folder); what old stages do not say is added by
tools/facts.py."""
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from m2mkd.core import hash_of, read_json, write_json
from m2mkd.folder import _own_sum
from m2mkd.lock import LEASE, LOCK, owner

STUDIES = {"vmoe_routing": "vmoe_routing/three_routings"}       # whose stages had no study's folder
FILES = {
    "nac_tiny_imagenet/micro.ipynb": "nac_tiny_imagenet/micro/notebook.ipynb",
    "nac_tiny_imagenet/control.ipynb": "nac_tiny_imagenet/micro/equal_compute.ipynb",
    "vmoe_tiny_imagenet/one_set.ipynb": "vmoe_tiny_imagenet/one_set/notebook.ipynb",
    "vmoe_tiny_imagenet/transfer.ipynb": "vmoe_tiny_imagenet/transfer/notebook.ipynb",
    "vmoe_routing/vmoe_routing.ipynb": "vmoe_routing/three_routings/notebook.ipynb",
    "vmoe_routing/results.json": "vmoe_routing/three_routings/results.json",
    "speed_nac/speed_nac.ipynb": "speed_nac/cpu/notebook.ipynb",
    "speed_nac/results/speed_nac_cpu.json": "speed_nac/cpu/results.json",
    "speed_products/speed_products.ipynb": "speed_products/cpu/notebook.ipynb",
    "speed_products/results.json": "speed_products/cpu/results.json",
    "speed_vmoe/speed_vmoe.ipynb": "speed_vmoe/cpu/notebook.ipynb",
    "speed_vmoe/layer.ipynb": "speed_vmoe/cpu/expert_layer_2026-11-23.ipynb",
    "speed_vmoe/results.json": "speed_vmoe/cpu/results.json"}
BESIDE = ".ipynb", ".json", ".svg", ".png", ".md", ".html"      # files that stay where they are
FOLDERS = "labels", ".ipynb_checkpoints", "stages"              # and folders


def stages_below(folder):
    "{path: record} of the stages below `folder`, in either layout."
    found = {}
    for file in sorted(Path(folder).rglob("settings.json")):
        record = read_json(file)
        if not isinstance(record, dict): raise ValueError(f"{file} is damaged: it is no object")
        if {"experiment", "study"} <= record.keys(): continue   # a study's own
        if not {"name", "inputs"} <= record.keys():
            raise ValueError(f"{file.parent} is no stage of a Lab (its record has no name or no "
                             "inputs); name the folder of a study instead")
        found[file.parent] = record
    return found


def models_of(records):
    "Records of stages as lists, one a model: a whole one alone, or the modules 0, 1, ... of one."
    models = []
    for record in records:
        if record["module"]: models[-1].append(record)
        else: models.append([record])
    return models


def health(record, inputs):
    "The seed of a health table, and whose modules it holds: what the records of its inputs say."
    models = [m[0] for m in models_of(inputs)]
    roles = dict.fromkeys(("meta", "teacher", "students"))
    roles |= dict(zip(roles, [m["name"] for m in models]))
    return {"seed": models[-1]["seed"], "of": roles}


def inputs_of(path, record, records):
    "The records of a stage's inputs, by their hashes among `records` {hash: record}."
    if (gone := [h for h in record["inputs"] if h not in records]):
        raise ValueError(f"{path} was built from {', '.join(gone)}, which is not below this folder")
    return [records[h] for h in record["inputs"]]


def new_name(path, record, digest, seed):
    "`<name>-s<seed>-<digest>`, if the folder has this name or the old one."
    name = record["name"]
    if record.get("module") is not None: name += f"-{record['module']}"
    new = f"{name}-s{seed}-{digest}"
    if path.name in (new, f"{name}-{digest}"): return new
    raise ValueError(f"{path} should be called {name}-{digest} by its settings.json: made before "
                     "stages were named by what is asked for, or changed since; make it again")


def busy(path):
    "Whether a process owns the stage just now."
    if (path/LEASE).exists() or not (path/LOCK).exists(): return (path/LEASE).exists()
    try:
        with FileLock(path/LOCK, timeout=0): return False
    except Timeout: return True


def check_beside(folder, paths):
    "ValueError for what lies in a study's `folder` and is neither among `paths` nor known."
    for entry in sorted(folder.iterdir()):
        if entry.is_file(): known = entry.suffix in BESIDE
        else: known = entry.name in FOLDERS or entry in paths
        if known: continue
        raise ValueError(f"{entry} is neither a stage nor what a run leaves; put it elsewhere "
                         "first")


def plan(folder):
    "[(old path, new path)] of what is to move below `folder`, and {stage's old path: facts}."
    folder, moves, facts = Path(folder), [], {}
    if not folder.is_dir(): raise FileNotFoundError(f"there is no folder {folder}")
    found = stages_below(folder)
    hashes = {path: hash_of(record) for path, record in found.items()}
    records = {hashes[path]: record for path, record in found.items()}
    flat = {path.parent for path in found if path.parent.name != "stages"}
    for study in flat: check_beside(study, {p for path in found for p in (path, *path.parents)})
    for path, record in found.items():
        if busy(path): raise ValueError(f"{path} is in the making: {owner(path)} has it")
        if "module" not in record: facts[path] = health(record, inputs_of(path, record, records))
        study = path.parent.parent if path.parent.name == "stages" else path.parent
        at = str(study.relative_to(folder))
        name = new_name(path, record, hashes[path], facts.get(path, record)["seed"])
        moves.append((path, folder/STUDIES.get(at, at)/"stages"/name))
    moves += [(folder/old, folder/new) for old, new in FILES.items() if (folder/old).exists()]
    moves = [(old, new) for old, new in moves if old != new]
    news = [new for _, new in moves]
    if (both := [new for new in news if new.exists() or news.count(new) > 1]):
        raise ValueError(f"more than one thing would be {both[0]}")
    return moves, facts


def add(path, **facts):
    "Add `facts` to a stage's done.json; whether that changed it."
    done = read_json(path/"done.json")
    new = done | facts
    if new == done: return False
    if "done.json" in new["sums"]: new["sums"] = new["sums"] | {"done.json": _own_sum(new)}
    write_json(path/"done.json", new)
    return True


def apply(moves, facts):
    "Do what `plan` says; the number of health tables that got facts."
    added = sum(add(path, **f) for path, f in facts.items() if (path/"done.json").exists())
    for old, new in moves:
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
        if not any(old.parent.iterdir()): old.parent.rmdir()
    return added


if __name__ == "__main__":
    try: moves, facts = plan((*sys.argv[1:], "runs")[0])
    except (ValueError, OSError) as e: sys.exit(f"nothing is moved: {e}")
    print(f"{apply(moves, facts)} health tables with their seed, {len(moves)} moved")
