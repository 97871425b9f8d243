"""`kmine sweep`: methods, models, label fractions and seeds, each in a run of its own."""
