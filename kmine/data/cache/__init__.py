"""Images and masks at training size in flat files, decoded once."""
