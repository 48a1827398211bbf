from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pl_normkit.errors import ModelSpecError
from pl_normkit.graph import call_arguments
from pl_normkit.inputs import parse_inputs
from pl_normkit.specs import build_model


class Own(nn.Module):
    example_input_array = torch.zeros(4, 5)


class Keyed(nn.Module):
    def forward(self, x: Any, batch: Any = None, mask: Any = None) -> Any:
        return x


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["3,8,8"], [((2, 3, 8, 8), torch.float32)]),
        (["128:int64"], [((2, 128), torch.int64)]),
        (["3,8,8:bfloat16", "5"], [((2, 3, 8, 8), torch.bfloat16), ((2, 5), torch.float32)]),
        ([" 3, 8"], [((2, 3, 8), torch.float32)]),
    ],
)
def test_inputs_are_read_with_shape_and_dtype(texts: list[str], expected: list[Any]) -> None:
    inputs = parse_inputs(texts, nn.Linear(1, 1))
    assert [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in inputs] == [(*one, "meta") for one in expected]


@pytest.mark.parametrize("text", ["", "3,a", "3,0,2", "-1", "3,8:floaty", "3,8:nn", "3;8", "3,,8", ":int64", "3.5"])
def test_a_text_that_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        parse_inputs([text], nn.Linear(1, 1))
    assert caught.value.what == f"--input {text!r} is no shape"
    assert "3,224,224" in caught.value.fix


def test_the_models_own_inputs_are_taken_when_none_are_given() -> None:
    assert tuple(parse_inputs([], Own()).shape) == (4, 5)
    (timm_input,) = parse_inputs([], build_model("timm:inception_v3"))
    assert tuple(timm_input.shape) == (2, 3, 299, 299)


def test_a_model_that_says_nothing_about_its_inputs_is_refused() -> None:
    with pytest.raises(ModelSpecError, match="the input shape of this model is not known\n  fix: give it, without the batch"):
        parse_inputs([], nn.Linear(1, 1))


def test_inputs_of_a_model_in_memory_vary_and_are_the_same_in_every_run() -> None:
    (first,), (second,) = (parse_inputs(["3,8,8"], nn.Linear(1, 1), device="cpu") for _ in range(2))
    assert (torch.equal(first, second), bool(first.std() > 0.5)) == (True, True)
    (tokens,) = parse_inputs(["8:int64"], nn.Linear(1, 1), device="cpu")
    assert tokens.unique().tolist() == [0]


def shapes(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")), inputs)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["ids:16"], (((2, 16), "int64"),)),
        (["ids:3,16"], (((3, 16), "int64"),)),
        (["x=3,8,8"], {"x": ((2, 3, 8, 8), "float32")}),
        (["3", "mask=8:bool"], {"x": ((2, 3), "float32"), "mask": ((2, 8), "bool")}),
        (
            ["x=", "batch.image=3,8", "batch.ids=4"],
            {"x": ((2,), "float32"), "batch": {"image": ((2, 3, 8), "float32"), "ids": ((2, 4), "int64")}},
        ),
    ],
)
def test_tokens_keywords_and_entries_of_dicts(texts: list[str], expected: Any) -> None:
    assert shapes(parse_inputs(texts, Keyed())) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["masc=8"], "forward of Keyed takes no 'masc'\n  where: --input\n  fix: did you mean 'mask'?"),
        (["batch=8", "batch.image=3"], "is inside of what is a tensor already"),
        (["mask=a"], "--input 'mask=a' is no shape"),
        (["8:bits8"], "--input '8:bits8' is no shape"),
    ],
)
def test_keywords_that_cannot_be_used(texts: list[str], message: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        parse_inputs(texts, Keyed())
    assert message in str(caught.value)


# Small enough to run: that the model takes the inputs is the proof.
LIBRARIES = {
    "timm:vit_tiny_patch16_224?img_size=32&depth=1&in_chans=1": (((2, 1, 32, 32), "float32"),),
    "torchvision:inception_v3?init_weights=False": (((2, 3, 299, 299), "float32"),),
    "torchvision:mc3_18": (((2, 3, 16, 112, 112), "float32"),),
    "torchvision:lraspp_mobilenet_v3_large": (((2, 3, 520, 520), "float32"),),
    "transformers:BertModel?num_hidden_layers=1&hidden_size=24&num_attention_heads=2": {"input_ids": ((2, 16), "int64")},
    "transformers:ViTModel?num_hidden_layers=1&hidden_size=24&num_attention_heads=2&image_size=32&num_channels=1": {
        "pixel_values": ((2, 1, 32, 32), "float32")
    },
    "transformers:T5Model?num_layers=1&d_model=24&num_heads=2": {
        "input_ids": ((2, 16), "int64"),
        "decoder_input_ids": ((2, 16), "int64"),
    },
}


@pytest.mark.parametrize(("spec", "expected"), LIBRARIES.items(), ids=LIBRARIES)
def test_known_inputs_of_libraries_fit_their_models(spec: str, expected: Any) -> None:
    model = build_model(spec)
    inputs = parse_inputs([], model, spec=spec)
    assert shapes(inputs) == expected
    args, kwargs = call_arguments(inputs)
    model.eval()(*args, **kwargs)


def test_tokens_of_a_model_in_memory_vary() -> None:
    spec = "transformers:BertModel?num_hidden_layers=1&hidden_size=24&num_attention_heads=2&vocab_size=50"
    tokens = parse_inputs([], build_model(spec, device="cpu"), spec=spec, device="cpu")["input_ids"]
    assert (len(tokens.unique()) > 10, int(tokens.max()) < 50) == (True, True)


def test_a_library_model_of_unknown_input_is_told_its_name() -> None:
    spec = "transformers:Wav2Vec2Model?num_hidden_layers=1"
    with pytest.raises(ModelSpecError, match="--input input_values=SIZES"):
        parse_inputs([], build_model(spec), spec=spec)
