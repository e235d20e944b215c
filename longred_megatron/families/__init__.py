"""Model families: what a Hugging Face folder's config.json says of the model, in the project's terms."""

from longred_megatron.families.architecture import Architecture, read_architecture

__all__ = ["Architecture", "read_architecture"]
