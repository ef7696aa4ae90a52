"""``attent bench``: attent beside plain PyTorch and its rivals, at shapes of your own, on the device you have."""
