"NAC: parity with numbers computed from the published code (tests/reference), the translation of its options, sampling, symmetries, and the whole method on a few digits."
import copy, json
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from m2mkd import modulated, products
from m2mkd.chain import evaluating
from m2mkd.convert_nac import student_from_published, nac_from_published, nac_settings, published_name
from m2mkd.core import from_plain, seeded, to_plain
from m2mkd.data import Augment, Data
from m2mkd.graphs import Complete, ErdosRenyi, Kernel, PlantedPartition, RingOfCliques, ScaleFree, WattsStrogatz, hinge_repulsion
from m2mkd.modulated import Block, Modulation, ModFC, Nodes
from m2mkd.nac import NAC, BlockModel, HingeRepulsion, KernelSettings, Latents, Seeding, at, preset
from m2mkd.pipeline import Lab, Task
from m2mkd.plain import plain
from m2mkd.products import ONEDNN, suits
from m2mkd.tokenizers import ConvNeXtStem, FirstLatent, Patches, Pooling
from m2mkd.train import Runtime, Training
from m2mkd.vit import Meta, ViT

REFERENCE = Path(__file__).parent/"reference"
SMALL = Block(heads=2, head_width=4)
MICRO = NAC(width=16, code_width=8, signature_width=12, propagators=2, inputs=Latents(count=4), mediators=Latents(count=12, prior=ScaleFree()),
            outputs=Latents(count=3), tokenizer=Patches(size=2, positions=4), read_in=SMALL, propagator=SMALL, read_out=SMALL.but(residual=False, share_norm=False),
            regularisers=(HingeRepulsion(), BlockModel(clusters=4)))


def reference(name):
    "(published options, {part: {name: tensor}})"
    parts = {}
    for key, value in load_file(REFERENCE/f"nac_{name}.safetensors").items(): parts.setdefault(key.split("/")[0], {})[key.split("/", 1)[1]] = value
    return json.loads((REFERENCE/f"nac_{name}.json").read_text()), parts

@pytest.fixture(scope="module")
def published(): return reference("small_scale_free")

def changed(options, **changes):
    "The options with some changed: `a__b=1` sets options['a']['b'], with `...` it is left out; `graph` and `read_out` are short."
    options, short = copy.deepcopy(options), dict(graph="latent_graph_kwargs", tokenizer="input_tokenizer_kwargs", kernel="kernel_kwargs", attention="latent_attention_kwargs")
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = options
        for parent in parents: place = place.setdefault(short.get(parent, parent), {})
        place.pop(last, None) if value is ... else place.update({last: value})
    return options

def small(dtype=torch.float64, **changes):
    "(micro circuit in evaluation mode, images)"
    with seeded(0, "circuit"): return MICRO.but(**changes).build(5, 8).to(dtype).eval(), torch.randn(3, 3, 8, 8, dtype=dtype)

def fails(what, *said):
    "One ValueError, in one line, that says all of `said`."
    with pytest.raises(ValueError) as e: what()
    assert all(s in str(e.value) for s in said) and "\n" not in str(e.value), str(e.value)

def weigh(logits): return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- parity ---

def test_everything_that_flows_and_all_gradients_of_the_published_model(published):
    options, parts = published
    nac, io = nac_from_published(parts["state"], options), parts["io"]
    image = io["image"].clone().requires_grad_()
    found = nac.inspect(image)
    assert set(found) == {"tokens", "input_states", "mediator_states", "output_states", "logits"} and torch.equal(nac(image), found["logits"])
    for name, value in found.items(): close(value, io[name])
    weigh(found["logits"]).backward()
    close(image.grad, io["grad_image"])
    own = {published_name(k, 4): p.grad for k, p in nac.named_parameters()}
    assert set(parts["grad"]) <= set(own) == set(parts["state"])
    for k, g in own.items(): close(torch.zeros_like(parts["state"][k]) if g is None else g, parts["grad"].get(k, torch.zeros_like(parts["state"][k])))

def test_both_regularisers_of_the_published_model(published):
    nac, reg = nac_from_published(published[1]["state"], published[0]), published[1]["reg"]
    nac.regularisers = HingeRepulsion(hinge=0.4, weight=1.), BlockModel(clusters=4, p_in=0.9, p_out=0.2)
    found = nac.auxiliary()
    close(found["hinge_repulsion"], reg["hinge_repulsion_0.4"][0])
    close(found["block_model"], reg["stochastic_block_model"][0])

@pytest.mark.parametrize("name", ["read_in", "propagator", "read_out"])
def test_published_student_modules(name):
    options, parts = reference(f"student_{name}")
    io = parts["io"]
    module = student_from_published(parts["state"], options, io["code"], io.get("state"))
    close(module(io["image" if name == "read_in" else "tokens"]), io["output"])
    fails(lambda: student_from_published(parts["state"], options, io["code"][:, :3]), "code", "(1, 3)", "(1, 16)")


# --- options: published ones to our settings, both ways strict ---

GRAPHS = {
    "erdos-renyi": (dict(n=24, p=0.2), ErdosRenyi(p=0.2)), "barabasi-albert": (dict(n=24, m=3), ScaleFree(m=3)), "complete": ({}, Complete()),
    "planted-partition": (dict(l=4, k=6, p_in=0.8, p_out=0.1), PlantedPartition(clusters=4, p_in=0.8, p_out=0.1)),
    "ring-of-cliques": (dict(num_cliques=3, clique_size=8), RingOfCliques(cliques=3)), "watts-strogatz": (dict(k=4), WattsStrogatz(neighbours=4, p=0.4))}
G, P, R = "graph__", "graph__propagator_kwargs__attention__kernel__", "graph__read_out_kwargs__"
CODE = dict(use_state_noise=False, use_code_as_mean_state=True)
HEAD = {R + "use_head": True, "output_tokenizer_type": "FirstSlotAsLogits", "output_tokenizer_kwargs": None}
PROPAGATORS = ("propagators.0.latent_attention.query_compiler.native_", "propagators.0.ffn.ffn.0.")
# (published options, what our settings say then, published parameters that are new, published parameters that are gone)
TABLE = [
    ({G + "share_propagator_weights": True}, dict(share="all"), [], []),
    ({G + "share_ffn_between_propagators": True}, dict(share="ffn"), [], []),
    ({G + "share_codes_between_iterations": False}, dict(codes_per_propagator=True), [], []),
    ({G + "enable_input_output_communication": False}, dict(inputs_reach_outputs=False), [], []),
    ({G + "enable_persistent_input_mediator_communication": False}, dict(inputs_reach_mediators="first"), [], []),
    ({G + "disable_input_mediator_communication": True}, dict(inputs_reach_mediators="never"), [], []),
    ({G + "use_input_states_as_mediator_states": True, G + "num_input_latents": 24}, dict(mediators_from_inputs=True, inputs=Latents(count=24)), [], []),
    ({G + "use_latent_seeder": False}, dict(seeder=None), ["input_latents.initial_states_"], ["latent_seeder.layernorm.weight"]),
    ({G + "latent_seeder_kwargs": dict(use_state_noise=False)}, dict(seeder=Seeding(state_noise=False)), [], ["latent_seeder.code_to_state_logvar.weight"]),
    ({G + "latent_seeder_kwargs": CODE, G + "code_dim": 24}, dict(seeder=Seeding(state_noise=False, code_is_state=True)), [], ["latent_seeder.code_to_state_mu.weight"]),
    ({G + "use_code_noise_in_latent_seeder": ...}, dict(seeder=Seeding(code_noise=0.)), [], []),
    ({G + "learnable_codes": False, G + "mediator_latent_kwargs": None}, dict(mediators=Latents(count=24, learn_codes=False)), [], []),
    ({G + "learnable_signatures": False, G + "input_latent_kwargs": dict(init_with_identical_codes=True)},
     dict(inputs=Latents(count=8, learn_signatures=False, same_codes=True)), [], []),
    ({G + "qkv_bias_in_attention": ...}, dict(propagator__qkv_bias=True, read_in__qkv_bias=True), [PROPAGATORS[0] + "bias"], []),
    ({G + "use_geglu": ..., G + "code_noise_scale": ...}, dict(propagator__geglu=False, read_out__code_noise=0.), [], []),
    ({G + "layer_scale_initial_value": None}, dict(propagator__layer_scale=None, read_in__layer_scale=1.), [], ["read_out.ffn.layer_scale.gamma"]),
    ({G + "layer_scale_initial_value": ...}, dict(propagator__layer_scale=1e-6, read_in__ffn_layer_scale=1e-6), [], []),
    ({G + "mod_fc_kwargs": None}, dict(propagator__modulation=Modulation(gain=1., learn=False, add_one=False)), [], [PROPAGATORS[1] + "scale_gain"]),
    ({G + "ffn_mod_fc_cls": "ModFC"}, dict(read_in__ffn_modulation=Modulation(gain=1., learn=False, add_one=False)), [], [PROPAGATORS[1] + "scale_gain"]),
    ({G + "read_in_kwargs": None}, dict(read_in__residual=False, read_in__ffn_drop_path=0.1), [], []),
    ({G + "read_in_kwargs__read_in_attention_kwargs": dict(num_heads=3, layer_scale_initial_value=None)}, dict(read_in__heads=3),
     [], ["read_in.read_in_attention.layer_scale.gamma"]),
    ({G + "propagator_kwargs__ffn_kwargs": dict(capacity_factor=1, include_residual=False)}, dict(propagator__ffn_factor=1, propagator__ffn_residual=False), [], []),
    (HEAD, dict(head=True, head_norm=False, pool=FirstLatent()), ["read_out.head.1.native_weight"], []),
    ({**HEAD, R + "pre_output_layernorm": ..., R + "attention__mod_fc_kwargs": {}}, dict(head_norm=True, head_modulation=Modulation()),
     ["read_out.head.0.module.weight", "read_out.head.1.scale_gain"], ["read_out.latent_attention.key_compiler.scale_gain"]),
    ({R + "include_residual_in_latent_attention": True}, dict(read_out__residual=True), [], []),
    ({R + "attention__share_layernorm": True}, dict(read_out__share_norm=True), [], ["read_out.latent_attention.sender_layernorm.weight"]),
    ({P + "truncation": ...}, dict(kernel=KernelSettings(truncation=None)), [], []),
    ({P + "learnable_bandwidth": False, P + "initial_bandwidth": 0.5}, dict(kernel=KernelSettings(learn_bandwidth=False, bandwidth=0.5)), [], []),
    ({P + "stochastic_eval_behaviour": "threshold"}, dict(kernel=KernelSettings(evaluate="threshold")), [], []),
    ({P + "stochastic_kernel": False}, dict(kernel=KernelSettings(temperature=None)), [], []),
    ({"output_tokenizer_kwargs": dict(softmax_type="gumbel-hard", softmax_temperature=0.5)}, dict(pool=Pooling(softmax="gumbel_hard", temperature=0.5)), [], []),
    ({"input_tokenizer_kwargs": dict(capacity_preset="atto", num_stages=3, repr_dim=18, input_dim=1)},
     dict(tokenizer=ConvNeXtStem(preset="atto", stages=3, positions=0, width=18), channels=1), [], ["input_tokenizer.positional_grid.grid"]),
    ({"tokenizer__positional_grid_kwargs__grid_size": [2, 3]}, dict(tokenizer__positions=8), [], []),
    *(({G + "mediator_latent_kwargs": dict(graph_preset=name, graph_generator_kwargs=given)}, dict(mediators=Latents(count=24, prior=prior, realise_at=0.8)), [], [])
      for name, (given, prior) in GRAPHS.items())]

def setting(settings, path):
    for name in path.split("__"): settings = getattr(settings, name)
    return settings

def state_of(settings, classes, size):
    "Random parameters of such a model under their published names."
    with seeded(0, "published"): circuit = settings.but(**{n: getattr(settings, n).but(prior=None) for n in ("inputs", "mediators", "outputs")}).build(classes, size)
    return {published_name(k, settings.propagators + 1): v.double() for k, v in circuit.state_dict().items()}

@pytest.mark.parametrize("options, expected, new, gone", TABLE, ids=["+".join(k.split("__")[-1] for k in row[0]) for row in TABLE])
def test_a_published_option_is_our_setting(published, options, expected, new, gone):
    given = changed(published[0], **options)
    before = copy.deepcopy(given)
    settings, classes, size = nac_settings(given)
    for path, value in expected.items(): assert setting(settings, path) == value, path
    state = state_of(settings, classes, size)
    here, reference = {k.removeprefix("latent_graphs.0.") for k in state}, {k.removeprefix("latent_graphs.0.") for k in published[1]["state"]}
    assert here >= set(new) and not reference & set(new) and reference >= set(gone) and not here & set(gone)
    circuit = nac_from_published(state, given)
    assert given == before and not any(m.training for m in circuit.modules())
    logits = circuit(torch.randn(2, settings.channels, *size, dtype=torch.float64))
    assert logits.shape == (2, classes) and logits.isfinite().all()
    for name in ("inputs", "mediators", "outputs"):
        wanted, made = getattr(settings, name), getattr(circuit[0], name)
        assert (made.signatures.requires_grad, made.codes.requires_grad) == (wanted.learn_signatures, wanted.learn_codes)

def test_what_is_left_out_has_the_published_defaults():
    sizes = dict(code_dim=8, signature_dim=6, num_input_latents=4, num_mediator_latents=12, num_output_latents=3, num_iterations=2)
    settings, classes, size = nac_settings(dict(input_dim=3, output_dim=7, state_dim=16, latent_graph_kwargs=sizes))
    plain = Modulation(gain=1., learn=False, add_one=False)
    block = Block(heads=1, head_width=64, qkv_bias=True, share_norm=False, modulation=plain, layer_scale=1e-6, ffn_factor=1., geglu=False, ffn_modulation=plain,
                  ffn_layer_scale=1e-6, code_noise=0.)
    assert settings.propagator == settings.read_out == block and settings.read_in == block.but(share_norm=True, residual=False, layer_scale=1.)
    assert settings.kernel == settings.read_out_kernel == KernelSettings(truncation=None, temperature=None) and settings.seeder == Seeding(code_noise=0.)
    assert (settings.share, settings.head, settings.head_norm, settings.pool, settings.tokenizer.preset) == ("all", True, True, FirstLatent(), "tiny")
    assert nac_from_published({"model": state_of(settings, classes, size)}, dict(input_dim=3, output_dim=7, state_dim=16, latent_graph_kwargs=sizes))

WRONG = [
    ({"student_types": "imagenet"}, ["student_types"]), ({"predefined_states_dir": "x"}, ["predefined_states_dir", "x"]), ({G + "mod_fc_kwargs": 3}, ["mod_fc_kwargs = 3"]), ({G + "num_head": 2}, ["num_head", "num_heads"]), ({G + "code_dim": ...}, ["code_dim", "missing"]),
    ({"input_dim": ...}, ["input_dim", "missing"]), ({G + "mod_fc_cls": "FC"}, ["FC", "ModFC"]), ({G + "read_in_cls": "ProjectionReadIn"}, ["ProjectionReadIn"]),
    ({G + "read_in_kwargs__layer_scale_initial_value": 1.}, ["layer_scale_initial_value", "read_in_kwargs"]), ({P + "straight_through": True}, ["straight_through"]),
    ({G + "mod_fc_kwargs__scale_dropout": 0.1}, ["scale_dropout"]), ({"output_tokenizer_kwargs": dict(softmax_type="sparsemax")}, ["sparsemax", "vanilla"]),
    ({"output_tokenizer_type": "FirstSlotAsLogits"}, ["softmax_type"]), ({"tokenizer__capacity_preset": "huge"}, ["huge"]),
    ({G + "latent_seeder_kwargs": dict(noise=1), G + "use_latent_seeder": False}, ["noise"]),
    ({"tokenizer__positional_grid_kwargs": dict(grid_size=[4, 4])}, ["dim", "missing"]), ({P + "truncation": 2.5}, ["2.5", "(0, 2)"]),
    ({G + "num_mediator_latents": 32}, ["24 latents", "32"]), ({G + "use_input_states_as_mediator_states": True}, ["24", "8"]),
    ({G + "mediator_latent_kwargs": dict(graph_preset="planted-partition", graph_generator_kwargs=dict(l=4, k=5, p_in=1, p_out=0))}, ["20 latents", "24"]),
    ({G + "mediator_latent_kwargs": dict(graph_preset="ring-of-cliques", graph_generator_kwargs=dict(num_cliques=4))}, ["num_cliques"]),
    ({G + "mediator_latent_kwargs": dict(graph_preset="hypercube")}, ["hypercube"])]

@pytest.mark.parametrize("options, said", WRONG, ids=["+".join(k.split("__")[-1] for k in row[0]) for row in WRONG])
def test_an_option_that_is_wrong_is_named(published, options, said): fails(lambda: nac_settings(changed(published[0], **options)), *said)

def test_a_student_module_whose_options_are_wrong():
    options, parts = reference("student_read_out")
    for change, said in (({"share_kwargs__state_dim": ...}, "state_dim"), ({"stitch_dim": 24}, "stitch_dim = 24, but pre_stitch of the checkpoint is of width 20"), ({"readout__output_dim": ...}, "output_dim"),
                         ({"readout__num_heads": ...}, "num_heads"), ({"readout__kernel_kwargs": {}}, "kernel_kwargs"), ({"mediators": {}}, "mediator"),
                         ({"mediator": {}, "readout": ...}, "lacks its section readout; it has mediator")):
        fails(lambda: student_from_published(parts["state"], changed(options, **change)), said)

def test_parameters_that_are_wrong_are_named(published):
    options, parts = published
    state, codes = parts["state"], "latent_graphs.0.input_latents.codes_"
    fails(lambda: nac_from_published({k: v for k, v in state.items() if k != codes}, options), codes)
    fails(lambda: nac_from_published(state | {"propagators.0.extra": state[codes]}, options), "propagators.0.extra")
    fails(lambda: nac_from_published(state | {codes: state[codes][:3]}, options), codes, "(3, 16)", "(8, 16)")
    fails(lambda: nac_from_published({"weights": {}}, options), "weights")
    fails(lambda: nac_from_published(state | {codes: state[codes] * torch.nan}, options), "NaN", codes)
    assert nac_from_published({"weights": {"module." + k: v for k, v in state.items()}}, options)
    assert nac_from_published({"model": state, "epoch": 3}, options)
    fails(lambda: nac_from_published(state, changed(options, graph__use_geglu=False)), "read_in.ffn.ffn.0.native_weight", "(72, 24)", "(36, 24)")

class Code:
    "What a pickle may hold beside tensors."

def test_published_files(published, tmp_path):
    options, parts = published
    torch.save({"model": parts["state"]}, tmp_path/"nac.pth")
    for source in (tmp_path/"nac.pth", str(tmp_path/"nac.pth"), {"model": parts["state"]}): close(nac_from_published(source, options)(parts["io"]["image"]), parts["io"]["logits"])
    torch.save({"model": parts["state"], "args": Code()}, tmp_path/"code.pth")
    fails(lambda: nac_from_published(tmp_path/"code.pth", options), "code.pth", "more than tensors")
    (tmp_path/"cut.pth").write_bytes((tmp_path/"nac.pth").read_bytes()[:1000])
    fails(lambda: nac_from_published(tmp_path/"cut.pth", options), "cut.pth", "damaged")
    with pytest.raises(FileNotFoundError, match="none.pth"): nac_from_published(tmp_path/"none.pth", options)


# --- what a circuit does ---

def test_evaluation_is_a_function_and_training_one_of_the_seed():
    circuit, images = small(torch.float32)
    with torch.no_grad(): assert torch.equal(circuit(images), circuit(images))
    circuit.train()

    def gradients(seed):
        with seeded(seed, "step"): return torch.autograd.grad(circuit(images).square().sum(), list(circuit.parameters()), allow_unused=True)
    first, again, other = gradients(0), gradients(0), gradients(1)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again))
    assert not all(a is None or torch.equal(a, b) for a, b in zip(first, other))

@pytest.mark.parametrize("truncation", [None, 0.9])
def test_links_are_drawn_as_torch_draws_them(truncation):
    kernel, signatures = Kernel(truncation, bandwidth=0.7, temperature=0.5).double(), torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d = 1 - torch.cosine_similarity(signatures[:, None], signatures, dim=-1)
    torch.manual_seed(1)
    drawn = kernel(signatures, signatures, batch=4).exp()
    torch.manual_seed(1)
    expected = torch.distributions.RelaxedBernoulli(torch.tensor(0.5, dtype=torch.float64), probs=(-d.clamp(min=0) / 0.7).exp()).rsample((4,))
    if truncation: expected = expected.masked_fill(d > truncation, 0.)
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize("mode", ["train", "expected", "threshold"])
def test_a_receiver_that_nobody_reaches(mode):
    kernel = KernelSettings(truncation=1e-3, temperature=0.5, evaluate="expected" if mode == "train" else mode)       # mediators hear only themselves
    circuit, images = small(kernel=kernel, read_out_kernel=kernel, read_out=SMALL.but(qkv_bias=True), mediators=Latents(count=12))
    circuit.train(mode == "train")

    def run():
        with seeded(0, "step"): return circuit(images)
    images.requires_grad_()
    logits = run()
    weigh(logits).backward()
    gradients = {n: p.grad for n, p in circuit.named_parameters() if p.grad is not None}
    assert logits.isfinite().all() and all(g.isfinite().all() for g in gradients.values())
    assert images.grad.count_nonzero() == 0 and gradients["3.attention.value.weight"].count_nonzero() == 0 and gradients["0.outputs.codes"].count_nonzero()
    with torch.no_grad(): circuit[-1].attention.value.weight.zero_(), circuit[-1].attention.value.bias.zero_()
    assert torch.equal(run(), logits)                                                                     # the message was zero

@pytest.mark.parametrize("evaluate", ["expected", "threshold"])
def test_mediators_have_no_order(evaluate):
    circuit, images = small(seeder=None, codes_per_propagator=True, kernel=KernelSettings(evaluate=evaluate))
    other, order = copy.deepcopy(circuit), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mediators = other[0].mediators
    for p, dim in ((mediators.signatures, 0), (mediators.codes, 1), (mediators.states, 0)): p.data = p.data.index_select(dim, order)
    one, two = circuit.inspect(images), other.inspect(images)
    close(two["mediator_states"], one["mediator_states"][:, order])
    close(two["logits"], one["logits"])

@pytest.mark.parametrize("bias", [False, True])
def test_the_absorbed_read_in_is_the_plain_one(bias):
    circuit, images = small(read_in=SMALL.but(qkv_bias=bias))
    attention, nodes = circuit[0].attention, circuit[0].inputs.nodes(circuit[0].seeder, 3)
    for p in attention.parameters(): p.data += 0.3 * torch.randn_like(p)
    tokens = circuit[0].tokenizer(images).detach().requires_grad_()

    oracle = plain(circuit)[0].attention                                                             # on the same parameters
    inputs = [tokens, *(p for n, p in attention.named_parameters())]
    one, two = ((y := f(nodes, tokens), *torch.autograd.grad(weigh(y), inputs, retain_graph=True)) for f in (attention, oracle))
    for a, b in zip(one, two, strict=True): close(a, b)

def results_of(circuit, images):
    "Logits and all gradients in training mode, with the random numbers of one step."
    with seeded(0, "step"): logits = circuit(images)
    own = [p for p in circuit.parameters() if p.requires_grad]
    found = torch.autograd.grad(weigh(logits), own, allow_unused=True)
    return logits, *(torch.zeros_like(p) if g is None else g for p, g in zip(own, found))

@pytest.mark.parametrize("tile, kept", [(1, 0), (10**9, 0), (100, 10**9), (10**9, 10**9)])
def test_a_small_circuit_computes_what_a_large_one_does(monkeypatch, tile, kept):
    "On each side of both sizes that choose: as published, equal calls equal to the bit."
    monkeypatch.setattr(products, "TILE", tile)
    monkeypatch.setattr(modulated, "KEPT", kept)
    circuit, images = small(propagator=SMALL.but(drop_path=0.1, ffn_drop_path=0.1, qkv_bias=True))
    circuit.train()
    ours, again, theirs = (results_of(c, images) for c in (circuit, circuit, plain(circuit)))
    for a, b, c in zip(ours, again, theirs):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize("size", ["micro", "tiny-imagenet"])
def test_float32_of_the_presets_is_near_the_published_form(size):
    settings = preset(size).but(propagators=1)
    with seeded(0, "circuit"):
        circuit = settings.but(mediators=Latents(count=settings.mediators.count)).build(10, 48).train()
        images = torch.randn(2, 3, 48, 48)
    ours, again, theirs = (results_of(c, images) for c in (circuit, circuit, plain(circuit)))
    for a, b, c in zip(ours, again, theirs):
        assert torch.equal(a, b)
        assert (a - c).norm() <= 1e-3 * c.norm() + 1e-5

@pytest.mark.parametrize("silent", [False, True])
def test_whether_all_receivers_hear_somebody_changes_no_number(silent):
    circuit, _ = small()
    attention = circuit[1].attention
    def nodes(n, start): return Nodes(torch.randn(3, n, 16, dtype=torch.float64), torch.randn(n, 8, dtype=torch.float64),
                                      torch.eye(12, dtype=torch.float64)[start:start + 1].expand(n, -1).clone())
    receivers, senders = nodes(4, 0), nodes(5, 0)
    if silent: receivers.signatures[2] = torch.eye(12, dtype=torch.float64)[1]
    found, weights = attention(receivers, senders), attention.weights(receivers, senders)
    close(found, attention.leave(receivers, weights @ attention.project(receivers, senders)[2]))
    assert (weights.sum(-1) > 0.5).all(0).all(0).tolist() == [True, True, not silent, True]

def test_large_products_give_the_numbers_of_the_plain_form(monkeypatch):
    monkeypatch.setenv("M2MKD_PRODUCTS", "mkl" if ONEDNN is None else "onednn")
    with seeded(0, "circuit"): circuit, images = preset("micro").but(mediators=Latents(count=32)).build(10, 48).train(), torch.randn(16, 3, 48, 48)
    assert ONEDNN is None or suits(torch.empty(16, 32, 48), torch.empty(96, 48)), "the products are to be large enough for oneDNN"
    def results(c):
        with seeded(0, "step"): loss = c(images).square().sum()
        return torch.autograd.grad(loss, [p for p in c.parameters() if p.requires_grad], allow_unused=True)
    for (name, _), ours, theirs in zip(((n, p) for n, p in circuit.named_parameters() if p.requires_grad), results(circuit), results(plain(circuit))):
        if theirs is not None: assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5, name

def test_what_assembly_leaves_untouched():
    with seeded(0, "init"): modules = MICRO.alone(5, 8)
    with seeded(1, "init"): circuit = MICRO.build(5, 8)
    before, states = copy.deepcopy(circuit.state_dict()), [m.state_dict() for m in modules]
    treated = MICRO.assemble(circuit, states)
    latents = [f"0.{n}.{what}" for n in ("inputs", "mediators", "outputs") for what in ("signatures", "codes")]
    seeder = [f"0.seeder.{n}" for n in ("norm.weight", "norm.bias", "mean.weight", "mean.bias", "logvar.weight", "logvar.bias")]
    assert treated == [*latents, *seeder, *(f"{i}.attention.kernel.bandwidth" for i in (1, 2, 3))]
    for key, value in circuit.state_dict().items():
        i, _, name = key.partition(".")
        assert torch.equal(value, before[key] if key in treated else states[int(i)][name]), key
    assert {k for s in states for k in s} - {k.partition(".")[2] for k in before} == {"code", "state"}

def test_a_learned_code_is_handed_on():
    settings = MICRO.but(code="learned")
    modules, circuit = settings.alone(5, 8), settings.build(5, 8)
    assert all(m.code.requires_grad for m in modules) and not any(m.code.requires_grad for m in MICRO.alone(5, 8))
    settings.assemble(circuit, [m.state_dict() for m in modules])
    torch.testing.assert_close(circuit[0].inputs.codes.mean(0), modules[0].code[0])
    torch.testing.assert_close(at(circuit[0].mediators, 0).mean(0), (modules[1].code + modules[2].code)[0] / 2)
    torch.testing.assert_close(circuit[0].outputs.codes.mean(0), modules[-1].code[0])

def test_for_another_size_and_other_classes():
    modules, circuit = MICRO.alone(5, 8), MICRO.build(3, 12)
    treated = MICRO.assemble(circuit, [m.state_dict() for m in modules], MICRO.rules())
    latents = {k for k in treated if k.startswith(("0.inputs", "0.mediators", "0.outputs", "0.seeder")) or "kernel" in k}
    pool = {f"3.pool.{n}.{p}" for n in ("confidence", "classifier") for p in ("weight", "bias")}
    assert set(treated) - latents == {"0.tokenizer.grid", *pool} and circuit(torch.randn(2, 3, 12, 12)).shape == (2, 3)

def test_a_gain_that_is_not_learned_is_not_rounded():
    layer, codes = ModFC(6, 5, 4, Modulation(gain=0.1, learn=False, add_one=False)).double(), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.scales(codes), 0.1 * torch.layer_norm(layer.scale(codes), (6,)), rtol=1e-14, atol=0)

def test_settings_come_back_from_json(published):
    for settings in (MICRO, nac_settings(published[0])[0], nac_settings(changed(published[0], **HEAD))[0], *(preset("micro", p) for p in ("scale-free", "planted-partition"))):
        assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings

def test_regularisers_reach_what_they_regularise():
    circuit, _ = small()
    sum(circuit.auxiliary().values()).backward()
    reached = {n for n, p in circuit.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    assert {"0.mediators.signatures", "1.attention.kernel.bandwidth", "2.attention.kernel.bandwidth"} <= reached <= {
        "0.inputs.signatures", "0.mediators.signatures", "0.outputs.signatures", "1.attention.kernel.bandwidth", "2.attention.kernel.bandwidth"}
    close(circuit.auxiliary()["hinge_repulsion"], 0.1 * hinge_repulsion(torch.cat([getattr(circuit[0], n).signatures for n in ("inputs", "mediators", "outputs")]), 0.4))


# --- what cannot be ---

BAD = [
    (lambda: MICRO.but(mediators=Latents(count=12, prior=RingOfCliques(cliques=5))), ["12", "5"]),
    (lambda: MICRO.but(mediators=Latents(count=12, prior=PlantedPartition(clusters=8))), ["12", "8"]),
    (lambda: MICRO.but(mediators=Latents(count=2, prior=ScaleFree(m=2))), ["2"]),
    (lambda: MICRO.but(inputs=Latents(count=0)), ["count", "0"]),
    (lambda: KernelSettings(truncation=2.), ["2.0", "(0, 2)"]), (lambda: KernelSettings(truncation=0.), ["0.0", "(0, 2)"]),
    (lambda: KernelSettings(bandwidth=0.), ["bandwidth"]), (lambda: KernelSettings(evaluate="sample", temperature=None), ["temperature"]),
    (lambda: MICRO.but(kernel=KernelSettings(truncation=None)), ["truncation", "prior"]),
    (lambda: MICRO.but(propagator=Block(heads=3, head_width=None)), ["3", "16"]),
    (lambda: MICRO.but(signature_width=2).build(5, 8), ["missing", "spurious", "2 dimensions"]),
    (lambda: ModFC(6, 5, 4)(torch.randn(1, 3, 6), torch.randn(3, 7)), ["7", "4"]),
    (lambda: MICRO.alone(5, 8)[1].update(*2 * (Nodes(torch.randn(1, 3, 16), torch.randn(1, 9)),)), ["9", "8"]),
    (lambda: MICRO.but(share="all").alone(5, 8), ["share", "all"]), (lambda: MICRO.build(5, 9), ["9", "2"]),
    (lambda: MICRO.but(mediators_from_inputs=True), ["12", "4"]), (lambda: MICRO.but(seeder=Seeding(state_noise=False, code_is_state=True)), ["8", "16"]),
    (lambda: MICRO.but(pool=FirstLatent()).build(5, 8), ["16", "5"]), (lambda: BlockModel(clusters=5).terms(small()[0]), ["12", "5"]),
    (lambda: MICRO.but(tokenizer=ConvNeXtStem(preset="huge")), ["huge"]), (lambda: preset("micro", "scale_free"), ["scale-free"])]

@pytest.mark.parametrize("what, said", BAD, ids=[" ".join(said) for _, said in BAD])
def test_what_cannot_be_is_one_clear_error(what, said): fails(what, *said)


# --- the whole method on a few digits ---

TEACHER = ViT(depths=(1, 1, 1, 1), options=dict(embed_dim=16, num_heads=2, patch_size=4))
META = Meta(like=TEACHER)
DIGITS = Task(train=Data(name="digits", per_class=10), test=(Data(name="digits", split="test", per_class=4),))
BRIEF = Training(epochs=1, batch_size=20, augment=Augment(flip=0))

@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("runs"), runtime=Runtime(device="cpu"), floor=0)
    meta = lab.end_to_end("meta", META, DIGITS, BRIEF)
    teacher = lab.finetune("teacher", TEACHER, lab.incubate("incubate", TEACHER, meta, DIGITS, BRIEF), DIGITS, BRIEF)
    modules = lab.distill("distill", MICRO, meta, teacher, DIGITS, BRIEF)
    final = lab.finetune("m2mkd", MICRO, modules, DIGITS, BRIEF)
    return dict(modules=modules, final=final, plain=lab.finetune("other_prior", MICRO.but(mediators=Latents(count=12, prior=Complete()), regularisers=()), modules, DIGITS, BRIEF))

def test_a_module_of_the_student_for_each_of_the_meta_model(stages):
    modules = stages["modules"]
    assert len(modules) == 4 and [s.settings["module"] for s in modules] == [0, 1, 2, 3]
    for stage, lone in zip(modules, MICRO.alone(10, 8)):
        assert {k.removeprefix("module.") for k in stage.state() if k.startswith("module.")} == set(lone.state_dict())
        assert all(v.isfinite().all() for v in stage.state().values())
        assert all("distill" in m and "hinge_repulsion" not in m for m in stage.metrics if "loss" in m)

def test_one_set_of_modules_serves_every_prior(stages):
    made = [{k.removeprefix("module."): v for k, v in s.state().items() if k.startswith("module.")} for s in stages["modules"]]
    for name in ("final", "plain"):
        settings = stages[name].spec
        with seeded(1, "init"): circuit = settings.build(10, 8)
        settings.assemble(circuit, made)
        for i, state in enumerate(made):
            own = circuit[i].state_dict()
            assert all(torch.equal(own[k], v) for k, v in state.items() if k not in ("code", "state"))
    assert stages["final"].spec.mediators.prior != stages["plain"].spec.mediators.prior

def test_regularisers_are_in_the_metrics(stages):
    records = [m for m in stages["final"].metrics if "loss" in m]
    lines = (stages["final"].path/"metrics.jsonl").read_text()
    assert records and all(m[k] == m[k] for m in records for k in ("loss", "hinge_repulsion", "block_model")) and "NaN" not in lines
    assert "hinge_repulsion" not in (stages["plain"].path/"metrics.jsonl").read_text()
    assert all(v.isfinite().all() for v in stages["final"].state().values())

def test_the_finished_model_is_loaded_from_its_folder(stages):
    circuit, images = stages["final"].model(), torch.randn(2, 3, 8, 8)
    with evaluating(circuit): assert circuit(images).shape == (2, 10) and torch.equal(circuit(images), circuit(images))
