"""This project beside plain ways to do the same work, on the machine at hand: one file a comparison, see `base`."""
