"""Where an equalizer can stand in a model, and what it folds into: decided from the graph alone, before any data is seen."""

from __future__ import annotations

__all__ = ["Site", "find_sites", "trained_norm"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.methods.fusion_scale.absorbing_layers import fold_chain, relative_path
from pl_normkit.methods.fusion_scale.joins import Join, read_joins
from pl_normkit.methods.fusion_scale.modules import ScaleEqualizer
from pl_normkit.surgery import Change

_UNREACHABLE = "no module reads the joined features alone, and not every branch ends in a module of its own"


@dataclass(frozen=True)
class Site:
    """One place for one equalizer.

    Attributes:
        join: what is fused; for a layer that runs several times, its first fusion.
        host: path of the module whose first argument, or whose output, is equalized.
        where: which of the two.
        widths: channels of each branch.
        folds_into: layers that can take the statistics over, relative to the host, "" joined none.
        obstacle: why nothing can, "" where it can.
        calls: how often the host runs in one forward pass.
        level: equalizers that act before this one.
        norms: batch norms behind the fusion.
    """

    join: Join
    host: str
    where: Literal["before", "after"]
    widths: tuple[int, ...]
    folds_into: tuple[str, ...]
    obstacle: str
    calls: int = 1
    level: int = 0
    norms: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        branches = f"{len(self.widths)} branches of {', '.join(map(str, self.widths))} channels" if len(self.widths) > 1 else "one branch"
        often = f"; it runs {self.calls} times a pass and has one set of statistics over all" if self.calls > 1 else ""
        return f"equalizes {branches} of the {self.join.kind} in {self.join.node.module or 'the model'}{often}"


def find_sites(model: nn.Module, graph: ModelGraph, *, sums: bool = False) -> tuple[list[Site], list[Change]]:
    """Places for equalizers in execution order, and the multi-level fusions that cannot or need not have one, with the reason.

    A concatenation is equalized where its fusion convolution reads it. A sum of projections (1x1 convolutions of each level, added,
    as in LRASPP) is a concatenation written another way, and each projection's input is equalized. Other sums have no fusion
    weights: they are taken with `sums` only, one equalizer on the module that each operand comes from.
    """
    finder = _Finder(model, graph)
    found: list[Site] = []
    skipped: list[Change] = []
    for join in read_joins(graph):
        if not join.is_multi_level:
            continue
        sites = finder.sites_of(join, sums)
        if isinstance(sites, str):
            skipped.append(Change(join.node.module, f"{join.kind} of {len(join.branches)} branches left alone: {sites}"))
        else:
            found += sites
    kept, refused = _without_repeats(found, finder)
    return _with_levels(kept, graph), [*skipped, *refused]


class _Finder:
    """Looks modules up for the nodes of one graph."""

    def __init__(self, model: nn.Module, graph: ModelGraph) -> None:
        self.model = model
        self.graph = graph

    def sites_of(self, join: Join, sums: bool) -> list[Site] | str:
        if join.kind == "sum":
            projections = self._projections(join)
            if projections:
                return projections
            return self._at_branches(join) if sums else "a sum has no fusion weights of its own (sums=True takes it)"
        standing = [self._standing(join, user) for user in join.node.users]
        if all(standing):
            return [site for site in standing if site is not None]
        readers = [reader for user in join.node.users for reader in self._readers(join.node, user)]
        if readers and all(reader.op in ("batch_norm", "instance_norm") for reader in readers):
            return "a batch norm reads it and equalizes every channel already"
        single = self._single_reader(join, readers)
        if single is not None:
            return single
        return self._at_branches(join)

    def _standing(self, join: Join, user: Node) -> Site | None:
        """The site of an equalizer that reads the join already."""
        module = self._module(user.module)
        if not isinstance(module, ScaleEqualizer):
            return None
        host = user.module.rpartition(".")[0]
        return Site(join, host, "before", module.widths, module.folds_into, module.obstacle)

    def _single_reader(self, join: Join, readers: Sequence[Node]) -> list[Site] | None:
        widths = tuple(branch.width for branch in join.branches)
        if len(join.node.users) > 1:
            enclosing = self._enclosing_module(join.node)
            if enclosing is not None:
                return [Site(join, enclosing, "before", widths, (), "more than a convolution reads the equalized features")]
        hosts = [self._host_of(join.node, reader) for reader in readers]
        if not hosts or any(host is None for host in hosts) or any(self._is_lost(join.node, user) for user in join.node.users):
            enclosing = self._enclosing_module(join.node)
            if enclosing is None:
                return None
            return [Site(join, enclosing, "before", widths, (), "no plain convolution reads the equalized features")]
        sites = []
        for host, reader in zip(hosts, readers, strict=True):
            assert host is not None
            chain, obstacle = fold_chain(self.model, self.graph, reader)
            relative = tuple(relative_path(host, path) for path in chain)
            sites.append(Site(join, host, "before", widths, relative, obstacle))
        return sites

    def _is_lost(self, start: Node, user: Node) -> bool:
        return not self._readers(start, user)

    def _readers(self, source: Node, node: Node) -> list[Node]:
        """Convolutions and norms that `node` hands the channels of `source` to, through what keeps their order and count."""
        if self._is_convolution(node) or node.kind is Kind.NORM:
            return [node]
        passes = node.kind in (Kind.ACTIVATION, Kind.DROPOUT) or node.op in ("clone", "contiguous", "_to_copy") or self._is_equalizer(node)
        pads = node.op == "pad" and isinstance(self._module(node.module), _ConvNd)
        if not pads and (not passes or node.shape != source.shape):
            return []
        return [reader for user in node.users for reader in self._readers(source, user)]

    def _is_equalizer(self, node: Node) -> bool:
        return isinstance(self._module(node.module), ScaleEqualizer)

    def _is_convolution(self, node: Node) -> bool:
        return "conv" in node.op and isinstance(self._module(node.module), _ConvNd)

    def _host_of(self, start: Node, reader: Node) -> str | None:
        """The reader's own module; a dropout module on the way comes first, so that what it drops is the branch's mean."""
        node = reader
        host = reader.module
        while node is not start:
            node = next(source for source in node.inputs)
            module = self._module(node.module)
            if isinstance(module, _DropoutNd) and self.graph.calls[node.module, node.op] == 1:
                host = node.module
        module = self._module(host)
        return host if isinstance(module, (_ConvNd, _DropoutNd)) or self._runs_alone(host) else None

    def _runs_alone(self, path: str) -> bool:
        """Whether the module at `path` is a single operation."""
        return bool(path) and sum(_is_under(node.module, path) for node in self.graph.nodes) == 1

    def _enclosing_module(self, join: Node) -> str | None:
        """The smallest module that takes the join and nothing else, and whose forward is its own."""
        path = _common_path([user.module for user in join.users])
        while path and not _is_under(join.module, path):
            inside = [node for node in self.graph.nodes if _is_under(node.module, path)]
            outer = {source for node in inside for source in node.inputs if not _is_under(source.module, path)}
            if outer == {join} and not isinstance(self._module(path), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                return path
            path = path.rpartition(".")[0]
        return None

    def _projections(self, join: Join) -> list[Site]:
        """A site before each operand's convolution, where all operands are plain convolutions that only the sum reads."""
        nodes = [branch.node for branch in join.branches]
        if not all(self._is_convolution(node) and len(node.users) == 1 and self.graph.calls[node.module, node.op] == 1 for node in nodes):
            return []
        sites = []
        for node in nodes:
            chain, obstacle = fold_chain(self.model, self.graph, node)
            relative = tuple(relative_path(node.module, path) for path in chain)
            sites.append(Site(join, node.module, "before", (node.inputs[0].shape[1],), relative, obstacle))
        return sites

    def _at_branches(self, join: Join) -> list[Site] | str:
        operands = [[branch.node for branch in join.branches], list(join.node.inputs)]
        for nodes in operands:
            hosts = [self._output_of(node) for node in nodes]
            if all(host is not None for host in hosts):
                obstacle = "it acts on a branch before the fusion"
                return [Site(join, str(host), "after", (node.shape[1],), (), obstacle) for host, node in zip(hosts, nodes, strict=True)]
        return _UNREACHABLE

    def _output_of(self, node: Node) -> str | None:
        """The module whose only result `node` is, if the join alone reads it."""
        path = node.module.removesuffix(".scale_equalizer") if self._is_equalizer(node) else node.module
        if not path or len(node.users) != 1 or _is_under(node.users[0].module, path):
            return None
        inside = [other for other in self.graph.nodes if _is_under(other.module, path)]
        results = [other for other in inside if not other.users or any(not _is_under(user.module, path) for user in other.users)]
        module = self._module(path)
        return path if results == [node] and module is not None and not isinstance(module, nn.Sequential) else None

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def is_frozen(self, site: Site) -> bool:
        """Whether the layer that reads the equalized features is not trained."""
        parameters = list(self.model.get_submodule(site.host).parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def trained_norm(model: nn.Module, site: Site) -> str:
    """A batch norm behind the fusion that has seen batches, "" where none has."""
    for path in site.norms:
        tracked = getattr(model.get_submodule(path), "num_batches_tracked", None)
        if tracked is not None and int(tracked) > 0:
            return path
    return ""


def _norms_behind(graph: ModelGraph, join: Node) -> tuple[str, ...]:
    after = set(graph.downstream(join))
    return tuple(dict.fromkeys(norm.module for norm in graph.norms if norm.kind == "batch" and norm.node in after))


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _common_path(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    shared = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def _without_repeats(sites: list[Site], finder: _Finder) -> tuple[list[Site], list[Change]]:
    """One site per host: a shared layer pools the statistics of its calls, if every call reads a fusion of the same widths."""
    kept: list[Site] = []
    refused: list[Change] = []
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.host, site.where), []).append(site)
    for (host, _), group in groups.items():
        reason = "its layer is frozen" if finder.is_frozen(group[0]) else _why_not_shared(host, group, finder.graph)
        if reason:
            refused.append(Change(host, f"{group[0].join.kind} of {len(group[0].join.branches)} branches left alone: {reason}"))
        else:
            kept.append(replace(group[0], calls=len(group)))
    return kept, refused


def _why_not_shared(host: str, group: list[Site], graph: ModelGraph) -> str:
    runs = [count for (path, _), count in graph.calls.items() if path == host]
    if group[0].where == "before" and len(runs) == 1 and runs[0] > len(group):
        return "the layer also reads something else"
    if len({site.widths for site in group}) > 1:
        return "the layer reads fusions of different widths"
    later = set(graph.downstream(group[0].join.node))
    if any(site.join.node in later for site in group[1:]):
        return "the layer runs on its own result, so no fixed statistics fit all its calls"
    return ""


def _with_levels(sites: list[Site], graph: ModelGraph) -> list[Site]:
    """The number of equalizers on the longest way to each site."""
    levelled: list[Site] = []
    for site in sorted(sites, key=lambda site: site.join.node.index):
        before = (other.level + 1 for other in levelled if _acts_before(other, site, graph))
        levelled.append(replace(site, level=max(before, default=0), norms=_norms_behind(graph, site.join.node)))
    return levelled


def _acts_before(first: Site, second: Site, graph: ModelGraph) -> bool:
    return first.join.node is not second.join.node and second.join.node in graph.downstream(first.join.node)
