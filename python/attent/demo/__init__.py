"""``attent demo``: a small vision transformer on real images, with and without a teacher, at equal seconds."""
