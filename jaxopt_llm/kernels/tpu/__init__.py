"""JAX's own TPU kernels, called with our arrays where the platform is a TPU."""

from jaxopt_llm.kernels.tpu.attend import attend
from jaxopt_llm.kernels.tpu.grouped import megablox

__all__ = ["attend", "megablox"]
