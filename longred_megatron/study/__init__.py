"""Studies: several runs of recipes with several seeds, measured on the same texts and prompts, and compared."""
