"""Files: atomic, signed, downloaded, unpacked."""
