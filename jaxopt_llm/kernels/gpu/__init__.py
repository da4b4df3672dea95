"""Kernels for GPUs, in Pallas for Triton. Imported on first use, as Pallas takes a while."""

from jaxopt_llm.kernels.gpu.attend import attend

__all__ = ["attend"]
