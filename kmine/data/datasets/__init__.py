"""Data sets, in the layouts that are downloaded, and one's own folder."""
