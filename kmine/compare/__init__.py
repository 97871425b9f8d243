"""`kmine compare`: methods of runs or of a sweep on the test split."""
