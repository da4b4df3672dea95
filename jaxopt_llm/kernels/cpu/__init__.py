"""C++ kernels behind the XLA FFI, and what calls them. Private: `jaxopt_llm.kernels` has the public functions."""
