"""Images and masks at training size, decoded once, in flat files."""
