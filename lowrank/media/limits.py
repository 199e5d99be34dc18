"""Pixels of a picture, as LLaMA-Factory limits them: what is larger is made smaller before the model's processor sees
it, what is smaller larger."""

MAX_PIXELS = 768 * 768
MIN_PIXELS = 32 * 32
