"""`kmine plan`: settings from the data, the machine and a time budget; the default of `kmine loop`."""
