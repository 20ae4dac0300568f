"""Export and import: Hugging Face folders, GGUF and ONNX files, nanoGPT checkpoints, and an lm-evaluation-harness adapter."""
