"""How large a pool the launch that has scored it also chooses from."""

#: A larger one ends its launch with scores and goes to select_top_k: one block alone would take too long over it.
MAX_IN_LAUNCH = 16384
