"""The public classes and functions; `import kmine` loads each of them at its first use."""
