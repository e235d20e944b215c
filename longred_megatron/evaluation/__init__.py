"""What a longer window gained and kept: perplexity, retrieval and similarity of several models, side by
side."""
