"""The operators under torch's own checks: schema, fake tensors, AOT autograd, compile, export, autograd registration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pl_normkit.graph import ModelGraph
from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec
from pl_normkit.methods.stochastic_pooling.ops import stochastic_pool, stochastic_pool_backward
from pl_normkit.nn import StochasticAdaptiveAvgPool1d, StochasticAdaptiveAvgPool2d, StochasticAvgPool2d

SPECS = [
    PoolSpec(1, (1, 1)),
    PoolSpec(1, (3, -1)),
    PoolSpec(0, (2, 2), (2, 2)),
    PoolSpec(0, (3, 3), (2, 2), (1, 1), ceil_mode=1, count_include_pad=0),
]
POOLS = [StochasticAdaptiveAvgPool2d(1), StochasticAdaptiveAvgPool2d(3), StochasticAvgPool2d(2), StochasticAvgPool2d(3, 2, 1)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own reading
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec: PoolSpec, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=memory_format).requires_grad_()
    seed = torch.tensor(123456789)
    arguments = (spec.encode(), 0.5, 1.0, True)
    out = stochastic_pool(x, seed, 0, *arguments)
    torch.library.opcheck(stochastic_pool, (x, seed, 0, *arguments))
    grad = torch.randn_like(out).requires_grad_()
    channels_last = memory_format == torch.channels_last
    torch.library.opcheck(stochastic_pool_backward, (grad, seed, 0, 9, 8, channels_last, *arguments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pool", POOLS)
def test_compiled_in_one_graph(pool: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pool, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 12, 13)
    gradients = []
    for run in (pool, compiled):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.equal(compiled(x), compiled(x))


def test_compiled_for_any_size_in_one_graph() -> None:
    torch._dynamo.reset()
    pool = StochasticAdaptiveAvgPool2d(1)
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 9, 8), (5, 3, 12, 13), (3, 3, 20, 7)):
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(1)
        expected = pool(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("pool", POOLS)
def test_export_in_evaluation_is_plain_pooling(pool: nn.Module) -> None:
    program = torch.export.export(pool.eval(), (torch.randn(2, 3, 12, 13),))
    pool.train()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called <= {"aten.adaptive_avg_pool2d.default", "aten.avg_pool2d.default"}
    assert len(called) == 1


def test_a_model_graph_reads_it_as_pooling() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), StochasticAdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    graph = ModelGraph.from_model(net, torch.randn(2, 3, 9, 9))
    assert [(node.op, node.module) for node in graph.pools] == [("stochastic_pool", "1")]
    assert [head.classifier.module for head in graph.heads] == ["3"]


def test_meta_tensors_give_shapes() -> None:
    with torch.device("meta"):
        assert StochasticAvgPool2d(3, 2, 1, ceil_mode=True)(torch.empty(2, 3, 10, 11)).shape == (2, 3, 6, 6)
        assert StochasticAdaptiveAvgPool1d(5)(torch.empty(2, 3, 10)).shape == (2, 3, 5)
