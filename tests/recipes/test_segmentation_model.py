import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_normkit.errors import DataError, ModelSpecError
from pl_normkit.recipes.segmentation import LOSSES, ClassIoU, SegmentationLoss, SegmentationModule, poly_factor
from pl_normkit.recipes.segmentation.model import build_network

SMALL = {"encoder_name": "tu-test_resnet", "example_size": 32}


@pytest.mark.parametrize("architecture", ["Unet", "DeepLabV3Plus", "FPN", "PSPNet", "UPerNet", "Segformer"])
def test_any_architecture_gives_logits_of_the_size_of_its_input(architecture):
    module = SegmentationModule(["a", "b", "c"], architecture, **SMALL)

    logits = module(module.example_input_array)

    assert logits.shape == (2, 3, 32, 32)
    assert module.training


@pytest.mark.parametrize(
    ("architecture", "encoder", "evidence", "fix"),
    [
        ("DeepLabV3Pluss", "resnet18", "", "did you mean 'deeplabv3plus'?"),
        ("Unet", "resnet81", "resnet81", "did you mean 'resnet18'?"),
        ("Unet", "tu-no_such_model_at_all", "no_such_model_at_all", ""),
    ],
)
def test_an_unknown_network_is_named_with_the_nearest(architecture, encoder, evidence, fix):
    with pytest.raises(ModelSpecError) as caught:
        build_network(architecture, encoder, None, 3)
    assert evidence in caught.value.evidence
    assert fix in caught.value.fix
    assert encoder in caught.value.where


def test_an_option_the_architecture_refuses_is_a_model_error():
    with pytest.raises(ModelSpecError, match="decoder_channels"):
        build_network("Unet", "resnet18", None, 3, decoder_channels=(8, 8))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_do_not_count_in_any_loss(name):
    torch.manual_seed(0)
    loss = SegmentationLoss(name, ignore_index=255)
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    masks = torch.randint(4, (2, 8, 8))
    masks[:, :3] = 255
    changed = logits.detach().clone()
    changed[:, :, :3] = torch.randn(2, 4, 3, 8) * 9

    value = loss(logits, masks)
    value.backward()

    assert torch.allclose(value, loss(changed, masks), atol=1e-6)
    assert logits.grad is not None
    assert logits.grad[:, :, :3].abs().max() == 0
    assert logits.grad[:, :, 3:].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_over_ignored_pixels_alone_is_zero_not_nan(name):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)

    value = SegmentationLoss(name, 255)(logits, torch.full((1, 4, 4), 255))
    value.backward()

    assert value.item() == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_cross_entropy_is_torchs_own_and_joined_losses_add_up():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 5, 5), torch.randint(3, (2, 5, 5))
    masks[0, 0] = 7

    entropy = SegmentationLoss("cross_entropy", 7)(logits, masks)
    dice = SegmentationLoss("dice", 7)(logits, masks)

    assert torch.allclose(entropy, F.cross_entropy(logits, masks, ignore_index=7))
    assert torch.allclose(SegmentationLoss("cross_entropy+dice", 7)(logits, masks), entropy + dice)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), classes=st.integers(2, 6), ignored=st.integers(0, 30))
def test_iou_is_intersection_over_union_of_the_pixels_that_count(seed, classes, ignored):
    generator = torch.Generator().manual_seed(seed)
    truth, prediction = (torch.randint(classes, (2, 6, 6), generator=generator) for _ in range(2))
    truth.view(-1)[:ignored] = 255
    counts = truth != 255
    expected = []
    for label in range(classes):
        inside, guessed = (truth == label) & counts, (prediction == label) & counts
        union = (inside | guessed).sum().item()
        expected.append((inside & guessed).sum().item() / union if union else math.nan)

    metric = ClassIoU(classes, 255)
    metric.update(prediction[:1], truth[:1])
    metric.update(prediction[1:], truth[1:])

    assert torch.allclose(metric.compute(), torch.tensor(expected), equal_nan=True)


def test_a_class_that_does_not_occur_is_nan():
    metric = ClassIoU(3, 255)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))

    assert [round(value, 3) for value in metric.compute()[:2].tolist()] == [0.5, 0.0]
    assert math.isnan(metric.compute()[2])


@pytest.mark.parametrize(
    ("step", "power", "warmup", "expected"),
    [
        (0, 0.9, 0, 1.0),
        (50, 1.0, 0, 0.5),
        (50, 0.9, 0, 0.5**0.9),
        (100, 0.9, 0, 0.0),
        (150, 0.9, 0, 0.0),
        (0, 1.0, 4, 0.2),
        (50, 1.0, 4, 0.5),
    ],
)
def test_poly_schedule(step, power, warmup, expected):
    assert poly_factor(step, 100, power, warmup) == pytest.approx(expected)


def test_a_checkpoint_of_other_classes_is_refused():
    module = SegmentationModule(["a", "b"], "Unet", **SMALL)
    checkpoint: dict[str, object] = {}
    module.on_save_checkpoint(checkpoint)

    module.on_load_checkpoint(checkpoint)
    with pytest.raises(DataError, match=r"other classes") as caught:
        SegmentationModule(["a", "c"], "Unet", **SMALL).on_load_checkpoint(checkpoint)
    assert caught.value.evidence == "checkpoint: ['a', 'b']; data: ['a', 'c']"
