"""What `place_norms` refuses, by name, and what it leaves to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pl_normkit import place_norms
from pl_normkit.errors import ConfigError, EditError, NothingMatchedError
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.methods.norm_placement.placements import NOT_BY_EDITS
from tests.methods.norm_placement.by_hand import (
    bert,
    convnext,
    falcon,
    gpt2,
    hf_vit,
    llama,
    timm_vit,
    torch_encoder,
)
from tests.methods.norm_placement.making import Made


def small_encoder() -> Made:
    return torch_encoder()


REFUSED: list[tuple[str, Callable[[], Made], dict[str, Any], str]] = [
    ("deepnorm", gpt2, {}, "it is for post-norm blocks"),
    ("peri", bert, {}, "no norm stands before its weight layers"),
    ("post", bert, {}, "no norm stands at the entry of the branch"),
    ("post", lambda: hf_vit(dropout=0.1), {}, "what is added to the stream is the output of no module that is called once"),
    ("post", convnext, {}, "no norm stands at the entry of the branch"),
    ("lns", convnext, {}, "scales the branch already"),
    ("lns", lambda: (timm.create_model("resnet10t"), torch.randn(2, 3, 32, 32)), {}, "behind it would undo the gain"),
    ("head_scale", torch_encoder, {}, "the output projection of its attention is no module that is called, once"),
    ("post", falcon, {}, "what is added to the stream is the output of no module"),
    ("peri", falcon, {}, "its output is a sum of what transformer.h.0.self_attention.dense and transformer.h.0.mlp.dense_4h_to_h give"),
    ("head_scale", falcon, {}, "its output is a sum of what"),
    ("normformer", torch_encoder, {}, "its last weight layer is no module that is called, once"),
]


@pytest.mark.parametrize(
    ("kind", "make", "options", "reason"), REFUSED, ids=[f"{kind}-{number}" for number, (kind, *_) in enumerate(REFUSED)]
)
def test_what_no_edit_reaches_is_refused_by_name(kind: str, make: Callable[[], Made], options: dict[str, Any], reason: str) -> None:
    model, inputs = make()
    before, hooks = repr(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EditError, match=f"'{kind}' cannot be placed without rewriting forward") as refusal:
        place_norms(model, kind, inputs, **options)
    assert reason in refusal.value.evidence
    assert refusal.value.where
    assert repr(model) == before
    assert all(torch.equal(value, hooks[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", NOT_BY_EDITS)
def test_placements_inside_attention_are_refused_by_name(kind: str) -> None:
    with pytest.raises(EditError, match=f"'{kind}' cannot be placed without rewriting forward"):
        place_norms(nn.Linear(2, 2), kind, torch.zeros(1, 2))


def test_parallel_branches_are_refused_where_one_sum_serves_both() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.left, self.right = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.left(h) + self.right(h).relu()

    with pytest.raises(EditError, match="'post' cannot be placed") as refusal:
        place_norms(nn.Sequential(Parallel(), Parallel()), "post", torch.randn(2, 3, 8))
    assert refusal.value.evidence == "parallel branches share one addition"


def test_a_module_that_runs_for_several_layers_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.layer(self.norm(x)).relu()
            return x

    with pytest.raises(EditError, match="'lns' cannot be placed"):
        place_norms(Shared(), "lns", torch.randn(2, 3, 8))


def test_a_norm_written_into_the_block_is_refused() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(nn.functional.layer_norm(x, (8,), self.scale))

    with pytest.raises(EditError, match="'lns' cannot be placed"):
        place_norms(nn.Sequential(Inline(), Inline()), "lns", torch.randn(2, 3, 8))


def test_trained_models_are_refused_unless_told() -> None:
    model, inputs = timm_vit()
    model.blocks[1].norm2.weight.data[3] = 1.01
    with pytest.raises(EditError, match="'peri' changes what a trained model computes") as refusal:
        place_norms(model, "peri", inputs)
    assert refusal.value.where == "blocks.1.norm2.weight"
    assert place_norms(model, "peri", inputs, retrain=True)


@pytest.mark.parametrize("kind", ["depth_init", "deepnorm"])
def test_weights_without_values_are_not_scaled(kind: str) -> None:
    with torch.device("meta"):
        model, _ = torch_encoder(norm_first=False)
    with pytest.raises(EditError, match="the model is on the meta device"):
        place_norms(model, kind, torch.randn(2, 6, 16))


def test_another_placement_on_top_is_refused() -> None:
    model, inputs = timm_vit()
    place_norms(model, "peri", inputs)
    with pytest.raises(EditError, match="'peri' is placed already"):
        place_norms(model, "lns", inputs)


BAD = [
    ("pery", {}, "did you mean 'peri'"),
    ("peri", {"share": 0.5}, "it has none"),
    ("mix", {"share": 0.0}, "0.25 is the authors' default"),
    ("mix", {"share": 0.1}, "share=0.33"),
    ("lns", {"at": "input"}, '"auto" takes the output for images'),
]


def test_bad_options_say_what_there_is() -> None:
    model, inputs = small_encoder()
    with shared_traces(TraceStore()):
        for kind, options, fix in BAD:
            with pytest.raises(ConfigError) as refusal:
                place_norms(model, kind, inputs, **options)
            assert fix in refusal.value.fix


def test_a_network_without_blocks_has_no_place() -> None:
    with pytest.raises(NothingMatchedError, match="no residual branch"):
        place_norms(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "peri", torch.zeros(2, 4))


def test_a_filter_chooses_blocks_and_depth_counts_all() -> None:
    model, inputs = timm_vit()
    place_norms(model, "lns", inputs, filter_fn=lambda block, path: path == "blocks.2")
    assert [part.placed_gain.value for part in (model.blocks[2].attn.proj, model.blocks[2].mlp.fc2)] == pytest.approx([3**-0.5] * 2)
    assert not hasattr(model.blocks[1].attn.proj, "placed_gain")


def test_lns_says_where_the_start_works_against_it() -> None:
    """GPT-2 starts its output projections with 0.02 / sqrt(2L); timm's ViT does not."""
    torch.manual_seed(0)
    config: Any = __import__("transformers").GPT2Config(
        n_embd=32, n_layer=6, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = __import__("transformers").GPT2LMHeadModel(config)
    told = [str(change) for change in place_norms(model, "lns", gpt2()[1]).skipped]
    assert told == [
        "transformer.h.0.attn.c_proj: the last weights of branches start smaller with depth already, which weakens lns (its authors); "
        "start them as the other weights"
    ]
    plain, inputs = small_encoder()
    assert place_norms(plain, "lns", inputs).skipped == []


def test_lns_acts_on_every_layer() -> None:
    """A public code lower-cases the name of the norm and compares it with upper case: no block is scaled there."""
    model, inputs = llama()
    place_norms(model, "lns", inputs)
    gains = [module.value for name, module in model.named_modules() if name.endswith("placed_gain")]
    assert gains == pytest.approx([1, 1, 2**-0.5, 2**-0.5, 3**-0.5, 3**-0.5])


def test_padding_in_evaluation_keeps_torch_encoders_off_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=False)
    encoder = nn.TransformerEncoder(layer, 2)
    place_norms(encoder, "deepnorm", torch.randn(2, 6, 16))
    encoder.eval()
    x, mask = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=mask)
        alone = encoder(x[1:, :4])
    assert torch.allclose(found[1, :4], alone[0], atol=1e-5)
