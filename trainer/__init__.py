"""Train block-diagonal sparse autoencoders on attention-head outputs."""

__version__ = "0.2.0"
