"""The guard of optimizer steps, Lightning-free.

- step_guard: `StepGuard`, the state machine; running: what it remembers.
- decision: whether a step is finite; losses_seen, buffers, watched: what is looked at.
- raw_steps, device_flags: steps past a trainer and on the device.
- causes, undo, budget, events: what stays bad, what is put back, limits and spikes, reports; last_look: what no step looks at.
"""
