"""Adds what older stages do not say, once: `python tools/facts.py [FOLDER]` (by default `runs`),
in the layout of tools/move.py.

- done.json of distilled modules: `teacher_flops`, the part of `flops` that the teacher's passes
  took, counted anew from the settings (`added` says so);
- labels/<images>.json: the true class of each test image, if the data set is here ($M2MKD_DATA);
- settings.json and results.json of the shipped experiments, from notebook.ipynb, the old
  results.json, and the records of the stages.

Each number is held against the recorded ones, and none of those changes; a second run changes
nothing."""
import ast, hashlib, importlib, re, sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from m2mkd import core
from m2mkd.chain import freeze
from m2mkd.core import from_plain, hash_of, read_json, seeded, write_json
from m2mkd.data import ImageSet, digest, whole_split
from m2mkd.distill import match_host, match_modules, paired
from m2mkd.measure import flop_counter
from m2mkd.stage import blank, cost, stages_in
from m2mkd.study import Results, Study
from move import add

for module in core.OURS: importlib.import_module(f"m2mkd.{module}")   # their classes, by name

# --- the teacher's passes ---

def chain_of(record, classes, size):
    "The model of a record, without pretrained weights or realised graph: as many FLOPs."
    with seeded(0, "empty"): return from_plain(blank(record["model"])).build(classes, size)


def teacher_flops(group):
    "(the teacher's, all) FLOPs of each of the stages `group`, which one phase trained."
    record, steps = group[0].settings, group[0].done["steps"]
    classes, size = len(record["classes"]), record["image_size"]
    host, *teacher = (chain_of(s.settings, classes, size) for s in group[0].inputs)
    for model in (host, *teacher): freeze(model)
    chain, n = chain_of(record, classes, size), from_plain(record["training"]).batch_size
    modules = {s.settings["module"]: chain[s.settings["module"]].train() for s in group}
    match = match_modules(host, dict(enumerate(*teacher))) if teacher else match_host
    phase = paired(host, modules, from_plain(record["distillation"]), 0, match)
    images, labels = torch.randn(n, 3, size, size), torch.full((n, classes), 1 / classes)
    with flop_counter() as counter:
        terms = phase.loss(phase.trains, images, labels, 0)
        sum(t["loss"] for t in terms.values()).backward()
    both = counter.tallies["teacher"], counter.get_total_flops()
    return [float(Fraction(f * steps, len(group))) for f in both]


def add_teacher_flops(stages):
    """Into done.json of every module that had a teacher; the number of stages. A whole phase may
    count otherwise today than recorded (one line); the teacher's passes, forward alone, do not."""
    groups, changed = {}, 0
    for s in stages:
        if s.teacher is None or "teacher_flops" in s.done: continue
        groups.setdefault(hash_of({**s.settings, "module": None}), []).append(s)
    for group in groups.values():
        its, both = teacher_flops(group)
        for s in group:
            if both != s.flops: print(f"{s.path.name}: {s.flops:g} FLOPs recorded, {both:g} today")
            changed += add(s.path, teacher_flops=its, added={"teacher_flops": "tools/facts.py"})
    return changed

# --- the labels of the test images ---

def first_digest(train):
    "What a record said at first (until commit bb8b7a9): of the training images alone."
    tensors = train.ids, train.labels, train.images
    sums = [hashlib.sha256(t.contiguous().numpy()).hexdigest() for t in tensors]
    return hash_of(list(train.classes), train.image_size, sums)


def labels_of(stage):
    "Labels of the images that a stage was tested on; a ValueError where the data is another."
    record = stage.settings
    train, test = from_plain(record["task"]).load()
    found = hash_of(digest(train), digest(test))
    if record["images"] not in (found, isinstance(train, ImageSet) and first_digest(train)):
        raise ValueError(f"{stage.path.name} was made on the images {record['images']}; those of "
                         f"its task are {found} here")
    return torch.cat([y for _, y in whole_split(test, 256, "cpu")]).tolist()


def add_labels(folder, stages):
    "labels/<images>.json of all that was predicted; the number of files."
    kept = {s: folder/f"labels/{s.settings['images']}.json" for s in stages
            if (s.path/"predictions.json").exists()}
    missing = {file: s for s, file in kept.items() if not file.exists()}
    for file, s in missing.items(): write_json(file, labels_of(s))
    for s, file in kept.items():
        right = np.mean(np.array(read_json(s.path/"predictions.json")) == read_json(file))
        if abs(right - s.done["results"]["top1"]) < 1e-6: continue
        raise ValueError(f"{s.path.name}: {right:.4f} of its predictions are right by {file}, and "
                         f"{s.done['results']['top1']:.4f} by its record")
    return len(missing)

# --- settings.json and results.json of the shipped experiments ---

TEN = "modules made and fine-tuned on 10 classes of Tiny-ImageNet, 400 images a class"
DATA = {"vmoe_tiny_imagenet/one_set": TEN, "nac_tiny_imagenet/micro": TEN,
        "vmoe_routing/three_routings": TEN, "vmoe_tiny_imagenet/transfer":
        "modules made on 200 classes of Tiny-ImageNet (25,000 images), "
        "fine-tuned on 20 classes, 50 or 400 images a class"}
MORE = {"nac_tiny_imagenet/micro": dict(    # of equal_compute.ipynb; what decayed, by the records
    controls=["scale-free"], control_seeds=[0], decay="all")}
AMD = dict(processor="AMD processor of unrecorded model", capability="AVX512", blas="mkl",
           products="onednn", cores=2, threads=2, device="CPU", precision="float32")
AMD["added"] = "commit, processor, capability, blas and products are from LOG.md"
BY_LOG = {"speed_nac": AMD | dict(commit="a342b3f03e41c7154dfcee4cad0418561375ca6a"),
          "speed_vmoe": AMD | dict(commit="e91672dbd71519fc81773b64a75977bef7d0a08a")}


def vmoe(record):
    arms = {"e2e": "E2E", "e2e_long": "E2E, equal compute", "from_source": "E2E on source"}
    same = "incubated", "m2mKD", "m2mKD, mean", "m2mKD, stitched"
    arms |= {arm.replace(", ", "_"): arm for arm in same}
    if record["name"] in arms:
        return dict(arm=arms[record["name"]], images=record["task"]["train"]["per_class"])


def nac(record):
    arms = {"E2E": "E2E", "m2mKD": "m2mKD", "E2E_long": "E2E, equal compute"}
    arm, _, prior = record["name"].rpartition("_")
    if arm in arms: return dict(arm=arms[arm], prior=prior)


def routing(record):
    its = record["model"]
    kind = "limited" if its.get("capacity") else "balanced" if its.get("noise") else "plain"
    if record["name"] in ("E2E", "m2mKD"): return dict(arm=record["name"], routing=kind)


CONTRASTS = {
    "vmoe_tiny_imagenet": [{}, {"baseline": "E2E, equal compute", "only": ["m2mKD"]}],
    "nac_tiny_imagenet": [{"only": ["m2mKD"], "mean_over": "prior"},
                          {"baseline": "E2E, equal compute", "only": ["m2mKD"]}],
    "vmoe_routing": [{"along": "routing", "baseline": "plain"}, {}]}
CELLS = {"vmoe_tiny_imagenet": vmoe, "nac_tiny_imagenet": nac, "vmoe_routing": routing}


def cells_of(cell, stages):
    "{(the cell's values, seed): stage} of the whole models that are arms, by their records."
    found = {}
    for s in stages:
        if s.settings.get("module", 0) is not None or not (at := cell(s.settings)): continue
        key = *sorted(at.items()), ("seed", s.settings["seed"])
        if key in found:
            raise ValueError(f"{found[key].path.name} and {s.path.name} are both {key}")
        found[key] = s
    return found


def check_row(row, stage):
    "ValueError if a row of the old results.json is not what its stage says."
    flops, seconds = cost(stage)
    says = dict(top1=stage.results["top1"], start=stage.metrics[0]["top1"], tflop=flops / 1e12,
                epochs=stage.done["epochs"], seconds=seconds)
    for key in says.keys() & row.keys():
        if abs(says[key] - row[key]) <= 1e-12 * abs(says[key]): continue
        raise ValueError(f"results.json says {key} = {row[key]} of {stage.path.name}, which says "
                         f"{says[key]}")


def notebook(folder):
    "(question, parameters) of an executed notebook."
    question, parameters = "", {}
    for cell in read_json(folder/"notebook.ipynb")["cells"]:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        question = question or next(iter(re.findall(r"^> (.+)$", source, re.M)), "")
        if {"parameters", "injected-parameters"} & {*tags}:
            for line in ast.parse(source).body:
                name = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
                parameters[name.id] = ast.literal_eval(line.value)
    return question, parameters


WHERE = ("commit", "versions", "device", "threads", "processor", "capability", "blas", "products",
         "cores", "machine", "torch", "precision")


def made_where(stages):
    "The commit that most stages were made by, and the environment of all."
    commits = [s.done["commit"] for s in stages]
    where = [{k: s.done[k] for k in WHERE[1:] if k in s.done} for s in stages]
    if any(w != where[0] for w in where): print("stages of several machines; the first is named")
    return {"commit": max(commits, key=commits.count)} | where[0]


def study_of(folder, old, stages):
    "The Study of an old results.json: its rows in their order, then what other arms were trained."
    question, parameters = notebook(folder)
    at = f"{folder.parent.name}/{folder.name}"
    parameters |= MORE.get(at, {})
    study = Study(folder, "E2E", question, parameters, DATA.get(at, ""), "m2mKD",
                  CONTRASTS[folder.parent.name])
    cells = cells_of(CELLS[folder.parent.name], stages)
    factors = sorted({k for key in cells for k, _ in key} - {"arm", "seed"})
    for row in old["arms"]:
        key = *sorted((k, row[k]) for k in ("arm", *factors)), ("seed", row["seed"])
        stage = cells.pop(key)
        check_row(row, stage)
        study.add(row["arm"], row["seed"], stage, **{k: row[k] for k in factors})
    for key, stage in cells.items(): study.add(stage=stage, **dict(key))
    for name in old.keys() - {"arms", "differences", "hybrids"}: study[name] = old[name]
    if "hybrids" in old:
        study["hybrids"] = [{"seed": int(s)} | row for s, t in old["hybrids"].items() for row in t]
    study.environment = made_where(stages)
    return study


def table_of(value):
    "What a benchmark left under one name, as rows."
    if isinstance(value, list): return value
    if all(isinstance(v, dict) for v in value.values()):
        return [{"arm": k} | v for k, v in value.items()]
    return [{k: v for k, v in value.items() if k != "versions"} | value.get("versions", {})]


def benchmark_of(folder, old):
    "The Results of a benchmark: its tables, and what was measured with as the table `setup`."
    results = Results(folder, *notebook(folder))
    plain = {k: v for k, v in old.items() if not isinstance(v, (dict, list))}
    setup = old.get("setup", plain)
    for name, value in {"setup": setup, **old}.items():
        if name not in plain: results[name] = table_of(value)
    recorded = {k: setup[k] for k in WHERE if k in setup}
    results.environment = recorded | BY_LOG.get(folder.parent.name, {})
    results.main = f"{MAIN[folder.parent.name](old)} ({results.machine})"
    return results


def speed_nac(old):
    least = min(row["speed-up"] for row in old["summary"] if row["arm"] == "ours")
    return f"a training step is {least:.2f} times as fast as the plain form"


def speed_vmoe(old):
    goal = "layer: ours / dense, quick, from 4096 tokens on"
    rows = [r for r in old["goals"] if (r["work"], r["goal"]) == ("forward and backward", goal)]
    most = max(row["measured, worst"] for row in rows)
    return f"forward and backward of the layer: {most:.2f} times dense, on equal products"


def speed_products(old):
    most = max(row["measured"] for row in old["goals"])
    return f"a step takes at most {most:.2f} times that with torch's own products"


MAIN = dict(speed_nac=speed_nac, speed_vmoe=speed_vmoe, speed_products=speed_products)


def add_results(folder, stages):
    "settings.json and results.json from the old ones; whether there were such."
    if not (folder/"results.json").exists() or not (folder/"notebook.ipynb").exists(): return False
    old = read_json(folder/"results.json")
    if "tables" in old: return False
    if folder.parent.name in CELLS: study_of(folder, old, stages).save()
    elif folder.parent.name in MAIN: benchmark_of(folder, old).save()
    else: return False
    return True


def main(runs):
    for folder in sorted(p for p in Path(runs).glob("*/*") if p.is_dir()):
        stages = list(stages_in(folder).values()) if (folder/"stages").is_dir() else []
        added, labels = add_teacher_flops(stages), add_labels(folder, stages)
        results = "in the new form" if add_results(folder, stages) else "as it is"
        print(f"{folder}: teacher_flops of {added} stages, {labels} sets of labels, results.json "
              f"{results}")


if __name__ == "__main__":
    try: main((*sys.argv[1:], "runs")[0])
    except (ValueError, OSError) as e: sys.exit(str(e))
