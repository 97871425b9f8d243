"""`kmine check`: what would spoil a result in a data set."""
