"""`kmine audit`: pseudo masks and given masks of a finished run, the most suspicious first."""
