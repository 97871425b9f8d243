"""From settings to a task ready to run, and finished runs opened again."""
