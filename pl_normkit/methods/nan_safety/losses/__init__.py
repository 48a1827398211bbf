"""The loss linter: from a loss and an example to the arguments at which it is not finite, with the rule and the stable form.

- loss_call, arguments: the loss and its example as named values with roles.
- search, corners, steering: moves to the border of the domain, and along gradients.
- stable_forms, witness: from the operation that failed to rule and stable form; what a finding carries.
- stress: a training step on corner batches.
- cases, loss_graph, ranges: what the autograd graph alone suggests.
"""
