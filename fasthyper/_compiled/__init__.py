"""The folder of the compiled libraries and of the record of their build: see `fasthyper.compiled`."""
