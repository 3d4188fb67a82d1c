"""Triton kernels of the contrastive losses."""
