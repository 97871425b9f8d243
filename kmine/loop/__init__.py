"""`kmine loop`: train on the few masks, mine pseudo masks, retrain, repeat."""
