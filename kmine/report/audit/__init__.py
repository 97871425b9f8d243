"""The page of an audit: audit.html with its scripts, style sheet and charts."""
