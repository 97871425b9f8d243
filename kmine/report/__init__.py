"""Pages, charts and tables of results; sole home of jinja2 and matplotlib."""
