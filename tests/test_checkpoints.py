"Weights from files that others wrote: what is the model's goes in, however it is wrapped; all else is one sentence."
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest, timm, torch, yaml
from safetensors.torch import save_file
from torch import nn

from m2mkd.chain import Stitch, assemble, load
from m2mkd.checkpoint import read, unwrap
from m2mkd.convert import PublishedViT, published_settings, student_from_published, to_published, vmoe_from_published
from m2mkd.convert_nac import nac_from_published, nac_settings, published_name
from m2mkd.core import seeded
from m2mkd.data import Augment, Data
from m2mkd.pipeline import Lab, Task
from m2mkd.train import Runtime, Training
from m2mkd.vit import ViT
from m2mkd.vmoe import VMoE

SMALL = dict(patch_size=4, embed_dim=16, num_heads=2)


def timm_vit(name="vit_tiny_patch16_224", classes=10, size=8, **options):
    with seeded(0, "teacher"): return timm.create_model(name, num_classes=classes, img_size=size, **{"depth": 2, **SMALL, **options}).eval()

VIT = timm_vit()
STATE = VIT.state_dict()

def prefixed(prefix, state=STATE): return {prefix + k: v for k, v in state.items()}

def moved(state=STATE, by=1.): return {k: v + by for k, v in state.items()}

def without(*words): return {k: v for k, v in STATE.items() if not k.startswith(words)}

def built(path, content=None, classes=10, size=8, name="vit_tiny_patch16_224", **options):
    "The timm model that a teacher of these settings has, from a file at `path` (with `content`, if given)."
    if content is not None: torch.save(content, path)
    return ViT(name=name, depths=(1, 1), checkpoint=str(path), options={"depth": 2, **SMALL, **options}).vit(classes, size)

def fails(what, *said, kind=ValueError):
    with pytest.raises(kind) as e: what()
    text = str(e.value)
    assert all(s in text for s in said) and "\n" not in text and len(text) < 900, text

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- wrappers ---

WRAPPED = {
    "bare": STATE, "model": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3}, "state_dict": {"state_dict": STATE},
    "model_state_dict": {"model_state_dict": STATE, "lr": 1e-3}, "net": {"net": STATE}, "two deep": {"checkpoint": {"model": STATE}},
    "DataParallel": prefixed("module."), "compiled": prefixed("_orig_mod."), "both": {"state_dict": prefixed("module._orig_mod.")},
    "Lightning": {"state_dict": prefixed("model."), "hparams": {"a": 1}}, "backbone": prefixed("backbone."), "encoder": {"net": prefixed("encoder.")},
    "DINO's teacher": {"teacher": prefixed("backbone."), "args": Namespace(lr=0.1), "best": np.float64(0.5)},
    "the same twice": {"model": STATE, "module": dict(STATE)}, "beside other tensors": {"model": STATE, "rng": torch.ones(5)},
    "half": {k: v.half() for k, v in STATE.items()}, "double": {k: v.double() for k, v in STATE.items()}}

@pytest.mark.parametrize("content", WRAPPED.values(), ids=WRAPPED)
def test_a_teacher_in_any_wrapper(tmp_path, capsys, content):
    found = built(tmp_path/"t.pth", content).state_dict()
    assert equal(found, {k: v.half().float() for k, v in STATE.items()} if content is WRAPPED["half"] else STATE)
    assert capsys.readouterr().out == ""

def test_averaged_weights_are_said(tmp_path, capsys):
    for content, expected in (({"model": STATE, "model_ema": moved()}, STATE), ({"state_dict": moved(), "state_dict_ema": STATE}, moved()),
                              ({"EMA": prefixed("module.", moved())}, moved()), ({"state_dict": prefixed("model.") | prefixed("ema.model.", moved())}, STATE)):
        assert equal(built(tmp_path/"t.pth", content).state_dict(), expected)
        said = capsys.readouterr().out
        assert "EMA" in said and "is taken" in said and said.count("\n") == 1 + ("left out" in said)

def test_two_readings_are_named(tmp_path):
    for content, names in (({"student": STATE, "teacher": moved()}, ("student", "teacher")), ({"a": prefixed("backbone."), "b": {"c": moved()}}, ("a/backbone.", "b/c")),
                           (prefixed("encoder_q.") | prefixed("encoder_k.", moved()), ("encoder_q.", "encoder_k.")), ({"ema_a": {"ema": STATE}, "ema": moved()}, ("ema",))):
        fails(lambda: built(tmp_path/"t.pth", content), "holds two such models", *names)

def test_what_lies_beside_a_prefix_is_said(tmp_path, capsys):
    content = {"teacher": prefixed("backbone.", without("head")) | {"head.mlp.0.weight": torch.ones(2, 2)}}
    found = built(tmp_path/"t.pth", content).state_dict()
    assert all(torch.equal(v, found[k]) for k, v in without("head").items())
    said = capsys.readouterr().out
    assert "left out is what lies beside it: head.mlp.0.weight" in said and "new: head.weight, head.bias" in said

def test_other_converters_unwrap_alike():
    vmoe = VMoE(depths=(1, 1), width=16, heads=2, patch=8, experts=3).build(5, 16).eval()
    settings = dict(divided_depths=[1, 1], moe_pos=[0, 1], num_expert=3, embed_dim=16, num_heads=2, patch_size=8, img_size=16, num_classes=5, qkv_bias=True, norm_eps=1e-6)
    state, x = to_published(vmoe), torch.randn(2, 3, 16, 16)
    for content in (prefixed("module.", state), {"net": {"a": prefixed("model.", state)}}, {"model": state, "model_ema": moved(state)}):
        assert torch.equal(vmoe_from_published(content, settings)(x), vmoe(x))
    fails(lambda: vmoe_from_published({"student": state, "teacher": moved(state)}, settings), "two such models", "student", "teacher")


# --- what is no such teacher ---

NONE = {
    "empty": ({}, ["no checkpoint", "an empty one"]), "an empty state": ({"model": {}}, ["no checkpoint", "model"]), "a list": ([STATE], ["no checkpoint", "a list"]),
    "no position embedding": (without("pos_embed"), ["missing: pos_embed"]), "nor under a prefix": (prefixed("model.", without("pos_embed")), ["missing: pos_embed"]),
    "a ResNet": (timm.create_model("resnet10t", num_classes=10).state_dict(), ["missing: cls_token, pos_embed, ", "unknown: conv1"]),
    "deeper": (timm_vit(depth=3).state_dict(), ["unknown: blocks.2.norm1.weight"]), "shallower": (timm_vit(depth=1).state_dict(), ["missing: blocks.1.norm1.weight"]),
    "wider": (timm_vit(embed_dim=24).state_dict(), ["cls_token is (1, 1, 24) in it, (1, 1, 16) here"]),
    "a width of the position embedding alone": (STATE | {"pos_embed": torch.zeros(1, 5, 24)}, ["pos_embed is (1, 5, 24) in it, (1, 5, 16) here"]),
    "no grid": (STATE | {"pos_embed": torch.zeros(1, 7, 16)}, ["pos_embed is (1, 7, 16)"]), "distilled": (timm_vit("deit_tiny_distilled_patch16_224").state_dict(), ["dist_token"]),
    "a flat position embedding": (STATE | {"pos_embed": torch.zeros(5, 16)}, ["pos_embed is (5, 16)"]),
    "quantised": (STATE | {"blocks.0.mlp.fc1.weight": torch.zeros(64, 16, dtype=torch.int8)}, ["blocks.0.mlp.fc1.weight is int8 in it, float32 here"]),
    "complex": (STATE | {"norm.bias": torch.zeros(16, dtype=torch.complex64)}, ["norm.bias is complex64"]),
    "sparse": (STATE | {"norm.bias": torch.zeros(16).to_sparse()}, ["norm.bias is sparse_coo"]),
    "NaN": (STATE | {"norm.bias": torch.full((16,), torch.nan)}, ["NaN or infinity in norm.bias"]), "infinity": (STATE | {"head.bias": torch.full((10,), torch.inf)}, ["NaN", "head.bias"])}

@pytest.mark.parametrize("content, said", NONE.values(), ids=NONE)
def test_what_is_no_such_teacher(tmp_path, content, said): fails(lambda: built(tmp_path/"t.pth", content), f"checkpoint {tmp_path/'t.pth'}: ", *said)

def test_tensors_without_numbers():
    fails(lambda: load(timm_vit(), {k: v.to("meta") for k, v in STATE.items()}), "cls_token has a shape and no numbers in it")
    fails(lambda: load(timm_vit(), STATE | {"norm.bias": 3}), "norm.bias is a int in it")

class Code:
    "What a pickle may hold beside tensors."

FILES = {"empty": (lambda b: b"", "is empty"), "cut": (lambda b: b[:len(b) // 2], "is damaged"), "pointer": (lambda b: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
         "page": (lambda b: b"\n <!DOCTYPE html><html>", "web page"), "index": (lambda b: b'{"metadata": {}}', "JSON"), "other": (lambda b: b"weights" * 99, "is damaged, or no file of weights")}

@pytest.mark.parametrize("damage, said", FILES.values(), ids=FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_files_that_hold_no_weights(tmp_path, damage, said, suffix):
    path = tmp_path/f"t{suffix}"
    {".pth": torch.save, ".safetensors": save_file, ".npz": lambda s, p: np.savez(p, **{k: v.numpy() for k, v in s.items()})}[suffix](STATE, path)
    path.write_bytes(damage(path.read_bytes()))
    fails(lambda: built(path), str(path), said)

def test_files_of_other_things(tmp_path):
    fails(lambda: built(tmp_path/"none.pth"), f"checkpoint {tmp_path/'none.pth'} is missing", kind=FileNotFoundError)
    fails(lambda: built(tmp_path), f"checkpoint {tmp_path} is a folder")
    fails(lambda: built(""), "is a folder")
    for content, name in ((VIT, "VisionTransformer"), ({"model": STATE, "args": Code()}, "Code")):
        torch.save(content, tmp_path/"code.pth")
        fails(lambda: built(tmp_path/"code.pth"), "code.pth holds more than tensors and plain data", name, "state_dict()")

def test_files_by_other_names(tmp_path):
    save_file(STATE, tmp_path/"t.pth")
    torch.save(STATE, tmp_path/"t.ckpt", _use_new_zipfile_serialization=False)
    torch.save(STATE, tmp_path/"t.bin")
    for name in ("t.pth", "t.ckpt", "t.bin"): assert equal(built(tmp_path/name).state_dict(), STATE) and equal(unwrap(read(tmp_path/name)), STATE)


# --- classifier and positions ---

def test_a_new_classifier_is_always_said(tmp_path, capsys):
    for content, classes in ((STATE, 7), (without("head"), 10), (without("head.bias"), 10)):
        found = built(tmp_path/"t.pth", content, classes).state_dict()
        assert all(torch.equal(v, found[k]) for k, v in without("head").items())
        assert f"checkpoint {tmp_path/'t.pth'}: new: head.weight, head.bias\n" == capsys.readouterr().out

def test_a_new_classifier_of_a_pretrained_model_is_said(capsys, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    for classes, said in ((1000, ""), (7, "vit_tiny_patch16_224: new: head\n")):
        ViT(depths=(1, 1), pretrained=True, options={"depth": 2, **SMALL}).vit(classes, 8)
        assert capsys.readouterr().out == said

def test_both_classifiers_of_a_distilled_model(tmp_path, capsys):
    name = "deit_tiny_distilled_patch16_224"
    state = timm_vit(name).state_dict()
    assert equal(built(tmp_path/"t.pth", state, name=name).state_dict(), state) and capsys.readouterr().out == ""
    built(tmp_path/"t.pth", state, 7, name=name)
    assert "new: head.weight, head.bias, head_dist.weight, head_dist.bias\n" in capsys.readouterr().out

def test_positions_are_resized_behind_the_models_own_tokens(tmp_path, capsys):
    found = built(tmp_path/"t.pth", STATE, size=16).pos_embed
    assert found.shape == (1, 17, 16) and torch.equal(found[:, :1], STATE["pos_embed"][:, :1]) and "resized: pos_embed\n" in capsys.readouterr().out
    four = dict(reg_tokens=4)                                             # 1 + 4 + 2 x 2 tokens: nine, and no grid of 3 x 3
    state = timm_vit(**four).state_dict()
    assert state["pos_embed"].shape[1] == 9
    found = built(tmp_path/"t.pth", state, size=16, **four).pos_embed
    assert found.shape == (1, 21, 16) and torch.equal(found[:, :5], state["pos_embed"][:, :5])
    fails(lambda: built(tmp_path/"t.pth", state | {"pos_embed": torch.zeros(1, 10, 16)}, size=16, **four), "pos_embed is (1, 10, 16) in it, (1, 21, 16) here")
    plain = timm_vit("vit_medium_patch16_gap_240", class_token=False).state_dict()
    assert built(tmp_path/"t.pth", plain, name="vit_medium_patch16_gap_240", size=12, class_token=False).pos_embed.shape == (1, 9, 16)

def test_positions_of_a_source_and_a_target(capsys):
    teacher = ViT(depths=(1, 1), options=SMALL | {"depth": 2, "reg_tokens": 4})
    source, target = teacher.build(10, 8), teacher.build(10, 16)
    treated = assemble(target, [m.state_dict() for m in source], teacher.rules())
    assert "0.embed.vit.pos_embed" in treated and torch.equal(target[0].embed.vit.pos_embed[:, :5], source[0].embed.vit.pos_embed[:, :5])
    lacks = [{k: v for k, v in m.state_dict().items() if "pos_embed" not in k} for m in source]
    fails(lambda: assemble(target, lacks, teacher.rules()), "missing: embed.vit.pos_embed")


# --- JAX ---

def jax_arrays(state, heads=2):
    "The state of a timm ViT as the JAX code writes it."
    found = {"cls": state["cls_token"], "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0), "embedding/bias": state["patch_embed.proj.bias"],
             "Transformer/posembed_input/pos_embedding": state["pos_embed"], "head/kernel": state["head.weight"].T, "head/bias": state["head.bias"],
             "Transformer/encoder_norm/scale": state["norm.weight"], "Transformer/encoder_norm/bias": state["norm.bias"]}
    for i in range(2):
        own = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        width, block = len(own["norm1.bias"]), f"Transformer/encoderblock_{i}/"
        for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")): found |= {f"{block}{theirs}/scale": own[f"{ours}.weight"], f"{block}{theirs}/bias": own[f"{ours}.bias"]}
        for j, ours in enumerate(("fc1", "fc2")): found |= {f"{block}MlpBlock_3/Dense_{j}/kernel": own[f"mlp.{ours}.weight"].T, f"{block}MlpBlock_3/Dense_{j}/bias": own[f"mlp.{ours}.bias"]}
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for j, name in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            found |= {f"{attention}{name}/kernel": own["attn.qkv.weight"][rows].T.reshape(width, heads, -1), f"{attention}{name}/bias": own["attn.qkv.bias"][rows].reshape(heads, -1)}
        found |= {f"{attention}out/kernel": own["attn.proj.weight"].T.reshape(heads, -1, width), f"{attention}out/bias": own["attn.proj.bias"]}
    return {k: v.contiguous().numpy() for k, v in found.items()}

def test_the_files_of_the_jax_code(tmp_path, capsys):
    path = tmp_path/"t.npz"
    def write(arrays): np.savez(path, **arrays)
    write(jax_arrays(STATE))
    assert equal(built(path).state_dict(), STATE) and capsys.readouterr().out == ""
    built(path, classes=7)
    assert "new: head.weight, head.bias" in capsys.readouterr().out
    fails(lambda: built(path, depth=1), "2 blocks", "a model of 1")
    fails(lambda: built(path, embed_dim=24), str(path))
    for lacking in ("cls", "Transformer/encoder_norm/bias", "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"):
        write({k: v for k, v in jax_arrays(STATE).items() if k != lacking})
        fails(lambda: built(path), str(path))


# --- the published project's files ---

OPTIONS = dict(embed_dim=16, num_heads=2, patch_size=4, qkv_bias=True, norm_eps=1e-6)
TEACHER = PublishedViT(name="deit_tiny_patch16_224", depths=(2, 1), options=OPTIONS)

def published(classes=10, size=8):
    "A teacher and its state under published names."
    with seeded(0, "published"): chain = TEACHER.build(classes, size).eval()
    return chain, to_published(chain)

def single_files(folder, state, **changes):
    "The files of the teacher's modules in `folder`."
    for i in range(2):
        part = {k.removeprefix(f"stages.{i}."): v for k, v in state.items() if k.startswith(f"stages.{i}.")}
        torch.save(dict(model_name="deit_tiny_patch16_224", block_index=i, block_state_dict=part, divided_depths=[2, 1]) | changes, folder/f"deit_tiny_patch16_224_{i}.pth")

def test_a_published_teacher_from_one_file_and_from_its_modules(tmp_path, capsys):
    chain, state = published()
    torch.save({"model": prefixed("module.", state), "epoch": 3, "optimizer": {}}, tmp_path/"whole.pth")
    (tmp_path/"FT").mkdir()
    single_files(tmp_path/"FT", state)
    x = torch.randn(2, 3, 8, 8)
    for checkpoint in (str(tmp_path/"whole.pth"), str(tmp_path/"FT"), tuple(map(str, (tmp_path/"FT").glob("*.pth")))):
        assert torch.equal(TEACHER.but(checkpoint=checkpoint).build(10, 8).eval()(x), chain(x)) and capsys.readouterr().out == ""
    other = TEACHER.but(checkpoint=str(tmp_path/"FT")).build(4, 16)
    assert other(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert "new: 1.head.vit.head.weight, 1.head.vit.head.bias; resized: 0.embed.vit.pos_embed\n" in capsys.readouterr().out

def test_a_published_teacher_that_is_not_there_or_another(tmp_path):
    _, state = published()
    single_files(tmp_path, state)
    spec, one = TEACHER.but(checkpoint=str(tmp_path)), str(tmp_path/"deit_tiny_patch16_224_0.pth")
    fails(lambda: spec.but(depths=(1, 2)).build(10, 8), "divided_depths [2, 1], not [1, 2]")
    fails(lambda: spec.but(name="deit_small_patch16_224").build(10, 8), "model_name 'deit_tiny_patch16_224', not 'deit_small_patch16_224'")
    fails(lambda: spec.but(checkpoint=one).build(10, 8), "module 1 of 2 is missing")
    fails(lambda: spec.but(checkpoint=(one, one)).build(10, 8), "module 0 comes twice")
    fails(lambda: spec.but(options=OPTIONS | {"embed_dim": 24}).build(10, 8), str(tmp_path), "(1, 1, 16) in it, (1, 1, 24) here")
    fails(lambda: spec.but(checkpoint="absent.pth").build(10, 8), "checkpoint absent.pth is missing", kind=FileNotFoundError)
    (tmp_path/"none").mkdir()
    fails(lambda: spec.but(checkpoint=str(tmp_path/"none")).build(10, 8), "without files of modules", kind=FileNotFoundError)
    torch.save({"model": state | {"stages.0.pos_embed": torch.full((1, 5, 16), torch.nan), "pos_embed": torch.full((1, 5, 16), torch.nan)}}, tmp_path/"nan.pth")
    fails(lambda: spec.but(checkpoint=str(tmp_path/"nan.pth")).build(10, 8), "nan.pth: damaged checkpoint: NaN or infinity in stages.0.pos_embed")

def test_a_published_teacher_in_the_lab(tmp_path):
    chain, state = published()
    (tmp_path/"FT").mkdir()
    single_files(tmp_path/"FT", state)
    task = Task(train=Data(name="digits", per_class=4), test=(Data(name="digits", split="test", per_class=2),))
    lab, brief = Lab(tmp_path/"runs", runtime=Runtime(device="cpu"), floor=0), Training(epochs=1, batch_size=20, augment=Augment())
    spec = TEACHER.but(checkpoint=str(tmp_path/"FT"))
    teacher = lab.given("teacher", spec, task)
    meta = lab.end_to_end("meta", TEACHER.but(depths=(1, 1)), task, brief)
    stages = lab.distill("pairs", VMoE(depths=(1, 1), width=8, heads=2, patch=4, experts=2), meta, teacher, task, brief)
    assert len(stages) == 2 and len(teacher.settings["files"]) == 2
    file = tmp_path/"FT/deit_tiny_patch16_224_1.pth"
    torch.save(torch.load(file, weights_only=True) | {"epoch": 1}, file)
    assert lab.given("teacher", spec, task).path != teacher.path             # other files, another stage
    for f in (tmp_path/"FT").glob("*.pth"): f.unlink()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(teacher.model().eval()(x), chain(x))

MOE = dict(model_name="vmoe_student_base", embed_dim=16, num_heads=2, patch_size=4, num_expert=3, img_size=8, num_classes=5, divided_depths=[2], moe_pos=[0, 1])

def students(widths=(20, 20)):
    "The modules of a V-MoE with stitch layers, and each as the published code writes it: by module and as a whole."
    with seeded(0, "student"):
        chain = VMoE(depths=(2, 2, 2), width=16, heads=2, patch=4, experts=3).build(5, 8).eval()
        stitches = [[k, Stitch((1, a), (1, b), norm=True)] for k, a, b in (("before", widths[0], 16), ("after", 16, widths[1]))]
    for i, module in enumerate(chain):
        parts = {k: m for k, m in stitches if (i, k) not in ((0, "before"), (2, "after"))}
        wrapped = nn.Sequential(OrderedDict((k, v) for k, v in (("before", parts.get("before")), ("module", module), ("after", parts.get("after"))) if v is not None))
        state = to_published([module])
        for place, block, theirs in (("before", 0, "pre_stitch"), ("after", 1, "post_stitch")):
            for k, v in (parts[place].state_dict() if place in parts else {}).items():
                name = f"blocks.{block}.{theirs}.{k.replace('norm', 'ln').replace('linear', 'fc')}"
                state |= {name: v, f"stages.0.{name}": v}
        yield i, wrapped, state

def run(module, i, width=20): return module(torch.linspace(-1, 1, 192 if i == 0 else 5 * width).reshape((1, 3, 8, 8) if i == 0 else (1, 5, width)))

def test_student_modules_of_a_vmoe(tmp_path):
    for i, expected, state in students():
        torch.save({"model": state, "model_stages": [{k.removeprefix("stages.0."): v for k, v in state.items() if k.startswith("stages.")}], "epoch": 9}, tmp_path/"s.pth")
        idx = -1 if i == 2 else i
        stitches = dict(stitch_dim=20, **({"pre_stitch_pos": [0]} if i else {}), **({"post_stitch_pos": [1]} if i < 2 else {}))
        for more in ({"idx": idx}, {}, {"idx": idx, **stitches}):
            found = vmoe_from_published(str(tmp_path/"s.pth"), MOE | more)
            assert [n for n, _ in found.named_children()] == [n for n, _ in expected.named_children()]
            assert torch.equal(run(found.eval(), i), run(expected, i))

def test_a_whole_vmoe_that_kept_its_stitch_layers():
    parts = [(wrapped, state) for _, wrapped, state in students()]
    state = {k.replace("stages.0.", f"stages.{i}."): v for i, (_, s) in enumerate(parts) for k, v in s.items() if k.startswith("stages.")}
    settings = MOE | dict(model_name="vmoe_base", divided_depths=[2, 2, 2], moe_pos=list(range(6)))
    chain = vmoe_from_published({"model": state}, settings | dict(pre_stitch_pos=[2, 4], post_stitch_pos=[1, 3], stitch_dim=20)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(chain(x), parts[2][0](parts[1][0](parts[0][0](x)))) and state.keys() < to_published(chain).keys()
    fails(lambda: vmoe_from_published(state, settings | dict(pre_stitch_pos=[2])), "pre_stitch_pos = [2], but the checkpoint has [2, 4]")

def test_student_modules_of_a_vmoe_that_are_others():
    (_, _, first), (_, _, middle), (_, _, last) = students()
    for state, settings, said in ((middle, dict(stitch_dim=24), "stitch_dim = 24"), (middle, dict(pre_stitch_pos=[1]), "pre_stitch_pos = [1], but the checkpoint has [0]"),
            (first, dict(idx=1), "unknown: stages.0.cls_token"), (middle, dict(idx=0), "missing: stages.0.cls_token"), (last, dict(idx=0), "missing"), (middle, dict(divided_depths=[1, 1]), "one module"),
            (middle, dict(num_expert=4), "(3, 16) in it, (4, 16) here"), (middle, dict(model_name="vmoe_base"), "missing: stages.0.cls_token")):
        fails(lambda: vmoe_from_published(state, MOE | settings), said)
    lacks = {k: v for k, v in middle.items() if not k.endswith("pre_stitch.ln.weight")}
    fails(lambda: vmoe_from_published(lacks, MOE | {"idx": 1}), "missing: stages.0.blocks.0.pre_stitch.ln.weight")

MOD = dict(add_one_to_scale=True, learnable_scale_gain=True, scale_gain=.1)
SHARE = dict(state_dim=16, code_dim=8, layer_scale_initial_value=.1, use_geglu=True, qkv_bias_in_attention=False, ffn_capacity_factor=2., mod_fc_kwargs=MOD)
SECTIONS = dict(
    share_kwargs=SHARE, mediator=dict(num_heads=2, head_dim=4, latent_attention_kwargs=dict(share_layernorm=True)),
    readin=dict(num_heads=2, head_dim=4, input_dim=3, tokenizer_type="ConvNeXtImageTokenizer", include_residual_in_read_in_attention=True,
                tokenizer_kwargs=dict(num_stages=1, capacity_preset="atto", positional_grid_kwargs=dict(dim=4, grid_size=[2, 2]))),
    readout=dict(num_heads=2, head_dim=4, pre_output_layernorm=False, output_dim=5, use_head=False, tokenizer_kwargs=dict(softmax_type="vanilla"), tokenizer_type="OutputLatentPooling"))

def nac_student(kind, width=12):
    "The state of a published student module."
    import m2mkd.convert_nac as c
    k, options = c._split({**SHARE, **SECTIONS[kind]}, "a student", state_dim=..., code_dim=...)
    with seeded(0, kind):
        module, settings = c.ALONE[kind](options, dict(width=16, code_width=8))
        module.isolate(settings, state=kind != "mediator")
        before = {} if kind == "readin" else {"before": Stitch((1, width), (1, 16))}
        after = {} if kind == "readout" else {"after": Stitch((1, 16), (1, width))}
    stitched = nn.Sequential(OrderedDict(**before, module=module, **after)).eval()
    return stitched, {name: v for n, v in stitched.state_dict().items() if (name := c._alone_name(n, kind))}

@pytest.mark.parametrize("kind, numbers", [("readin", [0]), ("mediator", [1, 7]), ("readout", [-1])])
def test_the_published_file_of_all_student_modules(tmp_path, kind, numbers):
    (tmp_path/"student.yml").write_text(yaml.safe_dump(SECTIONS))
    expected, state = nac_student(kind)
    torch.save({"model": state, "model_stages": [], "epoch": 3}, tmp_path/"student.pth")
    code, fixed = expected.module.code, getattr(expected.module, "state", None)
    x = torch.randn(2, 3, 8, 8) if kind == "readin" else torch.randn(2, 6, 12)
    for more in (None, kind, *numbers):
        module = student_from_published(tmp_path/"student.pth", str(tmp_path/"student.yml"), code, fixed, module=more)
        torch.testing.assert_close(module(x), expected(x))
    for given, options, module in ((prefixed("module.", state), SECTIONS | {"stitch_dim": 12}, None), (state, {k: SECTIONS[k] for k in ("share_kwargs", kind)}, None)):
        torch.testing.assert_close(student_from_published(given, options, code, fixed, module=module)(x), expected(x))
    other = next(k for k in ("readin", "mediator", "readout") if k != kind)
    fails(lambda: student_from_published(state, SECTIONS, module=other), f"that of a {kind}", f"not of a {other}")
    fails(lambda: student_from_published(state, SECTIONS | {"stitch_dim": 16}), "stitch_dim = 16", "width 12")
    fails(lambda: student_from_published(state, SECTIONS | {kind: None}), f"lacks its section {kind}")

def test_a_student_module_that_nothing_tells():
    fails(lambda: student_from_published({"x": torch.zeros(1)}, SECTIONS), "'readin', 'mediator', 'readout'", "module =")
    fails(lambda: student_from_published({"x": torch.zeros(1)}, SECTIONS, module="propagator"), "unknown student module 'propagator'")
    fails(lambda: nac_settings(SECTIONS), "student_from_published")
    fails(lambda: student_from_published({}, {"mediator": 3, "share_kwargs": SHARE}), "configuration is a int")

def test_the_published_file_of_a_circuit(tmp_path):
    graph = dict(code_dim=8, signature_dim=6, num_input_latents=4, num_mediator_latents=6, num_output_latents=3, num_iterations=2, num_heads=2, head_dim=4)
    kwargs = dict(input_dim=3, output_dim=5, state_dim=16, latent_graph_kwargs=graph, student_state_dict_dir="nacs/students", student_type="tinyimnet",
                  input_tokenizer_kwargs=dict(num_stages=1, capacity_preset="atto", positional_grid_kwargs=dict(dim=4, grid_size=[2, 2])))
    whole = dict(criterion=dict(label_smoothing=0.1), data=dict(__speedrun__="purge", dataset=dict(kwargs=dict(input_size=8), name="TINY-IMNET")), git_rev="0",
                 model=dict(__speedrun__="purge", kwargs=kwargs, name="NeuralCompiler"), optimizer=dict(kwargs=dict(lr=0.1), name="AdamW"), training=dict(num_epochs=4))
    (tmp_path/"nac.yml").write_text(yaml.safe_dump(whole))
    settings, classes, size = nac_settings(kwargs)
    with seeded(0, "circuit"): circuit = settings.build(classes, size).eval()
    state, x = {published_name(k, 3): v for k, v in circuit.state_dict().items()}, torch.randn(2, 3, 8, 8)
    for given in (whole["model"], str(tmp_path/"nac.yml")): torch.testing.assert_close(nac_from_published(state, given)(x), circuit(x))
    fails(lambda: nac_settings(whole | {"model": whole["model"] | {"name": "PerceiverIO"}}), "model.name", "PerceiverIO")
    fails(lambda: nac_settings(kwargs | {"stitch_ckpt_path": "x.pth"}), "stitch_ckpt_path")
    fails(lambda: nac_settings(tmp_path/"absent.yml"), "absent.yml is missing", kind=FileNotFoundError)
    for text, said in (("a: [", "is no YAML"), ("- 1", "is a list"), ("", "is a NoneType")):
        (tmp_path/"bad.yml").write_text(text)
        fails(lambda: nac_settings(tmp_path/"bad.yml"), "bad.yml", said)

def test_what_published_names_stand_for():
    model, classes, pixels = published_settings(dict(model_name="vmoe_student_base", divided_depths=[3], moe_pos=[0, 1, 2]))
    assert (model.width, model.positions, classes, pixels) == (768, (0, 1, 2), 1000, 224)


# --- nothing, and two things ---

def test_a_file_that_holds_nothing_is_no_teacher(tmp_path):
    fails(lambda: built(tmp_path/"none.pth", {"model": None}), "no checkpoint")
    torch.save(None, tmp_path/"none.pth")
    fails(lambda: built(tmp_path/"none.pth"), "none.pth", "no checkpoint", "not a NoneType")
    file = str(tmp_path/"none.pth")
    published = PublishedViT(name="deit_tiny_patch16_224", depths=(1, 1), checkpoint=file)
    fails(lambda: published.build(10, 32), "none.pth", "no checkpoint", "not a NoneType")

def test_weights_come_from_one_place():
    fails(lambda: ViT(depths=(1, 1), pretrained=True, checkpoint="x.pth"),
          "pretrained = True", "'x.pth'", "give one of them")

@pytest.mark.parametrize("second", ["{", "<", "["])
def test_a_safetensors_file_whose_header_is_as_long_as_text_begins(tmp_path, second):
    length = int.from_bytes(f" {second}".encode(), "little")
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path/"x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(2).tobytes())
    assert read(path)["x"].tolist() == [2]
    path.write_text('{"net": {"a": 1}}')
    fails(lambda: read(path), "is text (JSON)")

def test_counters_of_batch_norm_of_other_times(tmp_path, capsys):
    from m2mkd.vit import Timm
    with seeded(0, "net"): state = timm.create_model("test_resnet", num_classes=3).state_dict()
    counters = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    def net(changed):
        torch.save({k: v for k, v in changed.items() if v is not None}, tmp_path/"net.pth")
        model = Timm(name="test_resnet", depths=(1, 1), checkpoint=str(tmp_path/"net.pth"))
        return model.vit(3, 32).state_dict()
    assert equal(net(state), state) and not capsys.readouterr().out
    for other, count in ((None, 0), (torch.tensor(7.), 7)):
        found = net(state | dict.fromkeys(counters, other))
        assert equal(found, state | {k: torch.tensor(count) for k in counters})
        assert "whole numbers, or new: " + next(iter(counters)) in capsys.readouterr().out
    for odd in (0.5, np.nan, np.inf):
        changed = state | dict.fromkeys(counters, torch.tensor(odd))
        fails(lambda: net(changed), "num_batches_tracked")

def test_published_settings_from_a_file(tmp_path):
    options = dict(model_name="vmoe_base", divided_depths=[1, 1], embed_dim=16, num_heads=2,
                   num_classes=3, img_size=32)
    (tmp_path/"c.yaml").write_text(yaml.safe_dump(options))
    model, classes, size = published_settings(options)
    assert published_settings(tmp_path/"c.yaml") == (model, classes, size)
    state = to_published(model.build(classes, size))
    one, two = (vmoe_from_published(state, s).state_dict() for s in (tmp_path/"c.yaml", options))
    assert equal(one, two)
    for f in (published_settings, lambda x: vmoe_from_published(state, x)):
        fails(lambda: f(None), "is a NoneType, not options by name")

@pytest.mark.parametrize("module", [[0], True, False, 1.5, {}])
def test_a_student_module_is_named_or_numbered(module):
    fails(lambda: student_from_published(STATE, {"readin": {}}, module=module),
          f"module = {module!r}", "'mediator'", "number")
