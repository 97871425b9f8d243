"""What the rounds of every method are made of: the task, asking, teaching, training and scoring."""
