"""What frozen teachers say of texts, kept on disk: computed once, read by any later layout, order or run."""
