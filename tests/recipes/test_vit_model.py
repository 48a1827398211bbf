import pytest
import timm
import torch

from pl_normkit.errors import ConfigError, DataError, ModelSpecError, NormkitWarning, NothingMatchedError
from pl_normkit.recipes.vit import ClassifierModule, cosine_factor, layer_decay_groups
from pl_normkit.recipes.vit.checks import require_size, warn_cut_patches, warn_normalization
from pl_normkit.recipes.vit.network import build_network, build_with_settings
from pl_normkit.recipes.vit.samples import Normalization

SMALL = {"options": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}, "image_size": 16}


@pytest.mark.parametrize(
    "name",
    ["test_vit", "test_convnext", "test_efficientnet", "test_resnet", "vit_relpos_small_patch16_224", "resmlp_12_224"],
)
def test_any_timm_model_gives_logits_at_the_size_of_the_data(name):
    module = ClassifierModule(["a", "b", "c"], name, image_size=32, in_chans=1)

    assert module(module.example_input_array).shape == (2, 3)


def test_drop_path_grows_with_depth_to_its_largest():
    module = ClassifierModule(["a", "b"], drop_path=0.3, **SMALL)

    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in module.network.blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("vit_tinny_patch16_224", "no model 'vit_tinny_patch16_224'", "did you mean 'vit_tiny_patch16_224'?"),
        ("resnet18.a1_in1kk", "no weights 'a1_in1kk' of resnet18", "did you mean 'a1_in1k'?"),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest(name, what, fix):
    with pytest.raises(ModelSpecError) as caught:
        build_network(name, 3, image_size=32)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_an_option_the_model_refuses_is_a_model_error():
    with pytest.raises(ModelSpecError, match="patch_sise"):
        build_network("test_vit", 3, image_size=32, patch_sise=8)


@pytest.mark.parametrize(
    ("name", "has_branches"), [("densenet121", False), ("hrnet_w18", False), ("caformer_s18", True), ("resnet18", True)]
)
def test_networks_without_an_image_size_or_stochastic_depth_are_built_too(name, has_branches):
    """timm's classes refuse what they do not know in two wordings, and one after the other."""
    with torch.device("meta"):
        network, taken = build_with_settings(name, 3, image_size=64)
        assert taken == {"num_classes": 3, "in_chans": 3, **({"drop_path_rate": 0.1} if has_branches else {})}
        assert network.num_classes == 3
        if not has_branches:
            with pytest.raises(ModelSpecError, match="drop_path_rate") as caught:
                build_network(name, 3, image_size=64, drop_path=0.2)
            assert "leave --model.drop_path out" in caught.value.fix


@pytest.mark.zoo
@pytest.mark.parametrize("module", sorted(set(timm.models._registry._model_to_module.values())))
def test_a_model_of_every_module_of_timm_is_built(module):
    names = [name for name in timm.list_models() if timm.models._registry._model_to_module[name] == module]
    with torch.device("meta"):
        build_network(names[0], 3, image_size=224)


def test_an_image_size_that_the_network_fails_on_is_named():
    network = build_network("vit_tiny_patch16_224", 3, image_size=16, **SMALL["options"]).train()

    require_size(network, torch.zeros(2, 3, 16, 16))
    with pytest.raises(ModelSpecError, match="VisionTransformer fails on images of 24 x 24 pixels") as caught:
        require_size(network, torch.zeros(2, 3, 24, 24))
    assert "its weights were made at 224" in caught.value.fix
    assert network.training


def test_patches_that_leave_pixels_out_are_warned_of():
    options = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    warn_cut_patches(build_network("vit_tiny_patch16_224", 3, image_size=16, **options), 16)
    warn_cut_patches(build_network("vit_tiny_patch16_224", 3, image_size=20, dynamic_img_pad=True, **options), 20)
    warn_cut_patches(build_network("test_resnet", 3, image_size=20), 20)
    with pytest.warns(NormkitWarning, match="no patch holds the last 4 of the 20 pixels of a side"):
        warn_cut_patches(build_network("vit_tiny_patch16_224", 3, image_size=20, **options), 20)


def test_weights_that_cannot_be_had_are_one_error(monkeypatch):
    def offline(name, pretrained=False, **options):
        raise FileNotFoundError("we cannot find the requested files in the local cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelSpecError, match="neither in the cache nor can they be downloaded") as caught:
        ClassifierModule(["a", "b"], "resnet18", pretrained=True)
    assert "local cache" in caught.value.evidence
    assert "HF_HOME" in caught.value.fix


@pytest.mark.parametrize(
    ("option", "value"),
    [("drop_path", 1.0), ("label_smoothing", 1.0), ("layer_decay", 0.0), ("warmup_epochs", -1), ("ema_decay", 1.0)],
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ConfigError, match=f"model option {option} cannot be used"):
        ClassifierModule(["a", "b"], **SMALL, **{option: value})


def test_layer_decay_is_exact_on_a_vit():
    """Embedding, three blocks (timm counts the final norm to the last), head: five layers. Only weight matrices decay."""
    network = ClassifierModule(["a", "b"], **SMALL).network
    groups = layer_decay_groups(network, 0.1, 0.05, 0.5, torch.zeros(2, 3, 16, 16))
    seen = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}

    expected = {}
    for name, parameter in network.named_parameters():
        first = name.partition(".")[0]
        layer = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "norm": 3, "head": 4}.get(first)
        layer = int(name.split(".")[1]) + 1 if layer is None else layer
        decays = parameter.ndim > 1 and first not in ("cls_token", "pos_embed")
        expected[name] = (0.1 * 0.5 ** (4 - layer), 0.05 if decays else 0.0)
    assert {name: seen[id(parameter)] for name, parameter in network.named_parameters()} == expected
    assert sum(len(group["params"]) for group in groups) == len(expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_layer_decay_reaches_every_parameter_of_a_cnn_once(name):
    network = timm.create_model(name, num_classes=2)

    groups = layer_decay_groups(network, 0.1, 0.05, 0.5, torch.zeros(2, 3, 64, 64))

    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in network.parameters())
    rates = {group["lr"] for group in groups}
    assert max(rates) == 0.1
    assert len(rates) > 2


def test_frozen_parameters_are_in_no_group():
    network = ClassifierModule(["a", "b"], **SMALL).network
    network.blocks[0].requires_grad_(False)

    groups = layer_decay_groups(network, 0.1, 0.05, 0.5, torch.zeros(2, 3, 16, 16))

    frozen = {id(parameter) for parameter in network.blocks[0].parameters()}
    assert not frozen & {id(parameter) for group in groups for parameter in group["params"]}


class _Untraceable(torch.nn.Module):
    """Its path depends on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(images.flatten(1))
        return self.head(features if images.sum() > 0 else -features)


def test_decay_of_a_network_that_cannot_be_traced_goes_by_modules():
    network = _Untraceable()
    with pytest.warns(NormkitWarning) as caught:
        groups = layer_decay_groups(network, 0.1, 0.05, 1.0, torch.zeros(2, 1, 4, 4))
    (reason,) = (str(warning.message) for warning in caught)
    assert "weight decay goes by the types of modules alone" in reason
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name: decays[id(parameter)] for name, parameter in network.named_parameters()} == {
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.05,
        "head.bias": 0.0,
    }


@pytest.mark.parametrize(
    ("step", "warmup", "expected"),
    [(0, 0, 1.0), (50, 0, 0.5), (100, 0, 0.0), (130, 0, 0.0), (0, 4, 0.2), (3, 4, 0.8), (4, 4, 1.0), (52, 4, 0.5), (100, 100, 1.0)],
)
def test_cosine_schedule(step, warmup, expected):
    assert cosine_factor(step, 100, warmup) == pytest.approx(expected)


def test_mixed_targets_give_the_mixed_loss():
    """Shares of two classes cost what the same shares of the two losses cost."""
    module = ClassifierModule(["a", "b", "c"], label_smoothing=0.1, **SMALL).eval()
    module.log = lambda *args, **options: None
    images = torch.randn(4, 3, 16, 16)
    first, second = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    shares = 0.7 * torch.nn.functional.one_hot(first, 3) + 0.3 * torch.nn.functional.one_hot(second, 3)

    expected = 0.7 * module.training_step((images, first), 0) + 0.3 * module.training_step((images, second), 0)

    assert torch.allclose(module.training_step((images, shares), 0), expected)


def test_label_smoothing_spreads_its_share_over_all_classes():
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    module = ClassifierModule(["a", "b", "c"], label_smoothing=0.3, **SMALL).eval()
    module.log = lambda *args, **options: None
    logs = module(images).log_softmax(-1)

    expected = -0.7 * logs[range(4), labels].mean() - 0.3 * logs.mean()
    assert torch.allclose(module.training_step((images, labels), 0), expected)


def test_the_gaussian_flag_adds_keys_and_keeps_the_others():
    plain = ClassifierModule(["a", "b"], **SMALL).state_dict()
    biased = ClassifierModule(["a", "b"], gaussian_bias=True, **SMALL)

    added = biased.state_dict().keys() - plain.keys()
    assert plain.keys() <= biased.state_dict().keys()
    parameters = {"amplitude", "sigma"}
    assert added == {f"network.blocks.{block}.attn.gaussian_bias.{name}" for block in range(3) for name in parameters}
    groups = layer_decay_groups(biased.network, 0.1, 0.05, 0.5, biased.example_input_array)
    no_decay = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert {id(value) for name, value in biased.named_parameters() if "gaussian_bias" in name} <= no_decay


def test_a_network_without_attention_takes_no_gaussian_bias():
    with pytest.raises(NothingMatchedError):
        ClassifierModule(["a", "b"], "test_resnet", gaussian_bias=True, image_size=32)


def test_a_checkpoint_of_other_classes_or_another_network_is_refused():
    module = ClassifierModule(["a", "b"], gaussian_bias=True, **SMALL)
    checkpoint: dict[str, object] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)

    module.on_load_checkpoint(checkpoint)
    with pytest.raises(DataError, match="other classes"):
        ClassifierModule(["a", "c"], gaussian_bias=True, **SMALL).on_load_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match="another network") as caught:
        ClassifierModule(["a", "b"], **SMALL).on_load_checkpoint(checkpoint)
    assert caught.value.fix == "set --model.gaussian_bias true"
    with pytest.raises(ConfigError, match="another network") as caught:
        module.on_load_checkpoint({**checkpoint, "state_dict": {"network.head.weight": torch.zeros(2, 9)}})
    assert "options" in caught.value.fix


def test_pretrained_weights_want_the_normalization_they_were_trained_with():
    network = ClassifierModule(["a", "b"], "vit_tiny_patch16_224.augreg_in21k", **SMALL).network  # trained with 0.5 throughout

    warn_normalization(network, Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    with pytest.warns(NormkitWarning, match=r"--data.mean \[0.5, 0.5, 0.5\] --data.std \[0.5, 0.5, 0.5\]"):
        warn_normalization(network, Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
