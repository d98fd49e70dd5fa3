"A stage's hash depends on what is asked for, not on where a class lives or which fields there were then; a record makes our settings alone."
import importlib, json, re, sys, types
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

import m2mkd
from m2mkd import core
from m2mkd.core import Settings, bases, from_plain, hash_of, identity, read_json, sha256, to_plain
from m2mkd.data import Data
from m2mkd.folder import Folder
from m2mkd.nac import NAC
from m2mkd.train import Training
from m2mkd.vit import Meta, ViT

root = Path(__file__).resolve().parents[1]
frozen = root/"tests/frozen"
TEACHER = ViT(depths=(1, 2), options=dict(embed_dim=8, num_heads=2))


@pytest.fixture(autouse=True)
def register(monkeypatch):
    "A register of its own for each test: it begins with our classes, and what a test defines is gone after it."
    ours = {name: {m: c for m, c in found.items() if m.startswith("m2mkd.")} for name, found in core._classes.items()}
    monkeypatch.setattr(core, "_classes", {name: found for name, found in ours.items() if found})


def defined(module, name, body, alive=False):
    "The Settings class `name` with the lines `body`, defined in `module`, which stays among the imported ones if `alive`."
    space = types.ModuleType(module)
    if alive: sys.modules[module] = space
    vars(space).update(Settings=Settings, Literal=Literal, Field=Field)
    exec(f"class {name}(Settings):\n" + "".join(f"    {line}\n" for line in body), vars(space))
    return vars(space)[name]


# --- what is frozen ---

def test_committed_stages_keep_their_names():
    "From settings.json with today's code. If this fails, a class was renamed, or a field or default changed its meaning: see `absent` in core."
    names = {f.parent.name: f.parent for f in (root/"runs").rglob("stages/*/settings.json")}
    kept = json.loads((frozen/"stages.json").read_text())
    assert len(kept) == len(set(kept)) == 290 and not [n for n in kept if n not in names]
    for name, path in ((name, names[name]) for name in kept):
        settings, done = read_json(path/"settings.json"), read_json(path/"done.json")
        assert f"{settings['name']}" in name and hash_of(settings) == name.rpartition("-")[2] == done["hash"], name
        assert done["sums"]["settings.json"] == sha256(path/"settings.json"), name
        assert Folder(path).check(settings)


def ours(cls=Settings):
    for c in cls.__subclasses__():
        if c.__module__.startswith("m2mkd."): yield c
        yield from ours(c)


def test_no_base_changes():
    """A new field adds a line to frozen/bases.json; a line that is there stays. A default that shall be another: give `absent` the old one
    (then the base, and this line, stay) or name the field anew."""
    for module in core.OURS: importlib.import_module(f"m2mkd.{module}")
    kept, now = json.loads((frozen/"bases.json").read_text()), {c.__name__: {k: json.loads(v) for k, v in bases(c).items()} for c in ours()}
    assert kept == now
    assert {Path(f).stem for f in Path(m2mkd.__file__).parent.glob("*.py") if re.search(r"^class \w+\((.*, )?(Settings|Model|Prior|Gating)\b", f.read_text(), re.M)} <= {*core.OURS}
    assert len({c.__name__ for c in ours()}) == len(list(dict.fromkeys(ours()))), "two of our classes have one name"


# --- what changes and what does not ---

def test_a_class_in_another_module():
    body = ["width: int = 3", "depths: tuple[int, ...] = ()"]
    before = defined("old.place", "Net", body)(width=5)
    old, record = hash_of(before), to_plain(before)
    after = defined("new", "Net", body)
    assert hash_of(after(width=5)) == old == hash_of(record) == hash_of(record | {"class": "old.place:Net"})
    assert from_plain(record) == after(width=5) and record["class"] == "Net"
    for path in ("old.place:Net", "__main__:Net", "old.place.Net", "a:make.<locals>.Net"):
        assert type(from_plain({"class": path, "width": 5})) is after


def test_a_field_that_is_new():
    old = defined("mine", "Net", ["width: int"])(width=5)
    before, record = hash_of(old, [old]), to_plain(old)
    new = defined("mine", "Net", ["width: int", "norm: bool = False", "decay: str = 'weights'", "like: Settings | None = None", "absent = {'decay': 'all'}"])
    was = from_plain(record)
    assert was == new(width=5, decay="all") and hash_of(was, [was]) == before == hash_of(record, (record,))
    assert len({hash_of(x) for x in (was, new(width=5), new(width=5, norm=True, decay="all"), new(width=6, decay="all"))}) == 4
    assert identity(new(width=5)) == {"class": "Net", "width": 5, "decay": "weights"}
    nested = {"a": (record, {"b": record})}                       # in whatever it lies
    assert hash_of(nested) == hash_of({"a": [was, {"b": was}]}) and from_plain(nested)["a"][1]["b"].decay == "all"


def test_absent_is_inherited_and_may_stand_for_a_field_without_default():
    base = defined("mine", "Base", ["decay: str = 'weights'", "absent = {'decay': 'all'}"])
    class Own(base):
        start: str
        kind: int = 0
        absent = {"start": "fresh"}
    assert from_plain({"class": "Own"}) == Own(decay="all", start="fresh") and hash_of({"class": "Own"}) == hash_of(Own(decay="all", start="fresh"))
    with pytest.raises(ValueError, match="unknown field in absent of Net 'dekay'; .*decay"): defined("m", "Net", ["decay: int = 0", "absent = {'dekay': 1}"])


def test_equal_values_have_equal_hashes():
    "As given, as a default, after JSON: an int for a float, a list for a tuple, settings as plain data."
    net = defined("mine", "Net", ["rate: float = Field(1, ge=0)", "sizes: tuple[int, ...] = [1, 2]", "extra: dict = {}", "part: int | float = 1", "absent = {'rate': 0}"])
    one, after = net(rate=1), lambda x: from_plain(json.loads(json.dumps(to_plain(x))))
    assert hash_of(one) == hash_of(net(rate=1.0)) == hash_of(net()) == hash_of(after(one)) == hash_of(after(net()))
    assert hash_of(net(rate=0)) == hash_of({"class": "Net"}) == hash_of({"class": "Net", "rate": 0.0, "sizes": [1, 2], "extra": {}})
    assert hash_of(net(sizes=[1])) == hash_of(net(sizes=(1,))) != hash_of(net())
    assert hash_of(net(extra=dict(a=1, b=2))) == hash_of(net(extra=dict(b=2, a=1))) != hash_of(net(extra=dict(a=1)))
    assert hash_of(net(part=1.0)) != hash_of(net(part=1)), "1 of all and 1.0 of all may be two things"
    assert hash_of(Training(epochs=3)) == hash_of(Training(epochs=3, warmup=0)) == hash_of(to_plain(Training(epochs=3)))


def test_every_field_counts():
    for a, b in [(TEACHER, TEACHER.but(depths=(2, 1))), (TEACHER, TEACHER.but(options={})), (TEACHER, Meta(like=TEACHER)), (Meta(like=TEACHER),
                 Meta(like=TEACHER.but(name="x"))), (Data(name="a"), Data(name="a", every=2)), (Training(epochs=1), Training(epochs=1, augment=dict(flip=0)))]:
        assert hash_of(a) != hash_of(b)
    assert hash_of(Data(name="a", root="/here")) == hash_of(Data(name="a"))


def test_plain_data_keep_their_hashes():
    "Digests of data and caches rest on it."
    assert hash_of("decoded 2", None, [1, 2], 1.5, {"b": True, "a": Path("x")}) == "da47374b3f14" and hash_of() == "4f53cda18c2b"


# --- what a record may name ---

@pytest.mark.parametrize("named", ["os:system", "subprocess:Popen", "evil.module:X", "m2mkd.core:read_json", "m2mkd.core:Settings", "m2mkd.chain:Stitch",
                                   "X", "", "os", ":", None, 3, ["NAC"], {"class": "NAC"}])
def test_a_record_makes_registered_classes_only(named):
    with pytest.raises(ValueError, match="need a class that is not here: import or define it first") as e: from_plain({"class": named, "command": "true"})
    assert "\n" not in str(e.value) and "evil" not in "".join(sys.modules)


def test_a_record_imports_nothing_but_our_modules(monkeypatch):
    asked = []
    monkeypatch.setattr(core, "_classes", {})
    monkeypatch.setattr(core.importlib, "import_module", asked.append)
    with pytest.raises(ValueError, match="'evil:NAC' need a class that is not here"): from_plain({"class": "evil:NAC"})
    assert asked == [f"m2mkd.{module}" for module in core.OURS]


def test_two_classes_of_one_name():
    a = defined("a", "Net", ["width: int = 3"], alive=True)
    b = defined("b", "Net", ["width: int = 4"], alive=True)
    try:
        for ask in (lambda: to_plain(a()), lambda: to_plain([b()]), lambda: from_plain({"class": "Net"})):
            with pytest.raises(ValueError, match="two settings classes are named Net .one in a, one in b.*rename one"): ask()
        del sys.modules["a"]
        assert from_plain({"class": "a:Net"}) == b() and to_plain(b()) == {"class": "Net", "width": 4}
        with pytest.raises(ValueError, match="two settings classes are named Net"): to_plain(a())
    finally:
        for name in "ab": sys.modules.pop(name, None)


def test_a_class_that_is_defined_again():
    "A cell that is run again, a function that makes a class: the last one counts, and no object of another is recorded under its name."
    before = defined("mine", "Net", ["width: int = 3"])()
    assert to_plain(before) == {"class": "Net", "width": 3}
    now = defined("mine", "Net", ["width: int = 3", "norm: bool = False"])
    assert from_plain({"class": "Net"}) == now()
    with pytest.raises(ValueError, match="of a class Net that was defined again since: make them anew"): to_plain(before)


def test_classes_of_functions_and_classes():
    def made(width):
        class Own(Settings):
            width: int = 3
            class Inner(Settings): depth: int = 1
            inner: Inner = Inner()
        return Own(width=width)
    first = made(4)
    assert from_plain(to_plain(first)) == first and to_plain(first)["inner"]["class"] == "Inner"
    second = made(4)
    assert hash_of(second) == hash_of(first) and from_plain(to_plain(second)) == second
    with pytest.raises(ValueError, match="defined again"): to_plain(first)


# --- folders ---

def test_a_folder_from_before_a_field_is_the_same_folder(tmp_path):
    net = defined("mine", "Net", ["width: int", "norm: bool = False", "decay: str = 'weights'", "absent = {'decay': 'all'}"])
    (tmp_path/"settings.json").write_text(json.dumps({"model": {"class": "m2mkd.old:Net", "width": 5}, "seed": 0}))
    folder = Folder(tmp_path)
    assert folder.start({"model": net(width=5, decay="all"), "seed": 0}) and folder.check({"model": {"class": "Net", "width": 5}, "seed": 0})
    for other, said in ((net(width=5), "model.decay is 'all' there, 'weights' here"), (net(width=6, decay="all"), "model.width is 5 there, 6 here"),
                        (net(width=5, decay="all", norm=True), "model.norm is False there, True here")):
        with pytest.raises(ValueError, match=said): folder.check({"model": other, "seed": 0})
    assert "old:Net" in (tmp_path/"settings.json").read_text(), "what was asked for is never written again"


def test_settings_say_what_would_be_right():
    from m2mkd.pipeline import Task
    data = Data(name="digits")
    assert Task(train=data, test=data) == Task(train=data, test=(data,))
    for wrong, said in ((lambda: Task(data, data), r"Task takes its settings by name: Task\(train=..., test=...\)"),
                        (lambda: Task(train="digits", test=(data,)), r"'digits' is a name or a folder: write Data\(name=..., root=...\)"),
                        (lambda: ViT("vit_base"), "ViT takes its settings by name: ViT"), (lambda: Meta(like=NAC), r"like = .*: should be Timm\(...\)")):
        with pytest.raises(TypeError, match=said) as e: wrong()
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
