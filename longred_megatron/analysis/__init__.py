"""Studies of one model for `tools/analyze.py`, each a file; `STUDIES` of tools/analyze.py lists them."""
