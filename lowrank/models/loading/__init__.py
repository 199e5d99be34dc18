"""From a folder or a hub name to a frozen base, quantized as it loads."""
