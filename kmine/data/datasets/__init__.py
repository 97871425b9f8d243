"""Data sets in their published layouts, a user's own folder, the phantom."""
