"""What is left of a model that `equalize_scales` was given: state, copies, checkpoints, wrappers, formats."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.errors import ConfigError, EditError
from pl_normkit.methods.fusion_scale import calibrate_scales, equalize_scales, fold, insert_equalizers, measure_fusion_scales
from pl_normkit.nn import ScaleEqualizer
from tests.methods.fusion_scale.models import Nested, OwnDecoder, images, scales_after


def test_running_statistics_modes_and_rng_are_restored() -> None:
    model = OwnDecoder(between=nn.Dropout(0.5)).eval()
    loader = DataLoader(TensorDataset(torch.cat(images(2))), batch_size=4, shuffle=True)
    rng = torch.get_rng_state()
    equalize_scales(model, loader)
    assert torch.equal(rng, torch.get_rng_state())
    assert not model.training
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert model.norm.running_mean.tolist() == [0.0] * 5  # type: ignore[union-attr]


def test_copies_pickles_and_checkpoints() -> None:
    model = Nested()
    before = copy.deepcopy(model.state_dict())
    equalize_scales(model, images())
    model.eval()
    x = images()[0]
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = Nested()
    insert_equalizers(fresh, x)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh.eval()(x), expected)
    assert not calibrate_scales(fresh, images())

    old = Nested()
    insert_equalizers(old, x)
    old.load_state_dict(before)  # from before there were equalizers: they stay the identity
    plain = Nested()
    plain.load_state_dict(before)
    assert torch.equal(old.eval()(x), plain.eval()(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(before)


def test_a_copy_has_equalizers_of_its_own() -> None:
    model = OwnDecoder()
    insert_equalizers(model, images()[0])
    twin = copy.deepcopy(model)
    calibrate_scales(twin, images())
    assert twin.get_submodule("fuse.scale_equalizer").is_calibrated
    assert not model.get_submodule("fuse.scale_equalizer").is_calibrated


def test_compiled_models() -> None:
    model = Nested()
    equalize_scales(model, images())
    model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()[0]
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel], ids=["compile", "DataParallel"])
@pytest.mark.parametrize("mode", ["explicit", "init"])
def test_wrapped_models_are_edited_through(wrap: Callable[[nn.Module], nn.Module], mode: Any) -> None:
    torch.manual_seed(1)
    plain = Nested()
    torch.manual_seed(1)
    model = Nested()
    expected, loader = equalize_scales(plain, images(), mode=mode), images()
    wrapped = wrap(model)
    assert measure_fusion_scales(wrapped, loader)[0].ratio > 1
    changes = equalize_scales(wrapped, loader, mode=mode)
    assert [str(change) for change in changes.made] == [str(change) for change in expected.made]
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    if mode == "explicit":
        assert fold(wrapped)
        fresh = wrap(Nested())
        insert_equalizers(fresh, loader[0])
        assert calibrate_scales(fresh, loader)


def test_formats_and_dtypes_are_kept() -> None:
    equalizer = ScaleEqualizer([2, 3])
    equalizer.set_statistics(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
    x = torch.randn(2, 5, 4, 6)
    expected = torch.cat([(x[:, :2] - 1) / 2, (x[:, 2:] + 1) / 0.5], 1)
    torch.testing.assert_close(equalizer(x), expected)
    last = equalizer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    assert equalizer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(equalizer(x[..., 0]), expected[..., 0])
    with pytest.raises(EditError):
        equalizer(x[:, :4])
    for bad in ([], [0, 2]):
        with pytest.raises(ConfigError):
            ScaleEqualizer(bad)
    for mean, std in ((torch.zeros(3), torch.ones(3)), (torch.zeros(2), torch.zeros(2)), (torch.full((2,), torch.nan), torch.ones(2))):
        with pytest.raises(ConfigError):
            equalizer.set_statistics(mean, std)


def test_measured_again_the_consumer_reads_equal_branches() -> None:
    model, loader = OwnDecoder(), images(3)
    before = measure_fusion_scales(model, loader)[0].ratio
    equalize_scales(model, loader)
    ((_, stds),) = scales_after(model, loader).values()
    assert before > 4
    assert max(stds) / min(stds) == pytest.approx(1, abs=1e-5)
