"""The diagnosis of a step: which operation was first not finite, and why.

- first_bad: the first operation that was not finite; explanations: why; sources: on which line.
- rerun, alone, replay: a step run again, without collectives; the file of an event.
"""
