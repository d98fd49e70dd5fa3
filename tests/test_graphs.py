"The kernel and the regularisers against numbers computed from the published model code (tests/reference)."
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from m2mkd.graphs import Kernel, block_model, hinge_repulsion

REFERENCE = Path(__file__).parent/"reference"/"nac_small_scale_free.safetensors"
GRAPH = "state/latent_graphs.0."


@pytest.fixture(scope="module")
def published(): return load_file(REFERENCE)


def signatures(published, kind): return published[f"{GRAPH}{kind}_latents.signatures_"]


def test_hinge_repulsion(published):
    s = torch.cat([signatures(published, kind) for kind in ("input", "mediator", "output")])
    torch.testing.assert_close(hinge_repulsion(s, hinge=0.4), published["reg/hinge_repulsion_0.4"][0], rtol=1e-8, atol=0)


def test_block_model(published):
    s, loss = signatures(published, "mediator"), 0
    for i in range(3):
        kernel = Kernel(truncation=0.9).double()
        kernel.load_state_dict({"bandwidth": published[f"{GRAPH}propagators.{i}.latent_attention.kernel.bandwidth"]})
        loss = loss + block_model(kernel.probabilities(s, s), clusters=4, p_in=0.9, p_out=0.2)
    torch.testing.assert_close(loss.detach(), published["reg/stochastic_block_model"][0], rtol=1e-8, atol=0)
