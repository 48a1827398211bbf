"""Silent mistakes of wiring: a layer that never learns, a mask never read, softmax before cross-entropy. Derived here.

No paper is behind these rules: each follows from how torch computes gradients, and is tested on set-ups with one mistake and on
clean twins. The facts they judge are those of one training step (`pl_normkit.first_step`).

    rules.py         what the step's gradients and its loss show (NK001 to NK004, NK009, NK010)
    mode_rules.py    training and eval mode, and norms (NK005 to NK008)
    input_rules.py   what becomes of the inputs (NK011 to NK013)
    preview_rules.py what is contested (NK014 to NK016)
    unlearned.py     parameters that will not learn, and why: the judgements of NK001 and NK003
    code_names.py    which attributes a model's code reads
    code_paths.py    modules that a forward leaves out in every step
    constant_control.py whether constants alone decide over the use of an attribute
    step_cuts.py     cuts of the gradient in a training_step itself
    find.py          biases that the norm behind them removes
    eval_calls.py    calls a model in eval mode with the leaves of its inputs
    left_to_chance.py parts that a random number leaves out in eval mode
    mixing.py        where the samples of a batch mix first
    measure.py       the eval forward: active dropout, samples that mix, inputs without influence
    modules.py       a batch norm that stays in eval mode
    fix.py           keeps norms in eval mode; takes biases out of training
"""

from __future__ import annotations

__all__ = ["freeze_biases_before_norms", "keep_norms_in_eval"]

from pl_normkit.methods.wiring.fix import freeze_biases_before_norms, keep_norms_in_eval
