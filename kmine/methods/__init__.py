"""Methods: one file and one signature each, `(task) -> Iterator[RoundResult]`: each round as it is done.

What they share stands once in `kmine.rounds`. By name they are found in `kmine.methods.registry`.
"""
