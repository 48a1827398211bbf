"""What a norm computes, and how to change it: conversions of a checkpoint that keep its function, and running statistics that fit the data.

Sources: "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv 2305.14858, for the conversions; each function names its own.

    last_dim.py        operations that treat rows alike, layers that read and write them
    find.py            layer norms whose input can be given zero mean
    weights.py         the run before and after a conversion that must agree
    fold.py            `fold_norms`: scale and shift into the next linear layers
    merge.py           `merge_batch_norms`: norms of `to="prepbn"` that have turned into the next linear layers
    stock.py           `to_stock_norms`: norms of `to="fixed_std"` that have switched, as norms of torch
    rms_conversion.py  `to_rmsnorm`: layer norms to RMS norms with the same function
    compressed.py      `to_crmsnorm`: the same with a residual stream of one channel less
    scale_conversion.py `to_scalenorm`: RMS norms to ScaleNorms with the same function
    recalibrate.py     `recalibrate_batch_norm`: running statistics of other data, or precise ones
    swap.py            `swap_norms`: other norms before training
    places.py          which modules of a model a norm can replace
    operators/         one norm a file, found without registration
    rows.py            base of norms over channels; statistics over tokens of all ranks; `norm_inputs`: mask and time beside x
    schedule.py        norms that turn into others: their share at an optimizer step
    measure.py         what norms get in one run
    rules.py           NK921 to NK925: norms that do not do what they are there for
    swap_rules.py      NK926 to NK929 and NK935: a conversion to be had, and swapped norms where they do not work
    weight_rules.py    NK931 to NK934: weights that are normalized to no effect
    statistics_rules.py NK941: running statistics that do not fit the data
    modules.py         what conversions put into a model
"""

from __future__ import annotations

__all__ = [
    "fold_norms",
    "merge_batch_norms",
    "norm_inputs",
    "recalibrate_batch_norm",
    "swap_norms",
    "to_crmsnorm",
    "to_rmsnorm",
    "to_scalenorm",
    "to_stock_norms",
]

from pl_normkit.methods.norm_operators.compressed import to_crmsnorm
from pl_normkit.methods.norm_operators.fold import fold_norms
from pl_normkit.methods.norm_operators.merge import merge_batch_norms
from pl_normkit.methods.norm_operators.recalibrate import recalibrate_batch_norm
from pl_normkit.methods.norm_operators.rms_conversion import to_rmsnorm
from pl_normkit.methods.norm_operators.rows import norm_inputs
from pl_normkit.methods.norm_operators.scale_conversion import to_scalenorm
from pl_normkit.methods.norm_operators.stock import to_stock_norms
from pl_normkit.methods.norm_operators.swap import swap_norms
