"""A reviewer's verdicts and corrected masks: files in, plain values out."""
