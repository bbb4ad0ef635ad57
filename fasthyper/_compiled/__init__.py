"""Where the build puts the compiled libraries, and its record of them: see `fasthyper.compiled`."""
