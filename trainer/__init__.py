"""Train block-diagonal sparse autoencoders on attention-head outputs."""
