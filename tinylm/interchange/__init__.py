"""Import and export: Hugging Face folders, GGUF, ONNX and ARPA files, nanoGPT checkpoints, and an lm-evaluation-harness adapter."""
