"""What a longer window gained and kept: perplexity, retrieval and hidden-state similarity of several models, side by side."""
