"""The same model elsewhere: Hugging Face folders, GGUF and ONNX files, lm-evaluation-harness, and the way back into a run."""
