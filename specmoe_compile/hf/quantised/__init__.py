"""Quantised checkpoints: from the tensors of a hub format to the planes of a record.

One file per format. `base` says what a format is asked, `schemes` picks the format by the
checkpoint's `quantization_config`, `experts` joins gate and up as the model's module has them.
"""
