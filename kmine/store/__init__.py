"""The run folder: `kmine.store.run_folder`; rows of its tables: `kmine.store.tables`."""
