"""Methods: one file and one function `(task) -> Iterator[RoundResult]` each; results are yielded round by round.

`kmine.methods.registry` finds them by name.
"""
